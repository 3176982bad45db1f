"""Detection of strange images, which belong to none of the classes."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxrobust import _validate, data, metrics
from jaxrobust.app.classifiers import ForeignModel
from jaxrobust.app.config import InputError, RunConfig, distinct
from jaxrobust.app.datasets import open_dataset
from jaxrobust.app.doubt import draw_images
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
    subset_of,
    subset_text,
    subsets_text,
    table_of,
)
from jaxrobust.app.measurements.runner import Measured, Measurement, Work
from jaxrobust.app.progress import progress
from jaxrobust.app.report.page import Section
from jaxrobust.app.study.read import Run, Study
from jaxrobust.app.trainer import TrainedRun
from jaxrobust.images import to_float

SEED = 0
NOISE = "uniform_noise"
"""Images whose pixels are independent and uniform in [0, 1]."""
NEIGHBOURS = 50
"""Of the score of nearest neighbours."""


@dataclasses.dataclass(frozen=True)
class OodSettings:
    """How detection of strange images is measured."""

    strange: tuple[str, ...] | None = None
    """Strange images: "uniform_noise", names of other data sets, whose test images are taken, or
    folder:PATH; uniform noise and digits by default."""
    data_dir: Annotated[str | None, tyro.conf.Suppress] = None
    """Folder of TensorFlow Datasets for strange images, which --data-dir sets; none for the default
    one."""
    limit: Limit = None
    """Largest number of test images, and of strange images of a kind, drawn at random with seed 0;
    none for all."""

    def __post_init__(self):
        if self.strange is not None:
            _validate.in_range("number of kinds of strange images", len(self.strange), 1)
            distinct("kind of strange images", self.strange)
            for name in self.strange:
                if not name.startswith(data.FOLDER_PREFIX):
                    _validate.one_of("strange images", name, (NOISE, *data.DATASETS))
        check_counts(self, "limit")


def _asked(run: TrainedRun | ForeignModel, settings: OodSettings, folder: pathlib.Path) -> dict:
    kinds = settings.strange
    if kinds is None:
        kinds = [name for name in (NOISE, "digits") if name != run.dataset.name]
    if run.dataset.name in kinds:
        raise InputError(f"Expected strange images that the model was not trained on, got "
                         f"{run.dataset.name}, its own data set.")
    return {"strange": list(kinds), "limit": settings.limit}


def _measure(run: TrainedRun | ForeignModel, settings: OodSettings, work: Work) -> Measured:
    """Measures how well each score tells strange images from the data set's test images.

    Strange images are resized and made grey or RGB as the model needs. Scores of features use up to
    5,000 training images, with equal shares of the classes.
    """
    test = subset_of(run.dataset.test, settings.limit)
    scores = _scores(run)
    familiar = scores(test.images, "test images")
    qualities, counts = {}, {}
    with progress(f"{work.label}, strange images", len(work.asked["strange"])) as shown:
        for kind in work.asked["strange"]:
            images = _strange(kind, run.dataset.image_shape, settings, len(test.labels))
            counts[kind] = len(images)
            found = scores(images, kind)
            qualities[kind] = {name: _quality(familiar[name], found[name]) for name in found}
            shown.advance()
    return Measured({"subset": subset_text(test, run.dataset.test),
                     "num_images": len(test.labels), "num_strange": counts,
                     "detection": qualities})


def _scores(run) -> Callable[..., dict[str, np.ndarray]]:
    """``(images, what) -> scores [N] by name``, larger for stranger images."""
    statistics = training = None
    if run.features_fn is not None:
        train, num_classes = run.splits.train, len(run.dataset.class_names)
        train = draw_images(train, [np.flatnonzero(train.labels == label)
                                    for label in range(num_classes)])
        training = outputs_of(run.features_fn, train.images, run.layout)
        _validate.finite("features of training images", training)
        statistics = metrics.class_statistics(training, train.labels, num_classes)

    def scores(images, what):
        logits = outputs_of(run.logits_fn, images, run.layout)
        _validate.finite_logits(np.isfinite(logits).all(axis=1), f" of {what}")
        found: dict[str, Any] = {
            "probability": metrics.improbability(logits), "energy": metrics.energy(logits)}
        if statistics is not None:
            features = outputs_of(run.features_fn, images, run.layout)
            _validate.finite(f"features of {what}", features)
            found |= {
                "Mahalanobis": metrics.nearest_distance(
                    metrics.mahalanobis_distance, features, statistics),
                "centroid": metrics.nearest_distance(metrics.scaled_distance, features, statistics),
                "neighbours": metrics.knn_distance(
                    features, training, min(NEIGHBOURS, len(training)))}
        return {name: np.asarray(values) for name, values in found.items()}

    return scores


FPR = "FPR at 95 %"
_QUALITIES = ("AUROC", "AUPR, strange positive", "AUPR, familiar positive", FPR)
"""In the order of :class:`jaxrobust.metrics.Detection`."""


def _quality(familiar: np.ndarray, strange: np.ndarray) -> dict[str, list[float]]:
    def quality(one, other):
        return metrics.detection_quality(familiar[one], strange[other])

    return dict(zip(_QUALITIES, bootstrapped(quality, len(familiar), len(strange), most=1),
                    strict=True))


def _strange(kind: str, shape: tuple[int, int, int], settings: OodSettings, number: int
             ) -> np.ndarray:
    """Strange images [M, H, W, channels], float32 in [0, 1]; M is at most ``limit``."""
    height, width, channels = shape
    if kind == NOISE:
        return np.asarray(jax.random.uniform(jax.random.key(SEED), (number, *shape)))
    config = RunConfig(dataset=kind, select="last")
    if kind.startswith(data.FOLDER_PREFIX):
        config = dataclasses.replace(config, image_size=(height, width))
    images = open_dataset(config, pathlib.Path(
        settings.data_dir or data.default_data_dir())).test.images
    rows = np.random.default_rng(SEED).permutation(len(images))[:settings.limit]
    images = to_float(jnp.asarray(images[np.sort(rows)]))
    if images.shape[-1] != channels:
        images = (jnp.repeat(images, channels, axis=-1) if images.shape[-1] == 1 else
                  images.mean(axis=-1, keepdims=True))
    resized = jax.image.resize(images, (len(images), *shape), "bilinear")
    return np.clip(np.asarray(resized), 0, 1)


def estimates(run: Run) -> Iterator[Estimate]:
    """Yields AUROC, AUPR and FPR by score and kind of strange images."""
    facts = run.facts("ood")
    if facts is None:
        return
    for kind, scores in facts["detection"].items():
        for score, quality in scores.items():
            yield from (estimate(name, f"{score}, {kind}", values, "%")
                        for name, values in quality.items())


def _areas(run: Run) -> Iterator[Estimate]:
    return (one for one in estimates(run) if one.measurement == "AUROC")


def _section(study: Study) -> Section | None:
    if not found_of(study, estimates):
        return None
    counts = "; ".join(sorted({f"{number:,} of {kind}" for runs in study.runs.values()
                               for run in runs if (facts := run.facts("ood"))
                               for kind, number in facts["num_strange"].items()}))
    return Section(
        "ood", "Detection of strange images", "", (table_of(
            study, estimates, "How well scores tell strange images from those of the data set.",
            f"Images: {subsets_text(study, 'ood')} Strange ones: {counts}. Intervals: bootstrap "
            "over images.",
            "Strange is positive in AUROC and FPR, the share of familiar images that is flagged "
            "where 95 % of the strange ones are. Scores of features are missing for models whose "
            "features are not known."),),
        (dots_picture(study, _areas, "AUROC", "ood", "Detection of strange images.", "AUROC",
                      "How to read: 50 % is chance, 100 % perfect."),))


def table_text(facts: dict) -> str:
    """Formats the result as plain text."""
    return "\n".join([f"{facts['subset']} against {', '.join(facts['num_strange'])}", *(
        f"{score}, {kind}: AUROC {100 * quality['AUROC'][0]:.2f} %, FPR at 95 % "
        f"{100 * quality[FPR][0]:.2f} %"
        for kind, scores in facts["detection"].items() for score, quality in scores.items())])


OOD = Measurement(
    "ood", OodSettings(), _measure, _asked, section=_section, numbers=(numbers_of(estimates),),
    estimates=estimates, suite="ood", command="evaluate", text=table_text, parallel=True)
