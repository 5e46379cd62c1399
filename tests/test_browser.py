"""What a user does by hand, in a real browser: runs all cells, moves sliders, uploads photos, gets an answer.

In JupyterLab with ipywidgets 8; and in the classic notebook with Colab's ipywidgets, if CLASSIC_PYTHON is the
python of an environment with -r requirements.txt nbclassic ipywidgets==7.7.1 widgetsnbextension==3.6.1
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import nbformat
import psutil
import pytest
from PIL import Image

pytest.importorskip("jupyterlab", reason="JupyterLab is not installed, so nothing is tried in a browser")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright, which drives a browser, is missing")

ROOT = Path(__file__).resolve().parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FRONTS = {
    "jupyterlab": {
        "page": "lab/tree/{}?reset&token={}",
        "ready": "text=/[|] Idle$/",  # before that the menu does nothing
        "run_all": ('role=menuitem[name="Run"s]', 'role=menuitem[name="Run All Cells"s]'),
        "cell": ".jp-CodeCell",
        "prompt": ".jp-CodeCell .jp-InputPrompt",
        "error": '[data-mime-type="application/vnd.jupyter.error"]',
    },
    "nbclassic": {
        "page": "nbclassic/notebooks/{}?token={}",
        "ready": "#kernel_indicator_icon.kernel_idle_icon",
        "run_all": ("#celllink", "#run_all_cells"),
        "cell": ".code_cell",
        "prompt": ".code_cell .input_prompt",
        "error": ".output_error",
    },
}
SETTINGS = {
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},  # cells out of sight are there, too
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false"},  # no question that hides a button
}
# Of a page: the last cell has a number, or one has failed. (Folded ones may have none.)
DONE = """([prompt, error]) => document.querySelector(error) ||
    /\\d/.test([...document.querySelectorAll(prompt)].at(-1).textContent)"""
HANDLE = ".noUi-handle, .ui-slider-handle"  # of a slider, in ipywidgets 8 and 7
SLIDER = "import ipywidgets\nipywidgets.interact(lambda x: print('square:', x**2), x=(0, 10));"
sync_api.expect.set_options(timeout=60_000)


@pytest.fixture(scope="module")
def browser():
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("neither Chromium nor Chrome is installed, so nothing is tried in a browser")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program)  # without its sandbox
        yield chromium
        chromium.close()


@pytest.fixture(scope="module", params=FRONTS)
def server(browser, request, tmp_path_factory):
    """Jupyter in a folder with what a user needs: notebook 06, without outputs, and another with a slider."""
    python = sys.executable if request.param == "jupyterlab" else os.environ.get("CLASSIC_PYTHON")
    if not python:
        pytest.skip("CLASSIC_PYTHON names no environment with the classic notebook and ipywidgets 7.7")
    folder = tmp_path_factory.mktemp(request.param)
    shutil.copytree(ROOT / "assets", folder / "assets")
    shutil.copy(ROOT / "helpers.py", folder)
    overrides = folder / "config" / "labconfig" / "default_setting_overrides.json"
    overrides.parent.mkdir(parents=True)
    overrides.write_text(json.dumps(SETTINGS))
    (folder / "notebooks").mkdir()
    notebook = nbformat.read(ROOT / "notebooks" / "06_predict.ipynb", 4)
    for cell in notebook.cells:
        cell.update({"outputs": [], "execution_count": None} if cell.cell_type == "code" else {})
    nbformat.write(notebook, folder / "notebooks" / "06_predict.ipynb")
    notebook.cells = [nbformat.v4.new_code_cell(SLIDER)]
    nbformat.write(notebook, folder / "notebooks" / "slider.ipynb")
    places = {"WORKSPACE": "results", "JUPYTER_CONFIG_DIR": "config", "JUPYTER_RUNTIME_DIR": "runtime"}
    environment = os.environ | {name: str(folder / place) for name, place in places.items()}
    environment.pop("MPLBACKEND", None)  # of the tests; with it, a slider's figure is not shown
    options = f"--no-browser --allow-root --ServerApp.port=0 --NotebookNotary.data_dir={folder / 'runtime'}"
    command, log = [python, "-m", request.param, *options.split()], folder / "log.txt"
    with open(log, "w") as file:
        started = subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=file)
    try:
        until = time.monotonic() + 120
        while not (found := re.search(r"(http://127\.\S+?/)\S*token=(\w+)", log.read_text())):
            assert started.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        yield SimpleNamespace(folder=folder, url=found[1], token=found[2], **FRONTS[request.param])
    finally:
        if started.poll() is None:
            family = [psutil.Process(started.pid), *psutil.Process(started.pid).children(recursive=True)]
            started.terminate()  # it ends its kernels, too
            for process in psutil.wait_procs(family, timeout=30)[1]:
                process.kill()
            started.wait()


@pytest.fixture
def run_all(browser, server):
    """A function that opens a notebook, runs all of its cells and gives the page."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(60_000)

    def run(name):
        page.goto(server.url + server.page.format(f"notebooks/{name}", server.token))
        page.locator(server.ready).first.wait_for()
        for item in server.run_all:
            page.locator(item).click()
        page.wait_for_function(DONE, arg=[server.prompt, server.error], timeout=300_000)
        sync_api.expect(page.locator(server.error)).to_have_count(0, timeout=1000)
        return page

    yield run
    page.close()


def test_a_slider_changes_what_is_printed(run_all):
    page = run_all("slider.ipynb")
    page.get_by_text("square: 25").wait_for()
    page.locator(HANDLE).press("ArrowRight")
    page.get_by_text("square: 36").wait_for()


def test_sliders_move_pictures_and_two_photos_get_their_answer(run_all, server, sample, tmp_path):
    page = run_all("06_predict.ipynb")
    for cell in page.locator(server.cell, has=page.locator(HANDLE)).all():
        before = cell.locator("img").last.get_attribute("src")
        cell.locator(HANDLE).first.press("ArrowRight")
        sync_api.expect(cell.locator("img").last).not_to_have_attribute("src", before)

    cell = page.locator(server.cell, has=page.locator(".widget-upload"))
    pictures, files = cell.locator("img").count(), {*server.folder.glob("results/**/*.png")}
    with zipfile.ZipFile(sample) as archive:
        for number, name in enumerate(("bg/bg001.jpeg", "bg_fg/bg001_fg002_01.jpeg")):
            photo = tmp_path / Path(name).name
            Image.open(archive.open(name)).resize((320, 240)).save(photo)
            with page.expect_file_chooser() as chooser:
                cell.locator(".widget-upload").nth(number).click()
            chooser.value.set_files(photo)
            sync_api.expect(cell.locator(".widget-upload").nth(number)).to_contain_text("(1)")
    cell.get_by_role("button", name="Predict", exact=True).click()
    sync_api.expect(cell.locator("img")).to_have_count(pictures + 1)
    sync_api.expect(page.locator(server.error)).to_have_count(0, timeout=1000)

    depth, mask = map(Image.open, sorted({*server.folder.glob("results/**/*.png")} - files))
    assert Path(depth.filename).stem.endswith("_depth") and Path(mask.filename).stem.endswith("_mask")
    assert depth.size == mask.size == (320, 240) and mask.getextrema() == (0, 255)
