"""Draws for the report: styles, legends, and figures that several pages share.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; every row also has a
marker and a line style of its own, for print in black and white. No function here touches
pyplot, whose figures are global state.
"""

import pathlib
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import threadpoolctl
from matplotlib import cbook, patheffects, ticker
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from sklearn.manifold import TSNE

from jaxrobust.app.files import replacing

DPI = 150
"""Resolution of the PNG files, and of scatter plots, which SVG files hold as images."""

_ORANGE, _SKY, _GREEN, _YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
_BLUE, _VERMILLION, _PURPLE, _BLACK = "#0072B2", "#D55E00", "#CC79A7", "#000000"
_GREY = "#999999"
_ROW_COLORS = (_BLUE, _ORANGE, _GREEN, _PURPLE, _VERMILLION, _BLACK, _SKY, _GREY)
_ROW_MARKERS = ("o", "s", "^", "D", "v", "X", "P")
_ROW_DASHES = ("-", (0, (6, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (3, 1, 1, 1, 1, 1)),
               (0, (8, 2, 2, 2)), (0, (2, 2)))
_CLASS_COLORS = (_BLUE, _VERMILLION, _GREEN, _PURPLE, _ORANGE, _SKY, _BLACK, _YELLOW, _GREY,
                 "#7F4A1E")
_CLASS_MARKERS = ("o", "s", "^", "D", "v", "X", "P", "<", ">", "*")
GRID: dict[str, Any] = {"color": "#D9D9D9", "linewidth": 0.6}


class Style(NamedTuple):
    """How a row is drawn, the same in every figure."""

    color: str
    marker: str
    dashes: Any  # a matplotlib line style


class AccuracyLine(NamedTuple):
    """Accuracy of one row of the table against the noise."""

    label: str
    style: Style
    levels: np.ndarray  # [L]; std of the noise in units of 1/255, increasing
    mean: np.ndarray  # [L]; per cent
    std: np.ndarray  # [L]; per cent, 0 where unknown; or [2, L], down and up


def row_style(index: int) -> Style:
    """Returns the style of the ``index``-th row of the table; 56 differ, eight in colour."""
    shape = (index + index // len(_ROW_COLORS)) % len(_ROW_MARKERS)
    return Style(_ROW_COLORS[index % len(_ROW_COLORS)], _ROW_MARKERS[shape], _ROW_DASHES[shape])


def row_styles(names: Iterable[str]) -> dict[str, Style]:
    """Returns the style of each row of the table, or of whatever else the colours tell apart."""
    return {name: row_style(index) for index, name in enumerate(names)}


def joint_tsne(clean: np.ndarray, noisy: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Embeds clean and noisy features together by t-SNE.

    Row i of both, [n, d], comes from the same image. Returns both, each [n, 2]; None for fewer than
    4 points, or features that are not finite or all alike, as in a training that diverged.
    """
    points = np.concatenate([clean, noisy]).astype(np.float64)
    if len(points) < 4 or not np.isfinite(points).all() or np.ptp(points, axis=0).max() == 0:
        return None
    # Threads add up in an order that changes from one call to the next; a report must not.
    with threadpoolctl.threadpool_limits(limits=1):
        plane = TSNE(random_state=0, init="pca",
                     perplexity=min(30, (len(points) - 1) / 3)).fit_transform(points)
    return plane[:len(clean)], plane[len(clean):]


def accuracy_figure(lines: Sequence[AccuracyLine], paper: Sequence[AccuracyLine]) -> Figure:
    """Draws accuracy against the noise level, with the paper's lines in the rows' styles.

    Where the paper's lines or the weakest row take much of the range, a second panel shows ours
    enlarged, down to where the second weakest ends; rows that lie wholly below are left out of it.
    In the last panel the markers of a level are side by side.
    """
    limits = _enlarged(lines, paper)
    figure = new_figure(11 if limits else 7, 5.6)
    axes = figure.subplots(1, 2 if limits else 1, squeeze=False)[0]
    levels = sorted({float(level) for line in lines for level in line.levels})
    for line in paper:
        axes[0].plot(line.levels, line.mean, color=line.style.color, linestyle=(0, (4, 3)),
                     linewidth=0.8, marker=line.style.marker, markersize=4,
                     markerfacecolor="white")
    for ax in axes:
        shift = 0.009 * (levels[-1] - levels[0]) if ax is axes[-1] else 0.0
        for index, line in enumerate(lines):
            if limits and ax is axes[1] and line.mean.max() < limits[0]:
                continue  # else its error bars alone would reach in
            ax.errorbar(line.levels + shift * (index - (len(lines) - 1) / 2), line.mean,
                        yerr=line.std, color=line.style.color, marker=line.style.marker,
                        markersize=6, linewidth=1.4, capsize=3, markeredgecolor="white",
                        markeredgewidth=0.6)
        ax.set_xticks(levels)
        ax.set_xlabel("Standard deviation of the test noise [1/255 of the pixel range]")
        ax.set_ylabel("Test accuracy [%]")
    if limits:
        axes[0].set_title("Ours and the paper's" if paper else "All")
        axes[1].set_title("Ours, enlarged (the weakest cut off)")
        axes[1].set_ylim(*limits)
    handles = style_handles([(line.label, line.style) for line in lines], linestyle="-",
                            linewidth=1.6)
    if paper:
        handles.append(Line2D([], [], color="#595959", linestyle=(0, (4, 3)), linewidth=0.8,
                              marker="o", markersize=4, markerfacecolor="white",
                              label="thin, dashed, open marker:\nthe paper's, same colour"))
    add_legend(figure, handles)
    return figure


def _enlarged(lines: Sequence[AccuracyLine], paper: Sequence[AccuracyLine],
              ) -> tuple[float, float] | None:
    """Returns the range of all lines but the weakest; None if it is most of the whole."""
    if len(lines) < 3:
        return None
    weakest, low = sorted(float((line.mean - line.std).min()) for line in lines)[:2]
    high = max(float((line.mean + line.std).max()) for line in lines)
    ends = [weakest, high, *(float(mean) for line in paper for mean in line.mean)]
    if high - low > 0.75 * (max(ends) - min(ends)):
        return None
    margin = 0.05 * max(high - low, 1)
    return low - margin, high + margin


def dots_figure(names: Sequence[str], lines: Sequence[AccuracyLine],
                of: str = "Test accuracy") -> Figure:
    """Draws accuracies under these names, one below the other; the lines' levels are places among
    the names."""
    figure = new_figure(9.5, 1.2 + len(names) * (0.22 + 0.09 * len(lines)))
    ax = figure.subplots()
    for index, line in enumerate(lines):
        shift = 0.7 * (index - (len(lines) - 1) / 2) / len(lines)
        ax.errorbar(line.mean, line.levels + shift, xerr=line.std, color=line.style.color,
                    marker=line.style.marker, markersize=6, linestyle="none", capsize=2,
                    markeredgecolor="white", markeredgewidth=0.6)
    for border in range(1, len(names)):
        ax.axhline(border - 0.5, **GRID)
    ax.set_yticks(range(len(names)), [name.replace("+", " +\n") for name in names])
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlabel(f"{of} [%]")
    add_legend(figure, style_handles([(line.label, line.style) for line in lines],
                                     linestyle="none"))
    ax.grid(visible=False, axis="y")
    return figure


def save(figure: Figure, stem: pathlib.Path) -> None:
    """Writes ``stem.png`` and ``stem.svg``, the same bytes for the same figure."""
    with matplotlib.rc_context({"svg.hashsalt": "jaxrobust"}):
        with replacing(stem.with_suffix(".svg")) as partial:
            figure.savefig(partial, format="svg", dpi=DPI, metadata={"Date": None})
        with replacing(stem.with_suffix(".png")) as partial:
            figure.savefig(partial, format="png", dpi=DPI)


def new_figure(width: float, height: float) -> Figure:
    """Makes an empty figure, in inches, whose parts make room for each other."""
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    return figure


def wrap(label: str, width: int = 30) -> str:
    """Breaks a label into as many lines as it needs."""
    return textwrap.fill(label, width)


def add_legend(figure: Figure, handles: Sequence[Line2D], columns: int = 3) -> None:
    """Adds one legend below all panels, which get their grid and lose their upper right spines.

    In as many columns, up to ``columns``, as the figure is wide.
    """
    for ax in figure.axes:
        ax.set_axisbelow(True)
        if ax.get_xticks().size:
            ax.grid(**GRID)
        ax.spines[["top", "right"]].set_visible(False)
    for count in range(min(columns, len(handles)), 0, -1):
        legend = figure.legend(handles=handles, loc="outside lower center", ncols=count,
                               frameon=False, columnspacing=1.5, handlelength=2.6)
        if count == 1 or legend.get_window_extent().width <= figure.bbox.width:
            break
        legend.remove()


def style_handles(styles: Iterable[tuple[str, Style]], width: int = 30, **look) -> list[Line2D]:
    """Returns the legend's lines, from labels and styles that ``look`` overrides."""
    return [Line2D([], [], **{"color": style.color, "marker": style.marker,
                              "linestyle": style.dashes, "label": wrap(label, width)} | look)
            for label, style in styles]


def boxes(ax: Axes, groups: Sequence[tuple[float, np.ndarray, Style]], *, width: float) -> None:
    """Draws horizontal box plots on a logarithmic axis, from place, values [n] and style of each.

    Boxes: quartiles; whiskers: the 5th and 95th percentile of the finite values. Values of zero or
    less lie beyond the left edge.
    """
    ends = []
    for place, values, style in groups:
        stat = cbook.boxplot_stats(values[np.isfinite(values)], whis=(5, 95))[0]
        ax.bxp([stat], positions=[place], orientation="horizontal", widths=width, showfliers=False,
               patch_artist=True, boxprops={"facecolor": style.color, "alpha": 0.55},
               medianprops={"color": "black", "linewidth": 1.8}, manage_ticks=False)
        if not stat["whishi"] > 0:
            words = "no finite value" if np.isnan(stat["whishi"]) else "zero to the 95th percentile"
            ax.text(0.5, place, words, transform=ax.get_yaxis_transform(), ha="center",
                    va="center", style="italic")
        if stat["med"] > 0:
            ax.plot(stat["med"], place, marker=style.marker, color="black", markersize=6,
                    markeredgecolor="white", markeredgewidth=0.6)
        ends += [float(stat[end]) for end in ("whislo", "q1", "med", "q3", "whishi")]
    positive = [end for end in ends if end > 0]
    ax.set_xlim(min(positive, default=1e-6) / 3, max(positive, default=1.0) * 3)
    ax.set_xscale("log", nonpositive="clip")


def class_look(index: int) -> tuple[str, str]:
    """Returns the colour and the marker of a class."""
    return (_CLASS_COLORS[index % len(_CLASS_COLORS)],
            _CLASS_MARKERS[index % len(_CLASS_MARKERS)])


def class_handles(classes: Iterable[int], class_names: dict[int, str]) -> list[Line2D]:
    """Returns the legend's entries for a scatter plot by class."""
    return [Line2D([], [], color=class_look(c)[0], marker=class_look(c)[1], linestyle="none",
                   label=class_names.get(c, str(c))) for c in sorted(set(classes))]


def scatter(ax: Axes, points: np.ndarray, classes: np.ndarray, *, size: float = 9,
            numbers: bool = True) -> None:
    """Draws points of the plane [n, 2] by class, with the number of each class at its median."""
    for c in np.unique(classes):
        color, marker = class_look(int(c))
        # As an image: thousands of markers would make the SVG file, and the page, slow.
        x, y = points[classes == c].T
        ax.scatter(x, y, s=size, color=color, marker=marker, linewidths=0,
                   rasterized=True)
    for c in np.unique(classes) if numbers else ():
        ax.annotate(str(c), np.median(points[classes == c], axis=0), ha="center", va="center",
                    fontsize=10, fontweight="bold",
                    path_effects=[patheffects.withStroke(linewidth=2.5, foreground="white")])
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_xlabel("t-SNE 1 (no unit)")


def label_logarithmic(axis: Axis, values: Iterable[float]) -> None:
    """Labels a logarithmic axis of positive values by plain numbers: the powers of ten, and 2 and 5
    times these if the values span few.

    By default a short axis has no label, or so many that they overlap.
    """
    values = list(values)
    if values and max(values) < 30 * min(values):
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def write_across(ax: Axes, words: str) -> None:
    """Writes words in the place of what cannot be drawn."""
    ax.text(0.5, 0.5, words, transform=ax.transAxes, ha="center", va="center", style="italic",
            fontsize=8)
