"""What came of a sweep: tables, and a line plot, heat maps or neither, by how much was swept.

Accuracies are fractions in the files of the runs and per cent from here on.
"""

import csv
import io
import itertools
import math
import pathlib
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from jaxrobust.app import files
from jaxrobust.app.report import figures
from jaxrobust.app.report.comparison import classes_of
from jaxrobust.app.report.figures import add_legend, new_figure, row_style
from jaxrobust.app.report.frame import accuracies_of, accuracy_numbers, table
from jaxrobust.app.report.page import (
    Cell,
    Picture,
    Section,
    Table,
    TableRow,
    count,
    duration,
    level_name,
    listed,
    with_spread,
)
from jaxrobust.app.report.report import section_markdown
from jaxrobust.app.study import Run, study_of_runs
from jaxrobust.app.sweep import Plan, number_text, run_name, setting_name
from jaxrobust.data import FOLDER_PREFIX

SELECTION = "Validation accuracy"
MAX_FACETS = 6
"""Combinations of the settings after the second up to which they are drawn."""


class Spread(NamedTuple):
    """Of a quantity over the finished runs of a setting."""

    mean: float  # per cent
    std: float | None  # per cent, over the training seeds, ddof=1; None with one


class Outcome(NamedTuple):
    """What came of one setting."""

    values: dict[str, float]
    finished: tuple[Run, ...]
    diverged: tuple[tuple[int, str], ...]  # seeds, and what was said of them
    measures: dict[str, Spread]  # by title; empty if no run is finished


class Panel(NamedTuple):
    """One heat map; rows are values of the first setting, columns those of the second."""

    title: str
    mean: np.ndarray  # [A, B]; NaN where no run is finished
    labels: np.ndarray  # [A, B] of str: what is written in the cells
    best: np.ndarray  # [A, B] of bool


def write_sweep(folder: pathlib.Path, plan: Plan) -> pathlib.Path:
    """Writes ``sweep.json``, ``.csv`` and ``.md`` and the figures; returns the path of the last.

    Args:
      folder: of the sweep, in which each run is finished or has diverged.
      plan: of the sweep.
    """
    outcomes = load_outcomes(folder, plan)
    there = files.read_json(folder / "sweep.json")
    files.write_json(folder / "sweep.json", {**there, "results": results_json(plan, outcomes)})
    files.write_text(folder / "sweep.csv", results_csv(plan, outcomes))
    section = _section(plan, outcomes)
    files.make_folder(folder / "figures")
    for picture in section.pictures:
        figures.save(picture.figure, folder / "figures" / picture.name)
    provenance = there["provenance"]
    trained = [run.provenance for outcome in outcomes for run in outcome.finished]
    files.write_text(folder / "sweep.md", "\n\n".join([
        f"# Sweep of {plan.recipe} over {', '.join(plan.over)}",
        *section_markdown(section, "figures/"),
        *([_time_sentence(trained)] if trained else []),
        f"Begun with `{provenance['command']}` at commit {provenance['commit']}, on "
        f"{provenance['hardware']}. What each run came from is in the `provenance.json` of its "
        "folder, all numbers are in `sweep.json`."]) + "\n")
    return folder / "sweep.md"


def _time_sentence(trained: Sequence[dict]) -> str:
    # The time of a run that was trained with others is that of all of them.
    seconds = sum(run["seconds"] / run["runs_together"] for run in trained)
    return (f"The training of the finished runs took {duration(seconds)}, with "
            f"{listed(run['runs_together'] for run in trained)} at once.")


# --- Numbers ---------------------------------------------------------------------------------


def load_outcomes(folder: pathlib.Path, plan: Plan) -> list[Outcome]:
    """What came of each setting, in the order of the plan."""
    study = study_of_runs([folder / name for name in plan.configs()])
    outcomes = []
    for values in plan.settings():
        places = {seed: folder / run_name(values, seed) for seed in plan.seeds}
        diverged = tuple((seed, files.read_json(place / "diverged.json")["message"])
                         for seed, place in places.items() if (place / "diverged.json").is_file())
        finished = tuple(run for place in places.values() for run in study.finished(str(place)))
        outcomes.append(Outcome(values, finished, diverged, _measures(plan, finished)))
    return outcomes


