"""Published numbers that a report shows beside those of a study: accuracies in per cent."""

from typing import NamedTuple


class AccuracyTable(NamedTuple):
    """Accuracies by method; the test images are clean or have Gaussian noise."""

    title: str
    levels: tuple[float, ...]  # std of the Gaussian noise in units of 1/255; 0 is clean
    rows: dict[str, tuple[tuple[float, float | None], ...]]  # by method: (mean, std) by level


class PerturbationTable(NamedTuple):
    """Accuracies by perturbation and method."""

    title: str
    rows: dict[str, tuple[tuple[float, float | None], ...]]  # by perturbation: (mean, std)
    methods: tuple[str, ...]  # the columns


TABLES: dict[str, AccuracyTable] = {}
"""By the key that recipes and studies name."""

PERTURBATIONS: dict[str, PerturbationTable] = {}
"""By the key of the table above whose networks they were measured of."""
