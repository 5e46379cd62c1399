"""Runs: what they leave, that they go on to the same result, and what they refuse. With a network of a few weights."""

import csv
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for when this file is run by itself, below

import helpers
from helpers import DEPTH_LOSSES, MASK_LOSSES, MODELS, Config, ZipDataset, mirror, run, split


class Tiny(nn.Module):
    """A network of a few weights, with what makes going on difficult: running statistics and dropout."""

    stride = 4

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.2), nn.Conv2d(8, 2, 1)
        )

    def forward(self, bg, fg_bg):
        mask_logits, depth = self.layers(torch.cat([bg, fg_bg], 1)).chunk(2, 1)
        return mask_logits, depth.sigmoid()


class SlowTiny(Tiny):
    """The same, and time enough to be killed in the midst of an epoch."""

    def forward(self, bg, fg_bg):
        time.sleep(0.2 if self.training else 0)
        return super().forward(bg, fg_bg)


@pytest.fixture(scope="module")
def data(write_zip, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.zip"
    write_zip(path, samples=[(b, f, 1) for b in range(1, 13) for f in range(1, 13)], size=16)
    return path


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A workspace for each test, and the tiny network among the known."""
    monkeypatch.setenv("WORKSPACE", str(tmp_path))
    monkeypatch.setitem(MODELS, "tiny", Tiny)
    return tmp_path


@pytest.fixture
def config(data):
    return Config("first", data=str(data), size=16, model="tiny", epochs=3, lr=0.02, precision="float32")


def contents(folder, without=("timing.csv", "checkpoint.pt")):
    """Every file's bytes, by its path in the folder, but for what holds seconds."""
    files = [path for path in Path(folder).rglob("*") if path.is_file() and path.name not in without]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_same_run(one, other):
    first, second = contents(one), contents(other)
    for files in (first, second):  # the names of the runs differ, and nothing else
        files["config.json"] = {**json.loads(files["config.json"]), "name": "", "data": ""}
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    first, second = checkpoint(one), checkpoint(other)
    torch.testing.assert_close(first["model"], second["model"], rtol=0, atol=0)
    torch.testing.assert_close(first["optimizer"]["state"], second["optimizer"]["state"], rtol=0, atol=0)
    assert (first["schedule"], first["history"]) == (second["schedule"], second["history"])


def renamed(config, **changes):
    return dataclasses.replace(config, **changes)


# What a run leaves


def test_a_run_leaves_the_promised_files(config, data, place):
    finished = run(config)
    parts = split(ZipDataset(data, size=16))
    watched = {name: parts[name][np.linspace(0, len(parts[name]) - 1, 4).astype(int)] for name in ("train", "test_new_both")}
    ds = ZipDataset(data, size=16)
    kinds = ("bg", "fg_bg", "mask", "mask_predicted", "depth", "depth_predicted")
    pictures = {f"{part}_{ds.name(i)}_{kind}.png" for part, some in watched.items() for i in some for kind in kinds}
    expected = {"config.json", "metrics.csv", "timing.csv", "checkpoint.pt", "best.pt", "results.json"}
    expected |= {f"images/epoch_{e:03}/{name}" for e in (1, 2, 3) for name in (*pictures, "sheet.png")}
    assert finished.folder == place / "first"
    assert contents(place / "first", without=()).keys() == expected


def test_a_run_of_a_name_with_parts_lies_in_folders(config, place):
    assert run(renamed(config, name="losses/dice", epochs=1)).folder == place / "losses" / "dice"


def test_metrics_csv_has_a_row_an_epoch(config, place):
    finished = run(config)
    with open(place / "first" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    metrics = ["iou", "dice", "pixel_accuracy", "rmse", "mae", "abs_rel", "log10", "delta1", "delta2", "delta3", "ssim"]
    assert set(rows[0]) == {"epoch", "lr", "train_loss", "valid_loss", *(f"valid_{name}" for name in metrics)}
    assert [float(row["epoch"]) for row in rows] == [1, 2, 3]
    assert finished.history == [{key: float(value) for key, value in row.items()} for row in rows]
    assert len(finished.seconds) == 3 and all(second > 0 for second in finished.seconds)


def test_training_lowers_the_loss(config):
    history = run(renamed(config, epochs=5)).history
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert history[-1]["valid_loss"] < history[0]["valid_loss"]


def test_config_json_says_everything(config, place):
    special = renamed(config, mask_loss=None, depth_weight=2.5, epochs=1)
    run(special)
    saved = json.loads((place / "first" / "config.json").read_text())
    saved.pop("fingerprint")
    assert Config(**saved) == special == helpers.read_run(place / "first").config


def test_results_are_the_means_that_the_best_weights_give(config, data, place):
    """Recomputed here picture by picture."""
    finished = run(config)
    net = Tiny().eval()
    net.load_state_dict(torch.load(place / "first" / "best.pt", weights_only=True))
    ds = ZipDataset(data, size=16)
    parts = split(ds)
    parts.pop("train")
    assert finished.results.keys() == parts.keys()
    assert finished.results == json.loads((place / "first" / "results.json").read_text())
    for part, indices in parts.items():
        ious, rmses = [], []
        for item in (ds[i] for i in indices):
            with torch.no_grad():
                mask_logits, depth = net(item["bg"][None], item["fg_bg"][None])
            mask, truth = mask_logits[0, 0].numpy() > 0, item["mask"][0].numpy() == 1
            ious.append((mask & truth).sum() / (mask | truth).sum())
            rmses.append(np.sqrt(np.square(depth[0].numpy() - item["depth"].numpy()).mean()))
        assert finished.results[part]["iou"] == pytest.approx(np.mean(ious), abs=1e-4)
        assert finished.results[part]["rmse"] == pytest.approx(np.mean(rmses), abs=1e-4)


def test_best_weights_are_those_of_the_least_validation_loss(config, data):
    finished = run(renamed(config, epochs=6, lr=0.5, schedule="constant"))  # so high that the loss jumps about
    losses = [row["valid_loss"] for row in finished.history]
    assert min(losses) < losses[-1]
    ds = ZipDataset(data, size=16)
    loss = helpers.task_loss(config.mask_loss, config.depth_loss, config.depth_weight)
    values = helpers.evaluate(finished.model(), ds, split(ds)["valid"], loss, "float32")
    assert values["loss"].mean() == pytest.approx(min(losses), rel=1e-5)


# Going on


@pytest.mark.parametrize("options", [{}, {"optimizer": "sgd", "schedule": "constant"}, {"split": "image", "augment": "none"}])
def test_a_run_that_goes_on_equals_one_that_never_stopped(config, place, options):
    run(renamed(config, **options))
    parts = renamed(config, name="parts", **options)
    assert len(run(parts, stop_after=1).history) == 1
    assert not run(parts, stop_after=2).results
    assert run(parts).results
    assert_same_run(place / "first", place / "parts")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_run_killed_in_the_midst_of_an_epoch_goes_on_to_the_same_result(config, place):
    killed = renamed(config, name="killed")
    child = subprocess.Popen([sys.executable, __file__, json.dumps(dataclasses.asdict(killed))], stdout=subprocess.DEVNULL)
    table, deadline = place / "killed" / "metrics.csv", time.monotonic() + 120
    while not table.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.15)  # into the next epoch
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert len(checkpoint(place / "killed")["history"]) < 3 and not (place / "killed" / "results.json").exists()

    run(killed)
    run(config)
    assert_same_run(place / "first", place / "killed")


@pytest.mark.parametrize("missing", ["metrics.csv", "timing.csv", "results.json"])
def test_a_run_cut_off_before_a_table_was_written_makes_it_anew(config, place, missing):
    run(config)
    before = contents(place / "first", without=())
    (place / "first" / missing).unlink()
    (place / "first" / "results.json").unlink(missing_ok=True)
    run(config)
    assert contents(place / "first", without=()) == before


def test_what_a_run_cut_off_while_it_wrote_had_written_is_dropped(config, place):
    run(config)
    parts = renamed(config, name="parts")
    run(parts, stop_after=1)
    (place / "parts" / "images" / "epoch_002.part").mkdir()
    for name in ("images/epoch_002.part/half.png", "checkpoint.pt.part", "best.pt.part", "metrics.csv.part"):
        (place / "parts" / name).write_bytes(b"half a file")
    run(parts)
    assert_same_run(place / "first", place / "parts")


def test_a_run_cut_off_before_its_first_checkpoint_starts_anew(config, place):
    run(config)
    run(renamed(config, name="again"), stop_after=1)
    (place / "again" / "checkpoint.pt").unlink()
    run(renamed(config, name="again"))
    assert_same_run(place / "first", place / "again")


def test_a_finished_run_is_read_and_nothing_is_trained(config, place, monkeypatch, capsys):
    finished = run(config)
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}

    def refuse():
        raise AssertionError("a finished run made a network")

    monkeypatch.setitem(MODELS, "tiny", refuse)
    capsys.readouterr()
    again = run(config)
    assert (again.history, again.results, again.config) == (finished.history, finished.results, config)
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before
    assert "finished before" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_run_and_another_seed_another(config, place):
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        run(renamed(config, name=name, seed=seed, epochs=1))
    assert_same_run(place / "one", place / "two")
    assert contents(place / "one")["best.pt"] != contents(place / "other")["best.pt"]


