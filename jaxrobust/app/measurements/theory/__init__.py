"""Checks the paper's propositions and theorems on finished runs."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxrobust import (
    _validate,
    centroids,
    curvature,
    data,
    evaluation,
    geometry,
    losses,
    probes,
    theory,
)
from jaxrobust.app.config import InputError, distinct
from jaxrobust.app.measurements.accuracy import make_test_split, pooled_blocks
from jaxrobust.app.measurements.curvature import losses_of, require_piecewise_linear
from jaxrobust.app.measurements.runner import Measured, Measurement, Work
from jaxrobust.app.measurements.theory.section import numbers, section_of
from jaxrobust.app.progress import progress
from jaxrobust.app.report.page import significant
from jaxrobust.app.trainer import TrainedRun, make_splits, variables_of
from jaxrobust.data import Split
from jaxrobust.images import to_float
from jaxrobust.models import head_parameters
from jaxrobust.statistics import share_upper_bound

SEED = 0
"""Seeds the noise and the choice of training images: the same for all runs."""
BATCH_SIZE = 32
"""Images at once where derivatives are taken."""
FORWARD_BATCH_SIZE = 250
_SMOOTHED_GROUP = 8
_SMOOTHED_CHUNK = 4
"""Pairs of draws in one call, and at once: compiling more of them takes minutes on CPUs."""


@dataclasses.dataclass(frozen=True)
class TheorySettings:
    """How the theorems are checked; noise and radii come from the run's own configuration."""

    num_images: int = 256
    """Number of test images, from the first on, at which Theorem 6.1 is checked."""
    num_draws: int = 100
    """Draws of the noise for each image, for eta, l_out and the change of the loss."""
    smoothed_draws: int = 64
    """Pairs of draws for each image, a multiple of 8, for the noise-averaged loss's curvature."""
    test_size: int | None = None
    """Number of test images, drawn at random by class with seed 0; none for all."""
    train_size: int | None = 5000
    """Number of training images, drawn at random by class with seed 0; none for all."""
    nus: tuple[float, ...] = (0.25, 2.0, 10.0)
    """Factors nu of T_nu in Proposition 5.3."""
    radii: tuple[float, ...] = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
    """Radii of Theorem 6.2, over the median distance of a class's training images to their
    centroid."""
    rho_shares: tuple[float, ...] = (0.25, 0.5, 0.75, 0.95)
    """Confidence margins rho of Theorem 6.2, over the radius squared, in (0, 1)."""
    centre_share: float = 0.1
    """Largest distance of a centre from the training centroid in the held-out bound, over the
    radius."""
    failure_probability: float = 0.05
    """Failure probability of each bound at each radius, divided among the values of rho."""

    def __post_init__(self):
        _validate.in_range("num_images", self.num_images, 1)
        for name in ("test_size", "train_size"):
            if getattr(self, name) is not None:
                _validate.in_range(name, getattr(self, name), 1)
        _validate.in_range("num_draws", self.num_draws, 2)
        _validate.in_range("smoothed_draws", self.smoothed_draws, _SMOOTHED_GROUP)
        if self.smoothed_draws % _SMOOTHED_GROUP:
            raise InputError(f"Expected smoothed_draws={self.smoothed_draws} to be a multiple of "
                             f"{_SMOOTHED_GROUP}.")
        for name in ("nus", "radii", "rho_shares"):
            if not getattr(self, name):
                raise InputError(f"Expected {name} to hold at least one number.")
            distinct(f"of {name}", getattr(self, name))
        for value in (*self.nus, *self.radii):
            _validate.in_range("nus and radii", value, 0, open_low=True)
        for value in self.rho_shares:
            _validate.in_range("rho_shares", value, 0, 1, open_low=True)
        _validate.in_range("centre_share", self.centre_share, 0)
        _validate.in_range("failure_probability", self.failure_probability, 0, 1, open_low=True)


class Claim(NamedTuple):
    """A line of the table: what the paper claims and what was found."""

    key: str
    claim: str
    measured: str
    holds: float | None  # share of the cases that ``claim`` names; None where there is none
    looseness: float | None  # median of bound / value; None where there is none


class Layers(NamedTuple):
    """What the network makes of some images."""

    features: jax.Array  # [N, d]
    pooled: dict[str, np.ndarray]  # each [N, channels]; the blocks' outputs, averaged over pixels
    labels: jax.Array  # [N]


