"""Runs that several processes share: they give what one process gives, and one of them writes. On CPUs, which need no GPU."""

import contextlib
import dataclasses
import json
import math
import os
import runpy
import subprocess
import sys
import threading
import time
from pathlib import Path

import accelerate
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for when this file is run by itself, below

import helpers
from helpers import MODELS, Config, ResUNet, SyncBatchNormCPU, read_run, run

ROOT = Path(__file__).resolve().parents[1]
# Without GPUs, too, the launcher of several GPUs starts as many processes as it is told.
LAUNCH = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
LAUNCH = [sys.executable, *LAUNCH.split(), "--main_process_port", "0"]
NARROW = {"narrow_resunet": lambda: ResUNet((8, 16, 32))}
CASES = {
    # The last batch has three samples, one process takes two of them.
    "clipped, on a plateau": {"max_train": 19, "clip_norm": 0.1, "schedule": "plateau", "lr": 10.0, "epochs": 6},
    # The last batch has one sample, for one process there is none.
    "learned": {"max_train": 17, "depth_weight": "learned", "optimizer": "adamw", "schedule": "onecycle", "lr": 1e-3}
    | {"augment": "mirror+colour+shake"},
    "depth alone": {"max_train": 17, "mask_loss": None},
    # The loss looks at the largest error in the batch.
    "berhu": {"max_train": 19, "depth_loss": "berhu"},
}


@contextlib.contextmanager
def double_precision():
    """Pictures and networks of float64, in which rounding does not show. In float32 every step of a training enlarges it."""
    single = helpers.to_float
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(helpers, "to_float", lambda *batch: {kind: p.double() for kind, p in single(*batch).items()})
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def configs(data):
    base = Config("base", data=str(data), size=16, split="image", model=min(NARROW), optimizer="sgd", lr=0.01)
    base = dataclasses.replace(base, schedule="constant", batch_size=8, epochs=2, augment="mirror+colour", precision="float32")
    made = {name: dataclasses.replace(base, name=name, **options) for name, options in CASES.items()}
    made |= {name: dataclasses.replace(made["learned"], name=name) for name in ("one, then two", "two, then one")}
    # Within its share of a batch, of which there may be none, each process composes by itself.
    composed = {"max_train": 17, "epochs": 1, "augment": "mirror+compose+shake"}
    made["composed"] = dataclasses.replace(base, name="composed", **composed)
    return made | {"of a list": dataclasses.replace(made["depth alone"], name="of a list")}


def launched(workspace, *command):
    """What the command, started in two processes, printed to stdout."""
    place = {"WORKSPACE": str(workspace), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*LAUNCH, *command], env=os.environ | place, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.fixture(scope="module", autouse=True)
def narrow():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(helpers, "MODELS", MODELS | NARROW)
        yield


@pytest.fixture(scope="module")
def on_cpu():
    if helpers.DEVICE.type != "cpu":
        pytest.skip("one process would compute on the GPU, the two on the CPU")


@pytest.fixture(scope="module")
def data(write_zip, tmp_path_factory):
    """So many samples that their validation takes two batches, one for each process."""
    path = tmp_path_factory.mktemp("data") / "data.zip"
    write_zip(path, samples=[(b, f, 1) for b in range(1, 13) for f in range(1, 21)], size=16)
    return path


@pytest.fixture(scope="module")
def runs(data, on_cpu, tmp_path_factory):
    """A folder of runs `by one` process and `by two`, and of what two processes noted."""
    folder = tmp_path_factory.mktemp("runs")
    todo = configs(data)
    with pytest.MonkeyPatch.context() as patch, double_precision():
        patch.setenv("WORKSPACE", str(folder / "by one"))
        for name in CASES:
            run(todo[name], quiet=True)
        patch.setenv("WORKSPACE", str(folder / "by two"))
        run(todo["one, then two"], stop_after=1, quiet=True)
        (folder / "printed").write_text(launched(folder / "by two", __file__, data, folder))
        run(todo["two, then one"], quiet=True)
    return folder


def assert_same_run(one, other, **tolerance):
    """All numbers that a run leaves."""
    runs = [(found.history, found.results) for found in map(read_run, (one, other))]
    torch.testing.assert_close(*runs, **tolerance)
    weights = [torch.load(folder / "best.pt", weights_only=True) for folder in (one, other)]
    torch.testing.assert_close(*map(dict, weights), **tolerance)
    checkpoints = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (one, other)]
    torch.testing.assert_close(*[[dict(part["model"]), dict(part["loss"])] for part in checkpoints], **tolerance)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_what_one_gives(runs, name):
    assert_same_run(runs / "by one" / name, runs / "by two" / name, rtol=0, atol=1e-7)


