"""Runs: what they leave, that they go on to the same result, and what they refuse. With a network of a few weights."""

import colorsys
import csv
import dataclasses
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop, lr_scheduler

import helpers
from helpers import (
    DEPTH_LOSSES,
    MASK_LOSSES,
    MODELS,
    OPTIMIZERS,
    Config,
    ResNet18UNet,
    ZipDataset,
    jitter_colours,
    mirror,
    run,
    split,
)


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


class Turned(Tiny):
    """Of the same shapes, but not the same: where the one sees near, the other sees far."""

    def forward(self, bg, fg_bg):
        mask_logits, depth = super().forward(bg, fg_bg)
        return -mask_logits, 1 - depth


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
    assert first.keys() == second.keys() and first["history"] == second["history"]
    assert first["schedule"] == second["schedule"]
    for name in ("model", "loss", "optimizer"):
        states = [part[name]["state"] if name == "optimizer" else dict(part[name]) for part in (first, second)]
        torch.testing.assert_close(*states, rtol=0, atol=0)


def renamed(config, **changes):
    return dataclasses.replace(config, **changes)


@pytest.fixture
def recorder(monkeypatch):
    """An optimizer that notes, for every step, the rate and the gradients that it was given."""

    class Recorder(SGD):
        rates, slopes = [], []

        def step(self, closure=None):
            self.rates.append(self.param_groups[0]["lr"])
            self.slopes.append(torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]]))
            return super().step(closure)

    monkeypatch.setitem(OPTIMIZERS, "recorder", lambda *args, **options: Recorder(*args, **options, momentum=0.9))
    return Recorder


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
    metrics.append("mask_area")
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


def test_a_run_gives_back_its_own_network_though_another_has_the_same_shapes(config, monkeypatch):
    monkeypatch.setitem(MODELS, "turned", Turned)
    assert type(run(renamed(config, epochs=1)).model()) is Tiny
    other = run(renamed(config, name="other", model="turned", epochs=1))
    assert type(other.model()) is Turned
    assert other.results["valid"]["rmse"] == pytest.approx(other.history[0]["valid_rmse"], rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": "sgd", "schedule": "constant"},
        {"split": "image", "augment": "none"},
        {"optimizer": "rmsprop", "schedule": "step", "lr": 0.005, "subset": 100, "split": "image"},
        {"schedule": "plateau", "depth_weight": "learned"},
        {"optimizer": "adam", "augment": "mirror+colour", "clip_norm": 0.5},
    ],
)
def test_a_run_that_goes_on_equals_one_that_never_stopped(config, place, options):
    whole, parts = renamed(config, **options), renamed(config, name="parts", **options)
    assert len(run(parts, stop_after=1).history) == 1
    assert not run(parts, stop_after=2).results
    assert run(parts).results and run(whole).results
    assert_same_run(place / "first", place / "parts")


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


def test_a_list_of_runs_is_trained_once_and_keeps_little(config, place, monkeypatch, capsys):
    one, other = renamed(config, name="one"), renamed(config, name="other", seed=1)
    runs = helpers.run_all({"one": [one], "both": [one, other]})
    assert "epoch 1/3" not in capsys.readouterr().out
    assert runs["one"][0].results == runs["both"][0].results == run(renamed(config, name="alone")).results
    assert runs["both"][1].results != runs["one"][0].results
    for name in ("one", "other"):
        files = {path.name for path in (place / name).iterdir()}
        assert files == {"config.json", "metrics.csv", "timing.csv", "best.pt", "results.json", "images"}
        assert [path.name for path in (place / name / "images").iterdir()] == ["epoch_003"]
    monkeypatch.setitem(MODELS, "tiny", None)
    assert helpers.run_all({"both": [one, other]})["both"][1].history == runs["both"][1].history


