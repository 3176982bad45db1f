"""Classifies images with a finished run, and exports its network."""

import json
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from jaxrobust import _validate, data
from jaxrobust.app import files, provenance
from jaxrobust.app.classifiers import ARTEFACT
from jaxrobust.app.config import InputError
from jaxrobust.app.datasets import open_dataset
from jaxrobust.app.doubt import (
    Doubt,
    doubt_of,
    doubt_text,
    load_doubt,
    measure_doubt,
    outputs_of,
)
from jaxrobust.app.execution import batch_size_of
from jaxrobust.app.run_folder import LockedError, read_config
from jaxrobust.app.trainer import TrainedRun, load_run, variables_of, write_weights
from jaxrobust.data.listing import IMAGE_SUFFIXES
from jaxrobust.geometry import directions
from jaxrobust.images import predicted_classes, to_float
from jaxrobust.methods import ROBUST_METHODS
from jaxrobust.models import pytorch

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
"""Platforms that an exported network runs on."""


def load_classifier(
    folder: pathlib.Path, data_dir: pathlib.Path
) -> tuple[TrainedRun, Doubt]:
    """Loads a finished run and its doubt score.

    Needs the run's data set only to measure the score, if it has not been measured. If that is
    impossible, prints why, and the score is :data:`jaxrobust.app.doubt.UNMEASURED`.
    """
    config = read_config(folder)
    run = load_run(folder, config, None)
    if load_doubt(folder).facts is None:
        try:
            dataset = open_dataset(config, data_dir, in_memory=False)
            measure_doubt(load_run(folder, config, dataset), folder)
        except LockedError:
            raise
        except InputError as error:
            print(f"Cannot measure the doubt score: {error}", file=sys.stderr)
    return run, load_doubt(folder)


class Prediction(NamedTuple):
    """The prediction for one image."""

    path: pathlib.Path
    label: str
    probability: float  # of that class
    doubt: float  # the run's doubt score, larger for more doubtful
    doubtful: bool  # whether the score exceeds its threshold; False if it has none


def classify(run: TrainedRun, doubt: Doubt, images: jax.Array) -> dict[str, jax.Array]:
    r"""Applies a run to images [B, H, W, channels], uint8 or in [0, 1].

    Returns:
      ``logits`` and ``probabilities`` [B, C]; ``features`` [B, d]; ``doubt`` [B], the run's score,
      larger for more doubtful; and ``distances`` [B, C] of the features to the centroids of the
      classes, :math:`\|q - m_c\|`, infinite for a class that was never seen; for a run trained with
      ``robust.direction`` the distances of their directions, in [0, 2]. The last two have no
      derivatives.
    """
    outputs: Any = run.model.apply(variables_of(run.state), to_float(images), train=False)
    # Square roots at 0 would make derivatives of the logits NaN.
    logits, features = jax.lax.stop_gradient((outputs.logits, outputs.features))
    centroids = run.state.centroids
    points, means = features, centroids.mean
    if run.config.robust.direction and run.config.method in ROBUST_METHODS:
        points, means = directions(points), directions(means)
    distances = jnp.linalg.norm(points[:, None] - means[None], axis=-1)
    return {"logits": outputs.logits, "probabilities": jax.nn.softmax(outputs.logits),
            "features": outputs.features,
            "doubt": doubt_of(doubt.score, logits, features, doubt.statistics),
            "distances": jnp.where(centroids.seen[None], distances, jnp.inf)}