def _measure(run: TrainedRun, settings: TheorySettings, work: Work) -> Measured:
    """A table image by image, and for each claim what was found.

    What is measured, and how to read it, is in ``docs/theory.md``.

    Raises:
      InputError: (a ValueError) if the run was trained without noise, the network is not made of
        affine pieces, or logits are not finite.
    """
    sigma = run.config.noise_std
    _validate.in_range("noise_std of the run", sigma, 0, open_low=True)
    test_split = make_test_split(run.dataset, settings.test_size)
    _validate.in_range("num_images", settings.num_images, 2, len(test_split.labels),
                       open_high=False)
    train_split = _training_images(run, settings.train_size)
    for name, split, least in (("train_size", train_split, 2), ("test_size", test_split, 4)):
        counts = np.bincount(split.labels, minlength=len(run.dataset.class_names))
        if counts.min() < least:
            raise InputError(f"Expected {name}={len(split.labels)} to leave {least} images of "
                             f"every class, got {counts.min()}.")
    first = slice(min(settings.num_images, BATCH_SIZE))
    require_piecewise_linear(run, test_split.images[first], test_split.labels[first], "theory")
    batches = -(-settings.num_images // BATCH_SIZE)
    with progress(f"{work.label}, theory", batches * (
            settings.num_draws + settings.smoothed_draws + 1) + 5) as shown:
        train, test = _layers_of(run, train_split), _layers_of(run, test_split)
        shown.advance()
        claims: list[Claim] = []
        facts: dict[str, Any] = {
            "sigma": sigma, "delta_v": run.config.robust.delta_v,
            "delta_d": run.config.robust.delta_d, "num_train_images": len(train_split.labels),
            "num_test_images": len(test_split.labels), "with_respect_to": "pixels in [0, 1]"}
        for name, part in (
            ("geometry", _check_geometry(run, train, test)),
            ("rescaling", _check_rescaling(run, test_split, settings)),
            ("hinge_gradients", _check_hinge_gradients(run, train)),
            ("mapping", _check_mapping(train, test, settings)),
            ("separation", _check_separation(run, train, test)),
        ):
            facts[name] = part[0]
            claims += part[1]
            if name != "geometry":
                shown.advance()
        columns, draws = _curvature_columns(run, test_split, settings, shown)
    columns, facts["curvature"], lines = _check_curvature(run, columns, draws)
    claims = _in_the_papers_order([*claims, *lines])
    return Measured(
        _without_nan({**facts, "claims": [line._asdict() for line in claims]}),
        {"index": np.arange(settings.num_images),
         "label": test_split.labels[: settings.num_images], **columns})


def table_text(facts: dict) -> str:
    """The claims as plain text, each on two lines."""
    lines = []
    for line in (Claim(**values) for values in facts["claims"]):
        holds = "" if line.holds is None else f"holds {100 * line.holds:.1f} %"
        loose = "" if line.looseness is None else f"bound/value {significant(line.looseness)}"
        lines += [f"{line.claim}", "    " + "; ".join(
            part for part in (line.measured, holds, loose) if part)]
    return "\n".join(lines)


# --- Inputs ------------------------------------------------------------------------------------


def _training_images(run: TrainedRun, size: int | None) -> Split:
    split = make_splits(run.dataset, run.config).train
    if size is None or size >= len(split.labels):
        return split
    return data.split_off(split, size, seed=SEED)[1]


@functools.partial(jax.jit, static_argnames="model")
def _forward(model, variables, images):
    outputs = model.apply(variables, to_float(images), train=False)
    return outputs.features, pooled_blocks(outputs), outputs.logits


def _layers_of(run: TrainedRun, split: Split) -> Layers:
    variables = variables_of(run.state)
    features, pooled, logits = evaluation.map_batches(
        lambda images: _forward(run.model, variables, images), split.images,
        batch_size=FORWARD_BATCH_SIZE)
    _validate.finite("logits", logits)
    return Layers(jnp.asarray(features), pooled, jnp.asarray(split.labels))


def _class_means(layers: Layers, num_classes: int) -> centroids.Centroids:
    state = centroids.init_centroids(num_classes, layers.features.shape[1])
    return centroids.update_centroids(state, layers.features, layers.labels)[0]


# --- Section 5 and Appendix A.1 ----------------------------------------------------------------


def _check_geometry(run, train, test):
    """Definitions 3.1 and 5.1, Propositions 5.1 and 5.2: premises and conclusions."""
    kernel, bias = head_parameters(run.state.params)
    num_classes = len(bias)
    robust = run.config.robust
    means = _class_means(train, num_classes)
    compact = float(losses.compactness_loss(
        train.features, train.labels, means.current, delta_v=robust.delta_v))
    margin = float(losses.margin_loss(
        means.current, means.present, kernel, bias, delta_d=robust.delta_d))
    facts: dict[str, Any] = {"compactness_loss": compact, "margin_loss": margin}
    measure = jax.jit(
        lambda features, labels: (geometry.class_dispersion(features, labels, num_classes),
                                  geometry.class_margin(features, labels, kernel, bias),
                                  theory.smallest_distance_between_classes(features, labels)))
    for name, layers in (("train", train), ("test", test)):
        dispersion, class_margin, between = measure(layers.features, layers.labels)
        distances = _distances(layers, means.current)
        facts |= {f"{name}_dispersion": dispersion.tolist(),
                  f"{name}_margin": class_margin.tolist(),
                  f"{name}_smallest_distance_between_classes": float(between),
                  f"{name}_share_within_delta_v": float(np.mean(distances <= robust.delta_v))}
    dispersion, class_margin = (
        np.array(facts[f"train_{name}"]) for name in ("dispersion", "margin"))
    wanted = robust.delta_d - robust.delta_v
    largest, between = dispersion.max(), facts["train_smallest_distance_between_classes"]
    premise = f"L_compact = {significant(compact)}, L_margin = {significant(margin)}"
    return facts, [
        Claim("prop51", "Prop. 5.1: L_compact = 0 gives dispersion <= 2 delta_v (classes, training "
              "images)",
              f"{premise.split(',')[0]} (premise {_yes(compact == 0)}), "
              f"{100 * facts['train_share_within_delta_v']:.1f} % within delta_v = "
              f"{robust.delta_v:g}, largest dispersion {significant(largest)}",
              float(np.mean(dispersion <= 2 * robust.delta_v)),
              _median_ratio(np.full(num_classes, 2 * robust.delta_v), dispersion)),
        Claim("prop52_margin", "Prop. 5.2.1: both losses 0 and delta_d > delta_v give margin >= "
              "delta_d - delta_v (classes, training images)",
              f"{premise} (premise {_yes(compact == 0 and margin == 0 and wanted > 0)}), smallest "
              f"margin {significant(class_margin.min())} against {wanted:g}",
              float(np.mean(class_margin >= wanted)),
              _median_ratio(np.full(num_classes, wanted), class_margin)),
        Claim("prop52_distances", "Prop. 5.2.2: with delta_d > 2 delta_v, distances within a class "
              "are below those between classes (all pairs, training images)",
              f"largest within {significant(largest)}, smallest between {significant(between)} "
              f"(premise "
              f"{_yes(compact == 0 and margin == 0 and robust.delta_d > 2 * robust.delta_v)})",
              float(largest < between), None),
    ]


def _check_rescaling(run, test_split, settings):
    """Proposition 5.3 and its corollary, on the run's own network."""
    kernel, bias = head_parameters(run.state.params)
    images = test_split.images[: settings.num_images]
    labels = jnp.asarray(test_split.labels[: settings.num_images])
    variables = variables_of(run.state)

    def measure(params):
        features, _, logits = evaluation.map_batches(
            lambda images: _forward(run.model, {**variables, "params": params}, images), images,
            batch_size=FORWARD_BATCH_SIZE)
        features = jnp.asarray(features)
        _validate.finite("logits", logits)
        return (logits.argmax(axis=1), geometry.class_dispersion(features, labels, len(bias)).max(),
                geometry.class_margin(features, labels, *head_parameters(params)).min())

    predictions, dispersion, margin = measure(run.state.params)
    params, _ = ravel_pytree(run.state.params)
    same, errors, moves = [], [], []
    for nu in settings.nus:
        rescaled = geometry.rescale_head(run.state.params, nu)
        there, dispersion_nu, margin_nu = measure(rescaled)
        same.append(float(np.mean(there == predictions)))
        errors += [abs(float(dispersion_nu / dispersion) / nu - 1),
                   abs(float(margin_nu / margin) / nu - 1)]
        moves.append(np.asarray(ravel_pytree(rescaled)[0] - params, np.float64))
    by_nu = itertools.combinations(zip(settings.nus, moves, strict=True), 2)
    cosines = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
               for (nu, a), (mu, b) in by_nu if (nu - 1) * (mu - 1) < 0]
    facts = {"nus": list(settings.nus), "same_predictions": same,
             "largest_relative_error_of_the_factors": max(errors), "opposite_cosines": cosines}
    return facts, [
        Claim("prop53", "Prop. 5.3: T_nu keeps predictions and multiplies margin and dispersion by "
              "nu (test images and factors)",
              f"nu = {', '.join(f'{nu:g}' for nu in settings.nus)}; factors off by at most "
              f"{significant(max(errors))}, relatively", float(np.mean(same)), None),
        Claim("cor51", "Cor. 5.1: T_nu and T_1/nu move the parameters in opposite directions "
              "(pairs of factors)",
              "cosines " + (", ".join(f"{c:.6f}" for c in cosines) or "of no pair"),
              float(np.mean(np.array(cosines) < -0.9999)) if cosines else None, None)]


