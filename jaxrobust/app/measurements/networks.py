"""The report's section on curvature across networks: is the flatter network the more robust one?

One point for each run, where :mod:`.noise_counts` has one for each image.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from jaxrobust.app.measurements.curvature import CURVATURES
from jaxrobust.app.measurements.runner import Measurement
from jaxrobust.app.report.figures import Style, add_legend, new_figure, row_style
from jaxrobust.app.report.frame import table
from jaxrobust.app.report.page import Cell, Picture, Section, Table, TableRow, level_name, listed
from jaxrobust.app.study.read import Run, Study
from jaxrobust.statistics import Coefficient, RankCorrelations

FEWEST = 8
"""Networks without which there is no section."""

CONFIDENCE = 0.95
"""That a correlation is within its interval."""

COEFFICIENT = "rank correlation with the median curvature"
ENDS = ("", ", lower end of its 95 % interval", ", upper end of its 95 % interval")
"""Tell a coefficient and the ends of its interval apart, in the table of numbers."""


def section(study: Study) -> Section | None:
    """The section; None for fewer than :data:`FEWEST` networks with curvature, or without clean
    and noisy accuracies that all of them have."""
    found, levels = _found(study)
    if not levels:
        return None
    return Section(
        "networks", "Curvature and robustness, network by network",
        "Is a network whose loss curves less at clean images the one that loses less to noise?",
        (_table(found, levels),), (_picture(study, found, levels[-1]),))


def _found(study: Study) -> tuple[list[tuple[str, Run]], list[float]]:
    """The networks, and the noise levels that all were tested at; none for no section."""
    found = _different([
        (row, run) for row in study.labels for run in study.finished(row)
        if run.medians is not None and np.isfinite(list(run.medians.values())).all()])
    levels = sorted(set.intersection(*(
        {test["std_255"] for test in run.evaluation["levels"]} for _, run in found))
        ) if len(found) >= FEWEST else []
    return found, levels if len(levels) > 1 and levels[0] == 0 else []


def _different(found: list[tuple[str, Run]]) -> list[tuple[str, Run]]:
    """Without those that are an earlier one again, to the last digit.

    A setting that does nothing in two rows, such as a bound that no gradient reaches, makes them
    one network, which must not count twice.
    """
    results: dict[tuple, tuple[str, Run]] = {}
    for row, run in found:
        results.setdefault((str(run.medians), str(run.evaluation["levels"])), (row, run))
    return list(results.values())


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


def _correlations(found: list[tuple[str, Run]], levels: list[float]
                  ) -> dict[str, dict[str, Coefficient]]:
    """By outcome and measure."""
    groups = np.array([row for row, _ in found])
    measures, clean = _measures(found), _accuracies(found, 0)
    variables: dict[str | float, np.ndarray] = {key: _medians(found, key) for key in measures}
    outcomes: list[tuple] = []  # heading, variable, and that which is held fixed
    for level in levels:
        accuracy = variables[level] = _accuracies(found, level)
        outcomes.append((f"accuracy, {level_name(level).lower()}", level, None))
        if level:
            lost = f"loss of accuracy at {level_name(level)}"
            variables[lost] = clean - accuracy
            outcomes += [(lost, lost, None), (
                f"accuracy, {level_name(level)}, clean accuracy held fixed", level, 0)]
    correlations = RankCorrelations(variables, groups, seed=0, confidence=CONFIDENCE)
    return {head: {measures[key]: correlations.between(key, outcome, given) for key in measures}
            for head, outcome, given in outcomes}


def numbers(study: Study) -> pd.DataFrame:
    """The coefficients, which are of no row, and the ends of their intervals."""
    found, levels = _found(study)
    return table(
        (study.name, "", None, f"{COEFFICIENT}{end}",
         f"{outcome}, {measure}", value, "", None)
        for outcome, by_measure in (_correlations(found, levels) if levels else {}).items()
        for measure, coefficient in by_measure.items()
        for end, value in zip(ENDS, coefficient, strict=True))


def _table(found: list[tuple[str, Run]], levels: list[float]) -> Table:
    rows = [TableRow(head, tuple(Cell(text(one)) for one in by_measure.values()))
            for head, by_measure in _correlations(found, levels).items()]
    return Table(
        "Spearman's rank correlation, over networks, of the median curvature at clean test images "
        "with the accuracy and with what noise takes of it.",
        ("Outcome", *_measures(found).values()), tuple(rows),
        f"{len(found)} different networks of {len({row for row, _ in found})} rows; in brackets "
        f"the {100 * CONFIDENCE:g} % interval over resampled rows.",
        "How to read: if low curvature goes with robustness, accuracy has a negative coefficient "
        "and the loss of accuracy a positive one. Networks that are flat because they have "
        "learnt little have low accuracy and lose little: that is taken out where the ranks of the "
        "clean accuracy are held fixed (partial coefficients).")


def text(found: Coefficient) -> str:
    """It with its interval."""
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


class Network(NamedTuple):
    """One run."""

    method: str
    style: Style  # of its method
    curvature: dict[str, float]  # by measure, in 1/pixel^4
    accuracy: float  # under noise, per cent
    lost: float  # clean accuracy less that, in points


def networks_figure(networks: Sequence[Network], measures: dict[str, str], level: str) -> Figure:
    """Accuracy under the noise ``level``, and what it takes, against each curvature."""
    figure = new_figure(3.7 * len(measures), 6.4)
    axes = figure.subplots(2, len(measures), squeeze=False, sharex="col", sharey="row")
    for column, (key, title) in enumerate(measures.items()):
        for row, name in enumerate(("accuracy", "lost")):
            for network in networks:
                axes[row, column].plot(
                    network.curvature[key], getattr(network, name), linestyle="none",
                    marker=network.style.marker, color=network.style.color, alpha=0.75,
                    markeredgecolor="white", markeredgewidth=0.5)
        axes[0, column].set_title(title)
        axes[1, column].set_xlabel("Median curvature [1/pixel⁴]")
        if any(network.curvature[key] > 0 for network in networks):
            axes[1, column].set_xscale("log", nonpositive="mask")
    axes[0, 0].set_ylabel(f"Accuracy at {level} [%]")
    axes[1, 0].set_ylabel(f"Lost from clean to {level} [points]")
    styles = {network.method: network.style for network in networks}
    add_legend(figure, [
        Line2D([], [], linestyle="none", marker=style.marker, color=style.color, label=method)
        for method, style in styles.items()], columns=5)
    return figure


NETWORKS = Measurement("networks", section=section)
