"""Prediction: weights from files, pictures of any size and format; with a network whose right answer is known."""

import json
import os
import pickle
import zipfile

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image, features
from torch import nn

import helpers
from helpers import (
    MODELS,
    Config,
    Prediction,
    ZipDataset,
    baselines,
    evaluate,
    load_model,
    predict,
    predict_images,
    save_weights,
    split,
)


class StandIn(nn.Module):
    """The object is where the two pictures differ by more than a tenth, and depth is how bright the picture is."""

    stride = 1

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.full((1, 2, 3), 10.0))  # of a shape that no other network has

    def forward(self, bg, fg_bg):
        self.seen = fg_bg.shape[2:]
        difference = (fg_bg - bg).abs().amax(1, keepdim=True)
        return self.slope.mean() * (difference - 0.1), fg_bg.mean(1, keepdim=True)


class Restless(nn.Module):
    """Gives what batch norm and dropout make of its input."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(6, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Dropout(0.5))

    def forward(self, bg, fg_bg):
        mask_logits, depth = self.layers(torch.cat([bg, fg_bg], 1)).chunk(2, 1)
        return mask_logits, depth.sigmoid()


class Stripes(nn.Module):
    """Whatever it is given: columns that alternate between near and far, twice as often near."""

    def forward(self, bg, fg_bg):
        columns = torch.tensor([0.0, 0.0, 1.0]).repeat(fg_bg.shape[3] // 3).expand_as(fg_bg[:, :1])
        return 4 * columns - 1, columns


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(MODELS, "stand_in", StandIn)
    yield
    plt.close("all")


@pytest.fixture
def weights(tmp_path):
    torch.save(StandIn().state_dict(), tmp_path / "stand_in.pt")
    return tmp_path / "stand_in.pt"


def ramp(height, width):
    """Grey that grows from .2 at the top left to .6 at the bottom right, whatever the size: float (height, width)."""
    y, x = np.mgrid[:height, :width] + 0.5
    return 0.2 + 0.2 * y / height + 0.2 * x / width


def scene(height, width):
    """A ramp, the same with a rectangle in it that is brighter by .3, and that rectangle: arrays (height, width)."""
    mask = np.zeros((height, width), bool)
    mask[height // 5 : 1 + height * 3 // 5, width // 4 : 1 + width // 2] = True
    return ramp(height, width), ramp(height, width) + 0.3 * mask, mask


def tensor(grey):
    return torch.from_numpy(grey).float().expand(1, 3, -1, -1)


def near_border(mask, reach):
    """Where mask and background meet within so many pixels."""
    padded = np.pad(mask, reach, mode="edge")
    height, width = mask.shape
    shifted = [padded[i : i + height, j : j + width] for i in range(2 * reach + 1) for j in range(2 * reach + 1)]
    return np.any(shifted, 0) & ~np.all(shifted, 0)


# predict


@pytest.mark.parametrize("name", [*MODELS, "stand_in"])
def test_pictures_of_the_networks_size_are_predicted_as_by_calling_it(name):
    torch.manual_seed(0)
    model, pictures = MODELS[name]().eval(), torch.rand(2, 3, 3, 16, 16)
    with torch.no_grad():
        mask_logits, expected = model(*pictures)
    mask, depth = predict(model, *pictures, size=16)
    assert torch.equal(mask, (mask_logits > 0).float()) and torch.equal(depth, expected)
    assert mask.dtype == depth.dtype == torch.float32 and mask.shape == depth.shape == (3, 1, 16, 16)


SIZES = [(192, 192), (96, 96), (31, 77), (190, 33), (5, 7), (7, 5), (300, 250), (200, 640)]


@pytest.mark.parametrize("height, width", SIZES)
def test_mask_and_depth_of_any_size_are_right_at_every_pixel(height, width):
    """But for the pixels that the network sees less finely than they are, where they are next to the object's edge."""
    bg, fg_bg, truth = scene(height, width)
    mask, depth = predict(StandIn(), tensor(bg), tensor(fg_bg))
    assert mask.shape == depth.shape == (1, 1, height, width)
    assert set(mask.unique().tolist()) == {0, 1}
    coarser = max(height, width) / 192
    sure = ~near_border(truth, int(np.ceil(coarser))) if coarser > 1 else np.full(truth.shape, True)
    assert (sure & truth).sum() > 1 and (mask[0, 0].numpy() == truth)[sure].all()
    inside = ~near_border(truth, 2 * int(np.ceil(coarser)))
    np.testing.assert_allclose(depth[0, 0].numpy()[inside], fg_bg[inside], atol=0.015)


