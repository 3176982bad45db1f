"""Scores the doubt of predictions; the score is chosen on images that were not trained on."""

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust import _validate, evaluation, metrics
from jaxrobust.app import files, provenance, run_folder
from jaxrobust.app.config import InputError
from jaxrobust.app.execution import batch_size_of
from jaxrobust.app.trainer import TrainedRun, make_splits, variables_of
from jaxrobust.data import Split, StoredImages
from jaxrobust.images import predicted_classes, to_float
from jaxrobust.metrics import ClassStatistics

SCORES = {
    "probability": "1 - probability",
    "energy": "energy",
    "distance": "distance to the class centroid, over the class's typical one",
    "mahalanobis": "Mahalanobis distance to the class centroid",
}
"""The candidates and their descriptions; the first of equally good ones is chosen."""
_OF_FEATURES = ("distance", "mahalanobis")

COVERAGE = 0.9
"""The share of held-out images that the threshold accepts."""
LEAST = 5
"""Fewest right predictions, and fewest wrong ones, for which an AUROC is computed."""
MOST_IMAGES = 5000
"""Largest number of training images for the class statistics, with equal shares of the classes, and
of held-out images; drawn at random with seed 0."""


class Doubt(NamedTuple):
    """The doubt score of a run."""

    score: str  # one of SCORES
    statistics: ClassStatistics | None  # of the training images; None if the score needs none
    facts: dict | None  # the content of doubt.json; None if no score was measured


UNMEASURED = Doubt("probability", None, None)


def doubt_of(
    score: str, logits: jax.Array | np.ndarray, features: jax.Array | np.ndarray,
    statistics: ClassStatistics | None
) -> jax.Array:
    """Computes the score [B], larger for more doubtful, from logits [B, C] and features [B, d].

    It is infinite where a logit or a feature is not finite.
    """
    classes = predicted_classes(logits)
    doubts = {
        "probability": lambda: metrics.improbability(logits),
        "energy": lambda: metrics.energy(logits),
        "distance": lambda: metrics.scaled_distance(features, classes, statistics),
        "mahalanobis": lambda: metrics.mahalanobis_distance(features, classes, statistics),
    }[score]()
    return jnp.where((classes >= 0) & jnp.isfinite(features).all(axis=1), doubts, jnp.inf)


def outputs_of(run: TrainedRun, images) -> tuple[np.ndarray, np.ndarray]:
    """Computes logits [N, C] and features [N, d] of images [N, H, W, channels]."""
    variables = variables_of(run.state)
    return evaluation.map_batches(
        lambda rows: _outputs(run.model, variables, rows), images,
        batch_size=batch_size_of(images))


@functools.partial(jax.jit, static_argnames="model")
def _outputs(model, variables, images):
    outputs = model.apply(variables, to_float(images), train=False)
    return outputs.logits, outputs.features


def measure_doubt(run: TrainedRun, folder: pathlib.Path) -> None:
    """Writes ``doubt.json``, and ``doubt.npz`` if the score needs class statistics; skips a run
    that has them.

    The score is that of :data:`SCORES` with the best AUROC on images that the run was not trained
    on: the validation images that chose its epoch or, if there are none or too few of them are
    classified wrongly, the test images. If too few of these are, the score is the probability.

    Raises:
      InputError: (a ValueError) if another command measures it at this time, the folder cannot be
        written to, or logits or features are not finite.
    """
    if run_folder.read_facts(folder, "doubt") is not None:
        return
    files.require_writable(folder)
    with run_folder.locked_facts(folder, "doubt"):
        # Another command may have come and gone.
        if run_folder.read_facts(folder, "doubt") is None:
            _measure_doubt(run, folder)


def _measure_doubt(run: TrainedRun, folder: pathlib.Path) -> None:
    splits = make_splits(run.dataset, run.config)
    num_classes = len(run.dataset.class_names)
    train = draw_images(splits.train, [np.flatnonzero(splits.train.labels == label)
                                 for label in range(num_classes)])
    features = outputs_of(run, train.images)[1]
    _validate.finite("features of training images", features)
    statistics = metrics.class_statistics(features, train.labels, num_classes)
    held_out = {"test": run.dataset.test}
    if run.config.select == "validation":
        held_out = {"validation": splits.selection} | held_out
    for name, split in held_out.items():
        split = draw_images(split, [np.arange(len(split.labels))])
        logits, features = outputs_of(run, split.images)
        _validate.finite(f"logits of {name} images", logits)
        _validate.finite(f"features of {name} images", features)
        correct = np.asarray(predicted_classes(logits)) == split.labels
        doubts = {score: np.asarray(doubt_of(score, logits, features, statistics))
                  for score in SCORES}
        facts = {"held_out": name, **choose_score(doubts, correct)}
        if facts["auroc"] is not None:
            break
    if facts["score"] in _OF_FEATURES:
        run_folder.write_arrays(folder, "doubt", statistics._asdict())
    run_folder.write_facts(folder, "doubt", {
        **facts, "epoch": run.epoch, "provenance": provenance.describe()})


