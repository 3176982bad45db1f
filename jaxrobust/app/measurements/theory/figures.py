"""Figures of the checked theorems: pure functions, as in :mod:`jaxrobust.app.report.figures`."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib import cbook
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from jaxrobust.app.report.figures import GRID, Style, add_legend, new_figure, row_style, wrap


class BoundSample(NamedTuple):
    """Curvatures of one row's images and what bounds them, of all seeds together."""

    label: str
    values: dict[str, np.ndarray]  # each [n], by what it is; the same names in every row


class MappingCurves(NamedTuple):
    """One row's means over classes and seeds."""

    label: str
    radii: np.ndarray  # [r]; over the median distance to the centroid
    values: dict[str, np.ndarray]  # each [r], by what it is; the first is measured


class SeparationLine(NamedTuple):
    """Divergences of one row's classes, over pairs of classes and seeds."""

    label: str
    style: Style
    layers: tuple[str, ...]
    smallest: np.ndarray  # [layers]; nats
    median: np.ndarray  # [layers]; nats
    bounds: dict[str, tuple[float, float]]  # smallest and median, by name


def bounds_figure(samples: Sequence[BoundSample]) -> Figure:
    """Box plots on a logarithmic axis: a group for each row, a box for each quantity.

    Boxes: quartiles; whiskers: the 5th and 95th percentile. Zero or less lies beyond the left
    edge.
    """
    names = list(samples[0].values)
    figure = new_figure(10, 2.2 + 0.28 * len(samples) * (len(names) + 1))
    ax = figure.subplots()
    ends: list[float] = []
    for group, sample in enumerate(samples):
        for index, name in enumerate(names):
            values = sample.values[name]
            stat = cbook.boxplot_stats(values[np.isfinite(values)], whis=(5, 95))[0]
            place = group + (index - (len(names) - 1) / 2) / (len(names) + 1)
            ax.bxp([stat], positions=[place], orientation="horizontal",
                   widths=0.8 / (len(names) + 1), showfliers=False, patch_artist=True,
                   boxprops={"facecolor": row_style(index).color, "alpha": 0.6},
                   medianprops={"color": "black", "linewidth": 1.6}, manage_ticks=False)
            if stat["med"] > 0:
                ax.plot(stat["med"], place, marker=row_style(index).marker, color="black",
                        markersize=5, markeredgecolor="white", markeredgewidth=0.6)
            ends += [stat[end] for end in ("whislo", "q1", "med", "q3", "whishi")
                     if stat[end] > 0]
    ax.set_xlim(min(ends, default=1e-6) / 3, max(ends, default=1.0) * 3)
    ax.set_xscale("log", nonpositive="clip")
    ax.set_xlabel("Squared Frobenius norm, or its bound [nats$^2$/pixel$^4$]")
    ax.set_yticks(range(len(samples)), [wrap(sample.label) for sample in samples])
    ax.set_ylim(len(samples) - 0.5, -0.5)
    for group in range(1, len(samples)):
        ax.axhline(group - 0.5, color="#BFBFBF", linewidth=0.6)
    add_legend(figure, [Patch(facecolor=row_style(index).color, alpha=0.6, label=wrap(name, 44))
                     for index, name in enumerate(names)], columns=2)
    ax.grid(visible=False, axis="y")
    return figure


def mapping_figure(curves: Sequence[MappingCurves]) -> Figure:
    """The share of test images outside the ball, and its bounds, against the radius."""
    columns = min(3, len(curves))
    lines = math.ceil(len(curves) / columns)
    figure = new_figure(3.9 * columns, 1.3 + 2.7 * lines)
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True)
    names = list(curves[0].values)
    for index, ax in enumerate(axes.flat):
        if index >= len(curves):
            ax.remove()
            continue
        curve = curves[index]
        ax.axhspan(1, 1.15, color="#EFEFEF", zorder=0)
        for number, name in enumerate(names):
            style = row_style(number)
            ax.plot(curve.radii, curve.values[name], color=style.color, linestyle=style.dashes,
                    marker=style.marker, markersize=4, linewidth=1.3)
        ax.set_title(wrap(curve.label, 38), fontsize=10)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set_ylim(-0.03, 1.15)
        if index % columns == 0:
            ax.set_ylabel("Share outside the ball")
        if index + columns >= len(curves):
            ax.set_xlabel("Radius / median distance")
    styles = {name: row_style(number) for number, name in enumerate(names)}
    add_legend(figure, [Line2D([], [], color=style.color, marker=style.marker, markersize=5,
                               linestyle=style.dashes, label=wrap(name, 44))
                        for name, style in styles.items()], columns=2)
    return figure


def separation_figure(lines: Sequence[SeparationLine]) -> Figure:
    """Divergences layer by layer, and the theorem's bounds beside them."""
    figure = new_figure(11, 5.4)
    axes = figure.subplots(1, 2, sharey=True)
    for panel, (ax, name) in enumerate(zip(axes, ("smallest", "median"), strict=True)):
        for index, line in enumerate(lines):
            look = {"color": line.style.color, "marker": line.style.marker, "markersize": 6,
                    "markeredgecolor": "white", "markeredgewidth": 0.6}
            ax.plot(range(len(line.layers)), getattr(line, name), linestyle=line.style.dashes,
                    linewidth=1.3, **look)
            shift = 0.07 * (index - (len(lines) - 1) / 2)
            ax.plot(len(line.layers) + np.arange(len(line.bounds)) + shift,
                    [values[panel] for values in line.bounds.values()], linestyle="none", **look)
        ticks = [*lines[0].layers, *lines[0].bounds]
        ax.set_xticks(range(len(ticks)), ticks, rotation=30, ha="right", rotation_mode="anchor")
        ax.axvline(len(lines[0].layers) - 0.5, color="#7F7F7F", linewidth=0.8)
        ax.axhline(math.log(2), color="#7F7F7F", linewidth=0.8, linestyle=(0, (4, 3)))
        ax.set_title(f"{name.capitalize()} over the pairs of classes")
    axes[0].set_ylabel("Jensen-Shannon divergence [nats]")
    axes[0].text(0, math.log(2), "log 2, the largest value", fontsize=8, va="bottom")
    add_legend(figure, [Line2D([], [], color=line.style.color, marker=line.style.marker,
                            markersize=5, linestyle=line.style.dashes, label=wrap(line.label))
                     for line in lines])
    for ax in axes:
        ax.grid(**GRID)
    return figure
