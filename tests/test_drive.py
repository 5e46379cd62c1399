"""Copies on Google Drive: training neither waits for a Drive that fails nor loses anything by it.

A folder stands for Drive, and the faults are put in at the one place that copies."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch
from test_resume import Watched, contents, different

import helpers
from helpers import MODELS, Config, drive_report, fetch, run, workspace


@pytest.fixture(scope="module")
def config(data):
    """Three epochs of eight steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "tiny", Watched)
        options = {"split": "image", "max_train": 32, "batch_size": 4, "epochs": 3, "checkpoint_minutes": 0.0}
        return Config("first", data=data, size=16, model="tiny", lr=0.02, precision="float32", **options)


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    """What the run leaves without any Drive."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKSPACE", str(tmp_path_factory.mktemp("undisturbed")))
        patch.setitem(MODELS, "tiny", Watched)
        return contents(run(config, quiet=True).folder)


def colab(patch, folder, drive):
    """Makes this process one on a new machine, with its files in `folder` and Drive mounted at `drive`."""
    package = types.ModuleType("google.colab")
    package.drive = types.SimpleNamespace(mount=lambda place: None)
    patch.setitem(sys.modules, "google.colab", package)
    patch.setattr(helpers, "in_colab", lambda: True)
    patch.setattr(helpers, "DRIVE", drive)
    patch.setattr(helpers, "LOOK_AGAIN", 0.02)
    patch.setenv("WORKSPACE", str(folder))
    patch.setitem(MODELS, "tiny", Watched)
    patch.setattr(Watched, "steps", 0)
    patch.setattr(Watched, "happens", {})
    helpers._drive.cache_clear()
    return folder


@pytest.fixture
def drive(tmp_path):
    (tmp_path / "drive" / "MyDrive").mkdir(parents=True)
    return tmp_path / "drive"


@pytest.fixture
def there(drive):
    return drive / "MyDrive" / "mask-and-depth"


@pytest.fixture
def local(tmp_path, drive, monkeypatch):
    return colab(monkeypatch, tmp_path / "machine", drive)


class Faulty:
    """Drive's faults, at the one place that copies."""

    def __init__(self, drive):
        self.drive, self.failure, self.copied, self.right = drive, "", [], helpers._copy
        self.released = threading.Event()

    def copy(self, source, target):
        if self.failure == "hang":
            self.released.wait(60)
        elif isinstance(self.failure, int):
            raise OSError(self.failure, os.strerror(self.failure))
        self.right(source, target)
        self.copied.append(target)

    def fail(self, failure):
        self.failure = failure
        if failure == "vanish":
            os.rename(self.drive, self.drive.with_name("away"))
            self.drive.mkdir()  # an empty folder, on which Drive was mounted

    def recover(self):
        if self.failure == "vanish":
            self.drive.rmdir()  # nothing was written there
            os.rename(self.drive.with_name("away"), self.drive)
        self.failure = ""
        self.released.set()


@pytest.fixture
def faulty(drive, local, monkeypatch):
    made = Faulty(drive)
    monkeypatch.setattr(helpers, "_copy", made.copy)
    yield made
    made.released.set()


def until(happens, seconds=60):
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def files(folder):
    """What a folder holds: path -> bytes."""
    found = {path.relative_to(folder): path.read_bytes() for path in filter(Path.is_file, folder.rglob("*"))}
    return {str(name): content for name, content in found.items() if name.name[0] != "."}


@pytest.mark.parametrize("failure", [errno.EIO, errno.ENOSPC, errno.ENOTCONN, "hang", "vanish"])
def test_training_goes_on_while_drive_fails_and_what_is_missing_is_copied_later(
    failure, faulty, config, undisturbed, local, there
):
    def happens():
        until(lambda: (there / "first" / "images" / "epoch_001" / "sheet.png").exists())
        faulty.fail(failure)

    Watched.happens = {12: happens}  # in the second epoch
    run(config, quiet=True)
    assert different(contents(local / "first"), undisturbed) == []
    report = drive_report(0.3)
    assert "Not there (" in report and "first/results.json" in report and str(local) in report
    if failure != "hang":
        assert os.strerror(failure if isinstance(failure, int) else errno.ENOENT) in report
    faulty.recover()
    assert "Not there" not in drive_report(60) and files(there) == files(local)


def test_what_can_be_copied_is_copied_beside_what_cannot(faulty, config, there, monkeypatch):
    def copy(source, target):
        if "first" in target.parts:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        faulty.right(source, target)

    monkeypatch.setattr(helpers, "_copy", copy)
    run(config, stop_after=1, quiet=True)
    (workspace() / "notes.txt").write_text("kept")
    report = drive_report(2)
    assert files(there) == {"notes.txt": b"kept"}
    assert "first/checkpoint.pt" in report and "notes.txt" not in report


