"""Scores runs on held-out images, clean and under noise, to choose among them."""

import dataclasses
from typing import Any

import jax
import numpy as np

from jaxrobust import evaluation, perturbations
from jaxrobust.app.execution import batch_size_of
from jaxrobust.app.measurements.runner import Measured, Measurement, Work
from jaxrobust.app.trainer import TrainedRun


@dataclasses.dataclass(frozen=True)
class HeldOutSettings:
    """How a run is scored."""

    noise_std: float
    """Standard deviation of the noise, in pixel values of [0, 1]."""
    num_draws: int = 5
    """Independent draws of the noise."""


def _measure(run: TrainedRun, settings: HeldOutSettings, work: Work) -> Measured:
    """Measures which validation images are classified correctly; for noise, in what share of the
    draws, which are the same for all runs."""
    del work
    images, labels = run.splits.selection
    clean_key, noise_key = jax.random.split(jax.random.key(0))
    shared: dict[str, Any] = {"batch_size": batch_size_of(images), "layout": run.layout}
    clean, = evaluation.evaluate(run.logits_fn, images, labels, key=clean_key, **shared)
    draws = evaluation.evaluate(
        run.logits_fn, images, labels, perturb=perturbations.gaussian(settings.noise_std),
        key=noise_key, num_draws=settings.num_draws, **shared)
    noisy = np.mean(list(draws), axis=0)
    return Measured(
        {"split": "validation", "num_images": len(labels), "epoch": run.epoch,
         "clean": float(clean.mean()), "noisy": float(noisy.mean())},
        {"clean": clean, "noisy": noisy})


HELD_OUT = Measurement("held_out", measure=_measure, command="fit")
