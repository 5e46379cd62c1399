"""Trains on the weights in assets/, on drawn samples and on *composed* ones.

python tests/benchmarks/train_weights.py OUT.pt ZIP ... [--photos FOLDER] [--size N ...] [--share S] ...

A ZIP is a data set of notebook 00: for mask and depth. A composed sample, for the mask alone, is a shape of
drawn objects, moved, turned and scaled, filled with another picture, with a shadow, on a drawn scene or on a
photograph of the folder: photographs have patterns that drawn scenes lack. Those for the weights in assets/
are listed in assets/photos/LICENCES.md. OUT.pt is written every 25 steps, in half precision, ready for use.

The last run, on 400 x 16, 400 x 32 and 660 x 32 backgrounds and objects, each also mirrored, and on notebook
00's full set: --size 64 64 96 64 64 128 64 192 --steps 6300 --composed 0.3 --rate 4e-4 --average 0.998
--precision bfloat16, and --share 0.08 of it.
"""

import argparse
import copy
import itertools
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms.v2.functional import gaussian_blur, resize

from helpers import (
    DEVICE,
    MASK_LOSSES,
    ZipDataset,
    autocast,
    jitter_colours,
    load_model,
    mirror,
    open_photo,
    shake,
    task_loss,
    to_float,
)


def read_photos(folder, sizes):
    """The photographs of a folder, of each size, uint8 {size: (N, 3, size, size)}; none without a folder."""
    files = sorted(Path(folder).glob("*.jpg")) if folder else []
    if folder and not files:
        raise FileNotFoundError(f"{folder} holds no .jpg. Give a folder of photographs, or none.")
    photos = {size: torch.empty(len(files), 3, size, size, dtype=torch.uint8) for size in sizes}
    for i, file in enumerate(files):
        photo = torch.from_numpy(open_photo(file)).permute(2, 0, 1)
        for size, resized in photos.items():
            resized[i] = resize(photo, [size, size], antialias=True)
    return photos


def uniform(n, low, high):
    """A random number for each of n pictures, (n, 1, 1, 1)."""
    return low + (high - low) * torch.rand(n, 1, 1, 1, device=DEVICE)


def one_of(n, pictures):
    """n of the pictures, each drawn at random."""
    return pictures[torch.randint(len(pictures), (n,), device=pictures.device)]


def warped(pictures, rows):
    """Pictures (N, C, H, W) under affine maps: `rows` are the six numbers of each, (6, N)."""
    grid = F.affine_grid(torch.stack(list(rows), 1).view(-1, 2, 3), list(pictures.shape), False)
    return F.grid_sample(pictures, grid, align_corners=False)


def blurred(pictures, low, high):
    """Pictures under a Gaussian blur, alike in all, of a deviation from low to high in pixels of 192."""
    deviation = np.random.uniform(low, high) * pictures.shape[2] / 192
    return gaussian_blur(pictures, [2 * int(2 * deviation) + 1] * 2, [deviation])


def moved(pictures, degrees=25.0, scale=(0.5, 1.6), shift=0.6):
    """Pictures, each mirrored or not, turned by up to so many degrees, scaled, shifted by half sides."""
    n = len(pictures)
    angle, zoom = torch.deg2rad(uniform(n, -degrees, degrees)).flatten(), 1 / uniform(n, *scale).flatten()
    flip, (x, y) = uniform(n, -1, 1).sign().flatten(), uniform(2 * n, -shift, shift).view(2, n)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    return warped(pictures, (cos * flip, -sin, x, sin * flip, cos, y))


def filling(own, pictures, bg):
    """What the shapes are filled with: the object, another picture, a colour, or nearly the background."""
    n = len(bg)
    other = moved(one_of(n, pictures), 180, (1, 3), 0.4)
    colour = torch.rand(n, 3, 1, 1, device=DEVICE) * (1 + 0.3 * other - other.mean((1, 2, 3), keepdim=True))
    near = bg * uniform(n, 0.6, 1.4) + 0.25 * (torch.rand(n, 3, 1, 1, device=DEVICE) - 0.5)
    which = torch.multinomial(torch.tensor([0.3, 0.4, 0.15, 0.15], device=DEVICE), n, replacement=True)
    filled = torch.stack([own, other, colour, near])[which, torch.arange(n, device=DEVICE)]
    return (filled * uniform(n, 0.7, 1.3)).clamp(0, 1)


