"""The step of training that is timed: PyTorch's is the same, and the numbers are what they say."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import curvature, timing, train_step
from jaxrobust import training
from jaxrobust.centroids import init_centroids
from jaxrobust.methods import Batch, make_method

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]

CASE = curvature.Case(num_classes=3, image_size=8, width=4, batch_size=8)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    # PyTorch's threads wait for each other by spinning, for seconds where cores are shared.
    monkeypatch.setattr(timing, "cores", lambda: 1)


@pytest.mark.usefixtures("enable_x64")
def test_a_step_in_pytorch_gives_the_same_loss_weights_and_statistics():
    torch = pytest.importorskip("torch")
    from experiments.bench import torch_peer

    torch.set_num_threads(1)
    problem = curvature.make_problem(CASE)
    model = problem.model.clone(dtype=jnp.float64)
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), problem.variables)
    images = problem.images.astype(jnp.float64)
    module = torch_peer.convert(model, variables)
    step = torch_peer.make_train_step(
        module, torch_peer.to_torch(np.asarray(images)),
        torch.from_numpy(np.array(problem.labels, np.int64)), learning_rate=0.1)

    optimizer = training.sgd(0.1)
    state = training.TrainState(
        step=jnp.zeros((), jnp.int32), params=variables["params"],
        batch_stats=variables["batch_stats"], opt_state=optimizer.init(variables["params"]),
        centroids=init_centroids(3, 128),
        key=jax.random.key(0))
    ours = jax.jit(training.make_train_step(model, make_method("normal"), optimizer))
    batch = Batch(images, images, problem.labels.astype(jnp.int32))
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
    ours, theirs = (state["stem_bn.running_var"].numpy() - kept
                    for state in (expected, module.state_dict()))
    np.testing.assert_allclose(theirs, ours * 512 / 511, rtol=1e-8)


def test_the_timed_step_trains():
    step = train_step.make_step(CASE, "float32", "normal")
    losses = [float(step.call()["loss"]) for _ in range(8)]
    assert losses[-1] < losses[0]
    # Its weights are its own: those of the problem are still there after their donation.
    chex.assert_tree_all_finite(curvature.make_problem(CASE).variables)


def test_operations_of_a_step_are_those_of_resnet18():
    problem = curvature.make_problem(CASE._replace(batch_size=2))
    model = problem.model.clone(width=64, num_classes=10)
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


@pytest.fixture(name="peers", scope="module", params=["as installed", "without PyTorch"])
def _peers(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "cores", lambda: 1)
        if request.param == "without PyTorch":
            patch.setattr(curvature.importlib.util, "find_spec", lambda name: None)
        return train_step.measure_peers(train_step.QUICK)


def test_peers_are_ratios_of_medians_and_what_is_missing_says_why(peers):
    json.dumps(peers)
    assert [case["batch_size"] for case in peers["cases"]] == [4, 8]
    assert len(peers["ratios"]) == 2 * len(train_step.PEERS)
    for row in peers["ratios"]:
        case = next(case for case in peers["cases"] if case["batch_size"] == row["batch_size"])
        peer = row["denominator"]
        if peer in case["not_measured"]:
            assert row["not_measured"] == case["not_measured"][peer] and "ratio" not in row
            continue
        ours, theirs = (np.median(case["ms"][name]["rounds"]) for name in ("jax", peer))
        np.testing.assert_allclose(row["ratio"], ours / theirs)
        assert row["met"] == (row["ratio"] <= row["target"] == 1.0)
    reasons = {row["denominator"]: row.get("not_measured") for row in peers["ratios"]}
    if "not installed" in peers["torch"]:
        assert set(reasons.values()) == {peers["torch"]} and peers["torch_threads"] is None
    else:
        assert reasons == dict.fromkeys(train_step.PEERS) | {"torch_compiled": "not asked for"}


def test_a_network_that_pytorch_cannot_compile_is_a_row_with_the_reason(monkeypatch):
    torch = pytest.importorskip("torch")

    def fail(module):
        def network(images):
            raise RuntimeError("No working C++ compiler found\nand more")

        return network

    monkeypatch.setattr(torch, "compile", fail)
    found = train_step.measure_peers(dataclasses.replace(
        train_step.QUICK, compiled=True, large_seconds=0.0))
    rows = {(row["batch_size"], row["denominator"]): row for row in found["ratios"]}
    assert rows[4, "torch_compiled"]["not_measured"] == (
        "torch.compile: No working C++ compiler found")
    assert rows[4, "torch"]["ratio"] > 0
    # There was no time at all for the large batch.
    assert all("more than the 0 s" in rows[8, peer]["not_measured"] for peer in train_step.PEERS)


def test_methods_are_compared_with_both():
    found = train_step.measure_methods(train_step.QUICK)
    json.dumps(found)
    (case,) = found["cases"]
    assert {(row["numerator"], row["denominator"]) for row in found["ratios"]} == {
        ("robust", "both"), ("robust_one_pass", "both")}
    for row in found["ratios"]:
        ours, theirs = (np.median(case["ms"][row[side]]["rounds"])
                        for side in ("numerator", "denominator"))
        np.testing.assert_allclose(row["ratio"], ours / theirs)
        assert row["met"] == (row["ratio"] <= row["target"] == 1.03)


def test_the_share_of_the_peak_is_the_quotient_of_the_rates():
    found = train_step.measure_peak(train_step.QUICK)
    json.dumps(found)
    (case,) = found["cases"]
    assert case["peak_flops"] == max(case["product_flops"].values())
    np.testing.assert_allclose(
        case["share"], case["step_flops"] / (1e-3 * case["step_ms"]) / case["peak_flops"])
    assert 0 < case["share"] < 1
