"""Runs of the field's methods, and of what goes around any method."""

import json

import chex
import numpy as np
import optax
import pytest
from command_line import call, one_line

from jaxrobust.app import config as configs
from jaxrobust.app import run_folder
from jaxrobust.app.config import RunConfig
from jaxrobust.app.datasets import open_dataset
from jaxrobust.app.program import method_of
from jaxrobust.app.trainer import load_run
from jaxrobust.methods import METHODS, make_method
from jaxrobust.parallel import make_layout

pytestmark = pytest.mark.filterwarnings("default")

SMALL = ("--width", 2, "--num-features", 4, "--train-size", 60, "--validation-size", 20,
         "--batch-size", 20, "--optimizer.warmup-epochs", 0, "--no-tensorboard")


@pytest.mark.slow
def test_a_run_keeps_the_average_of_its_parameters(tmp_path):
    folder = tmp_path / "run"
    assert call("train", "digits/normal", *SMALL, "--epochs", 2, "--method", "trades",
                "--options.trades.num-steps", 1, "--optimizer.ema-decay", 0.9,
                "--batch-norm-statistics", "recomputed",
                "--optimizer.sam-radius", 0.05, "--label-smoothing", 0.1, "--out", folder) == 0
    config = run_folder.read_config(folder)
    assert (config.options.trades.num_steps, config.label_smoothing) == (1, 0.1)
    run = load_run(folder, config, open_dataset(config, folder), make_layout("jit"))
    average = run.state.opt_state
    assert int(average.count) == 3 * run.epoch
    chex.assert_trees_all_equal(run.state.params, average.average)
    assert optax.tree.norm(run.state.params) > 0


def test_running_statistics_do_not_go_with_averaged_parameters(tmp_path, capsys):
    assert call("train", "digits/normal", *SMALL, "--optimizer.ema-decay", 0.9,
                "--batch-norm-statistics", "running", "--out", tmp_path / "run") == 2
    assert "Expected batch_norm_statistics='recomputed' with optimizer.ema_decay=0.9" in one_line(
        capsys)


@pytest.mark.parametrize(("arguments", "expected"), [
    (("--options.trades.epsilon", -1), "Expected epsilon=-1.0 in [0, inf)."),
    (("--options.pgd.norm", "l3"), "Unknown norm 'l3'."),
    (("--label-smoothing", 1), "Expected label_smoothing=1.0 in [0, 1)."),
    (("--optimizer.sam-radius", -1), "Expected sam_radius=-1.0 in [0, inf)."),
    (("--optimizer.ema-decay", 1), "Expected ema_decay=1.0 in [0, 1)."),
])
def test_settings_out_of_range_are_one_line(arguments, expected, tmp_path, capsys):
    assert call("train", "digits/normal", *SMALL, *arguments, "--out", tmp_path / "run") == 2
    assert expected in one_line(capsys)


def test_a_configuration_from_before_these_settings_is_read():
    config = RunConfig(select="last", method="both")
    written = json.loads(configs.to_json(config))
    for name in ("options", "label_smoothing"):
        del written[name]
    for name in ("sam_radius", "ema_decay"):
        del written["optimizer"][name]
    assert configs.from_dict(RunConfig, written) == config


def test_settings_of_a_method_are_written_and_read_again():
    config = configs.with_settings(RunConfig(select="last"), {
        "options.trades.weight": 2.0, "options.pgd.norm": "l2", "options.cure.step": 1.5})
    assert configs.from_dict(RunConfig, json.loads(configs.to_json(config))) == config


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_that_of_a_run(name):
    method = method_of(RunConfig(select="last", method=name), None)
    assert method.name == name
    assert method.passes == make_method(name, perturb=np.copy).passes
