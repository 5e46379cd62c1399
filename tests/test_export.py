"""Networks in files that other programs run. Oracles: the network itself, and ONNX Runtime for what ONNX means."""

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import helpers
from helpers import MODELS, ZipDataset, export, to_float

ROOT = Path(helpers.__file__).parent


class Small(nn.Module):
    """The difference of the pictures, seen at a quarter of the size, and their product."""

    stride = 4

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.full((1, 3, 1, 1), 10.0))

    def forward(self, bg, fg_bg):
        coarse = nn.functional.avg_pool2d(self.slope * (fg_bg - bg), 4)
        return nn.functional.interpolate(coarse, scale_factor=4).mean(1, keepdim=True), (bg * fg_bg).mean(1, keepdim=True)


def as_trained(name):
    """A network whose batch norms have means, variances and slopes other than 0 and 1."""
    torch.manual_seed(0)
    model = MODELS[name]()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean, 0, 0.3)
            nn.init.uniform_(layer.running_var, 0.3, 0.8)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0, 0.3)
    return model.eval()


def probabilities(network, bg, fg_bg):
    """What a file of this network should give, computed from what the network gives."""
    with torch.no_grad():
        mask_logits, depth = network(bg, fg_bg)
    return 1 / (1 + np.exp(-mask_logits.double().numpy())), depth.numpy()


def functions(files):
    """The two files, as functions of bg and fg_bg that give mask and depth as arrays."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session, program = onnxruntime.InferenceSession(files[0], options), torch.export.load(files[1]).module()

    def run_program(bg, fg_bg):
        given = program(bg, fg_bg)
        return given["mask"].numpy(), given["depth"].numpy()

    return lambda bg, fg_bg: session.run(["mask", "depth"], {"bg": bg.numpy(), "fg_bg": fg_bg.numpy()}), run_program


@pytest.fixture(scope="module")
def pictures(sample):
    """Background and picture of the drawn sample, and noise: float (3, 3, 96, 96) each."""
    batch = to_float(ZipDataset(sample, 96).batch([0, 100, 200]))
    noise = torch.rand(2, 3, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    return {"drawn": (batch["bg"], batch["fg_bg"]), "noise": noise}


@pytest.fixture(scope="module", params=["difference_unet", "resunet", "dual_stream"])
def exported(request, tmp_path_factory):
    """A network, its two files, and these as functions."""
    folder = tmp_path_factory.mktemp(request.param)
    network = as_trained(request.param)
    torch.save(network.state_dict(), folder / "any name")
    files = export(folder / "any name", str(folder / "new" / "folder"))
    assert files == (folder / "new" / "folder" / f"{request.param}.onnx", folder / "new" / "folder" / f"{request.param}.pt2")
    return network, files, functions(files)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A file with the weights of a small network."""
    monkeypatch.setitem(MODELS, "small", Small)
    torch.save(Small().state_dict(), tmp_path / "small.pt")
    return tmp_path / "small.pt"


@pytest.mark.parametrize("kind", ["drawn", "noise"])
@pytest.mark.parametrize("count, height, width", [(1, 96, 96), (3, 96, 96), (1, 32, 64), (3, 64, 32)])
def test_both_files_give_what_the_network_gives(exported, pictures, kind, count, height, width):
    network, _, both = exported
    bg, fg_bg = (some[:count, :, :height, :width].contiguous() for some in pictures[kind])
    expected = probabilities(network, bg, fg_bg)
    # Spread over a hundred times what may differ, so that a constant would not do.
    assert all(one.shape == (count, 1, height, width) and one.std() > 1e-3 for one in expected)
    for run in both:
        for one, other in zip(run(bg, fg_bg), expected, strict=True):
            assert one.dtype == np.float32
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def takes_and_gives(file):
    """Names, types and shapes of an ONNX file's inputs and outputs."""
    session = onnxruntime.InferenceSession(file)
    return [[(one.name, one.type, one.shape) for one in some] for some in (session.get_inputs(), session.get_outputs())]


