"""Runs: what they leave, what they read, and what they refuse. With a network of a few weights."""

import csv
import dataclasses
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.optim import SGD, lr_scheduler

import helpers
from helpers import DEPTH_LOSSES, MASK_LOSSES, MODELS, Config, ZipDataset, parts_of, read_run, run, split

METRICS = {"mask": {"iou", "dice", "pixel_accuracy", "mask_area"}}
METRICS["depth"] = {"rmse", "mae", "ssim", "abs_rel", "log10", "delta1", "delta2", "delta3"}
KNOWN = {"model": MODELS, "mask_loss": MASK_LOSSES, "depth_loss": DEPTH_LOSSES}


class Tiny(nn.Module):
    """A network of a few weights, with what makes going on difficult: running statistics and dropout."""

    def __init__(self):
        super().__init__()
        first, last = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 2, 1)
        self.layers = nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.2), last)

    def forward(self, bg, fg_bg):
        mask_logits, depth = self.layers(torch.cat([bg, fg_bg], 1)).chunk(2, 1)
        return mask_logits, depth.sigmoid()


class Turned(Tiny):
    """Of the same shapes, but where the one sees near, the other sees far."""

    def __init__(self):
        super().__init__()
        self.register_buffer("far", torch.ones(()), persistent=False)  # is in no file of weights

    def forward(self, bg, fg_bg):
        mask_logits, depth = super().forward(bg, fg_bg)
        return -mask_logits, self.far - depth


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

    monkeypatch.setitem(helpers.OPTIMIZERS, "recorder", functools.partial(Recorder, momentum=0.9))
    return Recorder


@pytest.fixture
def asked(monkeypatch):
    """Lists of the samples that are asked for, batch by batch."""
    lists, batch = [], ZipDataset.batch
    monkeypatch.setattr(ZipDataset, "batch", lambda ds, some: lists.append(list(some)) or batch(ds, some))
    return lists


def changed(config, **changes):
    return dataclasses.replace(config, **changes)


