"""The field's training methods against their equations in NumPy's float64, on a smooth network.

Losses are compared with the equations, and their gradients with differences of the equations along
random directions.
"""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust import curvature, geometry
from jaxrobust._validate import InputError
from jaxrobust.centroids import CentroidState
from jaxrobust.losses import softmax_cross_entropy
from jaxrobust.methods import (
    CLEAN_METHODS,
    METHODS,
    PAPER_METHODS,
    Batch,
    MethodOptions,
    make_method,
)
from jaxrobust.methods.augmix import augment_and_mix
from jaxrobust.methods.common import in_turn
from jaxrobust.methods.options import (
    AugMixOptions,
    CenterOptions,
    ConsistencyOptions,
    CureOptions,
    GradientPenaltyOptions,
    JacobianPenaltyOptions,
    LargeMarginOptions,
    NoisyConsistencyOptions,
    PGDOptions,
    TradesOptions,
)
from jaxrobust.models import Outputs

CLASSES, INPUTS, HIDDEN, BATCH = 3, 5, 4, 16
LABELS = np.array([0, 2, 1, 1, 0, 0, 2, 2, 0, 1, 2, 0, 0, 1, 1, 1], np.int32)
# AugMix takes the longest to compile.
FIELD = [pytest.param(name, marks=[pytest.mark.slow] if name == "augmix" else [])
         for name in METHODS if name not in PAPER_METHODS]
KEY = 3


@contextlib.contextmanager
def float64():
    # JAX's integers are then of two widths.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


def darker(key, images):
    """A perturbation that draws nothing."""
    del key
    return 0.9 * images


def problem(seed=0):
    """Parameters, a batch and centres, in NumPy's float64."""
    rng = np.random.default_rng(seed)
    params = {"first": rng.normal(size=(INPUTS, HIDDEN)), "kernel": rng.normal(
        size=(HIDDEN, CLASSES)), "bias": rng.normal(size=CLASSES)}
    clean = rng.uniform(size=(BATCH, INPUTS, 1, 1))
    noisy = clean + 0.2 * rng.normal(size=clean.shape)
    centers = rng.normal(size=(CLASSES, HIDDEN))
    return params, Batch(clean, noisy, LABELS), centers


def as_jax(tree):
    return jax.tree.map(jnp.asarray, tree)


DEFAULTS = MethodOptions()


def objective(name, params, batch, centers, *, options=DEFAULTS, weight=1.0, axis_name=None,
              perturb=darker, key=KEY):
    """The method's objective on a network with one hidden layer of tanh."""
    def forward(batch_stats, images):
        hidden = jnp.tanh(images.reshape(len(images), -1) @ params["first"])
        logits = hidden @ params["kernel"] + params["bias"][None]
        return Outputs(logits, hidden, {}), {"passes": batch_stats["passes"] + 1}

    method = make_method(name, perturb=perturb, options=options)
    state = CentroidState(jnp.asarray(centers), jnp.ones(CLASSES, bool))
    return method.objective(
        in_turn(forward), (params["kernel"], params["bias"]), {"passes": jnp.zeros((), jnp.int32)},
        state, batch, weight=weight, key=jax.random.key(key), axis_name=axis_name)


# --- the equations, in NumPy ------------------------------------------------------------------


def network(params, images):
    hidden = np.tanh(images.reshape(len(images), -1) @ params["first"])
    return hidden, hidden @ params["kernel"] + params["bias"]


def probabilities(logits):
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def cross_entropy(logits, labels=LABELS):
    return -np.mean(np.log(probabilities(logits))[np.arange(len(labels)), labels])


def kl(p, q):
    return np.mean(np.sum(p * (np.log(p) - np.log(q)), axis=1))


def by_center(params, batch, centers, options):
    features, logits = network(params, batch.clean)
    pulled = sum(np.sum((q - centers[y])**2) for q, y in zip(features, LABELS, strict=True))
    return cross_entropy(logits), options.weight * pulled / (2 * BATCH)


def by_consistency(params, batch, centers, options):
    clean, noisy = (network(params, view)[1] for view in (batch.clean, batch.noisy))
    return cross_entropy(clean), options.weight * kl(probabilities(clean), probabilities(noisy))


