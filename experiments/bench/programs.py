"""What runs execute: several seeds at once, the host's share, devices, the start, an epoch.

The programs are those of :mod:`jaxrobust.app.program`, called as the trainer calls them. The images
of ResNet18 are noise and its weights random: no time depends on them.
"""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import timing
from jaxrobust import data, parallel, training
from jaxrobust.app.config import RunConfig
from jaxrobust.app.execution import STEPS_PER_CALL
from jaxrobust.app.program import (
    initial_state,
    model_of,
    num_train_of,
    optimizer_of,
    program_of,
    stack_configs,
    stack_runs,
)
from jaxrobust.app.recipe import get_recipe
from jaxrobust.app.trainer import make_splits
from jaxrobust.data import Dataset, Split
from jaxrobust.parallel import Layout, make_layout

Done = Callable[[str, float], None]
"""Is told a name and the seconds of every turn."""

CASES = ("resnet18", "digits")
"""ResNet18 on images of 32 x 32 x 3, and the recipe `digits`: a small network on 8 x 8 x 1."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured; the defaults are the full benchmark on CPUs."""

    method: str = "robust"
    width: int = 8  # of ResNet18
    batch_size: int = 64
    num_images: int = 640  # of noise
    seeds: int = 8
    seed_cases: tuple[str, ...] = CASES
    seed_rounds: int = 3
    seed_steps_per_call: int = 1
    seed_target: float | None = None
    steps_per_call: tuple[tuple[str, tuple[int, ...]], ...] = (
        ("resnet18", (1, 4)), ("digits", (1, 4, 16)))
    default_steps_per_call: int = 1  # of the trainer here
    host_rounds: int = 7
    loops: tuple[tuple[str, int], ...] = (("resnet18", 4), ("digits", 4))
    loop_rounds: int = 2  # of half a minute each
    host_target: float = 0.02
    devices: tuple[tuple[str, tuple[int, ...]], ...] = (
        ("resnet18", (2, 8)), ("digits", (1, 2, 4, 8)))
    device_rounds: int = 3
    start_width: int = 64  # of ResNet18
    start_methods: tuple[str, ...] = ("both", "robust")
    start_cases: tuple[str, ...] = CASES
    epoch_batch_sizes: tuple[int, ...] = ()
    epoch_dtypes: tuple[str, ...] = ("float32", "bfloat16")
    epoch_methods: tuple[str, ...] = ("both", "robust")
    epoch_rounds: int = 2
    epochs: int = 200


ACCELERATOR = Settings(
    width=64, num_images=50_000, seed_rounds=5, seed_steps_per_call=STEPS_PER_CALL,
    seed_target=3.0, steps_per_call=tuple((case, (1, STEPS_PER_CALL)) for case in CASES),
    default_steps_per_call=STEPS_PER_CALL, loops=(),
    devices=tuple((case, (1, 2, 4, 8)) for case in CASES), device_rounds=7,
    epoch_batch_sizes=(64, 512))
"""The full benchmark on accelerators, where updates run in a loop and an epoch is affordable."""

QUICK = Settings(
    method="normal", width=1, batch_size=4, num_images=8, seeds=2, seed_cases=("digits",),
    seed_rounds=2, steps_per_call=(("digits", (1, 2)),), host_rounds=2, loops=(("digits", 2),),
    devices=(("digits", (2,)),), device_rounds=2,
    start_width=1, start_methods=("normal",), start_cases=("digits",))
"""Shows that everything works, and nothing else."""


def settings_for(platform: str, *, quick: bool = False) -> Settings:
    """The settings on a platform, "cpu" or another."""
    if quick:
        return QUICK
    return Settings() if platform == "cpu" else ACCELERATOR


def run_config(case: str, settings: Settings, **changes: Any) -> RunConfig:
    """The run of one of :data:`CASES`."""
    if case == "digits":
        config = get_recipe("digits").run(settings.method, 0)
    else:
        config = RunConfig(dataset="cifar10", select="last", method=settings.method,
                           width=settings.width)
    return dataclasses.replace(config, batch_size=settings.batch_size, **changes)


@functools.cache
def noise_images(num_images: int) -> Dataset:
    """As many images of noise in the shape of CIFAR-10, in ten classes."""
    draw = np.random.default_rng(0)
    split = Split(draw.integers(256, size=(num_images, 32, 32, 3), dtype=np.uint8),
                  np.arange(num_images, dtype=np.int32) % 10)
    return Dataset("cifar10", split, split, class_names=tuple("0123456789"), mean=(0.5,) * 3,
                   std=(0.25,) * 3, flip=True)


