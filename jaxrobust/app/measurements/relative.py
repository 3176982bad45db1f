"""Errors under corruptions and flip rates relative to a baseline's: mCE, relative mCE and mFR."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from jaxrobust import corruptions
from jaxrobust.app import run_folder
from jaxrobust.app.classifiers import ForeignModel
from jaxrobust.app.config import InputError
from jaxrobust.app.measurements.corruptions import CLEAN, TFDS
from jaxrobust.app.measurements.estimates import (
    BOOTSTRAP,
    Estimate,
    bootstrapped,
    found_of,
    numbers_of,
    table_of,
)
from jaxrobust.app.measurements.runner import Measured, Measurement, Work
from jaxrobust.app.report.page import Section
from jaxrobust.app.study.read import Run, Study, check_same_data
from jaxrobust.app.trainer import TrainedRun


@dataclasses.dataclass(frozen=True)
class RelativeSettings:
    """What results are compared with."""

    baseline: str | None = None
    """Folder of the baseline, a run or the results of another model, with the suites corruptions or
    flips measured on the same images; the suite is left out without."""


def _measure(run: TrainedRun | ForeignModel, settings: RelativeSettings, work: Work) -> Measured:
    """Compares what both have measured. It takes no model, only the results in their folders.

    Images of the two are paired: those of generated corruptions with the clean ones too.
    """
    del run
    baseline = pathlib.Path(settings.baseline)
    if not (run_folder.is_run(baseline) or run_folder.is_foreign(baseline)):
        raise InputError(f"Expected a run, or results of another model, in baseline="
                         f"{settings.baseline}, found neither config.json nor model.json there.")
    check_same_data([work.folder, baseline])
    scores: dict[str, dict] = {}
    subsets = []
    for kind, compare in (("corruptions", _corruption_scores), ("flips", _flip_scores)):
        own, other = (_result(folder, kind, work.name) for folder in (work.folder, baseline))
        if own is None or other is None:
            continue
        _require_same(kind, own, other, baseline)
        subsets.append(own["subset"])
        scores |= {name: _with_interval(score) | {"origin": own["origin"]}
                   for name, score in compare(own, other).items()}
    if not scores:
        raise InputError(f"Expected results of the suites corruptions or flips in both "
                         f"{work.folder} and {baseline}, found none that both have.")
    return Measured({"baseline": baseline.name, "scores": scores,
                     "subset": "; ".join(dict.fromkeys(subsets))})


def _result(folder, kind, name):
    facts = run_folder.read_facts(folder, kind, name)
    return facts and facts | run_folder.read_arrays(folder, kind, name)


def _require_same(kind: str, own: dict, other: dict, baseline: pathlib.Path) -> None:
    """Raises InputError unless two results are of the same images; folders of files may differ."""
    def asked(one):
        files = TFDS if one["settings"]["files"] == TFDS else one["origin"]
        return one["settings"] | {"files": files, "limit": one["num_images"]}

    for name, value in asked(own).items():
        if value != asked(other).get(name):
            raise InputError(f"Expected {kind} of the baseline {baseline} with {name}={value}, as "
                             f"of the model, got {asked(other).get(name)}.")


MCE, RELATIVE, MFR = "mCE", "relative mCE", "mFR"

class _Score(NamedTuple):
    statistic: Callable[..., float]  # of rows of each of some samples
    sizes: tuple[int, ...]  # of these samples
    least: float = 0  # the smallest possible value


def _corruption_scores(own: dict, other: dict) -> dict[str, _Score]:
    def wrong(result):
        """By corruption, whether each image is wrong at each severity [S, N]."""
        rows: dict[str, list[np.ndarray]] = {}
        for name, packed, number in zip(result["name"], result["correct"], result["number"],
                                        strict=True):
            rows.setdefault(str(name), []).append(1 - np.unpackbits(packed, count=number))
        clean, = rows.pop(CLEAN)
        return clean, {name: np.stack(values) for name, values in rows.items()}

    clean, errors = wrong(own)
    base_clean, base_errors = wrong(other)

    def means(by_name, rows):
        return {name: values[:, rows].mean(axis=1) for name, values in by_name.items()}

    def mce(rows):
        return corruptions.mean_corruption_error(means(errors, rows), means(base_errors, rows))

    def relative(rows, clean_rows=None):
        clean_rows = rows if clean_rows is None else clean_rows
        return corruptions.relative_mean_corruption_error(
            means(errors, rows), means(base_errors, rows), clean=clean[clean_rows].mean(),
            baseline_clean=base_clean[clean_rows].mean())

    number = next(iter(errors.values())).shape[1]
    # Official files may have the images in another order than the data set.
    sizes = (number,) if own["origin"] == "generated" else (number, len(clean))
    return {MCE: _Score(mce, (number,)), RELATIVE: _Score(relative, sizes, -np.inf)}


def _flip_scores(own: dict, other: dict) -> dict[str, _Score]:
    def mfr(rows):
        rates, base_rates = (
            {str(name): flips[rows].mean() / changes for name, flips, changes in zip(
                result["name"], result["flips"], result["changes"], strict=True)}
            for result in (own, other))
        return corruptions.mean_flip_rate(rates, base_rates)

    return {MFR: _Score(mfr, (own["flips"].shape[1],))}


def _with_interval(score: _Score) -> dict:
    """A score with its interval.

    The score is None, with the reason, where the baseline makes too few errors; the interval is
    None where it does in a resample.
    """
    try:
        value = float(score.statistic(*map(np.arange, score.sizes)))
    except InputError as error:
        return {"value": None, "interval": None, "why": str(error)}
    try:
        return {"value": value, "interval": bootstrapped(
            score.statistic, *score.sizes, least=score.least)[1:]}
    except InputError as error:
        return {"value": value, "interval": None, "why": f"In a resample: {error}"}


def estimates(run: Run) -> Iterator[Estimate]:
    """Yields mCE, relative mCE and mFR in per cent of the baseline, as far as they are known."""
    facts = run.facts("relative")
    for name, score in facts["scores"].items() if facts else ():
        if score["value"] is None:
            continue
        low, high = (None, None) if score["interval"] is None else (
            100 * end for end in score["interval"])
        yield Estimate(name, f"against {facts['baseline']}, {score['origin']}",
                       100 * score["value"], "%", low, high, "" if low is None else BOOTSTRAP)


def _section(study: Study) -> Section | None:
    if not found_of(study, estimates):
        return None
    facts = [one for runs in study.runs.values() for run in runs if (one := run.facts("relative"))]
    unknown = sorted({
        f"No {'value' if score['value'] is None else 'interval'} of {name}: {score['why']}"
        for one in facts for name, score in one["scores"].items() if "why" in score})
    subsets = "; ".join(sorted({one["subset"] for one in facts}))
    return Section(
        "relative", "Errors relative to a baseline", "", (table_of(
            study, estimates, "Mean corruption error and mean flip rate, relative to a baseline.",
            " ".join([f"Images: {subsets}. Intervals: bootstrap over images, paired.", *unknown]),
            "100 % is as bad as the baseline, less is better. mCE: errors over the severities "
            "divided by the baseline's, averaged over the corruptions; relative mCE: what "
            "corruptions add to the clean error, divided alike; mFR: flip rates, divided "
            "alike."),))


def table_text(facts: dict) -> str:
    """Formats the result as plain text."""
    lines = [facts["subset"]]
    for name, score in facts["scores"].items():
        value = "unknown" if score["value"] is None else f"{100 * score['value']:.2f} %"
        interval = "" if score["interval"] is None else " [{:.2f}–{:.2f}]".format(
            *(100 * end for end in score["interval"]))
        why = f" ({score['why']})" if "why" in score else ""
        lines.append(f"{name} against {facts['baseline']}, {score['origin']}: {value}{interval}"
                     f"{why}")
    return "\n".join(lines)


RELATIVE_ERRORS = Measurement(
    "relative", RelativeSettings(), _measure, section=_section, numbers=(numbers_of(estimates),),
    estimates=estimates, suite="relative", needs="baseline", anew=True,
    command="evaluate", text=table_text)
