"""Collects every number of a study in one tidy table, for tables, figures, CSV and JSON.

    Run ─ a measurement's numbers ─▶ Number ─ frame ─▶ a line a number ─ over_seeds ─▶ a line a row

A table has the columns of :data:`COLUMNS`. Accuracies are per cent.
"""

import math
import pathlib
import re
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import pandas as pd

from jaxrobust.app.report.page import TableRow, level_name, text_row
from jaxrobust.app.study.read import Run, Study

COLUMNS = {"study": "str", "row": "str", "seed": "Int64", "measurement": "str",
           "condition": "str", "draw": "Int64", "value": "float64", "unit": "str"}
"""The table's columns and their types. ``row`` is the key of a row, ``seed`` the training's, and
``draw`` counts the draws of the noise; each is empty for a number over several."""

DIGITS = 10
"""Significant digits of a number in a CSV file."""

VALIDATION = "validation accuracy"
"""The accuracy, in the epoch kept, on the images that chose it."""

DIVERGED = "diverged in"
PUBLISHED = "published accuracy"
PUBLISHED_STD = "published standard deviation over draws"


class Number(NamedTuple):
    """One number of one run."""

    measurement: str
    condition: str  # under which it was measured, such as "8/255" or "exact Hessian"
    value: float
    unit: str  # "" of a number without one
    draw: int | None = None


def frame(study: Study, *kinds: Callable[[Run], Iterable[Number]]) -> pd.DataFrame:
    """Collects the numbers of these kinds of all runs, in the order of the rows and their seeds."""
    return table((study.name, row, run.seed, *number) for row, runs in study.runs.items()
                 for run in runs for kind in kinds for number in kind(run))


def table(lines: Iterable[tuple]) -> pd.DataFrame:
    """Makes a table from lines of study, row, seed, and the fields of :class:`Number`.

    Values are rounded as in the CSV file, so that a page and tables made from the file agree to the
    last digit shown.
    """
    columns = ["study", "row", "seed", *Number._fields]
    made = pd.DataFrame(lines, columns=columns).astype(COLUMNS)[list(COLUMNS)]
    return made.assign(value=[float(f"{value:.{DIGITS}g}") for value in made.value])


def training_numbers(run: Run) -> Iterator[Number]:
    """Yields a training's time, its epoch kept and the accuracy then, or where it diverged."""
    if run.evaluation and run.evaluation["epoch"] is not None:
        yield Number("epoch kept", "", run.evaluation["epoch"], "epoch")
        if run.evaluation["selected_on"] == "validation":
            yield from (Number(VALIDATION, "", 100 * line["selection_accuracy"], "%")
                        for line in run.epochs if line["epoch"] == run.evaluation["epoch"])
        if "seconds" in run.provenance:  # A run that is not done has none.
            yield Number("training time", "", run.provenance["seconds"], "s")
    if run.diverged:
        yield Number(DIVERGED, "", run.diverged, "epoch")


def accuracy_numbers(run: Run) -> Iterator[Number]:
    """Yields accuracies by test and draw, and by class and balanced where classes are known."""
    evaluation = run.evaluation
    if not evaluation:
        return
    yield Number("test images", "", evaluation["num_images"], "images")
    names = evaluation.get("classes", {}).get("names", ())
    for name, size in zip(names, evaluation["classes"]["counts"] if names else (), strict=True):
        yield Number("test images", name, size, "images")
    for condition, test in tests(evaluation):
        for draw, share in enumerate(test["accuracies"]):
            yield Number("accuracy", condition, 100 * share, "%", draw)
        if names:  # Older evaluations have none.
            yield Number("balanced accuracy", condition, balanced(test), "%")
            for name, share in zip(names, test["by_class"], strict=True):
                if share is not None:
                    yield Number(f"accuracy on {name}", condition, 100 * share, "%")


def tests(evaluation: dict) -> list[tuple[str, dict]]:
    """Lists the tests of an evaluation, each with its condition in the table."""
    return [*((level_name(test["std_255"]).lower(), test) for test in evaluation["levels"]),
            # Older evaluations have noise levels alone.
            *((test["perturb"], test) for test in evaluation.get("perturbations", ()))]


def balanced(test: dict) -> float:
    """Averages the accuracies on each class that has test images, in per cent."""
    return 100 * statistics.fmean(share for share in test["by_class"] if share is not None)


def published_accuracies(study: Study) -> list[tuple[str, str, tuple[float, float | None]]]:
    """Lists row, condition and the paper's (mean, std) in per cent, for the rows that it has."""
    if study.paper is None:
        return []
    return [(row, level_name(level).lower(), number) for row in study.labels
            if row in study.paper_rows for level, number in zip(
                study.paper.levels, study.paper.rows[study.paper_rows[row]], strict=True)]