def dataset_of(config: RunConfig, num_images: int) -> Dataset:
    """The real digits, or images of noise."""
    return data.load_dataset("digits") if config.dataset == "digits" else noise_images(num_images)


def random_state(config: RunConfig, dataset: Dataset) -> training.TrainState:
    """A state with weights drawn as the model draws them, but here.

    To compile the model's own drawing takes longer than most of what is measured.
    """
    optimizer, _ = optimizer_of(config, num_train_of(config, dataset))
    key = jax.random.key(config.seed)
    shapes = jax.eval_shape(
        functools.partial(training.create_train_state, model_of(config, dataset), optimizer), key,
        jax.ShapeDtypeStruct((1, *dataset.train.images.shape[1:]), jnp.float32))
    draw = np.random.default_rng(config.seed)

    def weights(path, leaf):
        name = path[-1].key
        if name == "kernel":
            bound = np.prod(leaf.shape[:-1])**-0.5
            return jnp.asarray(draw.uniform(-bound, bound, leaf.shape), leaf.dtype)
        return jnp.full(leaf.shape, name in ("scale", "var"), leaf.dtype)

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
                         (shapes.step, shapes.opt_state, shapes.centroids))
    return training.TrainState(
        *zeros[:1], jax.tree_util.tree_map_with_path(weights, shapes.params),
        jax.tree_util.tree_map_with_path(weights, shapes.batch_stats), *zeros[1:], key)


class Runner:
    """A run, or several that are trained together, stepping as in the trainer."""

    def __init__(self, configs: Sequence[RunConfig], dataset: Dataset, layout: Layout,
                 num_steps: int, *, loop: bool = False):
        """``loop`` forces a compiled loop over the updates of a call, also on CPUs."""
        config = configs[0]
        split = make_splits(dataset, config).train
        program = program_of(configs, dataset, layout)
        states = [parallel.replicate(layout, random_state(c, dataset)) for c in configs]
        self.state = stack_runs(states)
        images, labels = parallel.replicate(layout, (split.images[:], split.labels))
        self.shared = (images, labels, program.order(self.state.key, 1),
                       parallel.replicate(layout, stack_configs(configs)))
        self.positions = parallel.place_batch(
            layout, np.arange(config.batch_size, dtype=np.int32)[layout.rows_of(config.batch_size)],
            config.batch_size)
        self.step = _looping(program.resident(1), num_steps) if loop else (
            program.resident(num_steps))
        self.num_steps = num_steps

    def start(self) -> Any:
        """Starts a call and returns its metrics, which may not be there yet."""
        self.state, metrics = self.step(self.state, self.shared, self.positions)
        return metrics

    def call(self) -> None:
        """A call, waited for."""
        jax.block_until_ready((self.start(), self.state))


def _looping(step, num_steps):
    one = step.__wrapped__  # Options of the compiler are those of the whole loop.

    def steps(state, shared, positions):
        return jax.lax.scan(lambda state, _: one(state, shared, positions), state,
                            length=num_steps)

    return parallel.compile(make_layout("jit"), steps, donate_argnums=0)


def ratio_row(numerator: str, denominator: str, case: str, above: Sequence[float],
              below: Sequence[float], bound: str | None = None, target: float | None = None
              ) -> dict:
    """A ratio of times by round, as a row of the table; without a target if there is none."""
    ratio = timing.ratio(above, below)
    row = {"numerator": numerator, "denominator": denominator, "case": case, **ratio._asdict()}
    if target is None:
        return row
    met = ratio.ratio >= target if bound == "at least" else ratio.ratio <= target
    return row | {"bound": bound, "target": target, "met": met}


def summary(milliseconds: Sequence[float]) -> dict:
    """Median, quartiles and the rounds themselves."""
    return {**timing.summarise(milliseconds)._asdict(), "rounds": list(milliseconds)}


def case_name(config: RunConfig) -> str:
    """A run, as the tables name it."""
    model = {"resnet18": "ResNet18", "small_cnn": "small network"}[config.model]
    dtype = "" if config.dtype == "float32" else f", {config.dtype}"
    return f"{model}, width {config.width}, `{config.method}`, batch {config.batch_size}{dtype}"


