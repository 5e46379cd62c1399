"""Prediction: weights from files, photos of any size and format; with a network whose answer is known."""

import os
import tempfile
from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image
from test_notebooks import NOTEBOOKS, defined
from torch import nn

import helpers
from helpers import MODELS, Config, align_background, load_model, predict, predict_images

GOOD = torch.full((1, 3, 20, 30), 0.5)


class StandIn(nn.Module):
    """The object is where the pictures differ by more than a tenth, depth is how bright the second is."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.full((1, 2, 3), 10.0))  # of a shape that no other network has

    def forward(self, bg, fg_bg):
        self.seen = tuple(fg_bg.shape[2:])
        return self.slope.mean() * ((fg_bg - bg).abs().amax(1, True) - 0.1), fg_bg.mean(1, keepdim=True)


def ramp(height, width):
    """Grey that grows from .2 at the top left to .6 at the bottom right, whatever the size: float (H, W)."""
    y, x = np.mgrid[:height, :width] + 0.5
    return 0.2 + 0.2 * y / height + 0.2 * x / width


def scene(height, width):
    """A ramp, the same with a rectangle in it that is brighter by .3, and that rectangle: arrays (H, W)."""
    mask = np.zeros((height, width), bool)
    mask[height // 5 : 1 + height * 3 // 5, width // 4 : 1 + width // 2] = True
    return ramp(height, width), ramp(height, width) + 0.3 * mask, mask


def tensor(grey):
    return torch.from_numpy(grey).float().expand(1, 3, -1, -1)


@pytest.mark.parametrize("height,width", [(192, 192), (31, 77), (190, 33), (300, 250), (200, 640), (60, 900)])
def test_mask_and_depth_of_any_size_are_right(height, width):
    bg, fg_bg, truth = scene(height, width)
    for background in (bg, ramp(height * 2, width * 2)):
        mask, depth = predict(StandIn(), tensor(background), tensor(fg_bg).expand(2, -1, -1, -1))
        assert np.array_equal(mask.cpu(), [truth[None]] * 2)  # outlines too, of what is seen less finely
        assert depth.shape == mask.shape and np.abs(depth[1, 0].cpu().numpy() - fg_bg).mean() < 0.015


def test_pictures_are_reduced_with_antialiasing():
    stripes = np.tile([0.0, 1.0], (72, 36)).T.copy()  # of a pixel: every third of them would be stripes again
    mask, depth = predict(StandIn(), tensor(np.full((72, 72), 0.5)), tensor(stripes), size=24)
    assert (depth - 0.5).abs().max() < 0.1 and mask.sum() == 0


def test_the_size_is_given_or_the_networks_or_192_and_one_that_fits():
    model = StandIn()
    for own, size, seen in ((None, None, 192), (48, None, 48), (48, 32, 32)):
        model.__dict__ |= {"size": own} if own else {}
        assert predict(model, GOOD, GOOD, size=size) and model.seen == (seen, seen)
    with pytest.raises(ValueError, match=r"50 x 50 pixels do not divide by 16\. Use 48 x 48"):
        predict(MODELS["resunet"](), GOOD, GOOD, size=50)


@pytest.mark.parametrize("size", [32, 64, 192])
def test_a_quarter_of_the_depth_is_what_a_network_sees_at_64_pixels_unless_not_refined(monkeypatch, size):
    def both(self, bg, fg_bg):
        return fg_bg[:, :1] - 0.5, torch.full_like(bg[:, :1], bg.shape[2] / 384).logit()

    monkeypatch.setattr(helpers.PairNetwork, "both", both, raising=False)
    _, fg_bg, _ = map(tensor, scene(20, 30))
    for refine, expected in ((True, 0.75 * size + 0.25 * min(size, 64)), (False, float(size))):
        mask, depth = predict(helpers.PairNetwork(), GOOD, fg_bg, size, refine)
        torch.testing.assert_close(384 * depth, torch.full((1, 1, 20, 30), expected))
    seen = TF.resize(TF.resize(fg_bg[:, :1], [size, size]).sub(0.5).sigmoid(), [20, 30])
    assert torch.equal(mask, (seen > 0.5).float()) and 0.1 < mask.mean() < 0.9  # of the network alone


def test_bytes_and_single_pictures_give_what_float_batches_give():
    pictures = torch.randint(0, 256, (2, 3, 20, 30), dtype=torch.uint8)
    expected = predict(StandIn(), *(p[None].float() / 255 for p in pictures))
    for some in (pictures, pictures[:, None], pictures.float() / 255, pictures[:, None].double() / 255):
        torch.testing.assert_close(predict(StandIn(), *some), expected)


def test_a_network_left_in_training_predicts_each_picture_alone_and_changes_nothing():
    model, pictures = MODELS["difference_unet"](), torch.rand(2, 3, 3, 20, 30)
    before = {name: values.clone() for name, values in model.state_dict().items()}
    found, *alone = (predict(model.train(), *some, size=32) for some in (pictures, *pictures.split(1, 1)))
    torch.testing.assert_close(found, tuple(map(torch.cat, zip(*alone, strict=True))))
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert not any(output.requires_grad for output in found)  # nor holds memory


@pytest.mark.parametrize("bad", [255 * GOOD, -GOOD, GOOD * torch.nan, GOOD[:, :1], GOOD.mT[:, 0], GOOD[None]])
def test_other_pictures_are_refused_in_a_sentence(bad):
    for pictures in ((bad, GOOD), (GOOD, bad)):
        with pytest.raises(ValueError, match=r"\(N, 3, H, W\), uint8 or float in \[0, 1\].*\.$"):
            predict(StandIn(), *pictures)


@pytest.mark.parametrize("name", MODELS)
def test_a_network_is_recognised_by_its_tensors_of_single_or_half_precision(tmp_path, name):
    for saved in (MODELS[name]().state_dict(), MODELS[name]().half().state_dict()):
        torch.save(saved, tmp_path / "any name")
        model = load_model(str(tmp_path / "any name"))
        assert (model.name, model.size, model.tasks, model.training) == (name, 192, ("mask", "depth"), False)
        found, expected = model.cpu().state_dict(), MODELS[name]().float()
        expected.load_state_dict(saved)
        torch.testing.assert_close(dict(found), dict(expected.state_dict()), rtol=0, atol=0)


def write_run(folder, monkeypatch, **settings):
    monkeypatch.setitem(MODELS, "stand_in", StandIn)
    folder.mkdir()
    Config("a", **{"model": "stand_in"} | settings).save(folder / "config.json")
    torch.save(StandIn().state_dict(), folder / "best.pt")
    return folder


def test_what_is_not_there_or_of_another_network_is_named(tmp_path, monkeypatch):
    (bg, image), nothing = write_scene(tmp_path), tmp_path / "nothing"
    for files in ((nothing, bg, image), (StandIn(), nothing, image), (StandIn(), bg, nothing)):
        with pytest.raises(FileNotFoundError, match="nothing: there is no such file"):
            predict_images(*files)
    with pytest.raises(ValueError, match=r"best\.pt holds no weights of dual_stream"):
        load_model(write_run(tmp_path / "run", monkeypatch, model="dual_stream"))


class Harm:
    def __reduce__(self):  # what unpickling does
        return os.mkdir, ("harm",)


NO_WEIGHTS = {
    "empty": lambda path: path.write_bytes(b""),
    "cut off": lambda path: (torch.save(StandIn().state_dict(), path), os.truncate(path, 500)),
    "code": lambda path: torch.save({"slope": Harm()}, path),
    "a list": lambda path: torch.save([torch.zeros(2)], path),
    "another shape": lambda path: torch.save({"slope": torch.zeros(1, 2, 4)}, path),
}


@pytest.mark.parametrize("write", NO_WEIGHTS.values(), ids=NO_WEIGHTS)
def test_a_file_that_holds_no_weights_is_refused_and_no_code_in_it_runs(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine.pt")
    with pytest.raises(ValueError, match=r"mine\.pt .*\.$"):
        load_model("mine.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.pt"]


def save(path, grey, mode="RGB", **options):
    Image.fromarray((255 * grey).round().astype(np.uint8)).convert(mode).save(path, **options)


def write_scene(folder, height=40, width=60, extension=".png", mode="RGB", **options):
    paths = folder / f"room{extension}", folder / f"a.chair{extension}"
    for grey, path in zip(scene(height, width), paths, strict=False):
        save(path, grey, mode, **options)
    return paths


def read(prediction):
    return [np.array(Image.open(file)).astype(int) for file in prediction[:2]]


@pytest.mark.parametrize("of", ["png RGB L P RGBA LA", "jpg RGB L CMYK", "webp RGB", "gif P", "tif CMYK"])
def test_photos_of_any_format_give_the_right_files(tmp_path, monkeypatch, of):
    monkeypatch.setenv("HOME", str(tmp_path))
    extension, *modes = of.split()
    for mode in modes:
        bg, image = write_scene(tmp_path, 192, 192, f".{extension}", mode, quality=97)
        prediction = predict_images(StandIn(), bg, f"~/{image.name}", overwrite=mode != modes[0])
        assert prediction[:2] == (tmp_path / "a.chair_mask.png", tmp_path / "a.chair_depth.png")
        mask, depth = read(prediction)
        assert np.array_equal(mask, 255 * scene(192, 192)[2])
        np.testing.assert_allclose(depth, 255 * scene(192, 192)[1], atol=0.51 if extension == "png" else 8)


@pytest.mark.parametrize("orientation, turn", [(2, np.fliplr), (3, lambda p: p[::-1, ::-1]), (6, np.rot90)])
def test_a_photo_stands_as_its_camera_noted(tmp_path, orientation, turn):
    (bg, image), exif = write_scene(tmp_path, 90, 60, ".jpg", quality=97), Image.Exif()
    exif[0x0112] = orientation
    save(image, turn(scene(90, 60)[1]), exif=exif, quality=97)
    assert np.array_equal(read(predict_images(StandIn(), bg, image))[0], 255 * scene(90, 60)[2])


UNREADABLE = {
    "transparent": lambda path: Image.new("RGBA", (60, 40), (9, 9, 9, 254)).save(path),
    "8 bits": lambda path: Image.fromarray(np.full((40, 60), 300, np.uint16)).save(path),
    "none of": lambda path: path.write_text("a photo"),
    "truncated": lambda path: os.truncate(path, path.stat().st_size * 3 // 4),
    "5,000 pixels": lambda path: save(path, ramp(80, 120)),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_a_photo_that_cannot_be_used_is_named_in_a_sentence(tmp_path, monkeypatch, what):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000)
    for which in (0, 1):
        photos = write_scene(tmp_path)
        UNREADABLE[what](photos[which])
        with pytest.raises(ValueError, match=rf"{photos[which]} cannot be read.*{what}.*\.$"):
            predict_images(StandIn(), *photos)
        assert {*tmp_path.iterdir()} == {*photos}


def test_photos_of_unlike_shapes_are_refused_and_files_have_the_size_of_the_image(tmp_path):
    bg, image, new = tmp_path / "bg.png", tmp_path / "image.png", tmp_path / "new" / "folder"
    save(bg, ramp(100, 100))
    for height, width in ((101, 100), (202, 200)):
        save(image, ramp(height, width))
        prediction = predict_images(StandIn(), bg, image, new, overwrite=True)
        assert [picture.shape for picture in read(prediction)] == [(height, width)] * 2
    for height, width, align in ((103, 100, False), (100, 103, False), (5, 7, True)):
        save(image, ramp(height, width))
        with pytest.raises(ValueError, match=f"100 x 100 pixels .* {width} x {height}: not the same view"):
            predict_images(StandIn(), bg, image, align=align)


@pytest.mark.parametrize("kind", ["mask", "depth"])
def test_a_file_that_is_there_is_never_overwritten_unasked(tmp_path, kind):
    photos, there = write_scene(tmp_path), tmp_path / f"a.chair_{kind}.png"
    for write in (lambda: save(there, ramp(40, 60), "L"), lambda: there.write_text("notes")):
        write()
        before = {path: path.read_bytes() for path in (*photos, there)}
        with pytest.raises(FileExistsError, match=rf"a\.chair_{kind}\.png.*overwrite=True"):
            predict_images(StandIn(), *photos)
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert there in predict_images(StandIn(), *photos, overwrite=True) and there.read_bytes() != before[there]


def test_a_folder_that_cannot_be_written_is_said_in_a_sentence():
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as place:
        photos = write_scene(Path(place))
        os.chmod(place, 0o555)
        try:
            os.seteuid(user or 65534)  # no folder refuses user 0
            with pytest.raises(OSError, match=r"cannot be written .*Give another folder\.$"):
                predict_images(StandIn(), *photos)
        finally:
            os.seteuid(user)


@pytest.mark.parametrize("kind, other", [("mask", "depth"), ("depth", "mask")])
def test_the_network_of_one_task_writes_and_shows_no_other(tmp_path, monkeypatch, kind, other):
    run = write_run(tmp_path / "run", monkeypatch, size=48, **{f"{other}_loss": None})
    for model in map(load_model, (run, run / "best.pt")):
        assert (model.name, model.size, model.tasks) == ("stand_in", 48, (kind,))
    prediction = predict_images(run, *write_scene(tmp_path), tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == [f"a.chair_{kind}.png"]
    assert getattr(prediction, f"{other}_file") is None
    assert len([axis for axis in prediction.figure.axes if axis.get_title()]) == 3


def test_the_figure_shows_the_photos_and_the_predictions_and_none_stays_open(tmp_path):
    before = plt.get_fignums()
    for _ in range(30):
        prediction = predict_images(StandIn(), *write_scene(tmp_path), overwrite=True)
    files = [np.array(Image.open(path)) for path in (*write_scene(tmp_path), *prediction[:2])]
    titled = [axis for axis in prediction.figure.axes if axis.get_title()]
    for axis, picture in zip(titled, files, strict=True):
        shown = axis.images[0].get_array()
        np.testing.assert_allclose(shown * (255 if shown.max() <= 1 else 1), picture, atol=0.51)
    assert plt.get_fignums() == before


def place(height=300, width=400):
    """A photo with much to see at all scales: uint8 (H, W, 3)."""
    rng, picture = np.random.default_rng(0), np.zeros((height, width, 3))
    for cells in (4, 12, 40, 100):
        coarse = rng.uniform(-1, 1, (cells, cells, 3)).astype(np.float32)
        picture += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_NEAREST) / cells**0.3
    return (110 + 45 * picture).clip(0, 255).astype(np.uint8)


def with_object(photo):
    """The photo with a plain disk in it, and where that is."""
    height, width = photo.shape[:2]
    y, x = np.mgrid[:height, :width]
    disk = (y - 0.6 * height) ** 2 + (x - 0.4 * width) ** 2 < (0.2 * height) ** 2
    return np.where(disk[..., None], np.uint8([230, 40, 30]), photo), disk


def shot(photo, angle=0.0, shift=(0, 0), zoom=1.0):
    """The photo from a camera that is turned by degrees, moved by pixels, nearer."""
    picture = torch.from_numpy(photo).permute(2, 0, 1)
    moved = TF.affine(picture, angle, list(shift), zoom, [0.0, 0.0], TF.InterpolationMode.BILINEAR)
    return moved.permute(1, 2, 0).numpy()


PHOTO = place()
FG_BG, DISK = with_object(PHOTO)
MOVED = {"turned": {"angle": 3}, "both": {"angle": -2, "shift": (17, -11)}, "nearer": {"zoom": 1.06}}


@pytest.mark.parametrize("how", MOVED)
def test_a_moved_and_relit_background_is_brought_back(how):
    bg = (shot(PHOTO, **MOVED[how]) * np.array([0.6, 0.65, 0.7])).round().astype(np.uint8)
    aligned = align_background(bg, FG_BG)
    before, after = (np.abs(of.astype(int) - FG_BG)[~DISK].mean() for of in (bg, aligned))
    assert before > 30 and after < before / 6
    assert np.abs(aligned.astype(int) - FG_BG)[DISK].mean() > 40  # the object is not explained away


def test_a_background_that_fits_stays_as_it_is(monkeypatch):
    monkeypatch.setattr("cv2.BFMatcher.match", lambda *_: [])  # no corners are alike
    assert np.abs(align_background(PHOTO, FG_BG).astype(int) - PHOTO).max() <= 1
    plain = np.full((90, 120, 3), 90, np.uint8)  # no features, no texture
    assert (align_background(plain, with_object(plain)[0]) == plain).all()


def test_a_smaller_and_differently_cut_background_will_do():
    bg = np.asarray(Image.fromarray(PHOTO[6:, 14:]).resize((300, 230), Image.Resampling.LANCZOS))
    aligned = align_background(bg, FG_BG)
    assert aligned.shape == FG_BG.shape and np.abs(aligned.astype(int) - FG_BG)[~DISK].mean() < 12


def test_predict_images_aligns_unless_told_not_to(tmp_path):
    for name, picture in (("bg.png", shot(PHOTO, 2.5)), ("a.png", FG_BG)):
        Image.fromarray(picture).save(tmp_path / name)
    wrong = []
    for align in (True, False):
        photos = tmp_path / "bg.png", tmp_path / "a.png"
        found = predict_images(StandIn(), *photos, tmp_path / str(align), align=align)
        wrong.append(((read(found)[0] > 0) != DISK).mean())
    assert wrong[0] < 0.1 < wrong[1]


def scenes(folder, count=5):
    """A background, and a folder of photos in which a disk wanders: their paths, and the disks."""
    (folder / "photos").mkdir()
    photo, disks = place(120, 160), []
    Image.fromarray(photo).save(folder / "bg.png")
    for number in range(count):
        picture, disk = with_object(np.roll(photo, 8 * number, 1))
        disks.append(np.roll(disk, -8 * number, 1))
        Image.fromarray(np.roll(picture, -8 * number, 1)).save(folder / "photos" / f"{number}.png")
    return folder / "bg.png", folder / "photos", disks


def frames(path):
    return [frame for read, frame in iter(cv2.VideoCapture(str(path)).read, (False, None)) if read]


def predict_folder(*given, **options):
    wanted = "mask_and_depth", "pictures_of", "predict_folder"
    return defined(NOTEBOOKS["06_predict.ipynb"], *wanted, **vars(helpers))(*given, **options)


def test_a_folder_of_photos_gives_what_each_alone_gives_and_a_video(tmp_path):
    bg, photos, disks = scenes(tmp_path)
    film = predict_folder(StandIn(), bg, photos, tmp_path / "out")
    names = {f"{n}_{kind}.png" for n in range(5) for kind in ("mask", "depth")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"overlay.mp4"}
    for number, disk in enumerate(disks):
        alone = predict_images(StandIn(), bg, photos / f"{number}.png", tmp_path / "alone")
        for file in alone[:2]:
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
        assert ((read(alone)[0] > 0) != disk).mean() < 0.02
    shown = frames(film)
    assert len(shown) == 5 and shown[0].shape == (120, 160, 3)
    for frame, disk in zip(shown, disks, strict=True):
        assert frame[disk].mean(0)[2] > 150 > 100 > frame[disk].mean(0)[0]  # OpenCV's order: blue, green, red
    with pytest.raises(FileExistsError):
        predict_folder(StandIn(), bg, photos, tmp_path / "out")
    predict_folder(StandIn(), bg, photos, tmp_path / "out", overwrite=True)


def test_a_video_gives_a_mask_and_a_depth_for_each_frame(tmp_path):
    bg, photos, disks = scenes(tmp_path)
    video = cv2.VideoWriter(str(tmp_path / "film.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 10, (160, 120))
    for number in range(5):
        video.write(cv2.imread(str(photos / f"{number}.png")))
    video.release()
    assert len(frames(predict_folder(StandIn(), bg, tmp_path / "film.mp4", tmp_path / "out"))) == 5
    for number, disk in enumerate(disks, 1):
        mask = np.array(Image.open(tmp_path / "out" / f"frame_{number:06}_mask.png")) > 0
        assert (mask & disk).sum() / (mask | disk).sum() > 0.7


def test_what_is_no_folder_of_photos_and_no_video_is_said(tmp_path):
    bg, photos, _ = scenes(tmp_path)
    (tmp_path / "notes.mp4").write_text("notes")
    (tmp_path / "empty").mkdir()
    for source in ("notes.mp4", "empty"):
        with pytest.raises(ValueError, match=f"{source} holds no photo and is no video"):
            predict_folder(StandIn(), bg, tmp_path / source, tmp_path / f"out of {source}")
    (photos / "notes.txt").write_text("notes")
    with pytest.raises(ValueError, match=r"notes\.txt cannot be read as a picture"):
        predict_folder(StandIn(), bg, photos, tmp_path / "out")
    assert not (tmp_path / "out" / "overlay.mp4").exists()  # a film is whole or not there
    (photos / "0.bmp").write_bytes((photos / "0.png").read_bytes())
    with pytest.raises(ValueError, match="differ in the ending of their names alone"):
        predict_folder(StandIn(), bg, photos, tmp_path / "out", overwrite=True)
