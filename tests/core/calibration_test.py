"""Calibration and detection: numbers derived by hand, scikit-learn's, and minima found on grids."""

import pathlib

import jax.numpy as jnp
import markdown
import numpy as np
import pytest
import scipy.special
import sklearn.calibration
import sklearn.metrics

from jaxrobust import metrics
from jaxrobust._validate import InputError

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "evaluation.md"
RANDOM = np.random.default_rng(0)
LOGITS = RANDOM.normal(size=(300, 4)).astype(np.float32) * 2
# Drawn with the probabilities that LOGITS have at a temperature of 2.
LABELS = (LOGITS / 2 + RANDOM.gumbel(size=LOGITS.shape)).argmax(axis=1).astype(np.int32)
PROBABILITIES = scipy.special.softmax(LOGITS.astype(float), axis=1)
CONFIDENCE = PROBABILITIES.max(axis=1)
CORRECT = LOGITS.argmax(axis=1) == LABELS

# Confidences 0.9, 0.9, 0.6, 0.5 of two classes; the first and the third are right.
FOUR = np.log(np.array([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4], [0.5, 0.5]]))
FOUR_LABELS = np.array([0, 0, 0, 1])


def test_losses_are_those_of_scikit_learn():
    classes = np.arange(4)
    assert metrics.negative_log_likelihood(LOGITS, LABELS) == pytest.approx(
        sklearn.metrics.log_loss(LABELS, PROBABILITIES, labels=classes), rel=1e-12)
    one_hot = np.eye(4)[LABELS]
    assert metrics.brier_score(LOGITS, LABELS) == pytest.approx(
        np.mean([sum((p - y)**2) for p, y in zip(PROBABILITIES, one_hot, strict=True)]), rel=1e-12)
    assert metrics.brier_score(FOUR, FOUR_LABELS) == pytest.approx(
        2 * (0.01 + 0.81 + 0.16 + 0.25) / 4)
    assert metrics.brier_score(FOUR[:1], FOUR_LABELS[:1]) == pytest.approx(0.02)


def test_the_loss_of_a_confident_mistake_is_not_cut():
    assert metrics.negative_log_likelihood(np.array([[0., 1000.], [0., -80.]]), np.array([0, 0])
                                           ) == pytest.approx(500 + np.exp(-80.) / 2)


def test_the_error_of_a_few_predictions_is_that_derived_by_hand():
    # Bins of width 1/2: (0, 0.5] holds 0.5, argmax class 0, wrong; (0.5, 1] 0.9, 0.9, 0.6, of which
    # two are right.
    found = metrics.reliability_diagram(FOUR, FOUR_LABELS, num_bins=2)
    np.testing.assert_array_equal(found.edges, [0, 0.5, 1])
    np.testing.assert_array_equal(found.count, [1, 3])
    np.testing.assert_allclose(found.confidence, [0.5, 0.8])
    np.testing.assert_allclose(found.accuracy, [0, 2 / 3])
    assert metrics.expected_calibration_error(FOUR, FOUR_LABELS, num_bins=2) == pytest.approx(
        0.25 * 0.5 + 0.75 * (0.8 - 2 / 3))
    # Halves by mass: 0.5 and 0.6; 0.9 and 0.9. One of two is right in both.
    halves = metrics.reliability_diagram(FOUR, FOUR_LABELS, num_bins=2, bins="equal mass")
    np.testing.assert_allclose(halves.edges, [0.5, 0.6, 0.9])
    np.testing.assert_array_equal(halves.count, [2, 2])
    assert metrics.expected_calibration_error(
        FOUR, FOUR_LABELS, num_bins=2, bins="equal mass") == pytest.approx((0.05 + 0.4) / 2)
    # Class 0: 0.1 and 0.5 in the lower bin, class 0 once; 0.6 and 0.9 in the upper, both class 0.
    # Class 1: 0.1, 0.4 and 0.5, class 1 once; 0.9, class 0.
    assert metrics.classwise_calibration_error(FOUR, FOUR_LABELS, num_bins=2) == pytest.approx(
        ((0.4 + 0.5) / 4 + (0.0 + 0.9) / 4) / 2)


