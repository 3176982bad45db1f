"""Opens classifiers that were not trained here: exported artefacts and functions of modules."""

import dataclasses
import functools
import hashlib
import importlib
import inspect
import json
import pathlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from jaxrobust import _validate
from jaxrobust._errors import reason_of
from jaxrobust.app import files
from jaxrobust.app.config import InputError, RunConfig
from jaxrobust.app.datasets import fingerprint, open_dataset
from jaxrobust.app.trainer import Splits, TrainedRun
from jaxrobust.data import Dataset
from jaxrobust.images import FeaturesFn, LogitsFn, to_float
from jaxrobust.parallel import Layout, make_layout

ARTEFACT = ".stablehlo"
"""The suffix of exported artefacts."""


RandomLogitsFn = Callable[[jax.Array, jax.Array], jax.Array]
"""``(key, images [B, ...]) -> logits [B, C]``, row i depending on the key and image i alone."""


class ForeignModel(NamedTuple):
    """A classifier that measurements take in the place of a trained run."""

    name: str
    dataset: Dataset  # whose test images it is tested on
    layout: Layout
    logits_fn: Callable[..., jax.Array]  # a LogitsFn, or one that takes a key first
    features_fn: FeaturesFn | None = None
    takes_key: bool = False  # whether logits_fn is randomised
    config: None = None  # it has none, as it was not trained here
    epoch: None = None

    @property
    def splits(self) -> Splits:
        """The data set's training images, and its validation images if it has some."""
        return Splits(self.dataset.train, self.dataset.validation)


def is_randomised(run: TrainedRun | ForeignModel) -> bool:
    """Whether a model's logits are a function of a key and images; see
    :class:`jaxrobust.attacks.Randomised`."""
    return isinstance(run, ForeignModel) and run.takes_key


def is_foreign(model: pathlib.Path) -> bool:
    """Whether a command line names an artefact, or ``module:function``, instead of a run."""
    return model.suffix == ARTEFACT or (":" in str(model) and not model.is_dir())


def name_of(model: pathlib.Path) -> str:
    """The name under which a foreign model's results are kept."""
    return model.stem if model.suffix == ARTEFACT else str(model).replace(":", ".")


def open_foreign(model: pathlib.Path, dataset: Dataset, layout: Layout | None = None
                 ) -> ForeignModel:
    """Opens ``FILE.stablehlo``, made by the command ``export``, or ``module:function``.

    The function takes images [B, H, W, channels], float32 in [0, 1], and returns logits [B, C]; it
    must be one that JAX can trace. With two required arguments it is randomised, a function of a
    key and images. Its module is imported from the current folder or from wherever
    Python finds it.

    Raises:
      InputError: (a ValueError) if there is no such file, module or function, or its logits are not
        [B, C] with the data set's number of classes.
    """
    layout = make_layout("jit") if layout is None else layout
    features_fn, takes_key = None, False
    if model.suffix == ARTEFACT:
        logits_fn, features_fn = _artefact(model)
    else:
        logits_fn = jax.tree_util.Partial(_function(str(model)))
        takes_key = _num_required(logits_fn) == 2
    found = ForeignModel(name_of(model), dataset, layout, logits_fn, features_fn, takes_key)
    _check_logits(model, found)
    return found


def require_gradient(model: TrainedRun | ForeignModel, suite: str) -> None:
    """Checks that JAX can differentiate a model, without which a suite measures nothing.

    Raises:
      InputError: (a ValueError) if it cannot; the reason is that of JAX.
    """
    if isinstance(model, ForeignModel) and (why := why_no_gradient(model)) is not None:
        raise InputError(f"Expected {model.name} to have derivatives, for the suite {suite}: "
                         f"{why}.")


def why_no_gradient(model: TrainedRun | ForeignModel) -> str | None:
    """Why JAX cannot differentiate a model; None if it can, as it can all runs."""
    if not isinstance(model, ForeignModel):
        return None
    images = jax.ShapeDtypeStruct((2, *model.dataset.image_shape), jnp.float32)
    try:
        jax.eval_shape(jax.grad(lambda images: _logits(model, images).sum()), images)
    except Exception as error:  # The user's code may raise anything.
        return reason_of(error)
    return None


def _logits(model: ForeignModel, images: jax.Array) -> jax.Array:
    """Applies a model as attacks do: a randomised one image by image, each with a key."""
    if not model.takes_key:
        return model.logits_fn(images)
    return jax.vmap(lambda key, image: model.logits_fn(key, image[None])[0])(
        jax.random.split(jax.random.key(0), len(images)), images)


