"""The losses against other libraries, closed forms and finite differences."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from monai.losses import DiceLoss, TverskyLoss
from skimage.metrics import structural_similarity
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torchmetrics.functional.image import image_gradients
from torchvision.ops import sigmoid_focal_loss

import helpers
from helpers import DEPTH_LOSSES, MASK_LOSSES, Config, task_loss

LOSSES = {"mask": MASK_LOSSES, "depth": DEPTH_LOSSES}
ALL = [(kind, name) for kind, losses in LOSSES.items() for name in losses]  # some names stand for one of each
OVER_THE_BATCH = ("depth", "berhu")  # the only loss that is not the mean of what its pictures cost

every = pytest.mark.parametrize("kind, name", ALL, ids=map("-".join, ALL))
every_mask = pytest.mark.parametrize("name", MASK_LOSSES)
every_depth = pytest.mark.parametrize("name", [name for name in DEPTH_LOSSES if name != "dice"])


def random_pair(kind, n=3, height=16, width=20, dtype=torch.float32):
    """A prediction and a truth of unlike pictures: logits and a mask, or two depth maps."""
    generator = torch.Generator().manual_seed(1)
    first, second = torch.rand(2, n, 1, height, width, generator=generator, dtype=dtype)
    first, second = first * torch.linspace(0.3, 1, n).view(-1, 1, 1, 1), second.sqrt()
    return (8 * first - 4, (second > 0.7).to(dtype)) if kind == "mask" else (first, second)


def pixels(*rows):
    return torch.tensor([[rows]], dtype=torch.float32)


def flat(level, side=12):
    return torch.full((1, 1, side, side), level)


# First principles and other libraries. Each is given float64 arrays: p, the mask's probability or the depth, and the truth.


def mean_of_pictures(loss):
    """The oracle of one picture, for a batch."""
    return lambda p, t: np.mean([loss(*pair) for pair in zip(p[:, 0], t[:, 0], strict=True)])


def cross_entropy(p, t, positive=1.0):
    return -(positive * t * np.log(p) + (1 - t) * np.log(1 - p)).mean()


def absolute(p, t):
    return np.abs(p - t).mean()


@mean_of_pictures
def root_of_squares(p, t):
    return np.sqrt(np.square(p - t).mean())


@mean_of_pictures
def dissimilarity(p, t):
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1}
    return (1 - structural_similarity(p, t, **options)) / 2


def edges(p, t):
    pairs = zip(image_gradients(torch.from_numpy(p)), image_gradients(torch.from_numpy(t)), strict=True)
    return sum((one - other).abs().mean() for one, other in pairs).item()


def monai_dice(p, t):
    return DiceLoss(smooth_nr=1, smooth_dr=1)(torch.from_numpy(p), torch.from_numpy(t)).item()


def monai_tversky(p, t):
    loss = TverskyLoss(alpha=0.3, beta=0.7, smooth_nr=1, smooth_dr=1)
    return loss(torch.from_numpy(p), torch.from_numpy(t)).item()


@mean_of_pictures
def lovasz_by_levels(p, t):
    """The extension of a set function is its integral over the levels of the errors: here the Jaccard loss of the pixels
    whose hinge is at least so high, |wrong| / |true or wrong|, times the height of each step."""
    hinge = np.maximum(0, 1 - np.log(p / (1 - p)) * (2 * t - 1))
    levels = np.unique([0, *hinge.flat])
    wrong = [hinge >= level for level in levels[1:]]
    return sum(step * w.sum() / (w | (t == 1)).sum() for step, w in zip(np.diff(levels), wrong, strict=True))


def huber_by_cases(p, t):
    e = np.abs(p - t)
    return np.where(e <= 0.1, e**2 / 2, 0.1 * (e - 0.05)).mean()


def berhu_by_cases(p, t):
    e = np.abs(p - t)
    c = 0.2 * e.max()
    return np.where(e <= c, e, (e**2 + c**2) / (2 * c)).mean()


@mean_of_pictures
def soft_dice(p, t):
    return 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)


@mean_of_pictures
def log_scatter(p, t):
    q = np.log(np.maximum(p, 1 / 255)) - np.log(np.maximum(t, 1 / 255))
    return np.sqrt(np.mean(q**2) - np.mean(q) ** 2 / 2)


ORACLES = {
    "mask": {
        "bce": cross_entropy,
        "weighted_bce": partial(cross_entropy, positive=5),
        "l1": absolute,
        "rmse": root_of_squares,
        "dice": monai_dice,
        "tversky": monai_tversky,
        "focal": lambda p, t: sigmoid_focal_loss(*map(torch.from_numpy, (np.log(p / (1 - p)), t)), reduction="mean").item(),
        "lovasz": lovasz_by_levels,
        "ssim": dissimilarity,
        "bce_dice": lambda p, t: cross_entropy(p, t) + monai_dice(p, t),
    },
    "depth": {
        "l1": absolute,
        "rmse": root_of_squares,
        "huber": huber_by_cases,
        "berhu": berhu_by_cases,
        "ssim": dissimilarity,
        "gradient": edges,
        "dice": soft_dice,
        "silog": log_scatter,
        "l1_ssim_gradient": lambda p, t: absolute(p, t) + dissimilarity(p, t) + edges(p, t),
        "densedepth": lambda p, t: 0.1 * absolute(p, t) + dissimilarity(p, t) + edges(p, t),
    },
}


def test_the_losses_are_those_of_the_reports():
    assert {kind: set(losses) for kind, losses in LOSSES.items()} == {kind: set(oracles) for kind, oracles in ORACLES.items()}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.float64, 1e-6)])  # SSIM's window is float32
@every
def test_a_loss_equals_an_independent_computation(kind, name, dtype, tolerance):
    prediction, target = random_pair(kind, dtype=dtype)
    value = LOSSES[kind][name](prediction, target)
    assert value.shape == () and value.dtype == dtype
    p, t = prediction.double().numpy(), target.double().numpy()
    p = 1 / (1 + np.exp(-p)) if kind == "mask" else p
    assert value.item() == pytest.approx(ORACLES[kind][name](p, t), rel=tolerance)


SURE = 99.0  # as a logit
UNLIKE = (1 - (2 * 0.2 * 0.8 + 1e-4) / (0.2**2 + 0.8**2 + 1e-4)) / 2  # SSIM's loss of flat pictures of .2 and .8


@pytest.mark.parametrize(
    "loss, prediction, target, expected",
    [
        (helpers.bce, pixels([0, 0]), pixels([0, 1]), math.log(2)),
        (helpers.bce, pixels([math.log(3), -math.log(3)]), pixels([1, 1]), (math.log(4 / 3) + math.log(4)) / 2),
        (helpers.bce, pixels([50, -50]), pixels([0, 1]), 50),
        (helpers.weighted_bce, pixels([0, 0]), pixels([0, 1]), 3 * math.log(2)),
        (partial(helpers.weighted_bce, pos_weight=2.0), pixels([0, 0]), pixels([1, 1]), 2 * math.log(2)),
        (MASK_LOSSES["l1"], pixels([0, math.log(3)]), pixels([1, 1]), 0.375),
        (MASK_LOSSES["rmse"], pixels([math.log(3), SURE]), pixels([0, 1]), 0.75 / math.sqrt(2)),
        (MASK_LOSSES["ssim"], flat(math.log(1 / 4)), flat(0.8), UNLIKE),
        (MASK_LOSSES["dice"], pixels([0, 0]), pixels([1, 0]), 1 - 2 / 3),
        (MASK_LOSSES["dice"], pixels([SURE, -SURE, SURE]), pixels([1, 1, 0]), 1 - 3 / 5),
        (MASK_LOSSES["dice"], pixels([-SURE, -SURE]), pixels([0, 0]), 0),
        (MASK_LOSSES["dice"], pixels([SURE, SURE]), pixels([0, 0]), 1 - 1 / 3),
        (helpers.tversky, pixels([SURE, -SURE, SURE]), pixels([1, 1, 0]), 1 - 2 / 3),
        (helpers.tversky, pixels([SURE, SURE, SURE]), pixels([1, 0, 0]), 1 - 2 / 2.6),  # too much costs less ...
        (helpers.tversky, pixels([SURE, -SURE, -SURE]), pixels([1, 1, 1]), 1 - 2 / 3.4),  # ... than too little
        (partial(helpers.tversky, a=1.0, b=1.0), pixels([SURE, -SURE, SURE]), pixels([1, 1, 0]), 1 - 2 / 4),
        (helpers.focal, pixels([0, 0]), pixels([0, 1]), math.log(2) / 8),
        (helpers.focal, pixels([math.log(3)]), pixels([1]), 0.25 * 0.25**2 * math.log(4 / 3)),
        (helpers.focal, pixels([math.log(3)]), pixels([0]), 0.75 * 0.75**2 * math.log(4)),
        (partial(helpers.focal, alpha=0.5, gamma=1.0), pixels([math.log(3)]), pixels([1]), 0.5 * 0.25 * math.log(4 / 3)),
        (helpers.lovasz, pixels([0, 1]), pixels([1, 0]), 1.5),  # hinges 1 and 2: (2 - 1) * 1/2 for the second, 1 * 2/2 for both
        (helpers.lovasz, pixels([2, -0.5, -3]), pixels([1, 1, 0]), 1.5 * 1 / 2),
        (helpers.lovasz, pixels([0.5, -0.5, -3]), pixels([0, 0, 0]), 1.5),  # of an empty mask the worst pixel alone
        (helpers.bce_dice, pixels([0, 0]), pixels([1, 0]), math.log(2) + 1 / 3),
        (helpers.l1, pixels([0.5, 0.25]), pixels([0, 1]), 0.625),
        (helpers.rmse, pixels([0.3, 0.6]), pixels([0, 1]), math.sqrt(0.125)),
        (helpers.huber, pixels([0.55, 0.5]), pixels([0.5, 0.5]), 0.00125 / 2),
        (helpers.huber, pixels([0.8]), pixels([0.5]), 0.1 * 0.25),
        (partial(helpers.huber, delta=0.5), pixels([0.8]), pixels([0.5]), 0.045),
        (helpers.berhu, pixels([1, 0.1]), pixels([0, 0]), (1.04 / 0.4 + 0.1) / 2),
        (helpers.berhu, torch.tensor([1, 0.1]).view(2, 1, 1, 1), torch.zeros(2, 1, 1, 1), (1.04 / 0.4 + 0.1) / 2),
        (helpers.ssim, flat(0.2), flat(0.8), UNLIKE),
        (helpers.gradient, pixels([0, 0.5], [0, 0]), pixels([0, 0], [0, 0]), 0.25),
        (helpers.gradient, pixels([0.1, 0.6], [0.1, 0.6]), pixels([0.3, 0.8], [0.3, 0.8]), 0),
        (DEPTH_LOSSES["dice"], pixels([0.5, 0.25]), pixels([0.5, 1]), 1 - 2 / 3.25),
        (helpers.silog, pixels([0.5, 0.25]), pixels([0.25, 0.25]), math.log(2) * math.sqrt(3 / 8)),
        (helpers.silog, pixels([0, 0]), pixels([1, 1]), math.log(255) * math.sqrt(1 / 2)),
        (helpers.silog, pixels([0, 1 / 255]), pixels([1 / 255, 0]), 0),
        (helpers.l1_ssim_gradient, flat(0.2), flat(0.8), 0.6 + UNLIKE),
        (helpers.densedepth, flat(0.2), flat(0.8), 0.06 + UNLIKE),
    ],
)
def test_exact_numbers(loss, prediction, target, expected):
    assert loss(prediction, target).item() == pytest.approx(expected, rel=1e-4, abs=2e-6)


@pytest.mark.parametrize("kind, name", [case for case in ALL if case != OVER_THE_BATCH])
def test_a_batch_costs_the_mean_of_its_pictures(kind, name):
    loss, (prediction, target) = LOSSES[kind][name], random_pair(kind)
    alone = [loss(prediction[i : i + 1], target[i : i + 1]).item() for i in range(len(target))]
    assert max(alone) - min(alone) > 0.003
    assert loss(prediction, target).item() == pytest.approx(np.mean(alone), abs=1e-6)


# How they relate


@pytest.mark.parametrize(
    "one, other, factor",
    [
        # Doubled, I + (FP + FN) / 2 + 1 is sum p + sum t + 2: Dice and intersection over union, but for their smoothing.
        (partial(helpers.tversky, a=0.5, b=0.5), DiceLoss(sigmoid=True, smooth_nr=2, smooth_dr=2), 1),
        (partial(helpers.tversky, a=1.0, b=1.0), DiceLoss(sigmoid=True, jaccard=True, smooth_nr=2, smooth_dr=2), 1),
        (partial(helpers.weighted_bce, pos_weight=1.0), helpers.bce, 1),
        (partial(helpers.focal, alpha=0.5, gamma=0.0), helpers.bce, 1 / 2),
        (helpers.weighted_bce, partial(helpers.weighted_bce, pos_weight=5.0), 1),
        (helpers.tversky, partial(helpers.tversky, a=0.3, b=0.7), 1),
        (helpers.focal, partial(helpers.focal, alpha=0.25, gamma=2.0), 1),
    ],
)
def test_a_mask_loss_becomes_another(one, other, factor):
    pair = random_pair("mask")
    torch.testing.assert_close(one(*pair), factor * other(*pair))


@pytest.mark.parametrize("truth", [0, 1])
def test_lovasz_of_a_single_pixel_is_its_hinge(truth):
    logits = torch.tensor([-1.5, -1, -0.5, 0, 0.5, 1, 1.5]).view(-1, 1, 1, 1)
    expected = (1 - (2 * truth - 1) * logits).clamp_min(0)
    for one, hinge in zip(logits, expected, strict=True):
        assert helpers.lovasz(one[None], torch.full((1, 1, 1, 1), float(truth))).item() == hinge.item()
    assert helpers.lovasz(logits, torch.full_like(logits, truth)).item() == pytest.approx(expected.mean().item())


@pytest.mark.parametrize("delta", [1.0, 2.0])
def test_huber_of_small_errors_is_half_their_square(delta):
    d, g = random_pair("depth")
    assert helpers.huber(d, g, delta=delta).item() == pytest.approx((d - g).square().mean().item() / 2)


def test_huber_of_large_errors_is_nearly_their_absolute_value():
    d, g = random_pair("depth")
    assert helpers.huber(d, g, delta=1e-4).item() / 1e-4 == pytest.approx(helpers.l1(d, g).item(), rel=1e-3)


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.1, 2.0])
def test_silog_counts_half_of_what_a_common_factor_does(factor):
    """silog^2 is the variance of q plus half its mean's square: a factor moves the mean alone, and costs log(f) / sqrt(2)."""
    d, g = (0.1 + 0.3 * depth for depth in random_pair("depth", n=1))
    moved = helpers.silog(factor * g, g).item()
    assert moved == pytest.approx(abs(math.log(factor)) / math.sqrt(2), rel=1e-4)
    q = (d / g).log()
    for f in (1.0, factor):
        expected = q.var(correction=0) + (q.mean() + math.log(f)) ** 2 / 2
        assert helpers.silog(f * d, g).item() == pytest.approx(expected.sqrt().item(), rel=1e-4)