def _check_hinge_gradients(run, train):
    """Appendix A.1: norms of the gradient of each example's hinge."""
    kernel, bias = head_parameters(run.state.params)
    num_classes, delta_v = len(bias), run.config.robust.delta_v
    means = _class_means(train, num_classes)
    distances = _distances(train, means.current)
    # The loss is a mean over classes of means over their examples.
    counts = np.bincount(train.labels, minlength=num_classes)
    weights = np.asarray(jnp.sum(means.present)) * counts[np.asarray(train.labels)]
    active = distances > delta_v * (1 + 1e-6)
    norms = {}
    for squared in (False, True):
        gradient = jax.grad(lambda features, squared=squared: losses.compactness_loss(
            features, train.labels, means.current, delta_v=delta_v, squared=squared))
        norms[squared] = weights * np.asarray(geometry.safe_norm(gradient(train.features)))
    expected = 2 * (distances - delta_v)
    errors = np.concatenate([np.abs(norms[False][active] - 1),
                             np.abs(norms[True][active] / expected[active] - 1)])
    moved = jax.grad(lambda centres: losses.margin_loss(
        centres, means.present, kernel, bias, delta_d=run.config.robust.delta_d))(means.current)
    margin_norms = np.asarray(geometry.safe_norm(moved)) * float(jnp.sum(means.present))
    pushed = margin_norms[margin_norms > 0]
    facts = {"share_active": float(active.mean()),
             "largest_relative_error": float(errors.max(initial=0)),
             "squared_norm_quantiles": np.quantile(norms[True][active], (0.05, 0.5, 0.95)).tolist()
             if active.any() else None, "margin_norms": margin_norms.tolist()}
    return facts, [
        Claim("a1", "App. A.1: the hinge's gradient has norm 1, squared 2 (||u - m|| - delta_v) "
              "(active training images, both forms)",
              f"{100 * active.mean():.1f} % active; squared: median norm "
              f"{_median(norms[True][active])}; margin: {len(pushed)} active centroids, median "
              f"norm {_median(pushed)}", _share(errors < 1e-3), None)]


