"""Weights from and to PyTorch, and the same networks in PyTorch on them."""

import functools
import os
import pickle
import re
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import random_variables

from jaxrobust import models
from jaxrobust._validate import InputError
from jaxrobust.models import common, pytorch

IMAGES = {"resnet18": (12, 10, 3), "resnet18_imagenet": (26, 20, 3),
          "mobilenet_v3_small": (18, 22, 3), "mobilenet_v3_large": (18, 22, 3)}
CLASSES, FEATURES, WIDTH = 4, 6, 4


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def make(name, **changes):
    return models.create_model(name, **{
        "num_classes": CLASSES, "num_features": FEATURES, "width": WIDTH,
        "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3), **changes})


@functools.cache
def variables_of(name, *, seed=0, dtype=np.float32):
    return random_variables(make(name), IMAGES[name], seed=seed, dtype=dtype)


@functools.partial(jax.jit, static_argnames="model")
def evaluate(model, variables, images):
    return model.apply(variables, images, train=False)


def peer_of(name, *, num_features=FEATURES):
    """The network in PyTorch, which takes images that are normalised."""
    import torch_models

    sizes = {"num_features": num_features, "num_classes": CLASSES}
    if name.startswith("mobilenet"):
        return torch_models.MobileNetV3(
            name.removeprefix("mobilenet_v3_"), width_mult=WIDTH / 16, **sizes)
    return torch_models.ResNet18(
        "imagenet" if name == "resnet18_imagenet" else "cifar", width=WIDTH, **sizes)


def to_torch(torch, name, images):
    """Normalised, and with the channels first."""
    model = make(name)
    normalised = (images - np.array(model.mean)) / np.array(model.std)
    return torch.from_numpy(np.moveaxis(normalised, -1, 1).astype(images.dtype))


def load(torch, module, state_dict):
    module.load_state_dict({name: torch.from_numpy(np.array(value, order="C"))
                            for name, value in state_dict.items()})
    return module


@pytest.mark.parametrize("name", IMAGES)
def test_pytorch_computes_the_same_in_evaluation(name, torch, enable_x64):
    model = make(name).clone(dtype=jnp.float64)
    variables = variables_of(name, dtype=np.float64)
    images = np.random.default_rng(1).uniform(size=(3, *IMAGES[name]))
    with jax.numpy_dtype_promotion("standard"):  # Flax's batch norm needs it for float64.
        ours = evaluate(model, variables, images)
    module = load(torch, peer_of(name).double(), pytorch.to_torch_state_dict(model, variables))
    with torch.no_grad():
        logits, features = module.eval()(to_torch(torch, name, images))
    np.testing.assert_allclose(ours.logits, logits, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(ours.features, features, rtol=1e-9, atol=1e-10)
    assert np.ptp(ours.logits, axis=0).max() > 1e-3  # The images matter.


@pytest.mark.parametrize("name", ["resnet18", "resnet18_imagenet", "mobilenet_v3_small"])
def test_pytorch_computes_the_same_values_statistics_and_gradients_in_training(
        name, torch, enable_x64, monkeypatch):
    # Quicker to compile; that it is the same is tested beside the models.
    monkeypatch.setattr(common, "_depthwise_conv", jax.lax.conv_general_dilated)
    model = make(name).clone(dtype=jnp.float64)
    variables = variables_of(name, dtype=np.float64)
    generator = np.random.default_rng(1)
    images = generator.uniform(size=(3, *IMAGES[name]))
    weights = generator.normal(size=(3, CLASSES))

    @jax.jit
    def ours(variables, images):
        def objective(params, images):
            outputs, updated = model.apply({**variables, "params": params}, images, train=True,
                                           mutable=["batch_stats"])
            return jnp.sum(weights * outputs.logits), (outputs, updated["batch_stats"])

        return jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(
            variables["params"], images)

    with jax.numpy_dtype_promotion("standard"):
        (_, (train, statistics)), (by_params, by_images) = ours(variables, images)
    state_dict = pytorch.to_torch_state_dict(model, variables)
    module = load(torch, peer_of(name).double(), state_dict).train()
    counts = {}
    for layer, norm in module.named_modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.register_forward_hook(lambda _, arguments, __, layer=layer: counts.update(
                {layer: arguments[0].numel() / arguments[0].shape[1]}))
    inputs = to_torch(torch, name, images).requires_grad_()
    logits, features = module(inputs)
    np.testing.assert_allclose(train.logits, logits.detach(), rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(train.features, features.detach(), rtol=1e-9, atol=1e-10)
    (torch.from_numpy(weights) * logits).sum().backward()
    # The derivative of PyTorch's hard-sigmoid is 1/6 in single precision.
    tolerance = 1e-7 if name.startswith("mobilenet") else 1e-10

    largest = max(parameter.grad.abs().max() for parameter in module.parameters())

    def assert_close(ours, theirs, name):
        # Of some that come before another batch norm, all digits are rounding: they are 0.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=max(
            tolerance * np.abs(theirs).max(), 1e-12 * largest), err_msg=name)

    gradients = pytorch.to_torch_state_dict(
        model, {"params": by_params, "batch_stats": statistics})
    for parameter, theirs in module.named_parameters():
        assert_close(gradients[parameter], theirs.grad.numpy(), parameter)
    assert_close(by_images, np.moveaxis(inputs.grad.numpy(), 1, -1) / np.array(model.std), "images")

    kept = 0.99 if name.startswith("mobilenet") else 0.9
    for layer, size in counts.items():
        mean, var = (getattr(module.get_submodule(layer), f"running_{kind}").numpy()
                     for kind in ("mean", "var"))
        np.testing.assert_allclose(gradients[f"{layer}.running_mean"], mean, rtol=1e-9, atol=1e-10)
        # PyTorch adds the unbiased variance of the batch, we the biased one.
        rest = kept * state_dict[f"{layer}.running_var"]
        np.testing.assert_allclose(gradients[f"{layer}.running_var"],
                                   rest + (var - rest) * (size - 1) / size, rtol=1e-9)


@pytest.mark.parametrize("suffix", pytorch.SUFFIXES)
def test_a_file_from_pytorch_gives_the_same_logits_in_single_precision(suffix, torch, tmp_path):
    name = "mobilenet_v3_small"
    module = load(torch, peer_of(name),
                  pytorch.to_torch_state_dict(make(name), variables_of(name))).eval()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        import safetensors.torch

        safetensors.torch.save_file(module.state_dict(), path)
    else:
        torch.save(module.state_dict(), path)
    model = make(name)
    loaded, replaced = pytorch.load_torch_weights(
        model, variables_of(name, seed=1), pytorch.read_state_dict(path))
    images = np.random.default_rng(1).uniform(size=(3, *IMAGES[name])).astype(np.float32)
    with torch.no_grad():
        logits, features = module(to_torch(torch, name, images))
    outputs = evaluate(model, loaded, images)
    assert replaced == ()
    np.testing.assert_allclose(outputs.logits, logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(outputs.features, features, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("suffix", pytorch.SUFFIXES)
@pytest.mark.parametrize("name", IMAGES)
def test_a_round_trip_changes_no_bit(name, suffix, tmp_path):
    if suffix != ".safetensors":
        pytest.importorskip("torch")
    model, variables = make(name), variables_of(name)
    path = tmp_path / f"weights{suffix}"
    pytorch.write_state_dict(path, pytorch.to_torch_state_dict(model, variables))
    loaded, replaced = pytorch.load_torch_weights(
        model, variables_of(name, seed=1), pytorch.read_state_dict(path))
    assert replaced == ()
    chex.assert_trees_all_equal(loaded, variables, strict=True)


# Entries of torchvision's own state dicts, and how many there are.
@pytest.mark.parametrize(("name", "size", "width", "total", "entries"), [
    ("mobilenet_v3_small", 1024, 16, 244, """
        features.0.0.weight 16 3 3 3
        features.0.1.num_batches_tracked
        features.1.block.0.0.weight 16 1 3 3
        features.1.block.1.fc1.weight 8 16 1 1
        features.1.block.1.fc2.bias 16
        features.2.block.2.1.running_var 24
        features.4.block.1.0.weight 96 1 5 5
        features.11.block.3.0.weight 96 576 1 1
        features.12.0.weight 576 96 1 1
        classifier.0.weight 1024 576
        classifier.3.weight 1000 1024
        classifier.3.bias 1000"""),
    ("mobilenet_v3_large", 1280, 16, 312, """
        features.1.block.1.0.weight 16 16 1 1
        features.4.block.2.fc1.weight 24 72 1 1
        features.15.block.2.fc2.weight 960 240 1 1
        features.16.1.weight 960
        classifier.0.weight 1280 960
        classifier.3.weight 1000 1280"""),
    ("resnet18_imagenet", 128, 64, 122 + 2, """
        conv1.weight 64 3 7 7
        bn1.running_mean 64
        layer1.1.bn2.bias 64
        layer2.0.downsample.0.weight 128 64 1 1
        layer4.0.downsample.1.running_var 512
        layer4.1.conv2.weight 512 512 3 3
        fc_layer.1.weight 128 512"""),
    ("resnet18", 128, 64, 122 + 2, """
        conv1.weight 64 3 3 3
        layer3.0.shortcut.0.weight 256 128 1 1
        layer3.0.shortcut.1.weight 256
        fc_layer.1.bias 128
        fc_layer.2.weight 1000 128"""),
])
def test_names_and_shapes_are_pytorchs(name, size, width, total, entries):
    model = make(name, num_classes=1000, num_features=size, width=width)
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False))
    state_dict = pytorch.to_torch_state_dict(
        model, jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes))
    for name, *shape in map(str.split, entries.strip().splitlines()):
        assert state_dict[name].shape == tuple(map(int, shape)), name
    assert len(state_dict) == total


def without(state_dict, *prefixes):
    return {name: value for name, value in state_dict.items() if not name.startswith(prefixes)}


@pytest.fixture(scope="module")
def small():
    """Narrow weights of each model, as PyTorch's."""
    return {name: pytorch.to_torch_state_dict(make(name), variables_of(name)) for name in IMAGES}


def assert_only_replaced(name, state_dict, expected, **changes):
    model = make(name, **changes)
    before = random_variables(model, IMAGES[name], seed=1)
    after, replaced = pytorch.load_torch_weights(model, before, state_dict)
    assert replaced == expected
    for layer, leaves in after["params"].items():
        same = jax.tree.map(np.array_equal, leaves, before["params"][layer])
        assert set(jax.tree.leaves(same)) == {layer in expected}, layer
    chex.assert_trees_all_equal(after["batch_stats"], variables_of(name)["batch_stats"])


@pytest.mark.parametrize("name", IMAGES)
def test_with_other_classes_the_softmax_layer_stays(name, small):
    assert_only_replaced(name, small[name], ("head",), num_classes=CLASSES + 1)


@pytest.mark.parametrize("name", IMAGES)
def test_without_layers_at_the_end_both_stay(name, small):
    assert_only_replaced(name, without(small[name], "classifier.", "fc_layer."),
                         ("features", "head"))


def test_without_a_softmax_layer_it_stays(small):
    assert_only_replaced("resnet18", without(small["resnet18"], "fc_layer.2."), ("head",))


def test_of_torchvisions_resnet18_all_but_its_softmax_layer_is_taken(small):
    # Of the very shape of our softmax layer, yet of other features.
    backbone = without(small["resnet18_imagenet"], "fc_layer.")
    classifier = {"fc.weight": np.ones((CLASSES, 8 * WIDTH), np.float32),
                  "fc.bias": np.ones(CLASSES, np.float32)}
    assert_only_replaced("resnet18_imagenet", backbone | classifier, ("features", "head"),
                         num_features=8 * WIDTH)
    # Without a feature layer of its own it is the same network.
    assert_only_replaced("resnet18_imagenet", backbone | classifier, (),
                         feature_layer="pooled", num_features=8 * WIDTH)


def test_torchvisions_resnet18_takes_all_but_the_layers_at_the_end(small, torch):
    module = peer_of("resnet18_imagenet", num_features=None)
    missing, unexpected = module.load_state_dict(
        {name: torch.from_numpy(np.array(value))
         for name, value in small["resnet18_imagenet"].items()}, strict=False)
    assert missing == ["fc.weight", "fc.bias"]
    assert all(name.startswith("fc_layer.") for name in unexpected)


def test_shapes_alone_do_where_everything_is_in_the_file(small):
    model = make("resnet18")
    shapes = jax.eval_shape(lambda: model.init(
        jax.random.key(0), jnp.zeros((1, *IMAGES["resnet18"])), train=False))
    loaded, _ = pytorch.load_torch_weights(model, shapes, small["resnet18"])
    chex.assert_trees_all_equal(loaded, variables_of("resnet18"), strict=True)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_weights_take_the_dtype_of_the_model(dtype, small):
    state_dict = {name: value.astype(dtype) if value.ndim else value
                  for name, value in small["resnet18"].items()}
    loaded, _ = pytorch.load_torch_weights(
        make("resnet18"), variables_of("resnet18"), state_dict)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(
        loaded["params"]["stem_bn"]["scale"], state_dict["bn1.weight"].astype(np.float32))


def changed(state_dict, **values):
    return state_dict | {name.replace("__", "."): value for name, value in values.items()}


@pytest.mark.parametrize(("name", "change", "message"), [
    ("resnet18", lambda s: without(s, "layer3.0.bn1.weight"),
     "Expected the weights of a ResNet18 (stem cifar, width=4, 3 channels), got weights of which "
     "layer3.0.bn1.weight is missing."),
    ("resnet18", lambda s: without(s, "layer3.0."),
     "got weights of which layer3.0.conv1.weight is missing; 15 names in all do not fit."),
    ("resnet18", lambda s: changed(s, layer5__weight=np.zeros(3)),
     "got weights of which layer5.weight is unknown."),
    ("mobilenet_v3_small", lambda s: changed(s, features__0__0__weight=np.zeros((8, 1, 3, 3))),
     "Expected the weights of a MobileNetV3 (small, width=4, 3 channels), got weights of which "
     "features.0.0.weight is of shape (8, 1, 3, 3), the model's of (8, 3, 3, 3)."),
    ("resnet18", lambda s: changed(s, bn1__weight=np.zeros(4, np.int8)),
     "got weights of which bn1.weight is of dtype int8."),
    ("mobilenet_v3_small", lambda s: without(s, "classifier.3.bias"),
     "got weights of which classifier.3.bias is missing."),
    ("mobilenet_v3_small", lambda s: without(s, "classifier.0."),
     "got weights of which classifier.0.weight is missing; 2 names in all do not fit."),
    ("resnet18", lambda s: {}, "got weights of which conv1.weight is missing; 100 names in all"),
])
def test_every_name_and_shape_must_be_the_models(name, change, message, small):
    with pytest.raises(InputError, match=re.escape(message)) as error:
        pytorch.load_torch_weights(make(name), variables_of(name), change(small[name]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_with_their_number(wrong, small, tmp_path):
    weights = np.array(small["resnet18"]["conv1.weight"])
    weights[1, 0, :2, 2] = wrong
    state_dict = changed(small["resnet18"], conv1__weight=weights)
    path = tmp_path / "weights.safetensors"
    pytorch.write_state_dict(path, state_dict)
    for call, what in ((lambda: pytorch.read_state_dict(path), f"weights in {path}"),
                       (lambda: pytorch.load_torch_weights(
                           make("resnet18"), variables_of("resnet18"), state_dict), "weights")):
        with pytest.raises(InputError, match=re.escape(
                f"Expected finite {what}, got 2 that are NaN or infinite")):
            call()


@pytest.mark.parametrize(("name", "weights", "message"), [
    ("resnet18", "resnet18_imagenet", "which conv1.weight is of shape (4, 3, 7, 7), the model's"),
    ("resnet18_imagenet", "resnet18", "which conv1.weight is of shape (4, 3, 3, 3), the model's"),
    ("mobilenet_v3_small", "mobilenet_v3_large", "is missing; "),
    ("resnet18", "mobilenet_v3_small", "which conv1.weight is missing; ")])
def test_the_weights_of_another_network_do_not_fit(name, weights, message, small):
    with pytest.raises(InputError, match=re.escape(message)):
        pytorch.load_torch_weights(make(name), variables_of(name), small[weights])


@pytest.mark.parametrize(("name", "layer"), [
    ("resnet18", "fc_layer.1"), ("mobilenet_v3_large", "classifier.0")])
@pytest.mark.parametrize("num_classes", [CLASSES, 9])
def test_a_feature_layer_of_another_size_says_which(name, layer, num_classes, small):
    model = make(name, num_features=7, num_classes=num_classes)
    with pytest.raises(InputError, match=re.escape(
            f"Expected num_features=7 to be 6, as in the feature layer {layer} of the weights.")):
        pytorch.load_torch_weights(
            model, random_variables(model, IMAGES[name]), small[name])


def test_other_models_have_no_known_pytorch_weights():
    model = make("small_cnn")
    variables = random_variables(model, (8, 8, 3))
    for call in (lambda: pytorch.to_torch_state_dict(model, variables),
                 lambda: pytorch.load_torch_weights(model, variables, {})):
        with pytest.raises(InputError, match="Expected a ResNet18 or a MobileNetV3, .*SmallCNN"):
            call()


@pytest.mark.parametrize("nested", ["state_dict", "model", "net", None])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_what_wraps_a_state_dict_is_taken_off(nested, prefix, torch, tmp_path):
    state_dict = {f"{prefix}a.weight": torch.arange(3.0),
                  f"{prefix}b": torch.nn.Parameter(torch.ones(2))}
    path = tmp_path / "weights.pth"
    torch.save({nested: state_dict, "epoch": 3, "acc": 0.5} if nested else state_dict, path)
    read = pytorch.read_state_dict(path)
    chex.assert_trees_all_equal(
        read, {"a.weight": np.arange(3, dtype=np.float32), "b": np.ones(2, np.float32)})


def test_a_prefix_of_some_names_alone_is_no_wrapping(tmp_path):
    path = tmp_path / "weights.safetensors"
    pytorch.write_state_dict(path, {"module.a": np.ones(2), "b": np.ones(2)})
    assert sorted(pytorch.read_state_dict(path)) == ["b", "module.a"]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_files_of_weights_have_the_mode_of_any_other_file(suffix, torch, tmp_path):
    path, other = tmp_path / f"weights{suffix}", tmp_path / "other"
    other.touch()
    pytorch.write_state_dict(path, {"a": np.ones(2)})
    assert path.stat().st_mode == other.stat().st_mode
    assert sorted(tmp_path.iterdir()) == [other, path]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_bfloat16_is_widened(suffix, torch, tmp_path):
    path = tmp_path / f"weights{suffix}"
    values = {"a": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}
    if suffix == ".safetensors":
        import safetensors.torch

        safetensors.torch.save_file(values, path)
    else:
        torch.save(values, path)
    read = pytorch.read_state_dict(path)["a"]
    assert read.dtype == np.float32 and read.tolist() == [1.5, -2.0]


class Malicious:
    """Unpickling it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_code_in_a_file_is_not_run(how, torch, tmp_path):
    target, path = tmp_path / "made", tmp_path / "weights.pth"
    if how == "torch":
        torch.save({"a": torch.ones(2), "b": Malicious(target)}, path)
    else:
        path.write_bytes(pickle.dumps(Malicious(target), protocol=2))
    with pytest.raises(InputError, match="Expected a state dict.*weights.pth, which is broken or"):
        pytorch.read_state_dict(path)
    assert not target.exists()


def save_module(torch, path):
    torch.save(torch.nn.Linear(2, 2), path)


def save_truncated(torch, path):
    torch.save({"a": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:1500])


SAVED = {
    "a_module": (save_module, "Expected a state dict, as torch.save(model.state_dict(), path) "
                              "writes it, got"),
    "truncated": (save_truncated, "which is broken or contains"),
    "empty_file": (lambda torch, path: path.touch(), "which is broken or contains"),
    "text": (lambda torch, path: path.write_text("hello"), "which is broken or contains"),
    "a_script": (lambda torch, path: path.write_bytes(b"import os"), "which is broken or contains"),
    "a_list": (lambda torch, path: torch.save([torch.ones(1)], path), "got a list in"),
    "a_tensor": (lambda torch, path: torch.save(torch.ones(1), path), "got a Tensor in"),
    "nothing": (lambda torch, path: torch.save({}, path), "got nothing in"),
    "numbers": (lambda torch, path: torch.save({"a": torch.ones(1), "b": 3.5}, path),
                "in which 'b' is a float."),
    "numbered": (lambda torch, path: torch.save({1: torch.ones(1)}, path),
                 "in which 1 is a Tensor."),
}


@pytest.mark.parametrize("case", SAVED)
def test_a_pytorch_file_that_holds_no_state_dict_is_told_in_one_line(case, torch, tmp_path):
    save, message = SAVED[case]
    path = tmp_path / "weights.pth"
    save(torch, path)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        pytorch.read_state_dict(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"hello, this is no such file", b"\xff" * 100])
def test_a_broken_safetensors_file_is_told_in_one_line(content, tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(f"Cannot read {path}: ")) as error:
        pytorch.read_state_dict(path)
    assert "\n" not in str(error.value)


def test_files_that_are_not_there_or_not_known(tmp_path):
    with pytest.raises(InputError, match="Expected a file of weights, .* which does not exist"):
        pytorch.read_state_dict(tmp_path / "weights.pth")
    for call in (lambda path: pytorch.read_state_dict(path),
                 lambda path: pytorch.write_state_dict(path, {})):
        with pytest.raises(InputError, match=re.escape(
                "Unknown suffix of a file of weights '.onnx'. Expected one of: "
                ".safetensors, .pth, .pt.")):
            call(tmp_path / "weights.onnx")


@pytest.mark.parametrize(("suffix", "library", "message"), [
    (".pth", "torch", "Install it with: pip install torch, or use a .safetensors file."),
    (".safetensors", "safetensors", "Install it with: pip install 'jaxrobust[weights]'"),
])
def test_a_library_that_is_missing_is_named(suffix, library, message, tmp_path, monkeypatch):
    for name in [library, *(name for name in sys.modules if name.startswith(f"{library}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    path = tmp_path / f"weights{suffix}"
    path.touch()
    for call in (lambda: pytorch.read_state_dict(path),
                 lambda: pytorch.write_state_dict(path, {"a": np.ones(1)})):
        with pytest.raises(InputError, match=re.escape(message)) as error:
            call()
        assert str(path) in str(error.value)
