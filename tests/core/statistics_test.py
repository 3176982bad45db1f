"""Intervals, correlations, neighbours and eigenvalues against SciPy, scikit-learn and loops."""

import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sklearn.neighbors
from scipy import stats

from jaxrobust import InputError, statistics
from jaxrobust.statistics import MeanRankCorrelations, RankCorrelations

SAMPLES = st.integers(0, 2**16).map(np.random.default_rng)


def rank_correlation(x, y, groups, given=None):
    """Of x and y alone, or with a third held fixed."""
    variables = {"x": x, "y": y} | ({} if given is None else {"given": given})
    return RankCorrelations(variables, groups, seed=0).between(
        "x", "y", None if given is None else "given")


@hypothesis.given(random=SAMPLES, number=st.integers(8, 30))
@hypothesis.settings(max_examples=10)
def test_the_mean_coefficient_is_that_of_the_members_over_the_cases_that_are_kept(random, number):
    x, y, z = random.normal(size=(3, 4, number)).round(1)  # With ties.
    kept = (random.random((4, number)) < 0.8) | (np.arange(number) < 5)
    kept[0] = np.arange(number) < 2  # Too few for a coefficient.
    found = MeanRankCorrelations({"x": x, "y": np.where(kept, y, np.nan), "z": z}, np.arange(4),
                                 kept=kept, seed=0, num_resamples=5)
    each, mean = found.between("x", "y")
    expected = [stats.spearmanr(x[row, kept[row]], y[row, kept[row]]).statistic
                for row in range(1, 4)]
    assert np.isnan(each[0])
    np.testing.assert_allclose(each[1:], expected, atol=1e-12)
    assert mean.value == pytest.approx(np.nanmean(expected), nan_ok=True)
    # Partial coefficients are those of the residuals of the ranks.
    each, _ = found.between("x", "y", "z")
    for row in range(1, 4):
        ranks = stats.rankdata(np.stack([x, y, z])[:, row, kept[row]], axis=1)
        ranks -= ranks.mean(axis=1, keepdims=True)
        rest = [one - ranks[2] * (one @ ranks[2]) / (ranks[2] @ ranks[2]) for one in ranks[:2]]
        if min(map(np.linalg.norm, rest)) > 1e-3:
            assert each[row] == pytest.approx(np.corrcoef(rest)[0, 1], abs=1e-6)


def test_the_interval_of_a_mean_coefficient_is_over_cases_and_over_groups():
    random = np.random.default_rng(0)
    x = random.normal(size=200)
    y = x + 1.5 * random.normal(size=200)

    def width(x, y, groups):
        _, (value, low, high) = MeanRankCorrelations(
            {"x": x, "y": y}, groups, seed=0, num_resamples=400).between("x", "y")
        assert low <= value <= high
        return high - low

    alone = width(x[None], y[None], np.zeros(1))
    assert alone == pytest.approx(rank_correlation_width(x, y), rel=0.2)
    # Copies of a member are no further evidence, for the cases are the same.
    assert width(*(np.tile(one, (6, 1)) for one in (x, y)), np.arange(6)) == pytest.approx(
        alone, rel=0.2)
    # Two groups that contradict each other leave everything open, the seeds of one do not.
    both = np.stack([x, x]), np.stack([x, -x])
    assert width(*both, np.arange(2)) == pytest.approx(2)
    assert width(*both, np.zeros(2)) < 1e-9


def rank_correlation_width(x, y):
    """Of the interval over the cases alone, each of which is a group."""
    found = rank_correlation(x, y, np.arange(len(x)))
    return found.high - found.low


def test_the_interval_of_a_mean_coefficient_covers_the_true_one():
    random, covered, repetitions = np.random.default_rng(1), 0, 60
    rho = 0.5
    true = 6 / np.pi * np.arcsin(rho / (1 + 0.25) / 2)  # Of normal variables.
    for _ in range(repetitions):
        shared = random.multivariate_normal((0, 0), ((1, rho), (rho, 1)), size=50).T
        noise = 0.5 * random.normal(size=(2, 4, 50))  # Members see the same cases, differently.
        _, (_, low, high) = MeanRankCorrelations(
            {"x": shared[0] + noise[0], "y": shared[1] + noise[1]}, np.arange(4), seed=0,
            num_resamples=60).between("x", "y")
        covered += low <= true <= high
    assert covered >= 0.85 * repetitions


@pytest.mark.parametrize(("share", "number", "expected"), [
    # 11 of 12 with one image more on either side; 5 of 8; and sqrt(p q / n) of many.
    (1.0, 10, (11 / 12 * 1 / 12 / 12) ** 0.5), (0.5, 4, (0.25 / 6) ** 0.5),
    (0.9, 10**8, 3e-5)])
