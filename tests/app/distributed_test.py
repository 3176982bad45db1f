"""Several real processes on the loopback interface give the result of one."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest
from command_line import call, metrics_of, one_line
from processes import KILLED

from jaxrobust import data
from jaxrobust.app import files, run_folder, trainer

pytestmark = [pytest.mark.filterwarnings("default"),  # Orbax warns about itself.
              pytest.mark.usefixtures("steps_as_users_have_them")]

TESTS = pathlib.Path(__file__).parents[1]
TRAIN = ("train", "digits", "--train-size", "150", "--epochs", "3", "--width", "2",
         "--num-features", "4", "--batch-size", "16", "--checkpoint-every", "1",
         "--optimizer.warmup-epochs", "0", "--batch-norm-statistics", "recomputed",
         "--no-tensorboard", "--resume")
EVALUATE = ("evaluate", "--noise-levels", "0", "32", "--num-draws", "2", "--test-size", "50",
            "--tsne-images", "20")
CURVATURE = ("curvature", "--num-images", "10", "--num-probes", "2", "--smoothing-draws", "3",
             "--batch-size", "8")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def job(processes, devices, *commands, last_epoch=0, environment=lambda process: {}):
    """Runs commands in so many processes at once; what each said, and its exit status."""
    port = free_port()

    def start(process):
        words = []
        for command in commands:
            joining = () if environment(process) else (
                "--coordinator", f"127.0.0.1:{port}", "--num-processes", processes,
                "--process-id", process)
            words += [*(["+"] if words else []), *command, *joining]
        return subprocess.Popen(
            [sys.executable, str(TESTS / "processes.py"), str(devices), str(last_epoch),
             *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "PYTHONPATH": str(TESTS.parent), **environment(process)})

    started = [start(process) for process in range(processes)]
    try:
        said = [process.communicate(timeout=600)[0] for process in started]
    except subprocess.TimeoutExpired:  # One that failed leaves the others waiting for it.
        for process in started:
            process.kill()
        said = [process.communicate()[0] for process in started]
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


def assert_all_end(job, status):
    for returned, said in job:
        assert returned == status, said


@pytest.fixture(name="alone", scope="module")
def _alone(tmp_path_factory):
    """A run trained, tested and measured by one process on one device."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert call(*TRAIN, "--out", folder) == 0
    assert call(*EVALUATE, folder) == 0
    assert call(*CURVATURE, folder) == 0
    return folder


