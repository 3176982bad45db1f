"""Brightness, contrast, saturation, pixels and warps, of an image [H, W, channels] float32."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.corruptions import linear


def brightness(key: jax.Array, image: jax.Array, added: float) -> jax.Array:
    """Adds ``added`` to V of HSV, the largest channel, up to 1; hue and saturation stay."""
    del key
    value = jnp.max(image, axis=-1, keepdims=True)
    brighter = jnp.minimum(value + added, 1)
    return jnp.where(value > 0, image * (brighter / jnp.where(value > 0, value, 1)), brighter)


def contrast(key: jax.Array, image: jax.Array, factor: float) -> jax.Array:
    """Multiplies differences from the mean of each channel with ``factor``."""
    del key
    means = jnp.mean(image, axis=(0, 1), keepdims=True)
    return (image - means) * factor + means


def saturate(key: jax.Array, image: jax.Array, factor: float, added: float) -> jax.Array:
    """Multiplies S of HSV with ``factor`` and adds ``added``; grey has the hue of red, 0."""
    del key
    value = jnp.max(image, axis=-1, keepdims=True)
    spread = value - jnp.min(image, axis=-1, keepdims=True)
    saturation = jnp.where(value > 0, spread / jnp.where(value > 0, value, 1), 0)
    # How far each channel is below the largest, from 0 to 1 for the smallest.
    below = jnp.where(spread > 0, (value - image) / jnp.where(spread > 0, spread, 1),
                      np.array([[[0, 1, 1]]], np.float32))
    return value * (1 - jnp.clip(saturation * factor + added, 0, 1) * below)


def pixelate(key: jax.Array, image: jax.Array, factor: float) -> jax.Array:
    """Scales down by ``factor`` with a box filter, and up again by the nearest pixel."""
    del key
    rows, columns = (_pixelating(size, factor) for size in image.shape[:2])
    return linear.separable(rows, columns, image)


def _pixelating(size: int, factor: float) -> np.ndarray:
    fewer = max(int(size * factor), 1)
    return linear.box_matrix(fewer, size) @ linear.box_matrix(size, fewer)


def sample(
    image: jax.Array, y: jax.Array, x: jax.Array, border: linear.Border[jax.Array]
) -> jax.Array:
    """Reads the image at places [H, W] in pixels, bilinear, its ``border`` extended."""
    height, width, channels = image.shape
    pixels = image.reshape(-1, channels)
    top, left = jnp.floor(y), jnp.floor(x)
    down, right = (y - top)[..., None], (x - left)[..., None]
    rows, columns = top.astype(jnp.int32), left.astype(jnp.int32)

    def at(row: jax.Array, column: jax.Array) -> jax.Array:
        return pixels.at[border(row, height) * width + border(column, width)].get(
            mode="promise_in_bounds")

    above = at(rows, columns) * (1 - right) + at(rows, columns + 1) * right
    below = at(rows + 1, columns) * (1 - right) + at(rows + 1, columns + 1) * right
    return above * (1 - down) + below * down


def elastic_places(
    key: jax.Array, height: int, width: int, alpha: float, std: float, affine: float
) -> tuple[jax.Array, jax.Array]:
    """Draws the warps of :func:`elastic_transform`; parameters are relative to the shorter side.

    Returns:
      The inverse affine map, [2, 3] float32, of places (x, y, 1); and the displacements, [2, H, W]
      float32 in pixels, of y and x.
    """
    side = min(height, width)
    affine_key, y_key, x_key = jax.random.split(key, 3)
    middle, third = np.array([width // 2, height // 2], np.float32), side // 3
    corners = middle + third * np.array([[1, 1], [1, -1], [-1, -1]], np.float32)
    shifted = corners + jax.random.uniform(
        affine_key, (3, 2), jnp.float32, minval=-affine * side, maxval=affine * side)
    # The map takes ``shifted`` back to ``corners``, in coordinates along two of the sides.
    (a, c), (b, d) = shifted[1] - shifted[0], shifted[2] - shifted[0]
    determinant = a * d - b * c
    # Three points on a line, which chance draws next to never, are mapped to one, as in OpenCV.
    scale = jnp.where(determinant == 0, 0, 1 / jnp.where(determinant == 0, 1, determinant))
    inverse = scale * jnp.stack([jnp.stack([d, -b]), jnp.stack([-c, a])])
    sides = np.stack([corners[1] - corners[0], corners[2] - corners[0]], axis=1)
    matrix = jnp.matmul(sides, inverse, precision=jax.lax.Precision.HIGHEST)
    offset = corners[0] - jnp.matmul(matrix, shifted[0], precision=jax.lax.Precision.HIGHEST)
    displacements = jnp.stack([
        side * alpha * linear.gaussian_filter(
            jax.random.uniform(own, (height, width, 1), jnp.float32, minval=-1, maxval=1),
            side * std, truncate=3.0, border=linear.reflect)[..., 0]
        for own in (y_key, x_key)])
    return jnp.concatenate([matrix, offset[:, None]], axis=1), displacements


def elastic_transform(
    key: jax.Array, image: jax.Array, alpha: float, std: float, affine: float
) -> jax.Array:
    """Warps by a random affine map, then by smooth random displacements, both bilinear."""
    height, width, _ = image.shape
    matrix, (dy, dx) = elastic_places(key, height, width, alpha, std, affine)
    y = jnp.arange(height, dtype=jnp.float32)[:, None]
    x = jnp.arange(width, dtype=jnp.float32)[None]
    mapped = sample(image, matrix[1, 0] * x + matrix[1, 1] * y + matrix[1, 2],
                    matrix[0, 0] * x + matrix[0, 1] * y + matrix[0, 2], linear.mirror)
    return sample(mapped, y + dy, x + dx, linear.reflect)
