"""Intervals, correlations, neighbours and eigenvalues, for the summary of measurements.

Plain NumPy and SciPy on the host, in float64. All raise InputError (a ValueError) if an argument is
out of its range, or the shapes do not match.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from scipy.sparse.linalg import LinearOperator, eigsh
from scipy.spatial.distance import cdist

from jaxrobust import _validate

# --- Intervals -------------------------------------------------------------------------------


def share_error(share: float, number: int) -> float:
    r"""Computes the standard error of a share p in [0, 1] of n >= 1 cases.

    .. math:: \sqrt{\tilde p (1 - \tilde p) / (n + 2)}, \qquad \tilde p = (n p + 1) / (n + 2)

    It adds one case on either side, so that 10 right of 10 do not count as certain. For two shares
    it gives the interval of Agresti and Caffo.

    Source: Agresti and Caffo, *Simple and Effective Confidence Intervals for Proportions and
    Differences of Proportions*, 2000.
    """
    _validate.in_range("share", share, 0, 1, open_high=False)
    number = _validate.integer("number", number, 1)
    adjusted = (number * share + 1) / (number + 2)
    return math.sqrt(adjusted * (1 - adjusted) / (number + 2))


def share_interval(successes: int, number: int, confidence: float = 0.95
                   ) -> tuple[float, float]:
    r"""Computes Wilson's score interval of a probability, from the successes in independent trials.

    .. math:: \frac{\hat p + z^2 / 2n \pm z \sqrt{\hat p (1 - \hat p) / n + z^2 / 4n^2}}
        {1 + z^2 / n}

    Source: Wilson, *Probable Inference, the Law of Succession, and Statistical Inference*, 1927.
    """
    number = _validate.integer("number", number, 1)
    successes = _validate.integer("successes", successes, 0)
    _validate.in_range("successes", successes, 0, number, open_high=False)
    _validate.in_range("confidence", confidence, 0, 1, open_low=True)
    found = stats.binomtest(int(successes), int(number)).proportion_ci(confidence, "wilson")
    return float(found.low), float(found.high)


def share_upper_bound(successes: int, number: int, failure_probability: float) -> float:
    """Bounds a probability of success from above, by the successes in independent trials.

    The bound is exact and one-sided: whatever the true probability is, a sample's bound is below it
    with a probability of at most ``failure_probability``.

    Args:
      successes: in [0, number].
      number: of independent trials, >= 1.
      failure_probability: in (0, 1).

    >>> round(share_upper_bound(0, 10, 0.05), 6) == round(1 - 0.05 ** (1 / 10), 6)
    True

    Source: Clopper and Pearson (1934).
    """
    number = _validate.integer("number", number, 1)
    successes = _validate.integer("successes", successes, 0)
    _validate.in_range("successes", successes, 0, number, open_high=False)
    _validate.in_range("failure_probability", failure_probability, 0, 1, open_low=True)
    return float(stats.binomtest(successes, number, alternative="less").proportion_ci(
        1 - failure_probability, method="exact").high)


def sign_test(first: int, second: int) -> float:
    r"""Computes the p-value of two counts, two-sided, if both outcomes are equally probable.

    .. math:: p(a, b) = \min(1, 2 P(Bin(a + b, 1/2) \ge \max(a, b)))

    Args:
      first: a, >= 0.
      second: b, >= 0; one of the two at least 1.

    >>> sign_test(5, 0) == 2 / 2**5
    True
    """
    first = _validate.integer("first", first, 0)
    second = _validate.integer("second", second, 0)
    _validate.in_range("number of cases", first + second, 1)
    return float(stats.binomtest(first, first + second).pvalue)


def pooled_std(*samples: Sequence[float]) -> float | None:
    r"""Estimates the common standard deviation of samples with means of their own.

    .. math:: s^2 = \frac{\sum_i \sum_j (x_{ij} - \bar x_i)^2}{\sum_i (n_i - 1)}

    Args:
      *samples: of any sizes, >= 1.

    Returns:
      s; None if all samples have only one value.
    """
    for sample in samples:
        _validate.in_range("number of values", len(sample), 1)
    freedom = sum(len(sample) - 1 for sample in samples)
    if freedom == 0:
        return None
    squares = sum((value - math.fsum(sample) / len(sample)) ** 2
                  for sample in samples for value in sample)
    return math.sqrt(squares / freedom)


def mean_difference_interval(
    first: Sequence[float], second: Sequence[float], confidence: float = 0.95
) -> float | None:
    r"""Computes half of Student's interval for the difference of two means, of equal variance.

    .. math:: t_{(1 + c) / 2,\, n + m - 2}\; s \sqrt{1/n + 1/m}

    with :func:`pooled_std` s.

    Args:
      first: n >= 1 values.
      second: m >= 1 values.
      confidence: c, in (0, 1).

    Returns:
      Half of the interval's width; None if both samples have only one value.
    """
    _validate.in_range("confidence", confidence, 0, 1, open_low=True)
    n, m, std = len(first), len(second), pooled_std(first, second)
    if std is None:
        return None
    return float(stats.t.ppf((1 + confidence) / 2, n + m - 2)) * std * math.sqrt(1 / n + 1 / m)


def paired_difference_interval(
    first: np.ndarray, second: np.ndarray, confidence: float = 0.95
) -> tuple[float, float]:
    r"""Computes the mean difference of two scores of the same cases, and half of its interval.

    .. math:: \bar d = \frac1n \sum_i d_i, \qquad
        z_{(1 + c) / 2}\; \frac{\sqrt{\sum_i d_i^2 + 1 - (\sum_i d_i)^2 / (n + 2)}}{n + 2}

    with :math:`d_i = x_i - y_i`. It adds half a case to each outcome of a pair of shares, so that
    two scores that agree in every case are not certain to be equal.

    Args:
      first: [n] scores x in [0, 1], such as whether a prediction is right.
      second: [n] scores y of the same cases.
      confidence: c, in (0, 1).

    Source: Agresti and Min, *Simple Improved Confidence Intervals for Comparing Matched
    Proportions*, 2005.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    size = _validate.shapes(first=(first, "n"), second=(second, "n"))["n"]
    _validate.in_range("number of cases", size, 1)
    _validate.in_range("confidence", confidence, 0, 1, open_low=True)
    difference = first - second
    total = float(difference.sum())
    spread = math.sqrt(float((difference**2).sum()) + 1 - total**2 / (size + 2)) / (size + 2)
    return total / size, normal_interval(spread, confidence=confidence)


