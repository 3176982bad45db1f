"""Folders of images as data sets, decoded once into a memory map on disk."""

import base64
import concurrent.futures
import contextlib
import csv
import hashlib
import io
import itertools
import json
import math
import os
import pathlib
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrobust import _validate
from jaxrobust.data import copies
from jaxrobust.data.formats import open_image
from jaxrobust.data.listing import Entry, class_order, list_images, reason_of, shown
from jaxrobust.data.sources import FOLDER_PREFIX, Dataset, File, Split, StoredImages, split_rows

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Per channel, of pixels in [0, 1]: what models with ImageNet weights were trained with."""

_CACHE_FORMAT = 2  # To be raised when what is kept, or the pixels of the same file, would change.
_UNEQUAL = 3  # Times that the largest class has the images of the smallest.
_SECONDS_UNTIL_ABANDONED = 24 * 3600  # A file being written is never this long without a write.


class BadFiles(_validate.InputError):
    """Files or classes of a data set that cannot be used.

    Its message is one line that names the first; ``lines`` has one line for each, with the reason.
    """

    def __init__(self, source: pathlib.Path, lines: Sequence[str]):
        super().__init__(f"Bad files in {source}: {len(lines)}, the first {lines[0]}.")
        self.lines = tuple(lines)


class _Facts(NamedTuple):
    """What is known of a file: why it is bad, or what its image is compared by."""

    reason: str | None
    digest: str = ""
    thumbnail: str = ""  # In base 64.


class _Cached(NamedTuple):
    """Images that were decoded before, with what is known of their files."""

    images: np.ndarray  # shape=[N, H, W, 3], dtype=uint8; 0 in the row of a bad file.
    rows: dict[tuple[str, int, int | None], int]  # By path, size and mtime_ns, in their order.
    facts: list[_Facts]


def load_folder(
    path: str | pathlib.Path,
    *,
    cache_dir: str | pathlib.Path,
    image_size: tuple[int, int] = (400, 500),
    test_share: float = 0.2,
    split_seed: int = 0,
    skip_bad: bool = False,
    in_memory: bool = True,
    num_threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Loads a folder of images with a sub-folder for each class.

    Images are of the formats of :func:`read_image`, and become RGB of one size as it says; they may
    lie deeper in the folder of their class. Classes are in the natural order of their names (2
    before 10), images in that of their paths. Normalisation is that of ImageNet.

    What is no part of the data set is passed over: names that start with a dot, what operating
    systems put into folders (:data:`jaxrobust.data.listing.SYSTEM_FILES`), files beside images
    with the suffixes of :data:`jaxrobust.data.listing.SIDE_CARS`, and files beside the class
    folders that do not look like images. Any other file has to be an image.

    **The split.** It is given if the folder's own folders are ``train`` and ``test``, ``val`` or
    both, with the class folders in each (``valid`` and ``validation`` are other names of ``val``;
    case does not matter), or if the CSV file has a column ``split`` with these values. If it has
    no test images, they are drawn from those for training. If none is given, the test images are
    a stratified random share of all. Copies of one image (with equal pixels at this size) are
    drawn together, and counted as one; a drawn split depends on nothing but the paths, the
    classes and the copies. Images of a side are in the order of their paths.

    Files are decoded once, by threads, into one NumPy file [N, H, W, 3] in ``cache_dir`` for this
    path and size. Later calls decode only files that are new or changed, in size or time of
    change; a bad file is remembered as such, and a cache that cannot be read is built again. It is
    replaced as a whole, and any number of processes may load the same folder at once.

    Args:
      path: the folder; or a CSV file with the columns ``path``, relative to the file's folder,
        ``label`` and, if the split is given, ``split``.
      cache_dir: where the decoded images are kept, outside of ``path``. They take N H W 3 bytes;
        while some are added, twice that.
      image_size: (H, W) in pixels.
      test_share: of the images, for the test set where it is drawn, in (0, 1). A class of
        1 / test_share images always has one among them, and one of fewer may.
      split_seed: of the choice of them.
      skip_bad: True to leave out bad files and classes; ``skipped`` of the result has a line for
        each.
      in_memory: False to leave the images on disk, as :class:`StoredImages`.
      num_threads: that decode; by default one for each core.
      progress: called with (files done, files in all) while files are decoded.

    Returns:
      The data set. Its ``notes`` say what was passed over, how the split was made, which images
      are copies, or nearly so (see :func:`jaxrobust.data.copies.near_copies`), on two sides of it,
      and whether classes are of very different sizes.

    Raises:
      BadFiles: (an InputError) if files are empty, broken, truncated, no images, missing or have
        more pixels than Pillow's ``MAX_IMAGE_PIXELS``, if images of two classes are copies of each
        other, or if classes are without an image or, where the split is given, without one for
        training or testing. All are found before it is raised.
      InputError: (a ValueError) if an argument cannot be used, names of classes differ in nothing
        but case and spaces, the layout could be meant in two ways, there are less than two classes
        or too few images of one for both sides of the split, or the decoded images cannot be
        written.
    """
    _require_pillow("Loading a folder of images")
    path, cache_dir = pathlib.Path(path).expanduser(), pathlib.Path(cache_dir).expanduser()
    _check_size(image_size)
    _validate.in_range("test_share", test_share, 0, 1, open_low=True)
    _validate.in_range("split_seed", split_seed, 0, 2**32)
    num_threads = os.cpu_count() or 1 if num_threads is None else num_threads
    _validate.in_range("num_threads", num_threads, 1)
    listing = list_images(path)
    if path.is_dir() and cache_dir.resolve().is_relative_to(path.resolve()):
        raise _validate.InputError(f"Expected cache_dir={cache_dir} outside of {path}.")
    if skip_bad or not listing.bad:  # Before the work of decoding.
        _check_classes(path, {entry.label for entry in listing.entries}, len(listing.bad))
    images, facts = _decoded(
        path, listing.root, listing.entries, image_size, cache_dir, num_threads, progress)

    good, class_names, bad = _sort_out(listing, facts)
    if bad and not skip_bad:
        raise BadFiles(path, bad)
    _check_classes(path, class_names, len(bad))
    entries = [listing.entries[row] for row in good]
    groups = copies.groups_of([facts[row].digest for row in good])
    labels = np.array([class_names.index(entry.label) for entry in entries], np.int32)
    sides = _sides(
        path, [entry.side for entry in entries], labels, groups, class_names, test_share,
        split_seed, len(bad))
    stored = StoredImages(lambda rows: [images[row] for row in rows], len(listing.entries),
                          images.shape[1:], str(path))

    def take(side):
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
               *_notes_on_copies([entry.path for entry in entries], groups,
                                 [facts[row].thumbnail for row in good], sides),
               *_notes_on_classes(labels[sides["train"]], class_names)))


