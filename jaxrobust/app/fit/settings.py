"""Decides the settings of the runs of a fit from facts about the data and the machine."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrobust import _validate
from jaxrobust.app.config import (
    Evaluation,
    InputError,
    OptimizerConfig,
    RunConfig,
    with_epochs,
    with_settings,
)
from jaxrobust.app.program import initial_state, start_from
from jaxrobust.app.recipe import DIGITS, FURTHER_LABELS, METHOD_LABELS, PHOTOS, Recipe
from jaxrobust.app.study.plan import fit_recipe
from jaxrobust.data import FOLDER_PREFIX, Dataset
from jaxrobust.losses import RobustLossConfig
from jaxrobust.parallel import Layout

LABELS = {row: METHOD_LABELS[row] for row in ("both", "normal")} | FURTHER_LABELS
"""The methods of a fit: those that were best on CIFAR-10 under the noise they were trained with,
and plain training as their reference."""

ORDER = ("both", "normal", "half_noise", "robust_both")
"""The methods by how much would be lost without them: ``both`` is best or level with the best
wherever it was measured; ``normal`` is best where noise hardly matters, and the cheapest."""


class Decision(NamedTuple):
    """A setting that was decided, why, and the option that overrides it."""

    name: str
    value: str
    reason: str
    option: str


def text_of(decisions: Sequence[Decision]) -> str:
    """Formats decisions, a line each."""
    names, values = (max(len(one[place]) for one in decisions) for place in (0, 1))
    return "\n".join(f"  {one.name:{names}}  {one.value:{values}}  {one.reason} ({one.option})"
                     for one in decisions)


def parse_noise(text: str) -> float:
    """Reads a standard deviation in pixel values of [0, 1], such as "40/255" or "0.157"."""
    number, slash, divisor = text.partition("/")
    try:
        std = float(number) / float(divisor) if slash else float(number)
    except (ValueError, ZeroDivisionError) as error:
        raise InputError(
            f"Expected noise={text!r} as a number, such as 0.157 or 40/255.") from error
    check_noise("noise", std)
    return std


def check_noise(name: str, std: float) -> None:
    """Raises InputError unless a standard deviation is in [0.25/255, 1]."""
    if not 0.25 / 255 <= std <= 1:
        hint = f" Did you mean {std:g}/255?" if 1 < std <= 255 else ""
        raise InputError(f"Expected {name}={std:g} in [0.25/255, 1], in pixel values of [0, 1]."
                         f"{hint}")


_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def parse_budget(text: str) -> float:
    """Reads a time in seconds, such as "90s", "6m", "2h" or "1h30m"; a number alone is hours."""
    parts = re.findall(r"(\d+(?:\.\d+)?)(min|[smhd])", text)
    try:
        seconds = (sum(float(number) * _UNITS[unit] for number, unit in parts)
                   if "".join(map("".join, parts)) == text and parts else 3600 * float(text))
    except ValueError as error:
        raise InputError(
            f"Expected budget={text!r} as a time, such as 30m, 2h or 1h30m.") from error
    _validate.in_range("budget", seconds, 0, open_low=True)
    return seconds


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the decisions depend on."""

    dataset: str  # "digits", "cifar10", "svhn_cropped" or "folder:PATH"
    num_images: int  # for training and validation together
    accelerator: bool
    stored_size: tuple[int, int] | None = None  # median height and width of a folder's files


SIDE, SIDE_ACCELERATOR = 64, 128
"""Shorter side to which larger photographs are reduced, in pixels."""

UPDATES = 2200
"""Updates that a network of photographs is trained for, in 10 to 100 epochs: 81 of a thousand
photographs, an eighth of them held out."""


def choose_settings(facts: Facts, asked: Mapping[str, Any]) -> tuple[RunConfig, dict[str, str]]:
    """Decides the settings that all methods share.

    Args:
      facts: about the data and the machine.
      asked: by dotted name, the settings of :class:`~jaxrobust.app.config.RunConfig` that options
        override.

    Returns:
      The configuration of ``both``, with the epochs to train where the budget allows, and the
      reasons, by the names of settings.
    """
    if facts.dataset.startswith(FOLDER_PREFIX):
        config, why = _photographs(facts, asked)
    elif facts.dataset == "digits":
        config, why = _digits()
    else:
        config, why = _small_images(facts)
    config = with_settings(config, {"dataset": facts.dataset, "method": "both", **{
        name: value for name, value in asked.items() if name != "epochs"}})
    config = trained_for(config, asked.get("epochs", config.epochs))
    return config, {name: "as asked" if name in asked else why[name] for name in why}


def fitted_to(config: RunConfig, reasons: Mapping[str, str], dataset: Dataset, layout: Layout
              ) -> tuple[RunConfig, dict[str, str], list[str]]:
    """Fits chosen settings to the images and the devices that there are.

    Returns:
      The configuration and the reasons, with those of what changed, and a line for each change.

    Raises:
      InputError: (a ValueError) if there are too few images, or the file of initial weights is not
        of this model.
    """
    recipe, lines = fit_recipe(
        Recipe("fit", "", {"both": config}, {}, Evaluation((0,)), curvature=None), dataset)
    fitted, reasons = recipe.rows["both"], dict(reasons)
    for name in ("batch_size", "validation_size"):
        if getattr(fitted, name) != getattr(config, name):
            reasons[name] = f"{getattr(config, name):g} is too many for these images"
    if dataset.validation is not None:
        reasons["validation_size"] = "those of the data set"
    left_over = fitted.batch_size % layout.num_devices
    if left_over and reasons["batch_size"] != "as asked" and fitted.batch_size > left_over:
        fitted = dataclasses.replace(fitted, batch_size=fitted.batch_size - left_over)
        reasons["batch_size"] = f"a multiple of the {layout.num_devices} devices"
    if fitted.init_from is not None:
        state = initial_state(fitted, dataset, layout)
        start_from(fitted.init_from, state, fitted, dataset, layout)
    return fitted, reasons, lines


