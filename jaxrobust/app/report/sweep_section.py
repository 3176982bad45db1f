"""The report's section on a sweep: which combination of the settings' values is best?

Accuracies are fractions in the files of the runs and per cent from here on.
"""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from jaxrobust.app.report.figures import new_figure
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
        "Bold: the best. The test images have no say in that, and a setting of which a run "
        "diverged cannot be the best: the others alone flatter it.")
    return Section("sweep", "Sweep", lead, (table,), _pictures(study.swept, settings, best))


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


def _pictures(swept, settings, best) -> tuple[Picture, ...]:
    if len(swept) > 2:
        return ()
    figure = (line_figure if len(swept) == 1 else heat_figure)(swept, settings, best)
    return (Picture("sweep", figure, "Validation accuracy by setting.",
                    f"Validation accuracy over {' and '.join(swept)}.",
                    "Marked: the best setting. A gap: all runs diverged."),)


def line_figure(swept: dict[str, Sequence[float]], settings: Sequence[Setting],
                best: Sequence[int]) -> Figure:
    """Draws validation accuracy against the one setting swept."""
    (name, values), = swept.items()
    figure = new_figure(6, 4)
    ax = figure.subplots()
    x = np.arange(len(values))
    mean = [math.nan if setting.mean is None else float(setting.mean) for setting in settings]
    ax.errorbar(x, mean, yerr=[setting.std or 0.0 for setting in settings], capsize=3, marker="o")
    for index in best:
        ax.axvline(x[index], color="#D9D9D9", linewidth=9, zorder=0)
    ax.set_xticks(x, map(number_text, values))
    ax.set_xlabel(f"{name} (not to scale)")
    ax.set_ylabel("Validation accuracy [%]")
    return figure


def heat_figure(swept: dict[str, Sequence[float]], settings: Sequence[Setting],
                best: Sequence[int]) -> Figure:
    """Draws validation accuracy over two settings, in a colour map that grows in lightness."""
    (first, rows), (second, columns) = swept.items()
    shape = len(rows), len(columns)
    mean = np.reshape([math.nan if setting.mean is None else setting.mean for setting in settings],
                      shape)
    figure = new_figure(max(4.2, 1.8 + 0.9 * len(columns)), 1.6 + 0.5 * len(rows))
    ax = figure.subplots()
    image = ax.imshow(np.ma.masked_invalid(mean), cmap=matplotlib.colormaps["cividis"],
                      aspect="auto")
    for (row, column), value in np.ndenumerate(mean):
        index = row * shape[1] + column
        light = not np.isnan(value) and image.norm(value) > 0.5
        ax.text(column, row, settings[index].text.replace(" ", "\n", 1), ha="center", va="center",
                fontsize=8, color="black" if light or np.isnan(value) else "white",
                bbox={"fill": False, "edgecolor": "red"} if index in best else None)
    ax.set_xticks(range(shape[1]), map(number_text, columns))
    ax.set_yticks(range(shape[0]), map(number_text, rows))
    ax.set_xlabel(second)
    ax.set_ylabel(first)
    figure.colorbar(image, ax=ax).set_label("Validation accuracy [%]")
    return figure
