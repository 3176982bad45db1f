"""Penalties on derivatives by the images: of the loss, of the logits, second ones, and margins.

The derivatives are those in training mode. An image's row of a gradient is then that of the sum of
all images' losses, on all devices: through the batch statistics of batch norm an image moves the
losses of the others too, as in every implementation that does not freeze these statistics. Without
batch norm, or dropout that is shared, it is the gradient of the image's own loss.
"""

import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrobust import _validate, probes
from jaxrobust.attacks.objectives import other_classes
from jaxrobust.centroids import CentroidState, counted
from jaxrobust.images import Batch, Outputs
from jaxrobust.losses import mean_over_batch, softmax_cross_entropy
from jaxrobust.methods.common import (
    BatchStats,
    Evaluated,
    Forward,
    Head,
    Objective,
    Parts,
    Passes,
    SoftmaxLoss,
    accuracy,
    positions,
    scaled,
    track,
)

Seen = tuple[Outputs, BatchStats]
"""``(outputs, new batch_stats)``."""

Network = Callable[[jax.Array], Seen]
"""``images -> (outputs, new batch_stats)``."""

Penalty = Callable[..., tuple[jax.Array, Seen]]
"""Called as ``penalty(network, batch, key, axis_name)``; returns the penalty of each image [B], and
what the network returns for the clean images."""


def _gradient_of_losses(
    network: Network, labels: jax.Array
) -> Callable[[jax.Array], tuple[jax.Array, Seen]]:
    """The function ``images -> (gradient, (outputs, batch_stats))`` of the sum of the losses."""
    def total(images: jax.Array) -> tuple[jax.Array, Seen]:
        outputs, batch_stats = network(images)
        return jnp.sum(softmax_cross_entropy(outputs.logits, labels)), (outputs, batch_stats)

    return jax.grad(total, has_aux=True)


def _squared_norms(rows: jax.Array, counts: jax.Array) -> jax.Array:
    """Squared norms [B] of rows [B, ...], with 0 for those that do not count."""
    rows = jnp.where(counts.reshape(counts.shape + (1,) * (rows.ndim - 1)), rows, 0)
    return jnp.sum(jnp.square(rows), axis=tuple(range(1, rows.ndim)))


def squared_gradient_norms(
    network: Network, batch: Batch, key: jax.Array, axis_name: str | None
) -> tuple[jax.Array, Seen]:
    r"""Computes the squared norm of each image's loss gradient.

    .. math:: \|\nabla_x l(x, y)\|^2

    Source: Drucker and LeCun, Improving Generalization Performance using Double Backpropagation
    (1992); Ross and Doshi-Velez, Improving the Adversarial Robustness and Interpretability of Deep
    Neural Networks by Regularizing Their Input Gradients (2018), https://arxiv.org/abs/1711.09404.
    """
    del key, axis_name
    gradient, seen = _gradient_of_losses(network, batch.labels)(batch.clean)
    return _squared_norms(gradient, counted(batch.labels, seen[0].logits.shape[1])), seen


def squared_jacobian_norms(num_projections: int) -> Penalty:
    r"""Makes the unbiased estimate of half the squared Frobenius norm of each image's Jacobian.

    .. math:: \frac12 \|J(x)\|_F^2 \approx
      \frac{C}{2 m} \sum_{i=1}^m \|\nabla_x (v_i \cdot z(x))\|^2, \qquad J = \partial z / \partial x

    with m directions :math:`v_i` for each image, uniform on the unit sphere of the C logits.

    Source: Hoffman, Roberts and Yaida, Robust Learning with Jacobian Regularization (2019),
    Eq. 5 to 9, https://arxiv.org/abs/1908.02729.
    """
    def penalty(
        network: Network, batch: Batch, key: jax.Array, axis_name: str | None
    ) -> tuple[jax.Array, Seen]:
        def logits_of(images: jax.Array) -> tuple[jax.Array, Seen]:
            outputs, batch_stats = network(images)
            return _validate.floats("logits", outputs.logits), (outputs, batch_stats)

        logits, pull, seen = jax.vjp(logits_of, batch.clean, has_aux=True)
        size, num_classes = logits.shape
        counts = counted(batch.labels, num_classes)
        where = positions(size, axis_name)

        def row_norms(number: int) -> jax.Array:
            own = jax.random.fold_in(key, number)
            directions = jax.vmap(lambda position: jax.random.normal(
                jax.random.fold_in(own, position), (num_classes,), logits.dtype))(where)
            directions /= jnp.linalg.norm(directions, axis=1, keepdims=True)
            gradient, = pull(jnp.where(counts[:, None], directions, 0))
            return _squared_norms(gradient, counts)

        total = functools.reduce(operator.add, map(row_norms, range(num_projections)))
        return num_classes / (2 * num_projections) * total, seen

    return penalty


