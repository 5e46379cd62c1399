"""The zip in memory against PIL, numpy and pictures of which every pixel is known; and the splits."""

import contextlib
import io
import itertools
import os
import pickle
import tempfile
import warnings
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader

import helpers
from helpers import KINDS, ZipDataset, data_zip, split, workspace


def as_uint8(ds, i):
    """The pictures of sample i as they are stored: (H, W, 3) or (H, W)."""
    item = ds[i]
    return {kind: (item[kind] * 255).round().byte().permute(1, 2, 0).squeeze(-1).numpy() for kind in KINDS}


def assert_same_samples(ds, made):
    assert [ds.name(i) for i in range(len(ds))] == [sample["name"] for sample in made]
    assert ds.bg_id.tolist() == [sample["b"] for sample in made]
    for i, sample in enumerate(made):
        for kind, picture in as_uint8(ds, i).items():
            np.testing.assert_array_equal(picture, sample[kind], f"{kind} of {sample['name']}")


# Layouts and archives


@pytest.mark.parametrize("layout", helpers.LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefix": "DataSet/tiny data/"},
        {"prefix": "mask/bg/"},
        {"compression": zipfile.ZIP_DEFLATED},
        {"zip64": True},
        {"extension": ".PNG", "prefix": "a/"},
    ],
    ids=str,
)
def test_a_zip_of_any_make_gives_the_pictures_that_went_in(write_zip, tmp_path, layout, options):
    made = write_zip(tmp_path / "a.zip", layout, **options)
    ds = ZipDataset(tmp_path / "a.zip", size=24)
    assert ds.layout == layout
    assert_same_samples(ds, made)


def test_a_zip_whose_entries_lie_beyond_4_gib(write_zip, tmp_path):
    path = tmp_path / "large.zip"
    with open(path, "wb") as file:
        file.truncate(2**32 + 12345)  # a hole, which takes no room on the disk
    made = write_zip(path)
    assert_same_samples(ZipDataset(path, size=24), made)


@pytest.mark.parametrize("extension", [".jpg", ".JPEG", ".Jpg"])
def test_jpeg_files_under_each_of_their_extensions(write_zip, tmp_path, extension):
    made = write_zip(tmp_path / "a.zip", "raguram", extension=extension)
    ds = ZipDataset(tmp_path / "a.zip", size=24)
    assert len(ds) == len(made)
    assert abs(as_uint8(ds, 0)["depth"].astype(int) - made[0]["depth"]).mean() < 10


def test_litter_is_passed_over_without_a_warning(write_zip, tmp_path):
    litter = {
        "data/": b"",
        "data/bg_fg/": b"",
        "__MACOSX/data/bg_fg/._bg001_fg001_01.png": b"x",
        "data/.DS_Store": b"x",
        "data/bg_fg/Thumbs.db": b"x",
        "data/labels.csv": b"a;b",
    }
    made = write_zip(tmp_path / "a.zip", prefix="data/", files=litter)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_same_samples(ZipDataset(tmp_path / "a.zip", size=24), made)


def test_the_background_of_a_sample_differs_from_it_at_the_object_only(write_zip, tmp_path):
    write_zip(tmp_path / "a.zip", "raguram", samples=itertools.product(range(12), (0, 1), (0,)))
    ds = ZipDataset(tmp_path / "a.zip", size=24)
    for i in range(len(ds)):
        different = (ds[i]["fg_bg"] != ds[i]["bg"]).any(0)
        assert torch.equal(different, ds[i]["mask"][0] == 1)


# Samples


