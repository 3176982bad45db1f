"""Tests finished runs: accuracy under perturbations, and features for the t-SNE figure."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust import _validate, data, evaluation, perturbations
from jaxrobust.app import files, provenance, run_folder
from jaxrobust.app.config import Evaluation, InputError, training_perturbation
from jaxrobust.app.doubt import measure_doubt
from jaxrobust.app.execution import batch_size_of
from jaxrobust.app.progress import progress
from jaxrobust.app.trainer import TrainedRun, variables_of
from jaxrobust.data import Dataset, Split
from jaxrobust.images import to_float
from jaxrobust.models import Outputs

NOISE_SEED = 0
"""Of the test noise: the same for all runs, which makes their accuracies comparable in pairs."""


def make_test_split(dataset: Dataset, test_size: int | None) -> Split:
    """The test images, or ``test_size`` of them drawn by class at random with seed 0."""
    if test_size is None or test_size == len(dataset.test.labels):
        return dataset.test
    _validate.in_range("test_size", test_size, 1, len(dataset.test.labels))
    return data.split_off(dataset.test, test_size, seed=0, name="test_size")[1]


def settings_asked(settings) -> dict:
    """The fields of a dataclass of settings, as :func:`keep_result` finds them in a JSON file."""
    return {name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(settings).items()}


def keep_result(path: pathlib.Path, settings: dict) -> bool:
    """Whether a result with these settings is there already.

    Raises:
      InputError: (a ValueError) if one with other settings is.
    """
    if not path.is_file():
        return False
    differing = {name: (there, settings.get(name))
                 for name, there in files.read_json(path).get("settings", {}).items()
                 if there != settings.get(name)}
    if differing:
        name, (there, asked) = next(iter(differing.items()))
        command = run_folder.MEASUREMENTS[path.stem.partition("-")[0]]
        raise InputError(f"{path} was made with {name}={there}, not {asked}. Keep both with "
                         f"`{command} --name NAME`, or remove that file to measure anew.")
    return True


def evaluate_run(
    run: TrainedRun, settings: Evaluation, folder: pathlib.Path, label: str,
    name: str | None = None,
) -> None:
    """Writes ``evaluation.json``, ``features.npz`` and ``doubt.json`` into the run's folder; the
    first two with ``-NAME`` if there is a name.

    Accuracy at each noise level, noise clipped to [0, 1], and under each other perturbation, for
    each draw; once where there is no randomness, as for clean images; and for each class, the mean
    over the draws. Does nothing if they are there already, with the same settings.

    Raises:
      InputError: (a ValueError) if there is an evaluation with other settings, or the images are
        too small for a perturbation.
    """
    asked = settings_asked(settings)
    path, features = (
        run_folder.facts_path(folder, kind, name) for kind in ("evaluation", "features"))
    done = keep_result(path, asked)
    measure_doubt(run, folder)
    if done:
        return
    split = make_test_split(run.dataset, settings.test_size)
    tests = [({"std_255": level}, f"{level}/255", perturbations.gaussian(level / 255), level > 0)
             for level in settings.noise_levels]
    for text in settings.perturb:
        perturb = perturbations.parse_perturbation(text)
        jax.eval_shape(perturb, jax.random.key(0), to_float(jnp.asarray(split.images[:1])))
        tests.append(({"perturb": text}, text, perturb, perturbations.is_random(perturb)))
    draws = [settings.num_draws if random else 1 for *_, random in tests]
    names, results = run.dataset.class_names, []
    with progress(f"{label}, evaluate", sum(draws)) as shown:
        for index, ((what, name, perturb, _), num_draws) in enumerate(
                zip(tests, draws, strict=True)):
            accuracies, by_class = [], []
            for correct in evaluation.evaluate(
                run.model, variables_of(run.state), split.images, split.labels, perturb=perturb,
                key=jax.random.fold_in(jax.random.key(NOISE_SEED), index),
                num_draws=num_draws, batch_size=batch_size_of(split.images), layout=run.layout,
            ):
                accuracies.append(float(correct.mean()))
                by_class.append(class_accuracies(correct, split.labels, len(names)))
                shown.advance(**{f"accuracy at {name}": accuracies[-1]})
            results.append({**what, "accuracies": accuracies, "by_class": mean_by_class(by_class)})
    _write_features(run, split, settings.tsne_images, features.with_suffix(".npz"))
    num_levels = len(settings.noise_levels)
    files.write_json(path, {
        "epoch": run.epoch, "selected_on": run.config.select, "split": "test",
        "num_images": len(split.labels), "num_draws": settings.num_draws,
        "classes": {"names": list(names),
                    "counts": np.bincount(split.labels, minlength=len(names)).tolist()},
        "levels": results[:num_levels], "perturbations": results[num_levels:],
        "settings": asked, "provenance": provenance.describe()})


def class_accuracies(correct: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """The share of each class's images that are classified correctly, [C].

    Args:
      correct: [N], bool.
      labels: [N], in [0, C).
      num_classes: C.

    Returns:
      Float64; NaN for a class without images.
    """
    counts = np.bincount(labels, minlength=num_classes)
    right = np.bincount(labels, weights=correct, minlength=num_classes)
    return np.divide(right, counts, out=np.full(num_classes, np.nan), where=counts > 0)


def mean_by_class(draws: Sequence[np.ndarray]) -> list[float | None]:
    """Means over the draws of :func:`class_accuracies`, as JSON has them."""
    return [None if np.isnan(value) else round(float(value), 6) for value in np.mean(draws, axis=0)]


def _write_features(run: TrainedRun, split: Split, count: int, path: pathlib.Path) -> None:
    """Features of the first test images, clean and as the training perturbs them."""
    images = split.images[:count]
    variables, perturb = variables_of(run.state), training_perturbation(run.config)
    views = evaluation.map_batches(
        lambda *rows: _features(run.model, variables, perturb, *rows),
        images, np.arange(len(images)), batch_size=batch_size_of(images))
    noise = run.config.perturb or f"std {run.config.noise_std * 255:g}/255"
    files.write_arrays(path, {
        **views, "labels": split.labels[:count], "noise": np.asarray(noise)})


@functools.partial(jax.jit, static_argnames="model")
def _features(model, variables, perturb, images, indices):
    """Penultimate features of either view, each [B, d]."""
    clean = to_float(images)
    noisy = perturbations.per_example(perturb, jax.random.key(NOISE_SEED), clean, indices)
    return {view: model.apply(variables, inputs, train=False).features
            for view, inputs in (("clean", clean), ("noisy", noisy))}


def pooled_blocks(outputs: Outputs) -> dict[str, jax.Array]:
    """Each block's outputs, averaged over their positions: [B, channels]."""
    return {name: jnp.mean(block, axis=(1, 2)) for name, block in outputs.blocks.items()}
