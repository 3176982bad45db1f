"""Clean and noisy images in two passes: the same result from one pass of all, batch by batch."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust import methods, models, training
from jaxrobust._validate import InputError
from jaxrobust.losses import RobustLossConfig
from jaxrobust.methods import Batch
from jaxrobust.models import Outputs
from jaxrobust.models.common import batch_norm

CLASSES = 3
LABELS = np.array([0, 2, -1, 1, 1, 0, -1, 2], np.int32)


class Users(nn.Module):
    """A module of a user's around a network: it does not say that it can treat batches apart."""

    network: nn.Module

    @nn.compact
    def __call__(self, images, *, train):
        return self.network(images, train=train)


def make_batch(size, dtype):
    rng = np.random.default_rng(0)
    clean = rng.uniform(size=(8, size, size, 2)).astype(dtype)
    return Batch(clean, np.clip(0.2 + clean + 0.1 * rng.normal(size=clean.shape), 0, 1)
                 .astype(dtype), LABELS)


def problem(model, method, dtype):
    """The model, the method and a state whose running statistics are not those of the start."""
    network = models.create_model(model, num_classes=CLASSES, num_features=8, width=4,
                                  mean=(0.5,) * 2, std=(0.25,) * 2, dtype=jnp.dtype(dtype))
    optimizer = training.sgd(0.1)
    state = jax.jit(lambda key: training.create_train_state(
        network, optimizer, key, jnp.zeros((1, 8, 8, 2), jnp.float32)))(jax.random.key(0))
    rng = np.random.default_rng(1)

    def drawn(leaf):
        return (0.5 + rng.uniform(size=leaf.shape)).astype(dtype)

    state = state.replace(params=jax.tree.map(lambda leaf: np.asarray(leaf, dtype), state.params),
                          batch_stats=jax.tree.map(drawn, state.batch_stats),
                          centroids=state.centroids._replace(mean=drawn(state.centroids.mean)))
    return network, methods.make_method(method, robust=RobustLossConfig(delta_d=1.0)), state


def evaluate(network, method, state, batch, **options):
    """Loss, gradients, batch statistics, centroids and metrics."""
    objective = training.make_objective(network, method, **options)
    (loss, evaluated), gradients = jax.jit(jax.value_and_grad(objective, has_aux=True))(
        state.params, state, batch)
    return loss, gradients, *evaluated


@pytest.mark.parametrize(("model", "method", "dtype", "tolerance"), [
    ("small_cnn", "robust", "float64", 1e-12),
    *(pytest.param(*values, marks=pytest.mark.slow) for values in (
        ("small_cnn", "robust", "float32", 1e-6),
        *(("small_cnn", method, "float64", 1e-12) for method in ("stability", "consistency")),
        *((model, "robust", "float64", 1e-12) for model in ("resnet18", "mobilenet_v3_small"))))])
def test_one_pass_batch_by_batch_is_two_passes(model, method, dtype, tolerance):
    # Flax's batch norm asks for the common type of its input and float32.
    with jax.enable_x64(dtype == "float64"), jax.numpy_dtype_promotion("standard"):
        network, method, state = problem(model, method, dtype)
        batch = make_batch(8 if model == "small_cnn" else 16, dtype)
        found = evaluate(network, method, state, batch)
        within = state.replace(params={"network": state.params},
                               batch_stats={"network": state.batch_stats})
        loss, gradients, batch_stats, *others = evaluate(
            Users(network), method, within, batch, head="network/head")
    chex.assert_trees_all_close(
        found, (loss, gradients["network"], batch_stats["network"], *others),
        rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet18", "mobilenet_v3_small"])
def test_all_batch_norms_of_a_model_see_batch_by_batch(model):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        network, _, state = problem(model, "robust", "float64")
        batch = make_batch(16, "float64")

        @functools.partial(jax.jit, static_argnums=0)
        def passed(network, batch_stats, images):
            outputs, updated = network.apply({"params": state.params, "batch_stats": batch_stats},
                                             images, train=True, mutable=["batch_stats"])
            return outputs, updated["batch_stats"]

        clean, batch_stats = passed(network, state.batch_stats, batch.clean)
        noisy, batch_stats = passed(network, batch_stats, batch.noisy)
        expected = jax.tree.map(lambda *views: jnp.concatenate(views), clean, noisy), batch_stats
        found = passed(network.clone(batch_groups=2), state.batch_stats,
                       np.concatenate([batch.clean, batch.noisy]))
    chex.assert_trees_all_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_models_make_one_pass_and_the_modules_of_users_two():
    network, method, state = problem("small_cnn", "robust", "float32")
    batch = make_batch(8, np.float32)

    def convolutions(network, method, state, **options):
        objective = training.make_objective(network, method, **options)
        return str(jax.make_jaxpr(objective)(state.params, state, batch)).count(
            "conv_general_dilated[")

    assert convolutions(network, method, state) == 2
    assert convolutions(network, methods.make_method("both"), state) == 2
    within = state.replace(params={"network": state.params},
                           batch_stats={"network": state.batch_stats})
    assert convolutions(Users(network), method, within, head="network/head") == 4


# --- batch norm -------------------------------------------------------------------------------


class Norm(nn.Module):

    batch_groups: int = 1
    dtype: str = "float32"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, *, train=True):
        return batch_norm(x, train=train, axis_name=self.axis_name, dtype=jnp.dtype(self.dtype),
                          batch_groups=self.batch_groups, momentum=0.7, name="bn")