def test_dice_of_depth_is_least_at_a_thresholded_map_and_not_at_the_truth():
    """Why it is no loss for depth: as sums of products go, it pays to push every level to 0 or 1."""
    ramp = torch.linspace(0, 1, 16).expand(1, 1, 16, 16)
    loss = DEPTH_LOSSES["dice"]
    assert loss((ramp > 0.5).float(), ramp) < loss(ramp, ramp) - 0.05
    assert loss(ramp, ramp) > 0.1


# Gradients and extremes


@every
def test_gradients_equal_finite_differences(kind, name):
    prediction, target = random_pair(kind, n=1, height=12, width=11, dtype=torch.float64)
    worst = (prediction - target).abs().amax() if (kind, name) == OVER_THE_BATCH else -1  # c is no part of the gradient
    free, start = (prediction - target).abs() != worst, prediction.clone()

    def loss(values):
        return LOSSES[kind][name](torch.where(free, values, start), target)

    assert torch.autograd.gradcheck(loss, prediction.requires_grad_())


def test_berhus_bend_is_no_part_of_its_gradient():
    """At the worst pixel, (e^2 + c^2) / (2c) with c = .2 e would fall to a slope of 2.6; held fast, it has e / c = 5."""
    depth = pixels([0.8, 0.1, 0.0]).requires_grad_()
    helpers.berhu(depth, pixels([0.3, 0.15, 0.3])).backward()
    torch.testing.assert_close(depth.grad, pixels([5, -1, -3]) / 3)


