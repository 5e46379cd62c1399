"""Runs that are killed, stopped or find their files damaged: they end with the same bytes as one that nothing disturbed, or
say in a sentence why not.

The processes that are killed are real ones: children that this one forks, which saves each the seconds that importing PyTorch
takes. Each opens the data set, makes its network and reads its checkpoint by itself. The environment variable LONG_TESTS=1
has them killed at every step that is known here, and more often at random."""

import csv
import dataclasses
import errno
import io
import json
import os
import pickle
import queue
import random
import re
import resource
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
import zipfile
from pathlib import Path

import jupyter_client
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import helpers
from helpers import DEPTH_LOSSES, MASK_LOSSES, MODELS, Config, ZipDataset, load_model, run, split

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
LONG = os.environ.get("LONG_TESTS") == "1"
BATCH = 8


class Net(nn.Module):
    """A network of a few weights, with what makes going on difficult: running statistics and dropout. In training it leaves a
    dot for each step in a file, if it is told one: those of all lives of a run."""

    stride, dots = 4, None

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.2), nn.Conv2d(8, 2, 1)
        )

    def forward(self, bg, fg_bg):
        if self.training and self.dots:
            with open(self.dots, "a") as file:
                file.write(".")
        mask_logits, depth = self.layers(torch.cat([bg, fg_bg], 1)).chunk(2, 1)
        return mask_logits, depth.sigmoid()


def drawn(depth, truth):
    """A loss that draws from the random numbers of numpy and of Python."""
    return helpers.l1(depth, truth) * (1 + np.random.rand() + random.random())


CASES = {
    "adamw, onecycle": {},
    "sgd, step": {"optimizer": "sgd", "schedule": "step"},
    "rmsprop, clipped": {"optimizer": "rmsprop", "schedule": "constant", "lr": 0.005, "clip_norm": 0.5},
    "plateau, learned": {"schedule": "plateau", "depth_weight": "learned"},
    "average": {"average": 0.9},
    "mirror, colour": {"optimizer": "adam", "augment": "mirror+colour"},
    "compose, shake": {"augment": "compose+shake"},
    "drawn": {"depth_loss": "drawn"},
    "float16": {"precision": "float16"},
    "disk": {"cache": "disk", "split": "image"},
}


@pytest.fixture(scope="module", autouse=True)
def known():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "net", Net)
        patch.setitem(DEPTH_LOSSES, "drawn", drawn)
        yield


