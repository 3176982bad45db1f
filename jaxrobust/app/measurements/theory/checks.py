"""Checks the paper's claims on features: Sections 5, 6.2, 6.3 and A.1."""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxrobust import _validate, centroids, evaluation, geometry, losses, theory
from jaxrobust.app.measurements.accuracy import pooled_blocks
from jaxrobust.app.report.page import significant
from jaxrobust.app.trainer import TrainedRun, variables_of
from jaxrobust.data import Split
from jaxrobust.images import predicted_classes, to_float
from jaxrobust.models import head_parameters
from jaxrobust.statistics import share_upper_bound

FORWARD_BATCH_SIZE = 250


class Claim(NamedTuple):
    """What the paper claims, and what was found."""

    key: str
    claim: str
    measured: str
    holds: float | None  # share of the cases that ``claim`` names; None where there is none
    looseness: float | None = None  # median of bound / value; None where there is none


def share(holds: Sequence[float] | np.ndarray) -> float | None:
    """Returns the share of the cases in which a claim holds; None without any case."""
    return float(np.mean(holds)) if np.size(holds) else None


def median_ratio(bound: np.ndarray | float, value: np.ndarray) -> float | None:
    """Returns the median of bound / value over the cases with a value above 0; None without any."""
    kept = value > 0
    bound = np.broadcast_to(bound, value.shape)
    return float(np.median(bound[kept] / value[kept])) if kept.any() else None


def median_text(values: Any) -> str:
    """Formats the median of the finite values; a dash if there are none."""
    finite = np.asarray(values)[np.isfinite(values)]
    return significant(float(np.median(finite))) if finite.size else "–"


def _yes(condition: bool) -> str:
    return "yes" if condition else "no"


class Layers(NamedTuple):
    """Outputs of the network's layers for some images."""

    features: jax.Array  # [N, d]
    logits: np.ndarray  # [N, C]
    pooled: dict[str, np.ndarray]  # each [N, channels]; the blocks' outputs, averaged over pixels
    labels: jax.Array  # [N]

    def distances(self, centres: jax.Array) -> np.ndarray:
        """Returns each example's distance [N] to the centre of its class."""
        return np.asarray(geometry.safe_norm(self.features - centres[self.labels]))

    def class_means(self) -> centroids.Centroids:
        """Returns the centroids of these images alone."""
        state = centroids.init_centroids(self.logits.shape[1], self.features.shape[1])
        return centroids.update_centroids(state, self.features, self.labels)[0]


@functools.partial(jax.jit, static_argnames="model")
def _forward(model, variables, images):
    outputs = model.apply(variables, to_float(images), train=False)
    return outputs.features, pooled_blocks(outputs), outputs.logits


def layers_of(run: TrainedRun, split: Split, params: Any = None) -> Layers:
    """Applies a run's network, with other parameters if given, to the images.

    Raises:
      InputError: (a ValueError) if logits are not finite.
    """
    variables = variables_of(run.state) | ({} if params is None else {"params": params})
    features, pooled, logits = evaluation.map_batches(
        lambda images: _forward(run.model, variables, images), split.images,
        batch_size=FORWARD_BATCH_SIZE)
    _validate.finite("logits", logits)
    return Layers(jnp.asarray(features), logits, pooled, jnp.asarray(split.labels))


# --- Section 5 and Appendix A.1 ----------------------------------------------------------------


