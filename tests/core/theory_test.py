"""Definition 6.1, Theorems 6.1 to 6.3 and Propositions 5.1 and 5.2, against plain NumPy."""

import functools
import itertools
import math

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxrobust import curvature, geometry, losses, probes, theory
from jaxrobust._validate import InputError

KERNEL = np.random.default_rng(0).normal(size=(3, 4))


def linear_softmax(scale=1.0):
    """Features 3 x [B, 3] through a softmax of four classes; the loss of class 0."""
    kernel = jnp.asarray(KERNEL)

    def features_fn(x):
        return jnp.tanh(scale * x)

    def loss(x):
        return -jax.nn.log_softmax(features_fn(x) @ kernel)[:, 0]

    return features_fn, loss


def quadratic_loss(seed=0, size=5, batch=3):
    """l(x) = g x + x H x / 2 for each image, its gradients g and Hessians H, and images at 0."""
    rng = np.random.default_rng(seed)
    hessian = rng.normal(size=(batch, size, size))
    hessian = hessian + hessian.swapaxes(1, 2)
    gradient = rng.normal(size=(batch, size))

    def loss(x):
        return (jnp.einsum("bi,bi->b", jnp.asarray(gradient), x)
                + jnp.einsum("bi,bij,bj->b", x, jnp.asarray(hessian), x) / 2)

    return loss, gradient, hessian, jnp.zeros((batch, size), jnp.float64)


def kinky_loss():
    """The softmax loss of a small ReLU network in float64, three images of 6 pixels."""
    rng = np.random.default_rng(5)
    first, second = (jnp.asarray(rng.normal(size=shape)) for shape in ((6, 12), (12, 3)))
    images = jnp.asarray(rng.uniform(size=(3, 6)))

    def loss(x):
        return -jax.nn.log_softmax(jax.nn.relu(2 * x @ first) @ second)[:, 0]

    return loss, images


# --- Section 6.1 -------------------------------------------------------------------------------


def test_feature_stability_is_that_of_a_loop_over_the_draws(enable_x64):
    x = jax.random.normal(jax.random.key(1), (2, 3), jnp.float64)
    key, sigma, delta, num_draws = jax.random.key(2), 0.3, 0.4, 20
    found = theory.feature_stability(
        *linear_softmax(), x, key, sigma=sigma, delta=delta, num_draws=num_draws,
        chunk_size=num_draws)

    @jax.jit
    def normal(k, i):
        own = probes.salted(key, "gaussian_noise")
        return jax.random.normal(
            jax.random.fold_in(jax.random.fold_in(own, k), i), (3,), jnp.float64)

    def loss(x):
        z = np.tanh(x) @ KERNEL
        return np.log(np.sum(np.exp(z))) - z[0]

    for i, image in enumerate(np.asarray(x)):
        inside, outside, values = 0, [], []
        for k in range(num_draws):
            noisy = image + sigma * np.asarray(normal(k, i))
            values.append(loss(noisy))
            if np.linalg.norm(np.tanh(noisy) - np.tanh(image)) <= delta:
                inside += 1
            else:
                outside.append(values[-1])
        changes = (np.array(values) - loss(image)) ** 2
        np.testing.assert_allclose(found.eta[i], inside / num_draws)
        np.testing.assert_allclose(found.loss_outside[i], np.mean(outside))
        np.testing.assert_allclose(found.squared_change.value[i], changes.mean())
        np.testing.assert_allclose(
            found.squared_change.standard_error[i], changes.std(ddof=1) / num_draws**0.5)
        np.testing.assert_allclose(found.variance.value[i], np.var(values, ddof=1))
        assert 0 < inside < num_draws


def test_no_draw_outside_gives_no_loss_outside():
    features_fn, loss = (functools.partial(jnp.zeros_like),
                         lambda x: jnp.sum(jnp.square(x), axis=-1))
    found = theory.feature_stability(
        features_fn, loss, jnp.ones((2, 3)), jax.random.key(0), sigma=0.1, delta=0.0, num_draws=3)
    assert np.all(found.eta == 1) and np.all(np.isnan(found.loss_outside))