FLAT_TRUTHS = {"black": torch.zeros(2, 1, 16, 20), "white": torch.ones(2, 1, 16, 20), "any": random_pair("depth")[1]}


@every_depth
@pytest.mark.parametrize("target", FLAT_TRUTHS.values(), ids=FLAT_TRUTHS)
def test_perfect_depth_costs_nothing_and_any_other_more(name, target):
    loss, prediction = DEPTH_LOSSES[name], target.clone().requires_grad_()
    value = loss(prediction, target)
    value.backward()
    assert value.item() == pytest.approx(0, abs=2e-6) and prediction.grad.isfinite().all()
    noise = 0.05 * torch.rand(target.shape, generator=torch.Generator().manual_seed(2))
    assert loss((target - noise).abs(), target) > value + 3e-4


@pytest.mark.parametrize("target", FLAT_TRUTHS.values(), ids=FLAT_TRUTHS)
def test_dice_of_depth_is_finite_at_the_truth(target):
    prediction = target.clone().requires_grad_()
    DEPTH_LOSSES["dice"](prediction, target).backward()
    assert prediction.grad.isfinite().all()


def signs(truth):
    return 2 * truth - 1


@every_mask
@pytest.mark.parametrize("truth", [torch.zeros(2, 1, 12, 12), torch.ones(2, 1, 12, 12), random_pair("mask")[1]])
def test_masks_empty_full_and_between(name, truth):
    """Right costs nearly nothing, wrong much; no value and no gradient is infinite, however sure the prediction."""
    values = []
    for logits in (20 * signs(truth), -20 * signs(truth)):
        logits.requires_grad_()
        values.append(MASK_LOSSES[name](logits, truth))
        values[-1].backward()
        assert values[-1].isfinite() and logits.grad.isfinite().all()
    assert values[0].item() == pytest.approx(0, abs=1e-5)
    assert values[1] > (0.49 if name == "ssim" else 0.9)  # (1 - SSIM) / 2 of black and white


