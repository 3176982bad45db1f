"""Augmentation and batching against plain NumPy, and what their randomness depends on."""

import collections
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust.data.augment import (
    make_batch,
    random_crop,
    random_flip,
    standard_augmentation,
    to_float,
)
from jaxrobust.data.batching import batch_sizes, epoch_order, group_batches
from jaxrobust.perturbations import gaussian, identity

# No two pixels are equal and none is 0, so that a crop tells where it was taken.
IMAGE = np.arange(1, 5 * 4 * 2 + 1, dtype=np.float32).reshape(5, 4, 2) / 100


def crop(image, padding, top, left):
    """The reference: the image moved by (padding - top, padding - left), black outside."""
    height, width, _ = image.shape
    result = np.zeros_like(image)
    for y in range(height):
        for x in range(width):
            source_y, source_x = y + top - padding, x + left - padding
            if 0 <= source_y < height and 0 <= source_x < width:
                result[y, x] = image[source_y, source_x]
    return result


def crops(image, padding):
    """Every crop by its place, as bytes for lookup."""
    return {crop(image, padding, top, left).tobytes(): (top, left)
            for top in range(2 * padding + 1) for left in range(2 * padding + 1)}


def as_pixels(view):
    """Back to uint8, because the division by 255 rounds another way under jit."""
    return np.rint(255 * np.asarray(view)).astype(np.uint8)


def mirrored(image):
    return np.stack([row[::-1] for row in image])


def over_keys(function, image, count, seed=0):
    keys = jax.random.split(jax.random.key(seed), count)
    return np.asarray(jax.jit(jax.vmap(function, in_axes=(0, None)))(keys, jnp.asarray(image)))


def test_bytes_become_numbers_from_0_to_1():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    result = to_float(pixels)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, pixels / 255, rtol=1e-6)
    assert result.min() == 0 and result.max() == 1


def test_the_images_of_a_batch_are_crops_without_jit_too():
    known = crops(PIXELS[1], 1)
    batch = make_batch(jax.random.key(0), PIXELS, LABELS, perturb=identity(),
                       augment=standard_augmentation(padding=1, flip=False))
    assert as_pixels(batch.clean[1]).tobytes() in known
    np.testing.assert_array_equal(batch.clean, batch.noisy)
    np.testing.assert_array_equal(batch.labels, LABELS)


def test_every_place_of_the_crop_is_equally_likely():
    known, count = crops(IMAGE, 1), 1800
    places = collections.Counter(
        known[result.tobytes()]
        for result in over_keys(functools.partial(random_crop, padding=1), IMAGE, count))
    assert len(places) == 9
    # Each count is binomial with mean 200 and standard deviation 13.
    assert all(abs(found - count / 9) < 65 for found in places.values())


def test_one_image_in_two_is_mirrored():
    results = over_keys(random_flip, IMAGE, 1000)
    flipped = sum(np.array_equal(result, mirrored(IMAGE)) for result in results)
    kept = sum(np.array_equal(result, IMAGE) for result in results)
    assert flipped + kept == 1000 and 420 < flipped < 580


@pytest.mark.parametrize(("padding", "flip", "outcomes"), [(0, False, 1), (0, True, 2),
                                                           (1, False, 9), (1, True, 18)])
def test_crop_and_mirror_can_be_left_out(padding, flip, outcomes):
    results = over_keys(standard_augmentation(padding=padding, flip=flip), IMAGE, 400)
    assert len({result.tobytes() for result in results}) == outcomes


def test_the_defaults_are_the_papers():
    image = np.arange(1, 145, dtype=np.float32).reshape(12, 12, 1)
    tops = [int(result.sum(axis=(1, 2)).argmin()) for result in
            over_keys(standard_augmentation(), image, 300)]
    assert len(set(tops)) > 1
    blank = [int((result.sum(axis=(1, 2)) == 0).sum()) for result in
             over_keys(standard_augmentation(), image, 300)]
    assert max(blank) == 4  # rows of black: a padding of 4


# --- batches ----------------------------------------------------------------------------------

PIXELS = np.random.default_rng(0).integers(1, 256, (6, 5, 4, 2)).astype(np.uint8)
LABELS = np.array([0, 3, 1, 2, 2, 0], np.int32)


@functools.partial(jax.jit, static_argnames=("std", "independent_views", "padding"))
def batch_of(key, pixels, labels, *, std=0.2, independent_views=False, padding=2):
    return make_batch(key, pixels, labels, augment=standard_augmentation(padding=padding),
                      perturb=gaussian(std), independent_views=independent_views)