def test_an_image_has_the_same_draws_in_whatever_batch_it_comes():
    features_fn, loss = (lambda x: x), (lambda x: jnp.sum(jnp.square(x), axis=-1))
    x = jax.random.normal(jax.random.key(1), (4, 3))
    settings = {"sigma": 0.3, "num_draws": 3, "with_quadratic": True}
    whole = theory.noise_draws(features_fn, loss, x, jax.random.key(0), **settings)
    part = theory.noise_draws(features_fn, loss, x[2:3], jax.random.key(0), chunk_size=2,
                              indices=jnp.array([2]), **settings)
    chex.assert_trees_all_close(part, jax.tree.map(lambda leaf: leaf[:, 2:3], whole), rtol=1e-5)


def test_the_variance_is_unbiased_and_its_standard_error_honest():
    def measure(key):
        return theory.feature_stability(
            lambda x: x, lambda x: x[:, 0], jnp.zeros((500, 1)), key,
            sigma=2.0, delta=1.0, num_draws=20, chunk_size=20)

    found = jax.jit(measure)(jax.random.key(0))
    for estimate in (found.variance, found.squared_change):
        spread = np.std(estimate.value, ddof=1)
        assert abs(np.mean(estimate.value) - 4) < 4 * spread / 500**0.5
        np.testing.assert_allclose(np.mean(estimate.standard_error), spread, rtol=0.2)


def test_the_quadratic_model_is_taylors(enable_x64):
    loss, gradient, hessian, x = quadratic_loss()
    v = jax.random.normal(jax.random.key(0), x.shape, x.dtype)
    np.testing.assert_allclose(theory.quadratic_model(loss, x, v), loss(x + v), rtol=1e-12)
    _, smooth = linear_softmax()
    x, v = x[:, :3] + 0.2, 1e-3 * v[:, :3]
    missed = [np.abs(theory.quadratic_model(smooth, x, step * v) - smooth(x + step * v)).max()
              for step in (2, 1)]
    np.testing.assert_allclose(missed[0] / missed[1], 8, rtol=0.05)  # of third order


def test_theorem_61_is_exact_for_a_quadratic_loss(enable_x64):
    loss, gradient, hessian, x = quadratic_loss()
    sigma = 0.7
    frobenius = np.sum(hessian**2, axis=(1, 2))
    trace = np.trace(hessian, axis1=1, axis2=2)
    draws = theory.noise_draws(lambda x: x, loss, x, jax.random.key(0), sigma=sigma,
                               num_draws=100_000, chunk_size=100_000, with_quadratic=True)
    found = theory.stability_of(draws, loss(x), delta=1.5)
    expected = theory.quadratic_squared_change(
        *map(jnp.asarray, (np.sum(gradient**2, axis=1), frobenius, trace)), sigma)
    reference = [sigma**2 * g @ g + sigma**4 / 4 * (2 * np.sum(h * h) + np.trace(h) ** 2)
                 for g, h in zip(gradient, hessian, strict=True)]
    np.testing.assert_allclose(expected, reference, rtol=1e-12)
    assert np.all(np.abs(found.squared_change.value - expected)
                  < 4 * found.squared_change.standard_error)
    np.testing.assert_allclose(theory.quadratic_residual(draws, loss(x)), 0, atol=1e-20)
    # Hermite: nothing is left above the second order, so the bound is the value.
    bound = theory.smoothed_curvature_bound(
        found.variance.value, sigma, jnp.asarray(np.sum(gradient**2, axis=1)))
    np.testing.assert_allclose(bound, frobenius, rtol=0.05)
    # Eq. 16 with what Eq. 15's proof uses; the eigenvalues' absolute values give more still.
    lower = theory.curvature_lower_bound(
        found.eta, found.loss_outside, loss(x), jnp.asarray(np.sum(gradient**2, axis=1)), sigma)
    assert np.all(2 * frobenius + trace**2 >= lower - 1e-9)
    assert np.all(np.asarray(found.eta) < 1)


@functools.partial(jax.jit, static_argnames="sigma")
def softmax_draws(x, key, *, sigma):
    return theory.noise_draws(
        *linear_softmax(scale=3.0), x, key, sigma=sigma, num_draws=20, chunk_size=20)


