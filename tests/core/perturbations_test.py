"""Perturbations: their distribution, their range, and what their randomness depends on."""


import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from hypothesis import strategies as st

from jaxrobust import InputError
from jaxrobust.corruptions import CORRUPTIONS
from jaxrobust.data import make_batch
from jaxrobust.perturbations import (
    PERTURBATIONS,
    compose,
    down_up,
    gaussian,
    identity,
    is_random,
    laplace,
    occlusion,
    parse_perturbation,
    per_example,
    random_gaussian,
    salt_and_pepper,
    sometimes_gaussian,
    speckle,
    stripes,
    uniform,
)

CLIPPED = {"gaussian": gaussian, "uniform": uniform}
"""Noise with an option not to clip it."""
STRENGTHS = {**CLIPPED, "laplace": laplace, "speckle": speckle, "salt_and_pepper": salt_and_pepper,
             "sometimes_gaussian": sometimes_gaussian, "random_gaussian": random_gaussian}
EVERY = {**{name: make(0.3) for name, make in STRENGTHS.items()}, "identity": identity(),
         "occlusion": occlusion(3, 4), "stripes": stripes(2, 3), "down_up": down_up(2),
         "composed": compose(gaussian(0.1), occlusion(2, 3), down_up(3))}


def images_of(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(size=shape), jnp.float32)


# Perturbations are pytrees: one program for all strengths.
@jax.jit
def apply(perturb, key, images):
    return perturb(key, images)


apply_each = jax.jit(per_example)


@pytest.mark.parametrize("name", CLIPPED)
@pytest.mark.parametrize("clip", [True, False])
def test_noise_is_added_to_the_image_and_clipped(name, clip):
    images, key = images_of(2, 4, 4, 3), jax.random.key(1)
    result = CLIPPED[name](0.5, clip=clip)(key, images)
    draws = (jax.random.normal(key, images.shape) if name == "gaussian"
             else jax.random.uniform(key, images.shape, minval=-1, maxval=1))
    expected = np.asarray(images) + 0.5 * np.asarray(draws)
    assert expected.min() < 0 and expected.max() > 1
    np.testing.assert_allclose(result, np.clip(expected, 0, 1) if clip else expected, atol=1e-6)
    if clip:  # The default.
        np.testing.assert_array_equal(CLIPPED[name](0.5)(key, images), result)


@pytest.mark.parametrize("name", EVERY)
def test_shape_range_and_dtype_are_kept_and_the_key_decides(name):
    images, perturb = images_of(3, 12, 10, 3), EVERY[name]
    first, again, other = (apply(perturb, jax.random.key(seed), images) for seed in (0, 0, 1))
    chex.assert_trees_all_equal_shapes_and_dtypes(first, images)
    assert first.min() >= 0 and first.max() <= 1
    np.testing.assert_array_equal(first, again)
    assert is_random(perturb) == bool(np.any(first != other))
    if is_random(perturb):  # Images of one batch have randomness of their own.
        same = apply(perturb, jax.random.key(0), jnp.full(images.shape, 0.5))
        assert np.any(same[0] != same[1])


@pytest.mark.parametrize("name", ["gaussian", "uniform", "laplace", "speckle"])
def test_another_key_is_other_noise_nearly_everywhere(name):
    first, other = (apply(EVERY[name], jax.random.key(seed), images_of(3, 12, 10, 3))
                    for seed in (0, 1))
    assert np.mean(np.asarray(first) == np.asarray(other)) < 0.3  # But where both are clipped.


def test_each_example_has_the_noise_of_its_own_index():
    images, key, indices = images_of(3, 4, 4, 1), jax.random.key(2), jnp.array([7, 0, 1000])
    result = per_example(gaussian(0.5), key, images, indices)
    for row, image, index in zip(result, images, indices, strict=True):
        own = gaussian(0.5)(jax.random.fold_in(key, index), image[None])[0]
        np.testing.assert_allclose(row, own, atol=1e-6)


def noise(perturb, size=40_000):
    """What is added to an image in the middle of the range."""
    return np.asarray(perturb(jax.random.key(3), jnp.full((1, size), 0.5))) - 0.5


