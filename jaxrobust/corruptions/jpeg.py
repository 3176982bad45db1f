"""Baseline JPEG with 4:2:0 chroma, encoded and decoded without the entropy code, which loses
nothing: colours, subsampling, DCT, quantisation, and back, as libjpeg rounds them.

ITU-T T.81, https://www.w3.org/Graphics/JPEG/itu-t81.pdf; JFIF, ITU-T T.871.
"""

import jax
import jax.numpy as jnp
import numpy as np

_LUMINANCE = np.array([
    [16, 11, 10, 16, 24, 40, 51, 61], [12, 12, 14, 19, 26, 58, 60, 55],
    [14, 13, 16, 24, 40, 57, 69, 56], [14, 17, 22, 29, 51, 87, 80, 62],
    [18, 22, 37, 56, 68, 109, 103, 77], [24, 35, 55, 64, 81, 104, 113, 92],
    [49, 64, 78, 87, 103, 121, 120, 101], [72, 92, 95, 98, 112, 100, 103, 99]])
_CHROMINANCE = np.full((8, 8), 99)
_CHROMINANCE[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]
_TO_YCBCR = np.array([[0.299, 0.587, 0.114],
                      [-0.168735892, -0.331264108, 0.5],
                      [0.5, -0.418687589, -0.081312411]], np.float32)
# Of length 8, times the root of 8.
_DCT = np.sqrt(np.where(np.arange(8) == 0, 1, 2))[:, None] * np.cos(
    np.pi / 16 * np.arange(8)[:, None] * (2 * np.arange(8) + 1))


def quantisation(table: np.ndarray, quality: int) -> np.ndarray:
    """Returns the steps [8, 8] of a quality from 1 to 100, as the Independent JPEG Group does."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return np.clip((table * scale + 50) // 100, 1, 255)


def jpeg_compression(key: jax.Array, image: jax.Array, quality: int) -> jax.Array:
    """Codes the image, rounded to bytes first, and decodes it; one channel is luminance."""
    del key
    height, width, channels = image.shape
    levels = jnp.round(image * 255)
    luminance, chrominance = (quantisation(table, quality) for table in (_LUMINANCE, _CHROMINANCE))
    if channels == 1:
        return _coded(levels, luminance) / 255
    ycbcr = jnp.einsum("hwc,dc->hwd", levels, _TO_YCBCR, precision=jax.lax.Precision.HIGHEST)
    # Down at a half, up to the single precision of the product, for Cb and Cr.
    planes = jnp.floor(ycbcr + np.array([[[0.5, 128.499, 128.499]]], np.float32))
    y = _coded(planes[..., :1], luminance)[..., 0]
    chroma = _coded(_halved(planes[..., 1:]), chrominance)
    cb, cr = jnp.moveaxis(_doubled(chroma)[:height, :width] - 128, 2, 0)
    return jnp.clip(jnp.stack([
        y + jnp.round(1.402 * cr),
        y + jnp.round(-0.344136286 * cb - 0.714136286 * cr),
        y + jnp.round(1.772 * cb)], axis=-1), 0, 255) / 255


def _coded(planes: jax.Array, steps: np.ndarray) -> jax.Array:
    """Planes [H, W, n] of levels 0, 1, ..., 255, each block quantised by ``steps`` [8, 8]."""
    height, width, n = planes.shape
    padded = jnp.pad(planes, ((0, -height % 8), (0, -width % 8), (0, 0)), mode="edge")
    blocks = padded.reshape(padded.shape[0] // 8, 8, padded.shape[1] // 8, 8, n) - 128
    steps = jnp.asarray(steps[None, :, None, :, None], jnp.float32)
    # Rounded after each pass as libjpeg's accurate integers are: to quarters, then to whole ones
    # of 8 times the coefficient, and of the level in the end. Up at a half, whatever the single
    # precision does to it.
    passed = jnp.floor(4 * _transform("vc,arbcn->arbvn", blocks) + 0.501)
    frequencies = jnp.floor(_transform("ur,arbvn->aubvn", passed) / 4 + 0.501)
    counts = jnp.sign(frequencies) * jnp.floor(jnp.abs(frequencies) / (8 * steps) + 0.5)
    passed = jnp.floor(4 * _transform("ur,aubvn->arbvn", counts * steps) + 0.501)
    decoded = jnp.floor(_transform("vc,arbvn->arbcn", passed) / 32 + 128.501)
    return jnp.clip(decoded.reshape(padded.shape), 0, 255)[:height, :width]


def _transform(axes: str, blocks: jax.Array) -> jax.Array:
    return jnp.einsum(axes, jnp.asarray(_DCT, jnp.float32), blocks,
                      precision=jax.lax.Precision.HIGHEST)


def _halved(planes: jax.Array) -> jax.Array:
    """Means of 2 x 2 pixels, which at a half round down and up in turn, as libjpeg's."""
    height, width, n = planes.shape
    padded = jnp.pad(planes, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    sums = padded.reshape(padded.shape[0] // 2, 2, padded.shape[1] // 2, 2, n).sum(axis=(1, 3))
    bias = 1 + np.arange(sums.shape[1], dtype=np.float32) % 2
    return jnp.floor((sums + bias[None, :, None]) / 4)


def _doubled(planes: jax.Array) -> jax.Array:
    """Twice as many pixels, each 3/4 of the nearest and 1/4 of the next along either side."""
    def interleaved(before: jax.Array, after: jax.Array, axis: int) -> jax.Array:
        shape = list(before.shape)
        shape[axis] *= 2
        return jnp.stack([before, after], axis=axis + 1).reshape(shape)

    def neighbours(planes: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
        first, last = (jax.lax.slice_in_dim(planes, start, stop, axis=axis) for start, stop in (
            (0, 1), (planes.shape[axis] - 1, planes.shape[axis])))
        padded = jnp.concatenate([first, planes, last], axis=axis)
        size = planes.shape[axis]
        return (jax.lax.slice_in_dim(padded, 0, size, axis=axis),
                jax.lax.slice_in_dim(padded, 2, size + 2, axis=axis))

    above, below = neighbours(planes, 0)
    rows = interleaved(3 * planes + above, 3 * planes + below, 0)
    left, right = neighbours(rows, 1)
    # In 1/16, rounded up and down in turn.
    return interleaved(jnp.floor((3 * rows + left + 8) / 16),
                       jnp.floor((3 * rows + right + 7) / 16), 1)
