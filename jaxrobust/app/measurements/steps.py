"""Measures how Eq. 21 depends on its step, beside the exact and the smoothed curvature."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.lines import Line2D

from jaxrobust import _validate, curvature
from jaxrobust.app.config import check_length, distinct
from jaxrobust.app.measurements.accuracy import first_test_images
from jaxrobust.app.measurements.curvature import (
    PROBE_SEED,
    PROBES_AT_ONCE,
    losses_of,
    require_piecewise_linear,
)
from jaxrobust.app.measurements.runner import Measured, Measurement, Work
from jaxrobust.app.progress import progress
from jaxrobust.app.report import figures
from jaxrobust.app.report.frame import Number
from jaxrobust.app.report.page import Picture, Section, Table, listed, significant, text_row
from jaxrobust.app.study.read import Run, Study
from jaxrobust.app.trainer import TrainedRun, variables_of
from jaxrobust.images import to_float

PRECISIONS = ("float32", "float64")
BATCH_SIZE = 32


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """What the command ``steps`` measures."""

    steps: tuple[float, ...] = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    """Steps t of Eq. 21, also standard deviations of the smoothed curvature, in pixel values."""
    num_images: int = 64
    """Number of test images, taken from the first on."""
    num_probes: int = 20
    """Random directions in Eq. 21, also pairs of noisy images for the smoothed curvature."""
    test_size: int | None = None
    """Draw so many test images at random by class, with seed 0, and measure the first of them;
    none to take the first of all test images."""

    def __post_init__(self):
        for step in self.steps:
            check_length("steps", step)
        _validate.in_range("number of steps", len(self.steps), 1)
        _validate.in_range("num_images", self.num_images, 1)
        _validate.in_range("num_probes", self.num_probes, 3)
        distinct("step", self.steps)
        if self.test_size is not None:
            _validate.in_range("test_size", self.test_size, 1)


def _measure(run: TrainedRun, settings: StepSettings, work: Work) -> Measured:
    """Measures a table with a row for each precision, step and image.

    In float32 and float64, with respect to pixels in [0, 1]: Eq. 21 with each step t, the
    smoothed curvature with noise of standard deviation t, and the exact squared Frobenius norm.

    Raises:
      InputError: (a ValueError) if the network is not made of affine pieces.
    """
    test_images, labels = first_test_images(run, settings)
    count = len(labels)
    require_piecewise_linear(run, test_images[:BATCH_SIZE], labels[:BATCH_SIZE], "steps")
    parts: list[dict[str, np.ndarray]] = []
    with progress(f"{work.label}, steps",
                  len(PRECISIONS) * len(settings.steps) * -(-count // BATCH_SIZE)) as shown:
        for precision in PRECISIONS:
            with jax.enable_x64(precision == "float64"):
                model = run.model.clone(dtype=jnp.dtype(precision))
                variables = jax.tree.map(
                    lambda leaf, dtype=precision: jnp.asarray(np.asarray(leaf), dtype),
                    variables_of(run.state))
                for first in range(0, count, BATCH_SIZE):
                    rows = np.arange(first, min(first + BATCH_SIZE, count))
                    images = to_float(jnp.asarray(test_images[rows])).astype(precision)
                    batch = (model, variables, images, jnp.asarray(labels[rows]),
                             jnp.asarray(rows))
                    exact = np.asarray(_exact(*batch[:3]))
                    for step in settings.steps:
                        measured = _measure_batch(*batch, step, settings.num_probes)
                        shown.advance(**{f"Eq. 21 at {step:g}": float(
                            np.median(measured["finite_difference"]))})
                        parts.append({
                            "bits": np.full(len(rows), int(precision[5:])),
                            "step": np.full(len(rows), step), "index": rows, "exact": exact,
                            **{name: np.asarray(value) for name, value in measured.items()}})
    table = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Measured({"with_respect_to": "pixels in [0, 1]"}, table)


@functools.partial(jax.jit, static_argnames="model")
def _exact(model, variables, images):
    spectrum = curvature.piecewise_linear_spectrum(
        lambda images: model.apply(variables, images, train=False).logits, images)
    return jnp.sum(jnp.square(spectrum), axis=1)


@functools.partial(jax.jit, static_argnames=("model", "num_probes"))
def _measure_batch(model, variables, images, labels, indices, step, num_probes):
    loss, _ = losses_of(model, variables, labels)
    key = jax.random.key(PROBE_SEED)
    sigma: Any = jnp.asarray(step, images.dtype)
    difference = curvature.finite_difference_curvature(
        loss, images, key, step=sigma, num_probes=num_probes, chunk_size=PROBES_AT_ONCE,
        indices=indices)
    smoothed = curvature.smoothed_curvature(
        loss, images, key, sigma=sigma, num_draws=num_probes, chunk_size=PROBES_AT_ONCE,
        indices=indices).squared_frobenius
    return {"finite_difference": difference.value, "smoothed": smoothed.value,
            "finite_difference_standard_error": difference.standard_error,
            "smoothed_standard_error": smoothed.standard_error}


class StepCurves(NamedTuple):
    """Medians over the images of one run, with quartiles for Eq. 21."""

    label: str
    steps: np.ndarray  # [T]
    exact: float
    single: np.ndarray  # [T]; Eq. 21 in float32
    double: np.ndarray  # [3, T]; Eq. 21 in float64: lower quartile, median, upper quartile
    smoothed: np.ndarray  # [T]; in float64


def step_curves(label: str, table: dict[str, np.ndarray]) -> StepCurves:
    """Computes the curves of a ``steps.npz``."""
    steps = np.unique(table["step"])

    def quantiles(name, bits, shares):
        return np.stack([np.quantile(
            table[name][(table["bits"] == bits) & (table["step"] == step)], shares)
            for step in steps], axis=-1)

    return StepCurves(
        label, steps, float(np.median(table["exact"][table["bits"] == 64])),
        quantiles("finite_difference", 32, 0.5),
        quantiles("finite_difference", 64, (0.25, 0.5, 0.75)), quantiles("smoothed", 64, 0.5))


LOOKS: dict[str, dict[str, Any]] = {
    "exact $\\Vert H\\Vert_F^2$ at the image": {"color": "#000000"},
    "Eq. 21, float64 (band: quartiles)": {"color": "#0072B2", "marker": "o", "markersize": 5},
    "Eq. 21, float32": {"color": "#D55E00", "marker": "x", "linestyle": (0, (4, 2))},
    "smoothed $\\Vert H_\\sigma\\Vert_F^2$, float64": {
        "color": "#009E73", "marker": "s", "markersize": 4.5, "linestyle": (0, (1, 1))}}
"""How each curve is drawn, by its name in the legend."""


def steps_figure(curves: Sequence[StepCurves]) -> figures.Figure:
    """Draws curvature against the step, a panel for each run, all with the same axes."""
    exact, double, single, smoothed = LOOKS.values()
    columns = min(3, len(curves))
    lines = -(-len(curves) // columns)
    figure = figures.new_figure(3.9 * columns + 0.6, 3.1 * lines + 0.9)
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for ax, curve in zip(axes.flat, curves, strict=False):
        ax.set_title(figures.wrap(curve.label), fontsize=11)
        ax.axhline(curve.exact, linewidth=1.4, **exact)
        ax.fill_between(curve.steps, curve.double[0], curve.double[2], color=double["color"],
                        alpha=0.2, linewidth=0)
        ax.plot(curve.steps, curve.double[1], **double)
        ax.plot(curve.steps, curve.single, **single)
        # An unbiased estimate may be negative, which this axis cannot show.
        ax.plot(curve.steps, np.where(curve.smoothed > 0, curve.smoothed, np.nan), **smoothed)
        ax.set_xscale("log")
        ax.set_yscale("log")
    for ax in axes.flat[len(curves):]:
        ax.set_visible(False)
    for ax in axes[-1]:
        ax.set_xlabel("step $t$, or noise $\\sigma$ [pixel values]")
    for ax in axes[:, 0]:
        ax.set_ylabel("median over the images [1/pixel$^4$]")
    figures.add_legend(figure, [Line2D([], [], label=label, **look)
                                for label, look in LOOKS.items()], columns=4)
    return figure


def numbers(run: Run) -> Iterator[Number]:
    """Yields the medians over the images."""
    result = run.result("steps")
    if not result:
        return
    curves = step_curves("", result)
    yield Number("median exact curvature", "float64", curves.exact, "1/pixel⁴")
    for what, name, values in (
            ("t = {:g}, float64", "median of Eq. 21", curves.double[1]),
            ("t = {:g}, float32", "median of Eq. 21", curves.single),
            ("σ = {:g}, float64", "median smoothed curvature", curves.smoothed)):
        for step, value in zip(curves.steps, values, strict=True):
            yield Number(name, what.format(step), float(value), "1/pixel⁴")


def _section(study: Study) -> Section | None:
    found = study.first_results("steps")
    if not found:
        return None
    curves = [step_curves(study.labels[row], result) for row, result in found.items()]
    steps = curves[0].steps
    shown = range(0, len(steps), 2)  # The figure has them all.
    columns = ("Method", "Exact", *(f"Eq. 21, t = {steps[i]:g}" for i in shown),
               f"float32, t = {steps[0]:g}", f"Smoothed, σ = {steps[-1]:g}")
    rows = [text_row(curve.label, map(significant, (
        curve.exact, *curve.double[1, shown], curve.single[0], curve.smoothed[-1])))
        for curve in curves]
    settings = [result["settings"] for result in found.values()]
    details = (f"Medians over {listed(one['num_images'] for one in settings)} test images of the "
               f"first seed; {listed(one['num_probes'] for one in settings)} random directions; "
               "float64 unless stated otherwise; in 1/pixel⁴.")
    ratios = np.concatenate([curve.double[1] / curve.exact for curve in curves])
    return Section(
        "steps", "How Eq. 21 depends on its step",
        "Over these steps and methods the median of Eq. 21 lies between "
        f"{significant(ratios.min())} and {significant(ratios.max())} times the exact one. On a "
        "smooth network both would agree as t goes to 0; on one with kinks Eq. 21 has no limit.",
        (Table("Eq. 21 against the step.", columns, tuple(rows), details,
               "How to read: along a row, only the step changes."),),
        (Picture("steps", steps_figure(curves), "Eq. 21 and the smoothed curvature against their "
                 "scale, beside the exact curvature.",
                 "Line charts of curvature against the step on logarithmic axes, a panel for each "
                 "method. The table holds the medians of Eq. 21.",
                 "How to read: the black line is what both would be on a quadratic loss. Eq. 21 "
                 "squares every jump of the gradient that a step crosses; the smoothed curvature "
                 "averages the jumps first, so that those to and fro cancel. Where float32 leaves "
                 "float64, rounding errors dominate. Medians of zero or less are left out."),
         ))


STEPS = Measurement(
    "steps", StepSettings(), _measure, section=_section, numbers=(numbers,),
    about="Study how Eq. 21 depends on its step, in float32 and float64.")
