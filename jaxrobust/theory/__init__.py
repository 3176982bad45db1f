"""What Theorems 6.1 to 6.3 bound, and their bounds, a module for each.

A ``loss`` is a function ``images [B, ...] -> [B]`` and a ``features_fn`` one to ``[B, d]``, row i
depending on image i alone, as in :mod:`jaxrobust.curvature`, which also says what becomes of an
eager call. Losses and divergences are in nats, sigma in the units of the images, delta and radii in
those of the features.
"""

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
