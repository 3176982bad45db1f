"""Reading and writing of weights in PyTorch's files.

A state dict is a flat mapping of PyTorch's names to arrays in PyTorch's layout. These are known:

- torchvision's ``mobilenet_v3_small`` and ``mobilenet_v3_large``,
- torchvision's ``resnet18``, whose softmax layer ``fc`` fits ``feature_layer="pooled"`` but not the
  other feature layers,
- the ResNet18 of the paper's authors: ``shortcut`` for ``downsample``, and at the end
  ``fc_layer.1``, the feature layer, and ``fc_layer.2``, the softmax layer.

A state dict does not include the normalisation of the images: for torchvision's networks give the
model the ``mean`` (0.485, 0.456, 0.406) and ``std`` (0.229, 0.224, 0.225) they were trained with.
"""

import os
import pathlib
import uuid
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxrobust import _validate
from jaxrobust._errors import reason_of
from jaxrobust.models.mobilenet import MobileNetV3, bottlenecks
from jaxrobust.models.resnet import ResNet18

SUFFIXES = (".safetensors", ".pth", ".pt")
"""Suffixes of the files that are read and written; the last two are PyTorch's own format."""

_NESTED = ("state_dict", "model", "net")
_DATA_PARALLEL = "module."
_COUNTER = "num_batches_tracked"
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias",
           "mean": "running_mean", "var": "running_var"}


