"""Figures and tables: that what they show is what they were given."""

import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import helpers
from helpers import Config, Run, ZipDataset, baselines, split

SIZE = 16


@pytest.fixture(scope="module")
def ds(write_zip, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.zip"
    write_zip(path, samples=[(b, f, 1) for b in range(1, 13) for f in range(1, 13)], size=SIZE)
    return ZipDataset(path, size=SIZE)


@pytest.fixture(scope="module")
def baseline(ds):
    return baselines(ds, split(ds)["train"])


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def shown(figure):
    """The arrays of the pictures in a figure, but for colour bars."""
    return [np.asarray(axis.images[0].get_array()) for axis in figure.axes if axis.images]


def colour_bars(figure):
    return [axis.get_ylabel() or axis.get_xlabel() for axis in figure.axes if axis.get_label() == "<colorbar>"]


def array(tensor):
    return tensor.permute(1, 2, 0).squeeze(-1).numpy()


def history(*losses):
    names = ("loss", "iou", "rmse")
    return [
        {"epoch": i + 1.0, "train_loss": 2 * loss, **{f"valid_{n}": loss + k for k, n in enumerate(names)}}
        for i, loss in enumerate(losses)
    ]


def a_run(losses, results=None):
    return Run(Config("a"), Path("a"), history(*losses), [1.0] * len(losses), results or {})


# Pictures of samples


def test_show_samples_shows_each_sample_in_a_column(ds):
    figure = helpers.show_samples(ds, [5, 0, 9])
    expected = [array(ds[i][kind]) for kind in helpers.KINDS for i in (5, 0, 9)]
    for picture, other in zip(shown(figure), expected, strict=True):
        np.testing.assert_array_equal(picture, other)
    assert [axis.get_title() for axis in figure.axes[:3]] == [ds.name(i) for i in (5, 0, 9)]
    assert colour_bars(figure) == ["near → far"]


def test_show_predictions_shows_inputs_truth_prediction_and_errors(ds, baseline):
    figure = helpers.show_predictions(baseline, ds, [3, 8], precision="float32")
    expected = []
    for i in (3, 8):
        item = ds[i]
        mask_logits, depth = baseline(item["bg"][None], item["fg_bg"][None])
        mask = (mask_logits[0] > 0).float()
        expected += [item["bg"], item["fg_bg"], item["mask"], mask, (mask - item["mask"]).abs()]
        expected += [item["depth"], depth[0], (depth[0] - item["depth"]).abs()]
    for picture, other in zip(shown(figure), expected, strict=True):
        np.testing.assert_allclose(picture, array(other), atol=1e-6)
    assert len(colour_bars(figure)) == 2
    errors = expected[7].square().mean().sqrt().item()
    assert f"RMSE {errors:.3f}" in [axis.get_xlabel() for axis in figure.axes]


def test_depth_and_mask_are_drawn_on_a_fixed_scale(ds, baseline):
    figure = helpers.show_predictions(baseline, ds, [0])
    limits = [axis.images[0].get_clim() for axis in figure.axes if axis.images]
    maps = [axis.images[0].get_cmap().name for axis in figure.axes if axis.images]
    assert limits[2:7] == [(0, 1)] * 5 and limits[7][0] == 0
    assert maps[2:5] == ["gray"] * 3 and maps[5] == maps[6] != maps[7] != "gray"


def test_compare_predictions_has_a_column_a_network(ds, baseline):
    other = type(baseline)(200, baseline.mean_depth * 0.5)
    figure = helpers.compare_predictions({"one": baseline, "other": other}, ds, [2, 4])
    assert [axis.get_title() for axis in figure.axes[:4]] == ["input", "truth", "one", "other"]
    pictures = shown(figure)
    assert len(pictures) == 2 * 2 * 4
    np.testing.assert_array_equal(pictures[1], array(ds[2]["mask"]))
    np.testing.assert_array_equal(pictures[3], np.zeros((SIZE, SIZE)))  # nothing differs by 200
    np.testing.assert_allclose(pictures[7], pictures[6] / 2, atol=1e-6)


# Curves, dots and tables


def test_plot_history_draws_a_curve_a_run_and_metric():
    runs = {"short": a_run([3, 2]), "long": a_run([3, 2.5, 1])}
    figure = helpers.plot_history(runs, metrics=("loss", "rmse"))
    loss, rmse = figure.axes
    assert [list(line.get_ydata()) for line in rmse.lines] == [[5, 4], [5, 4.5, 3]]
    assert [list(line.get_xdata()) for line in rmse.lines] == [[1, 2], [1, 2, 3]]
    curves = {line.get_linestyle(): list(line.get_ydata()) for line in loss.lines[:2]}
    assert curves == {"-": [3, 2], "--": [6, 4]}
    assert loss.lines[0].get_color() == loss.lines[1].get_color() != loss.lines[2].get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["short", "long"]


def test_plot_history_of_one_run_and_one_metric():
    figure = helpers.plot_history({"alone": a_run([1, 2])}, metrics=("iou",))
    assert len(figure.axes) == 1 and not figure.legends


@pytest.fixture
def results():
    """Two runs that were measured on the new scenes, and one that was not."""
    return {
        "a <b>": {"test_seen": {"iou": 0.9, "rmse": 0.2}, "test_new_both": {"iou": 0.5, "rmse": 0.4}},
        "c": {"test_seen": {"iou": 0.8, "rmse": 0.1}, "test_new_both": {"iou": 0.6, "rmse": 0.4}},
        "d": {"test_seen": {"iou": 0.7, "rmse": 0.3}},
    }


def test_compare_runs_draws_a_dot_for_each_part(results):
    figure = helpers.compare_runs(results, metrics=("iou", "rmse"))
    dots = [[tuple(map(float, xy)) for xy in dot.get_offsets()] for dot in figure.axes[1].collections]
    assert dots == [[(0.2, 0), (0.1, 1), (0.3, 2)], [(0.4, 0), (0.4, 1)]]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == list(results)
    assert [axis.get_title() for axis in figure.axes] == ["mask IoU (higher is better)", "depth RMSE (lower is better)"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["seen", "new background and object"]


class Cells(HTMLParser):
    """The table's rows of (text, whether it is bold)."""

    def __init__(self, html):
        super().__init__()
        self.rows, self.bold = [], False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append(("", False))
        elif tag == "b":
            self.bold = True

    def handle_endtag(self, tag):
        self.bold = self.bold and tag != "b"

    def handle_data(self, data):
        if self.rows:  # a script stands before
            self.rows[-1][-1] = (self.rows[-1][-1][0] + data, self.bold)


def test_results_table_prints_the_best_of_a_column_bold(results):
    rows = Cells(helpers.results_table(results, metrics=("iou", "rmse")).data).rows
    assert [text for text, _ in rows[0]] == ["", "seen", "new background and object"]
    assert rows[2:] == [
        [("a <b>", False), ("0.900", True), ("0.200", False), ("0.500", False), ("0.400", True)],
        [("c", False), ("0.800", False), ("0.100", True), ("0.600", True), ("0.400", True)],
        [("d", False), ("0.700", False), ("0.300", False), ("–", False), ("–", False)],
    ]


def test_results_table_can_be_cut_to_some_parts(results):
    rows = Cells(helpers.results_table(results, metrics=("rmse",), cells=("test_new_both",)).data).rows
    assert [len(row) for row in rows] == [2] * 5


def test_of_several_seeds_the_table_prints_mean_and_standard_deviation():
    seeds = [{"test_seen": {"iou": value}} for value in (0.5, 0.6, 0.7)]
    rows = Cells(helpers.results_table({"three": seeds, "one": seeds[0], "none": []}, metrics=("iou",)).data).rows
    assert [[text for text, _ in row] for row in rows[2:]] == [["three", "0.600 ± 0.100"], ["one", "0.500"], ["none", "–"]]


def test_of_several_seeds_the_dot_is_the_mean_on_a_bar_from_least_to_greatest():
    seeds = [{"test_seen": {"iou": value}} for value in (0.5, 0.6, 0.9)]
    dot, bar = helpers.compare_runs({"three": seeds}, metrics=("iou",)).axes[0].collections
    assert dot.get_offsets().tolist() == pytest.approx(np.array([[2 / 3, 0]]))
    assert bar.get_segments()[0].tolist() == [[0.5, 0], [0.9, 0]]


def test_of_several_seeds_the_curve_is_the_mean():
    runs = {"both": [a_run([3, 1]), a_run([1, 3])], "one": a_run([5, 4])}
    lines = helpers.plot_history(runs, metrics=("loss",)).axes[0].get_lines()
    assert [line.get_ydata().tolist() for line in lines[::2]] == [[2, 2], [5, 4]]


def test_compare_predictions_can_be_cut_to_masks(ds, baseline):
    pictures = shown(helpers.compare_predictions({"a": baseline}, ds, [0, 5], kinds=("mask",)))
    assert len(pictures) == 2 * 3
    for i, (photo, truth) in zip((0, 5), (pictures[0:2], pictures[3:5]), strict=True):
        np.testing.assert_allclose(photo, array(ds[i]["fg_bg"]), atol=1e-6)
        np.testing.assert_array_equal(truth, array(ds[i]["mask"]))


def test_of_each_metric_it_is_known_which_value_is_better():
    """By measuring a perfect and a poor prediction."""
    mask_true, depth_true = (torch.rand(2, 1, 1, 16, 16, generator=torch.Generator().manual_seed(0)) > 0.5).float().unbind()
    depth_true = depth_true.clamp(0.2, 0.8)
    perfect = helpers.measure(mask_true - 0.5, depth_true, mask_true, depth_true)
    poor = helpers.measure(0.5 - mask_true, 1 - depth_true, mask_true, depth_true)
    assert all((perfect[name] < poor[name]) == (name in helpers.LOWER_IS_BETTER) for name in perfect)


# The pictures of a run


@pytest.fixture(scope="module")
def epoch_folder(ds, baseline, tmp_path_factory):
    """What a run writes after its first epoch, with the baseline as its network."""
    place = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKSPACE", str(place))
        patch.setitem(helpers.MODELS, "baseline", lambda: Trainable(baseline))
        config = Config("a", data=str(ds.path), size=SIZE, model="baseline", epochs=1, precision="float32", augment="none")
        return helpers.run(config).folder / "images" / "epoch_001"


class Trainable(nn.Module):
    """The baseline with a weight that moves nothing, so that it can be trained."""

    stride = 1

    def __init__(self, baseline):
        super().__init__()
        self.baseline = baseline
        self.weight = nn.Parameter(baseline.mean_depth.new_zeros(1))

    def forward(self, bg, fg_bg):
        mask_logits, depth = self.baseline(bg, fg_bg)
        return mask_logits + 0 * self.weight, depth + 0 * self.weight


def test_single_pictures_are_truth_and_prediction_to_the_level(ds, baseline, epoch_folder):
    numbers = {ds.name(i): i for i in range(len(ds))}
    checked = set()
    for path in epoch_folder.glob("*_*.png"):
        part, name, kind = re.fullmatch(r"(train|test_new_both)_(bg\d+_fg\d+_\d+)_(\w+)", path.stem).groups()
        item = ds[numbers[name]]
        assert numbers[name] in split(ds)[part]
        mask_logits, depth = baseline(item["bg"][None], item["fg_bg"][None])
        item |= {"mask_predicted": (mask_logits[0] > 0).float(), "depth_predicted": depth[0]}
        saved = np.asarray(Image.open(path).convert("RGB" if kind in ("bg", "fg_bg") else "L"))
        np.testing.assert_array_equal(saved, np.floor(array(item[kind]) * 255 + 0.5), path.name)
        checked.add((part, kind))
    assert len(checked) == 2 * 6


def test_the_sheet_has_a_row_a_sample_and_a_column_a_picture(epoch_folder):
    width, height = Image.open(epoch_folder / "sheet.png").size
    assert width == 6 * (SIZE + 2) + 2
    assert 8 * (SIZE + 2) + 2 < height < 8 * (SIZE + 2) + 2 + 20  # and a line of titles
