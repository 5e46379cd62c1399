"""What the notebooks share: the data in a zip, networks, losses, metrics, runs that can be resumed, pictures.

One network looks at two pictures, a background (`bg`) and the same scene with an object in it (`fg_bg`), and
predicts two, the object's `mask` and the scene's `depth`; always in this order. Tensors are NCHW, uint8 when
stored, float in [0, 1] at the network; a mask is 0 or 1; depth is in [0, 1] and grows with distance."""

import contextlib
import ctypes
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
import threading
import time
import unicodedata
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import accelerate
import cv2
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
from IPython.display import display
from kornia.filters import guided_blur
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from pytorch_msssim import ssim as msssim_ssim
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.optim.lr_scheduler import ConstantLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

AnyPath = str | Path
with contextlib.suppress(AttributeError, OSError, TypeError):  # glibc keeps a batch's memory for the next:
    for option, value in ((-4, 0), (-1, 2**31 - 1)):  # later epochs of 192 pixels are three times as fast
        ctypes.CDLL(None).mallopt(option, value)  # M_MMAP_MAX, M_TRIM_THRESHOLD
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a started CUDA cannot be forked to several GPUs
torch.backends.cudnn.allow_tf32 = False  # float32 means float32 on a GPU too: TF32 moves SSIM by hundredths
torch.backends.cudnn.benchmark = True  # nearly all batches are alike: tries its ways once, takes the best
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # such pictures are refused by a sentence

# ---------- Where it runs -----------------------------------------------------------------------------------

GPU = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else ""
DEVICE = torch.device(GPU or "cpu")
SCALE = os.environ.get("SCALE") or ("full" if GPU == "cuda" else "quick")
if SCALE not in ("quick", "full"):
    raise ValueError(f"The environment variable SCALE is {SCALE!r}; it can be 'quick' or 'full'.")
ROOT = Path(__file__).resolve().parent
DRIVE = Path("/content/drive")
SCENES = {"quick": "scenes_quick.zip", "full": "scenes.zip"}  # what notebook 00 draws at each scale
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mask-and-depth"  # may be deleted

def environment() -> str:
    """What this runs on, in a line: versions, device and scale."""
    device = f"{torch.cuda.device_count()} x CUDA" if GPU == "cuda" else f"{DEVICE}, {os.cpu_count()} cores"
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, numpy {np.__version__}"
    return f"Python {sys.version.split()[0]}, {versions}; {device}; scale: {SCALE}"

def in_colab() -> bool:
    """Whether this is a notebook in Google Colab. Kaggle sets Colab's variables too, and its own."""
    return "google.colab" in str(get_ipython()) and not any(name.startswith("KAGGLE") for name in os.environ)

def workspace() -> Path:
    """The folder where results are made: the environment variable WORKSPACE (relative to the project), else
    `runs/` beside helpers.py. In Colab, where it goes with the machine, it is copied to the user's Drive."""
    folder = ROOT / Path(os.environ.get("WORKSPACE") or "runs").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    _drive(folder)
    return folder

def data_zip(path: AnyPath = "") -> Path:
    """The data set to use: `path`, else the environment variable DATA_ZIP, else what notebook 00 has drawn in
    the workspace at this scale (the full one is drawn if need be), else the project's sample. A folder may
    stand for a zip; a zip on Drive, which is slow, is copied to the local disk. Raises FileNotFoundError."""
    if not (given := str(path) or os.environ.get("DATA_ZIP", "")):
        made = fetch(SCENES[SCALE])
        if SCALE == "full" and not made.exists():
            with filelock.FileLock(made.with_name(".scenes.lock")):  # of several processes one draws
                if not made.exists():
                    print("There is no data set yet: notebook 00 draws one, which takes some minutes.")
                    nb = _drawing()
                    size = nb.backgrounds, nb.objects, nb.places, nb.size
                    nb.make_dataset(made, *size, nb.seed, nb.objects_per_background)
        return made if made.exists() else ROOT / "assets" / "sample.zip"
    workspace()  # mounts Drive
    found = _found(given, "Give the path of a data set zip, or none for the sample.")
    if DRIVE not in found.parents or found.is_dir():
        return found
    local = CACHE / str(_changed(found)) / found.name
    if not local.exists():
        print(f"copying {found.name} from Drive, {found.stat().st_size / 1e9:.1f} GB")
        _copy(found, local)
    return local

def _drawing() -> ModuleType:
    """What notebook 00's cells tagged "define" define, as a module, where worker processes find it."""
    path = ROOT / "notebooks" / "00_make_dataset.ipynb"
    module = sys.modules["make_dataset"] = ModuleType("make_dataset")
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        if "define" in cell["metadata"].get("tags", []):
            exec(compile("".join(cell["source"]), str(path), "exec"), module.__dict__)
    return module

def _found(path: AnyPath, remedy: str) -> Path:
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
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)  # is there still if something failed

def _known(name: str | None, names: Iterable[str | None], what: str) -> None:
    if name not in names:
        raise ValueError(f"Unknown {what} {name!r}. Known: {', '.join(map(str, names))}.")

# ---------- Data: files and their names ---------------------------------------------------------------------

KINDS = ("bg", "fg_bg", "mask", "depth")
CHANNELS = {"bg": 3, "fg_bg": 3, "mask": 1, "depth": 1}
# How the published data sets name their pictures, in the order of KINDS: {b} is the background's number, {f}
# the object's, {n} the place's or the sample's. A leading folder may wrap it all, and one of ENDINGS follows.
LAYOUTS = {
    "raguram": "bg_images/Image_{b} fg_bg/Image_{b}_{f}_{n} "
    "fg_bg_mask/Image_{b}_{f}_{n} fg_bg_depth/Image_{b}_{f}_{n}",
    "mpaditya": "bg_192/bg192_{b} fg_bg/bg192_{b}_fg{n} "
    "mask/bg192_{b}_fg{n} fg_bg_depth_full/bg192_{b}_fg{n}",
    "deepjyoti": "bg/bg_{b} image/fg_bg_{n} mask/fg_bg_mask_{n} depthmap/depth_{n}",
    "modest": "bg/bg{b} bg_fg/bg{b}_fg{f}_{n} "
    "bg_fg_mask/bg{b}_fg{f}_{n}_mask bg_fg_depth_map/bg{b}_fg{f}_{n}_depth_map",
    "akshat": "bg/bg_{b} fg_bg/bg_{b}/img_{n} fg_bg_mask/bg_{b}/img_{n} fg_bg_depth/bg_{b}/img_{n}",
    "roshantac": "label_data.csv",  # a table: the paths of the four, a line for each sample
}
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # others of Pillow's start programs
LITTER = re.compile(r"/$|(^|/)(__MACOSX/|\.(?!\.?/)|Thumbs\.db$|desktop\.ini$)")  # and folders
SPLIT_ZIP = "one part of a split zip, or its parts joined: make it whole by zip -s 0 PART.zip --out ALL.zip"
NOT_ZIP = {  # what is given in place of a zip, by its first bytes
    b"<": "a web page (HTML), such as Google Drive's warning: download the zip itself",
    b"Rar!": "a rar archive: unpack it, and give the folder",
    b"\x1f\x8b": "a gzip file, as tar.gz is: unpack it, and give the folder",
}

def read_picture(data: bytes, kind: str = "fg_bg") -> np.ndarray:
    """The picture in a file's bytes: uint8 (H, W, 3), of a mask or depth (H, W, 1), the way up that its
    camera noted. Raises ValueError for what is no picture of 8 bits a channel, too large, transparent, or in
    colours where grey is meant."""
    grey, most = CHANNELS[kind] == 1, Image.MAX_IMAGE_PIXELS or np.inf
    try:
        if data[:2] == b"\xff\xd8" and b"Exif\0" not in data[: 2**16]:  # thrice as fast as Pillow
            height, width, space, _ = simplejpeg.decode_jpeg_header(data)
            if height * width <= most and (space == "Gray" or (space in ("YCbCr", "RGB") and not grey)):
                return simplejpeg.decode_jpeg(data, "GRAY" if grey else "RGB")
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > most:
            raise Image.DecompressionBombError
        if image.mode.startswith(("I", "F")):
            raise ValueError("it has more than 8 bits a channel; save it with 8")
        if grey and image.mode == "RGB":
            image.draft("YCbCr", None)  # of a JPEG, its own grey
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255:
            raise ValueError("it is transparent in parts; save what should be seen there")
        if grey and image.mode not in ("1", "L", "LA") and np.ptp(image.convert("RGB"), axis=2).max() > 64:
            raise ValueError("it is in colours where grey is meant; those of a colour map are no distances")
        return np.array(image.convert("L" if grey else "RGB")).reshape(image.height, image.width, -1)
    except Exception as error:  # decoders raise many kinds
        known = {Image.DecompressionBombError: f"it has over {most:,} pixels; make it smaller"}
        known[Image.UnidentifiedImageError] = f"it is none of {', '.join(FORMATS)}"
        raise ValueError(known.get(type(error), str(error))) from None

def _refuse_grey(mask: np.ndarray) -> None:
    """Raises ValueError for a mask not black and white. What JPEG smears is little, and of all levels."""
    grey, white = np.count_nonzero(mask + np.uint8(64) & 128), np.count_nonzero(mask > 191)  # grey: 64 to 191
    if grey > max(white / 10, 16):
        levels = np.bincount(mask.ravel(), minlength=256)[64:192]
        third_level = np.convolve(levels, np.ones(8)).max() > grey / 2
        if third_level or 2 * grey > mask.size or grey > 4 * white:
            raise ValueError(f"{grey} of its {mask.size} pixels are grey, and a mask is black and white")
    if 0 < mask.max() < 128:  # 0 and 1, say, or a number for each object
        raise ValueError(f"its brightest pixel is {mask.max()}, and in a mask the object is 255")

def _open_zip(path: Path) -> zipfile.ZipFile:
    """Raises ValueError, which says what the file is, if it is no zip."""
    with open(path, "rb") as file:
        start = file.read(512).lstrip()
    what = next((what for first, what in NOT_ZIP.items() if start.startswith(first)), "")
    try:
        if not what:
            archive = zipfile.ZipFile(path)
            archive.process = os.getpid()
            if not any(0 < info.volume < 0xFFFF for info in archive.infolist()):
                return archive
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        what = "" if path.with_suffix(".z01").exists() else f"not a whole zip ({error}): copy it anew"
    raise ValueError(f"{path} is {what or SPLIT_ZIP}.")

def _list_files(path: Path) -> tuple[list[str], list, str]:
    """Of a zip, of a folder, or of the zips in a folder, each of which then stands for a folder around its
    files: the files' names, where each is read, and a fingerprint of names and contents."""
    loose, archives = [], [path]
    if path.is_dir():
        loose = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
        archives = [path / name for name in loose if re.fullmatch(r"[^/]+\.zip", name, re.IGNORECASE)]
        if archives and _recognise_layout([name for name in loose if name.lower().endswith(ENDINGS)]):
            beside = ", ".join(archive.name for archive in archives)
            warnings.warn(f"{path}: its pictures are read, and {beside} beside them is not.", stacklevel=3)
            archives = []
        loose = [name for name in loose if path / name not in archives]
    # For checksums of loose files all would be read: sizes tell whether they have changed.
    files = [(name, path / name, (path / name).stat().st_size % 2**32) for name in loose]
    for archive in map(_open_zip, archives):
        around = "" if path.is_file() else f"{Path(archive.filename).stem}/"
        inside = [(info.filename.replace("\\", "/"), info) for info in archive.infolist()]
        files += [(around + name, (archive, info), info.CRC) for name, info in inside]
    files = [file for file in files if not LITTER.search(file[0])]
    if not files:
        raise ValueError(f"{path} holds no files. A data set has pictures: bg, fg_bg, mask and depth.")
    names, places, checksums = map(list, zip(*files, strict=True))
    names = [unicodedata.normalize("NFC", name) for name in names]
    content = np.array(checksums, np.uint32).tobytes()
    content += "\n".join([*names, ""]).encode("utf-8", "surrogateescape")
    return names, places, hashlib.blake2b(content, digest_size=8).hexdigest()

def _read(place: Path | tuple[zipfile.ZipFile, zipfile.ZipInfo]) -> bytes:
    """The bytes of a file, by itself or in a zip. Raises ValueError."""
    try:
        if isinstance(place, Path):
            return place.read_bytes()
        archive, info = place
        if archive.process != os.getpid():  # a forked process would move its parent's place in the file
            archive.fp, archive.process = io.BufferedReader(io.FileIO(archive.filename)), os.getpid()
        return archive.read(info)
    except Exception as error:  # zipfile and its decompressors raise many kinds
        raise ValueError(f"it is damaged ({error}); copy it anew") from error

def _pattern(name: str) -> re.Pattern:
    """What a whole path of this name in LAYOUTS matches, with the numbers as named groups."""
    numbered = re.sub(r"\\{(\w)\\}", r"(?P<\1>\\d{1,18})", re.escape(name))
    ending = "" if name.endswith(".csv") else f"(?:{'|'.join(map(re.escape, ENDINGS))})"
    return re.compile(f"(?:.*/)?{numbered}{ending}", re.IGNORECASE)

