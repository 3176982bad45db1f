"""Writes the files of results: atomically, and only into folders that are free for them.

In a job of several processes the first one writes; all must see the same folders.
"""

import contextlib
import errno
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

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
    """Writes a file that describes what its folder is for, unless it is there already."""
    folder = path.parent
    require_writable(folder)
    if path.is_file():
        if path.read_text() != content:
            raise holds_another("configuration", path)
        return
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty and holds no {path.name}. Choose another --out.")
    barrier("claim")  # All processes look before one writes.
    make_folder(folder)
    write_text(path, content)
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
def locked(path: pathlib.Path) -> Iterator[None]:
    """Locks a file, which must exist, against other processes that do the same.

    Raises:
      BlockingIOError: if another process has locked it.
      OSError: if the system or the file system has no locks.
    """
    if fcntl is None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    # Opened for writing, without which NFS locks nothing exclusively.
    with path.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def append_line(path: pathlib.Path, row: dict) -> None:
    """Appends an object to a JSON-lines file."""
    if is_writer():
        with writing(path), path.open("a") as file:
            file.write(json.dumps(row) + "\n")


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the path of a file to write, which then replaces ``path``.

    An interruption leaves either the old file or the new one.
    """
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        try:
            yield partial
            with partial.open("rb+") as file:  # On the disk before it counts, if the power fails.
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def write_text(path: pathlib.Path, content: str) -> None:
    """Replaces a text file atomically."""
    if is_writer():
        with replacing(path) as partial:
            partial.write_text(content, encoding="utf-8", newline="\n")


def write_arrays(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Replaces an ``.npz`` file atomically."""
    if is_writer():
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez(file, **arrays)


def write_json(path: pathlib.Path, value) -> None:
    """Replaces a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: pathlib.Path):
    """Reads a JSON file."""
    return json.loads(path.read_text())


def read_lines(path: pathlib.Path) -> list[dict]:
    """Reads the objects of a JSON-lines file; none if there is no file.

    Ignores an incomplete last line, which an interruption may leave.
    """
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True)
            if line.endswith("\n")]