def test_both_views_are_float_images_in_range_of_the_same_labels():
    batch = batch_of(jax.random.key(0), PIXELS, LABELS)
    for view in (batch.clean, batch.noisy):
        assert view.shape == PIXELS.shape and view.dtype == jnp.float32
        assert view.min() >= 0 and view.max() <= 1
    np.testing.assert_array_equal(batch.labels, LABELS)
    assert batch.labels.dtype == LABELS.dtype


def test_paired_views_are_the_same_augmented_image_before_and_after_noise():
    pairs = batch_of(jax.random.key(0), PIXELS, LABELS, std=1e-3)
    np.testing.assert_allclose(pairs.clean, pairs.noisy, atol=1e-2)
    assert np.all(np.any(pairs.clean != pairs.noisy, axis=(1, 2, 3)))


def test_independent_views_are_augmented_each_on_its_own():
    clean, noisy, _ = batch_of(
        jax.random.key(0), PIXELS, LABELS, std=0.0, independent_views=True)
    differ = np.any(clean != noisy, axis=(1, 2, 3))
    assert differ.sum() >= 4  # one of 50 pairs of crops and mirrors is the same
    for image, view in zip(PIXELS, as_pixels(noisy), strict=True):
        known = crops(image, 2)
        assert view.tobytes() in known or mirrored(view).tobytes() in known
    # The clean view does not depend on how the noisy one is made.
    np.testing.assert_array_equal(clean, batch_of(jax.random.key(0), PIXELS, LABELS).clean)


@pytest.mark.parametrize("independent_views", [False, True])
def test_an_images_views_do_not_depend_on_the_rest_of_the_batch(independent_views):
    make = functools.partial(batch_of, independent_views=independent_views)
    whole = make(jax.random.key(1), PIXELS, LABELS)
    part = make(jax.random.key(1), PIXELS[:4], LABELS[:4])
    others = make(jax.random.key(1), np.concatenate([PIXELS[:1], 255 - PIXELS[1:]]), LABELS)
    for view in ("clean", "noisy"):
        np.testing.assert_allclose(
            getattr(part, view), getattr(whole, view)[:4], atol=1e-6)
        np.testing.assert_allclose(
            getattr(others, view)[0], getattr(whole, view)[0], atol=1e-6)


def test_equal_images_at_different_positions_get_different_randomness():
    same = np.broadcast_to(PIXELS[:1], PIXELS.shape)
    clean, noisy, _ = batch_of(jax.random.key(2), same, LABELS, padding=0)
    added = np.asarray(noisy - clean)
    assert all(np.any(added[0] != added[position]) for position in range(1, 6))
    crops_seen = {view.tobytes() for view in np.asarray(
        batch_of(jax.random.key(2), same, LABELS).clean)}
    assert len(crops_seen) > 1


def test_the_key_alone_determines_a_batch():
    first, again, other = (batch_of(jax.random.key(seed), PIXELS, LABELS) for seed in (0, 0, 1))
    chex.assert_trees_all_equal(first, again)
    assert np.any(first.clean != other.clean) and np.any(first.noisy != other.noisy)


# --- the order of an epoch --------------------------------------------------------------------


@pytest.mark.parametrize(("size", "batch_size"), [(11, 3), (12, 4), (5, 5), (7, 1), (1, 1)])
def test_an_epoch_visits_each_example_exactly_once(size, batch_size):
    order = epoch_order(jax.random.key(0), 3, size)
    np.testing.assert_array_equal(np.sort(order), np.arange(size))
    sizes = batch_sizes(size, batch_size)
    assert sum(sizes) == size and set(sizes[:-1]) <= {batch_size}
    assert sizes[-1] == (size % batch_size or batch_size)


@pytest.mark.parametrize("size, batch_size, expected", [
    (10, 3, [3, 3, 3]), (5, 4, [4]), (9, 4, [4, 4]), (3, 2, [2]), (10, 4, [4, 4, 2])])
def test_a_last_batch_of_one_is_left_out(size, batch_size, expected):
    assert batch_sizes(size, batch_size) == expected


@pytest.mark.parametrize("most, expected", [
    (1, [(1, 4), (1, 4), (1, 4), (1, 2)]), (2, [(2, 4), (1, 4), (1, 2)]), (9, [(3, 4), (1, 2)])])
def test_batches_of_one_size_are_grouped_in_their_order(most, expected):
    assert list(group_batches(batch_sizes(14, 4), most)) == expected


def test_the_order_is_determined_by_key_and_epoch():
    orders = [epoch_order(jax.random.key(seed), epoch, 50)
              for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))]
    np.testing.assert_array_equal(orders[0], orders[1])
    assert np.any(orders[0] != orders[2]) and np.any(orders[0] != orders[3])
    assert orders[0].dtype == jnp.int32 and orders[0].shape == (50,)
