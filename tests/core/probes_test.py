"""Probes, loops over them and means, against loops in NumPy; in use, see curvature_test."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust import InputError, probes

pytestmark = pytest.mark.usefixtures("written_out_loops")


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_chunks_are_a_loop(chunk_size, in_order):
    def probe(index):
        number = index.astype(jnp.float32)
        return {"square": number**2, "row": jnp.array([1.0, 2.0]) * number}

    found = jax.jit(lambda: probes.map_in_chunks(probe, 7, chunk_size, in_order=in_order))()
    np.testing.assert_array_equal(found["square"], np.arange(7) ** 2)
    np.testing.assert_array_equal(found["row"], np.outer(np.arange(7.0), [1, 2]))


def test_a_loop_too_long_to_be_written_out_is_a_loop_too():
    length = probes.LONGEST_WRITTEN_OUT + 1
    found = probes.map_in_chunks(lambda index: 2 * index.astype(jnp.float32), length, 1)
    np.testing.assert_array_equal(found, 2.0 * np.arange(length))


def test_the_mean_over_pairs_is_the_u_statistic_and_its_error_the_jackknifes():
    pairs = np.random.default_rng(0).normal(size=(2, 5, 5))
    pairs += pairs.swapaxes(1, 2)

    def mean(one):
        return one[~np.eye(len(one), dtype=bool)].mean()

    estimate = probes.mean_over_pairs(jnp.asarray(pairs, jnp.float32))
    for i, one in enumerate(pairs):
        without = [mean(np.delete(np.delete(one, k, 0), k, 1)) for k in range(5)]
        np.testing.assert_allclose(estimate.value[i], mean(one), rtol=1e-5)
        np.testing.assert_allclose(
            estimate.standard_error[i], (4 * np.var(without)) ** 0.5, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_norms_and_means_are_right_at_every_scale(scale):
    rows = np.random.default_rng(1).normal(size=(4, 2, 3)) * scale
    vectors = jnp.asarray(rows, jnp.float32)
    np.testing.assert_allclose(
        probes.norm(vectors), np.sqrt(np.sum(rows**2, axis=(1, 2))), rtol=1e-5)
    np.testing.assert_allclose(probes.squared_norm(vectors / scale), np.sum(
        (rows / scale) ** 2, axis=(1, 2)), rtol=1e-5)
    mean, error = probes.mean_estimate(vectors[:, 0])
    np.testing.assert_allclose(mean, rows[:, 0].mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(error, rows[:, 0].std(axis=0, ddof=1) / 2, rtol=1e-4)


def test_an_image_has_the_same_probes_in_whatever_batch_it_comes():
    x, indices = jnp.zeros((3, 4)), jnp.array([5, 2, 9])
    draw = functools.partial(probes.draw, jax.random.key(0), 1)
    np.testing.assert_array_equal(draw(x, indices)[1:], draw(x[1:], indices[1:]))
    signs = draw(x, distribution="rademacher")
    assert set(np.unique(signs)) == {-1.0, 1.0} and signs.dtype == x.dtype


def test_names_that_are_not_known_are_named():
    with pytest.raises(InputError, match="Unknown distribution 'gauss'"):
        probes.draw(jax.random.key(0), 0, jnp.ones((1, 2)), distribution="gauss")
    with pytest.raises(InputError, match="Unknown function 'hessian_tracee'"):
        probes.salted(jax.random.key(0), "hessian_tracee")
