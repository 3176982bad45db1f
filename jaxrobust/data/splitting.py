"""Stratified random splits of a data set."""

import numpy as np

from jaxrobust import _validate
from jaxrobust.data.types import Split, StoredImages


def split_off(
    split: Split, size: int, *, seed: int, groups: np.ndarray | None = None, name: str = "size"
) -> tuple[Split, Split]:
    """Splits off a stratified random share, such as a validation split.

    Args:
      split: what to divide, N examples.
      size: examples to split off, in [1, N).
      seed: of the draw.
      groups: [N] integers, equal for examples that must stay together, such as copies of one
        image. The share is then drawn among the first examples of the groups, as large a part of
        these as ``size`` is of N, and the others follow.
      name: of the size, in messages.

    Returns:
      ``(the rest, the share)``, both in their original order. Stored images are not read.

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
    """The sorted rows that :func:`split_off` keeps, and those that it splits off."""
    labels = np.asarray(labels)
    _validate.shapes(labels=(labels, "N"))
    if not np.issubdtype(labels.dtype, np.integer):
        raise _validate.InputError(f"Expected labels of an integer dtype, got {labels.dtype}.")
    _validate.in_range("seed", _validate.integer("seed", seed, 0), 0, 2**32)
    _validate.in_range(name, size, 1, len(labels))
    size = _validate.integer(name, size, 1)
    if groups is None:
        return _stratified(labels, size, seed, name)
    first, group_of = np.unique(groups, return_index=True, return_inverse=True)[1:]
    order = np.argsort(first)  # The first examples in their order, as if there were no others.
    share = min(max(1, round(size * len(first) / len(labels))), len(first) - 1)
    if len(first) == 1:
        raise _validate.InputError(
            f"Expected {name}={size} to leave every class of {len(labels)} examples on both sides, "
            "got copies of one image.")
    taken = np.isin(group_of, order[_stratified(labels[first[order]], share, seed, name)[1]])
    return np.flatnonzero(~taken), np.flatnonzero(taken)


def _stratified(
    labels: np.ndarray, size: int, seed: int, name: str
) -> tuple[np.ndarray, np.ndarray]:
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
    for side in (kept, taken):  # The share of a small class may be rounded to none.
        absent = np.setdiff1d(labels, labels[side])
        if absent.size:
            raise _validate.InputError(f"{expected}, got one side without class {absent[0]}.")
    return np.sort(kept), np.sort(taken)


def take_rows(split: Split, rows: np.ndarray) -> Split:
    """The examples in these rows, in their order; stored images are not read."""
    stored = isinstance(split.images, StoredImages)
    return Split(split.images.take(rows) if stored else split.images[rows], split.labels[rows])