def read_image(
    path: str | pathlib.Path, image_size: tuple[int, int], channels: int = 3
) -> np.ndarray:
    """Decodes one JPEG, PNG, WebP, TIFF, BMP, GIF, AVIF or JPEG 2000 image.

    The format is told by the content, not by the file's name; AVIF and JPEG 2000 take a Pillow
    that was built with them, as those of PyPI are. Of an animation or several pages it is the
    first. It is rotated as its EXIF orientation says, its transparency is dropped, and 16-bit grey
    is scaled from [0, 65535] to [0, 255]; of 16-bit colours the upper 8 bits are kept. Pixels of 32
    bits, of which no range is known, are refused, and so are raw files of cameras, whose first page
    is a thumbnail. Colours are converted by Pillow, without colour profiles. Then it is resized,
    not cropped, by Pillow's bilinear filter, whose support grows with the reduction, so that it
    does not alias. Damage that the decoders do not notice, as within a JPEG's pixels, goes
    unnoticed here too.

    Args:
      path: of the file.
      image_size: (H, W) in pixels.
      channels: 3 for RGB; 1 for grey, by the luma of ITU-R 601-2.

    Returns:
      [H, W, channels] uint8.

    Raises:
      InputError: (a ValueError) if an argument is out of range, or the file cannot be read or is
        no such image, or one that has more pixels than Pillow's ``MAX_IMAGE_PIXELS``.
    """
    _require_pillow("Reading an image")
    _check_size(image_size)
    if channels not in (1, 3):
        raise _validate.InputError(f"Expected channels={channels} to be 1 or 3.")
    try:
        return _decode(pathlib.Path(path).expanduser(), image_size, channels)
    except MemoryError:
        raise
    except Exception as error:
        raise _validate.InputError(f"Cannot read the image {path}: {reason_of(error)}.") from error


def files_to_csv(files: Iterable[File]) -> str:
    """The files of a data set as CSV text with the columns ``path,label,split``.

    >>> files_to_csv([File("cats/1.png", "cats", "train")])
    'path,label,split\\ncats/1.png,cats,train\\n'
    """
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([File._fields, *files])
    return text.getvalue()


