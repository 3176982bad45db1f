"""Does low curvature, or this training, buy adversarial or certified robustness?

    curvature.npz, attacks.npz, certificates.npz of each run ─ join ─▶ columns of the same images
    ─▶ rank correlations within the networks, and over them; tables and pictures by method
"""

import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from jaxrobust.app.config import InputError
from jaxrobust.app.measurements import attacks, certificates, networks
from jaxrobust.app.measurements.curvature import CURVATURES, measures_of
from jaxrobust.app.measurements.estimates import Estimate, found_of, subsets_text
from jaxrobust.app.report import frame
from jaxrobust.app.report.comparison import FEWEST_SEEDS
from jaxrobust.app.report.figures import (
    add_legend,
    label_logarithmic,
    new_figure,
    row_styles,
    style_handles,
)
from jaxrobust.app.report.page import Cell, Picture, Section, Table, TableRow, over_runs, text_row
from jaxrobust.app.study.read import Run, Study
from jaxrobust.statistics import (
    Coefficient,
    MeanRankCorrelations,
    RankCorrelations,
    mean_difference_interval,
)

REFERENCE = "normal"
"""The row that the others are compared with."""

ACROSS, WITHIN, MEAN_WITHIN = (
    "rank correlation over networks", "rank correlation over images",
    "mean rank correlation over images")
"""Names of the coefficients in the table of numbers."""

DISTANCE, CERTIFIED = "distance to the nearest adversarial image", "certified radius"
OUTCOMES = (DISTANCE, CERTIFIED)
RIGHT = attacks.RIGHT
LOSS = "loss"
IMAGES = (attacks.ALL, RIGHT, f"{RIGHT}, loss held fixed")
"""Which images a coefficient within networks is over, and what is held fixed."""

# --- The same images ---------------------------------------------------------------------------


class Joined(NamedTuple):
    """What is known of the test images that all measurements of a network have."""

    first_of: int  # of how many test images, drawn by class with seed 0, these are the first
    positions: np.ndarray  # shape=[n]; of the images among them, increasing
    label: np.ndarray  # shape=[n]
    correct: np.ndarray  # shape=[n], bool; whether the clean image is classified correctly
    columns: dict[str, np.ndarray]  # shape=[n] each: curvatures by key, LOSS and OUTCOMES


def join(run: Run) -> Joined | None:
    """Joins the curvature, the distances and the certificates of a run's test images by index.

    Returns None where one of the measurements, or its arrays, is not there.

    Raises:
      InputError: (a ValueError) if they are of different images.
    """
    curved, attacked, certified = map(run.result, ("curvature", "attacks", "certificates"))
    if not (curved and attacked and certified):
        return None
    nearest = np.isinf(attacked["epsilon"]) & (attacked["norm"] == "l2")
    if not nearest.any():
        return None
    first_of = {
        "curvature": curved["settings"]["test_size"] or attacked["num_test"],
        "attacks": attacked["first_of"], "certificates": certified["first_of"]}
    if len(set(first_of.values())) > 1:
        raise InputError(
            f"Expected measurements of the same images in {run.folder}, got the first of "
            f"{', '.join(f'{size:,} ({kind})' for kind, size in first_of.items())} test images.")
    parts = [
        (curved["index"], curved["label"],
         {key: curved[key] for key in (*CURVATURES, LOSS, "correct") if key in curved}),
        (attacked["index"][nearest], attacked["label"][nearest],
         {DISTANCE: attacked["distance"][nearest]}),
        (certified["index"], certified["target"],
         {CERTIFIED: certificates.certified_radii(certified)})]
    index = functools.reduce(np.intersect1d, (part[0] for part in parts))
    columns: dict[str, np.ndarray] = {}
    labels = []
    for there, label, values in parts:
        order = np.argsort(there)
        rows = order[np.searchsorted(there, index, sorter=order)]
        labels.append(label[rows])
        columns |= {name: column[rows] for name, column in values.items()}
    if any((label != labels[0]).any() for label in labels):
        raise InputError(f"Expected measurements of the same images in {run.folder}, got different "
                         "labels of images with the same index.")
    return Joined(first_of["attacks"], index, labels[0], columns.pop("correct"), columns)


