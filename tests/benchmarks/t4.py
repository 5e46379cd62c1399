"""Estimates the minutes that each notebook takes at full scale on Colab's GPU, a T4: none was at hand.

Prints a Markdown table: python tests/benchmarks/t4.py
The notebooks' own cells say what is trained: they run here, and training only notes the Config. A step of it
(with the losses of most) and a batch of an evaluation run on fake tensors, without content, and each op is
counted: floating-point operations as FlopCounterMode does, bytes read and written. On the GPU an op takes as
long as the slower of both, at a third of the T4's peak (roofline). A step takes as long as its ops or, if
that is longer, as Python needs to start them: 20 microseconds each, supposed for Colab's CPU (14 measured on
a newer one). Range: half of the peak and 14, a fifth and 30. What the CPU does alone is added; installing is
not, nor drawing the data set, but for 00.
"""

import dataclasses
import functools
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ |= {"SCALE": "full", "CUDA_VISIBLE_DEVICES": ""}
sys.path.insert(0, str(ROOT := Path(__file__).resolve().parents[2]))
import numpy as np
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import helpers

HALF, FLOAT, BYTES = 65e12, 8.1e12, 320e9  # the T4's peak a second
CASES = ((1 / 3, 20e-6), (1 / 2, 14e-6), (1 / 5, 30e-6))  # share of the peak, seconds to start an op
OPEN, SAVE, SHEET = 1.8, 0.2, 0.05  # seconds: the data set, a checkpoint, a sheet of pictures at 64 pixels
DECODED = {64: 950, 192: 1400}  # samples a second on two cores
# Seconds of all else: the quick scale's without training, drawing in 00, decoding in 01 and 02, `baselines`
# (1,500 samples a second at 64 pixels, 180 at 192). Words in the cells that make Configs. Code for more.
NOTEBOOKS = {
    "00_make_dataset": (236 + 36, (), ""),
    "01_data": (11 + 20480 / 950 + 8709 / 1500, (), ""),
    "02_model": (22 + 8709 / 950, ["seeds = {"], """run_all({0: [Config(f"{k}", model="difference_unet",
        precision="float32", epochs=1, max_train=steps * batch_size, max_test=300)
        for k in range(3 * seeds)]})"""),
    "03_losses": (10 + 8709 / 1500, ["steps = {", "base =", "_suite = {", '["brier"]', "def configs"], ""),
    "04_sweep_64px": (8 + 800 / 1500 + 800 / 180, ["steps = {", "base =", "reports =", "variants |=",
        "variants =", "def seeded", "runs = run_all({label", "at_64 ="],  # finalists: 3 x 2 seeds, 1 x 3
        'run_all({0: [dataclasses.replace(base, name=f"finalist/{k}") for k in range(9)]})'),
    "05_final_192px": (13 + 4355 / 180, ["steps = {", "recipe =", "budget =", "small =", "final ="], ""),
    "06_predict": (20, (), ""),
}  # fmt: skip
# The data set of 00 at full scale without its pictures, which can be divided.
DRAWN = np.repeat(helpers._drawing().choose_objects(0, 320, 220, 32) + 1, 2, 1)
SCENES = type("Scenes", (), {"__len__": lambda _: DRAWN.size})()
SCENES.bg_id, SCENES.fg_id = np.indices(DRAWN.shape)[0].ravel() + 1, DRAWN.ravel()
SCENES.name = lambda i: f"bg{SCENES.bg_id[i]:03}_fg{SCENES.fg_id[i]:03}_{i % 2 + 1:02}"
SCENES.kinds, SCENES.path = helpers.KINDS, Path("scenes.zip")


