"""Checks of arguments, each failing with one line that names the argument and its value."""

import operator
from typing import Any, Protocol

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxrobust._errors import InputError, NotFiniteError, installed, one_of

__all__ = ["InputError", "NotFiniteError", "class_numbers", "finite", "finite_logits", "floats",
           "function", "images", "in_range", "installed", "instance", "integer", "integer_in",
           "key", "labels", "numbers", "one_of", "reals", "shapes"]


def in_range(name: str, value: float | jax.Array, low: float, high: float = np.inf, *,
             open_low: bool = False, open_high: bool = True) -> None:
    """Raises InputError unless ``value`` is a number in the interval from ``low`` to ``high``.

    A value that is traced by a JAX transformation is not known yet, and passes.
    """
    if isinstance(value, jax.core.Tracer):
        return
    try:
        above = value > low if open_low else value >= low
        below = value < high if open_high else value <= high
        inside = bool(above and below)
    except (TypeError, ValueError):  # Not comparable with numbers, or an array of several values.
        inside = False
    left, right = "(" if open_low else "[", ")" if open_high else "]"
    if not inside:
        raise InputError(f"Expected {name}={_brief(value)} in {left}{low}, {high}{right}.")
    if high == np.inf:
        floats = jnp.finfo(jax.dtypes.canonicalize_dtype(np.float64))
        most = float(floats.max)  # Others become infinite.
        if open_low and low == 0:  # Others become 0.
            left, low = "[", float(floats.tiny)
        if not low <= value <= most:
            raise InputError(f"Expected {name}={_brief(value)} in {left}{low}, {most}].")


_LONGEST = 100


def _brief(value: Any) -> str:
    """A value as text of some length, whatever it is."""
    if isinstance(value, int) and abs(value) >= 10**_LONGEST:
        return f"an integer of more than {_LONGEST} digits"  # Python refuses to print the largest.
    text = " ".join(str(value).split())  # An array's is several lines.
    return text if len(text) <= 2 * _LONGEST else f"{text[:_LONGEST]}..."


def instance(name: str, value: Any, kind: type) -> None:
    """Raises InputError unless ``value`` is an instance of a class."""
    if not isinstance(value, kind):
        raise InputError(
            f"Expected {name} to be a {kind.__name__}, got a {type(value).__name__}.")


def function(name: str, value: Any) -> None:
    """Raises InputError unless ``value`` can be called."""
    if not callable(value):
        raise InputError(f"Expected {name} to be a function, got a {type(value).__name__}.")


def key(name: str, value: Any) -> None:
    """Raises InputError unless ``value`` is one key of JAX's random numbers.

    A key of the old kind, two numbers as ``jax.random.PRNGKey`` makes them, is one.
    """
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", ())
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not (shape == () if typed else dtype == np.uint32 and len(shape) == 1):
        what = f"{dtype} {list(shape)}" if dtype is not None else f"a {type(value).__name__}"
        raise InputError(f"Expected {name} to be a key, as of jax.random.key(0), got {what}.")


def integer(name: str, value: int, low: int) -> int:
    """Returns the value as an ``int``; raises InputError unless it is an integer >= ``low``."""
    try:
        number = None if isinstance(value, bool | np.bool) else operator.index(value)
    except TypeError:  # A float, a string, or an integer that is traced and not known yet.
        number = None
    if number is None or number < low:
        raise InputError(f"Expected {name}={_brief(value)} to be an integer >= {low}.")
    return number


def integer_in(name: str, value: int, low: int, high: float = np.inf) -> int:
    """Returns the value as an ``int``; raises InputError unless it is an integer from ``low`` to
    ``high``, that included."""
    in_range(name, value, low, high, open_high=high == np.inf)
    return integer(name, value, low)


