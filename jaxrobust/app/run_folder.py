"""Defines the files of runs and studies, and when a run counts as begun, trained and measured.

The folder of a run holds:

    config.json             the configuration; written first
    network.json            the inputs and outputs of the network
    network.npz             its weights, in a copy of the folder without checkpoints
    split.csv               images of a folder: path, class, and training or test
    provenance.json         command, commit, hardware and versions
    metrics.jsonl           a line for each epoch; written when training begins
    checkpoints/            the state that training resumes from
    tensorboard/            event files
    done.json               the best epoch; written when training ends
    diverged.json           instead of done.json: the epoch and a message
    not_finite.json, .npz   the update that stopped the training, and what replays it
    doubt.json, .npz        the doubt score of predictions
    KIND.json, .npz         a measurement, or KIND-NAME.json, .npz for one with a name
    KIND.partial.npz        an interrupted measurement
    KIND.lock               while a command makes a measurement; without its lock after a kill
    card.html, .md, .csv    the robustness card, with its figures in card-figures/

A folder of results of a model that was not trained here has model.json instead of config.json, and
measurements.

The folder of a study holds study.json and a folder for each run, ROW-seedSEED. Arrays are written
before the JSON file beside them: if that exists, they are complete.

A command that trains locks config.json: two commands cannot train one run at the same time. One
that measures locks KIND.lock: two cannot make one measurement of a run at the same time.
"""

import contextlib
import errno
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator

import numpy as np

from jaxrobust.app import files
from jaxrobust.app.config import BEFORE_CHOICES, InputError, RunConfig, from_dict, to_json


def is_run(folder: pathlib.Path) -> bool:
    """Whether the folder belongs to a run."""
    return facts_path(folder, "config").is_file()


def is_foreign(folder: pathlib.Path) -> bool:
    """Whether the folder holds the results of a model that was not trained here."""
    return facts_path(folder, "model").is_file()


def is_study(folder: pathlib.Path) -> bool:
    """Whether the folder belongs to a study."""
    return facts_path(folder, "study").is_file()


def is_begun(folder: pathlib.Path) -> bool:
    """Whether training has begun."""
    return _log_path(folder).is_file()


def is_done(folder: pathlib.Path) -> bool:
    """Whether training has ended with a usable network."""
    return facts_path(folder, "done").is_file()


def is_trained(folder: pathlib.Path) -> bool:
    """Whether training has ended: the run is done, or has diverged."""
    return is_done(folder) or facts_path(folder, "diverged").is_file()


def is_measured(folder: pathlib.Path, last: str) -> bool:
    """Whether a study has nothing left to do with the run: it has the measurement ``last``, or has
    diverged."""
    return any(facts_path(folder, kind).is_file() for kind in (last, "diverged"))


def divergences(folders: Iterable[pathlib.Path]) -> list[str]:
    """Returns the message of each run that has diverged."""
    return [facts["message"] for folder in folders if (facts := read_facts(folder, "diverged"))]


def place_of(study: pathlib.Path, row: str, seed: int) -> pathlib.Path:
    """The folder of a run in a study.

    Raises:
      InputError: (a ValueError) if the name of the row would lead out of the study's folder.
    """
    if "/" in row or "\\" in row or "\0" in row:
        raise InputError(f"Expected the name of a row in {study} without slashes, got {row!r}.")
    return study / f"{row}-seed{seed}"


# --- Facts and arrays ------------------------------------------------------------------------


def facts_path(folder: pathlib.Path, kind: str, name: str | None = None) -> pathlib.Path:
    """The path of ``KIND.json``, or of ``KIND-NAME.json`` for a measurement with a name."""
    if name is None:
        return folder / f"{kind}.json"
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise InputError(f"Expected name={name!r} of letters, digits and _.+- alone.")
    return folder / f"{kind}-{name}.json"


def arrays_path(folder: pathlib.Path, kind: str, name: str | None = None) -> pathlib.Path:
    """The path of the arrays beside :func:`facts_path`."""
    return facts_path(folder, kind, name).with_suffix(".npz")


def partial_path(folder: pathlib.Path, kind: str, name: str | None = None) -> pathlib.Path:
    """The path of an interrupted measurement."""
    return facts_path(folder, kind, name).with_suffix(".partial.npz")


def read_facts(folder: pathlib.Path, kind: str, name: str | None = None) -> dict | None:
    """Reads the file at :func:`facts_path`; None if there is none."""
    path = facts_path(folder, kind, name)
    return files.read_json(path) if path.is_file() else None


def write_facts(folder: pathlib.Path, kind: str, facts: dict, name: str | None = None) -> None:
    """Replaces the file at :func:`facts_path`."""
    files.write_json(facts_path(folder, kind, name), facts)


def read_arrays(folder: pathlib.Path, kind: str, name: str | None = None
                ) -> dict[str, np.ndarray] | None:
    """Reads the arrays at :func:`arrays_path`; None if there are none."""
    path = arrays_path(folder, kind, name)
    return files.read_arrays(path) if path.is_file() else None


def write_arrays(folder: pathlib.Path, kind: str, arrays: dict[str, np.ndarray],
                 name: str | None = None) -> None:
    """Replaces the arrays at :func:`arrays_path`."""
    files.write_arrays(arrays_path(folder, kind, name), arrays)


def named_facts(folder: pathlib.Path, kind: str) -> list[str]:
    """The files ``KIND-NAME.json`` of a kind, without the suffix."""
    return [path.stem for path in folder.glob(f"{kind}-*.json")]


