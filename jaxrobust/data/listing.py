"""Listing of the images in a folder or CSV file, with their classes and their sides of a split."""

import csv
import functools
import os
import pathlib
import re
import stat
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple

from jaxrobust import _validate
from jaxrobust._errors import reason_of

SIDES = {"train": "train", "test": "test",
         "val": "validation", "valid": "validation", "validation": "validation"}
"""Sides of a split by the name of their folder or their value in a CSV file, in lower case."""

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .webp .tif .tiff .bmp .dib .gif .avif .jp2 .j2k .jpx .jpf"
    .split())
"""Suffixes of files that look like images."""

SYSTEM_FILES = frozenset(
    ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "$recycle.bin",
     "system volume information"))
"""What operating systems put into folders, in lower case."""

SIDE_CARS = frozenset(
    ".aae .csv .dop .html .ini .json .log .md .md5 .pp3 .sha256 .srt .thm .txt .url .xml .xmp "
    ".yaml .yml".split())
"""Suffixes of files that cameras, programs and data sets put beside images."""


class Entry(NamedTuple):
    """A file that should be an image."""

    path: str  # Relative to the folder, with forward slashes.
    label: str
    side: str | None  # "train", "validation" or "test"; None where no split is given.
    size: int  # In bytes.
    mtime_ns: int  # Time of the last change.


class Listing(NamedTuple):
    """What :func:`list_images` finds."""

    root: pathlib.Path  # The folder that paths are relative to.
    entries: list[Entry]  # Sorted by path.
    labels: frozenset[str]  # All classes with a file, good or bad.
    bad: list[str]  # A line for each file that cannot be one of the entries.
    passed_over: list[str]  # Paths of files and folders that are not part of the data set.


class _Found(NamedTuple):
    """The same before files are looked at, with class and side by relative path."""

    named: dict[str, tuple[str, str | None]]
    bad: list[str]
    passed_over: list[str]


_OUTSIDE = "leads out of the folder"


def list_images(path: pathlib.Path, *, outside_links: bool = False) -> Listing:
    """Lists the images of a folder or CSV file, see :func:`jaxrobust.data.load_folder`.

    Raises:
      InputError: (a ValueError) if there is neither, it cannot be read, its layout is ambiguous, or
        names of two classes differ only in case and spaces.
    """
    if path.is_dir():
        found, root = _list_folder(path, outside_links), path
    elif path.is_file() and path.suffix.lower() == ".csv":
        found, root = _list_csv(path), path.parent
    else:
        there = "another file" if path.exists() else "nothing"
        raise _validate.InputError(
            f"Expected a folder of images or a CSV file at {path}, got {there}.")
    entries, bad = [], list(found.bad)
    is_inside = _inside_of(root)
    for relative, (label, side) in sorted(found.named.items()):
        try:
            relative.encode()  # Fails for a name that could not be written anywhere.
            inside = outside_links or is_inside(os.path.join(root, relative))
            status = os.stat(root / relative)
        except (OSError, ValueError) as error:
            bad.append(f"{shown(relative)}: {reason_of(error)}")
            continue
        if not inside:
            bad.append(f"{shown(relative)}: {_OUTSIDE}")
        elif stat.S_ISREG(status.st_mode):
            entries.append(Entry(relative, label, side, status.st_size, status.st_mtime_ns))
        else:
            bad.append(f"{shown(relative)}: not a file")
    labels = frozenset(label for label, _ in found.named.values())
    _check_names(path, labels)
    return Listing(root, entries, labels, bad, sorted(found.passed_over))


def _inside_of(folder: pathlib.Path) -> Callable[[str], bool]:
    """Makes a function that says whether a path, its links followed, lies in a folder."""
    top = os.path.join(os.path.realpath(folder), "")

    @functools.cache
    def is_inside(parent: str) -> bool:
        return os.path.join(os.path.realpath(parent), "").startswith(top)

    # What is no link is where its folder is, which saves most of the system's calls.
    return lambda path: is_inside(path if os.path.islink(path) else os.path.dirname(path))


