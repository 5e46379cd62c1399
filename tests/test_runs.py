"""Runs: what they leave, what they read, and what they refuse. With a network of a few weights."""

import dataclasses
import functools
import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn
from torch.optim import SGD, lr_scheduler

import helpers
from helpers import DEPTH_LOSSES, MASK_LOSSES, MODELS, OPTIMIZERS, Config, ZipDataset, read_run, run, run_all, split

DEPTH_METRICS = ("rmse", "mae", "ssim", "abs_rel", "log10", "delta1", "delta2", "delta3")
METRICS = {"mask": ("iou", "dice", "pixel_accuracy", "mask_area"), "depth": DEPTH_METRICS}


class Tiny(nn.Module):
    """A network of a few weights, with what makes going on difficult: running statistics and dropout."""

    def __init__(self):
        super().__init__()
        norm, dropout = nn.BatchNorm2d(8), nn.Dropout2d(0.2)
        self.layers = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), norm, nn.ReLU(), dropout, nn.Conv2d(8, 2, 1))

    def forward(self, bg, fg_bg):
        mask_logits, depth = self.layers(torch.cat([bg, fg_bg], 1)).chunk(2, 1)
        return mask_logits, depth.sigmoid()


class Turned(Tiny):
    """Of the same shapes, but where the one sees near, the other sees far."""

    def forward(self, bg, fg_bg):
        mask_logits, depth = super().forward(bg, fg_bg)
        return -mask_logits, 1 - depth