def test_the_error_of_a_share_is_never_zero(share, number, expected):
    assert statistics.share_error(share, number) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [((1.0,), (5.0,), None), ((0.0, 2.0), (5.0,), 2**0.5), ((0.0, 2.0), (4.0, 8.0), 5**0.5)])
def test_pooled_std_is_that_of_the_textbook(first, second, expected):
    assert statistics.pooled_std(first, second) == (expected and pytest.approx(expected))


def test_the_paired_interval_covers_the_difference_of_scores_of_the_same_cases():
    random, covered, paired, apart = np.random.default_rng(0), 0, [], []
    for _ in range(400):
        hard = random.random(120)
        first = (random.random(120) < 0.95 - 0.5 * hard).astype(float)
        second = np.where(random.random(120) < 0.1, 1 - first, first)
        true = np.mean(0.1 * (2 * (0.95 - 0.5 * hard) - 1))  # What a tenth of the flips cost.
        difference, half = statistics.paired_difference_interval(first, second)
        assert difference == pytest.approx(first.mean() - second.mean())
        covered += abs(difference - true) <= half
        paired.append(half)
        apart.append(statistics.normal_interval(*(
            statistics.share_error(scores.mean(), 120) for scores in (first, second))))
    assert 0.93 <= covered / 400 <= 0.99
    assert np.mean(paired) < 0.7 * np.mean(apart)  # Cases that both find hard do not count.


def test_the_paired_interval_is_agresti_and_mins_for_two_shares():
    first, second = np.ones(10), np.array([0.0] * 3 + [1.0] * 7)
    # b = 3 and c = 0 discordant pairs, half a case more for each of four outcomes.
    b, c, n = 3.5, 0.5, 12
    expected = 1.959964 * ((b + c) - (b - c) ** 2 / n) ** 0.5 / n
    assert statistics.paired_difference_interval(first, second) == (
        pytest.approx(0.3), pytest.approx(expected, rel=1e-6))
    assert statistics.paired_difference_interval(first, first)[1] > 0
    with pytest.raises(InputError, match="second"):
        statistics.paired_difference_interval(first, second[1:])


@hypothesis.given(random=SAMPLES, number=st.integers(3, 30))
@hypothesis.settings(max_examples=10)
def test_the_coefficient_is_spearmans_and_ranks_alone_count(random, number):
    x, y = random.normal(size=(2, number))
    groups = random.integers(0, 4, size=number)
    found = rank_correlation(x, y, groups)
    assert found.value == pytest.approx(stats.spearmanr(x, y).statistic)
    np.testing.assert_allclose(rank_correlation(np.exp(x), y**3, groups), found)
    np.testing.assert_allclose(rank_correlation(-x, y, groups).value, -found.value)
    assert -1 <= found.low <= found.high <= 1 or np.isnan(found.low)


@hypothesis.given(random=SAMPLES, number=st.integers(6, 30))
@hypothesis.settings(max_examples=10)
def test_what_is_held_fixed_is_regressed_out_of_both_ranks(random, number):
    x, y, given = random.normal(size=(3, number))
    y += given
    found = rank_correlation(x, y, np.arange(number), given)
    design = np.stack([np.ones(number), stats.rankdata(given)], axis=1)
    rest = [ranks - design @ np.linalg.lstsq(design, ranks)[0]
            for ranks in (stats.rankdata(x), stats.rankdata(y))]
    assert found.value == pytest.approx(np.corrcoef(*rest)[0, 1])


def test_a_common_cause_alone_leaves_nothing_once_it_is_held_fixed():
    random = np.random.default_rng(3)
    cause = random.normal(size=400)
    x, y = cause + 0.5 * random.normal(size=(2, 400))
    groups = np.arange(400)
    assert rank_correlation(x, y, groups).low > 0.6
    held = rank_correlation(x, y, groups, cause)
    assert held.low < 0.05 and held.high > -0.05 and abs(held.value) < 0.15
    # Nothing is left of a variable that is ranked as the one held fixed is.
    assert np.isnan(rank_correlation(cause**3, y, groups, cause).value)


