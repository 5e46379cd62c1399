"""The drawing code of notebooks/00_make_dataset.ipynb: geometry against closed forms, and the zip."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "00_make_dataset.ipynb"
SMALL = {"backgrounds": 2, "objects": 3, "places": 1, "size": 64, "seed": 3}  # 12 samples, two tasks


def definitions():
    """The notebook's cells tagged "define" as a module, where worker processes find its functions."""
    module = types.ModuleType("make_dataset_notebook")
    sys.modules[module.__name__] = module
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if "define" in cell["metadata"].get("tags", []):
            exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), module.__dict__)
    return module


@pytest.fixture(scope="module")
def nb():
    return definitions()


@pytest.fixture(scope="module")
def small(nb, tmp_path_factory):
    """The small data set, drawn in this process: its path."""
    path = tmp_path_factory.mktemp("zip") / "small.zip"
    assert nb.make_dataset(path, **SMALL, workers=1) == 12
    return path


def read(archive, name):
    return np.array(Image.open(io.BytesIO(archive.read(name))))


def camera(nb, size=64, eye=(0, 1.5, 0), pitch=0.0, focal=0.9):
    return nb.Camera(np.array(eye, float), nb.rotation(pitch).T, focal, size)


def meadow(nb, size, *more):
    """A flat ground under the sun, with more solids if wanted, rendered."""
    light = nb.Light(np.array([100.0, 200, -50]), 10, np.inf, np.ones(3), np.full(3, 0.5), np.full(3, 0.3))
    white = np.ones(3, np.float32)
    return nb.render(
        nb.Scene(
            camera(nb, size, pitch=8),
            [nb.box(0, -0.5, 0, 900, 0.5, 900, "#808080"), *more],
            light,
            np.zeros((0, 5)),
            (),
            (),
            (white, white, np.float32(1)),
            (2, 9),
        )
    )


# Geometry


def test_a_ray_meets_the_sphere_where_the_quadratic_says(nb):
    cam, centre, radius = camera(nb), np.array([0.3, 1.2, 4.0]), 0.8
    rays, depth, _ = nb.trace([nb.solid("sphere", centre, (radius,) * 3, "#808080")], cam, 2)
    direction = rays.astype(np.float64)
    a, b = (direction**2).sum(0), np.einsum("i,ihw->hw", centre - cam.eye, direction)
    root = b * b - a * (((centre - cam.eye) ** 2).sum() - radius**2)
    clear = np.abs(root) > 1e-4  # the very rim is a matter of rounding
    assert ((root > 0) == np.isfinite(depth))[clear].all()
    hit = (root > 0) & clear
    assert hit.mean() > 0.05
    np.testing.assert_allclose(depth[hit], ((b - np.sqrt(np.maximum(root, 0))) / a)[hit], rtol=1e-4)


def test_depth_of_a_floor_is_eye_height_over_slope(nb):
    cam = camera(nb, pitch=11.0)
    _, depth, _ = nb.trace([nb.box(0, -0.5, 0, 900, 0.5, 900, "#808080")], cam, 1)
    up = (0.5 - (np.arange(64) + 0.5) / 64) / cam.focal
    pitch = math.radians(11.0)
    expected = 1.5 / (math.sin(pitch) - up * math.cos(pitch))  # depth along the viewing axis
    below = (expected > 0) & (expected < 50)
    np.testing.assert_allclose(depth[below], np.repeat(expected[below, None], 64, 1), rtol=1e-3)
    assert np.isinf(depth[expected < 0]).all()


def test_a_wall_facing_the_camera_has_one_depth(nb):
    _, depth, _ = nb.trace([nb.box(0, 0, 5.5, 9, 9, 0.5, "#808080")], camera(nb), 1)
    np.testing.assert_allclose(depth, 5.0, rtol=1e-5)


def test_cylinder_and_cone(nb):
    cam = camera(nb, eye=(0, 0, 0))
    _, depth, _ = nb.trace([nb.solid("cone", (0, 0, 4), (0.5, 1, 0.5), "#808080", taper=1.0)], cam, 1)
    assert depth[32, 32] == pytest.approx(3.5, abs=2e-3)
    wide = np.isfinite(depth[32]).sum() / 64
    assert wide == pytest.approx(2 * 0.9 * 0.5 / math.sqrt(16 - 0.25), abs=2 / 64)  # tangents to the circle
    _, depth, _ = nb.trace([nb.solid("cone", (0, 0, 4), (0.5, 1, 0.5), "#808080", taper=0.5)], cam, 1)
    above, under = (np.isfinite(depth[row]).sum() for row in (24, 40))
    assert under > above > 0


