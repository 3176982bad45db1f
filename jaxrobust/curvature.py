"""Curvature of a loss in input space: Hessian-vector products and what is built on them.

**Common arguments**, which the functions' own docstrings do not repeat:

- ``loss``: images [B, ...] -> [B], where row i depends on image i alone (batch norm in evaluation
  mode). Its Hessian is then block diagonal, and one product treats all images at once. A loss that
  returns a scalar, such as the mean over the batch, is refused: its curvature would be that of the
  mean. Use :func:`~jaxrobust.losses.softmax_cross_entropy` for the softmax loss: in float32
  logsumexp(z) - z_y loses the digits of confident images, and their curvature with them.
- ``logits_fn``: images [B, ...] -> logits [B, C], where row i depends on image i alone.
- ``x``: images [B, ...], floats. Curvature is per unit of x: pixels in [0, 1] for the models here,
  which normalise their input; :func:`normalised_inputs` changes that to normalised images, as in
  the paper. n is the number of values in an image.
- ``key``: a PRNG key. Each estimator first folds a salt of its own into it, so that two estimators
  given the same key are independent. Probe k of image i is then drawn with
  ``fold_in(fold_in(salted_key, k), indices[i])``.
- ``indices``: [B] integers that name the images; by default their positions in x. With them an
  image's result does not depend on the batch it comes in.
- ``chunk_size``: probes evaluated at once. Memory grows with it and with B, not with the number of
  probes; the result does not depend on it.

All raise InputError (a ValueError) if an argument is out of its range, the loss or the indices are
not [B], or the logits are not [B, C].

Results have the range of their dtype: what is beyond it, such as a squared norm of 1e-50 in
float32, is 0 or inf.

An eager call is traced and compiled as a whole. A second call with the same shapes and options runs
the same program with the current values of whatever the loss closes over. Under ``jax.jit`` the
call is part of the caller's program.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from matfree import decomp, stochtrace

from jaxrobust import _validate, probes
from jaxrobust._eager import as_one_program
from jaxrobust.images import LogitsFn, Loss, check_images
from jaxrobust.probes import Estimate


def normalised_inputs(function: Callable[[jax.Array], jax.Array], mean: Sequence[float],
                      std: Sequence[float]) -> Callable[[jax.Array], jax.Array]:
    r"""The same function of normalised images, for curvature with respect to those.

    .. math:: \tilde f(\tilde x) = f(\mu + s \tilde x), \qquad
      \tilde H = \mathrm{diag}(s) \, H \, \mathrm{diag}(s)

    with s repeated over the pixels of a channel. If all channels have the same std s, eigenvalues
    are :math:`s^2` and the squared Frobenius norm :math:`s^4` times those for pixels; if they
    differ, no single factor converts them. A step or noise level t of a normalised image is s t
    in pixels.

    Args:
      function: a loss or logits, of images [B, ..., channels] in [0, 1].
      mean: a number per channel.
      std: a number per channel, > 0.

    Returns:
      A function of (images - mean) / std.

    Raises:
      InputError: (a ValueError) if mean and std differ in length or a std is not above 0; from the
        function, if its images have another number of channels.
    """
    _validate.function("function", function)
    mean, std = _validate.reals("mean", mean), _validate.reals("std", std)
    _validate.shapes(mean=(mean, "channels"))
    if mean.shape != std.shape:
        raise _validate.InputError(
            f"Expected a std for every mean, got {len(std)} for {len(mean)}.")
    for value in std:
        _validate.in_range("std", float(value), 0, open_low=True)

    def of_normalised(x: jax.Array) -> jax.Array:
        if x.ndim < 2 or x.shape[-1] != len(mean):
            raise _validate.InputError(f"Expected images of shape [B, ..., channels] with channels="
                                       f"{len(mean)}, as mean and std, got {x.shape}.")
        ones = (1,) * (x.ndim - 1)
        offset, scale = (jnp.asarray(value, x.dtype).reshape(*ones, -1) for value in (mean, std))
        return function(offset + scale * x)

    return of_normalised


@as_one_program
def hvp(loss: Loss, x: jax.Array, v: jax.Array) -> jax.Array:
    r"""Multiplies a vector for each image by that image's Hessian, exactly.

    .. math:: H(x) v = \frac{d}{dt} \nabla l(x + t v) |_{t=0}

    by forward-mode differentiation (``jax.jvp``) of the reverse-mode gradient (``jax.grad``);
    no step size, no truncation error.

    Args:
      loss, x: see :mod:`jaxrobust.curvature`.
      v: like x; row i is multiplied by the Hessian at row i.

    Returns:
      Like x.

    >>> loss = lambda x: jnp.sum(x**3, axis=-1)  # its Hessian is diag(6 x)
    >>> hvp(loss, jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 1.0]])).tolist()
    [[6.0, 12.0]]

    Source: Section 6.1; Pearlmutter (1994).
    """
    check_images(x, loss=loss)
    v = _validate.floats("v", v).astype(x.dtype)
    if x.shape != v.shape:
        raise _validate.InputError(f"Expected v of the shape of x, {x.shape}, got {v.shape}.")
    return jax.jvp(probes.gradient_of(loss), (x,), (v,))[1]


@as_one_program
def squared_frobenius(
    loss: Loss,
    x: jax.Array,
    key: jax.Array,
    *,
    num_probes: int = 20,
    distribution: str = "normal",
    rtol: float | None = None,
    chunk_size: int = 1,
    indices: jax.Array | None = None,
) -> Estimate:
    r"""Estimates the squared Frobenius norm of each image's Hessian from exact products.

    .. math:: \sum_i \lambda_i^2 = \|H\|_F^2 = E_{\varepsilon} \|H \varepsilon\|^2, \qquad
      E[\varepsilon \varepsilon^T] = I

    (Hutchinson). The gradient is linearised once for all probes. For a ReLU network this is the
    curvature of the softmax alone at that point; kinks do not contribute.

    Args:
      loss, x, key, chunk_size, indices: see :mod:`jaxrobust.curvature`.
      num_probes: K >= 1; with ``rtol``, the most that are drawn.
      distribution: of the probes, "normal" or "rademacher" (random signs: a somewhat smaller
        variance where H is near diagonal).
      rtol: > 0; for each image, draw until its standard error is at most ``rtol`` times its value
        (:func:`~jaxrobust.probes.mean_until`). Stopping by the values biases the mean by a
        fraction of ``rtol``.

    Returns:
      Value and standard error, each [B]; unbiased without ``rtol``. Two standard errors cover the
      truth in 95 of 100 cases if many eigenvalues are of similar size. If one dominates, the
      samples are as skewed as a squared normal number, and they cover it in 88 cases with 20
      probes, 93 with 64 and 94 with 200; with ``rtol`` in 94 or more.

    Source: Section 7.1, without its finite differences.
    """
    check_images(x, indices, loss=loss)
    key = probes.salted(key, "squared_frobenius")
    _, product = jax.linearize(probes.gradient_of(loss), x)

    def probe(index: jax.Array) -> jax.Array:
        return probes.squared_norm(product(probes.draw(key, index, x, indices, distribution)))

    if rtol is None:
        return probes.mean_estimate(probes.map_in_chunks(probe, num_probes, chunk_size))
    return probes.mean_until(
        probe, x, rtol=rtol, num_probes=num_probes, chunk_size=chunk_size)


@as_one_program
def finite_difference_curvature(
    loss: Loss,
    x: jax.Array,
    key: jax.Array,
    *,
    step: float = 1e-2,
    num_probes: int = 20,
    chunk_size: int = 1,
    indices: jax.Array | None = None,
) -> Estimate:
    r"""Estimates the curvature as the paper does, by finite differences of the gradient.

    .. math::
      \Lambda(x) = \frac{1}{K} \sum_{j=1}^K
        \frac{1}{t^2} \|\nabla l(x + t \varepsilon_j) - \nabla l(x)\|^2,
      \qquad \varepsilon_j \sim N(0, I)

    On a network with kinks (ReLU) this is not :func:`squared_frobenius`: a step of norm
    about :math:`t \sqrt n` crosses many kinks, whose jumps the pointwise Hessian does not
    see, and the two differ by orders of magnitude. On a smooth network they agree as t -> 0.

    Args:
      loss, x, key, chunk_size, indices: see :mod:`jaxrobust.curvature`.
      step: t > 0, in the units of x; 1e-2 of a *normalised* image in the paper
        (:func:`normalised_inputs`).
      num_probes: K >= 1.

    Returns:
      Value and standard error over the probes, each [B]; the error covers the truth as often as
      that of :func:`squared_frobenius`.

    Source: Eq. 21.
    """
    check_images(x, indices, loss=loss)
    _validate.in_range("step", step, 0, open_low=True)
    key = probes.salted(key, "finite_difference_curvature")
    gradient = probes.gradient_of(loss)
    at_x = gradient(x)

    def probe(index: jax.Array) -> jax.Array:
        v = probes.draw(key, index, x, indices)
        return probes.squared_norm((gradient(x + step * v) - at_x) / step)

    return probes.mean_estimate(probes.map_in_chunks(probe, num_probes, chunk_size))


class SmoothedCurvature(NamedTuple):
    """Squared Frobenius norm and trace of the Hessian of each image's noise-averaged loss."""

    squared_frobenius: Estimate
    trace: Estimate