@hypothesis.given(seed=st.integers(0, 1000), sigma=st.sampled_from([0.1, 0.5, 3.0]),
                  delta=st.floats(0, 3))
@hypothesis.settings(max_examples=30)
def test_the_bounds_of_appendix_e_hold_for_whatever_draws(seed, sigma, delta):
    with jax.enable_x64(True):
        _, loss = linear_softmax(scale=3.0)
        x = jax.random.normal(jax.random.key(seed), (3, 3), jnp.float64)
        draws = softmax_draws(x, jax.random.key(seed + 1), sigma=sigma)
        found = theory.stability_of(draws, loss(x), delta=delta)
        k_max = np.abs(np.asarray(KERNEL)).sum(axis=0).max()  # |tanh| <= 1
        upper = theory.curvature_upper_bound(
            found.eta, delta, sigma, jnp.asarray(KERNEL), float(k_max))
        # Steps 2 to 6: no assumption in them.
        assert np.all(2 / sigma**4 * found.squared_change.value <= upper * (1 + 1e-9))
        lower = theory.curvature_lower_bound(
            found.eta, found.loss_outside, loss(x), jnp.zeros(3, jnp.float64), sigma)
        assert np.all(lower <= 4 / sigma**4 * found.squared_change.value * (1 + 1e-9))


def test_the_bounds_on_the_curvature_are_the_papers():
    eta, outside, clean, slope = (np.array(values, np.float32) for values in (
        [1.0, 0.75, 0.0], [np.nan, 3.0, 2.0], [0.5, 1.0, 4.0], [1.0, 2.0, 3.0]))
    kernel, sigma, delta, k_max = KERNEL.astype(np.float32), 0.5, 0.3, 7.0
    rows = max(np.linalg.norm(kernel[:, j]) for j in range(4))
    upper = theory.curvature_upper_bound(
        jnp.asarray(eta), delta, sigma, jnp.asarray(kernel), k_max)
    lower = theory.curvature_lower_bound(*map(jnp.asarray, (eta, outside, clean, slope)), sigma)
    for i in range(3):
        np.testing.assert_allclose(upper[i], 8 / sigma**4 * (
            eta[i] * rows**2 * delta**2 + 4 * (1 - eta[i]) * k_max**2), rtol=1e-5)
        change = 0 if eta[i] == 1 else (1 - eta[i]) * (outside[i] - clean[i]) ** 2
        np.testing.assert_allclose(
            lower[i], 4 / sigma**4 * (change - sigma**2 * slope[i]), rtol=1e-5)


def test_the_hermite_inequality_holds_at_a_kink_in_closed_form():
    # l(x) = |x| at 0: Var |sigma e| = sigma^2 (1 - 2 / pi), and l_sigma'' = sqrt(2 / pi) / sigma.
    sigma = 0.3
    second = math.sqrt(2 / math.pi) / sigma
    bound = theory.smoothed_curvature_bound(jnp.array([sigma**2 * (1 - 2 / math.pi)]), sigma)
    assert second**2 <= bound.item() <= 1.2 * second**2
    smooth = curvature.smoothed_curvature(
        lambda x: jnp.abs(x[:, 0]), jnp.zeros((1, 1)), jax.random.key(0), sigma=sigma,
        num_draws=300, chunk_size=300)
    found, error = smooth.squared_frobenius
    assert np.all(np.abs(found - second**2) < 4 * error) and np.all(error < 0.3 * second**2)


def test_the_pointwise_hessian_can_be_above_what_only_the_smoothed_one_cannot(enable_x64):
    # A ripple much finer than the noise: its curvature is huge, the loss hardly changes.
    def loss(x):
        return 0.01 * jnp.cos(100 * x[:, 0])

    x = jnp.zeros((1, 1), jnp.float64)
    sigma = 0.5
    found = theory.feature_stability(lambda x: x, loss, x, jax.random.key(0), sigma=sigma,
                                     delta=1.0, num_draws=10_000, chunk_size=10_000)
    bound = 2 / sigma**4 * found.squared_change.value
    pointwise = curvature.hvp(loss, x, jnp.ones_like(x))[:, 0] ** 2
    smooth = curvature.smoothed_curvature(
        loss, x, jax.random.key(1), sigma=sigma, num_draws=300, chunk_size=300)
    assert np.all(pointwise > 1e5 * bound)
    assert np.all(smooth.squared_frobenius.value < bound)


