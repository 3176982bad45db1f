"""Trains, tests and compares the rows of a recipe."""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax

from experiments import runs
from experiments.config import Evaluation, InputError, Recipe, RunConfig
from experiments.curvature import measure_curvature
from experiments.datasets import open_dataset
from experiments.evaluation import evaluate_run
from experiments.execution import Feed
from experiments.program import rows_of
from experiments.training import load_run, train_together
from jaxrobust import _validate
from jaxrobust.data import Dataset
from jaxrobust.parallel import Layout


def run_folder(study: pathlib.Path, row: str, seed: int) -> pathlib.Path:
    """Where a run of a study is."""
    return study / f"{row}-seed{seed}"


def describe_study(recipe: Recipe, seeds: list[int], class_names: list[str]) -> dict:
    """What ``study.json`` holds: all that the report needs beside the runs."""
    return {
        "name": recipe.name, "title": recipe.title, "note": recipe.note,
        "paper_table": recipe.paper_table, "seeds": seeds, "class_names": class_names,
        "rows": {row: recipe.labels[row] for row in recipe.rows},
        "methods": {row: config.method for row, config in recipe.rows.items()},
        "paper_rows": dict(recipe.paper_rows),
        "paper_perturbations": dict(recipe.paper_perturbations),
        "command": runs.command_line(), "commit": runs.commit(),
    }


def claim_study(folder: pathlib.Path, description: dict) -> None:
    """Makes ``folder`` the place of a study, or adds seeds and rows to the one that is there.

    Raises:
      InputError: (a ValueError) if it belongs to something else.
    """
    path = folder / "study.json"
    if not path.is_file():
        runs.claim(folder, "study.json", json.dumps(description, indent=2) + "\n")
        return
    there = runs.read_json(path)
    # Words may be bettered; the command and commit stay those that began the study.
    signed = ("command", "commit")
    same = all(there[name] == description[name]
               for name in ("name", "paper_table", "class_names"))
    kept = all(there[name].items() <= description[name].items()
               for name in ("rows", "methods", "paper_rows"))
    if not (same and kept):
        raise InputError(f"{folder} holds another study (see study.json there). "
                         "Choose another folder with --out, or remove that one.")
    runs.write_json(path, {**description, **{name: there[name] for name in signed},
                           "seeds": sorted({*there["seeds"], *description["seeds"]})})


def run_study(
    recipe: Recipe, dataset: Dataset, folder: pathlib.Path, *, rows: list[str], seeds: list[int],
    tensorboard: bool = True, together: bool | None = None, layout: Layout | None = None,
    feed: Feed = Feed(),
) -> list[str]:
    """Trains and tests rows of a recipe for all seeds.

    What is done already is left as it is; what was broken off goes on.

    Args:
      recipe: what to run.
      dataset: of the recipe.
      folder: of the study.
      rows: of the recipe.
      seeds: of each row.
      tensorboard: whether to write event files for TensorBoard too.
      together: whether the seeds of a row are one vmapped program; None for on accelerators.
      layout: the devices; one if none is given.
      feed: how the images reach them.

    Returns:
      A line for each run that diverged.
    """
    if together is None:
        together = jax.default_backend() != "cpu"
    failures = []
    for group in [seeds] if together else [[seed] for seed in seeds]:
        for row in rows:
            failures += _run_group(
                recipe, dataset, folder, row, group, tensorboard=tensorboard, layout=layout,
                feed=feed)
    return failures


def _run_group(recipe, dataset, folder, row, seeds, *, layout, **options):
    """Trains one row for some seeds as one program, and tests what came of it."""
    configs = {run_folder(folder, row, seed): recipe.run(row, seed) for seed in seeds}
    label = f"{row}, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    failures = train_together(
        list(configs.values()), dataset, list(configs), resume=True, label=label, layout=layout,
        **options)
    for failure in failures:
        print(failure, file=sys.stderr, flush=True)
    for place, config in configs.items():
        if (place / "done.json").is_file():
            label = f"{row}, seed {config.seed}"
            run = load_run(place, config, dataset, layout)
            evaluate_run(run, recipe.evaluation, place, label)
            measure_curvature(run, recipe.curvature, place, label,
                              test_size=recipe.evaluation.test_size)
    return failures


