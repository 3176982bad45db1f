r"""Recomputation of batch normalisation's statistics for evaluation from training images.

The running averages that training keeps come from earlier networks: with a momentum of 0.99 they
lag some hundred updates behind, and in a short training they still hold part of their initial
values. Here the parameters are fixed, training batches go through the network in training mode, and
a layer's statistics are those of all its inputs together. With the mean
:math:`\mu_i` and the biased variance :math:`\sigma_i^2` of pass :math:`i` of :math:`n`, by the law
of total variance,

.. math:: \mu = \frac1n \sum_i \mu_i, \qquad
          \sigma^2 = \frac1n \sum_i \sigma_i^2 + \frac1n \sum_i (\mu_i - \mu)^2.

Source: Wu & Johnson (2021), `Rethinking "Batch" in BatchNorm
<https://arxiv.org/abs/2105.07576>`_, Section 3.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from jaxrobust import _validate
from jaxrobust.centroids import init_centroids
from jaxrobust.images import Outputs
from jaxrobust.methods import METHOD_KEY, Batch, BatchStats, Method
from jaxrobust.methods.common import in_turn
from jaxrobust.models.common import head_parameters, over_axis


class PassStatistics(NamedTuple):
    """Statistics of the passes through a network so far; trees like its ``batch_stats``."""

    passes: jax.Array  # shape=[], dtype=float32 or wider
    average: BatchStats  # over the passes, of every layer's batch mean and batch variance
    spread: BatchStats  # sum over the passes of the squared deviations from that average


def init_pass_statistics(batch_stats: BatchStats) -> PassStatistics:
    """Makes the statistics of no pass.

    Args:
      batch_stats: a network's, for their structure: a ``mean`` and a ``var`` of each layer.

    Raises:
      InputError: (a ValueError) if there is anything else among them.
    """
    _means_of_variances(batch_stats)
    # Two trees of zeros, since a compiled step may overwrite what it is given.
    average, spread = (jax.tree.map(jnp.zeros_like, batch_stats) for _ in range(2))
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(batch_stats))
    return PassStatistics(jnp.zeros((), dtype), average, spread)


def add_pass(statistics: PassStatistics, batch_stats: BatchStats) -> PassStatistics:
    """Adds the mean and the biased variance of a pass's own inputs, by Welford's update."""
    passes = statistics.passes + 1
    average = jax.tree.map(
        lambda old, new: old + (new - old) / passes, statistics.average, batch_stats)
    spread = jax.tree.map(
        lambda total, new, old, mean: total + (new - old) * (new - mean),
        statistics.spread, batch_stats, statistics.average, average)
    return PassStatistics(passes, average, spread)


def combine_passes(statistics: PassStatistics) -> BatchStats:
    """Combines at least one pass: the mean and the biased variance of all their inputs.

    The passes have equal weight, as if all had the same number of inputs.
    """
    average = traverse_util.flatten_dict(statistics.average)
    spread = traverse_util.flatten_dict(statistics.spread)
    return traverse_util.unflatten_dict(average | {
        variance: average[variance] + spread[mean] / statistics.passes
        for variance, mean in _means_of_variances(statistics.average).items()})


def _means_of_variances(batch_stats: BatchStats) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Maps the path of each variance among batch statistics to that of its mean."""
    paths = set(traverse_util.flatten_dict(batch_stats))
    found = {path: (*path[:-1], "mean") for path in paths if path[-1] == "var"}
    if paths != {*found, *found.values()}:
        raise _validate.InputError(
            "Expected batch_stats of a mean and a var for each layer, got "
            f"{', '.join(sorted('.'.join(path) for path in paths))}.")
    return found


def make_pass_step(
    model: nn.Module, method: Method, *, axis_name: str | None = None,
    sync_batch_norm: bool = True, head: str = "head",
) -> Callable[[PassStatistics, Any, Batch, jax.Array], PassStatistics]:
    """Makes the pass over a training batch, ``(statistics, params, batch, key) -> statistics``.

    The key, one for each batch, is for the method and for dropout, which is in training mode too.

    Each forward pass that the method makes in training is one pass here: one of ``normal`` on clean
    and of ``noisy`` on noisy images, one of ``both`` on the two together, two of ``robust`` on one
    after the other. The statistics of a method with two passes are thus those of clean and noisy
    images together.

    Args:
      model: a Flax Linen module that returns :class:`~jaxrobust.models.Outputs`, whose batch
        normalisation is :class:`flax.linen.BatchNorm`.
      method: the method whose passes are made.
      axis_name, head: as for :func:`~jaxrobust.training.make_train_step`.
      sync_batch_norm: likewise; if False, each device normalises its share on its own, and a pass's
        statistics are those of all shares together.
    """
    model, synchronised = over_axis(model, axis_name, sync_batch_norm)

    def step(
        statistics: PassStatistics, params: Any, batch: Batch, key: jax.Array
    ) -> PassStatistics:
        method_key = jax.random.fold_in(key, METHOD_KEY)
        if axis_name is not None:  # Each device has other images.
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        passes = itertools.count()
        zeros = jax.tree.map(jnp.zeros_like, statistics.average)

        def forward(
            statistics: PassStatistics, images: jax.Array
        ) -> tuple[Outputs, PassStatistics]:
            with nn.intercept_methods(_keep_own_statistics):
                outputs, updated = model.apply(
                    {"params": params, "batch_stats": zeros}, images, train=True,
                    mutable=["batch_stats"],
                    rngs={"dropout": jax.random.fold_in(key, next(passes))})
            own = updated.get("batch_stats", {})
            if own and axis_name is not None and not synchronised:
                own = _of_all_shares(own, axis_name)
            return outputs, add_pass(statistics, own)

        kernel, bias = head_parameters(params, head)
        centroids = init_centroids(kernel.shape[1], kernel.shape[0])
        # The losses are not used, and thus not computed.
        _, evaluated = method.objective(
            in_turn(forward), (kernel, bias), statistics, centroids, batch, weight=1.0,
            key=method_key, axis_name=axis_name)
        return evaluated.batch_stats

    return step


def _keep_own_statistics(
    call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any],
    context: nn.module.InterceptorContext
) -> Any:
    """Makes batch norm's new statistics, which start from 0, those of its inputs alone."""
    outputs = call(*args, **kwargs)
    layer = context.module
    if isinstance(layer, nn.BatchNorm) and context.method_name == "__call__":
        for name in ("mean", "var"):
            # What it wrote is momentum * 0 + (1 - momentum) * its inputs'.
            layer.put_variable("batch_stats", name, layer.get_variable("batch_stats", name)
                               / (1 - layer.momentum))
    return outputs


def _of_all_shares(batch_stats: BatchStats, axis_name: str) -> BatchStats:
    """Combines the statistics of equal shares of a batch, from each device's own."""
    shares = jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, axis_name), batch_stats)
    average = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), shares)
    spread = jax.tree.map(
        lambda leaf, mean: jnp.sum(jnp.square(leaf - mean[None]), axis=0), shares, average)
    count = jnp.asarray(jax.lax.axis_size(axis_name), jax.tree.leaves(average)[0].dtype)
    return combine_passes(PassStatistics(count, average, spread))
