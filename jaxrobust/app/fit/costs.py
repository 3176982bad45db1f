"""Measures what training costs on this machine."""

import statistics
import time

import jax
import numpy as np

from jaxrobust.app.config import RunConfig, with_settings
from jaxrobust.app.fit.schedule import Costs, Work
from jaxrobust.app.program import (
    STATISTICS_IMAGES,
    class_weights_of,
    initial_state,
    method_of,
    program_of,
    stack_configs,
)
from jaxrobust.app.trainer import make_splits
from jaxrobust.data import Dataset, batch_sizes
from jaxrobust.parallel import Layout, place_batch, replicate

UPDATES, MOST_SECONDS = 10, 20.0
"""Updates to time, and the time after which fewer suffice."""
OTHER_PROGRAMS = 0.5
"""Time to compile the programs of a method's statistics and tests, over that of its update."""


def relative_work(config: RunConfig, dataset: Dataset) -> float:
    """The work of an update of a run, in units of ``normal``."""
    return method_of(config, class_weights_of(config, dataset)).passes.relative


def measure_costs(config: RunConfig, dataset: Dataset, layout: Layout) -> Costs:
    """Compiles the update of a run and times some updates, of which the median counts."""
    # A rate that no other run has, so that compiling is measured and not a look into the cache.
    salt = 1 + 1e-3 * float(np.random.default_rng().random())
    config = with_settings(
        config, {"optimizer.learning_rate": salt * config.optimizer.learning_rate})
    size, split = config.batch_size, make_splits(dataset, config).train
    positions = np.arange(size, dtype=np.int32)[layout.rows_of(size)]
    batch = place_batch(
        layout, (split.images[positions], split.labels[positions], positions), size)
    program, state = program_of([config], dataset, layout), initial_state(config, dataset, layout)
    run = replicate(layout, stack_configs([config]))
    times: list[float] = []
    begin = time.monotonic()
    while len(times) <= 1 or len(times) <= UPDATES and sum(times[1:]) < MOST_SECONDS:
        state, _ = program.streamed(state, run, batch)
        jax.block_until_ready(state)
        times.append(time.monotonic() - begin)
        begin = time.monotonic()
    first, *others = times
    update = statistics.median(others)
    passes = 3 * relative_work(config, dataset) * size
    # The last batch of an epoch has another size, and a program of its own.
    sizes = len(set(batch_sizes(len(split.labels), size)))
    return Costs((sizes + OTHER_PROGRAMS) * max(first - update, 0.0), update / passes)


def work_of(config: RunConfig, dataset: Dataset, draws: int, test_draws: int) -> Work:
    """Counts the images that a run trains on in an epoch, and those in its validation and tests.

    ``draws`` and ``test_draws`` are those of the noise on the validation and the test images.
    """
    splits = make_splits(dataset, config)
    num_train, num_held_out = len(splits.train.labels), len(splits.selection.labels)
    checkpoints = -(-config.epochs // config.checkpoint_every)
    in_statistics = 2 * min(num_train, STATISTICS_IMAGES)  # Both views.
    return Work(num_train, checkpoints * (in_statistics + num_held_out)
                + (1 + draws) * num_held_out + (1 + test_draws) * len(dataset.test.labels)
                + num_train + num_held_out)  # The doubt of predictions.
