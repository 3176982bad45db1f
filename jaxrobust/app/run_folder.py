"""A run's folder: which files are in it."""

import pathlib
import re

from jaxrobust.app import files
from jaxrobust.app.config import InputError, RunConfig, read_config, to_json

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


def claim_run(folder: pathlib.Path, config: RunConfig) -> None:
    """As :func:`jaxrobust.app.files.claim`, for a run; one from before a setting was there is the
    same run."""
    if not (folder / "config.json").is_file():
        files.claim(folder, "config.json", to_json(config))
    elif read_config(folder) != config:
        raise files.holds_another(folder, "config.json")
