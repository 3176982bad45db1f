"""What the methods share: the types of an objective, what it costs, and its parts.

See :mod:`jaxrobust.methods` for how an objective treats labels that do not count, devices, random
numbers and batch statistics.
"""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxrobust import _validate
from jaxrobust.centroids import CentroidState, counted, update_centroids
from jaxrobust.images import Batch, Outputs, predicted_classes
from jaxrobust.losses import RobustLossConfig, mean_over_batch
from jaxrobust.methods.options import MethodOptions
from jaxrobust.perturbations import Perturbation

BatchStats = Any
Head = tuple[jax.Array, jax.Array]
"""``(kernel [d, C], bias [C])`` of the softmax layer."""

Pass = Callable[[BatchStats, jax.Array], tuple[Outputs, BatchStats]]
"""``(batch_stats, images) -> (outputs, new batch_stats)``, in training mode."""

Forward = Callable[..., tuple[Any, ...]]
"""``(batch_stats, *batches) -> (*outputs, new batch_stats)``, in training mode: the outputs for one
or several batches of B images, each of which batch norm sees, and is updated by, in turn."""


def in_turn(forward: Pass) -> Forward:
    """Passes batches through the network one after the other."""
    def passes(batch_stats: BatchStats, *batches: jax.Array) -> tuple[Any, ...]:
        seen = []
        for images in batches:
            outputs, batch_stats = forward(batch_stats, images)
            seen.append(outputs)
        return *seen, batch_stats

    return passes


def at_once(forward: Pass) -> Forward:
    """Passes batches through the network as one; it says what batch norm sees."""
    def one_pass(batch_stats: BatchStats, *batches: jax.Array) -> tuple[Any, ...]:
        outputs, batch_stats = forward(batch_stats, jnp.concatenate(batches))
        size = len(batches[0])
        rows = (slice(first, first + size) for first in range(0, size * len(batches), size))
        return *(jax.tree.map(operator.itemgetter(own), outputs) for own in rows), batch_stats

    return one_pass


class Evaluated(NamedTuple):
    """What an objective returns besides the loss."""

    batch_stats: BatchStats
    centroids: CentroidState
    metrics: dict[str, jax.Array]  # each []; over the whole batch


class Objective(Protocol):
    """Computes ``(loss [], Evaluated)`` of a batch; see :mod:`jaxrobust.methods`."""

    def __call__(
        self, forward: Forward, head: Head, batch_stats: BatchStats,
        centroids: CentroidState, batch: Batch, *, weight: jax.Array | float, key: jax.Array,
        axis_name: str | None,
    ) -> tuple[jax.Array, Evaluated]: ...


class Passes(NamedTuple):
    """Passes of B images through the network in an update."""

    forward: float  # also of tangents, as in a Hessian-vector product
    to_images: float  # backward, to gradients by the images: as much work as a forward pass
    backward: float  # backward, to gradients by the parameters too: twice as much

    @property
    def relative(self) -> float:
        """The work of an update, in units of one of ``normal``."""
        return (self.forward + self.to_images + 2 * self.backward) / 3


@dataclasses.dataclass(frozen=True)
class Method:
    """A training method: its name, its objective and what an update costs."""

    name: str
    objective: Objective
    passes: Passes


SoftmaxLoss = Callable[..., jax.Array]
""":func:`~jaxrobust.losses.softmax_loss`, with the run's options of it bound."""


class Parts(NamedTuple):
    """What objectives are made of: the arguments of :func:`~jaxrobust.methods.make_method`."""

    softmax: SoftmaxLoss
    robust: RobustLossConfig
    stability_weight: float
    one_pass: bool
    perturb: Perturbation | None
    options: MethodOptions


Maker = Callable[[Parts], tuple[Objective, Passes]]
"""Makes the objective of a method, and says what it costs."""


def accuracy(logits: jax.Array, labels: jax.Array, axis_name: str | None) -> jax.Array:
    """Accuracy on the examples that count; logits that are not finite predict no class."""
    labels = _validate.class_numbers("labels", labels)
    return mean_over_batch((predicted_classes(logits) == labels).astype(jnp.float32), axis_name,
                           counts=counted(labels, logits.shape[1]))


def scaled(weight: jax.Array | float, loss: jax.Array) -> jax.Array:
    """Scales a loss, keeping its dtype whatever that of the weight is, such as float64."""
    return jnp.asarray(weight, loss.dtype) * loss