def test_a_zip_that_was_written_anew_is_opened_anew(write_zip, tmp_path):
    path = tmp_path / "data.zip"
    for number in (1, 2):
        path.unlink(missing_ok=True)
        write_zip(path, samples=[(b, 1, 1) for b in range(number)], size=16)
        os.utime(path, (number, number))
        assert len(helpers.open_zip(path, 16)) == number
    assert helpers.open_zip(path, 16) is helpers.open_zip(path, 16)


def test_one_value_that_is_not_a_number_is_not_averaged_away(data):
    class Broken(torch.nn.Module):
        def forward(self, bg, fg_bg):
            depth = torch.full_like(bg[:, :1], 0.5)
            depth[0] = torch.nan
            return depth, depth

    means = helpers.score(Broken(), ZipDataset(data, size=16), {"all": np.arange(4)}, "float32")["all"]
    assert np.isnan(means["rmse"]) and np.isnan(means["mae"]) and not np.isnan(means["iou"])


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
    seen = {"a": [], "b": [], "learned": []}
    monkeypatch.setitem(MASK_LOSSES, "nothing", lambda z, t: 0 * z.sum())
    for name in seen:
        monkeypatch.setitem(DEPTH_LOSSES, name, lambda p, t, name=name: seen[name].append(t.clone()) or 0 * p.sum())
        weight = "learned" if name == "learned" else 1.0
        run(renamed(config, name=name, depth_loss=name, mask_loss="nothing", depth_weight=weight, weight_decay=0.0, epochs=1))
    assert len(seen["a"]) > 1
    for name in ("b", "learned"):
        assert all(torch.equal(one, other) for one, other in zip(seen["a"], seen[name], strict=True))
        assert contents(place / "a")["best.pt"] == contents(place / name)["best.pt"]


def test_every_training_sample_is_seen_once_an_epoch_in_another_order(config, data, monkeypatch):
    train = split(ZipDataset(data, size=16))["train"]
    asked, batch_of = [], ZipDataset.batch
    monkeypatch.setattr(
        ZipDataset, "batch", lambda ds, indices, *rest, **named: asked.extend(indices) or batch_of(ds, indices, *rest, **named)
    )
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
    with pytest.raises(ValueError, match=r"fingerprint was '[0-9a-f]{16}' and is"):
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
    assert list(place.glob("[!.]*")) == []


def test_a_loss_that_is_no_number_stops_the_run_as_it_was(config, place, monkeypatch):
    monkeypatch.setitem(DEPTH_LOSSES, "mine", helpers.l1)
    mine = renamed(config, depth_loss="mine")
    run(mine, stop_after=1)
    before = contents(place / "first", without=())
    monkeypatch.setitem(DEPTH_LOSSES, "mine", lambda p, t: p.mean() * float("nan"))
    with pytest.raises(ValueError, match=r"the depth loss \(mine\) of batch 1 of epoch 2 is nan\..* stands as after epoch 1;"):
        run(mine)
    assert contents(place / "first", without=()) == before
    monkeypatch.setitem(DEPTH_LOSSES, "mine", helpers.l1)
    run(mine)
    run(renamed(config, name="undisturbed", depth_loss="mine"))
    assert_same_run(place / "first", place / "undisturbed")


def test_a_validation_loss_that_is_no_number_stops_the_run_too(config, monkeypatch):
    monkeypatch.setitem(DEPTH_LOSSES, "mine", lambda p, t: p.mean() * (1 if torch.is_grad_enabled() else float("nan")))
    with pytest.raises(ValueError, match=r"the validation loss of epoch 1 is not finite\..* stands as after epoch 0;"):
        run(renamed(config, depth_loss="mine"))


def test_too_few_samples_are_refused_before_anything_is_made(config, write_zip, place):
    write_zip(place / "few.zip", samples=[(1, 1, 1), (2, 1, 1)])
    with pytest.raises(ValueError, match=r"few\.zip: of its 2 samples, split 'unseen' leaves none for"):
        run(renamed(config, data=str(place / "few.zip")))
    assert not (place / "first").exists()


