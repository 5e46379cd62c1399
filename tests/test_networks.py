"""The networks against the reports' layer table and counts; the project's own against theirs and against torchvision."""

import copy
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import normalize

from helpers import MODELS, FullSizeDecoder, check_size, task_loss, with_difference

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
# Of the project's own networks the same. A convolution of k x k from a to b channels has k k a b weights, and of as many
# multiplications a pixel, two operations each; a batch norm has 2 b. Of a residual block that is two of 3 x 3 and a shortcut.
# difference_unet: at 1/2 of the size 48 -> 32 and 96 -> 32 channels, at 1/4 32 -> 64 and 192 -> 64, at 1/8 64 -> 128 and
# 320 -> 128, at 1/16 128 -> 192; at full size 12 -> 16, 24 -> 16, 16 -> 2. The last makes both outputs from all that it has:
# (24 576 + 39 936) 32^2 + (57 344 + 159 744) 16^2 + (229 376 + 557 056) 8^2 + 577 536 4^2 + 5 472 64^2 multiplications.
# resnet18_unet: at 1/2 12 -> 64 of 7 x 7 and 128 -> 64, at 1/4 torchvision's layer1 of 147 968 parameters and 192 -> 64, at 1/8
# layer2 of 525 568 and 384 -> 128, at 1/16 layer3 of 2 099 712; at full size 12 -> 16, 32 -> 16, 16 -> 2:
# (37 632 + 118 784) 32^2 + (147 456 + 159 744) 16^2 + (524 288 + 638 976) 8^2 + 2 097 152 4^2 + 6 624 64^2.
OWN_COUNTS = {
    "difference_unet": (1_654_946, "0.407", (1_654_946, 0, 0), 16),
    "resnet18_unet": (3_736_738, "0.748", (3_736_738, 0, 0), 16),
}
COUNTS |= OWN_COUNTS


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


def test_the_networks_are_those_of_the_reports_and_the_projects_own():
    assert {name: MODELS[name]().stride for name in MODELS} == {name: stride for name, (*_, stride) in COUNTS.items()}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_operations_are_those_of_the_reports_or_counted_by_hand(name):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:  # counts without computing
        net = MODELS[name]().eval()
        net(*torch.rand(2, 1, 3, 64, 64))
    gflop = counter.get_total_flops() / 1e9
    expected_parameters, expected_gflop, _, _ = COUNTS[name]
    assert sum(p.numel() for p in net.parameters()) == expected_parameters
    assert f"{gflop:#.3g}" == expected_gflop


@pytest.mark.parametrize("name", COUNTS)
def test_the_tasks_share_as_much_as_in_the_reports_and_in_the_projects_own_all_but_a_channel(name):
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


# The project's own


def test_the_projects_network_has_at_most_three_million_parameters():
    assert sum(p.numel() for p in MODELS["difference_unet"]().parameters()) <= 3_000_000


def test_a_network_is_given_both_pictures_and_their_difference_twice():
    bg, fg_bg = (np.random.default_rng(k).random((2, 3, 5, 7)) for k in (0, 1))
    found = with_difference(*map(torch.from_numpy, (bg, fg_bg))).numpy()
    np.testing.assert_allclose(found, np.concatenate([bg, fg_bg, fg_bg - bg, 4 * np.abs(fg_bg - bg)], 1), atol=1e-15)


@pytest.mark.parametrize("name, first", [("difference_unet", "stem"), ("resnet18_unet", "conv1")])
def test_a_difference_of_one_level_reaches_a_network_in_bfloat16_as_it_is(name, first):
    """From each of the 255 levels to the next. Near white, bfloat16's numbers lie 1/256 apart: where a network that is given
    the pictures alone has to subtract them, 1/255 becomes that or twice as much."""
    levels = torch.arange(257).clamp(max=255).div(255).float()
    bg, fg_bg = (p.view(1, 1, 16, 16).expand(1, 3, 16, 16) for p in (levels[:-1], levels[1:]))
    net, given = MODELS[name]().eval(), []
    getattr(net, first).register_forward_pre_hook(lambda module, inputs: given.append(inputs[0].bfloat16().double()))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        net(bg, fg_bg)
    signed, enlarged = (255 * given[0][0, k : k + 3].flatten(1)[:, :-1] for k in (6, 9))
    assert (signed - 1).abs().max() < 2**-8 and (enlarged - 4).abs().max() < 4 * 2**-8
    subtracted = 255 * (fg_bg.bfloat16() - bg.bfloat16()).double().flatten()
    assert (subtracted - 1).abs().max() > 0.9


