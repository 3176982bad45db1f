"""Jitter, rotation and perspective against Pillow, NumPy and SciPy, and how they are drawn."""

import functools
import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from jaxrobust._validate import InputError
from jaxrobust.data import augment, geometric, photometric
from jaxrobust.perturbations import gaussian, identity

SHAPES = [(12, 17, 3), (15, 10, 1), (9, 9, 3), (8, 8, 1)]  # not square, odd and even, grey
ADJUST = {"brightness": ImageEnhance.Brightness, "contrast": ImageEnhance.Contrast,
          "saturation": ImageEnhance.Color}
COMPILED = {name: jax.jit(functools.partial(photometric.adjust, name=name)) for name in ADJUST}

rotate = jax.jit(geometric.rotate)
warp_by_matrix = jax.jit(geometric.warp_perspective)
matrix_of = jax.jit(geometric.perspective_matrix, static_argnums=(1, 2))


def warp(image, coefficients):
    """By Pillow's coefficients (a, ..., h), with 1 for i."""
    return warp_by_matrix(image, jnp.append(coefficients, np.float32(1)).reshape(3, 3))


def coefficients_of(corners, height, width):
    matrix = matrix_of(corners, height, width)
    return (matrix / matrix[2, 2]).ravel()[:8]


def image_of(shape, seed=0):
    """Float32 values that are not 0, so that black comes from outside alone."""
    return np.random.default_rng(seed).uniform(0.1, 1, shape).astype(np.float32)


