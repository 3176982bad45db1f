"""The loss terms and their sum against the equations, over devices, and at their traps."""

import dataclasses
import functools
import re
from typing import NamedTuple

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from jaxrobust import InputError, losses
from jaxrobust.centroids import CentroidState, init_centroids, update_centroids
from jaxrobust.images import Batch, Outputs
from jaxrobust.losses import AUTHORS_RELEASE, RobustLossConfig, robust_loss
from jaxrobust.methods import make_method

NUM_DEVICES = 8
ARRAYS = (0, 1, 2, 3)  # features, noisy features, kernel, bias: what is differentiated


class Problem(NamedTuple):
    """A batch with everything the losses ask for; float64, kernel in Flax's layout."""

    features: np.ndarray
    noisy: np.ndarray
    kernel: np.ndarray
    bias: np.ndarray
    mean: np.ndarray
    seen: np.ndarray
    labels: np.ndarray


def random_problem(seed, labels, num_classes, dim, seen=None):
    rng = np.random.default_rng(seed)
    batch = len(labels)
    features = 2 * rng.normal(size=(batch, dim))
    return Problem(
        features=features, noisy=features + rng.normal(size=(batch, dim)),
        kernel=rng.normal(size=(dim, num_classes)), bias=rng.normal(size=num_classes),
        mean=rng.normal(size=(num_classes, dim)),
        seen=np.ones(num_classes, bool) if seen is None else np.array(seen),
        labels=np.array(labels, np.int32))


def config_of(momentum, delta_v, delta_d, **options):
    return RobustLossConfig(alpha=0.7, beta=1.3, gamma_reg=0.2, lam=0.4, momentum=momentum,
                            delta_v=delta_v, delta_d=delta_d, **options)


# (batch, classes, dimensions), configuration. Every value of every option occurs; they come in
# pairs because each pair is one compilation.
CASES = (
    ((1, 2, 1), config_of(0.9, 0.5, 5.0)),
    ((4, 3, 2), config_of(0.9, 0.5, 1.0)),
    ((5, 4, 3), config_of(0.5, 1.5, 0.5, margin_squared=True)),
    ((8, 5, 2), config_of(0.0, 0.0, 2.0, boundaries="mean")),
    ((9, 3, 4), config_of(0.9, 1.0, 1.0, compact_squared=False)),
    ((6, 2, 3), config_of(0.5, 0.5, 0.0, compact_centroids="naive", norm_centroids="naive")),
    ((8, 3, 3), config_of(0.9, 0.5, 1.0, compact_linear_beyond=0.8)),
    ((7, 4, 1), config_of(0.99, 0.5, 2.0, margin_centroids="momentum")),
    ((8, 3, 5), config_of(0.9, 0.2, 3.0, boundaries="mean", margin_squared=True,
                          compact_squared=False, compact_centroids="naive",
                          margin_centroids="momentum", norm_centroids="naive")),
    ((8, 3, 3), config_of(0.9, 0.3, 0.8, direction=True)),
    ((7, 4, 3), config_of(0.5, 0.1, 0.5, direction=True, align_to="other", boundaries="mean",
                          compact_centroids="naive", margin_centroids="momentum")),
    ((8, 3, 4), config_of(0.9, 0.5, 0.4, align_to="other", margin_relative=True)),
    ((6, 3, 2), config_of(0.5, 0.5, 0.7, align_to="other", margin_relative=True,
                          compact_centroids="naive", compact_linear_beyond=0.8,
                          margin_squared=True)),
)


@st.composite
def problems(draw, cases=CASES):
    """Any labels: absent classes, classes of one example, and -1, which is no class."""
    (batch, num_classes, dim), config = draw(st.sampled_from(cases))
    label = st.one_of(st.integers(0, num_classes - 1), st.integers(-1, num_classes - 1))
    labels = draw(st.lists(label, min_size=batch, max_size=batch))
    seen = draw(st.lists(st.booleans(), min_size=num_classes, max_size=num_classes))
    problem = random_problem(draw(st.integers(0, 2**32 - 1)), labels, num_classes, dim, seen)
    return problem, config


def means_of_features(features, noisy, problem, config):
    """The centroids of Eq. 8 and 12, of Eq. 9, of Eq. 11, and those of the noisy view, before they
    are scaled to length 1 if only directions count."""
    if config.direction:
        features, noisy = ([reference.unit(q) for q in rows] for rows in (features, noisy))
    num_classes = len(problem.bias)
    previous = {c: problem.mean[c] for c in range(num_classes) if problem.seen[c]}
    chosen = {
        "naive": reference.naive_centroids(features, problem.labels, num_classes),
        "momentum": reference.momentum_centroids(
            features, problem.labels, num_classes, previous, config.momentum)}
    found = (chosen[config.compact_centroids], chosen[config.margin_centroids],
             chosen[config.norm_centroids])
    return (*found, reference.moved_centroids(features, noisy, problem.labels, found[0]))


def reference_centroids(features, noisy, problem, config):
    """The four kinds of centroids that the terms are made of."""
    found = means_of_features(features, noisy, problem, config)
    if config.direction:
        return tuple({c: reference.unit(m) for c, m in means.items()} for means in found)
    return found


def margin_unit(problem, config):
    """The unit of delta_d, a constant: of the problem itself, not of features moved from it."""
    if not config.margin_relative:
        return 1.0
    return reference.centroid_norm(
        reference_centroids(problem.features, problem.noisy, problem, config)[1])


def reference_terms(features, noisy, kernel, bias, problem, config):
    """[total, compact, margin, norm, align, stability]."""
    for_compact, for_margin, for_norm, moved = reference_centroids(
        features, noisy, problem, config)
    stability = reference.stability(features, noisy)
    if config.direction:
        features, noisy = ([reference.unit(q) for q in rows] for rows in (features, noisy))
        bias = 0 * bias

    def pull(rows, centroids):
        return reference.compactness(rows, problem.labels, centroids, config.delta_v,
                                     config.compact_squared, config.compact_linear_beyond or np.inf)

    compact, align = pull(features, for_compact), pull(noisy, for_compact)
    if config.align_to == "other":
        align = (align + pull(features, moved)) / 2
    margin = reference.margin(
        for_margin, kernel.T, bias, config.delta_d * margin_unit(problem, config),
        config.margin_squared, config.boundaries)
    norm = reference.centroid_norm(for_norm)
    clean = reference.clean_loss(compact, margin, norm, config.alpha, config.beta,
                                 config.gamma_reg)
    return np.array([reference.our_loss(clean, align, config.lam), compact, margin, norm, align,
                     stability])