def test_the_start_and_the_order_of_data_do_not_depend_on_the_loss(config, place, monkeypatch):
    """So that runs of a comparison differ by their loss alone: a loss that moves nothing leaves the same traces."""
    seen = {"a": [], "b": []}
    for name in seen:
        monkeypatch.setitem(DEPTH_LOSSES, name, lambda p, t, name=name: seen[name].append(t.clone()) or 0 * p.sum())
        run(renamed(config, name=name, depth_loss=name, mask_loss=None, weight_decay=0.0, epochs=1))
    assert len(seen["a"]) > 1 and all(torch.equal(one, other) for one, other in zip(*seen.values(), strict=True))
    assert contents(place / "a")["best.pt"] == contents(place / "b")["best.pt"]


def test_every_training_sample_is_seen_once_an_epoch_in_another_order(config, data, monkeypatch):
    train = split(ZipDataset(data, size=16))["train"]
    asked, batch_of = [], ZipDataset.batch
    monkeypatch.setattr(ZipDataset, "batch", lambda ds, indices: asked.extend(np.asarray(indices)) or batch_of(ds, indices))
    orders = []
    for epoch in (1, 2):
        asked.clear()
        run(config, stop_after=epoch)
        orders.append(asked[: len(train)])  # training comes first; the rest is for measuring and pictures
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(train)
    assert orders[0] != orders[1] != sorted(train)


