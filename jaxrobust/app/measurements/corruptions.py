"""Accuracy under common corruptions, generated or from the benchmark's own files."""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Annotated

import jax
import numpy as np
import tyro

from jaxrobust import _validate, evaluation
from jaxrobust import corruptions as common
from jaxrobust.app.classifiers import ForeignModel
from jaxrobust.app.config import InputError, distinct
from jaxrobust.app.execution import batch_size_of
from jaxrobust.app.measurements.estimates import (
    Estimate,
    Limit,
    bootstrapped,
    check_counts,
    dots_picture,
    estimate,
    numbers_of,
    share,
    subset_of,
    subset_text,
    subsets_text,
    table_of,
)
from jaxrobust.app.measurements.runner import Measured, Measurement, Work, settings_asked
from jaxrobust.app.progress import progress
from jaxrobust.app.report.page import Section
from jaxrobust.app.study.read import Run, Study
from jaxrobust.app.trainer import TrainedRun
from jaxrobust.data import Split, load_corrupted, load_corrupted_tfds

SEED = 0
"""Seeds the draws of generated corruptions: the same for all models."""

CLEAN = "clean"

TFDS = "tfds"
"""In the place of a folder of files: what TensorFlow Datasets has prepared."""


@dataclasses.dataclass(frozen=True)
class CorruptionSettings:
    """How corruptions are measured."""

    names: tuple[str, ...] = common.BENCHMARK
    """Corruptions; the 15 of the benchmark by default."""
    severities: tuple[int, ...] = common.SEVERITIES
    """Severities, from 1 to 5."""
    files: str | None = None
    """Folder of the official files, NAME.npy and labels.npy as in CIFAR-10-C, or "tfds" for
    cifar10_corrupted as TensorFlow Datasets has prepared it; without it corruptions are
    generated."""
    data_dir: Annotated[str | None, tyro.conf.Suppress] = None
    """Folder of TensorFlow Datasets, which --data-dir sets; none for the default one."""
    limit: Limit = None
    """Number of test images, drawn at random by class with seed 0; none for all."""

    def __post_init__(self):
        for name, values in (("corruption", self.names), ("severity", self.severities)):
            _validate.in_range(f"number of {name} values", len(values), 1)
            distinct(name, values)
        for name in self.names:
            common.corruption(name, 1)
        for severity in self.severities:
            common.corruption("fog", severity)
        check_counts(self, "limit")


def _asked(run: TrainedRun | ForeignModel, settings: CorruptionSettings, folder: pathlib.Path
           ) -> dict:
    asked = settings_asked(run, settings, folder)
    del asked["data_dir"]  # A place, which changes no value.
    return asked


def _measure(run: TrainedRun | ForeignModel, settings: CorruptionSettings, work: Work) -> Measured:
    """Measures which test images are right, clean and under each corruption at each severity.

    Generated corruptions change the data set's test images; official files bring images of their
    own, of which the same number is drawn.
    """
    test = subset_of(run.dataset.test, settings.limit)
    every = [(CLEAN, 0), *((name, severity) for name in settings.names
                           for severity in settings.severities)]
    whole = run.dataset.test if settings.files is None else _official(
        run, settings, settings.names[0], settings.severities[0])
    with progress(f"{work.label}, corruptions", len(every), done=work.rows) as shown:
        for name, severity in every[work.rows:]:
            split, perturb = test, None
            if name != CLEAN and settings.files is None:
                perturb = common.corruption(name, severity)
            elif name != CLEAN:
                split = subset_of(_official(run, settings, name, severity), settings.limit)
            correct, = evaluation.evaluate(
                run.logits_fn, split.images, split.labels, perturb=perturb,
                key=jax.random.fold_in(jax.random.key(SEED), _number(name, severity)),
                batch_size=batch_size_of(split.images), layout=run.layout)
            work.add({"name": np.array([name]), "severity": np.array([severity]),
                      "right": np.array([correct.sum()]), "number": np.array([len(correct)]),
                      "correct": np.packbits(correct)[None]})
            shown.advance(**{f"accuracy, {name} {severity}": float(correct.mean())})
    table = work.table
    numbers = {(name, severity): row for row, (name, severity) in enumerate(every)}
    correct = [np.unpackbits(packed, count=number).astype(float)
               for packed, number in zip(table["correct"], table["number"], strict=True)]

    def mean(names):
        by_image = np.mean([correct[numbers[name, severity]] for name in names
                            for severity in settings.severities], axis=0)
        return bootstrapped(lambda rows: by_image[rows].mean(), len(by_image), most=1)

    return Measured({
        "origin": "generated" if settings.files is None else "official",
        "num_images": int(table["number"][-1]),
        "subset": (subset_text(test, whole) if settings.files is None else
                   f"{subset_text(subset_of(whole, settings.limit), whole)} of "
                   + ("cifar10_corrupted of TensorFlow Datasets" if settings.files == TFDS else
                      f"the files {settings.files}")),
        "counts": [{"name": name, "severity": severity, "right": int(right), "number": int(number)}
                   for (name, severity), right, number in zip(
                       every, table["right"], table["number"], strict=True)],
        "mean_by_corruption": {name: mean([name]) for name in settings.names},
        "mean": mean(settings.names)}, table)


