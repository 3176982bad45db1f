"""Counts the noise draws in which an image is classified correctly, and compares the counts with
the curvature there: the paper's Fig. 8 and 9."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import jax
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxrobust import evaluation, perturbations
from jaxrobust.app.execution import batch_size_of
from jaxrobust.app.measurements.accuracy import first_test_images
from jaxrobust.app.measurements.curvature import measures_of
from jaxrobust.app.measurements.runner import Measured, Measurement, Work
from jaxrobust.app.progress import progress
from jaxrobust.app.report.figures import (
    Style,
    add_legend,
    label_logarithmic,
    new_figure,
    row_styles,
    style_handles,
    write_across,
)
from jaxrobust.app.report.frame import Number, number_rows
from jaxrobust.app.report.page import (
    Picture,
    Section,
    Table,
    count,
    listed,
    over_runs,
    signed,
    text_row,
)
from jaxrobust.app.study.read import Run, Study
from jaxrobust.app.trainer import TrainedRun, variables_of
from jaxrobust.statistics import correlation_with_counts, lowest_means, means_by_count

SEED = 1
"""Not the seed of the curvature's probes: noise that repeated the probes of Eq. 21 would be
correlated with it for that reason alone."""

PERTURBATIONS = {"gaussian": perturbations.gaussian, "uniform": perturbations.uniform}
"""By name; each with the run's training noise as its standard deviation or amplitude."""

FEW = 10
"""Number of images below which a group's mean is marked as resting on few."""


@dataclasses.dataclass(frozen=True)
class CountSettings:
    """What is counted."""

    num_draws: int  # independent, of each noise
    num_images: int  # the first ones
    test_size: int | None  # test images, drawn at random by class with seed 0; None for all
    noise_std: float  # standard deviation or amplitude


def _measure(run: TrainedRun, settings: CountSettings, work: Work) -> Measured:
    """Finds, for each draw of each noise, the images that are still classified correctly."""
    images, labels = first_test_images(run, settings)
    draws = {}
    with progress(f"{work.label}, noise", len(PERTURBATIONS) * settings.num_draws) as shown:
        for number, (name, noise) in enumerate(PERTURBATIONS.items()):
            correct = []
            for draw in evaluation.evaluate(
                run.model, variables_of(run.state), images, labels,
                perturb=noise(settings.noise_std),
                key=jax.random.fold_in(jax.random.key(SEED), number),
                num_draws=settings.num_draws, batch_size=batch_size_of(images),
                layout=run.layout,
            ):
                correct.append(draw)
                shown.advance(**{f"accuracy, {name}": float(draw.mean())})
            draws[name] = np.stack(correct)  # [draws, images]
    return Measured(dict(work.asked), {"index": np.arange(len(labels)), "label": labels, **draws})


SHARES = np.arange(10, 101, 5)
"""Shares of the images kept in Fig. 8, per cent."""

NOISES = {"gaussian": "Gaussian noise", "uniform": "uniform noise"}
"""Arrays of ``noise_counts.npz``, as shown."""


class Measure(NamedTuple):
    """A column of ``curvature.npz``, as shown."""

    title: str
    axis: str


MEASURES = {
    "frobenius_squared": Measure(
        "Exact Hessian", "Mean $\\Vert H\\Vert_F^2$ [1/pixel$^4$]"),
    "finite_difference": Measure(
        "Eq. 21 (finite differences)", "Mean $\\Lambda$ of Eq. 21 [1/pixel$^4$]"),
    "smoothed_frobenius_squared": Measure(
        "Noise-averaged loss", "Mean $\\Vert H_\\sigma\\Vert_F^2$ [1/pixel$^4$]"),
}
"""Different quantities on a ReLU network."""

COEFFICIENTS = ("Pearson, groups", "Spearman, images", "Spearman, right when clean")
"""Names of the fields of :class:`~jaxrobust.statistics.CountCorrelation`, as shown."""

SIZES = "images by correct predictions"

Counted = dict[str, list[dict]]
"""By row, its runs' curvature and noise counts of the same images, in one dictionary each."""


def _counted(run: Run) -> dict | None:
    """Returns the curvature and the noise counts of a run together.

    None unless arrays match by position: both hold the first images of one test split.
    """
    counts, curvature = run.result("noise_counts"), run.curvature
    if counts and curvature and all(
            counts[name] == curvature["settings"][name] for name in ("num_images", "test_size")):
        return curvature | counts
    return None