def draw_images(split: Split, groups: Sequence[np.ndarray]) -> Split:
    """Draws :data:`MOST_IMAGES` rows, an equal number from each group; keeps their order."""
    random, most = np.random.default_rng(0), -(-MOST_IMAGES // len(groups))
    rows = np.sort(np.concatenate([random.permutation(group)[:most] for group in groups]))
    take = split.images.take if isinstance(split.images, StoredImages) else split.images.__getitem__
    return Split(take(rows), split.labels[rows])


def choose_score(doubts: Mapping[str, np.ndarray], correct: np.ndarray) -> dict:
    """Chooses the score that best separates wrong predictions from right ones, ``correct`` [N].

    Returns facts for JSON: the ``score``; the ``auroc`` of each, None with less than :data:`LEAST`
    right or wrong predictions; the ``threshold`` that accepts the share ``coverage``; accuracies.
    """
    num_wrong = int(np.sum(~correct))
    tells = min(num_wrong, len(correct) - num_wrong) >= LEAST
    auroc = {score: metrics.auroc(doubt, correct) for score, doubt in doubts.items()} if (
        tells) else None
    score = max(auroc, key=auroc.get) if tells else "probability"
    threshold = metrics.doubt_threshold(doubts[score], COVERAGE)
    accepted = doubts[score] <= threshold
    return {
        "score": score, "auroc": auroc, "num_images": len(correct), "num_wrong": num_wrong,
        "coverage": COVERAGE, "threshold": threshold, "accepted": float(accepted.mean()),
        "accuracy": float(correct.mean()), "accuracy_of_accepted": float(correct[accepted].mean())}


def load_doubt(folder: pathlib.Path) -> Doubt:
    """Reads the score of a run; :data:`UNMEASURED` if it has no ``doubt.json``.

    Raises:
      InputError: (a ValueError) if it is no such score, or lacks its class statistics.
    """
    facts, path = run_folder.read_facts(folder, "doubt"), run_folder.facts_path(folder, "doubt")
    if facts is None:
        return UNMEASURED
    _validate.one_of(f"score in {path}", facts["score"], SCORES)
    numbers = {name: facts[name] for name in (
        "num_images", "num_wrong", "threshold", "accepted", "accuracy", "accuracy_of_accepted")}
    if facts["auroc"] is not None:
        with files.reading(path):
            numbers["auroc"] = facts["auroc"][facts["score"]]
    for name, value in numbers.items():
        if not isinstance(value, int | float):
            raise InputError(f"Expected {name} in {path} to be a number, got {value!r}.")
    statistics = None
    if facts["score"] in _OF_FEATURES:
        arrays = run_folder.read_arrays(folder, "doubt")
        if arrays is None:
            raise InputError(f"Expected class statistics beside {path}, found no doubt.npz there.")
        statistics = ClassStatistics(*(arrays[name] for name in ClassStatistics._fields))
    return Doubt(facts["score"], statistics, facts)


def doubt_text(doubt: Doubt) -> str:
    """Describes the score and its quality in a line."""
    facts, name = doubt.facts, SCORES[doubt.score]
    if facts is None:
        return f"Doubt is {name}; how well it separates wrong from right predictions is unknown."
    told = (f"its AUROC is {facts['auroc'][doubt.score]:.2f} (0.5 is chance, 1 perfect)"
            if facts["auroc"] else
            f"fewer than {LEAST} wrong or right predictions are too few for an AUROC")
    accepted, right, every = (100 * facts[key] for key in (
        "accepted", "accuracy_of_accepted", "accuracy"))
    return (f"Doubt is {name}: on {facts['num_images']} {facts['held_out']} images, "
            f"{facts['num_wrong']} of them classified wrongly, {told}. Above "
            f"{facts['threshold']:.4g} a prediction is doubtful: {accepted:.1f} % of them are not, "
            f"and {right:.1f} % of these are right, against {every:.1f} % of all.")
