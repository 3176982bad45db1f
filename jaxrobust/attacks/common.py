"""What the attacks share: norms, what an attack is given and has found, and loops of steps.

A ``step`` here is ``(problem, number, state) -> state``. XLA runs convolutions in loops several
times slower than outside on CPUs (jax-ml/jax#12868): there the steps are called from Python, one
compiled program again and again; elsewhere the loop is a program.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxrobust import _validate, probes
from jaxrobust._eager import as_program, is_traced
from jaxrobust.centroids import counted
from jaxrobust.images import LogitsFn, predicted_classes, to_float

NORMS = ("linf", "l2")


@dataclasses.dataclass(frozen=True)
class Randomised:
    r"""A randomised classifier, which attacks see through expectations over its draws (EoT).

    Gradients and losses are means over ``num_draws`` fresh draws at every step, and an image counts
    as misclassified if more than half of the draws misclassify it: no single draw decides.

    .. math:: \nabla_x E_r[l(z_r(x), y)] \approx \frac{1}{K} \sum_{k=1}^{K} \nabla_x l(z_{r_k}(x),
      y)

    Attributes:
      logits_fn: ``(key, images [B, ...]) -> logits [B, C]``, row i depending on the key and image i
        alone. It is applied to each image with a key of the image's own.
      num_draws: K >= 1.
      chunk_size: draws at once, >= 1; memory grows with it, and on CPUs the time that compiling
        takes falls.

    Raises:
      InputError: (a ValueError) if a number is not an integer, at least 1.

    Source: Athalye et al., Synthesizing Robust Adversarial Examples (2018),
    https://arxiv.org/abs/1707.07397; 20 draws as in AutoAttack.
    """

    logits_fn: Callable[[jax.Array, jax.Array], jax.Array]
    num_draws: int = 20
    chunk_size: int = 5

    def __post_init__(self) -> None:
        _validate.integer("num_draws", self.num_draws, 1)
        _validate.integer("chunk_size", self.chunk_size, 1)


Classifier = LogitsFn | Randomised


class Problem(NamedTuple):
    """Images to attack."""

    images: jax.Array  # shape=[B, H, W, channels], dtype=float32; in [0, 1]
    labels: jax.Array  # shape=[B], dtype=int32; outside [0, C) for what is not attacked
    targets: jax.Array  # shape=[B], dtype=int32; the classes that targeted attacks aim at
    keys: jax.Array  # shape=[B], a PRNG key of each image
    epsilon: jax.Array  # shape=[], dtype=float32; radius of the ball


class Found(NamedTuple):
    """The worst images found so far."""

    images: jax.Array  # shape=[B, H, W, channels], dtype=float32
    wrong: jax.Array  # shape=[B], dtype=bool; whether they are misclassified
    loss: jax.Array  # shape=[B], dtype=float32
    finite: jax.Array  # shape=[B], dtype=bool; whether all logits seen so far are


class Evaluated(NamedTuple):
    """What a classifier says of images; means over the draws of a randomised one."""

    loss: jax.Array  # shape=[B], dtype=float32
    wrong: jax.Array  # shape=[B], dtype=bool; False where logits are not finite
    finite: jax.Array  # shape=[B], dtype=bool; True for images that are not attacked


Objective = Callable[[jax.Array, Problem], jax.Array]
"""``(logits [B, C], problem) -> [B]``, what an attack maximises."""


def prepare(images: ArrayLike, labels: ArrayLike, key: jax.Array, *, norm: str, epsilon: float,
            indices: ArrayLike | None) -> Problem:
    """Checks what attacks are given.

    Raises:
      InputError: (a ValueError) if something does not fit.
    """
    _validate.key("key", key)
    _validate.one_of("norm", norm, NORMS)
    _validate.in_range("epsilon", epsilon, 0)
    if not is_traced(images):
        _validate.images("images", images)
    images = to_float(jnp.asarray(images)).astype(jnp.float32)
    labels = _validate.class_numbers("labels", labels)
    size = _validate.shapes(images=(images, "B H W channels"), labels=(labels, "B"))["B"]
    indices = (jnp.arange(size, dtype=jnp.int32) if indices is None
               else _validate.class_numbers("indices", indices))
    _validate.shapes(labels=(labels, "B"), indices=(indices, "B"))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
    return Problem(images, labels, labels, keys, jnp.asarray(epsilon, jnp.float32))


def with_salt(problem: Problem, salt: int) -> Problem:
    """The same problem with other random numbers."""
    return problem._replace(keys=fold_in(problem.keys, salt))


def fold_in(keys: jax.Array, number: int | jax.Array) -> jax.Array:
    """Keys [B] with a number folded into each."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def rows(values: jax.Array, like: jax.Array) -> jax.Array:
    """Values [B] as [B, 1, ...], to be broadcast over the pixels of images."""
    return values.reshape(values.shape + (1,) * (like.ndim - 1))


