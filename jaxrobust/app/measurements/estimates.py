"""What the measurements of the suite share: estimates with intervals, subsets, tables."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import tyro

from jaxrobust import _validate, data, evaluation
from jaxrobust.app.config import InputError
from jaxrobust.app.execution import batch_size_of
from jaxrobust.app.report.figures import AccuracyLine, dots_figure, row_styles
from jaxrobust.app.report.frame import Number
from jaxrobust.app.report.page import Picture, Table, over_runs, text_row
from jaxrobust.app.study.read import Run, Study
from jaxrobust.data import Split
from jaxrobust.images import FeaturesFn, LogitsFn, to_float
from jaxrobust.parallel import Layout, map_examples, replicate
from jaxrobust.statistics import share_interval

WILSON, BOOTSTRAP = "Wilson, 95 %", "bootstrap over images, centred, 95 %"
"""The kinds of intervals."""


Limit = Annotated[int | None, tyro.conf.Suppress]
"""A number of images, which the option --limit of the command sets for all measurements."""

TestSize = Annotated[int | None, tyro.conf.Suppress]
"""The number of test images of a study, of which a measurement takes the first."""


class Estimate(NamedTuple):
    """A number of one model with its interval; shares are per cent."""

    measurement: str
    condition: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    interval: str = ""  # its kind


Estimates = Callable[[Run], Iterable[Estimate]]


def share(measurement: str, condition: str, right: int, number: int) -> Estimate:
    """Makes the estimate of a share from counts, with Wilson's interval."""
    low, high = share_interval(right, number)
    return Estimate(measurement, condition, 100 * right / number, "%", 100 * low, 100 * high,
                    WILSON)


def estimate(measurement: str, condition: str, facts: Sequence[float], unit: str = "") -> Estimate:
    """Makes an estimate from the value, low and high that a measurement recorded."""
    factor = 100 if unit == "%" else 1
    value, low, high = (factor * number for number in facts)
    return Estimate(measurement, condition, value, unit, low, high, BOOTSTRAP)


def numbers_of(estimates: Estimates) -> Callable[[Run], Iterator[Number]]:
    """Makes the numbers of the report's tidy table: each estimate and the ends of its interval."""
    def numbers(run: Run) -> Iterator[Number]:
        for one in estimates(run):
            yield Number(one.measurement, one.condition, one.value, one.unit)
            if one.low is not None:
                for end, value in (("lower", one.low), ("upper", one.high)):
                    yield Number(f"{one.measurement}, {end} end ({one.interval})", one.condition,
                                 value, one.unit)

    return numbers


# --- Images ----------------------------------------------------------------------------------


def check_counts(settings: Any, *names: str) -> None:
    """Raises InputError if one of these settings is less than 1; None is no number."""
    for name in names:
        if getattr(settings, name) is not None:
            _validate.in_range(name, getattr(settings, name), 1)


def subset_of(split: Split, limit: int | None, test_size: int | None = None) -> Split:
    """Returns all images, or ``limit`` of them, drawn at random by class with seed 0; with a
    ``test_size``, the first ``limit`` of as many, drawn so."""
    if test_size is not None:
        _validate.in_range("test_size", test_size, 1, len(split.labels), open_high=False)
        drawn = subset_of(split, test_size)
        return Split(drawn.images[:limit], drawn.labels[:limit])
    if limit is None or limit >= len(split.labels):
        return split
    _validate.in_range("limit", limit, 1)
    try:
        return data.split_off(split, limit, seed=0)[1]
    except InputError:  # A class is too small for both sides, or absent from one.
        return data.take_rows(split, rows_by_class(split.labels, limit))


def rows_by_class(labels: np.ndarray, number: int) -> np.ndarray:
    """Draws rows at random with seed 0, in their order: of each class its share, rounded up for
    those with the largest remainders, so that small classes may be absent."""
    classes, counts = np.unique(labels, return_counts=True)
    shares = number * counts / len(labels)
    takes = np.floor(shares).astype(int)
    takes[np.argsort(takes - shares, kind="stable")[:number - takes.sum()]] += 1
    random = np.random.default_rng(0)
    return np.sort(np.concatenate([
        random.permutation(np.flatnonzero(labels == label))[:take]
        for label, take in zip(classes, takes, strict=True)]))


def subset_text(part: Split, whole: Split, what: str = "test images",
                test_size: int | None = None) -> str:
    """Describes a subset in words."""
    count, drawn, every = len(part.labels), test_size or len(part.labels), len(whole.labels)
    first = f"the first {count:,} of " if count < drawn else ""
    if drawn == every:
        return f"{first or 'all '}{every:,} {what}"
    return f"{first}{drawn:,} of {every:,} {what}, drawn at random by class with seed 0"


def images_of(split: Split, limit: int | None, test_size: int | None) -> tuple[Split, dict]:
    """Returns the images of :func:`subset_of`, and what a measurement records of them.

    They are the first ``num_images`` of ``first_of`` test images drawn by class with seed 0, which
    is what tells whether image i of two measurements is the same.
    """
    part = subset_of(split, limit, test_size)
    count = len(part.labels)
    return part, {"subset": subset_text(part, split, test_size=test_size), "num_images": count,
                  "first_of": test_size or count, "num_test": len(split.labels)}