def check_geometry(run: TrainedRun, train: Layers, test: Layers) -> tuple[dict, list[Claim]]:
    """Checks premises and conclusions of Propositions 5.1 and 5.2."""
    kernel, bias = head_parameters(run.state.params)
    delta_v, delta_d = run.config.robust.delta_v, run.config.robust.delta_d
    means = train.class_means()
    compact = float(losses.compactness_loss(
        train.features, train.labels, means.current, delta_v=delta_v))
    margin = float(losses.margin_loss(
        means.current, means.present, kernel, bias, delta_d=delta_d))
    facts: dict[str, Any] = {"compactness_loss": compact, "margin_loss": margin}
    measure = jax.jit(
        lambda features, labels: (geometry.class_dispersion(features, labels, len(bias)),
                                  geometry.class_margin(features, labels, kernel, bias),
                                  theory.smallest_distance_between_classes(features, labels)))
    for name, layers in (("train", train), ("test", test)):
        dispersion, class_margin, between = measure(layers.features, layers.labels)
        facts |= {f"{name}_dispersion": dispersion.tolist(),
                  f"{name}_margin": class_margin.tolist(),
                  f"{name}_smallest_distance_between_classes": float(between),
                  f"{name}_share_within_delta_v": float(np.mean(
                      layers.distances(means.current) <= delta_v))}
    dispersion, class_margin = (
        np.array(facts[f"train_{name}"]) for name in ("dispersion", "margin"))
    wanted = delta_d - delta_v
    largest, between = dispersion.max(), facts["train_smallest_distance_between_classes"]
    premise = f"L_compact = {significant(compact)}, L_margin = {significant(margin)}"
    both = compact == 0 and margin == 0
    return facts, [
        Claim("prop51", "Prop. 5.1: L_compact = 0 gives dispersion <= 2 delta_v (classes, training "
              "images)",
              f"{premise.split(',')[0]} (premise {_yes(compact == 0)}), "
              f"{100 * facts['train_share_within_delta_v']:.1f} % within delta_v = "
              f"{delta_v:g}, largest dispersion {significant(largest)}",
              share(dispersion <= 2 * delta_v), median_ratio(2 * delta_v, dispersion)),
        Claim("prop52_margin", "Prop. 5.2.1: both losses 0 and delta_d > delta_v give margin >= "
              "delta_d - delta_v (classes, training images)",
              f"{premise} (premise {_yes(both and wanted > 0)}), smallest "
              f"margin {significant(class_margin.min())} against {wanted:g}",
              share(class_margin >= wanted), median_ratio(wanted, class_margin)),
        Claim("prop52_distances", "Prop. 5.2.2: with delta_d > 2 delta_v, distances within a class "
              "are below those between classes (all pairs, training images)",
              f"largest within {significant(largest)}, smallest between {significant(between)} "
              f"(premise {_yes(both and delta_d > 2 * delta_v)})", float(largest < between)),
    ]


def check_rescaling(run: TrainedRun, split: Split, nus: tuple[float, ...]
                    ) -> tuple[dict, list[Claim]]:
    """Checks Proposition 5.3 and its corollary on the run's own network and these images."""
    def measure(params):
        layers, head = layers_of(run, split, params), head_parameters(params)
        return (np.asarray(predicted_classes(layers.logits)),
                geometry.class_dispersion(layers.features, layers.labels, len(head[1])).max(),
                geometry.class_margin(layers.features, layers.labels, *head).min())

    predictions, dispersion, margin = measure(run.state.params)
    params, _ = ravel_pytree(run.state.params)
    same, errors, moves = [], [], {}
    for nu in nus:
        rescaled = geometry.rescale_head(run.state.params, nu)
        there, dispersion_nu, margin_nu = measure(rescaled)
        same.append(float(np.mean(there == predictions)))
        errors += [abs(float(dispersion_nu / dispersion) / nu - 1),
                   abs(float(margin_nu / margin) / nu - 1)]
        moves[nu] = np.asarray(ravel_pytree(rescaled)[0] - params, np.float64)
    cosines = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
               for (nu, a), (mu, b) in itertools.combinations(moves.items(), 2)
               if (nu - 1) * (mu - 1) < 0]
    facts = {"nus": list(nus), "same_predictions": same,
             "largest_relative_error_of_the_factors": max(errors), "opposite_cosines": cosines}
    return facts, [
        Claim("prop53", "Prop. 5.3: T_nu keeps predictions and multiplies margin and dispersion by "
              "nu (test images and factors)",
              f"nu = {', '.join(f'{nu:g}' for nu in nus)}; relative error of the factors at most "
              f"{significant(max(errors))}", share(same)),
        Claim("cor51", "Cor. 5.1: T_nu and T_1/nu move the parameters in opposite directions "
              "(pairs of factors)",
              "cosines: " + (", ".join(f"{c:.6f}" for c in cosines) or "no pair"),
              share(np.array(cosines) < -0.9999))]