def pixels_of(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def over_keys(function, image, count, seed=0):
    keys = jax.random.split(jax.random.key(seed), count)
    return np.asarray(jax.jit(jax.vmap(function, in_axes=(0, None)))(keys, jnp.asarray(image)))


def ramps(height, width):
    """Each pixel's own centre (x, y), so that a result tells where it was read."""
    rows, columns = np.mgrid[:height, :width] + 0.5
    return np.stack([columns, rows], axis=-1).astype(np.float32)


def is_uniform(draws, low, high):
    """Kolmogorov-Smirnov: the distance passes 2 / sqrt(N) once in 1500 samples."""
    cumulative = (np.sort(draws) - low) / (high - low)
    steps = np.arange(len(draws) + 1) / len(draws)
    distance = max(np.max(steps[1:] - cumulative), np.max(cumulative - steps[:-1]))
    return distance < 2 / len(draws) ** 0.5


# --- colour -----------------------------------------------------------------------------------


def reference_adjustment(name, image, factor):
    """In double precision, from the definitions."""
    image = np.asarray(image, np.float64)
    grey = image if image.shape[-1] == 1 else image @ np.array([[0.2989], [0.587], [0.114]])
    other = {"brightness": 0, "contrast": grey.mean(), "saturation": grey}[name]
    return np.clip(factor * image + (1 - factor) * other, 0, 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ADJUST)
def test_an_adjustment_is_pillows_but_for_its_rounding(name, channels):
    pixels = pixels_of((24, 31, channels))
    picture = Image.fromarray(pixels if channels == 3 else pixels[..., 0])
    for factor in (0.0, 0.7, 1.0, 1.3, 2.0):
        image = pixels.astype(np.float32) / 255
        result = COMPILED[name](image, factor)
        assert result.dtype == jnp.float32 and result.shape == pixels.shape
        np.testing.assert_allclose(
            result, reference_adjustment(name, image, factor), atol=1e-6)
        # Pillow truncates, and rounds the grey that it blends with.
        theirs = np.asarray(ADJUST[name](picture).enhance(factor)).reshape(pixels.shape)
        difference = 255 * np.asarray(result) - theirs
        assert difference.min() > -0.6 and difference.max() < 1.6


@pytest.mark.parametrize("name", ADJUST)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_factor_1_leaves_the_image_as_it_is(name, channels):
    image = image_of((7, 5, channels))
    np.testing.assert_array_equal(COMPILED[name](image, 1.0), image)


STRENGTHS = {"brightness": 0.3, "contrast": 0.2, "saturation": 0.6}
draw_factors = jax.jit(jax.vmap(functools.partial(photometric.random_factors, **STRENGTHS)))


def test_factors_are_uniform_around_1_and_every_order_is_equally_likely():
    count = 1800
    orders, factors = map(np.asarray, draw_factors(jax.random.split(jax.random.key(0), count)))
    assert factors.dtype == np.float32
    for strength, draws in zip(STRENGTHS.values(), factors.T, strict=True):
        assert is_uniform(draws, 1 - strength, 1 + strength)
    for one, other in itertools.combinations(range(3), 2):
        assert abs(np.corrcoef(factors[:, one], factors[:, other])[0, 1]) < 0.1
    found, counts = np.unique(orders, axis=0, return_counts=True)
    assert {tuple(order) for order in found.tolist()} == set(itertools.permutations(range(3)))
    # Each count is binomial with mean 300 and standard deviation 16.
    assert np.all(np.abs(counts - count / 6) < 80)


def test_a_factor_is_never_negative():
    factors = jax.vmap(lambda key: photometric.random_factors(
        key, brightness=3.0, contrast=0.0, saturation=1.0)[1])(
            jax.random.split(jax.random.key(0), 500))
    assert is_uniform(np.asarray(factors)[:, 0], 0, 4)
    assert np.all(factors[:, 1] == 1)
    assert is_uniform(np.asarray(factors)[:, 2], 0, 2)


@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_applies_the_drawn_factors_in_the_drawn_order(channels):
    image, count = image_of((6, 7, channels)), 40
    keys = jax.random.split(jax.random.key(1), count)
    results = over_keys(functools.partial(photometric.color_jitter, **STRENGTHS), image, count, 1)
    orders, factors = draw_factors(keys)
    assert len(np.unique(orders, axis=0)) == 6
    for result, order, of_each in zip(results, orders, factors, strict=True):
        expected = image
        for which in order:
            expected = reference_adjustment(
                photometric.ADJUSTMENTS[which], expected, float(of_each[which]))
        np.testing.assert_allclose(result, expected, atol=2e-6)


# --- rotation ---------------------------------------------------------------------------------


def rotated_points(height, width, angle):
    """Where the pixels of a rotated image are read, x and y, in double precision."""
    rows, columns = np.mgrid[:height, :width] + 0.5
    offset = (columns - width / 2) + 1j * (rows - height / 2)
    # With y down, a positive angle turns the points read clockwise, the image the other way.
    turned = offset * np.exp(1j * np.radians(angle))
    return turned.real + width / 2, turned.imag + height / 2


def assert_rotated_as_by_pillow(image, angle):
    result = np.asarray(rotate(image, np.float32(angle)))
    assert result.dtype == np.float32
    theirs = np.stack([np.asarray(Image.fromarray(plane).rotate(angle, Image.Resampling.NEAREST))
                       for plane in np.moveaxis(image, -1, 0)], axis=-1)
    differ = np.any(result != theirs, axis=-1)
    # Both round the map: a point on the edge of a pixel may be taken for either side's.
    points = np.stack(rotated_points(*image.shape[:2], angle))
    assert not np.any(differ & np.all(np.abs(points - np.rint(points)) > 0.02, axis=0))
    return differ.mean()


def test_a_large_image_is_rotated_as_by_pillow():
    image = image_of((400, 500, 1))
    assert max(assert_rotated_as_by_pillow(image, angle) for angle in (-10.0, 1.7, 8.9)) < 2e-4


@hypothesis.settings(max_examples=60)
@hypothesis.given(st.sampled_from(SHAPES), st.floats(-180, 180, width=32), st.integers(0, 99))
def test_rotation_by_any_angle_is_pillows(shape, angle, seed):
    assert_rotated_as_by_pillow(image_of(shape, seed), angle)


@pytest.mark.parametrize("size", [6, 7])
def test_quarter_turns_are_counter_clockwise_and_exact(size):
    image = image_of((size, size, 3))
    for quarters in range(-3, 5):
        np.testing.assert_array_equal(rotate(image, 90.0 * quarters), np.rot90(image, quarters))


def test_random_rotations_are_uniform_in_both_directions():
    count, size = 400, 41
    results = over_keys(functools.partial(geometric.random_rotation, degrees=25),
                        ramps(size, size), count)
    offsets = (ramps(size, size) - size / 2) @ [1, 1j]
    angles = []
    for result in results:
        read = (result - size / 2) @ [1, 1j]
        inside = result[..., 0] > 0
        angles.append(np.degrees(np.angle(np.vdot(offsets[inside], read[inside]))))
    assert is_uniform(np.array(angles), -25, 25)


def test_the_angle_0_is_the_image_itself():
    image = image_of((6, 7, 3))
    results = over_keys(functools.partial(geometric.random_rotation, degrees=0), image, 3)
    np.testing.assert_array_equal(results, np.broadcast_to(image, results.shape))


# --- perspective ------------------------------------------------------------------------------


def corners_of(height, width):
    return np.array([[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]])


def inward_moves(corners, height, width):
    """How far corners moved towards the centre, along x and y."""
    return (corners - corners_of(height, width)) * np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])


