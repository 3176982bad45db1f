"""Times of several contenders in one run on one machine."""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

SECONDS_PER_ROUND = 0.1
"""A contender that takes less is called several times in a round."""


class Summary(NamedTuple):
    """Of one contender's rounds."""

    median: float
    lower_quartile: float
    upper_quartile: float


class Ratio(NamedTuple):
    """Of two contenders' times."""

    ratio: float  # of the medians
    smallest: float  # of a single round
    largest: float


def in_turn(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    done: Callable[[str, float], None] = lambda name, seconds: None,
) -> dict[str, list[float]]:
    """Seconds that a call of each contender takes, for each of the rounds.

    A round times every contender once, so that what disturbs the machine for a while disturbs
    all of them; each round starts with another one. A call must wait for its own result. One
    untimed call of each comes first. ``done`` is told the seconds of every turn.
    """
    calls = {}
    for name, call in contenders.items():
        start = time.perf_counter()
        call()
        spent = time.perf_counter() - start
        calls[name] = max(1, math.ceil(SECONDS_PER_ROUND / spent))
        done(name, spent)
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            for _ in range(calls[name]):
                contenders[name]()
            seconds[name].append((time.perf_counter() - start) / calls[name])
            done(name, seconds[name][-1])
    return seconds


def summarise(times: Sequence[float]) -> Summary:
    """Median and quartiles."""
    low, median, high = (float(value) for value in np.quantile(times, (0.25, 0.5, 0.75)))
    return Summary(median, low, high)


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
    """The ratio of the medians, and the extremes of the ratios round by round."""
    by_round = np.divide(numerator, denominator)
    return Ratio(summarise(numerator).median / summarise(denominator).median,
                 float(by_round.min()), float(by_round.max()))


def cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load_average() -> float | None:
    """Processes that ran or waited during the last minute, if the system tells."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