# --- Configuration and log --------------------------------------------------------------------


def read_config(folder: pathlib.Path) -> RunConfig:
    """Reads the configuration of a run.

    A setting missing from the file takes its value from
    :data:`jaxrobust.app.config.BEFORE_CHOICES`.
    """
    values = read_facts(folder, "config")
    if values is None:
        raise InputError(f"Expected a run in {folder}, found no config.json there.")
    return from_dict(RunConfig, BEFORE_CHOICES | values)


def claim_run(folder: pathlib.Path, config: RunConfig) -> None:
    """Makes a folder that of a run, unless it is already."""
    if not is_run(folder):
        files.claim(facts_path(folder, "config"), to_json(config))
    elif read_config(folder) != config:
        raise files.holds_another("configuration", facts_path(folder, "config"))


class LockedError(InputError):
    """Another process is at work on the files that a command would write."""


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """Locks the folder of a run in training for this process, or for the job that it belongs to.

    The system removes the lock when the process ends, however it ends. Where the file system has no
    locks, a line says so.

    Raises:
      LockedError: (an InputError) if another process has locked it.
    """
    with _locked(files.locked(facts_path(folder, "config")), folder, "training in"):
        yield


@contextlib.contextmanager
def locked_facts(folder: pathlib.Path, kind: str, name: str | None = None) -> Iterator[None]:
    """Locks what a measurement writes, as :func:`locked` does the folder of a run."""
    path = facts_path(folder, kind, name)
    with _locked(files.locked(path.with_suffix(".lock"), made=True), path, "making"):
        yield


@contextlib.contextmanager
def locked_study(folder: pathlib.Path) -> Iterator[None]:
    """Locks ``study.json``, which must exist, while it is read and written anew; waits for another
    process that does so."""
    path = facts_path(folder, "study")
    with _locked(files.locked(path, wait=True), path, "extending"):
        yield


@contextlib.contextmanager
def _locked(
    lock: contextlib.AbstractContextManager[None], path: pathlib.Path, doing: str
) -> Iterator[None]:
    taken = 0
    with contextlib.ExitStack() as stack:
        if files.is_writer():
            try:
                stack.enter_context(lock)
            except BlockingIOError:
                taken = errno.EWOULDBLOCK
            except OSError as error:
                taken = error.errno or errno.ENOLCK
        taken = files.first_says(taken)
        if taken == errno.EWOULDBLOCK:
            raise LockedError(f"Another command is {doing} {path}. Wait for its end, or stop it "
                              "first.")
        if taken:
            files.say(f"Note: {path} cannot be locked ({os.strerror(taken)}). Start no other "
                      f"command for {doing} it before this one ends.")
        yield


def require_there(folder: pathlib.Path) -> None:
    """Raises InputError if the folder of a run in training is gone. Checkpoints would make another
    one, which could not be resumed."""
    if not is_run(folder):
        raise InputError(f"Cannot write {folder}: it was removed, or its config.json.")


def read_split(folder: pathlib.Path) -> str | None:
    """Reads the images of the run's folder as CSV; None for other data sets."""
    path = folder / "split.csv"
    if not path.is_file():
        return None
    with files.reading(path):
        return path.read_text(encoding="utf-8")


def write_split(folder: pathlib.Path, text: str) -> None:
    """Replaces the CSV that :func:`read_split` reads."""
    files.write_text(folder / "split.csv", text)


def read_epochs(folder: pathlib.Path) -> tuple[dict, ...]:
    """Reads the log: an entry for each epoch, in their order."""
    by_epoch = {line["epoch"]: line for line in files.read_lines(_log_path(folder))}
    return tuple(by_epoch[epoch] for epoch in sorted(by_epoch))


def write_epochs(folder: pathlib.Path, rows: list[dict]) -> None:
    """Replaces the log."""
    files.write_text(_log_path(folder), "".join(json.dumps(row) + "\n" for row in rows))


def append_epoch(folder: pathlib.Path, row: dict) -> None:
    """Appends an epoch to the log."""
    files.append_line(_log_path(folder), row)


def _log_path(folder: pathlib.Path) -> pathlib.Path:
    return folder / "metrics.jsonl"


def events_path(folder: pathlib.Path) -> pathlib.Path:
    """The folder of TensorBoard's event files."""
    return folder / "tensorboard"


# --- Checkpoints -----------------------------------------------------------------------------


def checkpoints_path(folder: pathlib.Path) -> pathlib.Path:
    """The folder of the checkpoints."""
    return folder / "checkpoints"


def weights_path(folder: pathlib.Path) -> pathlib.Path:
    """The weights that stand in for the checkpoints of a finished run where there are none."""
    return arrays_path(folder, "network")


def has_checkpoint(folder: pathlib.Path) -> bool:
    """Whether there is a checkpoint to resume from; one half written does not count."""
    place = checkpoints_path(folder)
    return place.is_dir() and any(path.name.isdigit() for path in place.iterdir())


def check_checkpoints(folder: pathlib.Path) -> None:
    """Raises InputError if what is stored as checkpoints is none that training can resume from: to
    start again would overwrite the run's log."""
    place = checkpoints_path(folder)
    names = sorted(path.name for path in place.iterdir()) if place.is_dir() else []
    if names and not any(name[0].isdigit() for name in names):
        raise InputError(f"Expected checkpoints in {place}, named by a number of updates, found "
                         f"{names[0]!r}. Train again in another folder.")
