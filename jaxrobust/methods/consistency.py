"""Consistency: predictions for an image and its noisy versions that agree."""

import jax
import jax.numpy as jnp

from jaxrobust import _validate
from jaxrobust.centroids import CentroidState, counted
from jaxrobust.images import Batch, Outputs
from jaxrobust.losses import mean_over_batch
from jaxrobust.methods.common import (
    PASSES_OF_TWO_VIEWS,
    Added,
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
    two_views,
)


def divergence(logits: jax.Array, others: jax.Array) -> jax.Array:
    r"""Computes the Kullback-Leibler divergence of predictions from others.

    .. math:: KL(p \| p') = \sum_c p_c (\log p_c - \log p'_c), \qquad
      p = \sigma(z), \; p' = \sigma(z')

    Args:
      logits: z, [..., C], floats.
      others: z', likewise.

    Returns:
      [...], in nats; both predictions receive gradients.
    """
    own, other = jax.nn.log_softmax(logits), jax.nn.log_softmax(others)
    return jnp.sum(jnp.exp(own) * (own - other), axis=-1)


def consistency_loss(
    logits: jax.Array, noisy_logits: jax.Array, labels: jax.Array, *, axis_name: str | None = None
) -> jax.Array:
    r"""Averages the divergence of predictions for clean images from those for noisy ones.

    .. math:: L_{KL} = \frac{1}{B} \sum_x KL(p(x) \| p(x + \varepsilon))

    Args:
      logits: [B, C], of clean images.
      noisy_logits: [B, C], of noisy versions of them.
      labels: [B], which say only what examples count.
      axis_name: see :mod:`jaxrobust.losses`.

    Returns:
      The loss, [].

    Raises:
      InputError: (a ValueError) if shapes do not match or a dtype is wrong.

    Source: Tsiligkaridis and Tsiligkaridis, Diverse Gaussian Noise Consistency Regularization for
    Robustness and Uncertainty Calibration (2021), https://arxiv.org/abs/2104.01231, for Gaussian
    noise whose standard deviation is drawn for each image; with a fixed one it is the term that
    TRADES adds, with noise in the place of an attack.
    """
    logits, noisy_logits = (_validate.floats("logits", logits),
                            _validate.floats("noisy_logits", noisy_logits))
    labels = _validate.class_numbers("labels", labels)
    num_classes = _validate.shapes(logits=(logits, "B C"), noisy_logits=(noisy_logits, "B C"),
                                   labels=(labels, "B"))["C"]
    counts = counted(labels, num_classes)
    logits, noisy_logits = (jnp.where(counts[:, None], z, 0) for z in (logits, noisy_logits))
    return mean_over_batch(divergence(logits, noisy_logits), axis_name, counts=counts)


def noisy_consistency_losses(
    logits: jax.Array, labels: jax.Array, *, axis_name: str | None = None
) -> tuple[jax.Array, jax.Array]:
    r"""Computes how far predictions under noise are from their mean, and the mean's entropy.

    .. math:: \frac{1}{B} \sum_x \frac{1}{m} \sum_i KL(\hat p(x) \| p(x + \varepsilon_i)), \qquad
      \frac{1}{B} \sum_x H(\hat p(x)), \qquad
      \hat p(x) = \frac{1}{m} \sum_i p(x + \varepsilon_i)

    Args:
      logits: [m, B, C], of m noisy versions of each image.
      labels: [B], which say only what examples count.
      axis_name: see :mod:`jaxrobust.losses`.

    Returns:
      Divergence and entropy, each [], in nats.

    Raises:
      InputError: (a ValueError) if shapes do not match or a dtype is wrong.

    Source: Jeong and Shin, Consistency Regularization for Certified Robustness of Smoothed
    Classifiers (2020), https://arxiv.org/abs/2006.04062. The entropy is that of the mean
    prediction, as in the paper's equation; the authors say that the default of their release
    differs from it.
    """
    logits = _validate.floats("logits", logits)
    labels = _validate.class_numbers("labels", labels)
    num_classes = _validate.shapes(logits=(logits, "m B C"), labels=(labels, "B"))["C"]
    counts = counted(labels, num_classes)
    logs = jax.nn.log_softmax(jnp.where(counts[None, :, None], logits, 0))
    # The logarithm of the mean of probabilities, without one that underflows.
    number = jnp.asarray(logs.shape[0], logs.dtype)
    mean_log = jax.nn.logsumexp(logs, axis=0) - jnp.log(number)
    mean = jnp.exp(mean_log)
    apart = jnp.sum(mean[None] * (mean_log[None] - logs), axis=2)
    return (mean_over_batch(jnp.mean(apart, axis=0), axis_name, counts=counts),
            mean_over_batch(-jnp.sum(mean * mean_log, axis=1), axis_name, counts=counts))


def make_consistency(parts: Parts) -> tuple[Objective, Passes]:
    """The softmax loss on clean images, plus the divergence from predictions for noisy ones."""
    def add(
        clean: Outputs, noisy: Outputs, labels: jax.Array, head: Head, centroids: CentroidState,
        axis_name: str | None
    ) -> Added:
        del head
        loss = consistency_loss(clean.logits, noisy.logits, labels, axis_name=axis_name)
        return (scaled(parts.options.consistency.weight, loss),
                track(centroids, clean.features, labels, axis_name), {"consistency": loss})

    return two_views(parts.softmax, add, one_pass=parts.one_pass), PASSES_OF_TWO_VIEWS


def make_noisy_consistency(parts: Parts) -> tuple[Objective, Passes]:
    """The mean softmax loss over several noisy versions, plus their divergence from the mean
    prediction and its entropy; all versions in one pass."""
    options, perturb = parts.options.noisy_consistency, parts.perturb
    if perturb is None:
        raise _validate.InputError(
            "Expected a perturb for the method 'noisy_consistency', which draws noise itself, got "
            "None.")
    number = options.num_versions

    def objective(
        forward: Forward, head: Head, batch_stats: BatchStats, centroids: CentroidState,
        batch: Batch, *, weight: jax.Array | float, key: jax.Array, axis_name: str | None
    ) -> tuple[jax.Array, Evaluated]:
        del head
        where = positions(len(batch.labels), axis_name)

        def drawn(number: int) -> jax.Array:
            own = jax.random.fold_in(key, number)
            return jax.vmap(lambda position, image: perturb(
                jax.random.fold_in(own, position), image[None])[0])(where, batch.clean)

        versions = jnp.concatenate([batch.noisy, *(drawn(i) for i in range(1, number))])
        outputs, batch_stats = forward(batch_stats, versions)
        logits = outputs.logits.reshape(number, len(batch.labels), -1)
        loss = jnp.mean(jnp.stack([
            parts.softmax(one, batch.labels, axis_name=axis_name) for one in logits]))
        apart, entropy = noisy_consistency_losses(logits, batch.labels, axis_name=axis_name)
        added = scaled(options.weight, apart) + scaled(options.entropy_weight, entropy)
        centroids = track(
            centroids, outputs.features[:len(batch.labels)], batch.labels, axis_name)
        metrics = {"softmax": loss,
                   "accuracy_noisy": accuracy(logits[0], batch.labels, axis_name),
                   "consistency": apart, "entropy": entropy}
        return loss + scaled(weight, added), Evaluated(batch_stats, centroids, metrics)

    return objective, Passes(number, 0, number)
