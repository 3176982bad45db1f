"""Folders of images as data sets, decoded once into a memory map on disk."""

import concurrent.futures
import contextlib
import csv
import hashlib
import io
import json
import os
import pathlib
import shutil
import stat
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrobust import _validate
from jaxrobust.data.sources import FOLDER_PREFIX, Dataset, File, Split, StoredImages, split_rows

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Per channel, of pixels in [0, 1]: what models with ImageNet weights were trained with."""

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_CACHE_FORMAT = 1  # To be raised when the same file would be decoded to other pixels.
_SECONDS_UNTIL_ABANDONED = 24 * 3600  # A file being written is never this long without a write.


class BadFiles(_validate.InputError):
    """Files or classes of a data set that cannot be used.

    Its message is one line that names the first; ``lines`` has one line for each, with the reason.
    """

    def __init__(self, source: pathlib.Path, lines: Sequence[str]):
        super().__init__(f"Bad files in {source}: {len(lines)}, the first {lines[0]}. "
                         "Add --skip-bad to go on without them.")
        self.lines = tuple(lines)


class _Entry(NamedTuple):
    path: str  # Relative to the folder, with forward slashes.
    label: str
    size: int  # Bytes.
    mtime_ns: int  # Of the last change.


class _Cached(NamedTuple):
    """Images that were decoded before, with what is known of their files."""

    images: np.ndarray  # shape=[N, H, W, 3], dtype=uint8; 0 in the row of a bad file.
    rows: dict[tuple[str, int, int | None], int]  # By path, size and mtime_ns, in their order.
    reasons: list[str | None]  # Why each file is bad; None for the good ones.


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
    """Loads a folder of JPEG, PNG and WebP images with a sub-folder for each class.

    Classes and their images, which may lie deeper, are in the order of their names. Files and
    folders whose name starts with a dot are passed over, and so are files beside the class
    folders that do not look like images. Images become RGB of one size as :func:`read_image`
    says. The training and the test set are a stratified random split; each is in the order of its
    paths. Normalisation is that of ImageNet.

    Files are decoded once, by threads, into one NumPy file [N, H, W, 3] in ``cache_dir`` for this
    path and size. Later calls decode only files that are new or changed, in size or time of
    change; a bad file is remembered as such, and a cache that cannot be read is built again. It is
    replaced as a whole, and any number of processes may load the same folder at once.

    Args:
      path: the folder; or a CSV file with the columns ``path``, relative to the file's folder,
        and ``label``.
      cache_dir: where the decoded images are kept, outside of ``path``. They take N H W 3 bytes;
        while some are added, twice that.
      image_size: (H, W) in pixels.
      test_share: of the images, for the test set, in (0, 1).
      split_seed: of the choice of them.
      skip_bad: True to leave out bad files and classes without images; ``skipped`` of the result
        has a line for each.
      in_memory: False to leave the images on disk, as :class:`StoredImages`.
      num_threads: that decode; by default one for each core.
      progress: called with (files done, files in all) while files are decoded.

    Raises:
      BadFiles: (an InputError) if files are broken, truncated, no images, missing or have more
        pixels than Pillow's ``MAX_IMAGE_PIXELS``, or classes are empty. All are found before it
        is raised.
      InputError: (a ValueError) if an argument cannot be used, there are less than two classes or
        too few images of one for both sides of the split, or the decoded images cannot be
        written.
    """
    _require_pillow("Loading a folder of images")
    path, cache_dir = pathlib.Path(path).expanduser(), pathlib.Path(cache_dir).expanduser()
    _check_size(image_size)
    _validate.in_range("test_share", test_share, 0, 1, open_low=True)
    _validate.in_range("split_seed", split_seed, 0, 2**32)
    num_threads = os.cpu_count() or 1 if num_threads is None else num_threads
    _validate.in_range("num_threads", num_threads, 1)
    root, entries, labels_listed, bad = _list(path)
    if path.is_dir() and cache_dir.resolve().is_relative_to(path.resolve()):
        raise _validate.InputError(f"Expected cache_dir={cache_dir} outside of {path}.")
    if skip_bad or not bad:  # Before the work of decoding.
        _check_classes(path, {entry.label for entry in entries}, len(bad))
    images, reasons = _decoded(path, root, entries, image_size, cache_dir, num_threads, progress)

    good = [row for row, reason in enumerate(reasons) if reason is None]
    class_names = sorted({entries[row].label for row in good})
    bad += [f"{_shown(entry.path)}: {reason}"
            for entry, reason in zip(entries, reasons, strict=True) if reason is not None]
    bad += [f"{_shown(label)}: a class without a good image"
            for label in labels_listed.difference(class_names)]
    if bad and not skip_bad:
        raise BadFiles(path, sorted(bad))
    _check_classes(path, class_names, len(bad))

    labels = np.array([class_names.index(entries[row].label) for row in good], np.int32)
    sides = _split(path, labels, class_names, test_share, split_seed, len(bad))
    stored = StoredImages(
        lambda rows: [images[row] for row in rows], len(entries), images.shape[1:], str(path))

    def take(rows):
        part = stored.take(np.array(good)[rows])
        return Split(part[:] if in_memory else part, labels[rows])

    return Dataset(
        name=f"{FOLDER_PREFIX}{path}", train=take(sides["train"]), test=take(sides["test"]),
        class_names=tuple(class_names), mean=IMAGENET_MEAN, std=IMAGENET_STD, flip=True,
        files=tuple(File(entries[good[row]].path, class_names[labels[row]], side)
                    for side, rows in sides.items() for row in rows),
        skipped=tuple(sorted(bad)))


def read_image(
    path: str | pathlib.Path, image_size: tuple[int, int], channels: int = 3
) -> np.ndarray:
    """Decodes one JPEG, PNG or WebP image, of any of their colour modes.

    It is rotated as its EXIF orientation says, its transparency is dropped, and 16-bit grey is
    scaled from [0, 65535] to [0, 255]; of 16-bit colours the upper 8 bits are kept. Colours are
    converted by Pillow, without colour profiles. Then it is resized, not cropped, by Pillow's
    bilinear filter, whose support grows with the reduction, so that it does not alias. Of an
    animation it is the first frame. Damage that the decoders do not notice, as within a JPEG's
    pixels, goes unnoticed here too.

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
        raise _validate.InputError(f"Cannot read the image {path}: {_reason(error)}.") from error


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
            f"{_shown(min(new | gone | moved))}.")