def _measures(plan: Plan, finished: Sequence[Run]) -> dict[str, Spread]:
    measures = {}
    if finished and plan.run.select == "validation":
        measures[SELECTION] = _spread([selection_accuracy(run) for run in finished])
    return measures | {level_name(level): _spread(accuracy.by_seed)
                       for level, accuracy in accuracies(finished).items()}


def accuracies(finished: Sequence[Run]) -> dict:
    """By noise level, over the runs of one setting."""
    found = accuracies_of(table(("", "", run.seed, *number) for run in finished
                                for number in accuracy_numbers(run)), [""])[""]
    return {one.level: one for one in found.values() if not math.isnan(one.level)}


def _spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def selection_accuracy(run: Run) -> float:
    """Accuracy, in per cent, of a finished run on the images that chose its epoch."""
    chosen, = (row for row in run.epochs if row["epoch"] == run.evaluation["epoch"])
    return 100 * chosen["selection_accuracy"]


def best_settings(outcomes: Sequence[Outcome]) -> list[int]:
    """Indices of the settings with the best mean validation accuracy, several if they are equal.

    The test images have no say. A setting of which a run diverged cannot be the best, for the
    mean over the others would flatter it. Without validation images there is none.
    """
    means = {index: outcome.measures[SELECTION].mean for index, outcome in enumerate(outcomes)
             if SELECTION in outcome.measures and not outcome.diverged}
    return [index for index, mean in means.items() if mean == max(means.values())]


def titles_of(plan: Plan) -> list[str]:
    """What is measured of each run, as the tables and figures name it."""
    selection = [SELECTION] if plan.run.select == "validation" else []
    return selection + [level_name(level) for level in sorted(plan.evaluation.noise_levels)]


def results_json(plan: Plan, outcomes: Sequence[Outcome]) -> list[dict]:
    """The settings with their numbers, for machines; accuracies in per cent."""
    best = best_settings(outcomes)
    return [{
        "values": outcome.values,
        "best": index in best,
        "num_finished": len(outcome.finished),
        "selection": _spread_json(outcome.measures.get(SELECTION)),
        "accuracy": [{"noise_std_255": level, **_spread_json(accuracy)}
                     for level in sorted(plan.evaluation.noise_levels)
                     if (accuracy := outcome.measures.get(level_name(level)))],
        "runs": [*(_run_json(plan, run) for run in outcome.finished),
                 *({"folder": run_name(outcome.values, seed), "seed": seed, "status": "diverged",
                    "message": message} for seed, message in outcome.diverged)],
    } for index, outcome in enumerate(outcomes)]


def _spread_json(spread: Spread | None) -> dict | None:
    return spread and {"mean_percent": spread.mean, "std_over_seeds_percent": spread.std}


def _run_json(plan: Plan, run: Run) -> dict:
    chosen = plan.run.select == "validation"
    return {
        "folder": run.folder.name, "seed": run.seed, "status": "finished",
        "epoch": run.evaluation["epoch"],
        **{name: run.provenance[name] for name in ("seconds", "runs_together")},
        "selection_percent": selection_accuracy(run) if chosen else None,
        "accuracy": [{"noise_std_255": level, "mean_percent": accuracy.mean,
                      "std_over_draws_percent": None if math.isnan(accuracy.std_over_draws)
                      else accuracy.std_over_draws}
                     for level, accuracy in accuracies([run]).items()]}


def results_csv(plan: Plan, outcomes: Sequence[Outcome]) -> str:
    """A line for each setting; accuracies in per cent, empty where no run is finished."""
    columns = {SELECTION: "selection"} | {
        level_name(level): f"noise_{level:g}_255" for level in plan.evaluation.noise_levels}
    titles, best = titles_of(plan), best_settings(outcomes)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*plan.over, "num_finished", "num_diverged", "best", *(
        f"{columns[title]}_{what}_percent" for title in titles
        for what in ("mean", "std_over_seeds"))])
    for index, outcome in enumerate(outcomes):
        spreads = [outcome.measures.get(title, (None, None)) for title in titles]
        writer.writerow([
            *map(number_text, outcome.values.values()), len(outcome.finished),
            len(outcome.diverged), "yes" if index in best else "no",
            *("" if number is None else f"{number:.4f}"
              for spread in spreads for number in spread)])
    return out.getvalue()


