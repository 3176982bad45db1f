"""Trains and tests the product of a few settings' values and the seeds.

    Plan ─ claim_sweep ─▶ sweep.json ─ run_sweep ─▶ a folder for each run, as `train` makes it
"""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from jaxrobust import _validate
from jaxrobust.app import files, provenance
from jaxrobust.app.config import (
    BEFORE_CHOICES,
    SWEPT,
    Evaluation,
    InputError,
    RunConfig,
    distinct,
    get_setting,
    to_json,
    with_settings,
)
from jaxrobust.app.execution import Feed
from jaxrobust.app.measurements.accuracy import evaluate_run, make_test_split, settings_asked
from jaxrobust.app.program import program_of
from jaxrobust.app.recipe import Recipe
from jaxrobust.app.trainer import load_run, make_splits, train_together
from jaxrobust.data import Dataset
from jaxrobust.methods import METHODS
from jaxrobust.parallel import Layout, make_layout

USERS = {
    "noise_std": tuple(method for method in METHODS if method not in ("normal", "robust_clean")),
    "stability_weight": ("stability",),
    **{name: ("robust", "robust_clean") for name in SWEPT if name.startswith("robust.")},
    "robust.lam": ("robust",),
}
"""By setting that can be swept, the methods that it makes a difference to."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The runs of a sweep: all values of the one setting with all of the other, for all seeds."""

    recipe: str
    """RECIPE/ROW that the runs are of."""
    run: RunConfig
    """All that they share. What it says of the seed and of the settings swept does not count."""
    over: dict[str, tuple[float, ...]]
    """By swept setting, its values, increasing."""
    seeds: tuple[int, ...]
    """Increasing."""
    evaluation: Evaluation

    def settings(self) -> list[dict[str, float]]:
        """The product of the values; those of the last setting change fastest."""
        return [dict(zip(self.over, values, strict=True))
                for values in itertools.product(*self.over.values())]

    def configs(self) -> dict[str, RunConfig]:
        """The runs by the name of their folder, the seeds of a setting one after the other."""
        return {run_name(values, seed): dataclasses.replace(
                    with_settings(self.run, values), seed=seed)
                for values in self.settings() for seed in self.seeds}


def make_plan(recipe: Recipe, row: str, run: RunConfig, over: Sequence[str],
              seeds: Sequence[int] | None) -> Plan:
    """The runs that a command line asks for.

    Args:
      recipe: whose evaluation the runs have.
      row: of the recipe.
      run: the row, with changes to what the runs share.
      over: each ``SETTING=VALUE,VALUE,...``, the setting one of :data:`config.SWEPT`.
      seeds: of each setting; that of ``run`` if None.

    Raises:
      InputError: (a ValueError) for no setting, one that is unknown or that the method ignores, a
        value that is no number or out of range, and for what is given twice.
    """
    unchanged = recipe.run(row, seed=0)
    if not over:
        raise InputError("Expected at least one --over SETTING=VALUES, such as "
                         "--over robust.lam=0.1,1, got none.")
    values: dict[str, tuple[float, ...]] = {}
    for text in over:
        name, equals, numbers = text.partition("=")
        if not equals:
            raise InputError(f"Expected --over SETTING=VALUES, such as --over robust.lam=0.1,1, "
                             f"got {text!r}.")
        _validate.one_of("setting", name, SWEPT)
        if run.method not in USERS[name]:
            raise InputError(f"Expected a setting that the method {run.method!r} uses, got "
                             f"{name!r}, which is of: {', '.join(USERS[name])}.")
        if name in values:
            raise InputError(f"Expected each setting in one --over, got {name!r} in two.")
        if get_setting(run, name) != get_setting(unchanged, name):
            raise InputError(f"Expected {name} in --over or by its own option, got both.")
        values[name] = _sorted_once(name, [_number(name, n) for n in numbers.split(",")])
    if seeds is not None and run.seed != unchanged.seed:
        raise InputError("Expected --seeds or --seed, got both.")
    seeds = _sorted_once("seed", [run.seed] if seeds is None else seeds)
    plan = Plan(f"{recipe.name}/{row}", run, values, seeds, recipe.evaluation)
    plan.configs()  # The configuration refuses a value that is out of range.
    return plan


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InputError(f"Expected {name}={text!r} to be a number.") from error


def _sorted_once(name: str, values: Sequence) -> tuple:
    distinct(name, values)
    return tuple(sorted(values))


def number_text(value: float) -> str:
    """The shortest text of a number that gives it back, without a ``.0``."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def setting_name(values: dict[str, float]) -> str:
    """Such as ``lam=0.5,noise_std=0.03``; the last parts of the settings' names all differ."""
    return ",".join(f"{name.rpartition('.')[2]}={number_text(value)}"
                    for name, value in values.items())


def run_name(values: dict[str, float], seed: int) -> str:
    """Folder of a run."""
    return f"{setting_name(values)}-seed{seed}"


