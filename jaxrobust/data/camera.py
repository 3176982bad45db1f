"""The noise of a camera, from a folder of its photographs, at the size that a network sees."""

import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxrobust import _validate, noise_level
from jaxrobust.data.decoded import read_image, stored_size
from jaxrobust.data.listing import IMAGE_SUFFIXES

MOST_IMAGES = 200
"""Images of a folder that are used, at equal distances in the order of their paths."""


class CameraNoise(NamedTuple):
    """The noise of some photographs, in pixel values of [0, 1]."""

    std: float  # The median over the images or pairs.
    low: float  # The 10th percentile over them.
    high: float  # The 90th percentile.
    number: int  # Images or pairs that it is from.
    pairs: bool  # Whether it is from pairs of shots of one scene.


def find_photographs(folder: str | pathlib.Path) -> list[pathlib.Path]:
    """Lists the image files in a folder and those below it, by their suffix, in order.

    Names that start with a dot are passed over.

    Raises:
      InputError: (a ValueError) if it is no folder, or has no image.
    """
    folder = pathlib.Path(folder).expanduser()
    if not folder.is_dir():
        raise _validate.InputError(f"Expected a folder of photographs at {folder}, got "
                                   f"{'a file' if folder.exists() else 'nothing'}.")
    found = sorted(
        pathlib.Path(root) / name for root, _, names in os.walk(folder) for name in names
        if os.path.splitext(name)[1].casefold() in IMAGE_SUFFIXES and not name.startswith("."))
    if not found:
        raise _validate.InputError(f"Expected images in {folder}, found none.")
    return found


def pairs_of(paths: Sequence[pathlib.Path]) -> list[tuple[pathlib.Path, pathlib.Path]]:
    """Finds pairs of shots of one scene: files in one folder, whose names without suffix end in
    ``_a`` and ``_b`` and do not differ otherwise.

    >>> pairs_of([pathlib.Path(name) for name in ("door_a.png", "door_b.png", "x_a.png")])
    [(PosixPath('door_a.png'), PosixPath('door_b.png'))]
    """
    there = {(path.parent, path.stem): path for path in paths}
    return [(path, there[parent, f"{stem[:-1]}b"]) for (parent, stem), path in there.items()
            if stem.endswith("_a") and (parent, f"{stem[:-1]}b") in there]


def measure_noise(
    paths: Sequence[pathlib.Path], image_size: tuple[int, int], channels: int = 3, *,
    use_pairs: bool = True, progress: Callable[[int, int], None] | None = None,
) -> CameraNoise:
    """Estimates the noise of photographs after they are resized as for a network.

    From pairs of shots (:func:`pairs_of`) if there are some, by
    :func:`~jaxrobust.noise_level.pair_noise_std`; else from single images, by
    :func:`~jaxrobust.noise_level.noise_std`, with white noise resized from the image's own size as
    the reference. Uses at most :data:`MOST_IMAGES` images or pairs.

    Args:
      paths: of the files.
      image_size: (H, W) in pixels, each at least :data:`~jaxrobust.noise_level.LEAST_SIDE`.
      channels: 3 for RGB, 1 for grey.
      use_pairs: False for single images even if there are pairs.
      progress: called with (images or pairs done, those in all).

    Raises:
      InputError: (a ValueError) if a file cannot be read, the size is too small, or all images are
        saturated nearly everywhere.
    """
    if min(image_size) < noise_level.LEAST_SIDE:
        raise _validate.InputError(
            f"Expected image_size={tuple(image_size)} of {noise_level.LEAST_SIDE} x "
            f"{noise_level.LEAST_SIDE} pixels or more, to tell noise from what images show.")
    pairs = pairs_of(paths) if use_pairs else []
    chosen: list[tuple[pathlib.Path, ...]] = [*pairs] or [(path,) for path in paths]
    if len(chosen) > MOST_IMAGES:
        chosen = [chosen[place] for place in np.linspace(
            0, len(chosen) - 1, MOST_IMAGES).round().astype(int)]
    found = []
    for number, shots in enumerate(chosen, 1):
        images = [read_image(path, image_size, channels)[None] for path in shots]
        if pairs:
            found.append(float(noise_level.pair_noise_std(*images)[0]))
        else:
            reference = _resized_noise(stored_size(shots[0]), tuple(image_size), channels)
            found.append(float(noise_level.noise_std(images[0], reference=reference)[0]))
        if progress is not None:
            progress(number, len(chosen))
    usable = [value for value in found if np.isfinite(value)]
    if not usable:
        raise _validate.InputError(f"Expected images that are not saturated nearly everywhere, got "
                                   f"{len(found)} that are, the first {chosen[0][0]}.")
    low, std, high = (float(value) for value in np.quantile(usable, (0.1, 0.5, 0.9)))
    return CameraNoise(std, low, high, len(usable), bool(pairs))


@functools.lru_cache(maxsize=16)
def _resized_noise(size: tuple[int, int], image_size: tuple[int, int], channels: int) -> np.ndarray:
    """White noise around mid-grey, resized as :func:`read_image` does, [4, H, W, channels]."""
    from PIL import Image

    random = np.random.default_rng(0)
    planes = [Image.fromarray(random.standard_normal(size, np.float32)).resize(
        image_size[::-1], Image.Resampling.BILINEAR) for _ in range(4 * channels)]
    noise = np.stack([np.asarray(plane) for plane in planes])
    return 0.5 + 0.05 * noise.reshape(4, channels, *image_size).transpose(0, 2, 3, 1)
