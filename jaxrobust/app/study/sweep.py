"""Plans sweeps: studies whose rows are all combinations of the values of some settings."""

import itertools
import pathlib
from collections.abc import Mapping, Sequence

from jaxrobust import _validate
from jaxrobust.app import files, run_folder
from jaxrobust.app.config import (
    SWEPT,
    InputError,
    RunConfig,
    distinct,
    get_setting,
    with_settings,
)
from jaxrobust.app.recipe import Recipe
from jaxrobust.app.study.plan import StudyPlan, plan_study
from jaxrobust.methods import CLEAN_METHODS, METHODS, ROBUST_METHODS

USERS = {
    "noise_std": tuple(method for method in METHODS if method not in CLEAN_METHODS),
    "stability_weight": ("stability",),
    **{name: ROBUST_METHODS for name in SWEPT if name.startswith("robust.")},
    "robust.lam": ("robust", "robust_both"),
    **{name: (name.split(".")[1],) for name in SWEPT if name.startswith("options.")},
}
"""For each setting that can be swept, the methods that use it."""


def plan_sweep(
    recipe: Recipe, row: str, run: RunConfig, over: Sequence[str], seeds: Sequence[int] | None,
    folder: pathlib.Path,
) -> StudyPlan:
    """Plans a study whose rows are all combinations of the values of some settings.

    ``run`` is the configuration of a row of the recipe, with changes that all runs share; ``over``
    holds texts ``SETTING=VALUE,VALUE,...`` with a setting of :data:`config.SWEPT`. If the folder
    holds a sweep over the same settings, adds its values and seeds.
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
                             f"{name!r}, which belongs to: {', '.join(USERS[name])}.")
        if name in values:
            raise InputError(f"Expected each setting in one --over, got {name!r} in two.")
        if get_setting(run, name) != get_setting(unchanged, name):
            raise InputError(f"Expected {name} in --over or by its own option, got both.")
        values[name] = _sorted_once(name, [_number(name, n) for n in numbers.split(",")])
    if seeds is not None and run.seed != unchanged.seed:
        raise InputError("Expected --seeds or --seed, got both.")
    seeds = _sorted_once("seed", [run.seed] if seeds is None else seeds)
    there = run_folder.read_facts(folder, "study")
    if there is not None:
        if there.get("swept", {}).keys() != values.keys():
            raise files.holds_another("study", run_folder.facts_path(folder, "study"))
        # The names of the folders show the settings in their old order.
        values = {name: tuple(sorted({*swept, *values[name]}))
                  for name, swept in there["swept"].items()}
        seeds = tuple(sorted({*there["seeds"], *seeds}))
    rows = {setting_name(one): with_settings(run, one) for one in combinations(values)}
    return plan_study(Recipe(
        name=f"sweep-{recipe.name}-{row}",
        title=f"Sweep of {recipe.name}/{row} over {', '.join(values)}",
        rows=rows, labels={row: row for row in rows}, evaluation=recipe.evaluation, curvature=None,
        seeds=seeds, swept=values, may_diverge=recipe.may_diverge), folder)


def combinations(values: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    """All combinations of the values; those of the last setting vary fastest."""
    return [dict(zip(values, one, strict=True)) for one in itertools.product(*values.values())]


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InputError(f"Expected {name}={text!r} to be a number.") from error


def _sorted_once(name: str, values: Sequence) -> tuple:
    distinct(name, values)
    return tuple(sorted(values))


def number_text(value: float) -> str:
    """The shortest text that reads back as the number, without a ``.0``."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def setting_name(values: dict[str, float]) -> str:
    """A row's name, such as ``lam=0.5,noise_std=0.03``; the last parts of settings are unique."""
    return ",".join(f"{name.rpartition('.')[2]}={number_text(value)}"
                    for name, value in values.items())
