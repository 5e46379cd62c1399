"""What a large zip takes: to open 1.2 million entries, and to read 400,000 samples at 64 px from first to last.

Prints two Markdown tables and a line: python tests/benchmarks/memory.py [ZIP] [--samples 400000]
The first is of a zip of names with next to nothing in them, which it writes; the second of ZIP, without which notebook 00
draws one (11 minutes on two cores). Memory is that which only these processes use, anonymous and shared between them: pages
of files, such as the zip, the cache on disk and libraries, the system drops when it needs room. It takes Linux to tell.
"""

import argparse
import multiprocessing as mp
import os
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]
import numpy as np
from test_make_dataset import definitions
from torch.utils.data import DataLoader, Dataset, Subset

from helpers import CHANNELS, KINDS, ZipDataset

COLAB = 12.7e9  # bytes of memory of the free machine
BATCH = 128


def memory(file, *fields):
    """The sum of fields of a file in /proc, in bytes."""
    lines = dict(line.split(":") for line in Path("/proc", file).read_text().splitlines() if line.endswith("kB"))
    return sum(int(lines[field].split()[0]) for field in fields) * 1024


def own(process="self"):
    return memory(f"{process}/status", "RssAnon", "RssShmem")


def own_together(processes):
    """What several processes have; pages that they share count once."""
    return sum(memory(f"{process}/smaps_rollup", "Pss_Anon", "Pss_Shmem") for process in processes)


def in_new_process(function, *arguments):
    """What the function returns in a process of its own, and that process's memory: before, and at most meanwhile."""
    with ProcessPoolExecutor(1, mp.get_context("spawn")) as pool:
        process = pool.submit(os.getpid).result()
        before = most = own(process)
        result = pool.submit(function, *arguments)
        while not result.done():
            most = max(most, own(process))
            time.sleep(0.005)
        return result.result(), before, most


class Names(Dataset):
    """A zip's names, as zipfile holds them, or of its samples and whose these are, as ZipDataset does."""

    def __init__(self, path, by_zipfile):
        self.entries = zipfile.ZipFile(path).filelist if by_zipfile else None
        self.ds = None if by_zipfile else ZipDataset(path)

    def __len__(self):
        return len(self.entries or self.ds)

    def __getitem__(self, i):
        return self.entries[i].filename if self.entries else (self.ds.name(i), self.ds.bg_id[i], self.ds.fg_id[i])


def opening(path, by_zipfile):
    """Seconds to open a zip, what it holds then, and the number of names."""
    before, start = own(), time.perf_counter()
    names = Names(path, by_zipfile)
    return time.perf_counter() - start, own() - before, len(names)


def two_workers(data):
    """The memory that two forked workers add, once they have read the data between them."""
    loader = DataLoader(data, BATCH, num_workers=2, multiprocessing_context="fork", persistent_workers=True)
    before = own_together(["self"])
    for _ in loader:
        pass
    return own_together(["self", *(worker.pid for worker in mp.active_children())]) - before


def names_in_workers(path, by_zipfile):
    return two_workers(Names(path, by_zipfile))


def samples_in_workers(path):
    ds = ZipDataset(path, cache="none")
    some = np.random.default_rng(0).permutation(len(ds))[:20_000]
    return two_workers(Subset(ds, some)), len(some)


def epochs(path, cache, number):
    """Seconds of each epoch, in batches in random order; where the decoded pictures are, their bytes; the peak with files."""
    ds, seconds = ZipDataset(path, cache=cache), []
    for epoch in range(number):
        order, start = np.random.default_rng(epoch).permutation(len(ds)), time.perf_counter()
        for first in range(0, len(ds), BATCH):
            ds.batch(order[first : first + BATCH])
        seconds.append(time.perf_counter() - start)
    decoded = sum(len(ds._file[kind]) * CHANNELS[kind] * ds.size**2 for kind in KINDS)
    return seconds, ds.cache, len(ds), decoded, memory("self/status", "VmHWM")


def write_names(path, places):
    """A zip of the layout raguram, 100 backgrounds x 200 objects x places, with nothing to see in it."""
    with zipfile.ZipFile(path, "w") as archive:
        for background in range(100):
            archive.writestr(zipfile.ZipInfo(f"bg_images/Image_{background}.JPEG"), b"-")
            for number in range(200 * places):
                for folder in ("fg_bg", "fg_bg_mask", "fg_bg_depth"):
                    name = f"{folder}/Image_{background}_{number // places}_{number % places}.JPEG"
                    archive.writestr(zipfile.ZipInfo(name), b"-")


def show(*rows):
    """A Markdown table, the first row its head."""
    for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]):
        print("|", " | ".join(row), "|")
    print(flush=True)


def show_opening(path):
    columns = []
    for by_zipfile in (True, False):
        (seconds, held, names), before, most = in_new_process(opening, path, by_zipfile)
        workers, *_ = in_new_process(names_in_workers, path, by_zipfile)
        columns.append([f"{seconds:.1f}", *(f"{value / 1e6:.0f}" for value in (held, most - before, workers))])
    rows = ["seconds to open", "MB once open", "MB at most while opening", "MB that two workers add, reading names"]
    show([f"names of {names:,} samples", "zipfile", "ZipDataset"], *map(list, zip(rows, *columns, strict=True)))


def show_epochs(path):
    rows = []
    for cache, number in (("memory", 2), ("disk", 2), ("none", 1)):
        (seconds, place, samples, decoded, resident), _, most = in_new_process(epochs, path, cache, number)
        rates = [f"{value:.0f} s, {samples / value:,.0f} a second" for value in seconds]
        fits = "yes" if most < COLAB else "no"
        rows.append([place, rates[0], *(rates[1:] or ["as the first"]), f"{most / 1e9:.2f}", f"{resident / 1e9:.2f}", fits])
    head = ["first epoch", "later epoch", "peak, GB", "and pages of files, GB", f"within {COLAB / 1e9} GB"]
    show([f"{samples:,} samples at 64 px ({decoded / 1e9:.2f} GB), kept in", *head], *rows)
    (workers, some), *_ = in_new_process(samples_in_workers, path)
    print(f"Two workers that decode {some:,} of them add {workers / 1e6:.0f} MB.")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zip", nargs="?", type=Path, help="a zip of samples for the second table")
    parser.add_argument("--samples", type=int, default=400_000, help="how many to write, in steps of 20,000")
    given = parser.parse_args()
    places = max(1, given.samples // 20_000)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # for the file of decoded pictures
        names, drawn = Path(folder, "names.zip"), Path(folder, "drawn.zip")
        write_names(names, places)
        show_opening(names)
        if not given.zip:
            definitions().make_dataset(drawn, backgrounds=100, objects=100, places=places, size=64)
        show_epochs(given.zip or drawn)


if __name__ == "__main__":
    main()
