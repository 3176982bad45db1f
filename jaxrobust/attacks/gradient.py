"""Attacks along the gradient in a ball: FGSM, PGD and APGD."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust import _validate
from jaxrobust._eager import as_program
from jaxrobust.attacks import common
from jaxrobust.attacks.common import Classifier, Found, Problem, choose, rows
from jaxrobust.attacks.objectives import OBJECTIVES, other_classes

_CROSS_ENTROPY = OBJECTIVES["cross_entropy"]


def fgsm(logits_fn: Classifier, images: jax.Array, labels: jax.Array, *, norm: str, epsilon: float
         ) -> jax.Array:
    r"""Attacks with a single step along the gradient (fast gradient sign method).

    .. math:: x + \epsilon \, \mathrm{sign} \nabla_x l(x, y) \quad (L_\infty), \qquad
      x + \epsilon \nabla_x l / \|\nabla_x l\|_2 \quad (L_2)

    clipped to [0, 1], l being the softmax loss.

    Args:
      logits_fn: images [B, H, W, channels] -> logits [B, C].
      images: [B, H, W, channels], uint8 or floats in [0, 1].
      labels: [B] integers; an image whose label is outside [0, C) is returned as it is.
      norm: "linf" or "l2".
      epsilon: radius of the ball, in pixel values of [0, 1], >= 0.

    Returns:
      [B, H, W, channels] float32 in [0, 1], at most ``epsilon`` (to 1e-6) from ``images``.

    Raises:
      InputError: (a ValueError) if something does not fit, or logits are not finite; it says of
        how many images. Under a transformation such as ``jit`` the logits are not checked.

    Source: Goodfellow et al., Explaining and Harnessing Adversarial Examples (2015),
    https://arxiv.org/abs/1412.6572.
    """
    if isinstance(logits_fn, common.Randomised):
        raise _validate.InputError("Expected a deterministic logits_fn, got a Randomised one: take "
                                   "pgd or apgd.")
    # Nothing is drawn.
    problem = common.prepare(images, labels, jax.random.key(0), norm=norm, epsilon=epsilon,
                             indices=None)

    def attack(problem: Problem) -> tuple[jax.Array, jax.Array]:
        evaluated, gradient = common.evaluate_with_gradient(
            logits_fn, _CROSS_ENTROPY, problem, problem.images, problem.keys)
        return evaluated.finite, _climb(norm, problem, problem.images, gradient, problem.epsilon)

    finite, attacked = as_program(attack)(problem)
    common.require_finite(finite)
    return attacked


def _climb(
    norm: str, problem: Problem, images: jax.Array, gradient: jax.Array, step_size: jax.Array
) -> jax.Array:
    """A step; images that are not attacked have no gradient, and stay."""
    return common.project(norm, problem.images,
                          images + step_size * common.ascent(norm, gradient), problem.epsilon)


def ascend(logits_fn: Classifier, objective: common.Objective, problem: Problem,
           start: jax.Array, *, norm: str, step_size: jax.Array, num_steps: int) -> jax.Array:
    """The images after ``num_steps`` steps along the gradient of an objective, for training.

    Unlike :func:`pgd` it returns the last of the iterates, and evaluates no others.
    """
    def step(problem: Problem, number: jax.Array, images: jax.Array) -> jax.Array:
        _, gradient = common.evaluate_with_gradient(
            logits_fn, objective, problem, images, common.step_keys(problem, number))
        return _climb(norm, problem, images, gradient, step_size)

    return common.repeated(step, num_steps)(problem, start)


class _Walk(NamedTuple):
    """The state of PGD."""

    images: jax.Array  # shape=[B, H, W, channels]
    step_size: jax.Array  # shape=[]
    found: Found


def pgd(
    logits_fn: Classifier,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    *,
    norm: str,
    epsilon: float,
    num_steps: int,
    num_restarts: int = 1,
    step_size: float | None = None,
    random_start: bool = True,
    indices: jax.Array | None = None,
) -> jax.Array:
    r"""Attacks with projected gradient ascent on the softmax loss.

    .. math:: x^{(t+1)} = P(x^{(t)} + \eta \, s^{(t)}), \qquad
      s = \mathrm{sign} \nabla_x l \quad (L_\infty) \text{ or } \nabla_x l / \|\nabla_x l\|_2 \quad
      (L_2)

    P projects to the ball about the image and clips to [0, 1]. Starts are uniform in the ball. Of
    the image itself and all iterates of all restarts the worst is returned: misclassified ones come
    before others, and a larger loss before a smaller one. More restarts, and with the same
    ``step_size`` more steps, therefore never help the defender.

    Args:
      logits_fn: images [B, H, W, channels] -> logits [B, C], or a
        :class:`~jaxrobust.attacks.Randomised` classifier.
      images: [B, H, W, channels], uint8 or floats in [0, 1].
      labels: [B] integers; an image whose label is outside [0, C), such as padding, is returned as
        it is.
      key: a PRNG key; image i's draws come from ``fold_in(key, indices[i])``.
      norm: "linf" or "l2".
      epsilon: radius of the ball, in pixel values of [0, 1], >= 0.
      num_steps: >= 1.
      num_restarts: >= 1.
      step_size: eta, in pixel values, > 0; None for 2.5 epsilon / num_steps.
      random_start: whether to start at random in the ball, or at the image.
      indices: [B] integers that name the images; their positions if none are given. With them an
        image's result is the same in whatever batch it comes.

    Returns:
      [B, H, W, channels] float32 in [0, 1], at most ``epsilon`` (to 1e-6) from ``images``.

    Raises:
      InputError: (a ValueError) if something does not fit, or logits are not finite; it says of
        how many images. Under a transformation such as ``jit`` the logits are not checked.

    >>> logits_fn = lambda x: jnp.stack([x[:, 0, 0, 0], 1 - x[:, 0, 0, 0]], axis=1)
    >>> pgd(logits_fn, jnp.full((1, 1, 1, 1), 0.75), jnp.array([0]), jax.random.key(0),
    ...     norm="linf", epsilon=0.5, num_steps=5).ravel().tolist()
    [0.25]

    Source: Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks (2018),
    https://arxiv.org/abs/1706.06083.
    """
    num_steps = _validate.integer("num_steps", num_steps, 1)
    num_restarts = _validate.integer("num_restarts", num_restarts, 1)
    if step_size is not None:
        _validate.in_range("step_size", step_size, 0, open_low=True)
    problem = common.prepare(images, labels, key, norm=norm, epsilon=epsilon, indices=indices)
    step_size = (2.5 * problem.epsilon / num_steps if step_size is None
                 else jnp.asarray(step_size, jnp.float32))

    def step(problem: Problem, number: jax.Array, walk: _Walk) -> _Walk:
        evaluated, gradient = common.evaluate_with_gradient(
            logits_fn, _CROSS_ENTROPY, problem, walk.images, common.step_keys(problem, number))
        return _Walk(_climb(norm, problem, walk.images, gradient, walk.step_size), walk.step_size,
                     common.consider(walk.found, walk.images, evaluated))

    look = common.looking_at(logits_fn, _CROSS_ENTROPY)
    walk_on = common.repeated(step, num_steps)
    start = as_program(lambda problem: uniform_start(norm, problem))
    found = look(problem, common.nothing_found(problem), problem.images)
    for restart in range(num_restarts):
        own = common.with_salt(problem, restart)
        first = start(own) if random_start else problem.images
        walk = walk_on(own, _Walk(first, step_size, found))
        found = look(own, walk.found, walk.images)
    return common.finish(problem, found)


def uniform_start(norm: str, problem: Problem) -> jax.Array:
    """Starts uniform in the ball, then clipped to [0, 1]."""
    shape = problem.images.shape[1:]
    dimension = int(np.prod(shape))

    def draw(key: jax.Array) -> jax.Array:
        if norm == "linf":
            return jax.random.uniform(key, shape, jnp.float32, -1, 1)
        direction, radius = jax.random.split(key)
        normal = jax.random.normal(direction, shape, jnp.float32)
        return (normal / jnp.linalg.norm(normal)
                * jax.random.uniform(radius, (), jnp.float32) ** (1 / dimension))

    change = jax.vmap(draw)(common.start_keys(problem))
    return common.project(norm, problem.images, problem.images + problem.epsilon * change,
                          problem.epsilon)


def _sphere_start(norm: str, problem: Problem) -> jax.Array:
    """On the boundary of the ball, as APGD starts: one value of the box's, or any direction."""
    def draw(key: jax.Array) -> jax.Array:
        if norm == "linf":
            return jax.random.uniform(key, problem.images.shape[1:], jnp.float32, -1, 1)
        return jax.random.normal(key, problem.images.shape[1:], jnp.float32)

    change = common.unit(norm, jax.vmap(draw)(common.start_keys(problem)))
    return common.project(norm, problem.images, problem.images + problem.epsilon * change,
                          problem.epsilon)