def test_the_projects_network_tells_an_object_a_level_brighter_from_a_bright_background_in_bfloat16():
    """After few steps of training. Without the difference it gets to an IoU below .2 in as many, whatever the seed."""
    torch.manual_seed(1)
    net = MODELS["difference_unet"]()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)

    def drawn(n):
        bg = torch.randint(200, 255, (n, 3, 1, 1)).expand(-1, -1, 16, 16).float()
        mask = torch.zeros(n, 1, 16, 16)
        for one, (y, x) in zip(mask, torch.randint(0, 9, (n, 2)).tolist(), strict=True):
            one[:, y : y + 7, x : x + 7] = 1
        return bg / 255, (bg + mask) / 255, mask

    for _ in range(60):
        bg, fg_bg, mask = drawn(16)
        with torch.autocast("cpu", torch.bfloat16):
            logits, _ = net(bg, fg_bg)
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(logits.float(), mask).backward()
        optimizer.step()
    bg, fg_bg, mask = drawn(16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = net(bg, fg_bg)[0] > 0
    assert (found & (mask > 0)).sum() / (found | (mask > 0)).sum() > 0.7


@pytest.mark.parametrize("widths, unshuffle", [((8, 12, 6), 2), ((16, 8), 4), ((5, 6), 1)])
def test_a_decoder_comes_back_to_full_size(widths, unshuffle):
    features = [torch.rand(2, width, 16 // 2**k, 24 // 2**k) for k, width in enumerate(widths)]
    decoder = FullSizeDecoder(widths, 5, 3, unshuffle, detail=4)
    assert decoder(features, torch.rand(2, 5, 16 * unshuffle, 24 * unshuffle)).shape == (2, 3, 16 * unshuffle, 24 * unshuffle)


@pytest.mark.parametrize("name", OWN_COUNTS)
def test_each_step_up_repeats_every_pixel(name):
    net, seen = MODELS[name]().eval(), []
    for module in net.modules():
        if isinstance(module, nn.Upsample):
            module.register_forward_hook(lambda module, inputs, output: seen.append((*inputs, output)))
    net(*fitting(net))
    assert len(seen) == 3
    for small, large in seen:
        assert torch.equal(large, small.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_what_squares_of_pixels_become_goes_back_to_the_pixels():
    net, picture = MODELS["difference_unet"](), torch.rand(2, 3, 8, 12)
    packed = net.stem[0](picture)
    assert packed.shape == (2, 12, 4, 6) and torch.equal(net.decoder.spread(packed), picture)
    assert torch.equal(packed[:, 4:8, 1, 2], picture[:, 1, 2:4, 4:6].flatten(1))


def test_outlines_come_from_seven_pixels_of_the_pictures():
    """Three convolutions of 3 x 3 in a row, whatever the encoder has made of them."""
    torch.manual_seed(0)
    decoder, picture = FullSizeDecoder((8, 12), 12, 2).eval(), torch.rand(1, 12, 16, 16, requires_grad=True)
    decoder([torch.rand(1, 8, 8, 8), torch.rand(1, 12, 4, 4)], picture)[0, :, 8, 8].sum().backward()
    seen = torch.zeros(16, 16)
    seen[5:12, 5:12] = 1
    assert torch.equal((picture.grad[0].abs().sum(0) > 0).float(), seen)


# Weights trained on ImageNet


def encoded(net, *pictures):
    """The features after the first convolution and after each of three stages."""
    found, hooks = {}, []
    for name in ("relu", "layer1", "layer2", "layer3"):
        hook = getattr(net, name).register_forward_hook(lambda module, inputs, output, name=name: found.update({name: output}))
        hooks.append(hook)
    with torch.no_grad():
        net(*pictures)
    for hook in hooks:
        hook.remove()
    return found


def test_with_imagenets_weights_the_encoder_sees_the_picture_as_torchvisions_does(imagenet):
    """But at the border: beyond it a normalised picture has 0, which is grey, and this one black. A feature of the third stage
    sees 211 pixels."""
    net = MODELS["resnet18_unet"]().eval()
    before = {name: values.clone() for name, values in net.state_dict().items()}
    net.load_imagenet()
    bg, fg_bg = pictures(256, 256)
    found = encoded(net, bg, fg_bg)
    expected = encoded(imagenet, normalize(fg_bg, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    for name, features in expected.items():
        middle = features[..., 7:-7, 7:-7]
        assert middle.numel() and middle.std() > 0.01
        torch.testing.assert_close(found[name][..., 7:-7, 7:-7], middle, rtol=1e-3, atol=1e-4 * middle.abs().max().item())
    for name, features in encoded(net, fg_bg.flip(3), fg_bg).items():
        assert torch.equal(features, found[name])
    for name, values in net.state_dict().items():
        assert torch.equal(values, before[name]) == (name.startswith("decoder") or "tracked" in name)


def test_imagenets_weights_that_cannot_be_had_are_said_in_a_sentence(offline):
    net = MODELS["resnet18_unet"]()
    before = {name: values.clone() for name, values in net.state_dict().items()}
    for damaged in (False, True):
        if damaged:
            offline.write_bytes(b"half a file")
        with pytest.raises(OSError, match="ImageNet") as caught:
            net.load_imagenet()
        said = str(caught.value)
        assert ("damaged" in said) == damaged and ("no network" in said) == (not damaged)
        assert f"https://download.pytorch.org/models/{offline.name} at {offline}" in said and "\n" not in said
    assert all(torch.equal(values, before[name]) for name, values in net.state_dict().items())


def test_what_a_network_gives_in_place_of_imagenets_weights_is_refused(offline, monkeypatch, tmp_path):
    """As the page does on which a hotel asks for a password."""
    (tmp_path / "page.html").write_text("<html>Log in</html>")
    monkeypatch.setattr(torch.hub, "urlopen", lambda _: urllib.request.urlopen((tmp_path / "page.html").as_uri()))
    with pytest.raises(OSError, match="f37072fd"):
        MODELS["resnet18_unet"]().load_imagenet()
    assert not offline.exists()
