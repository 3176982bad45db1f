"""The report's section on curvature across networks: is the flatter network the more robust one?

One point for each run, where :mod:`experiments.robustness_report` has one for each image.
"""

from typing import NamedTuple

import numpy as np
from scipy import stats

from experiments.figures import row_style
from experiments.networks_figure import Network, networks_figure
from experiments.page import Cell, Picture, Section, Table, TableRow, level_name, listed
from experiments.study import Run, Study

FEWEST = 8
"""Networks without which there is no section."""

CURVATURES = {
    "frobenius_squared": "Exact Hessian",
    "finite_difference": "Finite differences",
    "smoothed_frobenius_squared": "Noise-averaged loss",
}
"""Columns of the curvature file; different quantities on a ReLU network."""

RESAMPLES = 500
"""Of the rows, with replacement, for the interval of a correlation."""

SHARE = 0.95
"""Of the resampled correlations within the interval."""


class Coefficient(NamedTuple):
    """Spearman's, with its interval; NaN where it is not defined."""

    value: float
    low: float
    high: float


def rank_correlation(
    x: np.ndarray, y: np.ndarray, groups: np.ndarray, given: np.ndarray | None = None
) -> Coefficient:
    """Spearman's coefficient of x and y [n], and the interval over resampled groups.

    Whole groups [n] (the seeds of a row, which are alike) are drawn with replacement, so that
    many seeds of few rows do not pass for many networks. Resamples without a coefficient, such as
    those in which x or y is constant, are left out.

    Args:
      x: one variable.
      y: the other.
      groups: what belongs together.
      given: [n], whose ranks are held fixed: the partial coefficient.
    """
    variables = (x, y) if given is None else (x, y, given)
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    random, found = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        drawn = np.concatenate([members[index] for index in random.integers(
            len(members), size=len(members))])
        found.append(_spearman(*(values[drawn] for values in variables)))
    tail = (1 - SHARE) / 2
    return Coefficient(_spearman(*variables), *(
        float(np.nanquantile(found, q)) if np.isfinite(found).any() else float("nan")
        for q in (tail, 1 - tail)))


def _spearman(x: np.ndarray, y: np.ndarray, given: np.ndarray | None = None) -> float:
    variables = [x, y] if given is None else [x, y, given]
    if any(np.ptp(values) == 0 for values in variables):
        return float("nan")
    # Several times as fast as scipy.stats.spearmanr, which also makes a p-value.
    correlations = np.corrcoef([stats.rankdata(values) for values in variables])
    if given is None:
        return float(correlations[0, 1])
    (xy, xz), yz = correlations[0, 1:], correlations[1, 2]
    rest = (1 - xz**2) * (1 - yz**2)
    # Where one variable is ranked as the given one is, nothing is left of it.
    return float((xy - xz * yz) / np.sqrt(rest)) if rest > 1e-9 else float("nan")


def section(study: Study) -> Section | None:
    """The section; None for fewer than :data:`FEWEST` networks with curvature, or without clean
    and noisy accuracies that all of them have."""
    found = [(row, run) for row in study.labels for run in study.finished(row)
             if run.medians is not None and np.isfinite(list(run.medians.values())).all()]
    if len(found) < FEWEST:
        return None
    levels = sorted(set.intersection(*(
        {test["std_255"] for test in run.evaluation["levels"]} for _, run in found)))
    if len(levels) < 2 or levels[0] != 0:
        return None
    return Section(
        "networks", "Curvature and robustness, network by network",
        "Is a network whose loss curves less at clean images the one that loses less to noise?",
        (_table(found, levels),), (_picture(study, found, levels[-1]),))


def _medians(found: list[tuple[str, Run]], key: str) -> np.ndarray:
    return np.array([run.medians[key] for _, run in found])


def _measures(found: list[tuple[str, Run]]) -> dict[str, str]:
    return {key: name for key, name in CURVATURES.items()
            if all(key in run.medians for _, run in found)}


def _accuracies(found: list[tuple[str, Run]], level: float) -> np.ndarray:
    """Per cent, mean over the draws, by network."""
    return np.array([100 * np.mean(next(
        test["accuracies"] for test in run.evaluation["levels"] if test["std_255"] == level))
        for _, run in found])


def _table(found: list[tuple[str, Run]], levels: list[float]) -> Table:
    groups = np.array([row for row, _ in found])
    clean, rows = _accuracies(found, 0), []
    measures = _measures(found)
    for level in levels:
        accuracy = _accuracies(found, level)
        outcomes = {f"accuracy, {level_name(level).lower()}": (accuracy, None)}
        if level:
            outcomes |= {f"loss of accuracy at {level_name(level)}": (clean - accuracy, None),
                         f"accuracy, {level_name(level)}, clean accuracy held fixed":
                         (accuracy, clean)}
        rows += [TableRow(head, tuple(
            Cell(_text(rank_correlation(_medians(found, key), values, groups, given)))
            for key in measures)) for head, (values, given) in outcomes.items()]
    return Table(
        "Spearman's rank correlation, over networks, of the median curvature at clean test images "
        "with the accuracy and with what noise takes of it.",
        ("Outcome", *measures.values()), tuple(rows),
        f"{len(found)} networks of {len(set(groups))} rows; in brackets the {100 * SHARE:g} % "
        "interval over resampled rows.",
        "How to read: if low curvature goes with robustness, accuracy has a negative coefficient "
        "and the loss of accuracy a positive one. Networks that are flat because they have "
        "learnt little have low accuracy and lose little: that is taken out where the ranks of the "
        "clean accuracy are held fixed (partial coefficients).")


def _text(found: Coefficient) -> str:
    if np.isnan(found.value):
        return "–"
    return f"{found.value:+.2f} [{found.low:+.2f}, {found.high:+.2f}]".replace("-", "−")


def _picture(study: Study, found: list[tuple[str, Run]], level: float) -> Picture:
    measures, methods = _measures(found), list(dict.fromkeys(study.methods.values()))
    clean, noisy = _accuracies(found, 0), _accuracies(found, level)
    networks = [Network(study.methods[row], row_style(methods.index(study.methods[row])),
                        {key: run.medians[key] for key in measures}, float(accuracy),
                        float(before - accuracy))
                for (row, run), before, accuracy in zip(found, clean, noisy, strict=True)]
    return Picture(
        "networks", networks_figure(networks, measures, level_name(level)),
        f"Median curvature and accuracy at {level_name(level)}, network by network.",
        f"Scatter plots of {len(found)} networks, a column for each of {len(measures)} measures of "
        "curvature: accuracy under noise above, loss of accuracy below.",
        "How to read: a point for each network, by the method that trained it "
        f"({listed(methods)}). Further left is flatter. Above: accuracy under noise, higher is "
        "better; below: clean accuracy less that, lower is more robust. Medians over the images, "
        "on a logarithmic axis; those of zero or less lie beyond its left edge.")
