"""Tests finished runs: accuracy under perturbations, and features for the t-SNE figure."""

import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust import _validate, evaluation, perturbations
from jaxrobust.app.classifiers import ForeignModel
from jaxrobust.app.config import Evaluation, training_perturbation
from jaxrobust.app.doubt import measure_doubt
from jaxrobust.app.execution import batch_size_of
from jaxrobust.app.measurements.estimates import Estimate, share, subset_of
from jaxrobust.app.measurements.runner import Arrays, Measured, Measurement, Work, measure
from jaxrobust.app.progress import progress
from jaxrobust.app.report import pictures, tables
from jaxrobust.app.report.frame import accuracy_numbers, training_numbers
from jaxrobust.app.report.frame import tests as tests_of
from jaxrobust.app.report.page import Section
from jaxrobust.app.study.read import Run, Study
from jaxrobust.app.trainer import TrainedRun, variables_of
from jaxrobust.data import Dataset, Split
from jaxrobust.images import to_float
from jaxrobust.models import Outputs

NOISE_SEED = 0
"""Seeds the test noise: the same for all runs, which makes their accuracies comparable in pairs."""


def make_test_split(dataset: Dataset, test_size: int | None) -> Split:
    """Returns all test images, or ``test_size`` of them, drawn at random by class with seed 0."""
    if test_size is not None:
        _validate.in_range("test_size", test_size, 1, len(dataset.test.labels), open_high=False)
    return subset_of(dataset.test, test_size)


def first_test_images(run: TrainedRun | ForeignModel, settings: Any, least: int = 1) -> Split:
    """Returns the first ``settings.num_images`` of ``settings.test_size`` test images.

    Raises:
      InputError: (a ValueError) unless these are at least ``least``, and there.
    """
    split = make_test_split(run.dataset, settings.test_size)
    count = settings.num_images
    _validate.in_range("num_images", count, least, len(split.labels), open_high=False)
    return Split(split.images[:count], split.labels[:count])


def evaluate_run(
    run: TrainedRun | ForeignModel, settings: Evaluation, folder: pathlib.Path, label: str,
    name: str | None = None,
) -> dict:
    """Measures :data:`ACCURACY` and, if it is missing, the run's doubt; returns the former's facts.

    Raises:
      InputError: (a ValueError) if there is an evaluation with other settings, or the images are
        too small for a perturbation.
    """
    facts = measure(ACCURACY, run, settings, folder, label, name)
    if not isinstance(run, ForeignModel):
        measure_doubt(run, folder)
    return facts


def _measure(run: TrainedRun | ForeignModel, settings: Evaluation, work: Work) -> Measured:
    """Measures accuracy at each noise level, clipped to [0, 1], and under each other perturbation.

    For each draw, or once where there is no randomness, as for clean images; and for each class,
    averaged over the draws. Features are kept of trained runs alone.
    """
    split = make_test_split(run.dataset, settings.test_size)
    tests: list[tuple[dict[str, Any], str, Any, bool]] = [
        ({"std_255": level}, f"{level}/255", perturbations.gaussian(level / 255), level > 0)
             for level in settings.noise_levels]
    for text in settings.perturb:
        perturb = perturbations.parse_perturbation(text)
        jax.eval_shape(perturb, jax.random.key(0), to_float(jnp.asarray(split.images[:1])))
        tests.append(({"perturb": text}, text, perturb, perturbations.is_random(perturb)))
    draws = [settings.num_draws if random else 1 for *_, random in tests]
    names, results = run.dataset.class_names, []
    with progress(f"{work.label}, evaluate", sum(draws)) as shown:
        for index, ((what, name, perturb, _), num_draws) in enumerate(
                zip(tests, draws, strict=True)):
            accuracies, by_class = [], []
            for correct in evaluation.evaluate(
                run.logits_fn, split.images, split.labels, perturb=perturb,
                key=jax.random.fold_in(jax.random.key(NOISE_SEED), index),
                num_draws=num_draws, batch_size=batch_size_of(split.images), layout=run.layout,
            ):
                accuracies.append(float(correct.mean()))
                by_class.append(class_accuracies(correct, split.labels, len(names)))
                shown.advance(**{f"accuracy at {name}": accuracies[-1]})
            results.append({**what, "accuracies": accuracies, "by_class": mean_by_class(by_class)})
    num_levels = len(settings.noise_levels)
    return Measured({
        "epoch": run.epoch, "selected_on": run.config and run.config.select, "split": "test",
        "num_images": len(split.labels), "num_draws": settings.num_draws,
        "classes": {"names": list(names),
                    "counts": np.bincount(split.labels, minlength=len(names)).tolist()},
        "levels": results[:num_levels], "perturbations": results[num_levels:],
    }, None if isinstance(run, ForeignModel) else _features_of(run, split, settings.tsne_images))



