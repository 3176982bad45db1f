"""Curvature of a loss in input space: Hessian-vector products and what is built on them.

A ``loss`` here is a function ``images [B, ...] -> [B]`` whose row i depends on image i alone
(batch norm in evaluation mode). Its Hessian is then block diagonal, and one product treats all
images at once. Curvature is per unit of whatever ``images`` is measured in: pixels in [0, 1] for
the models here, which normalise by themselves; :func:`normalised_inputs` changes that to
normalised images, as in the paper.

Memory is bounded by the images and probes at once: ``chunk_size`` sets the probes, the caller's
batch the images. With ``indices`` an image's result is the same in whatever batch it comes.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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


def normalised_inputs(function: Callable[[jax.Array], jax.Array], mean: Sequence[float],
                      std: Sequence[float]) -> Callable[[jax.Array], jax.Array]:
    r"""The same function of normalised images, for curvature with respect to those.

    .. math:: \tilde f(\tilde x) = f(\mu + s \tilde x), \qquad
      \tilde H = \mathrm{diag}(s) \, H \, \mathrm{diag}(s)

    with s repeated over the pixels of a channel. If all channels have the same std s, eigenvalues
    are :math:`s^2` and the squared Frobenius norm :math:`s^4` times those for pixels; with
    different ones no single factor converts them. A step t or a noise level of a normalised
    image is s t of a pixel.

    Args:
      function: a loss or logits, of images [B, ..., channels] in [0, 1].
      mean: per channel.
      std: per channel, > 0.

    Returns:
      A function of (images - mean) / std.
    """
    def of_normalised(x):
        return function(jnp.asarray(mean, x.dtype) + jnp.asarray(std, x.dtype) * x)

    return of_normalised


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
    r"""Squared Frobenius norm of each image's Hessian, the sum of its squared eigenvalues.

    .. math:: \sum_i \lambda_i^2 = \|H\|_F^2 = E_{\varepsilon} \|H \varepsilon\|^2, \qquad
      E[\varepsilon \varepsilon^T] = I

    estimated with exact products (Hutchinson). The gradient is linearised once for all probes.

    Args:
      loss: images [B, ...] -> [B].
      x: [B, ...].
      key: a PRNG key; probe k of image i is drawn with
        ``fold_in(fold_in(key, k), indices[i])``.
      num_probes: K >= 1; with ``rtol``, the most that are drawn.
      distribution: of the probes, "normal" or "rademacher" (random signs: a somewhat smaller
        variance where H is near diagonal).
      rtol: draw, for each image, until its standard error is at most ``rtol`` times its value,
        but at least 8 probes. The choice of when to stop looks at the values, which biases the
        mean by a fraction of ``rtol``.
      chunk_size: probes at once. Memory grows with it and with B, not with ``num_probes``; the
        result does not depend on it.
      indices: [B] integers that name the images; their positions in x if none are given. With
        them an image's probes, and so its result, are the same in whatever batch it comes.

    Returns:
      Value and standard error, each [B]; unbiased (without ``rtol``).

    Raises:
      InputError: (a ValueError) if num_probes < 1, chunk_size < 1, rtol <= 0 or the distribution
        is unknown.

    Source: Section 7.1, without its finite differences. For a ReLU network this is the
    curvature of the softmax alone at that point; kinks have no share in it.
    """
    _validate.one_of("distribution", distribution, _PROBES)
    _, product = jax.linearize(_gradient(loss), x)

    def probe(index):
        return _squared_norm(product(_draw(key, index, x, indices, distribution)))

    if rtol is None:
        return mean_estimate(_stacked(probe, num_probes, chunk_size))
    return _until(probe, rtol, num_probes, chunk_size, x)


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
      key: a PRNG key; the probes are those of :func:`squared_frobenius`.
      step: t > 0, in the units of x; 1e-2 of a *normalised* image in the paper
        (:func:`normalised_inputs`).
      num_probes: K >= 1.
      chunk_size: probes at once.
      indices: [B] integers that name the images.

    Returns:
      Value and standard error over the probes, each [B].

    Raises:
      InputError: (a ValueError) if step <= 0, num_probes < 1 or chunk_size < 1.

    Source: Eq. 21.
    """
    _validate.in_range("step", step, 0, open_low=True)
    gradient = _gradient(loss)
    at_x = gradient(x)

    def probe(index):
        v = _draw(key, index, x, indices, "normal")
        return _squared_norm((gradient(x + step * v) - at_x) / step)

    return mean_estimate(_stacked(probe, num_probes, chunk_size))