def measure_seeds(settings: Settings, done: Done = lambda *_: None) -> dict:
    """One run against several seeds as one vmapped program.

    Returns:
      ``{"cases": [...], "ratios": [...]}``: for each case ``case, seeds, steps_per_call`` and
      ``ms_per_update`` of ``one`` and ``together``; ratios as :func:`ratio_row` makes them.
    """
    cases, ratios = [], []
    for name in settings.seed_cases:
        configs = [run_config(name, settings, seed=seed) for seed in range(settings.seeds)]
        dataset, layout = dataset_of(configs[0], settings.num_images), make_layout("jit")
        num_steps = settings.seed_steps_per_call
        times = timing.in_turn({
            "one": Runner(configs[:1], dataset, layout, num_steps).call,
            "together": Runner(configs, dataset, layout, num_steps).call,
        }, settings.seed_rounds, done)
        times = _per_update(times, dict.fromkeys(times, num_steps))
        case = case_name(configs[0])
        cases.append({"case": case, "seeds": settings.seeds, "steps_per_call": num_steps,
                      "ms_per_update": {key: summary(ms) for key, ms in times.items()}})
        ratios.append(ratio_row(f"{settings.seeds} seeds in one program", "one seed", case,
                                times["together"], times["one"], "at most",
                                settings.seed_target))
    return {"cases": cases, "ratios": ratios}


def _per_update(seconds: Mapping[str, Sequence[float]], num_steps: Mapping[str, int]
                ) -> dict[str, list[float]]:
    """Milliseconds of an update, from the seconds of a call."""
    return {name: [1e3 * value / num_steps[name] for value in values]
            for name, values in seconds.items()}


class _Watched:
    """A runner whose calls are taken apart into the host's part and the rest."""

    def __init__(self, runner: Runner):
        self.runner = runner
        self.calls: list[tuple[float, float, float]] = []

    def call(self):
        """A call, waited for; the state that it starts from is ready."""
        begun, worked = time.perf_counter(), time.thread_time()
        metrics = self.runner.start()
        worked, returned = time.thread_time() - worked, time.perf_counter()
        jax.block_until_ready((metrics, self.runner.state))
        self.calls.append((worked, returned - begun, time.perf_counter() - begun))

    def milliseconds(self) -> dict[str, list[float]]:
        """Of an update: processor time of the host's thread, time until a call returns, and
        until its result is there. The first call, which compiles, is left out."""
        parts = 1e3 * np.array(self.calls[1:]) / self.runner.num_steps
        return {name: [float(value) for value in values]
                for name, values in zip(("thread", "returns", "step"), parts.T, strict=True)}


def measure_host(settings: Settings, done: Done = lambda *_: None) -> dict:
    """How long the host is busy for an update, and what several updates in a call change.

    A call is started when the result of the one before is there. The host is busy until it
    returns, which it does before it is computed. On CPUs the same cores compute, and may take the
    host's from it meanwhile; there the processor time of its thread counts instead.

    Returns:
      ``{"cases": [...], "ratios": [...]}``: for each case and form ``case, form`` ("1 update",
      "4 updates unrolled", "4 updates in a loop"), ``updates``, ``first_call_s`` (it compiles),
      ``calls``, and ``ms_per_update``, a median with its quartiles, of ``thread`` (processor time
      of the host's thread), ``returns`` (until the call returns) and ``step`` (until its result
      is there).
    """
    cases, ratios = [], []
    on_cpu = jax.default_backend() == "cpu"
    loops = dict(settings.loops)
    for name, numbers in settings.steps_per_call:
        config = run_config(name, settings)
        dataset, layout = dataset_of(config, settings.num_images), make_layout("jit")
        several = "unrolled" if on_cpu else "in a loop"
        kinds = {number: _updates(number, several) for number in numbers}
        watched = {kind: _Watched(Runner([config], dataset, layout, number))
                   for number, kind in kinds.items()}
        alone, case = _updates(1, several), case_name(config)
        compared = [(list(watched), settings.host_rounds)]
        if name in loops:
            looped = _updates(loops[name], "in a loop")
            watched[looped] = _Watched(Runner([config], dataset, layout, loops[name], loop=True))
            compared.append(([alone, looped], settings.loop_rounds))
        for forms, rounds in compared:
            times = _per_update(
                timing.in_turn({form: watched[form].call for form in forms}, rounds, done),
                {form: watched[form].runner.num_steps for form in forms})
            ratios += [ratio_row(f"an update, {form}", f"an update, {alone}", case,
                                 times[form], times[alone]) for form in forms if form != alone]
        for form, each in watched.items():
            parts = each.milliseconds()
            cases.append({"case": case, "form": form, "updates": each.runner.num_steps,
                          "first_call_s": each.calls[0][2],
                          "calls": len(parts["step"]),
                          "ms_per_update": {part: timing.summarise(ms)._asdict()
                                            for part, ms in parts.items()}})
            default = form == kinds.get(settings.default_steps_per_call)
            ratios.append(ratio_row(
                "the host's part of it", "an update", f"{case}, {form} in a call",
                parts["thread" if on_cpu else "returns"], parts["step"], "at most",
                settings.host_target if default else None))
    return {"cases": cases, "ratios": ratios}


