"""What a measurement of a run is, and the one way in which all of them are made.

    settings ─ asked ─▶ there already? ─ measure ─▶ KIND.npz, KIND.json ─ section ─▶ report

A measurement is a module beside this one that ends in a :class:`Measurement`, and a line in
``measurements/__init__.py``.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from jaxrobust.app import files, provenance, run_folder
from jaxrobust.app.config import InputError
from jaxrobust.app.report.frame import Number
from jaxrobust.app.report.page import Section
from jaxrobust.app.study.read import Run, Study
from jaxrobust.app.trainer import TrainedRun

Arrays = dict[str, np.ndarray]


class Measured(NamedTuple):
    """What came out: the JSON file has the facts, the settings and the provenance."""

    facts: dict[str, Any]
    arrays: Arrays | None = None  # None: there is no such file


def settings_asked(run: TrainedRun, settings: Any, folder: pathlib.Path) -> dict[str, Any]:
    """The fields of a dataclass of settings, as JSON has them."""
    del run, folder
    return {name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(settings).items()}


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Something to be measured of a run or, without ``measure``, to be shown of what others
    measured."""

    kind: str
    """Names its files: KIND.json and KIND.npz."""
    settings: Any = None
    """A dataclass instance, the defaults of the command."""
    measure: Callable[[TrainedRun, Any, "Work"], Measured] | None = None
    """From a run and settings."""
    asked: Callable[[TrainedRun, Any, pathlib.Path], dict[str, Any]] = settings_asked
    """From a run, settings and the run's folder: what is recorded as the settings, and refused
    where a result with another value is there."""
    arrays: str | None = None
    """The kind of the file of its arrays, if it is another."""
    section: Callable[[Study], Section | None] | None = None
    """Makes its section of the report; None where there is nothing to show."""
    numbers: tuple[Callable[[Run], Iterable[Number]], ...] = ()
    """What the report's table of all numbers holds of a run."""
    command: str | None = None
    """The command that makes it; ``kind`` if none is given."""
    about: str = ""
    """What the command does, for its help."""
    text: Callable[[dict[str, Any]], str] | None = None
    """What the command prints of the facts."""
    trained: bool = True
    """Whether it takes a finished run; else the run has no state."""
    parallel: bool = False
    """Whether several devices share the work."""


class Work:
    """A measurement under way, and what there is of an interrupted one."""

    def __init__(self, folder: pathlib.Path, label: str, path: pathlib.Path, asked: dict,
                 command: str):
        self.folder, self.label, self.asked = folder, label, asked
        self._path = path
        self.table: Arrays = {}
        """Columns so far."""
        self.facts: dict[str, Any] = {}
        if not self._path.is_file():
            return
        with np.load(self._path) as arrays:
            table = dict(arrays)
        there, facts = (json.loads(str(table.pop(name))) for name in ("settings", "facts"))
        _refuse_others(self._path, "begun", there, asked, command)
        self.table, self.facts = table, facts

    @property
    def rows(self) -> int:
        """The number of rows so far."""
        return len(next(iter(self.table.values()), ()))

    def add(self, rows: Arrays) -> None:
        """Adds rows to the columns, and saves them with the facts, for a kill to leave."""
        self.table = {name: np.concatenate([self.table[name], values]) if self.table else values
                      for name, values in rows.items()}
        files.write_arrays(self._path, {
            **self.table, "settings": json.dumps(self.asked), "facts": json.dumps(self.facts)})

    def end(self) -> None:
        """Removes what is saved."""
        if files.is_writer():
            self._path.unlink(missing_ok=True)


def measure(
    measurement: Measurement, run: TrainedRun, settings: Any, folder: pathlib.Path, label: str,
    name: str | None = None,
) -> dict[str, Any]:
    """Measures a run, unless it is measured already with the same settings, and resumes an
    interrupted measurement.

    Args:
      measurement: what is measured.
      run: that is measured.
      settings: those of the measurement.
      folder: of the run.
      label: of the progress bar.
      name: of the result, kept beside those with other settings.

    Returns:
      The facts, those of the settings included.

    Raises:
      InputError: (a ValueError) if there is a result with other settings, the name is not fit for a
        file, or for what the measurement refuses.
    """
    asked = measurement.asked(run, settings, folder)
    path = run_folder.facts_path(folder, measurement.kind, name)
    command = measurement.command or measurement.kind
    there = run_folder.read_facts(folder, measurement.kind, name)
    if there is not None:
        _refuse_others(path, "made", there.get("settings", {}), asked, command)
        return there
    work = Work(folder, label, run_folder.partial_path(folder, measurement.kind, name), asked,
                command)
    measured = measurement.measure(run, settings, work)
    if measured.arrays is not None:
        run_folder.write_arrays(
            folder, measurement.arrays or measurement.kind, measured.arrays, name)
    facts = {**measured.facts, "settings": asked}
    files.write_json(path, facts | {"provenance": provenance.describe()})
    work.end()
    return facts


def sections(study: Study, measurements: Iterable[Measurement]) -> list[Section]:
    """The sections of a report on what there is of these measurements."""
    return [section for measurement in measurements
            if measurement.section and (section := measurement.section(study))]


def _refuse_others(path: pathlib.Path, how: str, there: dict, asked: dict, command: str) -> None:
    """Raises InputError if the settings of a result are not those asked for."""
    for name, value in there.items():
        if value != asked.get(name):
            raise InputError(f"{path} was {how} with {name}={value}, not {asked.get(name)}. Keep "
                             f"both with `{command} --name NAME`, or remove that file to measure "
                             "again.")
