"""Writes the files of results: atomically, and only into folders that are free for them.

In a job of several processes the first one writes; all must see the same folders.
"""

import contextlib
import errno
import functools
import glob
import json
import math
import os
import pathlib
import re
import tempfile
import time
import uuid
import zipfile
from collections.abc import Iterator, Mapping
from typing import IO, Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxrobust._errors import reason_of
from jaxrobust.app.config import InputError

try:
    import fcntl
except ImportError:  # Windows.
    fcntl = None


def require_writable(folder: pathlib.Path) -> None:
    """Checks that files can be written into a folder, which need not exist, and leaves no trace.

    Commands call it before their work begins.

    Raises:
      InputError: (a ValueError) if a file is in the way, or the system refuses.
    """
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise InputError(f"Cannot write {folder}: {nearest} is a file. Choose a folder.")
    with writing(folder), tempfile.TemporaryFile(dir=nearest):
        pass  # Permissions are not enough: the file system may be read-only.


def require_writable_file(path: pathlib.Path) -> None:
    """Checks that a file can be written or replaced, as :func:`require_writable` does."""
    if path.is_dir():
        raise InputError(f"Cannot write {path}: it is a folder. Name a file.")
    require_writable(path.parent)


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Turns errors of the system, such as a full disk, into an InputError that names the path."""
    try:
        yield
    except OSError as error:
        raise InputError(f"Cannot write {path}: {error.strerror or error}.") from error
    except ValueError as error:
        # TensorStore, which Orbax uses, gives the error number only in its message.
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        raise InputError(f"Cannot write {path}: {os.strerror(int(code[1]))}.") from error


def make_folder(folder: pathlib.Path) -> None:
    """Makes a folder and its parents, unless they exist."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def claim(path: pathlib.Path, content: str) -> None:
    """Writes a file that describes what its folder is for, unless it is there already.

    Of two commands that do so at once, one is refused.
    """
    folder = path.parent
    require_writable(folder)
    if path.is_file():
        if path.read_text() != content:
            raise holds_another("configuration", path)
        return
    if folder.exists() and not set(folder.iterdir()) <= set(_partials(path)):
        raise InputError(f"{folder} is not empty and holds no {path.name}. Choose another --out.")
    barrier("claim")  # All processes look before one writes.
    make_folder(folder)
    write_text(path, content, new=True)
    barrier("claimed")


def holds_another(what: str, path: pathlib.Path) -> InputError:
    """The error for a folder that belongs to something else, as the file at ``path`` says."""
    return InputError(f"{path.parent} holds another {what} (see {path.name} there). "
                      "Choose another folder with --out, or remove that one.")


def is_writer() -> bool:
    """Whether this process writes the results, as the first one of a job does."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints a line, once for all processes of a job."""
    if is_writer():
        print(text, flush=True)


def barrier(name: str) -> None:
    """Waits until all processes of a job arrive here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def first_says(value: int) -> int:
    """The value of the first process of a job, in all of them."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


