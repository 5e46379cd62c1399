"""Augmentations that make new pictures: against scikit-image, Pillow's JPEG and closed forms."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.transform import warp
from torch import nn
from torch.nn import functional as F

import helpers
from helpers import DEPTH_LOSSES, compose, jpeg, shake, task_loss

HEIGHT, WIDTH = 20, 28
KINDS = (("bg", 3), ("fg_bg", 3), ("depth", 1))


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def some(n=8, height=HEIGHT, width=WIDTH):
    """Samples of noise: background and picture have nothing in common, so that no pixel can be taken from the wrong one."""
    batch = {kind: torch.rand(n, channels, height, width, generator=random(k)) for k, (kind, channels) in enumerate(KINDS)}
    batch["mask"] = torch.zeros(n, 1, height, width)
    for mask, (y, x) in zip(batch["mask"], torch.randint(-3, 17, (n, 2), generator=random()).tolist(), strict=True):
        mask[:, max(y, 0) : y + 9, max(x, 0) : x + 12] = 1  # the picture's edge cuts through some
    return batch


def draws(n=8, **columns):
    """For `compose`: chosen, not busy, not mirrored, as large as before, not moved, but for what is said."""
    values = {"chosen": 0.0, "busy": 0.5, "flip": 0.5, "scale": 0.5, "x": 0.5, "y": 0.5} | columns
    return torch.tensor([list(values.values())]).repeat(n, 1)


def around(mask):
    """The mask and the pixels next to it, also at its corners."""
    height, width = mask.shape[-2:]
    padded = F.pad(mask, (1, 1, 1, 1))
    return torch.stack([padded[..., y : y + height, x : x + width] for y in range(3) for x in range(3)]).amax(0)


# compose


def placed(picture, x, y, width, height, mode):
    """A picture (C, H, W) enlarged about its middle by width and height, then moved by x and y, shares of it."""
    rows, columns = picture.shape[1:]
    back = [[1 / width, 0, (0.5 - columns / 2 - x * columns) / width + columns / 2 - 0.5]]
    back += [[0, 1 / height, (0.5 - rows / 2 - y * rows) / height + rows / 2 - 0.5], [0, 0, 1]]
    whole = picture.double().numpy().transpose(1, 2, 0)
    return torch.from_numpy(warp(whole, np.array(back), order=1, mode=mode, clip=False).transpose(2, 0, 1))


def composed(batch, draw):
    """What `compose` promises, a sample at a time."""
    for n, (chosen, busy, flip, scale, x, y) in enumerate(draw.tolist()):
        one, after = ({kind: pictures[k % len(draw)] for kind, pictures in batch.items()} for k in (n, n + 1))
        if chosen >= 0.5:
            yield one | {"known": torch.ones_like(one["mask"])}
            continue
        scale = 0.75 + 0.5 * scale
        where = ((x - 0.5) / 2, (y - 0.5) / 2, -scale if flip < 0.5 else scale, scale)
        mask = placed(one["mask"], *where, "constant") > 0.5
        bg = after["fg_bg" if busy < 0.5 else "bg"].double()
        added = placed(one["fg_bg"] - one["bg"], *where, "constant") * (around(mask.float()) > 0)
        fg_bg = torch.where(mask, placed(one["fg_bg"], *where, "edge"), (bg + added).clamp(0, 1))
        known = ~mask if busy < 0.5 else ~mask & (after["mask"] == 0)
        yield {"bg": bg, "fg_bg": fg_bg, "mask": mask, "depth": after["depth"], "known": known}


@pytest.mark.parametrize("n", [1, 2, 24])
def test_composed_samples_are_those_of_another_library(n):
    batch, draw = some(n), torch.rand(n, 6, generator=random(n))
    draw[0, 0] = 0.0
    before = {kind: pictures.clone() for kind, pictures in batch.items()}
    found = compose(batch, draw)
    for k, expected in enumerate(composed(batch, draw)):
        assert found.keys() == expected.keys()
        for kind, picture in expected.items():
            torch.testing.assert_close(found[kind][k], picture.float(), rtol=0, atol=1e-4, msg=f"{kind} of sample {k}")
    assert all(torch.equal(batch[kind], before[kind]) for kind in before)
    assert set(found["mask"].unique().tolist()) == set(found["known"].unique().tolist()) == {0, 1}


def test_samples_that_are_not_chosen_are_left_alone():
    batch = some()
    found = compose(batch, draws(chosen=0.5))
    assert all(torch.equal(found[kind], batch[kind]) for kind in batch)
    assert torch.equal(found["known"], torch.ones_like(batch["mask"]))


@pytest.mark.parametrize("busy", [0.49, 0.5])
def test_an_object_that_stays_where_it_was_has_its_pixels_and_the_next_samples_surroundings(busy):
    batch = some()
    found = compose(batch, draws(busy=busy))
    after = {kind: torch.cat([pictures[1:], pictures[:1]]) for kind, pictures in batch.items()}
    inside, beside = batch["mask"].bool(), around(batch["mask"]) == 0
    assert torch.equal(found["mask"], batch["mask"]) and torch.equal(found["depth"], after["depth"])
    assert torch.equal(found["bg"], after["fg_bg" if busy < 0.5 else "bg"])
    torch.testing.assert_close(found["fg_bg"] * inside, batch["fg_bg"] * inside, rtol=0, atol=1e-5)
    assert torch.equal(found["fg_bg"] * beside, found["bg"] * beside)
    unknown = inside if busy < 0.5 else inside | after["mask"].bool()  # the depth is that of a picture with an object
    assert torch.equal(found["known"], (~unknown).float())


def test_an_object_at_the_pictures_edge_is_moved_inwards_without_a_dark_line():
    batch = some() | {"fg_bg": torch.full((8, 3, HEIGHT, WIDTH), 0.75)}
    batch["mask"][..., :6] = 1
    found = compose(batch, draws(x=0.72, y=0.63))
    assert found["mask"][..., 5].any() and not found["mask"][..., :3].any()
    torch.testing.assert_close(found["fg_bg"] * found["mask"], 0.75 * found["mask"].expand(-1, 3, -1, -1))


def test_an_object_that_is_moved_out_of_the_picture_leaves_the_next_background():
    batch = some()
    batch["mask"] = torch.zeros_like(batch["mask"])
    batch["mask"][..., :3, :4] = 1
    found = compose(batch, draws(x=0.01, y=0.01))
    assert not found["mask"].any() and torch.equal(found["fg_bg"], found["bg"])
    assert torch.equal(found["known"], 1 - batch["mask"])  # the next sample's object, which was taken out of its picture


def test_every_other_sample_is_composed_and_each_in_its_own_way():
    found, batch = compose(some(400)), some(400)
    chosen = torch.tensor([not torch.equal(*pair) for pair in zip(found["bg"], batch["bg"], strict=True)])
    busy = (found["bg"] == batch["fg_bg"].roll(-1, 0)).flatten(1).all(1)
    assert 160 < chosen.sum() < 240 and 60 < busy.sum() < 140
    assert len(found["mask"][chosen].unique(dim=0)) > 0.9 * chosen.sum()


# Depth that is not known


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(6, 2, 3, padding=1)

    def forward(self, bg, fg_bg):
        self.mask_logits, depth = self.layer(torch.cat([bg, fg_bg], 1)).chunk(2, 1)
        self.depth = depth.sigmoid()
        return self.mask_logits, self.depth


def slopes(batch, depth_loss, precision="float32"):
    """The gradient of a training step's loss at the depth that was predicted, and at the weights."""
    torch.manual_seed(0)
    device = "cpu" if precision == "float32" else helpers.DEVICE  # a GPU does not always give the same bits
    net = Net().to(device)
    loss = helpers._Step(net, task_loss("bce", depth_loss), precision)({k: p.to(device) for k, p in batch.items()})
    return torch.autograd.grad(loss, [net.depth, *net.parameters()])


