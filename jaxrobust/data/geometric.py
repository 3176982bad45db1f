"""Rotation and perspective of images, as torchvision applies them to Pillow's images.

Pixel (row i, column j) is the square [j, j + 1) x [i, i + 1) of a plane with x to the right and y
down; its centre is (j + 0.5, i + 0.5). An image of height H and width W covers [0, W) x [0, H).
Each pixel of a result is read at the point of the given image that its centre is mapped to, and is
0 (black) where that point is outside. Coordinates do not have the image's dtype but float32.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust import _validate

_IDENTITY = np.eye(3, dtype=np.float32)

_INWARDS = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]], np.int32)
"""The direction (x, y) to the centre from each corner: top left, top right, bottom right,
bottom left."""


def rotate(image: jax.Array, angle: jax.typing.ArrayLike) -> jax.Array:
    """The image turned about its centre; its size stays, and corners that come in are black.

    Each pixel is that of the given image whose square the point lies in (nearest neighbour), as
    in ``PIL.Image.rotate``. As there, the map is rounded to multiples of 2^-16: integers give the
    same pixels in every program that this is compiled into. The entries themselves come from
    float32, so that a few pixels of a 400 x 500 image are not Pillow's but their neighbours.

    Args:
      image: [H, W, channels], with H + W at most 32767.
      angle: in degrees, counter-clockwise as one sees the image.

    Raises:
      InputError: (a ValueError) if ``image`` is larger or has another rank.
    """
    size = _validate.shapes(image=(image, "H W channels"))
    _validate.in_range("height + width", size["H"] + size["W"], 0, 2 ** 15)
    theta = jnp.deg2rad(jnp.asarray(angle, jnp.float32))
    cos, sin = jnp.cos(theta), jnp.sin(theta)
    x, y = size["W"] / 2, size["H"] / 2  # the centre

    def source(along_column, along_row, first):
        """Where row i and column j come from, by the point of row 0 and column 0."""
        i, j = jnp.arange(size["H"])[:, None], jnp.arange(size["W"])[None]
        return (_fixed(along_column) * j + _fixed(along_row) * i + _fixed(first)) >> 16

    column = source(cos, -sin, x + cos * (0.5 - x) - sin * (0.5 - y))
    row = source(sin, cos, y + sin * (0.5 - x) + cos * (0.5 - y))
    inside = _inside(image, column, row)
    pixels = _pixels(image, jnp.where(inside, column, 0), jnp.where(inside, row, 0))
    return jnp.where(inside[..., None], pixels, 0)


def random_rotation(key: jax.Array, image: jax.Array, *, degrees: float = 10) -> jax.Array:
    """The image turned by an angle uniform in [-degrees, degrees], see :func:`rotate`.

    torchvision's ``RandomRotation(degrees)``.

    Args:
      key: a PRNG key.
      image: [H, W, channels].
      degrees: the largest angle, in [0, 180].

    Raises:
      InputError: (a ValueError) if ``degrees`` is out of range, or ``image`` of another rank.
    """
    _validate.in_range("degrees", degrees, 0, 180, open_high=False)
    return rotate(image, jax.random.uniform(key, minval=-degrees, maxval=degrees))


def warp_perspective(image: jax.Array, coefficients: jax.Array) -> jax.Array:
    r"""The image seen in another perspective, of the same size.

    A pixel with its centre at (x, y) is read at

    .. math:: \left(\frac{a x + b y + c}{g x + h y + 1}, \frac{d x + e y + f}{g x + h y + 1}\right),

    interpolated linearly between the four nearest centres; beyond the outermost centres, but
    inside the image, its border pixels continue. These are the conventions of
    ``PIL.Image.transform`` with ``PERSPECTIVE`` and ``BILINEAR``, to which torchvision hands the
    coefficients (Pillow truncates the result to integers if the image has them).

    Args:
      image: [H, W, channels] in [0, 1], where the result stays too.
      coefficients: [8], (a, ..., h). A pixel that they map to no point, because they are not
        finite or the denominator is 0, is black.

    Raises:
      InputError: (a ValueError) if the shapes do not match.
    """
    _validate.shapes(image=(image, "H W channels"), coefficients=(coefficients, "8"))
    return _warp(image, jnp.append(coefficients.astype(jnp.float32), 1.0).reshape(3, 3))


def _warp(image, matrix):
    """:func:`warp_perspective` by [[a, b, c], [d, e, f], [g, h, i]], with i in the place of 1."""
    height, width, _ = image.shape
    (a, b, c), (d, e, f), (g, h, i) = matrix
    x, y = _centres(height, width)
    denominator = g * x + h * y + i
    x, y = (a * x + b * y + c) / denominator, (d * x + e * y + f) / denominator
    inside = _inside(image, x, y)
    left, right, across = _neighbours(jnp.where(inside, x, 0), width)
    top, bottom, along = _neighbours(jnp.where(inside, y, 0), height)
    across, along = (part[..., None].astype(image.dtype) for part in (across, along))

    def between(first, second, part):
        return first + (second - first) * part

    def row(_, line):
        return None, between(_pixels(image, left, line), _pixels(image, right, line), across)

    # A loop, because XLA for CPUs would otherwise fuse what makes the image into each of the four
    # reads, and compute it four times.
    _, (above, below) = jax.lax.scan(
        row, None, jnp.stack([top, bottom]), unroll=jax.default_backend() != "cpu")
    return jnp.where(inside[..., None], between(above, below, along), 0)


def perspective_coefficients(corners: jax.Array, height: int, width: int) -> jax.Array:
    """The perspective that moves the corners of an image to given places.

    As in torchvision, the corners are (0, 0), (width - 1, 0), (width - 1, height - 1) and
    (0, height - 1): :func:`warp_perspective` reads the point ``corners[k]`` at the k-th of them.
    The 8 equations are solved in closed form, without a linear solver for each image (Heckbert
    1989, "Fundamentals of Texture Mapping and Image Warping", section 2.2.3).

    Args:
      corners: [4, 2], the places (x, y) of the top left, top right, bottom right and bottom left
        corner.
      height: of the image, at least 2.
      width: of the image, at least 2.

    Returns:
      [8] float32; not finite where three of ``corners`` are on one line, or the origin has no
      image.

    Raises:
      InputError: (a ValueError) if the image is smaller, or ``corners`` has another shape.
    """
    _validate.in_range("height", height, 2)
    _validate.in_range("width", width, 2)
    _validate.shapes(corners=(corners, "4 2"))
    matrix = _perspective_matrix(corners, height, width)
    return (matrix / matrix[2, 2]).ravel()[:8]


def _perspective_matrix(corners, height, width):
    """[3, 3], which :func:`_warp` takes: finite wherever no three of the corners are on a line.

    Its last entry is 0 where the origin, which may be outside of the corners, has no image.
    """
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
    """Corners of an image, each moved inwards at random, as torchvision does it.

    In an image of a few pixels three corners may come to lie on a line: (1, 1), (2, 0) and (0, 2)
    of 4 x 4 pixels at a distortion of 0.5, or 6 % of all draws there. They are those of no
    perspective (torchvision solves the singular equations all the same, with any result). Such a
    draw is repeated, so that the corners are uniform over those of a perspective.

    Args:
      key: a PRNG key.
      height: of the image, at least 2.
      width: of the image, at least 2.
      distortion: in [0, 1]. A corner moves by a whole number of pixels, uniform in
        0 .. int(distortion * (width // 2)) along x, and likewise with the height along y.

    Returns:
      [4, 2] int32, the places (x, y) of the top left, top right, bottom right and bottom left
      corner.

    Raises:
      InputError: (a ValueError) if an argument is out of range.
    """
    _validate.in_range("height", height, 2)
    _validate.in_range("width", width, 2)
    _validate.in_range("distortion", distortion, 0, 1, open_high=False)
    corners = np.array([[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]], np.int32)
    most = np.array([[int(distortion * (width // 2)), int(distortion * (height // 2))]], np.int32)

    def draw(key):
        return corners + _INWARDS * jax.random.randint(key, (4, 2), 0, most + 1)

    first, (x, y) = draw(key), most[0].tolist()
    # Whether even the corner moved furthest stays outside of the line through its neighbours,
    # x / (width - 1 - x) + y / (height - 1 - y) < 1: there is no loop to compile then.
    if x * (height - 1 - y) + y * (width - 1 - x) < (width - 1 - x) * (height - 1 - y):
        return first
    return jax.lax.while_loop(
        lambda state: _three_on_a_line(state[1]),
        lambda state: (jax.random.fold_in(state[0], 1), draw(jax.random.fold_in(state[0], 0))),
        (key, first))[1]


def _three_on_a_line(corners):
    """Whether any three of four corners, [4, 2] integers, are."""
    sides = jnp.roll(corners, -1, axis=0) - corners
    following = jnp.roll(sides, -1, axis=0)
    return jnp.any(sides[:, 0] * following[:, 1] == sides[:, 1] * following[:, 0])


def random_perspective(
    key: jax.Array, image: jax.Array, *, distortion: float = 0.5, probability: float = 0.5
) -> jax.Array:
    """The image in a random perspective with some probability, otherwise as it is.

    torchvision's ``RandomPerspective``; see :func:`random_corners` for the perspective and
    :func:`warp_perspective` for how pixels are read.

    Args:
      key: a PRNG key.
      image: [H, W, channels] in [0, 1], where the result stays too; H and W at least 2.
      distortion: in [0, 1]. Up to 1/2 the moved corners always are those of a convex
        quadrilateral, within which no pixel is black; far beyond, they may cross over.
      probability: in [0, 1].

    Raises:
      InputError: (a ValueError) if a number is out of range, or ``image`` too small or of another
        rank.
    """
    _validate.in_range("probability", probability, 0, 1, open_high=False)
    size = _validate.shapes(image=(image, "H W channels"))
    apply_key, corners_key = jax.random.split(key)
    corners = random_corners(corners_key, size["H"], size["W"], distortion=distortion)
    # The identity reads every pixel at its centre: it gives the image itself, to the bit.
    return _warp(image, jnp.where(
        jax.random.bernoulli(apply_key, float(probability)),
        _perspective_matrix(corners, size["H"], size["W"]), _IDENTITY))


def _centres(height, width):
    """x [1, W] and y [H, 1] of the pixels' centres."""
    return (jnp.arange(width, dtype=jnp.float32)[None] + 0.5,
            jnp.arange(height, dtype=jnp.float32)[:, None] + 0.5)


def _fixed(value):
    """In multiples of 2^-16, int32."""
    return jnp.round(value * 2 ** 16).astype(jnp.int32)


def _inside(image, x, y):
    """[H, W], where points are in the image; False for NaN."""
    height, width, _ = image.shape
    return (x >= 0) & (x < width) & (y >= 0) & (y < height)


def _pixels(image, column, row):
    """[H, W, channels] at indices [H, W] that are known to be in the image."""
    return jnp.asarray(image).at[row, column].get(mode="promise_in_bounds")


def _neighbours(coordinate, size):
    """The pixels before and after a coordinate in [0, size), and how far it is between them."""
    # In steps of pixels from centre to centre.
    before = jnp.floor(coordinate - 0.5)
    part = coordinate - 0.5 - before
    before = before.astype(jnp.int32)
    return jnp.maximum(before, 0), jnp.minimum(before + 1, size - 1), part
