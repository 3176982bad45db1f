"""Makes every measurement of a run in one way.

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
from jaxrobust.app.classifiers import ForeignModel
from jaxrobust.app.config import InputError
from jaxrobust.app.report.frame import Number
from jaxrobust.app.report.page import Section
from jaxrobust.app.study.read import Run, Study
from jaxrobust.app.trainer import TrainedRun

Arrays = dict[str, np.ndarray]


class Measured(NamedTuple):
    """What a measurement found; the JSON file adds the settings and the provenance to the facts."""

    facts: dict[str, Any]
    arrays: Arrays | None = None  # None: there is no such file


def settings_asked(
    run: TrainedRun | ForeignModel, settings: Any, folder: pathlib.Path
) -> dict[str, Any]:
    """Returns the fields of a dataclass of settings, with lists for tuples as in JSON."""
    del run, folder
    return {name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(settings).items()}


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A kind of measurement of runs; without ``measure``, one that shows what others measured."""

    kind: str  # names its files, KIND.json and KIND.npz
    settings: Any = None  # defaults of the command: an instance of a dataclass
    measure: Callable[[Any, Any, "Work"], Measured] | None = None
    """Of a TrainedRun or, for a suite, a ForeignModel too."""
    asked: Callable[[Any, Any, pathlib.Path], dict[str, Any]] = settings_asked
    """From a run, settings and the run's folder: what is recorded as the settings, and refused
    where a result with another value is there."""
    arrays: str | None = None  # the kind that names the file of its arrays, if it is another
    section: Callable[[Study], Section | None] | None = None  # of the report; None to show nothing
    numbers: tuple[Callable[[Run], Iterable[Number]], ...] = ()  # for the report's tidy table
    estimates: Callable[[Run], Iterable[Any]] | None = None
    """Yields :class:`jaxrobust.app.measurements.estimates.Estimate`, for the robustness card."""
    suite: str | None = None  # its name for the option --suite of the command ``evaluate``
    limited: str = "limit"  # the setting that the option --limit of that command sets
    all_by_none: bool = True  # whether none in its place stands for all test images
    needs: str | None = None  # the setting without which the suite leaves it out
    randomised: bool = False  # whether it takes randomised classifiers
    gradients: bool = False  # whether it takes only classifiers that have derivatives
    anew: bool = False  # whether a result that is there is made again, as it takes no time
    card: bool = True  # whether the robustness card shows the section
    command: str | None = None  # the command that makes it, if it is not ``kind``
    about: str = ""  # the command's help
    text: Callable[[dict[str, Any]], str] | None = None  # formats the facts that it prints
    trained: bool = True  # whether it needs a finished run; otherwise the run has no state
    parallel: bool = False  # whether several devices share the work


class Work:
    """A measurement in progress, which resumes an interrupted one."""

    def __init__(self, folder: pathlib.Path, kind: str, name: str | None, label: str, asked: dict):
        self.folder, self.name, self.label, self.asked = folder, name, label, asked
        self.path = run_folder.partial_path(folder, kind, name)
        self.table: Arrays = {}  # the columns so far
        self.facts: dict[str, Any] = {}
        self.begun: dict[str, Any] | None = None  # the settings with which it was interrupted
        if self.path.is_file():
            self.table = files.read_arrays(self.path)
            with files.reading(self.path):
                self.begun, self.facts = (json.loads(str(self.table.pop(name)))
                                          for name in ("settings", "facts"))

    @property
    def rows(self) -> int:
        """The number of rows so far."""
        return len(next(iter(self.table.values()), ()))

    def add(self, rows: Arrays) -> None:
        """Adds rows to the columns, and saves them with the facts in case of a kill."""
        self.table = {name: np.concatenate([self.table[name], values]) if self.table else values
                      for name, values in rows.items()}
        files.write_arrays(self.path, {
            **self.table, "settings": json.dumps(self.asked), "facts": json.dumps(self.facts)})

    def end(self) -> None:
        """Removes the saved columns."""
        if files.is_writer():
            self.path.unlink(missing_ok=True)


