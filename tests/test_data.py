"""Samples, pictures kept on the disk, and paths: against Pillow, numpy and pictures of known pixels."""

import errno
import io
import itertools
import multiprocessing
import os
import unittest.mock
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
import torch
from conftest import FILE_NAMES, encoded
from PIL import Image

import helpers
from helpers import CHANNELS, KINDS, LAYOUTS, ZipDataset, split

pytestmark = pytest.mark.usefixtures("cache")
FILES = 3 + 3 * 24  # of a zip of 24 samples, which share their backgrounds


def as_uint8(ds, i):
    """The pictures of sample i as they are stored, a mask in 0 and 255: (H, W, 3) or (H, W)."""
    item = ds[i]
    return {kind: (item[kind] * 255).round().byte().permute(1, 2, 0).squeeze(-1).numpy() for kind in ds.kinds}


def assert_same_samples(ds, made):
    assert [ds.name(i) for i in range(len(ds))] == [sample["name"] for sample in made]
    assert ds.bg_id.tolist() == [sample["b"] for sample in made]
    for i, sample in enumerate(made):
        for kind, picture in as_uint8(ds, i).items():
            np.testing.assert_array_equal(picture, sample[kind], f"{kind} of {sample['name']}")


def by_pillow(picture, kind, size):
    """(size, size, channels): by Pillow's bilinear resizing; of a mask, where over half is white."""
    if kind != "mask":
        picture = picture.convert("RGB" if CHANNELS[kind] == 3 else "L").resize((size, size), Image.BILINEAR)
        return np.asarray(picture).reshape(size, size, -1)
    grey, cells = np.asarray(picture.convert("L"), float), np.arange(size)
    for side in grey.shape:  # means over the rows, then over the columns, that a cell touches
        starts, ends = cells * side // size, -(-(cells + 1) * side // size)
        grey = np.stack([grey[a:b].mean(0) for a, b in zip(starts, ends, strict=True)]).T
    return (grey > 127.5).astype(np.uint8)[..., None]


def differences(path, size, indices):
    """By how many levels pictures of the layout modest differ from Pillow's, for each kind."""
    ds, found = ZipDataset(path, size), {kind: [] for kind in KINDS}
    with zipfile.ZipFile(path) as archive:
        files = {name.rpartition("/")[2].partition(".")[0]: name for name in archive.namelist()}
        for i in indices:
            name, batch = ds.name(i), ds.batch([i])
            stems = (name.partition("_")[0], name, f"{name}_mask", f"{name}_depth_map")
            for kind, stem in zip(KINDS, stems, strict=True):
                expected = by_pillow(Image.open(archive.open(files[stem])), kind, size).astype(int)
                found[kind].append(np.abs(batch[kind][0].permute(1, 2, 0).numpy() - expected))
    return found


@pytest.fixture
def made(write_zip, tmp_path):
    return write_zip(tmp_path / "a.zip")


@pytest.fixture
def decoded(monkeypatch):
    """A list of the pictures that are decoded from here on."""
    pictures, read = [], helpers.read_picture
    monkeypatch.setattr(helpers, "read_picture", lambda *args: pictures.append(args) or read(*args))
    return pictures