def test_gaussian_noise_has_the_moments_and_quantiles_of_its_standard_deviation():
    draws = noise(gaussian(0.2, clip=False))
    assert abs(draws.mean()) < 5 * 0.2 / draws.size**0.5
    np.testing.assert_allclose(draws.std(), 0.2, rtol=0.02)
    for quantile, z in ((0.025, -1.960), (0.25, -0.6745), (0.75, 0.6745), (0.975, 1.960)):
        np.testing.assert_allclose(np.quantile(draws, quantile), 0.2 * z, atol=0.01)


def level_of_each(perturb, images=4000, size=400):
    """The standard deviation of what is added to each of many grey images."""
    grey = jnp.full((images, size), 0.5)
    return np.std(np.asarray(perturb(jax.random.key(3), grey)) - 0.5, axis=1)


@pytest.mark.parametrize("probability", [0.0, 0.5, 0.8, 1.0])
def test_noise_on_a_part_of_the_images_leaves_the_others_as_they_are(probability):
    levels = level_of_each(sometimes_gaussian(0.1, probability))
    with_noise = levels > 0
    assert abs(with_noise.mean() - probability) < 0.03
    np.testing.assert_allclose(levels[with_noise], 0.1, rtol=0.2)


def test_a_random_level_is_uniform_up_to_the_largest():
    levels = level_of_each(random_gaussian(0.1))
    assert levels.max() < 0.12
    for quantile in (0.1, 0.5, 0.9):
        np.testing.assert_allclose(np.quantile(levels, quantile), 0.1 * quantile, atol=0.005)


def test_uniform_noise_fills_its_interval_evenly():
    draws = noise(uniform(0.2, clip=False))
    assert draws.min() >= -0.2 and draws.max() <= 0.2
    counts, _ = np.histogram(draws, bins=10, range=(-0.2, 0.2))
    np.testing.assert_allclose(counts / draws.size, 0.1, atol=0.01)


@pytest.mark.parametrize("name", STRENGTHS)
def test_strength_0_gives_the_images_themselves(name):
    images = images_of(2, 4, 4, 3)
    np.testing.assert_array_equal(STRENGTHS[name](0.0)(jax.random.key(0), images), images)


@pytest.mark.parametrize("name", STRENGTHS)
def test_a_jitted_function_is_compiled_once_for_all_strengths(name):
    images, key = images_of(1, 4, 4, 1), jax.random.key(0)
    before = apply._cache_size()
    for strength in (0.0, 0.1, 0.5):
        perturb = STRENGTHS[name](strength)
        np.testing.assert_allclose(apply(perturb, key, images), perturb(key, images), atol=1e-6)
    assert apply._cache_size() == before + 1


def test_the_gradient_passes_through_noise_and_stops_where_it_is_clipped():
    images, key = images_of(2, 4, 4, 1), jax.random.key(6)
    free, clipped = (gaussian(0.5, clip=clip)(key, images) for clip in (False, True))

    def gradient(perturb):
        return jax.jit(jax.grad(lambda images: jnp.sum(perturb(key, images))))(images)

    np.testing.assert_array_equal(gradient(identity()), np.ones_like(images))
    np.testing.assert_array_equal(gradient(gaussian(0.5, clip=False)), np.ones_like(images))
    inside = np.asarray(free) == np.asarray(clipped)
    assert 0 < inside.mean() < 1
    np.testing.assert_array_equal(gradient(gaussian(0.5)), inside.astype(np.float32))


@pytest.mark.parametrize("name", STRENGTHS)
def test_noise_per_example_does_not_depend_on_the_batch(name):
    images, indices, key = images_of(6, 4, 4, 1), jnp.arange(10, 16), jax.random.key(7)
    perturb = STRENGTHS[name](0.2)
    whole = apply_each(perturb, key, images, indices)
    order = jnp.array([5, 2, 0, 4, 1, 3])
    shuffled = apply_each(perturb, key, images[order], indices[order])
    np.testing.assert_array_equal(shuffled, whole[order])
    parts = [apply_each(perturb, key, images[rows], indices[rows])
             for rows in (slice(0, 2), slice(2, 4), slice(4, 6))]
    np.testing.assert_array_equal(jnp.concatenate(parts), whole)
    np.testing.assert_array_equal(
        apply_each(perturb, key, images.at[1:].set(0.5), indices)[0], whole[0])


