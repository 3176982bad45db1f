"""Reads the folder of a study."""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterable, Sequence

from jaxrobust.app import provenance, published, run_folder
from jaxrobust.app.config import InputError, RunConfig
from jaxrobust.data import FOLDER_PREFIX


@dataclasses.dataclass(frozen=True)
class Run:
    """The results of one run; None or empty where there are none."""

    folder: pathlib.Path
    seed: int
    config: RunConfig | None
    provenance: dict
    epochs: tuple[dict, ...]
    evaluation: dict | None
    diverged: int | None = None  # epoch in which the loss became infinite or NaN
    name: str | None = None  # name of the measurements to read beside the evaluation

    @functools.cached_property
    def curvature(self) -> dict | None:
        """The results of the command ``curvature``, image by image."""
        return self.result("curvature")

    @property
    def medians(self) -> dict | None:
        """For each measure of curvature, the median over the images."""
        facts = self.facts("curvature")
        return facts["median"] if facts else None

    @functools.cached_property
    def features(self) -> dict | None:
        """Penultimate-layer features of the first test images."""
        return run_folder.read_arrays(self.folder, "features") if self.evaluation else None

    def facts(self, kind: str) -> dict | None:
        """The JSON file of a kind of measurement, if it exists."""
        return run_folder.read_facts(self.folder, kind, self.name)

    def result(self, kind: str) -> dict | None:
        """The facts and arrays of a kind of measurement together, if they exist."""
        facts = self.facts(kind)
        arrays = run_folder.read_arrays(self.folder, kind, self.name) if facts else None
        return facts | arrays if arrays else None


@dataclasses.dataclass(frozen=True)
class Study:
    """A study and its runs."""

    name: str
    title: str
    note: str
    command: str
    commit: str
    labels: dict[str, str]  # by row, in the order of the table
    methods: dict[str, str]  # by row
    seeds: tuple[int, ...]
    paper: published.AccuracyTable | None
    paper_rows: dict[str, str]  # by row, the key in the paper's table
    paper_perturbed: published.PerturbationTable | None
    paper_perturbations: dict[str, str]  # by perturbation, the row in that table
    class_names: dict[int, str]
    runs: dict[str, tuple[Run, ...]]  # by row, one for each seed
    swept: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    """For each setting of a sweep, the values whose combinations are the rows."""

    def finished(self, row: str) -> list[Run]:
        """The evaluated runs of a row."""
        return [run for run in self.runs[row] if run.evaluation]

    def all_finished(self) -> list[Run]:
        """The evaluated runs of all rows."""
        return [run for row in self.labels for run in self.finished(row)]

    def first_results(self, kind: str) -> dict[str, dict]:
        """By row, the result of the first run that has a kind of measurement."""
        found = {row: next(filter(None, (run.result(kind) for run in runs)), None)
                 for row, runs in self.runs.items()}
        return {row: result for row, result in found.items() if result}

    def results(self, kind: str) -> dict[str, list[dict]]:
        """By row, the results of all runs that have a kind of measurement."""
        found = {row: list(filter(None, (run.result(kind) for run in runs)))
                 for row, runs in self.runs.items()}
        return {row: results for row, results in found.items() if results}


def load_study(folder: pathlib.Path) -> Study:
    """Reads a study with all its runs.

    Raises:
      InputError: (a ValueError) if the folder holds no study or no finished run, or the study is
        compared with published numbers that are unavailable here.
    """
    values = run_folder.read_facts(folder, "study")
    if values is None:
        raise InputError(f"Expected a study in {folder}, found no study.json there.")
    names, key = values.get("class_names") or [], values["paper_table"]
    if key is not None and key not in published.TABLES:
        raise InputError(f"{folder} is compared with the paper's {key}. Use `python -m "
                         "experiments report`, which shows both.")
    study = Study(
        name=values["name"], title=values["title"], note=values["note"],
        command=values["command"], commit=values["commit"], labels=values["rows"],
        methods=values["methods"], seeds=tuple(values["seeds"]),
        paper=published.TABLES.get(key), paper_rows=values["paper_rows"],
        paper_perturbed=published.PERTURBATIONS.get(key),
        paper_perturbations=values.get("paper_perturbations", {}),
        class_names=class_labels(names),
        swept={name: tuple(swept) for name, swept in values.get("swept", {}).items()},
        runs={row: tuple(_load_run(run_folder.place_of(folder, row, seed), seed)
                         for seed in values["seeds"]) for row in values["rows"]})
    if not study.all_finished():
        raise InputError(f"Expected a finished run in {folder}, found no evaluation.json there.")
    return study


