"""Logits that are not finite are no class, wherever predictions are made of them."""

import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import call, one_line

import jaxrobust
from jaxrobust import evaluation, metrics
from jaxrobust.app import doubt, files, run_folder
from jaxrobust.app.commands import SUITES
from jaxrobust.app.measurements.certificates import _classify
from jaxrobust.images import predicted_classes
from jaxrobust.methods.common import accuracy

pytestmark = pytest.mark.filterwarnings("default")

USERS = '''
import jax.numpy as jnp
import numpy as np

WEIGHTS = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32)


def sometimes(images):
    """Logits of which some are NaN for bright images."""
    pixels = images.reshape(len(images), -1)
    logits = jnp.sin(pixels @ WEIGHTS)
    return logits.at[:, 3].set(jnp.where(pixels.mean(1) > 0.3, jnp.nan, logits[:, 3]))
'''
WRONG = (np.nan, np.inf, -np.inf)
OPTIONS = {
    "noise": ("--noise-levels", 0, "--num-draws", 1),
    "corruptions": ("--corruptions.names", "contrast", "--corruptions.severities", 1),
    "attacks": ("--attacks.num-steps", 2, "--attacks.num-targets", 1, "--attacks.num-queries", 3,
                "--attacks.l2", 0),
    "certify": ("--certify.n0", 5, "--certify.n", 40, "--certify.sigma", 0.01),
    "calibration": (), "ood": (),
    "curvature": ("--curvature.num-probes", 3, "--curvature.smoothing-draws", 3),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_row_with_a_number_that_is_not_finite_has_no_class(wrong):
    # Each would be class 0 by argmax: the first that is NaN, or the largest of the others.
    logits = np.array([[1.0, 0, -1], [wrong, 0, 0], [1, wrong, 0], [1, 0, wrong]], np.float32)
    labels = np.zeros(4, np.int32)
    assert predicted_classes(logits).tolist() == [0, -1, -1, -1]
    assert accuracy(logits, labels, None) == 0.25
    assert _classify(lambda images: logits, None).tolist() == [0, -1, -1, -1]
    features = np.ones((4, 2), np.float32)
    statistics = metrics.class_statistics(
        np.random.default_rng(0).normal(size=(9, 2)), np.arange(9) % 3, 3)
    for score in doubt.SCORES:
        found = np.asarray(doubt.doubt_of(score, jnp.asarray(logits), features, statistics))
        assert np.isfinite(found[0]) and (found[1:] == np.inf).all(), score
    with pytest.raises(jaxrobust.InputError, match="NaN or infinite ones for 3 of 4 images"):
        next(evaluation.evaluate(lambda images: jnp.asarray(logits),
                                 np.zeros((4, 2, 2, 1), np.uint8), labels, key=jax.random.key(0)))


@pytest.mark.parametrize("suite", [
    pytest.param(suite, marks=[pytest.mark.slow] if suite in ("attacks", "curvature") else [])
    for suite in SUITES if suite not in ("relative", "flips")])
def test_every_suite_refuses_or_abstains(suite, tmp_path, monkeypatch, capsys):
    """But "relative", which compares counts of the others, and "flips", of files in colour."""
    (tmp_path / "nan_users.py").write_text(USERS)
    monkeypatch.delitem(sys.modules, "nan_users", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    status = call("evaluate", "nan_users:sometimes", "--data", "digits", "--suite", suite,
                  "--limit", 20, *OPTIONS[suite])
    folder = tmp_path / "runs" / "nan_users.sometimes"
    if suite == "certify":
        facts, found = files.read_json(folder / "certificates.json"), run_folder.read_arrays(
            folder, "certificates")
        assert status == 0 and facts["abstained"] >= (found["label"] == -1).sum() > 0
        assert (found["radius"][found["label"] == -1] == 0).all()
        return
    assert status == 2
    said = one_line(capsys)
    assert re.search(r"finite logits.* got (NaN or infinite ones for )?\d+ ", said), said


def test_the_class_of_logits_is_taken_in_one_place():
    """Elsewhere ``argmax`` of logits finds the largest, not a class: there NaN leads to NaN."""
    package = pathlib.Path(jaxrobust.__file__).parent
    found = {}
    for path in (*package.rglob("*.py"), *(package.parent / "experiments").rglob("*.py")):
        for line in path.read_text().splitlines():
            if re.search(r"argmax\(.*logits|logits\S*\.argmax\(", line):
                found.setdefault(path.relative_to(package.parent).as_posix(), []).append(line)
    assert {name: len(lines) for name, lines in found.items()} == {
        "jaxrobust/images.py": 1,  # predicted_classes
        "jaxrobust/losses.py": 1, "jaxrobust/metrics.py": 1, "jaxrobust/curvature.py": 1}, found