def apgd(
    logits_fn: Classifier,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    *,
    norm: str,
    epsilon: float,
    loss: str = "cross_entropy",
    num_steps: int = 100,
    num_restarts: int = 1,
    num_targets: int = 9,
    indices: jax.Array | None = None,
) -> jax.Array:
    r"""Attacks with Auto-PGD, whose step size adapts itself to each image.

    Steps have momentum 0.75,

    .. math:: z = P(x^{(t)} + \eta \, s^{(t)}), \qquad
      x^{(t+1)} = P(x^{(t)} + 0.75 (z - x^{(t)}) + 0.25 (x^{(t)} - x^{(t-1)})),

    and :math:`\eta = 2 \epsilon` at first. At checkpoints after the shares 0.22, 0.41, 0.57, 0.7,
    0.8, 0.87, 0.93 and 0.99 of the steps, eta is halved, and the search goes on from the best image
    so far, if the loss rose in at most 0.75 of the steps since the last one, or if since then
    neither eta nor the largest loss has changed.

    Args:
      logits_fn: as for :func:`pgd`.
      images: as for :func:`pgd`.
      labels: as for :func:`pgd`.
      key: as for :func:`pgd`.
      norm: "linf" or "l2".
      epsilon: radius of the ball, in pixel values of [0, 1], >= 0.
      loss: "cross_entropy", "dlr" (:func:`dlr_loss`, at least 3 classes) or "targeted_dlr"
        (:func:`targeted_dlr_loss`, at least 4), which runs once for each of the ``num_targets``
        classes with the largest logits at the image, the label excepted.
      num_steps: >= 1.
      num_restarts: of each run, >= 1.
      num_targets: >= 1; all other classes if there are fewer.
      indices: as for :func:`pgd`.

    Returns:
      [B, H, W, channels] float32 in [0, 1], at most ``epsilon`` (to 1e-6) from ``images``; which of
      the iterates, see :func:`pgd`.

    Raises:
      InputError: (a ValueError) as for :func:`pgd`, or if there are too few classes for the loss.

    Source: Croce and Hein, Reliable Evaluation of Adversarial Robustness with an Ensemble of
    Diverse Parameter-free Attacks (2020), https://arxiv.org/abs/2003.01690; the constants and the
    comparison at checkpoints (at most, not less than) as in the authors' release,
    https://github.com/fra31/auto-attack.
    """
    _validate.one_of("loss", loss, OBJECTIVES)
    num_restarts = _validate.integer("num_restarts", num_restarts, 1)
    num_targets = _validate.integer("num_targets", num_targets, 1)
    problem = common.prepare(images, labels, key, norm=norm, epsilon=epsilon, indices=indices)
    run = make_apgd(logits_fn, norm, loss, num_steps)
    found = common.looking_at(logits_fn, OBJECTIVES[loss])(
        aimed(problem, problem.labels), common.nothing_found(problem), problem.images)
    targets = [problem.labels]
    if loss == "targeted_dlr":
        others = order_of_classes(logits_fn, problem)
        targets = [others[:, rank] for rank in range(min(num_targets, others.shape[1]))]
    for number, classes in enumerate(targets):
        for restart in range(num_restarts):
            own = common.with_salt(aimed(problem, classes), number * num_restarts + restart)
            found = run(own, found).found
    return common.finish(problem, found)