def with_rows(study: Study, rows: Sequence[str] | None) -> Study:
    """Returns the study with some of its rows, or with all if None."""
    if rows is None:
        return study
    part = dataclasses.replace(
        study, labels={row: study.labels[row] for row in rows},
        methods={row: study.methods[row] for row in rows},
        runs={row: study.runs[row] for row in rows})
    if not part.all_finished():
        raise InputError(f"Expected a finished run of {study.name} in {', '.join(rows)}, found "
                         "none.")
    return part


def study_of_runs(
    folders: Sequence[pathlib.Path], *, together: bool = False, name: str | None = None
) -> Study:
    """Makes a study of any runs, and results of foreign models, each a row named after its folder.

    Equal names are prefixed with the name of the parent folder. With ``together``, runs that differ
    only in the seed form one row, named after the first without its seed. With a ``name``, reads
    the measurements of that name beside the evaluation.
    """
    check_same_data(folders)
    rows: dict[str | RunConfig, list[Run]] = {}
    for folder in folders:
        config = None if run_folder.is_foreign(folder) else run_folder.read_config(folder)
        run = _load_run(folder, 0 if config is None else config.seed, name)
        row = dataclasses.replace(config, seed=0) if together and config else str(folder)
        for other in rows.get(row, ()):
            if other.seed == run.seed:
                raise InputError(f"Expected different runs, got {other.folder} and {folder}, which "
                                 "are the same.")
        rows.setdefault(row, []).append(run)
    runs = {str(of_row[0].folder): tuple(sorted(of_row, key=lambda run: run.seed))
            for of_row in rows.values()}
    names = {row: re.sub(r"-seed\d+$", "", pathlib.Path(row).name) if together else
             pathlib.Path(row).name for row in runs}
    labels = {row: name if list(names.values()).count(name) == 1 else
              f"{pathlib.Path(row).parent.name}/{name}" for row, name in names.items()}
    return Study(
        name="runs", title="Runs", note="", command=provenance.command_line(),
        commit=provenance.own_commit(), labels=labels,
        methods={row: of_row[0].config.method if of_row[0].config else ""
                 for row, of_row in runs.items()},
        seeds=tuple(sorted({run.seed for of_row in runs.values() for run in of_row})),
        paper=None, paper_rows={}, paper_perturbed=None, paper_perturbations={},
        class_names=class_labels(_class_names(run for of_row in runs.values() for run in of_row)),
        runs=runs)


def check_same_data(folders: Sequence[pathlib.Path]) -> None:
    """Checks that runs share one test set, without which their numbers cannot be compared."""
    all_data = [_data_of(folder) for folder in folders]
    for folder, its_data in zip(folders, all_data, strict=True):
        for name in its_data:
            first, other = all_data[0].get(name), its_data[name]
            if first != other:
                raise InputError(f"Expected runs with one test set, got {folders[0]} with "
                                 f"{name}={first} and {folder} with {name}={other}. Use one "
                                 "command for each.")


def _data_of(folder: pathlib.Path) -> dict:
    """What tells the test set of a run, or of the results of a foreign model."""
    foreign = run_folder.read_facts(folder, "model")
    values = foreign or dataclasses.asdict(run_folder.read_config(folder))
    split = values["dataset"].startswith(FOLDER_PREFIX)  # Other data sets have their own split.
    return {name: values[name] for name in (("dataset", "split_seed") if split else ("dataset",))}


def _class_names(runs: Iterable[Run]) -> Sequence[str]:
    """Class names from the first run, or its study, that has any; else empty."""
    for run in runs:
        study = run_folder.read_facts(run.folder.parent, "study") or {}
        evaluation = run.evaluation or {}
        names = evaluation.get("classes", {}).get("names") or study.get("class_names")
        if names:
            return names
    return ()


def class_labels(names: Sequence[str]) -> dict[int, str]:
    """Labels each class by number and name, or by the number alone if that is the name."""
    return {index: name if name == str(index) else f"{index} {name}"
            for index, name in enumerate(names)}


def _load_run(folder: pathlib.Path, seed: int, name: str | None = None) -> Run:
    return Run(
        folder=folder,
        seed=seed,
        name=name,
        config=run_folder.read_config(folder) if run_folder.is_run(folder) else None,
        provenance=run_folder.read_facts(folder, "provenance") or {},
        epochs=run_folder.read_epochs(folder),
        evaluation=run_folder.read_facts(folder, "evaluation"),
        diverged=(run_folder.read_facts(folder, "diverged") or {}).get("epoch"))