def joined_networks(study: Study) -> list[tuple[str, Run, Joined]]:
    """Returns the networks that have all measurements, with their rows and images.

    Raises:
      InputError: (a ValueError) as :func:`join`, or if networks were given different images.
    """
    found = [(row, run, joined) for row, run in networks.networks_of(study)
             if (joined := join(run)) is not None]
    for _, run, joined in found:
        first = found[0][2]
        if joined.first_of != first.first_of or not (
                np.array_equal(joined.positions, first.positions)
                and np.array_equal(joined.label, first.label)):
            raise InputError(f"Expected networks with measurements of the same images, got others "
                             f"in {run.folder} than in {found[0][1].folder}.")
    return found


# --- Correlations ------------------------------------------------------------------------------


class Within(NamedTuple):
    """Coefficients over the images of each network, and their mean."""

    each: np.ndarray  # shape=[M]
    mean: Coefficient


def within(found: Sequence[tuple[str, Run, Joined]]
           ) -> dict[tuple[str, str], dict[str, Within]]:
    """Correlates each measure of curvature with the outcomes, image by image.

    Returns:
      By outcome and images (:data:`IMAGES`), and by the key of the measure.
    """
    measures = measures_of(CURVATURES, [joined.columns for *_, joined in found])
    variables = {name: np.stack([joined.columns[name] for *_, joined in found]).astype(float)
                 for name in (*measures, LOSS, *OUTCOMES)}
    groups = np.array([row for row, *_ in found])
    finite = np.all([np.isfinite(variables[name]) for name in (*measures, LOSS)], axis=0)
    correct = np.stack([joined.correct for *_, joined in found])
    every, right = (MeanRankCorrelations(variables, groups, kept=kept, seed=0)
                    for kept in (finite, finite & correct))
    return {(outcome, images): {
        key: Within(*correlations.between(key, outcome, given)) for key in measures}
        for outcome in OUTCOMES for images, correlations, given in zip(
            IMAGES, (every, right, right), (None, None, LOSS), strict=True)}


def across(study: Study) -> dict[str, dict[str, Coefficient]]:
    """Correlates the median of each measure of curvature with what survives, over the networks.

    Returns:
      By outcome, also with the clean accuracy held fixed, and by the key of the measure; empty for
      fewer than :data:`jaxrobust.app.measurements.networks.FEWEST` networks.
    """
    found = [(row, run, of_run) for row, run in networks.networks_of(study)
             if (of_run := {one[:2]: one.value for one in shown(run)})]
    if len(found) < networks.FEWEST:
        return {}
    measures = measures_of(CURVATURES, [run.medians for _, run, _ in found])
    outcomes = {_head(key): key for key in found[0][2]
                if key[0] != attacks.LEFT and all(key in values for *_, values in found)}
    variables = {key: np.array([run.medians[key] for _, run, _ in found]) for key in measures}
    variables |= {head: np.array([values[key] for *_, values in found])
                  for head, key in outcomes.items()}
    clean = networks.accuracies_at([(row, run) for row, run, _ in found], 0)
    correlations = RankCorrelations(
        variables | {"clean": clean}, np.array([row for row, *_ in found]), seed=0,
        confidence=networks.CONFIDENCE)
    return {f"{head}{words}": {key: correlations.between(key, head, given) for key in measures}
            for head in outcomes
            for words, given in (("", None), (", clean accuracy held fixed", "clean"))}


def numbers(study: Study) -> pd.DataFrame:
    """Tabulates the coefficients within each network, their means, and those over the networks."""
    return frame.table(_lines(study))


def _lines(study: Study) -> Iterator[tuple]:
    def with_ends(name, condition, coefficient):
        for end, value in zip(networks.ENDS, coefficient, strict=True):
            yield study.name, "", None, f"{name}{end}", condition, value, "", None

    found = joined_networks(study)
    for (outcome, images), by_measure in within(found).items() if found else ():
        for key, one in by_measure.items():
            condition = f"{outcome}, {images}, {CURVATURES[key]}"
            for (row, run, _), value in zip(found, one.each, strict=True):
                yield study.name, row, run.seed, WITHIN, condition, value, "", None
            yield from with_ends(MEAN_WITHIN, condition, one.mean)
    for outcome, coefficients in across(study).items():
        for key, coefficient in coefficients.items():
            yield from with_ends(ACROSS, f"{outcome}, {CURVATURES[key]}", coefficient)