def _anywhere(path: str) -> bool:
    return True


def class_order(labels: Iterable[str]) -> list[str]:
    """Sorts names in natural order, numbers within them by value.

    >>> class_order(["10", "9", "shape 10", "shape 9"])
    ['9', '10', 'shape 9', 'shape 10']
    """
    def key(label: str) -> tuple[list[int | str], str]:
        # Text and digits alternate, so that numbers are compared with numbers.
        parts = re.split("([0-9]+)", label)
        return [int(part) if place % 2 else part for place, part in enumerate(parts)], label

    return sorted(labels, key=key)


def shown(name: str) -> str:
    """A file's name on one line, whatever it contains."""
    return name if name.isprintable() else ascii(name)


def _check_names(path: pathlib.Path, labels: Iterable[str]) -> None:
    """Refuses names that a person, or a file system, would take for the same."""
    alike: dict[str, str] = {}
    for label in sorted(labels):
        key = " ".join(unicodedata.normalize("NFC", label).split()).casefold()
        other = alike.setdefault(key, label)
        if other != label:
            raise _validate.InputError(
                f"Expected class names in {path} that differ in more than case and spaces, got "
                f"{other!r} and {label!r}. Give one class one name.")


def _passed_over(name: str, *, is_file: bool) -> bool:
    return (name.startswith(".") or name.casefold() in SYSTEM_FILES
            or (is_file and os.path.splitext(name)[1].casefold() in SIDE_CARS))


# --- folders ----------------------------------------------------------------------------------

def _list_folder(folder: pathlib.Path, outside_links: bool) -> _Found:
    found = _Found({}, [], [])
    inside = _inside(folder)
    sides = _given_sides(folder, [
        entry for entry in inside
        if entry.is_dir() and not _passed_over(entry.name, is_file=False)])
    is_inside = _anywhere if outside_links else _inside_of(folder)
    if not sides:
        _list_classes(folder, inside, None, is_inside, found)
        return found
    for entry in inside:
        if entry in sides:
            _list_classes(folder, _inside(entry), sides[entry], is_inside, found)
        else:
            _list_beside(folder, entry, found)
    return found


