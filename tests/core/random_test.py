"""Draws along one axis are those of ``jax.random``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust._random import draw_flat
from jaxrobust.corruptions import noise


@pytest.mark.parametrize("draw, options", [
    (jax.random.normal, {}), (jax.random.uniform, {"minval": -1, "maxval": 1}),
    (jax.random.laplace, {}),
], ids=["normal", "uniform", "laplace"])
def test_numbers_drawn_along_one_axis_are_the_same(draw, options):
    keys, shape = jax.random.split(jax.random.key(3), 4), (5, 3, 2)

    @jax.jit
    def both(keys):
        return tuple(jax.vmap(one)(keys) for one in (
            lambda key: draw(key, shape, jnp.float32, **options),
            lambda key: draw_flat(draw, key, shape, **options)))

    usual, flat = both(keys)
    assert flat.shape == (4, *shape) and flat.dtype == jnp.float32
    assert len(np.unique(flat)) == flat.size
    np.testing.assert_array_equal(flat, usual)


def test_counts_of_photons_are_those_drawn_in_the_shape_of_the_image():
    key = jax.random.key(4)
    image = jax.random.uniform(jax.random.key(5), (6, 4, 3))
    own = jax.random.wrap_key_data(jax.random.bits(key, (2,), jnp.uint32), impl="threefry2x32")
    counts = jax.random.poisson(own, image * 60.0)
    assert len(np.unique(counts)) > 20
    np.testing.assert_allclose(60 * noise.shot_noise(key, image, 60.0), counts, rtol=1e-6)
