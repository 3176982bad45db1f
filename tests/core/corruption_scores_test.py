"""Scores of classifiers under corruptions and perturbations."""

import numpy as np
import pytest

from jaxrobust import InputError, corruptions

ERRORS = {"fog": (0.1, 0.3), "snow": (0.4, 0.6)}
BASELINE = {"fog": (0.2, 0.6), "snow": (0.5, 0.75)}


def test_scores_are_those_of_their_definitions():
    assert corruptions.mean_corruption_accuracy(ERRORS) == pytest.approx(1 - 0.35)
    assert corruptions.corruption_errors(ERRORS, BASELINE) == pytest.approx(
        {"fog": 0.4 / 0.8, "snow": 1.0 / 1.25})
    assert corruptions.mean_corruption_error(ERRORS, BASELINE) == pytest.approx(0.65)
    relative = {"fog": (0.4 - 0.1) / (0.8 - 0.2), "snow": (1 - 0.1) / (1.25 - 0.2)}
    options = {"clean": 0.05, "baseline_clean": 0.1}
    assert corruptions.relative_corruption_errors(
        ERRORS, BASELINE, **options) == pytest.approx(relative)
    assert corruptions.relative_mean_corruption_error(
        ERRORS, BASELINE, **options) == pytest.approx(np.mean(list(relative.values())))


def test_the_baseline_itself_scores_1_and_a_mean_stands_for_its_severities():
    alexnet = corruptions.ALEXNET_ERRORS
    assert corruptions.mean_corruption_error(alexnet, alexnet) == pytest.approx(1)
    means = {name: np.mean(values) for name, values in BASELINE.items()}
    assert corruptions.mean_corruption_error(ERRORS, means) == pytest.approx(0.65)


@pytest.mark.parametrize("errors, baseline, message", [
    ({}, BASELINE, "Expected errors of at least one corruption, got none."),
    (ERRORS, {"fog": 0.5}, "Expected errors and baseline of the same corruptions, got without the "
                           "other snow."),
    ({"fog": (0.5, 40.0)}, {"fog": 0.5}, "Expected errors of fog in [0, 1], got [ 0.5 40. ]."),
    ({"fog": float("nan")}, {"fog": 0.5}, "Expected errors of fog in [0, 1], got nan."),
    ({"fog": 0.5}, {"fog": 0.0}, "Expected a baseline error above 0 for fog, got 0.")])
def test_errors_that_are_none_are_named(errors, baseline, message):
    with pytest.raises(InputError) as caught:
        corruptions.mean_corruption_error(errors, baseline)
    assert str(caught.value) == message


def test_flips_are_counted_from_image_to_image_and_under_noise_from_the_first():
    predictions = np.array([[0, 1, 1, 0], [2, 2, 2, 2]])
    assert corruptions.flips(predictions, noise=False).tolist() == [2, 0]
    assert corruptions.flip_rate(predictions, noise=False) == pytest.approx(2 / 6)
    assert corruptions.flip_rate(predictions[:, [0, 1, 2, 2]], noise=True) == pytest.approx(3 / 6)
    assert corruptions.mean_flip_rate({"tilt": 0.2, "scale": 0.1}, {
        "tilt": 0.4, "scale": 0.4}) == pytest.approx(0.375)
    for wrong in (predictions[:, :1], predictions[0], predictions * 1.0):
        with pytest.raises(InputError, match="Expected"):
            corruptions.flip_rate(wrong, noise=False)