# --- which files there are --------------------------------------------------------------------

def _list(path: pathlib.Path) -> tuple[pathlib.Path, list[_Entry], set[str], list[str]]:
    """The folder that paths are relative to, the files by path, all classes with a file, good or
    bad, and a line for each bad file."""
    if path.is_dir():
        named, bad = _list_folder(path)
        root = path
    elif path.is_file() and path.suffix.lower() == ".csv":
        named, bad = _list_csv(path)
        root = path.parent
    else:
        found = "another file" if path.exists() else "nothing"
        raise _validate.InputError(
            f"Expected a folder of images or a CSV file at {path}, got {found}.")
    entries = []
    for relative, label in sorted(named.items()):
        try:
            relative.encode()  # Or it could not be written anywhere.
            status = os.stat(root / relative)
        except (OSError, ValueError) as error:
            bad.append(f"{_shown(relative)}: {_reason(error)}")
            continue
        if stat.S_ISREG(status.st_mode):
            entries.append(_Entry(relative, label, status.st_size, status.st_mtime_ns))
        else:
            bad.append(f"{_shown(relative)}: not a file")
    return root, entries, set(named.values()), bad


def _list_folder(folder: pathlib.Path) -> tuple[dict[str, str], list[str]]:
    """The class of each file by its relative path, and a line for what is bad."""
    labels, bad = {}, []

    def relative(path):
        return pathlib.Path(path).relative_to(folder).as_posix()

    def unreadable(error):
        bad.append(f"{_shown(relative(error.filename))}: {_reason(error)}")

    try:
        inside = sorted(entry for entry in folder.iterdir() if not _hidden(entry.name))
    except OSError as error:
        raise _validate.InputError(f"Cannot read {folder}: {_reason(error)}.") from error
    for entry in inside:
        if entry.is_dir():
            files = [relative(path) for path in _walk(entry, unreadable)]
            labels.update((path, entry.name) for path in files)
            if not files:
                bad.append(f"{_shown(entry.name)}: a class without a file")
        elif entry.suffix.lower() in _SUFFIXES:
            bad.append(f"{_shown(entry.name)}: in no class folder")
        elif not entry.exists():
            bad.append(f"{_shown(entry.name)}: a link to nothing")
    return labels, bad


