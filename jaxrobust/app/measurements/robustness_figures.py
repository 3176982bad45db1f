"""The paper's Fig. 8, 9 and 11 to 13: pure functions from numbers to a matplotlib ``Figure``.

Styles, sizes and files as in :mod:`jaxrobust.app.report.figures`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from jaxrobust.app.report.figures import Style, add_legend, class_handles, new_figure, scatter, wrap

FEW = 10
"""Images below which a group's mean is marked as resting on few."""


class Line(NamedTuple):
    """Of one row of the table, in one panel."""

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


class LossPlanes(NamedTuple):
    """The loss of one row's run over a plane through each of a few images."""

    label: str
    offsets: np.ndarray  # [R]; pixel units, from -extent to extent
    values: np.ndarray  # [K, R, R]; nats; second axis along the gradient


class BlockPlanes(NamedTuple):
    """Features of one run's blocks in the plane."""

    label: str
    blocks: tuple[str, ...]  # K titles
    points: np.ndarray  # [K, n, 2]; NaN for a block that could not be embedded
    other: np.ndarray  # [K, n, 2]; the other view in the same planes, which sets the limits too
    classes: np.ndarray  # [n], integers


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
            _say(ax, "no mean above zero")
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


def surfaces_figure(images: np.ndarray, names: Sequence[str],
                    planes: Sequence[LossPlanes]) -> Figure:
    """Fig. 11: the negative loss, a line of panels for each image, on one scale within it.

    Args:
      images: [K, H, W, channels], uint8.
      names: K, of their classes.
      planes: by row of the table.
    """
    columns = 1 + len(planes)
    figure = new_figure(1.6 + 1.5 * columns, 0.9 + 1.6 * len(images))
    grid = figure.subplots(len(images), columns, squeeze=False)
    for number, (line, image, name) in enumerate(zip(grid, images, names, strict=True)):
        last = number == len(images) - 1
        channels = image[..., 0] if image.shape[-1] == 1 else image
        line[0].imshow(channels, cmap="gray", interpolation="nearest")
        line[0].set_title(name, fontsize=9)
        line[0].set_axis_off()
        values = [-plane.values[number] for plane in planes]
        finite = np.concatenate([value[np.isfinite(value)] for value in values])
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
        levels = ticker.MaxNLocator(12, steps=(1, 2, 5, 10)).tick_values(
            low, high if high > low else low + 1)
        for ax, plane, value in zip(line[1:], planes, values, strict=True):
            filled = _contours(ax, plane.offsets, value, levels)
            if number == 0:
                ax.set_title(wrap(plane.label, 17), fontsize=9)
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_major_locator(ticker.MaxNLocator(4, steps=(1, 2, 5, 10)))
            ax.tick_params(labelsize=8, labelleft=ax is line[1], labelbottom=last)
        line[1].set_ylabel("along the gradient\n[pixel units]", fontsize=8)
        bar = figure.colorbar(filled, ax=line[1:].tolist(), pad=0.01, aspect=14)
        bar.set_label("−loss [nats]", fontsize=8, labelpad=6)
        bar.ax.tick_params(labelsize=8)
    for ax in grid[-1, 1:]:
        ax.set_xlabel("random direction\n[pixel units]", fontsize=8)
    return figure


def blocks_figure(planes: Sequence[BlockPlanes], class_names: dict[int, str]) -> Figure:
    """Fig. 12 and 13: the outputs of each block, a line of panels for each row of the table."""
    columns = max(len(plane.blocks) for plane in planes)
    figure = new_figure(max(7.5, 0.6 + 2.5 * columns), 1.2 + 2.0 * len(planes))
    grid = figure.subplots(len(planes), columns, squeeze=False)
    for line, plane in zip(grid, planes, strict=True):
        for ax in line[len(plane.blocks):]:
            ax.set_axis_off()
        for ax, title, points, other in zip(
                line, plane.blocks, plane.points, plane.other, strict=False):
            scatter(ax, points, plane.classes, size=5, numbers=False)
            ax.set_xlabel("")
            ax.set_title(title, fontsize=9)
            both = np.concatenate([points, other])
            if np.isfinite(both).all():
                margin = 0.04 * np.ptp(both, axis=0)
                (left, bottom), (right, top) = both.min(axis=0) - margin, both.max(axis=0) + margin
                ax.set(xlim=(left, right), ylim=(bottom, top))
            else:
                _say(ax, "not finite, or all alike")
        line[0].set_ylabel(wrap(plane.label, 22), fontsize=9)
    add_legend(figure, class_handles((int(c) for plane in planes for c in plane.classes),
                                     class_names), columns=5)
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(True)
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


def _contours(ax: Axes, offsets: np.ndarray, values: np.ndarray, levels: np.ndarray):
    """Filled contours with lines between them, and the image itself as a dot."""
    masked = np.ma.masked_invalid(values)
    filled = ax.contourf(offsets, offsets, masked, levels=levels, cmap="viridis")
    # Without a level within its values, a set of lines warns.
    inside = levels[(levels > masked.min()) & (levels < masked.max())] if masked.count() else ()
    if len(inside):
        ax.contour(offsets, offsets, masked, levels=inside, colors="white", linewidths=0.5,
                   linestyles="solid")
    if masked.mask.any():
        _say(ax, "not finite")
    ax.plot(0, 0, "o", color="black", markersize=5, markeredgecolor="white", markeredgewidth=0.8)
    ax.set_aspect("equal")
    return filled


def _say(ax: Axes, words: str) -> None:
    ax.text(0.5, 0.5, words, transform=ax.transAxes, ha="center", va="center", style="italic",
            fontsize=8)