@pytest.mark.parametrize(
    "options, text",
    [
        ({"model": "unet"}, "Unknown model 'unet'. Known: resunet, resunet_lite, dual_stream, twin_unet, two_head_resnet"),
        ({"optimizer": "adm"}, "Unknown optimizer 'adm'. Known: sgd, rmsprop, adam, adamw"),
        ({"schedule": "cosine"}, "Unknown schedule 'cosine'. Known: constant, step, plateau, onecycle"),
        ({"split": "random"}, "Unknown split 'random'. Known: unseen, image"),
        (
            {"augment": "rotate"},
            r"augment is 'rotate'; .* 'none', or one or several of mirror, compose, colour, shake, joined by \+",
        ),
        ({"augment": "mirror+rotate"}, r"augment is 'mirror\+rotate'"),
        ({"augment": "mirror+none"}, r"augment is 'mirror\+none'"),
        ({"augment": ""}, "augment is ''"),
        ({"augment": None}, "augment is None"),
        ({"precision": "int8"}, "Unknown precision 'int8'. Known: auto, float32"),
        ({"depth_near": "left"}, "Unknown depth_near 'left'. Known: dark, bright"),
        ({"mask_loss": "berhu"}, "Unknown mask loss 'berhu'. Known: bce, weighted_bce"),
        ({"depth_loss": "bce"}, "Unknown depth loss 'bce'. Known: l1, rmse"),
        ({"depth_weight": "auto"}, "depth_weight is 'auto'.*'learned'"),
        ({"depth_weight": "learned", "mask_loss": None}, "depth_weight is 'learned'"),
        ({"depth_weight": "learned", "depth_loss": None}, "depth_weight is 'learned'"),
        ({"subset": -1}, "subset is -1"),
        ({"clip_norm": -0.1}, "clip_norm is -0.1"),
        ({"epochs": 0}, "epochs is 0; it must be more than 0"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"size": 0}, "size is 0"),
        ({"size": 8}, "size is 8; SSIM, one of the metrics, looks at windows of 11 pixels"),
        ({"size": 50, "augment": "mirror+shake"}, "size is 50, but augment has shake, .* blocks of 16 pixels. Use 48"),
        ({"size": 12, "augment": "shake"}, "Use 16"),
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


@pytest.mark.parametrize("optimizer, lr", [("sgd", 0.05), ("rmsprop", 0.005), ("adam", 0.02), ("adamw", 0.02)])
@pytest.mark.parametrize("schedule", helpers.SCHEDULES)
def test_every_optimizer_lowers_the_loss_with_every_schedule(config, optimizer, lr, schedule):
    history = run(renamed(config, optimizer=optimizer, schedule=schedule, lr=lr)).history
    assert history[-1]["train_loss"] < history[0]["train_loss"] and history[-1]["valid_loss"] < history[0]["valid_loss"]


def test_the_optimizers_are_those_of_torch():
    weights = [torch.nn.Parameter(torch.ones(2))]
    made = {name: make(weights, lr=0.1, weight_decay=0.01) for name, make in OPTIMIZERS.items()}
    assert {name: type(one) for name, one in made.items()} == {"sgd": SGD, "rmsprop": RMSprop, "adam": Adam, "adamw": AdamW}
    assert made["sgd"].defaults["momentum"] == 0.9


@pytest.mark.parametrize("schedule, first", [("constant", 1), ("onecycle", 1 / 25)])
def test_a_schedule_ends_with_the_run_and_its_rates_are_used(config, recorder, schedule, first):
    """The cycle begins at 1/25 of lr and ends far below that: Smith and Topin, Super-Convergence, 2017."""
    history, rates = run(renamed(config, optimizer="recorder", schedule=schedule)).history, recorder.rates
    assert rates[0] == pytest.approx(config.lr * first) and 0.9 * config.lr < max(rates) <= config.lr
    assert rates[-1] == config.lr if schedule == "constant" else rates[-1] < rates[0]
    assert [row["lr"] for row in history] == pytest.approx(rates[:: len(rates) // len(history)])  # as an epoch begins


def test_the_cycle_is_that_of_torch(config, recorder):
    run(renamed(config, optimizer="recorder", schedule="onecycle"))
    expected = lr_scheduler.OneCycleLR(SGD([torch.zeros(1)], momentum=0.9), config.lr, len(recorder.rates) + 1)
    rates = expected.get_last_lr()
    for _ in recorder.rates:
        expected.optimizer.step()
        expected.step()
        rates += expected.get_last_lr()
    assert recorder.rates == pytest.approx(rates[:-1])


@pytest.mark.parametrize("epochs, batch_size", [(3, 16), (4, 16), (5, 20), (2, 16)])
def test_steps_divide_the_rate_by_ten_after_each_third(config, recorder, epochs, batch_size):
    run(renamed(config, optimizer="recorder", schedule="step", epochs=epochs, batch_size=batch_size))
    levels, counts = np.unique(np.round(np.log10(np.array(recorder.rates) / config.lr), 6), return_counts=True)
    assert levels.tolist() == [-2, -1, 0] and np.abs(counts - len(recorder.rates) / 3).max() < 1.5
    assert recorder.rates == sorted(recorder.rates, reverse=True)
    if epochs == 3:
        assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize(
    "falls, expected",
    [("valid", [1] * 9), ("train", [1] * 4 + [0.1] * 3 + [0.01] * 2), ("neither", [1] * 4 + [0.1] * 3 + [0.01] * 2)],
)
def test_a_plateau_is_three_epochs_without_a_lesser_validation_loss(config, recorder, monkeypatch, falls, expected):
    """Asked once an epoch: asked after every batch, the rate would fall within the first epochs. No other loss counts."""
    calls = {"train": 0, "valid": 0}

    def scripted(p, t):
        part = "train" if torch.is_grad_enabled() else "valid"
        calls[part] += 1
        return 0 * p.sum() + (2 / calls[part] if part == falls else 1)

    monkeypatch.setitem(DEPTH_LOSSES, "scripted", scripted)
    options = {"mask_loss": None, "depth_loss": "scripted", "optimizer": "recorder", "schedule": "plateau", "epochs": 9}
    history = run(renamed(config, **options)).history
    assert [row["lr"] / config.lr for row in history] == pytest.approx(expected)
    each = len(recorder.rates) // 9
    assert each > 1 and [rate / config.lr for rate in recorder.rates] == pytest.approx(np.repeat(expected, each))


def test_a_plateau_follows_torch_on_the_validation_loss(config):
    history = run(renamed(config, optimizer="sgd", schedule="plateau", lr=1.0, epochs=12)).history
    expected = lr_scheduler.ReduceLROnPlateau(SGD([torch.zeros(1)], lr=1.0), factor=0.1, patience=2)
    for row in history:
        assert row["lr"] == pytest.approx(expected.get_last_lr()[0])
        expected.step(row["valid_loss"])
    assert len({row["lr"] for row in history}) > 1


def test_gradients_are_scaled_down_to_the_norm_and_never_up(config, recorder, place):
    clipless = renamed(config, optimizer="recorder", schedule="constant", lr=0.1)
    run(clipless)
    free = recorder.slopes.copy()
    norms = [slope.norm().item() for slope in free]
    assert max(norms[1:]) > norms[0] / 2
    recorder.slopes.clear()
    run(renamed(clipless, name="clipped", clip_norm=norms[0] / 2))
    torch.testing.assert_close(recorder.slopes[0], free[0] / 2, rtol=1e-4, atol=1e-7)
    assert max(slope.norm().item() for slope in recorder.slopes) == pytest.approx(norms[0] / 2, rel=1e-4)
    run(renamed(clipless, name="wide", clip_norm=2 * max(norms)))
    assert contents(place / "wide")["best.pt"] == contents(place / "first")["best.pt"]


def test_gradients_of_half_precision_are_clipped_as_they_are_and_not_as_they_are_scaled(config, recorder):
    options = {"optimizer": "recorder", "schedule": "constant", "lr": 0.1, "precision": "float16"}
    run(renamed(config, **options, epochs=1))
    norm = recorder.slopes[0].norm().item()
    recorder.slopes.clear()
    run(renamed(config, name="clipped", clip_norm=norm / 2, **options, epochs=1))
    assert recorder.slopes[0].norm().item() == pytest.approx(norm / 2, rel=0.02)


def test_learned_weights_follow_gradient_descent_on_the_uncertainties(config, place, monkeypatch):
    """Of losses that stay at 2 and 1/2 each s goes its own way towards log L, whatever weight decay does to the network."""
    monkeypatch.setitem(MASK_LOSSES, "two", lambda z, t: 2 + 0 * z.sum())
    monkeypatch.setitem(DEPTH_LOSSES, "half", lambda p, t: 0.5 + 0 * p.sum())
    options = {"mask_loss": "two", "depth_loss": "half", "depth_weight": "learned", "weight_decay": 0.3}
    options |= {"optimizer": "sgd", "schedule": "constant", "split": "image", "batch_size": 20}
    history = run(renamed(config, **options)).history
    costs, s, speed, expected = np.array([2, 0.5]), np.zeros(2), np.zeros(2), []
    for _ in history:
        for _ in range(6):  # batches of 101 samples
            speed = 0.9 * speed + 1 - costs * np.exp(-s)
            s = s - config.lr * speed
        expected.append(np.exp(s[0] - s[1]))
    assert expected[-1] > 2
    assert [row["depth_weight"] for row in history] == pytest.approx(expected, rel=1e-5)
    assert helpers.read_run(place / "first").history == history


def test_learned_weights_lower_the_loss(config):
    history = run(renamed(config, depth_weight="learned")).history
    assert history[-1]["valid_loss"] < history[0]["valid_loss"]
    assert 1 != history[0]["depth_weight"] != history[-1]["depth_weight"]


def test_a_subset_is_all_that_a_run_sees(config, data, monkeypatch):
    ds = ZipDataset(data, size=16).subset(60)
    parts, seen, batch_of = split(ds, "image"), [], ZipDataset.batch

    def watched(ds, indices, *rest, **named):
        seen.extend(ds.name(i) for i in indices)
        return batch_of(ds, indices, *rest, **named)

    monkeypatch.setattr(ZipDataset, "batch", watched)
    finished = run(renamed(config, subset=60, split="image", epochs=1))
    train = [ds.name(i) for i in parts["train"]]
    assert sorted(seen[: len(train)]) == sorted(train)
    assert set(seen) == {ds.name(i) for indices in parts.values() for i in indices}
    assert finished.results.keys() == {part for part, indices in parts.items() if len(indices)} - {"train"}


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


AUGMENTATIONS = {  # what becomes of the two pictures of a sample
    "none": {"same"},
    "mirror": {"same"},
    "compose": {"same", "composed"},
    "colour": {"both changed"},
    "shake": {"same", "one changed", "both changed"},
    "mirror+colour": {"both changed"},
    "mirror+compose+shake": {"same", "one changed", "both changed", "composed"},
}


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_training_sees_samples_augmented_as_asked_and_measuring_as_they_are(config, data, monkeypatch, augment):
    """A picture that reaches the network is found among the originals by the depth that belongs to it. A composed one has none
    of its own; where its depth is not known the prediction stands in its place, to the last digit."""
    seen = {True: [], False: []}

    class Watched(Tiny):
        def forward(self, bg, fg_bg):
            self.inputs = bg, fg_bg
            return super().forward(bg, fg_bg)

    def watch(p, t):
        composed = (p == t).flatten(1).any(1) if p.requires_grad else torch.zeros(len(p))
        seen[p.requires_grad].extend(zip(*made[0].inputs, t, composed, strict=True))
        return helpers.l1(p, t)

    made = []
    monkeypatch.setitem(MODELS, "tiny", lambda: made.append(Watched()) or made[0])
    monkeypatch.setitem(DEPTH_LOSSES, "watch", watch)
    run(renamed(config, augment=augment, depth_loss="watch"), stop_after=1)
    originals = {item["depth"].numpy().tobytes(): item for item in ZipDataset(data, size=16)}
    found = {True: [], False: []}
    for training, samples in seen.items():
        for bg, fg_bg, depth, composed in samples:
            if composed:
                found[training].append((False, "composed"))
                continue
            mirrored = depth.numpy().tobytes() not in originals
            bg, fg_bg, depth = (p.flip(2) if mirrored else p for p in (bg, fg_bg, depth))
            item = originals[depth.contiguous().numpy().tobytes()]
            changed = sum(not torch.equal(one, item[kind]) for kind, one in (("bg", bg), ("fg_bg", fg_bg)))
            found[training].append((mirrored, ("same", "one changed", "both changed")[changed]))
    assert {mirrored for mirrored, _ in found[True]} == ({True, False} if "mirror" in augment else {False})
    assert {what for _, what in found[True]} == AUGMENTATIONS[augment]
    assert set(found[False]) == {(False, "same")}


def test_composed_pictures_are_trained_on_in_full(config, data, monkeypatch):
    """An object of one sample stands before the background of another: no pair of the data set shows the two."""
    shown = []

    class Watched(Tiny):
        def forward(self, bg, fg_bg):
            if self.training:
                shown.extend(zip(bg, fg_bg, strict=True))
            return super().forward(bg, fg_bg)

    monkeypatch.setitem(MODELS, "tiny", Watched)
    run(renamed(config, augment="compose", epochs=1))
    known = {tuple(item[kind].numpy().tobytes() for kind in ("bg", "fg_bg")) for item in ZipDataset(data, size=16)}
    backgrounds = {one for pair in known for one in pair}
    pairs = [tuple(one.contiguous().numpy().tobytes() for one in pair) for pair in shown]
    assert all(bg in backgrounds for bg, _ in pairs)
    assert 0.3 < sum(pair in known for pair in pairs) / len(pairs) < 0.7


# Weights to begin with


def noting(network):
    """The network, as a class that keeps the weights with which training begins: `first`."""

    class Noting(network):
        first = None

        def forward(self, bg, fg_bg):
            if self.training and Noting.first is None:
                Noting.first = {name: values.clone() for name, values in self.state_dict().items()}
            return super().forward(bg, fg_bg)

    return Noting


def test_a_run_begins_with_the_best_weights_of_another(config, place, monkeypatch):
    run(config)
    best = torch.load(place / "first" / "best.pt", weights_only=True)
    for name, start in (("folder", place / "first"), ("file", place / "first" / "best.pt")):
        monkeypatch.setitem(MODELS, "tiny", network := noting(Tiny))
        run(renamed(config, name=name, start=str(start), seed=5), stop_after=1)
        assert network.first.keys() == best.keys()
        assert all(torch.equal(values, best[key]) for key, values in network.first.items())


def test_a_run_begins_with_imagenets_encoder(config, imagenet, monkeypatch):
    begun, plain = noting(ResNet18UNet), noting(ResNet18UNet)
    for network, start in ((begun, "imagenet"), (plain, "")):
        monkeypatch.setitem(MODELS, "resnet18_unet", network)
        options = {"model": "resnet18_unet", "max_train": 16, "max_test": 2, "epochs": 1}
        run(renamed(config, name=f"from {start}".strip(), start=start, **options))
    theirs = imagenet.state_dict()
    for name, values in begun.first.items():
        if name.startswith("layer") and "tracked" not in name:
            assert torch.equal(values, theirs[name])
        # The rest is what the seed gives it.
        assert torch.equal(values, plain.first[name]) == (name.startswith("decoder") or "tracked" in name)
    assert begun.first.keys() == plain.first.keys()


class Wide(Tiny):
    def __init__(self):
        super().__init__()
        self.layers[0], self.layers[1], self.layers[4] = nn.Conv2d(6, 9, 3, padding=1), nn.BatchNorm2d(9), nn.Conv2d(9, 2, 1)


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"model": "tiny", "start": "imagenet"}, ValueError, "start is 'imagenet', but tiny has no .* Take resnet18_unet"),
        (
            {"model": "wide", "start": "other"},
            ValueError,
            r"start is '.*', which holds a Tiny, and model is 'wide'\. Give weights",
        ),
        ({"model": "dual_stream", "start": "other"}, ValueError, "holds a Tiny, and model is 'dual_stream'"),
        ({"model": "tiny", "start": "nothing"}, FileNotFoundError, "nothing: there is no such file"),
        ({"model": "resnet18_unet", "start": "imagenet"}, OSError, "Go online, or put https"),
    ],
)
def test_weights_that_a_network_cannot_begin_with_are_refused_and_leave_no_folder(
    config, place, monkeypatch, offline, options, error, text
):
    monkeypatch.setitem(MODELS, "wide", Wide)
    if options["start"] == "other":
        run(renamed(config, name="other", epochs=1))
    if options["start"] != "imagenet":
        options = options | {"start": str(place / options["start"])}
    with pytest.raises(error, match=text) as caught:
        run(renamed(config, **options))
    assert "\n" not in str(caught.value) and not (place / "first").exists()


