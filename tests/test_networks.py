"""The networks against the reports' layer table and counts."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from helpers import MODELS, check_size, task_loss

TABLE = Path(__file__).with_name("resunet_layers.txt")

# What the reports give, all and GFLOP of a forward pass at 64 x 64; and, counted by hand from their layer lists, how many
# parameters both tasks reach, the mask alone, depth alone. The last is the stride.
COUNTS = {
    "resunet": (11_033_922, "2.97", (4_761_216, 3_136_353, 3_136_353), 16),
    "resunet_lite": (2_634_882, "6.09", (1_157_888, 738_497, 738_497), 4),
    "dual_stream": (3_165_170, "3.90", (2_701_376, 117_905, 345_889), 4),
    "twin_unet": (5_403_938, "1.58", (0, 1_082_465, 4_321_473), 16),
    "two_head_resnet": (3_199_552, "26.2", (833_600, 1_182_976, 1_182_976), 1),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def pictures(height, width, n=1):
    return torch.rand(2, n, 3, height, width, generator=torch.Generator().manual_seed(0)).unbind()


def fitting(model, n=1):
    """Pictures as small as a network can do something with; the one that never halves them is dear."""
    side = 32 if model.stride > 1 else 10
    return pictures(side, side, n)


def reached(model, output):
    """The names of the parameters that this output depends on."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    slopes = torch.autograd.grad(output.square().sum(), parameters, retain_graph=True, allow_unused=True)
    return {name for name, slope in zip(names, slopes, strict=True) if slope is not None and slope.abs().sum() > 0}


def test_resunet_has_the_layers_of_the_report():
    """Every layer's type, output shape and own parameters, in the order in which they finish."""
    rows = []

    def note(module, inputs, output):
        outputs = output if isinstance(output, tuple) else (output,)
        shapes = "+".join("x".join(map(str, one.shape[1:])) for one in outputs)
        rows.append(f"{type(module).__name__} {shapes} {sum(p.numel() for p in module.parameters(recurse=False))}")

    net = MODELS["resunet"]().eval()
    for module in net.modules():
        if module is not net and type(module) not in (nn.Sequential, nn.ModuleList):
            module.register_forward_hook(note)
    with torch.no_grad():
        net(*pictures(224, 224))
    expected = [line for line in TABLE.read_text().splitlines() if not line.startswith("#")]
    assert len(expected) == 129
    assert rows == expected


@pytest.mark.parametrize("name, times", [("resunet", 8), ("resunet_lite", 4), ("twin_unet", 8)])
def test_a_slope_is_enlarged_to_a_slope_that_ends_in_the_same_corners(name, times):
    """At each step up of each decoder."""
    net, used = MODELS[name]().eval(), []
    for module in net.modules():
        if isinstance(module, nn.Upsample):
            module.register_forward_hook(lambda module, *_: used.append(module))
    net(*fitting(net))
    assert len(used) == times
    slope = torch.linspace(0, 1, 4).expand(1, 1, 4, 4)
    for enlarge in set(used):
        torch.testing.assert_close(enlarge.forward(slope), torch.linspace(0, 1, 8).expand(1, 1, 8, 8))


def test_the_networks_are_those_of_the_reports():
    assert {name: MODELS[name]().stride for name in MODELS} == {name: stride for name, (*_, stride) in COUNTS.items()}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_operations_are_those_of_the_reports(name):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:  # counts without computing
        net = MODELS[name]().eval()
        net(*torch.rand(2, 1, 3, 64, 64))
    gflop = counter.get_total_flops() / 1e9
    expected_parameters, expected_gflop, _, _ = COUNTS[name]
    assert sum(p.numel() for p in net.parameters()) == expected_parameters
    assert f"{gflop:#.3g}" == expected_gflop


@pytest.mark.parametrize("name", COUNTS)
def test_the_tasks_share_as_much_as_in_the_reports(name):
    """In evaluation mode: in training mode batch norm takes a bias before it away, and so its gradient."""
    net = MODELS[name]().eval()
    mask, depth = (reached(net, output) for output in net(*fitting(net, n=4)))
    size = {name: p.numel() for name, p in net.named_parameters()}
    assert mask | depth == size.keys()
    parts = (mask & depth, mask - depth, depth - mask)
    assert tuple(sum(size[name] for name in part) for part in parts) == COUNTS[name][2]


def test_twin_unet_computes_one_task_without_the_other():
    """Its two networks share no parameter, no batch statistics and no feature."""
    net = MODELS["twin_unet"]()
    bg, fg_bg = fitting(net, n=2)
    theirs = reached(net, net(bg, fg_bg)[0])
    before = net.eval()(bg, fg_bg)[1]
    modules = {name.rpartition(".")[0] for name in theirs}
    with torch.no_grad():
        for name, values in net.state_dict().items():
            if name.rpartition(".")[0] in modules:
                values.zero_()
    mask, depth = net(bg, fg_bg)
    assert torch.equal(depth, before) and (mask == 0).all()