TABLE = _pattern(LAYOUTS["roshantac"])

def _recognise_layout(names: Sequence[str]) -> str | None:
    """The layout whose table is there, or that most fg_bg names among some thousand files follow, if any."""
    if any(map(TABLE.fullmatch, names)):
        return "roshantac"
    some = [names[i] for i in np.random.default_rng(0).permutation(len(names))[:10_000]]
    patterns = {name: _pattern(kinds.split()[1]) for name, kinds in LAYOUTS.items() if name != "roshantac"}
    counts = {name: sum(map(bool, map(pattern.fullmatch, some))) for name, pattern in patterns.items()}
    return max(counts, key=counts.get) if any(counts.values()) else None

def _match_names(names: Sequence[str], layout: str, defects: dict[str, str]) -> pd.DataFrame:
    """A row a sample, by the numbers in its name: its files and its ids as numbers, -1 where unknown."""
    tables = {}
    for kind, pattern in zip(KINDS, map(_pattern, LAYOUTS[layout].split()), strict=True):
        matches, numbers = enumerate(map(pattern.fullmatch, names)), [*pattern.groupindex]
        found = [(i, *map(int, match.groups())) for i, match in matches if match]
        table = pd.DataFrame(found, columns=[kind, *numbers], dtype=int).sort_values(numbers, kind="stable")
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
    """The ids of backgrounds and objects. deepjyoti counts its samples on, as many for each background,
    akshat for each anew. By the reports' recipe an object is at 20 places, and mirrored there, in turn."""
    bg_id, fg_id, n = samples.reindex(columns=["b", "f", "n"], fill_value=-1).to_numpy().T
    place, each, count = n - 1, n.max(), backgrounds.max(initial=0)
    if layout == "deepjyoti":
        each, rest = divmod(n.max(), max(count, 1))
        if rest or 0 in backgrounds:
            raise ValueError(f"it has {n.max()} samples on {count} backgrounds; expected as many on each.")
        bg_id, place = place // each + 1, place % each
    if layout in ("deepjyoti", "akshat") and each % 40 == 0:
        fg_id = place // 40
    return bg_id, _fold_mirrored(bg_id, fg_id) if layout == "raguram" else fg_id

def _fold_mirrored(bg_id: np.ndarray, fg_id: np.ndarray) -> np.ndarray:
    """Where object f + F/2 mirrors object f, gives it the same id. Mirrored objects are the upper half of all
    and stand on the same backgrounds; where they do not (a part of a set), F/2 is half of the highest."""
    pairs = np.unique(np.stack([bg_id, fg_id], 1), axis=0)
    start, numbers = int(fg_id.min() > 0), np.sort(pairs[:, 1])  # objects may count from 0 or from 1
    half = numbers[len(numbers) // 2] - numbers[0]
    mirrored = pairs[:, 1] >= start + half
    if np.array_equal(pairs[~mirrored], pairs[mirrored] - [0, half]):
        return (fg_id - start) % half + start
    warnings.warn("Mirrored objects are told by the highest number alone: backgrounds differ.", stacklevel=5)
    return (fg_id - start) % ((numbers[-1] + 2 - start) // 2) + start

def _match_table(names: Sequence[str], table: bytes, defects: dict[str, str]) -> pd.DataFrame:
    """What `_match_names` gives, from a table with the paths of a sample in each line. How a path begins
    depends on where the table was written: it means the file that ends like it in the most parts."""
    text = unicodedata.normalize("NFC", table.decode("utf-8-sig", "replace")).replace("\\", "/")
    separator = max(";\t,", key=text.partition("\n")[0].count)
    lines = pd.read_csv(io.StringIO(text), sep=separator, header=None, dtype=str, keep_default_na=False)
    if lines.shape[1] != 4:
        raise ValueError(f"its table has {lines.shape[1]} columns, not the 4 of bg, fg_bg, mask and depth.")
    ends = [name.lower().split("/")[::-1] for name in names]
    files = {}
    for i, end in enumerate(ends):
        files.setdefault(end[0], []).append(i)

    def find(path: str) -> int:
        parts = path.strip().lower().split("/")[::-1]
        alike = {i: len(os.path.commonprefix([parts, ends[i]])) for i in files.get(parts[0], ())}
        best = [i for i in alike if alike[i] == max(alike.values())]
        if path.strip() and len(best) != 1:
            defects[path] = f"of the table is in the data set {'more than once' if best else 'not at all'}."
        return best[0] if best else -1

    number = lines[0].str.extract(r"(\d{1,18})\D*$", expand=False).fillna("-1").astype(np.int64)
    defects |= dict.fromkeys(lines[0][number < 0], "of the table has no number, by which backgrounds go.")
    samples = lines.map(find).set_axis(KINDS, axis=1).assign(bg_id=number, fg_id=-1)
    for file in samples["fg_bg"][samples["fg_bg"].duplicated() & (samples["fg_bg"] >= 0)]:
        defects[names[file]] = "stands in more than one line of the table."
    in_order = lines[1].str.lower().str.replace(r"\d+", lambda digits: digits[0].zfill(18), regex=True)
    return samples.loc[in_order.sort_values(kind="stable").index]

# ---------- Data: the samples -------------------------------------------------------------------------------

class ZipDataset(torch.utils.data.Dataset):
    """The samples of a data set zip, read from it and never unpacked; or of a folder with the same files, or
    several zips. A picture is decoded when first asked for, and kept at the working size in a file on the
    local disk that the next notebook finds; where there is no room, it is decoded each time.

    `ds[i]` is a dict of float32 tensors in [0, 1], `bg` and `fg_bg` (3, size, size), `mask` and `depth` (1,
    size, size), and `name`; `ds.kinds` are those that there are; `ds.bg_id` and `ds.fg_id` int arrays, -1
    unknown; `ds.left_out` {file name: what is wrong with it}. `layout` is a name in LAYOUTS (None: by the
    file names), `depth_near` whether near is "dark" or "bright" in the zip, `defects` whether to "stop" at
    the first damaged or missing file or to "leave_out" all such samples. Raises FileNotFoundError, and
    ValueError, which names the file."""
    def __init__(self, path: AnyPath, size: int = 64, layout: str | None = None, depth_near: str = "dark",
                 defects: str = "stop"):
        _known(depth_near, ("dark", "bright"), "depth_near")
        _known(defects, ("stop", "leave_out"), "choice of defects")
        _known(layout, (None, *LAYOUTS), "layout")
        self.path = _found(path, "Give the path of a data set zip, or of a folder.")
        self.size, self.depth_near, self.left_out = size, depth_near, {}
        if size < 1:
            raise ValueError(f"size is {size}; it must be a number of pixels, 1 or more.")
        self.names, self._places, self.fingerprint = _list_files(self.path)
        self.layout = layout or _recognise_layout(self.names)
        samples = self._find()
        if self.left_out and defects == "stop":
            name, what = next(iter(self.left_out.items()))
            raise ValueError(f"{path}: {name} {what} ({len(self.left_out)} defects; check(path) lists them)")
        bad = [-1, *(i for i, name in enumerate(self.names) if name in self.left_out)]
        samples = samples[~samples[list(self.kinds)].isin(bad).any(axis=1)]
        if defects == "leave_out":
            about = {"desc": f"checking {self.path.name}", "unit": " samples", "leave": False}
            looks = _pool(os.getpid()).map(self._look_at, samples[list(self.kinds)].to_dict("records"))
            found = list(tqdm(looks, total=len(samples), file=sys.stdout, **about))
            self.left_out |= {name: what for one in found for name, what in one.items()}
            self.fingerprint += f" without {sorted(self.left_out)}" if self.left_out else ""
            samples = samples.loc[[not one for one in found]]
        self._choose(samples)

    def _find(self) -> pd.DataFrame:
        """The samples as `_match_names` gives them; notes what kinds there are, and what is missing."""
        table = [i for i, match in enumerate(map(TABLE.fullmatch, self.names)) if match]
        try:
            if self.layout is None or (self.layout == "roshantac" and not table):
                some = ", ".join(list({os.path.dirname(name): name for name in self.names}.values())[:4])
                known = "; ".join(f"{name}: {kinds}" for name, kinds in LAYOUTS.items())
                raise ValueError(f"no known layout. Found {len(self.names)} files: {some}. Known: {known}.")
            if self.layout == "roshantac":
                samples = _match_table(self.names, _read(self._places[table[0]]), self.left_out)
            else:
                samples = _match_names(self.names, self.layout, self.left_out)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        self.kinds = ("bg", "fg_bg", *(task for task in KINDS[2:] if (samples[task] >= 0).any()))
        if len(self.kinds) == 2:
            raise ValueError(f"{self.path} holds neither masks nor depth: there is nothing to learn.")
        for kind in self.kinds:
            files = samples["fg_bg"][(samples[kind] < 0) & (samples["fg_bg"] >= 0)]
            self.left_out |= {self.names[file]: f"has no {kind}." for file in files}
        return samples

    def _choose(self, samples: pd.DataFrame) -> None:
        """Takes these samples: the files of each kind, each once, as many samples share a background."""
        self.bg_id, self.fg_id = samples["bg_id"].to_numpy(), samples["fg_id"].to_numpy()
        key = f"{self.fingerprint} {self.size} {self.depth_near} {simplejpeg.__version__} {torch.__version__}"
        key += " ".join(str(_changed(place)) for place in self._places if isinstance(place, Path))
        key = hashlib.blake2b(key.encode() + samples.to_numpy().tobytes(), digest_size=8).hexdigest()
        # What a crash of the machine kept from the disk would be black: files are good until the next start.
        since = CACHE / f"pictures-{round(psutil.boot_time(), -2):.0f}"
        for old in set(CACHE.glob("pictures-*")) - {since}:
            shutil.rmtree(old, ignore_errors=True)
        self._file, self._slot, self._kept = {}, {}, {}
        for kind in self.kinds:
            self._file[kind], self._slot[kind] = np.unique(samples[kind], return_inverse=True)
            shape = (len(self._file[kind]), self.size, self.size, CHANNELS[kind])
            with contextlib.suppress(OSError):  # no room
                pictures = _on_disk(since / key / f"{kind}.npy", shape)
                self._kept[kind] = pictures, _on_disk(since / key / f"{kind}_ready.npy", shape[:1])

    def _look_at(self, files: dict[str, int]) -> dict[str, str]:
        """What is wrong with a sample's files: they cannot be read, or the mask is not of what is new.
        Then more changes outside it than inside; about as much where an object is thin and faint."""
        try:
            sample = {kind: self._picture(kind, file).astype(int) for kind, file in files.items()}
        except ValueError as error:
            name, _, what = str(error).removeprefix(f"{self.path}: ").partition(" cannot be read")
            return {name: f"cannot be read{what}"}
        mask = sample["mask"][..., 0] > 0 if "mask" in sample else np.zeros(1, bool)
        change = np.abs(sample["fg_bg"] - sample["bg"]).max(2)
        if not mask.any() or mask.all() or change[~mask].mean() < 1.5 * change[mask].mean():
            return {}
        return {self.names[files["mask"]]: "marks what is alike in bg and fg_bg. Is it inverted?"}

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
        """The samples as uint8 tensors (len(indices), channels, size, size), in NHWC; mask is 0 or 1."""
        batch = {}
        for kind in self.kinds:
            slots = self._slot[kind][np.asarray(indices)]
            pictures, ready = self._kept.get(kind, ({}, np.zeros(len(self._file[kind]), np.uint8)))
            if len(new := np.unique(slots[ready[slots] == 0])):
                read = _pool(os.getpid()).map(functools.partial(self._picture, kind), self._file[kind][new])
                for slot, picture in zip(new, read, strict=True):
                    pictures[slot] = picture  # on the disk or, where there is no room, for this batch
                ready[new] = 1
            found = pictures[slots] if kind in self._kept else np.stack([pictures[slot] for slot in slots])
            batch[kind] = torch.from_numpy(found).permute(0, 3, 1, 2)
        return batch

    def _picture(self, kind: str, file: int) -> np.ndarray:
        """(size, size, channels): bilinear with antialiasing, masks by area, cut at one half to 0 or 1."""
        try:
            picture = read_picture(_read(self._places[file]), kind)
            if kind == "mask":
                _refuse_grey(picture)
        except ValueError as error:
            raise ValueError(f"{self.path}: {self.names[file]} cannot be read as {kind}: {error}.") from error
        if picture.shape[:2] != (self.size, self.size):
            planes = torch.from_numpy(picture).permute(2, 0, 1)[None]
            how = {"mode": "area"} if kind == "mask" else {"mode": "bilinear", "antialias": True}
            planes = F.interpolate(planes.float() if kind == "mask" else planes, (self.size,) * 2, **how)
            picture = planes[0].permute(1, 2, 0).numpy()
        picture = 255 - picture if kind == "depth" and self.depth_near == "bright" else picture
        return (picture > 127.5).astype(np.uint8) if kind == "mask" else picture

def _on_disk(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Bytes in a file, zeros where it is new. Raises OSError where the disk has no room."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{file}.lock"):  # one program makes it, also where several open the data at once
        if not file.exists():
            with _replacing(file) as part:
                size = np.lib.format.open_memmap(part, "w+", np.uint8, shape).nbytes
                with open(part, "r+b") as opened:  # all its room at once: a page without ends the process
                    getattr(os, "posix_fallocate", lambda *_: None)(opened.fileno(), 0, size)
    return np.load(file, mmap_mode="r+")

@functools.lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    """The threads that decode; by process, because they do not live on in a forked one."""
    return ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,))

