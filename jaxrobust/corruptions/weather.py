"""Snow, frost, fog and spatter, of an image [H, W, channels] float32 in [0, 1]."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.corruptions import linear
from jaxrobust.corruptions.blur import moved

_LUMA = np.array([[[0.299, 0.587, 0.114]]], np.float32)  # Of ITU-R BT.601.
_WATER = np.array([[[175, 238, 238]]], np.float32) / 255  # Pale turquoise.
_MUD = np.array([[[63, 42, 20]]], np.float32) / 255
_ICE = np.array([[[0.88, 0.96, 1.0]]], np.float32)
_CRYSTALS = 14


def _grey(image: jax.Array) -> jax.Array:
    """[H, W, 1]."""
    return image if image.shape[-1] == 1 else jnp.sum(image * _LUMA, axis=-1, keepdims=True)


def _colour_for(image: jax.Array, colour: np.ndarray) -> np.ndarray:
    """A colour [1, 1, 3], or its grey [1, 1, 1] for a grey image."""
    return colour if image.shape[-1] == 3 else np.sum(colour * _LUMA, axis=-1, keepdims=True)


def snow(
    key: jax.Array, image: jax.Array, mean: float, std: float, zoom: float, threshold: float,
    radius: float, motion: float, weight: float,
) -> jax.Array:
    """Whitens the image and adds two layers of flakes, falling within 45 degrees of the vertical.

    Flakes are what Gaussian noise has above the threshold, as in the generators.
    """
    flakes_key, angle_key = jax.random.split(key)
    noise = mean + std * jax.random.normal(flakes_key, (*image.shape[:2], 1), jnp.float32)
    flakes = linear.clipped_zoom(noise, zoom)
    flakes = jnp.clip(jnp.where(flakes < threshold, 0.0, flakes), 0, 1)
    angle = jax.random.uniform(
        angle_key, (), jnp.float32, minval=-0.75 * math.pi, maxval=-0.25 * math.pi)
    falling = moved(flakes, radius, motion, angle)
    whitened = jnp.maximum(image, _grey(image) * 1.5 + 0.5)
    return weight * image + (1 - weight) * whitened + falling + falling[::-1, ::-1]


def frost_texture(key: jax.Array, height: int, width: int) -> jax.Array:
    """Draws ice on a window, [height, width] in [0, 1]: crystals that grow from random seeds until
    they meet, with needles in all directions, over fractal clouds."""
    cloud_key, seed_key = jax.random.split(key)
    side = min(height, width)
    clouds = plasma(cloud_key, height, width, 1.5)
    y, x, *phases = jax.random.uniform(seed_key, (6, _CRYSTALS, 1, 1), jnp.float32)
    rows = jnp.arange(height, dtype=jnp.float32)[:, None] / side
    columns = jnp.arange(width, dtype=jnp.float32)[None] / side
    y, x = y * (height / side), x * (width / side)
    distances = jnp.sqrt((rows[None] - y) ** 2 + (columns[None] - x) ** 2) + 0.1 * phases[0]
    own = jnp.min(distances, axis=0)
    others = jnp.min(jnp.where(distances > own[None], distances, jnp.inf), axis=0)
    crystal = jnp.argmin(distances, axis=0)
    y, x, first, second, third = (part[crystal, 0, 0] for part in (y, x, *phases[1:]))
    first, second, third = 2 * math.pi * first, 2 * math.pi * second, 2 * math.pi * third
    angle = jnp.arctan2(rows - y, columns - x) + 1.5 * (clouds - 0.5)
    needles = (jnp.cos(11 * angle + first) + jnp.cos(29 * angle + second + 8 * own)
               + jnp.cos(53 * angle + third)) / 3
    border = jnp.exp(-((others - own) / 0.02) ** 2)
    ice = jnp.clip(needles, 0, 1) + 0.5 * border
    return jnp.clip(0.08 + 0.5 * clouds + 0.6 * ice, 0, 1)


def frost(key: jax.Array, image: jax.Array, weight: float, frosted: float) -> jax.Array:
    """Adds :func:`frost_texture`, which is procedural: the generators' photographs are not ours."""
    texture = frost_texture(key, *image.shape[:2])
    return weight * image + frosted * texture[..., None] * _colour_for(image, _ICE)