def test_a_run_goes_on_without_the_weights_that_it_began_with(config, place):
    run(renamed(config, name="origin", epochs=1))
    begun = renamed(config, start=str(place / "origin"), average=0.5, epochs=2)
    run(begun)
    run(renamed(begun, name="parts"), stop_after=1)
    shutil.rmtree(place / "origin")
    run(renamed(begun, name="parts"))
    assert_same_run(place / "first", place / "parts")


def test_a_run_whose_checkpoints_are_all_damaged_begins_anew_with_the_same_weights(config, place):
    run(renamed(config, name="origin", epochs=1))
    begun = renamed(config, start=str(place / "origin"), average=0.5, epochs=2)
    run(begun)
    run(renamed(begun, name="parts"), stop_after=1)
    (place / "parts" / "checkpoint.pt").write_bytes(b"damaged")
    run(renamed(begun, name="parts"))
    assert_same_run(place / "first", place / "parts")


# Colours


@pytest.fixture
def pairs():
    """Forty times the same sample, of middling colours: a background and the same with an object."""
    bg = 0.3 + 0.4 * torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 8, 8)
    mask[:, 2:6, 3:5] = 1
    sample = {"bg": bg, "fg_bg": torch.where(mask > 0, 1 - bg, bg), "mask": mask, "depth": bg.mean(0, keepdim=True)}
    return {kind: picture.repeat(40, 1, 1, 1) for kind, picture in sample.items()}


