"""Data sets by name: scikit-learn's digits, and CIFAR-10 and SVHN through TFDS."""

import dataclasses
import pathlib
from typing import NamedTuple

import numpy as np

from jaxrobust import _validate

DEFAULT_DATA_DIR = "~/tensorflow_datasets"


class Split(NamedTuple):
    """Images with their labels."""

    images: np.ndarray  # shape=[N, H, W, channels], dtype=uint8
    labels: np.ndarray  # shape=[N], dtype=int32; in [0, C)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set in memory, with what models and augmentation need to know of it."""

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    """Per channel, of pixels in [0, 1]."""
    std: tuple[float, ...]
    """Per channel."""
    flip: bool
    """Whether a mirrored image keeps its class."""

    def __post_init__(self):
        for name, split in (("train", self.train), ("test", self.test)):
            _validate.images(f"{name} images", split.images)
            _validate.labels(f"{name} labels", split.labels, len(self.class_names))
            _validate.shapes(images=(split.images, "N ..."), labels=(split.labels, "N"))


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


def load_dataset(name: str, data_dir: str | pathlib.Path = DEFAULT_DATA_DIR) -> Dataset:
    """Loads a data set into memory.

    ``digits``: 1,797 real 8 x 8 grey images that come with scikit-learn, a stratified fifth
    of them as test set. ``cifar10`` and ``svhn_cropped``: as prepared by TensorFlow Datasets
    in the ``array_record`` format; they are read without TensorFlow and never downloaded here.

    Args:
      name: one of :data:`DATASETS`.
      data_dir: the folder of TensorFlow Datasets.

    Raises:
      InputError: (a ValueError) for an unknown name, or a data set that is not prepared; its
        one line names the folder and the command that prepares it.
    """
    _validate.one_of("dataset", name, DATASETS)
    return _load_digits() if name == "digits" else _load_tfds(name, data_dir)


def split_off(split: Split, size: int, *, seed: int) -> tuple[Split, Split]:
    """Splits off a stratified random share, such as a validation split.

    Args:
      split: what to divide, N examples.
      size: examples to split off, in [1, N).
      seed: of the choice.

    Returns:
      ``(the rest, the share)``, both in their original order.

    Raises:
      InputError: (a ValueError) if the size is out of range or leaves a class without an
        example on either side.
    """
    import sklearn.model_selection

    positions = np.arange(len(split.labels))
    _validate.in_range("size", size, 1, len(positions))
    try:
        kept, taken = sklearn.model_selection.train_test_split(
            positions, test_size=size, random_state=seed, stratify=split.labels)
    except ValueError as error:
        raise _validate.InputError(
            f"Expected size={size} to leave every class of {len(positions)} examples on both "
            f"sides: {error}") from error
    kept, taken = np.sort(kept), np.sort(taken)
    return (Split(split.images[kept], split.labels[kept]),
            Split(split.images[taken], split.labels[taken]))


def _load_digits() -> Dataset:
    import sklearn.datasets

    digits = sklearn.datasets.load_digits()
    # The pixels are integers from 0 to 16.
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    everything = Split(images, digits.target.astype(np.int32))
    train, test = split_off(everything, 360, seed=0)
    pixels = train.images / 255
    return Dataset(
        name="digits", train=train, test=test, class_names=tuple("0123456789"),
        mean=(float(pixels.mean()),), std=(float(pixels.std()),), flip=False)


def _load_tfds(name: str, data_dir: str | pathlib.Path) -> Dataset:
    folder = pathlib.Path(data_dir).expanduser()
    builder = tfds_builder(name, folder)
    if not builder.is_prepared():
        raise _validate.InputError(
            f"The data set {name} is not prepared in {folder}. Prepare it with: "
            f"python -m experiments prepare {name} --data-dir {folder}")

    def read(split):
        source = builder.as_data_source(split=split)
        examples = [source[index] for index in range(len(source))]
        return Split(np.stack([example["image"] for example in examples]),
                     np.array([example["label"] for example in examples], np.int32))

    facts = _TFDS[name]
    return Dataset(name=name, train=read("train"), test=read("test"),
                   class_names=tuple(builder.info.features["label"].names),
                   mean=facts.mean, std=facts.std, flip=facts.flip)


def tfds_builder(name: str, folder: pathlib.Path):
    """The TFDS builder of a data set stored as array_record, which is read without TensorFlow.

    Raises:
      InputError: (a ValueError) if TensorFlow Datasets is not installed.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise _validate.InputError(
            f"The data set {name} needs TensorFlow Datasets ({error}). Install it with: "
            "pip install 'jaxrobust[data]'") from error
    return tfds.builder(name, data_dir=folder, file_format="array_record")
