"""Folders of results: who may write where, what is in them, and where it came from.

In a job of several processes the first one writes; all must see the same folders.
"""

import datetime
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from importlib import metadata

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.config import InputError, RunConfig, to_json

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "chex", "numpy", "scikit-learn")
"""Whose versions are recorded with every result."""


def claim(folder: pathlib.Path, name: str, content: str) -> None:
    """Makes ``folder`` the place of what the file ``name`` describes.

    Raises:
      InputError: (a ValueError) if the folder belongs to something else already.
    """
    path = folder / name
    if path.is_file():
        if path.read_text() != content:
            raise InputError(
                f"{folder} holds another configuration (see {name} there). "
                "Choose another folder with --out, or remove that one.")
        return
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty and holds no {name}. Choose another --out.")
    barrier("claim")  # All have looked before one writes.
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, content)
    barrier("claimed")


def claim_run(folder: pathlib.Path, config: RunConfig) -> None:
    """As :func:`claim`, for a run."""
    claim(folder, "config.json", to_json(config))


def is_writer() -> bool:
    """Whether this process writes the results, as the first one of a job does."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until all processes of a job have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def append_line(path: pathlib.Path, row: dict) -> None:
    """Adds an object to a JSON-lines file."""
    if is_writer():
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def write_text(path: pathlib.Path, content: str) -> None:
    """Replaces a file as a whole, so that a kill leaves the old one or the new one."""
    if not is_writer():
        return
    partial = path.with_name(path.name + ".partial")
    partial.write_text(content)
    os.replace(partial, path)


def write_arrays(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """As :func:`write_text`, for an ``.npz`` file."""
    if not is_writer():
        return
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.savez(file, **arrays)
    os.replace(partial, path)


def write_json(path: pathlib.Path, value) -> None:
    """As :func:`write_text`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: pathlib.Path):
    """The content of a JSON file."""
    return json.loads(path.read_text())


def read_lines(path: pathlib.Path) -> list[dict]:
    """The objects of a JSON-lines file; none if it is not there.

    A last line without its end, which a kill may leave, does not count.
    """
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True)
            if line.endswith("\n")]


def provenance() -> dict:
    """Command, commit, time, hardware and versions, as recorded with every result."""
    return {
        "command": command_line(),
        "commit": commit(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "platform": jax.default_backend(),
        "hardware": hardware(),
        "versions": {"python": platform.python_version(),
                     **{package: metadata.version(package) for package in PACKAGES}},
    }


def command_line() -> str:
    """This process's command as one would type it."""
    return shlex.join(["python", "-m", "experiments", *sys.argv[1:]])


def commit() -> str:
    """The commit of the code, marked if the working tree differs; "unknown" outside git."""
    def git(*arguments):
        return subprocess.run(
            ["git", "-C", str(pathlib.Path(__file__).parent), *arguments],
            check=True, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (" (with changes)" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def hardware() -> str:
    """The devices that compute, and the processor behind them."""
    devices = ", ".join(sorted({device.device_kind for device in jax.devices()}))
    return f"{len(jax.devices())} x {devices}; {_processor()}, {os.cpu_count()} cores"


def _processor() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
