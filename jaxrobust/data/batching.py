"""The order in which an epoch visits the examples."""

import itertools
from collections.abc import Iterator, Sequence

import jax

from jaxrobust import _validate


def epoch_order(key: jax.Array, epoch: int, size: int) -> jax.Array:
    """Draws a permutation of range(size), [size] int32, from ``key`` and ``epoch``."""
    return jax.random.permutation(jax.random.fold_in(key, epoch), size)


def batch_sizes(size: int, batch_size: int) -> list[int]:
    """Lists the sizes of an epoch's batches of ``size`` examples; the last may be smaller.

    A last batch of one example is left out, unless all batches are of one: batch norm would use
    its meaningless variance, and classes have no dispersion. The order of an epoch is random, so
    that a different example is left out each time.

    Raises:
      InputError: (a ValueError) if the batch is larger than the data set.
    """
    size = _validate.integer("size", size, 1)
    _validate.in_range("batch_size", batch_size, 1, size, open_high=False)
    batch_size = _validate.integer("batch_size", batch_size, 1)
    whole, last = divmod(size, batch_size)
    return [batch_size] * whole + ([last] if last > 1 else [])


def group_batches(sizes: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Groups up to ``most`` consecutive batches of one size; yields their number and size."""
    for size, alike in itertools.groupby(sizes):
        left = len(list(alike))
        while left:
            number = min(most, left)
            yield number, size
            left -= number
