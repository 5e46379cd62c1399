"""How good networks get within a budget of training, on new scenes above all.

Prints Markdown tables: python tests/benchmarks/quality.py ZIP [ZIP ...] [--models NAME ...] [--minutes M] [--size PIXELS]
Each network is trained from each seed on each zip, with one recipe, in as many epochs as the budget of processor time pays for
(rounded up; where it does not pay for one, on as many samples as it does). Tables hold means over the zips, ± the standard
deviation over the seeds. With --parts the rows are the first network with single parts of the recipe changed, measured on
validation samples. What is finished is read, so seeds may be trained side by side, with --threads 1, before all are printed.

With --weights FILE nothing is trained: these weights are measured on all samples of each zip, none of which they should know.
"""

import argparse
import dataclasses
import fcntl
import io
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpy as np
import torch
from PIL import Image
from scipy.stats import spearmanr
from torchvision.transforms.v2.functional import resize

import helpers
from helpers import DEVICE, MODELS, TITLES, Config, Mirrored, Run, measure, open_zip, parts_of, run, score, to_float


def with_ratios(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 + (1 - SSIM) / 2 + gradient + 0.3 silog. The delta metrics compare ratios of depths, and so does the last term: it
    makes an error of one level cost most where depths are small. With 0.3 it is about one and a half times as large as L1."""
    return helpers.l1_ssim_gradient(prediction, target) + 0.3 * helpers.silog(prediction, target)


helpers.DEPTH_LOSSES["with_ratios"] = with_ratios
RECIPE = {
    "batch_size": 16,
    "optimizer": "adamw",
    "lr": 2e-3,
    "weight_decay": 0.05,
    "mask_loss": "bce_dice",
    "depth_loss": "l1_ssim_gradient",
    "augment": "mirror+colour",
    "average": 0.998,
}
PARTS = {
    "the recipe": {},
    "not mirrored": {"augment": "colour"},
    "colours as they are": {"augment": "mirror"},
    "composed too": {"augment": "mirror+compose+colour"},
    "shaken too": {"augment": "mirror+colour+shake"},
    "composed and shaken too": {"augment": "mirror+compose+colour+shake"},
    "not averaged": {"average": 0.0},
    "weight decay 0.01": {"weight_decay": 0.01},
    "depth loss of DenseDepth": {"depth_loss": "densedepth"},
    "depth loss with ratios": {"depth_loss": "with_ratios"},
    "depth counts 3 times": {"depth_weight": 3.0},
    "Lovasz instead of BCE + Dice": {"mask_loss": "lovasz"},
    "begun with the weights in assets/": {"start": "assets/difference_unet.pt"},
}
CELLS = ("test_seen", "test_new_bg", "test_new_fg", "test_new_both")
SHOTS = ("moved", "relit", "JPEG 30", "all three")


def speed(config: Config) -> float:
    """Training samples per second of processor time. Measured once for each network, size and augmentation, then read."""
    key = f"{config.model}, {config.size} px, {config.augment}, {torch.get_num_threads()} threads"
    file = helpers.work_folder() / "quality" / "speeds.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a+") as known:
        fcntl.flock(known, fcntl.LOCK_EX)  # for benchmarks side by side
        known.seek(0)
        speeds = json.loads(known.read() or "{}")
        if key not in speeds:
            ds = open_zip(config.data, config.size)
            parts = {name: some[: 5 * config.batch_size] for name, some in parts_of(config, ds).items()}
            training = helpers._Training(config, ds, parts, file.parent, {}, quiet=True)
            with helpers._StopButton() as stop:
                training._train(stop)
                started = time.process_time()
                training._train(stop)
            speeds[key] = len(parts["train"]) / (time.process_time() - started)
            known.truncate(0)
            known.write(json.dumps(speeds, indent=1))
    return speeds[key]


def within_budget(config: Config, minutes: float) -> Config:
    """With as many epochs, or else samples, as the budget pays for."""
    there = len(parts_of(config, open_zip(config.data, config.size))["train"])
    paid = math.ceil(60 * minutes * speed(config))
    return dataclasses.replace(config, epochs=-(-paid // there), max_train=paid if paid < there else 0)


def another_shot(bg: np.ndarray, fg_bg: np.ndarray, how: str, rng: np.random.Generator) -> list[np.ndarray]:
    """The pictures (3, H, W), uint8, as if taken by hand: `bg` moved by up to 2 pixels, its light changed by up to a tenth,
    both saved as JPEG of quality 30, or all three."""
    height, width = bg.shape[1:]
    if how in ("moved", "all three"):
        y, x = rng.integers(0, 5, 2)
        bg = np.pad(bg, ((0, 0), (2, 2), (2, 2)), mode="edge")[:, y : y + height, x : x + width]
    if how in ("relit", "all three"):
        bg = (bg * rng.uniform(0.9, 1.1)).round().clip(0, 255).astype(np.uint8)
    return [saved_as_jpeg(picture) if how in ("JPEG 30", "all three") else picture for picture in (bg, fg_bg)]


def saved_as_jpeg(picture: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture.transpose(1, 2, 0))).save(file, "JPEG", quality=30)
    return np.asarray(Image.open(file)).transpose(2, 0, 1)


@torch.no_grad()
def iou_by_hand(model: torch.nn.Module, path: str, size: int, how: str, indices: np.ndarray) -> float:
    """Mean IoU on these samples, whose pictures are changed at 192 pixels, and then resized."""
    large, small, rng, values = open_zip(path, 192), open_zip(path, size), np.random.default_rng(0), []
    for some in np.array_split(indices, -(-len(indices) // 32)):
        batch = large.batch(some)
        shots = [
            another_shot(bg, fg_bg, how, rng) for bg, fg_bg in zip(batch["bg"].numpy(), batch["fg_bg"].numpy(), strict=True)
        ]
        pictures = [resize(torch.from_numpy(np.stack(kind)), [size, size], antialias=True) for kind in zip(*shots, strict=True)]
        batch = to_float(small.batch(some) | dict(zip(("bg", "fg_bg"), pictures, strict=True)), DEVICE)
        with helpers.autocast():
            outputs = model.eval()(batch["bg"], batch["fg_bg"])
        values.append(measure(*outputs, batch["mask"], batch["depth"])["iou"])
    return torch.cat(values).mean().item()


@torch.no_grad()
def rank_correlation(model: torch.nn.Module, path: str, size: int, indices: np.ndarray) -> float:
    """Spearman's, between the predicted and the true depth of a picture (every fourth pixel of both sides), mean over pictures:
    1 where all that is farther is predicted farther."""
    values = []
    for some in np.array_split(indices, -(-len(indices) // 32)):
        batch = to_float(open_zip(path, size).batch(some), DEVICE)
        with helpers.autocast():
            _, depth = model.eval()(batch["bg"], batch["fg_bg"])
        pairs = (kind[..., ::4, ::4].float().flatten(1).cpu().numpy() for kind in (depth, batch["depth"]))
        values += [spearmanr(*pair).statistic for pair in zip(*pairs, strict=True)]
    return float(np.mean(values))


def no_network(path: str, size: int) -> torch.nn.Module:
    """The thresholded difference and the mean depth of the zip's training samples, to be asked like a network."""
    ds = open_zip(path, size)
    return helpers.baselines(ds, parts_of(Config("any"), ds)["train"])


def unseen(weights: str, zips: list[str], seed: int = 0) -> None:
    """Prints what weights are worth on zips that they were not trained on, and beside it no network."""
    model, rows = helpers.load_model(weights), []
    for path in zips:
        ds = open_zip(path, model.size)
        some = np.sort(np.random.default_rng(seed).permutation(len(ds))[:400])
        stem = Path(path).stem
        for label, network in ((f"{stem}: no network", no_network(path, model.size)), (stem, model)):
            results = score(network, ds, {"all": np.arange(len(ds))})["all"]
            numbers = [results[metric] for metric in ("iou", "rmse", "delta1")]
            numbers.append(rank_correlation(network, path, model.size, some))
            numbers += [iou_by_hand(network, path, model.size, how, some) for how in SHOTS]
            rows.append([label, f"{len(ds):,}", *(f"{number:.3f}" for number in numbers)])
    print_table(["", "samples", "IoU", "RMSE", "δ < 1.25", "rank correlation", *SHOTS], rows)


class Scored:
    """A network that no Run has scored, with what the tables ask of a Run."""

    def __init__(self, model: torch.nn.Module, path: str, size: int):
        ds = open_zip(path, size)
        parts = parts_of(Config("any"), ds)
        self._model = model
        self.results = score(model, ds, {cell: parts[cell] for cell in CELLS})

    def model(self) -> torch.nn.Module:
        return self._model


def mean(seeds: list[list], value: Callable[[Any], float]) -> str:
    """Of a value of what stands for each seed and zip, over the zips; and how it spreads over the seeds."""
    values = [np.mean([value(one) for one in zips]) for zips in seeds]
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def print_table(head: list[str], rows: list[list[str]]) -> None:
    print("\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)), end="\n\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zips", nargs="+", metavar="ZIP")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS, metavar="NAME")
    parser.add_argument("--minutes", type=float, default=2.0, help="of processor time for the training of a run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--augment", default=RECIPE["augment"], help="instead of the recipe's")
    parser.add_argument(
        "--depth-loss", default=RECIPE["depth_loss"], choices=helpers.DEPTH_LOSSES, help="instead of the recipe's"
    )
    parser.add_argument("--start", default="", help="weights to begin with")
    parser.add_argument("--mirrored", action="store_true", help="networks are asked twice, as helpers.Mirrored does")
    parser.add_argument("--parts", nargs="*", choices=PARTS, metavar="PART", help=f"{', '.join(PARTS)}; none named: all")
    parser.add_argument("--weights", help="measured as they are; nothing is trained")
    options = parser.parse_args()
    if options.mirrored and (options.parts is not None or options.weights is not None):
        parser.error("--mirrored goes with neither --parts nor --weights.")
    torch.set_num_threads(options.threads)
    if options.weights is not None:
        unseen(options.weights, options.zips)
        return
    given = {"augment": options.augment, "depth_loss": options.depth_loss, "start": options.start, "size": options.size}
    recipe = RECIPE | given
    rows = {name: {"model": name} for name in options.models}
    if options.parts is not None:
        rows = {part: {"model": options.models[0]} | PARTS[part] for part in options.parts or PARTS}

    done: dict[str, list[list[Run | Scored]]] = {}
    for label, changes in rows.items():
        for seed in options.seeds:
            zips = []
            for path in options.zips:
                settings = recipe | changes
                what = (
                    Path(path).stem,
                    options.size,
                    f"{options.minutes:g}",
                    label,
                    settings["augment"],
                    options.depth_loss if options.depth_loss != RECIPE["depth_loss"] else "",
                    Path(options.start).stem,
                )
                name = "quality/" + "-".join(str(one).replace(" ", "_") for one in what if one) + f"/seed-{seed}"
                config = within_budget(Config(name=name, data=path, seed=seed, **settings), options.minutes)
                trained = run(config, quiet=True)
                zips.append(Scored(Mirrored(trained.model()), path, options.size) if options.mirrored else trained)
            done.setdefault(label, []).append(zips)

    stems = ", ".join(Path(path).stem for path in options.zips)
    budget = f"{options.minutes:g} min of processor time for each training, {options.size} pixels, seeds {options.seeds}"
    print(f"{helpers.environment()}\n\nMeans over {stems}; {budget}.\n")

    def cells(seeds: list[list[Run | Scored]], parts: tuple[str, ...], metrics: tuple[str, ...]) -> list[str]:
        return [" / ".join(mean(seeds, lambda one: one.results[part][metric]) for metric in metrics) for part in parts]  # noqa: B023

    if options.parts is not None:
        parts = ("valid", "valid_new")
        seen = {
            label: np.mean(
                [
                    one.config.epochs * len(parts_of(one.config, open_zip(one.config.data, options.size))["train"])
                    for zips in seeds
                    for one in zips
                ]
            )
            for label, seeds in done.items()
        }
        head = ["IoU / RMSE", "samples seen", "validation, seen", "validation, new scenes"]
        print_table(
            head, [[label, f"{seen[label]:,.0f}", *cells(seeds, parts, ("iou", "rmse"))] for label, seeds in done.items()]
        )
        return
    done = {"no network": [[Scored(no_network(path, options.size), path, options.size) for path in options.zips]]} | done
    parameters = {label: sum(p.numel() for p in MODELS[label]().parameters()) if label in MODELS else 0 for label in done}
    head = ["IoU / RMSE", "parameters", *(TITLES[cell] for cell in CELLS)]
    print_table(
        head, [[label, f"{parameters[label]:,}", *cells(seeds, CELLS, ("iou", "rmse"))] for label, seeds in done.items()]
    )

    print(
        "New backgrounds with new objects. Last, the IoU where the background is moved by up to 2 pixels of 192, its light "
        "changed by up to 10 %, both pictures saved as JPEG of quality 30, and all three at once.\n"
    )

    def by_hand(one: Run | Scored, path: str) -> dict[str, float]:
        model, indices = one.model(), parts_of(Config("any"), open_zip(path, options.size))["test_new_both"]
        return {how: iou_by_hand(model, path, options.size, how, indices) for how in SHOTS}

    table = []
    for label, seeds in done.items():
        row = [cell for metric in ("iou", "rmse", "delta1") for cell in cells(seeds, ("test_new_both",), (metric,))]
        shots = [[by_hand(*pair) for pair in zip(zips, options.zips, strict=True)] for zips in seeds]
        row += [mean(shots, lambda ious: ious[how]) for how in SHOTS]  # noqa: B023
        table.append([label, *row])
    print_table(["", "IoU", "RMSE", "δ < 1.25", *SHOTS], table)


if __name__ == "__main__":
    main()
