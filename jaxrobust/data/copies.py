"""Detection of copies of one image among the files of a data set."""

import hashlib
from collections.abc import Sequence

import numpy as np

SIDE = 16
"""Height and width of a thumbnail."""
MOST_COMPARED = 5_000
"""The largest number of images whose pairs are compared to find near copies."""
_ALIKE = 0.99
_FLAT = 2.0  # Grey levels.


def digest_of(image: np.ndarray) -> str:
    """A digest of the pixels [H, W, 3], equal for equal ones."""
    return hashlib.sha256(np.ascontiguousarray(image).data).hexdigest()[:32]


def thumbnail_of(image: np.ndarray) -> bytes:
    """The image [H, W, 3] in 16 x 16 levels of grey, each the mean of its part: 256 bytes."""
    from PIL import Image

    small = Image.fromarray(image).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    return small.tobytes()


def groups_of(digests: Sequence[str]) -> np.ndarray:
    """[N] integers, equal for copies; they count up in the order in which images first appear."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(digest, len(numbers)) for digest in digests], np.int32)


def near_copies(thumbnails: Sequence[bytes]) -> np.ndarray:
    """Finds pairs of images that are nearly the same, [P, 2], each (first, second), in order.

    Their thumbnails correlate by more than 0.99, as they do for one photograph at two sizes or two
    qualities of JPEG. Images without contrast, with a standard deviation below 2 grey levels,
    correlate with nothing. All N (N - 1) / 2 pairs are compared.
    """
    grey = np.frombuffer(b"".join(thumbnails), np.uint8).reshape(-1, SIDE**2)
    grey = grey.astype(np.float32)
    grey -= grey.mean(axis=1, keepdims=True)
    deviation = grey.std(axis=1, keepdims=True)
    grey = np.where(deviation < _FLAT, 0, grey / np.maximum(deviation, _FLAT)) / SIDE
    found = []
    for first in range(0, len(grey), 1000):  # Some rows at a time, to bound the memory.
        rows, columns = np.nonzero(grey[first : first + 1000] @ grey[first:].T > _ALIKE)
        later = columns > rows
        found.append(np.stack([rows[later], columns[later]], axis=1) + first)
    return np.concatenate(found) if found else np.empty((0, 2), np.int64)