@pytest.fixture(scope="module")
def data(write_zip, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.zip"
    write_zip(path, samples=[(b, f, 1) for b in range(1, 11) for f in range(1, 11)], size=16)
    return path


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A workspace for each test, and the small networks among the known."""
    monkeypatch.setenv("WORKSPACE", str(tmp_path / "work"))
    monkeypatch.setitem(MODELS, "tiny", Tiny)
    monkeypatch.setitem(MODELS, "turned", Turned)
    return tmp_path / "work"


@pytest.fixture
def config(data):
    return Config("first", data=data, size=16, model="tiny", epochs=2, lr=0.02, precision="float32")


@pytest.fixture
def recorder(monkeypatch):
    """An optimizer that notes the rate of every step, its gradients, and the weights after it."""

    class Recorder(SGD):
        rates, slopes, weights = [], [], []

        def step(self, closure=None):
            network = self.param_groups[0]["params"]
            self.rates.append(self.param_groups[0]["lr"])
            self.slopes.append(torch.cat([p.grad.flatten() for p in network]))
            super().step(closure)
            self.weights.append([p.detach().clone() for p in network])

    monkeypatch.setitem(OPTIMIZERS, "recorder", functools.partial(Recorder, momentum=0.9))
    return Recorder


@pytest.fixture
def asked(monkeypatch):
    """Lists of the samples that are asked for, batch by batch."""
    lists, batch = [], ZipDataset.batch
    monkeypatch.setattr(ZipDataset, "batch", lambda ds, some: lists.append(list(some)) or batch(ds, some))
    return lists


def changed(config, **changes):
    return dataclasses.replace(config, **changes)


def contents(folder, without=("timing.csv",)):
    """Every file's bytes by its path in the folder, but for what holds seconds."""
    files = [path for path in Path(folder).rglob("*") if path.is_file() and path.name not in without]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def steps_of(config):
    return -(-len(helpers.parts_of(config, ZipDataset(config.data, config.size))["train"]) // config.batch_size)


def by_hand(model, ds, indices):
    """IoU and RMSE, means over the pictures, by numpy alone."""
    ious, rmses = [], []
    for item in (ds[int(i)] for i in indices):
        with torch.no_grad():
            logits, depth = (output[0, 0].double().numpy() for output in model(item["bg"][None], item["fg_bg"][None]))
        mask, truth = logits > 0, item["mask"][0].numpy() == 1
        ious.append((mask & truth).sum() / (mask | truth).sum() if (mask | truth).any() else 1)
        rmses.append(np.sqrt(np.square(depth - item["depth"][0].double().numpy()).mean()))
    return pytest.approx({"iou": np.mean(ious), "rmse": np.mean(rmses)}, abs=1e-5)


# What a Config takes


@pytest.mark.parametrize(
    "options, text",
    [
        ({"model": "unet"}, "Unknown model 'unet'. Known: resunet, "),
        ({"optimizer": "adm"}, "Unknown optimizer 'adm'. Known: sgd, rmsprop, adam, adamw"),
        ({"schedule": "cosine"}, "Unknown schedule 'cosine'. Known: constant, step, plateau, onecycle"),
        ({"split": "random"}, "Unknown split 'random'. Known: unseen, image"),
        ({"defects": "ignore"}, "Unknown defects 'ignore'. Known: stop, leave_out"),
        ({"depth_near": "left"}, "Unknown depth_near 'left'. Known: dark, bright"),
        ({"precision": "int8"}, "Unknown precision 'int8'. Known: auto, float32"),
        ({"augment": "mirror+rotate"}, "Unknown augment 'rotate'. Known: none, mirror, colour, shake"),
        ({"augment": ""}, "Unknown augment"),
        ({"mask_loss": "berhu"}, "Unknown mask loss 'berhu'. Known: None, bce"),
        ({"depth_loss": "bce"}, "Unknown depth loss 'bce'. Known: None, l1"),
        ({"mask_loss": None, "depth_loss": None}, "mask_loss and depth_loss are both None"),
        ({"depth_weight": "auto"}, "depth_weight is 'auto'.*'learned'"),
        ({"depth_weight": 0}, "depth_weight is 0"),
        ({"depth_weight": "learned", "mask_loss": None}, "depth_weight is 'learned'"),
        ({"subset": -1}, "subset is -1"),
        ({"max_train": -1}, "max_train is -1"),
        ({"max_test": -1}, "max_test is -1"),
        ({"min_steps": -1}, "min_steps is -1"),
        ({"clip_norm": -0.1}, "clip_norm is -0.1"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"average": -0.1}, "average is -0.1"),
        ({"average": 1.0}, "average is 1.0"),
        ({"checkpoint_minutes": -1}, "checkpoint_minutes is -1"),
        ({"epochs": 0}, "epochs is 0"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": "fast"}, "lr is 'fast'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"size": 10}, "size is 10"),
        *(({"name": name}, "name is ") for name in ("", "..", "../a", "/a", "a/", "a//b", "a\\b", ".", "a:b")),
    ],
)
def test_a_config_names_the_field_that_it_does_not_take(options, text):
    with pytest.raises(ValueError, match=text):
        Config(**{"name": "a"} | options)


def test_a_config_takes_paths_and_numbers_of_numpy(tmp_path):
    values = {"lr": np.float32(0.5), "epochs": np.int64(3), "average": np.float64(0.5), "data": Path("some.zip")}
    made = Config("a", **values)
    assert made == Config("a", lr=0.5, epochs=3, average=0.5, data="some.zip")
    made.save(tmp_path / "mine.json")
    assert Config.load(tmp_path / "mine.json") == made and type(made.lr) is float and type(made.epochs) is int


@pytest.mark.parametrize("options", [{}, {"mask_loss": None, "lr": 1 / 3}, {"depth_weight": "learned", "seed": 5}])
def test_a_config_is_read_as_it_was_saved(tmp_path, options):
    config = Config("losses/dice", data="ä b.zip", **options)
    config.save(tmp_path / "mine.json")
    assert Config.load(tmp_path / "mine.json") == Config.load(str(tmp_path / "mine.json")) == config
    values = json.loads((tmp_path / "mine.json").read_text()) | {"cache": "disk", "fingerprint": "0"}
    (tmp_path / "old.json").write_text(json.dumps(values))  # with a setting that there was once
    assert Config.load(tmp_path / "old.json") == config