@pytest.mark.parametrize("depth_loss", DEPTH_LOSSES)
def test_depth_is_learned_where_it_is_known_alone(depth_loss):
    batch = compose(some(4), draws(4, x=0.6))
    expected, unknown = slopes(batch, depth_loss), batch["known"] == 0
    assert 0.1 < unknown.float().mean() < 0.9
    for change, same in ((unknown, True), (~unknown, False)):
        for value in (1 - batch["depth"], torch.full_like(batch["depth"], torch.nan)):
            other = slopes(batch | {"depth": torch.where(change, value, batch["depth"])}, depth_loss)
            assert all(torch.equal(*pair) for pair in zip(other, expected, strict=True)) == same
    everywhere = batch | {"known": torch.ones_like(batch["known"])}
    without = {kind: pictures for kind, pictures in batch.items() if kind != "known"}
    both = slopes(everywhere, depth_loss), slopes(without, depth_loss)
    assert all(torch.equal(*pair) for pair in zip(*both, strict=True))
    assert not torch.equal(both[0][0], expected[0])


@pytest.mark.parametrize("precision", helpers.PRECISIONS)
def test_what_is_not_known_adds_nothing_to_an_absolute_error(precision):
    """Whose slope is 1/N at each of N pixels, of either sign, and 0 where both are the same to the last digit."""
    batch = compose(some(4), draws(4))
    slope = slopes(batch, "l1", precision)[0].float().cpu()
    torch.testing.assert_close(slope.abs(), batch["known"] / batch["known"].numel(), rtol=2**-7, atol=0)


