"""How good networks get within a budget of training, on new scenes above all.

Prints a Markdown table: python tests/benchmarks/quality.py ZIP [ZIP ...] [--models NAME ...] [--minutes M]
Each network is trained from each seed on each zip, with one recipe, in as many steps as the minutes pay for.
Numbers are means over the zips, ± the standard deviation over the seeds, on new backgrounds with new objects;
the last columns are IoUs where `bg` is moved, its light changed, both saved as JPEG, and all three. With
--parts the rows are the first network with parts of the recipe changed, on validation samples of new scenes.
With --weights FILE nothing is trained: what `predict` makes of them is measured on 100 samples a zip, beside
ways that need no network, the opened difference with the mean depth map of each zip and with a vertical ramp,
all at 192 pixels. A ZIP may then also be a folder of pairs by real cameras: NAME_bg.jpg, NAME_fg.jpg, and
NAME_mask.png, in which 128 is not counted.
"""

import argparse
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpy as np
import torch
from torchvision.transforms.v2.functional import affine, center_crop, jpeg, pad

import helpers
from helpers import (
    MODELS,
    Baseline,
    Config,
    ZipDataset,
    align_background,
    baselines,
    evaluate,
    load_model,
    parts_of,
    run,
)

RECIPE = {"batch_size": 16, "lr": 2e-3, "weight_decay": 0.05, "depth_loss": "l1_ssim_gradient",
          "augment": "mirror+colour", "average": 0.998}  # fmt: skip
PARTS = {
    "the recipe": {},
    "not mirrored": {"augment": "colour"},
    "colours as they are": {"augment": "mirror"},
    "shaken too": {"augment": "mirror+colour+shake"},
    "not averaged": {"average": 0.0},
    "weight decay 0.01": {"weight_decay": 0.01},
    "depth loss of DenseDepth": {"depth_loss": "densedepth"},
    "depth loss with ratios": {"depth_loss": "with_ratios"},
    "depth counts 3 times": {"depth_weight": 3.0},
    "Lovasz instead of BCE + Dice": {"mask_loss": "lovasz"},
    "begun with the weights in assets/": {"start": "assets/difference_unet.pt"},
}
SHOTS = ("moved", "relit", "JPEG 30", "all three")
ALONE = functools.partial(helpers.predict, refine=False)  # the network, without outlines and second size


class ByHand:
    """As if taken by hand: `bg` moved by up to 2 pixels of 192, relit by up to a tenth, both as JPEG."""

    def __init__(self, ds, how):
        self.ds, self.how = ds, how

    def batch(self, indices):
        batch, rng = self.ds.batch(indices), np.random.default_rng(0)
        shots = [self.another(*pair, rng) for pair in zip(batch["bg"], batch["fg_bg"], strict=True)]
        return batch | dict(zip(("bg", "fg_bg"), map(torch.stack, zip(*shots, strict=True)), strict=True))

    def another(self, bg, fg_bg, rng):
        if self.how in ("moved", "all three"):
            size, most = bg.shape[1], round(2 * bg.shape[1] / 192)
            y, x = rng.integers(0, 2 * most + 1, 2)
            bg = pad(bg, most, padding_mode="edge")[:, y : y + size, x : x + size]
        if self.how in ("relit", "all three"):
            bg = (bg * rng.uniform(0.9, 1.1)).round().clamp(0, 255).byte()
        return [jpeg(of, 30) for of in (bg, fg_bg)] if self.how in ("JPEG 30", "all three") else [bg, fg_bg]


HANDS = {"8 px": (8, 0, 1.0), "3°": (0, 3, 1.0), "-40 % light": (0, 0, 0.6)}  # of 192 pixels; degrees; share


