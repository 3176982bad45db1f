"""Benchmarks of the library, by name."""

import pathlib
from collections.abc import Callable

from experiments.bench import curvature
from jaxrobust import _validate

BENCHMARKS: dict[str, Callable[..., str]] = {"curvature": curvature.measure}
"""Each of ``(folder, *, quick)``: writes its results there and returns a table of them."""


def run(name: str, folder: pathlib.Path, *, quick: bool = False) -> str:
    """Runs the benchmark of that name.

    Raises:
      InputError: (a ValueError) for an unknown name, which it says the nearest of, or if the
        folder belongs to something else.
    """
    check_name(name)
    return BENCHMARKS[name](folder, quick=quick)


def check_name(name: str) -> None:
    """Raises InputError, naming the nearest benchmark, unless there is one of that name."""
    _validate.one_of("benchmark", name, BENCHMARKS)
