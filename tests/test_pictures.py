"""Figures and tables: that what they show is what they were given."""

import io
import itertools
import re
import types
from pathlib import Path

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from test_notebooks import NOTEBOOKS, defined

import helpers
from helpers import Config, Run, ZipDataset, baselines, split

SIZE = 16


@pytest.fixture(scope="module")
def ds(write_zip, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.zip"
    write_zip(path, samples=itertools.product(range(1, 13), range(1, 13), (1, 2)), size=SIZE)
    return ZipDataset(path, size=SIZE)


@pytest.fixture(scope="module")
def baseline(ds):
    return baselines(ds, split(ds)["train"]).cpu()


def shown(figure):
    return [np.asarray(axis.images[0].get_array()) for axis in figure.axes if axis.images]


@torch.no_grad()
def all_of(item, baseline):
    mask_logits, depth = (one[0] for one in baseline.cpu()(item["bg"][None], item["fg_bg"][None]))
    of = {kind: item[kind] for kind in helpers.KINDS}
    of |= {"mask_predicted": (mask_logits > 0).float(), "depth_predicted": depth}
    of |= {f"{task}_error": (of[f"{task}_predicted"] - of[task]).abs() for task in ("mask", "depth")}
    return {kind: picture.permute(1, 2, 0).squeeze(-1).numpy() for kind, picture in of.items()}


def test_show_samples_shows_each_sample_in_a_column(ds, baseline):
    figure = helpers.show_samples(ds, [5, 0, 9])
    expected = [all_of(ds[i], baseline)[kind] for kind in helpers.KINDS for i in (5, 0, 9)]
    assert all(np.array_equal(*pair) for pair in zip(shown(figure), expected, strict=True))
    assert figure.axes[1].get_title().replace(" ", "_") == ds.name(0)
    assert len(figure.axes) == 4 * 3 + 1  # and the bar of the depth


def test_show_predictions_shows_inputs_truth_prediction_and_errors_on_fixed_scales(ds, baseline):
    figure = helpers.show_predictions(baseline, ds, [3, 8], precision="float32")
    kinds = [f"{task}{what}" for task in ("mask", "depth") for what in ("", "_predicted", "_error")]
    expected = [all_of(ds[i], baseline)[kind] for i in (3, 8) for kind in ("bg", "fg_bg", *kinds)]
    for picture, other in zip(shown(figure), expected, strict=True):
        np.testing.assert_allclose(picture, other, atol=1e-6)
    for axis, error in zip(figure.axes[6:16:8], expected[7::8], strict=True):
        assert axis.get_xlabel() == f"RMSE {np.sqrt(np.square(error).mean()):.3f}"
    assert [axis.images[0].get_clim() for axis in figure.axes[2:7]] == [(0, 1)] * 5  # the scales are fixed


def test_compare_predictions_has_a_row_a_sample_and_kind_and_a_column_a_network(ds, baseline):
    networks = {"one": baseline, "other": type(baseline)(200, baseline.mean_depth * 0.5)}
    figure = helpers.compare_predictions(networks, ds, [2, 4])
    assert [axis.get_title() for axis in figure.axes[:4]] == ["input", "truth", "one", "other"]
    pictures, of = shown(figure), all_of(ds[2], baseline)
    assert len(pictures) == 2 * 2 * 4
    for k, picture in enumerate((of["fg_bg"], of["mask"], of["mask_predicted"], np.zeros((SIZE, SIZE)))):
        np.testing.assert_array_equal(pictures[k], picture)  # nothing differs by 200
    np.testing.assert_allclose(pictures[7], pictures[6] / 2, atol=1e-3)
    assert len(shown(helpers.compare_predictions(networks, ds, [0, 5, 6], ("mask",)))) == 3 * 4


@pytest.mark.parametrize("kind, other", [("mask", "depth"), ("depth", "mask")])
def test_a_task_alone_is_shown_alone(write_zip, tmp_path, ds, baseline, kind, other):
    write_zip(tmp_path / "a.zip", skip=[other], size=SIZE)
    one, network = ZipDataset(tmp_path / "a.zip", SIZE), type(baseline)(20, baseline.mean_depth)
    assert len(shown(helpers.show_samples(one, [0, 1]))) == 3 * 2
    assert len(shown(helpers.show_predictions(network, one, [0, 1]))) == 5 * 2
    assert len(shown(helpers.compare_predictions({"a": network}, one, [0]))) == 3
    network.tasks = (kind,)
    titles = [axis.get_title() for axis in helpers.show_predictions(network, ds, [0]).axes]
    assert sum("predicted" in title for title in titles) == 1


def a_run(*losses):
    names = "epoch", "train_loss", "valid_loss", "valid_iou"
    rows = [dict(zip(names, (k, 2 * x, x, x + 1), strict=True)) for k, x in enumerate(losses)]
    return Run(Config("a"), Path("a"), rows, [1.0] * len(losses), {})


def test_plot_history_draws_a_panel_a_metric_and_a_curve_a_run():
    runs = {"short": a_run(3, 2), "long": a_run(3, 2.5, 1)}
    figure = helpers.plot_history(runs, metrics=("loss", "iou"))
    loss, iou = figure.axes
    assert [[*line.get_xdata()] for line in iou.lines] == [[0, 1], [0, 1, 2]]
    assert [[*line.get_ydata()] for line in iou.lines] == [[4, 3], [4, 3.5, 2]]
    assert [[*line.get_ydata()] for line in loss.lines] == [[3, 2], [6, 4], [3, 2.5, 1], [6, 5, 2]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["short", "long"]
    assert len(helpers.plot_history(runs).axes) == 3  # where depth is not trained, too
    runs["depth"] = Run(Config("b"), Path("b"), [{"epoch": 0, "train_loss": 1, "valid_rmse": 2}], [1.0], {})
    legend = helpers.plot_history(runs, metrics=("iou", "rmse")).legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["short", "long", "depth"]


def test_of_several_seeds_the_curve_is_the_mean_in_a_band():
    axis = helpers.plot_history({"both": [a_run(3, 1), a_run(1, 2)]}, metrics=("iou",)).axes[0]
    assert axis.lines[0].get_ydata().tolist() == [3, 2.5]
    assert axis.collections[0].get_paths()[0].get_extents().intervaly.tolist() == [2, 4]


def cells(table):
    bold = re.findall(r"#T_\w*?_row(\d+)_col(\d+)", table.to_html().partition("font-weight: bold")[0])
    return table.data.to_numpy().tolist(), {(int(row), int(column)) for row, column in bold}


def test_results_table_has_the_best_of_each_column_bold_and_the_same_html_each_time():
    values = np.random.default_rng(0).random((5, 2, 3)).round(3)  # runs, parts, metrics
    parts, metrics = ("test_seen", "test_new_both"), ("iou", "rmse", "delta1")
    results = {f"run {k}": pd.DataFrame(of, parts, metrics).T.to_dict() for k, of in enumerate(values)}
    del results["run 4"]["test_new_both"]
    values[4, 1] = np.nan
    table = helpers.results_table(results, metrics)
    texts, bold = cells(table)
    assert texts == [[f"{value:.3f}".replace("nan", "–") for value in row.flat] for row in values]
    height = values.reshape(5, 6) * [1, -1, 1, 1, -1, 1]  # of rmse the least is the best
    assert bold == {(int(row), column) for row, column in np.argwhere(height == np.nanmax(height, 0))}
    assert table.to_html() == helpers.results_table(results, metrics).to_html()
    assert helpers.results_table(results, ("rmse",), ("test_new_both",)).data.shape == (5, 1)


def test_of_several_seeds_the_table_prints_mean_and_standard_deviation():
    seeds = [{"test_seen": {"iou": value}} for value in (0.5, 0.6, 0.7)]
    table = helpers.results_table({"three": seeds, "one": seeds[0]}, metrics=("iou",))
    assert cells(table) == ([["0.600 ± 0.100"], ["0.500"]], {(0, 0)})


def test_the_sheet_of_an_epoch_has_truth_and_prediction_of_eight_samples_in_8_bit(ds, tmp_path, monkeypatch):
    monkeypatch.setenv("WORKSPACE", str(tmp_path))
    config = Config("a", str(ds.path), size=SIZE, model="difference_unet", epochs=1, precision="float32")
    run = helpers.run(config, quiet=True)
    sheet = np.array(Image.open(run.folder / "images" / "epoch_001" / "sheet.png")).astype(float)
    pictures, model, numbers = sheet.reshape(8, SIZE, 6, SIZE, 3).swapaxes(1, 2), run.model(), []
    fg_bg = ds.batch(range(len(ds)))["fg_bg"].permute(0, 2, 3, 1).numpy()
    for shown in pictures:
        numbers.append(int(np.argmax((fg_bg == shown[1]).all((1, 2, 3)))))
        of = {kind: 255 * picture.T for kind, picture in all_of(ds[numbers[-1]], model).items()}
        for k, kind in zip((0, 1, 2, 4), helpers.KINDS, strict=True):
            np.testing.assert_array_equal(shown[k].T - np.round(of[kind]), 0)
        assert np.abs(shown[5].T - of["depth_predicted"]).max() < 1.01
        assert np.abs(shown[3].T - of["mask_predicted"]).mean() < 1
    assert {*numbers[:4]} < {*split(ds)["train"]} and {*numbers[4:]} <= {*split(ds)["test_new_both"]}


@pytest.fixture(scope="module")
def learned(ds, tmp_path_factory):
    """Two epochs of 15 steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKSPACE", str(tmp_path_factory.mktemp("runs")))
        options = {"split": "image", "max_train": 30, "batch_size": 2, "epochs": 2, "precision": "float32"}
        config = Config("a", str(ds.path), size=SIZE, model="difference_unet", **options)
        return helpers.run(config, quiet=True)


def of_notebook_05(name, **names):
    """A function of the notebook that looks at what a run has saved."""
    names |= {"np": np, "plt": plt, "Image": Image, "ipywidgets": ipywidgets, "explore": helpers.explore}
    return defined(NOTEBOOKS["05_final_192px.ipynb"], "saved_pictures", name, **names)


def test_pictures_are_saved_after_the_first_steps_and_every_epoch(learned):
    saved = of_notebook_05("saved_pictures")(learned)
    files = "epoch_000_step_000", "epoch_000_step_010", "epoch_001", "epoch_002"
    assert [*saved] == ["step 0", "step 10", "epoch 1", "epoch 2"]
    for file, moment in zip(files, saved, strict=True):
        sheet = np.array(Image.open(learned.folder / "images" / file / "sheet.png"))  # by rows of pictures
        by_rows = np.concatenate(np.concatenate([*saved[moment].swapaxes(0, 1)], 2), 0)
        assert np.array_equal(by_rows[:, : 4 * SIZE], sheet.reshape(8 * SIZE, 6 * SIZE, 3)[:, : 4 * SIZE])
        in_colours = plt.get_cmap("viridis")(sheet[:, 4 * SIZE :, 0], bytes=True)[..., :3]
        assert np.array_equal(by_rows[:, 4 * SIZE :], in_colours)
    torch.manual_seed(learned.config.seed)
    begun = helpers.MODELS["difference_unet"]().eval()
    bg, fg_bg = (torch.from_numpy(saved["step 0"][:, k] / 255).float().permute(0, 3, 1, 2) for k in (0, 1))
    with torch.no_grad():
        depth = (255 * begun(bg, fg_bg)[1][:, 0]).round().byte().numpy()
    expected = plt.get_cmap("viridis")(depth, bytes=True)[..., :3].astype(int)  # of the random first weights
    assert np.abs(saved["step 0"][:, 5] - expected).max() < 6
    assert np.abs(saved["step 10"][:, 5].astype(int) - saved["step 0"][:, 5]).max() > 6


def test_plot_progress_shows_input_predictions_and_truth(learned):
    saved, before = of_notebook_05("saved_pictures")(learned), plt.get_fignums()
    of_notebook_05("plot_progress")(learned, samples=(2, 5))
    figure = plt.gcf()
    titles = ["with object", "step 0", "step 10", "epoch 1", "epoch 2", "truth"]
    assert [axis.get_title() for axis in figure.axes[:6]] == titles
    pictures = shown(figure)
    assert len(pictures) == 2 * 2 * 6
    np.testing.assert_array_equal(pictures[6], saved["step 0"][2, 1])  # sample 2, depth: with the object
    np.testing.assert_array_equal(pictures[3], saved["epoch 1"][2, 3])
    np.testing.assert_array_equal(pictures[-1], saved["epoch 2"][5, 4])
    plt.close(figure)
    assert plt.get_fignums() == before


def test_the_browser_shows_the_sample_and_moment_that_are_chosen(learned, monkeypatch):
    boxes, figures, right, open_before = [], [], plt.savefig, plt.get_fignums()
    monkeypatch.setattr(helpers, "display", boxes.append)
    monkeypatch.setattr(plt, "savefig", lambda *a, **b: figures.append(shown(plt.gcf())) or right(*a, **b))
    of_notebook_05("browse", display=boxes.append)(learned)
    (sample, moment, picture), before = boxes[1].children, boxes[1].children[2].value
    assert [sample.description, moment.description] == ["sample", "moment"]
    sample.value, moment.value = 6, "epoch 1"
    chosen = of_notebook_05("saved_pictures")(learned)["epoch 1"][6]
    assert len(figures) == 3 and np.array_equal(figures[-1], chosen)
    assert Image.open(io.BytesIO(picture.value)).width > 800 and picture.value != before
    assert plt.get_fignums() == open_before


def test_a_notebook_watches_a_run(learned, tmp_path, monkeypatch):
    titles = []

    def display(figure, display_id):
        note = lambda figure: titles.append(figure.axes[0].get_title())  # noqa: E731
        note(figure)
        return types.SimpleNamespace(update=note)

    monkeypatch.setenv("WORKSPACE", str(tmp_path))
    before = plt.get_fignums()
    helpers.run(learned.config, watch=of_notebook_05("live_view", display=display, pd=pd)(learned.config))
    assert titles == [f"a, step {step}" for step in (0, 10, 15, 30)] and plt.get_fignums() == before
    for kept in ("best.pt", "metrics.csv", "checkpoint.pt"):  # nothing random was drawn for it
        assert (tmp_path / "a" / kept).read_bytes() == (learned.folder / kept).read_bytes()
