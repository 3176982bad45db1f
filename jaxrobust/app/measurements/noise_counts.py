"""Which draws of the test noise leave an image correctly classified, beside the curvature there:
the paper's Fig. 8 and 9."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from jaxrobust import evaluation, perturbations
from jaxrobust.app.execution import batch_size_of
from jaxrobust.app.measurements.accuracy import make_test_split
from jaxrobust.app.measurements.runner import Measured, Measurement, Work
from jaxrobust.app.progress import progress
from jaxrobust.app.report.figures import (
    Style,
    add_legend,
    new_figure,
    row_style,
    wrap,
    write_across,
)
from jaxrobust.app.report.frame import Number, frame, values_of
from jaxrobust.app.report.page import (
    Cell,
    Picture,
    Section,
    Table,
    TableRow,
    count,
    listed,
    over_runs,
    signed,
)
from jaxrobust.app.study.read import Run, Study
from jaxrobust.app.trainer import TrainedRun, variables_of
from jaxrobust.statistics import (
    CountCorrelation,
    correlation_with_counts,
    lowest_means,
    means_by_count,
)

SEED = 1
"""Not the seed of the curvature's probes: noise that repeated the probes of Eq. 21 would be
correlated with it for that reason alone."""

PERTURBATIONS = {"gaussian": perturbations.gaussian, "uniform": perturbations.uniform}
"""By name; each with the run's training noise as its standard deviation or amplitude."""

FEW = 10
"""Images below which a group's mean is marked as resting on few."""


@dataclasses.dataclass(frozen=True)
class CountSettings:
    """What is counted."""

    num_draws: int
    """Independent draws of each noise."""
    num_images: int
    """Test images: the first so many."""
    test_size: int | None
    """Test images, drawn by class at random with seed 0; none for all."""
    noise_std: float
    """Standard deviation or amplitude of the noise."""


