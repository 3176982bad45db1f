"""What a classifier makes of corruptions and perturbations, in one number.

Hendrycks and Dietterich (2019), https://arxiv.org/abs/1903.12261, Section 4. Errors and accuracies
are shares in [0, 1].
"""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxrobust import _validate

ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640,
    "defocus_blur": 0.819880, "glass_blur": 0.826268, "motion_blur": 0.785948,
    "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572, "fog": 0.819324,
    "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056,
    "pixelate": 0.717840, "jpeg_compression": 0.606500,
}
"""Mean errors over the severities of the AlexNet that ImageNet-C is normalised by."""

SEQUENCES = ("gaussian_noise", "shot_noise", "motion_blur", "zoom_blur", "spatter", "brightness",
             "translate", "rotate", "tilt", "scale")
"""The perturbations of CIFAR-10-P over which its authors' code takes the mean."""

Errors = Mapping[str, float | Sequence[float]]
"""By corruption, the error of each severity, or their mean."""


def mean_corruption_accuracy(errors: Errors) -> float:
    r"""One minus the mean error over corruptions and severities.

    .. math:: 1 - \frac1{|C|} \sum_c \frac1S \sum_s E_{s,c}

    Args:
      errors: by corruption, the error of each severity, or their mean.

    Raises:
      InputError: (a ValueError) if there is none, or one is outside [0, 1].
    """
    return 1 - float(np.mean(list(_means("errors", errors).values())))


def corruption_errors(errors: Errors, baseline: Errors) -> dict[str, float]:
    r"""The corruption error of each corruption, relative to a baseline's.

    .. math:: CE_c = \sum_s E_{s,c} \Big/ \sum_s E^{base}_{s,c}

    Args:
      errors: by corruption, the error of each severity, or their mean.
      baseline: the same of the network to compare with, such as :data:`ALEXNET_ERRORS`.

    Returns:
      By corruption; 1 is as bad as the baseline.

    Raises:
      InputError: (a ValueError) if an error is outside [0, 1], both do not have the same
        corruptions, or the baseline makes no error.
    """
    return relative_corruption_errors(errors, baseline, clean=0.0, baseline_clean=0.0)


def relative_corruption_errors(
    errors: Errors, baseline: Errors, *, clean: float, baseline_clean: float
) -> dict[str, float]:
    r"""How much a corruption adds to the error, relative to a baseline.

    .. math:: \sum_s (E_{s,c} - E_{clean}) \Big/ \sum_s (E^{base}_{s,c} - E^{base}_{clean})

    Args:
      errors: by corruption, the error of each severity, or their mean.
      baseline: the same of the network to compare with.
      clean: the error without corruption.
      baseline_clean: that of the baseline.

    Raises:
      InputError: (a ValueError) as :func:`corruption_errors`, or if a corruption does not add to
        the baseline's error.
    """
    own, reference = _means("errors", errors), _means("baseline", baseline)
    for name, value in (("clean", clean), ("baseline_clean", baseline_clean)):
        _validate.in_range(name, value, 0, 1, open_high=False)
    if own.keys() != reference.keys():
        raise _validate.InputError(
            "Expected errors and baseline of the same corruptions, got without the other "
            f"{', '.join(sorted(own.keys() ^ reference.keys()))}.")
    for name, value in reference.items():
        if not value > baseline_clean:
            raise _validate.InputError(
                f"Expected a baseline error above {baseline_clean:g} for {name}, got {value:g}.")
    return {name: (value - clean) / (reference[name] - baseline_clean)
            for name, value in own.items()}


def mean_corruption_error(errors: Errors, baseline: Errors) -> float:
    """mCE: the mean of :func:`corruption_errors`, with its arguments and errors."""
    return float(np.mean(list(corruption_errors(errors, baseline).values())))


def relative_mean_corruption_error(
    errors: Errors, baseline: Errors, *, clean: float, baseline_clean: float
) -> float:
    """Relative mCE: the mean of :func:`relative_corruption_errors`, with its arguments and errors.
    """
    return float(np.mean(list(relative_corruption_errors(
        errors, baseline, clean=clean, baseline_clean=baseline_clean).values())))


def flips(predictions: np.ndarray, *, noise: bool) -> np.ndarray:
    r"""Counts how often a prediction changes along each sequence of slightly perturbed images.

    .. math:: \sum_{j=2}^T 1\{f(x_j) \ne f(x_{j-1})\}

    Sequences of noise are not ordered in time: there each image is compared with the first.

    Args:
      predictions: [m, T] integers, the predicted class of each image of m sequences; T >= 2.
      noise: whether the sequences are of noise, such as ``gaussian_noise``.

    Returns:
      [m] integers in [0, T - 1].

    Raises:
      InputError: (a ValueError) if predictions are not of that shape and kind.
    """
    predictions = np.asarray(predictions)
    length = _validate.shapes(predictions=(predictions, "m T"))["T"]
    _validate.in_range("length of the sequences", length, 2)
    if not np.issubdtype(predictions.dtype, np.integer):
        raise _validate.InputError(
            f"Expected predictions of an integer dtype, got {predictions.dtype}.")
    before = predictions[:, :1] if noise else predictions[:, :-1]
    return np.sum(predictions[:, 1:] != before, axis=1)


def flip_rate(predictions: np.ndarray, *, noise: bool) -> float:
    r"""How often a prediction changes along sequences of slightly perturbed images.

    .. math:: \frac1{m (T - 1)} \sum_i \sum_{j=2}^T 1\{f(x_j) \ne f(x_{j-1})\}

    The mean of :func:`flips` over the m sequences and their T - 1 changes, with its arguments and
    errors.
    """
    counts = flips(predictions, noise=noise)
    return float(np.mean(counts) / (np.shape(predictions)[1] - 1))


def mean_flip_rate(rates: Mapping[str, float], baseline: Mapping[str, float]) -> float:
    r"""mFR: the mean over perturbations of the flip rate relative to a baseline's.

    .. math:: \frac1{|P|} \sum_p FP_p / FP^{base}_p

    Args:
      rates: by perturbation, the :func:`flip_rate`.
      baseline: the same of the network to compare with.

    Raises:
      InputError: (a ValueError) as :func:`corruption_errors`.
    """
    return mean_corruption_error(rates, baseline)


def _means(name: str, errors: Errors) -> dict[str, float]:
    _validate.instance(name, errors, Mapping)
    if not errors:
        raise _validate.InputError(f"Expected {name} of at least one corruption, got none.")
    for corruption, values in errors.items():
        values = _validate.reals(f"{name} of {corruption}", values)
        if not values.size or not np.all((values >= 0) & (values <= 1)):
            raise _validate.InputError(
                f"Expected {name} of {corruption} in [0, 1], got {np.array2string(values)}.")
    return {corruption: float(np.mean(values)) for corruption, values in errors.items()}
