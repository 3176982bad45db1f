"""Published accuracies, in per cent, that a report shows beside those of a study."""

from typing import NamedTuple


class AccuracyTable(NamedTuple):
    """Accuracies by method, on clean images and under Gaussian noise."""

    title: str
    levels: tuple[float, ...]  # std of the Gaussian noise in units of 1/255; 0 is clean
    rows: dict[str, tuple[tuple[float, float | None], ...]]  # by method: (mean, std) by level


class PerturbationTable(NamedTuple):
    """Accuracies by perturbation and method."""

    title: str
    rows: dict[str, tuple[tuple[float, float | None], ...]]  # by perturbation: (mean, std)
    methods: tuple[str, ...]  # the columns


TABLES: dict[str, AccuracyTable] = {}
"""Tables by the key in recipes and studies."""

PERTURBATIONS: dict[str, PerturbationTable] = {}
"""Tables by the key in :data:`TABLES` of the same networks."""
