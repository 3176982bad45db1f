"""Decoding of image files: a single one, or a folder's into a memory map that later calls reuse."""

import base64
import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jaxrobust import _validate
from jaxrobust._errors import reason_of
from jaxrobust.data import copies
from jaxrobust.data.formats import is_turned, open_image
from jaxrobust.data.listing import Entry

MOST_PIXELS = 2**14
"""The largest height or width to which images are resized."""
_CACHE_FORMAT = 4  # Raise it when what is kept, or the pixels of the same file, would change.
_SECONDS_UNTIL_ABANDONED = 24 * 3600  # A file in progress is written to more often than this.


Progress = Callable[[int, int], None]
"""Called with (files done, files in all)."""


class Facts(NamedTuple):
    """Why a file is bad, or what its image is compared by."""

    reason: str | None
    digest: str = ""
    thumbnail: str = ""  # In base 64.


class _Cached(NamedTuple):
    """Images that were decoded before, and facts about their files."""

    images: np.ndarray  # shape=[N, H, W, 3], dtype=uint8; 0 in the row of a bad file.
    rows: dict[tuple[str, int, int | None], int]  # By path, size and mtime_ns, in their order.
    facts: list[Facts]


def read_image(
    path: str | pathlib.Path, image_size: tuple[int, int], channels: int = 3
) -> np.ndarray:
    """Decodes one JPEG, PNG, WebP, TIFF, BMP, GIF, AVIF or JPEG 2000 image.

    The format is recognised by the content, not by the file's name; AVIF and JPEG 2000 need a
    Pillow built with them, as those from PyPI are. Of an animation or several pages, the first
    image is read. Its EXIF orientation is applied, its transparency is dropped, and 16-bit grey is
    scaled from [0, 65535] to [0, 255]; 16-bit colours keep their upper 8 bits. Pixels of 32 bits,
    whose range is unknown, are refused, and so are raw files of cameras, whose first page is a
    thumbnail. Colours are converted by Pillow, without colour profiles. Then the image is resized,
    not cropped, by Pillow's bilinear filter, whose support grows with the reduction, so that it
    does not alias. Damage that the decoders do not detect, such as within a JPEG's pixels, is not
    detected here either.

    Args:
      path: of the file.
      image_size: (H, W) in pixels.
      channels: 3 for RGB; 1 for grey, by the luma of ITU-R 601-2.

    Returns:
      [H, W, channels] uint8.

    Raises:
      InputError: (a ValueError) if an argument is out of range, or the file cannot be read, is not
        such an image, has EXIF data so damaged that its orientation is unknown, or has more pixels
        than Pillow's ``MAX_IMAGE_PIXELS``.
    """
    require_pillow("Reading an image")
    check_size(image_size)
    if not isinstance(channels, int) or channels not in (1, 3):
        raise _validate.InputError(f"Expected channels={channels} to be 1 or 3.")
    try:
        return _decode(pathlib.Path(path).expanduser(), image_size, channels)
    except MemoryError:
        raise
    except Exception as error:
        raise _validate.InputError(f"Cannot read the image {path}: {reason_of(error)}.") from error


def stored_size(path: str | pathlib.Path) -> tuple[int, int]:
    """Reads the height and width of an image file, rotated as its EXIF tag says, from its header.

    Raises:
      InputError: (a ValueError) as :func:`read_image` does, for what the header shows.
    """
    require_pillow("Reading an image")
    from PIL import Image

    try:
        with _open_file(pathlib.Path(path).expanduser()) as file:
            image = open_image(file, Image.MAX_IMAGE_PIXELS)
            turned = is_turned(image)
            return (image.width, image.height) if turned else (image.height, image.width)
    except MemoryError:
        raise
    except Exception as error:
        raise _validate.InputError(f"Cannot read the image {path}: {reason_of(error)}.") from error