# --- Tables and pictures -----------------------------------------------------------------------


def shown(run: Run) -> Iterator[Estimate]:
    """Yields what the table by method shows of a run: accuracies and radii, higher is better."""
    attacked = list(attacks.estimates(run))
    clean = [one for one in attacked
             if one.measurement == attacks.LEFT and one.condition.startswith("clean, ")]
    yield from clean[:1]  # It is the same for every ball.
    yield from (one for one in attacked if one.measurement != attacks.LEFT)
    yield from (one for one in certificates.estimates(run)
                if one.measurement != certificates.ABSTENTIONS)


def section(study: Study) -> Section:
    """Makes the section."""
    found = joined_networks(study)
    return Section("survival", study.title, "", tuple(filter(None, (
        *_by_method(study), _across_table(study), *(_within_tables(study, found) if found else ()),
        attacks.warnings_table(study)))), tuple(filter(None, (_curves(study), _scatter(study)))))


def _head(key: tuple[str, str]) -> str:
    measurement, condition = key
    if measurement == attacks.LEFT:
        return "accuracy, clean"
    if measurement == certificates.AVERAGE:
        return measurement
    if measurement == certificates.CERTIFIED:  # The settings are in the caption.
        condition = condition.partition(", sigma")[0]
    return f"{measurement}, {condition}"


def _digits(unit: str) -> int:
    return 2 if unit == "%" else 4


def _by_method(study: Study) -> tuple[Table, Table | None]:
    """Tabulates means over the seeds by method, and their differences from one row."""
    found = found_of(study, shown)
    units = {key: one[key].unit for ones in found.values() for one in ones for key in one}
    values = {row: {key: [one[key].value for one in ones if key in one] for key in units}
              for row, ones in found.items()}
    heads = {key: f"{_head(key)} [{unit}]" for key, unit in units.items()}
    rows = []
    for key, unit in units.items():
        texts = {row: _mean_text(of_row[key], _digits(unit)) for row, of_row in values.items()}
        means = {row: round(statistics.fmean(of_row[key]), _digits(unit))
                 for row, of_row in values.items() if of_row[key]}
        rows.append(TableRow(heads[key], tuple(
            Cell(text, bold=means.get(row) == max(means.values())) for row, text in texts.items())))
    table = Table(
        "What survives, by method.", ("Measured", *(study.labels[row] for row in found)),
        tuple(rows), _details(study),
        "How to read: higher is better; bold: the best of the line. Robust accuracy: what "
        "AutoAttack’s ensemble leaves, an upper bound of the true one. Distance: FAB’s, an upper "
        "bound too, in L2; misclassified images have 0. Certified: provably right within the "
        "radius in L2, but of the classifier that votes over noisy copies of the image.")
    return table, _differences(study, units, heads, values)


def _details(study: Study) -> str:
    facts = {kind: [facts for runs in study.runs.values() for run in runs
                    if (facts := run.facts(kind))] for kind in ("attacks", "certificates")}
    subsets = dict.fromkeys(subsets_text(study, kind) for kind in facts)
    settings = sorted({certificates.how(one) for one in facts["certificates"]})
    text = (f"Images: {' '.join(subsets)} Certificates: {'; '.join(settings)}. Mean over the "
            "training seeds ± standard deviation over them.")
    missed = sum(one["not_found"] for found in facts["attacks"] for one in found["nearest"])
    if missed:
        every = sum(found["num_images"] * len(found["nearest"]) for found in facts["attacks"])
        text += (f" Images for which FAB found nothing, which count as farthest: {missed:,} of "
                 f"{every:,}.")
    nearer = sum(len(_nearer(one)) for ones in study.results("attacks").values() for one in ones)
    if nearer:
        text += (" Images that the ensemble broke in a ball in L2 smaller than FAB’s distance: "
                 f"{nearer:,}.")
    return text