def aimed(problem: Problem, targets: jax.Array) -> Problem:
    """The problem with these targets."""
    return problem._replace(targets=targets)


def order_of_classes(logits_fn: Classifier, problem: Problem) -> jax.Array:
    """Of each image the classes but its label, [B, C - 1], by their logits, the largest first."""
    return as_program(lambda problem: other_classes(
        common.classify(logits_fn, problem, problem.images, problem.keys), problem.labels))(problem)


class Best(NamedTuple):
    """The image with the largest loss."""

    images: jax.Array  # shape=[B, H, W, channels]
    gradient: jax.Array  # shape=[B, H, W, channels]
    loss: jax.Array  # shape=[B]


class Adaptive(NamedTuple):
    """The state of APGD."""

    images: jax.Array  # shape=[B, H, W, channels]; x of the step
    previous: jax.Array  # shape=[B, H, W, channels]; x of the step before
    loss: jax.Array  # shape=[B]; at previous
    step_size: jax.Array  # shape=[B]
    best: Best
    rises: jax.Array  # shape=[B], dtype=int32; steps since the last checkpoint that raised the loss
    best_at_check: jax.Array  # shape=[B]; the largest loss at the last checkpoint
    halved: jax.Array  # shape=[B], dtype=bool; whether the step size was at the last checkpoint
    found: Found