def test_normals_of_a_stretched_sphere_are_its_gradient(nb):
    half, turn = np.array([0.5, 1.0, 2.0]), (20.0, 40.0, -15.0)
    made = nb.solid("sphere", (1, 2, 3), half, "#808080", turn=turn)
    unit = np.random.default_rng(0).standard_normal((3, 50))
    unit /= np.linalg.norm(unit, axis=0)
    points = made.matrix @ unit + made.centre[:, None]
    normal, _, _ = nb.surface([made], np.zeros(50, int), points.astype(np.float32))
    spin = nb.rotation(*turn)
    gradient = spin @ ((spin.T @ (points - made.centre[:, None])) / half[:, None] ** 2)
    np.testing.assert_allclose(normal, gradient / np.linalg.norm(gradient, axis=0), atol=1e-3)


def test_projection_and_rays_agree(nb):
    cam = camera(nb, pitch=7.0)
    rays, point = cam.rays(1), np.array([0.4, 0.7, 5.0])
    row, col, depth = cam.project(point)
    pixel = 5.0 / (0.9 * 64)
    assert np.linalg.norm(cam.eye + rays[:, int(row), int(col)] * depth - point) < pixel


@pytest.mark.parametrize("indoors, far", [(True, 6.0), (False, 150.0)])
def test_depth_scale_grows_from_0_to_1(nb, indoors, far):
    metres = np.append(np.linspace(1.5, far, 50), np.inf).astype(np.float32)
    scaled = nb.scaled(metres, (1.5, far), indoors)
    assert scaled[0] == 0 and scaled[-1] == 1 and scaled[-2] == pytest.approx(1)
    assert (np.diff(scaled[:-1]) > 0).all()


def test_no_ray_leaves_a_room_between_two_walls(nb):
    """In this one, of the first 600, a ray just misses both the ceiling and the wall, by rounding."""
    number, size = 537, 192
    assert np.isfinite(nb.make_backdrop(0, number, size).ray_depth).all()


# The object in the scene


@pytest.mark.parametrize("number", [0, 1, 3, 10])
def test_farther_is_smaller_and_deeper(nb, number):
    backdrop, solids = meadow(nb, 96), nb.make_object(0, number)
    masks, depths = [], []
    for z in (3.5, 5.0, 8.0):
        _, _, mask, depth = nb.add_object(backdrop, nb.stand(solids, nb.Place(0.2, z, 20.0)))
        near, far = backdrop.range
        metres = near * (far / near) ** depth[mask].astype(float)
        assert np.median(metres) == pytest.approx(z, abs=0.6)
        masks.append(mask.sum())
        depths.append(depth[mask].mean())
    assert masks[0] > masks[1] > masks[2] > 0
    assert masks[0] / masks[1] == pytest.approx((5 / 3.5) ** 2, rel=0.35)
    assert depths[0] < depths[1] < depths[2]


def test_mirroring_in_the_middle_of_the_picture_flips_the_mask(nb):
    backdrop, solids = meadow(nb, 96), nb.make_object(0, 6)
    places = [nb.Place(0.0, 4.0, 50.0, mirrored) for mirrored in (False, True)]
    masks = [nb.add_object(backdrop, nb.stand(solids, place))[2] for place in places]
    assert (masks[0] != masks[1][:, ::-1]).mean() < 0.005
    assert (masks[0] != masks[1]).mean() > 0.01


def test_a_wall_in_front_hides_the_object_in_mask_and_depth(nb):
    masks = []
    for wall in ([], [nb.box(5, 0, 3, 5, 9, 0.05, "#808080")]):  # a wall over the right half
        backdrop = meadow(nb, 64, *wall)
        _, _, mask, depth = nb.add_object(backdrop, nb.stand(nb.make_object(0, 4), nb.Place(0.0, 4.0, 0.0)))
        masks.append(mask)
        np.testing.assert_array_equal(depth[~mask], backdrop.depth[~mask])
    assert masks[0][:, 33:].any() and not masks[1][:, 33:].any()
    np.testing.assert_array_equal(masks[0][:, :31], masks[1][:, :31])


# The zip


def test_names_and_counts_of_the_modest_layout(small):
    expected = {f"bg/bg{b:03d}.jpeg" for b in (1, 2)}
    for sample in (f"bg{b:03d}_fg{f:03d}_{n:02d}" for b in (1, 2) for f in (1, 2, 3) for n in (1, 2)):
        expected |= {f"bg_fg/{sample}.jpeg", f"bg_fg_mask/{sample}_mask.png"}
        expected |= {f"bg_fg_depth_map/{sample}_depth_map.png"}
    with zipfile.ZipFile(small) as archive:
        names = archive.namelist()
        assert archive.testzip() is None
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
    assert len(names) == len(expected) and set(names) == expected


