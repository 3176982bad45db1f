"""Sharpness in the parameters: eigenvalues against a whole Hessian, the rate's limit, the command.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import call, one_line
from jax.flatten_util import ravel_pytree

from jaxrobust import data, training
from jaxrobust.app import files
from jaxrobust.app.config import OptimizerConfig, RunConfig, to_json, training_perturbation
from jaxrobust.app.datasets import open_dataset
from jaxrobust.app.measurements import sharpness
from jaxrobust.app.measurements.runner import measure
from jaxrobust.app.program import initial_state, model_of
from jaxrobust.app.report import report
from jaxrobust.app.trainer import open_run
from jaxrobust.losses import RobustLossConfig
from jaxrobust.methods import make_method
from jaxrobust.parallel import make_layout
from jaxrobust.statistics import largest_stable_rate

pytestmark = pytest.mark.filterwarnings("default")

CONFIG = RunConfig(
    dataset="digits", method="robust", model="small_cnn", feature_layer="dense", width=2,
    num_features=4, train_size=60, validation_size=20,
    batch_size=20, epochs=1, noise_std=0.1, robust=RobustLossConfig(alpha=0.5, lam=2.0),
    optimizer=OptimizerConfig(learning_rate=0.01, momentum=0.9, clip_norm=1.0))
TERMS = {"softmax", "compact", "margin", "norm", "align", "loss"}


@pytest.fixture(name="run", scope="module")
def _run(tmp_path_factory):
    """Trained by the command, and measured."""
    study = tmp_path_factory.mktemp("sharp")
    folder = study / "robust-seed0"
    changes = ("--width", 2, "--num-features", 4, "--train-size", 60, "--validation-size", 20,
               "--batch-size", 20, "--epochs", 1, "--optimizer.warmup-epochs", 0)
    assert call("train", "digits", *changes, "--out", folder, "--no-tensorboard") == 0
    assert call("sharpness", folder) == 0
    return folder


@pytest.mark.slow
def test_each_term_has_the_eigenvalue_of_its_whole_hessian(tmp_path):
    dataset = open_dataset(CONFIG, tmp_path)
    found = measure(sharpness.SHARPNESS, open_run(tmp_path, CONFIG, dataset),
                    sharpness.SharpnessSettings(12), tmp_path, "digits")["eigenvalues"]
    assert set(found) == {"initial"} and set(found["initial"]) == TERMS
    state = initial_state(CONFIG, dataset, make_layout("jit"))
    split = sharpness.make_splits(dataset, CONFIG).train
    batch = data.make_batch(
        jax.random.key(0), jnp.asarray(split.images[:12]), jnp.asarray(split.labels[:12]),
        augment=lambda key, image: image, perturb=training_perturbation(CONFIG))
    flat, unravel = ravel_pytree(state.params)
    objective = training.make_objective(
        model_of(CONFIG, dataset), make_method("robust", robust=CONFIG.robust))

    def values(flat):
        loss, evaluated = objective(unravel(flat), state, batch)
        return {**{name: evaluated.metrics[name] for name in TERMS - {"loss"}}, "loss": loss}

    assert flat.size < 600
    for name, hessian in jax.jit(jax.hessian(values))(flat).items():
        expected = np.linalg.eigvalsh(hessian).max()
        assert found["initial"][name] == pytest.approx(expected, rel=0.02, abs=1e-3), name
    config = CONFIG.robust
    # The whole is the sum of the terms with their weights.
    now = {name: float(value) for name, value in values(flat).items()}
    assert now["loss"] == pytest.approx(
        now["softmax"] + config.alpha * now["compact"] + config.beta * now["margin"]
        + config.gamma_reg * now["norm"] + config.lam * now["align"], rel=1e-5)


@pytest.mark.slow
def test_a_finished_run_is_measured_before_and_after(run, capsys):
    result = files.read_json(run / "sharpness.json")
    assert set(result["eigenvalues"]) == {"initial", "best"}
    assert all(set(values) == TERMS for values in result["eigenvalues"].values())
    assert result["eigenvalues"]["initial"] != result["eigenvalues"]["best"]
    assert result["settings"]["num_images"] == 20 and result["provenance"]["commit"]
    before = (run / "sharpness.json").stat().st_mtime_ns
    assert call("sharpness", run) == 0
    assert (run / "sharpness.json").stat().st_mtime_ns == before
    said = capsys.readouterr().out
    assert "before training: compact: " in said and "trained: loss: " in said
    assert call("sharpness", run, "--num-images", 30) == 2
    assert "was made with num_images=20, not 30" in one_line(capsys)


@pytest.mark.slow
def test_the_report_shows_what_was_measured(run, tmp_path):
    assert call("evaluate", run, "--noise-levels", 0, 16) == 0
    page = report.write_report_of_runs([run], tmp_path / "report").read_text()
    assert "Largest eigenvalue of the Hessian in the parameters." in page
    found = files.read_json(run / "sharpness.json")["eigenvalues"]["best"]["loss"]
    limit = largest_stable_rate(found, 0.9)
    assert f"<td>{sharpness.significant(limit)}</td>" in page.replace(' class="number"', "")


def test_a_run_that_diverged_is_measured_before_training(tmp_path, capsys):
    folder = tmp_path / "diverged"
    folder.mkdir()
    (folder / "config.json").write_text(to_json(CONFIG))
    (folder / "diverged.json").write_text(json.dumps({"epoch": 1}))
    assert call("sharpness", folder) == 0
    assert "trained" not in capsys.readouterr().out
    assert set(files.read_json(folder / "sharpness.json")["eigenvalues"]) == {"initial"}


@pytest.mark.parametrize("change, expected", [
    ({"optimizer": OptimizerConfig(name="adam")}, "Expected optimizer.name=sgd of"),
    ({"init_from": "nowhere.safetensors"}, "nowhere.safetensors"),
])
def test_what_the_first_state_and_the_limit_depend_on_is_not_passed_over(
        change, expected, tmp_path, capsys):
    (tmp_path / "config.json").write_text(to_json(dataclasses.replace(CONFIG, **change)))
    assert call("sharpness", tmp_path) == 2
    assert expected in one_line(capsys)
    assert not (tmp_path / "sharpness.json").exists()


@pytest.mark.slow
def test_bad_input_is_one_line(tmp_path, run, capsys):
    assert call("sharpness") == 2
    assert "Expected at least one folder of a run" in one_line(capsys)
    assert call("sharpness", tmp_path) == 2
    assert "found no config.json there" in one_line(capsys)
    (run / "sharpness.json").rename(tmp_path / "kept")
    assert call("sharpness", run, "--num-images", 1000) == 2
    assert "num_images=1000" in one_line(capsys)
    (tmp_path / "kept").rename(run / "sharpness.json")