# jpeg


def colourful(height, width, texture, seed=0):
    """uint8 (H, W, 3): slow waves of each colour, and noise of this deviation over 2 x 2 pixels."""
    y, x = np.mgrid[:height, :width] / 32
    dice = np.random.default_rng(seed)
    waves = [np.sin(2 * np.pi * (a * x + b * y + c)) for a, b, c in dice.random((3, 3))]
    noise = dice.normal(0, texture, (height // 2, width // 2, 3)).repeat(2, 0).repeat(2, 1)
    return (128 + 80 * np.stack(waves, 2) + noise).clip(0, 255).astype(np.uint8)


def pillow(picture, quality):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return Image.open(file)


def ours(picture, quality, dtype=torch.float32):
    """In levels of 255."""
    tensor = torch.from_numpy(picture).permute(2, 0, 1)[None].to(dtype) / 255
    return 255 * jpeg(tensor, torch.tensor([quality], dtype=dtype))[0].permute(1, 2, 0).numpy()


def assert_near(found, picture, theirs):
    """Pillow rounds to whole levels four times, and a frequency that lies midway between two multiples of its step can come out
    as the other one: what is left is below a level or, of a picture that is changed by more, a sixth of the change."""
    change = np.abs(theirs - picture).mean()
    assert np.abs(found - theirs).mean() < 0.75 + change / 6 < max(1, change / 2)


@pytest.mark.parametrize("texture", [0, 20])
@pytest.mark.parametrize("quality", [10, 30, 75, 95])
def test_jpeg_is_that_of_pillow(quality, texture):
    picture = colourful(64, 96, texture)
    assert_near(ours(picture, quality), picture, np.array(pillow(picture, quality)).astype(float))


@pytest.mark.parametrize("quality", [10, 75])
def test_grey_pictures_stay_grey(quality):
    grey = colourful(48, 32, 20)[..., :1]
    found = ours(grey.repeat(3, 2), quality)
    np.testing.assert_allclose(found, found[..., :1].repeat(3, 2), atol=1e-3)
    assert_near(found[..., 0], grey[..., 0], np.array(pillow(grey[..., 0], quality)).astype(float))


def test_the_steps_of_quality_50_are_those_of_pillow():
    _, tables, *_ = helpers._jpeg_constants(torch.device("cpu"), torch.float32)
    theirs = pillow(colourful(16, 16, 0), 50).quantization
    assert tables.flatten(1).tolist() == [theirs[0], theirs[1]]


def test_quality_100_rounds_each_frequency_and_no_more():
    """Each to a whole number: errors spread evenly over a width of 1, whose deviation is 1/sqrt(12), here as there."""
    grey = 60 + 120 * np.random.default_rng(0).random((64, 64, 1)).repeat(3, 2)
    assert np.std(ours(grey, 100, torch.double) - grey) == pytest.approx(12**-0.5, rel=0.03)


def test_each_picture_has_its_own_quality_and_values_stay_between_0_and_1():
    pictures = torch.rand(3, 3, 32, 16, generator=random()).round()
    qualities = torch.tensor([10.0, 90.0, 50.0])
    found = jpeg(pictures, qualities)
    for k in range(3):
        torch.testing.assert_close(found[k : k + 1], jpeg(pictures[k : k + 1], qualities[k : k + 1]), rtol=0, atol=1e-4)
    errors = (found - pictures).square().mean((1, 2, 3))
    assert errors[0] > errors[2] > errors[1] and found.min() >= 0 and found.max() <= 1


@pytest.mark.parametrize("height, width", [(24, 32), (32, 24), (8, 8)])
def test_sizes_that_blocks_do_not_divide_are_refused(height, width):
    with pytest.raises(ValueError, match=f"blocks of 16 pixels: {height} x {width} do not divide"):
        jpeg(torch.rand(1, 3, height, width), torch.tensor([50.0]))


# shake

EFFECTS = {name: k for k, name in enumerate(("moves", "relights", "shades", "roughens", "codes"))}


def shaking(n, effect=None, values=()):
    """Draws that choose one effect or none; then what else is drawn, by its column from 0."""
    draw = torch.full((n, 17), 0.5)
    draw[:, :5] = 0.3
    if effect:
        draw[:, EFFECTS[effect]] = 0.299
    for column, value in dict(values).items():
        draw[:, 5 + column] = torch.as_tensor(value)
    return draw


def shaken(batch, *options, noise=None):
    """After checks of what holds for every effect."""
    before = {kind: pictures.clone() for kind, pictures in batch.items()}
    noise = torch.randn(len(batch["bg"]), 6, *batch["bg"].shape[2:], generator=random()) if noise is None else noise
    found = shake(batch, shaking(len(batch["bg"]), *options), noise)
    assert all(torch.equal(batch[kind], before[kind]) for kind in before)
    assert found.keys() == batch.keys()
    assert all(found[kind] is batch[kind] for kind in batch if kind not in ("bg", "fg_bg"))
    for kind in ("bg", "fg_bg"):
        assert found[kind].shape == batch[kind].shape and found[kind].min() >= 0 and found[kind].max() <= 1
    return found


def test_samples_that_nothing_happens_to_are_left_alone():
    batch = some(4, 32, 48) | {"known": torch.ones(4, 1, 32, 48)}
    found = shaken(batch)
    assert all(torch.equal(found[kind], batch[kind]) for kind in batch)


def test_the_background_moves_by_up_to_two_and_a_half_of_192_pixels():
    """By whole pixels, of a picture that has 192 of them beside each other and 96 below: by 5 (.9 - .5) to the right and by
    2.5 (.1 - .5) up. Outside of it, its edge goes on."""
    batch = some(2, 96, 192)
    found = shaken(batch, "moves", {0: 0.9, 1: 0.1})
    expected = torch.cat([batch["bg"][..., 1:, :], batch["bg"][..., -1:, :]], 2)
    expected = torch.cat([expected[..., :1], expected[..., :1], expected[..., :-2]], 3)
    torch.testing.assert_close(found["bg"], expected, rtol=0, atol=1e-4)
    assert torch.equal(found["fg_bg"], batch["fg_bg"])


def test_the_light_of_the_background_changes_and_that_of_each_colour():
    batch = some(4, 32, 48)
    found = shaken(batch, "relights", {2: 0.9, 3: [0.0, 0.25, 0.5, 0.75], 4: 0.5, 5: 1.0})
    for sample, drawn in enumerate([0.0, 0.25, 0.5, 0.75]):
        for channel, colour in enumerate((drawn, 0.5, 1.0)):
            factor = 1 + 0.12 * (2 * 0.9 - 1) + 0.04 * (2 * colour - 1)
            expected = (batch["bg"][sample, channel] * factor).clamp(0, 1)
            torch.testing.assert_close(found["bg"][sample, channel], expected)
    assert torch.equal(found["fg_bg"], batch["fg_bg"])


@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
def test_a_shadow_takes_up_to_half_of_the_light_where_it_is_deepest_and_less_around(strength):
    batch = some(1, 48, 80) | {"fg_bg": torch.ones(1, 3, 48, 80)}
    found = shaken(batch, "shades", {6: 20 / 79, 7: 30 / 47, 8: strength})
    light = found["fg_bg"][0]
    assert torch.equal(light[0], light[1]) and torch.equal(light[0], light[2])
    assert light[0, 30, 20].item() == light.min().item() == pytest.approx(1 - 0.5 * strength)
    for y, x in ((30, 40), (12, 20), (40, 5), (0, 79)):
        away = ((x - 20) / 79 / 0.2) ** 2 + ((y - 30) / 47 / 0.1) ** 2
        assert light[0, y, x].item() == pytest.approx(1 - 0.5 * strength * np.exp(-away))
    assert torch.equal(found["bg"], batch["bg"])


def test_a_shadow_darkens_every_picture_and_brightens_none():
    batch = some(4, 32, 48)
    found = shaken(batch, "shades", {8: 1.0})
    assert (found["fg_bg"] <= batch["fg_bg"]).all() and (found["fg_bg"] >= 0.5 * batch["fg_bg"]).all()
    assert (found["fg_bg"] < batch["fg_bg"]).any()


def test_noise_is_that_which_is_given_each_picture_its_own():
    batch = some(4, 32, 48)
    noise = torch.randn(4, 6, 32, 48, generator=random())
    noise[:, :, :, :20] = 0
    found = shaken(batch, "roughens", {9: [0.0, 0.5, 0.75, 1.0]}, noise=noise)
    for kind, part in (("bg", noise[:, :3]), ("fg_bg", noise[:, 3:])):
        assert torch.equal(found[kind][..., :20], batch[kind][..., :20])
        for sample, drawn in enumerate([0.0, 0.5, 0.75, 1.0]):
            expected = (batch[kind][sample] + 0.03 * drawn * part[sample]).clamp(0, 1)
            torch.testing.assert_close(found[kind][sample], expected)


def test_both_pictures_are_saved_each_in_its_own_quality():
    batch = some(3, 32, 48)
    found = shaken(batch, "codes", {10: [0.0, 0.5, 1.0], 11: [0.3, 0.2, 0.1]})
    for kind, qualities in (("bg", [25, 60, 95]), ("fg_bg", [46, 39, 32])):
        expected = jpeg(batch[kind], torch.tensor(qualities, dtype=torch.float32))
        torch.testing.assert_close(found[kind], expected, rtol=0, atol=1e-5)


def test_each_effect_happens_to_three_samples_in_ten_whatever_else_does():
    """Four of them change a background, three a picture."""
    torch.manual_seed(0)
    batch = some(1000, 16, 16)
    found = shake(batch)
    for kind, effects in (("bg", 4), ("fg_bg", 3)):
        changed = (found[kind] != batch[kind]).flatten(1).any(1).float().mean()
        assert changed.item() == pytest.approx(1 - 0.7**effects, abs=0.05)


def test_extreme_draws_leave_values_between_0_and_1():
    batch = some(8, 32, 48)
    draw = torch.zeros(8, 17)
    draw[::2, 5:] = 0.999
    found = shake(batch, draw, 3 * torch.randn(8, 6, 32, 48, generator=random()))
    for kind in ("bg", "fg_bg"):
        assert found[kind].isfinite().all() and found[kind].min() >= 0 and found[kind].max() <= 1


@pytest.mark.parametrize("augment", [compose, shake])
def test_a_share_of_a_batch_that_is_empty_stays_empty(augment):
    """As the last batch leaves it to one of two processes."""
    found = augment({kind: pictures[:0] for kind, pictures in some(1, 16, 32).items()})
    assert {kind: pictures.shape for kind, pictures in found.items()}["fg_bg"] == (0, 3, 16, 32)
