"""Augmentation on the device: uint8 images in, clean and noisy views in [0, 1] out."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrobust import _validate
from jaxrobust.data.geometric import random_perspective, random_rotation
from jaxrobust.data.photometric import color_jitter
from jaxrobust.images import Batch, to_float
from jaxrobust.perturbations import Perturbation

Augmentation = Callable[[jax.Array, jax.Array], jax.Array]
"""``(key, image [H, W, channels]) -> image``, pixels in [0, 1]."""


def random_crop(key: jax.Array, image: jax.Array, *, padding: int) -> jax.Array:
    """Pads the image with 0 (black), and crops it to its own size at a random place."""
    padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    corner = jax.random.randint(key, (2,), 0, 2 * padding + 1)
    return jax.lax.dynamic_slice(padded, (corner[0], corner[1], 0), image.shape)


def random_flip(key: jax.Array, image: jax.Array) -> jax.Array:
    """Mirrors the image left to right with probability 1/2."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def standard_augmentation(*, padding: int = 4, flip: bool = True) -> Augmentation:
    """Crops at random, then flips horizontally, as in Appendix H.1 of the paper.

    Args:
      padding: on every side before the crop, in pixels, >= 0; 0 for no crop.
      flip: False for images that change their meaning when mirrored, such as digits.

    Raises:
      InputError: (a ValueError) if padding < 0.
    """
    _validate.in_range("padding", padding, 0)
    padding = _validate.integer("padding", padding, 0)

    def augment(key: jax.Array, image: jax.Array) -> jax.Array:
        crop_key, flip_key = jax.random.split(key)
        image = random_crop(crop_key, image, padding=padding) if padding else image
        return random_flip(flip_key, image) if flip else image

    return augment


def photo_augmentation(
    *,
    brightness: float = 0.3,
    contrast: float = 0.3,
    saturation: float = 0.3,
    degrees: float = 10,
    distortion: float = 0.5,
    perspective_probability: float = 0.5,
    flip: bool = True,
) -> Augmentation:
    """Applies colour jitter, rotation, perspective and flip, as in Appendix H.2 of the paper.

    They follow one another in this order: the rotation takes the nearest pixel, the perspective
    interpolates between pixels of the rotated image.

    Args:
      brightness, contrast, saturation: of :func:`~jaxrobust.data.photometric.color_jitter`, >= 0.
      degrees: the largest angle of :func:`~jaxrobust.data.geometric.random_rotation`, in [0, 180].
      distortion: of :func:`~jaxrobust.data.geometric.random_perspective`, in [0, 1].
      perspective_probability: of the same, in [0, 1].
      flip: False for images that change their meaning when mirrored, such as road signs.

    Raises:
      InputError: (a ValueError) if a number is out of range; and, when the result is called, if an
        image is smaller than 2 x 2 or has neither 1 nor 3 channels.
    """
    for name, strength in (("brightness", brightness), ("contrast", contrast),
                           ("saturation", saturation)):
        _validate.in_range(name, strength, 0)
    _validate.in_range("degrees", degrees, 0, 180, open_high=False)
    _validate.in_range("distortion", distortion, 0, 1, open_high=False)
    _validate.in_range("perspective_probability", perspective_probability, 0, 1, open_high=False)

    def augment(key: jax.Array, image: jax.Array) -> jax.Array:
        jitter_key, rotation_key, perspective_key, flip_key = jax.random.split(key, 4)
        image = color_jitter(jitter_key, image, brightness=brightness, contrast=contrast,
                             saturation=saturation)
        image = random_rotation(rotation_key, image, degrees=degrees)
        image = random_perspective(perspective_key, image, distortion=distortion,
                                   probability=perspective_probability)
        return random_flip(flip_key, image) if flip else image

    return augment


def make_batch(
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    *,
    augment: Augmentation,
    perturb: Perturbation,
    independent_views: bool = False,
    positions: jax.Array | None = None,
) -> Batch:
    """Makes both views of a batch: augmented, and augmented and perturbed.

    Args:
      key: a PRNG key; each image's is ``fold_in(key, its position in the batch)``.
      images: [B, H, W, channels], uint8, or floats in [0, 1].
      labels: [B] integers.
      augment: applied to each image.
      perturb: applied to the noisy view after the augmentation.
      independent_views: False to perturb the augmented clean view, as in Eq. 12; True to augment
        the noisy view on its own, as in the authors' release.
      positions: [B] integers, the images' positions in the whole batch, if they are a part of it;
        None for 0 .. B - 1.

    Raises:
      InputError: (a ValueError) if the shapes do not match.
    """
    _validate.key("key", key)
    for name, function in (("augment", augment), ("perturb", perturb)):
        _validate.function(name, function)
    labels = _validate.class_numbers("labels", labels)
    size = _validate.shapes(images=(images, "B H W channels"), labels=(labels, "B"))["B"]
    positions = jnp.arange(size) if positions is None else _validate.class_numbers(
        "positions", positions)
    _validate.shapes(images=(images, "B H W channels"), positions=(positions, "B"))

    def views(position: jax.Array, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        clean_key, noisy_key, noise_key = jax.random.split(jax.random.fold_in(key, position), 3)
        clean = augment(clean_key, image)
        other = augment(noisy_key, image) if independent_views else clean
        return clean, perturb(noise_key, other[None])[0]

    clean, noisy = jax.vmap(views)(positions, to_float(images))
    return Batch(clean, noisy, labels)
