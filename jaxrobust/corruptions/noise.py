"""Noise, of an image [H, W, channels] float32 in [0, 1]; what leaves [0, 1] is clipped later."""

import jax
import jax.numpy as jnp

from jaxrobust._random import draw_flat


def gaussian_noise(key: jax.Array, image: jax.Array, std: float) -> jax.Array:
    """Adds Gaussian noise."""
    return image + std * draw_flat(jax.random.normal, key, image.shape)


def shot_noise(key: jax.Array, image: jax.Array, photons: float) -> jax.Array:
    """Draws Poisson counts of photons, of which a white pixel has ``photons`` on average."""
    # jax.random.poisson takes keys of this kind alone.
    key = jax.random.wrap_key_data(
        jax.random.bits(key, (2,), jnp.uint32), impl="threefry2x32")
    # Along one axis, as draw_flat does.
    counts = jax.random.poisson(key, image.ravel() * photons, dtype=jnp.int32)
    return counts.reshape(image.shape).astype(jnp.float32) / photons


def impulse_noise(key: jax.Array, image: jax.Array, share: float) -> jax.Array:
    """Sets a share of all values to 0 or 1, which are equally likely."""
    draws = draw_flat(jax.random.uniform, key, image.shape)
    return jnp.where(draws < share / 2, 0.0, jnp.where(draws < share, 1.0, image))


def speckle_noise(key: jax.Array, image: jax.Array, std: float) -> jax.Array:
    """Adds Gaussian noise in proportion to the pixel."""
    return image * (1 + std * draw_flat(jax.random.normal, key, image.shape))
