"""Draws the figures of accuracy, training and features from the results of a study."""

import math
from collections.abc import Sequence

import numpy as np

from jaxrobust.app.config import InputError
from jaxrobust.app.report import figures
from jaxrobust.app.report.frame import Accuracies, accuracies, noise_level, published_accuracies
from jaxrobust.app.report.page import Picture
from jaxrobust.app.report.tables import levels_of, perturbations_of, several_seeds, spread_of
from jaxrobust.app.study.read import Study
from jaxrobust.statistics import pareto_front


def accuracy_picture(study: Study) -> Picture:
    """Shows accuracy against the noise level."""
    by_row, paper, shown = accuracies(study), [], set()
    levels = levels_of(by_row)
    lines = _lines(study, by_row, levels, [noise_level(level) for level in levels])
    for index, row in enumerate(study.labels):
        numbers = {noise_level(test): mean for key, test, (mean, _) in published_accuracies(study)
                   if key == row and test in levels}
        if numbers and study.paper_rows[row] not in shown:
            shown.add(study.paper_rows[row])
            paper.append(figures.AccuracyLine(
                study.labels[row], figures.row_style(index), np.array(list(numbers)),
                np.array(list(numbers.values())), np.zeros(len(numbers))))
    figure = figures.accuracy_figure(lines, paper)
    return Picture(
        "accuracy", figure, "Accuracy against the test noise.",
        f"Line chart of test accuracy in per cent against the noise level, a line for each of "
        f"{len(lines)} methods. The accuracy table holds the numbers.",
        f"How to read: mean accuracy; error bars: standard deviation over the {_over(study)} "
        "(often smaller than the marker). A flat, high line is a robust classifier. The markers of "
        f"a level are set side by side{' in the enlarged panel' if len(figure.axes) > 1 else ''}."
        + (f" Thin and dashed: the paper’s {study.paper.title}." if paper else ""))


def perturbation_picture(study: Study) -> Picture | None:
    """Shows accuracy under each perturbation; returns None without any."""
    by_row = accuracies(study)
    tests = perturbations_of(by_row)
    return _dots(study, "perturbations", by_row, tests,
                 "Accuracy under other perturbations.") if tests else None


def levels_picture(study: Study) -> Picture:
    """Shows accuracy where there are too few noise levels to draw a line."""
    by_row = accuracies(study)
    return _dots(study, "accuracy", by_row, levels_of(by_row), "Test accuracy.")


def pareto_picture(study: Study, level: str) -> Picture:
    """Shows the accuracy at a noise level against the clean one, a point for each row, and the
    rows that no other one beats in both.

    Args:
      level: as in the tables, such as "16/255".
    """
    by_row, spread = accuracies(study), spread_of(study)
    found = {row: (values["clean"], values[level]) for row, values in by_row.items()
             if "clean" in values and level in values}
    if not found:
        raise InputError(f"Expected finished runs of {study.name} tested clean and at {level}, "
                         "found none.")
    points = np.array([[one.mean for one in pair] for pair in found.values()])
    front = pareto_front(points)
    styles = figures.row_styles(study.labels)
    figure = figures.new_figure(9, 5.5 + 0.11 * len(found))
    ax = figure.subplots()
    for number, ((row, pair), on_front) in enumerate(zip(found.items(), front, strict=True), 1):
        across, up = np.nan_to_num([getattr(one, spread) for one in pair])
        ax.errorbar(pair[0].mean, pair[1].mean, xerr=across, yerr=up, color=styles[row].color,
                    marker=styles[row].marker, markersize=8 if on_front else 5.5, linewidth=0,
                    elinewidth=0.7, markeredgecolor="black" if on_front else "white",
                    markeredgewidth=0.8)
        ax.annotate(str(number), (pair[0].mean, pair[1].mean), xytext=(5, 4), fontsize=8,
                    textcoords="offset points")
    ends = points[front][np.argsort(points[front][:, 0])]
    ax.step(*ends.T, where="pre", color="#595959", linewidth=1, zorder=1)
    ax.set_xlabel("Test accuracy, clean [%]")
    ax.set_ylabel(f"Test accuracy under noise of {level} [%]")
    figures.add_legend(figure, figures.style_handles(
        [(f"{number} {study.labels[row]}", styles[row]) for number, row in enumerate(found, 1)],
        linestyle="none"))
    best = ", ".join(study.labels[row] for row, on in zip(found, front, strict=True) if on)
    return Picture(
        "pareto", figure, f"Accuracy at {level} against clean accuracy.",
        f"Scatter plot of test accuracies in per cent, a point for each of {len(found)} methods. "
        "The accuracy table holds the numbers.",
        "How to read: further right and further up is better. Line and black edges: the Pareto "
        f"front, the methods that no other one beats in both: {best}. Error bars: standard "
        f"deviation over the {_over(study)}; which methods are on the front may change within "
        "them.")


def _dots(study: Study, name: str, by_row: Accuracies, tests: Sequence[str], caption: str
          ) -> Picture:
    lines = _lines(study, by_row, tests, range(len(tests)))
    return Picture(
        name, figures.dots_figure(list(map(str.capitalize, tests) if name == "accuracy" else tests),
                                  lines), caption,
        f"Dot plot of test accuracy in per cent, a marker for each of {len(lines)} methods in "
        f"each of {len(tests)} lines. The table holds the numbers.",
        "How to read: further right is better; error bars: standard deviation over the "
        f"{_over(study)}.")


