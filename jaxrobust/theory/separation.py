"""Separation of the classes in earlier layers, measured and bounded (Theorem 6.3).

All divergences are Jensen-Shannon divergences in nats.
"""

import jax
import jax.numpy as jnp

from jaxrobust import _validate
from jaxrobust.geometry import safe_norm
from jaxrobust.probes import Estimate


def jensen_shannon_bound(tau: jax.Array) -> jax.Array:
    r"""Bounds the divergence of two classes' features from below, by Theorem 6.3.

    .. math:: D_{JS} \ge (2 \tau - 1)^2 / 2 \quad (\tau \ge 1/2)

    Beside hypothesis (H) it needs that the two balls are disjoint: centroids more than twice the
    radius apart. The theorem uses this in its proof and does not state it.

    Args:
      tau: the share of each class's features within the ball around its centroid, in [0, 1].

    Returns:
      Like tau, at most 1/2; 0 for tau < 1/2.

    >>> jensen_shannon_bound(jnp.array([0.25, 0.75, 1.0])).tolist()
    [0.0, 0.125, 0.5]

    Source: Theorem 6.3, Eq. 20.
    """
    _validate.numbers("tau", tau)
    return jnp.square(jnp.maximum(2 * tau - 1, 0)) / 2


def jensen_shannon_sharp_bound(tau: jax.Array) -> jax.Array:
    r"""Computes the sharpest bound under the hypotheses of :func:`jensen_shannon_bound`.

    .. math:: D_{JS} \ge \log 2 + \tau \log \tau + (1 - \tau) \log(1 - \tau)
      \ge (2 \tau - 1)^2 / 2 \quad (\tau \ge 1/2)

    It replaces Pinsker's inequality in the proof of the theorem by the data processing inequality,
    applied to whether a feature is in the first ball.

    Returns:
      Like tau, at most log 2, the largest value of the divergence; 0 for tau < 1/2.

    Source: ``docs/theory.md``.
    """
    _validate.numbers("tau", tau)
    tau = jnp.maximum(tau, 0.5)
    return jensen_shannon_decision_bound(tau, 1 - tau)


def jensen_shannon_decision_bound(first: jax.Array, second: jax.Array) -> jax.Array:
    r"""Bounds the divergence of two classes from below, by any decision between them.

    .. math:: D_{JS} \ge h\big(\tfrac{p + q}{2}\big) - \tfrac{1}{2} (h(p) + h(q)), \qquad
      h(t) = -t \log t - (1 - t) \log(1 - t)

    by the data processing inequality, with equality where nothing but the side of the decision
    tells the classes apart. It holds for the features decided on and, if these are a function of an
    earlier layer's, for that layer. It needs neither balls nor hypotheses: those of Theorem 6.3
    imply p >= tau and q <= 1 - tau for the decision "in the first ball", which gives
    :func:`jensen_shannon_sharp_bound`.

    Args:
      first: p, the share of the first class on one side of the decision, in [0, 1]; any shape.
      second: q, that of the second class; a shape that goes with it.

    Returns:
      From 0 (p = q) to log 2 (p = 1, q = 0).

    >>> [round(float(jensen_shannon_decision_bound(p, 0.0)), 3) for p in (0.0, 0.5, 1.0)]
    [0.0, 0.216, 0.693]

    Source: ``docs/theory.md``.
    """
    def entropy(share: jax.Array) -> jax.Array:
        return -jax.scipy.special.xlogy(share, share) - jax.scipy.special.xlogy(
            1 - share, 1 - share)

    # Only rounding makes it negative.
    return jnp.maximum(
        entropy((first + second) / 2) - (entropy(first) + entropy(second)) / 2, 0)


def jensen_shannon_estimate(log_odds: jax.Array, is_first: jax.Array) -> Estimate:
    r"""Estimates a lower bound on a divergence from a discriminator on held-out examples.

    .. math:: D_{JS} = \log 2 - \inf_D CE(D) \ge \log 2 - CE(D), \qquad
      CE(D) = -\frac{1}{2} (E_1[\log D] + E_2[\log (1 - D)])

    For any D that does not depend on these examples, the value's expectation is at most the
    divergence. For a poor D it can be negative; the divergence is not, so 0 is then the better
    bound.

    Args:
      log_odds: [N], :math:`\log D / (1 - D)`, D the discriminator's probability of the first.
      is_first: [N] bool, whether the example is of the first distribution; some of each.

    Returns:
      Value and standard error, each []; both distributions have the same weight whatever their
      numbers of examples. The standard error is NaN with a single example of either, and both are
      NaN if ``is_first`` is traced and there is none of either.

    Raises:
      InputError: (a ValueError) if the shapes do not match, ``is_first`` is not bool, or there is
        no example of one of the two.

    >>> estimate = jensen_shannon_estimate(jnp.zeros(4), jnp.array([True, False, True, False]))
    >>> estimate.value.item()  # an uninformed discriminator
    0.0

    Source: Lemma G.2; the variational form of Goodfellow et al. (2014).
    """
    count = _validate.shapes(log_odds=(log_odds, "N"), is_first=(is_first, "N"))["N"]
    if is_first.dtype != bool:
        raise _validate.InputError(f"Expected is_first of dtype bool, got {is_first.dtype}.")
    if not isinstance(is_first, jax.core.Tracer):
        _validate.in_range("number of examples of the first distribution",
                           int(is_first.sum()), 1, count)
    cross_entropy = jax.nn.softplus(jnp.where(is_first, -log_odds, log_odds))
    halves = []
    for members in (is_first, ~is_first):
        weights = members.astype(cross_entropy.dtype)
        count = jnp.sum(weights)
        mean = jnp.sum(weights * cross_entropy) / count
        squares = jnp.sum(weights * jnp.square(cross_entropy - mean))
        halves.append((mean, squares / jnp.where(count > 1, count - 1, jnp.nan) / count))
    (mean_1, error_1), (mean_2, error_2) = halves
    return Estimate(jnp.log(2.0) - (mean_1 + mean_2) / 2, jnp.sqrt(error_1 + error_2) / 2)


def smallest_distance_between_classes(features: jax.Array, labels: jax.Array) -> jax.Array:
    r"""Computes the smallest distance between two examples of different classes.

    .. math:: \min_{y_1 \ne y_2} \|q(x_1) - q(x_2)\|

    Proposition 5.2.2 compares it with the largest dispersion
    (:func:`~jaxrobust.geometry.class_dispersion`).

    Args:
      features: [N, d].
      labels: [N] integers.

    Returns:
      [], in the units of the features; +inf with fewer than two classes. Memory is O(N d).

    Raises:
      InputError: (a ValueError) if the shapes do not match or the labels are not integers.

    Source: Proposition 5.2.
    """
    labels = _validate.class_numbers("labels", labels)
    _validate.shapes(features=(features, "N d"), labels=(labels, "N"))

    def nearest(example: tuple[jax.Array, jax.Array]) -> jax.Array:
        feature, label = example
        return jnp.min(jnp.where(
            labels == label, jnp.inf, safe_norm(features - feature[None])))

    return jnp.min(jax.lax.map(nearest, (features, labels)))
