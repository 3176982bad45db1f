"""The report's section on curvature across networks: is the flatter network the more robust one?

One point for each run, where :mod:`.noise_counts` has one for each image.
"""

import numpy as np
import pandas as pd

from jaxrobust.app.measurements.curvature import CURVATURES, measures_of
from jaxrobust.app.measurements.runner import Measurement
from jaxrobust.app.report.figures import (
    add_legend,
    label_logarithmic,
    new_figure,
    row_styles,
    style_handles,
)
from jaxrobust.app.report.frame import table
from jaxrobust.app.report.page import Picture, Section, Table, level_name, listed, text_row
from jaxrobust.app.study.read import Run, Study
from jaxrobust.statistics import Coefficient, RankCorrelations

FEWEST = 8
"""Smallest number of networks for which there is a section."""

CONFIDENCE = 0.95
"""Level of the intervals of correlations."""

COEFFICIENT = "rank correlation with the median curvature"
ENDS = ("", ", lower end of its 95 % interval", ", upper end of its 95 % interval")
"""Endings that tell a coefficient and the ends of its interval apart in the table of numbers."""


def section(study: Study) -> Section | None:
    """Makes the section; returns None for fewer than :data:`FEWEST` networks with curvature, or
    without clean and noisy accuracies that all of them have."""
    found, levels = _found(study)
    if not levels:
        return None
    return Section(
        "networks", "Curvature and robustness, network by network",
        "Is a network whose loss curves less at clean images the one that loses less to noise?",
        (_table(found, levels),), (_picture(study, found, levels[-1]),))


def _found(study: Study) -> tuple[list[tuple[str, Run]], list[float]]:
    """Returns the networks, and the noise levels of all of them; no levels for no section."""
    found = networks_of(study)
    levels = sorted(set.intersection(*(
        {test["std_255"] for test in run.evaluation["levels"]} for _, run in found))
        ) if len(found) >= FEWEST else []
    return found, levels if len(levels) > 1 and levels[0] == 0 else []


def networks_of(study: Study) -> list[tuple[str, Run]]:
    """Returns the networks with curvature, each with its row, without those that equal an earlier
    one to the last digit.

    A setting that does nothing in two rows, such as a bound that no gradient reaches, makes them
    one network, which must not count twice.
    """
    results: dict[tuple, tuple[str, Run]] = {}
    for row in study.labels:
        for run in study.finished(row):
            if run.medians is not None and np.isfinite(list(run.medians.values())).all():
                results.setdefault((str(run.medians), str(run.evaluation["levels"])), (row, run))
    return list(results.values())


def _medians(found: list[tuple[str, Run]], key: str) -> np.ndarray:
    return np.array([run.medians[key] for _, run in found])


def _measures(found: list[tuple[str, Run]]) -> dict[str, str]:
    return measures_of(CURVATURES, [run.medians for _, run in found])


def accuracies_at(found: list[tuple[str, Run]], level: float) -> np.ndarray:
    """Returns accuracies in per cent, averaged over the draws, by network."""
    return np.array([100 * np.mean(next(
        test["accuracies"] for test in run.evaluation["levels"] if test["std_255"] == level))
        for _, run in found])


def _correlations(found: list[tuple[str, Run]], levels: list[float]
                  ) -> dict[str, dict[str, Coefficient]]:
    """Returns the coefficients by outcome and measure."""
    groups = np.array([row for row, _ in found])
    measures, clean = _measures(found), accuracies_at(found, 0)
    variables: dict[str | float, np.ndarray] = {key: _medians(found, key) for key in measures}
    outcomes: list[tuple] = []  # heading, variable, and that which is held fixed
    for level in levels:
        accuracy = variables[level] = accuracies_at(found, level)
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
    """Tabulates the coefficients, which belong to no row, and the ends of their intervals."""
    found, levels = _found(study)
    return table(
        (study.name, "", None, f"{COEFFICIENT}{end}",
         f"{outcome}, {measure}", value, "", None)
        for outcome, by_measure in (_correlations(found, levels) if levels else {}).items()
        for measure, coefficient in by_measure.items()
        for end, value in zip(ENDS, coefficient, strict=True))


def _table(found: list[tuple[str, Run]], levels: list[float]) -> Table:
    rows = [text_row(head, map(text, by_measure.values()))
            for head, by_measure in _correlations(found, levels).items()]
    return Table(
        "Spearman's rank correlation, over networks, of the median curvature at clean test images "
        "with the accuracy and with what noise takes of it.",
        ("Outcome", *_measures(found).values()), tuple(rows),
        f"{len(found)} different networks of {len({row for row, _ in found})} rows; in brackets "
        f"the {100 * CONFIDENCE:g} % interval over resampled rows.",
        "How to read: if low curvature goes with robustness, accuracy has a negative coefficient "
        "and the loss of accuracy a positive one. Networks that are flat because they have learnt "
        "little have low accuracy and lose little; partial coefficients, with the ranks of the "
        "clean accuracy held fixed, remove this effect.")


def text(found: Coefficient) -> str:
    """Formats a coefficient with its interval."""
    if np.isnan(found.value):
        return "–"
    return f"{found.value:+.2f} [{found.low:+.2f}, {found.high:+.2f}]".replace("-", "−")


def _picture(study: Study, found: list[tuple[str, Run]], level: float) -> Picture:
    measures, methods = _measures(found), dict.fromkeys(study.methods.values())
    styles, clean, noisy = row_styles(methods), accuracies_at(found, 0), accuracies_at(found, level)
    figure = new_figure(3.7 * len(measures), 6.4)
    axes = figure.subplots(2, len(measures), squeeze=False, sharex="col", sharey="row")
    for column, (key, title) in zip(axes.T, measures.items(), strict=True):
        medians = _medians(found, key)
        for ax, outcome in zip(column, (noisy, clean - noisy), strict=True):
            for (row, _), median, value in zip(found, medians, outcome, strict=True):
                style = styles[study.methods[row]]
                ax.plot(median, value, linestyle="none", marker=style.marker, color=style.color,
                        alpha=0.75, markeredgecolor="white", markeredgewidth=0.5)
        column[0].set_title(title)
        column[1].set_xlabel("Median curvature [1/pixel⁴]")
        if (medians > 0).any():
            column[1].set_xscale("log", nonpositive="mask")
            label_logarithmic(column[1].xaxis, medians[medians > 0])
    axes[0, 0].set_ylabel(f"Accuracy at {level_name(level)} [%]")
    axes[1, 0].set_ylabel(f"Lost from clean to {level_name(level)} [points]")
    shown = [(method, styles[method]) for method in dict.fromkeys(
        study.methods[row] for row, _ in found)]
    add_legend(figure, style_handles(shown, linestyle="none"), columns=5)
    return Picture(
        "networks", figure,
        f"Median curvature and accuracy at {level_name(level)}, network by network.",
        f"Scatter plots of {len(found)} networks, a column for each of {len(measures)} measures of "
        "curvature: accuracy under noise above, loss of accuracy below.",
        "How to read: a point for each network, by the method that trained it "
        f"({listed(methods)}). Further left is flatter. Above: accuracy under noise, higher is "
        "better; below: clean accuracy less that, lower is more robust. Medians over the images, "
        "on a logarithmic axis; those of zero or less lie beyond its left edge.")


NETWORKS = Measurement("networks", section=section)