def test_more_seeds_of_the_same_rows_make_no_interval_smaller():
    x, y = np.random.default_rng(1).normal(size=(2, 9))
    once = rank_correlation(x, y, np.arange(9))
    repeated = rank_correlation(*(np.repeat(values, 5) for values in (x, y, np.arange(9))))
    np.testing.assert_allclose(repeated, once)
    alone = rank_correlation(*(np.repeat(values, 5) for values in (x, y)), np.arange(45))
    assert alone.high - alone.low < 0.7 * (once.high - once.low)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    random, covered = np.random.default_rng(2), 0
    truth = 6 / np.pi * np.arcsin(0.6 / 2)  # Spearman's of a normal pair with correlation 0.6.
    for _ in range(25):
        x = random.normal(size=40)
        y = 0.6 * x + 0.8 * random.normal(size=40)
        found = rank_correlation(x, y, np.arange(40))
        covered += found.low <= truth <= found.high
    assert covered >= 21


def test_a_constant_has_no_coefficient():
    assert np.isnan(rank_correlation(np.ones(5), np.arange(5.0), np.arange(5))).all()


NUM_DRAWS = 10


def sample(seed=0, size=60):
    """Curvatures, and draws that are wrong more often where the curvature is high."""
    rng = np.random.default_rng(seed)
    curvature = rng.lognormal(sigma=2, size=size).astype(np.float32)
    chance = stats.norm.cdf(1 - np.log(curvature))
    return curvature, rng.random((NUM_DRAWS, size)) < chance


def slow_lowest_mean(curvature, correct, share):
    """The paper's acc(D_test(p)), image by image and draw by draw."""
    threshold = np.quantile(curvature.astype(np.float64), share)
    right = total = 0
    for image, value in enumerate(curvature):
        if value < threshold or share == 1:
            for draw in range(len(correct)):
                right += bool(correct[draw, image])
                total += 1
    return right / total if total else math.nan


def slow_group_mean(curvature, correct, k):
    """The paper's mean curvature of G(k)."""
    group = []
    for image, value in enumerate(curvature):
        count = 0
        for draw in range(len(correct)):
            count += bool(correct[draw, image])
        if count == k:
            group.append(float(value))
    return (sum(group) / len(group) if group else math.nan), len(group)


@pytest.mark.parametrize("seed", range(3))
def test_lowest_mean_is_that_of_the_slow_loop(seed):
    curvature, correct = sample(seed)
    shares = np.arange(0.05, 1.01, 0.05).round(2)
    found, sizes = statistics.lowest_means(curvature, correct, shares)
    expected = [slow_lowest_mean(curvature, correct, share) for share in shares]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert sizes[-1] == 60 and sizes[shares == 0.5] == 30
    assert found[-1] == correct.mean() and found[0] > found[-1]


@pytest.mark.parametrize("seed", range(3))
def test_means_by_count_are_those_of_the_slow_loop(seed):
    curvature, correct = sample(seed)
    means, sizes = statistics.means_by_count(curvature, correct.sum(axis=0), NUM_DRAWS)
    for k in range(NUM_DRAWS + 1):
        mean, size = slow_group_mean(curvature, correct, k)
        assert sizes[k] == size
        np.testing.assert_allclose(means[k], mean, rtol=1e-12)
    assert sizes.sum() == 60


def test_correlations_are_scipys_over_groups_and_over_images():
    curvature, correct = sample()
    counts = correct.sum(axis=0)
    clean = np.arange(60) % 3 > 0
    found = statistics.correlation_with_counts(curvature, counts, clean, NUM_DRAWS)
    groups = [(k, slow_group_mean(curvature, correct, k)[0]) for k in range(NUM_DRAWS + 1)]
    groups = np.array([pair for pair in groups if not math.isnan(pair[1])])
    assert found.pearson == pytest.approx(np.corrcoef(groups.T)[0, 1])
    ranks = stats.rankdata(counts), stats.rankdata(curvature)
    assert found.spearman == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert found.spearman_of_some == pytest.approx(
        stats.spearmanr(counts[clean], curvature[clean]).statistic)
    assert found.spearman < -0.5 and found.number == 60


def test_empty_groups_are_nan_and_have_no_part_in_the_coefficient():
    curvature, counts = np.array([8.0, 4.0, 2.0, 1.0]), np.array([0, 0, 5, 10])
    means, sizes = statistics.means_by_count(curvature, counts, NUM_DRAWS)
    np.testing.assert_array_equal(means[[0, 1, 5, 10]], [6, np.nan, 2, 1])
    assert sizes.tolist() == [2, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1]
    found = statistics.correlation_with_counts(curvature, counts, np.ones(4, bool), NUM_DRAWS)
    assert found.pearson == pytest.approx(np.corrcoef([0, 5, 10], [6, 2, 1])[0, 1])


