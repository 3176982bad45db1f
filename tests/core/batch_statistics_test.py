"""Batch norm's statistics recomputed: the law of total variance, layer by layer, on any devices."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust import batch_statistics, methods, models, parallel
from jaxrobust._validate import InputError
from jaxrobust.methods import Batch
from jaxrobust.models import Outputs
from jaxrobust.parallel import make_layout


def normalised_statistics(values):
    return {"bn": {"mean": jnp.mean(values, axis=0), "var": jnp.var(values, axis=0)}}


def test_passes_together_have_the_mean_and_variance_of_all_their_inputs():
    # Far from 0, where E[x^2] - (E x)^2 loses all digits in float32.
    rng = np.random.default_rng(0)
    inputs = 1000 + rng.normal(size=(5, 8, 3)) * [1, 2, 0] + rng.normal(size=(5, 1, 3))
    statistics = batch_statistics.init_pass_statistics(
        normalised_statistics(jnp.zeros((8, 3), jnp.float32)))
    for one in inputs:
        statistics = batch_statistics.add_pass(statistics, jax.tree.map(
            lambda leaf: jnp.asarray(leaf, jnp.float32),
            {"bn": {"mean": one.mean(0), "var": one.var(0)}}))
    found = batch_statistics.combine_passes(statistics)["bn"]
    np.testing.assert_allclose(found["mean"], inputs.mean((0, 1)), rtol=1e-6)
    np.testing.assert_allclose(found["var"], inputs.var((0, 1)), rtol=1e-3)
    assert int(statistics.passes) == 5


def test_statistics_of_another_kind_are_refused():
    with pytest.raises(InputError, match="a mean and a var for each layer, got sn.sigma, sn.u"):
        batch_statistics.init_pass_statistics({"sn": {"sigma": jnp.zeros(1), "u": jnp.zeros(1)}})


class Thin(nn.Module):
    """A network of one batch norm right on the images, of which all can be said by hand."""

    momentum: float | None  # None: without batch norm
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images, *, train):
        if self.momentum is not None:
            images = nn.BatchNorm(use_running_average=not train, momentum=self.momentum,
                                  axis_name=self.axis_name, name="bn")(images)
        features = jnp.mean(images, axis=(1, 2))
        return Outputs(nn.Dense(3, name="head")(features), features, {})


def make_batch(seed, size=8):
    rng = np.random.default_rng(seed)
    clean = rng.uniform(size=(size, 4, 4, 2)).astype(np.float32)
    noisy = np.clip(clean + 0.3 * rng.normal(size=clean.shape), 0, 1).astype(np.float32)
    return Batch(clean, noisy, rng.integers(0, 3, size).astype(np.int32))


THIN = Thin(0.99)


def recomputed(method, *, model=THIN, batches=3, layout=None, one_pass=False, **options):
    layout = make_layout("jit") if layout is None else layout
    variables = {"batch_stats": {}} | model.init(
        jax.random.key(0), jnp.zeros((1, 4, 4, 2)), train=False)
    method = methods.make_method(method, one_pass=one_pass)

    def make_step(axis_name):
        step = batch_statistics.make_pass_step(model, method, axis_name=axis_name, **options)
        return lambda statistics, params, batch: (
            step(statistics, params, batch, jax.random.key(7)), ())

    step = parallel.compile_step(layout, make_step)
    statistics = parallel.replicate(
        layout, batch_statistics.init_pass_statistics(variables["batch_stats"]))
    params = parallel.replicate(layout, variables["params"])
    for seed in range(batches):
        batch = make_batch(seed)
        statistics, _ = step(
            statistics, params, parallel.place_batch(layout, batch, len(batch.labels)))
    return jax.device_get(batch_statistics.combine_passes(statistics))


class Users(nn.Module):
    """A module of a user's: with dropout, without an axis name, its softmax layer called "top"."""

    @nn.compact
    def __call__(self, images, *, train):
        x = nn.BatchNorm(use_running_average=not train, name="first")(images.reshape(-1, 32))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return Outputs(nn.Dense(3, name="top")(x), x, {})


