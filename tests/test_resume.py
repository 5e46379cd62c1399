"""Runs that are killed or stopped end with the same bytes as one that nothing disturbed.

What is killed are real processes: children that this one forks, which saves each the seconds that importing
torch takes. With the environment variable LONG_TESTS=1 they are killed more often."""

import errno
import json
import os
import random
import shutil
import signal
import time
import traceback
from pathlib import Path

import pytest
import torch
from test_runs import Tiny, contents, steps_of
from torch.optim import lr_scheduler

from helpers import MODELS, Config, read_run, run

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
LONG = os.environ.get("LONG_TESTS") == "1"
EVERYTHING = {"average": 0.9, "depth_weight": "learned", "clip_norm": 0.5, "augment": "mirror+colour+shake"}
CASES = {
    "float32": {"precision": "float32"} | EVERYTHING,
    "bfloat16": {"precision": "bfloat16"} | EVERYTHING,
    "plateau": {"schedule": "plateau", "optimizer": "sgd", "precision": "float16"},
    "step": {"schedule": "step", "optimizer": "rmsprop", "lr": 0.005, "mask_loss": None, "split": "image"},
}
WITH_EVERYTHING = ("float32", "bfloat16")


class Watched(Tiny):
    """In which something can happen in a step of training, counted over the process from 1."""

    happens, steps, seconds = {}, 0, 0.0

    def forward(self, *pictures):
        if self.training:
            Watched.steps += 1
            time.sleep(self.seconds)
            self.happens.get(self.steps, lambda: None)()
        return super().forward(*pictures)