@as_one_program
def smoothed_curvature(
    loss: Loss,
    x: jax.Array,
    key: jax.Array,
    *,
    sigma: float,
    num_draws: int = 32,
    chunk_size: int = 1,
    indices: jax.Array | None = None,
) -> SmoothedCurvature:
    r"""Estimates the curvature of the noise-averaged loss, which exists for networks with kinks.

    .. math:: l_\sigma(x) = E_{e \sim N(0, I)}[l(x + \sigma e)], \qquad
      H_\sigma = \nabla^2 l_\sigma(x) = \frac{1}{\sigma} E[\nabla l(x + \sigma e) \, e^T]

    by Stein's identity, which needs first derivatives only and counts the kinks that the noise
    crosses. With antithetic differences
    :math:`d_i = (\nabla l(x + \sigma e_i) - \nabla l(x - \sigma e_i)) / 2 \sigma`,

    .. math:: \|H_\sigma\|_F^2 = E[(d_i \cdot e_j)(d_j \cdot e_i)] \; (i \ne j), \qquad
      \mathrm{tr} H_\sigma = E[d_i \cdot e_i],

    the first as the mean over all pairs of draws (a U-statistic). Unlike Eq. 21 it averages
    before it squares: a gradient that jumps back and forth adds nothing.

    Args:
      loss, x, key, chunk_size, indices: see :mod:`jaxrobust.curvature`.
      sigma: standard deviation of the noise, > 0, in the units of x. The noise is not clipped.
      num_draws: pairs x + sigma e, x - sigma e; at least 3. Memory grows with num_draws times B.

    Returns:
      Unbiased values (the squared norm may be negative) with their standard errors (the squared
      norm's by the jackknife), each [B]. If many eigenvalues are of similar size, two standard
      errors of the squared norm cover the truth in 95 of 100 cases. If one dominates, the samples
      are about the fourth power of a normal number, and they cover it in 82 cases with 20 draws,
      85 with 32, 89 with 64 and 92 with 100.

    Source: Stein (1981); Eq. 14 at the scale of the noise.
    """
    check_images(x, indices, loss=loss)
    _validate.in_range("sigma", sigma, 0, open_low=True)
    num_draws = _validate.integer_in("num_draws", num_draws, 3)
    key = probes.salted(key, "smoothed_curvature")
    gradient = probes.gradient_of(loss)

    def draw(index: jax.Array) -> tuple[jax.Array, jax.Array]:
        e = probes.draw(key, index, x, indices)
        slope = (gradient(x + sigma * e) - gradient(x - sigma * e)) / (2 * sigma)
        return e.reshape(len(x), -1), slope.reshape(len(x), -1)

    e, slopes = probes.map_in_chunks(draw, num_draws, chunk_size)  # each [K, B, n]
    products = jnp.einsum("ibn,jbn->bij", slopes, e, precision=jax.lax.Precision.HIGHEST)
    trace = probes.mean_estimate(jnp.diagonal(products, axis1=1, axis2=2).T)
    # In units of the largest: the fourth power of a small curvature is beyond float32.
    unit = probes.unit_of(products, axis=(1, 2))
    products = products / unit[:, None, None]
    squares = probes.mean_over_pairs(products * products.swapaxes(1, 2))
    return SmoothedCurvature(Estimate(*(unit * (unit * part) for part in squares)), trace)