def normal_interval(*errors: float, confidence: float = 0.95) -> float:
    """Computes half of the interval of a sum of independent normal parts, from their errors."""
    _validate.in_range("confidence", confidence, 0, 1, open_low=True)
    return float(stats.norm.ppf((1 + confidence) / 2)) * math.hypot(*errors)


# --- Correlations ----------------------------------------------------------------------------


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Computes Pearson's coefficient of x and y, each [n].

    It is NaN for fewer than three points, since two always lie on a line, and for a constant.
    """
    return _coefficient(stats.pearsonr, x, y)


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Computes Spearman's rank coefficient of x and y, each [n]; NaN as :func:`pearson`."""
    return _coefficient(stats.spearmanr, x, y)


def _coefficient(statistic: Callable[..., Any], x: np.ndarray, y: np.ndarray) -> float:
    x, y = _validate.reals("x", x), _validate.reals("y", y)
    if x.shape != y.shape:
        raise _validate.InputError(f"Expected y of the shape of x, {x.shape}, got {y.shape}.")
    _validate.shapes(x=(x, "n"))
    if np.isinf(x).any() or np.isinf(y).any():
        raise _validate.InputError("Expected x and y without infinite values.")
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(statistic(x, y).statistic)


class Coefficient(NamedTuple):
    """A rank correlation with its interval; NaN where it is not defined."""

    value: float
    low: float
    high: float


def _numbered(groups: np.ndarray) -> np.ndarray:
    """The number of each member's group, from 0 on."""
    if not (isinstance(groups, np.ndarray) and groups.dtype.kind in "biufU"):
        raise _validate.InputError("Expected groups as an array of numbers or texts, got "
                                   f"{getattr(groups, 'dtype', type(groups).__name__)}.")
    return np.unique(groups, return_inverse=True)[1]


