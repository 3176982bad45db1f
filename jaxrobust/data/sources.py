"""Data sets by name: scikit-learn's digits, CIFAR-10 and SVHN through TFDS, image folders."""

import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxrobust import _validate
from jaxrobust.data.folders import FOLDER_PREFIX, load_folder
from jaxrobust.data.splitting import split_off
from jaxrobust.data.types import READ_AT_ONCE, Dataset, Split, StoredImages, read_named


def default_data_dir() -> pathlib.Path:
    """The folder of TensorFlow Datasets, by TFDS' own rule.

    It is the environment variable ``TFDS_DATA_DIR``, or ``~/tensorflow_datasets`` if that is unset
    or empty.
    """
    return pathlib.Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")


class NotPrepared(_validate.InputError):
    """A data set that TensorFlow Datasets has not prepared in the given folder."""


class _Tfds(NamedTuple):
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool


_TFDS = {
    # The authors' normalisation.
    "cifar10": _Tfds((0.49139968, 0.48215841, 0.44653091), (0.24703223, 0.24348513, 0.26158784),
                     flip=True),
    # Per channel over the 73,257 training images. Appendix H.1 flips SVHN too.
    "svhn_cropped": _Tfds((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), flip=True),
}

DATASETS = ("digits", *_TFDS)
"""Names that :func:`load_dataset` takes."""


def load_dataset(
    name: str, data_dir: str | pathlib.Path | None = None, *, in_memory: bool = True,
    **folder_options: Any,
) -> Dataset:
    """Loads a data set, or opens one that stays on disk.

    ``digits``: 1,797 real 8 x 8 grey images that come with scikit-learn, a stratified fifth
    of them as test set. ``cifar10`` and ``svhn_cropped``: as prepared by TensorFlow Datasets
    in the ``array_record`` format; they are read without TensorFlow and never downloaded here.
    ``folder:PATH``: a folder of images, or a CSV file that lists them, as
    :func:`jaxrobust.data.load_folder` reads it.

    Args:
      name: one of :data:`DATASETS`, or ``folder:`` and a path.
      data_dir: the folder of TensorFlow Datasets; by default :func:`default_data_dir`. The decoded
        images of ``folder:PATH`` are kept in its folder ``image_folders``, unless ``cache_dir``
        names another.
      in_memory: False to leave the images of a prepared data set on disk, as
        :class:`StoredImages`, and read only the labels. ``digits`` is in memory either way.
      **folder_options: of :func:`jaxrobust.data.load_folder`, for ``folder:PATH`` only.

    Raises:
      NotPrepared: (an InputError) for a data set that is not prepared; it names the folder and the
        command that prepares it.
      InputError: (a ValueError) for an unknown name, or a record that cannot be read; and as
        ``load_folder`` does.
    """
    data_dir = default_data_dir() if data_dir is None else data_dir
    _validate.instance("name", name, str)
    if name.startswith(FOLDER_PREFIX):
        path = name.removeprefix(FOLDER_PREFIX)
        if not path:
            raise _validate.InputError(f"Expected a path after dataset={name!r}, got none.")
        cache = {"cache_dir": pathlib.Path(data_dir) / "image_folders"}
        return load_folder(path, in_memory=in_memory, **cache | folder_options)
    _validate.one_of("dataset", name, (*DATASETS, f"{FOLDER_PREFIX}PATH"))
    if folder_options:
        raise _validate.InputError(
            f"Expected {', '.join(folder_options)} only with dataset='{FOLDER_PREFIX}PATH', got "
            f"dataset={name!r}.")
    return _load_digits() if name == "digits" else _load_tfds(name, data_dir, in_memory=in_memory)


def _load_digits() -> Dataset:
    import sklearn.datasets

    digits = sklearn.datasets.load_digits()
    # The pixels are integers from 0 to 16.
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    everything = Split(images, digits.target.astype(np.int32))
    train, test = split_off(everything, 360, seed=0)
    pixels = np.asarray(train.images) / 255
    return Dataset(
        name="digits", train=train, test=test, class_names=tuple("0123456789"),
        mean=(float(pixels.mean()),), std=(float(pixels.std()),), flip=False)


def _load_tfds(name: str, data_dir: str | pathlib.Path, *, in_memory: bool) -> Dataset:
    folder = pathlib.Path(data_dir).expanduser()
    builder = tfds_builder(name, folder)
    if not builder.is_prepared():
        raise NotPrepared(
            f"The data set {name} is not prepared in {folder}. Prepare it with: jaxrobust.data."
            f"tfds_builder({name!r}, {str(folder)!r}).download_and_prepare()")

    def read(split: str) -> Split:
        images, labels = open_tfds(builder, split, f"{name} {split} in {folder}")
        return Split(images[:] if in_memory else images, labels)

    facts = _TFDS[name]
    return Dataset(name=name, train=read("train"), test=read("test"),
                   class_names=tuple(builder.info.features["label"].names),
                   mean=facts.mean, std=facts.std, flip=facts.flip)


def open_tfds(builder: Any, split: str, name: str) -> Split:
    """A split with its images stored; only the labels are decoded."""
    import tensorflow_datasets as tfds

    records = builder.as_data_source(
        split=split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)

    def reader(feature: str) -> Callable[[list[int]], list[Any]]:
        # Data sources do not decode partially, but a subset of the features can decode itself.
        part = tfds.features.FeaturesDict({feature: builder.info.features[feature]})
        return lambda positions: [part.deserialize_example_np(record)[feature]
                                  for record in records.__getitems__(positions)]

    read_labels = reader("label")
    every = list(range(len(records)))
    labels = [read_named(read_labels, every[first : first + READ_AT_ONCE],
                          f"label {{}} of {name}")
              for first in range(0, len(every), READ_AT_ONCE)]
    images = StoredImages(
        reader("image"), len(every), builder.info.features["image"].shape, name)
    return Split(images, np.concatenate(labels).astype(np.int32))


def tfds_builder(name: str, folder: str | pathlib.Path) -> Any:
    """Makes the TFDS builder of a data set as array_record, which is read without TensorFlow.

    Raises:
      InputError: (a ValueError) if TensorFlow Datasets is not installed.
    """
    tfds = _validate.installed("tensorflow_datasets", "TensorFlow Datasets", f"The data set {name}",
                               "pip install 'jaxrobust[data]'")
    return tfds.builder(name, data_dir=folder, file_format="array_record")
