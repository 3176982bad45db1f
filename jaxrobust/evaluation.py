"""Accuracy under perturbations, image by image and draw by draw."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust import _validate
from jaxrobust.curvature import LogitsFn
from jaxrobust.data.augment import to_float
from jaxrobust.data.sources import StoredImages
from jaxrobust.models.common import Outputs
from jaxrobust.parallel import Layout, make_layout, map_examples, place_batch, replicate
from jaxrobust.perturbations import Perturbation, identity, per_example


def correct_predictions(
    logits_fn: LogitsFn,
    images: jax.Array,
    labels: jax.Array,
    *,
    perturb: Perturbation,
    key: jax.Array,
    indices: jax.Array,
) -> jax.Array:
    r"""Whether each image, perturbed, is classified as its label.

    .. math:: 1\{\arg\max_i z_i(perturb(x_n)) = y_n\}

    Args:
      logits_fn: the classifier.
      images: [B, H, W, channels] in [0, 1].
      labels: [B] integers.
      perturb: the perturbation.
      key: a PRNG key; image n is perturbed with ``fold_in(key, indices[n])``.
      indices: [B] integers, the images' positions in their data set.

    Returns:
      [B] bool.

    Raises:
      InputError: (a ValueError) if the shapes do not match.
    """
    _validate.shapes(images=(images, "B ..."), labels=(labels, "B"), indices=(indices, "B"))
    return jnp.argmax(logits_fn(per_example(perturb, key, images, indices)), axis=-1) == labels


@functools.partial(jax.jit, static_argnames="model")
def predict(model: nn.Module, variables: Any, images: jax.Array) -> Outputs:
    """The outputs, in evaluation mode, for images [B, H, W, channels], uint8 or in [0, 1]."""
    return model.apply(variables, to_float(images), train=False)


@functools.partial(jax.jit, static_argnames=("model", "layout"))
def _correct(model, layout, variables, perturb, key, *rows):
    def share(shared, rows):
        variables, perturb, key = shared
        images, labels, indices = rows
        return correct_predictions(
            lambda inputs: model.apply(variables, inputs, train=False).logits,
            to_float(images), labels, perturb=perturb, key=key, indices=indices)

    return map_examples(layout, share)((variables, perturb, key), rows)


def evaluate(
    model: nn.Module,
    variables: Any,
    images: np.ndarray | StoredImages,
    labels: np.ndarray,
    *,
    perturb: Perturbation | None = None,
    key: jax.Array,
    num_draws: int = 1,
    batch_size: int = 500,
    layout: Layout | None = None,
) -> Iterator[np.ndarray]:
    """Whether each image is classified correctly, for each draw of a perturbation.

    The last batch is padded and the padding dropped, so that every image counts once. The
    result does not depend on ``batch_size`` or the number of devices.

    Args:
      model: a Flax Linen module that returns :class:`~jaxrobust.models.Outputs`.
      variables: its parameters and batch statistics.
      images: [N, H, W, channels], uint8, or floats in [0, 1].
      labels: [N] integers.
      perturb: the perturbation; None for the images as they are.
      key: a PRNG key; draw k perturbs image n with ``fold_in(fold_in(key, k), n)``.
      num_draws: independent draws.
      batch_size: images at a time.
      layout: the devices, which share each batch; one if none is given.

    Yields:
      For each draw, [N] bool; its mean is the accuracy of the draw.

    Raises:
      InputError: (a ValueError) if shapes do not match, there is no image, or pixels are NaN
        or outside [0, 1].
    """
    if not isinstance(images, StoredImages):  # These check what they read.
        _validate.images("images", images)
    size = _validate.shapes(images=(images, "N ..."), labels=(labels, "N"))["N"]
    _validate.in_range("number of images", size, 1)
    _validate.in_range("num_draws", num_draws, 1)
    _validate.in_range("batch_size", batch_size, 1)
    layout = make_layout("jit") if layout is None else layout.for_examples()
    perturb = identity() if perturb is None else perturb
    variables = replicate(layout, variables)
    for draw in range(num_draws):
        draw_key = replicate(layout, jax.random.fold_in(key, draw))
        yield map_batches(
            functools.partial(_correct, model, layout, variables, perturb, draw_key),
            images, labels, np.arange(size), batch_size=batch_size, layout=layout)


def padded_batches(size: int, batch_size: int) -> Iterator[np.ndarray]:
    """Positions 0 .. size - 1 in batches of one size; the last repeats the last position."""
    for first in range(0, size, batch_size):
        yield np.minimum(np.arange(first, first + batch_size), size - 1)


def map_batches(
    function: Callable[..., Any], *arrays: np.ndarray, batch_size: int,
    layout: Layout | None = None,
) -> Any:
    """What ``function`` gives for the rows of ``arrays``, a batch at a time.

    Args:
      function: takes ``batch_size`` rows of each array; returns a pytree of arrays [B, ...],
        whole in every process.
      *arrays: [N, ...] each.
      batch_size: rows at a time; the last batch repeats the last row, and drops it again.
      layout: the devices that share the rows, of which each process then reads its own, and
        by whose number ``batch_size`` is rounded up; None if the function sees to it.

    Returns:
      The pytree, of NumPy arrays [N, ...].
    """
    size = _validate.shapes(**{f"array {i}": (array, "N ...") for i, array in enumerate(arrays)})[
        "N"]
    batch_size = min(batch_size, size)
    if layout is not None:
        batch_size = -(-batch_size // layout.num_devices) * layout.num_devices

    def read(rows):
        if layout is None:
            return tuple(array[rows] for array in arrays)
        mine = rows[layout.rows_of(batch_size)]
        return place_batch(layout, tuple(array[mine] for array in arrays), batch_size)

    parts = [jax.tree.map(np.asarray, function(*read(rows)))
             for rows in padded_batches(size, batch_size)]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:size], *parts)