def shadowed(bg, shape):
    """bg with the shape's shadow: that of a thing that stands, fallen to any side, or of one that lies."""
    n, height = len(bg), bg.shape[2]
    rows = torch.arange(1, height + 1, device=DEVICE)[:, None] * (shape[:, 0] > 0.5)
    feet = 2 * rows.flatten(1).amax(1) / height - 1
    shear, squash = uniform(n, -1.2, 1.2).flatten(), uniform(n, 0.7, 3.0).flatten()
    squash = squash * (uniform(n, -0.4, 0.6).sign().flatten())  # below 0: it falls towards the camera
    zero, one, aside = (
        torch.zeros_like(feet),
        torch.ones_like(feet),
        0.3 * uniform(2 * n, -1, 1).view(2, n) ** 3,
    )
    standing = torch.stack([one, shear, -shear * feet, zero, squash, feet * (1 - squash)])
    lying = torch.stack([one, zero, aside[0], zero, one, aside[1]])
    fallen = warped(shape, torch.where(uniform(n, 0, 1).flatten() < 0.65, standing, lying))
    fallen = blurred(fallen, 0.6, 6)
    return bg * (1 - fallen * uniform(n, 0.2, 0.8) * (uniform(n, 0, 1) < 0.85))


def composed(batch, photos):
    """At most as many composed samples as a batch has: bg, fg_bg, mask. `photos` (M, 3, H, W) may be none."""
    n, bg = len(batch["bg"]), one_of(len(batch["bg"]), batch["bg"])
    pictures = torch.cat([batch["bg"], batch["fg_bg"], *([one_of(n, photos)] if len(photos) else [])])
    if len(photos):
        real = moved(one_of(n, photos), 4, (1.1, 2.0), 0.08)
        bg = torch.where(uniform(n, 0, 1) < 0.6, real, bg)
    shape, own = moved(one_of(n, torch.cat([batch["mask"], batch["fg_bg"]], 1))).split((1, 3), 1)
    second = moved(one_of(n, batch["mask"]), 60) * (uniform(n, 0, 1) < 0.25)
    own = torch.where(second > shape, torch.rand(n, 3, 1, 1, device=DEVICE), own)
    shape = ((torch.maximum(shape, second) - 0.5) * uniform(n, 1, 3) + 0.5).clamp(0, 1)  # edges soft or sharp
    opaque = torch.where(uniform(n, 0, 1) < 0.1, uniform(n, 0.72, 1), 1)
    ground = shadowed(bg, shape)
    fg_bg = ground + (filling(own, pictures, bg) - ground) * shape * opaque
    mask = (shape > 0.5).float()
    share = mask.mean((1, 2, 3))
    differs = ((fg_bg - bg).abs().amax(1, keepdim=True) * mask).mean((1, 2, 3)) / share.clamp_min(1e-6)
    kept = (differs > 0.1) & (share > 0.004) & (share < 0.6)  # what cannot be seen teaches nothing
    return {"bg": bg[kept], "fg_bg": fg_bg[kept], "mask": mask[kept]}


def other_detail(batch):
    """In half of the samples detail fainter or stronger and some of another's, alike in both pictures:
    depth is to be told from the scene, not from patterns, of which drawn scenes have their own."""
    n, both = len(batch["bg"]), torch.cat([batch["bg"], batch["fg_bg"]], 1)
    coarse = blurred(both, 0.5, 3)
    detail = both - coarse
    foreign = moved(one_of(n, detail[:, :3])).repeat(1, 2, 1, 1)
    changed = (coarse + detail * uniform(n, 0, 1.5) + foreign * uniform(n, 0, 1)).clamp(0, 1)
    changed = torch.where(uniform(n, 0, 1) < 0.5, changed, both)
    return batch | dict(zip(("bg", "fg_bg"), changed.split(3, 1), strict=True))