class Ops(TorchDispatchMode):
    """Notes of each op that a GPU would start (operations, bytes, the peak of its type)."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs := kwargs or {}))
        if op.namespace != "prim" and not op.is_view:
            tensors = [one for one in tree_leaves((args, kwargs, out)) if isinstance(one, torch.Tensor)]
            flop = flop_registry.get(op.overloadpacket, lambda *_, **__: 0)(*args, **kwargs, out_val=out)
            peak = HALF if torch.bfloat16 in {one.dtype for one in tensors} else FLOAT
            self.noted.append((flop, sum(one.nbytes for one in tensors), peak))
        return out


@functools.cache
def counted(model, size, batch, precision, augment, average, train):
    """The ops of a step, or of a batch that is evaluated: what `Ops` notes, (3, ops)."""
    pictures, ops = {kind: torch.rand(batch, n, size, size) for kind, n in helpers.CHANNELS.items()}, Ops()
    ops.noted = []
    for name in {*augment.split("+")} & {*helpers.AUGMENTATIONS}:
        with ops:  # not on fake tensors: what it does depends on what it draws
            helpers.AUGMENTATIONS[name](pictures)
    with FakeTensorMode(), torch.set_grad_enabled(train):
        network = helpers.MODELS[model]().train(train)
        fake = {kind: torch.empty(of.shape, dtype=torch.uint8) for kind, of in pictures.items()}
        with ops:
            fake = helpers.to_float(fake)
            with helpers.autocast(precision.replace("auto", "bfloat16")):  # costs what float16 does
                outputs = network(fake["bg"], fake["fg_bg"])
            judge = helpers.task_loss("bce_dice", "l1_ssim_gradient") if train else helpers.measure
            given = judge(*outputs, fake["mask"], fake["depth"])
            given.backward() if train else None
    if train:  # AdamW moves 28 bytes a weight, in a few ops; an average of the weights takes 12 a tensor
        ops.noted.append((0, 28 * sum(of.numel() for of in network.parameters()), FLOAT))
        ops.noted += [(0, 0, FLOAT)] * (20 + 12 * len(network.state_dict()) * (average > 0))
    return np.array(ops.noted, float).T


def noted_configs(name, words, more):
    """The Configs that a notebook would train."""
    noted, done = {}, SimpleNamespace(history=[], results={}, model=str)
    names = vars(helpers) | {"dataclasses": dataclasses, "data_zip": Path, "fetch": Path}
    names |= {"ZipDataset": lambda *_, **__: SCENES, "print": lambda *_: None}
    names["train"] = lambda config, *_, **__: noted.setdefault(config.name, config) and done
    names["run_all"] = lambda of: {label: [names["train"](one) for one in of[label]] for label in of}
    for cell in json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text("utf-8"))["cells"]:
        source = "".join(line for line in cell["source"] if not line.startswith("%"))
        if cell["cell_type"] == "code" and any(word in source for word in words):
            exec(source, names)
    exec(more, names)
    return noted.values()


def main():
    print("| notebook | steps | PFLOP | GB | minutes of the CPU alone | minutes on a T4 |\n|" + "---|" * 6)
    for name, (cpu, words, more) in NOTEBOOKS.items():
        total, decoded, busy = np.zeros(3), {}, np.zeros(len(CASES))
        for config in noted_configs(name, words, more):
            parts = {part: len(of) for part, of in helpers.parts_of(config, SCENES).items()}
            steps, rest = -(-parts["train"] // config.batch_size), sum(parts.values()) - parts["train"]
            epochs = max(config.epochs, -(-config.min_steps // steps))
            decoded[config.size] = max(decoded.get(config.size, 0), parts["train"] + rest)
            sheets = epochs + sum(first < steps for first in helpers.FIRST_STEPS)
            cpu += OPEN + SAVE * epochs + SHEET * sheets * (config.size / 64) ** 2
            step = epochs * steps, config.batch_size, config.precision, config.augment, config.average, True
            batch = (epochs * parts["valid"] + rest) / 32, 32, config.precision, "none", 0.0, False
            for times, *how in (step, batch):
                flop, moved, peak = counted(config.model, config.size, *how)
                total += times * np.array([how[-1], flop.sum(), moved.sum()])
                device = np.maximum(flop / peak, moved / BYTES).sum()
                busy += [times * max(device / share, start * len(flop)) for share, start in CASES]
        cpu += sum(count / DECODED[size] for size, count in decoded.items())
        row = f"{name} | {total[0]:,.0f} | {total[1] / 1e15:,.1f} | {total[2] / 1e9:,.0f} | {cpu / 60:.1f}"
        print("| {} | {:.1f} ({:.1f} to {:.1f}) |".format(row, *(busy + cpu) / 60))


if __name__ == "__main__":
    main()
