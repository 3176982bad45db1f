"""The smallest perturbation that changes the class: targeted FAB."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrobust import _validate
from jaxrobust._eager import as_program
from jaxrobust.attacks import common
from jaxrobust.attacks.common import Classifier, Problem, choose, rows
from jaxrobust.attacks.gradient import aimed, order_of_classes
from jaxrobust.attacks.objectives import towards_target


class Nearest(NamedTuple):
    """The nearest misclassified images that were found."""

    images: jax.Array  # shape=[B, H, W, channels], dtype=float32; the image itself if none was
    distance: jax.Array  # shape=[B], dtype=float32; inf if none was found
    finite: jax.Array  # shape=[B], dtype=bool; whether all logits seen so far are


def fab(
    logits_fn: Classifier,
    images: jax.Array,
    labels: jax.Array,
    *,
    norm: str,
    num_steps: int = 100,
    num_targets: int = 9,
) -> tuple[jax.Array, jax.Array]:
    r"""Searches for the nearest misclassified image (fast adaptive boundary attack).

    For each target t, with :math:`f = z_t - z_y` and :math:`\pi` the projection to the hyperplane
    where f, linearised at :math:`x^{(i)}`, is 0, within the box [0, 1],

    .. math:: x^{(i+1)} = (1 - \alpha) (x^{(i)} + 1.05 \, (\pi(x^{(i)}) - x^{(i)})) +
      \alpha (x + 1.05 \, (\pi(x) - x)), \qquad
      \alpha = \min\Big(\frac{d_1}{d_1 + d_2}, 0.1\Big)

    with the distances :math:`d_1, d_2` from :math:`x^{(i)}` and x to their projections. From an
    image that is misclassified it goes 0.1 of the way back to x. At the end a bisection between x
    and the nearest one found shortens the distance.

    Args:
      logits_fn: images [B, H, W, channels] -> logits [B, C].
      images: [B, H, W, channels], uint8 or floats in [0, 1].
      labels: [B] integers; an image whose label is outside [0, C), such as padding, is returned as
        it is.
      norm: "linf" or "l2".
      num_steps: for each target, >= 1.
      num_targets: the classes with the largest logits at the image, the label excepted, >= 1; all
        of them if there are fewer.

    Returns:
      ``(images [B, H, W, channels], distances [B])``, float32: the nearest misclassified images and
      how far from ``images`` they are; distance 0 for an image that is misclassified as it is, and
      inf, with the image itself, if none was found or its label is outside [0, C).

    Raises:
      InputError: (a ValueError) if something does not fit, or logits are not finite; it says of
        how many images. Under a transformation such as ``jit`` the logits are not checked.

    >>> logits_fn = lambda x: jnp.stack([x[:, 0, 0, 0], 1 - x[:, 0, 0, 0]], axis=1)
    >>> nearest, distance = fab(logits_fn, jnp.full((1, 1, 1, 1), 0.75), jnp.array([0]), norm="l2")
    >>> round(distance.item(), 3)
    0.25

    Source: Croce and Hein, Minimally Distorted Adversarial Examples with a Fast Adaptive Boundary
    Attack (2020), https://arxiv.org/abs/1907.02044, whose search at the end takes three steps.
    """
    if isinstance(logits_fn, common.Randomised):
        raise _validate.InputError("Expected a deterministic logits_fn, got a Randomised one, "
                                   "which has no boundary: take pgd or apgd.")
    num_targets = _validate.integer("num_targets", num_targets, 1)
    # Nothing is drawn.
    problem = common.prepare(images, labels, jax.random.key(0), norm=norm, epsilon=0.0,
                             indices=None)
    run = make_fab(logits_fn, norm, num_steps)
    others = order_of_classes(logits_fn, problem)
    nearest = begin(logits_fn, problem)
    for rank in range(min(num_targets, others.shape[1])):
        nearest = run(aimed(problem, others[:, rank]), nearest)
    nearest = make_bisection(logits_fn, norm)(problem, nearest)
    common.require_finite(nearest.finite)
    return nearest.images, nearest.distance


def begin(logits_fn: Classifier, problem: Problem) -> Nearest:
    """The images themselves: at distance 0 where they are misclassified, else at infinity."""
    def look(problem: Problem) -> Nearest:
        evaluated = common.evaluate(
            logits_fn, towards_target, problem, problem.images, problem.keys)
        return Nearest(problem.images, jnp.where(evaluated.wrong, 0, jnp.inf).astype(jnp.float32),
                       evaluated.finite)

    return as_program(look)(problem)


class _Approach(NamedTuple):
    """The state of FAB."""

    images: jax.Array  # shape=[B, H, W, channels]
    nearest: Nearest


_ALPHA_MAX, _ETA, _BETA, _LEAST_DISTANCE = 0.1, 1.05, 0.9, 1e-8


def make_fab(
    logits_fn: Classifier, norm: str, num_steps: int
) -> Callable[[Problem, Nearest], Nearest]:
    """A run of FAB for one target, compiled: ``(problem, nearest) -> nearest``."""
    num_steps = _validate.integer("num_steps", num_steps, 1)

    def step(problem: Problem, number: jax.Array, state: _Approach) -> _Approach:
        keys = common.step_keys(problem, number)
        here, gradient = common.evaluate_with_gradient(
            logits_fn, towards_target, problem, state.images, keys)
        # f(x) + gradient (x + d - x) = 0, for x of this step and for the image itself.
        at_image = here.loss + jnp.sum(
            (gradient * (problem.images - state.images)).reshape(len(gradient), -1), axis=1)
        own = to_hyperplane(norm, state.images, gradient, -here.loss)
        image = to_hyperplane(norm, problem.images, gradient, -at_image)
        own_size, image_size = (jnp.maximum(common.size_of(norm, change), _LEAST_DISTANCE)
                                for change in (own, image))
        alpha = rows(jnp.minimum(own_size / (own_size + image_size), _ALPHA_MAX), own)
        moved = jnp.clip((1 - alpha) * (state.images + _ETA * own)
                         + alpha * (problem.images + _ETA * image), 0, 1)
        there = common.evaluate(logits_fn, towards_target, problem, moved, keys)
        nearest = _nearer(norm, problem, state.nearest, moved, there)
        back = choose(there.wrong, problem.images + _BETA * (moved - problem.images), moved)
        return _Approach(back, nearest._replace(finite=nearest.finite & here.finite))

    walk_on = common.repeated(step, num_steps)
    return lambda problem, nearest: walk_on(problem, _Approach(problem.images, nearest)).nearest


def _nearer(
    norm: str, problem: Problem, nearest: Nearest, images: jax.Array, evaluated: common.Evaluated
) -> Nearest:
    distance = common.size_of(norm, images - problem.images)
    nearer = evaluated.wrong & (distance < nearest.distance)
    images, distance = choose(nearer, (images, distance), nearest[:2])
    return Nearest(images, distance, nearest.finite & evaluated.finite)


_HALVINGS = 12


def make_bisection(logits_fn: Classifier, norm: str) -> Callable[[Problem, Nearest], Nearest]:
    """Halves, again and again, the way between the image and the nearest one found, compiled."""
    def step(
        problem: Problem, number: jax.Array, state: tuple[jax.Array, Nearest, jax.Array]
    ) -> tuple[jax.Array, Nearest, jax.Array]:
        bounds, nearest, far = state  # [B, 2], shares of the way to ``far``
        middle = jnp.mean(bounds, axis=1)
        points = problem.images + rows(middle, far) * (far - problem.images)
        evaluated = common.evaluate(
            logits_fn, towards_target, problem, points, common.step_keys(problem, number))
        bounds = jnp.where(evaluated.wrong[:, None], jnp.stack([bounds[:, 0], middle], axis=1),
                           jnp.stack([middle, bounds[:, 1]], axis=1))
        return bounds, _nearer(norm, problem, nearest, points, evaluated), far

    walk_on = common.repeated(step, _HALVINGS)

    def run(problem: Problem, nearest: Nearest) -> Nearest:
        bounds = jnp.broadcast_to(jnp.array([[0.0, 1.0]], jnp.float32), (len(problem.images), 2))
        return walk_on(problem, (bounds, nearest, nearest.images))[1]

    return run


def to_hyperplane(norm: str, points: jax.Array, normal: jax.Array, offset: jax.Array) -> jax.Array:
    r"""The smallest steps that lead to a hyperplane within the box [0, 1].

    .. math:: \min_d \|d\| \quad \text{s.t.} \quad \langle w, d \rangle = b, \; 0 \le x + d \le 1

    Every coordinate moves towards the hyperplane until it is there or at the end of its room
    :math:`r_i` in the box: :math:`d_i = \mathrm{sign}(b w_i) \min(\lambda s_i, r_i)`, with
    :math:`s_i = 1` for the maximum norm and :math:`|w_i|` for the Euclidean one. The covered offset

    .. math:: c(\lambda) = \sum_i |w_i| \min(\lambda s_i, r_i)

    is concave and grows in straight pieces. Newton's steps for :math:`c(\lambda) = |b|`, from 0 on,
    thus never go too far, and each but the last fills the room of another coordinate: they end, and
    are few. Sorting the ends of the pieces instead took half of the attack's time. Where the box
    ends before the hyperplane, d is the step that comes nearest to it.

    Args:
      norm: "linf" or "l2".
      points: x, [B, ...] in [0, 1].
      normal: w, like points.
      offset: b, [B].

    Returns:
      d, like points.
    """
    shape, size = points.shape, len(points)
    x, w = points.reshape(size, -1), normal.reshape(size, -1)
    # In units of the largest, because squares of tiny gradients are 0 in float32.
    largest = jnp.max(jnp.abs(w), axis=1)
    unit = jnp.where(largest > 0, largest, 1)
    w, b = w / unit[:, None], offset / unit
    w = jnp.where(b < 0, -1, 1).astype(w.dtype)[:, None] * w
    b = jnp.abs(b)
    weight = jnp.abs(w)
    room = jnp.where(w > 0, 1 - x, jnp.where(w < 0, x, 0))
    speed = jnp.where(weight > 0, weight if norm == "l2" else 1, 0)
    # The lambda at which a coordinate has no room left.
    full = jnp.where(speed > 0, room / jnp.where(speed > 0, speed, 1), 0)

    def filled(lam: jax.Array) -> jax.Array:
        return full <= lam[:, None]

    def newton(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        lam, _ = state
        covered = jnp.sum(weight * jnp.where(filled(lam), room, 0), axis=1)
        rate = jnp.sum(jnp.where(filled(lam), 0, weight * speed), axis=1)
        # Where no coordinate has room left, the hyperplane is at the end of the box or beyond.
        reached = jnp.where(
            rate > 0, (b - covered) / jnp.where(rate > 0, rate, 1), jnp.max(full, axis=1))
        further = jnp.maximum(reached, lam)
        return further, jnp.any(filled(further) != filled(lam))

    lam, _ = jax.lax.while_loop(
        lambda state: state[1], newton, (jnp.zeros_like(b), jnp.array(True)))
    step = jnp.where(filled(lam), room, lam[:, None] * speed)
    return (jnp.sign(w) * step).reshape(shape)