def _inside(folder: pathlib.Path) -> list[pathlib.Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise _validate.InputError(f"Cannot read {folder}: {reason_of(error)}.") from error


def _given_sides(
    folder: pathlib.Path, folders: Collection[pathlib.Path]
) -> dict[pathlib.Path, str]:
    """The side of each sub-folder if they are the sides of a split; empty if they are classes.

    They are sides if all have the names of sides, ``train`` is one of at least two, and each holds
    folders of classes. What is neither this nor folders of classes is refused.
    """
    sides = {entry: SIDES[entry.name.casefold()] for entry in folders
             if entry.name.casefold() in SIDES}
    if not sides:
        return {}
    divided = [entry.name for entry in sides
               if any(part.is_dir() and not _passed_over(part.name, is_file=False)
                      for part in _inside(entry))]
    others = [entry.name for entry in folders if entry not in sides]
    if others and not divided:
        return {}  # A class may be called "train", next to "car".
    names = ", ".join(entry.name for entry in folders)
    problem = ""
    if others:
        problem = f"{divided[0]!r}, which has folders in it, beside {others[0]!r}"
    elif len(divided) < len(sides):
        flat = next(entry.name for entry in sides if entry.name not in divided)
        problem = f"no folder of a class in {flat!r}"
    elif "train" not in sides.values() or len(sides) == 1:
        problem = f"only {names}"
    elif len(set(sides.values())) < len(sides):
        problem = f"one side twice in {names}"
    if problem:
        raise _validate.InputError(
            f"Expected folders of classes in {folder}, or 'train' beside 'test', 'val' or both "
            f"with folders of classes in each, got {problem}.")
    return sides


def _list_classes(
    folder: pathlib.Path, inside: Iterable[pathlib.Path], side: str | None,
    is_inside: Callable[[str], bool], found: _Found,
) -> None:
    """Adds the files of the class folders ``inside`` to those found."""
    def unreadable(error: OSError) -> None:
        bad(error.filename, reason_of(error))

    def bad(path: str, reason: str) -> None:
        found.bad.append(f"{shown(pathlib.Path(path).relative_to(folder).as_posix())}: {reason}")

    for entry in inside:
        if not entry.is_dir() or _passed_over(entry.name, is_file=False):
            _list_beside(folder, entry, found)
            continue
        files: list[str] = []
        for path, passed_over in _walk(entry, unreadable, is_inside, bad):
            relative = pathlib.Path(path).relative_to(folder).as_posix()
            (found.passed_over if passed_over else files).append(relative)
        found.named.update((path, (entry.name, side)) for path in files)
        if not files:
            place = entry.relative_to(folder).as_posix()
            found.bad.append(f"{shown(place)}: a class without a file")


def _list_beside(folder: pathlib.Path, entry: pathlib.Path, found: _Found) -> None:
    """Adds an entry outside of the class folders: images are bad there, others passed over."""
    place = entry.relative_to(folder).as_posix()
    if _passed_over(entry.name, is_file=not entry.is_dir()):
        found.passed_over.append(place)
    elif entry.suffix.casefold() in IMAGE_SUFFIXES:
        found.bad.append(f"{shown(place)}: in no class folder")
    elif not entry.exists():
        found.bad.append(f"{shown(place)}: a broken link")
    else:
        found.passed_over.append(place)


def _walk(
    folder: pathlib.Path, unreadable: Callable[[OSError], None],
    is_inside: Callable[[str], bool], bad: Callable[[str, str], None],
) -> Iterator[tuple[str, bool]]:
    """Paths below a folder, and whether each is passed over.

    Links are followed, but no folder is entered twice, and none outside, which may be without end.
    """
    entered = set()
    for root, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        real = os.path.realpath(root)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        if not is_inside(os.path.join(root, "")):
            folders.clear()
            bad(root, _OUTSIDE)
            continue
        over = [name for name in folders if _passed_over(name, is_file=False)]
        folders[:] = sorted(set(folders).difference(over))
        yield from ((os.path.join(root, name), True) for name in over)
        yield from ((os.path.join(root, name), _passed_over(name, is_file=True)) for name in files)


# --- CSV files --------------------------------------------------------------------------------

def _list_csv(path: pathlib.Path) -> _Found:
    found = _Found({}, [], [])
    try:
        # Spreadsheets write a byte order mark first.
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            absent = {"path", "label"}.difference(reader.fieldnames or ())
            if absent:
                raise _validate.InputError(
                    f"Expected the columns path and label in {path}, got "
                    f"{','.join(reader.fieldnames or ())!r}.")
            rows = [(reader.line_num, row["path"] or "", (row["label"] or "").strip(),
                     (row.get("split") or "").strip()) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _validate.InputError(f"Cannot read {path}: {reason_of(error)}.") from error
    given = any(side for *_, side in rows)
    for line, name, label, side in rows:
        relative = pathlib.PurePosixPath(name).as_posix()
        if not (name and label):
            found.bad.append(f"line {line}: expected a path and a label")
        elif given and side.casefold() not in SIDES:
            found.bad.append(f"line {line}: expected train, test or val as split, got {side!r}")
        elif relative in found.named:
            found.bad.append(f"line {line}: {shown(relative)} is listed twice")
        else:
            found.named[relative] = label, SIDES[side.casefold()] if given else None
    if given and "train" not in {side for _, side in found.named.values()}:
        raise _validate.InputError(f"Expected images with the split train in {path}, got none.")
    return found