def named(height, width):
    return [
        [(name, "tensor(float)", ["batch", channels, height, width]) for name in names]
        for names, channels in ((("bg", "fg_bg"), 3), (("mask", "depth"), 1))
    ]


def test_the_onnx_file_says_what_it_takes_and_gives(exported):
    network, files, _ = exported
    assert takes_and_gives(files[0]) == named(f"{network.stride}*h", f"{network.stride}*w")


def test_two_files_are_written_and_nothing_beside_them(exported):
    files = exported[1]
    assert set(files[0].parent.iterdir()) == set(files)


def test_the_files_hold_no_path_of_the_machine(exported):
    files = exported[1]
    with zipfile.ZipFile(files[1]) as archive:
        contents = [files[0].read_bytes(), *map(archive.read, archive.namelist())]
    assert b"FullSizeDecoder" in contents[0] or b"ResBlock" in contents[0] or b"BasicBlock" in contents[0]  # names are readable
    assert not any(text in content for content in contents for text in (b"helpers.py", bytes(ROOT), bytes(Path(__file__))))


FRESH = """
import importlib.util, sys, torch
bg, fg_bg = torch.load("pictures.pt")
found = torch.export.load(sys.argv[1]).module()(bg, fg_bg)
assert importlib.util.find_spec("helpers") is None and "helpers" not in sys.modules
torch.save(dict(found), "found.pt")
"""


def test_the_program_runs_where_this_project_is_not(small, tmp_path, monkeypatch):
    """Here with the weights that are taken where none are named."""
    monkeypatch.setattr(helpers, "WEIGHTS", small)
    bg, fg_bg = torch.rand(2, 1, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    torch.save((bg, fg_bg), tmp_path / "pictures.pt")
    program = export("", tmp_path)[1]
    assert program.name == "small.pt2"
    subprocess.run([sys.executable, "-I", "-c", FRESH, str(program)], cwd=tmp_path, check=True)
    found = torch.load(tmp_path / "found.pt")
    assert list(found) == ["mask", "depth"] and not any(one.requires_grad for one in found.values())
    for one, other in zip(found.values(), probabilities(Small(), bg, fg_bg), strict=True):
        np.testing.assert_allclose(one.numpy(), other, rtol=0, atol=1e-5)


def test_a_size_that_is_given_is_the_only_one_that_is_taken(small, tmp_path):
    files = export(small, tmp_path, 12)
    assert takes_and_gives(files[0]) == named(12, 12)
    for run in functions(files):
        for count in (1, 3):
            bg, fg_bg = torch.rand(2, count, 3, 12, 12)
            np.testing.assert_allclose(run(bg, fg_bg), probabilities(Small(), bg, fg_bg), rtol=0, atol=1e-5)
        with pytest.raises(Exception, match=r"Got: 16 Expected: 12|== 12"):
            run(*torch.rand(2, 1, 3, 16, 12))


@pytest.mark.parametrize("size, instead", [(50, 48), (51, 52), (13, 12), (1, 4), (0, 4), (-8, 4)])
def test_a_size_that_the_network_does_not_take_is_refused(small, tmp_path, size, instead):
    with pytest.raises(ValueError, match=rf"size is {size}; small takes pictures of a multiple of 4 pixels\. Use {instead}\."):
        export(small, tmp_path / "new", size)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("missing", [["onnx"], ["onnxscript"], ["onnx", "onnxscript"]])
def test_a_missing_package_is_named(small, tmp_path, monkeypatch, missing):
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    said = f"To export, {' and '.join(missing)} must be there: pip install {' '.join(missing)}"
    with pytest.raises(ImportError, match=f"^{said}$"):
        export(small, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name, error", [("nowhere.pt", FileNotFoundError), ("picture.pt", ValueError)])
def test_what_holds_no_weights_is_refused(tmp_path, name, error):
    (tmp_path / "picture.pt").write_bytes(b"a picture")
    with pytest.raises(error, match=name):
        export(tmp_path / name, tmp_path / "new")
    assert not (tmp_path / "new").exists()