def _measure(run: TrainedRun, settings: CountSettings, work: Work) -> Measured:
    """For each draw of each noise, which images are still correct."""
    split = make_test_split(run.dataset, settings.test_size)
    images, labels = (values[: settings.num_images] for values in (split.images, split.labels))
    draws = {}
    with progress(f"{work.label}, noise", len(PERTURBATIONS) * settings.num_draws) as shown:
        for number, (name, noise) in enumerate(PERTURBATIONS.items()):
            correct = []
            for draw in evaluation.evaluate(
                run.model, variables_of(run.state), images, labels,
                perturb=noise(settings.noise_std),
                key=jax.random.fold_in(jax.random.key(SEED), number),
                num_draws=settings.num_draws, batch_size=batch_size_of(split.images),
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


class Counted(NamedTuple):
    """A run's noise counts beside the curvature of the same images."""

    run: Run
    counts: dict
    curvature: dict

    def correct(self, noise: str) -> np.ndarray:
        """[draws, images]."""
        return self.counts[noise]


# --- What is there ---------------------------------------------------------------------------


def _counted_runs(study: Study) -> tuple[dict[str, list[Counted]], list[str]]:
    """By row, the runs with counts; and the labels of those that do not fit the others."""
    found, left_out, num_draws = {}, [], None
    for row, runs in study.runs.items():
        for run in runs:
            counts, curvature = run.result("noise_counts"), run.curvature
            if not counts:
                continue
            num_draws = num_draws or counts["num_draws"]
            if _same_images(counts, curvature) and counts["num_draws"] == num_draws:
                found.setdefault(row, []).append(Counted(run, counts, curvature))
            else:
                left_out.append(f"{study.labels[row]}, seed {run.seed}")
    return found, left_out


def _same_images(counts: dict, curvature: dict | None) -> bool:
    """Whether arrays match by position: both hold the first images of one test split."""
    return curvature is not None and all(counts[name] == curvature["settings"][name]
                                         for name in ("num_images", "test_size"))


def _style(study: Study, row: str) -> Style:
    return row_style(list(study.labels).index(row))


def _measures(found: dict[str, list[Counted]]) -> dict[str, Measure]:
    """Those that every run has."""
    return {key: measure for key, measure in MEASURES.items()
            if all(key in one.curvature for runs in found.values() for one in runs)}


def numbers(run: Run) -> Iterator[Number]:
    """The coefficients, and what Fig. 8 and 9 show of this run."""
    counts, curvature = run.result("noise_counts"), run.curvature
    if counts and _same_images(counts, curvature):
        num_draws = counts["num_draws"]
        for noise, name in NOISES.items():
            correct = counts[noise]
            total = correct.sum(axis=0)
            for k, size in enumerate(np.bincount(total, minlength=num_draws + 1)):
                yield Number(SIZES, f"{name}, {k} of {num_draws}", int(size), "images")
            for key, measure in MEASURES.items():
                if key not in curvature:
                    continue
                where = f"{name}, {num_draws} draws, {measure.title}"
                found = correlation_with_counts(
                    curvature[key], total, curvature["correct"], num_draws)
                for what, value in zip(COEFFICIENTS, found, strict=False):
                    yield Number(what, where, value, "")
                kept, _ = lowest_means(curvature[key], correct, SHARES / 100)
                for share, value in zip(SHARES, kept, strict=True):
                    yield Number("accuracy of the images of lowest curvature",
                                 f"{where}, {share} %", 100 * value, "%")
                means, _ = means_by_count(curvature[key], total, num_draws)
                for k, mean in enumerate(means):
                    yield Number("mean curvature by correct predictions",
                                 f"{where}, {k} of {num_draws}", mean, "1/pixel⁴")


# --- Words -----------------------------------------------------------------------------------


def relation(coefficients: Sequence[tuple[str, float, int]]) -> str:
    """In words, how curvature goes with misclassification, from (method, Spearman, images).

    A coefficient counts if it is beyond 1.96 / sqrt(images - 1), which chance alone exceeds once
    in 20 times.
    """
    found = {"misclassified more often": [], "misclassified less often": [],
             "neither more nor less often misclassified, beyond chance,": []}
    more, less, neither = found.values()
    for method, value, size in coefficients:
        if math.isfinite(value):
            clear = abs(value) > 1.96 / math.sqrt(size - 1)
            (neither if not clear else more if value < 0 else less).append((method, value))
    total = sum(map(len, found.values()))
    if not total:
        return "no method has a coefficient"
    parts = [f"{words} {_within(methods, total)}" for words, methods in sorted(
        found.items(), key=lambda item: -len(item[1])) if methods]
    return f"images of higher curvature are {'; '.join(parts)}"


def _within(methods: Sequence[tuple[str, float]], total: int) -> str:
    values = sorted(value for _, value in methods)
    span = " to ".join(dict.fromkeys((signed(values[0]), signed(values[-1]))))
    where = ("in every method" if len(methods) == total > 1 else
             f"in {len(methods)} of {total} methods" if len(methods) > 2 else
             f"in {' and '.join(f'“{method}”' for method, _ in methods)}")
    return f"{where} (Spearman {span})"


def _statements(study: Study, found: dict[str, list[Counted]], noise: str) -> str:
    """A sentence for each measure."""
    sentences = []
    for key, measure in _measures(found).items():
        by_row = {row: _over_runs(runs, key, noise) for row, runs in found.items()}
        words = relation([
            (study.labels[row], float(np.mean([one.spearman for one in ones])), ones[0].number)
            for row, ones in by_row.items()])
        sentences.append(f"{measure.title}: {words}.")
    return " ".join(sentences)


def _gain_of_half(found: dict[str, list[Counted]]) -> str:
    """A sentence on how much better the flatter half of the images does."""
    gains = [100 * float(np.mean([half - whole for half, whole in (
        lowest_means(one.curvature[key], one.correct(noise), (0.5, 1))[0] for one in runs)]))
        for key in _measures(found) for noise in NOISES for runs in found.values()]
    gains = [gain for gain in gains if math.isfinite(gain)]
    if not gains:
        return ""
    return (f" The half of lowest curvature is classified more accurately than all images in "
            f"{sum(gain > 0 for gain in gains)} of the {len(gains)} lines; the difference is "
            f"{' to '.join(dict.fromkeys(map(signed, (min(gains), max(gains)))))} points.")


def _over_runs(runs: Sequence[Counted], key: str, noise: str) -> list[CountCorrelation]:
    return [correlation_with_counts(one.curvature[key], one.correct(noise).sum(axis=0),
                        one.curvature["correct"], one.counts["num_draws"]) for one in runs]


# --- Tables ----------------------------------------------------------------------------------


def correlation_table(study: Study, found: dict[str, list[Counted]], noise: str) -> Table:
    """The coefficients for one noise, by row."""
    measures, values = _measures(found), values_of(frame(study, numbers))
    where = f"{NOISES[noise]}, {_num_draws(found)} draws"
    rows = [TableRow(study.labels[row], tuple(
        Cell(over_runs(values[row, what, f"{where}, {measure.title}"], signed, " to "))
        for measure in measures.values() for what in COEFFICIENTS)) for row in found]
    columns = [name for measure in measures.values() for name in (
        f"{measure.title}: {COEFFICIENTS[0]}", *COEFFICIENTS[1:])]
    return Table(
        f"Curvature and the number of correct predictions under {NOISES[noise]}.",
        ("Method", *columns), tuple(rows),
        f"{_statements(study, found, noise)} {_counted_details(found)}",
        _CORRELATION_NOTE if noise == next(iter(NOISES)) else "How to read: as the table above.")


_CORRELATION_NOTE = (
    "How to read: −1 means that higher curvature always goes with fewer correct predictions, 0 "
    "that they are unrelated. Pearson, groups: between k and the mean curvature of the images "
    "with k correct predictions, as the paper does; some of these means rest on few images (see "
    "the figure). Spearman: rank correlation over the images, all or those that are correctly "
    "classified without noise; beyond chance: further from 0 than unrelated numbers come once in "
    "20 times. With several seeds the mean over the seeds [lowest to highest].")


def sizes_table(study: Study, found: dict[str, list[Counted]]) -> Table:
    """How many images each mean of Fig. 9 rests on."""
    num_draws = _num_draws(found)
    rows = []
    for row, runs in found.items():
        for noise, name in NOISES.items():
            counts = np.concatenate([one.correct(noise).sum(axis=0) for one in runs])
            sizes = np.bincount(counts, minlength=num_draws + 1)
            rows.append(TableRow(f"{study.labels[row]}, {name}",
                                 tuple(Cell(count(int(size))) for size in sizes)))
    return Table("Images by number of correct predictions.",
                 ("Method and noise", *map(str, range(num_draws + 1))), tuple(rows),
                 note="How to read: columns are the number of correct predictions in "
                 f"{num_draws} draws; of all seeds together.", folded=True)


def _num_draws(found: dict[str, list[Counted]]) -> int:
    return next(one.counts["num_draws"] for runs in found.values() for one in runs)


def _counted_details(found: dict[str, list[Counted]]) -> str:
    runs = [one for runs in found.values() for one in runs]
    return (f"{listed(one.counts['num_images'] for one in runs)} test images of each run, "
            f"{_num_draws(found)} draws; standard deviation (Gaussian) or amplitude (uniform) "
            f"{listed(one.counts['noise_std'] for one in runs)} of the pixel range, clipped to "
            "[0, 1].")


# --- Figures ---------------------------------------------------------------------------------


class Line(NamedTuple):
    """One row of the table in one panel."""

    label: str
    style: Style
    x: np.ndarray  # [n], increasing
    y: np.ndarray  # [n]; NaN where there is none
    sizes: np.ndarray  # [n]; images behind each point


class Panel(NamedTuple):
    """One kind of noise and one measure of the curvature."""

    noise: str  # the same along a row of panels
    measure: str  # the same along a column
    lines: tuple[Line, ...]


def kept_share_figure(panels: Sequence[Panel]) -> Figure:
    """Fig. 8: noisy accuracy of the images of lowest curvature, against the share kept."""
    figure, grid = _grid(panels)
    for ax, panel in grid:
        for line in panel.lines:
            ax.plot(line.x, line.y, color=line.style.color, marker=line.style.marker,
                    linestyle=line.style.dashes, linewidth=1.3, markersize=5,
                    markeredgecolor="white", markeredgewidth=0.5)
        ax.set_xlabel("Images kept, lowest curvature first [%]")
        ax.set_ylabel("Accuracy under noise [%]")
        ax.label_outer()
    add_legend(figure, _line_handles(panels))
    return figure


def groups_figure(panels: Sequence[Panel], num_draws: int, units: dict[str, str]) -> Figure:
    """Fig. 9: mean clean curvature by number of correct predictions, on a logarithmic axis.

    The size of a marker grows with its group; an open one stands for fewer than :data:`FEW`
    images. Means of zero or less are not shown. ``units`` gives the axis label by measure.
    """
    figure, grid = _grid(panels, sharey="col")
    shown = {panel.measure: [] for panel in panels}
    for ax, panel in grid:
        for line in panel.lines:
            on = np.isfinite(line.y) & (line.y > 0)
            x, y, sizes = line.x[on], line.y[on], line.sizes[on]
            shown[panel.measure] += y.tolist()
            ax.plot(x, y, color=line.style.color, linestyle=line.style.dashes, linewidth=1.1)
            for many in (True, False):
                of_kind = (sizes >= FEW) == many
                ax.scatter(x[of_kind], y[of_kind], s=14 + 110 * np.sqrt(
                    sizes[of_kind] / max(1, line.sizes.sum())), marker=line.style.marker,
                    facecolor=line.style.color if many else "white", linewidths=1,
                    edgecolor="white" if many else line.style.color, zorder=3)
    for ax, panel in grid:
        values = shown[panel.measure]
        if not values:
            write_across(ax, "no mean above zero")
        ax.set_yscale("log")
        ax.set_ylim(*((min(values) / 2, max(values) * 2) if values else (1e-6, 1)))
        # The default labels powers of ten only, of which flat lines may cross none.
        if values and max(values) < 30 * min(values):
            ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        ax.yaxis.set_minor_formatter(ticker.NullFormatter())
        ax.set_xlim(-0.04 * num_draws, 1.04 * num_draws)
        ax.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, nbins=11))
        ax.set_xlabel(f"Correct predictions in {num_draws} draws")
        ax.set_ylabel(units[panel.measure])
    for ax in figure.axes:
        if not ax.get_subplotspec().is_last_row():
            ax.set_xlabel("")
    add_legend(figure, _line_handles(panels))
    return figure


