"""Dataclasses of settings as pytrees, with numbers that JAX traces and options that it does not."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax

Settings = TypeVar("Settings")


def hyperparameters(*traced: str) -> Callable[[type[Settings]], type[Settings]]:
    """Decorates a frozen dataclass to make it a pytree whose children are the named fields.

    The other fields are options: a function that is given the dataclass is compiled again for other
    options, but not for other numbers, and can be differentiated and mapped by the numbers.

    ``jax.tree_util.register_dataclass`` would call ``__post_init__`` whenever a pytree is rebuilt,
    but what JAX puts into one, such as tracers, axes, shardings and stacked numbers of several
    configurations, must not be checked as a caller's own settings are.
    """
    def register(cls: type[Settings]) -> type[Settings]:
        kind: type[Any] = cls
        options = [field.name for field in dataclasses.fields(kind) if field.name not in traced]

        def flatten(settings: Any) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
            return ([(jax.tree_util.GetAttrKey(name), getattr(settings, name)) for name in traced],
                    tuple(getattr(settings, name) for name in options))

        def unflatten(chosen: tuple[Any, ...], children: Iterable[Any]) -> Any:
            settings = object.__new__(cls)
            settings.__dict__.update(zip((*traced, *options), (*children, *chosen), strict=True))
            return settings

        jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
        return cls

    return register