def orders_of(model: ForeignModel) -> tuple[int, str | None]:
    """How often JAX can differentiate a model that it can: twice, or once and why not twice.

    Exported artefacts can be differentiated in reverse mode alone, and so can functions with a
    ``jax.custom_vjp``; the products with the Hessian are forward-mode derivatives of the gradient.
    """
    def gradient(images):
        return jax.grad(lambda images: model.logits_fn(images).sum())(images)

    def products(images):
        return jax.vmap(lambda factor: jax.jvp(gradient, (images,), (factor * images,))[1])(
            jnp.ones(2))

    images = jax.ShapeDtypeStruct((2, *model.dataset.image_shape), jnp.float32)
    try:
        jax.eval_shape(products, images)
    except Exception as error:  # The user's code may raise anything.
        return 1, reason_of(error)
    return 2, None


def once_differentiable(logits_fn: LogitsFn) -> LogitsFn:
    """The same function with first derivatives alone, which ``jax.vmap`` can take.

    Calls of other programs, such as exported artefacts, have no rule for a further axis. It becomes
    a part of the batch, whose images do not depend on each other.
    """
    @jax.custom_batching.custom_vmap
    def value(images):
        return logits_fn(images)

    @value.def_vmap
    def _values(size, batched, images):
        del batched
        return _unfolded(value(_folded(images)), size), True

    @jax.custom_batching.custom_vmap
    def pull(images, cotangents):
        return jax.vjp(logits_fn, images)[1](cotangents)[0]

    @pull.def_vmap
    def _pulls(size, batched, images, cotangents):
        images, cotangents = (
            array if has_axis else jnp.broadcast_to(array[None], (size, *array.shape))
            for array, has_axis in zip((images, cotangents), batched, strict=True))
        return _unfolded(pull(_folded(images), _folded(cotangents)), size), True

    differentiable = jax.custom_vjp(value)
    differentiable.defvjp(lambda images: (value(images), images),
                          lambda images, cotangents: (pull(images, cotangents),))
    return jax.tree_util.Partial(differentiable)


def _folded(array: jax.Array) -> jax.Array:
    """[K, B, ...] as [K * B, ...]."""
    return array.reshape(-1, *array.shape[2:])


def _unfolded(array: jax.Array, size: int) -> jax.Array:
    """[K * B, ...] as [K, B, ...]."""
    return array.reshape(size, -1, *array.shape[1:])


PROBED = 16
"""Test images whose largest logits tell a function from itself with other weights."""
SAME = 0.01
"""The largest difference of these logits, as a share of the largest, that devices may make."""


def identity_of(model: pathlib.Path, opened: ForeignModel) -> dict:
    """What the results of a foreign model belong to: the file, by its digest, the data set with its
    images, and what a function makes of some of these.

    Raises:
      InputError: (a ValueError) if the module of a function is no file.
    """
    path, dataset, probed = model, opened.dataset, {}
    if model.suffix != ARTEFACT:
        # Its weights may come from anywhere.
        images = to_float(jnp.asarray(dataset.test.images[:PROBED]))
        logits = np.asarray(jax.jit(functools.partial(_logits, opened))(images), np.float64)
        probed = {"largest_logits": [float(f"{value:.6g}") if np.isfinite(value) else None
                                     for value in logits.max(axis=1)]}
        file = getattr(importlib.import_module(str(model).partition(":")[0]), "__file__", None)
        if file is None:
            raise InputError(f"Expected {model} in a module with a file, whose digest tells its "
                             "results from those of another.")
        path = pathlib.Path(file)
    return {"model": str(model), "dataset": dataset.name, "split_seed": RunConfig.split_seed,
            "class_names": list(dataset.class_names), "data_sha256": fingerprint(dataset),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), **probed}


def claim(model: pathlib.Path, opened: ForeignModel, folder: pathlib.Path) -> None:
    """Makes a folder that of a foreign model's results, unless it is already.

    Raises:
      InputError: (a ValueError) if it is that of something else, such as the same function with
        other weights.
    """
    path, identity = folder / "model.json", identity_of(model, opened)
    there = files.read_json(path) if path.is_file() else {}
    probed = there.get("largest_logits")
    if probed is not None and identity | {"largest_logits": probed} == there:
        before, now = (np.array(logits, float) for logits in (probed, identity["largest_logits"]))
        same = np.isclose(now, before, rtol=0, equal_nan=True,
                          atol=SAME * np.nanmax(np.abs(before), initial=0))
        if not same.all():
            first = np.argmin(same)
            raise InputError(
                f"{folder} holds results of {model} with other weights: the largest logit of test "
                f"image {first} was {before[first]:g} and is {now[first]:g}. Choose another folder "
                "with --out, or remove that one.")
        identity["largest_logits"] = probed  # Equal but for rounding.
    files.claim(path, json.dumps(identity, indent=2) + "\n")