def _grid(panels: Sequence[Panel], sharey: bool | str = True):
    """A figure, and each panel with its axes: noises are rows, measures columns."""
    noises, measures = (list(dict.fromkeys(values)) for values in (
        (panel.noise for panel in panels), (panel.measure for panel in panels)))
    figure = new_figure(max(7, 5.5 * len(measures)), 1.2 + 3.0 * len(noises))
    axes = figure.subplots(len(noises), len(measures), squeeze=False, sharex=True, sharey=sharey)
    grid = [(axes[noises.index(panel.noise), measures.index(panel.measure)], panel)
            for panel in panels]
    for ax, panel in grid:
        ax.set_title(f"{panel.measure}, {panel.noise}", fontsize=11)
    return figure, grid


def _line_handles(panels: Sequence[Panel]) -> list[Line2D]:
    styles = {line.label: line.style for panel in panels for line in panel.lines}
    return [Line2D([], [], color=style.color, marker=style.marker, linestyle=style.dashes,
                   linewidth=1.4, label=wrap(label)) for label, style in styles.items()]


def kept_share_picture(study: Study, found: dict[str, list[Counted]]) -> Picture:
    """Fig. 8: accuracy under noise against the share of images of lowest curvature."""
    fewest = []

    def line(row, key, noise):
        curves, sizes = zip(*(lowest_means(one.curvature[key], one.correct(noise), SHARES / 100)
                              for one in found[row]), strict=True)
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
        + _gain_of_half(found)
        + _shown_measures(found) + _not_finite(found))