class SmoothedCurvature(NamedTuple):
    """Of the noise-averaged loss, for each image."""

    squared_frobenius: Estimate
    trace: Estimate


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
    r"""Curvature of the noise-averaged loss, which networks with kinks have at every scale.

    .. math:: l_\sigma(x) = E_{e \sim N(0, I)}[l(x + \sigma e)], \qquad
      H_\sigma = \nabla^2 l_\sigma(x) = \frac{1}{\sigma} E[\nabla l(x + \sigma e) \, e^T]

    by Stein's identity, which needs first derivatives only and counts the kinks that the noise
    crosses. With antithetic differences
    :math:`d_i = (\nabla l(x + \sigma e_i) - \nabla l(x - \sigma e_i)) / 2 \sigma`,

    .. math:: \|H_\sigma\|_F^2 = E[(d_i \cdot e_j)(d_j \cdot e_i)] \; (i \ne j), \qquad
      \mathrm{tr} H_\sigma = E[d_i \cdot e_i],

    the first as the mean over all pairs of draws (a U-statistic). Unlike Eq. 21 it averages
    before it squares: a gradient that jumps to and fro adds nothing.

    Args:
      loss: images [B, ...] -> [B].
      x: [B, ...].
      key: a PRNG key; draw k of image i uses ``fold_in(fold_in(key, k), indices[i])``.
      sigma: standard deviation of the noise, > 0, in the units of x. The noise is not clipped.
      num_draws: pairs x + sigma e, x - sigma e; at least 3. Memory grows with num_draws times B.
      chunk_size: draws at once.
      indices: [B] integers that name the images.

    Returns:
      Unbiased values, of which those of the squared norm may be negative, with their standard
      errors (the squared norm's by the jackknife), each [B].

    Raises:
      InputError: (a ValueError) if sigma <= 0 or num_draws < 3.

    Source: Stein (1981); Eq. 14 at the scale of the noise.
    """
    _validate.in_range("sigma", sigma, 0, open_low=True)
    _validate.in_range("num_draws", num_draws, 3)
    gradient = _gradient(loss)

    def draw(index):
        e = _draw(key, index, x, indices, "normal")
        slope = (gradient(x + sigma * e) - gradient(x - sigma * e)) / (2 * sigma)
        return e.reshape(len(x), -1), slope.reshape(len(x), -1)

    e, slopes = _stacked(draw, num_draws, chunk_size)  # each [K, B, n]
    products = jnp.einsum("ibn,jbn->bij", slopes, e, precision=jax.lax.Precision.HIGHEST)
    trace = mean_estimate(jnp.diagonal(products, axis1=1, axis2=2).T)
    pairs = products * products.swapaxes(1, 2)
    pairs = jnp.where(jnp.eye(num_draws, dtype=bool)[None], 0, pairs)
    rows = jnp.sum(pairs, axis=2)  # [B, K]
    total = jnp.sum(rows, axis=1)
    k = num_draws
    without = (total[:, None] - 2 * rows) / ((k - 1) * (k - 2))
    value = total / (k * (k - 1))
    jackknife = jnp.sqrt((k - 1) / k * jnp.sum(
        jnp.square(without - jnp.mean(without, axis=1, keepdims=True)), axis=1))
    return SmoothedCurvature(Estimate(value, jackknife), trace)


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
    spectral norm the largest. Costs C - 1 vector-Jacobian products, one after the other.

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
    def row(c):
        return pullback(jnp.broadcast_to(differences[c], logits.shape))[0].reshape(batch, -1)

    jacobian = _stacked(row, num_classes - 1, 1)
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


class Surface(NamedTuple):
    """The loss of each image over a plane through it."""

    offsets: jax.Array  # shape=[R]; in the units of the images, from -extent to extent
    values: jax.Array  # shape=[B, R, R]; first axis along the gradient, second the other one
    gradient_direction: jax.Array  # like the images; of norm 1, or 0 where the gradient is 0
    orthogonal_direction: jax.Array  # like the images; of norm 1


def loss_surface(
    loss: Loss,
    x: jax.Array,
    key: jax.Array,
    *,
    extent: float,
    resolution: int = 21,
    indices: jax.Array | None = None,
) -> Surface:
    r"""The loss over the plane of its gradient and a random direction orthogonal to it.

    .. math:: S_{ij} = l(x + a_i u + a_j w), \qquad u = \nabla l / \|\nabla l\|, \quad
      w \perp u, \|w\| = 1

    Args:
      loss: images [B, ...] -> [B].
      x: [B, ...].
      key: a PRNG key; the random direction of image i is drawn with
        ``fold_in(fold_in(key, 0), indices[i])``.
      extent: the largest offset, > 0, in the units of x (Euclidean norm over the image).
      resolution: R >= 2, points along each direction; with an odd one x itself is among them.
      indices: [B] integers that name the images.

    Returns:
      The surface. Points outside [0, 1] are not clipped.

    Raises:
      InputError: (a ValueError) if extent <= 0 or resolution < 2.

    Source: Fig. 11, which shows its negative.
    """
    _validate.in_range("extent", extent, 0, open_low=True)
    _validate.in_range("resolution", resolution, 2)
    shape = (len(x), *[1] * (x.ndim - 1))

    def unit(vectors):
        norm = jnp.sqrt(_squared_norm(vectors)).reshape(shape)
        return vectors / jnp.where(norm > 0, norm, 1)

    u = unit(_gradient(loss)(x))
    w = _draw(key, 0, x, indices, "normal")
    # Twice: once leaves a part along u of the size of the rounding of w.
    for _ in range(2):
        along = jnp.sum(w * u, axis=tuple(range(1, x.ndim))).reshape(shape)
        w = unit(w - along * u)
    offsets = jnp.linspace(-extent, extent, resolution, dtype=x.dtype)

    def row(i):
        return jax.vmap(lambda a: loss(x + offsets[i] * u + a * w))(offsets)

    values = _stacked(row, resolution, 1)  # [R, R, B]
    return Surface(offsets, jnp.moveaxis(values, -1, 0), u, w)