def _updates(number: int, how: str) -> str:
    """A form, in words."""
    return "1 update" if number == 1 else f"{number} updates {how}"


def measure_devices(settings: Settings, done: Done = lambda *_: None) -> dict:
    """One batch over several devices, in each form.

    CPU devices are views of the same cores: what is measured there, in a process that has enough
    of them, is what the form costs, and not a speed-up. Elsewhere the devices there are.

    Returns:
      ``{"shared_cores": bool, "cases": [...], "ratios": [...]}``: for each case, form and number
      of devices ``case, form, devices`` and ``ms_per_update``.
    """
    if jax.default_backend() == "cpu":
        start = time.perf_counter()
        result = _in_process("devices", dataclasses.asdict(settings), {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count="
                         f"{max(max(numbers) for _, numbers in settings.devices)}"})
        done("the process with several devices", time.perf_counter() - start)
        return result
    return _measure_devices(settings, done)


def _measure_devices(settings: Settings, done: Done) -> dict:
    cases, ratios = [], []
    for name, numbers in settings.devices:
        config = run_config(name, settings)
        dataset = dataset_of(config, settings.num_images)
        layouts = {"jit": make_layout("jit")} | {
            f"{form} {number}": make_layout(form, jax.devices()[:number])
            for form in ("mesh", "pmap")
            for number in numbers if number <= len(jax.devices())}
        runners = {key: Runner([config], dataset, layout, settings.default_steps_per_call)
                   for key, layout in layouts.items()}
        for runner in runners.values():
            # A mesh of one device compiles twice: for the state as it is put there, and as the
            # step returns it.
            runner.call()
        times = _per_update(
            timing.in_turn({key: runner.call for key, runner in runners.items()},
                           settings.device_rounds, done),
            dict.fromkeys(runners, settings.default_steps_per_call))
        case = case_name(config)
        for key, layout in layouts.items():
            cases.append({"case": case, "form": layout.form, "devices": layout.num_devices,
                          "ms_per_update": summary(times[key])})
            if key != "jit":
                ratios.append(ratio_row(
                    f"{layout.form} on {layout.num_devices} device"
                    f"{'s' if layout.num_devices > 1 else ''}", "jit on one", case,
                    times[key], times["jit"]))
    return {"shared_cores": jax.default_backend() == "cpu", "cases": cases, "ratios": ratios}


PHASES = ("start", "import", "data", "state", "lower", "compile", "first", "second")
"""Of a process: Python's start, the import of the commands, the data set, the initial state and
the images on the device, tracing and lowering a step, compiling it, its first and second call."""


