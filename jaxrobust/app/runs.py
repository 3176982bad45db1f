"""Folders of results: who may write where, what is in them, and where it came from.

In a job of several processes the first one writes; all must see the same folders.
"""

import contextlib
import datetime
import json
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata

import jax
import numpy as np
from jax.experimental import multihost_utils

import jaxrobust
from jaxrobust.app.config import InputError, RunConfig, read_config, to_json

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "chex", "numpy", "scikit-learn")
"""Whose versions are recorded with every result."""


def require_writable(folder: pathlib.Path) -> None:
    """Checks that files can be written into a folder, which need not be there yet.

    It leaves nothing behind. Commands call it before their work begins.

    Raises:
      InputError: (a ValueError) if a file is in the way, or the system refuses.
    """
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise InputError(f"Cannot write {folder}: {nearest} is a file. Choose a folder.")
    with writing(folder), tempfile.TemporaryFile(dir=nearest):
        pass  # Permissions do not tell: a file system may be read-only, or hold no files at all.


def require_writable_file(path: pathlib.Path) -> None:
    """As :func:`require_writable`, for a file that is to be written or replaced."""
    if path.is_dir():
        raise InputError(f"Cannot write {path}: it is a folder. Name a file.")
    require_writable(path.parent)


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Turns what the system refuses, such as on a full disk, into InputError that names the path.

    Everything that a command writes is written within it.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"Cannot write {path}: {error.strerror or error}.") from error
    except ValueError as error:
        # TensorStore, by which Orbax writes, has the system's number in a text alone.
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        raise InputError(f"Cannot write {path}: {os.strerror(int(code[1]))}.") from error


def make_folder(folder: pathlib.Path) -> None:
    """Makes a folder, and those above it, unless it is there.

    Raises:
      InputError: (a ValueError) if it cannot be made.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def claim(folder: pathlib.Path, name: str, content: str) -> None:
    """Makes ``folder`` the place of what the file ``name`` describes.

    Raises:
      InputError: (a ValueError) if the folder belongs to something else already, or cannot be
        written into.
    """
    require_writable(folder)
    path = folder / name
    if path.is_file():
        if path.read_text() != content:
            raise _holds_another(folder, name)
        return
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty and holds no {name}. Choose another --out.")
    barrier("claim")  # All have looked before one writes.
    make_folder(folder)
    write_text(path, content)
    barrier("claimed")


def claim_run(folder: pathlib.Path, config: RunConfig) -> None:
    """As :func:`claim`, for a run; one from before a setting was there is the same run."""
    if not (folder / "config.json").is_file():
        claim(folder, "config.json", to_json(config))
    elif read_config(folder) != config:
        raise _holds_another(folder, "config.json")


def _holds_another(folder: pathlib.Path, name: str) -> InputError:
    return InputError(f"{folder} holds another configuration (see {name} there). "
                      "Choose another folder with --out, or remove that one.")


def is_writer() -> bool:
    """Whether this process writes the results, as the first one of a job does."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until all processes of a job have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


MEASUREMENTS = {
    "evaluation": "evaluate", "curvature": "curvature", "steps": "steps", "noise_counts": "figures",
    "surfaces": "figures", "blocks": "figures", "theory": "theory", "sharpness": "sharpness"}
"""What is measured of a run, and by which command: KIND.json, most with KIND.npz, in its folder."""


def result_path(folder: pathlib.Path, kind: str, name: str | None) -> pathlib.Path:
    """The JSON file of a measurement of a run: ``KIND.json``, or ``KIND-NAME.json`` of one with a
    name, so that several of a kind, with other settings each, lie side by side.

    Raises:
      InputError: (a ValueError) for a name that is not fit for a file.
    """
    if name is None:
        return folder / f"{kind}.json"
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise InputError(f"Expected name={name!r} of letters, digits and _.+- alone.")
    return folder / f"{kind}-{name}.json"


def named_results(folder: pathlib.Path) -> list[str]:
    """The measurements of a run that have a name, as their files are called without the suffix."""
    return sorted(path.stem for kind in MEASUREMENTS for path in folder.glob(f"{kind}-*.json"))


def append_line(path: pathlib.Path, row: dict) -> None:
    """Adds an object to a JSON-lines file."""
    if is_writer():
        with writing(path), path.open("a") as file:
            file.write(json.dumps(row) + "\n")


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the path of a file to write, which then takes the place of ``path``.

    A kill, or an error while it is written, leaves the old file or the new one.

    Raises:
      InputError: (a ValueError) if the system refuses.
    """
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        try:
            yield partial
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def write_text(path: pathlib.Path, content: str) -> None:
    """Replaces a file as a whole, as :func:`replacing` does."""
    if is_writer():
        with replacing(path) as partial:
            partial.write_text(content, encoding="utf-8", newline="\n")


def write_arrays(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """As :func:`write_text`, for an ``.npz`` file."""
    if is_writer():
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez(file, **arrays)


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
    program = pathlib.Path(sys.argv[0])
    module = ["python", "-m", program.parent.name]
    called = module if program.name == "__main__.py" else [program.name]
    return shlex.join([*called, *sys.argv[1:]])


def commit(package: pathlib.Path = pathlib.Path(jaxrobust.__file__).parent) -> str:
    """The commit of the code, marked if the working tree differs from it.

    It is that of the repository that the package itself is developed in: one that tracks it, at
    its top. Elsewhere, as in an installation or in a copy within another project's repository,
    whose commit says nothing of this code, it is the version, such as "jaxrobust 0.1.0".
    """
    def git(*arguments):
        # Variables such as GIT_DIR, which a hook of another repository sets, would name that one.
        return subprocess.run(
            ["git", "-C", str(package), *arguments], check=True, capture_output=True, text=True,
            env={name: value for name, value in os.environ.items() if not name.startswith("GIT_")},
        ).stdout.strip()

    version = f"jaxrobust {jaxrobust.__version__}"
    try:
        top = pathlib.Path(git("rev-parse", "--show-toplevel"))
        if not top.samefile(package.parent) or not git("ls-files", "--", "__init__.py"):
            return version
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (" (with changes)" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return version


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