@pytest.fixture(scope="module")
def data(write_zip, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.zip"
    write_zip(path, samples=[(b, f, 1) for b in range(1, 11) for f in range(1, 11)], size=16)
    return path


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A workspace and a cache for each test, and a file for the dots."""
    monkeypatch.setenv("WORKSPACE", str(tmp_path / "work"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Net, "dots", str(tmp_path / "dots"))
    (tmp_path / "work").mkdir()
    return tmp_path / "work" / "run"


@pytest.fixture
def config(data):
    """With a checkpoint after every step."""
    return made(data)


def made(data, **options):
    base = {"size": 16, "model": "net", "epochs": 2, "lr": 0.02, "batch_size": BATCH, "precision": "float32"}
    return Config("run", data=str(data), **base | {"checkpoint_minutes": 0.0} | options)


def dots():
    path = Path(Net.dots)
    return len(path.read_text()) if path.exists() else 0


def start(task, *values):
    """A child that does this and ends with 0, or with 1 where it raised something."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(120)
            helpers._open_zip.cache_clear()
            task(*values)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return child


def ended(child):
    """How: as `start` says, or below 0, the number of the signal that did it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def forked(task, after=None):
    """How a child ended that did this. With `after` it is killed after so many seconds."""
    child = start(task)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return ended(child)


def contents(folder):
    """Every file's bytes, but for what holds seconds; of the Config what decides the result; of the checkpoint all values."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "timing.csv"):
        found[str(path.relative_to(folder))] = path.read_bytes()
    settings = json.loads(found["config.json"])
    found["config.json"] = {key: value for key, value in settings.items() if key not in ("checkpoint_minutes", "name")}
    if "checkpoint.pt" in found:
        state = torch.load(folder / "checkpoint.pt", weights_only=True)
        found["checkpoint.pt"] = plain({key: value for key, value in state.items() if key != "seconds"})
    return found


def plain(state):
    """Values that can be compared, in which every bit of a tensor counts."""
    if isinstance(state, torch.Tensor):
        return str(state.dtype), tuple(state.shape), state.contiguous().numpy().tobytes()
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    return [plain(value) for value in state] if isinstance(state, list | tuple) else repr(state)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """What a run of these options leaves that is never disturbed and has a checkpoint after each epoch alone, and how many
    seconds it took."""
    known = {}

    def of(**options):
        key = repr(options)
        if key not in known:
            folder = tmp_path_factory.mktemp("undisturbed")
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("WORKSPACE", str(folder))
                patch.setattr(Net, "dots", str(folder / "dots"))
                began = time.monotonic()
                assert forked(lambda: run(made(data, **options | {"checkpoint_minutes": 60.0}), quiet=True)) == 0
                known[key] = contents(folder / "run"), time.monotonic() - began, dots()
        return known[key]

    return of


# Killed


@pytest.mark.parametrize("case", CASES)
def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(data, place, undisturbed, case):
    """The first life is killed in the second epoch's fourth step, where all that is to be kept has moved; the others, as long
    as kills are wanted, after random times."""
    expected, seconds, steps = undisturbed(**CASES[case])

    def life(until=None):
        watched("forward", lambda _: kill() if dots() == until else None)
        run(made(data, **CASES[case]), quiet=True)

    draw, kills, wanted, runs = random.Random(case), 0, 5 if LONG else 1, 0
    while kills < wanted:
        shutil.rmtree(place, ignore_errors=True)
        Path(Net.dots).unlink(missing_ok=True)
        assert forked(lambda: life(steps // 2 + 3)) == -signal.SIGKILL
        before, how, runs = kills, None, runs + 1
        while how != 0:
            how = forked(life, draw.uniform(0.1, 1.2) * seconds if kills < wanted else None)
            assert how in (0, -signal.SIGKILL)
            kills += how != 0
        assert_same(contents(place), expected)
        assert steps <= dots() <= steps + 1 + kills - before  # a life loses the one step under way, no more
    print(f"{case}: {kills} kills at random moments and {runs} at a known one")


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def half_saved(state, file):
    """torch.save, killed in the midst of it."""
    whole = io.BytesIO()
    torch_save(state, whole)
    file.write(whole.getvalue()[: whole.tell() // 2])
    file.flush()
    kill()


def half_a_picture(picture, path):
    whole = io.BytesIO()
    picture_save(picture, whole, "PNG")
    Path(path).write_bytes(whole.getvalue()[: whole.tell() // 2])
    kill()


def half_a_text(path, text):
    with open(path, "w") as file:
        file.write(text[: len(text) // 2])
    kill()


def half_a_table(writer, rows):
    csv_rows(writer, rows[: len(rows) // 2])
    kill()


torch_save, picture_save, csv_rows = torch.save, Image.Image.save, csv.DictWriter.writerows
STEPS = {  # what a run does to its files, and what half of it is
    "os.replace": (os, "replace", None),
    "os.fsync": (os, "fsync", None),
    "torch.save": (torch, "save", half_saved),
    "torch.load": (torch, "load", None),
    "picture": (Image.Image, "save", half_a_picture),
    "rmtree": (shutil, "rmtree", None),
    "mkdir": (Path, "mkdir", None),
    "unlink": (Path, "unlink", None),
    "text": (Path, "write_text", half_a_text),
    "table": (csv.DictWriter, "writerows", half_a_table),
    "forward": (Net, "forward", None),
}


def watched(name, each):
    """Has `each`(number) called before a step of this name, and what it gives in its place; after it, with minus the number."""
    owner, function, _ = STEPS[name]
    original, number = getattr(owner, function), [0]

    def replaced(*args, **options):
        number[0] += 1
        instead = each(number[0])
        done = (instead or original)(*args, **options)
        each(-number[0])
        return done

    setattr(owner, function, replaced)


def test_a_run_killed_before_within_and_after_each_of_its_steps_ends_with_the_same_bytes(data, place, undisturbed, tmp_path):
    """One life is killed at the n-th step of a name, the next goes on from there and is killed at another: windows that no
    random moment is likely to hit, as between the two renames that put a checkpoint in place."""
    options = CASES["average"]
    expected, *_ = undisturbed(**options)

    def count():
        counts = dict.fromkeys(STEPS, 0)
        for name in STEPS:
            watched(name, lambda number, name=name: counts.update({name: abs(number)}))
        run(made(data, **options), quiet=True)
        (tmp_path / "counts").write_text(json.dumps(counts))

    for _ in range(2):  # the second finds the folders that are not the run's own
        shutil.rmtree(place, ignore_errors=True)
        assert forked(count) == 0
    assert_same(contents(place), expected)  # a run with a checkpoint after each step is the same
    counts = json.loads((tmp_path / "counts").read_text())
    assert min(counts.values()) > 0
    targets = []
    for name, whole in counts.items():
        moments = ["before", "after", *(["within"] if STEPS[name][2] else [])]
        numbers = {1, 2, 3, whole // 2, whole - 1, whole} & set(range(1, whole + 1))
        targets += [(name, number, moment) for number in numbers for moment in moments]
    random.Random(0).shuffle(targets)
    if not LONG:  # some of each kind
        kinds = {(name, moment): (name, number, moment) for name, number, moment in targets if number < 4}
        targets = random.Random(1).sample(list(kinds.values()), 8)

    def life(target):
        if target:
            name, number, moment = target

            def each(now):
                if now == (-number if moment == "after" else number):
                    return STEPS[name][2] if moment == "within" else kill()

            watched(name, each)
        run(made(data, **options), quiet=True)

    shutil.rmtree(place)
    for number, target in enumerate(targets, 1):
        how = forked(lambda target=target: life(target))
        if how == 0:  # there was so little left to do that the run ended before: once more, from its beginning
            assert_same(contents(place), expected)
            shutil.rmtree(place)
            how = forked(lambda target=target: life(target))
        assert how == -signal.SIGKILL, target
        if number % 4 == 0 or number == len(targets):  # until then, the next target hits what this one left
            assert forked(lambda: life(None)) == 0
            assert_same(contents(place), expected)
            shutil.rmtree(place)
    print(f"{len(targets)} kills at known steps")
    assert len(targets) >= (100 if LONG else 8)


# Damaged


@pytest.fixture(scope="module")
def halfway(data, tmp_path_factory):
    """The folder of a run that was killed after two steps of its second epoch, and how many steps an epoch has."""
    folder = tmp_path_factory.mktemp("halfway")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKSPACE", str(folder))
        patch.setattr(Net, "dots", str(folder / "dots"))
        each = -(-len(split(ZipDataset(data, size=16))["train"]) // BATCH)

        def life():
            watched("os.replace", lambda _: kill() if dots() == each + 3 else None)
            run(made(data), quiet=True)

        assert forked(life) == -signal.SIGKILL
    (folder / "run" / "checkpoint.pt.part").unlink()
    return folder / "run", each


def state_of(file):
    state = torch.load(file, weights_only=True)
    return len(state["history"]), (state["within"] or {"done": 0})["done"]


class Harm:
    """Makes a file once it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def flipped(file, position):
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << random.Random(position).randrange(8)
    file.write_bytes(content)


DAMAGES = {
    "empty": lambda file: file.write_bytes(b""),
    "cut off at the end": lambda file: os.truncate(file, file.stat().st_size - 1),
    "cut in half": lambda file: os.truncate(file, file.stat().st_size // 2),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "zeros in the midst": lambda file: file.write_bytes(file.read_bytes()[:9000] + bytes(512) + file.read_bytes()[9512:]),
    "junk": lambda file: file.write_bytes(random.Random(0).randbytes(file.stat().st_size)),
    "another zip": lambda file: zipfile.ZipFile(file, "w").close(),
    "weights alone": lambda file: torch.save(Net().state_dict(), file),
    "a tensor": lambda file: torch.save(torch.zeros(2), file),
    "a pickle": lambda file: file.write_bytes(pickle.dumps(Harm(file.with_name("harm")))),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(config, place, halfway, undisturbed, damage, capsys):
    folder, each = halfway
    shutil.copytree(folder, place)
    assert state_of(place / "checkpoint.pt") == (1, 2)
    before = state_of(place / "checkpoint_before.pt")
    DAMAGES[damage](place / "checkpoint.pt")
    run(config)
    said = capsys.readouterr().out
    assert "checkpoint.pt" in said and "Begins anew" not in said
    assert before == (1, 1) and "goes on after batch 1 of epoch 2" in said
    assert dots() == each - 1
    assert_same(contents(place), undisturbed()[0])
    assert not (place / "harm").exists()


def test_a_run_whose_checkpoints_are_all_damaged_says_so_and_begins_anew(config, place, halfway, undisturbed, capsys):
    folder, each = halfway
    shutil.copytree(folder, place)
    for name in ("checkpoint.pt", "checkpoint_before.pt"):
        os.truncate(place / name, 5000)
    run(config)
    said = capsys.readouterr().out
    assert all(said.count(f"{name} is damaged") == 1 for name in ("checkpoint.pt", "checkpoint_before.pt"))
    assert said.count("Begins anew") == 1 and "goes on after" not in said
    assert dots() == 2 * each
    assert_same(contents(place), undisturbed()[0])


def test_a_damaged_checkpoint_never_takes_the_place_of_the_sound_one(config, place, halfway, undisturbed, capfd):
    """Killed before and after each rename that follows, a run finds a sound checkpoint."""
    for number in (1, -1, 2, -2, 3, -3, 4, -4, 5, -5):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(halfway[0], place)
        os.truncate(place / "checkpoint.pt", 5000)

        def life(number=number):
            watched("os.replace", lambda now: kill() if now == number else None)
            run(config, quiet=True)

        assert forked(life) == -signal.SIGKILL
        run(config, stop_after=0)
        assert "Begins anew" not in capfd.readouterr().out
    run(config)
    assert_same(contents(place), undisturbed()[0])


def test_a_byte_that_flipped_is_noticed_or_means_nothing(tmp_path):
    state = {"weights": torch.arange(40.0), "history": [{"epoch": 1, "loss": 0.5}], "best": {"bias": torch.ones(3)}}
    helpers._save(tmp_path / "sound.pt", state)
    size = (tmp_path / "sound.pt").stat().st_size
    positions, noticed = range(size) if LONG else sorted(random.Random(0).sample(range(size), 400)), 0
    for position in positions:
        shutil.copy(tmp_path / "sound.pt", tmp_path / "flipped.pt")
        flipped(tmp_path / "flipped.pt", position)
        try:
            loaded = helpers._load_state(tmp_path / "flipped.pt")
        except ValueError as error:
            assert "flipped.pt" in str(error) and "\n" not in str(error)
            noticed += 1
        else:
            assert plain(loaded) == plain(state), position
    print(f"{noticed} of {len(positions)} flips were noticed, the others were in bytes that nothing reads")
    assert noticed > len(positions) / 4


@pytest.mark.parametrize("position", random.Random(1).sample(range(15000), 40 if LONG else 4))
def test_a_checkpoint_with_a_flipped_byte_leads_to_the_same_bytes(config, place, halfway, undisturbed, position):
    shutil.copytree(halfway[0], place)
    flipped(place / "checkpoint.pt", position)
    run(config, quiet=True)
    assert_same(contents(place), undisturbed()[0])


def test_best_weights_that_are_gone_come_back_from_the_checkpoint(config, place):
    run(config, stop_after=1, quiet=True)
    before = contents(place)
    (place / "best.pt").unlink()
    run(config, stop_after=1, quiet=True)
    assert_same(contents(place), before)


def test_a_checkpoint_of_an_earlier_version_goes_on(config, place, undisturbed):
    """From when there was neither an average nor a checkpoint within an epoch."""
    run(config, stop_after=1, quiet=True)
    (place / "checkpoint_before.pt").unlink()
    state = torch.load(place / "checkpoint.pt", weights_only=True)
    torch.save({key: state[key] for key in state.keys() - {"best", "within", "average"}}, place / "checkpoint.pt")
    run(config, quiet=True)
    assert_same(contents(place), undisturbed()[0])


def test_a_checkpoint_of_another_network_is_refused_in_a_sentence_and_left_alone(config, place, monkeypatch):
    class Wider(Net):
        def __init__(self):
            super().__init__()
            self.layers[4] = nn.Conv2d(8, 2, 3, padding=1)

    run(config, stop_after=1, quiet=True)
    before = contents(place)
    monkeypatch.setitem(MODELS, "net", Wider)
    with pytest.raises(ValueError, match=r"of another network than 'net' is now\. Take another name") as caught:
        run(config, quiet=True)
    assert str(place) in str(caught.value) and "\n" not in str(caught.value)
    assert_same(contents(place), before)


@pytest.mark.parametrize("gone", [True, False])
def test_a_checkpoint_of_other_settings_is_refused_with_the_difference(config, place, gone):
    """Whether the file that says so is gone, or the checkpoint has been copied from elsewhere."""
    run(config, stop_after=1, quiet=True)
    other = dataclasses.replace(config, lr=0.5)
    if gone:
        (place / "config.json").unlink()
    else:
        settings = json.loads((place / "config.json").read_text()) | {"lr": 0.5}
        (place / "config.json").write_text(json.dumps(settings))
    before = contents_of_weights(place)
    with pytest.raises(ValueError, match=r"The run 'run' exists, but lr was 0\.02 and is 0\.5\."):
        run(other, quiet=True)
    assert contents_of_weights(place) == before


def contents_of_weights(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.pt")}


def test_a_damaged_config_json_can_be_deleted_as_the_message_says(config, place, undisturbed):
    expected, *_ = undisturbed()
    run(config, stop_after=1, quiet=True)
    (place / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged .* Delete it, and run the same Config again"):
        run(config, quiet=True)
    (place / "config.json").unlink()
    run(config, quiet=True)
    assert_same(contents(place), expected)


@pytest.mark.parametrize("name, text", [("results.json", "{"), ("metrics.csv", "epoch,lr\n1"), ("timing.csv", "a,b\n1,x\n")])
def test_a_damaged_table_of_a_finished_run_is_named_and_made_anew_as_the_message_says(config, place, name, text):
    run(config, quiet=True)
    expected = contents(place)
    (place / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name}.* damaged .* Delete results\.json and run the same Config again"):
        run(config, quiet=True)
    (place / "results.json").unlink()
    run(config, quiet=True)
    assert_same(contents(place), expected)


def test_a_run_that_is_trained_is_not_discarded_nor_trained_by_another_path(config, place, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "work")
    refused = []

    def save_images(*_):
        for act in (lambda: helpers.discard("run"), lambda: run(config)):
            monkeypatch.setenv("WORKSPACE", str(tmp_path / "link"))
            with pytest.raises(RuntimeError, match="Another notebook or program is at the run 'run'"):
                act()
            refused.append(act)
        monkeypatch.setenv("WORKSPACE", str(tmp_path / "work"))

    monkeypatch.setattr(helpers, "_save_images", save_images)
    assert run(config, quiet=True).results and len(refused) == 4
    helpers.discard("run")
    assert not place.exists()


# A full disk


class Large(Net):
    """So large that PyTorch writes a tensor at once, past Python's buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("more", torch.zeros(300_000))


def no_room(file):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("large, full", [(False, 9000), (True, 500_000), (True, 2_000_000), (False, "fsync"), (False, "read")])
def test_a_disk_that_is_full_is_said_and_the_checkpoint_before_is_whole(config, place, monkeypatch, large, full, tmp_path):
    """The limit of a file's size takes the place of the disk's: the system cuts off what is written there."""
    if large:
        monkeypatch.setitem(MODELS, "net", Large)
    run(dataclasses.replace(config, checkpoint_minutes=60.0), stop_after=1, quiet=True)
    before = {path.name: path.read_bytes() for path in place.glob("*.pt*")}
    told, tell = os.pipe()

    def life():
        if full == "fsync":
            os.fsync = no_room
        elif full == "read":  # the disk has written something else
            watched("os.fsync", lambda _: None)
            synced = os.fsync
            os.fsync = lambda file: (os.ftruncate(file, 5000), synced(file))
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (full, full))
        try:
            run(config, quiet=True)
        except (OSError, ValueError) as error:
            os.write(tell, f"{type(error).__name__}: {error}".encode())

    assert forked(life) == 0
    said = os.read(told, 10_000).decode()
    wrong = r"ValueError: .*{}.part is damaged" if full == "read" else r"OSError: .*{} could not be made .* is whole"
    assert re.match(wrong.format(rf"{place}/(best|checkpoint)\.pt"), said) and "\n" not in said
    assert {path.name: path.read_bytes() for path in place.glob("*.pt*") if path.suffix == ".pt"} == before
    assert full == "read" or not list(place.glob("*.part"))
    run(config, quiet=True)
    found = contents(place)
    monkeypatch.setenv("WORKSPACE", str(tmp_path / "again"))
    (tmp_path / "again").mkdir()
    run(dataclasses.replace(config, checkpoint_minutes=60.0), quiet=True)
    assert_same(found, contents(tmp_path / "again" / "run"))


# The stop button


@pytest.fixture
def rare(config):
    """With a checkpoint after each epoch alone."""
    return dataclasses.replace(config, checkpoint_minutes=60.0)


def pressed(number, at, training=True):
    """Presses a button, by a signal to this process, in the network's call of this number, in training or in measuring."""
    calls = [0]

    class Pressing(Net):
        def forward(self, *pictures):
            calls[0] += self.training == training
            if self.training == training and calls[0] == at:
                os.kill(os.getpid(), number)
            return super().forward(*pictures)

    return Pressing


ENDS = {signal.SIGINT: 1, signal.SIGTERM: -signal.SIGTERM}  # of a child: with KeyboardInterrupt, or by the signal itself


@pytest.mark.parametrize("at", ["first", "midst", "last"])
@pytest.mark.parametrize("number", ENDS)
def test_a_stopped_run_has_a_checkpoint_of_the_step_reached_and_goes_on_from_it(rare, place, halfway, undisturbed, number, at):
    each = halfway[1]
    step = {"first": 1, "midst": each + 2, "last": each}[at]

    def life():
        MODELS["net"] = pressed(number, step)
        run(rare, quiet=True)

    assert forked(life) == ENDS[number]
    assert dots() == step
    epochs, done = state_of(place / "checkpoint.pt")
    assert epochs * each + done == step
    run(rare, quiet=True)
    assert dots() == 2 * each  # no step was done twice
    assert_same(contents(place), undisturbed()[0])


@pytest.mark.parametrize("number", ENDS)
def test_a_run_stopped_while_it_measures_ends_with_its_epoch(rare, place, halfway, undisturbed, number):
    def life():
        MODELS["net"] = pressed(number, 1, training=False)
        run(rare, quiet=True)

    assert forked(life) == ENDS[number]
    assert state_of(place / "checkpoint.pt") == (1, 0) and dots() == halfway[1]
    run(rare, quiet=True)
    assert dots() == 2 * halfway[1]
    assert_same(contents(place), undisturbed()[0])


@pytest.mark.parametrize("number", ENDS)
def test_pressed_again_the_button_ends_a_run_at_once(rare, place, halfway, undisturbed, number):
    """While the checkpoint that the first press asked for is about to be written: what was there before stays."""
    run(rare, stop_after=1, quiet=True)
    before = (place / "checkpoint.pt").read_bytes()

    def life():
        MODELS["net"] = pressed(number, 2)
        watched("torch.save", lambda now: os.kill(os.getpid(), number) if now == 2 else None)  # the first is of best.pt
        run(rare, quiet=True)

    assert forked(life) == ENDS[number]
    assert (place / "checkpoint.pt").read_bytes() == before
    run(rare, quiet=True)
    assert dots() == 2 * halfway[1] + 2
    assert_same(contents(place), undisturbed()[0])


def test_a_run_whose_caller_only_notes_the_signal_goes_to_its_end(rare, place, halfway, undisturbed, monkeypatch):
    noted, saved = [], []
    monkeypatch.setattr(torch, "save", lambda *args: saved.append(args) or torch_save(*args))
    monkeypatch.setitem(MODELS, "net", pressed(signal.SIGTERM, 2))
    before = signal.signal(signal.SIGTERM, lambda number, frame: noted.append(number))
    try:
        run(rare, quiet=True)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert noted == [signal.SIGTERM]
    assert len(saved) == 1 + 2 * 2 - (contents(place)["best.pt"] != undisturbed()[0]["best.pt"])
    assert dots() == 2 * halfway[1]
    assert_same(contents(place), undisturbed()[0])


@pytest.mark.parametrize("how", ["to the end", "stopped", "failed"])
def test_the_callers_handlers_are_given_back(rare, monkeypatch, how):
    def mine(number, frame):
        raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, mine) for number in numbers}
    try:
        if how == "stopped":
            monkeypatch.setitem(MODELS, "net", pressed(signal.SIGTERM, 2))
        if how == "failed":
            monkeypatch.setitem(DEPTH_LOSSES, "drawn", lambda p, t: p.sum() * np.nan)
        expected = {"stopped": KeyboardInterrupt, "failed": ValueError}.get(how)
        with pytest.raises(expected) if expected else pytest.MonkeyPatch.context():
            run(dataclasses.replace(rare, depth_loss="drawn"), quiet=True)
        assert [signal.getsignal(number) for number in numbers] == [mine, mine]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_run_in_a_thread_leaves_signals_alone(rare, place, undisturbed):
    before = [signal.getsignal(number) for number in ENDS]
    during = []

    class Watching(Net):
        def forward(self, *pictures):
            during.append([signal.getsignal(number) for number in ENDS])
            return super().forward(*pictures)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "net", Watching)
        thread = threading.Thread(target=run, args=(rare,), kwargs={"quiet": True})
        thread.start()
        thread.join()
    assert during and all(handlers == before for handlers in during)
    assert_same(contents(place), undisturbed()[0])


CELL = """
import sys, time
sys.path[:0] = {paths!r}
import helpers, test_resume

class Slow(test_resume.Net):
    def forward(self, *pictures):
        time.sleep(0.1 if self.training else 0)
        return super().forward(*pictures)

Slow.dots = {dots!r}
helpers.MODELS["net"] = Slow
helpers.torch.set_num_threads(1)
helpers.run(helpers.Config(**{config!r}))
"""


def test_a_notebooks_stop_button_loses_nothing_and_the_cell_goes_on(rare, place, halfway, undisturbed):
    """A real kernel, interrupted as the button does it, in which the same cell is then run again, twice."""
    paths = [str(Path(__file__).parent), str(Path(helpers.__file__).parent)]
    cell = CELL.format(paths=paths, dots=Net.dots, config=dataclasses.asdict(rare))
    manager, client = jupyter_client.manager.start_new_kernel()
    try:
        client.execute(cell)
        deadline = time.monotonic() + 120
        while dots() < halfway[1] + 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        manager.interrupt_kernel()
        reply = client.get_shell_msg(timeout=120)["content"]
        assert reply["ename"] == "KeyboardInterrupt"
        epochs, done = state_of(place / "checkpoint.pt")
        assert (epochs, epochs * halfway[1] + done) == (1, dots())
        for _ in range(2):
            client.execute(cell)
            assert client.get_shell_msg(timeout=120)["content"]["status"] == "ok"
            assert dots() == 2 * halfway[1]
    finally:
        manager.shutdown_kernel(now=True)
    said = []
    with pytest.raises(queue.Empty):
        while True:
            said.append(client.get_iopub_msg(timeout=0.2)["content"].get("text", ""))
    said = "".join(said)
    assert said.count(f"stopped after batch {done} of epoch 2") == said.count(f"goes on after batch {done} of epoch 2") == 1
    assert said.count("finished before") == 1
    assert_same(contents(place), undisturbed()[0])


# What is not finite, collapses, or does not fit


class Noting(Net):
    """Notes the pictures of every step."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, bg, fg_bg):
        if self.training:
            self.seen.append([picture.numpy().tobytes() for picture in fg_bg.contiguous()])
        return super().forward(bg, fg_bg)


def breaks(kind):
    """A loss term that is as it should be until it sees a sample that has broken nothing before; then it, or its slope, is not
    finite."""

    def loss(prediction, truth):
        value = ((prediction.float() - truth) ** 2).mean()
        if not torch.is_grad_enabled() or not broken(truth):
            return value
        if kind == "slope":  # 0 is finite, and the slope of a square root there is not
            return value + (0 * prediction.sum()).sqrt()
        return value * {"nan": np.nan, "inf": np.inf}[kind]

    def broken(truth):
        return bool((truth == loss.sample).flatten(1).all(1).any())

    return loss


@pytest.mark.parametrize("kind", ["nan", "inf", "slope"])
@pytest.mark.parametrize("task", ["mask", "depth"])
@pytest.mark.parametrize("place_in_epoch", [2, -1])
def test_what_is_not_finite_is_said_with_its_term_and_samples(config, data, place, monkeypatch, task, kind, place_in_epoch):
    """The samples of the batch are known from the pictures that reached the network, in another run of the same order."""
    loss, networks = breaks(kind), []
    loss.sample = torch.full((1, 16, 16), -1.0)
    monkeypatch.setitem(MASK_LOSSES, "mine", loss if task == "mask" else lambda z, t: helpers.bce(z, t))
    monkeypatch.setitem(DEPTH_LOSSES, "mine", loss if task == "depth" else helpers.l1)
    monkeypatch.setitem(MODELS, "net", lambda: networks.append(Noting()) or networks[-1])
    config = dataclasses.replace(config, augment="none", mask_loss="mine", depth_loss="mine")
    run(dataclasses.replace(config, name="whole"), stop_after=1, quiet=True)
    ds = ZipDataset(data, size=16)
    names = {ds[i]["fg_bg"].numpy().tobytes(): i for i in range(len(ds))}
    batches = [[names[picture] for picture in batch] for batch in networks[0].seen]
    number = range(1, len(batches) + 1)[place_in_epoch]
    loss.sample = ds[batches[number - 1][1]][task].float()
    if task == "mask":  # a mask is not the picture of one sample alone; the first that has it breaks
        number = next(k for k, batch in enumerate(batches, 1) if any(torch.equal(ds[i]["mask"], loss.sample) for i in batch))
    with pytest.raises(ValueError) as caught:
        run(config, quiet=True)
    what = f"the {task} loss (mine) of batch {number} of epoch 1 is {kind}"
    what = f"a weight is not finite after batch {number} of epoch 1" if kind == "slope" else what
    samples = ", ".join(ds.name(i) for i in batches[number - 1])
    stands = f"batch {number - 1} of epoch 1" if number > 1 else "epoch 0"
    assert str(caught.value) == (
        f"run: {what}. Its samples: {samples}. The run stands as after {stands}; try a smaller lr, under another name."
    )
    assert_finite(place)


def assert_finite(folder):
    for file in folder.glob("*.pt"):
        tensors = [torch.load(file, weights_only=True)]
        while tensors:
            one = tensors.pop()
            if isinstance(one, torch.Tensor):
                assert not one.is_floating_point() or one.isfinite().all()
            elif isinstance(one, dict | list | tuple):
                tensors.extend(one.values() if isinstance(one, dict) else one)


def test_a_weight_that_no_loss_shows_to_be_broken_stops_the_run_before_a_checkpoint_has_it(rare, place, monkeypatch, halfway):
    """A variance without end makes every output of its channel the same, and finite. In the last step of an epoch."""
    calls = [0]

    class Broken(Net):
        def forward(self, *pictures):
            outputs = super().forward(*pictures)
            calls[0] += self.training
            if self.training and calls[0] == 2 * halfway[1]:
                self.layers[1].running_var.data[0] = torch.inf
            return outputs

    monkeypatch.setitem(MODELS, "net", Broken)
    with pytest.raises(ValueError, match=rf"a weight is not finite after batch {halfway[1]} of epoch 2\. .* as after epoch 1;"):
        run(rare, quiet=True)
    assert_finite(place)
    assert state_of(place / "checkpoint.pt") == (1, 0)


class Sees(Net):
    """Its mask is where the two pictures differ; what it learns does not change that."""

    def forward(self, bg, fg_bg):
        _, depth = super().forward(bg, fg_bg)
        return 20 * (fg_bg - bg).abs().amax(1, keepdim=True) - 1 + 0 * depth, depth


class Black(Sees):
    def forward(self, bg, fg_bg):
        mask_logits, depth = super().forward(bg, fg_bg)
        return 0 * mask_logits - 9, depth


class White(Sees):
    def forward(self, bg, fg_bg):
        mask_logits, depth = super().forward(bg, fg_bg)
        return 0 * mask_logits + 9, depth


@pytest.mark.parametrize(
    "network, options, said",
    [
        (Black, {}, "run: its mask is all black on the validation pictures. It has not been learned: try "),
        (White, {}, "run: its mask is all white on the validation pictures. It has not been learned: try "),
        (Sees, {}, None),
        (Black, {"mask_loss": None}, None),
    ],
)
def test_a_mask_that_is_all_black_or_all_white_is_said(config, monkeypatch, capsys, network, options, said):
    monkeypatch.setitem(MODELS, "net", network)
    for _ in range(2):  # when it is finished, and when it is read
        run(dataclasses.replace(config, epochs=1, **options))
        lines = [line for line in capsys.readouterr().out.splitlines() if "its mask is" in line]
        assert len(lines) == (said is not None) and all(line.startswith(said) for line in lines)


ALLOCATOR = "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(ALLOCATOR)])
@pytest.mark.parametrize(
    "training, batch_size, what, advice",
    [
        (True, 8, "A batch of 8 samples of 16 x 16 pixels does", "Set batch_size to 4"),
        (True, 1, "A batch of 1 samples of 16 x 16 pixels does", "Set a smaller size or another model"),
        (False, 8, "A batch of 32 samples of 16 x 16 pixels to measure does", "Set a smaller size or another model"),
    ],
)
def test_memory_that_does_not_suffice_is_said_with_what_to_set(
    config, place, undisturbed, monkeypatch, error, training, batch_size, what, advice
):
    class Hungry(Net):
        def forward(self, *pictures):
            if self.training == training:
                raise error
            return super().forward(*pictures)

    config = dataclasses.replace(config, batch_size=batch_size)
    with monkeypatch.context() as patch:
        patch.setitem(MODELS, "net", Hungry)
        with pytest.raises(MemoryError) as caught:
            run(config, quiet=True)
    text = rf"run: {what} not fit into memory\. {advice}, under another name, or cache to 'none'\."
    assert re.fullmatch(text.replace("memory", "(memory|the GPU's memory)"), str(caught.value))
    if batch_size == BATCH:
        run(config, quiet=True)
        assert_same(contents(place), undisturbed()[0])


def test_memory_that_does_not_suffice_for_the_last_measuring_is_said_too(config, monkeypatch):
    def hungry(folder):
        raise MemoryError

    monkeypatch.setattr(helpers, "load_model", hungry)
    with pytest.raises(MemoryError, match="A batch of 32 samples of 16 x 16 pixels to measure does not fit"):
        run(config, quiet=True)


def test_another_error_is_left_as_it_is(config, monkeypatch):
    class Wrong(Net):
        def forward(self, *pictures):
            raise RuntimeError("of my own")

    monkeypatch.setitem(MODELS, "net", Wrong)
    with pytest.raises(RuntimeError, match=r"^of my own$"):
        run(config, quiet=True)


# Files that would run code, grow without end, or are for another network


def old_pickle(path, harm):
    """Of a kind that Python no longer writes, and still reads."""
    path.write_bytes(f"(S'touch {harm}'\nios\nsystem\n.".encode())


def with_torch(path, harm, protocol, new):
    torch.save({"layers.0.weight": Harm(harm)}, path, pickle_protocol=protocol, _use_new_zipfile_serialization=new)


HOSTILE = {
    **{
        f"{name} {protocol}": lambda path, harm, protocol=protocol, new=new: with_torch(path, harm, protocol, new)
        for protocol in range(6)
        for name, new in (("zip", True), ("legacy", False))
    },
    **{
        f"pickle {protocol}": lambda path, harm, protocol=protocol: path.write_bytes(pickle.dumps(Harm(harm), protocol))
        for protocol in range(6)
    },
    "pickle, old": old_pickle,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_file_that_would_run_code_is_refused_and_the_code_named(config, place, tmp_path, kind, capsys):
    """As weights, and as a checkpoint."""
    harm, code = tmp_path / "harm", "os.system" if kind == "pickle, old" else f"{os.system.__module__}.system"
    HOSTILE[kind](tmp_path / "mine.pt", harm)
    said = rf"mine\.pt is refused: to load it would run code \({code}\)\. Weights need none\."
    with pytest.raises(ValueError, match=said):
        load_model(tmp_path / "mine.pt")
    config.save(place / "config.json")
    shutil.copy(tmp_path / "mine.pt", place / "checkpoint.pt")
    run(config, stop_after=0)
    assert re.search(said.replace("mine", "checkpoint"), capsys.readouterr().out)
    assert not harm.exists()
    if kind.startswith("zip") or kind == "legacy 2":
        torch.load(tmp_path / "mine.pt", weights_only=False)
    elif "pickle" in kind:
        pickle.loads((tmp_path / "mine.pt").read_bytes())
    else:
        harm.touch()  # PyTorch reads such a file no better than it writes it
    assert harm.exists()  # so it would have


def test_a_whole_network_is_refused_and_named(tmp_path):
    torch.save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "mine.pt")
    with pytest.raises(ValueError, match=r"would run code \(torch\.nn\.modules\.container\.Sequential\)"):
        load_model(tmp_path / "mine.pt")


@pytest.mark.parametrize("inside", ["/data.pkl", "/data/0"])
def test_a_zip_that_grows_is_refused_before_it_does(tmp_path, inside):
    torch.save(Net().state_dict(), tmp_path / "small.pt")
    with zipfile.ZipFile(tmp_path / "small.pt") as small, zipfile.ZipFile(tmp_path / "mine.pt", "w") as bomb:
        for name in small.namelist():
            grows = name.endswith(inside)
            content = bytes(300_000_000) if grows else small.read(name)
            bomb.writestr(name, content, zipfile.ZIP_DEFLATED if grows else None, compresslevel=1)
    assert (tmp_path / "mine.pt").stat().st_size < 3_000_000

    def life():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(ValueError, match=r"mine\.pt.*compressed"):
            load_model(tmp_path / "mine.pt")
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KB

    assert forked(life) == 0


def test_weights_of_another_network_are_said_to_be_for_which(config, place):
    run(config, quiet=True)
    torch.save(MODELS["resunet_lite"]().state_dict(), place / "best.pt")
    with pytest.raises(ValueError, match=r"best\.pt holds the weights of resunet_lite, and not of net, as .*config\.json says"):
        load_model(place)
    torch.save(nn.Linear(2, 2).state_dict(), place / "best.pt")
    with pytest.raises(ValueError, match=r"best\.pt holds the weights of a network that is not known here\. Known: resunet, "):
        load_model(place)


# The average of the weights


def test_the_average_is_that_of_the_weights_after_each_step(data, place):
    """Recomputed in float64 from the weights that the optimiser left: a sum with weights that are known beforehand."""
    steps = []
    hook = register_optimizer_step_post_hook(
        lambda optimizer, *_: steps.append([p.detach().double().numpy().copy() for p in optimizer.param_groups[0]["params"]])
    )
    try:
        run(made(data, average=0.6, epochs=4, checkpoint_minutes=60.0), quiet=True)
    finally:
        hook.remove()
    torch.manual_seed(0)
    decays = [min(0.6, k / (k + 9)) for k in range(1, len(steps) + 1)]
    assert max(decays) == 0.6 > min(decays)
    start = [p.detach().double().numpy() for p in Net().parameters()]
    shares = [np.prod(decays), *((1 - d) * np.prod(decays[k:]) for k, d in enumerate(decays, 1))]
    assert sum(shares) == pytest.approx(1)
    expected = [sum(share * w[i] for share, w in zip(shares, [start, *steps], strict=True)) for i in range(len(start))]
    state = torch.load(place / "checkpoint.pt", weights_only=True)
    names = [name for name, _ in Net().named_parameters()]
    for name, weights in zip(names, expected, strict=True):
        np.testing.assert_allclose(state["average"][name].numpy(), weights, rtol=1e-4, atol=1e-6)
        assert not np.allclose(state["model"][name].numpy(), weights, rtol=1e-3)


def test_the_best_weights_are_the_average_and_what_is_measured(data, place):
    finished = run(made(data, average=0.6, epochs=1), quiet=True)
    best, state = (torch.load(place / name, weights_only=True) for name in ("best.pt", "checkpoint.pt"))
    assert plain(best) == plain(dict(state["average"])) != plain(dict(state["model"]))
    ds = ZipDataset(data, size=16)
    net = Net().eval()
    net.load_state_dict(best)
    values = helpers.evaluate(net, ds, split(ds)["valid"], precision="float32")
    assert values["rmse"].mean() == pytest.approx(finished.history[0]["valid_rmse"], rel=1e-6)


# Several processes


def together(task):
    """Two children that train together."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]

    def life(process):
        os.environ |= {"RANK": str(process), "LOCAL_RANK": str(process), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "1"}
        Net.dots = Net.dots if process == 0 else None
        task(process)

    return [start(life, process) for process in (0, 1)]


@pytest.mark.skipif(helpers.DEVICE.type != "cpu", reason="two processes would compute on one GPU")
@pytest.mark.parametrize("killed", [0, 1] if LONG else [0])
def test_two_processes_that_are_killed_within_an_epoch_go_on_to_the_same_bytes(place, tmp_path, monkeypatch, killed, write_zip):
    """Of a batch of three samples one has two: what dropout draws differs between the two from the first step on."""
    write_zip(tmp_path / "data.zip", samples=[(b, f, 1) for b in range(15) for f in range(15)], size=16)
    options = {"split": "image", "batch_size": 3, "augment": "mirror+colour", "depth_loss": "drawn", "average": 0.9}
    config = made(tmp_path / "data.zip", **options)
    each = -(-len(split(ZipDataset(tmp_path / "data.zip", size=16), "image")["train"]) // 3)
    assert each > 52

    def life(process):
        if process == killed:
            watched("forward", lambda number: kill() if number == 52 else None)
        run(config, quiet=True)

    children = together(life)
    assert ended(children[killed]) == -signal.SIGKILL
    os.kill(children[1 - killed], signal.SIGKILL)  # which waits for the other, or has failed for want of it
    assert ended(children[1 - killed]) in (1, -signal.SIGKILL, -signal.SIGABRT)
    assert state_of(place / "checkpoint.pt") == (0, 50)
    Path(Net.dots).unlink()
    assert [ended(child) for child in together(lambda process: run(config, quiet=True))] == [0, 0]
    assert dots() == 2 * each - 50
    found = contents(place)
    monkeypatch.setenv("WORKSPACE", str(tmp_path / "whole"))
    (tmp_path / "whole").mkdir()
    assert [ended(child) for child in together(lambda process: run(config, quiet=True))] == [0, 0]
    assert_same(found, contents(tmp_path / "whole" / "run"))


@pytest.mark.skipif(helpers.DEVICE.type != "cpu", reason="two processes would compute on one GPU")
def test_a_loss_that_one_of_two_processes_finds_broken_is_said_alike_by_both(config, place, tmp_path):
    """The second process alone computes the loss that is not finite, of the first batch's second share."""

    def life(process):
        if process == 1:
            DEPTH_LOSSES["drawn"] = lambda p, t: p.sum() * np.nan
        try:
            run(dataclasses.replace(config, depth_loss="drawn"), quiet=True)
        except ValueError as error:
            (tmp_path / f"said {process}").write_text(str(error))

    assert [ended(child) for child in together(life)] == [0, 0]
    first, second = ((tmp_path / f"said {process}").read_text() for process in (0, 1))
    assert first == second and "the depth loss (drawn) of batch 1 of epoch 1 is nan. Its samples: " in first
    assert len(first.split("Its samples: ")[1].split(". The run")[0].split(", ")) == BATCH
