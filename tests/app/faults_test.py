"""Faults of the machine and of people: locks, full disks, folders that go, files that rot."""

import errno
import os
import subprocess
import sys

import pytest
from command_line import call, one_line

from jaxrobust.app import files, run_folder
from jaxrobust.app.config import InputError, to_json
from jaxrobust.app.recipe import get_recipe

# TensorBoard's writer and Orbax warn about themselves.
pytestmark = pytest.mark.filterwarnings("default")

HOLDER = ("import fcntl, sys, time; file = open(sys.argv[1], 'r+b'); "
          "fcntl.flock(file, fcntl.LOCK_EX); print('locked', flush=True); time.sleep(600)")


@pytest.fixture(name="folder")
def _folder(tmp_path):
    """The folder of a run that is not yet begun."""
    run_folder.claim_run(tmp_path / "run", get_recipe("digits").run("both", 0))
    return tmp_path / "run"


def test_a_second_command_is_refused_while_the_first_lives(folder, capsys):
    first = subprocess.Popen([sys.executable, "-c", HOLDER, folder / "config.json"],
                             stdout=subprocess.PIPE)
    assert first.stdout.readline() == b"locked\n"
    capsys.readouterr()
    for more in ((), ("--resume",)):
        assert call("train", "digits/both", "--out", folder, *more) == 2
        assert one_line(capsys) == (f"error: Another command is training in {folder}. Wait for its "
                                    "end, or stop it first.")
    first.kill()
    first.wait()
    with run_folder.locked(folder):  # A kill leaves no lock.
        with pytest.raises(InputError, match="Another command"), run_folder.locked(folder):
            pass
    with run_folder.locked(folder):
        pass
    assert (folder / "config.json").read_text() == to_json(get_recipe("digits").run("both", 0))


def test_a_file_system_without_locks_is_said(folder, capsys, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with run_folder.locked(folder):
        assert f"Note: {folder} cannot be locked (No locks available)" in capsys.readouterr().out