def test_laplace_noise_has_the_moments_and_quantiles_of_its_standard_deviation():
    draws = noise(laplace(0.05))
    scale = 0.05 / 2**0.5
    np.testing.assert_allclose(draws.std(), 0.05, rtol=0.03)
    for quantile in (0.05, 0.25, 0.75, 0.95):
        expected = -np.sign(quantile - 0.5) * scale * np.log(1 - 2 * abs(quantile - 0.5))
        np.testing.assert_allclose(np.quantile(draws, quantile), expected, atol=2e-3)


def test_speckle_noise_grows_with_the_pixel_and_leaves_black_as_it_is():
    images = jnp.stack([jnp.full((40_000,), value) for value in (0.0, 0.2, 0.4)])
    spread = np.std(speckle(0.1)(jax.random.key(0), images), axis=1)
    np.testing.assert_allclose(spread, [0, 0.02, 0.04], rtol=0.03)


def test_salt_and_pepper_strike_the_given_share_evenly_and_leave_the_rest():
    images = jnp.full((1, 200, 200, 3), 0.5)
    result = np.asarray(salt_and_pepper(0.3)(jax.random.key(0), images))
    shares = [np.mean(result == value) for value in (0, 1, 0.5)]
    np.testing.assert_allclose(shares, [0.15, 0.15, 0.7], atol=0.005)
    # Channels of a pixel independently.
    assert abs(np.corrcoef(result[0, :, :, 0].ravel(), result[0, :, :, 1].ravel())[0, 1]) < 0.02
    assert set(np.unique(salt_and_pepper(1.0)(jax.random.key(0), images))) == {0, 1}


def rectangles_of(mask, height, width):
    """Whether a mask [H, W] is a union of rectangles of that size, and at least how many."""
    # A place belongs to some masked rectangle exactly if an opening keeps it.
    opened = scipy.ndimage.binary_opening(mask, np.ones((height, width)))
    # Boxes in disjoint connected components are different ones.
    return np.array_equal(opened, mask), scipy.ndimage.label(mask)[1]


def masked_by(perturb, images, seed):
    """Which pixels [B, H, W] of images without black a perturbation masks; the others stay."""
    result = np.asarray(perturb(jax.random.key(seed), images))
    masked = np.all(result == 0, axis=-1)
    np.testing.assert_array_equal(result[~masked], np.asarray(images)[~masked])
    return masked


@hypothesis.given(number=st.integers(1, 4), size=st.integers(1, 7), seed=st.integers(0, 2**16))
@hypothesis.settings(max_examples=25)
def test_occlusion_masks_whole_patches_within_the_image(number, size, seed):
    images = 0.1 + 0.9 * images_of(2, 9, 7, 3)
    for mask in masked_by(occlusion(number, size), images, seed):
        whole, apart = rectangles_of(mask, size, size)
        assert whole and 1 <= apart <= number
        assert size**2 <= mask.sum() <= number * size**2


@hypothesis.given(number=st.integers(1, 4), thickness=st.integers(1, 7), seed=st.integers(0, 2**16))
@hypothesis.settings(max_examples=25)
def test_stripes_mask_whole_columns(number, thickness, seed):
    images = 0.1 + 0.9 * images_of(2, 5, 11, 1)
    masked = masked_by(stripes(number, thickness), images, seed)
    np.testing.assert_array_equal(masked, masked[:, :1] & np.ones_like(masked))
    for mask in masked:
        whole, apart = rectangles_of(mask, 5, thickness)
        assert whole and 1 <= apart <= number
        assert 5 * thickness <= mask.sum() <= 5 * number * thickness


def test_every_place_of_a_patch_is_equally_likely():
    images = jnp.ones((6000, 4, 5, 1))
    result = np.asarray(occlusion(1, 3)(jax.random.key(0), images))[..., 0]
    corners = np.argmax((result == 0).reshape(len(result), -1), axis=1)
    places, counts = np.unique(corners, return_counts=True)
    np.testing.assert_array_equal(places, [0, 1, 2, 5, 6, 7])
    np.testing.assert_allclose(counts / len(result), 1 / 6, atol=0.02)