def test_jittering_colours_changes_both_pictures_of_a_sample_alike_and_nothing_else(pairs):
    before = {kind: pictures.clone() for kind, pictures in pairs.items()}
    after = jitter_colours(pairs)
    assert after.keys() == pairs.keys()
    assert all(torch.equal(pairs[kind], before[kind]) for kind in before)
    assert all(torch.equal(after[kind], before[kind]) for kind in ("mask", "depth"))
    beside = (before["mask"] == 0).expand(-1, 3, -1, -1)
    assert torch.equal(after["bg"][beside], after["fg_bg"][beside])
    assert not torch.equal(after["bg"][~beside], after["fg_bg"][~beside])
    for kind in ("bg", "fg_bg"):
        assert after[kind].shape == before[kind].shape and after[kind].min() >= 0 and after[kind].max() <= 1
    assert len(after["fg_bg"].unique(dim=0)) == 40  # each its own draw
    assert not any(torch.equal(one, two) for one, two in zip(after["bg"], before["bg"], strict=True))


def test_jittering_colours_of_pictures_that_are_equal_leaves_them_equal(pairs):
    pairs["bg"] = pairs["fg_bg"] = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(1)).round()  # 0 and 1 too
    after = jitter_colours(pairs)
    assert torch.equal(after["bg"], after["fg_bg"])
    assert after["bg"].min() >= 0 and after["bg"].max() <= 1