def _describe(plan: Plan) -> dict[str, Any]:
    """What ``sweep.json`` holds before there are results."""
    shared = json.loads(to_json(plan.run))
    del shared["seed"]
    for name in plan.over:
        outer, _, inner = name.rpartition(".")
        del (shared[outer] if outer else shared)[inner]
    return {
        "recipe": plan.recipe,
        "over": {name: list(values) for name, values in plan.over.items()},
        "seeds": list(plan.seeds),
        "run": shared,
        "evaluation": settings_asked(plan.evaluation),
        "provenance": provenance.describe(),
        "results": [],
    }


def claim_sweep(folder: pathlib.Path, plan: Plan) -> Plan:
    """Makes ``folder`` the place of a sweep, or adds values and seeds to the one that is there.

    Returns:
      The plan of all that the folder is to hold: the product of the values there and the new ones,
      for the seeds there and the new ones.

    Raises:
      InputError: (a ValueError) if it belongs to something else.
    """
    path = folder / "sweep.json"
    asked = _describe(plan)
    if not path.is_file():
        files.claim(folder, "sweep.json", json.dumps(asked, indent=2) + "\n")
        return plan
    there = files.read_json(path)
    there["run"] = BEFORE_CHOICES | there["run"]
    if (there["over"].keys() != plan.over.keys()
            or any(there[name] != asked[name] for name in ("recipe", "run", "evaluation"))):
        raise InputError(f"{folder} holds another sweep (see sweep.json there). "
                         "Choose another folder with --out, or remove that one.")
    # In the order of the settings there, which the folders' names have.
    plan = dataclasses.replace(
        plan, seeds=tuple(sorted({*there["seeds"], *plan.seeds})),
        over={name: tuple(sorted({*values, *plan.over[name]}))
              for name, values in there["over"].items()})
    files.write_json(path, {**there, "over": _describe(plan)["over"], "seeds": list(plan.seeds)})
    return plan


def choose_at_once(at_once: int | None, plan: Plan, dataset: Dataset, layout: Layout,
                   feed: Feed) -> int:
    """The most runs in a program: ``at_once``, or if it is None, what suits the devices.

    That is all of them on accelerators and one on CPUs, where the vmapped convolutions, which are
    grouped ones, are slower than those of one run after the other; and one where images are
    streamed, as each run would need a stream of its own.

    Raises:
      InputError: (a ValueError) if the runs cannot be trained so; nothing is written yet.
    """
    config = next(iter(plan.configs().values()))
    split = make_splits(dataset, config).train
    make_test_split(dataset, plan.evaluation.test_size)
    program_of([config], dataset, layout)
    alone = feed.resolve(layout, split, 1)
    if at_once is None:
        one = jax.default_backend() == "cpu" or alone.input == "stream"
        return 1 if one else len(plan.configs())
    _validate.in_range("at_once", at_once, 1)
    feed.resolve(layout, split, min(at_once, len(plan.configs())))
    return at_once


def run_sweep(
    plan: Plan, dataset: Dataset, folder: pathlib.Path, *, at_once: int = 1,
    tensorboard: bool = True, layout: Layout | None = None, feed: Feed = Feed(),
) -> list[str]:
    """Trains and tests the runs of a sweep.

    What is done already is left as it is; what was broken off goes on. A run that diverged would
    do so again, and stays as it is too: ``diverged.json`` in its folder says so.

    Args:
      plan: as :func:`claim_sweep` returned it.
      dataset: of the runs.
      folder: of the sweep.
      at_once: the most runs in a vmapped program.
      tensorboard: whether to write event files for TensorBoard too.
      layout: the devices; one if none is given.
      feed: how the images reach them.

    Returns:
      The names of the runs that diverged.
    """
    layout = make_layout("jit") if layout is None else layout
    configs = plan.configs()
    places = {name: folder / name for name in configs}
    pending = [name for name, place in places.items() if not is_finished(place)]
    done = len(configs) - len(pending)
    for start in range(0, len(pending), at_once):
        group = pending[start : start + at_once]
        first, last = (done + start + number for number in (1, len(group)))
        label = (f"run {first} of {len(configs)}, {group[0]}" if first == last else
                 f"runs {first} to {last} of {len(configs)}")
        for message in train_together(
            [configs[name] for name in group], dataset, [places[name] for name in group],
            resume=True, tensorboard=tensorboard, label=label, layout=layout, feed=feed):
            print(message, flush=True)
        files.barrier("trained")
        for name in group:
            place = places[name]
            if (place / "done.json").is_file():
                evaluate_run(load_run(place, configs[name], dataset, layout), plan.evaluation,
                             place, name)
    files.barrier("tested")
    return [name for name, place in places.items() if (place / "diverged.json").is_file()]


def is_finished(place: pathlib.Path) -> bool:
    """Whether nothing is left to be done for the run in a folder."""
    return any((place / name).is_file() for name in ("evaluation.json", "diverged.json"))
