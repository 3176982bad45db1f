"""Folders of results: the commit they name, and places that cannot be written to."""

import errno
import os
import pathlib
import subprocess
import tempfile

import numpy as np
import pytest
from command_line import call, one_line

import jaxrobust
from jaxrobust.app import runs
from jaxrobust.app.config import InputError, to_json
from jaxrobust.app.recipe import get_recipe

VERSION = f"jaxrobust {jaxrobust.__version__}"


def git(folder, *arguments):
    return subprocess.run(
        ["git", "-C", str(folder), "-c", "user.name=A", "-c", "user.email=a@b.c", *arguments],
        check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(name="repository")
def _repository(tmp_path):
    """A repository at whose top a package of the name of ours is tracked."""
    package = tmp_path / "own" / "experiments"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    git(tmp_path / "own", "init", "--quiet")
    git(tmp_path / "own", "add", ".")
    git(tmp_path / "own", "commit", "--quiet", "--message", "first")
    return tmp_path / "own"


def test_the_commit_is_that_of_the_packages_own_repository(repository, monkeypatch):
    head = git(repository, "rev-parse", "HEAD")
    assert runs.commit(repository / "experiments") == head
    (repository / "experiments" / "__init__.py").write_text("changed = True\n")
    assert runs.commit(repository / "experiments") == f"{head} (with changes)"
    # As in a hook of another repository.
    monkeypatch.setenv("GIT_DIR", str(repository.parent / "elsewhere.git"))
    assert runs.commit(repository / "experiments") == f"{head} (with changes)"


@pytest.mark.parametrize("place", ["experiments", "lib/python3/site-packages/experiments"])
@pytest.mark.parametrize("tracked", [False, True])
def test_a_copy_in_another_repository_names_its_version(repository, place, tracked):
    """Be it installed beside the other project's code, or even committed with it."""
    other = repository.parent / "other"
    package = other / place
    package.mkdir(parents=True)
    (other / "README").write_text("Another project.")
    git(other, "init", "--quiet")
    git(other, "add", ".")
    git(other, "commit", "--quiet", "--message", "theirs")
    (package / "__init__.py").write_text("")
    if tracked and place != "experiments":
        git(other, "add", ".")
        git(other, "commit", "--quiet", "--message", "vendored")
    assert runs.commit(package) == VERSION


def test_outside_git_the_commit_is_the_version(tmp_path, monkeypatch):
    assert runs.commit(tmp_path) == VERSION
    monkeypatch.setenv("PATH", str(tmp_path))  # There is no git at all.
    assert runs.commit(pathlib.Path(runs.__file__).parent) == VERSION


COMMANDS = {
    "train": ("train", "digits/both"), "trains": ("train", "digits/both", "--seeds", "0", "1"),
    "sweep": ("sweep", "digits/robust", "--over", "robust.lam=0.1,1"),
    "reproduce": ("reproduce", "digits"), "targets": ("reproduce", "table1", "--scale", "tiny"),
    "figures": ("figures", "run"), "report": ("report", "run", "run2"), "bench": ("bench",),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("out", ["taken", "taken/deeper"])
def test_a_file_where_a_folder_is_to_be_is_one_line(command, out, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("taken").write_text("precious")
    assert call(*COMMANDS[command], "--out", out) == 2
    assert "taken is a file" in one_line(capsys)
    assert pathlib.Path("taken").read_text() == "precious"


@pytest.mark.parametrize("arguments", [
    ("export", "run", "--out", "taken/model.stablehlo"), ("export", "run", "--out", "folder.pth"),
    ("perturb", "a.png", "--out", "taken/a.png"), ("perturb", "a.png", "--out", "folder.png"),
    ("prepare", "cifar10", "--data-dir", "taken"),
])
def test_a_file_that_cannot_be_written_is_one_line(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("taken").write_text("precious")
    for name in ("folder.pth", "folder.png"):
        pathlib.Path(name).mkdir()
    assert call(*arguments) == 2
    said = one_line(capsys)
    assert "taken is a file" in said or "it is a folder" in said


@pytest.mark.parametrize("command", [
    "evaluate", "curvature", "steps", "theory", "sharpness", "figures", "train"])
def test_a_read_only_place_is_one_line_before_the_work(command, tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(to_json(get_recipe("digits").run("both", 0)))

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    arguments = (("train", "digits/both", "--out", tmp_path / "run") if command == "train" else
                 (command, tmp_path / "run"))
    assert call(*arguments) == 2
    assert one_line(capsys) == (
        f"error: Cannot write {tmp_path / 'run'}: Read-only file system.")


def test_a_place_is_looked_at_without_a_trace(tmp_path):
    runs.require_writable(tmp_path / "a" / "b")
    runs.require_writable_file(tmp_path / "a" / "b" / "c.txt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [
    lambda path: runs.write_text(path, "new"), lambda path: runs.write_json(path, 1),
    lambda path: runs.write_arrays(path, {"new": np.ones(1)})])
def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_the_old_one(
        write, tmp_path, monkeypatch):
    path = tmp_path / "result"
    path.write_text("old")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match=r"^Cannot write \S+result: No space left on device\.$"):
        write(path)
    assert path.read_text() == "old" and [path] == list(tmp_path.iterdir())


def test_a_checkpoint_that_the_disk_has_no_room_for_is_an_error_that_names_its_place(tmp_path):
    with pytest.raises(InputError, match=r"^Cannot write \S+run: No space left on device\.$"):
        with runs.writing(tmp_path / "run"):  # As TensorStore puts it.
            raise ValueError("RESOURCE_EXHAUSTED: Error writing: Failed to write 9 bytes to file "
                             "20: No space left on device [os_error_code='28']")
    with pytest.raises(ValueError, match="^another$"), runs.writing(tmp_path):
        raise ValueError("another")


def test_a_log_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    (tmp_path / "log").mkdir()
    with pytest.raises(InputError, match=r"^Cannot write \S+log: Is a directory\.$"):
        runs.append_line(tmp_path / "log", {})
