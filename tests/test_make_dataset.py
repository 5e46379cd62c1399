"""The drawing code of notebooks/00_make_dataset.ipynb: geometry against closed forms, and the zip."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image

import helpers

SMALL = {"backgrounds": 2, "objects": 3, "places": 1, "size": 64, "seed": 3}  # 12 samples, two tasks


@pytest.fixture(scope="module")
def nb():
    return helpers._drawing()


@pytest.fixture(scope="module")
def small(nb, tmp_path_factory):
    """The small data set, drawn in this process: its path."""
    path = tmp_path_factory.mktemp("zip") / "small.zip"
    assert nb.make_dataset(path, **SMALL, workers=1) == 12
    return path


def read(archive, name):
    return np.array(Image.open(io.BytesIO(archive.read(name))))


def camera(nb, size=64, eye=(0, 1.5, 0), pitch=0.0, focal=0.9):
    return nb.Camera(np.array(eye, float), nb.facing(0, pitch), focal, size)


def depth_of(nb, cam, *meshes):
    return nb.World(meshes).hit(cam.eye, cam.rays().reshape(-1, 3))[1].reshape(cam.size, cam.size)


def grey(nb):
    return nb.plain([0.5] * 3)


def yard_scene(nb, size=96, meshes=(), lights=()):
    """A flat ground, with more meshes if wanted."""
    ground = nb.box([-60, -1, -60], [60, 0, 60], grey(nb))
    cam, ambient = camera(nb, size, pitch=12), np.array([[0.5] * 3, [0.2] * 3])
    return nb.Scene(nb.World([ground, *meshes]), cam, list(lights), ambient, np.zeros((0, 2, 3)))


def yard(nb, *args, **kwargs):
    """That, rendered."""
    return nb.render(yard_scene(nb, *args, **kwargs), 0)


def crate(nb):
    """A box that is not symmetric, a metre high."""
    tall = nb.box([-0.4, 0, -0.3], [0.1, 1, 0.3], grey(nb))
    return nb.joined([tall, nb.box([0.1, 0, -0.3], [0.5, 0.4, 0.3], grey(nb))])


def put(nb, backdrop, mesh):
    """Light, mask and depth with the mesh in the scene."""
    return nb.add_object(backdrop, mesh, np.random.default_rng(0))


# Geometry and light


def test_a_ray_meets_the_sphere_where_the_quadratic_says(nb):
    cam, centre, radius = camera(nb), np.array([0.3, 1.2, -4.0]), 0.8
    shape = trimesh.creation.icosphere(6).triangles * radius + centre
    depth, rays = depth_of(nb, cam, nb.skinned(shape, grey(nb))), cam.rays().astype(float)
    a, b = (rays**2).sum(-1), rays @ (centre - cam.eye)
    root = b * b - a * (((centre - cam.eye) ** 2).sum() - radius**2)
    clear = np.abs(root) > 0.02  # the rim is one of flat triangles
    assert ((root > 0) == np.isfinite(depth))[clear].all()
    hit = (root > 0) & clear
    assert hit.mean() > 0.05
    np.testing.assert_allclose(depth[hit], ((b - np.sqrt(np.maximum(root, 0))) / a)[hit], rtol=1e-3)


def test_depth_of_a_floor_is_eye_height_over_slope(nb):
    cam = camera(nb, pitch=11.0)
    depth = depth_of(nb, cam, nb.box([-900, -1, -900], [900, 0, 900], grey(nb)))
    up, pitch = (0.5 - (np.arange(64) + 0.5) / 64) / cam.focal, math.radians(11.0)
    expected = 1.5 / (math.sin(pitch) - up * math.cos(pitch))  # depth along the viewing axis
    below = (expected > 0) & (expected < 50)
    np.testing.assert_allclose(depth[below], np.repeat(expected[below, None], 64, 1), rtol=1e-3)
    assert np.isinf(depth[expected < 0]).all()


def test_a_wall_facing_the_camera_has_one_depth(nb):
    depth = depth_of(nb, camera(nb), nb.wall(40, 20, grey(nb), 1).placed((0, -10, -5)))
    np.testing.assert_allclose(depth, 5.0, rtol=1e-5)


def test_projection_and_rays_agree(nb):
    cam = nb.Camera(np.array([0.2, 1.5, 0.3]), nb.facing(10, 7, 2), 0.9, 64)
    rays, point = cam.rays(), np.array([0.4, 0.7, -5.0])
    row, col, depth = (value[0] for value in cam.project(point[None]))
    assert np.linalg.norm(cam.eye + rays[int(row), int(col)] * depth - point) < depth / (0.9 * 64)


def test_normals_are_smooth_on_a_sphere_and_sharp_on_a_box(nb):
    ball = trimesh.creation.icosphere(4).triangles
    np.testing.assert_allclose(nb.corner_normals(ball), nb.unit(ball), atol=0.02)
    cube = trimesh.creation.box().triangles
    np.testing.assert_allclose(np.abs(nb.corner_normals(cube)).max(2), 1, atol=1e-6)
    turned = nb.skinned(ball * [1, 2, 1], grey(nb)).placed(turn=40, mirrored=True)
    np.testing.assert_allclose(turned.normals, nb.corner_normals(turned.corners) * -1, atol=1e-4)


def test_a_texture_is_looked_up_at_its_place(nb):
    picture = np.random.default_rng(0).integers(0, 256, (4, 8, 3), np.uint8)
    quad = nb.framed(8.0, 4.0, picture, grey(nb))
    cam = nb.Camera(np.array([0.0, 2.0, 4.0]), nb.facing(0, 0), 0.4999, 8)
    triangle, _, weights = nb.World([quad]).hit(cam.eye, cam.rays().reshape(-1, 3))
    colour = nb.World([quad]).surface(triangle, weights, 1e-9)[0].reshape(8, 8, 3)[2:6]
    np.testing.assert_allclose(colour, (picture / 255.0) ** 2.2, atol=1e-5)


def test_depth_is_one_minus_inverse_depth_from_0_to_1(nb):
    metres = np.append(np.linspace(1.5, 30, 50), np.inf)
    scaled = nb.scaled(metres, 1.5, 30.0)
    assert scaled[0] == 0 and scaled[-1] == 1 and scaled[-2] == pytest.approx(1)
    share = (1 / 1.5 - 1 / metres[:-1]) / (1 / 1.5 - 1 / 30)
    np.testing.assert_allclose(scaled[:-1], share, atol=1e-6)


def test_what_is_under_a_roof_gets_no_sun_and_what_is_beside_gets_all(nb):
    sun = nb.Light(np.array([0, 300.0, 0]), np.zeros(3), np.zeros(3), np.ones(3), sun=True)
    backdrop = yard(nb, meshes=[nb.box([-1, 2, -6], [1, 2.1, -3], grey(nb))], lights=[sun])
    x, y, z = backdrop.points.T
    floor = backdrop.normals.any(1) & (np.abs(y) < 1e-3) & (z > -20)
    edge = (np.abs(np.abs(x) - 1) < 0.15) | (np.abs(z + 6) < 0.4) | (np.abs(z + 3) < 0.15)
    under = (np.abs(x) < 1) & (z > -6) & (z < -3)
    direct = backdrop.direct[0].reshape(-1, 3)[:, 0]
    assert (floor & under & ~edge).sum() > 50 and (direct[floor & under & ~edge] == 0).all()
    grey_light = (128 / 255) ** 2.2  # straight from above on a level ground
    np.testing.assert_allclose(direct[floor & ~under & ~edge], grey_light, rtol=0.03)


# The catalogue


def test_the_models_that_come_along_are_many_small_and_of_their_size(nb):
    path = helpers.ROOT / "assets" / "models.zip"
    listed = json.loads(zipfile.ZipFile(path).read("models.json"))
    assert len(listed) == len(nb.CATALOGUE) >= 40 and path.stat().st_size < 5e6
    assert len({entry["category"] for entry in listed}) >= 8
    for entry in listed:
        mesh = nb.model(entry["name"])
        np.testing.assert_allclose(np.ptp(mesh.box, 0), np.maximum(entry["size"], 1e-4), rtol=0.02, atol=2e-3)
        assert mesh.box[0, 1] == pytest.approx(0, abs=1e-4) and np.isfinite(mesh.normals).all()


def test_a_folder_of_ones_own_models(nb, tmp_path):
    (tmp_path / "more").mkdir()
    trimesh.creation.box(extents=[1, 2, 3]).export(tmp_path / "a.obj")
    trimesh.creation.icosphere(2).export(tmp_path / "more" / "b.glb")
    found = nb.read_catalogue(tmp_path)
    assert found["a"].size == pytest.approx((1, 2, 3)) and found["b"].size == pytest.approx((2, 2, 2))


def test_the_files_of_the_debian_package(nb, tmp_path, monkeypatch):
    monkeypatch.setattr(nb, "CACHE", tmp_path / "cache")
    text = "id#1=Some#chair\nname#1=Chair\ncategory#1=Office\nmodel#1=/some/chair.obj\nwidth#1=50\n"
    text += "depth#1=60\nheight#1=90\ndoorOrWindow#1=false\ndropOnTopElevation#1=45\n"
    text += "id#2=Some#door\nmodel#2=/some/chair.obj\nwidth#2=50\ndepth#2=6\nheight#2=200\n"
    text += "doorOrWindow#2=true\n"
    with zipfile.ZipFile(tmp_path / "some.sh3f", "w") as archive:
        archive.writestr("PluginFurnitureCatalog.properties", text)
        archive.writestr("some/chair.obj", trimesh.creation.box().export(file_type="obj"))
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):  # stopped while unpacking
        patch.setattr(zipfile.ZipFile, "extractall", lambda z, to: z.extract("some/chair.obj", to) and 1 / 0)
        nb.read_catalogue(tmp_path)
    (name, entry), *others = nb.read_catalogue(tmp_path).items()
    assert name == "Some#chair" and not others and entry.category == "Office" and entry.top == 0.45
    assert np.ptp(nb.load_mesh(entry.file, name, entry.size).box, 0) == pytest.approx([0.5, 0.9, 0.6])


@pytest.mark.parametrize("make, what", [
    (lambda file: file.write_bytes(b"no model"), r"bad\.glb cannot be read"),
    (lambda file: trimesh.PointCloud(np.eye(3)).export(file), r"bad\.glb has 0 triangles"),
    (lambda file: trimesh.creation.icosphere(7).export(file), r"bad\.glb has 327,680 triangles"),
    (lambda file: trimesh.creation.box(extents=[900] * 3).export(file), r"900 metres large"),
])  # fmt: skip
def test_a_model_that_is_none_is_refused_by_name(nb, tmp_path, make, what):
    make(tmp_path / "bad.glb")
    with pytest.raises(ValueError, match=what) as error:
        nb.read_catalogue(tmp_path)
    assert "\n" not in str(error.value)


def test_a_folder_without_models_is_refused(nb, tmp_path):
    with pytest.raises(ValueError, match=r"holds no \.sh3f, OBJ or GLB"):
        nb.read_catalogue(tmp_path)


# The object in the scene


def test_farther_is_smaller_and_deeper(nb):
    backdrop, shares, depths = yard(nb), [], []
    for z in (-3.5, -5.0, -8.0):
        _, mask, depth = put(nb, backdrop, crate(nb).placed((0.2, 0, z), 20))
        near, far = (1 / metres for metres in backdrop.range)
        assert np.median(1 / (near - depth[mask].astype(float) * (near - far))) == pytest.approx(-z, abs=0.6)
        shares.append(mask.sum())
        depths.append(depth[mask].mean())
    assert shares[0] > shares[1] > shares[2] > 0
    assert shares[0] / shares[1] == pytest.approx((5 / 3.5) ** 2, rel=0.35)
    assert depths[0] < depths[1] < depths[2]


def test_mirroring_in_the_middle_of_the_picture_flips_the_mask(nb):
    backdrop = yard(nb)
    placed = (crate(nb).placed((0, 0, -4), mirrored=mirrored) for mirrored in (False, True))
    one, other = (put(nb, backdrop, mesh)[1] for mesh in placed)
    assert (one != other[:, ::-1]).mean() < 0.005 and (one != other).mean() > 0.01


def test_a_wall_in_front_hides_the_object_in_mask_and_depth(nb):
    masks = []
    for wall in ([], [nb.box([0, 0, -2.05], [9, 9, -2], grey(nb))]):  # a wall over the right half
        backdrop = yard(nb, 64, wall)
        _, mask, depth = put(nb, backdrop, crate(nb).placed((0, 0, -4)))
        masks.append(mask)
        np.testing.assert_array_equal(depth[~mask], backdrop.depth[~mask])
    assert masks[0][:, 33:].any() and not masks[1][:, 33:].any()
    np.testing.assert_array_equal(masks[0][:, :31], masks[1][:, :31])


def test_the_object_takes_the_sun_from_the_ground_behind_it_and_from_nothing_else(nb):
    sun = nb.Light(np.array([0, 300.0, 300]), np.array([0.5, 0, 0]), np.zeros(3), np.ones(3), sun=True)
    backdrop = yard(nb, lights=[sun])
    image, mask, _ = put(nb, backdrop, nb.box([-0.5, 0, -4.2], [0.5, 1, -3.8], grey(nb)))
    taken = (1 - image / np.maximum(backdrop.light, 1e-6)).mean(2)
    row, column, _ = (value[0] for value in backdrop.scene.camera.project(np.array([[0, 0, -5.1]])))
    far, beside = (-1, 0), (int(row), 4)
    assert mask[int(row), int(column)] or taken[int(row), int(column)] > 0.3
    assert taken[beside] == pytest.approx(0, abs=1e-6) and taken[far] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("number", range(6))
def test_every_object_is_seen_on_every_background(nb, number):
    backdrop = nb.make_backdrop(0, number, 64)
    assert np.isfinite(backdrop.soft).all() and 0 < backdrop.exposure < 1e4
    for image, mask, depth in nb.make_pair(0, 64, number, 7 * number, 0):
        assert 0.003 < mask.mean() < 0.4 and np.isfinite(image).all() and (image >= 0).all()
        assert (depth[mask] <= backdrop.depth[mask] + 1e-6).all()


@pytest.mark.parametrize("seed, blocked", [(91, 0), (92, 1), (93, 2), (94, 20)])
def test_a_view_without_floor_within_reach_is_drawn_anew(nb, monkeypatch, seed, blocked):
    """Scenes of which the first have a wall right before the camera: the first without one is taken."""
    before = nb.box([-9, -1, -1.1], [9, 9, -1], grey(nb))
    drawn = []

    def scene(rng, size):
        drawn.append(rng.random())
        return yard_scene(nb, size, [before] if len(drawn) <= blocked else [])

    monkeypatch.setattr(nb, "room", scene)
    monkeypatch.setattr(nb, "outdoors", scene)
    if blocked == 20:
        with pytest.raises(ValueError, match=r"Background 3 shows no floor in 20 scenes\. Give"):
            nb.make_backdrop(seed, 3, 64)
        return
    for number in range(3):
        assert all(mask.any() for _, mask, _ in nb.make_pair(seed, 64, 0, number, 0))
    assert len(set(drawn)) == len(drawn) == blocked + 1  # none alike, and none too many


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
                assert 0.002 <= (mask > 0).mean() <= 0.41
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


@pytest.mark.parametrize("error, workers", [(RuntimeError, 1), (KeyboardInterrupt, 1), (KeyError, 2)])
def test_an_exception_leaves_nothing_behind(nb, tmp_path, monkeypatch, error, workers):
    make = nb.make_backdrop

    def fail_late(seed, background, size):
        if background == 1:
            raise error("in the second background")
        return make(seed, background, size)

    monkeypatch.setattr(nb, "make_backdrop", fail_late)
    with pytest.raises(error):
        nb.make_dataset(tmp_path / "a.zip", **SMALL, workers=workers)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="workers are forked on Linux only")
def test_killed_in_the_midst_leaves_no_zip_and_no_worker_and_a_second_run_is_right(nb, small, tmp_path):
    path = tmp_path / "a.zip"
    options = SMALL | {"backgrounds": 60, "workers": 2}
    script = f"import helpers; helpers._drawing().make_dataset({str(path)!r}, **{options})"
    child = subprocess.Popen([sys.executable, "-c", script], cwd=helpers.ROOT, stderr=subprocess.DEVNULL)
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
