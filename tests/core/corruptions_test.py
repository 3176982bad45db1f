"""Corruptions: each against SciPy, Pillow, colorsys or plain NumPy, given the same draws."""

import colorsys
import functools
import io
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import scipy.ndimage
import scipy.stats
import sklearn.datasets
from hypothesis import strategies as st

from jaxrobust import InputError, corruptions, parallel
from jaxrobust.corruptions import CORRUPTIONS, blur, corruption, digital, jpeg, linear, weather
from jaxrobust.corruptions.parameters import parameters_for
from jaxrobust.perturbations import is_random, parse_perturbation, per_example

KEY = jax.random.key(5)
SEVERITIES = (1, 2, 3, 4, 5)
SIZE = 36, 32  # Of the shorter side of CIFAR's images, with its parameters.
UNORDERED = {"elastic_transform", "frost", "glass_blur", "pixelate", "saturate"}
"""Those whose published parameters do not move an image further from itself with each severity."""


@functools.cache
def photographs(number=2, height=36, width=32):
    """Parts of a photograph, reduced: [number, height, width, 3] in [0, 1], whole bytes."""
    image = PIL.Image.fromarray(sklearn.datasets.load_sample_image("china.jpg"))
    side = 2.5
    images = [image.resize((width, height), box=(
        40 + 150 * i, 30, 40 + 150 * i + side * 100 * width / height, 30 + side * 100))
        for i in range(number)]
    return jnp.asarray(np.stack([np.asarray(image) for image in images]) / 255, jnp.float32)


@functools.cache
def corrupted(name):
    """Both photographs at each severity, [5, 2, H, W, 3]."""
    return np.asarray(jax.jit(lambda key, images: jnp.stack([
        corruption(name, severity)(key, images) for severity in SEVERITIES]))(KEY, photographs()))


def own_key(index):
    return jax.random.fold_in(KEY, index)


def normal(key, shape):
    return np.asarray(jax.random.normal(key, shape, jnp.float32), np.float64)


def uniform(key, shape, low=0.0, high=1.0):
    return np.asarray(jax.random.uniform(key, shape, jnp.float32, low, high), np.float64)


# What each corruption is to be, in double precision: (key, image, *parameters) -> image.


def gaussian_noise(key, image, std):
    return image + std * normal(key, image.shape)


def speckle_noise(key, image, std):
    return image + image * std * normal(key, image.shape)


def impulse_noise(key, image, share):
    draws = uniform(key, image.shape)
    noisy = image.copy()
    noisy[draws < share] = 1
    noisy[draws < share / 2] = 0
    return noisy


def gaussian_blur(key, image, std):
    return scipy.ndimage.gaussian_filter(image, (std, std, 0), mode="nearest", truncate=4)


def defocus_blur(key, image, radius, smoothing):
    grid = np.hypot(*np.mgrid[-12:13, -12:13])
    disk = (grid <= radius + 1e-9) / np.sum(grid <= radius + 1e-9)
    side = np.exp(-0.5 * (np.arange(-1, 2) / smoothing) ** 2)
    kernel = scipy.ndimage.correlate(disk, np.outer(side, side) / side.sum() ** 2)
    return scipy.ndimage.correlate(image, kernel[..., None], mode="mirror")


def shuffled(image, shifts, largest):
    """Pixels copied one by one, from the last to the first, as a loop does it."""
    image, (height, width) = image.copy(), image.shape[:2]
    for row in range(height - largest, largest, -1):
        for column in range(width - largest, largest, -1):
            down, right = shifts[:, row, column]
            image[row, column] = image[row + down, column + right]
    return image


def glass_blur(key, image, std, largest, iterations):
    image = gaussian_blur(key, image, std)
    for own in jax.random.split(key, iterations):
        shifts = jax.random.randint(own, (2, *image.shape[:2]), -largest, largest, jnp.int32)
        image = shuffled(image, np.asarray(shifts), largest)
    return gaussian_blur(key, image, std)


def moved(image, radius, std, angle):
    taps = np.arange(2 * math.ceil(radius) + 1)
    weights = scipy.stats.norm.pdf(taps, scale=std)
    y, x = np.indices(image.shape[:2])
    total = 0
    for tap, weight in zip(taps, weights / weights.sum(), strict=True):
        down, right = (math.ceil(tap * side - 0.5) for side in (math.sin(angle), math.cos(angle)))
        total = total + weight * image[np.clip(y + down, 0, image.shape[0] - 1),
                                       np.clip(x + right, 0, image.shape[1] - 1)]
    return total


