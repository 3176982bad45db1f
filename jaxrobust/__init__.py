"""Training image classifiers that keep their accuracy when inputs are noisy, in JAX.

Names and modules are imported when they are first used: the command line starts without JAX, and
the names here load nothing but JAX, chex and matfree, until those that need SciPy or scikit-learn
are called. ``jaxrobust.models``, ``training``, ``evaluation``, ``data`` and ``checkpoints`` bring
in Flax, Optax and Orbax.
"""

import importlib
from typing import Any

from jaxrobust._errors import InputError

__version__ = "0.1.0"

_HOMES = {
    "attacks": (
        "Ensemble", "MaskingCheck", "Randomised", "apgd", "auto_attack", "dlr_loss", "fab", "fgsm",
        "masking_checks", "pgd", "square_attack", "targeted_dlr_loss",
    ),
    "centroids": (
        "CentroidState", "Centroids", "init_centroids", "update_centroids",
    ),
    "certification": (
        "Certificate", "certified_accuracy", "certified_radius", "certify", "count_labels",
    ),
    "curvature": (
        "RitzValues", "SmoothedCurvature", "SpectralDensity", "Surface",
        "finite_difference_curvature", "gauss_newton_gap", "hessian_trace", "hvp",
        "leave_one_out_squared_frobenius", "loss_surface", "normalised_inputs",
        "piecewise_linear_spectrum", "ritz_values", "smoothed_curvature", "spectral_density",
        "squared_frobenius", "top_eigenvalues",
    ),
    "geometry": (
        "class_dispersion", "class_margin", "rescale_head", "signed_boundary_distance",
    ),
    "losses": (
        "AUTHORS_RELEASE", "RobustLossConfig", "RobustLossTerms", "centroid_norm_loss",
        "compactness_loss", "margin_loss", "robust_loss", "softmax_cross_entropy",
        "softmax_loss", "stability_loss",
    ),
    "metrics": (
        "ClassStatistics", "CoverageCurve", "Detection", "Reliability", "auroc", "brier_score",
        "class_statistics", "classwise_calibration_error", "coverage_curve", "detection_quality",
        "doubt_threshold", "energy", "expected_calibration_error", "fit_temperature",
        "improbability", "knn_distance", "mahalanobis_distance", "nearest_distance",
        "negative_log_likelihood", "reliability_diagram", "scaled_distance",
    ),
    "perturbations": (
        "gaussian", "identity", "per_example", "uniform",
    ),
    "probes": (
        "Estimate",
    ),
    "theory": (
        "curvature_lower_bound", "curvature_upper_bound", "feature_stability",
        "generalization_bound", "held_out_bound", "jensen_shannon_bound", "ramp_loss",
        "smoothed_curvature_bound",
    ),
}
"""The names that are here too, by the module they are from."""

_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = ["InputError", *sorted(_HOME_OF)]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(importlib.import_module(f"jaxrobust.{_HOME_OF[name]}"), name)
        globals()[name] = value
        return value
    module = f"jaxrobust.{name}"
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
    raise AttributeError(f"module 'jaxrobust' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