def _open_file(path: pathlib.Path) -> BinaryIO:
    """Opens a file for reading. Refuses pipes and devices, which might be waited for without end.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("not a regular file")
    return path.open("rb")


def require_pillow(what: str) -> None:
    _validate.installed("PIL.Image", "Pillow", what, "pip install pillow")


def check_size(image_size: tuple[int, int]) -> None:
    try:
        height, width = (_validate.integer("size", size, 1) for size in image_size)
        fits = max(height, width) <= MOST_PIXELS
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise _validate.InputError(
            f"Expected image_size={image_size} to be (height, width) in pixels, each >= 1 and <= "
            f"{MOST_PIXELS}.")


def _decode(path: pathlib.Path, image_size: tuple[int, int], channels: int) -> np.ndarray:
    """What :func:`read_image` returns; raises errors of any kind for a bad file."""
    from PIL import Image, ImageOps

    with _open_file(path) as file:
        image = open_image(file, Image.MAX_IMAGE_PIXELS)
        is_turned(image)  # Raises if that is unknown.
        ImageOps.exif_transpose(image, in_place=True)
    image.info.pop("transparency", None)  # Pillow would warn of a palette's.
    if image.mode.startswith("I;16"):  # Pillow would clip at 255.
        scaled = (np.asarray(image).astype(np.uint32) + 128) // 257  # 65535 / 255, rounded.
        image = Image.fromarray(scaled.astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError("pixels of 32 bits, whose range is unknown")
    image = image.convert("L" if channels == 1 else "RGB")
    height, width = image_size
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.array(image).reshape(height, width, channels)


def decode_all(
    path: pathlib.Path, root: pathlib.Path, entries: Sequence[Entry], image_size: tuple[int, int],
    cache_dir: pathlib.Path, num_threads: int, progress: Progress | None
) -> tuple[np.ndarray, list[Facts]]:
    """Decodes the files; returns ``(images [N, H, W, 3], facts of each)`` in their order."""
    nothing = _Cached(np.empty((0, *image_size, 3), np.uint8), {}, [])
    if not entries:
        return nothing.images, nothing.facts
    key = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    index = cache_dir / "{}-{}x{}.json".format(key, *image_size)
    cached = _open_cache(index, image_size)
    if cached is None or list(cached.rows) != [_key(entry) for entry in entries]:
        cached = _build_cache(
            path, root, entries, image_size, index, cached or nothing, num_threads, progress)
    return cached.images, cached.facts


def _key(entry: Entry) -> tuple[str, int, int]:
    return entry.path, entry.size, entry.mtime_ns


def _decoder() -> dict[str, Any]:
    """What, beside the file itself, its pixels depend on, and whether it is bad."""
    import PIL.Image

    return {"format": _CACHE_FORMAT, "pillow": PIL.__version__,
            "max_pixels": PIL.Image.MAX_IMAGE_PIXELS}


def _open_cache(index: pathlib.Path, image_size: tuple[int, int]) -> _Cached | None:
    """The cache of an earlier call; None if there is none that is whole."""
    try:
        record = json.loads(index.read_text())
        rows = {(path, size, mtime_ns): row
                for row, (path, size, mtime_ns, *_) in enumerate(record["files"])}
        facts = [Facts(*file[3:]) for file in record["files"]]
        images = np.load(index.parent / record["images"], mmap_mode="r")
        usable = (_is_own(index, record["images"]) and record["decoder"] == _decoder()
                  and images.dtype == np.uint8 and images.shape == (len(rows), *image_size, 3))
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None  # There is none, or it is damaged.
    return _Cached(np.asarray(images), rows, facts) if usable else None


def _build_cache(
    path: pathlib.Path, root: pathlib.Path, entries: Sequence[Entry], image_size: tuple[int, int],
    index: pathlib.Path, old: _Cached, num_threads: int, progress: Progress | None
) -> _Cached:
    """Decodes what is not in ``old``, writes everything, and opens it.

    The index names the file of the images, and is replaced last, so that what it names is complete.
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
        record: dict[str, Any] = {"source": str(path), "images": f"{index.stem}-{digest}.npy",
                  "decoder": _decoder(), "files": files}
        with _writing(folder):
            index_path.write_text(json.dumps(record))
            # Opened first, since another process may replace it by its own.
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


def _write_images(
    target: pathlib.Path, root: pathlib.Path, entries: Sequence[Entry],
    shape: tuple[int, int, int, int], old: _Cached, num_threads: int, progress: Progress | None
) -> list[tuple[Facts, bool]]:
    """Writes the images as a NumPy file; returns ``(facts, whether they last)`` of each file."""
    lock = threading.Lock()
    row_bytes = int(np.prod(shape[1:]))

    def work(row: int) -> tuple[Facts, bool]:
        entry = entries[row]
        known = old.rows.get(_key(entry))
        facts = None if known is None else old.facts[known]
        if facts is not None and facts.reason is not None:
            return facts, True
        try:
            image = old.images[known] if known is not None else _decode(
                root / entry.path, shape[1:3], shape[3])
        except MemoryError:
            raise
        except Exception as error:  # A damaged file can make the decoders raise anything.
            # Whether it can be read may change without its modification time.
            return Facts(reason_of(error)), not (isinstance(error, OSError) and error.errno)
        if facts is None:
            facts = Facts(None, copies.digest_of(image),
                           base64.b64encode(copies.thumbnail_of(image)).decode())
        with lock, _writing(target.parent):
            file.seek(start + row * row_bytes)
            file.write(image.data)
        return facts, True

    outcomes = []
    pool = concurrent.futures.ThreadPoolExecutor(num_threads)  # Pillow releases the GIL.
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
        os.fsync(file.fileno())  # Before the index declares it complete.
    return outcomes


@contextlib.contextmanager
def _writing(folder: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _validate.InputError(
            f"Cannot write the decoded images to {folder}: {reason_of(error)}.") from error


def _images_of(index: pathlib.Path) -> str | None:
    """The file of images that an index names; None if it cannot be read, or names another's."""
    try:
        name = json.loads(index.read_text())["images"]
        return name if _is_own(index, name) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_own(index: pathlib.Path, name: str) -> bool:
    """Whether an index may name a file of images: one beside it, with its own name first."""
    return name == pathlib.PurePath(name).name and name.startswith(f"{index.stem}-")


def _remove_abandoned(index: pathlib.Path) -> None:
    """Removes unfinished files of processes that were killed."""
    for file in index.parent.glob(f"{index.stem}-*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # Its process has just renamed it.
            if time.time() - file.stat().st_mtime > _SECONDS_UNTIL_ABANDONED:
                file.unlink()