def _counted_runs(study: Study) -> tuple[Counted, list[str]]:
    """Returns the runs that are shown together, and the labels of those that do not fit them."""
    found: dict[str, list] = {}
    left_out, num_draws = [], None
    for row, runs in study.runs.items():
        for run in runs:
            facts = run.facts("noise_counts")
            if facts is None:
                continue
            num_draws = num_draws or facts["num_draws"]
            one = _counted(run)
            if one and one["num_draws"] == num_draws:
                found.setdefault(row, []).append(one)
            else:
                left_out.append(f"{study.labels[row]}, seed {run.seed}")
    return found, left_out


def _all(found: Counted) -> list[dict]:
    return [one for runs in found.values() for one in runs]


def numbers(run: Run) -> Iterator[Number]:
    """Yields the coefficients, and what Fig. 8 and 9 show of this run."""
    found = _counted(run)
    if not found:
        return
    num_draws = found["num_draws"]
    for noise, name in NOISES.items():
        correct = found[noise]
        total = correct.sum(axis=0)
        for k, size in enumerate(np.bincount(total, minlength=num_draws + 1)):
            yield Number(SIZES, f"{name}, {k} of {num_draws}", int(size), "images")
        for key, measure in measures_of(MEASURES, [found]).items():
            where = f"{name}, {num_draws} draws, {measure.title}"
            coefficients = correlation_with_counts(
                found[key], total, found["correct"], num_draws)
            for what, value in zip(COEFFICIENTS, coefficients, strict=False):
                yield Number(what, where, value, "")
            kept, _ = lowest_means(found[key], correct, SHARES / 100)
            for share, value in zip(SHARES, kept, strict=True):
                yield Number("accuracy of the images of lowest curvature",
                             f"{where}, {share} %", 100 * value, "%")
            means, _ = means_by_count(found[key], total, num_draws)
            for k, mean in enumerate(means):
                yield Number("mean curvature by correct predictions",
                             f"{where}, {k} of {num_draws}", mean, "1/pixel⁴")


# --- Tables ----------------------------------------------------------------------------------


def correlation_table(study: Study, found: Counted, noise: str) -> Table:
    """Tabulates the coefficients for one noise, by row."""
    runs = _all(found)
    where = f"{NOISES[noise]}, {runs[0]['num_draws']} draws"
    heads, columns = [], []
    for measure in measures_of(MEASURES, runs).values():
        heads += [f"{measure.title}: {COEFFICIENTS[0]}", *COEFFICIENTS[1:]]
        columns += [(what, f"{where}, {measure.title}",
                     lambda values: over_runs(values, signed, " to ")) for what in COEFFICIENTS]
    beyond = 1.96 / math.sqrt(max(1, runs[0]["num_images"] - 1))
    note = (
        "How to read: −1 means that higher curvature always goes with fewer correct predictions, 0 "
        "that they are unrelated. Pearson, groups: between k and the mean curvature of the images "
        "with k correct predictions, as the paper does; some of these means rest on few images "
        "(see the figure). Spearman: rank correlation over the images, all or those that are "
        f"correctly classified without noise; over all, unrelated numbers lie beyond ±{beyond:.2f} "
        "once in 20 times. With several seeds the mean over the seeds [lowest to highest].")
    return Table(
        f"Curvature and the number of correct predictions under {NOISES[noise]}.",
        ("Method", *heads), number_rows(study, found, numbers, columns),
        f"{listed(one['num_images'] for one in runs)} test images of each run, "
        f"{runs[0]['num_draws']} draws; standard deviation (Gaussian) or amplitude (uniform) "
        f"{listed(one['noise_std'] for one in runs)} of the pixel range, clipped to [0, 1].",
        note if noise == next(iter(NOISES)) else "How to read: as the table above.")


def sizes_table(study: Study, found: Counted) -> Table:
    """Tabulates how many images each mean of Fig. 9 rests on."""
    num_draws = _all(found)[0]["num_draws"]
    rows = []
    for row, runs in found.items():
        for noise, name in NOISES.items():
            counts = np.concatenate([one[noise].sum(axis=0) for one in runs])
            sizes = np.bincount(counts, minlength=num_draws + 1)
            rows.append(text_row(f"{study.labels[row]}, {name}", map(count, sizes.tolist())))
    return Table("Images by number of correct predictions.",
                 ("Method and noise", *map(str, range(num_draws + 1))), tuple(rows),
                 note="How to read: columns are the number of correct predictions in "
                 f"{num_draws} draws; all seeds together.", folded=True)