@contextlib.contextmanager
def locked(path: pathlib.Path, *, made: bool = False, wait: bool = False) -> Iterator[None]:
    """Locks a file, which must exist, against other processes that do the same.

    With ``made``, makes the file and removes it at the end; a kill leaves it, but without the lock.
    With ``wait``, waits until no other process has locked it.

    Raises:
      BlockingIOError: if another process has locked it.
      OSError: if the system or the file system has no locks.
    """
    if fcntl is None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    while True:
        # Opened for writing, without which NFS locks nothing exclusively.
        with path.open("ab" if made else "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if not _is_open_at(path, file):
                continue  # Whoever held the lock has just removed or replaced the file.
            try:
                yield
            finally:
                if made:
                    path.unlink(missing_ok=True)
            return


def _is_open_at(path: pathlib.Path, file: IO[bytes]) -> bool:
    """Whether a path still leads to an open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def append_line(path: pathlib.Path, row: dict) -> None:
    """Appends an object to a JSON-lines file."""
    if is_writer():
        with writing(path), path.open("a") as file:
            file.write(json.dumps(row) + "\n")


@contextlib.contextmanager
def replacing(path: pathlib.Path, *, new: bool = False) -> Iterator[pathlib.Path]:
    """Yields the path of a file to write, which then replaces ``path``; with ``new``, there must
    be no file to replace.

    An interruption leaves either the old file or the new one. Of two processes that write at once,
    each writes a whole file, and the later one stays. What processes that were killed left half
    written is removed once it is a day old: until then it might still be written.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    with writing(path):
        try:
            yield partial
            with partial.open("rb+") as file:  # On the disk before it counts, if the power fails.
                os.fsync(file.fileno())
            if new:
                _name_first(partial, path)
            else:
                os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        for left in _partials(path):
            with contextlib.suppress(FileNotFoundError):  # Its process has just renamed it.
                if time.time() - left.stat().st_mtime > _SECONDS_UNTIL_ABANDONED:
                    left.unlink()


_SECONDS_UNTIL_ABANDONED = 24 * 3600


def _partials(path: pathlib.Path) -> list[pathlib.Path]:
    """The half-written files of :func:`replacing`, in progress or left by a kill."""
    return list(path.parent.glob(f"{glob.escape(path.name)}.*.partial"))


def _name_first(partial: pathlib.Path, path: pathlib.Path) -> None:
    """Gives a file a name that no other file has; raises FileExistsError if one has it."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:  # The file system has no links, and nothing else that is atomic.
        os.replace(partial, path)


def write_text(path: pathlib.Path, content: str, *, new: bool = False) -> None:
    """Replaces a text file atomically, or writes a new one as :func:`replacing` does."""
    if is_writer():
        with replacing(path, new=new) as partial:
            partial.write_text(content, encoding="utf-8", newline="\n")


def write_arrays(path: pathlib.Path, arrays: Mapping[str, Any]) -> None:
    """Replaces an ``.npz`` file atomically."""
    if is_writer():
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez(file, **arrays)


def write_json(path: pathlib.Path, value) -> None:
    """Replaces a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


MOST_BYTES_OF_JSON = 2**28
"""The largest JSON file that is read."""


class Contents(dict):
    """What a file holds by name; to ask for a name that it lacks raises InputError."""

    path: pathlib.Path | None = None

    def __missing__(self, name):
        raise InputError(f"Expected {name!r} in {self.path}, found no such entry.")


def _contents(path: pathlib.Path, values: dict) -> Contents:
    contents = Contents(values)
    contents.path = path
    return contents


@contextlib.contextmanager
def reading(path: pathlib.Path) -> Iterator[None]:
    """Turns whatever reading a damaged file raises into an InputError that names it."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # Parsers raise anything, of which RecursionError is the oddest.
        raise InputError(f"Cannot read {path}: {reason_of(error)}.") from error


def _read_text(path: pathlib.Path) -> str:
    size = path.stat().st_size
    if size > MOST_BYTES_OF_JSON:
        raise InputError(f"Expected {path} of at most {MOST_BYTES_OF_JSON} bytes, got {size}.")
    return path.read_text(encoding="utf-8")


def read_json(path: pathlib.Path) -> Contents:
    """Reads the object in a JSON file.

    Raises:
      InputError: (a ValueError) if it cannot be read or is no object, and later for each name that
        is missing from an object in it.
    """
    with reading(path):
        found = json.loads(_read_text(path), object_hook=functools.partial(_contents, path))
    if not isinstance(found, Contents):
        raise InputError(f"Expected an object in {path}, found a {type(found).__name__}.")
    return found


def read_lines(path: pathlib.Path) -> list[Contents]:
    """Reads the objects of a JSON-lines file; none if there is no file.

    Ignores an incomplete last line, which an interruption may leave.

    Raises:
      InputError: (a ValueError) as :func:`read_json` does.
    """
    if not path.is_file():
        return []
    with reading(path):
        found = [json.loads(line, object_hook=functools.partial(_contents, path))
                 for line in _read_text(path).splitlines(keepends=True) if line.endswith("\n")]
    for number, row in enumerate(found, 1):
        if not isinstance(row, Contents):
            raise InputError(f"Expected an object in line {number} of {path}, found a "
                             f"{type(row).__name__}.")
    return found


def read_arrays(path: pathlib.Path) -> Contents:
    """Reads the arrays of an ``.npz`` file that :func:`write_arrays` wrote.

    Nothing is unpacked to a file, and no Python object is made of its content. No array is larger
    than the file: they are stored without compression, and are as large as their headers say.

    Raises:
      InputError: (a ValueError) if it cannot be read or is not of this kind, and later for each
        name that is missing from it.
    """
    with reading(path), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > path.stat().st_size:
            raise ValueError("its arrays are larger than the file")
        return _contents(path, {member.filename.removesuffix(".npy"): _read_array(archive, member)
                                for member in members})


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    header = {(1, 0): np.lib.format.read_array_header_1_0,
              (2, 0): np.lib.format.read_array_header_2_0}
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in header:
            raise ValueError(f"an array in version {version} of NumPy's format")
        shape, _, dtype = header[version](file)
        size = file.tell() + math.prod(shape) * dtype.itemsize
        if dtype.hasobject or min(shape, default=1) < 0 or size != member.file_size:
            raise ValueError(f"{member.filename} is no array of {dtype} {list(shape)}")
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)
