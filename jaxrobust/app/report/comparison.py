"""Compares accuracies of rows: how much of a difference is chance, and how uneven the classes are.

Accuracies are fractions in the files of the runs and per cent from here on.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrobust.app.report.frame import accuracies, balanced, noise_level, tests
from jaxrobust.app.report.page import count
from jaxrobust.app.study.read import Run, Study
from jaxrobust.statistics import mean_difference_interval, normal_interval, share_error

FEWEST_SEEDS = 3
"""Trainings of each row below which no difference between rows is called clear."""


def error_of_images(accuracy: Any) -> float:
    """Returns the standard error, in percentage points, due to the choice of test images."""
    return 100 * share_error(accuracy.mean / 100, int(accuracy.num_images))


class Difference(NamedTuple):
    """A difference of two mean accuracies, in percentage points."""

    points: float
    seeds: float | None  # half of the 95 % interval over trainings; None below FEWEST_SEEDS
    images: float  # half of the 95 % interval over test images

    @property
    def half(self) -> float:
        """Half of the interval over both; over the images alone where trainings are too few."""
        return math.hypot(self.seeds or 0.0, self.images)

    @property
    def clear(self) -> bool:
        """Whether the interval over trainings and test images excludes 0."""
        return self.seeds is not None and abs(self.points) > self.half

    @property
    def beyond_seeds(self) -> bool:
        """Whether the interval over trainings alone, on these test images, excludes 0."""
        return self.seeds is not None and abs(self.points) > self.seeds


def difference(own: Any, peer: Any) -> Difference:
    """Compares two lines of :data:`~jaxrobust.app.report.frame.Accuracies`, with intervals over
    trainings and over test images.

    The interval over trainings is :func:`~jaxrobust.statistics.mean_difference_interval`, with the
    standard deviation of these two rows alone, since other methods may vary more or less. That over
    test images assumes that the rows were tested on different images, and is too wide where both
    find the same images hard. The two are independent, and combine as the root of the sum of their
    squares.
    """
    enough = min(len(own.by_seed), len(peer.by_seed)) >= FEWEST_SEEDS
    seeds = mean_difference_interval(own.by_seed, peer.by_seed) if enough else None
    images = normal_interval(error_of_images(own), error_of_images(peer))
    return Difference(own.mean - peer.mean, seeds, images)


def evaluation_text(evaluation: dict) -> str:
    """Sums up an evaluation: accuracies, balanced ones, and that of the commonest class."""
    parts = [f"{name} {100 * statistics.fmean(test['accuracies']):.2f} % (balanced "
             f"{balanced(test):.2f} %)" for name, test in tests(evaluation)]
    classes = Classes(*map(tuple, evaluation["classes"].values()))
    parts.append("always “{}” {:.2f} %".format(*classes.commonest))
    return f"Accuracy on {count(evaluation['num_images'])} test images: {', '.join(parts)}."


class Classes(NamedTuple):
    """The classes of the test images."""

    names: tuple[str, ...]
    counts: tuple[int, ...]  # test images of each

    @property
    def commonest(self) -> tuple[str, float]:
        """The class with most test images, and its share in per cent."""
        index = int(np.argmax(self.counts))
        return self.names[index], 100 * self.counts[index] / sum(self.counts)

    @property
    def uneven(self) -> bool:
        """Whether the commonest has ten points more than if all were equally common."""
        return self.commonest[1] >= 10 + 100 / sum(count > 0 for count in self.counts)


def classes_of(runs: Sequence[Run]) -> Classes | None:
    """Returns the classes of evaluated runs' test images; None where older evaluations do not
    record them, or runs were tested on different images."""
    found = {(tuple(there["names"]), tuple(there["counts"])) if there else None
             for there in (run.evaluation.get("classes") for run in runs)}
    return Classes(*found.pop()) if len(found) == 1 and None not in found else None


FAR_BELOW = 5.0
"""Percentage points by which balanced accuracy is called far below accuracy."""


def warnings_of_classes(study: Study) -> list[str]:
    """Says what accuracies hide where some classes are much more common than others."""
    classes = classes_of(study.all_finished())
    if classes is None:
        return []
    sentences = []
    name, share = classes.commonest
    if classes.uneven:
        sentences.append(
            f"{share:.1f} % of the test images are of the class “{name}”: a classifier that always "
            f"says “{name}” has an accuracy of {share:.1f} %. Read the balanced accuracy, the mean "
            "over the classes, beside it.")
    far, by_row = [], accuracies(study)
    for row, label in study.labels.items():
        found = [one for one in by_row[row].values()
                 if noise_level(one.condition) is not None and one.mean - one.balanced > FAR_BELOW]
        if found:
            worst = max(found, key=lambda one: one.mean - one.balanced)
            far.append(f"“{label}” ({worst.balanced:.2f} % against {worst.mean:.2f} %)")
    if far:
        sentences.append("Balanced accuracy is far below accuracy, so that rare classes are "
                         f"missed, with {', '.join(far)}.")
    return sentences
