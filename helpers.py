"""What the notebooks share: the data in a zip, the networks, losses and metrics, runs that can be resumed, and pictures.

The order is that of the story. One network looks at two pictures, a background (`bg`) and the same scene with an object in
it (`fg_bg`), and predicts two: the object's `mask` and the scene's `depth`. Always in this order. Tensors are NCHW;
pictures are uint8 while they are stored and float in [0, 1] once they reach a network; a mask is 0 or 1; depth is in [0, 1]
and grows with distance.
"""

import array
import collections
import contextlib
import copy
import csv
import ctypes
import dataclasses
import errno
import functools
import hashlib
import html
import importlib.util
import io
import itertools
import json
import math
import mmap
import multiprocessing.util
import os
import pickle
import pickletools
import platform
import random
import re
import shutil
import signal
import stat
import struct
import sys
import tempfile
import threading
import time
import uuid
import warnings
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import BinaryIO, NamedTuple

import accelerate
import filelock
import matplotlib.pyplot as plt
import numpy as np
import PIL
import psutil
import simplejpeg
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from IPython import get_ipython
from IPython.display import HTML
from PIL import Image, ImageDraw, ImageOps
from pytorch_msssim import ssim as msssim_ssim
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor, resize, to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

torch.backends.cudnn.allow_tf32 = False  # float32 means float32 on a GPU too: TF32 moves SSIM by hundredths
torch.backends.cudnn.benchmark = True  # nearly all batches are alike: cuDNN tries its ways once and takes the fastest

# Training on a CPU at 192 pixels spends a fifth of its time on fresh pages: glibc gives large blocks back to the system at
# once and asks for them again in the next step. Told to keep them (mallopt's M_MMAP_MAX and M_TRIM_THRESHOLD), it does not.
with contextlib.suppress(AttributeError, OSError, TypeError):  # other C libraries
    glibc = ctypes.CDLL(None)
    glibc.mallopt(-4, 0)
    glibc.mallopt(-1, 2**31 - 1)

# A notebook starts several processes by forking. CUDA must not have been started before, so it is looked for without starting
# it; and the threads of OpenMP do not live on in a forked process, so that has one.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=functools.partial(torch.set_num_threads, 1))


def _give_back_memory() -> None:
    """Returns free memory to the system, where glibc would keep it: to open a zip, a million names take hundreds of MB."""
    with contextlib.suppress(AttributeError, NameError):  # other C libraries
        glibc.malloc_trim(0)


# ---------- Where it runs ---------------------------------------------------------------------------------------------

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SCALE = os.environ.get("SCALE") or ("full" if torch.cuda.is_available() else "quick")
if SCALE not in ("quick", "full"):
    raise ValueError(f"The environment variable SCALE is {SCALE!r}; it can be 'quick' or 'full'.")


def environment() -> str:
    """What this runs on, in a line: versions, device and scale."""
    gpus = torch.cuda.device_count()
    device = f"{gpus} GPUs" if gpus else f"CPU, {os.cpu_count()} cores"
    if gpus == 1:  # to ask several for their names would keep accelerate's launcher from starting a process for each
        device = torch.cuda.get_device_name()
    packages = f"torch {torch.__version__}, torchvision {torchvision.__version__}, numpy {np.__version__}"
    return f"Python {platform.python_version()}, {packages}; {device}; scale: {SCALE}"


ROOT = Path(__file__).resolve().parent
DRIVE = Path("/content/drive")


def in_colab() -> bool:
    """Whether this is a notebook in Google Colab. Kaggle sets Colab's variables too, so its own are looked for as well."""
    return "google.colab" in str(get_ipython()) and not any(name.startswith("KAGGLE") for name in os.environ)


@functools.cache
def _drive_folder() -> Path | None:
    """The project's folder on the user's Drive, or None where Drive cannot be had. Asks for consent once."""
    from google.colab import drive

    try:
        drive.mount(str(DRIVE))
    except Exception as error:  # refused consent raises a private class of Colab's
        print(f"Google Drive is not available ({error or type(error).__name__}): results stay on this machine and go with it.")
        return None
    folder = DRIVE / "MyDrive" / "mask-and-depth"
    with contextlib.suppress(OSError):  # a Drive that fails now may not fail when something is copied there
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def workspace() -> Path:
    """The folder for results, made if need be: the environment variable WORKSPACE (relative paths start at the project),
    else in Colab a folder on Drive (so that it outlives the machine; without consent a local one, and a line says so), else
    `runs/` beside helpers.py."""
    given = os.environ.get("WORKSPACE")
    folder = ROOT / Path(given).expanduser() if given else None
    if in_colab() and (folder is None or _on_drive(folder)):
        folder = _drive_folder() and (folder or _drive_folder())
    folder = folder or ROOT / "runs"
    if not _on_drive(folder):  # which may not answer; what is copied there makes its folder
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def data_zip(path: str | Path = "") -> Path:
    """The data set to use: `path` if given, else the environment variable DATA_ZIP, else the zip that notebook 00 made in
    the workspace, else the sample that comes with the project. A folder may stand for a zip, as in ZipDataset.

    A zip on Drive is copied to the machine's own disk first: Drive is slow where a file is read here and there.
    Raises FileNotFoundError where a path was given, or set in DATA_ZIP, and nothing is there.
    """
    given = str(path) or os.environ.get("DATA_ZIP", "")
    if given:
        given = Path(given).expanduser()
        if in_colab() and _on_drive(given.absolute()):
            _drive_folder()  # mounts Drive
        found = _found(given)
        if found is None:
            raise FileNotFoundError(f"{given}: there is no such file. Give the path of a data set zip, or none for the sample.")
    else:
        found, copies = work_folder() / "scenes.zip", _copies()
        if copies and not found.exists():
            found = workspace() / "scenes.zip"
        if not (copies.in_time(lambda moved: _is_there(found)) if copies else found.exists()):
            return ROOT / "assets" / "sample.zip"
    return _copy_from_drive(found) if _on_drive(found.resolve()) and not found.is_dir() else found


def _found(path: Path) -> Path | None:
    """What is at this path; from the project's folder, if nothing is from the current one: a notebook's kernel starts in
    notebooks/."""
    return next((place for place in (path, ROOT / path) if place.exists()), None)


def _copy_from_drive(path: Path) -> Path:
    """A copy of the file on the local disk, made with a progress bar and checked, unless there is one already. The file itself,
    and a line that says so, where the disk has too little room. Raises OSError where the copy is not what was read."""
    there, local = path.stat(), cache_folder() / path.name
    if local.exists() and (local.stat().st_size, int(local.stat().st_mtime)) == (there.st_size, int(there.st_mtime)):
        return local
    local.with_name(local.name + ".part").unlink(missing_ok=True)  # of a copy that was interrupted
    if there.st_size > _MAX_SHARE["disk"] * _free_disk(local):
        print(f"{path} is read from Drive, slowly: {there.st_size / 1e9:.1f} GB, too much for a copy on the local disk.")
        return path
    local.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(local) as part:
        about = {"desc": f"copying {path.name}", "unit": "B", "unit_scale": True, "leave": False, "file": sys.stdout}
        with open(path, "rb") as source, open(part, "wb") as copy, tqdm(total=there.st_size, **about) as bar:
            written = _transfer(source, copy, lambda: bar.update(copy.tell() - bar.n))
        with open(part, "rb") as copy:
            if hashlib.file_digest(copy, "blake2b").digest() != written or part.stat().st_size != there.st_size:
                raise OSError(f"{local} is not what Drive holds in {path}. Run this again to copy it anew.")
        os.utime(part, (there.st_atime, there.st_mtime))
    return local


def cache_folder() -> Path:
    """The folder on the local disk for what can be made again: copies of zips on Drive and decoded pictures. It is
    `mask-and-depth` in the user's cache folder (the environment variable XDG_CACHE_HOME, else ~/.cache), and may be deleted."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mask-and-depth"


def _processes_here() -> int:
    """How many processes of this machine train together."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size())) if dist.is_initialized() else 1