class Aligned(ByHand):
    """As if taken by hand, and brought into line: `bg` moved, turned, or darker. A batch is made once."""

    def __init__(self, ds, how):
        super().__init__(ds, how)
        self.made = {}

    def batch(self, indices):
        key = tuple(indices)
        if key not in self.made:
            self.made[key] = super().batch(indices)
        return self.made[key]

    def another(self, bg, fg_bg, rng):
        (pixels, degrees, light), size = HANDS[self.how], bg.shape[1]
        way, sign = rng.uniform(0, 2 * np.pi), rng.choice([-1, 1])
        shift = [size / 192 * pixels * of for of in (np.cos(way), np.sin(way))]
        wider = pad(bg, size // 6, padding_mode="reflect").float()
        wider = affine(wider, float(sign * degrees), shift, 1.0, [0.0, 0.0], 2)  # bilinear
        bg = (center_crop(wider, [size, size]) * light).round().clamp(0, 255).byte()
        aligned = align_background(*(of.permute(1, 2, 0).numpy() for of in (bg, fg_bg)))
        return torch.from_numpy(aligned).permute(2, 0, 1), fg_bg


def measure_aligned(depth, depth_true):
    """Metrics of a batch of (N, 1, H, W), (N,) each, that do not ask for the scale of depth: after the scale
    and shift of least squares (Ranftl et al., 2020) `measure`'s `rmse` and `delta1` as `aligned_rmse` and
    `aligned_delta1`; and `rank`, Spearman's correlation."""
    d, g = depth.flatten(1).double(), depth_true.flatten(1).double()

    def correlation(a, b):
        a, b = (of - of.mean(1, keepdim=True) for of in (a, b))
        return (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt().clamp_min(1e-12)

    def ranks(values):  # of equal ones the mean
        ordered = values.sort(1).values
        places = [torch.searchsorted(ordered, values.contiguous(), right=right) for right in (False, True)]
        return (places[0] + places[1]).double()

    scale = correlation(d, g) * g.std(1) / d.std(1).clamp_min(1e-12)
    fitted = g.mean(1, keepdim=True) + (d - d.mean(1, keepdim=True)) * scale[:, None]
    found = helpers.measure(depth, fitted.view_as(depth_true), None, depth_true)
    aligned = {f"aligned_{name}": found[name] for name in ("rmse", "delta1")}
    return aligned | {"rank": correlation(ranks(d), ranks(g)).float()}


def weights_row(label, model, ds, hands, indices, answers=helpers.predict):
    """IoU, RMSE, delta1; RMSE, delta1 and rank after alignment; the share of samples in which the object is
    nearer than what is seen there without it; IoUs of what was taken by hand."""
    found = []
    for part in np.array_split(indices, max(1, len(indices) // 32)):
        batch = {kind: pictures.to(helpers.DEVICE) for kind, pictures in ds.batch(part).items()}
        truth, depth_true = batch["mask"].bool(), batch["depth"] / 255
        mask, after = answers(model, batch["bg"], batch["fg_bg"])
        before = answers(model, batch["bg"], batch["bg"])[1]
        measured = helpers.measure(mask - 0.5, after, truth, depth_true)
        values = {name: measured[name] for name in ("iou", "rmse", "delta1")}
        values |= measure_aligned(after, depth_true)
        values["nearer"] = (((before - after) * truth).sum((1, 2, 3)) > 0).float()
        for hand in hands:
            shot = hand.batch(part)
            mask = answers(model, shot["bg"], shot["fg_bg"])[0]
            values[hand.how] = helpers.measure(mask - 0.5, mask, truth, None)["iou"]
        found.append(values)
    means = (torch.cat([of[name] for of in found]).mean() for name in found[0])
    print("|", " | ".join([label, *(f"{of:.3f}" for of in means)]), "|")


def captured(folder, model, answers):
    """The mean IoU of the pairs in a folder, as they are and brought into line."""
    ious = []
    for path in sorted(Path(folder).glob("*_mask.png")):
        mask = np.asarray(helpers.Image.open(path).convert("L"))
        stem = path.name.removesuffix("_mask.png")
        bg, fg_bg = (helpers.open_photo(path.with_name(f"{stem}_{of}.jpg")) for of in ("bg", "fg"))
        for photo in (bg, align_background(bg, fg_bg)):
            pair = (torch.from_numpy(of).permute(2, 0, 1)[None] for of in (photo, fg_bg))
            predicted, counted = answers(model, *pair)[0][0, 0].cpu().numpy() > 0, mask != 128
            both, either = predicted & (mask > 128) & counted, (predicted | (mask > 128)) & counted
            ious.append(both.sum() / max(either.sum(), 1))
    return np.reshape(ious, (-1, 2)).mean(0)


def measure_weights(weights, paths, most=100):
    """The table of --weights."""
    head = ["", "IoU", "RMSE", "δ < 1.25", "aligned RMSE", "aligned δ", "rank", "nearer", *HANDS]
    print(f"{helpers.environment()}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    model, zips = load_model(weights), [path for path in paths if not Path(path).is_dir()]
    sets = {Path(path).stem: ZipDataset(path, model.size) for path in zips}
    found = {name: baselines(ds, parts_of(Config("any"), ds)["train"]) for name, ds in sets.items()}
    for name, ds in sets.items():
        some = np.random.default_rng(0).permutation(len(ds))[:most]
        hands = [Aligned(ds, how) for how in HANDS]
        ramp = torch.linspace(1, 0, ds.size).view(1, 1, -1, 1).expand(1, 1, -1, ds.size)
        depths = {f"mean depth of {other}": of.mean_depth for other, of in found.items()} | {"ramp": ramp}
        ways = {f"difference, {of}": Baseline(found[name].threshold, depth) for of, depth in depths.items()}
        for label, way in (ways | {"network": model}).items():
            weights_row(f"{name}: {label}", way, ds, hands, some)
        weights_row(f"{name}: network alone", model, ds, hands, some, ALONE)
    print("\n| pairs by real cameras | IoU as they are | brought into line |\n|---|---|---|")
    ways = [(f"difference, threshold of {name}", of, helpers.predict) for name, of in found.items()]
    ways += [("network", model, helpers.predict), ("network alone", model, ALONE)]
    for folder in (path for path in paths if Path(path).is_dir()):
        for name, way, answers in ways:
            ious = captured(folder, way, answers)
            print("|", " | ".join([name, *(f"{iou:.3f}" for iou in ious)]), "|")


def numbers(model, ds, indices):
    """IoU, RMSE, delta1 on these samples, and the IoU of each way to take them by hand."""
    values = evaluate(model, ds, indices)
    ious = [evaluate(model, ByHand(ds, how), indices)["iou"].mean() for how in SHOTS]
    return [values[name].mean() for name in ("iou", "rmse", "delta1")] + ious


def trained(label, config, minutes):
    """The run in as many steps as the minutes pay for; the trial that tells is a run too."""
    trial = {"epochs": 2, "max_train": 10 * config["batch_size"], "max_test": 8, "seed": 0}
    place = f"quality/{Path(config['data']).stem}-{config['size']}-{minutes:g}/{label.strip('/')}"
    seconds = run(Config(f"{place}/trial", **config | trial), quiet=True).seconds[-1]
    config |= {"epochs": 1, "min_steps": max(1, round(60 * minutes * 10 / seconds))}
    return run(Config(f"{place}/seed-{config['seed']}", **config), quiet=True)


def show(label, several):
    """A row: the means over the zips, ± their spread over the seeds."""
    cells, row = np.array([np.mean(zips, 0) for zips in several]).T, [label]
    for of in cells:
        row.append(f"{of.mean():.3f}" + (f" ± {of.std(ddof=1):.3f}" if len(of) > 1 else ""))
    print("|", " | ".join(row), "|")


def main():
    helpers.DEPTH_LOSSES["with_ratios"] = lambda d, g: (
        helpers.l1_ssim_gradient(d, g) + 0.3 * helpers.silog(d, g)
    )
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("zips", nargs="+", metavar="ZIP")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS, metavar="NAME")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--parts", nargs="*", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--weights", help="measured as they are; nothing is trained")
    given = parser.parse_args()
    if given.weights is not None:
        measure_weights(given.weights, given.zips)
        return
    head = " | ".join(["", "IoU", "RMSE", "δ < 1.25", *SHOTS])
    print(f"{helpers.environment()}\n\n| {head} |\n|{'---|' * 8}")
    part, rows = "test_new_both", {name: {"model": name} for name in given.models}
    if given.parts is not None:
        part, first = "valid_new", {"model": given.models[0]}
        rows = {name: first | PARTS[name] for name in given.parts or PARTS}
    sets = {path: ZipDataset(path, given.size) for path in given.zips}
    parts = {path: parts_of(Config("any"), ds) for path, ds in sets.items()}
    no_network = {path: baselines(ds, parts[path]["train"]) for path, ds in sets.items()}
    show("no network", [[numbers(no_network[path], sets[path], parts[path][part]) for path in sets]])
    for label, changes in rows.items():
        several = []
        for seed in given.seeds:
            config = RECIPE | changes | {"size": given.size, "seed": seed}
            runs = {path: trained(label, config | {"data": path}, given.minutes) for path in sets}
            several.append([numbers(runs[path].model(), sets[path], parts[path][part]) for path in sets])
        show(label, several)


if __name__ == "__main__":
    main()
