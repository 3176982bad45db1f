"""Data sets by name: scikit-learn's digits, CIFAR-10 and SVHN through TFDS, image folders."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrobust import _validate


def default_data_dir() -> pathlib.Path:
    """The folder of TensorFlow Datasets: the environment variable ``TFDS_DATA_DIR``, which TFDS
    reads too; ``~/tensorflow_datasets`` if it is not set or empty."""
    return pathlib.Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")


_READ_AT_ONCE = 512  # Records: reading a few of them costs nearly as much as reading many.


class StoredImages:
    """Images that stay where they are stored, and are read and decoded when they are asked for.

    It is indexed as an array along its first axis: ``images[rows]``, with a position, a slice or
    an array of positions, reads those images now and returns them as uint8
    ``[..., H, W, channels]``. Nothing that was read is kept. Nothing turns it into an array by the
    way either: ``np.asarray`` and ``jnp.asarray`` raise, and ``images[:]`` reads everything.

    Args:
      read: takes a list of positions and returns their images, each [H, W, channels] uint8; from
        any thread. If it fails for several, it is asked for each alone.
      size: images there are, N.
      image_shape: (H, W, channels).
      name: of what is stored, for messages.

    Raises:
      InputError: (a ValueError) when images are read, if one cannot be or is not uint8 of
        ``image_shape``; its one line names the image.

    >>> images = StoredImages(lambda positions: [np.full((2, 2, 1), p, np.uint8)
    ...                                          for p in positions], 5, (2, 2, 1), "squares")
    >>> images.shape, images[1:3].shape, images[np.array([4, 0])][:, 0, 0, 0].tolist()
    ((5, 2, 2, 1), (2, 2, 2, 1), [4, 0])
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(
        self, read: Callable[[list[int]], Sequence[np.ndarray]], size: int,
        image_shape: tuple[int, int, int], name: str,
    ):
        self._read = read
        self._positions = np.arange(size)
        self._image_shape = tuple(image_shape)
        self._name = name

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, H, W, channels)."""
        return (len(self), *self._image_shape)

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, rows: Any) -> np.ndarray:
        positions = self._positions[rows]
        images = np.empty((positions.size, *self._image_shape), self.dtype)
        for first in range(0, positions.size, _READ_AT_ONCE):
            part = positions.ravel()[first : first + _READ_AT_ONCE].tolist()
            for row, (position, image) in enumerate(
                    zip(part, _read_named(self._read, part, f"image {{}} of {self._name}"),
                        strict=True), first):
                if image.shape != self._image_shape or image.dtype != self.dtype:
                    raise _validate.InputError(
                        f"Expected image {position} of {self._name} of shape "
                        f"{self._image_shape} and dtype uint8, got {image.shape} {image.dtype}.")
                images[row] = image
        return images.reshape(*positions.shape, *self._image_shape)

    def take(self, rows: Any) -> "StoredImages":
        """The images in these rows, a slice or an array of positions, without reading them."""
        view = StoredImages(self._read, 0, self._image_shape, self._name)
        view._positions = np.atleast_1d(self._positions[rows])
        return view

    def __array__(self, *_, **__):
        raise _validate.InputError(
            f"Expected rows of the stored images of {self._name} to be read, as images[rows], got "
            f"a conversion of all {len(self)} to an array.")

    def __repr__(self) -> str:
        return f"StoredImages({self._name}, shape={self.shape})"


def _read_named(read, positions: list[int], what: str):
    """``read(positions)``; if it fails, one by one, so that the error names the record."""
    try:
        return read(positions)
    except Exception:  # Of any reader. Nothing is passed over: the record at fault fails again.
        return [value for position in positions for value in _read_one(read, position, what)]


def _read_one(read, position: int, what: str):
    try:
        return read([position])
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise _validate.InputError(f"Cannot read {what.format(position)}: {reason}") from error


class Split(NamedTuple):
    """Images with their labels."""

    images: np.ndarray | StoredImages  # shape=[N, H, W, channels], dtype=uint8
    labels: np.ndarray  # shape=[N], dtype=int32; in [0, C)


class File(NamedTuple):
    """The file that one example of a data set was read from."""

    path: str  # Relative to the data set's folder, with forward slashes.
    label: str  # The name of its class.
    split: str  # "train", "validation" or "test".


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set, with what models and augmentation need to know of it.

    Labels are in memory; images are too, or stay stored as :class:`StoredImages`.
    """

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
    validation: Split | None = None
    """Images for choosing an epoch or a setting, where the data set comes with some."""
    files: tuple[File, ...] | None = None
    """Of the training examples in their order, then of those for validation, then of the test
    examples; None where the examples are not files of their own."""
    groups: np.ndarray | None = None
    """[N] integers, equal for training examples that are copies of one image; None if it is not
    known of any."""
    skipped: tuple[str, ...] = ()
    """A line for each file or class that was left out, with the reason."""
    notes: tuple[str, ...] = ()
    """What a user is to know of the data set, a line each."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, channels)."""
        return self.train.images.shape[1:]

    def __post_init__(self):
        for name, split in self.splits.items():
            if not isinstance(split.images, StoredImages):  # These check what they read.
                _validate.images(f"{name} images", split.images)
            _validate.labels(f"{name} labels", split.labels, len(self.class_names))
            _validate.shapes(images=(split.images, "N ..."), labels=(split.labels, "N"))
        if self.groups is not None:
            _validate.shapes(labels=(self.train.labels, "N"), groups=(self.groups, "N"))
        if self.files is not None:
            expected = [name for name, split in self.splits.items() for _ in split.labels]
            if [file.split for file in self.files] != expected:
                validation = "" if self.validation is None else \
                    f"{len(self.validation.labels)} validation and then "
                raise _validate.InputError(
                    f"Expected files of {len(self.train.labels)} training and then {validation}"
                    f"{len(self.test.labels)} test examples, got {len(self.files)} others.")

    @property
    def splits(self) -> dict[str, Split]:
        """The splits there are, by their name in :class:`File`."""
        every = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in every.items() if split is not None}


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


