"""Augmentations: what they change, what they leave alone, and that each sample has its own draw."""

import pytest
import torch

from helpers import AUGMENTATIONS

every = pytest.mark.parametrize("name", AUGMENTATIONS)
KINDS = (("bg", 3), ("fg_bg", 3), ("mask", 1), ("depth", 1))


def some(n=8, height=20, width=28):
    """Noise, in which no two pixels are alike; a mask; fg_bg is bg but for the object."""
    numbers = torch.Generator().manual_seed(0)
    batch = {kind: torch.rand(n, channels, height, width, generator=numbers) for kind, channels in KINDS}
    batch["mask"] = (batch["mask"] > 0.8).float()
    batch["fg_bg"] = torch.where(batch["mask"] > 0, batch["fg_bg"], batch["bg"])
    return batch


def augmented(name, batch, seed=0):
    before = {kind: pictures.clone() for kind, pictures in batch.items()}
    torch.manual_seed(seed)
    found = AUGMENTATIONS[name](batch)
    assert all(torch.equal(batch[kind], before[kind]) for kind in batch)  # what is given stays as it was
    assert {kind: p.shape for kind, p in found.items()} == {kind: p.shape for kind, p in batch.items()}
    for pictures in found.values():
        assert pictures.dtype == torch.float32 and pictures.min() >= 0 and pictures.max() <= 1
    return found


def same(one, other):
    """For each sample, whether it is the same in both."""
    return torch.tensor([torch.equal(*pair) for pair in zip(one, other, strict=True)])


@every
@pytest.mark.parametrize("height, width", [(20, 28), (31, 17), (16, 48), (11, 11)])
def test_shapes_and_ranges_stay_at_any_size_also_of_black_and_of_white_pictures(name, height, width):
    batch = some(8, height, width)
    augmented(name, batch)
    for level in (0.0, 1.0):
        augmented(name, batch | {kind: torch.full_like(batch[kind], level) for kind in ("bg", "fg_bg")})


@every
def test_a_seed_repeats_it_and_another_does_not(name):
    batch = some(16)
    first, again, other = (augmented(name, batch, seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[kind], again[kind]) for kind in batch)
    assert not all(torch.equal(first[kind], other[kind]) for kind in batch)


@every
def test_each_sample_has_its_own_draw(name):
    """Of samples that are all the same: mirror can make two of one, the others as many as they like."""
    alike = {kind: pictures[:1].repeat(32, 1, 1, 1) for kind, pictures in some(1).items()}
    variants = len(augmented(name, alike)["bg"].unique(dim=0))
    assert variants == 2 if name == "mirror" else variants > 16


def test_mirror_turns_about_half_of_the_samples_in_all_their_pictures():
    batch = some(400, 12, 12)
    found = augmented("mirror", batch)
    turned = ~same(found["bg"], batch["bg"])
    assert 160 < turned.sum() < 240
    for kind, pictures in batch.items():
        expected = torch.stack([p.flip(2) if flip else p for p, flip in zip(pictures, turned, strict=True)])
        assert torch.equal(found[kind], expected)


def test_colour_changes_both_pictures_alike_and_nothing_else():
    """Pixels that were the same in both are so afterwards, whatever the object beside them looks like."""
    batch = some(32)
    found = augmented("colour", batch)
    assert same(found["mask"], batch["mask"]).all() and same(found["depth"], batch["depth"]).all()
    assert not same(found["bg"], batch["bg"]).any()
    unchanged = (batch["mask"] == 0).expand_as(batch["bg"])
    torch.testing.assert_close(found["bg"][unchanged], found["fg_bg"][unchanged])
    assert (found["bg"] - found["fg_bg"])[~unchanged].abs().mean() > 0.1


def test_shake_leaves_mask_and_depth_alone_and_changes_each_picture_by_itself():
    """A blur meets two samples in ten, a wide move one, any other change three."""
    batch = some(400, 16, 16)
    batch["fg_bg"] = batch["bg"]
    found = augmented("shake", batch)
    assert same(found["mask"], batch["mask"]).all() and same(found["depth"], batch["depth"]).all()
    for kind, untouched in (("bg", 0.7**5 * 0.8 * 0.9), ("fg_bg", 0.7**3 * 0.8)):
        share = (~same(found[kind], batch[kind])).float().mean().item()
        assert share == pytest.approx(1 - untouched, abs=0.08)
    assert (~same(found["bg"], found["fg_bg"])).float().mean() > 0.5
    assert (found["fg_bg"] - batch["fg_bg"]).abs().mean() < 0.15  # changed, and not beyond recognition