def test_the_smoothed_gradient_is_that_of_the_mean_loss(enable_x64):
    loss, gradient, hessian, x = quadratic_loss()
    found = theory.smoothed_gradient_norm_squared(
        loss, x, jax.random.key(0), sigma=0.3, num_draws=100, chunk_size=100)
    # Antithetic draws of a quadratic loss have its gradient without error.
    np.testing.assert_allclose(found.value, np.sum(gradient**2, axis=1), rtol=1e-9)
    loss, images = kinky_loss()
    measure = jax.jit(functools.partial(
        theory.smoothed_gradient_norm_squared, loss, sigma=0.5, num_draws=8, chunk_size=8))
    many = [measure(images, jax.random.key(seed)) for seed in range(60)]
    values = np.stack([estimate.value for estimate in many])
    claimed = np.mean([estimate.standard_error for estimate in many], axis=0)
    np.testing.assert_allclose(claimed, values.std(axis=0, ddof=1), rtol=0.5)


# --- Section 6.2 -------------------------------------------------------------------------------


@hypothesis.given(margin=st.floats(-5, 5), rho=st.floats(0.01, 5))
def test_the_ramp_loss_is_definition_62(margin, rho):
    expected = 1 if margin <= 0 else 0 if margin >= rho else 1 - margin / rho
    found = theory.ramp_loss(jnp.float32(margin), rho)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert 0 <= found <= 1 and (margin > 0 or found == 1)  # above the indicator of margin <= 0


def test_the_ball_margin_is_the_papers():
    features = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)
    found = theory.ball_margin(jnp.asarray(features), jnp.array([0.0, 1.0]), 2.0)
    np.testing.assert_allclose(found, [4 - 9 - 9, 4 - 1])


def reference_bounds(error, rho, feature_bound, centre_bound, n, failure):
    """Eq. 19, and its repair."""
    tail = 3 * math.sqrt(math.log(2 / failure) / (2 * n))
    paper = feature_bound**2 + 2 * centre_bound * feature_bound + centre_bound**2 / math.sqrt(n)
    ours = (2 * centre_bound * feature_bound + centre_bound**2 / 2) / math.sqrt(n)
    return error + 2 / rho * paper + tail, error + 2 / rho * ours + tail


@hypothesis.given(rho=st.floats(0.01, 50), feature_bound=st.floats(0, 10),
                  centre_bound=st.floats(0, 10), n=st.integers(1, 10_000),
                  failure=st.floats(0.001, 0.99))
def test_the_bounds_on_the_mapping_error_are_the_written_ones(
        rho, feature_bound, centre_bound, n, failure):
    arguments = {"rho": rho, "feature_bound": feature_bound, "centre_bound": centre_bound,
                 "num_samples": n, "failure_probability": failure}
    paper, ours = reference_bounds(0.25, rho, feature_bound, centre_bound, n, failure)
    found = theory.generalization_bound(jnp.float32(0.25), **arguments)
    repaired = theory.held_out_bound(jnp.float32(0.25), **arguments)
    np.testing.assert_allclose(found, paper, rtol=1e-4)
    np.testing.assert_allclose(repaired, ours, rtol=1e-4)
    assert repaired <= found * 1.0001


@hypothesis.given(radius=st.floats(0.01, 100), share=st.floats(0.001, 0.999),
                  feature_bound=st.floats(0.01, 10), centre_share=st.floats(0, 1),
                  n=st.integers(1, 10**9))
@hypothesis.settings(max_examples=300)
def test_theorem_62_says_something_only_of_balls_that_hold_every_feature(
        radius, share, feature_bound, centre_share, n):
    centre_bound = centre_share * feature_bound  # a mean of features
    bound = theory.generalization_bound(
        jnp.float32(0), rho=share * radius**2, feature_bound=feature_bound,
        centre_bound=centre_bound, num_samples=n, failure_probability=0.5)
    assert bound >= 1 or radius > feature_bound + centre_bound


