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
from jaxrobust.models.common import Outputs
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


@functools.partial(jax.jit, static_argnames="model")
def _correct(model, variables, images, labels, indices, perturb, key):
    return correct_predictions(
        lambda inputs: model.apply(variables, inputs, train=False).logits,
        to_float(images), labels, perturb=perturb, key=key, indices=indices)


def evaluate(
    model: nn.Module,
    variables: Any,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    perturb: Perturbation | None = None,
    key: jax.Array,
    num_draws: int = 1,
    batch_size: int = 500,
) -> Iterator[np.ndarray]:
    """Whether each image is classified correctly, for each draw of a perturbation.

    The last batch is padded and the padding dropped, so that every image counts once. The
    result does not depend on ``batch_size``.

    Args:
      model: a Flax Linen module that returns :class:`~jaxrobust.models.Outputs`.
      variables: its parameters and batch statistics.
      images: [N, H, W, channels], uint8, or floats in [0, 1].
      labels: [N] integers.
      perturb: the perturbation; None for the images as they are.
      key: a PRNG key; draw k perturbs image n with ``fold_in(fold_in(key, k), n)``.
      num_draws: independent draws.
      batch_size: images at a time.

    Yields:
      For each draw, [N] bool; its mean is the accuracy of the draw.

    Raises:
      InputError: (a ValueError) if shapes do not match, there is no image, or pixels are NaN
        or outside [0, 1].
    """
    _validate.images("images", images)
    size = _validate.shapes(images=(images, "N ..."), labels=(labels, "N"))["N"]
    _validate.in_range("number of images", size, 1)
    _validate.in_range("num_draws", num_draws, 1)
    _validate.in_range("batch_size", batch_size, 1)
    batch_size = min(batch_size, size)
    perturb = identity() if perturb is None else perturb
    for draw in range(num_draws):
        draw_key = jax.random.fold_in(key, draw)
        correct = [
            _correct(model, variables, images[rows], labels[rows], rows, perturb, draw_key)
            for rows in padded_batches(size, batch_size)
        ]
        yield np.concatenate(correct)[:size]


def padded_batches(size: int, batch_size: int) -> Iterator[np.ndarray]:
    """Positions 0 .. size - 1 in batches of one size; the last repeats the last position."""
    for first in range(0, size, batch_size):
        yield np.minimum(np.arange(first, first + batch_size), size - 1)


def map_batches(function: Callable[..., Any], *arrays: np.ndarray, batch_size: int) -> Any:
    """What ``function`` gives for the rows of ``arrays``, a batch at a time.

    Args:
      function: takes ``batch_size`` rows of each array; returns a pytree of arrays [B, ...].
      *arrays: [N, ...] each.
      batch_size: rows at a time; the last batch repeats the last row, and drops it again.

    Returns:
      The pytree, of NumPy arrays [N, ...].
    """
    size = _validate.shapes(**{f"array {i}": (array, "N ...") for i, array in enumerate(arrays)})[
        "N"]
    parts = [jax.tree.map(np.asarray, function(*(array[rows] for array in arrays)))
             for rows in padded_batches(size, min(batch_size, size))]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:size], *parts)