def test_a_run_without_gradient_scaling_goes_on_where_it_is_needed(config, monkeypatch):
    """As from a CPU to an older GPU: precision "auto" means float32 here and float16 there."""
    auto = renamed(config, precision="auto")
    for dtype, epoch in ((torch.float32, 1), (torch.float16, 2), (torch.float32, 3)):
        monkeypatch.setattr(helpers, "compute_dtype", lambda precision, dtype=dtype: dtype)
        assert len(run(auto, stop_after=epoch).history) == epoch


def test_stopping_after_no_epoch_trains_nothing(config):
    assert run(config, stop_after=0).history == []
    assert len(run(config).history) == config.epochs


def test_a_run_from_before_a_setting_existed_goes_on_with_its_default(config, place):
    run(config, stop_after=1)
    saved = json.loads((place / "first" / "config.json").read_text())
    assert saved.pop("augment") == "mirror"
    (place / "first" / "config.json").write_text(json.dumps(saved))
    assert run(config).results
    with pytest.raises(ValueError, match="augment was 'mirror' and is 'none'"):
        run(renamed(config, augment="none"))


# Refusals


@pytest.mark.parametrize(
    "field, value, text",
    [
        ("lr", 0.5, "lr was 0.02 and is 0.5"),
        ("epochs", 9, "epochs was 3 and is 9"),
        ("mask_loss", None, "mask_loss was 'bce_dice' and is None"),
    ],
)
@pytest.mark.parametrize("state", ["finished", "cut off"])
def test_another_config_under_the_same_name_is_refused(config, place, field, value, text, state):
    run(config, stop_after=1 if state == "cut off" else None)
    before = contents(place / "first", without=())
    with pytest.raises(ValueError, match=f"The run 'first' exists, but {text}. Take another name"):
        run(renamed(config, **{field: value}))
    assert contents(place / "first", without=()) == before


