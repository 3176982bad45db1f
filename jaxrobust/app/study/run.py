"""Trains, tests and measures the runs of a study."""

import dataclasses
import multiprocessing
import os
import pathlib
import queue
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import jax

from jaxrobust import _validate
from jaxrobust.app import files, interruption, program, provenance, run_folder
from jaxrobust.app.config import InputError, RunConfig
from jaxrobust.app.datasets import open_dataset
from jaxrobust.app.execution import Feed, start_process
from jaxrobust.app.measurements import MEASUREMENTS, robustness
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

    Leaves finished and diverged runs as they are, and resumes interrupted ones. Trains at most
    ``at_once`` runs as one vmapped program; they may differ only in the seed and the settings that
    can be swept. By default these are all runs on accelerators; one on CPUs, where vmapped
    convolutions, which are grouped, are slower than one run after the other; and one where images
    are streamed, as each run would need its own stream.

    Returns a line for each run that diverged, unless the recipe allows divergence.
    """
    layout = make_layout("jit") if layout is None else layout
    configs = plan.configs()
    trained = [place for place in configs if run_folder.is_trained(place)]
    left = {place: config for place, config in configs.items() if place not in trained}
    # Raises for what is impossible, before anything is written.
    make_test_split(dataset, plan.recipe.evaluation.test_size)
    for config in left.values():
        program.program_of([config], dataset, layout)
    at_once = _choose_at_once(
        at_once, list(configs.values()) if left else [], dataset, layout, feed)
    claim_study(plan, dataset.class_names)
    failures = run_folder.divergences(trained)
    _show_and_test(plan.recipe, dataset, trained, failures, layout)
    # Finished and diverged runs too: a resumed study has the programs of one never interrupted.
    for group in _groups(configs, at_once):
        names = [place.name for place in group if place in left]
        if not names:
            continue
        first, *others = names
        new = train_together(
            list(group.values()), dataset, list(group), resume=True, tensorboard=tensorboard,
            label=f"{first} and {len(others)} more" if others else first, layout=layout, feed=feed)
        new = [failure for failure in new if failure not in failures]
        _show_and_test(plan.recipe, dataset, filter(left.__contains__, group), new, layout)
        failures += new
    _measure_suites(plan, dataset, layout)
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
    feed.resolve(layout, split, min(asked, len(configs)))  # Raises if they cannot be together.
    return asked


def _groups(configs: dict[pathlib.Path, RunConfig], at_once: int) -> list[
        dict[pathlib.Path, RunConfig]]:
    """Groups of runs to train together: up to ``at_once`` compatible ones each, in order."""
    alike: dict[Any, list[pathlib.Path]] = {}
    for place, config in configs.items():
        alike.setdefault(place if at_once == 1 else program.without_swept(config), []).append(place)
    return [{place: configs[place] for place in places[start : start + at_once]}
            for places in alike.values() for start in range(0, len(places), at_once)]


def _show_and_test(recipe: Recipe, dataset: Dataset, places: Iterable[pathlib.Path],
                   failures: Sequence[str], layout: Layout) -> None:
    """Prints the failures of runs, and tests those that did not fail."""
    for failure in failures:
        print(failure, file=sys.stderr, flush=True)
    files.barrier("trained")
    for place in filter(run_folder.is_done, places):
        run = load_run(place, run_folder.read_config(place), dataset, layout)
        evaluate_run(run, recipe.evaluation, place, place.name)
        if recipe.curvature is not None:
            settings = dataclasses.replace(
                recipe.curvature, test_size=recipe.evaluation.test_size)
            measure(CURVATURE, run, settings, place, place.name)


def _measure_suites(plan: StudyPlan, dataset: Dataset, layout: Layout) -> None:
    """Makes the measurements of the command ``evaluate`` that the plan names, on the images that
    its runs are tested on, from the first on."""
    size = plan.recipe.evaluation.test_size or len(dataset.test.labels)
    chosen = {measurement: _on_first(plan.suites[measurement.kind], size)
              for measurement in MEASUREMENTS if measurement.kind in plan.suites}
    for place in plan.places() if chosen else ():
        if run_folder.is_done(place):
            run = load_run(place, run_folder.read_config(place), dataset, layout)
            for measurement, settings in chosen.items():
                measure(measurement, run, settings, place, place.name)


def _on_first(settings: Any, size: int) -> Any:
    """Limits a measurement to the first images of a study's test images, ``size`` in number."""
    whole = settings.limit is None or settings.limit >= size
    first = {"test_size": size} if hasattr(settings, "test_size") else {}
    return dataclasses.replace(settings, limit=size if whole else settings.limit, **first)