def by_noisy_consistency(params, batch, centers, options):
    versions = [batch.noisy] + [0.9 * batch.clean] * (options.num_versions - 1)
    logits = [network(params, version)[1] for version in versions]
    predictions = [probabilities(z) for z in logits]
    mean = np.mean(predictions, axis=0)
    entropy = -np.mean(np.sum(mean * np.log(mean), axis=1))
    return (np.mean([cross_entropy(z) for z in logits]),
            options.weight * np.mean([kl(mean, p) for p in predictions])
            + options.entropy_weight * entropy)


def input_gradient(params, images, labels=LABELS):
    """Each image's gradient of its own loss, [B, INPUTS]."""
    hidden, logits = network(params, images)
    by_logits = probabilities(logits) - np.eye(CLASSES)[labels]
    return (by_logits @ params["kernel"].T * (1 - hidden**2)) @ params["first"].T


def by_gradient_penalty(params, batch, centers, options):
    gradient = input_gradient(params, batch.clean)
    return (cross_entropy(network(params, batch.clean)[1]),
            options.weight * np.sum(gradient**2) / BATCH)


def by_jacobian_penalty(params, batch, centers, options):
    """With the directions that the method draws from its key."""
    hidden, logits = network(params, batch.clean)
    total = 0
    for i in range(options.num_projections):
        for n in range(BATCH):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(KEY), i), n)
            v = np.asarray(jax.random.normal(key, (CLASSES,), np.float64))
            jacobian = (params["first"] * (1 - hidden[n]**2)) @ params["kernel"]  # transposed
            total += np.sum((jacobian @ (v / np.linalg.norm(v)))**2)
    return (cross_entropy(logits), options.weight / 2 * CLASSES * total
            / options.num_projections / BATCH)


SIGNS = np.sign(input_gradient(problem()[0], problem()[1].clean))
"""Constants in the penalty on the curvature."""


def by_cure(params, batch, centers, options):
    images = batch.clean.reshape(BATCH, INPUTS)
    z = SIGNS / INPUTS**0.5
    if options.step is None:
        h = 1e-4
        # An error of h^4.
        change = sum(factor * input_gradient(params, images + place * h * z)
                     for place, factor in ((1, 8), (-1, -8), (2, -1), (-2, 1))) / (12 * h)
    else:
        change = (input_gradient(params, images + options.step * z)
                  - input_gradient(params, images)) / options.step
    return cross_entropy(network(params, images)[1]), options.weight * np.sum(change**2) / BATCH


def jacobians(params, images):
    """Derivatives of the logits by the images, [B, CLASSES, INPUTS]."""
    hidden, _ = network(params, images)
    return np.einsum("ih,nh,hc->nci", params["first"], 1 - hidden**2, params["kernel"])


@functools.cache
def steepness_of_problem():
    """By image and class, the norm of the gradient of the label's logit minus that of the class:
    constants in the loss."""
    of_all = jacobians(problem()[0], problem()[1].clean)
    return np.linalg.norm(of_all[np.arange(BATCH), LABELS][:, None] - of_all, axis=2)


def distances_to_boundaries(logits):
    """Distances to first order, of each image to the classes in descending order of logits."""
    found = []
    for n, y in enumerate(LABELS):
        others = sorted((c for c in range(CLASSES) if c != y), key=lambda c, n=n: -logits[n, c])
        found.append([(logits[n, y] - logits[n, c]) / steepness_of_problem()[n, c] for c in others])
    return np.array(found)


def by_large_margin(params, batch, centers, options):
    logits = network(params, batch.clean)[1]
    d = distances_to_boundaries(logits)[:, :options.num_classes].min(axis=1)
    gamma, lowest = options.margin, options.margin * (1 - options.clip)
    return cross_entropy(logits), options.weight * np.mean(
        np.minimum(np.maximum(gamma - d, 0), gamma - lowest))