def assert_the_same_run(folder, alone):
    chex.assert_trees_all_close(metrics_of(folder), metrics_of(alone), rtol=2e-5, atol=1e-6)
    digits = data.load_dataset("digits")
    states = [trainer.load_run(place, run_folder.read_config(place), digits).state
              for place in (folder, alone)]
    chex.assert_trees_all_close(*(state.replace(key=jax.random.key_data(state.key))
                                  for state in states), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_job_of_two_killed_and_resumed_by_four_gives_the_result_of_one(alone, tmp_path):
    folder = tmp_path / "run"
    # Two processes of two devices each, reading their own shares from disk.
    assert_all_end(job(2, 2, (*TRAIN, "--out", folder, "--input", "stream"), last_epoch=2), KILLED)
    assert len(metrics_of(folder)) == 2
    assert_all_end(job(4, 1, (*TRAIN, "--out", folder, "--input", "resident"),
                       (*EVALUATE, folder), (*CURVATURE, folder)), 0)
    assert_the_same_run(folder, alone)
    provenance = files.read_json(folder / "provenance.json")
    assert (provenance["processes"], provenance["devices"]) == (4, 4)
    levels = [files.read_json(place / "evaluation.json")["levels"] for place in (folder, alone)]
    assert levels[0] == levels[1]
    ours, theirs = (np.load(place / "curvature.npz") for place in (folder, alone))
    # The last eigenvalue is 0 but for rounding, which is that of the largest.
    largest = np.abs(theirs["gauss_newton_eigenvalue_1"]).max()
    for name in ours.files:
        scale = largest if "eigenvalue" in name else np.abs(theirs[name]).max()
        np.testing.assert_allclose(
            ours[name], theirs[name], rtol=5e-3, atol=1e-4 * scale, err_msg=name)


@pytest.mark.slow
def test_a_run_of_several_processes_goes_on_with_one(alone, tmp_path):
    folder = tmp_path / "run"
    assert_all_end(job(2, 1, (*TRAIN, "--out", folder), last_epoch=1), KILLED)
    assert call(*TRAIN, "--out", folder) == 0
    assert_the_same_run(folder, alone)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_the_job_within_two_updates(alone, tmp_path):
    folder = tmp_path / "run"
    # 150 images in batches of 16 are 10 updates an epoch.
    stopped = job(2, 1, (*TRAIN, "--out", folder), last_epoch=-1)
    assert_all_end(stopped, 143)
    for _, said in stopped:
        assert "SIGTERM: stopped. To go on: python -m experiments train digits" in said
    steps = sorted(int(path.name) for path in (folder / "checkpoints").iterdir())
    assert steps[0] == 10 and 11 <= steps[1] <= 12
    assert call(*TRAIN, "--out", folder) == 0
    assert_the_same_run(folder, alone)


@pytest.mark.slow
def test_slurm_is_recognised_by_its_environment(tmp_path):
    def environment(process):
        return {"SLURM_JOB_ID": str(free_port()), "SLURM_STEP_NODELIST": "localhost",
                "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(process),
                "SLURM_LOCALID": str(process)}

    job_id = environment(0)["SLURM_JOB_ID"]
    ended = job(2, 1, ("train", "digits", "--batch-size", "15"),
                environment=lambda process: environment(process) | {"SLURM_JOB_ID": job_id})
    # Both know of two devices, and that these cannot share such a batch.
    for returned, said in ended:
        assert returned == 2, said
        assert "error: Expected batch_size=15 to be a multiple of the 2 devices" in said


@pytest.mark.parametrize("arguments, expected", [
    (("--coordinator", "127.0.0.1:1"), "Expected num_processes with a coordinator"),
    (("--num-processes", "2"), "Expected num_processes only with a coordinator"),
    (("--coordinator", "nowhere", "--num-processes", "2", "--process-id", "0"),
     "Expected coordinator='nowhere' as HOST:PORT."),
    (("--coordinator", "127.0.0.1:1", "--num-processes", "2", "--process-id", "2"),
     "Expected process_id=2 in [0, 2)."),
    (("--coordinator", "auto"), "Cannot join the job with coordinator='auto'"),
    (("--parallel", "mosh"), "Unknown parallel 'mosh'. Did you mean 'mesh'?"),
    (("--parallel", "mesh", "--batch-size", "12"), "to be a multiple of the 8 devices"),
    (("--batch-norm", "per_device"), "Expected parallel='pmap' with batch_norm='per_device'"),
    (("--input", "steam"), "Unknown input 'steam'. Did you mean 'stream'?"),
    (("--input", "stream", "--steps-per-call", "4"), "Expected steps_per_call=1 with input"),
    (("--input", "stream", "--seeds", "0,1"), "Expected input='resident' for 2 runs together"),
    (("--dtype", "float16"), "Unknown dtype 'float16'. Did you mean 'bfloat16'?"),
])
def test_what_cannot_be_is_one_line_and_nothing_is_written(
        arguments, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("train", "digits", "--train-size", "150", *arguments) == 2
    assert expected in one_line(capsys)
    assert not list(tmp_path.rglob("metrics.jsonl"))


@pytest.mark.slow
def test_all_seeds_of_a_command_are_one_program_with_the_result_of_each_alone(tmp_path, alone):
    assert call(*TRAIN, "--seeds", "0,1", "--out", tmp_path) == 0
    assert_the_same_run(tmp_path / "digits-seed0", alone)
    assert files.read_json(tmp_path / "digits-seed1" / "provenance.json")["runs_together"] == 2
    rows = json.loads((tmp_path / "digits-seed1" / "config.json").read_text())
    assert rows["seed"] == 1
