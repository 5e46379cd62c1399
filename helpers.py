"""What the notebooks share: the data in a zip, networks, losses, metrics, runs that can be resumed, pictures.

One network looks at two pictures, a background (`bg`) and the same scene with an object in it (`fg_bg`), and
predicts two, the object's `mask` and the scene's `depth`; always in this order. Tensors are NCHW. Pictures are
uint8 while stored and float in [0, 1] at the network; a mask is 0 or 1; depth is in [0, 1], growing with distance.
"""

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import io
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import unicodedata
import warnings
import zipfile
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import accelerate
import filelock
import kornia.augmentation as K
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import psutil
import simplejpeg
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from IPython import get_ipython
from matplotlib.figure import Figure
from PIL import Image, ImageOps, PngImagePlugin
from pytorch_msssim import ssim as msssim_ssim
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # CUDA, once started, cannot be forked to several GPUs
torch.backends.cudnn.allow_tf32 = False  # float32 means float32 on a GPU too: TF32 moves SSIM by hundredths
torch.backends.cudnn.benchmark = True  # nearly all batches are alike: cuDNN tries its ways once, takes the fastest

# ---------- Where it runs -------------------------------------------------------------------------------------

GPU = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else ""
DEVICE = torch.device(GPU or "cpu")
SCALE = os.environ.get("SCALE") or ("full" if GPU == "cuda" else "quick")
if SCALE not in ("quick", "full"):
    raise ValueError(f"The environment variable SCALE is {SCALE!r}; it can be 'quick' or 'full'.")
ROOT = Path(__file__).resolve().parent
DRIVE = Path("/content/drive")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mask-and-depth"  # may be deleted


def environment() -> str:
    """What this runs on, in a line: versions, device and scale."""
    gpus = torch.cuda.device_count()
    device = f"{gpus} GPU{'s' * (gpus > 1)}" if gpus else f"{DEVICE.type.upper()}, {os.cpu_count()} cores"
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, numpy {np.__version__}"
    return f"Python {sys.version.split()[0]}, {versions}; {device}; scale: {SCALE}"


def in_colab() -> bool:
    """Whether this is a notebook in Google Colab. Kaggle sets Colab's variables too, so its own are looked for."""
    return "google.colab" in str(get_ipython()) and not any(name.startswith("KAGGLE") for name in os.environ)


def workspace() -> Path:
    """The folder where results are made: the environment variable WORKSPACE (relative to the project), else `runs/`
    beside helpers.py. In Colab, where it goes with the machine, a thread copies it to the user's Drive."""
    folder = ROOT / Path(os.environ.get("WORKSPACE") or "runs").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    _drive(folder)
    return folder


def data_zip(path: str | Path = "") -> Path:
    """The data set to use: `path` if given, else the environment variable DATA_ZIP, else the zip that notebook 00
    made in the workspace, else the project's sample. A folder may stand for a zip. A zip on Drive, which is slow, is
    copied to the local disk. Raises FileNotFoundError."""
    given = str(path) or os.environ.get("DATA_ZIP", "")
    if not given:
        made = fetch("scenes.zip")
        return made if made.exists() else ROOT / "assets" / "sample.zip"
    workspace()  # mounts Drive
    found = _found(given, "Give the path of a data set zip, or none for the sample.")
    if DRIVE not in found.parents or found.is_dir():
        return found
    local = CACHE / found.name
    if not local.exists() or local.stat().st_mtime_ns != found.stat().st_mtime_ns:
        _copy(found, local)
    return local


def _found(path: str | Path, remedy: str) -> Path:
    """What is at this path or, as a notebook starts in notebooks/, at this path below the project."""
    for place in (Path(path).expanduser(), ROOT / path):
        if place.exists():
            return place
    raise FileNotFoundError(f"{path}: there is no such file. {remedy}")


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name to write to; the written file takes the place of `path` once it is whole and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    yield part
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def _known(name: str | None, names: Iterable[str | None], what: str) -> None:
    if name not in names:
        raise ValueError(f"Unknown {what} {name!r}. Known: {', '.join(map(str, names))}.")


# ---------- Data ----------------------------------------------------------------------------------------------

KINDS = ("bg", "fg_bg", "mask", "depth")
CHANNELS = {"bg": 3, "fg_bg": 3, "mask": 1, "depth": 1}

# How the published data sets name their pictures, in the order of KINDS: {b} is the background's number, {f} the
# object's, {n} the place's or the sample's. A leading folder may wrap it all, and one of ENDINGS follows.
LAYOUTS = {
    "raguram": "bg_images/Image_{b} fg_bg/Image_{b}_{f}_{n} "
    "fg_bg_mask/Image_{b}_{f}_{n} fg_bg_depth/Image_{b}_{f}_{n}",
    "mpaditya": "bg_192/bg192_{b} fg_bg/bg192_{b}_fg{n} mask/bg192_{b}_fg{n} fg_bg_depth_full/bg192_{b}_fg{n}",
    "deepjyoti": "bg/bg_{b} image/fg_bg_{n} mask/fg_bg_mask_{n} depthmap/depth_{n}",
    "roshantac": "label_data.csv",  # a table: the paths of the four, a line for each sample
    "modest": "bg/bg{b} bg_fg/bg{b}_fg{f}_{n} "
    "bg_fg_mask/bg{b}_fg{f}_{n}_mask bg_fg_depth_map/bg{b}_fg{f}_{n}_depth_map",
    "akshat": "bg/bg_{b} fg_bg/bg_{b}/img_{n} fg_bg_mask/bg_{b}/img_{n} fg_bg_depth/bg_{b}/img_{n}",
}
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # of those that Pillow knows, some start other programs
NOT_ZIP = {  # what is given in place of a zip, by its first bytes
    b"<": "a web page (HTML), such as Google Drive's warning: download the zip itself",
    b"Rar!": "a rar archive: unpack it, and give the folder",
    b"\x1f\x8b": "a gzip file, as tar.gz is: unpack it, and give the folder",
}


def read_picture(data: bytes, kind: str = "fg_bg", smallest: int = 0) -> np.ndarray:
    """The picture in a file's bytes: uint8 (H, W, 3), of a mask or depth (H, W, 1), the way up that its camera
    noted. A JPEG over four times as large as `smallest` may come at half its size. Raises ValueError for what is no
    picture of 8 bits a channel, too large, transparent in parts, or in colours or greys that are not meant."""
    grey = CHANNELS[kind] == 1
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError
        if image.mode.startswith(("I", "F")):
            raise ValueError("it has more than 8 bits a channel; save it with 8")
        plain = image.format == "JPEG" and image.getexif().get(0x112, 1) == 1
        if plain and image.mode in (("L",) if grey else ("L", "RGB")):  # simplejpeg is twice as fast as Pillow
            scale = {"min_height": 2 * smallest, "min_width": 2 * smallest, "min_factor": 2} if smallest else {}
            return simplejpeg.decode_jpeg(data, "GRAY" if grey else "RGB", **scale)
        if grey and image.mode == "RGB":
            image.draft("YCbCr", None)  # of a JPEG, its own grey
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255:
            raise ValueError("it is transparent in parts; save what should be seen there")
        if grey and image.mode not in ("1", "L", "LA") and np.ptp(image.convert("RGB"), axis=2).max() > 64:
            raise ValueError("it is in colours where grey is meant; those of a colour map are no distances")
        return np.array(image.convert("L" if grey else "RGB")).reshape(image.height, image.width, -1)
    except Image.DecompressionBombError:
        raise ValueError(f"it has over {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller") from None
    except Exception as error:  # decoders raise many kinds
        unknown = isinstance(error, Image.UnidentifiedImageError)
        raise ValueError(f"it is none of {', '.join(FORMATS)}" if unknown else str(error)) from None


def _refuse_grey(mask: np.ndarray) -> None:
    """Raises ValueError for what is no mask of black and white. What JPEG smears is little, and of all levels."""
    grey, white = np.count_nonzero(mask + np.uint8(64) & 128), np.count_nonzero(mask > 191)  # grey: 64 to 191
    if grey > max(white / 10, 16):
        levels = np.bincount(mask.ravel(), minlength=256)[64:192]
        third_level = np.convolve(levels, np.ones(8)).max() > grey / 2
        if third_level or 2 * grey > mask.size or grey > 4 * white:
            raise ValueError(f"{grey} of its {mask.size} pixels are grey, and a mask is black and white")
    if 0 < mask.max() < 128:  # 0 and 1, say, or a number for each object
        raise ValueError(f"its brightest pixel is {mask.max()}, and in a mask the object is 255")


def _open_archive(path: Path) -> zipfile.ZipFile:
    """Raises ValueError, which says what the file is, if it is no zip."""
    with open(path, "rb") as file:
        start = file.read(512).lstrip()
    what = next((what for first, what in NOT_ZIP.items() if start.startswith(first)), "")
    try:
        if not what:
            archive = zipfile.ZipFile(path)
            if not any(0 < info.volume < 0xFFFF for info in archive.infolist()):
                return archive
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        what = "" if path.with_suffix(".z01").exists() else f"not a whole zip ({error}): copy it anew"
    split_zip = "one part of a split zip, or its parts joined: make it whole with zip -s 0 PART.zip --out WHOLE.zip"
    raise ValueError(f"{path} is {what or split_zip}.")


def _list_files(path: Path) -> tuple[list[str], list, str]:
    """Of a zip, of a folder, or of the zips in a folder, each of which then stands for a folder around its files:
    the files' names, where each is read, and a fingerprint of names and contents."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder.")
    files, loose, archives = [], [], [path]
    if path.is_dir():
        loose = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
        archives = [path / name for name in loose if re.fullmatch(r"[^/]+\.zip", name, re.IGNORECASE)]
        if archives and _recognise_layout([name for name in loose if name.lower().endswith(ENDINGS)]):
            beside = ", ".join(archive.name for archive in archives)
            warnings.warn(f"{path}: its pictures are read, and {beside} beside them is not.", stacklevel=3)
            archives = []
        loose = [name for name in loose if not archives or name.endswith(".csv")]
    for archive in map(_open_archive, archives):
        around = "" if path.is_file() else f"{Path(archive.filename).stem}/"
        files += [(around + i.filename.replace("\\", "/"), (archive, i), i.CRC) for i in archive.infolist()]
    # For checksums of loose files all would be read: their sizes tell whether the data have changed.
    files += [(name, path / name, (path / name).stat().st_size % 2**32) for name in loose]
    litter = re.compile(r"/$|(^|/)(__MACOSX/|\.[^/]|Thumbs\.db$|desktop\.ini$)")  # and a zip's entries for folders
    files = [file for file in files if not litter.search(file[0])]
    if not files:
        raise ValueError(f"{path} holds no files. A data set has pictures: bg, fg_bg, mask and depth.")
    names = [unicodedata.normalize("NFC", name) for name, _, _ in files]
    content = hashlib.blake2b(np.array([file[2] for file in files], np.uint32).tobytes(), digest_size=8)
    content.update("\n".join([*names, ""]).encode("utf-8", "surrogateescape"))
    return names, [place for _, place, _ in files], content.hexdigest()


def _pattern(name: str) -> re.Pattern:
    """What a whole path of this name in LAYOUTS matches, with the numbers as named groups."""
    numbered = re.sub(r"\\{(\w)\\}", r"(?P<\1>\\d{1,18})", re.escape(name))
    ending = "" if name.endswith(".csv") else f"(?:{'|'.join(map(re.escape, ENDINGS))})"
    return re.compile(f"(?:.*/)?{numbered}{ending}", re.IGNORECASE)


def _recognise_layout(names: Sequence[str]) -> str | None:
    """The layout whose table is there, or that most fg_bg names among some thousand files follow, if any."""
    if any(map(_pattern(LAYOUTS["roshantac"]).fullmatch, names)):
        return "roshantac"
    some = [names[i] for i in np.random.default_rng(0).permutation(len(names))[:10_000]]
    patterns = {name: _pattern(kinds.split()[1]) for name, kinds in LAYOUTS.items() if name != "roshantac"}
    counts = {name: sum(map(bool, map(pattern.fullmatch, some))) for name, pattern in patterns.items()}
    return max(counts, key=counts.get) if any(counts.values()) else None


def _match_names(names: Sequence[str], layout: str, defects: dict[str, str]) -> pd.DataFrame:
    """A row a sample, in the order of the numbers in its name: the numbers of its files, -1 where one is missing,
    and the ids of its background and object, -1 unknown."""
    tables = {}
    for kind, pattern in zip(KINDS, map(_pattern, LAYOUTS[layout].split()), strict=True):
        matches = ((i, pattern.fullmatch(name)) for i, name in enumerate(names))
        found, numbers = [(i, *map(int, match.groups())) for i, match in matches if match], list(pattern.groupindex)
        table = pd.DataFrame(found, columns=[kind, *numbers]).astype(np.int64).sort_values(numbers, kind="stable")
        for file in table[kind][table.duplicated(numbers, keep=False)]:
            defects[names[file]] = f"claims to be one {kind}, as another file does. Remove one."
        tables[kind] = table.drop_duplicates(numbers)
    if tables["fg_bg"].empty:
        raise ValueError(f"none of its {len(names)} files is a fg_bg picture of the layout {layout}.")
    bg_id, fg_id = _ids(layout, tables["fg_bg"], tables["bg"]["b"].to_numpy())
    samples = tables["fg_bg"].assign(bg_id=bg_id, fg_id=fg_id)
    for table in (tables["mask"], tables["depth"], tables["bg"].rename(columns={"b": "bg_id"})):
        samples = samples.merge(table, "left")
    return samples.fillna(-1).astype(np.int64)


def _ids(layout: str, samples: pd.DataFrame, backgrounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ids of backgrounds and objects that follow from the numbers in the names. deepjyoti counts its samples on,
    as many for each background, akshat for each anew. By the reports' recipe an object is put at 20 places, and
    mirrored at the same 20, before the next one follows."""
    place, unknown = samples["n"].to_numpy() - 1, np.full(len(samples), -1)
    last, count = int(place.max()) + 1, int(backgrounds.max(initial=0))
    if layout == "deepjyoti":
        # Where the end of the set is missing, the recipe tells how many a background has: 40 of each object.
        each = last // count if count and last % count == 0 else -(-last // (40 * max(count, 1))) * 40
        if 0 in backgrounds or not (count - 1) * each < last <= count * each:
            raise ValueError(f"it has {last} samples on {count} backgrounds; expected as many on each, from bg_1 on.")
        return place // each + 1, place % each // 40 if each % 40 == 0 else unknown
    bg_id, fg_id = samples["b"].to_numpy(), samples["f"].to_numpy() if "f" in samples else unknown
    if layout == "akshat" and last % 40 == 0:
        return bg_id, place // 40
    return bg_id, _fold_mirrored(bg_id, fg_id) if layout == "raguram" else fg_id


