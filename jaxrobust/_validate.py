"""Checks of arguments, each failing with one line that names the argument and its value."""

import difflib
import importlib
import numbers
import types
from collections.abc import Iterable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np


class InputError(ValueError):
    """An argument that cannot be used. Its message is one line fit for a user.

    A subclass of ValueError, so that a command can report bad input in one line
    without hiding the traceback of a defect.
    """


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


def in_range(name: str, value: float, low: float, high: float = np.inf, *, open_low: bool = False,
             open_high: bool = True) -> None:
    """Raises InputError unless ``low <= value < high`` (either end open or closed).

    A value that is traced by a JAX transformation is not known yet, and passes.
    """
    if isinstance(value, jax.core.Tracer):
        return
    above = value > low if open_low else value >= low
    below = value < high if open_high else value <= high
    if not (above and below):
        left, right = "(" if open_low else "[", ")" if open_high else "]"
        raise InputError(f"Expected {name}={value} in {left}{low}, {high}{right}.")


def integer(name: str, value: int, low: int) -> None:
    """Raises InputError unless ``value`` is an integer, Python's or NumPy's, at least ``low``."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < low:
        raise InputError(f"Expected {name}={value} to be an integer >= {low}.")


def one_of(name: str, value: str, valid: Iterable[str]) -> None:
    """Raises InputError, naming the nearest valid value, unless ``value`` is valid."""
    valid = list(valid)
    if value not in valid:
        near = difflib.get_close_matches(str(value), valid, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise InputError(f"Unknown {name} {value!r}.{hint} Expected one of: {', '.join(valid)}.")


def shapes(**arguments: tuple[jax.Array, str]) -> dict[str, int]:
    """Checks shapes that share named dimensions, for example ``features=(x, "B d")``.

    A dimension ``...`` at the end admits any further ones, and a number is that size. Returns
    the size of each named dimension. Raises InputError at the first argument that does not fit.
    """
    sizes: dict[str, int] = {}
    for name, (array, spec) in arguments.items():
        dims = spec.split()
        expected = [... if dim == "..." else int(dim) if dim.isdigit() else sizes.get(dim)
                    for dim in dims]
        try:
            chex.assert_shape(array, expected)
        except AssertionError as error:
            known = ", ".join(f"{dim}={sizes[dim]}" for dim in dims if dim in sizes)
            where = f" with {known}" if known else ""
            raise InputError(
                f"Expected {name} of shape [{', '.join(dims)}]{where}, got {array.shape}."
            ) from error
        sizes.update(
            (dim, size) for dim, size in zip(dims, array.shape, strict=False) if dim != "...")
    return sizes


def class_numbers(name: str, value: jax.Array) -> jax.Array:
    """Labels as int32, so that none wraps where classes are compared or indexed with it.

    What no int32 holds becomes -1, which is no class. Raises InputError unless ``value`` is of an
    integer dtype.
    """
    value = jnp.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise InputError(f"Expected {name} of an integer dtype, got {value.dtype}.")
    if value.dtype.itemsize < 4 or value.dtype == jnp.int32:
        return value.astype(jnp.int32)
    held = (value >= 0) & (value <= jnp.iinfo(jnp.int32).max)
    return jnp.where(held, value.astype(jnp.int32), -1)


def labels(name: str, value: np.ndarray, num_classes: int) -> None:
    """Raises InputError unless ``value`` holds integers in [0, num_classes)."""
    value = np.asarray(value)
    if not np.issubdtype(value.dtype, np.integer):
        raise InputError(f"Expected {name} of an integer dtype, got {value.dtype}.")
    wrong = (value < 0) | (value >= num_classes)
    if wrong.any():
        first = int(np.argmax(wrong))
        raise InputError(f"Expected {name} in [0, {num_classes}), got {value.flat[first]} "
                         f"at index {first} ({int(wrong.sum())} in all).")


def finite(name: str, tree: Any) -> None:
    """Raises InputError, which says how many are not, unless all numbers of a pytree are finite."""
    wrong = {jax.tree_util.keystr(path, simple=True, separator="."): int((~np.isfinite(leaf)).sum())
             for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
             if jnp.issubdtype(leaf.dtype, jnp.inexact)}
    wrong = {place: count for place, count in wrong.items() if count}
    if wrong:
        first = next(iter(wrong))
        where = f", the first in {first}" if first else ""
        raise InputError(f"Expected finite {name}, got {sum(wrong.values())} that are NaN or "
                         f"infinite{where}.")


def images(name: str, value: np.ndarray) -> None:
    """Raises InputError unless ``value`` is [N, H, W, channels], uint8 or float in [0, 1]."""
    value = np.asarray(value)
    if value.ndim != 4:
        raise InputError(f"Expected {name} of shape [N, H, W, channels], got {value.shape}.")
    if value.dtype == np.uint8:
        return
    if not np.issubdtype(value.dtype, np.floating):
        raise InputError(f"Expected {name} of dtype uint8 or floating, got {value.dtype}.")
    if np.isnan(value).any():
        raise InputError(f"Expected {name} without NaN, got {int(np.isnan(value).sum())} of them.")
    if value.size and (value.min() < 0 or value.max() > 1):
        raise InputError(
            f"Expected {name} with values in [0, 1], got [{value.min():.4g}, {value.max():.4g}].")
