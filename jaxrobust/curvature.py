"""Curvature of a loss in input space: Hessian-vector products and what is built on them.

A ``loss`` here is a function ``images [B, ...] -> [B]`` whose row i depends on image i alone
(batch norm in evaluation mode). Its Hessian is then block diagonal, and one product treats all
images at once. Curvature is per unit of whatever ``images`` is measured in; with pixels in
[0, 1] and a model that normalises by ``std`` itself, a second derivative with respect to the
normalised image is ``std^2`` times that with respect to the pixel.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrobust import _validate

Loss = Callable[[jax.Array], jax.Array]
"""``images [B, ...] -> [B]``, row i depending on image i alone."""


LogitsFn = Callable[[jax.Array], jax.Array]
"""``images [B, ...] -> logits [B, C]``, row i depending on image i alone."""


class Estimate(NamedTuple):
    """A mean over random probes, for each image."""

    value: jax.Array  # shape=[B]
    standard_error: jax.Array  # shape=[B]; of the mean; NaN for a single probe


def mean_estimate(samples: jax.Array) -> Estimate:
    """The mean of independent samples [K, B] over K, with its standard error."""
    num_samples = samples.shape[0]
    spread = jnp.std(samples, axis=0, ddof=1) if num_samples > 1 else jnp.full_like(
        samples[0], jnp.nan)
    return Estimate(jnp.mean(samples, axis=0), spread / num_samples**0.5)


def hvp(loss: Loss, x: jax.Array, v: jax.Array) -> jax.Array:
    r"""Exact Hessian-vector products, of all images at once.

    .. math:: H(x) v = \frac{d}{dt} \nabla l(x + t v) |_{t=0}

    by forward-mode differentiation (``jax.jvp``) of the reverse-mode gradient (``jax.grad``);
    no step size, no truncation error.

    Args:
      loss: images [B, ...] -> [B].
      x: [B, ...].
      v: like x; row i is multiplied by the Hessian at row i.

    Returns:
      Like x.

    Raises:
      InputError: (a ValueError) if x and v differ in shape.

    >>> loss = lambda x: jnp.sum(x**3, axis=-1)  # its Hessian is diag(6 x)
    >>> hvp(loss, jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 1.0]])).tolist()
    [[6.0, 12.0]]

    Source: Section 6.1; Pearlmutter (1994).
    """
    if x.shape != v.shape:
        raise _validate.InputError(f"Expected v of the shape of x, {x.shape}, got {v.shape}.")
    return jax.jvp(_gradient(loss), (x,), (v,))[1]


def squared_frobenius(
    loss: Loss, x: jax.Array, key: jax.Array, *, num_probes: int = 20
) -> Estimate:
    r"""Squared Frobenius norm of each image's Hessian, the sum of its squared eigenvalues.

    .. math:: \sum_i \lambda_i^2 = \|H\|_F^2 = E_{\varepsilon \sim N(0, I)} \|H \varepsilon\|^2

    estimated with exact products (Hutchinson). The gradient is linearised once for all probes.

    Args:
      loss: images [B, ...] -> [B].
      x: [B, ...].
      key: a PRNG key; probe k is drawn with ``fold_in(key, k)``.
      num_probes: K >= 1.

    Returns:
      Value and standard error, each [B]; unbiased.

    Raises:
      InputError: (a ValueError) if num_probes < 1.

    Source: Section 7.1, without its finite differences. For a ReLU network this is the
    curvature of the softmax alone at that point; kinks have no share in it.
    """
    _, product = jax.linearize(_gradient(loss), x)
    return _mean_over_probes(lambda v: _squared_norm(product(v)), x, key, num_probes)


def finite_difference_curvature(
    loss: Loss, x: jax.Array, key: jax.Array, *, step: float = 1e-2, num_probes: int = 20
) -> Estimate:
    r"""The paper's estimate of the curvature, by finite differences of the gradient (Eq. 21).

    .. math::
      \Lambda(x) = \frac{1}{K} \sum_{j=1}^K
        \frac{1}{t^2} \|\nabla l(x + t \varepsilon_j) - \nabla l(x)\|^2,
      \qquad \varepsilon_j \sim N(0, I)

    On a network with kinks (ReLU) this is not :func:`squared_frobenius`: a step of norm
    about :math:`t \sqrt{dim}` crosses many kinks, whose jumps the pointwise Hessian does not
    see, and the two differ by orders of magnitude. On a smooth network they agree as t -> 0.

    Args:
      loss: images [B, ...] -> [B].
      x: [B, ...].
      key: a PRNG key; probe j is drawn with ``fold_in(key, j)``.
      step: t > 0, in the units of x; 1e-2 of a *normalised* image in the paper.
      num_probes: K >= 1.

    Returns:
      Value and standard error over the probes, each [B].

    Raises:
      InputError: (a ValueError) if step <= 0 or num_probes < 1.

    Source: Eq. 21.
    """
    _validate.in_range("step", step, 0, open_low=True)
    gradient = _gradient(loss)
    at_x = gradient(x)

    def probe(v):
        return _squared_norm((gradient(x + step * v) - at_x) / step)

    return _mean_over_probes(probe, x, key, num_probes)


def piecewise_linear_spectrum(logits_fn: LogitsFn, x: jax.Array) -> jax.Array:
    r"""All non-zero eigenvalues of each image's Hessian of the softmax loss, without sampling.

    Where the logits are affine in x around a point (ReLU, max-pooling, batch norm in
    evaluation) the Hessian of the softmax loss there is exactly

    .. math:: H = J^T S J, \qquad S = \mathrm{diag}(p) - p p^T,

    with J the Jacobian of the logits and p the softmax; it has rank at most C - 1 and does not
    depend on the label. With :math:`u = \sqrt{p}` and :math:`A = \mathrm{diag}(u) (I - u u^T)`,
    :math:`S = A A^T`, so its non-zero eigenvalues are those of the C x C matrix
    :math:`A^T J J^T A`. For other networks this is the Gauss-Newton part of the Hessian.

    The squared Frobenius norm is the sum of the squared eigenvalues, the trace their sum, the
    spectral norm the largest. Costs C - 1 vector-Jacobian products, done at once.

    Args:
      logits_fn: images [B, ...] -> logits [B, C], row i depending on image i alone.
      x: [B, ...].

    Returns:
      [B, C], increasing, at least one of them 0; all non-negative up to rounding.

    >>> kernel = jnp.array([[1.0, -1.0]])  # two classes, one pixel: p = 1/2 at 0
    >>> spectrum = piecewise_linear_spectrum(lambda x: x @ kernel, jnp.zeros((1, 1)))
    >>> spectrum.round(6).tolist()
    [[0.0, 1.0]]

    Source: Section 6.1; the Gauss-Newton decomposition (Schraudolph, 2002).
    """
    logits, pullback = jax.vjp(logits_fn, x)
    batch, num_classes = logits.shape
    # A^T 1 = 0: only differences of logits count, and C - 1 of them span all. Taking them before
    # the products also spares the digits that a large common part of the rows of J would cost.
    differences = jnp.eye(num_classes, dtype=logits.dtype)[:-1].at[:, -1].set(-1)
    cotangents = jnp.broadcast_to(
        differences[:, None], (num_classes - 1, batch, num_classes))
    jacobian, = jax.vmap(pullback)(cotangents)
    jacobian = jacobian.reshape(num_classes - 1, batch, -1)
    gram = jnp.einsum("cbk,dbk->bcd", jacobian, jacobian, precision=jax.lax.Precision.HIGHEST)
    gram = jnp.pad(gram, ((0, 0), (0, 1), (0, 1)))

    p = jax.nn.softmax(logits)
    u = jnp.sqrt(p)
    # 1 - p_i as the sum of the others: exact also where p_i rounds to 1.
    others = jnp.dot(p, 1 - jnp.eye(num_classes, dtype=p.dtype),
                     precision=jax.lax.Precision.HIGHEST)
    projector = jnp.where(jnp.eye(num_classes, dtype=bool)[None], others[:, :, None],
                          -u[:, :, None] * u[:, None, :])
    a = u[:, :, None] * projector
    return jnp.linalg.eigvalsh(jnp.einsum(
        "bic,bij,bjd->bcd", a, gram, a, precision=jax.lax.Precision.HIGHEST))


def _gradient(loss: Loss) -> Callable[[jax.Array], jax.Array]:
    return jax.grad(lambda x: jnp.sum(loss(x)))


def _squared_norm(vectors: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(vectors), axis=tuple(range(1, vectors.ndim)))


def _mean_over_probes(probe, x, key, num_probes) -> Estimate:
    _validate.in_range("num_probes", num_probes, 1)

    def sample(index):
        v = jax.random.normal(jax.random.fold_in(key, index), x.shape, x.dtype)
        return probe(v)

    return mean_estimate(jax.lax.map(sample, jnp.arange(num_probes)))
