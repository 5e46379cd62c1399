"""How fast each network trains, on the GPU or else the CPU, and how long an epoch of 280,000 samples takes.

Prints a Markdown table: python tests/benchmarks/training.py [--threads N] [--sizes N ...] [--models NAME ...]
A step is a run's: channels last, precision "auto", AdamW; beside it the same in float32. No pictures are
read. On a CPU a batch has 8 samples at 64 pixels and 1 at 192, on a GPU 128 and 14.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch

from helpers import DEVICE, GPU, MODELS, OPTIMIZERS, autocast, environment, task_loss

SECONDS, CHANNELS_LAST = 2.0, torch.channels_last  # a measurement takes so long at least


def images_a_second(name, size, batch, precision):
    model = MODELS[name]().to(DEVICE, memory_format=CHANNELS_LAST)
    loss_of = task_loss("bce_dice", "densedepth")
    optimizer = OPTIMIZERS["adamw"](model.parameters(), lr=1e-3)
    inputs = torch.rand(2, batch, 3, size, size, device=DEVICE)
    inputs = [pictures.to(memory_format=CHANNELS_LAST) for pictures in inputs]
    truth = torch.rand(2, batch, 1, size, size, device=DEVICE)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=autocast(precision).fast_dtype == torch.float16)

    def step():
        with autocast(precision):
            outputs = model(*inputs)
        optimizer.zero_grad()
        scaler.scale(loss_of(*outputs, (truth[0] > 0.5).float(), truth[1])).backward()
        scaler.step(optimizer)
        scaler.update()

    steps, together = 0, 20 if GPU else 1  # a GPU is waited for now and then only
    for _ in range(3 if GPU else 1):  # in which cuDNN tries its ways
        step()
    if GPU == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        for _ in range(together):
            step()
        if GPU == "cuda":
            torch.cuda.synchronize()
        steps += together
    return steps * batch / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 192])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(f"{environment()}; {given.threads} threads; auto is {autocast().fast_dtype}\n")
    print("| network | size | float32, images/s | auto, images/s | epoch |\n|", "---|" * 5)
    for name in given.models:
        for size in given.sizes:
            batch = max(1, (128 if GPU else 8) * 64**2 // size**2)
            plain, ours = (images_a_second(name, size, batch, kind) for kind in ("float32", "auto"))
            print(f"| {name} | {size} px | {plain:,.1f} | {ours:,.1f} | {280_000 / ours / 3600:.1f} h |")


if __name__ == "__main__":
    main()