_PROBES = {"normal": jax.random.normal, "rademacher": jax.random.rademacher}


def _draw(key, index, x, indices, distribution):
    """Probe number ``index`` for each image, from a key of the image's own."""
    indices = jnp.arange(len(x)) if indices is None else indices
    key = jax.random.fold_in(key, index)
    return jax.vmap(lambda i: _PROBES[distribution](
        jax.random.fold_in(key, i), x.shape[1:], x.dtype))(indices)


def _gradient(loss: Loss) -> Callable[[jax.Array], jax.Array]:
    return jax.grad(lambda x: jnp.sum(loss(x)))


def _squared_norm(vectors: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(vectors), axis=tuple(range(1, vectors.ndim)))


_UNROLLED = 64
"""The longest loop that is written out on CPUs."""


def _stacked(function: Callable[[jax.Array], Any], length: int, chunk_size: int) -> Any:
    """``function(0)`` to ``function(length - 1)``, stacked; ``chunk_size`` of them at once.

    XLA runs convolutions in loops an order of magnitude slower than outside on CPUs
    (jax-ml/jax#12868), so there a loop that is not too long is written out.
    """
    _validate.in_range("num_probes", length, 1)
    _validate.in_range("chunk_size", chunk_size, 1)
    chunk_size = min(chunk_size, length)
    iterations = length // chunk_size
    written_out = jax.default_backend() == "cpu" and iterations <= _UNROLLED

    def step(zero, chunk):
        values = jax.vmap(function)(chunk + zero)
        first = jax.tree.leaves(values)[0].ravel()[0]
        # Always 0, which XLA cannot know: it keeps iterations that are written out one after the
        # other, and memory that of one. It would ignore an optimization barrier on CPUs.
        return (first < -jnp.inf).astype(chunk.dtype), values

    numbers = jnp.arange(length)
    whole = iterations * chunk_size
    zero, parts = jax.lax.scan(step, jnp.zeros((), numbers.dtype),
                               numbers[:whole].reshape(-1, chunk_size), unroll=written_out)
    stacked = jax.tree.map(lambda leaf: leaf.reshape(whole, *leaf.shape[2:]), parts)
    if whole == length:
        return stacked
    rest = jax.vmap(function)(numbers[whole:] + zero)
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), stacked, rest)


_LEAST_PROBES = 8
"""Before a standard error is trusted."""


def _until(probe, rtol: float, most: int, chunk_size: int, x: jax.Array) -> Estimate:
    """The running mean of ``probe(0)``, ``probe(1)``, ..., stopped for each image by itself."""
    _validate.in_range("rtol", rtol, 0, open_low=True)
    _validate.in_range("num_probes", most, _LEAST_PROBES)
    _validate.in_range("chunk_size", chunk_size, 1)

    def error(count, squares):
        return jnp.sqrt(squares / jnp.maximum(count - 1, 1) / jnp.maximum(count, 1))

    def is_open(count, mean, squares):
        return (count < _LEAST_PROBES) | (
            (count < most) & (error(count, squares) > rtol * mean))

    def add(state, sample):
        count, mean, squares = state
        counts = count + is_open(*state)
        moved = jnp.where(counts > count, sample - mean, 0)
        new_mean = mean + moved / jnp.maximum(counts, 1)
        return (counts, new_mean, squares + moved * jnp.where(
            counts > count, sample - new_mean, 0)), None

    def step(state):
        number, sums = state
        samples = jax.vmap(probe)(number * chunk_size + jnp.arange(chunk_size))
        return number + 1, jax.lax.scan(add, sums, samples)[0]

    zeros = jnp.zeros(len(x), x.dtype)
    _, (count, mean, squares) = jax.lax.while_loop(
        lambda state: jnp.any(is_open(*state[1])), step, (0, (zeros, zeros, zeros)))
    return Estimate(mean, error(count, squares))
