"""Calibration of probabilities, and scores of how doubtful a prediction or how strange an image is.

A larger score is a more doubtful prediction, or a stranger image, for all of them.

What is computed of logits [N, C] and labels [N] is computed on the host, in float64. Labels outside
[0, C) and logits that are not finite are an error.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust import _validate

# SciPy and scikit-learn are imported where they are used: a mere import has no need of them.

# --- Calibration -------------------------------------------------------------------------------

BINS = ("equal width", "equal mass")
"""How confidences are divided into bins."""


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray) -> float:
    r"""Computes the mean of :math:`-\log p_y`, in nats, with the probabilities p = softmax(z).

    Args:
      logits: z [N, C], C >= 2.
      labels: y [N] integers in [0, C).

    Raises:
      InputError: (a ValueError) if shapes do not match, a label is outside [0, C), or logits are
        not finite; it says of how many images.
    """
    log_probabilities, labels = _log_probabilities(logits, labels)
    return float(-log_probabilities[np.arange(len(labels)), labels].mean())


def brier_score(logits: np.ndarray, labels: np.ndarray) -> float:
    r"""Computes the mean squared distance of the probabilities from the label's one-hot vector.

    .. math:: mean_n \sum_c (p_{nc} - 1\{y_n = c\})^2

    It is in [0, 2]. Some authors divide it by C, or by 2 for two classes.

    Args:
      logits: z [N, C], C >= 2.
      labels: y [N] integers in [0, C).

    Raises:
      InputError: (a ValueError) as :func:`negative_log_likelihood`.

    Source: Brier, *Verification of Forecasts Expressed in Terms of Probability*, 1950.
    """
    import sklearn.metrics

    log_probabilities, labels = _log_probabilities(logits, labels)
    return float(sklearn.metrics.brier_score_loss(
        labels, np.exp(log_probabilities), labels=np.arange(log_probabilities.shape[1]),
        scale_by_half=False))


class Reliability(NamedTuple):
    """The data of a reliability diagram: M bins of confidence."""

    edges: np.ndarray  # shape=[M + 1], dtype=float64; bin m is (edges[m], edges[m + 1]]
    count: np.ndarray  # type: ignore[assignment]  # tuple has a method of this name.
    # shape=[M], dtype=int64; predictions
    confidence: np.ndarray  # shape=[M], dtype=float64; their mean one; NaN for an empty bin
    accuracy: np.ndarray  # shape=[M], dtype=float64; the share that is right; NaN for an empty bin


def reliability_diagram(
    logits: np.ndarray, labels: np.ndarray, *, num_bins: int = 15, bins: str = "equal width"
) -> Reliability:
    r"""Compares confidence, the largest probability, with accuracy, bin by bin.

    A confidence on an edge is in the bin below it, and on the lowest edge in the first.

    Args:
      logits: z [N, C], C >= 2.
      labels: y [N] integers in [0, C).
      num_bins: M >= 1.
      bins: "equal width", of [0, 1]; or "equal mass", between the quantiles m / M of the
        confidences, so that equal confidences are in one bin and some bins may be empty.

    Raises:
      InputError: (a ValueError) as :func:`negative_log_likelihood`, if the number is below 1, or
        the kind of bins is unknown.

    Source: Guo et al., *On Calibration of Modern Neural Networks*, 2017; Nixon et al., *Measuring
    Calibration in Deep Learning*, 2019 (equal mass).
    """
    confidence, correct = _confidence(logits, labels)
    edges = _edges(confidence, num_bins, bins)
    count, confidences, hits = _sums_by_bin(edges, confidence, correct)
    empty = np.where(count > 0, 1, np.nan)
    return Reliability(edges, count, *(sums / np.maximum(count, 1) * empty
                                       for sums in (confidences, hits)))


def expected_calibration_error(
    logits: np.ndarray, labels: np.ndarray, *, num_bins: int = 15, bins: str = "equal width"
) -> float:
    r"""Averages the difference between accuracy and confidence over the bins, by their shares.

    .. math:: ECE = \sum_m \frac{N_m}{N} |accuracy_m - confidence_m|

    Args:
      logits: z [N, C], C >= 2.
      labels: y [N] integers in [0, C).
      num_bins: as for :func:`reliability_diagram`.
      bins: as for :func:`reliability_diagram`.

    Raises:
      InputError: (a ValueError) as :func:`reliability_diagram`.

    Source: Guo et al., *On Calibration of Modern Neural Networks*, 2017, Eq. 3.
    """
    return _calibration_error(*_confidence(logits, labels), num_bins, bins)


def classwise_calibration_error(
    logits: np.ndarray, labels: np.ndarray, *, num_bins: int = 15, bins: str = "equal width"
) -> float:
    r"""Averages the calibration error of each class's probability over the classes.

    .. math:: \frac1C \sum_c \sum_m \frac{N_{mc}}{N} |share_{mc} - probability_{mc}|

    Bins are those of the probabilities :math:`p_{nc}` of class c, over all N images; the share is
    that of the images of class c among those in the bin.

    Args:
      logits: z [N, C], C >= 2.
      labels: y [N] integers in [0, C).
      num_bins: as for :func:`reliability_diagram`.
      bins: as for :func:`reliability_diagram`.

    Raises:
      InputError: (a ValueError) as :func:`reliability_diagram`.

    Source: Kull et al., *Beyond temperature scaling: Obtaining well-calibrated multiclass
    probabilities with Dirichlet calibration*, 2019, https://arxiv.org/abs/1910.12656.
    """
    log_probabilities, labels = _log_probabilities(logits, labels)
    return float(np.mean([
        _calibration_error(probability, labels == label, num_bins, bins)
        for label, probability in enumerate(np.exp(log_probabilities).T)]))


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    r"""Finds the temperature T for which z / T has the least negative log likelihood.

    .. math:: T = 1 / \beta, \qquad \frac{d}{d\beta} mean_n
        \Big(\log \sum_i e^{\beta z_{ni}} - \beta z_{n y_n}\Big) = 0

    The likelihood is convex in :math:`\beta`, so that its derivative has one root, found between
    two powers of 2 by Brent's method to about 1e-12.

    Args:
      logits: z [N, C] of held-out images, which the network was not trained on, C >= 2.
      labels: y [N] integers in [0, C).

    Returns:
      T > 0; above 1 for a network that is too confident. The class that is predicted stays.

    Raises:
      InputError: (a ValueError) as :func:`negative_log_likelihood`; or if no temperature is the
        best: T = 0 where no image is classified wrongly, infinity where the logits of the labels
        are no larger than the mean of all.

    Source: Guo et al., *On Calibration of Modern Neural Networks*, 2017, Section 4.2.
    """
    import scipy.optimize
    import scipy.special

    logits, labels = _checked(logits, labels)
    gaps = logits - np.take_along_axis(logits, labels[:, None], axis=1)
    if gaps.max() <= 0:
        raise _validate.InputError(
            "Expected logits of which some are wrong: where every label has the largest logit, a "
            "temperature is the better the nearer it is to 0.")
    if gaps.mean() >= 0:
        raise _validate.InputError(
            "Expected logits that are larger for the label than on average: where they are not, a "
            "temperature is the better the larger it is.")

    def slope(beta: float) -> float:
        return np.sum(scipy.special.softmax(beta * gaps, axis=1) * gaps, axis=1).mean()

    high = 1 / gaps.max()
    while slope(high) <= 0:
        high *= 2
    while slope(high / 2) > 0:
        high /= 2
    return float(1 / scipy.optimize.brentq(slope, high / 2, high, xtol=1e-14 * high))


def _checked(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits [N, C] in float64 and labels [N], as NumPy's."""
    logits, labels = _validate.reals("logits", logits), np.asarray(labels)
    num_classes = _validate.shapes(logits=(logits, "N C"), labels=(labels, "N"))["C"]
    _validate.in_range("number of classes", num_classes, 2)
    _validate.labels("labels", labels, num_classes)
    _validate.finite_logits(np.isfinite(logits).all(axis=1))
    return logits, labels