def attack(gradient_of, start, options):
    """PGD on the problem's clean images, in the norm of the options."""
    images = problem()[1].clean.reshape(BATCH, INPUTS)
    size = options.step_size or 2.5 * options.epsilon / options.num_steps
    keys = [jax.random.fold_in(jax.random.fold_in(jax.random.key(KEY), n), 0) for n in range(BATCH)]

    def nearest(points):
        change = points - images
        if options.norm == "linf":
            change = np.clip(change, -options.epsilon, options.epsilon)
        else:
            norm = np.linalg.norm(change, axis=1, keepdims=True)
            change = change * np.minimum(1, options.epsilon / norm)
        return np.clip(images + change, 0, 1)

    points = nearest(images + np.array([start(key) for key in keys]))
    for _ in range(options.num_steps):
        g = gradient_of(points)
        step = np.sign(g) if options.norm == "linf" else g / np.linalg.norm(
            g, axis=1, keepdims=True)
        points = nearest(points + size * step)
    return points


@functools.cache
def attacked_by_pgd(options):
    params = problem()[0]

    def start(key):
        if options.norm == "linf":
            return options.epsilon * np.asarray(
                jax.random.uniform(key, (INPUTS,), np.float32, -1, 1))
        direction, radius = jax.random.split(key)
        normal = np.asarray(jax.random.normal(direction, (INPUTS,), np.float32), np.float64)
        return options.epsilon * normal / np.linalg.norm(normal) * float(
            jax.random.uniform(radius, (), np.float32)) ** (1 / INPUTS)

    return attack(lambda images: input_gradient(params, images), start, options)


def by_pgd(params, batch, centers, options):
    return cross_entropy(network(params, attacked_by_pgd(options))[1]), 0


@functools.cache
def attacked_by_trades(options):
    params, batch, _ = problem()
    clean = probabilities(network(params, batch.clean)[1])

    def gradient_of(images):
        hidden, logits = network(params, images)
        by_logits = probabilities(logits) - clean
        return (by_logits @ params["kernel"].T * (1 - hidden**2)) @ params["first"].T

    return attack(gradient_of, lambda key: 1e-3 * np.asarray(
        jax.random.normal(key, (INPUTS,), np.float32)), options)


def by_trades(params, batch, centers, options):
    clean, attacked = (network(params, images)[1] for images in (
        batch.clean, attacked_by_trades(options)))
    return cross_entropy(clean), options.weight * kl(probabilities(clean), probabilities(attacked))


@functools.cache
def mixtures(options):
    """The two versions of each image that the method mixes from its key."""
    images = jnp.asarray(problem()[1].clean)
    return [np.asarray(jax.jit(jax.vmap(lambda n, image, i=i: augment_and_mix(
        jax.random.fold_in(jax.random.fold_in(jax.random.key(KEY), i), n), image,
        severity=options.severity, num_chains=options.num_chains, depth=options.depth)))(
            jnp.arange(BATCH), images)) for i in (1, 2)]


def by_augmix(params, batch, centers, options):
    logits = [network(params, images)[1] for images in (batch.clean, *mixtures(options))]
    predictions = [probabilities(z) for z in logits]
    mean = np.mean(predictions, axis=0)
    return cross_entropy(logits[0]), options.weight * np.mean([kl(p, mean) for p in predictions])


EQUATIONS = {
    "center": (by_center, CenterOptions(weight=0.7)),
    "consistency": (by_consistency, ConsistencyOptions(weight=2.0)),
    "noisy_consistency": (by_noisy_consistency, NoisyConsistencyOptions(
        weight=3.0, entropy_weight=0.7, num_versions=3)),
    "gradient_penalty": (by_gradient_penalty, GradientPenaltyOptions(weight=2.0)),
    "jacobian_penalty": (by_jacobian_penalty, JacobianPenaltyOptions(
        weight=0.3, num_projections=2)),
    "cure": (by_cure, CureOptions(weight=2.0)),
    # Some images are beyond the margin, some within it, and some below its lower limit.
    "large_margin": (by_large_margin, LargeMarginOptions(
        weight=2.0, margin=1.7, clip=2.2, num_classes=2)),
    "pgd": (by_pgd, PGDOptions(epsilon=0.2, num_steps=3)),
    "trades": (by_trades, TradesOptions(epsilon=0.2, num_steps=3, weight=2.0)),
    "augmix": (by_augmix, AugMixOptions(weight=5.0, num_chains=2, depth=2)),
}
ATTACKED_IN_FLOAT32 = ("pgd", "trades")


def options_of(name, **changes):
    return MethodOptions(**{name: dataclasses.replace(EQUATIONS[name][1], **changes)})


