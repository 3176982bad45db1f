"""Scores of doubt, against their definitions in float64 and numbers derived by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust import metrics
from jaxrobust._validate import InputError

# Two classes of two features. The first spreads along x, by 3 and -3; the second along y, by 1 and
# -1, thrice as many.
FEATURES = np.array([[7, 0], [1, 0], [0, 6], [0, 4], [0, 6], [0, 4], [0, 6], [0, 4]], np.float32)
LABELS = np.array([0, 0, 1, 1, 1, 1, 1, 1])


def test_improbability_keeps_the_small_numbers_of_confident_images():
    gaps = np.array([[20, 0, -1], [1, 1, 1], [0, -80, -80], [-5, 700, 2]], np.float32)
    right = [np.exp(-20.) * (1 + np.exp(-1.)), 2 / 3, 2 * np.exp(-80.), 0]
    right[0] /= 1 + right[0]
    np.testing.assert_allclose(metrics.improbability(jnp.asarray(gaps)), right, rtol=1e-5, atol=0)
    assert metrics.improbability(jnp.zeros((2, 1)))[0] == 0  # One class alone is certain.


def test_energy_is_minus_the_logarithm_of_the_sum():
    logits = np.array([[1., 2., 3.], [1000., 0., 0.]])
    np.testing.assert_allclose(metrics.energy(jnp.asarray(logits, jnp.float32)),
                               [-np.log(np.exp(logits[0]).sum()), -1000], rtol=1e-6)


def test_statistics_are_those_of_the_definition():
    found = metrics.class_statistics(FEATURES, LABELS, 2)
    np.testing.assert_array_equal(found.mean, [[4, 0], [0, 5]])
    np.testing.assert_array_equal(found.scale, [3, 1])
    # Variances 18/8 and 6/8, uncorrelated: S = diag(2.25, 0.75), mu = 1.5. Ledoit and Wolf's rho is
    # b2 / d2 with d2 = |S - mu I|^2 / d = (0.75^2 + 0.75^2) / 2 = 0.5625 and
    # b2 = mean_n |x_n x_n^T - S|^2 / (N d) = ((2 (9^2) + 6 (1^2)) / 8 - (2.25^2 + 0.75^2)) / 16
    #    = (21 - 5.625) / 16 = 0.9609375, more than d2, at which it is cut: rho = 1.
    np.testing.assert_allclose(found.precision, np.eye(2) / 1.5, rtol=1e-6)
    many = metrics.class_statistics(np.tile(FEATURES, (100, 1)), np.tile(LABELS, 100), 2)
    rho = 0.009609375 / 0.5625  # A hundred times as many images: b2 is a hundredth.
    variances = (1 - rho) * np.array([2.25, 0.75]) + rho * 1.5
    np.testing.assert_allclose(many.precision, np.diag(1 / variances), rtol=1e-6, atol=1e-7)


def test_statistics_of_classes_that_are_points():
    features, labels = np.array([[1., 0.], [3., 0.], [9., 9.]]), np.array([0, 0, 1])
    found = metrics.class_statistics(features, labels, 2)
    # The second class has one image: its scale is that of all, sqrt((1 + 1 + 0) / 3).
    np.testing.assert_allclose(found.scale, [1, np.sqrt(2 / 3)], rtol=1e-6)
    points = metrics.class_statistics(np.eye(2), np.arange(2), 2)
    np.testing.assert_array_equal(points.scale, [1, 1])
    assert np.isfinite(points.precision).all()


def test_distances_are_those_to_the_class_that_is_named():
    statistics = metrics.ClassStatistics(
        np.array([[4, 0], [0, 5]], np.float32), np.array([3, 1], np.float32),
        np.diag([4, 1 / 9]).astype(np.float32))
    features, classes = jnp.array([[4., 3.], [4., 3.], [0., 5.]]), jnp.array([0, 1, 1])
    np.testing.assert_allclose(
        metrics.scaled_distance(features, classes, statistics), [1, 20**0.5, 0], rtol=1e-6)
    np.testing.assert_allclose(
        metrics.mahalanobis_distance(features, classes, statistics),
        [1, (16 * 4 + 4 / 9)**0.5, 0], rtol=1e-6)


def test_auroc_is_the_share_of_pairs_and_ties_count_half():
    doubt, correct = np.array([3., 1., 0., 1., 2.]), np.array([False, False, True, True, True])
    assert metrics.auroc(doubt, correct) == pytest.approx((3 + 1.5) / 6)
    assert metrics.auroc(-doubt, correct) == pytest.approx(1 - 4.5 / 6)
    assert metrics.auroc(np.zeros(5), correct) == 0.5


def test_the_threshold_covers_the_share_asked_for_and_no_more():
    doubt = np.arange(10)[::-1] / 10
    for coverage, accepted in ((0.9, 9), (0.85, 9), (0.05, 1), (1, 10), (0.7, 7), (0.3, 3)):
        threshold = metrics.doubt_threshold(doubt, coverage)
        assert np.sum(doubt <= threshold) == accepted
    assert metrics.doubt_threshold(np.array([2., 2., 2.]), 0.5) == 2


@pytest.mark.parametrize("call, message", [
    (lambda: metrics.auroc(np.ones(3), np.ones(3, bool)), "got 3 right of 3"),
    (lambda: metrics.auroc(np.ones(0), np.ones(0, bool)), "no size 0"),
    (lambda: metrics.auroc(np.array([1, np.nan]), np.array([True, False])), "got 1 that are NaN"),
    (lambda: metrics.auroc(np.ones(3), np.ones(2, bool)), "Expected correct of shape"),
    (lambda: metrics.doubt_threshold(np.ones(3), 0), "Expected coverage=0"),
    (lambda: metrics.doubt_threshold(np.ones(0), 0.5), "no size 0"),
    (lambda: metrics.class_statistics(FEATURES, LABELS, 3), "got none of class 2"),
    (lambda: metrics.class_statistics(np.full((8, 2), np.inf), LABELS, 2), "got 16 that are NaN"),
    (lambda: metrics.class_statistics(FEATURES, LABELS, 1), "Expected labels in"),
    (lambda: metrics.energy(jnp.ones(3)), "Expected logits of shape"),
])
def test_bad_input_is_one_line(call, message):
    with pytest.raises(InputError, match=message):
        call()
