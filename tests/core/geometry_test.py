"""Boundaries, dispersion and margins against the definitions; Propositions 5.1 to 5.3."""

import functools
import operator

import chex
import hypothesis
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import strategies as st

from jaxrobust import losses
from jaxrobust.geometry import (
    class_dispersion,
    class_margin,
    class_rows_of,
    directions,
    distances_to_one,
    rescale_head,
    safe_norm,
    signed_boundary_distance,
)
from jaxrobust.models import SmallCNN, head_parameters

pytestmark = pytest.mark.usefixtures("full_compilation")

NUM_CLASSES, DIM, SIZE = 4, 3, 7
LABELS = np.array([0, 2, 2, 0, 3, 2, 0], np.int32)  # class 1 is absent, class 3 has one example
OWN = np.arange(NUM_CLASSES)[None] == LABELS[:, None]

distance = jax.jit(signed_boundary_distance)
dispersion = jax.jit(class_dispersion, static_argnums=2)
margin = jax.jit(class_margin)


def random_layer(seed, dtype=np.float32):
    """Features [N, d], kernel [d, C] and bias [C]."""
    rng = np.random.default_rng(seed)
    shapes = (SIZE, DIM), (DIM, NUM_CLASSES), (NUM_CLASSES,)
    return tuple(rng.normal(size=shape).astype(dtype) for shape in shapes)


def reference_distances(points, labels, kernel, bias):
    """Eq. 10 with the sign that Eq. 9 gives it."""
    W, expected = kernel.T, np.full((len(points), len(bias)), np.inf)
    for n, (q, c) in enumerate(zip(points, labels, strict=True)):
        z = W @ q + bias
        for i in range(len(bias)):
            if i != c:
                expected[n, i] = reference.boundary_distance(q, c, i, W, bias) * np.sign(
                    z[c] - z[i])
    return expected


labels_of_points = st.lists(st.integers(0, NUM_CLASSES - 1), min_size=SIZE, max_size=SIZE)


@hypothesis.settings(max_examples=40)
@hypothesis.given(st.integers(0, 2**32 - 1), labels_of_points)
def test_distances_dispersion_and_margin_are_those_of_the_definitions(seed, labels):
    points, kernel, bias = random_layer(seed, np.float64)
    with jax.enable_x64(True):
        results = [np.asarray(value) for value in (
            distance(points, np.array(labels), kernel, bias),
            dispersion(points, np.array(labels), NUM_CLASSES),
            margin(points, np.array(labels), kernel, bias))]
    expected = (
        reference_distances(points, labels, kernel, bias),
        [reference.dispersion(points, labels, c) for c in range(NUM_CLASSES)],
        [reference.class_margin(points, labels, c, kernel.T, bias) for c in range(NUM_CLASSES)])
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, wanted, rtol=1e-9, atol=1e-9)