def drawn_corners(seed, height, width, distortion=0.5):
    """As the documentation of torchvision has it, by NumPy."""
    most = int(distortion * (width // 2)), int(distortion * (height // 2))
    moves = np.random.default_rng(seed).integers(0, np.array(most) + 1, (4, 2))
    return corners_of(height, width) + moves * np.sign([width, height] - 2 * corners_of(
        height, width))


def equations_of(given, read):
    """The 8 x 8 system of the perspective that takes four points to four others."""
    equations, values = [], []
    for (x, y), (u, v) in zip(given, read, strict=True):
        equations += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return np.array(equations, float), np.array(values, float)


def solved_coefficients(corners, height, width):
    """In double precision: each moved corner is read at the corner."""
    return np.linalg.solve(*equations_of(corners, corners_of(height, width)))


def warped_points(coefficients, height, width):
    """Where pixels are read, (x, y), and the denominators; in double precision."""
    a, b, c, d, e, f, g, h = np.asarray(coefficients, np.float64)
    rows, columns = np.mgrid[:height, :width] + 0.5
    below = g * columns + h * rows + 1
    points = np.stack([a * columns + b * rows + c, d * columns + e * rows + f]) / below
    return points, below


def far_from_the_border(points, height, width, distance=0.001):
    return np.all([np.minimum(np.abs(point), np.abs(point - size)) > distance
                   for point, size in zip(points, (width, height), strict=True)], axis=0)


@pytest.mark.parametrize("shape", [*SHAPES, (400, 500, 1)])
def test_a_warped_image_is_pillows(shape):
    image = image_of(shape)
    height, width, _ = shape
    for seed in range(3):
        coefficients = solved_coefficients(drawn_corners(seed, height, width), height, width)
        result = warp(image, coefficients.astype(np.float32))
        assert result.dtype == jnp.float32
        theirs = np.stack([np.asarray(Image.fromarray(plane).transform(
            (width, height), Image.Transform.PERSPECTIVE, coefficients,
            Image.Resampling.BILINEAR)) for plane in np.moveaxis(image, -1, 0)], axis=-1)
        assert 0.2 < np.mean(theirs != 0) < 1
        # At the border a point is inside for one and outside for the other.
        clear = far_from_the_border(warped_points(coefficients, height, width)[0], height, width)
        assert clear.mean() > 0.9
        np.testing.assert_allclose(np.asarray(result)[clear], theirs[clear], atol=5e-4)


@hypothesis.settings(max_examples=60)
@hypothesis.given(st.sampled_from(SHAPES), st.integers(0, 10_000), st.floats(0, 1))
def test_warping_interpolates_as_scipy_between_the_borders_and_is_black_beyond(
        shape, seed, distortion):
    image = image_of(shape, seed)
    height, width, channels = shape
    corners = drawn_corners(seed, height, width, distortion)
    coefficients = np.asarray(coefficients_of(corners, height, width))
    hypothesis.assume(np.all(np.abs(coefficients) < 100))
    points, below = warped_points(coefficients, height, width)
    x, y = points
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    expected = np.stack([scipy.ndimage.map_coordinates(
        image[..., channel].astype(np.float64), [y - 0.5, x - 0.5], order=1, mode="nearest")
        for channel in range(channels)], axis=-1) * inside[..., None]
    # A small denominator magnifies the rounding of its terms.
    clear = far_from_the_border(points, height, width) & (np.abs(below) > 0.05)
    np.testing.assert_allclose(
        np.asarray(warp(image, coefficients))[clear], expected[clear], atol=5e-4)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 14), (32, 32), (400, 500)])