def contents(folder):
    """Every file's bytes, but for timing.csv, which holds seconds."""
    files = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != "timing.csv"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def steps_of(config):
    return -(-len(parts_of(config, ZipDataset(config.data, config.size))["train"]) // config.batch_size)


def refused(text, config, error=ValueError):
    """The sentence with which a run is refused."""
    with pytest.raises(error, match=text) as caught:
        run(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def by_hand(model, ds, indices):
    """IoU and RMSE, means over the pictures, by numpy alone."""
    ious, rmses = [], []
    for item in (ds[int(i)] for i in indices):
        with torch.no_grad():
            given = model(item["bg"][None], item["fg_bg"][None])
        logits, depth = (output[0, 0].double().numpy() for output in given)
        mask, truth = logits > 0, item["mask"][0].numpy() == 1
        ious.append((mask & truth).sum() / (mask | truth).sum() if (mask | truth).any() else 1)
        rmses.append(np.sqrt(np.square(depth - item["depth"][0].double().numpy()).mean()))
    return pytest.approx([np.mean(ious), np.mean(rmses)], abs=1e-5)


# What a Config takes

LOW = {"average": -0.1, "checkpoint_minutes": -1, "epochs": 0, "lr": -1.0, "batch_size": 0, "size": 10}
LOW |= dict.fromkeys(("subset", "max_train", "max_test", "min_steps", "clip_norm", "weight_decay"), -1)
CHOICES = {"model", "optimizer", "schedule", "split", "defects", "depth_near", "precision", "augment"}
REFUSED = [
    *(({name: "rotate"}, f"Unknown {name} 'rotate'. Known: ") for name in sorted(CHOICES)),
    *(({name: value}, f"{name} is {value}; it must be ") for name, value in LOW.items()),
    *(({"name": name}, "name is ") for name in ("", "..", "../a", "/a", "a/", "a//b", "a\\b", ".", "a:b")),
    ({"augment": "mirror+rotate"}, "Unknown augment 'rotate'. Known: none, mirror, colour, shake"),
    ({"average": 1.0}, "average is 1.0"),
    ({"lr": float("nan")}, "lr is nan"),
    ({"lr": "fast"}, "lr is 'fast'"),
    ({"epochs": 2.5}, "epochs is 2.5; it must be a whole number"),
]


@pytest.mark.parametrize("options, text", REFUSED)
def test_a_config_names_the_field_that_it_does_not_take(options, text):
    with pytest.raises(ValueError, match=text):
        Config(**{"name": "a"} | options)


@pytest.mark.parametrize("options", [{}, {"mask_loss": None, "lr": 1 / 3}, {"depth_weight": "learned"}])
def test_a_config_takes_paths_and_numbers_of_numpy_and_is_read_as_it_was_saved(tmp_path, options):
    config = Config("a/b", data=Path("ä b"), epochs=np.int64(3), average=np.float64(0.1), **options)
    config.save(tmp_path / "mine.json")
    assert Config.load(tmp_path / "mine.json") == Config.load(str(tmp_path / "mine.json")) == config
    assert config == Config("a/b", data="ä b", epochs=3, average=0.1, **options)
    values = json.loads((tmp_path / "mine.json").read_text()) | {"code": {}, "fingerprint": "0"}
    (tmp_path / "run.json").write_text(json.dumps(values))  # as a run keeps it
    assert Config.load(tmp_path / "run.json") == config


NO_CONFIG = {'{"name": "a", "rate": 1}': "rate", '{"name": "a", "model": "unet"}': "Unknown model 'unet'"}
NO_CONFIG |= {'{"size": 64}': "name", '{"name": "a': "", "[1, 2]": "", '"a"': "", "": "", "\udcff": ""}


@pytest.mark.parametrize("text", NO_CONFIG)
def test_a_file_that_holds_no_config_is_named(tmp_path, text):
    (tmp_path / "mine.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"mine\.json.*{NO_CONFIG[text]}") as caught:
        Config.load(tmp_path / "mine.json")
    assert "\n" not in str(caught.value)


# What a run leaves


def test_a_run_leaves_the_promised_files_and_rows(config, place):
    finished = run(changed(config, name="a/b"))
    expected = {"config.json", "metrics.csv", "checkpoint.pt", "best.pt", "results.json"}
    expected |= {f"images/epoch_{name}/sheet.png" for name in ("000_step_000", "001", "002")}
    assert finished.folder == place / "a" / "b" and contents(finished.folder).keys() == expected
    columns = {f"valid_{name}" for name in {"loss"} | METRICS["mask"] | METRICS["depth"]}
    with open(finished.folder / "metrics.csv", newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert rows[0].keys() == {"epoch", "lr", "train_loss"} | columns and rows[1]["epoch"] == len(rows) == 2
    assert finished.history == rows and len(finished.seconds) == 2 and min(finished.seconds) > 0
    assert finished.config == Config.load(finished.folder / "config.json") == changed(config, name="a/b")


def test_best_weights_are_those_of_the_least_validation_loss_and_give_table_and_results(config, data, place):
    jumpy, weights, ds = changed(config, epochs=5, lr=0.5, schedule="constant"), [], ZipDataset(data, 16)
    for epoch in range(1, 6):
        history = run(jumpy, stop_after=epoch).history
        weights.append((place / "first" / "best.pt").read_bytes())
        assert len(history) == epoch
    best = int(np.argmin([row["valid_loss"] for row in history]))
    assert [some == weights[-1] for some in weights] == [i >= best for i in range(5)]
    finished, parts, net = read_run(place / "first"), split(ds), Tiny()
    net.load_state_dict(torch.load(place / "first" / "best.pt", weights_only=True))
    row = history[best]
    assert [row["valid_iou"], row["valid_rmse"]] == by_hand(net.eval(), ds, parts["valid"])
    assert finished.results == json.loads((place / "first" / "results.json").read_text())
    assert finished.results.keys() == parts.keys() - {"train"}
    for part, values in finished.results.items():
        assert [values["iou"], values["rmse"]] == by_hand(finished.model(), ds, parts[part])
    # Where it is a mean over pixels, the loss of the table is that of all validation samples at once.
    plain = run(changed(jumpy, name="plain", mask_loss="bce", depth_loss="l1", depth_weight=3.0, epochs=1))
    batch = helpers.to_float(ds.batch(parts["valid"]))
    with torch.no_grad():
        logits, depth = plain.model()(batch["bg"], batch["fg_bg"])
    expected = nn.BCEWithLogitsLoss()(logits, batch["mask"]) + 3 * (depth - batch["depth"]).abs().mean()
    assert plain.history[0]["valid_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_run_gives_back_its_own_network_and_begins_with_the_weights_of_another(config, tmp_path):
    first, other = run(config), run(changed(config, name="other", model="turned"))
    assert type(first.model()) is Tiny and type(other.model()) is Turned  # though all shapes are the same
    (plain := Tiny().eval()).load_state_dict(other.model().state_dict())
    pictures = torch.rand(2, 2, 3, 16, 16)
    torch.testing.assert_close(other.model()(*pictures)[1], 1 - plain(*pictures)[1])
    started = run(changed(config, name="started", start=first.folder, lr=1e-12, weight_decay=0.0, epochs=1))
    torch.testing.assert_close(*(list(one.model().parameters()) for one in (first, started)))
    wrong = changed(config, name="wrong", model="turned", start=first.folder / "best.pt")
    refused(r"start is '.*best\.pt', a tiny, and model is 'turned'", wrong)
    shutil.copy(first.folder / "best.pt", weights := tmp_path / "a.pt")
    run(cut := changed(config, name="cut", start=weights, seed=2**60), stop_after=1)
    weights.unlink()  # goes on without them
    assert run(cut).results


@pytest.mark.parametrize("task, other", [("mask", "depth"), ("depth", "mask")])
def test_one_task_alone_leaves_no_metric_or_picture_of_the_other(config, write_zip, tmp_path, task, other):
    some = [(b, f, 1) for b in range(8) for f in range(8)]
    write_zip(tmp_path / "part.zip", samples=some, size=16, skip=(other,))
    lacking = changed(config, name="lacking", data=tmp_path / "part.zip", split="image")
    refused(rf"part\.zip has no {other} pictures. Set {other}_loss=None", lacking)
    for one in (config, lacking):
        finished = run(changed(one, **{f"{other}_loss": None}))
        assert finished.model().tasks == (task,)
        columns = {"epoch", "lr", "train_loss", "valid_loss"} | {f"valid_{name}" for name in METRICS[task]}
        assert finished.history[0].keys() == columns and finished.results["valid"].keys() == METRICS[task]
        assert Image.open(finished.folder / "images" / "epoch_001" / "sheet.png").width == 4 * 16


def test_the_same_seed_gives_the_same_bits_another_others_and_the_callers_random_numbers_stay(config, place):
    for i, (name, seed) in enumerate((("one", 0), ("two", 0), ("other", 1))):
        torch.manual_seed(i)
        run(changed(config, name=name, seed=seed, epochs=1, augment="mirror+colour"))
        found = torch.rand(3)
        torch.manual_seed(i)
        assert torch.equal(found, torch.rand(3))
    one, two, other = (contents(place / name) for name in ("one", "two", "other"))
    assert [name for name in one if one[name] != two[name]] == ["config.json"]
    assert one["best.pt"] != other["best.pt"]


def test_lists_of_runs_are_trained_in_order_and_once_and_keep_no_checkpoint(config, place, recorder, capsys):
    one = changed(config, name="one", optimizer="recorder")
    other = changed(one, name="other", seed=1)
    runs = helpers.run_all({"both": [one, other], "one": [one]})
    assert "epoch 1  " not in capsys.readouterr().out and len(recorder.rates) == 2 * 2 * steps_of(one)
    assert [[r.config for r in some] for some in runs.values()] == [[one, other], [one]]
    assert runs["one"][0].results == runs["both"][0].results == run(changed(one, name="alone")).results
    begun = [(place / name / "config.json").stat().st_mtime_ns for name in ("one", "other", "alone")]
    assert begun == sorted(begun)
    expected = contents(place / "alone").keys() - {"checkpoint.pt"}
    assert contents(place / "one").keys() == contents(place / "other").keys() == expected


# What is read, and what is refused


def test_a_finished_run_is_read_and_not_trained(config, place, recorder, capsys):
    mine = changed(config, optimizer="recorder")
    finished = run(mine)
    before = {path: path.stat().st_mtime_ns for path in (place / "first").rglob("*")}
    again = run(mine)
    assert (again.history, again.results, again.config) == (finished.history, finished.results, mine)
    assert {path: path.stat().st_mtime_ns for path in (place / "first").rglob("*")} == before
    assert "finished before" in capsys.readouterr().out and len(recorder.rates) == 2 * steps_of(mine)


@pytest.mark.parametrize("stop_after", [None, 1])
def test_another_config_or_other_data_are_refused_and_the_same_data_elsewhere_are_not(
    config, data, write_zip, place, tmp_path, stop_after
):
    run(config, stop_after=stop_after)
    before = contents(place)
    write_zip(tmp_path / "other.zip", samples=[(b, f, 1) for b in range(9) for f in range(9)], size=16)
    refused(r"fingerprint was '[0-9a-f]{16}' and is", changed(config, data=tmp_path / "other.zip"))
    for field, value in (("lr", 0.5), ("epochs", 9), ("mask_loss", None)):
        was = getattr(config, field)
        text = f"'first' exists, but {field} was {was!r} and is {value!r}. Take another name"
        refused(text, changed(config, **{field: value}))
    assert contents(place) == before
    shutil.copy(data, tmp_path / "copy.zip")
    assert run(changed(config, data=tmp_path / "copy.zip", checkpoint_minutes=5)).results


SOURCES = {
    "function": ("depth_loss", "def mine(d, g):\n    return (d - g).mean() * {}"),
    "lambda": ("depth_loss", "mine = lambda d, g: (d - g).mean() * {}"),
    "partial": ("depth_loss", "def f(d, g, k):\n    return (d - g).mean() * k\nmine = partial(f, k={})"),
    "partial of ours": ("mask_loss", "mine = partial(helpers.MASK_LOSSES['tversky'], a={})"),
    "callable": ("mask_loss", "class M:\n  def __call__(self, z, t):\n    return z.mean() * {}\nmine = M()"),
    "class": ("model", "class mine(Tiny):\n  def forward(self, *p):\n    return super().forward(*p)  # {}"),
    "base": ("model", "class N(Tiny):\n  def forward(self, *p):\n    return super().forward(*p)  # {}\n"
             "class mine(N):\n  pass"),
    "block": ("model", "class Block(helpers.nn.Identity):\n  def more(self):\n    return {}\n"
              "class mine(Tiny):\n  def __init__(self):\n    super().__init__()\n    self.block = Block()"),
    "partial of a class": ("model", "class N(Tiny):\n    def __init__(self, n):\n        super().__init__()\n"
                           "mine = partial(N, {})"),
    "factory": ("model", "def mine():\n    return Tiny()  # {}"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("where", ["own_code", "__main__"])  # a file, or a notebook, which has none
def test_edited_code_is_another_run_and_the_same_is_not(config, place, tmp_path, monkeypatch, kind, where):
    field, source = SOURCES[kind]
    head = "from functools import partial\nimport helpers\nfrom test_runs import Tiny\n"

    def define(number):
        """As one who edits it and starts Python anew."""
        file = tmp_path / str(number) / "own_code.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(head + source.format(number) + "\n")
        spec = importlib.util.spec_from_file_location(where, file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, where, module)
        spec.loader.exec_module(module)
        if where == "__main__":
            del module.__file__
        monkeypatch.setitem(KNOWN[field], "mine", module.mine)

    define(2)
    mine = changed(config, **{field: "mine"})
    assert len(run(mine, stop_after=1).history) == 1
    define(3)
    before = contents(place)
    refused(f"'first' exists, but the code of a loss or network .* edited, was .*{field}", mine)
    assert contents(place) == before
    define(2)
    assert len(run(mine).history) == 2


@pytest.mark.parametrize("given", [
    lambda bg, fg_bg: bg[:, :1],
    lambda bg, fg_bg: (bg[:, :1], bg[:, 0]),
    lambda bg, fg_bg: {"mask": bg[:, :1], "depth": bg[:, :1]},
    lambda bg, fg_bg: (bg[:, :1, ::2, ::2], bg[:, :1, ::2, ::2]),
])  # fmt: skip
def test_a_network_with_other_outputs_is_refused_and_can_be_mended(config, monkeypatch, given):
    class Wrong(Tiny):
        def forward(self, bg, fg_bg):
            return given(bg, fg_bg)

    monkeypatch.setitem(MODELS, "mine", Wrong)
    refused("network 'mine' must give a pair", changed(config, model="mine"))
    monkeypatch.setitem(MODELS, "mine", Tiny)
    assert run(changed(config, model="mine")).results


def test_a_loss_of_ones_own_added_in_one_line_trains_and_one_without_a_scalar_is_refused(config, monkeypatch):
    monkeypatch.setitem(DEPTH_LOSSES, "fourth", lambda d, g: (d - g).pow(4).mean())
    history = run(changed(config, depth_loss="fourth", epochs=4)).history
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    for task in ("mask", "depth"):
        monkeypatch.setitem(KNOWN[f"{task}_loss"], "mine", lambda p, t: (p - t).abs())
        refused(f"The {task} loss must give a scalar", changed(config, name=task, **{f"{task}_loss": "mine"}))


def test_a_loss_that_is_no_number_names_samples_and_leaves_the_checkpoint(config, place, monkeypatch):
    bad = []
    monkeypatch.setitem(DEPTH_LOSSES, "mine", lambda d, g: (d - g).abs().mean() * sum([1, *bad]))
    mine, ds = changed(config, depth_loss="mine"), ZipDataset(config.data, 16)
    run(mine, stop_after=1)
    before = contents(place / "first")
    bad.append(float("nan"))
    said = refused("first: in step .* the loss is not finite .*depth nan", mine)
    assert 1 <= sum(ds.name(i) in said for i in split(ds)["train"]) <= 8
    assert contents(place / "first") == before
    monkeypatch.setitem(DEPTH_LOSSES, "blind", lambda d, g: d.mean() / float(d.requires_grad or "nan"))
    blind = changed(config, name="blind", depth_loss="blind")
    refused("in epoch 1 the loss of the validation samples is not finite", blind)


def test_what_does_not_fit_is_refused_and_the_name_stays_free(config, write_zip, tmp_path):
    write_zip(tmp_path / "few.zip", samples=[(1, 1, 1), (2, 1, 1)], size=16)
    few = changed(config, data=tmp_path / "few.zip")
    refused(r"few\.zip: of its 2 samples, split 'unseen' leaves none for .*split='image'", few)
    refused(r"18 x 18 pixels do not divide by 16\. Use 16 x 16", changed(config, size=18, model="twin_unet"))
    assert run(config).results


def test_a_second_program_at_the_same_run_is_refused(config, place, tmp_path, monkeypatch):
    config = changed(config, model="resunet_lite", depth_loss="l1", epochs=1, max_train=16, max_test=4)
    config.save(tmp_path / "config.json")
    ended = []

    def meanwhile(*_):
        command = [sys.executable, helpers.__file__, tmp_path / "config.json"]
        ended.append(subprocess.run(command, capture_output=True, text=True))
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
    damages = {"results.json": "{", "metrics.csv": "", "timing.csv": "a\nx\n", "config.json": "{"}
    for name, text in damages.items():
        shutil.copytree(folder, tmp_path / name)
        (tmp_path / name / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name}(: .* damaged .* Delete| holds no Config)") as caught:
            read_run(tmp_path / name)
        assert "\n" not in str(caught.value)
    run(half := changed(config, name="half"), stop_after=1)
    os.truncate(place / "half" / "checkpoint.pt", 3000)
    refused(r"checkpoint\.pt is damaged", half)


# Choices


@pytest.mark.parametrize("schedule", helpers.SCHEDULES)
def test_rates_are_those_of_torchs_own_schedule(config, recorder, monkeypatch, schedule):
    monkeypatch.setitem(DEPTH_LOSSES, "same", lambda d, g: 1 + 0 * d.sum())  # a plateau from the start
    mine = {"mask_loss": None, "depth_loss": "same", "schedule": schedule, "lr": 1.0, "epochs": 7}
    history = run(changed(config, optimizer="recorder", **mine)).history
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
            own.step(1.0)
    assert recorder.rates == pytest.approx(rates) and (schedule == "constant" or len(set(rates)) > 1)
    assert [row["lr"] for row in history] == recorder.rates[:: steps // 7]  # as an epoch begins


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
    mine = changed(config, mask_loss="two", depth_loss="half", depth_weight="learned", weight_decay=0.3)
    history = run(changed(mine, optimizer="sgd", schedule="constant", epochs=3)).history
    costs, s, speed, expected = np.array([2, 0.5]), np.zeros(2), np.zeros(2), []
    for _ in range(3 * steps_of(mine)):
        speed = 0.9 * speed + 1 - costs * np.exp(-s)
        s = s - mine.lr * speed
        expected.append(np.exp(s[0] - s[1]))
    weights = [row["depth_weight"] for row in history]
    assert weights == pytest.approx(expected[steps_of(mine) - 1 :: steps_of(mine)], rel=1e-5)
    assert weights[-1] > 1.1
    assert [row["valid_loss"] for row in history] == [2.5] * 3  # epochs are compared by weights that stay


@pytest.mark.parametrize("min_steps, epochs", [(0, 2), (7, 2), (8, 2), (9, 3), (21, 6)])
def test_small_data_are_seen_until_so_many_steps_are_made(config, recorder, min_steps, epochs):
    mine = changed(config, optimizer="recorder", max_train=32, batch_size=8, min_steps=min_steps)
    assert len(run(mine, stop_after=1).history) == 1 and len(recorder.rates) == 4
    assert len(run(mine).history) == epochs and len(recorder.rates) == 4 * epochs


def test_a_subset_and_at_most_so_many_samples_are_all_that_a_run_sees(config, data, asked):
    ds, mine = ZipDataset(data, 16), changed(config, split="image", subset=40)
    whole, cut = split(ds, "image"), parts_of(mine, ds)
    assert sum(map(len, cut.values())) == 40 and all(set(cut[part]) <= set(whole[part]) for part in whole)
    mine = changed(mine, max_train=11, max_test=3)
    parts = parts_of(mine, ds)
    assert {part: len(some) for part, some in parts.items()} == {"train": 11, "valid": 3, "test": 3}
    assert all(set(parts[part]) <= set(cut[part]) for part in parts)
    run(mine)
    assert set().union(*asked) == set(np.concatenate(list(parts.values())))


@pytest.mark.parametrize("count, sizes", [(17, [9, 8]), (16, [16]), (33, [11, 11, 11])])
def test_every_sample_is_seen_once_an_epoch_and_no_batch_has_a_single_one(config, asked, count, sizes):
    orders = []
    for epoch in (1, 2):
        run(changed(config, max_train=count), stop_after=epoch)
        trained = [batch for batch in asked if len(batch) != 4][: len(sizes)]  # pictures are saved of fours
        assert [len(batch) for batch in trained] == sizes  # training comes first
        orders.append([i for batch in trained for i in batch])
        asked.clear()
    assert len(set(orders[0])) == count and sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]