def test_constant_curvature_has_no_coefficient_and_no_lowest_share():
    correct = sample()[1]
    flat = np.full(60, 3.0, np.float32)
    found = statistics.correlation_with_counts(
        flat, correct.sum(axis=0), np.ones(60, bool), NUM_DRAWS)
    assert all(math.isnan(value) for value in found[:3])
    accuracy, sizes = statistics.lowest_means(flat, correct, (0.5, 1))
    assert math.isnan(accuracy[0]) and accuracy[1] == correct.mean()
    assert sizes.tolist() == [0, 60]


@pytest.mark.parametrize("counts", [np.full(60, 10), np.repeat([0, 10], 30)])
def test_fewer_than_three_groups_have_no_pearson_coefficient(counts):
    found = statistics.correlation_with_counts(
        sample()[0], counts, np.ones(60, bool), NUM_DRAWS)
    assert math.isnan(found.pearson)


def test_curvatures_that_are_not_finite_do_not_count():
    curvature, correct = sample()
    counts, clean = correct.sum(axis=0), np.ones(60, bool)
    wild = np.concatenate([curvature, [np.nan, np.inf, -np.inf]]).astype(np.float32)
    more = np.concatenate([correct, np.ones((NUM_DRAWS, 3), bool)], axis=1)
    for pair in zip(statistics.lowest_means(wild, more, (0.3, 1)),
                    statistics.lowest_means(curvature, correct, (0.3, 1)), strict=True):
        np.testing.assert_array_equal(*pair)
    assert statistics.correlation_with_counts(
        wild, more.sum(axis=0), np.ones(63, bool), NUM_DRAWS
    ) == statistics.correlation_with_counts(curvature, counts, clean, NUM_DRAWS)
    accuracy, sizes = statistics.lowest_means(wild[60:], more[:, 60:], (0.5, 1))
    assert np.isnan(accuracy).all() and sizes.tolist() == [0, 0]


def test_neighbour_accuracy_leaves_the_point_itself_out():
    labels = np.repeat([0, 1], 6)
    apart = labels[:, None] * 100.0 + np.arange(12)[:, None]
    assert statistics.neighbour_accuracy(apart, labels, num_neighbours=5) == 1
    # The five nearest others of a point among its like are of the other class.
    alternating = np.concatenate([np.arange(6), np.arange(6) + 0.1])[:, None] * 1e-3
    lone = np.array([0, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1])
    assert statistics.neighbour_accuracy(
        alternating, lone, num_neighbours=5) == pytest.approx(10 / 12)
    assert math.isnan(statistics.neighbour_accuracy(
        np.full((12, 1), np.nan), labels, num_neighbours=5))


@pytest.mark.parametrize("num_neighbours", [1, 4])
def test_neighbours_are_those_of_scikit_learn(num_neighbours):
    random = np.random.default_rng(0)
    # More than are compared at once.
    labels = random.integers(0, 3, size=600)
    features = (labels[:, None] + random.normal(size=(600, 20))).astype(np.float32)
    nearest = sklearn.neighbors.NearestNeighbors(n_neighbors=num_neighbours).fit(
        features).kneighbors(return_distance=False)
    votes = [np.bincount(labels[row]).argmax() for row in nearest]
    expected = np.mean(votes == labels)
    assert 0.4 < expected < 0.99
    assert statistics.neighbour_accuracy(
        features, labels, num_neighbours=num_neighbours) == expected


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_the_limit_of_the_rate_is_where_a_quadratic_is_left(momentum):
    curvature = 7.0
    limit = statistics.largest_stable_rate(curvature, momentum)
    for factor, stays in ((0.98, True), (1.02, False)):
        optimizer = optax.sgd(factor * limit, momentum=momentum or None, nesterov=True)

        def step(carry, _, optimizer=optimizer):
            x, state = carry
            updates, state = optimizer.update(curvature * x, state)
            return (x + updates, state), x

        x = jnp.float32(1)
        (last, _), _ = jax.lax.scan(step, (x, optimizer.init(x)), length=400)
        assert (abs(last) < 1e-2) == stays
    for flat in (0.0, -1.0):
        assert statistics.largest_stable_rate(flat, momentum) == np.inf


def test_the_largest_eigenvalue_is_not_that_of_largest_magnitude():
    random = np.random.default_rng(0)
    basis, _ = np.linalg.qr(random.normal(size=(30, 30)))
    values = np.concatenate([[-50.0, 4.0], random.uniform(-1, 1, size=28)])
    matrix = basis * values @ basis.T
    for scale in (1.0, 1e-20, 1e20):
        found = statistics.largest_eigenvalue(
            (scale * matrix).__matmul__, random.normal(size=30))
        assert found == pytest.approx(4 * scale, rel=1e-3)
    assert statistics.largest_eigenvalue(np.zeros((30, 30)).__matmul__, random.normal(size=30)) == 0