def test_measures_are_the_same_without_jit():
    points, kernel, bias = random_layer(0)
    np.testing.assert_allclose(
        signed_boundary_distance(points, LABELS, kernel, bias),
        reference_distances(points, LABELS, kernel, bias), rtol=1e-4, atol=1e-5)
    expected = [reference.dispersion(points, LABELS, c) for c in range(NUM_CLASSES)]
    assert expected[1] == expected[3] == 0 < expected[0]
    np.testing.assert_allclose(class_dispersion(points, LABELS, NUM_CLASSES), expected, rtol=1e-5)
    expected = [reference.class_margin(points, LABELS, c, kernel.T, bias)
                for c in range(NUM_CLASSES)]
    assert expected[1] == np.inf
    np.testing.assert_allclose(
        class_margin(points, LABELS, kernel, bias), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("nu", [0.5, 2.0])
def test_the_head_is_rescaled_and_the_parameters_given_are_kept(nu):
    params = {"stem": {"kernel": np.ones((2, 2), np.float32)},
              "features": {"kernel": np.full((2, 3), 2, np.float32),
                           "bias": np.full(3, 3, np.float32)},
              "head": {"kernel": np.full((3, 2), 4, np.float32),
                       "bias": np.full(2, 5, np.float32)}}
    kept = jax.tree.map(np.copy, params)
    expected = {"stem": kept["stem"],
                "features": {"kernel": 2 * nu * np.ones((2, 3)), "bias": 3 * nu * np.ones(3)},
                "head": {"kernel": kept["head"]["kernel"], "bias": 5 * nu * np.ones(2)}}
    chex.assert_trees_all_close(rescale_head(params, nu), expected, rtol=1e-7)
    chex.assert_trees_all_equal(params, kept)


@pytest.mark.usefixtures("enable_x64")
def test_the_gradient_of_a_distance_is_the_unit_normal_of_its_hyperplane():
    points, kernel, bias = random_layer(1, np.float64)

    def finite(points, kernel, bias):
        return jnp.where(OWN, 0.0, signed_boundary_distance(points, LABELS, kernel, bias))

    to_points, to_kernel, to_bias = jax.jit(jax.jacrev(finite, (0, 1, 2)))(points, kernel, bias)
    for n, c in enumerate(LABELS):
        for i in set(range(NUM_CLASSES)) - {c}:
            normal = kernel[:, c] - kernel[:, i]
            length = np.linalg.norm(normal)
            np.testing.assert_allclose(to_points[n, i, n], normal / length, rtol=1e-9)
            # s = (normal.q + b_c - b_i) / length, by its quotient rule.
            s = (normal @ points[n] + bias[c] - bias[i]) / length
            by_row = points[n] / length - s * normal / length**2
            np.testing.assert_allclose(to_kernel[n, i, :, c], by_row, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(to_kernel[n, i, :, i], -by_row, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(to_bias[n, i, [c, i]], [1 / length, -1 / length])


def test_the_gradient_of_the_dispersion_pulls_on_the_farthest_pair():
    points, labels = jnp.array([[0.0, 0.0], [3.0, 4.0], [1.0, 1.0]]), jnp.zeros(3, int)
    gradient = jax.jit(jax.grad(lambda points: class_dispersion(points, labels, 1)[0]))(points)
    np.testing.assert_allclose(gradient, [[-0.6, -0.8], [0.6, 0.8], [0.0, 0.0]], atol=1e-6)


@pytest.mark.parametrize("kernel", [
    np.zeros((DIM, NUM_CLASSES), np.float32), np.ones((DIM, NUM_CLASSES), np.float32)],
    ids=["zero", "equal_rows"])
def test_without_a_hyperplane_the_distance_is_infinite_without_a_gradient(kernel):
    points, _, bias = random_layer(2)
    result = np.asarray(distance(points, LABELS, kernel, bias))
    np.testing.assert_array_equal(result, np.full((SIZE, NUM_CLASSES), np.inf))
    gradients = jax.jit(jax.grad(
        lambda *layer: jnp.sum(jnp.where(OWN, 0.0, signed_boundary_distance(
            layer[0], LABELS, *layer[1:]))), (0, 1, 2)))(points, kernel, bias)
    chex.assert_trees_all_equal(gradients, jax.tree.map(jnp.zeros_like, gradients))
    assert class_margin(points, LABELS, kernel, bias)[0] == np.inf


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equal_rows_among_many_long_ones_have_no_hyperplane(dtype):
    # What is left of |W_c|^2 + |W_i|^2 - 2 W_c.W_i is then rounding, of sums of 2048 numbers.
    num_classes, dim = 60, 2048
    rng = np.random.default_rng(0)
    with jax.enable_x64(dtype == np.float64):
        kernel = np.repeat(rng.normal(size=(dim, num_classes // 2)), 2, axis=1).astype(dtype)
        labels = np.arange(num_classes)

        def with_the_equal(points, kernel):
            distances = signed_boundary_distance(
                points, labels, kernel, jnp.arange(num_classes).astype(dtype))
            return jnp.sum(distances[labels, labels ^ 1]), distances

        (_, result), (to_points, to_kernel) = jax.jit(jax.value_and_grad(
            with_the_equal, (0, 1), has_aux=True))(
                rng.normal(size=(num_classes, dim)).astype(dtype), kernel)
        assert result.dtype == dtype
        alike = labels[:, None] // 2 == labels[None] // 2
        np.testing.assert_array_equal(np.isinf(result), alike)
        assert not np.asarray(to_points).any() and not np.asarray(to_kernel).any()


@pytest.mark.parametrize(("dtype", "threshold"), [
    (np.float32, np.sqrt(128 * 2.0**-23)), (np.float64, np.sqrt(128 * 2.0**-52))])
@pytest.mark.parametrize(("factor", "apart"), [(0.8, False), (1.25, True)])
def test_rows_are_the_same_where_only_rounding_tells_them_apart(dtype, threshold, factor, apart):
    # Two pairs of rows of length 1 around the mean row, each pair as far apart as is said.
    gap = factor * threshold
    rows = np.array([[1, gap / 2], [1, -gap / 2], [-1, gap / 2], [-1, -gap / 2]])
    with jax.enable_x64(dtype == np.float64):
        layer = jnp.asarray(rows.T, dtype), jnp.zeros(4, dtype)
        measured = distance(jnp.array([[0, 3]], dtype), np.array([0]), *layer)
        loss = losses.margin_loss(
            jnp.array([[0, -3]] * 4, dtype), jnp.arange(4) == 0, *layer, delta_d=1.0)
    np.testing.assert_allclose(measured[0, 1], 3 if apart else np.inf, rtol=0.2)
    # The distance that the loss goes through is computed from the difference itself. Where that
    # is left out, the boundary with the last class is the worst.
    np.testing.assert_allclose(
        loss, 4 if apart else 1 + 3 * gap / np.sqrt(4 + gap**2), rtol=1e-5)


def nearly_equal_rows(gap):
    """Three rows of W in 64 dimensions, two of them ``gap`` apart, a bias, and a centroid.

    Of the centroid's class, the first, the boundary with the second is at a distance of 10 and the
    one with the third at a distance of 2.
    """
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(64, 64)))
    row, normal = rotation[:2]
    return (np.stack([row, row + gap * normal, -row]), np.array([0, -10 * gap, 0]), 2 * row)


def test_nearly_equal_rows_do_not_hide_the_worst_boundary():
    present = jnp.array([True, False, False])
    compute = {boundaries: jax.jit(jax.value_and_grad(functools.partial(
        losses.margin_loss, delta_d=5.0, boundaries=boundaries)))
        for boundaries in ("max", "mean")}
    # In float32 the two rows, of length 2/3 from the mean row, are told apart from here on.
    threshold = np.sqrt(64 * 2.0**-23 * 2 * (2 / 3) ** 2)
    # Where they hardly are, two ways to compute their distance once disagreed whether they are.
    for gap in (1e-4, *np.linspace(0.99, 1.01, 40) * threshold, 1.2 * threshold):
        rows, bias, centroid = nearly_equal_rows(gap)
        np.testing.assert_allclose(reference.margin({0: centroid}, rows, bias, 5.0), 3)
        arguments = (jnp.asarray([centroid] * 3, jnp.float32), present,
                     jnp.asarray(rows.T, jnp.float32), jnp.asarray(bias, jnp.float32))
        loss, gradient = compute["max"](*arguments)
        np.testing.assert_allclose(loss, 3, rtol=1e-6)
        # Towards the right side of the boundary with the third class, whose normal is the row.
        np.testing.assert_allclose(gradient[0], -rows[0], atol=1e-5)
        # The mean is over one boundary or two, of which the other has hinge 0.
        loss, _ = compute["mean"](*arguments)
        np.testing.assert_allclose(loss, 1.5 if loss < 2 else 3, rtol=1e-5)
        if gap < 0.98 * threshold or gap > 1.1 * threshold:
            assert (loss > 2) == (gap < threshold)


def test_equal_rows_take_no_part_in_the_margin_of_a_class():
    rows, bias, centroid = nearly_equal_rows(0.0)
    labels = np.array([0])
    result = margin(np.float32(centroid[None]), labels, np.float32(rows.T), np.float32(bias))
    np.testing.assert_allclose(result, [2, np.inf, np.inf], rtol=1e-6)


def test_rows_at_distance_1_have_a_boundary():
    kernel, bias = jnp.array([[0.0, 1.0], [0.0, 0.0]]), jnp.zeros(2)
    centroids = jnp.array([[-1.0, 0.0], [0.0, 0.0]])
    loss = losses.margin_loss(centroids, jnp.array([True, False]), kernel, bias, delta_d=3.0)
    np.testing.assert_allclose(loss, 2.0)


def test_a_row_of_w_that_is_not_a_number_shows_in_the_distances():
    points, kernel, bias = random_layer(0)
    kernel[0, 1] = np.nan
    assert np.isnan(distance(points, LABELS, kernel, bias)[0, 1])
    loss = losses.margin_loss(
        np.zeros((NUM_CLASSES, DIM)), np.ones(NUM_CLASSES, bool), kernel, bias, delta_d=1.0)
    assert np.isnan(loss)


def test_examples_that_do_not_count_have_no_distance_and_spoil_nothing():
    points, kernel, bias = random_layer(0)
    labels = np.array([0, -1, 2, NUM_CLASSES, 3, 2, 0])
    kept = np.array([0, 2, 4, 5, 6])
    points[[1, 3]] = np.nan

    def measures(points, labels):
        return (distance(points, labels, kernel, bias), margin(points, labels, kernel, bias),
                dispersion(points, labels, NUM_CLASSES))

    result, expected = measures(points, labels), measures(points[kept], labels[kept])
    np.testing.assert_array_equal(result[0][np.array([1, 3])], np.full((2, NUM_CLASSES), np.inf))
    np.testing.assert_allclose(result[0][kept], expected[0], rtol=1e-6)
    chex.assert_trees_all_close(result[1:], expected[1:], rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda points: jnp.sum(
        class_dispersion(points, labels, NUM_CLASSES))))(points)
    np.testing.assert_array_equal(gradient[np.array([1, 3])], np.zeros((2, DIM)))
    chex.assert_tree_all_finite(gradient)


def test_bfloat16_is_computed_in_float32():
    points, kernel, bias = (jnp.asarray(value, jnp.bfloat16) for value in random_layer(0))
    wide = [value.astype(np.float32) for value in (points, kernel, bias)]
    chex.assert_trees_all_equal(distance(points, LABELS, kernel, bias),
                                distance(wide[0], LABELS, *wide[1:]))
    chex.assert_trees_all_equal(dispersion(points, LABELS, NUM_CLASSES),
                                dispersion(wide[0], LABELS, NUM_CLASSES))
    assert margin(points, LABELS, kernel, bias).dtype == np.float32


def test_a_part_that_all_rows_share_changes_no_distance():
    points, kernel, bias = random_layer(0)
    expected = reference_distances(np.float64(points), LABELS, np.float64(kernel), bias)
    moved = np.float32(kernel + np.array([[1000.0], [-2000.0], [500.0]]))
    # The rows as they are after the addition was rounded.
    exact = reference_distances(np.float64(points), LABELS, np.float64(moved), bias)
    np.testing.assert_allclose(exact, expected, rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(distance(points, LABELS, moved, bias), exact, rtol=1e-4, atol=1e-5)


def test_the_norm_has_gradient_0_at_0_and_the_unit_vector_elsewhere():
    vectors = jnp.array([[[0.0, 0.0], [3.0, -4.0], [0.0, 1.0]]])
    np.testing.assert_allclose(safe_norm(vectors), [[0, 5, 1]])
    gradient = jax.grad(lambda vectors: jnp.sum(safe_norm(vectors)))(vectors)
    np.testing.assert_allclose(gradient, [[[0, 0], [0.6, -0.8], [0, 1]]], rtol=1e-6)


def test_directions_are_those_of_tiny_and_large_vectors_and_0_has_none():
    vectors = jnp.array([[3e-30, 4e-30], [3e30, 4e30], [0.0, 0.0]])
    found, back = jax.vjp(directions, vectors)
    np.testing.assert_allclose(found, [[0.6, 0.8], [0.6, 0.8], [0, 0]], rtol=1e-6)
    gradient, = back(jnp.ones((3, 2)))
    length = np.array([5e-30, 5e30])
    np.testing.assert_allclose(
        gradient[:2] * length[:, None], [[0.16, -0.12], [0.16, -0.12]], rtol=1e-5)
    np.testing.assert_array_equal(gradient[2], [0, 0])
    assert np.isnan(directions(jnp.array([np.nan, 1.0]))).all()


def test_rows_without_a_difference_have_no_boundary_whatever_was_decided_of_them():
    rows = class_rows_of(jnp.array([[1.0, 1.0, 3.0]]), jnp.array([0.0, 5.0, 0.0]))
    own, others = (jax.tree.map(operator.itemgetter(jnp.array(classes)), rows)
                   for classes in ([0, 0], [1, 2]))
    found, back = jax.vjp(
        lambda points: distances_to_one(points, own, others, jnp.array([True, True])),
        jnp.ones((2, 1)))
    np.testing.assert_allclose(found, [np.inf, -1])
    np.testing.assert_allclose(back(jnp.ones(2))[0], [[0], [-1]])


def test_the_margin_counts_a_misclassified_example_with_its_unsigned_distance():
    points, labels = np.array([[2.0], [-0.5]], np.float32), np.array([0, 0])
    kernel, bias = np.array([[1.0, -1.0]], np.float32), np.zeros(2, np.float32)
    np.testing.assert_allclose(distance(points, labels, kernel, bias)[:, 1], [2.0, -0.5])
    np.testing.assert_allclose(margin(points, labels, kernel, bias), [0.5, np.inf])


# --- Propositions 5.1 and 5.2: features on which the losses vanish ----------------------------


def features_without_loss(seed, delta_v, delta_d, size=6):
    """Classes on spheres of radius delta_v around centroids delta_d from their boundaries."""
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(NUM_CLASSES + 1, NUM_CLASSES + 1)))
    rows = rng.uniform(0.5, 2) * rotation[:NUM_CLASSES]
    bias = rng.normal(size=NUM_CLASSES)
    # Moves every centroid far enough along its own row for the closest boundary.
    scale = np.linalg.norm(rows[0])
    reach = (np.sqrt(2) * delta_d * scale + np.ptp(bias)) / scale**2
    centroids = (reach + 1e-6) * rows
    offsets = rng.normal(size=(NUM_CLASSES, size, NUM_CLASSES + 1))
    offsets *= delta_v * (1 - 1e-6) / np.linalg.norm(offsets, axis=-1, keepdims=True)
    # With every offset its opposite, so that the batch means are the centroids.
    features = centroids[:, None] + np.concatenate([offsets, -offsets], axis=1)
    labels = np.repeat(np.arange(NUM_CLASSES), 2 * size)
    return features.reshape(len(labels), -1), labels, rows.T, bias


@pytest.mark.slow
@hypothesis.settings(max_examples=30)
@hypothesis.given(st.integers(0, 2**32 - 1), st.sampled_from([0.1, 0.5, 2.0]),
                  st.sampled_from([0.5, 1.5, 2.5, 10.0]))
def test_where_the_losses_vanish_dispersion_and_margin_are_bounded(seed, delta_v, ratio):
    """Propositions 5.1, 5.2.1 (for ratio > 1) and 5.2.2 (for ratio > 2)."""
    delta_d = ratio * delta_v
    features, labels, kernel, bias = features_without_loss(seed, delta_v, delta_d)
    centroids = np.stack([features[labels == c].mean(0) for c in range(NUM_CLASSES)])
    with jax.enable_x64(True):
        arrays = [jnp.asarray(value) for value in (features, labels, centroids, kernel, bias)]
        features_, labels_, centroids_, kernel_, bias_ = arrays
        compact = losses.compactness_loss(features_, labels_, centroids_, delta_v=delta_v)
        apart = losses.margin_loss(
            centroids_, jnp.ones(NUM_CLASSES, bool), kernel_, bias_, delta_d=delta_d)
        widths = np.asarray(dispersion(features_, labels_, NUM_CLASSES))
        margins = np.asarray(margin(features_, labels_, kernel_, bias_))
        assert compact == 0 and apart == 0

    assert np.all(widths <= 2 * delta_v)
    # The bound is sharp: every feature has its opposite.
    np.testing.assert_allclose(widths, 2 * delta_v, rtol=1e-5)
    if ratio > 1:
        assert np.all(margins >= delta_d - delta_v)
    if ratio > 2:
        between = min(np.linalg.norm(p - q) for p, y in zip(features, labels, strict=True)
                      for q, other in zip(features, labels, strict=True) if y != other)
        assert widths.max() < between


# --- Proposition 5.3 and Corollary 5.1 --------------------------------------------------------


@functools.cache
def small_model():
    model = SmallCNN(num_classes=3, mean=(0.4,), std=(0.3,), num_features=5, width=2)
    images = jax.random.uniform(jax.random.key(0), (12, 6, 6, 1))
    variables = jax.jit(functools.partial(model.init, train=False))(jax.random.key(1), images)
    return jax.jit(functools.partial(model.apply, train=False)), variables, images


@pytest.mark.parametrize("nu", [0.3, 2.0, 10.0])
def test_rescaling_keeps_predictions_and_scales_margin_and_dispersion(nu):
    apply, variables, images = small_model()
    labels = jnp.arange(len(images)) % 3
    before = apply(variables, images)
    params = rescale_head(variables["params"], nu)
    after = apply({**variables, "params": params}, images)

    np.testing.assert_array_equal(jnp.argmax(after.logits, 1), jnp.argmax(before.logits, 1))
    np.testing.assert_allclose(after.logits, nu * before.logits, rtol=1e-5, atol=1e-5 * nu)
    np.testing.assert_allclose(after.features, nu * before.features, rtol=1e-5, atol=1e-5 * nu)

    def measured(outputs, params):
        kernel, bias = head_parameters(params)
        return (margin(outputs.features, labels, kernel, bias),
                dispersion(outputs.features, labels, 3))

    margins, widths = measured(before, variables["params"])
    new_margins, new_widths = measured(after, params)
    assert np.min(margins) > 1e-3 and np.min(widths) > 1e-3
    np.testing.assert_allclose(new_margins, nu * margins, rtol=1e-3)
    np.testing.assert_allclose(new_widths, nu * widths, rtol=1e-5)


def test_the_rescaling_moves_along_one_line_in_opposite_directions():
    _, variables, _ = small_model()
    params = variables["params"]

    def movement(nu):
        moved = jax.tree.map(lambda new, old: new - old, rescale_head(params, nu), params)
        return jax.flatten_util.ravel_pytree(moved)[0]

    direction = movement(2.0)  # (nu - 1) u with nu = 2
    assert np.linalg.norm(direction) > 1e-2
    for nu in (1.5, 4.0, 1 / 1.5, 1 / 4.0):
        np.testing.assert_allclose(movement(nu), (nu - 1) * direction, rtol=1e-4, atol=1e-6)
    for grow, shrink in ((1.5, 4.0), (4.0, 1.5)):
        one, other = movement(grow), movement(1 / shrink)
        cosine = jnp.vdot(one, other) / (jnp.linalg.norm(one) * jnp.linalg.norm(other))
        np.testing.assert_allclose(cosine, -1, rtol=1e-5)


def test_layers_of_other_names_can_be_rescaled():
    params = {"body": {"kernel": np.ones((2, 2))}, "top": {"bias": np.ones(2)}}
    result = rescale_head(params, 3.0, feature_layer="body", head="top")
    chex.assert_trees_all_close(
        result, {"body": {"kernel": 3 * np.ones((2, 2))}, "top": {"bias": 3 * np.ones(2)}})
