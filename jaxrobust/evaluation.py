"""Accuracy under perturbations, image by image and draw by draw.

Logits that are not finite are an error here, never class 0, as ``argmax`` would make them.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, overload

import flax.linen as nn
import jax
import numpy as np

from jaxrobust import _validate
from jaxrobust.centroids import counted
from jaxrobust.data.types import StoredImages
from jaxrobust.images import FeaturesFn, LogitsFn, Outputs, predicted_classes, to_float
from jaxrobust.parallel import Layout, make_layout, map_examples, place_batch, replicate
from jaxrobust.perturbations import Perturbation, identity, per_example


class _Ranked(NamedTuple):
    """Predictions compared with labels."""

    correct: jax.Array  # shape=[B], dtype=bool; False where one of the next two is
    finite: jax.Array  # shape=[B], dtype=bool; whether all logits are
    labelled: jax.Array  # shape=[B], dtype=bool; whether the label is one of the classes


def _rank(logits_fn: LogitsFn, images: jax.Array, labels: jax.Array) -> _Ranked:
    labels = _validate.class_numbers("labels", labels)
    logits = logits_fn(images)
    num_classes = _validate.shapes(labels=(labels, "B"), logits=(logits, "B C"))["C"]
    _validate.in_range("number of classes", num_classes, 2)
    predicted, labelled = predicted_classes(logits), counted(labels, num_classes)
    return _Ranked((predicted == labels) & labelled, predicted >= 0, labelled)


@functools.partial(jax.jit, static_argnames="model")
def predict(model: nn.Module, variables: Any, images: jax.Array) -> Outputs:
    """Applies a model in evaluation mode to images [B, H, W, channels], uint8 or in [0, 1].

    Its outputs are not checked: do not rank logits that are not finite.
    """
    return _outputs_of(model, variables, to_float(images))


def _outputs_of(model: nn.Module, variables: Any, images: jax.Array) -> Outputs:
    outputs = model.apply(variables, images, train=False)
    if not isinstance(outputs, Outputs):
        raise _validate.InputError("Expected a model that returns jaxrobust.models.Outputs, "
                                   f"got one that returns a {type(outputs).__name__}.")
    return outputs


@dataclasses.dataclass(frozen=True)
class _Output:
    """``(variables, images) -> output`` of a model; compared by value, as jit needs it."""

    model: nn.Module
    name: str  # of a field of Outputs

    def __call__(self, variables: Any, images: jax.Array) -> jax.Array:
        return getattr(_outputs_of(self.model, variables, images), self.name)


def logits_fn_of(model: nn.Module, variables: Any) -> LogitsFn:
    """Makes the function of images in [0, 1] that returns a model's logits in evaluation mode.

    It is a ``jax.tree_util.Partial``, whose variables are arguments of compiled programs.
    """
    return jax.tree_util.Partial(_Output(model, "logits"), variables)


def features_fn_of(model: nn.Module, variables: Any) -> FeaturesFn:
    """Makes the function that returns a model's features, as :func:`logits_fn_of` does."""
    return jax.tree_util.Partial(_Output(model, "features"), variables)


def _correct(
    layout: Layout, logits_fn: LogitsFn, perturb: Perturbation, key: jax.Array, images: jax.Array,
    labels: jax.Array, indices: jax.Array
) -> _Ranked:
    """In two programs: the network takes longest to compile, and needs it once."""
    return _ranked(layout, logits_fn, _perturbed(layout, perturb, key, images, indices), labels)


@functools.partial(jax.jit, static_argnames="layout")
def _perturbed(
    layout: Layout, perturb: Perturbation, key: jax.Array, images: jax.Array, indices: jax.Array
) -> jax.Array:
    def share(shared: Any, rows: Any) -> jax.Array:
        (perturb, key), (images, indices) = shared, rows
        return per_example(perturb, key, to_float(images), indices)

    return map_examples(layout, share, whole=False)((perturb, key), (images, indices))


@functools.partial(jax.jit, static_argnames="layout")
def _ranked(layout: Layout, logits_fn: LogitsFn, images: jax.Array, labels: jax.Array) -> _Ranked:
    return map_examples(layout, lambda logits_fn, rows: _rank(logits_fn, *rows))(
        logits_fn, (images, labels))


@overload
def evaluate(
    model: nn.Module, variables: Any, images: np.ndarray | StoredImages, labels: np.ndarray, /, *,
    perturb: Perturbation | None = None, key: jax.Array, num_draws: int = 1,
    batch_size: int = 500, layout: Layout | None = None,
) -> Iterator[np.ndarray]: ...


@overload
def evaluate(
    logits_fn: LogitsFn, images: np.ndarray | StoredImages, labels: np.ndarray, /, *,
    perturb: Perturbation | None = None, key: jax.Array, num_draws: int = 1,
    batch_size: int = 500, layout: Layout | None = None,
) -> Iterator[np.ndarray]: ...


