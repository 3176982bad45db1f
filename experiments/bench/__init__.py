"""Benchmarks of the library, by name."""

import pathlib
from collections.abc import Callable, Sequence

from experiments.bench import curvature, folder, train
from jaxrobust import InputError, _validate

BENCHMARKS: dict[str, Callable[..., str]] = {
    "train": train.measure, "curvature": curvature.measure, "folder": folder.measure}
"""Each of ``(folder, *, quick)``: writes its results there and returns a table of them."""

SECTIONS: dict[str, tuple[str, ...]] = {"train": tuple(train.SECTIONS)}
"""Of the benchmarks that have any, which take them as ``only``."""


def run(name: str, folder: pathlib.Path, *, quick: bool = False,
        only: Sequence[str] | None = None) -> str:
    """Runs the benchmark of that name, or some of its sections.

    Raises:
      InputError: (a ValueError) for an unknown name or section, which it says the nearest of, or
        if the folder belongs to something else.
    """
    check(name, only)
    sections = {} if only is None else {"only": only}
    return BENCHMARKS[name](folder, quick=quick, **sections)


def check(name: str, only: Sequence[str] | None = None) -> None:
    """Raises InputError unless there is a benchmark of that name, with these sections."""
    _validate.one_of("benchmark", name, BENCHMARKS)
    if only is None:
        return
    if name not in SECTIONS:
        raise InputError(f"Expected only with a benchmark that has sections "
                         f"({', '.join(SECTIONS)}), got {name!r}.")
    if not only:
        raise InputError(f"Expected only with some of the sections {', '.join(SECTIONS[name])}, "
                         "got none.")
    for section in only:
        _validate.one_of("section", section, SECTIONS[name])
