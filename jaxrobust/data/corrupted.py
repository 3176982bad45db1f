"""The official files of corrupted and perturbed images: CIFAR-10-C, CIFAR-10-P and their like.

Published numbers use these files; those of :mod:`jaxrobust.corruptions` are generated anew. What
holds images says which it is: ``origin`` is ``"official"`` here and ``"generated"`` there.
"""

import pathlib
from typing import NamedTuple

import numpy as np

from jaxrobust import _validate
from jaxrobust.corruptions import CORRUPTIONS, SEVERITIES
from jaxrobust.data.sources import NotPrepared, default_data_dir, open_tfds, tfds_builder
from jaxrobust.data.types import StoredImages

_TFDS_NAMES = {"glass_blur": "frosted_glass_blur", "elastic_transform": "elastic"}
_LABELS = "labels"


class Corrupted(NamedTuple):
    """Images under one corruption at one severity, on disk, with their labels."""

    images: np.ndarray | StoredImages  # shape=[N, H, W, 3], dtype=uint8; mapped, or stored
    labels: np.ndarray  # shape=[N], dtype=int32
    source: str  # The file, or the data set of TensorFlow Datasets.
    origin: str = "official"


class Perturbed(NamedTuple):
    """Sequences of slightly perturbed images, on disk."""

    images: np.ndarray  # shape=[m, T, H, W, 3], dtype=uint8; mapped
    is_noise: bool  # For jaxrobust.corruptions.flip_rate: no order in time.
    source: str  # The file.
    origin: str = "official"


def load_corrupted(folder: str | pathlib.Path, name: str, severity: int) -> Corrupted:
    """Opens one corruption of CIFAR-10-C, or of any set in its format, at one severity.

    The folder has ``NAME.npy``, uint8 [5*N, H, W, 3] with the severities one after the other, and
    ``labels.npy``, integers [5*N]: https://zenodo.org/records/2535967, unpacked. Images are mapped
    into memory and read when they are used.

    Args:
      folder: the path of the folder.
      name: one of :data:`jaxrobust.corruptions.CORRUPTIONS`.
      severity: 1 to 5.

    Raises:
      InputError: (a ValueError) if the name or severity is none of those, or a file is missing,
        cannot be read, or is not of that shape and dtype.
    """
    _check(name, severity)
    path = pathlib.Path(folder).expanduser()
    images = _open(path / f"{name}.npy", "5*N H W 3", 4)
    labels = _open(path / f"{_LABELS}.npy", "5*N", 1)
    if len(images) % len(SEVERITIES) or len(labels) != len(images):
        raise _validate.InputError(
            f"Expected {path / name}.npy with as many images at each of {len(SEVERITIES)} "
            f"severities, and as many labels, got {len(images)} images and {len(labels)} labels.")
    number = len(images) // len(SEVERITIES)
    rows = slice((severity - 1) * number, severity * number)
    return Corrupted(images[rows], labels[rows].astype(np.int32), f"{path / name}.npy")


def load_corrupted_tfds(
    name: str, severity: int, data_dir: str | pathlib.Path | None = None
) -> Corrupted:
    """Opens one corruption of CIFAR-10-C at one severity, as TensorFlow Datasets has prepared it.

    That is its ``cifar10_corrupted``, which calls two corruptions ``elastic`` and
    ``frosted_glass_blur``, and has the images in another order.

    Args:
      name: one of :data:`jaxrobust.corruptions.CORRUPTIONS`.
      severity: 1 to 5.
      data_dir: the folder of TensorFlow Datasets, as of :func:`jaxrobust.data.load_dataset`.

    Raises:
      NotPrepared: (an InputError) if it is not prepared; its one line names the folder and what
        prepares it.
      InputError: (a ValueError) if the name or severity is none of those.
    """
    _check(name, severity)
    folder = pathlib.Path(default_data_dir() if data_dir is None else data_dir).expanduser()
    config = f"cifar10_corrupted/{_TFDS_NAMES.get(name, name)}_{severity}"
    builder = tfds_builder(config, folder)
    if not builder.is_prepared():
        raise NotPrepared(
            f"The data set {config} is not prepared in {folder}. Prepare it with: jaxrobust.data."
            f"tfds_builder({config!r}, {str(folder)!r}).download_and_prepare()")
    split = open_tfds(builder, "test", f"{config} in {folder}")
    return Corrupted(split.images, split.labels, f"{config} in {folder}")


def load_perturbed(folder: str | pathlib.Path, name: str) -> Perturbed:
    """Opens one perturbation of CIFAR-10-P, or of any set in its format.

    The folder has ``NAME.npy``, uint8 [m, T, H, W, 3], a sequence of T images of each of m ones:
    https://zenodo.org/records/2535967. Images are mapped into memory and read when they are used.

    Args:
      folder: the path of the folder.
      name: of the perturbation, such as ``translate``; any that the folder has.

    Raises:
      InputError: (a ValueError) if the folder has no such file, or it cannot be read, or is not of
        that shape and dtype.
    """
    path = pathlib.Path(folder).expanduser()
    there = sorted(file.stem for file in path.glob("*.npy") if file.stem != _LABELS)
    if not there:
        raise _validate.InputError(f"Expected files NAME.npy in {path}, found none.")
    _validate.one_of(f"perturbation in {path}", name, there)
    images = _open(path / f"{name}.npy", "m T H W 3", 5)
    return Perturbed(images, "noise" in name, f"{path / name}.npy")


def _check(name: str, severity: int) -> None:
    _validate.one_of("corruption", name, CORRUPTIONS)
    _validate.integer("severity", severity, 1)
    _validate.in_range("severity", severity, 1, SEVERITIES[-1], open_high=False)


def _open(path: pathlib.Path, spec: str, rank: int) -> np.ndarray:
    """The array of a file, mapped into memory."""
    wanted = f"{'integers' if rank == 1 else 'uint8'} [{', '.join(spec.split())}]"
    try:
        array = np.load(path, mmap_mode="r")
    except FileNotFoundError as error:
        raise _validate.InputError(f"Expected {wanted} in {path}, found no such file.") from error
    except (OSError, ValueError, EOFError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise _validate.InputError(f"Cannot read {path}, expected {wanted}: {reason}") from error
    right = (np.issubdtype(array.dtype, np.integer) if rank == 1 else
             array.dtype == np.uint8 and array.shape[-1:] == (3,))
    if array.ndim != rank or not right or 0 in array.shape:
        raise _validate.InputError(
            f"Expected {wanted} in {path}, got {array.dtype} {list(array.shape)}.")
    return array
