"""Fits methods, epochs and seeds into a time."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxrobust.app.config import InputError
from jaxrobust.app.report.page import duration, listed

MOST_SEEDS = 3
LEAST_SHARE = 0.25
"""Share of the wanted epochs below which a method is left out rather than all trained for less."""
RESERVE = 0.1
"""Share of the budget that is kept for what is not measured, such as reading images."""


class Costs(NamedTuple):
    """Times on this machine, in seconds."""

    compile: float  # the programs of a method
    pass_per_image: float  # a forward pass of an image


class Work(NamedTuple):
    """What a run does, in images."""

    trained: int  # images in an epoch
    forward: int  # forward passes beside the updates, in validation and tests


class Schedule(NamedTuple):
    """What is trained."""

    rows: tuple[str, ...]
    epochs: int
    seeds: tuple[int, ...]
    seconds: float  # expected
    notes: tuple[str, ...]  # what was left out for the budget, a line each


def seconds_of(rows: Sequence[str], epochs: int, num_seeds: int, relative: Mapping[str, float],
               costs: Costs, work: Work) -> float:
    """The expected time of all runs; ``relative`` is the work of each method's update in units of
    ``normal``, which is three forward passes."""
    passes = sum(3 * relative[row] * epochs * work.trained + work.forward for row in rows)
    return len(rows) * costs.compile + num_seeds * passes * costs.pass_per_image


def plan_schedule(
    order: Sequence[str], relative: Mapping[str, float], costs: Costs, work: Work, budget: float, *,
    spent: float = 0.0,
    wanted_epochs: int, rows: Sequence[str] | None = None, epochs: int | None = None,
    seeds: Sequence[int] | None = None,
) -> Schedule:
    """Fits methods, epochs and seeds into a budget in seconds.

    First all methods with the wanted epochs and one seed; then, if these take too long, fewer
    epochs; below a quarter of those wanted, fewer methods, the last in ``order`` first; and if
    these take less, more seeds. ``rows``, ``epochs`` and ``seeds`` fix what they name, also beyond
    the budget.

    Raises:
      InputError: (a ValueError) if one epoch of the first method does not fit.
    """
    usable = (1 - RESERVE) * budget - spent
    asked, more = tuple(rows or order), seeds is None
    fewest = len(seeds) if seeds is not None else 1

    def time_of(rows, epochs, num_seeds):
        return seconds_of(rows, epochs, num_seeds, relative, costs, work)

    def most_epochs(rows):
        fixed, one = time_of(rows, 0, fewest), time_of(rows, 1, fewest)
        return min(wanted_epochs, math.floor((usable - fixed) / (one - fixed)))

    chosen, trained = asked, epochs
    if epochs is None:
        least = math.ceil(LEAST_SHARE * wanted_epochs)
        while rows is None and len(chosen) > 1 and most_epochs(chosen) < least:
            chosen = chosen[:-1]
        trained = most_epochs(chosen)
        if trained < 1:
            needed = (spent + time_of(chosen, 1, fewest)) / (1 - RESERVE)
            raise InputError(f"Expected budget={duration(budget)} to be at least "
                             f"{duration(needed)}, which an epoch of {listed(chosen)} takes here.")
    elif rows is None:
        while len(chosen) > 1 and time_of(chosen, trained, fewest) > usable:
            chosen = chosen[:-1]
    if seeds is None:
        number = max((count for count in range(1, MOST_SEEDS + 1)
                      if time_of(chosen, trained, count) <= usable), default=1)
        seeds = tuple(range(number))
    seconds = time_of(chosen, trained, len(seeds))
    left = [f"method {row}" for row in asked if row not in chosen]
    if trained < wanted_epochs and epochs is None:
        left.append(f"{wanted_epochs - trained} of {wanted_epochs} epochs")
    if more and len(seeds) < MOST_SEEDS:
        left.append(f"{MOST_SEEDS - len(seeds)} of {MOST_SEEDS} seeds")
    notes = [f"Left out for the budget of {duration(budget)}: {', '.join(left)}."] if left else []
    if seconds > usable:
        notes.append(f"Expected to take longer than the budget of {duration(budget)}: options fix "
                     "what is trained.")
    return Schedule(chosen, trained, tuple(seeds), seconds, tuple(notes))
