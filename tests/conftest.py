"""Folders that go when the tests end, one thread a process, and small data sets of known pixels."""

import atexit
import functools
import io
import itertools
import os
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Set before anything imports numpy, torch or helpers; the notebooks' kernels and started programs inherit it.
# All is small here: several threads would mostly wait for each other, above all on a busy machine.
# DATA_ZIP: notebook 00 makes a set in the workspace that others must not find half-way.
ONE_THREAD = ("OMP_NUM_THREADS=1", "MKL_NUM_THREADS=1")
for pair in ("SCALE=quick", "MPLBACKEND=Agg", *ONE_THREAD, "DATA_ZIP=assets/sample.zip"):
    os.environ.setdefault(*pair.split("="))
for variable in {"WORKSPACE", "XDG_CACHE_HOME"} - set(os.environ):
    folder = tempfile.TemporaryDirectory(prefix="mask-and-depth-", ignore_cleanup_errors=True)
    os.environ[variable] = folder.name
    atexit.register(folder.cleanup)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from nbval import kernel  # noqa: E402
from PIL import Image  # noqa: E402

# Kernels talk over files: of two processes that look for free ports at once, both may find the same.
SOCKETS = tempfile.TemporaryDirectory(prefix="kernels-")
kernel.KernelManager = functools.partial(kernel.KernelManager, transport="ipc", ip=f"{SOCKETS.name}/kernel")

# How the published sets name the four files of a sample, without ending. {b}, {f}, {n} are the numbers of the
# background, object and place; {i} counts all samples and {j} those of a background, both from 1.
FILE_NAMES = {
    "raguram": "bg_images/Image_{b} "
    "fg_bg/Image_{b}_{f}_{n} fg_bg_mask/Image_{b}_{f}_{n} fg_bg_depth/Image_{b}_{f}_{n}",
    "mpaditya": "bg_192/bg192_{b:02} fg_bg/bg192_{b:02}_fg{i:04} "
    "mask/bg192_{b:02}_fg{i:04} fg_bg_depth_full/bg192_{b:02}_fg{i:04}",
    "deepjyoti": "bg/bg_{b} image/fg_bg_{i} mask/fg_bg_mask_{i} depthmap/depth_{i}",
    "roshantac": "bg/bg{b} fgbg/img{i} fgbgmask/mask{i} DepthMap/img{i}",
    "modest": "bg/bg{b:03} bg_fg/bg{b:03}_fg{f:03}_{n:02} "
    "bg_fg_mask/bg{b:03}_fg{f:03}_{n:02}_mask bg_fg_depth_map/bg{b:03}_fg{f:03}_{n:02}_depth_map",
    "akshat": "bg/bg_{b:03} "
    "fg_bg/bg_{b:03}/img_{j:04} fg_bg_mask/bg_{b:03}/img_{j:04} fg_bg_depth/bg_{b:03}/img_{j:04}",
}


TEN_BY_TEN = [(b, f, 1) for b in range(1, 11) for f in range(1, 11)]


def draw(b: int, f: int, n: int, size: int) -> dict[str, np.ndarray]:
    """The uint8 pictures of a sample: noise, a brighter rectangle in it, depth that shrinks by the row."""
    bg = np.random.default_rng(b).integers(0, 180, (size, size, 3), np.uint8)
    height, width, top, left = np.random.default_rng([f, n]).integers([size // 6, size // 6, 0, 0], size // 2)
    mask = np.zeros((size, size), np.uint8)
    mask[top : top + height, left : left + width] = 255
    depth = np.repeat(np.linspace(255, 20 + b % 200, size).astype(np.uint8)[:, None], size, 1)
    depth[mask > 0] = depth[mask > 0] // 2
    fg_bg = bg + (mask > 0)[..., None] * np.uint8(40 + f % 32)
    return {"bg": bg, "fg_bg": fg_bg, "mask": mask, "depth": depth}


def encoded(picture: np.ndarray | Image.Image, extension: str = ".png", **options) -> bytes:
    """A file's bytes, by its extension; lossless where the format can be."""
    file, picture = io.BytesIO(), picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    picture.save(file, Image.registered_extensions()[extension.lower()], **{"lossless": True} | options)
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
    skip=(),  # kinds to leave out
    without=(),  # files to leave out
    files=None,  # name -> bytes, besides the samples' or in their place
    label=str,  # what the table of labels makes of a name
    change=lambda kind, picture, *numbers: None,  # of a picture and its (b, f, n): other bytes or None
) -> list[dict]:
    """Writes a data set, its entries in random order, and gives its samples in the order that is promised."""
    samples = sorted(samples or itertools.product((1, 2, 3), (1, 2, 3, 4), (1, 2)))
    content, made, labels = {}, [], []
    for i, (b, f, n) in enumerate(samples, 1):
        pictures = draw(b, f, n, size)
        numbers = {"b": b, "f": f, "n": n, "i": i, "j": 1 + sum(other["b"] == b for other in made)}
        names = dict(zip(pictures, FILE_NAMES[layout].format(**numbers).split(), strict=True))
        paths = {kind: prefix + name + extension for kind, name in names.items() if kind not in skip}
        for kind, file in paths.items():
            content[file] = change(kind, pictures[kind], b, f, n) or encoded(pictures[kind], extension)
        labels.append(";".join(f'"{label(file)}"' for file in paths.values()))
        made.append(pictures | {"b": b, "f": f, "n": n, "name": "_".join(Path(names["fg_bg"]).parts[1:])})
    if layout == "roshantac":
        np.random.default_rng(1).shuffle(labels)
        content[f"{prefix}label_data.csv"] = "\n".join([*labels, ""]).encode()
    content = {name: content[name] for name in set(content) - set(without)} | (files or {})
    with zipfile.ZipFile(path, "a", compression) as archive:
        for name in np.random.default_rng(0).permutation(sorted(content)).tolist():
            entry = zipfile.ZipInfo(name)
            entry.compress_type = compression
            with archive.open(entry, "w", force_zip64=zip64) as file:
                file.write(content[name])
    return made


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def write_zip():
    return make_zip


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A zip of ten backgrounds, each with ten objects, of 16 x 16 pixels."""
    make_zip(path := tmp_path_factory.mktemp("data") / "data.zip", samples=TEN_BY_TEN, size=16)
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A folder of kept pictures for this test alone."""
    monkeypatch.setattr("helpers.CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def sample() -> Path:
    """The data set that comes with the project."""
    return ROOT / "assets" / "sample.zip"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """A folder of data sets that are not part of the project: the variable SHARED_DATA or ../shared/data."""
    folder = Path(os.environ.get("SHARED_DATA") or ROOT.parent / "shared" / "data")
    return folder if folder.is_dir() else pytest.skip(f"no folder {folder}")