def test_coefficients_solve_the_eight_equations(height, width):
    for seed in range(20):
        corners = drawn_corners(seed, height, width)
        coefficients = coefficients_of(corners, height, width)
        assert coefficients.dtype == jnp.float32
        expected = solved_coefficients(corners, height, width)
        # What counts is where pixels are read, in pixels.
        points, reference = (warped_points(each, height, width)[0]
                             for each in (coefficients, expected))
        inside = np.all((reference > 0) & (reference < np.reshape([width, height], (2, 1, 1))),
                        axis=0)
        assert inside.any()
        np.testing.assert_allclose(points[:, inside], reference[:, inside], atol=1e-3)


def test_corners_move_inwards_by_whole_pixels_up_to_the_distortion():
    height, width, distortion = 20, 31, 0.5
    draws = np.asarray(jax.jit(jax.vmap(lambda key: geometric.random_corners(
        key, height, width, distortion=distortion)))(jax.random.split(jax.random.key(0), 2000)))
    assert draws.dtype == np.int32
    inwards = inward_moves(draws, height, width)
    for axis, most in enumerate((7, 5)):  # int(0.5 * 15) and int(0.5 * 10)
        for corner in range(4):
            found, counts = np.unique(inwards[:, corner, axis], return_counts=True)
            np.testing.assert_array_equal(found, np.arange(most + 1))
            expected = 2000 / (most + 1)
            assert np.all(np.abs(counts - expected) < 5 * expected ** 0.5)
    moves = inwards.reshape(2000, 8)
    assert np.max(np.abs(np.corrcoef(moves.T) - np.eye(8))) < 0.1  # each on its own


def fitted_corners(result, height, width):
    """The moved corners of a warped image of :func:`ramps`, by least squares."""
    points, read = ramps(height, width).astype(np.float64), np.asarray(result, np.float64)
    # Linear interpolation keeps the ramps but in the outer half of the border pixels.
    inner = np.all((read > 0.6) & (read < np.array([width, height]) - 0.6), axis=-1)
    a, b, c, d, e, f, g, h = np.linalg.lstsq(*equations_of(read[inner], points[inner]))[0]
    return np.array([[(a * u + b * v + c) / (g * u + h * v + 1),
                      (d * u + e * v + f) / (g * u + h * v + 1)]
                     for u, v in corners_of(height, width)])


def test_random_perspectives_are_those_of_such_corners():
    height, width = 20, 31
    results = over_keys(functools.partial(geometric.random_perspective, probability=1),
                        ramps(height, width), 30)
    found = np.array([fitted_corners(result, height, width) for result in results])
    np.testing.assert_allclose(found, np.rint(found), atol=0.02)
    inwards = inward_moves(np.rint(found), height, width)
    assert np.all(inwards >= 0) and np.all(np.max(inwards, axis=(0, 1)) == [7, 5])
    assert len(np.unique(found.round().reshape(30, 8), axis=0)) == 30