@pytest.mark.parametrize("bins, strategy", [("equal width", "uniform"), ("equal mass", "quantile")])
def test_bins_are_those_of_scikit_learn(bins, strategy):
    found = metrics.reliability_diagram(LOGITS, LABELS, num_bins=15, bins=bins)
    accuracy, confidence = sklearn.calibration.calibration_curve(
        CORRECT, CONFIDENCE, n_bins=15, strategy=strategy)
    filled = found.count > 0
    np.testing.assert_allclose(found.accuracy[filled], accuracy)
    np.testing.assert_allclose(found.confidence[filled], confidence)
    assert found.count.sum() == 300 and np.isnan(found.accuracy[~filled]).all()
    assert filled.all() == (bins == "equal mass")
    if bins == "equal mass":
        np.testing.assert_array_equal(found.count, 20)
    assert metrics.expected_calibration_error(LOGITS, LABELS, bins=bins) == pytest.approx(
        np.sum(found.count[filled] * np.abs(accuracy - confidence)) / 300)
    by_class = []
    for label in range(4):
        share, mean = sklearn.calibration.calibration_curve(
            LABELS == label, PROBABILITIES[:, label], n_bins=15, strategy=strategy)
        edges = (np.linspace(0, 1, 16) if strategy == "uniform" else
                 np.quantile(PROBABILITIES[:, label], np.linspace(0, 1, 16)))
        sizes = np.histogram(PROBABILITIES[:, label], edges)[0]
        by_class.append(np.sum(sizes[sizes > 0] * np.abs(share - mean)) / 300)
    assert metrics.classwise_calibration_error(LOGITS, LABELS, bins=bins) == pytest.approx(
        np.mean(by_class))


def test_a_confidence_of_one_and_equal_ones_are_in_one_bin():
    logits = np.array([[1000., 0.]] * 3)
    for bins in metrics.BINS:
        found = metrics.reliability_diagram(logits, np.array([0, 0, 1]), num_bins=3, bins=bins)
        assert sorted(found.count) == [0, 0, 3]
        assert np.nanmax(found.confidence) == 1
        assert np.nanmax(found.accuracy) == pytest.approx(2 / 3)


def test_probabilities_that_are_the_shares_are_calibrated():
    logits = np.log(np.tile([[0.7, 0.2, 0.1]], (10, 1)))
    labels = np.repeat([0, 1, 2], [7, 2, 1])
    assert metrics.expected_calibration_error(logits, labels) == pytest.approx(0)
    assert metrics.classwise_calibration_error(logits, labels) == pytest.approx(0)
    assert metrics.fit_temperature(logits, labels) == pytest.approx(1, rel=1e-10)


def test_the_temperature_is_that_of_least_loss():
    temperature = metrics.fit_temperature(LOGITS, LABELS)
    least = metrics.negative_log_likelihood(LOGITS / np.float64(temperature), LABELS)
    grid = temperature * np.exp(np.linspace(-3, 3, 101))
    losses = [metrics.negative_log_likelihood(LOGITS / other, LABELS) for other in grid]
    assert min(losses) >= least - 1e-14 and np.argmin(losses) == 50
    assert temperature == pytest.approx(2, rel=0.2)
    assert metrics.expected_calibration_error(
        LOGITS / temperature, LABELS) < metrics.expected_calibration_error(LOGITS, LABELS)
    for factor in (1e-4, 1e4):
        assert metrics.fit_temperature(LOGITS.astype(float) * factor, LABELS) == pytest.approx(
            temperature * factor, rel=1e-10)
    # Two classes, a gap of log 9, three of four right: log 9 / T = log 3.
    logits = np.tile([[np.log(9.), 0.]], (4, 1))
    assert metrics.fit_temperature(logits, np.array([0, 0, 0, 1])) == pytest.approx(2, rel=1e-10)


