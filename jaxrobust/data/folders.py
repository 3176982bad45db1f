"""Folders of images as data sets, decoded once into a memory map on disk."""

import base64
import itertools
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from jaxrobust import _validate
from jaxrobust.data import copies
from jaxrobust.data.decoded import Facts, Progress, check_size, decode_all, require_pillow
from jaxrobust.data.listing import Entry, Listing, class_order, list_images, shown
from jaxrobust.data.splitting import split_rows
from jaxrobust.data.types import Dataset, File, Split, StoredImages

FOLDER_PREFIX = "folder:"
"""Prefix of names that :func:`load_dataset` takes for folders of images."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Per channel, of pixels in [0, 1]: what models with ImageNet weights were trained with."""

_UNEQUAL = 3  # Ratio of the largest to the smallest class from which the user is told.


class BadFiles(_validate.InputError):
    """Files or classes of a data set that cannot be used.

    Its message is one line that names the first; ``lines`` has one line for each, with the reason.
    """

    def __init__(self, source: pathlib.Path, lines: Sequence[str]) -> None:
        super().__init__(f"Bad files in {source}: {len(lines)}, the first {lines[0]}.")
        self.lines = tuple(lines)


def load_folder(
    path: str | pathlib.Path,
    *,
    cache_dir: str | pathlib.Path,
    image_size: tuple[int, int] = (400, 500),
    test_share: float = 0.2,
    split_seed: int = 0,
    skip_bad: bool = False,
    join_near_copies: bool = False,
    outside_links: bool = False,
    in_memory: bool = True,
    num_threads: int | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Loads a folder of images with a sub-folder for each class.

    Images, in the formats of :func:`read_image`, are converted to RGB of one size; they may lie in
    folders below that of their class. Classes are in the natural order of their names (2 before
    10), images in that of their paths. Normalisation is that of ImageNet.

    These are ignored: names that start with a dot, what operating systems put into folders
    (:data:`jaxrobust.data.listing.SYSTEM_FILES`), files with the suffixes of
    :data:`jaxrobust.data.listing.SIDE_CARS`, and files beside the class folders that do not look
    like images. Any other file has to be an image.

    **The split** is given if the top level has the folders ``train`` and ``test``, ``val`` or both,
    each with the class folders in it (``valid`` and ``validation`` are synonyms of ``val``; case
    does not matter), or if the CSV file has a column ``split`` with these values. Without test
    images, they are drawn from those for training. If no split is given, the test images are a
    stratified random share of all. Copies of one image (with equal pixels at this size) are drawn
    together and counted as one; a drawn split depends only on the paths, the classes and the
    copies.

    **The cache.** Threads decode the files once into one NumPy file [N, H, W, 3] in ``cache_dir``
    for this path and size. Later calls decode only files that are new or have changed in size or
    modification time; bad files are remembered, and an unreadable cache is rebuilt. It is replaced
    as a whole, and any number of processes may load the same folder at once.

    Args:
      path: the folder; or a CSV file with the columns ``path``, relative to the file's folder,
        ``label`` and, if the split is given, ``split``.
      cache_dir: where the decoded images are kept, outside of ``path``. They take N H W 3 bytes,
        and twice that while some are added.
      image_size: (H, W) in pixels.
      test_share: the share of the images to draw for testing, in (0, 1). A class of at least
        1 / test_share images always has one among them; a smaller one may not.
      split_seed: of the draw.
      skip_bad: True to leave out bad files and classes; ``skipped`` of the result has a line for
        each.
      join_near_copies: True to draw near copies (:func:`jaxrobust.data.copies.near_copies`)
        together too, and count them as one image. One that is like two others joins all three.
      outside_links: True to follow links, and paths in a CSV file, that lead out of the folder;
        otherwise what they lead to is bad.
      in_memory: False to leave the images on disk, as :class:`StoredImages`.
      num_threads: for decoding; by default one for each core.
      progress: called with (files done, files in all) while files are decoded.

    Returns:
      The data set. Its ``notes`` say what was ignored, how the split was made, which images are
      copies or near copies (:func:`jaxrobust.data.copies.near_copies`) on two sides of it, and
      whether classes are of very different sizes.

    Raises:
      BadFiles: (an InputError) if files are empty, broken, truncated, not images, missing or have
        more pixels than Pillow's ``MAX_IMAGE_PIXELS``, if images of two classes are copies of each
        other, if a class has no image or, where the split is given, none for training or testing,
        or if a path leads out of the folder. It lists all of them.
      InputError: (a ValueError) if an argument cannot be used, class names differ only in case and
        spaces, the layout is ambiguous, there are fewer than two classes or too few images of one
        for both sides of the split, or the decoded images cannot be written.
    """
    require_pillow("Loading a folder of images")
    path, cache_dir = pathlib.Path(path).expanduser(), pathlib.Path(cache_dir).expanduser()
    check_size(image_size)
    _validate.in_range("test_share", test_share, 0, 1, open_low=True)
    _validate.in_range("split_seed", split_seed, 0, 2**32)
    num_threads = os.cpu_count() or 1 if num_threads is None else num_threads
    _validate.in_range("num_threads", num_threads, 1)
    listing = list_images(path, outside_links=outside_links)
    if path.is_dir() and cache_dir.resolve().is_relative_to(path.resolve()):
        raise _validate.InputError(f"Expected cache_dir={cache_dir} outside of {path}.")
    if skip_bad or not listing.bad:  # Before decoding, which takes time.
        _check_classes(path, {entry.label for entry in listing.entries}, len(listing.bad))
    images, facts = decode_all(
        path, listing.root, listing.entries, image_size, cache_dir, num_threads, progress)

    good, class_names, bad = _sort_out(listing, facts)
    if bad and not skip_bad:
        raise BadFiles(path, bad)
    _check_classes(path, class_names, len(bad))
    entries = [listing.entries[row] for row in good]
    copied = copies.groups_of([facts[row].digest for row in good])
    near = _near_copies(copied, [facts[row].thumbnail for row in good])
    groups = _joined(path, copied, near) if join_near_copies else copied
    labels = np.array([class_names.index(entry.label) for entry in entries], np.int32)
    sides = _sides(
        path, [entry.side for entry in entries], labels, groups, class_names, test_share,
        split_seed, len(bad))
    stored = StoredImages(lambda rows: [images[row] for row in rows], len(listing.entries),
                          images.shape[1:], str(path))

    def take(side: str) -> Split:
        part = stored.take(np.array(good)[sides[side]])
        return Split(part[:] if in_memory else part, labels[sides[side]])

    return Dataset(
        name=f"{FOLDER_PREFIX}{path}", train=take("train"), test=take("test"),
        validation=take("validation") if "validation" in sides else None,
        class_names=tuple(class_names), mean=IMAGENET_MEAN, std=IMAGENET_STD, flip=True,
        files=tuple(File(entries[row].path, entries[row].label, side)
                    for side, rows in sides.items() for row in rows),
        groups=groups[sides["train"]], skipped=tuple(bad),
        notes=(*_notes_on_files(path, listing, sides, test_share),
               *_notes_on_copies(entries, copied, near, sides),
               *_notes_on_classes(labels[sides["train"]], class_names)))


# --- copies ------------------------------------------------------------------------------------

def _near_copies(groups: np.ndarray, thumbnails: Sequence[str]) -> np.ndarray | None:
    """Pairs of rows that are nearly the same but no copies, each the first row of its copies."""
    firsts = np.unique(groups, return_index=True)[1]
    pairs = copies.near_copies([base64.b64decode(thumbnails[row]) for row in firsts])
    return None if pairs is None else firsts[pairs]


def _joined(path: pathlib.Path, groups: np.ndarray, near: np.ndarray | None) -> np.ndarray:
    if near is None:
        raise _validate.InputError(
            f"Expected join_near_copies=False for {path}, in which more than "
            f"{copies.MOST_COMPARED:,} pairs of images would have to be compared.")
    return copies.joined(groups, near)


# --- classes and split ------------------------------------------------------------------------

def _sort_out(listing: Listing, facts: Sequence[Facts]) -> tuple[list[int], list[str], list[str]]:
    """The rows of the usable entries, the classes, and a line for each bad file or class."""
    entries, bad = listing.entries, list(listing.bad)
    bad += [f"{shown(entry.path)}: {fact.reason}"
            for entry, fact in zip(entries, facts, strict=True) if fact.reason is not None]
    good = [row for row, fact in enumerate(facts) if fact.reason is None]

    by_digest: dict[str, list[int]] = {}
    for row in good:
        by_digest.setdefault(facts[row].digest, []).append(row)
    contradictory = set()
    for rows in by_digest.values():
        for row in rows:
            other = next((one for one in rows if entries[one].label != entries[row].label), None)
            if other is not None:
                contradictory.add(row)
                bad.append(f"{shown(entries[row].path)}: the same image as "
                           f"{shown(entries[other].path)}, which is of another class")
    good = [row for row in good if row not in contradictory]

    labels = {side: {entries[row].label for row in good if entries[row].side in (side, None)}
              for side in ("train", "test")}
    kept = labels["train"]
    if any(entry.side == "test" for entry in entries):
        kept = kept & labels["test"]
    for label in listing.labels - kept:
        there = label in labels["train"], label in labels["test"]
        what = {(True, False): "good test image", (False, True): "good training image"}.get(
            there, "good image")
        bad.append(f"{shown(label)}: a class without a {what}")
    good = [row for row in good if entries[row].label in kept]
    return good, class_order(kept), sorted(bad)


def _check_classes(path: pathlib.Path, labels: Iterable[str], num_bad: int) -> None:
    labels = sorted(labels)
    if len(labels) < 2:
        found = f"only {labels[0]!r}" if labels else "no image"
        raise _validate.InputError(
            f"Expected images of at least 2 classes in {path}, got {found}{_without(num_bad)}.")


def _sides(
    path: pathlib.Path, given: Sequence[str | None], labels: np.ndarray, groups: np.ndarray,
    class_names: Sequence[str], test_share: float, seed: int, num_bad: int
) -> dict[str, np.ndarray]:
    """The rows of each side of the split, by its name."""
    sides = {side: np.array([row for row, one in enumerate(given) if one == side], np.int64)
             for side in ("train", "validation", "test")}
    if not len(sides["test"]):
        left = np.array([row for row, one in enumerate(given) if one in ("train", None)])
        drawn = _split(path, labels[left], class_names, test_share, seed, num_bad, groups[left])
        sides |= {side: left[rows] for side, rows in drawn.items()}
    return {side: rows for side, rows in sides.items() if len(rows)}


def _split(
    path: pathlib.Path, labels: np.ndarray, class_names: Sequence[str], test_share: float,
    seed: int, num_bad: int, groups: np.ndarray
) -> dict[str, np.ndarray]:
    """The rows of either side of a random split."""
    try:
        train, test = split_rows(
            labels, round(test_share * len(labels)), seed=seed, groups=groups)
    except _validate.InputError as error:
        images = np.unique(groups, return_index=True)[1]  # The first of each group of copies.
        counts = np.bincount(labels[images], minlength=len(class_names))
        smallest = min(range(len(counts)), key=lambda c: (counts[c], -c))
        copied = int(np.sum(labels == smallest) - counts[smallest])
        aside = f", not counting {copied} copies" if copied else ""
        raise _validate.InputError(
            f"Expected at least {_images_needed(int(counts.sum()), test_share)} images of every "
            f"class in {path} for both sides of the split with test_share={test_share}, got "
            f"{counts[smallest]} of {class_names[smallest]!r}{aside}{_without(num_bad)}."
        ) from error
    return {"train": train, "test": test}


def _images_needed(size: int, test_share: float) -> int:
    """Images that a class needs to be on both sides, however its share is rounded."""
    part = min(test_share, 1 - test_share)
    drawn = min(round(test_share * size), size - round(test_share * size))
    return max(math.ceil(round(1 / part, 9)), math.ceil(size / max(drawn, 1)))


def _without(num_bad: int) -> str:
    return f" without the {num_bad} bad ones" if num_bad else ""


# --- notes for the user -----------------------------------------------------------------------

def _notes_on_files(
    path: pathlib.Path, listing: Listing, sides: dict[str, np.ndarray], test_share: float
) -> Iterator[str]:
    over = listing.passed_over
    if over:
        yield (f"Ignored in {path}, as not part of the data set: {len(over)} files and folders, "
               f"the first {shown(over[0])}.")
    if any(entry.side is not None for entry in listing.entries):
        counts = ", ".join(f"{len(rows)} {side}" for side, rows in sides.items())
        drawn = not any(entry.side == "test" for entry in listing.entries)
        how = f", with {test_share:.0%} of its training images drawn for testing" if drawn else ""
        yield f"The split is that of {path}: {counts} images{how}."


def _notes_on_copies(
    entries: Sequence[Entry], groups: np.ndarray, near: np.ndarray | None,
    sides: dict[str, np.ndarray]
) -> Iterator[str]:
    paths = [entry.path for entry in entries]
    side_of = {row: side for side, rows in sides.items() for row in rows.tolist()}

    def divided(pair: Sequence[int]) -> bool:
        return side_of[pair[0]] != side_of[pair[1]]

    def named(pair: Sequence[int]) -> str:
        return " and ".join(f"{shown(paths[row])} ({side_of[row]})" for row in pair)

    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups.tolist()):
        members.setdefault(group, []).append(row)
    pairs = [(rows[0], other) for rows in members.values() for other in rows[1:]]
    apart = [next(pair for pair in itertools.combinations(rows, 2) if divided(pair))
             for rows in members.values() if len({side_of[row] for row in rows}) > 1]
    if apart:
        yield (f"Copies of other images: {len(pairs)}. Images that are on two sides of the split: "
               f"{len(apart)}, the first {named(apart[0])}. Results on these say nothing about "
               "new images.")
    elif pairs:
        yield (f"Copies of other images: {len(pairs)}, the first {named(pairs[0])}; none is on "
               "another side of the split.")
    if near is None:
        yield ("Images that are nearly the same are not searched for: more than "
               f"{copies.MOST_COMPARED:,} pairs of images would have to be compared.")
    elif len(near):
        apart = [pair for pair in near.tolist() if divided(pair)]
        drawn = not any(entry.side == "test" for entry in entries)
        advice = " join_near_copies draws them together." if apart and drawn else ""
        yield (f"Pairs of images that are nearly the same: {len(near)}, on two sides of the split: "
               f"{len(apart)}, the first {named((apart or near.tolist())[0])}.{advice}")


def _notes_on_classes(labels: np.ndarray, class_names: Sequence[str]) -> Iterator[str]:
    counts = np.bincount(labels, minlength=len(class_names))
    most, least = int(np.argmax(counts)), int(np.argmin(counts))
    if counts[most] >= _UNEQUAL * counts[least]:
        share = counts[most] / len(labels)
        yield (f"Classes are of very different sizes: {counts[most]} training images of "
               f"{class_names[most]!r}, {counts[least]} of {class_names[least]!r}. Predicting "
               f"{class_names[most]!r} for every image is right for {share:.1%} of them: look at "
               "the accuracy class by class, and consider class weights.")
