"""Accuracies of rows of runs, what of a difference between two of them is chance, and what the
classes have to do with it.

Accuracies are fractions in the files of the runs and per cent from here on.
"""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from jaxrobust.app.report.page import count, level_name
from jaxrobust.app.study import Run, Study

FEWEST_SEEDS = 3
"""Trainings of each row below which no difference between rows is called clear."""


class Accuracy(NamedTuple):
    """Accuracy of one row at one noise level, over its finished seeds."""

    mean: float  # per cent; over the seeds, of the mean over the noise draws
    seed_means: tuple[float, ...]  # per cent
    std_over_seeds: float | None  # per cent, ddof=1; None with one seed
    std_over_draws: float | None  # per cent, ddof=1, averaged over the seeds; None with one draw
    error_of_images: float  # per cent; standard error that comes of the choice of test images
    balanced: float | None  # per cent; mean over the classes; None where they are not known
    by_class: tuple[float | None, ...] | None  # per cent; None of a class without test images


def accuracies(runs: Sequence[Run]) -> dict[float, Accuracy]:
    """Accuracy by noise level (std in units of 1/255) over the seeds of one row."""
    by_level = _by_test(runs, "levels", "std_255")
    return {level: by_level[level] for level in sorted(by_level)}


def perturbed_accuracies(runs: Sequence[Run]) -> dict[str, Accuracy]:
    """Accuracy by perturbation, other than the levels of noise, over the seeds of one row."""
    return _by_test(runs, "perturbations", "perturb")


def _by_test(runs, tests, name):
    found: dict[float | str, list[tuple[dict, int]]] = {}
    for run in runs:
        for test in run.evaluation.get(tests, ()):  # Older evaluations have noise levels alone.
            found.setdefault(test[name], []).append((test, run.evaluation["num_images"]))
    return {what: _accuracy([test for test, _ in of_seeds], min(size for _, size in of_seeds))
            for what, of_seeds in found.items()}


def _accuracy(by_seed: Sequence[dict], num_images: int) -> Accuracy:
    draws = [100 * np.array(test["accuracies"]) for test in by_seed]
    means = tuple(float(np.mean(of_seed)) for of_seed in draws)
    stds = [float(np.std(of_seed, ddof=1)) for of_seed in draws if len(of_seed) > 1]
    mean = statistics.fmean(means)
    by_class = None
    if all("by_class" in test for test in by_seed):  # Older evaluations have none.
        by_class = tuple(
            None if None in values else 100 * statistics.fmean(values)
            for values in zip(*(test["by_class"] for test in by_seed), strict=True))
    return Accuracy(
        mean=mean, seed_means=means,
        std_over_seeds=statistics.stdev(means) if len(means) > 1 else None,
        std_over_draws=statistics.fmean(stds) if stds else None,
        error_of_images=100 * error_of_share(mean / 100, num_images),
        balanced=by_class and statistics.fmean(value for value in by_class if value is not None),
        by_class=by_class)


def error_of_share(share: float, number: int) -> float:
    r"""Standard error of a share p of n images, as if these were drawn from many more.

    .. math:: \sqrt{\tilde p (1 - \tilde p) / (n + 2)}, \qquad \tilde p = (n p + 1) / (n + 2)

    With one image more on either side, so that 10 right of 10 are not taken for certain. For two
    shares it gives the interval of Agresti and Caffo (2000).
    """
    adjusted = (number * share + 1) / (number + 2)
    return math.sqrt(adjusted * (1 - adjusted) / (number + 2))


def pooled_std(*samples: Sequence[float]) -> float | None:
    """Pooled standard deviation (ddof=1) of samples; None if all have one value only."""
    freedom = sum(len(sample) - 1 for sample in samples)
    if freedom == 0:
        return None
    squares = sum((value - statistics.fmean(sample)) ** 2
                  for sample in samples for value in sample)
    return math.sqrt(squares / freedom)