def _lines(study: Study, by_row: Accuracies, tests: Sequence[str], places: Sequence[float]
           ) -> list[figures.AccuracyLine]:
    """Returns a line for each row that has any of the tests, which stand at ``places``."""
    lines = []
    for index, (row, values) in enumerate(by_row.items()):
        found = [(place, values[test]) for test, place in zip(tests, places, strict=True)
                 if test in values]
        if found:
            lines.append(figures.AccuracyLine(
                study.labels[row], figures.row_style(index),
                np.array([place for place, _ in found]),
                np.array([one.mean for _, one in found]),
                np.nan_to_num([getattr(one, spread_of(study)) for _, one in found])))
    return lines


def _over(study: Study) -> str:
    return "training seeds" if several_seeds(study) else "noise draws"


def training_picture(study: Study) -> Picture | None:
    """Shows the loss, and the accuracy that chooses the epoch; returns None without any metrics."""
    styles = figures.row_styles(study.labels)
    logged = [(styles[row], run) for row in study.labels for run in study.runs[row] if run.epochs]
    if not logged:
        return None
    key = "softmax" if all("softmax" in run.epochs[0] for _, run in logged) else "loss"
    name = {"softmax": "Softmax loss in training", "loss": "Loss in training"}[key]
    selections = [[(line["epoch"], 100 * line["selection_accuracy"]) for line in run.epochs
                   if line.get("selection_accuracy") is not None] for _, run in logged]
    figure = figures.new_figure(11 if any(selections) else 7, 5.2)
    axes = figure.subplots(1, 2 if any(selections) else 1, squeeze=False)[0]
    for (style, run), selection in zip(logged, selections, strict=True):
        look = {"color": style.color, "linestyle": style.dashes, "linewidth": 1.0,
                "marker": style.marker, "markersize": 3.5}
        axes[0].plot([line["epoch"] for line in run.epochs], [line[key] for line in run.epochs],
                     markevery=max(1, len(run.epochs) // 8), **look)
        if selection:
            axes[1].plot(*zip(*selection, strict=True), markevery=max(1, len(selection) // 8),
                         **look)
        for epoch, accuracy in selection:
            if run.evaluation and epoch == run.evaluation["epoch"]:
                axes[1].plot(epoch, accuracy, color=style.color, marker=style.marker, markersize=9,
                             markeredgecolor="black", linestyle="none", zorder=3)
    losses = [line[key] for _, run in logged for line in run.epochs
              if math.isfinite(line[key]) and line[key] > 0]
    axes[0].set_yscale("log")
    figures.label_logarithmic(axes[0].yaxis, losses)
    for ax, label in zip(axes, (f"{name} [nats]", "Selection accuracy [%]"), strict=False):
        ax.set_xlabel("Epoch")
        ax.set_ylabel(label)
        ax.xaxis.get_major_locator().set_params(integer=True)
    shown = [(study.labels[row], style) for row, style in styles.items()
             if any(run.epochs for run in study.runs[row])]
    figures.add_legend(figure, figures.style_handles(shown, markersize=5))
    return Picture(
        "training", figure, "Training curves.",
        f"Line charts against the epoch: {name.lower()} and, where measured, the accuracy on the "
        f"images for choosing the epoch; {len(logged)} runs.",
        "How to read: a thin line for each training run. Left: the loss as each method sees its "
        "own training images (clean, noisy or both), on a logarithmic axis, so heights of "
        "different methods do not compare directly. Right, where measured: the selection "
        "accuracy, on the images by which the epoch is chosen; a large marker is the epoch kept.")


def tsne_picture(study: Study) -> Picture | None:
    """Shows the first seed's clean and noisy features; returns None if none can be embedded."""
    runs = {row: next((run for run in runs if run.features), None)
            for row, runs in study.runs.items()}
    planes = {row: figures.joint_tsne(run.features["clean"], run.features["noisy"])
              for row, run in runs.items() if run}
    shown = [row for row, both in planes.items() if both]
    if not shown:
        return None
    columns = min(2, len(shown))
    lines = math.ceil(len(shown) / columns)
    figure = figures.new_figure(5.7 * columns, 0.8 + 3.2 * lines)
    parts = figure.subfigures(lines, columns, squeeze=False, wspace=0.04, hspace=0.04).flat
    classes = []
    for part, row in zip(parts, shown, strict=False):
        features = runs[row].features
        classes += features["labels"].tolist()
        part.suptitle(figures.wrap(f"{study.labels[row]}, seed {runs[row].seed}", 60), fontsize=11,
                      fontweight="bold")
        axes = part.subplots(1, 2, sharex=True, sharey=True)
        for ax, plane, title in zip(axes, planes[row], ("clean", f"noisy, {features['noise']}"),
                                    strict=True):
            figures.scatter(ax, plane, features["labels"])
            ax.set_title(title)
        axes[0].set_ylabel("t-SNE 2 (no unit)")
    figures.add_legend(figure, figures.class_handles(classes, study.class_names), columns=5)
    note = ("How to read: a point for each test image, colour and marker by its true class, the "
            "number at the median of its class; the same image is in both panels of a method, "
            "which share one embedding. Well separated clusters that stay in place under noise "
            "are what robust training aims at. Directions, distances between clusters and sizes "
            "have no meaning in t-SNE.")
    if left_out := [study.labels[row] for row, both in planes.items() if not both]:
        note += f" Not shown, features not finite or all alike: {', '.join(left_out)}."
    return Picture(
        "tsne", figure, "Features of the penultimate layer, by t-SNE, as in the paper’s Fig. 1.",
        f"Scatter plots of clean and noisy features in the plane, two panels for each of "
        f"{len(shown)} methods, coloured by class.", note)