def check(path: AnyPath, layout: str | None = None) -> dict[str, str]:
    """Reads a data set, prints what it holds, and gives its defects, {file name: what is wrong with it}.
    Raises FileNotFoundError, and ValueError for what is no data set."""
    ds = ZipDataset(path, layout=layout, defects="leave_out")
    objects = len(np.unique(ds.fg_id)) if (ds.fg_id >= 0).all() else "an unknown number of"
    print(f"{ds.path.name}, layout {ds.layout}: {len(ds.names):,} files, {len(ds):,} samples of", *ds.kinds)
    print(f"{len(np.unique(ds.bg_id)):,} backgrounds, {objects} objects, {len(ds.left_out) or 'no'} defects")
    for what in dict.fromkeys(ds.left_out.values()):
        alike = [name for name in ds.left_out if ds.left_out[name] == what]
        print(f"  {len(alike):,} x {what} {', '.join(alike[:3])}{' and more' * (len(alike) > 3)}")
    return ds.left_out

def to_float(batch: dict[str, Tensor], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """A uint8 batch on the device, as float32 in [0, 1], in the memory order that suits convolutions."""
    to = functools.partial(Tensor.to, dtype=torch.float32, memory_format=torch.channels_last)
    return {kind: to(p.to(device)) / (1 if kind == "mask" else 255) for kind, p in batch.items()}

def _hash01(text: str) -> float:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big") / 2**56

def part_of(ids: np.ndarray, what: str, seed: int = 0) -> np.ndarray:
    """Where `split` puts each id of a "background" or an "object": 0 training, 1 validation, 2 test."""
    place = (ids * (5**0.5 - 1) / 2 + _hash01(f"{what} {seed}")) % 1
    return np.where((ids < 0) | (ids == ids[:1]).all(), 0, np.digitize(place, (0.7, 0.85)))

def split(ds: ZipDataset, by: str = "unseen", seed: int = 0) -> dict[str, np.ndarray]:
    """Divides the samples; gives a dict of index arrays. Raises ValueError for another `by`.

    "image" is the random 70/15/15 of the reports: `train`, `valid`, `test`. "unseen" divides backgrounds
    70/15/15 into training, validation and test ones, and objects likewise. Of training backgrounds with
    training objects `train` has 80 %, `valid` and `test_seen` 10 % each; `test_new_bg`, `test_new_fg`,
    `test_new_both` have a test one instead; `valid_new` has a validation one and no test one. Unknown and
    single ids count as training. None moves when others come: ids go by the golden ratio, samples by name."""
    if by == "image":
        order = np.random.default_rng(seed).permutation(len(ds))
        parts = map(np.sort, np.split(order, [round(0.7 * len(ds)), round(0.85 * len(ds))]))
        return dict(zip(("train", "valid", "test"), parts, strict=True))
    _known(by, ("unseen", "image"), "split")

    bg, fg = part_of(ds.bg_id, "background", seed), part_of(ds.fg_id, "object", seed)
    seen, place = (bg == 0) & (fg == 0), np.array([_hash01(f"{ds.name(i)} {seed}") for i in range(len(ds))])
    parts = {"train": seen & (place < 0.8), "valid": seen & (place >= 0.8) & (place < 0.9)}
    parts |= {"valid_new": ~seen & (bg < 2) & (fg < 2), "test_seen": seen & (place >= 0.9)}
    parts |= {"test_new_bg": (bg == 2) & (fg == 0), "test_new_fg": (bg == 0) & (fg == 2)}
    parts |= {"test_new_both": (bg == 2) & (fg == 2)}
    return {name: np.flatnonzero(members) for name, members in parts.items()}

# ---------- Networks ----------------------------------------------------------------------------------------
# Each: mask_logits, depth = model(bg, fg_bg), both (N, 1, H, W), depth in [0, 1]; `stride` divides H and W.

class PairNetwork(nn.Module):
    """What the networks share: `both` gives the logits of mask and depth. Raises ValueError where `stride`
    does not divide the pictures' size."""
    stride = 1

    def forward(self, bg: Tensor, fg_bg: Tensor) -> tuple[Tensor, Tensor]:
        size, fit = bg.shape[2:], [max(1, round(side / self.stride)) * self.stride for side in bg.shape[2:]]
        if list(size) != fit:
            what = f"{size[0]} x {size[1]} pixels do not divide by {self.stride}. Use {fit[0]} x {fit[1]}."
            raise ValueError(f"{type(self).__name__} shrinks its input: {what}")
        mask_logits, depth = self.both(bg, fg_bg)
        return mask_logits, depth.sigmoid()

def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, bias: bool = False, norm: bool = True,
         relu: bool = True) -> list[nn.Module]:
    """Convolution and, if asked for, batch norm and ReLU."""
    layers = [nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=bias)]
    layers += [nn.BatchNorm2d(outputs)] if norm else []
    return [*layers, nn.ReLU(inplace=True)] if relu else layers

class DoubleConv(nn.Sequential):
    """Twice: 3x3 convolution, batch norm, ReLU; with `middle` channels between."""
    def __init__(self, inputs: int, outputs: int, middle: int = 0, bias: bool = True, norm: bool = True):
        middle, options = middle or outputs, {"bias": bias, "norm": norm}
        super().__init__(*conv(inputs, middle, **options), *conv(middle, outputs, **options))

class ResBlock(nn.Module):
    """A double convolution beside a 1x1 shortcut. Gives features at half size, and as they are: a skip."""
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.shortcut_conv, self.shortcut_norm = conv(inputs, outputs, 1, relu=False)
        self.main = DoubleConv(inputs, outputs)
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        skip = self.relu(self.shortcut_norm(self.shortcut_conv(x)) + self.main(x))
        return self.pool(skip), skip

class UpBlock(nn.Module):
    """Doubles the size, joins the encoder's features of that size, mixes both with a double convolution."""
    def __init__(self, inputs: int, skip: int, outputs: int):
        super().__init__()
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.mix = DoubleConv(inputs + skip, outputs)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.mix(torch.cat([self.up(x), skip], 1))

class ResUNet(PairNetwork):
    """Reports 1 and 4: a residual encoder, two decoders; `widths` of the encoder's blocks and the bottom."""
    def __init__(self, widths: Sequence[int] = (32, 64, 128, 256, 512)):
        super().__init__()
        self.stride, up = 2 ** (len(widths) - 1), widths[::-1]
        self.encoder = nn.ModuleList(map(ResBlock, (6, *widths), widths[:-1]))
        self.bottom = DoubleConv(widths[-2], widths[-1])
        self.mask_decoder = nn.ModuleList(map(UpBlock, up, up[1:], up[1:]))
        self.mask_head = nn.Conv2d(widths[0], 1, 1)
        self.depth_decoder = nn.ModuleList(map(UpBlock, up, up[1:], up[1:]))
        self.depth_head = nn.Conv2d(widths[0], 1, 1)

    def both(self, bg: Tensor, fg_bg: Tensor) -> tuple[Tensor, Tensor]:
        x, skips = torch.cat([bg, fg_bg], 1), []
        for block in self.encoder:
            x, skip = block(x)
            skips.insert(0, skip)
        mask = depth = self.bottom(x)
        for block, skip in zip(self.mask_decoder, skips, strict=True):
            mask = block(mask, skip)
        mask = self.mask_head(mask)
        for block, skip in zip(self.depth_decoder, skips, strict=True):
            depth = block(depth, skip)
        return mask, self.depth_head(depth)

class BasicBlock(nn.Module):
    """ResNet's: two 3x3 convolutions beside a shortcut, 1x1 where shapes change. He et al., 2015."""
    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.main = nn.Sequential(*conv(inputs, outputs, stride=stride), *conv(outputs, outputs, relu=False))
        change = nn.Sequential(*conv(inputs, outputs, 1, stride, relu=False))
        self.shortcut = nn.Identity() if (inputs, stride) == (outputs, 1) else change
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.main(x) + self.shortcut(x))

class DualStreamDecoder(nn.Module):
    """From features of three sizes to one channel of full size. Learned up-sampling, no norm."""
    def __init__(self, width: int):
        super().__init__()
        half, quarter = width // 2, width // 4
        self.reduce, self.up_half = nn.Conv2d(256, width, 1), nn.ConvTranspose2d(width, width, 2, stride=2)
        self.mix_half = DoubleConv(width + 128, half, norm=False)
        self.up_full = nn.ConvTranspose2d(half, half, 2, stride=2)
        self.mix_full = DoubleConv(half + 64, quarter, norm=False)
        self.head = nn.Conv2d(quarter, 1, 3, padding=1)

    def forward(self, full: Tensor, half: Tensor, quarter: Tensor) -> Tensor:
        x = self.mix_half(torch.cat([self.up_half(self.reduce(quarter)), half], 1))
        return self.head(self.mix_full(torch.cat([self.up_full(x), full], 1)))

class DualStream(PairNetwork):
    """Report 2: a stream for each picture; joined, they go down to quarter size, and two decoders up."""
    def __init__(self):
        super().__init__()
        self.stride = 4
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
    """Six channels to one; `widths`: the encoder's channels from full size down. Ronneberger et al., 2015."""
    def __init__(self, widths: Sequence[int]):
        super().__init__()
        self.encoder = nn.ModuleList(map(DoubleConv, (6, *widths), widths))
        self.pool, self.up = nn.MaxPool2d(2), nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        skips = widths[-2::-1]  # handed across, the smallest first; as many channels come from below
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
    def __init__(self):
        super().__init__()
        self.stride = 16
        self.mask_net, self.depth_net = UNet((16, 32, 64, 128, 128)), UNet((32, 64, 128, 256, 256))

    def both(self, bg: Tensor, fg_bg: Tensor) -> tuple[Tensor, Tensor]:
        pictures = torch.cat([bg, fg_bg], 1)
        return self.mask_net(pictures), self.depth_net(pictures)

class TripleResBlock(BasicBlock):
    """Three convolutions, the third's ReLU after the sum, beside a shortcut that is a 3x3 convolution."""
    def __init__(self, inputs: int, outputs: int):
        nn.Module.__init__(self)
        last = conv(outputs, outputs, relu=False)
        self.main = nn.Sequential(DoubleConv(inputs, outputs, bias=False), *last)
        self.shortcut = nn.Sequential(*conv(inputs, outputs, relu=False))
        self.relu = nn.ReLU(inplace=True)

class TwoHeadResNet(PairNetwork):
    """Report 5: a stream for each picture and two heads, all at full size. A pixel sees 21 x 21 of them."""
    def __init__(self):
        super().__init__()
        double = functools.partial(DoubleConv, bias=False)
        doubles = double(32, 64), double(64, 128)
        self.bg_stream = nn.Sequential(*conv(3, 32), *doubles)
        self.fg_bg_stream = nn.Sequential(*conv(3, 32), TripleResBlock(32, 64), TripleResBlock(64, 128))
        heads = (nn.Sequential(double(256, 256), *conv(256, 1, norm=False, relu=False)) for _ in range(2))
        self.mask_head, self.depth_head = heads

    def both(self, bg: Tensor, fg_bg: Tensor) -> tuple[Tensor, Tensor]:
        joined = torch.cat([self.fg_bg_stream(fg_bg), self.bg_stream(bg)], 1)
        return self.mask_head(joined), self.depth_head(joined)