def _distances(layers: Layers, centres: jax.Array) -> np.ndarray:
    """[N], of each example's features to the centroid of its class."""
    return np.asarray(geometry.safe_norm(layers.features - centres[layers.labels]))


# --- Theorem 6.1 -------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("model", "sigma"))
def _draw(model, variables, images, labels, key, indices, *, sigma):
    """One draw of the noise: displacement, loss, quadratic model and largest logit, each [B]."""
    def outputs(x):
        return model.apply(variables, x, train=False)

    loss, _ = losses_of(model, variables, labels)
    draws = theory.noise_draws(
        lambda x: outputs(x).features, loss, images, key, sigma=sigma, num_draws=1,
        with_quadratic=True, indices=indices)
    noisy = images + theory.gaussian_noise(key, 0, images, sigma=sigma, indices=indices)
    return (*(value[0] for value in draws), jnp.max(jnp.abs(outputs(noisy).logits), axis=1))


@functools.partial(jax.jit, static_argnames="model")
def _pointwise(model, variables, images, labels):
    """Loss, prediction, gradient and the exact spectrum at the images themselves."""
    loss, logits_fn = losses_of(model, variables, labels)
    logits = logits_fn(images)
    gradient = jax.grad(lambda x: jnp.sum(loss(x)))(images)
    spectrum = curvature.piecewise_linear_spectrum(logits_fn, images)
    return {
        "loss": loss(images), "correct": jnp.argmax(logits, axis=1) == labels,
        "gradient_norm_squared": probes.squared_norm(gradient),
        "hessian": jnp.sum(jnp.square(spectrum), axis=1),
        "hessian_trace": jnp.sum(spectrum, axis=1),
        "largest_logit": jnp.max(jnp.abs(logits), axis=1)}


