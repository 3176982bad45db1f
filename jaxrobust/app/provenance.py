"""Records where a result comes from: command, commit, hardware and versions."""

import datetime
import functools
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from importlib import metadata

import jax

import jaxrobust

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "chex", "numpy", "scikit-learn")
"""Packages whose versions are recorded."""


def describe() -> dict:
    """Describes the command, commit, time, hardware and versions, for every result."""
    return {
        "command": command_line(),
        "commit": own_commit(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "platform": jax.default_backend(),
        "hardware": hardware(),
        "cores": len(cores()),
        "versions": {"python": platform.python_version(),
                     **{package: metadata.version(package) for package in PACKAGES}},
    }


def command_line() -> str:
    """The command line of this process."""
    program = pathlib.Path(sys.argv[0])
    module = ["python", "-m", program.parent.name]
    called = module if program.name == "__main__.py" else [program.name]
    return shlex.join([*called, *sys.argv[1:]])


@functools.cache
def own_commit() -> str:
    """Returns the :func:`commit` when this process first asked for it, at the start of a command:
    that of the code that runs, and not one made meanwhile."""
    return commit()


def commit(package: pathlib.Path = pathlib.Path(jaxrobust.__file__).parent) -> str:
    """Returns the commit of the code, marked if the working tree has changes.

    Only the package's own repository counts: one that tracks it in its top folder. Elsewhere, as in
    an installation or in a copy within another repository, returns the version, such as
    "jaxrobust 0.1.0".
    """
    def git(*arguments):
        # A hook of another repository sets variables such as GIT_DIR, which would name that one.
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
    """Describes the devices of JAX and the processor of this machine."""
    devices = ", ".join(sorted({device.device_kind for device in jax.devices()}))
    return f"{len(jax.devices())} x {devices}; {_processor()}, {os.cpu_count()} cores"


def cores() -> list[int]:
    """The CPU cores that this process may use, as far as the system says."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _processor() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
