"""The five training methods of the paper (Section 7.1), each one objective function.

An objective sees the model as a function ``forward(batch_stats, images)`` and knows nothing of
optimisers or devices. It returns the loss of the whole batch, also where the batch is split
over an ``axis_name``.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from jaxrobust import _validate
from jaxrobust.centroids import CentroidState, update_centroids
from jaxrobust.losses import RobustLossConfig, mean_over_batch, robust_loss, stability_loss
from jaxrobust.models.common import Outputs

BatchStats = Any
Forward = Callable[[BatchStats, jax.Array], tuple[Outputs, BatchStats]]
"""``(batch_stats, images) -> (outputs, new batch_stats)``, in training mode."""


class Batch(NamedTuple):
    """Both views of a batch of images, and their labels."""

    clean: jax.Array  # shape=[B, H, W, channels], dtype=float32; pixels in [0, 1]
    noisy: jax.Array  # shape=[B, H, W, channels], dtype=float32; pixels in [0, 1]
    labels: jax.Array  # shape=[B], dtype=int32


class Evaluated(NamedTuple):
    """What an objective returns beside the loss."""

    batch_stats: BatchStats
    centroids: CentroidState
    metrics: dict[str, jax.Array]  # each []; over the whole batch


class Objective(Protocol):
    """``(loss [], Evaluated)`` of a batch; see the module's docstring."""

    def __call__(
        self, forward: Forward, head: tuple[jax.Array, jax.Array], batch_stats: BatchStats,
        centroids: CentroidState, batch: Batch, *, weight: jax.Array | float,
        axis_name: str | None,
    ) -> tuple[jax.Array, Evaluated]: ...


@dataclasses.dataclass(frozen=True)
class Method:
    """A training method: its name and its objective."""

    name: str
    objective: Objective


def softmax_loss(
    logits: jax.Array, labels: jax.Array, *, axis_name: str | None = None
) -> jax.Array:
    r"""Mean cross-entropy :math:`-\log \sigma(z)_y` (Eq. 3 and 4) of logits [B, C], a []."""
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    return mean_over_batch(losses, axis_name)


def _accuracy(logits: jax.Array, labels: jax.Array, axis_name: str | None) -> jax.Array:
    correct = jnp.argmax(logits, axis=-1) == labels
    return mean_over_batch(correct.astype(jnp.float32), axis_name)


def _one_view(view: str) -> Objective:
    """The softmax loss on one of the two views."""

    def objective(forward, head, batch_stats, centroids, batch, *, weight, axis_name):
        del head, weight
        outputs, batch_stats = forward(batch_stats, getattr(batch, view))
        loss = softmax_loss(outputs.logits, batch.labels, axis_name=axis_name)
        centroids = _track(centroids, outputs.features, batch.labels, axis_name)
        metrics = {"softmax": loss,
                   f"accuracy_{view}": _accuracy(outputs.logits, batch.labels, axis_name)}
        return loss, Evaluated(batch_stats, centroids, metrics)

    return objective


def _track(centroids, features, labels, axis_name):
    """Centroids for their own sake: for the baselines they take no part in the loss."""
    return update_centroids(centroids, jax.lax.stop_gradient(features), labels,
                            axis_name=axis_name)[1]


def _both_objective(forward, head, batch_stats, centroids, batch, *, weight, axis_name):
    """The softmax loss on clean and noisy images, concatenated in one pass."""
    del head, weight
    size = batch.labels.shape[0]
    labels = jnp.concatenate([batch.labels, batch.labels])
    outputs, batch_stats = forward(batch_stats, jnp.concatenate([batch.clean, batch.noisy]))
    loss = softmax_loss(outputs.logits, labels, axis_name=axis_name)
    centroids = _track(centroids, outputs.features[:size], batch.labels, axis_name)
    metrics = {"softmax": loss,
               "accuracy_clean": _accuracy(outputs.logits[:size], batch.labels, axis_name),
               "accuracy_noisy": _accuracy(outputs.logits[size:], batch.labels, axis_name)}
    return loss, Evaluated(batch_stats, centroids, metrics)


def _two_passes(forward, batch_stats, batch, axis_name):
    """Clean, then noisy: batch norm sees, and is updated by, one after the other."""
    clean, batch_stats = forward(batch_stats, batch.clean)
    noisy, batch_stats = forward(batch_stats, batch.noisy)
    loss = softmax_loss(clean.logits, batch.labels, axis_name=axis_name)
    metrics = {"softmax": loss,
               "accuracy_clean": _accuracy(clean.logits, batch.labels, axis_name),
               "accuracy_noisy": _accuracy(noisy.logits, batch.labels, axis_name)}
    return clean, noisy, batch_stats, loss, metrics


def _stability(stability_weight: float) -> Objective:
    """The softmax loss on clean images plus the distance of noisy from clean features."""

    def objective(forward, head, batch_stats, centroids, batch, *, weight, axis_name):
        del head
        clean, noisy, batch_stats, loss, metrics = _two_passes(
            forward, batch_stats, batch, axis_name)
        distance = stability_loss(clean.features, noisy.features, axis_name=axis_name)
        centroids = _track(centroids, clean.features, batch.labels, axis_name)
        return (loss + weight * stability_weight * distance,
                Evaluated(batch_stats, centroids, {**metrics, "stability": distance}))

    return objective


def _robust(config: RobustLossConfig) -> Objective:
    """The softmax loss on clean images plus the paper's loss on both views' features."""

    def objective(forward, head, batch_stats, centroids, batch, *, weight, axis_name):
        clean, noisy, batch_stats, loss, metrics = _two_passes(
            forward, batch_stats, batch, axis_name)
        ours, terms, centroids = robust_loss(
            clean.features, noisy.features, batch.labels, *head, centroids, config,
            axis_name=axis_name)
        return (loss + weight * ours,
                Evaluated(batch_stats, centroids, {**metrics, **terms._asdict()}))

    return objective


METHODS = ("normal", "noisy", "both", "stability", "robust")
"""The paper's methods: the rows of its tables, in their order."""


def make_method(
    name: str,
    *,
    robust: RobustLossConfig = RobustLossConfig(),
    stability_weight: float = 1.0,
) -> Method:
    """The method of that name.

    ``normal``: softmax loss on clean images. ``noisy``: on noisy images. ``both``: on both,
    in one pass. ``stability``: on clean images, plus the distance between the features of
    both. ``robust``: on clean images, plus the paper's loss (Eq. 13).

    Args:
      name: one of :data:`METHODS`.
      robust: of ``robust`` alone.
      stability_weight: of ``stability`` alone, >= 0.

    Raises:
      InputError: (a ValueError) for an unknown name or a negative weight.

    Source: Section 7.1.
    """
    _validate.one_of("method", name, METHODS)
    _validate.in_range("stability_weight", stability_weight, 0)
    objectives = {
        "normal": _one_view("clean"),
        "noisy": _one_view("noisy"),
        "both": _both_objective,
        "stability": _stability(stability_weight),
        "robust": _robust(robust),
    }
    return Method(name, objectives[name])
