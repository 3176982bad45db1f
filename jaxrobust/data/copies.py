"""Detection of copies of one image among the files of a data set."""

import hashlib
from collections.abc import Sequence

import numpy as np

SIDE = 16
"""Height and width of a thumbnail."""
ALIKE = 0.99
"""Correlation of thumbnails above which images are near copies."""
MOST_COMPARED = 50_000_000
"""The largest number of pairs whose thumbnails are compared."""
_FLAT = 2.0  # Grey levels.
_DIRECTIONS = 8  # More would leave fewer pairs to compare, but take longer to find them.
_AT_ONCE = 100_000  # Pairs compared at once, to bound the memory.


def digest_of(image: np.ndarray) -> str:
    """A digest of the pixels [H, W, 3], equal for equal ones."""
    return hashlib.sha256(np.ascontiguousarray(image).data).hexdigest()[:32]


def thumbnail_of(image: np.ndarray) -> bytes:
    """The image [H, W, 3] in 16 x 16 levels of grey, 256 bytes.

    The filter's triangles overlap, so that it hardly matters where their centres lie: with boxes,
    enlarging a picture of 50 x 50 by 2 % changes the thumbnail by more than JPEG does.
    """
    from PIL import Image

    small = Image.fromarray(image).convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return small.tobytes()


def groups_of(digests: Sequence[str]) -> np.ndarray:
    """[N] integers, equal for copies; they count up in the order in which images first appear."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(digest, len(numbers)) for digest in digests], np.int32)


def near_copies(thumbnails: Sequence[bytes]) -> np.ndarray | None:
    """Finds the pairs of images that are nearly the same, also where one is mirrored.

    Their thumbnails correlate by more than :data:`ALIKE`, as they do for one photograph at two
    sizes, two qualities of JPEG or two brightnesses. Images without contrast, with a standard
    deviation below 2 grey levels, correlate with nothing.

    No pair is missed: the difference of two normalised thumbnails that correlate by 0.99 has a norm
    of 0.141, and its part in any directions is not larger. The eight directions of largest variance
    among those that mirroring does not change tell which pairs need to be compared, by a k-d tree.

    Returns:
      [P, 2], each (first, second), in order; None if more than :data:`MOST_COMPARED` pairs would
      have to be compared, as among many thousands of frames of a film.
    """
    import scipy.spatial

    grey = _normalised(thumbnails)
    rows = np.flatnonzero(grey.any(axis=1))
    grey = grey[rows]
    flipped = grey.reshape(-1, SIDE, SIDE)[:, :, ::-1].reshape(grey.shape)
    even = (grey + flipped) / 2
    tree = scipy.spatial.cKDTree(even @ np.linalg.eigh(even.T @ even)[1][:, -_DIRECTIONS:])
    farthest = np.sqrt(2 - 2 * ALIKE) + 1e-3  # With room for rounding.
    # Each pair is counted twice, and each image with itself.
    if (tree.count_neighbors(tree, farthest) - len(rows)) // 2 > MOST_COMPARED:
        return None
    pairs = tree.query_pairs(farthest, output_type="ndarray")
    alike = [np.maximum(np.vecdot(grey[one], grey[other]), np.vecdot(grey[one], flipped[other]))
             > ALIKE for one, other in (part.T for part in np.array_split(
                 pairs, len(pairs) // _AT_ONCE + 1))]
    pairs = rows[pairs[np.concatenate(alike)]]
    return pairs[np.lexsort(pairs.T[::-1])]


def joined(groups: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """The groups [N] with those joined whose examples form one of the pairs [P, 2].

    They are numbered in the order in which examples first appear, as by :func:`groups_of`.
    """
    import scipy.sparse

    size = int(groups.max(initial=-1)) + 1
    links = scipy.sparse.coo_array(
        (np.ones(len(pairs), bool), (groups[pairs[:, 0]], groups[pairs[:, 1]])), (size, size))
    together = scipy.sparse.csgraph.connected_components(links, directed=False)[1][groups]
    first, which = np.unique(together, return_index=True, return_inverse=True)[1:]
    return np.argsort(np.argsort(first))[which].astype(np.int32)


def _normalised(thumbnails: Sequence[bytes]) -> np.ndarray:
    """The thumbnails [N, 256] with mean 0 and norm 1; 0 for those without contrast."""
    grey = np.frombuffer(b"".join(thumbnails), np.uint8).reshape(-1, SIDE**2).astype(np.float32)
    grey -= grey.mean(axis=1, keepdims=True)
    deviation = grey.std(axis=1, keepdims=True)
    return np.where(deviation < _FLAT, 0, grey / np.maximum(deviation, _FLAT)) / SIDE