def reference_gradients(problem, config, step=1e-6):
    """Central differences of :func:`reference_terms`, one [6, ...] array per input."""
    inputs = [problem[index].copy() for index in ARRAYS]
    gradients = []
    for values in inputs:
        gradient = np.zeros((6, *values.shape))
        for index in np.ndindex(values.shape):
            kept = values[index]
            values[index] = kept + step
            above = reference_terms(*inputs, problem, config)
            values[index] = kept - step
            below = reference_terms(*inputs, problem, config)
            values[index] = kept
            gradient[(slice(None), *index)] = (above - below) / (2 * step)
        gradients.append(gradient)
    return gradients


def distance_to_kinks(problem, config):
    """How far the problem is from where a term has no derivative, or a badly conditioned one."""
    for_compact, for_margin, for_norm, moved = reference_centroids(
        problem.features, problem.noisy, problem, config)
    rows, bias, views = problem.kernel.T, problem.bias, (problem.features, problem.noisy)
    distances = [np.linalg.norm(q - noisy) for q, noisy in zip(*views, strict=True)]
    if config.direction:
        bias = 0 * bias
        # The direction of a vector near 0 changes fast.
        distances += [np.linalg.norm(vector) / 10 for vectors in (
            *views, *(means.values() for means in means_of_features(*views, problem, config)))
            for vector in vectors]
        views = [[reference.unit(q) for q in rows_of_view] for rows_of_view in views]
    for q, noisy, label in zip(*views, problem.labels, strict=True):
        if label in for_compact:
            lengths = [np.linalg.norm(for_compact[label] - row) for row in (q, noisy)]
            if config.align_to == "other":
                lengths.append(np.linalg.norm(moved[label] - q))
            distances += [abs(length - config.delta_v) for length in lengths]
            distances += [length for length in lengths if length > config.delta_v]
    delta_d = config.delta_d * margin_unit(problem, config)
    for c, m in for_margin.items():
        others = [i for i in range(len(bias)) if i != c]
        distances += [np.linalg.norm(rows[c] - rows[i]) / 10 for i in others]
        distances += [reference.boundary_distance(m, c, i, rows, bias) for i in others]
        # The hinge before it is clipped, so that a tie is seen on either side of 0.
        raw = sorted(reference.margin_hinges(m, c, rows, bias, delta_d + 1e6).values())
        distances += [abs(value - 1e6) for value in raw]
        distances += [raw[-1] - raw[-2]] if len(raw) > 1 else []
    return min(distances + [np.linalg.norm(m) for m in for_norm.values()])


@functools.partial(jax.jit, static_argnums=1)
def terms_and_gradients(problem, config):
    """The six values of :func:`reference_terms`, their gradients, and the next state."""
    def terms(features, noisy, kernel, bias):
        total, parts, state = robust_loss(
            features, noisy, problem.labels, kernel, bias,
            CentroidState(problem.mean, problem.seen), config)
        values = jnp.stack([total, *parts, losses.stability_loss(features, noisy)])
        return values, (values, state)

    gradients, (values, state) = jax.jacrev(terms, ARRAYS, has_aux=True)(*problem[:4])
    return values, gradients, state


jitted_loss = jax.jit(robust_loss, static_argnames="config")


def in_dtype(problem, dtype):
    return Problem(*(jnp.asarray(value, dtype if value.dtype == np.float64 else None)
                     for value in problem))


@hypothesis.settings(max_examples=60)
@hypothesis.given(problems())
def test_every_term_and_gradient_is_that_of_the_equations_in_float64(case):
    problem, config = case
    hypothesis.assume(distance_to_kinks(problem, config) > 1e-3)
    with jax.enable_x64(True):
        values, gradients, _ = terms_and_gradients(in_dtype(problem, np.float64), config)
        assert values.dtype == np.float64
    expected = reference_terms(*problem[:4], problem, config)
    np.testing.assert_allclose(values, expected, rtol=1e-10, atol=1e-10)
    for gradient, wanted in zip(gradients, reference_gradients(problem, config), strict=True):
        np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-5)


# Where a root, a hinge and a tangent are, rounding counts.
@hypothesis.settings(max_examples=30)
@hypothesis.given(problems([CASES[2], CASES[4], CASES[6]]))
def test_every_term_and_gradient_is_that_of_the_equations_in_float32(case):
    problem, config = case
    hypothesis.assume(distance_to_kinks(problem, config) > 1e-2)
    values, gradients, _ = terms_and_gradients(in_dtype(problem, np.float32), config)
    assert values.dtype == np.float32
    expected = reference_terms(*problem[:4], problem, config)
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-4)
    for gradient, wanted in zip(gradients, reference_gradients(problem, config), strict=True):
        np.testing.assert_allclose(gradient, wanted, rtol=2e-3, atol=2e-3)


@hypothesis.settings(max_examples=30)
@hypothesis.given(problems())
def test_absent_classes_keep_their_state_and_take_no_part(case):
    problem, config = case
    absent = [c for c in range(len(problem.bias)) if c not in problem.labels]
    hypothesis.assume(absent)
    moved = problem.mean.copy()
    moved[absent] += 100
    with jax.enable_x64(True):
        (values, gradients, state), (again, gradients_again, _) = (
            terms_and_gradients(in_dtype(problem._replace(mean=mean), np.float64), config)
            for mean in (problem.mean, moved))
    np.testing.assert_array_equal(np.asarray(state.mean)[absent], problem.mean[absent])
    np.testing.assert_array_equal(np.asarray(state.seen)[absent], problem.seen[absent])
    chex.assert_tree_all_finite(gradients)
    np.testing.assert_array_equal(values, again)
    chex.assert_trees_all_equal(gradients, gradients_again)


# --- the variants of JAX ---------------------------------------------------------------------


def test_the_loss_is_the_same_without_jit():
    problem = random_problem(3, [0, 2, 2, 0, 0], 4, 3)
    arrays, config = in_dtype(problem, np.float32), config_of(0.9, 0.5, 2.0)
    total, terms, state = robust_loss(
        arrays.features, arrays.noisy, arrays.labels, arrays.kernel, arrays.bias,
        CentroidState(arrays.mean, arrays.seen), config)
    expected = reference_terms(*problem[:4], problem, config)
    np.testing.assert_allclose(jnp.stack([total, *terms]), expected[:5], rtol=1e-5)
    stored = reference.stored_centroids(
        problem.features, problem.labels, 4, dict(enumerate(problem.mean)), 0.9)
    np.testing.assert_allclose(state.mean, [stored[c] for c in range(4)], rtol=1e-5)


