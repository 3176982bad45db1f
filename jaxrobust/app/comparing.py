"""Trains, tests and compares the rows of a recipe."""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from jaxrobust import _validate
from jaxrobust.app import files, provenance
from jaxrobust.app.config import Evaluation, InputError, RunConfig, read_config
from jaxrobust.app.datasets import open_dataset
from jaxrobust.app.execution import Feed, start_process
from jaxrobust.app.measurements import robustness
from jaxrobust.app.measurements.accuracy import evaluate_run
from jaxrobust.app.measurements.curvature import measure_curvature
from jaxrobust.app.program import rows_of
from jaxrobust.app.recipe import Recipe
from jaxrobust.app.report.page import duration, listed
from jaxrobust.app.trainer import load_run, train_together
from jaxrobust.data import FOLDER_PREFIX, Dataset
from jaxrobust.data.listing import list_images
from jaxrobust.parallel import Layout


def run_folder(study: pathlib.Path, row: str, seed: int) -> pathlib.Path:
    """Where a run of a study is."""
    return study / f"{row}-seed{seed}"


def folder_of(recipe: Recipe) -> str | None:
    """The folder of images, or CSV file, of a recipe; "" if none is named, None for other data."""
    dataset = next(iter(recipe.rows.values())).dataset
    return dataset.removeprefix(FOLDER_PREFIX) if dataset.startswith(FOLDER_PREFIX) else None


def require_data(recipe: Recipe, asked: str) -> None:
    if folder_of(recipe) == "":
        raise InputError(f"Expected data=folder:PATH, a folder of images, for {asked}: "
                         f"{recipe.name} has no data set of its own.")


@dataclasses.dataclass(frozen=True)
class StudyPlan:
    """What is to be run of one study."""

    recipe: Recipe
    folder: pathlib.Path
    rows: tuple[str, ...]
    seeds: tuple[int, ...]
    measured: tuple[str, ...] = ()  # rows of which ``figures`` is to measure what it shows

    def places(self, rows: Iterable[str] | None = None) -> list[pathlib.Path]:
        """The folders of the runs, of all rows or of some."""
        return [run_folder(self.folder, row, seed)
                for seed in self.seeds for row in (self.rows if rows is None else rows)]

    def text(self) -> str:
        """Some lines on its runs, its settings, and what it takes.

        Raises:
          InputError: (a ValueError) if it is of a folder that is not there or holds no classes.
        """
        places = self.places()
        done = sum((place / "curvature.json").is_file() or (place / "diverged.json").is_file()
                   for place in places)
        begun = sum((place / "config.json").is_file() for place in places) - done
        first = self.recipe.rows[self.rows[0]]
        size = "all" if first.train_size is None else f"{first.train_size:,}"
        folder, larger, there = folder_of(self.recipe), 1.0, ""
        if folder is not None:
            num_images = len(list_images(pathlib.Path(folder).expanduser()).entries)
            if not num_images:
                raise InputError(f"Expected images in {folder}, found none.")
            there = f" of {num_images:,} images"
            if self.recipe.cost is not None and self.recipe.cost.images is not None:
                larger = num_images / self.recipe.cost.images
        lines = [f"{self.recipe.name}: {len(places)} runs ({len(self.rows)} rows, seeds "
                 f"{listed(self.seeds)}), {done} done, {begun} begun; in {self.folder}",
                 f"  {first.dataset}{there}, {size} training images, {first.model} of width "
                 f"{first.width}, {first.epochs} epochs, batches of {first.batch_size}"]
        cost = self.recipe.cost
        if cost is not None:
            share = larger * (len(places) - done) / len(self.recipe.rows)
            cpu, gpu = (duration(3600 * share * hours) for hours in (
                cost.cpu_hours, cost.gpu_hours))
            lines.append(f"  left, on two CPU cores with --jobs 2: {cpu}, {cost.cpu_gigabytes:g} "
                         f"GB; on one GPU: {gpu} ({cost.basis})")
        return "\n".join(lines)


def plan_study(
    recipe: Recipe, folder: pathlib.Path, rows: Sequence[str] | None, seeds: Sequence[int] | None
) -> StudyPlan:
    """The plan of a recipe, or of some of its rows.

    Raises:
      InputError: (a ValueError) for an unknown row, or a recipe of a folder without one.
    """
    require_data(recipe, recipe.name)
    rows, seeds = tuple(rows or recipe.rows), tuple(seeds or recipe.seeds)
    for row in rows:
        recipe.run(row, seeds[0])
    return StudyPlan(recipe, folder, rows, seeds)


