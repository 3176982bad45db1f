"""An attack by scores alone, without gradients: Square."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust import _validate
from jaxrobust._eager import as_program
from jaxrobust.attacks import common
from jaxrobust.attacks.common import Classifier, Found, Problem
from jaxrobust.attacks.objectives import margin_objective

_FIRST_SHARE = 0.8
_TINY = 1e-12
_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def square_attack(
    logits_fn: Classifier,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    *,
    norm: str,
    epsilon: float,
    num_queries: int = 5000,
    indices: jax.Array | None = None,
) -> jax.Array:
    r"""Attacks by random search over squares; it uses the logits alone, no gradients.

    Every query changes the perturbation in a square window at a random place, to
    :math:`\pm \epsilon` in each channel (L-inf), or by moving mass from one window to another in a
    pattern with a peak (L2), and keeps the change if the margin :math:`z_y - \max_{i \ne y} z_i`
    falls. The share of the image that a window covers is 0.8 at first, and is halved after 10, 50,
    200, 500, 1000, 2000, 4000, 6000 and 8000 queries. An image is done when it is misclassified.

    In L2 channel i of the first window gets the norm

    .. math:: \sqrt{\|\nu_{W_1 \cup W_2, i}\|^2 + (\epsilon^2 - \|\nu\|^2) / c}

    with :math:`\nu` the perturbation, :math:`W_1, W_2` the windows and c channels: each channel
    passes on its own mass, as in the paper (Algorithm 3) and its authors' code. AutoAttack's code
    gives every channel the mass of all of them before it scales the whole to :math:`\epsilon`, so
    that a query moves up to c times as much mass into the window.

    Args:
      logits_fn: as for :func:`~jaxrobust.attacks.pgd`.
      images: [B, H, W, channels], uint8 or floats in [0, 1]; for "l2", H and W >= 3.
      labels: [B] integers; an image whose label is outside [0, C), such as padding, is returned as
        it is.
      key: a PRNG key; image i's draws come from ``fold_in(key, indices[i])``.
      norm: "linf" or "l2".
      epsilon: radius of the ball, in pixel values of [0, 1], >= 0.
      num_queries: for each image, >= 1; two more are for the image itself and the start.
      indices: [B] integers that name the images; their positions if none are given.

    Returns:
      [B, H, W, channels] float32 in [0, 1], at most ``epsilon`` (to 1e-6) from ``images``: the
      image with the smallest margin that was found.

    Raises:
      InputError: (a ValueError) if something does not fit, or logits are not finite; it says of
        how many images. Under a transformation such as ``jit`` the logits are not checked.

    Source: Andriushchenko et al., Square Attack: a query-efficient black-box adversarial attack via
    random search (2020), https://arxiv.org/abs/1912.00049; the schedule as in AutoAttack, which
    does not stretch it to the number of queries, but with places of its own for each image.
    """
    problem = common.prepare(images, labels, key, norm=norm, epsilon=epsilon, indices=indices)
    found = common.looking_at(logits_fn, margin_objective)(
        problem, common.nothing_found(problem), problem.images)
    return common.finish(problem, make_square(logits_fn, norm, num_queries)(problem, found))


class _Search(NamedTuple):
    """The state of the search."""

    images: jax.Array  # shape=[B, H, W, channels]; with the smallest margin of the search
    loss: jax.Array  # shape=[B]; minus this margin
    found: Found


def make_square(
    logits_fn: Classifier, norm: str, num_queries: int
) -> Callable[[Problem, Found], Found]:
    """A run of Square, compiled: ``(problem, found) -> found``."""
    num_queries = _validate.integer("num_queries", num_queries, 1)

    def step(problem: Problem, number: jax.Array, state: _Search) -> _Search:
        keys = common.step_keys(problem, number)
        propose = _propose_linf if norm == "linf" else _propose_l2
        evaluate = functools.partial(common.evaluate, logits_fn, margin_objective, problem)
        # The first query is at the start, which needs no images before it.
        proposed = jnp.where(number == 0, state.images, jax.vmap(
            propose, (0, 0, 0, None, None))(keys, problem.images, state.images, problem.epsilon,
                                            jnp.maximum(number - 1, 0)))
        proposed = common.project(norm, problem.images, proposed, problem.epsilon)
        evaluated = evaluate(proposed, keys)
        is_open = ~state.found.wrong
        better = is_open & (evaluated.wrong | (evaluated.loss > state.loss))
        images, loss = common.choose(
            better, (proposed, evaluated.loss), (state.images, state.loss))
        found = common.consider(state.found, proposed, evaluated)
        kept = common.choose(is_open, found, state.found)
        return _Search(images, loss, kept._replace(finite=found.finite))

    def begin(problem: Problem, found: Found) -> _Search:
        first = jax.vmap(_start_linf if norm == "linf" else _start_l2, (0, 0, None))(
            common.start_keys(problem), problem.images, problem.epsilon)
        return _Search(first, jnp.full(len(first), -jnp.inf, jnp.float32), found)

    start = as_program(begin)
    walk_on = common.repeated(step, num_queries + 1,
                              lambda problem, state: common.all_wrong(problem, state.found))

    def run(problem: Problem, found: Found) -> Found:
        if norm == "l2" and min(problem.images.shape[1:3]) < 3:
            raise _validate.InputError(f"Expected images of at least 3 x 3 pixels for norm='l2', "
                                       f"got {problem.images.shape}.")
        return walk_on(problem, start(problem, found)).found

    return run


def halvings(query: jax.Array) -> jax.Array:
    """How often the share of the image that a window covers has been halved at a query, from 0."""
    return jnp.sum(query > jnp.array(_HALVED_AFTER, jnp.int32))


def _signs(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.rademacher(key, shape, jnp.float32)


def _corner(key: jax.Array, shape: tuple[int, ...], side: jax.Array) -> jax.Array:
    """The upper left pixel of a window [side, side] within an image, each equally likely."""
    draws = jax.random.uniform(key, (2,), jnp.float32)
    places = jnp.array(shape[:2], jnp.int32) - side + 1
    return jnp.minimum((draws * places.astype(jnp.float32)).astype(jnp.int32), places - 1)


def _window(shape: tuple[int, ...], corner: jax.Array, side: jax.Array) -> jax.Array:
    """Whether pixels are in the window, [H, W, 1] bool."""
    row, column = (jnp.arange(length, dtype=jnp.int32) for length in shape[:2])
    inside = [(numbers >= first) & (numbers < first + side)
              for numbers, first in ((row, corner[0]), (column, corner[1]))]
    return (inside[0][:, None] & inside[1][None])[..., None]


def _start_linf(key: jax.Array, image: jax.Array, epsilon: jax.Array) -> jax.Array:
    """Vertical stripes of one pixel."""
    return jnp.clip(image + epsilon * _signs(key, (1, *image.shape[1:])), 0, 1)


def _propose_linf(
    key: jax.Array, image: jax.Array, best: jax.Array, epsilon: jax.Array, query: jax.Array
) -> jax.Array:
    height, width, channels = image.shape
    share = _FIRST_SHARE * 0.5 ** halvings(query).astype(jnp.float32)
    side = jnp.round(jnp.sqrt(share * (height * width))).astype(jnp.int32)
    side = jnp.clip(side, 1, min(height, width))
    place, sign = jax.random.split(key)
    window = _window(image.shape, _corner(place, image.shape, side), side)
    # The projection, which follows, leaves a change by epsilon.
    return best + jnp.where(window, 2 * epsilon * _signs(sign, (1, 1, channels)), 0)


def _bump(height: int, width: int) -> np.ndarray:
    """A pattern with a peak in the middle: the sum over i of 1 / i^2 on rectangles that grow."""
    pattern = np.zeros((height, width))
    middle = height // 2, width // 2
    for ring in range(max(middle) + 1):
        rectangle = tuple(slice(max(centre - ring, 0), centre + ring + 1) for centre in middle)
        pattern[rectangle] += 1 / (ring + 1) ** 2
    return pattern / max(float(np.linalg.norm(pattern)), 1e-12)


def _pattern(side: int) -> np.ndarray:
    """A bump above its negative, [side, side], of Euclidean norm 1."""
    both = np.concatenate([_bump(side // 2, side), -_bump(side - side // 2, side)])
    return (both / np.linalg.norm(both)).astype(np.float32)


def _start_l2(key: jax.Array, image: jax.Array, epsilon: jax.Array) -> jax.Array:
    """Patterns in tiles of a fifth of the image, of random signs and directions."""
    side = max(min(image.shape[:2]) // 5, 1)
    down, across = (length // side for length in image.shape[:2])
    sign, turn = jax.random.split(key)
    tile = jnp.asarray(_pattern(side))
    turned = jax.random.bernoulli(turn, 0.5, (down, across, 1, 1))
    tiles = jnp.where(turned, tile.T[None, None], tile[None, None])[..., None]
    tiles = tiles * _signs(sign, (down, across, 1, 1, image.shape[2]))
    change = tiles.transpose(0, 2, 1, 3, 4).reshape(down * side, across * side, -1)
    around = [((length - inner) // 2, length - inner - (length - inner) // 2)
              for length, inner in zip(image.shape, change.shape, strict=True)]
    change = jnp.pad(change, around)
    return image + epsilon * change / jnp.linalg.norm(change)


def _sides(height: int, width: int) -> np.ndarray:
    """The sides of windows in L2 by the number of halvings: odd, at least 3."""
    largest = min(height, width) - 1 + min(height, width) % 2
    shares = _FIRST_SHARE * 0.5 ** np.arange(len(_HALVED_AFTER) + 1)
    sides = np.maximum(np.round(np.sqrt(shares * height * width)).astype(np.int32), 3) | 1
    return np.minimum(sides, largest)


def _propose_l2(
    key: jax.Array, image: jax.Array, best: jax.Array, epsilon: jax.Array, query: jax.Array
) -> jax.Array:
    height, width, channels = image.shape
    change = best - image
    sides = _sides(height, width)
    patterns = np.zeros((len(sides), max(sides), max(sides)), np.float32)
    for number, side in enumerate(sides):
        patterns[number, :side, :side] = _pattern(int(side))
    level = halvings(query)
    side = jnp.asarray(sides)[level]
    place, other_place, sign, turn = jax.random.split(key, 4)
    corner = _corner(place, image.shape, side)
    window = _window(image.shape, corner, side)
    emptied = _window(image.shape, _corner(other_place, image.shape, side), side)
    pattern = jnp.asarray(patterns)[level]
    pattern = jnp.where(jax.random.bernoulli(turn, 0.5), pattern.T, pattern)
    pattern = jnp.pad(pattern, ((0, height - max(sides)), (0, width - max(sides))))
    pattern = jnp.roll(pattern, corner, (0, 1))[..., None] * _signs(sign, (1, 1, channels))
    old = jnp.where(window, change, 0)
    new = pattern + old / (_channel_norms(old) + _TINY)
    # What the two windows hold, and what the whole has left, for each channel.
    mass = (jnp.square(_channel_norms(jnp.where(window | emptied, change, 0)))
            + jnp.maximum(epsilon**2 - jnp.sum(jnp.square(change)), 0) / channels)
    new = new / (_channel_norms(new) + _TINY) * jnp.sqrt(mass)
    change = jnp.where(window, new, jnp.where(emptied, 0, change))
    return image + epsilon * change / jnp.maximum(jnp.linalg.norm(change), _TINY)


def _channel_norms(change: jax.Array) -> jax.Array:
    """[1, 1, channels]"""
    return jnp.sqrt(jnp.sum(jnp.square(change), axis=(0, 1), keepdims=True))