def open_data(model: pathlib.Path, data: str, data_dir: pathlib.Path,
              image_size: tuple[int, int] | None) -> Dataset:
    """Opens the data set that a foreign model is tested on.

    Images of a folder get the size that an artefact takes, or ``image_size`` for a function.
    """
    shape = image_shape_of(model)
    size = image_size if shape is None else shape[:2]
    config = RunConfig(dataset=data, select="last")
    return open_dataset(config if size is None else dataclasses.replace(config, image_size=size),
                        data_dir)


def image_shape_of(model: pathlib.Path) -> tuple[int, int, int] | None:
    """Height, width and channels of the images that an artefact takes; None for a function."""
    return _read(model).in_avals[0].shape[1:] if model.suffix == ARTEFACT else None


def _read(path: pathlib.Path) -> jax.export.Exported:
    if not path.is_file():
        raise InputError(f"Expected an exported artefact in {path}, found no such file.")
    try:
        exported = jax.export.deserialize(bytearray(path.read_bytes()))
        derivatives = [exported.vjp()] if exported.has_vjp() else []
        called = {name for part in (exported, *derivatives) for name in _calls_in(part)}
    except Exception as error:  # It raises whatever the bytes lead to.
        raise InputError(f"Cannot read {path} as an exported artefact: {reason_of(error)}."
                         ) from error
    if called - _HARMLESS:
        raise InputError(f"Expected {path} to call no code outside of it, got calls of "
                         f"{', '.join(sorted(called - _HARMLESS))}.")
    return exported


_HARMLESS = frozenset({"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape",
                       "shape_assertion"})
"""What the modules of exports name beside their own operations, and no function of a process."""


def _calls_in(exported: jax.export.Exported) -> Iterator[str]:
    """The functions outside of a module that it calls, such as Python's by address."""
    for name in re.findall(r'custom_call"?\W{0,2}([\w.$]*)', exported.mlir_module()):
        yield name or "a function without a name"


def _artefact(path: pathlib.Path) -> tuple[LogitsFn, FeaturesFn]:
    exported = _read(path)
    images, = exported.in_avals
    names = _names_of(exported)
    if images.dtype != jnp.float32 or not {"logits", "features"} <= set(names):
        raise InputError(f"Expected {path} to take float32 images and to return logits and "
                         f"features, got {images.dtype} and {', '.join(names)}. Export the run "
                         "again.")

    def output(name: str) -> Callable[[jax.Array], jax.Array]:
        return jax.tree_util.Partial(lambda images: exported.call(images)[name])

    return output("logits"), output("features")


def _names_of(exported: jax.export.Exported) -> list[str]:
    """The names of the outputs; none if they have none."""
    outputs = jax.tree_util.tree_unflatten(exported.out_tree, exported.out_avals)
    return list(outputs) if isinstance(outputs, dict) else []


def _function(text: str) -> LogitsFn:
    module_name, _, name = text.partition(":")
    if "" not in sys.path and str(pathlib.Path.cwd()) not in sys.path:
        sys.path.insert(0, str(pathlib.Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # The user's code may raise anything.
        raise InputError(f"Cannot import {module_name!r} of {text}: {reason_of(error)}.") from error
    functions = [key for key, value in vars(module).items()
                 if callable(value) and not key.startswith("_")]
    _validate.one_of(f"function of {module_name}", name, functions)
    return getattr(module, name)


def _num_required(function: Callable) -> int | None:
    """The number of arguments that a function needs; None where Python does not know."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # A builtin without a signature.
        return None
    return sum(one.default is one.empty and one.kind in (
        one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD) for one in parameters)


def _check_logits(path: pathlib.Path, model: ForeignModel) -> None:
    shape, num_classes = model.dataset.image_shape, len(model.dataset.class_names)
    try:
        logits = jax.eval_shape(functools.partial(_logits, model),
                                jax.ShapeDtypeStruct((2, *shape), jnp.float32))
    except Exception as error:  # The user's code may raise anything.
        raise InputError(f"{path} fails on float32 images {[2, *shape]} of {model.dataset.name}: "
                         f"{reason_of(error)}.") from error
    if getattr(logits, "shape", None) != (2, num_classes):
        raise InputError(
            f"Expected {path} to return logits [2, {num_classes}] of 2 images of "
            f"{model.dataset.name}, got {getattr(logits, 'shape', type(logits).__name__)}.")