def measure_start(settings: Settings, done: Done = lambda *_: None) -> dict:
    """Time to the first step in a new process, with and without a filled compilation cache.

    Returns:
      ``{"cases": [...], "ratios": [...]}``: for each case ``case`` and, by "cold" and "warm",
      the seconds of each of :data:`PHASES`.
    """
    cases, ratios = [], []
    for name in settings.start_cases:
        for method in settings.start_methods:
            changed = dataclasses.replace(settings, method=method, width=settings.start_width)
            given = {"case": name, "settings": dataclasses.asdict(changed)}
            seconds = {}
            with tempfile.TemporaryDirectory() as cache:
                for kind in ("cold", "warm"):
                    seconds[kind] = _in_process("start", given, {
                        "JAX_ENABLE_COMPILATION_CACHE": "true",
                        "JAX_COMPILATION_CACHE_DIR": cache,
                        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"})
                    done(f"the first step, {kind}", to_first_step(seconds[kind]))
            case = case_name(run_config(name, changed))
            cases.append({"case": case, **seconds})
            ratios.append(ratio_row(
                "to the first step, cache warm", "cache cold", case,
                *([to_first_step(seconds[kind])] for kind in ("warm", "cold"))))
    return {"cases": cases, "ratios": ratios}


def to_first_step(seconds: Mapping[str, float]) -> float:
    """From the command to the result of its first step."""
    return sum(seconds[phase] for phase in PHASES[:-1])


def _measure_start(case: str, settings: Settings) -> dict[str, float]:
    """The phases from the data set on."""
    marks = [time.perf_counter()]

    def mark(value):
        jax.block_until_ready(value)
        marks.append(time.perf_counter())
        return value

    config, layout = run_config(case, settings), make_layout("jit")
    dataset = dataset_of(config, settings.num_images)
    split = mark(make_splits(dataset, config).train)
    state = initial_state(config, dataset, layout)
    program = program_of([config], dataset, layout)
    shared = parallel.replicate(layout, (
        split.images[:], split.labels, program.order(state.key, 1), stack_configs([config])))
    positions = mark((parallel.place_batch(
        layout, np.arange(config.batch_size, dtype=np.int32), config.batch_size), shared))[0]
    lowered = program.resident(settings.default_steps_per_call).lower(state, shared, positions)
    mark(())
    compiled = lowered.compile()
    mark(())
    state, _ = mark(compiled(state, shared, positions))
    mark(compiled(state, shared, positions))
    return dict(zip(PHASES[2:], np.diff(marks).tolist(), strict=True))


def measure_epoch(settings: Settings, done: Done = lambda *_: None) -> dict:
    """An epoch of 50,000 images on an accelerator, and what all epochs would take.

    Returns:
      ``{"cases": [...]}``: ``case, images, updates, seconds`` (of an epoch, a summary) and
      ``projected_s``; or ``{"not_measured": reason}``.
    """
    if not settings.epoch_batch_sizes:
        return {"not_measured": "an epoch of ResNet18 takes over an hour on a CPU"
                if jax.default_backend() == "cpu" else "this was a quick run"}
    cases = []
    for dtype in settings.epoch_dtypes:
        for size in settings.epoch_batch_sizes:
            calls, updates = {}, {}
            for method in settings.epoch_methods:
                config = dataclasses.replace(run_config("resnet18", settings), dtype=dtype,
                                             batch_size=size, method=method)
                name = case_name(config)
                calls[name], updates[name] = _epoch(config, settings)
            for name, seconds in timing.in_turn(calls, settings.epoch_rounds, done).items():
                cases.append({
                    "case": name, "images": settings.num_images, "updates": updates[name],
                    "seconds": summary(seconds),
                    "projected_s": settings.epochs * timing.summarise(seconds).median})
    return {"cases": cases}


def _epoch(config: RunConfig, settings: Settings) -> tuple[Callable[[], None], int]:
    """An epoch as the trainer does it, without its logs and checkpoints."""
    dataset, layout = dataset_of(config, settings.num_images), make_layout("jit")
    program = program_of([config], dataset, layout)
    state = [parallel.replicate(layout, random_state(config, dataset))]
    images, labels, run = parallel.replicate(
        layout, (dataset.train.images, dataset.train.labels, stack_configs([config])))
    batches = data.batch_sizes(settings.num_images, config.batch_size)
    positions = {size: parallel.place_batch(layout, np.arange(size, dtype=np.int32), size)
                 for size in set(batches)}
    epochs = iter(range(1, settings.epochs + 1))

    def call():
        order = program.order(state[0].key, next(epochs))
        for num_steps, size in data.group_batches(batches, settings.default_steps_per_call):
            state[0], _ = program.resident(num_steps)(
                state[0], (images, labels, order, run), positions[size])
        jax.block_until_ready(state[0])

    return call, len(batches)


def _in_process(task: str, given: Mapping[str, Any], environment: Mapping[str, str]) -> Any:
    """What a task returns in a process of its own, from its start on.

    Raises:
      RuntimeError: with the process's last words, if it fails.
    """
    root = str(pathlib.Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        answer = pathlib.Path(folder) / "answer.json"
        # As `python -m experiments` begins: with the import of all commands.
        program = ("import time; begun = time.time(); import experiments.__main__; "
                   "imported = time.time(); from experiments.bench import programs; "
                   "programs.answer(begun, imported)")
        done = subprocess.run(
            [sys.executable, "-c", program, task, json.dumps(given), str(answer),
             str(time.time())],
            # This process keeps most of an accelerator's memory; the rest is enough.
            env={**os.environ, "PYTHONPATH": path, "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
                 **environment},
            capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"The process of {task!r} failed:\n{done.stderr[-4000:]}")
        return json.loads(answer.read_text())


def answer(begun: float, imported: float) -> None:
    """The other side of :func:`_in_process`: does the task that the command line names."""
    task, given, path, called = sys.argv[1:]
    given = json.loads(given)
    if task == "devices":
        result = _measure_devices(_settings(given), lambda *_: None)
    else:
        result = {"start": begun - float(called), "import": imported - begun,
                  **_measure_start(given["case"], _settings(given["settings"]))}
    pathlib.Path(path).write_text(json.dumps(result))


def _settings(given: Mapping[str, Any]) -> Settings:
    """Settings from JSON, which has no tuples."""
    return Settings(**{name: _tuples(value) for name, value in given.items()})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
