"""Robust accuracy under AutoAttack's ensemble, and the distance of the nearest misclassified image.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxrobust import _validate
from jaxrobust import attacks as library
from jaxrobust.app.classifiers import ForeignModel, is_randomised, require_gradient
from jaxrobust.app.config import InputError, distinct
from jaxrobust.app.execution import batch_size_of
from jaxrobust.app.measurements.estimates import (
    Estimate,
    Limit,
    TestSize,
    bootstrapped,
    check_counts,
    dots_picture,
    estimate,
    found_of,
    images_of,
    numbers_of,
    share,
    subsets_text,
    table_of,
)
from jaxrobust.app.measurements.runner import Measured, Measurement, Work, settings_asked
from jaxrobust.app.progress import progress
from jaxrobust.app.report.page import Section, Table, text_row
from jaxrobust.app.study.read import Run, Study
from jaxrobust.app.trainer import TrainedRun
from jaxrobust.attacks.ensemble import zero_gradients_text
from jaxrobust.evaluation import map_batches

SEED = 0
"""Seeds the attacks: the same for all models."""

BATCH = 250
"""Images after whose attack an interrupted measurement resumes."""

_NAMES = {"linf": "L∞", "l2": "L2"}

MASKED = 0.002
"""What Square, without gradients, may take from the accuracy that gradients left, as in AutoAttack.
"""


@dataclasses.dataclass(frozen=True)
class AttackSettings:
    """How adversarial attacks are measured."""

    linf: tuple[float, ...] = (8 / 255,)
    """Radii in the largest change of a pixel value, in [0, 1]; 0 leaves this norm out."""
    l2: tuple[float, ...] = (0.5,)
    """Radii in the Euclidean norm, in pixel values of [0, 1]; 0 leaves this norm out."""
    nearest: tuple[str, ...] = ()
    """Norms, "linf" or "l2", in which FAB looks for the nearest misclassified image."""
    num_steps: int = 100
    """Steps of APGD and FAB, for each target; 100 in AutoAttack's standard version."""
    num_targets: int = 9
    """Largest number of classes that targeted attacks aim at; 9 in the standard version."""
    num_queries: int = 5000
    """Queries of Square; 5000 in the standard version."""
    eot: int | None = None
    """Draws of each expectation over a randomised model, a function of a key and images; 20 by
    default, as in AutoAttack."""
    limit: Limit = 500
    """Number of test images, drawn at random by class with seed 0; none for all."""
    test_size: TestSize = None
    """With a number, the first ``limit`` of as many test images, drawn so, as in a study."""

    def __post_init__(self):
        for name in _NAMES:
            for radius in getattr(self, name):
                _validate.in_range(name, radius, 0)
            distinct(name, getattr(self, name))
        for norm in self.nearest:
            _validate.one_of("norm", norm, _NAMES)
        distinct("nearest", self.nearest)
        if not self.searches:
            raise InputError(f"Expected linf={list(self.linf)} or l2={list(self.l2)} to be > 0, or "
                             "nearest to name a norm.")
        check_counts(self, "num_steps", "num_targets", "num_queries", "eot", "limit", "test_size")

    @property
    def searches(self) -> list[tuple[str, float]]:
        """Norms with the radii of the ensemble's balls, and inf for the nearest image."""
        return [*((norm, radius) for norm in _NAMES for radius in getattr(self, norm) if radius),
                *((norm, math.inf) for norm in self.nearest)]


def _asked(run: TrainedRun | ForeignModel, settings: AttackSettings, folder: pathlib.Path) -> dict:
    require_gradient(run, "attacks")
    asked = settings_asked(run, settings, folder)
    if is_randomised(run):
        if settings.nearest:
            raise InputError(f"Expected nearest={list(settings.nearest)} only with a function of "
                             "images alone, whose classes have boundaries.")
        return asked | {"eot": library.Randomised.num_draws if settings.eot is None else
                        settings.eot}
    if settings.eot is not None:
        raise InputError(f"Expected eot={settings.eot} only with a randomised model, a function of "
                         "a key and images, which this one is not.")
    del asked["eot"]
    return asked