def files_from_csv(text: str) -> tuple[File, ...]:
    """The files that :func:`files_to_csv` wrote.

    Raises:
      InputError: (a ValueError) if the text has other columns, or a row is incomplete.
    """
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
      name: of the data set, for the message, which counts the files that are new, that are gone,
        and that have another class or another side of the split.
    """
    saved, current = ({file.path: file for file in files} for files in (saved, current))
    new, gone = current.keys() - saved.keys(), saved.keys() - current.keys()
    moved = {path for path in current.keys() & saved.keys() if current[path] != saved[path]}
    if new or gone or moved:
        raise _validate.InputError(
            f"Expected the images of {name} as they were, got {len(new)} new, {len(gone)} gone "
            f"and {len(moved)} moved to another class or side of the split, the first "
            f"{shown(min(new | gone | moved))}.")


# --- classes and split ------------------------------------------------------------------------

def _sort_out(listing, facts) -> tuple[list[int], list[str], list[str]]:
    """The rows of the entries that can be used, the classes, and a line for all that is bad."""
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


def _sides(path, given, labels, groups, class_names, test_share, seed, num_bad):
    """The rows of each side of the split, by its name."""
    sides = {side: np.array([row for row, one in enumerate(given) if one == side], np.int64)
             for side in ("train", "validation", "test")}
    if not len(sides["test"]):
        left = np.array([row for row, one in enumerate(given) if one in ("train", None)])
        drawn = _split(path, labels[left], class_names, test_share, seed, num_bad, groups[left])
        sides |= {side: left[rows] for side, rows in drawn.items()}
    return {side: rows for side, rows in sides.items() if len(rows)}


def _split(path, labels, class_names, test_share, seed, num_bad, groups=None):
    """The rows of either side of a split that is drawn."""
    try:
        train, test = split_rows(
            labels, round(test_share * len(labels)), seed=seed, groups=groups)
    except _validate.InputError as error:
        # The first of each group of copies.
        images = slice(None) if groups is None else np.unique(groups, return_index=True)[1]
        counts = np.bincount(labels[images], minlength=len(class_names))
        smallest = min(range(len(counts)), key=lambda c: (counts[c], -c))
        copied = int(np.sum(labels == smallest) - counts[smallest])
        aside = f", {copied} copies aside" if copied else ""
        raise _validate.InputError(
            f"Expected at least {_images_needed(int(counts.sum()), test_share)} images of every "
            f"class in {path} for both sides of the split with test_share={test_share}, got "
            f"{counts[smallest]} of {class_names[smallest]!r}{aside}{_without(num_bad)}."
        ) from error
    return {"train": train, "test": test}


def _images_needed(size, test_share):
    """Of a class, to be on both sides however its share of ``size`` images is rounded."""
    part = min(test_share, 1 - test_share)
    drawn = min(round(test_share * size), size - round(test_share * size))
    return max(math.ceil(round(1 / part, 9)), math.ceil(size / max(drawn, 1)))


def _without(num_bad: int) -> str:
    return f" without the {num_bad} bad ones" if num_bad else ""


# --- what is to be known of a folder ----------------------------------------------------------

def _notes_on_files(path, listing, sides, test_share):
    over = listing.passed_over
    if over:
        yield (f"Passed over in {path}, as no part of the data set: {len(over)} files and folders, "
               f"the first {shown(over[0])}.")
    if any(entry.side is not None for entry in listing.entries):
        counts = ", ".join(f"{len(rows)} {side}" for side, rows in sides.items())
        drawn = not any(entry.side == "test" for entry in listing.entries)
        how = f", with {test_share:.0%} of its training images drawn for the test" if drawn else ""
        yield f"The split is that of {path}: {counts} images{how}."


def _notes_on_copies(paths, groups, thumbnails, sides):
    side_of = {row: side for side, rows in sides.items() for row in rows.tolist()}

    def divided(pair):
        return side_of[pair[0]] != side_of[pair[1]]

    def named(pair):
        return " and ".join(f"{shown(paths[row])} ({side_of[row]})" for row in pair)

    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups.tolist()):
        members.setdefault(group, []).append(row)
    pairs = [(rows[0], other) for rows in members.values() for other in rows[1:]]
    apart = [next(pair for pair in itertools.combinations(rows, 2) if divided(pair))
             for rows in members.values() if len({side_of[row] for row in rows}) > 1]
    if apart:
        yield (f"Copies of other images: {len(pairs)}. Images that are on two sides of the split: "
               f"{len(apart)}, the first {named(apart[0])}. Results on these say nothing of new "
               "images.")
    elif pairs:
        yield (f"Copies of other images: {len(pairs)}, the first {named(pairs[0])}; none is on "
               "another side of the split.")
    if len(paths) > copies.MOST_COMPARED:
        yield f"Near copies are not looked for among more than {copies.MOST_COMPARED} images."
        return
    near = copies.near_copies([base64.b64decode(thumbnail) for thumbnail in thumbnails])
    near = near[groups[near[:, 0]] != groups[near[:, 1]]]
    side_at = np.array([side_of[row] for row in range(len(paths))])
    apart = near[side_at[near[:, 0]] != side_at[near[:, 1]]]
    if len(near):
        first = (apart if len(apart) else near)[0].tolist()
        yield (f"Pairs of images that are nearly the same: {len(near)}, on two sides of the split: "
               f"{len(apart)}, the first {named(first)}.")


def _notes_on_classes(labels, class_names):
    counts = np.bincount(labels, minlength=len(class_names))
    most, least = int(np.argmax(counts)), int(np.argmin(counts))
    if counts[most] >= _UNEQUAL * counts[least]:
        share = counts[most] / len(labels)
        yield (f"Classes are of very different sizes: {counts[most]} training images of "
               f"{class_names[most]!r}, {counts[least]} of {class_names[least]!r}. Calling every "
               f"image {class_names[most]!r} is right for {share:.1%} of them: look at the "
               "accuracy class by class, and at class weights.")


# --- decoding ---------------------------------------------------------------------------------

def _require_pillow(what: str) -> None:
    _validate.installed("PIL.Image", "Pillow", what, "pip install pillow")


def _check_size(image_size: tuple[int, int]) -> None:
    if len(image_size) != 2 or min(image_size) < 1:
        raise _validate.InputError(
            f"Expected image_size={image_size} to be (height, width) in pixels, each >= 1.")


def _decode(path: pathlib.Path, image_size: tuple[int, int], channels: int) -> np.ndarray:
    """What :func:`read_image` returns, with errors of any kind for a file that is bad."""
    from PIL import Image, ImageOps

    with open(path, "rb") as file:
        image = open_image(file, Image.MAX_IMAGE_PIXELS)
        ImageOps.exif_transpose(image, in_place=True)
    image.info.pop("transparency", None)  # A palette's, which would only be warned of.
    if image.mode.startswith("I;16"):  # Pillow would cut off at 255.
        scaled = (np.asarray(image).astype(np.uint32) + 128) // 257  # 65535 / 255, rounded.
        image = Image.fromarray(scaled.astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError("pixels of 32 bits, of which the range is not known")
    image = image.convert("L" if channels == 1 else "RGB")
    height, width = image_size
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.array(image).reshape(height, width, channels)


# --- decoded images on disk -------------------------------------------------------------------

def _decoded(path, root, entries, image_size, cache_dir, num_threads, progress):
    """``(images [N, H, W, 3], facts of each)`` of the files, in their order."""
    if not entries:
        return np.empty((0, *image_size, 3), np.uint8), []
    key = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    index = cache_dir / "{}-{}x{}.json".format(key, *image_size)
    cached = _open_cache(index, image_size)
    if cached is None or list(cached.rows) != [_key(entry) for entry in entries]:
        cached = _build_cache(
            path, root, entries, image_size, index, cached, num_threads, progress)
    return cached.images, cached.facts


def _key(entry: Entry) -> tuple[str, int, int]:
    return entry.path, entry.size, entry.mtime_ns


def _decoder() -> dict[str, Any]:
    """What the pixels of a file depend on, beside the file, and whether it is bad."""
    import PIL.Image

    return {"format": _CACHE_FORMAT, "pillow": PIL.__version__,
            "max_pixels": PIL.Image.MAX_IMAGE_PIXELS}


def _open_cache(index: pathlib.Path, image_size: tuple[int, int]) -> _Cached | None:
    """What is there of an earlier call; None if nothing is that can be used as a whole."""
    try:
        record = json.loads(index.read_text())
        rows = {(path, size, mtime_ns): row
                for row, (path, size, mtime_ns, *_) in enumerate(record["files"])}
        facts = [_Facts(*file[3:]) for file in record["files"]]
        images = np.load(index.parent / record["images"], mmap_mode="r")
        usable = (record["decoder"] == _decoder() and images.dtype == np.uint8
                  and images.shape == (len(rows), *image_size, 3))
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None  # There is none, or it is damaged: to be built again.
    return _Cached(np.asarray(images), rows, facts) if usable else None


def _build_cache(path, root, entries, image_size, index, old, num_threads, progress) -> _Cached:
    """Decodes what is not in ``old``, writes everything, and opens it.

    The index names the file of the images, and is replaced last: what it names is complete.
    """
    folder, shape = index.parent, (len(entries), *image_size, 3)
    images_path, index_path = (folder / f"{index.stem}-{uuid.uuid4().hex}.tmp" for _ in range(2))
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(index)
        free, needed = shutil.disk_usage(folder).free, int(np.prod(shape))
    if free < needed:
        raise _validate.InputError(
            f"Expected {needed / 1e9:.3f} GB of free space in {folder} for the decoded images of "
            f"{path}, got {free / 1e9:.3f} GB.")
    try:
        outcomes = _write_images(images_path, root, entries, shape, old, num_threads, progress)
        files = [(entry.path, entry.size, entry.mtime_ns if lasting else None, *facts)
                 for entry, (facts, lasting) in zip(entries, outcomes, strict=True)]
        digest = hashlib.sha256(json.dumps([_decoder(), files]).encode()).hexdigest()[:16]
        record = {"source": str(path), "images": f"{index.stem}-{digest}.npy",
                  "decoder": _decoder(), "files": files}
        with _writing(folder):
            index_path.write_text(json.dumps(record))
            # Opened first: another process may put its own in the place of this one.
            images = np.asarray(np.load(images_path, mmap_mode="r"))
            replaced = _images_of(index)
            os.replace(images_path, folder / record["images"])
            os.replace(index_path, index)
            if replaced not in (None, record["images"]):
                (folder / replaced).unlink(missing_ok=True)
    finally:
        images_path.unlink(missing_ok=True)
        index_path.unlink(missing_ok=True)
    return _Cached(images, {}, [facts for facts, _ in outcomes])


def _write_images(target, root, entries, shape, old, num_threads, progress):
    """Writes a NumPy file; for each file ``(its facts, whether they will last)``."""
    lock = threading.Lock()
    row_bytes = int(np.prod(shape[1:]))

    def work(row):
        entry = entries[row]
        known = None if old is None else old.rows.get(_key(entry))
        facts = None if known is None else old.facts[known]
        if facts is not None and facts.reason is not None:
            return facts, True
        try:
            image = old.images[known] if known is not None else _decode(
                root / entry.path, shape[1:3], shape[3])
        except MemoryError:
            raise
        except Exception as error:  # A damaged file can make the decoders raise anything.
            # Whether it can be read at all may change without the file's own time of change.
            return _Facts(reason_of(error)), not (isinstance(error, OSError) and error.errno)
        if facts is None:
            facts = _Facts(None, copies.digest_of(image),
                           base64.b64encode(copies.thumbnail_of(image)).decode())
        with lock, _writing(target.parent):
            file.seek(start + row * row_bytes)
            file.write(image)
        return facts, True

    outcomes = []
    pool = concurrent.futures.ThreadPoolExecutor(num_threads)  # Pillow lets go of the GIL.
    with _writing(target.parent), open(target, "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        start = file.tell()
        file.truncate(start + shape[0] * row_bytes)  # Rows of bad files are never written.
        try:
            for outcome in pool.map(work, range(len(entries))):
                outcomes.append(outcome)
                if progress is not None:
                    progress(len(outcomes), len(entries))
        finally:
            pool.shutdown(cancel_futures=True)
        file.flush()
        os.fsync(file.fileno())  # Before the index says that it is complete.
    return outcomes


@contextlib.contextmanager
def _writing(folder: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _validate.InputError(
            f"Cannot write the decoded images to {folder}: {reason_of(error)}.") from error


def _images_of(index: pathlib.Path) -> str | None:
    """The name of the file that an index names, if there is one that can be read."""
    try:
        return str(json.loads(index.read_text())["images"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remove_abandoned(index: pathlib.Path) -> None:
    """Removes what processes that were killed left half written."""
    for file in index.parent.glob(f"{index.stem}-*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # Its process has just put it in place.
            if time.time() - file.stat().st_mtime > _SECONDS_UNTIL_ABANDONED:
                file.unlink()
