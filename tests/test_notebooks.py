"""The notebooks as committed: one form, run from top to bottom, nothing of the machine they ran on."""

import ast
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import onnxruntime
import pytest
import torch
from test_colab import execute

from helpers import MODELS, ROOT, Config, ZipDataset, load_model, to_float

README = (ROOT / "README.md").read_text(encoding="utf-8")
NOTEBOOKS = {path.name: nbformat.read(path, 4) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
MACHINE = re.compile(r"(?<![\w.])/(?:home|root|work|tmp|Users|mnt|var|private)/|\b[A-Z]:\\\\?\w")


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code(notebook) for output in cell.outputs]


def texts(value):
    """All strings in an output, but for pictures."""
    if isinstance(value, dict):
        return texts([of for key, of in value.items() if not key.startswith("image/")])
    return [text for of in value for text in texts(of)] if isinstance(value, list) else [str(value)]


def definitions(source):
    lines = [line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))]
    nodes = ast.parse("\n".join(lines)).body
    return [node for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)]


def defined(notebook, *wanted, **names):
    """The last of these functions and classes that a notebook defines, without running the notebook."""
    nodes = [node for cell in code(notebook) for node in definitions(cell.source) if node.name in wanted]
    exec(compile(ast.Module(nodes, []), "notebook", "exec"), names)
    return names[wanted[-1]]


@pytest.fixture(params=NOTEBOOKS)
def name(request):
    return request.param


@pytest.fixture
def notebook(name):
    return NOTEBOOKS[name]


def test_setup_is_the_same_in_all_and_leaves_the_packages_of_colab_alone(notebook):
    setup = code(notebook)[0].source
    assert [name[:3] for name in NOTEBOOKS] == [f"{i:02}_" for i in range(7)]
    assert setup == code(NOTEBOOKS["01_data.ipynb"])[0].source
    assert not re.search(r"\b(numpy|pandas|torch|torchvision)\b", setup)


def test_the_first_cell_has_a_title_and_the_badge_that_opens_this_notebook(notebook, name):
    first = notebook.cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    repository = re.search(r'^REPOSITORY = "([\w.-]+/[\w.-]+)"$', code(notebook)[0].source, re.MULTILINE)[1]
    links = re.findall(r"https://colab\.research\.google\.com/github/[^)\"\s]+", first.source)
    assert links == [f"https://colab.research.google.com/github/{repository}/blob/main/notebooks/{name}"]


