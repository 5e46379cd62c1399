"""How fast samples are read, beside other ways to do it, at 64 and at 192 pixels.

Prints a Markdown table: python tests/benchmarks/loading.py [ZIP] [--cores N] [--helpers FILE]
The zip, by default the project's sample, is of the layouts raguram or modest. On one core times are processor
time; on more, where every way reads with as many threads, they are the clock's. All take turns, and medians
count. The other ways make float pictures, one by one; ours make uint8 batches. `--helpers`: another file.
"""

import os

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # before numpy is imported

import argparse
import importlib.util
import io
import re
import shutil
import statistics
import sys
import tempfile
import time
import warnings
import zipfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torchvision.io import decode_image
from torchvision.transforms import Compose, Resize, ToTensor, v2

ROOT = Path(__file__).resolve().parents[2]
ROUNDS, BATCH, SOME = 5, 64, 512  # the other ways read so many samples


def samples_of(names):
    """The four files of each sample: bg, fg_bg, mask, depth; by the numbers in their names."""
    kinds = defaultdict(dict)
    for name in names:
        numbers = tuple(map(int, re.findall(r"\d+", Path(name).stem)))
        kind = re.search("mask|depth|$", name.split("/")[-2])[0] or ("fg_bg" if len(numbers) > 1 else "bg")
        kinds[kind][numbers] = name
    return [[kinds["bg"][n[:1]], *(kinds[k][n] for k in ("fg_bg", "mask", "depth"))] for n in kinds["mask"]]


def other_ways(archive, size, folder):
    """name -> a function that reads one file of a sample, and which of the four files."""
    usual = Compose([Resize((size, size)), ToTensor()])
    newer = v2.Compose([v2.Resize((size, size), antialias=True), v2.ToDtype(torch.float32, scale=True)])
    content = {}

    def with_pil(name, mode):
        return usual(Image.open(folder / name).convert(mode))

    def with_torchvision(name, mode):
        return newer(decode_image(str(folder / name), "GRAY" if mode == "L" else mode))

    def decoded_alone(name, mode):
        if name not in content:
            content[name] = archive.read(name)
        data = content[name]
        if data[:2] == b"\xff\xd8":
            return simplejpeg.decode_jpeg(data, "GRAY" if mode == "L" else mode)
        return Image.open(io.BytesIO(data)).convert(mode)

    return {
        "four files opened with PIL, Resize, ToTensor": (with_pil, slice(4)),
        "four files with torchvision: decode_image, Resize, ToDtype": (with_torchvision, slice(4)),
        "decoding alone, from memory, neither background nor resizing": (decoded_alone, slice(1, 4)),
    }


def speeds(helpers, path, size, cores, cache):
    clock, times = time.process_time if cores == 1 else time.perf_counter, defaultdict(list)
    archive, pool = zipfile.ZipFile(path), ThreadPoolExecutor(cores)
    with tempfile.TemporaryDirectory() as folder:
        samples = samples_of(sorted(name for name in archive.namelist() if not name.endswith("/")))
        some = np.random.default_rng(0).permutation(samples)[:SOME].tolist()
        archive.extractall(folder, {name for files in some for name in files})
        ways = other_ways(archive, size, Path(folder))
        for round_ in range(ROUNDS + 1):
            for name, (way, files) in ways.items():

                def read(share, way=way, files=files):
                    for sample in share:
                        list(map(way, sample[files], ("RGB", "RGB", "L", "L")[files]))

                start = clock()
                list(pool.map(read, (some[k::cores] for k in range(cores))))
                times[name].append((clock() - start) / len(some))
            shutil.rmtree(cache, ignore_errors=True)
            ds = helpers.ZipDataset(path, size)
            for epoch in ("ours, first epoch", "ours, later epochs"):
                order, start = np.random.default_rng(round_).permutation(len(ds)), clock()
                for first in range(0, len(ds), BATCH):
                    ds.batch(order[first : first + BATCH])
                times[epoch].append((clock() - start) / len(ds))
    shutil.rmtree(cache, ignore_errors=True)
    return {name: 1 / statistics.median(values[1:]) for name, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("zip", nargs="?", default=ROOT / "assets" / "sample.zip", type=Path)
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--helpers", default=ROOT / "helpers.py", type=Path)
    given = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[-given.cores :]))
    os.environ["XDG_CACHE_HOME"] = cache = tempfile.mkdtemp()
    spec = importlib.util.spec_from_file_location("helpers", given.helpers)
    sys.modules["helpers"] = helpers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(helpers)
    torch.set_num_threads(given.cores)
    warnings.filterwarnings("ignore", module="torchvision.io")  # says that its decoders are to go
    small, large = (speeds(helpers, given.zip, size, given.cores, cache) for size in (64, 192))
    base = next(iter(small))
    print(f"| samples a second, cores: {given.cores} (as a multiple of the first row) | 64 px | 192 px |")
    print("|---|---|---|")
    for name in small:
        print("|", name, *(f"| {of[name]:,.0f} ({of[name] / of[base]:.1f})" for of in (small, large)), "|")


if __name__ == "__main__":
    main()
