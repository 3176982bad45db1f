"""Measures the curvature of finished runs' loss at test images."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust import _validate, curvature, evaluation, losses, parallel, probes
from jaxrobust.app import files, provenance, run_folder
from jaxrobust.app.config import CurvatureConfig, InputError
from jaxrobust.app.doubt import outputs_of
from jaxrobust.app.measurements.accuracy import keep_result, make_test_split
from jaxrobust.app.progress import progress
from jaxrobust.app.trainer import TrainedRun, variables_of
from jaxrobust.images import to_float
from jaxrobust.models.common import normalise
from jaxrobust.parallel import make_layout

PROBE_SEED = 0
"""Of all random directions."""

PIECEWISE_LINEAR_GAP = 1e-2
"""Median of :func:`jaxrobust.curvature.gauss_newton_gap` below which the network is taken to be
made of affine pieces. Rounding in float32 is below 1e-3 for most images; GELU gives about 1."""

PROBES_AT_ONCE = 4
"""Random directions side by side: compiles faster than one, at the same speed."""


def measure_curvature(
    run: TrainedRun, settings: CurvatureConfig, folder: pathlib.Path, label: str, *,
    test_size: int | None = None, name: str | None = None,
) -> None:
    """Writes ``curvature.npz``, a column for each quantity, and its summary ``curvature.json``;
    both with ``-NAME`` if there is a name.

    For the first ``num_images`` test images: the softmax loss and its squared gradient, whether
    the image is classified correctly, the squared Frobenius norm, trace and spectral norm of the
    Hessian, all C eigenvalues of its Gauss-Newton part, Eq. 21 and the smoothed curvature, each
    with its standard error (0 where it is exact). On networks of affine pieces, which the gap
    between Hessian and Gauss-Newton part tells, the norms are exact; on others they are
    estimated with exact products. Goes on where it was broken off; does nothing if all is there,
    with the same settings.

    Raises:
      InputError: (a ValueError) if there is a measurement with other settings, or logits are not
        finite.
    """
    if settings.smoothing is None:
        scale = max(run.model.std) if settings.inputs == "normalised" else 1.0
        settings = dataclasses.replace(settings, smoothing=run.config.noise_std / scale)
    asked = {name: value for name, value in dataclasses.asdict(settings).items()
             if name != "batch_size"} | {"test_size": test_size}
    path = run_folder.facts_path(folder, "curvature", name)
    if keep_result(path, asked):
        return
    split = make_test_split(run.dataset, test_size)
    count = settings.num_images
    _validate.in_range("num_images", count, 1, len(split.labels), open_high=False)
    images, labels = split.images[:count], split.labels[:count]
    _validate.finite("logits of test images", outputs_of(run, images)[0])
    layout = run.layout.for_examples()
    # A number that the devices divide; it changes no value.
    size = -(-min(settings.batch_size, count) // layout.num_devices) * layout.num_devices
    partial = _Partial(path.with_suffix(".partial.npz"), asked)
    linear = partial.facts.get("piecewise_linear")
    with progress(f"{label}, curvature", count, done=partial.done) as shown:
        done, variables = partial.done, variables_of(run.state)
        for left in evaluation.padded_batches(count - done, size):
            rows = done + left
            mine = rows[layout.rows_of(size)]
            batch = (run.model, layout, variables, *parallel.place_batch(
                layout, (images[mine], labels[mine], mine), size))
            if linear is None:
                gap = float(np.median(_gap(*batch)))
                linear = gap < PIECEWISE_LINEAR_GAP
                partial.facts = {"piecewise_linear": linear, "gauss_newton_gap": gap}
            kept = min(size, count - rows[0])
            measured = _measure(*batch, settings=settings, linear=linear)
            table = {name: values[:kept] for name, values in measured.items()}
            partial.add({"index": rows[:kept], "label": labels[rows[:kept]], **table})
            shown.advance(kept, **{"squared Frobenius norm": float(
                np.median(table["frobenius_squared"]))})
    table = partial.table
    files.write_arrays(path.with_suffix(".npz"), table)
    files.write_json(path, {
        **asked, **partial.facts, "with_respect_to": {
            "pixels": "pixels in [0, 1]", "normalised": "normalised images"}[settings.inputs],
        "median": {name: float(np.median(table[name])) for name in (
            "frobenius_squared", "finite_difference", "smoothed_frobenius_squared")},
        "settings": asked, "provenance": provenance.describe()})
    if files.is_writer():
        partial.path.unlink()


class _Partial:
    """The table so far, in a file that a kill leaves whole."""

    def __init__(self, path: pathlib.Path, settings: dict):
        self.path, self._settings = path, json.dumps(settings, sort_keys=True)
        self.table: dict[str, np.ndarray] = {}
        self.facts: dict = {}
        if not path.is_file():
            return
        with np.load(path) as arrays:
            table = dict(arrays)
        settings, facts = (str(table.pop(name)) for name in ("settings", "facts"))
        if settings != self._settings:
            raise InputError(f"{path} was begun with other settings: {settings}. "
                             "Keep both with `curvature --name NAME`, or remove that file.")
        self.table, self.facts = table, json.loads(facts)

    @property
    def done(self) -> int:
        """Images measured."""
        return len(self.table.get("index", ()))

    def add(self, table: dict[str, np.ndarray]) -> None:
        """Adds rows, and writes the file."""
        self.table = {name: np.concatenate([self.table[name], values]) if self.table else values
                      for name, values in table.items()}
        files.write_arrays(self.path, {
            **self.table, "settings": self._settings, "facts": json.dumps(self.facts)})


def losses_of(model, variables, labels):
    """The loss and the logits, as functions of images, that the curvature functions take."""
    def logits(images):
        return model.apply(variables, images, train=False).logits

    return lambda images: losses.softmax_cross_entropy(logits(images), labels), logits


def require_piecewise_linear(run: TrainedRun, images: np.ndarray, labels: np.ndarray,
                             what: str) -> None:
    """Checks, with these images, that the exact spectrum is that of the run's Hessian.

    Raises:
      InputError: (a ValueError) if the network is not made of affine pieces.
    """
    gap = float(np.median(_gap(run.model, make_layout("jit"), variables_of(run.state),
                               images, labels, np.arange(len(labels)))))
    if gap >= PIECEWISE_LINEAR_GAP:
        raise InputError(
            f"Expected a network of affine pieces for {what}, which needs the exact spectrum, got "
            f"model={run.config.model!r}: its Hessian is off by {gap:.2g}. The command curvature "
            "measures it by exact products.")


@functools.partial(jax.jit, static_argnames=("model", "layout"))
def _gap(model, layout, variables, *rows):
    def share(variables, rows):
        images, labels, indices = rows
        loss, logits = losses_of(model, variables, labels)
        return curvature.gauss_newton_gap(
            loss, logits, to_float(images), jax.random.key(PROBE_SEED), indices=indices)

    return parallel.map_examples(layout, share)(variables, rows)


def _measure(model, layout, variables, *rows, settings: CurvatureConfig, linear: bool):
    """One batch's columns.

    Estimates by products are a program each: XLA's threads on CPUs may wait for each other forever
    where several of them, with their factorisations, are parts of one.
    """
    parts = (_columns,) if linear else (_columns, _norm, _trace, _largest)
    table = {}
    for part in parts:
        table |= {name: np.asarray(values) for name, values in _part(
            part, model, layout, variables, *rows, settings=settings).items()}
    if linear:
        spectrum = np.stack([values for name, values in table.items()
                             if name.startswith(_EIGENVALUE)], axis=1)
        exact = np.zeros_like(spectrum[:, 0])
        table |= _with_errors({
            "frobenius_squared": (np.sum(np.square(spectrum), axis=1), exact),
            "trace": (np.sum(spectrum, axis=1), exact),
            "spectral_norm": (np.max(np.abs(spectrum), axis=1), exact)})
    return table


_EIGENVALUE = "gauss_newton_eigenvalue_"


@functools.partial(jax.jit, static_argnames=("part", "model", "layout", "settings"))
def _part(part, model, layout, variables, *rows, settings: CurvatureConfig):
    return parallel.map_examples(
        layout, functools.partial(part, model, settings))(variables, rows)


def _inputs(model, settings, variables, rows):
    """Loss, logits and images in the units asked for, and the arguments that estimates share."""
    images, labels, indices = rows
    images = to_float(images)
    loss, logits = losses_of(model, variables, labels)
    if settings.inputs == "normalised":
        loss, logits = (curvature.normalised_inputs(function, model.mean, model.std)
                        for function in (loss, logits))
        images = normalise(images, model.mean, model.std, images.dtype)
    return loss, logits, images, {"key": jax.random.key(PROBE_SEED), "indices": indices}


def _columns(model, settings, variables, rows):
    loss, logits, images, shared = _inputs(model, settings, variables, rows)
    gradient = jax.grad(lambda inputs: jnp.sum(loss(inputs)))(images)
    spectrum = curvature.piecewise_linear_spectrum(logits, images)
    smoothed = curvature.smoothed_curvature(
        loss, images, sigma=settings.smoothing, num_draws=settings.smoothing_draws,
        chunk_size=PROBES_AT_ONCE, **shared)
    return {
        "loss": loss(images), "correct": jnp.argmax(logits(images), axis=1) == rows[1],
        "gradient_squared": probes.squared_norm(gradient),
        **_with_errors({
            "finite_difference": curvature.finite_difference_curvature(
                loss, images, step=settings.step, num_probes=settings.num_probes,
                chunk_size=PROBES_AT_ONCE, **shared),
            "smoothed_frobenius_squared": smoothed.squared_frobenius,
            "smoothed_trace": smoothed.trace}),
        **{f"{_EIGENVALUE}{rank}": spectrum[:, -rank]
           for rank in range(1, spectrum.shape[1] + 1)}}


def _norm(model, settings, variables, rows):
    loss, _, images, shared = _inputs(model, settings, variables, rows)
    return _with_errors({"frobenius_squared": curvature.leave_one_out_squared_frobenius(
        loss, images, num_probes=settings.num_probes, **shared)})


def _trace(model, settings, variables, rows):
    loss, _, images, shared = _inputs(model, settings, variables, rows)
    return _with_errors({"trace": curvature.hessian_trace(
        loss, images, num_probes=settings.num_probes, **shared)})


def _largest(model, settings, variables, rows):
    loss, _, images, shared = _inputs(model, settings, variables, rows)
    ritz = curvature.ritz_values(loss, images, num_products=settings.num_probes, **shared)
    at = jnp.argmax(jnp.abs(ritz.value), axis=1, keepdims=True)
    return _with_errors({"spectral_norm": [
        jnp.take_along_axis(jnp.abs(values), at, axis=1)[:, 0]
        for values in (ritz.value, ritz.residual)]})


def _with_errors(estimates):
    """Columns of estimates, each with its standard error."""
    return {column: values for name, (value, error) in estimates.items()
            for column, values in ((name, value), (f"{name}_standard_error", error))}