def plasma(key: jax.Array, height: int, width: int, decay: float) -> jax.Array:
    """Draws a plasma fractal, [height, width] in [0, 1], by the diamond-square algorithm.

    It is cropped from a torus whose side is the next power of 2.

    Args:
      key: a PRNG key.
      height: in pixels.
      width: likewise.
      decay: the noise of a scale is ``decay ** 2`` times that of the next smaller one.
    """
    size = 1 << (max(height, width, 2) - 1).bit_length()
    heights, amplitude = jnp.zeros((1, 1), jnp.float32), 1.0
    draws = jax.random.uniform(key, (size * size,), jnp.float32, minval=-1, maxval=1)
    while len(heights) < size:
        points = heights.size
        noise = amplitude * draws[points:4 * points].reshape(3, *heights.shape)
        right, below = jnp.roll(heights, -1, 1), jnp.roll(heights, -1, 0)
        centres = (heights + right + below + jnp.roll(right, -1, 0)) / 4 + noise[0]
        above = (heights + right + centres + jnp.roll(centres, 1, 0)) / 4 + noise[1]
        left = (heights + below + centres + jnp.roll(centres, 1, 1)) / 4 + noise[2]
        heights = jnp.stack([jnp.stack([heights, above], axis=2),
                             jnp.stack([left, centres], axis=2)], axis=1).reshape(
                                 2 * heights.shape[0], 2 * heights.shape[1])
        amplitude /= decay ** 2
    heights = heights - jnp.min(heights)
    return (heights / jnp.max(heights))[:height, :width]


def fog(key: jax.Array, image: jax.Array, amount: float, decay: float) -> jax.Array:
    """Adds clouds, a plasma fractal, and scales the brightest possible pixel to the brightest."""
    height, width, _ = image.shape
    clouds = plasma(key, height, width, decay)[..., None]
    brightest = jnp.max(image)
    return (image + amount * clouds) * brightest / (brightest + amount)


def spatter(
    key: jax.Array, image: jax.Array, mean: float, std: float, smoothing: float, threshold: float,
    strength: float, mud: int,
) -> jax.Array:
    """Adds water, or covers with mud, where smoothed Gaussian noise is above the threshold.

    A drop is shaded by the distance from its border. The border is that of the thresholded noise
    and the distance exact, where the generators take OpenCV's edge detector and its approximation.
    On grey images the liquid is grey.
    """
    noise = mean + std * jax.random.normal(key, (*image.shape[:2], 1), jnp.float32)
    liquid = linear.gaussian_filter(noise, smoothing)
    inside = liquid >= threshold
    if mud:
        cover = linear.gaussian_filter(inside.astype(jnp.float32), strength)
        cover = jnp.where(cover < 0.8, 0, cover)
        return image * (1 - cover) + cover * _colour_for(image, _MUD)
    water = jnp.floor(255 * jnp.where(inside, liquid, 0)) * _shading(inside)
    most = jnp.max(water)
    water = water / jnp.where(most > 0, most, 1)
    return image + strength * water * _colour_for(image, _WATER)


_FURTHEST = 20  # Pixels: distances from a border are counted so far.
_EMBOSS = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
_MEAN = np.full((3, 3), 1 / 9)


def _shading(inside: jax.Array) -> jax.Array:
    """Returns the light on drops, [H, W, 1] in [0, 255], in whole steps, as OpenCV's of bytes."""
    padded = jnp.pad(inside[..., 0], 1, mode="edge")
    interior = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    distances = distance(inside[..., 0] & ~interior)[..., None]
    steps = jnp.floor(linear.correlate(distances, _MEAN) + 1e-4)
    light = linear.correlate(_equalised(steps), _EMBOSS)
    return jnp.round(linear.correlate(jnp.clip(light, 0, 255), _MEAN))


def distance(marked: jax.Array) -> jax.Array:
    """Returns the distances [H, W] float32 of pixels from the nearest marked one, up to 20."""
    height, width = marked.shape
    columns = jnp.arange(width, dtype=jnp.float32)[None]
    far = jnp.float32(2 * _FURTHEST + max(height, width))
    before = jax.lax.cummax(jnp.where(marked, columns, -far), axis=1)
    after = jax.lax.cummin(jnp.where(marked, columns, 2 * far), axis=1, reverse=True)
    in_row = jnp.minimum(jnp.minimum(columns - before, after - columns), far) ** 2
    reach = min(_FURTHEST, height - 1)
    padded = jnp.pad(in_row, ((reach, reach), (0, 0)), constant_values=far ** 2)
    nearest = functools.reduce(jnp.minimum, (
        padded[reach + shift:reach + shift + height] + np.float32(shift ** 2)
        for shift in range(-reach, reach + 1)))
    return jnp.minimum(jnp.sqrt(nearest), _FURTHEST)


def _equalised(steps: jax.Array) -> jax.Array:
    """Steps 0, 1, ..., 20 as their ranks in [0, 255]: an equalised histogram."""
    levels = jnp.arange(_FURTHEST + 1, dtype=jnp.float32)[None, None]
    below = jnp.sum((steps <= levels).astype(jnp.float32), axis=(0, 1))  # [21]
    first = jnp.min(jnp.where(below > 0, below, jnp.inf))
    rest = steps.size - first
    ranks = jnp.round((below - first) * (255 / jnp.maximum(rest, 1)))
    # All pixels alike stay as they are.
    return jnp.where(rest > 0, ranks[steps.astype(jnp.int32)], steps)
