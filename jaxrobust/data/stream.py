"""Batches of a data set of any size, on disk or in memory, read ahead by Grain."""

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust import _validate
from jaxrobust.data.batching import batch_sizes, epoch_order
from jaxrobust.data.types import Split


def stream_batches(
    split: Split,
    key: jax.Array,
    *,
    batch_size: int,
    stop: int,
    start: int = 0,
    rows_of: Callable[[int], slice] = slice,
    num_threads: int = 4,
    prefetch: int = 2,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the batches of updates ``start .. stop - 1``, over as many epochs as they take.

    :func:`epoch_order` and :func:`batch_sizes` determine the examples and their order: update u is
    batch ``u mod S`` of epoch ``1 + u // S``, with S batches in an epoch, the last of which may be
    smaller. The number of updates done, which a train state counts anyway, is thus the position in
    the data: to continue after u updates, pass ``start=u``.

    Threads read ahead while the caller works, also into the next epoch: at most ``prefetch``
    batches beyond the last one yielded. They end soon after the iterator is exhausted, closed or
    deleted.

    Args:
      split: N examples, in memory or stored.
      key: a PRNG key that determines the order.
      batch_size: in [1, N].
      stop: the update to stop before.
      start: the first update, counted from 0.
      rows_of: takes the size of a batch and returns the slice of its rows to read: those of one
        process, where several share a batch. By default all.
      num_threads: for reading, a piece of a batch each; at least 1. More of them help little with
        small images, whose cost is mostly Python's own.
      prefetch: batches to read ahead, at least 1.

    Yields:
      ``(images [b, H, W, channels], labels [b])``, NumPy arrays of the split's dtypes, with the
      rows of each batch that ``rows_of`` selects.

    Raises:
      InputError: (a ValueError) if an argument is out of range or Grain is not installed; and,
        from the iterator, if a record cannot be read, which it names.
    """
    size = _validate.shapes(
        images=(split.images, "N H W channels"), labels=(split.labels, "N"))["N"]
    _validate.in_range("batch_size", batch_size, 1, size, open_high=False)
    _validate.in_range("start", start, 0, stop, open_high=False)
    _validate.in_range("num_threads", num_threads, 1)
    _validate.in_range("prefetch", prefetch, 1)
    # Pieces of a batch, not single records: Grain's overhead for an element exceeds the time to
    # read a small image.
    pieces = min(num_threads, max(1, len(range(batch_size)[rows_of(batch_size)])))
    source = _Pieces(split, host_epoch_order(key, size), batch_size, rows_of, start, stop, pieces)
    return _batches(_reading(source, num_threads, prefetch * pieces), pieces)


class _Pieces:
    """A Grain source: every batch from ``start`` to ``stop``, each in so many pieces."""

    def __init__(
        self, split: Split, order_of: Callable[[int], np.ndarray], batch_size: int,
        rows_of: Callable[[int], slice], start: int, stop: int, pieces: int
    ) -> None:
        self._split, self._order_of, self._batch_size = split, order_of, batch_size
        self._rows_of, self._start, self._stop, self._pieces = rows_of, start, stop, pieces
        self._sizes = batch_sizes(len(split.labels), batch_size)

    def __len__(self) -> int:
        return (self._stop - self._start) * self._pieces

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        update, piece = divmod(index, self._pieces)
        epoch, batch = divmod(self._start + update, len(self._sizes))
        first = batch * self._batch_size
        rows = self._order_of(epoch + 1)[first : first + self._sizes[batch]]
        rows = rows[self._rows_of(len(rows))]
        low, high = (len(rows) * end // self._pieces for end in (piece, piece + 1))
        rows = rows[low:high]
        return self._split.images[rows], self._split.labels[rows]


def _reading(source: _Pieces, num_threads: int, buffer_size: int) -> Iterable[Any]:
    """A Grain data set that reads ahead the elements of ``source`` in order."""
    grain = _validate.installed("grain", "Grain", "Streaming", "pip install 'jaxrobust[data]'")
    options = grain.ReadOptions(
        num_threads=min(num_threads, buffer_size), prefetch_buffer_size=buffer_size)
    return grain.MapDataset.source(source).to_iter_dataset(options)


def _batches(dataset: Any, pieces: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    iterator = iter(dataset)
    try:
        for batch in zip(*[iterator] * pieces, strict=True):
            images, labels = zip(*batch, strict=True)
            yield np.concatenate(images), np.concatenate(labels)
    finally:
        iterator.close()


def host_epoch_order(key: jax.Array, size: int) -> Callable[[int], np.ndarray]:
    """Makes ``epoch -> epoch_order(key, epoch, size)``, computed on the host, for any thread.

    This leaves the accelerator to the training; the integers are the same on any device.
    """
    # Copied, since a train step may be given the state's key to overwrite. It may also be on an
    # accelerator, or on the devices of several processes.
    data, impl = np.array(jax.random.key_data(key)), jax.random.key_impl(key)
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX was told to use only an accelerator, which then computes it.
        host = None
    lock = threading.Lock()

    # For two epochs, since reading ahead crosses from one to the next.
    @functools.lru_cache(maxsize=2)
    def compute(epoch: int) -> np.ndarray:
        with jax.default_device(host):
            key = jax.random.wrap_key_data(jnp.asarray(data), impl=impl)
            return np.asarray(epoch_order(key, epoch, size))

    def order(epoch: int) -> np.ndarray:
        with lock:  # One thread computes while others wait for the result.
            return compute(epoch)

    return order
