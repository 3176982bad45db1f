"""Losses and gradients are finite at the ends: equal logits, dead classes, tiny and huge features,
centroids at 0, a batch of one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxrobust.centroids import CentroidState
from jaxrobust.losses import RobustLossConfig
from jaxrobust.methods import METHODS, Batch, make_method
from jaxrobust.methods.common import in_turn
from jaxrobust.models import Outputs
from jaxrobust.perturbations import gaussian

NUM_CLASSES, DIM, BATCH, PIXELS = 3, 4, 4, 5
SCALES = (0.0, 1e-20, 1e-10, 1.0, 1e5, 1e15)
CASES = st.fixed_dictionaries({
    "labels": st.lists(st.integers(-1, NUM_CLASSES - 1), min_size=BATCH, max_size=BATCH),
    # Of the features, of the rows of W, of the stored centroids.
    "features": st.sampled_from(SCALES), "kernel": st.sampled_from((0.0, 1e-20, 1.0)),
    "centroids": st.sampled_from(SCALES),
    "seen": st.lists(st.booleans(), min_size=NUM_CLASSES, max_size=NUM_CLASSES),
    "alike": st.booleans(), "bias": st.booleans(), "seed": st.integers(0, 9)})
ORDINARY = {"labels": [0, 1, 2, 0], "features": 1.0, "kernel": 1.0, "centroids": 1.0,
            "seen": [True] * 3, "alike": False, "bias": True, "seed": 0}
EXTREMES = {
    "all logits equal": {"kernel": 0.0, "bias": False},
    "a class without an example": {"labels": [0, 0, 1, 1], "seen": [True, True, False]},
    "a centroid at 0": {"features": 0.0, "centroids": 0.0},
    "tiny features": {"features": 1e-20}, "huge features": {"features": 1e15},
    "one example that counts": {"labels": [2, -1, -1, -1], "seen": [False] * 3},
    "equal images": {"alike": True}}


def problem(case, size=BATCH):
    """The arguments of :func:`compute`, of one shape whatever the case."""
    rng = np.random.default_rng(case["seed"])

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    params = {"weights": normal(PIXELS, DIM), "kernel": normal(DIM, NUM_CLASSES) * np.float32(
        case["kernel"]), "bias": normal(NUM_CLASSES) * np.float32(case["bias"])}
    clean = rng.uniform(size=(BATCH, PIXELS, 1, 1)).astype(np.float32)
    clean = np.broadcast_to(clean[:1], clean.shape) if case["alike"] else clean
    noisy = clean if case["alike"] else np.clip(clean + 0.1 * normal(*clean.shape), 0, 1)
    batch = Batch(clean, noisy, np.array(case["labels"], np.int32))
    batch = jax.tree.map(lambda rows: np.array(rows[:size]), batch)
    state = CentroidState(normal(NUM_CLASSES, DIM) * np.float32(case["centroids"]),
                          np.array(case["seen"]))
    return params, batch, state, np.float32(case["features"])


@functools.cache
def compute(name, dtype="float32"):
    """``(params, batch, state, scale) -> (loss, gradients, next centroids, metrics)``, compiled."""
    method = make_method(name, robust=RobustLossConfig(delta_d=1.0), perturb=gaussian(0.1))

    def objective(params, batch, state, scale):
        def forward(batch_stats, images):
            features = scale * (images.reshape(len(images), -1) @ params["weights"])
            logits = features @ params["kernel"] + params["bias"][None]
            return Outputs(logits.astype(dtype), features.astype(dtype), {}), batch_stats

        loss, evaluated = method.objective(
            in_turn(forward), (params["kernel"], params["bias"]), {}, state, batch, weight=1.0,
            key=jax.random.key(0), axis_name=None)
        return loss, (evaluated.centroids, evaluated.metrics)

    return jax.jit(jax.value_and_grad(objective, has_aux=True))


def with_extremes(test):
    """The test, which always tries these cases too."""
    for changes in EXTREMES.values():
        test = example(case=ORDINARY | changes)(test)
    return test


def assert_finite(found, case):
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        assert np.isfinite(leaf).all(), (jax.tree_util.keystr(path), case)


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=30)
@with_extremes
@given(case=CASES)
def test_losses_and_gradients_are_finite_at_the_ends(name, case):
    assert_finite(compute(name)(*problem(case)), case)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype, size", [("bfloat16", BATCH), ("float32", 1)])
@settings(max_examples=300)
@with_extremes
@given(case=CASES)
def test_losses_and_gradients_in_bfloat16_and_of_one_image_are_finite(name, dtype, size, case):
    assert_finite(compute(name, dtype)(*problem(case, size)), case)


def test_a_wrong_gradient_would_be_noticed():
    with pytest.raises(AssertionError, match="weights"):
        assert_finite({"weights": jnp.array([1.0, jnp.nan])}, ORDINARY)