def squared_curvatures(step: float | None) -> Penalty:
    r"""Makes the squared norm of each image's Hessian times the sign of its gradient.

    .. math:: \|H z\|^2, \qquad H = \nabla_x^2 l(x, y), \quad
      z = \mathrm{sign}(\nabla_x l) / \|\mathrm{sign}(\nabla_x l)\|

    with z a constant, and H z exactly, as the derivative of the gradient along z; or, with a
    ``step`` h, its finite difference, as in the source,

    .. math:: \frac1{h^2} \|\nabla_x l(x + h z) - \nabla_x l(x)\|^2.

    The source's step of 1.5 is no small one: for networks of affine pieces, such as those with
    ReLU, the difference also sees the kinks in between, and is of another order of magnitude.

    Source: Moosavi-Dezfooli et al., Robustness via Curvature Regularization, and Vice Versa (2019),
    Eq. 8 and 9, https://arxiv.org/abs/1811.09716; it penalises :math:`h^2` times this.
    """
    def penalty(
        network: Network, batch: Batch, key: jax.Array, axis_name: str | None
    ) -> tuple[jax.Array, Seen]:
        del key, axis_name
        gradient_of = _gradient_of_losses(network, batch.labels)
        if step is None:
            gradient, along, seen = jax.linearize(gradient_of, batch.clean, has_aux=True)
        else:
            gradient, seen = gradient_of(batch.clean)
        counts = counted(batch.labels, seen[0].logits.shape[1])
        signs = jnp.sign(jax.lax.stop_gradient(gradient))
        signs = jnp.where(counts.reshape((-1,) + (1,) * (signs.ndim - 1)), signs, 0)
        length = probes.norm(signs).reshape((-1,) + (1,) * (signs.ndim - 1))
        z = signs / jnp.where(length > 0, length, 1)
        if step is None:
            change = along(z)
        else:
            change = (gradient_of(batch.clean + step * z)[0] - gradient) / step
        return _squared_norms(change, counts), seen

    return penalty


_EPSILON = 1e-8  # Added to norms that distances are divided by.