def test_other_data_under_the_same_name_are_refused(config, write_zip, place):
    run(config, stop_after=1)
    write_zip(place / "other.zip", samples=[(b, f, 1) for b in range(1, 13) for f in range(1, 14)], size=16)
    with pytest.raises(ValueError, match=r"fingerprint was '[0-9a-f]{8}' and is"):
        run(renamed(config, data=str(place / "other.zip")))


def test_the_same_data_in_another_place_are_the_same(config, data, place):
    run(config)
    run(renamed(config, name="moved"), stop_after=1)
    shutil.copy(data, place / "copy.zip")
    run(renamed(config, name="moved", data=str(place / "copy.zip")))
    assert_same_run(place / "first", place / "moved")


def test_a_size_the_network_cannot_take_is_refused_and_leaves_no_folder(config, place):
    with pytest.raises(ValueError, match=r"18 x 18 pixels do not divide by 4\. Use (16 x 16|20 x 20)"):
        run(renamed(config, size=18))
    assert list(place.iterdir()) == []


def test_a_loss_that_is_no_number_stops_the_run_as_it_was(config, place, monkeypatch):
    monkeypatch.setitem(DEPTH_LOSSES, "mine", helpers.l1)
    mine = renamed(config, depth_loss="mine")
    run(mine, stop_after=1)
    before = contents(place / "first", without=())
    monkeypatch.setitem(DEPTH_LOSSES, "mine", lambda p, t: p.mean() * float("nan"))
    with pytest.raises(ValueError, match=r"The loss of epoch 2 is nan\. The run stands as after epoch 1"):
        run(mine)
    assert contents(place / "first", without=()) == before
    monkeypatch.setitem(DEPTH_LOSSES, "mine", helpers.l1)
    run(mine)
    run(renamed(config, name="undisturbed", depth_loss="mine"))
    states = [checkpoint(place / name)["model"] for name in ("first", "undisturbed")]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_a_validation_loss_that_is_no_number_stops_the_run_too(config, monkeypatch):
    monkeypatch.setitem(DEPTH_LOSSES, "mine", lambda p, t: p.mean() * (1 if torch.is_grad_enabled() else float("nan")))
    with pytest.raises(ValueError, match=r"The loss of epoch 1 is nan\. The run stands as after epoch 0"):
        run(renamed(config, depth_loss="mine"))


def test_too_few_samples_are_refused_before_anything_is_made(config, write_zip, place):
    write_zip(place / "few.zip", samples=[(1, 1, 1), (2, 1, 1)])
    with pytest.raises(ValueError, match=r"few\.zip: of its 2 samples, split 'unseen' leaves none for"):
        run(renamed(config, data=str(place / "few.zip")))
    assert not (place / "first").exists()


@pytest.mark.parametrize(
    "options, text",
    [
        ({"model": "unet"}, "Unknown model 'unet'. Known: resunet, dual_stream"),
        ({"optimizer": "adm"}, "Unknown optimizer 'adm'. Known: sgd, adamw"),
        ({"schedule": "step"}, "Unknown schedule 'step'. Known: constant, onecycle"),
        ({"split": "random"}, "Unknown split 'random'. Known: unseen, image"),
        ({"augment": "rotate"}, "Unknown augment 'rotate'. Known: mirror, none"),
        ({"precision": "int8"}, "Unknown precision 'int8'. Known: auto, float32"),
        ({"depth_near": "left"}, "Unknown depth_near 'left'. Known: dark, bright"),
        ({"epochs": 0}, "epochs is 0; it must be more than 0"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"size": 0}, "size is 0"),
        ({"size": 8}, "size is 8; SSIM, one of the metrics, looks at windows of 11 pixels"),
        ({"lr": float("nan")}, "lr is nan"),
    ],
)
def test_a_config_refuses_what_it_does_not_know(options, text):
    with pytest.raises(ValueError, match=text):
        Config("a", **options)


@pytest.mark.parametrize("name", ["", "..", "../a", "/a", "a/", "a//b", "a ", "a\\b", ".", "a:b"])
def test_a_name_that_leads_out_of_the_workspace_is_refused(name):
    with pytest.raises(ValueError, match="name is "):
        Config(name)


def test_reading_a_folder_that_holds_no_run(place):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        helpers.read_run(place / "nothing")


# Choices


