r"""Feature stability (Definition 6.1) and the bounds on the curvature (Theorem 6.1).

The paper proves its bounds on the curvature for the pointwise Hessian H under the assumption that
the loss is quadratic at the scale of the noise (Eq. 14). For the Hessian :math:`H_\sigma` of the
noise-averaged loss the upper bound needs no assumption: with the Hermite expansion of
:math:`e \mapsto l(x + \sigma e)`,

.. math:: \mathrm{Var}\, l(x + \varepsilon) = \sigma^2 \|\nabla l_\sigma\|^2
  + \frac{\sigma^4}{2} \|H_\sigma\|_F^2 + \text{(terms of order three and more)}

in which every term is a square. The lower bound (Eq. 16) keeps its assumption: it needs those
further terms to vanish. ``docs/theory.md`` has the proofs.

The noise is :math:`\varepsilon \sim N(0, \sigma^2 I)` and never clipped. Losses are in nats, sigma
in the units of the images x, delta in those of the features, and curvatures in nats^2 per unit of
the images to the fourth. ``features_fn`` maps images [B, ...] to features [B, d], where row i
depends on image i alone. All raise InputError (a ValueError) if a number is out of its range or the
shapes do not match.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrobust import _validate, probes
from jaxrobust._eager import as_one_program, python_scalars
from jaxrobust.geometry import safe_norm
from jaxrobust.images import FeaturesFn, Loss, check_images
from jaxrobust.probes import Estimate


@python_scalars
def gaussian_noise(
    key: jax.Array, draw: int | jax.Array, x: jax.Array, *, sigma: float,
    indices: jax.Array | None = None,
) -> jax.Array:
    """Draws the noise of each image.

    Args:
      key, indices: see :mod:`jaxrobust.curvature`.
      draw: the number of the draw.
      x: only its shape and dtype are used.
      sigma: > 0.

    Returns:
      Like x.
    """
    check_images(x, indices)
    _validate.in_range("sigma", sigma, 0, open_low=True)
    return sigma * probes.draw(probes.salted(key, "gaussian_noise"), draw, x, indices)


class NoiseDraws(NamedTuple):
    """What each draw of the noise does to each image."""

    displacement: jax.Array  # shape=[K, B]; ||f(x + eps) - f(x)||, in the units of the features
    loss: jax.Array  # shape=[K, B]; l(x + eps), in nats
    quadratic: jax.Array | None  # shape=[K, B]; the right side of Eq. 14, if requested


@as_one_program
def noise_draws(
    features_fn: FeaturesFn,
    loss: Loss,
    x: jax.Array,
    key: jax.Array,
    *,
    sigma: float,
    num_draws: int,
    with_quadratic: bool = False,
    chunk_size: int = 1,
    indices: jax.Array | None = None,
) -> NoiseDraws:
    r"""Measures displacements of the features, and losses, at :math:`x + \varepsilon`.

    Args:
      features_fn, loss, x, chunk_size, indices: see :mod:`jaxrobust.curvature`.
      key: draw k is :func:`gaussian_noise` number k.
      sigma: > 0.
      num_draws: K >= 1. On CPUs, call this with 1 and a key of its own for each draw: XLA's
        convolutions in loops are slow there.
      with_quadratic: whether to evaluate :func:`quadratic_model` too, about four times the work.

    Source: Definition 6.1.
    """
    check_images(x, indices, features_fn=features_fn, loss=loss)
    num_draws = _validate.integer_in("num_draws", num_draws, 1)
    clean = features_fn(x)

    def draw(index: jax.Array) -> NoiseDraws:
        noise = gaussian_noise(key, index, x, sigma=sigma, indices=indices)
        noisy = x + noise
        model = quadratic_model(loss, x, noise) if with_quadratic else None
        return NoiseDraws(safe_norm(features_fn(noisy) - clean), loss(noisy), model)

    return probes.map_in_chunks(draw, num_draws, chunk_size)


@as_one_program
def quadratic_model(loss: Loss, x: jax.Array, v: jax.Array) -> jax.Array:
    r"""Evaluates the right side of Eq. 14 at :math:`x + v`, v like x; [B].

    .. math:: l(x) + \nabla l(x)^T v + \frac{1}{2} v^T H(x) v

    by two nested directional derivatives, exact also on a ReLU network (whose kinks do not
    contribute to H(x)).

    Args:
      loss, x: see :mod:`jaxrobust.curvature`.

    >>> quadratic_model(lambda x: x[:, 0] ** 3, jnp.array([[1.0]]), jnp.array([[1.0]])).tolist()
    [7.0]

    Source: Eq. 14.
    """
    check_images(x, loss=loss)
    if x.shape != v.shape:
        raise _validate.InputError(f"Expected v of the shape of x, {x.shape}, got {v.shape}.")

    def value_and_slope(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.jvp(loss, (x,), (v,))

    (value, slope), (_, bend) = jax.jvp(value_and_slope, (x,), (v,))
    return value + slope + bend / 2


class FeatureStability(NamedTuple):
    """Definition 6.1 by Monte Carlo, and the moments of the loss over the same draws."""

    eta: jax.Array  # shape=[B]; share of the draws that keep the features within delta
    loss_outside: jax.Array  # shape=[B]; mean loss over the others, l_out; NaN if there are none
    squared_change: Estimate  # E[(l(x + eps) - l(x))^2], each [B]
    variance: Estimate  # Var(l(x + eps)), unbiased, each [B]; NaN for a single draw


@python_scalars
def stability_of(draws: NoiseDraws, clean_loss: jax.Array, *, delta: float) -> FeatureStability:
    r"""Computes what Definition 6.1 and Theorem 6.1 need from given draws.

    .. math:: \eta = P_\varepsilon(\|f(x + \varepsilon) - f(x)\| \le \delta), \qquad
      l_{out} = E_\varepsilon[l(x + \varepsilon) \mid \|f(x + \varepsilon) - f(x)\| > \delta]

    Args:
      draws: K >= 1 of them.
      clean_loss: [B], l(x).
      delta: radius, >= 0; the paper takes 2 delta_v.

    Returns:
      The estimates. The standard error of eta is :math:`\sqrt{\eta (1 - \eta) / K}`.

    Source: Definition 6.1 and Eq. 22.
    """
    _validate.in_range("delta", delta, 0)
    count = _validate.shapes(displacement=(draws.displacement, "K B"), loss=(draws.loss, "K B"),
                             clean_loss=(clean_loss, "B"))["K"]
    outside = (draws.displacement > delta).astype(draws.loss.dtype)
    num_outside = jnp.sum(outside, axis=0)
    total = jnp.sum(outside * draws.loss, axis=0)
    loss_outside = jnp.where(num_outside > 0, total / jnp.maximum(num_outside, 1), jnp.nan)
    deviations = draws.loss - jnp.mean(draws.loss, axis=0, keepdims=True)
    # Bessel's correction: the deviations are from the draws' own mean.
    correction = count / (count - 1) if count > 1 else jnp.nan
    variance = jax.tree.map(lambda value: value * correction, _mean_square(deviations))
    return FeatureStability(
        1 - num_outside / count, loss_outside, _mean_square(draws.loss - clean_loss[None]),
        variance)


def _mean_square(values: jax.Array) -> Estimate:
    """The mean square of independent values [K, B], without overflow in between."""
    unit = probes.unit_of(values, axis=0)
    return Estimate(*(unit * (unit * part) for part in probes.mean_estimate(
        jnp.square(values / unit[None]))))


@as_one_program
def feature_stability(
    features_fn: FeaturesFn,
    loss: Loss,
    x: jax.Array,
    key: jax.Array,
    *,
    sigma: float,
    delta: float,
    num_draws: int,
    chunk_size: int = 1,
    indices: jax.Array | None = None,
) -> FeatureStability:
    """Estimates what Definition 6.1 and Theorem 6.1 need, at the images x.

    It is :func:`stability_of` for :func:`noise_draws`, which describe the arguments.
    """
    _validate.in_range("delta", delta, 0)
    draws = noise_draws(features_fn, loss, x, key, sigma=sigma, num_draws=num_draws,
                        chunk_size=chunk_size, indices=indices)
    return stability_of(draws, loss(x), delta=delta)


@python_scalars
def curvature_upper_bound(
    eta: jax.Array, delta: float, sigma: float, kernel: jax.Array, k_max: float
) -> jax.Array:
    r"""Bounds the squared Frobenius norm of the Hessian from above, Eq. 15.

    .. math:: \sum_i \lambda_i^2 \le \frac{8}{\sigma^4}
      (\eta \|W\|_{2,\infty}^2 \delta^2 + 4 (1 - \eta) K_{max}^2)

    It is :math:`2 / \sigma^4` times a bound on :math:`E[(l(x + \varepsilon) - l(x))^2]` that
    always holds. That the curvature is below the latter is assumed for H (Eq. 14) and a theorem
    for the smoothed :math:`H_\sigma`.

    Args:
      eta: [B], of :func:`stability_of` with this delta.
      delta: >= 0.
      sigma: > 0.
      kernel: [d, C], the softmax layer's, :math:`W^T`.
      k_max: the largest absolute logit at all x and x + eps, >= 0.

    Returns:
      [B].

    Source: Theorem 6.1, statement 1.
    """
    _validate.in_range("delta", delta, 0)
    _validate.in_range("sigma", sigma, 0, open_low=True)
    _validate.in_range("k_max", k_max, 0)
    _validate.shapes(eta=(eta, "B"), kernel=(kernel, "d C"))
    largest_row = jnp.max(safe_norm(kernel.T))
    return 8 / sigma**4 * (eta * (largest_row * delta) ** 2 + 4 * (1 - eta) * k_max**2)


@python_scalars
def curvature_lower_bound(
    eta: jax.Array, loss_outside: jax.Array, loss: jax.Array, gradient_norm_squared: jax.Array,
    sigma: float,
) -> jax.Array:
    r"""Bounds :math:`2 \sum_i \lambda_i^2 + (\sum_i |\lambda_i|)^2` from below, Eq. 16.

    .. math:: \frac{4}{\sigma^4} ((1 - \eta)(l_{out} - l(x))^2 - \sigma^2 \|\nabla l(x)\|^2)

    Args:
      eta: [B].
      loss_outside: [B], l_out; ignored where eta is 1.
      loss: [B], l(x).
      gradient_norm_squared: [B], of the loss at x.
      sigma: > 0.

    Returns:
      [B]; uninformative where it is negative.

    Source: Theorem 6.1, statement 2.
    """
    _validate.in_range("sigma", sigma, 0, open_low=True)
    _validate.shapes(eta=(eta, "B"), loss_outside=(loss_outside, "B"), loss=(loss, "B"),
                     gradient_norm_squared=(gradient_norm_squared, "B"))
    change = jnp.where(eta < 1, loss_outside, loss) - loss
    return 4 * _over_fourth_power(
        (1 - eta) * change**2 - sigma**2 * gradient_norm_squared, sigma)


@python_scalars
def quadratic_squared_change(
    gradient_norm_squared: jax.Array, squared_frobenius: jax.Array, trace: jax.Array, sigma: float
) -> jax.Array:
    r"""Computes :math:`E[(l(x + \varepsilon) - l(x))^2]` of a quadratic loss, Eq. 22.

    .. math:: \sigma^2 \|\nabla l\|^2 + \frac{\sigma^4}{4} (2 \|H\|_F^2 + (\mathrm{tr} H)^2)

    Its ratio to the measured value tells how much of the loss's change Eq. 14 can account for.

    Args:
      gradient_norm_squared: [B].
      squared_frobenius: [B].
      trace: [B].
      sigma: > 0.

    Returns:
      [B], in nats^2.

    Source: Eq. 22, Lemmas E.2 and E.3.
    """
    _validate.in_range("sigma", sigma, 0, open_low=True)
    _validate.shapes(gradient_norm_squared=(gradient_norm_squared, "B"),
                     squared_frobenius=(squared_frobenius, "B"), trace=(trace, "B"))
    return (sigma**2 * gradient_norm_squared
            + sigma**4 / 4 * (2 * squared_frobenius + jnp.square(trace)))


def quadratic_residual(draws: NoiseDraws, clean_loss: jax.Array) -> jax.Array:
    r"""Measures how far Eq. 14 is from the loss at the scale of the noise.

    .. math:: \frac{E[(l(x + \varepsilon) - \text{Eq. 14})^2]}{E[(l(x + \varepsilon) - l(x))^2]}

    Args:
      draws: made with ``with_quadratic``.
      clean_loss: [B], l(x).

    Returns:
      [B]: 0 for a quadratic loss; 1 is no better than taking the loss as constant; NaN where
      no draw changes the loss.

    Source: Eq. 14.
    """
    if draws.quadratic is None:
        raise _validate.InputError("Expected draws made with with_quadratic=True.")
    _validate.shapes(loss=(draws.loss, "K B"), quadratic=(draws.quadratic, "K B"),
                     clean_loss=(clean_loss, "B"))
    change, missed = draws.loss - clean_loss[None], draws.loss - draws.quadratic
    # The losses of confident images have squares beyond the range of float32.
    unit = probes.unit_of(change, axis=0)
    change, missed = (jnp.mean(jnp.square(part / unit[None]), axis=0) for part in (change, missed))
    return jnp.where(change > 0, missed / jnp.where(change > 0, change, 1), jnp.nan)


@as_one_program
def smoothed_gradient_norm_squared(
    loss: Loss,
    x: jax.Array,
    key: jax.Array,
    *,
    sigma: float,
    num_draws: int,
    chunk_size: int = 1,
    indices: jax.Array | None = None,
) -> Estimate:
    r"""Estimates the squared norm of the gradient of the noise-averaged loss.

    .. math:: \|\nabla l_\sigma(x)\|^2 = E[\nabla l(x + \varepsilon_i) \cdot
      \nabla l(x + \varepsilon_j)] \quad (i \ne j)

    as the mean over all pairs of antithetic draws
    :math:`(\nabla l(x + \varepsilon) + \nabla l(x - \varepsilon)) / 2`.

    Args:
      loss, x, key, chunk_size, indices: see :mod:`jaxrobust.curvature`.
      sigma: > 0.
      num_draws: pairs x + eps, x - eps; at least 3. Memory grows with num_draws times B.

    Returns:
      Unbiased values, which may be negative, and their standard errors by the jackknife, each
      [B], in nats^2 per unit of x squared.

    Source: the first order of the Hermite expansion.
    """
    check_images(x, indices, loss=loss)
    _validate.in_range("sigma", sigma, 0, open_low=True)
    num_draws = _validate.integer_in("num_draws", num_draws, 3)
    key = probes.salted(key, "smoothed_gradient_norm_squared")
    gradient = probes.gradient_of(loss)

    def draw(index: jax.Array) -> jax.Array:
        noise = sigma * probes.draw(key, index, x, indices)
        return ((gradient(x + noise) + gradient(x - noise)) / 2).reshape(len(x), -1)

    slopes = probes.map_in_chunks(draw, num_draws, chunk_size)  # [K, B, n]
    # In units of the largest: squares of small slopes are beyond the range of float32.
    unit = probes.unit_of(slopes, axis=(0, 2))
    slopes = slopes / unit[None, :, None]
    found = probes.mean_over_pairs(jnp.einsum(
        "ibn,jbn->bij", slopes, slopes, precision=jax.lax.Precision.HIGHEST))
    return Estimate(*(unit * (unit * part) for part in found))


@python_scalars
def smoothed_curvature_bound(
    variance: jax.Array, sigma: float, gradient_norm_squared: jax.Array | float = 0.0
) -> jax.Array:
    r"""Bounds :math:`\|H_\sigma\|_F^2` from above for any loss, without Eq. 14.

    .. math:: \|H_\sigma\|_F^2 \le \frac{2}{\sigma^4} (\mathrm{Var}\, l(x + \varepsilon)
      - \sigma^2 \|\nabla l_\sigma(x)\|^2) \le \frac{2}{\sigma^4} E[(l(x + \varepsilon) - l(x))^2]

    from the Hermite expansion of the loss in the noise; equal for a quadratic loss.

    Args:
      variance: [B], of l(x + eps).
      sigma: > 0.
      gradient_norm_squared: [B], of the noise-averaged loss; 0 gives a weaker bound.

    Returns:
      [B].

    >>> # l(x) = x^2 / 2 at 0: Var = sigma^4 / 2 and the Hessian is 1.
    >>> smoothed_curvature_bound(jnp.array([0.5]), sigma=1.0).tolist()
    [1.0]

    Source: Step 1 of Appendix E.1, for the smoothed loss; ``docs/theory.md``.
    """
    _validate.numbers("variance", variance)
    _validate.numbers("gradient_norm_squared", gradient_norm_squared)
    _validate.in_range("sigma", sigma, 0, open_low=True)
    return 2 * _over_fourth_power(variance - sigma**2 * gradient_norm_squared, sigma)


def _over_fourth_power(values: jax.Array, sigma: float) -> jax.Array:
    """The values over sigma^4, which may be 0 in float32 where sigma is not."""
    values = jnp.asarray(values)
    return values / sigma / sigma / sigma / sigma