def _number(name: str, severity: int) -> int:
    """The number of a corruption at a severity, the same whatever others are measured."""
    return 0 if name == CLEAN else 1 + 5 * list(common.CORRUPTIONS).index(name) + severity - 1


def _official(run, settings, name, severity) -> Split:
    found = (load_corrupted_tfds(name, severity, settings.data_dir) if settings.files == TFDS else
             load_corrupted(settings.files, name, severity))
    if found.images.shape[1:] != run.dataset.image_shape:
        raise InputError(f"Expected images {list(run.dataset.image_shape)} as of "
                         f"{run.dataset.name} in {found.source}, got "
                         f"{list(found.images.shape[1:])}.")
    if len(found.labels) != len(run.dataset.test.labels):
        raise InputError(f"Expected {len(run.dataset.test.labels)} images at each severity in "
                         f"{found.source}, as many as test images of {run.dataset.name}, got "
                         f"{len(found.labels)}.")
    _validate.labels(f"labels of {found.source}", found.labels, len(run.dataset.class_names))
    return Split(found.images, found.labels)


ACCURACY, BY_SEVERITY = "accuracy under corruptions", "accuracy under a corruption"


def estimates(run: Run) -> Iterator[Estimate]:
    """Yields the mean over all corruptions, over each one's severities, and each alone."""
    facts = run.facts("corruptions")
    if facts is None:
        return
    origin = facts["origin"]
    clean = facts["counts"][0]
    yield share(ACCURACY, CLEAN, clean["right"], clean["number"])
    yield estimate(ACCURACY, f"mean of {len(facts['mean_by_corruption'])}, {origin}",
                   facts["mean"], "%")
    for name, mean in facts["mean_by_corruption"].items():
        yield estimate(ACCURACY, f"{name}, {origin}", mean, "%")
    for one in facts["counts"][1:]:
        yield share(BY_SEVERITY, f"{one['name']} {one['severity']}, {origin}", one["right"],
                    one["number"])


def _means(run: Run) -> Iterator[Estimate]:
    return (one for one in estimates(run) if one.measurement == ACCURACY)


def _section(study: Study) -> Section | None:
    if not any(run.facts("corruptions") for runs in study.runs.values() for run in runs):
        return None
    note = ("Official: the benchmark's own files. Generated: drawn anew by this package, which "
            "gives other numbers; those published are of the files.")
    return Section(
        "corruptions", "Accuracy under common corruptions", "", (
            table_of(study, _means, "Accuracy, mean over the severities.",
                     f"Images: {subsets_text(study, 'corruptions')}",
                     f"{note} Intervals of means: bootstrap over images; of clean "
                     "images: Wilson's. Severities one by one: in the table of numbers."),),
        (dots_picture(study, _means, ACCURACY, "corruptions", "Accuracy under common corruptions.",
                      "Accuracy", f"How to read: farther right is better. {note}"),))


def table_text(facts: dict) -> str:
    """Formats the result as plain text."""
    clean = facts["counts"][0]
    value, low, high = (100 * number for number in facts["mean"])
    lines = [f"{facts['subset']}, {facts['origin']} corruptions",
             f"clean: {100 * clean['right'] / clean['number']:.2f} %",
             f"mean of {len(facts['mean_by_corruption'])}: {value:.2f} % [{low:.2f}–{high:.2f}]"]
    return "\n".join([*lines, *(f"{name}: {100 * mean[0]:.2f} %"
                                for name, mean in facts["mean_by_corruption"].items())])


CORRUPTIONS = Measurement(
    "corruptions", CorruptionSettings(), _measure, _asked, section=_section,
    numbers=(numbers_of(estimates),), estimates=estimates, suite="corruptions",
    command="evaluate", text=table_text, parallel=True)
