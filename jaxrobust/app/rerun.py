"""Repeats a run from what its folder holds, and compares the results to the bit."""

import contextlib
import os
import pathlib
from typing import NamedTuple

import jax
import numpy as np

from jaxrobust import checkpoints
from jaxrobust.app import files, provenance, run_folder, trainer
from jaxrobust.app.config import InputError
from jaxrobust.app.datasets import fingerprint, open_dataset
from jaxrobust.app.execution import Feed
from jaxrobust.app.network import read_network
from jaxrobust.app.program import initial_state
from jaxrobust.parallel import Layout, make_layout


class Rerun(NamedTuple):
    """What :func:`rerun` found."""

    circumstances: list[str]  # a line for each that is another than that of the run
    difference: str | None  # where the results first differ; None if they are equal


def rerun(folder: pathlib.Path, out: pathlib.Path, data_dir: pathlib.Path) -> Rerun:
    """Trains the run in ``folder`` once more, in the folder ``out``; resumes it there if it was
    interrupted.

    The devices, the number of CPU cores, the way of its input and the updates in a call are those
    of the run, as far as its folder names them and they are there. Prints what is otherwise, before
    the training. Must precede all computation: JAX takes the cores that it finds then.

    Raises:
      InputError: (a ValueError) if the training of the run has not ended, its log, its network.json
        or every readable checkpoint of a finished one is missing, its data set is not there
        or has other files or classes, the file of its initial weights is another or is not there,
        or ``out`` holds a run whose training has ended, or another one.
    """
    config = run_folder.read_config(folder)
    if not run_folder.is_trained(folder):
        raise InputError(f"Expected the training of {folder} to have ended. Resume it first.")
    if run_folder.is_trained(out):
        raise InputError(f"{out} already holds a run. Choose another --out.")
    recorded = run_folder.read_facts(folder, "provenance") or {}
    _bind_to_cores(recorded)  # First: to look at a checkpoint starts JAX.
    _require_results(folder)
    feed = Feed(**{name: recorded[name] for name in ("input", "steps_per_call")
                   if name in recorded})
    dataset = open_dataset(config, data_dir, in_memory=feed.in_memory())
    trainer.open_run(folder, config, dataset)  # Raises if it has other files or classes.
    trainer.check_weights(config, folder)
    now = provenance.describe() | {"data_sha256": fingerprint(dataset)}
    layout, otherwise = _layout_of(recorded)
    otherwise = _circumstances(recorded, now) + otherwise
    for line in otherwise:
        files.say(f"Note: {line}")
    files.make_folder(out)
    failures = trainer.train_together(
        [config], dataset, [out], resume=True, tensorboard=False, label="rerun", layout=layout,
        feed=feed)
    for line in failures:
        files.say(line)
    return Rerun(otherwise, first_difference(folder, out))


def _require_results(folder: pathlib.Path) -> None:
    """Raises InputError if a run lacks what its repetition would be compared with."""
    if read_network(folder) is None:
        raise InputError(f"Expected a run in {folder}, found no network.json there.")
    if run_folder.is_done(folder):  # A run may diverge before its first epoch ends.
        if not run_folder.read_epochs(folder):
            raise InputError(f"Expected the log of a finished run in {folder}, found none.")
        if _last_checkpoint(folder) is None:
            raise InputError(f"Expected a checkpoint of a finished run in {folder}, found none.")


def _bind_to_cores(recorded: dict) -> None:
    """Binds this process to as many cores as a run had, on which its last bits depend on CPUs:
    those of a study with --jobs have a share of the machine's."""
    number, mine = recorded.get("cores"), provenance.cores()
    if (recorded.get("platform") == "cpu" and isinstance(number, int) and 0 < number < len(mine)
            and hasattr(os, "sched_setaffinity")):
        os.sched_setaffinity(0, mine[:number])


