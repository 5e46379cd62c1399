"""The six layouts: names, ids, folders and several zips; and how samples are divided."""

import itertools
import unicodedata
import warnings
import zipfile
import zlib

import numpy as np
import pytest
from conftest import encoded
from test_data import assert_same_samples

from helpers import LAYOUTS, ZipDataset, check, split


def as_a_folder(path):
    with zipfile.ZipFile(path) as archive:
        archive.extractall(path.with_suffix(""))
    return path.with_suffix("")


def repacked(path, place):
    """A folder of zips; `place` gives, of a file's name, the name of its new zip and its name in there."""
    path.with_suffix("").mkdir()
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            stem, inner = place(name)
            with zipfile.ZipFile(path.with_suffix("") / f"{stem}.zip", "a") as part:
                part.writestr(inner, archive.read(name))
    return path.with_suffix("")


def a_zip_for_each_kind(path):
    return repacked(path, lambda name: (name.partition("/")[0], name.partition("/")[2] or name))


def three_zips_of_any_files(path):
    return repacked(path, lambda name: (f"part_{zlib.crc32(name.encode()) % 3}", name))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [
    {"prefix": "mask/bg/tiny data/", "compression": zipfile.ZIP_DEFLATED},
    {"zip64": True, "extension": ".PNG", "prefix": "BG_FG/"},
    {"extension": ".webp", "prefix": unicodedata.normalize("NFD", "größe/")},
    {"extension": ".BMP", "compression": zipfile.ZIP_LZMA},
], ids=str)  # fmt: skip
def test_a_zip_of_any_make_gives_the_pictures_that_went_in(write_zip, tmp_path, layout, options):
    made = write_zip(tmp_path / "a.zip", layout, **options)
    ds = ZipDataset(tmp_path / "a.zip", 24)
    assert ds.layout == layout and check(tmp_path / "a.zip") == {}
    assert_same_samples(ds, made)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbers_are_sorted_as_numbers(write_zip, tmp_path, layout):
    backgrounds = range(1, 12) if layout == "deepjyoti" else (9, 10, 999, 1000)
    made = write_zip(tmp_path / "a.zip", layout, samples=itertools.product(backgrounds, (0, 1), (2, 11)))
    assert_same_samples(ZipDataset(tmp_path / "a.zip", 24), made)


def test_a_zip_whose_entries_lie_beyond_4_gib(write_zip, tmp_path):
    with open(tmp_path / "large.zip", "wb") as file:
        file.truncate(2**32 + 12345)  # a hole, which takes no room on the disk
    made = write_zip(tmp_path / "large.zip")
    assert_same_samples(ZipDataset(tmp_path / "large.zip", 24), made)


