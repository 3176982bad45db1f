"""The figure of :mod:`.networks`: pure, from numbers to a ``Figure``."""

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from jaxrobust.app.report.figures import Style, add_legend, new_figure


class Network(NamedTuple):
    """One run."""

    method: str
    style: Style  # of its method
    curvature: dict[str, float]  # by measure, in 1/pixel^4
    accuracy: float  # under noise, per cent
    lost: float  # clean accuracy less that, in points


def networks_figure(networks: Sequence[Network], measures: dict[str, str], level: str) -> Figure:
    """Accuracy under the noise ``level``, and what it takes, against each curvature."""
    figure = new_figure(3.7 * len(measures), 6.4)
    axes = figure.subplots(2, len(measures), squeeze=False, sharex="col", sharey="row")
    for column, (key, title) in enumerate(measures.items()):
        for row, name in enumerate(("accuracy", "lost")):
            for network in networks:
                axes[row, column].plot(
                    network.curvature[key], getattr(network, name), linestyle="none",
                    marker=network.style.marker, color=network.style.color, alpha=0.75,
                    markeredgecolor="white", markeredgewidth=0.5)
        axes[0, column].set_title(title)
        axes[1, column].set_xlabel("Median curvature [1/pixel⁴]")
        if any(network.curvature[key] > 0 for network in networks):
            axes[1, column].set_xscale("log", nonpositive="mask")
    axes[0, 0].set_ylabel(f"Accuracy at {level} [%]")
    axes[1, 0].set_ylabel(f"Lost from clean to {level} [points]")
    styles = {network.method: network.style for network in networks}
    add_legend(figure, [
        Line2D([], [], linestyle="none", marker=style.marker, color=style.color, label=method)
        for method, style in styles.items()], columns=5)
    return figure