# --- Page ------------------------------------------------------------------------------------


def _section(plan: Plan, outcomes: Sequence[Outcome]) -> Section:
    lead = [_best_sentence(plan, outcomes)]
    pictures = _pictures(plan, outcomes)
    if not pictures:
        lead.append(f"No figure: more than {MAX_FACETS} combinations of the settings after the "
                    "second.")
    return Section("results", "Results", " ".join(lead), (results_table(plan, outcomes),),
                   tuple(pictures))


def _best_sentence(plan: Plan, outcomes: Sequence[Outcome]) -> str:
    if plan.run.select != "validation":
        chosen = {"last": "the last epoch is kept",
                  "test": "the epoch is chosen on the test images, which makes their accuracy too "
                          "high"}[plan.run.select]
        return f"No setting is marked as the best, for no images are held out: {chosen}."
    best = [outcomes[index] for index in best_settings(outcomes)]
    if not best:
        return "No setting is marked as the best, for of each a run diverged."
    names = "; ".join(setting_name(outcome.values).replace(",", ", ") for outcome in best)
    return (f"Best by validation accuracy: {names}, with "
            f"{with_spread(*best[0].measures[SELECTION])} %.")


def results_table(plan: Plan, outcomes: Sequence[Outcome]) -> Table:
    """A row for each setting."""
    best, rows = best_settings(outcomes), []
    for index, outcome in enumerate(outcomes):
        head, *others = map(number_text, outcome.values.values())
        cells = [Cell(with_spread(*outcome.measures[title]) if outcome.measures else "diverged",
                      bold=index in best and title == SELECTION) for title in titles_of(plan)]
        rows.append(TableRow(head, (*map(Cell, others), Cell(_count_text(outcome)), *cells)))
    evaluations = [run.evaluation for outcome in outcomes for run in outcome.finished]
    tested = f"{count(evaluations[0]['num_images'])} test images, " if evaluations else ""
    classes = classes_of([run for outcome in outcomes for run in outcome.finished])
    commonest = ("" if classes is None else
                 " Always saying “{}”, the commonest class: {:.2f} %.".format(*classes.commonest))
    # A folder may have images of its own for that, of any number.
    known = plan.run.validation_size >= 1 and not plan.run.dataset.startswith(FOLDER_PREFIX)
    held_out = f"{count(plan.run.validation_size)} images" if known else "images"
    selection = (f"{SELECTION}: on the {held_out} that choose the epoch, bold where best; the test "
                 "images have no say in that. "
                 if plan.run.select == "validation" else "")
    diverged = ("A setting of which a run diverged cannot be the best: the others alone flatter it."
                if any(outcome.diverged for outcome in outcomes) and selection else "")
    return Table(
        "Accuracy in %, clean and under Gaussian noise.",
        (*plan.over, "n", *titles_of(plan)), tuple(rows),
        f"{tested}{plan.evaluation.num_draws} draws of the noise at each level. Mean ± standard "
        "deviation over the n finished training seeds; with one, its spread is unknown."
        f"{commonest}",
        (selection + diverged).strip())


def _count_text(outcome: Outcome) -> str:
    number = len(outcome.diverged)
    return f"{len(outcome.finished)}" + (f" ({number} diverged)" if number else "")


def _pictures(plan: Plan, outcomes: Sequence[Outcome]) -> list[Picture]:
    """None where the settings after the second have too many combinations."""
    best, titles = best_settings(outcomes), titles_of(plan)
    names = list(plan.over)
    if len(names) == 1:
        return [Picture(
            "accuracy", line_figure(names[0], titles, outcomes, best), "Accuracy by setting.",
            f"Accuracy against {names[0]}, a line for each noise level.",
            _SPREAD_WORDS + _BEST_WORDS * bool(best))]
    facets = [dict(zip(names[2:], values, strict=True))
              for values in itertools.product(*(plan.over[name] for name in names[2:]))]
    if len(facets) > MAX_FACETS:
        return []
    words = _CELL_WORDS + _BEST_WORDS * bool(best)
    if len(names) == 2:
        panels = [_panel(plan, outcomes, best, title, {}, title) for title in titles]
        return [Picture(
            "accuracy", heat_figure(plan, panels, shared=False), "Accuracy by setting.",
            f"Heat maps of the accuracy over {names[0]} and {names[1]}.",
            f"{words} Each panel has a colour scale of its own.")]
    return [Picture(
        title.lower().replace(" ", "_").replace("/", "_"),
        heat_figure(plan, [_panel(plan, outcomes, best, title, facet, _facet_title(facet))
                           for facet in facets], shared=True),
        f"{title}.", f"Heat maps, {title}, over {names[0]} and {names[1]}.", words)
        for title in titles]