@pytest.mark.parametrize(
    "text, about",
    [('{"name": "a", "rate": 1}', "rate"), ('{"name": "a", "model": "unet"}', "Unknown model 'unet'"),
     ('{"size": 64}', "name"), ('{"name": "a', ""), ("[1, 2]", ""), ('"a"', ""), ("", ""), ("\udcff", "")],
)  # fmt: skip
def test_a_file_that_holds_no_config_is_named(tmp_path, text, about):
    (tmp_path / "mine.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"mine\.json.*{about}") as caught:
        Config.load(tmp_path / "mine.json")
    assert "\n" not in str(caught.value)


# What a run leaves


def test_a_run_leaves_the_promised_files_and_rows(config, data, place, capsys):
    finished = run(changed(config, name="a/b"))
    expected = {"config.json", "metrics.csv", "timing.csv", "checkpoint.pt", "best.pt", "results.json"}
    expected |= {f"images/epoch_{epoch:03}/sheet.png" for epoch in (1, 2)}
    assert finished.folder == place / "a" / "b" and contents(finished.folder, without=()).keys() == expected
    columns = {f"valid_{name}" for name in ("loss", *METRICS["mask"], *METRICS["depth"])}
    table = pd.read_csv(finished.folder / "metrics.csv", float_precision="round_trip")
    assert {*table} == {"epoch", "lr", "train_loss"} | columns and table["epoch"].tolist() == [1, 2]
    assert finished.history == table.to_dict("records")
    assert len(finished.seconds) == 2 and min(finished.seconds) > 0
    assert finished.config == Config.load(finished.folder / "config.json") == changed(config, name="a/b")
    assert all(f"epoch {epoch}  train_loss " in capsys.readouterr().out or epoch == 2 for epoch in (1, 2))


def test_best_weights_are_those_of_the_least_validation_loss_and_give_table_and_results(config, data, place):
    jumpy, weights, ds = changed(config, epochs=5, lr=0.5, schedule="constant"), [], ZipDataset(data, 16)
    for epoch in range(1, 6):
        history = run(jumpy, stop_after=epoch).history
        weights.append((place / "first" / "best.pt").read_bytes())
        assert len(history) == epoch
    losses = [row["valid_loss"] for row in history]
    best = int(np.argmin(losses))
    assert [w == weights[-1] for w in weights] == [i >= best for i in range(5)]
    finished, parts, net = read_run(place / "first"), split(ds), Tiny()
    net.load_state_dict(torch.load(place / "first" / "best.pt", weights_only=True))
    assert {f: history[best][f"valid_{f}"] for f in ("iou", "rmse")} == by_hand(net.eval(), ds, parts["valid"])
    assert finished.results.keys() == parts.keys() - {"train"}
    assert finished.results == json.loads((place / "first" / "results.json").read_text())
    for part, values in finished.results.items():
        assert {name: values[name] for name in ("iou", "rmse")} == by_hand(finished.model(), ds, parts[part])
    # In the table the loss is the mean over pictures: of cross entropy per pixel it is that of one large batch.
    batch = helpers.to_float(ds.batch(parts["valid"]))
    loss = run(changed(jumpy, name="plain", mask_loss="bce", depth_loss="l1", depth_weight=3.0, epochs=1)).history[0]
    with torch.no_grad():
        logits, depth = read_run(place / "plain").model()(batch["bg"], batch["fg_bg"])
    expected = nn.BCEWithLogitsLoss()(logits, batch["mask"]) + 3 * (depth - batch["depth"]).abs().mean()
    assert loss["valid_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_run_gives_back_its_own_network_though_another_has_the_same_shapes(config):
    assert type(run(config).model()) is Tiny
    other = run(changed(config, name="other", model="turned"))
    assert type(other.model()) is Turned and other.model().tasks == ("mask", "depth")
    started = run(changed(config, name="started", start=other.folder.parent / "first", lr=1e-12, epochs=1))
    before, after = (torch.load(r.folder / "best.pt", weights_only=True) for r in (run(config), started))
    torch.testing.assert_close(after["layers.0.weight"], before["layers.0.weight"])
    with pytest.raises(ValueError, match="a tiny, and model is 'turned'"):
        run(changed(config, name="wrong", model="turned", start=place_of(started)))


def place_of(finished):
    return finished.folder / "best.pt"


@pytest.mark.parametrize("task, other", [("mask", "depth"), ("depth", "mask")])
def test_one_task_alone_leaves_no_file_metric_or_picture_of_the_other(config, task, other):
    finished = run(changed(config, **{f"{other}_loss": None}))
    assert finished.model().tasks == (task,)
    names = {name.removeprefix("valid_") for name in finished.history[0]} - {"epoch", "lr", "train_loss", "loss"}
    assert names == set(finished.results["valid"]) == set(METRICS[task])
    sheet = Image.open(finished.folder / "images" / "epoch_001" / "sheet.png")
    assert sheet.size == (4 * 16, 8 * 16)  # bg, fg_bg, truth, prediction; four samples of each of two parts
    torch.manual_seed(config.seed)
    first, last = Tiny().layers[4].weight, finished.model().layers[4].weight
    assert not torch.allclose(first[int(task == "depth")], last[int(task == "depth")])


def test_a_zip_without_a_kind_names_the_loss_to_leave_out(config, write_zip, tmp_path):
    write_zip(tmp_path / "part.zip", samples=[(b, f, 1) for b in range(12) for f in range(12)], size=16, skip=("mask",))
    with pytest.raises(ValueError, match=r"part\.zip has no mask pictures. Set mask_loss=None"):
        run(changed(config, data=tmp_path / "part.zip"))
    assert run(changed(config, data=tmp_path / "part.zip", mask_loss=None)).results


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(config, place):
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        torch.manual_seed(hash(name) % 1000)  # of the caller: means nothing
        run(changed(config, name=name, seed=seed, epochs=1, augment="mirror+colour"))
    one, two, other = (contents(place / name) for name in ("one", "two", "other"))
    assert [name for name in one if one[name] != two[name]] == ["config.json"]
    assert one["best.pt"] != other["best.pt"]


def test_a_run_leaves_the_random_numbers_of_its_caller_alone(config):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(config)
    assert torch.equal(torch.rand(3), expected)


def test_lists_of_runs_are_trained_in_order_and_keep_a_sheet_an_epoch(config, place, monkeypatch, capsys):
    one, other = changed(config, name="one"), changed(config, name="other", seed=1)
    trained, losses = [], DEPTH_LOSSES["l1"]
    runs = run_all({"both": [one, other], "one": [one]})
    assert "epoch 1  loss" not in capsys.readouterr().out
    assert [[r.config.name for r in some] for some in runs.values()] == [["one", "other"], ["one"]]
    assert runs["one"][0].results == runs["both"][0].results == run(changed(config, name="alone")).results
    assert runs["both"][1].results != runs["one"][0].results and trained == [] and losses
    expected = {"config.json", "metrics.csv", "timing.csv", "best.pt", "results.json"}
    expected |= {f"images/epoch_{epoch:03}/sheet.png" for epoch in (1, 2)}
    for name in ("one", "other"):
        assert contents(place / name, without=()).keys() == expected
    assert (place / "alone" / "checkpoint.pt").exists()


# What is read, and what is refused


def test_a_finished_run_is_read_and_not_trained(config, place, recorder, capsys):
    mine = changed(config, optimizer="recorder")
    finished, steps = run(mine), len(recorder.rates)
    before = {path: path.stat().st_mtime_ns for path in (place / "first").rglob("*")}
    again = run(mine)
    assert (again.history, again.results, again.config) == (finished.history, finished.results, mine)
    assert {path: path.stat().st_mtime_ns for path in (place / "first").rglob("*")} == before
    assert "finished before" in capsys.readouterr().out and len(recorder.rates) == steps == 2 * steps_of(mine)


@pytest.mark.parametrize("field, value", [("lr", 0.5), ("epochs", 9), ("mask_loss", None)])
@pytest.mark.parametrize("stop_after", [None, 1])
def test_another_config_under_the_same_name_is_refused(config, place, field, value, stop_after):
    run(config, stop_after=stop_after)
    before = contents(place / "first", without=())
    text = f"'first' exists, but {field} was {getattr(config, field)!r} and is {value!r}. Take another name"
    with pytest.raises(ValueError, match=text):
        run(changed(config, **{field: value}))
    assert contents(place / "first", without=()) == before
    assert run(changed(config, checkpoint_minutes=5)).results  # decides nothing about the result


def test_other_data_are_refused_and_the_same_in_another_place_are_not(config, data, write_zip, tmp_path, place):
    run(config, stop_after=1)
    write_zip(tmp_path / "other.zip", samples=[(b, f, 1) for b in range(9) for f in range(9)], size=16)
    with pytest.raises(ValueError, match=r"fingerprint was '[0-9a-f]{16}' and is"):
        run(changed(config, data=tmp_path / "other.zip"))
    shutil.copy(data, tmp_path / "copy.zip")
    assert len(run(changed(config, data=tmp_path / "copy.zip")).history) == 2


SOURCES = {
    "function": ("depth_loss", "def mine(d, g):\n    return (d - g).abs().mean() * {}"),
    "lambda": ("depth_loss", "mine = lambda d, g: (d - g).abs().mean() * {}"),
    "partial of a function": ("depth_loss", "def f(d, g, k):\n    return (d - g).abs().mean() * k\nmine = partial(f, k={})"),
    "partial of ours": ("mask_loss", "mine = partial(helpers.MASK_LOSSES['tversky'], a={})"),
    "callable": ("mask_loss", "class Mine:\n    def __call__(self, z, t):\n        return (z * {}).mean()\nmine = Mine()"),
    "class": ("model", "class mine(Tiny):\n    def forward(self, *p):\n        return super().forward(*p)  # {}"),
    "partial of a class": ("model", "class N(Tiny):\n    def __init__(self, n):\n        super().__init__()\n"
                           "        self.n = n\nmine = partial(N, {})"),
    "factory": ("model", "def mine():\n    return Tiny()  # {}"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SOURCES)
def test_edited_code_of_ones_own_is_another_run_and_the_same_code_is_not(config, place, tmp_path, monkeypatch, kind):
    field, source = SOURCES[kind]
    known = {"model": MODELS, "mask_loss": MASK_LOSSES, "depth_loss": DEPTH_LOSSES}[field]
    head = "from functools import partial\nimport helpers\nfrom test_runs import Tiny\n"

    def define(number):
        """As one who edits a file and starts Python anew."""
        file = tmp_path / str(number) / "own_code.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(head + source.format(number) + "\n")
        spec = importlib.util.spec_from_file_location("own_code", file)
        monkeypatch.setitem(sys.modules, "own_code", importlib.util.module_from_spec(spec))
        spec.loader.exec_module(sys.modules["own_code"])
        monkeypatch.setitem(known, "mine", sys.modules["own_code"].mine)

    define(2)
    mine = changed(config, **{field: "mine"})
    assert len(run(mine, stop_after=1).history) == 1
    define(3)
    before = contents(place)
    with pytest.raises(ValueError, match=f"'first' exists, but the code .* edited.*{field}") as caught:
        run(mine)
    assert "\n" not in str(caught.value) and contents(place) == before
    define(2)
    assert len(run(mine).history) == 2


@pytest.mark.parametrize("given, text", [
    (lambda bg, fg_bg: bg[:, :1], "must give a pair"),
    (lambda bg, fg_bg: (bg[:, :1], bg[:, :1], bg[:, :1]), "must give a pair"),
    (lambda bg, fg_bg: (bg[:, :1], bg[:, 0]), "must give a pair"),
    (lambda bg, fg_bg: (bg, fg_bg), "must give a pair"),
    (lambda bg, fg_bg: {"mask": bg[:, :1], "depth": bg[:, :1]}, "must give a pair"),
    (lambda bg, fg_bg: (bg[:, :1, ::2, ::2], bg[:, :1, ::2, ::2]), "must give a pair"),
])  # fmt: skip
def test_a_network_with_other_outputs_is_refused_in_a_sentence_and_can_be_mended(config, monkeypatch, given, text):
    class Wrong(Tiny):
        def forward(self, bg, fg_bg):
            return given(bg, fg_bg)

    monkeypatch.setitem(MODELS, "mine", Wrong)
    with pytest.raises(ValueError, match=f"network 'mine' {text}") as caught:
        run(changed(config, model="mine"))
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(MODELS, "mine", Tiny)
    assert run(changed(config, model="mine")).results


@pytest.mark.parametrize("task, known", [("mask", MASK_LOSSES), ("depth", DEPTH_LOSSES)])
def test_a_loss_that_gives_no_scalar_is_refused_in_a_sentence(config, monkeypatch, task, known):
    monkeypatch.setitem(known, "mine", lambda p, t: (p - t).abs())
    with pytest.raises(ValueError, match=f"The {task} loss must give a scalar") as caught:
        run(changed(config, **{f"{task}_loss": "mine"}))
    assert "\n" not in str(caught.value)


def test_a_loss_of_ones_own_added_in_one_line_trains(config, monkeypatch):
    monkeypatch.setitem(DEPTH_LOSSES, "fourth", lambda d, g: (d - g).pow(4).mean())
    history = run(changed(config, depth_loss="fourth", epochs=4)).history
    assert history[-1]["train_loss"] < history[0]["train_loss"]


def test_a_loss_that_is_no_number_stops_the_run_names_samples_and_leaves_the_checkpoint(config, place, monkeypatch):
    bad, plain = [], lambda d, g: (d - g).abs().mean() * (float("nan") if bad and d.requires_grad else 1)
    monkeypatch.setitem(DEPTH_LOSSES, "mine", plain)
    mine, ds = changed(config, depth_loss="mine"), ZipDataset(config.data, 16)
    run(mine, stop_after=1)
    before = contents(place / "first", without=())
    bad.append(True)
    with pytest.raises(ValueError, match="first: in step .* the loss is not finite .*depth nan") as caught:
        run(mine)
    named = [ds.name(i) for i in split(ds)["train"] if ds.name(i) in str(caught.value)]
    assert 1 <= len(named) <= 8 and contents(place / "first", without=()) == before
    bad.clear()
    run(mine)
    run(changed(mine, name="undisturbed"))
    assert contents(place / "first")["best.pt"] == contents(place / "undisturbed")["best.pt"]


def test_a_validation_loss_that_is_no_number_stops_the_run_too(config, monkeypatch):
    monkeypatch.setitem(DEPTH_LOSSES, "mine", lambda d, g: d.mean() / float(d.requires_grad or "nan"))
    with pytest.raises(ValueError, match="the loss is not finite .*the validation samples"):
        run(changed(config, depth_loss="mine"))


def test_what_does_not_fit_is_refused_and_the_name_stays_free(config, write_zip, tmp_path):
    write_zip(tmp_path / "few.zip", samples=[(1, 1, 1), (2, 1, 1)], size=16)
    with pytest.raises(ValueError, match=r"few\.zip: of its 2 samples, split 'unseen' leaves none for .*split='image'"):
        run(changed(config, data=tmp_path / "few.zip"))
    with pytest.raises(ValueError, match=r"18 x 18 pixels do not divide by 16\. Use 16 x 16"):
        run(changed(config, size=18, model="twin_unet"))
    assert run(config).results


def test_a_second_program_at_the_same_run_is_refused(config, place, tmp_path, monkeypatch):
    config = changed(config, model="resunet_lite", depth_loss="l1", epochs=1, max_train=16, max_test=4)
    config.save(tmp_path / "config.json")
    code = "import helpers, sys\nhelpers.run(helpers.Config.load(sys.argv[1]))"
    ended = []

    def meanwhile(*_):
        command = [sys.executable, "-c", code, tmp_path / "config.json"]
        ended.append(subprocess.run(command, cwd=helpers.ROOT, capture_output=True, text=True))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ZipDataset, "batch", meanwhile)
        run(config)
    assert ended[0].returncode and f"Another program is at the run {place / 'first'}" in ended[0].stderr
    assert run(config).results  # the lock goes with its program


def test_reading_what_is_no_run_or_damaged_says_so(config, place, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing holds no run"):
        read_run(place / "nothing")
    folder = run(config).folder
    for name, text in (("results.json", "{"), ("metrics.csv", ""), ("timing.csv", "a,b\n1,x\n"), ("config.json", "{")):
        shutil.copytree(folder, tmp_path / name)
        (tmp_path / name / name).write_text(text)
        with pytest.raises(ValueError, match="file of this run is damaged .* Delete the folder") as caught:
            read_run(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
    run(config := changed(config, name="half"), stop_after=1)
    os.truncate(place / "half" / "checkpoint.pt", 3000)
    with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged") as caught:
        run(config)
    assert "\n" not in str(caught.value)


def test_a_file_of_weights_that_would_run_code_is_refused_and_the_code_not_run(tmp_path):
    class Harm:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'harm'}",)

    torch.save({"weights": Harm()}, tmp_path / "new.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Harm()))
    for name in ("new.pt", "old.pt"):
        with pytest.raises(ValueError, match=f"{name} is damaged, or no file of weights") as caught:
            helpers.load_model(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "harm").exists()


# Choices


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("schedule", helpers.SCHEDULES)
def test_every_optimizer_lowers_the_loss_with_every_schedule(config, optimizer, schedule):
    lr = 0.005 if optimizer == "rmsprop" else 0.02
    history = run(changed(config, optimizer=optimizer, schedule=schedule, lr=lr, epochs=3)).history
    assert all(history[-1][name] < history[0][name] for name in ("train_loss", "valid_loss"))


@pytest.mark.parametrize("schedule", helpers.SCHEDULES)
def test_rates_are_those_of_torchs_own_schedule(config, recorder, schedule):
    history = run(changed(config, optimizer="recorder", schedule=schedule, lr=1.0, epochs=7)).history
    steps, rates, optimizer = len(recorder.rates), [], SGD([torch.zeros(1)], 1.0, momentum=0.9)
    own = {"constant": lambda: lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
           "step": lambda: lr_scheduler.MultiStepLR(optimizer, [-(-steps // 3), 2 * -(-steps // 3)]),
           "onecycle": lambda: lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=steps + 1),
           "plateau": lambda: lr_scheduler.ReduceLROnPlateau(optimizer, patience=2)}[schedule]()  # fmt: skip
    for step in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if schedule != "plateau":
            own.step()
        elif (step + 1) % (steps // 7) == 0:
            own.step(history[step * 7 // steps]["valid_loss"])
    assert recorder.rates == pytest.approx(rates) and [row["lr"] for row in history] == rates[:: steps // 7]
    assert schedule in ("constant", "plateau") or len(set(rates)) > 1


def test_gradients_are_scaled_down_to_the_norm_and_never_up(config, recorder, place):
    free = changed(config, optimizer="recorder", schedule="constant", lr=0.1)
    run(free)
    norms = [slope.norm().item() for slope in recorder.slopes]
    run(changed(free, name="clipped", clip_norm=norms[0] / 2))
    torch.testing.assert_close(recorder.slopes[len(norms)], recorder.slopes[0] / 2, rtol=1e-4, atol=1e-7)
    assert max(slope.norm() for slope in recorder.slopes[len(norms) :]) < norms[0] / 2 * 1.0001
    run(changed(free, name="wide", clip_norm=2 * max(norms)))
    assert contents(place / "wide")["best.pt"] == contents(place / "first")["best.pt"]


@pytest.mark.parametrize("decay", [0.3, 0.9])
def test_averaged_weights_are_an_exponential_mean_that_warms_up(config, recorder, decay):
    finished = run(changed(config, optimizer="recorder", lr=0.1, average=decay, epochs=1))
    average = [p.double() for p in recorder.weights[0]]
    for n, weights in enumerate(recorder.weights[1:], 1):
        kept = min(decay, (n + 1) / (n + 10))
        average = [kept * a + (1 - kept) * w.double() for a, w in zip(average, weights, strict=True)]
    for found, last, a in zip(finished.model().parameters(), recorder.weights[-1], average, strict=True):
        torch.testing.assert_close(found.double(), a, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(found, last)


def test_learned_weights_follow_gradient_descent_on_the_uncertainties(config, monkeypatch):
    """Of losses that stay at 2 and 1/2 each s goes its own way, whatever weight decay does to the network."""
    monkeypatch.setitem(MASK_LOSSES, "two", lambda z, t: 2 + 0 * z.sum())
    monkeypatch.setitem(DEPTH_LOSSES, "half", lambda d, g: 0.5 + 0 * d.sum())
    mine = changed(config, mask_loss="two", depth_loss="half", depth_weight="learned", weight_decay=0.3, epochs=3)
    finished = run(changed(mine, optimizer="sgd", schedule="constant"))
    costs, s, speed, expected = np.array([2, 0.5]), np.zeros(2), np.zeros(2), []
    for _ in range(3 * steps_of(mine)):
        speed = 0.9 * speed + 1 - costs * np.exp(-s)
        s = s - mine.lr * speed
        expected.append(np.exp(s[0] - s[1]))
    weights = [row["depth_weight"] for row in read_run(finished.folder).history]
    assert weights == pytest.approx(expected[steps_of(mine) - 1 :: steps_of(mine)], rel=1e-5) and weights[-1] > 1.1
    assert [row["valid_loss"] for row in finished.history] == [2.5] * 3  # epochs are compared by weights that stay


@pytest.mark.parametrize("min_steps, epochs", [(0, 2), (7, 2), (8, 2), (9, 3), (21, 6)])
def test_small_data_are_seen_until_so_many_steps_are_made(config, recorder, min_steps, epochs):
    mine = changed(config, optimizer="recorder", max_train=32, batch_size=8, min_steps=min_steps)
    assert len(run(mine, stop_after=1).history) == 1 and len(recorder.rates) == 4
    assert len(run(mine).history) == epochs and len(recorder.rates) == 4 * epochs


def test_a_subset_and_at_most_so_many_samples_are_all_that_a_run_sees(config, data, asked):
    ds = ZipDataset(data, 16)
    whole, cut = split(ds, "image"), helpers.parts_of(changed(config, split="image", subset=40), ds)
    assert sum(map(len, cut.values())) == 40 and all(set(cut[part]) <= set(whole[part]) for part in whole)
    mine = changed(config, split="image", subset=40, max_train=11, max_test=3)
    parts = helpers.parts_of(mine, ds)
    assert {part: len(some) for part, some in parts.items()} == {"train": 11, "valid": 3, "test": 3}
    assert all(set(parts[part]) <= set(cut[part]) for part in parts)
    run(mine)
    assert set().union(*asked) == set(np.concatenate(list(parts.values())))


@pytest.mark.parametrize("count, sizes", [(17, [9, 8]), (16, [16]), (33, [11, 11, 11])])
def test_every_sample_is_seen_once_an_epoch_in_another_order_and_no_batch_has_one(config, asked, count, sizes):
    orders = []
    for epoch in (1, 2):
        run(changed(config, max_train=count), stop_after=epoch)
        batches = asked[: len(sizes)]  # training comes first
        assert [len(batch) for batch in batches] == sizes
        orders.append([i for batch in batches for i in batch])
        asked.clear()
    assert len(set(orders[0])) == count and sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]


@pytest.mark.parametrize("precision", helpers.PRECISIONS)
def test_every_precision_gives_about_the_same(config, precision):
    exact, found = (run(changed(config, name=name, precision=name)).history[0] for name in ("float32", precision))
    assert found["valid_loss"] == pytest.approx(exact["valid_loss"], rel=0.05)