def read_state_dict(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Reads the state dict in a file, without running code that the file may contain.

    The state dict may be nested under "state_dict", "model" or "net", and its names may all begin
    with "module.", as those of ``DataParallel`` do; both are removed.

    Args:
      path: a file whose name ends in one of :data:`SUFFIXES`. PyTorch's own format is read by
        PyTorch, if that is installed.

    Returns:
      Arrays by name, bfloat16 widened to float32.

    Raises:
      InputError: (a ValueError) for another suffix, a missing library, and a file that does not
        exist, is broken, or contains anything but tensors by name, such as a pickled module, or NaN
        or infinite weights.
    """
    path = pathlib.Path(path).expanduser()
    _validate.one_of("suffix of a file of weights", path.suffix, SUFFIXES)
    if not path.is_file():
        raise _validate.InputError(f"Expected a file of weights, got {path}, which does not exist.")
    read = _read_safetensors if path.suffix == ".safetensors" else _read_torch
    state_dict = read(path)
    if all(name.startswith(_DATA_PARALLEL) for name in state_dict):
        state_dict = {name.removeprefix(_DATA_PARALLEL): value
                      for name, value in state_dict.items()}
    _validate.finite(f"weights in {path}", state_dict)
    return state_dict


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    safetensors = _import_safetensors(path)
    try:
        state_dict = safetensors.load_file(path)
    except Exception as error:  # From Rust, or from NumPy for a dtype it lacks.
        raise _unreadable(path, error) from error
    return {name: _float32(value) for name, value in state_dict.items()}


def _float32(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float32) if value.dtype == jnp.bfloat16 else value


def _read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    torch = _import_torch(path)
    expected = "Expected a state dict, as torch.save(model.state_dict(), path) writes it"
    size = path.stat().st_size
    try:
        _refuse_compressed(path, size)
        saved = torch.load(path, weights_only=True, map_location="cpu")
    except OSError as error:
        raise _unreadable(path, error) from error
    except Exception as error:  # PyTorch's readers may raise anything.
        raise _validate.InputError(
            f"{expected}, got {path}, which is broken or contains other Python objects than "
            "tensors.") from error
    if isinstance(saved, Mapping):
        saved = next((saved[key] for key in _NESTED if isinstance(saved.get(key), Mapping)), saved)
    if not isinstance(saved, Mapping) or not saved:
        what = "nothing" if isinstance(saved, Mapping) else f"a {type(saved).__name__}"
        raise _validate.InputError(f"{expected}, got {what} in {path}.")
    for name, value in saved.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise _validate.InputError(
                f"{expected}, got {path}, in which {name!r} is a {type(value).__name__}.")
        if value.numel() * value.element_size() > size:  # A view that repeats what is stored.
            raise _validate.InputError(
                f"{expected}, got {path}, in which {name!r} is larger than the file.")
    return {name: (value.float() if value.dtype == torch.bfloat16 else value).detach().numpy()
            for name, value in saved.items()}


def _refuse_compressed(path: pathlib.Path, size: int) -> None:
    """Raises OSError if a file in PyTorch's format, a zip archive, would be larger in memory."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > size:
                raise OSError("its tensors are larger than the file")


def write_state_dict(path: str | pathlib.Path, state_dict: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict, such as one of :func:`to_torch_state_dict`.

    Args:
      path: a file whose name ends in one of :data:`SUFFIXES`, in an existing folder.
      state_dict: arrays by name.

    Raises:
      InputError: (a ValueError) for another suffix, or a missing library.
      OSError: if the file cannot be written.
    """
    path = pathlib.Path(path).expanduser()
    _validate.one_of("suffix of a file of weights", path.suffix, SUFFIXES)
    # Copies in C order, which both formats need, and which PyTorch may write to.
    arrays = {name: np.array(value, order="C") for name, value in state_dict.items()}
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        if path.suffix == ".safetensors":
            # Not by save_file, which raises its own errors and writes files only the user can read.
            partial.write_bytes(_import_safetensors(path).save(arrays))
        else:
            torch = _import_torch(path)
            with partial.open("wb") as file:  # PyTorch would write the name of a path into it.
                torch.save({name: torch.from_numpy(value) for name, value in arrays.items()}, file)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _import_torch(path: pathlib.Path) -> Any:
    return _validate.installed(
        "torch", "PyTorch", str(path), "pip install torch, or use a .safetensors file.")


def _import_safetensors(path: pathlib.Path) -> Any:
    return _validate.installed(
        "safetensors.numpy", "safetensors", str(path), "pip install 'jaxrobust[weights]'")


def _unreadable(path: pathlib.Path, error: Exception) -> _validate.InputError:
    return _validate.InputError(f"Cannot read {path}: {reason_of(error)}")


class LoadedWeights(NamedTuple):
    """A model's variables with weights from a file."""

    variables: dict[str, Any]
    replaced: tuple[str, ...]  # which of the layers "features" and "head" were not loaded


def load_torch_weights(
    model: nn.Module, variables: Mapping[str, Any], state_dict: Mapping[str, np.ndarray]
) -> LoadedWeights:
    """Loads the weights of a state dict into the variables of a model.

    All names and shapes must be the model's, except those that depend on the classes. The softmax
    layer stays as it is in ``variables`` if the state dict has another number of classes or no
    softmax layer. The feature layer stays too if the state dict has neither layer, or only the
    ``fc`` of torchvision's ``resnet18``. PyTorch's ``num_batches_tracked`` is not needed.

    The running variance is PyTorch's, the unbiased one, and is used as it is; in training it
    becomes the biased one (:func:`jaxrobust.models.common.batch_norm`).

    Args:
      model: a :class:`MobileNetV3` or a :class:`ResNet18`.
      variables: of that model, as ``model.init`` makes them; each array keeps its dtype. Shapes and
        dtypes (``jax.eval_shape``) suffice for layers that the state dict fills.
      state_dict: as returned by :func:`read_state_dict`.

    Raises:
      InputError: (a ValueError) for another model, for names, shapes or a size of the feature layer
        that are not the model's, and for weights that are not finite in the model's dtype.
    """
    downsample = any(".downsample." in name for name in state_dict)
    paths, ends = _names(model, variables, shortcut="downsample" if downsample else "shortcut")
    given = {name: value for name, value in state_dict.items()
             if name.rpartition(".")[2] != _COUNTER}
    if isinstance(model, ResNet18) and not _has(given, ends["head"]):
        given = {name: value for name, value in given.items() if not name.startswith("fc.")}
    replaced = _replaced(model, given, ends)
    for layer in replaced:
        for names in (paths, given):
            for name in [name for name in names if name.startswith(f"{ends[layer]}.")]:
                del names[name]
    leaves = traverse_util.flatten_dict(variables)
    wrong = {name: "is missing" for name in paths if name not in given}
    wrong |= {name: "is unknown" for name in given if name not in paths}
    for name, path in paths.items():
        shape = leaves[path].shape
        shape = tuple(shape[axis] for axis in _TO_TORCH[len(shape)])
        if name in given and given[name].shape != shape:
            wrong[name] = f"is of shape {given[name].shape}, the model's of {shape}"
        elif name in given and not jnp.issubdtype(given[name].dtype, jnp.floating):
            wrong[name] = f"is of dtype {given[name].dtype}"
    if wrong:
        raise _misfit(model, given, ends, wrong)
    with np.errstate(over="ignore"):  # Infinite values are refused below.
        loaded = {name: jnp.asarray(given[name], leaves[path].dtype)
                  for name, path in paths.items()}
    _validate.finite("weights", loaded)
    for name, path in paths.items():
        leaves[path] = loaded[name].transpose(_FROM_TORCH[loaded[name].ndim])
    return LoadedWeights(traverse_util.unflatten_dict(leaves), replaced)


def _replaced(
    model: nn.Module, given: Mapping[str, Any], ends: Mapping[str, str]
) -> tuple[str, ...]:
    """The layers that the state dict does not fill."""
    if not _has(given, ends["head"]):
        return ("head",) if _has(given, ends["features"]) else ("features", "head")
    return () if _size(given, ends["head"]) in (None, model.num_classes) else ("head",)


def _size(given: Mapping[str, Any], layer: str) -> int | None:
    """The number of outputs of a layer of a state dict; None if it is missing."""
    weight = given.get(f"{layer}.weight")
    return None if weight is None else next(iter(np.shape(weight)), None)


def _misfit(
    model: nn.Module, given: Mapping[str, Any], ends: Mapping[str, str], wrong: dict[str, str]
) -> _validate.InputError:
    size = _size(given, ends["features"])
    at_end = tuple(f"{layer}." for layer in ends.values())
    if size not in (None, model.num_features) and all(name.startswith(at_end) for name in wrong):
        return _validate.InputError(
            f"Expected num_features={model.num_features} to be {size}, as in the feature layer "
            f"{ends['features']} of the weights.")
    first, problem = next(iter(wrong.items()))
    kind = f"stem {model.stem}" if isinstance(model, ResNet18) else model.variant
    others = f"; {len(wrong)} names in all do not fit" if len(wrong) > 1 else ""
    return _validate.InputError(
        f"Expected the weights of a {type(model).__name__} ({kind}, width={model.width}, "
        f"{len(model.mean)} channels), got weights of which {first} {problem}{others}.")


def _has(state_dict: Mapping[str, Any], layer: str) -> bool:
    return any(name.startswith(f"{layer}.") for name in state_dict)


def to_torch_state_dict(model: nn.Module, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Converts the weights of a model to a state dict, in the order of the network.

    A :class:`MobileNetV3` gets torchvision's names: torchvision's module loads it as it is. A
    :class:`ResNet18` gets the authors'; with the ImageNet stem its shortcuts are called
    ``downsample``, so that torchvision's module, with ``strict=False``, loads all but the last
    layers. :func:`load_torch_weights` restores exactly the same bits.

    Args:
      model: a :class:`MobileNetV3` or a :class:`ResNet18`.
      variables: of that model.

    Raises:
      InputError: (a ValueError) for another model.
    """
    large = isinstance(model, ResNet18) and model.stem == "imagenet"
    paths, _ = _names(model, variables, shortcut="downsample" if large else "shortcut")
    leaves = traverse_util.flatten_dict(variables)
    state_dict = {}
    for name, path in paths.items():
        values = np.asarray(leaves[path])
        state_dict[name] = values.transpose(_TO_TORCH[values.ndim])
        layer, _, leaf = name.rpartition(".")
        if leaf == "running_var":  # Last, as PyTorch has it.
            state_dict[f"{layer}.{_COUNTER}"] = np.zeros((), np.int64)
    return state_dict


# HWIO as OIHW, and [in, out] as [out, in], by the number of axes.
_TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}
_FROM_TORCH = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}


def _names(
    model: nn.Module, variables: Mapping[str, Any], *, shortcut: str
) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """The paths of our leaves by PyTorch's names, and PyTorch's names of the last two layers."""
    if isinstance(model, MobileNetV3):
        layers = _mobilenet_layers(model)
    elif isinstance(model, ResNet18):
        layers = _resnet_layers(shortcut, pooled=model.feature_layer == "pooled")
    else:
        raise _validate.InputError("Expected a ResNet18 or a MobileNetV3, whose PyTorch weights "
                                   f"are known, got a {type(model).__name__}.")
    position = {layer: number for number, layer in enumerate(layers)}
    kinds = list(_LEAVES)
    paths = sorted(
        traverse_util.flatten_dict({key: variables[key] for key in ("params", "batch_stats")}),
        key=lambda path: (position[".".join(path[1:-1])], kinds.index(path[-1])))
    names = {f"{layers['.'.join(path[1:-1])]}.{_LEAVES[path[-1]]}": path for path in paths}
    return names, {layer: layers[layer] for layer in ("features", "head")}


def _resnet_layers(shortcut: str, *, pooled: bool) -> dict[str, str]:
    layers = {"stem_conv": "conv1", "stem_bn": "bn1"}
    for stage in range(1, 5):
        for index in range(2):
            ours, theirs = f"block{stage}_{index + 1}", f"layer{stage}.{index}"
            layers |= {f"{ours}.{name}": f"{theirs}.{name}"
                       for name in ("conv1", "bn1", "conv2", "bn2")}
            layers |= {f"{ours}.shortcut_conv": f"{theirs}.{shortcut}.0",
                       f"{ours}.shortcut_bn": f"{theirs}.{shortcut}.1"}
    # Without a feature layer it is torchvision's network.
    return layers | {"features": "fc_layer.1", "head": "fc" if pooled else "fc_layer.2"}


def _mobilenet_layers(model: MobileNetV3) -> dict[str, str]:
    layers = {"stem_conv": "features.0.0", "stem_bn": "features.0.1"}
    rows = bottlenecks(model.variant, model.width)
    for number, row in enumerate(rows, 1):
        parts = ["expand"] * row.expands + ["depthwise"] + ["squeeze"] * row.squeeze + ["project"]
        for index, part in enumerate(parts):
            ours, theirs = f"bottleneck{number}", f"features.{number}.block.{index}"
            if part == "squeeze":
                layers |= {f"{ours}.squeeze": f"{theirs}.fc1", f"{ours}.excite": f"{theirs}.fc2"}
            else:
                layers |= {f"{ours}.{part}_conv": f"{theirs}.0", f"{ours}.{part}_bn": f"{theirs}.1"}
    last = f"features.{len(rows) + 1}"
    return layers | {"last_conv": f"{last}.0", "last_bn": f"{last}.1",
                     "features": "classifier.0", "head": "classifier.3"}