@pytest.mark.parametrize("centre_bound", [0.2, 1.0, 5.0])
def test_the_held_out_complexity_bounds_the_exact_one(centre_bound):
    features = np.random.default_rng(3).normal(size=(8, 3))
    suprema = []
    for signs in itertools.product((-1, 1), repeat=8):
        # sup over ||m|| <= R of -sum sigma ||f - m||^2: best along v, a quadratic in ||m||.
        v, s = np.array(signs) @ features, sum(signs)
        constant = -np.array(signs) @ np.sum(features**2, axis=1)
        length = min(np.linalg.norm(v) / s, centre_bound) if s > 0 else centre_bound
        suprema.append((constant + 2 * length * np.linalg.norm(v) - s * length**2) / 8)
    bound = theory.held_out_complexity(
        feature_bound=np.sqrt(np.mean(np.sum(features**2, axis=1))), centre_bound=centre_bound,
        num_samples=8)
    assert 0.3 * bound < np.mean(suprema) <= bound


def test_the_held_out_bound_covers_centres_chosen_on_the_sample():
    # 400 samples of 200 Gaussian features; the centre is each sample's own mean.
    rng = np.random.default_rng(0)
    n, radius, rho, failure = 200, 2.0, 2.0, 0.1
    samples = rng.normal(scale=0.6, size=(400, n, 2))
    fresh = rng.normal(scale=0.6, size=(20_000, 2))
    covered, trivial = [], []
    for sample in samples:
        centre = sample.mean(axis=0)
        margins = theory.ball_margin(jnp.asarray(sample, jnp.float32),
                                     jnp.asarray(centre, jnp.float32), radius)
        bound = float(theory.held_out_bound(
            jnp.mean(theory.ramp_loss(margins, rho)), rho=rho, centre_bound=0.25,
            feature_bound=float(np.sqrt(np.mean(np.sum(sample**2, axis=1)))), num_samples=n,
            failure_probability=failure))
        assert np.linalg.norm(centre) <= 0.25
        error = np.mean(np.linalg.norm(fresh - centre, axis=1) > radius)
        covered.append(error <= bound)
        trivial.append(bound >= 1)
    assert np.mean(covered) >= 1 - failure and not any(trivial)


# --- Section 6.3 -------------------------------------------------------------------------------


@hypothesis.given(tau=st.floats(0, 1))
def test_the_sharp_bound_is_above_the_papers_and_attained(tau):
    paper = theory.jensen_shannon_bound(jnp.float32(tau)).item()
    sharp = theory.jensen_shannon_sharp_bound(jnp.float32(tau)).item()
    np.testing.assert_allclose(paper, (2 * tau - 1) ** 2 / 2 if tau >= 0.5 else 0, atol=1e-6)
    if tau >= 0.5:
        # Two distributions on two points, which meet the hypotheses with this tau.
        attained = divergence(np.array([tau, 1 - tau]), np.array([1 - tau, tau]))
        np.testing.assert_allclose(sharp, attained, atol=1e-5)
    else:
        np.testing.assert_allclose(sharp, 0, atol=1e-6)
    assert paper <= sharp + 1e-6 <= math.log(2) + 2e-6


@pytest.mark.slow
@hypothesis.given(seed=st.integers(0, 10_000), number=st.integers(2, 6))
def test_a_decision_shows_no_more_divergence_than_there_is(seed, number):
    random = np.random.default_rng(seed)
    p, q = random.dirichlet(np.full(number, 0.5), size=2)
    side = random.random(number) < 0.5
    shares = [min(values[side].sum(), 1.0) for values in (p, q)]
    bound = theory.jensen_shannon_decision_bound(*jnp.float32(shares)).item()
    assert 0 <= bound <= divergence(p, q) + 1e-5
    # Equal to it where the two sides are all that there is; alike for either class and side.
    two = [np.array([share, 1 - share]) for share in shares]
    np.testing.assert_allclose(bound, divergence(*two), atol=1e-5)
    for other in (shares[::-1], [1 - share for share in shares]):
        np.testing.assert_allclose(
            theory.jensen_shannon_decision_bound(*jnp.float32(other)), bound, atol=1e-6)


