"""Metrics and baselines against torchmetrics, scikit-image, and loops over pixels and thresholds."""

import math

import numpy as np
import pytest
import torch
from benchmarks.quality import measure_aligned
from conftest import encoded
from scipy.stats import spearmanr
from skimage.metrics import structural_similarity
from skimage.morphology import opening
from torchmetrics.functional.classification import binary_accuracy, binary_f1_score, binary_jaccard_index

from helpers import ZipDataset, baselines, evaluate, measure, score, to_float

MASK_METRICS = ["iou", "dice", "pixel_accuracy", "mask_area"]
DEPTH_METRICS = ["rmse", "mae", "abs_rel", "log10", "delta1", "delta2", "delta3", "ssim"]


@pytest.fixture(scope="module")
def batch():
    """Five samples of unlike quality; some true depth is 0, some prediction is far off."""
    generator = torch.Generator().manual_seed(3)
    logits, noise, depth_true, mask_true = torch.randn(4, 5, 1, 16, 24, generator=generator).unbind()
    depth_true = (0.5 + 0.4 * depth_true).clamp(0, 1)
    depth = (depth_true + 0.2 * noise * torch.linspace(0.1, 2, 5).view(-1, 1, 1, 1)).clamp(0, 1)
    assert (depth_true == 0).any() and (depth == 0).any()
    return logits, depth, (mask_true > 0.5).float(), depth_true


def flat(*pictures):
    """One sample's metrics of pictures given as lists of 16 x 16 = 256 pixels or one value for all."""
    pictures = (torch.as_tensor(p, dtype=torch.float32).expand(256).reshape(1, 1, 16, 16) for p in pictures)
    return {name: value[0].item() for name, value in measure(*pictures).items()}


def test_one_value_a_sample_of_the_tasks_whose_truth_is_given(batch):
    logits, depth, mask_true, depth_true = batch
    values = measure(*batch)
    assert sorted(values) == sorted(MASK_METRICS + DEPTH_METRICS)
    assert all(value.shape == (5,) and value.dtype == torch.float32 for value in values.values())
    for some, names in ((measure(logits, depth, mask_true, None), MASK_METRICS),
                        (measure(logits, depth, None, depth_true), DEPTH_METRICS)):  # fmt: skip
        assert sorted(some) == sorted(names) and all(torch.equal(some[name], values[name]) for name in names)


ORACLES = {"iou": binary_jaccard_index, "dice": binary_f1_score, "pixel_accuracy": binary_accuracy}


@pytest.mark.parametrize("name", ORACLES)
def test_mask_metrics_equal_those_of_torchmetrics(batch, name):
    pairs = zip(batch[0].sigmoid(), batch[2].int(), strict=True)
    torch.testing.assert_close(measure(*batch)[name], torch.stack([ORACLES[name](*pair) for pair in pairs]))


def test_ssim_equals_that_of_scikit_image(batch):
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1}
    pairs = zip(batch[1][:, 0].numpy(), batch[3][:, 0].numpy(), strict=True)
    expected = [structural_similarity(*pair, **options) for pair in pairs]
    np.testing.assert_allclose(measure(*batch)["ssim"], expected, atol=1e-5)


def test_the_other_metrics_equal_a_loop_over_pixels(batch):
    values = measure(*batch)
    for i, (z_picture, d_picture, g_picture) in enumerate(zip(batch[0], batch[1], batch[3], strict=True)):
        pairs = list(zip(d_picture.flatten().tolist(), g_picture.flatten().tolist(), strict=True))
        counted = [(max(d, 1e-3), g) for d, g in pairs if g >= 1 / 255]
        assert len(counted) < len(pairs)
        expected = {
            "mask_area": np.mean(z_picture.numpy() > 0),
            "rmse": math.sqrt(sum((d - g) ** 2 for d, g in pairs) / len(pairs)),
            "mae": sum(abs(d - g) for d, g in pairs) / len(pairs),
            "abs_rel": sum(abs(d - g) / g for d, g in counted) / len(counted),
            "log10": sum(abs(math.log10(d / g)) for d, g in counted) / len(counted),
        }
        for k in (1, 2, 3):
            expected[f"delta{k}"] = sum(max(d / g, g / d) < 1.25**k for d, g in counted) / len(counted)
        assert {name: values[name][i].item() for name in expected} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "logit, truth, iou, dice",
    [(-1, 0, 1, 1), (1, 0, 0, 0), (-1, 1, 0, 0), (1, 1, 1, 1), (1, [1] * 64 + [0] * 192, 0.25, 0.4)],
)
def test_masks_empty_on_one_side_or_both(logit, truth, iou, dice):
    values = flat(logit, 0.5, truth, 0.5)
    assert (values["iou"], values["dice"]) == pytest.approx((iou, dice))


def test_a_pixel_is_object_above_one_half():
    values = flat(0.0, 0.5, [0.5] * 128 + [0.51] * 128, 0.5)
    assert (values["iou"], values["pixel_accuracy"], values["mask_area"]) == (0, 0.5, 0)


def test_the_first_level_counts_in_ratios_and_what_is_nearer_does_not():
    levels = to_float({"depth": torch.tensor([1] * 128 + [0] * 128, dtype=torch.uint8).view(1, 1, 16, 16)})
    values = flat(0, [1 / 255] * 128 + [0.5] * 128, 0, levels["depth"].flatten())
    assert (values["delta1"], values["abs_rel"]) == (1, pytest.approx(0, abs=1e-6))
    assert values["mae"] == pytest.approx(0.25)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_measured_in_float32(batch, dtype):
    logits, depth, mask_true, depth_true = batch
    halves = measure(logits.to(dtype), depth.to(dtype), mask_true, depth_true)
    singles = measure(logits.to(dtype).float(), depth.to(dtype).float(), mask_true, depth_true)
    assert all(torch.equal(halves[name], value) for name, value in singles.items())


