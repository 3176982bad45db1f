"""A run's folder: the only room that knows which files are in it, and when it counts as trained.

    config.json             what the run is; from when the folder is its own
    network.json            what its network takes and gives
    split.csv               the files of a folder of images, with the class and the side of each
    provenance.json         where it comes from
    metrics.jsonl           a line for each epoch; from when its training begins
    checkpoints/            all that training is resumed from
    tensorboard/            event files
    done.json               the best epoch; from when its training has ended
    diverged.json           the epoch and a message, if it ended so instead
    doubt.json, .npz        how doubtful its predictions are
    KIND.json, .npz         a measurement; KIND-NAME.json, .npz of one with a name
    KIND.partial.npz        what there is of one that is not complete

The JSON file of arrays is written after them: they are whole once it is there.
"""

import json
import pathlib
import re

import numpy as np

from jaxrobust.app import files
from jaxrobust.app.config import BEFORE_CHOICES, InputError, RunConfig, from_dict, to_json


def is_run(folder: pathlib.Path) -> bool:
    """Whether the folder is that of a run."""
    return facts_path(folder, "config").is_file()


def is_begun(folder: pathlib.Path) -> bool:
    """Whether training has begun."""
    return _log_path(folder).is_file()


def is_done(folder: pathlib.Path) -> bool:
    """Whether training has ended, with a network to be used."""
    return facts_path(folder, "done").is_file()


def is_trained(folder: pathlib.Path) -> bool:
    """Whether nothing is left to train: the run is done, or has diverged."""
    return is_done(folder) or facts_path(folder, "diverged").is_file()


def is_measured(folder: pathlib.Path, last: str) -> bool:
    """Whether nothing is left of what a study does with a run, of which ``last`` is measured last.
    """
    return any(facts_path(folder, kind).is_file() for kind in (last, "diverged"))


# --- Facts and arrays ------------------------------------------------------------------------


def facts_path(folder: pathlib.Path, kind: str, name: str | None = None) -> pathlib.Path:
    """The JSON file of a kind of facts: ``KIND.json``, or ``KIND-NAME.json`` of a measurement with
    a name, so that several with other settings each lie side by side.

    Raises:
      InputError: (a ValueError) for a name that is not fit for a file.
    """
    if name is None:
        return folder / f"{kind}.json"
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise InputError(f"Expected name={name!r} of letters, digits and _.+- alone.")
    return folder / f"{kind}-{name}.json"


def arrays_path(folder: pathlib.Path, kind: str, name: str | None = None) -> pathlib.Path:
    """The file of the arrays beside such facts."""
    return facts_path(folder, kind, name).with_suffix(".npz")


def partial_path(folder: pathlib.Path, kind: str, name: str | None = None) -> pathlib.Path:
    """The file of what there is of an interrupted measurement."""
    return facts_path(folder, kind, name).with_suffix(".partial.npz")


def read_facts(folder: pathlib.Path, kind: str, name: str | None = None) -> dict | None:
    """The content of such a JSON file; None if it is not there."""
    path = facts_path(folder, kind, name)
    return files.read_json(path) if path.is_file() else None


def write_facts(folder: pathlib.Path, kind: str, facts: dict, name: str | None = None) -> None:
    """Replaces what :func:`read_facts` reads."""
    files.write_json(facts_path(folder, kind, name), facts)


def read_arrays(folder: pathlib.Path, kind: str, name: str | None = None
                ) -> dict[str, np.ndarray] | None:
    """The arrays beside such facts; None if they are not there."""
    path = arrays_path(folder, kind, name)
    if not path.is_file():
        return None
    with np.load(path) as arrays:
        return dict(arrays)


def write_arrays(folder: pathlib.Path, kind: str, arrays: dict[str, np.ndarray],
                 name: str | None = None) -> None:
    """Replaces what :func:`read_arrays` reads."""
    files.write_arrays(arrays_path(folder, kind, name), arrays)


def named_facts(folder: pathlib.Path, kind: str) -> list[str]:
    """The facts of a kind that have a name, as their files are called without the suffix."""
    return [path.stem for path in folder.glob(f"{kind}-*.json")]


# --- What a run is, and its log --------------------------------------------------------------


def read_config(folder: pathlib.Path) -> RunConfig:
    """The configuration of the run in a folder.

    A setting missing from the file takes its value from
    :data:`jaxrobust.app.config.BEFORE_CHOICES`.

    Raises:
      InputError: (a ValueError) if the folder holds no run.
    """
    values = read_facts(folder, "config")
    if values is None:
        raise InputError(f"Expected a run in {folder}, found no config.json there.")
    return from_dict(RunConfig, BEFORE_CHOICES | values)


def claim_run(folder: pathlib.Path, config: RunConfig) -> None:
    """As :func:`jaxrobust.app.files.claim`, for a run; one from before a setting was there is the
    same run."""
    if not is_run(folder):
        files.claim(folder, "config.json", to_json(config))
    elif read_config(folder) != config:
        raise files.holds_another(folder, "config.json")


def read_split(folder: pathlib.Path) -> str | None:
    """The images that the run is trained and tested on, as CSV; None if none are named."""
    path = folder / "split.csv"
    return path.read_text() if path.is_file() else None


def write_split(folder: pathlib.Path, text: str) -> None:
    """Replaces what :func:`read_split` reads."""
    files.write_text(folder / "split.csv", text)


def read_epochs(folder: pathlib.Path) -> tuple[dict, ...]:
    """What was logged of each epoch, in their order."""
    by_epoch = {line["epoch"]: line for line in files.read_lines(_log_path(folder))}
    return tuple(by_epoch[epoch] for epoch in sorted(by_epoch))


def write_epochs(folder: pathlib.Path, rows: list[dict]) -> None:
    """Replaces what :func:`read_epochs` reads."""
    files.write_text(_log_path(folder), "".join(json.dumps(row) + "\n" for row in rows))


def append_epoch(folder: pathlib.Path, row: dict) -> None:
    """Adds an epoch to the log."""
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


def has_checkpoint(folder: pathlib.Path) -> bool:
    """Whether there is a checkpoint that training is resumed from."""
    return any(checkpoints_path(folder).glob("[0-9]*"))


def is_of_earlier_version(folder: pathlib.Path) -> bool:
    """Whether the checkpoints are of a version whose training this one cannot resume."""
    return (checkpoints_path(folder) / "latest").is_dir()


def best_by_itself(folder: pathlib.Path) -> pathlib.Path | None:
    """Where an earlier version kept the best epoch by itself, with the epoch for its step; None of
    a later one."""
    place = checkpoints_path(folder) / "best"
    return place if place.is_dir() else None