def test_accuracy_over_coverage_is_that_derived_by_hand():
    found = metrics.coverage_curve(np.array([3., 1., 2., 4.]), np.array([True, True, False, False]))
    np.testing.assert_allclose(found.coverage, [0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(found.accuracy, [1, 1 / 2, 2 / 3, 1 / 2])
    assert found.area == pytest.approx((1 + 1 / 2 + 2 / 3 + 1 / 2) / 4)
    # A wrong and a right one of equal doubt: the mean over both orders.
    tied = metrics.coverage_curve(np.array([2., 1., 1., 3.]), np.array([False, True, False, True]))
    np.testing.assert_allclose(tied.accuracy, [1 / 2, 1 / 2, 1 / 3, 1 / 2])
    constant = metrics.coverage_curve(np.zeros(300), CORRECT)
    np.testing.assert_allclose(constant.accuracy, CORRECT.mean())
    useful = metrics.coverage_curve(-CONFIDENCE, CORRECT)
    assert useful.area > CORRECT.mean() and useful.accuracy[-1] == pytest.approx(CORRECT.mean())


def test_detection_takes_strange_images_as_positive():
    familiar, strange = np.arange(10.), np.array([20.] * 18 + [6.5, -1.])
    found = metrics.detection_quality(familiar, strange)
    # 19 of 20 strange ones reach 6.5, as 7, 8 and 9 of the ten familiar ones do.
    assert found.fpr == 0.3
    assert metrics.detection_quality(familiar, strange, true_positive_rate=1.0).fpr == 1
    assert found.auroc == pytest.approx((18 * 10 + 7 + 0) / 200)
    # Precision at the strange ones: 18 times 1, then 19 of 22, then 20 of 30.
    assert found.aupr_strange == pytest.approx((18 + 19 / 22 + 20 / 30) / 20)
    # From the least strange on: 0 to 6 after -1 (1/2 .. 7/8), then 7, 8 and 9 after 6.5 too.
    assert found.aupr_familiar == pytest.approx(
        (sum(i / (i + 1) for i in range(1, 8)) + sum(i / (i + 2) for i in (8, 9, 10))) / 10)
    other = metrics.detection_quality(-strange, -familiar)  # The other kind as positive.
    assert (other.auroc, other.aupr_strange) == pytest.approx((found.auroc, found.aupr_familiar))


def test_detection_is_what_scikit_learn_says_and_ties_count_half():
    familiar, strange = RANDOM.normal(size=200).round(1), RANDOM.normal(size=100).round(1) + 1
    found = metrics.detection_quality(familiar, strange)
    scores, positive = np.concatenate([familiar, strange]), np.repeat([False, True], [200, 100])
    assert found.auroc == pytest.approx(sklearn.metrics.roc_auc_score(positive, scores))
    assert found.aupr_strange == pytest.approx(
        sklearn.metrics.average_precision_score(positive, scores))
    threshold = max(score for score in scores if np.mean(strange >= score) >= 0.95)
    assert found.fpr == np.mean(familiar >= threshold)
    same = metrics.detection_quality(np.zeros(5), np.zeros(5))
    assert (same.auroc, same.fpr, same.aupr_strange) == (0.5, 1, 0.5)


def test_the_nearest_class_is_the_smallest_distance_of_all():
    features = RANDOM.normal(size=(30, 3)).astype(np.float32)
    labels = np.arange(30) % 5
    statistics = metrics.class_statistics(features, labels, 5)
    for distance in (metrics.mahalanobis_distance, metrics.scaled_distance):
        every = [distance(features, jnp.full(30, label), statistics) for label in range(5)]
        np.testing.assert_allclose(
            metrics.nearest_distance(distance, jnp.asarray(features), statistics),
            np.min(every, axis=0), rtol=1e-6)


def test_neighbours_are_counted_on_the_sphere():
    training = np.array([[1., 0.], [0., 3.], [-2., 0.], [5., 5.]])
    features = np.array([[10., 0.], [0., 0.]])
    near = 2 * np.sin(np.pi / 8)  # The chord of 45 degrees.
    for k, distance in ((1, 0), (2, near), (3, 2**0.5), (4, 2)):
        np.testing.assert_allclose(
            metrics.knn_distance(features, training, num_neighbours=k), [distance, 1], atol=1e-7)
    many = RANDOM.normal(size=(400, 20)).astype(np.float32)
    unit = many / np.linalg.norm(many, axis=1, keepdims=True)
    expected = np.sort(np.linalg.norm(unit[:5, None] - unit[None], axis=2), axis=1)[:, 49]
    np.testing.assert_allclose(metrics.knn_distance(many[:5], many), expected, rtol=1e-5)


def test_energy_at_a_temperature_is_that_of_the_definition():
    expected = -3 * np.log(np.exp(LOGITS.astype(float) / 3).sum(axis=1))
    np.testing.assert_allclose(metrics.energy(jnp.asarray(LOGITS), 3.0), expected, rtol=1e-5)


def test_the_example_of_the_page_runs():
    names = {"held_out_logits": LOGITS[:100], "held_out_labels": LABELS[:100],
             "logits": LOGITS[100:], "labels": LABELS[100:], "strange_logits": LOGITS[:50] / 9}
    exec(markdown.program(PAGE.read_text(), "Calibration and strange images"), names)
    assert names["temperature"] == metrics.fit_temperature(LOGITS[:100], LABELS[:100])
    assert names["diagram"].count.sum() == 200


def with_logits(place, value):
    logits = LOGITS.copy()
    logits[place] = value
    return logits


@pytest.mark.parametrize("measure", [
    metrics.negative_log_likelihood, metrics.brier_score, metrics.reliability_diagram,
    metrics.expected_calibration_error, metrics.classwise_calibration_error,
    metrics.fit_temperature])
@pytest.mark.parametrize("logits, labels, message", [
    (with_logits([0, 7], np.nan), LABELS, "for 2 of 300 images, the first at index 0"),
    (with_logits(3, -np.inf), LABELS, "for 1 of 300 images, the first at index 3"),
    (LOGITS, np.where(np.arange(300) == 5, 4, LABELS), r"labels in \[0, 4\), got 4 at index 5"),
    (LOGITS, LABELS - 1, "got -1 at index"),
    (LOGITS, LABELS[:9], "Expected labels of shape"),
    (LOGITS, LABELS.astype(float), "integer dtype"),
    (LOGITS[:, :1], LABELS * 0, "number of classes=1"),
    (LOGITS[:0], LABELS[:0], "no size 0"),
])
def test_bad_logits_and_labels_are_named(measure, logits, labels, message):
    with pytest.raises(InputError, match=message):
        measure(logits, labels)


@pytest.mark.parametrize("call, message", [
    (lambda: metrics.reliability_diagram(LOGITS, LABELS, num_bins=0), "num_bins=0"),
    (lambda: metrics.reliability_diagram(LOGITS, LABELS, bins="equal_width"),
     "Unknown bins 'equal_width'. Did you mean 'equal width'"),
    (lambda: metrics.fit_temperature(LOGITS, LOGITS.argmax(axis=1)), "of which some are wrong"),
    (lambda: metrics.fit_temperature(LOGITS, LOGITS.argmin(axis=1)), "larger for the label than"),
    (lambda: metrics.fit_temperature(np.zeros((3, 4)), LABELS[:3]), "of which some are wrong"),
    (lambda: metrics.coverage_curve(np.ones(3), np.ones(2, bool)), "Expected correct of shape"),
    (lambda: metrics.coverage_curve(np.full(3, np.nan), np.ones(3, bool)), "got 3 that are NaN"),
    (lambda: metrics.detection_quality(np.ones(0), np.ones(3)), "Expected familiar of shape"),
    (lambda: metrics.detection_quality(np.ones(3), np.full(3, np.inf)),
     "Expected finite scores of strange images, got 3 that are NaN"),
    (lambda: metrics.detection_quality(np.ones(3), np.ones(3), true_positive_rate=0),
     "true_positive_rate=0"),
    (lambda: metrics.knn_distance(LOGITS, LOGITS[:5], 6), r"num_neighbours=6 in \[1, 5\]"),
    (lambda: metrics.knn_distance(LOGITS, LOGITS[:5, :2], 2), "training_features of shape"),
    (lambda: metrics.knn_distance(with_logits(0, np.nan), LOGITS, 2), "Expected finite features"),
    (lambda: metrics.energy(jnp.asarray(LOGITS), 0.0), "temperature=0.0"),
])
def test_bad_arguments_are_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
