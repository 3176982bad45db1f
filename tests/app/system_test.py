"""What the system refuses a command, in one line: its streams, names, permissions."""

import errno
import io
import json
import os
import pathlib
import platform
import pwd
import re
import shutil
import subprocess
import sys

import jax
import pytest
import small_disks
from command_line import call, one_line

from jaxrobust.app import cli, commands, execution, files


def test_a_command_without_streams_writes_into_no_file_that_it_opens(tmp_path):
    number = "cli._prepare_streams(); print('out'); sys.exit(open(sys.argv[1], 'w').fileno())"
    ended = subprocess.run(
        ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c",
         f"import sys; from jaxrobust.app import cli; {number}", tmp_path / "file"], check=False)
    assert ended.returncode > 2
    for words, status in ((("--version",), 0), (("unknown",), 2)):
        ended = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-m",
                                "jaxrobust", *words], check=False)
        assert ended.returncode == status


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_for_which_the_disk_is_full_is_one_line(unbuffered):
    with open("/dev/full", "w") as output:
        ended = subprocess.run(
            [sys.executable, "-m", "jaxrobust", "--help"], stdout=output, stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered}, check=False)
    assert (ended.returncode, ended.stderr) == (
        2, b"error: Cannot write the output: No space left on device.\n")


def test_what_an_encoding_lacks_is_written_as_an_escape(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    cli._prepare_streams()
    print("\udcff “3”", flush=True)
    assert written.getvalue() == rb"\udcff \u201c3\u201d" + b"\n"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_memory_of_large_training_steps_stays_with_the_process():
    # More than 2 GiB, up to which a limit in an int would do.
    program = """
import ctypes, resource
from jaxrobust.app import execution

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
    ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p])

def faults(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(size)
    for page in range(0, size, 4096 * 16):
        ctypes.memset(block + page, 1, 1)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

execution.keep_freed_memory()
print(*(faults(5 * 2**29) for _ in range(2)))
"""
    first, second = map(int, subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split())
    assert second < first / 100


def test_a_user_without_a_home_is_given_the_root_folder(monkeypatch):
    def unknown(number):
        raise KeyError(number)

    for name in ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # Restored at the end, whatever is set in between.
        monkeypatch.delenv(name)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert call("--version") == 0
    assert execution.compilations_folder() == pathlib.Path("/.cache/jaxrobust/xla")


@pytest.mark.parametrize("words", [
    ("predict", "run", "a.png"), ("report", "run"), ("export", "run"), ("rerun", "run"),
    ("train", "digits/both", "--out", "run")])
def test_a_path_that_the_system_refuses_is_one_line(words, tmp_path, capsys):
    run = tmp_path / ("a" * 300)
    assert call(*(run if word == "run" else word for word in words)) == 2
    assert one_line(capsys).startswith(f"error: Cannot use {run}")
    assert not list(tmp_path.iterdir())


def test_a_name_of_two_lines_is_shown_on_one(tmp_path, capsys):
    assert call("predict", tmp_path / "no\nrun", "a.png") == 2
    assert rf"{tmp_path}/no\nrun, found no config.json" in one_line(capsys)


def test_a_word_that_is_not_utf8_is_one_line(tmp_path, capsys):
    assert call("report", os.fsdecode(b"a\xff")) == 2
    assert one_line(capsys) == r"error: Expected UTF-8, got 'a\udcff'."


@pytest.mark.parametrize("error", [
    MemoryError("Out of memory allocating 9 bytes."), jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nLargest program: ...")])
def test_too_little_memory_is_one_line(error, monkeypatch, capsys):
    def called(self):
        raise error

    monkeypatch.setattr(commands.Train, "__call__", called)
    assert call("train", "digits") == 2
    assert re.fullmatch("error: Not enough memory: .*Out of memory allocating 9 bytes.",
                        one_line(capsys))


@pytest.mark.parametrize("error", [
    ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED)),
    RuntimeError("another")])
def test_another_error_is_a_defect(error, monkeypatch):
    def called(self):
        raise error

    monkeypatch.setattr(commands.Train, "__call__", called)
    with pytest.raises(type(error), match=str(error).replace("[", r"\[")):
        call("train", "digits")


SMALL_DISK = """
mount -t tmpfs -o size=99m tmpfs "$1"
cp -a "$2" "$1/run"
mount -o remount,size=$(($(df -k --output=used "$1" | tail -1) + 4))k "$1"
"${@:4}" 2> "$3/errors" && echo 0 > "$3/status" || echo $? > "$3/status"
mount -o remount,size=99m "$1"
"${@:4}"
cp -a "$1/." "$3/disk after"
"""
"""Calls a command on a disk with a copy of a run, which has room for 4 kB, and then for more."""


@pytest.mark.slow
@pytest.mark.parametrize("words", [
    ("evaluate", "DISK/run", "--name", "again"), ("export", "DISK/run"),
    ("report", "DISK/run", "--out", "DISK/report")])
def test_a_small_disk_that_fills_up_ends_a_command_in_one_line_and_costs_no_result(
        words, shared_study, tmp_path):
    small, large, run = tmp_path / "small", tmp_path / "large", shared_study / "robust-seed0"
    small_disks.run(SMALL_DISK, small, run, tmp_path, sys.executable, "-m", "experiments",
                    *(word.replace("DISK", str(small)) for word in words))
    assert (tmp_path / "status").read_text() == "2\n"
    assert re.fullmatch(rf"error: Cannot write {small}/\S+: No space left on device\.\n",
                        (tmp_path / "errors").read_text())
    shutil.copytree(run, large / "run")
    assert call(*(word.replace("DISK", str(large)) for word in words)) == 0
    assert results_in(tmp_path / "disk after", small) == results_in(large, large)


def results_in(folder, made):
    """The files in a folder: tables and facts with their content, but for where they come from."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = ""
        if path.suffix == ".json":
            content = json.dumps({name: value for name, value in files.read_json(path).items()
                                  if name != "provenance"})
        elif path.suffix == ".csv":
            content = path.read_text()
        found[path.relative_to(folder)] = content.replace(str(made), "DISK")
    return found
