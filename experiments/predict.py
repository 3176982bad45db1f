"""Classifies images with a finished run, and exports the run's network."""

import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from experiments import runs
from experiments.evaluation import batch_size_of
from experiments.training import TrainedRun, variables_of
from jaxrobust import _validate, data, evaluation
from jaxrobust.data.augment import to_float
from jaxrobust.models import pytorch

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
"""That an exported network runs on."""


class Prediction(NamedTuple):
    """Of one image."""

    path: pathlib.Path
    label: str
    probability: float  # of that class
    distance: float  # of the features to that class's centroid


def classify(run: TrainedRun, images: jax.Array) -> dict[str, jax.Array]:
    r"""What a run says of images [B, H, W, channels], uint8 or in [0, 1].

    Returns:
      ``probabilities`` [B, C], and ``distances`` [B, C] of the features to the centroids of the
      classes, :math:`\|q - m_c\|`, infinite for a class that was never seen.
    """
    outputs = run.model.apply(variables_of(run.state), to_float(images), train=False)
    centroids = run.state.centroids
    distances = jnp.linalg.norm(outputs.features[:, None] - centroids.mean[None], axis=-1)
    return {"probabilities": jax.nn.softmax(outputs.logits),
            "distances": jnp.where(centroids.seen[None], distances, jnp.inf)}


def predict_files(run: TrainedRun, paths: Sequence[pathlib.Path]) -> list[Prediction]:
    """The class of each image file; it is resized to the size that the run was trained with.

    Raises:
      InputError: (a ValueError) if there is no file, or one cannot be read.
    """
    _validate.in_range("number of images", len(paths), 1)
    *image_size, channels = run.dataset.train.images.shape[1:]
    images = np.stack([data.read_image(path, tuple(image_size), channels) for path in paths])
    found = evaluation.map_batches(
        jax.jit(lambda rows: classify(run, rows)), images, batch_size=batch_size_of(images))
    best = np.argmax(found["probabilities"], axis=1)
    return [Prediction(path, run.dataset.class_names[index], float(probabilities[index]),
                       float(distances[index]))
            for path, index, probabilities, distances in zip(
                paths, best, found["probabilities"], found["distances"], strict=True)]


def table_text(predictions: Sequence[Prediction]) -> str:
    """Predictions as lines: path, class, probability, distance."""
    rows = [("image", "class", "probability", "distance to the class centroid")]
    rows += [(str(one.path), one.label, f"{one.probability:.4f}", f"{one.distance:.4g}")
             for one in predictions]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
                     .rstrip() for row in rows)


def require_exportable(path: pathlib.Path) -> None:
    """Raises InputError unless a network can be written to this path."""
    _validate.one_of("suffix", path.suffix, (".stablehlo", *pytorch.SUFFIXES))
    runs.require_writable_file(path)


def export_run(run: TrainedRun, path: pathlib.Path) -> None:
    """Writes a run's network for use without this package.

    ``.stablehlo``: a serialised ``jax.export`` artefact of :func:`classify`, normalisation and
    weights inside, for any number of images, on any of :data:`PLATFORMS`; beside it ``.json`` with
    the names of the classes and what goes in and out. ``.safetensors``, ``.pth``: the weights, in
    PyTorch's names and layout.

    Raises:
      InputError: (a ValueError) for another suffix, a file that cannot be written, or a network
        of which PyTorch's names are not known.
    """
    require_exportable(path)
    runs.make_folder(path.parent)
    if path.suffix in pytorch.SUFFIXES:
        state_dict = pytorch.to_torch_state_dict(
            run.model, jax.device_get(variables_of(run.state)))
        with runs.writing(path):
            pytorch.write_state_dict(path, state_dict)
        return
    shape = run.dataset.train.images.shape[1:]
    batch, = jax.export.symbolic_shape("b")
    exported = jax.export.export(
        jax.jit(lambda images: classify(run, images)), platforms=PLATFORMS)(
            jax.ShapeDtypeStruct((batch, *shape), jnp.uint8))
    with runs.replacing(path) as partial:
        partial.write_bytes(exported.serialize())
    runs.write_text(path.with_suffix(".json"), json.dumps({
        "input": {"shape": ["b", *shape], "dtype": "uint8", "values": "RGB or grey, 0 to 255"},
        "output": {"probabilities": ["b", len(run.dataset.class_names)],
                   "distances": ["b", len(run.dataset.class_names)]},
        "class_names": list(run.dataset.class_names),
        "use": "jax.export.deserialize(open(path, 'rb').read()).call(images)",
        "epoch": run.epoch, "provenance": runs.provenance()}, indent=2) + "\n")