def in_turn(n):
    """The numbers below n without end: each once, in a random order, then each anew."""
    while True:
        yield from np.random.permutation(n)


def batches(given):
    """The batches of all steps: bg, fg_bg and mask, of which the first, the drawn ones, have a depth."""
    sets = {size: [ZipDataset(path, size) for path in given.zip] for size in set(given.size)}
    photos = to_float(read_photos(given.photos, sets), DEVICE)
    counts = np.array([len(ds) for ds in sets[given.size[0]]])
    order = [in_turn(count) for count in counts]
    for size in itertools.islice(itertools.cycle(given.size), given.steps):
        which = np.random.choice(len(counts), p=counts / counts.sum())
        drawn = round(given.batch * (max(given.size) / size) ** 2 * (1 - given.composed))
        batch = to_float(sets[size][which].batch(list(itertools.islice(order[which], drawn))), DEVICE)
        extra, few = composed(batch, photos[size]), round(drawn * given.composed / (1 - given.composed))
        batch = mirror(other_detail(batch))
        batch |= {kind: torch.cat([batch[kind], of[:few]]) for kind, of in extra.items()}
        batch |= jitter_colours({kind: batch[kind] for kind in ("bg", "fg_bg")})
        yield shake(batch) if np.random.random() < given.shaken else batch


def train(model, given):
    """Yields the step, the drawn samples seen by then, the loss and the averaged network, every 25 steps."""
    mask_and_depth, mask_alone = task_loss("bce_dice", "l1_ssim_gradient"), MASK_LOSSES["bce_dice"]
    optimizer = torch.optim.AdamW(model.parameters(), given.rate, weight_decay=0.05)
    schedule = OneCycleLR(optimizer, given.rate, given.steps + 1, pct_start=0.1)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(given.average), use_buffers=True)
    model.train()
    seen = 0
    for step, batch in enumerate(batches(given), 1):
        with autocast(given.precision):
            mask_logits, depth = (of.float() for of in model(batch["bg"], batch["fg_bg"]))
        mask, true_depth, n = batch["mask"], batch["depth"], len(batch["depth"])
        loss = mask_and_depth(mask_logits[:n], depth[:n], mask[:n], true_depth)
        loss = loss + (mask_alone(mask_logits[n:], mask[n:]) if len(mask) > n else 0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        seen += n
        if step % 25 == 0 or step == given.steps:
            yield step, seen, loss.item(), average.module


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", help="where the weights are written")
    parser.add_argument("zip", nargs="+", help="drawn data sets")
    parser.add_argument("--photos", help="a folder of .jpg, for backgrounds and fillings")
    parser.add_argument("--start", default="", help="weights to begin with; by default those in assets/")
    parser.add_argument("--size", type=int, nargs="+", default=[192], help="one, or several in turn")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=10, help="at the largest size; at others as many pixels")
    parser.add_argument("--composed", type=float, default=0.5, help="the share of a batch that is composed")
    parser.add_argument("--shaken", type=float, default=0.7, help="the share of batches as if taken by hand")
    parser.add_argument("--rate", type=float, default=6e-4, help="the highest learning rate")
    parser.add_argument("--average", type=float, default=0.99, help="how slowly the average of weights moves")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--share", type=float, default=1.0, help="of what is learnt in OUT; the rest: START")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    np.random.seed(given.seed)
    network, started = load_model(given.start), time.monotonic()
    before = copy.deepcopy(network.state_dict())
    for step, seen, loss, model in train(network, given):
        state = {
            name: torch.lerp(before[name], of, given.share).half() if of.is_floating_point() else of
            for name, of in model.state_dict().items()
        }
        torch.save(state, given.out)
        spent = time.monotonic() - started
        print(f"step {step}, {seen} samples, loss {loss:.3f}, {spent:.0f} s", flush=True)


if __name__ == "__main__":
    main()