def divergence(p, q):
    """The Jensen-Shannon divergence of two probability vectors, Definition G.2."""
    middle = (p + q) / 2
    def kl(a):
        kept = a > 0
        return np.sum(a[kept] * np.log(a[kept] / middle[kept]))
    return (kl(p) + kl(q)) / 2


@pytest.mark.parametrize("distance", [0.3, 1.0, 3.0])
def test_the_estimate_is_below_the_divergence_of_two_gaussians(distance):
    grid = np.linspace(-8, 8 + distance, 20_001)
    densities = [np.exp(-(grid - centre) ** 2 / 2) for centre in (0, distance)]
    truth = divergence(*(density / density.sum() for density in densities))
    rng = np.random.default_rng(0)
    n = 4000
    x = np.concatenate([rng.normal(size=n), distance + rng.normal(size=n)])
    is_first = np.arange(2 * n) < n
    found = {}
    for name, steepness in (("best", 1.0), ("poor", 0.5), ("overconfident", 1.5), ("blind", 0.0)):
        # The best discriminator is the log ratio of the densities.
        log_odds = steepness * (distance**2 / 2 - distance * x)
        found[name] = theory.jensen_shannon_estimate(
            jnp.asarray(log_odds, jnp.float32), jnp.asarray(is_first))
    error = found["best"].standard_error
    assert abs(found["best"].value - truth) < 3 * error < 0.05
    for name in ("poor", "overconfident", "blind"):
        assert found[name].value < truth + 3 * found[name].standard_error
        assert found[name].value <= found["best"].value + 1e-6
    np.testing.assert_allclose(found["blind"].value, 0, atol=1e-6)


def test_the_estimate_weighs_both_distributions_alike_and_its_error_is_honest():
    rng = np.random.default_rng(1)
    values, errors = [], []
    for _ in range(200):
        log_odds = np.concatenate([rng.normal(1, 1, size=30), rng.normal(-1, 1, size=90)])
        estimate = theory.jensen_shannon_estimate(
            jnp.asarray(log_odds, jnp.float32), jnp.arange(120) < 30)
        losses_ = np.log1p(np.exp(np.where(np.arange(120) < 30, -log_odds, log_odds)))
        np.testing.assert_allclose(
            estimate.value, np.log(2) - (losses_[:30].mean() + losses_[30:].mean()) / 2, atol=1e-5)
        values.append(estimate.value.item())
        errors.append(estimate.standard_error.item())
    np.testing.assert_allclose(np.mean(errors), np.std(values, ddof=1), rtol=0.2)
    single = theory.jensen_shannon_estimate(jnp.zeros(2), jnp.array([True, False]))
    assert np.isnan(single.standard_error)


# --- Section 5 ---------------------------------------------------------------------------------


@hypothesis.given(seed=st.integers(0, 10_000))
@hypothesis.settings(max_examples=20)
def test_the_smallest_distance_between_classes_is_that_of_a_double_loop(seed):
    rng = np.random.default_rng(seed)
    features, labels = rng.normal(size=(12, 3)).astype(np.float32), rng.integers(0, 3, size=12)
    distances = [np.linalg.norm(a - b) for (a, i), (b, j) in itertools.combinations(
        zip(features, labels, strict=True), 2) if i != j]
    found = theory.smallest_distance_between_classes(jnp.asarray(features), jnp.asarray(labels))
    np.testing.assert_allclose(found, min(distances, default=np.inf), rtol=1e-5)


