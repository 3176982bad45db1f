"""Where results come from: the commit that they name."""

import pathlib
import subprocess

import pytest

import jaxrobust
from jaxrobust.app import provenance

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
    assert provenance.commit(repository / "experiments") == head
    (repository / "experiments" / "__init__.py").write_text("changed = True\n")
    assert provenance.commit(repository / "experiments") == f"{head} (with changes)"
    # As in a hook of another repository.
    monkeypatch.setenv("GIT_DIR", str(repository.parent / "elsewhere.git"))
    assert provenance.commit(repository / "experiments") == f"{head} (with changes)"


def test_a_process_names_the_commit_of_its_start_whatever_is_committed_meanwhile(monkeypatch):
    provenance.own_commit.cache_clear()
    monkeypatch.setattr(provenance, "commit", lambda: "at the start")
    first = provenance.describe()
    monkeypatch.setattr(provenance, "commit", lambda: "meanwhile")
    assert first["commit"] == provenance.describe()["commit"] == "at the start"
    provenance.own_commit.cache_clear()


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
    assert provenance.commit(package) == VERSION


def test_outside_git_the_commit_is_the_version(tmp_path, monkeypatch):
    assert provenance.commit(tmp_path) == VERSION
    monkeypatch.setenv("PATH", str(tmp_path))  # There is no git at all.
    assert provenance.commit(pathlib.Path(provenance.__file__).parent) == VERSION
