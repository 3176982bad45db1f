"""Measures for the command ``figures`` all that the paper's Fig. 8, 9 and 11 to 13 show."""

import dataclasses
import pathlib

from jaxrobust import _validate
from jaxrobust.app import run_folder
from jaxrobust.app.config import CurvatureConfig, InputError, distinct
from jaxrobust.app.measurements.accuracy import make_test_split
from jaxrobust.app.measurements.blocks import BLOCKS, NEIGHBOURS, BlockSettings
from jaxrobust.app.measurements.curvature import CURVATURE
from jaxrobust.app.measurements.noise_counts import NOISE_COUNTS, CountSettings
from jaxrobust.app.measurements.runner import measure
from jaxrobust.app.measurements.surfaces import (
    NUM_SURFACES,
    SURFACES,
    SurfaceSettings,
    first_of_classes,
)
from jaxrobust.app.trainer import TrainedRun

FIGURES = NOISE_COUNTS, SURFACES, BLOCKS
"""The measurements of the command, beside the curvature."""


@dataclasses.dataclass(frozen=True)
class FigureSettings:
    """What the command ``figures`` measures."""

    num_draws: int = 10
    """Independent draws of each noise, as in the paper's Fig. 9."""
    curvature_images: int | None = None
    """Number of test images, from the first on, for curvature; by default the run's own number."""
    curvature_probes: int | None = None
    """Random directions for each image; by default the number in the run's curvature."""
    test_size: int | None = None
    """Number of test images, drawn at random by class with seed 0; by default the number in the
    run's other results, or all."""
    surface_images: tuple[int, ...] | None = None
    """Indices of the test images whose loss surface is shown; by default the first of three
    different classes."""
    surface_resolution: int = 31
    """Points along each direction of a surface; odd, so that the image is among them."""
    tsne_images: int = 1000
    """Number of test images, from the first on, shown in the figures of the blocks."""

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
    given = run, _curvature_settings(run, settings, folder, name)
    facts = measure(CURVATURE, *given, folder, label, name)
    test_size = facts["settings"]["test_size"]
    labels = make_test_split(run.dataset, test_size).labels
    shared = {"test_size": test_size, "noise_std": run.config.noise_std}
    for measurement, asked in (
        (NOISE_COUNTS, CountSettings(settings.num_draws, facts["num_images"], **shared)),
        (SURFACES, SurfaceSettings(
            settings.surface_images or tuple(first_of_classes(labels, NUM_SURFACES)),
            settings.surface_resolution, **shared)),
        (BLOCKS, BlockSettings(min(settings.tsne_images, len(labels)), **shared)),
    ):
        measure(measurement, run, asked, folder, label, name)


def _curvature_settings(run, settings, folder, name) -> CurvatureConfig:
    """Fills in what the settings leave open from the run's curvature or else its evaluation."""
    asked = {"num_images": settings.curvature_images, "num_probes": settings.curvature_probes,
             "test_size": settings.test_size}
    asked = {setting: value for setting, value in asked.items() if value is not None}
    there = run_folder.read_facts(folder, "curvature", name)
    if there is not None:
        return CurvatureConfig(**there["settings"] | asked)
    evaluated = run_folder.read_facts(folder, "evaluation")
    if evaluated is not None:
        asked = {"test_size": evaluated["settings"]["test_size"]} | asked
    num_test = len(make_test_split(run.dataset, asked.get("test_size")).labels)
    asked = {"num_images": min(CurvatureConfig().num_images, num_test)} | asked
    _validate.in_range("curvature_images", asked["num_images"], 1, num_test, open_high=False)
    return CurvatureConfig(**asked)
