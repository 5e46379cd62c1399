"""The networks against the reports' layer table and counts; the project's own also against one by hand."""

import copy
from pathlib import Path

import pytest
import torch
from benchmarks.quality import measure_aligned
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import helpers
from helpers import MODELS, WEIGHTS, ZipDataset, baselines, load_model, split

TABLE = Path(__file__).with_name("resunet_layers.txt")

# Of the reports: all parameters, and GFLOP of a forward pass at 64 x 64; and, counted by hand from the lists
# of layers, how many parameters both tasks reach, the mask alone, depth alone. The last is the stride. Of the
# project's own networks the same. A convolution of k x k from a to b channels has k k a b weights, and of as
# many multiplications a pixel, two operations each; a residual block has two of 3 x 3, one of 1 x 1.
# difference_unet: at 1/2 of the size 48 -> 32 and 96 -> 32 channels, at 1/4 32 -> 64 and 192 -> 64, at 1/8
# 64 -> 128 and 320 -> 128, at 1/16 128 -> 192; at full size 12 -> 16, 24 -> 16, 16 -> 2: 64 512 * 32^2 +
# 217 088 * 16^2 + 786 432 * 8^2 + 577 536 * 4^2 + 5 472 * 64^2 multiplications.
# resnet18_unet: at 1/2 12 -> 64 of 7 x 7 and 128 -> 64, at 1/4, 1/8, 1/16 torchvision's first three stages,
# at 1/4 192 -> 64, at 1/8 384 -> 128; at full size 12 -> 16, 32 -> 16, 16 -> 2: 156 416 * 32^2 +
# 307 200 * 16^2 + 1 163 264 * 8^2 + 2 097 152 * 4^2 + 6 624 * 64^2.
COUNTS = {
    "resunet": (11_033_922, "2.97", (4_761_216, 3_136_353, 3_136_353), 16),
    "resunet_lite": (2_634_882, "6.09", (1_157_888, 738_497, 738_497), 4),
    "dual_stream": (3_165_170, "3.90", (2_701_376, 117_905, 345_889), 4),
    "twin_unet": (5_403_938, "1.58", (0, 1_082_465, 4_321_473), 16),
    "two_head_resnet": (3_199_552, "26.2", (833_600, 1_182_976, 1_182_976), 1),
    "difference_unet": (1_654_946, "0.407", (1_654_946, 0, 0), 16),
    "resnet18_unet": (3_736_738, "0.748", (3_736_738, 0, 0), 16),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def pictures(height, width, n=1):
    return torch.rand(2, n, 3, height, width, generator=torch.Generator().manual_seed(0)).unbind()


def fitting(model, n=1):
    """Pictures as small as a network can do something with; the one that never halves them is slow."""
    side = 32 if model.stride > 1 else 10
    return pictures(side, side, n)


def reached(model, output):
    """The names of the parameters that this output depends on."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    slopes = torch.autograd.grad(output.square().sum(), parameters, retain_graph=True, allow_unused=True)
    return {name for name, slope in zip(names, slopes, strict=True) if slope is not None and slope.any()}


# Of the reports


def test_resunet_has_the_layers_of_the_report():
    """Every layer's type, output shape and own parameters, in the order in which they finish."""
    rows = []

    def note(module, inputs, output):
        outputs = output if isinstance(output, tuple) else (output,)
        shapes = "+".join("x".join(map(str, one.shape[1:])) for one in outputs)
        own = sum(p.numel() for p in module.parameters(recurse=False))
        rows.append(f"{type(module).__name__} {shapes} {own}")

    with torch.device("meta"):
        net = MODELS["resunet"]().eval()
        for module in net.modules():
            if module is not net and type(module) not in (nn.Sequential, nn.ModuleList):
                module.register_forward_hook(note)
        net(*torch.rand(2, 1, 3, 224, 224))
    expected = [line for line in TABLE.read_text().splitlines() if not line.startswith("#")]
    assert len(expected) == 129 and rows == expected


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_operations_are_those_of_the_reports_or_counted_by_hand(name):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:  # counts without computing
        net = MODELS[name]().eval()
        net(*torch.rand(2, 1, 3, 64, 64))
    assert MODELS.keys() == COUNTS.keys() and net.stride == COUNTS[name][3]
    assert sum(p.numel() for p in net.parameters()) == COUNTS[name][0]
    assert f"{counter.get_total_flops() / 1e9:#.3g}" == COUNTS[name][1]


@pytest.mark.parametrize("name", COUNTS)
def test_gradients_reach_every_parameter_and_the_tasks_share_as_much_as_in_the_reports(name):
    """In evaluation mode: in training mode batch norm takes a bias before it away, and so its gradient."""
    torch.manual_seed(0)
    net = MODELS[name]().eval()
    mask, depth = (reached(net, output) for output in net(*fitting(net, n=4)))
    size = {name: p.numel() for name, p in net.named_parameters()}
    assert mask | depth == size.keys()
    parts = (mask & depth, mask - depth, depth - mask)
    assert tuple(sum(size[name] for name in part) for part in parts) == COUNTS[name][2]


@pytest.mark.parametrize("name", ["resunet", "resunet_lite", "twin_unet"])
def test_a_slope_is_enlarged_to_a_slope_that_ends_in_the_same_corners(name):
    steps = [module for module in MODELS[name]().modules() if isinstance(module, nn.Upsample)]
    slope, enlarged = (torch.linspace(0, 1, side).expand(1, 1, side, side) for side in (4, 8))
    assert steps and all(torch.allclose(step(slope), enlarged) for step in steps)


# Of all


@pytest.mark.parametrize("height, width", [(1, 2), (3, 2), (5, 3)])
def test_mask_and_depth_have_the_size_of_the_pictures(model, height, width):
    height, width = (side * max(model.stride, 4 - model.stride) for side in (height, width))
    with torch.no_grad():
        mask_logits, depth = model(*pictures(height, width, n=2))
    assert mask_logits.shape == depth.shape == (2, 1, height, width)
    assert depth.min() >= 0 and depth.max() <= 1 and depth.std() > 0


def test_depth_stays_in_0_to_1_for_any_input_and_mask_logits_do_not(model):
    with torch.no_grad():
        logits, depth = model(*(1000 * (picture - 0.5) for picture in fitting(model, n=4)))
    assert depth.isfinite().all() and depth.min() >= 0 and depth.max() <= 1
    assert logits.isfinite().all() and not (logits.min() >= 0 and logits.max() <= 1)


def test_both_pictures_matter_to_both_outputs_each_in_its_own_way(model):
    bg, fg_bg = (picture.requires_grad_() for picture in fitting(model))
    for output, swapped in zip(model(bg, fg_bg), model(fg_bg, bg), strict=True):
        assert all(grad.any() for grad in torch.autograd.grad(output.sum(), (bg, fg_bg), retain_graph=True))
        assert not torch.allclose(output, swapped)


def test_each_picture_of_a_batch_is_seen_alone(model):
    bg, fg_bg = fitting(model, n=3)
    with torch.no_grad():
        together, alone = model(bg, fg_bg), model(bg[1:2], fg_bg[1:2])
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one[1:2], other, atol=1e-5, rtol=1e-4)


