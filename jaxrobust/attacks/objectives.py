"""What gradient attacks maximise: the softmax loss, and ratios of logits that no scale changes."""

import jax
import jax.numpy as jnp

from jaxrobust import _validate
from jaxrobust.attacks.common import Problem
from jaxrobust.centroids import counted
from jaxrobust.losses import softmax_cross_entropy

_TINY = 1e-12


def dlr_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    r"""The difference of logits ratio of each example, > 0 where it is misclassified.

    .. math:: DLR = -\frac{z_y - \max_{i \ne y} z_i}{z_{\pi_1} - z_{\pi_3}}

    with the logits in descending order :math:`\pi`. Neither shifting nor scaling the logits changes
    it.

    Args:
      logits: [B, C], floats, C >= 3.
      labels: [B], integers; the loss is 0, without a gradient, for one outside [0, C).

    Returns:
      [B], of the dtype of ``logits``.

    Raises:
      InputError: (a ValueError) if the shapes do not match or there are fewer than 3 classes.

    >>> dlr_loss(jnp.array([[5.0, 1.0, 3.0, 0.0]]), jnp.array([0])).tolist()
    [-0.5]

    Source: Croce and Hein, Reliable Evaluation of Adversarial Robustness with an Ensemble of
    Diverse Parameter-free Attacks (2020), Eq. 6, https://arxiv.org/abs/2003.01690.
    """
    labels, counts = _checked(logits, labels, 3)
    top = jax.lax.top_k(logits, 3)[0]
    own = _of(logits, labels)
    other = jnp.max(jnp.where(_is_class(logits, labels), -jnp.inf, logits), axis=1)
    return jnp.where(counts, (other - own) / (top[:, 0] - top[:, 2] + _TINY), 0)


def targeted_dlr_loss(logits: jax.Array, labels: jax.Array, targets: jax.Array) -> jax.Array:
    r"""The difference of logits ratio towards a target, > 0 where its logit is above the label's.

    .. math:: DLR_t = -\frac{z_y - z_t}{z_{\pi_1} - (z_{\pi_3} + z_{\pi_4}) / 2}

    Args:
      logits: [B, C], floats, C >= 4.
      labels: [B], integers; the loss is 0, without a gradient, for one outside [0, C).
      targets: [B], integers in [0, C).

    Returns:
      [B], of the dtype of ``logits``.

    Raises:
      InputError: (a ValueError) if the shapes do not match or there are fewer than 4 classes.

    Source: Croce and Hein (2020), Eq. 7, https://arxiv.org/abs/2003.01690.
    """
    labels, counts = _checked(logits, labels, 4)
    targets = _validate.class_numbers("targets", targets)
    _validate.shapes(labels=(labels, "B"), targets=(targets, "B"))
    targets = jnp.where(counts, targets, 0)
    top = jax.lax.top_k(logits, 4)[0]
    scale = top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + _TINY
    return jnp.where(counts, (_of(logits, targets) - _of(logits, labels)) / scale, 0)


def margin(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The largest other logit minus the label's [B]; 0 for a label outside [0, C)."""
    labels, counts = _checked(logits, labels, 2)
    other = jnp.max(jnp.where(_is_class(logits, labels), -jnp.inf, logits), axis=1)
    return jnp.where(counts, other - _of(logits, labels), 0)


def other_classes(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The classes but the label, [B, C - 1], those with the largest logits first."""
    hidden = jnp.where(_is_class(logits, labels), -jnp.inf, logits)
    return jnp.argsort(-hidden, axis=1)[:, :-1].astype(jnp.int32)


def _checked(logits: jax.Array, labels: jax.Array, least: int) -> tuple[jax.Array, jax.Array]:
    """Labels with 0 in place of those that do not count, and which do."""
    labels = _validate.class_numbers("labels", labels)
    num_classes = _validate.shapes(logits=(logits, "B C"), labels=(labels, "B"))["C"]
    _validate.in_range("number of classes", num_classes, least)
    counts = counted(labels, num_classes)
    return jnp.where(counts, labels, 0), counts


def _of(logits: jax.Array, classes: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits, classes[:, None], axis=1)[:, 0]


def _is_class(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.arange(logits.shape[1], dtype=labels.dtype)[None] == labels[:, None]


OBJECTIVES = {
    "cross_entropy": lambda logits, problem: softmax_cross_entropy(logits, problem.labels),
    "dlr": lambda logits, problem: dlr_loss(logits, problem.labels),
    "targeted_dlr": lambda logits, problem: targeted_dlr_loss(
        logits, problem.labels, problem.targets),
}
"""By the name that attacks are given, ``(logits, problem) -> [B]``."""


def margin_objective(logits: jax.Array, problem: Problem) -> jax.Array:
    """The margin, for attacks by scores."""
    return margin(logits, problem.labels)


def towards_target(logits: jax.Array, problem: Problem) -> jax.Array:
    """The target's logit minus the label's, whose zeros are the boundary between the two."""
    _, counts = _checked(logits, problem.labels, 2)
    labels, targets = (jnp.where(counts, classes, 0)
                       for classes in (problem.labels, problem.targets))
    return jnp.where(counts, _of(logits, targets) - _of(logits, labels), 0)
