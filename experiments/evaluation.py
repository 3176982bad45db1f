"""Tests finished runs: accuracy under noise, and features for the t-SNE figure."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from experiments import runs
from experiments.config import Evaluation, InputError
from experiments.progress import progress
from experiments.training import TrainedRun, variables_of
from jaxrobust import _validate, data, evaluation, perturbations
from jaxrobust.data import Dataset, Split
from jaxrobust.data.augment import to_float
from jaxrobust.models import Outputs

NOISE_SEED = 0
"""Of the test noise: the same for all runs, which makes their accuracies comparable in pairs."""
BATCH_SIZE = 250


def make_test_split(dataset: Dataset, test_size: int | None) -> Split:
    """The test images, or ``test_size`` of them drawn by class at random with seed 0."""
    if test_size is None or test_size == len(dataset.test.labels):
        return dataset.test
    _validate.in_range("test_size", test_size, 1, len(dataset.test.labels))
    return data.split_off(dataset.test, test_size, seed=0)[1]


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
                 for name, there in runs.read_json(path).get("settings", {}).items()
                 if there != settings.get(name)}
    if differing:
        name, (there, asked) = next(iter(differing.items()))
        raise InputError(f"{path} was made with {name}={there}, not {asked}. "
                         "Remove it first if it is to be made anew.")
    return True


def evaluate_run(run: TrainedRun, settings: Evaluation, folder: pathlib.Path, label: str) -> None:
    """Writes ``evaluation.json`` and ``features.npz`` into the run's folder.

    Accuracy at each noise level for each draw, noise clipped to [0, 1]; clean once, for it has
    no randomness. Does nothing if they are there already, with the same settings.

    Raises:
      InputError: (a ValueError) if there is an evaluation with other settings.
    """
    asked = settings_asked(settings)
    path = folder / "evaluation.json"
    if keep_result(path, asked):
        return
    for level in settings.noise_levels:
        _validate.in_range("noise level", level, 0)
    split = make_test_split(run.dataset, settings.test_size)
    variables = variables_of(run.state)
    draws = [1 if level == 0 else settings.num_draws for level in settings.noise_levels]
    levels = []
    with progress(f"{label}, evaluate", sum(draws)) as shown:
        for index, (level, num_draws) in enumerate(zip(settings.noise_levels, draws, strict=True)):
            accuracies = []
            for correct in evaluation.evaluate(
                run.model, variables, split.images, split.labels,
                perturb=perturbations.gaussian(level / 255),
                key=jax.random.fold_in(jax.random.key(NOISE_SEED), index),
                num_draws=num_draws, batch_size=BATCH_SIZE, layout=run.layout,
            ):
                accuracies.append(float(correct.mean()))
                shown.advance(**{f"accuracy at {level}/255": accuracies[-1]})
            levels.append({"std_255": level, "accuracies": accuracies})
    _write_features(run, split, settings.tsne_images, folder)
    runs.write_json(path, {
        "epoch": run.epoch, "selected_on": run.config.select, "split": "test",
        "num_images": len(split.labels), "num_draws": settings.num_draws, "levels": levels,
        "settings": asked, "provenance": runs.provenance()})


def _write_features(run: TrainedRun, split: Split, count: int, folder: pathlib.Path) -> None:
    """Features of the first test images, clean and with the training noise."""
    images = split.images[:count]
    clean = to_float(jnp.asarray(images))
    noisy = perturbations.per_example(
        perturbations.gaussian(run.config.noise_std), jax.random.key(NOISE_SEED), clean,
        np.arange(len(images)))
    clean, noisy = (features_of(run, np.asarray(view)) for view in (clean, noisy))
    runs.write_arrays(folder / "features.npz", {
        "clean": clean, "noisy": noisy, "labels": split.labels[:count],
        "noise_std_255": np.asarray(run.config.noise_std * 255)})


def features_of(run: TrainedRun, images: np.ndarray) -> np.ndarray:
    """Penultimate features [N, d] of images [N, H, W, channels]."""
    variables = variables_of(run.state)
    return evaluation.map_batches(
        lambda rows: evaluation.predict(run.model, variables, rows).features, images,
        batch_size=BATCH_SIZE)


def pooled_blocks(outputs: Outputs) -> dict[str, jax.Array]:
    """Each block's outputs, averaged over their positions: [B, channels]."""
    return {name: jnp.mean(block, axis=(1, 2)) for name, block in outputs.blocks.items()}
