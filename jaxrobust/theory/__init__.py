"""Quantities that Theorems 6.1 to 6.3 bound, and the bounds: a module for each theorem."""

from jaxrobust.theory.mapping import (
    ball_margin,
    generalization_bound,
    held_out_bound,
    held_out_complexity,
    ramp_loss,
)
from jaxrobust.theory.separation import (
    jensen_shannon_bound,
    jensen_shannon_decision_bound,
    jensen_shannon_estimate,
    jensen_shannon_sharp_bound,
    smallest_distance_between_classes,
)
from jaxrobust.theory.stability import (
    FeatureStability,
    NoiseDraws,
    curvature_lower_bound,
    curvature_upper_bound,
    feature_stability,
    gaussian_noise,
    noise_draws,
    quadratic_model,
    quadratic_residual,
    quadratic_squared_change,
    smoothed_curvature_bound,
    smoothed_gradient_norm_squared,
    stability_of,
)

__all__ = [
    "FeatureStability", "NoiseDraws", "ball_margin", "curvature_lower_bound",
    "curvature_upper_bound", "feature_stability", "gaussian_noise", "generalization_bound",
    "held_out_bound", "held_out_complexity", "jensen_shannon_bound",
    "jensen_shannon_decision_bound", "jensen_shannon_estimate", "jensen_shannon_sharp_bound",
    "noise_draws", "quadratic_model", "quadratic_residual", "quadratic_squared_change",
    "ramp_loss", "smallest_distance_between_classes", "smoothed_curvature_bound",
    "smoothed_gradient_norm_squared", "stability_of",
]