FOLDER_PREFIX = "folder:"
"""What a name starts with that :func:`load_dataset` takes for a folder of images."""


def load_dataset(
    name: str, data_dir: str | pathlib.Path | None = None, *, in_memory: bool = True,
    **folder_options: Any,
) -> Dataset:
    """Loads a data set, or opens one that is to stay on disk.

    ``digits``: 1,797 real 8 x 8 grey images that come with scikit-learn, a stratified fifth
    of them as test set. ``cifar10`` and ``svhn_cropped``: as prepared by TensorFlow Datasets
    in the ``array_record`` format; they are read without TensorFlow and never downloaded here.
    ``folder:PATH``: a folder of images, or a CSV file that lists them, as
    :func:`jaxrobust.data.load_folder` reads it.

    Args:
      name: one of :data:`DATASETS`, or ``folder:`` and a path.
      data_dir: the folder of TensorFlow Datasets; if none is given, what ``TFDS_DATA_DIR`` names
        in the environment, or ``~/tensorflow_datasets``. The decoded images of ``folder:PATH``
        are kept in its folder ``image_folders``, unless ``cache_dir`` names another.
      in_memory: False to leave the images of a prepared data set on disk, as
        :class:`StoredImages`, and read the labels alone. ``digits``, which has no files of its
        own, is in memory either way.
      **folder_options: of :func:`jaxrobust.data.load_folder`, for ``folder:PATH`` alone.

    Raises:
      InputError: (a ValueError) for an unknown name, or a data set that is not prepared; its
        one line names the folder and the command that prepares it. Also for a record that cannot
        be read, which it names; and as ``load_folder`` does.
    """
    data_dir = default_data_dir() if data_dir is None else data_dir
    if name.startswith(FOLDER_PREFIX):
        from jaxrobust.data import folders  # Which builds on this module.

        path = name.removeprefix(FOLDER_PREFIX)
        if not path:
            raise _validate.InputError(f"Expected a path after dataset={name!r}, got none.")
        cache = {"cache_dir": pathlib.Path(data_dir) / "image_folders"}
        return folders.load_folder(path, in_memory=in_memory, **cache | folder_options)
    _validate.one_of("dataset", name, (*DATASETS, f"{FOLDER_PREFIX}PATH"))
    if folder_options:
        raise _validate.InputError(
            f"Expected {', '.join(folder_options)} with a dataset {FOLDER_PREFIX}PATH alone, got "
            f"dataset={name!r}.")
    return _load_digits() if name == "digits" else _load_tfds(name, data_dir, in_memory=in_memory)


def split_off(
    split: Split, size: int, *, seed: int, groups: np.ndarray | None = None, name: str = "size"
) -> tuple[Split, Split]:
    """Splits off a stratified random share, such as a validation split.

    Args:
      split: what to divide, N examples.
      size: examples to split off, in [1, N).
      seed: of the choice.
      groups: [N] integers, equal for examples that are to stay together, such as copies of one
        image. The share is then drawn among the first examples of the groups, and as large a part
        of these as ``size`` is of N; the others follow.
      name: of the size, in messages.

    Returns:
      ``(the rest, the share)``, both in their original order. Stored images stay stored: none
      is read.

    Raises:
      InputError: (a ValueError) if the size is out of range or leaves a class without an
        example on either side.
    """
    kept, taken = split_rows(split.labels, size, seed=seed, groups=groups, name=name)
    return take_rows(split, kept), take_rows(split, taken)


