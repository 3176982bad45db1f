"""Errors that are fit for a user, and the checks that need no JAX."""

import difflib
import importlib
import types
from collections.abc import Iterable


class InputError(ValueError):
    """An argument that cannot be used. Its message is one line fit for a user.

    A subclass of ValueError, so that a command can report bad input in one line
    without hiding the traceback of a defect.
    """


class NotFiniteError(InputError):
    """Numbers that are NaN or infinite, such as those of a training that diverged."""


def installed(module: str, library: str, what: str, install: str) -> types.ModuleType:
    """The module of an optional library, or InputError that says how to install it.

    Args:
      module: its full name.
      library: its name in words.
      what: that needs it, as the beginning of a sentence.
      install: what to do, as the end of one.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"{what} needs {library} ({error}). Install it with: {install}") from error


def one_of(name: str, value: str, valid: Iterable[str]) -> None:
    """Raises InputError, naming the nearest valid value, unless ``value`` is valid."""
    valid = list(valid)
    if value not in valid:
        near = difflib.get_close_matches(str(value), valid, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise InputError(f"Unknown {name} {value!r}.{hint} Expected one of: {', '.join(valid)}.")
