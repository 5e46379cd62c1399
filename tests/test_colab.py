"""Plays Google Colab: a notebook in an empty folder, a Drive that is there or refused, GitHub in a folder."""

import os
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import helpers
from helpers import ROOT, data_zip, drive_report, fetch, in_colab, workspace

CELLS = nbformat.read(ROOT / "notebooks" / "01_data.ipynb", as_version=4).cells
CODE = [cell.source for cell in CELLS if cell.cell_type == "code"]
SETUP = CODE[0]
REPOSITORY = SETUP.split('REPOSITORY = "')[1].split('"')[0]
NAME = REPOSITORY.split("/")[1]
WHERE = "import helpers\nprint(helpers.__file__, helpers.in_colab())"
SHELL = "<google.colab._shell.Shell object at 0x7c3a>"

# In place of google.colab.drive, with the signature of the real one. The mountpoint is a folder that a test
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
"""


@pytest.fixture(scope="module")
def github(tmp_path_factory):
    """A folder that stands for https://github.com/, with the working tree as the project's one commit."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    folder = tmp_path_factory.mktemp("github")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / REPOSITORY / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / REPOSITORY / name)
    identity = "-c user.name=test -c user.email=test@example.org -c commit.gpgsign=false"
    for command in ("init --quiet", "add --all", f"{identity} commit --quiet --no-verify -m all"):
        subprocess.run(["git", *command.split()], cwd=folder / REPOSITORY, check=True)
    return folder


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Nothing set that tells a notebook where it is; GitHub out of reach. Gives the folder that it is in."""
    for name in list(os.environ):
        if name in ("WORKSPACE", "DATA_ZIP", "PYTHONPATH", "MPLBACKEND") or name.startswith("KAGGLE"):
            monkeypatch.delenv(name)
    redirect(monkeypatch, tmp_path / "no such folder")
    (tmp_path / "content").mkdir()
    return tmp_path / "content"


def redirect(monkeypatch, folder):
    """Makes git look for https://github.com/ in a folder."""
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", f"url.{folder.as_uri()}/.insteadOf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "https://github.com/")


