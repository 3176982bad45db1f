"""Class centroids in feature space as an explicit state (Section 4.4 of the paper)."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrobust import _validate

TABLE_SIZE = 2**22
"""Numbers of a table of examples or classes by classes that are in memory together."""


class CentroidState(NamedTuple):
    """What is remembered of the class centroids from one update to the next."""

    mean: jax.Array  # shape=[C, d], dtype=float32; carries no gradient
    seen: jax.Array  # shape=[C], dtype=bool; classes that have had an example


class Centroids(NamedTuple):
    """The centroids of one update; both kinds are differentiable in the features."""

    current: jax.Array  # shape=[C, d]; means over this batch ("naive"), 0 where absent
    running: jax.Array  # shape=[C, d]; with momentum
    present: jax.Array  # shape=[C], dtype=bool; classes in this (global) batch


def init_centroids(num_classes: int, dim: int, *, dtype=jnp.float32) -> CentroidState:
    """The state before any example was seen: zeros, no class seen.

    Args:
      num_classes: C, the number of classes.
      dim: d, the number of feature dimensions.
      dtype: in which the centroids, and the losses built on them, are computed.
    """
    _validate.in_range("num_classes", num_classes, 1)
    _validate.in_range("dim", dim, 1)
    return CentroidState(
        mean=jnp.zeros((num_classes, dim), dtype), seen=jnp.zeros((num_classes,), bool))


def class_sums(
    values: jax.Array, labels: jax.Array, num_classes: int, axis_name: str | None = None
) -> jax.Array:
    """Sums ``values`` [B, ...] by class, [C, ...], over all devices of ``axis_name``.

    A label outside [0, C) counts for no class. On CPUs this is a scatter-add, one example after
    the other; elsewhere a product with the one-hot labels, because scatter-add is not
    deterministic on GPUs.
    """
    sums = jax.lax.platform_dependent(
        jnp.asarray(values), jnp.asarray(labels),
        cpu=functools.partial(_scattered_sums, num_classes=num_classes),
        default=functools.partial(_multiplied_sums, num_classes=num_classes))
    return sums if axis_name is None else jax.lax.psum(sums, axis_name)


def class_counts(
    labels: jax.Array, num_classes: int, dtype: jnp.dtype, axis_name: str | None = None
) -> jax.Array:
    """How many examples of each class there are, [C], over all devices of ``axis_name``."""
    return class_sums(jnp.ones(labels.shape, dtype), labels, num_classes, axis_name)


def class_rows(table: jax.Array, labels: jax.Array) -> jax.Array:
    """The rows of ``table`` [C, ...] of each example's class, [B, ...]; 0 for a label outside.

    The transpose of :func:`class_sums`, on each platform in the same way: the gradient of
    picking rows is a scatter-add. A product takes a block of examples at a time, so that memory
    is O(B d + C d).
    """
    return jax.lax.platform_dependent(
        jnp.asarray(table), jnp.asarray(labels), cpu=_gathered_rows, default=_multiplied_rows)


def _scattered_sums(values, labels, num_classes):
    return jax.ops.segment_sum(values, labels, num_classes)


def _multiplied_sums(values, labels, num_classes):
    # In full precision, because TPUs and GPUs would otherwise round the factors.
    members = jax.nn.one_hot(labels, num_classes, dtype=values.dtype)
    return jnp.tensordot(members, values, axes=((0,), (0,)), precision=jax.lax.Precision.HIGHEST)


def _gathered_rows(table, labels):
    return table.at[labels].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def _multiplied_rows(table, labels, table_size=TABLE_SIZE):
    def row(label):
        member = jax.nn.one_hot(label, table.shape[0], dtype=table.dtype)
        return jnp.tensordot(member, table, axes=1, precision=jax.lax.Precision.HIGHEST)

    # The one-hot labels are made anew in the backward pass, so that none are kept for it.
    return jax.lax.map(
        jax.checkpoint(row), labels, batch_size=max(1, table_size // table.shape[0]))


def update_centroids(
    state: CentroidState,
    features: jax.Array,
    labels: jax.Array,
    *,
    momentum: float = 0.9,
    axis_name: str | None = None,
) -> tuple[Centroids, CentroidState]:
    r"""The centroids of a batch, naive and with momentum, and the next state.

    .. math::
      m_c^{current} = \frac{1}{|C_c^B|} \sum_{x \in C_c^B} q(x), \qquad
      m_c = \gamma\, m_c^{t-1} + (1 - \gamma)\, m_c^{current}

    The stored :math:`m_c^{t-1}` is a constant: the gradient reaches ``running`` through
    the batch's share :math:`1 - \gamma` alone. A class seen for the first time starts at
    its batch mean; an absent class keeps its stored centroid, and takes no part in a loss.

    Args:
      state: what the last update returned, or :func:`init_centroids`.
      features: [B, d], features q of *clean* images; cast to the dtype of ``state.mean``.
      labels: [B], integers in [0, C); others count for no class.
      momentum: gamma in [0, 1); 0 makes ``running`` equal ``current``.
      axis_name: the device axis over which the batch is split, under ``pmap`` or
        ``shard_map``. Sums and counts are added up before they are divided, so the
        result is that of the whole batch.

    Returns:
      ``(centroids, new_state)``.

    Raises:
      InputError: (a ValueError) if shapes do not match or momentum is outside [0, 1).

    >>> state = init_centroids(2, 1)
    >>> features, labels = jnp.array([[1.0], [3.0]]), jnp.array([0, 0])
    >>> centroids, state = update_centroids(state, features, labels)
    >>> centroids.running.tolist(), centroids.present.tolist()
    ([[2.0], [0.0]], [True, False])

    Source: Section 4.4; what a class's first batch does follows the authors' release.
    """
    _validate.in_range("momentum", momentum, 0, 1)
    _validate.shapes(**{"features": (features, "B d"), "labels": (labels, "B"),
                        "state.mean": (state.mean, "C d"), "state.seen": (state.seen, "C")})
    features = features.astype(state.mean.dtype)
    num_classes = state.mean.shape[0]
    sums = class_sums(features, labels, num_classes, axis_name)
    counts = class_counts(labels, num_classes, features.dtype, axis_name)

    present = counts > 0
    current = sums / jnp.maximum(counts, 1)[:, None]
    stored = jax.lax.stop_gradient(state.mean)
    moved = momentum * stored + (1 - momentum) * current
    running = jnp.where(state.seen[:, None], moved, current)
    running = jnp.where(present[:, None], running, stored)
    new_state = CentroidState(
        mean=jax.lax.stop_gradient(running), seen=state.seen | present)
    return Centroids(current, running, present), new_state