def _measure(run: TrainedRun | ForeignModel, settings: AttackSettings, work: Work) -> Measured:
    """Attacks test images, a batch at a time, in each ball, and looks for the nearest ones."""
    classifier: Any = run.logits_fn
    if is_randomised(run):
        classifier = library.Randomised(classifier, work.asked["eot"])
    split, images = images_of(run.dataset.test, settings.limit, settings.test_size)
    size = images["num_images"]
    begun = [(*search, first) for search in settings.searches for first in range(0, size, BATCH)]
    done = len(work.facts.get("batches", ()))
    with progress(f"{work.label}, attack", len(settings.searches) * size, done=work.rows) as shown:
        for norm, epsilon, first in begun[done:]:
            rows = np.arange(first, min(first + BATCH, size))
            search = _nearest if math.isinf(epsilon) else _ensemble
            facts, columns = search(classifier, split, rows, settings, norm, epsilon)
            work.facts = {"batches": [*work.facts.get("batches", ()), facts]}
            work.add({"norm": np.full(len(rows), norm), "epsilon": np.full(len(rows), epsilon),
                      "index": rows, "label": split.labels[rows], **columns})
            shown.advance(len(rows))
    table, batches = work.table, work.facts["batches"]
    parts = [((norm, epsilon), (table["norm"] == norm) & (table["epsilon"] == epsilon))
             for norm, epsilon in settings.searches]
    return Measured({
        **images,
        "norms": [_of_ball(norm, epsilon, table["broken_by"][part], [
            batch for batch in batches if (batch["norm"], batch["epsilon"]) == (norm, epsilon)])
            for (norm, epsilon), part in parts if math.isfinite(epsilon)],
        "nearest": [_of_nearest(norm, table["distance"][part])
                    for (norm, epsilon), part in parts if math.isinf(epsilon)]}, table)


def _ensemble(classifier, split, rows, settings, norm, epsilon):
    """Attacks a batch in a ball: returns what is recorded of the batch, and its columns."""
    found = library.auto_attack(
        classifier, split.images[rows], split.labels[rows],
        jax.random.fold_in(jax.random.key(SEED), list(_NAMES).index(norm)), norm=norm,
        epsilon=epsilon, num_steps=settings.num_steps, num_targets=settings.num_targets,
        num_queries=settings.num_queries, batch_size=batch_size_of(split.images),
        indices=rows)
    # The others are judged over all batches.
    warnings = {name: text for name, text in found.warnings.items()
                if name not in ("black_box", "zero_gradients")}
    return ({"norm": norm, "epsilon": epsilon, "warnings": warnings,
             "zero_gradients": found.zero_gradients, "attacks": list(found.accuracy)},
            {"broken_by": found.broken_by.astype("U16"), "distance": np.full(len(rows), np.nan)})


def _nearest(classifier, split, rows, settings, norm, epsilon):
    """Looks for the nearest misclassified images of a batch, as :func:`_ensemble` attacks it."""
    def distances(images, labels):
        return library.fab(classifier, images, labels, norm=norm, num_steps=settings.num_steps,
                           num_targets=settings.num_targets)[1]

    distance = map_batches(distances, split.images[rows], split.labels[rows].astype(np.int32),
                           batch_size=batch_size_of(split.images))
    return ({"norm": norm, "epsilon": epsilon},
            {"broken_by": np.full(len(rows), "", "U16"), "distance": distance.astype(np.float64)})


def _of_ball(norm: str, epsilon: float, broken_by: np.ndarray, batches: list[dict]) -> dict:
    """What is left after each attack of the ensemble, in their order, and the warnings."""
    names, left, robust = batches[0]["attacks"], len(broken_by), {}
    for name in names:
        left -= int((broken_by == name).sum())
        robust[name] = left
    warnings: dict[str, str] = {}
    for batch in batches:
        warnings = batch["warnings"] | warnings
    zero_gradients = sum(batch["zero_gradients"] for batch in batches)
    if zero_gradients:
        warnings["zero_gradients"] = zero_gradients_text(zero_gradients)
    gained = int((broken_by == "square").sum()) / len(broken_by)
    if gained > MASKED:
        warnings["black_box"] = (
            f"Square, which uses no gradients, takes {100 * gained:.2f} points of accuracy from "
            "what attacks with gradients left: the gradients may be masked.")
    return {"norm": norm, "epsilon": epsilon, "robust": robust, "warnings": warnings}


def _of_nearest(norm: str, distance: np.ndarray) -> dict:
    """The median distance with its interval, over all images, of which misclassified ones have 0,
    and over the others; None where it is infinite.

    For the interval, images for which nothing was found count like the farthest that was.
    """
    facts = {"norm": norm, "not_found": int(np.isinf(distance).sum())}
    for name, values in (("median", distance), ("median_right", distance[distance > 0])):
        finite = values[np.isfinite(values)]
        known = len(values) > 0 and np.isfinite(np.median(values))
        facts[name] = _median(np.minimum(values, finite.max())) if known else None
    return facts