def check_hinge_gradients(run: TrainedRun, train: Layers) -> tuple[dict, list[Claim]]:
    """Checks Appendix A.1: norms of the gradient of each example's hinge."""
    kernel, bias = head_parameters(run.state.params)
    delta_v = run.config.robust.delta_v
    means = train.class_means()
    distances = train.distances(means.current)
    # The loss is a mean over classes of means over their examples.
    counts = np.bincount(train.labels, minlength=len(bias))
    weights = np.asarray(jnp.sum(means.present)) * counts[np.asarray(train.labels)]
    active = distances > delta_v * (1 + 1e-6)

    def norms(squared):
        gradient = jax.grad(lambda features: losses.compactness_loss(
            features, train.labels, means.current, delta_v=delta_v, squared=squared))
        return (weights * np.asarray(geometry.safe_norm(gradient(train.features))))[active]

    plain, squared = norms(False), norms(True)
    errors = np.abs([plain - 1, squared / (2 * (distances - delta_v))[active] - 1])
    moved = jax.grad(lambda centres: losses.margin_loss(
        centres, means.present, kernel, bias, delta_d=run.config.robust.delta_d))(means.current)
    margin_norms = np.asarray(geometry.safe_norm(moved)) * float(jnp.sum(means.present))
    pushed = margin_norms[margin_norms > 0]
    facts = {"share_active": float(active.mean()),
             "largest_relative_error": float(errors.max(initial=0)),
             "squared_norm_quantiles": np.quantile(squared, (0.05, 0.5, 0.95)).tolist()
             if active.any() else None, "margin_norms": margin_norms.tolist()}
    return facts, [
        Claim("a1", "App. A.1: the hinge's gradient has norm 1, squared 2 (||u - m|| - delta_v) "
              "(active training images, both forms)",
              f"{100 * active.mean():.1f} % active; squared: median norm {median_text(squared)}; "
              f"margin: {len(pushed)} active centroids, median norm {median_text(pushed)}",
              share(errors < 1e-3))]


# --- Theorem 6.2 -------------------------------------------------------------------------------

MAPPING_CLAIMS = {
    "theorem": "Thm 6.2 (Eq. 19), training images (classes and radii with a bound below 1)",
    "held_out": "Its repair for fixed features, held-out images, norms from 0 (the same)",
    "held_out_around": "The repair, norms from the training centroid (the same)",
    "fixed_centre": "Clopper-Pearson for a fixed centre, held-out images (the same)"}
"""Bounds on the share of test images outside the ball, by key."""


def check_mapping(train: Layers, test: Layers, settings: Any) -> tuple[dict, list[Claim]]:
    """Bounds the share of a class's test images outside a ball around its centroid.

    Those for held-out images are made on one half of them and judged on the other.
    """
    means = np.asarray(train.class_means().current)
    curves: dict[str, list[list[float]]] = {}
    radii = []
    for label, centre in enumerate(means):
        of_class = [np.asarray(layers.features[layers.labels == label])
                    for layers in (train, test)]
        rows = of_class[0], of_class[1][::2], of_class[1][1::2]
        distances = [np.linalg.norm(part - centre, axis=1) for part in rows]
        radii.append((np.median(distances[0]) * np.array(settings.radii)).tolist())
        found = [_mapping_bounds(rows, distances, centre, radius, settings)
                 for radius in radii[-1]]
        for name in found[0]:
            curves.setdefault(name, []).append([values[name] for values in found])
    error, claims = np.array(curves["error"]), []
    for name, claim in MAPPING_CLAIMS.items():
        bound = np.array(curves[name])
        informative = bound < 1
        claims.append(Claim(
            f"thm62_{name}", claim,
            f"bound below 1 in {100 * np.mean(informative):.1f} %, largest test error there "
            f"{significant(error[informative].max(initial=0))}; smallest bound "
            f"{significant(bound.min())}", share((error <= bound)[informative]),
            median_ratio(bound, error)))
    return {"radii_over_median_distance": list(settings.radii), "radii": radii, **curves}, claims