def test_two_head_resnet_has_no_bias_outside_batch_norm():
    modules = [module for module in MODELS["two_head_resnet"]().modules() if not list(module.children())]
    biased = [module for module in modules if getattr(module, "bias", None) is not None]
    assert biased and all(isinstance(module, nn.BatchNorm2d) for module in biased)


@pytest.mark.parametrize("mask_loss, depth_loss", [("bce", None), (None, "l1"), ("bce", "l1")])
def test_tasks_are_trained_together_or_alone(model, mask_loss, depth_loss):
    """What the other task has for itself stays as it was, and the loss falls."""
    net = copy.deepcopy(model)
    bg, fg_bg = fitting(net, n=2)
    mask, depth = (reached(net, output) for output in net(bg, fg_bg))
    trained = (mask if mask_loss else set()) | (depth if depth_loss else set())
    mask_true, depth_true = (fg_bg - bg).amax(1, keepdim=True).gt(0).float(), fg_bg.mean(1, keepdim=True)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    loss, optimizer = task_loss(mask_loss, depth_loss), torch.optim.Adam(net.train().parameters(), lr=1e-4)
    losses = []
    for _ in range(4):
        losses.append(loss(*net(bg, fg_bg), mask_true, depth_true))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert {name for name, p in net.named_parameters() if not torch.equal(p, before[name])} == trained


@pytest.mark.parametrize("height, width", [(1, 2), (3, 2), (5, 3)])
def test_mask_and_depth_have_the_size_of_the_pictures(model, height, width):
    height, width = (side * max(model.stride, 4 - model.stride) for side in (height, width))
    with torch.no_grad():
        mask_logits, depth = model(*pictures(height, width, n=2))
    assert mask_logits.shape == depth.shape == (2, 1, height, width)
    assert depth.min() >= 0 and depth.max() <= 1 and depth.std() > 0


def test_two_head_resnet_sees_21_pixels_of_the_picture_and_17_of_the_background():
    """Ten convolutions of 3 x 3 in a row, and eight."""
    views = [picture.requires_grad_() for picture in pictures(27, 27)]
    MODELS["two_head_resnet"]().eval()(*views)[0][0, 0, 13, 13].backward()
    for view, side in zip(views, (17, 21), strict=True):
        slope = torch.zeros(27, 27)
        slope[13 - side // 2 : 14 + side // 2, 13 - side // 2 : 14 + side // 2] = 1
        assert torch.equal((view.grad[0].abs().sum(0) > 0).float(), slope)


def test_a_network_that_halves_nothing_takes_any_size():
    with torch.no_grad():
        mask_logits, depth = MODELS["two_head_resnet"]().eval()(*pictures(7, 1))
    assert mask_logits.shape == depth.shape == (1, 1, 7, 1)


def test_depth_stays_in_0_to_1_for_any_input(model):
    with torch.no_grad():
        _, depth = model(*(1000 * (picture - 0.5) for picture in fitting(model)))
    assert depth.isfinite().all() and depth.min() >= 0 and depth.max() <= 1


def test_mask_logits_are_not_squeezed_into_0_to_1(model):
    with torch.no_grad():
        logits, _ = model(*(50 * picture for picture in fitting(model, n=4)))
    assert logits.min() < logits.max() and not (logits.min() >= 0 and logits.max() <= 1)


def test_both_pictures_matter_to_both_outputs(model):
    bg, fg_bg = (picture.requires_grad_() for picture in fitting(model))
    for output in model(bg, fg_bg):
        assert all(grad.abs().sum() > 0 for grad in torch.autograd.grad(output.sum(), (bg, fg_bg), retain_graph=True))


def test_the_two_pictures_are_not_interchangeable(model):
    bg, fg_bg = fitting(model)
    with torch.no_grad():
        assert not torch.allclose(model(bg, fg_bg)[0], model(fg_bg, bg)[0])


def test_evaluation_is_deterministic_and_sees_each_picture_alone(model):
    bg, fg_bg = fitting(model, n=3)
    with torch.no_grad():
        together, again, alone = model(bg, fg_bg), model(bg, fg_bg), model(bg[1:2], fg_bg[1:2])
    for one, two, three in zip(together, again, alone, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one[1:2], three, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("height, width", [(33, 32), (32, 50), (1, 1)])
@pytest.mark.parametrize("name", [name for name, (*_, stride) in COUNTS.items() if stride > 1])
def test_a_size_that_does_not_fit_is_refused_with_one_that_does(name, height, width):
    net = MODELS[name]()
    with pytest.raises(ValueError, match=rf"{height} x {width} pixels do not divide by {net.stride}") as caught:
        net(*pictures(height, width))
    fit = [int(word) for word in str(caught.value).split("Use ")[1].rstrip(".").split(" x ")]
    check_size(net, *fit)
    assert all(abs(side - near) <= net.stride and near > 0 for side, near in zip((height, width), fit, strict=True))
