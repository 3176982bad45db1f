"""Scores of how doubtful a prediction is, and how well a score tells wrong predictions from right.

A larger score is a more doubtful prediction, for all of them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import sklearn.covariance
import sklearn.metrics

from jaxrobust import _validate


def improbability(logits: jax.Array) -> jax.Array:
    r"""One less the largest softmax probability, without cancellation.

    .. math:: 1 - \max_i p_i = \sum_{i \ne k} p_i, \quad k = \arg\max_i z_i

    so that a confident prediction has its own small number, where 1 - p would round to 0.

    Args:
      logits: z [B, C].

    Returns:
      [B], in [0, 1 - 1/C].

    Source: Hendrycks and Gimpel, *A Baseline for Detecting Misclassified and Out-of-Distribution
    Examples in Neural Networks*, 2017.
    """
    _validate.shapes(logits=(logits, "B C"))
    largest = jax.nn.one_hot(jnp.argmax(logits, axis=1), logits.shape[1], dtype=bool)
    others = jax.nn.logsumexp(logits, axis=1, where=~largest)
    return jnp.exp(others - jax.nn.logsumexp(logits, axis=1))


def energy(logits: jax.Array) -> jax.Array:
    r"""The free energy of the logits at temperature 1.

    .. math:: E = -\log \sum_i \exp z_i

    Args:
      logits: z [B, C].

    Returns:
      [B].

    Source: Liu et al., *Energy-based Out-of-distribution Detection*, 2020, Eq. 4.
    """
    _validate.shapes(logits=(logits, "B C"))
    return -jax.nn.logsumexp(logits, axis=1)


class ClassStatistics(NamedTuple):
    """Where the features of each class lie, and how they spread."""

    mean: np.ndarray  # shape=[C, d], dtype=float32
    scale: np.ndarray  # shape=[C], dtype=float32; root mean square distance from the mean
    precision: np.ndarray  # shape=[d, d], dtype=float32; inverse of the covariance shared by all


def class_statistics(features: np.ndarray, labels: np.ndarray, num_classes: int) -> ClassStatistics:
    r"""Measures :class:`ClassStatistics` of features.

    .. math:: m_c = mean_{y_n = c} q_n, \quad s_c^2 = mean_{y_n = c} \|q_n - m_c\|^2, \quad
        \Sigma = (1 - \rho) mean_n (q_n - m_{y_n}) (q_n - m_{y_n})^T + \rho \mu I

    with Ledoit and Wolf's shrinkage :math:`\rho` towards the mean variance :math:`\mu`, without
    which the covariance of fewer images than dimensions has no inverse. Computed in float64. A
    class whose features are all the same, as that of one image, has the scale of all classes.

    Args:
      features: q [N, d].
      labels: [N] integers in [0, C).
      num_classes: C.

    Raises:
      InputError: (a ValueError) if shapes do not match, a feature is not finite, or a class has no
        example.
    """
    features = np.asarray(features, np.float64)
    _validate.shapes(features=(features, "N d"), labels=(labels, "N"))
    _validate.labels("labels", labels, num_classes)
    _validate.finite("features", features)
    counts = np.bincount(labels, minlength=num_classes)
    if not counts.all():
        raise _validate.InputError(
            f"Expected examples of every class, got none of class {np.argmin(counts)}.")
    mean = np.stack([features[labels == label].mean(axis=0) for label in range(num_classes)])
    centred = features - mean[labels]
    squares = np.square(centred).sum(axis=1)
    scale = np.sqrt(np.bincount(labels, squares, num_classes) / counts)
    scale = np.where(scale > 0, scale, np.sqrt(squares.mean()) or 1.0)
    covariance, _ = sklearn.covariance.ledoit_wolf(centred, assume_centered=True)
    # All of it is 0 where every class is a point.
    precision = np.linalg.pinv(covariance, hermitian=True)
    return ClassStatistics(*(np.float32(part) for part in (mean, scale, precision)))


def scaled_distance(
    features: jax.Array, classes: jax.Array, statistics: ClassStatistics
) -> jax.Array:
    r"""The distance of features to the centroid of a class, over that class's typical one.

    .. math:: \|q - m_c\| / s_c

    Args:
      features: q [B, d].
      classes: c [B] integers in [0, C), such as the predicted ones.
      statistics: of the classes.

    Returns:
      [B].
    """
    _validate.shapes(features=(features, "B d"), classes=(classes, "B"))
    distance = jnp.linalg.norm(features - jnp.asarray(statistics.mean)[classes], axis=1)
    return distance / jnp.asarray(statistics.scale)[classes]


def mahalanobis_distance(
    features: jax.Array, classes: jax.Array, statistics: ClassStatistics
) -> jax.Array:
    r"""The distance of features to the centroid of a class, in units of the shared covariance.

    .. math:: \sqrt{(q - m_c)^T \Sigma^{-1} (q - m_c)}

    Args:
      features: q [B, d].
      classes: c [B] integers in [0, C), such as the predicted ones.
      statistics: of the classes.

    Returns:
      [B].

    Source: Lee et al., *A Simple Unified Framework for Detecting Out-of-Distribution Samples and
    Adversarial Attacks*, 2018, Eq. 2, there for the nearest class.
    """
    _validate.shapes(features=(features, "B d"), classes=(classes, "B"))
    offset = features - jnp.asarray(statistics.mean)[classes]
    squared = jnp.einsum("bd,de,be->b", offset, jnp.asarray(statistics.precision), offset,
                         precision="highest")
    return jnp.sqrt(jnp.maximum(squared, 0))  # Rounding may take it below 0.


def auroc(doubt: np.ndarray, correct: np.ndarray) -> float:
    """The share of pairs of a wrong and a right prediction in which the wrong one is more doubtful.

    Pairs with the same doubt count half. It is the area under the receiver operating characteristic
    of a detector of wrong predictions: 1 is perfect, 0.5 is chance.

    Args:
      doubt: [N].
      correct: [N] bool, whether each prediction is right.

    Raises:
      InputError: (a ValueError) if shapes do not match, a score is not finite, or all predictions
        are right, or all wrong.
    """
    correct = np.asarray(correct, bool)
    _validate.shapes(doubt=(doubt, "N"), correct=(correct, "N"))
    _validate.finite("doubt", doubt)
    if correct.all() or not correct.any():
        raise _validate.InputError(
            f"Expected right and wrong predictions, got {int(correct.sum())} right of "
            f"{len(correct)}.")
    return float(sklearn.metrics.roc_auc_score(~correct, doubt))


def doubt_threshold(doubt: np.ndarray, coverage: float) -> float:
    """The smallest of these scores that at least a share ``coverage`` of them does not exceed.

    Args:
      doubt: [N].
      coverage: of the predictions that are to be accepted, in (0, 1].

    Raises:
      InputError: (a ValueError) if the coverage is out of range, there is no score, or one is not
        finite.
    """
    _validate.in_range("coverage", coverage, 0, 1, open_low=True, open_high=False)
    _validate.shapes(doubt=(doubt, "N"))
    _validate.finite("doubt", doubt)
    return float(np.quantile(doubt, coverage, method="inverted_cdf"))