class RankCorrelations:
    """Spearman's coefficients between variables, and their intervals over resampled groups.

    Whole groups of similar members, such as the seeds of a setting, are drawn with replacement, so
    that many members of few groups do not count as many. Resamples without a coefficient, such as
    those in which a variable is constant, are ignored.

    Args:
      variables: by name, [n] each.
      groups: [n] numbers or texts, equal for members of a group.
      seed: of the resamples.
      num_resamples: R >= 1.
      confidence: the share of the resamples within an interval, in (0, 1).
    """

    def __init__(self, variables: Mapping[Any, np.ndarray], groups: np.ndarray, *, seed: int,
                 num_resamples: int = 500, confidence: float = 0.95) -> None:
        _validate.in_range("num_resamples", num_resamples, 1)
        _validate.in_range("confidence", confidence, 0, 1, open_low=True)
        groups = _numbered(groups)
        _validate.shapes(groups=(groups, "n"), **{
            str(name): (values, "n") for name, values in variables.items()})
        self._tail = (1 - confidence) / 2
        self._index = {name: index for index, name in enumerate(variables)}
        values = np.stack(list(variables.values()), axis=1)
        members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
        random = np.random.default_rng(seed)
        drawn = [np.concatenate([members[index] for index in random.integers(
            len(members), size=len(members))]) for _ in range(num_resamples)]
        # The first is of the data as they are.
        self._matrices = np.stack([_spearman_matrix(values[rows])
                                   for rows in (np.arange(len(values)), *drawn)])

    def between(self, x: Hashable, y: Hashable, given: Hashable | None = None) -> Coefficient:
        """The coefficient of two variables, or the partial one, ``given`` the ranks of a third."""
        found = _between(self._matrices, self._index, x, y, given)
        return _with_interval(found[0], found[1:], self._tail)


class MeanRankCorrelations:
    """Spearman's coefficients between variables over cases, averaged over the members that have
    these cases in common, such as networks that were given the same images.

    For the intervals both are drawn with replacement: whole groups of members, as
    :class:`RankCorrelations` does, and the cases, the same ones for all members of a resample. A
    member does not count where it has no coefficient, since fewer than three of its cases are kept
    or a variable is constant.

    Args:
      variables: by name, [M, n] each, M members and n cases; not NaN where they are kept.
      groups: [M] numbers or texts, equal for members of a group.
      kept: [M, n] booleans, the cases that count for each member; all if None.
      seed: of the resamples.
      num_resamples: R >= 1.
      confidence: the share of the resamples within an interval, in (0, 1).
    """

    def __init__(self, variables: Mapping[Any, np.ndarray], groups: np.ndarray, *, seed: int,
                 kept: np.ndarray | None = None, num_resamples: int = 200,
                 confidence: float = 0.95) -> None:
        _validate.in_range("num_resamples", num_resamples, 1)
        _validate.in_range("confidence", confidence, 0, 1, open_low=True)
        groups = _numbered(groups)
        shapes = {str(name): (each, "M n") for name, each in variables.items()}
        size = _validate.shapes(**shapes, groups=(groups, "M"), **(
            {} if kept is None else {"kept": (kept, "M n")}))
        values = np.stack(list(variables.values()), axis=2)
        kept = np.ones(values.shape[:2], bool) if kept is None else kept
        if np.isnan(values[kept]).any():
            raise _validate.InputError("Expected variables without NaN in the cases that are kept.")
        self._tail = (1 - confidence) / 2
        self._index = {name: index for index, name in enumerate(variables)}
        random = np.random.default_rng(seed)
        num_groups = groups.max() + 1
        # The first is of the data as they are.
        weights, matrices = [np.ones(size["M"])], [_matrices_of(values, kept, np.arange(size["n"]))]
        for _ in range(num_resamples):
            drawn = np.bincount(random.integers(
                num_groups, size=num_groups), minlength=num_groups)
            weights.append(drawn[groups].astype(float))
            matrices.append(_matrices_of(
                values, kept, random.integers(size["n"], size=size["n"])))
        self._weights, self._matrices = np.stack(weights), np.stack(matrices)

    def between(self, x: Hashable, y: Hashable, given: Hashable | None = None
                ) -> tuple[np.ndarray, Coefficient]:
        """The coefficients [M] of two variables, or the partial ones, ``given`` the ranks of a
        third, and their mean."""
        found = _between(self._matrices, self._index, x, y, given)
        counts = np.where(np.isfinite(found), self._weights, 0)
        total = counts.sum(axis=1)
        means = np.divide((counts * np.nan_to_num(found)).sum(axis=1), total,
                          out=np.full(len(total), np.nan), where=total > 0)
        return found[0], _with_interval(means[0], means[1:], self._tail)


