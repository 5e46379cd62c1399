"""The notebooks as they are committed: one form, run from top to bottom, nothing of the machine they ran on."""

import ast
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MACHINE = re.compile(r"(?<![\w.])/(?:home|root|work|tmp|Users|mnt|var|private)/|\b[A-Z]:\\\\?\w")


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell):
    return "".join(cell["source"])


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def texts(value):
    """All strings in an output, but for pictures."""
    if isinstance(value, dict):
        return [text for key, part in value.items() if not key.startswith("image/") for text in texts(part)]
    if isinstance(value, list):
        return ["".join(value)] if all(isinstance(part, str) for part in value) else [t for part in value for t in texts(part)]
    return [value] if isinstance(value, str) else []


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.name)
def path(request):
    return request.param


@pytest.fixture(scope="module")
def notebook(path):
    return load(path)


def test_the_series_is_numbered_without_gaps():
    assert [path.name[:3] for path in NOTEBOOKS] == [f"{i:02}_" for i in range(len(NOTEBOOKS))] and len(NOTEBOOKS) == 7


def test_setup_is_the_same_in_all(notebook):
    assert source(code_cells(notebook)[0]) == source(code_cells(load(NOTEBOOKS[0]))[0])


def test_setup_leaves_the_packages_of_colab_alone(notebook):
    assert not re.search(r"\b(numpy|pandas|torch|torchvision)\b", source(code_cells(notebook)[0]))


def test_the_first_cell_has_a_title_and_the_badge_that_opens_this_notebook(notebook, path):
    first = source(notebook["cells"][0])
    assert notebook["cells"][0]["cell_type"] == "markdown" and first.startswith("# ")
    repository = re.search(r'^REPOSITORY = "([\w.-]+/[\w.-]+)"$', source(code_cells(notebook)[0]), re.MULTILINE)[1]
    links = re.findall(r"https://colab\.research\.google\.com/github/[^)\"\s]+", first)
    assert links == [f"https://colab.research.google.com/github/{repository}/blob/main/notebooks/{path.name}"]
    assert "https://colab.research.google.com/assets/colab-badge.svg" in first


def test_it_was_run_from_top_to_bottom(notebook):
    counts = [cell["execution_count"] for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))


def test_no_cell_failed(notebook):
    kinds = Counter(output["output_type"] for cell in code_cells(notebook) for output in cell["outputs"])
    assert not kinds["error"]
    assert kinds["display_data"] + kinds["execute_result"] > 0


