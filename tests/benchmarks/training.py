"""How fast a training step is, plain and ours, and how long an epoch takes with it, on the GPU or else the CPU.

Prints Markdown tables: python tests/benchmarks/training.py [--threads N] [--rounds N]
Plain is what torch does unasked: float32 (on a GPU cuDNN's TensorFloat-32), pictures with one colour after the other, an
optimizer that is not fused, memory given back to the system. The two take turns, so that what disturbs one disturbs the
other, and medians count. Neither reads pictures; the last table adds that.
"""

import argparse
import contextlib
import itertools
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
from torch.utils.flop_counter import FlopCounterMode

import helpers
from helpers import DEVICE, MODELS, OPTIMIZERS, ZipDataset, compute_dtype, data_zip, environment, task_loss, to_float

SIZES, BATCH, EPOCH = (64, 192), 16, 280_000
LEAST = 1.0  # seconds that a measurement takes at least
MOST_WORK = 5e12  # operations of a step on a CPU: where a batch of 16 takes more, one of 2 is measured
GPU = DEVICE.type == "cuda"


def synchronize():
    if GPU:
        torch.cuda.synchronize()


def seconds(function):
    """Of one call: the mean of as many as take LEAST seconds. A GPU is waited for now and then only, as in a training."""
    synchronize()
    start, calls, together = time.perf_counter(), 0, 20 if GPU else 1
    while time.perf_counter() - start < LEAST:
        for _ in range(together):
            function()
        synchronize()
        calls += together
    return (time.perf_counter() - start) / calls


def keep_memory(keep):
    """What helpers tells glibc, or else what glibc comes to by itself where blocks of 32 MB and more are in use."""
    with contextlib.suppress(AttributeError, TypeError):  # other C libraries
        for option, value in ((-4, 0), (-1, 2**31 - 1)) if keep else ((-4, 65536), (-3, 2**25), (-1, 2**26)):
            helpers.glibc.mallopt(option, value)


@contextlib.contextmanager
def conditions(ours):
    keep_memory(ours)
    with torch.backends.cudnn.flags(enabled=True, benchmark=ours, deterministic=False, allow_tf32=not ours):
        yield
    keep_memory(True)


def training_step(name, batch, ours):
    """A function that does one step of training on the batch."""
    model, loss = MODELS[name]().to(DEVICE), task_loss("bce_dice", "densedepth")
    if ours:
        model = model.to(memory_format=torch.channels_last)
    else:
        batch = {kind: pictures.contiguous() for kind, pictures in batch.items()}
    optimizer = (OPTIMIZERS["adamw"] if ours else torch.optim.AdamW)(model.parameters(), lr=1e-3)
    forward = helpers._Step(model, loss, "auto" if ours else "float32").train()
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=ours and compute_dtype() == torch.float16)

    def step():
        optimizer.zero_grad()
        scaler.scale(forward(batch)).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def warm_up(name, batch, ours):
    """A training step that was done already, and the bytes of the GPU's memory that it took at most."""
    before = 0
    if GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    step = training_step(name, batch, ours)
    for _ in range(3 if GPU else 1):  # in which cuDNN tries its ways
        step()
    return step, torch.cuda.max_memory_allocated() - before if GPU else 0


def operations(name, size):
    """Of a training step, for one sample: forward, and twice as many backward."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        MODELS[name]()(*torch.rand(2, 1, 3, size, size))
    return 3 * counter.get_total_flops()


def peak():
    """Operations a second of a large product of matrices, in the type that our networks compute in."""
    side = 8192 if GPU else 2048
    left, right = torch.rand(2, side, side, device=DEVICE).to(compute_dtype())
    left @ right
    return 2 * side**3 / seconds(lambda: left @ right)


def measure_training(name, size, rounds):
    """The row of the first table, and images a second of our step."""
    work = operations(name, size)
    count = BATCH if GPU or BATCH * work < MOST_WORK else 2
    ds = helpers.open_zip(data_zip(), size)
    batch = to_float(ds.batch([i % len(ds) for i in range(count)]), DEVICE)
    steps, memory, times, peaks = {}, {}, {False: [], True: []}, []
    for ours in times:
        with conditions(ours):
            steps[ours], memory[ours] = warm_up(name, batch, ours)
    for _ in range(rounds):
        for ours, step in steps.items():
            with conditions(ours):
                if ours:  # first has to come back what plain steps gave back
                    step()
                times[ours].append(seconds(step))
        peaks.append(peak())
    plain, rate = (count / statistics.median(times[ours]) for ours in times)
    row = [name, f"{size} px", count, f"{plain:,.1f}", f"{rate:,.1f}", f"{rate / plain:.1f}"]
    row += [f"{rate * work / 1e9:,.0f}", f"{rate * work / statistics.median(peaks):.0%}"]
    return row + [f"{memory[ours] / 1e9:.2f}" for ours in memory if GPU], rate


def measure_decoding(size, rounds):
    """Samples a second of a first epoch, in which every picture is decoded."""
    ds = ZipDataset(data_zip(), size, cache="none")
    indices = [i % len(ds) for i in range(256)]
    ds.batch(indices)  # backgrounds are decoded once for many samples
    return len(indices) / statistics.median(seconds(lambda: ds.batch(indices, DEVICE)) for _ in range(rounds))


def hours(rate):
    minutes = round(EPOCH / rate / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes else f"{EPOCH / rate:.0f} s"


def show(*rows):
    """Prints a Markdown table, the first row its head."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    print("\n" + "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows))


def main(rounds):
    print(f"{environment()}; {torch.get_num_threads()} threads; ours computes in {compute_dtype()}")
    rates, rows = {}, []
    for size, name in itertools.product(SIZES, MODELS):
        row, rates[name, size] = measure_training(name, size, rounds)
        rows.append(row)
    head = ["network", "size", "batch", "plain, images/s", "ours, images/s", "ratio", "ours, GFLOP/s", "of a matrix product's"]
    show(head + ["plain, GB", "ours, GB"] * GPU, *rows)

    decoding = {size: measure_decoding(size, rounds) for size in SIZES}
    show(["decoding", "samples/s"], *([f"{size} px", f"{rate:,.0f}"] for size, rate in decoding.items()))

    def first(name, size):  # a GPU trains while the CPU decodes; a CPU has to do both
        train, decode = rates[name, size], decoding[size]
        return min(train, decode) if GPU else 1 / (1 / train + 1 / decode)

    epochs = ([name] + [hours(rate) for size in SIZES for rate in (first(name, size), rates[name, size])] for name in MODELS)
    show([f"epoch of {EPOCH:,}", *(f"{size} px, {which}" for size in SIZES for which in ("first", "later"))], *epochs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's choice")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of which the median is taken (default: 3)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    main(options.rounds)
