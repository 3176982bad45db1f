"""Random probes of images, loops over them in bounded memory, and means with their errors.

The estimators of :mod:`jaxrobust.curvature` and :mod:`jaxrobust.theory` are built on these, and
others can be: :func:`draw` makes a probe, :func:`map_in_chunks` evaluates a number of them,
:func:`mean_until` as many as a given error takes, and the result is an :class:`Estimate`.

>>> def expected_square(x, key, num_probes):  # of the projection on a random vector
...     def probe(index):
...         return jnp.square(jnp.sum(draw(key, index, x) * x, axis=1))
...     return mean_estimate(map_in_chunks(probe, num_probes, chunk_size=num_probes))
>>> estimate = expected_square(jnp.array([[3.0, 4.0]]), jax.random.key(0), num_probes=10_000)
>>> bool(abs(estimate.value[0] - 25) < 3 * estimate.standard_error[0])
True
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrobust import _validate
from jaxrobust.images import Loss


def gradient_of(loss: Loss) -> Callable[[jax.Array], jax.Array]:
    """Makes the function ``images [B, ...] -> like images`` of each image's own gradient."""
    return jax.grad(lambda x: jnp.sum(loss(x)))


_DISTRIBUTIONS = {"normal": jax.random.normal, "rademacher": jax.random.rademacher}


def draw(key: jax.Array, index: int | jax.Array, x: jax.Array, indices: jax.Array | None = None,
         distribution: str = "normal") -> jax.Array:
    r"""Draws a probe of each image, like x, with :math:`E[\varepsilon \varepsilon^T] = I`.

    Args:
      key: a PRNG key; image i's is ``fold_in(fold_in(key, index), indices[i])``.
      index: the probe's number.
      x: [B, ...]; only its shape and dtype are used.
      indices: [B] integers that name the images; by default their positions in x. With them an
        image's probes do not depend on the batch it comes in.
      distribution: "normal" or "rademacher" (random signs).

    Raises:
      InputError: (a ValueError) if the distribution is unknown.
    """
    _validate.one_of("distribution", distribution, _DISTRIBUTIONS)
    indices = jnp.arange(len(x)) if indices is None else indices
    key = jax.random.fold_in(key, index)
    return jax.vmap(lambda i: _DISTRIBUTIONS[distribution](
        jax.random.fold_in(key, i), x.shape[1:], x.dtype))(indices)


_SALTS = {name: number for number, name in enumerate((
    "squared_frobenius", "finite_difference_curvature", "smoothed_curvature", "gauss_newton_gap",
    "ritz_values", "spectral_density", "hessian_trace", "leave_one_out_squared_frobenius",
    "loss_surface", "gaussian_noise", "smoothed_gradient_norm_squared", "certification"))}
"""Folded into the key of each function that draws, so that no two of them draw the same numbers
from one key. Append new ones at the end: the numbers are part of what a seed means."""


def salted(key: jax.Array, function: str) -> jax.Array:
    """Derives the key from which the named estimator of this library draws."""
    _validate.one_of("function", function, _SALTS)
    _validate.key("key", key)
    return jax.random.fold_in(key, _SALTS[function])


LONGEST_WRITTEN_OUT = 64
"""The most iterations of a loop that is unrolled on CPUs."""


