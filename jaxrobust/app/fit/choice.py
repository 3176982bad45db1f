"""Picks the best run by its scores on held-out images, and says how sure that is."""

import math
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxrobust.statistics import mean_difference_interval, paired_difference_interval


class Scored(NamedTuple):
    """A run and what it gets right of N held-out images."""

    row: str
    seed: int
    folder: pathlib.Path
    clean: np.ndarray  # shape=[N], dtype=bool or float
    noisy: np.ndarray  # shape=[N], dtype=float: the share of the draws of the noise


class Comparison(NamedTuple):
    """How much better the chosen method is than another, in scores of [0, 1]."""

    row: str
    difference: float
    images: float  # half of the 95 % interval over images, which both methods share
    seeds: float | None  # half of the 95 % interval over trainings; None for a single seed

    @property
    def half(self) -> float:
        """Half of the interval over both."""
        return math.hypot(self.images, self.seeds or 0.0)

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0, over trainings too."""
        return self.seeds is not None and self.difference > self.half


class Choice(NamedTuple):
    """The chosen run, and the scores of all methods."""

    run: Scored
    scores: dict[str, float]  # by method, best first: the mean over images and seeds
    others: tuple[Comparison, ...]  # to the other methods, best first


def score_of(run: Scored, clean_share: float) -> np.ndarray:
    """The score [N] of a run for each image: clean_share times whether it is right on the clean
    image, and the rest times its share of right answers under noise."""
    return clean_share * np.asarray(run.clean, float) + (1 - clean_share) * np.asarray(run.noisy)


def choose(runs: Sequence[Scored], clean_share: float) -> Choice:
    """Picks the method with the best mean score over images and seeds, and its best seed.

    The first of equally good ones is chosen. All runs are scored on the same images.
    """
    by_row: dict[str, list[Scored]] = {}
    for run in runs:
        by_row.setdefault(run.row, []).append(run)
    images = {row: np.mean([score_of(run, clean_share) for run in ones], axis=0)
              for row, ones in by_row.items()}
    means = {row: [float(score_of(run, clean_share).mean()) for run in ones]
             for row, ones in by_row.items()}
    ranked = sorted(by_row, key=lambda row: -images[row].mean())
    best, *others = ranked

    def compare(row):
        difference, half = paired_difference_interval(images[best], images[row])
        return Comparison(row, difference, half,
                          mean_difference_interval(means[best], means[row]))

    run = max(by_row[best], key=lambda one: score_of(one, clean_share).mean())
    return Choice(run, {row: float(images[row].mean()) for row in ranked},
                  tuple(map(compare, others)))