def files_in(places: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """Lists image files: those named, and those in the folders named and in folders inside these,
    sorted.

    Raises:
      InputError: (a ValueError) if a folder holds none.
    """
    found = []
    for place in places:
        inside = [place] if not place.is_dir() else sorted(
            path for path in place.rglob("[!.]*")
            if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
        if not inside:
            raise InputError(f"Expected image files in {place}, found none.")
        found += inside
    return found


def predict_files(
    run: TrainedRun, doubt: Doubt, paths: Sequence[pathlib.Path]
) -> Iterator[Prediction]:
    """Classifies image files, resized to the size that the run was trained with.

    A batch of them is in memory at a time.

    Raises:
      InputError: (a ValueError) if there are none; when it comes to them, if one cannot be read, or
        logits are not finite.
    """
    _validate.in_range("number of images", len(paths), 1)
    size = min(batch_size_of(np.empty((0, *run.network.image_shape))), len(paths))
    return (one for first in range(0, len(paths), size)
            for one in _predict_batch(run, doubt, paths[first : first + size], size))


def _predict_batch(run, doubt, paths, size):
    """The predictions for up to ``size`` files, filled up to so many for one compiled program."""
    height, width, channels = run.network.image_shape
    images = np.stack([data.read_image(path, (height, width), channels) for path in paths])
    filled = np.concatenate([images, np.repeat(images[-1:], size - len(images), axis=0)])
    logits, features = (rows[: len(paths)] for rows in outputs_of(run, filled))
    broken = [str(path) for path, row in zip(paths, logits, strict=True)
              if not np.isfinite(row).all()]
    if broken:
        raise InputError(f"Expected finite logits, got NaN or infinite ones for {len(broken)} of "
                         f"{len(paths)} images: {', '.join(broken)}.")
    doubts = np.asarray(doubt_of(doubt.score, logits, features, doubt.statistics))
    threshold = np.inf if doubt.facts is None else doubt.facts["threshold"]
    best, probabilities = np.asarray(predicted_classes(logits)), jax.nn.softmax(logits)
    return [Prediction(path, run.network.class_names[index], float(row[index]), float(score),
                       bool(score > threshold))
            for path, index, row, score in zip(paths, best, probabilities, doubts, strict=True)]


def table_lines(
    predictions: Iterable[Prediction], paths: Sequence[pathlib.Path], class_names: Sequence[str],
    doubt: Doubt,
) -> Iterator[str]:
    """Formats the predictions for ``paths`` as a table with path, class, probability and doubt, a
    line at a time; then describes the doubt score."""
    heads = ("image", "class", "probability", "doubt", "")
    widths = [max(len(heads[0]), *(len(str(path)) for path in paths)),
              max(len(heads[1]), *map(len, class_names)), len(heads[2]), len("-1.234e-05"), 0]

    def line(cells):
        return "  ".join(
            cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()

    yield line(heads)
    for one in predictions:
        yield line((str(one.path), one.label, f"{one.probability:.4f}", f"{one.doubt:.4g}",
                    "doubtful" if one.doubtful else ""))
    yield doubt_text(doubt)


def require_exportable(path: pathlib.Path) -> None:
    """Raises InputError unless a network can be written to this path."""
    _validate.one_of("suffix", path.suffix, (ARTEFACT, *pytorch.SUFFIXES, ".npz"))
    files.require_writable_file(path)


def export_weights(run: TrainedRun, path: pathlib.Path) -> None:
    """Writes the weights of a run's network.

    ``.safetensors``, ``.pth``: in PyTorch's names and layout. ``.npz``: under Flax's names; see
    :func:`jaxrobust.app.trainer.write_weights`.
    """
    if path.suffix == ".npz":
        files.make_folder(path.parent)
        write_weights(run, path)
        return
    state_dict = pytorch.to_torch_state_dict(run.model, jax.device_get(variables_of(run.state)))
    files.make_folder(path.parent)
    with files.writing(path):
        pytorch.write_state_dict(path, state_dict)


def export_run(run: TrainedRun, doubt: Doubt, path: pathlib.Path) -> None:
    """Writes a run's classifier for use without this package.

    It is :func:`classify` of float32 images in [0, 1] as serialised by ``jax.export``, with its
    first derivatives, normalisation and weights, for any number of images, on any of
    :data:`PLATFORMS`; beside it ``.json`` with the inputs, the outputs and the names of the
    classes.
    """
    shape = run.network.image_shape
    batch, = jax.export.symbolic_shape("b")
    exported = jax.export.export(
        jax.jit(lambda images: classify(run, doubt, images)), platforms=PLATFORMS)(
            jax.ShapeDtypeStruct((batch, *shape), jnp.float32))
    files.make_folder(path.parent)
    with files.replacing(path) as partial:
        partial.write_bytes(exported.serialize(vjp_order=1))
    files.write_text(path.with_suffix(".json"), json.dumps({
        "input": {"shape": ["b", *shape], "dtype": "float32", "values": "RGB or grey, in [0, 1]"},
        "output": {name: ["b", *output.shape[1:]] for name, output in zip(
            ("distances", "doubt", "features", "logits", "probabilities"), exported.out_avals,
            strict=True)},
        "doubt": {"what": doubt_text(doubt), **(doubt.facts or {})},
        "class_names": list(run.network.class_names),
        "use": "jax.export.deserialize(open(path, 'rb').read()).call(images)",
        "epoch": run.epoch, "provenance": provenance.describe()}, indent=2) + "\n")
