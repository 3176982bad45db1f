"""Checks the paper's propositions and theorems on finished runs.

``checks`` and ``stability`` hold the checks, ``section`` what the report shows of them.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from jaxrobust import _validate, data
from jaxrobust.app.config import InputError, distinct
from jaxrobust.app.measurements.accuracy import first_test_images, make_test_split
from jaxrobust.app.measurements.curvature import require_piecewise_linear
from jaxrobust.app.measurements.runner import Measured, Measurement, Work
from jaxrobust.app.measurements.theory.checks import (
    Claim,
    check_geometry,
    check_hinge_gradients,
    check_mapping,
    check_rescaling,
    check_separation,
    layers_of,
)
from jaxrobust.app.measurements.theory.section import numbers, section_of
from jaxrobust.app.measurements.theory.stability import (
    BATCH_SIZE,
    SMOOTHED_GROUP,
    check_curvature,
    measure_images,
)
from jaxrobust.app.progress import progress
from jaxrobust.app.report.page import significant
from jaxrobust.app.trainer import TrainedRun, make_splits
from jaxrobust.data import Split

TRAINING_SEED = 0
"""Seeds the choice of training images: the same for all runs."""


@dataclasses.dataclass(frozen=True)
class TheorySettings:
    """How the theorems are checked; noise and radii come from the run's own configuration."""

    num_images: int = 256
    """Number of test images, from the first on, at which Theorem 6.1 is checked."""
    num_draws: int = 100
    """Draws of the noise for each image, for eta, l_out and the change of the loss."""
    smoothed_draws: int = 64
    """Pairs of draws for each image, a multiple of 8, for the noise-averaged loss's curvature."""
    test_size: int | None = None
    """Number of test images, drawn at random by class with seed 0; none for all."""
    train_size: int | None = 5000
    """Number of training images, drawn at random by class with seed 0; none for all."""
    nus: tuple[float, ...] = (0.25, 2.0, 10.0)
    """Factors nu of T_nu in Proposition 5.3."""
    radii: tuple[float, ...] = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
    """Radii of Theorem 6.2, over the median distance of a class's training images to their
    centroid."""
    rho_shares: tuple[float, ...] = (0.25, 0.5, 0.75, 0.95)
    """Confidence margins rho of Theorem 6.2, over the radius squared, in (0, 1)."""
    centre_share: float = 0.1
    """Largest distance of a centre from the training centroid in the held-out bound, over the
    radius."""
    failure_probability: float = 0.05
    """Failure probability of each bound at each radius, divided among the values of rho."""

    def __post_init__(self):
        _validate.in_range("num_images", self.num_images, 1)
        for name in ("test_size", "train_size"):
            if getattr(self, name) is not None:
                _validate.in_range(name, getattr(self, name), 1)
        _validate.in_range("num_draws", self.num_draws, 2)
        _validate.in_range("smoothed_draws", self.smoothed_draws, SMOOTHED_GROUP)
        if self.smoothed_draws % SMOOTHED_GROUP:
            raise InputError(f"Expected smoothed_draws={self.smoothed_draws} to be a multiple of "
                             f"{SMOOTHED_GROUP}.")
        for name in ("nus", "radii", "rho_shares"):
            if not getattr(self, name):
                raise InputError(f"Expected {name} to hold at least one number.")
            distinct(f"of {name}", getattr(self, name))
        for value in (*self.nus, *self.radii):
            _validate.in_range("nus and radii", value, 0, open_low=True)
        for value in self.rho_shares:
            _validate.in_range("rho_shares", value, 0, 1, open_low=True)
        _validate.in_range("centre_share", self.centre_share, 0)
        _validate.in_range("failure_probability", self.failure_probability, 0, 1, open_low=True)


def _measure(run: TrainedRun, settings: TheorySettings, work: Work) -> Measured:
    """Measures a table image by image, and checks each claim.

    What is measured, and how to read it, is in ``docs/theory.md``.

    Raises:
      InputError: (a ValueError) if the run was trained without noise, or with radii and margins in
        other units than the features', the network is not made of affine pieces, or logits are not
        finite.
    """
    sigma = run.config.noise_std
    _validate.in_range("noise_std of the run", sigma, 0, open_low=True)
    for name in ("direction", "margin_relative"):
        if getattr(run.config.robust, name):
            raise _validate.InputError(
                f"Expected robust.{name}=False of the run, whose delta_v and delta_d the theory "
                "takes in the units of the features, got True.")
    test_split = make_test_split(run.dataset, settings.test_size)
    images = first_test_images(run, settings, least=2)
    train_split = training_images(run, settings.train_size)
    for name, split, least in (("train_size", train_split, 2), ("test_size", test_split, 4)):
        counts = np.bincount(split.labels, minlength=len(run.dataset.class_names))
        if counts.min() < least:
            raise InputError(f"Expected {name}={len(split.labels)} to leave {least} images of "
                             f"every class, got {counts.min()}.")
    require_piecewise_linear(
        run, images.images[:BATCH_SIZE], images.labels[:BATCH_SIZE], "theory")
    batches = -(-settings.num_images // BATCH_SIZE)
    claims: list[Claim] = []
    facts: dict[str, Any] = {
        "sigma": sigma, "delta_v": run.config.robust.delta_v, "delta_d": run.config.robust.delta_d,
        "num_train_images": len(train_split.labels), "num_test_images": len(test_split.labels),
        "with_respect_to": "pixels in [0, 1]"}
    with progress(f"{work.label}, theory", batches * (
            settings.num_draws + settings.smoothed_draws + 1) + 6) as shown:

        def add(name: str, found: dict, lines: list[Claim]) -> None:
            facts[name] = found
            claims.extend(lines)
            shown.advance()

        train, test = layers_of(run, train_split), layers_of(run, test_split)
        add("geometry", *check_geometry(run, train, test))
        add("rescaling", *check_rescaling(run, images, settings.nus))
        add("hinge_gradients", *check_hinge_gradients(run, train))
        columns, curvature, lines = check_curvature(
            run, *measure_images(run, images, settings, shown))
        add("curvature", curvature, lines)
        add("mapping", *check_mapping(train, test, settings))
        add("separation", *check_separation(run, train, test))
    return Measured(
        without_nan({**facts, "claims": [line._asdict() for line in claims]}),
        {"index": np.arange(settings.num_images), "label": images.labels, **columns})


def training_images(run: TrainedRun, size: int | None) -> Split:
    """Returns all training images, or so many of them, drawn at random by class."""
    split = make_splits(run.dataset, run.config).train
    if size is None or size >= len(split.labels):
        return split
    return data.split_off(split, size, seed=TRAINING_SEED)[1]


def without_nan(value: Any) -> Any:
    """Replaces NaN and infinity, which JSON does not have, by None."""
    if isinstance(value, dict):
        return {name: without_nan(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table_text(facts: dict) -> str:
    """Formats the claims as plain text, each on two lines."""
    lines = []
    for line in (Claim(**values) for values in facts["claims"]):
        holds = "" if line.holds is None else f"holds {100 * line.holds:.1f} %"
        loose = "" if line.looseness is None else f"bound/value {significant(line.looseness)}"
        lines += [f"{line.claim}", "    " + "; ".join(
            part for part in (line.measured, holds, loose) if part)]
    return "\n".join(lines)


THEORY = Measurement(
    "theory", TheorySettings(), _measure, section=section_of, numbers=(numbers,), text=table_text,
    about="Check the paper's propositions and theorems on finished runs, and print the results.")
