"""What the benchmarks compare computes the same."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax.losses import softmax_cross_entropy_with_integer_labels

from experiments.bench import curvature as curvature_bench
from experiments.bench import losses as losses_bench
from experiments.bench import problem, timing, train_step
from jaxrobust import curvature, probes, training
from jaxrobust.centroids import init_centroids
from jaxrobust.methods import Batch, make_method

pytestmark = pytest.mark.slow

CASE = problem.Case(num_classes=3, image_size=8, width=4, batch_size=8)
STEP = curvature_bench.STEP


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    # PyTorch's threads wait for each other by spinning, for seconds where cores are shared.
    monkeypatch.setattr(timing, "cores", lambda: 1)


@pytest.mark.usefixtures("enable_x64")
def test_pytorch_computes_the_same_logits_and_eq_21():
    torch = pytest.importorskip("torch")
    from experiments.bench import torch_peer

    torch.set_num_threads(1)
    made = problem.make_problem(CASE._replace(image_size=16, batch_size=2))
    model = made.model.clone(mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3), dtype=jnp.float64)
    # Biases, scales and statistics as of a trained network: before, they are 0 or 1 throughout.
    draw = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(np.float64(leaf) + draw.uniform(-0.1, 0.1, leaf.shape)),
        made.variables)
    images, labels = made.images.astype(jnp.float64), made.labels

    @jax.jit
    def logits(x):
        return model.apply(variables, x, train=False).logits

    module = torch_peer.convert(model, variables)
    assert not module.training and module.conv1.weight.dtype == torch.float64
    converted = torch_peer.to_torch(np.asarray(images))
    np.testing.assert_allclose(module(converted).numpy(), logits(images), rtol=1e-10)

    key, num_probes = jax.random.key(2), 3
    ours = jax.jit(lambda images: curvature.finite_difference_curvature(
        lambda x: softmax_cross_entropy_with_integer_labels(logits(x), labels), images, key,
        step=STEP, num_probes=num_probes).value)(images)
    # The probes as the documentation of `finite_difference_curvature` says they are drawn.
    own = probes.salted(key, "finite_difference_curvature")
    vectors = [jnp.stack([jax.random.normal(
        jax.random.fold_in(jax.random.fold_in(own, k), i), images.shape[1:], images.dtype)
        for i in range(len(images))]) for k in range(num_probes)]
    theirs = torch_peer.finite_difference_curvature(
        module, converted, torch.tensor(np.asarray(labels)),
        lambda k: torch_peer.to_torch(np.asarray(vectors[k])), step=STEP, num_probes=num_probes)
    assert np.all(ours > 1e-6)
    np.testing.assert_allclose(theirs.numpy(), ours, rtol=1e-8)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-4), (np.float64, 1e-10)])
@pytest.mark.parametrize("size", [losses_bench.Size(64, 128, 10), losses_bench.Size(40, 16, 60)],
                         ids=["few_classes", "many_classes"])
@pytest.mark.parametrize("form", losses_bench.FORMS)
def test_pytorch_computes_the_same_loss_gradients_and_state(form, size, dtype, tolerance):
    pytest.importorskip("torch")
    made = losses_bench.make_problem(size, dtype)
    with jax.enable_x64(dtype == np.float64):
        total, gradients, state = jax.tree.map(
            np.asarray, losses_bench.value_and_gradients(made))
    value, (*to_features, to_weight, to_bias), (mean, seen) = losses_bench.make_torch_call(
        made, form)()
    # The hinge of every term is active, so that all of them are compared.
    assert total.dtype == dtype and total > 1
    assert all(np.abs(gradient).max() > 1e-4 for gradient in gradients)
    np.testing.assert_allclose(value.numpy(), total, rtol=tolerance)
    for theirs, ours in zip((*to_features, to_weight.T, to_bias), gradients, strict=True):
        np.testing.assert_allclose(theirs.numpy(), ours, rtol=0,
                                   atol=tolerance * np.abs(ours).max())
    np.testing.assert_allclose(mean.numpy(), state.mean, rtol=0, atol=tolerance)
    np.testing.assert_array_equal(seen.numpy(), state.seen)


@pytest.mark.usefixtures("enable_x64")
def test_a_step_in_pytorch_gives_the_same_loss_weights_and_statistics():
    torch = pytest.importorskip("torch")
    from experiments.bench import torch_peer

    torch.set_num_threads(1)
    made = problem.make_problem(CASE)
    model = made.model.clone(dtype=jnp.float64)
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), made.variables)
    images = made.images.astype(jnp.float64)
    module = torch_peer.convert(model, variables)
    step = torch_peer.make_train_step(
        module, torch_peer.to_torch(np.asarray(images)),
        torch.from_numpy(np.array(made.labels, np.int64)), learning_rate=0.1)

    optimizer = training.sgd(0.1)
    state = training.TrainState(
        step=jnp.zeros((), jnp.int32), params=variables["params"],
        batch_stats=variables["batch_stats"], opt_state=optimizer.init(variables["params"]),
        centroids=init_centroids(3, 128),
        key=jax.random.key(0))
    ours = jax.jit(training.make_train_step(model, make_method("normal"), optimizer))
    batch = Batch(images, images, made.labels.astype(jnp.int32))
    first = torch_peer.convert(model, variables).state_dict()
    # The second step sees the momentum of the first one.
    for _ in range(2):
        # Flax's batch norm itself mixes float32 into the double precision.
        with jax.numpy_dtype_promotion("standard"):
            state, metrics = ours(state, batch)
        np.testing.assert_allclose(step().item(), metrics["loss"], rtol=1e-8)
    expected = torch_peer.convert(
        model, {"params": state.params, "batch_stats": state.batch_stats}).state_dict()
    moved = 0
    for name, value in module.state_dict().items():
        if name.endswith(("running_var", "num_batches_tracked")):
            continue
        np.testing.assert_allclose(value.numpy(), expected[name].numpy(), rtol=1e-6, atol=1e-8)
        moved += not np.allclose(value.numpy(), first[name].numpy())
    assert moved >= 60
    # PyTorch keeps the unbiased variance: of n = 8 images of 8 x 8 pixels, n / (n - 1) of ours.
    kept = 0.9**2
    ours, theirs = (state["bn1.running_var"].numpy() - kept
                    for state in (expected, module.state_dict()))
    np.testing.assert_allclose(theirs, ours * 512 / 511, rtol=1e-8)


def test_the_timed_step_trains():
    step, _ = train_step.make_step(CASE, "float32", "normal")
    losses = [float(step()["loss"]) for _ in range(8)]
    assert losses[-1] < losses[0]
    # Its weights are its own: those of the problem are still there after their donation.
    chex.assert_tree_all_finite(problem.make_problem(CASE).variables)


def test_operations_of_a_step_are_those_of_resnet18():
    made = problem.make_problem(CASE._replace(batch_size=2))
    model = made.model.clone(width=64, num_classes=10)
    images = jnp.zeros((2, 32, 32, 3))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    by_hand = 0
    for size, inputs, outputs, count, side in (
            (3, 3, 64, 1, 32), (3, 64, 64, 4, 32), (3, 64, 128, 1, 16), (1, 64, 128, 1, 16),
            (3, 128, 128, 3, 16), (3, 128, 256, 1, 8), (1, 128, 256, 1, 8), (3, 256, 256, 3, 8),
            (3, 256, 512, 1, 4), (1, 256, 512, 1, 4), (3, 512, 512, 3, 4), (1, 512, 128, 1, 1),
            (1, 128, 10, 1, 1)):
        by_hand += count * side**2 * size**2 * inputs * outputs
    total = train_step.step_flops(model, variables, images)
    assert total == 2 * 6 * by_hand
    np.testing.assert_allclose(total / 2, 3.33e9, rtol=2e-3)


def test_a_network_that_pytorch_cannot_compile_is_a_row_with_the_reason(monkeypatch):
    torch = pytest.importorskip("torch")

    def fail(module, dynamic):
        def network(images):
            raise RuntimeError("No working C++ compiler found\nand more")

        return network

    monkeypatch.setattr(torch, "compile", fail)
    (_, (eager, compiled)), = train_step.measure_peers(dataclasses.replace(
        train_step.settings_for(True), rounds=((4, 1),),
        peers=(train_step.EAGER, train_step.COMPILED)))
    assert compiled["not_measured"] == "torch.compile: No working C++ compiler found"
    assert eager["ratio"] > 0
