"""A run repeated from its folder, in another process, has the same bits; a difference is named."""

import contextlib
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from command_line import call, one_line

from jaxrobust import checkpoints
from jaxrobust.app import files, provenance, rerun, run_folder

pytestmark = pytest.mark.filterwarnings("default")  # Orbax warns about itself.


@pytest.fixture(name="run")
def _run(shared_study, tmp_path):
    return shutil.copytree(shared_study / "robust-seed0", tmp_path / "run")


def digest(folder):
    """The checksum of the last checkpoint, as it was saved: of the bytes of both states."""
    found, = (json.loads(path.read_text()) for path in (folder / "checkpoints").glob(
        "*/facts/metadata") if int(path.parts[-3]) == max(
            int(name.name) for name in (folder / "checkpoints").glob("[0-9]*")))
    return found["sha256"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_in_two_processes(run, tmp_path):
    root = pathlib.Path(__file__).parents[2]
    for name in ("a", "b"):
        subprocess.run([sys.executable, "-m", "experiments", "rerun", run, "--out",
                        tmp_path / name], cwd=root, check=False, timeout=600)
    logs = [re.sub(rb', "seconds": [^,}]*', b"", (tmp_path / name / "metrics.jsonl").read_bytes())
            for name in ("a", "b")]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == 2
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert files.read_json(tmp_path / "a" / "done.json") == files.read_json(
        tmp_path / "b" / "done.json")
    assert rerun.first_difference(tmp_path / "a", tmp_path / "b") is None


@pytest.mark.slow
@pytest.mark.skipif(len(provenance.cores()) < 2, reason="needs two cores")
def test_a_run_bound_to_one_core_is_repeated_on_one_core(tmp_path):
    root, run = pathlib.Path(__file__).parents[2], tmp_path / "run"
    for words, cores in (
            (("train", "digits/robust", "--train-size", "56", "--epochs", "1", "--width", "2",
              "--num-features", "4", "--batch-size", "16", "--out", run), provenance.cores()[:1]),
            (("rerun", run), provenance.cores())):
        ended = subprocess.run(
            [sys.executable, "-m", "experiments", *words], cwd=root, stdout=subprocess.PIPE,
            preexec_fn=functools.partial(os.sched_setaffinity, 0, cores), text=True, check=True)
    assert f"{run}-rerun equals {run} to the bit." in ended.stdout
    assert run_folder.read_facts(tmp_path / "run-rerun", "provenance")["cores"] == 1


@pytest.mark.skipif(len(provenance.cores()) < 2 or not sys.platform.startswith("linux"),
                    reason="needs two cores, and to see threads")
def test_a_repetition_takes_its_cores_before_jax_starts_its_threads(run):
    """Which do not follow later; a network as small as the one above has the same bits anyway."""
    run_folder.write_facts(run, "provenance", run_folder.read_facts(run, "provenance") | {
        "platform": "cpu", "cores": 1})
    code = f"""
import os, pathlib, sys
def bind(process, cores):
    names = [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
    print(len(cores), *[name.strip() for name in names if "XLA" in name])
    sys.exit(0)
os.sched_setaffinity = bind
sys.argv = ["jaxrobust", "rerun", {str(run)!r}]
from jaxrobust.app import cli
cli.main()
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=pathlib.Path(__file__).parents[2],
                           stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    assert ended.stdout.split() == ["1"]


def test_a_run_is_repeated_from_its_folder_with_the_same_bits(
        run, tmp_path, monkeypatch, capsys):
    facts = run_folder.read_facts(run, "provenance")
    run_folder.write_facts(run, "provenance", facts | {
        "hardware": "1 x abacus", "versions": facts["versions"] | {"jax": "0.0.1"},
        "data_sha256": "0" * 64})
    # Interrupted after an epoch, it goes on with the same command.
    append = run_folder.append_epoch

    def interrupt(folder, row):
        append(folder, row)
        monkeypatch.setattr(run_folder, "append_epoch", append)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(run_folder, "append_epoch", interrupt)
    assert call("rerun", run) == 143
    assert one_line(capsys).endswith(f"To go on: python -m experiments rerun {run}")
    assert call("rerun", run) == 0
    said = capsys.readouterr().out
    assert f"{run}-rerun equals {run} to the bit." in said
    assert f"The version of jax was 0.0.1, and is {jax.__version__} now." in said
    assert "The hardware was 1 x abacus, and is " in said
    assert f"The data_sha256 was {'0' * 64}, and is {facts['data_sha256']} now." in said
    assert "version of numpy" not in said and "devices" not in said
    assert call("rerun", run) == 2
    assert f"{run}-rerun already holds a run." in one_line(capsys)
    # What is found where the results differ.
    again = tmp_path / "run-rerun"
    rows = files.read_lines(again / "metrics.jsonl")
    loss = rows[1]["loss"]
    rows[1]["loss"] = float(np.nextafter(loss, 1))
    run_folder.write_epochs(again, rows)
    assert rerun.first_difference(run, again) == (
        f"loss in epoch 2: {loss!r}, now {rows[1]['loss']!r}")
    run_folder.write_epochs(again, rows[:1])
    assert rerun.first_difference(run, again) == f"epoch 2 is only in the log of {run}"


def test_a_difference_of_one_bit_in_the_state_is_found_and_named(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    assert rerun.first_difference(run, other) is None
    found = rerun._last_checkpoint(run)
    leaves, tree = jax.tree.flatten(found.state)
    changed = [leaf.copy() for leaf in leaves]
    place = next(number for number, (path, _) in enumerate(
        jax.tree_util.tree_leaves_with_path(found.state))
        if jax.tree_util.keystr(path, simple=True, separator=".") == "state.params.head.bias")
    changed[place].view(np.uint32)[3] ^= 1
    shutil.rmtree(other / "checkpoints")
    with contextlib.closing(checkpoints.open_checkpoints(
            other / "checkpoints", keep=2)) as manager:
        checkpoints.save_checkpoint(
            manager, found.step, jax.tree.unflatten(tree, changed), found.facts)
    assert rerun.first_difference(run, other) == (
        "state.params.head.bias in the last checkpoint: 1 of 10 numbers")


@pytest.mark.parametrize("name, missing", [
    ("network.json", "a run in {}, found no network.json there"),
    ("metrics.jsonl", "the log of a finished run in {}, found none"),
    ("checkpoints", "a checkpoint of a finished run in {}, found none"),
    ("config.json", "a run in {}, found no config.json there")])
def test_a_run_with_nothing_to_compare_with_is_not_repeated(name, missing, run, capsys):
    path = run / name
    path.unlink() if path.is_file() else shutil.rmtree(path)
    assert call("rerun", run) == 2
    assert one_line(capsys) == f"error: Expected {missing.format(run)}."
    assert not run.with_name("run-rerun").exists()


def test_a_run_that_has_not_ended_is_not_repeated(run, capsys):
    (run / "done.json").unlink()
    assert call("rerun", run) == 2
    assert "to have ended. Resume it first." in one_line(capsys)
