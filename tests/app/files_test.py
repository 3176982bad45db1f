"""Files of results: places that cannot be written to, and files replaced as a whole."""

import errno
import os
import pathlib
import tempfile
import time

import numpy as np
import pytest
from command_line import call, one_line

from jaxrobust.app import files
from jaxrobust.app.config import InputError, to_json
from jaxrobust.app.recipe import get_recipe

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
    files.require_writable(tmp_path / "a" / "b")
    files.require_writable_file(tmp_path / "a" / "b" / "c.txt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [
    lambda path: files.write_text(path, "new"), lambda path: files.write_json(path, 1),
    lambda path: files.write_arrays(path, {"new": np.ones(1)})])
@pytest.mark.parametrize("number, reason", [
    (errno.ENOSPC, "No space left on device"), (errno.EDQUOT, "Disk quota exceeded")])
def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_the_old_one(
        write, number, reason, tmp_path, monkeypatch):
    path = tmp_path / "result"
    path.write_text("old")

    def full(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match=rf"^Cannot write \S+result: {reason}\.$"):
        write(path)
    assert path.read_text() == "old" and [path] == list(tmp_path.iterdir())


def test_two_that_write_a_file_at_once_both_write_a_whole_one(tmp_path):
    path = tmp_path / "result"
    with files.replacing(path) as one:
        one.write_text("one")
        with files.replacing(path) as two:
            two.write_text("another")
        assert path.read_text() == "another"
    assert path.read_text() == "one" and [path] == list(tmp_path.iterdir())


def test_of_two_that_claim_a_folder_at_once_one_is_refused(tmp_path, monkeypatch):
    path, make = tmp_path / "run" / "config.json", files.make_folder

    def late(folder):
        monkeypatch.setattr(files, "make_folder", make)
        files.claim(path, "first")
        make(folder)

    monkeypatch.setattr(files, "make_folder", late)
    with pytest.raises(InputError, match=r"^Cannot write \S+config\.json: File exists\.$"):
        files.claim(path, "second")
    assert path.read_text() == "first" and [path] == list(path.parent.iterdir())


def test_what_a_kill_left_half_written_is_in_no_ones_way_and_is_removed_a_day_later(tmp_path):
    path = tmp_path / "config.json"
    for age in (0.9, 1.1):
        left = tmp_path / f"config.json.{age}.partial"
        left.write_text("{")
        os.utime(left, (time.time() - age * 24 * 3600,) * 2)
    other = tmp_path / "done.json.1.1.partial"
    files.claim(path, "{}")
    assert path.read_text() == "{}"
    assert {path, tmp_path / "config.json.0.9.partial"} == set(tmp_path.iterdir())
    path.unlink()
    other.write_text("precious")
    with pytest.raises(InputError, match="is not empty and holds no config.json"):
        files.claim(path, "{}")


def test_a_checkpoint_that_the_disk_has_no_room_for_is_an_error_that_names_its_place(tmp_path):
    with pytest.raises(InputError, match=r"^Cannot write \S+run: No space left on device\.$"):
        with files.writing(tmp_path / "run"):  # As TensorStore puts it.
            raise ValueError("RESOURCE_EXHAUSTED: Error writing: Failed to write 9 bytes to file "
                             "20: No space left on device [os_error_code='28']")
    with pytest.raises(ValueError, match="^another$"), files.writing(tmp_path):
        raise ValueError("another")


def test_a_log_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    (tmp_path / "log").mkdir()
    with pytest.raises(InputError, match=r"^Cannot write \S+log: Is a directory\.$"):
        files.append_line(tmp_path / "log", {})