class FullSizeDecoder(nn.Module):
    """From an encoder's features, largest first, up to full size: nearest doubling, the encoder's features
    beside it, a residual block. The largest, of 1/`unshuffle` of the size, spread their channels over pixels
    (Shi et al., Sub-Pixel Convolution, 2016), beside `detail` channels of the pictures, for the outlines."""
    def __init__(self, widths: Sequence[int], pictures: int, outputs: int, unshuffle=2, detail=16):
        super().__init__()
        self.up = nn.ModuleList(nn.Upsample(scale_factor=2) for _ in widths[1:])
        pairs = itertools.pairwise(widths[::-1])
        self.mix = nn.ModuleList(BasicBlock(below + here, here) for below, here in pairs)
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
    """The project's own: a U-Net of residual blocks that gets the pictures' difference too. Squares of
    `unshuffle` x `unshuffle` pixels become channels first, so that little is computed at full size; `widths`
    are the channels at 1/2, 1/4, 1/8, 1/16 of the size. The reasons are in notebook 02."""
    inputs = staticmethod(with_difference)

    def __init__(self, widths: Sequence[int] = (32, 64, 128, 192), unshuffle: int = 2, detail: int = 16):
        super().__init__()
        self.stride = unshuffle * 2 ** (len(widths) - 1)
        channels = self.inputs(*torch.zeros(2, 1, 3, 1, 1)).shape[1]
        first = BasicBlock(channels * unshuffle**2, widths[0])
        self.stem = nn.Sequential(nn.PixelUnshuffle(unshuffle), first)
        steps = (nn.Sequential(nn.MaxPool2d(2), BasicBlock(*pair)) for pair in itertools.pairwise(widths))
        self.encoder, self.dropout = nn.ModuleList(steps), nn.Dropout2d(0.2)
        self.decoder = FullSizeDecoder(widths, channels, 2, unshuffle, detail)

    def both(self, bg: Tensor, fg_bg: Tensor) -> Sequence[Tensor]:
        pictures = self.inputs(bg, fg_bg)
        *features, smallest = self.encode(pictures)
        return self.decoder([*features, self.dropout(smallest)], pictures).split(1, 1)

    def encode(self, pictures: Tensor) -> list[Tensor]:
        """The features of each size, largest first, of what `inputs` makes of the two pictures."""
        features = [self.stem(pictures)]
        for block in self.encoder:
            features.append(block(features[-1]))
        return features

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
        quarter = self.layer1(self.maxpool(half))
        eighth = self.layer2(quarter)
        return [half, quarter, eighth, self.layer3(eighth)]

MODELS: dict[str, Callable[[], nn.Module]] = {
    "resunet": ResUNet,
    "resunet_lite": functools.partial(ResUNet, (64, 128, 256)),
    "dual_stream": DualStream,
    "twin_unet": TwinUNet,
    "two_head_resnet": TwoHeadResNet,
    "difference_unet": DifferenceUNet,
    "resnet18_unet": ResNet18UNet,
}

# ---------- Losses and metrics ------------------------------------------------------------------------------
# A loss: (prediction, target) -> scalar tensor. A mask's prediction is logits, depth's is in [0, 1].
# Formulas: notebook 03.

PICTURE = (1, 2, 3)  # the axes over which a picture's pixels are summed

def bce(z: Tensor, t: Tensor) -> Tensor:
    """Binary cross entropy of logits, mean over all pixels."""
    return F.binary_cross_entropy_with_logits(z, t)

def weighted_bce(z: Tensor, t: Tensor, pos_weight: float = 5.0) -> Tensor:
    """Cross entropy in which the object's pixels count `pos_weight` times (report 4 meant to try that)."""
    return F.binary_cross_entropy_with_logits(z, t, pos_weight=z.new_full((), pos_weight))