def split_rows(
    labels: np.ndarray, size: int, *, seed: int, groups: np.ndarray | None = None,
    name: str = "size",
) -> tuple[np.ndarray, np.ndarray]:
    """The rows, each sorted, that :func:`split_off` keeps and takes."""
    _validate.in_range(name, size, 1, len(labels))
    if groups is None:
        return _stratified(labels, size, seed, name)
    first, group_of = np.unique(groups, return_index=True, return_inverse=True)[1:]
    order = np.argsort(first)  # As if the other examples were not there.
    share = min(max(1, round(size * len(first) / len(labels))), len(first) - 1)
    if len(first) == 1:
        raise _validate.InputError(
            f"Expected {name}={size} to leave every class of {len(labels)} examples on both sides, "
            "got copies of one image.")
    taken = np.isin(group_of, order[_stratified(labels[first[order]], share, seed, name)[1]])
    return np.flatnonzero(~taken), np.flatnonzero(taken)


def _stratified(labels, size, seed, name):
    import sklearn.model_selection

    rows, counts = np.arange(len(labels)), np.unique(labels, return_counts=True)[1]
    expected = f"Expected {name}={size} to leave every class of {len(rows)} examples on both sides"
    if min(size, len(rows) - size) < len(counts):
        raise _validate.InputError(
            f"{expected}, got {len(counts)} classes and {min(size, len(rows) - size)} examples on "
            "one side.")
    if counts.min() < 2:
        raise _validate.InputError(f"{expected}, got a class with 1 example.")
    kept, taken = sklearn.model_selection.train_test_split(
        rows, test_size=size, random_state=seed, stratify=labels)
    for side in (kept, taken):  # Shares are rounded: that of a small class may be none.
        absent = np.setdiff1d(labels, labels[side])
        if absent.size:
            raise _validate.InputError(f"{expected}, got one side without class {absent[0]}.")
    return np.sort(kept), np.sort(taken)


def take_rows(split: Split, rows: np.ndarray) -> Split:
    """The examples in these rows, in their order; stored images stay stored."""
    stored = isinstance(split.images, StoredImages)
    return Split(split.images.take(rows) if stored else split.images[rows], split.labels[rows])


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


def _load_tfds(name: str, data_dir: str | pathlib.Path, *, in_memory: bool) -> Dataset:
    folder = pathlib.Path(data_dir).expanduser()
    builder = tfds_builder(name, folder)
    if not builder.is_prepared():
        raise _validate.InputError(
            f"The data set {name} is not prepared in {folder}. Prepare it with: "
            f"python -m experiments prepare {name} --data-dir {folder}")

    def read(split):
        images, labels = _open_tfds(builder, split, f"{name} {split} in {folder}")
        return Split(images[:] if in_memory else images, labels)

    facts = _TFDS[name]
    return Dataset(name=name, train=read("train"), test=read("test"),
                   class_names=tuple(builder.info.features["label"].names),
                   mean=facts.mean, std=facts.std, flip=facts.flip)


def _open_tfds(builder, split: str, name: str) -> Split:
    """A split with its images stored; of the records, the labels alone are decoded."""
    import tensorflow_datasets as tfds

    records = builder.as_data_source(
        split=split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)

    def reader(feature):
        # Data sources take no partial decoding, but a part of the features decodes itself alone.
        part = tfds.features.FeaturesDict({feature: builder.info.features[feature]})
        return lambda positions: [part.deserialize_example_np(record)[feature]
                                  for record in records.__getitems__(positions)]

    read_labels = reader("label")
    every = list(range(len(records)))
    labels = [_read_named(read_labels, every[first : first + _READ_AT_ONCE],
                          f"label {{}} of {name}")
              for first in range(0, len(every), _READ_AT_ONCE)]
    images = StoredImages(
        reader("image"), len(every), builder.info.features["image"].shape, name)
    return Split(images, np.concatenate(labels).astype(np.int32))


def tfds_builder(name: str, folder: pathlib.Path):
    """The TFDS builder of a data set stored as array_record, which is read without TensorFlow.

    Raises:
      InputError: (a ValueError) if TensorFlow Datasets is not installed.
    """
    tfds = _validate.installed("tensorflow_datasets", "TensorFlow Datasets", f"The data set {name}",
                               "pip install 'jaxrobust[data]'")
    return tfds.builder(name, data_dir=folder, file_format="array_record")
