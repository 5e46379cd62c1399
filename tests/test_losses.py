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

from helpers import DEPTH_LOSSES, MASK_LOSSES, Config, task_loss

LOSSES = {"mask": MASK_LOSSES, "depth": DEPTH_LOSSES}
ALL = [(kind, name) for kind, losses in LOSSES.items() for name in losses]  # some names stand for one of each

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


# Each oracle is given float64 arrays: p, the mask's probability or the depth, and the truth.


def mean_of_pictures(loss):
    """The oracle of one picture, for a batch."""
    return lambda p, t: np.mean([loss(*pair) for pair in zip(p[:, 0], t[:, 0], strict=True)])


def with_tensors(loss):
    return lambda p, t: loss(torch.from_numpy(p), torch.from_numpy(t)).item()


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


@with_tensors
def edges(p, t):
    pairs = zip(image_gradients(p), image_gradients(t), strict=True)
    return sum((one - other).abs().mean() for one, other in pairs)


@mean_of_pictures
def lovasz_by_levels(p, t):
    """The extension of a set function is its integral over the levels of the errors: here the Jaccard loss of
    the pixels whose hinge is at least so high, |wrong| / |true or wrong|, times the height of each step."""
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
def log_scatter(p, t):
    q = np.log(np.maximum(p, 1 / 255)) - np.log(np.maximum(t, 1 / 255))
    return np.sqrt(np.mean(q**2) - np.mean(q) ** 2 / 2)


monai_dice = with_tensors(DiceLoss(smooth_nr=1, smooth_dr=1))
ORACLES = {
    "mask": {
        "bce": cross_entropy,
        "weighted_bce": partial(cross_entropy, positive=5),
        "l1": absolute,
        "rmse": root_of_squares,
        "dice": monai_dice,
        "tversky": with_tensors(TverskyLoss(alpha=0.3, beta=0.7, smooth_nr=1, smooth_dr=1)),
        "focal": with_tensors(lambda p, t: sigmoid_focal_loss(p.logit(), t, reduction="mean")),
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
        "dice": monai_dice,
        "silog": log_scatter,
        "l1_ssim_gradient": lambda p, t: absolute(p, t) + dissimilarity(p, t) + edges(p, t),
        "densedepth": lambda p, t: 0.1 * absolute(p, t) + dissimilarity(p, t) + edges(p, t),
    },
}


def test_the_losses_are_those_of_the_reports():
    assert {kind: set(of) for kind, of in LOSSES.items()} == {kind: set(of) for kind, of in ORACLES.items()}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.float64, 1e-6)])
@every
def test_a_loss_equals_an_independent_computation(kind, name, dtype, tolerance):
    prediction, target = random_pair(kind, dtype=dtype)
    value = LOSSES[kind][name](prediction, target)
    assert value.shape == () and value.dtype == dtype
    p, t = prediction.double().numpy(), target.double().numpy()
    p = 1 / (1 + np.exp(-p)) if kind == "mask" else p
    assert value.item() == pytest.approx(ORACLES[kind][name](p, t), rel=tolerance)


BY_HAND = [  # at the ends of what they are given
    ("mask bce", [50, -50], [0, 1], 50),
    ("mask dice", [-99, -99], [0, 0], 0),
    ("mask lovasz", [0.5, -0.5, -3], [0, 0, 0], 1.5),  # of an empty mask the worst pixel alone
    ("depth silog", [0, 1 / 255], [1 / 255, 0], 0),
]


@pytest.mark.parametrize("which, prediction, target, expected", BY_HAND)
def test_exact_numbers(which, prediction, target, expected):
    kind, name = which.split()
    value = LOSSES[kind][name](pixels(prediction), pixels(target))
    assert value.item() == pytest.approx(expected, rel=1e-4, abs=2e-6)


