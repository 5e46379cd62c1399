"""How fast samples are read on one core, beside other ways to do it; where our time goes; how exact our pictures are.

Prints three Markdown tables: python tests/benchmarks/loading.py [ZIP]
Without a zip it takes the one that helpers.data_zip() finds. Times are processor time; all ways take turns and medians
count. The other ways make float pictures, one by one; ours make uint8 batches, the last of them float batches.
"""

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"  # before numpy is imported

import collections
import io
import statistics
import sys
import tempfile
import time
import warnings
import zipfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpy as np
import simplejpeg
import torch
import torchvision
import webdataset
from PIL import Image
from torchvision.transforms import Compose, Resize, ToTensor, v2

from helpers import CHANNELS, KINDS, ZipDataset, _resize, _resize_masks, data_zip, to_float

ROUNDS, BATCH = 5, 64
DECODED, KEPT = 512, 2048  # samples: the caches keep so many, of which the first are decoded in each round
MODES = {"bg": "RGB", "fg_bg": "RGB", "mask": "L", "depth": "L"}


def opened(path, size, cache):
    """A part of the data set, with a cache no larger than that."""
    ds = ZipDataset(path, size, cache="none")
    ds._wanted = cache
    ds = ds.subset(min(KEPT, len(ds)))
    assert ds.cache == cache, ds.place
    return ds


def files_of(ds, kind, indices):
    return ds._file[kind][ds._slot[kind][indices]].tolist()


