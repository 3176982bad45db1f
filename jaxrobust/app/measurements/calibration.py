"""Calibration of probabilities, before and after temperature scaling."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxrobust import _validate, metrics
from jaxrobust.app.classifiers import ForeignModel
from jaxrobust.app.config import InputError
from jaxrobust.app.doubt import SCORES, UNMEASURED, doubt_of, load_doubt, measure_doubt
from jaxrobust.app.measurements.estimates import (
    Estimate,
    Limit,
    bootstrapped,
    check_counts,
    estimate,
    found_of,
    numbers_of,
    outputs_of,
    subset_of,
    subset_text,
    subsets_text,
    table_of,
)
from jaxrobust.app.measurements.runner import Measured, Measurement, Work
from jaxrobust.app.report.figures import GRID, new_figure, row_styles, wrap
from jaxrobust.app.report.page import Picture, Section
from jaxrobust.app.study.read import Run, Study
from jaxrobust.app.trainer import TrainedRun
from jaxrobust.data import take_rows
from jaxrobust.images import predicted_classes

Score = Callable[[np.ndarray, np.ndarray], float]
"""Of logits [N, C] and labels [N]."""


@dataclasses.dataclass(frozen=True)
class CalibrationSettings:
    """How calibration is measured."""

    num_bins: int = 15
    """Bins of confidence."""
    limit: Limit = None
    """Number of test images, drawn at random by class with seed 0; none for all."""

    def __post_init__(self):
        check_counts(self, "num_bins", "limit")


def _scores(num_bins: int) -> dict[str, tuple[Score, float]]:
    """By name, the scores, each with its largest possible value."""
    error = functools.partial(metrics.expected_calibration_error, num_bins=num_bins)

    def area(logits, labels):
        doubt = np.asarray(metrics.improbability(jnp.asarray(logits, jnp.float32)))
        return metrics.coverage_curve(doubt, np.asarray(predicted_classes(logits)) == labels).area

    return {
        "ECE, equal width": (error, 1),
        "ECE, equal mass": (functools.partial(error, bins="equal mass"), 1),
        "classwise ECE": (functools.partial(
            metrics.classwise_calibration_error, num_bins=num_bins), 1),
        "Brier score": (metrics.brier_score, 2),
        "negative log likelihood": (metrics.negative_log_likelihood, np.inf),
        AREA: (area, 1)}


BEFORE, AFTER = "as it is", "temperature scaled"
AREA = "area under accuracy against coverage"

CURVE_POINTS = 200
"""Largest number of points of a curve of accuracy against coverage."""


def _measure(run: TrainedRun | ForeignModel, settings: CalibrationSettings, work: Work) -> Measured:
    """Measures scores before and after dividing the logits by a temperature, on test images.

    The temperature is fitted on the validation images that were held out from training or, if there
    are none, on one half of the test images, and the other half is measured.
    """
    split = subset_of(run.dataset.test, settings.limit)
    subset = subset_text(split, run.dataset.test)
    logits = outputs_of(run.logits_fn, split.images, run.layout)
    _validate.finite_logits(np.isfinite(logits).all(axis=1), " of the test images")
    labels = split.labels
    held_out = _held_out(run)
    if held_out is not None:
        fitting = outputs_of(run.logits_fn, held_out.images, run.layout), held_out.labels
        _validate.finite_logits(np.isfinite(fitting[0]).all(axis=1), " of the held-out images")
        fitted_on = f"{len(held_out.labels):,} validation images"
    else:
        half = np.random.default_rng(0).permutation(len(labels)) < len(labels) // 2
        if not half.any():
            raise InputError(f"Expected at least 2 test images, got {len(labels)}: half of them "
                             "set the temperature.")
        fitting, logits, labels = (logits[half], labels[half]), logits[~half], labels[~half]
        split = take_rows(split, np.flatnonzero(~half))
        fitted_on = f"{half.sum():,} test images that are left out otherwise"
        subset = f"{len(labels):,} images, one half of {subset}"
    temperature, refused = _temperature(*fitting)
    variants = {BEFORE: logits} | ({AFTER: logits / temperature} if temperature else {})
    scores: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    for place, (name, values) in enumerate(variants.items()):
        scores[name] = {score: bootstrapped(
            functools.partial(_of_rows, function, values, labels), len(labels), most=most)
            for score, (function, most) in _scores(settings.num_bins).items()}
        diagram = metrics.reliability_diagram(values, labels, num_bins=settings.num_bins)
        arrays |= {f"{field}_{place}": value for field, value in diagram._asdict().items()}
    score, doubts = _doubts(run, split.images, logits, work.folder)
    correct = np.asarray(predicted_classes(logits)) == labels
    curve = metrics.coverage_curve(doubts, correct)
    points = np.unique(np.linspace(0, len(labels) - 1, CURVE_POINTS).astype(int))
    return Measured({
        "subset": subset, "num_images": len(labels), "fitted_on": fitted_on,
        "temperature": temperature, "without_temperature": refused, "scores": scores,
        "doubt": {"score": score, "area": bootstrapped(
            lambda rows: metrics.coverage_curve(doubts[rows], correct[rows]).area, len(labels),
            most=1)},
    }, {**arrays, "accepted": curve.coverage[points],
        "accuracy_of_accepted": curve.accuracy[points]})


def _doubts(run, images, logits, folder) -> tuple[str, np.ndarray]:
    """The name and the values [N] of the score of doubt: of a run the one that ``predict`` prints.
    """
    score = UNMEASURED
    if not isinstance(run, ForeignModel):
        measure_doubt(run, folder)
        score = load_doubt(folder)
    features = np.zeros((len(logits), 0))  # Scores of logits need none.
    if score.statistics is not None:
        features = outputs_of(run.features_fn, images, run.layout)
    return SCORES[score.score], np.asarray(
        doubt_of(score.score, logits, features, score.statistics))


def _of_rows(score, logits, labels, rows):
    return score(logits[rows], labels[rows])


def _held_out(run):
    if run.config is None or run.config.select == "validation":
        return run.splits.selection
    return run.dataset.validation


def _temperature(logits: np.ndarray, labels: np.ndarray) -> tuple[float | None, str | None]:
    """The temperature; or None, and the reason why no temperature is the best."""
    try:
        return metrics.fit_temperature(logits, labels), None
    except InputError as error:
        return None, str(error)


def estimates(run: Run) -> Iterator[Estimate]:
    """Yields each score before and after temperature scaling, and the temperature."""
    facts = run.facts("calibration")
    if facts is None:
        return
    for variant, scores in facts["scores"].items():
        for name, values in scores.items():
            yield estimate(name, variant, values)
    yield estimate(AREA, f"doubt: {facts['doubt']['score']}", facts["doubt"]["area"])
    if facts["temperature"] is not None:
        yield Estimate("temperature", facts["fitted_on"], facts["temperature"], "")


def _diagram(study: Study) -> Picture:
    results, styles = study.first_results("calibration"), row_styles(study.labels)
    figure = new_figure(2.2 + 2.4 * len(results), 3.6)
    axes = figure.subplots(1, len(results), squeeze=False, sharey=True)[0]
    for ax, (row, one) in zip(axes, results.items(), strict=True):
        ax.plot([0, 1], [0, 1], color="#595959", linewidth=0.8, linestyle=(0, (4, 3)))
        for place, filled in enumerate((True, False)):
            if f"count_{place}" not in one:
                continue
            some = one[f"count_{place}"] > 0
            ax.plot(one[f"confidence_{place}"][some], one[f"accuracy_{place}"][some],
                    color=styles[row].color, marker=styles[row].marker, markersize=5,
                    linewidth=1.2, linestyle="-" if filled else (0, (1, 1)),
                    markerfacecolor=styles[row].color if filled else "white")
        ax.set_title(wrap(study.labels[row], 24), fontsize=9)
        ax.set_xlabel("Confidence")
        ax.set_xlim(0, 1)
        ax.set_ylim(0, 1)
        ax.grid(**GRID)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("Accuracy")
    return Picture(
        "reliability", figure, "Reliability diagrams.",
        f"Accuracy against confidence, a panel for each of {len(results)} models.",
        "How to read: filled: as it is; open: after temperature scaling; bins of equal width; "
        "empty ones are left out. Below the diagonal a network is too confident. The first run of "
        "each row.")


def _coverage(study: Study) -> Picture:
    results, styles = study.first_results("calibration"), row_styles(study.labels)
    figure = new_figure(6.4, 4.0)
    ax = figure.subplots()
    for row, one in results.items():
        ax.plot(100 * one["accepted"], 100 * one["accuracy_of_accepted"], color=styles[row].color,
                linewidth=1.4, linestyle=styles[row].dashes,
                label=wrap(f"{study.labels[row]}: {one['doubt']['score']}", 44))
    ax.set_xlabel("Share of predictions accepted, the least doubtful first [%]")
    ax.set_ylabel("Accuracy of the accepted [%]")
    ax.set_xlim(0, 100)
    ax.grid(**GRID)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8)
    return Picture(
        "coverage", figure, "Accuracy against coverage.",
        f"Accuracy of the accepted predictions against their share, {len(results)} lines.",
        "How to read: at the right all predictions are accepted. The better a score tells doubtful "
        "predictions, the higher the line. The score is that of the command predict, for models "
        "that are no runs the probability. The first run of each row.")


def _section(study: Study) -> Section | None:
    if not found_of(study, estimates):
        return None
    temperatures = "; ".join(sorted({facts["fitted_on"] for runs in study.runs.values()
                                     for run in runs if (facts := run.facts("calibration"))}))
    return Section(
        "calibration", "Calibration", "", (table_of(
            study, estimates, "Calibration of the probabilities.",
            f"Images: {subsets_text(study, 'calibration')} Temperature fitted on {temperatures}. "
            "Intervals: bootstrap over images.",
            "Smaller is better, but for the area, at most 1. Calibration errors of few images are "
            "too large: noise in a bin counts as an error.", digits=4),),
        (_diagram(study), _coverage(study)))


def table_text(facts: dict) -> str:
    """Formats the result as plain text."""
    lines = [f"{facts['subset']}; temperature fitted on {facts['fitted_on']}"]
    lines += [f"{name}, {variant}: {value:.4f} [{low:.4f}–{high:.4f}]"
              for variant, scores in facts["scores"].items()
              for name, (value, low, high) in scores.items()]
    value, low, high = facts["doubt"]["area"]
    lines.append(f"{AREA}, doubt: {facts['doubt']['score']}: {value:.4f} [{low:.4f}–{high:.4f}]")
    told = facts["without_temperature"] or f"temperature: {facts['temperature']:.4g}"
    return "\n".join([*lines, told])


CALIBRATION = Measurement(
    "calibration", CalibrationSettings(), _measure, section=_section,
    numbers=(numbers_of(estimates),), estimates=estimates, suite="calibration",
    command="evaluate", text=table_text, parallel=True)
