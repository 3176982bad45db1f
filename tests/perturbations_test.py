"""Perturbations: their distribution, their range, and what their randomness depends on."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from jaxrobust.perturbations import gaussian, identity, per_example, uniform

STRENGTHS = {"gaussian": gaussian, "uniform": uniform}


def images_of(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(size=shape), jnp.float32)


class PerturbationsVariantsTest(chex.TestCase):

    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_identity(self):
        images = images_of(2, 4, 4, 3)
        result = self.variant(identity())(jax.random.key(0), images)
        np.testing.assert_array_equal(result, images)

    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    @parameterized.product(name=("gaussian", "uniform"), clip=(True, False))
    def test_noise(self, name, clip):
        images, key = images_of(2, 4, 4, 3), jax.random.key(1)
        result = self.variant(STRENGTHS[name](0.5, clip=clip))(key, images)
        draws = (jax.random.normal(key, images.shape) if name == "gaussian"
                 else jax.random.uniform(key, images.shape, minval=-1, maxval=1))
        expected = np.asarray(images) + 0.5 * np.asarray(draws)
        assert expected.min() < 0 and expected.max() > 1
        np.testing.assert_allclose(
            result, np.clip(expected, 0, 1) if clip else expected, atol=1e-6)

    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_per_example(self):
        images, key, indices = images_of(3, 4, 4, 1), jax.random.key(2), jnp.array([7, 0, 1000])
        result = self.variant(functools.partial(per_example, gaussian(0.5)))(key, images, indices)
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


def test_uniform_noise_fills_its_interval_evenly():
    draws = noise(uniform(0.2, clip=False))
    assert draws.min() >= -0.2 and draws.max() <= 0.2
    counts, _ = np.histogram(draws, bins=10, range=(-0.2, 0.2))
    np.testing.assert_allclose(counts / draws.size, 0.1, atol=0.01)


@pytest.mark.parametrize("name", STRENGTHS)
def test_clipped_images_stay_in_range_and_are_cut_there_alone(name):
    images, key = images_of(4, 8, 8, 1), jax.random.key(4)
    clipped, free = (STRENGTHS[name](0.7, clip=clip)(key, images) for clip in (True, False))
    assert clipped.min() == 0 and clipped.max() == 1
    np.testing.assert_array_equal(clipped, np.clip(free, 0, 1))
    np.testing.assert_array_equal(STRENGTHS[name](0.7)(key, images), clipped)  # the default


@pytest.mark.parametrize("name", STRENGTHS)
def test_strength_0_gives_the_images_themselves(name):
    images = images_of(2, 4, 4, 3)
    np.testing.assert_array_equal(STRENGTHS[name](0.0)(jax.random.key(0), images), images)


@pytest.mark.parametrize("name", STRENGTHS)
def test_the_key_alone_determines_the_noise(name):
    perturb, images = STRENGTHS[name](0.1), images_of(2, 4, 4, 3)
    first, again, other = (perturb(jax.random.key(seed), images) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.mean(np.asarray(first) == np.asarray(other)) < 0.2
    # Images of one batch have noise of their own.
    same = perturb(jax.random.key(0), jnp.full((2, 4, 4, 3), 0.5))
    assert np.any(same[0] != same[1])


@pytest.mark.parametrize("name", STRENGTHS)
def test_a_jitted_function_is_compiled_once_for_all_strengths(name):
    traces = []

    @jax.jit
    def apply(perturb, key, images):
        traces.append(None)
        return perturb(key, images)

    images = images_of(1, 4, 4, 1)
    for strength in (0.0, 0.1, 0.5):
        perturb = STRENGTHS[name](strength)
        np.testing.assert_allclose(apply(perturb, jax.random.key(0), images),
                                   perturb(jax.random.key(0), images), atol=1e-6)
    assert len(traces) == 1


def test_strengths_side_by_side_are_mapped_by_vmap():
    images, key = images_of(2, 4, 4, 1), jax.random.key(5)
    strengths = jnp.array([0.0, 0.1, 0.4])
    batched = jax.tree.map(lambda _: strengths, gaussian(1.0))
    together = jax.vmap(lambda perturb: perturb(key, images))(batched)
    for result, strength in zip(together, strengths, strict=True):
        np.testing.assert_allclose(result, gaussian(float(strength))(key, images), atol=1e-6)


def test_the_gradient_passes_through_noise_and_stops_where_it_is_clipped():
    images, key = images_of(2, 4, 4, 1), jax.random.key(6)
    free, clipped = (gaussian(0.5, clip=clip)(key, images) for clip in (False, True))

    def gradient(perturb):
        return jax.grad(lambda images: jnp.sum(perturb(key, images)))(images)

    np.testing.assert_array_equal(gradient(identity()), np.ones_like(images))
    np.testing.assert_array_equal(gradient(gaussian(0.5, clip=False)), np.ones_like(images))
    inside = np.asarray(free) == np.asarray(clipped)
    assert 0 < inside.mean() < 1
    np.testing.assert_array_equal(gradient(gaussian(0.5)), inside.astype(np.float32))


@pytest.mark.parametrize("name", STRENGTHS)
def test_noise_per_example_does_not_depend_on_the_batch(name):
    images, indices, key = images_of(6, 4, 4, 1), jnp.arange(10, 16), jax.random.key(7)
    perturb = STRENGTHS[name](0.2)
    whole = per_example(perturb, key, images, indices)
    order = jnp.array([5, 2, 0, 4, 1, 3])
    shuffled = per_example(perturb, key, images[order], indices[order])
    np.testing.assert_array_equal(shuffled, whole[order])
    for size in (1, 2, 3):
        parts = [per_example(perturb, key, images[start:start + size], indices[start:start + size])
                 for start in range(0, 6, size)]
        np.testing.assert_array_equal(jnp.concatenate(parts), whole)
    np.testing.assert_array_equal(
        per_example(perturb, key, images.at[1:].set(0.5), indices)[0], whole[0])


def test_noise_per_example_does_not_depend_on_the_number_of_devices():
    images, indices, key = images_of(16, 4, 4, 1), jnp.arange(16), jax.random.key(8)
    whole = per_example(gaussian(0.2), key, images, indices)
    parts = jax.pmap(functools.partial(per_example, gaussian(0.2)), in_axes=(None, 0, 0))(
        key, images.reshape(8, 2, 4, 4, 1), indices.reshape(8, 2))
    np.testing.assert_allclose(parts.reshape(whole.shape), whole, atol=1e-6)


def test_examples_of_different_index_have_different_noise():
    images = jnp.full((3, 4, 4, 1), 0.5)
    result = per_example(gaussian(0.2), jax.random.key(9), images, jnp.array([0, 1, 0]))
    np.testing.assert_array_equal(result[0], result[2])
    assert np.any(result[0] != result[1])
