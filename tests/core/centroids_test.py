"""Class centroids against Section 4.4, their gradients, and the batch split over devices."""

import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from jaxrobust import centroids as centroids_module
from jaxrobust.centroids import (
    CentroidState,
    class_counts,
    class_rows,
    class_sums,
    counted_rows,
    init_centroids,
    update_centroids,
)

pytestmark = pytest.mark.usefixtures("full_compilation")

NUM_CLASSES, DIM, BATCH = 4, 3, 6
update = jax.jit(update_centroids, static_argnames=("momentum", "axis_name"))


def random_features(seed, batch=BATCH):
    return np.random.default_rng(seed).normal(size=(batch, DIM))


def as_rows(centroids, otherwise):
    """A dictionary of centroids as [C, d], with ``otherwise`` [C, d] where a class is missing."""
    return np.stack([centroids.get(c, otherwise[c]) for c in range(NUM_CLASSES)])


any_labels = st.lists(st.integers(-1, NUM_CLASSES), min_size=BATCH, max_size=BATCH)


@hypothesis.settings(max_examples=40)
@hypothesis.given(st.lists(any_labels, min_size=1, max_size=4), st.integers(0, 2**32 - 1),
                  st.sampled_from([0.0, 0.9, 0.99]))
def test_centroids_follow_section_4_4_over_any_sequence_of_batches(batches, seed, momentum):
    zeros = np.zeros((NUM_CLASSES, DIM))
    stored = {}
    with jax.enable_x64(True):
        state = init_centroids(NUM_CLASSES, DIM, dtype=jnp.float64)
        for step, labels in enumerate(batches):
            features, labels = random_features([seed, step]), np.array(labels)
            centroids, state = update(state, features, labels, momentum=momentum)

            naive = reference.naive_centroids(features, labels, NUM_CLASSES)
            running = reference.momentum_centroids(features, labels, NUM_CLASSES, stored, momentum)
            stored = reference.stored_centroids(features, labels, NUM_CLASSES, stored, momentum)
            close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)
            close(centroids.current, as_rows(naive, zeros))
            close(centroids.running, as_rows({**stored, **running}, zeros))
            close(state.mean, as_rows(stored, zeros))
            np.testing.assert_array_equal(centroids.present, [c in naive for c in range(4)])
            np.testing.assert_array_equal(state.seen, [c in stored for c in range(4)])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nothing_is_seen_at_first(dtype):
    with jax.enable_x64(dtype == np.float64):
        state = init_centroids(5, 2, dtype=dtype)
        chex.assert_shape(state, [(5, 2), (5,)])
        chex.assert_type(state, [dtype, bool])
        assert not state.mean.any() and not state.seen.any()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_centroids_are_the_same_without_jit(momentum):
    features, labels = random_features(0), np.array([0, 2, 2, 0, 3, 0])
    mean, state = random_features(1, NUM_CLASSES), example_state()
    centroids, state = update_centroids(
        state, jnp.asarray(features, jnp.float32), jnp.array(labels), momentum=momentum)
    previous = {c: mean[c] for c in (0, 1, 3)}
    stored = reference.stored_centroids(features, labels, NUM_CLASSES, previous, momentum)
    naive = reference.naive_centroids(features, labels, NUM_CLASSES)
    np.testing.assert_allclose(
        centroids.current, as_rows(naive, np.zeros_like(mean)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(centroids.running, as_rows(stored, mean), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(state.mean, centroids.running)
    np.testing.assert_array_equal(centroids.present, [True, False, True, True])
    np.testing.assert_array_equal(state.seen, [True, True, True, True])


def example_state(dtype=np.float32):
    return CentroidState(jnp.asarray(random_features(1, NUM_CLASSES), dtype),
                         jnp.array([True, True, False, True]))


def test_a_class_starts_at_its_first_batch_mean_with_its_whole_gradient():
    features, labels = jnp.array([[1.0], [3.0]]), jnp.array([0, 0])

    def running(features):
        return update(init_centroids(1, 1), features, labels, momentum=0.9)[0].running[0, 0]

    value, gradient = jax.value_and_grad(running)(features)
    assert value == 2.0
    np.testing.assert_array_equal(gradient, [[0.5], [0.5]])


def test_an_absent_class_keeps_its_state_bit_by_bit():
    state = example_state()
    features = jnp.asarray(random_features(2), jnp.float32)
    centroids, new_state = update(state, features, jnp.zeros(BATCH, int))
    np.testing.assert_array_equal(new_state.mean[1:], state.mean[1:])
    np.testing.assert_array_equal(new_state.seen[1:], state.seen[1:])
    np.testing.assert_array_equal(centroids.running[1:], state.mean[1:])
    np.testing.assert_array_equal(centroids.current[1:], np.zeros((3, DIM)))
    assert not centroids.present[1:].any()
    assert np.any(new_state.mean[0] != state.mean[0])


@pytest.mark.usefixtures("enable_x64")
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_the_running_centroid_lets_one_minus_momentum_of_the_gradient_through(momentum):
    state, labels = example_state(np.float64), jnp.array([0, 1, 3, 3, 0, 1])
    jacobian = jax.jit(jax.jacrev(
        lambda features: update(state, features, labels, momentum=momentum)[0]._replace(
            present=None)))(jnp.asarray(random_features(2)))
    np.testing.assert_allclose(jacobian.running, (1 - momentum) * jacobian.current, rtol=1e-15)
    # The mean of two examples: 1/2 each, of the same dimension alone.
    expected = np.zeros((NUM_CLASSES, DIM, BATCH, DIM))
    for example, label in enumerate(np.asarray(labels)):
        expected[label, :, example] = np.eye(DIM) / 2
    np.testing.assert_allclose(jacobian.current, expected, rtol=1e-15)


def test_no_gradient_leaks_through_the_stored_mean_or_into_the_new_state():
    features, labels = jnp.asarray(random_features(2), jnp.float32), jnp.array([0, 1, 3, 3, 0, 1])
    state = example_state()

    def everything(mean, features):
        centroids, new_state = update(state._replace(mean=mean), features, labels)
        return centroids.current, centroids.running, new_state.mean

    jacobians = jax.jit(jax.jacrev(everything, (0, 1)))(state.mean, features)
    for to_mean, _ in jacobians:
        np.testing.assert_array_equal(to_mean, np.zeros_like(to_mean))
    current, running, stored = (to_features for _, to_features in jacobians)
    np.testing.assert_array_equal(stored, np.zeros_like(stored))
    assert np.any(current != 0) and np.any(running != 0)


def test_features_are_cast_to_the_dtype_of_the_state():
    narrow = jnp.asarray(random_features(2), jnp.bfloat16)
    labels, state = jnp.array([0, 1, 3, 3, 0, 1]), example_state()
    of_narrow = update(state, narrow, labels)
    chex.assert_trees_all_equal(of_narrow, update(state, narrow.astype(jnp.float32), labels))
    assert of_narrow[0].current.dtype == of_narrow[1].mean.dtype == jnp.float32


update_share = functools.partial(update_centroids, axis_name="devices")
pmapped = jax.pmap(update_share, "devices", in_axes=(None, 0, 0))


def over_pmap(state, features, labels):
    result = pmapped(state, features.reshape(8, 2, DIM), labels.reshape(8, 2))
    for leaf in jax.tree.leaves(result):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    return jax.tree.map(lambda leaf: leaf[0], result)


@jax.jit
def over_shard_map(state, features, labels):
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(update_share, mesh=mesh, in_specs=(P(), P("devices"), P("devices")),
                         out_specs=P())(state, features, labels)


@pytest.mark.parametrize("parallel", [over_pmap, over_shard_map])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("labels", [
    [0, 1, 2, 3, 3, 1, 0, 0, 2, 2, 1, 3, 0, 2, 1, 1], [0] * 4 + [1] * 4 + [3] * 8, [2] * 16,
    [-1] * 12 + [0, 0, 1, -1]], ids=["mixed", "one_class_a_device", "one_class", "few"])
def test_centroids_over_devices_are_those_of_the_whole_batch(parallel, labels, dtype):
    with jax.enable_x64(dtype == np.float64):
        features, labels = jnp.asarray(random_features(7, 16), dtype), jnp.array(labels)
        whole = update(example_state(dtype), features, labels)
        parts = parallel(example_state(dtype), features, labels)
        tolerance = 1e-12 if dtype == np.float64 else 1e-6
        chex.assert_trees_all_close(parts, whole, rtol=tolerance, atol=tolerance)
        np.testing.assert_array_equal(parts[1].seen, whole[1].seen)


# --- sums by class, and rows of classes -------------------------------------------------------

SUMMED_LABELS = np.array([0, 3, 3, -1, 1, NUM_CLASSES])


@pytest.mark.usefixtures("enable_x64")
@pytest.mark.parametrize("width", [(), (DIM,)], ids=["numbers", "vectors"])
def test_both_ways_to_sum_by_class_are_the_same_and_so_are_their_gradients(width):
    rng = np.random.default_rng(0)
    values, seeds = rng.normal(size=(BATCH, *width)), rng.normal(size=(NUM_CLASSES, *width))
    expected, back = np.zeros_like(seeds), np.zeros_like(values)
    for row, label in enumerate(SUMMED_LABELS):
        if 0 <= label < NUM_CLASSES:
            expected[label] += values[row]
            back[row] = seeds[label]
    for sums in (centroids_module._scattered_sums, centroids_module._multiplied_sums, class_sums):
        result, pullback = jax.vjp(
            lambda values, sums=sums: sums(values, SUMMED_LABELS, num_classes=NUM_CLASSES), values)
        np.testing.assert_allclose(result, expected, rtol=1e-14)
        np.testing.assert_allclose(pullback(jnp.asarray(seeds))[0], back, rtol=1e-14)
    by_block = functools.partial(
        centroids_module._multiplied_rows, table_size=4 * NUM_CLASSES)  # 4 and 2 of the 6 labels
    for rows in (centroids_module._gathered_rows, centroids_module._multiplied_rows, by_block,
                 class_rows):
        result, pullback = jax.vjp(
            lambda table, rows=rows: rows(table, SUMMED_LABELS), jnp.asarray(seeds))
        np.testing.assert_allclose(result, back, rtol=1e-14)
        np.testing.assert_allclose(pullback(jnp.asarray(values))[0], expected, rtol=1e-14)


# --- low precision, and examples that do not count --------------------------------------------


def test_rows_by_a_product_are_made_a_block_of_examples_at_a_time():
    compiled = jax.jit(centroids_module._multiplied_rows).lower(
        jax.ShapeDtypeStruct((20_000, 128), jnp.float32),
        jax.ShapeDtypeStruct((4096,), jnp.int32)).compile()
    # The one-hot labels of all are 328 MB, those of a block 17.
    assert 0 < compiled.memory_analysis().temp_size_in_bytes < 60e6


@pytest.mark.usefixtures("either_platform")
def test_sums_and_counts_of_bfloat16_go_beyond_256():
    labels = jnp.zeros(1024, jnp.int32)
    values = jnp.full((1024, 1), 2, jnp.bfloat16)
    sums, counts = class_sums(values, labels, 2), class_counts(labels, 2, jnp.bfloat16)
    np.testing.assert_array_equal(sums, np.float32([[2048], [0]]))
    np.testing.assert_array_equal(counts, np.float32([1024, 0]))
    # The gradient of picking rows is such a sum too.
    gradient = jax.grad(lambda table: jnp.sum(class_rows(table, labels)))(
        jnp.zeros((2, 1), jnp.bfloat16))
    np.testing.assert_array_equal(gradient.astype(np.float32), [[1024], [0]])


@pytest.mark.usefixtures("either_platform")
def test_means_of_a_bfloat16_state_are_those_of_all_its_examples():
    state = init_centroids(2, 1, dtype=jnp.bfloat16)
    features = jnp.asarray(np.where(np.arange(1024) % 4 == 0, 5, 1)[:, None], jnp.bfloat16)
    centroids, state = update_centroids(state, features, np.zeros(1024, int))
    np.testing.assert_array_equal(centroids.current, np.float32([[2], [0]]))
    assert state.mean.dtype == jnp.bfloat16 and state.mean[0, 0] == 2
    centroids, state = update_centroids(state, 3 * features, np.zeros(1024, int), momentum=0.75)
    # 0.75 * 2 + 0.25 * 6
    np.testing.assert_array_equal(centroids.running[0], np.float32([3]))
    assert state.mean[0, 0] == 3


@pytest.mark.usefixtures("either_platform")
@pytest.mark.parametrize("shape", [(4,), (4, 2), (4, 2, 3)])
def test_rows_that_do_not_count_are_0_and_the_others_as_they_were(shape):
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    values[[0, 2]] = np.nan
    rows = counted_rows(jnp.asarray(values), jnp.array([-1, 1, 2, 0]), 2)
    np.testing.assert_array_equal(rows, np.nan_to_num(values))


def test_examples_that_do_not_count_spoil_nothing():
    features = random_features(3).astype(np.float32)
    labels = np.array([0, -1, 2, NUM_CLASSES, 2, 2**31 - 1])
    kept = np.array([0, 2, 4])
    features[[1, 3, 5]] = [[np.nan] * DIM, [np.inf] * DIM, [-np.inf] * DIM]

    @functools.partial(jax.value_and_grad, has_aux=True)
    def value(features, labels):
        centroids, state = update_centroids(example_state(), features, labels)
        return jnp.sum(jnp.square(centroids.running)), (centroids, state)

    (_, results), gradient = value(features, labels)
    (_, expected), wanted = value(features[kept], labels[kept])
    chex.assert_trees_all_close(results, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient[kept], wanted, rtol=1e-6)
    np.testing.assert_array_equal(gradient[np.array([1, 3, 5])], np.zeros((3, DIM)))


@pytest.mark.usefixtures("either_platform")
@pytest.mark.parametrize(("labels", "present"), [
    (np.array([44, 255], np.uint8), [44, 255]), (np.array([44, -44], np.int8), [44]),
    ([44, 299], [44, 299]), (np.array([44, 2**32 + 1]), [44]),
    (np.array([44, 2**63], np.uint64), [44]), (jnp.array([44, 2**31], jnp.uint32), [44])],
    ids=["uint8", "int8", "list", "int64", "uint64", "uint32"])
def test_labels_of_any_integer_dtype_are_the_classes_that_they_say(labels, present):
    # 300 = 44 + 256
    centroids, _ = update_centroids(init_centroids(300, 1), np.ones((2, 1)), labels)
    np.testing.assert_array_equal(np.flatnonzero(centroids.present), present)
    counts = class_counts(jnp.asarray(np.asarray(labels)) if isinstance(labels, list) else labels,
                          300, jnp.float32)
    np.testing.assert_array_equal(np.flatnonzero(counts), present)


def test_arrays_of_numpy_are_taken_as_they_are():
    state = CentroidState(np.ones((NUM_CLASSES, DIM)), np.ones(NUM_CLASSES, bool))
    centroids, _ = update_centroids(state, random_features(0, 2), np.array([0, 3]))
    assert centroids.running.dtype == np.float32
    np.testing.assert_allclose(
        centroids.running[0], 0.9 + 0.1 * random_features(0, 2)[0], rtol=1e-5)


@pytest.mark.parametrize("momentum", [np.float32(0.5), np.float64(0.5), np.array(0.5)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_momentum_of_numpy_leaves_the_dtype_of_the_state(dtype, momentum):
    centroids, state = update_centroids(
        init_centroids(1, 1, dtype=dtype)._replace(seen=jnp.array([True])), jnp.ones((1, 1)),
        jnp.array([0]), momentum=momentum)
    assert (centroids.running.dtype, state.mean.dtype) == (jnp.float32, dtype)
    assert state.mean[0, 0] == 0.5