_SPREAD_WORDS = "Bars: ± standard deviation over the training seeds. "
_CELL_WORDS = ("In the cells: mean in %, below it ± standard deviation over the training seeds, "
               "and how many of them are finished if some diverged. Hatched: all diverged. ")
_BEST_WORDS = "Marked: the best setting by validation accuracy."


def _facet_title(facet: dict[str, float]) -> str:
    return ", ".join(f"{name}={number_text(value)}" for name, value in facet.items())


def _panel(plan, outcomes, best, measure, facet, title) -> Panel:
    """The heat map of one measure where the settings after the second are those of ``facet``."""
    shape = tuple(len(values) for values in list(plan.over.values())[:2])
    chosen = [(index, outcome) for index, outcome in enumerate(outcomes)
              if facet.items() <= outcome.values.items()]
    means = [outcome.measures[measure].mean if outcome.measures else math.nan
             for _, outcome in chosen]
    return Panel(
        title, np.reshape(means, shape),
        np.reshape([_cell_text(outcome, measure) for _, outcome in chosen], shape),
        np.reshape([index in best for index, _ in chosen], shape))


def _cell_text(outcome: Outcome, measure: str) -> str:
    if not outcome.measures:
        return ""
    mean, std = outcome.measures[measure]
    lines = [f"{mean:.1f}"] + ([] if std is None else [f"±{std:.1f}"])
    if outcome.diverged:
        lines.append(f"{len(outcome.finished)} of {len(outcome.finished) + len(outcome.diverged)}")
    return "\n".join(lines)


# --- Figures ---------------------------------------------------------------------------------


def line_figure(name: str, titles: Sequence[str], outcomes: Sequence[Outcome],
                best: Iterable[int]) -> Figure:
    """Accuracy against the one setting swept, a line for each measure."""
    figure = new_figure(7, 5.2)
    ax = figure.subplots()
    values = [outcome.values[name] for outcome in outcomes]
    x, scale = axis_positions(values)
    handles = []
    for index, title in enumerate(titles):
        look = {"color": row_style(index).color, "marker": row_style(index).marker,
                "linestyle": row_style(index).dashes, "linewidth": 1.4, "markersize": 6}
        mean, std = np.array([
            (math.nan, 0.0) if not outcome.measures else
            (outcome.measures[title].mean, outcome.measures[title].std or 0.0)
            for outcome in outcomes]).T
        ax.errorbar(x, mean, yerr=std, capsize=3, markeredgecolor="white", markeredgewidth=0.6,
                    **look)
        handles.append(Line2D([], [], label=title, **look))
    for index, outcome in enumerate(outcomes):
        if not outcome.finished:
            ax.axvline(x[index], color="#595959", linewidth=0.8, linestyle=(0, (1, 2)))
            ax.text(x[index], 0.5, "diverged", transform=ax.get_xaxis_transform(), rotation=90,
                    ha="center", va="center", style="italic",
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 2})
    for index in best:
        ax.axvline(x[index], color="#D9D9D9", linewidth=9, zorder=0)
    if best:
        handles.append(Patch(color="#D9D9D9", label="best by validation accuracy"))
    ax.set_xticks(x, [number_text(value) for value in values])
    margin = 0.06 * max(x[-1] - x[0], 1e-9)
    ax.set_xlim(x[0] - margin, x[-1] + margin)
    ax.set_xlabel(f"{name}{scale}")
    ax.set_ylabel("Accuracy [%]")
    add_legend(figure, handles)
    return figure