def decisions_of(config: RunConfig, reasons: Mapping[str, str], facts: Facts, num_held_out: int
                 ) -> list[Decision]:
    """What was decided on the settings that all methods share."""
    height, width = config.image_size
    optimizer = config.optimizer
    return [
        *([Decision("image size", f"{height} x {width}", reasons["image_size"], "--image-size")]
          if facts.stored_size else []),
        Decision("model", f"{config.model}, width {config.width}", reasons["model"],
                 "--model, --width"),
        Decision("precision", config.dtype, reasons["dtype"], "--dtype"),
        Decision("batch size", str(config.batch_size), reasons["batch_size"], "--batch-size"),
        Decision("optimizer", f"{optimizer.name}, rate {optimizer.learning_rate:g}",
                 reasons["optimizer.learning_rate"], "--learning-rate"),
        Decision("held out", f"{num_held_out:,} images", reasons["validation_size"],
                 "--validation-size")]


def trained_for(config: RunConfig, epochs: int) -> RunConfig:
    """Changes the number of epochs with the schedule; the run is validated and saved at most five
    times."""
    return dataclasses.replace(
        with_epochs(config, epochs), checkpoint_every=math.ceil(epochs / 5))


def rows_of_methods(config: RunConfig) -> dict[str, RunConfig]:
    """The configuration of each method, from that of ``both``."""
    half = f"sometimes_gaussian({config.noise_std!r}, 1/2)"
    return {"both": config, "normal": dataclasses.replace(config, method="normal"),
            "half_noise": dataclasses.replace(config, method="noisy", perturb=half),
            "robust_both": dataclasses.replace(config, method="robust_both")}


def reduced_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Reduces a height and width, keeping their ratio, to a shorter side; does not enlarge them."""
    factor = min(1.0, side / min(size))
    height, width = (max(1, round(factor * length)) for length in size)
    return height, width


def _photographs(facts: Facts, asked: Mapping[str, Any]):
    config = PHOTOS.rows["both"]
    side = SIDE_ACCELERATOR if facts.accelerator else SIDE
    size = asked.get("image_size") or reduced_size(facts.stored_size, side)
    small = min(size) <= 40
    if small:
        config = dataclasses.replace(config, model="resnet18", width=16, num_features=64)
    held_out = asked.get("validation_size", config.validation_size)
    left = facts.num_images - (held_out if held_out >= 1 else held_out * facts.num_images)
    updates = max(1.0, left / asked.get("batch_size", config.batch_size))
    config = with_epochs(config, int(np.clip(math.ceil(UPDATES / updates), 10, 100)))
    own = " x ".join(map(str, facts.stored_size))
    return dataclasses.replace(config, image_size=tuple(size)), {
        "image_size": f"files have {own} pixels, the median; at most {side} for the shorter side",
        "model": "32-fold reduction leaves too little of so small images in MobileNetV3" if small
                 else "from random weights; start from others with --init-from",
        "dtype": "the recipe photos", "batch_size": "the recipe photos",
        "optimizer.learning_rate": "the recipe photos", "validation_size": "the recipe photos"}


def _digits():
    why = "the recipe digits"
    return dataclasses.replace(
        DIGITS.rows["both"], batch_norm_statistics="recomputed"), dict.fromkeys(
            ("image_size", "model", "dtype", "batch_size", "optimizer.learning_rate",
             "validation_size"), why)


def _small_images(facts: Facts):
    """Images of 32 x 32, tens of thousands of them."""
    shared: dict[str, Any] = {"validation_size": 0.1, "noise_std": 15.3 / 255,
              "robust": RobustLossConfig(alpha=0.01, beta=0.05, lam=0.05, delta_v=0.0)}
    why = {"image_size": "", "validation_size": "a tenth of the training images"}
    if facts.accelerator:
        return RunConfig(
            **shared, epochs=24, batch_size=500, dtype="bfloat16", optimizer=OptimizerConfig(
                learning_rate=0.2, schedule="cosine", warmup_epochs=5.0, clip_norm=5.0)), why | {
            "model": "the paper's, in minutes on an accelerator", "dtype": "fast on accelerators",
            "batch_size": "fills an accelerator",
            "optimizer.learning_rate": "stable in short schedules"}
    return RunConfig(
        **shared, width=8, num_features=32, epochs=30, batch_size=64, optimizer=OptimizerConfig(
            learning_rate=0.05, schedule="cosine", warmup_epochs=1.0, clip_norm=5.0)), why | {
        "model": "narrow, for a CPU; 64 is the paper's", "dtype": "bfloat16 is slow on CPUs",
        "batch_size": "many updates in few epochs",
        "optimizer.learning_rate": "stable in short schedules"}
