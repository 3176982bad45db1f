"""Keeps the update that stopped a training, and computes it again, piece by piece."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrobust import checkpoints, data, parallel, training
from jaxrobust.app import provenance, run_folder
from jaxrobust.app.config import InputError, RunConfig
from jaxrobust.app.network import read_network
from jaxrobust.app.program import (
    class_weights_of,
    initial_state,
    program_to_replay,
    rows_of,
    stack_configs,
)
from jaxrobust.data import Dataset, Split
from jaxrobust.parallel import Layout, make_layout
from jaxrobust.training import TrainState

KIND = "not_finite"
"""Of the files in the folder of the run."""

_WORDS = {"not_finite_features": "features", "not_finite_logits": "logits",
          "gradient_norm": "norm of the gradient"}


class Place(NamedTuple):
    """Where in a training an update is."""

    epoch: int
    batch: int  # within the epoch, from 0
    steps: int  # updates in an epoch


def keep(
    folder: pathlib.Path, dataset: Dataset, split: Split, state: TrainState,
    metrics: Mapping[str, Any], place: Place, config: RunConfig, layout: Layout,
) -> str:
    """Writes ``not_finite.json`` and ``.npz``: an update that is not finite, and what replays it.

    Args:
      folder: of the run.
      dataset: that it is trained on.
      split: the images that it is trained on.
      state: before the update, but for the number of the step.
      metrics: of the update, numbers.
      place: of the update.
      config: of the run.
      layout: that it is trained on.

    Returns:
      A line that names the update, the first of its metrics that is not finite, and its images.
    """
    order = data.host_epoch_order(state.key, len(split.labels))(place.epoch)
    sizes = data.batch_sizes(len(split.labels), config.batch_size)
    rows = order[place.batch * config.batch_size:][:sizes[place.batch]]
    images = rows_of(config, dataset)[0][rows]
    step = (place.epoch - 1) * place.steps + place.batch
    state = dataclasses.replace(state, step=jax.numpy.int32(step))
    first = training.first_not_finite(metrics)
    leaves = jax.tree_util.tree_leaves_with_path(checkpoints.to_host(state))
    run_folder.write_arrays(folder, KIND, {
        "images": split.images[rows], "labels": split.labels[rows],
        **{_name(path): leaf for path, leaf in leaves}})
    paths = None if dataset.files is None else [dataset.files[image].path for image in images]
    run_folder.write_facts(folder, KIND, {
        "update": step + 1, **place._asdict(), "first": first,
        "metrics": {name: str(value) for name, value in metrics.items()},
        "images": images.tolist(), "paths": paths,
        "num_train": len(split.labels), "class_weights": class_weights_of(config, dataset),
        "flip": dataset.flip, "parallel": layout.form, "devices": layout.num_devices,
        "provenance": provenance.describe()})
    shown = ", ".join(map(str, images[:5].tolist())) + (", ..." if len(images) > 5 else "")
    return (f"Update {step + 1} of {folder} (epoch {place.epoch}, batch {place.batch + 1} of "
            f"{place.steps}) is not finite, first the {_said(first, metrics[first])}. Its "
            f"{len(images)} training images ({shown}), the state and the keys are in "
            f"{run_folder.facts_path(folder, KIND)} for the command replay")


def _said(name, value) -> str:
    """A metric with its value in words."""
    word = _WORDS.get(name, name)
    return f"{word} of {value:g} views of images" if name in training.NOT_FINITE else (
        f"{word}, {value:g}")


def _name(path) -> str:
    return f"state.{jax.tree_util.keystr(path, simple=True, separator='.')}"


def replay(folder: pathlib.Path) -> str:
    """Computes the update that :func:`keep` wrote again; returns a text with its pieces.

    It is computed on one device, from what the folder of the run holds, without its data set.

    Raises:
      InputError: (a ValueError) if there is no such update, or it is of another network.
    """
    config, network = run_folder.read_config(folder), read_network(folder)
    facts, arrays = run_folder.read_facts(folder, KIND), run_folder.read_arrays(folder, KIND)
    if facts is None or arrays is None or network is None:
        raise InputError(f"Expected an update that stopped the training of {folder}, found no "
                         f"{KIND}.json and .npz there.")
    layout = make_layout("jit")
    program = program_to_replay(config, network, facts)
    state = _restored(folder, arrays, initial_state(config, network, layout))
    size = len(arrays["labels"])
    rows = parallel.place_batch(layout, (
        arrays["images"], arrays["labels"], np.arange(size, dtype=np.int32)), size)
    run = parallel.replicate(layout, stack_configs([config]))
    batch, outputs, gradients = jax.device_get(program.examine(state, run, rows))
    before = {"parameters": state.params, "batch statistics": state.batch_stats,
              "optimiser": state.opt_state, "centroids": state.centroids}
    before = {name: _size(tree) for name, tree in before.items()}
    _, metrics = program.streamed(state, run, rows)  # It takes over the state.
    metrics = {name: value.item() for name, value in jax.device_get(metrics).items()}
    first = training.first_not_finite(metrics)
    names = [name for name in (*training.NOT_FINITE, "softmax", *sorted(metrics))
             if name != training.FINITE]
    lines = [
        f"Update {facts['update']} of {folder}: epoch {facts['epoch']}, batch "
        f"{facts['batch'] + 1} of {facts['steps']}, learning rate "
        f"{float(program.learning_rate(np.float32(facts['update'] - 1))):.4g}.",
        f"Training images: {', '.join(map(str, facts['paths'] or facts['images']))}.", "",
        *_columns([("", "recorded", "recomputed"), *(
            (name, f"{float(facts['metrics'][name]):.6g}", f"{metrics[name]:.6g}")
            for name in dict.fromkeys(names))]), "",
        f"First that is not finite: {facts['first']}, and now "
        f"{first or 'none'}."]
    if facts["devices"] > 1:
        lines.append(f"The run used {facts['devices']} devices ({facts['parallel']}); here is one.")
    lines += ["", *_columns([
        ("before the update", "largest", "not finite"),
        *((name, *size) for name, size in before.items()),
        *((f"{view} {name}", *_size(getattr(source, name)))
          for view, source in outputs.items() for name in ("features", "logits")),
        *((f"{view} images", *_size(getattr(batch, view))) for view in ("clean", "noisy")),
        *((f"gradient of {jax.tree_util.keystr(path, simple=True, separator='.')}", *_size(leaf))
          for path, leaf in jax.tree_util.tree_leaves_with_path(gradients))])]
    for view, source in outputs.items():
        wrong = np.flatnonzero(~(np.isfinite(source.features).all(axis=1)
                                 & np.isfinite(source.logits).all(axis=1)))
        if wrong.size:
            named = facts["paths"] or facts["images"]
            lines.append(f"Features or logits of {view} images that are not finite: "
                         f"{', '.join(str(named[row]) for row in wrong)}.")
    return "\n".join(lines)


def _restored(folder, arrays, like: TrainState) -> TrainState:
    """A state like ``like`` with the leaves that :func:`keep` wrote."""
    def leaf(path, value):
        name = _name(path)
        key = jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key)
        plain = jax.random.key_data(value) if key else value
        if name not in arrays or (arrays[name].shape, arrays[name].dtype) != (
                plain.shape, plain.dtype):
            raise InputError(f"Expected {name} of shape {plain.shape} and dtype {plain.dtype} in "
                             f"{run_folder.arrays_path(folder, KIND)}, found it otherwise, or not "
                             "at all.")
        there = jax.numpy.asarray(arrays[name])
        return jax.random.wrap_key_data(there, impl=jax.random.key_impl(value)) if key else there

    return jax.tree_util.tree_map_with_path(leaf, like)


def _size(tree) -> tuple[str, str]:
    """The largest finite absolute value of a tree's floats, and how many are not finite."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(jax.device_get(tree))
              if jax.numpy.issubdtype(leaf.dtype, jax.numpy.inexact)]
    largest = max((np.abs(leaf[np.isfinite(leaf)]).max(initial=0) for leaf in leaves), default=0)
    wrong, size = (sum(int(number) for number in numbers) for numbers in (
        [(~np.isfinite(leaf)).sum() for leaf in leaves], [leaf.size for leaf in leaves]))
    return f"{largest:.4g}", f"{wrong} of {size}" if wrong else "none"


def _columns(rows) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *(
        cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
        for row in rows]