def _median(values: np.ndarray) -> list[float]:
    return bootstrapped(lambda rows: np.median(values[rows]), len(values))


ROBUST, LEFT = "robust accuracy", "accuracy after"
NEAREST, ALL, RIGHT = "median distance to the nearest adversarial image", "all images", (
    "images right when clean")


def _ball(one: dict) -> str:
    radius = one["epsilon"]
    pixels = radius * 255
    written = (f"{pixels:g}/255" if abs(pixels - round(pixels)) < 1e-6 and one["norm"] == "linf"
               else f"{radius:g}")
    return f"{_NAMES[one['norm']]} {written}"


def estimates(run: Run) -> Iterator[Estimate]:
    """Yields the accuracy under the worst of all attacks, and after each of them, by norm."""
    facts = run.facts("attacks")
    if facts is None:
        return
    for one in facts["norms"]:
        yield share(ROBUST, _ball(one), list(one["robust"].values())[-1], facts["num_images"])
    for one in facts["norms"]:
        for name, right in one["robust"].items():
            yield share(LEFT, f"{name}, {_ball(one)}", right, facts["num_images"])
    yield from _distances(run)


def _distances(run: Run) -> Iterator[Estimate]:
    for one in (run.facts("attacks") or {}).get("nearest", ()):
        for name, images in (("median", ALL), ("median_right", RIGHT)):
            if one[name] is not None:
                yield estimate(NEAREST, f"{_NAMES[one['norm']]}, {images}", one[name], "pixels")


def _accuracies(run: Run) -> Iterator[Estimate]:
    return (one for one in estimates(run) if one.measurement != NEAREST)


def warnings_table(study: Study) -> Table | None:
    """Tabulates the warnings of all runs; returns None without any."""
    rows = [text_row(study.labels[row], (str(run.seed), _ball(one), text))
            for row, runs in study.runs.items() for run in runs
            if (facts := run.facts("attacks")) for one in facts["norms"]
            for text in one["warnings"].values()]
    return Table("Warnings of the attacks: these numbers may mislead.",
                 ("Model", "Seed", "Ball", "Warning"), tuple(rows), numeric=False) if rows else None


def setting_text(study: Study) -> str:
    """Names the images that were attacked, and the budget."""
    budgets = "; ".join(sorted({
        f"{asked['num_steps']} steps, " + (
            f"{asked['eot']} draws in each expectation" if "eot" in asked else
            f"{asked['num_targets']} targets, {asked['num_queries']:,} queries")
        for runs in study.runs.values() for run in runs
        if (facts := run.facts("attacks")) and (asked := facts["settings"])}))
    return f"Images: {subsets_text(study, 'attacks')} Budget: {budgets}."


def _section(study: Study) -> Section | None:
    if not found_of(study, estimates):
        return None
    shown = f"{setting_text(study)} Intervals:"
    table = table_of(
        study, _accuracies, "Accuracy under adversarial attacks.",
        f"{shown} Wilson's, over images.", "AutoAttack's ensemble, each attack on what the ones "
        "before left; robust accuracy is what all of them leave, an upper bound of the true one."
    ) if found_of(study, _accuracies) else None
    distances = table_of(
        study, _distances, "Median distance to the nearest misclassified image, found by FAB.",
        f"{shown} bootstrap over images, centred.", "An upper bound of the true distance; 0 for an "
        "image that is misclassified itself.", digits=4) if found_of(study, _distances) else None
    return Section(
        "attacks", "Adversarial attacks", "",
        tuple(filter(None, (table, distances, warnings_table(study)))),
        (dots_picture(study, estimates, LEFT, "attacks", "Accuracy after each attack.", "Accuracy",
                      "How to read: attacks in their order, from clean images on."),)
        if table else ())


def table_text(facts: dict) -> str:
    """Formats the result as plain text."""
    lines = [facts["subset"]]
    for one in facts["norms"]:
        lines += [f"{_ball(one)}, {name}: {100 * right / facts['num_images']:.2f} %"
                  for name, right in one["robust"].items()]
        lines += [f"Warning, {_ball(one)}: {text}" for text in one["warnings"].values()]
    lines += [f"median distance to the nearest adversarial image, {_NAMES[one['norm']]}: "
              f"{one['median'][0]:.4f}" for one in facts["nearest"] if one["median"]]
    return "\n".join(lines)


ATTACKS = Measurement(
    "attacks", AttackSettings(), _measure, _asked, section=_section,
    numbers=(numbers_of(estimates),), estimates=estimates, suite="attacks", randomised=True,
    gradients=True, command="evaluate", text=table_text)
