"""Runs that two processes share give what one gives, and one of them writes. On CPUs, which need no GPU."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import helpers
from helpers import MODELS, Config, ResUNet, read_run, run

# Without GPUs, too, the launcher of several GPUs starts as many processes as it is told; --cpu means one.
LAUNCH = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
LAUNCH = [sys.executable, *LAUNCH.split(), "--dynamo_backend", "no", "--main_process_port", "0"]
NARROW = {"narrow": lambda: ResUNet((8, 16, 32))}
CASES = {
    "plain": {},
    "depth alone": {"mask_loss": None, "depth_loss": "berhu"},  # which looks at the batch's largest error
    "mask alone": {"depth_loss": None, "average": 0.5, "clip_norm": 0.1},
    "learned": {"depth_weight": "learned", "schedule": "plateau"},
    "odd": {"max_train": 19},  # batches that two processes cannot halve
    "left off": {},
}
ON_A_GPU = "one process would compute on the GPU, the two on the CPU"
pytestmark = pytest.mark.skipif(helpers.DEVICE.type != "cpu", reason=ON_A_GPU)
LOSSES = ("train_loss", "valid_loss", "valid_rmse", "depth_weight")


def configs(data):
    base = {"size": 16, "split": "image", "model": "narrow", "optimizer": "sgd", "lr": 0.01, "epochs": 2}
    base |= {"schedule": "constant", "batch_size": 8, "max_train": 32, "max_test": 9, "augment": "none"}
    base |= {"data": data, "precision": "float32"}
    return {name: Config(name, **base | options) for name, options in CASES.items()}


def launched(workspace, *command):
    """How two processes ended that were started with this command, which must not take for ever."""
    place = {"WORKSPACE": str(workspace), "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(helpers.ROOT)}
    how = {"env": os.environ | place, "capture_output": True, "text": True, "timeout": 240}
    return subprocess.run([*LAUNCH, *command], **how)


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setitem(MODELS, "narrow", NARROW["narrow"])


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """A folder of runs by `one` process and by `two`, and of what each of the two noted."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "narrow", NARROW["narrow"])
        patch.setenv("WORKSPACE", str(folder / "one"))
        for config in configs(data).values():
            run(config, quiet=True)
        done = launched(folder / "two", __file__, data, folder)
        assert done.returncode == 0, done.stderr
        (folder / "printed").write_text(done.stdout)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_what_one_gives(runs, name):
    one, two = (read_run(runs / count / name) for count in ("one", "two"))
    assert one.history[0].keys() == two.history[0].keys() and one.results.keys() == two.results.keys()
    numbers = [[row.get(name, 0) for row in some.history for name in LOSSES] for some in (one, two)]
    assert len(numbers[0]) == 2 * len(LOSSES)
    # Of an odd batch one sample is taken twice, so that both processes have as many.
    assert numbers[0] == pytest.approx(numbers[1], abs=0.02 if name == "odd" else 1e-3)


def test_one_of_two_processes_writes_and_prints(runs):
    first, second = (json.loads((runs / f"process {process}").read_text()) for process in (0, 1))
    assert {Path(path).relative_to(runs / "two").parts[0] for path in first["written"]} >= CASES.keys()
    assert second["written"] == []
    assert (runs / "printed").read_text().count("plain  epoch 2  ") == 1


def test_both_processes_read_a_finished_run_and_are_both_refused_another_config(runs):
    first, second = (json.loads((runs / f"process {process}").read_text()) for process in (0, 1))
    assert first["read"] == second["read"] == read_run(runs / "two" / "plain").results
    assert first["refused"] == second["refused"] and "lr was 0.01 and is 0.5" in first["refused"]


def test_accelerate_launch_trains_a_saved_config_and_ends_where_it_is_refused(data, tmp_path, monkeypatch):
    config = dataclasses.replace(configs(data)["plain"], model="resunet_lite", max_train=8, max_test=2)
    config.save(tmp_path / "config.json")
    done = launched(tmp_path / "two", helpers.__file__, tmp_path / "config.json")
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("WORKSPACE", str(tmp_path / "one"))
    for one, two in zip(run(config).history, read_run(tmp_path / "two" / "plain").history, strict=True):
        assert one["train_loss"] == pytest.approx(two["train_loss"], abs=1e-3)
    dataclasses.replace(config, lr=0.5).save(tmp_path / "config.json")
    done = launched(tmp_path / "two", helpers.__file__, tmp_path / "config.json")
    assert done.returncode != 0 and "lr was 0.01 and is 0.5" in done.stderr


def main(data, folder):
    """What each of the two processes does; Python tells of every file that it writes, moves or makes."""
    MODELS["narrow"] = NARROW["narrow"]
    process, written, todo = int(os.environ["RANK"]), [], configs(data)

    def note(event, given):
        opens = event == "open" and set(str(given[1])) & set("wax+")
        below = (opens or event in ("os.rename", "os.mkdir", "os.remove")) and str(given[0])
        if below and below.startswith(str(folder / "two") + os.sep):
            written.append(str(given[0]))

    sys.addaudithook(note)
    run(todo["left off"], stop_after=1, quiet=True)
    for config in todo.values():
        run(config)
    noted = {"read": run(todo["plain"]).results}
    try:
        run(dataclasses.replace(todo["plain"], lr=0.5))
    except ValueError as error:
        noted["refused"] = str(error)
    (folder / f"process {process}").write_text(json.dumps(noted | {"written": written}))
    helpers.dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