def batches(count):
    return np.array_split(np.random.default_rng(0).permutation(count), -(-count // BATCH))


def read(ds, count, finish=dict):
    for batch in batches(count):
        finish(ds.batch(batch))


def each(function, *arguments):
    return list(map(function, *arguments))


def other_ways(path, ds, count, folder):
    """Ways to read the first samples at the same size, name -> function. What they read is written to the folder."""
    archive = zipfile.ZipFile(path)
    names = np.array([each(ds._name, files_of(ds, kind, np.arange(count))) for kind in KINDS]).T.tolist()
    archive.extractall(folder, {name for sample in names for name in sample})
    paths = [[f"{folder}/{name}" for name in sample] for sample in names]
    loaded = [each(archive.read, sample) for sample in names]
    fields = [kind + Path(name).suffix.lower() for kind, name in zip(KINDS, names[0], strict=True)]
    with webdataset.ShardWriter(f"{folder}/%06d.tar", maxcount=256, verbose=0) as writer:
        for i, sample in enumerate(loaded):
            writer.write({"__key__": f"{i:06}", **dict(zip(fields, sample, strict=True))})
    shards = sorted(map(str, Path(folder).glob("*.tar")))
    usual = Compose([Resize((ds.size, ds.size)), ToTensor()])
    newer = v2.Compose([v2.Resize((ds.size, ds.size), antialias=True), v2.ToDtype(torch.float32, scale=True)])

    def one_with_pil(file, mode):
        return usual(Image.open(file).convert(mode))

    def one_with_torchvision(file, mode):
        return newer(torchvision.io.decode_image(file, "GRAY" if mode == "L" else mode))

    def one_decoded(raw, mode):
        if raw[:2] == b"\xff\xd8":
            return simplejpeg.decode_jpeg(raw, "GRAY" if mode == "L" else mode)
        return Image.open(io.BytesIO(raw)).convert(mode)

    def all_of(one, samples, kinds=KINDS):
        for sample in samples:
            each(one, sample[-len(kinds) :], [MODES[kind] for kind in kinds])

    def with_webdataset():
        samples = webdataset.WebDataset(shards, shardshuffle=False).decode("pil").to_tuple(*fields).map_tuple(*[usual] * 4)
        assert sum(1 for _ in samples) == count

    ways = {
        "four files opened with PIL, Resize, ToTensor": lambda: all_of(one_with_pil, paths),
        "the same from the zip": lambda: all_of(one_with_pil, (each(archive.open, sample) for sample in names)),
        "four files with torchvision: decode_image, Resize, ToDtype": lambda: all_of(one_with_torchvision, paths),
        'webdataset: decode("pil"), Resize, ToTensor': with_webdataset,
        "decoding alone, from memory, neither background nor resizing": lambda: all_of(one_decoded, loaded, KINDS[1:]),
    }
    if not hasattr(torchvision.io, "decode_image"):
        del ways["four files with torchvision: decode_image, Resize, ToDtype"]
        print("This torchvision has no decode_image any more: a row less.\n")
    return ways


def speeds(path, size):
    """Samples a second of processor time, for each way."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # for the file of decoded pictures
        anew, memory, disk = (opened(path, size, cache) for cache in ("none", "memory", "disk"))
        kept, count = len(anew), min(DECODED, len(anew))
        for ds in (anew, memory, disk):
            read(ds, kept)
        disk = opened(path, size, "disk")  # finds the file, as the next run would
        ways = {name: (function, count) for name, function in other_ways(path, anew, count, folder).items()} | {
            "ours, first epoch": (partial(read, anew, count), count),
            "ours, later epochs": (partial(read, memory, kept), kept),
            "ours, later epochs, from the file on disk": (partial(read, disk, kept), kept),
            "ours, later epochs, to float": (partial(read, memory, kept, to_float), kept),
        }
        times = collections.defaultdict(list)
        for _ in range(ROUNDS):
            for name, (function, samples) in ways.items():
                start = time.process_time()
                function()
                times[name].append((time.process_time() - start) / samples)
    return {name: 1 / statistics.median(values) for name, values in times.items()}


def stages(path, size):
    """Microseconds of processor time a sample for each stage of a first epoch, the pictures of a kind being equally large."""
    ds, times = opened(path, size, "none"), collections.defaultdict(list)
    read(ds, len(ds))  # decodes the backgrounds
    count = min(DECODED, len(ds))
    for _ in range(ROUNDS):
        spent = collections.Counter()

        def clock(stage, function, *arguments, spent=spent):
            start = time.process_time()
            result = function(*arguments)
            spent[stage] += (time.process_time() - start) / count * 1e6
            return result

        for batch in batches(count):
            clock("together", ds.batch, batch)
            clock("backgrounds, indexed", ds._pictures, "bg", batch)
            for kind in KINDS[1:]:
                files = files_of(ds, kind, batch)
                clock("reading and checking", each, ds._read, files)
                sources, shapes, _ = zip(*clock("headers", each, partial(ds._open, kind), files), strict=True)
                pictures = torch.empty(len(files), *shapes[0], CHANNELS[kind], dtype=torch.uint8)
                clock("decoding", each, partial(ds._decode, kind), files, sources, pictures.numpy())
                clock("resizing", _resize_masks if kind == "mask" else _resize, pictures, size)
        spent["headers"] -= spent["reading and checking"]  # _open reads again
        together = spent.pop("together")
        spent["what else there is"] = together - spent.total()
        for stage, value in (*spent.items(), ("together", together)):
            times[stage].append(value)
    return {stage: statistics.median(values) for stage, values in times.items()}


def differences(path, size, count=256):
    """Our pictures beside Pillow's, which are decoded whole and resized with antialiasing: a cell for each kind."""
    ds, cells = ZipDataset(path, size, cache="none"), []
    indices = np.random.default_rng(0).permutation(len(ds))[:count]
    for kind, ours in ds.batch(indices).items():
        way = Image.Resampling.BOX if kind == "mask" else Image.Resampling.BILINEAR
        plain = [Image.open(io.BytesIO(ds._read(file))).convert(MODES[kind]) for file in files_of(ds, kind, indices)]
        if kind == "mask":  # not rounded before the cut
            plain = [picture.convert("F") for picture in plain]
        plain = np.stack([np.asarray(picture.resize((size, size), way)) for picture in plain])
        ours = ours.permute(0, 2, 3, 1).numpy().reshape(plain.shape)
        if kind == "mask":
            cells.append(f"{np.mean((plain > 127.5) != ours):.4%} flipped")
        else:
            apart = np.abs(plain.astype(int) - ours)
            cells.append(f"{apart.mean():.2f}, at most {apart.max()}")
    return cells


def show(*rows):
    """A Markdown table, the first row its head."""
    for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]):
        print("|", " | ".join(row), "|")
    print()


def main():
    path = data_zip(*sys.argv[1:])
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    warnings.filterwarnings("ignore", module="torchvision.io")  # says that its decoders are to go
    small, large = speeds(path, 64), speeds(path, 192)
    base = next(iter(small))
    rows = [[name, *(f"{speed[name]:,.0f} ({speed[name] / speed[base]:.1f})" for speed in (small, large))] for name in small]
    show(["samples a second on one core (as a multiple of the first row)", "64 px", "192 px"], *rows)
    small, large = stages(path, 64), stages(path, 192)
    rows = [[stage, f"{small[stage]:.0f}", f"{large[stage]:.0f}"] for stage in small]
    show(["a first epoch: microseconds a sample", "64 px", "192 px"], *rows)
    rows = [[f"{size} px", *differences(path, size)] for size in (24, 48, 64, 192)]
    show(["difference from Pillow, in levels of 255: mean, largest", *KINDS], *rows)


if __name__ == "__main__":
    main()
