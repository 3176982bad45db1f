"""Adversarial training: losses on the worst images that a few steps of PGD find near clean ones.

Attacks see the network in training mode, as the losses do, and leave no trace in its running
statistics: batch norm normalises each step's images by their own batch statistics, as in Rice et
al., Overfitting in Adversarially Robust Deep Learning (2020), https://arxiv.org/abs/2002.11569,
where others attack in evaluation mode, with running statistics that lag behind in short trainings.
Attacked images are constants: no gradient flows through an attack.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrobust import _validate
from jaxrobust.attacks import common
from jaxrobust.attacks.common import Problem
from jaxrobust.attacks.gradient import ascend, uniform_start
from jaxrobust.attacks.objectives import OBJECTIVES
from jaxrobust.centroids import CentroidState, counted
from jaxrobust.images import Batch, LogitsFn
from jaxrobust.methods.common import (
    BatchStats,
    Evaluated,
    Forward,
    Head,
    Objective,
    Parts,
    Passes,
    accuracy,
    positions,
    scaled,
    track,
)
from jaxrobust.methods.consistency import consistency_loss, divergence
from jaxrobust.methods.options import AttackOptions

_STARTING_NOISE = 1e-3  # Standard deviation at which TRADES starts, where its gradient is 0.


def _frozen(forward: Forward, batch_stats: BatchStats, images: jax.Array) -> LogitsFn:
    """``images -> logits`` with parameters that are constants.

    Otherwise their derivatives would be traced through every step of an attack, and dropped.
    """
    logits_of, closed_over = jax.closure_convert(
        lambda images: forward(batch_stats, images)[0].logits, images)
    closed_over = jax.lax.stop_gradient(closed_over)
    return lambda images: logits_of(images, *closed_over)


def _attacked(
    forward: Forward, batch_stats: BatchStats, batch: Batch, key: jax.Array, axis_name: str | None,
    options: AttackOptions, objective: common.Objective, start: Callable[[Problem], jax.Array]
) -> jax.Array:
    """The images after the last step, of the dtype of the clean ones."""
    problem = common.prepare(
        jax.lax.stop_gradient(batch.clean), batch.labels, key, norm=options.norm,
        epsilon=options.epsilon, indices=positions(len(batch.labels), axis_name))
    step_size = (2.5 * problem.epsilon / options.num_steps if options.step_size is None
                 else jnp.asarray(options.step_size, jnp.float32))
    attacked = ascend(_frozen(forward, batch_stats, problem.images), objective, problem,
                      start(problem), norm=options.norm, step_size=step_size,
                      num_steps=options.num_steps)
    return jax.lax.stop_gradient(attacked).astype(batch.clean.dtype)


def make_pgd(parts: Parts) -> tuple[Objective, Passes]:
    r"""The softmax loss on attacked images.

    .. math:: \frac{1}{B} \sum_x l(x', y), \qquad
      x' \approx \arg\max_{\|x' - x\| \le \epsilon} l(x', y)

    with x' the last of the iterates of :func:`~jaxrobust.attacks.pgd` from a random start in the
    ball.

    Source: Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks (2018),
    https://arxiv.org/abs/1706.06083.
    """
    options = parts.options.pgd

    def objective(
        forward: Forward, head: Head, batch_stats: BatchStats, centroids: CentroidState,
        batch: Batch, *, weight: jax.Array | float, key: jax.Array, axis_name: str | None
    ) -> tuple[jax.Array, Evaluated]:
        del head, weight
        images = _attacked(forward, batch_stats, batch, key, axis_name, options,
                           OBJECTIVES["cross_entropy"],
                           lambda problem: uniform_start(options.norm, problem))
        outputs, batch_stats = forward(batch_stats, images)
        loss = parts.softmax(outputs.logits, batch.labels, axis_name=axis_name)
        metrics = {"softmax": loss,
                   "accuracy_attacked": accuracy(outputs.logits, batch.labels, axis_name)}
        centroids = track(centroids, outputs.features, batch.labels, axis_name)
        return loss, Evaluated(batch_stats, centroids, metrics)

    return objective, Passes(options.num_steps + 1, options.num_steps, 1)


def make_trades(parts: Parts) -> tuple[Objective, Passes]:
    r"""The softmax loss on clean images, plus the divergence from predictions for attacked ones.

    .. math:: \frac{1}{B} \sum_x l(x, y) + \beta KL(p(x) \| p(x')), \qquad
      x' \approx \arg\max_{\|x' - x\| \le \epsilon} KL(p(x) \| p(x'))

    Attacks start at Gaussian noise of standard deviation 0.001 about the image, since the
    divergence has no gradient at the image itself.

    Source: Zhang et al., Theoretically Principled Trade-off between Robustness and Accuracy (2019),
    Eq. 5 and Algorithm 1, https://arxiv.org/abs/1901.08573.
    """
    options = parts.options.trades

    def start(problem: Problem) -> jax.Array:
        noise = jax.vmap(lambda key: jax.random.normal(key, problem.images.shape[1:], jnp.float32))(
            common.start_keys(problem))
        return common.project(options.norm, problem.images,
                              problem.images + _STARTING_NOISE * noise, problem.epsilon)

    def objective(
        forward: Forward, head: Head, batch_stats: BatchStats, centroids: CentroidState,
        batch: Batch, *, weight: jax.Array | float, key: jax.Array, axis_name: str | None
    ) -> tuple[jax.Array, Evaluated]:
        del head
        clean, batch_stats = forward(batch_stats, batch.clean)
        # Attacks see the logits in float32 too.
        fixed = jax.lax.stop_gradient(_validate.floats("logits", clean.logits))

        def apart(logits: jax.Array, problem: Problem) -> jax.Array:
            counts = counted(problem.labels, logits.shape[1])
            return divergence(*(jnp.where(counts[:, None], z, 0) for z in (fixed, logits)))

        images = _attacked(forward, batch_stats, batch, key, axis_name, options, apart, start)
        attacked, batch_stats = forward(batch_stats, images)
        loss = parts.softmax(clean.logits, batch.labels, axis_name=axis_name)
        added = consistency_loss(clean.logits, attacked.logits, batch.labels, axis_name=axis_name)
        metrics = {"softmax": loss,
                   "accuracy_clean": accuracy(clean.logits, batch.labels, axis_name),
                   "accuracy_attacked": accuracy(attacked.logits, batch.labels, axis_name),
                   "divergence": added}
        centroids = track(centroids, clean.features, batch.labels, axis_name)
        return (loss + scaled(weight, scaled(options.weight, added)),
                Evaluated(batch_stats, centroids, metrics))

    return objective, Passes(options.num_steps + 2, options.num_steps, 2)