@pytest.mark.slow
def test_propositions_51_and_52_where_both_losses_are_trained_to_zero():
    delta_v, delta_d, num_classes = 0.5, 2.0, 3  # delta_d > 2 delta_v
    labels = jnp.arange(18) % num_classes
    keys = jax.random.split(jax.random.key(0), 2)
    parameters = (2 * jax.random.normal(keys[0], (18, 4)), jax.random.normal(keys[1], (4, 3)),
                  jnp.zeros(3))
    members = jax.nn.one_hot(labels, num_classes).T / 6

    def terms(parameters):
        features, kernel, bias = parameters
        means = jnp.dot(members, features)
        present = jnp.ones(num_classes, bool)
        # A little further than asked, so that both are 0 exactly after finitely many steps.
        return (losses.compactness_loss(features, labels, means, delta_v=delta_v - 0.02),
                losses.margin_loss(means, present, kernel, bias, delta_d=delta_d + 0.1))

    def step(_, parameters):
        gradient = jax.grad(lambda p: 6 * terms(p)[0] + terms(p)[1])(parameters)
        return jax.tree.map(lambda p, g: p - 0.05 * g, parameters, gradient)

    features, kernel, bias = jax.jit(
        lambda parameters: jax.lax.fori_loop(0, 2000, step, parameters))(parameters)
    means = jnp.dot(members, features)
    assert losses.compactness_loss(features, labels, means, delta_v=delta_v) == 0
    assert losses.margin_loss(means, jnp.ones(3, bool), kernel, bias, delta_d=delta_d) == 0
    dispersion = geometry.class_dispersion(features, labels, num_classes)
    assert np.all(dispersion <= 2 * delta_v)
    assert np.all(geometry.class_margin(features, labels, kernel, bias) >= delta_d - delta_v)
    assert dispersion.max() < theory.smallest_distance_between_classes(features, labels)
    assert dispersion.max() > 0.5  # the hinge does not let the features collapse


# --- Arguments ---------------------------------------------------------------------------------


def test_bad_arguments_are_named():
    x, key = jnp.zeros((2, 3)), jax.random.key(0)
    def loss(x):
        return jnp.sum(x, axis=1)

    bound = {"rho": 1.0, "feature_bound": 1.0, "centre_bound": 1.0, "num_samples": 10,
             "failure_probability": 0.1}
    draws = theory.noise_draws(lambda x: x, loss, x, key, sigma=1.0, num_draws=2)
    settings = {"sigma": 1.0, "delta": 1.0, "num_draws": 2}
    for changed, named in (({"sigma": 0.0}, "sigma=0.0"), ({"delta": -1.0}, "delta=-1.0"),
                           ({"num_draws": 0}, "num_draws=0")):
        with pytest.raises(InputError, match=named):
            theory.feature_stability(lambda x: x, loss, x, key, **settings | changed)
    with pytest.raises(InputError, match="with_quadratic=True"):
        theory.quadratic_residual(draws, loss(x))
    with pytest.raises(InputError, match="Expected v of the shape of x"):
        theory.quadratic_model(loss, x, x[:1])
    with pytest.raises(InputError, match="Expected clean_loss"):
        theory.stability_of(draws, jnp.zeros(3), delta=1.0)
    with pytest.raises(InputError, match="k_max=-1"):
        theory.curvature_upper_bound(jnp.ones(2), 1.0, 1.0, jnp.ones((3, 4)), -1)
    with pytest.raises(InputError, match="Expected loss of shape"):
        theory.curvature_lower_bound(jnp.ones(2), jnp.ones(2), jnp.ones(3), jnp.ones(2), 1.0)
    with pytest.raises(InputError, match="sigma=0"):
        theory.quadratic_squared_change(jnp.ones(2), jnp.ones(2), jnp.ones(2), 0)
    with pytest.raises(InputError, match="sigma=0"):
        theory.smoothed_curvature_bound(jnp.ones(2), 0)
    with pytest.raises(InputError, match="num_draws=2"):
        theory.smoothed_gradient_norm_squared(loss, x, key, sigma=1.0, num_draws=2)
    for function in (theory.generalization_bound, theory.held_out_bound):
        for name, value in (("rho", 0.0), ("feature_bound", -1.0), ("centre_bound", -1.0),
                            ("num_samples", 0), ("failure_probability", 1.0)):
            with pytest.raises(InputError, match=f"{name}={value}"):
                function(jnp.float32(0), **bound | {name: value})
    with pytest.raises(InputError, match="rho=0"):
        theory.ramp_loss(jnp.ones(2), 0)
    with pytest.raises(InputError, match="Expected centre"):
        theory.ball_margin(jnp.ones((2, 3)), jnp.ones(2), 1.0)
    with pytest.raises(InputError, match="Expected is_first"):
        theory.jensen_shannon_estimate(jnp.ones(2), jnp.ones(3, bool))
    # Of integers, ~1 is -2: they would weigh the examples.
    with pytest.raises(InputError, match="Expected is_first of dtype bool, got int32"):
        theory.jensen_shannon_estimate(jnp.ones(2), jnp.array([0, 1]))
    for of_one in (jnp.ones(2, bool), jnp.zeros(2, bool)):
        with pytest.raises(InputError, match="number of examples of the first distribution="):
            theory.jensen_shannon_estimate(jnp.ones(len(of_one)), of_one)
    with pytest.raises(InputError, match="Expected labels"):
        theory.smallest_distance_between_classes(jnp.ones((2, 3)), jnp.arange(3))
    with pytest.raises(InputError, match="Expected labels of an integer dtype, got float32"):
        theory.smallest_distance_between_classes(jnp.ones((2, 3)), jnp.ones(2))
    nothing = theory.NoiseDraws(jnp.zeros((0, 2)), jnp.zeros((0, 2)), None)
    with pytest.raises(InputError, match="Expected displacement of shape .* no size 0"):
        theory.stability_of(nothing, jnp.zeros(2), delta=1.0)
    with pytest.raises(InputError, match="Expected indices"):
        theory.gaussian_noise(key, 0, x, sigma=1.0, indices=jnp.arange(3))


