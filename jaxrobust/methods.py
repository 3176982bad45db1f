"""The training methods of the paper (Section 7.1 and 7.6), each one objective function.

An objective sees the model as a function ``forward(batch_stats, images)`` and knows nothing about
optimisers or devices. It returns the loss of the whole batch, also where the batch is split
over an ``axis_name``.

**Labels that do not count.** An example whose label is outside [0, C), such as -1, does not count
(PyTorch's ``ignore_index``): every term of every objective, its gradients, the centroids and the
accuracies are as without it, whatever its logits and features are, NaN included. Means are over
the examples that count, of all devices; if there are none, the loss is 0. Its images still go
through the network: they enter the batch statistics of batch norm, through which a NaN in them can
spread to other examples. Labels are integers of any width; bool is an error.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust import _validate
from jaxrobust.centroids import CentroidState, update_centroids
from jaxrobust.images import Batch, Outputs
from jaxrobust.losses import (
    RobustLossConfig,
    counted,
    mean_over_batch,
    robust_loss,
    softmax_loss,
    stability_loss,
)

BatchStats = Any
Forward = Callable[[BatchStats, jax.Array], tuple[Outputs, BatchStats]]
"""``(batch_stats, images) -> (outputs, new batch_stats)``, in training mode."""


class Evaluated(NamedTuple):
    """What an objective returns besides the loss."""

    batch_stats: BatchStats
    centroids: CentroidState
    metrics: dict[str, jax.Array]  # each []; over the whole batch


class Objective(Protocol):
    """Computes ``(loss [], Evaluated)`` of a batch; see the module's docstring."""

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


SoftmaxLoss = Callable[..., jax.Array]
""":func:`softmax_loss`, perhaps with class weights bound to it."""


def _accuracy(logits: jax.Array, labels: jax.Array, axis_name: str | None) -> jax.Array:
    """Accuracy on the examples that count; logits that are not finite predict no class."""
    labels = _validate.class_numbers("labels", labels)
    # argmax would take NaN for the largest.
    predicted = jnp.where(jnp.isfinite(logits).all(axis=-1), jnp.argmax(logits, axis=-1), -1)
    return mean_over_batch((predicted == labels).astype(jnp.float32), axis_name,
                           counts=counted(labels, logits.shape[1]))


Added = Callable[..., tuple[jax.Array, CentroidState, dict[str, jax.Array]]]
"""A loss on features, called as ``add(clean, noisy, labels, head, centroids, axis_name)``; returns
the loss, the next centroids and the terms of the loss."""


def _one_view(view: str, softmax: SoftmaxLoss, add: Added) -> Objective:
    """The softmax loss on one of the two views, plus a loss on its features."""

    def objective(forward, head, batch_stats, centroids, batch, *, weight, axis_name):
        outputs, batch_stats = forward(batch_stats, getattr(batch, view))
        loss = softmax(outputs.logits, batch.labels, axis_name=axis_name)
        added, centroids, terms = add(
            outputs.features, outputs.features, batch.labels, head, centroids, axis_name)
        metrics = {"softmax": loss,
                   f"accuracy_{view}": _accuracy(outputs.logits, batch.labels, axis_name), **terms}
        return loss + _scaled(weight, added), Evaluated(batch_stats, centroids, metrics)

    return objective


def _track(centroids, features, labels, axis_name):
    """Updates the centroids of a baseline, whose loss they do not enter."""
    return update_centroids(centroids, jax.lax.stop_gradient(features), labels,
                            axis_name=axis_name)[1]


def _both_views(
    forward: Forward, batch_stats: BatchStats, batch: Batch, *, one_pass: bool
) -> tuple[Outputs, Outputs, BatchStats]:
    """The outputs for clean and for noisy images.

    In one pass batch norm sees both together. In two passes it sees, and is updated by, first the
    clean images and then the noisy ones, so that its running statistics lie between those of either
    pass.
    """
    if not one_pass:
        clean, batch_stats = forward(batch_stats, batch.clean)
        noisy, batch_stats = forward(batch_stats, batch.noisy)
        return clean, noisy, batch_stats
    size = batch.labels.shape[0]
    outputs, batch_stats = forward(batch_stats, jnp.concatenate([batch.clean, batch.noisy]))
    return (jax.tree.map(lambda x: x[:size], outputs), jax.tree.map(lambda x: x[size:], outputs),
            batch_stats)


