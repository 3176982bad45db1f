"""Data sets: images, in memory or stored, with their labels and files."""

import csv
import dataclasses
import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np

from jaxrobust import _validate
from jaxrobust._errors import reason_of
from jaxrobust.data.listing import shown

Value = TypeVar("Value")

READ_AT_ONCE = 512  # Records. Reading a few of them costs nearly as much as reading many.


class StoredImages:
    """Images that stay where they are stored, and are read and decoded on access.

    It is indexed like an array along its first axis: ``images[rows]``, with a position, a slice or
    an array of positions, reads those images and returns them as uint8 ``[..., H, W, channels]``.
    Nothing is cached. To avoid reading everything by accident, ``np.asarray`` and ``jnp.asarray``
    raise; ``images[:]`` reads everything.

    Args:
      read: takes a list of positions and returns their images, each [H, W, channels] uint8; from
        any thread. If it fails for several, it is called for each.
      size: N, the number of images.
      image_shape: (H, W, channels).
      name: of what is stored, for messages.

    Raises:
      InputError: (a ValueError) on access, if an image cannot be read or is not uint8 of
        ``image_shape``; it names the image.

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
    ) -> None:
        self._read = read
        self._positions = np.arange(size)
        self._image_shape: tuple[int, int, int] = (*image_shape,)
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
        for first in range(0, positions.size, READ_AT_ONCE):
            part = positions.ravel()[first : first + READ_AT_ONCE].tolist()
            for row, (position, image) in enumerate(
                    zip(part, read_named(self._read, part, f"image {{}} of {self._name}"),
                        strict=True), first):
                if image.shape != self._image_shape or image.dtype != self.dtype:
                    raise _validate.InputError(
                        f"Expected image {position} of {self._name} of shape "
                        f"{self._image_shape} and dtype uint8, got {image.shape} {image.dtype}.")
                images[row] = image
        return images.reshape(*positions.shape, *self._image_shape)

    def take(self, rows: Any) -> "StoredImages":
        """Selects the images in these rows, a slice or an array, without reading them."""
        view = StoredImages(self._read, 0, self._image_shape, self._name)
        view._positions = np.atleast_1d(self._positions[rows])
        return view

    def __array__(self, *_: Any, **__: Any) -> NoReturn:
        raise _validate.InputError(
            f"Expected rows of the stored images of {self._name} to be read, as images[rows], got "
            f"a conversion of all {len(self)} to an array.")

    def __repr__(self) -> str:
        return f"StoredImages({self._name}, shape={self.shape})"


def read_named(
    read: Callable[[list[int]], Sequence[Value]], positions: list[int], what: str
) -> Sequence[Value]:
    """Reads the positions together or, if that fails, one by one, to name the bad record."""
    try:
        return read(positions)
    except Exception:  # A reader may raise anything; the bad record fails again.
        return [value for position in positions for value in _read_one(read, position, what)]


def _read_one(
    read: Callable[[list[int]], Sequence[Value]], position: int, what: str
) -> Sequence[Value]:
    try:
        return read([position])
    except Exception as error:
        raise _validate.InputError(
            f"Cannot read {what.format(position)}: {reason_of(error)}") from error


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
    """A data set, with what models and augmentation need to know about it.

    Labels are in memory; images are too, or are :class:`StoredImages`.
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
    """Images for choosing an epoch or a setting, if the data set comes with some."""
    files: tuple[File, ...] | None = None
    """Files of the training examples in their order, then of those for validation, then of the
    test examples; None if the examples are not files of their own."""
    groups: np.ndarray | None = None
    """[N] integers, equal for training examples that are copies of one image; None if unknown."""
    skipped: tuple[str, ...] = ()
    """A line for each file or class that was left out, with the reason."""
    notes: tuple[str, ...] = ()
    """What a user should know about the data set, a line each."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, channels)."""
        return self.train.images.shape[1:]

    def __post_init__(self) -> None:
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
        """The splits that exist, by their name in :class:`File`."""
        every = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in every.items() if split is not None}


def files_to_csv(files: Iterable[File]) -> str:
    """Writes the files of a data set as CSV text with the columns ``path,label,split``.

    >>> files_to_csv([File("cats/1.png", "cats", "train")])
    'path,label,split\\ncats/1.png,cats,train\\n'
    """
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([File._fields, *files])
    return text.getvalue()


def files_from_csv(text: str) -> tuple[File, ...]:
    """Reads what :func:`files_to_csv` wrote.

    Raises:
      InputError: (a ValueError) if the text has other columns, or a row is incomplete.
    """
    _validate.instance("text", text, str)
    header, *rows = list(csv.reader(io.StringIO(text, newline=""))) or [[]]
    if tuple(header) != File._fields:
        raise _validate.InputError(
            f"Expected the columns {','.join(File._fields)}, got {','.join(header)}.")
    for number, row in enumerate(rows, 1):
        if len(row) != len(File._fields):
            raise _validate.InputError(
                f"Expected {len(File._fields)} columns in row {number}, got {len(row)}.")
    return tuple(File(*row) for row in rows)


def check_same_files(saved: Iterable[File], current: Iterable[File], name: str) -> None:
    """Raises InputError unless both are the same files with the same classes and split.

    Args:
      saved: the files that a model was trained and tested on.
      current: the files now.
      name: of the data set, for the message.
    """
    saved, current = ({file.path: file for file in files} for files in (saved, current))
    new, gone = current.keys() - saved.keys(), saved.keys() - current.keys()
    moved = {path for path in current.keys() & saved.keys() if current[path] != saved[path]}
    if new or gone or moved:
        raise _validate.InputError(
            f"Expected the images of {name} to be unchanged, got {len(new)} new, {len(gone)} gone "
            f"and {len(moved)} moved to another class or side of the split, the first "
            f"{shown(min(new | gone | moved))}.")