def test_the_losses_map_over_batches_of_problems_with_vmap():
    (_, num_classes, dim), config = CASES[1]
    stacked = [random_problem(seed, labels, num_classes, dim)
               for seed, labels in enumerate(([0, 1, 2, 1], [1, 1, 1, 1], [2, 0, -1, 0]))]
    with jax.enable_x64(True):
        one_by_one = [terms_and_gradients(in_dtype(problem, np.float64), config)[:2]
                      for problem in stacked]
        batched = jax.tree.map(lambda *values: jnp.stack(values),
                               *(in_dtype(problem, np.float64) for problem in stacked))
        together = jax.vmap(lambda one: terms_and_gradients(one, config)[:2])(batched)
        chex.assert_trees_all_close(
            together, jax.tree.map(lambda *values: np.stack(values), *one_by_one), rtol=1e-10)


# --- the batch split over devices ------------------------------------------------------------

# 16 examples of classes 0 to 3 on 8 devices, two on each.
SPLITS = {
    "mixed": [0, 1, 2, 3, 3, 1, 0, 0, 2, 2, 1, 3, 0, 2, 1, 1],
    "each_device_one_class": [0, 0, 1, 1, 2, 2, 3, 3, 0, 0, 1, 1, 2, 2, 3, 3],
    "classes_absent_on_most_devices": [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3],
    "a_class_absent_everywhere": [0, 2, 2, 0, 0, 2, 0, 0, 2, 2, 0, 0, 0, 2, 2, 2],
    "one_class_alone": [1] * 16,
    "devices_without_a_class": [-1, -1, -1, 0, 1, 2, -1, -1, 3, 3, 0, -1, -1, -1, 1, 0],
}


SPLIT_CONFIG = config_of(0.9, 0.5, 2.0)


def value_terms_state_and_gradients(params, batch, state, axis_name, config=SPLIT_CONFIG):
    """All terms as functions of replicated parameters, as in training."""
    def loss(params):
        features = batch["images"] @ params["weights"]
        noisy = batch["noisy"] @ params["weights"]
        total, terms, new_state = robust_loss(
            features, noisy, batch["labels"], params["kernel"], params["bias"], state,
            config, axis_name=axis_name)
        stability = losses.stability_loss(features, noisy, axis_name=axis_name)
        return total + stability, ((*terms, stability), new_state)

    (value, (terms, new_state)), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    if axis_name is not None:
        gradients = jax.lax.pmean(gradients, axis_name)
    return value, terms, new_state, gradients


over_the_axis = functools.partial(value_terms_state_and_gradients, axis_name="devices")
over_the_whole = functools.partial(value_terms_state_and_gradients, axis_name=None)
jitted = jax.jit(over_the_whole)
pmapped = jax.pmap(over_the_axis, "devices", in_axes=(None, 0, None))


def linear_model_problem(labels, dtype):
    rng = np.random.default_rng(5)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    params = {"weights": normal(5, 3), "kernel": normal(3, 4), "bias": normal(4)}
    batch = {"images": normal(16, 5), "noisy": normal(16, 5), "labels": jnp.array(labels)}
    state = CentroidState(normal(4, 3), jnp.array([True, False, True, True]))
    return params, batch, state


def with_pmap(params, batch, state, split=pmapped):
    batch = jax.tree.map(lambda value: value.reshape(NUM_DEVICES, -1, *value.shape[1:]), batch)
    result = split(params, batch, state)
    for leaf in jax.tree.leaves(result):
        for device in range(NUM_DEVICES):
            np.testing.assert_array_equal(leaf[device], leaf[0])
    return jax.tree.map(lambda leaf: leaf[0], result)


@functools.cache
def mesh_of(axis_type):
    return jax.make_mesh((NUM_DEVICES,), ("devices",), axis_types=(axis_type,))


def on_mesh(axis_type, params, batch, state):
    """The arguments with the batch split over the mesh and the rest replicated."""
    split, whole = (jax.NamedSharding(mesh_of(axis_type), spec) for spec in (P("devices"), P()))
    params, state = jax.device_put((params, state), whole)
    return params, jax.device_put(batch, split), state


@functools.cache
def shard_mapped():
    # Replication is checked by default: P() out means provably the same on all devices.
    return jax.jit(jax.shard_map(
        over_the_axis, mesh=mesh_of(AxisType.Explicit), in_specs=(P(), P("devices"), P()),
        out_specs=P()))


def with_shard_map(*arguments):
    return shard_mapped()(*on_mesh(AxisType.Explicit, *arguments))


def with_jit_over_a_mesh(*arguments):
    return jitted(*on_mesh(AxisType.Auto, *arguments))


def assert_equal_up_to_rounding(whole, parts, tolerance):
    """Relative to the size of each array: sums of another order differ by its rounding."""
    for name, left, right in zip(("value", "terms", "state", "gradients"), whole, parts,
                                 strict=True):
        for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
            scale = max(1.0, float(np.max(np.abs(one))))
            np.testing.assert_allclose(other, one, rtol=0, atol=tolerance * scale, err_msg=name)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("parallel", [with_pmap, with_shard_map, with_jit_over_a_mesh])
def test_the_loss_over_devices_is_that_of_the_whole_batch(parallel, split):
    with jax.enable_x64(True):
        arguments = linear_model_problem(SPLITS[split], np.float64)
        whole = jitted(*arguments)
        assert whole[0].dtype == np.float64
        for name in ("weights", "kernel"):
            assert np.abs(whole[3][name]).max() > 1e-2
        assert_equal_up_to_rounding(whole, parallel(*arguments), 1e-12)


VARIANTS = (config_of(0.9, 0.2, 0.9, direction=True, align_to="other"),
            config_of(0.9, 0.5, 0.5, align_to="other", margin_relative=True))


@pytest.mark.parametrize("config", VARIANTS, ids=["direction", "relative"])
def test_the_variants_over_devices_are_those_of_the_whole_batch(config):
    whole = jax.jit(functools.partial(over_the_whole, config=config))
    split = jax.pmap(functools.partial(over_the_axis, config=config), "devices",
                     in_axes=(None, 0, None))
    with jax.enable_x64(True):
        for labels in ("mixed", "devices_without_a_class"):
            arguments = linear_model_problem(SPLITS[labels], np.float64)
            expected = whole(*arguments)
            for name in ("weights", "kernel"):
                assert np.abs(expected[3][name]).max() > 1e-2
            assert_equal_up_to_rounding(expected, with_pmap(*arguments, split), 1e-12)


# --- traps -----------------------------------------------------------------------------------


