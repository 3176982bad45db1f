"""Checks Theorem 6.1, and the assumption that it rests on, image by image."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust import curvature, evaluation, geometry, probes, theory
from jaxrobust.app.measurements.curvature import losses_of
from jaxrobust.app.measurements.theory.checks import Claim, median_ratio, median_text, share
from jaxrobust.app.report.page import significant
from jaxrobust.app.trainer import TrainedRun, variables_of
from jaxrobust.data import Split
from jaxrobust.images import predicted_classes, to_float
from jaxrobust.models import head_parameters

SEED = 0
"""Seeds the noise: the same for all runs."""
BATCH_SIZE = 32
"""Images at once where derivatives are taken."""
SMOOTHED_GROUP = 8
_SMOOTHED_CHUNK = 4
"""Pairs of draws in one call, and at once: compiling more of them takes minutes on CPUs."""


@functools.partial(jax.jit, static_argnames=("model", "sigma"))
def _draw(model, variables, images, labels, key, indices, *, sigma):
    """Draws the noise once: displacement, loss, quadratic model and largest logit, each [B]."""
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
    """Measures loss, prediction, gradient and the exact spectrum at the images themselves."""
    loss, logits_fn = losses_of(model, variables, labels)
    logits = logits_fn(images)
    gradient = jax.grad(lambda x: jnp.sum(loss(x)))(images)
    spectrum = curvature.piecewise_linear_spectrum(logits_fn, images)
    return {
        "loss": loss(images), "correct": predicted_classes(logits) == labels,
        "gradient_norm_squared": probes.squared_norm(gradient),
        "hessian": jnp.sum(jnp.square(spectrum), axis=1),
        "hessian_trace": jnp.sum(spectrum, axis=1),
        "largest_logit": jnp.max(jnp.abs(logits), axis=1)}


@functools.partial(jax.jit, static_argnames=("model", "sigma"))
def _smoothed(model, variables, images, labels, key, indices, *, sigma):
    """Estimates Hessian and gradient of the noise-averaged loss from one group of draws."""
    loss, _ = losses_of(model, variables, labels)
    settings = {"sigma": sigma, "num_draws": SMOOTHED_GROUP, "chunk_size": _SMOOTHED_CHUNK,
                "indices": indices}
    smooth = curvature.smoothed_curvature(loss, images, key, **settings)
    gradient = theory.smoothed_gradient_norm_squared(loss, images, key, **settings)
    return {"smoothed_hessian": smooth.squared_frobenius, "smoothed_hessian_trace": smooth.trace,
            "smoothed_gradient_norm_squared": gradient}


def _mean_of_groups(groups: list[dict[str, probes.Estimate]]) -> dict[str, np.ndarray]:
    """Averages independent estimates, with the standard error of the mean."""
    mean = {name: np.mean([group[name].value for group in groups], axis=0) for name in groups[0]}
    errors = {f"{name}_standard_error": np.sqrt(np.sum(
        [np.square(group[name].standard_error) for group in groups], axis=0)) / len(groups)
        for name in groups[0]}
    return mean | errors


def measure_images(run: TrainedRun, images: Split, settings: Any, shown: Any
                   ) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """Returns columns [N] at the images, and the results of :func:`_draw`, each [num_draws, N]."""
    variables, sigma = variables_of(run.state), run.config.noise_std
    size = len(images.labels)
    draw_key, smooth_key = (jax.random.fold_in(jax.random.key(SEED), part) for part in (0, 1))
    columns, draws = [], []
    for rows in evaluation.padded_batches(size, min(BATCH_SIZE, size)):
        batch = (run.model, variables, to_float(jnp.asarray(images.images[rows])),
                 jnp.asarray(images.labels[rows]))
        indices = jnp.asarray(rows)
        measured = _pointwise(*batch)
        shown.advance()
        groups = []
        for number in range(settings.smoothed_draws // SMOOTHED_GROUP):
            groups.append(jax.device_get(_smoothed(
                *batch, jax.random.fold_in(smooth_key, number), indices, sigma=sigma)))
            shown.advance(SMOOTHED_GROUP)
        columns.append(measured | _mean_of_groups(groups))
        # A call a draw: XLA's convolutions in loops are slow on CPUs.
        of_batch = []
        for number in range(settings.num_draws):
            of_batch.append(jax.device_get(_draw(
                *batch, jax.random.fold_in(draw_key, number), indices, sigma=sigma)))
            shown.advance()
        draws.append([np.stack(values) for values in zip(*of_batch, strict=True)])
    table = {name: np.concatenate([part[name] for part in columns])[:size] for name in columns[0]}
    return table, [np.concatenate(parts, axis=1)[:, :size] for parts in zip(*draws, strict=True)]


def check_curvature(run: TrainedRun, columns: dict[str, np.ndarray], drawn: list[np.ndarray]
                    ) -> tuple[dict[str, np.ndarray], dict, list[Claim]]:
    """Checks Theorem 6.1 and Eq. 14 on :func:`measure_images`: more columns, facts and claims."""
    displacement, *_, noisy_logits = drawn
    draws = theory.NoiseDraws(*map(jnp.asarray, drawn[:3]))
    kernel, _ = head_parameters(run.state.params)
    sigma = run.config.noise_std
    c = {name: jnp.asarray(values) for name, values in columns.items()}
    k_max = float(max(columns["largest_logit"].max(), noisy_logits.max()))
    deltas = {"run": 2 * run.config.robust.delta_v, "median": float(np.median(displacement))}
    bounds: list = []
    new: dict[str, Any] = {}
    for name, delta in deltas.items():
        stability = theory.stability_of(draws, c["loss"], delta=delta)
        new |= {
            f"eta_{name}": stability.eta, f"loss_outside_{name}": stability.loss_outside,
            f"upper_bound_{name}": theory.curvature_upper_bound(
                stability.eta, delta, sigma, kernel, k_max),
            f"lower_bound_{name}": theory.curvature_lower_bound(
                stability.eta, stability.loss_outside, c["loss"], c["gradient_norm_squared"],
                sigma)}
        bounds += _claims_at(name, delta, {**columns, **new})
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
    facts = {"deltas": deltas, "k_max": k_max,
             "largest_row_norm": float(jnp.max(geometry.safe_norm(kernel.T)))}
    return table, facts, [
        Claim("eq14", "Eq. 14: the loss is quadratic at the scale of the noise (images with a "
              "residual below 10 %)",
              f"residual E(l - quadratic)^2 / E(l - l(x))^2: median "
              f"{median_text(table['quadratic_residual'])}; quadratic share of E(l - l(x))^2 "
              f"(Eq. 22): median {median_text(table['explained_share'])}",
              share(table["quadratic_residual"] < 0.1)),
        Claim("eq22_pointwise", "App. E.1 Step 1: ||H||^2 <= 2/sigma^4 E(l - l(x))^2, pointwise "
              "Hessian (images)",
              f"median ||H||^2 {median_text(table['hessian'])}",
              share(table["hessian"] <= pointwise_link),
              median_ratio(pointwise_link, table["hessian"])),
        Claim("eq22_smoothed", "The same for H_sigma, which needs no Eq. 14: ||H_sigma||^2 <= "
              "2/sigma^4 Var l (images; estimates, 2 standard errors allowed)",
              f"median ||H_sigma||^2 {median_text(table['smoothed_hessian'])}; gradient and "
              f"Hessian give a median share {median_text(table['hermite_share'])} of the variance",
              share(table["smoothed_hessian"] - 2 * table["smoothed_hessian_standard_error"]
                    <= smoothed_link + 4 / sigma**4 * table["variance_standard_error"]),
              median_ratio(smoothed_link, table["smoothed_hessian"])),
        *bounds]


def _claims_at(name: str, delta: float, columns: dict) -> list[Claim]:
    """Checks both bounds of Theorem 6.1 at one delta, for either Hessian."""
    which = f"delta = {significant(delta)}, " + {
        "run": "2 delta_v", "median": "the median displacement"}[name]
    eta, upper, lower = (np.asarray(columns[f"{column}_{name}"])
                         for column in ("eta", "upper_bound", "lower_bound"))
    informative, claims = lower > 0, []
    for kind, prefix in (("pointwise", "hessian"), ("smoothed", "smoothed_hessian")):
        value, left = columns[prefix], 2 * columns[prefix] + np.square(columns[f"{prefix}_trace"])
        claims += [
            Claim(f"thm61_upper_{kind}_{name}",
                  f"Thm 6.1.1 (Eq. 15), {kind} Hessian, {which} (images)",
                  f"median eta {significant(float(np.median(eta)))}, median bound "
                  f"{median_text(upper)}", share(value <= upper), median_ratio(upper, value)),
            Claim(f"thm61_lower_{kind}_{name}",
                  f"Thm 6.1.2 (Eq. 16), {kind} Hessian, {which} (images with a bound above 0)",
                  f"bound above 0 for {100 * np.mean(informative):.1f} %",
                  share((left >= lower)[informative]),
                  median_ratio(lower[informative], left[informative]))]
    return claims