def map_in_chunks(function: Callable[[jax.Array], Any], num_probes: int, chunk_size: int, *,
                  in_order: bool = True) -> Any:
    """Evaluates ``function(0)`` to ``function(num_probes - 1)``, ``chunk_size`` at once; stacked.

    The first leaf that the function returns holds floats. Memory grows with ``chunk_size``, not
    with ``num_probes``, except for the results.

    On CPUs, XLA runs convolutions in loops an order of magnitude slower than outside
    (jax-ml/jax#12868), so that loops of few iterations are unrolled there. Unless ``in_order``, XLA
    may then run iterations side by side: faster by a tenth, but memory grows with their number.

    Raises:
      InputError: (a ValueError) if num_probes < 1 or chunk_size < 1.
    """
    num_probes = _validate.integer_in("num_probes", num_probes, 1)
    chunk_size = _validate.integer_in("chunk_size", chunk_size, 1)
    chunk_size = min(chunk_size, num_probes)
    iterations = num_probes // chunk_size
    written_out = jax.default_backend() == "cpu" and iterations <= LONGEST_WRITTEN_OUT

    def step(zero: jax.Array, chunk: jax.Array) -> tuple[jax.Array, Any]:
        values = jax.vmap(function)(chunk + zero)
        if not in_order:
            return zero, values
        first = jax.tree.leaves(values)[0].ravel()[0]
        # Always 0, which XLA cannot know: it keeps unrolled iterations sequential, and memory that
        # of one. On CPUs XLA would ignore an optimization barrier.
        return (first < -jnp.inf).astype(chunk.dtype), values

    numbers = jnp.arange(num_probes)
    whole = iterations * chunk_size
    zero = jnp.zeros((), numbers.dtype)
    if iterations == 1:
        # A loop of one iteration is not unrolled, and as slow as any.
        zero, stacked = step(zero, numbers[:whole])
    else:
        zero, parts = jax.lax.scan(step, zero, numbers[:whole].reshape(-1, chunk_size),
                                   unroll=written_out)
        stacked = jax.tree.map(lambda leaf: leaf.reshape(whole, *leaf.shape[2:]), parts)
    if whole == num_probes:
        return stacked
    rest = jax.vmap(function)(numbers[whole:] + zero)
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), stacked, rest)


class Estimate(NamedTuple):
    """A mean over random probes, for each image."""

    value: jax.Array  # shape=[B]
    standard_error: jax.Array  # shape=[B]; of the mean; NaN for a single probe


def mean_estimate(samples: jax.Array) -> Estimate:
    """Averages independent samples [K, B] over K, with the standard error."""
    num_samples = samples.shape[0]
    # Squares of small curvatures, and sums of large ones, are beyond the range of float32.
    unit = unit_of(samples, axis=0)
    samples = samples / unit[None]
    mean = unit * jnp.mean(samples, axis=0)
    if num_samples == 1:
        return Estimate(mean, jnp.full_like(mean, jnp.nan))
    return Estimate(mean, unit * (jnp.std(samples, axis=0, ddof=1) / num_samples**0.5))


def mean_over_pairs(pairs: jax.Array) -> Estimate:
    r"""Averages h(i, j) over all pairs of different draws: a U-statistic.

    Args:
      pairs: [B, K, K], h(i, j) for K >= 3 independent draws, symmetric; the diagonal is ignored.

    Returns:
      The mean, unbiased for E h(i, j), and its standard error by the jackknife, each [B].

    Source: Hoeffding (1948); Arvesen (1969).
    """
    k = pairs.shape[1]
    unit = unit_of(pairs, axis=(1, 2))
    pairs = pairs / unit[:, None, None]
    rows = jnp.sum(jnp.where(jnp.eye(k, dtype=bool)[None], 0, pairs), axis=2)  # [B, K]
    total = jnp.sum(rows, axis=1)
    without = (total[:, None] - 2 * rows) / ((k - 1) * (k - 2))
    jackknife = jnp.sqrt((k - 1) / k * jnp.sum(
        jnp.square(without - jnp.mean(without, axis=1, keepdims=True)), axis=1))
    return Estimate(unit * (total / (k * (k - 1))), unit * jackknife)


_LEAST_PROBES = 8  # Before a standard error is trusted.


