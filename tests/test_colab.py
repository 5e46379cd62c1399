"""Plays Google Colab: a lone notebook in an empty folder, a Drive that is mounted or refused, GitHub in a folder."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import helpers
from helpers import data_zip, drive_report, fetch, in_colab, workspace

ROOT = Path(__file__).resolve().parents[1]


def code_of(name):
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


SETUP = code_of("01_data.ipynb")[0]
REPOSITORY = SETUP.split('REPOSITORY = "')[1].split('"')[0]
NAME = REPOSITORY.split("/")[1]

# In place of google.colab.drive, with the signature of the real one. The mountpoint is a folder that a test must not
# make, so the stand-in makes another and points helpers to it.
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
    """A folder that stands for https://github.com/, with the working tree as the project's one commit."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    folder = tmp_path_factory.mktemp("github")
    tree = folder / REPOSITORY
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tree / name)
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    commit = ["commit", "--quiet", "--no-verify", "-m", "all"]
    for command in (["init", "--quiet"], ["add", "--all"], [*identity, *commit]):
        subprocess.run(["git", *command], cwd=tree, check=True)
    return folder


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Nothing set that tells a notebook where it is; GitHub out of reach. Gives the folder that it is in."""
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
    place = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    return ["".join(output.text for output in cell.outputs if output.get("name") == "stdout") for cell in notebook.cells]


def test_a_notebook_runs_from_an_empty_folder_and_what_it_makes_is_found_by_the_next_machine(
    colab, machine, tmp_path
):
    options = "'first', size=16, model='resunet_lite', epochs=1, max_train=16, max_test=4"
    train = f"from helpers import Config, run, drive_report\nrun(Config({options}))\nprint(drive_report())"
    notebook = code_of("01_data.ipynb")
    *_, where, first = execute(machine, [*notebook, "import helpers\nprint(helpers.__file__, helpers.workspace())", train])
    assert where.split() == [str(machine / NAME / "helpers.py"), str(machine / NAME / "runs")]
    assert os.listdir(machine) == [NAME]
    assert (tmp_path / "consent.txt").read_text() == "asked\n"
    assert "epoch 1  loss" in first and "Not there" not in first
    assert (tmp_path / "drive" / "MyDrive" / "mask-and-depth" / "first" / "results.json").is_file()
    shutil.rmtree(machine)
    machine.mkdir()
    *_, second = execute(machine, [SETUP, train])
    assert "finished before" in second and "epoch" not in second


@pytest.mark.parametrize("refusal", [
    "raise NotImplementedError('Mounting drive is unsupported in this environment.')",
    "raise type('MessageError', (Exception,), {})('Error: credential propagation was unsuccessful')",
])  # fmt: skip
def test_without_consent_results_stay_local_and_a_line_says_so(colab, machine, tmp_path, refusal):
    colab(refusal)
    ask = "import helpers\nprint(helpers.workspace())\nprint(helpers.workspace())\nprint(helpers.drive_report())"
    line, *folders, report = execute(machine, [SETUP, ask])[-1].splitlines()
    assert "Google Drive is not available" in line and refusal.split("'")[-2] in line
    assert folders == [str(machine / NAME / "runs")] * 2 and Path(folders[0]).is_dir()
    assert report.startswith("Nothing is copied to Google Drive.") and "goes with this machine: download it" in report
    assert (tmp_path / "consent.txt").read_text() == "asked\n"


def test_setup_clones_once(colab, machine):
    execute(machine, [SETUP])
    (machine / NAME / "mark.txt").touch()
    *_, printed = execute(machine, [SETUP, "import helpers\nprint(helpers.__file__)"])
    assert printed.strip() == str(machine / NAME / "helpers.py") and (machine / NAME / "mark.txt").exists()


def test_setup_finds_the_project_around_a_notebook_and_stops_where_there_is_neither_it_nor_github(machine):
    before = sorted(os.listdir(ROOT / "notebooks"))
    *_, printed = execute(ROOT / "notebooks", [SETUP, "import helpers\nprint(helpers.__file__, helpers.in_colab())"])
    assert printed.split() == [str(ROOT / "helpers.py"), "False"]
    assert sorted(os.listdir(ROOT / "notebooks")) == before
    with pytest.raises(Exception, match="CalledProcessError"):
        execute(machine, [SETUP])


# In this process


@pytest.mark.parametrize("shell, variable, expected", [
    ("<google.colab._shell.Shell object>", "", True),
    ("<google.colab._shell.Shell object>", "KAGGLE_KERNEL_RUN_TYPE", False),  # Kaggle's is made of Colab's
    ("<ipykernel.zmqshell.ZMQInteractiveShell object>", "", False),
    (None, "", False),
])  # fmt: skip
def test_colab_is_told_by_its_shell_and_kaggle_is_not_taken_for_it(monkeypatch, shell, variable, expected):
    monkeypatch.setattr(helpers, "get_ipython", lambda: shell)
    if variable:
        monkeypatch.setenv(variable, "Interactive")
    assert in_colab() == expected


def test_the_workspace_is_what_the_variable_says_and_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(helpers, "ROOT", tmp_path / "project")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for given, expected in (("", "project/runs"), ("mine", "project/mine"), ("~/a", "home/a"), (tmp_path / "b", "b")):
        monkeypatch.setenv("WORKSPACE", str(given))
        assert workspace() == tmp_path / expected and workspace().is_dir()
    assert fetch("some.txt") == tmp_path / "b" / "some.txt" and not fetch("some.txt").exists()
    assert drive_report().startswith("Nothing is copied to Google Drive.") and "in the workspace" in drive_report()


def test_the_data_set_is_the_given_the_variables_the_made_or_the_sample_in_this_order(tmp_path, monkeypatch, sample):
    monkeypatch.setenv("WORKSPACE", str(tmp_path / "runs"))
    monkeypatch.delenv("DATA_ZIP", raising=False)
    monkeypatch.chdir(ROOT / "notebooks")
    assert data_zip() == sample
    for made, given in (("runs/scenes.zip", ""), ("variable.zip", ""), ("given.zip", tmp_path / "given.zip"), ("folder/a", "")):
        (tmp_path / made).parent.mkdir(exist_ok=True)
        (tmp_path / made).touch()
        assert data_zip(given) == tmp_path / made or made == "folder/a"
        monkeypatch.setenv("DATA_ZIP", str(tmp_path / "variable.zip") if made == "runs/scenes.zip" else "")
    assert data_zip(tmp_path / "folder") == tmp_path / "folder"
    assert data_zip("assets/sample.zip") == sample  # of the project, though notebooks start elsewhere
    with pytest.raises(FileNotFoundError, match=r"none\.zip: there is no such file. Give the path of a data set zip"):
        data_zip("none.zip")


def test_a_zip_on_drive_is_copied_to_the_local_disk_and_anew_when_it_has_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(helpers, "DRIVE", tmp_path / "drive")
    monkeypatch.setattr(helpers, "CACHE", tmp_path / "cache")
    there = tmp_path / "drive" / "MyDrive" / "data.zip"
    there.parent.mkdir(parents=True)
    for content in (b"one", b"two"):
        there.write_bytes(content)
        os.utime(there, (len(content), hash(content) % 10**6))
        assert tmp_path / "cache" in data_zip(there).parents and data_zip(there).read_bytes() == content
    os.utime(data_zip(there).parent / "data.zip")
