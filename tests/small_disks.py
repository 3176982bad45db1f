"""Runs a script of the shell in a namespace of its own, where it may mount disks in memory."""

import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")


def run(script: str, disk: pathlib.Path, *words: object) -> None:
    """Calls a script with the folder of the disk that it mounts, which is made, and more words.

    Skips the test where the system has no such namespaces, or refuses them as in a container.
    """
    disk.mkdir()
    try_it = [*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", disk]
    if shutil.which("unshare") is None or subprocess.run(try_it, check=False).returncode:
        pytest.skip("cannot mount a disk in memory here")
    subprocess.run([*NAMESPACE, "bash", "-ec", script, "bash", disk, *words], cwd=ROOT, check=True)
