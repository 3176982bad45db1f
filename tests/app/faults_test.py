"""Faults of the machine and of people: locks, kills at random moments, runs of earlier versions."""

import errno
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from command_line import call, one_line
from processes import HOLDER

from jaxrobust.app import files, run_folder, trainer
from jaxrobust.app.config import InputError, to_json
from jaxrobust.app.recipe import get_recipe

# TensorBoard's writer and Orbax warn about themselves.
pytestmark = pytest.mark.filterwarnings("default")

ROOT = pathlib.Path(__file__).parents[2]
STORED = pathlib.Path(__file__).with_name("stored_run.zip")
"""A run of version 0.1.0 on 40 digits, with logits of its best epoch. It is never made anew."""


@pytest.fixture(name="folder")
def _folder(tmp_path):
    """The folder of a run that is not yet begun."""
    run_folder.claim_run(tmp_path / "run", get_recipe("digits").run("both", 0))
    return tmp_path / "run"


def test_a_second_command_is_refused_while_the_first_lives(folder, capsys):
    with subprocess.Popen([sys.executable, "-c", HOLDER, folder / "config.json"],
                          stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"locked\n"
        capsys.readouterr()
        for more in ((), ("--resume",)):
            assert call("train", "digits/both", "--out", folder, *more) == 2
            assert one_line(capsys) == (f"error: Another command is training in {folder}. Wait for "
                                        "its end, or stop it first.")
        first.kill()
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


def test_a_run_stored_by_the_first_version_is_loaded(digits, tmp_path):
    shutil.unpack_archive(STORED, tmp_path)
    expected = files.read_json(tmp_path / "expected.json")
    run = trainer.load_run(tmp_path, run_folder.read_config(tmp_path), digits)
    assert run.epoch == expected["epoch"]
    logits = run.logits_fn(digits.test.images[:4].astype(np.float32) / np.float32(255))
    np.testing.assert_allclose(logits, np.float32(expected["logits"]), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_runs_killed_at_twenty_random_moments_end_with_the_same_bits(tmp_path):
    ended = subprocess.run(
        [sys.executable, ROOT / "results" / "reliability" / "faults.py", "--folder", tmp_path,
         "--points", "20"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"})
    assert ended.returncode == 0, ended.stdout
    rows = files.read_lines(tmp_path / "trials.jsonl")
    assert sum(len(row["kills"]) for row in rows) >= 20
    assert not any(row["differ"] for row in rows)