@pytest.mark.parametrize("name", FIELD)
def test_loss_and_gradient_are_those_of_the_equations(name):
    params, batch, centers = problem()
    equation, own = EQUATIONS[name]
    rng = np.random.default_rng(1)
    direction = {key: rng.normal(size=value.shape) for key, value in params.items()}

    def moved(step):
        return {key: value + step * direction[key] for key, value in params.items()}

    with float64():
        for weight in (1.0, 0.25):
            def loss_of(params, weight=weight):
                return objective(name, params, as_jax(batch), centers, weight=weight,
                                 options=options_of(name))[0]

            def expected(step, weight=weight):
                softmax, added = equation(moved(step), batch, centers, own)
                return softmax + weight * added

            loss, gradient = jax.jit(jax.value_and_grad(loss_of))(as_jax(params))
            rtol = 1e-5 if name in ATTACKED_IN_FLOAT32 else 1e-9
            np.testing.assert_allclose(loss, expected(0), rtol=rtol)
            slope = sum(np.sum(gradient[key] * direction[key]) for key in params)
            np.testing.assert_allclose(
                slope, (expected(1e-5) - expected(-1e-5)) / 2e-5, rtol=max(rtol, 1e-6))


@pytest.mark.parametrize("name", [
    "center", "consistency", "gradient_penalty", "jacobian_penalty", "cure", "large_margin",
    "trades", "augmix"])
def test_with_weight_0_a_method_is_normal(name):
    params, batch, centers = as_jax(jax.tree.map(
        lambda values: np.asarray(values, np.float32), problem()))
    batch = batch._replace(labels=jnp.asarray(LABELS))

    def value_and_gradient(name, options):
        return jax.jit(jax.value_and_grad(lambda params: objective(
            name, params, batch, centers, options=options)[0]))(params)

    jax.tree.map(np.testing.assert_array_equal,
                 value_and_gradient(name, options_of(name, weight=0.0)),
                 value_and_gradient("normal", DEFAULTS))


@pytest.mark.parametrize("name", FIELD)
def test_under_shard_map_an_objective_is_that_of_the_whole_batch(name):
    params, batch, centers = as_jax(jax.tree.map(
        lambda values: np.asarray(values, np.float32), problem()))
    batch = batch._replace(labels=jnp.asarray(LABELS))

    def value_and_gradient(params, batch, axis_name=None):
        return jax.value_and_grad(lambda params: objective(
            name, params, batch, centers, options=options_of(name), axis_name=axis_name)[0])(params)

    def of_a_share(params, batch):
        value, gradient = value_and_gradient(params, batch, "devices")
        return value, jax.lax.pmean(gradient, "devices")

    mesh = jax.make_mesh((2,), ("devices",), devices=jax.devices()[:2],
                         axis_types=(jax.sharding.AxisType.Auto,))
    whole, split = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("devices")
    found = jax.jit(jax.shard_map(of_a_share, mesh=mesh, in_specs=(whole, split),
                                  out_specs=whole))(params, batch)
    expected = jax.jit(value_and_gradient)(params, batch)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-4, atol=1e-6),
                 found, expected)


@pytest.mark.parametrize("name", METHODS)
def test_clean_methods_are_those_that_see_no_noisy_images(name):
    params, batch, centers = as_jax(jax.tree.map(
        lambda values: np.asarray(values, np.float32), problem()))
    loss_of = jax.jit(lambda noisy: objective(
        name, params, batch._replace(noisy=noisy, labels=jnp.asarray(LABELS)), centers)[0])
    same = loss_of(batch.noisy) == loss_of(1 - batch.noisy)
    assert bool(same) == (name in CLEAN_METHODS)


# --- one family after the other ---------------------------------------------------------------


def test_every_softmax_loss_of_a_method_is_smoothed():
    params, batch, centers = problem()
    clean, noisy = (network(params, view)[1] for view in (batch.clean, batch.noisy))
    smooth = np.mean([0.8 * cross_entropy(z) - 0.2 * np.mean(np.log(probabilities(z)))
                      for z in (clean, noisy)])

    def forward(batch_stats, images):
        logits = jnp.asarray(network(params, np.asarray(images))[1], jnp.float32)
        return Outputs(logits, logits, {}), batch_stats

    state = CentroidState(jnp.zeros((CLASSES, CLASSES)), jnp.zeros(CLASSES, bool))
    loss, _ = make_method("both", label_smoothing=0.2).objective(
        in_turn(forward), (jnp.eye(CLASSES), jnp.zeros(CLASSES)), {}, state, batch, weight=1.0,
        key=jax.random.key(0), axis_name=None)
    np.testing.assert_allclose(loss, smooth, rtol=1e-5)


