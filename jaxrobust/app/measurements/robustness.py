"""Measures finished runs for the paper's Fig. 8, 9 and 11 to 13.

Each result is a JSON file, written last, beside an npz file in the run's folder:

    noise_counts  which draws of the test noise leave an image correctly classified
    surfaces      the loss over a plane through a few test images
    blocks        the outputs of the network's blocks in the plane, clean and noisy
"""

import dataclasses
import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust import _validate, curvature, evaluation, perturbations
from jaxrobust.app import files, provenance, run_folder
from jaxrobust.app.config import CurvatureConfig, InputError, distinct
from jaxrobust.app.execution import batch_size_of
from jaxrobust.app.measurements.accuracy import (
    NOISE_SEED,
    keep_result,
    make_test_split,
    pooled_blocks,
)
from jaxrobust.app.measurements.curvature import losses_of, measure_curvature
from jaxrobust.app.progress import progress
from jaxrobust.app.report import figures
from jaxrobust.app.trainer import TrainedRun, variables_of
from jaxrobust.data import Split
from jaxrobust.images import to_float
from jaxrobust.statistics import neighbour_accuracy

NOISES = {"gaussian": perturbations.gaussian, "uniform": perturbations.uniform}
"""By name; each with the run's training noise as its standard deviation or amplitude."""

COUNT_SEED = 1
"""Not the seed of the curvature's probes: noise that repeated the probes of Eq. 21 would be
correlated with it for that reason alone."""

SURFACE_SEED = 0
NUM_SURFACES = 3
"""Images whose surface is shown where none are named."""

NEIGHBOURS = 5
"""Of the classifier that says how well a block's features separate the classes."""


@dataclasses.dataclass(frozen=True)
class FigureSettings:
    """What the command ``figures`` measures."""

    num_draws: int = 10
    """Independent draws of each noise, as in the paper's Fig. 9."""
    curvature_images: int | None = None
    """The first so many test images; as many as the run's curvature has, if none is given."""
    curvature_probes: int | None = None
    """Random directions for each image; those of the run's curvature, if none is given."""
    test_size: int | None = None
    """Test images, drawn by class at random with seed 0; those of the run's other results, if
    none is given, or all."""
    surface_images: tuple[int, ...] | None = None
    """Numbers of the test images whose loss surface is shown; the first of three different
    classes if none is given."""
    surface_resolution: int = 31
    """Points along each direction of a surface; odd, so that the image is among them."""
    tsne_images: int = 1000
    """Of the test images, the first so many are shown in the figures of the blocks."""

    def __post_init__(self):
        _validate.in_range("num_draws", self.num_draws, 1)
        _validate.in_range("surface_resolution", self.surface_resolution, 3, 1000)
        if self.surface_resolution % 2 == 0:
            raise InputError(
                f"Expected surface_resolution={self.surface_resolution} to be odd.")
        _validate.in_range("tsne_images", self.tsne_images, NEIGHBOURS + 1)
        for name, least in (("curvature_images", 1), ("curvature_probes", 2), ("test_size", 1)):
            if getattr(self, name) is not None:
                _validate.in_range(name, getattr(self, name), least)
        if self.surface_images is not None:
            _validate.in_range("number of surface_images", len(self.surface_images), 1)
            for number in self.surface_images:
                _validate.in_range("surface_images", number, 0)
            distinct("of surface_images", self.surface_images)


def measure_robustness(
    run: TrainedRun, settings: FigureSettings, folder: pathlib.Path, label: str,
    name: str | None = None,
) -> None:
    """Measures what is missing of a run's results for the figures, curvature first.

    With a name they are those under that name, as in ``curvature-NAME.json``.

    Raises:
      InputError: (a ValueError) if there are results with other settings, or the run has no
        training noise.
    """
    if run.config.noise_std == 0:
        raise InputError(f"Expected noise_std=0.0 of {folder} to be > 0: it sets the test noise.")
    there = len(run.dataset.test.labels)
    _validate.in_range("number of test images", there, NEIGHBOURS + 1)
    for number in settings.surface_images or ():
        _validate.in_range("surface image", number, 0, there)
    facts = _measure_curvature(run, settings, folder, label, name)
    test_size = facts["settings"]["test_size"]
    split = make_test_split(run.dataset, test_size)
    shared = {"test_size": test_size, "noise_std": run.config.noise_std}
    counts, surfaces, blocks = (run_folder.facts_path(folder, kind, name) for kind in (
        "noise_counts", "surfaces", "blocks"))
    _count_correct(run, split, {"num_draws": settings.num_draws,
                                "num_images": facts["num_images"], **shared}, counts, label)
    chosen = settings.surface_images or first_of_classes(split.labels, NUM_SURFACES)
    _measure_surfaces(run, split, {"images": list(chosen),
                                   "resolution": settings.surface_resolution, **shared},
                      surfaces, label)
    _embed_blocks(run, split, {"num_images": min(settings.tsne_images, len(split.labels)),
                               **shared}, blocks, label)


def first_of_classes(labels: np.ndarray, count: int) -> list[int]:
    """The first image of each of the ``count`` classes that come first."""
    return sorted(np.unique(labels, return_index=True)[1].tolist())[:count]