Tree = TypeVar("Tree")


def choose(condition: jax.Array, yes: Tree, no: Tree) -> Tree:
    """For each image, the row of ``yes`` where the condition [B] holds, else that of ``no``."""
    return jax.tree.map(lambda a, b: jnp.where(rows(condition, a), a, b), yes, no)


def size_of(norm: str, perturbation: jax.Array) -> jax.Array:
    """Norms [B] of perturbations [B, ...]."""
    if norm == "l2":
        return probes.norm(perturbation)
    return jnp.max(jnp.abs(perturbation), axis=tuple(range(1, perturbation.ndim)))


def unit(norm: str, vectors: jax.Array) -> jax.Array:
    """Vectors [B, ...] divided by their norm; 0 where that is 0."""
    size = size_of(norm, vectors)
    return vectors / rows(jnp.where(size > 0, size, 1), vectors)


def ascent(norm: str, gradient: jax.Array) -> jax.Array:
    """The step of norm 1 with the largest product with the gradient."""
    return jnp.sign(gradient) if norm == "linf" else unit(norm, gradient)


_ROUNDING = 1e-6
"""By which the ball is smaller, as a share of its radius, so that rounding never leaves it."""


def project(norm: str, center: jax.Array, points: jax.Array, epsilon: jax.Array) -> jax.Array:
    """Points in the ball about ``center`` and in [0, 1]: first the ball's nearest, then clipped."""
    change = points - center
    if norm == "linf":
        change = jnp.clip(change, -epsilon, epsilon)
    else:
        size = size_of(norm, change)
        factor = jnp.minimum(1, (1 - _ROUNDING) * epsilon / jnp.where(size > 0, size, 1))
        change = change * rows(factor, change)
    return jnp.clip(center + change, 0, 1)


@jax.jit
def _with_parameters(classifier: LogitsFn, images: jax.Array) -> jax.Array:
    """A function that holds its parameters is traced once for all attacks, with its gradient."""
    return classifier(images)


def classify(classifier: Classifier, problem: Problem, images: jax.Array, keys: jax.Array
             ) -> jax.Array:
    """Logits [B, C] in float32 or wider, with those of a randomised classifier drawn once."""
    if isinstance(classifier, Randomised):
        logits = jax.vmap(lambda key, image: classifier.logits_fn(key, image[None])[0])(
            keys, images)
    elif isinstance(classifier, jax.tree_util.Partial) and jax.tree.leaves(classifier):
        logits = _with_parameters(classifier, images)
    else:
        _validate.function("logits_fn", classifier)
        logits = classifier(images)
    logits = _validate.floats("logits", logits)
    num_classes = _validate.shapes(labels=(problem.labels, "B"), logits=(logits, "B C"))["C"]
    _validate.in_range("number of classes", num_classes, 2)
    return logits


def _once(
    classifier: Classifier, objective: Objective, problem: Problem, images: jax.Array,
    keys: jax.Array
) -> Evaluated:
    logits = classify(classifier, problem, images, keys)
    counts = counted(problem.labels, logits.shape[1])
    predicted = predicted_classes(logits)
    finite = predicted >= 0
    return Evaluated(objective(logits, problem).astype(jnp.float32),
                     (predicted != problem.labels) & finite & counts, finite | ~counts)


def _over_draws(
    classifier: Classifier, one_draw: Callable[[jax.Array], tuple[Evaluated, Tree]], keys: jax.Array
) -> tuple[Evaluated, Tree]:
    """The means over draws of what ``one_draw(keys)`` returns: (Evaluated, gradient)."""
    if not isinstance(classifier, Randomised):
        return one_draw(keys)
    drawn, gradients = probes.map_in_chunks(
        lambda number: one_draw(fold_in(keys, number)), classifier.num_draws,
        classifier.chunk_size)
    return Evaluated(
        jnp.mean(drawn.loss, axis=0), jnp.mean(drawn.wrong, axis=0, dtype=jnp.float32) > 0.5,
        jnp.all(drawn.finite, axis=0)), jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), gradients)


def evaluate(classifier: Classifier, objective: Objective, problem: Problem, images: jax.Array,
             keys: jax.Array) -> Evaluated:
    """What the classifier says of images."""
    return _over_draws(classifier, lambda keys: (
        _once(classifier, objective, problem, images, keys), ()), keys)[0]


