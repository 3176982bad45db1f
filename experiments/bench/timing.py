"""Times of several contenders in one run on one machine: as rows, and as ratios of rows.

A row is ``{"case": ..., "contender": ..., "ms": ...}`` with more numbers beside it (those of
:data:`experiments.bench.page.COLUMNS`); ``ms`` has ``median, lower_quartile, upper_quartile,
rounds``. A ratio is ``{"numerator": ..., "denominator": ..., "case": ...}`` with ``ratio, smallest,
largest`` or ``not_measured``, the reason, and with ``bound, target, met`` if it has a target.
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

SECONDS_PER_ROUND = 0.1
"""A contender that takes less is called several times in a round."""

Done = Callable[[str, float], None]
"""Is told a contender and the seconds of each of its turns."""


class Pair(NamedTuple):
    """Contenders whose times are divided, and what their ratio should be."""

    numerator: str
    denominator: str
    bound: str = "at most"
    target: float | None = None


def in_turn(contenders: Mapping[str, Callable[[], object]], rounds: int, done: Done
            ) -> dict[str, list[float]]:
    """Seconds that a call of each contender takes, for each of the rounds.

    A round times every contender once, so that what disturbs the machine for a while disturbs
    all of them; each round starts with another one. A call must wait for its own result. One
    untimed call of each comes first.
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


def row(case: str, contender: str, seconds: Iterable[float], per: int = 1, **facts) -> dict:
    """The row of a contender each of whose calls works through ``per`` images or updates."""
    times = [1e3 * value / per for value in seconds]
    low, median, high = (float(value) for value in np.quantile(times, (0.25, 0.5, 0.75)))
    return {"case": case, "contender": contender, "ms": {
        "median": median, "lower_quartile": low, "upper_quartile": high, "rounds": times}, **facts}


def rows(case: str, contenders: Mapping[str, Callable[[], object]], rounds: int, done: Done, *,
         per: int = 1, facts: Mapping[str, Mapping] | None = None) -> list[dict]:
    """A row for each of the contenders, which take turns; ``facts`` are more numbers of some."""
    seconds = in_turn(contenders, rounds, done)
    return [row(case, name, values, per, **(facts or {}).get(name, {}))
            for name, values in seconds.items()]


def ratios(found: Sequence[Mapping], pairs: Iterable[Pair],
           missing: Mapping[str, str] | None = None) -> list[dict]:
    """Ratios of the medians of one case's rows, with the extremes of the ratios round by round.

    Args:
      found: the rows.
      pairs: what to divide.
      missing: why contenders have no row.
    """
    times = {each["contender"]: each["ms"] for each in found}
    result = []
    for pair in pairs:
        why = [(missing or {})[name] for name in pair[:2] if name not in times]
        if why:
            result.append(judged(pair, found[0]["case"]) | {"not_measured": why[0]})
            continue
        above, below = times[pair.numerator], times[pair.denominator]
        by_round = np.divide(above["rounds"], below["rounds"])
        result.append(judged(pair, found[0]["case"], ratio=above["median"] / below["median"],
                             smallest=float(by_round.min()), largest=float(by_round.max())))
    return result


def judged(pair: Pair, case: str, **numbers: float) -> dict:
    """A ratio, if ``numbers`` hold one, with the target and whether it is met."""
    result = {"numerator": pair.numerator, "denominator": pair.denominator, "case": case, **numbers}
    if pair.target is None:
        return result
    result |= {"bound": pair.bound, "target": pair.target}
    if "ratio" in numbers:
        ratio = numbers["ratio"]
        result["met"] = ratio >= pair.target if pair.bound == "at least" else ratio <= pair.target
    return result


def cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load_average() -> float | None:
    """Processes that ran or waited during the last minute, if the system tells."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
