"""Broken and hostile files: each kind by itself, against what is known to be in it; and thousands of random damages."""

import contextlib
import faulthandler
import io
import itertools
import json
import os
import re
import struct
import subprocess
import sys
import threading
import traceback
import tracemalloc
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from conftest import FILE_NAMES, ROOT, draw, encoded, make_zip
from PIL import Image
from test_data import as_uint8, assert_same_samples, message
from test_layouts import a_zip_for_each_kind, unpacked

import helpers
from helpers import CHANNELS, KINDS, ZipDataset, check

NAMES = {kind: name.format(b=2, f=3, n=1) + ".png" for kind, name in FILE_NAMES["modest"].items()}  # of one sample of 24
SAMPLE = "bg002_fg003_01"


def saved(picture, form="PNG", **options):
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def field(path, name, **values):
    """Writes numbers into the header of a file in the zip's directory."""
    places = {"flags": (8, "<H"), "method": (10, "<H"), "crc": (16, "<L"), "size": (20, "<L"), "unpacked": (24, "<L")}
    data = bytearray(path.read_bytes())
    header = data.rindex(name.encode()) - 46
    for what, value in values.items():
        at, form = places[what]
        struct.pack_into(form, data, header + at, value)
    path.write_bytes(data)


def assert_handled(path, made, name, reason, left_out=(SAMPLE,)):
    """The first use stops by the file's name and the reason, `check` finds just that, and all other samples can be had."""
    text = message(ValueError, path, size=24)
    assert name in text and re.search(reason, text) and text.endswith(".")
    found = check(path)
    assert list(found) == [name] and re.search(reason, f"{name} {found[name]}")
    ds = ZipDataset(path, size=24, defects="leave_out")
    assert_same_samples(ds, [sample for sample in made if sample["name"] not in left_out])
    assert len(ds) == 24 - len(left_out) and ds.left_out == found
    return ds


# Pictures

PICTURE = draw(2, 3, 1, 24)


def png_that_claims(width, height):
    """The header, right in itself, and no more than a few bytes of pixels."""
    head = b"IHDR" + struct.pack(">LLBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [head, b"IDAT" + zlib.compress(bytes(100)), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">L", len(c) - 4) + c + struct.pack(">L", zlib.crc32(c)) for c in chunks)


def jpeg_that_claims(width, height):
    data = bytearray(saved(Image.fromarray(PICTURE["bg"]), "JPEG"))
    struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, height, width)
    return bytes(data)


def transparent(mode, form="PNG", alpha=254):
    picture = Image.fromarray(PICTURE["fg_bg"]).convert(mode)
    picture.putalpha(Image.fromarray(np.where(PICTURE["mask"] > 0, alpha, 255).astype(np.uint8)))
    return saved(picture, form)


def transparent_palette(alpha=0):
    picture = Image.fromarray(PICTURE["fg_bg"]).quantize(16)
    return saved(picture, transparency=bytes([255] * 3 + [alpha] + [255] * 12))


