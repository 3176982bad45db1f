"""Files of results: who may write them, and replacing them as a whole.

In a job of several processes the first one writes; all must see the same folders.
"""

import contextlib
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


def require_writable(folder: pathlib.Path) -> None:
    """Checks that files can be written into a folder, which need not be there yet.

    It leaves nothing behind. Commands call it before their work begins.

    Raises:
      InputError: (a ValueError) if a file is in the way, or the system refuses.
    """
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise InputError(f"Cannot write {folder}: {nearest} is a file. Choose a folder.")
    with writing(folder), tempfile.TemporaryFile(dir=nearest):
        pass  # Permissions do not tell: a file system may be read-only, or hold no files at all.


def require_writable_file(path: pathlib.Path) -> None:
    """As :func:`require_writable`, for a file that is to be written or replaced."""
    if path.is_dir():
        raise InputError(f"Cannot write {path}: it is a folder. Name a file.")
    require_writable(path.parent)


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Turns what the system refuses, such as on a full disk, into InputError that names the path.

    Everything that a command writes is written within it.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"Cannot write {path}: {error.strerror or error}.") from error
    except ValueError as error:
        # TensorStore, by which Orbax writes, has the system's number in a text alone.
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        raise InputError(f"Cannot write {path}: {os.strerror(int(code[1]))}.") from error


def make_folder(folder: pathlib.Path) -> None:
    """Makes a folder, and those above it, unless it is there.

    Raises:
      InputError: (a ValueError) if it cannot be made.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def claim(folder: pathlib.Path, name: str, content: str) -> None:
    """Makes ``folder`` the place of what the file ``name`` describes.

    Raises:
      InputError: (a ValueError) if the folder belongs to something else already, or cannot be
        written into.
    """
    require_writable(folder)
    path = folder / name
    if path.is_file():
        if path.read_text() != content:
            raise holds_another(folder, name)
        return
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty and holds no {name}. Choose another --out.")
    barrier("claim")  # All have looked before one writes.
    make_folder(folder)
    write_text(path, content)
    barrier("claimed")


def holds_another(folder: pathlib.Path, name: str) -> InputError:
    """What is raised for a folder whose file ``name`` describes something else."""
    return InputError(f"{folder} holds another configuration (see {name} there). "
                      "Choose another folder with --out, or remove that one.")


def is_writer() -> bool:
    """Whether this process writes the results, as the first one of a job does."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until all processes of a job have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def append_line(path: pathlib.Path, row: dict) -> None:
    """Adds an object to a JSON-lines file."""
    if is_writer():
        with writing(path), path.open("a") as file:
            file.write(json.dumps(row) + "\n")


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the path of a file to write, which then takes the place of ``path``.

    A kill, or an error while it is written, leaves the old file or the new one.

    Raises:
      InputError: (a ValueError) if the system refuses.
    """
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        try:
            yield partial
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def write_text(path: pathlib.Path, content: str) -> None:
    """Replaces a file as a whole, as :func:`replacing` does."""
    if is_writer():
        with replacing(path) as partial:
            partial.write_text(content, encoding="utf-8", newline="\n")


def write_arrays(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """As :func:`write_text`, for an ``.npz`` file."""
    if is_writer():
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez(file, **arrays)


def write_json(path: pathlib.Path, value) -> None:
    """As :func:`write_text`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: pathlib.Path):
    """The content of a JSON file."""
    return json.loads(path.read_text())


def read_lines(path: pathlib.Path) -> list[dict]:
    """The objects of a JSON-lines file; none if it is not there.

    A last line without its end, which a kill may leave, does not count.
    """
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True)
            if line.endswith("\n")]
