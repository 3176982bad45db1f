"""Measures the curvature of finished runs' loss at test images."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from optax.losses import softmax_cross_entropy_with_integer_labels as _softmax_losses

from experiments import runs
from experiments.config import Evaluation
from experiments.evaluation import keep_result, make_test_split
from experiments.progress import progress
from experiments.training import TrainedRun, variables_of
from jaxrobust import _validate, curvature, evaluation
from jaxrobust.data.augment import to_float

PROBE_SEED = 0
STEP = 1e-2
"""t of Eq. 21, in pixel values of [0, 1]."""
BATCH_SIZE = 64


def measure_curvature(
    run: TrainedRun, settings: Evaluation, folder: pathlib.Path, label: str
) -> None:
    """Writes ``curvature.npz``, image by image, and its summary ``curvature.json``.

    For the first ``curvature_images`` test images: the softmax loss, whether the image is
    classified correctly, the squared Frobenius norm of the loss's Hessian (exact products,
    Hutchinson) and Eq. 21, each with its standard error; with respect to pixels in [0, 1]. Does
    nothing if they are there already, with the same settings.

    Raises:
      InputError: (a ValueError) if there is a measurement with other settings.
    """
    asked = {"num_images": settings.curvature_images, "num_probes": settings.curvature_probes,
             "step": STEP, "test_size": settings.test_size}
    path = folder / "curvature.json"
    if keep_result(path, asked):
        return
    split = make_test_split(run.dataset, settings.test_size)
    _validate.in_range("curvature_images", settings.curvature_images, 1, len(split.labels),
                       open_high=False)
    images = split.images[: settings.curvature_images]
    labels = split.labels[: settings.curvature_images]
    variables = variables_of(run.state)
    columns: dict[str, list[np.ndarray]] = {}
    batch_size = min(BATCH_SIZE, len(labels))
    with progress(f"{label}, curvature", -(-len(labels) // batch_size)) as shown:
        for rows in evaluation.padded_batches(len(labels), batch_size):
            measured = _measure(
                run.model, variables, to_float(jnp.asarray(images[rows])),
                jnp.asarray(labels[rows]), settings.curvature_probes)
            for name, values in measured.items():
                columns.setdefault(name, []).append(np.asarray(values))
            shown.advance(**{"squared Frobenius norm": float(
                np.median(measured["frobenius_squared"]))})
    table = {name: np.concatenate(parts)[: len(labels)] for name, parts in columns.items()}
    np.savez(folder / "curvature.npz", index=np.arange(len(labels)), label=labels, **table)
    runs.write_json(path, {
        **asked, "with_respect_to": "pixels in [0, 1]",
        "median": {name: float(np.median(table[name]))
                   for name in ("frobenius_squared", "finite_difference")},
        "settings": asked, "provenance": runs.provenance()})


def _measure(model, variables, images, labels, num_probes):
    """One batch's columns. A call a probe: XLA's convolutions in loops are slow on CPUs."""
    logits = evaluation.predict(model, variables, images).logits
    key = jax.random.key(PROBE_SEED)
    samples = [
        _probe(model, variables, images, labels, jax.random.fold_in(key, index))
        for index in range(num_probes)
    ]
    frobenius, difference = (
        curvature.mean_estimate(jnp.stack(values)) for values in zip(*samples, strict=True))
    return {
        "loss": _softmax_losses(logits, labels),
        "correct": jnp.argmax(logits, axis=-1) == labels,
        "frobenius_squared": frobenius.value,
        "frobenius_squared_standard_error": frobenius.standard_error,
        "finite_difference": difference.value,
        "finite_difference_standard_error": difference.standard_error,
    }


@functools.partial(jax.jit, static_argnames="model")
def _probe(model, variables, images, labels, key):
    """One sample of either curvature, with the same random direction."""
    def loss(images):
        return _softmax_losses(model.apply(variables, images, train=False).logits, labels)

    return (curvature.squared_frobenius(loss, images, key, num_probes=1).value,
            curvature.finite_difference_curvature(
                loss, images, key, step=STEP, num_probes=1).value)
