"""Robust accuracy under AutoAttack's ensemble."""

import dataclasses
import pathlib
from collections.abc import Iterator

import jax
import numpy as np

from jaxrobust import _validate
from jaxrobust import attacks as library
from jaxrobust.app.classifiers import ForeignModel, is_randomised
from jaxrobust.app.config import InputError
from jaxrobust.app.measurements.estimates import (
    Estimate,
    Limit,
    check_counts,
    dots_picture,
    found_of,
    numbers_of,
    share,
    subset_of,
    subset_text,
    subsets_text,
    table_of,
)
from jaxrobust.app.measurements.runner import Measured, Measurement, Work, settings_asked
from jaxrobust.app.progress import progress
from jaxrobust.app.report.page import Section, Table, text_row
from jaxrobust.app.study.read import Run, Study
from jaxrobust.app.trainer import TrainedRun

SEED = 0
"""Seeds the attacks: the same for all models."""

BATCH = 250
"""Images that are attacked at a time, after which an interrupted measurement resumes."""

MASKED = 0.002
"""What Square, without gradients, may take from the accuracy that gradients left, as in AutoAttack.
"""


@dataclasses.dataclass(frozen=True)
class AttackSettings:
    """How adversarial attacks are measured."""

    linf: float = 8 / 255
    """Radius in the largest change of a pixel value, in [0, 1]; 0 leaves this norm out."""
    l2: float = 0.5
    """Radius in the Euclidean norm, in pixel values of [0, 1]; 0 leaves this norm out."""
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

    def __post_init__(self):
        for name in ("linf", "l2"):
            _validate.in_range(name, getattr(self, name), 0)
        if not self.norms:
            raise InputError(f"Expected linf={self.linf:g} or l2={self.l2:g} to be > 0.")
        check_counts(self, "num_steps", "num_targets", "num_queries", "eot", "limit")

    @property
    def norms(self) -> dict[str, float]:
        """By norm, the radius."""
        return {name: getattr(self, name) for name in ("linf", "l2") if getattr(self, name) > 0}


def _asked(run: TrainedRun | ForeignModel, settings: AttackSettings, folder: pathlib.Path) -> dict:
    asked = settings_asked(run, settings, folder)
    if is_randomised(run):
        return asked | {"eot": library.Randomised.num_draws if settings.eot is None else
                        settings.eot}
    if settings.eot is not None:
        raise InputError(f"Expected eot={settings.eot} only with a randomised model, a function of "
                         "a key and images, which this one is not.")
    del asked["eot"]
    return asked


def _measure(run: TrainedRun | ForeignModel, settings: AttackSettings, work: Work) -> Measured:
    """Attacks test images, a batch at a time, in each norm."""
    classifier = library.Randomised(run.logits_fn, work.asked["eot"]) if is_randomised(
        run) else run.logits_fn
    split = subset_of(run.dataset.test, settings.limit)
    size = len(split.labels)
    norms = list(settings.norms)
    begun = [(norm, first) for norm in norms for first in range(0, size, BATCH)]
    done = len(work.facts.get("batches", ()))
    with progress(f"{work.label}, attack", len(norms) * size, done=work.rows) as shown:
        for norm, first in begun[done:]:
            rows = np.arange(first, min(first + BATCH, size))
            found = library.auto_attack(
                classifier, split.images[first:first + BATCH],
                split.labels[first:first + BATCH],
                jax.random.fold_in(jax.random.key(SEED), ("linf", "l2").index(norm)), norm=norm,
                epsilon=settings.norms[norm], num_steps=settings.num_steps,
                num_targets=settings.num_targets, num_queries=settings.num_queries,
                batch_size=BATCH, indices=rows)
            # That of the black box is judged over all batches.
            warnings = {name: text for name, text in found.warnings.items() if name != "black_box"}
            work.facts = {"batches": [*work.facts.get("batches", ()), {
                "norm": norm, "warnings": warnings, "attacks": list(found.accuracy)}]}
            work.add({"norm": np.full(len(rows), norm), "index": rows,
                      "broken_by": found.broken_by.astype("U16")})
            shown.advance(len(rows), **{f"robust, {norm}": float(found.robust.mean())})
    table = work.table
    return Measured({
        "subset": subset_text(split, run.dataset.test), "num_images": size,
        "norms": [_of_norm(norm, settings.norms[norm], table["broken_by"][table["norm"] == norm],
                           [batch for batch in work.facts["batches"] if batch["norm"] == norm])
                  for norm in norms]}, table)


def _of_norm(norm: str, epsilon: float, broken_by: np.ndarray, batches: list[dict]) -> dict:
    """What is left after each attack of the ensemble, in their order, and the warnings."""
    names, left, robust = batches[0]["attacks"], len(broken_by), {}
    for name in names:
        left -= int((broken_by == name).sum())
        robust[name] = left
    warnings = {}
    for batch in batches:
        warnings = batch["warnings"] | warnings
    gained = int((broken_by == "square").sum()) / len(broken_by)
    if gained > MASKED:
        warnings["black_box"] = (
            f"Square, which uses no gradients, takes {100 * gained:.2f} points of accuracy from "
            "what attacks with gradients left: the gradients may be masked.")
    return {"norm": norm, "epsilon": epsilon, "robust": robust, "warnings": warnings}


_NAMES = {"linf": "L∞", "l2": "L2"}
ROBUST, LEFT = "robust accuracy", "accuracy after"


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


def _warnings(study: Study) -> Table | None:
    rows = [text_row(study.labels[row], (str(run.seed), _ball(one), text))
            for row, runs in study.runs.items() for run in runs
            if (facts := run.facts("attacks")) for one in facts["norms"]
            for text in one["warnings"].values()]
    return Table("Warnings of the attacks: these numbers may mislead.",
                 ("Model", "Seed", "Ball", "Warning"), tuple(rows), numeric=False) if rows else None


def _section(study: Study) -> Section | None:
    if not found_of(study, estimates):
        return None
    budgets = "; ".join(sorted({
        f"{asked['num_steps']} steps, " + (
            f"{asked['eot']} draws in each expectation" if "eot" in asked else
            f"{asked['num_targets']} targets, {asked['num_queries']:,} queries")
        for runs in study.runs.values() for run in runs
        if (facts := run.facts("attacks")) and (asked := facts["settings"])}))
    table = table_of(
        study, estimates, "Accuracy under adversarial attacks.",
        f"Images: {subsets_text(study, 'attacks')} Budget: {budgets}. Intervals: Wilson's, over "
        "images.", "AutoAttack's ensemble, each attack on what the ones before left; robust "
        "accuracy is what all of them leave, an upper bound of the true one.")
    return Section(
        "attacks", "Adversarial attacks", "", tuple(filter(None, (table, _warnings(study)))),
        (dots_picture(study, estimates, LEFT, "attacks", "Accuracy after each attack.", "Accuracy",
                      "How to read: attacks in their order, from clean images on."),))


def table_text(facts: dict) -> str:
    """Formats the result as plain text."""
    lines = [facts["subset"]]
    for one in facts["norms"]:
        lines += [f"{_ball(one)}, {name}: {100 * right / facts['num_images']:.2f} %"
                  for name, right in one["robust"].items()]
        lines += [f"Warning, {_ball(one)}: {text}" for text in one["warnings"].values()]
    return "\n".join(lines)


ATTACKS = Measurement(
    "attacks", AttackSettings(), _measure, _asked, section=_section,
    numbers=(numbers_of(estimates),), estimates=estimates, suite="attacks", randomised=True,
    command="evaluate", text=table_text)