@pytest.fixture
def colab(machine, github, tmp_path, monkeypatch):
    """That machine as Colab: shell, Drive and GitHub. Gives a function that says what becomes of consent."""
    redirect(monkeypatch, github)
    for name in ("FAKE_DRIVE", "PYTHONPATH", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    startup = tmp_path / "IPYTHONDIR" / "profile_default" / "startup" / "00.py"
    package = tmp_path / "PYTHONPATH" / "google" / "colab"
    startup.parent.mkdir(parents=True)
    startup.write_text(f"type(get_ipython()).__str__ = lambda self: {SHELL!r}")
    package.mkdir(parents=True)
    (package / "__init__.py").touch()

    def consent(line="pass"):
        (package / "drive.py").write_text(DRIVE.format(consent=line))

    consent()
    return consent


def execute(folder, *cells) -> list[str]:
    """Runs the cells in a new kernel that starts in the folder; gives what each printed."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    place = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=1200, kernel_name="python3", resources=place).execute()
    outputs = [[one for one in cell.outputs if one.get("name") == "stdout"] for cell in notebook.cells]
    return ["".join(one.text for one in some) for some in outputs]


def test_a_notebook_runs_from_an_empty_folder_and_the_next_machine_finds_its_run(colab, machine, tmp_path):
    options = "'first', size=16, model='resunet_lite', epochs=1, max_train=16, max_test=4"
    train = f"from helpers import Config, run, drive_report\nrun(Config({options}))\nprint(drive_report())"
    where = "import helpers\nprint(helpers.__file__, helpers.workspace())"
    *_, places, first = execute(machine, *CODE, where, train)
    assert places.split() == [str(machine / NAME / "helpers.py"), str(machine / NAME / "runs")]
    assert os.listdir(machine) == [NAME] and (tmp_path / "consent.txt").read_text() == "asked\n"
    assert "epoch 1  train_loss" in first and "Not there" not in first
    assert (tmp_path / "FAKE_DRIVE" / "MyDrive" / "mask-and-depth" / "first" / "results.json").is_file()
    shutil.rmtree(machine)
    machine.mkdir()
    second = execute(machine, SETUP, train)[-1]
    assert "finished before" in second and "epoch" not in second


@pytest.mark.parametrize("error", ["NotImplementedError", "type('MessageError', (Exception,), {})"])
def test_without_consent_results_stay_local_and_a_line_says_so(colab, machine, tmp_path, error):
    colab(f"raise {error}('no credentials')")
    ask = "from helpers import *\nprint(workspace())\nprint(workspace(), drive_report(), sep='\\n')"
    line, *folders, report = execute(machine, SETUP, ask)[-1].splitlines()
    assert "Google Drive is not available (no credentials)" in line
    assert folders == [str(machine / NAME / "runs")] * 2 and Path(folders[0]).is_dir()
    assert report.startswith("Nothing is copied to Google Drive.") and "goes with this machine" in report
    assert (tmp_path / "consent.txt").read_text() == "asked\n"


def test_setup_clones_once(colab, machine):
    execute(machine, SETUP)
    (machine / NAME / "mark.txt").touch()
    assert execute(machine, SETUP, WHERE)[-1].split() == [str(machine / NAME / "helpers.py"), "True"]
    assert (machine / NAME / "mark.txt").exists()


def test_setup_finds_the_project_around_a_notebook_and_stops_where_there_is_neither_it_nor_github(machine):
    before = sorted(os.listdir(ROOT / "notebooks"))
    assert execute(ROOT / "notebooks", SETUP, WHERE)[-1].split() == [str(ROOT / "helpers.py"), "False"]
    assert sorted(os.listdir(ROOT / "notebooks")) == before
    with pytest.raises(Exception, match="CalledProcessError"):
        execute(machine, SETUP)


@pytest.mark.parametrize("shell", [SHELL, "<ipykernel.zmqshell.ZMQInteractiveShell object>", None])
@pytest.mark.parametrize("kaggle", [False, True])  # which sets Colab's variables, and may have its shell
def test_colab_is_told_by_its_shell_and_kaggle_is_not_taken_for_it(monkeypatch, shell, kaggle):
    monkeypatch.setattr(helpers, "get_ipython", lambda: shell)
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    if kaggle:
        monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    assert in_colab() == (shell == SHELL and not kaggle)


def test_the_workspace_is_what_the_variable_says_and_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(helpers, "ROOT", tmp_path / "project")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    places = {"": "project/runs", "mine": "project/mine", "~/a": "home/a", tmp_path / "b": "b"}
    for given, made in places.items():
        monkeypatch.setenv("WORKSPACE", str(given))
        assert workspace() == tmp_path / made and workspace().is_dir()
    assert fetch("some.txt") == tmp_path / "b" / "some.txt" and not fetch("some.txt").exists()
    assert "Nothing is copied to Google Drive. What was made is in the workspace" in drive_report()


def test_the_data_are_the_given_or_the_variables_or_notebook_00s_or_the_sample(tmp_path, monkeypatch, sample):
    monkeypatch.setenv("WORKSPACE", str(tmp_path))
    monkeypatch.delenv("DATA_ZIP", raising=False)
    monkeypatch.chdir(ROOT / "notebooks")
    assert data_zip() == data_zip("assets/sample.zip") == sample  # of the project, wherever one starts
    for name in ("scenes.zip", "scenes_quick.zip", "variable.zip", "given.zip"):
        (tmp_path / name).touch()
    assert data_zip() == tmp_path / "scenes_quick.zip"  # the other is of the full scale
    monkeypatch.setenv("DATA_ZIP", str(tmp_path / "variable.zip"))
    assert data_zip() == tmp_path / "variable.zip"
    assert data_zip(tmp_path / "given.zip") == tmp_path / "given.zip"
    assert data_zip(tmp_path) == tmp_path  # a folder may stand for a zip
    (tmp_path / "assets").mkdir()
    (here := tmp_path / "assets" / "sample.zip").touch()
    monkeypatch.chdir(tmp_path)
    assert data_zip("assets/sample.zip").samefile(here)  # before the project's of the same name
    monkeypatch.setenv("DATA_ZIP", "none.zip")  # no other is taken in its place
    for given in ("", "none.zip"):
        with pytest.raises(FileNotFoundError, match=r"none\.zip: there is no such file. Give the path"):
            data_zip(given)


def test_a_zip_on_drive_is_copied_to_the_local_disk_and_anew_when_it_has_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(helpers, "DRIVE", tmp_path / "drive")
    monkeypatch.setattr(helpers, "CACHE", tmp_path / "cache")
    there = tmp_path / "drive" / "MyDrive" / "data.zip"
    there.parent.mkdir(parents=True)
    for day, content in enumerate((b"one", b"two"), 1):
        there.write_bytes(content)
        os.utime(there, (day * 86400, day * 86400))
        copied = data_zip(there).stat().st_ino
        assert data_zip(there).read_bytes() == content and data_zip(there).is_relative_to(tmp_path / "cache")
        assert data_zip(there).stat().st_ino == copied  # once
