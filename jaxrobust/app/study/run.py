"""Trains, tests and measures the runs of a study."""

import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
import pathlib
import sys
import threading
from collections.abc import Sequence
from typing import Any

import jax

from jaxrobust import _validate
from jaxrobust.app import files, program, run_folder
from jaxrobust.app.config import InputError, RunConfig
from jaxrobust.app.datasets import open_dataset
from jaxrobust.app.execution import Feed, start_process
from jaxrobust.app.measurements import robustness
from jaxrobust.app.measurements.accuracy import evaluate_run, make_test_split
from jaxrobust.app.measurements.curvature import CURVATURE
from jaxrobust.app.measurements.runner import measure
from jaxrobust.app.recipe import Recipe
from jaxrobust.app.study.plan import StudyPlan, claim_study
from jaxrobust.app.trainer import load_run, make_splits, train_together
from jaxrobust.data import Dataset
from jaxrobust.parallel import Layout, make_layout


def run_study(
    plan: StudyPlan, dataset: Dataset, *, at_once: int | None = None, tensorboard: bool = True,
    layout: Layout | None = None, feed: Feed = Feed(),
) -> list[str]:
    """Trains, tests and measures the runs of a plan.

    Leaves finished runs as they are, and those that diverged, which would do so again; resumes
    interrupted ones.

    Args:
      plan: of a recipe that fits the data set.
      dataset: of the recipe.
      at_once: the most runs trained as one vmapped program, of those that differ in nothing but the
        seed and the settings that can be swept. None for all of them on accelerators and one on
        CPUs, where vmapped convolutions, which are grouped ones, are slower than one run after the
        other; and for one where images are streamed, as each run would need a stream of its own.
      tensorboard: whether to write event files for TensorBoard too.
      layout: the devices; one if none is given.
      feed: how the images reach them.

    Returns:
      A line for each run that diverged, unless the recipe says that they may.

    Raises:
      InputError: (a ValueError) if the folder belongs to something else, or the runs cannot be
        trained so.
    """
    layout = make_layout("jit") if layout is None else layout
    configs = plan.configs()
    trained = {place: config for place, config in configs.items() if run_folder.is_trained(place)}
    left = {place: config for place, config in configs.items() if place not in trained}
    # Says what cannot be, before anything is written.
    make_test_split(dataset, plan.recipe.evaluation.test_size)
    for config in left.values():
        program.program_of([config], dataset, layout)
    at_once = _choose_at_once(at_once, list(left.values()), dataset, layout, feed)
    claim_study(plan, dataset.class_names)
    failures = []
    for group in [*([trained] if trained else []), *_groups(left, at_once)]:
        failures += _run_group(plan.recipe, dataset, group, tensorboard=tensorboard, layout=layout,
                               feed=feed)
    _measure(plan, dataset)
    return [] if plan.recipe.may_diverge else failures


def _choose_at_once(asked: int | None, configs: Sequence[RunConfig], dataset: Dataset,
                    layout: Layout, feed: Feed) -> int:
    if not configs:
        return 1
    split = make_splits(dataset, configs[0]).train
    if asked is None:
        streamed = feed.resolve(layout, split, 1).input == "stream"
        return 1 if streamed or jax.default_backend() == "cpu" else len(configs)
    feed.resolve(layout, split, min(asked, len(configs)))  # Says what cannot be.
    return asked


def _groups(configs: dict[pathlib.Path, RunConfig], at_once: int) -> list[
        dict[pathlib.Path, RunConfig]]:
    """The runs that are trained together: ``at_once`` of those that can be, in their order."""
    alike: dict[Any, list[pathlib.Path]] = {}
    for place, config in configs.items():
        alike.setdefault(place if at_once == 1 else program.without_swept(config), []).append(place)
    return [{place: configs[place] for place in places[start : start + at_once]}
            for places in alike.values() for start in range(0, len(places), at_once)]