@pytest.mark.parametrize("bg_size", [(64, 48), (320, 240), (20, 15)])
def test_a_background_of_another_size_is_brought_to_the_same(bg_size):
    fg_bg, truth = scene(128, 96)[1:]
    mask, depth = predict(StandIn(), tensor(ramp(*bg_size)), tensor(fg_bg))
    assert depth.shape == (1, 1, 128, 96) and np.array_equal(mask[0, 0].numpy(), truth)


@pytest.mark.parametrize("axis", [0, 1])
def test_pictures_are_reduced_with_antialiasing(axis):
    """Stripes of a pixel, seen at a third of the size: hitting every third pixel would give stripes again."""
    stripes = np.repeat([np.arange(72) % 2], 72, 0).astype(float)
    stripes = stripes.T if axis else stripes
    mask, depth = predict(StandIn(), tensor(np.full((72, 72), 0.5)), tensor(stripes), size=24)
    assert (depth - 0.5).abs().max() < 0.1 and mask.sum() == 0
    assert predict(StandIn(), tensor(stripes), tensor(np.full((72, 72), 0.5)), size=24)[0].sum() == 0


def test_predictions_are_reduced_with_antialiasing():
    mask, depth = predict(Stripes(), *torch.rand(2, 1, 3, 8, 8), size=24)
    assert (depth[..., 1:-1] - 1 / 3).abs().max() < 0.05
    assert mask[..., 1:-1].sum() == mask[..., 1:-1].numel()  # the mean logit, 4/3 - 1, is object


def test_the_size_is_given_or_the_networks_or_192():
    model, pictures = StandIn(), torch.rand(2, 1, 3, 20, 30)
    seen = []
    for size, own in ((None, None), (None, 48), (32, 48), (192, 48)):
        if own:
            model.size = own
        mask, _ = predict(model, *pictures, size=size)
        assert mask.shape == (1, 1, 20, 30)
        seen.append(tuple(model.seen))
    assert seen == [(192, 192), (48, 48), (32, 32), (192, 192)]