def class_accuracies(correct: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns the share [C] of each class's images that are classified correctly, from ``correct``
    and ``labels`` [N]; NaN for a class without images."""
    counts = np.bincount(labels, minlength=num_classes)
    right = np.bincount(labels, weights=correct, minlength=num_classes)
    return np.divide(right, counts, out=np.full(num_classes, np.nan), where=counts > 0)


def mean_by_class(draws: Sequence[np.ndarray]) -> list[float | None]:
    """Averages :func:`class_accuracies` over the draws; None in the place of NaN."""
    return [None if np.isnan(value) else round(float(value), 6) for value in np.mean(draws, axis=0)]


def _features_of(run: TrainedRun, split: Split, count: int) -> Arrays:
    """Returns features of the first test images, clean and perturbed as in training."""
    images = split.images[:count]
    variables, perturb = variables_of(run.state), training_perturbation(run.config)
    views = evaluation.map_batches(
        lambda *rows: _features(run.model, variables, perturb, *rows),
        images, np.arange(len(images)), batch_size=batch_size_of(images))
    noise = run.config.perturb or f"std {run.config.noise_std * 255:g}/255"
    return {**views, "labels": split.labels[:count], "noise": np.asarray(noise)}


@functools.partial(jax.jit, static_argnames="model")
def _features(model, variables, perturb, images, indices):
    clean = to_float(images)
    noisy = perturbations.per_example(perturb, jax.random.key(NOISE_SEED), clean, indices)
    return {view: model.apply(variables, inputs, train=False).features
            for view, inputs in (("clean", clean), ("noisy", noisy))}


def pooled_blocks(outputs: Outputs) -> dict[str, jax.Array]:
    """Averages each block's outputs over their positions: [B, channels]."""
    return {name: jnp.mean(block, axis=(1, 2)) for name, block in outputs.blocks.items()}


def estimates(run: Run) -> Iterator[Estimate]:
    """Yields the accuracy under each test: the mean over the draws, with Wilson's interval at the
    mean share for the number of images, as if each image had one draw."""
    evaluation = run.facts("evaluation")  # That of the run's name, unlike ``run.evaluation``.
    for condition, test in tests_of(evaluation) if evaluation else ():
        number = evaluation["num_images"]
        mean = float(np.mean(test["accuracies"]))
        yield share("accuracy", condition, round(mean * number), number)._replace(value=100 * mean)


# --- The report ------------------------------------------------------------------------------


def _section(study: Study) -> Section:
    return Section(
        "accuracy", "Accuracy", "",
        tuple(filter(None, (tables.accuracy_table(study), tables.balanced_table(study),
                            tables.perturbation_table(study), tables.class_table(study)))),
        tuple(filter(None, (pictures.accuracy_picture(study),
                            pictures.perturbation_picture(study)))))


def _training_section(study: Study) -> Section | None:
    picture = pictures.training_picture(study)
    return Section("training", "Training", "", (), (picture,)) if picture else None


def _features_section(study: Study) -> Section | None:
    picture = pictures.tsne_picture(study)
    return Section("features", "Features", "", (), (picture,)) if picture else None


ACCURACY = Measurement("evaluation", measure=_measure, command="evaluate", arrays="features",
                       section=_section, numbers=(training_numbers, accuracy_numbers),
                       estimates=estimates, suite="noise", limited="test_size", card=False)
TRAINING = Measurement("training", section=_training_section)
FEATURES = Measurement("features", section=_features_section)
