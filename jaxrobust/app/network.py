"""Describes the inputs and outputs of a run's network, which its weights alone do not tell."""

import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from jaxrobust.app import run_folder
from jaxrobust.app.config import InputError, check_image_size
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


_PARTS = {"image_shape": (int, "a height, a width and a number of channels"),
          "class_names": (str, "names"), "mean": (int | float, "numbers"),
          "std": (int | float, "numbers")}


def read_network(folder: pathlib.Path) -> Network | None:
    """Reads the description of a run's network; None if its folder holds none.

    Raises:
      InputError: (a ValueError) if it is no such description.
    """
    values = run_folder.read_facts(folder, "network")
    if values is None:
        return None
    path = run_folder.facts_path(folder, "network")
    for name, (kind, expected) in _PARTS.items():
        if not isinstance(values[name], list) or not values[name] or not all(
                isinstance(value, kind) for value in values[name]):
            raise InputError(f"Expected {name} in {path} to be {expected}, got "
                             f"{json.dumps(values[name])}.")
    network = Network(*(tuple(values[name]) for name in Network._fields))
    *size, channels = network.image_shape
    check_image_size(size)  # Or an image of any size would be made.
    if not len(network.mean) == len(network.std) == channels:
        raise InputError(f"Expected a mean and a std in {path} for each of {channels} channels, "
                         f"got {len(network.mean)} and {len(network.std)}.")
    return network


def check_network(dataset: Dataset, folder: pathlib.Path) -> None:
    """Checks that a run's network fits a data set, the order of its classes included."""
    there, given = read_network(folder), network_of(dataset)
    if there is not None and there.class_names != given.class_names:
        raise InputError(f"Expected the classes of {dataset.name} that {folder} was trained with, "
                         f"got {_difference(there.class_names, given.class_names)}.")
    for name in Network._fields:
        if there is not None and getattr(there, name) != getattr(given, name):
            raise InputError(
                f"{folder} was trained with {name}={json.dumps(getattr(there, name))}, but "
                f"{dataset.name} has {json.dumps(getattr(given, name))}.")


def _difference(trained: Sequence[str], given: Sequence[str]) -> str:
    """What differs in the names of classes, or in their order."""
    new = [repr(name) for name in given if name not in trained]
    gone = [repr(name) for name in trained if name not in given]
    if new or gone:
        return f"{len(given)} instead of {len(trained)}, " + " and ".join(
            f"{what} {', '.join(names)}" for what, names in (("new", new), ("without", gone))
            if names)
    index = next(index for index, name in enumerate(trained) if name != given[index])
    return f"another order, with {given[index]!r} instead of {trained[index]!r} as class {index}"


def save_network(dataset: Dataset, folder: pathlib.Path) -> None:
    """Writes ``network.json`` into the folder of a run, unless it is there."""
    if read_network(folder) is None:
        run_folder.write_facts(folder, "network", {
            **network_of(dataset)._asdict(), "preprocessing": PREPROCESSING})
