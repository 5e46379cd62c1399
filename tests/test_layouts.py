"""The six layouts, folders and several zips against one another and against pictures that are known; and subsets."""

import hashlib
import itertools
import pickle
import tracemalloc
import warnings
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data import as_uint8, assert_same_samples, message, nothing_can_be_written
from torch.utils.data import DataLoader

from helpers import KINDS, LAYOUTS, ZipDataset, data_zip, split

NUMBERED = ("deepjyoti", "akshat")  # the layouts whose names hold a position and no object


def unpacked(path: Path) -> Path:
    """The zip's files in a folder."""
    with zipfile.ZipFile(path) as archive:
        archive.extractall(path.with_suffix(""))
    return path.with_suffix("")


def repacked(path: Path, place) -> Path:
    """A folder of zips; `place` gives for each of the zip's files the name of its new zip and its name in there."""
    folder = path.with_suffix("")
    folder.mkdir()
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            stem, inner = place(name)
            with zipfile.ZipFile(folder / f"{stem}.zip", "a") as part:
                part.writestr(inner, archive.read(name))
    return folder


def a_zip_for_each_kind(path: Path) -> Path:
    return repacked(path, lambda name: (name.partition("/")[0], name))


def a_zip_for_each_kind_without_its_folder(path: Path) -> Path:
    return repacked(path, lambda name: (name.partition("/")[0], name.partition("/")[2] or name))


def three_zips_of_any_files(path: Path) -> Path:
    return repacked(path, lambda name: (f"part_{zlib.crc32(name.encode()) % 3}", name))


FORMS = [unpacked, a_zip_for_each_kind, a_zip_for_each_kind_without_its_folder, three_zips_of_any_files]


def hashes(ds):
    """One hash a sample, of its four pictures."""
    samples = (b"".join(picture.tobytes() for picture in as_uint8(ds, i).values()) for i in range(len(ds)))
    return [hashlib.sha256(sample).hexdigest() for sample in samples]


def outside(item, bg):
    """How much the picture differs from a background where the object is not."""
    return (item["fg_bg"] - bg).abs()[~item["mask"].bool().expand(3, -1, -1)].mean().item()


def assert_own_background(ds):
    backgrounds = {b: ds[int(np.flatnonzero(ds.bg_id == b)[0])]["bg"] for b in np.unique(ds.bg_id)}
    assert len(backgrounds) > 2
    for i, item in enumerate(ds):
        others = [outside(item, bg) for b, bg in backgrounds.items() if b != ds.bg_id[i]]
        assert outside(item, item["bg"]) < 0.02 and min(others) > 0.1


# Each layout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sample_stands_on_its_own_background(write_zip, tmp_path, layout):
    write_zip(tmp_path / "a.zip", layout, samples=itertools.product(range(1, 13), (1, 2), (1,)))
    assert_own_background(ZipDataset(tmp_path / "a.zip", size=24))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbers_are_sorted_as_numbers(write_zip, tmp_path, layout):
    backgrounds = range(1, 12) if layout == "deepjyoti" else (9, 10, 999, 1000)
    made = write_zip(tmp_path / "a.zip", layout, samples=itertools.product(backgrounds, (0, 1), (2, 11)))
    assert_same_samples(ZipDataset(tmp_path / "a.zip", size=24), made)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_litter_is_passed_over_in_each_layout(write_zip, tmp_path, layout):
    made = write_zip(tmp_path / "a.zip", layout, samples=itertools.product((1, 2, 3), (0, 1), (0, 1)), prefix="set/")
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as archive:
        for name in [name for name in archive.namelist() if name.endswith(".png")][::9]:
            folder, file = name.rsplit("/", 1)
            for litter in (f"{folder}/._{file}", f"__MACOSX/{folder}/._{file}", f"{folder}/.DS_Store", f"{folder}/Thumbs.db"):
                archive.writestr(litter, b"x")
        for label in ("set/labels.csv", "label_data.txt", "set/old_label_data.csv"):
            archive.writestr(label, b"a;b")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for path in (tmp_path / "a.zip", unpacked(tmp_path / "a.zip")):
            ds = ZipDataset(path, size=24)
            assert ds.layout == layout
            assert_same_samples(ds, made)