def test_the_rate_of_two_processes_falls_on_a_plateau(runs):
    rates = [row["lr"] for row in read_run(runs / "by two" / "clipped, on a plateau").history]
    assert rates[0] == 10 and rates[-1] == 1


@pytest.mark.parametrize("name", ["one, then two", "two, then one"])
def test_a_run_that_was_cut_off_goes_on_with_another_number_of_processes(runs, name):
    assert_same_run(runs / "by one" / "learned", runs / "by two" / name, rtol=0, atol=1e-7)


def test_two_processes_compose_each_its_share(runs):
    found = read_run(runs / "by two" / "composed")
    assert found.results and math.isfinite(found.history[0]["train_loss"])


def test_of_two_processes_one_writes(runs):
    first, second = (json.loads((runs / f"written {process}").read_text()) for process in (0, 1))
    left = {path.relative_to(runs / "by two").parts[0] for path in map(Path, first)}
    assert left == configs("").keys()
    assert second == []


def test_two_processes_keep_of_a_list_of_runs_what_one_keeps(runs):
    listed, alone = (runs / "by two" / name for name in ("of a list", "depth alone"))
    assert (listed / "best.pt").read_bytes() == (alone / "best.pt").read_bytes()
    assert [path.name for path in (listed / "images").iterdir()] == ["epoch_002"]
    assert not (listed / "checkpoint.pt").exists()
    assert (runs / "printed").read_text().count("0/1 ") == 2  # one bar, before and after it has a name


def test_two_processes_measure_every_sample_in_its_place(runs, data):
    found = [torch.load(runs / f"measured {process}") for process in (0, 1)]
    expected = measured(data, runs / "by two" / "berhu")
    for some in found:
        torch.testing.assert_close(some, expected)


def measured(data, folder):
    """Metrics of samples in three batches: one process has two of them."""
    ds = helpers.open_zip(data, 16)
    values = helpers.evaluate(read_run(folder).model(), ds, torch.arange(70).flip(0).numpy(), precision="float32")
    return {name: torch.from_numpy(some) for name, some in values.items()}


@pytest.mark.parametrize("share", [4, 7])
def test_a_shared_batch_norm_is_that_of_the_whole_batch(runs, share):
    whole, slope, norm = norm_example(nn.BatchNorm2d)
    found = [torch.load(runs / f"norm {share} {process}") for process in (0, 1)]
    expected = norm_results(norm, whole, slope)
    for name in ("output", "slope of the input", "evaluated"):
        torch.testing.assert_close(torch.cat([some[name] for some in found]), expected[name])
    for name in ("slope of weight", "slope of bias"):
        torch.testing.assert_close(found[0][name] + found[1][name], expected[name])
    for some in found:
        torch.testing.assert_close(some["state"], expected["state"])


def norm_example(kind):
    """A batch, far from zero, what the loss's gradient is at the output, and a batch norm."""
    random = torch.Generator().manual_seed(0)
    whole, slope = torch.randn(2, 7, 5, 6, 4, generator=random, dtype=torch.float32)
    norm = kind(5, dtype=torch.float32)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5, generator=random)
        norm.bias.uniform_(-1, 1, generator=random)
    return 10 + 3 * whole, slope, norm


def norm_results(norm, batch, slope):
    batch = batch.clone().requires_grad_()
    for _ in range(2):
        output = norm(batch)
    output.backward(slope)
    slopes = {"slope of the input": batch.grad, "slope of weight": norm.weight.grad, "slope of bias": norm.bias.grad}
    return {"output": output.detach(), **slopes, "state": dict(norm.state_dict()), "evaluated": norm.eval()(batch).detach()}


def test_accelerate_launch_trains_a_saved_config_in_float32_too(data, on_cpu, tmp_path, monkeypatch):
    """Few steps of an optimizer that does not divide by the gradient's size: others make more of a rounding."""
    config = dataclasses.replace(configs(data)["berhu"], name="saved", model="resunet_lite", depth_loss="densedepth", lr=1e-3)
    config.save(tmp_path / "config.json")
    printed = launched(tmp_path / "two", ROOT / "helpers.py", tmp_path / "config.json")
    for text in ("are kept in", "epoch 1/2  loss", "epoch 2/2  loss"):
        assert printed.count(text) == 1
    monkeypatch.setenv("WORKSPACE", str(tmp_path / "one"))
    run(config, quiet=True)
    one, two = (read_run(tmp_path / count / "saved") for count in ("one", "two"))
    torch.testing.assert_close((one.history, one.results), (two.history, two.results), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "No such file"),
        ("no JSON", "holds no Config"),
        ('{"lr": 1}', "holds no Config"),
        ('{"name": "first", "model": "resnet"}', "Unknown model"),
        ('{"name": "first", "model": "twin_unet", "size": 24}', "do not divide by 16"),
    ],
)
def test_a_file_that_cannot_be_trained_ends_with_a_sentence(content, sentence, tmp_path):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    assert sentence in said_at_the_end(path)