def test_each_picture_of_a_batch_is_predicted_alone():
    bg, fg_bg = torch.rand(2, 3, 3, 20, 30, generator=torch.Generator().manual_seed(0))
    model = Restless()
    alone = [predict(model, bg[i : i + 1], fg_bg[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(predict(model, bg, fg_bg), tuple(map(torch.cat, zip(*alone, strict=True))))


def test_a_network_left_in_training_predicts_as_in_evaluation():
    """Without dropout, without touching the running statistics, and without a graph that holds memory."""
    torch.manual_seed(0)
    model, pictures = Restless(), torch.rand(2, 2, 3, 20, 30)
    expected = predict(model.eval(), *pictures)
    before = {name: values.clone() for name, values in model.state_dict().items()}
    found = predict(model.train(), *pictures)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
    assert not any(output.requires_grad for output in found)


def test_a_size_the_network_cannot_take_is_refused():
    with pytest.raises(ValueError, match=r"50 x 50 pixels do not divide by 16\. Use 48 x 48"):
        predict(MODELS["resunet"](), *torch.rand(2, 1, 3, 50, 50), size=50)


class FromLeftToRight(torch.nn.Module):
    """Mask logits from -1 to 1 and depth from 0 to 1, whatever it is shown."""

    size = 32

    def forward(self, bg, fg_bg):
        rising = torch.linspace(0, 1, fg_bg.shape[3]).expand_as(fg_bg[:, :1])
        return 2 * rising - 1, rising


def test_what_a_network_says_of_a_picture_and_of_its_mirror_image_is_averaged():
    mask_logits, depth = helpers.Mirrored(FromLeftToRight())(*torch.rand(2, 3, 3, 16, 24))
    torch.testing.assert_close(mask_logits, torch.zeros(3, 1, 16, 24))
    torch.testing.assert_close(depth, torch.full((3, 1, 16, 24), 0.5))
    assert helpers.Mirrored(FromLeftToRight()).size == 32 and helpers.Mirrored(MODELS["stand_in"]()).size == 192


def test_a_mirrored_picture_gets_the_mirrored_answer():
    torch.manual_seed(0)
    pictures = torch.rand(2, 2, 3, 32, 48)
    plain = MODELS["difference_unet"]().eval()
    for model, same in ((helpers.Mirrored(plain), True), (plain, False)):
        answers, of_mirrored = model(*pictures), model(*pictures.flip(4))
        for one, other in zip(answers, of_mirrored, strict=True):
            assert torch.allclose(one, other.flip(3), atol=1e-5) == same


# load_model


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_network_is_recognised_by_its_tensors(tmp_path, name, half):
    torch.manual_seed(0)
    saved = MODELS[name]()
    saved = (saved.half() if half else saved).state_dict()
    torch.save(saved, tmp_path / "any name")
    model = load_model(str(tmp_path / "any name"))
    assert type(model) is type(MODELS[name]()) and (model.name, model.size) == (name, 192)
    assert not any(module.training for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.device.type for p in model.parameters()} == {helpers.DEVICE.type}
    assert model.state_dict().keys() == saved.keys()
    assert all(torch.equal(values.cpu(), saved[key].to(values.dtype)) for key, values in model.state_dict().items())


@pytest.mark.parametrize("by", ["folder", "best.pt"])
def test_a_runs_network_has_the_size_of_its_config(tmp_path, by):
    Config("a", model="dual_stream", size=48).save(tmp_path / "config.json")
    settings = json.loads((tmp_path / "config.json").read_text()) | {"fingerprint": "01234567"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    saved = MODELS["dual_stream"]().state_dict()
    torch.save(saved, tmp_path / "best.pt")
    model = load_model(tmp_path if by == "folder" else tmp_path / "best.pt")
    assert (model.name, model.size) == ("dual_stream", 48)
    torch.testing.assert_close(dict(model.state_dict()), dict(saved))


@pytest.mark.parametrize("name", ["nothing.pt", "folder"])
def test_weights_that_are_not_there(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match=name):
        load_model(tmp_path / name)


def zip_bytes(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"not a pickle")


def cut_off(path):
    torch.save(StandIn().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-200])


NO_WEIGHTS = {
    "empty": lambda path: path.write_bytes(b""),
    **{
        text[:5]: lambda path, text=text: path.write_text(text) for text in ("weights", "epoch,lr\n1,2\n", "hello", "}a", "[1]")
    },
    "binary": lambda path: path.write_bytes(bytes(range(256)) * 4),
    "picture": lambda path: Image.new("RGB", (30, 20)).save(path, "PNG"),
    "animation": lambda path: Image.new("RGB", (30, 20)).save(path, "GIF"),
    "zip": zip_bytes,
    "cut off": cut_off,
    "pickle": lambda path: path.write_bytes(pickle.dumps({"slope": [1.0]}, 2)),
    "list": lambda path: torch.save([torch.zeros(2)], path),
    "tensor": lambda path: torch.save(torch.zeros(1, 2, 3), path),
    "numbers": lambda path: torch.save({"slope": 1.0}, path),
    "a whole network": lambda path: torch.save(StandIn(), path),
    "nested": lambda path: torch.save({"model": StandIn().state_dict()}, path),
}
OTHER_WEIGHTS = {
    "none": {},
    "another shape": {"slope": torch.zeros(1, 2, 4)},
    "another name": {"slopes": torch.zeros(1, 2, 3)},
    "one more": {"slope": torch.zeros(1, 2, 3), "more": torch.zeros(1)},
}


@pytest.mark.parametrize(
    "write, about",
    [
        *((write, "") for write in NO_WEIGHTS.values()),
        *((lambda path, state=state: torch.save(state, path), "resunet, ") for state in OTHER_WEIGHTS.values()),
    ],
    ids=[*NO_WEIGHTS, *OTHER_WEIGHTS],
)
def test_a_file_without_the_weights_of_a_known_network_is_refused_in_a_sentence(tmp_path, write, about):
    write(tmp_path / "mine.pt")
    with pytest.raises(ValueError, match=f"mine.pt.*{about}") as caught:
        load_model(tmp_path / "mine.pt")
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


class Harm:
    """Makes a folder once it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize(
    "make", [torch.save, lambda one, path: path.write_bytes(pickle.dumps(one, 2))], ids=["torch", "pickle"]
)
@pytest.mark.parametrize("inside", [lambda harm: harm, lambda harm: {"slope": harm}], ids=["bare", "in a state dict"])
def test_a_file_that_would_run_code_does_not(tmp_path, make, inside):
    make(inside(Harm(tmp_path / "harm")), tmp_path / "mine.pt")
    with pytest.raises(ValueError, match=r"mine\.pt"):
        load_model(tmp_path / "mine.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.pt"]
    torch.load(tmp_path / "mine.pt", weights_only=False) if make is torch.save else pickle.loads(
        (tmp_path / "mine.pt").read_bytes()
    )
    assert (tmp_path / "harm").exists()  # so it would have


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """Stands in for the weights that come with the project, in half precision; gives the network."""
    torch.manual_seed(0)
    network = MODELS["difference_unet"]()
    save_weights(network, tmp_path / "assets.pt")
    monkeypatch.setattr(helpers, "WEIGHTS", tmp_path / "assets.pt")
    return network


def test_the_weights_that_come_with_the_project_are_taken_where_none_are_named(shipped, tmp_path, monkeypatch):
    torch.save(StandIn().state_dict(), tmp_path / "best.pt")
    monkeypatch.chdir(tmp_path)  # an empty name is not this folder's best.pt
    for model in (load_model(), load_model("")):
        assert model.name == "difference_unet" and model.size == 192
        for name, value in shipped.state_dict().items():
            found = model.state_dict()[name].cpu()
            assert found.dtype == value.dtype and np.array_equal(found, value.numpy().astype(np.float16))


def test_a_relative_path_starts_here_or_else_at_the_project(tmp_path, monkeypatch):
    here, project = tmp_path / "here", tmp_path / "project"
    for folder, seed in ((here, 1), (project, 2)):
        (folder / "weights").mkdir(parents=True)
        torch.manual_seed(seed)
        save_weights(MODELS["difference_unet"](), folder / "weights" / "mine.pt")
    monkeypatch.setattr(helpers, "ROOT", project)
    for place, whose in ((here, here), (tmp_path, project)):
        monkeypatch.chdir(place)
        found, expected = (load_model(path).state_dict() for path in ("weights/mine.pt", whose / "weights" / "mine.pt"))
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_weights_that_come_with_the_project_know_the_sample_far_better_than_no_network_does(sample):
    """So they are those of the network as it stands in MODELS."""
    assert helpers.WEIGHTS.stat().st_size < 3.5e6
    assert {value.dtype for value in torch.load(helpers.WEIGHTS).values()} == {torch.float16, torch.int64}
    model, ds = load_model(), ZipDataset(sample, 192)
    parts = split(ds)
    found, plain = (evaluate(one, ds, parts["test_new_both"]) for one in (model, baselines(ds, parts["train"])))
    assert found["iou"].mean() > 0.9 > 0.75 > plain["iou"].mean()
    assert found["rmse"].mean() < 0.12 < 0.2 < plain["rmse"].mean()


# save_weights


def test_weights_are_saved_in_half_precision_and_read_in_single(tmp_path):
    """Numbers that are no halves; numpy rounds them for comparison."""
    model = MODELS["dual_stream"]()
    for value in model.state_dict().values():
        value.copy_(1000 / 3 if value.is_floating_point() else 123_457)  # more batches than half precision could count
    model.state_dict()["bg_stream.1.running_var"].copy_(torch.linspace(0, 1e-6, 32))
    save_weights(model, str(tmp_path / "small.pt"))
    torch.save(model.state_dict(), tmp_path / "large.pt")
    assert (tmp_path / "small.pt").stat().st_size < 0.52 * (tmp_path / "large.pt").stat().st_size
    stored, read = torch.load(tmp_path / "small.pt"), load_model(tmp_path / "small.pt").state_dict()
    assert stored.keys() == read.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        halved = value.numpy().astype(np.float16) if value.is_floating_point() else value.numpy()
        assert stored[name].numpy().dtype == halved.dtype and np.array_equal(stored[name], halved)
        assert read[name].dtype == value.dtype and np.array_equal(read[name].cpu(), halved)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32, torch.int64}  # the network is as it was


@pytest.mark.parametrize("value", [65_520, -1e6, float("inf"), float("nan")])
def test_numbers_that_half_precision_cannot_hold_are_refused(tmp_path, value):
    model = Restless()
    model.layers[1].running_var[1] = value
    with pytest.raises(ValueError, match=r"layers\.1\.running_var holds numbers beyond 65504, .* Use torch\.save instead\."):
        save_weights(model, tmp_path / "mine.pt")
    assert not list(tmp_path.iterdir())
    model.layers[1].running_var[1] = 65_519  # rounds to 65504
    save_weights(model, tmp_path / "mine.pt")


# predict_images


def photo(grey, mode="RGB"):
    return Image.fromarray((255 * grey).round().astype(np.uint8)).convert(mode)


def write_scene(folder, height, width, extension=".png", mode="RGB", **options):
    """The two photos in a folder: their paths, the grey of the second and the object, as arrays."""
    bg, fg_bg, mask = scene(height, width)
    options |= {"quality": 97} if extension in (".jpg", ".JPEG", ".webp") else {}
    paths = [folder / f"{name}{extension}" for name in ("empty room", "a.cat")]
    for grey, path in zip((bg, fg_bg), paths, strict=True):
        photo(grey, mode).save(path, **options)
    return *paths, 255 * fg_bg, mask


def read(prediction):
    pictures = [Image.open(file) for file in prediction[:2]]
    assert all((picture.mode, picture.format) == ("L", "PNG") for picture in pictures)
    return [np.array(picture).astype(int) for picture in pictures]


FORMATS = [
    *(("RGB", extension) for extension in (".png", ".jpg", ".bmp", ".webp", ".tif", ".JPEG")),
    *(("L", extension) for extension in (".png", ".jpg")),
    *(("P", extension) for extension in (".png", ".gif")),
    *(("CMYK", extension) for extension in (".jpg", ".tif")),
    ("RGBA", ".png"),
    ("LA", ".png"),
]


@pytest.mark.parametrize("mode, extension", FORMATS)
def test_photos_of_any_format_give_the_right_mask_and_depth_at_every_pixel(weights, tmp_path, mode, extension):
    bg, image, grey, truth = write_scene(tmp_path, 192, 192, extension, mode)
    assert Image.open(image).mode == mode
    prediction = predict_images(weights, bg, str(image))
    assert prediction[:2] == (tmp_path / "a.cat_mask.png", tmp_path / "a.cat_depth.png")
    mask, depth = read(prediction)
    assert np.array_equal(mask, 255 * truth)
    lossless = extension in (".png", ".bmp", ".gif") or (mode, extension) == ("RGB", ".tif")
    np.testing.assert_allclose(depth, grey, atol=0.51 if lossless else 8)


@pytest.mark.parametrize("height, width", [(5, 7), (31, 77), (300, 250)])
def test_files_have_the_size_of_the_image(weights, tmp_path, height, width):
    bg, image, *_ = write_scene(tmp_path, height, width)
    mask, depth = read(predict_images(weights, bg, image))
    assert mask.shape == depth.shape == (height, width)
    expected = predict(StandIn(), *(tensor(np.array(Image.open(path).convert("L")) / 255) for path in (bg, image)))
    assert np.array_equal(mask, 255 * expected[0][0, 0].numpy())
    np.testing.assert_allclose(depth, 255 * expected[1][0, 0].numpy(), atol=0.51)


def test_without_weights_those_of_the_project_predict(shipped, tmp_path):
    bg, image, *_ = write_scene(tmp_path, 64, 48)
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    found, expected = (predict_images(weights, bg, image, tmp_path / to) for weights, to in (("", "a"), (helpers.WEIGHTS, "b")))
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_far_is_white(weights, tmp_path):
    for name, level in (("bg", 0.5), ("far", 1.0), ("near", 0.0)):
        photo(np.full((20, 30), level)).save(tmp_path / f"{name}.png")
    depths = [read(predict_images(weights, tmp_path / "bg.png", tmp_path / f"{name}.png"))[1] for name in ("far", "near")]
    assert [set(depth.flat) for depth in depths] == [{255}, {0}]


# How a picture is stored so that, turned as its EXIF orientation says, it stands upright.
ORIENTATIONS = {
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.rot90(upright, 2).T,
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize(
    "turned, extension, orientation",
    [*(("image", ".jpg", orientation) for orientation in ORIENTATIONS), ("bg", ".png", 6), ("bg", ".jpg", 8)],
)
def test_a_photo_stands_as_its_camera_noted(weights, tmp_path, turned, extension, orientation):
    bg, image, grey, truth = write_scene(tmp_path, 90, 60, extension)
    exif = Image.Exif()
    exif[0x0112] = orientation
    level = scene(90, 60)[1 if turned == "image" else 0]
    stored = photo(ORIENTATIONS[orientation](level).copy())
    stored.save(image if turned == "image" else bg, exif=exif, quality=97)
    mask, depth = read(predict_images(weights, bg, image))
    assert np.array_equal(mask, 255 * truth)
    inside = ~near_border(truth, 1)
    np.testing.assert_allclose(depth[inside], grey[inside], atol=6)


@pytest.mark.parametrize("folder", [None, "new/folder"])
def test_files_go_beside_the_image_or_to_the_folder_that_is_given(weights, tmp_path, folder):
    (tmp_path / "rooms").mkdir()
    bg, image, *_ = write_scene(tmp_path, 20, 30)
    bg = bg.rename(tmp_path / "rooms" / bg.name)
    before = set(tmp_path.rglob("*"))
    prediction = predict_images(weights, bg, image, folder and str(tmp_path / folder))
    there = tmp_path / folder if folder else tmp_path
    assert prediction[:2] == (there / "a.cat_mask.png", there / "a.cat_depth.png")
    assert {path for path in {*tmp_path.rglob("*")} - before if path.is_file()} == {prediction.mask_file, prediction.depth_file}


def test_the_size_at_which_the_network_was_trained_is_used(tmp_path):
    """At 11 pixels a thin line of the object is lost; at 192 it is seen."""
    for name, size in (("coarse", 11), ("fine", 192)):
        (tmp_path / name).mkdir()
        Config("a", model="stand_in", size=size).save(tmp_path / name / "config.json")
        torch.save(StandIn().state_dict(), tmp_path / name / "best.pt")
    level = np.full((192, 192), 0.2)
    photo(level).save(tmp_path / "bg.png")
    level[:, 90:93] = 0.6
    photo(level).save(tmp_path / "line.png")
    masks = [
        read(predict_images(tmp_path / name, tmp_path / "bg.png", tmp_path / "line.png"))[0] for name in ("coarse", "fine")
    ]
    assert masks[0].sum() == 0 and np.array_equal(masks[1] > 0, level > 0.5)


def test_the_figure_shows_the_two_photos_and_the_two_predictions(weights, tmp_path):
    bg, image, _, truth = write_scene(tmp_path, 192, 96)
    prediction = predict_images(weights, bg, image)
    assert isinstance(prediction, Prediction) and Prediction._fields == ("mask_file", "depth_file", "figure")
    assert isinstance(prediction.figure, plt.Figure)
    shown = [axes.images[0] for axes in prediction.figure.axes if axes.images]
    shown = [np.asarray(one.get_array(), float) for one in shown[:4]]
    assert [one.shape for one in shown] == [(192, 96, 3), (192, 96, 3), (192, 96), (192, 96)]
    photos = [np.array(Image.open(path)) for path in (bg, image)]
    for one, level in zip(shown[:2], photos, strict=True):
        np.testing.assert_allclose(one / one.max(), level / level.max(), atol=0.01)
    assert np.array_equal(shown[2] > 0, truth)
    depth = read(prediction)[1]
    np.testing.assert_allclose(shown[3] / shown[3].max(), depth / depth.max(), atol=0.01)
    titles = [axes.get_title() for axes in prediction.figure.axes[:4]]
    assert len(set(titles)) == 4 and all(titles)
    prediction.figure.canvas.draw()


@pytest.mark.parametrize("bg_size", [(101, 100), (100, 101), (200, 202), (50, 50)])
def test_photos_of_nearly_one_shape_are_taken(weights, tmp_path, bg_size):
    for name, size in (("bg", bg_size), ("image", (100, 100))):
        photo(ramp(*size)).save(tmp_path / f"{name}.png")
    mask = read(predict_images(weights, tmp_path / "bg.png", tmp_path / "image.png"))[0]
    assert mask.shape == (100, 100) and mask.sum() == 0


@pytest.mark.parametrize("bg_size", [(103, 100), (100, 103), (5, 7)])
@pytest.mark.parametrize("swapped", [False, True])
def test_photos_of_unlike_shapes_are_refused_with_both_sizes(weights, tmp_path, bg_size, swapped):
    sizes = [bg_size, (100, 100)][:: -1 if swapped else 1]
    for name, size in zip(("bg", "image"), sizes, strict=True):
        photo(ramp(*size)).save(tmp_path / f"{name}.png")
    with pytest.raises(ValueError) as caught:
        predict_images(weights, tmp_path / "bg.png", tmp_path / "image.png")
    for name, (height, width) in zip(("bg", "image"), sizes, strict=True):
        assert f"{tmp_path / name}.png" in str(caught.value) and f"{width} x {height}" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bg.png", "image.png", "stand_in.pt"]


def truncated(path, extension, keep):
    photo(ramp(90, 60)).save(path, extension)
    path.write_bytes(path.read_bytes()[:keep])


def boundless(path):
    """A header that promises more pixels than fit into memory."""
    photo(ramp(9, 6)).save(path, "BMP")
    content = path.read_bytes()
    path.write_bytes(content[:18] + 2 * (100_000).to_bytes(4, "little") + content[26:])


UNREADABLE = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("a photo"),
    "weights": lambda path: torch.save(StandIn().state_dict(), path),
    "jpeg cut off": lambda path: truncated(path, "JPEG", -300),
    "png cut off": lambda path: truncated(path, "PNG", -300),
    "png cut off early": lambda path: truncated(path, "PNG", 40),
    "webp cut off": lambda path: truncated(path, "WEBP", 60),
    **({"avif cut off": lambda path: truncated(path, "AVIF", -100)} if features.check("avif") else {}),
    "boundless": boundless,
    "16 bits": lambda path: Image.fromarray(np.full((90, 60), 300, np.uint16)).save(path, "PNG"),  # Pillow makes them white
    "folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("which", ["bg", "image"])
@pytest.mark.parametrize("spoil", UNREADABLE.values(), ids=UNREADABLE)
def test_a_picture_that_cannot_be_read_is_named(weights, tmp_path, spoil, which):
    photos = {name: tmp_path / f"{name}.png" for name in ("bg", "image")}
    for path in photos.values():
        photo(ramp(90, 60)).save(path)
    photos[which].unlink()
    spoil(photos[which])
    with pytest.raises(ValueError, match=rf"{which}\.png") as caught:
        predict_images(weights, *photos.values())
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*_mask.png"))


@pytest.mark.parametrize("which", ["bg", "image", "weights"])
def test_a_file_that_is_not_there_is_named(weights, tmp_path, which):
    bg, image, *_ = write_scene(tmp_path, 20, 30)
    files = {"weights": weights, "bg": bg, "image": image}
    files[which] = tmp_path / "nowhere.png"
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        predict_images(*files.values())