def test_no_output_is_a_warning(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    assert [text for output in outputs for text in texts(output.get("text", "")) if "Warning:" in text] == []


def test_no_widget_state(notebook):
    assert "widgets" not in notebook["metadata"]
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    assert not any("widget-view" in kind for output in outputs for kind in output.get("data", {}))


def test_under_a_megabyte(path):
    assert path.stat().st_size < 1_000_000


def test_no_cell_is_longer_than_a_screen(notebook):
    assert [source(cell)[:60] for cell in code_cells(notebook) if len(source(cell).splitlines()) > 40] == []


def test_every_code_cell_but_the_first_ones_is_introduced_by_text(notebook):
    kinds = [cell["cell_type"] for cell in notebook["cells"]]
    assert kinds.count("markdown") >= kinds.count("code") / 2


@pytest.mark.parametrize("text", ["/home/me/x", "at /tmp/a.zip", "'/work/x'", r"C:\Users\me"])
def test_a_path_of_a_machine_is_recognised(text):
    assert MACHINE.search(text)


def test_no_path_of_a_machine_in_an_output(notebook):
    outputs = [text for cell in code_cells(notebook) for text in texts(cell["outputs"])]
    assert [text for text in outputs if MACHINE.search(text)] == []


def test_no_path_of_a_machine_in_the_source(notebook):
    assert [source(cell) for cell in notebook["cells"] if re.search(r"/(home|root|work|tmp|Users)/", source(cell))] == []


def definitions(text):
    lines = [line for line in text.splitlines() if not line.lstrip().startswith(("%", "!"))]
    return [node.name for node in ast.parse("\n".join(lines)).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]


def function(name, called, **names):
    """A function that a notebook defines, without running the notebook."""
    cells = map(source, code_cells(load(ROOT / "notebooks" / name)))
    trees = [ast.parse(text) for text in cells if f"def {called}(" in text]
    found = [node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == called]
    exec(compile(ast.Module(found, []), name, "exec"), names)
    return names[called]


def test_nothing_is_defined_twice():
    names = definitions((ROOT / "helpers.py").read_text(encoding="utf-8"))
    assert len(names) > 20
    for path in NOTEBOOKS:
        names += [name for cell in code_cells(load(path)) for name in definitions(source(cell))]
    assert [name for name, count in Counter(names).items() if count > 1] == []


def test_what_must_not_change_is_compared(notebook):
    """A notebook in which no output is compared would pass whatever it shows."""
    marked = [cell for cell in code_cells(notebook) if "NBVAL_CHECK_OUTPUT" in source(cell)]
    assert marked and all(cell["outputs"] for cell in marked)


def test_one_command_names_the_repository_everywhere(tmp_path):
    """The command that README gives and the workflow runs."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    old = re.search(r"colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/blob", readme)[1]
    command = re.search(r"^ +NEW=you/your-fork; (OLD=.*)$", readme, re.MULTILINE)[1]
    assert command in (ROOT / ".github" / "workflows" / "fork.yml").read_text(encoding="utf-8")
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks", ignore=shutil.ignore_patterns(".*"))
    shutil.copy(ROOT / "README.md", tmp_path)
    subprocess.run(["bash", "-c", command], cwd=tmp_path, env=os.environ | {"NEW": "you/your-fork"}, check=True)
    texts = [path.read_text(encoding="utf-8") for path in (tmp_path / "README.md", *(tmp_path / "notebooks").glob("*.ipynb"))]
    assert len(texts) == 1 + len(NOTEBOOKS)
    assert all(old not in text and "github/you/your-fork/blob/main/notebooks/" in text for text in texts)
    assert all('REPOSITORY = \\"you/your-fork\\"' in text for text in texts[1:])


def test_readme_links_every_notebook_and_what_it_links_exists():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", readme)
    assert {f"notebooks/{path.name}" for path in NOTEBOOKS} <= set(links)
    assert [link for link in links if not (ROOT / link).exists()] == []
    assert all(f"/blob/main/notebooks/{path.name})" in readme for path in NOTEBOOKS)


LONG = bool(os.environ.get("LONG_TESTS"))


BEST_WEIGHTS = """
import hashlib, helpers
files = [file for file in sorted(helpers.workspace().rglob("best.pt")) if "interrupted" not in str(file)]
print({str(file): hashlib.blake2b(file.read_bytes()).hexdigest() for file in files})
"""


@pytest.mark.parametrize("name", [path.name for path in NOTEBOOKS] if LONG else ["01_data.ipynb"])
def test_cells_may_be_run_twice_and_in_another_order(name):
    """Every cell twice in a row; then all but the setup once more, the last one first. What was trained stays as it was."""
    cells = [source(cell) for cell in code_cells(load(ROOT / "notebooks" / name))]
    twice = [cell for cell in cells for _ in (1, 2)]
    order = [*twice, BEST_WEIGHTS, *reversed(cells[1:]), BEST_WEIGHTS]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in order])
    NotebookClient(
        notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": ROOT / "notebooks"}}
    ).execute()
    before, after = (notebook.cells[place].outputs[0].text for place in (len(twice), -1))
    assert before == after and ("best.pt" in before or name[:2] in ("00", "01", "02", "06"))


def test_every_promise_in_the_readme_names_tests_that_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    promises = readme.partition("## What survives what")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in promises.splitlines() if line.startswith("| ")][1:]
    there = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    tests, files = re.findall(r"^def (test_\w+)", there, re.M), {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    assert len(rows) > 15
    for _, _, shown_by in rows:
        named = re.findall(r"`(\w+)`", shown_by)
        assert named or "](tests/test_" in shown_by
        assert [name for name in named if name not in files and not any(name in test for test in tests)] == []


@pytest.mark.parametrize(
    "value",
    [
        {"my chair.JPG": {"metadata": {"name": "my chair.JPG"}, "content": b"bytes"}},  # ipywidgets 7, in Colab
        ({"name": "my chair.JPG", "content": memoryview(b"bytes")},),  # ipywidgets 8
    ],
    ids=["7", "8"],
)
def test_an_uploaded_photo_becomes_a_file(tmp_path, value):
    (tmp_path / "06_predict").mkdir()
    uploaded = function("06_predict.ipynb", "uploaded", Path=Path, work_folder=lambda: tmp_path)
    path = uploaded(SimpleNamespace(value=value, description="With the object"), "photo")
    assert path == tmp_path / "06_predict" / "photo.jpg" and path.read_bytes() == b"bytes"


@pytest.mark.parametrize("value", [{}, ()])
def test_a_photo_that_was_not_chosen_is_asked_for(value):
    uploaded = function("06_predict.ipynb", "uploaded")
    with pytest.raises(ValueError, match="With the object"):
        uploaded(SimpleNamespace(value=value, description="With the object"), "photo")