def test_shapes_types_and_ranges(sample):
    ds = ZipDataset(sample, size=40)
    for i in (0, len(ds) // 2, -1):
        item = ds[i]
        assert list(item) == [*KINDS, "name"] and item["name"] == ds.name(i)
        for kind, channels in zip(KINDS, (3, 3, 1, 1), strict=True):
            assert item[kind].shape == (channels, 40, 40) and item[kind].dtype == torch.float32
            assert item[kind].min() >= 0 and 0.1 < item[kind].max() <= 1
        assert set(item["mask"].unique().tolist()) <= {0.0, 1.0}
    assert [item["name"] for item in ds] == [ds.name(i) for i in range(len(ds))]
    assert all(len(set(ids)) >= 40 and ids.dtype.kind == "i" for ids in (ds.bg_id, ds.fg_id))
    assert min(len(of) for part, of in split(ds).items() if part.startswith("test")) >= 40 and len(ds) >= 500


@pytest.mark.parametrize("near", ["dark", "bright"])
@pytest.mark.parametrize("indices", [[3, 3, 0, 23, 7], [-1], range(24), np.array([4, 4])], ids=str)
def test_a_batch_has_the_samples_asked_for_and_depth_that_grows_with_distance(made, tmp_path, indices, near):
    batch = ZipDataset(tmp_path / "a.zip", 24, depth_near=near).batch(indices)
    for kind in KINDS:
        picture = np.stack([made[i][kind] for i in indices]).reshape(len(indices), 24, 24, -1)
        picture = picture // 255 if kind == "mask" else picture
        picture = 255 - picture if (kind, near) == ("depth", "bright") else picture
        assert batch[kind].dtype == torch.uint8
        np.testing.assert_array_equal(batch[kind].permute(0, 2, 3, 1), picture)


def test_changing_a_batch_does_not_change_the_set(made, tmp_path):
    ds = ZipDataset(tmp_path / "a.zip")
    before = ds[0]["fg_bg"].clone()
    ds.batch([0])["fg_bg"].zero_()
    ds[0]["fg_bg"].zero_()
    assert torch.equal(ds[0]["fg_bg"], before)


@pytest.mark.parametrize("kind", ["mask", "depth"])
@pytest.mark.parametrize("layout", ["raguram", "modest", "akshat", "deepjyoti"])
def test_a_zip_may_lack_masks_or_depth(write_zip, tmp_path, layout, kind):
    made = write_zip(tmp_path / "a.zip", layout, skip=[kind])
    ds = ZipDataset(tmp_path / "a.zip", 24)
    assert set(ds.kinds) == set(ds[0]) - {"name"} == set(ds.batch([0])) == set(KINDS) - {kind}
    assert_same_samples(ds, made)
    assert helpers.check(tmp_path / "a.zip") == {}


def test_a_zip_that_lacks_both_is_refused(write_zip, tmp_path):
    write_zip(tmp_path / "a.zip", skip=["mask", "depth"])
    with pytest.raises(ValueError, match="neither masks nor depth"):
        ZipDataset(tmp_path / "a.zip")


@pytest.mark.parametrize("extension", [".png", ".jpg", ".webp", ".bmp"])
@pytest.mark.parametrize("size, most", [(16, 0), (24, 0), (48, 0), (17, 1), (50, 1)])
def test_pictures_are_those_that_pillow_decodes_and_resizes(write_zip, tmp_path, extension, size, most):
    """To the bit, but where weights are no simple fractions: those are rounded in other ways. Of a mask half
    of a pixel may be covered, which is not object then."""
    write_zip(tmp_path / "a.zip", size=48, extension=extension)
    found = differences(tmp_path / "a.zip", size, range(0, 24, 3))
    assert np.max(found.pop("mask")) == 0 and max(map(np.max, found.values())) <= most


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pictures_of_sets_made_by_others_are_those_that_pillow_decodes_and_resizes(shared_data, layout):
    """All of each kind; which of them belong together is tested elsewhere."""
    path = shared_data / "layouts" / f"{layout}.zip"
    batch = ZipDataset(path, 64).batch(range(24))
    with zipfile.ZipFile(path) as archive:
        for kind, name in zip(KINDS, FILE_NAMES[layout].split(), strict=True):
            folder = f"/{name.partition('/')[0]}/"
            names = [name for name in archive.namelist() if folder in f"/{name}" and name[-1] != "/"]
            expected = {by_pillow(Image.open(archive.open(name)), kind, 64).tobytes() for name in names}
            assert {picture.tobytes() for picture in batch[kind].permute(0, 2, 3, 1).numpy()} == expected


JPEGS = [{"progressive": True}, {"subsampling": "4:4:4"}, {"subsampling": "4:2:2"}]
JPEGS += [{"mode": "L"}, {"mode": "CMYK"}]


@pytest.mark.parametrize("options", JPEGS, ids=str)
@pytest.mark.parametrize("kind", ["fg_bg", "depth"])
def test_jpegs_of_every_make_and_shape(write_zip, tmp_path, kind, options):
    picture = Image.fromarray((np.indices((60, 80)).sum(0)[..., None] * [1, 0.5, 1.5]).astype(np.uint8))
    picture = picture.convert("L" if kind == "depth" else "RGB").convert(options.get("mode", "RGB"))
    raw = encoded(picture, ".jpg", **options)
    write_zip(tmp_path / "a.zip", samples=[(1, 1, 1)], change=lambda of, *_: raw if of == kind else None)
    expected = by_pillow(Image.open(io.BytesIO(raw)), kind, 40)
    found = ZipDataset(tmp_path / "a.zip", 40).batch([0])[kind][0].permute(1, 2, 0).numpy()
    assert np.ptp(expected) > 50 and np.abs(found - expected.astype(int)).max() <= 1


def test_each_picture_is_decoded_once_and_found_by_the_next_set_of_the_same_content(made, tmp_path, decoded):
    ds = ZipDataset(tmp_path / "a.zip", 24)
    assert len(decoded) == 0
    for indices in ([1, 0, 0, 0], range(5, 24), [4, 3, 2], range(24)):
        ds.batch(indices)
    assert len(decoded) == FILES
    (tmp_path / "copy.zip").write_bytes((tmp_path / "a.zip").read_bytes())
    for path in (tmp_path / "a.zip", tmp_path / "copy.zip"):
        assert_same_samples(ZipDataset(path, 24), made)
    assert len(decoded) == FILES


@pytest.mark.parametrize("change", ["content", "size", "depth_near", "start of the machine"])
def test_pictures_of_something_else_are_not_taken(write_zip, made, tmp_path, decoded, monkeypatch, change):
    ZipDataset(tmp_path / "a.zip", 24).batch(range(24))
    size, near = 24 // (1 + (change == "size")), "bright" if change == "depth_near" else "dark"
    if change == "content":
        made = write_zip(tmp_path / "b.zip", samples=itertools.product((4, 5, 6), (1, 2, 3, 4), (1, 2)))
        os.replace(tmp_path / "b.zip", tmp_path / "a.zip")
    elif change == "start of the machine":  # a crash may have kept pictures from the disk
        monkeypatch.setattr(psutil, "boot_time", lambda: 1e9)
    ds = ZipDataset(tmp_path / "a.zip", size, depth_near=near)
    ds.batch(range(24))
    assert len(decoded) == 2 * FILES
    if size == 24 and near == "dark":
        assert_same_samples(ds, made)


def test_a_picture_of_a_folder_that_was_edited_is_read_anew(write_zip, tmp_path):
    write_zip(tmp_path / "a.zip", extension=".bmp")
    zipfile.ZipFile(tmp_path / "a.zip").extractall(tmp_path / "set")
    before = as_uint8(ZipDataset(tmp_path / "set", 24), 0)["bg"]
    (tmp_path / "set/bg/bg001.bmp").write_bytes(encoded(255 - before, ".bmp"))
    np.testing.assert_array_equal(as_uint8(ZipDataset(tmp_path / "set", 24), 0)["bg"], 255 - before)


@pytest.mark.parametrize("fault", ["full disk", "no folder"])
def test_where_there_is_no_room_pictures_are_decoded_anew(made, tmp_path, cache, decoded, monkeypatch, fault):
    if fault == "full disk":
        no_room = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        monkeypatch.setattr(os, "posix_fallocate", unittest.mock.Mock(side_effect=no_room))
    else:
        cache.touch()  # a file in the place of the folder
    ds = ZipDataset(tmp_path / "a.zip", 24)
    for again in (1, 2):
        ds.batch([*range(24), 0, 0])
        assert len(decoded) == again * FILES  # each once a batch
    assert_same_samples(ds, made)
    assert [file for file in cache.rglob("*.npy") if file.is_file()] == []


def in_processes(count, target):
    """The exit codes of forks, which start at once."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(count)
    processes = [context.Process(target=lambda: (barrier.wait(60), target())) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def test_a_killed_process_leaves_pictures_that_are_right(made, tmp_path, monkeypatch, decoded):
    def die():
        ds = ZipDataset(tmp_path / "a.zip", 24)
        ds.batch(range(8))
        read, calls = helpers.read_picture, itertools.count()
        helpers.read_picture = lambda *args: os.kill(os.getpid(), 9) if next(calls) == 9 else read(*args)
        ds.batch(range(24))

    assert in_processes(1, die) == [-9]
    assert_same_samples(ZipDataset(tmp_path / "a.zip", 24), made)
    assert len(decoded) == FILES - 3 - 3 * 8  # which were kept: all backgrounds and the first 8 of the others


def test_processes_that_open_a_set_at_once_share_its_pictures(made, tmp_path):
    def read():
        assert_same_samples(ZipDataset(tmp_path / "a.zip", 24), made)

    whole = ZipDataset(tmp_path / "a.zip", 24)  # opened before they start, as for the workers of a loader
    assert in_processes(4, lambda: [helpers._read(file) for file in 50 * whole._places]) == [0] * 4
    assert in_processes(4, read) == [0] * 4


def test_several_threads_may_ask_at_once(made, tmp_path):
    orders = [np.random.default_rng(seed).permutation(24) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        batches = pool.map(ZipDataset(tmp_path / "a.zip", 24).batch, orders)
        for order, batch in zip(orders, batches, strict=True):
            expected = np.stack([made[i]["fg_bg"] for i in order])
            np.testing.assert_array_equal(batch["fg_bg"].permute(0, 2, 3, 1), expected)


def test_at_full_scale_a_data_set_is_drawn_where_there_is_none(tmp_path, monkeypatch, capsys):
    """Once; the next time it is found."""
    monkeypatch.setenv("WORKSPACE", str(tmp_path))
    monkeypatch.delenv("DATA_ZIP", raising=False)
    monkeypatch.setattr(helpers, "SCALE", "full")
    nb = helpers._drawing()
    vars(nb).update(backgrounds=2, objects=3, objects_per_background=2, size=32)
    monkeypatch.setattr(helpers, "_drawing", lambda: nb)
    assert helpers.data_zip() == tmp_path / "scenes.zip" and "draws one" in capsys.readouterr().out
    assert len(ZipDataset(tmp_path / "scenes.zip", 32)) == 2 * 2 * 2
    monkeypatch.delattr(helpers.filelock, "FileLock")  # nor is it waited for
    assert helpers.data_zip() == tmp_path / "scenes.zip" and capsys.readouterr().out == ""