def _measure_curvature(run, settings, folder, label, name) -> dict:
    """The facts of the run's curvature, which is measured first where there is none."""
    asked = {"num_images": settings.curvature_images, "num_probes": settings.curvature_probes,
             "test_size": settings.test_size}
    asked = {setting: value for setting, value in asked.items() if value is not None}
    path = run_folder.facts_path(folder, "curvature", name)
    if path.is_file():
        keep_result(path, files.read_json(path)["settings"] | asked)
    else:
        if (folder / "evaluation.json").is_file():
            there = files.read_json(folder / "evaluation.json")["settings"]
            asked = {"test_size": there["test_size"]} | asked
        test_size = asked.pop("test_size", None)
        num_test = len(make_test_split(run.dataset, test_size).labels)
        if settings.curvature_images is None:
            asked["num_images"] = min(CurvatureConfig().num_images, num_test)
        _validate.in_range("curvature_images", asked["num_images"], 1, num_test, open_high=False)
        measure_curvature(
            run, CurvatureConfig(**asked), folder, label, test_size=test_size, name=name)
    return files.read_json(path)


def _count_correct(run, split: Split, asked: dict, path, label) -> None:
    """Writes ``noise_counts``: for each draw of each noise, which images are still correct."""
    if keep_result(path, asked):
        return
    images, labels = (values[: asked["num_images"]] for values in (split.images, split.labels))
    draws = {}
    with progress(f"{label}, noise", len(NOISES) * asked["num_draws"]) as shown:
        for number, (name, noise) in enumerate(NOISES.items()):
            correct = []
            for draw in evaluation.evaluate(
                run.model, variables_of(run.state), images, labels,
                perturb=noise(asked["noise_std"]),
                key=jax.random.fold_in(jax.random.key(COUNT_SEED), number),
                num_draws=asked["num_draws"], batch_size=batch_size_of(split.images),
                layout=run.layout,
            ):
                correct.append(draw)
                shown.advance(**{f"accuracy, {name}": float(draw.mean())})
            draws[name] = np.stack(correct)  # [draws, images]
    files.write_arrays(path.with_suffix(".npz"),
                      {"index": np.arange(len(labels)), "label": labels, **draws})
    _write_facts(path, asked)


def _measure_surfaces(run, split: Split, asked: dict, path, label) -> None:
    """Writes ``surfaces``: the loss of each image over the plane of Fig. 11."""
    if keep_result(path, asked):
        return
    for number in asked["images"]:
        _validate.in_range("surface image", number, 0, len(split.labels))
    chosen = np.array(asked["images"])
    images, labels = split.images[chosen], split.labels[chosen]
    # The length of a typical noise vector: the plane reaches as far as the noise does.
    extent = asked["noise_std"] * math.sqrt(images[0].size)
    with progress(f"{label}, loss surfaces", len(chosen)) as shown:
        surface = _surface(
            run.model, variables_of(run.state), to_float(jnp.asarray(images)),
            jnp.asarray(labels), jnp.asarray(chosen), extent, asked["resolution"])
        values = np.asarray(surface.values)
        shown.advance(len(chosen), **{"largest loss": float(values.max())})
    files.write_arrays(path.with_suffix(".npz"), {
        "index": chosen, "image": images, "label": labels,
        "offsets": np.asarray(surface.offsets), "values": values})
    _write_facts(path, asked, extent=extent, class_names=list(run.dataset.class_names))


@functools.partial(jax.jit, static_argnames=("model", "extent", "resolution"))
def _surface(model, variables, images, labels, indices, extent, resolution):
    loss, _ = losses_of(model, variables, labels)
    return curvature.loss_surface(
        loss, images, jax.random.key(SURFACE_SEED), extent=extent, resolution=resolution,
        indices=indices)


def _embed_blocks(run, split: Split, asked: dict, path, label) -> None:
    """Writes ``blocks``: each block's pooled outputs in the plane, clean and noisy together."""
    if keep_result(path, asked):
        return
    images, labels = (values[: asked["num_images"]] for values in (split.images, split.labels))
    noise = perturbations.gaussian(asked["noise_std"])
    variables = variables_of(run.state)
    views = evaluation.map_batches(
        lambda *rows: _pooled_blocks(run.model, variables, noise, *rows),
        images, np.arange(len(images)), batch_size=batch_size_of(images))
    names = list(views["clean"])
    planes, accuracies = {view: [] for view in views}, {view: [] for view in views}
    with progress(f"{label}, t-SNE of the blocks", len(names)) as shown:
        for name in names:
            joint = figures.joint_tsne(views["clean"][name], views["noisy"][name])
            for number, (view, features) in enumerate(views.items()):
                planes[view].append(
                    np.full((len(labels), 2), np.nan) if joint is None else joint[number])
                accuracies[view].append(neighbour_accuracy(
                    features[name], labels, num_neighbours=NEIGHBOURS))
            shown.advance(**{"neighbours, noisy": accuracies["noisy"][-1]})
    files.write_arrays(path.with_suffix(".npz"), {
        "label": labels, **{view: np.stack(values) for view, values in planes.items()},
        **{f"{view}_neighbours": np.array(values) for view, values in accuracies.items()}})
    _write_facts(path, asked, blocks=names, class_names=list(run.dataset.class_names),
                 channels=[features.shape[1] for features in views["clean"].values()])


@functools.partial(jax.jit, static_argnames="model")
def _pooled_blocks(model, variables, noise, images, indices):
    """Global average pooling of each block's outputs, for either view: each [B, channels]."""
    clean = to_float(images)
    # The noise of the figure of the penultimate features.
    noisy = perturbations.per_example(noise, jax.random.key(NOISE_SEED), clean, indices)
    return {view: pooled_blocks(model.apply(variables, inputs, train=False))
            for view, inputs in (("clean", clean), ("noisy", noisy))}


def _write_facts(path: pathlib.Path, asked: dict, **facts) -> None:
    files.write_json(path, {**asked, **facts, "settings": asked,
                           "provenance": provenance.describe()})
