"""Errors fit for a user, and the checks that need no JAX."""

import difflib
import importlib
import types
from collections.abc import Iterable


class InputError(ValueError):
    """An argument that cannot be used; its message is one line fit for a user.

    A command can thus report bad input in one line without hiding the traceback of a defect.
    """


class NotFiniteError(InputError):
    """Numbers that are NaN or infinite, such as those of training that diverged."""


def reason_of(error: Exception) -> str:
    """An error's message on one line, for use within another message."""
    text = (isinstance(error, OSError) and error.strerror) or str(error).strip()
    return (text.splitlines() or [type(error).__name__])[0].rstrip(".")


def installed(module: str, library: str, what: str, install: str) -> types.ModuleType:
    """Imports the module of an optional library; raises InputError that says how to install it.

    The message is "{what} needs {library} (...). Install it with: {install}".
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