@pytest.mark.parametrize("option", [("optimizer", name) for name in helpers.OPTIMIZERS])
@pytest.mark.parametrize("schedule", helpers.SCHEDULES)
def test_every_optimizer_and_schedule_trains(config, option, schedule):
    history = run(renamed(config, **dict([option]), schedule=schedule, epochs=1)).history
    assert np.isfinite(list(history[0].values())).all()


@pytest.mark.parametrize("schedule, first, last", [("constant", 1, 1), ("onecycle", 1 / 25, 1 / 25e4)])
def test_a_schedule_ends_with_the_run_and_its_rates_are_used(config, monkeypatch, schedule, first, last):
    """The cycle begins at 1/25 of lr and ends at a ten thousandth of that: Smith and Topin, Super-Convergence, 2017."""
    rates = []

    class Recorder(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setitem(helpers.OPTIMIZERS, "recorder", lambda *args, **options: Recorder(*args, **options, momentum=0.9))
    history = run(renamed(config, optimizer="recorder", schedule=schedule)).history
    assert (rates[0], history[-1]["lr"]) == pytest.approx((config.lr * first, config.lr * last))
    assert 0.9 * config.lr < max(rates) <= config.lr and rates[-1] >= history[-1]["lr"]
    assert len(rates) % len(history) == 0 and history[0]["lr"] == pytest.approx(rates[len(rates) // len(history)])


@pytest.mark.parametrize("precision", helpers.PRECISIONS)
def test_every_precision_gives_about_the_same(config, precision):
    exact = run(renamed(config, epochs=1)).history[0]
    history = run(renamed(config, name="other", precision=precision, epochs=1)).history[0]
    assert history["valid_loss"] == pytest.approx(exact["valid_loss"], rel=0.05)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"mask_loss": None, "depth_loss": "l1", "depth_weight": 3.0}, lambda row: 3 * row["valid_mae"]),
        ({"mask_loss": "errors", "depth_loss": None}, lambda row: 1 - row["valid_pixel_accuracy"]),
    ],
)
def test_one_task_can_be_trained_alone(config, monkeypatch, options, expected):
    monkeypatch.setitem(MASK_LOSSES, "errors", lambda z, t: ((z > 0).float() - t).abs().mean() + 0 * z.sum())
    row = run(renamed(config, epochs=1, **options)).history[0]
    assert row["valid_loss"] == pytest.approx(expected(row), rel=1e-4)


def test_the_task_that_is_not_trained_learns_nothing(config):
    weights = run(renamed(config, depth_loss=None, weight_decay=0.0)).model().layers[4].weight
    torch.manual_seed(config.seed)
    start = Tiny().layers[4].weight
    assert torch.equal(weights[1], start[1]) and not torch.equal(weights[0], start[0])


def test_at_most_so_many_samples(config, data, monkeypatch):
    limited = renamed(config, max_train=11, max_test=5)
    ds = ZipDataset(data, size=16)
    whole, cut = split(ds), helpers.parts_of(limited, ds)
    assert {part: len(indices) for part, indices in cut.items()} == {
        part: min(len(indices), 11 if part == "train" else 5) for part, indices in whole.items()
    }
    assert all(set(cut[part]) <= set(whole[part]) for part in whole)


def test_a_run_leaves_the_random_numbers_of_its_caller_alone(config):
    def numbers():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)]

    def start():
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)

    start()
    expected = numbers()
    start()
    run(config)
    assert numbers() == expected


def test_mirror_turns_all_four_pictures_or_none():
    batch = {kind: torch.rand(200, channels, 3, 5) for kind, channels in (("bg", 3), ("fg_bg", 3), ("mask", 1), ("depth", 1))}
    mirrored = mirror(batch)
    turned = {kind: [torch.equal(p, q.flip(2)) for p, q in zip(mirrored[kind], batch[kind], strict=True)] for kind in batch}
    same = {kind: [torch.equal(p, q) for p, q in zip(mirrored[kind], batch[kind], strict=True)] for kind in batch}
    for kind in batch:
        assert turned[kind] == turned["bg"] and same[kind] == [not turn for turn in turned["bg"]]
    assert 60 < sum(turned["bg"]) < 140


if __name__ == "__main__":  # the run that is to be killed
    torch.set_num_threads(1)  # as conftest.py does
    MODELS["tiny"] = SlowTiny
    run(Config(**json.loads(sys.argv[1])))