def test_centers_move_as_in_their_source():
    params, batch, centers = problem()
    features, _ = network(params, batch.clean)
    labels = np.where(LABELS == 2, -1, LABELS)
    expected = centers.copy()
    for c in (0, 1):
        own = features[labels == c]
        expected[c] -= 0.3 * np.sum(centers[c] - own, axis=0) / (1 + len(own))
    with float64():
        _, evaluated = objective(
            "center", as_jax(params), as_jax(batch._replace(labels=labels)), centers,
            options=options_of("center", rate=0.3))
        np.testing.assert_allclose(evaluated.centroids.mean, expected, rtol=1e-9)


def test_consistency_is_0_for_the_same_predictions_and_never_below():
    params, batch, centers = as_jax(jax.tree.map(
        lambda values: np.asarray(values, np.float32), problem()))
    batch = batch._replace(labels=jnp.asarray(LABELS))

    def term(noisy, name="consistency"):
        _, evaluated = objective(name, params, batch._replace(noisy=noisy), centers,
                                 perturb=lambda key, images: images)
        return evaluated.metrics["consistency"]

    np.testing.assert_allclose(term(batch.clean), 0, atol=1e-7)
    np.testing.assert_allclose(term(batch.clean, "noisy_consistency"), 0, atol=1e-6)
    assert term(batch.noisy) > 1e-3 and term(batch.noisy, "noisy_consistency") > 1e-4


def test_noisy_versions_are_drawn_anew_for_every_image_and_version():
    params, batch, centers = as_jax(jax.tree.map(
        lambda values: np.asarray(values, np.float32), problem()))
    batch = batch._replace(labels=jnp.asarray(LABELS))
    drawn = []

    def record(key, images):
        noise = jax.random.normal(key, images.shape)
        jax.debug.callback(lambda noise: drawn.append(np.asarray(noise).ravel()), noise)
        return images + noise

    for key in (0, 0, 1):
        objective("noisy_consistency", params, batch, centers, perturb=record, key=key,
                  options=options_of("noisy_consistency", num_versions=3))
        jax.effects_barrier()
    assert len(drawn) == 3 * 2 * BATCH
    one, again, other = (sorted(map(tuple, part)) for part in np.split(np.array(drawn), 3))
    assert one == again and not set(one) & set(other)
    assert len(set(one)) == 2 * BATCH


def test_the_finite_difference_of_cure_is_its_sources():
    params, batch, centers = problem()
    with float64():
        def term(step):
            return objective("cure", as_jax(params), as_jax(batch), centers,
                             options=options_of("cure", step=step))[1].metrics["curvature"]

        exact, near, far = (float(jax.jit(term, static_argnums=0)(step))
                            for step in (None, 1e-6, 1.5))
    np.testing.assert_allclose(near, exact, rtol=1e-4)
    np.testing.assert_allclose(
        2 * far, by_cure(params, batch, centers, CureOptions(weight=2.0, step=1.5))[1], rtol=1e-9)
    assert abs(far / exact - 1) > 0.1


def test_the_curvature_of_cure_is_the_hessians():
    params, batch, centers = problem()
    with float64():
        def loss(images):
            hidden = jnp.tanh(images @ params["first"])
            return softmax_cross_entropy(hidden @ params["kernel"] + params["bias"][None], LABELS)

        images = batch.clean.reshape(BATCH, INPUTS)
        expected = jnp.mean(jnp.sum(jnp.square(
            curvature.hvp(loss, jnp.asarray(images), SIGNS / INPUTS**0.5)), axis=1))
        found = objective("cure", as_jax(params), as_jax(batch), centers)[1].metrics["curvature"]
        np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_projections_of_the_jacobian_are_unbiased():
    params, batch, centers = problem()
    expected = np.sum(jacobians(params, batch.clean)**2) / (2 * BATCH)

    def term(key):
        return objective("jacobian_penalty", as_jax(params), as_jax(batch), centers, key=key,
                         options=options_of("jacobian_penalty", num_projections=4),
                         )[1].metrics["jacobian"]

    with float64():
        draws = np.asarray(jax.jit(jax.vmap(term))(jnp.arange(200)))
    error = np.std(draws) / 200**0.5
    assert error < 0.02 * expected and abs(np.mean(draws) - expected) < 3.5 * error