@as_one_program
def piecewise_linear_spectrum(logits_fn: LogitsFn, x: jax.Array) -> jax.Array:
    r"""Computes all non-zero eigenvalues of the Hessian of the softmax loss, without sampling.

    Where the logits are affine in x around a point (ReLU, max-pooling, batch norm in
    evaluation) the Hessian of the softmax loss there is exactly

    .. math:: H = J^T S J, \qquad S = \mathrm{diag}(p) - p p^T,

    with J the Jacobian of the logits and p the softmax; it has rank at most C - 1 and does not
    depend on the label. With :math:`u = \sqrt{p}` and :math:`A = \mathrm{diag}(u) (I - u u^T)`,
    :math:`S = A A^T`, so its non-zero eigenvalues are those of the C x C matrix
    :math:`A^T J J^T A`. For other networks this is the Gauss-Newton part of the Hessian.

    The squared Frobenius norm is the sum of the squared eigenvalues, the trace their sum, the
    spectral norm the largest. Costs C - 1 vector-Jacobian products, one after the other.

    Args:
      logits_fn, x: see :mod:`jaxrobust.curvature`.

    Returns:
      [B, C], increasing, at least one of them 0; all non-negative up to rounding. The large ones
      keep their digits however confident the image is.

    >>> kernel = jnp.array([[1.0, -1.0]])  # two classes, one pixel: p = 1/2 at 0
    >>> spectrum = piecewise_linear_spectrum(lambda x: x @ kernel, jnp.zeros((1, 1)))
    >>> spectrum.round(6).tolist()
    [[0.0, 1.0]]

    Source: Section 6.1; the Gauss-Newton decomposition (Schraudolph, 2002).
    """
    check_images(x, logits_fn=logits_fn)
    logits, pullback = jax.vjp(logits_fn, x)
    batch, num_classes = logits.shape
    if num_classes == 1:
        return jnp.zeros_like(logits)
    # A^T 1 = 0: only differences of logits count, and C - 1 of them span all. Taking them before
    # the products also spares the digits that a large common part of the rows of J would cost.
    differences = jnp.eye(num_classes, dtype=logits.dtype)[:-1].at[:, -1].set(-1)

    def row(c: jax.Array) -> jax.Array:
        return pullback(jnp.broadcast_to(differences[c], logits.shape))[0].reshape(batch, -1)

    # As few at once as keep the loop short enough to be unrolled on CPUs. In any order, which is
    # faster, while only the memory of a few is at stake.
    jacobian = probes.map_in_chunks(
        row, num_classes - 1, math.ceil((num_classes - 1) / probes.LONGEST_WRITTEN_OUT),
        in_order=num_classes > 16)
    # J, and A below, in units of their largest entries: their squares may be beyond float32.
    unit = probes.unit_of(jacobian, axis=(0, 2))
    jacobian = jacobian / unit[None, :, None]
    gram = jnp.einsum("cbk,dbk->bcd", jacobian, jacobian, precision=jax.lax.Precision.HIGHEST)
    gram = jnp.pad(gram, ((0, 0), (0, 1), (0, 1)))

    # The root of the softmax as a softmax of half the logits: p itself may be beyond float32.
    u = jnp.exp((logits - jnp.max(logits, axis=1, keepdims=True)) / 2)
    u = u / jnp.sqrt(jnp.sum(jnp.square(u), axis=1, keepdims=True))
    # 1 - p_i as the sum of the others: exact also where p_i rounds to 1.
    others = jnp.dot(jnp.square(u), 1 - jnp.eye(num_classes, dtype=u.dtype),
                     precision=jax.lax.Precision.HIGHEST)
    projector = jnp.where(jnp.eye(num_classes, dtype=bool)[None], others[:, :, None],
                          -u[:, :, None] * u[:, None, :])
    a = u[:, :, None] * projector
    unit_of_a = probes.unit_of(a, axis=(1, 2))
    a = a / unit_of_a[:, None, None]
    unit = (unit * unit_of_a)[:, None]
    return unit * (unit * jnp.linalg.eigvalsh(jnp.einsum(
        "bic,bij,bjd->bcd", a, gram, a, precision=jax.lax.Precision.HIGHEST)))


