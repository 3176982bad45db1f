"""The report's section on a sweep: which combination of the settings' values is best?

Accuracies are fractions in the files of the runs and per cent from here on.
"""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxrobust.app.report.figures import AccuracyLine, dots_figure, row_styles
from jaxrobust.app.report.frame import VALIDATION, frame, training_numbers, values_of
from jaxrobust.app.report.page import Cell, Picture, Section, Table, TableRow, with_spread
from jaxrobust.app.study.read import Study
from jaxrobust.app.study.sweep import combinations, number_text, setting_name


class Setting(NamedTuple):
    """Results of one combination of values."""

    values: dict[str, float]
    num_finished: int
    num_diverged: int
    mean: float | None  # validation accuracy, in per cent; None without a finished run
    std: float | None  # of it over the training seeds, ddof=1; None with one

    @property
    def text(self) -> str:
        """Formats the accuracy, and how many runs it leaves out."""
        accuracy = "diverged" if self.mean is None else with_spread(self.mean, self.std)
        return accuracy + (f" ({self.num_diverged} diverged)" if self.num_diverged else "")


def section(study: Study) -> Section | None:
    """Shows validation accuracy by setting; None for no sweep, or without held-out images."""
    finished = study.all_finished()
    if not study.swept or any(run.config.select != "validation" for run in finished):
        return None
    settings = settings_of(study)
    best = best_settings(settings)
    names = "; ".join(setting_name(settings[index].values) for index in best)
    lead = (f"Best by validation accuracy: {names}, with {settings[best[0]].text} %." if best else
            "No setting is marked as the best: each has a run that diverged.")
    table = Table(
        "Validation accuracy in %, by setting.", (*study.swept, "n", "Validation accuracy"),
        tuple(TableRow(number_text(first), (
            *(Cell(number_text(value)) for value in others), Cell(str(setting.num_finished)),
            Cell(setting.text, bold=index in best)))
            for index, setting in enumerate(settings)
            for first, *others in [setting.values.values()]),
        "On the images that choose the epoch. Mean ± standard deviation over the n finished "
        "training seeds; with one, its spread is unknown.",
        "Bold: the best. Test images do not affect this choice, and a setting with a run that "
        "diverged cannot be the best, because its other runs alone would flatter it.")
    return Section("sweep", "Sweep", lead, (table,), (_picture(settings, best),))


def settings_of(study: Study) -> list[Setting]:
    """Lists the combinations in the order of the rows."""
    found, numbers = [], values_of(frame(study, training_numbers))
    for values in combinations(study.swept):
        runs = study.runs[setting_name(values)]
        accuracies = numbers.get((setting_name(values), VALIDATION, ""), ())
        found.append(Setting(
            values, len(accuracies), sum(run.diverged is not None for run in runs),
            statistics.fmean(accuracies) if accuracies else None,
            statistics.stdev(accuracies) if len(accuracies) > 1 else None))
    return found


def best_settings(settings: Sequence[Setting]) -> list[int]:
    """Returns the indices of the settings with the best mean, several if they are equal."""
    means = {index: setting.mean for index, setting in enumerate(settings)
             if setting.mean is not None and not setting.num_diverged}
    return [index for index, mean in means.items() if mean == max(means.values())]


def _picture(settings: Sequence[Setting], best: Sequence[int]) -> Picture:
    others = [index for index in range(len(settings)) if index not in best]
    lines = [AccuracyLine(
        label, style, np.array(places),
        np.array([math.nan if settings[index].mean is None else settings[index].mean
                  for index in places]),
        np.array([settings[index].std or 0.0 for index in places]))
        for (label, style), places in zip(
            row_styles(("best", "others")).items(), (best, others), strict=True) if places]
    return Picture(
        "sweep", dots_figure([setting_name(setting.values) for setting in settings], lines,
                             "Validation accuracy"),
        "Validation accuracy by setting.",
        f"Dot plot of the validation accuracy of {len(settings)} settings; the table holds the "
        "numbers.",
        "How to read: further right is better; error bars: standard deviation over the training "
        "seeds. A gap: all runs diverged.")
