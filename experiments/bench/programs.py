"""Times the programs of runs: several seeds at once, the host's share, an epoch.

They are those of :mod:`jaxrobust.app.program`, called as the trainer calls them. The images for
ResNet18 are noise: no time depends on them.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from experiments.bench import timing
from experiments.bench.timing import Contender, NotMeasured, Pair
from jaxrobust import data, parallel
from jaxrobust.app.config import RunConfig
from jaxrobust.app.execution import STEPS_PER_CALL
from jaxrobust.app.program import initial_state, program_of, stack_configs, stack_runs
from jaxrobust.app.recipe import get_recipe
from jaxrobust.app.trainer import make_splits
from jaxrobust.data import Dataset, Split
from jaxrobust.parallel import make_layout


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured; the defaults are the full benchmark on CPUs."""

    cases: tuple[str, ...] = ("resnet18", "digits")  # on 32 x 32 x 3, and the recipe `digits`
    method: str = "robust"
    width: int = 8  # of ResNet18
    batch_size: int = 64
    num_images: int = 640  # of noise
    rounds: int = 3
    seeds: int = 8
    seed_target: float | None = None
    steps_per_call: int = 1  # of the trainer here
    host_steps: tuple[int, ...] = (1, 4)  # updates in a call
    looped: int | None = 4  # updates in a compiled loop, which the trainer avoids on CPUs
    epochs: tuple[tuple[str, str, str, int], ...] = ()  # case, method, dtype, batch size
    epoch_rounds: int = 2


def settings_for(quick: bool) -> Settings:
    """The full benchmark of this platform, or a quick one to see that everything works.

    On accelerators, updates run in a loop, and an epoch takes little enough time.
    """
    if quick:
        return Settings(
            cases=("digits",), method="normal", batch_size=4, num_images=8, rounds=2, seeds=2,
            host_steps=(1, 2), looped=2, epochs=(("digits", "normal", "float32", 64),))
    if jax.default_backend() == "cpu":
        return Settings()
    return Settings(
        width=64, num_images=50_000, rounds=5, seed_target=3.0, steps_per_call=STEPS_PER_CALL,
        host_steps=(1, STEPS_PER_CALL), looped=None, epochs=tuple(itertools.product(
            ("resnet18",), ("both", "robust"), ("float32", "bfloat16"), (64, 512))))


def run_config(case: str, settings: Settings, **changes: Any) -> RunConfig:
    """The configuration of a case."""
    if case == "digits":
        config = get_recipe("digits").run(settings.method, 0)
    else:
        config = RunConfig(dataset="cifar10", select="last", method=settings.method,
                           width=settings.width)
    return dataclasses.replace(config, **{"batch_size": settings.batch_size} | changes)


@functools.cache
def noise_images(num_images: int) -> Dataset:
    """Draws images of noise with the shape of CIFAR-10, in ten classes."""
    draw = np.random.default_rng(0)
    split = Split(draw.integers(256, size=(num_images, 32, 32, 3), dtype=np.uint8),
                  np.arange(num_images, dtype=np.int32) % 10)
    return Dataset("cifar10", split, split, class_names=tuple("0123456789"), mean=(0.5,) * 3,
                   std=(0.25,) * 3, flip=True)


def dataset_of(config: RunConfig, settings: Settings) -> Dataset:
    """The data set of a case: digits, or images of noise."""
    if config.dataset == "digits":
        return data.load_dataset("digits")
    return noise_images(settings.num_images)


class Runner:
    """A run, or several that are trained together, updated as in the trainer."""

    def __init__(self, configs: Sequence[RunConfig], dataset: Dataset, num_steps: int, *,
                 loop: bool = False):
        """Compiles nothing yet; ``loop`` forces a compiled loop over updates, also on CPUs."""
        self.config, self.num_steps, layout = configs[0], num_steps, make_layout("jit")
        split = make_splits(dataset, self.config).train
        self.num_images = len(split.labels)
        self.program = program_of(configs, dataset, layout)
        self.state = stack_runs([initial_state(config, dataset, layout) for config in configs])
        self.shared = parallel.replicate(layout, (
            split.images[:], split.labels, self.program.order(self.state.key, 1),
            stack_configs(configs)))
        self.positions = self.place(self.config.batch_size)
        self.step = _looping(self.program.resident(1), num_steps) if loop else (
            self.program.resident(num_steps))
        self.host: list[float] = []  # seconds for which each call kept the host busy

    def place(self, size: int) -> jax.Array:
        """The positions of a batch of this size, on the device."""
        return parallel.place_batch(self.program.layout, np.arange(size, dtype=np.int32), size)

    def call(self) -> None:
        """Makes the updates of one call, and waits for them.

        The host is busy until the call returns. On CPUs, which compute meanwhile on the same cores,
        the processor time of the host's thread counts instead.
        """
        clock = time.thread_time if jax.default_backend() == "cpu" else time.perf_counter
        begun = clock()
        self.state, metrics = self.step(self.state, self.shared, self.positions)
        self.host.append(clock() - begun)
        jax.block_until_ready((self.state, metrics))

    def epoch(self) -> None:
        """Trains an epoch like the trainer, without logs and checkpoints."""
        images, labels, _, run = self.shared
        batches = data.batch_sizes(self.num_images, self.config.batch_size)
        number = int(self.state.step) // len(batches) + 1
        shared = images, labels, self.program.order(self.state.key, number), run
        for num_steps, size in data.group_batches(batches, self.num_steps):
            self.state, _ = self.program.resident(num_steps)(
                self.state, shared, self.place(size))
        jax.block_until_ready(self.state)