@every_mask
def test_a_perfect_mask_costs_the_least(name):
    truth = random_pair("mask")[1]
    perfect = 20 * signs(truth)
    flipped = torch.rand(10, *truth.shape, generator=torch.Generator().manual_seed(3)) < 0.02
    spoilt = [torch.where(some, -perfect, perfect) for some in flipped]
    unsure = [sure * signs(truth) for sure in (0.0, 0.2, 0.9)]
    least = MASK_LOSSES[name](perfect, truth)
    assert all(MASK_LOSSES[name](logits, truth) > least + 1e-4 for logits in spoilt + unsure)


# Precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every
def test_half_precision_is_computed_in_float32(kind, name, dtype):
    prediction, target = (picture.to(dtype) for picture in random_pair(kind))
    value = LOSSES[kind][name](prediction, target)
    assert value.dtype == torch.float32
    assert torch.equal(value, LOSSES[kind][name](prediction.float(), target.float()))


@every
def test_autocast_changes_nothing(kind, name):
    prediction, target = random_pair(kind)
    outside = LOSSES[kind][name](prediction, target)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(LOSSES[kind][name](prediction, target), outside)


# Refusals and names


@pytest.mark.parametrize("loss", [MASK_LOSSES["ssim"], helpers.ssim, helpers.densedepth, helpers.l1_ssim_gradient])
def test_ssim_refuses_pictures_smaller_than_its_window(loss):
    with pytest.raises(ValueError, match="windows of 11 x 11 pixels; these pictures are 10 x 40"):
        loss(*torch.rand(2, 1, 1, 10, 40))
    assert loss(*torch.rand(2, 1, 1, 11, 40)).isfinite()