class Difference(NamedTuple):
    """Of two mean accuracies, in percentage points."""

    points: float
    seeds: float | None  # half of the 95 % interval over trainings; None below FEWEST_SEEDS
    images: float  # half of the 95 % interval over test images

    @property
    def half(self) -> float:
        """Of the interval that holds both; without the trainings where they are too few."""
        return math.hypot(self.seeds or 0.0, self.images)

    @property
    def clear(self) -> bool:
        """Whether the interval over trainings and test images does not hold 0."""
        return self.seeds is not None and abs(self.points) > self.half

    @property
    def beyond_seeds(self) -> bool:
        """Whether the interval over trainings alone, on these test images, does not hold 0."""
        return self.seeds is not None and abs(self.points) > self.seeds


def difference(own: Accuracy, peer: Accuracy) -> Difference:
    r"""Of two rows, with what chance there is in the trainings and in the test images.

    Over trainings, half of the interval of Student's t test for two samples with one variance:

    .. math:: t_{0.975,\, n + m - 2}\; s \sqrt{1/n + 1/m},

    the standard deviation s pooled over the n and m seeds of these two rows alone: other methods
    may scatter more, or less. Over test images:

    .. math:: 1.96 \sqrt{e_1^2 + e_2^2},

    with the errors of :func:`error_of_share`. That is as if each row had been tested on images of
    its own: both saw the same, and where the same are hard for both, it is too wide. The two are
    independent, so that the whole is the root of the sum of their squares.
    """
    n, m = len(own.seed_means), len(peer.seed_means)
    seeds = None
    if min(n, m) >= FEWEST_SEEDS:
        t = float(stats.t.ppf(0.975, n + m - 2))
        seeds = t * pooled_std(own.seed_means, peer.seed_means) * math.sqrt(1 / n + 1 / m)
    images = float(stats.norm.ppf(0.975)) * math.hypot(own.error_of_images, peer.error_of_images)
    return Difference(own.mean - peer.mean, seeds, images)


def evaluation_text(evaluation: dict) -> str:
    """One evaluation in a line: accuracies, balanced ones, and that of the commonest class."""
    named = [*((level_name(test["std_255"]).lower(), test) for test in evaluation["levels"]),
             *((test["perturb"], test) for test in evaluation["perturbations"])]
    found = [(name, _accuracy([test], evaluation["num_images"])) for name, test in named]
    parts = [f"{name} {one.mean:.2f} % (balanced {one.balanced:.2f} %)" for name, one in found]
    classes = Classes(*map(tuple, evaluation["classes"].values()))
    parts.append("always “{}” {:.2f} %".format(*classes.commonest))
    return f"Accuracy on {count(evaluation['num_images'])} test images: {', '.join(parts)}."


class Classes(NamedTuple):
    """Of the test images."""

    names: tuple[str, ...]
    counts: tuple[int, ...]  # test images of each

    @property
    def commonest(self) -> tuple[str, float]:
        """The class of most test images, and its share in per cent."""
        index = int(np.argmax(self.counts))
        return self.names[index], 100 * self.counts[index] / sum(self.counts)

    @property
    def uneven(self) -> bool:
        """Whether the commonest has ten points more than if all were equally common."""
        return self.commonest[1] >= 10 + 100 / sum(count > 0 for count in self.counts)


def classes_of(runs: Sequence[Run]) -> Classes | None:
    """The classes of the test images of evaluated runs; None where they do not say so, as older
    evaluations do not, or were tested on different images."""
    found = {(tuple(there["names"]), tuple(there["counts"])) if there else None
             for there in (run.evaluation.get("classes") for run in runs)}
    return Classes(*found.pop()) if len(found) == 1 and None not in found else None


FAR_BELOW = 5.0
"""Percentage points by which balanced accuracy is called far below accuracy."""


def warnings_of_classes(study: Study) -> list[str]:
    """Sentences on what accuracies hide where classes are unevenly common."""
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
    far = []
    for row, label in study.labels.items():
        found = {level: one for level, one in accuracies(study.finished(row)).items()
                 if one.balanced is not None and one.mean - one.balanced > FAR_BELOW}
        if found:
            worst = max(found.values(), key=lambda one: one.mean - one.balanced)
            far.append(f"“{label}” ({worst.balanced:.2f} % against {worst.mean:.2f} %)")
    if far:
        sentences.append("Balanced accuracy is far below accuracy, so that rare classes are "
                         f"missed, with {', '.join(far)}.")
    return sentences
