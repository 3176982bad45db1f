"""Describes the inputs and outputs of a run's network, which its weights alone do not tell."""

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
"""For those who use the weights elsewhere; :func:`jaxrobust.data.read_image` does it here."""


class Network(NamedTuple):
    """What it takes to use a network beside its configuration and its weights."""

    image_shape: tuple[int, int, int]  # H, W, channels
    class_names: tuple[str, ...]  # in the order of the logits
    mean: tuple[float, ...]  # per channel, of pixels in [0, 1]
    std: tuple[float, ...]  # per channel


def network_of(dataset: Dataset) -> Network:
    """The description of a network that is trained on a data set."""
    return Network(*(tuple(getattr(dataset, name)) for name in Network._fields))


def read_network(folder: pathlib.Path) -> Network | None:
    """Reads the description of a run's network; None if its folder holds none."""
    values = run_folder.read_facts(folder, "network")
    return values and Network(*(tuple(values[name]) for name in Network._fields))


def check_network(dataset: Dataset, folder: pathlib.Path) -> None:
    """Checks that a run's network fits a data set, the order of its classes included."""
    there, given = read_network(folder), network_of(dataset)
    for name in Network._fields:
        if there is not None and getattr(there, name) != getattr(given, name):
            raise InputError(
                f"{folder} was trained with {name}={json.dumps(getattr(there, name))}, but "
                f"{dataset.name} has {json.dumps(getattr(given, name))}.")


def save_network(dataset: Dataset, folder: pathlib.Path) -> None:
    """Writes ``network.json`` into the folder of a run, unless it is there."""
    if read_network(folder) is None:
        run_folder.write_facts(folder, "network", {
            **network_of(dataset)._asdict(), "preprocessing": PREPROCESSING})
