"""Measurements of runs, a module each; :data:`MEASUREMENTS` lists them."""

import pathlib

from jaxrobust.app import run_folder
from jaxrobust.app.measurements.accuracy import ACCURACY, FEATURES, TRAINING
from jaxrobust.app.measurements.attacks import ATTACKS
from jaxrobust.app.measurements.blocks import BLOCKS
from jaxrobust.app.measurements.calibration import CALIBRATION
from jaxrobust.app.measurements.certificates import CERTIFICATES
from jaxrobust.app.measurements.corruptions import CORRUPTIONS
from jaxrobust.app.measurements.curvature import CURVATURE
from jaxrobust.app.measurements.flips import FLIPS
from jaxrobust.app.measurements.networks import NETWORKS
from jaxrobust.app.measurements.noise_counts import NOISE_COUNTS
from jaxrobust.app.measurements.ood import OOD
from jaxrobust.app.measurements.relative import RELATIVE_ERRORS
from jaxrobust.app.measurements.runner import Measurement
from jaxrobust.app.measurements.sharpness import SHARPNESS
from jaxrobust.app.measurements.steps import STEPS
from jaxrobust.app.measurements.surfaces import SURFACES
from jaxrobust.app.measurements.theory import THEORY
from jaxrobust.app.report import sweep_section

MEASUREMENTS: list[Measurement] = [
    ACCURACY, Measurement("sweep", section=sweep_section.section), CORRUPTIONS,
    FLIPS, RELATIVE_ERRORS, ATTACKS, CERTIFICATES, CALIBRATION, OOD, TRAINING, CURVATURE, NETWORKS,
    STEPS, NOISE_COUNTS, SURFACES, BLOCKS, FEATURES, THEORY, SHARPNESS]
"""In the order of their sections in the report."""


def named_results(folder: pathlib.Path) -> list[str]:
    """Lists the measurements of a run that have a name, by their files' names without suffix."""
    return sorted(named for measurement in MEASUREMENTS if measurement.measure
                  for named in run_folder.named_facts(folder, measurement.kind))
