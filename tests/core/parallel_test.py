"""One step in all its forms: the same result on 1, 2 and 8 devices, absent classes included."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust import methods, models, parallel, training
from jaxrobust._validate import InputError
from jaxrobust.losses import RobustLossConfig, softmax_loss
from jaxrobust.methods import Batch
from jaxrobust.parallel import Layout, make_layout
from jaxrobust.perturbations import gaussian

CLASSES = 5
SIZES = (16, 16, 16)


def make_batch(seed, size, dtype):
    """Sorted labels, so that every share holds a class or two and lacks the others.

    No example is of the last class; the one before comes with the second batch.
    """
    rng = np.random.default_rng(seed)
    clean = rng.uniform(size=(size, 8, 8, 1)).astype(dtype)
    noisy = np.clip(clean + 0.1 * rng.normal(size=clean.shape), 0, 1).astype(dtype)
    labels = np.sort(rng.integers(0, CLASSES - (2 if seed == 0 else 1), size)).astype(np.int32)
    return Batch(clean, noisy, labels)


@functools.cache
def problem(name, dtype):
    """Model, method, optimiser and first state, all in one precision."""
    model = models.SmallCNN(num_classes=CLASSES, mean=(0.5,), std=(0.25,), num_features=6, width=3,
                            dtype=jnp.dtype(dtype))
    method = methods.make_method(name, robust=RobustLossConfig(delta_d=1.0, momentum=0.5),
                                 perturb=gaussian(0.1))
    optimizer = training.sgd(0.02, clip_norm=1.0)
    state = jax.jit(lambda key: training.create_train_state(
        model, optimizer, key, jnp.zeros((1, 8, 8, 1), jnp.float32)))(jax.random.key(0))

    def convert(leaf):
        return np.array(leaf, dtype if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype)

    return model, method, optimizer, jax.tree.map(convert, state.replace(key=np.zeros(())))


def placed(layout, state):
    """The state on the devices, with a key: its leaves are new, so that they may be donated."""
    return parallel.replicate(layout, state.replace(key=jax.random.key(1)))


def updated(layout: Layout, name, dtype, sizes=SIZES, **options):
    """Parameters, statistics, centroids and metrics after each of a few updates."""
    model, method, optimizer, state = problem(name, dtype)

    def make_step(axis_name):
        step = training.make_train_step(model, method, optimizer, axis_name=axis_name, **options)
        return lambda state, shared, batch: step(state, batch)

    step = parallel.compile_step(layout, make_step)
    state, seen = placed(layout, state), []
    for seed, size in enumerate(sizes):
        batch = make_batch(seed, size, dtype)
        state, metrics = step(state, (), parallel.place_batch(layout, batch, size))
        seen.append(jax.device_get(
            (state.params, state.batch_stats, state.centroids, metrics)))
    return seen


# The method with every term in each form. What the others sum over the devices shows under pmap;
# over a mesh, the compiler sees to it.
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] if name != "robust" else [])
    for name in methods.METHODS])
def test_1_2_and_8_devices_give_the_same_update_after_update(name):
    # Flax's batch norm asks for the common type of its input and float32.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        alone = updated(make_layout("jit"), name, "float64")
        assert alone[0][0]["head"]["kernel"].dtype == "float64"
        assert not alone[0][2].seen[-1] and not alone[-1][2].seen[-1] and alone[-1][2].seen[-2]
        for form, devices in (("pmap", 8), ("pmap", 2), ("mesh", 8))[:3 if name == "robust" else 1]:
            split = updated(make_layout(form, jax.devices()[:devices]), name, "float64")
            chex.assert_trees_all_close(split, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_a_sharpness_aware_update_is_the_same_over_devices():
    alone, split = (updated(make_layout(form), "robust", "float32", (16,), sam_radius=0.1)
                    for form in ("jit", "pmap"))
    chex.assert_trees_all_close(split, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_batch_that_the_devices_do_not_divide_is_the_whole_one_too():
    alone, *others = (updated(make_layout(form), "robust", "float32", (16, 12))
                      for form in ("jit", "pmap", "mesh"))
    for split in others:
        chex.assert_trees_all_close(split, alone, rtol=1e-5, atol=1e-5)


def test_a_batch_is_really_split_over_a_mesh():
    layout = make_layout("mesh")

    @jax.jit
    def shares(rows):
        return rows * 2

    rows = parallel.place_batch(layout, np.arange(16.0, dtype=np.float32)[:, None], 16)
    assert {shard.data.shape for shard in shares(rows).addressable_shards} == {(2, 1)}
    whole = parallel.place_batch(layout, np.arange(12.0, dtype=np.float32), 12)
    assert {shard.data.shape for shard in whole.addressable_shards} == {(12,)}


def test_over_a_mesh_a_device_computes_its_share_alone():
    def flops(layout):
        model, method, optimizer, state = problem("robust", "float32")
        step = training.make_train_step(model, method, optimizer)
        compiled = parallel.compile_step(
            layout, lambda axis_name: lambda state, shared, batch: step(state, batch))
        rows = parallel.place_batch(layout, make_batch(0, 64, np.float32), 64)
        return compiled.lower(
            placed(layout, state), (), rows).compile().cost_analysis()["flops"]

    assert flops(make_layout("mesh")) < 0.25 * flops(make_layout("jit"))


@pytest.mark.slow
def test_batch_norm_per_device_is_that_of_the_shares():
    layout = make_layout("pmap", jax.devices()[:2])
    apart = updated(layout, "normal", "float32", SIZES[:1], sync_batch_norm=False)
    together = updated(layout, "normal", "float32", SIZES[:1])
    model, _, _, state = problem("normal", "float32")
    batch = make_batch(0, SIZES[0], np.float32)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    halves = [model.apply(variables, batch.clean[rows], train=True, mutable=["batch_stats"])
              for rows in (slice(0, 8), slice(8, 16))]
    expected = jax.tree.map(lambda a, b: (a + b) / 2, *(
        updated["batch_stats"] for _, updated in halves))
    chex.assert_trees_all_close(apart[0][1], expected, rtol=1e-5, atol=1e-6)
    losses = [softmax_loss(outputs.logits, batch.labels[rows]) for (outputs, _), rows in
              zip(halves, (slice(0, 8), slice(8, 16)), strict=True)]
    np.testing.assert_allclose(apart[0][3]["loss"], np.mean(losses), rtol=1e-5)
    assert abs(apart[0][3]["loss"] - together[0][3]["loss"]) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("form", ["pmap", "mesh"])
def test_nothing_is_compiled_again_after_the_first_batch_of_each_size(form):
    model, method, optimizer, state = problem("robust", "float32")
    layout = make_layout(form, jax.devices()[:2])
    traces = []

    def make_step(axis_name):
        step = training.make_train_step(model, method, optimizer, axis_name=axis_name)

        def traced(state, shared, batch):
            traces.append(batch.labels.shape)
            return step(state, batch)

        return traced

    step = parallel.compile_step(layout, make_step)
    state = placed(layout, state)
    sizes = (16, 16, 7, 16, 7)
    compiled = []
    for seed, size in enumerate(sizes):
        rows = parallel.place_batch(layout, make_batch(seed, size, np.float32), size)
        before = len(traces)
        state, _ = step(state, (), rows)
        compiled.append(len(traces) > before)
    assert compiled == [True, False, True, False, False]


def test_examples_are_mapped_to_the_same_values_on_any_number_of_devices():
    def function(shared, rows):
        keys = jax.vmap(lambda index: jax.random.fold_in(shared["key"], index))(rows["index"])
        noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
        return {"noisy": rows["x"] + shared["std"] * noise}

    x, index = np.ones((16, 3), np.float32), np.arange(16)
    found = []
    for layout in (make_layout("jit"), make_layout("mesh"), make_layout("pmap").for_examples()):
        shared = parallel.replicate(layout, {"key": jax.random.key(0), "std": np.float32(0.5)})
        rows = parallel.place_batch(layout, {"x": x, "index": index}, 16)
        whole, split = (jax.jit(parallel.map_examples(layout, function, whole=whole))(
            shared, rows)["noisy"] for whole in (True, False))
        assert whole.is_fully_replicated
        assert {part.data.shape[0] for part in split.addressable_shards} == {
            16 // layout.num_devices}
        np.testing.assert_array_equal(split, whole)
        found.append(np.asarray(whole))
    # To the last bit but for what a compiler may fuse.
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6)
    np.testing.assert_array_equal(found[2], found[1])


def test_the_form_follows_from_what_is_there():
    assert make_layout().form == "jit"  # Several CPU devices share the same cores.
    assert make_layout("mesh").num_devices == 8
    assert make_layout("jit").num_devices == 1


def test_an_option_that_this_xla_does_not_know_is_left_out(monkeypatch):
    layout = make_layout("jit")
    names = {"xla_cpu_experimental_ynn_fusion_type"} if jax.__version_info__ >= (0, 9) else set()
    assert parallel.compiler_options(layout).keys() == names
    assert parallel.compiler_options(layout, ynnpack=False) == {}
    # An XLA without it refuses the compilation.
    known = parallel._known_options.__wrapped__
    jit = jax.jit
    monkeypatch.setattr(jax, "jit", lambda function, **_: jit(
        function, compiler_options={"xla_cpu_no_such_option": "1"}))
    assert known() == {}


def test_bad_arguments_are_named():
    with pytest.raises(InputError, match="Unknown parallel 'pmp'. Did you mean 'pmap'?"):
        make_layout("pmp")
    with pytest.raises(InputError, match=r"Expected rows of a batch=3 in \[4, 4\]"):
        parallel.place_batch(make_layout("mesh"), np.zeros(3), 4)
    with pytest.raises(InputError, match="Expected size of a batch=0 to be an integer >= 1"):
        parallel.place_batch(make_layout("jit"), np.zeros((0, 3)), 0)
    with pytest.raises(InputError, match=r"Expected number of devices=0 in \[1, inf\)"):
        make_layout("jit", [])
    placed = parallel.place_batch(make_layout("mesh"), np.zeros((16, 3)), np.int64(16))
    assert placed.shape == (16, 3)
