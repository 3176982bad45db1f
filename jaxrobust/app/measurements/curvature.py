"""Measures the curvature of the loss in input space at test images: the paper's Fig. 10."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from jaxrobust import _validate, curvature, evaluation, losses, parallel, probes
from jaxrobust.app import files
from jaxrobust.app.classifiers import (
    ForeignModel,
    once_differentiable,
    orders_of,
    require_gradient,
)
from jaxrobust.app.config import CurvatureConfig, InputError
from jaxrobust.app.measurements.accuracy import first_test_images
from jaxrobust.app.measurements.estimates import Estimate, bootstrapped, estimate, outputs_of
from jaxrobust.app.measurements.runner import Measured, Measurement, Work, settings_asked
from jaxrobust.app.progress import progress
from jaxrobust.app.report.figures import GRID, Style, boxes, new_figure, row_styles, wrap
from jaxrobust.app.report.frame import Number, frame, values_of
from jaxrobust.app.report.page import Picture, Section, Table, listed, over_runs, text_row
from jaxrobust.app.study.read import Run, Study
from jaxrobust.app.trainer import TrainedRun
from jaxrobust.images import LogitsFn, predicted_classes, to_float
from jaxrobust.models.common import normalise
from jaxrobust.parallel import make_layout

PROBE_SEED = 0
"""Seeds all random directions."""

PIECEWISE_LINEAR_GAP = 1e-2
"""Median of :func:`jaxrobust.curvature.gauss_newton_gap` below which the network is taken to be
made of affine pieces. Rounding in float32 is below 1e-3 for most images; GELU gives about 1."""

PROBES_AT_ONCE = 4
"""Random directions side by side: compiles faster than one, at the same speed."""

CURVATURES = {
    "frobenius_squared": "Exact Hessian",
    "finite_difference": "Finite differences",
    "smoothed_frobenius_squared": "Noise-averaged loss",
}
"""Columns of the curvature file; different quantities on a ReLU network."""


def _with_smoothing(run: TrainedRun | ForeignModel, settings: CurvatureConfig) -> CurvatureConfig:
    """Fills in the standard deviation of the run's training noise where none is given."""
    if settings.smoothing is not None or isinstance(run, ForeignModel):
        return settings
    scale = max(run.model.std) if settings.inputs == "normalised" else 1.0
    return dataclasses.replace(settings, smoothing=run.config.noise_std / scale)


def _asked(run: TrainedRun | ForeignModel, settings: CurvatureConfig, folder: pathlib.Path) -> dict:
    if isinstance(run, ForeignModel) and settings.inputs != "pixels":
        raise InputError(f"Expected inputs={settings.inputs!r} only with runs: how {run.name} "
                         "normalises images is not known here.")
    require_gradient(run, "curvature")
    asked = settings_asked(run, _with_smoothing(run, settings), folder)
    del asked["batch_size"]  # It changes no value.
    return asked