def _nearer(attacked: dict) -> set[int]:
    """Returns the images that the ensemble broke in an L2 ball in which FAB found nothing."""
    euclidean, nearest = attacked["norm"] == "l2", np.isinf(attacked["epsilon"])
    distance = dict(zip(attacked["index"][euclidean & nearest],
                        attacked["distance"][euclidean & nearest], strict=True))
    broken = euclidean & ~nearest & (attacked["broken_by"] != "")
    return {int(index) for index, epsilon in zip(
        attacked["index"][broken], attacked["epsilon"][broken], strict=True)
        if distance.get(index, 0) > epsilon}


def _differences(study, units, heads, values) -> Table | None:
    others = [row for row in values if row != REFERENCE]
    if REFERENCE not in values or not others:
        return None
    rows = [TableRow(heads[key], tuple(
        _difference(values[row][key], values[REFERENCE][key], _digits(unit)) for row in others))
        for key, unit in units.items()]
    return Table(
        f"The same, less that of “{study.labels[REFERENCE]}”.",
        ("Measured", *(study.labels[row] for row in others)), tuple(rows),
        note="How to read: above 0 is better; ± half of the 95 % interval over trainings, on these "
        "test images (Student’s t, from the seeds of the two rows), where each has at least "
        f"{FEWEST_SEEDS}. Bold: the interval excludes 0. With many differences one in twenty does "
        "so by chance.")


def _mean_text(values: Sequence[float], digits: int) -> str:
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _difference(own: Sequence[float], peer: Sequence[float], digits: int) -> Cell:
    if not own or not peer:
        return Cell("–")
    points = statistics.fmean(own) - statistics.fmean(peer)
    text = f"{round(points, digits) + 0.0:+.{digits}f}".replace("-", "−")  # No minus of 0.
    if min(len(own), len(peer)) < FEWEST_SEEDS:
        return Cell(text)
    half = mean_difference_interval(own, peer)
    return Cell(f"{text} ± {half:.{digits}f}", bold=abs(points) > half)


def _across_table(study: Study) -> Table | None:
    found = across(study)
    if not found:
        return None
    measures = next(iter(found.values()))
    count = len([run for _, run in networks.networks_of(study) if list(shown(run))])
    return Table(
        "Spearman’s rank correlation, over networks, of the median curvature at clean test images "
        "with what survives.", ("Outcome", *(CURVATURES[key] for key in measures)),
        tuple(text_row(head, map(networks.text, by_measure.values()))
              for head, by_measure in found.items()),
        f"{count} networks; in brackets the {100 * networks.CONFIDENCE:g} % interval over "
        "resampled rows.",
        "How to read: if low curvature buys robustness, the coefficients are negative. A dash: all "
        "networks have the same.")


def _within_tables(study: Study, found: list[tuple[str, Run, Joined]]) -> tuple[Table, Table]:
    coefficients = within(found)
    measures = next(iter(coefficients.values()))
    joined = found[0][2]
    details = (f"The first {len(joined.positions):,} of {joined.first_of:,} test images, "
               f"{len(found)} networks")
    mean = Table(
        "Spearman’s rank correlation, over the images of a network, of the curvature at the image "
        "with what survives: mean over the networks.",
        ("Outcome", *(CURVATURES[key] for key in measures)),
        tuple(text_row(", ".join(key), (networks.text(one.mean) for one in by_measure.values()))
              for key, by_measure in coefficients.items()),
        f"{details}; in brackets the {100 * networks.CONFIDENCE:g} % interval over resampled rows "
        "and images.",
        "How to read: if an image at which the loss curves less withstands more, the coefficients "
        "are negative. Misclassified images have distance and radius 0. The loss of a confident "
        "image is low and flat; partial coefficients, with the ranks of the loss at the image held "
        "fixed, remove this effect.")
    rows = list(dict.fromkeys(row for row, *_ in found))
    part = {key: one for key, one in coefficients.items() if key[1] == RIGHT}

    def cell(row, one):
        return over_runs([value for (own, *_), value in zip(found, one.each, strict=True)
                          if own == row], lambda value: f"{value:+.2f}".replace("-", "−"), " to ")

    by_row = Table(
        f"The same by method, over {RIGHT}: mean over the seeds.",
        ("Method", *(f"{outcome}: {CURVATURES[key]}" for outcome, _ in part for key in measures)),
        tuple(text_row(study.labels[row], (
            cell(row, one) for by_measure in part.values() for one in by_measure.values()))
            for row in rows),
        details + ".", "How to read: in brackets the lowest and the highest seed.")
    return mean, by_row


