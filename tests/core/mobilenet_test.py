"""MobileNetV3 and the ImageNet stem of ResNet18: size, stages, initialisation, curvature."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from weights import random_variables

from jaxrobust import curvature, models
from jaxrobust._validate import InputError
from jaxrobust.models import common, mobilenet

SIZES = {"small": 1024, "large": 1280}


def make(name, **changes):
    return models.create_model(name, **{
        "num_classes": 3, "num_features": 5, "width": 4, "mean": (0.5,) * 3, "std": (0.25,) * 3,
        **changes})


def shapes_of(model, images):
    """Shapes of the variables and of the outputs."""
    variables = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros(images), train=False))
    return variables, jax.eval_shape(
        lambda v: model.apply(v, jnp.zeros(images), train=False), variables)


def count(tree):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("variant", "parameters"), [("small", 2_542_856), ("large", 5_483_032)])
def test_mobilenet_has_the_parameters_that_torchvision_publishes(variant, parameters):
    model = make(f"mobilenet_v3_{variant}", num_classes=1000, num_features=SIZES[variant], width=16)
    variables, _ = shapes_of(model, (1, 224, 224, 3))
    assert count(variables["params"]) == parameters


def test_resnet18_with_the_imagenet_stem_has_the_parameters_that_torchvision_publishes():
    variables, _ = shapes_of(make("resnet18_imagenet", width=64), (1, 224, 224, 3))
    params = dict(variables["params"])
    del params["features"], params["head"]
    assert count(params) == 11_689_512 - (512 * 1000 + 1000)


@pytest.mark.parametrize(("name", "blocks"), [
    ("mobilenet_v3_small",
     [(112, 112, 16), (56, 56, 16), (28, 28, 24), (14, 14, 48), (7, 7, 576)]),
    ("mobilenet_v3_large",
     [(112, 112, 16), (56, 56, 24), (28, 28, 40), (14, 14, 112), (7, 7, 960)]),
])
def test_blocks_are_the_ends_of_the_stages_of_mobilenet(name, blocks):
    _, outputs = shapes_of(make(name, width=16), (2, 224, 224, 3))
    assert {name: block.shape for name, block in outputs.blocks.items()} == {
        f"block{number}": (2, *shape) for number, shape in enumerate(blocks, 1)}


def test_blocks_of_the_imagenet_stem():
    _, outputs = shapes_of(make("resnet18_imagenet", width=64), (2, 224, 224, 3))
    assert {name: block.shape for name, block in outputs.blocks.items()} == {
        "block1": (2, 56, 56, 64), "block2": (2, 28, 28, 128), "block3": (2, 14, 14, 256),
        "block4": (2, 7, 7, 512)}


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (33, 50), (400, 500)])
def test_mobilenet_takes_images_of_any_size(size):
    _, outputs = shapes_of(make("mobilenet_v3_small"), (2, *size, 3))
    assert outputs.features.shape == (2, 5)
    assert outputs.blocks["block5"].shape[1:3] == tuple(-(-side // 32) for side in size)


def test_the_features_do_not_depend_on_the_width():
    _, outputs = shapes_of(models.MobileNetV3(num_classes=3, mean=(0.5,), std=(0.5,), width=8),
                           (2, 32, 32, 1))
    assert outputs.features.shape == (2, 1024)


# Channels of the first convolution, and of the expansion to 72 in the second bottleneck.
@pytest.mark.parametrize(("width", "first", "second"), [
    (16, 16, 72), (32, 32, 144), (12, 16, 56), (8, 8, 40), (1, 8, 8)])
def test_other_widths_round_channels_to_multiples_of_8_and_not_down_by_a_tenth(
        width, first, second):
    rows = mobilenet.bottlenecks("small", width)
    assert (rows[0].inputs, rows[1].expanded) == (first, second)


def test_channels_that_would_fall_by_more_than_a_tenth_are_rounded_up():
    # 88 * 5 / 16 = 27.5 is nearest to 24, which is less than 0.9 * 27.5.
    assert mobilenet.bottlenecks("small", 5)[2].expanded == 32


@pytest.mark.slow
def test_initialisation_is_torchvisions():
    model = make("mobilenet_v3_small", num_features=64, width=16, num_classes=50)
    layers = ("stem_conv", "bottleneck5", "bottleneck9", "last_conv", "last_bn", "features", "head")

    @jax.jit
    def initialise():
        params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False)["params"]
        return {layer: params[layer] for layer in layers}  # To compile but a part.

    params = initialise()
    checked = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        layer, kind = path[-2].key, path[-1].key
        if kind != "kernel":
            np.testing.assert_array_equal(leaf, float(kind == "scale"))
        elif leaf.size > 1000:
            expected = 0.01 if leaf.ndim == 2 else (2 / (np.prod(leaf.shape[:2]) * leaf.shape[3])
                                                    ) ** 0.5
            np.testing.assert_allclose(leaf.std(), expected, rtol=0.1, err_msg=layer)
            # Normal: a uniform one would have nothing beyond 1.74 standard deviations.
            assert np.abs(leaf).max() > 2.5 * expected
            checked += 1
    assert checked == 13


def test_training_moves_the_running_statistics_by_a_hundredth():
    model = make("mobilenet_v3_small")
    images = jax.random.uniform(jax.random.key(1), (4, 8, 8, 3))
    variables = random_variables(model, images.shape[1:])

    @jax.jit
    def step(variables):
        _, updated = model.apply(variables, images, train=True, mutable=["batch_stats"])
        stem = model.apply(variables, images, train=True, mutable=["batch_stats"],
                           capture_intermediates=lambda module, _: module.name == "stem_conv")[1]
        return updated["batch_stats"]["stem_bn"], stem["intermediates"]["stem_conv"]["__call__"][0]

    old, (new, x) = variables["batch_stats"]["stem_bn"], step(variables)
    for name, value in (("mean", x.mean((0, 1, 2))), ("var", x.var((0, 1, 2)))):
        np.testing.assert_allclose(new[name], 0.99 * old[name] + 0.01 * value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "linear"), [
    ("resnet18_imagenet", True), ("mobilenet_v3_small", False)])
def test_the_gauss_newton_gap_tells_that_mobilenet_is_not_piecewise_linear(
        name, linear, monkeypatch):
    # Quicker to compile; that it is the same is tested in convolutions_test.py.
    monkeypatch.setattr(common, "_depthwise_conv", jax.lax.conv_general_dilated)
    model = make(name)
    images = jax.random.uniform(jax.random.key(1), (2, 24, 24, 3))
    variables = random_variables(model, images.shape[1:])

    @jax.jit
    def gap(variables, images):
        def logits(images):
            return model.apply(variables, images, train=False).logits

        def loss(images):
            return optax.softmax_cross_entropy_with_integer_labels(
                logits(images), jnp.arange(len(images)))

        return curvature.gauss_newton_gap(loss, logits, images, jax.random.key(2))

    # The threshold of `python -m experiments curvature` is 0.01.
    gaps = gap(variables, images)
    assert (gaps < 1e-3).all() if linear else (gaps > 0.05).all()


@pytest.mark.parametrize(("make_model", "message"), [
    (functools.partial(models.MobileNetV3, variant="tiny"), "Unknown variant 'tiny'"),
    (functools.partial(models.ResNet18, stem="imagnet"),
     "Unknown stem 'imagnet'. Did you mean 'imagenet'"),
])
def test_unknown_kinds_name_the_known(make_model, message):
    model = make_model(num_classes=3, mean=(0.5,), std=(0.5,))
    with pytest.raises(InputError, match=message):
        shapes_of(model, (1, 8, 8, 1))
