"""Linear maps of rows and columns as matrices, which suit every device and every batch."""

import functools
import operator
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Indices = TypeVar("Indices", np.ndarray, jax.Array)

Border = Callable[[Indices, int], Indices]
"""``(indices, size) -> indices`` in [0, size): the pixels that continue an image beyond itself."""


def nearest(index: np.ndarray, size: int) -> np.ndarray:
    """Indices of ``a a a | a b c d | d d d``."""
    return np.clip(index, 0, size - 1)


def reflect(index: Indices, size: int) -> Indices:
    """Indices of ``c b a | a b c d | d c b``; NumPy or JAX."""
    return (2 * size - 1 - abs(2 * (index % (2 * size)) - 2 * size + 1)) // 2


def mirror(index: Indices, size: int) -> Indices:
    """Indices of ``d c b | a b c d | c b a``; NumPy or JAX."""
    if size == 1:
        return index * 0
    return abs((index + size - 1) % (2 * size - 2) - size + 1)


def gaussian_matrix(
    size: int, std: float, *, radius: int, border: Border[np.ndarray]
) -> np.ndarray:
    """[size, size] float64, which blurs ``size`` pixels with a Gaussian cut off at ``radius``."""
    if radius == 0:
        return np.eye(size)
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / std) ** 2)
    matrix = np.zeros((size, size))
    rows = np.arange(size)[:, None]
    np.add.at(matrix, (rows, border(rows + offsets, size)), weights / weights.sum())
    return matrix


def zoom_matrix(size: int, factor: float) -> np.ndarray:
    """[size, size] float64, which enlarges the middle of ``size`` pixels, linearly, to the corners
    of its first and last pixel, and crops what is more than ``size``."""
    crop = int(np.ceil(size / factor))
    enlarged = round(crop * factor)
    places = np.arange(enlarged) * ((crop - 1) / max(enlarged - 1, 1))
    before = np.minimum(places.astype(int), crop - 1)
    after = np.minimum(before + 1, crop - 1)
    matrix = np.zeros((enlarged, size))
    rows, top = np.arange(enlarged), (size - crop) // 2
    np.add.at(matrix, (rows, top + before), 1 - (places - before))
    np.add.at(matrix, (rows, top + after), places - before)
    first = (enlarged - size) // 2
    return matrix[first:first + size]


def box_matrix(size: int, resized: int) -> np.ndarray:
    """[resized, size] float64: the mean of the pixels whose centres are in each new one, of which
    an enlargement takes the nearest; Pillow's ``BOX``."""
    scale = size / resized
    centres = (np.arange(resized)[:, None] + 0.5) * scale
    apart = (np.arange(size) + 0.5 - centres) / max(scale, 1)
    inside = (apart > -0.5) & (apart <= 0.5)
    return inside / inside.sum(axis=1, keepdims=True)


def separable(rows: np.ndarray, columns: np.ndarray, image: jax.Array) -> jax.Array:
    """The image [H, W, channels] with its columns mapped by ``rows`` [I, H] and its rows by
    ``columns`` [J, W]: [I, J, channels]. In float32 on every device."""
    half = jnp.einsum("ih,hwc->iwc", jnp.asarray(rows, image.dtype), image,
                      precision=jax.lax.Precision.HIGHEST)
    return jnp.einsum("jw,iwc->ijc", jnp.asarray(columns, image.dtype), half,
                      precision=jax.lax.Precision.HIGHEST)


def gaussian_filter(
    image: jax.Array, std: float, *, truncate: float = 4.0, border: Border[np.ndarray] = nearest
) -> jax.Array:
    """A Gaussian blur of an image [H, W, channels], cut off at ``truncate`` standard deviations."""
    radius = int(truncate * std + 0.5)
    rows, columns = (gaussian_matrix(size, std, radius=radius, border=border)
                     for size in image.shape[:2])
    return separable(rows, columns, image)


def clipped_zoom(image: jax.Array, factor: float) -> jax.Array:
    """An image [H, W, channels], enlarged about its middle and cropped to its size."""
    rows, columns = (zoom_matrix(size, factor) for size in image.shape[:2])
    return separable(rows, columns, image)


def correlate(image: jax.Array, kernel: np.ndarray) -> jax.Array:
    """The cross-correlation of an image [H, W, channels] with ``kernel``, of odd sides, the
    borders mirrored: each tap one shifted image, for kernels of few taps that are not 0."""
    height, width, _ = image.shape
    rows, columns = (np.asarray(kernel.shape) - 1) // 2
    padded = _mirrored(image, rows, columns)
    return functools.reduce(operator.add, (
        padded[i:i + height, j:j + width] * np.float32(kernel[i, j])
        for i, j in zip(*np.nonzero(kernel), strict=True)))


def _mirrored(image: jax.Array, rows: int, columns: int) -> jax.Array:
    height, width, _ = image.shape
    return image[mirror(np.arange(-rows, height + rows), height)][
        :, mirror(np.arange(-columns, width + columns), width)]


def convolve(image: jax.Array, kernel: np.ndarray) -> jax.Array:
    """As :func:`correlate` for kernels of any size that are symmetric."""
    padded = _mirrored(image, *((np.asarray(kernel.shape) - 1) // 2))
    channels_first = jnp.moveaxis(padded, 2, 0)[:, None]
    blurred = jax.lax.conv(channels_first, jnp.asarray(kernel[None, None], image.dtype), (1, 1),
                           "VALID", precision=jax.lax.Precision.HIGHEST)
    return jnp.moveaxis(blurred[:, 0], 0, 2)
