"""Chapter 14 of notebooks/00_make_dataset.ipynb: photos and cut-outs composed, with depth from a teacher."""

import io
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from test_make_dataset import definitions, read

import helpers

SIZE = 64
HIDDEN = (255, 0, 255)  # what the cut-outs hold where they are transparent: it must not show


@pytest.fixture(scope="module")
def nb():
    return definitions()


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
    """Two folders of photos, with litter of two systems: two backgrounds, and cut-outs that are wide, tall and large."""
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
    """An RGBA picture's visible part made smaller, in floats: colour times alpha (h, w, 3) and alpha (h, w), both 0 to 255."""
    rgba = np.array(picture, np.float32)
    rows, columns = (np.flatnonzero(rgba[..., 3].any(axis)) for axis in (1, 0))
    rgba = rgba[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    sides = [round(side * longer / max(rgba.shape[:2])) for side in rgba.shape[1::-1]]
    rgba[..., :3] *= rgba[..., 3:] / 255
    channels = [
        Image.fromarray(np.ascontiguousarray(channel)).resize(sides, Image.Resampling.BILINEAR)
        for channel in rgba.transpose(2, 0, 1)
    ]
    return np.stack(channels[:3], -1), np.array(channels[3])


def corner(mask):
    return np.flatnonzero(mask.any(1))[0], np.flatnonzero(mask.any(0))[0]


# The zip


def test_names_and_counts(nb, photos, capsys):
    path, count = compose(nb, photos)
    assert count == 2 * 3 * 2 * 2
    expected = {"bg/bg001.jpeg", "bg/bg002.jpeg"}
    for sample in (f"bg{b:03d}_fg{f:03d}_{n:02d}" for b in (1, 2) for f in (1, 2, 3) for n in (1, 2, 3, 4)):
        expected |= {f"bg_fg/{sample}.jpeg", f"bg_fg_mask/{sample}_mask.png", f"bg_fg_depth_map/{sample}_depth_map.png"}
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        assert archive.testzip() is None
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}  # no clock in the bytes
        assert all(read(archive, name).shape[:2] == (SIZE, SIZE) for name in names)
    assert len(names) == len(expected) and set(names) == expected
    assert capsys.readouterr().err == ""  # bars are shown where the notebook's other bars are


def test_numbers_grow_wider_when_needed(nb, photos):
    things = [nb.open_cutout(photos / "fg" / "1.png", 20, 40)] * 2
    made = nb.paste_all([scene(0, SIZE, SIZE)], things, np.array([[1]]), 1, (0.5, 0.5), 0, 4)
    assert [name for name, _, _ in made] == ["bg0001_fg0002_01", "bg0001_fg0002_02"]


def test_each_background_gets_some_of_the_objects(nb, photos):
    path, count = compose(nb, photos, objects_per_background=2, places=1)
    ds = helpers.ZipDataset(path, SIZE)
    assert len(ds) == count == 2 * 2 * 2
    assert sorted(np.bincount(ds.bg_id)) == [0, 4, 4] and sorted(np.bincount(ds.fg_id)) == [0, 2, 2, 4]


def test_same_seed_same_bytes_whatever_the_batches(nb, photos):
    changes = {"1.zip": {}, "2.zip": {"batch_size": 5}, "3.zip": {"seed": 6}}
    one, two, other = (compose(nb, photos, name, **change)[0].read_bytes() for name, change in changes.items())
    assert one == two != other


def test_it_opens_as_a_data_set_in_which_pictures_differ_only_at_the_object(nb, photos):
    ds = helpers.ZipDataset(compose(nb, photos)[0], SIZE)
    assert ds.layout == "modest" and not (ds.fg_id == 0).any()
    for item in ds:
        difference = (item["fg_bg"] - item["bg"]).abs()
        inside = item["mask"].bool().expand(3, -1, -1)
        assert difference[inside].mean() > 0.3 and difference[~inside].mean() < 0.02
        assert item["depth"].min() == 0 and item["depth"].max() == 1


# Pasting