def test_without_examples_of_two_classes_nothing_is_near():
    found = theory.smallest_distance_between_classes(jnp.ones((2, 3)), jnp.zeros(2, jnp.int32))
    assert found == np.inf
    with pytest.raises(InputError, match="Expected features of shape .* no size 0"):
        theory.smallest_distance_between_classes(jnp.ones((0, 3)), jnp.zeros(0, jnp.int32))


def test_numbers_of_numpy_are_as_good_as_those_of_python():
    settings = {"rho": np.float64(1), "feature_bound": np.float32(1), "centre_bound": np.int64(1),
                "num_samples": np.int64(100), "failure_probability": np.float64(0.1)}
    plain = {name: value.item() for name, value in settings.items()}
    for bound in (theory.generalization_bound, theory.held_out_bound):
        np.testing.assert_allclose(
            bound(jnp.float32(0.25), **settings), bound(jnp.float32(0.25), **plain), rtol=1e-6)
    np.testing.assert_allclose(
        theory.curvature_upper_bound(
            jnp.ones(2), np.float64(0.3), np.float64(0.5), jnp.ones((3, 4)), np.int64(7)),
        theory.curvature_upper_bound(jnp.ones(2), 0.3, 0.5, jnp.ones((3, 4)), 7), rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-25, 1e-18, 1e18])
def test_the_moments_of_the_loss_are_right_at_every_scale(scale):
    losses_ = scale * jnp.array([[1.0, 2.0, 4.0, 5.0]]).T
    found = theory.stability_of(
        theory.NoiseDraws(jnp.zeros((4, 1)), losses_, None), jnp.array([scale]), delta=1.0)
    # Changes 0, 1, 3, 4, and deviations -2, -1, 1, 2 from the mean.
    for estimate, squares, correction in ((found.squared_change, [0, 1, 9, 16], 1),
                                          (found.variance, [4, 1, 1, 4], 4 / 3)):
        held = scale**2 > 1e-37
        np.testing.assert_allclose(
            estimate.value, held * scale**2 * correction * np.mean(squares), rtol=1e-5)
        np.testing.assert_allclose(estimate.standard_error, (
            held * scale**2 * correction * np.std(squares, ddof=1) / 2), rtol=1e-5)
    # The quadratic model is off by 2 everywhere: 4 of a mean of 26 / 4.
    residual = theory.quadratic_residual(theory.NoiseDraws(
        jnp.zeros((4, 1)), losses_, losses_ + 2 * scale), jnp.array([scale]))
    np.testing.assert_allclose(residual, 4 / 6.5, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_the_smoothed_gradient_is_right_at_every_scale(scale):
    factor = jnp.float32(scale)
    found = theory.smoothed_gradient_norm_squared(
        lambda x: factor * jnp.sum(x, axis=1), jnp.zeros((2, 5)), jax.random.key(0), sigma=0.1,
        num_draws=4, chunk_size=4)
    np.testing.assert_allclose(found.value, 5 * scale**2, rtol=1e-5)
    chex.assert_tree_all_finite(found)
