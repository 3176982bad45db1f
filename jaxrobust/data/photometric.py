r"""Colour jitter, as torchvision's ColorJitter, in floats: nothing is rounded to uint8 in between.

Each adjustment blends the image with another one,
:math:`\mathrm{clip}(f x + (1 - f) y, 0, 1)`: a factor f of 1 leaves the image as it is, 0 gives y.
"""

import jax
import jax.numpy as jnp

from jaxrobust import _validate

_RED, _GREEN, _BLUE = 0.2989, 0.587, 0.114

ADJUSTMENTS = ("brightness", "contrast", "saturation")


def adjust_brightness(image: jax.Array, factor: jax.typing.ArrayLike) -> jax.Array:
    """Blend with black: ``clip(factor * image, 0, 1)``.

    Args:
      image: [H, W, channels] in [0, 1]; 1 or 3 channels.
      factor: >= 0, where 1 gives the image itself.

    Raises:
      InputError: (a ValueError) if ``image`` has another shape.
    """
    return _adjusted(image, factor, 0)


def adjust_contrast(image: jax.Array, factor: jax.typing.ArrayLike) -> jax.Array:
    """Blend with a uniform image: the mean of the grey image, 0.2989 R + 0.587 G + 0.114 B.

    Args:
      image: [H, W, channels] in [0, 1]; 1 or 3 channels, of which one is grey already.
      factor: >= 0, where 1 gives the image itself.

    Raises:
      InputError: (a ValueError) if ``image`` has another shape.
    """
    return _adjusted(image, factor, 1)


def adjust_saturation(image: jax.Array, factor: jax.typing.ArrayLike) -> jax.Array:
    """Blend with the grey image, 0.2989 R + 0.587 G + 0.114 B, in all three channels.

    Args:
      image: [H, W, channels] in [0, 1]; 1 or 3 channels. With one, it stays as it is.
      factor: >= 0, where 1 gives the image itself.

    Raises:
      InputError: (a ValueError) if ``image`` has another shape.
    """
    return _adjusted(image, factor, 2)


def random_factors(
    key: jax.Array, *, brightness: float, contrast: float, saturation: float
) -> tuple[jax.Array, jax.Array]:
    """What :func:`color_jitter` draws.

    Args:
      key: a PRNG key.
      brightness: >= 0, as there.
      contrast: likewise.
      saturation: likewise.

    Returns:
      A random permutation, [3] integers: which of :data:`ADJUSTMENTS` comes first, second and
      third. And the factors, [3] float32, of :data:`ADJUSTMENTS` in their own order.

    Raises:
      InputError: (a ValueError) if a strength is negative.
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
    """Brightness, contrast and saturation adjusted by random factors, in random order.

    torchvision's ``ColorJitter(brightness, contrast, saturation)``: each factor is uniform in
    [max(0, 1 - strength), 1 + strength], all six orders are equally likely, and the mean of the
    contrast is that of the image as it is by then. torchvision rounds the images of Pillow to
    integers after each adjustment; here they stay floats.

    Args:
      key: a PRNG key.
      image: [H, W, channels] in [0, 1], where the result stays too; 1 or 3 channels.
      brightness: strength, >= 0; 0 for none.
      contrast: likewise.
      saturation: likewise.

    Raises:
      InputError: (a ValueError) if a strength is negative, or ``image`` has another shape.
    """
    order, factors = random_factors(
        key, brightness=brightness, contrast=contrast, saturation=saturation)
    planes = _planes(image)
    for which in order:
        planes = _blended(planes, factors[which], which)
    return jnp.moveaxis(planes, 0, -1)


def _adjusted(image, factor, which):
    return jnp.moveaxis(_blended(_planes(image), factor, which), 0, -1)


def _planes(image):
    """[channels, H, W]: weights of whole planes are several times faster on CPUs."""
    size = _validate.shapes(image=(image, "H W channels"))
    if size["channels"] not in (1, 3):
        raise _validate.InputError(
            f"Expected image with 1 or 3 channels, got {size['channels']}.")
    return jnp.moveaxis(image, -1, 0)


def _blended(planes, factor, which):
    """The adjustment with index ``which``: a select, as vmap makes one of any switch."""
    factor = jnp.asarray(factor, planes.dtype)
    grey = planes if len(planes) == 1 else (
        _RED * planes[0] + _GREEN * planes[1] + _BLUE * planes[2])[None]
    other = jnp.where(which == 0, 0, jnp.where(which == 1, jnp.mean(grey), grey))
    return jnp.clip(factor * planes + (1 - factor) * other, 0, 1)