def test_masks_and_depth_are_exact_in_the_zip(nb, small):
    with zipfile.ZipFile(small) as archive:
        for b in range(2):
            empty = np.round(nb.make_backdrop(3, b, 64).depth * 255).astype(np.uint8)
            for name in (n for n in archive.namelist() if n.startswith(f"bg_fg_mask/bg{b + 1:03d}")):
                mask = read(archive, name).astype(np.uint8)
                mask = mask * 255 if mask.max() == 1 else mask  # a one-bit PNG reads as bool
                depth = read(archive, name.replace("_mask", "_depth_map"))
                assert mask.shape == depth.shape == (64, 64) and depth.dtype == np.uint8
                assert set(np.unique(mask)) == {0, 255}
                assert 0.005 <= (mask > 0).mean() <= 0.4
                np.testing.assert_array_equal(depth[mask == 0], empty[mask == 0])
                assert (depth[mask > 0] <= empty[mask > 0]).all()  # the object is in front of what it hides


def test_two_shots_differ_everywhere_but_show_the_object(small):
    with zipfile.ZipFile(small) as archive:
        for name in (n for n in archive.namelist() if n.startswith("bg_fg/")):
            bg = read(archive, f"bg/{name[6:11]}.jpeg").astype(int)
            fg_bg = read(archive, name).astype(int)
            mask = read(archive, name.replace("bg_fg/", "bg_fg_mask/").replace(".jpeg", "_mask.png")) > 0
            difference = np.abs(fg_bg - bg).max(2)
            assert 1 < difference[~mask].mean() < difference[mask].mean()


def test_same_seed_same_bytes_with_one_and_two_workers(nb, small, tmp_path):
    nb.make_dataset(tmp_path / "two.zip", **SMALL, workers=2)
    assert (tmp_path / "two.zip").read_bytes() == small.read_bytes()
    nb.make_dataset(tmp_path / "other.zip", **{**SMALL, "backgrounds": 1, "objects": 1, "seed": 4}, workers=1)
    with zipfile.ZipFile(small) as one, zipfile.ZipFile(tmp_path / "other.zip") as other:
        assert all(one.read(name) != other.read(name) for name in other.namelist())


def test_too_many_objects_per_background_are_refused(nb, tmp_path):
    with pytest.raises(ValueError, match="objects_per_background is 4"):
        nb.make_dataset(tmp_path / "a.zip", backgrounds=1, objects=3, objects_per_background=4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_nothing_behind(nb, tmp_path, monkeypatch, error):
    draw = nb.draw_task

    def fail_late(task):
        if task[3] == 1:
            raise error("in the second background")
        return draw(task)

    monkeypatch.setattr(nb, "draw_task", fail_late)
    with pytest.raises(error):
        nb.make_dataset(tmp_path / "a.zip", **SMALL, workers=1)
    assert list(tmp_path.iterdir()) == []


def test_an_exception_in_a_worker_leaves_nothing_behind(nb, tmp_path, monkeypatch):
    monkeypatch.setattr(nb, "KINDS", [nb.person, None, nb.bird])  # the second object can't be made
    nb.make_object.cache_clear()
    with pytest.raises(TypeError):
        nb.make_dataset(tmp_path / "a.zip", **SMALL, workers=2)
    assert list(tmp_path.iterdir()) == []
    nb.make_object.cache_clear()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="workers are forked on Linux only")
def test_killed_in_the_midst_leaves_no_zip_and_no_worker_and_a_second_run_is_right(nb, small, tmp_path):
    path = tmp_path / "a.zip"
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_make_dataset as t; "
        f"t.definitions().make_dataset({str(path)!r}, **{{**t.SMALL, 'backgrounds': 60}}, workers=2)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], cwd=NOTEBOOK.parents[1], stderr=subprocess.DEVNULL
    )
    part, deadline = tmp_path / "a.zip.part", time.time() + 60
    while not (part.exists() and part.stat().st_size > 0) and time.time() < deadline:
        time.sleep(0.05)
    workers = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert part.exists() and not path.exists()

    def alive(pid):
        stat = Path(f"/proc/{pid}/stat")
        return stat.exists() and "Z" not in stat.read_text().split()[2]

    while any(map(alive, workers)) and time.time() < deadline:
        time.sleep(0.1)
    assert workers and time.time() < deadline, "workers outlived their parent"
    nb.make_dataset(path, **SMALL, workers=1)
    assert path.read_bytes() == small.read_bytes() and not part.exists()