def _walk(folder: pathlib.Path, unreadable: Callable[[OSError], None]) -> Iterator[str]:
    """The files below a folder; links are followed, but no folder is entered twice."""
    entered = set()
    for root, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        real = os.path.realpath(root)
        folders[:] = sorted(name for name in folders if not _hidden(name) and real not in entered)
        if real not in entered:
            yield from (os.path.join(root, name) for name in files if not _hidden(name))
        entered.add(real)


def _hidden(name: str) -> bool:
    return name.startswith(".")


def _list_csv(path: pathlib.Path) -> tuple[dict[str, str], list[str]]:
    """The class of each file by its relative path, and a line for what is bad."""
    labels, bad = {}, []
    try:
        # Spreadsheets write a byte order mark first.
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            absent = {"path", "label"}.difference(reader.fieldnames or ())
            if absent:
                raise _validate.InputError(
                    f"Expected the columns path and label in {path}, got "
                    f"{','.join(reader.fieldnames or ())!r}.")
            for row in reader:
                name, label = row["path"] or "", (row["label"] or "").strip()
                relative = pathlib.PurePosixPath(name).as_posix()
                if not (name and label):
                    bad.append(f"line {reader.line_num}: expected a path and a label")
                elif relative in labels:
                    bad.append(f"line {reader.line_num}: {_shown(relative)} is there already")
                else:
                    labels[relative] = label
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _validate.InputError(f"Cannot read {path}: {_reason(error)}.") from error
    return labels, bad


def _shown(name: str) -> str:
    """A file's name on one line."""
    return name if name.isprintable() else ascii(name)


def _reason(error: Exception) -> str:
    """An error's message on one line, to be put into another."""
    text = (isinstance(error, OSError) and error.strerror) or str(error)
    return (text.splitlines() or [type(error).__name__])[0].rstrip(".")


# --- classes and split ------------------------------------------------------------------------

def _check_classes(path: pathlib.Path, labels: Iterable[str], num_bad: int) -> None:
    labels = sorted(labels)
    if len(labels) < 2:
        found = f"only {labels[0]!r}" if labels else "no image"
        raise _validate.InputError(
            f"Expected images of at least 2 classes in {path}, got {found}{_without(num_bad)}.")


def _split(path, labels, class_names, test_share, seed, num_bad) -> dict[str, np.ndarray]:
    """The rows of either side of the split."""
    try:
        train, test = split_rows(labels, round(test_share * len(labels)), seed=seed)
    except _validate.InputError as error:
        smallest, count = Counter(labels.tolist()).most_common()[-1]
        raise _validate.InputError(
            f"Expected enough images of every class in {path} for both sides of the split with "
            f"test_share={test_share}, got {count} of {class_names[smallest]!r}"
            f"{_without(num_bad)}.") from error
    return {"train": train, "test": test}


def _without(num_bad: int) -> str:
    return f" without the {num_bad} bad ones" if num_bad else ""


# --- decoding ---------------------------------------------------------------------------------

def _require_pillow(what: str) -> None:
    _validate.installed("PIL.Image", "Pillow", what, "pip install 'jaxrobust[data]'")


def _check_size(image_size: tuple[int, int]) -> None:
    if len(image_size) != 2 or min(image_size) < 1:
        raise _validate.InputError(
            f"Expected image_size={image_size} to be (height, width) in pixels, each >= 1.")