def missing_margins(margin: float, clip: float, num_classes: int) -> Penalty:
    r"""Makes what each image lacks to its distance from the decision boundary, to first order.

    .. math:: \gamma - \min(\gamma, \max(d, (1 - \alpha) \gamma)), \qquad
      d = \min_{i \ne y} \frac{z_y - z_i}{\|\nabla_x z_y - \nabla_x z_i\|_2}

    over the classes i with the largest logits, whose number is ``num_classes``, at most C - 1. d is
    the distance to the boundary if the logits are affine functions of the image, < 0 on the wrong
    side. Its denominator is a constant, without derivatives by the parameters, as in the source.

    Source: Elsayed et al., Large Margin Deep Networks for Classification (2018), Eq. 4 to 9,
    https://arxiv.org/abs/1803.05598, at the input alone; lower limit and defaults as in the
    authors' release, which has probabilities in the place of logits.
    """
    def penalty(
        network: Network, batch: Batch, key: jax.Array, axis_name: str | None
    ) -> tuple[jax.Array, Seen]:
        del key, axis_name

        def logits_of(images: jax.Array) -> tuple[jax.Array, Seen]:
            outputs, batch_stats = network(images)
            return _validate.floats("logits", outputs.logits), (outputs, batch_stats)

        logits, pull, seen = jax.vjp(logits_of, batch.clean, has_aux=True)
        counts = counted(batch.labels, logits.shape[1])
        logits = jnp.where(counts[:, None], logits, 0)
        labels = jnp.where(counts, batch.labels, 0)
        numbers = jnp.arange(logits.shape[1], dtype=labels.dtype)[None]
        own = numbers == labels[:, None]
        others = other_classes(jax.lax.stop_gradient(logits), labels)

        def distance(other: jax.Array) -> jax.Array:
            sides = own.astype(logits.dtype) - (numbers == other[:, None]).astype(logits.dtype)
            gradient, = pull(jnp.where(counts[:, None], sides, 0))
            steepness = probes.norm(jax.lax.stop_gradient(jnp.where(
                counts.reshape((-1,) + (1,) * (gradient.ndim - 1)), gradient, 0)))
            return jnp.sum(sides * logits, axis=1) / (steepness + _EPSILON)

        number = min(num_classes, others.shape[1])
        nearest = jnp.min(jnp.stack([distance(others[:, i]) for i in range(number)]), axis=0)
        gamma = jnp.asarray(margin, logits.dtype)
        return gamma - jnp.clip(nearest, (1 - jnp.asarray(clip, gamma.dtype)) * gamma, gamma), seen

    return penalty


def penalised(softmax: SoftmaxLoss, penalty: Penalty, own_weight: float, term: str) -> Objective:
    """The softmax loss on clean images, plus the mean of a penalty of each image."""
    def objective(
        forward: Forward, head: Head, batch_stats: BatchStats, centroids: CentroidState,
        batch: Batch, *, weight: jax.Array | float, key: jax.Array, axis_name: str | None
    ) -> tuple[jax.Array, Evaluated]:
        del head
        batch = batch._replace(labels=_validate.class_numbers("labels", batch.labels))
        values, (outputs, batch_stats) = penalty(
            lambda images: forward(batch_stats, images), batch, key, axis_name)
        loss = softmax(outputs.logits, batch.labels, axis_name=axis_name)
        added = mean_over_batch(
            values, axis_name, counts=counted(batch.labels, outputs.logits.shape[1]))
        metrics = {"softmax": loss,
                   "accuracy_clean": accuracy(outputs.logits, batch.labels, axis_name),
                   term: added}
        centroids = track(centroids, outputs.features, batch.labels, axis_name)
        return (loss + scaled(weight, scaled(own_weight, added)),
                Evaluated(batch_stats, centroids, metrics))

    return objective


def make_gradient_penalty(parts: Parts) -> tuple[Objective, Passes]:
    """The softmax loss on clean images, plus the squared norm of each loss's gradient."""
    return (penalised(parts.softmax, squared_gradient_norms, parts.options.gradient_penalty.weight,
                      "gradient"), Passes(1, 1, 2))


def make_jacobian_penalty(parts: Parts) -> tuple[Objective, Passes]:
    """The softmax loss on clean images, plus half the squared norm of the logits' Jacobian."""
    options = parts.options.jacobian_penalty
    number = options.num_projections
    return (penalised(parts.softmax, squared_jacobian_norms(number), options.weight, "jacobian"),
            Passes(1, number, 1 + number))


def make_cure(parts: Parts) -> tuple[Objective, Passes]:
    """The softmax loss on clean images, plus the curvature along the sign of the gradient."""
    options = parts.options.cure
    return (penalised(parts.softmax, squared_curvatures(options.step), options.weight, "curvature"),
            Passes(2, 2, 4))


def make_large_margin(parts: Parts) -> tuple[Objective, Passes]:
    """The softmax loss on clean images, plus what they lack to a margin at the input."""
    options = parts.options.large_margin
    penalty = missing_margins(options.margin, options.clip, options.num_classes)
    return (penalised(parts.softmax, penalty, options.weight, "missing_margin"),
            Passes(1, options.num_classes, 1))