def gradient_of(loss, *arguments, **options):
    """The gradient for the first argument, by one program."""
    return jax.jit(jax.grad(functools.partial(loss, **options)))(*arguments)


@functools.partial(jax.jit, static_argnums=0)
def gradients_of_robust_loss(config, features, labels, kernel, bias, state, noisy=None):
    def loss(features, noisy, kernel, bias):
        return robust_loss(features, noisy, labels, kernel, bias, state, config)[0]

    return jax.grad(loss, ARRAYS)(features, features if noisy is None else noisy, kernel, bias)


NAIVE = RobustLossConfig(compact_centroids="naive", norm_centroids="naive", delta_v=0.0,
                         compact_squared=False, gamma_reg=1.0)


def test_the_gradient_is_finite_for_a_class_of_one_example_under_the_naive_centroid():
    features, labels = jnp.array([[1.0, 2.0], [3.0, -1.0]]), jnp.array([0, 1])
    gradients = gradients_of_robust_loss(
        NAIVE, features, labels, jnp.eye(2), jnp.zeros(2), init_centroids(2, 2))
    chex.assert_tree_all_finite(gradients)
    # The centroid is the feature itself: there is nothing to pull.
    pull = jax.jit(jax.grad(lambda q: losses.compactness_loss(
        q, labels, update_centroids(init_centroids(2, 2), q, labels)[0].current, delta_v=0.0,
        squared=False)))(features)
    np.testing.assert_array_equal(pull, np.zeros((2, 2)))


def test_the_gradient_at_a_centroid_of_zero_is_finite_and_the_norms_is_zero():
    features, labels = jnp.array([[1.0, 2.0], [-1.0, -2.0]]), jnp.array([0, 0])
    gradients = gradients_of_robust_loss(
        NAIVE, features, labels, jnp.eye(2), jnp.zeros(2), init_centroids(2, 2))
    chex.assert_tree_all_finite(gradients)
    at_zero = gradient_of(losses.centroid_norm_loss, jnp.zeros((2, 3)), jnp.array([True, True]))
    np.testing.assert_array_equal(at_zero, np.zeros((2, 3)))


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("boundaries", ["max", "mean"])
@pytest.mark.parametrize("kernel", [
    np.array([[1.0, 1.0, -1.0], [2.0, 2.0, 0.5]]), np.zeros((2, 3))], ids=["equal_rows", "zero"])
def test_the_margin_and_its_gradient_are_finite_without_a_hyperplane(kernel, squared, boundaries):
    loss, gradients = jax.jit(jax.value_and_grad(
        functools.partial(losses.margin_loss, delta_d=2.0, squared=squared,
                          boundaries=boundaries), (0, 2, 3)))(
        jnp.array([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]]), jnp.ones(3, bool),
        jnp.asarray(kernel, jnp.float32), jnp.array([0.1, 0.2, 0.3]))
    assert np.isfinite(loss)
    chex.assert_tree_all_finite(gradients)
    if kernel.any():
        # The centroids are 1.92, 1.76, and -0.62 and -0.66 from the boundaries that there are.
        last = {"max": 2.66 ** (1 + squared),
                "mean": (2.62 ** (1 + squared) + 2.66 ** (1 + squared)) / 2}[boundaries]
        expected = (0.08 ** (1 + squared) + 0.24 ** (1 + squared) + last) / 3
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
    else:
        assert loss == 0
        chex.assert_trees_all_equal(gradients, jax.tree.map(jnp.zeros_like, gradients))


def test_the_stability_loss_of_equal_features_has_gradient_zero():
    features = jnp.ones((3, 2))
    loss, gradients = jax.jit(jax.value_and_grad(losses.stability_loss, (0, 1)))(
        features, features)
    assert loss == 0
    chex.assert_trees_all_equal(gradients, (jnp.zeros((3, 2)), jnp.zeros((3, 2))))


def test_a_batch_in_which_no_label_counts_has_loss_and_gradient_zero():
    features, labels = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([-1, 2])
    state = CentroidState(jnp.ones((2, 2)), jnp.array([True, False]))
    total, terms, new_state = jitted_loss(
        features, features + 1, labels, jnp.eye(2), jnp.zeros(2), state, config=NAIVE)
    assert total == 0 and all(term == 0 for term in terms)
    chex.assert_trees_all_equal(new_state, state)
    gradients = gradients_of_robust_loss(
        NAIVE, features, labels, jnp.eye(2), jnp.zeros(2), state, features + 1)
    chex.assert_trees_all_equal(gradients, jax.tree.map(jnp.zeros_like, gradients))


def test_bfloat16_features_are_cast_to_the_dtype_of_the_state():
    problem = in_dtype(random_problem(2, [0, 1, 1, 2], 3, 4), np.float32)
    narrow = [problem.features.astype(jnp.bfloat16), problem.noisy.astype(jnp.bfloat16)]
    wide = [value.astype(jnp.float32) for value in narrow]
    state = CentroidState(problem.mean, problem.seen)
    config = config_of(0.9, 0.1, 5.0)
    results = [jitted_loss(*views, problem.labels, problem.kernel, problem.bias, state,
                           config=config) for views in (narrow, wide)]
    chex.assert_trees_all_equal(*results)
    assert results[0][0].dtype == jnp.float32 and results[0][2].mean.dtype == jnp.float32
    stability = losses.stability_loss(*narrow)
    assert stability.dtype == jnp.float32
    np.testing.assert_array_equal(stability, losses.stability_loss(*wide))


def test_the_margin_gradient_with_momentum_is_one_minus_gamma_times_the_naive_one():
    """Proposition 4.1, where both centroids have the same piece of max and hinge active."""
    compared = 0
    for seed in range(20):
        problem = random_problem(seed, [0, 1, 1, 2, 2, 2], 3, 4)
        # Stored centroids near the batch's, so that often the same pieces are active.
        current = reference.naive_centroids(problem.features, problem.labels, 3)
        mean = np.stack([current[c] for c in range(3)]) + 0.3 * problem.mean
        problem = problem._replace(mean=mean)
        pieces = []
        for centroids in (current, reference.momentum_centroids(
                problem.features, problem.labels, 3, dict(enumerate(mean)), 0.9)):
            hinges = [reference.margin_hinges(m, c, problem.kernel.T, problem.bias, 1.0)
                      for c, m in centroids.items()]
            pieces.append([max(by_class, key=by_class.get) if max(by_class.values()) > 0 else None
                           for by_class in hinges])
        if pieces[0] != pieces[1] or pieces[0] == [None] * 3:
            continue
        compared += 1
        with jax.enable_x64(True):
            naive, momentum = (np.asarray(margin_gradient(in_dtype(problem, np.float64), kind))
                               for kind in ("naive", "momentum"))
        assert np.abs(naive).max() > 1e-3
        np.testing.assert_allclose(momentum, (1 - 0.9) * naive, rtol=1e-9, atol=1e-12)
    assert compared >= 5