@functools.partial(jax.jit, static_argnames=("model", "sigma"))
def _smoothed(model, variables, images, labels, key, indices, *, sigma):
    """Hessian and gradient of the noise-averaged loss, from one group of draws."""
    loss, _ = losses_of(model, variables, labels)
    settings = {"sigma": sigma, "num_draws": _SMOOTHED_GROUP, "chunk_size": _SMOOTHED_CHUNK,
                "indices": indices}
    smooth = curvature.smoothed_curvature(loss, images, key, **settings)
    gradient = theory.smoothed_gradient_norm_squared(loss, images, key, **settings)
    return {"smoothed_hessian": smooth.squared_frobenius, "smoothed_hessian_trace": smooth.trace,
            "smoothed_gradient_norm_squared": gradient}


def _mean_of_groups(groups: Sequence[dict[str, probes.Estimate]]) -> dict[str, np.ndarray]:
    """The mean of independent estimates, with its standard error."""
    mean = {name: np.mean([group[name].value for group in groups], axis=0) for name in groups[0]}
    errors = {f"{name}_standard_error": np.sqrt(np.sum(
        [np.square(group[name].standard_error) for group in groups], axis=0)) / len(groups)
        for name in groups[0]}
    return mean | errors


def _curvature_columns(run, split, settings, shown):
    """Columns [N] at the images, and what became of them under the noise, each [K, N]."""
    images = split.images[: settings.num_images]
    labels = split.labels[: settings.num_images]
    variables, sigma = variables_of(run.state), run.config.noise_std
    size, batch_size = len(labels), min(BATCH_SIZE, len(labels))
    key = jax.random.key(SEED)
    draw_key, smooth_key = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
    columns: dict[str, list] = {}
    draws = []
    for rows in evaluation.padded_batches(size, batch_size):
        batch = to_float(jnp.asarray(images[rows])), jnp.asarray(labels[rows])
        measured = _pointwise(run.model, variables, *batch)
        shown.advance()
        groups = []
        for number in range(settings.smoothed_draws // _SMOOTHED_GROUP):
            groups.append(jax.device_get(_smoothed(
                run.model, variables, *batch, jax.random.fold_in(smooth_key, number),
                jnp.asarray(rows), sigma=sigma)))
            shown.advance(_SMOOTHED_GROUP)
        measured |= _mean_of_groups(groups)
        for name, values in measured.items():
            columns.setdefault(name, []).append(np.asarray(values))
        # A call a draw: XLA's convolutions in loops are slow on CPUs.
        of_batch = []
        for number in range(settings.num_draws):
            of_batch.append(jax.device_get(_draw(
                run.model, variables, *batch, jax.random.fold_in(draw_key, number),
                jnp.asarray(rows), sigma=sigma)))
            shown.advance()
        draws.append([np.stack(values) for values in zip(*of_batch, strict=True)])
    table = {name: np.concatenate(parts)[:size] for name, parts in columns.items()}
    return table, [np.concatenate(parts, axis=1)[:, :size] for parts in zip(*draws, strict=True)]


def _check_curvature(run, columns, arrays):
    """Theorem 6.1 and the assumption that it rests on."""
    displacement, noisy_loss, quadratic, noisy_logits = arrays
    draws = theory.NoiseDraws(*map(jnp.asarray, (displacement, noisy_loss, quadratic)))
    kernel, _ = head_parameters(run.state.params)
    sigma = run.config.noise_std
    c = {name: jnp.asarray(values) for name, values in columns.items()}
    k_max = float(max(columns["largest_logit"].max(), noisy_logits.max()))
    deltas = {"run": 2 * run.config.robust.delta_v, "median": float(np.median(displacement))}
    facts: dict[str, Any] = {
        "deltas": deltas, "k_max": k_max,
        "largest_row_norm": float(jnp.max(geometry.safe_norm(kernel.T)))}
    lines, new = [], {}
    for name, delta in deltas.items():
        stability = theory.stability_of(draws, c["loss"], delta=delta)
        new |= {
            f"eta_{name}": stability.eta, f"loss_outside_{name}": stability.loss_outside,
            f"upper_bound_{name}": theory.curvature_upper_bound(
                stability.eta, delta, sigma, kernel, k_max),
            f"lower_bound_{name}": theory.curvature_lower_bound(
                stability.eta, stability.loss_outside, c["loss"], c["gradient_norm_squared"],
                sigma)}
        lines += _curvature_claims(name, delta, stability, new, c)
    change, variance = stability.squared_change, stability.variance
    explained = theory.quadratic_squared_change(
        c["gradient_norm_squared"], c["hessian"], c["hessian_trace"], sigma)
    new |= {
        "squared_change": change.value, "squared_change_standard_error": change.standard_error,
        "variance": variance.value, "variance_standard_error": variance.standard_error,
        "displacement_median": np.median(displacement, axis=0),
        "explained_share": explained / change.value,
        "quadratic_residual": theory.quadratic_residual(draws, c["loss"]),
        "hermite_share": (sigma**2 * c["smoothed_gradient_norm_squared"]
                          + sigma**4 / 2 * c["smoothed_hessian"]) / variance.value}
    table = {**columns, **{name: np.asarray(values) for name, values in new.items()}}
    pointwise_link = 2 / sigma**4 * table["squared_change"]
    smoothed_link = np.asarray(theory.smoothed_curvature_bound(variance.value, sigma))
    lines += [
        Claim("eq14", "Eq. 14: the loss is quadratic at the scale of the noise (images with a "
              "residual below 10 %)",
              f"residual E(l - quadratic)^2 / E(l - l(x))^2: median "
              f"{_median(table['quadratic_residual'])}; quadratic share of E(l - l(x))^2 (Eq. 22): "
              f"median {_median(table['explained_share'])}",
              float(np.mean(table["quadratic_residual"] < 0.1)), None),
        Claim("eq22_pointwise", "App. E.1 Step 1: ||H||^2 <= 2/sigma^4 E(l - l(x))^2, pointwise "
              "Hessian (images)",
              f"median ||H||^2 {_median(table['hessian'])}",
              _share(table["hessian"] <= pointwise_link),
              _median_ratio(pointwise_link, table["hessian"])),
        Claim("eq22_smoothed", "The same for H_sigma, which needs no Eq. 14: ||H_sigma||^2 <= "
              "2/sigma^4 Var l (images; estimates, 2 standard errors allowed)",
              f"median ||H_sigma||^2 {_median(table['smoothed_hessian'])}; gradient and Hessian "
              f"give a median share {_median(table['hermite_share'])} of the variance",
              _share(table["smoothed_hessian"] - 2 * table["smoothed_hessian_standard_error"]
                     <= smoothed_link + 4 / sigma**4 * table["variance_standard_error"]),
              _median_ratio(smoothed_link, table["smoothed_hessian"])),
    ]
    return table, facts, lines


def _curvature_claims(name, delta, stability, new, c):
    """Both bounds of Theorem 6.1 at one delta, for either Hessian."""
    which = f"delta = {significant(delta)}, " + {
        "run": "2 delta_v", "median": "the median displacement"}[name]
    upper, lower = (np.asarray(new[f"{side}_bound_{name}"]) for side in ("upper", "lower"))
    lines = []
    for kind, prefix in (("pointwise", "hessian"), ("smoothed", "smoothed_hessian")):
        value, trace = np.asarray(c[prefix]), np.asarray(c[f"{prefix}_trace"])
        lines.append(Claim(
            f"thm61_upper_{kind}_{name}",
            f"Thm 6.1.1 (Eq. 15), {kind} Hessian, {which} (images)",
            f"median eta {significant(float(np.median(stability.eta)))}, median bound "
            f"{_median(upper)}", _share(value <= upper), _median_ratio(upper, value)))
        informative = lower > 0
        left = 2 * value + np.square(trace)
        lines.append(Claim(
            f"thm61_lower_{kind}_{name}",
            f"Thm 6.1.2 (Eq. 16), {kind} Hessian, {which} (images with a bound above 0)",
            f"bound above 0 for {100 * np.mean(informative):.1f} %",
            _share((left >= lower)[informative]),
            _median_ratio(lower[informative], left[informative])))
    return lines


# --- Theorem 6.2 -------------------------------------------------------------------------------


def _check_mapping(train, test, settings):
    """Bounds on the share of a class's test images outside a ball around its centroid.

    Those for held-out images are made on one half of them and judged on the other.
    """
    num_classes = int(train.labels.max()) + 1
    means = np.asarray(_class_means(train, num_classes).current)
    curves: dict[str, list[list[float]]] = {}
    radii = []
    for label in range(num_classes):
        of_class = [np.asarray(layers.features[layers.labels == label])
                    for layers in (train, test)]
        rows = of_class[0], of_class[1][::2], of_class[1][1::2]
        distances = [np.linalg.norm(part - means[label], axis=1) for part in rows]
        radii.append((np.median(distances[0]) * np.array(settings.radii)).tolist())
        found = [_mapping_bounds(rows, distances, means[label], radius, settings)
                 for radius in radii[-1]]
        for name in found[0]:
            curves.setdefault(name, []).append([values[name] for values in found])
    arrays = {name: np.array(values) for name, values in curves.items()}
    error = arrays["error"]
    lines = []
    for name, claim in (
        ("theorem", "Thm 6.2 (Eq. 19), training images (classes and radii with a bound below 1)"),
        ("held_out", "Its repair for fixed features, held-out images, norms from 0 (the same)"),
        ("held_out_around", "The repair, norms from the training centroid (the same)"),
        ("fixed_centre", "Clopper-Pearson for a fixed centre, held-out images (the same)"),
    ):
        bound = arrays[name]
        informative = bound < 1
        lines.append(Claim(
            f"thm62_{name}", claim,
            f"bound below 1 in {100 * np.mean(informative):.1f} %, largest test error there "
            f"{significant(error[informative].max(initial=0))}; smallest bound "
            f"{significant(bound.min())}", _share((error <= bound)[informative]),
            _median_ratio(bound.ravel(), error.ravel())))
    facts = {"radii_over_median_distance": list(settings.radii), "radii": radii, **curves}
    return facts, lines


def _mapping_bounds(rows, distances, centre, radius, settings):
    """The test error at one radius, and each bound on it (the best over rho).

    ``rows`` and ``distances`` are of the class's training images, the test images that make
    the bounds, and those that judge them.
    """
    error = float(np.mean(distances[2] > radius))
    failure = settings.failure_probability / len(settings.rho_shares)
    norms = [np.linalg.norm(part, axis=1) for part in rows]
    found = {"error": error, "train_error": float(np.mean(distances[0] > radius))}
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
            for rho in (share * radius**2 for share in settings.rho_shares))
    found["fixed_centre"] = share_upper_bound(
        int(np.sum(distances[1] > radius)), len(rows[1]), settings.failure_probability)
    return found