@as_one_program
def gauss_newton_gap(
    loss: Loss, logits_fn: LogitsFn, x: jax.Array, key: jax.Array, *,
    indices: jax.Array | None = None,
) -> jax.Array:
    r"""Measures how much of the softmax loss's Hessian its Gauss-Newton part misses.

    .. math:: \frac{\|(H - J^T S J) v\|}{\|H v\|}, \qquad v \sim N(0, I)

    It is 0 up to rounding where the logits are affine around x, so that
    :func:`piecewise_linear_spectrum` is the spectrum of the Hessian. It is about 1 for a smooth
    network (GELU, hard-swish), where that spectrum is the Gauss-Newton part's only, and for a loss
    that rounds confident images away.

    Args:
      logits_fn, x, key, indices: see :mod:`jaxrobust.curvature`.
      loss: the softmax loss of ``logits_fn`` and the images' labels,
        :func:`~jaxrobust.losses.softmax_cross_entropy`.

    Returns:
      [B]; 0 where both products are 0, inf where only the product with the Hessian is.

    Source: the Gauss-Newton decomposition (Schraudolph, 2002).
    """
    check_images(x, indices, loss=loss, logits_fn=logits_fn)
    v = probes.draw(probes.salted(key, "gauss_newton_gap"), 0, x, indices)
    exact = hvp(loss, x, v)
    logits, along = jax.jvp(logits_fn, (x,), (v,))
    # S u = p (u - p.u), u less its mean under p. Shifting the likeliest class's u to 0 loses no
    # digits where p is nearly 1. Set to exactly 0, which a compiled difference need not be.
    top = jnp.argmax(logits, axis=1, keepdims=True)
    along = jnp.where(jnp.arange(logits.shape[1], dtype=top.dtype)[None] == top, 0,
                      along - jnp.take_along_axis(along, top, axis=1))
    p = jax.nn.softmax(logits)
    turned = p * (along - jnp.sum(p * along, axis=1, keepdims=True))
    gauss_newton, = jax.vjp(logits_fn, x)[1](turned)
    size, gap = probes.norm(exact), probes.norm(exact - gauss_newton)
    return jnp.where(size > 0, gap / jnp.where(size > 0, size, 1), jnp.where(gap > 0, jnp.inf, 0))