# --- Figures ---------------------------------------------------------------------------------


class Line(NamedTuple):
    """One row of the table in one panel."""

    label: str
    style: Style
    x: np.ndarray  # [n], increasing
    y: np.ndarray  # [n]; NaN where there is none
    sizes: np.ndarray  # [n]; images behind each point


Panels = dict[tuple[str, str], list[Line]]
"""By kind of noise, the same along a row of panels, and measure, the same along a column."""


def kept_share_figure(panels: Panels) -> Figure:
    """Draws Fig. 8: noisy accuracy of the images of lowest curvature, against the share kept."""
    figure, axes = _grid(panels)
    for place, lines in panels.items():
        ax = axes[place]
        for line in lines:
            ax.plot(line.x, line.y, color=line.style.color, marker=line.style.marker,
                    linestyle=line.style.dashes, linewidth=1.3, markersize=5,
                    markeredgecolor="white", markeredgewidth=0.5)
        ax.set_xlabel("Images kept, lowest curvature first [%]")
        ax.set_ylabel("Accuracy under noise [%]")
        ax.label_outer()
    return _with_legend(figure, panels)


def groups_figure(panels: Panels, num_draws: int, units: dict[str, str]) -> Figure:
    """Draws Fig. 9: mean clean curvature by number of correct predictions, on a logarithmic axis.

    The size of a marker grows with its group; an open one stands for fewer than :data:`FEW`
    images. Means of zero or less are not shown. ``units`` gives the axis label by measure.
    """
    figure, axes = _grid(panels, sharey="col")
    shown: dict[str, list[float]] = {measure: [] for _, measure in panels}
    for (noise, measure), lines in panels.items():
        ax = axes[noise, measure]
        for line in lines:
            on = np.isfinite(line.y) & (line.y > 0)
            x, y, sizes = line.x[on], line.y[on], line.sizes[on]
            shown[measure] += y.tolist()
            ax.plot(x, y, color=line.style.color, linestyle=line.style.dashes, linewidth=1.1)
            for many in (True, False):
                of_kind = (sizes >= FEW) == many
                ax.scatter(x[of_kind], y[of_kind], s=14 + 110 * np.sqrt(
                    sizes[of_kind] / max(1, line.sizes.sum())), marker=line.style.marker,
                    facecolor=line.style.color if many else "white", linewidths=1,
                    edgecolor="white" if many else line.style.color, zorder=3)
    for (_, measure), ax in axes.items():
        values = shown[measure]
        if not values:
            write_across(ax, "no mean above zero")
        ax.set_yscale("log")
        ax.set_ylim(min(values, default=2e-6) / 2, max(values, default=0.5) * 2)
        label_logarithmic(ax.yaxis, values)
        ax.set_xlim(-0.04 * num_draws, 1.04 * num_draws)
        ax.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, nbins=11))
        if ax.get_subplotspec().is_last_row():
            ax.set_xlabel(f"Correct predictions in {num_draws} draws")
        ax.set_ylabel(units[measure])
    return _with_legend(figure, panels)


def _grid(panels: Panels, sharey: Literal["col"] | bool = True) -> tuple[Figure, dict[tuple, Axes]]:
    noises, measures = map(dict.fromkeys, zip(*panels, strict=True))
    figure = new_figure(max(7, 5.5 * len(measures)), 1.2 + 3.0 * len(noises))
    grid = figure.subplots(len(noises), len(measures), squeeze=False, sharex=True, sharey=sharey)
    axes = dict(zip(itertools.product(noises, measures), grid.flat, strict=True))
    for (noise, measure), ax in axes.items():
        ax.set_title(f"{measure}, {noise}", fontsize=11)
    return figure, axes


def _with_legend(figure: Figure, panels: Panels) -> Figure:
    add_legend(figure, style_handles(
        dict.fromkeys((line.label, line.style) for lines in panels.values() for line in lines),
        linewidth=1.4))
    return figure