@pytest.mark.parametrize("options", [{"probability": 0.0}, {"probability": 0.2}, {},
                                     {"probability": 1.0}])
def test_the_perspective_has_its_probability_and_otherwise_leaves_every_bit(options):
    image, count = image_of((9, 12, 3)), 500
    results = over_keys(functools.partial(geometric.random_perspective, **options), image, count)
    kept = np.mean(np.all(results == image, axis=(1, 2, 3)))
    probability = options.get("probability", 0.5)
    # One draw in 3^4 * 4^4 leaves all corners where they are.
    assert abs(1 - kept - probability) <= 4 * (probability * (1 - probability) / count) ** 0.5


@pytest.mark.parametrize("corners", [
    [[0, 0], [5, 0], [5, 0], [0, 7]], [[2, 2], [2, 2], [2, 2], [2, 2]],
    [[0, 0], [4, 4], [2, 2], [0, 4]]])
def test_where_corners_leave_no_perspective_the_image_is_black(corners):
    image = image_of((8, 6, 3))
    coefficients = coefficients_of(np.array(corners), 8, 6)
    assert not np.all(np.isfinite(coefficients))
    np.testing.assert_array_equal(warp(image, coefficients), 0)


def every_corners(height, width, distortion):
    """All that can be drawn, [K, 4, 2], and whether three of them are on a line, [K]."""
    most = int(distortion * (width // 2)), int(distortion * (height // 2))
    moves = np.stack(np.meshgrid(*[np.arange(m + 1) for m in most * 4], indexing="ij"), -1)
    corners = corners_of(height, width) + moves.reshape(-1, 4, 2) * np.array(
        [[1, 1], [-1, 1], [-1, -1], [1, -1]])
    areas = np.stack([np.linalg.det(np.concatenate(  # Of three corners, times two.
        [np.delete(corners, k, axis=1), np.ones((len(corners), 3, 1))], axis=2))
        for k in range(4)])
    return corners, np.any(np.abs(areas) < 0.5, axis=0)


@pytest.mark.parametrize(("size", "distortion", "degenerate"), [
    ((4, 4), 0.5, 1 / 16), ((8, 8), 0.5, 0), ((4, 8), 0.5, 0), ((5, 6), 0.5, 0),
    ((2, 2), 1.0, 29 / 32)])
def test_small_images_get_every_perspective_that_there_is(size, distortion, degenerate):
    every, bad = every_corners(*size, distortion)
    assert bad.mean() == degenerate
    if distortion == 0.5:  # Convex: every turn, from side to side, is to the same hand.
        sides = np.roll(every, -1, axis=1) - every
        (x, y), (u, v) = (np.moveaxis(each, -1, 0) for each in (sides, np.roll(sides, -1, axis=1)))
        assert np.all(bad | np.all(x * v - y * u > 0, axis=1))
    draws = np.asarray(jax.jit(jax.vmap(lambda key: geometric.random_corners(
        key, *size, distortion=distortion)))(jax.random.split(jax.random.key(0), 20_000)))
    found, counts = np.unique(draws.reshape(-1, 8), axis=0, return_counts=True)
    possible = {tuple(corners.ravel()) for corners in every[~bad]}
    assert possible.issuperset(map(tuple, found))
    if len(possible) < 500:
        expected = 20_000 / len(possible)
        assert len(found) == len(possible)
        assert np.all(np.abs(counts - expected) < 5 * expected ** 0.5)


@pytest.mark.parametrize("size", [(4, 4), (8, 8)])
def test_every_perspective_of_a_small_image_reads_where_double_precision_does(size):
    height, width = size
    every, bad = every_corners(*size, 0.5)
    every = every[~bad]
    # To the corners and back, by two solvers in double precision: the origin always goes to the
    # first corner, though nothing may come from it.
    forwards = np.array([np.append(np.linalg.solve(*equations_of(
        corners_of(*size), corners)), 1).reshape(3, 3) for corners in every])
    backwards = np.linalg.inv(forwards)
    last = np.abs(backwards[:, 2, 2]) / np.abs(backwards).max(axis=(1, 2))
    assert np.any(last < 1e-9)  # Coefficients with 1 in its place cannot express these.
    rows, columns = np.mgrid[:height, :width] + 0.5
    points = np.einsum("kij,jhw->kihw", backwards, np.stack([columns, rows, np.ones(size)]))
    with np.errstate(divide="ignore"):  # Of pixels on the horizon.
        points = points[:, :2] / points[:, 2:]
    inside = np.all((points >= 0) & (points < np.reshape([width, height], (2, 1, 1))), axis=1)
    clear = np.all([np.minimum(np.abs(points[:, k]), np.abs(points[:, k] - n)) > 1e-3
                    for k, n in enumerate((width, height))], axis=0)
    read = np.asarray(jax.jit(jax.vmap(lambda corners: geometric.warp_perspective(
        jnp.asarray(ramps(*size)), geometric.perspective_matrix(corners, *size))))(every))
    np.testing.assert_array_equal(np.any(read != 0, axis=-1)[clear], inside[clear])
    # Linear interpolation gives a ramp's value but in the outer half of the border pixels.
    limits = np.reshape([width, height], (2, 1, 1)) - 0.5
    expected = np.moveaxis(np.clip(points, 0.5, limits), 1, -1)
    np.testing.assert_allclose(read[inside & clear], expected[inside & clear], atol=1e-3)


@pytest.mark.parametrize("size", [(4, 4), (8, 8)])
def test_no_small_image_turns_black(size):
    results = over_keys(functools.partial(geometric.random_perspective, probability=1),
                        np.ones((*size, 1), np.float32), 20_000)
    # The corners move to (1, 1) .. (2, 2) or (2, 2) .. (5, 5) at most: this centre is between them.
    assert np.all(results[:, size[0] // 2 - 1, size[1] // 2 - 1] == 1)


@hypothesis.settings(max_examples=60)
@hypothesis.given(st.integers(0, 10_000), st.floats(0, 1), st.sampled_from([0.5, 0.9, 1.0]))
def test_interpolated_pixels_stay_in_range(seed, low, most):
    values = np.array([0, low, np.float32(1e-30), 1 - 2.0**-24, 1], np.float32)
    image = np.random.default_rng(seed).choice(values, (8, 8, 1))
    coefficients = coefficients_of(drawn_corners(seed, 8, 8, most), 8, 8)
    result = np.asarray(warp(image, coefficients))
    assert result.min() >= 0 and result.max() <= 1


# --- together ---------------------------------------------------------------------------------

photo = augment.photo_augmentation()
photos = jax.jit(jax.vmap(photo))


def test_the_steps_follow_each_other_as_in_the_paper():
    def steps(key, image):
        keys = jax.random.split(key, 4)
        image = photometric.color_jitter(
            keys[0], image, brightness=0.3, contrast=0.3, saturation=0.3)
        image = geometric.random_rotation(keys[1], image, degrees=10)
        image = geometric.random_perspective(keys[2], image, distortion=0.5, probability=0.5)
        return augment.random_flip(keys[3], image)

    images, composed = image_of((4, *SHAPES[0])), jax.jit(jax.vmap(steps))
    for seed in range(4):
        keys = jax.random.split(jax.random.key(seed), 4)
        np.testing.assert_array_equal(photos(keys, images), composed(keys, images))


def test_whole_batches_are_float32_in_range_and_the_same_as_image_by_image():
    shape = SHAPES[0]
    images = jnp.asarray(image_of((4, *shape)))
    keys = jax.random.split(jax.random.key(7), 4)
    together, single = photos(keys, images), jax.jit(photo)
    assert together.shape == images.shape and together.dtype == jnp.float32
    assert together.min() >= 0 and together.max() <= 1
    for key, image, result in zip(keys, images, together, strict=True):
        # A point on the border may be inside for one program and outside for the other.
        assert np.mean(np.abs(single(key, image) - result) > 1e-4) <= 1 / (shape[0] * shape[1])


def test_rotation_is_the_same_to_the_bit_without_jit():
    image = image_of((40, 53, 3))
    for angle in (-9.0, 2.5):
        np.testing.assert_array_equal(
            geometric.rotate(image, jnp.float32(angle)), rotate(image, angle))


def test_accelerators_get_the_perspective_without_a_loop(monkeypatch):
    image = jnp.asarray(image_of((12, 17, 3)))
    matrix = matrix_of(drawn_corners(1, 12, 17), 12, 17)
    programs = {}
    for backend in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        programs[backend] = jax.jit(lambda *args: geometric.warp_perspective(*args)).lower(
            image, matrix)
    assert "while" in programs["cpu"].as_text() and "while" not in programs["gpu"].as_text()
    np.testing.assert_allclose(*(program.compile()(image, matrix)
                                 for program in programs.values()), atol=1e-6)


def test_the_dtype_of_the_image_is_kept():
    images = image_of((4, *SHAPES[0]))
    keys = jax.random.split(jax.random.key(0), 4)
    result = photos(keys, jnp.asarray(images, jnp.bfloat16))
    assert result.dtype == jnp.bfloat16 and result.min() >= 0 and result.max() <= 1
    wide = photos(keys, images)
    assert np.mean(np.abs(result.astype(jnp.float32) - wide) > 0.03) < 0.01


def test_what_comes_in_from_outside_is_black_and_the_flip_can_be_left_out():
    # Brighter to the right, by more than the other steps can hide.
    image = np.broadcast_to(np.linspace(0.2, 0.8, 20, dtype=np.float32)[:, None], (16, 20, 1))
    for flip, directions in ((True, {-1.0, 1.0}), (False, {1.0})):
        results = over_keys(augment.photo_augmentation(flip=flip), image, 40)
        assert np.mean(results == 0) > 0.01
        left, right = (results[:, 6:10, columns].mean(axis=(1, 2, 3))
                       for columns in (slice(3, 8), slice(12, 17)))
        assert set(np.sign(right - left)) == directions


NOTHING = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "degrees": 0.0,
           "distortion": 0.0}


def test_all_steps_can_be_left_out():
    image = image_of((9, 12, 3))
    still = over_keys(augment.photo_augmentation(**NOTHING, flip=False), image, 3)
    np.testing.assert_allclose(still, np.broadcast_to(image, still.shape), atol=1e-6)


@pytest.mark.parametrize("name", NOTHING)
def test_each_step_has_its_strength(name):
    image = image_of((9, 12, 3))
    strength = 20.0 if name == "degrees" else 0.5
    moved = over_keys(augment.photo_augmentation(
        **{**NOTHING, name: strength}, perspective_probability=1.0, flip=False), image, 3)
    assert all(np.abs(result - image).max() > 0.01 for result in moved)


PIXELS = pixels_of((6, 9, 12, 3))
LABELS = np.array([0, 3, 1, 2, 2, 0], np.int32)


@functools.partial(jax.jit, static_argnames=("std", "independent_views"))
def batch_of(key, pixels, labels, positions=None, *, std=0.0, independent_views=False):
    return augment.make_batch(
        key, pixels, labels, positions=positions, augment=photo,
        perturb=gaussian(std) if std else identity(), independent_views=independent_views)


def test_a_batch_has_both_views_of_each_photo():
    key = jax.random.key(0)
    clean, noisy, labels = batch_of(key, PIXELS, LABELS, std=0.1)
    np.testing.assert_array_equal(labels, LABELS)
    assert clean.shape == PIXELS.shape and clean.dtype == jnp.float32
    assert np.all(np.any(np.abs(clean - PIXELS / 255.0) > 0.01, axis=(1, 2, 3)))
    assert 0.03 < np.std(noisy - clean) < 0.1 and noisy.min() >= 0 and noisy.max() <= 1
    apart = batch_of(key, PIXELS, LABELS, independent_views=True)
    np.testing.assert_allclose(apart.clean, clean, atol=1e-4)
    assert np.all(np.any(np.abs(apart.noisy - clean) > 0.01, axis=(1, 2, 3)))
    # A share of the batch has the randomness that it has in the whole.
    share = batch_of(key, PIXELS[2:4], LABELS[2:4], np.array([2, 3], np.int32), std=0.1)
    for view in ("clean", "noisy"):
        np.testing.assert_allclose(
            getattr(share, view), getattr(batch_of(key, PIXELS, LABELS, std=0.1), view)[2:4],
            atol=1e-4)


# --- errors -----------------------------------------------------------------------------------

KEY, IMAGE = jax.random.key(0), image_of((4, 5, 3))


@pytest.mark.parametrize(("call", "message"), [
    (lambda: augment.photo_augmentation(brightness=-0.1), "Expected brightness=-0.1 in [0, inf)."),
    (lambda: augment.photo_augmentation(contrast=-1), "Expected contrast=-1 in [0, inf)."),
    (lambda: augment.photo_augmentation(saturation=np.nan), "Expected saturation=nan in [0, inf)."),
    (lambda: augment.photo_augmentation(degrees=181), "Expected degrees=181 in [0, 180]."),
    (lambda: augment.photo_augmentation(distortion=1.1), "Expected distortion=1.1 in [0, 1]."),
    (lambda: augment.photo_augmentation(perspective_probability=-0.5),
     "Expected perspective_probability=-0.5 in [0, 1]."),
    (lambda: photometric.color_jitter(KEY, IMAGE, contrast=-0.1),
     "Expected contrast=-0.1 in [0, inf)."),
    (lambda: photometric.color_jitter(KEY, IMAGE[..., :2]),
     "Expected image with 1 or 3 channels, got 2."),
    (lambda: photometric.adjust(IMAGE[..., 0], 1.0, "contrast"),
     "Expected image of shape [H, W, channels], got (4, 5)."),
    (lambda: geometric.random_rotation(KEY, IMAGE, degrees=-1), "Expected degrees=-1 in [0, 180]."),
    (lambda: geometric.rotate(IMAGE[0], 1.0),
     "Expected image of shape [H, W, channels], got (5, 3)."),
    (lambda: geometric.rotate(np.zeros((40_000, 8, 1)), 1.0),
     "Expected height + width=40008 in [0, 32768)."),
    (lambda: geometric.random_perspective(KEY, IMAGE, distortion=-0.1),
     "Expected distortion=-0.1 in [0, 1]."),
    (lambda: geometric.random_perspective(KEY, IMAGE, probability=1.5),
     "Expected probability=1.5 in [0, 1]."),
    (lambda: geometric.random_perspective(KEY, IMAGE[:1]), "Expected height=1 in [2, inf)."),
    (lambda: geometric.random_perspective(KEY, IMAGE[:, :1]), "Expected width=1 in [2, inf)."),
    (lambda: geometric.warp_perspective(IMAGE, jnp.zeros(9)),
     "Expected matrix of shape [3, 3], got (9,)."),
    (lambda: geometric.perspective_matrix(jnp.zeros((2, 4)), 4, 5),
     "Expected corners of shape [4, 2], got (2, 4)."),
])
def test_what_cannot_be_used_is_named_in_one_line(call, message):
    with pytest.raises(InputError) as error:
        call()
    assert str(error.value) == message