@pytest.mark.parametrize("confidence", [0.5, 0.95])
def test_the_interval_of_a_difference_is_that_of_students_test(confidence):
    first, second = [1.0, 2.0, 4.0], [2.0, 2.5, 7.0, 9.0]
    low, high = stats.ttest_ind(first, second).confidence_interval(confidence)
    found = statistics.mean_difference_interval(first, second, confidence)
    assert found == pytest.approx((high - low) / 2)
    assert statistics.mean_difference_interval([1.0], [2.0]) is None
    # Both tails of a normal of standard deviation 5.
    half = statistics.normal_interval(3.0, 4.0, confidence=confidence)
    assert 2 * stats.norm.sf(half / 5) == pytest.approx(1 - confidence)


@pytest.mark.parametrize("successes", [0, 3, 10])
def test_the_upper_bound_leaves_so_few_successes_just_plausible(successes):
    bound = statistics.share_upper_bound(successes, 10, 0.05)
    if successes == 10:
        assert bound == 1
    else:
        assert stats.binom.cdf(successes, 10, bound) == pytest.approx(0.05)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: statistics.share_error(1.1, 3), "share=1.1"),
    (lambda: statistics.share_error(0.5, 0), "number=0"),
    (lambda: statistics.share_upper_bound(4, 3, 0.1), "successes=4"),
    (lambda: statistics.share_upper_bound(1, 3, 1.0), "failure_probability=1.0"),
    (lambda: statistics.pooled_std([1.0], []), "number of values=0"),
    (lambda: statistics.mean_difference_interval([1.0, 2.0], [1.0], 1.0), "confidence=1.0"),
    (lambda: statistics.normal_interval(1.0, confidence=0.0), "confidence=0.0"),
    (lambda: statistics.pearson(np.ones(3), np.ones(4)), r"Expected y of the shape of x, \(3,\)"),
    (lambda: RankCorrelations({"x": np.ones(3)}, np.ones(2), seed=0), "Expected x of shape"),
    (lambda: RankCorrelations({"x": np.ones(3)}, np.ones(3), seed=0, num_resamples=0),
     "num_resamples=0"),
    (lambda: MeanRankCorrelations({"x": np.ones((2, 3))}, np.ones(3), seed=0),
     "Expected groups of shape"),
    (lambda: MeanRankCorrelations({"x": np.full((1, 3), np.nan)}, np.ones(1), seed=0),
     "without NaN in the cases"),
    (lambda: statistics.lowest_means(np.ones(3), np.ones((1, 3)), [0.0]), "share=0.0"),
    (lambda: statistics.neighbour_accuracy(np.ones((3, 1)), np.ones(3, int), num_neighbours=3),
     "num_neighbours=3"),
    (lambda: statistics.largest_eigenvalue(lambda x: x, np.ones(2)), "size=2"),
    (lambda: statistics.largest_stable_rate(1.0, 1.0), "momentum=1.0"),
])
def test_bad_arguments_are_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("successes, number", [(0, 10), (3, 10), (10, 10), (480, 500)])
def test_wilsons_interval_holds_the_shares_that_a_score_test_does_not_reject(successes, number):
    # The ends p solve (s / n - p)^2 = z^2 p (1 - p) / n.
    z = stats.norm.ppf(0.975)
    share = successes / number
    expected = np.sort(np.roots([1 + z**2 / number, -2 * share - z**2 / number, share**2]))
    np.testing.assert_allclose(
        statistics.share_interval(successes, number), expected, rtol=1e-10, atol=1e-12)


def test_wilsons_interval_refuses_more_successes_than_trials():
    with pytest.raises(InputError, match=r"Expected successes=11 in \[0, 10\]"):
        statistics.share_interval(11, 10)


@hypothesis.given(random=SAMPLES, number=st.integers(1, 12), values=st.integers(1, 3))
@hypothesis.settings(max_examples=30)
def test_the_front_has_the_cases_that_no_other_dominates(random, number, values):
    cases = random.integers(0, 4, (number, values))  # Many are alike.

    def dominates(one, other):
        return (one >= other).all() and (one > other).any()

    expected = [not any(dominates(other, one) for other in cases) for one in cases]
    assert any(expected)
    np.testing.assert_array_equal(statistics.pareto_front(cases), expected)


def test_a_front_of_values_that_are_not_numbers_is_refused():
    with pytest.raises(InputError, match="finite values"):
        statistics.pareto_front(np.array([[1.0, np.nan]]))
    with pytest.raises(InputError, match=r"values of shape \[n, K\]"):
        statistics.pareto_front(np.zeros(3))