def run_study_in_parallel(
    recipe: Recipe, folder: pathlib.Path, *, rows: list[str], seeds: list[int], jobs: int,
    arguments: list[str],
) -> list[str]:
    """As :func:`run_study`, ``jobs`` runs at a time, each a process on cores of its own.

    On a CPU two processes of one core each do half as much again as one process of two.

    Args:
      recipe: what to run.
      folder: of the study.
      rows: of the recipe.
      seeds: of each row.
      jobs: processes at a time.
      arguments: for every process, beside the recipe, the folder, the row and the seed.

    Returns:
      The last line of what each failed process said.

    Raises:
      InputError: (a ValueError) for more jobs than cores.
    """
    if not hasattr(os, "sched_getaffinity"):
        raise InputError(f"Expected jobs=1 on this system, which cannot bind a process to a core, "
                         f"got {jobs}.")
    cores = sorted(os.sched_getaffinity(0))
    _validate.in_range("jobs", jobs, 1, len(cores), open_high=False)
    share = len(cores) // jobs
    free = [set(cores[job * share : (job + 1) * share]) for job in range(jobs)]

    def one(row_and_seed):
        row, seed = row_and_seed
        mine = free.pop()
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "experiments", "reproduce", recipe.name, "--out",
                 str(folder), "--rows", row, "--seeds", str(seed), "--no-report", *arguments],
                stderr=subprocess.PIPE, text=True)
            os.sched_setaffinity(process.pid, mine)
            _, said = process.communicate()
        finally:
            free.append(mine)
        if process.returncode == 0:
            return None
        lines = said.strip().splitlines() or [f"exit status {process.returncode}"]
        return f"{row}, seed {seed}: {lines[-1]}"

    tasks = [(row, seed) for seed in seeds for row in rows]
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        return [failure for failure in pool.map(one, tasks) if failure]


def with_sources(recipe: Recipe, dataset: str | None, init_from: str | None,
                 skip_bad: bool = False) -> Recipe:
    """A recipe on another data set, without its bad images, or from other initial weights, where
    they are given."""
    changes: dict[str, Any] = {
        name: value for name, value in (("dataset", dataset), ("init_from", init_from))
        if value is not None}
    changes |= {"skip_bad": True} if skip_bad else {}
    return dataclasses.replace(recipe, rows={
        row: dataclasses.replace(config, **changes) for row, config in recipe.rows.items()})


def fit_recipe(recipe: Recipe, dataset: Dataset) -> tuple[Recipe, list[str]]:
    """The recipe with what the data set is too small for made smaller, and a line for each change.

    That is what is held out for validation, the training images, the batch, the test images and
    those at which the curvature is measured.

    Raises:
      InputError: (a ValueError) if no image of each class can be held out.
    """
    fitted = {row: _fit_run(config, dataset) for row, config in recipe.rows.items()}
    evaluation, num_test = fit_evaluation(recipe.evaluation, dataset), len(dataset.test.labels)
    curvature = dataclasses.replace(recipe.curvature, num_images=min(
        recipe.curvature.num_images, evaluation.test_size or num_test))
    found = (f"{dataset.name} has {len(dataset.train.labels)} training and {num_test} test images "
             f"of {len(dataset.class_names)} classes")
    pairs = [*((recipe.rows[row], config) for row, config in fitted.items()),
             (recipe.evaluation, evaluation), (recipe.curvature, curvature)]
    lines = [f"{found}: {field.name} is {'all' if new is None else new} instead of {old}."
             for before, after in pairs for field in dataclasses.fields(before)
             if (old := getattr(before, field.name)) != (new := getattr(after, field.name))]
    return (dataclasses.replace(recipe, rows=fitted, evaluation=evaluation, curvature=curvature),
            list(dict.fromkeys(lines)))


def fit_evaluation(evaluation: Evaluation, dataset: Dataset) -> Evaluation:
    """The evaluation at all test images where there are no more than it asks for."""
    if evaluation.test_size is None or evaluation.test_size < len(dataset.test.labels):
        return evaluation
    return dataclasses.replace(evaluation, test_size=None)


def _fit_run(config: RunConfig, dataset: Dataset) -> RunConfig:
    """The configuration of a run with what the data set is too small for made smaller."""
    num_train, num_classes = len(dataset.train.labels), len(dataset.class_names)
    if config.validation_size and dataset.validation is None:
        size = config.validation_size
        size = int(size) if size >= 1 else round(size * num_train)
        # One that leaves less than half is for a larger set.
        size = size if size <= num_train // 2 else num_train // 5
        wide_enough = next((count for count in range(max(size, num_classes), num_train)
                            if _can_hold_out(config, count, dataset)), None)
        if wide_enough is None:
            raise InputError(
                f"Expected more images in {dataset.name}: of {num_train} training images of "
                f"{num_classes} classes none of each can be held out to choose the epoch.")
        share = config.validation_size < 1 and wide_enough == size
        config = dataclasses.replace(
            config, validation_size=config.validation_size if share else wide_enough)
    left = len(rows_of(dataclasses.replace(config, train_size=None), dataset)[0])
    if config.train_size is not None and config.train_size >= left:
        config = dataclasses.replace(config, train_size=None)
    return dataclasses.replace(
        config, batch_size=min(config.batch_size, config.train_size or left))


def _can_hold_out(config: RunConfig, count: int, dataset: Dataset) -> bool:
    try:
        rows_of(dataclasses.replace(config, validation_size=count, train_size=None), dataset)
    except InputError:  # A class would be left without an image on one side.
        return False
    return True


def load_recipe_dataset(
    recipe: Recipe, data_dir: pathlib.Path, *, in_memory: bool = True
) -> Dataset:
    """The data set of a recipe; all its rows are of one."""
    config, *_ = recipe.rows.values()
    return open_dataset(config, data_dir, in_memory=in_memory)