@functools.partial(jax.jit, static_argnames="layout")
def _applied(layout, function, images):
    return map_examples(layout, lambda function, images: function(to_float(images)))(
        function, images)


def outputs_of(function: LogitsFn | FeaturesFn, images, layout: Layout) -> np.ndarray:
    """Applies a function to images [N, H, W, channels], a batch at a time."""
    layout = layout.for_examples()
    function = replicate(layout, function)
    return evaluation.map_batches(
        lambda rows: _applied(layout, function, rows), images, batch_size=batch_size_of(images),
        layout=layout)


# --- Intervals -------------------------------------------------------------------------------


RESAMPLES = 200


def bootstrapped(statistic: Callable[..., Any], *sizes: int, least: float = 0,
                 most: float = np.inf) -> list[Any]:
    """Returns a statistic of images with the ends of its interval, in [``least``, ``most``].

    The statistic, a number or several, each of which gets its own list, takes the rows of each of
    several independent samples of these sizes; they are drawn with replacement :data:`RESAMPLES`
    times, with seed 0. The ends are the statistic plus the
    2.5 and 97.5 percentiles of the resamples' deviations from their own mean: that mean is far off
    for a calibration error, which repeated images make larger.
    """
    random = np.random.default_rng(0)
    value = np.asarray(statistic(*map(np.arange, sizes)), np.float64)
    resamples = np.array([statistic(*(random.integers(size, size=size) for size in sizes))
                          for _ in range(RESAMPLES)])
    ends = value + np.quantile(resamples - resamples.mean(axis=0), (0.025, 0.975), axis=0)
    return np.stack([value, *np.clip(ends, least, most)], axis=-1).tolist()


# --- The report ------------------------------------------------------------------------------


def with_interval(one: Estimate, digits: int) -> str:
    """Formats an estimate with its interval in brackets."""
    shown = f"{one.value:.{digits}f}"
    return shown if one.low is None else f"{shown} [{one.low:.{digits}f}–{one.high:.{digits}f}]"


def found_of(study: Study, estimates: Estimates) -> dict[str, list[dict[tuple, Estimate]]]:
    """By row, the estimates of each of its runs that has some, by measurement and condition."""
    found = {row: [{one[:2]: one for one in ones} for run in runs if (ones := list(estimates(run)))]
             for row, runs in study.runs.items()}
    return {row: ones for row, ones in found.items() if ones}


def table_of(study: Study, estimates: Estimates, caption: str, details: str, note: str,
             digits: int = 2) -> Table:
    """Tabulates estimates: a line for each measurement and condition, a column for each row of the
    study; of one run with its interval, of several the mean with the lowest and the highest."""
    found = found_of(study, estimates)
    keys = dict.fromkeys(key for ones in found.values() for one in ones for key in one)
    units = {key: one[key].unit for ones in found.values() for one in ones for key in one}

    def cell(row, key):
        there = [one[key] for one in found[row] if key in one]
        if len(there) == 1:
            return with_interval(there[0], digits)
        return over_runs([one.value for one in there], lambda value: f"{value:.{digits}f}")

    return Table(
        caption, ("Measured", *(study.labels[row] for row in found)),
        tuple(text_row(", ".join(filter(None, key)) + (f" [{units[key]}]" if units[key] else ""),
                       (cell(row, key) for row in found)) for key in keys),
        details, f"How to read: one run with its interval in brackets; several with their mean "
        f"[lowest–highest]. {note}")


def subsets_text(study: Study, kind: str) -> str:
    """Lists the subsets of images that a kind of measurement used."""
    return "; ".join(sorted({facts["subset"] for runs in study.runs.values() for run in runs
                             if (facts := run.facts(kind))})) + "."


def dots_picture(study: Study, estimates: Estimates, measurement: str, name: str, caption: str,
                 of: str, note: str) -> Picture:
    """Draws one measurement's estimates under all its conditions as dots, with intervals."""
    found = found_of(study, estimates)
    conditions = list(dict.fromkeys(key[1] for ones in found.values() for one in ones
                                    for key in one if key[0] == measurement))
    styles = row_styles(study.labels)
    lines = []
    for row, ones in found.items():
        there = [(place, [one[measurement, condition] for one in ones
                          if (measurement, condition) in one])
                 for place, condition in enumerate(conditions)]
        there = [(place, values) for place, values in there if values]
        lines.append(AccuracyLine(
            study.labels[row], styles[row], np.array([place for place, _ in there], float),
            np.array([np.mean([one.value for one in values]) for _, values in there]),
            np.array([_spread(values) for _, values in there]).reshape(-1, 2).T))
    return Picture(name, dots_figure(conditions, lines, of), caption,
                   f"{of} under {len(conditions)} conditions for {len(lines)} models.",
                   f"{note} Bars: the 95 % interval of one run, or the standard deviation over "
                   "several.")


def _spread(values: Sequence[Estimate]) -> tuple[float, float]:
    """How far the bar of some runs' mean reaches down and up."""
    if len(values) == 1 and values[0].low is not None:
        return values[0].value - values[0].low, values[0].high - values[0].value
    return (float(np.std([one.value for one in values])),) * 2