def _measure(run: TrainedRun | ForeignModel, settings: CurvatureConfig, work: Work) -> Measured:
    """Measures the curvature at the first ``num_images`` test images, a column for each quantity.

    The columns: the softmax loss and its squared gradient, whether the image is classified
    correctly, the squared Frobenius norm, trace and spectral norm of the Hessian, all C eigenvalues
    of its Gauss-Newton part, Eq. 21 and the smoothed curvature, each with its standard error (0
    where it is exact). Norms are exact on networks of affine pieces, as the gap between the Hessian
    and its Gauss-Newton part tells; on others they are estimated with exact products. Models that
    were not trained here lack the smoothed curvature without ``smoothing``, and the Hessian's norms
    and trace where JAX cannot differentiate them twice.

    Raises:
      InputError: (a ValueError) if logits are not finite.
    """
    settings = _with_smoothing(run, settings)
    images, labels = first_test_images(run, settings)
    count = len(labels)
    _validate.finite("logits of test images", outputs_of(run.logits_fn, images, run.layout))
    logits_fn, twice, why = run.logits_fn, True, None
    if isinstance(run, ForeignModel):
        order, why = orders_of(run)
        twice = order == 2
        if not twice:
            logits_fn = once_differentiable(logits_fn)
            files.say(f"No exact Hessian of {run.name}, only what first derivatives tell: {why}.")
    scale = None
    if settings.inputs != "pixels" and not isinstance(run, ForeignModel):
        scale = run.model.mean, run.model.std
    layout = run.layout.for_examples()
    # A number that the devices divide; it changes no value.
    size = -(-min(settings.batch_size, count) // layout.num_devices) * layout.num_devices
    linear = work.facts.get("piecewise_linear")
    with progress(f"{work.label}, curvature", count, done=work.rows) as shown:
        done = work.rows
        for left in evaluation.padded_batches(count - done, size):
            rows = done + left
            mine = rows[layout.rows_of(size)]
            batch = (layout, logits_fn, *parallel.place_batch(
                layout, (images[mine], labels[mine], mine), size))
            if linear is None and twice:
                gap = float(np.median(_gap(*batch)))
                linear = gap < PIECEWISE_LINEAR_GAP
                work.facts = {"piecewise_linear": linear, "gauss_newton_gap": gap}
            kept = min(size, count - rows[0])
            measured = _measure_batch(*batch, settings=settings, scale=scale, parts=(
                (_columns,) if linear or not twice else (_columns, _norm, _trace, _largest)))
            if linear:
                measured |= _of_spectrum(measured)
            table = {name: values[:kept] for name, values in measured.items()}
            work.add({"index": rows[:kept], "label": labels[rows[:kept]], **table})
            shown.advance(kept, **{words[0].lower() + words[1:]: float(np.median(table[name]))
                                   for name, words in CURVATURES.items() if name in table})
    table = work.table
    whole = len(run.dataset.test.labels)
    return Measured({
        **work.asked, **work.facts,
        "subset": f"the first {count:,} of " + (
            f"{whole:,} test images" if settings.test_size in (None, whole) else
            f"{settings.test_size:,} test images drawn at random by class with seed 0"),
        "with_respect_to": {
            "pixels": "pixels in [0, 1]", "normalised": "normalised images"}[settings.inputs],
        "median": {name: float(np.median(table[name])) for name in CURVATURES if name in table},
    } | ({} if twice else {"without_hessian": why}), table)


def losses_of(model, variables, labels):
    """Returns the loss and the logits as functions of images, for the curvature functions."""
    logits_fn = evaluation.logits_fn_of(model, variables)
    return loss_of(logits_fn, labels), logits_fn


def loss_of(logits_fn: LogitsFn, labels: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """Returns the softmax loss [B] as a function of images."""
    return lambda images: losses.softmax_cross_entropy(logits_fn(images), labels)


def require_piecewise_linear(run: TrainedRun, images: np.ndarray, labels: np.ndarray,
                             what: str) -> None:
    """Checks, with these images, that the exact spectrum is that of the run's Hessian.

    Raises:
      InputError: (a ValueError) if the network is not made of affine pieces.
    """
    gap = float(np.median(_gap(make_layout("jit"), run.logits_fn, images, labels,
                               np.arange(len(labels)))))
    if gap >= PIECEWISE_LINEAR_GAP:
        raise InputError(
            f"Expected a network of affine pieces for {what}, which needs the exact spectrum, got "
            f"model={run.config.model!r}: its Hessian is off by {gap:.2g}. The command curvature "
            "measures it by exact products.")


@functools.partial(jax.jit, static_argnames="layout")
def _gap(layout, logits_fn, *rows):
    def share(logits_fn, rows):
        images, labels, indices = rows
        return curvature.gauss_newton_gap(
            loss_of(logits_fn, labels), logits_fn, to_float(images), jax.random.key(PROBE_SEED),
            indices=indices)

    return parallel.map_examples(layout, share)(logits_fn, rows)


def _measure_batch(layout, logits_fn, *rows, settings: CurvatureConfig, scale, parts):
    """Measures the columns of one batch.

    Estimates by products are a program each: XLA's threads on CPUs may wait for each other forever
    where several of them, with their factorisations, are parts of one.
    """
    table: dict[str, np.ndarray] = {}
    for part in parts:
        table |= {name: np.asarray(values) for name, values in _part(
            part, layout, logits_fn, *rows, settings=settings, scale=scale).items()}
    return table


_EIGENVALUE = "gauss_newton_eigenvalue_"


def _of_spectrum(table):
    """The norms and the trace of a Hessian that its Gauss-Newton part equals."""
    spectrum = np.stack([values for name, values in table.items()
                         if name.startswith(_EIGENVALUE)], axis=1)
    exact = np.zeros_like(spectrum[:, 0])
    return _with_errors({
        "frobenius_squared": (np.sum(np.square(spectrum), axis=1), exact),
        "trace": (np.sum(spectrum, axis=1), exact),
        "spectral_norm": (np.max(np.abs(spectrum), axis=1), exact)})


@functools.partial(jax.jit, static_argnames=("part", "layout", "settings", "scale"))
def _part(part, layout, logits_fn, *rows, settings: CurvatureConfig, scale):
    return parallel.map_examples(
        layout, functools.partial(part, scale, settings))(logits_fn, rows)


def _inputs(scale, logits_fn, rows):
    """Returns loss, logits, images in the units asked for, and what all estimates are given.

    ``scale`` is the mean and the standard deviation of normalised images, or None.
    """
    images, labels, indices = rows
    images, loss = to_float(images), loss_of(logits_fn, labels)
    if scale is not None:
        loss, logits_fn = (curvature.normalised_inputs(function, *scale)
                           for function in (loss, logits_fn))
        mean, std = scale
        images = normalise(images, mean, std, images.dtype)
    return loss, logits_fn, images, {"key": jax.random.key(PROBE_SEED), "indices": indices}


def _columns(scale, settings, logits_fn, rows):
    loss, logits, images, shared = _inputs(scale, logits_fn, rows)
    gradient = jax.grad(lambda inputs: jnp.sum(loss(inputs)))(images)
    spectrum = curvature.piecewise_linear_spectrum(logits, images)
    found = {"finite_difference": curvature.finite_difference_curvature(
        loss, images, step=settings.step, num_probes=settings.num_probes,
        chunk_size=PROBES_AT_ONCE, **shared)}
    if settings.smoothing is not None:
        smoothed = curvature.smoothed_curvature(
            loss, images, sigma=settings.smoothing, num_draws=settings.smoothing_draws,
            chunk_size=PROBES_AT_ONCE, **shared)
        found |= {"smoothed_frobenius_squared": smoothed.squared_frobenius,
                  "smoothed_trace": smoothed.trace}
    return {
        "loss": loss(images), "correct": predicted_classes(logits(images)) == rows[1],
        "gradient_squared": probes.squared_norm(gradient), **_with_errors(found),
        **{f"{_EIGENVALUE}{rank}": spectrum[:, -rank]
           for rank in range(1, spectrum.shape[1] + 1)}}


def _norm(scale, settings, logits_fn, rows):
    loss, _, images, shared = _inputs(scale, logits_fn, rows)
    return _with_errors({"frobenius_squared": curvature.leave_one_out_squared_frobenius(
        loss, images, num_probes=settings.num_probes, **shared)})


def _trace(scale, settings, logits_fn, rows):
    loss, _, images, shared = _inputs(scale, logits_fn, rows)
    return _with_errors({"trace": curvature.hessian_trace(
        loss, images, num_probes=settings.num_probes, **shared)})


def _largest(scale, settings, logits_fn, rows):
    loss, _, images, shared = _inputs(scale, logits_fn, rows)
    ritz = curvature.ritz_values(loss, images, num_products=settings.num_probes, **shared)
    at = jnp.argmax(jnp.abs(ritz.value), axis=1, keepdims=True)
    return _with_errors({"spectral_norm": [
        jnp.take_along_axis(jnp.abs(values), at, axis=1)[:, 0]
        for values in (ritz.value, ritz.residual)]})


def _with_errors(estimates):
    return {column: values for name, (value, error) in estimates.items()
            for column, values in ((name, value), (f"{name}_standard_error", error))}


# --- The report ------------------------------------------------------------------------------

MEDIAN, MEAN, HIDDEN = "median curvature", "mean curvature", "curvatures of zero or less"


def numbers(run: Run) -> Iterator[Number]:
    """Yields medians and means over the images; the medians alone where the arrays are not kept."""
    for key, name in CURVATURES.items():
        if run.curvature and key in run.curvature:
            values = run.curvature[key]
            finite = values[np.isfinite(values)]
            # The median as in the JSON file, in the precision of the values.
            median, mean = ((np.median(finite), np.mean(finite, dtype=np.float64))
                            if len(finite) else (math.nan, math.nan))
            yield Number(MEDIAN, name, float(median), "1/pixel⁴")
            yield Number(MEAN, name, float(mean), "1/pixel⁴")
            yield Number(HIDDEN, name, values.size - int((finite > 0).sum()), "images")
        elif run.medians and key in run.medians:
            yield Number(MEDIAN, name, run.medians[key], "1/pixel⁴")


def estimates(run: Run) -> Iterator[Estimate]:
    """Yields the medians over the images, without those whose curvature is beyond float32."""
    for key, name in CURVATURES.items() if run.curvature else ():
        if key in run.curvature:
            values = run.curvature[key]
            values = values[np.isfinite(values)]
            yield estimate(MEDIAN, name, bootstrapped(
                lambda rows, values=values: np.median(values[rows]), len(values), least=-np.inf),
                "1/pixel⁴")


def _section(study: Study) -> Section | None:
    if not _curvatures(study):
        return None
    return Section(
        "curvature", "Curvature of the loss in input space",
        "How fast the gradient of the loss turns when the image changes a little. The paper "
        "argues that robustness to noise and low curvature go together.",
        (curvature_table(study),), (curvature_picture(study),))


def _curvatures(study: Study) -> dict[str, list[dict]]:
    found = {row: [run.curvature for run in runs if run.curvature]
             for row, runs in study.runs.items()}
    return {row: results for row, results in found.items() if results}


def measures_of(measures: dict[str, Any], results: Iterable[dict]) -> dict[str, Any]:
    """Returns those of some measures of curvature, by key, that all results have."""
    results = list(results)
    return {key: measure for key, measure in measures.items()
            if all(key in result for result in results)}


def curvature_table(study: Study) -> Table:
    """Tabulates medians and means of the curvatures over the images, by row."""
    found, values = _curvatures(study), values_of(frame(study, numbers))
    facts = [result for results in found.values() for result in results]
    names = measures_of(CURVATURES, facts).values()
    rows = [text_row(study.labels[row], (
        *(over_runs(values[row, what, name]) for name in names for what in (MEDIAN, MEAN)),
        " / ".join(f"{sum(values[row, HIDDEN, name]):g}" for name in names))) for row in found]
    without = "".join(sorted({
        f" No exact Hessian of {study.labels[row]}: {one['without_hessian']}."
        for row, results in found.items() for one in results if "without_hessian" in one}))
    return Table(
        "Curvature of the softmax loss in input space.",
        ("Method", *(head for name in names for head in (f"{name}: median", "mean")),
         "Zero or less"), tuple(rows),
        f"All of the {listed(one['num_images'] for one in facts)} test images of each run, not "
        f"only the lowest 90 %.{without}",
        "How to read: lower is flatter. Unit: 1/pixel⁴ (the loss is in nats), with pixel values "
        "in [0, 1]. Median or mean over the images; with several seeds the mean over the seeds "
        "[lowest–highest seed]. Last column: number of values that a logarithmic axis cannot "
        f"show (zero, negative or not finite), {' / '.join(names).lower()}.")


def lowest_share(values: np.ndarray) -> np.ndarray:
    """Returns the lowest 90 % of the finite values [n], sorted, as in the paper's Fig. 10."""
    finite = np.sort(values[np.isfinite(values)])
    return finite[:math.ceil(9 * len(finite) / 10)]


def curvature_figure(samples: Sequence[tuple[str, Style, dict[str, np.ndarray]]],
                     measures: dict[str, str]) -> Figure:
    """Draws box plots, on a logarithmic axis, of the lowest 90 % of each row's curvatures.

    A sample is a row's label, its style and its values [n] by measure; there is a panel for each of
    ``measures``, by key and title.
    """
    figure = new_figure(3 + 4 * len(measures), 1.9 + 0.6 * len(samples))
    axes = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for ax, (name, words) in zip(axes, measures.items(), strict=True):
        boxes(ax, [(place, lowest_share(values[name]), style)
                   for place, (_, style, values) in enumerate(samples)], width=0.55)
        ax.set_title(words)
        ax.set_xlabel("[1/pixel$^4$]")
        ax.tick_params(axis="y", left=ax is axes[0])
        ax.set_axisbelow(True)
        ax.grid(axis="x", **GRID)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(samples)), [wrap(label) for label, *_ in samples])
    axes[0].invert_yaxis()
    return figure