def test_it_was_run_from_top_to_bottom_without_errors_or_warnings(notebook):
    counts = [cell.execution_count for cell in code(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    kinds = Counter(output.output_type for output in outputs(notebook))
    assert not kinds["error"] and kinds["display_data"] + kinds["execute_result"] > 0
    assert [text for text in texts(outputs(notebook)) if "Warning:" in text] == []


def test_its_figures_are_pictures_under_a_megabyte_and_its_widgets_leave_no_state(notebook, name):
    assert "widgets" not in notebook.metadata and (ROOT / "notebooks" / name).stat().st_size < 1_000_000
    for data in (output.get("data", {}) for output in outputs(notebook)):
        assert not any("widget-view" in kind for kind in data)
        assert "<Figure" not in data.get("text/plain", "") or any(kind.startswith("image/") for kind in data)


def test_no_cell_is_longer_than_a_screen_and_text_introduces_them(notebook):
    assert [cell.source[:60] for cell in code(notebook) if len(cell.source.splitlines()) > 45] == []
    assert len(notebook.cells) >= 1.5 * len(code(notebook))


def test_no_path_of_a_machine_in_outputs_and_source(notebook):
    assert all(map(MACHINE.search, ["/home/me/x", "at /tmp/a.zip", "'/work/x'", r"C:\Users\me"]))
    assert [text for text in texts(outputs(notebook)) if MACHINE.search(text)] == []
    assert [1 for cell in notebook.cells if re.search(r"/(home|root|work|tmp|Users)/", cell.source)] == []


def test_nothing_is_defined_twice():
    sources = [cell.source for notebook in NOTEBOOKS.values() for cell in code(notebook)]
    sources.append((ROOT / "helpers.py").read_text(encoding="utf-8"))
    counts = Counter(node.name for source in sources for node in definitions(source))
    assert len(counts) > 60 and [name for name, count in counts.items() if count > 1] == []


def test_what_must_not_change_is_compared(notebook):
    marked = [cell for cell in code(notebook) if "NBVAL_CHECK_OUTPUT" in cell.source]
    assert marked and all(cell.outputs for cell in marked)


def test_one_command_names_the_repository_everywhere(tmp_path):
    """The command that README gives and the workflow runs."""
    old = re.search(r"google\.com/github/([\w.-]+/[\w.-]+)/blob", README)[1]
    command = re.search(r"^ +NEW=you/your-fork; (OLD=.*)$", README, re.MULTILINE)[1]
    assert command in (ROOT / ".github" / "workflows" / "fork.yml").read_text(encoding="utf-8")
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks", ignore=shutil.ignore_patterns(".*"))
    shutil.copy(ROOT / "README.md", tmp_path)
    subprocess.run(["bash", "-c", f"NEW=you/your-fork; {command}"], cwd=tmp_path, check=True)
    files = [tmp_path / "README.md", *(tmp_path / "notebooks").glob("*.ipynb")]
    renamed = [file.read_text(encoding="utf-8") for file in files]
    assert all(old not in text and "github/you/your-fork/blob/main/notebooks/" in text for text in renamed)
    assert [text for text in renamed[1:] if 'REPOSITORY = \\"you/your-fork\\"' in text] == renamed[1:] != []


def test_readme_links_every_notebook_and_what_it_links_exists():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert {f"notebooks/{name}" for name in NOTEBOOKS} <= set(links)
    assert [link for link in links if not (ROOT / link).exists()] == []
    assert all(f"/blob/main/notebooks/{name})" in README for name in NOTEBOOKS)


def test_the_first_cell_and_readme_estimate_the_same_minutes_on_a_t4(notebook, name):
    said = re.search(rf"^.*notebooks/{name}\).*? s \| (\d+) \|", README, re.MULTILINE)[1]
    assert re.findall(r"estimated\s(\d+)\sminutes?\son\sa\sT4", notebook.cells[0].source) == [said]


def test_cells_may_be_run_twice_and_in_another_order():
    """Every cell twice in a row; then all but the setup once more, the last one first."""
    cells = [cell.source for cell in code(NOTEBOOKS["01_data.ipynb"])]
    execute(ROOT / "notebooks", *(cell for cell in cells for _ in (1, 2)), *cells[:0:-1])


@pytest.mark.parametrize("value", [
    {"my chair.JPG": {"metadata": {"name": "my chair.JPG"}, "content": b"bytes"}},  # ipywidgets 7, in Colab
    ({"name": "my chair.JPG", "content": memoryview(b"bytes")},),  # ipywidgets 8
], ids=["7", "8"])  # fmt: skip
def test_an_uploaded_photo_becomes_a_file(tmp_path, value):
    uploaded = defined(NOTEBOOKS["06_predict.ipynb"], "uploaded", Path=Path, folder=tmp_path)
    path = uploaded(SimpleNamespace(value=value, description="With the object"), "photo")
    assert path == tmp_path / "photo.jpg" and path.read_bytes() == b"bytes"
    with pytest.raises(ValueError, match="With the object"):
        uploaded(SimpleNamespace(value=type(value)(), description="With the object"), "photo")


def export(*given):
    names = {"torch": torch, "Path": Path, "load_model": load_model}
    return defined(NOTEBOOKS["06_predict.ipynb"], "Exported", "export", **names)(*given)


def test_exported_files_give_what_the_network_gives_at_any_size(tmp_path, sample):
    """Oracles: the network itself, and ONNX Runtime for what ONNX means."""
    files, batch = export("", tmp_path), to_float(ZipDataset(sample, 96).batch([0, 100, 200]))
    session, program = onnxruntime.InferenceSession(files[0]), torch.export.load(files[1]).module()
    for count, height, width in ((3, 96, 96), (1, 32, 64)):
        bg, fg_bg = (batch[kind][:count, :, :height, :width].contiguous() for kind in ("bg", "fg_bg"))
        with torch.no_grad():
            mask_logits, depth = load_model().cpu()(bg, fg_bg)
        expected = {"mask": 1 / (1 + np.exp(-mask_logits.double().numpy())), "depth": depth.numpy()}
        given = session.run(["mask", "depth"], {"bg": bg.numpy(), "fg_bg": fg_bg.numpy()})
        for one, (task, other) in zip(given, expected.items(), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)
            np.testing.assert_allclose(program(bg, fg_bg)[task].numpy(), other, rtol=0, atol=1e-4)
    assert not any(str(ROOT).encode() in file.read_bytes() for file in files)


def test_an_export_has_the_trained_task_alone(tmp_path):
    Config("masks", model="difference_unet", depth_loss=None).save(tmp_path / "config.json")
    torch.save(MODELS["difference_unet"]().state_dict(), tmp_path / "best.pt")
    session = onnxruntime.InferenceSession(export(tmp_path, tmp_path)[0])
    assert [one.name for one in session.get_outputs()] == ["mask"]
