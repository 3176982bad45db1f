"""Dataclasses of settings as pytrees: numbers that JAX traces, options that it does not."""

import dataclasses
from collections.abc import Callable

import jax


def hyperparameters(*traced: str) -> Callable[[type], type]:
    """Decorates a frozen dataclass whose fields named here are a pytree's children.

    The other fields are options: a function that is given the dataclass is compiled anew for other
    options, and not for other numbers, by which it can be differentiated and mapped.

    ``jax.tree_util.register_dataclass`` would call ``__post_init__`` whenever a pytree is put
    together. What JAX puts into one, such as tracers, axes and shardings, and arrays of the numbers
    of several configurations, is no setting to be checked; so here only a caller's own are.
    """
    def register(cls):
        options = [field.name for field in dataclasses.fields(cls) if field.name not in traced]

        def flatten(settings):
            return ([(jax.tree_util.GetAttrKey(name), getattr(settings, name)) for name in traced],
                    tuple(getattr(settings, name) for name in options))

        def unflatten(chosen, children):
            settings = object.__new__(cls)
            settings.__dict__.update(zip((*traced, *options), (*children, *chosen), strict=True))
            return settings

        jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
        return cls

    return register