def test_a_command_without_a_file_ends_with_a_sentence():
    assert "Give the JSON file of one Config" in said_at_the_end()


def said_at_the_end(*arguments):
    """What is given to SystemExit is printed, and makes the exit code 1."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(sys, "argv", ["helpers.py", *map(str, arguments)])
        runpy.run_path(str(ROOT / "helpers.py"), run_name="__main__")
    assert isinstance(stopped.value.code, str) and "\n" not in stopped.value.code
    return stopped.value.code


def test_a_notebook_launches_a_run(data, tmp_path, monkeypatch):
    plain = dataclasses.replace(configs(data)["berhu"], model="resunet_lite", epochs=1)
    for name, start in (("called", run), ("launched", lambda c: accelerate.notebook_launcher(run, (c,), num_processes=1))):
        monkeypatch.setenv("WORKSPACE", str(tmp_path / name))
        start(plain)
    assert_same_run(tmp_path / "called" / "berhu", tmp_path / "launched" / "berhu", rtol=0, atol=0)


TWO_GPUS = """
import os, signal, sys, torch

def start(*_):
    raise SystemExit("CUDA was started")

torch.cuda._is_compiled = lambda: True
torch.cuda._device_count_nvml = lambda: 2
torch.cuda._lazy_init = torch._C._cuda_getDeviceCount = start
assert "helpers" not in sys.modules
import helpers

assert helpers.DEVICE.type == "cuda"
config = helpers.Config("first", data=sys.argv[1])
helpers.parts_of(config, helpers.open_zip(config.data))
print(helpers.environment())

torch.set_num_threads(2)
torch.rand(2000, 2000).exp()
child = os.fork()
if child == 0:
    signal.alarm(20)
    torch.rand(2000, 2000).exp()
    os._exit(0)
print("the child ended with", os.waitpid(child, 0)[1])
"""


def test_a_notebook_leaves_the_gpus_to_the_processes_that_it_launches(data):
    """Processes are forked, and a process that has started CUDA, or only asked its runtime for GPUs, cannot be. One that has
    computed in several threads can, but these are not there in the other, which must not wait for them."""
    done = subprocess.run([sys.executable, "-c", TWO_GPUS, data], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 GPUs" in done.stdout and "the child ended with 0" in done.stdout


def test_items_made_ahead_come_in_order_and_not_too_early():
    begun, before = [], threading.active_count()
    ahead = helpers._prefetch(lambda item: begun.append(item) or 2 * item, iter(range(8)), most=2)
    for taken, item in enumerate(ahead, 1):
        time.sleep(0.02)  # time enough to begin more
        assert item == 2 * (taken - 1)
        assert len(begun) == min(taken + 2, 8)
    assert taken == 8 and threading.active_count() == before


def test_a_failure_ahead_is_raised_at_its_place():
    before, received = threading.active_count(), []
    with pytest.raises(ZeroDivisionError):
        for item in helpers._prefetch(lambda item: 6 // (3 - item), range(8)):
            received.append(item)
    assert received == [2, 3, 6] and threading.active_count() == before


def test_what_is_made_ahead_may_be_left():
    before = threading.active_count()
    ahead = helpers._prefetch(str, range(8))
    assert next(ahead) == "0"
    ahead.close()
    assert threading.active_count() == before


def note_writing(below, written):
    """Has Python note every path below the folder that this process makes, changes, moves or removes."""
    events = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.symlink", "os.link", "shutil.rmtree")

    def note(event, arguments):
        opens = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if (opens or event in events) and isinstance(arguments[0], str | os.PathLike):
            path = os.fspath(arguments[0])
            if path.startswith(str(below) + os.sep):
                written.append(path)

    sys.addaudithook(note)


def main(data, folder):
    """What each of the two processes does."""
    helpers.MODELS |= NARROW
    process, written, todo = int(os.environ["RANK"]), [], configs(data)
    note_writing(folder / "by two", written)
    with double_precision():
        for name in (*CASES, "composed", "one, then two"):
            run(todo[name], quiet=True)
        run(todo["two, then one"], stop_after=1, quiet=True)
        helpers.run_all({"list": [todo["of a list"]]})
    torch.save(measured(data, folder / "by two" / "berhu"), folder / f"measured {process}")
    (folder / f"written {process}").write_text(json.dumps(written))
    for share in (4, 7):  # the second process has three samples, or none
        whole, slope, norm = norm_example(SyncBatchNormCPU)
        mine = slice(share) if process == 0 else slice(share, None)
        torch.save(norm_results(norm, whole[mine], slope[mine]), folder / f"norm {share} {process}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
