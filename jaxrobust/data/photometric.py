"""Colour jitter, as torchvision's ColorJitter, in floats: nothing is rounded to uint8 in between.

Images are [H, W, channels] in [0, 1], with 1 or 3 channels. The functions raise InputError (a
ValueError) for other shapes and for negative strengths.
"""

import jax
import jax.numpy as jnp

from jaxrobust import _validate

_RED, _GREEN, _BLUE = 0.2989, 0.587, 0.114

ADJUSTMENTS = ("brightness", "contrast", "saturation")


def adjust(image: jax.Array, factor: jax.typing.ArrayLike, name: str) -> jax.Array:
    r"""Changes one property of an image.

    .. math:: \mathrm{clip}(f x + (1 - f) y, 0, 1)

    blends it with another one, y: black for the brightness, the mean of the grey image
    0.2989 R + 0.587 G + 0.114 B for the contrast, and the grey image for the saturation.

    Args:
      image: x.
      factor: f >= 0; 1 gives the image itself.
      name: one of :data:`ADJUSTMENTS`.
    """
    return jnp.moveaxis(_blended(_planes(image), factor, ADJUSTMENTS.index(name)), 0, -1)


def random_factors(
    key: jax.Array, *, brightness: float, contrast: float, saturation: float
) -> tuple[jax.Array, jax.Array]:
    """Draws what :func:`color_jitter` applies, for strengths >= 0.

    Returns:
      A random permutation, [3] integers: which of :data:`ADJUSTMENTS` comes first, second and
      third. And the factors, [3] float32, of :data:`ADJUSTMENTS` in their own order.
    """
    strengths = brightness, contrast, saturation
    for name, strength in zip(ADJUSTMENTS, strengths, strict=True):
        _validate.in_range(name, strength, 0)
    order_key, factors_key = jax.random.split(key)
    strengths = jnp.array(strengths, jnp.float32)
    return jax.random.permutation(order_key, len(ADJUSTMENTS)), jax.random.uniform(
        factors_key, strengths.shape, jnp.float32,
        minval=jnp.maximum(1 - strengths, 0), maxval=1 + strengths)


def color_jitter(
    key: jax.Array, image: jax.Array, *,
    brightness: float = 0.3, contrast: float = 0.3, saturation: float = 0.3,
) -> jax.Array:
    """Adjusts brightness, contrast and saturation by random factors, in random order.

    This is torchvision's ``ColorJitter(brightness, contrast, saturation)``: each factor is uniform
    in [max(0, 1 - strength), 1 + strength], all six orders are equally likely, and the contrast is
    adjusted around the mean of the image as it is by then. torchvision rounds the images of Pillow
    to integers after each adjustment; here they stay floats. A strength of 0 changes nothing.
    """
    order, factors = random_factors(
        key, brightness=brightness, contrast=contrast, saturation=saturation)
    planes = _planes(image)
    for which in order:
        planes = _blended(planes, factors[which], which)
    return jnp.moveaxis(planes, 0, -1)


def _planes(image: jax.Array) -> jax.Array:
    """The image as [channels, H, W]: weighting whole planes is several times faster on CPUs."""
    size = _validate.shapes(image=(image, "H W channels"))
    if size["channels"] not in (1, 3):
        raise _validate.InputError(
            f"Expected image with 1 or 3 channels, got {size['channels']}.")
    return jnp.moveaxis(image, -1, 0)


def _blended(planes: jax.Array, factor: jax.typing.ArrayLike, which: int | jax.Array) -> jax.Array:
    """The adjustment with index ``which``, by a select, which vmap makes of any switch."""
    factor = jnp.asarray(factor, planes.dtype)
    grey = planes if len(planes) == 1 else (
        _RED * planes[0] + _GREEN * planes[1] + _BLUE * planes[2])[None]
    other = jnp.where(which == 0, 0, jnp.where(which == 1, jnp.mean(grey), grey))
    return jnp.clip(factor * planes + (1 - factor) * other, 0, 1)