def test_task_loss_adds_the_weighted_depth():
    mask, depth = random_pair("mask"), random_pair("depth")
    predictions_and_truths = (mask[0], depth[0], mask[1], depth[1])
    for weight in (1.0, 0.25, 3.0):
        both = task_loss("dice", "l1", weight)(*predictions_and_truths)
        assert both.item() == pytest.approx(MASK_LOSSES["dice"](*mask).item() + weight * helpers.l1(*depth).item())
    assert task_loss("bce", None)(*predictions_and_truths) == helpers.bce(*mask)
    assert task_loss(None, "l1", 2.0)(*predictions_and_truths) == 2 * helpers.l1(*depth)
    for name in ("l1", "rmse", "dice", "ssim"):  # which both tasks have, and which differ
        expected = MASK_LOSSES[name](*mask).item() + DEPTH_LOSSES[name](*depth).item()
        assert task_loss(name, name)(*predictions_and_truths).item() == pytest.approx(expected)


def test_task_loss_without_any_task():
    with pytest.raises(ValueError, match="both None"):
        task_loss(None, None)


def test_learned_weights_follow_the_formula_of_the_uncertainties():
    """exp(-s_m) L_m + s_m + exp(-s_d) L_d + s_d, for any s; both start at 0, where the slope along s is 1 - L."""
    mask, depth = random_pair("mask"), random_pair("depth")
    predictions_and_truths = (mask[0], depth[0], mask[1], depth[1])
    cost_m, cost_d = helpers.bce(*mask).item(), helpers.l1(*depth).item()
    loss = task_loss("bce", "l1", "learned")
    assert parameters_to_vector(loss.parameters()).tolist() == [0, 0]
    value = loss(*predictions_and_truths)
    assert value.item() == pytest.approx(cost_m + cost_d)
    slopes = torch.autograd.grad(value, list(loss.parameters()))
    slopes = torch.cat([slope.flatten() for slope in slopes]).tolist()
    assert sorted(slopes) == pytest.approx(sorted([1 - cost_m, 1 - cost_d]), abs=1e-6)
    order = (0, 1) if abs(slopes[0] - (1 - cost_m)) < 1e-3 else (1, 0)
    for s_m, s_d in ((0.5, -1.0), (-2.0, 0.3)):
        vector_to_parameters(torch.tensor([s_m, s_d])[list(order)], loss.parameters())
        expected = math.exp(-s_m) * cost_m + s_m + math.exp(-s_d) * cost_d + s_d
        assert loss(*predictions_and_truths).item() == pytest.approx(expected, rel=1e-5)


