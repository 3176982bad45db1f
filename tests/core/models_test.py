"""The models: shapes, initialisation, normalisation, modes."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import random_variables

from jaxrobust import models
from jaxrobust._validate import InputError

SMALL = {"num_classes": 10, "num_features": 7, "width": 4}


def make(name, channels=3, **changes):
    return models.create_model(
        name, mean=(0.5,) * channels, std=(0.25,) * channels, **{**SMALL, **changes})


def initialise(model, images):
    return jax.jit(model.init, static_argnames="train")(jax.random.key(0), images, train=False)


@functools.partial(jax.jit, static_argnames=("model", "train"))
def apply(model, variables, images, *, train=False):
    return model.apply(variables, images, train=train,
                       mutable=["batch_stats"] if train else False)


# The same shape everywhere: each model is compiled once.
SHAPE = (4, 16, 16, 3)
FAMILIES = ("small_cnn", "resnet18", "mobilenet_v3_small")  # The others differ in sizes.


def draw(name):
    """A model, random variables and random images."""
    model = make(name)
    return (model, random_variables(model, SHAPE[1:]),
            jax.random.uniform(jax.random.key(1), SHAPE))


@pytest.mark.parametrize("name", models.MODELS)
def test_outputs_are_logits_features_and_blocks(name):
    model, variables, images = draw(name)
    outputs = apply(model, variables, images)
    kernel, bias = models.head_parameters(variables["params"])
    chex.assert_shape(outputs.logits, (4, 10))
    chex.assert_shape(outputs.features, (4, 7))
    chex.assert_trees_all_close(outputs.logits, outputs.features @ kernel + bias[None],
                                rtol=1e-5, atol=1e-5)
    assert all(block.ndim == 4 for block in outputs.blocks.values())


def test_resnet18_has_the_blocks_and_parameters_of_appendix_h1():
    images = jnp.zeros((1, 32, 32, 3))
    model = make("resnet18", num_features=128, width=64)
    shapes = jax.eval_shape(lambda: initialise(model, images))
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"]))
    # 11,173,962 of the usual CIFAR ResNet18, less its 512 x 10 head, plus 512 x 128 and 128 x 10.
    assert count == 11_173_962 - (512 * 10 + 10) + (512 * 128 + 128) + (128 * 10 + 10)
    outputs = jax.eval_shape(lambda v: model.apply(v, images, train=False), shapes)
    assert [outputs.blocks[f"block{i}"].shape[1:] for i in range(1, 5)] == [
        (32, 32, 64), (16, 16, 128), (8, 8, 256), (4, 4, 512)]


@pytest.mark.parametrize("name", ["resnet18", "resnet18_imagenet", "small_cnn"])
def test_initialisation_is_pytorchs_uniform(name):
    params = initialise(make(name, width=8, num_features=64), jnp.zeros((1, 16, 16, 3)))["params"]
    checked = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [key.key for key in path]
        if names[-1] == "kernel":
            bound = np.prod(leaf.shape[:-1]) ** -0.5
            assert np.abs(leaf).max() <= bound
            if leaf.size > 500:
                np.testing.assert_allclose(leaf.std(), bound / 3**0.5, rtol=0.1)
                checked += 1
    kernel, bias = models.head_parameters(params)
    assert 0 < np.abs(bias).max() <= kernel.shape[0] ** -0.5
    assert checked >= 2


def test_images_are_normalised_inside():
    images = jax.random.uniform(jax.random.key(1), (2, 8, 8, 3))
    inside = models.SmallCNN(**SMALL, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    outside = models.SmallCNN(**SMALL, mean=(0.0,) * 3, std=(1.0,) * 3)
    variables = initialise(inside, images)
    normalised = (images - np.array([0.1, 0.2, 0.3])[None, None, None].astype(np.float32)
                  ) / np.array([0.5, 0.25, 2.0])[None, None, None].astype(np.float32)
    chex.assert_trees_all_close(
        inside.apply(variables, images, train=False).logits,
        outside.apply(variables, normalised, train=False).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_in_evaluation_an_image_does_not_see_its_batch(name):
    model, variables, images = draw(name)
    others = images.at[1:].set(1 - images[1:])
    logits, changed = (apply(model, variables, x).logits for x in (images, others))
    chex.assert_trees_all_close(logits[:1], changed[:1], rtol=1e-6, atol=1e-6)
    assert np.abs(logits[1:] - changed[1:]).max() > 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_training_normalises_by_the_batch_and_moves_the_running_statistics(name):
    model, variables, images = draw(name)
    outputs, updated = apply(model, variables, images, train=True)
    moved = jax.tree.map(lambda new, old: not np.allclose(new, old),
                         updated["batch_stats"], variables["batch_stats"])
    assert all(jax.tree.leaves(moved))
    assert not np.allclose(outputs.logits, apply(model, variables, images).logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_keeps_parameters_features_and_logits_in_float32(name):
    model, variables, images = draw(name)
    half = model.clone(dtype=jnp.bfloat16)
    # Flax's batch norm itself mixes its float32 statistics with the bfloat16 input.
    with jax.numpy_dtype_promotion("standard"):
        shapes = jax.eval_shape(
            lambda: half.init(jax.random.key(0), images, train=False))
        outputs = apply(half, variables, images)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
    assert outputs.logits.dtype == outputs.features.dtype == jnp.float32
    assert all(block.dtype == jnp.bfloat16 for block in outputs.blocks.values())
    full = apply(model, variables, images)
    error = np.linalg.norm(outputs.logits - full.logits) / np.linalg.norm(full.logits)
    assert 0 < error < 0.05


def test_the_feature_layer_of_resnet18_is_where_it_is_asked_to_be():
    outputs = {}
    for layer, size in (("dense", 7), ("dense_relu", 7), ("pooled", 32)):
        model = make("resnet18", feature_layer=layer, num_features=size)
        variables = random_variables(model, SHAPE[1:])
        images = jax.random.uniform(jax.random.key(1), SHAPE)
        outputs[layer] = apply(model, variables, images)
        assert ("features" in variables["params"]) == (layer != "pooled")
        kernel, bias = models.head_parameters(variables["params"])
        chex.assert_shape(outputs[layer].features, (4, size))
        chex.assert_trees_all_close(outputs[layer].logits,
                                    outputs[layer].features @ kernel + bias[None], rtol=1e-5,
                                    atol=1e-5)
    # The same weights throughout, but for the last layer of "pooled".
    np.testing.assert_allclose(outputs["dense_relu"].features,
                               np.maximum(outputs["dense"].features, 0), rtol=1e-6)
    assert np.any(outputs["dense"].features < 0)
    np.testing.assert_allclose(
        outputs["pooled"].features,
        np.maximum(np.mean(outputs["pooled"].blocks["block4"], axis=(1, 2)), 0), rtol=1e-5,
        atol=1e-6)


def test_a_feature_layer_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="Unknown feature_layer .* 'pool'. Did you mean 'pooled'"):
        make("resnet18", feature_layer="pool")
    with pytest.raises(InputError, match="Unknown feature_layer of small_cnn 'pooled'"):
        make("small_cnn", feature_layer="pooled")
    with pytest.raises(InputError, match="num_features=7 to be 32, 8 times the width"):
        jax.eval_shape(functools.partial(make("resnet18", feature_layer="pooled").init,
                                         train=False), jax.random.key(0), jnp.zeros(SHAPE))


@pytest.mark.parametrize(("images", "changes", "message"), [
    (jnp.zeros(SHAPE, jnp.uint8), {}, "Expected images of a floating dtype, in [0, 1], got uint8"),
    (jnp.zeros(SHAPE, jnp.int32), {}, "Expected images of a floating dtype, in [0, 1], got int32"),
    (jnp.zeros((4, 16, 16, 1)), {}, "Expected mean of shape [channels] with channels=1, got (3,)."),
    (jnp.zeros(SHAPE), {"std": (0.5,)}, "Expected std of shape [channels] with channels=3"),
    (jnp.zeros(SHAPE), {"std": (0.5, 0.0, 0.5)}, "Expected std=0.0 in (0, inf)."),
    (jnp.zeros(SHAPE[1:]), {}, "Expected images of shape [B, H, W, channels], got (16, 16, 3)."),
    (jnp.zeros((0, *SHAPE[1:])), {}, "Expected images of shape [B, H, W, channels], no size 0")],
    ids=["uint8", "int32", "one_channel", "one_std", "std_0", "one_image", "no_image"])
@pytest.mark.parametrize("name", ["small_cnn", "resnet18", "mobilenet_v3_small"])
def test_images_that_do_not_fit_are_refused_at_the_door(name, images, changes, message):
    model = make(name).clone(**changes)
    with pytest.raises(InputError, match=re.escape(message)):
        jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)


@pytest.mark.parametrize(("changes", "message"), [
    ({"std": (0.5, -1.0, 0.5)}, "Expected std=-1.0 in (0, inf)."),
    ({"std": (0.5,)}, "Expected std of shape [channels] with channels=3, got (1,)."),
    ({"mean": 0.5}, "Expected mean of shape [channels], got ()."),
    ({"num_classes": 3.0}, "Expected num_classes=3.0 to be an integer >= 2."),
    ({"width": 0.5}, "Expected width=0.5 to be an integer >= 1.")])
def test_a_model_that_cannot_be_is_refused_when_it_is_made(changes, message):
    with pytest.raises(InputError, match=re.escape(message)):
        models.create_model("small_cnn", **{
            **SMALL, "mean": (0.5,) * 3, "std": (0.25,) * 3, **changes})


def test_sizes_of_numpy_are_taken():
    model = make("small_cnn", num_classes=np.int64(5), width=np.uint8(4))
    assert model == make("small_cnn", num_classes=5, width=4)


def test_the_head_is_the_layer_of_that_name():
    layer = {"kernel": np.zeros((3, 2)), "bias": np.ones(2)}
    params = {"top": {"out": layer}, "norm": {"scale": np.ones(3), "bias": np.ones(3)},
              "conv": {"kernel": np.zeros((3, 3, 1, 4)), "bias": np.zeros(4)},
              "bare": {"kernel": np.zeros((3, 2))}}
    assert models.head_parameters(params, "top/out") == (layer["kernel"], layer["bias"])
    with pytest.raises(InputError, match=re.escape(
            "Unknown head 'bare'. Expected one of: top/out.")):
        models.head_parameters(params, "bare")


def test_unknown_model_names_the_nearest():
    with pytest.raises(InputError, match="Unknown model 'resnet81'. Did you mean 'resnet18'"):
        make("resnet81")