@pytest.mark.parametrize(
    "name, options, other, factor",
    [
        # I + (FP + FN) / 2 + 1 is half of sum p + sum t + 2: Dice, but smoothed otherwise.
        ("tversky", {"a": 0.5, "b": 0.5}, DiceLoss(sigmoid=True, smooth_nr=2, smooth_dr=2), 1),
        ("weighted_bce", {"pos_weight": 1.0}, MASK_LOSSES["bce"], 1),
        ("focal", {"alpha": 0.5, "gamma": 0.0}, MASK_LOSSES["bce"], 1 / 2),
    ],
)
def test_with_other_options_a_mask_loss_becomes_another(name, options, other, factor):
    pair = random_pair("mask")
    torch.testing.assert_close(MASK_LOSSES[name](*pair, **options), factor * other(*pair))


# Gradients and extremes


@every
def test_gradients_equal_finite_differences(kind, name):
    prediction, target = random_pair(kind, n=1, height=12, width=11, dtype=torch.float64)
    worst = (prediction - target).abs().amax() if name == "berhu" else -1  # c has no gradient
    free, start = (prediction - target).abs() != worst, prediction.clone()

    def loss(values):
        return LOSSES[kind][name](torch.where(free, values, start), target)

    assert torch.autograd.gradcheck(loss, prediction.requires_grad_())


def test_berhus_bend_is_no_part_of_its_gradient():
    """At the worst pixel, (e^2 + c^2) / (2c) with c = .2 e would have a slope of 2.6; held fast, it has 5."""
    depth = pixels([0.8, 0.1, 0.0]).requires_grad_()
    DEPTH_LOSSES["berhu"](depth, pixels([0.3, 0.15, 0.3])).backward()
    torch.testing.assert_close(depth.grad, pixels([5, -1, -3]) / 3)


FLAT_TRUTHS = {"black": torch.zeros(2, 1, 16, 20), "white": torch.ones(2, 1, 16, 20)}


@every_depth
@pytest.mark.parametrize("truth", [*FLAT_TRUTHS.values(), random_pair("depth")[1]], ids=[*FLAT_TRUTHS, "any"])
def test_perfect_depth_costs_nothing_and_any_other_more(name, truth):
    prediction = truth.clone().requires_grad_()
    value = DEPTH_LOSSES[name](prediction, truth)
    value.backward()
    assert value.item() == pytest.approx(0, abs=2e-6) and prediction.grad.isfinite().all()
    noise = 0.05 * torch.rand(truth.shape, generator=torch.Generator().manual_seed(2))
    assert DEPTH_LOSSES[name]((truth - noise).abs(), truth) > value + 3e-4


@every_mask
@pytest.mark.parametrize("truth", [*FLAT_TRUTHS.values(), random_pair("mask")[1]], ids=[*FLAT_TRUTHS, "any"])
def test_masks_empty_full_and_between(name, truth):
    """Right costs nearly nothing, wrong much; values and gradients are finite, however sure the logits."""
    values = []
    for logits in (20 * (2 * truth - 1), -20 * (2 * truth - 1)):
        logits.requires_grad_()
        values.append(MASK_LOSSES[name](logits, truth))
        values[-1].backward()
        assert values[-1].isfinite() and logits.grad.isfinite().all()
    assert values[0].item() == pytest.approx(0, abs=1e-5)
    assert values[1] > (0.49 if name == "ssim" else 0.9)  # (1 - SSIM) / 2 of black and white


def test_dice_of_depth_is_least_at_a_thresholded_map_and_not_at_the_truth():
    """Why it is no loss for depth: as sums of products go, it pays to push every level to 0 or 1."""
    ramp, loss = torch.linspace(0, 1, 16).expand(1, 1, 16, 16), DEPTH_LOSSES["dice"]
    assert loss((ramp > 0.5).float(), ramp) < loss(ramp, ramp) - 0.05 and loss(ramp, ramp) > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every
def test_half_precision_and_autocast_are_computed_in_float32(kind, name, dtype):
    prediction, target = (picture.to(dtype) for picture in random_pair(kind))
    of_both, loss = [prediction, prediction, target.float(), target.float()], LOSSES[kind][name]
    value = task_loss(*((name, None) if kind == "mask" else (None, name)))
    with torch.autocast("cpu", torch.bfloat16):
        found = value(*of_both)
    assert found.dtype == torch.float32 and torch.equal(found, loss(prediction.float(), target.float()))