def test_only_learned_weights_are_parameters():
    assert sum(p.numel() for p in task_loss("bce", "l1", "learned").parameters() if p.requires_grad) == 2
    assert list(task_loss("bce", "l1", 2.0).parameters()) == []


@pytest.mark.parametrize("names", [("bce", None), (None, "l1")])
@pytest.mark.parametrize(
    "make", [task_loss, lambda m, d, w: Config("a", mask_loss=m, depth_loss=d, depth_weight=w)], ids=["task_loss", "Config"]
)
def test_learned_weights_need_both_tasks(make, names):
    with pytest.raises(ValueError, match="learned"):
        make(*names, "learned")


@pytest.mark.parametrize("make", [task_loss, lambda *names: Config("a", mask_loss=names[0], depth_loss=names[1])])
def test_an_unknown_loss_lists_the_known(make):
    with pytest.raises(ValueError, match=rf"Unknown mask loss 'dise'\. Known: {', '.join(MASK_LOSSES)}"):
        make("dise", "l1")
    with pytest.raises(ValueError, match=rf"Unknown depth loss 'l3'\. Known: {', '.join(DEPTH_LOSSES)}"):
        make("dice", "l3")


def test_a_loss_of_ones_own_is_one_line(monkeypatch):
    monkeypatch.setitem(MASK_LOSSES, "squares", lambda z, t: (z.sigmoid() - t).square().mean())
    assert Config("a", mask_loss="squares").mask_loss == "squares"
    z, t = pixels([0, 0]), pixels([1, 0])
    assert task_loss("squares", None)(z, z, t, t).item() == pytest.approx(0.25)
