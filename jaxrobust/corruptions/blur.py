"""Blurs, of an image [H, W, channels] float32 in [0, 1]."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.corruptions import linear

_FEW_TAPS = 100  # Up to which shifted images are quicker than a convolution.


def gaussian_blur(key: jax.Array, image: jax.Array, std: float) -> jax.Array:
    """Blurs with a Gaussian, cut off at 4 standard deviations."""
    del key
    return linear.gaussian_filter(image, std)


def defocus_kernel(radius: float, smoothing: float) -> np.ndarray:
    """Returns a disk whose edge a small Gaussian smooths, [k, k] float64 for the least odd k."""
    reach = max(8, math.ceil(radius))
    offsets = np.arange(-reach, reach + 1)
    disk = (offsets[:, None] ** 2 + offsets ** 2 <= radius ** 2).astype(float)
    smooth = linear.gaussian_matrix(len(offsets), smoothing, radius=1 if radius <= 8 else 2,
                                    border=linear.mirror)
    kernel = smooth @ (disk / disk.sum()) @ smooth.T
    kernel[kernel < 1e-9] = 0  # Which no float32 sees.
    used = np.flatnonzero(kernel.any(axis=0))
    return kernel[used[0]:used[-1] + 1, used[0]:used[-1] + 1]


def defocus_blur(key: jax.Array, image: jax.Array, radius: float, smoothing: float) -> jax.Array:
    """Blurs with a disk, as a lens out of focus does."""
    del key
    kernel = defocus_kernel(radius, smoothing)
    return (linear.correlate if kernel.size <= _FEW_TAPS else linear.convolve)(image, kernel)


def shuffle_sources(shifts: jax.Array, largest: int) -> jax.Array:
    """Returns which pixel each one is a copy of after a shuffle in place.

    The pixels are visited from the last to the first, but for a border, and each becomes a copy of
    the one at its shift, which may be a copy itself by then.

    Args:
      shifts: [2, H, W] int32, in y and in x, from ``-largest`` to ``largest - 1``.
      largest: shift, >= 1, in pixels.

    Returns:
      [H W] int32, indices of the raveled image.
    """
    _, height, width = shifts.shape
    places = jnp.arange(height * width, dtype=jnp.int32).reshape(height, width)
    rows, columns = places // width, places % width
    visited = ((rows > largest) & (rows <= height - largest)
               & (columns > largest) & (columns <= width - largest))
    sources = jnp.where(visited, places + shifts[0] * width + shifts[1], places).ravel()
    if largest == 1:  # All shifts go to pixels that come later: these are no copies yet.
        return sources
    # A pixel that was visited before is a copy of its own source: each follows them to the last
    # one, twice as far in every round.
    following = jnp.maximum(sources, places.ravel())
    for _ in range((height * width - 1).bit_length()):
        following = following[following]
    return sources[following]


def glass_blur(
    key: jax.Array, image: jax.Array, std: float, largest: int, iterations: int
) -> jax.Array:
    """Shuffles pixels over short distances between two Gaussian blurs, as frosted glass does.

    As in the generators, where NumPy's views make copies out of what is written as a swap.
    """
    height, width, channels = image.shape
    pixels = linear.gaussian_filter(image, std).reshape(-1, channels)
    for own in jax.random.split(key, iterations):
        shifts = jax.random.randint(own, (2, height, width), -largest, largest, jnp.int32)
        pixels = pixels.at[shuffle_sources(shifts, largest)].get(mode="promise_in_bounds")
    return linear.gaussian_filter(pixels.reshape(image.shape), std)


def moved(image: jax.Array, radius: float, std: float, angle: jax.Array) -> jax.Array:
    """Blurs along one direction with half a Gaussian at the nearest pixels, as ImageMagick does.

    Args:
      image: [H, W, channels], whose border is repeated.
      radius: where the Gaussian is cut off, in steps of half a pixel.
      std: of the Gaussian, in pixels.
      angle: [] in radians; 0 is from right to left, and pi / 2 upwards.
    """
    height, width, channels = image.shape
    taps = np.arange(2 * math.ceil(radius) + 1)
    weights = np.exp(-0.5 * (taps / std) ** 2)
    weights /= weights.sum()
    taps = taps[weights > 1e-9]  # The others no float32 sees.
    reach = int(taps[-1])
    padded = jnp.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    direction = jnp.stack([jnp.sin(angle), jnp.cos(angle)])

    def add(total: jax.Array, step: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        tap, weight = step
        first = reach + jnp.ceil(tap * direction - 0.5).astype(jnp.int32)
        part = jax.lax.dynamic_slice(
            padded, (first[0], first[1], jnp.int32(0)), (height, width, channels))
        return total + weight * part, None

    steps = (jnp.asarray(taps, jnp.float32), jnp.asarray(weights[:len(taps)], jnp.float32))
    return jax.lax.scan(add, jnp.zeros_like(image), steps)[0]


def motion_blur(key: jax.Array, image: jax.Array, radius: float, std: float) -> jax.Array:
    """Blurs along a direction within 45 degrees of the horizontal."""
    angle = jax.random.uniform(key, (), jnp.float32, minval=-math.pi / 4, maxval=math.pi / 4)
    return moved(image, radius, std, angle)


def zoom_blur(key: jax.Array, image: jax.Array, end: float, step: float) -> jax.Array:
    """Averages the image and its zooms from 1 to ``end``."""
    del key
    zooms = np.arange(1, end, step)
    rows, columns = (jnp.asarray(np.stack([linear.zoom_matrix(size, zoom) for zoom in zooms]),
                                 jnp.float32) for size in image.shape[:2])
    highest = jax.lax.Precision.HIGHEST
    zoomed = jnp.einsum("zih,hwc->zwic", rows, image, precision=highest)
    total = jnp.einsum("zjw,zwic->ijc", columns, zoomed, precision=highest)
    return (image + total) / (len(zooms) + 1)