def published_numbers(study: Study) -> pd.DataFrame:
    """Makes a table of :func:`published_accuracies`."""
    return table((study.name, row, None, measurement, condition, value, "%", None)
                  for row, condition, number in published_accuracies(study)
                  for measurement, value in zip((PUBLISHED, PUBLISHED_STD), number, strict=True)
                  if value is not None)


def noise_level(condition: str) -> float | None:
    """Returns the noise level in units of 1/255; None for another perturbation."""
    found = re.fullmatch(r"([\d.e+-]+)/255", condition)
    return 0.0 if condition == "clean" else float(found[1]) if found else None


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Returns a line for each row, measurement and condition, where the first of each was.

    Returns:
      Beside these and ``study`` and ``unit``: ``mean`` over the seeds of the mean over the draws,
      ``by_seed`` with the latter, ``std_over_seeds`` and ``std_over_draws`` (ddof=1; NaN of one,
      the second averaged over the seeds).
    """
    keys = ["study", "row", "measurement", "condition", "unit"]
    by_seed = table.groupby([*keys, "seed"], sort=False, dropna=False).value.agg(["mean", "std"])
    groups = by_seed.reset_index().groupby(keys, sort=False)
    return groups.agg(
        mean=("mean", "mean"), by_seed=("mean", tuple), std_over_seeds=("mean", "std"),
        std_over_draws=("std", "mean")).reset_index()


Values = dict[tuple[str, str, str], tuple[float, ...]]
"""By row, measurement and condition: the mean over the draws of each seed."""


def values_of(table: pd.DataFrame) -> Values:
    """Looks the numbers of a table up as the cells of tables need them."""
    found = over_seeds(table)
    return dict(zip(zip(found.row, found.measurement, found.condition, strict=True),
                    found.by_seed, strict=True))


def number_rows(
    study: Study, rows: Iterable[str], kind: Callable[[Run], Iterable[Number]],
    columns: Collection[tuple[str, str, Callable[[Sequence[float]], str]]],
) -> tuple[TableRow, ...]:
    """Makes rows of cells, one for each measurement and condition, with the function that formats
    the seeds' numbers, of which there may be none."""
    values = values_of(frame(study, kind))
    return tuple(text_row(study.labels[row], (
        show(values.get((row, measurement, condition), ()))
        for measurement, condition, show in columns)) for row in rows)


Accuracies = dict[str, dict[str, Any]]
"""By row and condition, noise levels first and increasing: a line of :func:`over_seeds` as a named
tuple, with ``num_images`` and ``balanced`` (NaN where it is not known)."""


def accuracies(study: Study) -> Accuracies:
    """Returns the accuracies of a study's finished runs, for every row."""
    return accuracies_of(frame(study, accuracy_numbers), study.labels)


def accuracies_of(table: pd.DataFrame, rows: Iterable[str], measurement: str = "accuracy",
                  images: str = "test images") -> Accuracies:
    """Returns the accuracies in a table of numbers, with the names that those and the number of
    images have there."""
    found = over_seeds(table)
    others = found.set_index(["measurement", "row", "condition"])["mean"]
    lines = found[found.measurement == measurement]
    lines = lines.assign(
        num_images=[others[images, row, ""] for row in lines.row],
        balanced=[others.get(("balanced accuracy", one.row, one.condition), math.nan)
                  for one in lines.itertuples()],
        level=lines.condition.map(noise_level).astype("float64"))
    lines = lines.sort_values("level", kind="stable", na_position="last")
    return {row: {one.condition: one for one in lines[lines.row == row].itertuples(index=False)}
            for row in rows}


def summary(table: pd.DataFrame) -> list[dict]:
    """Returns :func:`over_seeds` for a JSON file, without unknown values, and with the study where
    there are several."""
    known = [] if table.study.nunique() > 1 else ["study"]
    return [{name: value for name, value in line.items() if value == value}
            for line in over_seeds(table.dropna(subset="value")).drop(
                columns=known).to_dict("records")]


def to_csv(table: pd.DataFrame) -> str:
    """Formats a table as CSV."""
    return table.to_csv(index=False, lineterminator="\n", float_format=f"%.{DIGITS}g")


def read_csv(path: pathlib.Path) -> pd.DataFrame:
    """Reads a table from a file that :func:`to_csv` made."""
    return pd.read_csv(path, dtype=COLUMNS, keep_default_na=False,
                       na_values=dict.fromkeys(("seed", "draw", "value"), [""]))