@pytest.mark.parametrize("loss", [MASK_LOSSES["ssim"], *map(DEPTH_LOSSES.get, ("ssim", "densedepth"))])
def test_ssim_refuses_pictures_smaller_than_its_window(loss):
    with pytest.raises(ValueError, match="windows of 11 x 11 pixels; these pictures are 10 x 40"):
        loss(*torch.rand(2, 1, 1, 10, 40))
    assert loss(*torch.rand(2, 1, 1, 11, 40)).isfinite()


# Both tasks

MASK, DEPTH = random_pair("mask"), random_pair("depth")
BOTH = (MASK[0], DEPTH[0], MASK[1], DEPTH[1])


def test_task_loss_adds_the_weighted_depth():
    for weight in (1.0, 0.25, np.float64(3)):
        expected = MASK_LOSSES["dice"](*MASK).item() + weight * DEPTH_LOSSES["l1"](*DEPTH).item()
        assert task_loss("dice", "l1", weight)(*BOTH).item() == pytest.approx(expected)
    for name in ("l1", "rmse", "dice", "ssim"):  # which both tasks have, and which differ
        expected = MASK_LOSSES[name](*MASK).item() + DEPTH_LOSSES[name](*DEPTH).item()
        assert task_loss(name, name)(*BOTH).item() == pytest.approx(expected)


def test_task_loss_of_one_task_does_not_look_at_the_other():
    assert task_loss("bce", None)(*BOTH[:3], None) == MASK_LOSSES["bce"](*MASK)
    assert task_loss(None, "l1", 2.0)(*BOTH[:2], None, BOTH[3]) == 2 * DEPTH_LOSSES["l1"](*DEPTH)


def test_learned_weights_follow_the_formula_of_the_uncertainties():
    """exp(-s) L_m + s + exp(-t) L_d + t, for any s and t; both start at 0, where s has the slope 1 - L_m."""
    costs = [MASK_LOSSES["bce"](*MASK).item(), DEPTH_LOSSES["l1"](*DEPTH).item()]
    loss = task_loss("bce", "l1", "learned")
    assert parameters_to_vector(loss.parameters()).tolist() == [0, 0]
    value = loss(*BOTH)
    assert value.item() == pytest.approx(sum(costs))
    slopes = parameters_to_vector(torch.autograd.grad(value, [*loss.parameters()]))
    assert slopes.tolist() == pytest.approx([1 - cost for cost in costs], abs=1e-6)
    for weights in ((0.5, -1.0), (-2.0, 0.3)):
        vector_to_parameters(torch.tensor(weights), loss.parameters())
        expected = sum(math.exp(-s) * cost + s for s, cost in zip(weights, costs, strict=True))
        assert loss(*BOTH).item() == pytest.approx(expected, rel=1e-5)
    assert list(task_loss("bce", "l1", 2.0).parameters()) == []


def config(mask_loss, depth_loss, depth_weight=1.0):
    return Config("a", mask_loss=mask_loss, depth_loss=depth_loss, depth_weight=depth_weight)


@pytest.mark.parametrize(
    "arguments, what",
    [
        (("dise", "l1"), rf"Unknown mask loss 'dise'\. Known: None, {', '.join(MASK_LOSSES)}"),
        (("dice", "l3"), rf"Unknown depth loss 'l3'\. Known: None, {', '.join(DEPTH_LOSSES)}"),
        ((None, None), "both None"),
        ((None, "l1", "learned"), "learned"),
        (("bce", "l1", "much"), "depth_weight is 'much'"),
        (("bce", "l1", 0), "depth_weight is 0"),
        (("bce", "l1", math.nan), "depth_weight is nan"),
    ],
)
@pytest.mark.parametrize("make", [task_loss, config])
def test_what_cannot_be_is_refused(make, arguments, what):
    with pytest.raises(ValueError, match=what):
        make(*arguments)