# --- Theorem 6.3 -------------------------------------------------------------------------------


def _check_separation(run, train, test):
    """Theorem 6.3's bound, and lower bounds of the divergence it bounds, layer by layer."""
    kernel, bias = head_parameters(run.state.params)
    num_classes = len(bias)
    means = np.asarray(_class_means(train, num_classes).current)
    distances, labels = _distances(test, jnp.asarray(means)), np.asarray(test.labels)
    logits = np.asarray(test.features) @ np.asarray(kernel) + np.asarray(bias)
    pairs = list(itertools.combinations(range(num_classes), 2))
    apart = np.array([np.linalg.norm(means[a] - means[b]) for a, b in pairs])
    delta_v = run.config.robust.delta_v

    def taus(radius):
        return np.array([np.mean(distances[labels == c] <= radius) for c in range(num_classes)])

    def bound(tau):
        return np.asarray(theory.jensen_shannon_bound(jnp.asarray(tau, jnp.float32)))

    at_delta_v, widest = taus(delta_v), taus(apart.min() / 2)
    disjoint = bool(apart.min() > 2 * delta_v)
    pair_tau = np.array([min(taus(d / 2)[[a, b]]) for (a, b), d in zip(pairs, apart, strict=True)])
    # For each pair's classes, the share on the first one's side of their decision hyperplane.
    sides = np.array([[np.mean(logits[labels == c, a] > logits[labels == c, b]) for c in (a, b)]
                      for a, b in pairs])
    layers = {**test.pooled, "features": np.asarray(test.features)}
    estimates = {name: _divergences(values, labels, pairs) for name, values in layers.items()}
    facts = {
        "tau_at_delta_v": at_delta_v.tolist(), "disjoint_at_delta_v": disjoint,
        "share_of_pairs_disjoint_at_delta_v": float(np.mean(apart > 2 * delta_v)),
        "bound_at_delta_v": float(bound(at_delta_v.min())) if disjoint else 0.0,
        "widest_disjoint_radius": float(apart.min() / 2), "tau_at_widest": widest.tolist(),
        "bound_at_widest": float(bound(widest.min())),
        "pairs": [list(pair) for pair in pairs], "pair_tau": pair_tau.tolist(),
        "pair_bound": bound(pair_tau).tolist(),
        "pair_sharp_bound": np.asarray(
            theory.jensen_shannon_sharp_bound(jnp.asarray(pair_tau, jnp.float32))).tolist(),
        "pair_sides": sides.tolist(),
        "pair_decision_bound": np.asarray(theory.jensen_shannon_decision_bound(
            *jnp.asarray(sides.T, jnp.float32))).tolist(),
        "layers": list(layers),
        "divergence": {name: values.tolist() for name, (values, _) in estimates.items()},
        "divergence_standard_error": {
            name: errors.tolist() for name, (_, errors) in estimates.items()}}
    lines = [Claim(
        "thm63", "Thm 6.3 (Eq. 20) at delta_v: its hypotheses (tau >= 1/2 in all classes, disjoint "
        "balls)",
        f"smallest tau {significant(at_delta_v.min())}; centroids more than 2 delta_v apart: "
        f"{_yes(disjoint)}; bound {significant(facts['bound_at_delta_v'])} of at most log 2 = "
        f"{math.log(2):.3f} nats; with balls as wide as disjoint ones can be: smallest tau "
        f"{significant(widest.min())}, bound {significant(facts['bound_at_widest'])}",
        float(at_delta_v.min() >= 0.5 and disjoint), None)]
    pair_bound, by_decision = (
        np.array(facts[name]) for name in ("pair_bound", "pair_decision_bound"))
    lines.append(Claim(
        "thm63_decision", "In the place of the balls each pair's decision hyperplane, in every "
        "layer (pairs with a bound above that of Eq. 20)",
        f"bound: smallest {significant(by_decision.min())}, median {_median(by_decision)} nats",
        float(np.mean(by_decision > pair_bound)), None))
    informative = pair_bound > 0
    for name, (values, _) in estimates.items():
        lines.append(Claim(
            f"thm63_{name}", f"Thm 6.3 at {name}, each pair of classes with balls that touch: "
            "bound <= estimated lower bound of the divergence (pairs with a bound above 0)",
            f"divergence at least: smallest {significant(values.min())}, median {_median(values)} "
            f"nats; bound: above 0 for {100 * np.mean(informative):.1f} %, median "
            f"{_median(pair_bound)}, sharp {_median(facts['pair_sharp_bound'])}",
            _share((pair_bound <= values)[informative]), _median_ratio(
                pair_bound[informative], values[informative])))
    return facts, lines


