"""The training methods of the paper (Section 7.1 and 7.6), each one objective function.

An objective sees the model as a function ``forward(batch_stats, images)`` and knows nothing of
optimisers or devices. It returns the loss of the whole batch, also where the batch is split
over an ``axis_name``.

**Labels that do not count.** An example whose label is outside [0, C), such as -1, does not count
(what PyTorch calls ``ignore_index``): every term of every objective, its gradients, the centroids
and the accuracies are as without it, whatever its logits and features are, NaN too. Means are
over the examples that count, of all devices; if there are none, the loss is 0. Only the network
sees its images: they do enter the batch statistics of batch norm, and what is NaN in them can
spread there to others. Labels are integers of any width; bool is an error.
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


SoftmaxLoss = Callable[..., jax.Array]
""":func:`softmax_loss`, or it with weights of the classes."""


def _accuracy(logits: jax.Array, labels: jax.Array, axis_name: str | None) -> jax.Array:
    """Accuracy on the examples that count; logits that are not finite predict no class."""
    labels = _validate.class_numbers("labels", labels)
    # argmax would take what is not a number for the largest.
    predicted = jnp.where(jnp.isfinite(logits).all(axis=-1), jnp.argmax(logits, axis=-1), -1)
    return mean_over_batch((predicted == labels).astype(jnp.float32), axis_name,
                           counts=counted(labels, logits.shape[1]))


def _one_view(view: str, softmax: SoftmaxLoss) -> Objective:
    """The softmax loss on one of the two views."""

    def objective(forward, head, batch_stats, centroids, batch, *, weight, axis_name):
        del head, weight
        outputs, batch_stats = forward(batch_stats, getattr(batch, view))
        loss = softmax(outputs.logits, batch.labels, axis_name=axis_name)
        centroids = _track(centroids, outputs.features, batch.labels, axis_name)
        metrics = {"softmax": loss,
                   f"accuracy_{view}": _accuracy(outputs.logits, batch.labels, axis_name)}
        return loss, Evaluated(batch_stats, centroids, metrics)

    return objective


def _track(centroids, features, labels, axis_name):
    """Centroids for their own sake: for the baselines they take no part in the loss."""
    return update_centroids(centroids, jax.lax.stop_gradient(features), labels,
                            axis_name=axis_name)[1]


def _both_views(
    forward: Forward, batch_stats: BatchStats, batch: Batch, *, one_pass: bool
) -> tuple[Outputs, Outputs, BatchStats]:
    """The outputs for clean and for noisy images.

    In one pass batch norm sees both together. In two it sees, and is updated by, the clean
    images and then the noisy ones, so that its running statistics, used in evaluation, lie
    between those of either pass.
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
    add: Callable[..., tuple[jax.Array, CentroidState, dict[str, jax.Array]]],
    softmax: SoftmaxLoss, *, one_pass: bool, softmax_on_noisy: bool = False,
) -> Objective:
    """The softmax loss plus what ``add`` makes of both views' features.

    ``add(clean, noisy, labels, head, centroids, axis_name)`` returns the added loss, the next
    centroids and its terms.
    """

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
    del noisy, head
    none = jnp.zeros((), _validate.floats("features", clean).dtype)
    return none, _track(centroids, clean, labels, axis_name), {}


def _scaled(weight: jax.Array | float, loss: jax.Array) -> jax.Array:
    """A weight of any dtype, such as NumPy's float64, leaves that of the loss."""
    return jnp.asarray(weight, loss.dtype) * loss


def _stability(stability_weight: float):
    def add(clean, noisy, labels, head, centroids, axis_name):
        kernel, _ = head
        counts = counted(_validate.class_numbers("labels", labels), kernel.shape[1])
        distance = stability_loss(clean, noisy, counts=counts, axis_name=axis_name)
        return (_scaled(stability_weight, distance), _track(centroids, clean, labels, axis_name),
                {"stability": distance})

    return add


def _robust(config: RobustLossConfig):
    def add(clean, noisy, labels, head, centroids, axis_name):
        ours, terms, centroids = robust_loss(
            clean, noisy, labels, *head, centroids, config, axis_name=axis_name)
        return ours, centroids, terms._asdict()

    return add


def _robust_clean(config: RobustLossConfig, softmax: SoftmaxLoss) -> Objective:
    """The softmax loss plus the constraints, all on the clean view (Eq. 7)."""
    config = dataclasses.replace(config, lam=0.0)

    def objective(forward, head, batch_stats, centroids, batch, *, weight, axis_name):
        outputs, batch_stats = forward(batch_stats, batch.clean)
        loss = softmax(outputs.logits, batch.labels, axis_name=axis_name)
        ours, terms, centroids = robust_loss(
            outputs.features, outputs.features, batch.labels, *head, centroids, config,
            axis_name=axis_name)
        metrics = {"softmax": loss,
                   "accuracy_clean": _accuracy(outputs.logits, batch.labels, axis_name),
                   "compact": terms.compact, "margin": terms.margin, "norm": terms.norm}
        return loss + _scaled(weight, ours), Evaluated(batch_stats, centroids, metrics)

    return objective


METHODS = ("normal", "noisy", "both", "stability", "robust", "robust_clean")
"""The rows of the paper's tables in their order, and the method of its ablation (Table 5)."""


def make_method(
    name: str,
    *,
    robust: RobustLossConfig = RobustLossConfig(),
    stability_weight: float = 1.0,
    one_pass: bool = False,
    class_weights: Sequence[float] | None = None,
) -> Method:
    """The method of that name.

    ``normal``: softmax loss on clean images. ``noisy``: on noisy images. ``both``: on both,
    in one pass. ``stability``: on clean images, plus the distance between the features of
    both. ``robust``: on clean images, plus the paper's loss (Eq. 13). ``robust_clean``: the same
    without noisy images (Eq. 7).

    Args:
      name: one of :data:`METHODS`.
      robust: of the last two alone.
      stability_weight: of ``stability`` alone, >= 0.
      class_weights: [C], > 0, of every softmax loss, see :func:`softmax_loss`; None for 1 each. The
        terms that ``stability``, ``robust`` and ``robust_clean`` add are not weighted.
      one_pass: of ``stability`` and ``robust``, whether clean and noisy images go through the
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
        "normal": _one_view("clean", softmax),
        "noisy": _one_view("noisy", softmax),
        "both": _two_views(_nothing, softmax, one_pass=True, softmax_on_noisy=True),
        "stability": _two_views(_stability(stability_weight), softmax, one_pass=one_pass),
        "robust": _two_views(_robust(robust), softmax, one_pass=one_pass),
        "robust_clean": _robust_clean(robust, softmax),
    }
    return Method(name, objectives[name])
