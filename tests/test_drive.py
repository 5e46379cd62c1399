"""Copies on Google Drive: that training neither waits for a Drive that fails nor loses anything by it.

Each failure is played twice: by a file system that fails (faulty_drive.py, where FUSE can be mounted), and at the one place
that copies, on every machine.
"""

import collections
import contextlib
import dataclasses
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for when this file is run by itself, below
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from test_runs import Tiny, assert_same_run, checkpoint, renamed

import helpers
from helpers import MODELS, Config, drive_report, fetch, keep, run, run_all


class SlowTiny(Tiny):
    """The same, and time enough to be killed in the midst of an epoch."""

    def forward(self, bg, fg_bg):
        time.sleep(0.2 if self.training else 0)
        return super().forward(bg, fg_bg)


PROJECT = Path("MyDrive") / "mask-and-depth"
FAILS, ANSWERS = "Google Drive fails", "Google Drive answers again"


@pytest.fixture(scope="module")
def data(write_zip, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.zip"
    write_zip(path, samples=[(b, f, 1) for b in range(1, 9) for f in range(1, 9)], size=16)
    return path


@pytest.fixture(scope="module")
def config(data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "tiny", Tiny)
        return Config("first", data=str(data), size=16, model="tiny", epochs=3, batch_size=8, lr=0.02, precision="float32")


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    """The run as it is without any Drive."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKSPACE", str(tmp_path_factory.mktemp("undisturbed")))
        patch.setitem(MODELS, "tiny", Tiny)
        return run(config, quiet=True).folder


@pytest.fixture(autouse=True)
def times(monkeypatch):
    """Seconds instead of minutes; and what is still to be copied when a test ends is forgotten."""
    made = []
    first = helpers._Copies.__init__
    monkeypatch.setattr(helpers._Copies, "__init__", lambda self, *args: (made.append(self), first(self, *args))[1])
    monkeypatch.setattr(helpers, "_PATIENCE", 20.0)
    monkeypatch.setattr(helpers, "_RETRY", 0.05)
    monkeypatch.setitem(MODELS, "tiny", Tiny)
    yield
    for copies in made:
        copies.wanted.clear()
        copies._running.clear()
        copies.say = lambda: None


def machine(monkeypatch, folder, drive):
    """Makes this process one on a machine with its files in `folder` and Drive mounted at `drive`. As if just started."""
    folder.mkdir(exist_ok=True)
    monkeypatch.setattr(helpers, "ROOT", folder)
    monkeypatch.setattr(helpers, "DRIVE", drive)
    monkeypatch.setenv("WORKSPACE", str(drive / PROJECT))
    helpers._copies_of.cache_clear()
    return folder / "runs"


@pytest.fixture
def drive(tmp_path):
    (tmp_path / "drive" / "MyDrive").mkdir(parents=True)
    return tmp_path / "drive"


@pytest.fixture
def local(tmp_path, drive, monkeypatch):
    return machine(monkeypatch, tmp_path / "machine", drive)


def files(folder):
    """What a folder holds: path -> bytes. What lies packed in it counts as unpacked."""
    found = {}
    for path in Path(folder).rglob("*"):
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                found |= {
                    str(path.with_suffix("").relative_to(folder) / name): archive.read(name) for name in archive.namelist()
                }
        elif path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def assert_all_there(local, drive):
    """Every file is on Drive, equal byte for byte, and nothing else; the pictures of an epoch are one file there."""
    mine, theirs = files(local), files(drive)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if mine[name] != theirs[name]] == []
    assert not list(Path(drive).rglob("*.png"))
    count = sum(path.is_file() for path in Path(drive).rglob("*"))
    assert count == 6 + len(list(Path(local).glob("images/epoch_*")))


def until(happens, seconds=60):
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# A Drive that fails


class FaultyMount:
    """Drive as a file system that fails."""

    def __init__(self, tmp_path, monkeypatch):
        self.behind, self.folder, self.control = (tmp_path / name for name in ("behind", "mount", "control"))
        (self.behind / "MyDrive").mkdir(parents=True)
        self.folder.mkdir()
        self.come_back()

    def fail(self, failure):
        if failure == "vanish":
            subprocess.run(["fusermount3", "-u", "-z", self.folder], check=True)
        elif failure == "die":
            self.process.kill()
            self.process.wait()
        else:
            self.control.write_text(failure)

    def recover(self, failure):
        if failure in ("vanish", "die"):
            self.come_back()
        else:
            self.control.write_text("")

    def come_back(self):
        with contextlib.suppress(FileNotFoundError):
            subprocess.run(["fusermount3", "-u", "-z", self.folder], capture_output=True)
        self.control.write_text("")
        program = [sys.executable, Path(__file__).with_name("faulty_drive.py"), self.behind, self.folder, self.control]
        self.process = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while not os.path.ismount(self.folder):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.end()
                pytest.skip("FUSE cannot be mounted here")
            time.sleep(0.01)

    def end(self):
        self.control.write_text("")
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(FileNotFoundError):
            subprocess.run(["fusermount3", "-u", "-z", self.folder], capture_output=True)


class Injected:
    """Drive as a folder, with failures at the one place that copies."""

    def __init__(self, tmp_path, monkeypatch):
        self.behind = self.folder = tmp_path / "drive"
        (self.folder / "MyDrive").mkdir(parents=True)
        self.failure, self.released, self.right = "", threading.Event(), helpers._copy
        monkeypatch.setattr(helpers, "_copy", self.copy)
        monkeypatch.setattr(helpers, "open", self.open, raising=False)

    def copy(self, source, target, time_ns, moved):
        kind, number = self.failure.split() or ["", ""]
        if kind in ("writes", "all"):
            raise OSError(int(number), os.strerror(int(number)))
        if kind == "hang":
            self.released.wait(60)
        return self.right(source, target, time_ns, moved)

    def open(self, path, mode="r", **options):
        """What was written on Drive reads otherwise, once."""
        if self.failure.startswith("garble") and mode == "rb" and str(path).endswith(".part"):
            self.failure = ""
            return io.BytesIO(b"something else")
        return open(path, mode, **options)

    def fail(self, failure):
        if failure == "vanish":
            os.rename(self.folder, self.folder.with_name("away"))
            self.folder.mkdir()
        else:
            self.failure = failure

    def recover(self, failure):
        if failure == "vanish":
            assert list(self.folder.iterdir()) == []  # nothing was written in the folder that Drive is mounted on
            self.folder.rmdir()
            os.rename(self.folder.with_name("away"), self.folder)
        self.failure = ""
        self.released.set()

    def end(self):
        self.released.set()


@pytest.fixture
def faulty(request, tmp_path, monkeypatch):
    made = request.param(tmp_path, monkeypatch)
    made.local = machine(monkeypatch, tmp_path / "machine", made.folder)
    yield made
    made.end()


both = pytest.mark.parametrize("faulty", [FaultyMount, Injected], indirect=True)
FAILURES = {
    "writes 5": f"Errno 5, {os.strerror(5)}",
    "writes 28": f"Errno 28, {os.strerror(28)}",
    "writes 107": f"Errno 107, {os.strerror(107)}",
    "all 5": "Errno 5, ",
    "hang 0": "it does not answer",
    "vanish": "it is not mounted",
}


def at_epoch(monkeypatch, epoch, happens):
    """Has something happen in the midst of a run, when it is about to write the pictures of an epoch."""
    right = helpers._save_images

    def save_images(folder, *args):
        if folder.name == f"epoch_{epoch:03}":
            happens()
        right(folder, *args)

    monkeypatch.setattr(helpers, "_save_images", save_images)


def lose_drive_in_the_second_epoch(faulty, failure, monkeypatch):
    def happens():
        until(lambda: "epoch_001.zip" in str(list(faulty.behind.rglob("*"))) and not helpers._copies().wanted)
        if failure.startswith("hang"):
            monkeypatch.setattr(helpers, "_PATIENCE", 0.5)
        faulty.fail(failure)

    at_epoch(monkeypatch, 2, happens)


@both
@pytest.mark.parametrize("failure", FAILURES)
def test_training_goes_on_while_drive_fails_and_what_is_missing_is_copied_later(
    faulty, failure, config, undisturbed, monkeypatch, capsys
):
    lose_drive_in_the_second_epoch(faulty, failure, monkeypatch)
    finished = run(config, quiet=True)
    assert_same_run(undisturbed, finished.folder)
    report = drive_report(patience=0.2)
    assert "Not there, or not as it is here: first (" in report and FAILURES[failure] in report
    printed = capsys.readouterr().out
    assert printed.count(FAILS) == 1 and FAILURES[failure] in printed and ANSWERS not in printed
    assert not (faulty.behind / PROJECT / "first" / "results.json").exists()

    faulty.recover(failure)
    monkeypatch.setattr(helpers, "_PATIENCE", 20.0)
    report = drive_report(patience=60)
    assert "Not there" not in report and " 9 files, read back and compared" in report
    printed = capsys.readouterr().out
    assert printed.count(ANSWERS) == 1 and FAILS not in printed
    assert_all_there(faulty.local / "first", faulty.behind / PROJECT / "first")


@pytest.mark.parametrize("faulty", [FaultyMount], indirect=True)
def test_a_drive_whose_program_dies_is_filled_up_once_it_is_mounted_again(faulty, config, undisturbed, monkeypatch, capsys):
    lose_drive_in_the_second_epoch(faulty, "die", monkeypatch)
    assert_same_run(undisturbed, run(config, quiet=True).folder)
    assert f"Errno {errno.ENOTCONN}" in drive_report(patience=0.2)
    shutil.rmtree(faulty.behind / PROJECT / "first" / "images")  # what it had not uploaded
    faulty.recover("die")
    assert "Not there" not in drive_report(patience=60)
    printed = capsys.readouterr().out
    assert printed.count(FAILS) == printed.count(ANSWERS) == 1
    assert_all_there(faulty.local / "first", faulty.behind / PROJECT / "first")


@both
def test_what_reads_otherwise_than_it_was_written_is_copied_again(faulty, config, undisturbed, monkeypatch):
    failures = []
    reason = helpers._reason
    monkeypatch.setattr(helpers, "_reason", lambda error: failures.append(error.strerror) or reason(error))
    (faulty.behind / PROJECT).mkdir()
    faulty.local.mkdir()
    (faulty.local / "photo.jpg").write_bytes(os.urandom(300_000))
    faulty.fail("garble 0")
    keep(faulty.local / "photo.jpg")
    assert " 1 file, " in drive_report(patience=60)
    assert failures == ["what was written reads otherwise"]
    assert files(faulty.behind / PROJECT) == {"photo.jpg": (faulty.local / "photo.jpg").read_bytes()}


@both
def test_what_was_wanted_several_times_while_drive_hung_is_there_as_it_was_last(faulty, monkeypatch):
    faulty.local.mkdir()
    photo = faulty.local / "photo.jpg"
    monkeypatch.setattr(helpers, "_PATIENCE", 0.3)
    faulty.fail("hang 0")
    for content in (b"one", b"two, longer", b"three, the longest"):
        photo.write_bytes(content)
        keep(photo)
        assert "it does not answer" in drive_report(patience=0.5)
    monkeypatch.setattr(helpers, "_PATIENCE", 20.0)
    faulty.recover("hang 0")
    assert "Not there" not in drive_report(patience=60)
    until(lambda: [path.name for path in (faulty.behind / PROJECT).iterdir()] == ["photo.jpg"])
    assert (faulty.behind / PROJECT / "photo.jpg").read_bytes() == b"three, the longest"


def test_a_thread_that_was_left_behind_and_goes_on_after_all_changes_nothing(local, drive, monkeypatch):
    right, hung, release = helpers._copy, [], threading.Event()

    def copy(*args):
        if not hung:
            hung.append(threading.current_thread())
            release.wait(60)
        right(*args)

    monkeypatch.setattr(helpers, "_copy", copy)
    monkeypatch.setattr(helpers, "_PATIENCE", 0.5)
    photo = helpers.work_folder() / "photo.jpg"
    photo.write_bytes(b"the first")
    keep(photo)
    until(lambda: hung)
    photo.unlink()  # the thread that hangs keeps what it has opened
    photo.write_bytes(b"the second")
    keep(photo)
    until(lambda: not helpers._copies().wanted)
    release.set()
    hung[0].join(60)
    assert not hung[0].is_alive()
    assert files(drive / PROJECT) == {"photo.jpg": b"the second"}


def test_a_drive_that_vanishes_just_before_a_file_is_written_leaves_its_place_empty(local, drive, monkeypatch):
    def vanish(*args):
        if (drive / "MyDrive").exists():
            os.rename(drive / "MyDrive", drive.with_name("away"))

    monkeypatch.setattr(helpers, "_stamp_there", vanish)
    (helpers.work_folder() / "notes.txt").write_text("kept")
    keep(local / "notes.txt")
    assert "Not there" in drive_report(patience=0.3)
    assert os.listdir(drive) == []


@pytest.mark.parametrize("faulty", [FaultyMount], indirect=True)
def test_a_further_run_on_a_drive_that_cannot_be_read_at_the_start_is_not_touched(
    faulty, config, undisturbed, tmp_path, monkeypatch, capsys
):
    assert run(config, stop_after=2, quiet=True).history
    drive_report(patience=60)
    before = files(faulty.behind)
    next_machine = machine(monkeypatch, tmp_path / "next", faulty.folder)
    monkeypatch.setattr(helpers, "_PATIENCE", 1.0)
    faulty.fail("all 5")
    assert len(run(config, stop_after=1, quiet=True).history) == 1  # trained anew
    assert capsys.readouterr().out.count(FAILS) == 1
    monkeypatch.setattr(helpers, "_PATIENCE", 20.0)
    faulty.recover("all 5")
    assert "Not there: first, as Drive holds the same run, and it is further there" in drive_report(patience=60)
    printed = capsys.readouterr().out
    assert printed.count(ANSWERS) == printed.count("first is not copied to Google Drive: Drive holds the same run") == 1
    assert files(faulty.behind) == before

    assert_same_run(undisturbed, run(config, quiet=True).folder)  # brings it, and goes on
    assert "Not there" not in drive_report(patience=60)
    assert_all_there(next_machine / "first", faulty.behind / PROJECT / "first")


@pytest.mark.parametrize("faulty", [FaultyMount], indirect=True)
def test_a_drive_that_fails_for_a_moment_at_the_start_is_asked_again(
    faulty, config, undisturbed, tmp_path, monkeypatch, capsys
):
    run(config, stop_after=2, quiet=True)
    drive_report(patience=60)
    local = machine(monkeypatch, tmp_path / "next", faulty.folder)
    faulty.fail("all 5")
    threading.Timer(0.5, faulty.recover, ["all 5"]).start()
    assert_same_run(undisturbed, run(config).folder)
    assert "goes on after epoch 2" in capsys.readouterr().out
    assert "Not there" not in drive_report(patience=60)
    assert_all_there(local / "first", faulty.behind / PROJECT / "first")


@pytest.mark.parametrize("faulty", [FaultyMount], indirect=True)
def test_a_full_drive_still_gives_what_it_holds(faulty, config, undisturbed, tmp_path, monkeypatch, capsys):
    run(config, stop_after=2, quiet=True)
    drive_report(patience=60)
    machine(monkeypatch, tmp_path / "next", faulty.folder)
    faulty.fail("writes 28")
    (helpers.work_folder() / "photo.jpg").write_bytes(b"no room")
    keep(helpers.work_folder() / "photo.jpg")
    assert "Errno 28" in drive_report(patience=0.2)
    assert_same_run(undisturbed, run(config).folder)
    assert "goes on after epoch 2" in capsys.readouterr().out


@pytest.mark.parametrize("faulty", [FaultyMount], indirect=True)
def test_a_drive_that_cannot_be_read_raises_where_a_file_is_fetched(faulty):
    (faulty.behind / PROJECT).mkdir()
    (faulty.behind / PROJECT / "chosen.json").write_text("{}")
    faulty.fail("all 107")
    with pytest.raises(OSError, match="107"):
        fetch("chosen.json")
    assert not (faulty.local / "chosen.json").exists()
    faulty.recover("all 107")
    assert fetch("chosen.json").read_text() == "{}"


@pytest.mark.parametrize(
    "error", [MemoryError("no room"), RuntimeError("dictionary changed size"), zipfile.BadZipFile("File is not a zip file")]
)
def test_an_error_of_another_kind_does_not_end_the_copying(local, drive, monkeypatch, error):
    right, calls = helpers._copy, []

    def copy(*args):
        calls.append(args)
        if len(calls) == 1:
            raise error
        right(*args)

    monkeypatch.setattr(helpers, "_copy", copy)
    (helpers.work_folder() / "notes.txt").write_text("kept")
    keep(local / "notes.txt")
    assert "Not there" not in drive_report(patience=60)
    assert (drive / PROJECT / "notes.txt").read_text() == "kept" and len(calls) == 2


def test_a_thread_that_cannot_be_started_does_not_end_the_copying(local, drive, monkeypatch):
    right, calls = helpers._Copies.in_time, []

    def in_time(*args, **options):
        calls.append(args)
        if len(calls) == 1:
            raise RuntimeError("can't start new thread")
        return right(*args, **options)

    monkeypatch.setattr(helpers._Copies, "in_time", in_time)
    (helpers.work_folder() / "notes.txt").write_text("kept")
    keep(local / "notes.txt")
    assert "Not there" not in drive_report(patience=60)
    assert (drive / PROJECT / "notes.txt").read_text() == "kept" and len(calls) > 1


# A Drive that is well


@pytest.fixture
def copied(monkeypatch):
    """How often each file has been copied to Drive."""
    count, right = collections.Counter(), helpers._copy

    def copy(source, target, *args):
        count["/".join(target.parts[target.parts.index("mask-and-depth") + 1 :])] += 1
        right(source, target, *args)

    monkeypatch.setattr(helpers, "_copy", copy)
    return count


def test_a_finished_run_is_not_copied_again_by_the_next_notebook(
    local, drive, config, undisturbed, copied, tmp_path, monkeypatch
):
    assert_same_run(undisturbed, run(config, quiet=True).folder)
    assert " 9 files" in drive_report()
    assert_all_there(local / "first", drive / PROJECT / "first")
    assert copied["first/config.json"] == copied["first/images/epoch_001.zip"] == copied["first/results.json"] == 1
    copied.clear()
    for folder in ("machine", "next"):  # the same machine, and one that has nothing yet
        next_local = machine(monkeypatch, tmp_path / folder, drive)
        assert run(config, quiet=True).results
        assert " 9 files" in drive_report()
        assert_same_run(undisturbed, next_local / "first")
    assert copied == {}
    assert_all_there(local / "first", drive / PROJECT / "first")


def test_a_folder_of_many_files_is_copied_though_few_can_be_open(local, drive):
    resource = pytest.importorskip("resource")
    examples = helpers.work_folder() / "examples"
    examples.mkdir()
    for i in range(100):
        (examples / f"{i}.txt").write_text(str(i))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 30, hard))
    try:
        keep(examples)
        assert " 100 files" in drive_report(patience=0.2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert files(drive / PROJECT) == {f"examples/{i}.txt": str(i).encode() for i in range(100)}


def test_pictures_that_are_being_written_are_not_copied(local, drive, config):
    part = helpers.work_folder() / "first" / "images" / "epoch_001.part"
    part.mkdir(parents=True)
    for i in range(48):
        (part / f"{i}.png").write_bytes(b"half")
    (local / "first" / "best.pt.part").write_bytes(b"half")
    keep(local / "first")
    assert " 0 files" in drive_report()
    assert files(drive) == {}


@pytest.mark.parametrize("copied_before", [True, False])
def test_what_run_all_deletes_goes_from_drive_too(local, drive, config, monkeypatch, copied_before):
    if copied_before:
        monkeypatch.setattr(helpers, "run", lambda *args, **options: (run(*args, **options), drive_report())[0])
    run_all({"all": [config]})
    assert "Not there" not in drive_report()
    kept = {str(path.relative_to(drive / PROJECT / "first")) for path in (drive / PROJECT / "first").rglob("*.*")}
    assert kept == {"config.json", "metrics.csv", "timing.csv", "best.pt", "results.json", "images/epoch_003.zip"}


def test_however_copying_is_cut_off_what_is_on_drive_belongs_together(local, drive, config, monkeypatch):
    right, there, moments = helpers._copy, drive / PROJECT / "first", []

    def copy(*args):
        right(*args)
        rows = max(0, len((there / "metrics.csv").read_text().splitlines()) - 1) if (there / "metrics.csv").exists() else 0
        done = len(checkpoint(there)["history"]) if (there / "checkpoint.pt").exists() else 0
        pictures = len(list(there.glob("images/*.zip")))
        whole = not (there / "results.json").exists() or (rows == 3 and (there / "best.pt").exists())
        moments.append(rows <= done <= pictures and whole)

    monkeypatch.setattr(helpers, "_copy", copy)
    run(config, quiet=True)
    drive_report()
    assert len(moments) >= 9 and all(moments)


def test_a_checkpoints_predecessor_stays_here(local, drive, config):
    run(config, stop_after=2, quiet=True)
    drive_report()
    here, there = files(local / "first").keys(), files(drive / PROJECT / "first").keys()
    assert here - there == {"checkpoint_before.pt"} and not there - here


def test_a_discarded_run_goes_from_drive_too_and_is_trained_anew(local, drive, config):
    run(config, quiet=True)
    until(lambda: not helpers._copies().wanted)
    helpers.discard(config.name)
    assert not (local / config.name).exists() and not list(drive.rglob("best.pt"))
    assert len(run(config, stop_after=1, quiet=True).history) == 1
    until(lambda: not helpers._copies().wanted)
    assert [path.name for path in drive.rglob("epoch_*")] == ["epoch_001.zip"]


def test_a_folder_that_is_lost_here_is_not_deleted_there(local, drive, config):
    run(config, quiet=True)
    drive_report()
    before = files(drive)
    shutil.rmtree(local / "first")
    keep(local / "first")
    drive_report()
    assert files(drive) == before


def test_another_config_on_drive_is_refused_with_the_difference_and_left_alone(local, drive, config, tmp_path, monkeypatch):
    run(config, stop_after=1, quiet=True)
    drive_report()
    before = files(drive)
    machine(monkeypatch, tmp_path / "next", drive)
    with pytest.raises(ValueError, match=r"lr was 0\.02 and is 0\.03"):
        run(renamed(config, lr=0.03))
    drive_report()
    assert files(drive) == before


def test_a_run_of_another_config_that_is_here_is_not_copied_over_the_one_on_drive(
    local, drive, config, tmp_path, monkeypatch, undisturbed
):
    run(config, stop_after=1, quiet=True)
    drive_report()
    before = files(drive)
    next_local = machine(monkeypatch, tmp_path / "next", drive)
    shutil.copytree(undisturbed, next_local / "first")
    settings = json.loads((next_local / "first" / "config.json").read_text())
    (next_local / "first" / "config.json").write_text(json.dumps(settings | {"lr": 0.03}))
    assert run(renamed(config, lr=0.03), quiet=True).results
    assert "Not there: first, as Drive holds a run of that name with another Config" in drive_report()
    assert files(drive) == before


def test_a_checkpoint_further_within_the_same_epoch_stands(local, drive, config, tmp_path, monkeypatch, undisturbed, capsys):
    """Cut off within the second epoch, with Drive further than the disk: first on a machine that knows it at the start."""
    often = renamed(config, checkpoint_minutes=0.0)
    kept, right = [], helpers._Training.save

    def save(training, within=None):
        right(training, within)
        if len(training.history) == 1 and within:
            kept.append(shutil.copytree(local / "first", tmp_path / f"after_{within['done']}"))
            if len(kept) == 2:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(helpers._Training, "save", save)
        with pytest.raises(KeyboardInterrupt):
            run(often, quiet=True)
    drive_report()
    done = [checkpoint(folder)["within"]["done"] for folder in kept]
    assert done[0] < done[1] == checkpoint(drive / PROJECT / "first")["within"]["done"]
    next_local = machine(monkeypatch, tmp_path / "next", drive)
    shutil.copytree(kept[0], next_local / "first")
    capsys.readouterr()
    assert_same_run(undisturbed, run(config).folder)
    assert f"goes on after batch {done[1]} of epoch 2" in capsys.readouterr().out


def test_a_run_half_brought_is_brought_again(local, drive, config, tmp_path, monkeypatch, undisturbed):
    run(config, quiet=True)
    drive_report()
    next_local = machine(monkeypatch, tmp_path / "next", drive)
    right, calls = helpers._transfer, []

    def transfer(*args):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return right(*args)

    monkeypatch.setattr(helpers, "_transfer", transfer)
    with pytest.raises(OSError):
        fetch("first")
    assert [path.name for path in next_local.iterdir()] == [".machine"]
    assert_same_run(undisturbed, fetch("first"))


@pytest.mark.parametrize("workspace", ["", "/content/drive/MyDrive/mine"])
def test_without_consent_the_report_says_that_nothing_is_on_drive(tmp_path, monkeypatch, workspace):
    monkeypatch.setenv("WORKSPACE", workspace)
    monkeypatch.setattr(helpers, "ROOT", tmp_path)
    monkeypatch.setattr(helpers, "in_colab", lambda: True)
    monkeypatch.setattr(helpers, "_drive_folder", lambda: None)
    keep(helpers.work_folder() / "notes.txt")
    assert drive_report() == (
        f"Nothing is on Google Drive: what was made is in {tmp_path / 'runs'} and goes with this machine. Download it."
    )


# Several notebooks, several machines: real processes


def another_process(config, root, drive):
    """A process that trains slowly, with its files in `root` and Drive at `drive`."""
    root.mkdir()
    values = json.dumps([dataclasses.asdict(config), str(root), str(drive)])
    return subprocess.Popen([sys.executable, __file__, values], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_others_are_kept_away_from_a_run_and_a_process_that_ends_has_copied_all(
    drive, config, tmp_path, monkeypatch, undisturbed
):
    monkeypatch.setattr(helpers, "_BEAT", BEAT)
    first = another_process(config, tmp_path / "machine", drive)
    local = machine(monkeypatch, tmp_path / "machine", drive)
    until(lambda: (drive / PROJECT / "first" / "in_use.json").exists())
    with pytest.raises(RuntimeError, match="Another notebook or program is at the run 'first'"):
        run(config)
    other = machine(monkeypatch, tmp_path / "other", drive)
    with pytest.raises(RuntimeError, match="Another machine is at the run 'first'"):
        run(config)
    assert first.poll() is None and not (other / "first").exists()
    printed, _ = first.communicate(timeout=120)
    assert first.returncode == 0 and FAILS not in printed and "goes on" not in printed
    assert_same_run(undisturbed, local / "first")
    assert_all_there(local / "first", drive / PROJECT / "first")


def in_the_midst_of_a_later_epoch(checkpoint):
    return checkpoint["within"] and checkpoint["history"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_what_a_lost_machine_has_left_on_drive_is_taken_up_by_the_next_to_the_same_result(
    drive, config, tmp_path, monkeypatch, undisturbed, capsys
):
    monkeypatch.setattr(helpers, "_BEAT", BEAT)
    lost = another_process(renamed(config, checkpoint_minutes=0.0), tmp_path / "lost", drive)
    there = drive / PROJECT / "first"
    until(lambda: (there / "checkpoint.pt").exists() and in_the_midst_of_a_later_epoch(checkpoint(there)))
    os.kill(lost.pid, signal.SIGKILL)
    lost.communicate()
    assert lost.returncode == -signal.SIGKILL and not (tmp_path / "lost" / "runs" / "first" / "results.json").exists()
    shutil.rmtree(tmp_path / "lost")

    local = machine(monkeypatch, tmp_path / "next", drive)
    assert_same_run(undisturbed, run(config).folder)
    printed = capsys.readouterr().out
    assert "another machine was at this run a moment ago" in printed  # and it gave no sign of life
    assert re.search(r"goes on after (batch \d+ of epoch [23]|epoch 2)", printed)
    assert "Not there" not in drive_report()
    assert_all_there(local / "first", there)


def test_a_long_copy_does_not_make_a_machine_look_dead(local, drive, config, monkeypatch):
    monkeypatch.setattr(helpers, "_BEAT", 0.1)
    right, notes = helpers._copy, set()

    def copy(source, target, time_ns, moved):
        right(source, target, time_ns, moved)
        if target.name == "best.pt":
            for _ in range(10):
                time.sleep(0.05)
                moved()
                notes.add((drive / PROJECT / "first" / "in_use.json").read_text())

    monkeypatch.setattr(helpers, "_copy", copy)
    at_epoch(monkeypatch, 2, lambda: until(lambda: len(notes) > 3))
    run(config, quiet=True)
    drive_report()
    assert not (drive / PROJECT / "first" / "in_use.json").exists()


def test_a_run_in_another_machines_hands_is_not_copied(local, drive, config):
    run(config, stop_after=1, quiet=True)
    drive_report()
    note = drive / PROJECT / "first" / "in_use.json"
    note.write_text(json.dumps({"machine": "another", "time": time.time()}))
    before = files(drive)
    (local / "first" / "metrics.csv").touch()
    (local / "first" / "config.json").touch()
    keep(local / "first")
    assert "Not there: first, as another machine is at it" in drive_report()
    assert files(drive) == before


BEAT = 0.5
if __name__ == "__main__":
    torch.set_num_threads(1)  # as conftest.py does
    settings, root, drive = json.loads(sys.argv[1])
    helpers._BEAT, helpers.ROOT, helpers.DRIVE = BEAT, Path(root), Path(drive)
    os.environ["WORKSPACE"] = str(Path(drive) / PROJECT)
    MODELS["tiny"] = SlowTiny
    quick = helpers._copy

    def slow(source, target, *args):
        time.sleep(2 if target.name == "results.json" else 0)  # the run has ended by then
        quick(source, target, *args)

    helpers._copy = slow
    run(Config(**settings))