def _measure(plan: StudyPlan, dataset: Dataset) -> None:
    """Makes the measurements of the command ``figures``, for the rows that the plan names."""
    for place in plan.places(plan.measured):
        if run_folder.is_done(place):
            run = load_run(place, run_folder.read_config(place), dataset)
            robustness.measure_robustness(run, robustness.FigureSettings(), place, place.name)


def run_study_in_parallel(
    plan: StudyPlan, dataset: Dataset, *, jobs: int, data_dir: pathlib.Path, tensorboard: bool,
    feed: Feed,
) -> list[str]:
    """Like :func:`run_study`, with ``jobs`` runs at a time, each in a process on its own cores.

    On CPUs, two processes on one core each are half as fast again as one process on two. Each opens
    the data set in ``data_dir`` itself. If a process dies, only its run fails, and another process
    takes the next one.
    """
    if not hasattr(os, "sched_getaffinity"):
        raise InputError(f"Expected jobs=1 on this system, which cannot bind a process to a core, "
                         f"got {jobs}.")
    cores = provenance.cores()
    _validate.in_range("jobs", jobs, 1, len(cores), open_high=False)
    claim_study(plan, dataset.class_names)
    share = len(cores) // jobs
    workers: queue.SimpleQueue = queue.SimpleQueue()
    for job in range(jobs):
        mine = set(cores[job * share : (job + 1) * share])
        workers.put((mine, _start_worker(mine)))

    def execute(one: StudyPlan) -> list[str]:
        mine, worker = workers.get()
        try:
            return worker.submit(_execute, one, data_dir, tensorboard, feed).result()
        except BrokenProcessPool:
            worker = _start_worker(mine)
            return [f"{one.rows[0]}, seed {one.seeds[0]}: its process was killed"]
        finally:
            workers.put((mine, worker))

    tasks = [dataclasses.replace(plan, rows=(row,), seeds=(seed,), measured=())
             for seed in plan.seeds for row in plan.rows]
    try:
        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(execute, task) for task in tasks]
            try:
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()  # Raises its exception.
                failures = [failure for future in futures for failure in future.result()]
            except interruption.Interrupted:
                for future in futures:
                    future.cancel()
                for process in multiprocessing.active_children():
                    process.terminate()  # By SIGTERM: they save their runs.
                raise
    finally:
        while not workers.empty():
            workers.get()[1].shutdown()
    _measure(plan, dataset)
    return failures


def _start_worker(cores: set[int]) -> ProcessPoolExecutor:
    """Starts a process that executes runs on some cores, one after the other."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _prepare_worker, (cores,))


def _prepare_worker(cores: set[int]) -> None:
    os.sched_setaffinity(0, cores)
    start_process()
    interruption.install(hold=True)  # Between two runs there is nothing to stop.


def _execute(plan: StudyPlan, data_dir: pathlib.Path, tensorboard: bool, feed: Feed) -> list[str]:
    """Executes the only run of a plan; returns a line for each failure."""
    try:
        with interruption.released():
            dataset = load_recipe_dataset(plan.recipe, data_dir, feed)
            return run_study(plan, dataset, tensorboard=tensorboard, feed=feed)
    except InputError as error:
        return [f"{plan.rows[0]}, seed {plan.seeds[0]}: {error}"]


def load_recipe_dataset(recipe: Recipe, data_dir: pathlib.Path, feed: Feed) -> Dataset:
    """Loads the data set of a recipe, which all its rows share."""
    config, *_ = recipe.rows.values()
    return open_dataset(config, data_dir, in_memory=feed.in_memory())