def test_aligned_metrics_are_those_of_a_fitted_line_and_of_ranks(batch):
    _, depth, _, depth_true = batch
    depth_true = (depth_true * 20).round() / 20  # with equal values, whose ranks are shared
    values = {name: of.numpy() for name, of in measure_aligned(depth, depth_true).items()}
    pairs = zip(*(of.flatten(1).double().numpy() for of in (depth, depth_true)), strict=True)
    for i, (d, g) in enumerate(pairs):
        fitted, far = np.polyval(np.polyfit(d, g, 1), d), g > 0
        assert values["aligned_rmse"][i] == pytest.approx(np.sqrt(np.mean((fitted - g) ** 2)), rel=1e-5)
        ratio = np.maximum(fitted[far] / g[far], g[far] / np.maximum(fitted[far], 1e-3))
        assert values["aligned_delta1"][i] == pytest.approx((ratio < 1.25).mean(), abs=1e-6)
        assert values["rank"][i] == pytest.approx(spearmanr(d, g).statistic, abs=1e-6)


def test_depth_that_is_the_same_everywhere_is_aligned_to_the_mean():
    true = torch.rand(2, 1, 16, 16)
    flat = measure_aligned(torch.ones_like(true), true)["aligned_rmse"]
    assert flat == pytest.approx(true.std((1, 2, 3), correction=0))


# Baselines


@pytest.fixture(scope="module")
def fitted(sample):
    """A set of pictures with noise, more training samples than are read at once, and the baselines."""
    ds = ZipDataset(sample, size=20)
    train = np.random.default_rng(0).permutation(len(ds))[:300]
    return ds, train, baselines(ds, train)


def test_the_baselines_are_the_best_of_all_thresholds_and_the_mean_depth(fitted):
    ds, train, baseline = fitted
    batch = {kind: pictures.numpy().astype(int) for kind, pictures in ds.batch(train).items()}
    difference = np.abs(batch["fg_bg"] - batch["bg"]).max(1)
    difference = np.stack([opening(of, np.ones((3, 3))) for of in difference])
    mask = batch["mask"][:, 0] == 1
    means = []
    for threshold in range(256):
        predicted = difference > threshold
        union = (predicted | mask).sum((1, 2))
        means.append(np.mean(np.where(union > 0, (predicted & mask).sum((1, 2)) / np.maximum(union, 1), 1)))
    assert baseline.threshold == np.argmax(means) > 0
    np.testing.assert_allclose(baseline.mean_depth[0].cpu(), batch["depth"].mean(0) / 255, atol=1e-6)
    values = score(baseline, ds, {"train": train, "none": train[:0]}, "float32")
    assert values.keys() == {"train"} and values["train"]["iou"] == pytest.approx(max(means), abs=1e-6)
    rmse = np.sqrt(np.square((batch["depth"] - batch["depth"].mean(0)) / 255).mean((1, 2, 3)))
    assert values["train"]["rmse"] == pytest.approx(rmse.mean(), rel=1e-5)
    assert abs(rmse.mean() - np.sqrt(np.square(rmse).mean())) > 1e-4  # of a picture, and then the mean


@pytest.mark.parametrize("threshold", [0, 1, 20, 254])
def test_the_mask_is_exactly_the_thresholded_difference(fitted, threshold):
    """For every pair of levels: no rounding of 1/255 may move a pixel over the threshold."""
    baseline = type(fitted[2])(threshold, fitted[2].mean_depth.cpu())
    levels = torch.arange(256, dtype=torch.uint8).repeat_interleave(3)  # as wide as what an opening leaves
    bg, fg_bg = levels[:, None].expand(768, 768), levels[None].expand(768, 768)
    batch = to_float({"bg": bg.expand(1, 3, -1, -1), "fg_bg": torch.stack([fg_bg, bg, bg])[None]})
    mask_logits, depth = baseline(batch["bg"], batch["fg_bg"])
    assert torch.equal(mask_logits[0, 0] > 0, (fg_bg.int() - bg.int()).abs() > threshold)
    assert torch.equal(depth, baseline.mean_depth)


def test_a_picture_without_depth_does_not_spoil_the_mean_of_the_others(write_zip, tmp_path):
    black = {"bg_fg_depth_map/bg001_fg001_01_depth_map.png": encoded(np.zeros((24, 24), np.uint8))}
    write_zip(tmp_path / "a.zip", files=black)
    ds = ZipDataset(tmp_path / "a.zip", 24)
    everything = np.arange(len(ds))
    model = baselines(ds, everything)
    values = evaluate(model, ds, everything, precision="float32")["delta1"]
    assert np.isnan(values).sum() == 1
    mean = score(model, ds, {"all": everything}, "float32")["all"]["delta1"]
    assert mean == pytest.approx(values[~np.isnan(values)].mean())


@pytest.mark.parametrize("kind, names", [("mask", DEPTH_METRICS), ("depth", MASK_METRICS)])
def test_a_set_without_masks_or_depth_has_the_metrics_of_the_other(write_zip, tmp_path, kind, names):
    write_zip(tmp_path / "a.zip", skip=[kind])
    ds = ZipDataset(tmp_path / "a.zip", 24)
    values = evaluate(baselines(ds, np.arange(8)), ds, np.arange(9))
    assert sorted(values) == sorted(names) and all(value.shape == (9,) for value in values.values())