def motion_blur(key, image, radius, std):
    return moved(image, radius, std, uniform(key, (), -math.pi / 4, math.pi / 4))


def zoomed(image, factor):
    crops = [math.ceil(side / factor) for side in image.shape[:2]]
    firsts = [(side - crop) // 2 for side, crop in zip(image.shape, crops, strict=False)]
    part = image[firsts[0]:firsts[0] + crops[0], firsts[1]:firsts[1] + crops[1]]
    large = scipy.ndimage.zoom(part, (factor, factor, 1), order=1, mode="nearest")
    firsts = [(now - side) // 2 for now, side in zip(large.shape, image.shape, strict=True)]
    return large[firsts[0]:firsts[0] + image.shape[0], firsts[1]:firsts[1] + image.shape[1]]


def zoom_blur(key, image, end, step):
    zooms = [zoomed(image, factor) for factor in np.arange(1, end, step)]
    return np.mean([image, *zooms], axis=0)


def snow(key, image, mean, std, zoom, threshold, radius, motion, weight):
    flakes_key, angle_key = jax.random.split(key)
    flakes = zoomed(mean + std * normal(flakes_key, (*image.shape[:2], 1)), zoom)
    flakes = np.clip(np.where(flakes < threshold, 0, flakes), 0, 1)
    falling = moved(flakes, radius, motion,
                    uniform(angle_key, (), -0.75 * math.pi, -0.25 * math.pi))
    grey = np.asarray(image @ [0.299, 0.587, 0.114])[..., None]
    white = weight * image + (1 - weight) * np.maximum(image, 1.5 * grey + 0.5)
    return white + falling + np.rot90(falling, 2)


frost_texture = jax.jit(weather.frost_texture, static_argnums=(1, 2))
elastic_places = jax.jit(digital.elastic_places, static_argnums=(1, 2, 3, 4, 5))


def frost(key, image, weight, frosted):
    texture = np.asarray(frost_texture(key, *image.shape[:2]))[..., None]
    return weight * image + frosted * texture * [0.88, 0.96, 1.0]


def plasma(key, size, decay):
    """The diamond-square algorithm, point by point on a torus."""
    heights, step, amplitude = np.zeros((size, size)), size, 1.0
    draws = uniform(key, (size * size,), -1, 1)
    while step > 1:
        noise = amplitude * np.resize(draws[(size // step) ** 2:], (3, size // step, size // step))
        half = step // 2

        def mean(places):
            return np.mean([heights[row % size, column % size]  # noqa: B023
                            for row, column in places])

        for i in range(size // step):
            for j in range(size // step):
                y, x = i * step, j * step
                heights[y + half, x + half] = noise[0, i, j] + mean(
                    [(y, x), (y + step, x), (y, x + step), (y + step, x + step)])
        for i in range(size // step):
            for j in range(size // step):
                y, x = i * step, j * step
                heights[y, x + half] = noise[1, i, j] + mean(
                    [(y, x), (y, x + step), (y - half, x + half), (y + half, x + half)])
                heights[y + half, x] = noise[2, i, j] + mean(
                    [(y, x), (y + step, x), (y + half, x - half), (y + half, x + half)])
        step, amplitude = half, amplitude / decay ** 2
    heights -= heights.min()
    return heights / heights.max()


def fog(key, image, amount, decay):
    clouds = plasma(key, 64, decay)[:image.shape[0], :image.shape[1], None]
    return (image + amount * clouds) * image.max() / (image.max() + amount)


def by_hsv(image, change):
    return np.reshape([colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*pixel)))
                       for pixel in image.reshape(-1, 3)], image.shape)


def brightness(key, image, added):
    return by_hsv(image, lambda h, s, v: (h, s, min(v + added, 1)))


def saturate(key, image, factor, added):
    return by_hsv(image, lambda h, s, v: (h, min(max(s * factor + added, 0), 1), v))


def contrast(key, image, factor):
    means = [image[..., channel].mean() for channel in range(3)]
    return factor * image + (1 - factor) * np.array(means)


def elastic_transform(key, image, alpha, std, affine):
    height, width, _ = image.shape
    matrix, (dy, dx) = (np.asarray(part, np.float64) for part in elastic_places(
        key, height, width, alpha, std, affine))
    y, x = np.mgrid[:height, :width]
    mapped_x, mapped_y, _ = np.tensordot(
        np.vstack([matrix, [0, 0, 1]]), [x, y, np.ones_like(x)], 1)

    def sampled(image, *places, mode):
        return np.stack([scipy.ndimage.map_coordinates(channel, places, order=1, mode=mode)
                         for channel in np.moveaxis(image, -1, 0)], axis=-1)

    mapped = sampled(image, mapped_y, mapped_x, mode="mirror")
    return sampled(mapped, y + dy, x + dx, mode="reflect")


def pixelate(key, image, factor):
    height, width, _ = image.shape

    def resized(channel, size):
        return PIL.Image.fromarray(channel).resize(size, PIL.Image.Resampling.BOX)

    return np.stack([resized(np.asarray(resized(
        channel, (int(width * factor), int(height * factor)))), (width, height))
        for channel in np.moveaxis(image.astype(np.float32), -1, 0)], axis=-1)


def spatter(key, image, mean, std, smoothing, threshold, strength, mud):
    noise = mean + std * normal(key, image.shape[:2])
    liquid = scipy.ndimage.gaussian_filter(noise, smoothing, mode="nearest", truncate=4)
    inside = liquid >= threshold
    if mud:
        cover = scipy.ndimage.gaussian_filter(
            inside.astype(float), strength, mode="nearest", truncate=4)[..., None]
        cover = np.where(cover < 0.8, 0, cover)
        return (1 - cover) * image + cover * np.array([63, 42, 20]) / 255
    border = inside & ~scipy.ndimage.binary_erosion(inside, border_value=1)
    distances = np.minimum(scipy.ndimage.distance_transform_edt(~border), 20)

    def mean3(values):
        return scipy.ndimage.uniform_filter(values, 3, mode="mirror")

    steps = np.floor(mean3(distances) + 1e-4)
    counts = np.cumsum(np.bincount(steps.astype(int).ravel(), minlength=256))
    first = counts[counts > 0][0]
    equalised = np.round((counts[steps.astype(int)] - first) * 255 / (steps.size - first))
    light = scipy.ndimage.correlate(
        equalised, np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]]), mode="mirror")
    water = np.floor(255 * liquid) * inside * np.round(mean3(np.clip(light, 0, 255)))
    return image + strength * (water / water.max())[..., None] * np.array([175, 238, 238]) / 255


REFERENCES = {function.__name__: function for function in (
    gaussian_noise, impulse_noise, speckle_noise, defocus_blur, glass_blur, motion_blur, zoom_blur,
    gaussian_blur, snow, frost, fog, brightness, contrast, elastic_transform, pixelate, spatter,
    saturate)}


@pytest.mark.parametrize("name", REFERENCES)
def test_corruption_is_the_reference_given_the_same_draws(name):
    for severity, results in zip(SEVERITIES, corrupted(name), strict=True):
        for index, (image, result) in enumerate(zip(photographs(), results, strict=True)):
            expected = REFERENCES[name](own_key(index), np.asarray(image, np.float64),
                                        *parameters_for(name, severity, *SIZE))
            # A whole step of water's shading may round otherwise.
            np.testing.assert_allclose(
                result, np.clip(expected, 0, 1), atol=5e-3 if name == "spatter" else 2e-5)


def test_every_corruption_is_held_to_something():
    assert {*CORRUPTIONS} - {*REFERENCES} == {"shot_noise", "jpeg_compression"}
    assert len(CORRUPTIONS) == 19 and len(corruptions.BENCHMARK) == 15
    assert corruptions.ALEXNET_ERRORS.keys() == {*corruptions.BENCHMARK}


def test_shot_noise_is_a_poisson_count_of_photons():
    values = np.array([0, 0.05, 0.3, 1], np.float32)
    images = jnp.broadcast_to(values[None, :, None, None], (1, 4, 4000, 1))
    for severity, photons in ((1, 500), (5, 50)):
        draws = np.asarray(corruption("shot_noise", severity)(KEY, images))[0, :, :, 0] * photons
        counts = np.rint(draws)
        np.testing.assert_allclose(draws, counts, atol=1e-3)
        assert np.all(counts[0] == 0)
        for value, row in zip(values[1:3], counts[1:3], strict=True):
            quantiles = scipy.stats.poisson(value * photons).ppf([0.1, 0.5, 0.9])
            shares = [np.mean(row <= quantile) for quantile in quantiles]
            np.testing.assert_allclose(
                shares, scipy.stats.poisson(value * photons).cdf(quantiles), atol=0.03)
        assert np.all(counts[3] <= photons)  # Clipped to white.


def pillow_jpeg(image, quality):
    file = io.BytesIO()
    image = np.asarray(np.rint(np.asarray(image) * 255), np.uint8)
    PIL.Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(
        file, "JPEG", quality=quality)
    return np.asarray(PIL.Image.open(file)).reshape(image.shape)


@pytest.mark.parametrize(("quality", "shape"), [
    (80, (36, 32, 3)), (40, (35, 33, 3)), (7, (45, 50, 3)), (58, (13, 9, 1))])
def test_jpeg_is_pillows(quality, shape):
    images = photographs(3, *shape[:2])[..., :shape[2]]
    results = np.asarray(jax.jit(jax.vmap(
        lambda image: jpeg.jpeg_compression(KEY, image, quality)))(images)) * 255
    apart = np.abs(results - np.stack([pillow_jpeg(image, quality) for image in images]))
    # libjpeg's DCT is of integers: now and then a coefficient of a block is rounded otherwise.
    assert np.mean(apart < 0.01) > 0.95 and np.mean(apart < 1.01) > 0.98 and apart.max() < 12
    assert np.mean(apart) < 0.1


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_results_are_images_and_no_nearer_to_the_clean_ones_with_each_severity(name):
    results = corrupted(name)
    assert results.dtype == np.float32 and np.all(np.isfinite(results))
    assert results.min() >= 0 and results.max() <= 1
    distances = np.sqrt(np.mean((results - np.asarray(photographs())) ** 2, axis=(1, 2, 3, 4)))
    assert np.all(distances > 0)
    assert name in UNORDERED or (np.all(np.diff(distances) > -1e-4)
                                 and distances[4] > 1.1 * distances[0])


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_depends_on_its_own_key_alone(name):
    corrupt, images = corruption(name, 3), photographs()

    @jax.jit
    def results(key, images):
        return (corrupt(jax.random.fold_in(key, 7), images[1:]),
                per_example(corrupt, key, images[jnp.array([1, 0, 1])], jnp.array([7, 0, 7])))

    (alone,), in_batch = results(KEY, images)
    np.testing.assert_allclose(in_batch[0], alone, atol=1e-5)
    np.testing.assert_allclose(in_batch[2], alone, atol=1e-5)
    assert is_random(corrupt) == (np.max(np.abs(alone - corrupted(name)[2, 1])) > 1e-5)


def test_an_eager_call_is_the_compiled_one():
    for name in ("contrast", "impulse_noise"):
        result = corruption(name, 5)(KEY, photographs())
        np.testing.assert_allclose(result, corrupted(name)[4], atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 8, 8, 1), (1, 50, 40, 3), (1, 224, 224, 3), (1, 9, 300, 1)])
def test_images_of_any_size_keep_their_shape_and_dtype(shape):
    for name in CORRUPTIONS:
        if name == "saturate" and shape[-1] == 1:
            continue
        for severity in (1, 5):
            images = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
            result = jax.eval_shape(corruption(name, severity), KEY, images)
            assert (result.shape, result.dtype) == (shape, jnp.bfloat16)


def test_double_precision_is_kept():
    with jax.enable_x64(True):
        images = jax.ShapeDtypeStruct((1, 20, 16, 3), jnp.float64)
        for name in CORRUPTIONS:
            for severity in (2, 5):
                result = jax.eval_shape(corruption(name, severity), KEY, images)
                assert (result.shape, result.dtype) == (images.shape, images.dtype), name


@pytest.mark.parametrize("name", ["motion_blur", "fog"])
def test_devices_share_images_and_change_nothing(name):
    images, indices = jnp.concatenate([photographs(), photographs()]), jnp.arange(4)

    def corrupt(key, rows):
        return per_example(corruption(name, 3), key, *rows)

    layout = parallel.make_layout("mesh", jax.devices()[:4])
    shared = jax.jit(parallel.map_examples(layout, corrupt))(
        parallel.replicate(layout, KEY), parallel.place_batch(layout, (images, indices), 4))
    np.testing.assert_allclose(shared, jax.jit(corrupt)(KEY, (images, indices)), atol=1e-5)


def test_tiny_grey_images_are_corrupted():
    images = photographs(1, 8, 8)[..., :1]
    names = [name for name in CORRUPTIONS if name != "saturate"]
    results = jax.jit(lambda key, images: [corruption(name, 4)(key, images) for name in names])(
        KEY, images)
    for name, result in zip(names, results, strict=True):
        assert np.all(np.isfinite(result)) and np.any(result != images), name
        assert np.min(result) >= 0 and np.max(result) <= 1, name


def test_black_and_plain_images_stay_finite():
    images = jnp.stack([jnp.zeros((16, 16, 3)), jnp.full((16, 16, 3), 0.5), jnp.ones((16, 16, 3))])
    names = ["brightness", "saturate", "fog", "contrast", "jpeg_compression", "spatter"]
    results = jax.jit(lambda key, images: [corruption(name, 3)(key, images) for name in names])(
        KEY, images)
    assert np.all(np.isfinite(results))
    np.testing.assert_allclose(results[0][0], 0.15, atol=1e-6)


def test_saturation_needs_colour():
    with pytest.raises(InputError) as caught:
        corruption("saturate", 1)(KEY, jnp.zeros((1, 8, 8, 1)))
    assert str(caught.value) == "Expected images of 3 channels for saturate, got 1."
    with pytest.raises(InputError, match="Expected images of 1 or 3 channels for fog, got 2"):
        corruption("fog", 1)(KEY, jnp.zeros((1, 8, 8, 2)))


@pytest.mark.parametrize("images, message", [
    (jnp.zeros((1, 8, 8, 3), jnp.uint8), "of a floating dtype"),
    (jnp.zeros((8, 8, 3)), r"of shape \[B, H, W, channels\]")])
def test_what_are_no_images_is_named(images, message):
    with pytest.raises(InputError, match=message):
        corruption("contrast", 1)(KEY, images)


def test_corruptions_have_names_in_texts():
    composed = parse_perturbation("fog(3)+gaussian(0.1)")
    assert composed.args[0][0].func == corruption("fog", 3).func
    assert {*CORRUPTIONS} <= {*corruptions.MAKERS}
    assert not is_random(parse_perturbation("pixelate(severity=2)+defocus_blur(1)"))
    for text, message in (
            ("fog(6)", "Expected severity=6 in [1, 5]. It is in perturbation='fog(6)'."),
            ("snow", "Expected snow(severity: int) in perturbation='snow': missing a required"),
            ("snow(1.5)", "Expected severity=1.5 to be an integer >= 1.")):
        with pytest.raises(InputError) as caught:
            parse_perturbation(text)
        assert message in str(caught.value)
    with pytest.raises(InputError, match="Did you mean 'frost'"):
        corruption("forst", 1)


def test_equal_corruptions_are_one_program():
    assert jax.tree.structure(corruption("fog", 3)) == jax.tree.structure(corruption("fog", 3))
    assert corruption("fog", 3).func.origin == "generated"


def test_parameters_are_cifars_imagenets_and_between_them_near_those_of_tiny_imagenet():
    for size in ((8, 8), (32, 90)):
        assert parameters_for("motion_blur", 5, *size) == (9, 2.5)
    for size in ((224, 224), (400, 500)):
        assert parameters_for("motion_blur", 5, *size) == (20, 15)
    # The training noise of the paper is severity 2.
    assert parameters_for("gaussian_noise", 2, 32, 32)[0] * 255 == pytest.approx(15.3)
    tiny = {"gaussian_noise": (.04, .08, .12, .15, .18), "shot_noise": (250, 100, 50, 30, 15),
            "impulse_noise": (.01, .02, .05, .08, .14), "gaussian_blur": (.5, .75, 1, 1.25, 1.5),
            "pixelate": (.9, .8, .7, .6, .5), "jpeg_compression": (65, 58, 50, 40, 25)}
    for name, values in tiny.items():
        ours = [parameters_for(name, severity, 64, 64)[0] for severity in SEVERITIES]
        assert np.median(np.abs(np.log(np.divide(ours, values)))) < 0.2, name


@pytest.mark.parametrize(("size", "factor"), [(36, 1.01), (32, 1.26), (224, 4.5), (9, 2.25)])
def test_zooms_are_scipys(size, factor):
    line = np.random.default_rng(0).uniform(size=(size, 1, 1))
    np.testing.assert_allclose(
        linear.zoom_matrix(size, factor) @ line[:, 0], zoomed(
            np.broadcast_to(line, (size, size, 1)), factor)[:, 0], atol=1e-12)


@pytest.mark.parametrize(("size", "resized"), [(32, 30), (32, 20), (224, 56), (20, 32), (7, 50)])
def test_boxes_are_pillows(size, resized):
    line = np.random.default_rng(0).uniform(size=(1, size)).astype(np.float32)
    expected = PIL.Image.fromarray(line).resize((resized, 1), PIL.Image.Resampling.BOX)
    np.testing.assert_allclose(
        line @ linear.box_matrix(size, resized).T, np.asarray(expected), atol=1e-6)


@pytest.mark.parametrize("std", [0.3, 2.0, 170.0])
def test_gaussian_matrices_reflect_as_scipy_does(std):
    line = np.random.default_rng(0).uniform(size=40)
    matrix = linear.gaussian_matrix(40, std, radius=int(3 * std + 0.5), border=linear.reflect)
    np.testing.assert_allclose(matrix @ line, scipy.ndimage.gaussian_filter1d(
        line, std, mode="reflect", truncate=3), atol=1e-12)


@hypothesis.given(size=st.integers(1, 70), factor=st.floats(1, 5), std=st.floats(0.01, 40))
def test_linear_maps_are_means(size, factor, std):
    fewer = max(int(size / factor), 1)
    for matrix in (linear.zoom_matrix(size, factor), linear.box_matrix(size, fewer),
                   *(linear.gaussian_matrix(size, std, radius=int(4 * std + 0.5), border=border)
                     for border in (linear.nearest, linear.reflect, linear.mirror))):
        assert matrix.shape[1] == size and matrix.min() >= 0
        np.testing.assert_allclose(matrix.sum(axis=1), 1, rtol=1e-12)


@pytest.mark.parametrize("largest", [1, 2, 4])
def test_shuffles_of_far_pixels_are_those_of_a_loop(largest):
    shifts = jax.random.randint(KEY, (2, 30, 23), -largest, largest, jnp.int32)
    image = np.arange(30 * 23).reshape(30, 23, 1)
    sources = jax.jit(blur.shuffle_sources, static_argnums=1)(shifts, largest)
    np.testing.assert_array_equal(
        np.ravel(image)[np.asarray(sources)],
        shuffled(image, np.asarray(shifts), largest).ravel())


def test_wide_disks_are_convolved():
    image = photographs(1, 64, 64)[0]
    kernel = blur.defocus_kernel(6, 0.5)
    assert kernel.shape == (15, 15) and kernel.size > blur._FEW_TAPS
    np.testing.assert_allclose(
        jax.jit(blur.defocus_blur, static_argnums=(2, 3))(KEY, image, 6, 0.5),
        defocus_blur(KEY, np.asarray(image, np.float64), 6, 0.5), atol=1e-5)


def test_the_affine_map_takes_its_shifted_points_back():
    matrix, displacements = elastic_places(KEY, 32, 48, 0.05, 0.2, 0.07)
    shifts = uniform(jax.random.split(KEY, 3)[0], (3, 2), -0.07 * 32, 0.07 * 32)
    corners = np.array([[34, 26], [34, 6], [14, 6]])
    back = (corners + shifts) @ np.asarray(matrix)[:, :2].T + np.asarray(matrix)[:, 2]
    np.testing.assert_allclose(back, corners, atol=1e-3)
    assert displacements.shape == (2, 32, 48) and np.std(displacements) > 0


def test_frost_has_the_mean_and_contrast_of_ice_on_a_window():
    textures = np.stack([frost_texture(jax.random.key(seed), 36, 32) for seed in range(6)])
    assert textures.min() >= 0 and textures.max() <= 1
    assert 0.35 < textures.mean() < 0.6 and np.all(textures.std(axis=(1, 2)) > 0.1)


def test_large_images_are_corrupted_as_small_ones():
    image = photographs(1, 224, 224)
    zoom, blurred = jax.jit(lambda key, image: (
        corruption("zoom_blur", 5)(key, image), corruption("motion_blur", 5)(key, image)))(
            KEY, image)
    np.testing.assert_allclose(zoom[0], zoom_blur(KEY, np.asarray(
        image[0], np.float64), 1.31, 0.03), atol=1e-5)
    np.testing.assert_allclose(blurred[0], motion_blur(own_key(0), np.asarray(
        image[0], np.float64), 20, 15), atol=1e-5)