def curvature_picture(study: Study) -> Picture:
    """Draws box plots of the curvatures."""
    found, styles = _curvatures(study), row_styles(study.labels)
    facts = [result for results in found.values() for result in results]
    measures = measures_of(CURVATURES, facts)
    # The lowest 90 % of each run, so that one seed's outliers do not displace another's images.
    samples = [(study.labels[row], styles[row], {
        key: np.concatenate([lowest_share(result[key]) for result in results])
        for key in measures}) for row, results in found.items()]
    shown = np.concatenate([values for *_, by_key in samples for values in by_key.values()])
    step = listed(f"{one['step']:g}" for one in facts)
    titles, explained = {}, []
    if "frobenius_squared" in measures:
        titles["frobenius_squared"] = "$\\Vert H\\Vert_F^2$ of the exact Hessian"
        explained.append("the squared Frobenius norm of the Hessian at the image itself")
    titles["finite_difference"] = f"$\\Lambda$ of Eq. 21 at $t$ = {step}"
    explained.append(
        "the paper’s Eq. 21, which also counts the kinks of the ReLUs that its steps cross and may "
        "differ from the Hessian's norm by orders of magnitude")
    if "smoothed_frobenius_squared" in measures:
        sigma = listed(f"{one['smoothing']:g}" for one in facts)
        titles["smoothed_frobenius_squared"] = (
            f"$\\Vert H_\\sigma\\Vert_F^2$ of the loss\naveraged over noise, $\\sigma$ = {sigma}")
        explained.append("the squared Frobenius norm of the Hessian of the loss averaged over "
                         "noise, in which jumps of the gradient to and fro cancel")
    return Picture(
        "curvature", curvature_figure(samples, titles),
        "Curvature of the softmax loss at clean test images: the lowest 90 % of each run, as in "
        "the paper’s Fig. 10.",
        f"{len(measures)} panels of box plots on a logarithmic axis, one box for each of "
        f"{len(samples)} methods. The curvature table holds medians and means.",
        "How to read: further left is flatter. Box: quartiles and median; whiskers: 5th to 95th "
        f"percentile. {(~(shown > 0)).sum()} of the {shown.size} values are zero or negative; they "
        "lie beyond the left edge, but count for the boxes. The panels show different quantities, "
        f"which do not compare, from left to right: {'; '.join(explained)}. "
        f"Derivatives with respect to {listed(one['with_respect_to'] for one in facts)}.")


CURVATURE = Measurement(
    "curvature", CurvatureConfig(), _measure, _asked, section=_section, numbers=(numbers,),
    estimates=estimates, suite="curvature", limited="num_images", all_by_none=False,
    parallel=True, gradients=True,
    about="""Measure the curvature of finished runs' loss at test images.

    Resumes interrupted measurements.""")