def _mapping_bounds(rows, distances, centre, radius, settings):
    """Returns the test error at one radius, and each bound on it (the best over rho).

    ``rows`` and ``distances`` belong to the class's training images, the test images from which
    bounds are computed, and those on which they are evaluated.
    """
    failure = settings.failure_probability / len(settings.rho_shares)
    norms = [np.linalg.norm(part, axis=1) for part in rows]
    found = {"error": float(np.mean(distances[2] > radius)),
             "train_error": float(np.mean(distances[0] > radius))}
    for name, bound, of, feature_bound, centre_bound in (
        ("theorem", theory.generalization_bound, 0, max(part.max() for part in norms),
         np.linalg.norm(centre)),
        ("held_out", theory.held_out_bound, 1, np.sqrt(np.mean(norms[1] ** 2)),
         np.linalg.norm(centre)),
        ("held_out_around", theory.held_out_bound, 1, np.sqrt(np.mean(distances[1] ** 2)),
         settings.centre_share * radius),
    ):
        margins = theory.ball_margin(jnp.asarray(rows[of]), jnp.asarray(centre), radius)
        found[name] = min(
            float(bound(jnp.mean(theory.ramp_loss(margins, rho)), rho=rho,
                        feature_bound=float(feature_bound), centre_bound=float(centre_bound),
                        num_samples=len(rows[of]), failure_probability=failure))
            for rho in (part * radius**2 for part in settings.rho_shares))
    found["fixed_centre"] = share_upper_bound(
        int(np.sum(distances[1] > radius)), len(rows[1]), settings.failure_probability)
    return found


# --- Theorem 6.3 -------------------------------------------------------------------------------


