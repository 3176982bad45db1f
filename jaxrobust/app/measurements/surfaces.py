"""Measures the loss over a plane through a few test images: the paper's Fig. 11."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxrobust import _validate, curvature
from jaxrobust.app.measurements.accuracy import make_test_split
from jaxrobust.app.measurements.curvature import losses_of
from jaxrobust.app.measurements.runner import Measured, Measurement, Work
from jaxrobust.app.progress import progress
from jaxrobust.app.report.figures import new_figure, wrap, write_across
from jaxrobust.app.report.page import Picture, Section
from jaxrobust.app.study.read import Study
from jaxrobust.app.trainer import TrainedRun, variables_of
from jaxrobust.images import to_float

SEED = 0
NUM_SURFACES = 3
"""Number of images whose surface is shown by default."""


@dataclasses.dataclass(frozen=True)
class SurfaceSettings:
    """Which surfaces are measured."""

    images: tuple[int, ...]  # numbers of the test images
    resolution: int  # points along each direction; odd, so that the image is among them
    test_size: int | None  # test images, drawn at random by class with seed 0; None for all
    noise_std: float  # standard deviation; the plane reaches as far as its typical vector


def first_of_classes(labels: np.ndarray, count: int) -> list[int]:
    """Finds the first image of each of the ``count`` lowest classes."""
    return sorted(np.unique(labels, return_index=True)[1].tolist())[:count]


def _measure(run: TrainedRun, settings: SurfaceSettings, work: Work) -> Measured:
    """Computes the loss over the plane through each image."""
    split = make_test_split(run.dataset, settings.test_size)
    for number in settings.images:
        _validate.in_range("surface image", number, 0, len(split.labels))
    chosen = np.array(settings.images)
    images, labels = split.images[chosen], split.labels[chosen]
    # The length of a typical noise vector: the plane reaches as far as the noise does.
    extent = settings.noise_std * math.sqrt(images[0].size)
    with progress(f"{work.label}, loss surfaces", len(chosen)) as shown:
        surface = _surface(
            run.model, variables_of(run.state), to_float(jnp.asarray(images)),
            jnp.asarray(labels), jnp.asarray(chosen), extent, settings.resolution)
        values = np.asarray(surface.values)
        shown.advance(len(chosen), **{"largest loss": float(values.max())})
    return Measured(
        {**work.asked, "extent": extent, "class_names": list(run.dataset.class_names)},
        {"index": chosen, "image": images, "label": labels,
         "offsets": np.asarray(surface.offsets), "values": values})


@functools.partial(jax.jit, static_argnames=("model", "extent", "resolution"))
def _surface(model, variables, images, labels, indices, extent, resolution):
    loss, _ = losses_of(model, variables, labels)
    return curvature.loss_surface(
        loss, images, jax.random.key(SEED), extent=extent, resolution=resolution,
        indices=indices)


def surfaces_figure(images: np.ndarray, names: Sequence[str], offsets: np.ndarray,
                    losses: dict[str, np.ndarray]) -> Figure:
    """Draws Fig. 11: the negative loss, a line of panels for each image, on one scale within it.

    Args:
      images: [K, H, W, channels], uint8.
      names: K, of their classes.
      offsets: [R], in pixel units, of the points along each direction.
      losses: by label, [K, R, R], in nats; the second axis is along the gradient.
    """
    columns = 1 + len(losses)
    figure = new_figure(1.6 + 1.5 * columns, 0.9 + 1.6 * len(images))
    grid = figure.subplots(len(images), columns, squeeze=False)
    for number, (line, image, name) in enumerate(zip(grid, images, names, strict=True)):
        last = number == len(images) - 1
        channels = image[..., 0] if image.shape[-1] == 1 else image
        line[0].imshow(channels, cmap="gray", interpolation="nearest")
        line[0].set_title(name, fontsize=9)
        line[0].set_axis_off()
        values = {label: -loss[number] for label, loss in losses.items()}
        finite = np.concatenate([value[np.isfinite(value)] for value in values.values()])
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
        levels = ticker.MaxNLocator(12, steps=(1, 2, 5, 10)).tick_values(
            low, high if high > low else low + 1)
        for ax, (label, value) in zip(line[1:], values.items(), strict=True):
            filled = _contours(ax, offsets, value, levels)
            if number == 0:
                ax.set_title(wrap(label, 17), fontsize=9)
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


def _contours(ax: Axes, offsets: np.ndarray, values: np.ndarray, levels: Sequence[float]):
    """Draws filled contours with lines between them, and the image itself as a dot."""
    masked = np.ma.masked_invalid(values)
    filled = ax.contourf(offsets, offsets, masked, levels=levels, cmap="viridis")
    # Without a level within its values, a set of lines warns.
    inside = levels[(levels > masked.min()) & (levels < masked.max())] if masked.count() else ()
    if len(inside):
        ax.contour(offsets, offsets, masked, levels=inside, colors="white", linewidths=0.5,
                   linestyles="solid")
    if masked.mask.any():
        write_across(ax, "not finite")
    ax.plot(0, 0, "o", color="black", markersize=5, markeredgecolor="white", markeredgewidth=0.8)
    ax.set_aspect("equal")
    return filled


def _section(study: Study) -> Section | None:
    results = study.first_results("surfaces")
    return Section("surfaces", "Loss around an image", "", (),
                   (surfaces_picture(study, results),)) if results else None


def surfaces_picture(study: Study, results: dict[str, dict]) -> Picture:
    """Shows Fig. 11: the negative loss around a few images, the same for all methods."""
    first = next(iter(results.values()))
    same = {row: result for row, result in results.items()
            if all(np.array_equal(result[name], first[name]) for name in ("image", "offsets"))}
    losses = {study.labels[row]: result["values"] for row, result in same.items()}
    names = [first["class_names"][label] for label in first["label"]]
    left_out = [study.labels[row] for row in results if row not in same]
    return Picture(
        "loss_surfaces", surfaces_figure(first["image"], names, first["offsets"], losses),
        "The negative of the softmax loss over a plane through a test image (the paper’s "
        "Fig. 11).",
        f"Filled contours of the negative loss, a panel for each of {len(names)} images and "
        f"{len(losses)} methods.",
        "How to read: the dot is the image on the left; bright means a small loss. Up: the "
        "direction in which this network’s loss grows fastest at the image; right: a random "
        "direction at a right angle to it, from the same random vector for all methods. Offsets "
        f"are Euclidean distances in pixel units, up to {first['extent']:.2f}, the length of a "
        f"typical noise vector: the training noise’s standard deviation {first['noise_std']:g} "
        "times the square root of the number of values in an image. Colours compare within a line "
        "of panels, not between lines. Closely spaced contours that bend show a curved loss. "
        "Points outside [0, 1] are not clipped."
        + (f" Not shown, of other images: {', '.join(left_out)}." if left_out else ""))


SURFACES = Measurement("surfaces", measure=_measure, section=_section, command="figures")
