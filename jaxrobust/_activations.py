"""The rectifier of the models and of the hinges in losses."""

import jax
import jax.numpy as jnp


@jax.jit
def relu(x: jax.Array) -> jax.Array:
    """Computes max(x, 0), with derivative 0 at 0; NaN of NaN.

    ``jax.nn.relu`` is a maximum, which YNNPACK, in a training step on CPUs, takes to be 0 for NaN
    (:func:`jaxrobust.parallel.compiler_options`). No later layer would show the NaN.
    """
    return jnp.where(x <= 0, 0, x)