def _curves(study: Study) -> Picture | None:
    """Draws the share of images that survive within a radius, as attacks and certificates bound
    it."""
    panels: list[tuple[str, str, Callable[[dict], np.ndarray]]] = [
        ("attacks", "At most, by FAB", lambda result: result["distance"][
            np.isinf(result["epsilon"]) & (result["norm"] == "l2")]),
        ("certificates", "At least, of the smoothed classifier", certificates.certified_radii)]
    results = {kind: study.results(kind) for kind, *_ in panels}
    if not all(results.values()):
        return None
    styles = row_styles(study.labels)
    figure = new_figure(10, 4.8)
    for ax, (kind, title, radii_of) in zip(
            figure.subplots(1, 2, sharey=True), panels, strict=True):
        radii = {row: [radii_of(one) for one in ones] for row, ones in results[kind].items()}
        every = np.concatenate([one for ones in radii.values() for one in ones])
        places = np.linspace(0, 1.05 * np.quantile(every[np.isfinite(every)], 0.99), 400)
        for row, ones in radii.items():
            share = np.mean([(one[None] > places[:, None]).mean(axis=1) for one in ones], axis=0)
            ax.plot(places, 100 * share, color=styles[row].color, linestyle=styles[row].dashes,
                    linewidth=1.6)
        ax.set_title(title)
        ax.set_xlabel("Radius in L2, pixels in [0, 1]")
        ax.set_ylim(0, 100)
    figure.axes[0].set_ylabel("Images that survive [%]")
    add_legend(figure, style_handles([(study.labels[row], styles[row]) for row in study.labels
                                      if row in results["attacks"]], linewidth=1.6, marker=""))
    return Picture(
        "surviving", figure, "Images that survive all perturbations up to a radius.",
        f"Two panels with a falling curve for each of {len(results['attacks'])} methods.",
        "How to read: higher is better. Left: no misclassified image was found so near, an upper "
        "bound. Right: the class is right and provably stays so, of the classifier that votes over "
        "noisy copies. Means over the runs of a row.")


def _scatter(study: Study) -> Picture | None:
    """Draws median curvature against what survives, a point for each network."""
    found = [(row, run, {one[:2]: one.value for one in shown(run)})
             for row, run in networks.networks_of(study)]
    keys = [key for key in dict.fromkeys(key for *_, values in found for key in values)
            if key[0] == certificates.AVERAGE or key[0] == attacks.NEAREST and RIGHT in key[1]]
    found = [one for one in found if all(key in one[2] for key in keys)]
    if not keys or not found:
        return None
    measures, styles = measures_of(CURVATURES, [run.medians for _, run, _ in found]), row_styles(
        study.labels)
    figure = new_figure(3.7 * len(measures), 3.2 * len(keys) + 1)
    axes = figure.subplots(len(keys), len(measures), squeeze=False, sharex="col", sharey="row")
    for column, (measure, title) in zip(axes.T, measures.items(), strict=True):
        for ax, key in zip(column, keys, strict=True):
            for row, run, values in found:
                ax.plot(run.medians[measure], values[key], linestyle="none",
                        marker=styles[row].marker, color=styles[row].color,
                        markeredgecolor="white", markeredgewidth=0.5)
        column[0].set_title(title)
        column[-1].set_xlabel("Median curvature [1/pixel⁴]")
        column[-1].set_xscale("log", nonpositive="mask")
        label_logarithmic(column[-1].xaxis, [
            run.medians[measure] for _, run, _ in found if run.medians[measure] > 0])
    for ax, key in zip(axes[:, 0], keys, strict=True):
        ax.set_ylabel("Average certified radius" if key[0] == certificates.AVERAGE else
                      "Median distance of the\nnearest adversarial image")
    rows = dict.fromkeys(row for row, *_ in found)
    add_legend(figure, style_handles([(study.labels[row], styles[row]) for row in rows],
                                     linestyle="none"))
    return Picture(
        "curvature-survival", figure, "Median curvature and what survives, network by network.",
        f"Scatter plots of {len(found)} networks, a column for each measure of curvature.",
        "How to read: a point for each network; further left is flatter, higher is more robust. "
        "Above: the median over images that are right when clean. Radii in L2.")