def _log_probabilities(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    import scipy.special

    logits, labels = _checked(logits, labels)
    return scipy.special.log_softmax(logits, axis=1), labels


def _confidence(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest probability [N], and whether its class, of equals the first, is the label."""
    log_probabilities, labels = _log_probabilities(logits, labels)
    return np.exp(log_probabilities.max(axis=1)), log_probabilities.argmax(axis=1) == labels


def _edges(probability: np.ndarray, num_bins: int, bins: str) -> np.ndarray:
    num_bins = _validate.integer("num_bins", num_bins, 1)
    _validate.one_of("bins", bins, BINS)
    edges = np.linspace(0, 1, num_bins + 1)
    return edges if bins == "equal width" else np.quantile(
        probability, edges, method="inverted_cdf")


def _sums_by_bin(
    edges: np.ndarray, probability: np.ndarray, happened: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By bin [M]: number, sum of probabilities [N], and how often it happened [N]."""
    places = np.searchsorted(edges[1:-1], probability, side="left")
    number, expected, found = (np.bincount(places, weights, len(edges) - 1)
                               for weights in (None, probability, happened))
    return number, expected, found


def _calibration_error(
    probability: np.ndarray, happened: np.ndarray, num_bins: int, bins: str
) -> float:
    _, expected, found = _sums_by_bin(_edges(probability, num_bins, bins), probability, happened)
    return float(np.abs(found - expected).sum() / len(probability))


# --- Scores of an image ------------------------------------------------------------------------


def improbability(logits: jax.Array | np.ndarray) -> jax.Array:
    r"""Computes 1 less the largest softmax probability, without cancellation.

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


def energy(logits: jax.Array | np.ndarray, temperature: float = 1.0) -> jax.Array:
    r"""Computes the free energy of the logits.

    .. math:: E = -T \log \sum_i \exp(z_i / T)

    Args:
      logits: z [B, C].
      temperature: T > 0.

    Returns:
      [B].

    Raises:
      InputError: (a ValueError) if the shape does not fit or the temperature is not above 0.

    Source: Liu et al., *Energy-based Out-of-distribution Detection*, 2020, Eq. 4.
    """
    _validate.shapes(logits=(logits, "B C"))
    _validate.in_range("temperature", temperature, 0, open_low=True)
    return -temperature * jax.nn.logsumexp(jnp.asarray(logits) / temperature, axis=1)


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
    import sklearn.covariance

    features = _validate.reals("features", features)
    num_classes = _validate.integer("num_classes", num_classes, 1)
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
    return ClassStatistics(*(part.astype(np.float32) for part in (mean, scale, precision)))


def scaled_distance(
    features: jax.Array | np.ndarray, classes: jax.Array | np.ndarray,
    statistics: ClassStatistics
) -> jax.Array:
    r"""Measures the distance of features to a class's centroid, over that class's typical one.

    .. math:: \|q - m_c\| / s_c

    Args:
      features: q [B, d].
      classes: c [B] integers in [0, C), such as the predicted ones.
      statistics: of the classes.

    Returns:
      [B].
    """
    classes = _checked_features(features, classes, statistics)
    distance = jnp.linalg.norm(features - jnp.asarray(statistics.mean)[classes], axis=1)
    return distance / jnp.asarray(statistics.scale)[classes]


def mahalanobis_distance(
    features: jax.Array | np.ndarray, classes: jax.Array | np.ndarray,
    statistics: ClassStatistics
) -> jax.Array:
    r"""Measures the distance of features to a class's centroid, in units of the shared covariance.

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
    classes = _checked_features(features, classes, statistics)
    offset = features - jnp.asarray(statistics.mean)[classes]
    squared = jnp.einsum("bd,de,be->b", offset, jnp.asarray(statistics.precision), offset,
                         precision="highest")
    return jnp.sqrt(jnp.maximum(squared, 0))  # Rounding may take it below 0.


def _checked_features(
    features: jax.Array | np.ndarray, classes: jax.Array | np.ndarray, statistics: ClassStatistics
) -> jax.Array:
    """The classes as int32, checked together with the others."""
    _validate.instance("statistics", statistics, ClassStatistics)
    classes = _validate.class_numbers("classes", classes)
    _validate.shapes(features=(features, "B d"), classes=(classes, "B"),
                     **{"statistics.mean": (statistics.mean, "C d")})
    return classes


def nearest_distance(
    distance: Callable[..., jax.Array], features: jax.Array | np.ndarray,
    statistics: ClassStatistics,
) -> jax.Array:
    r"""Measures the distance of features to the nearest class, :math:`\min_c distance(q, c)`.

    Args:
      distance: :func:`mahalanobis_distance` or :func:`scaled_distance`.
      features: q [B, d].
      statistics: of the classes.

    Returns:
      [B].
    """
    _validate.function("distance", distance)
    _validate.shapes(features=(features, "B d"))
    _validate.instance("statistics", statistics, ClassStatistics)
    classes = jnp.arange(len(statistics.mean))
    # A class at a time, in memory O(B d).
    return jnp.min(jax.lax.map(lambda label: distance(
        features, jnp.full(len(features), label), statistics), classes), axis=0)


def knn_distance(
    features: np.ndarray, training_features: np.ndarray, num_neighbours: int = 50
) -> np.ndarray:
    r"""Measures the distance of normalised features to the k-th nearest training features.

    .. math:: \|q / \|q\| - q_{(k)} / \|q_{(k)}\|\|

    Features that are 0 stay 0.

    Args:
      features: q [N, d].
      training_features: [M, d].
      num_neighbours: k in [1, M].

    Returns:
      [N], in [0, 2].

    Raises:
      InputError: (a ValueError) if shapes do not match, features are not finite, or k is out of
        range.

    Source: Sun et al., *Out-of-Distribution Detection with Deep Nearest Neighbors*, 2022.
    """
    import sklearn.neighbors
    import sklearn.preprocessing

    most = _validate.shapes(features=(features, "N d"), training_features=(
        training_features, "M d"))["M"]
    _validate.finite("features", features)
    _validate.finite("training_features", training_features)
    num_neighbours = _validate.integer("num_neighbours", num_neighbours, 1)
    _validate.in_range("num_neighbours", num_neighbours, 1, most, open_high=False)
    neighbours = sklearn.neighbors.NearestNeighbors(n_neighbors=num_neighbours).fit(
        sklearn.preprocessing.normalize(training_features))
    return neighbours.kneighbors(sklearn.preprocessing.normalize(features))[0][:, -1]


# --- How good a score is -----------------------------------------------------------------------


def auroc(doubt: np.ndarray, correct: np.ndarray) -> float:
    """Computes the share of pairs of a wrong and a right prediction that are in order of doubt.

    The wrong one is to be more doubtful; pairs with the same doubt count half. It is the area under
    the receiver operating characteristic of a detector of wrong predictions: 1 is perfect, 0.5 is
    chance.

    Args:
      doubt: [N].
      correct: [N] bool, whether each prediction is right.

    Raises:
      InputError: (a ValueError) if shapes do not match, a score is not finite, or all predictions
        are right, or all wrong.
    """
    import sklearn.metrics

    correct = _checked_doubt(doubt, correct)
    if correct.all() or not correct.any():
        raise _validate.InputError(
            f"Expected right and wrong predictions, got {int(correct.sum())} right of "
            f"{len(correct)}.")
    return float(sklearn.metrics.roc_auc_score(~correct, doubt))


def doubt_threshold(doubt: np.ndarray, coverage: float) -> float:
    """Finds the smallest of these scores that at least a share ``coverage`` does not exceed.

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


class CoverageCurve(NamedTuple):
    """The accuracy of the N predictions that are accepted, the least doubtful first."""

    coverage: np.ndarray  # shape=[N], dtype=float64; the share that is accepted, 1/N .. 1
    accuracy: np.ndarray  # shape=[N], dtype=float64; of those that are
    area: float  # the mean accuracy over all coverages; 1 less it is the AURC


def coverage_curve(doubt: np.ndarray, correct: np.ndarray) -> CoverageCurve:
    r"""Computes the accuracy-coverage curve of a score of doubt, and the area under it.

    .. math:: accuracy(k / N) = \frac1k \sum_{n \le k} correct_{(n)}, \qquad
        area = \frac1N \sum_k accuracy(k / N) = 1 - AURC

    with the predictions in order of growing doubt. Predictions of equal doubt each count with their
    mean: the curve is the mean over all their orders.

    Args:
      doubt: [N], larger for more doubtful predictions.
      correct: [N] bool, whether each prediction is right.

    Raises:
      InputError: (a ValueError) if shapes do not match or a score is not finite.

    Source: Geifman and El-Yaniv, *Selective Classification for Deep Neural Networks*, 2017; AURC:
    Geifman, Uziel and El-Yaniv, *Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers*,
    2019.
    """
    correct = _checked_doubt(doubt, correct)
    _, places, sizes = np.unique(doubt, return_inverse=True, return_counts=True)
    means = np.bincount(places, correct) / sizes
    accepted = np.arange(1, len(correct) + 1)
    accuracy = np.cumsum(np.repeat(means, sizes)) / accepted
    return CoverageCurve(accepted / len(correct), accuracy, float(accuracy.mean()))


class Detection(NamedTuple):
    """How well a score tells strange images from those of the data set; strange is positive."""

    auroc: float  # share of pairs in which the strange image has the larger score
    aupr_strange: float  # average precision, strange images being positive
    aupr_familiar: float  # average precision of the negative score, familiar images being positive
    fpr: float  # share of familiar images that is flagged where a share of strange ones is


def detection_quality(
    familiar: np.ndarray, strange: np.ndarray, *, true_positive_rate: float = 0.95
) -> Detection:
    """Measures how well a score tells strange images from familiar ones.

    *Strange*, out of the distribution, is positive in AUROC and in the false positive rate, as in
    OpenOOD: the latter is the share of familiar images whose score reaches the largest threshold
    that a share ``true_positive_rate`` of the strange ones reaches. Many papers take *familiar* as
    positive there, which gives another number. The AUPR, which depends on how many there are of
    either kind, is given for both; it is the average precision, without interpolation.

    Args:
      familiar: [N], scores of images like those trained on.
      strange: [M], scores of others, larger for stranger images.
      true_positive_rate: in (0, 1].

    Raises:
      InputError: (a ValueError) if there are no scores of a kind, one is not finite, or the rate is
        out of range.

    Source: Yang et al., *OpenOOD: Benchmarking Generalized Out-of-Distribution Detection*, 2022,
    https://arxiv.org/abs/2210.07242.
    """
    import sklearn.metrics

    _validate.in_range("true_positive_rate", true_positive_rate, 0, 1, open_low=True,
                       open_high=False)
    _validate.shapes(familiar=(familiar, "N"), strange=(strange, "M"))
    _validate.finite("scores of familiar images", familiar)
    _validate.finite("scores of strange images", strange)
    scores = np.concatenate([familiar, strange])
    is_familiar = np.arange(len(scores)) < len(familiar)
    area = auroc(scores, is_familiar)
    false, true, _ = sklearn.metrics.roc_curve(~is_familiar, scores, drop_intermediate=False)
    precision = sklearn.metrics.average_precision_score
    return Detection(area, float(precision(~is_familiar, scores)),
                     float(precision(is_familiar, -scores)),
                     float(false[np.argmax(true >= true_positive_rate)]))


def _checked_doubt(doubt: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """``correct`` as bool, checked together with ``doubt``."""
    correct = np.asarray(correct)
    _validate.shapes(doubt=(doubt, "N"), correct=(correct, "N"))
    correct = correct.astype(bool)
    _validate.finite("doubt", doubt)
    return correct