def evaluate(
    classifier: nn.Module | LogitsFn,
    *arguments: Any,
    perturb: Perturbation | None = None,
    key: jax.Array,
    num_draws: int = 1,
    batch_size: int = 500,
    layout: Layout | None = None,
) -> Iterator[np.ndarray]:
    r"""Tells whether each image is classified correctly, for each draw of a perturbation.

    .. math:: 1\{\arg\max_i z_i(perturb(x_n)) = y_n\}

    Call it as ``evaluate(model, variables, images, labels, key=...)`` with a Flax Linen module, or
    as ``evaluate(logits_fn, images, labels, key=...)`` with any function. The last batch is padded
    and the padding dropped, so that every image counts once. The result does not depend on
    ``batch_size`` or the number of devices.

    Args:
      classifier: a module that returns :class:`~jaxrobust.models.Outputs`, or a function of images
        [B, H, W, channels] in [0, 1] that returns logits [B, C]. The function is compiled once for
        each object; parameters that it closes over become constants of the program, those in a
        ``jax.tree_util.Partial`` do not.
      *arguments: ``variables``, for a module only: its parameters and batch statistics;
        ``images``, [N, H, W, channels], uint8, or floats in [0, 1];
        ``labels``, [N] integers in [0, C).
      perturb: the perturbation; None for the images as they are.
      key: a PRNG key; draw k perturbs image n with ``fold_in(fold_in(key, k), n)``.
      num_draws: independent draws.
      batch_size: images at a time.
      layout: the devices, which share each batch; by default one.

    Yields:
      For each draw, [N] bool; its mean is the accuracy of the draw.

    Raises:
      InputError: (a ValueError) at once if shapes do not match, there is no image, pixels are NaN
        or outside [0, 1], labels are not integers, or a number is below 1. On the first draw if
        the classifier does not return logits, or a label is outside [0, C); on any draw if logits
        are not finite.
    """
    if isinstance(classifier, nn.Module):
        _require_arguments("model, variables, images, labels", 3, arguments)
        variables, images, labels = arguments
        logits_fn = logits_fn_of(classifier, variables)
    elif callable(classifier):
        _require_arguments("logits_fn, images, labels", 2, arguments)
        images, labels = arguments
        logits_fn = _as_pytree(classifier)
    else:
        raise _validate.InputError("Expected a Flax Linen module or a function of images to "
                                   f"evaluate, got a {type(classifier).__name__}.")
    if not isinstance(images, StoredImages):  # These check what they read.
        _validate.images("images", images)
    labels = np.asarray(_validate.class_numbers("labels", labels))
    _validate.shapes(images=(images, "N ..."), labels=(labels, "N"))
    num_draws = _validate.integer("num_draws", num_draws, 1)
    batch_size = _validate.integer("batch_size", batch_size, 1)
    layout = make_layout("jit") if layout is None else layout.for_examples()
    perturb = identity() if perturb is None else _as_pytree(perturb)
    return _draws(logits_fn, images, labels, perturb, key, num_draws, batch_size, layout)


def _as_pytree(function: Callable[..., Any]) -> jax.tree_util.Partial:
    """A function as an argument of compiled ones."""
    return function if isinstance(function, jax.tree_util.Partial) else jax.tree_util.Partial(
        function)


def _require_arguments(names: str, number: int, arguments: tuple[Any, ...]) -> None:
    if len(arguments) != number:
        raise _validate.InputError(
            f"Expected evaluate({names}, key=...), got {len(arguments) + 1} arguments.")


def _draws(
    logits_fn: LogitsFn, images: np.ndarray | StoredImages, labels: np.ndarray,
    perturb: Perturbation, key: jax.Array, num_draws: int, batch_size: int, layout: Layout
) -> Iterator[np.ndarray]:
    """What :func:`evaluate` yields."""
    logits_fn = replicate(layout, logits_fn)
    for draw in range(num_draws):
        draw_key = replicate(layout, jax.random.fold_in(key, draw))
        ranked = map_batches(
            functools.partial(_correct, layout, logits_fn, perturb, draw_key),
            images, labels, np.arange(len(labels)), batch_size=batch_size, layout=layout)
        if not ranked.labelled.all():
            first = int(np.argmin(ranked.labelled))
            raise _validate.InputError(
                f"Expected labels to be classes of the logits, got {labels[first]} at index "
                f"{first} ({int((~ranked.labelled).sum())} in all).")
        _validate.finite_logits(ranked.finite, f" in draw {draw}" if num_draws > 1 else "")
        yield ranked.correct


def padded_batches(size: int, batch_size: int) -> Iterator[np.ndarray]:
    """Yields positions 0 .. size - 1 in batches of one size; the last repeats the last position."""
    batch_size = _validate.integer("batch_size", batch_size, 1)
    return (np.minimum(np.arange(first, first + batch_size), size - 1)
            for first in range(0, size, batch_size))


def map_batches(
    function: Callable[..., Any], *arrays: np.ndarray | StoredImages, batch_size: int,
    layout: Layout | None = None,
) -> Any:
    """Applies ``function`` to the rows of ``arrays``, a batch at a time.

    Args:
      function: takes ``batch_size`` rows of each array; returns a pytree of arrays [B, ...],
        whole in every process.
      *arrays: [N, ...] each, N >= 1.
      batch_size: rows at a time, >= 1; results of the padding of the last batch are dropped.
      layout: the devices that share the rows. Each process then reads only its own, and
        ``batch_size`` is rounded up to a multiple of the number of devices. None if the function
        places the rows itself.

    Returns:
      The pytree, of NumPy arrays [N, ...].

    Raises:
      InputError: (a ValueError) if an argument does not fit.
    """
    size = _validate.shapes(**{f"array {i}": (array, "N ...") for i, array in enumerate(arrays)})[
        "N"]
    batch_size = min(_validate.integer("batch_size", batch_size, 1), size)
    if layout is not None:
        batch_size = -(-batch_size // layout.num_devices) * layout.num_devices

    def read(rows: np.ndarray) -> tuple[Any, ...]:
        if layout is None:
            return tuple(array[rows] for array in arrays)
        mine = rows[layout.rows_of(batch_size)]
        return place_batch(layout, tuple(array[mine] for array in arrays), batch_size)

    parts = [jax.tree.map(np.asarray, function(*read(rows)))
             for rows in padded_batches(size, batch_size)]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:size], *parts)
