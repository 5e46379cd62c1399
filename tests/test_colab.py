"""Plays Google Colab: a lone notebook in an empty folder, a Drive that is mounted or refused, GitHub in a local folder."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
SETUP = "".join(
    next(
        cell["source"]
        for cell in json.loads((ROOT / "notebooks" / "01_data.ipynb").read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "code"
    )
)
REPOSITORY = SETUP.split('REPOSITORY = "')[1].split('"')[0]
NAME = REPOSITORY.split("/")[1]

# In place of google.colab.drive, with the signature of the real one. The mountpoint is a folder of this machine that a test
# must not make, so the stand-in makes another and points helpers to it.
DRIVE = """
import os, pathlib, sys

def mount(mountpoint, force_remount=False, timeout_ms=120000, readonly=False):
    assert mountpoint == "/content/drive"
    drive = pathlib.Path(os.environ["FAKE_DRIVE"])
    drive.parent.joinpath("consent.txt").open("a").write("asked\\n")
    {consent}
    drive.joinpath("MyDrive").mkdir(parents=True, exist_ok=True)
    sys.modules["helpers"].DRIVE = drive
    print("Mounted at", mountpoint)

def flush_and_unmount(timeout_ms=24 * 60 * 60 * 1000):
    pass
"""
STARTUP = """
type(get_ipython()).__str__ = lambda self: "<google.colab._shell.Shell object at 0x7c3a>"
"""


@pytest.fixture(scope="module")
def github(tmp_path_factory):
    """A folder that stands for https://github.com/, with the working tree as it is now as the project's one commit."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    folder = tmp_path_factory.mktemp("github")
    tree = folder / REPOSITORY
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tree / name)
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "--quiet"], ["add", "--all"], [*identity, "commit", "--quiet", "--no-verify", "-m", "all"]):
        subprocess.run(["git", *command], cwd=tree, check=True)
    return folder


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Nothing set that would tell a notebook where it is; GitHub out of reach. Gives the folder the notebook is in."""
    for name in list(os.environ):
        if name in ("WORKSPACE", "DATA_ZIP", "PYTHONPATH", "MPLBACKEND") or name.startswith("KAGGLE"):
            monkeypatch.delenv(name)
    redirect(monkeypatch, tmp_path / "no such folder")
    content = tmp_path / "content"
    content.mkdir()
    return content


def redirect(monkeypatch, folder):
    """Makes git look for https://github.com/ in a folder."""
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", f"url.{folder.as_uri()}/.insteadOf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "https://github.com/")


@pytest.fixture
def colab(machine, github, tmp_path, monkeypatch):
    """That machine as Colab: its shell, its Drive and GitHub. Gives a function that says what happens to consent."""
    redirect(monkeypatch, github)
    monkeypatch.setenv("FAKE_DRIVE", str(tmp_path / "drive"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    startup = tmp_path / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "00_colab.py").write_text(STARTUP)
    package = tmp_path / "packages" / "google" / "colab"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()

    def consent(line="pass"):
        (package / "drive.py").write_text(DRIVE.format(consent=line))

    consent()
    return consent


def execute(folder, cells) -> list[str]:
    """Runs the cells in a new kernel that starts in the folder; gives what each printed."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    return ["".join(output.text for output in cell.outputs if output.get("name") == "stdout") for cell in notebook.cells]


def code_of(name):
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def test_a_notebook_runs_from_an_empty_folder_with_its_results_on_drive(colab, machine, tmp_path):
    *_, where = execute(machine, [*code_of("01_data.ipynb"), "import helpers\nprint(helpers.__file__, helpers.workspace())"])
    helpers_file, workspace = where.split()
    assert Path(helpers_file) == machine / NAME / "helpers.py"
    assert Path(workspace) == tmp_path / "drive" / "MyDrive" / NAME and Path(workspace).is_dir()
    assert (tmp_path / "consent.txt").read_text() == "asked\n"
    assert os.listdir(machine) == [NAME]


def test_a_run_lands_on_drive_and_is_found_by_the_next_machine(colab, machine, tmp_path):
    options = "size=16, model='dual_stream', epochs=1, max_train=16, max_test=4"
    train = f"from helpers import Config, run\nrun(Config('first', {options}))"
    *_, first = execute(machine, [SETUP, train])
    assert "epoch 1/1" in first
    assert (tmp_path / "drive" / "MyDrive" / NAME / "first" / "results.json").is_file()
    shutil.rmtree(machine)
    machine.mkdir()
    *_, second = execute(machine, [SETUP, train])
    assert "finished before" in second and "epoch" not in second


@pytest.mark.parametrize(
    "refusal",
    [
        "raise NotImplementedError('Mounting drive is unsupported in this environment.')",
        "raise ValueError('mount failed')",
        "raise type('MessageError', (Exception,), {})('Error: credential propagation was unsuccessful')",
    ],
)
def test_without_consent_results_stay_local_and_a_line_says_so(colab, machine, tmp_path, refusal):
    colab(refusal)
    *_, printed = execute(machine, [SETUP, "import helpers\nprint(helpers.workspace())\nprint(helpers.workspace())"])
    line, *folders = printed.splitlines()
    assert "Google Drive is not available" in line and refusal.split("'")[-2] in line
    assert folders == [str(machine / NAME / "runs")] * 2 and Path(folders[0]).is_dir()
    assert (tmp_path / "consent.txt").read_text() == "asked\n"


def test_setup_clones_once(colab, machine):
    execute(machine, [SETUP])
    (machine / NAME / "mark.txt").touch()
    *_, printed = execute(machine, [SETUP, "import helpers\nprint(helpers.__file__)"])
    assert printed.strip() == str(machine / NAME / "helpers.py") and (machine / NAME / "mark.txt").exists()


def test_setup_finds_the_project_around_a_notebook_without_cloning(machine):
    before = sorted(os.listdir(ROOT / "notebooks"))
    *_, printed = execute(ROOT / "notebooks", [SETUP, "import helpers\nprint(helpers.__file__, helpers.in_colab())"])
    assert printed.split() == [str(ROOT / "helpers.py"), "False"]
    assert sorted(os.listdir(ROOT / "notebooks")) == before


def test_setup_stops_where_there_is_neither_project_nor_github(machine):
    with pytest.raises(Exception, match="CalledProcessError"):
        execute(machine, [SETUP])
