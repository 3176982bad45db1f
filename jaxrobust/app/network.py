"""What a run's network takes and gives: with its weights, all that it takes to use the run."""

import json
import pathlib
from typing import NamedTuple

from jaxrobust.app import run_folder
from jaxrobust.app.config import InputError
from jaxrobust.data import Dataset

PREPROCESSING = (
    "Image files: turned as their EXIF tag says; RGB, or grey for one channel; resized, not "
    "cropped, to the image shape by Pillow's bilinear filter with antialiasing. Pixels: bytes / "
    "255, less mean, over std, by channel.")
"""In words, for those who use the weights elsewhere; :func:`jaxrobust.data.read_image` does it."""


class Network(NamedTuple):
    """What is to be known of a network beside its configuration and its weights."""

    image_shape: tuple[int, int, int]  # H, W, channels
    class_names: tuple[str, ...]  # in the order of the logits
    mean: tuple[float, ...]  # per channel, of pixels in [0, 1]
    std: tuple[float, ...]  # per channel


def network_of(dataset: Dataset) -> Network:
    """What the networks take and give that are trained on a data set."""
    return Network(*(tuple(getattr(dataset, name)) for name in Network._fields))


def read_network(folder: pathlib.Path) -> Network | None:
    """That of the run in a folder; None of a run from before it was written."""
    values = run_folder.read_facts(folder, "network")
    return values and Network(*(tuple(values[name]) for name in Network._fields))


def check_network(dataset: Dataset, folder: pathlib.Path) -> None:
    """Checks that a run's network is one for this data set.

    The order of the classes counts: it is that of the logits. Runs from before ``network.json`` on
    a folder of images, which have a ``split.csv`` alone, had it by letters, 10 before 2.

    Raises:
      InputError: (a ValueError) if its images, classes, their order or normalisation are others.
    """
    there, given = read_network(folder), network_of(dataset)
    if there is None and run_folder.read_split(folder) is not None:
        there = given._replace(class_names=tuple(sorted(given.class_names)))
    for name in Network._fields if there is not None else ():
        if getattr(there, name) != getattr(given, name):
            raise InputError(
                f"{folder} was trained with {name}={json.dumps(getattr(there, name))}, but "
                f"{dataset.name} has {json.dumps(getattr(given, name))}.")


def save_network(dataset: Dataset, folder: pathlib.Path) -> None:
    """Writes ``network.json`` into the folder of a run on this data set, if it is not there."""
    if read_network(folder) is None:
        run_folder.write_facts(folder, "network", {
            **network_of(dataset)._asdict(), "preprocessing": PREPROCESSING})