def _fold_mirrored(bg_id: np.ndarray, fg_id: np.ndarray) -> np.ndarray:
    """Where object f + F/2 mirrors object f, gives it the same id. F/2 is the number by which objects and mirrored
    ones stand on the same backgrounds; where none fits, as in a random part of a set, half of the highest."""
    last, pairs = int(fg_id.max()), np.unique(np.stack([bg_id, fg_id], 1), axis=0)
    halves = last - np.unique(fg_id)[::-1]  # the last object is the mirror image of one that is there
    for start in (0, 1)[: 1 + int(fg_id.min() > 0)]:  # objects may count from 0 or from 1
        for half in halves[halves >= (last + 1) // 2].tolist():
            mirrored = pairs[:, 1] >= start + half
            if np.array_equal(pairs[~mirrored], pairs[mirrored] - [0, half]):
                return (fg_id - start) % half + start
    warnings.warn("Mirrored objects cannot be told by their backgrounds; the highest number decides.", stacklevel=5)
    return (fg_id - start) % ((last + 2 - start) // 2) + start


def _match_table(names: Sequence[str], table: bytes, defects: dict[str, str]) -> pd.DataFrame:
    """What `_match_names` gives, from a table with the paths of a sample in each line. How a path begins depends on
    where the table was written: it means the file that ends like it in the most parts."""
    text = unicodedata.normalize("NFC", table.decode("utf-8-sig", "replace")).replace("\\", "/")
    separator = max(";\t,", key=text.partition("\n")[0].count)
    lines = pd.read_csv(io.StringIO(text), sep=separator, header=None, dtype=str, keep_default_na=False)
    if lines.shape[1] != 4:
        raise ValueError(f"its table has {lines.shape[1]} columns, not the paths of bg, fg_bg, mask and depth.")
    files = defaultdict(list)
    for i, name in enumerate(names):
        files[name.lower().rpartition("/")[2]].append(i)

    def find(path: str) -> int:
        parts = path.strip().lower().split("/")[::-1]
        alike = {i: len(os.path.commonprefix([parts, names[i].lower().split("/")[::-1]])) for i in files[parts[0]]}
        best = [i for i in alike if alike[i] == max(alike.values())]
        if path.strip() and len(best) != 1:
            defects[path] = f"of the table is in the data set {'more than once' if best else 'not at all'}."
        return best[0] if best else -1

    digits = lines[0].str.extract(r"(\d{1,18})\D*$")[0]
    for path in lines[0][digits.isna()]:
        defects[path] = "of the table has no number, by which backgrounds go."
    samples = pd.DataFrame({kind: lines[k].map(find) for k, kind in enumerate(KINDS)})
    samples["bg_id"], samples["fg_id"] = digits.fillna("-1").astype(np.int64), -1
    for file in samples["fg_bg"][samples["fg_bg"].duplicated() & (samples["fg_bg"] >= 0)]:
        defects[names[file]] = "stands in more than one line of the table."
    order = lines[1].str.lower().map(lambda path: [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", path)])
    return samples.loc[order.sort_values(kind="stable").index]


class ZipDataset(torch.utils.data.Dataset):
    """The samples of a data set zip, read from it and never unpacked; or of a folder with the same files, or several
    zips. A picture is decoded when first asked for, and kept at the working size in a file on the local disk, which
    the next notebook finds; where there is no room for it, it is decoded each time.

    `ds[i]` is a dict of float32 tensors in [0, 1], `bg` and `fg_bg` (3, size, size), `mask` and `depth` (1, size,
    size), and `name`. `ds.kinds` are those in the zip; `ds.bg_id`, `ds.fg_id` int arrays, -1 unknown; `ds.left_out`
    {file name: what is wrong}. `layout` is a name in LAYOUTS (None: by the file names), `depth_near` whether near is
    "dark" or "bright" in the zip, `defects` whether to "stop" at the first damaged or missing file or to look for all
    and "leave_out" their samples. Raises FileNotFoundError, and ValueError, which names the file."""

    def __init__(self, path: str | Path, size: int = 64, layout: str | None = None,
                 depth_near: str = "dark", defects: str = "stop"):  # fmt: skip
        _known(depth_near, ("dark", "bright"), "depth_near")
        _known(defects, ("stop", "leave_out"), "choice of defects")
        _known(layout, (None, *LAYOUTS), "layout")
        self.path, self.size, self.depth_near, self.left_out = Path(path), size, depth_near, {}
        self.names, self._places, self.fingerprint = _list_files(self.path)
        samples = self._find(layout)
        if self.left_out and defects == "stop":
            name, what = next(iter(self.left_out.items()))
            raise ValueError(f"{path}: {name} {what} ({len(self.left_out)} defects; check(path) lists them)")
        whole = ~samples.isin([-1]).drop(columns=["bg_id", "fg_id"]).any(axis=1)
        self._choose(samples[whole])
        if defects == "leave_out":
            kept = self._sound_samples()
            if self.left_out:
                self._choose(samples[whole][kept])
                self.fingerprint += f" without {sorted(self.left_out)}"

    def _find(self, layout: str | None) -> pd.DataFrame:
        """The samples as `_match_names` gives them, without a column for a kind of which there is none."""
        self.layout = layout or _recognise_layout(self.names)
        table = [i for i, name in enumerate(self.names) if _pattern(LAYOUTS["roshantac"]).fullmatch(name)]
        try:
            if self.layout == "roshantac" and table:
                samples = _match_table(self.names, self._read(table[0]), self.left_out)
            elif self.layout not in (None, "roshantac"):
                samples = _match_names(self.names, self.layout, self.left_out)
            else:
                some = ", ".join(list({os.path.dirname(name): name for name in self.names}.values())[:4])
                known = "; ".join(f"{name}: {kinds}" for name, kinds in LAYOUTS.items())
                raise ValueError(f"no known layout. Found {len(self.names)} files such as {some}. Known: {known}.")
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        self.kinds = tuple(kind for kind in KINDS if kind[1] == "g" or (samples[kind] >= 0).any())
        if len(self.kinds) == 2:
            raise ValueError(f"{self.path} holds neither masks nor depth: there is nothing to learn.")
        for kind in self.kinds:
            missing = samples["fg_bg"][samples[kind] < 0]
            self.left_out |= {self.names[file]: f"has no {kind}." for file in missing if file >= 0}
        return samples[[*self.kinds, "bg_id", "fg_id"]]

    def _choose(self, samples: pd.DataFrame) -> None:
        """Takes these samples: the files of each kind, each once, as many samples share a background."""
        self.bg_id, self.fg_id = samples["bg_id"].to_numpy(), samples["fg_id"].to_numpy()
        found = {kind: np.unique(samples[kind], return_inverse=True) for kind in self.kinds}
        self._file, self._slot = ({kind: pair[k] for kind, pair in found.items()} for k in (0, 1))
        key = f"{self.fingerprint} {self.size} {self.depth_near} {simplejpeg.__version__} {torch.__version__}"
        key = hashlib.blake2b(key.encode() + b"".join(file.tobytes() for file in self._file.values()), digest_size=8)
        # Pages that a crash of the machine kept from the disk would be black: files are good until the next start.
        since, self._kept = CACHE / f"pictures-{round(psutil.boot_time(), -2):.0f}", {}
        for old in set(CACHE.glob("pictures-*")) - {since}:
            shutil.rmtree(old, ignore_errors=True)
        for kind, files in self._file.items():
            shape, place = (len(files), self.size, self.size, CHANNELS[kind]), since / key.hexdigest()
            with contextlib.suppress(OSError):  # no room
                self._kept[kind] = _on_disk(place / f"{kind}.npy", shape), _on_disk(place / f"{kind}_ready.npy", shape[:1])

    def _sound_samples(self) -> np.ndarray:
        """Which samples have pictures that can be read, and a mask of what is new; the others go to `left_out`."""

        def look(i: int) -> bool:
            try:
                sample = {kind: pictures[0].int().numpy() for kind, pictures in self.batch([i]).items()}
                mask = sample.get("mask", np.zeros(1))[0] > 0
                change = np.abs(sample["fg_bg"] - sample["bg"]).max(0)
                if not mask.any() or mask.all() or change[mask].mean() > change[~mask].mean():
                    return True
                name, what = self.names[self._file["mask"][self._slot["mask"][i]]], "marks what is alike in bg and fg_bg."
            except ValueError as error:
                name, _, what = str(error).removeprefix(f"{self.path}: ").partition(" ")
            self.left_out[name] = what
            return False

        about = {"desc": f"checking {self.path.name}", "unit": " samples", "leave": False, "file": sys.stdout}
        return np.array(list(tqdm(_pool(os.getpid()).map(look, range(len(self))), total=len(self), **about)), bool)

    def __len__(self) -> int:
        return len(self.bg_id)

    def __getitem__(self, i: int) -> dict[str, Tensor | str]:
        batch = to_float(self.batch([range(len(self))[i]]))
        return {kind: pictures[0] for kind, pictures in batch.items()} | {"name": self.name(i)}

    def name(self, i: int) -> str:
        """The sample's name: that of its fg_bg file within the folder of its kind, without ending."""
        path = self.names[self._file["fg_bg"][self._slot["fg_bg"][i]]]
        return "_".join(path.rpartition(".")[0].split("/")[-2 if self.layout == "akshat" else -1 :])

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The samples as uint8 tensors (len(indices), channels, size, size), a view of NHWC; mask is 0 or 1."""
        batch = {}
        for kind in self.kinds:
            slots = self._slot[kind][np.asarray(indices)]
            pictures, ready = self._kept.get(kind, (None, np.zeros(len(self._file[kind]), np.uint8)))
            missing = np.unique(slots[ready[slots] == 0])
            decoded = self._decode(kind, self._file[kind][missing]) if len(missing) else None
            if pictures is not None and len(missing):
                pictures[missing] = decoded
                ready[missing] = 1
            found = decoded[np.searchsorted(missing, slots)] if pictures is None else pictures[slots]
            batch[kind] = torch.from_numpy(found).permute(0, 3, 1, 2)
        return batch

    def _decode(self, kind: str, files: np.ndarray) -> np.ndarray:
        """These files' pictures, (len(files), size, size, channels), by all cores: decoders let others run."""

        def share(some: np.ndarray) -> np.ndarray:
            return np.stack([_resize(self._picture(kind, file), kind, self.size) for file in some.tolist()])

        shares = np.array_split(files, min(len(files), os.cpu_count()))
        at_once = _pool(os.getpid()).map if len(shares) > 1 else map
        pictures = np.concatenate(list(at_once(share, shares)))
        return 255 - pictures if kind == "depth" and self.depth_near == "bright" else pictures

    def _picture(self, kind: str, file: int) -> np.ndarray:
        data = self._read(file)
        try:
            picture = read_picture(data, kind, self.size if kind != "mask" else 0)
            if kind == "mask":
                _refuse_grey(picture)
            return picture
        except ValueError as error:
            raise ValueError(f"{self.path}: {self.names[file]} cannot be read as {kind}: {error}.") from error

    def _read(self, file: int) -> bytes:
        place = self._places[file]
        try:
            return place.read_bytes() if isinstance(place, Path) else place[0].read(place[1])
        except Exception as error:  # zipfile and its decompressors raise many kinds
            raise ValueError(f"{self.path}: {self.names[file]} is damaged ({error}). Copy it anew.") from error


def _on_disk(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Bytes in a file, zeros where it is new. Raises OSError where the disk has no room."""
    if not file.exists():
        with _replacing(file) as part:
            size = np.lib.format.open_memmap(part, "w+", np.uint8, shape).nbytes
            with open(part, "r+b") as opened:  # all its room at once: a page that finds none would end the process
                getattr(os, "posix_fallocate", lambda *_: None)(opened.fileno(), 0, size)
    return np.load(file, mmap_mode="r+")


def _resize(picture: np.ndarray, kind: str, size: int) -> np.ndarray:
    """(H, W, C) -> (size, size, C), bilinear with antialiasing; masks by area, cut at one half to 0 or 1."""
    planes = torch.from_numpy(picture).permute(2, 0, 1)[None]
    if kind == "mask":
        planes = (F.interpolate(planes.float(), (size, size), mode="area") > 127.5).to(torch.uint8)
    elif picture.shape[:2] != (size, size):
        planes = F.interpolate(planes, (size, size), mode="bilinear", antialias=True)
    return planes[0].permute(1, 2, 0).numpy()


@functools.lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    """The threads that decode; by process, because they do not live on in a forked one."""
    return ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,))


def check(path: str | Path, layout: str | None = None) -> dict[str, str]:
    """Reads a data set from first to last, prints what it holds and what is wrong, and gives the defects, {file
    name: what is wrong with it}. Raises FileNotFoundError or ValueError for what is no data set at all."""
    ds = ZipDataset(path, layout=layout, defects="leave_out")
    objects = len(np.unique(ds.fg_id)) if (ds.fg_id >= 0).all() else "an unknown number of"
    print(f"{ds.path.name}: layout {ds.layout}, {len(ds.names):,} files, {len(ds):,} sound samples of", *ds.kinds)
    print(f"{len(np.unique(ds.bg_id)):,} backgrounds, {objects} objects, {len(ds.left_out) or 'no'} defects")
    for what in dict.fromkeys(ds.left_out.values()):
        alike = [name for name in ds.left_out if ds.left_out[name] == what]
        print(f"  {len(alike):,} x {what} {', '.join(alike[:3])}{' and more' * (len(alike) > 3)}")
    return ds.left_out


def to_float(batch: dict[str, Tensor], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """A uint8 batch on the device, as float32 in [0, 1], in the memory order that suits convolutions."""
    to = functools.partial(Tensor.to, dtype=torch.float32, memory_format=torch.channels_last)
    return {kind: to(p.to(device)) / (1 if kind == "mask" else 255) for kind, p in batch.items()}


def split(ds: ZipDataset, by: str = "unseen", seed: int = 0) -> dict[str, np.ndarray]:
    """Divides the samples; gives a dict of index arrays. Raises ValueError for another `by`.

    "image" is the random 70/15/15 of the reports: `train`, `valid`, `test`. "unseen" divides backgrounds 70/15/15
    into training, validation and test ones, and objects likewise. Of training backgrounds with training objects
    `train` has 80 %, `valid` and `test_seen` 10 % each; `test_new_bg`, `test_new_fg`, `test_new_both` have a test one
    instead; `valid_new` has a validation one and no test one. Unknown ids, and a single one, count as training. Ids
    are placed by multiples of the golden ratio, samples by a hash of their names: none moves when others come."""
    if by == "image":
        order = np.random.default_rng(seed).permutation(len(ds))
        parts = map(np.sort, np.split(order, [round(0.7 * len(ds)), round(0.85 * len(ds))]))
        return dict(zip(("train", "valid", "test"), parts, strict=True))
    _known(by, ("unseen", "image"), "split")

    def hash01(text: str) -> float:
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big") / 2**56

    def group(ids: np.ndarray, what: str) -> np.ndarray:
        place = (ids * (5**0.5 - 1) / 2 + hash01(f"{what} {seed}")) % 1
        return np.where((ids < 0) | (ids == ids[:1]).all(), 0, np.digitize(place, (0.7, 0.85)))

    bg, fg = group(ds.bg_id, "background"), group(ds.fg_id, "object")  # 0 training, 1 validation, 2 test
    seen, place = (bg == 0) & (fg == 0), np.array([hash01(f"{ds.name(i)} {seed}") for i in range(len(ds))])
    parts = {"train": seen & (place < 0.8), "valid": seen & (place >= 0.8) & (place < 0.9)}
    parts |= {"valid_new": ~seen & (bg < 2) & (fg < 2), "test_seen": seen & (place >= 0.9)}
    parts |= {"test_new_bg": (bg == 2) & (fg == 0), "test_new_fg": (bg == 0) & (fg == 2)}
    parts |= {"test_new_both": (bg == 2) & (fg == 2)}
    return {name: np.flatnonzero(members) for name, members in parts.items()}


# ---------- Networks ------------------------------------------------------------------------------------------
# Each: mask_logits, depth = model(bg, fg_bg), both (N, 1, H, W), depth in [0, 1]; `stride` divides H and W.


class PairNetwork(nn.Module):
    """What the networks have in common: `both` makes, of the two pictures, the mask's logits and the depth's."""

    stride = 1

    def forward(self, bg: Tensor, fg_bg: Tensor) -> tuple[Tensor, Tensor]:
        """Raises ValueError where the network's strides do not divide the pictures' size."""
        height, width = bg.shape[2:]
        if height % self.stride or width % self.stride:
            fit = " x ".join(str(max(1, round(side / self.stride)) * self.stride) for side in (height, width))
            what = f"{height} x {width} pixels do not divide by {self.stride}. Use {fit}."
            raise ValueError(f"{type(self).__name__} halves its input {self.stride.bit_length() - 1} times: {what}")
        mask_logits, depth = self.both(bg, fg_bg)
        return mask_logits, depth.sigmoid()


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, bias: bool = False, relu: bool = True) -> list:
    """Convolution, batch norm and, if asked for, ReLU."""
    layers = [nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=bias), nn.BatchNorm2d(outputs)]
    return [*layers, nn.ReLU(inplace=True)] if relu else layers


class DoubleConv(nn.Sequential):
    """Twice: 3x3 convolution, batch norm, ReLU; with `middle` channels between."""

    def __init__(self, inputs: int, outputs: int, middle: int = 0, bias: bool = True):
        middle = middle or outputs
        super().__init__(*conv(inputs, middle, bias=bias), *conv(middle, outputs, bias=bias))


class ResBlock(nn.Module):
    """A double convolution beside a 1x1 shortcut. Gives half-size features and, for the decoders, full-size ones."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.shortcut_conv, self.shortcut_norm = conv(inputs, outputs, 1, relu=False)
        self.main = DoubleConv(inputs, outputs)
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shortcut = self.shortcut_norm(self.shortcut_conv(x))
        skip = self.relu(self.main(x) + shortcut)
        return self.pool(skip), skip


class UpBlock(nn.Module):
    """Doubles the size, joins the encoder's features of that size, and mixes both with a double convolution."""

    def __init__(self, inputs: int, skip: int, outputs: int):
        super().__init__()
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.mix = DoubleConv(inputs + skip, outputs)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.mix(torch.cat([self.up(x), skip], 1))


class ResUNet(PairNetwork):
    """Reports 1 and 4: the pictures joined to six channels, a residual encoder, a decoder for each task. `widths` are
    the channels of the encoder's blocks and, last, of the bottom."""

    def __init__(self, widths: Sequence[int] = (32, 64, 128, 256, 512)):
        super().__init__()
        self.stride, up = 2 ** (len(widths) - 1), widths[::-1]
        self.encoder = nn.ModuleList(map(ResBlock, (6, *widths[:-2]), widths[:-1]))
        self.bottom = DoubleConv(widths[-2], widths[-1])
        self.mask_decoder = nn.ModuleList(map(UpBlock, up[:-1], up[1:], up[1:]))
        self.mask_head = nn.Conv2d(widths[0], 1, 1)
        self.depth_decoder = nn.ModuleList(map(UpBlock, up[:-1], up[1:], up[1:]))
        self.depth_head = nn.Conv2d(widths[0], 1, 1)

    def both(self, bg: Tensor, fg_bg: Tensor) -> list[Tensor]:
        x, skips, outputs = torch.cat([bg, fg_bg], 1), [], []
        for block in self.encoder:
            x, skip = block(x)
            skips.insert(0, skip)
        bottom = self.bottom(x)
        for decoder, head in ((self.mask_decoder, self.mask_head), (self.depth_decoder, self.depth_head)):
            x = bottom
            for block, skip in zip(decoder, skips, strict=True):
                x = block(x, skip)
            outputs.append(head(x))
        return outputs


class BasicBlock(nn.Module):
    """ResNet's: two 3x3 convolutions beside a shortcut, a 1x1 convolution where shapes change. He et al., 2015."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.main = nn.Sequential(*conv(inputs, outputs, stride=stride), *conv(outputs, outputs, relu=False))
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(*conv(inputs, outputs, 1, stride, relu=False))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.main(x) + self.shortcut(x))


class DualStreamDecoder(nn.Module):
    """From features of quarter, half and full size to one channel of full size. Learned up-sampling, no norm."""

    def __init__(self, width: int):
        super().__init__()
        half, quarter = width // 2, width // 4
        self.reduce, self.up_half = nn.Conv2d(256, width, 1), nn.ConvTranspose2d(width, width, 2, stride=2)
        self.mix_half = nn.Sequential(*self._conv(width + 128, half), *self._conv(half, half))
        self.up_full = nn.ConvTranspose2d(half, half, 2, stride=2)
        self.mix_full = nn.Sequential(*self._conv(half + 64, quarter), *self._conv(quarter, quarter))
        self.head = nn.Conv2d(quarter, 1, 3, padding=1)

    @staticmethod
    def _conv(inputs: int, outputs: int) -> tuple[nn.Module, nn.Module]:
        return nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(inplace=True)

    def forward(self, full: Tensor, half: Tensor, quarter: Tensor) -> Tensor:
        x = self.mix_half(torch.cat([self.up_half(self.reduce(quarter)), half], 1))
        return self.head(self.mix_full(torch.cat([self.up_full(x), full], 1)))


class DualStream(PairNetwork):
    """Report 2: a stream for each picture; joined, they go down to a quarter of the size, and two decoders up."""

    stride = 4

    def __init__(self):
        super().__init__()
        streams = (nn.Sequential(*conv(3, 32), BasicBlock(32, 32), BasicBlock(32, 32)) for _ in range(2))
        self.bg_stream, self.fg_bg_stream = streams
        self.to_half = nn.Sequential(BasicBlock(64, 128, stride=2), BasicBlock(128, 128))
        self.to_quarter = nn.Sequential(BasicBlock(128, 256, stride=2), BasicBlock(256, 256))
        self.mask_decoder, self.depth_decoder = DualStreamDecoder(64), DualStreamDecoder(128)

    def both(self, bg: Tensor, fg_bg: Tensor) -> tuple[Tensor, Tensor]:
        full = torch.cat([self.bg_stream(bg), self.fg_bg_stream(fg_bg)], 1)
        half = self.to_half(full)
        quarter = self.to_quarter(half)
        return self.mask_decoder(full, half, quarter), self.depth_decoder(full, half, quarter)


class UNet(nn.Module):
    """From six channels to one; `widths` are the encoder's channels, from full size down. Ronneberger et al., 2015."""

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        self.encoder = nn.ModuleList(map(DoubleConv, (6, *widths[:-1]), widths))
        self.pool, self.up = nn.MaxPool2d(2), nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        skips = widths[-2::-1]  # handed across, from the smallest size up; as many channels come up from below
        self.decoder = nn.ModuleList(map(DoubleConv, [2 * w for w in skips], (*skips[1:], skips[-1]), skips))
        self.head = nn.Conv2d(widths[0], 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.encoder[0](x)]
        for block in self.encoder[1:]:
            skips.append(block(self.pool(skips[-1])))
        x = skips.pop()
        for block in self.decoder:
            x = block(torch.cat([skips.pop(), self.up(x)], 1))
        return self.head(x)


class TwinUNet(PairNetwork):
    """Report 3: two U-Nets that share nothing, one for the mask and one of twice the width for depth."""

    stride = 16

    def __init__(self):
        super().__init__()
        self.mask_net, self.depth_net = UNet((16, 32, 64, 128, 128)), UNet((32, 64, 128, 256, 256))

    def both(self, bg: Tensor, fg_bg: Tensor) -> tuple[Tensor, Tensor]:
        pictures = torch.cat([bg, fg_bg], 1)
        return self.mask_net(pictures), self.depth_net(pictures)


class TripleResBlock(BasicBlock):
    """Three convolutions beside a shortcut that is a 3x3 convolution; the ReLU of the third comes after the sum."""

    def __init__(self, inputs: int, outputs: int):
        nn.Module.__init__(self)
        self.main = nn.Sequential(DoubleConv(inputs, outputs, bias=False), *conv(outputs, outputs, relu=False))
        self.shortcut = nn.Sequential(*conv(inputs, outputs, relu=False))
        self.relu = nn.ReLU(inplace=True)


class TwoHeadResNet(PairNetwork):
    """Report 5: a stream for each picture and two heads, all at full size. A pixel sees 21 x 21 of the input."""

    def __init__(self):
        super().__init__()
        doubles = DoubleConv(32, 64, bias=False), DoubleConv(64, 128, bias=False)
        self.bg_stream = nn.Sequential(*conv(3, 32), *doubles)
        self.fg_bg_stream = nn.Sequential(*conv(3, 32), TripleResBlock(32, 64), TripleResBlock(64, 128))
        heads = ((DoubleConv(256, 256, bias=False), nn.Conv2d(256, 1, 3, padding=1, bias=False)) for _ in range(2))
        self.mask_head, self.depth_head = (nn.Sequential(*head) for head in heads)

    def both(self, bg: Tensor, fg_bg: Tensor) -> tuple[Tensor, Tensor]:
        joined = torch.cat([self.fg_bg_stream(fg_bg), self.bg_stream(bg)], 1)
        return self.mask_head(joined), self.depth_head(joined)


class FullSizeDecoder(nn.Module):
    """From an encoder's features, largest first, up to full size: nearest doubling, the encoder's features beside it, a
    residual block. The largest are of 1/`unshuffle` of the size; their channels are spread over the pixels that each
    stands for (Shi et al., Sub-Pixel Convolution, 2016), beside `detail` channels that one convolution makes of the
    pictures: outlines come from there."""

    def __init__(self, widths: Sequence[int], pictures: int, outputs: int, unshuffle: int = 2, detail: int = 16):
        super().__init__()
        self.up = nn.ModuleList(nn.Upsample(scale_factor=2) for _ in widths[1:])
        self.mix = nn.ModuleList(BasicBlock(low + here, here) for low, here in itertools.pairwise(widths[::-1]))
        self.spread, self.detail = nn.PixelShuffle(unshuffle), nn.Sequential(*conv(pictures, detail))
        self.join = nn.Sequential(*conv(detail + widths[0] // unshuffle**2, detail))
        self.head = nn.Conv2d(detail, outputs, 3, padding=1)

    def forward(self, features: Sequence[Tensor], pictures: Tensor) -> Tensor:
        x = features[-1]
        for up, mix, here in zip(self.up, self.mix, features[-2::-1], strict=True):
            x = mix(torch.cat([up(x), here], 1))
        return self.head(self.join(torch.cat([self.detail(pictures), self.spread(x)], 1)))


def with_difference(bg: Tensor, fg_bg: Tensor) -> Tensor:
    """Both pictures, what is new in the second, and how much that is, four times enlarged: (N, 12, H, W)."""
    return torch.cat([bg, fg_bg, fg_bg - bg, 4 * (fg_bg - bg).abs()], 1)


class DifferenceUNet(PairNetwork):
    """The project's own: a U-Net of residual blocks that gets the pictures' difference too. Squares of `unshuffle` x
    `unshuffle` pixels become channels first, so that little is computed at full size; one decoder makes mask and depth.
    `widths` are the channels at 1/2, 1/4, 1/8, 1/16 of the size. The reasons are in notebook 02."""

    inputs = staticmethod(with_difference)

    def __init__(self, widths: Sequence[int] = (32, 64, 128, 192), unshuffle: int = 2, detail: int = 16):
        super().__init__()
        self.stride = unshuffle * 2 ** (len(widths) - 1)
        channels = self.inputs(*torch.zeros(2, 1, 3, 1, 1)).shape[1]
        self.stem = nn.Sequential(nn.PixelUnshuffle(unshuffle), BasicBlock(channels * unshuffle**2, widths[0]))
        steps = (nn.Sequential(nn.MaxPool2d(2), BasicBlock(*pair)) for pair in itertools.pairwise(widths))
        self.encoder, self.dropout = nn.ModuleList(steps), nn.Dropout2d(0.2)
        self.decoder = FullSizeDecoder(widths, channels, 2, unshuffle, detail)

    def both(self, bg: Tensor, fg_bg: Tensor) -> Sequence[Tensor]:
        pictures = self.inputs(bg, fg_bg)
        *features, smallest = self.encode(pictures)
        return self.decoder([*features, self.dropout(smallest)], pictures).split(1, 1)

    def encode(self, pictures: Tensor) -> list[Tensor]:
        """The features of each size, largest first, of what `inputs` makes of the two pictures."""
        return list(itertools.accumulate(self.encoder, lambda x, block: block(x), initial=self.stem(pictures)))


class ResNet18UNet(DifferenceUNet):
    """DifferenceUNet with ResNet-18, up to its third stage, for an encoder (He et al., 2015)."""

    def __init__(self):
        nn.Module.__init__(self)
        self.stride, self.dropout, encoder = 16, nn.Identity(), torchvision.models.resnet18()
        self.conv1, self.bn1 = nn.Conv2d(12, 64, 7, 2, padding=3, bias=False), encoder.bn1
        self.relu, self.maxpool = encoder.relu, encoder.maxpool
        self.layer1, self.layer2, self.layer3 = encoder.layer1, encoder.layer2, encoder.layer3
        self.decoder = FullSizeDecoder((64, 64, 128, 256), 12, 2)

    def encode(self, pictures: Tensor) -> list[Tensor]:
        half = self.relu(self.bn1(self.conv1(pictures)))
        stages = nn.Sequential(self.maxpool, self.layer1), self.layer2, self.layer3
        return list(itertools.accumulate(stages, lambda x, block: block(x), initial=half))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resunet": ResUNet,
    "resunet_lite": functools.partial(ResUNet, (64, 128, 256)),
    "dual_stream": DualStream,
    "twin_unet": TwinUNet,
    "two_head_resnet": TwoHeadResNet,
    "difference_unet": DifferenceUNet,
    "resnet18_unet": ResNet18UNet,
}


# ---------- Losses and metrics --------------------------------------------------------------------------------
# A loss: (prediction, target) -> scalar tensor. Of a mask, the prediction is logits, of depth, depth in [0, 1]. In
# training both may come in half precision: begin a loss of your own with `.float()`. Formulas: notebook 03.

PICTURE = (1, 2, 3)  # the axes over which a picture's pixels are summed


def bce(z: Tensor, t: Tensor) -> Tensor:
    """Binary cross entropy of logits, mean over all pixels."""
    return F.binary_cross_entropy_with_logits(z, t)


def weighted_bce(z: Tensor, t: Tensor, pos_weight: float = 5.0) -> Tensor:
    """Cross entropy in which the object's pixels count `pos_weight` times (what report 4 meant to try next)."""
    return F.binary_cross_entropy_with_logits(z, t, pos_weight=z.new_full((), pos_weight))


def focal(z: Tensor, t: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Cross entropy times alpha_t (1 - p_t)^gamma. Lin et al., Focal Loss for Dense Object Detection, 2017."""
    cross_entropy = F.binary_cross_entropy_with_logits(z, t, reduction="none")
    missing = -torch.expm1(-cross_entropy)  # 1 - p_t
    return ((alpha * t + (1 - alpha) * (1 - t)) * missing**gamma * cross_entropy).mean()


def lovasz(z: Tensor, t: Tensor) -> Tensor:
    """Lovasz hinge of logits, per picture: hinge errors, from the largest on, each times what its pixel, when wrong
    too, takes off the intersection over union. Berman et al., The Lovasz-Softmax Loss, 2018."""
    errors, order = (1 - z.flatten(1) * (2 * t.flatten(1) - 1)).sort(1, descending=True)
    truth = t.flatten(1).gather(1, order)
    size = truth.sum(1, keepdim=True)
    jaccard = 1 - (size - truth.cumsum(1)) / (size + (1 - truth).cumsum(1))  # lost with the first k pixels wrong
    return (errors.relu() * torch.cat([jaccard[:, :1], jaccard.diff(dim=1)], 1)).sum(1).mean()


def tversky(p: Tensor, t: Tensor, a: float = 0.3, b: float = 0.7) -> Tensor:
    """1 - (I + 1) / (I + a FP + b FN + 1) per picture: with b above a, a missed pixel is worse than a wrong one.
    Salehi et al., Tversky Loss Function for Image Segmentation, 2017."""
    overlap = (p * t).sum(PICTURE)
    wrong, missed = p.sum(PICTURE) - overlap, t.sum(PICTURE) - overlap
    return (1 - (overlap + 1) / (overlap + a * wrong + b * missed + 1)).mean()


def dice(p: Tensor, t: Tensor) -> Tensor:
    """1 - (2 sum pt + 1) / (sum p + sum t + 1) per picture. Milletari et al., V-Net, 2016, without the squares."""
    return (1 - (2 * (p * t).sum(PICTURE) + 1) / ((p + t).sum(PICTURE) + 1)).mean()


def bce_dice(z: Tensor, t: Tensor) -> Tensor:
    """Cross entropy, smooth everywhere, plus Dice, which does not care how small the object is (report 2)."""
    return bce(z, t) + dice(z.sigmoid(), t)


def l1(d: Tensor, g: Tensor) -> Tensor:
    """Mean absolute error over all pixels."""
    return F.l1_loss(d, g)


def rmse(d: Tensor, g: Tensor) -> Tensor:
    """Root mean squared error per picture. 1e-12 keeps the gradient of a perfect one from being 0 / 0."""
    return ((d - g).square().mean(PICTURE) + 1e-12).sqrt().mean()


def huber(d: Tensor, g: Tensor, delta: float = 0.1) -> Tensor:
    """Quadratic up to delta, straight beyond; the usual delta of 1 would never be reached by depth in [0, 1]."""
    return F.huber_loss(d, g, delta=delta)


def berhu(d: Tensor, g: Tensor) -> Tensor:
    """|e| up to c, then (e^2 + c^2) / 2c; c is a fifth of the batch's largest error. Laina et al., Deeper Depth
    Prediction with Fully Convolutional Residual Networks, 2016."""
    error = (d - g).abs()
    c = (0.2 * error.detach().max()).clamp_min(1e-6)  # 0 / 0 for a perfect batch otherwise
    if dist.is_initialized() and d.requires_grad:  # in training the batch is that of all processes
        dist.all_reduce(c, dist.ReduceOp.MAX)
    return torch.where(error <= c, error, (error.square() + c**2) / (2 * c)).mean()


def silog(d: Tensor, g: Tensor) -> Tensor:
    """Root of mean q^2 - (mean q)^2 / 2 per picture, q = log d - log g, clamped to 1/255. Eigen et al., Depth Map
    Prediction from a Single Image, 2014, with the root of later papers."""
    q = d.clamp_min(1 / 255).log() - g.clamp_min(1 / 255).log()
    return (q.square().mean(PICTURE) - q.mean(PICTURE).square() / 2 + 1e-12).sqrt().mean()


def gradient(d: Tensor, g: Tensor) -> Tensor:
    """Mean over all pixels of |dy(d - g)| + |dx(d - g)|, forward differences, 0 in the last row and column."""
    return ((d - g).diff(dim=2).abs().sum() + (d - g).diff(dim=3).abs().sum()) / d.numel()


def ssim_per_picture(d: Tensor, g: Tensor) -> Tensor:
    """Structural similarity (N,): Gaussian window 11, sigma 1.5, K .01 and .03, valid windows. Wang et al., 2004.
    Raises ValueError for pictures smaller than the window."""
    if min(d.shape[2:]) < 11:
        raise ValueError(f"SSIM looks at windows of 11 x 11 pixels; these pictures are {d.shape[2]} x {d.shape[3]}.")
    return msssim_ssim(d, g, data_range=1, size_average=False)


def ssim(d: Tensor, g: Tensor) -> Tensor:
    """(1 - SSIM) / 2."""
    return ((1 - ssim_per_picture(d, g)) / 2).mean()


def densedepth(d: Tensor, g: Tensor) -> Tensor:
    """0.1 L1 + SSIM loss + gradient. Alhashim and Wonka, High Quality Monocular Depth Estimation, 2018."""
    return 0.1 * l1(d, g) + ssim(d, g) + gradient(d, g)


def l1_ssim_gradient(d: Tensor, g: Tensor) -> Tensor:
    """L1 + SSIM loss + gradient, each with weight 1 (report 2)."""
    return l1(d, g) + ssim(d, g) + gradient(d, g)


def _exact(loss: Callable, sigmoid: bool = False) -> Callable:
    """The loss in float32 at least, whatever autocast says: half precision moves SSIM by hundredths. With `sigmoid`
    it takes logits in place of probabilities."""

    @functools.wraps(loss)
    def wrapped(prediction: Tensor, target: Tensor, **options) -> Tensor:
        with torch.autocast(prediction.device.type, enabled=False):
            prediction = prediction if prediction.dtype == torch.float64 else prediction.float()
            prediction = prediction.sigmoid() if sigmoid else prediction
            return loss(prediction, target.to(prediction.dtype), **options)

    return wrapped


MASK_LOSSES = {loss.__name__: _exact(loss) for loss in (bce, weighted_bce, focal, lovasz, bce_dice)}
MASK_LOSSES |= {loss.__name__: _exact(loss, sigmoid=True) for loss in (l1, rmse, dice, tversky, ssim)}
DEPTH_LOSSES = {loss.__name__: _exact(loss) for loss in (l1, rmse, huber, berhu, ssim, gradient, dice, silog)}
DEPTH_LOSSES |= {loss.__name__: _exact(loss) for loss in (l1_ssim_gradient, densedepth)}


class TaskLoss(nn.Module):
    """loss(mask_logits, depth, mask_true, depth_true): the mask's loss plus `depth_weight` times the depth's, both by
    name; of None nothing. "learned" weighs by parameters s and t: exp(-s) mask + s + exp(-t) depth + t (Kendall et
    al., Multi-Task Learning Using Uncertainty, 2018). Raises ValueError for what is not known."""

    def __init__(self, mask_loss: str | None, depth_loss: str | None, depth_weight: float | str = 1.0):
        super().__init__()
        _known(mask_loss, (None, *MASK_LOSSES), "mask loss")
        _known(depth_loss, (None, *DEPTH_LOSSES), "depth loss")
        if mask_loss is None and depth_loss is None:
            raise ValueError("mask_loss and depth_loss are both None; there would be nothing to train.")
        if None in (mask_loss, depth_loss) and depth_weight == "learned":
            raise ValueError("depth_weight is 'learned', which weighs two tasks, but one of the losses is None.")
        if depth_weight != "learned" and (isinstance(depth_weight, str) or not depth_weight > 0):
            raise ValueError(f"depth_weight is {depth_weight!r}; it can be a number above 0, or 'learned'.")
        self.losses, self.depth_weight = (MASK_LOSSES.get(mask_loss), DEPTH_LOSSES.get(depth_loss)), depth_weight
        self.log_variances = nn.Parameter(torch.zeros(2)) if depth_weight == "learned" else None
        self.terms = {}  # of the last call, to say which of them went wrong

    def forward(self, mask_logits: Tensor, depth: Tensor, mask_true: Tensor, depth_true: Tensor) -> Tensor:
        pairs, terms = {"mask": (mask_logits, mask_true), "depth": (depth, depth_true)}, []
        for (task, pair), loss in zip(pairs.items(), self.losses, strict=True):
            terms.append(loss(*pair) if loss else depth.new_zeros(()))
            if terms[-1].dim():
                raise ValueError(f"The {task} loss must give a scalar, such as a mean, and gives {terms[-1].shape}.")
        self.terms = {task: term.detach() for task, term in zip(pairs, terms, strict=True)}
        if self.log_variances is not None:
            return (torch.stack(terms) * (-self.log_variances).exp() + self.log_variances).sum()
        return terms[0] + self.depth_weight * terms[1]


task_loss = TaskLoss


@torch.no_grad()
def measure(mask_logits: Tensor, depth: Tensor, mask_true: Tensor | None, depth_true: Tensor | None) -> dict:
    """Metrics of a batch, a float32 tensor (N,) each, of the tasks whose truth is given; all arguments (N, 1, H, W).

    Mask, predicted where the logit is over 0: `iou` and `dice` (1 for two empty masks), `pixel_accuracy`, and
    `mask_area`, the share that is predicted. Depth: `rmse`, `mae`, `ssim`; and where the true depth g is at least
    1/255, with d clamped to 1e-3, `abs_rel`, `log10`, `delta1`, `delta2`, `delta3` (the share with max(d / g, g / d)
    < 1.25^k; Eigen et al., 2014), NaN where it nowhere is. Raises ValueError below 11 x 11 pixels."""
    values = {}
    if mask_true is not None:
        predicted, true = mask_logits > 0, mask_true > 0.5
        both, either = (predicted & true).sum(PICTURE), (predicted | true).sum(PICTURE)
        values["iou"] = torch.where(either > 0, both / either, 1.0)
        values["dice"] = torch.where(either > 0, 2 * both / (both + either), 1.0)
        values["pixel_accuracy"] = (predicted == true).float().mean(PICTURE)
        values["mask_area"] = predicted.float().mean(PICTURE)
    if depth_true is not None:
        depth, depth_true = depth.float(), depth_true.float()
        counted, d, g = depth_true >= 1 / 255, depth.clamp_min(1e-3), depth_true.clamp_min(1 / 255)
        values["rmse"] = (depth - depth_true).square().mean(PICTURE).sqrt()
        values["mae"] = (depth - depth_true).abs().mean(PICTURE)
        ratios = {"abs_rel": (d - g).abs() / g, "log10": (d.log10() - g.log10()).abs()}
        ratios |= {f"delta{k}": (torch.maximum(d / g, g / d) < 1.25**k).float() for k in (1, 2, 3)}
        values |= {name: (of * counted).sum(PICTURE) / counted.sum(PICTURE) for name, of in ratios.items()}
        values["ssim"] = ssim_per_picture(depth, depth_true)
    return values


class Baseline(nn.Module):
    """What needs no network, used like one: the mask is where the pictures differ by more than `threshold` (the most
    of the colours, in 1/255), the depth is `mean_depth` (1, 1, H, W) whatever they show."""

    def __init__(self, threshold: int, mean_depth: Tensor):
        super().__init__()
        self.threshold = threshold
        self.register_buffer("mean_depth", mean_depth)

    def forward(self, bg: Tensor, fg_bg: Tensor) -> tuple[Tensor, Tensor]:
        difference = 255 * (fg_bg - bg).abs().amax(1, keepdim=True)
        return difference - self.threshold - 0.5, self.mean_depth.expand(len(bg), -1, -1, -1)


def baselines(ds: ZipDataset, train: np.ndarray) -> Baseline:
    """The baselines that every result stands beside, fitted to the training samples: the threshold with the best mean
    IoU, and the mean depth map."""
    iou_sum, depth_sum = torch.zeros(256), torch.zeros(1, 1, ds.size, ds.size, dtype=torch.double)
    for batch in map(ds.batch, np.array_split(train, max(1, len(train) // 256))):
        difference = (batch["fg_bg"].short() - batch["bg"].short()).abs().amax(1).long().flatten(1)
        mask = batch["mask"].flatten(1).float() if "mask" in batch else torch.zeros(difference.shape)
        # For each picture and threshold: its pixels, and those of the object, that differ by no more than that.
        below, none = torch.zeros(len(mask), 256), torch.ones_like(mask)
        pixels, inside = (below.scatter_add(1, difference, of).cumsum(1) for of in (none, mask))
        union = mask.shape[1] - pixels + inside
        iou_sum += torch.where(union > 0, (mask.sum(1, keepdim=True) - inside) / union, 1.0).sum(0)
        depth_sum += batch["depth"].double().sum(0, keepdim=True) if "depth" in batch else 0
    return Baseline(int(iou_sum.argmax()), (depth_sum / len(train) / 255).float()).to(DEVICE)


# ---------- Augmentation --------------------------------------------------------------------------------------


def mirror(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every other sample on average is mirrored left to right, in all its pictures."""
    flip = torch.rand(len(batch["bg"]), 1, 1, 1, device=batch["bg"].device) < 0.5
    return {kind: torch.where(flip, pictures.flip(3), pictures) for kind, pictures in batch.items()}


def jitter_colours(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Brightness, contrast and saturation change by up to a fifth and hue by a twentieth, alike in both pictures."""
    both = K.ColorJitter(0.2, 0.2, 0.2, 0.05, p=1.0)(torch.cat([batch["bg"], batch["fg_bg"]], 2))
    return batch | dict(zip(("bg", "fg_bg"), both.chunk(2, 2), strict=True))


def shake(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What happens between two shots from a hand, each to three samples in ten: bg moves by up to 2.5 pixels of 192,
    its light and colours change, a soft shadow falls on fg_bg, both get noise and JPEG. Else a network takes all for
    the object where the background is slightly off (Lin et al., Background Matting V2, 2020)."""
    bg = K.RandomAffine(0, (2.5 / 192, 2.5 / 192), padding_mode="border", p=0.3)(batch["bg"])
    bg = K.ColorJitter(0.14, 0.0, 0.1, 0.01, p=0.3)(bg)
    fg_bg = K.RandomGaussianIllumination((0.1, 0.5), (0.1, 0.4), sign=(-1.0, -1.0), p=0.3)(batch["fg_bg"])
    for spoil in (K.RandomGaussianNoise(0.0, 0.02, p=0.3), K.RandomJPEG((25.0, 95.0), p=0.3)):
        bg, fg_bg = spoil(bg).clamp(0, 1), spoil(fg_bg).clamp(0, 1)
    return batch | {"bg": bg, "fg_bg": fg_bg}


AUGMENTATIONS = {"mirror": mirror, "colour": jitter_colours, "shake": shake}  # in the order in which they are done


# ---------- Runs: a Config says everything, a folder holds everything -----------------------------------------

FUSED = {"fused": True} if GPU == "cuda" else {}  # one kernel a step on a GPU; a CPU gains nothing by it
OPTIMIZERS = {
    "sgd": functools.partial(torch.optim.SGD, momentum=0.9, **FUSED),
    "rmsprop": torch.optim.RMSprop,
    "adam": functools.partial(torch.optim.Adam, **FUSED),
    "adamw": functools.partial(torch.optim.AdamW, **FUSED),
}
SCHEDULES = {  # of (optimizer, lr, steps); RMSprop, "alpha", has no momentum here for one cycle to change
    "constant": lambda o, lr, steps: lr_scheduler.ConstantLR(o, factor=1.0),
    "step": lambda o, lr, steps: lr_scheduler.StepLR(o, -(-steps // 3), gamma=0.1),
    "plateau": lambda o, lr, steps: lr_scheduler.ReduceLROnPlateau(o, factor=0.1, patience=2),
    "onecycle": lambda o, lr, n: lr_scheduler.OneCycleLR(o, lr, n + 1, cycle_momentum="alpha" not in o.defaults),
}
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Results = dict[str, dict[str, float]]  # part of the split -> metric -> mean over its pictures


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a run's result, but for the device, which precision "auto" looks at. On the sample:
    `Config(name="first", epochs=2)`. Raises ValueError for a name or value that is not known."""

    name: str  # the run's folder below the workspace; may have parts, as in "losses/dice"
    data: str = ""  # a zip's path; empty: what data_zip() finds
    depth_near: str = "dark"  # or "bright", in the zip's depth pictures
    size: int = 64  # pixels a side
    split: str = "unseen"  # or "image"
    defects: str = "stop"  # at the first damaged or missing file; or "leave_out" the samples that need one
    subset: int = 0  # only so many of the samples, drawn at random; 0: all
    max_train: int = 0  # of these, at most so many training samples; 0: all
    max_test: int = 0  # the same for each part that is measured
    model: str = "resunet"
    mask_loss: str | None = "bce_dice"  # None trains depth alone
    depth_loss: str | None = "densedepth"  # None trains the mask alone
    depth_weight: float | str = 1.0  # of the depth loss beside the mask loss, or "learned"
    optimizer: str = "adamw"  # see OPTIMIZERS
    lr: float = 1e-3  # the schedule's highest
    weight_decay: float = 1e-2  # as AdamW means it; with the others, L2 on the gradient, where 1e-4 is usual
    schedule: str = "onecycle"  # "constant"; "step": a tenth after each third; "plateau": after 3 epochs in vain
    clip_norm: float = 0.0  # the network's gradients are scaled down to this norm; 0: never
    batch_size: int = 16
    epochs: int = 10
    min_steps: int = 0  # as many more epochs as it takes to make so many steps
    augment: str = "mirror"  # or "none", or several of AUGMENTATIONS, joined by +
    start: str = ""  # weights to begin with, as load_model takes them; empty: random
    average: float = 0.0  # of the weights over the steps, decaying by this factor, is what is kept; 0: none
    precision: str = "auto"  # or one of PRECISIONS
    checkpoint_minutes: float = 1.0  # between checkpoints within an epoch
    seed: int = 0  # of the first weights, the data order and the augmentation

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():  # numbers of numpy, and paths, as JSON holds them
            value = value.item() if isinstance(value, np.generic) else value
            object.__setattr__(self, name, str(value) if isinstance(value, Path) else value)
        if not all(part.strip(". ") and not set(part) & set('\\:*?"<>|') for part in self.name.split("/")):
            raise ValueError(f"name is {self.name!r}; it must be a path of folders, such as losses/dice.")
        known = {"split": ("unseen", "image"), "defects": ("stop", "leave_out"), "depth_near": ("dark", "bright")}
        known |= {"model": MODELS, "optimizer": OPTIMIZERS, "schedule": SCHEDULES}
        known |= {"precision": ("auto", *PRECISIONS)}
        for name, names in known.items():
            _known(getattr(self, name), names, name)
        for name in self.augment.split("+") if self.augment != "none" else ():
            _known(name, AUGMENTATIONS, "augment, none or several joined by +,")
        task_loss(self.mask_loss, self.depth_loss, self.depth_weight)
        least = {"size": 11, "batch_size": 1, "epochs": 1, "lr": 1e-12}
        least |= dict.fromkeys(("subset", "max_train", "max_test", "clip_norm", "weight_decay", "min_steps"), 0)
        least |= {"average": 0, "checkpoint_minutes": 0}
        for name, at_least in least.items():
            if not getattr(self, name) >= at_least or self.average >= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {at_least} or more, average below 1.")

    def save(self, path: str | Path) -> None:
        """Writes it as JSON."""
        _write_json(Path(path), dataclasses.asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> "Config":
        """Reads what `save` wrote, or the config.json of a run. Raises ValueError where it holds no Config."""
        try:
            values = json.loads(Path(path).read_text())
            return cls(**{name: values[name] for name in values if name not in ("fingerprint", "code", "cache")})
        except (TypeError, AttributeError, ValueError) as error:
            hint = "If it names a loss or a network of your own, define that first."
            raise ValueError(f"{path} holds no Config that can be used ({error}). {hint}") from error


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as its folder tells it."""

    config: Config
    folder: Path
    history: list[dict[str, float]]  # a dict an epoch: epoch, lr, train_loss, valid_loss and all metrics on valid
    seconds: list[float]  # training time of each epoch
    results: Results  # empty until finished

    def model(self) -> nn.Module:
        """The network with the weights of the best epoch (least validation loss), ready to predict."""
        return load_model(self.folder)


def run(config: Config, stop_after: int | None = None, quiet: bool = False) -> Run:
    """Trains, or goes on, or reads: whatever is left to do for this Config.

    The run is the folder `<workspace>/<name>/`. Not there, it is started; cut off at whatever moment, it goes on from
    its last checkpoint, on a CPU to the same bits as if it never had been; finished, it is read. In it: config.json,
    metrics.csv and timing.csv (a row an epoch), checkpoint.pt, best.pt (the weights of the least validation loss),
    results.json (what those are worth on all but the training samples), images/epoch_NNN. It leaves off after
    `stop_after` epochs, as if cut off there. Several processes that accelerate has started train together.

    Raises ValueError where the folder holds another run, and for data, losses and networks that do not fit;
    RuntimeError where another program is at this run; MemoryError."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        accelerate.PartialState(cpu=not GPU)
    first, folder = _processes()[0] == 0, fetch(config.name)
    with _locked(folder) if first else contextlib.nullcontext(), torch.random.fork_rng():
        ds = ZipDataset(data_zip(config.data), config.size, depth_near=config.depth_near, defects=config.defects)
        tasks = tuple(task for task in ("mask", "depth") if getattr(config, f"{task}_loss"))
        for task in set(tasks) - set(ds.kinds):
            raise ValueError(f"{ds.path} has no {task} pictures. Set {task}_loss=None, or take another zip.")
        ds.kinds = ("bg", "fg_bg", *tasks)
        settings = dataclasses.asdict(config) | {"fingerprint": ds.fingerprint, "code": _own_code(config)}
        _refuse_another(folder, settings)
        if (folder / "results.json").exists():
            if not quiet:
                print(f"{config.name}: finished before, read from its folder")
            return read_run(folder)
        if first:
            _write_json(folder / "config.json", settings)
        try:
            _train(config, ds, folder, stop_after, quiet or not first)
        except torch.OutOfMemoryError as error:
            remedy = f"Set batch_size={config.batch_size // 2 or 1} or a smaller size, under another name"
            raise MemoryError(f"{config.name}: a batch does not fit into memory. {remedy}.") from error
        return read_run(folder)


def _own_code(config: Config) -> dict[str, str]:
    """A hash of the source of a network or loss of one's own: edited, it makes another run."""
    hashes = {}
    for field, known in (("model", MODELS), ("mask_loss", MASK_LOSSES), ("depth_loss", DEPTH_LOSSES)):
        code = inspect.unwrap(known.get(getattr(config, field), run))
        code = getattr(code, "func", code)  # of a functools.partial
        code = code if inspect.isroutine(code) or inspect.isclass(code) else type(code)
        if code.__module__ != __name__:
            hashes[field] = hashlib.blake2b(inspect.getsource(code).encode(), digest_size=8).hexdigest()
    return hashes


def _refuse_another(folder: Path, settings: dict) -> None:
    """Raises ValueError where the folder holds a run of other settings. Data are known by content, not by path."""
    if not (folder / "config.json").exists():
        return
    theirs = dataclasses.asdict(Config("any")) | {"code": {}} | json.loads((folder / "config.json").read_text())
    changes = [f"{key} was {theirs.get(key)!r} and is {mine!r}" for key, mine in settings.items()
               if theirs.get(key) != mine and key not in ("data", "checkpoint_minutes")]  # fmt: skip
    if changes:
        edited = " (the code of a loss or network was edited)" if theirs["code"] != settings["code"] else ""
        remedy = f"Take another name, or delete {folder}."
        raise ValueError(f"The run {settings['name']!r} exists, but {', '.join(changes)}{edited}. {remedy}")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps other programs away from a run. Raises RuntimeError where one is at it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0):
            yield
    except filelock.Timeout:
        raise RuntimeError(f"Another program is at the run {folder}. Wait for it, or take another name.") from None


def parts_of(config: Config, ds: ZipDataset) -> dict[str, np.ndarray]:
    """The split that a run of this Config uses, cut to its `subset`, `max_train` and `max_test`. Raises ValueError
    where it leaves nothing to train or to validate on."""
    parts, drawn = split(ds, config.split), np.random.default_rng(0).permutation(len(ds))
    for part, indices in parts.items():
        indices = indices[np.isin(indices, drawn[: config.subset or None])]
        most = (config.max_train if part == "train" else config.max_test) or None
        parts[part] = np.sort(np.random.default_rng(0).permutation(indices)[:most])
        if part in ("train", "valid") and not len(indices):
            few = f"{ds.path}: of its {len(ds)} samples, split {config.split!r} leaves none for {part}"
            raise ValueError(f"{few}. Take more backgrounds and objects, or split='image'.")
    return parts


def autocast(precision: str = "auto") -> torch.autocast:
    """The context of a forward pass. "auto" is bfloat16 where the device has it in hardware (GPUs from compute
    capability 8, CPUs with AVX512-BF16), float16 on older GPUs, else float32."""
    if precision == "auto" and GPU == "cuda":
        precision = "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16"
    elif precision == "auto":
        precision = "bfloat16" if not GPU and torch.cpu._is_avx512_bf16_supported() else "float32"
    return torch.autocast(DEVICE.type, PRECISIONS[precision], enabled=precision != "float32")


def _processes() -> tuple[int, int]:
    """The number of this process among those that train together, and how many these are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _prefetch(function: Callable, items: Iterable) -> Iterator:
    """function(item) for each item in turn, done by a thread that is up to two items ahead."""
    with ThreadPoolExecutor(1) as thread:
        coming = deque()
        for item in items:
            coming.append(thread.submit(function, item))
            if len(coming) > 2:
                yield coming.popleft().result()
        yield from (future.result() for future in coming)


@torch.no_grad()
def evaluate(model: nn.Module, ds: ZipDataset, indices: np.ndarray, loss: Callable | None = None,
             precision: str = "auto") -> dict[str, np.ndarray]:  # fmt: skip
    """The metrics of `measure` for each of the samples, arrays of len(indices), of the tasks that the network was
    trained on. With a loss also `loss`, the same for all of a batch of 32."""
    tasks, measured = getattr(model.eval(), "tasks", KINDS), []
    for batch in _prefetch(ds.batch, np.split(indices, range(32, len(indices), 32))):
        batch = to_float(batch, DEVICE)
        with autocast(precision):
            outputs = model(batch["bg"], batch["fg_bg"])
        truth = [batch.get(task) if task in tasks else None for task in ("mask", "depth")]
        values = measure(*outputs, *truth)
        if loss is not None:
            values["loss"] = loss(*outputs, *truth).float().expand(len(batch["bg"]))
        measured.append({name: value.cpu().numpy() for name, value in values.items()})
    return {name: np.concatenate([values[name] for values in measured]) for name in measured[0]}


def score(model: nn.Module, ds: ZipDataset, parts: dict[str, np.ndarray], precision: str = "auto") -> Results:
    """Means over the pictures, but for those in which no pixel counts (NaN): part -> metric -> value. Parts without
    samples are left out."""
    values = {part: evaluate(model, ds, some, precision=precision) for part, some in parts.items() if len(some)}
    return {part: pd.DataFrame(of).astype(float).mean().to_dict() for part, of in values.items()}


def run_all(configs: dict[str, Sequence[Config]]) -> dict[str, list[Run]]:
    """`run` for lists of Configs, such as one for each seed, with one progress bar. Of a finished run the checkpoint
    goes, and of each epoch's pictures all but one sheet: those of a long list would fill a Drive."""
    runs = {label: [] for label in configs}
    todo = [(label, config) for label, several in configs.items() for config in several]
    for label, config in tqdm(todo, unit=" runs", leave=False, file=sys.stdout):
        runs[label].append(run(config, quiet=True))
        folder = runs[label][-1].folder
        for file in [folder / "checkpoint.pt", *folder.glob("images/*/*_*.png")]:
            file.unlink(missing_ok=True)
    return runs


def read_run(folder: str | Path) -> Run:
    """The run in this folder, as far as it has come. Raises FileNotFoundError where there is none, ValueError where a
    file of it is damaged."""
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} holds no run (no config.json). Give the folder that run() made.")
    try:
        history, timing = (_read_table(folder / name) for name in ("metrics.csv", "timing.csv"))
        results = json.loads((folder / "results.json").read_text()) if (folder / "results.json").exists() else {}
        seconds = [row["seconds"] for row in timing]
        return Run(Config.load(folder / "config.json"), folder, history, seconds, results)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{folder}: a file of this run is damaged ({error}). Delete the folder.") from error


def _write_json(path: Path, values: dict) -> None:
    with _replacing(path) as part:
        part.write_text(json.dumps(values, indent=1))


def _load_state(path: Path) -> dict:
    """What torch.save wrote, of tensors and plain values alone: nothing in it is run. Raises ValueError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of junk torch.load raises many kinds
        what = "it is refused: it holds code, and weights need none" if "weights_only" in str(error) else str(error)
        raise ValueError(f"{path} is damaged, or no file of weights ({what.splitlines()[0]}).") from error


# ---------- Training ------------------------------------------------------------------------------------------


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all processes, as one process would have it; on CPUs, which torch's refuses."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        shares = torch.distributed.nn.functional.all_gather(x.contiguous())
        return super().forward(torch.cat(shares)).chunk(len(shares))[dist.get_rank()]


def _begin(config: Config) -> nn.Module:
    """The network as it begins. Raises ValueError where it does not do what the networks of MODELS do."""
    torch.manual_seed(config.seed)
    model, (_, processes) = MODELS[config.model]().to(DEVICE, memory_format=torch.channels_last), _processes()
    if config.start:
        start = load_model(config.start)
        if start.name != config.model:
            raise ValueError(f"start is {config.start!r}, which holds a {start.name}, and model is {config.model!r}.")
        model.load_state_dict(start.state_dict())
    shape = (2, 1, config.size, config.size)
    with torch.no_grad():
        given = model.eval()(*torch.zeros(2, 2, 3, config.size, config.size, device=DEVICE))
    if not isinstance(given, tuple | list) or [getattr(one, "shape", 0) for one in given] != [shape, shape]:
        raise ValueError(f"The network {config.model!r} must give a pair (mask_logits, depth), each (N, 1, H, W).")
    if GPU == "cuda" and processes > 1:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in [module for module in model.modules() if type(module) is nn.BatchNorm2d and processes > 1]:
        module.__class__ = SyncBatchNorm
    return model


def _average(kept: Sequence[Tensor], new: Sequence[Tensor], count: Tensor, decay: float) -> None:
    """At first over few steps, so that the random weights of the start are soon forgotten."""
    for average, value in zip(kept, new, strict=True):
        if average.is_floating_point():
            average.lerp_(value, 1 - min(decay, (int(count) + 1) / (int(count) + 10)))
        else:
            average.copy_(value)


def _mean_over_processes(tensors: Sequence[Tensor]) -> None:
    """Where several processes train together, each gets the mean of their tensors."""
    if dist.is_initialized():
        means = torch.cat([tensor.reshape(-1) for tensor in tensors]) / dist.get_world_size()
        dist.all_reduce(means)
        for tensor, mean in zip(tensors, means.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))


def _train(config: Config, ds: ZipDataset, folder: Path, stop_after: int | None, quiet: bool) -> None:
    """From the last checkpoint to the last epoch. Everything random in a step depends on (seed, step) alone, and the
    order of an epoch on (seed, epoch): that makes going on exact."""
    parts, (process, processes) = parts_of(config, ds), _processes()
    train, checkpoint = parts["train"], folder / "checkpoint.pt"
    augment = [change for name, change in AUGMENTATIONS.items() if name in config.augment.split("+")]
    model, loss_of = _begin(config), task_loss(config.mask_loss, config.depth_loss, config.depth_weight).to(DEVICE)
    ema = functools.partial(_average, decay=config.average)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=ema, use_buffers=True) if config.average else None
    groups = [{"params": [*model.parameters()]}, {"params": [*loss_of.parameters()], "weight_decay": 0.0}]
    optimizer = OPTIMIZERS[config.optimizer](groups, lr=config.lr, weight_decay=config.weight_decay)
    steps = -(-len(train) // config.batch_size)  # of an epoch
    epochs = max(config.epochs, -(-config.min_steps // steps))
    schedule = SCHEDULES[config.schedule](optimizer, config.lr, steps * epochs)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=autocast(config.precision).fast_dtype == torch.float16)
    state = {"model": model, "average": average, "loss": loss_of, "optimizer": optimizer, "schedule": schedule}
    state |= {"scaler": scaler, "step": 0, "lr": 0.0, "loss_sum": torch.zeros(()), "history": [], "best": {}}
    for name, saved in (_load_state(checkpoint) if checkpoint.exists() else {}).items():
        if hasattr(state[name], "load_state_dict"):
            state[name].load_state_dict(saved)
        else:
            state[name] = saved
    state["loss_sum"] = state["loss_sum"].to(DEVICE)
    _write_best_and_table(folder, state)  # which may not have been written any more
    while state["step"] < steps * min(epochs, stop_after or epochs):
        epoch, begun = divmod(state["step"], steps)
        order = np.random.default_rng([config.seed, epoch]).permutation(train)
        batches = np.array_split(order, steps)[begun:]  # nearly equal: none has a single sample left
        shares = [np.resize(batch, -(-len(batch) // processes) * processes)[process::processes] for batch in batches]
        started = saved_at = time.monotonic()
        state["lr"] = state["lr"] if begun else optimizer.param_groups[0]["lr"]
        about = {"desc": f"epoch {epoch + 1}/{epochs}", "initial": begun, "total": steps, "file": sys.stdout}
        bar = tqdm(_prefetch(ds.batch, shares), leave=False, disable=quiet or None, **about)
        model.train()
        for indices, batch in zip(shares, bar, strict=True):
            torch.manual_seed((config.seed * 2**32 + state["step"]) * 64 + process)
            batch = functools.reduce(lambda batch, change: change(batch), augment, to_float(batch, DEVICE))
            with autocast(config.precision):
                outputs = model(batch["bg"], batch["fg_bg"])
            loss = loss_of(*outputs, batch.get("mask"), batch.get("depth"))
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            loss = loss.detach()
            gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
            _mean_over_processes([*gradients, loss])
            if config.clip_norm:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            scaler.step(optimizer)
            scaler.update()
            if config.schedule != "plateau":
                schedule.step()
            if config.average:
                average.update_parameters(model)
            state["step"] += 1
            state["loss_sum"] += loss * (len(indices) * processes / len(order))
            due = time.monotonic() - saved_at > 60 * config.checkpoint_minutes or state["step"] % steps == 0
            if due or not GPU or state["step"] % 50 == 0:  # on a GPU, to look at the loss is to wait for it
                _refuse_not_finite(state["loss_sum"], loss_of, f"{config.name}, epoch {epoch + 1}", map(ds.name, indices))
            if due and state["step"] % steps:
                _save_state(folder, state)
                saved_at = time.monotonic()
        _end_epoch(config, ds, parts, folder, state, time.monotonic() - started, quiet)
    if state["step"] == steps * epochs:
        _mean_over_processes([torch.zeros(1, device=DEVICE)])  # waits for the first to have written the weights
        tests = {part: indices for part, indices in parts.items() if part != "train"}
        results = score(load_model(folder), ds, tests, config.precision)
        if process == 0:
            _write_json(folder / "results.json", results)
    _mean_over_processes([torch.zeros(1, device=DEVICE)])


def _refuse_not_finite(total: Tensor, loss: TaskLoss, where: str, samples: Iterable[str]) -> None:
    if not total.isfinite():
        terms = ", ".join(f"{task} {term.item():.3g}" for task, term in loss.terms.items())
        some = ", ".join(itertools.islice(samples, 8))
        raise ValueError(f"{where}: the loss is not finite ({terms}) on {some}. Try a smaller lr, under another name.")


def _end_epoch(config: Config, ds: ZipDataset, parts: dict, folder: Path, state: dict, seconds: float, quiet: bool) -> None:
    """Measures on the validation samples, and writes down what the epoch has brought."""
    # Learned weights change from epoch to epoch; epochs are compared by weights that do not.
    weight = 1.0 if config.depth_weight == "learned" else config.depth_weight
    valid_loss, measured = task_loss(config.mask_loss, config.depth_loss, weight), state["model"]
    measured = state["average"].module if config.average else measured
    values = evaluate(measured, ds, parts["valid"], valid_loss, config.precision)
    row = {"epoch": len(state["history"]) + 1, "lr": state["lr"], "train_loss": state["loss_sum"].item()}
    row |= {f"valid_{name}": value for name, value in pd.DataFrame(values).astype(float).mean().items()}
    _refuse_not_finite(torch.tensor(values["loss"]).sum(), state["loss"], f"{config.name}, validation", [])
    if config.depth_weight == "learned":
        row["depth_weight"] = (state["loss"].log_variances[0] - state["loss"].log_variances[1]).exp().item()
    if config.schedule == "plateau":
        reached = torch.tensor(row["valid_loss"], device=DEVICE)
        _mean_over_processes([reached])
        state["schedule"].step(reached.item())
    state["history"].append(row)
    state["loss_sum"] = torch.zeros((), device=DEVICE)
    if row["valid_loss"] <= min(row["valid_loss"] for row in state["history"]):
        state["best"] = {name: tensor.cpu().clone() for name, tensor in measured.state_dict().items()}
    if _processes()[0] == 0:
        timing = _read_table(folder / "timing.csv")[: row["epoch"] - 1] + [{"epoch": row["epoch"], "seconds": seconds}]
        _write_table(folder / "timing.csv", timing)
        _save_images(folder / "images" / f"epoch_{row['epoch']:03}", measured, ds, parts, config.precision)
        _save_state(folder, state)
    if not quiet:
        found = "  ".join(f"{name} {row[f'valid_{name}']:.3f}" for name in ("loss", "iou", "rmse") if f"valid_{name}" in row)
        print(f"{config.name}  epoch {row['epoch']}  loss {row['train_loss']:.3f}  valid: {found}  ({seconds:.0f} s)")


def _save_state(folder: Path, state: dict) -> None:
    """Writes a checkpoint: the states of all parts, and plain values. The table and the best weights follow from it."""
    if _processes()[0] == 0:
        plain = {name: part.state_dict() if hasattr(part, "state_dict") else part for name, part in state.items()}
        with _replacing(folder / "checkpoint.pt") as part:
            torch.save(plain, part)
        _write_best_and_table(folder, state)


def _write_best_and_table(folder: Path, state: dict) -> None:
    if state["history"] and _processes()[0] == 0:
        _write_table(folder / "metrics.csv", state["history"])
        with _replacing(folder / "best.pt") as part:
            torch.save(state["best"], part)


def _write_table(path: Path, rows: list[dict[str, float]]) -> None:
    with _replacing(path) as part:
        pd.DataFrame(rows).to_csv(part, index=False)


def _read_table(path: Path) -> list[dict[str, float]]:
    return pd.read_csv(path, float_precision="round_trip").to_dict("records") if path.exists() else []


# ---------- Drive ---------------------------------------------------------------------------------------------

PATIENCE, LOOK_AGAIN = 120.0, 15.0  # seconds: until Drive counts as hung, and between two looks at what is new


@functools.cache
def _drive(local: Path) -> "_DriveCopies | None":
    """What copies the workspace to the user's Drive; None outside Colab, and without consent, for which this asks."""
    if not in_colab():
        return None
    from google.colab import drive

    try:
        drive.mount(str(DRIVE))
    except Exception as error:  # refused consent raises a private class of Colab's
        print(f"Google Drive is not available ({error}): results stay on this machine and go with it.")
        return None
    copies = _DriveCopies(local, DRIVE / "MyDrive" / "mask-and-depth")
    copies.start()
    return copies


class _DriveCopies(threading.Thread):
    """Copies what is new in the workspace to Drive, oldest first, again and again: nothing else waits for a Drive that
    fails, hangs, vanishes and comes back."""

    def __init__(self, local: Path, drive: Path):
        super().__init__(daemon=True)
        self.local, self.drive, self.copied, self.looks, self.trouble = local, drive, {}, 0, ""

    def items(self) -> dict[Path, int]:
        """When each file last changed, and each folder with the pictures of an epoch, which go as one zip."""
        items = {}
        for path in self.local.rglob("*"):
            name, packed = path.relative_to(self.local), re.fullmatch(r"epoch_\d+", path.name)
            if (packed or path.is_file()) and not re.search(r"(^|/)\.|\.part(/|$)|/epoch_\d+/", name.as_posix()):
                with contextlib.suppress(FileNotFoundError):  # replaced while it was looked at
                    items[name] = path.stat().st_mtime_ns
        return dict(sorted(items.items(), key=lambda item: item[1]))

    def run(self) -> None:
        while True:
            failed, trouble = set(), ""  # of a run, what is newer waits for what is older
            for name, changed in self.items().items():
                if self.copied.get(name) != changed and name.parts[0] not in failed:
                    try:
                        self._copy_there(name, changed)
                        self.copied[name] = changed
                    except OSError as error:
                        failed.add(name.parts[0])
                        trouble = str(error)
            if bool(trouble) != bool(self.trouble):
                what = f"fails ({trouble}). Work goes on; it is tried again" if trouble else "answers again"
                tqdm.write(f"Google Drive {what}.")
            self.copied = {} if failed else self.copied  # Drive may have lost what it had not uploaded
            self.trouble, self.looks = trouble, self.looks + 1
            time.sleep(LOOK_AGAIN)

    def _copy_there(self, name: Path, changed: int) -> None:
        os.stat(self.drive.parent)  # where Drive is not mounted, its folder must not be made
        source, there = self.local / name, self.drive / name
        if source.is_dir():
            there = there.with_suffix(".zip")
        if there.exists() and there.stat().st_mtime_ns > changed - 10**7:
            return  # Drive counts milliseconds; what is newer is of another machine, which went on
        if source.is_dir():
            source = Path(shutil.make_archive(str(self.local / ".epoch"), "zip", source))
            os.utime(source, ns=(changed, changed))
        _copy(source, there)

    def bring(self, name: str | Path, folder: Path, brought: Future) -> None:
        """Copies what is newer on Drive into a folder, and gives pairs: the copy, and where it belongs."""
        try:
            os.stat(self.drive.parent)
            there, copies = self.drive / name, []
            for file in [there] if there.is_file() else sorted(there.rglob("*.*")):
                place = self.local / file.relative_to(self.drive)
                place = place.with_suffix("") if file.parent.name == "images" else place
                time_here = place.stat().st_mtime_ns if place.exists() else 0
                if file.suffix != ".part" and file.stat().st_mtime_ns > time_here + 10**7:
                    copies.append((folder / f"{len(copies)}{file.suffix}", place))
                    _copy(file, copies[-1][0])
            brought.set_result(copies)
        except OSError as error:
            brought.set_exception(error)


def fetch(name: str | Path) -> Path:
    """The place of a file or folder in the workspace, brought from Drive as far as it is newer there. Where Drive fails
    or hangs, a line says so."""
    here, copies, brought = workspace() / name, _drive(workspace()), Future()
    if copies:
        with tempfile.TemporaryDirectory(prefix=".", dir=workspace(), ignore_cleanup_errors=True) as folder:
            threading.Thread(target=copies.bring, args=(name, Path(folder), brought), daemon=True).start()
            try:
                for file, place in brought.result(PATIENCE):
                    place.parent.mkdir(parents=True, exist_ok=True)
                    if file.suffix == ".zip" and place.suffix != ".zip":
                        shutil.unpack_archive(file, place)
                        shutil.copystat(file, place)
                    else:
                        os.replace(file, place)
            except OSError as error:  # of which TimeoutError is one
                print(f"Google Drive does not give {name} ({error or 'it hangs'}). Goes on with what is here.")
    return here


def drive_report(patience: float = 600) -> str:
    """What is on Drive and what is not, for the end of a notebook. Waits for the copies, at most `patience` seconds."""
    copies, until = _drive(workspace()), time.monotonic() + patience
    if copies is None:
        where = f"in {workspace()} and goes with this machine: download it" if in_colab() else "in the workspace"
        return f"Nothing is copied to Google Drive. What was made is {where}."
    while (missing := [str(n) for n, at in copies.items().items() if copies.copied.get(n) != at]) and time.monotonic() < until:
        time.sleep(0.1)
    there = f"On Google Drive, in {copies.drive}: {len(copies.copied)} files. Leave this machine a few minutes to upload."
    if not missing:
        return there
    why = copies.trouble or "it hangs, or there was no time yet"
    return f"{there}\nNot there ({why}): {', '.join(missing)}. Download it from {copies.local}."


def _copy(source: Path, target: Path) -> None:
    """Copies a file with its time, with a progress bar if it is large. Raises OSError."""
    size = source.stat().st_size
    about = {"desc": f"copying {source.name}", "leave": False, "file": sys.stdout, "disable": size < 1e8}
    with _replacing(target) as part:
        with open(source, "rb") as file, open(part, "wb") as copied:
            with tqdm.wrapattr(file, "read", size, **about) as reader:
                shutil.copyfileobj(reader, copied, 2**22)
        if part.stat().st_size != size:
            raise OSError("a copy is shorter than its file")
        os.utime(part, ns=(source.stat().st_mtime_ns,) * 2)


# ---------- Prediction ----------------------------------------------------------------------------------------

SOFTWARE = "mask-and-depth"  # stands in the pictures that predict_images writes
WEIGHTS = ROOT / "assets" / "difference_unet.pt"  # of the project; trained on drawn scenes alone, at 192 pixels


def load_model(weights: str | Path = "") -> nn.Module:
    """A trained network in float32, ready to predict, with its `name` in MODELS, the `size` in pixels and the `tasks`
    it was trained on. `weights` is the folder of a run, its best.pt, or another file with the state dict of a network
    in MODELS, found by the shapes of its tensors and taken for one of 192 pixels; empty: the project's. Raises
    FileNotFoundError, and ValueError for what holds no such weights."""
    path = _found(weights or WEIGHTS, "Give the folder of a run, or a file of weights.")
    path = path if path.is_file() else _found(path / "best.pt", "The run has no finished epoch yet.")
    state = _load_state(path)
    config = Config.load(path.parent / "config.json") if (path.parent / "config.json").exists() else None
    shapes = {name: getattr(value, "shape", None) for name, value in state.items()}
    with torch.device("meta"):  # shapes without numbers
        known = {name: {k: v.shape for k, v in make().state_dict().items()} for name, make in MODELS.items()}
    fitting = [name for name in known if known[name] == shapes and name == (config.model if config else name)]
    if not fitting:
        what = f"of {config.model}, as {path.parent / 'config.json'} says" if config else f"of {', '.join(MODELS)}"
        raise ValueError(f"{path} holds no weights {what}.")
    model = MODELS[fitting[0]]().to(DEVICE, memory_format=torch.channels_last)
    model.load_state_dict(state)
    model.name, model.size, model.tasks = fitting[0], config.size if config else 192, ("mask", "depth")
    if config:
        model.tasks = tuple(task for task in model.tasks if getattr(config, f"{task}_loss"))
    return model.eval()


@torch.no_grad()
def predict(model: nn.Module, bg: Tensor, fg_bg: Tensor, size: int | None = None) -> tuple[Tensor, Tensor]:
    """The mask, 0 or 1, and the depth in [0, 1] of pictures of any size, as large as `fg_bg`: (N, 1, H, W) on DEVICE.
    `bg` and `fg_bg` are (N, 3, H, W) or (3, H, W), float in [0, 1] or uint8; the network sees them at `size` pixels a
    side, by default its own. Raises ValueError for other pictures, and a size that its strides do not divide."""
    side, small = size or getattr(model, "size", 192), []
    for name, pictures in (("bg", bg), ("fg_bg", fg_bg)):
        pictures = pictures[None] if pictures.dim() == 3 else pictures
        whole = pictures.float() / 255 if pictures.dtype == torch.uint8 else pictures.float()
        if pictures.dim() != 4 or pictures.shape[1] != 3 or not 0 <= whole.min() <= whole.max() <= 1:
            raise ValueError(f"{name} must be (N, 3, H, W), uint8 or float in [0, 1]; it is {tuple(pictures.shape)}.")
        small.append(resize(whole.to(DEVICE), [side, side], antialias=True))
    enlarge = functools.partial(F.interpolate, size=fg_bg.shape[-2:], mode="bilinear", antialias=True)
    mask_logits, depth = model.to(DEVICE).eval()(*small)
    return (enlarge(mask_logits) > 0).float(), enlarge(depth).clamp(0, 1)


def open_photo(path: str | Path) -> np.ndarray:
    """A photo, uint8 (H, W, 3), as `read_picture` reads it. Raises FileNotFoundError, and ValueError."""
    path = _found(path, "Give the path of a photo.")
    try:
        return read_picture(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}.") from error


class Prediction(NamedTuple):
    """What `predict_images` gives: the files that it wrote, None for a task not trained, and a figure of it all."""

    mask_file: Path | None
    depth_file: Path | None
    figure: Figure


def predict_images(weights: str | Path | nn.Module, bg: str | Path, image: str | Path, folder: str | Path | None = None,
                   overwrite: bool = False) -> Prediction:  # fmt: skip
    """From two photos, of a place and of the same place with an object, the mask and the depth, by a network or the weights
    that `load_model` takes. Writes `<image>_mask.png` and `<image>_depth.png`, grey, of the image's size, 255 the object and
    the far end, into the folder, by default the image's, but over no file that another program made unless `overwrite`.

    Raises FileNotFoundError; ValueError where the photos differ in shape or a file is no picture or no weights;
    FileExistsError; OSError where the folder cannot be written."""
    model = weights if isinstance(weights, nn.Module) else load_model(weights)
    photos, image = [open_photo(path) for path in (bg, image)], Path(image)
    (bg_height, bg_width), (height, width) = (photo.shape[:2] for photo in photos)
    if abs(bg_width * height / (bg_height * width) - 1) > 0.02:
        shapes = f"{bg} has {bg_width} x {bg_height} pixels and {image} {width} x {height}"
        raise ValueError(f"{shapes}: not the same view. Take both photos from one place, and cut them alike.")
    answers = predict(model, *(torch.from_numpy(photo).permute(2, 0, 1) for photo in photos))
    folder, files, shown = Path(folder or image.parent), {}, dict(zip(("bg", "fg_bg"), photos, strict=True))
    for task, answer in zip(("mask", "depth"), answers, strict=True):
        if task in getattr(model, "tasks", KINDS):
            files[task] = folder / f"{image.stem}_{task}.png"
            shown[task] = answer[0, 0].mul(255).round().byte().cpu().numpy()
    for task, file in files.items():
        if file.exists() and not overwrite and Image.open(file).info.get("Software") != SOFTWARE:
            raise FileExistsError(f"{file} is there, and not of this program. Give another folder, or overwrite=True.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for task, file in files.items():
            about = PngImagePlugin.PngInfo()
            about.add_text("Software", SOFTWARE)
            Image.fromarray(shown[task]).save(file, pnginfo=about)
    except OSError as error:
        raise OSError(f"{folder} cannot be written ({error}). Give another folder.") from error
    step = max(1, max(height, width) // 800)  # a figure needs no more pixels
    row = [(kind, kind, picture[::step, ::step] / 255, "") for kind, picture in shown.items()]
    return Prediction(files.get("mask"), files.get("depth"), _draw([row], [""], Figure(layout="constrained")))


# ---------- Pictures ------------------------------------------------------------------------------------------

PART_COLOURS = {  # of the test parts, in the order of every figure and table
    "test_seen": "#0173b2",
    "test_new_bg": "#029e73",
    "test_new_fg": "#de8f05",
    "test_new_both": "#cc3311",
    "test": "#cc3311",
}
TITLES = {"bg": "background", "fg_bg": "with object", "iou": "mask IoU", "dice": "mask Dice", "rmse": "depth RMSE"}
TITLES |= {f"delta{k}": f"depth δ < 1.25{'²³'[k - 2 : k - 1] if k > 1 else ''}" for k in (1, 2, 3)}
TITLES |= {"pixel_accuracy": "pixel accuracy", "mae": "depth MAE", "abs_rel": "depth abs rel", "log10": "depth log10"}
TITLES |= {"ssim": "depth SSIM", "test_seen": "seen", "test_new_bg": "new background", "test_new_fg": "new object"}
TITLES |= {"test_new_both": "new background and object", "mask_predicted": "predicted", "depth_predicted": "predicted"}
TITLES |= {"mask_error": "wrong", "depth_error": "error"}
LOWER_IS_BETTER = ("loss", "rmse", "mae", "abs_rel", "log10")


def _draw(rows: Sequence[Sequence[tuple]], labels: Sequence[str], figure: Figure | None = None) -> Figure:
    """A figure of rows of (title, kind, picture (H, W) or (H, W, 3), caption): photographs as they are, masks grey, depth
    and its error in colour maps, each with a bar."""
    figure = figure or plt.figure(layout="constrained", dpi=110)
    height, width = rows[0][0][2].shape[:2]
    side = max(1.4, 12 / len(rows[0])) if len(rows[0]) < 5 else 1.5
    figure.set_size_inches(side * len(rows[0]) + 0.6, (side * height / width + 0.35) * len(rows) + 0.2)
    axes, bars = figure.subplots(len(rows), len(rows[0]), squeeze=False), {}
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        for axis, (title, kind, picture, caption) in zip(axes[i], row, strict=True):
            colours = "magma" if kind == "depth_error" else "viridis" if "depth" in kind else "gray"
            drawn = axis.imshow(picture, cmap=colours, vmin=0, vmax=0.5 if kind == "depth_error" else 1)
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(caption, fontsize=9)
            axis.set_title(TITLES.get(title, title) if i == 0 else "", fontsize=9)
            bars |= {"depth error" if kind == "depth_error" else "near → far": drawn} if "depth" in kind else {}
        axes[i, 0].set_ylabel(label, fontsize=9)
    for label, drawn in bars.items():
        figure.colorbar(drawn, ax=axes, label=label, fraction=0.02, pad=0.01, shrink=0.8)
    return figure


def _predictions(model: nn.Module, ds: ZipDataset, indices: Sequence[int], precision: str = "auto") -> list[dict]:
    """For each sample its pictures (H, W, 3) or (H, W) in [0, 1], the predictions, their errors, and the metrics."""
    batch = to_float(ds.batch(indices), DEVICE)
    with torch.no_grad(), autocast(precision):
        mask_logits, depth = model.eval()(batch["bg"], batch["fg_bg"])
    predicted = {"mask": (mask_logits > 0).float(), "depth": depth.float()}
    tasks = [task for task in predicted if task in ds.kinds and task in getattr(model, "tasks", KINDS)]
    values = measure(mask_logits, depth, *(batch[task] if task in tasks else None for task in predicted))
    batch |= {f"{task}_predicted": predicted[task] for task in tasks}
    batch |= {f"{task}_error": (predicted[task] - batch[task]).abs() for task in tasks}
    pictures = {kind: pictures.permute(0, 2, 3, 1).squeeze(3).cpu().numpy() for kind, pictures in batch.items()}
    values = {name: value.cpu().numpy() for name, value in values.items()}
    return [{name: of[i] for name, of in (pictures | values).items()} for i in range(len(indices))]


def show_samples(ds: ZipDataset, indices: Sequence[int]) -> Figure:
    """A row a kind, a column a sample."""
    batch = {kind: pictures.permute(0, 2, 3, 1).squeeze(3) for kind, pictures in to_float(ds.batch(indices)).items()}
    names = [ds.name(i) for i in indices]
    rows = [[(name, kind, picture, "") for name, picture in zip(names, batch[kind], strict=True)] for kind in ds.kinds]
    return _draw(rows, [TITLES.get(kind, kind) for kind in ds.kinds])


def show_predictions(model: nn.Module, ds: ZipDataset, indices: Sequence[int], precision: str = "auto") -> Figure:
    """A row a sample: the two inputs; mask, prediction and where they differ; depth, prediction and absolute error."""
    rows = []
    for sample in _predictions(model, ds, indices, precision):
        captions = {"mask_predicted": f"IoU {sample.get('iou', 0):.3f}", "depth_predicted": f"RMSE {sample.get('rmse', 0):.3f}"}
        kinds = ["bg", "fg_bg", *(f"{task}{what}" for task in ("mask", "depth") for what in ("", "_predicted", "_error"))]
        rows.append([(kind, kind, sample[kind], captions.get(kind, "")) for kind in kinds if kind in sample])
    return _draw(rows, [ds.name(i) for i in indices])


def compare_predictions(models: dict[str, nn.Module], ds: ZipDataset, indices: Sequence[int],
                        kinds: Sequence[str] = ("mask", "depth")) -> Figure:  # fmt: skip
    """A row a sample and kind: the picture, the truth, and the prediction of each network, grey where it has none."""
    found, rows = {name: _predictions(model, ds, indices) for name, model in models.items()}, []
    for i, kind in itertools.product(range(len(indices)), kinds):
        first, metric = next(iter(found.values()))[i], {"mask": "iou", "depth": "rmse"}[kind]
        row = [("input", "fg_bg", first["fg_bg"], ""), ("truth", kind, first[kind], "")]
        for name, samples in found.items():
            caption = f"{TITLES[metric].split()[1]} {samples[i].get(metric, np.nan):.3f}"
            row.append((name, kind, samples[i].get(f"{kind}_predicted", np.full_like(first[kind], 0.5)), caption))
        rows.append(row)
    return _draw(rows, [kind for _ in indices for kind in kinds])


def _several(one: object) -> list:
    """The runs, or results, of several seeds as they are, and a single one as a list."""
    return list(one) if isinstance(one, list | tuple) else [one]


def plot_history(runs: dict[str, Run | Sequence[Run]], metrics: Sequence[str] = ("loss", "iou", "rmse")) -> Figure:
    """A panel a metric, a curve a run, over the epochs, on the validation samples; dashed: the loss in training. Of
    several seeds the curve is the mean, with a band from the least to the greatest."""
    figure, axes = plt.subplots(1, len(metrics), figsize=(4 * len(metrics), 3), layout="constrained", dpi=110, squeeze=False)
    for metric, axis in zip(metrics, axes[0], strict=True):
        for k, (label, seeds) in enumerate(runs.items()):
            colour, histories = plt.get_cmap("tab20" if len(runs) > 10 else "tab10")(k), [one.history for one in _several(seeds)]
            valid = np.array([[row.get(f"valid_{metric}", np.nan) for row in history] for history in histories])
            epochs = np.arange(1, valid.shape[1] + 1)
            axis.plot(epochs, valid.mean(0), marker=".", label=label, color=colour)
            axis.fill_between(epochs, valid.min(0), valid.max(0), color=colour, alpha=0.12, linewidth=0)
            if metric == "loss":
                axis.plot(epochs, np.mean([[row["train_loss"] for row in h] for h in histories], 0), "--", color=colour)
        axis.set(title=TITLES.get(metric, metric), xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    if len(runs) > 1:
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    return figure


def results_table(results: dict[str, Results | Sequence[Results]], metrics: Sequence[str] = ("iou", "rmse", "delta1"),
                  cells: Sequence[str] = tuple(PART_COLOURS)) -> "pd.io.formats.style.Styler":  # fmt: skip
    """A table for a notebook: a row a run, a column for each test part and metric, the best of a column bold. `results`
    holds `Run.results`, what `score` gives, or a list, one a seed: then the mean ± the standard deviation."""
    several = {label: _several(seeds) for label, seeds in results.items()}
    cells = [cell for cell in cells if any(cell in one for seeds in several.values() for one in seeds)]
    columns = pd.MultiIndex.from_product([[TITLES.get(c, c) for c in cells], [TITLES.get(m, m) for m in metrics]])
    values = [[[one.get(cell, {}).get(metric, np.nan) for one in seeds] for cell in cells for metric in metrics]
              for seeds in several.values()]  # fmt: skip
    means = pd.DataFrame([[np.mean(of) for of in row] for row in values], list(several), columns)
    texts = [[f"{np.mean(of):.3f}" + (f" ± {np.std(of, ddof=1):.3f}" if len(of) > 1 else "") for of in row] for row in values]
    table = pd.DataFrame(texts, list(several), columns).replace("nan", "–")
    best = [means.iloc[:, k] == (means.iloc[:, k].min() if m in LOWER_IS_BETTER else means.iloc[:, k].max())
            for k, m in enumerate(list(metrics) * len(cells))]  # fmt: skip
    bold = pd.DataFrame(np.where(np.transpose(best), "font-weight: bold", ""), table.index, columns)
    return table.style.apply(lambda _: bold, axis=None).set_uuid("")


def _save_images(folder: Path, model: nn.Module, ds: ZipDataset, parts: dict, precision: str) -> None:
    """Writes inputs, truth and predictions of four training samples and four of the hardest part, and a sheet of it all;
    the folder appears only once it is whole."""
    part, rows = folder.with_name(f"{folder.name}.part"), []
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name in ("train", [name for name, indices in parts.items() if len(indices)][-1]):
        indices = parts[name][np.linspace(0, len(parts[name]) - 1, 4).astype(int)]
        for i, sample in zip(indices, _predictions(model, ds, indices, precision), strict=True):
            pictures = {kind: picture for kind, picture in sample.items() if picture.ndim > 1 and "error" not in kind}
            for kind, picture in pictures.items():
                grey = (255 * picture).round().astype(np.uint8)
                Image.fromarray(grey).save(part / f"{name}_{ds.name(i)}_{kind}.png")
                pictures[kind] = picture if picture.ndim > 2 else plt.get_cmap("viridis" if "depth" in kind else "gray")(picture)[..., :3]
            rows.append(np.concatenate(list(pictures.values()), 1))
    Image.fromarray((255 * np.concatenate(rows)).astype(np.uint8)).save(part / "sheet.png")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)


if __name__ == "__main__":  # accelerate launch helpers.py CONFIG.json: a saved Config on all GPUs
    if len(sys.argv) != 2:
        sys.exit("Give the JSON file of one Config: accelerate launch helpers.py CONFIG.json")
    try:
        run(Config.load(sys.argv[1]))
    except (OSError, ValueError, MemoryError) as error:
        sys.exit(str(error))
    if dist.is_initialized():
        dist.destroy_process_group()
