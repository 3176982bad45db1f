"""Perturbations of images: pure functions ``(key, images) -> images``, pixels in [0, 1]."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrobust import _validate

Perturbation = Callable[[jax.Array, jax.Array], jax.Array]
"""``(key, images [B, H, W, channels]) -> images``. Those made here are pytrees with their
strength as a leaf, so that a jitted function takes them as an argument and is compiled once
for all strengths."""


def identity() -> Perturbation:
    """The images as they are."""
    return jax.tree_util.Partial(_identity)


def gaussian(std: float, *, clip: bool = True) -> Perturbation:
    r"""Additive Gaussian noise, :math:`x + \varepsilon`, :math:`\varepsilon \sim N(0, std^2 I)`.

    Args:
      std: standard deviation in pixel values of [0, 1], >= 0; 0 gives the image itself.
      clip: whether the result is clipped back to [0, 1], as the authors' release does.

    Raises:
      InputError: (a ValueError) if std < 0.
    """
    _validate.in_range("std", std, 0)
    return jax.tree_util.Partial(_clipped_gaussian if clip else _gaussian, std)


def uniform(amplitude: float, *, clip: bool = True) -> Perturbation:
    """Additive noise, uniform in [-amplitude, amplitude], in pixel values of [0, 1].

    Args:
      amplitude: >= 0; 0 gives the image itself.
      clip: whether the result is clipped back to [0, 1], as the authors' release does.

    Raises:
      InputError: (a ValueError) if amplitude < 0.
    """
    _validate.in_range("amplitude", amplitude, 0)
    return jax.tree_util.Partial(_clipped_uniform if clip else _uniform, amplitude)


def _identity(key, images):
    del key
    return images


def _gaussian(std, key, images):
    return images + std * jax.random.normal(key, images.shape, images.dtype)


def _uniform(amplitude, key, images):
    return images + amplitude * jax.random.uniform(
        key, images.shape, images.dtype, minval=-1, maxval=1)


def _clipped_gaussian(std, key, images):
    return jnp.clip(_gaussian(std, key, images), 0, 1)


def _clipped_uniform(amplitude, key, images):
    return jnp.clip(_uniform(amplitude, key, images), 0, 1)


def per_example(
    perturb: Perturbation, key: jax.Array, images: jax.Array, indices: jax.Array
) -> jax.Array:
    """Perturbs each image with a key of its own, ``fold_in(key, index)``.

    What happens to an image then depends on ``key`` and its index alone, not on the batch
    it comes in or the device it is on.

    Args:
      perturb: the perturbation.
      key: a PRNG key.
      images: [B, ...] in [0, 1].
      indices: [B] integers that name the images, such as their positions in the data set.

    Raises:
      InputError: (a ValueError) if the shapes do not match.
    """
    _validate.shapes(images=(images, "B ..."), indices=(indices, "B"))

    def one(index, image):
        return perturb(jax.random.fold_in(key, index), image[None])[0]

    return jax.vmap(one)(indices, images)