def test_jittering_colours_is_the_same_from_the_same_seed(pairs):
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(jitter_colours(pairs)["fg_bg"])
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_jittering_colours_moves_brightness_contrast_saturation_and_hue():
    """Read off a picture of two greys and a red pixel, in which each of the four leaves a trace of its own: brightness in the
    mean, contrast in the difference of the greys, saturation in how much farther the red's channels spread, hue in the hue."""
    picture = torch.full((3, 8, 8), 0.4)
    picture[:, 4:] = 0.5
    picture[:, 0, 0] = torch.tensor([0.6, 0.4, 0.35])
    batch = {kind: picture.repeat(40, 1, 1, 1) for kind in ("bg", "fg_bg")} | {"mask": torch.zeros(40, 1, 8, 8)}
    drawn = jitter_colours(batch)["fg_bg"]
    brightness = drawn[:, :, :, 1:].mean((1, 2, 3)) / 0.45
    contrast = (drawn[:, 0, 7, 7] - drawn[:, 0, 0, 7]) / 0.1 / brightness
    red = drawn[:, :, 0, 0]
    saturation = (red.amax(1) - red.amin(1)) / 0.25 / brightness / contrast
    hue = torch.tensor([colorsys.rgb_to_hsv(*pixel)[0] for pixel in red.tolist()])
    hue = (hue - colorsys.rgb_to_hsv(0.6, 0.4, 0.35)[0] + 0.5) % 1 - 0.5
    for factor in (brightness, contrast, saturation):
        assert 0.5 < factor.min() < 0.92 and 1.08 < factor.max() < 1.5
    assert -0.2 < hue.min() < -0.02 and 0.02 < hue.max() < 0.2