def _circumstances(recorded: dict, now: dict) -> list[str]:
    """Describes what of the code, the machine and the data is not as it was."""
    before, after = ({
        **{f"version of {name}": version for name, version in facts.get("versions", {}).items()},
        **{name: facts.get(name) for name in ("commit", "platform", "hardware", "data_sha256")},
        "number of CPU cores": facts.get("cores")}
        for facts in (recorded, now))
    return [f"The {name} was {before.get(name) or 'not recorded'}, and is "
            f"{after.get(name) or 'not known'} now."
            for name in dict.fromkeys((*before, *after)) if before.get(name) != after.get(name)]


def _layout_of(recorded: dict) -> tuple[Layout, list[str]]:
    """The devices that a run was trained on, or else the default ones, with what is otherwise."""
    form, number = recorded.get("parallel"), recorded.get("devices", 1)
    lines = []
    if recorded.get("runs_together", 1) > 1:
        lines.append(f"The run was one of {recorded['runs_together']} in one program, which "
                     "rounds otherwise than a program of one.")
    if form is None:
        return make_layout("jit"), lines
    if recorded.get("processes", 1) == jax.process_count() and number <= len(jax.devices()):
        return make_layout(form, jax.devices()[:number]), lines
    layout = make_layout(None)
    return layout, [*lines, f"The run was trained on {number} devices of "
                    f"{recorded.get('processes', 1)} processes, and is on {layout.num_devices} of "
                    f"{jax.process_count()} now."]


def first_difference(folder: pathlib.Path, other: pathlib.Path) -> str | None:
    """Describes where the results of two runs of one configuration first differ, or None.

    Compares, to the bit, the epochs in the log, but for the seconds; how the training ended; and
    the states in the last checkpoints, the last of the training and the best.
    """
    epochs = [{row["epoch"]: row for row in run_folder.read_epochs(place)}
              for place in (folder, other)]
    for epoch in sorted(epochs[0].keys() | epochs[1].keys()):
        before, after = (rows.get(epoch) for rows in epochs)
        if before is None or after is None:
            return f"epoch {epoch} is only in the log of {other if before is None else folder}"
        for name in dict.fromkeys((*before, *after)):
            if name != "seconds" and not _same(before.get(name), after.get(name)):
                return f"{name} in epoch {epoch}: {before.get(name)!r}, now {after.get(name)!r}"
    done = [run_folder.read_facts(place, "done") for place in (folder, other)]
    if done[0] != done[1]:
        return f"the end: {done[0] or 'diverged'}, now {done[1] or 'diverged'}"
    states = [_last_checkpoint(place) for place in (folder, other)]
    if None in states:
        return None if states[0] is states[1] else "only one of them has a checkpoint"
    if states[0].step != states[1].step:
        return f"the last checkpoint: of update {states[0].step}, now {states[1].step}"
    leaves = [jax.tree_util.tree_leaves_with_path(one.state) for one in states]
    for (path, before), (_, after) in zip(*leaves, strict=True):
        if before.tobytes() != after.tobytes():
            number = int(np.sum(before != after))
            return (f"{jax.tree_util.keystr(path, simple=True, separator='.')} in the last "
                    f"checkpoint: {number} of {before.size} numbers")
    return None


def _same(before, after) -> bool:
    return before == after or (before != before and after != after)  # Two NaN are the same.


def _last_checkpoint(folder: pathlib.Path) -> checkpoints.Checkpoint | None:
    """The last checkpoint of a run, its states as NumPy arrays."""
    place = run_folder.checkpoints_path(folder)
    network = read_network(folder)
    if not place.is_dir() or network is None:
        return None
    like = checkpoints.to_host(initial_state(
        run_folder.read_config(folder), network, make_layout("jit")))
    with contextlib.closing(checkpoints.open_checkpoints(place, keep=2)) as manager:
        found = checkpoints.restore_checkpoint(
            manager, {"state": like, "best": like}, need_facts=True)
    return found and found._replace(state=jax.tree.map(np.asarray, found.state))
