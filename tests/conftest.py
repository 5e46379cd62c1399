"""A workspace that goes when the tests end, and small data sets of which every pixel is known."""

import atexit
import io
import itertools
import os
import shutil
import sys
import tempfile
import urllib.error
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Set here, before anything imports helpers, so that the notebooks' kernels inherit it too.
os.environ.setdefault("SCALE", "quick")
os.environ.setdefault("MPLBACKEND", "Agg")
for folder in ("WORKSPACE", "XDG_CACHE_HOME"):
    if folder not in os.environ:
        os.environ[folder] = tempfile.mkdtemp(prefix="mask-and-depth-")
        atexit.register(shutil.rmtree, os.environ[folder], ignore_errors=True)

# How the published sets name a file of each kind; the extension follows. {b}, {f} and {n} are the numbers of background,
# object and place; {i} counts all samples and {j} those of a background, both from 1.
FILE_NAMES = {
    "raguram": {
        "bg": "bg_images/Image_{b}",
        "fg_bg": "fg_bg/Image_{b}_{f}_{n}",
        "mask": "fg_bg_mask/Image_{b}_{f}_{n}",
        "depth": "fg_bg_depth/Image_{b}_{f}_{n}",
    },
    "mpaditya": {
        "bg": "bg_192/bg192_{b:02}",
        "fg_bg": "fg_bg/bg192_{b:02}_fg{i:04}",
        "mask": "mask/bg192_{b:02}_fg{i:04}",
        "depth": "fg_bg_depth_full/bg192_{b:02}_fg{i:04}",
    },
    "deepjyoti": {
        "bg": "bg/bg_{b}",
        "fg_bg": "image/fg_bg_{i}",
        "mask": "mask/fg_bg_mask_{i}",
        "depth": "depthmap/depth_{i}",
    },
    "roshantac": {
        "bg": "bg/bg{b}",
        "fg_bg": "fgbg/img{i}",
        "mask": "fgbgmask/mask{i}",
        "depth": "DepthMap/img{i}",
    },
    "modest": {
        "bg": "bg/bg{b:03}",
        "fg_bg": "bg_fg/bg{b:03}_fg{f:03}_{n:02}",
        "mask": "bg_fg_mask/bg{b:03}_fg{f:03}_{n:02}_mask",
        "depth": "bg_fg_depth_map/bg{b:03}_fg{f:03}_{n:02}_depth_map",
    },
    "akshat": {
        "bg": "bg/bg_{b:03}",
        "fg_bg": "fg_bg/bg_{b:03}/img_{j:04}",
        "mask": "fg_bg_mask/bg_{b:03}/img_{j:04}",
        "depth": "fg_bg_depth/bg_{b:03}/img_{j:04}",
    },
}
LABELS = "label_data.csv"  # names the four files of each sample, where the layout is roshantac's
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}


def draw(b: int, f: int, n: int, size: int) -> dict[str, np.ndarray]:
    """The four uint8 pictures of a sample: noise, a brighter rectangle in it, and depth that shrinks from row to row."""
    bg = np.random.default_rng(b).integers(0, 180, (size, size, 3), np.uint8)
    place = np.random.default_rng([f, n])
    height, width = place.integers(size // 6, size // 2, 2)
    top, left = place.integers(0, size // 2, 2)
    mask = np.zeros((size, size), np.uint8)
    mask[top : top + height, left : left + width] = 255
    depth = np.repeat(np.linspace(255, 20 + b % 200, size).astype(np.uint8)[:, None], size, 1)
    depth[mask > 0] = depth[mask > 0] // 2
    return {"bg": bg, "fg_bg": bg + (mask > 0)[..., None] * np.uint8(40 + f % 32), "mask": mask, "depth": depth}


def encoded(picture: np.ndarray, extension: str = ".png") -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, FORMATS[extension.lower()])
    return file.getvalue()


def make_zip(
    path: Path,
    layout: str = "modest",
    samples=None,  # (background, object, place) of each; default: 3 backgrounds x 4 objects x 2 places
    size: int = 24,
    extension: str = ".png",
    prefix: str = "",  # a folder that wraps all files
    compression: int = zipfile.ZIP_STORED,
    zip64: bool = False,
    without=(),  # names to leave out
    files=None,  # name -> bytes, besides the samples' or in their place
    label=str,  # what the table of labels makes of a name
) -> list[dict]:
    """Writes a data set, its entries in random order, and gives its samples in the order in which they are promised."""
    samples = sorted(samples or itertools.product((1, 2, 3), (1, 2, 3, 4), (1, 2)))
    content, made, labels = {}, [], []
    for i, (b, f, n) in enumerate(samples, 1):
        pictures = draw(b, f, n, size)
        j = 1 + sum(other["b"] == b for other in made)
        names = {kind: name.format(b=b, f=f, n=n, i=i, j=j) for kind, name in FILE_NAMES[layout].items()}
        paths = {kind: prefix + name + extension for kind, name in names.items()}
        content |= {path: encoded(pictures[kind], extension) for kind, path in paths.items()}
        labels.append(";".join(f'"{label(path)}"' for path in paths.values()))
        made.append(pictures | {"b": b, "f": f, "n": n, "name": "_".join(Path(names["fg_bg"]).parts[1:])})
    if layout == "roshantac":
        np.random.default_rng(1).shuffle(labels)
        content[prefix + LABELS] = "\n".join([*labels, ""]).encode()
    content = {name: data for name, data in content.items() if name not in without} | (files or {})
    names = sorted(content)
    np.random.default_rng(0).shuffle(names)
    with zipfile.ZipFile(path, "a", compression) as archive:
        for name in names:
            entry = zipfile.ZipInfo(name)
            entry.compress_type = compression
            with archive.open(entry, "w", force_zip64=zip64) as file:
                file.write(content[name])
    return made


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Everything here is small: several threads would mostly wait for each other, above all on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def write_zip():
    return make_zip


@pytest.fixture(scope="session")
def encode():
    return encoded


@pytest.fixture(scope="session")
def sample() -> Path:
    """The data set that comes with the project."""
    return ROOT / "assets" / "sample.zip"


@pytest.fixture(scope="session")
def resnet18(tmp_path_factory):
    """torchvision's ResNet-18 with random weights and statistics; and a TORCH_HOME that has them in the place of ImageNet's."""
    torch.manual_seed(1234)  # another than a run of the tests begins with
    net = torchvision.models.resnet18().eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for values, least, most in ((module.weight, 0.5, 1.5), (module.bias, -0.5, 0.5)):
                torch.nn.init.uniform_(values, least, most)
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 1.5)
    home = tmp_path_factory.mktemp("torch")
    file = home / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    file.parent.mkdir(parents=True)
    # Files of old do not count batches.
    torch.save({name: values for name, values in net.state_dict().items() if "tracked" not in name}, file)
    return net, home


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """No file of weights at first, and nothing to download them from."""

    def fail(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "urlopen", fail)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints" / "resnet18-f37072fd.pth"


@pytest.fixture
def imagenet(resnet18, offline, monkeypatch):
    """The network whose weights are taken for ImageNet's."""
    monkeypatch.setenv("TORCH_HOME", str(resnet18[1]))
    return resnet18[0]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """A folder of data sets that are not part of the project: the environment variable SHARED_DATA or ../shared/data."""
    folder = Path(os.environ.get("SHARED_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}")
    return folder