@pytest.mark.parametrize("number, name, tolerance", [(1, "1.png", 2), (2, "2.webp", 2), (3, "3.png", 12)])
def test_an_object_and_its_mirror_image_blend_in_by_alpha_at_the_same_place(nb, photos, number, name, tolerance):
    """The third is first brought to twice the size, in memory: its edge may differ a little."""
    background = np.asarray(scene(0, SIZE, SIZE), np.float32)  # bg001 has the right size already
    colour, alpha = shrunk(Image.open(photos / "fg" / name), SIZE // 2)
    sure = np.abs(alpha - 127.5) > tolerance
    path, _ = compose(nb, photos)
    places = set()
    with zipfile.ZipFile(path) as archive:
        assert np.abs(read(archive, "bg/bg001.jpeg") - background).max() < 6
        for place in (1, 2):
            where = None
            for n, c, a, s in ((place, colour, alpha, sure), (place + 2, colour[:, ::-1], alpha[:, ::-1], sure[:, ::-1])):
                sample = f"bg001_fg{number:03d}_{n:02d}"
                mask, picture = read(archive, f"bg_fg_mask/{sample}_mask.png"), read(archive, f"bg_fg/{sample}.jpeg")
                top, left = np.array(corner(mask)) - corner(a > 127.5) if where is None else where  # the original's
                where = top, left
                box = slice(top, top + a.shape[0]), slice(left, left + a.shape[1])
                assert ((mask[box] > 0) == (a > 127.5))[s].all()
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
        (_, mask), (_, mirrored) = nb.paste_pair(background, thing, (share, share), np.random.default_rng(seed))
        assert mask.sum() == mirrored.sum() == pytest.approx((alpha > 127.5).sum(), abs=2)
        corners.append(np.array(corner(mask)) - corner(alpha > 127.5))
    room = SIZE - np.array(alpha.shape)
    assert (np.min(corners, 0) == 0).all() and (np.max(corners, 0) == room).all()


def test_sizes_are_spread_over_the_range(nb, photos):
    thing, background = nb.open_cutout(photos / "fg" / "1.png", 20, SIZE), scene(0, SIZE, SIZE)
    pairs = [next(nb.paste_pair(background, thing, (0.4, 0.8), np.random.default_rng(seed))) for seed in range(100)]
    wide = np.array([mask.any(0).sum() for _, mask in pairs]) / SIZE  # a little less than that of the soft edge
    high = np.array([mask.any(1).sum() for _, mask in pairs]) / SIZE
    assert 0.35 < wide.min() < 0.45 and 0.7 < wide.max() <= 0.8
    assert np.abs(high / wide - 0.5).max() < 0.1  # the cut-out is 60 x 30


def test_backgrounds_are_cropped_in_the_middle_and_turned_as_the_camera_says(nb, tmp_path):
    stripes = np.zeros((100, 200, 3), np.uint8)
    stripes[:, :50] = stripes[:, 150:] = (255, 0, 0)
    stripes[:50, 50:150] = (0, 0, 255)  # the middle square: blue above, black below
    Image.fromarray(stripes).save(tmp_path / "wide.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown after a quarter turn clockwise
    Image.fromarray(stripes).save(tmp_path / "turned.jpg", quality=95, exif=exif)
    upright, turned = (np.asarray(nb.open_background(tmp_path / name, 50)) for name in ("wide.png", "turned.jpg"))
    assert upright.shape == turned.shape == (50, 50, 3)
    inner = slice(3, -3)  # the red next to the square is averaged into its rim
    assert (upright[3:22, inner] == (0, 0, 255)).all() and (upright[28:-3, inner] == 0).all()
    assert (np.abs(turned[inner, 28:-3] - np.array((0, 0, 255))) < 20).all() and (turned[inner, 3:22] < 20).all()


# Depth


def test_depth_is_the_teachers_stretched_to_8_bit(nb, photos):
    seen = []

    def teacher(pictures):
        seen.append(pictures)
        return brightness(pictures).numpy()  # an array will do as well

    path, count = compose(nb, photos, teacher=teacher)
    assert [len(batch) for batch in seen] == [16, 8]
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.startswith("bg_fg/"))
        order = [name for name in archive.namelist() if name.startswith("bg_fg/")]
        pictures = dict(zip(order, torch.cat(seen), strict=True))
        assert len(names) == count
        for name in names:
            assert np.abs(read(archive, name) - pictures[name].permute(1, 2, 0).numpy().astype(int)).mean() < 2
            guess = pictures[name].numpy().astype(float).sum(0)
            expected = np.round(255 * (guess - guess.min()) / (guess.max() - guess.min()))
            depth = read(archive, name.replace("bg_fg/", "bg_fg_depth_map/").replace(".jpeg", "_depth_map.png"))
            np.testing.assert_array_equal(depth, expected)


@pytest.mark.filterwarnings("error")
def test_a_flat_guess_gives_zeros(nb, photos):
    path, _ = compose(nb, photos, teacher=lambda pictures: torch.full((len(pictures), SIZE, SIZE), 7.5))
    with zipfile.ZipFile(path) as archive:
        assert not read(archive, "bg_fg_depth_map/bg001_fg001_01_depth_map.png").any()


def test_samples_are_made_and_written_while_the_teacher_works(nb, photos, monkeypatch):
    pairs, made, written = nb.paste_pair, [], []
    monkeypatch.setattr(nb, "paste_pair", lambda *args: made.append(1) or pairs(*args))

    def teacher(pictures):
        written.append(((photos / "photos.zip.part").stat().st_size, len(made)))
        return brightness(pictures)

    compose(nb, photos, teacher=teacher, batch_size=4, places=20)
    sizes, pasted = zip(*written, strict=True)
    assert pasted == tuple(range(2, 122, 2))  # two pairs a batch
    assert sizes[-1] > 0.9 * (photos / "photos.zip").stat().st_size - 240 * 3 * 150  # less the zip's directory


# Bad input


def test_a_teachers_error_leaves_what_was_there(nb, photos):
    (photos / "photos.zip").write_bytes(b"earlier")
    with pytest.raises(ZeroDivisionError):
        compose(nb, photos, teacher=lambda pictures: 1 / 0)
    assert (photos / "photos.zip").read_bytes() == b"earlier" and not (photos / "photos.zip.part").exists()


@pytest.mark.parametrize(
    "answer, message",
    [
        (torch.zeros(3), r"shape \(16, 64, 64\) here; this one gave \(3,\)"),
        (torch.full((16, SIZE, SIZE), torch.nan), "0% of them finite"),
    ],
)
def test_a_teacher_that_gives_something_else_is_told(nb, photos, answer, message):
    with pytest.raises(ValueError, match=message):
        compose(nb, photos, teacher=lambda pictures: answer)


@pytest.mark.parametrize("given", ["", "nowhere"])
def test_a_folder_that_is_not_there(nb, tmp_path, given):
    with pytest.raises(FileNotFoundError, match=f"There is no folder '{given}'. Give the path"):
        nb.compose_photos(given, given, tmp_path / "a.zip", teacher=brightness)


def test_an_empty_folder(nb, tmp_path):
    (tmp_path / "fg").mkdir()
    (tmp_path / "fg" / ".DS_Store").touch()
    with pytest.raises(ValueError, match=r"The folder '.*fg' is empty"):
        nb.photo_files(tmp_path / "fg")


def as_bytes(picture, kind="PNG"):
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("bg/c.txt", b"notes", "cannot be read as a picture"),
        ("bg/c.jpg", as_bytes(scene(0, 200, 200), "JPEG")[:2000], "cannot be read as a picture .*truncated"),
        ("bg/c.png", as_bytes(Image.new("I;16", (9, 9))), "more than 8 bits"),
        ("bg/c.png", as_bytes(cutout(30, 30)), "transparent in parts"),
        ("fg/c.jpg", as_bytes(scene(0, 30, 30), "JPEG"), "transparent nowhere"),
        ("fg/c.png", as_bytes(Image.new("RGBA", (30, 30), "red")), "transparent nowhere"),
        ("fg/c.png", as_bytes(Image.new("RGBA", (30, 30), (9, 9, 9, 0))), "shows no object"),
        ("fg/c.png", as_bytes(Image.new("RGBA", (30, 30), (9, 9, 9, 100))), "shows no object"),
    ],
)
def test_a_bad_photo_is_named_before_any_work(nb, photos, name, content, message):
    (photos / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        compose(nb, photos, teacher=None)
    assert str(error.value).startswith(str(photos / name)) and not (photos / "photos.zip").exists()


def test_a_folder_among_the_photos_is_not_passed_over(nb, photos):
    (photos / "bg" / "more").mkdir()
    with pytest.raises(ValueError, match="more cannot be read as a picture"):
        compose(nb, photos)


def test_a_palette_with_a_transparent_colour_is_a_cutout(nb, photos):
    palette = cutout(40, 30).convert("RGB").quantize(8)
    palette.save(photos / "fg" / "4.png", transparency=palette.getpixel((0, 0)))
    assert nb.opaque(nb.open_cutout(photos / "fg" / "4.png", 20, 64)).any()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"places": 0}, "places, size and batch_size"),
        ({"scale": (0.7, 0.3)}, "scale is two numbers"),
        ({"objects_per_background": 4}, "objects_per_background is 4: it must be between 1 and 3"),
        ({"objects_per_background": 0}, "objects_per_background is 0"),
    ],
)
def test_numbers_out_of_range(nb, photos, change, message):
    with pytest.raises(ValueError, match=message):
        compose(nb, photos, **change)


