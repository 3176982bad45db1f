"""Images, batches of them, functions of them and outputs of networks.

An image is [H, W, channels]: uint8 as stored, floats in [0, 1] as networks take it.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust import _validate

Loss = Callable[[jax.Array], jax.Array]
"""``images [B, ...] -> [B]``, row i depending on image i alone."""

LogitsFn = Callable[[jax.Array], jax.Array]
"""``images [B, ...] -> logits [B, C]``, row i depending on image i alone."""

FeaturesFn = Callable[[jax.Array], jax.Array]
"""``images [B, ...] -> features [B, d]``, row i depending on image i alone."""


Images = TypeVar("Images", jax.Array, np.ndarray)


class Batch(NamedTuple):
    """Both views of a batch of images, and their labels."""

    clean: jax.Array  # shape=[B, H, W, channels], dtype=float32; pixels in [0, 1]
    noisy: jax.Array  # shape=[B, H, W, channels], dtype=float32; pixels in [0, 1]
    labels: jax.Array  # shape=[B], dtype=int32; outside [0, C) for examples that do not count


class Outputs(NamedTuple):
    """What a model returns for a batch of images."""

    logits: jax.Array  # shape=[B, C], dtype=float32 or wider; z of Eq. 1
    features: jax.Array  # shape=[B, d]; q, the input of the softmax layer
    blocks: dict[str, jax.Array]  # each [B, H, W, channels]; outputs of the named blocks


def to_float(images: Images) -> Images:
    """Converts uint8 images to floats in [0, 1]; returns others as they are."""
    return images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images


def predicted_classes(logits: jax.Array | np.ndarray) -> jax.Array:
    r"""Computes the class of each row of logits.

    .. math:: \arg\max_i z_i

    Args:
      logits: z [..., C].

    Returns:
      [...], int32; the first of several largest, and -1, no class, where a logit is not finite:
      ``argmax`` takes NaN for the largest.

    >>> predicted_classes(jnp.array([[0.0, 2.0], [1.0, 1.0], [jnp.nan, 0.0]])).tolist()
    [1, 0, -1]
    """
    finite = jnp.isfinite(logits).all(axis=-1)
    return jnp.where(finite, jnp.argmax(logits, axis=-1).astype(jnp.int32), -1)


_OUTPUTS = {"loss": ("B",), "features_fn": ("B", "d"), "logits_fn": ("B", "C")}


def check_images(x: jax.Array, indices: jax.Array | None = None,
                 **functions: Callable[[jax.Array], jax.Array]) -> None:
    """Checks images, the numbers that name them, and what functions of the images return.

    Args:
      x: [B, ...], floats, B >= 1.
      indices: [B] integers, or None.
      **functions: ``loss``, ``features_fn`` or ``logits_fn``; they are traced, not run.

    Raises:
      InputError: (a ValueError) if one does not fit.
    """
    if not isinstance(x, (jax.Array, np.ndarray)) or not jnp.issubdtype(x.dtype, jnp.floating):
        what = getattr(x, "dtype", type(x).__name__)
        raise _validate.InputError(f"Expected x to be an array of floats, got {what}.")
    if x.ndim == 0 or x.size == 0:
        raise _validate.InputError(
            f"Expected x of shape [B, ...] with at least one image and pixel, got {x.shape}.")
    batch = len(x)
    if indices is not None and not (
            isinstance(indices, (jax.Array, np.ndarray)) and indices.shape == (batch,)
            and jnp.issubdtype(indices.dtype, jnp.integer)):
        got = (f"{indices.dtype}{list(indices.shape)}" if hasattr(indices, "dtype")
               else type(indices).__name__)
        raise _validate.InputError(
            f"Expected indices of shape [B] with B={batch}, integers, got {got}.")
    for name, function in functions.items():
        spec = _OUTPUTS[name]
        _validate.function(name, function)
        output = jax.eval_shape(function, x)
        shape = getattr(output, "shape", type(output).__name__)
        if not isinstance(shape, tuple) or len(shape) != len(spec) or shape[0] != batch:
            raise _validate.InputError(
                f"Expected {name} to return [{', '.join(spec)}] with B={batch}, a row for each "
                f"image, got {shape}.")
