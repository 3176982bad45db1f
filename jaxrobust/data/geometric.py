"""Rotation and perspective of images, as torchvision applies them to Pillow's images.

Pixel (row i, column j) is the square [j, j + 1) x [i, i + 1) of a plane with x to the right and y
down; its centre is (j + 0.5, i + 0.5). An image [H, W, channels] covers [0, W) x [0, H). Each pixel
of a result is read at the point of the given image that its centre is mapped to, and is 0 (black)
where that point is outside. Coordinates are float32, whatever the image's dtype is.

Corners, [4, 2], are points (x, y): top left, top right, bottom right, bottom left. All functions
raise InputError (a ValueError) if a number is out of its range or the shapes do not match.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust import _validate

_IDENTITY = np.eye(3, dtype=np.float32)

_INWARDS = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]], np.int32)
"""The direction (x, y) to the centre from each corner."""


def rotate(image: jax.Array, angle: jax.typing.ArrayLike) -> jax.Array:
    """Rotates the image about its centre; its size stays, and corners that come in are black.

    Each pixel is that of the given image whose square the point lies in (nearest neighbour), as
    in ``PIL.Image.rotate``. As there, the map is rounded to multiples of 2^-16: integers give the
    same pixels in every program that this is compiled into. Its entries are computed in float32, so
    that a few pixels of a 400 x 500 image are the neighbours of Pillow's.

    Args:
      image: [H, W, channels], with H + W at most 32767.
      angle: in degrees, counter-clockwise.
    """
    size = _validate.shapes(image=(image, "H W channels"))
    _validate.in_range("height + width", size["H"] + size["W"], 0, 2 ** 15)
    theta = jnp.deg2rad(jnp.asarray(angle, jnp.float32))
    cos, sin = jnp.cos(theta), jnp.sin(theta)
    x, y = size["W"] / 2, size["H"] / 2  # the centre

    def source(along_column: jax.Array, along_row: jax.Array, first: jax.Array) -> jax.Array:
        """Where row i and column j come from, by the point of row 0 and column 0."""
        i, j = jnp.arange(size["H"])[:, None], jnp.arange(size["W"])[None]
        return (_fixed(along_column) * j + _fixed(along_row) * i + _fixed(first)) >> 16

    column = source(cos, -sin, x + cos * (0.5 - x) - sin * (0.5 - y))
    row = source(sin, cos, y + sin * (0.5 - x) + cos * (0.5 - y))
    inside = _inside(image, column, row)
    pixels = _pixels(image, jnp.where(inside, column, 0), jnp.where(inside, row, 0))
    return jnp.where(inside[..., None], pixels, 0)


def random_rotation(key: jax.Array, image: jax.Array, *, degrees: float = 10) -> jax.Array:
    """Rotates the image by an angle uniform in [-degrees, degrees], degrees in [0, 180].

    This is torchvision's ``RandomRotation(degrees)``, by :func:`rotate`.
    """
    _validate.in_range("degrees", degrees, 0, 180, open_high=False)
    return rotate(image, jax.random.uniform(key, minval=-degrees, maxval=degrees))


def warp_perspective(image: jax.Array, matrix: jax.Array) -> jax.Array:
    r"""Shows the image in another perspective, at the same size.

    A pixel with its centre at (x, y) is read at

    .. math:: \left(\frac{a x + b y + c}{g x + h y + i}, \frac{d x + e y + f}{g x + h y + i}\right),

    interpolated linearly between the four nearest centres; beyond the outermost centres, but
    inside the image, its border pixels continue. These are the conventions of
    ``PIL.Image.transform`` with ``PERSPECTIVE`` and ``BILINEAR``, which torchvision uses (Pillow
    truncates the result to integers for an image of integers).

    Args:
      image: [H, W, channels] in [0, 1]; the result is too.
      matrix: [[a, b, c], [d, e, f], [g, h, i]] float32. A pixel that it maps to no point, because
        an entry is not finite or the denominator is 0, is black.
    """
    _validate.shapes(image=(image, "H W channels"), matrix=(matrix, "3 3"))
    height, width, _ = image.shape
    (a, b, c), (d, e, f), (g, h, i) = matrix
    x = jnp.arange(width, dtype=jnp.float32)[None] + 0.5
    y = jnp.arange(height, dtype=jnp.float32)[:, None] + 0.5
    denominator = g * x + h * y + i
    x, y = (a * x + b * y + c) / denominator, (d * x + e * y + f) / denominator
    inside = _inside(image, x, y)
    left, right, across = _neighbours(jnp.where(inside, x, 0), width)
    top, bottom, along = _neighbours(jnp.where(inside, y, 0), height)
    across, along = (part[..., None].astype(image.dtype) for part in (across, along))

    def between(first: jax.Array, second: jax.Array, part: jax.Array) -> jax.Array:
        return first + (second - first) * part

    def row(_: None, line: jax.Array) -> tuple[None, jax.Array]:
        return None, between(_pixels(image, left, line), _pixels(image, right, line), across)

    # In a loop, because XLA for CPUs would otherwise fuse the computation of the image into each of
    # the four reads, and repeat it four times.
    above, below = jax.lax.scan(
        row, None, jnp.stack([top, bottom]), unroll=jax.default_backend() != "cpu")[1]
    return jnp.where(inside[..., None], between(above, below, along), 0)


def perspective_matrix(corners: jax.Array, height: int, width: int) -> jax.Array:
    """Computes the perspective that moves the corners of an image to given places.

    As in torchvision, the corners of the image are (0, 0), (width - 1, 0), (width - 1, height - 1)
    and (0, height - 1): with this matrix :func:`warp_perspective` reads the k-th of them at the
    point ``corners[k]``. The equations are solved in closed form, without a linear solver for each
    image.

    Args:
      corners: [4, 2].
      height: of the image.
      width: of the image.

    Returns:
      [3, 3] float32; finite unless three of ``corners`` are on a line. Its last entry is 0 where
      the origin, which may be outside of the corners, has no image.

    Source: Heckbert, *Fundamentals of Texture Mapping and Image Warping*, 1989, Section 2.2.3.
    """
    _validate.shapes(corners=(corners, "4 2"))
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = corners.astype(jnp.float32)
    # From the unit square to the corners: [[a, b, x0], [d, e, y0], [g, h, 1]].
    sum_x, sum_y = x0 - x1 + x2 - x3, y0 - y1 + y2 - y3
    determinant = (x1 - x2) * (y3 - y2) - (x3 - x2) * (y1 - y2)
    g = (sum_x * (y3 - y2) - (x3 - x2) * sum_y) / determinant
    h = ((x1 - x2) * sum_y - sum_x * (y1 - y2)) / determinant
    a, b = x1 - x0 + g * x1, x3 - x0 + h * x3
    d, e = y1 - y0 + g * y1, y3 - y0 + h * y3
    # And back: its adjugate.
    return jnp.array([
        [(width - 1) * (e - y0 * h), (width - 1) * (x0 * h - b), (width - 1) * (b * y0 - x0 * e)],
        [(height - 1) * (y0 * g - d), (height - 1) * (a - x0 * g),
         (height - 1) * (x0 * d - a * y0)],
        [d * h - e * g, b * g - a * h, a * e - b * d]])


def random_corners(key: jax.Array, height: int, width: int, *, distortion: float) -> jax.Array:
    """Draws corners of an image, each moved inwards at random, as torchvision does.

    In an image of a few pixels three corners may come to lie on a line, which no perspective has:
    (1, 1), (2, 0) and (0, 2) of 4 x 4 pixels at a distortion of 0.5, for example, as in 6 % of all
    draws there. (torchvision solves the singular equations all the same, with an arbitrary result.)
    Such a draw is repeated, so that the corners are uniform over those of a perspective.

    Args:
      key: a PRNG key.
      height: of the image, at least 2.
      width: of the image, at least 2.
      distortion: in [0, 1]. A corner moves by a whole number of pixels, uniform in
        0 .. int(distortion * (width // 2)) along x, and likewise with the height along y.

    Returns:
      [4, 2] int32.
    """
    _validate.in_range("height", height, 2)
    _validate.in_range("width", width, 2)
    _validate.in_range("distortion", distortion, 0, 1, open_high=False)
    corners = np.array([[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]], np.int32)
    most = np.array([[int(distortion * (width // 2)), int(distortion * (height // 2))]], np.int32)

    def draw(key: jax.Array) -> jax.Array:
        return jax.random.randint(key, (4, 2), 0, most + 1) * _INWARDS + corners

    first, (x, y) = draw(key), most[0].tolist()
    # If even the corner moved furthest stays outside of the line through its neighbours,
    # x / (width - 1 - x) + y / (height - 1 - y) < 1, there is no loop to compile.
    if x * (height - 1 - y) + y * (width - 1 - x) < (width - 1 - x) * (height - 1 - y):
        return first
    return jax.lax.while_loop(
        lambda state: _three_on_a_line(state[1]),
        lambda state: (jax.random.fold_in(state[0], 1), draw(jax.random.fold_in(state[0], 0))),
        (key, first))[1]


def _three_on_a_line(corners: jax.Array) -> jax.Array:
    """Whether any three of four corners, [4, 2] integers, are on a line."""
    sides = jnp.roll(corners, -1, axis=0) - corners
    following = jnp.roll(sides, -1, axis=0)
    return jnp.any(sides[:, 0] * following[:, 1] == sides[:, 1] * following[:, 0])


def random_perspective(
    key: jax.Array, image: jax.Array, *, distortion: float = 0.5, probability: float = 0.5
) -> jax.Array:
    """Shows the image in a random perspective with some probability, otherwise as it is.

    This is torchvision's ``RandomPerspective``, by :func:`random_corners` and
    :func:`warp_perspective`.

    Args:
      key: a PRNG key.
      image: [H, W, channels] in [0, 1], H and W at least 2; the result is in [0, 1] too.
      distortion: in [0, 1]. Up to 1/2 the moved corners always are those of a convex
        quadrilateral, within which no pixel is black; far beyond, they may cross over.
      probability: in [0, 1].
    """
    _validate.in_range("probability", probability, 0, 1, open_high=False)
    size = _validate.shapes(image=(image, "H W channels"))
    apply_key, corners_key = jax.random.split(key)
    corners = random_corners(corners_key, size["H"], size["W"], distortion=distortion)
    # The identity reads every pixel at its centre: it gives the image itself, to the bit.
    return warp_perspective(image, jnp.where(
        jax.random.bernoulli(apply_key, float(probability)),
        perspective_matrix(corners, size["H"], size["W"]), _IDENTITY))


def _fixed(value: jax.Array) -> jax.Array:
    """The value in multiples of 2^-16, int32."""
    return jnp.round(value * 2 ** 16).astype(jnp.int32)


def _inside(image: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """[H, W], where points are in the image; False for NaN."""
    height, width, _ = image.shape
    return (x >= 0) & (x < width) & (y >= 0) & (y < height)


def _pixels(image: jax.Array, column: jax.Array, row: jax.Array) -> jax.Array:
    """[H, W, channels] at indices [H, W] that are known to be in the image."""
    return jnp.asarray(image).at[row, column].get(mode="promise_in_bounds")


def _neighbours(coordinate: jax.Array, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The pixels before and after a coordinate in [0, size), and its position between them."""
    before = jnp.floor(coordinate - 0.5)
    part = coordinate - 0.5 - before
    before = before.astype(jnp.int32)
    return jnp.maximum(before, 0), jnp.minimum(before + 1, size - 1), part
