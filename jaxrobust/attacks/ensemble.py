"""AutoAttack's ensemble of attacks with its warnings, and checks for masked gradients."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust import _validate
from jaxrobust._eager import as_program
from jaxrobust.attacks import common
from jaxrobust.attacks.boundary import Nearest, make_fab
from jaxrobust.attacks.common import Classifier, Problem, Randomised
from jaxrobust.attacks.gradient import aimed, fgsm, make_apgd, pgd
from jaxrobust.attacks.objectives import OBJECTIVES
from jaxrobust.attacks.square import make_square
from jaxrobust.images import to_float


class Ensemble(NamedTuple):
    """The result of an ensemble of attacks."""

    images: np.ndarray  # shape=[N, H, W, channels], float32; attacked ones where one succeeded
    robust: np.ndarray  # shape=[N], bool; whether the image withstood every attack
    broken_by: np.ndarray  # shape=[N], text; "clean", the attack that succeeded first, or ""
    accuracy: dict[str, float]
    """The share of images that are right, "clean" and after each of the attacks, in their order."""
    warnings: dict[str, str]
    """Signs that the numbers may mislead, as sentences by name: "probabilities", "random",
    "zero_gradients", "black_box", "few_classes"."""
    zero_gradients: int = 0
    """Runs of APGD, one for each image and target, that failed without a gradient."""


_PASSES = 5
_SAME, _PROBABLE, _GAIN = 1e-4, 1e-5, 0.002


def auto_attack(
    logits_fn: Classifier,
    images: np.ndarray,
    labels: np.ndarray,
    key: jax.Array,
    *,
    norm: str,
    epsilon: float,
    num_steps: int = 100,
    num_targets: int = 9,
    num_queries: int = 5000,
    batch_size: int = 250,
    indices: np.ndarray | None = None,
) -> Ensemble:
    """Attacks with AutoAttack's ensemble: an image is robust only if every attack fails.

    In this order, each on the images that withstood those before: ``apgd-ce``, APGD on the
    softmax loss; ``apgd-t``, APGD on the targeted DLR for each target; ``fab-t``, FAB for each
    target; ``square``. The defaults are those of the standard version. A
    :class:`~jaxrobust.attacks.Randomised` classifier gets the version for such: ``apgd-ce`` and
    ``apgd-dlr`` through expectations. Every success is confirmed on the attacked image.

    Differences from the authors' code: Square draws places for each image instead of for each
    batch, and in L2 passes on the mass of each channel as its paper does
    (:func:`~jaxrobust.attacks.square_attack`); the gradient of the softmax loss keeps its digits
    where the network is confident; a gradient that is not finite counts as 0.

    The warnings are AutoAttack's: ``probabilities``, where outputs look like probabilities instead
    of logits; ``random``, where five passes over the first batch differ;
    ``zero_gradients``, where the loss of APGD has none at an image that withstands it;
    ``black_box``, where Square, which uses no gradients, takes more than 0.2 points of accuracy
    from what those with gradients left; ``few_classes``, where ``apgd-t``, which needs 4 classes
    (``apgd-dlr`` 3), is left out.

    Args:
      logits_fn: images [B, H, W, channels] -> logits [B, C], or a Randomised classifier.
      images: [N, H, W, channels], uint8 or floats in [0, 1].
      labels: [N] integers; images with labels outside [0, C) are left out.
      key: a PRNG key; image i's draws come from ``fold_in(key, indices[i])``.
      norm: "linf" or "l2".
      epsilon: radius of the ball, in pixel values of [0, 1], >= 0.
      num_steps: of APGD and FAB, for each target, >= 1.
      num_targets: the classes with the largest logits, the label excepted, >= 1; all of them if
        there are fewer.
      num_queries: of Square, >= 1.
      batch_size: images at a time, >= 1.
      indices: [N] integers that name the images; their positions if none are given.

    Raises:
      InputError: (a ValueError) if something does not fit, no label is in [0, C), or logits are not
        finite; it says of how many images.

    Source: Croce and Hein, Reliable Evaluation of Adversarial Robustness with an Ensemble of
    Diverse Parameter-free Attacks (2020), https://arxiv.org/abs/2003.01690;
    https://github.com/fra31/auto-attack.
    """
    for name, value in (("num_steps", num_steps), ("num_targets", num_targets),
                        ("num_queries", num_queries), ("batch_size", batch_size)):
        _validate.integer(name, value, 1)
    images, labels = np.asarray(images), np.asarray(_validate.class_numbers("labels", labels))
    _validate.images("images", images)
    size = _validate.shapes(images=(images, "N ..."), labels=(labels, "N"))["N"]
    indices = np.arange(size) if indices is None else np.asarray(indices)
    _validate.shapes(labels=(labels, "N"), indices=(indices, "N"))
    batch_size = min(batch_size, size)

    def batches(rows: np.ndarray) -> Iterator[tuple[np.ndarray, Problem]]:
        """The rows and their problem, which is padded to the size of a batch."""
        for first in range(0, len(rows), batch_size):
            mine = rows[first:first + batch_size]
            padded = np.resize(mine, batch_size)
            yield mine, common.prepare(
                images[padded], np.where(np.arange(batch_size) < len(mine), labels[padded], -1),
                key, norm=norm, epsilon=epsilon, indices=indices[padded])

    judge = as_program(lambda problem, images: (
        common.evaluate(logits_fn, OBJECTIVES["cross_entropy"], problem, images, problem.keys),
        common.classify(logits_fn, problem, images, problem.keys)))

    def judged(
        rows: np.ndarray, problem: Problem, images: jax.Array
    ) -> tuple[np.ndarray, np.ndarray]:
        """Whether rows of a batch are misclassified, and their logits."""
        evaluated, logits = (jax.tree.map(lambda leaf: np.asarray(leaf)[:len(rows)], part)
                             for part in judge(problem, images))
        _validate.finite_logits(evaluated.finite, indices=rows)
        return evaluated.wrong, logits

    clean = [judged(rows, problem, problem.images) for rows, problem in batches(np.arange(size))]
    wrong, logits = (np.concatenate(parts) for parts in zip(*clean, strict=True))
    num_classes = logits.shape[1]
    counts = (labels >= 0) & (labels < num_classes)
    if not counts.any():
        raise _validate.InputError(f"Expected labels in [0, {num_classes}), got none.")
    result = Ensemble(
        np.array(to_float(images), np.float32), counts & ~wrong,
        np.where(counts & wrong, "clean", "").astype(object), {}, {})
    result.accuracy["clean"] = float(result.robust.sum() / counts.sum())

    random = isinstance(logits_fn, Randomised)
    _warn_of_outputs(result, logits[counts])
    if not random:
        rows, problem = next(batches(np.arange(size)))
        _warn_of_randomness(result, [judged(rows, problem, problem.images)[1][counts[rows]]
                                     for _ in range(_PASSES)])
    order = np.argsort(np.where(np.arange(num_classes) == labels[:, None], np.inf, -logits), axis=1)
    attacks = _attacks(logits_fn, norm, num_classes, num_steps, num_queries, result)
    zero_gradients = 0
    for number, (name, attack, targeted) in enumerate(attacks):
        for rank in range(min(num_targets, num_classes - 1) if targeted else 1):
            for rows, problem in batches(np.flatnonzero(result.robust)):
                own = common.with_salt(problem, number * num_classes + rank)
                own = aimed(own, jnp.asarray(np.resize(order[rows, rank], batch_size), jnp.int32))
                attacked, finite, zero = attack(own)
                _validate.finite_logits(np.asarray(finite)[:len(rows)], indices=rows)
                zero_gradients += int(np.asarray(zero)[:len(rows)].sum())
                broken, _ = judged(rows, problem, attacked)
                result.images[rows[broken]] = np.asarray(attacked)[:len(rows)][broken]
                result.robust[rows[broken]] = False
                result.broken_by[rows[broken]] = name
        result.accuracy[name] = float(result.robust.sum() / counts.sum())
    _warn_of_gradients(result, zero_gradients)
    return result._replace(
        broken_by=result.broken_by.astype(str), zero_gradients=zero_gradients)


class _Attack(NamedTuple):
    """An attack of the ensemble."""

    name: str
    attack: Callable[[Problem], tuple[jax.Array, jax.Array, jax.Array]]
    """``problem -> (images, finite [B], whether gradients are zero [B])``."""
    targeted: bool = False


def _attacks(
    logits_fn: Classifier, norm: str, num_classes: int, num_steps: int, num_queries: int,
    result: Ensemble
) -> list[_Attack]:
    def by_apgd(loss: str) -> Callable[[Problem], tuple[jax.Array, jax.Array, jax.Array]]:
        run = make_apgd(logits_fn, norm, loss, num_steps, until_wrong=True)

        def attack(problem: Problem) -> tuple[jax.Array, jax.Array, jax.Array]:
            ended = run(problem, common.nothing_found(problem))
            # Only where the attack failed: that is where they may be the reason.
            zero = common.size_of("linf", ended.best.gradient) == 0
            return ended.found.images, ended.found.finite, zero & ~ended.found.wrong

        return attack

    def by_fab(problem: Problem) -> tuple[jax.Array, jax.Array, jax.Array]:
        nearest = run_fab(problem, Nearest(problem.images, jnp.full(
            len(problem.images), jnp.inf, jnp.float32), jnp.ones(len(problem.images), bool)))
        inside = nearest.distance <= problem.epsilon
        return (common.choose(inside, nearest.images, problem.images), nearest.finite,
                jnp.zeros_like(inside))

    def by_square(problem: Problem) -> tuple[jax.Array, jax.Array, jax.Array]:
        found = run_square(problem, common.nothing_found(problem))
        return found.images, found.finite, jnp.zeros_like(found.wrong)

    attacks = [_Attack("apgd-ce", by_apgd("cross_entropy"))]
    random = isinstance(logits_fn, Randomised)
    name, loss, least = (("apgd-dlr", "dlr", 3) if random else ("apgd-t", "targeted_dlr", 4))
    if num_classes < least:
        result.warnings["few_classes"] = (
            f"{name} is left out: its loss needs {least} classes, the network has {num_classes}.")
    else:
        attacks.append(_Attack(name, by_apgd(loss), targeted=not random))
    if not random:
        run_fab = make_fab(logits_fn, norm, num_steps)
        run_square = make_square(logits_fn, norm, num_queries)
        attacks += [_Attack("fab-t", by_fab, targeted=True), _Attack("square", by_square)]
    return attacks


def _warn_of_outputs(result: Ensemble, logits: np.ndarray) -> None:
    if (logits.min() > -_PROBABLE and logits.max() < 1 + _PROBABLE
            and (np.abs(logits.sum(axis=1) - 1) < _PROBABLE).all()):
        result.warnings["probabilities"] = (
            "The outputs are in [0, 1] and sum to 1: they seem to be probabilities. Attacks need "
            "logits.")


def _warn_of_randomness(result: Ensemble, passes: Sequence[np.ndarray]) -> None:
    directions = np.stack([logits / (np.linalg.norm(logits, axis=1, keepdims=True) + 1e-10)
                           for logits in passes])
    spread = np.linalg.norm(directions[:, None] - directions[None], axis=-1)
    if spread.size and spread.max() > _SAME:
        result.warnings["random"] = (
            f"{len(passes)} passes over the same images differ: the network seems to be random. "
            "Attack it as a Randomised classifier.")


def _warn_of_gradients(result: Ensemble, zero_gradients: int) -> None:
    if zero_gradients:
        result.warnings["zero_gradients"] = zero_gradients_text(zero_gradients)
    before = min(value for name, value in result.accuracy.items() if name != "square")
    after = result.accuracy.get("square")
    if after is not None and before - after > _GAIN:
        result.warnings["black_box"] = (
            f"Square, which uses no gradients, lowers the accuracy from {before:.2%} to "
            f"{after:.2%}: the gradients may be masked.")


def zero_gradients_text(number: int) -> str:
    """The warning of :attr:`Ensemble.zero_gradients`."""
    return (f"Gradients are zero in {number} runs of APGD that failed: attacks by gradients may "
            "not say how robust the network is.")


class MaskingCheck(NamedTuple):
    """Two attacks, of which the stronger one should leave no more images than the weaker."""

    name: str  # of what makes it stronger: "iterations", "steps", "restarts" or "radius"
    weaker: float  # accuracy under the weaker attack
    stronger: float  # accuracy under the stronger attack
    helped_defender: bool  # whether more images survive the stronger attack


def masking_checks(
    logits_fn: Classifier,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    *,
    norm: str,
    epsilon: float,
    num_steps: int = 20,
    num_restarts: int = 1,
    indices: jax.Array | None = None,
) -> tuple[MaskingCheck, ...]:
    """Checks whether more of an attack ever helps the defender, a sign of masked gradients.

    PGD is compared with FGSM (``iterations``; for deterministic classifiers), and with itself at
    5 times the ``steps``, 5 times the ``restarts`` and twice the ``radius``. A check that does not
    help the defender proves nothing: masked gradients can pass them all.

    Args:
      logits_fn: as for :func:`pgd`, and so are all other arguments.

    Returns:
      The checks; accuracies are shares of the images with labels in [0, C).

    Raises:
      InputError: (a ValueError) as for :func:`pgd`, or if no label is in [0, C).

    Source: Athalye et al., Obfuscated Gradients Give a False Sense of Security (2018), Section 3.1,
    https://arxiv.org/abs/1802.00420.
    """
    problem = common.prepare(images, labels, key, norm=norm, epsilon=epsilon, indices=indices)
    judge = as_program(lambda problem, images: (
        common.evaluate(logits_fn, OBJECTIVES["cross_entropy"], problem, images, problem.keys),
        common.classify(logits_fn, problem, images, problem.keys).shape[1]))

    def accuracy(attacked: jax.Array) -> float:
        evaluated, num_classes = judge(problem, attacked)
        counts = np.asarray((problem.labels >= 0) & (problem.labels < num_classes))
        if not counts.any():
            raise _validate.InputError(f"Expected labels in [0, {num_classes}), got none.")
        return float((counts & ~np.asarray(evaluated.wrong)).sum() / counts.sum())

    def under_pgd(
        *, epsilon: float = epsilon, num_steps: int = num_steps, num_restarts: int = num_restarts
    ) -> float:
        return accuracy(pgd(logits_fn, images, labels, key, norm=norm, epsilon=epsilon,
                            num_steps=num_steps, num_restarts=num_restarts, indices=indices))

    base = under_pgd()
    pairs = [] if isinstance(logits_fn, Randomised) else [("iterations", accuracy(
        fgsm(logits_fn, images, labels, norm=norm, epsilon=epsilon)), base)]
    pairs += [("steps", base, under_pgd(num_steps=5 * num_steps)),
              ("restarts", base, under_pgd(num_restarts=5 * num_restarts)),
              ("radius", base, under_pgd(epsilon=2 * epsilon))]
    return tuple(MaskingCheck(*pair, helped_defender=pair[2] > pair[1]) for pair in pairs)