def run_plan(
    plan: StudyPlan, dataset: Dataset, *, jobs: int, data_dir: pathlib.Path, **options: Any
) -> list[str]:
    """Trains, tests and measures the runs of a plan; ``options`` are those of :func:`run_study`.

    Args:
      plan: of a recipe that fits the data set.
      dataset: of the recipe.
      jobs: runs at a time, each a process if there are several.
      data_dir: where these find the data set.

    Returns:
      A line for each run that failed.
    """
    recipe, rows, seeds = plan.recipe, list(plan.rows), list(plan.seeds)
    claim_study(plan.folder, describe_study(recipe, seeds, list(dataset.class_names)))
    if jobs > 1:
        options = {name: options[name] for name in ("tensorboard", "feed")}
        failures = run_study_in_parallel(recipe, plan.folder, rows=rows, seeds=seeds, jobs=jobs,
                                         data_dir=data_dir, **options)
    else:
        failures = run_study(recipe, dataset, plan.folder, rows=rows, seeds=seeds, **options)
    for place in plan.places(plan.measured):
        if (place / "done.json").is_file():
            robustness.measure_robustness(
                load_run(place, read_config(place), dataset), robustness.FigureSettings(), place,
                place.name)
    return failures


def describe_study(recipe: Recipe, seeds: list[int], class_names: list[str]) -> dict:
    """What ``study.json`` holds: all that the report needs beside the runs."""
    return {
        "name": recipe.name, "title": recipe.title, "note": recipe.note,
        "paper_table": recipe.paper_table, "seeds": seeds, "class_names": class_names,
        "rows": {row: recipe.labels[row] for row in recipe.rows},
        "methods": {row: config.method for row, config in recipe.rows.items()},
        "paper_rows": dict(recipe.paper_rows),
        "paper_perturbations": dict(recipe.paper_perturbations),
        "command": provenance.command_line(), "commit": provenance.commit(),
    }


def claim_study(folder: pathlib.Path, description: dict) -> None:
    """Makes ``folder`` the place of a study, or adds seeds and rows to the one that is there.

    Raises:
      InputError: (a ValueError) if it belongs to something else.
    """
    path = folder / "study.json"
    if not path.is_file():
        files.claim(folder, "study.json", json.dumps(description, indent=2) + "\n")
        return
    there = files.read_json(path)
    # Words may be bettered; the command and commit stay those that began the study.
    signed = ("command", "commit")
    same = all(there[name] == description[name]
               for name in ("name", "paper_table", "class_names"))
    kept = all(there[name].items() <= description[name].items()
               for name in ("rows", "methods", "paper_rows"))
    if not (same and kept):
        raise InputError(f"{folder} holds another study (see study.json there). "
                         "Choose another folder with --out, or remove that one.")
    files.write_json(path, {**description, **{name: there[name] for name in signed},
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
      A line for each run that diverged, unless the recipe says that they may.
    """
    if together is None:
        together = jax.default_backend() != "cpu"
    failures = []
    for group in [seeds] if together else [[seed] for seed in seeds]:
        for row in rows:
            failures += _run_group(
                recipe, dataset, folder, row, group, tensorboard=tensorboard, layout=layout,
                feed=feed)
    return [] if recipe.may_diverge else failures


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
    **options: Any,
) -> list[str]:
    """As :func:`run_study`, ``jobs`` runs at a time, each a process on cores of its own.

    On a CPU two processes of one core each do half as much again as one process of two.

    Args:
      recipe: what to run.
      folder: of the study.
      rows: of the recipe.
      seeds: of each row.
      jobs: processes at a time.
      **options: ``data_dir``, where each process finds the data set, ``tensorboard`` and ``feed``.

    Returns:
      A line for each run that failed.

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
    context = multiprocessing.get_context("spawn")

    def one(row_and_seed):
        row, seed = row_and_seed
        receiver, sender = context.Pipe(duplex=False)
        mine = free.pop()
        try:
            process = context.Process(
                target=_run_alone, args=(sender, recipe, folder, row, seed), kwargs=options)
            process.start()
            sender.close()
            os.sched_setaffinity(process.pid, mine)
            process.join()
        finally:
            free.append(mine)
        if receiver.poll():
            return receiver.recv()
        return [f"{row}, seed {seed}: exit status {process.exitcode}"]

    tasks = [(row, seed) for seed in seeds for row in rows]
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        return [failure for failures in pool.map(one, tasks) for failure in failures]


def _run_alone(sender, recipe, folder, row, seed, *, data_dir, feed, tensorboard) -> None:
    """One run of a study, in a process of its own; sends a line for what went wrong."""
    start_process()
    try:
        dataset = load_recipe_dataset(recipe, data_dir, in_memory=feed.in_memory())
        failures = run_study(recipe, dataset, folder, rows=[row], seeds=[seed],
                             tensorboard=tensorboard, feed=feed)
    except InputError as error:
        failures = [f"{row}, seed {seed}: {error}"]
    sender.send(failures)


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