def _free_memory() -> int:
    """Bytes that are free in memory; in a container, of what it may have."""
    free = psutil.virtual_memory().available
    limit, used = (Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory.current"))
    if limit.exists() and (most := limit.read_text().strip()).isdigit():
        free = min(free, max(0, int(most) - int(used.read_text())))
    return free


def _free_disk(folder: Path) -> int:
    """Bytes that are free where the folder is, or will be."""
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free


@contextlib.contextmanager
def _replacing(path: Path, before: Path | None = None) -> Iterator[Path]:
    """Gives a name to write to, and puts the written file in place of `path` only once it is whole. The file that was there
    becomes `before`, if that is given."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        what = f"{path} could not be made ({_reason(error)}). Make room, or try again; what was there before is whole."
        raise OSError(what) from error
    if before is not None and path.exists():
        os.replace(path, before)
    os.replace(part, path)


# ---------- Where it runs: copies on Google Drive ------------------------------------------------------------------------


def _on_drive(path: Path) -> bool:
    return DRIVE in path.parents


def work_folder() -> Path:
    """The folder on the local disk where results are made, in the places that they have in the workspace. It is the workspace
    itself, or, where that is on Google Drive, `runs/` beside helpers.py; `keep` then has copies made on Drive."""
    folder = workspace()
    if _on_drive(folder):
        folder = ROOT / "runs"
        folder.mkdir(exist_ok=True)
    return folder


def keep(path: str | Path) -> None:
    """Has a file or folder of the work folder copied to the workspace, where that is on Drive: in the background, checked, and
    as often as it takes. A line says when Drive begins to fail and when it answers again. Returns at once."""
    if copies := _copies():
        copies.put(Path(path).relative_to(copies.local).as_posix())


def fetch(name: str | Path) -> Path:
    """The place of a file or folder in the work folder, brought from Drive where it is there alone. Where it is nowhere,
    nothing is at that place. Raises OSError where Drive does not answer."""
    path = work_folder() / name
    if (copies := _copies()) and not path.exists():
        copies.bring(Path(name).as_posix())
    return path


def drive_report(patience: float = 600) -> str:
    """What is on Drive and what is not, for the end of a notebook. Waits for the copies under way; where Drive fails, at most
    `patience` seconds."""
    if copies := _copies():
        copies.wait(patience)
        return copies.report()
    if in_colab():
        return f"Nothing is on Google Drive: what was made is in {work_folder()} and goes with this machine. Download it."
    return "Not in Colab: what was made is in the workspace and stays there."


@functools.lru_cache(maxsize=1)
def _copies_of(local: Path, drive: Path, process: int) -> "_Copies":
    return _Copies(local, drive)


def _copies() -> "_Copies | None":
    """What copies results to Drive, or None where the workspace is not there. A forked process has its own: threads do not live
    on in it."""
    return _copies_of(work_folder(), workspace(), os.getpid()) if _on_drive(workspace()) else None


_PATIENCE, _RETRY, _BEAT = 120.0, 30.0, 60.0  # seconds: until Drive counts as hung, between tries, between signs of life
_NOTE = "in_use.json"  # the sign of life in a run's folder on Drive
_HUNG = "it does not answer"
_FURTHER = "Drive holds the same run, and it is further there"
# Of a run, opened in this order before anything is copied, and copied in the reverse order after all else: however that is cut
# off, Drive's checkpoint has its pictures there, the table is not ahead of the checkpoint, and results come with all the rest.
_LAST = ("results.json", "metrics.csv", "timing.csv", "checkpoint.pt")


class _Copies:
    """Copies on Drive of what is made on the local disk. Threads make them, so that work never waits for Drive, which may fail,
    hang, vanish and come back.

    What is there is never replaced by less: a run that is further on Drive, of another Config, or in another machine's hands is
    left alone there.
    """

    def __init__(self, local: Path, drive: Path):
        self.local, self.drive = local, drive
        self.top = DRIVE / drive.relative_to(DRIVE).parts[0]  # there as long as Drive is mounted
        self.wanted: dict[str, int] = {}  # names in both folders that are to be copied; how often that was asked
        self.copied: dict[str, tuple | None] = {}  # file on Drive -> stamp of the local one; None: to be looked at again
        self.refused: dict[str, str] = {}  # runs that are not copied, and why
        self._told: dict[str, str] = {}  # what has been printed of that
        self.trouble, self._said = "", ""
        self._running: set[str] = set()
        self._signed: dict[str, float] = {}  # runs that have this machine's note, and when it was written
        self._ours: set[str] = set()  # runs of which Drive holds nothing further, unless another machine was at them since
        machine = local / ".machine"
        if not machine.exists():
            machine.write_text(uuid.uuid4().hex)
        self._machine = machine.read_text()
        self._wake = threading.Condition()
        threading.Thread(target=self._work, daemon=True).start()
        # A process that ends with its run waits for the copies, also where it was forked, which atexit does not know.
        multiprocessing.util.Finalize(None, self.wait, args=(_PATIENCE,), exitpriority=0)

    # ----- asked for by the notebook

    def put(self, name: str) -> None:
        with self._wake:
            self.wanted[name] = self.wanted.get(name, 0) + 1
            self._wake.notify()
        self.say()

    def begin(self, name: str) -> None:
        """Before a run: brings it from Drive where it is further there. Raises RuntimeError where another machine is at it."""
        until = time.monotonic() + (0 if self.trouble else _PATIENCE)
        while self.trouble != _HUNG:
            try:
                self._wait_for_others(name)
                if self.in_time(self._compare, name) == _FURTHER:
                    self.bring(name)
                    self._ours.add(name)
                break
            except OSError as error:
                self.trouble = _reason(error)
            self.say()
            if (self.local / name).exists() or time.monotonic() > until:
                break
            time.sleep(_RETRY)  # rather than train anew what Drive may hold
        if name in self._ours:  # before the threads come to it, lest another machine begins too
            with contextlib.suppress(OSError):
                self.in_time(self._sign, name)
        with self._wake:
            self._running.add(name)
        self.put(name)

    def end(self, name: str) -> None:
        with self._wake:
            self._running.discard(name)
        self.put(name)

    def say(self) -> None:
        """Prints a line when Drive begins to fail, when it answers again, and for a run that is not copied."""
        trouble = self.trouble
        if trouble and not self._said:
            tqdm.write(f"Google Drive fails ({trouble}). Work goes on; what is missing there is copied once it answers.")
        elif self._said and not trouble:
            tqdm.write("Google Drive answers again.")
        self._said = trouble
        for name, why in self.refused.copy().items():
            if self._told.get(name) != why:
                tqdm.write(f"{name} is not copied to Google Drive: {why}.")
                self._told[name] = why

    def wait(self, patience: float) -> None:
        """Until all is copied; where Drive fails, at most so many seconds."""
        until = time.monotonic() + patience
        while self.wanted and time.monotonic() < until:
            time.sleep(0.1)
            self.say()
            if not self.trouble:
                until = time.monotonic() + patience
        self.say()

    def report(self) -> str:
        """What is on Drive and what is not."""
        there = sum(stamp is not None for stamp in self.copied.copy().values())
        sentences = [f"On Google Drive, in {self.drive}: {there:,} file{'s' * (there != 1)}, read back and compared."]
        sentences += [f"Not there: {name}, as {why}. It is in {self.local}." for name, why in self.refused.copy().items()]
        if self.wanted:
            missing, why = ", ".join(self.wanted), self.trouble or "there was no time yet"
            sentences.append(f"Not there, or not as it is here: {missing} ({why}). It is in {self.local}; download it.")
        sentences.append("Drive uploads in its own time: leave this machine running for some minutes.")
        return "\n".join(sentences)

    def bring(self, name: str) -> None:
        """Puts a file or folder of Drive in the place of the local one, once all of it is here. Raises OSError."""
        with tempfile.TemporaryDirectory(dir=self.local, prefix=".", ignore_cleanup_errors=True) as folder:
            got, target = Path(folder) / "got", self.local / name
            self.in_time(self._download, name, got)
            if got.exists():
                shutil.rmtree(target, ignore_errors=True)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(got, target)

    def discard(self, name: str) -> None:
        """Deletes a folder on Drive. Raises OSError."""
        there = self.drive / name
        self.in_time(lambda moved: shutil.rmtree(there) if _is_there(there) else None)
        for file in [file for file in self.copied if file.startswith(f"{name}/")]:
            del self.copied[file]

    def in_time(self, function: Callable, *values: object, patience: float | None = None) -> object:
        """function(moved, *values), in a thread. When that has not called moved() for too long it is left behind: this raises
        TimeoutError, and so does moved(), should the thread go on after all. Whatever else fails is an OSError."""
        outcome, moved_at, left = Future(), time.monotonic(), threading.Event()

        def moved() -> None:
            nonlocal moved_at
            if left.is_set():
                raise TimeoutError
            moved_at = time.monotonic()

        def work() -> None:
            try:
                if not _is_there(self.top):  # to write there would fill the folder that Drive is mounted on
                    raise OSError(errno.ENOTCONN, "it is not mounted")
                outcome.set_result(function(moved, *values))
            except Exception as error:
                known = isinstance(error, OSError)
                outcome.set_exception(error if known else OSError(f"{type(error).__name__}: {error}"))

        threading.Thread(target=work, daemon=True).start()
        try:
            while time.monotonic() - moved_at < (patience or _PATIENCE):
                if wait([outcome], timeout=min(1.0, _PATIENCE)).done:
                    return outcome.result()
        finally:
            left.set()
        raise TimeoutError(_HUNG)

    def _download(self, moved: Callable[[], None], name: str, target: Path) -> None:
        """Copies a file or folder of Drive, if it is there; pictures, packed there, are a folder again."""
        source = self.drive / name
        if not _is_there(source):
            return
        walk = os.walk(source, onerror=_raise)
        files = [source] if source.is_file() else [Path(folder, file) for folder, _, names in walk for file in names]
        for file in files:
            if file.name == _NOTE or file.suffix == ".part":
                continue
            place = target / file.relative_to(source)  # of a file alone it is the target
            place.parent.mkdir(parents=True, exist_ok=True)
            if re.fullmatch(r"epoch_\d+\.zip", file.name):
                place = place.with_suffix("")
                place.mkdir()
                with zipfile.ZipFile(io.BytesIO(file.read_bytes())) as packed:
                    for name in packed.namelist():  # of a path that leads elsewhere, its last part
                        (place / Path(name).name).write_bytes(packed.read(name))
            else:
                with open(file, "rb") as there, open(place, "wb") as here:
                    _transfer(there, here, moved)
            os.utime(place, ns=(file.stat().st_mtime_ns,) * 2)  # by which it is known not to be copied back
            moved()

    def _wait_for_others(self, name: str) -> None:
        """Raises RuntimeError where another machine that was at the run a moment ago gives a sign of life."""
        if not (note := self.in_time(self._others_note, name)):
            return
        print(f"{name}: another machine was at this run a moment ago. Waits up to {2.5 * _BEAT:.0f} seconds for a sign of it.")
        until = time.monotonic() + 2.5 * _BEAT
        while time.monotonic() < until and (now := self.in_time(self._others_note, name)):
            if now != note:
                raise RuntimeError(f"Another machine is at the run {name!r}. Wait for it, or take another name.")
            time.sleep(min(5.0, _BEAT / 4))

    # ----- done by the threads

    def _work(self) -> None:
        """Copies what is wanted, and looks after the runs under way at every beat. It never waits for Drive itself."""
        hung = 0  # tries in a row; each leaves a thread behind, so they become rarer
        while True:
            with self._wake:
                if not self.wanted:
                    self._wake.wait(_BEAT)
                asked = self.wanted.copy()
                names = [*asked, *sorted(self._running - asked.keys())]
            trouble = ""
            for name in names:
                try:
                    self.in_time(self._copy_all, name, patience=_PATIENCE * 2**hung)
                except Exception as error:  # whatever it is; and the next name may do better
                    self.trouble = trouble = _reason(error)
                    if isinstance(error, TimeoutError):
                        hung += 1
                        break
                    continue
                with self._wake:
                    if self.wanted.get(name) == asked.get(name):
                        self.wanted.pop(name, None)
            with self._wake:
                self.trouble = trouble
                if trouble:
                    self.copied = dict.fromkeys(self.copied)  # Drive may have lost what it had not uploaded
                    self._wake.wait(_RETRY)
                else:
                    hung = 0

    def _copy_all(self, moved: Callable[[], None], name: str) -> None:
        """Makes a file or folder on Drive as it is here."""

        def alive() -> None:
            moved()
            for run, at in self._signed.copy().items():  # a long copy must not make this machine look dead
                if time.monotonic() - at > _BEAT:
                    self._sign(moved, run)

        if (self.local / name / "config.json").exists():
            why_not = "another machine is at it" if self._others_note(moved, name) else ""
            if why_not := why_not or (name not in self._ours and self._compare(moved, name)):
                self.refused[name] = why_not
                self._signed.pop(name, None)
                return
            self.refused.pop(name, None)
            if name in self._running:
                self._sign(moved, name)
        with contextlib.ExitStack() as stack:
            opened = {}
            for last in _LAST:
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    opened[f"{name}/{last}"] = stack.enter_context(open(self.local / name / last, "rb"))
            files = self._files(name)
            first = [file for file in sorted(files) if file.removeprefix(f"{name}/") not in _LAST]
            for file in [*first, *reversed(opened)]:
                try:
                    stamp = _stamp(opened[file].fileno() if file in opened else files[file])
                    if (self.copied.get(file) or _stamp_there(self.drive / file, stamp)) == stamp:
                        self.copied[file] = stamp
                        continue
                    source = opened.get(file) or _open(files[file])
                except FileNotFoundError:  # replaced or removed meanwhile; then it has been asked for again
                    continue
                with source:
                    self._make((self.drive / file).parent)
                    _copy(source, self.drive / file, stamp[0], alive)
                alive()
                self.copied[file] = stamp
        there = self.drive / name
        if f"{name}/results.json" in opened:  # run_all has deleted what a finished run can do without
            for file in (there / "checkpoint.pt", *there.glob("images/epoch_*.zip")):
                if (gone := file.relative_to(self.drive).as_posix()) not in files:
                    file.unlink(missing_ok=True)
                    self.copied.pop(gone, None)
        if name in self._signed and name not in self._running:
            (there / _NOTE).unlink(missing_ok=True)
            del self._signed[name]
            with contextlib.suppress(OSError):  # of a run that was refused, nothing else is there
                there.rmdir()

    def _files(self, name: str) -> dict[str, Path]:
        """What is to be on Drive of a file or folder: name there -> file here. The pictures of an epoch go as one zip: Drive
        fails with many small files. A checkpoint's predecessor stays here; the one on Drive has been compared."""
        path = self.local / name
        if path.is_file():
            return {name: path}
        files = {}
        for folder, folders, names in os.walk(path):
            packed = [each for each in folders if re.fullmatch(r"epoch_\d+", each)]
            folders[:] = [each for each in folders if each not in packed and not each.endswith(".part")]
            names = [each for each in names if not each.endswith((".part", ".lock")) and each != "checkpoint_before.pt"]
            for each, ending in [(each, ".zip") for each in packed] + [(each, "") for each in names]:
                file = Path(folder, each)
                files[file.relative_to(self.local).as_posix() + ending] = file
        return files

    def _make(self, folder: Path) -> None:
        """Makes a folder, but nothing above Drive's own: where that is missing, Drive has vanished."""
        parts = folder.relative_to(self.top).parts
        for depth in range(len(parts)):
            self.top.joinpath(*parts[: depth + 1]).mkdir(exist_ok=True)

    # ----- runs on Drive

    def _compare(self, moved: Callable[[], None], name: str) -> str:
        """Why the run here is not to take the place of the one on Drive. Empty where it is; then the run is ours."""
        here, there = _progress(self.local / name), _progress(self.drive / name)
        if here and there and here[1] != there[1]:
            return "Drive holds a run of that name with another Config"
        if there and (not here or there[0] > here[0]):
            return _FURTHER
        if there and there[0] == here[0] and not here[0][0] and self._further_within(moved, name):
            return _FURTHER
        self._ours.add(name)
        return ""

    def _further_within(self, moved: Callable[[], None], name: str) -> bool:
        """Whether the unfinished run on Drive is further than the one here, though both are in the same epoch."""
        here, there = (folder / name / "checkpoint.pt" for folder in (self.local, self.drive))
        if here.exists() and _stamp_there(there, _stamp(here)):
            return False
        with tempfile.TemporaryDirectory(dir=self.local, prefix=".", ignore_cleanup_errors=True) as folder:
            self._download(moved, f"{name}/checkpoint.pt", Path(folder) / "checkpoint.pt")
            return _batches(Path(folder)) > _batches(here.parent)

    def _others_note(self, moved: Callable[[], None], name: str) -> dict:
        """What another machine that was at a run a moment ago has left there: who it is, and when it was."""
        note = {}
        with contextlib.suppress(FileNotFoundError, ValueError):
            note = json.loads((self.drive / name / _NOTE).read_text())
        if note.get("machine") == self._machine:
            return {}
        self._ours.discard(name)
        return note if note and note["time"] + 2.5 * _BEAT > time.time() else {}

    def _sign(self, moved: Callable[[], None], name: str) -> None:
        """Tells other machines that this one is at the run."""
        note = self.drive / name / _NOTE
        self._make(note.parent)
        part = note.with_name(f"{_NOTE}.{self._machine[:8]}.part")
        part.write_text(json.dumps({"machine": self._machine, "time": time.time()}))
        os.replace(part, note)
        self._signed[name] = time.monotonic()


def _raise(error: OSError) -> None:
    raise error


def _is_there(path: Path) -> bool:
    """Whether there is such a file or folder. Raises OSError where Drive fails; Path.exists may say no then."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _stamp(file: Path | int) -> tuple[int, int]:
    """When a file was written, in ns, and its size; of a folder, which is packed on Drive, 0."""
    about = os.stat(file)
    return about.st_mtime_ns, 0 if stat.S_ISDIR(about.st_mode) else about.st_size


def _stamp_there(file: Path, stamp: tuple[int, int]) -> tuple[int, int] | None:
    """The stamp, if the file on Drive has it: then an earlier process has copied it. Drive counts milliseconds."""
    try:
        time_ns, size = _stamp(file)
    except FileNotFoundError:
        return None
    return stamp if abs(time_ns - stamp[0]) < 10**7 and stamp[1] in (0, size) else None


def _progress(folder: Path) -> tuple[tuple, dict] | None:
    """How far a run in a folder is, and its settings. None where there is no run. Raises OSError where Drive fails."""
    if (settings := _settings(folder)) is None:
        return None
    table = folder / "metrics.csv"
    rows = len(table.read_text().splitlines()[1:]) if _is_there(table) else 0
    return (_is_there(folder / "results.json"), rows), settings


def _batches(folder: Path) -> int:
    """How many batches of its epoch a run's checkpoint has done; -1 where there is none that is sound."""
    try:
        return (_load_state(folder / "checkpoint.pt").get("within") or {"done": 0})["done"]
    except (FileNotFoundError, ValueError):
        return -1


def _transfer(source: BinaryIO, target: BinaryIO | None, moved: Callable[[], None]) -> bytes:
    """Reads all of a file, writes it to another if there is one, and gives its digest."""
    digest = hashlib.blake2b()
    while block := source.read(2**22):
        if target:
            target.write(block)
        digest.update(block)
        moved()
    return digest.digest()


def _copy(source: BinaryIO, target: Path, time_ns: int, moved: Callable[[], None]) -> None:
    """Writes a file on Drive, reads it back, and only then puts it in its place. Raises OSError."""
    for part in target.parent.glob(f"{target.name}.*.part"):  # of a copy that was cut off, or still hangs
        part.unlink(missing_ok=True)
    part = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with open(part, "wb") as copy:
            written = _transfer(source, copy, moved)
            copy.flush()
            os.fsync(copy.fileno())
        with open(part, "rb") as copy:
            if _transfer(copy, None, moved) != written:
                raise OSError(errno.EIO, "what was written reads otherwise")
        os.utime(part, ns=(time_ns, time_ns))
        moved()
        os.replace(part, target)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def _open(path: Path) -> BinaryIO:
    """A file, to be read; of a folder, a zip of its files."""
    if not path.is_dir():
        return open(path, "rb")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for file in sorted(path.iterdir()):
            archive.write(file, file.name)
    packed.seek(0)
    return packed


# ---------- Data: a zip in memory -------------------------------------------------------------------------------------

KINDS = ("bg", "fg_bg", "mask", "depth")
CHANNELS = {"bg": 3, "fg_bg": 3, "mask": 1, "depth": 1}

# How the published data sets name their pictures, in the order of KINDS, # being a number; a leading folder may wrap it all,
# and .jpg, .jpeg or .png follows. What the numbers stand for is in `_ids`. In roshantac a table says what belongs together.
LAYOUTS = {
    "raguram": ("bg_images/Image_#", "fg_bg/Image_#_#_#", "fg_bg_mask/Image_#_#_#", "fg_bg_depth/Image_#_#_#"),
    "mpaditya": ("bg_192/bg192_#", "fg_bg/bg192_#_fg#", "mask/bg192_#_fg#", "fg_bg_depth_full/bg192_#_fg#"),
    "deepjyoti": ("bg/bg_#", "image/fg_bg_#", "mask/fg_bg_mask_#", "depthmap/depth_#"),
    "roshantac": ("label_data.csv",),
    "modest": ("bg/bg#", "bg_fg/bg#_fg#_#", "bg_fg_mask/bg#_fg#_#_mask", "bg_fg_depth_map/bg#_fg#_#_depth_map"),
    "akshat": ("bg/bg_#", "fg_bg/bg_#/img_#", "fg_bg_mask/bg_#/img_#", "fg_bg_depth/bg_#/img_#"),
}
TABLE = LAYOUTS["roshantac"]


def _pattern(name: str) -> re.Pattern:
    """The regular expression that a whole path of this name in LAYOUTS matches."""
    extension = "" if name in TABLE else r"\.(?:jpe?g|png)"
    return re.compile(rf"(?:.*/)?{re.escape(name)}{extension}".replace(r"\#", r"(\d+)"), re.IGNORECASE)


CACHES = ("gpu", "memory", "disk", "none")  # where decoded pictures are kept, the fastest first
_MAX_SHARE = {"gpu": 0.6, "memory": 0.75, "disk": 0.75}  # of what is free there; training needs some too
_MAX_FILE, _MAX_PIXELS = 2**27, 2**26  # bytes and pixels: a file that claims more is a mistake or a trap
_MAX_SCANS = 100  # of a progressive JPEG; ten are usual
_CHUNK = 2**26  # bytes of pictures that a thread holds at full size
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")


class ZipDataset(torch.utils.data.Dataset):
    """The samples of a data set zip, read from it and never unpacked to disk. Or of a folder that holds the same files
    unpacked, or in several zips (a zip's name then stands for a folder around its files).

    The zip's directory becomes one array. Every picture is decoded when it is first asked for, by as many threads as torch
    uses, and kept as uint8 at the working size, so that later epochs only index tensors.

    `ds[i]` is a dict: `bg` and `fg_bg` (3, size, size), `mask` and `depth` (1, size, size), float32 in [0, 1], and `name`.
    `ds.bg_id` and `ds.fg_id` are int arrays with one entry a sample; -1 is unknown. A mirrored object has the object's id.
    `ds.cache` is the place where decoded pictures are kept, `ds.place` says so in a sentence. `ds.left_out` is a dict
    {file name: what is wrong with it}.

    Args:
        path: the zip, or the folder.
        size: pictures are resized to size x size pixels, with antialiasing; masks by area, then cut at one half.
        layout: a name in LAYOUTS; None recognises the layout from the file names.
        depth_near: whether near is "dark" or "bright" in the zip's depth pictures; "bright" is turned round.
        cache: where decoded pictures are kept: on the "gpu", in "memory", in a file on the local "disk" that is found again
            the next time, or nowhere ("none": only the backgrounds, which many samples share). "auto" is the first of these
            that has room. Where one is asked for that has too little, the next that has enough is taken.
        defects: what to do about files that are damaged, missing or not what they should be: "stop" at the first, or look
            for all of them first, as `check` does, and "leave_out" the samples that need them, saying which.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: not a zip, empty, of unknown layout, or a sample lacks its background, mask or depth. While samples are
            read: a picture that cannot be decoded. The message names the file. With "leave_out": no sample is left.
    """

    def __init__(
        self,
        path: str | Path,
        size: int = 64,
        layout: str | None = None,
        depth_near: str = "dark",
        cache: str = "auto",
        defects: str = "stop",
    ):
        if depth_near not in ("dark", "bright"):
            raise ValueError(f"depth_near is {depth_near!r}; it can be 'dark' or 'bright'.")
        if size < 1:
            raise ValueError(f"size is {size}; a picture needs at least one pixel.")
        _known(cache, ("auto", *CACHES), "cache")
        _known(defects, ("stop", "leave_out"), "choice of defects")
        self.size, self.depth_near, self._wanted = size, depth_near, cache
        found = _Defects(Path(path), collect=defects == "leave_out")
        names, rows = self._find(layout, found)
        if unused := _unused(names, rows):
            warnings.warn(f"{path}: {len(unused)} pictures belong to no sample, {unused[0]} the first of them.", stacklevel=2)
        if defects == "leave_out":
            self._scan(names, rows, found)
            rows = self._leave_out(rows, found)
        self.left_out = dict(found)
        del names, unused
        _give_back_memory()  # before free memory is measured
        self._choose(rows)
        del rows
        _give_back_memory()

    def _find(self, layout: str | None, defects: "_Defects") -> tuple[list[str], np.ndarray]:
        """The names of the files, and which of them make a sample: rows (samples, 4), -1 where there is none. And whose the
        samples are: the ids of backgrounds and objects."""
        if layout is not None:
            _known(layout, LAYOUTS, "layout")
        self.path = path = defects.path
        self._root = path.absolute()  # the working directory may change
        self._zips, self._files, self._loose, names, self.fingerprint = _read_directory(path, defects)
        self.layout = layout or _recognise_layout(path, names)
        if LAYOUTS[self.layout] == TABLE:
            table = next((i for i, name in enumerate(names) if _pattern(*TABLE).fullmatch(name)), None)
            if table is None:
                raise ValueError(f"{path} holds no label_data.csv, which the layout {self.layout} needs.")
            rows, bg_id, fg_id = _match_table(names[table], names, bytes(self._read(table)), defects)
        else:
            rows, bg_id, fg_id = _match_names(names, self.layout, defects)
        self.bg_id, self.fg_id = (ids.astype(np.int32 if ids.max() < 2**31 else np.int64) for ids in (bg_id, fg_id))
        return names, rows

    def _scan(self, names: Sequence[str], rows: np.ndarray, defects: "_Defects") -> tuple[dict[str, collections.Counter], int]:
        """Reads every file, and decodes whole those of samples, to collect defects. Gives the sizes of each kind's pictures
        and the number of masks that show no object."""
        kinds = np.full(len(names), None)
        for kind, column in zip(KINDS, rows.T, strict=True):
            kinds[column[column >= 0]] = kind
        sizes, empty = {kind: collections.Counter() for kind in KINDS}, 0
        todo = np.array([file for file in range(len(names)) if file not in defects.files], int)
        with tqdm(total=len(todo), desc=f"checking {self._root.name}", unit=" files", leave=False, file=sys.stdout) as bar:
            shares = np.array_split(todo, -(-len(todo) // 64) or 1)
            for found in _decoders(os.getpid(), _decoding_threads()).map(functools.partial(self._inspect, kinds), shares):
                for file, wrong, shape, shows in found:
                    if wrong:
                        defects.add(names[file], wrong, file)
                    elif kinds[file]:
                        sizes[kinds[file]][shape] += 1
                        empty += not shows
                bar.update(len(found))
        return sizes, empty

    def _inspect(self, kinds: np.ndarray, files: np.ndarray) -> list[tuple[int, str, tuple[int, ...], bool]]:
        """Each file, what is wrong with it, the picture's shape, and whether a mask shows an object."""
        found = []
        for file in files.tolist():
            wrong, shape, shows = "", (), True
            try:
                if kind := kinds[file]:
                    opened, shape, _ = self._open(kind, file, whole=True)
                    room = np.empty((*shape, CHANNELS[kind]), np.uint8)
                    self._decode(kind, file, opened, room, whole=True)
                    shows = kind != "mask" or room.max() > 127
                else:
                    self._read(file)
            except ValueError as error:
                if isinstance(error.__cause__, MemoryError) or getattr(error.__cause__, "errno", None):
                    raise  # which says nothing of what is in the file
                wrong = str(error).removeprefix(f"{self.path}: {self._name(file)} ")
            found.append((file, wrong, shape, shows))
        return found

    def _leave_out(self, rows: np.ndarray, defects: "_Defects") -> np.ndarray:
        """The rows of which every file is there and sound."""
        kept = ~((rows < 0) | np.isin(rows, list(defects.files))).any(1)
        if not kept.any():
            first = " ".join(next(iter(defects.items())))
            raise ValueError(f"{self.path}: none of {len(rows):,} samples is without defects; {first}")
        if defects:
            print(f"{self._root.name}: {(~kept).sum():,} of {len(rows):,} samples left out because of {_some(defects)}.")
        if not kept.all():  # the content is the same, the samples are not
            without = f"{self.fingerprint} without {np.flatnonzero(~kept).tolist()}"
            self.fingerprint = hashlib.blake2b(without.encode(), digest_size=8).hexdigest()
        self.bg_id, self.fg_id = self.bg_id[kept], self.fg_id[kept]
        return rows[kept]

    def _choose(self, rows: np.ndarray) -> None:
        """Makes these the samples, rows (samples, 4) of the bg, fg_bg, mask and depth files."""
        self._file, self._slot = {}, {}
        for kind, column in zip(KINDS, rows.T.astype(np.int32), strict=True):
            self._file[kind], slots = np.unique(column, return_inverse=True)
            self._slot[kind] = slots.astype(np.int32)
        self._cache = None
        if not torch.cuda.is_available():  # at once, for worker processes to share it; on a GPU when first used
            self._plan_cache()

    def subset(self, n: int, seed: int = 0) -> "ZipDataset":
        """The data set cut to n samples, spread evenly over the backgrounds and, on each, over the objects (report 4 took
        20,000 of 400,000). A seed gives the same choice every time. Raises ValueError for n below 1 or above len(self)."""
        if not 1 <= n <= len(self):
            raise ValueError(f"subset of {n} samples: {self.path} has {len(self)}. Take 1 to {len(self)}.")
        rng = np.random.default_rng(seed)
        left = {b: collections.defaultdict(list) for b in rng.permutation(np.unique(self.bg_id)).tolist()}
        for i in rng.permutation(len(self)).tolist():
            left[int(self.bg_id[i])][int(self.fg_id[i])].append(i)
        on_background, overall, taken = collections.Counter(), collections.Counter(), []
        while len(taken) < n:
            for b, samples in left.items():
                if samples and len(taken) < n:
                    # The object that this background has had least, and of those the one that is rarest so far.
                    f = min(samples, key=lambda f: (on_background[b, f], overall[f]))
                    on_background[b, f] += 1
                    overall[f] += 1
                    taken.append(samples[f].pop())
                    if not samples[f]:
                        del samples[f]
        taken = np.sort(taken)
        part = copy.copy(self)
        part.bg_id, part.fg_id = self.bg_id[taken], self.fg_id[taken]
        part._choose(np.stack([self._file[kind][self._slot[kind][taken]] for kind in KINDS], 1))
        return part

    def __len__(self) -> int:
        return len(self.bg_id)

    def __getitem__(self, i: int) -> dict[str, Tensor | str]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        batch = to_float(self.batch([i]))
        return {kind: batch[kind][0] for kind in KINDS} | {"name": self.name(i)}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_cache": None}  # a process that receives a copy decodes on its own: pictures are not sent

    def name(self, i: int) -> str:
        """The sample's name: that of its fg_bg file within the folder of its kind, without extension."""
        levels = 1 if LAYOUTS[self.layout] == TABLE else LAYOUTS[self.layout][1].count("/")
        path = self._name(self._file["fg_bg"][self._slot["fg_bg"][i]])
        return "_".join(path.rpartition(".")[0].split("/")[-levels:])

    def batch(self, indices: Sequence[int], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The samples as uint8 tensors (len(indices), channels, size, size) on the device, in the memory order that suits
        convolutions; mask is 0 or 1, depth 255 is far."""
        indices, device, batch = np.asarray(indices), torch.device(device), {}
        for kind in KINDS:
            pictures = self._pictures(kind, indices)
            to_gpu = device.type == "cuda"
            if to_gpu and pictures.device.type == "cpu":
                pictures = pictures.pin_memory()  # from pinned memory the copy is queued without waiting for it
            batch[kind] = pictures.to(device, non_blocking=to_gpu).permute(0, 3, 1, 2)
        return batch

    def _pictures(self, kind: str, indices: np.ndarray) -> Tensor:
        """(len(indices), size, size, channels), from the cache as far as it goes."""
        slots, cache = self._slot[kind][indices], self._plan_cache().open()
        if kind not in cache.pictures:
            unique, order = np.unique(slots, return_inverse=True)
            if len(unique) == len(slots):
                return self._decode_all(kind, self._file[kind][slots])
            return self._decode_all(kind, self._file[kind][unique]).index_select(0, torch.from_numpy(order))
        pictures, ready = cache.pictures[kind], cache.ready[kind]
        missing = np.unique(slots[~ready[slots]])
        if len(missing):
            decoded = self._decode_all(kind, self._file[kind][missing])
            if pictures.device.type == "cpu":
                pictures.numpy()[missing] = decoded.numpy()
            else:
                pictures.index_copy_(0, torch.from_numpy(missing).long().to(pictures.device), decoded.to(pictures.device))
            ready[missing] = True
        if pictures.device.type == "cpu":  # by numpy: after a parallel step, torch's threads would spin beside the decoders
            return torch.from_numpy(pictures.numpy()[slots])
        return pictures.index_select(0, torch.from_numpy(slots).to(pictures.device, non_blocking=True))

    def _plan_cache(self) -> "_Cache":
        in_worker = torch.utils.data.get_worker_info() is not None  # which cannot use the GPU
        if self._cache is None or (in_worker and self._cache.place == "gpu"):
            content = hashlib.blake2b(self.fingerprint.encode(), digest_size=8)
            for kind in KINDS:
                content.update(self._file[kind].tobytes())
            if not self._zips:  # files of the same size may differ; these are the times when they were written
                content.update(self._files["offset"].tobytes())
            # What a worker process keeps for itself, the others would decode and keep once more.
            wanted = "none" if in_worker and self._wanted != "disk" else self._wanted
            versions = f"simplejpeg {simplejpeg.__version__} Pillow {PIL.__version__} torch {torch.__version__}"
            key = f"{content.hexdigest()} {self.size} {self.depth_near} {versions}"
            self._cache = _Cache(wanted, {kind: len(self._file[kind]) for kind in KINDS}, self.size, key)
        return self._cache

    @property
    def cache(self) -> str:
        """Where decoded pictures are kept: "gpu", "memory", "disk" or "none"."""
        return self._plan_cache().open().place

    @property
    def place(self) -> str:
        """A sentence on where decoded pictures are kept and why."""
        return self._plan_cache().open().sentence()

    def _name(self, file: int) -> str:
        archive, header, _ = self._files[file].item()
        if archive < 0:
            return _printable(self._loose[header])
        source = self._zips[archive]
        try:
            return _folder_of(source.path, self._root) + _entry_name(_read_header(source, header))
        except (OSError, struct.error) as error:
            what = f"{source.path.name} cannot be read any more ({_reason(error)})"
            raise ValueError(f"{self.path}: {what}. Copy it anew.") from error

    def _read(self, file: int) -> memoryview | bytes:
        archive, header, offset = self._files[file].item()
        try:
            if archive < 0:
                source = _File(self._root / self._loose[header])
                return source.read(0, _bounded(source.size))
            return _read_entry(self._zips[archive], header, offset)
        except (OSError, zlib.error, struct.error) as error:
            how = "cannot be read" if isinstance(error, OSError) else "is damaged"
            raise ValueError(f"{self.path}: {self._name(file)} {how} ({_reason(error)}). Copy it anew.") from error

    def _decode_all(self, kind: str, files: np.ndarray) -> Tensor:
        """The pictures of these files, (len(files), size, size, channels)."""
        # Decoders let other threads run. Each has a share, since to hand over picture by picture costs as much as it brings.
        threads = _decoding_threads()
        parts = np.array_split(files, max(1, min(threads, len(files))))
        if len(parts) < 2:
            return self._decode_share(kind, files)
        shares = _decoders(os.getpid(), threads).map(functools.partial(self._decode_share, kind), parts)
        return torch.from_numpy(np.concatenate([share.numpy() for share in shares]))

    def _decode_share(self, kind: str, files: np.ndarray) -> Tensor:
        result = torch.empty(len(files), self.size, self.size, CHANNELS[kind], dtype=torch.uint8)
        opened, shapes, room = {}, collections.defaultdict(list), 0
        for i, file in enumerate(files.tolist()):
            opened[i], shape, size = self._open(kind, file)
            shapes[shape].append(i)
            room += math.prod(shape) * CHANNELS[kind] + size
            if room < _CHUNK and i < len(files) - 1:
                continue
            for shape, same in shapes.items():  # mostly one
                pictures = torch.empty(len(same), *shape, CHANNELS[kind], dtype=torch.uint8)
                for j, place in zip(same, pictures.numpy(), strict=True):
                    self._decode(kind, files[j], opened.pop(j), place)
                pictures = _resize_masks(pictures, self.size) if kind == "mask" else _resize(pictures, self.size)
                if len(same) == len(files):
                    result = pictures
                else:
                    result[same] = pictures
            shapes.clear()
            room = 0
        return 255 - result if kind == "depth" and self.depth_near == "bright" else result

    def _scale(self, kind: str, whole: bool) -> dict[str, int]:
        """What simplejpeg is asked for: pictures scaled to half their size or less, which saves time, but still twice as large
        as needed, which keeps the difference small (README has it). Masks are decoded whole."""
        return {} if whole or kind == "mask" else {"min_height": 2 * self.size, "min_width": 2 * self.size, "min_factor": 2}

    def _open(self, kind: str, file: int, whole: bool = False) -> tuple[memoryview | bytes | Image.Image, tuple[int, int], int]:
        """The bytes of a JPEG or else the opened picture, how large it will be, (height, width), and the file's size."""
        raw = self._read(file)
        try:
            if raw[:2] == b"\xff\xd8":
                opened, shape = raw, simplejpeg.decode_jpeg_header(raw, **self._scale(kind, whole))[:2]
                # Scaled, a side is an eighth at least. Few are so large that they have to be asked for their full size too.
                full = shape if 64 * math.prod(shape) <= _MAX_PIXELS else simplejpeg.decode_jpeg_header(raw)[:2]
            else:
                opened = Image.open(io.BytesIO(raw), formats=_FORMATS)
                full = shape = opened.height, opened.width
                if opened.mode.startswith("I"):
                    raise ValueError("it has 16 bits a pixel, and 8 are read")
            if math.prod(full) > _MAX_PIXELS:
                raise ValueError(f"it is said to have {full[1]} x {full[0]} pixels")
            if opened is raw and len(raw) > 2**14 and bytes(raw).count(b"\xff\xda") > _MAX_SCANS:
                raise ValueError(f"it has more than {_MAX_SCANS} scans, each of which takes as long as a picture")
            return opened, shape, len(raw)
        except Exception as error:  # decoders raise many kinds
            raise self._unreadable(file, error) from error

    def _decode(
        self, kind: str, file: int, opened: memoryview | bytes | Image.Image, room: np.ndarray, whole: bool = False
    ) -> None:
        """Writes what `_open` gave to `room` (height, width, channels)."""
        colour = CHANNELS[kind] == 3
        try:
            if isinstance(opened, Image.Image):
                if opened.has_transparency_data and opened.convert("RGBA").getextrema()[3][0] < 255:
                    raise ValueError("it is transparent in parts; what should be seen there is not known")
                room[:] = np.asarray(opened.convert("RGB" if colour else "L")).reshape(room.shape)
            else:
                simplejpeg.decode_jpeg(opened, "RGB" if colour else "GRAY", buffer=room, **self._scale(kind, whole))
            if kind == "mask":
                _refuse_grey(room)
        except Exception as error:
            raise self._unreadable(file, error) from error

    def _unreadable(self, file: int, error: Exception) -> ValueError:
        return ValueError(f"{self.path}: {self._name(file)} cannot be read as a picture ({_reason(error)}).")


def _refuse_grey(mask: np.ndarray) -> None:
    """Raises ValueError for what is no mask of black and white. What a JPEG smears into grey is far less than the object."""
    if 0 < mask.max() < 128:  # 0 and 1, say, or a colour for each object
        raise ValueError(f"its brightest pixel is {mask.max()}, and in a mask the object is 255")
    grey = np.count_nonzero(mask + np.uint8(64) & 128)  # 64 to 191
    if 2 * grey > mask.size or (grey and grey > 4 * np.count_nonzero(mask > 191)):
        raise ValueError("most of it, or of its object, is grey, and a mask is black and white")


def check(path: str | Path, layout: str | None = None) -> dict[str, str]:
    """Reads a data set from first to last, every checksum and every picture, and prints what it holds and what is wrong.

    Gives the defects, {file name: what is wrong with it}. Raises FileNotFoundError or ValueError, as ZipDataset does, where
    there is no zip or folder that can be opened or its layout is not known.
    """
    ds = object.__new__(ZipDataset)
    defects = _Defects(Path(path), collect=True)
    names, rows = ds._find(layout, defects)
    sizes, empty = ds._scan(names, rows, defects)
    objects = len(np.unique(ds.fg_id[ds.fg_id >= 0])) or "unknown"
    print(f"{ds._root.name}, layout {ds.layout}: {len(names):,} files, {len(rows):,} samples")
    print(f"backgrounds: {len(np.unique(ds.bg_id)):,}; objects: {objects}; masks that show none: {empty:,}")
    for kind, found in sizes.items():
        common = [f"{count:,} of {width} x {height} pixels" for (height, width), count in found.most_common(3)]
        print(f"{kind}: {', '.join(common) or 'none'}{' and other sizes' if len(found) > 3 else ''}")
    if unused := _unused(names, rows):
        print(f"pictures that belong to no sample: {len(unused):,} ({_some(unused)})")
    groups = collections.defaultdict(list)
    for name, wrong in defects.items():
        groups[wrong.partition(" (")[0].rstrip(".")].append(name)
    print(f"Defects: {len(defects):,}" if defects else "No defects.")
    for wrong, files in groups.items():
        print(f"  {len(files):,} x {wrong}: {_some(files)}")
    return dict(defects)


class _Defects(dict):
    """{file name: what is wrong with it}, and the numbers of such files. Unless they are collected, the first is raised."""

    def __init__(self, path: Path, collect: bool):
        super().__init__()
        self.path, self.collect, self.files = path, collect, set()

    def add(self, name: str, wrong: str, *files: int, sentence: str = "") -> None:
        if not self.collect:
            raise ValueError(f"{self.path}: {sentence or f'{name} {wrong}'}")
        self.setdefault(name, wrong)
        self.files.update(files)


class _File:
    """A file's bytes, read where they are asked for: a mapped file that is cut short, or whose drive fails, would end the
    interpreter. Threads and forked processes share it without harm; a pickled one is opened anew."""

    def __init__(self, path: Path):
        self.path, self._lock = path, threading.Lock()
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        self.size = os.fstat(self._file.fileno()).st_size

    def __reduce__(self) -> tuple:
        return _File, (self.path,)

    def __del__(self):
        if hasattr(self, "_file"):
            self._file.close()

    def read(self, start: int, size: int) -> bytes:
        """Raises struct.error where that lies beyond the file, and OSError where it cannot be read."""
        if not 0 <= start <= start + size <= self.size:
            raise struct.error("it is said to lie beyond the end")
        if hasattr(os, "pread"):
            data = os.pread(self._file.fileno(), size, start)
        else:
            with self._lock:
                self._file.seek(start)
                data = self._file.read(size)
        if len(data) < size:
            raise OSError(errno.EIO, "the file has become shorter")
        return data


def _bounded(size: int) -> int:
    if not 0 <= size <= _MAX_FILE:
        raise struct.error(f"it is said to have {size:,} bytes")
    return size


def _read_header(source: _File, position: int) -> bytes:
    """A header of a zip's directory, with the name and the extra field after it."""
    head = source.read(position, min(256, source.size - position))
    name_size, extra_size = struct.unpack_from("<HH", head, 28)
    size = HEADER.itemsize + name_size + extra_size
    return head[:size] if size <= len(head) else source.read(position, size)


def _read_entry(source: _File, position: int, offset: int) -> memoryview | bytes:
    """A file in a zip, by the place of its header in the directory. Raises zlib.error or struct.error where it is damaged."""
    header = _read_header(source, position)
    method, crc, size, unpacked, name_size = struct.unpack_from("<H4xLLLH", header, 10)
    if 2**32 - 1 in (size, unpacked):
        unpacked, size, _ = _long_fields(header)
    # The entry's other header, before its data, has an extra field of a length of its own, mostly short.
    room = source.read(offset, min(30 + name_size + 64 + _bounded(size), source.size - offset))
    start = 30 + name_size
    if room[30:start] != header[HEADER.itemsize :][:name_size]:
        raise struct.error("its name differs from the directory's")
    start += int.from_bytes(room[28:30], "little")
    raw = memoryview(room)[start : start + size] if start + size <= len(room) else source.read(offset + start, size)
    if method == zipfile.ZIP_DEFLATED:  # never more than is said, and a byte to tell
        raw = zlib.decompressobj(-zlib.MAX_WBITS).decompress(raw, _bounded(unpacked) + 1)
    if len(raw) != unpacked:
        raise zlib.error("its size differs")
    if zlib.crc32(raw) != crc:
        raise zlib.error("its checksum differs")
    return raw


def _printable(name: str) -> str:
    return name if name.isprintable() else repr(name)[1:-1]


def _reason(error: Exception) -> str:
    """What a system's or a decoder's error says, in the words that fit into a sentence."""
    if isinstance(error, PIL.UnidentifiedImageError):
        return f"it is none of {', '.join(_FORMATS)}"
    if isinstance(error, struct.error) and "unpack" in str(error):
        return "its headers contradict each other"
    if getattr(error, "errno", None):
        return f"Errno {error.errno}, {error.strerror}"
    return " ".join((str(error) or type(error).__name__).split())


def _some(names: Collection[str]) -> str:
    first = [name if len(name) < 100 else f"{name[:96]} ..." for name in itertools.islice(names, 4)]
    return ", ".join(first) if len(first) < 4 else f"{', '.join(first[:3])} and {len(names) - 3:,} more"


def _decoding_threads() -> int:
    threads = torch.get_num_threads()  # one in a worker process
    if dist.is_initialized():  # for training, accelerate gives each process one; decoding may have its part of the cores
        threads = max(threads, os.cpu_count() // _processes_here())
    return threads


@functools.lru_cache(maxsize=1)
def _decoders(process: int, threads: int) -> ThreadPoolExecutor:
    """The threads that decode; by process, because they do not live on in a forked one."""
    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))


def _resize(pictures: Tensor, size: int) -> Tensor:
    """Bilinear, with antialiasing, in uint8: (n, height, width, channels) -> (n, size, size, channels)."""
    n, height, width, channels = pictures.shape
    if height == width == size:
        return pictures
    if channels == 1:  # torch takes as long for one channel as for four, so that four grey pictures go as one
        planes = F.pad(pictures, (0,) * 7 + (-n % 4,)).view(-1, 4, height, width)
        return F.interpolate(planes, (size, size), mode="bilinear", antialias=True).reshape(-1, size, size, 1)[:n]
    planes = pictures.permute(0, 3, 1, 2)
    return F.interpolate(planes, (size, size), mode="bilinear", antialias=True).permute(0, 2, 3, 1)


def _resize_masks(pictures: Tensor, size: int) -> Tensor:
    """By area, then cut at one half: (n, height, width, 1) grey -> (n, size, size, 1), 0 or 1."""
    n, height, width, _ = pictures.shape
    if height == width == size:
        return (pictures > 127).view(torch.uint8)
    down, across = height // size, width // size
    if (down * size, across * size) != (height, width):
        area = F.interpolate(pictures.view(n, 1, height, width).float(), (size, size), mode="area")
        return (area > 127.5).view(torch.uint8).view(n, size, size, 1)
    # Blocks of whole pixels: added up slice by slice, they cost a fifth of that.
    rows = sum(pictures.view(n, size, down, width)[:, :, i].int() for i in range(down))
    blocks = sum(rows.view(n, size, size, across)[..., i] for i in range(across))
    return (2 * blocks > 255 * down * across).view(torch.uint8).unsqueeze(3)


class _Cache:
    """Decoded pictures, uint8 (pictures, size, size, channels) for each kind, and which of them are there already.

    Args:
        wanted: a place in CACHES, or "auto". The next is taken where it has too little room.
        counts: the pictures of each kind.
        size: pixels a side.
        key: what makes the pictures what they are, for a file on disk.
    """

    def __init__(self, wanted: str, counts: dict[str, int], size: int, key: str):
        self._wanted, self._key = wanted, key
        self._shapes = {kind: (count, size, size, CHANNELS[kind]) for kind, count in counts.items()}
        # Pages that a crash of the machine kept from the disk would be black, so a file is good until the next start.
        start = f"{round(psutil.boot_time(), -2):.0f}"
        self._file = cache_folder() / f"{start}-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}.pictures"
        # Each of the machine's processes keeps its own in memory.
        self._free = {"memory": _free_memory() // _processes_here(), "disk": _free_disk(cache_folder())}
        if torch.cuda.is_available() and torch.utils.data.get_worker_info() is None:
            self._free = {"gpu": torch.cuda.mem_get_info()[0]} | self._free
        needed, first = _bytes_of(self._shapes), 0 if wanted == "auto" else CACHES.index(wanted)
        self._places = [place for place in CACHES[first:-1] if needed < _MAX_SHARE[place] * self._free.get(place, 0)]
        if "disk" not in self._places and "disk" in CACHES[first:] and self._file.exists():
            self._places.append("disk")
        self._places.append("none")
        self.pictures = self.ready = None
        if self._places[0] == "memory":  # takes no room yet, but forked processes share it from now on
            self.open()

    def open(self) -> "_Cache":
        """Takes the room, unless that is done, or the next place where there is less than was said to be free."""
        while self.pictures is None:
            try:
                self._take(self._places[0])
            except (OSError, torch.OutOfMemoryError):
                del self._places[0]
        return self

    @property
    def place(self) -> str:
        return self._places[0]

    def sentence(self) -> str:
        """What the pictures need, where they are kept, and what is free."""
        where = {"gpu": "kept on the GPU", "memory": "kept in memory", "disk": f"kept in {self._file}"}
        where = where.get(self.place, "decoded each time anew")
        if self._wanted not in ("auto", self.place):
            where += f", as {self._wanted!r} has too little room"
        room = ", ".join(f"{size / 1e9:.1f} GB {place}" for place, size in self._free.items())
        needed, size = _bytes_of(self._shapes), self._shapes["bg"][1]
        return f"{needed / 1e9:.2f} GB of pictures, {size} x {size} pixels, are {where} (free: {room})."

    def _take(self, place: str) -> None:
        shapes = self._shapes
        if place == "none":  # the few backgrounds, which the samples share, find room in nearly any memory
            shapes = {"bg": shapes["bg"]}
            shapes = shapes if _bytes_of(shapes) < _MAX_SHARE["memory"] * self._free["memory"] else {}
        counts = {kind: shape[0] for kind, shape in shapes.items()}
        if place == "gpu":
            self.ready = {kind: np.zeros(count, bool) for kind, count in counts.items()}
            self.pictures = {kind: torch.empty(shape, dtype=torch.uint8, device=DEVICE) for kind, shape in shapes.items()}
            return
        # Memory that forked processes share, or a file: a page for the key, what is ready, the pictures. Pages that nobody
        # has written take no room.
        length = 4096 + sum(counts.values()) + _bytes_of(shapes)
        room = self._open_file(length, self._key.encode().ljust(4096)) if place == "disk" else mmap.mmap(-1, length)
        at, pictures, ready = 4096, {}, {}
        for kind, count in counts.items():
            ready[kind] = np.frombuffer(room, bool, count, at)
            at += count
        for kind, shape in shapes.items():
            pictures[kind] = torch.from_numpy(np.ndarray(shape, np.uint8, room, at))
            at += math.prod(shape)
        self.pictures, self.ready = pictures, ready

    def _open_file(self, length: int, head: bytes) -> mmap.mmap:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        for other in self._file.parent.glob("*.pictures*"):
            if other.name.partition("-")[0] != self._file.name.partition("-")[0]:
                other.unlink(missing_ok=True)
        whole = self._file.exists() and self._file.stat().st_size == length
        if whole:
            with open(self._file, "rb") as file:
                whole = file.read(len(head)) == head
        if not whole:
            part = self._file.with_name(f"{self._file.name}.{os.getpid()}")
            try:
                with open(part, "wb") as file:
                    file.write(head)
                    file.flush()
                    # All its room at once: on a full disk, writing to a page would end the process.
                    reserve = getattr(os, "posix_fallocate", lambda descriptor, _, length: os.truncate(descriptor, length))
                    reserve(file.fileno(), 0, length)
                os.replace(part, self._file)
            except OSError:
                part.unlink(missing_ok=True)
                raise
        with open(self._file, "r+b") as file:
            return mmap.mmap(file.fileno(), length)


def _bytes_of(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes.values()))


def _entry_name(header: bytes) -> str:
    """A name in a zip is UTF-8 where bit 11 of the entry's flags says so, else in the code page of old PCs. Windows may have
    written a backslash for a slash."""
    flags, size = struct.unpack_from("<H18xH", header, 8)
    raw = header[HEADER.itemsize :][:size].replace(b"\\", b"/")
    return _printable(raw.decode("utf-8" if flags & 0x800 else "cp437", "backslashreplace"))


def _folder_of(archive: Path, path: Path) -> str:
    """A zip in a folder stands for a folder around its files."""
    return "" if archive == path else f"{archive.stem}/"


# Where a file lies: in which zip, and there its header in the directory and its data. Without a zip: -1, its number, and the
# time when it was written.
FILES = np.dtype([("archive", np.int16), ("header", np.int64), ("offset", np.int64)])
# A zip's directory has such a header for each entry, and name, extra field and comment after it. PKWARE, APPNOTE.TXT, 4.3.12.
HEADER = np.dtype(
    {
        "names": ["signature", "flags", "method", "crc", "size", "unpacked", "name_size", "extra_size", "offset"],
        "formats": ["<u4", "<u2", "<u2", "<u4", "<u4", "<u4", "<u2", "<u2", "<u4"],
        "offsets": [0, 8, 10, 16, 20, 24, 28, 30, 42],
        "itemsize": 46,
    }
)


def _long_fields(header: bytes) -> list[int]:
    """Unpacked size, size and offset, of which 2**32 - 1 says that the number is in the zip64 extra field, with 8 bytes."""
    size, unpacked, name_size, extra_size, offset = struct.unpack_from("<LLHH10xL", header, 20)
    extra = header[HEADER.itemsize + name_size :][:extra_size]
    while extra[:2] != b"\1\0":
        extra = extra[4 + struct.unpack_from("<H", extra, 2)[0] :]
    numbers, at = [], 4
    for number in (unpacked, size, offset):
        long = number == 2**32 - 1
        numbers.append(struct.unpack_from("<q", extra, at)[0] if long else number)
        at += 8 * long
    return numbers


def _read_entries(source: _File) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The headers of a zip's entries, as HEADER, where these lie, as FILES, and the names. zipfile would make an object of each
    entry, 770 MB for 1.2 million. Raises ValueError or struct.error where the bytes are not a whole zip."""
    tail = source.read(max(0, source.size - 2**16 - 98), min(source.size, 2**16 + 98))  # the end records and a comment
    at = tail.rfind(b"PK\5\6")
    while at >= 0 and (len(tail) < at + 22 or at + 22 + struct.unpack_from("<H", tail, at + 20)[0] > len(tail)):
        at = tail.rfind(b"PK\5\6", 0, at)  # in the comment that follows the right one, say
    if at < 0:
        raise ValueError("its end is not there")
    size, start = struct.unpack_from("<LL", tail, at + 12)
    if at >= 76 and tail[at - 20 : at - 16] == b"PK\6\7":  # zip64: a second record, and what points to it
        at -= 76
        size, start = struct.unpack_from("<QQ", tail, at + 40)
    end = source.size - len(tail) + at
    shift = end - size - start  # of all offsets, where something stands before the zip
    if shift < 0:
        raise ValueError(f"{-shift:,} bytes are not there")
    if size > 2**30:
        raise ValueError(f"its directory is said to have {size:,} bytes")
    data, positions, position = source.read(end - size, size), array.array("q"), 0
    while position < size:
        positions.append(position)
        position += HEADER.itemsize + sum(struct.unpack_from("<HHH", data, position + 28))
    if position != size:
        raise ValueError("its directory is damaged")
    # A header may lie at any byte: seen as if one began at each, those that do are picked.
    headers = np.ndarray(max(0, size - HEADER.itemsize + 1), HEADER, data, strides=1)[positions]
    if (headers["signature"] != int.from_bytes(b"PK\1\2", "little")).any():
        raise ValueError("its directory is damaged")
    ends = (headers["name_size"] + np.array(positions) + HEADER.itemsize).tolist()
    names = [_entry_name(data[start:end]) for start, end in zip(positions, ends, strict=True)]
    files = np.zeros(len(positions), FILES)
    files["header"], files["offset"] = positions, headers["offset"]
    for i in np.flatnonzero(headers["offset"] == 2**32 - 1):
        files["offset"][i] = _long_fields(data[positions[i] :][: 2**18])[2]
    files["header"] += end - size
    files["offset"] += shift
    return headers, files, names


def _files_below(folder: Path) -> list[Path]:
    """All files in a folder and in those below, also by links."""
    found = []
    for place, folders, files in os.walk(folder, followlinks=True):
        around = {os.path.realpath(outer) for outer in (place, *Path(place).parents)}  # a link to one of these has no end
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(place, name)) not in around]
        found += [file for name in files if (file := Path(place, name)).is_file()]
    return sorted(found)


def _read_directory(path: Path, defects: _Defects) -> tuple[list[_File], np.ndarray, list[str], list[str], str]:
    """The files of a zip, of a folder or of the zips in a folder, but for the litter of operating systems: the zips; where
    each file lies, as FILES; the paths of those in no zip; the files' names; and a fingerprint of names and contents."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder.")
    path = path.absolute()
    zips, names, parts, checksums, odd, loose = [], [], [], [], {}, []
    archives = [path]
    if path.is_dir():
        archives = sorted(file for file in path.glob("[!.]*.[zZ][iI][pP]") if file.is_file())
        tables = (file for file in path.iterdir() if _pattern(*TABLE).fullmatch(file.name))
        loose = list(tables) if archives else _files_below(path)
    for number, archive in enumerate(archives):
        zips.append(source := _File(archive))
        try:
            headers, files, found = _read_entries(source)
        except (ValueError, struct.error, OSError) as error:
            where = defects.path if archive == path else defects.path / archive.name
            what = f"not a whole zip file ({source.size:,} bytes; {_reason(error)})"
            raise ValueError(f"{where} is {what}. Copy it anew.") from error
        packed = ~np.isin(headers["method"], (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
        how = "is compressed in a way that is not read here. Store or deflate the files."
        odd |= dict.fromkeys((len(names) + np.flatnonzero(packed)).tolist(), how)
        how = "is encrypted. Zip the files without a password."
        odd |= dict.fromkeys((len(names) + np.flatnonzero(headers["flags"] & 1)).tolist(), how)
        files["archive"], folder = number, _folder_of(archive, path)
        names += [folder + name for name in found] if folder else found
        parts.append(files)
        checksums.append(headers["crc"])
    parts.append(np.zeros(len(loose), FILES))
    parts[-1]["archive"], parts[-1]["header"] = -1, range(len(loose))
    parts[-1]["offset"] = [file.stat().st_mtime_ns for file in loose]
    # In place of a checksum, for which all files would have to be read, the size tells whether the data have changed.
    checksums.append(np.array([file.stat().st_size % 2**32 for file in loose], np.uint32))
    loose = [file.relative_to(path).as_posix() for file in loose]
    names += map(_printable, loose)
    litter = re.compile(r"/$|(^|/)(__MACOSX/|\.(?!\./)[^/]|Thumbs\.db$|desktop\.ini$)")  # and a zip's entries for folders
    kept = np.array([i for i, name in enumerate(names) if not litter.search(name)], int)
    if not len(kept):
        raise ValueError(f"{defects.path} holds no files. A data set has pictures of four kinds: bg, fg_bg, mask and depth.")
    files, names = np.concatenate(parts)[kept], [names[i] for i in kept]
    for i, file in enumerate(kept.tolist()):
        if file in odd:
            defects.add(names[i], odd[file], i)
    content = hashlib.blake2b(np.concatenate(checksums)[kept].tobytes(), digest_size=8)
    content.update("\n".join([*names, ""]).encode())
    return zips, files, loose, names, content.hexdigest()


def _recognise_layout(path: Path, names: Sequence[str]) -> str:
    """The layout that has a table in the zip, or else whose fg_bg pattern matches the most names (of some thousands)."""
    some = names if len(names) <= 10_000 else [names[i] for i in np.random.default_rng(0).integers(len(names), size=10_000)]
    counts = {}
    for layout, kinds in LAYOUTS.items():
        within, name = (names, *TABLE) if kinds == TABLE else (some, kinds[1])
        found = sum(map(bool, map(_pattern(name).fullmatch, within)))
        counts[layout] = len(names) if found and kinds == TABLE else found
    best = max(counts, key=counts.get)
    if counts[best]:
        return best
    examples = {name.rpartition("/")[0] or ".": name for name in names}
    found = ", ".join(list(examples.values())[:4])
    known = "; ".join(f"{layout} ({', '.join(name.partition('/')[0] for name in kinds)})" for layout, kinds in LAYOUTS.items())
    raise ValueError(f"{path}: no known layout. Found {len(names)} files such as {found}. Known layouts and folders: {known}.")


def _match_names(names: Sequence[str], layout: str, defects: _Defects) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which files make a sample, by the numbers in their names and in the order of these: rows (samples, 4), each sample's
    four files, -1 where one is missing; ids of backgrounds and of objects."""
    files, numbers, path = {}, {}, defects.path
    for kind, name in zip(KINDS, LAYOUTS[layout], strict=True):
        pattern, matching, found = _pattern(name), array.array("q"), array.array("q")
        for i, name in enumerate(names):
            if match := pattern.fullmatch(name):
                if max(map(len, match.groups())) > 18:
                    defects.add(name, "has a number that is too large. Count the pictures from 1.", i)
                    continue
                matching.append(i)
                found.extend(map(int, match.groups()))
        files[kind], numbers[kind] = np.array(matching), np.array(found).reshape(-1, pattern.groups)
    if not len(files["fg_bg"]):
        raise ValueError(f"{path}: none of its {len(names)} files is a fg_bg picture of the layout {layout}.")
    # The numbers of a name make one number, as digits do, and in its order the files of a sample find each other.
    spans = [1 + max(int(numbers[kind][:, k].max(initial=0)) for kind in KINDS[1:]) for k in range(numbers["fg_bg"].shape[1])]
    if math.prod(spans) >= 2**63:
        raise ValueError(f"{path}: the numbers in its names go up to {max(spans) - 1}, which is too large. Count from 1.")
    keys = {kind: numbers[kind] @ [math.prod(spans[k + 1 :]) for k in range(len(spans))] for kind in KINDS[1:]}
    keys["bg"] = numbers["bg"][:, 0]
    for kind in KINDS:
        order = np.argsort(keys[kind], kind="stable")
        keys[kind], files[kind], numbers[kind] = keys[kind][order], files[kind][order], numbers[kind][order]
        for k in np.flatnonzero(keys[kind][1:] == keys[kind][:-1]):
            one, other = files[kind][k : k + 2].tolist()
            wrong = f"claims to be one {kind}, as another file does ({names[other]}). Remove one."
            defects.add(names[one], wrong, one, other)
    bg_id, fg_id = _ids(path, layout, numbers["fg_bg"], keys["bg"].tolist())
    rows = []
    for kind in KINDS:
        wanted = bg_id if kind == "bg" else keys["fg_bg"]
        place = np.searchsorted(keys[kind], wanted)
        missing = np.append(keys[kind], -1)[place] != wanted
        for file in files["fg_bg"][missing].tolist():
            all_of_them = f"{missing.sum()} of {len(wanted)} samples have no {kind}; the first is {names[file]}."
            defects.add(names[file], f"has no {kind}.", sentence=all_of_them)
        rows.append(np.where(missing, -1, np.append(files[kind], -1)[place]))
    return np.stack(rows, 1), bg_id, fg_id


def _ids(path: Path, layout: str, numbers: np.ndarray, backgrounds: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """What the numbers in the names of fg_bg files (samples, groups) say: the ids of backgrounds and objects, -1 unknown.

    raguram and modest: background, object, place. mpaditya: background, sample. akshat: background, sample, from 1.
    deepjyoti: sample, from 1, with the same number of samples for each of the `backgrounds`, which count from 1.
    """
    if layout in ("raguram", "modest"):
        bg_id, fg_id = numbers[:, 0], numbers[:, 1]
        return bg_id, _fold_mirrored(bg_id, fg_id) if layout == "raguram" else fg_id
    if layout == "deepjyoti":
        last, count = int(numbers.max()), max(backgrounds, default=0)
        # Where the end of the set is missing, the recipe of the reports tells: 40 pictures of each object.
        each = last // count if count and last % count == 0 else -(-last // (40 * max(count, 1))) * 40
        if 0 in backgrounds or not (count - 1) * each < last <= count * each:
            found = f"Its samples count to {last}, its backgrounds from {min(backgrounds, default=0)} to {count}"
            raise ValueError(f"{path}: {found}; expected backgrounds from 1 on, with the same number of samples for each.")
        bg_id, place = (numbers[:, 0] - 1) // each + 1, (numbers[:, 0] - 1) % each
    else:
        bg_id, place, each = numbers[:, 0], numbers[:, 1] - 1, int(numbers[:, 1].max())
    # The recipe of the reports puts an object at 20 places and, mirrored, at the same 20, before the next one follows.
    ordered = layout != "mpaditya" and each % 40 == 0
    return bg_id, place // 40 if ordered else np.full(len(numbers), -1)


def _match_table(
    table: str, names: Sequence[str], content: bytes, defects: _Defects
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `_match_names` gives, from a table: one line a sample, the paths of bg, fg_bg, mask and depth with `;` between.
    Files are found by their folder and name, as what stands before depends on where the table was written."""

    def tail(name: str) -> str:
        return "/".join(name.strip().replace("\\", "/").split("/")[-2:]).lower()

    files, doubles, rows, used, where = {}, {}, [], set(), f"{defects.path}: {table}"
    for i, name in enumerate(names):
        if files.setdefault(tail(name), i) != i:
            doubles[tail(name)] = i
    for number, line in _lines(content, where):
        if len(line) != len(KINDS):
            expected = "expected the paths of bg, fg_bg, mask and depth."
            defects.add(f"{table}, line {number}:", f"{len(line)} columns; {expected}")
            rows.append(([], [-1] * len(KINDS), -1))
            continue
        tails = [tail(cell) for cell in line]
        row = [files.get(name, -1) for name in tails]
        for name, cell, file in zip(tails, line, row, strict=True):
            if file < 0:
                defects.add(_printable(cell.strip()), f"is not in the data set ({table}, line {number}).")
            elif name in doubles:
                other = f"{names[doubles[name]]}; {table}, line {number}"
                wrong = f"claims to be one picture, as another file does ({other}). Remove one."
                defects.add(names[file], wrong, file)
        if row[1] in used and row[1] >= 0:
            wrong = f"stands in more than one line ({table}, line {number}); a sample has one background, mask and depth."
            defects.add(names[row[1]], wrong, row[1])
        used.add(row[1])
        found = re.search(r"(\d{1,18})\D*$", Path(tails[0]).stem)
        if not found:
            defects.add(_printable(line[0]), f"has no number in its name, by which backgrounds go ({table}).", row[0])
        # As in the other layouts, in the order of the numbers in the names.
        order = [int(part[:18]) if part.isdecimal() else part for part in re.split(r"(\d+)", tails[1])]
        rows.append((order, row, int(found[1]) if found else -1))
    if not used:
        raise ValueError(f"{where} has no lines that can be used; expected one a sample.")
    rows.sort()
    _, rows, bg_id = zip(*rows, strict=True)
    return np.array(rows), np.array(bg_id), np.full(len(rows), -1)


def _lines(table: bytes, where: str) -> Iterator[tuple[int, list[str]]]:
    """The lines of a table that are not empty, with their numbers."""
    try:
        for number, line in enumerate(csv.reader(io.StringIO(table.decode("utf-8-sig", "replace")), delimiter=";"), start=1):
            if any("\n" in cell for cell in line):
                raise ValueError(f"{where}, line {number}: a quote is opened and not closed in its line.")
            if any(cell.strip() for cell in line):
                yield number, line
    except csv.Error as error:
        raise ValueError(f"{where} cannot be read as a table ({error}).") from error


def _unused(names: Sequence[str], rows: np.ndarray) -> list[str]:
    """The pictures that belong to no sample."""
    unused = np.ones(len(names), bool)
    unused[rows[rows >= 0]] = False
    return [names[i] for i in np.flatnonzero(unused) if names[i].lower().endswith((".jpg", ".jpeg", ".png"))]


def _fold_mirrored(bg_id: np.ndarray, fg_id: np.ndarray) -> np.ndarray:
    """Gives mirrored objects the ids of their originals, where object f + F/2 is the mirror image of object f.

    A part of the full set may lack the highest numbers, so F/2 is the number for which originals and mirror images stand on
    the same backgrounds; where none fits exactly (a random part), the highest number tells.
    """
    stride = int(fg_id.max()) + 1
    pairs = np.unique(bg_id * stride + fg_id)
    ids = np.sort(pairs % stride)
    halves = stride - 1 - np.unique(ids)[::-1]  # the last object is the mirror image of one that is there
    halves = halves[halves >= stride // 2]
    for start in (0, 1)[: 1 + int(fg_id.min() > 0)]:  # objects may count from 0 or from 1
        for half in halves[2 * np.searchsorted(ids, start + halves) == len(ids)].tolist():  # as many of one as of the other
            mirrored = pairs % stride >= start + half
            if np.array_equal(pairs[~mirrored], pairs[mirrored] - half):
                return (fg_id - start) % half + start
    warnings.warn("Mirrored objects cannot be told by their backgrounds here; the highest number decides.", stacklevel=3)
    return (fg_id - start) % ((stride - start + 1) // 2) + start


def to_float(batch: dict[str, Tensor], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """A uint8 batch of `ZipDataset.batch` on the device, as float32 in [0, 1], in the memory order that suits convolutions."""
    batch = {kind: p.to(device).to(torch.float32, memory_format=torch.channels_last) for kind, p in batch.items()}
    return {kind: pictures if kind == "mask" else pictures.div_(255) for kind, pictures in batch.items()}


def _hash01(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big") / 2**56


def split(ds: ZipDataset, by: str = "unseen", seed: int = 0) -> dict[str, np.ndarray]:
    """Divides the samples. Gives a dict of index arrays.

    "image" is the random 70/15/15 of the reports: `train`, `valid`, `test`. Each background and each object is in all three.

    "unseen" divides the backgrounds 70/15/15 into training, validation and test ones, and the objects likewise. Of the
    samples of training backgrounds with training objects, `train` has 80 %, `valid` and `test_seen` 10 % each. The test
    backgrounds with training objects are `test_new_bg`, training backgrounds with test objects `test_new_fg`, test with
    test `test_new_both`. `valid_new` has the samples with a validation background or object (or both) and none of the test
    ones, for choices that should hold on new scenes. A validation id beside a test id is in no part.

    Ids are placed by multiples of the golden ratio modulo 1, which spread evenly however many there are (from 12 on, no part
    is empty), and samples by a hash of their names; so no sample moves when others are added. An unknown id (-1) counts as
    a training one. Raises ValueError for another `by`.
    """
    if by == "image":
        order = np.random.default_rng(seed).permutation(len(ds))
        cuts = [round(0.7 * len(ds)), round(0.85 * len(ds))]
        return dict(zip(("train", "valid", "test"), map(np.sort, np.split(order, cuts)), strict=True))
    _known(by, ("unseen", "image"), "split")

    def group(ids: np.ndarray, what: str) -> np.ndarray:
        place = (ids * (5**0.5 - 1) / 2 + _hash01(f"{what} {seed}")) % 1
        return np.where(ids < 0, 0, np.digitize(place, (0.7, 0.85)))  # 0 training, 1 validation, 2 test

    bg, fg = group(ds.bg_id, "background"), group(ds.fg_id, "object")
    seen = (bg == 0) & (fg == 0)
    place = np.array([_hash01(f"{ds.name(i)} {seed}") for i in range(len(ds))])
    parts = {
        "train": seen & (place < 0.8),
        "valid": seen & (place >= 0.8) & (place < 0.9),
        "valid_new": ~seen & (bg < 2) & (fg < 2),
        "test_seen": seen & (place >= 0.9),
        "test_new_bg": (bg == 2) & (fg == 0),
        "test_new_fg": (bg == 0) & (fg == 2),
        "test_new_both": (bg == 2) & (fg == 2),
    }
    return {name: np.flatnonzero(members) for name, members in parts.items()}


def hardest_part(parts: Iterable[str]) -> str:
    """The part to look at first: of the parts that are there (their names), the one with the least in common with the
    training data. Where objects are not known by number, that is `test_new_bg`. Raises ValueError where there is none."""
    order = ("test_new_both", "test_new_bg", "test_new_fg", "test", "test_seen", "valid")
    found = next((part for part in order if part in parts), None)
    if found is None:
        raise ValueError("No part of the split has samples to test on. Use more backgrounds or objects.")
    return found


def _known(name: str, names: Iterable[str], what: str) -> None:
    if name not in names:
        raise ValueError(f"Unknown {what} {name!r}. Known: {', '.join(names)}.")


# ---------- Networks --------------------------------------------------------------------------------------------------


def check_size(model: nn.Module, height: int, width: int) -> None:
    """Raises ValueError where the network's strides do not divide the picture's size, with the nearest sizes that fit."""
    if height % model.stride or width % model.stride:
        fit = [max(model.stride, round(side / model.stride) * model.stride) for side in (height, width)]
        raise ValueError(
            f"{type(model).__name__} halves its input {model.stride.bit_length() - 1} times: {height} x {width} pixels do not "
            f"divide by {model.stride}. Use {fit[0]} x {fit[1]}."
        )


class DoubleConv(nn.Sequential):
    """Twice: 3x3 convolution, batch norm, ReLU. (N, inputs, H, W) -> (N, outputs, H, W), with `middle` channels between."""

    def __init__(self, inputs: int, outputs: int, middle: int | None = None, bias: bool = True):
        middle = middle or outputs
        super().__init__(
            nn.Conv2d(inputs, middle, 3, padding=1, bias=bias),
            nn.BatchNorm2d(middle),
            nn.ReLU(inplace=True),
            nn.Conv2d(middle, outputs, 3, padding=1, bias=bias),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )


class ResBlock(nn.Module):
    """A double convolution beside a 1x1 shortcut. Gives the half-size features and, for the decoders, the full-size ones."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.shortcut_conv = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.shortcut_norm = nn.BatchNorm2d(outputs)
        self.main = DoubleConv(inputs, outputs)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)

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


class ResUNet(nn.Module):
    """Reports 1 and 4: the two pictures joined to six channels, one residual encoder, and a decoder for each task.

    `widths` are the channels of the encoder's blocks and, last, of the bottom: five make `resunet`, three `resunet_lite`.
    """

    def __init__(self, widths: Sequence[int] = (32, 64, 128, 256, 512)):
        super().__init__()
        self.stride = 2 ** (len(widths) - 1)
        self.encoder = nn.ModuleList(map(ResBlock, (6, *widths[:-2]), widths[:-1]))
        self.bottom = DoubleConv(widths[-2], widths[-1])
        up = widths[::-1]
        self.mask_decoder = nn.ModuleList(map(UpBlock, up[:-1], up[1:], up[1:]))
        self.mask_head = nn.Conv2d(widths[0], 1, 1)
        self.depth_decoder = nn.ModuleList(map(UpBlock, up[:-1], up[1:], up[1:]))
        self.depth_head = nn.Conv2d(widths[0], 1, 1)

    def forward(self, bg: Tensor, fg_bg: Tensor) -> tuple[Tensor, Tensor]:
        check_size(self, *bg.shape[2:])
        x, skips = torch.cat([bg, fg_bg], 1), []
        for block in self.encoder:
            x, skip = block(x)
            skips.append(skip)
        mask = depth = self.bottom(x)
        for block, skip in zip(self.mask_decoder, reversed(skips), strict=True):
            mask = block(mask, skip)
        mask = self.mask_head(mask)
        for block, skip in zip(self.depth_decoder, reversed(skips), strict=True):
            depth = block(depth, skip)
        return mask, self.depth_head(depth).sigmoid()


class BasicBlock(nn.Module):
    """ResNet's basic block: two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where shapes change.

    He et al., Deep Residual Learning for Image Recognition, 2015.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.main(x) + self.shortcut(x))


class DualStreamDecoder(nn.Module):
    """From features of quarter, half and full size to one channel of full size. Learned up-sampling, no batch norm."""

    def __init__(self, width: int):
        super().__init__()
        self.reduce = nn.Conv2d(256, width, 1)
        self.up_half = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.mix_half = self._mix(width + 128, width // 2)
        self.up_full = nn.ConvTranspose2d(width // 2, width // 2, 2, stride=2)
        self.mix_full = self._mix(width // 2 + 64, width // 4)
        self.head = nn.Conv2d(width // 4, 1, 3, padding=1)

    @staticmethod
    def _mix(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1),
            nn.ReLU(inplace=True),
        )

    def forward(self, full: Tensor, half: Tensor, quarter: Tensor) -> Tensor:
        x = self.up_half(self.reduce(quarter))
        x = self.up_full(self.mix_half(torch.cat([x, half], 1)))
        return self.head(self.mix_full(torch.cat([x, full], 1)))


class DualStream(nn.Module):
    """Report 2's network: each picture has a stream of its own; joined, they go down to a quarter of the size, and a decoder
    for each task comes back up."""

    stride = 4

    def __init__(self):
        super().__init__()
        self.bg_stream, self.fg_bg_stream = self._stream(), self._stream()
        self.to_half = nn.Sequential(BasicBlock(64, 128, stride=2), BasicBlock(128, 128))
        self.to_quarter = nn.Sequential(BasicBlock(128, 256, stride=2), BasicBlock(256, 256))
        self.mask_decoder = DualStreamDecoder(64)
        self.depth_decoder = DualStreamDecoder(128)

    @staticmethod
    def _stream() -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(inplace=True),
            BasicBlock(32, 32),
            BasicBlock(32, 32),
        )

    def forward(self, bg: Tensor, fg_bg: Tensor) -> tuple[Tensor, Tensor]:
        check_size(self, *bg.shape[2:])
        full = torch.cat([self.bg_stream(bg), self.fg_bg_stream(fg_bg)], 1)
        half = self.to_half(full)
        quarter = self.to_quarter(half)
        return self.mask_decoder(full, half, quarter), self.depth_decoder(full, half, quarter).sigmoid()


class UNet(nn.Module):
    """A small U-Net from six channels to one: double convolutions, max-pooling down, bilinear up. `widths` are the channels of
    the encoder, from full size down. Ronneberger et al., U-Net, 2015."""

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        self.encoder = nn.ModuleList(map(DoubleConv, (6, *widths[:-1]), widths))
        self.pool = nn.MaxPool2d(2)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        skips = widths[-2::-1]  # what is handed across, from the smallest size up; as many channels come up from below
        self.decoder = nn.ModuleList(DoubleConv(2 * w, out, w) for w, out in zip(skips, (*skips[1:], skips[-1]), strict=True))
        self.head = nn.Conv2d(widths[0], 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.encoder[0](x)]
        for block in self.encoder[1:]:
            skips.append(block(self.pool(skips[-1])))
        x = skips.pop()
        for block in self.decoder:
            x = block(torch.cat([skips.pop(), self.up(x)], 1))
        return self.head(x)


class TwinUNet(nn.Module):
    """Report 3: two U-Nets that share nothing, one for the mask and one of twice the width for depth."""

    stride = 16

    def __init__(self):
        super().__init__()
        self.mask_net = UNet((16, 32, 64, 128, 128))
        self.depth_net = UNet((32, 64, 128, 256, 256))

    def forward(self, bg: Tensor, fg_bg: Tensor) -> tuple[Tensor, Tensor]:
        check_size(self, *bg.shape[2:])
        pictures = torch.cat([bg, fg_bg], 1)
        return self.mask_net(pictures), self.depth_net(pictures).sigmoid()


class TripleResBlock(nn.Module):
    """Three convolutions beside a shortcut that is a 3x3 convolution too; the ReLU of the third comes after the sum."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.main = nn.Sequential(
            DoubleConv(inputs, outputs, bias=False),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.main(x) + self.shortcut(x))


class TwoHeadResNet(nn.Module):
    """Report 5: a stream for each picture, joined to 256 channels, and two heads, everything at full size. A pixel of the
    output sees 21 x 21 pixels of the input."""

    stride = 1

    def __init__(self):
        super().__init__()
        doubles = DoubleConv(32, 64, bias=False), DoubleConv(64, 128, bias=False)
        self.bg_stream = nn.Sequential(*self._first(), *doubles)
        self.fg_bg_stream = nn.Sequential(*self._first(), TripleResBlock(32, 64), TripleResBlock(64, 128))
        self.mask_head, self.depth_head = self._head(), self._head()

    @staticmethod
    def _first() -> tuple[nn.Module, ...]:
        return nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True)

    @staticmethod
    def _head() -> nn.Sequential:
        return nn.Sequential(DoubleConv(256, 256, bias=False), nn.Conv2d(256, 1, 3, padding=1, bias=False))

    def forward(self, bg: Tensor, fg_bg: Tensor) -> tuple[Tensor, Tensor]:
        joined = torch.cat([self.fg_bg_stream(fg_bg), self.bg_stream(bg)], 1)
        return self.mask_head(joined), self.depth_head(joined).sigmoid()


class FullSizeDecoder(nn.Module):
    """From an encoder's features, largest first, back to the size of the pictures: nearest doubling, the encoder's features of
    that size beside it, a residual block. The largest features are of 1/`unshuffle` of the size; their channels are spread over
    the pixels that each stands for (Shi et al., Sub-Pixel Convolution, 2016), and laid beside `detail` channels that a single
    convolution makes of the pictures themselves: outlines come from there."""

    def __init__(self, widths: Sequence[int], pictures: int, outputs: int, unshuffle: int = 2, detail: int = 16):
        super().__init__()
        self.up = nn.ModuleList(nn.Upsample(scale_factor=2) for _ in widths[1:])
        steps = reversed(list(itertools.pairwise(widths)))
        self.mix = nn.ModuleList(BasicBlock(below + here, here) for here, below in steps)
        self.spread = nn.PixelShuffle(unshuffle)
        self.detail = self._conv(pictures, detail)
        self.join = self._conv(detail + widths[0] // unshuffle**2, detail)
        self.head = nn.Conv2d(detail, outputs, 3, padding=1)

    @staticmethod
    def _conv(inputs: int, outputs: int) -> nn.Sequential:
        conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))

    def forward(self, features: Sequence[Tensor], pictures: Tensor) -> Tensor:
        x = features[-1]
        for up, mix, here in zip(self.up, self.mix, features[-2::-1], strict=True):
            x = mix(torch.cat([up(x), here], 1))
        return self.head(self.join(torch.cat([self.detail(pictures), self.spread(x)], 1)))


def with_difference(bg: Tensor, fg_bg: Tensor) -> Tensor:
    """Both pictures, what is new in the second, and how much that is, four times enlarged: (N, 12, H, W). Where an object is as
    bright as what it hides, that is a few hundredths, little beside pictures of 0 to 1."""
    difference = fg_bg - bg
    return torch.cat([bg, fg_bg, difference, 4 * difference.abs()], 1)


class DifferenceUNet(nn.Module):
    """The project's own: a U-Net of residual blocks that is given the difference of the two pictures beside them.

    Squares of `unshuffle` x `unshuffle` pixels become channels before the first convolution, so that nothing but three thin
    convolutions works at full size; one decoder makes mask and depth. `widths` are the channels at 1/2, 1/4, 1/8 and 1/16 of
    the size. Of the smallest features, every fifth is left out at random while it trains, so that no room is known by one of
    them alone. Notebook 02 has the reason behind each part, and takes them away one by one.
    """

    inputs = staticmethod(with_difference)

    def __init__(self, widths: Sequence[int] = (32, 64, 128, 192), unshuffle: int = 2, detail: int = 16):
        super().__init__()
        self.stride = unshuffle * 2 ** (len(widths) - 1)
        channels = self.inputs(*torch.zeros(2, 1, 3, 1, 1)).shape[1]
        self.stem = nn.Sequential(nn.PixelUnshuffle(unshuffle), BasicBlock(channels * unshuffle**2, widths[0]))
        self.encoder = nn.ModuleList(nn.Sequential(nn.MaxPool2d(2), BasicBlock(*pair)) for pair in itertools.pairwise(widths))
        self.dropout = nn.Dropout2d(0.2)
        self.decoder = FullSizeDecoder(widths, channels, 2, unshuffle, detail)

    def forward(self, bg: Tensor, fg_bg: Tensor) -> tuple[Tensor, Tensor]:
        check_size(self, *bg.shape[2:])
        pictures = self.inputs(bg, fg_bg)
        *features, smallest = self.encode(pictures)
        mask_logits, depth = self.decoder([*features, self.dropout(smallest)], pictures).split(1, 1)
        return mask_logits, depth.sigmoid()

    def encode(self, pictures: Tensor) -> list[Tensor]:
        """The features of each size, largest first, of what `inputs` makes of the two pictures."""
        features = [self.stem(pictures)]
        for block in self.encoder:
            features.append(block(features[-1]))
        return features


class ResNet18UNet(nn.Module):
    """A U-Net whose encoder is ResNet-18 up to its third stage, so that it can start from weights trained on ImageNet: see
    `load_imagenet`. Inputs and decoder are those of DifferenceUNet."""

    stride = 16

    def __init__(self):
        super().__init__()
        encoder = torchvision.models.resnet18()
        self.conv1 = nn.Conv2d(12, 64, 7, 2, padding=3, bias=False)
        self.bn1, self.relu, self.maxpool = encoder.bn1, encoder.relu, encoder.maxpool
        self.layer1, self.layer2, self.layer3 = encoder.layer1, encoder.layer2, encoder.layer3
        self.decoder = FullSizeDecoder((64, 64, 128, 256), 12, 2)

    def load_imagenet(self) -> None:
        """Takes the encoder's weights from torchvision, which downloads 45 MB, once. The first convolution sees `fg_bg` as it
        saw ImageNet's pictures (their normalisation goes into the weights), and nothing else yet. Raises OSError where they
        can neither be downloaded nor read."""
        url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
        path = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
        try:
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.partition("-")[2], progress=False)
            state = _load_state(path)
        except (OSError, RuntimeError, ValueError) as error:
            raise OSError(f"ImageNet's weights cannot be had ({error}). Go online, or put {url} at {path}.") from error
        mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
        first = state["conv1.weight"] / deviation
        own = {name: value for name, value in state.items() if name.startswith(("bn1", "layer1", "layer2", "layer3"))}
        own["bn1.running_mean"] = own["bn1.running_mean"] + (first * mean).sum((1, 2, 3))
        own["conv1.weight"] = F.pad(first, (0, 0, 0, 0, 3, 6))  # fg_bg is the second of four pictures
        self.load_state_dict(own | {k: v for k, v in self.state_dict().items() if k.startswith("decoder")})

    def forward(self, bg: Tensor, fg_bg: Tensor) -> tuple[Tensor, Tensor]:
        check_size(self, *bg.shape[2:])
        pictures = with_difference(bg, fg_bg)
        features = [self.relu(self.bn1(self.conv1(pictures)))]
        features.append(self.layer1(self.maxpool(features[-1])))
        features.append(self.layer2(features[-1]))
        features.append(self.layer3(features[-1]))
        mask_logits, depth = self.decoder(features, pictures).split(1, 1)
        return mask_logits, depth.sigmoid()


# Every network: mask_logits, depth = model(bg, fg_bg), each (N, 1, H, W); depth is in [0, 1]. Its attribute `stride`, where
# it has one, must divide height and width.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "resunet": ResUNet,
    "resunet_lite": functools.partial(ResUNet, (64, 128, 256)),
    "dual_stream": DualStream,
    "twin_unet": TwinUNet,
    "two_head_resnet": TwoHeadResNet,
    "difference_unet": DifferenceUNet,
    "resnet18_unet": ResNet18UNet,
}


# ---------- Losses and metrics ----------------------------------------------------------------------------------------


def _full_precision(loss: Callable) -> Callable:
    """Computes a loss in float32 at least, whatever autocast says: half precision moves SSIM by hundredths."""

    @functools.wraps(loss)
    def wrapped(prediction: Tensor, target: Tensor, **options) -> Tensor:
        with torch.autocast(prediction.device.type, enabled=False):
            if prediction.dtype != torch.float64:
                prediction = prediction.float()
            return loss(prediction, target.to(prediction.dtype), **options)

    return wrapped


def _of_probability(loss: Callable) -> Callable:
    """A loss of probabilities, made to take a mask's logits."""

    @functools.wraps(loss)
    @_full_precision
    def wrapped(prediction: Tensor, target: Tensor, **options) -> Tensor:
        return loss(prediction.sigmoid(), target, **options)

    return wrapped


# Of the mask alone. Predictions are logits z, p = sigmoid(z); the truth t is 0 or 1.


@_full_precision
def bce(prediction: Tensor, target: Tensor) -> Tensor:
    """Binary cross entropy of logits: -(t log p + (1 - t) log(1 - p)), mean over all pixels."""
    return F.binary_cross_entropy_with_logits(prediction, target)


@_full_precision
def weighted_bce(prediction: Tensor, target: Tensor, pos_weight: float = 5.0) -> Tensor:
    """Binary cross entropy of logits in which the object's pixels count more: -(w t log p + (1 - t) log(1 - p)), w =
    `pos_weight`, mean over all pixels. What report 4 meant to try next."""
    return F.binary_cross_entropy_with_logits(prediction, target, pos_weight=prediction.new_full((), pos_weight))


@_full_precision
def focal(prediction: Tensor, target: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss of logits: alpha_t (1 - p_t)^gamma BCE, mean over all pixels, where p_t is the probability given to the
    truth and alpha_t is alpha on the object and 1 - alpha beside it. What is right already hardly counts.

    Lin et al., Focal Loss for Dense Object Detection, 2017.
    """
    cross_entropy = F.binary_cross_entropy_with_logits(prediction, target, reduction="none")
    missing = -torch.expm1(-cross_entropy)  # 1 - p_t
    return ((alpha * target + (1 - alpha) * (1 - target)) * missing**gamma * cross_entropy).mean()


@_of_probability
def tversky(prediction: Tensor, target: Tensor, a: float = 0.3, b: float = 0.7) -> Tensor:
    """Tversky loss of logits, per picture: 1 - (I + 1) / (I + a FP + b FN + 1), with I = sum pt, FP = sum p (1 - t) and
    FN = sum (1 - p) t; then the mean over the batch.

    b above a: to miss a pixel of the object is worse than to take one too many. a = b = 1/2 is Dice (but for the 1), a = b
    = 1 intersection over union. Salehi et al., Tversky Loss Function for Image Segmentation, 2017.
    """
    overlap = (prediction * target).sum((1, 2, 3))
    false_positive, false_negative = prediction.sum((1, 2, 3)) - overlap, target.sum((1, 2, 3)) - overlap
    return (1 - (overlap + 1) / (overlap + a * false_positive + b * false_negative + 1)).mean()


@_full_precision
def lovasz(prediction: Tensor, target: Tensor) -> Tensor:
    """Lovasz hinge of logits, per picture, then the mean over the batch: the hinge errors max(0, 1 - z (2t - 1)), sorted
    from the largest, each times what its pixel, when wrong too, takes off the intersection over union.

    Berman et al., The Lovasz-Softmax Loss, 2018.
    """
    truth, logits = target.flatten(1), prediction.flatten(1)
    errors, order = (1 - logits * (2 * truth - 1)).sort(1, descending=True)
    truth = truth.gather(1, order)
    size = truth.sum(1, keepdim=True)
    jaccard = 1 - (size - truth.cumsum(1)) / (size + (1 - truth).cumsum(1))  # lost once the first k pixels are wrong
    steps = torch.cat([jaccard[:, :1], jaccard.diff(dim=1)], 1)
    return (errors.relu() * steps).sum(1).mean()


# Of mask and depth alike: of the mask they are given the probability.


@_full_precision
def l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error over all pixels."""
    return F.l1_loss(prediction, target)


@_full_precision
def rmse(prediction: Tensor, target: Tensor) -> Tensor:
    """Root of the mean squared error of a picture, then the mean over the batch. The 1e-12 under the root keeps the gradient
    of a perfect picture from being 0 / 0."""
    return ((prediction - target).square().mean((1, 2, 3)) + 1e-12).sqrt().mean()


@_full_precision
def dice(prediction: Tensor, target: Tensor) -> Tensor:
    """Dice loss, per picture: 1 - (2 sum pt + 1) / (sum p + sum t + 1), then the mean over the batch.

    The 1 keeps an empty mask, predicted empty, from costing anything. Milletari et al., V-Net, 2016, without the squares.
    On depth, as report 4 tried it, it misleads: for a truth that is neither 0 nor 1 the least value is not at the truth, but
    where far pixels are pushed to 1 and near ones to 0.
    """
    both, total = (prediction * target).sum((1, 2, 3)), (prediction + target).sum((1, 2, 3))
    return (1 - (2 * both + 1) / (total + 1)).mean()


@functools.cache
def _ssim_window(device: torch.device) -> Tensor:
    # Made once: to bring it to the GPU in every step would be to wait for it in every step.
    gauss = torch.exp(-((torch.arange(11, dtype=torch.float32) - 5) ** 2) / (2 * 1.5**2))
    return (gauss / gauss.sum()).view(1, 1, 1, 11).to(device)


@_full_precision
def _ssim_per_picture(prediction: Tensor, target: Tensor) -> Tensor:
    """Structural similarity (N,) of pictures in [0, 1]: Gaussian window 11, sigma 1.5, K .01 and .03, valid windows only.

    Wang et al., Image Quality Assessment: From Error Visibility to Structural Similarity, 2004.
    """
    height, width = prediction.shape[2:]
    if min(height, width) < 11:
        raise ValueError(f"SSIM looks at windows of 11 x 11 pixels; these pictures are {height} x {width}. Use larger ones.")
    return msssim_ssim(prediction, target, data_range=1, size_average=False, win=_ssim_window(prediction.device))


def ssim(prediction: Tensor, target: Tensor) -> Tensor:
    """(1 - SSIM) / 2, in [0, 1]. Raises ValueError for pictures smaller than the window of 11 pixels."""
    return ((1 - _ssim_per_picture(prediction, target)) / 2).mean()


mask_dice = _of_probability(dice)


def bce_dice(prediction: Tensor, target: Tensor) -> Tensor:
    """Cross entropy, which is smooth everywhere, plus Dice, which does not care how small the object is (report 2)."""
    return bce(prediction, target) + mask_dice(prediction, target)


# Of depth alone: d predicted, g true, both in [0, 1].


@_full_precision
def huber(prediction: Tensor, target: Tensor, delta: float = 0.1) -> Tensor:
    """Huber loss, mean over all pixels: e^2 / 2 for errors |e| up to delta, then delta (|e| - delta / 2). Outliers pull no
    harder than `delta`; the usual delta of 1 would never be reached by depth in [0, 1]."""
    return F.huber_loss(prediction, target, delta=delta)


@_full_precision
def berhu(prediction: Tensor, target: Tensor) -> Tensor:
    """BerHu loss, Huber reversed, mean over all pixels: |e| up to c, then (e^2 + c^2) / (2c), with c a fifth of the largest
    error in the batch. Laina et al., Deeper Depth Prediction with Fully Convolutional Residual Networks, 2016."""
    error = (prediction - target).abs()
    c = (0.2 * error.detach().max()).clamp_min(1e-6)  # 0 / 0 for a perfect batch otherwise
    if dist.is_initialized() and prediction.requires_grad:  # in training the batch is that of all processes
        dist.all_reduce(c, dist.ReduceOp.MAX)
    return torch.where(error <= c, error, (error.square() + c**2) / (2 * c)).mean()


@_full_precision
def silog(prediction: Tensor, target: Tensor) -> Tensor:
    """Scale-invariant logarithmic loss, per picture: root of mean q^2 - (mean q)^2 / 2 with q = log d - log g; then the mean
    over the batch. To be wrong by one factor everywhere costs half (of the square) of what the same errors cost at random.

    Both depths are clamped to at least 1/255, the first grey level, and 1e-12 stands under the root for the gradient's sake.
    Eigen et al., Depth Map Prediction from a Single Image, 2014, with the root of later papers.
    """
    q = prediction.clamp_min(1 / 255).log() - target.clamp_min(1 / 255).log()
    return (q.square().mean((1, 2, 3)) - q.mean((1, 2, 3)).square() / 2 + 1e-12).sqrt().mean()


@_full_precision
def gradient(prediction: Tensor, target: Tensor) -> Tensor:
    """Spatial gradient loss: mean over all pixels of |dy(d) - dy(g)| + |dx(d) - dx(g)|, forward differences, the last row
    and column counting 0. It compares edges and slopes, and does not see a constant offset."""
    error = prediction - target
    return (error.diff(dim=2).abs().sum() + error.diff(dim=3).abs().sum()) / error.numel()


def densedepth(prediction: Tensor, target: Tensor) -> Tensor:
    """0.1 L1 + (1 - SSIM) / 2 + gradient. Alhashim and Wonka, High Quality Monocular Depth Estimation, 2018 (reports 2, 5)."""
    return 0.1 * l1(prediction, target) + ssim(prediction, target) + gradient(prediction, target)


def l1_ssim_gradient(prediction: Tensor, target: Tensor) -> Tensor:
    """L1 + (1 - SSIM) / 2 + gradient, each with weight 1 (report 2)."""
    return l1(prediction, target) + ssim(prediction, target) + gradient(prediction, target)


# Every loss: (prediction, target) -> scalar tensor. For a mask the prediction is logits, for depth it is depth in [0, 1]. In
# training both may come in half precision: begin a loss of your own with `.float()`.
Loss = Callable[[Tensor, Tensor], Tensor]
MASK_LOSSES: dict[str, Loss] = {
    "bce": bce,
    "weighted_bce": weighted_bce,
    "l1": _of_probability(l1),
    "rmse": _of_probability(rmse),
    "dice": mask_dice,
    "tversky": tversky,
    "focal": focal,
    "lovasz": lovasz,
    "ssim": _of_probability(ssim),
    "bce_dice": bce_dice,
}
DEPTH_LOSSES: dict[str, Loss] = {
    loss.__name__: loss for loss in (l1, rmse, huber, berhu, ssim, gradient, dice, silog, l1_ssim_gradient, densedepth)
}


class TaskLoss(nn.Module):
    """loss(mask_logits, depth, mask_true, depth_true), a scalar: see `task_loss`."""

    def __init__(self, mask_loss: str | None, depth_loss: str | None, depth_weight: float | str):
        super().__init__()
        self.mask_loss = MASK_LOSSES[mask_loss] if mask_loss is not None else None
        self.depth_loss = DEPTH_LOSSES[depth_loss] if depth_loss is not None else None
        self.depth_weight = depth_weight
        self.terms = torch.zeros(2)  # of the last call, the mask's and the depth's: to say which of them went wrong
        if depth_weight == "learned":
            self.log_variances = nn.Parameter(torch.zeros(2))

    def forward(self, mask_logits: Tensor, depth: Tensor, mask_true: Tensor, depth_true: Tensor) -> Tensor:
        nothing = depth.new_zeros(())
        mask_term = self.mask_loss(mask_logits, mask_true) if self.mask_loss is not None else nothing
        depth_term = self.depth_loss(depth, depth_true) if self.depth_loss is not None else nothing
        self.terms = torch.stack([term.detach().float() for term in (mask_term, depth_term)])
        if self.depth_weight == "learned":
            terms = torch.stack([mask_term, depth_term])
            return (terms * (-self.log_variances).exp() + self.log_variances).sum()
        return mask_term + self.depth_weight * depth_term


def task_loss(mask_loss: str | None, depth_loss: str | None, depth_weight: float | str = 1.0) -> TaskLoss:
    """Joins a mask loss and a depth loss by name: loss(mask_logits, depth, mask_true, depth_true) is the mask's plus
    `depth_weight` times the depth's. One of the names may be None, to train the other task alone.

    With `depth_weight` "learned" the loss has two parameters of its own, s and t, to be trained with the network:
    exp(-s) mask + s + exp(-t) depth + t. Kendall et al., Multi-Task Learning Using Uncertainty, 2018.

    Raises ValueError for an unknown name or weight, where both names are None, and for one task with a learned weight.
    """
    if mask_loss is None and depth_loss is None:
        raise ValueError("mask_loss and depth_loss are both None; there would be nothing to train.")
    if mask_loss is not None:
        _known(mask_loss, MASK_LOSSES, "mask loss")
    if depth_loss is not None:
        _known(depth_loss, DEPTH_LOSSES, "depth loss")
    if depth_weight == "learned":
        if mask_loss is None or depth_loss is None:
            raise ValueError("depth_weight is 'learned', which weighs two tasks, but mask_loss or depth_loss is None.")
    elif isinstance(depth_weight, str) or not depth_weight > 0:
        raise ValueError(f"depth_weight is {depth_weight!r}; it can be a number above 0, or 'learned'.")
    return TaskLoss(mask_loss, depth_loss, depth_weight)


@torch.no_grad()
def measure(mask_logits: Tensor, depth: Tensor, mask_true: Tensor, depth_true: Tensor) -> dict[str, Tensor]:
    """Metrics of a batch, one value a sample: a dict of float32 tensors (N,). All arguments are (N, 1, H, W).

    Mask, predicted where the logit is over 0, true where over .5: `iou` = intersection / union and `dice` = 2 intersection
    / (predicted + true), both 1 where both masks are empty; `pixel_accuracy`.
    Depth over all pixels: `rmse`, `mae`, `ssim`. Over the pixels whose true depth g is at least 1/255, with the prediction
    d clamped to at least 1e-3: `abs_rel` = mean |d - g| / g, `log10` = mean |log10 d - log10 g|, and `delta1`, `delta2`,
    `delta3`, the share of pixels with max(d / g, g / d) < 1.25, 1.25^2, 1.25^3 (Eigen et al., Depth Map Prediction, 2014);
    NaN for a sample without such a pixel. Raises ValueError for pictures smaller than SSIM's window of 11 pixels.
    """
    over = (1, 2, 3)
    depth, depth_true = depth.float(), depth_true.float()
    predicted, true = mask_logits > 0, mask_true > 0.5
    both, either = (predicted & true).sum(over), (predicted | true).sum(over)
    error = depth - depth_true
    counted = depth_true >= 1 / 255
    d, g = depth.clamp_min(1e-3), depth_true.clamp_min(1 / 255)
    ratio = torch.maximum(d / g, g / d)

    def mean_counted(values: Tensor) -> Tensor:
        return (values * counted).sum(over) / counted.sum(over)

    return {
        "iou": torch.where(either > 0, both / either, 1.0),
        "dice": torch.where(either > 0, 2 * both / (both + either), 1.0),
        "pixel_accuracy": (predicted == true).float().mean(over),
        "rmse": error.square().mean(over).sqrt(),
        "mae": error.abs().mean(over),
        "abs_rel": mean_counted((d - g).abs() / g),
        "log10": mean_counted((d.log10() - g.log10()).abs()),
        **{f"delta{k}": mean_counted((ratio < 1.25**k).float()) for k in (1, 2, 3)},
        "ssim": _ssim_per_picture(depth, depth_true),
    }


class Baseline(nn.Module):
    """What needs no network, in a network's clothes: the mask is where the two pictures differ by more than `threshold`
    (the largest over the colours, in 1/255), the depth is `mean_depth` (1, 1, H, W) whatever the pictures show."""

    def __init__(self, threshold: int, mean_depth: Tensor):
        super().__init__()
        self.threshold = threshold
        self.register_buffer("mean_depth", mean_depth)

    def forward(self, bg: Tensor, fg_bg: Tensor) -> tuple[Tensor, Tensor]:
        difference = 255 * (fg_bg - bg).abs().amax(1, keepdim=True)
        return difference - self.threshold - 0.5, self.mean_depth.expand(len(bg), -1, -1, -1)


def baselines(ds: ZipDataset, train: np.ndarray) -> Baseline:
    """The two baselines that every result stands beside, fitted to the training samples: the threshold with the best mean
    IoU, and the mean depth map. What comes back is used like a network, by `evaluate` and the pictures too."""
    depth_sum = iou_sum = 0.0
    for indices in np.array_split(train, max(1, len(train) // 256)):
        batch = ds.batch(indices)
        depth_sum = depth_sum + batch["depth"].double().sum(0, keepdim=True)
        difference = (batch["fg_bg"].short() - batch["bg"].short()).abs().amax(1).long().flatten(1)
        mask = batch["mask"].flatten(1).float()
        # For each picture and difference 0, 1 ... 255 the pixels (and those of the object) that differ by so much; summed
        # up, those that differ by no more. What remains lies above the threshold.
        pixels = torch.zeros(len(indices), 256).scatter_add(1, difference, torch.ones_like(mask)).cumsum(1)
        inside = torch.zeros(len(indices), 256).scatter_add(1, difference, mask).cumsum(1)
        size, predicted = mask.sum(1, keepdim=True), mask.shape[1] - pixels
        union = predicted + inside
        iou_sum = iou_sum + torch.where(union > 0, (size - inside) / union, 1.0).sum(0)
    return Baseline(int(iou_sum.argmax()), (depth_sum / len(train) / 255).float()).to(DEVICE)


# ---------- Runs: a Config says everything, a folder holds everything -------------------------------------------------

# Fused, an optimiser's step is one kernel on a GPU, and with float16 does not wait for the scaler. A CPU gains nothing by it.
FUSED = DEVICE.type == "cuda"
OPTIMIZERS = {
    "sgd": functools.partial(torch.optim.SGD, momentum=0.9, fused=FUSED),
    "rmsprop": torch.optim.RMSprop,
    "adam": functools.partial(torch.optim.Adam, fused=FUSED),
    "adamw": functools.partial(torch.optim.AdamW, fused=FUSED),
}


def _one_cycle(optimizer: torch.optim.Optimizer, lr: float, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    # RMSprop has no momentum here; a cycle of it would bring it in.
    has_momentum = "betas" in optimizer.defaults or optimizer.defaults.get("momentum", 0) > 0
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps + 1, cycle_momentum=has_momentum)


SCHEDULES = {
    "constant": lambda optimizer, lr, steps: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
    "step": lambda optimizer, lr, steps: torch.optim.lr_scheduler.StepLR(optimizer, -(-steps // 3), gamma=0.1),
    "plateau": lambda optimizer, lr, steps: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=2),
    "onecycle": _one_cycle,
}
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Results = dict[str, dict[str, float]]  # part of the split -> metric -> mean over its pictures


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a run's result, but for the device, which precision "auto" looks at. (`cache` and
    `checkpoint_minutes` decide nothing of it.)

    `Config(name="first", epochs=2)` runs on the sample.

    Raises ValueError for a name or value that is not known, with the known ones.
    """

    name: str  # the run's folder below the workspace; may have parts, as in "losses/dice"
    data: str = ""  # a zip's path; empty: what data_zip() finds
    depth_near: str = "dark"  # or "bright", in the zip's depth pictures
    size: int = 64  # pixels a side
    split: str = "unseen"  # or "image"
    defects: str = "stop"  # at the first damaged or missing file; or "leave_out" the samples that need one, saying which
    subset: int = 0  # only so many of the samples, as ZipDataset.subset chooses them; 0: all
    max_train: int = 0  # of these, at most so many training samples, drawn at random; 0: all
    max_test: int = 0  # the same for each part that is measured
    model: str = "resunet"
    mask_loss: str | None = "bce_dice"  # None trains depth alone
    depth_loss: str | None = "densedepth"  # None trains the mask alone
    depth_weight: float | str = 1.0  # of the depth loss beside the mask loss, or "learned"
    optimizer: str = "adamw"  # see OPTIMIZERS
    lr: float = 1e-3  # the schedule's highest
    weight_decay: float = 1e-2  # as AdamW means it; with the others it is L2 on the gradient, where 1e-4 is usual
    schedule: str = "onecycle"  # or "constant"; "step": a tenth after each third; "plateau": a tenth after 3 epochs in vain
    clip_norm: float = 0.0  # the network's gradients are scaled down to this norm; 0: never
    batch_size: int = 16
    epochs: int = 10
    augment: str = "mirror"  # or "none", or several of "mirror", "compose", "colour", "shake", joined by +
    start: str = ""  # weights to begin with, known by their path: of any run, or "imagenet" for resnet18_unet; empty: random
    average: float = 0.0  # of the weights over the steps: what is measured and kept decays by this factor a step; 0: none
    precision: str = "auto"  # or "float32", "bfloat16", "float16"
    cache: str = "auto"  # where decoded pictures are kept, as ZipDataset means it: "gpu", "memory", "disk", "none"
    checkpoint_minutes: float = 5.0  # between checkpoints within an epoch
    seed: int = 0  # of the first weights, the data order and the augmentation

    def __post_init__(self):
        for part in self.name.split("/"):
            if not part.strip(". ") or part != part.strip() or set(part) & set('\\:*?"<>|'):
                expected = "it must be a path of folders below the workspace, such as losses/dice."
                raise ValueError(f"name is {self.name!r}; {expected}")
        _known(self.split, ("unseen", "image"), "split")
        _known(self.defects, ("stop", "leave_out"), "choice of defects")
        _known(self.model, MODELS, "model")
        _known(self.optimizer, OPTIMIZERS, "optimizer")
        _known(self.schedule, SCHEDULES, "schedule")
        augment = str(self.augment).split("+")
        if self.augment != "none" and not set(augment) <= set(AUGMENTATIONS):
            known = ", ".join(AUGMENTATIONS)
            raise ValueError(f"augment is {self.augment!r}; it can be 'none', or one or several of {known}, joined by +.")
        _known(self.precision, ("auto", *PRECISIONS), "precision")
        _known(self.cache, ("auto", *CACHES), "cache")
        _known(self.depth_near, ("dark", "bright"), "depth_near")
        task_loss(self.mask_loss, self.depth_loss, self.depth_weight)
        for field in ("size", "batch_size", "epochs", "lr"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be more than 0.")
        for field in ("subset", "max_train", "max_test", "clip_norm", "weight_decay", "checkpoint_minutes"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be 0 or more.")
        if not 0 <= self.average < 1:
            raise ValueError(f"average is {self.average}; it must be 0 or more, and less than 1.")
        if self.size < 11:
            raise ValueError(f"size is {self.size}; SSIM, one of the metrics, looks at windows of 11 pixels.")
        if "shake" in augment and self.size % 16:
            fit = max(16, round(self.size / 16) * 16)
            raise ValueError(f"size is {self.size}, but augment has shake, which saves JPEG in blocks of 16 pixels. Use {fit}.")

    def save(self, path: str | Path) -> None:
        """Writes it as JSON."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        _write_json(Path(path), dataclasses.asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> "Config":
        """Reads what `save` wrote, or the config.json of a run. Raises ValueError where the file holds no Config."""
        try:
            values = json.loads(Path(path).read_text())
            return cls(**{name: value for name, value in values.items() if name != "fingerprint"})
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


@functools.lru_cache(maxsize=2)
def _open_zip(path: Path, size: int, depth_near: str, subset: int, cache: str, defects: str, changed: int) -> ZipDataset:
    ds = ZipDataset(path, size, depth_near=depth_near, cache=cache, defects=defects)
    return ds.subset(subset) if 0 < subset < len(ds) else ds


def open_zip(
    path: str | Path, size: int = 64, depth_near: str = "dark", subset: int = 0, cache: str = "auto", defects: str = "stop"
) -> ZipDataset:
    """The data set, or at most `subset` samples of it, opened once, so that the runs of one notebook share the pictures that
    are decoded already. The rest is as ZipDataset means it."""
    changed = Path(path).stat().st_mtime_ns if Path(path).exists() else 0  # a file that was written anew is another one
    return _open_zip(Path(path), size, depth_near, subset, cache, defects, changed)


def compute_dtype(precision: str = "auto") -> torch.dtype:
    """What convolutions compute in. "auto" is bfloat16 where the device has it in hardware (GPUs from compute capability 8,
    CPUs with AVX512-BF16), float16 on older GPUs, else float32."""
    if precision != "auto":
        return PRECISIONS[precision]
    if DEVICE.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def autocast(precision: str = "auto") -> torch.autocast:
    """The context of a forward pass in this precision."""
    dtype = compute_dtype(precision)
    return torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32)


def mirror(batch: dict[str, Tensor], draw: Tensor | None = None) -> dict[str, Tensor]:
    """Augmentation: each sample as it is or, for every other on average, all its four pictures mirrored left to right. Those
    whose `draw` (N,), of numbers in [0, 1), is below one half; by default it is drawn here."""
    draw = torch.rand(len(batch["bg"]), device=batch["bg"].device) if draw is None else draw
    flip = draw[:, None, None, None] < 0.5
    return {kind: torch.where(flip, pictures.flip(3), pictures) for kind, pictures in batch.items()}


@functools.cache
def _colour_constants(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """What grey is made of; the identity; the matrix of the cross product with (1, 1, 1)."""
    values = [0.299, 0.587, 0.114], [[1, 0, 0], [0, 1, 0], [0, 0, 1]], [[0, -1, 1], [1, 0, -1], [-1, 1, 0]]
    return [torch.tensor(value, dtype=dtype, device=device) for value in values]


def jitter_colours(batch: dict[str, Tensor], draw: Tensor | None = None) -> dict[str, Tensor]:
    """Augmentation: brightness, contrast and saturation of each sample changed by up to a fifth, its hue by up to a twentieth
    of the circle, in the same way for bg and fg_bg: laid side by side, the two are one picture.

    How much is read from `draw` (N, 4), numbers in [0, 1); by default it is drawn here. All four are linear in the colours
    (Haeberli, Matrix Operations for Image Processing, 1993), so that a batch takes one product of matrices."""
    draw = torch.rand(len(batch["bg"]), 4, device=batch["bg"].device) if draw is None else draw
    brightness, contrast, saturation = (0.8 + 0.4 * draw[:, :3]).T[..., None, None]
    angle = (0.1 * draw[:, 3, None, None] - 0.05) * 2 * math.pi
    grey, same, cross = _colour_constants(draw.device, draw.dtype)
    hue = angle.cos() * same + (1 - angle.cos()) / 3 + angle.sin() / 3**0.5 * cross  # turns colours round the axis of greys
    colour = brightness * (saturation * same + (1 - saturation) * grey) @ hue
    pairs = torch.cat([batch["bg"], batch["fg_bg"]], 3).permute(0, 2, 3, 1)
    pairs = (pairs.flatten(1, 2) @ colour.mT).view_as(pairs)
    middle = (pairs @ grey).mean((1, 2))[:, None, None, None]
    pairs = (middle + contrast[..., None] * (pairs - middle)).clamp(0, 1)
    bg, fg_bg = pairs.permute(0, 3, 1, 2).chunk(2, 3)
    return batch | {"bg": bg, "fg_bg": fg_bg}


def _warp(
    pictures: Tensor, x: Tensor, y: Tensor, width: Tensor | float = 1.0, height: Tensor | float = 1.0, padding: str = "border"
) -> Tensor:
    """Pictures (N, C, H, W) moved by x and y, shares of the picture, and enlarged in width and height, each (N,); a negative
    width mirrors."""
    if not len(pictures):  # as a process's share of the last batch may be; affine_grid refuses that
        return pictures
    zero = torch.zeros_like(x)
    theta = torch.stack([zero + 1 / width, zero, -2 * x / width, zero, zero + 1 / height, -2 * y / height], 1)
    grid = F.affine_grid(theta.view(-1, 2, 3), pictures.shape, align_corners=False)
    return F.grid_sample(pictures, grid, padding_mode=padding, align_corners=False)


def compose(batch: dict[str, Tensor], draw: Tensor | None = None) -> dict[str, Tensor]:
    """Augmentation: new pictures from known parts. Every other sample keeps its object, which is mirrored or not, made smaller
    or larger by up to a quarter and moved by up to a quarter of the picture, but is put before the next sample's background;
    for half of these, that is the next sample's picture with its object, so that what stands there is not always the object.

    The new depth is the next sample's, and unknown where the object covers it or where it shows an object that is not there
    now: the batch gets a picture `known` (N, 1, H, W), 0 there and 1 elsewhere, and training leaves out the rest. An object's
    outermost pixels are a mixture with the background that it came from: outside of the mask, what it changed there is added
    to the new background.

    `draw` (N, 6), numbers in [0, 1), decides; by default it is drawn here."""
    draw = torch.rand(len(batch["bg"]), 6, device=batch["bg"].device) if draw is None else draw
    chosen, busy = (column[:, None, None, None] < 0.5 for column in draw[:, :2].T)
    scale = 0.75 + 0.5 * draw[:, 3]
    move = *(draw[:, 4:] - 0.5).T / 2, torch.where(draw[:, 2] < 0.5, -scale, scale), scale
    cut_out = _warp(batch["fg_bg"], *move)  # what the picture's edge cuts through is not darker there
    change = torch.cat([batch["fg_bg"] - batch["bg"], batch["mask"]], 1)
    change, mask = _warp(change, *move, padding="zeros").split((3, 1), 1)
    mask = (mask > 0.5).float()
    rim = F.max_pool2d(mask, 3, 1, padding=1) - mask
    after = {kind: pictures.roll(-1, 0) for kind, pictures in batch.items()}
    bg = torch.where(busy, after["fg_bg"], after["bg"])
    known = (1 - mask) * torch.where(busy, 1, 1 - after["mask"])
    fg_bg = torch.where(mask > 0, cut_out, (bg + rim * change).clamp(0, 1))
    new = {"bg": bg, "fg_bg": fg_bg, "mask": mask, "depth": after["depth"], "known": known}
    old = batch | {"known": torch.ones_like(known)}
    return {kind: torch.where(chosen, new[kind], old[kind]) for kind in old}


# Tables K.1 and K.2 of the JPEG standard (ITU-T T.81): how coarsely each frequency of a block is kept at quality 50.
_JPEG_LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_JPEG_CHROMA = ((17, 18, 24, 47), (18, 21, 26, 66), (24, 26, 56, 99), (47, 66, 99, 99))  # 99 beyond


@functools.cache
def _jpeg_constants(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """The cosines of an 8 x 8 block; the two tables (2, 8, 8); the matrix from RGB to luma and two colour differences; its
    inverse."""
    k = torch.arange(8, dtype=torch.double)
    cosines = torch.cos(math.pi * (2 * k + 1) * k[:, None] / 16) / 2
    cosines[0] /= 2**0.5
    tables = torch.stack([torch.tensor(_JPEG_LUMA), F.pad(torch.tensor(_JPEG_CHROMA), (0, 4, 0, 4), value=99)])
    colours = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]).double()
    return [constant.to(device, dtype) for constant in (cosines, tables, colours, colours.inverse())]


def jpeg(pictures: Tensor, quality: Tensor) -> Tensor:
    """Pictures (N, 3, H, W) in [0, 1] as they come out of a JPEG file of this quality (N,), 1 to 100, with colours at half the
    size; computed on the device. H and W are multiples of 16 (else ValueError)."""
    if pictures.shape[2] % 16 or pictures.shape[3] % 16:
        raise ValueError(f"JPEG has blocks of 16 pixels: {pictures.shape[2]} x {pictures.shape[3]} do not divide by that.")
    cosines, tables, colours, back = _jpeg_constants(pictures.device, pictures.dtype)
    percent = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality)
    tables = ((tables * percent.view(-1, 1, 1, 1) + 50) / 100).floor().clamp(1, 255)

    def code(plane: Tensor, table: Tensor) -> Tensor:
        n, channels, height, width = plane.shape
        blocks = plane.reshape(n, channels, height // 8, 8, width // 8, 8).transpose(3, 4)
        table = table[:, None, None, None]
        blocks = cosines.T @ ((cosines @ blocks @ cosines.T / table).round() * table) @ cosines
        return blocks.transpose(3, 4).reshape(plane.shape)

    planes = torch.einsum("cd,ndhw->nchw", colours, 255 * pictures)
    luma = code(planes[:, :1] - 128, tables[:, 0]) + 128
    chroma = F.interpolate(code(F.avg_pool2d(planes[:, 1:], 2), tables[:, 1]), scale_factor=2, mode="bilinear")
    planes = torch.cat([luma, chroma], 1)
    return (torch.einsum("cd,ndhw->nchw", back, planes) / 255).clamp(0, 1)


def shake(batch: dict[str, Tensor], draw: Tensor | None = None, noise: Tensor | None = None) -> dict[str, Tensor]:
    """Augmentation: what happens between two shots with a camera in hand. Each of these to three samples in ten: `bg` is moved
    by up to 2.5 pixels of 192; its light changes by up to 12 %, that of a colour by up to 4 % more; a soft shadow falls on
    `fg_bg`, which takes up to half of the light; both get noise of up to 3 %; both are saved as JPEG, of qualities 25 to 95. A
    network that has never seen this takes everything for the object where the background is slightly off (Lin et al.,
    Real-Time High-Resolution Background Matting, 2020, train against the same). H and W are multiples of 16 (else ValueError).

    `draw` (N, 17), numbers in [0, 1), and `noise` (N, 6, H, W), of deviation 1, decide; by default they are drawn here."""
    bg, fg_bg = batch["bg"], batch["fg_bg"]
    n, _, height, width = bg.shape
    draw = torch.rand(n, 17, device=bg.device) if draw is None else draw
    noise = torch.randn(n, 6, height, width, device=bg.device) if noise is None else noise
    moves, relights, shades, roughens, codes = (draw[:, :5] < 0.3).T[..., None, None, None]
    draw, column = draw[:, 5:], draw[:, 5:, None, None]
    bg = torch.where(moves, _warp(bg, *(draw[:, :2].T - 0.5) * 5 / 192), bg)
    light = 1 + 0.24 * (column[:, 2:3] - 0.5) + 0.08 * (column[:, 3:6] - 0.5)
    bg = torch.where(relights, (bg * light).clamp(0, 1), bg)
    y, x = (torch.linspace(0, 1, side, device=bg.device) for side in (height, width))
    away = ((x[None, None, None] - column[:, 6:7]) / 0.2) ** 2 + ((y[None, None, :, None] - column[:, 7:8]) / 0.1) ** 2
    fg_bg = torch.where(shades, fg_bg * (1 - 0.5 * column[:, 8:9] * (-away).exp()), fg_bg)
    pair = torch.cat([bg, fg_bg], 1)
    pair = torch.where(roughens, (pair + 0.03 * column[:, 9:10] * noise).clamp(0, 1), pair)
    bg, fg_bg = (torch.where(codes, jpeg(one, 25 + 70 * draw[:, 10 + k]), one) for k, one in enumerate(pair.split(3, 1)))
    return batch | {"bg": bg, "fg_bg": fg_bg}


AUGMENTATIONS = ("mirror", "compose", "colour", "shake")  # in the order in which they are done


# ---------- Runs: several processes, and batches made ahead ------------------------------------------------------------


def _processes() -> tuple[int, int]:
    """The number of this process among those that train together, and how many these are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _prefetch(function: Callable, items: Iterable, most: int = 2) -> Iterator:
    """function(item) for each item in turn, done by a thread that is up to `most` items ahead."""
    threads, gpu = torch.get_num_threads(), torch.cuda.current_device() if DEVICE.type == "cuda" else None

    def begin() -> None:  # a new thread has neither this one's number of threads nor its GPU
        torch.set_num_threads(threads)
        if gpu is not None:
            torch.cuda.set_device(gpu)

    with ThreadPoolExecutor(1, initializer=begin) as thread:
        coming = collections.deque()
        for item in items:
            coming.append(thread.submit(function, item))
            if len(coming) > most:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


class _AllReduce(torch.autograd.Function):
    """The sum over all processes; the gradient of it is the sum of all gradients."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _AllReduce.apply(grad)


class SyncBatchNormCPU(nn.BatchNorm2d):
    """Batch norm over the batches of all processes, as one process would have it. On CPUs, where torch's own cannot be used."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        values = x.to(self.weight.dtype)
        sums = torch.cat([values.sum((0, 2, 3)), values.new_tensor([x.numel() / x.shape[1]])])
        total = _AllReduce.apply(sums)
        mean, count = total[:-1] / total[-1], total[-1]
        centred = values - mean[:, None, None]
        variance = _AllReduce.apply(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def _sync_batch_norm(model: nn.Module) -> nn.Module:
    """The network with batch norms that look at the batches of all processes."""
    if DEVICE.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = SyncBatchNormCPU
    return model


EVALUATED = 32  # samples of a batch that is measured


@torch.no_grad()
def evaluate(
    model: nn.Module, ds: ZipDataset, indices: np.ndarray, loss: Callable[..., Tensor] | None = None, precision: str = "auto"
) -> dict[str, np.ndarray]:
    """All metrics of `measure` for each of the samples, and `mask_area`, the share of pixels that it takes for the object:
    arrays of len(indices). With a loss also `loss`, which is the same for all samples of a batch of 32: take its mean, a
    single value says little. The model is left in evaluation mode. Where several processes train together, each calls this,
    measures its share of the batches, and receives it all."""
    model.eval()
    process, processes = _processes()
    batches, measured = np.split(indices, range(EVALUATED, len(indices), EVALUATED)), []
    for batch in _prefetch(functools.partial(ds.batch, device=DEVICE), batches[process::processes]):
        batch = to_float(batch, DEVICE)
        with autocast(precision):
            outputs = model(batch["bg"], batch["fg_bg"])
        values = measure(*outputs, batch["mask"], batch["depth"])
        values["mask_area"] = (outputs[0] > 0).float().mean((1, 2, 3))
        if loss is not None:
            values["loss"] = loss(*outputs, batch["mask"], batch["depth"]).expand(len(batch["bg"]))
        measured.append(values)
    measured = [{name: values.cpu() for name, values in batch.items()} for batch in measured]
    if processes > 1:
        shares = [None] * processes
        dist.all_gather_object(shares, measured)
        measured = [shares[k % processes][k // processes] for k in range(len(batches))]
    return {name: torch.cat([values[name] for values in measured]).numpy() for name in measured[0]}


def _means(values: dict[str, np.ndarray]) -> dict[str, float]:
    """Means over the samples. Of the ratios of depths those samples are left out in which no pixel counts (NaN)."""
    means = {}
    for name, of in values.items():
        ratio = name.startswith(("abs_rel", "log10", "delta")) and np.isfinite(of).any()
        means[name] = float(np.nanmean(of) if ratio else np.mean(of))
    return means


def score(model: nn.Module, ds: ZipDataset, parts: dict[str, np.ndarray], precision: str = "auto") -> Results:
    """Means over the pictures: part -> metric -> value. Parts without samples are left out."""
    return {part: _means(evaluate(model, ds, some, precision=precision)) for part, some in parts.items() if len(some)}


def parts_of(config: Config, ds: ZipDataset) -> dict[str, np.ndarray]:
    """The split that a run of this Config uses, cut to its `max_train` and `max_test`. Raises ValueError where it leaves no
    samples to train or to validate on."""
    parts = split(ds, config.split)
    for part, indices in parts.items():
        most = config.max_train if part == "train" else config.max_test
        if most and len(indices) > most:
            parts[part] = np.sort(np.random.default_rng(0).permutation(indices)[:most])
    for part in ("train", "valid"):
        if not len(parts[part]):
            raise ValueError(f"{ds.path}: of its {len(ds)} samples, split {config.split!r} leaves none for {part}. Use more.")
    return parts


def run(config: Config, stop_after: int | None = None, quiet: bool = False) -> Run:
    """Trains, or goes on, or reads: whatever is left to do for this Config.

    The run lives in the folder `<workspace>/<name>/`. Where it is not there, it is started; cut off at whatever moment, it goes
    on from its last checkpoint, on a CPU to the same result as if it never had been, on a GPU up to rounding; finished, it is
    read and nothing is trained. A checkpoint is written after each epoch, every `config.checkpoint_minutes` within one, and
    when the stop button is pressed. Where the workspace is on Drive, the run lives in `work_folder()` and copies go to Drive.
    In it: `config.json`; `metrics.csv`, a row an epoch; `timing.csv`, the seconds, apart because no two runs share them;
    `checkpoint.pt`, all that is needed to go on, and until the run is finished `checkpoint_before.pt`, in case that one is
    damaged; `best.pt`, the weights of the least validation loss; `results.json`, the metrics of those weights on all but the
    training samples, once finished; and `images/epoch_NNN/`, for four training and four test samples the inputs, the truth
    and the predictions.

    Several processes that accelerate has started train together: `batch_size` is that of all, the result that of one process up
    to rounding (a loss of your own that looks at a whole batch at once, and `compose`, see a process's share of it), and the
    first alone writes. All need the same workspace.

    Args:
        config: what to do.
        stop_after: leave off after this many epochs, as if cut off there.
        quiet: no line for each epoch, and no progress bar.

    Raises:
        ValueError: the folder holds a run of another Config or other data (the differences are named); the network cannot
            take the size; a loss is not finite (which, and of which samples).
        OSError: the weights to start with are not there, or cannot be downloaded.
        RuntimeError: another notebook or program is at this run.
        MemoryError: a batch does not fit into memory; the message says what to set.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # started by accelerate, as one of several
        accelerate.PartialState(cpu=DEVICE.type == "cpu")
    process, processes = _processes()
    quiet = quiet or process > 0
    local_first = accelerate.PartialState().local_main_process_first if processes > 1 else contextlib.nullcontext
    folder = work_folder() / config.name
    with _alone(config.name) if process == 0 else contextlib.nullcontext():
        with local_first():  # what goes to the local disk, the others find there
            ds = open_zip(data_zip(config.data), config.size, config.depth_near, config.subset, config.cache, config.defects)
        parts = parts_of(config, ds)
        settings = dataclasses.asdict(config) | {"fingerprint": ds.fingerprint}
        _refuse_another(_settings(folder), settings)
        if (folder / "results.json").exists():
            if not quiet:
                print(f"{config.name}: finished before, read from its folder")
        else:
            with _own_random_numbers(config.seed):
                training = _Training(config, ds, parts, folder, settings, quiet)
                if process == 0:
                    folder.mkdir(parents=True, exist_ok=True)
                    _write_json(folder / "config.json", settings)
                with local_first():
                    training.go_on()
                    place = ds.place
                if not quiet:
                    print(f"{config.name}: {place}")
                last = config.epochs if stop_after is None else min(stop_after, config.epochs)
                while len(training.history) < last:
                    with _StopButton() as stop:
                        training.epoch(stop)
                if len(training.history) == config.epochs:
                    training.finish()
                _wait_for_all()
        finished = read_run(folder)
        if process == 0 and finished.results and (said := _collapse(finished)):
            tqdm.write(f"{config.name}: {said}")
    return finished


def _refuse_another(theirs: dict | None, settings: dict) -> None:
    """Raises ValueError where a run of these settings is there already, and they are others than those of this one."""
    mine = _decisive(settings)
    changes = [f"{key} was {was!r} and is {mine.get(key)!r}" for key, was in (theirs or {}).items() if mine.get(key) != was]
    if changes:
        remedy = f"Take another name, or remove it with discard({mine['name']!r})."
        raise ValueError(f"The run {mine['name']!r} exists, but {', '.join(changes)}. {remedy}")


def _decisive(settings: dict) -> dict:
    """Those that decide a run's result. Data are known by their content, not by their path."""
    return {key: value for key, value in settings.items() if key not in ("data", "cache", "checkpoint_minutes")}


def _settings(folder: Path) -> dict | None:
    """What decides the result of the run in a folder, with the defaults of what its config.json does not name. None where there
    is no run."""
    if not _is_there(folder / "config.json"):
        return None
    try:
        return _decisive(dataclasses.asdict(Config("any")) | json.loads((folder / "config.json").read_text()))
    except (TypeError, ValueError) as error:
        remedy = "Delete it, and run the same Config again: the checkpoint knows whether that is the same"
        raise ValueError(f"{folder / 'config.json'} is damaged ({error}). {remedy}.") from error


@contextlib.contextmanager
def _locked(name: str) -> Iterator[None]:
    """Keeps other notebooks and programs away from a run, by a lock that goes with the process."""
    folder = (work_folder() / name).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise RuntimeError(f"Another notebook or program is at the run {name!r}. Wait for it, or take another name.") from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _alone(name: str) -> Iterator[None]:
    """Keeps all others away from a run, on this machine and, by a note on Drive, on others. Brings from Drive what is further
    there. Raises RuntimeError where another is at it."""
    with _locked(name):
        copies = _copies()
        try:
            if copies:
                copies.begin(name)
            yield
        finally:
            if copies:
                copies.end(name)


def _collapse(run: Run) -> str:
    """A sentence where the mask of a run's best epoch is all black or all white, whatever the pictures show."""
    best = min(run.history, key=lambda row: row["valid_loss"], default={})
    area = best.get("valid_mask_area", math.nan)
    if run.config.mask_loss is None or not (area > 0.999 or (area < 0.001 and best["valid_iou"] < 0.01)):
        return ""
    advice = "It has not been learned: try more epochs, a smaller lr or another mask loss, under another name."
    return f"its mask is all {'white' if area > 0.5 else 'black'} on the validation pictures. {advice}"


class _Training:
    """A run under way: what is trained, with what, how far it has come. To be used within `_own_random_numbers`.

    Everything random in an epoch depends on seed and epoch alone, and what has been drawn of it goes into each checkpoint,
    which makes going on exact.
    """

    def __init__(self, config: Config, ds: ZipDataset, parts: dict[str, np.ndarray], folder: Path, settings: dict, quiet: bool):
        self.config, self.ds, self.parts, self.folder, self.quiet = config, ds, parts, folder, quiet
        self.settings = _decisive(settings)  # what the checkpoint is checked against
        self.process, self.processes = _processes()
        self.model = MODELS[config.model]().to(DEVICE, memory_format=torch.channels_last)
        if hasattr(self.model, "stride"):
            check_size(self.model, config.size, config.size)
        if not (folder / "checkpoint.pt").exists():  # else what the run began with may be gone
            _begin(self.model, config)
        if self.processes > 1:
            self.model = _sync_batch_norm(self.model)
        self.average = copy.deepcopy(self.model) if config.average else nn.Module()
        self.measured = self.average if config.average else self.model
        steps = -(-len(parts["train"]) // config.batch_size) * config.epochs
        self.loss = task_loss(config.mask_loss, config.depth_loss, config.depth_weight).to(DEVICE)
        groups = [{"params": self.model.parameters()}]
        if config.depth_weight == "learned":
            groups.append({"params": self.loss.parameters(), "weight_decay": 0.0})
        self.optimizer = OPTIMIZERS[config.optimizer](groups, lr=config.lr, weight_decay=config.weight_decay)
        self.schedule = SCHEDULES[config.schedule](self.optimizer, config.lr, steps)
        self.scaler = torch.amp.GradScaler(DEVICE.type, enabled=compute_dtype(config.precision) == torch.float16)
        self.step = _Step(self.model, self.loss, config.precision)
        if self.processes > 1:  # with one task alone, one decoder is not used
            alone = None in (config.mask_loss, config.depth_loss)
            self.step = nn.parallel.DistributedDataParallel(self.step, find_unused_parameters=alone)
        # Learned weights change from epoch to epoch; epochs are compared by weights that do not.
        fixed_weight = 1.0 if config.depth_weight == "learned" else config.depth_weight
        self.valid_loss = task_loss(config.mask_loss, config.depth_loss, fixed_weight)
        # Pictures are kept of the same few samples of the training and of the hardest test part, in every epoch.
        kept_parts = ("train", hardest_part([part for part, indices in parts.items() if len(indices)]))
        self.watched = {part: parts[part][np.linspace(0, len(parts[part]) - 1, 4).astype(int)] for part in kept_parts}
        self.history, self.seconds, self.best = [], [], {}
        self.sound = True  # whether checkpoint.pt, if it is there, can be read
        self.within = None  # what the last checkpoint says about the epoch that it was written in
        self.checkpoint_at = time.monotonic() + 60 * config.checkpoint_minutes

    def _parts(self) -> dict:
        names = ("model", "average", "loss", "optimizer", "schedule", "scaler")
        return {name: getattr(self, name) for name in names}

    def go_on(self) -> None:
        """Takes up the last checkpoint that is sound, if there is one; a line says which are not."""
        checkpoint = None
        for file in (self.folder / "checkpoint.pt", self.folder / "checkpoint_before.pt"):
            if checkpoint is None and file.exists():
                try:
                    checkpoint = _load_state(file)
                    if not checkpoint.keys() >= {"model", "optimizer", "history"}:
                        raise ValueError(f"{file} is no checkpoint of a run.")
                except (OSError, ValueError) as error:
                    checkpoint, self.sound = None, False
                    if self.process == 0:
                        tqdm.write(f"{self.config.name}: {error} Goes on from before that.")
        if checkpoint is None:
            if not self.sound:
                for model in (self.model, self.measured):
                    _begin(model, self.config)
                if self.process == 0:
                    tqdm.write(f"{self.config.name}: No checkpoint is left. Begins anew.")
            return
        _refuse_another(checkpoint.get("settings"), self.settings)
        for group in checkpoint["optimizer"]["param_groups"]:
            if "fused" in group:
                group["fused"] = FUSED  # as this device has it, not the one of the checkpoint
        try:
            for name, part in self._parts().items():
                if checkpoint.get(name):  # a scaler that is off has no state, nor has a loss with fixed weights
                    part.load_state_dict(checkpoint[name])
        except (RuntimeError, ValueError) as error:
            what = f"The checkpoint in {self.folder} is of another network than {self.config.model!r} is now"
            raise ValueError(f"{what}. Take another name, or remove it with discard({self.config.name!r}).") from error
        self.history, self.seconds = checkpoint["history"], checkpoint["seconds"]
        self.best, self.within = checkpoint.get("best", {}), checkpoint.get("within")
        if self.process == 0:
            if self.best:
                _save(self.folder / "best.pt", self.best)
            _write_tables(self.folder, self.history, self.seconds)  # one that was cut off after the checkpoint lacks a row
        if not self.quiet:
            print(f"{self.config.name}: goes on after {self._reached()}")

    def _reached(self) -> str:
        """How far the last checkpoint is."""
        if self.within is None:
            return f"epoch {len(self.history)}"
        return f"batch {self.within['done']} of epoch {len(self.history) + 1}"

    def save(self, within: dict | None = None) -> None:
        """Writes a checkpoint, in the midst of an epoch with what that needs, else with the tables; and has it copied."""
        if self.process == 0:
            states = {name: part.state_dict() for name, part in self._parts().items()}
            about = {name: getattr(self, name) for name in ("history", "seconds", "best", "settings")} | {"within": within}
            before = self.folder / "checkpoint_before.pt" if self.sound else None  # a damaged one is not worth it
            _save(self.folder / "checkpoint.pt", states | about, before)
            if within is None:
                _write_tables(self.folder, self.history, self.seconds)  # never ahead of the checkpoint
            keep(self.folder)
        self.sound, self.within, self.checkpoint_at = True, within, time.monotonic() + 60 * self.config.checkpoint_minutes

    def epoch(self, stop: "_StopButton") -> None:
        """Trains for an epoch, or what is left of it; measures; and writes it all down."""
        config, epoch = self.config, len(self.history) + 1
        with _explain_out_of_memory(config, config.batch_size):
            lr, train_loss, seconds = self._train(stop)
        with _explain_out_of_memory(config):
            values = evaluate(self.measured, self.ds, self.parts["valid"], self.valid_loss, config.precision)
        wrong = self.parts["valid"][~np.isfinite(values["loss"])]
        if len(wrong):
            self._stop(f"the validation loss of epoch {epoch} is not finite", wrong)
        valid = _means(values)
        self.seconds.append(seconds)
        self.history.append({"epoch": epoch, "lr": lr, "train_loss": train_loss})
        self.history[-1] |= {f"valid_{name}": value for name, value in valid.items()}
        if config.depth_weight == "learned":
            self.history[-1]["depth_weight"] = (self.loss.log_variances[0] - self.loss.log_variances[1]).exp().item()
        if config.schedule == "plateau":
            self.schedule.step(valid["loss"])
        if self.process == 0:
            pictures = self.folder / "images" / f"epoch_{epoch:03}"
            _save_images(pictures, self.measured, self.ds, self.watched, config.precision)
            if valid["loss"] <= min(row["valid_loss"] for row in self.history):
                self.best = {name: tensor.cpu().clone() for name, tensor in self.measured.state_dict().items()}
                _save(self.folder / "best.pt", self.best)
        self.save()
        if not self.quiet:
            means = f"loss {valid['loss']:.3f}  IoU {valid['iou']:.3f}  RMSE {valid['rmse']:.3f}"
            speed = f"({len(self.parts['train']) / seconds:.0f} images/s)"
            print(f"{config.name}  epoch {epoch}/{config.epochs}  loss {train_loss:.3f}  valid: {means}  {speed}")

    def finish(self) -> None:
        """Measures the best weights on all parts of the split but `train`."""
        _wait_for_all()  # the best weights are written by one and read by all
        tests = {part: indices for part, indices in self.parts.items() if part != "train"}
        with _explain_out_of_memory(self.config):
            results = score(load_model(self.folder), self.ds, tests, self.config.precision)
        if self.process == 0:
            (self.folder / "checkpoint_before.pt").unlink(missing_ok=True)
            _write_json(self.folder / "results.json", results)

    def _train(self, stop: "_StopButton") -> tuple[float, float, float]:
        """One pass over the training samples; gives the learning rate at its start, the mean loss and the seconds.

        With one GPU, the loop waits for it at every 50th batch alone (and with RMSprop in float16). Of n processes, each takes
        every n-th sample of a batch; what is random is drawn for the whole batch, and the losses are weighted so that their
        mean is that of one process.
        """
        config, model, optimizer, process, processes = self.config, self.model, self.optimizer, self.process, self.processes
        epoch, within, indices = len(self.history) + 1, self.within, self.parts["train"]
        augment = config.augment.split("+")
        self.step.train()
        if within is None:
            _seed(config.seed * 1_000_003 + epoch)
            order, lr = indices[torch.randperm(len(indices)).numpy()], optimizer.param_groups[0]["lr"]
            within = {"order": torch.from_numpy(order), "lr": lr, "done": 0, "shares": [], "seconds": 0.0}
        else:
            order = within["order"].numpy()
            _set_random_states(within["shares"][process % len(within["shares"])]["random"])
        started = time.perf_counter() - within["seconds"]
        batches = np.split(order, range(config.batch_size, len(order), config.batch_size))
        share = slice(process, None, processes)
        ahead = _prefetch(lambda batch: self.ds.batch(batch[share], DEVICE), batches[within["done"] :])
        # Summed and kept on the device: to read each value would wait for the GPU.
        total = sum((one["total"] for one in within["shares"][process::processes]), torch.zeros(())).to(DEVICE)
        terms = torch.zeros(len(batches), 2, device=DEVICE)
        look = 50 if DEVICE.type == "cuda" or processes > 1 else 1
        show = {"disable": True} if self.quiet else {}  # else the environment variable TQDM_DISABLE decides
        about = {"desc": f"epoch {epoch}/{config.epochs}", "unit": " images", "leave": False, "mininterval": 1}
        about |= {"initial": sum(map(len, batches[: within["done"]])), "file": sys.stdout}
        with tqdm(total=len(order), **about, **show) as bar:
            for done, (whole, batch) in enumerate(zip(batches[within["done"] :], ahead, strict=True), within["done"] + 1):
                batch = to_float(batch, DEVICE)
                if "mirror" in augment:
                    batch = mirror(batch, torch.rand(len(whole), device=DEVICE)[share])
                if "compose" in augment:
                    batch = compose(batch, torch.rand(len(whole), 6, device=DEVICE)[share])
                if "colour" in augment:
                    batch = jitter_colours(batch, torch.rand(len(whole), 4, device=DEVICE)[share])
                if "shake" in augment:
                    noise = torch.randn(len(whole), 6, config.size, config.size, device=DEVICE)
                    batch = shake(batch, torch.rand(len(whole), 17, device=DEVICE)[share], noise[share])
                counted = len(batch["bg"])
                loss = self.step(batch)
                optimizer.zero_grad()
                self.scaler.scale(loss * (counted * processes / len(whole))).backward()
                if config.clip_norm:
                    self.scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
                self.scaler.step(optimizer)
                self.scaler.update()
                if config.schedule != "plateau":
                    with warnings.catch_warnings():  # where float16 overflows, the scaler rightly skips the optimiser's step
                        warnings.filterwarnings("ignore", "Detected call of .lr_scheduler")
                        self.schedule.step()
                if config.average:
                    _average_into(self.average, model, config.average, (epoch - 1) * len(batches) + done)
                total += loss.detach() * counted
                terms[done - 1] = self.loss.terms
                bar.update(len(whole))
                if done % look and done < len(batches) and not stop.asked:
                    continue
                self._check(terms[:done], batches)
                due = stop.asked or done == len(batches) or self._due()
                if due:
                    self._check_weights(batches[done - 1], done)
                if due and (stop.asked or done < len(batches)):
                    shares = [{"total": total.cpu(), "random": _random_states()}]
                    if processes > 1:
                        shares *= processes
                        dist.all_gather_object(shares, shares[process])
                    self.save(within | {"done": done, "shares": shares, "seconds": time.perf_counter() - started})
                    if stop.asked and not self.quiet:
                        tqdm.write(f"{config.name}: stopped after {self._reached()}; run it again to go on")
                    stop.end_if_asked()
        if processes > 1:
            dist.all_reduce(total)
        return within["lr"], total.item() / len(order), time.perf_counter() - started

    def _due(self) -> bool:
        """Whether it is time for a checkpoint, by the clock of the first process."""
        due = torch.tensor(time.monotonic() >= self.checkpoint_at, device=DEVICE)
        if self.processes > 1:
            dist.broadcast(due, 0)
        return due.item()

    def _check(self, terms: Tensor, batches: Sequence[np.ndarray]) -> None:
        """Stops where one of the losses (batches, 2) is not finite."""
        if self.processes > 1:  # all stop, and name the same
            terms = terms.clone()
            dist.all_reduce(terms)
        wrong = (~terms.isfinite()).nonzero()
        if len(wrong):
            k, task = wrong[0].tolist()
            name = f"{KINDS[2 + task]} loss ({(self.config.mask_loss, self.config.depth_loss)[task]})"
            what = f"the {name} of batch {k + 1} of epoch {len(self.history) + 1} is {terms[k, task].item()}"
            self._stop(what, batches[k])

    def _check_weights(self, samples: np.ndarray, batch: int) -> None:
        """Stops where a weight is not finite, before a checkpoint has it. After each step it would cost a twentieth of that."""
        weights = [*self.model.state_dict().values(), *self.loss.state_dict().values()]
        if not all(tensor.isfinite().all() for tensor in weights):
            self._stop(f"a weight is not finite after batch {batch} of epoch {len(self.history) + 1}", samples)

    def _stop(self, what: str, samples: np.ndarray) -> None:
        names = ", ".join(self.ds.name(i) for i in samples[:8]) + (f" and {len(samples) - 8} more" if len(samples) > 8 else "")
        stands = f"The run stands as after {self._reached()}; try a smaller lr, under another name."
        raise ValueError(f"{self.config.name}: {what}. Its samples: {names}. {stands}")


@torch.no_grad()
def _average_into(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Moves the running average of weights and statistics on by a step. At first over few steps, so that the random weights of
    the start are soon forgotten."""
    decay = min(decay, step / (step + 9))
    for kept, new in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if kept.is_floating_point():
            kept.lerp_(new, 1 - decay)
        else:
            kept.copy_(new)


class _StopButton:
    """Within it, the stop button of a notebook (or the system's request to end) waits for the step under way, which it would
    tear apart, and for a checkpoint. Several processes, which would have to agree on the step, end at once."""

    def __init__(self):
        self.asked, self._before = None, {}

    def __enter__(self) -> "_StopButton":
        if threading.current_thread() is threading.main_thread() and not dist.is_initialized():  # where signals arrive
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, error: type | None, *_: object) -> None:
        self._give_back()
        if error is None:
            self.end_if_asked()

    def _note(self, number: int, frame: object) -> None:
        self.asked = number
        self._give_back()  # a second press ends at once

    def _give_back(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def end_if_asked(self) -> None:
        number, self.asked = self.asked, None  # a handler of the caller's may let the run go on
        if number == signal.SIGTERM and (copies := _copies()):
            copies.wait(20)  # the checkpoint should be on Drive before the machine goes
        if number is not None:
            signal.raise_signal(number)


def _begin(model: nn.Module, config: Config) -> None:
    """Gives the network the weights of `config.start`. Raises ValueError where they are another network's."""
    if config.start == "imagenet":
        if not hasattr(model, "load_imagenet"):
            able = ", ".join(name for name, make in MODELS.items() if hasattr(make, "load_imagenet"))
            raise ValueError(f"start is 'imagenet', but {config.model} has no encoder of ImageNet's. Take {able}.")
        model.load_imagenet()
    elif config.start:
        found = load_model(config.start)
        theirs, own = ({name: part.shape for name, part in one.state_dict().items()} for one in (found, model))
        if theirs != own:
            what = f"start is {config.start!r}, which holds a {type(found).__name__}, and model is {config.model!r}"
            raise ValueError(f"{what}. Give weights of that network.")
        model.load_state_dict(found.state_dict())


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _random_states() -> dict:
    """The states of the random numbers of torch, numpy and Python, in types that are safe to load."""
    name, numbers, *rest = np.random.get_state()
    gpu = torch.cuda.get_rng_state() if DEVICE.type == "cuda" else None
    numpy_state = (name, numbers.tolist(), *rest)
    return {"torch": torch.get_rng_state(), "gpu": gpu, "numpy": numpy_state, "python": random.getstate()}


def _set_random_states(states: dict) -> None:
    torch.set_rng_state(states["torch"])
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])
    if states["gpu"] is not None and DEVICE.type == "cuda":
        torch.cuda.set_rng_state(states["gpu"])


@contextlib.contextmanager
def _own_random_numbers(seed: int) -> Iterator[None]:
    """Random numbers that begin with the seed; afterwards the caller's go on as if nothing had been drawn."""
    before = _random_states()
    _seed(seed)
    try:
        yield
    finally:
        _set_random_states(before)


def _wait_for_all() -> None:
    if dist.is_initialized():
        accelerate.PartialState().wait_for_everyone()


def run_all(configs: dict[str, Sequence[Config]]) -> dict[str, list[Run]]:
    """`run` for lists of Configs, such as one for each seed, with one progress bar over them all. Of a finished run the
    checkpoint is deleted, and the pictures of all epochs but the last: those of a long list would fill a Drive."""
    process = int(os.environ.get("RANK", 0))
    show = {"disable": True} if process > 0 else {}
    runs = {label: [] for label in configs}
    with tqdm(total=sum(map(len, configs.values())), unit=" runs", leave=False, file=sys.stdout, **show) as bar:
        for label, several in configs.items():
            for config in several:
                bar.set_postfix_str(config.name)
                done = run(config, quiet=True)
                if process == 0:
                    (done.folder / "checkpoint.pt").unlink(missing_ok=True)
                    for epoch in sorted((done.folder / "images").glob("epoch_*"))[:-1]:
                        shutil.rmtree(epoch)
                    keep(done.folder)
                runs[label].append(done)
                bar.update()
    return runs


def read_run(folder: str | Path) -> Run:
    """The run in this folder, as far as it has come. Raises FileNotFoundError where there is none, ValueError where a file
    of it is damaged."""
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} holds no run (no config.json). Give the folder that run() made.")
    config, results = Config.load(folder / "config.json"), folder / "results.json"
    try:
        history, timing = (_read_table(folder / name) for name in ("metrics.csv", "timing.csv"))
        seconds = [row["seconds"] for row in timing]
        return Run(config, folder, history, seconds, json.loads(results.read_text()) if results.exists() else {})
    except (KeyError, TypeError, ValueError) as error:
        which = "metrics.csv, timing.csv or results.json"
        remedy = "Delete results.json and run the same Config again, which makes all three anew"
        raise ValueError(f"{folder}: {which} is damaged ({error}). {remedy}.") from error


def discard(name: str) -> None:
    """Deletes a run, or another folder of the workspace, and its copy on Drive. Raises RuntimeError where another notebook is
    at the run, OSError where Drive does not answer."""
    with _locked(name):
        if (work_folder() / name).exists():
            shutil.rmtree(work_folder() / name)
        if copies := _copies():
            copies.discard(name)


def _read_table(path: Path) -> list[dict[str, float]]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


class _Step(nn.Module):
    """What a training step computes before it goes backward, in one module: that is what several processes share."""

    def __init__(self, model: nn.Module, loss: nn.Module, precision: str):
        super().__init__()
        self.model, self.loss, self.precision = model, loss, precision

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        # Of an empty share, torch's SyncBatchNorm sends sums in its input's type; the others expect float32.
        with autocast(self.precision if len(batch["bg"]) else "float32"):
            mask_logits, depth = self.model(batch["bg"], batch["fg_bg"])
        depth_true = batch["depth"]
        if "known" in batch:  # elsewhere the prediction counts as right
            depth_true = torch.where(batch["known"] > 0, depth_true, depth.detach().to(depth_true.dtype))
        pictures = (mask_logits, depth, batch["mask"], depth_true)
        if not len(depth):  # the last batch left nothing for this process: a black picture, which counts nothing
            pictures = [F.pad(some, (0, 0, 0, 0, 0, 0, 0, 1)) for some in pictures]
        return self.loss(*pictures)


@contextlib.contextmanager
def _explain_out_of_memory(config: Config, batch_size: int = 0) -> Iterator[None]:
    """Turns the error of memory that does not suffice into a sentence that helps: in training with this batch size, or in
    measuring, where it is fixed."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        told = ("can't allocate memory", "out of memory", "ALLOC_FAILED")  # by the CPU, by CUDA and by its libraries
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not any(text in str(error) for text in told):
            raise
        where = "the GPU's memory" if DEVICE.type == "cuda" else "memory"
        batch = f"A batch of {batch_size or EVALUATED} samples of {config.size} x {config.size} pixels"
        smaller = f"batch_size to {batch_size // 2}" if batch_size > 1 else "a smaller size or another model"
        what = f"{batch}{'' if batch_size else ' to measure'} does not fit into {where}"
        raise MemoryError(f"{config.name}: {what}. Set {smaller}, under another name, or cache to 'none'.") from error


def _save(path: Path, state: dict, before: Path | None = None) -> None:
    """Writes what `_load_state` reads. The file takes its place once it has been read back; the one that was there becomes
    `before`."""
    with _replacing(path, before) as part:
        with open(part, "wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # of a large file this is all that it says of a disk that is full
                raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
            file.flush()
            os.fsync(file.fileno())
        _load_state(part)


def _load_state(path: Path) -> dict:
    """What torch.save wrote, if it is a dict of tensors and plain values, whose every byte is checked. Raises ValueError where
    the file is damaged or something else, above all code."""
    try:
        if zipfile.is_zipfile(path):  # as files of PyTorch have been since version 1.6
            with zipfile.ZipFile(path) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError("it is compressed, which files of PyTorch never are")
                if damaged := archive.testzip():
                    raise ValueError(f"the checksum of {damaged} differs")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what it refuses
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of junk torch.load raises many kinds
        no_access = isinstance(error, FileNotFoundError | PermissionError | MemoryError)
        if no_access or "can't allocate memory" in str(error):  # which says nothing of what is in the file
            raise
        if code := "" if isinstance(error, OSError) else _code_in(path):
            raise ValueError(f"{path} is refused: to load it would run code ({code}). Weights need none.") from error
        reason = "it has another form" if isinstance(error, pickle.UnpicklingError) else str(error).partition("\n")[0]
        raise ValueError(f"{path} is damaged, or no file of weights ({reason}).") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} is no file of weights, but of one {type(state).__name__}.")
    return state


def _code_in(path: Path) -> str:
    """The first thing in a pickle, or in a file of PyTorch, that is neither a tensor nor a plain value; read, not run."""
    needed = re.compile(r"(torch|torch\._utils|torch\.storage|torch\.nn\.parameter|collections)\.\w+")
    texts = collections.deque(maxlen=2)
    try:
        with zipfile.ZipFile(path) as archive:
            entry = next(entry for entry in archive.infolist() if entry.filename.endswith("data.pkl"))
            pickled = b"" if entry.compress_type else archive.read(entry)  # compressed, it might grow without end
    except Exception:  # of a damaged zip there are many kinds too
        pickled = path.read_bytes()
    stream = io.BytesIO(pickled)
    with contextlib.suppress(Exception):  # where what was a pickle ends; old files of PyTorch hold several
        while True:
            for code, value, _ in pickletools.genops(stream):
                if code.name in ("GLOBAL", "INST"):
                    found = value.replace(" ", ".")
                else:
                    found = ".".join(texts) if code.name == "STACK_GLOBAL" else ""
                    texts.extend([value] if isinstance(value, str) else [])
                if found and not needed.fullmatch(found):
                    return found
    return ""


def _write_json(path: Path, values: dict) -> None:
    with _replacing(path) as part:
        part.write_text(json.dumps(values, indent=1))


def _write_tables(folder: Path, history: list[dict[str, float]], seconds: list[float]) -> None:
    timing = [{"epoch": row["epoch"], "seconds": s} for row, s in zip(history, seconds, strict=True)]
    for name, rows in (("metrics", history), ("timing", timing)):
        with _replacing(folder / f"{name}.csv") as part, open(part, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0] if rows else ["epoch"])
            writer.writeheader()
            writer.writerows(rows)


# ---------- Prediction: any two photos ---------------------------------------------------------------------------------


WEIGHTS = ROOT / "assets" / "difference_unet.pt"  # come with the project; trained on drawn scenes alone, at 192 pixels


def load_model(weights: str | Path = "") -> nn.Module:
    """A trained network, ready to predict, in float32. Its attribute `name` is that in MODELS, and `size` the size in pixels at
    which it was trained.

    Args:
        weights: the folder of a run, its best.pt, or any file with the state dict of a network in MODELS, such as
            `save_weights` writes. Which network it is and its size stand in the config.json beside it; without one, the
            names and shapes of its tensors tell, and the size is 192. A relative path may start at the project. Empty:
            WEIGHTS, which come with the project.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no weights, or those of another network.
    """
    path = Path(weights or WEIGHTS)
    path = _found(path) or path
    path = path / "best.pt" if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file. Give the folder of a run, or a file of weights.")
    state = _load_state(path)
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} is no file of weights alone, as torch.save(model.state_dict()) writes them.")
    shapes = {name: tensor.shape for name, tensor in state.items()}
    beside = path.with_name("config.json")
    config = Config.load(beside) if beside.exists() else None
    with torch.device("meta"):  # shapes without numbers
        known = {name: {key: tensor.shape for key, tensor in make().state_dict().items()} for name, make in MODELS.items()}
    fitting = [name for name in known if known[name] == shapes]
    if not fitting:
        raise ValueError(f"{path} holds the weights of a network that is not known here. Known: {', '.join(MODELS)}.")
    if config and config.model not in fitting:
        raise ValueError(f"{path} holds the weights of {fitting[0]}, and not of {config.model}, as {beside} says.")
    name = config.model if config else fitting[0]
    model = MODELS[name]().to(DEVICE, memory_format=torch.channels_last)
    model.load_state_dict(state)
    model.name, model.size = name, config.size if config else 192
    return model.eval()


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Writes a network's weights in half precision, as a state dict that `load_model` reads: half the size, each number
    rounded to 11 binary digits (below 6e-5 to multiples of 6e-8). Raises ValueError where one is too large for that, or not
    finite."""
    state = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    for name, value in state.items():
        if not value.isfinite().all():
            most = torch.finfo(torch.half).max
            raise ValueError(f"{name} holds numbers beyond {most:g}, the largest in half precision. Use torch.save instead.")
    _save(Path(path), state)


@torch.no_grad()
def predict(model: nn.Module, bg: Tensor, fg_bg: Tensor, size: int | None = None) -> tuple[Tensor, Tensor]:
    """The mask, 0 or 1, and the depth, in [0, 1], of pictures of any size: two tensors (N, 1, H, W) as large as `fg_bg`, on
    DEVICE, where the model goes too. Raises ValueError for a `size` that the network's strides do not divide.

    Args:
        model: a network, of `load_model` for instance.
        bg, fg_bg: float tensors (N, 3, H, W) in [0, 1]. The two may differ in size.
        size: the network sees them at size x size pixels; by default at its `size`, or else at 192.
    """
    model.to(DEVICE).eval()
    size = size or getattr(model, "size", 192)
    small = [resize(pictures.to(DEVICE), [size, size], antialias=True) for pictures in (bg, fg_bg)]
    mask_logits, depth = model(*small)
    enlarge = functools.partial(F.interpolate, size=fg_bg.shape[2:], mode="bilinear", antialias=True)
    return (enlarge(mask_logits) > 0).float(), enlarge(depth).clamp(0, 1)


class Mirrored(nn.Module):
    """Asks a network twice, about two pictures and about their mirror images, and gives the mean of both answers. It errs less,
    and takes twice the time. `predict` and `evaluate` take it like any network."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.size = network, getattr(network, "size", 192)

    def forward(self, bg: Tensor, fg_bg: Tensor) -> tuple[Tensor, Tensor]:
        answers, mirrored = self.network(bg, fg_bg), self.network(bg.flip(3), fg_bg.flip(3))
        mask_logits, depth = ((one + other.flip(3)) / 2 for one, other in zip(answers, mirrored, strict=True))
        return mask_logits, depth


class Prediction(NamedTuple):
    """What `predict_images` gives: the files that it wrote, and a figure of it all."""

    mask_file: Path
    depth_file: Path
    figure: plt.Figure


def predict_images(weights: str | Path, bg: str | Path, image: str | Path, folder: str | Path | None = None) -> Prediction:
    """From two photos, of a background and of the same place with an object, the object's mask and the scene's depth, by the
    network that `load_model` makes of the weights: empty takes those that come with the project.

    Writes `<image>_mask.png` and `<image>_depth.png`, grey, of the image's size, where 255 is the object and the far end,
    into the folder, by default the image's. The photos may be of any size and format, but of one shape.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is no picture or no weights; the photos differ in shape.
    """
    model, image = load_model(weights), Path(image)
    photos = [pil_to_tensor(open_photo(path)) for path in (bg, image)]
    (bg_height, bg_width), (height, width) = (photo.shape[1:] for photo in photos)
    if abs(bg_width * height / (bg_height * width) - 1) > 0.02:
        shapes = f"{bg} has {bg_width} x {bg_height} pixels and {image} {width} x {height}"
        raise ValueError(f"{shapes}: not the same view. Take both photos from one place, and cut them alike.")
    mask, depth = (pictures[0].cpu() for pictures in predict(model, *(photo[None].float() / 255 for photo in photos)))
    folder = image.parent if folder is None else Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{image.stem}_{kind}.png" for kind in ("mask", "depth")]
    for picture, file in zip((mask, depth), files, strict=True):
        _save_picture(picture, file)
    return Prediction(*files, _show_four(dict(zip(KINDS, (*photos, mask, depth), strict=True))))


class _Exported(nn.Module):
    """A network with outputs that say what they are and need no knowledge of its loss."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, bg: Tensor, fg_bg: Tensor) -> dict[str, Tensor]:
        mask_logits, depth = self.network(bg, fg_bg)
        return {"mask": mask_logits.sigmoid(), "depth": depth}


def export(weights: str | Path, folder: str | Path, size: int | None = None) -> tuple[Path, Path]:
    """Writes a trained network for use without this project, named as in MODELS: `<network>.onnx`, which ONNX Runtime runs, and
    `<network>.pt2`, of which `torch.export.load(file).module()` makes a function, in this version of PyTorch. Gives the two.

    Both take `bg` and `fg_bg`, float32 (N, 3, H, W) in [0, 1], and give `mask`, the probability that a pixel is of the object,
    and `depth`, 0 at the near end and 1 at the far end, both float32 (N, 1, H, W); the second gives them as a dict. N is free.
    So are H and W, as multiples of the network's stride, from twice the stride on; best is the size at which it was trained.
    The files hold no path of this machine.

    Args:
        weights: what `load_model` takes.
        size: fixes H and W at so many pixels, for programs that need to know.

    Raises:
        ImportError: a package is missing, and which.
        ValueError: the weights are none; the size is none that the network takes.
    """
    if missing := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
        raise ImportError(f"To export, {' and '.join(missing)} must be there: pip install {' '.join(missing)}")
    model = load_model(weights)
    stride = getattr(model, "stride", 1)
    if size is not None and (size < stride or size % stride):
        fits = max(stride, round(size / stride) * stride)
        raise ValueError(f"size is {size}; {model.name} takes pictures of a multiple of {stride} pixels. Use {fits}.")
    shape = {0: torch.export.Dim("batch")}
    if size is None:  # a size of one stride would be a case of its own: what is left of it at the bottom is a single pixel
        shape |= {axis: stride * torch.export.Dim(name, min=2) for axis, name in ((2, "h"), (3, "w"))}
    example = torch.zeros(2, 2, 3, size or 2 * stride, size or 3 * stride)  # free sizes must not be 1, nor alike by chance
    model.requires_grad_(False).to("cpu", memory_format=torch.contiguous_format)
    program = torch.export.export(_Exported(model), tuple(example), dynamic_shapes={"bg": shape, "fg_bg": shape})
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # the paths
    onnx = torch.onnx.export(program, dynamo=True, verbose=False, output_names=["mask", "depth"], dynamic_shapes=[shape, None])
    files = tuple(Path(folder) / f"{model.name}.{kind}" for kind in ("onnx", "pt2"))
    files[0].parent.mkdir(parents=True, exist_ok=True)
    with _replacing(files[0]) as part:
        onnx.save(part, external_data=False)
    with _replacing(files[1]) as part, open(part, "wb") as file:
        torch.export.save(program, file)
    return files


PHOTO_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # of the many that Pillow knows, some start other programs


def open_photo(path: str | Path, mode: str = "RGB") -> Image.Image:
    """A photo of a file, the way up that its camera noted; `mode` "RGBA" keeps what is transparent.

    Raises FileNotFoundError where nothing is there, and ValueError for what is no picture or has more than 8 bits a channel.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: there is no such file. Give the path of a photo.")
    try:
        with Image.open(path, formats=PHOTO_FORMATS) as photo:
            if photo.mode.startswith(("I", "F")):
                raise ValueError("it has more than 8 bits a channel")
            return ImageOps.exif_transpose(photo).convert(mode)
    except Exception as error:  # Pillow's decoders raise many kinds
        raise ValueError(f"{path} cannot be read as a picture ({error}). Save it anew as JPEG or PNG, or remove it.") from error


# ---------- Pictures --------------------------------------------------------------------------------------------------

PART_COLOURS = {  # of the test parts, in the order of every figure and table
    "test_seen": "#0173b2",
    "test_new_bg": "#029e73",
    "test_new_fg": "#de8f05",
    "test_new_both": "#cc3311",
    "test": "#cc3311",
}
TITLES = {
    "bg": "background",
    "fg_bg": "with object",
    "mask_predicted": "predicted",
    "mask_error": "wrong",
    "depth_predicted": "predicted",
    "depth_error": "error",
    "iou": "mask IoU",
    "dice": "mask Dice",
    "pixel_accuracy": "pixel accuracy",
    "rmse": "depth RMSE",
    "mae": "depth MAE",
    "abs_rel": "depth abs rel",
    "log10": "depth log10",
    "delta1": "depth δ < 1.25",
    "delta2": "depth δ < 1.25²",
    "delta3": "depth δ < 1.25³",
    "ssim": "depth SSIM",
    "test_seen": "seen",
    "test_new_bg": "new background",
    "test_new_fg": "new object",
    "test_new_both": "new background and object",
}
LOWER_IS_BETTER = ("loss", "rmse", "mae", "abs_rel", "log10")


def _predict_batch(model: nn.Module, ds: ZipDataset, indices: Sequence[int], precision: str = "auto") -> dict[str, Tensor]:
    """The samples as float pictures; beside them `mask_predicted` (0 or 1), `depth_predicted`, their errors, the metrics."""
    batch = to_float(ds.batch(indices), DEVICE)
    with torch.no_grad(), autocast(precision):
        mask_logits, depth = model.eval()(batch["bg"], batch["fg_bg"])
    batch |= measure(mask_logits, depth, batch["mask"], batch["depth"])
    batch |= {"mask_predicted": (mask_logits > 0).float(), "depth_predicted": depth.float()}
    batch |= {f"{kind}_error": (batch[f"{kind}_predicted"] - batch[kind]).abs() for kind in ("mask", "depth")}
    return {name: values.cpu() for name, values in batch.items()}


def _grid(rows: int, columns: int, titles: Sequence[str], side: float = 1.5) -> tuple[plt.Figure, np.ndarray]:
    """A figure of square axes without ticks, with titles above the columns."""
    size = (side * columns, side * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", dpi=90)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for axis, title in zip(axes[0], titles, strict=False):
        axis.set_title(title, fontsize=9)
    return figure, axes


def _draw(axis: plt.Axes, name: str, picture: Tensor) -> plt.cm.ScalarMappable:
    """One picture (C, H, W) of `_predict_batch`: photographs as they are, masks grey, depth and its error in colour maps."""
    colours = "magma" if name == "depth_error" else "gray" if name.startswith("mask") else "viridis"  # not used for RGB
    top = 0.5 if name == "depth_error" else 1
    return axis.imshow(picture.permute(1, 2, 0).squeeze(-1).numpy(), cmap=colours, vmin=0, vmax=top, interpolation="nearest")


def show_samples(ds: ZipDataset, indices: Sequence[int]) -> plt.Figure:
    """A column a sample: background, picture with object, mask, depth with its colour bar."""
    batch = to_float(ds.batch(indices))
    figure, axes = _grid(len(KINDS), len(indices), [ds.name(i) for i in indices])
    for kind, row in zip(KINDS, axes, strict=True):
        row[0].set_ylabel(TITLES.get(kind, kind), fontsize=9)
        for axis, picture in zip(row, batch[kind], strict=True):
            drawn = _draw(axis, kind, picture)
    figure.colorbar(drawn, ax=axes[-1, :], label="near → far", fraction=0.05, pad=0.01)
    return figure


def _show_four(pictures: dict[str, Tensor]) -> plt.Figure:
    """The four kinds of one sample beside each other, in the shape that they have."""
    height, width = pictures["mask"].shape[1:]
    size = (12, min(0.5 + 3 * height / width, 8))
    figure, axes = plt.subplots(1, 4, figsize=size, layout="constrained", dpi=90)
    for axis, (kind, picture) in zip(axes, pictures.items(), strict=True):
        drawn = _draw(axis, kind, picture)
        axis.set_title(TITLES.get(kind, kind), fontsize=9)
        axis.axis("off")
    figure.colorbar(drawn, ax=axes[-1], label="near → far", fraction=0.05, pad=0.02)
    return figure


def show_predictions(model: nn.Module, ds: ZipDataset, indices: Sequence[int], precision: str = "auto") -> plt.Figure:
    """A row a sample: the two inputs; mask, prediction and where they differ; depth, prediction and the absolute error."""
    batch = _predict_batch(model, ds, indices, precision)
    names = ("bg", "fg_bg", "mask", "mask_predicted", "mask_error", "depth", "depth_predicted", "depth_error")
    figure, axes = _grid(len(indices), len(names), [TITLES.get(name, name) for name in names])
    for i, row in enumerate(axes):
        drawn = [_draw(axis, name, batch[name][i]) for axis, name in zip(row, names, strict=True)]
        row[0].set_ylabel(ds.name(indices[i]), fontsize=7)
        row[3].set_xlabel(f"IoU {batch['iou'][i]:.3f}", fontsize=8)
        row[6].set_xlabel(f"RMSE {batch['rmse'][i]:.3f}", fontsize=8)
    for kind, label in ((6, "depth: near → far"), (7, "depth error")):
        figure.colorbar(drawn[kind], ax=axes, label=label, fraction=0.02, pad=0.005, shrink=0.9)
    return figure


def compare_predictions(
    models: dict[str, nn.Module], ds: ZipDataset, indices: Sequence[int], kinds: Sequence[str] = ("mask", "depth")
) -> plt.Figure:
    """A row a sample and kind: the picture, the truth, and the prediction of each network in a column of its own."""
    batches = [_predict_batch(model, ds, indices) for model in models.values()]
    side = 1.5 if len(models) < 8 else 1.2
    figure, axes = _grid(len(kinds) * len(indices), 2 + len(models), ("input", "truth", *models), side)
    for row, (i, kind) in zip(axes, itertools.product(range(len(indices)), kinds), strict=True):
        metric, title = ("iou", "IoU") if kind == "mask" else ("rmse", "RMSE")
        photo = "fg_bg" if kind == kinds[0] else "bg"  # with two rows a sample, there is room for both photos
        _draw(row[0], photo, batches[0][photo][i])
        drawn = _draw(row[1], kind, batches[0][kind][i])
        for axis, batch in zip(row[2:], batches, strict=True):
            _draw(axis, kind, batch[f"{kind}_predicted"][i])
            axis.set_xlabel(f"{title} {batch[metric][i]:.3f}", fontsize=8)
    if "depth" in kinds:
        figure.colorbar(drawn, ax=axes, label="depth: near → far", location="bottom", fraction=0.03, pad=0.01, aspect=50)
    return figure


def _several(one: object) -> list:
    """The runs, or results, of several seeds as they are, and a single one as a list."""
    return list(one) if isinstance(one, (list, tuple)) else [one]


def plot_history(runs: dict[str, Run | Sequence[Run]], metrics: Sequence[str] = ("loss", "iou", "rmse")) -> plt.Figure:
    """A panel a metric, a curve a run, over the epochs, on the validation samples; dashed: the loss in training. Of several
    seeds the curve is the mean, with a band from the least to the greatest."""
    figure, axes = plt.subplots(1, len(metrics), figsize=(4 * len(metrics), 3), layout="constrained", dpi=80)
    colours = plt.get_cmap("tab10" if len(runs) <= 10 else "tab20").colors
    for metric, axis in zip(metrics, np.atleast_1d(axes), strict=True):
        for (label, seeds), colour in zip(runs.items(), itertools.cycle(colours)):
            histories = [one.history for one in _several(seeds)]
            valid = np.array([[row[f"valid_{metric}"] for row in history] for history in histories])
            epochs = np.arange(1, valid.shape[1] + 1)
            axis.plot(epochs, valid.mean(0), marker=".", label=label, color=colour)
            axis.fill_between(epochs, valid.min(0), valid.max(0), color=colour, alpha=0.12, linewidth=0)
            if metric == "loss":
                train = np.array([[row["train_loss"] for row in history] for history in histories])
                axis.plot(epochs, train.mean(0), "--", color=colour, alpha=0.6)
        axis.set(title=TITLES.get(metric, metric), xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    if len(runs) > 1:
        figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def compare_runs(
    results: dict[str, Results | Sequence[Results]], metrics: Sequence[str] = ("iou", "rmse", "delta1")
) -> plt.Figure:
    """A panel a metric, a line a run, a dot for each test part; `results` holds `Run.results` or what `score` gives, or a
    list of them, one a seed: then the dot is the mean, on a bar from the least to the greatest."""
    size = (4 * len(metrics), 1.2 + 0.35 * len(results))
    figure, axes = plt.subplots(1, len(metrics), figsize=size, sharey=True, layout="constrained", dpi=80)
    for metric, axis in zip(metrics, np.atleast_1d(axes), strict=True):
        for cell, colour in PART_COLOURS.items():
            of = [[one[cell][metric] for one in _several(seeds) if cell in one] for seeds in results.values()]
            points = [(np.mean(values), row) for row, values in enumerate(of) if values]
            if points:
                axis.scatter(*zip(*points, strict=True), color=colour, label=TITLES.get(cell, cell), s=30, zorder=3)
            for row, values in enumerate(of):
                if len(values) > 1:
                    axis.hlines(row, min(values), max(values), color=colour, alpha=0.5)
        better = "lower" if metric in LOWER_IS_BETTER else "higher"
        axis.set_title(f"{TITLES.get(metric, metric)} ({better} is better)", fontsize=9)
        axis.set_yticks(range(len(results)), results)
        axis.grid(alpha=0.3)
    axis.set_ylim(len(results) - 0.5, -0.5)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=len(PART_COLOURS), fontsize=8)
    return figure


# Where scripts run (Jupyter and Colab, not GitHub), a click on a column's head sorts the rows by it.
_SORT = """<script>
function sortByColumn(head) {
  const table = head.closest("table"), column = head.cellIndex, down = head.dataset.down = head.dataset.down == "1" ? "" : "1";
  const value = row => { const x = parseFloat(row.cells[column].textContent); return isNaN(x) ? (down ? -1 : 1) * 1e9 : x; };
  [...table.rows].filter(row => row.cells[0].tagName == "TD").sort((a, b) => (down ? -1 : 1) * (value(a) - value(b)))
    .forEach(row => row.parentNode.appendChild(row));
}
</script>"""


def results_table(
    results: dict[str, Results | Sequence[Results]],
    metrics: Sequence[str] = ("iou", "rmse", "delta1"),
    cells: Sequence[str] = tuple(PART_COLOURS),
) -> HTML:
    """A table for a notebook: a row a run, a column for each test part and metric, the best value of a column bold; a click
    on a column's head sorts by it. `results` is as in `compare_runs`; of several seeds it shows the mean ± the standard
    deviation."""
    results = {label: _several(seeds) for label, seeds in results.items()}
    cells = [cell for cell in cells if any(cell in one for seeds in results.values() for one in seeds)]
    head = "".join(f'<th colspan="{len(metrics)}">{TITLES.get(cell, cell)}</th>' for cell in cells)
    names = "".join(f'<th onclick="sortByColumn(this)">{html.escape(TITLES.get(m, m))}</th>' for m in metrics)
    rows = [f"<th></th>{head}", "<th></th>" + len(cells) * names]
    rows += [f"<td>{html.escape(label)}</td>" for label in results]
    for cell, metric in itertools.product(cells, metrics):
        column = [[one[cell][metric] for one in seeds if cell in one] for seeds in results.values()]
        best = (min if metric in LOWER_IS_BETTER else max)(np.mean(values) for values in column if values)
        for i, values in enumerate(column, start=2):
            text = f"{np.mean(values):.3f}" if values else "–"
            text = f"<b>{text}</b>" if values and np.mean(values) == best else text
            rows[i] += f"<td>{text}{f' ± {np.std(values, ddof=1):.3f}' if len(values) > 1 else ''}</td>"
    return HTML(_SORT + "<table>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>")


def _save_picture(picture: Tensor, path: Path) -> None:
    """Writes a picture (C, H, W) with values in [0, 1] in 8 bit."""
    to_pil_image((picture * 255).round().byte()).save(path)


def _save_images(folder: Path, model: nn.Module, ds: ZipDataset, watched: dict[str, np.ndarray], precision: str) -> None:
    """Writes inputs, truth and predictions of the watched samples: single pictures, 8 bit and as the network's values are,
    and `sheet.png` with a row a sample and depth in colours. The folder appears only once it is whole."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    kinds, tiles = ("bg", "fg_bg", "mask", "mask_predicted", "depth", "depth_predicted"), []
    for name, indices in watched.items():
        batch = _predict_batch(model, ds, indices, precision)
        for i, index in enumerate(indices):
            for kind in kinds:
                picture = batch[kind][i]
                _save_picture(picture, part / f"{name}_{ds.name(index)}_{kind}.png")
                if kind.startswith("depth"):
                    picture = torch.from_numpy(plt.get_cmap("viridis")(picture[0].numpy())[..., :3]).permute(2, 0, 1)
                tiles.append(picture.float().expand(3, -1, -1))
    sheet = make_grid(tiles, nrow=len(kinds), padding=2, pad_value=1.0)
    head = Image.new("L", (sheet.shape[2], 12), "white")
    for i, kind in enumerate(kinds):
        ImageDraw.Draw(head).text((i * (ds.size + 2) + 2, 0), kind.replace("_", " "), fill="black")
    _save_picture(torch.cat([(pil_to_tensor(head) / 255).expand(3, -1, -1), sheet], 1), part / "sheet.png")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)


if __name__ == "__main__":  # accelerate launch helpers.py CONFIG.json: a saved Config on all GPUs of one or several machines
    if len(sys.argv) != 2:
        sys.exit("Give the JSON file of one Config: accelerate launch helpers.py CONFIG.json")
    try:
        run(Config.load(sys.argv[1]))
    except (OSError, ValueError, MemoryError) as error:
        sys.exit(str(error))
    if dist.is_initialized():
        dist.destroy_process_group()