@pytest.mark.parametrize("prefix", ["C:\\set\\", "..\\..\\"])
@pytest.mark.parametrize("layout", ["modest", "roshantac"])
def test_names_that_windows_wrote_have_backslashes(write_zip, tmp_path, layout, prefix):
    windows = lambda name: name.replace("/", "\\")  # noqa: E731
    made = write_zip(tmp_path / "a.zip", layout, prefix=prefix, label=windows)
    raw = (tmp_path / "a.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        for name in archive.namelist():  # zipfile itself writes no others
            raw = raw.replace(name.encode(), windows(name).encode())
    (tmp_path / "a.zip").write_bytes(raw)
    assert_same_samples(ZipDataset(tmp_path / "a.zip", 24), made)


@pytest.mark.parametrize("form", [lambda path: path, as_a_folder], ids=["zip", "folder"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_systems_leave_behind_is_passed_over(write_zip, tmp_path, layout, form):
    made = write_zip(tmp_path / "a.zip", layout, prefix="set/")
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as archive:
        for folder in {name.rpartition("/")[0] for name in archive.namelist() if name.endswith(".png")}:
            for left in ("._a.png", ".DS_Store", "Thumbs.db", "desktop.ini", ".ipynb_checkpoints/a.png"):
                archive.writestr(f"{folder}/{left}", b"x")
            archive.writestr(f"__MACOSX/{folder}/._a.png", b"x")
        for text in ("set/labels.csv", "label_data.txt", "set/old_label_data.csv"):
            archive.writestr(text, b"a;b")
        archive.writestr("set/empty folder/", b"")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ds = ZipDataset(form(tmp_path / "a.zip"), 24)
    assert ds.layout == layout
    assert_same_samples(ds, made)


def test_a_few_strange_pictures_do_not_decide_the_layout(write_zip, tmp_path):
    strays = dict.fromkeys(["bg_fg/bg001_fg001_01.png", "fg_bg/bg_001/img_0001.png"], b"x")
    made = write_zip(tmp_path / "a.zip", "deepjyoti", files=strays)
    assert_same_samples(ZipDataset(tmp_path / "a.zip", 24), made)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_of_published_sets_differ_from_their_background_at_the_object(shared_data, layout):
    ds = ZipDataset(shared_data / "layouts" / f"{layout}.zip")
    assert ds.layout == layout and np.unique(ds.bg_id, return_counts=True)[1].tolist() == [6] * 4
    assert len(set(ds.fg_id)) in (range(2, 13) if layout in ("raguram", "modest") else [1])
    for item in ds:
        change, inside = (item["fg_bg"] - item["bg"]).abs().mean(0), item["mask"][0] > 0
        assert change[inside].mean() > 4 * change[~inside].mean()


PAIRS = ((0, 84), (0, 45), (0, 22), (1, 87), (1, 63), (2, 0))  # of backgrounds and objects
SETS = {
    "full": (50, [*itertools.product(range(2), range(100), (0,))]),
    "part": (100, [(b, f + mirrored, 0) for b, f in PAIRS for mirrored in (0, 100)]),
    "two objects": (2, [*itertools.product(range(3), range(4), range(3))]),
}


@pytest.mark.parametrize("which", SETS)
@pytest.mark.parametrize("first", [0, 1])
def test_a_mirrored_object_has_the_id_of_the_object(write_zip, tmp_path, which, first):
    objects, samples = SETS[which]
    samples = [(b, f + first, n) for b, f, n in samples]
    made = write_zip(tmp_path / "a.zip", "raguram", samples, size=6)
    expected = [(sample["f"] - first) % objects + first for sample in made]
    assert ZipDataset(tmp_path / "a.zip").fg_id.tolist() == expected


@pytest.mark.parametrize("last", [7, 10**12])
def test_a_set_whose_mirror_images_cannot_be_told_warns(write_zip, tmp_path, last):
    write_zip(tmp_path / "a.zip", "raguram", samples=[(b, f, 1) for b in (1, 2) for f in (0, 1, last)])
    with pytest.warns(UserWarning, match="Mirrored objects"):
        assert len(ZipDataset(tmp_path / "a.zip")) == 6


@pytest.mark.parametrize("layout", ["deepjyoti", "akshat"])
@pytest.mark.parametrize("objects, places", [(1, 40), (2, 40), (2, 30)])
def test_the_place_tells_the_object_where_blocks_are_of_forty(write_zip, tmp_path, layout, objects, places):
    """The recipe: an object at 20 places, then mirrored at the same, then the next one."""
    samples = itertools.product((1, 2), range(objects), range(places))
    made = write_zip(tmp_path / "a.zip", layout, samples, size=6)
    expected = [sample["f"] if places == 40 else -1 for sample in made]
    assert ZipDataset(tmp_path / "a.zip").fg_id.tolist() == expected


def test_objects_are_those_of_the_names_or_unknown(write_zip, tmp_path):
    for layout in ("mpaditya", "roshantac", "modest"):
        made = write_zip(tmp_path / f"{layout}.zip", layout)
        expected = [sample["f"] if layout == "modest" else -1 for sample in made]
        assert ZipDataset(tmp_path / f"{layout}.zip").fg_id.tolist() == expected


@pytest.mark.parametrize("what", ["a background 0", "a background 7", "no last sample"])
def test_samples_counted_on_need_backgrounds_from_one_and_as_many_on_each(write_zip, tmp_path, what):
    """Else a sample would be given another one's background."""
    folders = ("image/fg_bg_", "mask/fg_bg_mask_", "depthmap/depth_")
    last = [f"{folder}24.png" for folder in folders] if what == "no last sample" else []
    files = {f"bg/bg_{what[-1]}.png": b"x"} if what[-1].isdigit() else {}
    write_zip(tmp_path / "a.zip", "deepjyoti", without=last, files=files)
    with pytest.raises(ValueError, match=r"a\.zip: it has 2[34] samples on . backgrounds"):
        ZipDataset(tmp_path / "a.zip")


@pytest.mark.parametrize("form", [as_a_folder, a_zip_for_each_kind, three_zips_of_any_files])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_is_as_good_as_the_zip(write_zip, tmp_path, layout, form):
    made = write_zip(tmp_path / "a.zip", layout)
    ds, zipped = ZipDataset(form(tmp_path / "a.zip"), 24), ZipDataset(tmp_path / "a.zip", 24)
    assert ds.layout == layout and ds.fg_id.tolist() == zipped.fg_id.tolist()
    assert_same_samples(ds, made)
    for part, indices in split(zipped).items():
        assert split(ds)[part].tolist() == indices.tolist()


def test_a_table_and_pictures_may_lie_beside_zips(write_zip, tmp_path):
    made = write_zip(tmp_path / "a.zip", "roshantac")
    folder = a_zip_for_each_kind(tmp_path / "a.zip")
    for name in ("label_data.csv", "bg"):
        zipfile.ZipFile(folder / f"{name}.zip").extractall(folder / ("" if "." in name else name))
        (folder / f"{name}.zip").unlink()
    assert_same_samples(ZipDataset(folder, 24), made)


def test_of_pictures_and_a_zip_in_a_folder_the_pictures_are_taken_with_a_word(write_zip, tmp_path):
    made = write_zip(tmp_path / "a.zip")
    folder = as_a_folder(tmp_path / "a.zip")
    (tmp_path / "a.zip").rename(folder / "old.zip")
    made[0]["mask"] = np.full_like(made[0]["mask"], 255)  # corrected since
    (folder / "bg_fg_mask/bg001_fg001_01_mask.png").write_bytes(encoded(made[0]["mask"]))
    with pytest.warns(UserWarning, match=r"its pictures are read, and old\.zip beside them is not"):
        assert_same_samples(ZipDataset(folder, 24), made)


class Listing:
    """The ids of a data set without its pictures: every background with every object, `places` times."""

    def __init__(self, backgrounds, objects, places=1):
        samples = itertools.product(backgrounds, objects, range(places))
        self.bg_id, self.fg_id, self.place = np.array([*samples]).T

    def __len__(self):
        return len(self.bg_id)

    def name(self, i):
        return f"bg{self.bg_id[i]}_fg{self.fg_id[i]}_{self.place[i]}"


HUNDRED = Listing(range(100), range(100))
PARTS = ["train", "valid", "valid_new", "test_seen", "test_new_bg", "test_new_fg", "test_new_both"]


@pytest.mark.parametrize("seed", range(3))
def test_parts_have_the_pairs_that_they_promise_and_no_background_or_object_leaks(seed):
    """Every background meets every object, so that the groups' sizes give the exact size of each part."""
    parts = split(HUNDRED, seed=seed)
    assert list(parts) == PARTS
    together = np.concatenate(list(parts.values()))
    assert len(together) == len(np.unique(together)) and together.min() >= 0 and together.max() < len(HUNDRED)
    sizes = []
    for ids, new in ((HUNDRED.bg_id, "test_new_bg"), (HUNDRED.fg_id, "test_new_fg")):
        train, test = set(ids[parts["train"]]), set(ids[parts["test_new_both"]])
        assert set(ids[parts["test_seen"]]) == set(ids[parts["valid"]]) == train
        assert set(ids[parts[new]]) == test
        assert not test & (train | set(ids[parts["valid_new"]])) and set(ids[parts["valid_new"]]) > train
        assert len(train) == pytest.approx(70, abs=3) and len(test) == pytest.approx(15, abs=3)
        sizes.append((len(train), 100 - len(train) - len(test), len(test)))
    (bg, valid_bg, test_bg), (fg, valid_fg, test_fg) = sizes
    assert len(parts["test_new_both"]) == test_bg * test_fg
    assert len(parts["test_new_bg"]) == test_bg * fg and len(parts["test_new_fg"]) == bg * test_fg
    assert len(parts["valid_new"]) == (bg + valid_bg) * (fg + valid_fg) - bg * fg
    assert sum(len(parts[part]) for part in ("train", "valid", "test_seen")) == bg * fg
    for part, share in (("train", 0.8), ("valid", 0.1), ("test_seen", 0.1)):
        assert len(parts[part]) / (bg * fg) == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("count", [12, 13, 20, 33])
def test_no_part_is_empty_from_twelve_on(count, first):
    ds = Listing(range(first, first + count), range(first, first + count), places=3)
    assert all(len(part) for seed in range(10) for part in split(ds, seed=seed).values())


@pytest.mark.parametrize(
    "smaller",
    [Listing(range(30), range(100)), Listing(range(100), range(40, 70)), Listing(range(12, 90, 5), range(7))],
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


@pytest.mark.parametrize("ids", [-1, 0, 7])
@pytest.mark.parametrize("kind", ["bg", "fg"])
def test_unknown_ids_and_a_single_one_count_as_training(kind, ids):
    for seed in range(5):
        parts = split(Listing(*((range(40), [ids]) if kind == "fg" else ([ids], range(40))), 10), seed=seed)
        assert {part for part in PARTS if not len(parts[part])} == {f"test_new_{kind}", "test_new_both"}


@pytest.mark.parametrize("count", [1, 100, 101, 1000])
def test_image_split_is_a_partition_of_70_15_15(count):
    parts = split(Listing(range(count), [1]), by="image")
    assert list(parts) == ["train", "valid", "test"]
    assert sorted(np.concatenate(list(parts.values()))) == list(range(count))
    for part, share in zip(parts.values(), (0.7, 0.15, 0.15), strict=True):
        assert len(part) == pytest.approx(share * count, abs=1)
