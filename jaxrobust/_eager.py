"""Decorators of numerical functions: plain scalars, and eager calls compiled as a whole."""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar, TypeVarTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust import _validate

P = ParamSpec("P")
T = TypeVar("T")
Ts = TypeVarTuple("Ts")


def python_scalars(function: Callable[P, T]) -> Callable[P, T]:
    """Converts NumPy scalars to Python's, which adopt the dtype of the arrays they meet."""
    apply: Callable[..., T] = function

    @functools.wraps(function)
    def call(*arguments: P.args, **options: P.kwargs) -> T:
        plain = (value.item() if isinstance(value, np.generic) else value for value in arguments)
        return apply(*plain, **{
            name: value.item() if isinstance(value, np.generic) else value
            for name, value in options.items()})

    return call


def as_one_program(estimator: Callable[P, T]) -> Callable[P, T]:
    """Compiles an eager call as a whole, unless an earlier call was the same program.

    ``jax.jit`` with the functions as static arguments would keep the arrays that they close over
    from the first call, and recompile for every new lambda. Here each eager call traces the
    estimator, which takes milliseconds, with the arrays that its functions close over as arguments
    of the program. Programs are compared by what they compute: a new lambda that does the same
    compiles nothing, and parameters have their current values.

    A call with traced arguments, as under ``jax.jit``, is left to that transformation. Scalars of
    NumPy and JAX become those of Python in either case.
    """
    signature = inspect.signature(estimator)
    apply: Callable[..., T] = estimator

    @functools.wraps(estimator)
    def call(*arguments: P.args, **options: P.kwargs) -> T:
        bound = signature.bind(*arguments, **options)
        given = {name: _python_scalar(value) for name, value in bound.arguments.items()}
        if any(isinstance(value, jax.core.Tracer) for value in given.values()):
            return apply(**given)
        for name, value in given.items():
            if isinstance(value, np.ndarray):
                _validate.numbers(name, value)
        arrays = {name: jnp.asarray(given.pop(name)) for name in list(given)
                  if isinstance(given[name], (jax.Array, np.ndarray))}
        return _traced(lambda arrays: apply(**given, **arrays), arrays)(arrays)

    return call


def as_program(function: Callable[[*Ts], T]) -> Callable[[*Ts], T]:
    """Compiles a function of arrays that is called again and again with the same shapes.

    It is traced at the first call, with the numbers it closes over as arguments of the program
    (:func:`as_one_program` says why), so that they are those of the first call in all of them.
    Scalars that it closes over are part of the program; those that are arguments are not. A call
    with traced arguments is left to the transformation.
    """
    program: Callable[..., T] | None = None

    @functools.wraps(function)
    def call(*arguments: *Ts) -> T:
        nonlocal program
        if is_traced(arguments):
            return function(*arguments)
        if program is None:
            program = _traced(function, *arguments)
        return program(*arguments)

    return call


def is_traced(tree: Any) -> bool:
    """Whether a value in a pytree is not known yet, as inside of ``jax.jit``."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def _traced(function: Callable[..., T], *arguments: Any) -> Callable[..., T]:
    """The function as a compiled program for arguments like these."""
    traced, outputs = jax.make_jaxpr(function, return_shape=True)(*arguments)
    program, consts = _Program(traced.jaxpr), list(traced.consts)
    structure = jax.tree.structure(outputs)
    return lambda *arguments: jax.tree.unflatten(
        structure, _run(program, consts, jax.tree.leaves(arguments)))


def _python_scalar(value: Any) -> Any:
    is_array = isinstance(value, (jax.Array, np.ndarray)) and not isinstance(value, jax.core.Tracer)
    if isinstance(value, np.generic) or (
            is_array and value.ndim == 0
            and not jnp.issubdtype(value.dtype, jax.dtypes.prng_key)):
        return value.item()
    return value


class _Program:
    """A jaxpr without its constants, equal to all that compute the same."""

    def __init__(self, jaxpr: Any) -> None:
        self.jaxpr = jaxpr
        # Constants of inner jitted functions, which stay in the jaxpr.
        self._inner = tuple(_inner_constants(jaxpr))
        self._key = str(jaxpr), tuple(map(id, self._inner))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Program) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def _inner_constants(jaxpr: Any) -> Iterator[Any]:
    from jax.extend import core  # Takes a tenth of a second, which a mere import can do without.

    for equation in jaxpr.eqns:
        for part in jax.tree.leaves(list(equation.params.values()),
                                    is_leaf=lambda part: isinstance(part, core.ClosedJaxpr)):
            if isinstance(part, core.ClosedJaxpr):
                yield from part.consts
                yield from _inner_constants(part.jaxpr)
            elif isinstance(part, core.Jaxpr):
                yield from _inner_constants(part)


@functools.partial(jax.jit, static_argnums=0)
def _run(program: _Program, constants: list[Any], leaves: list[Any]) -> list[Any]:
    from jax.extend import core

    return core.jaxpr_as_fun(core.ClosedJaxpr(program.jaxpr, constants))(*leaves)