def measure(
    measurement: Measurement, run: TrainedRun | ForeignModel, settings: Any,
    folder: pathlib.Path, label: str, name: str | None = None,
) -> dict[str, Any]:
    """Measures a run, unless it is measured already with the same settings, and resumes an
    interrupted measurement.

    With a ``name``, keeps the result beside those with other settings; ``label`` is that of the
    progress bar. Locks the measurement's files meanwhile.

    Returns:
      The facts, those of the settings included.

    Raises:
      InputError: (a ValueError) if there is a result with other settings, another command makes it
        at this time, the name is not fit for a file, or for what the measurement refuses.
    """
    wanted = _Wanted(measurement, run, settings, folder, name)
    there = wanted.result_there()
    if there is not None:
        return there
    with run_folder.locked_facts(folder, measurement.kind, name):
        there = wanted.result_there()  # Another command may have come and gone.
        if there is not None:
            return there
        made = provenance.describe()  # With the time of the start.
        work = wanted.work(label)
        measured = measurement.measure(run, settings, work)
        if measured.arrays is not None:
            run_folder.write_arrays(
                folder, measurement.arrays or measurement.kind, measured.arrays, name)
        facts = {**measured.facts, "settings": wanted.asked}
        files.write_json(wanted.path, facts | {"provenance": made})
        work.end()
        return facts


def check(
    measurement: Measurement, run: TrainedRun | ForeignModel, settings: Any,
    folder: pathlib.Path, name: str | None = None,
) -> None:
    """Raises InputError for what :func:`measure` refuses before it begins."""
    wanted = _Wanted(measurement, run, settings, folder, name)
    if wanted.result_there() is None:
        wanted.work("")


class _Wanted:
    """A measurement with the settings asked for, and what is there of it."""

    def __init__(self, measurement: Measurement, run: TrainedRun | ForeignModel, settings: Any,
                 folder: pathlib.Path, name: str | None):
        self._measurement, self._folder, self._name = measurement, folder, name
        self._num_test = len(run.dataset.test.labels)
        self.asked = self._recorded(measurement.asked(run, settings, folder))
        self.path = run_folder.facts_path(folder, measurement.kind, name)

    def result_there(self) -> dict[str, Any] | None:
        """The result, unless there is none or it is made anew."""
        there = run_folder.read_facts(self._folder, self._measurement.kind, self._name)
        if there is not None:
            self._refuse_others(self.path, "made", there.get("settings", {}))
        return None if self._measurement.anew else there

    def work(self, label: str) -> Work:
        """The measurement, as far as it got."""
        work = Work(self._folder, self._measurement.kind, self._name, label, self.asked)
        if work.begun is not None:
            self._refuse_others(work.path, "begun", work.begun)
        return work

    def _recorded(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Settings as they are recorded: a limit that leaves no test image out is none. One of the
        images in files of their own is not known to."""
        limited = self._measurement.limited
        if (self._measurement.all_by_none and settings.get("files") is None
                and (settings.get(limited) or 0) >= self._num_test):
            return settings | {limited: None}
        return settings

    def _refuse_others(self, path: pathlib.Path, how: str, there: dict[str, Any]) -> None:
        """Raises InputError if the settings of a result are not those asked for."""
        for name, value in self._recorded(there).items():
            if value != self.asked.get(name):
                command = self._measurement.command or self._measurement.kind
                raise InputError(
                    f"{path} was {how} with {name}={value}, not {self.asked.get(name)}. Keep both "
                    f"with `{command} --name NAME`, or remove that file to measure again.")


def sections(study: Study, measurements: Iterable[Measurement]) -> list[Section]:
    """Makes the sections of a report on these measurements."""
    return [section for measurement in measurements
            if measurement.section and (section := measurement.section(study))]