def test_memory_order_changes_nothing_and_mixed_precision_little(model):
    """Less than a tenth of how much the outputs vary, and a step of bfloat16 below 1."""
    bg, fg_bg = fitting(model, n=2)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    changed = [picture.contiguous(memory_format=torch.channels_last) for picture in (bg, fg_bg)]
    with torch.no_grad():
        expected = model(bg, fg_bg)
        torch.testing.assert_close(last(*changed), expected, atol=1e-5, rtol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            half = last(bg, fg_bg)
    for one, other in zip(half, expected, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.float() - other).abs().mean() < 0.1 * other.std() + 2**-8


@pytest.mark.parametrize("height, width", [(33, 32), (32, 50), (1, 1)])
@pytest.mark.parametrize("name", [name for name, of in COUNTS.items() if of[3] > 1])
def test_a_size_that_does_not_fit_is_refused_with_one_that_does(name, height, width):
    with torch.device("meta"):
        net = MODELS[name]().eval()
        what = rf"{height} x {width} pixels do not divide by {net.stride}\. Use \d+ x \d+\."
        with pytest.raises(ValueError, match=what) as caught:
            net(*torch.rand(2, 1, 3, height, width))
        fit = [int(word) for word in str(caught.value).split("Use ")[1].rstrip(".").split(" x ")]
        assert net(*torch.rand(2, 1, 3, *fit))[0].shape[2:] == tuple(fit)
    assert all(abs(side - near) <= net.stride for side, near in zip((height, width), fit, strict=True))


# The project's own


def by_hand(w, bg, fg_bg):
    """difference_unet, from its weights by their names, with PyTorch's functions alone."""

    def conv(x, name, norm):
        x = F.conv2d(x, w[f"{name}.weight"], padding=w[f"{name}.weight"].shape[-1] // 2)
        parts = (w[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *parts)

    def block(x, name):
        main = conv(conv(x, f"{name}.main.0", f"{name}.main.1").relu(), f"{name}.main.3", f"{name}.main.4")
        return (main + conv(x, f"{name}.shortcut.0", f"{name}.shortcut.1")).relu()

    both = torch.cat([bg, fg_bg, fg_bg - bg, 4 * (fg_bg - bg).abs()], 1)
    features = [block(F.pixel_unshuffle(both, 2), "stem.1")]
    for k in range(3):
        features.append(block(F.max_pool2d(features[-1], 2), f"encoder.{k}.1"))
    x = features.pop()
    for k in range(3):
        up = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        x = block(torch.cat([up, features.pop()], 1), f"decoder.mix.{k}")
    details = conv(both, "decoder.detail.0", "decoder.detail.1").relu()
    joined = torch.cat([details, F.pixel_shuffle(x, 2)], 1)
    joined = conv(joined, "decoder.join.0", "decoder.join.1").relu()
    outputs = F.conv2d(joined, w["decoder.head.weight"], w["decoder.head.bias"], padding=1)
    return outputs[:, :1], outputs[:, 1:].sigmoid()


def test_the_shipped_weights_give_what_their_network_written_by_hand_gives(sample):
    weights = {name: value.float() for name, value in torch.load(WEIGHTS).items()}
    batch = helpers.to_float(ZipDataset(sample, 96).batch([0, 200, 400]))
    for bg, fg_bg in ((batch["bg"], batch["fg_bg"]), pictures(32, 48, n=2)):
        with torch.no_grad():
            found, expected = load_model().cpu()(bg, fg_bg), by_hand(weights, bg, fg_bg)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert all(one.std() > 0.01 for one in expected)


def test_the_shipped_weights_know_unseen_samples_better_than_the_baselines_do(sample):
    ds = ZipDataset(sample, 192)
    parts = split(ds)
    new, found = helpers.to_float(ds.batch(parts["test_new_both"])), []
    for model in (load_model().cpu(), baselines(ds, parts["train"]).cpu()):
        with torch.no_grad():
            mask_logits, depth = model(new["bg"], new["fg_bg"])
        values = helpers.measure(mask_logits, depth, new["mask"], new["depth"])
        values |= measure_aligned(depth, new["depth"])
        found.append({name: of.nanmean().item() for name, of in values.items()})
    network, baseline = found
    assert network["iou"] > baseline["iou"] + 0.1 and network["rmse"] < 0.8 * baseline["rmse"]
    assert network["rank"] > baseline["rank"] and network["aligned_rmse"] < baseline["aligned_rmse"]
