"""The commands, end to end on a small recipe: results, resuming, and bad input."""

import dataclasses
import html
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time

import chex
import jax
import numpy as np
import pytest
from command_line import call, metrics_of, one_line
from studies import RECIPE, TINY

from jaxrobust.app import config, files, interruption, prepare, provenance, run_folder, trainer
from jaxrobust.app.config import InputError
from jaxrobust.app.execution import Feed
from jaxrobust.app.recipe import METHOD_LABELS, RECIPES, get_recipe, method_rows
from jaxrobust.app.study import run as running
from jaxrobust.app.study.plan import claim_study, place_of, plan_study
from jaxrobust.app.study.run import run_study

# TensorBoard's writer and Orbax warn about themselves.
pytestmark = pytest.mark.filterwarnings("default")

EVERY_METHOD = dataclasses.replace(
    RECIPE, rows=method_rows(TINY), labels=RECIPES["digits"].labels)


def best_state(folder, digits):
    run = trainer.load_run(folder, run_folder.read_config(folder), digits)
    return run.epoch, run.state.replace(key=jax.random.key_data(run.state.key))


@pytest.fixture(name="finished", scope="module")
def _finished(shared_study):
    return shared_study / "robust-seed0"


def test_a_line_cut_off_by_a_kill_does_not_count(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n{"epo')
    assert files.read_lines(tmp_path / "metrics.jsonl") == [{"epoch": 1}]
    assert files.read_lines(tmp_path / "nothing.jsonl") == []


def test_the_same_run_twice_gives_the_same_bits(finished, digits, tmp_path):
    trainer.train(TINY, digits, tmp_path / "again")
    assert metrics_of(tmp_path / "again") == metrics_of(finished)
    chex.assert_trees_all_equal(
        best_state(tmp_path / "again", digits), best_state(finished, digits))


def test_the_best_epoch_is_kept_the_later_of_equals():
    history = [{"epoch": epoch, "selection_accuracy": accuracy}
               for epoch, accuracy in ((1, 0.5), (2, 0.9), (3, 0.9), (4, 0.7))]
    assert trainer.best_epoch(history) == 3
    assert [trainer.is_best(history[:n]) for n in (1, 2, 3, 4)] == [True, True, True, False]
    assert trainer.best_epoch([{"epoch": 1}, {"epoch": 2}]) == 2


@pytest.fixture(name="copied")
def _copied(finished, tmp_path):
    """A copy of a run that has the weights alone in place of its checkpoints."""
    folder = shutil.copytree(finished, tmp_path / "copied")
    assert call("export", str(folder), "--out", str(folder / "network.npz")) == 0
    shutil.rmtree(folder / "checkpoints")
    return folder


def test_a_network_is_the_same_without_checkpoints(copied, finished, digits):
    (epoch, state), (best_epoch, best) = (
        best_state(folder, digits) for folder in (copied, finished))
    assert epoch == best_epoch
    for part in ("params", "batch_stats", "centroids"):
        chex.assert_trees_all_equal(getattr(state, part), getattr(best, part))
    there = run_folder.read_facts(copied, "evaluation")
    assert call("evaluate", str(copied), "--name", "again", "--num-draws", "2",
                "--test-size", str(there["num_images"])) == 0
    again = run_folder.read_facts(copied, "evaluation", "again")
    assert again["levels"][0] == there["levels"][0]  # On the clean images.


def another_shape(arrays):
    return arrays | {"params/head/kernel": arrays["params/head/kernel"][:1]}


def another_dtype(arrays):
    return arrays | {"params/head/kernel": arrays["params/head/kernel"].astype(np.float64)}


def one_missing(arrays):
    return {name: array for name, array in arrays.items() if name != "params/head/kernel"}


def one_more(arrays):
    return arrays | {"params/head/kernel2": np.zeros(3, np.float32)}


def one_not_finite(arrays):
    return arrays | {"params/head/kernel": np.full_like(arrays["params/head/kernel"], np.nan)}


@pytest.mark.parametrize(
    "change", [another_shape, another_dtype, one_missing, one_more, one_not_finite])
def test_the_weights_of_another_network_are_refused(change, copied, capsys):
    path = copied / "network.npz"
    files.write_arrays(path, change(dict(files.read_arrays(path))))
    capsys.readouterr()
    assert call("evaluate", str(copied), "--name", "again") == 2
    assert re.search(r"network\.npz.*params/head/kernel|weights of .*kernel", one_line(capsys))


@pytest.mark.parametrize("content", [b"", b"PK no archive"])
def test_weights_that_cannot_be_read_are_refused(content, copied, capsys):
    (copied / "network.npz").write_bytes(content)
    capsys.readouterr()
    assert call("evaluate", str(copied), "--name", "again") == 2
    assert "network.npz" in one_line(capsys)


def test_a_run_records_where_it_came_from(finished):
    provenance = files.read_json(finished / "provenance.json")
    assert provenance["versions"]["jax"] == jax.__version__
    assert provenance["seconds"] > 0 and provenance["commit"] and provenance["hardware"]
    assert list((finished / "tensorboard").glob("events.*"))


def test_configurations_survive_json():
    for recipe in RECIPES.values():
        for row in recipe.rows.values():
            assert config.from_dict(config.RunConfig, json.loads(config.to_json(row))) == row


@pytest.fixture(name="study", scope="module")
def _study(tmp_path_factory, shared_study):
    return shutil.copytree(shared_study, tmp_path_factory.mktemp("study") / "study")


@pytest.mark.slow
def test_every_method_is_trained_tested_and_measured(digits, tmp_path):
    assert run_study(plan_study(EVERY_METHOD, tmp_path), digits, tensorboard=False) == []
    for row in METHOD_LABELS:
        folder = place_of(tmp_path, row, 0)
        evaluation = files.read_json(folder / "evaluation.json")
        assert evaluation["num_images"] == 50
        assert [len(level["accuracies"]) for level in evaluation["levels"]] == [1, 3]
        curvature = np.load(folder / "curvature.npz")
        assert curvature["frobenius_squared"].shape == (20,)
        assert np.all(curvature["frobenius_squared"] >= 0)
        assert np.load(folder / "features.npz")["noisy"].shape == (40, 4)


@pytest.mark.usefixtures("pictures_left_out")
def test_the_report_is_written(study):
    assert call("report", study) == 0
    page = (study / "report.html").read_text()
    for label in RECIPE.labels.values():
        assert html.escape(label, quote=True) in page


def test_what_is_done_is_not_done_again(study, digits):
    paths = sorted(path for path in study.rglob("*") if path.is_file())
    before = [path.stat().st_mtime_ns for path in paths]
    run_study(plan_study(RECIPE, study), digits, tensorboard=False)
    assert [path.stat().st_mtime_ns for path in paths] == before


def test_seeds_are_added_to_a_study_and_another_study_is_refused(tmp_path, monkeypatch):
    for seeds, command in (([0], "a"), ([2, 0], "b")):
        monkeypatch.setattr(provenance, "command_line", lambda command=command: command)
        claim_study(plan_study(RECIPE, tmp_path, seeds=seeds), ())
    there = files.read_json(tmp_path / "study.json")
    assert (there["seeds"], there["command"]) == ([0, 2], "a")
    with pytest.raises(InputError, match="holds another study"):
        claim_study(plan_study(get_recipe("digits"), tmp_path), ())


def test_of_two_that_add_seeds_at_once_none_is_lost(tmp_path, monkeypatch):
    def claim(seed):
        claim_study(plan_study(RECIPE, tmp_path, seeds=[seed]), ())

    claim(0)
    write, another = files.write_json, threading.Thread(target=claim, args=(2,))

    def late(*arguments):
        monkeypatch.setattr(files, "write_json", write)
        another.start()
        another.join(0.5)
        write(*arguments)

    monkeypatch.setattr(files, "write_json", late)
    claim(1)
    another.join(20)
    assert files.read_json(tmp_path / "study.json")["seeds"] == [0, 1, 2]


@pytest.mark.slow
def test_a_diverged_run_is_reported_and_the_others_go_on(digits, tmp_path):
    wild = dataclasses.replace(TINY, epochs=2, optimizer=config.OptimizerConfig(
        learning_rate=1e8, schedule="cosine"))
    recipe = dataclasses.replace(RECIPE, rows={"wild": wild, "robust": TINY},
                                 labels={"wild": "Wild", "robust": "Robust"})
    failures = run_study(plan_study(recipe, tmp_path), digits, tensorboard=False)
    assert len(failures) == 1 and "has diverged" in failures[0]
    assert (tmp_path / "robust-seed0" / "evaluation.json").is_file()


def test_a_run_whose_last_update_spoils_it_has_diverged(digits, tmp_path, monkeypatch):
    # The loss of an epoch is finite where only its last update makes a weight infinite.
    as_it_is = trainer._as_evaluated
    monkeypatch.setattr(trainer, "_as_evaluated", lambda *arguments, **options: jax.tree.map(
        lambda leaf: leaf + np.inf if leaf.dtype == np.float32 else leaf,
        as_it_is(*arguments, **options)))
    message, = run_study(plan_study(RECIPE, tmp_path, ["robust"]), digits, tensorboard=False)
    assert "Expected finite logits, got NaN or infinite ones for" in message
    assert "the run has diverged" in message
    folder = tmp_path / "robust-seed0"
    assert files.read_json(folder / "diverged.json") == {"epoch": 1, "message": message}
    assert not (folder / "evaluation.json").exists() and not (folder / "done.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cannot bind processes here")
def test_a_process_that_is_killed_fails_its_run_alone(digits, tmp_path, monkeypatch):
    class Killing(running.ProcessPoolExecutor):
        def submit(self, execute, plan, *arguments):
            future = super().submit(execute, plan, *arguments)
            if plan.rows == ("robust",):
                for process in self._processes.values():
                    os.kill(process.pid, signal.SIGKILL)
            return future

    monkeypatch.setattr(running, "ProcessPoolExecutor", Killing)
    plan = plan_study(RECIPE, tmp_path, ["robust", "both"])
    assert running.run_study_in_parallel(
        plan, digits, jobs=1, data_dir=tmp_path, tensorboard=False, feed=Feed()) == [
            "robust, seed 0: its process was killed"]
    assert (tmp_path / "both-seed0" / "evaluation.json").is_file()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cannot bind processes here")
def test_a_signal_stops_the_processes_of_a_study_which_goes_on_later(digits, tmp_path):
    plan = plan_study(dataclasses.replace(RECIPE, rows={
        row: dataclasses.replace(one, epochs=300) for row, one in RECIPE.rows.items()}), tmp_path)
    log = tmp_path / "both-seed0" / "metrics.jsonl"
    steps_per_epoch = -(-TINY.train_size // TINY.batch_size)

    def stop():
        while len(files.read_lines(log)) < 3:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(interruption.Interrupted) as stopped, interruption.handled():
        threading.Thread(target=stop, daemon=True).start()
        running.run_study_in_parallel(
            plan, digits, jobs=1, data_dir=tmp_path, tensorboard=False, feed=Feed())
    assert stopped.value.status == 143 and not multiprocessing.active_children()
    steps = sorted(int(path.name) for path in (log.parent / "checkpoints").iterdir())
    assert 9 <= steps[-1] < 300 * steps_per_epoch and steps[-1] - steps[-2] <= steps_per_epoch
    assert not (tmp_path / "robust-seed0").exists()


@pytest.mark.parametrize("arguments, expected", [
    (("reproduce", "cifr10"), "error: Unknown table, figure, question or recipe 'cifr10'. "
     "Did you mean 'cifar10'?"),
    (("train", "digits", "--method", "stabilty"), "Did you mean 'stability'?"),
    (("train", "digits", "--data", "digit"), "Did you mean 'digits'?"),
    (("train", "digits", "--robust.delta-v", "-1"), "error: Expected delta_v=-1.0 in [0, inf)."),
    (("train", "digits", "--robust.momentum", "1"), "error: Expected momentum=1.0 in [0, 1)."),
    (("train", "digits", "--batch-size", "1201"), "error: Expected batch_size=1201 <= 1200"),
    (("train", "digits", "--validation-size", "0"), "error: Expected validation_size=0 to be > 0"),
    (("train", "digits", "--epochs", "0"), "error: Expected epochs=0 in [1, 1048576)."),
    (("evaluate", "nowhere"), "error: Expected a run in nowhere"),
    (("report", "nowhere"), "error: "),
    (("reproduce", "digits", "--rows", "bath"), "Did you mean 'both'?"),
])
def test_bad_input_is_one_line_and_status_2(
        arguments, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(*arguments) == 2
    assert expected in one_line(capsys)
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_a_data_set_that_cannot_be_downloaded_is_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(prepare.SOURCES, "svhn_cropped", "http://127.0.0.1:9/")
    assert call("prepare", "svhn_cropped", "--data-dir", tmp_path) == 2
    assert f"is not prepared in {tmp_path} and cannot be downloaded" in one_line(capsys)


def test_a_folder_of_another_run_is_left_alone(finished, digits, capsys):
    before = metrics_of(finished)
    with pytest.raises(InputError, match="already holds a run. Add --resume"):
        trainer.train(TINY, digits, finished)
    other = dataclasses.replace(TINY, seed=1)
    with pytest.raises(InputError, match="holds another configuration"):
        trainer.train(other, digits, finished, resume=True)
    assert metrics_of(finished) == before


def test_a_folder_with_something_else_is_left_alone(digits, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="is not empty and holds no config.json"):
        trainer.train(TINY, digits, tmp_path)


def test_results_with_other_settings_are_not_overwritten(study, digits):
    other = dataclasses.replace(
        RECIPE, evaluation=dataclasses.replace(RECIPE.evaluation, num_draws=4))
    with pytest.raises(InputError, match="was made with num_draws=3, not 4"):
        run_study(plan_study(other, study, ["both"]), digits, tensorboard=False)


@pytest.mark.slow
@pytest.mark.usefixtures("pictures_left_out")
def test_measurements_with_other_settings_lie_beside_each_other_under_a_name(study, digits, capsys):
    folder = study / "both-seed0"
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    other = ("evaluate", folder, "--noise-levels", "0", "8", "--num-draws", "2",
             "--tsne-images", "9")
    assert call(*other) == 2
    assert "Keep both with `evaluate --name NAME`" in one_line(capsys)
    assert call(*other, "--name", "8") == 0
    levels = files.read_json(folder / "evaluation-8.json")["levels"]
    assert [level["std_255"] for level in levels] == [0, 8]
    assert np.load(folder / "features-8.npz")["clean"].shape == (9, 4)
    assert call(*other, "--name", "8") == 0  # As any other: there already.
    assert call(*other, "--name", "8", "--num-draws", "3") == 2
    assert "evaluation-8.json was made with num_draws=2, not 3" in one_line(capsys)
    other = ("curvature", folder, "--num-images", "3", "--num-probes", "2",
             "--smoothing-draws", "3", "--test-size", "50")
    assert call(*other) == 2
    assert "num_images=20, not 3. Keep both with `curvature --name NAME`" in one_line(capsys)
    assert call(*other, "--name", "three") == 0
    assert np.load(folder / "curvature-three.npz")["loss"].shape == (3,)
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert call("report", study) == 0
    assert "curvature-three, evaluation-8" in (study / "report.md").read_text().replace("\\", "")


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "-flag"])
def test_a_name_is_one_for_a_file(name, finished, capsys):
    assert call("evaluate", finished, f"--name={name}") == 2
    assert f"Expected name={name!r} of letters" in one_line(capsys)


@pytest.mark.slow
def test_choosing_the_epoch_on_the_test_set_says_so(capsys, digits, tmp_path):
    assert call("train", "digits", "--select", "test", "--epochs", "1", "--train-size", "100",
                "--width", "2", "--num-features", "4", "--optimizer.warmup-epochs", "0",
                "--out", tmp_path / "run") == 0
    assert "the epoch is chosen on the test images" in capsys.readouterr().out
    assert run_folder.read_config(tmp_path / "run").select == "test"