def groups_picture(study: Study, found: dict[str, list[Counted]]) -> Picture:
    """Fig. 9: mean clean curvature by number of correct predictions."""
    num_draws = _num_draws(found)
    few = hidden = 0

    def line(row, key, noise):
        nonlocal few, hidden
        means, sizes = means_by_count(
            np.concatenate([one.curvature[key] for one in found[row]]),
            np.concatenate([one.correct(noise).sum(axis=0) for one in found[row]]), num_draws)
        few += int(((sizes > 0) & (sizes < FEW)).sum())
        hidden += int((means <= 0).sum())
        return np.arange(num_draws + 1), means, sizes

    panels = _panels(study, found, line)
    figure = groups_figure(
        panels, num_draws, {measure.title: measure.axis for measure in MEASURES.values()})
    groups = sum(int((line.sizes > 0).sum()) for panel in panels for line in panel.lines)
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
        f"({few} of the {groups} means), of which one image may move the mean far.{zeros} Heights "
        "of the two columns do not compare." + _shown_measures(found) + _not_finite(found))


def _panels(study: Study, found: dict[str, list[Counted]], line: Callable
            ) -> list[Panel]:
    return [Panel(NOISES[noise], measure.title, tuple(
        Line(study.labels[row], _style(study, row), *line(row, key, noise))
        for row in found)) for noise in NOISES for key, measure in _measures(found).items()]


def _shown_measures(found: dict[str, list[Counted]]) -> str:
    runs = [one for runs in found.values() for one in runs]
    return (" Exact Hessian: the squared Frobenius norm at the image itself, from exact products; "
            "Eq. 21: the paper’s finite differences, here at t = "
            f"{listed(one.curvature['step'] for one in runs)} of the pixel range.")


def _not_finite(found: dict[str, list[Counted]]) -> str:
    number = sum(int((~np.isfinite(one.curvature[key])).sum())
                 for runs in found.values() for one in runs for key in _measures(found))
    return f" {number} curvatures that are not finite are left out." if number else ""


# --- Section ---------------------------------------------------------------------------------


def _section(study: Study) -> Section | None:
    found, left_out = _counted_runs(study)
    if not found:
        return None
    tables = [correlation_table(study, found, noise) for noise in NOISES]
    lead = ("Are images at which the loss curves more the ones that noise turns wrong? By "
            "each measure of curvature, which are different quantities.")
    if left_out:
        lead += f" Not shown, measured with other images or draws: {'; '.join(left_out)}."
    return Section(
        "robustness", "Curvature and correct predictions under noise", lead,
        (*tables, sizes_table(study, found)),
        (kept_share_picture(study, found), groups_picture(study, found)))


NOISE_COUNTS = Measurement(
    "noise_counts", measure=_measure, section=_section, numbers=(numbers,), command="figures")