def test_the_margins_of_the_equations_are_of_all_kinds():
    options = EQUATIONS["large_margin"][1]
    params, batch, _ = problem()
    d = distances_to_boundaries(network(params, batch.clean)[1]).min(axis=1)
    lowest = options.margin * (1 - options.clip)
    kinds = np.digitize(d, [lowest, options.margin])
    assert np.bincount(kinds, minlength=3).min() >= 2
    # The nearest boundary is not always that with the class of the largest logit.
    assert np.any(distances_to_boundaries(network(params, batch.clean)[1]).argmin(axis=1) == 1)


def test_the_margin_of_affine_logits_is_the_distance_to_the_boundary():
    rng = np.random.default_rng(0)
    kernel, bias = rng.normal(size=(INPUTS, CLASSES)), rng.normal(size=CLASSES)
    _, batch, _ = problem()
    points = batch.clean.reshape(BATCH, INPUTS)
    with float64():
        def forward(batch_stats, images):
            rows = images.reshape(len(images), -1)
            return Outputs(rows @ kernel + bias[None], rows, {}), batch_stats

        options = MethodOptions(large_margin=LargeMarginOptions(
            margin=100.0, clip=3.0, num_classes=CLASSES - 1))
        state = CentroidState(jnp.zeros((CLASSES, INPUTS)), jnp.zeros(CLASSES, bool))
        _, evaluated = make_method("large_margin", options=options).objective(
            forward, (kernel, bias), {}, state, as_jax(batch), weight=1.0,
            key=jax.random.key(0), axis_name=None)
        to_all = geometry.signed_boundary_distance(points, LABELS, kernel, bias)
        nearest = np.min(np.where(np.eye(CLASSES, dtype=bool)[LABELS], np.inf, to_all), axis=1)
    np.testing.assert_allclose(
        evaluated.metrics["missing_margin"], 100 - np.mean(nearest), rtol=1e-9)


@pytest.mark.parametrize(("name", "attacked"), [
    ("pgd", attacked_by_pgd), ("trades", attacked_by_trades)])
def test_attacks_of_training_are_those_of_their_sources_in_l2_too(name, attacked):
    params, batch, centers = problem()
    equation, own = EQUATIONS[name]
    own = dataclasses.replace(own, norm="l2", step_size=0.1)
    with float64():
        loss, _ = jax.jit(lambda params: objective(
            name, params, as_jax(batch), centers, options=MethodOptions(**{name: own})))(
                as_jax(params))
        np.testing.assert_allclose(loss, sum(equation(params, batch, centers, own)), rtol=1e-5)
    changes = attacked(own) - batch.clean.reshape(BATCH, INPUTS)
    assert np.all(np.linalg.norm(changes, axis=1) <= 0.2 + 1e-9)
    assert float(loss) > cross_entropy(network(params, batch.clean)[1]) + 0.003


def test_pgd_in_a_ball_of_radius_0_is_normal():
    params, batch, centers = as_jax(jax.tree.map(
        lambda values: np.asarray(values, np.float32), problem()))
    batch = batch._replace(labels=jnp.asarray(LABELS))
    values = [jax.jit(jax.value_and_grad(lambda params, name=name: objective(
        name, params, batch, centers, options=options_of("pgd", epsilon=0.0))[0]))(params)
        for name in ("pgd", "normal")]
    jax.tree.map(np.testing.assert_array_equal, *values)


def test_attacks_leave_the_batch_statistics_to_the_passes_of_the_losses():
    params, batch, centers = as_jax(jax.tree.map(
        lambda values: np.asarray(values, np.float32), problem()))
    batch = batch._replace(labels=jnp.asarray(LABELS))
    for name, passes in (("pgd", 1), ("trades", 2), ("cure", 1)):
        _, evaluated = jax.jit(lambda params, name=name: objective(
            name, params, batch, centers, options=DEFAULTS))(params)
        assert evaluated.batch_stats["passes"] == passes