def test_shapes_types_and_ranges(sample):
    ds = ZipDataset(sample, size=40)
    for i in (0, len(ds) // 2, -1):
        item = ds[i]
        assert list(item) == [*KINDS, "name"]
        for kind, channels in zip(KINDS, (3, 3, 1, 1), strict=True):
            assert item[kind].shape == (channels, 40, 40) and item[kind].dtype == torch.float32
            assert item[kind].min() >= 0 and 0.1 < item[kind].max() <= 1
        assert set(item["mask"].unique().tolist()) <= {0.0, 1.0}
    assert len(ds.bg_id) == len(ds.fg_id) == len(ds)
    assert ds.bg_id.dtype.kind == ds.fg_id.dtype.kind == "i"


def test_the_sample_is_as_large_as_promised(sample):
    ds = ZipDataset(sample)
    assert len(set(ds.bg_id)) >= 12 and len(set(ds.fg_id)) >= 12 and len(ds) >= 400
    assert sample.stat().st_size <= 6 * 2**20


def test_an_index_past_the_end_ends_a_loop(write_zip, tmp_path):
    made = write_zip(tmp_path / "a.zip")
    ds = ZipDataset(tmp_path / "a.zip")
    assert [item["name"] for item in ds] == [sample["name"] for sample in made]
    assert ds[-1]["name"] == made[-1]["name"]


@pytest.mark.parametrize("extension", [".png", ".jpeg"])
@pytest.mark.parametrize("size", [17, 24, 48, 50])
def test_pictures_are_resized_with_antialiasing(write_zip, tmp_path, extension, size):
    """As torch does it in floats, to a level. Pictures of the right size are what PIL decodes, bit for bit."""
    write_zip(tmp_path / "a.zip", size=48, extension=extension)
    ds = ZipDataset(tmp_path / "a.zip", size=size)
    names = {"bg": "bg/bg001", "fg_bg": "bg_fg/bg001_fg001_01", "depth": "bg_fg_depth_map/bg001_fg001_01_depth_map"}
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        for kind, name in names.items():
            picture = np.array(Image.open(io.BytesIO(archive.read(name + extension))), np.float32).reshape(1, 48, 48, -1)
            planes = torch.from_numpy(picture).permute(0, 3, 1, 2)
            expected = F.interpolate(planes, (size, size), mode="bilinear", antialias=True)[0]
            tolerance = 0 if size == 48 else 1.01
            torch.testing.assert_close(ds[0][kind] * 255, expected, atol=tolerance + 1e-4, rtol=0)


MOSTLY = (*range(64), *range(192, 256))  # a mask has these levels


@pytest.mark.parametrize(
    "levels, factor", [((*range(256), *MOSTLY), 3), ((0, 255), 2), ((0, 255), 3), ((0, 255, 127, 128, 0, 255), 1)]
)
def test_a_mask_is_resized_by_area_and_cut_at_one_half(write_zip, encode, tmp_path, levels, factor):
    """A pixel that is half covered, and no more, is not object."""
    grey = np.random.default_rng(0).choice(np.array(levels, np.uint8), (24, 24))
    write_zip(tmp_path / "a.zip", files={"bg_fg_mask/bg001_fg001_01_mask.png": encode(grey)})
    side = 24 // factor
    expected = grey.reshape(side, factor, side, factor).mean((1, 3)) > 127.5
    assert 0.2 < expected.mean() < 0.8
    np.testing.assert_array_equal(ZipDataset(tmp_path / "a.zip", size=side)[0]["mask"][0], expected)


def test_mask_and_depth_may_be_colour_pictures_of_grey(write_zip, encode, tmp_path):
    made = write_zip(tmp_path / "plain.zip", samples=[(1, 1, 1)])
    colour = {kind: encode(np.repeat(made[0][kind][..., None], 3, 2)) for kind in ("mask", "depth")}
    files = {
        "bg_fg_mask/bg001_fg001_01_mask.png": colour["mask"],
        "bg_fg_depth_map/bg001_fg001_01_depth_map.png": colour["depth"],
    }
    write_zip(tmp_path / "colour.zip", samples=[(1, 1, 1)], files=files)
    plain, other = (as_uint8(ZipDataset(tmp_path / name, size=24), 0) for name in ("plain.zip", "colour.zip"))
    np.testing.assert_array_equal(plain["mask"], other["mask"])
    np.testing.assert_allclose(plain["depth"].astype(int), other["depth"], atol=1)


def test_kinds_may_differ_in_size(write_zip, encode, tmp_path):
    small = encode(np.full((10, 14), 77, np.uint8))
    write_zip(tmp_path / "a.zip", files={"bg_fg_depth_map/bg001_fg001_01_depth_map.png": small})
    assert (as_uint8(ZipDataset(tmp_path / "a.zip", size=24), 0)["depth"] == 77).all()


def test_depth_with_near_bright_is_turned(write_zip, tmp_path):
    made = write_zip(tmp_path / "a.zip")
    turned = ZipDataset(tmp_path / "a.zip", size=24, depth_near="bright")
    np.testing.assert_array_equal(as_uint8(turned, 5)["depth"], 255 - made[5]["depth"])
    np.testing.assert_array_equal(as_uint8(turned, 5)["mask"], made[5]["mask"])
    with pytest.raises(ValueError, match="depth_near is 'left'; it can be 'dark' or 'bright'"):
        ZipDataset(tmp_path / "a.zip", depth_near="left")


# Mirrored objects


@pytest.mark.parametrize(
    "numbers, samples",
    [
        (50, list(itertools.product(range(2), range(100), (0,)))),
        (100, [(b, f + m, 0) for b, objects in enumerate([(84, 45, 22), (87, 63), (0,)]) for f in objects for m in (0, 100)]),
        (2, list(itertools.product(range(3), range(4), range(3)))),
    ],
    ids=["full set", "part of a set", "two objects"],
)
@pytest.mark.parametrize("first", [0, 1])
def test_a_mirrored_object_has_the_id_of_the_object(write_zip, tmp_path, numbers, samples, first):
    samples = [(b, f + first, n) for b, f, n in samples]
    made = write_zip(tmp_path / "a.zip", "raguram", samples=samples)
    expected = [(sample["f"] - first) % numbers + first for sample in made]
    assert ZipDataset(tmp_path / "a.zip").fg_id.tolist() == expected


def test_objects_of_the_other_layout_keep_their_numbers(write_zip, tmp_path):
    made = write_zip(tmp_path / "a.zip", "modest")
    assert ZipDataset(tmp_path / "a.zip").fg_id.tolist() == [sample["f"] for sample in made]


@pytest.mark.parametrize("name", ["layouts/raguram.zip", "layouts/modest.zip", "office.zip", "rooms.zip"])
def test_sets_made_by_others(shared_data, name):
    ds = ZipDataset(shared_data / name)
    assert len(ds) == (24 if "layouts" in name else 4000)
    mirrored = np.bincount(ds.fg_id)
    assert (mirrored % 2 == 0).all() and len(set(ds.fg_id)) <= 100
    item = ds[len(ds) // 2]
    inside = item["mask"].bool().expand(3, -1, -1)
    difference = (item["fg_bg"] - item["bg"]).abs()
    assert difference[inside].mean() > 4 * difference[~inside].mean()


# Memory and processes


@contextlib.contextmanager
def nothing_can_be_written():
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # from here on a file can't hold a single byte
    try:
        with pytest.raises(OSError), tempfile.TemporaryFile() as file:
            file.write(b"a byte")
            file.flush()
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_nothing_is_written_to_disk(write_zip, tmp_path):
    write_zip(tmp_path / "a.zip", compression=zipfile.ZIP_DEFLATED)
    with nothing_can_be_written():
        assert len(list(ZipDataset(tmp_path / "a.zip"))) == 24
    assert os.listdir(tmp_path) == ["a.zip"]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_worker_processes_give_the_same(write_zip, tmp_path, start):
    if start not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"no {start} here")
    write_zip(tmp_path / "a.zip")
    ds = ZipDataset(tmp_path / "a.zip", size=16)
    expected = list(ZipDataset(tmp_path / "a.zip", size=16))
    loader = DataLoader(ds, batch_size=None, num_workers=2, multiprocessing_context=start)
    for item, other in zip(loader, expected, strict=True):
        assert item["name"] == other["name"]
        assert all(torch.equal(item[kind], other[kind]) for kind in KINDS)


def test_what_a_worker_receives_does_not_grow_with_the_pictures(write_zip, tmp_path):
    write_zip(tmp_path / "a.zip", size=96)
    ds = ZipDataset(tmp_path / "a.zip", size=96)
    list(ds)
    assert len(pickle.dumps(ds)) < (tmp_path / "a.zip").stat().st_size / 10


def test_changing_a_batch_does_not_change_the_set(write_zip, tmp_path):
    write_zip(tmp_path / "a.zip")
    ds = ZipDataset(tmp_path / "a.zip")
    before = ds[0]["fg_bg"].clone()
    ds.batch([0])["fg_bg"].zero_()
    ds[0]["fg_bg"].zero_()
    assert torch.equal(ds[0]["fg_bg"], before)


def test_an_open_set_outlives_its_file(write_zip, tmp_path):
    made = write_zip(tmp_path / "a.zip")
    ds = ZipDataset(tmp_path / "a.zip", size=24)
    write_zip(tmp_path / "b.zip", samples=[(7, 7, 7)], size=32)
    os.replace(tmp_path / "b.zip", tmp_path / "a.zip")
    assert_same_samples(ds, made)


# Bad input


def message(error, path, **options) -> str:
    with pytest.raises(error) as caught:
        list(ZipDataset(path, **options))
    text = str(caught.value)
    assert str(path) in text and len(text.splitlines()) == 1
    return text


def test_a_missing_zip(tmp_path):
    assert "no such file" in message(FileNotFoundError, tmp_path / "none.zip")


def test_a_file_that_is_no_zip(tmp_path):
    (tmp_path / "page.zip").write_bytes(b"<html>Quota exceeded</html>")
    assert "not a whole zip file (27 bytes" in message(ValueError, tmp_path / "page.zip")


def test_a_zip_cut_off_while_copying(write_zip, tmp_path):
    write_zip(tmp_path / "a.zip")
    (tmp_path / "cut.zip").write_bytes((tmp_path / "a.zip").read_bytes()[:-1000])
    assert "not a whole zip file" in message(ValueError, tmp_path / "cut.zip")


@pytest.mark.parametrize("names", [[], ["bg/", "__MACOSX/._a.jpg", ".DS_Store"]], ids=["nothing", "litter"])
def test_an_empty_zip(tmp_path, names):
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    assert "holds no files" in message(ValueError, tmp_path / "empty.zip")


def test_an_unknown_layout_tells_what_was_found_and_what_is_known(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("holiday/beach_1.jpg", b"x")
        archive.writestr("notes/todo.txt", b"x")
    text = message(ValueError, tmp_path / "a.zip")
    for part in ("2 files", "holiday/beach_1.jpg", "notes/todo.txt", "raguram", "fg_bg_depth", "modest", "bg_fg_depth_map"):
        assert part in text


def test_an_unknown_layout_name_lists_the_known(sample):
    with pytest.raises(ValueError, match=r"Unknown layout 'moddest'\. Known: ") as caught:
        ZipDataset(sample, layout="moddest")
    known = str(caught.value).partition("Known: ")[2].rstrip(".").split(", ")
    assert set(known) == {"raguram", "mpaditya", "deepjyoti", "roshantac", "modest", "akshat"}


@pytest.mark.parametrize(
    "kind, left_out, samples",
    [
        ("bg", "bg/bg002.png", 8),
        ("mask", "bg_fg_mask/bg002_fg003_01_mask.png", 1),
        ("depth", "bg_fg_depth_map/bg002_fg003_01_depth_map.png", 1),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_sample_that_is_not_whole(write_zip, tmp_path, kind, left_out, samples):
    write_zip(tmp_path / "a.zip", without=[left_out])
    text = message(ValueError, tmp_path / "a.zip")
    assert f"{samples} of 24 samples have no {kind}" in text and "bg_fg/bg002_fg00" in text


def test_a_picture_that_belongs_to_no_sample_is_warned_of(write_zip, encode, tmp_path):
    write_zip(tmp_path / "a.zip", files={"bg_fg_mask/bg001_fg099_01_mask.png": encode(np.zeros((9, 9), np.uint8))})
    with pytest.warns(UserWarning, match="1 pictures belong to no sample, bg_fg_mask/bg001_fg099_01_mask.png"):
        assert len(ZipDataset(tmp_path / "a.zip")) == 24


def test_two_files_for_one_picture(write_zip, encode, tmp_path):
    write_zip(tmp_path / "a.zip", files={"copy/bg/bg001.png": encode(np.zeros((9, 9, 3), np.uint8))})
    text = message(ValueError, tmp_path / "a.zip")
    assert "copy/bg/bg001.png" in text and "one bg" in text


def test_a_compression_that_is_not_read(write_zip, tmp_path):
    write_zip(tmp_path / "a.zip", compression=zipfile.ZIP_BZIP2)
    assert "Store or deflate" in message(ValueError, tmp_path / "a.zip")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("position", [0, 0.5, 0.95])
def test_a_damaged_entry_is_named(write_zip, tmp_path, compression, position):
    name = "bg_fg/bg001_fg001_01.png"
    write_zip(tmp_path / "a.zip", compression=compression)
    data = bytearray((tmp_path / "a.zip").read_bytes())
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        entry = archive.getinfo(name)
    data[entry.header_offset + 30 + len(name) + int(position * entry.compress_size)] ^= 0xFF
    (tmp_path / "a.zip").write_bytes(data)
    text = message(ValueError, tmp_path / "a.zip")
    assert f"{name} is damaged" in text


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n and no more"])
def test_a_picture_that_cannot_be_decoded_is_named(write_zip, tmp_path, content):
    write_zip(tmp_path / "a.zip", files={"bg_fg_mask/bg002_fg001_01_mask.png": content})
    assert "bg_fg_mask/bg002_fg001_01_mask.png cannot be read" in message(ValueError, tmp_path / "a.zip")


@pytest.mark.parametrize("size", [0, -3])
def test_a_size_without_pixels(sample, size):
    with pytest.raises(ValueError, match=f"size is {size}"):
        ZipDataset(sample, size=size)


# Splits


class Listing:
    """The ids of a data set without its pictures: every background with every object, `places` times."""

    def __init__(self, backgrounds, objects, places=1):
        ids = np.array(list(itertools.product(backgrounds, objects, range(places))))
        self.bg_id, self.fg_id, self.place = ids.T

    def __len__(self):
        return len(self.bg_id)

    def name(self, i):
        return f"bg{self.bg_id[i]}_fg{self.fg_id[i]}_{self.place[i]}"


HUNDRED = Listing(range(100), range(100))
PARTS = ["train", "valid", "valid_new", "test_seen", "test_new_bg", "test_new_fg", "test_new_both"]


def ids(ds, parts, names, kind):
    return {int(i) for name in names for i in getattr(ds, kind)[parts[name]]}


def test_parts_are_disjoint_and_within_the_set():
    parts = split(HUNDRED)
    assert list(parts) == PARTS
    together = np.concatenate(list(parts.values()))
    assert len(together) == len(np.unique(together)) and together.min() >= 0 and together.max() < len(HUNDRED)


@pytest.mark.parametrize("seed", range(3))
def test_new_backgrounds_and_objects_are_new(seed):
    parts = split(HUNDRED, seed=seed)
    familiar = ["train", "valid", "test_seen"]
    for kind, new in (("bg_id", ["test_new_bg", "test_new_both"]), ("fg_id", ["test_new_fg", "test_new_both"])):
        assert not ids(HUNDRED, parts, [*familiar, "valid_new"], kind) & ids(HUNDRED, parts, new, kind)
    assert ids(HUNDRED, parts, ["valid", "test_seen", "test_new_fg"], "bg_id") <= ids(HUNDRED, parts, ["train"], "bg_id")
    assert ids(HUNDRED, parts, ["valid", "test_seen", "test_new_bg"], "fg_id") <= ids(HUNDRED, parts, ["train"], "fg_id")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["bg_id", "fg_id"])
def test_shares_of_a_hundred_ids(kind, seed):
    parts = split(HUNDRED, seed=seed)
    assert len(ids(HUNDRED, parts, ["train"], kind)) == pytest.approx(70, abs=3)
    assert len(ids(HUNDRED, parts, ["test_new_both"], kind)) == pytest.approx(15, abs=3)
    seen = sum(len(parts[name]) for name in ("train", "valid", "test_seen"))
    assert len(parts["train"]) / seen == pytest.approx(0.8, abs=0.03)
    assert len(parts["valid"]) / seen == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("count", [12, 13, 20, 33])
def test_no_part_is_empty_from_twelve_on(count, first):
    ds = Listing(range(first, first + count), range(first, first + count), places=3)
    for seed in range(10):
        assert all(len(part) for part in split(ds, seed=seed).values())


def test_no_part_of_the_sample_is_empty(sample):
    parts = split(ZipDataset(sample))
    assert list(parts) == PARTS and all(len(part) for part in parts.values())


@pytest.mark.parametrize(
    "smaller", [Listing(range(30), range(100)), Listing(range(100), range(40, 70)), Listing(range(12, 90, 5), range(7))]
)
def test_no_sample_moves_when_others_are_added(smaller):
    def part_of_each(ds):
        return {ds.name(i): part for part, indices in split(ds).items() for i in indices}

    before, after = part_of_each(smaller), part_of_each(HUNDRED)
    assert before == {name: after[name] for name in before}


@pytest.mark.parametrize("by", ["unseen", "image"])
def test_a_seed_decides_the_split(by):
    first, again, other = (split(HUNDRED, by, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(first[part], again[part]) for part in first)
    assert not any(np.array_equal(first[part], other[part]) for part in first)


@pytest.mark.parametrize("seed", range(12))
def test_unknown_ids_count_as_training_ones(seed):
    ds = Listing(range(40), [-1], places=10)
    parts = split(ds, seed=seed)
    assert not len(parts["test_new_fg"]) and not len(parts["test_new_both"])
    assert len(parts["train"]) and len(parts["test_new_bg"])


@pytest.mark.parametrize("count", [100, 101, 1000])
def test_image_split_is_a_partition_of_70_15_15(count):
    parts = split(Listing(range(count), [1]), by="image")
    assert list(parts) == ["train", "valid", "test"]
    assert sorted(np.concatenate(list(parts.values()))) == list(range(count))
    for part, share in zip(parts.values(), (0.7, 0.15, 0.15), strict=True):
        assert len(part) == pytest.approx(share * count, abs=1)


def test_an_unknown_split_lists_the_known():
    with pytest.raises(ValueError, match=r"Unknown split 'random'\. Known: unseen, image"):
        split(HUNDRED, by="random")


# Paths


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Three files that data_zip could mean, and a workspace."""
    monkeypatch.setenv("WORKSPACE", str(tmp_path / "work"))
    monkeypatch.delenv("DATA_ZIP", raising=False)
    for name in ("given.zip", "variable.zip"):
        (tmp_path / name).touch()
    return tmp_path


def test_data_zip_takes_the_first_of_path_variable_own_and_sample(places, sample, monkeypatch):
    assert data_zip() == sample
    (places / "work" / "scenes.zip").touch()
    assert data_zip() == places / "work" / "scenes.zip"
    monkeypatch.setenv("DATA_ZIP", str(places / "variable.zip"))
    assert data_zip() == places / "variable.zip"
    assert data_zip(places / "given.zip") == data_zip(str(places / "given.zip")) == places / "given.zip"


@pytest.mark.parametrize("how", ["path", "variable"])
def test_data_zip_does_not_fall_back_when_a_given_file_is_missing(places, monkeypatch, how):
    missing = str(places / "missing.zip")
    if how == "variable":
        monkeypatch.setenv("DATA_ZIP", missing)
    with pytest.raises(FileNotFoundError, match=r"missing\.zip: there is no such file"):
        data_zip(missing if how == "path" else "")


def test_workspace_is_the_variable_or_runs_and_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKSPACE", str(tmp_path / "a" / "b"))
    assert workspace() == tmp_path / "a" / "b" and workspace().is_dir()
    monkeypatch.delenv("WORKSPACE")
    monkeypatch.setattr(helpers, "ROOT", tmp_path)
    assert workspace() == tmp_path / "runs" and workspace().is_dir()


@pytest.mark.parametrize("variables, colab", [({}, True), ({"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}, False)])
def test_kaggle_is_not_taken_for_colab(monkeypatch, variables, colab):
    monkeypatch.setattr(helpers, "get_ipython", lambda: "<google.colab._shell.Shell object>")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert helpers.in_colab() is colab


def test_a_zip_on_drive_is_copied_to_the_machines_own_disk_once(write_zip, tmp_path, monkeypatch):
    monkeypatch.setattr(helpers, "DRIVE", tmp_path / "drive")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    on_drive = tmp_path / "drive" / "MyDrive" / "mine.zip"
    on_drive.parent.mkdir(parents=True)
    write_zip(on_drive)
    local = helpers.data_zip(on_drive)
    assert tmp_path / "cache" in local.parents and local.read_bytes() == on_drive.read_bytes()
    copied = local.stat().st_ino
    assert helpers.data_zip(on_drive) == local and local.stat().st_ino == copied
    assert os.listdir(local.parent) == ["mine.zip"]


def test_a_relative_path_starts_here_or_at_the_project(write_zip, tmp_path, monkeypatch):
    """Kernels start in notebooks/, while a path is typed at the project's root."""
    monkeypatch.setattr(helpers, "ROOT", tmp_path / "project")
    here = tmp_path / "project" / "notebooks"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    write_zip(tmp_path / "project" / "mine.zip")
    assert data_zip("mine.zip") == tmp_path / "project" / "mine.zip"
    write_zip(here / "mine.zip")
    assert data_zip("mine.zip").resolve() == here / "mine.zip"
    monkeypatch.setenv("WORKSPACE", "results")
    assert workspace() == tmp_path / "project" / "results"


def test_a_picture_of_16_bits_is_refused_by_name(write_zip, encode, tmp_path):
    deep = {"bg_fg_depth_map/bg001_fg001_01_depth_map.png": encode(np.full((24, 24), 30000, np.uint16))}
    write_zip(tmp_path / "a.zip", files=deep)
    with pytest.raises(ValueError, match=r"bg001_fg001_01_depth_map\.png cannot be read as a picture \(it has 16 bits"):
        ZipDataset(tmp_path / "a.zip")[0]


def test_a_set_whose_mirror_images_cannot_be_told_warns(write_zip, tmp_path):
    write_zip(tmp_path / "a.zip", layout="raguram", samples=[(b, f, 1) for b in (1, 2) for f in (0, 1, 7)])
    with pytest.warns(UserWarning, match="Mirrored objects cannot be told"):
        ZipDataset(tmp_path / "a.zip")


def test_a_path_typed_on_drive_mounts_it_first(write_zip, tmp_path, monkeypatch):
    on_drive = tmp_path / "drive" / "MyDrive" / "mine.zip"

    def mount():
        on_drive.parent.mkdir(parents=True)
        write_zip(on_drive)

    monkeypatch.setattr(helpers, "DRIVE", tmp_path / "drive")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(helpers, "in_colab", lambda: True)
    monkeypatch.setattr(helpers, "_drive_folder", mount)
    assert helpers.data_zip(on_drive).read_bytes() == on_drive.read_bytes()
