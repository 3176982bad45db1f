"""Class centroids in feature space as an explicit state (Section 4.4 of the paper)."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxrobust import _validate, parallel

TABLE_SIZE = 2**22
"""The most entries of a table of examples or classes by classes that are in memory together."""


class CentroidState(NamedTuple):
    """The class centroids, as kept from one update to the next."""

    mean: jax.Array  # shape=[C, d], a floating dtype; carries no gradient
    seen: jax.Array  # shape=[C], dtype=bool; classes that have had an example


class Centroids(NamedTuple):
    """The centroids of one update, differentiable in the features; float32 or wider."""

    current: jax.Array  # shape=[C, d]; means over this batch ("naive"), 0 where absent
    running: jax.Array  # shape=[C, d]; with momentum
    present: jax.Array  # shape=[C], dtype=bool; classes in this (global) batch


def init_centroids(num_classes: int, dim: int, *, dtype: DTypeLike = jnp.float32) -> CentroidState:
    """Makes the state before any example was seen: zeros, no class seen.

    Args:
      num_classes: C, the number of classes.
      dim: d, the number of feature dimensions.
      dtype: the floating dtype in which the means are stored. Centroids and losses are computed in
        it too, or in float32 if it is narrower, such as bfloat16; a mean with momentum then stops
        where a batch moves it by less than half a digit.

    Raises:
      InputError: (a ValueError) if a size is not an integer >= 1, or the dtype not a floating one.
    """
    num_classes = _validate.integer("num_classes", num_classes, 1)
    dim = _validate.integer("dim", dim, 1)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise _validate.InputError(
            f"Expected a floating dtype for the centroids, got dtype={jnp.dtype(dtype).name}.")
    return CentroidState(
        mean=jnp.zeros((num_classes, dim), dtype), seen=jnp.zeros((num_classes,), bool))


def counted(labels: jax.Array, num_classes: int) -> jax.Array:
    """Tells which examples count, [B] bool: those with a label in [0, num_classes)."""
    return (labels >= 0) & (labels < num_classes)


def counted_rows(values: jax.Array, labels: jax.Array, num_classes: int) -> jax.Array:
    """Sets the rows of ``values`` [B, ...] whose examples do not count to 0.

    NaN in such a row would survive multiplication by 0, in sums and gradients.
    """
    counts = counted(labels, num_classes)
    return jnp.where(counts.reshape(counts.shape + (1,) * (values.ndim - 1)), values, 0)


def class_sums(
    values: jax.Array, labels: jax.Array, num_classes: int, axis_name: str | None = None
) -> jax.Array:
    """Sums ``values`` [B, ...] by class, [C, ...], over all devices of ``axis_name``.

    They are added up in float32, if ``values`` are not wider. Rows with a label outside [0, C) are
    ignored, whatever they contain. On CPUs this is a scatter-add, one example after the other;
    elsewhere a product with the one-hot labels, because scatter-add is not deterministic on GPUs.
    """
    def by_platform(values: jax.Array, labels: jax.Array) -> jax.Array:
        return jax.lax.platform_dependent(
            values, labels, cpu=functools.partial(_scattered_sums, num_classes=num_classes),
            default=functools.partial(_multiplied_sums, num_classes=num_classes))

    sums = parallel.over_any_mesh(by_platform)(
        _validate.floats("values", values), _validate.class_numbers("labels", labels))
    return sums if axis_name is None else jax.lax.psum(sums, axis_name)


def class_counts(
    labels: jax.Array, num_classes: int, dtype: jnp.dtype, axis_name: str | None = None
) -> jax.Array:
    """Counts the examples of each class, [C], over all devices of ``axis_name``.

    The counts are of ``dtype``, or of float32 if it is narrower: bfloat16 counts to 256.
    """
    return class_sums(jnp.ones(labels.shape, dtype), labels, num_classes, axis_name)


def class_rows(table: jax.Array, labels: jax.Array) -> jax.Array:
    """Picks the row of ``table`` [C, ...] of each example's class, [B, ...]; 0 for a label outside.

    It is the transpose of :func:`class_sums`, computed on each platform in the same way, since the
    gradient of picking rows is a scatter-add. The product takes a block of examples at a time, so
    that memory is O(B d + C d). The rows, and the sums of their gradients, are in float32 if
    ``table`` is not wider.
    """
    def by_platform(table: jax.Array, labels: jax.Array) -> jax.Array:
        return jax.lax.platform_dependent(
            table, labels, cpu=_gathered_rows, default=_multiplied_rows)

    return parallel.over_any_mesh(by_platform, split_as=lambda table, labels: labels)(
        _validate.floats("table", table), _validate.class_numbers("labels", labels))


def _scattered_sums(values: jax.Array, labels: jax.Array, num_classes: int) -> jax.Array:
    return jax.ops.segment_sum(values, labels, num_classes)


def _multiplied_sums(values: jax.Array, labels: jax.Array, num_classes: int) -> jax.Array:
    # In full precision: TPUs and GPUs would otherwise round the factors.
    values = counted_rows(values, labels, num_classes)
    members = jax.nn.one_hot(labels, num_classes, dtype=values.dtype)
    return jnp.tensordot(members, values, axes=((0,), (0,)), precision=jax.lax.Precision.HIGHEST)


def _gathered_rows(table: jax.Array, labels: jax.Array) -> jax.Array:
    return table.at[labels].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def _multiplied_rows(
    table: jax.Array, labels: jax.Array, table_size: int = TABLE_SIZE
) -> jax.Array:
    def row(label: jax.Array) -> jax.Array:
        member = jax.nn.one_hot(label, table.shape[0], dtype=table.dtype)
        return jnp.tensordot(member, table, axes=1, precision=jax.lax.Precision.HIGHEST)

    # The one-hot labels are recomputed in the backward pass, so that none are kept for it.
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
    r"""Computes the centroids of a batch, naive and with momentum, and the next state.

    .. math::
      m_c^{current} = \frac{1}{|C_c^B|} \sum_{x \in C_c^B} q(x), \qquad
      m_c = \gamma\, m_c^{t-1} + (1 - \gamma)\, m_c^{current}

    The stored :math:`m_c^{t-1}` is a constant: the gradient reaches ``running`` only through
    the batch's share :math:`1 - \gamma`. A class seen for the first time starts at
    its batch mean; an absent class keeps its stored centroid, and does not enter any loss.

    Args:
      state: what the last update returned, or :func:`init_centroids`.
      features: [B, d], features q of *clean* images; cast to the dtype of ``state.mean``, or
        float32 if that is narrower.
      labels: [B], integers in [0, C). Others, such as -1, mark examples that do not count:
        whatever their features are, centroids and gradients are as without them.
      momentum: gamma in [0, 1); 0 makes ``running`` equal ``current``.
      axis_name: the device axis over which the batch is split, under ``pmap`` or ``shard_map``.
        Sums and counts are added up over it before they are divided, so that the result is that
        of the whole batch.

    Returns:
      ``(centroids, new_state)``.

    Raises:
      InputError: (a ValueError) if shapes do not match or a size is 0, a dtype is wrong, or the
        momentum is out of its range.

    >>> state = init_centroids(2, 1)
    >>> features, labels = jnp.array([[1.0], [3.0]]), jnp.array([0, 0])
    >>> centroids, state = update_centroids(state, features, labels)
    >>> centroids.running.tolist(), centroids.present.tolist()
    ([[2.0], [0.0]], [True, False])

    Source: Section 4.4; what a class's first batch does follows the authors' release.
    """
    _validate.in_range("momentum", momentum, 0, 1)
    features, labels = (
        _validate.floats("features", features), _validate.class_numbers("labels", labels))
    _validate.instance("state", state, CentroidState)
    state = CentroidState(*map(jnp.asarray, state))
    mean, seen = _validate.floats("state.mean", state.mean), state.seen
    num_classes = _validate.shapes(**{
        "features": (features, "B d"), "labels": (labels, "B"), "state.mean": (mean, "C d"),
        "state.seen": (seen, "C")})["C"]
    features = features.astype(mean.dtype)
    sums = class_sums(features, labels, num_classes, axis_name)
    counts = class_counts(labels, num_classes, features.dtype, axis_name)

    present = counts > 0
    current = sums / jnp.maximum(counts, 1)[:, None]
    stored = jax.lax.stop_gradient(mean)
    momentum = jnp.asarray(momentum, mean.dtype)
    moved = momentum * stored + (1 - momentum) * current
    running = jnp.where(seen[:, None], moved, current)
    running = jnp.where(present[:, None], running, stored)
    new_state = CentroidState(
        mean=jax.lax.stop_gradient(running).astype(state.mean.dtype), seen=seen | present)
    return Centroids(current, running, present), new_state
