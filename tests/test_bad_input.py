"""Files that are not as they should be, and tables: read rightly, or refused by name, or left out."""

import gzip
import itertools
import re
import struct
import unicodedata
import zipfile

import matplotlib
import numpy as np
import pytest
from conftest import FILE_NAMES, draw, encoded
from PIL import Image, ImageFilter
from test_data import as_uint8, assert_same_samples
from test_layouts import a_zip_for_each_kind, as_a_folder

from helpers import KINDS, LAYOUTS, ZipDataset, check, read_picture, split

pytestmark = pytest.mark.usefixtures("cache")
# The files and the pictures of one of 24 samples.
STEMS = FILE_NAMES["modest"].format(b=2, f=3, n=1).split()
NAMES = {kind: f"{stem}.png" for kind, stem in zip(KINDS, STEMS, strict=True)}
SAMPLE = "bg002_fg003_01"
PICTURE = draw(2, 3, 1, 24)
COLOUR, GREY, MASK = (Image.fromarray(PICTURE[kind]) for kind in ("fg_bg", "depth", "mask"))


def message(path):
    """The sentence that refuses it, which names the set."""
    with pytest.raises(ValueError) as caught:
        list(ZipDataset(path, 24))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value).strip()
    return str(caught.value)


def theirs(made, kind):
    """The samples that need the file of this kind."""
    return [one["name"] for one in made if one["name"] == SAMPLE or (kind == "bg" and one["b"] == 2)]


def assert_found(path, made, defects, left_out=(SAMPLE,)):
    """A first use stops at one of these {file name: what is wrong}, `check` finds them and no others, and all
    samples but those that are left out can be had."""
    text, found = message(path), check(path)
    assert any(name in text and what in text for name, what in defects.items())
    assert set(found) == set(defects) and all(what in found[name] for name, what in defects.items())
    ds = ZipDataset(path, 24, defects="leave_out")
    assert ds.left_out == found
    assert_same_samples(ds, [sample for sample in made if sample["name"] not in left_out])
    assert ZipDataset(path, 24, defects="leave_out").fingerprint == ds.fingerprint


# Pictures


def with_alpha(picture, extension=".png", alpha=254):
    picture = picture.copy()
    picture.putalpha(Image.fromarray(np.where(PICTURE["mask"] > 0, alpha, 255).astype(np.uint8)))
    return encoded(picture, extension)


def palette(alpha):
    return encoded(COLOUR.quantize(16), transparency=bytes([255] * 3 + [alpha] + [255] * 12))


def in_colours(name, extension=".png"):
    levels = matplotlib.colormaps[name](PICTURE["depth"], bytes=True)
    return encoded(np.ascontiguousarray(levels[..., :3]), extension)


def mask_of_two(one, other):
    """Two objects, each in its colour."""
    left, inside = np.arange(24)[:, None] <= np.median(np.nonzero(PICTURE["mask"])[1]), PICTURE["mask"] > 0
    return encoded(np.uint8(inside[..., None] * np.where(left, one, other)))


