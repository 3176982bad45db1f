"""Damaged files of a run: each command says so in one line, and changes nothing."""

import json
import re
import shutil

import numpy as np
import pytest
from command_line import call, one_line
from PIL import Image

from jaxrobust.app import run_folder
from jaxrobust.app.recipe import get_recipe

pytestmark = pytest.mark.usefixtures("pictures_left_out")

RUN = "both-seed0"
READ_BY = {
    "report": ("study.json", f"{RUN}/config.json", f"{RUN}/evaluation.json",
               f"{RUN}/metrics.jsonl", f"{RUN}/provenance.json", f"{RUN}/curvature.json",
               f"{RUN}/curvature.npz", f"{RUN}/features.npz"),
    "predict": (f"{RUN}/config.json", f"{RUN}/network.json", f"{RUN}/done.json",
                f"{RUN}/doubt.json"),
}
"""The files of a study that a command reads."""


def cut(content):
    return content[: len(content) // 2]


def empty(content):
    return b""


def overwritten(content):
    return content[: len(content) // 3] + bytes(16) + content[len(content) // 3 + 16 :]


def flipped(content):
    """One bit in the middle of the data: of an array's numbers, or a quote of a JSON file."""
    place = content.find(b'"', len(content) // 2) if content[:1] in b"{[" else len(content) // 2
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


def other(content):
    return b"[1, 2]\n" if content[:1] in b"{[" else b"PK no archive"


DAMAGES = (cut, empty, overwritten, flipped, other)
CASES = [(command, name, damage) for command, names in READ_BY.items() for name in names
         for damage in DAMAGES
         # An interruption leaves a last line that is cut, or none.
         if (name.rpartition("/")[2], damage) not in (
             ("metrics.jsonl", cut), ("metrics.jsonl", empty))]


@pytest.fixture(name="study", scope="module")
def _study(tmp_path_factory, shared_study):
    return shutil.copytree(shared_study, tmp_path_factory.mktemp("study") / "study")


def words_of(command, study):
    if command == "report":
        return "report", study
    image = study.parent / "image.png"
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(image)
    return "predict", study / RUN, image


@pytest.mark.slow
def test_whole_files_are_read(study):
    for command in READ_BY:
        assert call(*words_of(command, study)) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("command", "name", "damage"), CASES,
                         ids=lambda value: getattr(value, "__name__", value))
def test_a_damaged_file_of_a_run_is_one_line(command, name, damage, study, capsys):
    path = study / name
    before = path.read_bytes()
    capsys.readouterr()
    path.write_bytes(damage(before))
    try:
        assert call(*words_of(command, study)) == 2
        assert path.read_bytes() == damage(before)
    finally:
        path.write_bytes(before)
    line = one_line(capsys)
    assert line.startswith("error: ") and path.stem in line


@pytest.mark.parametrize("words", [
    ("report",), ("report", "--out", "report"), ("predict", "image.png"), ("export",),
    ("evaluate",), ("curvature",), ("figures",), ("rerun",), ("replay",)], ids=" ".join)
def test_a_run_that_is_not_there_or_not_finished_is_one_line(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for there in ([], ["run", "run/config.json"]):
        if there:
            run_folder.claim_run(tmp_path / "run", get_recipe("digits").run("both", 0))
        assert call(words[0], "run", *words[1:]) == 2
        said = one_line(capsys)
        assert said.startswith("error: Expected ") and re.search(r"\brun\b", said)
        assert there == sorted(
            path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))


def test_more_than_fifty_files_are_damaged():
    assert len(CASES) >= 50


def test_a_missing_entry_is_named_with_its_file(study, capsys):
    path = study / "study.json"
    before = path.read_text()
    path.write_text(json.dumps({
        key: value for key, value in json.loads(before).items() if key != "methods"}))
    try:
        assert call("report", study) == 2
    finally:
        path.write_text(before)
    assert one_line(capsys) == f"error: Expected 'methods' in {path}, found no such entry."