def _divergences(values, labels, pairs):
    """Lower bounds [P] of the pairs' divergences in nats, not below 0, and standard errors [P]."""
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


# --- Words -------------------------------------------------------------------------------------

_ORDER = ("prop51", "prop52_margin", "prop52_distances", "prop53", "cor51", "a1", "eq14", "eq22",
          "thm61", "thm62", "thm63")


def _in_the_papers_order(claims: Sequence[Claim]) -> list[Claim]:
    def place(claim):
        return next(i for i, prefix in enumerate(_ORDER) if claim.key.startswith(prefix))

    return sorted(claims, key=place)


def _yes(condition: bool) -> str:
    return "yes" if condition else "no"


def _share(holds: np.ndarray) -> float | None:
    return float(np.mean(holds)) if np.size(holds) else None


def _median(values: Any) -> str:
    values = np.asarray(values)
    finite = values[np.isfinite(values)]
    return significant(float(np.median(finite))) if finite.size else "–"


def _median_ratio(bound: np.ndarray, value: np.ndarray) -> float | None:
    """Over the cases with a value above 0."""
    kept = value > 0
    return float(np.median(bound[kept] / value[kept])) if kept.any() else None


def _without_nan(value: Any) -> Any:
    """For JSON, which has neither NaN nor infinity: None in their place."""
    if isinstance(value, dict):
        return {name: _without_nan(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


THEORY = Measurement(
    "theory", TheorySettings(), _measure, section=section_of, numbers=(numbers,), text=table_text,
    about="Check the paper's propositions and theorems on finished runs, and print the results.")
