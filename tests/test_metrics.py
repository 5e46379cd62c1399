"""Metrics and baselines against torchmetrics, scikit-image, and loops over pixels and thresholds."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torchmetrics.functional.classification import binary_accuracy, binary_f1_score, binary_jaccard_index

from helpers import Baseline, ZipDataset, baselines, evaluate, measure, score, to_float

NAMES = ["iou", "dice", "pixel_accuracy", "rmse", "mae", "abs_rel", "log10", "delta1", "delta2", "delta3", "ssim"]


@pytest.fixture(scope="module")
def batch():
    """Five samples of unlike quality; some true depth is 0, some prediction is far off."""
    generator = torch.Generator().manual_seed(3)
    logits, noise, depth_true, mask_true = torch.randn(4, 5, 1, 16, 24, generator=generator).unbind()
    depth_true = (0.5 + 0.4 * depth_true).clamp(0, 1)
    depth = (depth_true + 0.2 * noise * torch.linspace(0.1, 2, 5).view(-1, 1, 1, 1)).clamp(0, 1)
    assert (depth_true == 0).any() and (depth == 0).any()
    return logits, depth, (mask_true > 0.5).float(), depth_true


def one(values, i=0):
    return {name: value[i].item() for name, value in values.items()}


def flat(mask_logits, depth, mask_true, depth_true):
    """One sample's metrics of pictures that are given as lists of 16 x 16 = 256 pixels or one value for all."""
    pictures = [torch.as_tensor(p, dtype=torch.float32).expand(256).reshape(1, 1, 16, 16) for p in (mask_logits, depth)]
    truths = [torch.as_tensor(p, dtype=torch.float32).expand(256).reshape(1, 1, 16, 16) for p in (mask_true, depth_true)]
    return one(measure(*pictures, *truths))


def test_one_value_a_sample(batch):
    values = measure(*batch)
    assert list(values) == NAMES
    assert all(value.shape == (5,) and value.dtype == torch.float32 for value in values.values())


@pytest.mark.parametrize(
    "name, oracle", [("iou", binary_jaccard_index), ("dice", binary_f1_score), ("pixel_accuracy", binary_accuracy)]
)
def test_mask_metrics_equal_those_of_torchmetrics(batch, name, oracle):
    logits, _, mask_true, _ = batch
    expected = [oracle(z.sigmoid(), t.int()) for z, t in zip(logits, mask_true, strict=True)]
    torch.testing.assert_close(measure(*batch)[name], torch.stack(expected))


def test_ssim_equals_that_of_scikit_image(batch):
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1}
    pairs = zip(batch[1][:, 0].numpy(), batch[3][:, 0].numpy(), strict=True)
    expected = [structural_similarity(*pair, **options) for pair in pairs]
    np.testing.assert_allclose(measure(*batch)["ssim"], expected, atol=1e-5)


