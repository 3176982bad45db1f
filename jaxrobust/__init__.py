"""Training image classifiers that keep their accuracy when inputs are noisy, in JAX.

The names here need nothing but JAX, chex and matfree; ``jaxrobust.models``, ``methods``,
``training``, ``evaluation``, ``data`` and ``checkpoints`` bring in Flax, Optax and Orbax.
"""

from jaxrobust._validate import InputError
from jaxrobust.centroids import Centroids, CentroidState, init_centroids, update_centroids
from jaxrobust.curvature import (
    Estimate,
    RitzValues,
    SmoothedCurvature,
    SpectralDensity,
    Surface,
    finite_difference_curvature,
    gauss_newton_gap,
    hessian_trace,
    hvp,
    leave_one_out_squared_frobenius,
    loss_surface,
    normalised_inputs,
    piecewise_linear_spectrum,
    ritz_values,
    smoothed_curvature,
    spectral_density,
    squared_frobenius,
    top_eigenvalues,
)
from jaxrobust.geometry import (
    class_dispersion,
    class_margin,
    rescale_head,
    signed_boundary_distance,
)
from jaxrobust.losses import (
    AUTHORS_RELEASE,
    RobustLossConfig,
    RobustLossTerms,
    centroid_norm_loss,
    compactness_loss,
    margin_loss,
    robust_loss,
    softmax_cross_entropy,
    stability_loss,
)
from jaxrobust.perturbations import gaussian, identity, per_example, uniform
from jaxrobust.theory import (
    curvature_lower_bound,
    curvature_upper_bound,
    feature_stability,
    generalization_bound,
    held_out_bound,
    jensen_shannon_bound,
    ramp_loss,
    smoothed_curvature_bound,
)

__version__ = "0.1.0"

__all__ = [
    "AUTHORS_RELEASE",
    "CentroidState",
    "Centroids",
    "Estimate",
    "InputError",
    "RitzValues",
    "RobustLossConfig",
    "RobustLossTerms",
    "SmoothedCurvature",
    "SpectralDensity",
    "Surface",
    "centroid_norm_loss",
    "class_dispersion",
    "class_margin",
    "compactness_loss",
    "curvature_lower_bound",
    "curvature_upper_bound",
    "feature_stability",
    "finite_difference_curvature",
    "gauss_newton_gap",
    "gaussian",
    "generalization_bound",
    "held_out_bound",
    "hessian_trace",
    "hvp",
    "identity",
    "init_centroids",
    "jensen_shannon_bound",
    "leave_one_out_squared_frobenius",
    "loss_surface",
    "margin_loss",
    "normalised_inputs",
    "per_example",
    "piecewise_linear_spectrum",
    "ramp_loss",
    "rescale_head",
    "ritz_values",
    "robust_loss",
    "signed_boundary_distance",
    "smoothed_curvature",
    "smoothed_curvature_bound",
    "softmax_cross_entropy",
    "spectral_density",
    "squared_frobenius",
    "stability_loss",
    "top_eigenvalues",
    "uniform",
    "update_centroids",
]
