"""What a large zip takes: to open 1.2 million entries, and to read 400,000 samples, from first to last.

Prints a Markdown table: python tests/benchmarks/memory.py [--samples N] [--size N] [--epochs N] [--limit GB]
The zip, which it writes, has one small JPEG under all names. Memory is what only the measured process uses:
pages of files, such as the decoded pictures on disk, the system drops when it needs room. `--limit` makes the
disk seem so small that the pictures do not fit, and are decoded each time. Needs Linux and 11 GB of disk.
"""

import argparse
import io
import multiprocessing as mp
import os
import re
import resource
import signal
import sys
import tempfile
import threading
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpy as np
from PIL import Image

BATCH = 128


def memory():
    """MB of this process: anonymous, and with the pages of files."""
    kilobytes = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/self/status").read_text()))
    return (int(kilobytes["RssAnon"]) + int(kilobytes["RssShmem"])) / 1000, int(kilobytes["VmRSS"]) / 1000


def measured(path, size, limit, epochs):
    """Samples; seconds to open, of each epoch; MB once open, at most so far, at most, with files."""
    import helpers

    if limit:  # of a file; what is larger does not fit
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit * 1e9),) * 2)
    before, peak, done = memory()[0], [0.0], threading.Event()

    def watch():
        while not done.wait(0.02):
            peak[0] = max(peak[0], memory()[0])

    threading.Thread(target=watch, daemon=True).start()
    start = time.perf_counter()
    ds = helpers.ZipDataset(path, size)
    seconds = [time.perf_counter() - start]
    held, opening = memory()[0] - before, peak[0] - before
    for epoch in range(epochs):
        order, start = np.random.default_rng(epoch).permutation(len(ds)), time.perf_counter()
        for first in range(0, len(ds), BATCH):
            ds.batch(order[first : first + BATCH])
        seconds.append(time.perf_counter() - start)
    done.set()
    return len(ds), seconds, held, opening, peak[0] - before, memory()[1]


def write_zip(path, places):
    """A zip of the layout raguram, 100 backgrounds x 200 objects x places."""
    file = io.BytesIO()
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(file, "JPEG")
    with zipfile.ZipFile(path, "w") as archive:
        for background in range(100):
            archive.writestr(zipfile.ZipInfo(f"bg_images/Image_{background}.jpg"), file.getvalue())
            for number in range(200 * places):
                for folder in ("fg_bg", "fg_bg_mask", "fg_bg_depth"):
                    name = f"{folder}/Image_{background}_{number // places}_{number % places}.jpg"
                    archive.writestr(zipfile.ZipInfo(name), file.getvalue())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=400_000, help="in steps of 20,000")
    parser.add_argument("--size", type=int, default=64, help="pixels a side")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--limit", type=float, default=0, help="GB that a file may have; 0: as many as fit")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        write_zip(path := Path(folder, "large.zip"), max(1, given.samples // 20_000))
        with ProcessPoolExecutor(1, mp.get_context("spawn")) as pool:
            found = pool.submit(measured, path, given.size, given.limit, given.epochs).result()
    samples, seconds, held, opening, most, resident = found
    print(f"| {samples:,} samples, {given.size} px | |\n|---|---|\n| seconds to open | {seconds[0]:.1f} |")
    print(f"| MB once open, at most so far | {held:.0f}, {opening:.0f} |")
    for epoch, of in enumerate(seconds[1:], 1):
        print(f"| epoch {epoch} | {of:.0f} s, {samples / of:,.0f} samples a second |")
    print(f"| MB at most | {most:.0f} |\n| MB at the end, with pages of files | {resident:.0f} |")


if __name__ == "__main__":
    main()
