"""How fast notebook 00 draws, on one core. Prints a Markdown table: python tests/benchmarks/make_dataset.py"""

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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from test_make_dataset import definitions

SIZE = 192


def stages(nb, pairs=60):
    """Milliseconds a picture for each stage."""
    spent = dict.fromkeys(
        ("background (one for thousands of samples)", "object in the scene", "noise and JPEG", "two PNGs"), 0.0
    )
    background, scene_object, shot, files = spent
    times = {key: [] for key in spent}

    def clock(key, function, *args):
        start = time.perf_counter()
        result = function(*args)
        times[key].append((time.perf_counter() - start) * 1e3)
        return result

    backdrops = [clock(background, nb.make_backdrop.__wrapped__, 0, k, SIZE) for k in range(8)]
    for k in range(pairs):
        rng, backdrop, solids = nb.np.random.default_rng(k), backdrops[k % 8], nb.make_object(0, k)
        placed = nb.stand(solids, nb.choose_place(backdrop, solids, rng))
        soft, direct, mask, depth = clock(scene_object, nb.add_object, backdrop, placed)
        clock(shot, nb.shoot, backdrop, soft, direct, rng)
        clock(files, lambda pair: [nb.png(picture) for picture in pair], (mask, depth))
    return {key: sum(values) / len(values) for key, values in times.items()}


def write(samples, path, results):
    """Draw two backgrounds' share of a large data set in this process; report rate, bytes and this process's peak memory."""
    nb, start, cpu = definitions(), time.perf_counter(), time.process_time()
    made = nb.make_dataset(path, backgrounds=2, objects=25, places=samples // 100, size=SIZE, workers=1)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist()) / made
    results.put((made / wall, made / cpu, size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def main():
    rows = [(f"{key}, ms", f"{value:.1f}") for key, value in stages(definitions()).items()]
    peaks = {}
    for samples in (500, 2000):
        results = mp.get_context("fork").Queue()
        with tempfile.TemporaryDirectory() as folder:
            process = mp.get_context("fork").Process(target=write, args=(samples, Path(folder) / "a.zip", results))
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