# Depth Anything


@pytest.fixture
def save_tiny():
    """Saves a Depth Anything model with random weights, and what prepares its pictures; gives both."""
    import transformers

    def save(folder, kind="relative"):
        torch.manual_seed(0)
        backbone = transformers.Dinov2Config(
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
            out_indices=[1, 2, 3, 4],
            reshape_hidden_states=False,
        )
        neck = {"reassemble_hidden_size": 16, "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8, "head_hidden_size": 8}
        config = transformers.DepthAnythingConfig(
            backbone_config=backbone, initializer_range=0.3, depth_estimation_type=kind, max_depth=20, **neck
        )
        model = transformers.DepthAnythingForDepthEstimation(config).eval()
        processor = transformers.DPTImageProcessor(
            size={"height": 56, "width": 56}, keep_aspect_ratio=True, ensure_multiple_of=14, do_resize=True
        )
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        assert list(folder.glob("*.safetensors"))
        return model, processor

    return save


@pytest.mark.parametrize("kind", ["relative", "metric"])
def test_depth_anything_is_the_model_turned_so_that_far_is_large(nb, save_tiny, tmp_path, kind):
    model, processor = save_tiny(tmp_path, kind)
    pictures = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, SIZE, SIZE), np.uint8))
    depth = nb.depth_anything(str(tmp_path))(pictures).cpu()
    inputs = processor(images=[picture.permute(1, 2, 0).numpy() for picture in pictures], return_tensors="pt")
    with torch.no_grad():
        by_hand = model(**inputs).predicted_depth
    assert by_hand.shape == (3, 56, 56) and (by_hand.std((1, 2)) > 1e-3).all()
    by_hand = torch.nn.functional.interpolate(by_hand[:, None], (SIZE, SIZE), mode="bilinear")[:, 0]
    if kind == "relative":  # such a model gives inverse depth: near is large
        assert np.corrcoef(depth[0].flatten(), by_hand[0].flatten())[0, 1] < -0.999
        by_hand = -by_hand
    torch.testing.assert_close(depth, by_hand, rtol=1e-3, atol=1e-3)