@functools.partial(jax.jit, static_argnums=1)
def margin_gradient(problem, kind):
    """Gradient of the margin loss alone with respect to the features."""
    config = RobustLossConfig(
        alpha=0.0, lam=0.0, gamma_reg=0.0, momentum=0.9, delta_d=1.0, margin_centroids=kind)
    return jax.grad(lambda features: robust_loss(
        features, problem.noisy, problem.labels, problem.kernel, problem.bias,
        CentroidState(problem.mean, problem.seen), config)[0])(problem.features)


def test_a_centroid_on_a_boundary_is_pushed_to_its_own_side():
    # sign(0) = 0 in Eq. 9 would leave it there.
    gradient = gradient_of(
        losses.margin_loss, jnp.zeros((2, 1)), jnp.array([True, False]),
        jnp.array([[1.0, -1.0]]), jnp.zeros(2), delta_d=1.0)
    np.testing.assert_allclose(gradient, [[-1.0], [0.0]])


def test_centroids_come_from_the_clean_features_alone():
    problem = in_dtype(random_problem(4, [0, 1, 1], 2, 3), np.float32)
    state = CentroidState(problem.mean, problem.seen)
    results = [jitted_loss(problem.features, noisy, problem.labels, problem.kernel, problem.bias,
                           state, config=RobustLossConfig())
               for noisy in (problem.noisy, problem.noisy + 7)]
    chex.assert_trees_all_equal(results[0][2], results[1][2])
    for term in ("compact", "margin", "norm"):
        assert getattr(results[0][1], term) == getattr(results[1][1], term)
    assert results[0][1].align != results[1][1].align


# --- many classes ----------------------------------------------------------------------------


@pytest.mark.usefixtures("enable_x64")
@pytest.mark.parametrize("squared, boundaries", [(True, "max"), (False, "mean")])
def test_the_margin_is_the_same_for_a_block_of_classes_at_a_time(squared, boundaries):
    num_classes, block = 11, 3
    problem = in_dtype(random_problem(8, [0], num_classes, 4), np.float64)
    present = jnp.arange(num_classes) % 4 > 0  # 8 of them
    options = {"delta_d": 2.0, "squared": squared, "boundaries": boundaries}

    def value_and_gradients(loss):
        return jax.jit(jax.value_and_grad(loss, (0, 2, 3)))(
            problem.mean, present, problem.kernel, problem.bias)

    expected = value_and_gradients(functools.partial(losses.margin_loss, **options))
    assert expected[0] > 0.1
    for at_most in (8, 9):
        blocked = value_and_gradients(functools.partial(
            losses._margin_over_present, at_most=at_most, table_size=block * num_classes,
            **options))
        chex.assert_trees_all_close(blocked, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("boundaries", ["max", "mean"])
def test_the_margin_of_20000_classes_needs_less_than_4_gb(boundaries):
    num_classes, dim = 20_000, 128
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (
        (num_classes, dim), (num_classes,), (dim, num_classes), (num_classes,))]
    compiled = jax.jit(jax.value_and_grad(functools.partial(
        losses.margin_loss, delta_d=5.0, boundaries=boundaries), (0, 2, 3))).lower(
            *arguments).compile()
    # A table of all distances alone is 1.6 GB, and all differences of rows are 205 GB.
    assert 0 < compiled.memory_analysis().temp_size_in_bytes < 0.4e9