def norm_variables():
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 + rng.uniform(size=leaf.shape), jnp.float32),
                        Norm().init(jax.random.key(0), jnp.zeros((1, 5))))


def normalised(norm, variables, x):
    return norm.apply(variables, x, mutable=["batch_stats"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(12, 5), (12, 3, 2, 5)])
def test_batch_norm_of_groups_is_that_of_each_alone_in_turn(shape, dtype):
    x = jnp.asarray(3 + np.random.default_rng(3).normal(size=shape), dtype)
    x *= jnp.arange(1, 13, dtype=dtype).reshape(-1, *(1,) * (len(shape) - 1))
    variables, expected = norm_variables(), []
    with jax.numpy_dtype_promotion("standard"):
        statistics = variables
        for part in jnp.split(x, 3):
            y, updated = normalised(Norm(dtype=dtype), statistics, part)
            statistics = statistics | updated
            expected.append(y)
    found, updated = normalised(Norm(3, dtype), variables, x)
    assert found.dtype == dtype
    # bfloat16 has 8 bits, and rounds the last digits of float32 to either side.
    chex.assert_trees_all_close(found, jnp.concatenate(expected),
                                rtol=2**-7 if dtype == "bfloat16" else 1e-5, atol=1e-5)
    chex.assert_trees_all_close(updated["batch_stats"], statistics["batch_stats"], rtol=1e-6)


def test_batch_norm_of_groups_shares_the_statistics_of_each_over_devices():
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.normal(size=(2, 8, 3, 5)) + [[[[0.0]]], [[[4.0]]]], jnp.float32)
    variables = norm_variables()
    whole, expected = normalised(Norm(2), variables, x.reshape(16, 3, 5))
    # A device has a half of each of the two batches.
    shares = x.reshape(2, 2, 4, 3, 5).swapaxes(0, 1).reshape(2, 8, 3, 5)
    found, updated = jax.pmap(functools.partial(normalised, Norm(2, axis_name="devices")),
                              "devices", in_axes=(None, 0))(variables, shares)
    found = found.reshape(2, 2, 4, 3, 5).swapaxes(0, 1).reshape(16, 3, 5)
    chex.assert_trees_all_close(found, whole, rtol=1e-5, atol=1e-5)
    for device in (0, 1):
        chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[device], updated),  # noqa: B023
                                    expected, rtol=1e-6)


def test_groups_make_no_difference_in_evaluation():
    x = jnp.asarray(np.random.default_rng(5).normal(size=(7, 5)), jnp.float32)
    variables = norm_variables()
    np.testing.assert_array_equal(*(
        Norm(groups).apply(variables, x, train=False) for groups in (1, 2)))


def test_groups_that_do_not_divide_the_images_are_refused():
    with pytest.raises(InputError, match="Expected batch_groups=2 to divide the 7 images"):
        normalised(Norm(2), norm_variables(), jnp.zeros((7, 5)))
    with pytest.raises(InputError, match="Expected batch_groups=0 to be an integer >= 1"):
        normalised(Norm(0), norm_variables(), jnp.zeros((7, 5)))


# --- dropout ----------------------------------------------------------------------------------


def test_dropout_in_one_pass_draws_for_every_image_of_both_views():
    seen = []

    class Dropped(nn.Module):

        batch_groups: int = 1

        @nn.compact
        def __call__(self, images, *, train):
            features = nn.Dropout(0.5, deterministic=not train)(images.reshape(len(images), -1))
            if train:
                assert self.batch_groups == 2
                jax.debug.callback(lambda x: seen.append(np.asarray(x)), features, ordered=True)
            return Outputs(nn.Dense(CLASSES, name="head")(features), features, {})

    images, optimizer = jnp.ones((4, 8, 8, 1)), training.sgd(0.1)
    state = jax.jit(lambda key: training.create_train_state(Dropped(), optimizer, key, images))(
        jax.random.key(0))
    step = jax.jit(training.make_train_step(
        Dropped(), methods.make_method("stability"), optimizer))
    step(state, Batch(images, images, jnp.zeros(4, jnp.int32)))
    jax.effects_barrier()
    (both,) = seen
    assert both.shape == (8, 64) and {0, 2} == set(np.unique(both))
    assert 0.3 < np.mean(both[:4] == both[4:]) < 0.7  # Of 256 independent draws, a half.