JPEG = encoded(COLOUR, ".jpg", quality=95)
REFUSED = {
    "nothing": ("fg_bg", b"", "none of JPEG, PNG"),
    "postscript": ("fg_bg", encoded(COLOUR, ".eps"), "none of JPEG, PNG"),
    "a png cut short": ("depth", encoded(COLOUR)[:-200], "truncated"),
    "a jpeg cut short": ("fg_bg", JPEG[:-100], "remature end"),
    "a jpeg cut short but closed": ("fg_bg", JPEG[:-100] + b"\xff\xd9", "remature end"),
    "16 bits": ("depth", encoded(PICTURE["depth"] * np.uint16(99)), "more than 8 bits"),
    "floats": ("depth", encoded(np.float32(PICTURE["depth"]), ".tiff"), "more than 8 bits"),
    "transparent colours": ("fg_bg", with_alpha(COLOUR), "transparent in parts"),
    "transparent grey": ("depth", with_alpha(GREY, alpha=0), "transparent in parts"),
    "a transparent palette": ("fg_bg", palette(0), "transparent in parts"),
    "transparent webp": ("fg_bg", with_alpha(COLOUR, ".webp", 100), "transparent in parts"),
    "one colour transparent": ("depth", encoded(GREY, transparency=255), "transparent in parts"),
    **{name: ("depth", in_colours(name), "in colours") for name in ("jet", "turbo", "Spectral_r")},
    "jet in a jpeg": ("depth", in_colours("jet", ".jpg"), "in colours"),
    "a mask in white and red": ("mask", mask_of_two((255, 255, 255), (255, 0, 0)), "in colours"),
    "a mask in yellow and blue": ("mask", mask_of_two((255, 255, 0), (0, 0, 255)), "in colours"),
    "a mask of three levels": ("mask", mask_of_two((255,) * 3, (100,) * 3), "pixels are grey"),
    "a mask of light grey": ("mask", encoded(PICTURE["mask"] // 255 * 150), "pixels are grey"),
    "a mask of noise": ("mask", encoded(PICTURE["bg"][..., 0]), "pixels are grey"),
    "a mask of 0 and 1": ("mask", encoded(PICTURE["mask"] // 255), "brightest pixel is 1,"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_picture_that_is_no_good_is_refused_by_name_or_left_out(write_zip, tmp_path, case):
    kind, raw, reason = REFUSED[case]
    made = write_zip(tmp_path / "a.zip", files={NAMES[kind]: raw})
    assert_found(tmp_path / "a.zip", made, {NAMES[kind]: reason})


READ = {
    "a palette": ("fg_bg", encoded(COLOUR.quantize(16)), COLOUR.quantize(16).convert("RGB")),
    "a palette of opaque colours": ("fg_bg", palette(255), COLOUR.quantize(16).convert("RGB")),
    "opaque alpha": ("fg_bg", with_alpha(COLOUR, alpha=255), COLOUR),
    "opaque alpha of grey": ("depth", with_alpha(GREY, alpha=255), GREY),
    "grey in colours": ("depth", encoded(GREY.convert("RGB")), GREY),
    "a mask in colours": ("mask", encoded(MASK.convert("RGB")), MASK),
    "a mask of a palette": ("mask", encoded(MASK.convert("P")), MASK),
    "a mask of one bit": ("mask", encoded(MASK.convert("1")), MASK),
    "a mask that is empty": ("mask", encoded(PICTURE["mask"] * 0), PICTURE["mask"] * 0),
    "bmp": ("fg_bg", encoded(COLOUR, ".bmp"), COLOUR),
    "gif": ("depth", encoded(GREY, ".gif"), GREY),
    "webp": ("fg_bg", encoded(COLOUR, ".webp"), COLOUR),
    "tiff": ("fg_bg", encoded(COLOUR, ".tiff"), COLOUR),
}


@pytest.mark.parametrize("case", READ)
def test_a_picture_of_another_make_is_read(write_zip, tmp_path, case):
    """Whatever the ending of its name says."""
    kind, raw, expected = READ[case]
    made = write_zip(tmp_path / "a.zip", files={NAMES[kind]: raw})
    assert check(tmp_path / "a.zip") == {}
    made[[sample["name"] for sample in made].index(SAMPLE)][kind] = np.asarray(expected)
    assert_same_samples(ZipDataset(tmp_path / "a.zip", 24), made)


@pytest.mark.parametrize("turn, way", [*enumerate(["", "c", "rc", "r", "s", "sr", "src", "sc"], 1)])
@pytest.mark.parametrize("extension", [".jpg", ".png", ".webp"])
def test_pictures_stand_upright_in_each_way_that_a_camera_may_note(write_zip, tmp_path, turn, way, extension):
    """Exif's orientations: sides swapped, then rows and columns reversed."""
    exif = Image.Exif()
    exif[0x112] = turn

    def lying(picture):
        picture = picture.swapaxes(0, 1) if "s" in way else picture
        picture = picture[:: -1 if "r" in way else 1, :: -1 if "c" in way else 1]
        return encoded(np.ascontiguousarray(picture), extension, exif=exif, quality=95)

    smooth = np.kron(PICTURE["bg"][:6, :8], np.ones((8, 8, 1), np.uint8))
    assert np.abs(read_picture(lying(smooth)) - smooth.astype(int)).mean() < 12
    change = lambda kind, p, *_: lying(p) if kind[-1] == "g" else None  # noqa: E731
    write_zip(tmp_path / "a.zip", size=48, change=change)
    item = ZipDataset(tmp_path / "a.zip", 48)[0]
    changed, mask = (item["fg_bg"] - item["bg"]).abs().amax(0) > 0.07, item["mask"][0] > 0
    assert (changed & mask).sum() > 0.8 * (changed | mask).sum()


@pytest.mark.parametrize("extension, quality", [(".png", 0), (".jpg", 75), (".jpg", 40), (".webp", 75)])
@pytest.mark.parametrize("radius", [0.5, 1])
def test_masks_with_soft_edges_and_smeared_by_jpeg_are_masks(write_zip, tmp_path, extension, quality, radius):
    def change(kind, picture, *_):
        soft = Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius))
        return encoded(soft, extension, quality=quality, lossless=False) if kind == "mask" else None

    write_zip(tmp_path / "a.zip", size=64, change=change)
    assert check(tmp_path / "a.zip") == {}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind, times", [("fg_bg", 2), ("fg_bg", 9), ("mask", 2), ("depth", 2)])
def test_a_picture_over_the_limit_of_pixels_is_refused(write_zip, tmp_path, monkeypatch, kind, times):
    """By Pillow, where it is over twice the limit, else by our own."""
    large = encoded(np.concatenate([PICTURE[kind]] * times))
    made = write_zip(tmp_path / "a.zip", files={NAMES[kind]: large})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 25)
    assert_found(tmp_path / "a.zip", made, {NAMES[kind]: "600 pixels"})
    with pytest.raises(ValueError, match=r"^it has .* 600 pixels"):
        read_picture(encoded(np.zeros((30, 30, 3), np.uint8), ".jpg"))


@pytest.mark.parametrize("wrong", [lambda p: 255 - p, lambda p: np.roll(p, 12, (0, 1))])
@pytest.mark.parametrize("backgrounds", [(1, 2, 3), (3,)])
def test_masks_that_mark_what_did_not_change_are_found(write_zip, tmp_path, wrong, backgrounds):
    change = lambda kind, p, b, *_: kind == "mask" and b in backgrounds and encoded(wrong(p))  # noqa: E731
    made = write_zip(tmp_path / "a.zip", change=change)
    names = [f"bg_fg_mask/{one['name']}_mask.png" for one in made if one["b"] in backgrounds]
    assert set(found := check(tmp_path / "a.zip")) == set(names) and "alike" in found[names[0]]


@pytest.mark.parametrize("form", [lambda path: path, as_a_folder, a_zip_for_each_kind])
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_picture_is_named_wherever_it_is(write_zip, tmp_path, kind, form):
    made = write_zip(tmp_path / "a.zip", files={NAMES[kind]: b""})
    path = form(tmp_path / "a.zip")
    name = next(name for name in ZipDataset(path).names if name.endswith(NAMES[kind].partition("/")[2]))
    assert_found(path, made, {name: "none of JPEG"}, theirs(made, kind))
    assert ZipDataset(path).fingerprint != ZipDataset(path, defects="leave_out").fingerprint


@pytest.mark.parametrize("kind", ["bg", "mask", "depth"])
def test_a_missing_file_is_named_by_its_samples(write_zip, tmp_path, kind):
    made = write_zip(tmp_path / "a.zip", without=[NAMES[kind]])
    defects = {f"bg_fg/{name}.png": f"has no {kind}" for name in theirs(made, kind)}
    assert_found(tmp_path / "a.zip", made, defects, theirs(made, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_two_files_that_claim_to_be_one_picture_are_named_and_none_is_taken(write_zip, tmp_path, kind):
    made = write_zip(tmp_path / "a.zip", files={f"copy/{NAMES[kind]}": encoded(PICTURE[kind])})
    defects = dict.fromkeys((NAMES[kind], f"copy/{NAMES[kind]}"), f"claims to be one {kind}")
    assert_found(tmp_path / "a.zip", made, defects, theirs(made, kind))


def test_the_report_counts_what_is_there(write_zip, tmp_path, capsys):
    broken = {f"bg_fg/bg001_fg00{f}_01.png": b"" for f in (1, 2, 3, 4)}
    write_zip(tmp_path / "a.zip", files=broken)
    assert len(check(tmp_path / "a.zip")) == 4
    text = capsys.readouterr().out
    parts = "layout modest; 75 files; 20 s; 3 backgrounds; 4 objects; 4 defects; 4 x cannot be"
    assert all(part in text for part in parts.split("; "))
    assert sum(name in text for name in broken) == 3 and "and more" in text
    rng = np.random.default_rng(0)  # objects as faint as the noise are no defects
    faint = lambda kind, p, *_: kind[-1] == "g" and encoded(rng.integers(0, 40, p.shape, np.uint8))  # noqa: E731
    write_zip(tmp_path / "b.zip", "mpaditya", size=64, change=faint)
    assert check(tmp_path / "b.zip") == {}
    assert len({ZipDataset(tmp_path / "b.zip", defects=of).fingerprint for of in ("stop", "leave_out")}) == 1
    assert "an unknown number of objects, no defects" in capsys.readouterr().out
    write_zip(tmp_path / "c.zip", without=[f"bg/bg00{b}.png" for b in (1, 2, 3)])
    assert list(check(tmp_path / "c.zip").values()) == ["has no bg."] * 24


# What is no set


def split_zip(path, whole, size):
    """Parts as zip -s writes them: an entry's place counts within its part, whose number stands beside it."""
    data = bytearray(whole.read_bytes())
    at = start = zipfile.ZipFile(whole).start_dir
    while data[at : at + 4] == b"PK\1\2":
        offset = struct.unpack_from("<L", data, at + 42)[0]
        struct.pack_into("<H", data, at + 34, offset // size)
        struct.pack_into("<L", data, at + 42, offset % size)
        at += 46 + sum(struct.unpack_from("<HHH", data, at + 28))
    struct.pack_into("<HH", data, at + 4, start // size, start // size)
    struct.pack_into("<L", data, at + 16, start % size)
    for k in range(start // size):
        path.with_suffix(f".z{k + 1:02}").write_bytes(data[k * size : (k + 1) * size])
    path.write_bytes(data[start // size * size :])
    return bytes(data)


def test_what_is_given_in_place_of_a_zip_is_called_what_it_is(write_zip, tmp_path):
    write_zip(tmp_path / "whole.zip")
    whole = (tmp_path / "whole.zip").read_bytes()
    joined = split_zip(tmp_path / "parts.zip", tmp_path / "whole.zip", 20_000)
    content = {
        "page.zip": (b"\n<!DOCTYPE html><html><title>Virus scan warning</title></html>", "a web page"),
        "set.tar.gz": (gzip.compress(whole), "unpack it"),
        "set.rar": (b"Rar!\x1a\x07\x01\x00" + bytes(4000), "a rar archive: unpack it"),
        "joined.zip": (joined, "parts joined: make"),
        "parts.zip": ((tmp_path / "parts.zip").read_bytes(), "one part of a split zip"),
        "parts.z01": ((tmp_path / "parts.z01").read_bytes(), "one part of a split zip"),
        "cut.zip": (whole[:-1000], "not a whole zip"),
        "half.zip": (whole[: len(whole) // 2], "not a whole zip"),
        "empty.zip": (b"", "not a whole zip"),
    }
    for name, (data, what) in content.items():
        (tmp_path / name).write_bytes(data)
        assert what in message(tmp_path / name), name


@pytest.mark.parametrize("names", [[], ["bg/"], [".DS_Store", "__MACOSX/._a.jpg", "bg/Thumbs.db"]], ids=len)
def test_what_holds_no_files_is_refused(tmp_path, names):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    (tmp_path / "a").mkdir()
    for path in (tmp_path / "a.zip", as_a_folder(tmp_path / "a.zip")):
        assert "holds no files" in message(path)


def test_what_is_not_there_and_what_has_no_layout(tmp_path):
    for use in (ZipDataset, check):
        with pytest.raises(FileNotFoundError, match=r"none\.zip: there is no such file"):
            use(tmp_path / "none.zip")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("holiday/beach_1.jpg", b"x")
    text = message(tmp_path / "a.zip")
    assert "holiday" in text and all(name in text for name in LAYOUTS)


@pytest.mark.parametrize("at, value, what", [(8, 1, "encrypted"), (10, 77, "compression"), (16, 1, "CRC")])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_entry_that_cannot_be_unpacked_is_named(write_zip, tmp_path, compression, at, value, what):
    made = write_zip(tmp_path / "a.zip", compression=compression)
    data = bytearray((tmp_path / "a.zip").read_bytes())
    struct.pack_into("<H", data, data.rindex(NAMES["mask"].encode()) - 46 + at, value)  # in the directory
    (tmp_path / "a.zip").write_bytes(data)
    assert_found(tmp_path / "a.zip", made, {NAMES["mask"]: what})


def test_a_choice_that_is_unknown_lists_the_known(sample):
    for option, known in (("layout", "modest"), ("depth_near", "dark"), ("defects", "leave_out")):
        with pytest.raises(ValueError, match=rf"^Unknown .* 'it'\. Known: .*{known}"):
            ZipDataset(sample, **{option: "it"})
    with pytest.raises(ValueError, match=r"Unknown split 'it'\. Known: unseen, image"):
        split(ZipDataset(sample), by="it")


# The table of labels


@pytest.mark.parametrize("begin", ["Dataset/", "./", "/content/drive/My Drive/Dataset/", ".\\", "C:\\Data\\"])
@pytest.mark.parametrize("prefix", ["", "a/Dataset/"])
def test_labels_may_name_the_files_from_elsewhere(write_zip, tmp_path, begin, prefix):
    divider = "\\" if "\\" in begin else "/"
    label = lambda name: begin + name.removeprefix(prefix).replace("/", divider)  # noqa: E731
    made = write_zip(tmp_path / "a.zip", "roshantac", prefix=prefix, label=label)
    assert_same_samples(ZipDataset(tmp_path / "a.zip", 24), made)


def with_table(write_zip, path, edit, prefix=""):
    """A set of the layout roshantac whose table has become what `edit` makes of its text."""
    first, table = path.with_suffix(".first"), f"{prefix}label_data.csv"
    write_zip(first, "roshantac", prefix=prefix)
    text = edit(zipfile.ZipFile(first).read(table).decode())
    return write_zip(path, "roshantac", prefix=prefix, files={table: text.encode()})


SPREADSHEETS = {
    "tabs": lambda text: text.replace(";", "\t"),
    "commas": lambda text: text.replace(";", ","),
    "windows": lambda text: "\ufeff" + text.replace("\n", "\r\n").replace('"', ""),
    "upper case": str.upper,
    "decomposed": lambda text: unicodedata.normalize("NFD", text),
    "composed": lambda text: unicodedata.normalize("NFC", text),
}


@pytest.mark.parametrize("edit", SPREADSHEETS.values(), ids=SPREADSHEETS)
def test_tables_as_spreadsheets_save_them(write_zip, tmp_path, edit):
    made = with_table(write_zip, tmp_path / "a.zip", edit, prefix=unicodedata.normalize("NFD", "größe/"))
    assert_same_samples(ZipDataset(tmp_path / "a.zip", 24), made)


@pytest.mark.parametrize("begin", ["", "home/set/"])
def test_paths_of_a_table_are_told_apart_by_as_many_folders_as_that_takes(write_zip, tmp_path, begin):
    """bg_001/img_0001.png stands in the folders of three kinds."""
    made, lines, count = write_zip(tmp_path / "a.zip", "akshat"), [], itertools.count()
    for b, i in ((sample["b"], 1 + next(count) % 8) for sample in made):
        files = [f"{kind}/bg_{b:03}/img_{i:04}.png" for kind in ("fg_bg", "fg_bg_mask", "fg_bg_depth")]
        lines.append(";".join(begin + file for file in (f"bg/bg_{b:03}.png", *files)))
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as archive:
        archive.writestr("label_data.csv", "\n".join(lines))
    ds = ZipDataset(tmp_path / "a.zip", 24)
    made = [sample | {"name": sample["name"].rpartition("bg_")[2].partition("_")[2]} for sample in made]
    assert ds.layout == "roshantac"
    assert_same_samples(ds, made)


@pytest.mark.parametrize(
    "old, new, named",
    [
        ("fgbgmask/mask7.", "fgbgmask/mask99.", r"fgbgmask/mask99\.png .* not at all"),
        ("DepthMap/img7.", "img7.", r"img7\.png .* more than once"),
        ("fgbg/img7.", "fgbg/img8.", r"fgbg/img8\.png .* more than one line"),
        ("bg/bg2.", "bg/none.", r"bg/none\.png .* n"),
        ("fgbg/img7.png", 'fgbg/img7.png";"more', ".*xpected 4 fields"),
        ("img", 'img";"', "its table has 6 columns"),
        *((r"(?s)\A.*\Z", text, "") for text in ("", " ", "a;b;c", '"bg/bg1.png' + 9999 * "x")),
    ],
    ids=itertools.count(),
)
def test_a_table_that_does_not_fit_is_refused_by_what_is_wrong(write_zip, tmp_path, old, new, named):
    with_table(write_zip, tmp_path / "a.zip", lambda text: re.sub(old, new, text))
    assert re.search(rf"a\.zip: {named}", message(tmp_path / "a.zip"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["modest", "deepjyoti", "roshantac"])
@pytest.mark.parametrize("seed", range(20))
def test_random_damage_ends_in_samples_or_in_a_sentence(write_zip, tmp_path, seed, layout):
    """Bits that flip, bytes that are gone, half of the time where the zip's directory is."""
    rng, samples = np.random.default_rng([seed, len(layout)]), itertools.product((1, 2), (1, 2), (1,))
    made = write_zip(tmp_path / "a.zip", layout, samples, compression=8 * (seed % 2))  # stored, deflated
    data = bytearray((tmp_path / "a.zip").read_bytes())
    start = data.index(b"PK\1\2") if seed % 4 < 2 else 0
    for at in sorted(rng.integers(start, len(data), rng.integers(1, 4)).tolist(), reverse=True):
        if rng.random() < 0.8:
            data[at] ^= 1 << rng.integers(8)
        else:
            del data[at : at + int(rng.integers(1, 40))]
    (tmp_path / "a.zip").write_bytes(data)
    truth = {sample["name"]: sample for sample in made}
    for defects in ("stop", "leave_out"):
        try:
            ds = ZipDataset(tmp_path / "a.zip", 24, defects=defects)
            found = {ds.name(i): as_uint8(ds, i) for i in range(len(ds))}
        except (ValueError, FileNotFoundError) as error:
            assert str(tmp_path / "a.zip") in str(error)
            continue
        for name in set(found) & set(truth) if layout == "modest" else ():
            assert all((picture == truth[name][kind]).all() for kind, picture in found[name].items())