def jpeg_of_scans(count):
    """A large progressive JPEG whose last scan is there again and again."""
    data = saved(Image.new("RGB", (1100, 1000), "red"), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * (1 + count - data.count(b"\xff\xda")) + data[-2:]


JPEG = saved(Image.fromarray(PICTURE["fg_bg"]), "JPEG", quality=95)
GREY = np.full((24, 24), 255, np.uint8)
GREY.flat[: 24 * 12 + 1] = np.resize(np.arange(64, 192), 24 * 12 + 1)
HALF_GREY = np.where(GREY == 64, 255, GREY).astype(np.uint8)
REFUSED = {
    "nothing": ("fg_bg", b"", "cannot be read as a picture"),
    "a png's header": ("fg_bg", encoded(PICTURE["fg_bg"])[:50], "cannot be read as a picture"),
    "a png cut short": ("depth", encoded(PICTURE["bg"])[:-200], "truncated"),
    "a jpeg cut short": ("fg_bg", JPEG[:-100], "cannot be read as a picture"),
    "a jpeg cut short but closed": ("fg_bg", JPEG[:-100] + b"\xff\xd9", "cannot be read as a picture"),
    "a png bomb": ("fg_bg", png_that_claims(60_000, 60_000), "60000 x 60000|decompression bomb|exceeds limit"),
    "a png just too large": ("mask", png_that_claims(8193, 8192), "8193 x 8192 pixels"),
    "a jpeg bomb": ("fg_bg", jpeg_that_claims(60_000, 60_000), "60000 x 60000 pixels"),
    "a jpeg of a mask, just too large": ("mask", jpeg_that_claims(8192, 8193), "8192 x 8193 pixels"),
    "16 bits of grey": ("depth", encoded(np.full((24, 24), 30_000, np.uint16)), "16 bits"),
    "transparent colours": ("fg_bg", transparent("RGB"), "transparent in parts"),
    "transparent grey": ("depth", transparent("L", alpha=0), "transparent in parts"),
    "a transparent palette": ("fg_bg", transparent_palette(), "transparent in parts"),
    "transparent webp": ("fg_bg", transparent("RGB", "WEBP", 100), "transparent in parts"),
    "one colour transparent": ("depth", saved(Image.fromarray(PICTURE["depth"]), transparency=255), "transparent in parts"),
    "a mask of grey": ("mask", encoded(GREY), "most of it, or of its object, is grey"),
    "a mask of 0 and 1": ("mask", encoded(PICTURE["mask"] // 255), "brightest pixel is 1,"),
    "a mask in red": (
        "mask",
        saved(Image.merge("RGB", [Image.fromarray(PICTURE["mask"])] + [Image.new("L", (24, 24))] * 2)),
        "is 76,",
    ),
    "a mask in light grey": ("mask", encoded(PICTURE["mask"] // 255 * 150), "of its object, is grey"),
    "a jpeg of countless scans": ("fg_bg", jpeg_of_scans(1500), "more than 100 scans"),
    "postscript": ("fg_bg", saved(Image.fromarray(PICTURE["fg_bg"]), "EPS"), "none of PNG, JPEG"),
    "tiff": ("fg_bg", saved(Image.fromarray(PICTURE["fg_bg"]), "TIFF"), "none of PNG, JPEG"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_that_is_refused_by_name_or_left_out(write_zip, tmp_path, case):
    kind, raw, reason = REFUSED[case]
    made = write_zip(tmp_path / "a.zip", files={NAMES[kind]: raw})
    assert_handled(tmp_path / "a.zip", made, NAMES[kind], reason)


def test_a_broken_background_takes_its_samples_along(write_zip, tmp_path):
    made = write_zip(tmp_path / "a.zip", files={"bg/bg002.png": b""})
    theirs = [sample["name"] for sample in made if sample["b"] == 2]
    assert len(theirs) == 8
    assert_handled(tmp_path / "a.zip", made, "bg/bg002.png", "none of PNG", theirs)


@pytest.mark.parametrize("raw", [REFUSED["a png bomb"][1], REFUSED["a jpeg bomb"][1]], ids=["png", "jpeg"])
def test_no_room_is_taken_for_a_picture_that_claims_to_be_huge(write_zip, tmp_path, raw, monkeypatch):
    write_zip(tmp_path / "a.zip", files={NAMES["fg_bg"]: raw})
    empty, shapes = torch.empty, []
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: shapes.append(shape) or empty(*shape, **options))
    with pytest.raises(ValueError):
        ZipDataset(tmp_path / "a.zip", size=24).batch(range(24))
    assert shapes and max(np.prod(shape) for shape in shapes) <= 24**3 * 3


def colours_of_16_bits():
    """Of which the high bytes are the picture. Pillow cannot write them."""
    wide = (PICTURE["fg_bg"] * np.uint16(256) + np.uint16(77)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in wide)
    chunks = [b"IHDR" + struct.pack(">LLBBBBB", 24, 24, 16, 2, 0, 0, 0), b"IDAT" + zlib.compress(rows), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">L", len(c) - 4) + c + struct.pack(">L", zlib.crc32(c)) for c in chunks)


ALIKE = Image.fromarray(PICTURE["fg_bg"])
READ = {
    "16 bits of colour": ("fg_bg", colours_of_16_bits(), ALIKE),
    "a palette": ("fg_bg", saved(ALIKE.quantize(16)), ALIKE.quantize(16).convert("RGB")),
    "a palette of opaque colours": ("fg_bg", transparent_palette(255), ALIKE.quantize(16).convert("RGB")),
    "opaque alpha": ("fg_bg", transparent("RGB", alpha=255), ALIKE),
    "opaque alpha of grey": ("depth", transparent("L", alpha=255), ALIKE.convert("L")),
    "bmp": ("fg_bg", saved(ALIKE, "BMP"), ALIKE),
    "gif": ("depth", saved(ALIKE.convert("L"), "GIF"), ALIKE.convert("L")),
    "webp": ("fg_bg", saved(ALIKE, "WEBP", lossless=True), ALIKE),
    "a mask of one bit": ("mask", saved(Image.fromarray(PICTURE["mask"]).convert("1")), Image.fromarray(PICTURE["mask"])),
    "a mask just not grey": ("mask", encoded(HALF_GREY), Image.fromarray(HALF_GREY)),
}


@pytest.mark.parametrize("case", READ)
def test_a_picture_of_another_make_is_read(write_zip, tmp_path, case):
    kind, raw, expected = READ[case]
    write_zip(tmp_path / "a.zip", files={NAMES[kind]: raw})
    assert check(tmp_path / "a.zip") == {}
    ds = ZipDataset(tmp_path / "a.zip", size=24)
    i = [ds.name(i) for i in range(24)].index(SAMPLE)
    found, expected = as_uint8(ds, i)[kind], np.asarray(expected)
    np.testing.assert_array_equal(found, 255 * (expected > 127) if kind == "mask" else expected)


@pytest.mark.parametrize("transform", [0, 2], ids=["CMYK", "YCCK"])
@pytest.mark.parametrize("kind", ["fg_bg", "depth"])
def test_jpegs_in_printing_colours(write_zip, tmp_path, kind, transform):
    """As Pillow reads them: Adobe's are stored inverted."""
    raw = bytearray(saved(ALIKE.resize((24, 24)).convert("CMYK"), "JPEG", quality=95))
    raw[raw.index(b"Adobe") + 11] = transform
    write_zip(tmp_path / "a.zip", files={NAMES[kind]: bytes(raw)})
    ds = ZipDataset(tmp_path / "a.zip", size=24)
    found = as_uint8(ds, [ds.name(i) for i in range(24)].index(SAMPLE))[kind].astype(int)
    expected = np.asarray(Image.open(io.BytesIO(raw)).convert("RGB" if kind == "fg_bg" else "L"))
    assert np.ptp(expected) > 50 and np.abs(found - expected).max() <= 2


# Entries of a zip

ENTRIES = {
    "encrypted": ({"flags": 1}, "is encrypted"),
    "compressed otherwise": ({"method": 12}, "Store or deflate"),
    "another checksum": ({"crc": 1}, "checksum differs"),
    "more than the zip has": ({"size": 2**27, "unpacked": 2**27}, "beyond the end"),
    "larger than is read": ({"size": 2**31, "unpacked": 2**31}, "2,147,483,648 bytes"),
    "numbers that are not there": ({"size": 2**32 - 1, "unpacked": 2**32 - 1}, "is damaged"),
    "two sizes": ({"unpacked": 10}, "is damaged"),
}


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
@pytest.mark.parametrize("case", ENTRIES)
def test_an_entry_that_is_not_as_it_should_be(write_zip, tmp_path, compression, case):
    values, reason = ENTRIES[case]
    made = write_zip(tmp_path / "a.zip", compression=compression)
    field(tmp_path / "a.zip", NAMES["mask"], **values)
    assert_handled(tmp_path / "a.zip", made, NAMES["mask"], reason)


@pytest.mark.parametrize("claimed", [100, 2**26, 2**27 + 1, 2**32 - 2])
def test_what_inflates_to_more_than_it_claims_takes_no_memory(write_zip, tmp_path, claimed):
    zeros = bytes(300 * 2**20)
    made = write_zip(tmp_path / "a.zip", files={NAMES["depth"]: zeros}, compression=zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.getinfo(NAMES["depth"]).compress_size < 2**20
    field(tmp_path / "a.zip", NAMES["depth"], unpacked=claimed)
    del zeros
    tracemalloc.start()
    assert_handled(tmp_path / "a.zip", made, NAMES["depth"], "is damaged")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (4 if claimed == 2**26 else 0) * claimed + 2**24


def renamed(path, rename):
    """The zip with other names, written into its headers as they are."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    data, parts = io.BytesIO(), []
    for name, raw in content.items():
        raw_name, flags = rename(name)
        numbers = (0, 0, zlib.crc32(raw), len(raw), len(raw), len(raw_name), 0)
        parts.append(
            struct.pack("<4s4B4H3L5H2L", b"PK\1\2", 20, 0, 20, 0, flags, 0, *numbers[:2], *numbers[2:], 0, 0, 0, 0, data.tell())
        )
        parts.append(raw_name)
        data.write(struct.pack("<4s5H3L2H", b"PK\3\4", 20, flags, 0, *numbers) + raw_name + raw)
    start, directory = data.tell(), b"".join(parts)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, len(content), len(content), len(directory), start, 0)
    path.write_bytes(data.getvalue() + directory + end)


WAYS = {
    "absolute": lambda name: (f"/{name}".encode(), 0),
    "of the system": lambda name: (f"/etc/cron.d/{name}".encode(), 0),
    "parents": lambda name: (f"../../../{name}".encode(), 0),
    "a drive": lambda name: (f"C:\\{name}".replace("/", "\\").encode(), 0),
    "windows": lambda name: (name.replace("/", "\\").encode(), 0),
    "utf-8": lambda name: (f"größe/{name}".encode(), 0x800),
    "cp437": lambda name: (f"größe/{name}".encode("cp437"), 0),
    "damaged utf-8": lambda name: (b"gr\xff\xfe/\xc3/" + name.encode(), 0x800),
    "utf-8 without a word of it": lambda name: (f"大きさ/{name}".encode(), 0),
    "control characters": lambda name: (b"a\x1b[2J\rb/" + name.encode(), 0x800),
}


@pytest.mark.parametrize("layout", ["modest", "roshantac"])
@pytest.mark.parametrize("way", WAYS)
def test_names_of_any_make(write_zip, tmp_path, monkeypatch, way, layout, capsys):
    """Nothing is unpacked, so that paths to elsewhere do no harm."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    label = str if way != "windows" else lambda name: name.replace("/", "\\")
    made = write_zip(tmp_path / "a.zip", layout, label=label)
    renamed(tmp_path / "a.zip", WAYS[way])
    ds = ZipDataset(tmp_path / "a.zip", size=24)
    assert_same_samples(ds, made)
    assert check(tmp_path / "a.zip") == {}
    assert "\x1b[2J" not in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["a.zip", "here"] and os.listdir(tmp_path / "here") == []


def test_a_name_that_cannot_be_printed_is_escaped(write_zip, tmp_path):
    write_zip(tmp_path / "a.zip", files={NAMES["mask"]: b""})
    renamed(tmp_path / "a.zip", lambda name: (b"\xff\n\x1b/" + name.encode(), 0x800))
    text = message(ValueError, tmp_path / "a.zip")
    assert text.isprintable() and NAMES["mask"] in text
    assert [name.isprintable() for name in check(tmp_path / "a.zip")] == [True]


@pytest.mark.filterwarnings("ignore:Duplicate name", "ignore:.*belong to no sample")
@pytest.mark.parametrize("kind", KINDS)
def test_a_name_that_a_zip_has_twice(write_zip, tmp_path, kind):
    """Which is meant, nobody knows."""
    made = write_zip(tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as archive:
        archive.writestr(NAMES[kind], archive.read(NAMES[kind]))
    theirs = [sample["name"] for sample in made if sample["name"] == SAMPLE or (kind == "bg" and sample["b"] == 2)]
    if kind != "fg_bg":
        assert_handled(tmp_path / "a.zip", made, NAMES[kind], f"one {kind}, as another", theirs)
    else:  # counts as two samples
        assert f"one {kind}, as another" in message(ValueError, tmp_path / "a.zip")
        assert_same_samples(
            ZipDataset(tmp_path / "a.zip", 24, defects="leave_out"), [s for s in made if s["name"] not in theirs]
        )


@pytest.mark.filterwarnings("ignore:.*belong to no sample")
@pytest.mark.parametrize("kind", KINDS)
def test_missing_files(write_zip, tmp_path, kind, capsys):
    made = write_zip(tmp_path / "a.zip", without=[NAMES[kind]])
    ds = ZipDataset(tmp_path / "a.zip", size=24, defects="leave_out")
    theirs = [sample["name"] for sample in made if sample["name"] == SAMPLE or (kind == "bg" and sample["b"] == 2)]
    assert_same_samples(ds, [sample for sample in made if sample["name"] not in theirs])
    if kind == "fg_bg":  # without it there is no sample that anything could be missing from
        assert ds.left_out == {}
    else:
        assert ds.left_out == {f"bg_fg/{name}.png": f"has no {kind}." for name in theirs}
        assert f"a.zip: {len(theirs)} of 24 samples left out because of bg_fg/bg002" in capsys.readouterr().out
    assert check(tmp_path / "a.zip") == ds.left_out


@pytest.mark.filterwarnings("ignore:.*belong to no sample")
def test_a_depth_picture_too_many_is_told_of(write_zip, tmp_path, capsys):
    extra = "bg_fg_depth_map/bg002_fg003_77_depth_map.png"
    made = write_zip(tmp_path / "a.zip", files={extra: b"not a picture"})
    assert check(tmp_path / "a.zip") == {}
    assert f"pictures that belong to no sample: 1 ({extra})" in capsys.readouterr().out
    assert_same_samples(ZipDataset(tmp_path / "a.zip", size=24), made)


@pytest.mark.filterwarnings("ignore:.*belong to no sample")
@pytest.mark.parametrize(
    "label, left, found",
    [
        (lambda name: name if name != "DepthMap/img7.png" else 'd.png";"e', 23, "label_data.csv, line"),
        (lambda name: name.replace("fgbgmask/mask7.", "fgbgmask/mask99."), 23, "fgbgmask/mask99.png"),
        (lambda name: name.replace("bg/bg2.", "bg/none."), 16, "bg/none.png"),
        (lambda name: name.replace("fgbg/img7.", "fgbg/img8."), 22, "fgbg/img8.png"),
    ],
    ids=["columns", "file", "background", "twice"],
)
def test_lines_of_a_table_that_do_not_fit_are_left_out(write_zip, tmp_path, label, left, found):
    made = write_zip(tmp_path / "a.zip", "roshantac", label=label)
    ds = ZipDataset(tmp_path / "a.zip", size=24, defects="leave_out")
    assert [name.startswith(found) for name in ds.left_out] == [True]
    names = [ds.name(i) for i in range(len(ds))]
    assert len(names) == left
    assert_same_samples(ds, [sample for sample in made if sample["name"] in names])
    with pytest.raises(ValueError, match=r"label_data\.csv, line|\(label_data\.csv, line"):
        ZipDataset(tmp_path / "a.zip")


def test_a_table_of_a_quote_that_never_closes_is_refused_as_a_whole(write_zip, tmp_path):
    write_zip(tmp_path / "a.zip", "roshantac", label=lambda name: f'{name}"' if name == "DepthMap/img7.png" else name)
    for defects in ("stop", "leave_out"):
        assert "a quote is opened and not closed" in message(ValueError, tmp_path / "a.zip", defects=defects)


@pytest.mark.filterwarnings("ignore:.*belong to no sample")
def test_lines_of_a_table_that_name_what_is_not_there_accuse_nothing_else(write_zip, tmp_path, capsys):
    label = lambda name: re.sub(r"fgbg/img([78])\.", rf"fgbg/none{'1' * 5000}\1.", name)  # noqa: E731
    write_zip(tmp_path / "a.zip", "roshantac", label=label)
    ds = ZipDataset(tmp_path / "a.zip", size=24, defects="leave_out")
    assert sorted(name[:9] for name in ds.left_out) == ["fgbg/none"] * 2 and len(ds) == 22
    assert "2 of 24 samples left out" in capsys.readouterr().out


def test_columns_that_are_missing_count_as_samples_left_out(write_zip, tmp_path, capsys):
    content = "\n".join(f"bg/bg1.png;fgbg/img{i}.png" for i in range(1, 4))
    path = tmp_path / "a.zip"
    write_zip(path, "roshantac")
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    files["label_data.csv"] = b"\n".join([files["label_data.csv"].strip().splitlines()[0], content.encode()])
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        for name, raw in files.items():
            archive.writestr(name, raw)
    with pytest.warns(UserWarning, match="belong to no sample"):
        assert len(ZipDataset(tmp_path / "b.zip", size=24, defects="leave_out")) == 1
    assert "3 of 4 samples left out" in capsys.readouterr().out


def test_a_drive_that_fails_while_defects_are_looked_for_is_no_defect(write_zip, tmp_path, monkeypatch):
    write_zip(tmp_path / "a.zip")
    assert len(ZipDataset(tmp_path / "a.zip", size=24, defects="leave_out")) == 24

    def failing(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(helpers, "_read_entry", failing)
    with pytest.raises(ValueError, match="Errno 5, Input/output error"):
        ZipDataset(tmp_path / "a.zip", size=24, defects="leave_out")


def test_a_comment_that_looks_like_the_end_of_a_zip_is_none(write_zip, tmp_path):
    made = write_zip(tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as archive:
        archive.comment = b"it ends with PK\5\6 and more text than that has room for"
    assert_same_samples(ZipDataset(tmp_path / "a.zip", size=24), made)


def test_a_number_far_from_all_others_takes_no_time(write_zip, tmp_path):
    """Candidates for the number of objects are those that the names allow, and not all numbers up to the last."""
    write_zip(tmp_path / "a.zip", "raguram", samples=[(1, 1, 1), (1, 2, 1), (1, 10**12, 1)])
    with pytest.warns(UserWarning, match="Mirrored objects cannot be told"):
        assert len(ZipDataset(tmp_path / "a.zip", size=24)) == 3


def test_where_nothing_is_left_that_is_an_error(write_zip, tmp_path):
    write_zip(tmp_path / "a.zip", files={f"bg/bg00{b}.png": b"" for b in (1, 2, 3)})
    text = message(ValueError, tmp_path / "a.zip", defects="leave_out")
    assert "none of 24 samples is without defects" in text and "bg/bg00" in text


def test_a_choice_that_is_not_known(sample):
    with pytest.raises(ValueError, match=r"'ignore'\. Known: stop, leave_out"):
        ZipDataset(sample, defects="ignore")


def test_the_fingerprint_is_that_of_the_samples(write_zip, tmp_path):
    """A sound set has the same with and without looking; which samples are left out makes a difference."""
    write_zip(tmp_path / "a.zip")
    sound = [ZipDataset(tmp_path / "a.zip", defects=defects).fingerprint for defects in ("stop", "leave_out")]
    assert sound[0] == sound[1]
    fingerprints = set(sound)
    for kind in ("bg", "mask"):  # damage that the checksums, of which the fingerprint is made, do not show
        with zipfile.ZipFile(tmp_path / "a.zip") as archive:
            entry = archive.getinfo(NAMES[kind])
        data = bytearray((tmp_path / "a.zip").read_bytes())
        data[entry.header_offset + 30 + len(NAMES[kind]) + 40] ^= 1
        (tmp_path / "b.zip").write_bytes(data)
        assert ZipDataset(tmp_path / "b.zip").fingerprint == sound[0]
        ds = [ZipDataset(tmp_path / "b.zip", defects="leave_out") for _ in range(2)]
        assert ds[0].fingerprint == ds[1].fingerprint
        fingerprints.add(ds[0].fingerprint)
    assert len(fingerprints) == 3


@pytest.mark.parametrize("form", [unpacked, a_zip_for_each_kind])
def test_folders_leave_out_what_is_broken_too(write_zip, tmp_path, form):
    made = write_zip(tmp_path / "a.zip", files={NAMES["depth"]: b""})
    name = NAMES["depth"] if form is unpacked else f"bg_fg_depth_map/{NAMES['depth']}"  # a zip stands for a folder
    assert_handled(form(tmp_path / "a.zip"), made, name, "none of PNG")


def test_a_file_of_a_folder_that_is_gone_is_named(write_zip, tmp_path):
    write_zip(tmp_path / "a.zip")
    folder = unpacked(tmp_path / "a.zip")
    ds = ZipDataset(folder)
    (folder / NAMES["mask"]).unlink()
    with pytest.raises(ValueError, match=rf"{NAMES['mask']} cannot be read \(Errno 2, No such file"):
        ds.batch(range(24))


# Check


def test_the_report_of_a_sound_set(sample, capsys):
    """Against the entries that zipfile lists and Pillow opens."""
    with zipfile.ZipFile(sample) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        shown = sum(np.asarray(Image.open(archive.open(name)).convert("L")).max() > 127 for name in names if "_mask." in name)
        sizes = {Image.open(archive.open(name)).size for name in names}
    assert check(sample) == {}
    lines = capsys.readouterr().out.rpartition("\r")[2].strip().splitlines()
    ds = ZipDataset(sample)
    backgrounds, objects = len(set(ds.bg_id)), len(set(ds.fg_id))
    assert lines == [
        f"sample.zip, layout modest: {len(names):,} files, {len(ds)} samples",
        f"backgrounds: {backgrounds}; objects: {objects}; masks that show none: {len(ds) - shown}",
        f"bg: {backgrounds} of 192 x 192 pixels",
        *(f"{kind}: {len(ds)} of 192 x 192 pixels" for kind in KINDS[1:]),
        "No defects.",
    ]
    assert sizes == {(192, 192)}


@pytest.mark.filterwarnings("ignore:.*belong to no sample")
def test_the_report_groups_what_is_wrong(write_zip, tmp_path, capsys):
    broken = {f"bg_fg/bg001_fg00{f}_01.png": b"" for f in (1, 2, 3, 4)}
    empty = {"bg_fg_mask/bg003_fg001_01_mask.png": encoded(np.zeros((24, 30), np.uint8))}
    write_zip(tmp_path / "a.zip", files=broken | empty, without=["bg_fg_depth_map/bg003_fg003_01_depth_map.png"])
    field(tmp_path / "a.zip", NAMES["fg_bg"], crc=1)
    found = check(tmp_path / "a.zip")
    assert set(found) == {*broken, NAMES["fg_bg"], "bg_fg/bg003_fg003_01.png"}
    lines = capsys.readouterr().out.rpartition("\r")[2].strip().splitlines()
    assert lines[1] == "backgrounds: 3; objects: 4; masks that show none: 1"
    assert "mask: 23 of 24 x 24 pixels, 1 of 30 x 24 pixels" in lines and "fg_bg: 19 of 24 x 24 pixels" in lines
    assert "  1 x has no depth: bg_fg/bg003_fg003_01.png" in lines and f"  1 x is damaged: {NAMES['fg_bg']}" in lines
    [group] = [line for line in lines if line.startswith("  4 x cannot be read as a picture: ")]
    assert sum(name in group for name in broken) == 3 and group.endswith(" and 1 more")
    assert "Defects: 6" in lines


def test_check_raises_where_there_is_nothing_to_check(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"<html>Quota exceeded</html>")
    with pytest.raises(ValueError, match="is not a whole zip file"):
        check(tmp_path / "a.zip")
    with pytest.raises(FileNotFoundError, match="no such file"):
        check(tmp_path / "none.zip")


def test_check_decodes_with_as_many_threads_as_torch_has(write_zip, tmp_path, monkeypatch):
    """The first pictures wait for each other, one in each thread."""
    write_zip(tmp_path / "a.zip", extension=".jpg")
    decode, calls, meeting = simplejpeg.decode_jpeg, itertools.count(), threading.Barrier(2)

    def waiting(*args, **options):
        if next(calls) < 2:
            meeting.wait(30)
        return decode(*args, **options)

    monkeypatch.setattr(simplejpeg, "decode_jpeg", waiting)
    torch.set_num_threads(2)
    try:
        assert check(tmp_path / "a.zip") == {} and next(calls) == 75
    finally:
        torch.set_num_threads(1)


def test_check_reads_what_belongs_to_no_sample_too(write_zip, tmp_path):
    write_zip(tmp_path / "a.zip", files={"notes.txt": b"a line"})
    field(tmp_path / "a.zip", "notes.txt", crc=1)
    assert list(check(tmp_path / "a.zip")) == ["notes.txt"]


# Reading


AFTER_OPENING = """
import sys
sys.path[:0] = [{root!r}]
import os, helpers
ds = helpers.ZipDataset({path!r}, size=24, cache="none")
assert len(ds.batch([0, 5])["bg"]) == 2
for share in (0.999, 0.5, 0):
    os.truncate({path!r}, int(share * os.stat({path!r}).st_size))
    try:
        ds.batch(range(24))
    except ValueError as error:
        print(error)
"""


@pytest.mark.skipif(not hasattr(os, "truncate"), reason="no truncate here")
def test_a_zip_cut_short_while_it_is_open_is_an_error_and_no_crash(write_zip, tmp_path):
    """Were it mapped, the system would end the process."""
    path = tmp_path / "a.zip"
    write_zip(path)
    code = AFTER_OPENING.format(root=str(ROOT), path=str(path))
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr
    lines = child.stdout.splitlines()
    assert len(lines) == 3 and all(str(path) in line and "shorter" in line for line in lines)


def test_a_drive_that_fails_is_told_of(write_zip, tmp_path, monkeypatch):
    made = write_zip(tmp_path / "a.zip")
    ds, pread = ZipDataset(tmp_path / "a.zip", size=24, cache="none"), os.pread
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        middle = archive.getinfo(NAMES["mask"]).header_offset + 100

    def failing(file, size, offset):
        if offset <= middle < offset + size:
            raise OSError(5, "Input/output error")
        return pread(file, size, offset)

    monkeypatch.setattr(os, "pread", failing)
    with pytest.raises(
        ValueError, match=rf"a\.zip: {NAMES['mask']} cannot be read \(Errno 5, Input/output error\)\. Copy it anew\."
    ):
        ds.batch(range(24))
    assert_same(ds, made, 0)


def assert_same(ds, made, i):
    for kind, picture in as_uint8(ds, i).items():
        np.testing.assert_array_equal(picture, made[i][kind])


def test_a_system_without_pread(write_zip, tmp_path, monkeypatch):
    made = write_zip(tmp_path / "a.zip")
    monkeypatch.delattr(os, "pread")
    assert_same_samples(ZipDataset(tmp_path / "a.zip", size=24), made)


@pytest.mark.parametrize("chunk", [1, 24 * 24 * 3 * 4, 2**16])
def test_pictures_are_decoded_in_chunks_and_stay_the_same(write_zip, encode, tmp_path, monkeypatch, chunk):
    small = {f"bg_fg/bg001_fg00{f}_01.png": encode(draw(1, f, 1, 36)["fg_bg"]) for f in (1, 3)}
    write_zip(tmp_path / "a.zip", files=small)
    expected = ZipDataset(tmp_path / "a.zip", size=16, cache="none").batch(range(24))
    resize, most = helpers._resize, []
    monkeypatch.setattr(helpers, "_resize", lambda pictures, size: most.append(pictures.numel()) or resize(pictures, size))
    monkeypatch.setattr(helpers, "_CHUNK", chunk)
    found = ZipDataset(tmp_path / "a.zip", size=16, cache="none").batch(range(24))
    assert all(torch.equal(found[kind], expected[kind]) for kind in KINDS)
    assert max(most) < chunk + 36 * 36 * 3 and sum(most) == 24 * 24 * (3 * 3 + 22 * 3 + 24) + 2 * 36 * 36 * 3


# Folders


@pytest.mark.parametrize("form", [unpacked, a_zip_for_each_kind, lambda path: path], ids=["folder", "zips", "zip"])
def test_a_relative_path_outlives_a_change_of_folder(write_zip, tmp_path, monkeypatch, form):
    made = write_zip(tmp_path / "a.zip")
    path = form(tmp_path / "a.zip")
    monkeypatch.chdir(tmp_path)
    ds = ZipDataset(path.name, size=24)
    monkeypatch.chdir("/")
    assert_same_samples(ds, made)


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no links here")
def test_linked_folders_are_followed_but_not_in_circles(write_zip, tmp_path):
    made = write_zip(tmp_path / "a.zip")
    folder = unpacked(tmp_path / "a.zip")
    (folder / "bg_fg_mask").rename(tmp_path / "elsewhere")
    (folder / "bg_fg_mask").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (folder / "bg_fg" / "up").symlink_to(folder, target_is_directory=True)
    (tmp_path / "elsewhere" / "round").symlink_to(folder / "bg_fg_mask", target_is_directory=True)
    (folder / "nowhere.png").symlink_to(tmp_path / "nothing")
    assert_same_samples(ZipDataset(folder, size=24), made)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are text")
@pytest.mark.filterwarnings("ignore:.*belong to no sample")
def test_a_folder_of_names_that_are_no_text(write_zip, tmp_path, capsys):
    made = write_zip(tmp_path / "a.zip")
    folder = unpacked(tmp_path / "a.zip")
    for name in KINDS[:2]:
        wrapped = os.path.join(os.fsencode(folder), b"gr\xf6\xdfe")
        os.makedirs(wrapped, exist_ok=True)
        path = os.fsencode(NAMES[name].partition("/")[0])
        os.rename(os.path.join(os.fsencode(folder), path), os.path.join(wrapped, path))
    os.truncate(os.path.join(wrapped, os.fsencode(NAMES["fg_bg"])), 0)
    found = check(folder)
    assert [name.rpartition("/bg_fg/")[2] for name in found] == [f"{SAMPLE}.png"] and "\\udcf6" in capsys.readouterr().out
    rest = [sample for sample in made if sample["name"] != SAMPLE]
    assert_same_samples(ZipDataset(folder, size=24, defects="leave_out"), rest)


def test_a_table_beside_zips_is_seen(write_zip, tmp_path):
    made = write_zip(tmp_path / "a.zip", "roshantac")
    folder = a_zip_for_each_kind(tmp_path / "a.zip")
    with zipfile.ZipFile(folder / "label_data.csv.zip") as archive:
        archive.extractall(folder)
    (folder / "label_data.csv.zip").unlink()
    (folder / "folder.zip").mkdir()
    assert_same_samples(ZipDataset(folder, size=24), made)
    (folder / "label_data.csv").write_bytes(b"a;b")
    assert "label_data.csv, line 1" in message(ValueError, folder)


# Random damage. Runs in a process of its own, which says what it is at and ends itself where it hangs or grows.

LONG = os.environ.get("LONG_TESTS") == "1"
FULL = ROOT / "assets" / "sample.zip"
HUGE = (0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def damaged(data, rng):
    """The bytes of a zip after an accident, or more."""
    data = bytearray(data)
    for _ in range(rng.geometric(0.7)):
        if len(data) < 100:
            break
        how, at = rng.integers(7), int(rng.integers(len(data)))
        if rng.random() < 0.5:  # half of them where the directory is
            at = int(rng.integers(max(0, data.rfind(b"PK\3\4")), len(data)))
        length = int(rng.integers(1, 40))
        if how == 0:
            data[at] ^= 1 << rng.integers(8)
        elif how == 1:
            data[at : at + length] = rng.bytes(length)[: len(data) - at]
        elif how == 2:
            del data[at:]
        elif how == 3:
            data[at:at] = rng.bytes(length)
        elif how == 4:
            del data[at : at + length]
        else:
            headers = [match.start() for match in re.finditer(b"PK(\1\2|\3\4|\5\6|\6\6|\6\7)", data)]
            one, other = rng.choice(headers or [0], 2)
            place = rng.choice([4, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32, 34, 42, 46])
            width = int(rng.choice([2, 4, 8]))
            first, second = (slice(header + place, header + place + width) for header in (one, other))
            if how == 5:
                data[first], data[second] = data[second], data[first]
            else:
                data[first] = (HUGE[rng.integers(len(HUGE))] % 256**width).to_bytes(width, "little")
    return bytes(data)


def samples_of(ds):
    batch = ds.batch(range(len(ds)))
    return {ds.name(i): {kind: batch[kind][i].clone() for kind in KINDS} for i in range(len(ds))}


def assert_sentence(error, path):
    assert type(error) is ValueError and str(path) in str(error) and str(error).isprintable(), repr(error)


def load(path, truth, size, **options):
    """How many samples there are, all of them right; None where a sentence says why there are none."""
    try:
        ds = ZipDataset(path, size, cache="none", **options)
        found = samples_of(ds)
    except ValueError as error:
        assert_sentence(error, path)
        return None
    # Where backgrounds go by the samples' count, one whose name is gone cannot be missed.
    fewer = ds.layout == "deepjyoti" and len(set(ds.bg_id)) < 2
    for name, pictures in found.items():
        assert all(torch.equal(pictures[kind], truth[name][kind]) for kind in KINDS[fewer:]), name
    return len(found)


def damage_the_zip(rng, path, zips):
    """Seldom, as it is large, the whole sample, else one of the small ones."""
    small = int(rng.integers(1, len(zips))) if rng.random() > 0.01 else 0
    data, truth, size = zips[small]
    path.write_bytes(damaged(data, rng))
    return try_all_ways(rng, path, truth, size)


def try_all_ways(rng, path, truth, size):
    """Whether every sample can be had."""
    way = rng.random()
    if way > 0.3:
        return load(path, truth, size) == len(truth)
    if way > 0.15:
        try:
            found = check(path)
        except ValueError as error:
            assert_sentence(error, path)
            found = {"the zip": str(error)}
        assert all(name.isprintable() and wrong.isprintable() for name, wrong in found.items())
        count = load(path, truth, size)
        assert found or count is not None  # what `check` finds sound can be read
        return count == len(truth)
    try:
        ZipDataset(path, size, cache="none", defects="leave_out")
    except ValueError as error:
        assert_sentence(error, path)
        return False
    count = load(path, truth, size, defects="leave_out")
    assert count  # nothing that is left is broken
    return count == len(truth)


def damage_a_picture(rng, path, pictures):
    """One file of a sample, in a zip of right checksums: as Pillow decodes it, or a sentence."""
    files, size = pictures[rng.integers(len(pictures))]
    kind = KINDS[rng.integers(4)]
    raw = bytearray(files[kind])
    for _ in range(rng.geometric(0.7)):
        how, at, length = rng.integers(5), int(len(raw) * rng.random() ** rng.integers(1, 4)), int(rng.integers(1, 40))
        if how == 0 and raw:
            raw[at] ^= 1 << rng.integers(8)
        elif how == 1:
            raw[at : at + length] = rng.bytes(length)
        elif how == 2:
            del raw[at:]
        elif how == 3:
            raw[at:at] = rng.bytes(length)
        else:
            del raw[at : at + length]
    if raw[:4] == b"\x89PNG" and rng.random() < 0.7:
        raw = mended(raw)
    files = files | {kind: bytes(raw)}
    with zipfile.ZipFile(path, "w") as archive:
        for name in KINDS:
            archive.writestr(NAMES[name], files[name])
    truth, other_size = {}, False
    with contextlib.suppress(Exception):  # of which Pillow raises many kinds
        for name in KINDS:
            picture = Image.open(io.BytesIO(files[name]))
            other_size |= picture.size != (size, size)
            if not other_size:
                mode = "RGB" if CHANNELS[name] == 3 else "L"
                if picture.format == "JPEG" and mode == "L":
                    picture.draft("L", picture.size)  # grey, as it is in the file
                decoded = torch.from_numpy(np.array(picture.convert(mode))).reshape(size, size, -1).permute(2, 0, 1)
                truth[name] = (decoded > 127).byte() if name == "mask" else decoded
    if len(truth) == len(KINDS):
        return try_all_ways(rng, path, {SAMPLE: truth}, size)
    try:
        ZipDataset(path, size, cache="none").batch([0])
    except ValueError as error:
        assert_sentence(error, path)
    else:
        assert other_size  # what Pillow refuses is refused
    return False


def mended(png):
    """The file with the checksums of its chunks made right again."""
    at = 8
    while at + 12 <= len(png):
        end = at + 8 + int.from_bytes(png[at : at + 4], "big")
        if end + 4 > len(png):
            break
        struct.pack_into(">L", png, end, zlib.crc32(png[at + 4 : end]))
        at = end + 4
    return png


def fuzz(folder, first, count):
    """Prints the seed of each case before it, and in the end a dict of figures."""
    import resource

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder, samples = Path(folder), [(b, f, n) for b in (1, 2) for f in (1, 2) for n in (1,)]
    made = [(FULL, 64)]
    with zipfile.ZipFile(FULL) as archive:
        of_one = [name for name in archive.namelist() if re.search(r"bg00[12](_fg\d+_01|\.)", name)]
        chosen = [name for name in of_one if "_fg" not in name] + [name for name in of_one if "_fg" in name][:6]
        raw = {name: archive.read(name) for name in chosen}
    for number, compression in enumerate((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)):
        made.append((folder / f"cut{number}.zip", 192))
        with zipfile.ZipFile(made[-1][0], "w", compression) as archive:
            for name, data in raw.items():
                archive.writestr(name, data)
    for number, layout in enumerate(helpers.LAYOUTS):
        made.append((folder / f"{layout}.zip", 24))
        compression = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[number % 2]
        make_zip(
            made[-1][0], layout, samples, extension=(".png", ".jpg")[number % 3 % 2], compression=compression, zip64=number > 3
        )
    zips = [(path.read_bytes(), samples_of(ZipDataset(path, size, cache="none")), size) for path, size in made]
    drawn = draw(1, 1, 1, 24)
    pictures = [({kind: encoded(drawn[kind], extension) for kind in KINDS}, 24) for extension in (".png", ".jpg")]
    folders = {kind: f"{name.partition('/')[0]}/" for kind, name in FILE_NAMES["modest"].items()}
    pictures.append(({kind: next(raw[name] for name in raw if name.startswith(folders[kind])) for kind in KINDS}, 192))
    path, figures = folder / "a.zip", {"loaded": 0, "refused or less": 0, "failed": []}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(first, first + count):
        print(seed, flush=True)
        faulthandler.dump_traceback_later(60, exit=True)
        rng = np.random.default_rng(seed)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                way = damage_a_picture(rng, path, pictures) if seed % 2 else damage_the_zip(rng, path, zips)
            figures["loaded" if way else "refused or less"] += 1
        except Exception:
            figures["failed"].append(f"{seed}: {traceback.format_exc(limit=-4)}")
    faulthandler.cancel_dump_traceback_later()
    figures["MB"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    print(json.dumps(figures))


def test_random_damage_ends_with_right_samples_or_a_sentence(tmp_path):
    pytest.importorskip("resource")
    count = 10_000 if LONG else 200
    child = subprocess.run(
        [sys.executable, __file__, str(tmp_path), "0", str(count)],
        capture_output=True,
        text=True,
        timeout=3600 if LONG else 300,
        env=os.environ | {"TQDM_DISABLE": "1"},
    )
    lines = child.stdout.splitlines()
    assert child.returncode == 0, f"seed {lines[-1:]}: {child.stderr[-3000:]}"
    figures = json.loads(lines[-1])
    assert figures["failed"] == []
    assert figures["loaded"] > count / 100 and figures["refused or less"] > count / 4
    assert figures["MB"] < 1000, figures


if __name__ == "__main__":
    fuzz(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