def mean_until(
    probe: Callable[[jax.Array], jax.Array], x: jax.Array, *, rtol: float, num_probes: int,
    chunk_size: int = 1,
) -> Estimate:
    """Averages ``probe(0)``, ``probe(1)``, ... until the error is small, image by image.

    Args:
      probe: number -> [B], >= 0.
      x: [B, ...]; only its size and dtype are used.
      rtol: > 0; an image's mean is complete when its standard error is at most ``rtol`` times it,
        but not before 8 probes. Stopping by the values favours underestimated errors, so that the
        standard error is widened by 1 + 8 / probes.
      num_probes: the most, >= 8.
      chunk_size: probes at once, >= 1.

    Raises:
      InputError: (a ValueError) if a number is out of range.
    """
    _validate.in_range("rtol", rtol, 0, open_low=True)
    num_probes = _validate.integer_in("num_probes", num_probes, _LEAST_PROBES)
    chunk_size = _validate.integer_in("chunk_size", chunk_size, 1)

    def error(count: jax.Array, squares: jax.Array) -> jax.Array:
        widened = 1 + _LEAST_PROBES / jnp.maximum(count, 1)
        return widened * jnp.sqrt(squares / jnp.maximum(count - 1, 1) / jnp.maximum(count, 1))

    def is_open(count: jax.Array, mean: jax.Array, squares: jax.Array) -> jax.Array:
        return (count < _LEAST_PROBES) | (
            (count < num_probes) & (error(count, squares) > rtol * mean))

    def add(
        state: tuple[jax.Array, jax.Array, jax.Array], sample: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
        count, mean, squares = state
        counted = jnp.where(is_open(*state), 1, 0).astype(count.dtype)
        moved = counted * (sample - mean)
        new_mean = mean + moved / jnp.maximum(count + counted, 1)
        return (count + counted, new_mean, squares + moved * (sample - new_mean)), None

    def step(state: Any) -> Any:
        number, unit, sums = state
        samples = jax.vmap(probe)(number * chunk_size + jnp.arange(chunk_size))
        # In units of the first: squares of small curvatures are beyond float32.
        unit = jnp.where(number == 0, unit_of(samples[0]), unit)
        return number + 1, unit, jax.lax.scan(
            add, sums, (samples / unit[None]).astype(sums[0].dtype))[0]

    # Half precision counts only to 256 or 2,048.
    zeros = jnp.zeros(len(x), x.dtype if x.dtype.itemsize >= 4 else jnp.float32)
    ones = jnp.ones(len(x), x.dtype)
    _, unit, (count, mean, squares) = jax.lax.while_loop(
        lambda state: jnp.any(is_open(*state[2])), step, (0, ones, (zeros, zeros, zeros)))
    return Estimate(*(unit * part.astype(unit.dtype) for part in (mean, error(count, squares))))


def unit_of(values: jax.Array, axis: int | tuple[int, ...] = ()) -> jax.Array:
    """A divisor that brings squares and sums over ``axis`` into the range of the dtype.

    It is about the largest magnitude along ``axis``, which is dropped, or 1 for 0; limited so that
    its inverse, by which compilers multiply, is in the range too.
    """
    largest = jnp.max(jnp.abs(values), axis=axis)
    tiny = float(jnp.finfo(largest.dtype).tiny)
    return jnp.where(largest >= tiny, jnp.minimum(largest, 0.25 / tiny), 1)


def squared_norm(vectors: jax.Array) -> jax.Array:
    """Squared norms [B] of vectors [B, ...], correct wherever the dtype can represent them."""
    unit, squares = _sum_of_squares(vectors)
    return unit * (unit * squares)


def norm(vectors: jax.Array) -> jax.Array:
    """Norms [B] of vectors [B, ...], correct wherever the dtype can represent them."""
    unit, squares = _sum_of_squares(vectors)
    return unit * jnp.sqrt(squares)


def _sum_of_squares(vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``(unit [B], sum of squares [B])`` of the vectors in this unit."""
    axes = tuple(range(1, vectors.ndim))
    unit = unit_of(vectors, axes)
    return unit, jnp.sum(jnp.square(vectors / jnp.expand_dims(unit, axes)), axis=axes)
