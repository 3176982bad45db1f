"""The one way in which measurements are made, by one that is defined here alone."""

import dataclasses
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from processes import HOLDER

from jaxrobust.app import arguments, commands, files, provenance, run_folder
from jaxrobust.app.config import InputError
from jaxrobust.app.measurements import MEASUREMENTS, named_results
from jaxrobust.app.measurements.runner import Measured, Measurement
from jaxrobust.app.report import report
from jaxrobust.app.report.frame import Number
from jaxrobust.app.report.page import Cell, Section, Table, TableRow

RUN = pathlib.Path(__file__).parents[2] / "results" / "digits" / "robust-seed0"


@dataclasses.dataclass(frozen=True)
class ToySettings:
    num_images: int = 6
    """Images."""
    factors: tuple[float, ...] = (1.0, 2.0)


class Killed(BaseException):
    """Stands for a kill: nothing handles it."""


measured = []
"""The rows that were measured, in their order; a kill comes before the row in ``kills``."""
kills = []
beside = []
"""What is done, once each, while a measurement is made."""


def measure_toy(run, settings, work):
    """Two rows at a time."""
    for first in range(work.rows, settings.num_images, 2):
        if first in kills:
            raise Killed
        if beside:
            beside.pop()()
        measured.append(first)
        work.facts = {"begun": True}
        rows = np.arange(first, first + 2)
        work.add({"index": rows, "value": settings.factors[-1] * rows})
    return Measured({"mean": float(work.table["value"].mean()), "seed": run.config.seed,
                     **work.facts}, work.table)


def section(study):
    found = study.first_results("toy")
    return Section("toy", "A toy", "", (Table("Means.", ("Method", "Mean"), tuple(
        TableRow(row, (Cell(f"{result['mean']:.2f}"),)) for row, result in found.items())),
    )) if found else None


def numbers(run):
    result = run.facts("toy")
    if result:
        yield Number("toy mean", "all", result["mean"], "toys")


TOY = Measurement("toy", ToySettings(), measure_toy, section=section, numbers=(numbers,),
                  about="Measure a toy.", text=lambda facts: f"mean {facts['mean']}", trained=False)


@pytest.fixture(name="folder")
def _folder(tmp_path):
    measured.clear()
    kills.clear()
    beside.clear()
    shutil.copytree(RUN, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(name="_listed")
def _registered():
    MEASUREMENTS.append(TOY)
    yield
    MEASUREMENTS.remove(TOY)


def call(folder, *options):
    """The command that makes the toy."""
    arguments.read(commands.command_of(TOY), [str(folder), *options], "jaxrobust toy")()


def test_a_measurement_is_written_once_with_its_settings_and_where_it_comes_from(folder, capsys):
    call(folder)
    facts = files.read_json(folder / "toy.json")
    assert facts.pop("provenance")["commit"]
    # Twice the mean of 0 to 5.
    assert facts == {"mean": 5.0, "seed": 0, "begun": True,
                     "settings": {"num_images": 6, "factors": [1.0, 2.0]}}
    np.testing.assert_array_equal(run_folder.read_arrays(folder, "toy")["index"], np.arange(6))
    assert "mean 5.0" in capsys.readouterr().out
    before = (folder / "toy.json").stat().st_mtime_ns
    call(folder)
    assert measured == [0, 2, 4] and (folder / "toy.json").stat().st_mtime_ns == before
    assert capsys.readouterr().out == f"{folder}\nmean 5.0\nMeasured: {folder / 'toy.json'}\n"


def test_other_settings_are_refused_and_kept_beside_under_a_name(folder, _listed):
    call(folder)
    with pytest.raises(InputError, match=(
            r"toy\.json was made with num_images=6, not 4\. Keep both with `toy --name NAME`")):
        call(folder, "--num-images", "4")
    call(folder, "--num-images", "4", "--name", "four")
    assert files.read_json(folder / "toy-four.json")["mean"] == 3
    assert named_results(folder) == ["toy-four"]


def test_the_provenance_is_that_of_the_start(folder, monkeypatch):
    times = ["before"]
    monkeypatch.setattr(provenance, "describe", lambda: {"started": times[-1]})
    beside.append(lambda: times.append("meanwhile"))
    call(folder)
    assert len(times) == 2
    assert files.read_json(folder / "toy.json")["provenance"] == {"started": "before"}


def test_an_interrupted_measurement_resumes_and_refuses_other_settings(folder):
    kills.append(4)
    with pytest.raises(Killed):
        call(folder)
    assert not (folder / "toy.json").exists() and not (folder / "toy.npz").exists()
    with pytest.raises(InputError, match=r"toy\.partial\.npz was begun with factors="):
        call(folder, "--factors", "3")
    kills.clear()
    call(folder)
    assert measured == [0, 2, 4]
    assert files.read_json(folder / "toy.json")["mean"] == 5
    assert not (folder / "toy.partial.npz").exists()


def test_arrays_are_written_before_the_facts_that_say_they_are_whole(folder, monkeypatch):
    def refuse(path, value):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_json", refuse)
        with pytest.raises(Killed):
            call(folder)
    assert (folder / "toy.npz").is_file() and run_folder.read_facts(folder, "toy") is None
    call(folder)  # From the rows that are there.
    assert measured == [0, 2, 4]


def test_a_second_command_is_refused_while_the_first_measures(folder):
    def second():
        with pytest.raises(InputError, match=(r"^Another command is making \S+toy\.json\. Wait for "
                                              r"its end, or stop it first\.$")):
            call(folder)
        call(folder, "--name", "other")  # It shares no file with the first.

    beside.append(second)
    call(folder)
    assert measured == [0, 2, 4, 0, 2, 4]
    assert files.read_json(folder / "toy.json")["mean"] == 5
    assert not list(folder.glob("*.lock"))
    with run_folder.locked_facts(folder, "toy"):
        call(folder)  # A result is read all the same.
    assert len(measured) == 6


def test_a_result_that_another_command_has_made_meanwhile_is_not_made_again(folder, monkeypatch):
    lock = run_folder.locked_facts

    def late(*arguments):
        monkeypatch.setattr(run_folder, "locked_facts", lock)
        call(folder)
        return lock(*arguments)

    monkeypatch.setattr(run_folder, "locked_facts", late)
    call(folder)
    assert measured == [0, 2, 4]


def test_a_kill_leaves_no_lock_of_a_measurement(folder):
    (folder / "toy.lock").touch()
    with subprocess.Popen([sys.executable, "-c", HOLDER, folder / "toy.lock"],
                          stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"locked\n"
        with pytest.raises(InputError, match="^Another command is making"):
            call(folder)
        first.kill()
    call(folder)
    assert measured == [0, 2, 4] and not (folder / "toy.lock").exists()


def test_the_report_shows_a_measurement_that_is_listed(folder, tmp_path, _listed):
    call(folder)
    page = report.write_report_of_runs([folder], tmp_path / "report")
    assert 'id="toy"' in page.read_text()
    assert "toy mean,all,,5,toys" in (tmp_path / "report" / "report.csv").read_text()
