"""Opens the data set of a run, and records its files in the folder of the run."""

import contextlib
import functools
import hashlib
import json
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust import data
from jaxrobust.app import files, run_folder
from jaxrobust.app.config import FOLDER_OPTIONS, InputError, RunConfig
from jaxrobust.app.progress import Progress, progress
from jaxrobust.data import Dataset
from jaxrobust.perturbations import parse_perturbation

SHAPES = {"digits": (8, 8, 1), "cifar10": (32, 32, 3), "svhn_cropped": (32, 32, 3)}
"""Height, width and channels of the images, by name of the data set."""


def check_perturbations(config: RunConfig, texts: Sequence[str]) -> None:
    """Checks that a run's images are large enough for its own perturbation and those of its tests.

    Commands call it before they open the data set, which may take minutes.
    """
    shape = SHAPES.get(config.dataset, (*config.image_size, 3))
    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    for text in (*texts, *([] if config.perturb is None else [config.perturb])):
        try:
            jax.eval_shape(parse_perturbation(text), jax.random.key(0), image)
        except InputError as error:
            raise InputError(f"{error} It is in perturbation={text!r}, for images of "
                             f"{config.dataset}.") from error


def open_dataset(config: RunConfig, data_dir: pathlib.Path, *, in_memory: bool = True) -> Dataset:
    """Opens the data set that a configuration names; runs with the same data set share its memory.

    ``in_memory`` does not apply to a folder of images, which are read from a file of decoded images
    that the system caches. Prints which files of a folder are skipped, and other notes.
    """
    if not config.dataset.startswith(data.FOLDER_PREFIX):
        return _load(config.dataset, data_dir, in_memory)
    return _load_folder(config.dataset, config.image_size, config.split_seed, data_dir,
                        **{name: getattr(config, name) for name in FOLDER_OPTIONS})


@functools.cache
def _load(name, data_dir, in_memory):
    try:
        return data.load_dataset(name, data_dir, in_memory=in_memory)
    except data.NotPrepared as error:
        folder = pathlib.Path(data_dir).expanduser()
        raise InputError(f"The data set {name} is not prepared in {folder}. Prepare it with: "
                         f"jaxrobust prepare {name} --data-dir {folder}") from error


@functools.cache
def _load_folder(name, image_size, split_seed, data_dir, **options):
    shown: list[Progress] = []
    with contextlib.ExitStack() as stack:

        def decoded(done, total):
            if not shown:  # Not before: all images may already be decoded.
                shown.append(stack.enter_context(progress("decode", total)))
            shown[0].advance()

        dataset = data.load_dataset(
            name, data_dir, in_memory=False, image_size=image_size, split_seed=split_seed,
            progress=decoded, **options)
    for line in dataset.skipped:
        files.say(f"Skipped: {line}")
    if dataset.skipped:
        files.say(f"Skipped {len(dataset.skipped)} in all.")
    for line in dataset.notes:
        files.say(f"Note: {line}")
    return dataset


FINGERPRINTED = 64
"""Images of each split, at equal distances, that enter :func:`fingerprint`."""


def fingerprint(dataset: Dataset) -> str:
    """Computes a SHA-256 of a data set's classes, labels, and :data:`FINGERPRINTED` images of each
    split."""
    digest = hashlib.sha256(json.dumps([dataset.class_names, dataset.mean, dataset.std]).encode())
    for name, split in dataset.splits.items():
        rows = np.unique(np.linspace(0, len(split.labels) - 1, FINGERPRINTED).astype(int))
        for array in (split.labels, split.images[rows]):
            digest.update(f"{name} {array.shape} {array.dtype}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def check_files(dataset: Dataset, folder: pathlib.Path) -> None:
    """Checks that the files of a run's data set are those it was trained with."""
    there = run_folder.read_split(folder)
    if dataset.files is not None and there is not None:
        data.check_same_files(data.files_from_csv(there), dataset.files,
                              f"{dataset.name}, with which {folder} was trained,")


def save_files(dataset: Dataset, folder: pathlib.Path) -> None:
    """Writes ``split.csv``: path, class, and training or test, for every image of a folder."""
    if dataset.files is not None:
        run_folder.write_split(folder, data.files_to_csv(dataset.files))
