"""How fast notebook 00 draws, on one core, as a Markdown table: python tests/benchmarks/make_dataset.py"""

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"  # before numpy is imported

import multiprocessing as mp
import resource
import sys
import tempfile
import time
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import helpers

SIZE = 192


def stages(nb, pairs=60):
    """Milliseconds a picture for each stage."""
    names = "background (one for many samples)", "object in the scene", "noise and JPEG", "two PNGs"
    times, (background, scene_object, shot, files) = {name: [] for name in names}, names

    def clock(key, function, *args):
        start = time.perf_counter()
        result = function(*args)
        times[key].append((time.perf_counter() - start) * 1e3)
        return result

    backdrops = [clock(background, nb.make_backdrop.__wrapped__, 0, k, SIZE) for k in range(8)]
    for k in range(pairs):
        rng, backdrop, mesh = nb.np.random.default_rng(k), backdrops[k % 8], nb.make_object(0, k)
        if spot := nb.choose_place(backdrop, mesh, rng):
            light, mask, depth = clock(scene_object, nb.add_object, backdrop, mesh.placed(*spot), rng)
            clock(shot, nb.shoot, light, backdrop.exposure, rng)
            clock(files, lambda pair: [nb.png(picture) for picture in pair], (mask, depth))
    return {key: sum(values) / len(values) for key, values in times.items()}


def write(samples, path, results):
    """Draws two backgrounds' share of a large set in this process: rates, bytes, and its peak memory."""
    nb, start, cpu = helpers._drawing(), time.perf_counter(), time.process_time()
    made = nb.make_dataset(path, backgrounds=2, objects=25, places=samples // 100, size=SIZE, workers=1)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist()) / made
    results.put((made / wall, made / cpu, size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def main():
    rows = [(f"{key}, ms", f"{value:.1f}") for key, value in stages(helpers._drawing()).items()]
    peaks = {}
    for samples in (500, 2000):
        results = mp.get_context("fork").Queue()
        with tempfile.TemporaryDirectory() as folder:
            task = {"target": write, "args": (samples, Path(folder) / "a.zip", results)}
            process = mp.get_context("fork").Process(**task)
            process.start()
            rate, cpu_rate, size, peaks[samples] = results.get()
            process.join()
    rows += [
        ("samples a second and core, by the clock", f"{rate:.0f}"),
        ("samples a second of processor time", f"{cpu_rate:.0f}"),
        ("bytes a sample", f"{size:,.0f}"),
        ("peak memory at 500 samples, MB", f"{peaks[500]:.0f}"),
        ("peak memory at 2,000 samples, MB", f"{peaks[2000]:.0f}"),
    ]
    print(f"| drawing at {SIZE} px, one core | |\n|---|---|")
    for row in rows:
        print("| {} | {} |".format(*row))


if __name__ == "__main__":
    main()