def test_a_few_strange_pictures_do_not_decide_the_layout(write_zip, encode, tmp_path):
    strays = dict.fromkeys(["bg_fg/bg001_fg001_01.png", "fg_bg/bg_001/img_0001.png"], encode(np.zeros((9, 9, 3), np.uint8)))
    made = write_zip(tmp_path / "a.zip", "deepjyoti", files=strays)
    with pytest.warns(UserWarning, match="2 pictures belong to no sample"):
        assert_same_samples(ZipDataset(tmp_path / "a.zip", size=24), made)


@pytest.mark.parametrize("layout", NUMBERED)
@pytest.mark.parametrize("objects, places", [(1, 40), (2, 40), (2, 30)])
def test_the_place_in_a_block_tells_the_object_where_blocks_are_of_forty(write_zip, tmp_path, layout, objects, places):
    """The recipe: an object at 20 places, then mirrored at the same, then the next object. A gap changes nothing."""
    kinds = {"deepjyoti": ("image/fg_bg_17", "mask/fg_bg_mask_17", "depthmap/depth_17")}.get(
        layout, [f"{kind}/bg_001/img_0017" for kind in ("fg_bg", "fg_bg_mask", "fg_bg_depth")]
    )
    samples = itertools.product((1, 2), range(objects), range(places))
    made = write_zip(tmp_path / "a.zip", layout, samples=samples, size=6, without=[f"{name}.png" for name in kinds])
    del made[16]
    ds = ZipDataset(tmp_path / "a.zip", size=6)
    assert ds.fg_id.tolist() == [sample["f"] if places == 40 else -1 for sample in made]
    assert_same_samples(ds, made)


@pytest.mark.parametrize("layout", ["mpaditya", "roshantac"])
def test_objects_are_unknown_where_names_do_not_tell(write_zip, tmp_path, layout):
    write_zip(tmp_path / "a.zip", layout, samples=itertools.product((1, 2), (0,), range(40)), size=6)
    assert set(ZipDataset(tmp_path / "a.zip").fg_id) == {-1}


@pytest.mark.parametrize(
    "label",
    [
        lambda name: f"Dataset/{name}",
        lambda name: f"./{name}",
        lambda name: f"/content/drive/My Drive/Dataset/{name}",
        lambda name: ".\\" + name.replace("/", "\\"),
        lambda name: "C:\\Data\\" + name.replace("/", "\\"),
    ],
    ids=["folder", "dot", "absolute", "windows", "windows absolute"],
)
@pytest.mark.parametrize("prefix", ["", "a/Dataset/"])
def test_labels_may_name_the_files_from_elsewhere(write_zip, tmp_path, label, prefix):
    made = write_zip(tmp_path / "a.zip", "roshantac", prefix=prefix, label=lambda name: label(name.removeprefix(prefix)))
    assert_same_samples(ZipDataset(tmp_path / "a.zip", size=24), made)


def test_labels_as_a_spreadsheet_saves_them(write_zip, tmp_path):
    """With a mark before the first line, lines that end as on Windows, and fewer quotes."""
    made = write_zip(tmp_path / "a.zip", "roshantac")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        table = archive.read("label_data.csv").replace(b"\n", b"\r\n").replace(b'"', b"")
    write_zip(tmp_path / "b.zip", "roshantac", files={"label_data.csv": b"\xef\xbb\xbf" + table})
    assert_same_samples(ZipDataset(tmp_path / "b.zip", size=24), made)


def test_rows_of_labels_decide_and_not_the_numbers(write_zip, tmp_path):
    """The table may give a sample another mask than the one of its number."""
    made = write_zip(tmp_path / "a.zip", "roshantac", label=lambda name: name.replace("mask/mask1.", "mask/mask2."))
    made[0]["mask"] = made[1]["mask"]
    with pytest.warns(UserWarning, match="1 pictures belong to no sample, fgbgmask/mask1.png"):
        assert_same_samples(ZipDataset(tmp_path / "a.zip", size=24), made)


def test_depth_with_near_bright_is_turned_in_roshantac_when_asked_for(write_zip, tmp_path):
    made = write_zip(tmp_path / "a.zip", "roshantac")
    turned = ZipDataset(tmp_path / "a.zip", size=24, depth_near="bright")
    np.testing.assert_array_equal(as_uint8(turned, 7)["depth"], 255 - made[7]["depth"])


# Sets that others published