def test_photos_with_depth_anything(nb, save_tiny, photos, monkeypatch):
    model = str(photos / "model")
    save_tiny(photos / "model")
    monkeypatch.setattr(nb.depth_anything, "__defaults__", (model,))  # in place of the hub
    one, count = compose(nb, photos, teacher=None)
    two, _ = compose(nb, photos, "two.zip", teacher=nb.depth_anything(model))
    assert one.read_bytes() == two.read_bytes() and count == 24
    assert all(item["depth"].min() == 0 and item["depth"].max() == 1 for item in helpers.ZipDataset(one, SIZE))


def test_pickled_weights_are_not_loaded(nb, save_tiny, tmp_path):
    model, _ = save_tiny(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        nb.depth_anything(str(tmp_path))


def test_a_model_of_another_kind_is_told(nb, save_tiny, tmp_path):
    import transformers

    config = transformers.GLPNConfig(
        hidden_sizes=[8] * 4, depths=[1] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8, mlp_ratios=[1] * 4
    )
    save_tiny(tmp_path)
    transformers.GLPNForDepthEstimation(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not a Depth Anything model but glpn"):
        nb.depth_anything(str(tmp_path))


def test_without_transformers_one_sentence_says_what_to_install(nb, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install transformers"):
        nb.depth_anything()


# Real photos


def test_photos_of_an_office(nb, shared_data, tmp_path):
    folder = shared_data / "photos" / "office"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}")
    count = nb.compose_photos(
        folder / "bg", folder / "fg", tmp_path / "a.zip", places=1, size=SIZE, objects_per_background=2, teacher=brightness
    )
    ds = helpers.ZipDataset(tmp_path / "a.zip", SIZE)
    assert len(ds) == count == 100 * 2 * 2 and set(np.bincount(ds.fg_id)[1:]) == {4}
    batch = helpers.to_float(ds.batch(range(count)))
    difference = (batch["fg_bg"] - batch["bg"]).abs().mean(1, keepdim=True)
    inside = batch["mask"].bool()
    assert difference[inside].mean() > 8 * difference[~inside].mean()
    assert inside.flatten(1).any(1).all()