def kept_share_picture(study: Study, found: Counted) -> Picture:
    """Shows Fig. 8: accuracy under noise against the share of images of lowest curvature."""
    fewest: list[float] = []

    def line(runs, key, noise):
        curves, sizes = zip(*(lowest_means(one[key], one[noise], SHARES / 100) for one in runs),
                            strict=True)
        fewest.extend(size[0] for size in sizes)
        # A share that one seed cannot give has no mean over the seeds.
        return SHARES, 100 * np.mean(curves, axis=0), np.sum(sizes, axis=0)

    panels = _panels(study, found, line)
    return Picture(
        "accuracy_by_curvature", kept_share_figure(panels),
        "Accuracy under noise of the images with the lowest curvature (the paper’s Fig. 8).",
        f"Line charts of accuracy under noise in per cent against the share of images kept, a "
        f"line for each of {len(found)} methods; {len(panels)} panels.",
        "How to read: images are kept in the order of their curvature at the clean image; the "
        "right end is all images. A line that falls says that noise spares the images of low "
        "curvature. Each method ranks the images by its own curvature. The leftmost points rest "
        f"on {listed(fewest)} images of each run: small wiggles there are chance."
        + _curvature_note(found))


def groups_picture(study: Study, found: Counted) -> Picture:
    """Shows Fig. 9: mean clean curvature by number of correct predictions."""
    num_draws = _all(found)[0]["num_draws"]

    def line(runs, key, noise):
        means, sizes = means_by_count(
            np.concatenate([one[key] for one in runs]),
            np.concatenate([one[noise].sum(axis=0) for one in runs]), num_draws)
        return np.arange(num_draws + 1), means, sizes

    panels = _panels(study, found, line)
    figure = groups_figure(
        panels, num_draws, {measure.title: measure.axis for measure in MEASURES.values()})
    sizes, means = (np.concatenate([getattr(line, name) for lines in panels.values()
                                    for line in lines]) for name in ("sizes", "y"))
    hidden = int((means <= 0).sum())
    zeros = f" {hidden} means of zero or less are not shown." if hidden else ""
    return Picture(
        "curvature_by_correct", figure,
        "Mean curvature at the clean image, by the number of correct predictions under noise "
        "(the paper’s Fig. 9).",
        f"Line charts on a logarithmic axis of mean curvature against the number of correct "
        f"predictions, a line for each of {len(found)} methods; {len(panels)} panels. The tables "
        "hold the coefficients.",
        f"How to read: images on the right keep their right class in all {num_draws} draws. A "
        "line that falls says that images of higher curvature are misclassified more often. "
        f"Larger marker: more images; open marker: fewer than {FEW} images "
        f"({((sizes > 0) & (sizes < FEW)).sum()} of the {(sizes > 0).sum()} means), of which one "
        f"image may move the mean far.{zeros} Do not compare the heights in different columns."
        + _curvature_note(found))


def _panels(study: Study, found: Counted, line: Callable) -> Panels:
    styles = row_styles(study.labels)
    return {(name, measure.title): [
        Line(study.labels[row], styles[row], *line(runs, key, noise))
        for row, runs in found.items()]
        for noise, name in NOISES.items()
        for key, measure in measures_of(MEASURES, _all(found)).items()}


def _curvature_note(found: Counted) -> str:
    runs = _all(found)
    infinite = sum(int((~np.isfinite(one[key])).sum()) for one in runs
                   for key in measures_of(MEASURES, runs))
    return (" Exact Hessian: the squared Frobenius norm at the image itself, from exact products; "
            "Eq. 21: the paper’s finite differences, here at t = "
            f"{listed(one['step'] for one in runs)} of the pixel range."
            + (f" {infinite} curvatures that are not finite are left out." if infinite else ""))


# --- Section ---------------------------------------------------------------------------------


def _section(study: Study) -> Section | None:
    found, left_out = _counted_runs(study)
    if not found:
        return None
    tables = [correlation_table(study, found, noise) for noise in NOISES]
    lead = ("Does noise mislead the network more often at images where the loss curves more? The "
            "measures of curvature are different quantities.")
    if left_out:
        lead += f" Not shown, measured with other images or draws: {'; '.join(left_out)}."
    return Section(
        "robustness", "Curvature and correct predictions under noise", lead,
        (*tables, sizes_table(study, found)),
        (kept_share_picture(study, found), groups_picture(study, found)))


NOISE_COUNTS = Measurement(
    "noise_counts", measure=_measure, section=_section, numbers=(numbers,), command="figures")
