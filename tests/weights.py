"""Random weights for models, from NumPy."""

import jax
import jax.numpy as jnp
import numpy as np


def random_variables(model, image_shape, *, seed=0, dtype=np.float32):
    """Weights and running statistics under which a signal neither vanishes nor explodes."""
    generator = np.random.default_rng(seed)
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, *image_shape)), train=False))

    def draw(path, leaf):
        values, kind = generator.normal(size=leaf.shape), path[-1].key
        if kind == "kernel":
            values *= np.prod(leaf.shape[:-1]) ** -0.5
        elif kind == "var":
            values = np.exp(0.5 * values)
        else:  # Scales around 1; biases and running means around 0.
            values = 0.3 * values + (kind == "scale")
        return jnp.asarray(values, dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)