@pytest.mark.parametrize("form", ["jit", "pmap"])
def test_a_module_with_dropout_and_without_an_axis_name(form):
    layout = make_layout(form, jax.devices()[:2])
    found = recomputed("both", model=Users(), batches=2, layout=layout, head="top")
    inputs = np.concatenate([getattr(make_batch(seed), view).reshape(-1, 32)
                             for seed in range(2) for view in ("clean", "noisy")])
    np.testing.assert_allclose(found["first"]["mean"], inputs.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found["first"]["var"], inputs.var(axis=0), rtol=1e-4)


# Of which views a method's evaluation statistics are, by hand.
VIEWS = {"normal": ("clean",), "noisy": ("noisy",), "robust_clean": ("clean",),
         "both": ("clean", "noisy"), "stability": ("clean", "noisy"),
         "robust": ("clean", "noisy"), "robust_both": ("clean", "noisy"), "center": ("clean",),
         "consistency": ("clean", "noisy"), "gradient_penalty": ("clean",), "cure": ("clean",)}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("momentum", [0.0, 0.99])
def test_the_first_layers_statistics_are_those_of_what_the_method_sees(name, momentum):
    seen = np.concatenate([getattr(make_batch(seed), view).reshape(-1, 2)
                           for seed in range(3) for view in VIEWS[name]])
    found = recomputed(name, model=Thin(momentum))["bn"]
    np.testing.assert_allclose(found["mean"], seen.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found["var"], seen.var(0), rtol=1e-5)


def test_deeper_layers_see_what_training_mode_gives_them():
    model = models.SmallCNN(num_classes=3, mean=(0.5,) * 2, std=(0.25,) * 2, num_features=4,
                            width=2)
    found = recomputed("normal", model=model)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 2)), train=False)
    inputs = []
    for seed in range(3):
        _, seen = model.apply(variables, make_batch(seed).clean, train=True,
                              capture_intermediates=lambda module, _: module.name == "conv2",
                              mutable=["batch_stats", "intermediates"])
        inputs.append(seen["intermediates"]["conv2"]["__call__"][0])
    inputs = np.asarray(inputs, np.float64).reshape(-1, 4)
    np.testing.assert_allclose(found["bn2"]["mean"], inputs.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["bn2"]["var"], inputs.var(0), rtol=1e-4)


@pytest.mark.parametrize("form", ["mesh", "pmap"])
def test_several_devices_find_the_same(form):
    model = models.SmallCNN(num_classes=3, mean=(0.5,) * 2, std=(0.25,) * 2, num_features=4,
                            width=2)
    find = functools.partial(recomputed, "robust", model=model)
    chex.assert_trees_all_close(
        find(layout=make_layout(form, jax.devices()[:2])), find(), rtol=1e-5, atol=1e-6)


def test_shares_normalised_apart_are_put_together():
    layout = make_layout("pmap", jax.devices()[:2])
    # On the images themselves it makes no difference how they are divided.
    chex.assert_trees_all_close(
        recomputed("robust", layout=layout, sync_batch_norm=False), recomputed("robust"),
        rtol=1e-5, atol=1e-6)


def test_batch_norm_is_what_it_was_after_the_passes():
    recomputed("normal")
    model, batch = Thin(0.9), make_batch(0)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 2)), train=False)
    _, updated = model.apply(variables, batch.clean, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(updated["batch_stats"]["bn"]["mean"],
                               0.1 * batch.clean.mean((0, 1, 2)), rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"sync_batch_norm": False}])
def test_a_network_without_batch_norm_has_no_statistics(options):
    layout = make_layout("pmap", jax.devices()[:2])
    assert recomputed("robust", model=Thin(None), layout=layout, **options) == {}