def _looping(step, num_steps):
    one = step.__wrapped__  # The compiler's options apply to the whole loop.

    def steps(state, shared, positions):
        return jax.lax.scan(lambda state, _: one(state, shared, positions), state,
                            length=num_steps)

    return parallel.compile(make_layout("jit"), steps, donate_argnums=0)


def case_name(config: RunConfig) -> str:
    """The name of a case in the tables."""
    model = {"resnet18": "ResNet18", "small_cnn": "small network"}[config.model]
    return f"{model}, width {config.width}, `{config.method}`, batch {config.batch_size}"


def measure_seeds(settings: Settings) -> timing.Parts:
    """Times one run against several seeds as one vmapped program."""
    together = f"{settings.seeds} seeds in one program"
    for name in settings.cases:
        configs = [run_config(name, settings, seed=seed) for seed in range(settings.seeds)]
        dataset = dataset_of(configs[0], settings)
        rows = timing.rows(case_name(configs[0]), {
            "one seed": Contender(Runner(configs[:1], dataset, settings.steps_per_call).call),
            together: Contender(Runner(configs, dataset, settings.steps_per_call).call),
        }, settings.rounds, per=settings.steps_per_call)
        yield rows, timing.ratios(rows, [Pair(together, "one seed", target=settings.seed_target)])


def measure_host(settings: Settings) -> timing.Parts:
    """Measures how long an update keeps the host busy, also with several updates in a call."""
    several = "unrolled" if jax.default_backend() == "cpu" else "in a loop"
    for name in settings.cases:
        config = run_config(name, settings)
        dataset = dataset_of(config, settings)
        runners = {_updates(number, several): Runner([config], dataset, number)
                   for number in settings.host_steps}
        if settings.looped is not None:
            runners[_updates(settings.looped, "in a loop")] = Runner(
                [config], dataset, settings.looped, loop=True)
        seconds = timing.in_turn({form: runner.call for form, runner in runners.items()},
                                 settings.rounds)
        rows = [timing.row(case_name(config), form, seconds[form], runner.num_steps,
                           # The first call compiles.
                           host_ms=1e3 * float(np.median(runner.host[1:])) / runner.num_steps)
                for form, runner in runners.items()]
        first, *others = runners
        default = _updates(settings.steps_per_call, several)
        yield rows, [
            *timing.ratios(rows, [Pair(form, first) for form in others]),
            *(timing.judged(
                Pair("the host's part", "an update", target=0.02 if form == default else None),
                f"{case_name(config)}, {form} in a call",
                ratio=row["host_ms"] / row["ms"]["median"])
              for form, row in zip(runners, rows, strict=True))]


def _updates(number: int, how: str) -> str:
    return "1 update" if number == 1 else f"{number} updates {how}"


def measure_epoch(settings: Settings) -> timing.Parts:
    """Times an epoch, and projects the time of 200 epochs."""
    if not settings.epochs:
        raise NotMeasured("an epoch of ResNet18 takes over an hour on a CPU")
    for name, method, dtype, batch_size in settings.epochs:
        config = run_config(name, dataclasses.replace(settings, method=method), dtype=dtype,
                            batch_size=batch_size)
        runner = Runner([config], dataset_of(config, settings), settings.steps_per_call)
        case = f"{case_name(config)}, {dtype}, {runner.num_images} images"
        seconds = timing.in_turn({case: runner.epoch}, settings.epoch_rounds)[case]
        yield [timing.row(case, "an epoch", seconds,
                          projected_min=200 * float(np.median(seconds)) / 60)], []