# A Config as a file


@pytest.mark.parametrize("options", [{}, {"mask_loss": None, "lr": 1 / 3, "subset": 7}, {"depth_weight": "learned", "seed": 5}])
def test_a_config_is_read_as_it_was_saved(place, options):
    config = Config("losses/dice", data="ä b.zip", **options)
    config.save(place / "mine.json")
    assert Config.load(place / "mine.json") == Config.load(str(place / "mine.json")) == config
    assert json.loads((place / "mine.json").read_text())["name"] == "losses/dice"
    assert [path.name for path in place.iterdir()] == ["mine.json"]


def test_the_config_of_a_run_is_read_from_its_folder(config, place):
    run(config, stop_after=1)
    assert "fingerprint" in json.loads((place / "first" / "config.json").read_text())
    assert Config.load(place / "first" / "config.json") == config


@pytest.mark.parametrize(
    "text, about",
    [
        ('{"name": "a", "learning_rate": 1}', "learning_rate"),
        ('{"name": "a", "model": "unet"}', "Unknown model 'unet'. Known: resunet"),
        ('{"name": "a", "lr": "fast"}', ""),
        ('{"size": 64}', "name"),
        ('{"name": "a', ""),
        ("[1, 2]", ""),
        ('"a"', ""),
        ("", ""),
        ("\udcff", ""),  # not UTF-8
    ],
)
def test_a_file_that_holds_no_config_is_named(place, text, about):
    (place / "mine.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"mine\.json.*{about}") as caught:
        Config.load(place / "mine.json")
    assert str(place) in str(caught.value) and "\n" not in str(caught.value)


def test_a_config_that_is_not_there(place):
    with pytest.raises(FileNotFoundError, match="mine"):
        Config.load(place / "mine.json")