@pytest.fixture(autouse=True)
def watched(monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", Watched)
    monkeypatch.setattr(Watched, "steps", 0)


@pytest.fixture
def place(tmp_path, cache, monkeypatch):
    """The folder of the run, in a workspace and with a folder for decoded pictures of its own."""
    monkeypatch.setenv("WORKSPACE", str(tmp_path / "work"))
    return tmp_path / "work" / "run"


def made(data, case="float32", **options):
    """Two epochs, with a checkpoint after every step."""
    base = {"size": 16, "model": "tiny", "epochs": 2, "lr": 0.02, "batch_size": 8, "checkpoint_minutes": 0.0}
    return Config("run", data=data, **base | {"precision": "float32"} | CASES[case] | options)


def forked(task, after=None):
    """How a child ended that did this: with 0, or 1 where it raised something, or below 0 by a signal; killed
    after so many seconds."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(120)
            task()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill(number=signal.SIGKILL):
    os.kill(os.getpid(), number)


def different(found, expected):
    """The names of files that are not the same, or not in both."""
    return sorted(name for name in found | expected if found.get(name) != expected.get(name))


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """Of a case: what a run leaves that is never disturbed, and how many seconds it takes."""
    known = {}

    def of(case):
        if case not in known:
            folder = tmp_path_factory.mktemp("undisturbed")
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("WORKSPACE", str(folder))
                patch.setattr(Watched, "steps", 0)
                began = time.monotonic()
                assert forked(lambda: run(made(data, case), quiet=True)) == 0
                known[case] = contents(folder / "run"), time.monotonic() - began
        return known[case]

    return of


def at_replace(name, number, before=True):
    """Kills when a file of this name is put into place, for the number-th time: before or after."""
    replace, calls = os.replace, [0]

    def replaced(source, target, **options):
        calls[0] += Path(target).name == name
        if before and Path(target).name == name and calls[0] == number:
            kill()
        replace(source, target, **options)
        if Path(target).name == name and calls[0] == number:
            kill()

    os.replace = replaced


# Killed


@pytest.mark.parametrize("case", CASES)
def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(data, place, undisturbed, case):
    """The first life is killed in the second epoch, where all that is to be kept has moved; the others after
    random times."""
    (expected, seconds), config, draw = undisturbed(case), made(data, case), random.Random(case)
    each, wanted, kills = steps_of(config), (20 if LONG else 3) if case in WITH_EVERYTHING else 1, 0

    def first():
        Watched.happens = {each + 3: kill}
        run(config, quiet=True)

    while kills < wanted:
        shutil.rmtree(place, ignore_errors=True)
        assert forked(first) == -signal.SIGKILL
        assert torch.load(place / "checkpoint.pt", weights_only=True)["step"] == each + 2
        how, kills = None, kills + 1
        while how != 0:
            after = draw.uniform(0, seconds) if kills < wanted else None
            how = forked(lambda: run(config, quiet=True), after)
            assert how in (0, -signal.SIGKILL)
            kills += how != 0
        assert different(contents(place), expected) == []


NAMES = ("config.json", "sheet.png", "checkpoint.pt", "metrics.csv", "best.pt", "timing.csv", "results.json")


@pytest.mark.parametrize("case", WITH_EVERYTHING)
def test_a_run_killed_before_and_after_a_file_is_put_into_place_ends_the_same(data, place, undisturbed, case):
    """A life is killed at one of them, the next goes on from there and is killed at another."""
    (expected, _), config = undisturbed(case), made(data, case)
    numbers = {"checkpoint.pt": (1, 2, 5), "metrics.csv": (1, 2), "best.pt": (1, 2), "sheet.png": (1, 2)}
    numbered = [(name, number) for name in NAMES for number in numbers.get(name, (1,))]
    targets = [(*one, before) for one in numbered for before in (True, False)]
    random.Random(case).shuffle(targets)
    for i, target in enumerate(targets if LONG else targets[:9], 1):

        def life(target=target):
            at_replace(*target)
            run(config, quiet=True)

        how = forked(life)
        if how == 0:  # it had come too far: once more from the beginning
            assert different(contents(place), expected) == []
            shutil.rmtree(place)
            how = forked(life)
        assert how == -signal.SIGKILL, target
        if i % 3 == 0:
            assert forked(lambda: run(config, quiet=True)) == 0
            assert different(contents(place), expected) == []
            shutil.rmtree(place)


def test_without_the_schedules_state_the_comparison_fails(data, place, undisturbed):
    """What the other tests would say of a run that does not go on as it was."""
    config = made(data)

    def first():
        Watched.happens = {steps_of(config) + 3: kill}
        run(config, quiet=True)

    def forgetful():
        lr_scheduler.OneCycleLR.load_state_dict = lambda *_: None
        run(config, quiet=True)

    assert (forked(first), forked(forgetful)) == (-signal.SIGKILL, 0)
    changed = different(contents(place), undisturbed("float32")[0])
    assert {"best.pt", "checkpoint.pt", "metrics.csv"} <= {*changed}


@pytest.mark.parametrize("case", ["plateau", "step"])
def test_a_run_that_leaves_off_and_goes_on_equals_one_that_never_did(data, place, undisturbed, case):
    for epoch in (1, 2):
        assert len(run(made(data, case), stop_after=epoch, quiet=True).history) == epoch
    assert different(contents(place), undisturbed(case)[0]) == []


# Stopped


@pytest.mark.parametrize("minutes", [0.0, 60.0])
def test_a_stopped_run_loses_what_came_after_its_checkpoint_and_no_more(data, place, undisturbed, minutes):
    config = made(data, checkpoint_minutes=minutes)
    each = steps_of(config)

    def life():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
        Watched.happens = {each + 4: lambda: kill(signal.SIGINT)}
        run(config, quiet=True)

    assert forked(life) == 1
    assert len(read_run(place).history) == 1
    step = torch.load(place / "checkpoint.pt", weights_only=True)["step"]
    assert step == (each + 3 if minutes == 0 else each)
    run(config, quiet=True)
    assert Watched.steps == 2 * each - step
    settings = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(settings | {"checkpoint_minutes": 0.0}, indent=1))
    assert different(contents(place), undisturbed("float32")[0]) == []


def test_what_a_killed_run_left_half_written_is_no_file_of_it(data, place, undisturbed):
    run(made(data), stop_after=1, quiet=True)
    (place / "images" / "epoch_002").mkdir()
    for name in ("images/epoch_002/sheet.png.part", "checkpoint.pt.part", "best.pt.part", "metrics.csv.part"):
        (place / name).write_bytes(b"half a file")
    for name in ("metrics.csv", "best.pt"):  # which follow from the checkpoint
        (place / name).unlink()
    run(made(data), quiet=True)
    assert different(contents(place), undisturbed("float32")[0]) == []


def test_where_the_disk_is_full_the_checkpoint_before_stays_whole(data, place, undisturbed, monkeypatch):
    config = made(data, checkpoint_minutes=0.0)
    run(config, stop_after=1, quiet=True)
    before = contents(place)

    def no_room(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "fsync", no_room)
        run(config, quiet=True)
    assert contents(place)["checkpoint.pt"] == before["checkpoint.pt"]
    run(config, quiet=True)
    assert different(contents(place), undisturbed("float32")[0]) == []
