"""The order in which an epoch visits the examples."""

from collections.abc import Iterator

import jax

from jaxrobust import _validate


def epoch_order(key: jax.Array, epoch: int, size: int) -> jax.Array:
    """A permutation of range(size), [size] int32, determined by ``key`` and ``epoch``."""
    return jax.random.permutation(jax.random.fold_in(key, epoch), size)


def epoch_indices(order: jax.Array, batch_size: int, *, start: int = 0) -> Iterator[jax.Array]:
    """The batches of an epoch, each [batch_size] indices; the last may be smaller.

    Args:
      order: [N], from :func:`epoch_order`.
      batch_size: in [1, N].
      start: the first batch to yield, when an epoch is taken up again.

    Raises:
      InputError: (a ValueError) if the batch is larger than the data set.
    """
    _validate.in_range("batch_size", batch_size, 1, order.shape[0], open_high=False)
    for first in range(start * batch_size, order.shape[0], batch_size):
        yield order[first : first + batch_size]
