"""The figures of accuracy, of training and of features, from the numbers and files of a study."""

from collections.abc import Sequence

import numpy as np

from jaxrobust.app.report import figures
from jaxrobust.app.report.frame import Accuracies, accuracies, noise_level, published_accuracies
from jaxrobust.app.report.page import Picture
from jaxrobust.app.report.tables import levels_of, perturbations_of, several_seeds
from jaxrobust.app.study.read import Run, Study


def accuracy_picture(study: Study) -> Picture:
    """Accuracy against the noise level."""
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
    """Accuracy under each perturbation; None without any."""
    by_row = accuracies(study)
    tests = perturbations_of(by_row)
    return _dots(study, "perturbations", by_row, tests,
                 "Accuracy under other perturbations.") if tests else None


def levels_picture(study: Study) -> Picture:
    """As :func:`accuracy_picture`, for so few noise levels that there is no line to draw."""
    by_row = accuracies(study)
    return _dots(study, "accuracy", by_row, levels_of(by_row), "Test accuracy.")


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
    """A line for each row that has any of the tests, which stand at ``places``."""
    spread = "std_over_seeds" if several_seeds(study) else "std_over_draws"
    lines = []
    for index, (row, values) in enumerate(by_row.items()):
        found = [(place, values[test]) for test, place in zip(tests, places, strict=True)
                 if test in values]
        if found:
            lines.append(figures.AccuracyLine(
                study.labels[row], figures.row_style(index),
                np.array([place for place, _ in found]),
                np.array([one.mean for _, one in found]),
                np.nan_to_num([getattr(one, spread) for _, one in found])))
    return lines


def _over(study: Study) -> str:
    return "training seeds" if several_seeds(study) else "noise draws"


def training_picture(study: Study) -> Picture | None:
    """Loss, and accuracy on the images for choosing the epoch; None without any metrics."""
    logged = [(index, row, run) for index, row in enumerate(study.labels)
              for run in study.runs[row] if run.epochs]
    if not logged:
        return None
    key = "softmax" if all("softmax" in run.epochs[0] for *_, run in logged) else "loss"
    name = {"softmax": "Softmax loss in training", "loss": "Loss in training"}[key]
    curves = []
    for index, row, run in logged:
        selection = [line for line in run.epochs if line.get("selection_accuracy") is not None]
        curves.append(figures.TrainingCurve(
            study.labels[row], figures.row_style(index),
            np.array([line["epoch"] for line in run.epochs]),
            np.array([line[key] for line in run.epochs]),
            np.array([line["epoch"] for line in selection]),
            np.array([100 * line["selection_accuracy"] for line in selection]),
            run.evaluation["epoch"] if run.evaluation else None))
    return Picture(
        "training", figures.training_figure(curves, name), "Training curves.",
        f"Line charts against the epoch: {name.lower()} and, where measured, the accuracy on the "
        f"images for choosing the epoch; {len(curves)} runs.",
        "How to read: a thin line for each training run. Left: the loss as each method sees its "
        "own training images (clean, noisy or both), on a logarithmic axis, so heights of "
        "different methods do not compare directly. Right, where measured: the selection "
        "accuracy, on the images by which the epoch is chosen; a large marker is the epoch kept.")


def tsne_picture(study: Study) -> Picture | None:
    """Clean and noisy features of the first seed, by row; None if none can be embedded."""
    embeddings, left_out = [], []
    for row, run in _feature_runs(study).items():
        planes = figures.joint_tsne(run.features["clean"], run.features["noisy"])
        if planes is None:
            left_out.append(study.labels[row])
            continue
        embeddings.append(figures.Embedding(
            f"{study.labels[row]}, seed {run.seed}", *planes, run.features["labels"],
            str(run.features["noise"])))
    if not embeddings:
        return None
    note = ("How to read: a point for each test image, colour and marker by its true class, the "
            "number at the median of its class; the same image is in both panels of a method, "
            "which share one embedding. Well separated clusters that stay in place under noise "
            "are what robust training aims at. Directions, distances between clusters and sizes "
            "have no meaning in t-SNE.")
    if left_out:
        note += f" Not shown, features not finite or all alike: {', '.join(left_out)}."
    return Picture(
        "tsne", figures.tsne_figure(embeddings, study.class_names),
        "Features of the penultimate layer, by t-SNE, as in the paper’s Fig. 1.",
        f"Scatter plots of clean and noisy features in the plane, two panels for each of "
        f"{len(embeddings)} methods, coloured by class.", note)


def _feature_runs(study: Study) -> dict[str, Run]:
    """The first seed's run with features, by row."""
    found = {row: [run for run in runs if run.features] for row, runs in study.runs.items()}
    return {row: runs[0] for row, runs in found.items() if runs}