@pytest.mark.usefixtures("enable_x64")
def test_a_batch_of_few_of_many_classes_has_the_margin_over_all_classes():
    problem = in_dtype(random_problem(9, [7, 2, 2, -1, 30], 40, 3), np.float64)
    state = CentroidState(problem.mean, problem.seen)

    def by_robust_loss(features, kernel, bias):
        return robust_loss(features, problem.noisy, problem.labels, kernel, bias, state,
                           RobustLossConfig())[1].margin

    def by_all(features, kernel, bias):
        centroids, _ = update_centroids(state, features, problem.labels)
        return losses.margin_loss(centroids.current, centroids.present, kernel, bias, delta_d=5.0)

    few, full = (jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(
        problem.features, problem.kernel, problem.bias) for loss in (by_robust_loss, by_all))
    assert full[0] > 0.1
    chex.assert_trees_all_close(few, full, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_classes", [4, 40], ids=["classes_in_the_batch", "more_classes"])
def test_no_gradient_is_added_up_in_a_random_order_on_gpus(num_classes):
    problem = in_dtype(random_problem(3, [0, 2, 2, 0, 0], num_classes, 3), np.float32)
    traced = gradients_of_robust_loss.trace(
        RobustLossConfig(), problem.features, problem.labels, problem.kernel, problem.bias,
        CentroidState(problem.mean, problem.seen), problem.noisy)
    unique = {platform: re.findall(
        r'"stablehlo.scatter".*unique_indices = (true|false)',
        traced.lower(lowering_platforms=(platform,)).as_text()) for platform in ("cpu", "cuda")}
    assert "false" in unique["cpu"] and "false" not in unique["cuda"]
    # Those put the gradients of the classes that are present, all different, in their places.
    assert bool(unique["cuda"]) == (num_classes == 40)


def test_of_two_boundaries_that_are_equally_near_the_first_has_the_gradient():
    gradient = jax.grad(losses.margin_loss, 3)(
        jnp.zeros((3, 2)), jnp.array([True, False, False]),
        jnp.array([[1.0, 0.0, -1.0], [0.0, -1.0, 0.0]])[:, [1, 0, 2]], jnp.zeros(3), delta_d=1.0)
    np.testing.assert_allclose(gradient, np.array([-1, 1, 0]) / np.sqrt(2), rtol=1e-6)


def test_a_feature_that_is_not_a_number_is_seen_in_the_margin():
    problem = in_dtype(random_problem(3, [0, 2, 2, 0, 0], 4, 3), np.float32)
    total, terms, _ = jitted_loss(
        problem.features.at[1, 0].set(np.nan), problem.noisy, problem.labels, problem.kernel,
        problem.bias, CentroidState(problem.mean, problem.seen), config=RobustLossConfig())
    assert np.isnan(total) and np.isnan(terms.margin)


# --- examples that do not count, low precision, other arrays -----------------------------------


@pytest.mark.usefixtures("either_platform")
@pytest.mark.parametrize("config", [
    config_of(0.5, 0.5, 2.0, compact_centroids="naive", compact_linear_beyond=0.8), *VARIANTS],
    ids=["paper", "direction", "relative"])
def test_what_does_not_count_changes_no_term_and_no_gradient(config):
    labels, kept = np.array([0, -1, 2, 4, 2, 0, -7]), np.array([0, 2, 4, 5])
    problem = in_dtype(random_problem(3, labels, 4, 3), np.float32)
    wrong = np.setdiff1d(np.arange(7), kept)
    problem = problem._replace(
        features=problem.features.at[wrong].set(np.nan), noisy=problem.noisy.at[wrong].set(np.inf))
    state = CentroidState(problem.mean, problem.seen)

    @jax.jit
    def results(features, noisy, labels):
        def loss(features, noisy, kernel, bias):
            total, terms, new_state = robust_loss(
                features, noisy, labels, kernel, bias, state, config)
            stability = losses.stability_loss(features, noisy, counts=losses.counted(labels, 4))
            return total + stability, (terms, new_state)

        return jax.value_and_grad(loss, ARRAYS, has_aux=True)(
            features, noisy, problem.kernel, problem.bias)

    value, (to_features, to_noisy, *to_head) = results(problem.features, problem.noisy, labels)
    expected, (wanted_features, wanted_noisy, *wanted_head) = results(
        problem.features[kept], problem.noisy[kept], labels[kept])
    chex.assert_trees_all_close(value, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(to_head, wanted_head, rtol=1e-5, atol=1e-6)
    for gradient, wanted in ((to_features, wanted_features), (to_noisy, wanted_noisy)):
        np.testing.assert_allclose(gradient[kept], wanted, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(gradient[wrong], np.zeros((3, 3)))


def test_the_mean_is_over_the_examples_that_count_on_all_devices():
    values = jnp.arange(16.0).at[5].set(np.nan)
    counts = jnp.arange(16) < 5  # Of the 8 devices, 5 have none.
    assert losses.mean_over_batch(values, counts=counts) == 2
    per_device = jax.pmap(
        lambda values, counts: losses.mean_over_batch(values, "devices", counts=counts),
        "devices")(values.reshape(NUM_DEVICES, 2), counts.reshape(NUM_DEVICES, 2))
    np.testing.assert_allclose(per_device, np.full(NUM_DEVICES, 2.0))
    assert losses.mean_over_batch(values, counts=jnp.zeros(16, bool)) == 0


@pytest.mark.usefixtures("either_platform")
def test_losses_of_bfloat16_are_means_over_all_examples():
    ones = jnp.ones((1024, 1), jnp.bfloat16)
    labels, centroids = jnp.zeros(1024, jnp.int32), jnp.zeros((2, 1), jnp.bfloat16)
    compact = losses.compactness_loss(ones, labels, centroids, delta_v=0.0)
    stability = losses.stability_loss(ones, 0 * ones)
    norm = losses.centroid_norm_loss(ones, jnp.ones(1024, bool))
    for loss in (compact, stability, norm):
        assert loss.dtype == jnp.float32 and loss == 1
    total, terms, state = robust_loss(
        2 * ones, ones, labels, jnp.array([[1, -1]], jnp.bfloat16), jnp.zeros(2, jnp.bfloat16),
        init_centroids(2, 1, dtype=jnp.bfloat16), RobustLossConfig(delta_v=0.0))
    # The centroid is 2, and so is its distance to the boundary.
    assert tuple(map(float, terms)) == (0, 3, 2, 1) and state.mean.dtype == jnp.bfloat16
    np.testing.assert_allclose(total, 4.002, rtol=1e-6)


def test_arrays_of_numpy_are_taken_for_batches_smaller_than_the_classes():
    problem = random_problem(3, [0, 2], 4, 3)
    config = config_of(0.9, 0.5, 2.0)
    total, terms, _ = robust_loss(
        problem.features, problem.noisy, list(problem.labels), problem.kernel, problem.bias,
        CentroidState(problem.mean, problem.seen), config)
    expected = reference_terms(*problem[:4], problem, config)
    assert total.dtype == np.float32
    np.testing.assert_allclose(jnp.stack([total, *terms]), expected[:5], rtol=1e-5)


@pytest.mark.parametrize("number", [np.float32, np.float64, np.array], ids=lambda f: f.__name__)
def test_settings_of_numpy_change_no_dtype(number):
    problem = in_dtype(random_problem(3, [0, 2, 1, 1], 4, 3), np.float32)
    settings = {"alpha": 0.7, "beta": 1.3, "gamma_reg": 0.2, "lam": 0.4, "delta_v": 0.5,
                "delta_d": 2.0, "momentum": 0.9, "compact_linear_beyond": 0.8}
    for dtype in (np.float32, jnp.bfloat16):
        state = CentroidState(problem.mean.astype(dtype), problem.seen)
        results = [
            robust_loss(*problem[:2], problem.labels, *problem[2:4], state,
                        RobustLossConfig(**{name: kind(value) for name, value in settings.items()}))
            for kind in (float, number)]
        chex.assert_trees_all_equal_dtypes(*results)
        chex.assert_trees_all_close(*results, rtol=1e-6)
        assert results[1][2].mean.dtype == dtype and results[1][0].dtype == np.float32


def test_settings_are_traced_and_options_are_not():
    problem = in_dtype(random_problem(3, [0, 2, 1, 1], 4, 3), np.float32)
    state = CentroidState(problem.mean, problem.seen)
    calls = []

    def total(config):
        calls.append(config)
        return robust_loss(
            *problem[:2], problem.labels, *problem[2:4], state, config)[0]

    configs = [config_of(0.9, 0.5, 2.0), config_of(0.1, 0.2, 3.0)]
    expected = [total(config) for config in configs]
    compiled = jax.jit(total)
    np.testing.assert_allclose([compiled(config) for config in configs], expected, rtol=1e-6)
    assert len(calls) == 3
    compiled(dataclasses.replace(configs[0], boundaries="mean"))
    assert len(calls) == 4
    stacked = jax.tree.map(lambda *values: jnp.array(values), *configs)
    np.testing.assert_allclose(jax.vmap(total)(stacked), expected, rtol=1e-6)
    # The loss is linear in its weights, each with its term for a slope.
    gradient = jax.grad(total)(configs[0])
    terms = robust_loss(*problem[:2], problem.labels, *problem[2:4], state, configs[0])[1]
    np.testing.assert_allclose(
        (gradient.alpha, gradient.beta, gradient.gamma_reg, gradient.lam), terms, rtol=1e-6)
    with pytest.raises(InputError, match="alpha=-1"):
        dataclasses.replace(configs[0], alpha=-1)


def test_the_losses_are_computed_on_a_mesh_of_explicit_axes():
    mesh = jax.make_mesh((NUM_DEVICES,), ("devices",), axis_types=(AxisType.Explicit,))
    arguments = linear_model_problem(SPLITS["mixed"], np.float32)
    params, batch, state = arguments
    split, whole = (jax.NamedSharding(mesh, spec) for spec in (P("devices"), P()))
    on_it = (jax.device_put(params, whole), jax.device_put(batch, split),
             jax.device_put(state, whole))
    assert_equal_up_to_rounding(jitted(*arguments), jitted(*on_it), 1e-6)
    for weights in (None, np.array([1.0, 2.0, 3.0, 4.0])):
        found, expected = (jax.jit(lambda params, batch: losses.softmax_loss(
            batch["images"] @ params["weights"] @ params["kernel"], batch["labels"],
            class_weights=weights))(*pair[:2]) for pair in (on_it, arguments))  # noqa: B023
        np.testing.assert_allclose(found, expected, rtol=1e-6)


# --- the hinge, squared or not (Appendix A.1) -------------------------------------------------


@pytest.mark.parametrize("squared", [True, False])
def test_the_compactness_gradient_has_norm_one_or_twice_the_excess(squared):
    centroids, delta_v = jnp.array([[1.0, -1.0, 0.5]]), 0.5
    feature = jnp.array([[2.0, 1.0, -1.0]])
    excess = float(np.linalg.norm(feature - centroids)) - delta_v
    gradient = gradient_of(losses.compactness_loss, feature, jnp.array([0]), centroids,
                           delta_v=delta_v, squared=squared)
    np.testing.assert_allclose(
        np.linalg.norm(gradient), 2 * excess if squared else 1, rtol=1e-6)
    # Downhill is towards the centroid.
    assert np.vdot(-gradient, centroids - feature) > 0


linear_beyond_a_hinge = jax.jit(jax.value_and_grad(lambda feature: losses.compactness_loss(
    feature, jnp.array([0]), jnp.zeros((1, 2)), delta_v=0.5, linear_beyond=0.8)))


@pytest.mark.parametrize("excess", [0.1, 0.7, 0.8, 0.9, 30.0, 1e6])
def test_no_gradient_is_longer_than_twice_the_hinge_from_which_it_is_linear(excess):
    feature = jnp.array([[0.6, 0.8]]) * (0.5 + excess)
    value, gradient = linear_beyond_a_hinge(feature)
    near = min(excess, 0.8)
    np.testing.assert_allclose(value, near**2 + 1.6 * (excess - near), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(gradient), 2 * near, rtol=1e-5)


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("point", [0.25, -2.0], ids=["right_side", "wrong_side"])
def test_the_margin_gradient_has_norm_one_or_twice_the_hinge(squared, point):
    kernel, bias = jnp.array([[1.0, -2.0], [0.5, 1.0]]), jnp.array([0.1, -0.4])
    normal = np.array([3.0, -0.5]) / np.linalg.norm([3.0, -0.5])
    offset = -0.5 / np.linalg.norm([3.0, -0.5])
    centroid = (point + offset) * normal  # signed distance `point` to the only boundary
    gradient = gradient_of(
        losses.margin_loss, jnp.asarray(np.stack([centroid, centroid]), jnp.float32),
        jnp.array([True, False]), kernel, bias, delta_d=1.0, squared=squared)
    np.testing.assert_allclose(
        np.linalg.norm(gradient), 2 * (1 - point) if squared else 1, rtol=1e-5)


# --- directions, the other view, relative margins ----------------------------------------------


def loss_terms_and_gradients(problem, config):
    """The loss, its terms, the next state, and the gradients of the loss, for NumPy."""
    return jax.tree.map(np.asarray, _loss_terms_and_gradients(problem, config))


@functools.partial(jax.jit, static_argnums=1)
def _loss_terms_and_gradients(problem, config):
    def loss(features, noisy, kernel, bias):
        total, terms, state = robust_loss(
            features, noisy, problem.labels, kernel, bias,
            CentroidState(problem.mean, problem.seen), config)
        return total, (terms, state)

    return jax.value_and_grad(loss, ARRAYS, has_aux=True)(*problem[:4])


def test_of_features_in_the_direction_only_the_length_changes_nothing():
    config = VARIANTS[0]
    with jax.enable_x64(True):
        problem = in_dtype(random_problem(3, [0, 2, 2, 0, 0, 1], 4, 3), np.float64)
        factors = np.array([1e-3, 0.5, 1.0, 2.0, 40.0, 1e3])[:, None]
        scaled = problem._replace(
            features=factors * problem.features, noisy=factors[::-1] * problem.noisy,
            kernel=3 * problem.kernel, bias=problem.bias + 7)
        problem, scaled = (jax.tree.map(np.asarray, one) for one in (problem, scaled))
        (value, seen), gradients = loss_terms_and_gradients(problem, config)
        again, gradients_again = loss_terms_and_gradients(scaled, config)
    assert value > 0.1
    chex.assert_trees_all_close((value, seen), again, rtol=1e-12)
    for index, factor in ((0, factors), (1, factors[::-1]), (2, 3)):
        assert np.abs(gradients[index]).max() > 1e-3
        np.testing.assert_allclose(
            factor * gradients_again[index], gradients[index], rtol=1e-9, atol=1e-12)
    # No gradient along a feature, and none of the bias.
    for vectors, gradient in zip(problem[:2], gradients[:2], strict=True):
        np.testing.assert_allclose(np.sum(vectors * gradient, axis=1), np.zeros(6), atol=1e-12)
    np.testing.assert_array_equal(gradients[3], np.zeros(4))
    # What is stored are means of directions: of those of one example the length is 1.
    moved = seen[1].mean[:3] - 0.9 * problem.mean[:3]
    np.testing.assert_allclose(np.linalg.norm(moved[1]), 0.1, rtol=1e-12)
    assert (np.linalg.norm(moved, axis=1)[[0, 2]] < 0.1).all()
    np.testing.assert_allclose(seen[0].norm, 1, rtol=1e-12)


def test_features_of_zero_have_finite_gradients_in_the_direction_only():
    (value, _), gradients = loss_terms_and_gradients(
        in_dtype(random_problem(3, [0, 2, 2], 4, 3), np.float32)._replace(
            features=jnp.zeros((3, 3)), mean=jnp.zeros((4, 3))), VARIANTS[0])
    assert np.isfinite(value)
    chex.assert_tree_all_finite(gradients)


@pytest.mark.usefixtures("enable_x64")
def test_derivatives_of_the_variants_are_those_of_finite_differences():
    problem = in_dtype(random_problem(3, [0, 2, 2, 0, 0, 1], 4, 3), np.float64)
    # Far from the kinks of the reference's tests; without the constant unit of the margin.
    for config in (VARIANTS[0], dataclasses.replace(VARIANTS[1], margin_relative=False)):
        assert distance_to_kinks(random_problem(3, [0, 2, 2, 0, 0, 1], 4, 3), config) > 1e-3
        check_grads(
            jax.jit(lambda *arrays, config=config: robust_loss(
                *arrays[:2], problem.labels, *arrays[2:],
                CentroidState(problem.mean, problem.seen), config)[0]),
            problem[:4], order=1, modes=("fwd", "rev"), atol=1e-6, rtol=1e-6, eps=1e-6)


def test_views_that_are_alike_are_aligned_as_in_the_paper():
    problem = in_dtype(random_problem(3, [0, 2, 2, 0, 0, 1], 4, 3), np.float32)
    same = problem._replace(noisy=problem.features)
    config = config_of(0.9, 0.5, 2.0)
    for one in (problem, same):
        (paper, state), (other, state_of_other) = (
            loss_terms_and_gradients(one, dataclasses.replace(config, align_to=to))[0][1]
            for to in ("clean", "other"))
        # Only the alignment differs, and only if the views do.
        for name in paper._fields:
            found, expected = getattr(other, name), getattr(paper, name)
            assert np.allclose(found, expected, rtol=1e-6) == (one is same or name != "align"), name
        chex.assert_trees_all_equal(state_of_other, state)


def test_a_relative_margin_grows_with_the_features_and_does_not_shrink_them():
    config = dataclasses.replace(
        VARIANTS[1], alpha=0.0, lam=0.0, gamma_reg=0.0, margin_centroids="naive")
    problem = random_problem(3, [0, 2, 2, 0, 0, 1], 4, 3)
    with jax.enable_x64(True):
        (value, _), gradients = loss_terms_and_gradients(in_dtype(problem, np.float64), config)
        (larger, _), _ = loss_terms_and_gradients(in_dtype(problem._replace(
            features=3 * problem.features, bias=3 * problem.bias), np.float64), config)
        unit = margin_unit(problem, config)
        fixed = dataclasses.replace(config, margin_relative=False, delta_d=float(0.5 * unit))
        same, gradients_of_fixed = loss_terms_and_gradients(in_dtype(problem, np.float64), fixed)
    assert value > 0.1 and unit > 0.1
    np.testing.assert_allclose(larger, 3 * value, rtol=1e-12)
    # The unit is a constant: the gradient is that of a margin of this length.
    np.testing.assert_allclose(same[0], value, rtol=1e-12)
    chex.assert_trees_all_close(gradients, gradients_of_fixed, rtol=1e-12, atol=1e-14)


def test_a_margin_of_directions_is_a_sine():
    config = RobustLossConfig(direction=True, delta_v=0.0, delta_d=1.0)
    features = jnp.array([[5.0, 0.0], [0.0, 2.0]])
    # The boundary of the two classes is the diagonal: both centroids are 45 degrees from it.
    _, terms, _ = jitted_loss(features, features, jnp.array([0, 1]), 3 * jnp.eye(2),
                              jnp.array([9.0, -9.0]), init_centroids(2, 2), config=config)
    np.testing.assert_allclose(terms.margin, 1 - np.sin(np.pi / 4), rtol=1e-6)
    np.testing.assert_allclose(terms.compact, 0, atol=1e-12)


def test_a_linear_hinge_and_a_warm_up_are_combined_by_options_alone():
    """The gradient of the terms beside the softmax loss grows from 0, and has a bound."""
    config = RobustLossConfig(alpha=1.0, beta=0.0, gamma_reg=0.0, lam=0.0, delta_v=0.0,
                              compact_linear_beyond=0.8, compact_centroids="naive")
    labels, far = jnp.array([0, 0, 1, 1]), 1e4 * jnp.array([[1.0], [-1.0], [3.0], [-3.0]])
    method = make_method("robust_clean", robust=config)

    def loss(images, weight):
        def forward(batch_stats, images):
            return Outputs(jnp.zeros((4, 2)), images, {}), batch_stats

        return method.objective(forward, (jnp.eye(1, 2), jnp.zeros(2)), {}, init_centroids(2, 1),
                                Batch(images, images, labels), weight=weight,
                                key=jax.random.key(0), axis_name=None)[0]

    gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(far, jnp.array([0.0, 0.25, 1.0]))
    # A class's two examples have half of its gradient each, and a class has half of the loss.
    expected = np.array([0.0, 0.25, 1.0])[:, None] * (2 * 0.8) / 4 * np.sign(far)[None, :, 0]
    np.testing.assert_allclose(gradients[..., 0], expected, rtol=1e-5, atol=1e-7)


def test_the_defaults_are_the_papers():
    config = RobustLossConfig()
    assert (config.alpha, config.beta, config.gamma_reg, config.lam) == (1, 1, 1e-3, 1)
    assert (config.delta_v, config.delta_d, config.momentum) == (0.5, 5, 0.9)
    assert config.compact_squared and not config.margin_squared and config.boundaries == "max"
    assert (config.compact_centroids, config.margin_centroids) == ("momentum", "naive")
    assert (config.direction, config.align_to, config.margin_relative) == (False, "clean", False)


def test_the_authors_release_is_one_mean_over_clean_and_noisy_features():
    problem = random_problem(6, [0, 2, 2, 0, 0, 1], 4, 3)
    centroids = reference.momentum_centroids(
        problem.features, problem.labels, 4, dict(enumerate(problem.mean)), 0.99)
    expected = reference.release_compactness(
        problem.features, problem.noisy, problem.labels, centroids, AUTHORS_RELEASE.delta_v)
    with jax.enable_x64(True):
        values, _, _ = terms_and_gradients(in_dtype(problem, np.float64), AUTHORS_RELEASE)
    _, compact, _, _, align, _ = np.asarray(values)
    weighted = AUTHORS_RELEASE.alpha * compact + AUTHORS_RELEASE.lam * align
    assert expected > 0.1
    np.testing.assert_allclose(weighted, expected, rtol=1e-12)
    changed = {"alpha", "lam", "momentum"}
    for field in dataclasses.fields(RobustLossConfig):
        if field.name not in changed:
            assert getattr(AUTHORS_RELEASE, field.name) == field.default
