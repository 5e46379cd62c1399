"""Chapter 10 of notebook 00: photos composed with cut-outs, a teacher's depth; the project's photographs."""

import zipfile

import numpy as np
import pytest
import torch
from conftest import encoded
from PIL import Image
from test_make_dataset import read

import helpers

SIZE, PHOTOGRAPHS = 64, helpers.ROOT / "assets" / "photos"
HIDDEN = (255, 0, 255)  # what the cut-outs hold where they are transparent: it must not show


@pytest.fixture(scope="module")
def nb():
    return helpers._drawing()


def brightness(pictures):
    """A teacher that can be checked: depth from what the picture shows, on a scale of its own."""
    assert pictures.dtype == torch.uint8 and pictures.shape[1:] == (3, SIZE, SIZE)
    return pictures.sum(1) * 3 - 100


def scene(seed, width, height):
    """A smooth grey picture, darker than the cut-outs, so that JPEG changes it little."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    grey = 60 + 30 * np.sin(4 * x + seed) + 20 * np.cos(5 * y)
    return Image.fromarray(np.repeat(grey[..., None], 3, 2).astype(np.uint8))


def cutout(width, height, rim=3):
    """A soft, lopsided blob, brighter to its right, with an empty rim: RGBA."""
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    alpha = np.clip((1 - (x + 0.3 * y) ** 2 - (y + 0.2 * x * x) ** 2) * 4, 0, 1)
    rgba = np.zeros((height + 2 * rim, width + 2 * rim, 4))
    rgba[rim:-rim, rim:-rim, 3] = alpha * 255
    rgba[..., :3] = 190 + 50 * np.linspace(-1, 1, width + 2 * rim)[:, None]
    rgba[rgba[..., 3] == 0, :3] = HIDDEN
    return Image.fromarray(rgba.astype(np.uint8))


@pytest.fixture
def photos(tmp_path):
    """Two folders, with litter of two systems: two backgrounds; a wide, a tall and a large cut-out."""
    for folder in ("bg", "fg"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / ".DS_Store").write_bytes(b"\0")
        (tmp_path / folder / "Thumbs.db").write_bytes(b"\0")
    scene(0, SIZE, SIZE).save(tmp_path / "bg" / "a.png")
    scene(1, 150, 100).save(tmp_path / "bg" / "b.JPG", quality=95)
    cutout(60, 30).save(tmp_path / "fg" / "1.png")
    cutout(40, 58).save(tmp_path / "fg" / "2.webp", lossless=True, exact=True)
    cutout(300, 400).save(tmp_path / "fg" / "3.png")
    return tmp_path


def compose(nb, folder, name="photos.zip", **changes):
    options = {"places": 2, "size": SIZE, "seed": 5, "scale": (0.5, 0.5), "teacher": brightness} | changes
    return folder / name, nb.compose_photos(folder / "bg", folder / "fg", folder / name, **options)


def shrunk(picture, longer):
    """An RGBA picture's visible part made smaller: colour times alpha (h, w, 3), and alpha (h, w)."""
    rgba = np.array(picture, np.float32)
    rows, columns = (np.flatnonzero(rgba[..., 3].any(axis)) for axis in (1, 0))
    rgba = rgba[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    sides = [round(side * longer / max(rgba.shape[:2])) for side in rgba.shape[1::-1]]
    rgba[..., :3] *= rgba[..., 3:] / 255
    channels = [Image.fromarray(np.ascontiguousarray(channel)) for channel in rgba.transpose(2, 0, 1)]
    channels = [np.array(channel.resize(sides, Image.Resampling.BILINEAR)) for channel in channels]
    return np.stack(channels[:3], -1), channels[3]


def corner(mask):
    return np.flatnonzero(mask.any(1))[0], np.flatnonzero(mask.any(0))[0]


def test_same_seed_same_bytes_whatever_the_batches(nb, photos):
    changes = {}, {"batch_size": 5}, {"seed": 6}
    one, two, other = (compose(nb, photos, **change)[0].read_bytes() for change in changes)
    assert one == two != other


def test_it_opens_as_a_data_set_in_which_pictures_differ_only_at_the_object(nb, photos):
    ds = helpers.ZipDataset(compose(nb, photos, objects_per_background=2)[0], SIZE)
    assert ds.layout == "modest" and len(ds) == 2 * 2 * 2 * 2
    assert np.bincount(ds.bg_id).tolist() == [0, 8, 8] and sorted(np.bincount(ds.fg_id)) == [0, 4, 4, 8]
    for item in ds:
        difference = (item["fg_bg"] - item["bg"]).abs()
        inside = item["mask"].bool().expand(3, -1, -1)
        assert difference[inside].mean() > 0.3 and difference[~inside].mean() < 0.02
        assert item["depth"].min() == 0 and item["depth"].max() == 1


@pytest.mark.parametrize("number, name, tolerance", [(1, "1.png", 2), (2, "2.webp", 2), (3, "3.png", 12)])
def test_an_object_and_its_mirror_image_blend_in_at_the_same_place(nb, photos, number, name, tolerance):
    """The third is first brought to twice the size, in memory: its edge may differ a little."""
    background = np.asarray(scene(0, SIZE, SIZE), np.float32)  # bg001 has the right size already
    colour, alpha = shrunk(Image.open(photos / "fg" / name), SIZE // 2)
    path, _ = compose(nb, photos)
    places = set()
    with zipfile.ZipFile(path) as archive:
        assert np.abs(read(archive, "bg/bg001.jpeg") - background).max() < 6
        for place in (1, 2):
            where = None
            for n, c, a in ((place, colour, alpha), (place + 2, colour[:, ::-1], alpha[:, ::-1])):
                sample = f"bg001_fg{number:03d}_{n:02d}"
                mask = read(archive, f"bg_fg_mask/{sample}_mask.png")
                picture = read(archive, f"bg_fg/{sample}.jpeg")
                where = tuple(np.array(corner(mask)) - corner(a > 127.5)) if where is None else where
                box = tuple(slice(start, start + side) for start, side in zip(where, a.shape, strict=True))
                assert ((mask[box] > 0) == (a > 127.5))[np.abs(a - 127.5) > tolerance].all()
                assert mask.sum() == mask[box].sum()
                expected = background.copy()
                expected[box] = expected[box] * (1 - a[..., None] / 255) + c
                assert np.abs(picture - expected).max() < 12 + tolerance
                assert np.abs(picture - expected).mean() < 1.5
            places.add(where)
    assert len(places) == 2


@pytest.mark.parametrize("share", [0.3, 0.6, 1.0])
def test_every_object_is_wholly_inside_and_anywhere(nb, photos, share):
    thing, background = nb.open_cutout(photos / "fg" / "1.png", 20, SIZE), scene(0, SIZE, SIZE)
    _, alpha = shrunk(Image.open(photos / "fg" / "1.png"), round(share * SIZE))
    corners = []
    for seed in range(200):
        (_, mask), (_, mirrored) = nb.paste_pair(background, thing, (share,) * 2, np.random.default_rng(seed))
        assert mask.sum() == mirrored.sum() == pytest.approx((alpha > 127.5).sum(), abs=2)
        corners.append(np.array(corner(mask)) - corner(alpha > 127.5))
    assert (np.min(corners, 0) == 0).all() and (np.max(corners, 0) == SIZE - np.array(alpha.shape)).all()


def test_backgrounds_are_cropped_in_the_middle_and_turned_as_the_camera_says(nb, tmp_path):
    stripes = np.zeros((100, 200, 3), np.uint8)
    stripes[:, :50] = stripes[:, 150:] = (255, 0, 0)
    stripes[:50, 50:150] = (0, 0, 255)  # the middle square: blue above, black below
    Image.fromarray(stripes).save(tmp_path / "wide.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown after a quarter turn clockwise
    Image.fromarray(stripes).save(tmp_path / "turned.jpg", quality=95, exif=exif)
    upright = np.asarray(nb.open_background(tmp_path / "wide.png", 50))
    turned = np.asarray(nb.open_background(tmp_path / "turned.jpg", 50))
    assert upright.shape == turned.shape == (50, 50, 3)
    inner = slice(3, -3)  # the red next to the square is averaged into its rim
    assert (upright[3:22, inner] == (0, 0, 255)).all() and (upright[28:-3, inner] == 0).all()
    assert (np.abs(turned[inner, 28:-3] - np.array((0, 0, 255))) < 20).all()
    assert (turned[inner, 3:22] < 20).all()


def test_a_cutout_is_turned_as_the_camera_says(nb, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    cutout(40, 20).save(tmp_path / "turned.png", exif=exif)
    cutout(40, 20).transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    turned, upright = (nb.open_cutout(tmp_path / f"{name}.png", 20, 64) for name in ("turned", "upright"))
    np.testing.assert_array_equal(np.asarray(turned), np.asarray(upright))


def test_depth_is_the_teachers_stretched_to_8_bit(nb, photos):
    seen = []

    def teacher(pictures):
        seen.append(pictures)
        return brightness(pictures).numpy()  # an array will do as well

    path, count = compose(nb, photos, teacher=teacher)
    assert [len(batch) for batch in seen] == [16, 8]
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.startswith("bg_fg/")]
        assert len(names) == count
        for name, picture in zip(names, torch.cat(seen).numpy(), strict=True):
            assert np.abs(read(archive, name) - picture.transpose(1, 2, 0).astype(int)).mean() < 2
            guess = picture.astype(float).sum(0)
            expected = np.round(255 * (guess - guess.min()) / (guess.max() - guess.min()))
            depth = name.replace("bg_fg/", "bg_fg_depth_map/").replace(".jpeg", "_depth_map.png")
            np.testing.assert_array_equal(read(archive, depth), expected)


def test_a_teachers_error_leaves_what_was_there(nb, photos):
    (photos / "photos.zip").write_bytes(b"earlier")
    with pytest.raises(ZeroDivisionError):
        compose(nb, photos, teacher=lambda pictures: 1 / 0)
    assert (photos / "photos.zip").read_bytes() == b"earlier" and not (photos / "photos.zip.part").exists()


BAD_PHOTOS = [
    ("bg/c.txt", b"notes", "cannot be read as a picture"),
    ("bg/c.jpg", encoded(scene(0, 200, 200), ".jpg")[:2000], "cannot be read as a picture"),
    ("bg/c.png", encoded(Image.new("I;16", (9, 9))), "more than 8 bits"),
    ("bg/c.png", encoded(cutout(30, 30)), "transparent in parts"),
    ("fg/c.txt", b"notes", "cannot be read as a picture"),
    ("fg/c.png", encoded(Image.new("I;16", (9, 9))), "transparent nowhere"),
    ("fg/c.jpg", encoded(scene(0, 30, 30), ".jpg"), "transparent nowhere"),
    ("fg/c.png", encoded(Image.new("RGBA", (30, 30), (9, 9, 9, 0))), "shows no object"),
    ("fg/c.png", encoded(Image.new("RGBA", (30, 30), (9, 9, 9, 100))), "shows no object"),
]


@pytest.mark.parametrize("name, content, message", BAD_PHOTOS)
def test_a_bad_photo_is_named_before_any_work(nb, photos, name, content, message):
    (photos / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        compose(nb, photos, teacher=None)
    assert str(error.value).startswith(str(photos / name)) and not (photos / "photos.zip").exists()


@pytest.mark.parametrize("given", ["", "nowhere"])
def test_a_folder_that_is_not_there(nb, tmp_path, given):
    with pytest.raises(FileNotFoundError, match=f"No pictures in the folder '{given}'"):
        nb.compose_photos(given, given, tmp_path / "a.zip", teacher=brightness)


@pytest.mark.parametrize("name", ["lounge", "meadow", "moved", "shadow", "sunset"])
def test_a_pair_of_photographs_differs_at_its_object_and_perhaps_a_shadow(name):
    kinds = "bg.jpg", "fg_bg.jpg", "mask.png"
    bg, fg_bg, mask = (np.array(Image.open(PHOTOGRAPHS / f"{name}_{kind}"), int) for kind in kinds)
    assert bg.shape == fg_bg.shape == (*mask.shape, 3) and np.unique(mask).tolist() == [0, 255]
    inside, outside = (np.abs(fg_bg - bg).mean(2)[mask == value] for value in (255, 0))
    assert inside.mean() > 15 and (np.quantile(outside, 0.9) < 12) == (name != "moved")


def test_every_photograph_has_its_author_and_licence():
    names = {file.name for file in PHOTOGRAPHS.iterdir()} - {"LICENCES.md"}
    text = (PHOTOGRAPHS / "LICENCES.md").read_text("utf-8")
    licensed = {name for row in text.splitlines() if "[CC BY 4.0] |" in row for name in row.split("`")}
    assert len(names) == 15 and names <= licensed


def save_tiny(folder, kind="relative"):
    """Saves a Depth Anything model with random weights, and what prepares its pictures; gives both."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 28}
    sizes |= {"patch_size": 14, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False}
    neck = {"reassemble_hidden_size": 16, "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}
    neck |= {"head_hidden_size": 8, "initializer_range": 0.3, "depth_estimation_type": kind, "max_depth": 20}
    config = transformers.DepthAnythingConfig(backbone_config=transformers.Dinov2Config(**sizes), **neck)
    model = transformers.DepthAnythingForDepthEstimation(config).eval()
    size = {"size": {"height": 56, "width": 56}, "ensure_multiple_of": 14, "keep_aspect_ratio": True}
    processor = transformers.DPTImageProcessor(do_resize=True, **size)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


@pytest.mark.parametrize("kind", ["relative", "metric"])
def test_depth_anything_is_the_model_turned_so_that_far_is_large(nb, tmp_path, kind):
    model, processor = save_tiny(tmp_path, kind)
    pictures = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, SIZE, SIZE), np.uint8))
    depth = nb.depth_anything(str(tmp_path))(pictures).cpu()
    inputs = processor(images=[picture.permute(1, 2, 0).numpy() for picture in pictures], return_tensors="pt")
    with torch.no_grad():
        by_hand = model(**inputs).predicted_depth
    assert by_hand.shape == (3, 56, 56) and (by_hand.std((1, 2)) > 1e-3).all()
    by_hand = torch.nn.functional.interpolate(by_hand[:, None], (SIZE, SIZE), mode="bilinear")[:, 0]
    expected = -by_hand if kind == "relative" else by_hand  # relative is inverse depth: near is large
    torch.testing.assert_close(depth, expected, rtol=1e-3, atol=1e-3)


def test_pickled_weights_are_not_loaded(nb, tmp_path):
    model, _ = save_tiny(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        nb.depth_anything(str(tmp_path))


def test_without_internet_one_sentence_says_what_to_do(nb, tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=r"nobody/nothing .* go online") as error:
        nb.depth_anything("nobody/nothing")
    assert "\n" not in str(error.value) and error.traceback[-1].name == "depth_anything"