def axis_positions(values: Sequence[float]) -> tuple[np.ndarray, str]:
    """Where increasing values stand on an axis, and the words for it.

    To scale, linear or logarithmic, whichever sets neighbours further apart; side by side if two
    of them would be too close for their labels.
    """
    scales = [(np.array(values), "")]
    if values[0] > 0:
        scales.append((np.log10(values), " (logarithmic)"))
    gaps = [np.diff(x).min(initial=math.inf) / max(x[-1] - x[0], 1e-300) for x, _ in scales]
    if max(gaps) < 0.07:
        return np.arange(len(values)), " (not to scale)"
    return scales[int(np.argmax(gaps))]


def heat_figure(plan: Plan, panels: Sequence[Panel], *, shared: bool) -> Figure:
    """Heat maps side by side, with one colour scale or, if not ``shared``, one for each.

    The colour map is cividis: perceptually uniform, the same to colour-blind readers, and
    increasing in lightness, for print without colours.
    """
    (first, rows), (second, columns) = list(plan.over.items())[:2]
    lines = max(label.count("\n") + 1 for panel in panels for label in panel.labels.flat)
    width, height = 1.5 + 0.62 * len(columns), 1.1 + (0.16 + 0.17 * lines) * len(rows)
    across = min(len(panels), max(1, int(13 / width)))
    down = math.ceil(len(panels) / across)
    figure = new_figure(max(4.2, width * across), height * down + 0.5)
    grid = figure.subplots(down, across, squeeze=False)
    colors = matplotlib.colormaps["cividis"]
    scales = _scales(panels, shared)
    for ax, panel, scale in zip(grid.flat, panels, scales, strict=False):
        image = ax.imshow(np.ma.masked_invalid(panel.mean), cmap=colors, norm=scale, aspect="auto")
        for (row, column), label in np.ndenumerate(panel.labels):
            value = panel.mean[row, column]
            if np.isnan(value):
                ax.add_patch(_frame(row, column, 0.5, facecolor="white", edgecolor="#595959",
                                    hatch="////", linewidth=0.5))
                continue
            lightness = np.dot(colors(scale(value))[:3], (0.299, 0.587, 0.114))
            ax.text(column, row, label, ha="center", va="center", fontsize=8, linespacing=1.05,
                    color="black" if lightness > 0.47 else "white")
        for row, column in np.argwhere(panel.best):
            # White in black: one of them stands out from any colour.
            for inset, color, thick in ((0.46, "black", 3.6), (0.46, "white", 1.4)):
                ax.add_patch(_frame(row, column, inset, fill=False, edgecolor=color,
                                    linewidth=thick, zorder=3))
        ax.set_xticks(range(len(columns)), map(number_text, columns))
        ax.set_yticks(range(len(rows)), map(number_text, rows))
        ax.tick_params(length=0, labelsize=8)
        ax.set_title(panel.title, fontsize=10)
        ax.set_xlabel(second, fontsize=9)
        ax.set_ylabel(first, fontsize=9)
        if not shared:
            _color_bar(figure, image, ax)
    for ax in grid.flat[len(panels):]:
        ax.set_axis_off()
    if shared:
        _color_bar(figure, image, grid.ravel().tolist())
    handles = []
    if any(panel.best.any() for panel in panels):
        handles.append(Patch(facecolor="white", edgecolor="black", linewidth=2,
                             label="best by validation accuracy"))
    if any(np.isnan(panel.mean).any() for panel in panels):
        handles.append(Patch(facecolor="white", edgecolor="#595959", hatch="////",
                             label="diverged"))
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False,
                      fontsize=9)
    return figure


def _scales(panels: Sequence[Panel], shared: bool) -> list[Normalize]:
    """From least to greatest, at least a point apart; of any range where all diverged."""
    def scale(values):
        finite = values[np.isfinite(values)]
        low, high = (finite.min(), finite.max()) if finite.size else (0.0, 100.0)
        middle, half = (low + high) / 2, max(high - low, 1.0) / 2
        return Normalize(middle - half, middle + half)

    if shared:
        return [scale(np.stack([panel.mean for panel in panels]))] * len(panels)
    return [scale(panel.mean) for panel in panels]


def _frame(row: int, column: int, half: float, **look) -> Rectangle:
    """A rectangle about the middle of a cell."""
    return Rectangle((column - half, row - half), 2 * half, 2 * half, **look)


def _color_bar(figure, image, axes):
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=18)
    bar.set_label("Accuracy [%]", fontsize=8)
    bar.ax.tick_params(labelsize=8)