def evaluate_with_gradient(
    classifier: Classifier, objective: Objective, problem: Problem, images: jax.Array,
    keys: jax.Array,
) -> tuple[Evaluated, jax.Array]:
    """What the classifier says of images, and the gradient of the objective, like images.

    Where it is not finite, as that of sqrt(0), it is 0, which the ensemble's warning counts.
    """
    def one_draw(keys: jax.Array) -> tuple[Evaluated, jax.Array]:
        def total(images: jax.Array) -> tuple[jax.Array, Evaluated]:
            found = _once(classifier, objective, problem, images, keys)
            return jnp.sum(found.loss), found

        gradient, found = jax.grad(total, has_aux=True)(images)
        return found, jnp.where(jnp.isfinite(gradient), gradient, 0)

    return _over_draws(classifier, one_draw, keys)


def nothing_found(problem: Problem) -> Found:
    """What an attack starts with: any image is worse than none."""
    size = len(problem.images)
    return Found(problem.images, jnp.zeros(size, bool), jnp.full(size, -jnp.inf, jnp.float32),
                 jnp.ones(size, bool))


def consider(found: Found, images: jax.Array, evaluated: Evaluated) -> Found:
    """The worse of what was found and of these images: misclassified first, then by the loss."""
    worse = (evaluated.wrong & ~found.wrong) | (
        (evaluated.wrong == found.wrong) & (evaluated.loss > found.loss))
    images, wrong, loss = choose(
        worse, (images, evaluated.wrong, evaluated.loss), (found.images, found.wrong, found.loss))
    return Found(images, wrong, loss, found.finite & evaluated.finite)


def looking_at(classifier: Classifier, objective: Objective
               ) -> Callable[[Problem, Found, jax.Array], Found]:
    """``(problem, found, images) -> found`` with the images considered, compiled."""
    def look(problem: Problem, found: Found, images: jax.Array) -> Found:
        keys = fold_in(problem.keys, _LOOK)
        return consider(found, images, evaluate(classifier, objective, problem, images, keys))

    return as_program(look)


_START, _LOOK, _STEPS = range(3)
"""Folded into an image's key for its random start, for draws outside of steps, and, with the
number of the step added, for each step."""


def start_keys(problem: Problem) -> jax.Array:
    """Keys [B] for random starts."""
    return fold_in(problem.keys, _START)


def step_keys(problem: Problem, number: jax.Array) -> jax.Array:
    """Keys [B] for a step."""
    return fold_in(problem.keys, _STEPS + number)


def finish(problem: Problem, found: Found) -> jax.Array:
    """The images that were found.

    Raises:
      NotFiniteError: (a ValueError) if there were logits that are not finite, unless the call is
        traced.
    """
    require_finite(found.finite)
    return found.images


def require_finite(finite: jax.Array) -> None:
    """Raises NotFiniteError, which says how many are not, unless all of ``finite`` [B] hold.

    What is traced passes.
    """
    if not is_traced(finite):
        _validate.finite_logits(finite)


State = TypeVar("State")


def repeated(
    step: Callable[[Problem, jax.Array, State], State], num_steps: int,
    done: Callable[[Problem, State], jax.Array] | None = None,
) -> Callable[[Problem, State], State]:
    """``(problem, state) -> state`` after ``num_steps`` steps, numbered from 0.

    Args:
      step: ``(problem, number, state) -> state``.
      num_steps: the number of steps.
      done: ``(problem, state) -> []`` bool, whether the steps that are left can be left out.
    """
    compiled_step: Callable[..., State] = as_program(step)
    compiled_done = None if done is None else as_program(done)

    def whole(problem: Problem, state: State) -> State:
        if done is None:
            written_out = (jax.default_backend() == "cpu"
                           and num_steps <= probes.LONGEST_WRITTEN_OUT)
            return jax.lax.fori_loop(
                0, num_steps, lambda number, state: step(problem, jnp.int32(number), state), state,
                unroll=max(num_steps, 1) if written_out else 1)
        return jax.lax.while_loop(
            lambda loop: (loop[0] < num_steps) & ~done(problem, loop[1]),
            lambda loop: (loop[0] + 1, step(problem, *loop)), (jnp.int32(0), state))[1]

    compiled_whole = as_program(whole)

    def run(problem: Problem, state: State) -> State:
        if is_traced((problem, state)) or jax.default_backend() != "cpu":
            return compiled_whole(problem, state)
        for number in range(num_steps):
            if compiled_done is not None and bool(compiled_done(problem, state)):
                break
            state = compiled_step(problem, np.asarray(number, np.int32), state)
        return state

    return run


def all_wrong(problem: Problem, found: Found) -> jax.Array:
    """Whether nothing is left to attack, as far as it is known; a label below 0 is not attacked."""
    return jnp.all(found.wrong | (problem.labels < 0))