def check_separation(run: TrainedRun, train: Layers, test: Layers) -> tuple[dict, list[Claim]]:
    """Compares Theorem 6.3's bound with measured lower bounds of the divergence in each layer."""
    means, labels = np.asarray(train.class_means().current), np.asarray(test.labels)
    distances, classes = test.distances(jnp.asarray(means)), range(len(means))
    pairs = list(itertools.combinations(classes, 2))
    apart = np.array([np.linalg.norm(means[a] - means[b]) for a, b in pairs])
    delta_v = run.config.robust.delta_v

    def taus(radius):
        return np.array([np.mean(distances[labels == c] <= radius) for c in classes])

    def bound(function, *shares):
        return np.asarray(function(*(jnp.asarray(part, jnp.float32) for part in shares)))

    at_delta_v, widest = taus(delta_v), taus(apart.min() / 2)
    disjoint = bool(apart.min() > 2 * delta_v)
    pair_tau = np.array([taus(d / 2)[list(pair)].min()
                         for pair, d in zip(pairs, apart, strict=True)])
    # For each pair's classes, the share on the first one's side of their decision hyperplane.
    sides = np.array([[np.mean(test.logits[labels == c, a] > test.logits[labels == c, b])
                       for c in (a, b)] for a, b in pairs])
    layers = {**test.pooled, "features": np.asarray(test.features)}
    estimates = {name: divergences(values, labels, pairs) for name, values in layers.items()}
    pair_bound = bound(theory.jensen_shannon_bound, pair_tau)
    sharp = bound(theory.jensen_shannon_sharp_bound, pair_tau)
    by_decision = bound(theory.jensen_shannon_decision_bound, *sides.T)
    facts = {
        "tau_at_delta_v": at_delta_v.tolist(), "disjoint_at_delta_v": disjoint,
        "share_of_pairs_disjoint_at_delta_v": float(np.mean(apart > 2 * delta_v)),
        "bound_at_delta_v": float(bound(theory.jensen_shannon_bound, at_delta_v.min()))
        if disjoint else 0.0,
        "widest_disjoint_radius": float(apart.min() / 2), "tau_at_widest": widest.tolist(),
        "bound_at_widest": float(bound(theory.jensen_shannon_bound, widest.min())),
        "pairs": [list(pair) for pair in pairs], "pair_tau": pair_tau.tolist(),
        "pair_bound": pair_bound.tolist(), "pair_sharp_bound": sharp.tolist(),
        "pair_sides": sides.tolist(), "pair_decision_bound": by_decision.tolist(),
        "layers": list(layers),
        "divergence": {name: values.tolist() for name, (values, _) in estimates.items()},
        "divergence_standard_error": {
            name: errors.tolist() for name, (_, errors) in estimates.items()}}
    informative = pair_bound > 0
    return facts, [
        Claim("thm63", "Thm 6.3 (Eq. 20) at delta_v: its hypotheses (tau >= 1/2 in all classes, "
              "disjoint balls)",
              f"smallest tau {significant(at_delta_v.min())}; centroids more than 2 delta_v apart: "
              f"{_yes(disjoint)}; bound {significant(facts['bound_at_delta_v'])} of at most log 2 "
              f"= {math.log(2):.3f} nats; with the widest disjoint balls: smallest tau "
              f"{significant(widest.min())}, bound {significant(facts['bound_at_widest'])}",
              float(at_delta_v.min() >= 0.5 and disjoint)),
        Claim("thm63_decision", "Each pair's decision hyperplane instead of the balls, in "
              "every layer (pairs with a bound above that of Eq. 20)",
              f"bound: smallest {significant(by_decision.min())}, median "
              f"{median_text(by_decision)} nats", share(by_decision > pair_bound)),
        *(Claim(f"thm63_{name}", f"Thm 6.3 at {name}, each pair of classes with balls that touch: "
                "bound <= estimated lower bound of the divergence (pairs with a bound above 0)",
                f"divergence at least: smallest {significant(values.min())}, median "
                f"{median_text(values)} nats; bound: above 0 for {100 * np.mean(informative):.1f} "
                f"%, median {median_text(pair_bound)}, sharp {median_text(sharp)}",
                share((pair_bound <= values)[informative]),
                median_ratio(pair_bound[informative], values[informative]))
          for name, (values, _) in estimates.items())]


def divergences(values: np.ndarray, labels: np.ndarray, pairs: list[tuple[int, int]]
                ) -> tuple[np.ndarray, np.ndarray]:
    """Estimates lower bounds [P] of the pairs' divergences in nats, with standard errors [P].

    A logistic regression for each pair is fitted on every other image of a class, and judged on
    the rest.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rank = np.zeros(len(labels), int)  # of an image among those of its class
    for label in np.unique(labels):
        rank[labels == label] = np.arange(np.sum(labels == label))
    held_out = rank % 2 == 1
    found = []
    for first, second in pairs:
        of_pair = (labels == first) | (labels == second)
        fit, judge = of_pair & ~held_out, of_pair & held_out
        discriminator = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
        discriminator.fit(values[fit], labels[fit] == first)
        estimate = theory.jensen_shannon_estimate(
            jnp.asarray(discriminator.decision_function(values[judge]), jnp.float32),
            jnp.asarray(labels[judge] == first))
        found.append([float(estimate.value), float(estimate.standard_error)])
    estimates, errors = np.array(found).T
    return np.maximum(estimates, 0), errors
