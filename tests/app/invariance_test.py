"""The figures of the suite are the same for any batch size and any number of devices."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust import data
from jaxrobust.app import classifiers, run_folder
from jaxrobust.app.config import CurvatureConfig, Evaluation
from jaxrobust.app.measurements import MEASUREMENTS, accuracy, attacks, certificates, estimates
from jaxrobust.app.measurements import corruptions as common
from jaxrobust.app.measurements.attacks import AttackSettings
from jaxrobust.app.measurements.calibration import CalibrationSettings
from jaxrobust.app.measurements.certificates import CertificateSettings
from jaxrobust.app.measurements.corruptions import CorruptionSettings
from jaxrobust.app.measurements.flips import FlipSettings
from jaxrobust.app.measurements.ood import OodSettings
from jaxrobust.app.measurements.runner import measure
from jaxrobust.parallel import make_layout

pytestmark = pytest.mark.filterwarnings("default")

SIZE = 14  # Test images; no multiple of the devices.
SETTINGS = {
    "noise": Evaluation(noise_levels=(0, 64), num_draws=2, perturb=("salt_and_pepper(0.1)",)),
    "corruptions": CorruptionSettings(("gaussian_noise", "contrast"), (3,)),
    "flips": FlipSettings("sequences", ("tilt",)),
    "attacks": AttackSettings(num_steps=2, num_targets=1, num_queries=3, l2=(),
                              nearest=("l2",), limit=None),
    "certify": CertificateSettings(sigma=0.3, n0=5, n=40, alpha=0.01, limit=None),
    "calibration": CalibrationSettings(),
    "ood": OodSettings(("uniform_noise",)),
    "curvature": CurvatureConfig(num_images=SIZE, num_probes=2, smoothing=0.1, smoothing_draws=3),
}
MAY_DIFFER = {"num_draws", "mean_draws"}
"""How many draws of a certificate are made before the answer is certain."""


def features_of(weights, images):
    return jax.nn.relu(images.reshape(len(images), -1) @ weights[0])


def logits_of(weights, images):
    return features_of(weights, images) @ weights[1]


def model(layout):
    """A network of one hidden layer on images of two classes, some of which it gets wrong."""
    random = np.random.default_rng(0)
    split = data.Split(random.integers(256, size=(SIZE, 4, 4, 3), dtype=np.uint8),
                       (np.arange(SIZE) % 2).astype(np.int32))
    dataset = data.Dataset("mine", split, split, ("0", "1"), (0.5,) * 3, (0.2,) * 3, False)
    weights = tuple(jnp.asarray(random.normal(size=shape), jnp.float32)
                    for shape in ((48, 6), (6, 2)))
    return classifiers.ForeignModel("mine", dataset, layout, *(
        jax.tree_util.Partial(function, weights) for function in (logits_of, features_of)))


def measured(suite, layout, batch_size, folder, monkeypatch):
    """The facts of a suite, and its columns."""
    monkeypatch.setattr(attacks, "BATCH", batch_size)
    for module in (accuracy, attacks, certificates, common, estimates):
        monkeypatch.setattr(module, "batch_size_of", lambda images: batch_size)
    measurement, = (one for one in MEASUREMENTS if one.suite == suite)
    folder.mkdir()
    facts = measure(measurement, model(layout), SETTINGS[suite], folder, "mine")
    monkeypatch.undo()
    return facts, run_folder.read_arrays(folder, measurement.kind) or {}


def require_same(own, other, where=""):
    """Numbers up to rounding, all else exactly."""
    if isinstance(own, dict):
        assert own.keys() == other.keys(), where
        for name in own.keys() - MAY_DIFFER:
            require_same(own[name], other[name], f"{where}.{name}")
    elif isinstance(own, list):
        assert len(own) == len(other), where
        for place, pair in enumerate(zip(own, other, strict=True)):
            require_same(*pair, f"{where}[{place}]")
    elif isinstance(own, float):
        assert own == pytest.approx(other, rel=2e-3, abs=1e-6), where
    elif isinstance(own, np.ndarray) and np.issubdtype(own.dtype, np.floating):
        np.testing.assert_allclose(own, other, rtol=2e-3, atol=1e-5, err_msg=where)
    elif isinstance(own, np.ndarray):
        np.testing.assert_array_equal(own, other, err_msg=where)
    else:
        assert own == other, where


@pytest.mark.parametrize("suite", [
    pytest.param(suite, marks=[pytest.mark.slow] if suite in ("attacks", "ood") else [])
    for suite in SETTINGS])
def test_a_suite_has_the_same_figures_for_any_batch_size_and_number_of_devices(
        suite, tmp_path, monkeypatch):
    (tmp_path / "sequences").mkdir()
    np.save(tmp_path / "sequences" / "tilt.npy", np.random.default_rng(1).integers(
        256, size=(SIZE, 3, 4, 4, 3), dtype=np.uint8))
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        expected = measured(suite, make_layout("jit"), 250, tmp_path / "whole", patch)
        for layout, batch_size in ((make_layout("jit"), 7), (make_layout("mesh"), 3)):
            found = measured(suite, layout, batch_size, tmp_path / layout.form, patch)
            for own, other in zip(found, expected, strict=True):
                require_same(own, other, suite)
    assert make_layout("mesh").num_devices == 8