def test_depth_metrics_equal_a_loop_over_pixels(batch):
    values = measure(*batch)
    for i, (d_picture, g_picture) in enumerate(zip(batch[1], batch[3], strict=True)):
        pairs = list(zip(d_picture.flatten().tolist(), g_picture.flatten().tolist(), strict=True))
        counted = [(max(d, 1e-3), g) for d, g in pairs if g >= 1 / 255]
        assert len(counted) < len(pairs)
        expected = {
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
    assert (values["iou"], values["pixel_accuracy"]) == (0, 0.5)


def test_pixels_nearer_than_the_first_level_do_not_count_in_ratios():
    values = flat(0, 0.5, 0, [0.9 / 255] * 128 + [0.5] * 128)
    assert (values["delta1"], values["abs_rel"], values["log10"]) == (1, 0, 0)
    assert values["mae"] == pytest.approx((0.5 - 0.9 / 255) / 2)


def test_the_first_level_itself_counts():
    """Of a picture whose depth is level 1 in one half, predicted right, and level 0 in the other, predicted wrong."""
    levels = torch.tensor([1] * 128 + [0] * 128, dtype=torch.uint8)
    values = flat(0, [1 / 255] * 128 + [0.5] * 128, 0, to_float({"depth": levels.view(1, 1, 16, 16)})["depth"].flatten())
    assert (values["delta1"], values["abs_rel"]) == (1, pytest.approx(0, abs=1e-6))


def test_a_prediction_counts_as_a_thousandth_at_least():
    values = [flat(0, depth, 0, 0.5) for depth in (0, 0.0009, 0.001)]
    for value in values:
        assert (value["log10"], value["abs_rel"]) == pytest.approx((math.log10(500), 0.998), rel=1e-5)
    assert flat(0, 0.0011, 0, 0.5)["log10"] == pytest.approx(math.log10(0.5 / 0.0011), rel=1e-5)
    assert [value["rmse"] for value in values] == pytest.approx([0.5, 0.4991, 0.499])  # over all pixels, as they are


def test_small_depths_are_not_clamped_upwards():
    """At .02 against .04 both would be .1, and so equal, under the clamp that flatters."""
    values = flat(0, 0.02, 0, 0.04)
    assert values["delta1"] == values["delta2"] == values["delta3"] == 0
    assert (values["abs_rel"], values["log10"]) == pytest.approx((0.5, math.log10(2)))


def test_what_the_reports_clamp_at_a_tenth_would_do_to_delta1():
    """A tenth of the pixels near the camera, at .04, and predicted at .08: wrong by a factor of 2, and equal once both are
    raised to .1. Another twentieth is wrong farther off. The share below 1.25 would be .95 in place of .85."""
    near, far, right = 26, 13, 217
    depth = torch.tensor([0.08] * near + [0.9] * far + [0.5] * right)
    truth = torch.tensor([0.04] * near + [0.3] * far + [0.5] * right)
    assert flat(0, depth, 0, truth)["delta1"] == pytest.approx(0.85, abs=0.003)
    assert flat(0, depth.clamp_min(0.1), 0, truth.clamp_min(0.1))["delta1"] == pytest.approx(0.95, abs=0.001)


def test_a_sample_without_a_pixel_that_counts_is_not_a_number():
    values = flat(0, 0.5, 0, 0.0)
    assert all(math.isnan(values[name]) for name in ("delta1", "delta2", "delta3", "abs_rel", "log10"))
    assert values["rmse"] == 0.5


def test_thresholds_of_delta():
    values = [flat(0, 0.4 * factor, 0, 0.4) for factor in (1.2, 1 / 1.3, 1.6, 1 / 2.1)]
    assert [[v["delta1"], v["delta2"], v["delta3"]] for v in values] == [[1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("side", [1, -1])
def test_a_ratio_that_equals_the_threshold_does_not_count(k, side):
    ratio = 1.25**k  # exact in float32, as are the depths below
    depth, truth = (0.5 * ratio, 0.5)[::side]
    assert flat(0, depth, 0, truth)[f"delta{k}"] == 0
    assert flat(0, depth - side * 1e-4, 0, truth)[f"delta{k}"] == 1


def test_rmse_is_of_a_picture_and_then_the_mean():
    """Errors of 0 and .4 are .2 on average; the root over both pictures at once would be .283."""
    logits, truth = torch.zeros(2, 1, 16, 16), torch.full((2, 1, 16, 16), 0.5)
    depth = truth + torch.tensor([0, 0.4]).view(2, 1, 1, 1)
    assert measure(logits, depth, logits, truth)["rmse"].tolist() == pytest.approx([0, 0.4])


def test_a_score_is_the_mean_over_pictures_of_what_numpy_gives(fitted):
    ds, train, baseline = fitted
    some = train[:70]  # more than are measured at once
    batch = {kind: pictures.numpy() / 1.0 for kind, pictures in ds.batch(some).items()}
    error = baseline.mean_depth.numpy() - batch["depth"] / 255
    predicted = np.abs(batch["fg_bg"] - batch["bg"]).max(1, keepdims=True) > baseline.threshold
    both, either = (predicted & (batch["mask"] == 1)).sum((1, 2, 3)), (predicted | (batch["mask"] == 1)).sum((1, 2, 3))
    values = score(baseline, ds, {"some": some}, "float32")["some"]
    assert values["rmse"] == pytest.approx(np.sqrt(np.square(error).mean((1, 2, 3))).mean(), rel=1e-5)
    assert abs(values["rmse"] - np.sqrt(np.square(error).mean())) > 1e-4
    assert values["iou"] == pytest.approx(np.where(either > 0, both / np.maximum(either, 1), 1).mean(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_measured_in_float32(batch, dtype):
    logits, depth, mask_true, depth_true = batch
    halves = measure(logits.to(dtype), depth.to(dtype), mask_true, depth_true)
    for name, value in measure(logits.to(dtype).float(), depth.to(dtype).float(), mask_true, depth_true).items():
        assert torch.equal(halves[name], value)


# Baselines


@pytest.fixture(scope="module")
def fitted(sample):
    """A set of pictures with noise, more training samples than are read at once, and the baselines."""
    ds = ZipDataset(sample, size=20)
    train = np.random.default_rng(0).permutation(len(ds))[:300]
    return ds, train, baselines(ds, train)


def test_the_threshold_is_the_best_of_all(fitted):
    ds, train, baseline = fitted
    batch = ds.batch(train)
    difference = np.abs(batch["fg_bg"].numpy().astype(int) - batch["bg"].numpy()).max(1)
    mask = batch["mask"][:, 0].numpy() == 1
    means = []
    for threshold in range(256):
        predicted = difference > threshold
        union = (predicted | mask).sum((1, 2))
        means.append(np.mean(np.where(union > 0, (predicted & mask).sum((1, 2)) / np.maximum(union, 1), 1)))
    assert baseline.threshold == np.argmax(means) > 0
    mask_logits, depth = baseline(*(to_float(batch)[kind] for kind in ("bg", "fg_bg")))
    assert measure(mask_logits, depth, *(to_float(batch)[kind] for kind in ("mask", "depth")))["iou"].mean() == pytest.approx(
        max(means), abs=1e-6
    )


def test_the_mean_depth_is_that_of_the_training_samples(fitted):
    ds, train, baseline = fitted
    expected = np.mean([ds[i]["depth"].numpy().astype(float) for i in train], 0)
    np.testing.assert_allclose(baseline.mean_depth[0], expected, atol=1e-6)


@pytest.mark.parametrize("threshold", [0, 1, 20, 254])
def test_the_mask_is_exactly_the_thresholded_difference(fitted, threshold):
    """For every pair of levels: no rounding of 1/255 may move a pixel over the threshold."""
    baseline = fitted[2]
    baseline = type(baseline)(threshold, baseline.mean_depth)
    levels = torch.arange(256, dtype=torch.uint8)
    bg, fg_bg = (levels[:, None].expand(256, 256), levels[None].expand(256, 256))
    batch = to_float({"bg": bg.expand(1, 3, -1, -1), "fg_bg": torch.stack([fg_bg, bg, bg])[None]})
    mask_logits, _ = baseline(batch["bg"], batch["fg_bg"])
    assert torch.equal(mask_logits[0, 0] > 0, (fg_bg.int() - bg.int()).abs() > threshold)


def test_baselines_predict_the_same_depth_for_every_picture(fitted):
    ds, _, baseline = fitted
    batch = to_float(ds.batch([0, 1, 2]))
    _, depth = baseline(batch["bg"], batch["fg_bg"])
    assert depth.shape == (3, 1, 20, 20) and (depth == baseline.mean_depth).all()


def test_a_sample_without_depth_does_not_spoil_the_mean_of_the_others(write_zip, encode, tmp_path):
    black = {"bg_fg_depth_map/bg001_fg001_01_depth_map.png": encode(np.zeros((24, 24), np.uint8))}
    write_zip(tmp_path / "a.zip", files=black)
    ds = ZipDataset(tmp_path / "a.zip", 24)
    model = Baseline(20, torch.full((1, 1, 24, 24), 0.5))
    everything = np.arange(len(ds))
    values = evaluate(model, ds, everything, precision="float32")["delta1"]
    assert np.isnan(values).sum() == 1
    means = score(model, ds, {"all": everything}, "float32")
    assert means["all"]["delta1"] == pytest.approx(values[~np.isnan(values)].mean())
