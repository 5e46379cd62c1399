"""The losses against other libraries, closed forms and finite differences."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from monai.losses import DiceLoss
from skimage.metrics import structural_similarity
from torchmetrics.functional.image import image_gradients

import helpers
from helpers import DEPTH_LOSSES, MASK_LOSSES, Config, task_loss

ALL = [*MASK_LOSSES.values(), *DEPTH_LOSSES.values()]
WITH_SSIM = ["ssim", "densedepth", "l1_ssim_gradient"]


def random_pair(kind, n=3, height=16, width=20, dtype=torch.float32):
    """A prediction and a truth of unlike pictures: logits and a mask, or two depth maps."""
    generator = torch.Generator().manual_seed(1)
    first, second = torch.rand(2, n, 1, height, width, generator=generator, dtype=dtype)
    first, second = first * torch.linspace(0.3, 1, n).view(-1, 1, 1, 1), second.sqrt()
    return (8 * first - 4, (second > 0.7).to(dtype)) if kind == "mask" else (first, second)


def pair_for(loss, **options):
    return random_pair("mask" if loss in MASK_LOSSES.values() else "depth", **options)


def pixels(*rows):
    return torch.tensor([[rows]], dtype=torch.float32)


# First principles and other libraries


def bce_oracle(z, t):
    p = 1 / (1 + np.exp(-z.numpy().astype(float)))
    return -(t.numpy() * np.log(p) + (1 - t.numpy()) * np.log(1 - p)).mean()


def dice_oracle(z, t):
    return DiceLoss(sigmoid=True, smooth_nr=1, smooth_dr=1)(z, t).item()


def l1_oracle(d, g):
    return np.abs(d.numpy().astype(float) - g.numpy()).mean()


def ssim_oracle(d, g):
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1}
    pairs = zip(d[:, 0].numpy(), g[:, 0].numpy(), strict=True)
    return np.mean([(1 - structural_similarity(*pair, **options)) / 2 for pair in pairs])


def gradient_oracle(d, g):
    return sum((one - other).abs().mean() for one, other in zip(image_gradients(d), image_gradients(g), strict=True)).item()


ORACLES = {
    "bce": bce_oracle,
    "dice": dice_oracle,
    "bce_dice": lambda z, t: bce_oracle(z, t) + dice_oracle(z, t),
    "l1": l1_oracle,
    "ssim": ssim_oracle,
    "gradient": gradient_oracle,
    "densedepth": lambda d, g: 0.1 * l1_oracle(d, g) + ssim_oracle(d, g) + gradient_oracle(d, g),
    "l1_ssim_gradient": lambda d, g: l1_oracle(d, g) + ssim_oracle(d, g) + gradient_oracle(d, g),
}


@pytest.mark.parametrize("name", [*MASK_LOSSES, *DEPTH_LOSSES])
def test_a_loss_equals_an_independent_computation(name):
    kind, losses = ("mask", MASK_LOSSES) if name in MASK_LOSSES else ("depth", DEPTH_LOSSES)
    prediction, target = random_pair(kind)
    value = losses[name](prediction, target)
    assert value.shape == () and value.dtype == torch.float32
    assert value.item() == pytest.approx(ORACLES[name](prediction, target), rel=2e-5)


@pytest.mark.parametrize(
    "loss, prediction, target, expected",
    [
        (helpers.bce, pixels([0, 0]), pixels([0, 1]), math.log(2)),
        (helpers.bce, pixels([math.log(3), -math.log(3)]), pixels([1, 1]), (math.log(4 / 3) + math.log(4)) / 2),
        (helpers.bce, pixels([50, -50]), pixels([0, 1]), 50),
        (helpers.dice, pixels([0, 0]), pixels([1, 0]), 1 - 2 / 3),
        (helpers.dice, pixels([99, -99, 99]), pixels([1, 1, 0]), 1 - 3 / 5),
        (helpers.dice, pixels([-99, -99]), pixels([0, 0]), 0),
        (helpers.dice, pixels([99, 99]), pixels([0, 0]), 1 - 1 / 3),
        (helpers.l1, pixels([0.5, 0.25]), pixels([0, 1]), 0.625),
        (helpers.gradient, pixels([0, 0.5], [0, 0]), pixels([0, 0], [0, 0]), 0.25),
        (helpers.gradient, pixels([0.1, 0.6], [0.1, 0.6]), pixels([0.3, 0.8], [0.3, 0.8]), 0),
    ],
)
def test_exact_numbers(loss, prediction, target, expected):
    assert loss(prediction, target).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("loss", [helpers.dice, helpers.ssim])
def test_a_batch_costs_the_mean_of_its_pictures(loss):
    prediction, target = pair_for(loss)
    alone = [loss(prediction[i : i + 1], target[i : i + 1]).item() for i in range(len(target))]
    assert max(alone) - min(alone) > 0.01
    assert loss(prediction, target).item() == pytest.approx(np.mean(alone), abs=1e-6)


# Gradients and extremes


@pytest.mark.parametrize("loss", ALL)
def test_gradients_equal_finite_differences(loss):
    prediction, target = pair_for(loss, n=1, height=12, width=11, dtype=torch.float64)
    assert torch.autograd.gradcheck(partial(loss, target=target), prediction.requires_grad_())


@pytest.mark.parametrize("loss", DEPTH_LOSSES.values())
def test_perfect_depth_costs_nothing_and_any_other_more(loss):
    target = random_pair("depth")[1]
    prediction = target.clone().requires_grad_()
    value = loss(prediction, target)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6) and prediction.grad.isfinite().all()
    noise = 0.05 * torch.rand(target.shape, generator=torch.Generator().manual_seed(2))
    assert loss(target + noise, target) > value + 1e-3


@pytest.mark.parametrize("loss", MASK_LOSSES.values())
@pytest.mark.parametrize("truth", [torch.zeros(2, 1, 12, 12), torch.ones(2, 1, 12, 12), random_pair("mask")[1]])
def test_masks_empty_full_and_between(loss, truth):
    """Right costs nearly nothing, wrong much; no value and no gradient is infinite, however sure the prediction."""
    right, wrong = (sign * 40 * (truth - 0.5) for sign in (1, -1))
    values = []
    for logits in (right, wrong):
        logits.requires_grad_()
        values.append(loss(logits, truth))
        values[-1].backward()
        assert values[-1].isfinite() and logits.grad.isfinite().all()
    assert values[0].item() == pytest.approx(0, abs=1e-5) and values[1] > 0.9


# Precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", ALL)
def test_half_precision_is_computed_in_float32(loss, dtype):
    prediction, target = pair_for(loss)
    prediction = prediction.to(dtype)
    value = loss(prediction, target)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(prediction.float(), target))


@pytest.mark.parametrize("loss", ALL)
def test_autocast_changes_nothing(loss):
    prediction, target = pair_for(loss)
    outside = loss(prediction, target)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(prediction, target), outside)


# Refusals and names


@pytest.mark.parametrize("name", WITH_SSIM)
def test_ssim_refuses_pictures_smaller_than_its_window(name):
    with pytest.raises(ValueError, match="windows of 11 x 11 pixels; these pictures are 10 x 40"):
        DEPTH_LOSSES[name](*torch.rand(2, 1, 1, 10, 40))
    assert DEPTH_LOSSES[name](*torch.rand(2, 1, 1, 11, 40)).isfinite()


def test_task_loss_adds_the_weighted_depth():
    mask, depth = random_pair("mask"), random_pair("depth")
    predictions_and_truths = (mask[0], depth[0], mask[1], depth[1])
    for weight in (1.0, 0.25, 3.0):
        both = task_loss("dice", "l1", weight)(*predictions_and_truths)
        assert both.item() == pytest.approx(helpers.dice(*mask).item() + weight * helpers.l1(*depth).item())
    assert task_loss("bce", None)(*predictions_and_truths) == helpers.bce(*mask)
    assert task_loss(None, "l1", 2.0)(*predictions_and_truths) == 2 * helpers.l1(*depth)


def test_task_loss_without_any_task():
    with pytest.raises(ValueError, match="both None"):
        task_loss(None, None)


@pytest.mark.parametrize("make", [task_loss, lambda *names: Config("a", mask_loss=names[0], depth_loss=names[1])])
def test_an_unknown_loss_lists_the_known(make):
    with pytest.raises(ValueError, match=r"Unknown mask loss 'dise'\. Known: .*bce, dice, bce_dice"):
        make("dise", "l1")
    with pytest.raises(ValueError, match=r"Unknown depth loss 'l3'\. Known: .*l1, ssim, gradient"):
        make("dice", "l3")


def test_a_loss_of_ones_own_is_one_line(monkeypatch):
    monkeypatch.setitem(MASK_LOSSES, "squares", lambda z, t: (z.sigmoid() - t).square().mean())
    assert Config("a", mask_loss="squares").mask_loss == "squares"
    z, t = pixels([0, 0]), pixels([1, 0])
    assert task_loss("squares", None)(z, z, t, t).item() == pytest.approx(0.25)