def _run_group(recipe, dataset, configs, *, layout, **options):
    """Trains runs as one program, unless they are, and tests what came of them."""
    first, *others = (place.name for place in configs)
    if all(map(run_folder.is_trained, configs)):  # They need not be alike.
        failures = [facts["message"] for place in configs
                    if (facts := run_folder.read_facts(place, "diverged")) is not None]
    else:
        failures = train_together(
            list(configs.values()), dataset, list(configs), resume=True, layout=layout,
            label=f"{first} and {len(others)} more" if others else first, **options)
    for failure in failures:
        print(failure, file=sys.stderr, flush=True)
    files.barrier("trained")
    for place, config in configs.items():
        if run_folder.is_done(place):
            run = load_run(place, config, dataset, layout)
            evaluate_run(run, recipe.evaluation, place, place.name)
            if recipe.curvature is not None:
                settings = dataclasses.replace(
                    recipe.curvature, test_size=recipe.evaluation.test_size)
                measure(CURVATURE, run, settings, place, place.name)
    return failures


def _measure(plan: StudyPlan, dataset: Dataset) -> None:
    """Measures what the figures show of the rows that the plan says so of."""
    for place in plan.places(plan.measured):
        if run_folder.is_done(place):
            run = load_run(place, run_folder.read_config(place), dataset)
            robustness.measure_robustness(run, robustness.FigureSettings(), place, place.name)


def run_study_in_parallel(
    plan: StudyPlan, dataset: Dataset, *, jobs: int, data_dir: pathlib.Path, tensorboard: bool,
    feed: Feed,
) -> list[str]:
    """As :func:`run_study`, ``jobs`` runs at a time, each in a process on cores of its own.

    On a CPU two processes of one core each do half as much again as one process of two. Each opens
    the data set for itself, which it finds in ``data_dir``. A process that dies fails its run
    alone: another takes the next one.

    Raises:
      InputError: (a ValueError) for more jobs than cores, or if the folder belongs to something
        else.
    """
    if not hasattr(os, "sched_getaffinity"):
        raise InputError(f"Expected jobs=1 on this system, which cannot bind a process to a core, "
                         f"got {jobs}.")
    cores = sorted(os.sched_getaffinity(0))
    _validate.in_range("jobs", jobs, 1, len(cores), open_high=False)
    claim_study(plan, dataset.class_names)
    share = len(cores) // jobs
    tasks = iter([(row, seed) for seed in plan.seeds for row in plan.rows])
    taking = threading.Lock()

    def work(job: int) -> list[str]:
        failures, worker = [], None
        while True:
            with taking:
                task = next(tasks, None)
            if task is None:
                if worker is not None:
                    worker.close()
                return failures
            worker = worker or _Worker(
                set(cores[job * share : (job + 1) * share]), plan, data_dir, tensorboard, feed)
            try:
                failures += worker.run(*task)
            except EOFError:  # It was killed.
                failures.append("{}, seed {}: exit status {}".format(*task, worker.close()))
                worker = None

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        failures = [failure for failures in pool.map(work, range(jobs)) for failure in failures]
    _measure(plan, dataset)
    return failures


class _Worker:
    """A process that runs one run of a study after the other."""

    def __init__(self, cores: set[int], *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()
        os.sched_setaffinity(self._process.pid, cores)

    def run(self, row: str, seed: int) -> list[str]:
        """A line for what went wrong; raises EOFError if the process dies."""
        try:
            self._connection.send((row, seed))
            return self._connection.recv()
        except (BrokenPipeError, ConnectionResetError) as error:
            raise EOFError from error

    def close(self) -> int:
        """Ends the process, and returns its exit status."""
        self._connection.close()
        self._process.join()
        return self._process.exitcode


def _serve(connection, plan: StudyPlan, data_dir, tensorboard, feed) -> None:
    """Runs what comes through a connection, and sends a line for what went wrong, until it ends."""
    start_process()
    dataset = None
    with contextlib.suppress(EOFError):
        while True:
            row, seed = connection.recv()
            try:
                dataset = dataset or load_recipe_dataset(
                    plan.recipe, data_dir, in_memory=feed.in_memory())
                failures = run_study(
                    dataclasses.replace(plan, rows=(row,), seeds=(seed,), measured=()), dataset,
                    tensorboard=tensorboard, feed=feed)
            except InputError as error:
                failures = [f"{row}, seed {seed}: {error}"]
            connection.send(failures)


def load_recipe_dataset(
    recipe: Recipe, data_dir: pathlib.Path, *, in_memory: bool = True
) -> Dataset:
    """The data set of a recipe; all its rows are of one."""
    config, *_ = recipe.rows.values()
    return open_dataset(config, data_dir, in_memory=in_memory)