def _two_views(
    softmax: SoftmaxLoss, add: Added, *, one_pass: bool, softmax_on_noisy: bool = False,
) -> Objective:
    """The softmax loss plus a loss on both views' features."""

    def objective(forward, head, batch_stats, centroids, batch, *, weight, axis_name):
        clean, noisy, batch_stats = _both_views(forward, batch_stats, batch, one_pass=one_pass)
        loss = softmax(clean.logits, batch.labels, axis_name=axis_name)
        if softmax_on_noisy:
            loss = (loss + softmax(noisy.logits, batch.labels, axis_name=axis_name)) / 2
        added, centroids, terms = add(
            clean.features, noisy.features, batch.labels, head, centroids, axis_name)
        metrics = {"softmax": loss,
                   "accuracy_clean": _accuracy(clean.logits, batch.labels, axis_name),
                   "accuracy_noisy": _accuracy(noisy.logits, batch.labels, axis_name), **terms}
        return loss + _scaled(weight, added), Evaluated(batch_stats, centroids, metrics)

    return objective


def _nothing(clean, noisy, labels, head, centroids, axis_name):
    """No loss; only the centroids are tracked."""
    del noisy, head
    none = jnp.zeros((), _validate.floats("features", clean).dtype)
    return none, _track(centroids, clean, labels, axis_name), {}


def _scaled(weight: jax.Array | float, loss: jax.Array) -> jax.Array:
    """Scales a loss, keeping its dtype whatever that of the weight is, such as float64."""
    return jnp.asarray(weight, loss.dtype) * loss


def _stability(stability_weight: float) -> Added:
    def add(clean, noisy, labels, head, centroids, axis_name):
        kernel, _ = head
        counts = counted(_validate.class_numbers("labels", labels), kernel.shape[1])
        distance = stability_loss(clean, noisy, counts=counts, axis_name=axis_name)
        return (_scaled(stability_weight, distance), _track(centroids, clean, labels, axis_name),
                {"stability": distance})

    return add


def _robust(config: RobustLossConfig, *, align: bool = True) -> Added:
    """The paper's loss (Eq. 13), or only its constraints on the clean view (Eq. 7)."""
    config = config if align else dataclasses.replace(config, lam=0.0)

    def add(clean, noisy, labels, head, centroids, axis_name):
        ours, terms, centroids = robust_loss(
            clean, noisy, labels, *head, centroids, config, axis_name=axis_name)
        shown = {name: term for name, term in terms._asdict().items() if align or name != "align"}
        return ours, centroids, shown

    return add


METHODS = ("normal", "noisy", "both", "stability", "robust", "robust_clean", "robust_both")
"""The rows of the paper's tables in their order, the method of its ablation (Table 5), and one
beyond the paper."""


def make_method(
    name: str,
    *,
    robust: RobustLossConfig = RobustLossConfig(),
    stability_weight: float = 1.0,
    one_pass: bool = False,
    class_weights: Sequence[float] | None = None,
) -> Method:
    """Makes the method of that name.

    ``normal``: softmax loss on clean images. ``noisy``: on noisy images. ``both``: on both,
    in one pass. ``stability``: on clean images, plus the distance between the features of
    both. ``robust``: on clean images, plus the paper's loss (Eq. 13). ``robust_clean``: the same
    without noisy images (Eq. 7). ``robust_both``, beyond the paper: the softmax loss of ``both``
    plus the paper's loss.

    Args:
      name: one of :data:`METHODS`.
      robust: for ``robust``, ``robust_clean`` and ``robust_both``.
      stability_weight: for ``stability``, >= 0.
      class_weights: [C], > 0, for every softmax loss, see :func:`softmax_loss`; None for 1 each.
        The terms added to the softmax losses are not weighted.
      one_pass: for ``stability`` and ``robust``: whether clean and noisy images go through the
        network together, as they always do for ``both``, or one after the other, as in the paper.

    Raises:
      InputError: (a ValueError) for an unknown name, or a weight out of range.

    Source: Section 7.1; Section 7.6.
    """
    _validate.one_of("method", name, METHODS)
    _validate.in_range("stability_weight", stability_weight, 0)
    softmax: SoftmaxLoss = softmax_loss
    if class_weights is not None:
        for number, value in enumerate(class_weights):
            _validate.in_range(f"class_weights[{number}]", value, 0, open_low=True)
        softmax = functools.partial(
            softmax_loss, class_weights=np.asarray(class_weights, np.float32))
    objectives = {
        "normal": _one_view("clean", softmax, _nothing),
        "noisy": _one_view("noisy", softmax, _nothing),
        "both": _two_views(softmax, _nothing, one_pass=True, softmax_on_noisy=True),
        "stability": _two_views(softmax, _stability(stability_weight), one_pass=one_pass),
        "robust": _two_views(softmax, _robust(robust), one_pass=one_pass),
        "robust_clean": _one_view("clean", softmax, _robust(robust, align=False)),
        "robust_both": _two_views(
            softmax, _robust(robust), one_pass=True, softmax_on_noisy=True),
    }
    return Method(name, objectives[name])