def test_occlusion_covers_the_share_of_the_image_that_chance_predicts():
    # A pixel far from the border is spared by one patch with 1 - (10 / 51)^2.
    images = jnp.ones((400, 60, 60, 1))
    result = np.asarray(occlusion(20, 10)(jax.random.key(0), images))
    np.testing.assert_allclose(np.mean(result[:, 15:45, 15:45] == 0),
                               1 - (1 - (10 / 51) ** 2) ** 20, atol=0.02)


@pytest.mark.parametrize("factor, height, width", [(3, 12, 15), (3, 13, 10), (2, 7, 6), (1, 4, 5)])
def test_down_up_sampling_is_bilinear_with_half_pixel_centres(factor, height, width):
    images = np.asarray(images_of(2, height, width, 3))
    result = down_up(factor)(jax.random.key(0), jnp.asarray(images))

    def resize(images, rows, columns):
        """Linear interpolation at half-pixel centres; beyond the outermost ones, theirs."""
        old = images.shape[1:3]
        places = np.meshgrid(*[(np.arange(new) + 0.5) * size / new - 0.5
                               for new, size in zip((rows, columns), old, strict=True)],
                             indexing="ij")
        return np.stack([np.stack([
            scipy.ndimage.map_coordinates(image[..., channel], places, order=1, mode="nearest")
            for channel in range(3)], axis=-1) for image in images])

    small = resize(images, height // factor, width // factor)
    np.testing.assert_allclose(result, resize(small, height, width), atol=2e-6)


def test_a_composition_applies_its_parts_in_their_order_with_keys_of_their_own():
    images, key = images_of(2, 8, 8, 3), jax.random.key(0)
    parts = (gaussian(0.2), occlusion(2, 3), speckle(0.1))
    expected = images
    for part, own in zip(parts, jax.random.split(key, 3), strict=True):
        expected = part(own, expected)
    np.testing.assert_allclose(jax.jit(compose(*parts))(key, images), expected, atol=1e-6)
    # Masked after the noise, the patches are black; before it they would not be.
    assert np.any(np.all(compose(*parts[:2])(key, images) == 0, axis=-1))
    assert not np.any(np.all(compose(*parts[1::-1])(key, images + 0.01) == 0, axis=-1).all())
    # One alone is itself, with the same key.
    np.testing.assert_array_equal(compose(parts[0])(key, images), parts[0](key, images))


@pytest.mark.parametrize("name", EVERY)
def test_an_image_of_a_batch_is_perturbed_as_it_is_alone(name):
    images, key = images_of(4, 8, 8, 3), jax.random.key(3)
    together = apply_each(EVERY[name], key, images, jnp.arange(4))
    for index in range(4):
        alone = apply(EVERY[name], jax.random.fold_in(key, index), images[index : index + 1])[0]
        np.testing.assert_allclose(together[index], alone, atol=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_every_perturbation_makes_the_noisy_view_of_a_batch(name):
    images = images_of(2, 8, 8, 3)
    batch = make_batch(jax.random.key(0), images, jnp.arange(2), augment=lambda key, image: image,
                       perturb=EVERY[name])
    np.testing.assert_array_equal(batch.clean, images)
    assert (name == "identity") == bool(np.all(batch.noisy == images))


def test_a_jitted_function_is_compiled_once_for_equal_sizes():
    before = apply._cache_size()
    for text in ("gaussian(0.1)+occlusion(2,3)", "gaussian(0.5) + occlusion(2, size=3)"):
        apply(parse_perturbation(text), jax.random.key(0), images_of(1, 8, 9, 1))
    assert apply._cache_size() == before + 1


@pytest.mark.parametrize("text, expected", [
    ("gaussian(40/255)", gaussian(40 / 255)),
    (" gaussian( std = 40/255 ) ", gaussian(40 / 255)),
    ("uniform(0.06)", uniform(0.06)),
    ("occlusion", occlusion(20, 70)),
    ("stripes(10, thickness=6)", stripes()),
    ("down_up(3)+occlusion(20,70)", compose(down_up(), occlusion())),
    ("gaussian(2*20/255)+down_up()+identity", compose(gaussian(40 / 255), down_up(), identity())),
    ("gaussian(40/255)+(down_up()+identity)", compose(gaussian(40 / 255), down_up(), identity())),
])
def test_an_expression_is_the_perturbation_it_names(text, expected):
    chex.assert_trees_all_close(parse_perturbation(text), expected)


def test_every_registered_name_can_be_written():
    arguments = {**dict.fromkeys(STRENGTHS, 0.1), **dict.fromkeys(CORRUPTIONS, 3)}
    assert set(PERTURBATIONS) == {*arguments, "identity", "occlusion", "stripes", "down_up"}
    for name, make in PERTURBATIONS.items():
        values = [arguments[name]] if name in arguments else []
        text = ", ".join(map(str, values))
        chex.assert_trees_all_equal(parse_perturbation(f"{name}({text})"), make(*values))


@pytest.mark.parametrize("text, message", [
    ("gausian(0.1)", "Unknown perturbation 'gausian'. Did you mean 'gaussian'?"),
    ("gaussian(0.1)+", "Expected perturbation='gaussian(0.1)+' as NAME(NUMBER, ...)"),
    ("", "Expected perturbation='' as NAME"),
    ("gaussian", "Expected gaussian(std: float, *, clip: bool = True) in perturbation='gaussian'"),
    ("gaussian(0.1, 0.2)", "too many positional arguments"),
    ("occlusion(pieces=3)", "unexpected keyword argument 'pieces'"),
    ("gaussian(-1)", "Expected std=-1 in [0, inf). It is in perturbation='gaussian(-1)'."),
    ("salt_and_pepper(2)", "Expected amount=2 in [0, 1]."),
    ("occlusion(2.5, 3)", "Expected patches=2.5 to be an integer >= 1."),
    ("stripes(0)", "Expected number=0 to be an integer >= 1."),
    ("down_up(0.5)", "Expected factor=0.5 in [1, inf)."),
    ("gaussian(1/0)", "as NAME(NUMBER, ...)"),
    ("gaussian(__import__('os'))", "as NAME(NUMBER, ...)"),
    ("gaussian(0.1, clip=False)", "as NAME(NUMBER, ...)"),
    ("gaussian(**{})", "as NAME(NUMBER, ...)"),
    ("gaussian(0.1)-gaussian(0.1)", "as NAME(NUMBER, ...)"),
    ("(lambda: 0)()", "as NAME(NUMBER, ...)"),
    ("gaussian(0.1\x00)", "as NAME(NUMBER, ...)"),
    ("gaussian(std=0.1, std=0.2)", "in perturbation='gaussian(std=0.1, std=0.2)': std is given 2 "
                                   "times."),
    (f"gaussian({'9' * 400}/3)", "as NAME(NUMBER, ...)"),
    (f"gaussian({'9' * 400})", "as NAME(NUMBER, ...)"),
    (f"gaussian({'9' * 5000})", "as NAME(NUMBER, ...)"),
    (f"gaussian({'9' * 200}*{'9' * 200})", "as NAME(NUMBER, ...)"),
    (f"occlusion({'9' * 400}, 3)", "as NAME(NUMBER, ...)"),
    ("occlusion(1000000, 3)", "Expected patches=1000000 in [1, 10000]."),
    ("gaussian(1e400)", "Expected std=inf in [0, inf)."),
    ("gaussian(1e39)", "Expected std=1e+39 in [0, 3.4028234663852886e+38]."),
    ("gaussian(1e400-1e400)", "as NAME(NUMBER, ...)"),
    (f"gaussian({'-' * 100_000}1)", "as NAME(NUMBER, ...)"),
    (f"gaussian({'-' * 901}1)", "Expected"),
    (f"gaussian({'(' * 10_000}1{')' * 10_000})", "as NAME(NUMBER, ...)"),
    (f"gaussian(1{'*1' * 50_000})", "as NAME(NUMBER, ...)"),
    (f"{'identity+' * 50_000}identty", "Expected"),
])
def test_a_bad_expression_is_refused_in_one_line(text, message):
    with pytest.raises(InputError) as caught:
        parse_perturbation(text)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("perturb, message", [
    (occlusion(1, 9), "Expected images of height >= 9, that of a mask, got 8."),
    (stripes(1, 9), "Expected images of width >= 9, that of a mask, got 8."),
    (down_up(9), "Expected images of 8 x 8 pixels to have at least factor=9 on each side."),
])
def test_an_image_too_small_for_a_perturbation_is_refused(perturb, message):
    with pytest.raises(InputError) as caught:
        perturb(jax.random.key(0), images_of(1, 8, 8, 3))
    assert str(caught.value) == message


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float64])
@pytest.mark.parametrize("name", EVERY)
def test_narrow_and_wide_images_get_the_draws_of_float32_and_keep_their_dtype(name, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        images = jnp.asarray(images_of(2, 12, 10, 3), dtype)
        key = jax.random.key(2)
        result = apply(EVERY[name], key, images)
        expected = apply(EVERY[name], key, images.astype(jnp.float32))
        assert result.dtype == dtype
        if dtype != jnp.float64:  # Rounded once, from float32; but for each part of several.
            expected = expected.astype(dtype)
        np.testing.assert_allclose(
            np.asarray(result, np.float64), np.asarray(expected, np.float64),
            atol=0.02 if name == "composed" else 1e-6)


def test_rare_salt_and_pepper_strike_bfloat16_images_as_often_as_others():
    # bfloat16 draws, multiples of 2^-7, gave 0.77 % of 0 and no 1.
    images = jnp.full((1, 500, 500, 4), 0.5, jnp.bfloat16)
    result = np.asarray(salt_and_pepper(0.004)(jax.random.key(0), images), np.float32)
    for value in (0, 1):  # 2,000 of a million are expected, give or take 45.
        assert abs(np.sum(result == value) - 2000) < 5 * 45


@pytest.mark.parametrize("name", EVERY)
def test_bytes_are_refused_by_every_perturbation(name):
    with pytest.raises(InputError) as caught:
        EVERY[name](jax.random.key(0), jnp.zeros((1, 12, 10, 3), jnp.uint8))
    assert str(caught.value) == (
        "Expected images of a floating dtype, pixels in [0, 1], got uint8.")


@pytest.mark.parametrize("perturb", [occlusion(1, 2), stripes(1, 2), down_up(2)])
def test_images_of_another_rank_are_named(perturb):
    with pytest.raises(InputError, match=r"Expected images of shape \[B, H, W, channels\]"):
        perturb(jax.random.key(0), jnp.zeros((8, 8, 3)))


@pytest.mark.parametrize("make, arguments", [
    (occlusion, (2, 3)), (stripes, (2, 3)), (down_up, (2,)), (gaussian, (1,)), (gaussian, (0.25,))])
def test_numbers_of_numpy_are_pythons(make, arguments):
    kinds = (np.int64, np.int8, np.uint8) if isinstance(arguments[0], int) else (np.float32,)
    for kind in kinds:
        given = make(*map(kind, arguments))
        assert jax.tree.structure(given) == jax.tree.structure(make(*arguments))
        chex.assert_trees_all_equal(given, make(*arguments))
        assert all(type(leaf) is float for leaf in jax.tree.leaves(given))


@pytest.mark.parametrize("value", [True, np.bool_(True), 2.0, np.float64(2), "2"])
def test_what_is_no_integer_is_refused_where_one_is_meant(value):
    for make in (occlusion, stripes):
        with pytest.raises(InputError, match="to be an integer >= 1"):
            make(value, 2)
        with pytest.raises(InputError, match="to be an integer >= 1"):
            make(2, value)


def test_whole_numbers_are_floats_for_a_compiled_function():
    applied = jax.jit(lambda perturb, images: perturb(jax.random.key(0), images))
    images = images_of(1, 4, 4, 1)
    for strength in (0, 0.5, 3, 10**12):  # As an integer, the last is none of 32 bits.
        assert np.all(np.isfinite(applied(gaussian(strength), images)))
    assert applied._cache_size() == 1


def test_nothing_cannot_be_composed():
    with pytest.raises(InputError, match="at least one perturbation"):
        compose()
