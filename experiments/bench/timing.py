"""Times contenders in one run on one machine, as rows and as ratios of rows.

A row is ``{"case": ..., "contender": ..., "ms": ...}`` with more columns, those of
:data:`experiments.bench.page.COLUMNS`; ``ms`` has ``median, lower_quartile, upper_quartile,
rounds``. A ratio is ``{"numerator": ..., "denominator": ..., "case": ...}`` with ``ratio, smallest,
largest`` or ``not_measured``, the reason, and with ``bound, target, met`` if it has a target.
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrobust.app import provenance

SECONDS_PER_ROUND = 0.1
"""A contender that takes less is called several times in a round."""

Parts = Iterator[tuple[list[dict], list[dict]]]
"""Rows and ratios, case by case."""


class Contender(NamedTuple):
    """What is timed."""

    call: Callable[[], object]  # waits for its own result
    facts: Mapping[str, Any] = {}  # more columns of its row


class Pair(NamedTuple):
    """Contenders whose times are divided, and the target of their ratio."""

    numerator: str
    denominator: str
    bound: str = "at most"
    target: float | None = None


class NotMeasured(Exception):
    """Raised with the reason for which a section cannot be measured on this machine."""


def in_turn(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Measures the seconds that each call takes, for each round.

    A round times every call once, so that a temporary disturbance of the machine affects all of
    them; each round starts with another one. One untimed call of each comes first.
    """
    repeats = {}
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        repeats[name] = max(1, math.ceil(SECONDS_PER_ROUND / (time.perf_counter() - start)))
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            for _ in range(repeats[name]):
                calls[name]()
            seconds[name].append((time.perf_counter() - start) / repeats[name])
    return seconds


def row(case: str, contender: str, seconds: Iterable[float], per: int = 1, **facts) -> dict:
    """Makes the row of a contender, each call of which processes ``per`` images or updates."""
    times = [1e3 * value / per for value in seconds]
    low, median, high = (float(value) for value in np.quantile(times, (0.25, 0.5, 0.75)))
    return {"case": case, "contender": contender, "ms": {
        "median": median, "lower_quartile": low, "upper_quartile": high, "rounds": times}, **facts}


def rows(case: str, contenders: Mapping[str, Contender], rounds: int, per: int = 1) -> list[dict]:
    """Times contenders in turn, and makes a row for each."""
    seconds = in_turn({name: one.call for name, one in contenders.items()}, rounds)
    return [row(case, name, seconds[name], per, **one.facts) for name, one in contenders.items()]


def ratios(found: Sequence[Mapping], pairs: Iterable[Pair], missing: str | None = None
           ) -> list[dict]:
    """Divides the medians of the rows of one case, with the extremes over single rounds.

    ``missing`` is the reason if a contender has no row.
    """
    times = {each["contender"]: each["ms"] for each in found}
    result = []
    for pair in pairs:
        if missing is not None and not {pair.numerator, pair.denominator} <= times.keys():
            result.append(judged(pair, found[0]["case"]) | {"not_measured": missing})
            continue
        above, below = times[pair.numerator], times[pair.denominator]
        by_round = np.divide(above["rounds"], below["rounds"])
        result.append(judged(pair, found[0]["case"], ratio=above["median"] / below["median"],
                             smallest=float(by_round.min()), largest=float(by_round.max())))
    return result


def judged(pair: Pair, case: str, **numbers: float) -> dict:
    """Makes a ratio, with its target and whether the target is met."""
    result = {"numerator": pair.numerator, "denominator": pair.denominator, "case": case, **numbers}
    if pair.target is None:
        return result
    result |= {"bound": pair.bound, "target": pair.target}
    if "ratio" in numbers:
        ratio = numbers["ratio"]
        result["met"] = ratio >= pair.target if pair.bound == "at least" else ratio <= pair.target
    return result


def cores() -> int:
    """The number of cores that this process may use."""
    return len(provenance.cores())


def load_average() -> float | None:
    """Processes that ran or waited during the last minute; None if unknown."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
