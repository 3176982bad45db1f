r"""Estimates of the noise in photographs: the standard deviation, in pixel values of [0, 1].

From single images, :func:`noise_std`, and from two shots of one scene, :func:`pair_noise_std`.
Plain NumPy on the host, in float64. Both raise InputError (a ValueError) if images are not
[N, H, W, channels], uint8 or in [0, 1], or are smaller than :data:`LEAST_SIDE`. The estimate is NaN
for an image that is saturated nearly everywhere.
"""

from collections.abc import Callable

import numpy as np

from jaxrobust import _validate

LEAST_SIDE = 16
"""Fewest pixels of a side: smaller images have no flat areas to tell noise from."""

_BLOCK = 8
_FLAT = 0.25  # The share of the blocks that are taken to be no rougher than the noise.


def noise_std(images: np.ndarray, *, reference: np.ndarray | None = None) -> np.ndarray:
    r"""Estimates the standard deviation of the noise in each image, from its flat areas.

    .. math:: \hat\sigma = \sigma_r \frac{q(x)}{q(r)}, \qquad
        q(x) = Q_{1/4} \{ \mathrm{mean}_{block} |x * L| \}, \qquad
        L = \begin{pmatrix} 1 & -2 & 1 \\ -2 & 4 & -2 \\ 1 & -2 & 1 \end{pmatrix}

    Immerkaer's mask L removes what is linear along rows or columns. The mean response is taken in
    blocks of 8 x 8 pixels of each channel, and the lower quartile over the blocks is that of flat
    areas. Windows with a saturated pixel do not count. The images r, noise of standard deviation
    :math:`\sigma_r` alone, make the result exact for noise on a flat image, also where neighbouring
    pixels have correlated noise because images were resized.

    What is rough at the scale of a pixel in more than three quarters of an image counts as noise,
    which makes the estimate for noiseless photographs of low resolution larger than 0.

    Args:
      images: [N, H, W, channels], uint8, or floats in [0, 1].
      reference: [M, H, W, channels], noise around mid-grey, in (0, 1), as it comes out of the
        processing that the images went through; None for white noise.

    Returns:
      [N], in pixel values of [0, 1].

    Source: Immerkaer, *Fast Noise Variance Estimation*, 1996, for the mask and the mean response.
    """
    images = _checked("images", images)
    shape = images.shape[1:]
    if reference is None:
        reference = 0.5 + 0.05 * np.random.default_rng(0).standard_normal((8, *shape))
    reference = _checked("reference", reference)
    if reference.shape[1:] != shape:
        raise _validate.InputError(f"Expected reference of images of shape {shape}, as images, got "
                                   f"{reference.shape[1:]}.")
    deviation = float(reference.std(axis=(1, 2)).mean())
    gain = float(np.mean([_flat_response(image) for image in reference]))
    found = np.array([_flat_response(image) for image in images])
    return found * deviation / gain


def pair_noise_std(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    r"""Estimates the standard deviation of the noise from two shots of each scene.

    .. math:: \hat\sigma = \mathrm{median}_{block}\, \mathrm{std}_{block}(x - y) / \sqrt 2

    in blocks of 8 x 8 pixels of each channel, without those that have a saturated pixel in more
    than half of their area. What changes between the shots in fewer than half of the blocks, and
    the brightness, does not count; a camera that moved does.

    Args:
      first: [N, H, W, channels], uint8, or floats in [0, 1].
      second: the other shots, of the same shape.

    Returns:
      [N], in pixel values of [0, 1].
    """
    first, second = _checked("first", first), _checked("second", second)
    if first.shape != second.shape:
        raise _validate.InputError(
            f"Expected second of the shape of first, {first.shape}, got {second.shape}.")
    found = []
    for one, other in zip(first, second, strict=True):
        difference = np.where(_saturated(one) | _saturated(other), np.nan, one - other)
        found.append(_over_blocks(difference, _block_std, 0.5))
    return np.array(found) / np.sqrt(2)


def _checked(name: str, images: np.ndarray) -> np.ndarray:
    """Checks images; returns them as float64 in [0, 1]."""
    images = np.asarray(images)
    _validate.images(name, images)
    if not len(images) or min(images.shape[1:3]) < LEAST_SIDE:
        raise _validate.InputError(
            f"Expected {name} of at least one image of {LEAST_SIDE} x {LEAST_SIDE} pixels or more, "
            f"got shape {images.shape}.")
    return images / 255 if images.dtype == np.uint8 else images.astype(np.float64)


def _saturated(image: np.ndarray) -> np.ndarray:
    return (image <= 0) | (image >= 1)


def _flat_response(image: np.ndarray) -> float:
    """Returns q(x) of an image [H, W, channels]; NaN if it is saturated nearly everywhere."""
    def windows(values: np.ndarray) -> list[list[np.ndarray]]:
        height, width, _ = values.shape
        return [[values[i : height - 2 + i, j : width - 2 + j] for j in range(3)] for i in range(3)]

    rows = [left - 2 * middle + right for left, middle, right in windows(image)]
    response = np.abs(rows[0] - 2 * rows[1] + rows[2])
    saturated = np.any([part for row in windows(_saturated(image)) for part in row], axis=0)
    return _over_blocks(np.where(saturated, np.nan, response), _block_mean, _FLAT)


def _block_mean(blocks: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.nansum(blocks, axis=0) / counts


def _block_std(blocks: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.sqrt(np.nansum((blocks - np.nansum(blocks, axis=0) / counts) ** 2, axis=0)
                   / (counts - 1))


def _over_blocks(
    values: np.ndarray, statistic: Callable[[np.ndarray, np.ndarray], np.ndarray], quantile: float
) -> float:
    """A quantile over the blocks of values [H, W, channels] that are more than half not NaN."""
    height, width, channels = values.shape[0] // _BLOCK, values.shape[1] // _BLOCK, values.shape[2]
    blocks = values[: height * _BLOCK, : width * _BLOCK].reshape(
        height, _BLOCK, width, _BLOCK, channels).transpose(1, 3, 0, 2, 4).reshape(_BLOCK**2, -1)
    counts = np.sum(~np.isnan(blocks), axis=0)
    usable = counts > _BLOCK**2 / 2
    if not usable.any():
        return np.nan
    return float(np.quantile(statistic(blocks[:, usable], counts[usable]), quantile))