# --- costs ------------------------------------------------------------------------------------


def products_in(jaxpr):
    """Operations of all products of matrices in a program."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            left = equation.invars[0].aval.shape
            contracted = equation.params["dimension_numbers"][0][0]
            total += np.prod(equation.outvars[0].aval.shape) * np.prod(
                [left[axis] for axis in contracted])
        for part in jax.tree.leaves(list(equation.params.values()),
                                    is_leaf=lambda part: hasattr(part, "eqns")):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                total += equation.params.get("length", 1) * products_in(part)
    return total


@pytest.mark.parametrize("name", METHODS)
def test_a_method_costs_what_its_passes_say(name):
    layers, width, size = 10, 64, 32
    params = [jnp.eye(width) / 8 for _ in range(layers)]
    batch = Batch(*2 * [jnp.zeros((size, 8, 8, 1))], jnp.zeros(size, jnp.int32))
    state = CentroidState(jnp.zeros((CLASSES, width)), jnp.zeros(CLASSES, bool))
    head = jnp.eye(width)[:, :CLASSES], jnp.zeros(CLASSES)

    def operations(method):
        def loss(params):
            def forward(batch_stats, images):
                x = images.reshape(len(images), -1)
                for weights in params:
                    x = jnp.tanh(x @ weights)
                return Outputs(x[:, :CLASSES], x, {}), batch_stats

            return method.objective(in_turn(forward), head, {}, state, batch, weight=1.0,
                                    key=jax.random.key(0), axis_name=None)[0]

        return products_in(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)

    method = make_method(name, perturb=darker)
    # The first layer has no gradient by images where none is asked for.
    np.testing.assert_allclose(
        operations(method) / operations(make_method("normal")), method.passes.relative, rtol=0.08)


def test_what_a_method_needs_and_is_not_given_is_named():
    with pytest.raises(InputError, match="Expected a perturb for the method 'noisy_consistency'"):
        make_method("noisy_consistency")
    with pytest.raises(InputError, match=r"Expected label_smoothing=1 in \[0, 1\)"):
        make_method("normal", label_smoothing=1)
    for wrong, message in (
            (lambda: CenterOptions(weight=-1), r"center.weight=-1 in \[0, inf\)"),
            (lambda: CenterOptions(rate=1.5), r"center.rate=1.5 in \[0, 1\]"),
            (lambda: ConsistencyOptions(weight=np.nan), "consistency.weight=nan"),
            (lambda: NoisyConsistencyOptions(entropy_weight=-1), "entropy_weight=-1"),
            (lambda: NoisyConsistencyOptions(num_versions=1),
             "num_versions=1 to be an integer >= 2"),
            (lambda: GradientPenaltyOptions(weight=-1), "gradient_penalty.weight=-1"),
            (lambda: JacobianPenaltyOptions(weight=-1), "jacobian_penalty.weight=-1"),
            (lambda: JacobianPenaltyOptions(num_projections=0), "num_projections=0"),
            (lambda: CureOptions(weight=-1), "cure.weight=-1"),
            (lambda: CureOptions(step=0), r"cure.step=0 in \(0, inf\)"),
            (lambda: LargeMarginOptions(weight=-1), "large_margin.weight=-1"),
            (lambda: LargeMarginOptions(margin=0), "large_margin.margin=0"),
            (lambda: LargeMarginOptions(clip=0), "large_margin.clip=0"),
            (lambda: LargeMarginOptions(num_classes=0), "num_classes=0"),
            (lambda: AugMixOptions(weight=-1), "augmix.weight=-1"),
            (lambda: AugMixOptions(severity=11), r"augmix.severity=11 in \[0.1, 10\]"),
            (lambda: AugMixOptions(num_chains=0), "num_chains=0"),
            (lambda: AugMixOptions(depth=0), "depth=0"),
            (lambda: PGDOptions(norm="l1"), "Unknown norm 'l1'"),
            (lambda: PGDOptions(epsilon=-1), "epsilon=-1"),
            (lambda: TradesOptions(num_steps=0), "num_steps=0"),
            (lambda: TradesOptions(step_size=0), "step_size=0"),
            (lambda: TradesOptions(weight=-1), "trades.weight=-1")):
        with pytest.raises(InputError, match=message):
            wrong()