def track(
    centroids: CentroidState, features: jax.Array, labels: jax.Array, axis_name: str | None
) -> CentroidState:
    """Updates the centroids of a method whose loss they do not enter."""
    return update_centroids(centroids, jax.lax.stop_gradient(features), labels,
                            axis_name=axis_name)[1]


def positions(size: int, axis_name: str | None) -> jax.Array:
    """The positions [B] of a device's examples in the whole batch, to draw random numbers by."""
    first = 0 if axis_name is None else size * jax.lax.axis_index(axis_name)
    return first + jnp.arange(size, dtype=jnp.int32)


Added = tuple[jax.Array, CentroidState, dict[str, jax.Array]]
"""A loss, [], the next centroids, and the terms of the loss, each []."""

Add = Callable[..., Added]
"""A loss on what the network returns, called as ``add(clean, noisy, labels, head, centroids,
axis_name)`` with the :class:`~jaxrobust.images.Outputs` of both views."""


def nothing(
    clean: Outputs, noisy: Outputs, labels: jax.Array, head: Head, centroids: CentroidState,
    axis_name: str | None
) -> Added:
    """Adds no loss; only tracks the centroids."""
    del noisy, head
    none = jnp.zeros((), _validate.floats("features", clean.features).dtype)
    return none, track(centroids, clean.features, labels, axis_name), {}


def one_view(view: str, softmax: SoftmaxLoss, add: Add) -> Objective:
    """The softmax loss on one of the two views, plus a loss on what the network returns for it."""

    def objective(
        forward: Forward, head: Head, batch_stats: BatchStats, centroids: CentroidState,
        batch: Batch, *, weight: jax.Array | float, key: jax.Array, axis_name: str | None
    ) -> tuple[jax.Array, Evaluated]:
        del key
        outputs, batch_stats = forward(batch_stats, getattr(batch, view))
        loss = softmax(outputs.logits, batch.labels, axis_name=axis_name)
        added, centroids, terms = add(
            outputs, outputs, batch.labels, head, centroids, axis_name)
        metrics = {"softmax": loss,
                   f"accuracy_{view}": accuracy(outputs.logits, batch.labels, axis_name), **terms}
        return loss + scaled(weight, added), Evaluated(batch_stats, centroids, metrics)

    return objective


def pass_both_views(
    forward: Forward, batch_stats: BatchStats, batch: Batch, *, one_pass: bool
) -> tuple[Outputs, Outputs, BatchStats]:
    """The outputs for clean and for noisy images.

    In one pass batch norm sees both together. In two passes it sees, and is updated by, first the
    clean images and then the noisy ones, so that its running statistics lie between those of either
    pass.
    """
    if one_pass:
        return at_once(forward)(batch_stats, batch.clean, batch.noisy)
    return forward(batch_stats, batch.clean, batch.noisy)


def two_views(
    softmax: SoftmaxLoss, add: Add, *, one_pass: bool, softmax_on_noisy: bool = False,
) -> Objective:
    """The softmax loss plus a loss on what the network returns for both views."""

    def objective(
        forward: Forward, head: Head, batch_stats: BatchStats, centroids: CentroidState,
        batch: Batch, *, weight: jax.Array | float, key: jax.Array, axis_name: str | None
    ) -> tuple[jax.Array, Evaluated]:
        del key
        clean, noisy, batch_stats = pass_both_views(forward, batch_stats, batch, one_pass=one_pass)
        loss = softmax(clean.logits, batch.labels, axis_name=axis_name)
        if softmax_on_noisy:
            loss = (loss + softmax(noisy.logits, batch.labels, axis_name=axis_name)) / 2
        added, centroids, terms = add(clean, noisy, batch.labels, head, centroids, axis_name)
        metrics = {"softmax": loss,
                   "accuracy_clean": accuracy(clean.logits, batch.labels, axis_name),
                   "accuracy_noisy": accuracy(noisy.logits, batch.labels, axis_name), **terms}
        return loss + scaled(weight, added), Evaluated(batch_stats, centroids, metrics)

    return objective


PASSES_OF_ONE_VIEW, PASSES_OF_TWO_VIEWS = Passes(1, 0, 1), Passes(2, 0, 2)