def _matrices_of(values: np.ndarray, kept: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """The coefficients [M, k, k] of variables [M, n, k] over the drawn cases that are kept."""
    few = np.full((values.shape[2],) * 2, np.nan)
    chosen = [one[drawn[mine[drawn]]] for one, mine in zip(values, kept, strict=True)]
    return np.stack([_spearman_matrix(one) if len(one) > 2 else few for one in chosen])


def _between(matrices: np.ndarray, index: Mapping[Hashable, int], x: Hashable, y: Hashable,
             given: Hashable | None) -> np.ndarray:
    """The coefficients of two variables in matrices [..., k, k], or the partial ones."""
    def of(first: Hashable, second: Hashable) -> np.ndarray:
        return matrices[..., index[first], index[second]]

    found = of(x, y)
    if given is None:
        return found
    with_x, with_y = of(x, given), of(y, given)
    rest = (1 - with_x**2) * (1 - with_y**2)
    # Where a variable has the ranks of the given one, nothing of it remains.
    return (found - with_x * with_y) / np.sqrt(np.where(rest < 1e-9, np.nan, rest))


def _with_interval(value: float, resampled: np.ndarray, tail: float) -> Coefficient:
    """The coefficient with its interval over those of the resamples that have one."""
    resampled = resampled[np.isfinite(resampled)]
    low, high = np.quantile(resampled, (tail, 1 - tail)) if len(resampled) else (np.nan, np.nan)
    return Coefficient(float(value), float(low), float(high))


def _spearman_matrix(values: np.ndarray) -> np.ndarray:
    """The coefficients [k, k] of the columns of [n, k]; NaN for constant ones."""
    # Much faster than scipy.stats.spearmanr, which also computes p-values.
    ranks = stats.rankdata(values, axis=0)
    ranks -= ranks.mean(axis=0)
    norms = np.linalg.norm(ranks, axis=0)
    norms[norms == 0] = np.nan
    return (ranks.T @ ranks) / np.outer(norms, norms)


# --- Trade-offs --------------------------------------------------------------------------------


def pareto_front(values: np.ndarray) -> np.ndarray:
    """Tells which cases no other one dominates: is at least as good in all, and better in one.

    Args:
      values: [n, K], K values of each case, each the better the larger; finite.

    Returns:
      [n] bool. Cases that are alike are on the front together.

    >>> pareto_front(np.array([[90.0, 50.0], [85.0, 80.0], [84.0, 79.0]])).tolist()
    [True, True, False]
    """
    values = np.asarray(values, np.float64)
    _validate.shapes(values=(values, "n K"))
    if not np.isfinite(values).all():
        raise _validate.InputError("Expected finite values of the cases to compare.")
    least = (values[:, None] >= values[None]).all(axis=2)  # Row i is at least as good as row j.
    return ~np.any(least & ~least.T, axis=0)


# --- Outcomes against a value of each case -----------------------------------------------------


def lowest_means(values: np.ndarray, outcomes: np.ndarray, shares: Sequence[float] | np.ndarray
                 ) -> tuple[np.ndarray, np.ndarray]:
    """Averages the outcomes of the cases of lowest value.

    Args:
      values: [n]; cases whose value is not finite do not count.
      outcomes: [K, n], K outcomes of each case, such as whether a prediction is right.
      shares: S values p in (0, 1].

    Returns:
      For each share, the mean outcome of the cases whose value is below its p-quantile (of all
      cases at p = 1), NaN if there is none, and their number: [S] each. Cases of equal value are
      included or excluded together.

    Source: Fig. 8, with the curvature as the value.
    """
    usable = np.isfinite(values)
    values, outcomes = values[usable].astype(np.float64), outcomes[:, usable]
    means, sizes = [], []
    for share in shares:
        _validate.in_range("share", share, 0, 1, open_low=True, open_high=False)
        kept = (values < np.quantile(values, share) if share < 1 and values.size else
                np.ones(len(values), bool))
        sizes.append(int(kept.sum()))
        means.append(float(outcomes[:, kept].mean()) if kept.any() else math.nan)
    return np.array(means), np.array(sizes)


def means_by_count(values: np.ndarray, counts: np.ndarray, largest: int
                   ) -> tuple[np.ndarray, np.ndarray]:
    """Averages the values of the cases with the same count, such as of right predictions.

    Args:
      values: [n]; cases whose value is not finite do not count.
      counts: [n] integers in [0, largest].
      largest: M.

    Returns:
      The mean of each group, NaN for an empty one, and its number of cases, [M + 1] each.

    Source: Fig. 9, with the curvature as the value.
    """
    usable = np.isfinite(values)
    values, counts = values[usable].astype(np.float64), counts[usable]
    groups = [values[counts == k] for k in range(largest + 1)]
    return (np.array([group.mean() if group.size else math.nan for group in groups]),
            np.array([group.size for group in groups]))


class CountCorrelation(NamedTuple):
    """Correlation of values with a count; NaN where :func:`pearson` and :func:`spearman` are."""

    pearson: float  # between the count and the mean value of its group
    spearman: float  # between both, over the cases
    spearman_of_some: float  # the same over some of the cases
    number: int  # cases that ``spearman`` is over


def correlation_with_counts(
    values: np.ndarray, counts: np.ndarray, some: np.ndarray, largest: int
) -> CountCorrelation:
    """Correlates values [n] with counts [n] up to ``largest``, over all cases and over some, [n].

    Cases whose value is not finite do not count.

    Source: Fig. 9 for the coefficient between groups.
    """
    means, _ = means_by_count(values, counts, largest)
    groups = np.flatnonzero(np.isfinite(means))
    usable = np.isfinite(values)
    chosen = usable & some
    return CountCorrelation(
        pearson(groups, means[groups]), spearman(counts[usable], values[usable]),
        spearman(counts[chosen], values[chosen]), int(usable.sum()))


# --- Neighbours and eigenvalues ----------------------------------------------------------------

_ROWS_AT_ONCE = 512


def neighbour_accuracy(features: np.ndarray, labels: np.ndarray, *, num_neighbours: int) -> float:
    """Computes the share of points whose class is the most common among their nearest others.

    Of several equally common classes the one of lowest number counts. Memory is O(N) besides the
    features.

    Args:
      features: [N, d].
      labels: [N] integers >= 0.
      num_neighbours: in [1, N - 1].

    Returns:
      The share; NaN if a feature is not finite.
    """
    features, labels = np.asarray(features, np.float64), np.asarray(labels)
    size = _validate.shapes(features=(features, "N d"), labels=(labels, "N"))["N"]
    _validate.in_range("num_neighbours", num_neighbours, 1, size)
    if not np.isfinite(features).all():
        return math.nan
    right = 0
    for first in range(0, size, _ROWS_AT_ONCE):
        rows = np.arange(first, min(first + _ROWS_AT_ONCE, size))
        distances = cdist(features[rows], features, "sqeuclidean")
        distances[np.arange(len(rows)), rows] = np.inf  # Each point itself is left out.
        nearest = np.argpartition(distances, num_neighbours - 1, axis=1)[:, :num_neighbours]
        votes = np.zeros((len(rows), labels.max() + 1), int)
        np.add.at(votes, (np.arange(len(rows))[:, None], labels[nearest]), 1)
        right += int((votes.argmax(axis=1) == labels[rows]).sum())
    return right / size


def largest_eigenvalue(product: Callable[[np.ndarray], np.ndarray], start: np.ndarray, *,
                       tolerance: float = 0.01) -> float:
    """Computes the largest eigenvalue of a symmetric matrix, by Lanczos' iteration (ARPACK).

    Args:
      product: vector [n] -> matrix times vector.
      start: [n], n >= 3, a random vector.
      tolerance: ARPACK's stopping criterion, relative.

    Returns:
      The largest, not that of largest magnitude; 0 where the product with ``start`` is.
    """
    size = len(start)
    _validate.in_range("size", size, 3)
    # ARPACK's test of convergence takes values below 1e-11 for 0.
    unit = np.max(np.abs(product(start)))
    if unit == 0:
        return 0.0
    operator = LinearOperator(
        (size, size), matvec=lambda vector: product(vector) / unit, dtype=np.float64)
    return unit * float(eigsh(operator, k=1, which="LA", tol=tolerance, v0=start,
                              return_eigenvectors=False)[0])


def largest_stable_rate(curvature: float, momentum: float) -> float:
    r"""Computes the largest learning rate for which SGD with Nesterov momentum is stable.

    .. math:: \eta < \frac{2 (1 + m)}{(1 + 2 m) \lambda}

    on a quadratic loss, where the roots of
    :math:`z^2 - (1 + m)(1 - \eta\lambda) z + m (1 - \eta\lambda)` are within the unit circle.

    Args:
      curvature: :math:`\lambda`, the largest eigenvalue of the loss's Hessian in the parameters.
      momentum: m, in [0, 1).

    Returns:
      The rate; infinite for a curvature of 0 or less.
    """
    _validate.in_range("momentum", momentum, 0, 1)
    _validate.in_range("curvature", curvature, -np.inf)
    return 2 * (1 + momentum) / ((1 + 2 * momentum) * curvature) if curvature > 0 else math.inf
