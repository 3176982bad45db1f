"""Flip rates of predictions along the sequences of CIFAR-10-P, or of any set in its format."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from jaxrobust import _validate, corruptions
from jaxrobust.app.classifiers import ForeignModel
from jaxrobust.app.config import InputError, distinct
from jaxrobust.app.measurements.estimates import (
    Estimate,
    Limit,
    bootstrapped,
    check_counts,
    dots_picture,
    estimate,
    found_of,
    numbers_of,
    outputs_of,
    subsets_text,
    table_of,
)
from jaxrobust.app.measurements.runner import Measured, Measurement, Work
from jaxrobust.app.progress import progress
from jaxrobust.app.report.page import Section
from jaxrobust.app.study.read import Run, Study
from jaxrobust.app.trainer import TrainedRun
from jaxrobust.data import Perturbed, load_perturbed
from jaxrobust.images import predicted_classes

SEED = 0
"""Of the draw of sequences."""


@dataclasses.dataclass(frozen=True)
class FlipSettings:
    """How flip rates are measured."""

    files: str | None = None
    """Folder of the official files, NAME.npy as in CIFAR-10-P; the suite is left out without."""
    names: tuple[str, ...] = corruptions.SEQUENCES
    """Perturbations; the 10 of the benchmark by default."""
    limit: Limit = None
    """Number of sequences, drawn at random with seed 0; none for all."""

    def __post_init__(self):
        _validate.in_range("number of perturbations", len(self.names), 1)
        distinct("perturbation", self.names)
        check_counts(self, "limit")


def _measure(run: TrainedRun | ForeignModel, settings: FlipSettings, work: Work) -> Measured:
    """Counts, for each perturbation and sequence, how often the prediction changes."""
    opened = {name: _open(run, settings, name) for name in settings.names}
    whole = len(opened[settings.names[0]].images)
    for found in opened.values():
        if len(found.images) != whole:
            raise InputError(f"Expected {whole} sequences in {found.source}, as many as of "
                             f"{settings.names[0]}, got {len(found.images)}.")
    number = whole if settings.limit is None else min(settings.limit, whole)
    rows = np.sort(np.random.default_rng(SEED).permutation(whole)[:number])
    with progress(f"{work.label}, flips", len(opened), done=work.rows) as shown:
        for name, found in list(opened.items())[work.rows:]:
            length = found.images.shape[1]
            # All sequences stay on disk, and a batch of their images is read at a time.
            images = found.images if number == whole else found.images[rows]
            images = images.reshape(-1, *run.dataset.image_shape)
            logits = outputs_of(run.logits_fn, images, run.layout)
            _validate.finite_logits(np.isfinite(logits).all(axis=1), f" of {found.source}")
            flips = corruptions.flips(
                np.asarray(predicted_classes(logits)).reshape(number, length),
                noise=found.is_noise)
            work.add({"name": np.array([name]), "changes": np.array([length - 1]),
                      "flips": flips[None].astype(np.int32)})
            shown.advance(**{f"flip rate, {name}": float(flips.mean() / (length - 1))})
    table = work.table
    rates = table["flips"] / table["changes"][:, None]

    def mean(values):
        return bootstrapped(lambda sequences: values[sequences].mean(), number, most=1)

    return Measured({
        "origin": opened[settings.names[0]].origin, "num_images": number,
        "subset": (f"all {whole:,} sequences" if number == whole else
                   f"{number:,} of {whole:,} sequences, drawn at random with seed {SEED},")
        + f" of the files {settings.files}",
        "rates": dict(zip(settings.names, map(mean, rates), strict=True)),
        "mean": mean(rates.mean(axis=0))}, table)


def _open(run, settings, name) -> Perturbed:
    found = load_perturbed(settings.files, name)
    if found.images.shape[2:] != run.dataset.image_shape:
        raise InputError(f"Expected images {list(run.dataset.image_shape)} as of "
                         f"{run.dataset.name} in {found.source}, got "
                         f"{list(found.images.shape[2:])}.")
    _validate.in_range(f"length of the sequences in {found.source}", found.images.shape[1], 2)
    return found


RATE = "flip rate"


def estimates(run: Run) -> Iterator[Estimate]:
    """Yields the mean over the perturbations, and each one's rate."""
    facts = run.facts("flips")
    if facts is None:
        return
    yield estimate(RATE, f"mean of {len(facts['rates'])}, {facts['origin']}", facts["mean"], "%")
    for name, rate in facts["rates"].items():
        yield estimate(RATE, f"{name}, {facts['origin']}", rate, "%")


def _section(study: Study) -> Section | None:
    if not found_of(study, estimates):
        return None
    return Section(
        "flips", "Changes of predictions along sequences", "", (table_of(
            study, estimates, "Flip rates.",
            f"Images: {subsets_text(study, 'flips')} Intervals: bootstrap over sequences.",
            "Share of the images of a sequence that are predicted otherwise than the one before, "
            "or, under noise, than the first. Lower is more stable; a rate says nothing of which "
            "prediction is right."),),
        (dots_picture(study, estimates, RATE, "flips", "Flip rates.", "Flip rate",
                      "How to read: farther left is more stable."),))


def table_text(facts: dict) -> str:
    """Formats the result as plain text."""
    value, low, high = (100 * number for number in facts["mean"])
    return "\n".join([
        facts["subset"],
        f"flip rate, mean of {len(facts['rates'])}: {value:.2f} % [{low:.2f}–{high:.2f}]",
        *(f"{name}: {100 * rate[0]:.2f} %" for name, rate in facts["rates"].items())])


FLIPS = Measurement(
    "flips", FlipSettings(), _measure, section=_section, numbers=(numbers_of(estimates),),
    estimates=estimates, suite="flips", needs="files", command="evaluate", text=table_text,
    parallel=True)