class Shaped(Protocol):
    """An array, or what is stored as one."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def shapes(**arguments: tuple[Shaped, str]) -> dict[str, int]:
    """Checks shapes that share named dimensions, for example ``features=(x, "B d")``.

    A dimension ``...`` at the end stands for any further ones, and a number for that size; named
    dimensions are at least 1. Returns the size of each named dimension. Raises InputError for the
    first argument that does not fit.
    """
    sizes: dict[str, int] = {}
    for name, (array, spec) in arguments.items():
        dims = spec.split()
        wanted = f"Expected {name} of shape [{', '.join(dims)}]"
        if not hasattr(array, "shape"):
            raise InputError(f"{wanted}, got a {type(array).__name__}, which is not an array.")
        if not _is_real(array):
            raise InputError(f"{wanted} of real numbers, got {getattr(array, 'dtype', None)}.")
        expected = [... if dim == "..." else int(dim) if dim.isdigit() else sizes.get(dim)
                    for dim in dims]
        try:
            chex.assert_shape(array, expected)
        except AssertionError as error:
            known = ", ".join(f"{dim}={sizes[dim]}" for dim in dims if dim in sizes)
            where = f" with {known}" if known else ""
            raise InputError(f"{wanted}{where}, got {array.shape}.") from error
        named = {dim: size for dim, size in zip(dims, array.shape, strict=False)
                 if dim != "..." and not dim.isdigit()}
        if 0 in named.values():
            raise InputError(f"{wanted}, no size 0, got {array.shape}.")
        sizes.update(named)
    return sizes


def _is_real(array: Any) -> bool:
    """Whether an array, or the shape and dtype of one, is of real numbers or truth values."""
    dtype = getattr(array, "dtype", None)
    return dtype is None or any(jnp.issubdtype(dtype, kind) for kind in (
        jnp.floating, jnp.integer, jnp.bool_))


def reals(name: str, value: Any) -> np.ndarray:
    """Returns real numbers as NumPy's float64; raises InputError if they are none."""
    value = np.asarray(_as_array(name, value))
    if not _is_real(value):
        raise InputError(f"Expected {name} of real numbers, got {value.dtype}.")
    return value.astype(np.float64)


def numbers(name: str, value: Any) -> None:
    """Raises InputError unless ``value`` is a real number or an array of any shape of them."""
    if not (isinstance(value, (int, float, np.ndarray, np.generic, jax.Array))
            and _is_real(value)):
        what = getattr(value, "dtype", f"a {type(value).__name__}")
        raise InputError(f"Expected {name} to be real numbers, got {what}.")
    if isinstance(value, int | float):
        in_range(name, value, -np.inf, open_high=False)


def floats(name: str, value: ArrayLike) -> jax.Array:
    """Returns an array of floats as float32 or wider; raises InputError if they are not floats.

    In bfloat16 a sum of ones ends at 256.
    """
    value = _as_array(name, value)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise InputError(f"Expected {name} of a floating dtype, got {value.dtype}.")
    return jnp.asarray(value, jax.dtypes.canonicalize_dtype(
        np.promote_types(value.dtype, np.float32)))


def class_numbers(name: str, value: ArrayLike) -> jax.Array:
    """Returns labels as int32, so that none wraps around where classes are compared or indexed.

    A label beyond the range of int32 becomes -1, which is no class. Raises InputError unless
    ``value`` is an array, or a list, of integers.
    """
    value = _as_array(name, value)
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise InputError(f"Expected {name} of an integer dtype, got {value.dtype}.")
    if value.dtype.itemsize < 4 or value.dtype == np.int32:
        return jnp.asarray(value, np.int32)
    # In NumPy if they are NumPy's: jnp.asarray wraps around what is too large for int32.
    numpy = np if isinstance(value, np.ndarray) else jnp
    held = (value >= 0) & (value <= np.iinfo(np.int32).max)
    return jnp.asarray(numpy.where(held, value.astype(np.int32), np.int32(-1)))


def _as_array(name: str, value: Any) -> jax.Array | np.ndarray:
    if isinstance(value, jax.Array):
        return value
    try:
        return np.asarray(value)
    except ValueError as error:  # Rows of different lengths.
        raise InputError(f"Expected {name} to be an array, got {type(value).__name__} of "
                         "different lengths.") from error


def labels(name: str, value: ArrayLike, num_classes: int) -> None:
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
    """Raises NotFiniteError unless all numbers of a pytree are finite."""
    wrong = {jax.tree_util.keystr(path, simple=True, separator="."): int((~np.isfinite(leaf)).sum())
             for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
             if jnp.issubdtype(leaf.dtype, jnp.inexact)}
    wrong = {place: count for place, count in wrong.items() if count}
    if wrong:
        first = next(iter(wrong))
        where = f", the first in {first}" if first else ""
        raise NotFiniteError(f"Expected finite {name}, got {sum(wrong.values())} that are NaN or "
                             f"infinite{where}.")


def finite_logits(finite: ArrayLike, which: str = "", indices: np.ndarray | None = None) -> None:
    """Raises NotFiniteError, which says of how many images, unless all logits are finite.

    Args:
      finite: [N] bool, whether all logits of an image are.
      which: more words on the images.
      indices: [N], the numbers of the images if they are not their positions.
    """
    finite = np.asarray(finite)
    if not finite.all():
        first = int(np.argmin(finite))
        raise NotFiniteError(
            f"Expected finite logits, got NaN or infinite ones for {int((~finite).sum())} of "
            f"{len(finite)} images{which}, the first at index "
            f"{first if indices is None else int(indices[first])}.")


def images(name: str, value: ArrayLike) -> None:
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
