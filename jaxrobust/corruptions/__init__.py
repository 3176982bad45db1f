"""Common corruptions of images, as in CIFAR-10-C and ImageNet-C, at severities 1 to 5.

``corruption("fog", 3)`` is a function ``(key, images [B, H, W, channels]) -> images``, pixels in
[0, 1], as the perturbations of :mod:`jaxrobust.perturbations`, whose texts name corruptions too:
``fog(3)``. Image i is corrupted by the key ``fold_in(key, i)`` alone, in float32, whatever the
batch.

Definitions and parameters are those of the generators of Hendrycks and Dietterich (2019),
"Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
https://arxiv.org/abs/1903.12261: images whose shorter side has 32 pixels or fewer get those of
CIFAR-10-C, from 224 pixels on those of ImageNet-C; between them, lengths in pixels are linear in
the shorter side and all other parameters in its logarithm
(:func:`parameters_for`).

Numbers measured with them are not those of the benchmarks' own files
(:func:`jaxrobust.data.load_corrupted`), and must say so (``origin``, of a corruption's ``func`` and
of the images of files): random draws are others, frost is a
procedural texture instead of photographs, ``spatter`` finds the borders of drops in its own way,
and results are not rounded to bytes (but by ``jpeg_compression``, which is held to Pillow's).

Images are RGB or grey. On grey ones frost, water and mud are grey, and ``saturate`` is refused.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxrobust import _validate
from jaxrobust.corruptions import blur, digital, jpeg, noise, weather
from jaxrobust.corruptions.parameters import SEVERITIES, parameters_for
from jaxrobust.corruptions.scores import (
    ALEXNET_ERRORS,
    SEQUENCES,
    corruption_errors,
    flip_rate,
    flips,
    mean_corruption_accuracy,
    mean_corruption_error,
    mean_flip_rate,
    relative_corruption_errors,
    relative_mean_corruption_error,
)

__all__ = [
    "ALEXNET_ERRORS", "BENCHMARK", "CORRUPTIONS", "MAKERS", "SEQUENCES", "SEVERITIES",
    "Corruption", "corruption", "corruption_errors", "flip_rate", "flips",
    "mean_corruption_accuracy", "mean_corruption_error", "mean_flip_rate", "parameters_for",
    "relative_corruption_errors", "relative_mean_corruption_error",
]

_GROUPS = {
    "noise": (noise.gaussian_noise, noise.shot_noise, noise.impulse_noise),
    "blur": (blur.defocus_blur, blur.glass_blur, blur.motion_blur, blur.zoom_blur),
    "weather": (weather.snow, weather.frost, weather.fog, digital.brightness),
    "digital": (digital.contrast, digital.elastic_transform, digital.pixelate,
                jpeg.jpeg_compression),
    "extra": (noise.speckle_noise, blur.gaussian_blur, weather.spatter, digital.saturate),
}

CORRUPTIONS: dict[str, str] = {
    function.__name__: group for group, functions in _GROUPS.items() for function in functions}
"""Names of the corruptions with their group: noise, blur, weather and digital for the 15 of the
benchmark, in its order; extra for the 4 that its authors keep for validation."""

BENCHMARK = tuple(name for name, group in CORRUPTIONS.items() if group != "extra")
"""The 15 over which means are taken."""

_APPLY: dict[str, Callable[..., jax.Array]] = {
    function.__name__: function for functions in _GROUPS.values() for function in functions}

_DETERMINISTIC = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate",
                  "jpeg_compression", "gaussian_blur", "saturate")


@dataclasses.dataclass(frozen=True)
class Corruption:
    """A corruption at a severity; compared by value, as jit needs it."""

    name: str
    severity: int
    origin: ClassVar[str] = "generated"  # Not the benchmark's own files.

    @property
    def is_random(self) -> bool:
        """Whether the key takes part in it."""
        return self.name not in _DETERMINISTIC

    def __call__(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """Corrupts images [B, H, W, channels] of any floating dtype, which the result keeps."""
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise _validate.InputError(
                f"Expected images of a floating dtype, pixels in [0, 1], got {images.dtype}.")
        channels = _validate.shapes(images=(images, "B H W channels"))["channels"]
        if channels != 3 and (channels != 1 or self.name == "saturate"):
            raise _validate.InputError(
                f"Expected images of {'3' if self.name == 'saturate' else '1 or 3'} channels for "
                f"{self.name}, got {channels}.")
        return _corrupt(self, key, images)


@functools.partial(jax.jit, static_argnums=0)
def _corrupt(corruption: Corruption, key: jax.Array, images: jax.Array) -> jax.Array:
    """Compiled as a whole, also when it is called eagerly."""
    number, height, width, _ = images.shape
    values = parameters_for(corruption.name, corruption.severity, height, width)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(number, dtype=jnp.uint32))
    corrupted = jax.vmap(lambda key, image: _APPLY[corruption.name](key, image, *values))(
        keys, images.astype(jnp.float32))
    return jnp.clip(corrupted, 0, 1).astype(images.dtype)


def corruption(name: str, severity: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Makes a corruption, ``(key, images [B, H, W, channels]) -> images``.

    Args:
      name: one of :data:`CORRUPTIONS`.
      severity: 1 to 5.

    Raises:
      InputError: (a ValueError) if one of them is none of those; when it is applied, if the images
        are not floats of 1 or 3 channels, or ``saturate`` is given grey ones.

    >>> corrupt = corruption("fog", 3)
    >>> images = jnp.full((2, 32, 32, 3), 0.5)
    >>> corrupt(jax.random.key(0), images).shape
    (2, 32, 32, 3)
    """
    _validate.one_of("corruption", name, CORRUPTIONS)
    severity = _validate.integer("severity", severity, 1)
    _validate.in_range("severity", severity, 1, SEVERITIES[-1], open_high=False)
    return jax.tree_util.Partial(Corruption(name, severity))


def _maker(name: str) -> Callable[[int], Callable[[jax.Array, jax.Array], jax.Array]]:
    def make(severity: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
        return corruption(name, severity)

    make.__name__ = name
    return make


MAKERS = {name: _maker(name) for name in CORRUPTIONS}
"""The functions that make a corruption of a severity, by its name."""
