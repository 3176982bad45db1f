"""The random numbers of ``jax.random`` in less time."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def draw_flat(draw: Callable[..., jax.Array], key: jax.Array, shape: Sequence[int],
              dtype: Any = jnp.float32, **options: Any) -> jax.Array:
    """Draws as ``draw(key, shape, dtype, **options)``, the same numbers, along a single axis.

    A number comes from its position. On CPUs working that out from several coordinates takes longer
    than all the rest.
    """
    return draw(key, (math.prod(shape),), dtype, **options).reshape(shape)