class RitzValues(NamedTuple):
    """What Lanczos finds of each image's spectrum with m products."""

    value: jax.Array  # shape=[B, m], increasing
    weight: jax.Array  # shape=[B, m]; in the spectral density, sum 1
    residual: jax.Array  # shape=[B, m]; an eigenvalue lies within this distance of the value


@as_one_program
def ritz_values(
    loss: Loss,
    x: jax.Array,
    key: jax.Array,
    *,
    num_products: int,
    indices: jax.Array | None = None,
) -> RitzValues:
    r"""Approximates eigenvalues of each image's Hessian, each with a rigorous error bar.

    Lanczos' iteration with full reorthogonalisation from a random vector v: with
    :math:`H \approx Q T Q^T` on the Krylov space and :math:`T = U \Theta U^T`, the Ritz value
    :math:`\theta_j` belongs to :math:`y_j = Q u_j`, and some eigenvalue lies within its residual

    .. math:: |\lambda - \theta_j| \le \|H y_j - \theta_j y_j\|.

    The ends of the spectrum converge first. :math:`\sum_j u_{1j}^2 \delta(\theta_j)` is the Gauss
    quadrature of the spectral density as v sees it. A multiple eigenvalue may be found only once.

    Args:
      loss, x, indices: see :mod:`jaxrobust.curvature`.
      key: draws the vector v as probe 0.
      num_products: m, in [1, n]; another m products measure the residuals.

    Returns:
      m values for each image. A value whose residual is not small has not converged.

    Source: Lanczos (1950), as in ``matfree.decomp.tridiag_sym``; Saad (2011), Section 3.
    """
    check_images(x, indices, loss=loss)
    num_products = _validate.integer_in(
        "num_products", num_products, 1, math.prod(x.shape[1:]))
    key = probes.salted(key, "ritz_values")
    tridiagonalise = decomp.tridiag_sym(num_products, custom_vjp=False)

    def one(
        product: Callable[[jax.Array], jax.Array], start: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        # Where the Krylov space ends early, Lanczos continues with vectors of rounding errors, or
        # NaN. Projecting H on an orthonormal basis of what it found is right in any case.
        basis, _ = jnp.linalg.qr(jnp.nan_to_num(tridiagonalise(product, start)[0]).T)
        image = jax.vmap(product, in_axes=1, out_axes=1)(basis)
        projected = basis.T @ image
        values, vectors = jnp.linalg.eigh((projected + projected.T) / 2)
        residual = image @ vectors - values[None] * (basis @ vectors)
        weight = jnp.square(vectors.T @ (basis.T @ start)) / (start @ start)
        return values, weight, jnp.linalg.norm(residual, axis=0)

    vectors = probes.draw(key, 0, x, indices).reshape(len(x), -1)
    (values, weights, residuals), scale = _image_by_image(one, loss, x, vectors)
    return RitzValues(values * scale[:, None], weights, residuals * scale[:, None])


@as_one_program
def top_eigenvalues(
    loss: Loss,
    x: jax.Array,
    key: jax.Array,
    *,
    k: int,
    num_products: int | None = None,
    indices: jax.Array | None = None,
) -> jax.Array:
    r"""Approximates the k eigenvalues of largest magnitude of each image's Hessian.

    They are among those of :func:`ritz_values` for the same key, which has error bars too. For a
    piecewise linear network :func:`piecewise_linear_spectrum` gives all of them at less cost.

    Args:
      loss, x, key, indices: see :mod:`jaxrobust.curvature`.
      k: in [1, num_products].
      num_products: of Lanczos' iteration, in [1, n]; by default 2 k + 20, at most n.

    Returns:
      [B, k], decreasing in magnitude, with their signs.
    """
    check_images(x, indices, loss=loss)
    size = math.prod(x.shape[1:])
    k = _validate.integer_in("k", k, 1, size)
    num_products = min(2 * k + 20, size) if num_products is None else _validate.integer_in(
        "num_products", num_products, 1, size)
    _validate.in_range("k", k, 1, num_products, open_high=False)
    values = ritz_values(loss, x, key, num_products=num_products, indices=indices).value
    order = jnp.argsort(-jnp.abs(values), axis=1)[:, :k]
    return jnp.take_along_axis(values, order, axis=1)


class SpectralDensity(NamedTuple):
    """Density of each image's eigenvalues, smoothed by a Gaussian."""

    grid: jax.Array  # shape=[B, G]; eigenvalues
    density: jax.Array  # shape=[B, G]; integrates to 1
    standard_error: jax.Array  # shape=[B, G]; over the probes


@as_one_program
def spectral_density(
    loss: Loss,
    x: jax.Array,
    key: jax.Array,
    *,
    num_products: int | None = None,
    num_probes: int = 8,
    relative_width: float = 0.02,
    num_points: int = 200,
    indices: jax.Array | None = None,
) -> SpectralDensity:
    r"""Estimates the distribution of all n eigenvalues of each image's Hessian.

    .. math:: \phi(\lambda) = \frac{1}{n} \sum_i g(\lambda - \lambda_i), \qquad
      g = N(0, (w R)^2)

    with R the range of the eigenvalues found (0 included) and w the relative width, by stochastic
    Lanczos quadrature: the mean over the probes of :math:`\sum_j u_{1j}^2 g(\lambda - \theta_j)`.

    Args:
      loss, x, indices: see :mod:`jaxrobust.curvature`.
      key: probe j is :func:`ritz_values` for the key ``fold_in(salted_key, j)``.
      num_products: Lanczos' steps for each probe, in [1, n]; by default 30, at most n.
      num_probes: random vectors, >= 2.
      relative_width: w > 0.
      num_points: G >= 2.

    Returns:
      Grid, density and its standard error. A Hessian that is 0 has R = 1 by convention.

    Source: Lin, Saad, Yang (2016); Ghorbani et al. (2019).
    """
    check_images(x, indices, loss=loss)
    if num_products is None:
        num_products = min(30, math.prod(x.shape[1:]))
    key = probes.salted(key, "spectral_density")
    num_probes = _validate.integer_in("num_probes", num_probes, 2)
    _validate.in_range("relative_width", relative_width, 0, open_low=True)
    num_points = _validate.integer_in("num_points", num_points, 2)
    values, weights, _ = jax.lax.map(  # each [P, B, m]
        lambda probe: ritz_values(loss, x, jax.random.fold_in(key, probe),
                                  num_products=num_products, indices=indices),
        jnp.arange(num_probes))
    low = jnp.minimum(jnp.min(values, axis=(0, 2)), 0)
    high = jnp.maximum(jnp.max(values, axis=(0, 2)), 0)
    extent = jnp.where(high > low, high - low, 1)
    width = relative_width * extent
    # Four widths beyond the ends hold all but 1e-4 of an end's mass.
    fractions = jnp.linspace(-4 * relative_width, 1 + 4 * relative_width, num_points,
                             dtype=x.dtype)
    grid = low[:, None] + extent[:, None] * fractions[None]
    kernel = jax.scipy.stats.norm.pdf(
        (grid[None, :, :, None] - values[:, :, None, :]) / width[None, :, None, None])
    density = jnp.sum(kernel * weights[:, :, None, :], axis=3) / width[None, :, None]
    return SpectralDensity(grid, *probes.mean_estimate(density))


@as_one_program
def hessian_trace(
    loss: Loss,
    x: jax.Array,
    key: jax.Array,
    *,
    num_probes: int | None = None,
    indices: jax.Array | None = None,
) -> Estimate:
    r"""Estimates the trace of each image's Hessian, the sum of its eigenvalues, by XTrace.

    Variance-reduced: half of the products find the space in which most of H lives, and only
    the rest is sampled. Exact up to rounding if the rank is below ``num_probes``, or
    ``num_probes`` at least n / 2.

    Args:
      loss, indices: see :mod:`jaxrobust.curvature`.
      x: as described in the module; on CPUs B is at most 32, since XLA's threads may deadlock
        beyond about 48.
      key: the probes of image i are drawn from ``fold_in(salted_key, indices[i])``.
      num_probes: m, in [2, n]; by default 16, at most n. Costs 2 m products, m of them at once:
        memory grows with m times B. With n = 1 a single product is exact.

    Returns:
      Value and standard error, each [B]. The error includes the rounding of the algorithm, not
      that of the loss's own derivatives.

    Source: Epperly, Tropp, Webber (2024), as in ``matfree.stochtrace.leave_one_out_xtrace``.
    """
    return _leave_one_out(
        stochtrace.leave_one_out_xtrace(), loss, x, probes.salted(key, "hessian_trace"),
        num_probes, indices, power=1)


@as_one_program
def leave_one_out_squared_frobenius(
    loss: Loss,
    x: jax.Array,
    key: jax.Array,
    *,
    num_probes: int | None = None,
    indices: jax.Array | None = None,
) -> Estimate:
    r"""Estimates the squared Frobenius norm of each image's Hessian, variance-reduced.

    .. math:: \|H\|_F^2 = \sum_i \|H_{i \cdot}\|^2

    with leave-one-out estimates of the squared row norms; arguments and result are as those of
    :func:`hessian_trace`. Where the spectrum decays quickly, as at most images, it is closer by
    orders of magnitude than :func:`squared_frobenius` at the same cost; where it is flat, somewhat
    worse.

    Args:
      loss, x, key, indices: see :mod:`jaxrobust.curvature`.

    Source: Epperly (2025), as in ``matfree.stochtrace.leave_one_out_xsymrownorms_squared``.
    """
    return _leave_one_out(
        stochtrace.leave_one_out_xsymrownorms_squared(), loss, x,
        probes.salted(key, "leave_one_out_squared_frobenius"), num_probes, indices, power=2)


class Surface(NamedTuple):
    """The loss of each image over a plane through it."""

    offsets: jax.Array  # shape=[R]; in the units of the images, from -extent to extent
    values: jax.Array  # shape=[B, R, R]; rows along the gradient, columns orthogonal to it
    gradient_direction: jax.Array  # like the images; of norm 1, or 0 where the gradient is 0
    orthogonal_direction: jax.Array  # like the images; of norm 1


@as_one_program
def loss_surface(
    loss: Loss,
    x: jax.Array,
    key: jax.Array,
    *,
    extent: float,
    resolution: int = 21,
    indices: jax.Array | None = None,
) -> Surface:
    r"""Evaluates the loss over the plane of its gradient and a random orthogonal direction.

    .. math:: S_{ij} = l(x + a_i u + a_j w), \qquad u = \nabla l / \|\nabla l\|, \quad
      w \perp u, \|w\| = 1

    Args:
      loss, indices: see :mod:`jaxrobust.curvature`.
      x: as described in the module, with n >= 2, so that there is an orthogonal direction.
      key: draws the random direction as probe 0.
      extent: the largest offset, > 0, in the units of x (Euclidean norm over the image).
      resolution: R >= 2, points along each direction; with an odd one x itself is among them.

    Returns:
      The surface. Points outside [0, 1] are not clipped.

    Source: Fig. 11, which shows its negative.
    """
    check_images(x, indices, loss=loss)
    _validate.in_range("extent", extent, 0, open_low=True)
    resolution = _validate.integer_in("resolution", resolution, 2)
    if math.prod(x.shape[1:]) == 1:
        raise _validate.InputError(
            f"Expected x with two numbers or more in each image, got {x.shape}.")
    key = probes.salted(key, "loss_surface")
    axes, shape = tuple(range(1, x.ndim)), (len(x), *[1] * (x.ndim - 1))

    def unit(vectors: jax.Array) -> jax.Array:
        vectors = vectors / probes.unit_of(vectors, axes).reshape(shape)
        return vectors / probes.unit_of(
            jnp.sqrt(jnp.sum(jnp.square(vectors), axis=axes))).reshape(shape)

    u = unit(probes.gradient_of(loss)(x))
    w = probes.draw(key, 0, x, indices)
    # Twice, because once leaves a part along u as large as the rounding of w.
    for _ in range(2):
        along = jnp.sum(w * u, axis=axes).reshape(shape)
        w = unit(w - along * u)
    offsets = jnp.linspace(-extent, extent, resolution, dtype=x.dtype)

    def row(i: jax.Array) -> jax.Array:
        return jax.vmap(lambda a: loss(x + offsets[i] * u + a * w))(offsets)

    values = probes.map_in_chunks(row, resolution, 1)  # [R, R, B]
    return Surface(offsets, jnp.moveaxis(values, -1, 0), u, w)


_IMAGES = "images"  # The axis over which :func:`_image_by_image` maps.
_MOST_IMAGES = 32  # At once, on CPUs, for the leave-one-out estimators.
_LEAVE_ONE_OUT_PROBES = 16  # By default, for images of at least as many numbers.


def _image_by_image(
    algorithm: Callable[..., Any], loss: Loss, x: jax.Array, *arrays: jax.Array
) -> tuple[Any, jax.Array]:
    """Runs an algorithm for one matrix on the Hessian of each image, divided by its scale.

    The algorithm is given ``product``, which multiplies a vector [n] by the Hessian, and the
    image's rows of ``arrays``. A loss takes the whole batch only, so under the map over the images
    each product gathers the vectors of all images and keeps the image's own row.

    Returns:
      The results, stacked, and the scales [B]: norms of H v / |v|, v from the image's rows of the
      first array; 0 where H is. Dividing by them makes the absolute thresholds inside the
      algorithms, and the range of a dtype, relative.
    """
    _, linear = jax.linearize(probes.gradient_of(loss), x)

    def one(*own: jax.Array) -> tuple[Any, jax.Array]:
        def product(v: jax.Array) -> jax.Array:
            vectors = jax.lax.all_gather(v, _IMAGES).reshape(x.shape)
            return linear(vectors).reshape(len(x), -1)[jax.lax.axis_index(_IMAGES)]

        start = own[0].reshape(-1, own[0].shape[-1])[0]
        scale = probes.norm(product(start)[None])[0] / jnp.linalg.norm(start) * start.size**0.5
        unit = probes.unit_of(scale)
        return algorithm(lambda v: product(v) / unit, *own), scale

    # matfree mixes integers and floats freely.
    with (jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"),
          jax.default_matmul_precision("highest")):
        return jax.vmap(one, axis_name=_IMAGES)(*arrays)


def _leave_one_out(
    integrand: Callable[..., Any], loss: Loss, x: jax.Array, key: jax.Array, num_probes: int | None,
    indices: jax.Array | None, power: int
) -> Estimate:
    """Applies a leave-one-out estimator that is homogeneous of degree ``power`` to each Hessian."""
    check_images(x, indices, loss=loss)
    size = math.prod(x.shape[1:])
    rounding = 16 * jnp.finfo(x.dtype).eps
    if size == 1 and num_probes is None:
        second = hvp(loss, x, jnp.ones_like(x)).ravel()
        value = second if power == 1 else jnp.square(second)
        return Estimate(value, rounding * jnp.abs(value))
    num_probes = min(_LEAVE_ONE_OUT_PROBES, size) if num_probes is None else num_probes
    num_probes = _validate.integer_in("num_probes", num_probes, 2, size)
    if jax.default_backend() == "cpu":
        _validate.in_range("number of images", len(x), 1, _MOST_IMAGES, open_high=False)
    indices = jnp.arange(len(x)) if indices is None else indices
    vectors = jax.vmap(lambda i: jax.random.normal(
        jax.random.fold_in(key, i), (num_probes, size), x.dtype))(indices)
    samples, scale = _image_by_image(integrand, loss, x, vectors)
    samples = jnp.where(scale[:, None] == 0, 0, jnp.sum(samples.reshape(*samples.shape[:2], -1), 2))
    mean, error = probes.mean_estimate(samples.T)
    # Each leave-one-out sample shares all probes but one with the others: their spread is 0.7 to
    # 1.0 times the error of their mean, depending on the spectrum. The root of 2 makes it never too
    # small. Where the samples agree, the rounding of sums of the size of H remains.
    error = jnp.hypot(2**0.5 * error, jnp.where(scale > 0, rounding, 0))
    for _ in range(power):  # One by one: a power of the scale may be beyond the range.
        mean, error = mean * scale, error * scale
    return Estimate(mean, error)