def focal(z: Tensor, t: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Cross entropy times alpha_t (1 - p_t)^gamma. Lin et al., Focal Loss for Object Detection, 2017."""
    cross_entropy = F.binary_cross_entropy_with_logits(z, t, reduction="none")
    missing = -torch.expm1(-cross_entropy)  # 1 - p_t
    return ((alpha * t + (1 - alpha) * (1 - t)) * missing**gamma * cross_entropy).mean()

def lovasz(z: Tensor, t: Tensor) -> Tensor:
    """Lovasz hinge of logits, per picture: hinge errors, from the largest on, each times what its pixel, when
    wrong too, takes off the intersection over union. Berman et al., The Lovasz-Softmax Loss, 2018."""
    errors, order = (1 - z.flatten(1) * (2 * t.flatten(1) - 1)).sort(1, descending=True)
    truth = t.flatten(1).gather(1, order)
    size = truth.sum(1, keepdim=True)
    jaccard = 1 - (size - truth.cumsum(1)) / (size + (1 - truth).cumsum(1))  # lost by the first k pixels
    return (errors.relu() * torch.cat([jaccard[:, :1], jaccard.diff(dim=1)], 1)).sum(1).mean()

def tversky(p: Tensor, t: Tensor, a: float = 0.3, b: float = 0.7) -> Tensor:
    """1 - (I + 1) / (I + a FP + b FN + 1) per picture: with b above a, a missed pixel is worse than a wrong
    one. Salehi et al., Tversky Loss Function for Image Segmentation, 2017."""
    overlap = (p * t).sum(PICTURE)
    wrong, missed = p.sum(PICTURE) - overlap, t.sum(PICTURE) - overlap
    return (1 - (overlap + 1) / (overlap + a * wrong + b * missed + 1)).mean()

def dice(p: Tensor, t: Tensor) -> Tensor:
    """1 - (2 sum pt + 1) / (sum p + sum t + 1) per picture. Milletari et al., V-Net, 2016, but no squares."""
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
    """Quadratic up to delta, straight beyond; depth in [0, 1] would never reach the usual delta of 1."""
    return F.huber_loss(d, g, delta=delta)

def berhu(d: Tensor, g: Tensor) -> Tensor:
    """|e| up to c, then (e^2 + c^2) / 2c; c is a fifth of the batch's largest error. Laina et al., Deeper
    Depth Prediction with Fully Convolutional Residual Networks, 2016."""
    error = (d - g).abs()
    c = (0.2 * error.detach().max()).clamp_min(1e-6)  # 0 / 0 for a perfect batch otherwise
    if dist.is_initialized() and d.requires_grad:  # in training the batch is that of all processes
        dist.all_reduce(c, dist.ReduceOp.MAX)
    return torch.where(error <= c, error, (error.square() + c**2) / (2 * c)).mean()

def silog(d: Tensor, g: Tensor) -> Tensor:
    """Root of mean q^2 - (mean q)^2 / 2 per picture, q = log d - log g, clamped to 1/255. Eigen et al., Depth
    Map Prediction from a Single Image, 2014, with the root of later papers."""
    q = d.clamp_min(1 / 255).log() - g.clamp_min(1 / 255).log()
    return (q.square().mean(PICTURE) - q.mean(PICTURE).square() / 2 + 1e-12).sqrt().mean()

def gradient(d: Tensor, g: Tensor) -> Tensor:
    """Mean over all pixels of |dy(d - g)| + |dx(d - g)|, forward differences, 0 in the last row or column."""
    return ((d - g).diff(dim=2).abs().sum() + (d - g).diff(dim=3).abs().sum()) / d.numel()

def ssim_per_picture(d: Tensor, g: Tensor) -> Tensor:
    """Structural similarity (N,): Gaussian window 11, sigma 1.5, K .01 and .03, valid windows. Wang et al.,
    2004. Raises ValueError for pictures smaller than the window."""
    height, width = d.shape[2:]
    if min(height, width) < 11:
        raise ValueError(f"SSIM looks at windows of 11 x 11 pixels; these pictures are {height} x {width}.")
    return msssim_ssim(d, g, data_range=1, size_average=False)

def ssim(d: Tensor, g: Tensor) -> Tensor:
    """(1 - SSIM) / 2."""
    return ((1 - ssim_per_picture(d, g)) / 2).mean()

def l1_ssim_gradient(d: Tensor, g: Tensor) -> Tensor:
    """L1 + SSIM loss + gradient, each with weight 1 (report 2)."""
    return l1(d, g) + ssim(d, g) + gradient(d, g)

def densedepth(d: Tensor, g: Tensor) -> Tensor:
    """0.1 L1 + SSIM loss + gradient. Alhashim and Wonka, High Quality Monocular Depth Estimation, 2018."""
    return 0.1 * l1(d, g) + ssim(d, g) + gradient(d, g)

def of_logits(loss: Callable) -> Callable:
    """A loss of probabilities as one of logits."""
    @functools.wraps(loss)
    def wrapped(z: Tensor, t: Tensor, **options) -> Tensor:
        return loss(z.sigmoid(), t, **options)
    return wrapped

MASK_LOSSES = {loss.__name__: loss for loss in (bce, weighted_bce, focal, lovasz, bce_dice)}
MASK_LOSSES |= {loss.__name__: of_logits(loss) for loss in (l1, rmse, dice, tversky, ssim)}
DEPTH_LOSSES = {loss.__name__: loss for loss in (l1, rmse, huber, berhu, ssim, gradient, dice, silog)}
DEPTH_LOSSES |= {loss.__name__: loss for loss in (l1_ssim_gradient, densedepth)}

class TaskLoss(nn.Module):
    """loss(mask_logits, depth, mask_true, depth_true): the mask's loss plus `depth_weight` times the depth's,
    both by name; None: not trained. "learned" weighs by parameters s, t: exp(-s) mask + s + exp(-t) depth + t
    (Kendall et al., Multi-Task Learning Using Uncertainty, 2018). Raises ValueError for what is not known."""
    def __init__(self, mask_loss: str | None, depth_loss: str | None, depth_weight: float | str = 1.0):
        super().__init__()
        _known(mask_loss, (None, *MASK_LOSSES), "mask loss")
        _known(depth_loss, (None, *DEPTH_LOSSES), "depth loss")
        learned = depth_weight == "learned"
        if mask_loss is None and depth_loss is None:
            raise ValueError("mask_loss and depth_loss are both None; there would be nothing to train.")
        if learned and None in (mask_loss, depth_loss):
            raise ValueError("depth_weight is 'learned', which takes two tasks, but one loss is None.")
        if not learned and (isinstance(depth_weight, str) or not depth_weight > 0):
            raise ValueError(f"depth_weight is {depth_weight!r}; it can be a number above 0, or 'learned'.")
        self.losses = {"mask": MASK_LOSSES.get(mask_loss), "depth": DEPTH_LOSSES.get(depth_loss)}
        self.weights = {"mask": 1, "depth": depth_weight}
        self.log_variances = nn.Parameter(torch.zeros(2)) if learned else None

    def forward(self, mask_logits: Tensor, depth: Tensor, mask_true: Tensor, depth_true: Tensor) -> Tensor:
        pairs = {"mask": (mask_logits.float(), mask_true), "depth": (depth.float(), depth_true)}
        with torch.autocast(depth.device.type, enabled=False):  # float32, whatever the network has used
            terms = {task: loss(*pairs[task]) for task, loss in self.losses.items() if loss}
        for task, term in terms.items():
            if term.dim():
                raise ValueError(f"The {task} loss must give a scalar, like a mean, not {tuple(term.shape)}.")
        self.terms = {task: term.detach() for task, term in terms.items()}  # to say which of them went wrong
        if self.log_variances is not None:
            return (torch.stack([*terms.values()]) * (-self.log_variances).exp() + self.log_variances).sum()
        return sum(self.weights[task] * term for task, term in terms.items())

task_loss = TaskLoss

@torch.no_grad()
def measure(mask_logits: Tensor, depth: Tensor, mask_true: Tensor | None, depth_true: Tensor | None) -> dict:
    """Metrics of a batch, float32 (N,) each, of the tasks whose truth is given; all arguments (N, 1, H, W).
    Two empty masks have `iou` and `dice` 1. `abs_rel`, `log10` and `delta1` to 3, the share of pixels with
    max(d / g, g / d) < 1.25^k (Eigen et al., 2014), are of the pixels whose true depth g is at least 1/255,
    with d clamped to 1e-3; NaN where there are none. Raises ValueError below 11 x 11 pixels."""
    values = {}
    if mask_true is not None:
        predicted, true = mask_logits > 0, mask_true > 0.5
        both, either = (predicted & true).sum(PICTURE), (predicted | true).sum(PICTURE)
        values["iou"] = torch.where(either > 0, both / either, 1.0)
        values["dice"] = torch.where(either > 0, 2 * both / (both + either), 1.0)
        values["pixel_accuracy"] = (predicted == true).float().mean(PICTURE)
        values["mask_area"] = predicted.float().mean(PICTURE)
    if depth_true is not None:
        depth, g = depth.float(), depth_true.float()
        values["rmse"] = (depth - g).square().mean(PICTURE).sqrt()
        values["mae"] = (depth - g).abs().mean(PICTURE)
        counted, d = g >= 1 / 255, depth.clamp_min(1e-3)
        ratios = {"abs_rel": (d - g).abs() / g, "log10": (d.log10() - g.log10()).abs()}
        ratios |= {f"delta{k}": (torch.maximum(d / g, g / d) < 1.25**k).float() for k in (1, 2, 3)}
        values |= {name: of.where(counted, torch.nan).nanmean(PICTURE) for name, of in ratios.items()}
        values["ssim"] = ssim_per_picture(depth, g)
    return values

def opened_difference(bg: Tensor, fg_bg: Tensor) -> Tensor:
    """The greatest difference of the colours, (N, 1, H, W), without what is narrower than 3 pixels."""
    eroded = -F.max_pool2d(-(fg_bg.float() - bg.float()).abs().amax(1, keepdim=True), 3, 1, 1)
    return F.max_pool2d(eroded, 3, 1, 1)

class Baseline(nn.Module):
    """What needs no network, used like one: the mask is where the `opened_difference` of the pictures is more
    than `threshold` (in 1/255), the depth is `mean_depth` (1, 1, H, W) whatever they show."""
    def __init__(self, threshold: int, mean_depth: Tensor):
        super().__init__()
        self.threshold = threshold
        self.register_buffer("mean_depth", mean_depth)

    def forward(self, bg: Tensor, fg_bg: Tensor) -> tuple[Tensor, Tensor]:
        difference = 255 * opened_difference(bg, fg_bg)
        return difference - self.threshold - 0.5, self.mean_depth.expand(len(bg), -1, -1, -1)

def baselines(ds: ZipDataset, train: np.ndarray) -> Baseline:
    """What every result stands beside: the threshold of best mean IoU and the mean depth of these samples."""
    iou, depth = torch.zeros(256), torch.zeros(1, 1, ds.size, ds.size, dtype=torch.double)  # sums
    for batch in map(ds.batch, np.array_split(train, max(1, len(train) // 256))):
        differences = opened_difference(batch["bg"], batch["fg_bg"]).short()
        masks = batch.get("mask", torch.zeros_like(differences))
        for difference, mask in zip(differences, masks, strict=True):
            # Up to each threshold: the pixels, and those of the object, which it would miss.
            below = torch.bincount(difference.flatten(), minlength=256).cumsum(0)
            missed = torch.bincount(difference[mask > 0], minlength=256).cumsum(0)
            union = mask.numel() - below + missed
            iou += torch.where(union > 0, (mask.sum() - missed) / union, 1.0)
        depth += batch["depth"].sum(0, keepdim=True, dtype=torch.double) if "depth" in batch else 0
    return Baseline(int(iou.argmax()), (depth / len(train) / 255).float()).to(DEVICE)

# ---------- Augmentation ------------------------------------------------------------------------------------

def mirror(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every other sample on average is mirrored left to right, in all its pictures."""
    flip = torch.rand(len(batch["bg"]), 1, 1, 1, device=batch["bg"].device) < 0.5
    return {kind: torch.where(flip, pictures.flip(3), pictures) for kind, pictures in batch.items()}

def jitter_colours(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Brightness, contrast, saturation vary by up to a fifth, hue by a twentieth, alike in both pictures."""
    both = K.ColorJitter(0.2, 0.2, 0.2, 0.05, p=1.0)(torch.cat([batch["bg"], batch["fg_bg"]], 2))
    return batch | dict(zip(("bg", "fg_bg"), both.chunk(2, 2), strict=True))

def shake(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What happens between two shots from a hand, each to some samples: bg moves by up to 2.5 pixels of 192,
    seldom by 8 and 3 degrees; its light changes by up to 40 %, its colours from warm to cold by 20 %; a soft
    shadow falls on fg_bg; both get blur, noise and JPEG. After Lin et al., Background Matting V2, 2020."""
    bg, draw = batch["bg"], torch.rand(2, len(batch["bg"]), 1, 1, 1, device=batch["bg"].device)
    for degrees, pixels, p in ((1.0, 2.5, 0.3), (3.0, 8.0, 0.1)):
        bg = K.RandomAffine(degrees, (pixels / 192, pixels / 192), padding_mode="border", p=p)(bg)
    bg = K.ColorJitter(0.4, 0.0, 0.1, 0.01, p=0.3)(bg)
    bg = bg * (1 + (draw[0] < 0.3) * (0.2 * draw[1] - 0.1) * bg.new_tensor([1, 0, -1]).view(3, 1, 1))
    fg_bg = K.RandomGaussianIllumination((0.1, 0.3), (0.1, 0.4), sign=(-1.0, -1.0), p=0.3)(batch["fg_bg"])
    blur = K.RandomGaussianBlur((5, 5), (0.2, 1.0), p=0.2)
    for spoil in (blur, K.RandomGaussianNoise(0.0, 0.02, p=0.3), K.RandomJPEG((25.0, 95.0), p=0.3)):
        bg, fg_bg = spoil(bg).clamp(0, 1), spoil(fg_bg).clamp(0, 1)
    return batch | {"bg": bg, "fg_bg": fg_bg}

AUGMENTATIONS = {"mirror": mirror, "colour": jitter_colours, "shake": shake}  # done in this order

# ---------- Runs: a Config says everything, a folder holds everything ---------------------------------------

OPTIMIZERS = {"sgd": functools.partial(SGD, momentum=0.9), "rmsprop": RMSprop, "adam": Adam, "adamw": AdamW}
SCHEDULES = {  # of (optimizer, lr, steps); RMSprop, known by "alpha", has no momentum for a cycle to change
    "constant": lambda o, lr, steps: ConstantLR(o, factor=1.0),
    "step": lambda o, lr, steps: StepLR(o, -(-steps // 3), gamma=0.1),
    "plateau": lambda o, lr, steps: ReduceLROnPlateau(o, factor=0.1, patience=2),
    "onecycle": lambda o, lr, steps: OneCycleLR(o, lr, steps + 1, cycle_momentum="alpha" not in o.defaults),
}
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHOICES = {"split": ("unseen", "image"), "defects": ("stop", "leave_out"), "precision": ("auto", *PRECISIONS)}
CHOICES |= {"depth_near": ("dark", "bright"), "model": MODELS, "optimizer": OPTIMIZERS, "schedule": SCHEDULES}
LEAST = {"size": 11, "batch_size": 1, "epochs": 1, "lr": 1e-12}  # of other numbers 0; SSIM needs 11 pixels
OURS = [*MODELS.values(), *MASK_LOSSES.values(), *DEPTH_LOSSES.values()]  # a run knows others by their code
Results = dict[str, dict[str, float]]  # part of the split -> metric -> mean over its pictures

@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a run's result, but for the device, which precision "auto" looks at. On the
    sample: `Config(name="first", epochs=2)`. Raises ValueError for a name or value that is not known."""
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
    schedule: str = "onecycle"  # "constant"; "step": a tenth each third; "plateau": after 3 epochs in vain
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
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            value = value.item() if isinstance(value, np.generic) else value  # as JSON holds it
            object.__setattr__(self, name, str(value) if isinstance(value, Path) else value)
            if name in CHOICES:
                _known(value, CHOICES[name], name)
            least, most = LEAST.get(name, 0), 1 if name == "average" else np.inf
            what = {int: "a whole number", float: "a number"}.get(field.type)
            numbers = int if field.type is int else int | float
            if what and not (isinstance(value, numbers) and least <= value < most):
                raise ValueError(f"{name} is {value!r}; it must be {what}, {least} or more, average below 1.")
        if not all(part.strip(". ") and not set(part) & set('\\:*?"<>|') for part in self.name.split("/")):
            raise ValueError(f"name is {self.name!r}; it must be a path of folders, such as losses/dice.")
        for name in self.augment.split("+"):
            _known(name, ("none", *AUGMENTATIONS), "augment")
        task_loss(self.mask_loss, self.depth_loss, self.depth_weight)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that are trained."""
        return tuple(task for task in KINDS[2:] if getattr(self, f"{task}_loss"))

    def save(self, path: AnyPath) -> None:
        """Writes it as JSON; of several processes, the first does."""
        _write(Path(path), json.dumps(dataclasses.asdict(self), indent=1))

    @classmethod
    def load(cls, path: AnyPath) -> "Config":
        """Reads what `save` wrote, or a run's config.json. Raises ValueError where it holds no Config."""
        try:
            values = dict(json.loads(Path(path).read_text()))
            return cls(**{name: values[name] for name in values if name not in ("fingerprint", "code")})
        except (TypeError, AttributeError, ValueError) as error:
            hint = "If it names a loss or a network of your own, define that first."
            raise ValueError(f"{path} holds no Config that can be used ({error}). {hint}") from error

@dataclasses.dataclass(frozen=True)
class Run:
    """A run as its folder tells it."""
    config: Config
    folder: Path
    history: list[dict[str, float]]  # a dict an epoch: epoch, lr, train_loss, valid_loss, valid_iou ...
    seconds: list[float]  # training time of each epoch
    results: Results  # empty until finished

    def model(self) -> nn.Module:
        """The network with the weights of the best epoch (least validation loss), ready to predict."""
        return load_model(self.folder)

def run(config: Config, stop_after: int | None = None, quiet: bool = False,
        watch: Callable[[dict, np.ndarray], object] | None = None) -> Run:
    """Trains, or goes on, or reads: whatever is left to do for this Config.

    The run is the folder `<workspace>/<name>/`. Not there, it is started; cut off at whatever moment, it goes
    on from its last checkpoint, on a CPU to the same bits as if it never had been; finished, it is read. In
    it: config.json, metrics.csv and timing.csv (a row an epoch), checkpoint.pt, best.pt (the weights of the
    least validation loss), results.json (what those are worth on other samples), and images. It leaves off
    after `stop_after` epochs, as if cut off there; `quiet` prints nothing; `watch` is called with the run's
    state and each sheet of pictures that is saved. Processes that accelerate has started train together.
    Raises ValueError where the folder holds another run, and for data, losses and networks that do not fit;
    RuntimeError where another program is at this run; MemoryError."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        accelerate.PartialState(cpu=not GPU)
    first, folder = _processes()[0] == 0, workspace() / config.name
    folder = folder if (folder / "results.json").exists() else fetch(config.name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0)
    try:
        with lock if first else contextlib.nullcontext(), torch.random.fork_rng():
            ds = ZipDataset(data_zip(config.data), config.size, None, config.depth_near, config.defects)
            for task in set(config.tasks) - set(ds.kinds):
                remedy = f"Set {task}_loss=None, or take another zip."
                raise ValueError(f"{ds.path} has no {task} pictures. {remedy}")
            ds.kinds = ("bg", "fg_bg", *config.tasks)
            settings = dataclasses.asdict(config) | {"fingerprint": ds.fingerprint, "code": _own_code(config)}
            _refuse_another(folder, settings)
            if not (folder / "results.json").exists():
                parts, model = parts_of(config, ds), _begin(config, folder)
                _write(folder / "config.json", json.dumps(settings, indent=1))
                _train(config, ds, parts, model, folder, stop_after, quiet or not first, watch)
            elif not quiet:
                print(f"{config.name}: finished before, read from its folder")
            return read_run(folder)
    except filelock.Timeout:
        raise RuntimeError(f"Another program is at the run {folder}. Wait, or take another name.") from None
    except torch.OutOfMemoryError as error:
        remedy = f"Set batch_size={config.batch_size // 2 or 1} or a smaller size, under another name"
        raise MemoryError(f"{config.name}: a batch does not fit into memory. {remedy}.") from error

def _own_code(config: Config) -> dict[str, str]:
    """A hash of the source of a network, all its classes from one module, or a loss of one's own: edited, it
    makes another run."""
    hashes = {}
    for field, known in (("model", MODELS), ("mask_loss", MASK_LOSSES), ("depth_loss", DEPTH_LOSSES)):
        made = known.get(getattr(config, field))
        if made is None or any(made is one for one in OURS):
            continue
        values = repr((made.args, made.keywords)) if isinstance(made, functools.partial) else ""
        code = inspect.unwrap(getattr(made, "func", made))
        code = code if inspect.isroutine(code) or inspect.isclass(code) else type(code)
        parts = [code, *map(type, made().modules())] if field == "model" else [code]
        classes = [one for part in parts if inspect.isclass(part) for one in part.__mro__]
        classes = dict.fromkeys(one for one in classes if one.__module__ == code.__module__)
        members = [code, *itertools.chain(*(vars(one).values() for one in classes))]
        functions = filter(inspect.isfunction, (getattr(member, "__func__", member) for member in members))
        source = "".join(map(inspect.getsource, functions)) + values
        hashes[field] = hashlib.blake2b(source.encode(), digest_size=8).hexdigest()
    return hashes

def _refuse_another(folder: Path, settings: dict) -> None:
    """Raises ValueError where the folder holds a run of other settings, or of data of other content."""
    if not (folder / "config.json").exists():
        return
    theirs = dataclasses.asdict(Config("any")) | json.loads((folder / "config.json").read_text())
    for key, now in settings.items():
        was = theirs.get(key, {})
        if was != now and key not in ("data", "checkpoint_minutes"):
            what = "the code of a loss or network of your own, now edited," if key == "code" else key
            change = f"{what} was {was!r} and is {now!r}. Take another name, or delete {folder}."
            raise ValueError(f"The run {settings['name']!r} exists, but {change}")

def parts_of(config: Config, ds: ZipDataset) -> dict[str, np.ndarray]:
    """The Config's split, cut to its limits. Raises ValueError where nothing is left to train or validate."""
    drawn = np.random.default_rng([0, 1]).permutation(len(ds))[: config.subset or None]
    parts = split(ds, config.split)
    for part, indices in parts.items():
        most = (config.max_train if part == "train" else config.max_test) or None
        indices = np.random.default_rng(0).permutation(indices[np.isin(indices, drawn)])
        parts[part] = np.sort(indices[:most])
        if part in ("train", "valid") and not len(indices):
            few = f"{ds.path}: of its {len(ds)} samples, split {config.split!r} leaves none for {part}"
            raise ValueError(f"{few}. Take more backgrounds and objects, or split='image'.")
    return parts

def autocast(precision: str = "auto") -> torch.autocast:
    """For a forward pass. "auto": bfloat16 where the device has it, float16 on older GPUs, else float32."""
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
        coming = []
        for item in items:
            coming.append(thread.submit(function, item))
            if len(coming) > 2:
                yield coming.pop(0).result()
        yield from (future.result() for future in coming)

@torch.no_grad()
def evaluate(model: nn.Module, ds: ZipDataset, indices: np.ndarray, loss: TaskLoss | None = None,
             precision: str = "auto") -> dict[str, np.ndarray]:
    """The metrics of `measure` for each of the samples, arrays of len(indices), of the tasks that the network
    was trained on. With a loss also `loss`, the same for all of a batch of 32."""
    tasks, measured = getattr(model.eval(), "tasks", KINDS), []
    for batch in _prefetch(ds.batch, np.split(indices, range(32, len(indices), 32))):
        batch = to_float(batch, DEVICE)
        with autocast(precision):
            outputs = model(batch["bg"], batch["fg_bg"])
        truth = [batch.get(task) if task in tasks else None for task in KINDS[2:]]
        values = measure(*outputs, *truth)
        if loss is not None:
            values["loss"] = loss(*outputs, *truth).float().expand(len(batch["bg"]))
        measured.append({name: value.cpu().numpy() for name, value in values.items()})
    return {name: np.concatenate([values[name] for values in measured]) for name in measured[0]}

def score(model: nn.Module, ds: ZipDataset, parts: dict[str, np.ndarray], precision: str = "auto") -> Results:
    """Means over the pictures in which a pixel counts (no NaN): part with samples -> metric -> value."""
    values = {part: evaluate(model, ds, of, precision=precision) for part, of in parts.items() if len(of)}
    return {part: pd.DataFrame(of).astype(float).mean().to_dict() for part, of in values.items()}

def run_all(configs: dict[str, Sequence[Config]]) -> dict[str, list[Run]]:
    """`run` for lists of Configs, such as one a seed. Deletes their checkpoints, but for copies on Drive."""
    runs = {label: [] for label in configs}
    todo = [(label, config) for label, several in configs.items() for config in several]
    for label, config in tqdm(todo, unit=" runs", leave=False, file=sys.stdout):
        runs[label].append(run(config, quiet=True))
        (runs[label][-1].folder / "checkpoint.pt").unlink(missing_ok=True)
    return runs

def read_run(folder: AnyPath) -> Run:
    """The run in this folder, as far as it has come. Raises FileNotFoundError, ValueError where damaged."""
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} holds no run (no config.json). Give the folder that run() made.")
    config = Config.load(folder / "config.json")
    try:
        seconds = [row["seconds"] for row in _read_table(folder / "timing.csv")]
        results = json.loads(file.read_text()) if (file := folder / "results.json").exists() else {}
        return Run(config, folder, _read_table(folder / "metrics.csv"), seconds, results)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{folder}: a file of this run is damaged ({error}). Delete the folder.") from error

# ---------- Training ----------------------------------------------------------------------------------------

class SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all processes; on CPUs, where torch's own refuses."""
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        shares = torch.distributed.nn.functional.all_gather(x.contiguous())
        return super().forward(torch.cat(shares)).chunk(len(shares))[dist.get_rank()].clone()

def _begin(config: Config, folder: Path) -> nn.Module:
    """The network as it begins. Raises ValueError where it does not do what the networks of MODELS do."""
    torch.manual_seed(config.seed)
    model, (_, processes) = MODELS[config.model]().to(DEVICE, memory_format=torch.channels_last), _processes()
    if config.start and not (folder / "checkpoint.pt").exists():
        start = load_model(config.start)
        if start.name != config.model:
            raise ValueError(f"start is {config.start!r}, a {start.name}, and model is {config.model!r}.")
        model.load_state_dict(start.state_dict())
    shape = (2, 1, config.size, config.size)
    with torch.no_grad():
        given = model.eval()(*torch.zeros(2, 2, 3, config.size, config.size, device=DEVICE))
    if not isinstance(given, tuple | list) or [getattr(one, "shape", 0) for one in given] != [shape, shape]:
        raise ValueError(f"The network {config.model!r} must give a pair (N, 1, H, W): mask_logits, depth.")
    if GPU == "cuda" and processes > 1:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in [module for module in model.modules() if type(module) is nn.BatchNorm2d and processes > 1]:
        module.__class__ = SyncBatchNorm
    return model

def _mean_over_processes(tensors: Sequence[Tensor]) -> None:
    """Where several processes train together, each waits for the others and gets the mean of all."""
    for tensor in tensors if dist.is_initialized() else ():
        dist.all_reduce(tensor.div_(dist.get_world_size()))

def _train(config: Config, ds: ZipDataset, parts: dict[str, np.ndarray], model: nn.Module, folder: Path,
           stop_after: int | None, quiet: bool, watch: Callable | None) -> None:
    """From the last checkpoint to the last epoch. Everything random in a step depends on (seed, step) alone,
    and the order of an epoch on (seed, epoch): that makes going on exact."""
    process, processes = _processes()
    loss_of = task_loss(config.mask_loss, config.depth_loss, config.depth_weight).to(DEVICE)
    groups = [{"params": [*model.parameters()]}, {"params": [*loss_of.parameters()], "weight_decay": 0.0}]
    optimizer = OPTIMIZERS[config.optimizer](groups, lr=config.lr, weight_decay=config.weight_decay)
    steps = -(-len(parts["train"]) // config.batch_size)  # of an epoch
    epochs = max(config.epochs, -(-config.min_steps // steps))
    schedule = SCHEDULES[config.schedule](optimizer, config.lr, steps * epochs)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=autocast(config.precision).fast_dtype == torch.float16)
    state = {"model": model, "loss": loss_of, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    state |= {"step": 0, "lr": 0.0, "loss_sum": torch.zeros((), device=DEVICE), "history": [], "best": {}}
    if config.average:  # at first over few steps, so that the random weights of the start are soon forgotten
        def towards(kept: Tensor, new: Tensor, _: Tensor) -> Tensor:  # to look at its count is to wait for it
            return kept + (new - kept) * (1 - min(config.average, (state["step"] + 1) / (state["step"] + 10)))

        state["average"] = torch.optim.swa_utils.AveragedModel(model, avg_fn=towards, use_buffers=True)
    kept = state["average"].module if config.average else model  # whose weights are measured and saved
    checkpoint = folder / "checkpoint.pt"
    for name, saved in (_load_state(checkpoint) if checkpoint.exists() else {}).items():
        if hasattr(state[name], "load_state_dict"):
            state[name].load_state_dict(saved)
        else:
            state[name] = saved.to(DEVICE) if name == "loss_sum" else saved
    augment = [change for name, change in AUGMENTATIONS.items() if name in config.augment.split("+")]
    while state["step"] < steps * (epochs if stop_after is None else min(epochs, stop_after)):
        epoch, begun = divmod(state["step"], steps)
        order = np.random.default_rng([config.seed, epoch]).permutation(parts["train"])
        batches = np.array_split(order, steps)[begun:]  # nearly equal: none has a single sample left
        shares = [np.resize(of, len(of) + -len(of) % processes)[process::processes] for of in batches]
        started = saved_at = time.monotonic()
        state["lr"] = state["lr"] if begun else optimizer.param_groups[0]["lr"]
        about = {"desc": f"epoch {epoch + 1}/{epochs}", "initial": begun, "total": steps, "file": sys.stdout}
        bar = tqdm(_prefetch(ds.batch, shares), leave=False, disable=quiet or None, **about)
        model.train()
        for whole, batch in zip(batches, bar, strict=True):
            if epoch == 0 and process == 0 and state["step"] in FIRST_STEPS:
                _save_images(folder, state, kept, ds, parts, config, watch)
                model.train()
            torch.manual_seed(((config.seed * 2**32 + state["step"]) * 64 + process) % 2**64)
            batch = functools.reduce(lambda batch, change: change(batch), augment, to_float(batch, DEVICE))
            with autocast(config.precision):
                outputs = model(batch["bg"], batch["fg_bg"])
            loss = loss_of(*outputs, batch.get("mask"), batch.get("depth"))
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            grads = [weight.grad for group in groups for weight in group["params"] if weight.grad is not None]
            _mean_over_processes([*grads, loss.detach_()])
            if config.clip_norm:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            scaler.step(optimizer)
            scaler.update()
            if config.schedule != "plateau":
                schedule.step()
            if config.average:
                state["average"].update_parameters(model)
            state["step"] += 1
            state["loss_sum"] += loss * (len(whole) / len(order))
            due = time.monotonic() - saved_at > 60 * config.checkpoint_minutes or state["step"] % steps == 0
            if due or not GPU or state["step"] % 50 == 0:  # on a GPU, to look at the loss is to wait for it
                where = f"{'by' if GPU else 'in'} step {state['step']} the loss"
                _refuse_not_finite(config, state["loss_sum"], where, loss_of.terms, map(ds.name, whole))
            if due and state["step"] % steps:
                _write(checkpoint, state)
                saved_at = time.monotonic()
        _end_epoch(config, ds, parts, folder, state, kept, time.monotonic() - started, quiet, watch)
    if state["step"] == steps * epochs:
        kept.load_state_dict(state["best"])
        tests = {part: indices for part, indices in parts.items() if part != "train"}
        _write(folder / "results.json", json.dumps(score(kept, ds, tests, config.precision), indent=1))
    _mean_over_processes([torch.zeros(1, device=DEVICE)])  # then all find what the first has written

def _refuse_not_finite(config, loss: Tensor, where: str, terms: dict, samples: Iterable[str]) -> None:
    if not loss.isfinite():
        terms = ", ".join(f"{task} {term:.3g}" for task, term in terms.items())
        # On a GPU, looked at now and then, it may have been an earlier step, of other samples.
        of = f" ({terms}), of {', '.join(itertools.islice(samples, 8))}" if terms and not GPU else ""
        raise ValueError(f"{config.name}: {where} is not finite{of}. Try a smaller lr, under another name.")

def _end_epoch(config, ds, parts, folder, state, kept, seconds, quiet, watch) -> None:
    """Measures and writes what the epoch has brought, the checkpoint last: a kill before it repeats all."""
    # Learned weights change from epoch to epoch; epochs are compared by weights that do not.
    learned = config.depth_weight == "learned"
    loss = task_loss(config.mask_loss, config.depth_loss, 1.0 if learned else config.depth_weight)
    values = evaluate(kept, ds, parts["valid"], loss, config.precision)
    row = {"epoch": len(state["history"]) + 1, "lr": state["lr"], "train_loss": state["loss_sum"].item()}
    row |= pd.DataFrame(values).astype(float).mean().add_prefix("valid_").to_dict()
    if learned:
        row["depth_weight"] = (state["loss"].log_variances[0] - state["loss"].log_variances[1]).exp().item()
    state["history"].append(row)
    mean = torch.tensor(np.mean(values["loss"]), device=DEVICE)  # NaN if one of them is
    _mean_over_processes([mean])
    _refuse_not_finite(config, mean, f"in epoch {row['epoch']} the loss of the validation samples", {}, ())
    if config.schedule == "plateau":
        state["schedule"].step(mean.item())
    state["loss_sum"] = torch.zeros((), device=DEVICE)
    if row["valid_loss"] <= min(before["valid_loss"] for before in state["history"]):
        state["best"] = {name: tensor.cpu().clone() for name, tensor in kept.state_dict().items()}
    if _processes()[0] == 0:
        timing = _read_table(folder / "timing.csv")[: row["epoch"] - 1]
        _write(folder / "timing.csv", [*timing, {"epoch": row["epoch"], "seconds": seconds}])
        _save_images(folder, state, kept, ds, parts, config, watch)
        _write(folder / "metrics.csv", state["history"])
        _write(folder / "best.pt", state["best"])
    _write(folder / "checkpoint.pt", state)
    if not quiet:
        shown = ("train_loss", "valid_loss", "valid_iou", "valid_rmse")
        found = "  ".join(f"{name} {row[name]:.3f}" for name in shown if name in row)
        print(f"{config.name}  epoch {row['epoch']}  {found}  ({seconds:.0f} s)")

def _write(path: Path, content: str | list | dict) -> None:
    """A file of text, of the rows of a table, or of a state, whole or not at all; by the first process."""
    if _processes()[0] > 0:
        return
    if isinstance(content, list):
        content = pd.DataFrame(content).to_csv(index=False, na_rep="nan", lineterminator="\n")
    with _replacing(path) as part, open(part, "wb") as file:
        if isinstance(content, str):
            file.write(content.encode())
        else:
            torch.save(_plain(content), file)

def _plain(value: object) -> object:
    """A network and the like as its state dict, and equal strings as one object: pickle writes one twice
    that, once loaded, has become two."""
    if hasattr(value, "state_dict"):
        value = value.state_dict()
    if isinstance(value, dict):
        return {_plain(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return list(map(_plain, value))
    return sys.intern(value) if isinstance(value, str) else value

def _load_state(path: Path) -> dict:
    """What torch.save wrote, of tensors and plain values alone: nothing in it is run. Raises ValueError."""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # of junk torch.load raises many kinds
        raise ValueError(f"{path} is damaged, or no file of weights ({type(error).__name__}).") from error

def _read_table(path: Path) -> list[dict[str, float]]:
    table = pd.read_csv(path, dtype=str) if path.exists() else pd.DataFrame()
    return table.astype(float).to_dict("records")

# ---------- Drive -------------------------------------------------------------------------------------------

PATIENCE, LOOK_AGAIN = 120.0, 15.0  # seconds: until Drive counts as hung; between two looks for what is new

@functools.cache
def _drive(local: Path) -> SimpleNamespace | None:
    """The project's `folder` on Drive, to which a thread copies the workspace from now on; `there`, when each
    file on it was changed; `trouble`, what fails now. None outside Colab, and where consent is refused."""
    if not in_colab():
        return None
    from google.colab import drive

    try:
        drive.mount(str(DRIVE))
    except Exception as error:  # refused consent raises a private class of Colab's
        print(f"Google Drive is not available ({error}): results stay on this machine and go with it.")
        return None
    found = SimpleNamespace(folder=DRIVE / "MyDrive" / "mask-and-depth", there={}, trouble="")
    threading.Thread(target=_copy_for_ever, args=(local, found), daemon=True).start()
    return found

def _copy_for_ever(local: Path, drive: SimpleNamespace) -> None:
    while True:
        drive.trouble = _copy_newer(local, drive.folder, drive, drive.there)
        time.sleep(LOOK_AGAIN)

def _copy_newer(source: Path, target: Path, drive: SimpleNamespace, done: dict, name: AnyPath = "",
                until: float = np.inf) -> str:
    """Copies what is newer in one folder to the other, and says what went wrong. Of a run the oldest comes
    first, and what is newer waits for it: a checkpoint must not arrive before its pictures. Nothing is begun
    after `until`, by the monotonic clock."""
    trouble = ""
    for entry in [source / name] if name else source.glob("*"):
        try:
            os.stat(drive.folder.parent)
            for changed, file in _files(entry):
                os.stat(drive.folder.parent)  # where Drive is not mounted, its folders must not be made
                if time.monotonic() > until:
                    raise TimeoutError("it hung")
                copy = target / file.relative_to(source)
                if _changed(file) == changed > _changed(copy) + 10**7:  # Drive counts milliseconds
                    _copy(file, copy)
                done[file] = changed
        except OSError as error:
            trouble = str(error)
    return trouble

def _files(folder: Path) -> list[tuple[int, Path]]:
    """(when written, path) of a folder's files, or of one, the oldest first; none hidden or half-written."""
    files = [file for file in (folder, *folder.rglob("*")) if file.is_file()]
    return sorted((_changed(file), file) for file in files if file.name[0] != "." and file.suffix != ".part")

def _changed(path: Path) -> int:
    """When a file was last written, in ns; 0 where there is none."""
    return path.stat().st_mtime_ns if path.exists() else 0

def _copy(source: Path, target: Path) -> None:
    """Copies a file with its time, unless the target is newer by then. Raises OSError."""
    changed, part = _changed(source), target.with_name(f"{target.name}.copy.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, part)
    os.utime(part, ns=(changed, changed))
    if changed >= _changed(target):
        os.replace(part, target)

def fetch(name: AnyPath) -> Path:
    """The place of a file or folder in the workspace, after what is newer on Drive was brought there."""
    local, brought = workspace(), []
    if drive := _drive(local):
        until = time.monotonic() + PATIENCE
        bring = functools.partial(_copy_newer, drive.folder, local, drive, {}, name, until)
        thread = threading.Thread(target=lambda: brought.append(bring()), daemon=True)
        thread.start()
        thread.join(PATIENCE)
        if trouble := (brought or ["it hangs"])[0]:
            print(f"Google Drive does not give {name} ({trouble}). Goes on with what is here.")
    return local / name

def drive_report(patience: float = 600) -> str:
    """What is on Drive and what is not. Waits for the copies, at most so many seconds."""
    local, until = workspace(), time.monotonic() + patience
    if not (drive := _drive(local)):
        goes = f", {local}, and goes with this machine: download it" if in_colab() else ""
        return f"Nothing is copied to Google Drive. What was made is in the workspace{goes}."
    there = drive.there
    while (missing := [f for at, f in _files(local) if there.get(f) != at]) and time.monotonic() < until:
        time.sleep(0.1)
    if missing:
        names = ", ".join(file.relative_to(local).as_posix() for file in missing)
        why = drive.trouble or "it hangs, or there was no time yet"
        return f"Not there ({why}): {names}. Download it from {local}."
    return f"On Google Drive, in {drive.folder}: {len(there)} files. Leave this machine some minutes more."

# ---------- Prediction --------------------------------------------------------------------------------------

WEIGHTS = ROOT / "assets" / "difference_unet.pt"  # the project's, for 192 pixels

def load_model(weights: AnyPath = "") -> nn.Module:
    """A trained network in float32, ready to predict, with its `name` in MODELS, and the `size` and `tasks`
    it was trained on. `weights` is the folder of a run, its best.pt, or a state dict known by its shapes,
    of 192 pixels; empty: the project's. Raises FileNotFoundError, ValueError for no weights."""
    path = _found(weights or WEIGHTS, "Give the folder of a run, or a file of weights.")
    path = _found(path / "best.pt", "The run has finished no epoch yet.") if path.is_dir() else path
    state, file = _load_state(path), path.parent / "config.json"
    known = [Config.load(file)] if file.exists() else [Config("any", size=192, model=name) for name in MODELS]
    for config in known:
        model = MODELS[config.model]().to(DEVICE, memory_format=torch.channels_last)
        with contextlib.suppress(AttributeError, RuntimeError):  # of another network
            model.load_state_dict(state)
            model.name, model.size, model.tasks = config.model, config.size, config.tasks
            return model.eval()
    raise ValueError(f"{path} holds no weights of {' or '.join(config.model for config in known)}.")

@torch.no_grad()
def predict(model: nn.Module, bg: Tensor, fg_bg: Tensor, size: int | None = None,
            refine: bool = True) -> tuple[Tensor, Tensor]:
    """The mask, 0 or 1, and the depth in [0, 1] of pictures of any size, as large as `fg_bg`: (N, 1, H, W) on
    DEVICE. `bg` and `fg_bg` are (N, 3, H, W) or (3, H, W), one for all of the other's too, float in [0, 1] or
    uint8; the network sees them at `size` pixels a side, by default its own. To `refine` is to take a quarter
    of the depth from what a PairNetwork sees at 64 pixels, where a place is looked over as one (after
    Miangoleh et al., Boosting Monocular Depth Estimation, 2021), and to give the mask the outlines of fg_bg.
    Raises ValueError for other input."""
    pair = [(of[None] if of.dim() == 3 else of).to(DEVICE) for of in (bg, fg_bg)]
    pair = [of / 255 if of.dtype == torch.uint8 else of.float() for of in pair]
    for of in pair:
        if of.dim() != 4 or of.shape[1] != 3 or not (of.min() >= 0 and of.max() <= 1):
            values = f"{tuple(of.shape)}, from {of.min():.3g} to {of.max():.3g}"
            raise ValueError(f"Pictures are (N, 3, H, W), uint8 or float in [0, 1]; these are {values}.")
    pair = [of.expand(max(map(len, pair)), -1, -1, -1) for of in pair]
    side = size or getattr(model, "size", 192)
    sides = [side, 64] if refine and side > 64 and isinstance(model, PairNetwork) else [side]
    views = [[resize(of, [side, side]) for of in pair] for side in sides]
    (mask_logits, depth), *over = [model.to(DEVICE).eval()(*view) for view in views]
    depth = 0.75 * depth + 0.25 * resize(over[0][1], [side, side]) if over else depth
    mask, depth = (resize(of, fg_bg.shape[-2:]) for of in (mask_logits.sigmoid(), depth))
    return _follow_outlines(mask, *pair) if refine else (mask > 0.5).float(), depth.clamp(0, 1)

def _follow_outlines(mask: Tensor, bg: Tensor, fg_bg: Tensor) -> Tensor:
    """A soft mask as 0 and 1. In each window of 7 to 9 pixels of 192 it becomes that function, linear in the
    colours of fg_bg and their change, which comes closest to it. He and Sun, Fast Guided Filter, 2015."""
    change = (fg_bg - resize(bg, fg_bg.shape[2:])).abs_().amax(1, keepdim=True)
    short, long = sorted(mask.shape[2:])
    every = max(1, min(round(long / 192), short // 48))  # of so many pixels one is looked at
    window = [2 * every * round(side / 48 / every) + 1 for side in mask.shape[2:]]
    return (guided_blur(torch.cat([fg_bg, change], 1), mask, window, 1e-4, subsample=every) > 0.5).float()

def open_photo(path: AnyPath) -> np.ndarray:
    """A photo, uint8 (H, W, 3), as `read_picture` reads it. Raises FileNotFoundError, and ValueError."""
    path = _found(path, "Give the path of a photo.")
    try:
        return read_picture(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}.") from error

def align_background(bg: np.ndarray, fg_bg: np.ndarray) -> np.ndarray:
    """`bg` as it would look from where `fg_bg` was taken and in its light, as large as `fg_bg`; what it does
    not show is taken from `fg_bg`. Both are photos of one place, uint8 (H, W, 3). It moves by what makes the
    photos differ least, and not at all unless that is clearly better."""
    size = fg_bg.shape[1::-1]
    bg, scale, ways = cv2.resize(bg, size, interpolation=cv2.INTER_AREA), min(1, 480 / max(size)), []
    small = [cv2.resize(of, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) for of in (bg, fg_bg)]
    x, y = (cv2.blur(of, (3, 3)).astype(np.float32) for of in small)
    for motion in _motions([cv2.cvtColor(of, cv2.COLOR_RGB2GRAY) for of in small]):
        shown = cv2.warpPerspective(x, motion, x.shape[1::-1], borderValue=[np.nan] * 3)
        if np.isfinite(shown).mean() > 0.5:
            difference, *light = _fit_light(shown[::3, ::3], y[::3, ::3])
            ways.append((difference if ways else difference / 1.15, len(ways), motion, *light))
    (_, _, motion, gain, bias), zoom = min(ways), np.diag([scale, scale, 1])
    bg = cv2.LUT(bg, (np.arange(256)[:, None] * gain + bias).clip(0, 255).round().astype(np.uint8)[None])
    motion = np.linalg.inv(zoom) @ motion @ zoom
    return cv2.warpPerspective(bg, motion, size, fg_bg.copy(), borderMode=cv2.BORDER_TRANSPARENT)

def _motions(grey: list[np.ndarray]) -> Iterator[np.ndarray]:
    """How the first of two pictures may have moved, (3, 3) each: not at all; by a homography between ORB
    features (Rublee et al., 2011); by a turn and a shift (ECC: Evangelidis and Psarakis, 2008)."""
    yield np.eye(3)
    orb, even = cv2.ORB_create(1000, fastThreshold=8), cv2.createCLAHE(2)
    (points, words), (others, more) = (orb.detectAndCompute(even.apply(of), None) for of in grey)
    with contextlib.suppress(cv2.error, IndexError):  # too few are alike
        pairs = cv2.BFMatcher(cv2.NORM_HAMMING, crossCheck=True).match(words, more)
        ends = np.float32([[points[pair.queryIdx].pt, others[pair.trainIdx].pt] for pair in pairs])
        motion, good = cv2.findHomography(ends[:, 0], ends[:, 1], cv2.RANSAC, 2.0)
        if motion is not None and good.sum() > 20:
            yield motion
    with contextlib.suppress(cv2.error):  # it finds nothing
        half, start = map(cv2.pyrDown, grey), np.eye(2, 3, dtype=np.float32)
        _, motion = cv2.findTransformECC(*half, start, cv2.MOTION_EUCLIDEAN, (3, 40, 1e-4), None, 5)
        yield np.vstack([motion * [1, 1, 2], [0, 0, 1]])

def _fit_light(bg: np.ndarray, fg_bg: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """The mean difference of the 60 % of pixels that fit best, their gain and bias; NaN in bg is left out."""
    there = ~np.isnan(bg[..., 0])
    x, y, good = bg[there], fg_bg[there], np.ones(there.sum(), bool)
    for _ in range(4):
        mean, spread = x[good].mean(0), x[good].var(0)
        gain = ((x[good] - mean) * y[good]).mean(0) / np.maximum(spread, 1e-6)
        gain = np.where(spread < 16, 1, gain).clip(0.4, 2.5)  # of one colour no gain can be told
        bias = y[good].mean(0) - gain * mean
        differences = np.abs(x * gain + bias - y).max(1)
        good = differences <= np.quantile(differences, 0.6)
    return float(differences[good].mean()), gain, bias

class Prediction(NamedTuple):
    """What `predict_images` gives: its files, None for a task not trained, and a figure."""
    mask_file: Path | None
    depth_file: Path | None
    figure: Figure

def predict_images(weights: AnyPath | nn.Module, bg: AnyPath, image: AnyPath, folder: AnyPath = "",
                   overwrite: bool = False, align: bool = True) -> Prediction:
    """From two photos, of a place and of the same place with an object, the mask and the depth, by a network
    or the weights of one: `<image>_mask.png` and `<image>_depth.png`, grey, of the image's size, 255 the
    object and the far end, in the folder, by default the image's; over what is there only with `overwrite`.
    Photos from a hand are first brought into line, unless told not to `align`. Raises FileNotFoundError,
    FileExistsError, OSError for the folder, ValueError for no picture, no weights, and unlike shapes."""
    model = weights if isinstance(weights, nn.Module) else load_model(weights)
    image = _found(image, "Give the path of a photo.")
    background, photo = open_photo(bg), open_photo(image)
    (bg_height, bg_width), (height, width) = background.shape[:2], photo.shape[:2]
    if abs(np.log(bg_width * height / (bg_height * width))) > (0.2 if align else 0.02):
        shapes = f"{bg} has {bg_width} x {bg_height} pixels and {image} {width} x {height}"
        raise ValueError(f"{shapes}: not the same view. Take both photos from one place, and cut them alike.")
    place, tasks = Path(folder or image.parent).expanduser(), getattr(model, "tasks", KINDS[2:])
    files = {task: place / f"{image.stem}_{task}.png" for task in tasks}
    if there := [str(file) for file in files.values() if file.exists() and not overwrite]:
        raise FileExistsError(f"{', '.join(there)}: there already. Give another folder, or overwrite=True.")
    views = background, align_background(background, photo) if align else background, photo
    shown, aligned, fg_bg = (torch.from_numpy(view).permute(2, 0, 1) for view in views)
    mask, depth = (of[0].mul(255).round().byte().cpu() for of in predict(model, aligned, fg_bg))
    pictures = {"bg": shown, "fg_bg": fg_bg, "mask": mask, "depth": depth}
    try:
        place.mkdir(parents=True, exist_ok=True)
        for task, file in files.items():
            Image.fromarray(pictures[task][0].numpy()).save(file)
    except OSError as error:
        raise OSError(f"{place} cannot be written ({error}). Give another folder.") from error
    step = max(1, max(height, width) // 800)  # a figure needs no more pixels
    small = {kind: pictures[kind][:, ::step, ::step] / 255 for kind in ("bg", "fg_bg", *tasks)}
    figure = _draw([[(small, kind) for kind in small]])
    plt.close(figure)  # else pyplot would keep it
    return Prediction(files.get("mask"), files.get("depth"), figure)

# ---------- Pictures ----------------------------------------------------------------------------------------

PART_COLOURS = {"test_seen": "#0173b2", "test_new_bg": "#029e73", "test_new_fg": "#de8f05"}
PART_COLOURS |= {"test_new_both": "#cc3311", "test": "#cc3311"}
TITLES = {"bg": "background", "fg_bg": "with object", "iou": "mask IoU", "rmse": "depth RMSE"}
TITLES |= {"delta1": "depth δ < 1.25", "test_seen": "seen", "test_new_bg": "new background"}
TITLES |= {"test_new_fg": "new object", "test_new_both": "new background and object"}
LOWER_IS_BETTER = ("loss", "rmse", "mae", "abs_rel", "log10")
SCORES = {"mask_predicted": ("IoU", "iou"), "depth_predicted": ("RMSE", "rmse")}  # stand under a picture
FIRST_STEPS = (0, 10, 30, 100, 300)  # after so many steps of the first epoch, too, pictures are saved

def _draw(rows: list[list[tuple]], titles: Sequence[str] = (), labels: Sequence[str] = ("",)) -> Figure:
    """A figure of rows of (sample, kind): the sample's picture of that kind, if it has one, and under a
    prediction how good it is; with bars for depth and its error."""
    shape, (height, width), bars = (len(rows), len(rows[0])), rows[0][0][0]["bg"].shape[1:], {}
    between = 0.3 if any(kind in SCORES and kind in sample for row in rows for sample, kind in row) else 0.1
    side = max(1.6, 12 / max(shape[1], 4))
    size = side * shape[1] + 0.8, (side * height / width + between) * shape[0] + 0.2
    figure, axes = plt.subplots(*shape, squeeze=False, figsize=size, layout="constrained", dpi=110)
    titles = titles or [TITLES.get(kind, kind.replace("_", " ")) for _, kind in rows[0]]
    for i, (label, row) in enumerate(zip(labels, rows, strict=True)):
        axes[i, 0].set_ylabel(label)
        for axis, (sample, kind), title in zip(axes[i], row, titles, strict=True):
            error, depth = kind == "depth_error", kind.startswith("depth")
            picture = sample.get(kind, torch.full_like(sample["bg"][:1], torch.nan)).permute(1, 2, 0)
            colours = "magma" if error else "viridis" if depth else "gray"
            drawn = axis.imshow(picture.numpy(), colours, vmin=0, vmax=0.5 if error else 1)
            bars |= {"depth error" if error else "depth: near → far": drawn} if depth else {}
            axis.set(xticks=[], yticks=[], title="" if i else title)
            if kind in SCORES and kind in sample:
                name, metric = SCORES[kind]
                axis.set_xlabel(f"{name} {sample[metric]:.3f}")
    for label, drawn in bars.items():
        figure.colorbar(drawn, ax=axes, label=label, fraction=0.02, pad=0.01)
    return figure

def _predictions(model: nn.Module, ds: ZipDataset, indices: Sequence[int], precision="auto") -> list[dict]:
    """For each sample its pictures (C, H, W), the predictions, their errors, and the metrics."""
    batch, tasks = to_float(ds.batch(indices), DEVICE), getattr(model, "tasks", KINDS)
    with torch.no_grad(), autocast(precision):
        mask_logits, depth = model.eval()(batch["bg"], batch["fg_bg"])
    truth = [batch.get(task) if task in tasks else None for task in KINDS[2:]]
    for task, true, given in zip(KINDS[2:], truth, ((mask_logits > 0).float(), depth.float()), strict=True):
        if true is not None:
            batch |= {f"{task}_predicted": given, f"{task}_error": (given - true).abs()}
    batch |= measure(mask_logits, depth, *truth)
    return [{name: of[i].cpu() for name, of in batch.items()} for i in range(len(indices))]

def show_samples(ds: ZipDataset, indices: Sequence[int]) -> Figure:
    """A row a kind, a column a sample."""
    samples = [ds[i] for i in indices]
    rows = [[(sample, kind) for sample in samples] for kind in ds.kinds]
    return _draw(rows, [sample["name"] for sample in samples], [TITLES.get(kind, kind) for kind in ds.kinds])

def show_predictions(model: nn.Module, ds: ZipDataset, indices: Sequence[int],
                     precision: str = "auto") -> Figure:
    """A row a sample: the two inputs; for each task the truth, the prediction and the absolute error."""
    samples = _predictions(model, ds, indices, precision)
    kinds = ["bg", "fg_bg", "mask", "mask_predicted", "mask_error", "depth", "depth_predicted", "depth_error"]
    rows = [[(sample, kind) for kind in kinds if kind in sample] for sample in samples]
    return _draw(rows, labels=[ds.name(i) for i in indices])

def compare_predictions(models: dict[str, nn.Module], ds: ZipDataset, indices: Sequence[int],
                        kinds: Sequence[str] = KINDS[2:]) -> Figure:
    """A row a sample and kind: the picture, the truth, and the prediction of each network that has one."""
    found = zip(*(_predictions(model, ds, indices) for model in models.values()), strict=True)
    kinds, rows = [kind for kind in kinds if kind in ds.kinds], []
    for samples, kind in itertools.product(found, kinds):
        predicted = [(sample, f"{kind}_predicted") for sample in samples]
        rows.append([(samples[0], "fg_bg"), (samples[0], kind), *predicted])
    return _draw(rows, ["input", "truth", *models], kinds * len(indices))

def plot_history(runs: dict[str, Run | list], metrics: Sequence[str] = ("loss", "iou", "rmse")) -> Figure:
    """A panel a metric, a curve a run, over the epochs, on the validation samples; dashed: the loss in
    training. Of several seeds the curve is the mean, with a band from the least to the greatest."""
    size, colours = (4 * len(metrics), 3), plt.get_cmap("tab20" if len(runs) > 10 else "tab10")
    figure, axes = plt.subplots(1, len(metrics), figsize=size, layout="constrained", dpi=110, squeeze=False)
    for metric, axis in zip(metrics, axes[0], strict=True):
        for k, (label, seeds) in enumerate(runs.items()):
            table = pd.DataFrame([row for one in np.atleast_1d(seeds) for row in one.history])
            if f"valid_{metric}" not in table:  # of a run that is not trained for it
                continue
            by_epoch = table.groupby("epoch")
            valid = by_epoch[f"valid_{metric}"]
            axis.plot(valid.mean(), marker=".", label=label, color=colours(k))
            axis.fill_between(valid.min().index, valid.min(), valid.max(), color=colours(k), alpha=0.12)
            if metric == "loss":
                axis.plot(by_epoch["train_loss"].mean(), "--", color=colours(k), alpha=0.6)
        axis.set(title=TITLES.get(metric, metric), xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
    if len(runs) > 1:
        lines = {line.get_label(): line for axis in axes[0] for line in axis.get_legend_handles_labels()[0]}
        figure.legend(lines.values(), lines.keys(), loc="outside right upper")
    return figure

def results_table(results: dict[str, Results | list[Results]],
                  metrics: Sequence[str] = ("iou", "rmse", "delta1"),
                  cells: Sequence[str] = tuple(PART_COLOURS)) -> "pd.io.formats.style.Styler":
    """A table for a notebook: a row a run, a column for each test part and metric, the best of a column bold.
    It is given `Run.results`, what `score` gives, or a list, one a seed: then mean ± standard deviation."""
    texts, bold = {}, {}
    for cell, metric in itertools.product(cells, metrics):
        seeds = map(np.atleast_1d, results.values())
        values = [[one.get(cell, {}).get(metric, np.nan) for one in of] for of in seeds]
        means, column = pd.Series(map(np.mean, values)), (TITLES.get(cell, cell), TITLES.get(metric, metric))
        if means.notna().any():
            spread = [f" ± {np.std(of, ddof=1):.3f}" if len(of) > 1 else "" for of in values]
            texts[column] = [f"{mean:.3f}{more}" for mean, more in zip(means, spread, strict=True)]
            bold[column] = means == (means.min() if metric in LOWER_IS_BETTER else means.max())
    table = pd.DataFrame(texts, list(results)).replace(r"nan.*", "–", regex=True)
    weight = pd.DataFrame(np.where(pd.DataFrame(bold), "font-weight: bold", ""), table.index, table.columns)
    return table.style.apply(lambda _: weight, axis=None).set_uuid("")

def _save_images(folder: Path, state: dict, kept: nn.Module, ds: ZipDataset, parts, config, watch) -> None:
    """Saves a sheet of pictures, 8 bit as they are: a row for each of four training samples and four of the
    last part, which has least in common with them; in it bg, fg_bg, and of each task truth and prediction."""
    rows, last = [], [part for part, indices in parts.items() if len(indices)][-1]
    kinds = ["bg", "fg_bg", *(f"{task}{of}" for task in config.tasks for of in ("", "_predicted"))]
    for indices in (parts["train"], parts[last]):
        shown = indices[np.linspace(0, len(indices) - 1, 4).astype(int)]
        for sample in _predictions(kept, ds, shown, config.precision):
            rows.append(torch.cat([sample[kind].expand(3, -1, -1) for kind in kinds], 2))
    sheet = torch.cat(rows, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
    name = f"epoch_{len(state['history']):03}" + ("" if state["history"] else f"_step_{state['step']:03}")
    with _replacing(folder / "images" / name / "sheet.png") as part:
        Image.fromarray(sheet).save(part, "png")
    if watch:
        watch(state, sheet)

def explore(draw: Callable[..., object], **controls: object) -> None:
    """Shows in a notebook these ipywidgets and, below them, the figure that `draw` makes with pyplot of their
    values, anew when one changes. (Their `interact` can hold up notebooks that run without a browser.)"""
    import ipywidgets

    picture = ipywidgets.Image(format="png", layout={"max_width": "100%"})

    def update(_: object = None) -> None:
        draw(**{name: control.value for name, control in controls.items()})
        file = io.BytesIO()
        plt.savefig(file, bbox_inches="tight")
        plt.close()
        picture.value = file.getvalue()

    for name, control in controls.items():
        control.description = control.description or name
        control.observe(update, "value")
    update()
    display(ipywidgets.VBox([*controls.values(), picture]))

if __name__ == "__main__":  # accelerate launch helpers.py CONFIG.json: a saved Config on all GPUs
    run(Config.load(sys.argv[1]))
    if dist.is_initialized():
        dist.destroy_process_group()