@pytest.mark.parametrize("form", [lambda path: path, unpacked], ids=["zip", "folder"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts_hold_the_same_samples(shared_data, tmp_path, layout, form):
    """The same 24 samples; where the object's number stands in the name, they come in its order."""
    source = tmp_path / f"{layout}.zip"
    source.symlink_to(shared_data / "layouts" / source.name)
    ds, other = ZipDataset(form(source)), ZipDataset(shared_data / "layouts" / "mpaditya.zip")
    assert ds.layout == layout and len(ds) == 24
    assert_own_background(ds)
    if layout in ("raguram", "modest"):
        assert sorted(hashes(ds)) == sorted(hashes(other)) and len(set(hashes(ds))) == 24
        assert np.bincount(ds.bg_id)[min(ds.bg_id) :].tolist() == [6] * 4 and len(set(ds.fg_id)) < 13
    else:
        assert hashes(ds) == hashes(other)
        assert (ds.bg_id - min(ds.bg_id)).tolist() == np.repeat(range(4), 6).tolist() and set(ds.fg_id) == {-1}


# Folders and several zips


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_is_as_good_as_the_zip(write_zip, tmp_path, layout, form):
    made = write_zip(tmp_path / "a.zip", layout)
    ds, zipped = ZipDataset(form(tmp_path / "a.zip"), size=24), ZipDataset(tmp_path / "a.zip", size=24)
    assert ds.layout == layout
    assert_same_samples(ds, made)
    assert ds.fg_id.tolist() == zipped.fg_id.tolist()
    for part, indices in split(zipped).items():
        assert split(ds)[part].tolist() == indices.tolist()


@pytest.mark.parametrize("extension", [".jpeg", ".JPG"])
def test_zips_of_a_folder_may_be_deflated_and_hold_a_leading_folder(write_zip, tmp_path, extension):
    options = {"extension": extension, "compression": zipfile.ZIP_DEFLATED, "prefix": "data/"}
    write_zip(tmp_path / "a.zip", "mpaditya", **options)
    folder = repacked(tmp_path / "a.zip", lambda name: (name.split("/")[1], name))
    assert len(list(folder.iterdir())) == 4
    assert hashes(ZipDataset(folder)) == hashes(ZipDataset(tmp_path / "a.zip"))


@pytest.mark.parametrize(
    "names",
    [
        ["._mask.zip", "mask/._bg192_01_fg0001.png"],
        [".ipynb_checkpoints/fg_bg/bg192_01_fg0001.png", "mask/.ipynb_checkpoints/bg192_01_fg0099.png", ".old/b.zip"],
        [".DS_Store", "__MACOSX/fg_bg/._bg192_01_fg0001.png", "mask/Thumbs.db", "notes.txt"],
    ],
    ids=["doubles", "hidden", "litter"],
)
@pytest.mark.parametrize("form", [unpacked, a_zip_for_each_kind])
def test_what_systems_leave_in_folders_is_passed_over(write_zip, encode, tmp_path, form, names):
    made = write_zip(tmp_path / "a.zip", "mpaditya")
    folder = form(tmp_path / "a.zip")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode(np.zeros((9, 9, 3), np.uint8)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_same_samples(ZipDataset(folder, size=24), made)


def test_a_large_file_in_a_folder_does_no_harm(write_zip, tmp_path):
    made = write_zip(tmp_path / "a.zip")
    folder = unpacked(tmp_path / "a.zip")
    with open(folder / "backup.tar", "wb") as file:
        file.truncate(5 * 2**30)  # a hole, which takes no room on the disk
    assert_same_samples(ZipDataset(folder, size=24), made)


@pytest.mark.parametrize("form", [unpacked, a_zip_for_each_kind])
def test_worker_processes_read_folders_and_write_nothing(write_zip, tmp_path, form):
    made = write_zip(tmp_path / "a.zip", "akshat")
    folder = form(tmp_path / "a.zip")
    before = sorted(tmp_path.rglob("*"))
    with nothing_can_be_written():
        ds = ZipDataset(folder, size=24)
        assert_same_samples(ds, made)
        assert_same_samples(pickle.loads(pickle.dumps(ds)), made)
    loader = DataLoader(ds, batch_size=None, num_workers=2, multiprocessing_context="fork")
    for item, sample in zip(loader, made, strict=True):
        np.testing.assert_array_equal((item["depth"][0] * 255).round(), sample["depth"])
    assert sorted(tmp_path.rglob("*")) == before


def test_what_a_worker_receives_of_a_folder_does_not_grow_with_the_pictures(write_zip, tmp_path):
    write_zip(tmp_path / "a.zip", size=96)
    ds = ZipDataset(unpacked(tmp_path / "a.zip"), size=96)
    list(ds)
    assert len(pickle.dumps(ds)) < (tmp_path / "a.zip").stat().st_size / 10


@pytest.mark.parametrize("how", ["path", "variable", "from the project"])
def test_data_zip_takes_a_folder(tmp_path, monkeypatch, how):
    monkeypatch.delenv("DATA_ZIP", raising=False)
    monkeypatch.setattr("helpers.ROOT", tmp_path)
    folder = tmp_path / "mine"
    folder.mkdir()
    if how == "variable":
        monkeypatch.setenv("DATA_ZIP", str(folder))
    assert data_zip({"path": folder, "variable": "", "from the project": "mine"}[how]) == folder


# Bad input


@pytest.mark.parametrize(
    "label, parts",
    [
        (lambda name: name if "Depth" not in name else 'depth.png";"more', ["5 columns"]),
        (lambda name: name.replace("fgbgmask/mask7.", "fgbgmask/mask99."), ["fgbgmask/mask99.png"]),
        (lambda name: name.replace("bg/bg2.", "backgrounds/bg2."), ["backgrounds/bg2.png"]),
        (lambda name: name.replace("fgbg/img7.", "fgbg/img8."), ["fgbg/img8.png", "more than one line"]),
    ],
    ids=["columns", "file", "folder", "twice"],
)
def test_labels_that_do_not_fit_are_named(write_zip, tmp_path, label, parts):
    write_zip(tmp_path / "a.zip", "roshantac", label=label)
    text = message(ValueError, tmp_path / "a.zip")
    assert all(part in text for part in ["label_data.csv", *parts])


@pytest.mark.parametrize(
    "table, part",
    [
        (b"", "label_data.csv"),
        (b"\n\n", "label_data.csv"),
        (b'"bg/bg1.png";"fgbg/img1.png";"fgbgmask/mask1.png"\n', "3"),
        (b'"bg/bg1.png","fgbg/img1.png","fgbgmask/mask1.png","DepthMap/img1.png"\n', ";"),
        (b'"bg/bg1.png' + 140_000 * b"x", "label_data.csv"),
    ],
    ids=["nothing", "blank", "three columns", "commas", "an open quote"],
)
def test_a_table_of_labels_that_cannot_be_read(write_zip, tmp_path, table, part):
    write_zip(tmp_path / "a.zip", "roshantac", files={"label_data.csv": table})
    text = message(ValueError, tmp_path / "a.zip")
    assert "label_data.csv" in text and part in text


def test_a_layout_whose_table_is_missing(write_zip, tmp_path):
    write_zip(tmp_path / "a.zip", "modest")
    assert "label_data.csv" in message(ValueError, tmp_path / "a.zip", layout="roshantac")


@pytest.mark.parametrize(
    "layout, left_out, kind, samples",
    [
        ("mpaditya", "bg_192/bg192_02", "bg", 8),
        ("mpaditya", "mask/bg192_01_fg0003", "mask", 1),
        ("mpaditya", "fg_bg_depth_full/bg192_01_fg0003", "depth", 1),
        ("deepjyoti", "bg/bg_2", "bg", 8),
        ("deepjyoti", "mask/fg_bg_mask_3", "mask", 1),
        ("deepjyoti", "depthmap/depth_3", "depth", 1),
        ("akshat", "bg/bg_002", "bg", 8),
        ("akshat", "fg_bg_mask/bg_001/img_0003", "mask", 1),
        ("akshat", "fg_bg_depth/bg_001/img_0003", "depth", 1),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_sample_of_each_layout_that_is_not_whole(write_zip, tmp_path, layout, left_out, kind, samples):
    made = write_zip(tmp_path / "a.zip", layout, without=[f"{left_out}.png"])
    text = message(ValueError, tmp_path / "a.zip")
    assert f"{samples} of 24 samples have no {kind}" in text
    assert made[8 if kind == "bg" else 2]["name"].rpartition("_")[2] in text


def test_an_unknown_layout_names_all_that_are_known(encode, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("holiday/beach_1.png", encode(np.zeros((9, 9), np.uint8)))
    text = message(ValueError, tmp_path / "a.zip")
    folders = ("bg_192", "fg_bg_depth_full", "depthmap", "label_data.csv")
    assert len(LAYOUTS) == 6 and all(name in text for name in (*LAYOUTS, *folders, "holiday/beach_1.png"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "where, layout", [*itertools.product(["zip"], LAYOUTS), ("folder", "akshat"), ("zips", "mpaditya"), ("zips", "roshantac")]
)
def test_two_files_that_claim_to_be_one_picture(write_zip, encode, tmp_path, where, layout, kind):
    path = tmp_path / "a.zip"
    picture = encode(write_zip(path, layout, samples=[(1, 1, 1), (2, 1, 1)])[0][kind])
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if archive.read(name) == picture)
    if where == "zips":
        path = a_zip_for_each_kind(path)
    with zipfile.ZipFile(path / "again.zip" if where == "zips" else path, "a") as archive:
        archive.writestr(f"copy/{name}", b"x")
    text = message(ValueError, unpacked(path) if where == "folder" else path)
    assert f"copy/{name}" in text and text.count(name) == 2


@pytest.mark.parametrize("names", [[], ["bg/"], [".DS_Store", "__MACOSX/._a.jpg", "bg/Thumbs.db"]], ids=len)
def test_an_empty_folder(tmp_path, names):
    folder = tmp_path / "empty"
    folder.mkdir()
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).mkdir() if name.endswith("/") else (folder / name).touch()
    assert "holds no files" in message(ValueError, folder)


def test_a_broken_zip_in_a_folder_is_named(write_zip, tmp_path):
    write_zip(tmp_path / "a.zip", "mpaditya")
    folder = a_zip_for_each_kind(tmp_path / "a.zip")
    (folder / "mask.zip").write_bytes((folder / "mask.zip").read_bytes()[:-50])
    assert "mask.zip is not a whole zip" in message(ValueError, folder)


@pytest.mark.parametrize("form", [unpacked, a_zip_for_each_kind])
def test_a_picture_in_a_folder_that_cannot_be_decoded_is_named(write_zip, tmp_path, form):
    name = "mask/bg192_01_fg0003.png"
    write_zip(tmp_path / "a.zip", "mpaditya", files={name: b"not a picture"})
    assert f"{name} cannot be read" in message(ValueError, form(tmp_path / "a.zip"))


# Subsets


@pytest.fixture(scope="module")
def grid(write_zip, tmp_path_factory):
    """6 backgrounds x 8 objects x 4 places."""
    path = tmp_path_factory.mktemp("grid") / "grid.zip"
    write_zip(path, samples=itertools.product(range(1, 7), range(1, 9), range(1, 5)), size=6)
    return ZipDataset(path, size=6)


def names_of(ds):
    return [ds.name(i) for i in range(len(ds))]


def assert_part_of(part, whole):
    """The part's samples are some of the whole's, in their order and in the same parts of the split."""
    places = [names_of(whole).index(name) for name in names_of(part)]
    assert places == sorted(set(places)) and part.layout == whole.layout
    assert part.bg_id.tolist() == whole.bg_id[places].tolist() and part.fg_id.tolist() == whole.fg_id[places].tolist()
    for kind, pictures in part.batch(range(len(part))).items():
        assert torch.equal(pictures, whole.batch(places)[kind])
    for name, indices in split(whole).items():
        assert [places[i] for i in split(part)[name]] == [i for i in indices if i in places]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("n", [1, 6, 13, 48, 50, 191])
def test_a_subset_is_spread_over_backgrounds_and_objects(grid, n, seed):
    part = grid.subset(n, seed)
    assert len(part) == len(part.bg_id) == len(part.fg_id) == n
    assert_part_of(part, grid)
    pairs = Counter(zip(part.bg_id.tolist(), part.fg_id.tolist(), strict=True))
    each_bg = [sum(pairs[b, f] for f in range(1, 9)) for b in range(1, 7)]
    each_fg = [sum(pairs[b, f] for b in range(1, 7)) for f in range(1, 9)]
    assert max(each_bg) - min(each_bg) <= 1 and max(each_fg) - min(each_fg) <= 2
    for b in range(1, 7):
        times = [pairs[b, f] for f in range(1, 9)]
        assert max(times) - min(times) <= 1


def test_a_seed_decides_the_subset(grid):
    chosen = {seed: names_of(grid.subset(40, seed)) for seed in range(5)}
    again = ZipDataset(grid.path, size=6)
    assert all(names_of(again.subset(40, seed)) == names for seed, names in chosen.items())
    assert names_of(grid.subset(40)) == chosen[0]
    assert len(set(map(tuple, chosen.values()))) == 5
    assert len(set().union(*chosen.values())) > 100  # of 192: other places too, not one order that starts elsewhere


@pytest.mark.parametrize("n", [0, -1, 193])
def test_a_subset_of_more_or_less_than_there_is(grid, n):
    with pytest.raises(ValueError, match=rf"(^|\s){n}\b.*192"):
        grid.subset(n)


def test_a_subset_of_all_is_all(grid):
    assert names_of(grid.subset(192)) == names_of(grid)


def test_a_subset_of_a_subset(grid):
    first = grid.subset(60, seed=1)
    second = first.subset(24, seed=2)
    assert_part_of(second, first)
    assert sorted(Counter(second.bg_id.tolist()).values()) == [4] * 6
    assert len(set(zip(second.bg_id.tolist(), second.fg_id.tolist(), strict=True))) == 24
    with pytest.raises(ValueError):
        first.subset(61)


def test_a_background_with_few_samples_gives_them_all(write_zip, tmp_path):
    write_zip(tmp_path / "a.zip", samples=[(1, 1, 1), (1, 2, 1), *itertools.product((2, 3, 4), range(1, 6), (1, 2))])
    counts = Counter(ZipDataset(tmp_path / "a.zip").subset(18).bg_id.tolist())
    assert counts.pop(1) == 2 and sorted(counts.values()) == [5, 5, 6]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", [lambda path: path, unpacked, a_zip_for_each_kind], ids=["zip", "folder", "zips"])
def test_a_subset_of_each_layout(write_zip, tmp_path, layout, form):
    """A part alone may not tell which background or object belongs to a sample: the ids are those of the whole."""
    made = write_zip(tmp_path / "a.zip", layout)
    ds = ZipDataset(form(tmp_path / "a.zip"), size=24)
    ds[5]
    part = ds.subset(7)
    assert_part_of(part, ds)
    assert sorted(Counter(part.bg_id.tolist()).values()) == [2, 2, 3]
    chosen = [sample for sample in made if sample["name"] in names_of(part)]
    for same in (part, pickle.loads(pickle.dumps(part))):
        assert_same_samples(same, chosen)


def test_a_subset_neither_reads_nor_copies_pictures(write_zip, tmp_path):
    made = write_zip(tmp_path / "a.zip", size=96)
    names = [f"bg_fg/{sample['name']}.png" for sample in made]
    write_zip(tmp_path / "b.zip", size=96, files=dict.fromkeys(names, b"not a picture"))
    assert len(ZipDataset(tmp_path / "b.zip").subset(20)) == 20
    ds = ZipDataset(tmp_path / "a.zip", size=96)
    list(ds)
    tracemalloc.start()
    ds.subset(20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < (tmp_path / "a.zip").stat().st_size / 10


@pytest.mark.parametrize("numbers", [(0, 1, 2), (0,), ()], ids=len)
def test_where_samples_go_by_their_count_backgrounds_have_to_count_from_one(write_zip, encode, tmp_path, numbers):
    """Else every sample would be given another one's background."""
    made = write_zip(tmp_path / "a.zip", "deepjyoti")
    with zipfile.ZipFile(tmp_path / "a.zip") as old, zipfile.ZipFile(tmp_path / "b.zip", "w") as new:
        for name in old.namelist():
            if not name.startswith("bg/"):
                new.writestr(name, old.read(name))
        for number in numbers:
            new.writestr(f"bg/bg_{number}.png", encode(made[0]["bg"]))
    assert "expected backgrounds from 1 on" in message(ValueError, tmp_path / "b.zip")


def test_a_set_whose_end_is_missing_goes_by_the_recipe_or_is_refused(write_zip, tmp_path):
    samples = [(b, f, n) for b in (1, 2) for f in (1, 2) for n in range(40)]  # 80 samples for each background
    made = write_zip(tmp_path / "a.zip", "deepjyoti", samples=samples)
    folders = ("image/fg_bg_", "mask/fg_bg_mask_", "depthmap/depth_")
    last = {f"{folder}{n}.png" for n in range(156, 161) for folder in folders}
    write_zip(tmp_path / "b.zip", "deepjyoti", samples=samples, without=last)
    ds = ZipDataset(tmp_path / "b.zip", size=24)
    assert ds.bg_id.tolist() == [one["b"] for one in made[:155]] and np.unique(ds.fg_id).tolist() == [0, 1]
    write_zip(tmp_path / "c.zip", "deepjyoti", without={f"{folder}{n}.png" for n in range(18, 25) for folder in folders})
    assert "with the same number of samples" in message(ValueError, tmp_path / "c.zip")  # 17 samples, 3 backgrounds