_MOMENTUM, _LEAST_RISING = 0.75, 0.75


def checkpoints(num_steps: int) -> np.ndarray:
    """For each of 0 .. num_steps, the steps since the last checkpoint if it is one, else 0."""
    window, shrink, least = (max(int(share * num_steps), 1) for share in (0.22, 0.03, 0.06))
    result = np.zeros(num_steps + 1, np.int32)
    at = window
    while at <= num_steps:
        result[at] = window
        window = max(window - shrink, least)
        at += window
    return result


def make_apgd(logits_fn: Classifier, norm: str, loss: str, num_steps: int, *,
              until_wrong: bool = False) -> Callable[[Problem, Found], Adaptive]:
    """A run of APGD, compiled.

    With ``until_wrong`` it ends when all images are misclassified.
    """
    num_steps = _validate.integer("num_steps", num_steps, 1)
    windows = jnp.asarray(checkpoints(num_steps))
    objective = OBJECTIVES[loss]

    def step(problem: Problem, number: jax.Array, state: Adaptive) -> Adaptive:
        evaluated, gradient = common.evaluate_with_gradient(
            logits_fn, objective, problem, state.images, common.step_keys(problem, number))
        here = Best(state.images, gradient, evaluated.loss)
        best = choose(here.loss > state.best.loss, here, state.best)
        best_at_check = jnp.where(number == 0, here.loss, state.best_at_check)
        rose = (here.loss > state.loss) & (number > 0)
        rises = state.rises + rose.astype(jnp.int32)
        window = windows[number]
        stuck = ~state.halved & (best_at_check >= best.loss)
        halve = (window > 0) & (
            stuck | (rises.astype(jnp.float32) <= _LEAST_RISING * window.astype(jnp.float32)))
        step_size = jnp.where(halve, state.step_size / 2, state.step_size)
        here = choose(halve, best, here)
        climbed = _climb(norm, problem, here.images, here.gradient,
                         rows(step_size, state.images))
        share = jnp.where(number == 0, 1.0, _MOMENTUM)
        moved = common.project(norm, problem.images, here.images + share * (
            climbed - here.images) + (1 - share) * (here.images - state.previous), problem.epsilon)
        return Adaptive(
            moved, here.images, here.loss, step_size, best,
            jnp.where(window > 0, 0, rises), jnp.where(window > 0, best.loss, best_at_check),
            jnp.where(window > 0, halve, state.halved),
            common.consider(state.found, state.images, evaluated))

    def begin(problem: Problem, found: Found) -> Adaptive:
        first = _sphere_start(norm, problem)
        size = len(first)
        lowest = jnp.full(size, -jnp.inf, jnp.float32)
        return Adaptive(
            first, first, lowest, jnp.broadcast_to(2 * problem.epsilon, size),
            Best(first, jnp.zeros_like(first), lowest), jnp.zeros(size, jnp.int32), lowest,
            jnp.ones(size, bool), found)

    def done(problem: Problem, state: Adaptive) -> jax.Array:
        return common.all_wrong(problem, state.found)

    start = as_program(begin)
    # One evaluation more than there are steps: that of the last image.
    walk_on = common.repeated(step, num_steps + 1, done if until_wrong else None)
    return lambda problem, found: walk_on(problem, start(problem, found))