def _decode(path: pathlib.Path, image_size: tuple[int, int], channels: int) -> np.ndarray:
    """What :func:`read_image` returns, with errors of any kind for a file that is bad."""
    from PIL import Image, ImageOps

    with open(path, "rb") as file:
        image = _open_image(file)
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and image.width * image.height > limit:
            raise ValueError(f"{image.width} x {image.height} pixels, more than the {limit} that "
                             "Pillow takes to be safe")
        ImageOps.exif_transpose(image, in_place=True)
    image.info.pop("transparency", None)  # A palette's, which would only be warned of.
    if image.mode == "I;16":  # Pillow would cut off at 255.
        scaled = (np.asarray(image).astype(np.uint32) + 128) // 257  # 65535 / 255, rounded.
        image = Image.fromarray(scaled.astype(np.uint8))
    image = image.convert("L" if channels == 1 else "RGB")
    height, width = image_size
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.array(image).reshape(height, width, channels)


def _open_image(file):
    """The image in a file, of which the header alone is read.

    By the formats' own classes: ``Image.open`` answers an image that is somewhat too large with a
    warning, which can be turned into an error only for all threads of a process.
    """
    from PIL import JpegImagePlugin, PngImagePlugin, WebPImagePlugin

    start = file.read(12)
    file.seek(0)
    if start.startswith(b"\xff\xd8\xff"):
        return JpegImagePlugin.JpegImageFile(file)
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImagePlugin.PngImageFile(file)
    if start.startswith(b"RIFF") and start.endswith(b"WEBP"):
        return WebPImagePlugin.WebPImageFile(file)
    raise ValueError("not a JPEG, PNG or WebP image")


# --- decoded images on disk -------------------------------------------------------------------

def _decoded(path, root, entries, image_size, cache_dir, num_threads, progress):
    """``(images [N, H, W, 3], reason for each that is bad)`` of the files, in their order."""
    if not entries:
        return np.empty((0, *image_size, 3), np.uint8), []
    key = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    index = cache_dir / "{}-{}x{}.json".format(key, *image_size)
    cached = _open_cache(index, image_size)
    if cached is None or list(cached.rows) != [_key(entry) for entry in entries]:
        cached = _build_cache(
            path, root, entries, image_size, index, cached, num_threads, progress)
    return cached.images, cached.reasons


def _key(entry: _Entry) -> tuple[str, int, int]:
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
                for row, (path, size, mtime_ns, _) in enumerate(record["files"])}
        images = np.load(index.parent / record["images"], mmap_mode="r")
        usable = (record["decoder"] == _decoder() and images.dtype == np.uint8
                  and images.shape == (len(rows), *image_size, 3))
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None  # There is none, or it is damaged: to be built again.
    return _Cached(np.asarray(images), rows, [file[3] for file in record["files"]]) \
        if usable else None


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
        files = [(entry.path, entry.size, entry.mtime_ns if lasting else None, reason)
                 for entry, (reason, lasting) in zip(entries, outcomes, strict=True)]
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
    return _Cached(images, {}, [reason for reason, _ in outcomes])


def _write_images(target, root, entries, shape, old, num_threads, progress):
    """Writes a NumPy file; for each file ``(reason if it is bad, whether that will last)``."""
    lock = threading.Lock()
    row_bytes = int(np.prod(shape[1:]))

    def work(row):
        entry = entries[row]
        known = None if old is None else old.rows.get(_key(entry))
        if known is not None and old.reasons[known] is not None:
            return old.reasons[known], True
        try:
            image = old.images[known] if known is not None else _decode(
                root / entry.path, shape[1:3], shape[3])
        except MemoryError:
            raise
        except Exception as error:  # A damaged file can make the decoders raise anything.
            # Whether it can be read at all may change without the file's own time of change.
            return _reason(error), not (isinstance(error, OSError) and error.errno)
        with lock, _writing(target.parent):
            file.seek(start + row * row_bytes)
            file.write(image)
        return None, True

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
            f"Cannot write the decoded images to {folder}: {_reason(error)}.") from error


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
