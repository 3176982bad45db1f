r"""The share of inputs that are mapped into a class's ball, and Theorem 6.2's bound on it.

The bounds share their arguments:

- ``empirical_error``: the mean :func:`ramp_loss` of :func:`ball_margin` over the sample.
- ``rho``: of the ramp loss, > 0; below the radius squared, and fixed before the sample is drawn.
- ``feature_bound``: Lambda >= 0, a bound on the norm of the features.
- ``centre_bound``: R >= 0, the largest norm of a centre.
- ``num_samples``: N >= 1.
- ``failure_probability``: delta, in (0, 1).

All raise InputError (a ValueError) if a number is out of its range or the shapes do not match.
"""

import math

import jax
import jax.numpy as jnp

from jaxrobust import _validate
from jaxrobust._eager import python_scalars


@python_scalars
def ramp_loss(margin: jax.Array, rho: float) -> jax.Array:
    r"""Computes the rho-margin loss.

    .. math:: \Phi_\rho(\tau) = \min(1, \max(0, 1 - \tau / \rho))

    Args:
      margin: tau, of any shape.
      rho: > 0, in the units of the margin.

    Returns:
      Like margin, in [0, 1].

    >>> ramp_loss(jnp.array([-1.0, 0.0, 1.0, 2.0, 3.0]), rho=2.0).tolist()
    [1.0, 1.0, 0.5, 0.0, 0.0]

    Source: Definition 6.2, Eq. 17.
    """
    _validate.numbers("margin", margin)
    _validate.in_range("rho", rho, 0, open_low=True)
    return jnp.clip(1 - jnp.asarray(margin) / rho, 0, 1)


@python_scalars
def ball_margin(features: jax.Array, centre: jax.Array, radius: float) -> jax.Array:
    r"""Measures how far inside a ball each point is, :math:`h(x) = r^2 - \|f(x) - m\|^2`.

    Args:
      features: [N, d].
      centre: [d], m.
      radius: r >= 0.

    Returns:
      [N], in the units of the features squared; negative outside the ball.

    Source: Section 6.2, above Eq. 18.
    """
    _validate.in_range("radius", radius, 0)
    _validate.shapes(features=(features, "N d"), centre=(centre, "d"))
    return radius**2 - jnp.sum(jnp.square(features - centre[None]), axis=1)


@python_scalars
def generalization_bound(
    empirical_error: jax.Array, *, rho: float, feature_bound: float, centre_bound: float,
    num_samples: int, failure_probability: float,
) -> jax.Array:
    r"""Bounds the share of inputs that are mapped outside the ball, by Theorem 6.2.

    .. math:: P(h(X) < 0) \le \hat R_{S,\rho}(h) + \frac{2}{\rho} (\Lambda^2 + 2 R \Lambda
      + \frac{R^2}{\sqrt N}) + 3 \sqrt{\frac{\log (2 / \delta)}{2 N}}

    It is never informative: it is below 1 only for :math:`\rho > 2 \Lambda^2 + 4 R \Lambda`,
    hence, with :math:`\rho < r^2` and :math:`R \le \Lambda`, only for :math:`r > \Lambda + R`,
    where the ball holds every possible feature. :func:`held_out_bound` repairs it.

    Args:
      feature_bound: Lambda, the largest norm of any input's features.
      The others: see :mod:`jaxrobust.theory.mapping`.

    Returns:
      Like empirical_error.

    Source: Theorem 6.2, Eq. 19.
    """
    _validate.numbers("empirical_error", empirical_error)
    _check_bound(rho, feature_bound, centre_bound, num_samples, failure_probability)
    complexity = (feature_bound**2 + 2 * centre_bound * feature_bound
                  + centre_bound**2 / num_samples**0.5)
    return (empirical_error + _as_float(2 / rho * complexity)
            + _deviation(num_samples, failure_probability))


@python_scalars
def held_out_bound(
    empirical_error: jax.Array, *, rho: float, feature_bound: float, centre_bound: float,
    num_samples: int, failure_probability: float,
) -> jax.Array:
    r"""Bounds the same share for a network that was not trained on the sample.

    .. math:: P(h(X) < 0) \le \hat R_{S,\rho}(h) + \frac{2}{\rho}
      \frac{2 R \Lambda + R^2 / 2}{\sqrt N} + 3 \sqrt{\frac{\log (2 / \delta)}{2 N}}

    With f fixed only the centre m is free, :math:`\|m\| \le R`, and the complexity of the class
    goes to 0 as N grows. It holds for all those centres at once, including those chosen on the
    sample. Distances do not depend on the origin: norms may be taken from any point that does not
    depend on the sample, such as the centroid of the training images.

    Args:
      feature_bound: Lambda; the root mean square norm of the sample's features is enough.
      The others: see :mod:`jaxrobust.theory.mapping`.

    Returns:
      Like empirical_error.

    Source: the proof of Theorem 6.2 with f fixed; ``docs/theory.md``.
    """
    _validate.numbers("empirical_error", empirical_error)
    _check_bound(rho, feature_bound, centre_bound, num_samples, failure_probability)
    complexity = held_out_complexity(
        feature_bound=feature_bound, centre_bound=centre_bound, num_samples=num_samples)
    return (empirical_error + _as_float(2 / rho * complexity)
            + _deviation(num_samples, failure_probability))


@python_scalars
def held_out_complexity(
    *, feature_bound: float, centre_bound: float, num_samples: int
) -> float:
    r"""Bounds the empirical Rademacher complexity of the balls around fixed features.

    .. math:: \hat R_S(\{r^2 - \|f(\cdot) - m\|^2 : \|m\| \le R\})
      \le \frac{2 R \Lambda + R^2 / 2}{\sqrt N}

    in the units of the features squared.

    Source: ``docs/theory.md``.
    """
    return (2 * centre_bound * feature_bound + centre_bound**2 / 2) / num_samples**0.5


def _as_float(value: float) -> float:
    """The value, infinite where JAX's floats are, of which NumPy would warn."""
    return value if value <= jnp.finfo(jnp.result_type(float)).max else math.inf


def _check_bound(
    rho: float, feature_bound: float, centre_bound: float, num_samples: int,
    failure_probability: float
) -> None:
    _validate.in_range("rho", rho, 0, open_low=True)
    _validate.in_range("feature_bound", feature_bound, 0)
    _validate.in_range("centre_bound", centre_bound, 0)
    _validate.integer("num_samples", num_samples, 1)
    _validate.in_range("failure_probability", failure_probability, 0, 1, open_low=True)


def _deviation(num_samples: int, failure_probability: float) -> jax.Array:
    """The last term of Theorem F.1."""
    return 3 * (jnp.log(2 / failure_probability) / (2 * num_samples)) ** 0.5
