"""How good networks get within a budget of training, on new scenes above all.

Prints Markdown tables: python tests/benchmarks/quality.py ZIP [ZIP ...] [--models NAME ...] [--minutes M] [--size PIXELS]
Each network is trained from each of the seeds on each zip, with the same recipe, in as many epochs as the budget of processor
time pays for (rounded up; a network too slow for one epoch gets as many samples as it can look at once). Tables hold means over
the zips, ± the standard deviation over the seeds. --parts takes single parts of the recipe away instead, or adds some.
Finished runs are read: to print the tables anew costs little, and seeds may be trained side by side with --threads 1.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import io
import json
import math
import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpy as np
import torch
from PIL import Image

import helpers
from helpers import (
    MODELS,
    TITLES,
    Config,
    baselines,
    environment,
    measure,
    open_zip,
    parts_of,
    run,
    score,
    to_float,
    work_folder,
)

RECIPE = {
    "batch_size": 16,
    "optimizer": "adamw",
    "lr": 3e-3,
    "mask_loss": "bce_dice",
    "depth_loss": "l1_ssim_gradient",
    "depth_weight": 1.0,
    "augment": "mirror",
    "average": 0.998,
}
PARTS = {
    "the recipe": {},
    "without mirroring": {"augment": "none"},
    "with colours": {"augment": "mirror+colour"},
    "with composed pictures": {"augment": "mirror+compose"},
    "shaken": {"augment": "mirror+shake"},
    "composed and shaken": {"augment": "mirror+compose+shake"},
    "without averaging": {"average": 0.0},
    "depth loss DenseDepth": {"depth_loss": "densedepth"},
    "depth weight 3": {"depth_weight": 3.0},
    "mask loss Lovasz": {"mask_loss": "lovasz"},
}
CELLS = ("test_seen", "test_new_bg", "test_new_fg", "test_new_both")


def processor_seconds():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def speed(config):
    """Training samples per second of processor time; measured once a network, size and augmentation, then read."""
    key, file = f"{config.model} {config.size} {config.augment} {torch.get_num_threads()}", work_folder() / "quality" / "speeds.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a+") as known:  # runs side by side share it
        fcntl.flock(known, fcntl.LOCK_EX)
        known.seek(0)
        speeds = json.loads(known.read() or "{}")
        if key not in speeds:
            name, most = f"quality/speed {key}", 6 * config.batch_size
            ds = open_zip(config.data, config.size)
            config = dataclasses.replace(config, name=name, epochs=1, max_train=most)
            training = helpers._Training(config, ds, parts_of(config, ds), work_folder() / name, dataclasses.asdict(config), True)
            helpers._seed(0)
            training.within, start = None, processor_seconds()
            with helpers._StopButton() as stop, contextlib.suppress(FileNotFoundError):
                training._train(stop)
                start = processor_seconds()
                training._train(stop)
            speeds[key] = most / (processor_seconds() - start)
            known.truncate(0)
            known.write(json.dumps(speeds, indent=1))
    return speeds[key]


def within_budget(config, minutes):
    """The Config with as many epochs, or else samples, as the budget pays for."""
    samples = len(parts_of(config, open_zip(config.data, config.size))["train"])
    paid = 60 * minutes * speed(config)
    if paid < samples:
        return dataclasses.replace(config, epochs=1, max_train=math.ceil(paid))
    return dataclasses.replace(config, epochs=math.ceil(paid / samples))


def another_shot(bg, fg_bg, kind, rng):
    """The two pictures (3, H, W), uint8, as two shots by hand would have them: `bg` moved by up to 2 pixels, its light changed
    by up to a tenth, both saved as JPEG of quality 30, or all three."""
    if kind in ("moved", "all three"):
        x, y = rng.integers(-2, 3, 2)
        bg = np.pad(bg, ((0, 0), (2, 2), (2, 2)), mode="edge")[:, 2 + y : bg.shape[1] + 2 + y, 2 + x : bg.shape[2] + 2 + x]
    if kind in ("relit", "all three"):
        bg = (bg * rng.uniform(0.9, 1.1)).round().clip(0, 255).astype(np.uint8)
    pair = [bg, fg_bg]
    if kind in ("JPEG 30", "all three"):
        for k, picture in enumerate(pair):
            file = io.BytesIO()
            Image.fromarray(np.ascontiguousarray(picture.transpose(1, 2, 0))).save(file, "JPEG", quality=30)
            pair[k] = np.asarray(Image.open(file)).transpose(2, 0, 1)
    return pair


@torch.no_grad()
def shaken_iou(model, path, size, indices, kind):
    """Mean IoU where the two pictures, at 192 pixels, are as two shots by hand."""
    full, small, rng, values = open_zip(path, 192), open_zip(path, size), np.random.default_rng(0), []
    for some in np.array_split(indices, -(-len(indices) // 32)):
        pictures = [another_shot(*pair, kind, rng) for pair in zip(*(full.batch(some)[k].numpy() for k in ("bg", "fg_bg")), strict=True)]
        pairs = [helpers._resize(torch.from_numpy(np.stack(kind_)), size) for kind_ in zip(*pictures, strict=True)]
        batch = to_float(small.batch(some) | dict(zip(("bg", "fg_bg"), pairs, strict=True)), helpers.DEVICE)
        with helpers.autocast():
            outputs = model.eval()(batch["bg"], batch["fg_bg"])
        values.append(measure(*outputs, batch["mask"], batch["depth"])["iou"])
    return torch.cat(values).mean().item()


SHOTS = ("as they are", "moved", "relit", "JPEG 30", "all three")


def table(head, rows):
    print("\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)), end="\n\n")


def mean(results, value, digits=3):
    """results: seed -> zip -> what `value` reads a number from."""
    seeds = [np.mean([value(one) for one in zips]) for zips in results]
    spread = f" ± {np.std(seeds, ddof=1):.{digits}f}" if len(seeds) > 1 else ""
    return f"{np.mean(seeds):.{digits}f}{spread}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zips", nargs="+")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS, metavar="NAME")
    parser.add_argument("--minutes", type=float, default=2.0, help="of processor time that the training of each run may take")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--augment", default=RECIPE["augment"])
    parser.add_argument("--start", default="", help="weights to begin with, as Config.start")
    parser.add_argument("--parts", nargs="*", metavar="PART", help=f"of the recipe, with the first network: {', '.join(PARTS)}; none named: all")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe = RECIPE | {"augment": options.augment, "start": options.start, "size": options.size}
    if options.parts is None:
        lines = {name: {"model": name} for name in options.models}
    else:
        lines = {part: {"model": options.models[0]} | PARTS[part] for part in options.parts or PARTS}

    configs = {}
    for label, changes in lines.items():
        for seed in options.seeds:
            for path in options.zips:
                name = f"quality/{Path(path).stem}-{options.size}-{options.minutes:g}-{changes['model']}-{label}-{recipe['augment']}"
                name += f"-{Path(options.start).stem}" * bool(options.start) + f"-{seed}"
                config = Config(name=name.replace(" ", "_"), data=path, seed=seed, **recipe | changes)
                configs[label, seed, path] = within_budget(config, options.minutes)
    runs = {key: run(config, quiet=True) for key, config in configs.items()}

    print(f"{environment()}\n\nTraining of {options.minutes:g} minutes of processor time a run, {options.size} pixels, "
          f"{len(options.seeds)} seeds; means over {', '.join(Path(path).stem for path in options.zips)}.\n")
    grouped = {label: [[runs[label, seed, path] for path in options.zips] for seed in options.seeds] for label in lines}
    if options.parts is not None:
        head = ["", "samples seen", *(f"{part}: IoU | RMSE" for part in ("valid", "valid_new"))]
        rows = []
        for label, seeds in grouped.items():
            seen = np.mean([configs[key].epochs * len(parts_of(configs[key], open_zip(key[2], options.size))["train"]) for key in configs if key[0] == label])
            cells = [mean(seeds, lambda one: one.results[part][metric]) for part in ("valid", "valid_new") for metric in ("iou", "rmse")]
            rows.append([label, f"{seen:,.0f}", *cells])
        table(["", "samples seen", "valid: IoU", "RMSE", "new scenes: IoU", "RMSE"], rows)
        return
    rows, nothing = [], []
    for path in options.zips:
        ds = open_zip(path, options.size)
        parts = parts_of(Config("any"), ds)
        nothing.append((baselines(ds, parts["train"]), score(baselines(ds, parts["train"]), ds, {cell: parts[cell] for cell in CELLS})))
    for label, seeds in {"no network": [[one for _, one in nothing]], **grouped}.items():
        results = [[getattr(one, "results", one) for one in zips] for zips in seeds]
        parameters = sum(p.numel() for p in MODELS[label]().parameters()) / 1e6 if label in MODELS else 0
        cells = [f"{mean(results, lambda one: one[cell]['iou'])} / {mean(results, lambda one: one[cell]['rmse'])}" for cell in CELLS]
        rows.append([label, f"{parameters:.2f} M", *cells])
    table(["IoU / RMSE", "parameters", *(TITLES[cell] for cell in CELLS)], rows)

    rows = []
    for label, seeds in {"no network": [[model for model, _ in nothing]], **grouped}.items():
        models = [[one.model() if hasattr(one, "model") else one for one in zips] for zips in seeds]
        cells = []
        for shot in SHOTS[1:]:
            values = [[shaken_iou(model, path, options.size, parts_of(Config("any"), open_zip(path, options.size))["test_new_both"], shot)
                       for model, path in zip(zips, options.zips, strict=True)] for zips in models]
            cells.append(mean(values, float))
        results = [[getattr(one, "results", one) for one in zips] for zips in (seeds if label != "no network" else [[one for _, one in nothing]])]
        whole = [mean(results, lambda one: one["test_new_both"][metric]) for metric in ("iou", "rmse", "delta1")]
        rows.append([label, *whole, *cells])
    print("New backgrounds with new objects. The last four columns: IoU where the background is moved by up to 2 pixels of 192, its "
          "light changed by up to 10 %, both pictures saved as JPEG of quality 30, and all three at once.\n")
    table(["", "IoU", "RMSE", "δ < 1.25", *SHOTS[1:]], rows)


if __name__ == "__main__":
    main()
