"""The networks against the reports' layer table and counts."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from helpers import MODELS, check_size

TABLE = Path(__file__).with_name("resunet_layers.txt")


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def pictures(height, width, n=1):
    return torch.rand(2, n, 3, height, width, generator=torch.Generator().manual_seed(0)).unbind()


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


def test_resunet_enlarges_a_slope_to_a_slope_that_ends_in_the_same_corners():
    enlarge = next(module for module in MODELS["resunet"]().modules() if isinstance(module, nn.Upsample))
    slope = torch.linspace(0, 1, 4).expand(1, 1, 4, 4)
    torch.testing.assert_close(enlarge(slope), torch.linspace(0, 1, 8).expand(1, 1, 8, 8))


@pytest.mark.parametrize("name, parameters, gflop", [("resunet", 11_033_922, 2.97), ("dual_stream", 3_165_170, 3.90)])
def test_parameters_and_operations_are_those_of_the_reports(name, parameters, gflop):
    net = MODELS[name]().eval()
    assert sum(p.numel() for p in net.parameters()) == parameters
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(*pictures(64, 64))
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflop, rel=0.01)


@pytest.mark.parametrize("height, width", [(32, 32), (32, 64), (48, 16)])
def test_mask_and_depth_have_the_size_of_the_pictures(model, height, width):
    with torch.no_grad():
        mask_logits, depth = model(*pictures(height, width, n=2))
    assert mask_logits.shape == depth.shape == (2, 1, height, width)
    assert depth.min() >= 0 and depth.max() <= 1 and depth.std() > 0


def test_depth_stays_in_0_to_1_for_any_input(model):
    with torch.no_grad():
        _, depth = model(*(1000 * (picture - 0.5) for picture in pictures(32, 32)))
    assert depth.isfinite().all() and depth.min() >= 0 and depth.max() <= 1


def test_mask_logits_are_not_squeezed_into_0_to_1(model):
    with torch.no_grad():
        logits, _ = model(*(50 * picture for picture in pictures(32, 32, n=4)))
    assert logits.min() < logits.max() and not (logits.min() >= 0 and logits.max() <= 1)


def test_both_pictures_matter_to_both_outputs(model):
    bg, fg_bg = (picture.requires_grad_() for picture in pictures(32, 32))
    for output in model(bg, fg_bg):
        assert all(grad.abs().sum() > 0 for grad in torch.autograd.grad(output.sum(), (bg, fg_bg), retain_graph=True))


def test_the_two_pictures_are_not_interchangeable(model):
    bg, fg_bg = pictures(32, 32)
    with torch.no_grad():
        assert not torch.allclose(model(bg, fg_bg)[0], model(fg_bg, bg)[0])


def test_every_parameter_learns(model):
    """In evaluation mode: in training mode batch norm takes a bias before it away, and so its gradient."""
    model.zero_grad()
    mask_logits, depth = model(*pictures(32, 32, n=4))
    (mask_logits.square().mean() + depth.square().mean()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_evaluation_is_deterministic_and_sees_each_picture_alone(model):
    bg, fg_bg = pictures(32, 32, n=3)
    with torch.no_grad():
        together, again, alone = model(bg, fg_bg), model(bg, fg_bg), model(bg[1:2], fg_bg[1:2])
    for one, two, three in zip(together, again, alone, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one[1:2], three, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("height, width", [(33, 32), (32, 50), (1, 1)])
def test_a_size_that_does_not_fit_is_refused_with_one_that_does(model, height, width):
    with pytest.raises(ValueError, match=rf"{height} x {width} pixels do not divide by {model.stride}") as caught:
        model(*pictures(height, width))
    fit = [int(word) for word in str(caught.value).split("Use ")[1].rstrip(".").split(" x ")]
    check_size(model, *fit)
    assert all(abs(side - near) <= model.stride and near > 0 for side, near in zip((height, width), fit, strict=True))