def test_a_copy_that_is_cut_off_leaves_no_half_file(local, there, monkeypatch):
    right, cuts = shutil.copyfile, []

    def half(source, target):
        cuts.append(target)
        if len(cuts) < 5:
            Path(target).write_bytes(Path(source).read_bytes()[:3])
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        right(source, target)

    monkeypatch.setattr(shutil, "copyfile", half)
    (workspace() / "notes.txt").write_text("a longer text")
    until(lambda: len(cuts) > 2)
    assert {path.name for path in there.iterdir()} <= {"notes.txt.copy.part", "notes.txt"}
    assert not fetch("notes.txt.copy.part").exists()  # is not brought
    assert "Not there" not in drive_report(60)
    assert files(there) == {"notes.txt": b"a longer text"}


def test_however_copying_is_cut_off_what_is_on_drive_belongs_together(faulty, config, there, monkeypatch):
    moments = []

    def copy(source, target):
        faulty.right(source, target)
        time.sleep(0.1)  # time enough for the run to make more
        if (there / "first" / "checkpoint.pt").exists():
            done = len(torch.load(there / "first" / "checkpoint.pt", weights_only=True)["history"])
            moments.append((done, len(list(there.glob("first/images/epoch_00[1-3]/sheet.png")))))
        assert not (there / "first" / "results.json").exists() or (there / "first" / "best.pt").exists()

    monkeypatch.setattr(helpers, "_copy", copy)
    monkeypatch.setattr(Watched, "seconds", 0.03)
    run(config, quiet=True)
    assert "Not there" not in drive_report(60)
    assert moments[-1] == (3, 3) and all(done <= pictures for done, pictures in moments)


def test_the_next_machine_reads_a_finished_run_and_copies_nothing(
    faulty, config, undisturbed, there, tmp_path, monkeypatch, capsys
):
    run(config, quiet=True)
    drive_report(60)
    pictures = ["epoch_000_step_000", *(f"epoch_00{i}" for i in (1, 2, 3))]
    assert sorted(path.name for path in there.glob("first/images/*")) == pictures
    faulty.copied.clear()
    following = colab(monkeypatch, tmp_path / "next", helpers.DRIVE)
    assert run(config).results and "finished before" in capsys.readouterr().out and Watched.steps == 0
    assert different(contents(following / "first"), undisturbed) == []
    assert "Not there" not in drive_report(60)
    assert [target for target in faulty.copied if there in target.parents] == []


def test_nothing_newer_is_overwritten_by_something_older(local, there):
    there.mkdir()
    local.mkdir()
    now = time.time()
    for name, mine, theirs in (("a.json", now - 99, now), ("b.json", now, now - 99)):
        for folder, at in ((local, mine), (there, theirs)):
            (folder / name).write_text(f"of {folder.name}")
            os.utime(folder / name, (at, at))
    assert "Not there" not in drive_report(60)
    assert files(there) == {"a.json": b"of mask-and-depth", "b.json": b"of machine"}
    drive = types.SimpleNamespace(folder=there)
    assert "hung" in helpers._copy_newer(there, local, drive, {}, "a.json", until=time.monotonic() - 1)
    assert (local / "a.json").read_text() == "of machine"  # what comes late might be another run's
    assert fetch("a.json").read_text() == "of mask-and-depth"
    assert fetch("b.json").read_text() == "of machine"


def another_process(config, folder, drive, what):
    """A process on a machine of its own, which does what `main` says."""
    values = json.dumps([dataclasses.asdict(config), str(folder), str(drive), what])
    command, place = [sys.executable, __file__, values], os.environ | {"PYTHONPATH": str(helpers.ROOT)}
    return subprocess.Popen(command, env=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_what_a_lost_machine_has_left_on_drive_is_taken_up_by_the_next(
    config, undisturbed, drive, there, tmp_path, monkeypatch
):
    lost = another_process(config, tmp_path / "lost", drive, "slow")
    checkpoint = there / "first" / "checkpoint.pt"
    until(lambda: checkpoint.exists() and torch.load(checkpoint, weights_only=True)["step"] > 9)
    lost.kill()
    lost.communicate()
    assert lost.returncode == -signal.SIGKILL and not (tmp_path / "lost" / "first" / "results.json").exists()
    shutil.rmtree(tmp_path / "lost")
    step = torch.load(checkpoint, weights_only=True)["step"]
    local = colab(monkeypatch, tmp_path / "next", drive)
    run(config, quiet=True)
    assert Watched.steps == 24 - step
    assert different(contents(local / "first"), undisturbed) == []
    assert "Not there" not in drive_report(60)
    assert {name for name in files(there) if name[-5:] != ".part"} == files(local).keys()


def test_a_script_ends_though_drive_hangs_for_ever(config, drive, there, tmp_path):
    (there / "first").mkdir(parents=True)
    (there / "first" / "notes.txt").write_text("newer on Drive, which does not give it")
    ended = another_process(config, tmp_path / "machine", drive, "hang")
    printed, _ = ended.communicate(timeout=240)
    assert ended.returncode == 0, printed
    assert "Google Drive does not give first (it hangs)" in printed
    assert "Not there (it hangs, or there was no time yet)" in printed and "first/results.json" in printed


def main(settings, folder, drive, what):
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        colab(patch, Path(folder), Path(drive))
        if what == "hang":
            helpers._copy, helpers.PATIENCE = lambda *_: threading.Event().wait(), 1.0
        else:
            Watched.seconds = 0.2
        run(Config(**settings))
        print(drive_report(1))


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
