"""``bench curvature``: the exact spectrum, exact products and Eq. 21, in time and memory.

    python -m experiments bench curvature

Times are compared as ratios within one run: every contender computes the same quantity for the
same images with the same weights, in turn. The network is a ResNet18 with random weights; no time
depends on them.
"""

import dataclasses
import functools
import importlib.util
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import timing
from experiments.bench.curvature_page import (
    LABELS,
    cost_figure,
    memory_figure,
    page_text,
    ratio_table,
)
from jaxrobust import curvature, losses
from jaxrobust.app import files, provenance
from jaxrobust.app.progress import progress
from jaxrobust.app.report import figures
from jaxrobust.models import create_model

STEP = 1e-2
"""t of Eq. 21; no time depends on it."""

TARGETS = (
    ("eq21", "spectrum", "at least", 4.0),
    ("torch", "spectrum", "at least", 2.5),
    ("torch_channels_last", "spectrum", "at least", 2.5),
    ("frobenius_marginal", "eq21_marginal", "at most", 1.5),
    ("frobenius_one", "eq21_one", "at most", 1.5),
    ("frobenius", "eq21", "at most", 1.5),
)
"""Numerator and denominator of a ratio of times, and what it should be."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured; the defaults are the full benchmark."""

    num_probes: int = 20
    rounds: int = 7
    compared_widths: tuple[int, ...] = (16, 64)
    num_classes: int = 10
    image_size: int = 32
    width: int = 16
    classes: tuple[int, ...] = (2, 10, 25, 50, 100)
    image_sizes: tuple[int, ...] = (16, 32, 64)
    widths: tuple[int, ...] = (8, 16, 32, 64)
    memory_probes: tuple[int, ...] = (1, 5, 20, 40)
    batch_size: int = 32
    large_batch_size: int = 16  # of networks wider than ``width`` or images larger than usual


QUICK = Settings(num_probes=2, rounds=2, compared_widths=(8,), num_classes=3, image_size=32,
                 width=8, classes=(2, 3), image_sizes=(32,), widths=(8,), memory_probes=(1, 2),
                 batch_size=2, large_batch_size=2)
"""Shows that everything works, and nothing else."""


class Case(NamedTuple):
    """A network and its images."""

    num_classes: int
    image_size: int
    width: int
    batch_size: int


class Problem(NamedTuple):
    """A network with its weights, and images to measure it at."""

    model: Any
    variables: Any
    images: jax.Array  # shape=[B, S, S, 3]
    labels: jax.Array  # shape=[B]


class Program(NamedTuple):
    """A compiled contender."""

    call: Callable[[], object]
    compile_seconds: float
    temp_bytes: int


def measure(folder: pathlib.Path, *, quick: bool = False) -> str:
    """Writes ``bench.json``, ``bench.md`` and two figures; what is there is measured anew.

    Returns:
      The table of ratios.

    Raises:
      InputError: (a ValueError) if the folder holds something else, or other settings.
    """
    settings = QUICK if quick else Settings()
    result = {"benchmark": "curvature", "settings": dataclasses.asdict(settings)}
    files.claim(folder, "settings.json", json.dumps(result, indent=2) + "\n")
    made = provenance.describe()
    torch_missing = why_no_torch()
    if torch_missing is None:
        made["versions"]["torch"] = _torch().__version__
    load = [timing.load_average()]
    cases = _measure_all(settings, torch_missing is None)
    result |= {
        "provenance": made | {
            "cores": timing.cores(), "load_average": [*load, timing.load_average()]},
        "torch": torch_missing or "measured",
        "cases": cases,
        "ratios": _ratios(settings, cases, torch_missing),
        "memory": _measure_memory(settings),
        "crossover": _crossovers(settings, cases),
    }
    files.write_json(folder / "bench.json", result)
    swept = {name: [_find(cases, case) for case in sweep]
             for name, sweep in _sweeps(settings).items()}
    figures.save(cost_figure(swept), folder / "cost")
    figures.save(memory_figure(result["memory"]), folder / "memory")
    files.write_text(folder / "bench.md", page_text(result, swept))
    return ratio_table(result)


@functools.cache
def make_problem(case: Case) -> Problem:
    """A ResNet18 with random weights, and uniform noise as images."""
    model = create_model("resnet18", num_classes=case.num_classes, num_features=128,
                         width=case.width, mean=(0.5,) * 3, std=(0.25,) * 3)
    shape = (case.batch_size, case.image_size, case.image_size, 3)
    draw = np.random.default_rng(0)

    def weights(path, leaf):
        if path[-1].key == "kernel":
            bound = np.prod(leaf.shape[:-1])**-0.5
            return jnp.asarray(draw.uniform(-bound, bound, leaf.shape), leaf.dtype)
        return jnp.full(leaf.shape, path[-1].key in ("scale", "var"), leaf.dtype)

    # Drawn here, as the model itself does: to compile that would take longer than most cases.
    shapes = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0),
                            jax.ShapeDtypeStruct(shape, jnp.float32))
    return Problem(model, jax.tree_util.tree_map_with_path(weights, shapes),
                   jnp.asarray(draw.uniform(size=shape), jnp.float32),
                   jnp.arange(case.batch_size) % case.num_classes)


def lower(case: Case, contender: str, num_probes: int) -> tuple[jax.stages.Lowered, tuple]:
    """A contender of this library, "spectrum", "eq21" or "frobenius", and its arguments."""
    problem = make_problem(case)

    def compute(variables, images, labels, key):
        def logits(images):
            return problem.model.apply(variables, images, train=False).logits

        def loss(images):
            return losses.softmax_cross_entropy(logits(images), labels)

        if contender == "spectrum":
            return curvature.piecewise_linear_spectrum(logits, images)
        if contender == "eq21":
            return curvature.finite_difference_curvature(
                loss, images, key, step=STEP, num_probes=num_probes)
        return curvature.squared_frobenius(loss, images, key, num_probes=num_probes)

    arguments = (problem.variables, problem.images, problem.labels, jax.random.key(2))
    return jax.jit(compute).lower(*arguments), arguments


@functools.cache
def make_program(case: Case, contender: str, num_probes: int) -> Program:
    """Compiles a contender of this library."""
    start = time.perf_counter()
    lowered, arguments = lower(case, contender, num_probes)
    compiled = lowered.compile()
    return Program(lambda: jax.block_until_ready(compiled(*arguments)),
                   time.perf_counter() - start,
                   compiled.memory_analysis().temp_size_in_bytes)


def why_no_torch() -> str | None:
    """Why PyTorch cannot be compared with, in one line; None if it can."""
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed; `pip install -e .[bench]` does it"
    if jax.default_backend() != "cpu" and not _torch().cuda.is_available():
        return f"PyTorch here has no {jax.default_backend()} to compute on"
    return None


def _torch():
    """PyTorch, whose import takes seconds and which few have."""
    import torch

    return torch


def make_torch_call(case: Case, num_probes: int, *, channels_last: bool
                    ) -> Callable[[], object]:
    """Eq. 21 in PyTorch for the same weights and images.

    On as many threads as JAX has cores, or on one if that is faster: PyTorch's wait for each
    other by spinning, which makes it many times slower where cores are shared with others.
    """
    from experiments.bench import torch_peer

    torch = _torch()
    problem = make_problem(case)
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    layout = torch.channels_last if channels_last else torch.contiguous_format
    module = torch_peer.convert(problem.model, problem.variables).to(device, memory_format=layout)
    images = torch_peer.to_torch(np.asarray(problem.images)).to(device, memory_format=layout)
    labels = torch.from_numpy(np.asarray(problem.labels, np.int64)).to(device)
    def compute(num_threads, num_probes):
        torch.set_num_threads(num_threads)
        return torch_peer.finite_difference_curvature(
            module, images, labels, lambda _: torch.randn_like(images), step=STEP,
            num_probes=num_probes).cpu()

    trials = {number: functools.partial(compute, number, 1) for number in {1, timing.cores()}}
    seconds = timing.in_turn(trials, 1)
    num_threads = min(trials, key=lambda number: seconds[number])
    return functools.partial(compute, num_threads, num_probes)


def crossover(classes: Sequence[int], exact: Sequence[float], sampled: Sequence[float]
              ) -> float | None:
    """The number of classes from which sampling is the cheaper one.

    Interpolated between the measured ones, both times as powers of C. The first measured one if
    sampling is cheaper there already; None if the exact form is cheaper at all of them.
    """
    gaps = [float(np.log(a / b)) for a, b in zip(exact, sampled, strict=True)]
    above = next((i for i, gap in enumerate(gaps) if gap >= 0), None)
    if above is None:
        return None
    if above == 0:
        return float(classes[0])
    low, high = np.log(classes[above - 1]), np.log(classes[above])
    share = -gaps[above - 1] / (gaps[above] - gaps[above - 1])
    return float(np.exp(low + share * (high - low)))


def _case(settings: Settings, **changes: int) -> Case:
    sizes = {"num_classes": settings.num_classes, "image_size": settings.image_size,
             "width": settings.width} | changes
    large = sizes["width"] > settings.width or sizes["image_size"] > settings.image_size
    return Case(**sizes,
                batch_size=settings.large_batch_size if large else settings.batch_size)


def _compared(settings: Settings) -> list[Case]:
    return [_case(settings, width=width) for width in settings.compared_widths]


def _sweeps(settings: Settings) -> dict[str, list[Case]]:
    """Cases that differ in one size, by its name."""
    return {
        "num_classes": [_case(settings, num_classes=c) for c in settings.classes],
        "image_size": [_case(settings, image_size=s) for s in settings.image_sizes],
        "width": [_case(settings, width=w) for w in settings.widths],
    }


def _contenders(case: Case, settings: Settings, with_torch: bool) -> list[str]:
    names = ["spectrum", "eq21", "frobenius"]
    if case in _compared(settings):
        names += ["eq21_one", "frobenius_one"]
        names += ["torch", "torch_channels_last"] if with_torch else []
    return names


def _call(case: Case, name: str, num_probes: int) -> Callable[[], object]:
    if name.startswith("torch"):
        return make_torch_call(case, num_probes, channels_last=name == "torch_channels_last")
    kind, _, one = name.partition("_")
    return make_program(case, kind, 1 if one else num_probes).call


def _measure_all(settings: Settings, with_torch: bool) -> list[dict]:
    """Times of every case."""
    swept = [case for sweep in _sweeps(settings).values() for case in sweep]
    contenders = {case: _contenders(case, settings, with_torch)
                  for case in dict.fromkeys([*_compared(settings), *swept])}
    total = (1 + settings.rounds) * sum(map(len, contenders.values()))
    with progress("bench curvature", total) as shown:
        return [
            _measure_case(case, settings, names, lambda name, seconds: shown.advance(
                **{f"seconds of {LABELS[name]}": seconds}))
            for case, names in contenders.items()]


def _measure_case(case: Case, settings: Settings, names: Sequence[str],
                  done: Callable[[str, float], None]) -> dict:
    calls = {name: _call(case, name, settings.num_probes) for name in names}
    times = {name: [1e3 * value / case.batch_size for value in values]
             for name, values in timing.in_turn(calls, settings.rounds, done).items()}
    for name in ("eq21", "frobenius"):
        if f"{name}_one" in times:
            times[f"{name}_marginal"] = [
                (of_all - of_one) / (settings.num_probes - 1)
                for of_all, of_one in zip(times[name], times[f"{name}_one"], strict=True)]
    programs = {name: make_program(case, name, settings.num_probes)
                for name in ("spectrum", "eq21", "frobenius")}
    return {
        **case._asdict(),
        "ms_per_image": {name: {**timing.summarise(values)._asdict(), "rounds": values}
                         for name, values in times.items()},
        "torch_threads": {name: call.args[0] for name, call in calls.items()
                          if name.startswith("torch")},
        "compile_seconds": {name: p.compile_seconds for name, p in programs.items()},
        "temp_bytes": {name: p.temp_bytes for name, p in programs.items()},
    }


def _measure_memory(settings: Settings) -> list[dict]:
    case = _case(settings)
    return [
        {"num_probes": number, **{name: make_program(case, name, number).temp_bytes
                                  for name in ("frobenius", "eq21")}}
        for number in settings.memory_probes]


def _find(cases: Sequence[dict], case: Case) -> dict:
    return next(found for found in cases
                if all(found[name] == value for name, value in case._asdict().items()))


def _ratios(settings: Settings, cases: Sequence[dict], torch_missing: str | None) -> list[dict]:
    """Of the comparison, with their targets."""
    rows = []
    for case in _compared(settings):
        times = _find(cases, case)["ms_per_image"]
        for numerator, denominator, bound, target in TARGETS:
            row = {"numerator": numerator, "denominator": denominator, "width": case.width,
                   "batch_size": case.batch_size, "bound": bound, "target": target}
            if numerator not in times:
                rows.append(row | {"not_measured": torch_missing})
                continue
            ratio = timing.ratio(times[numerator]["rounds"], times[denominator]["rounds"])
            rows.append(row | {
                "numerator_ms": times[numerator]["median"],
                "denominator_ms": times[denominator]["median"], **ratio._asdict(),
                "met": ratio.ratio >= target if bound == "at least" else ratio.ratio <= target})
    return rows


def _crossovers(settings: Settings, cases: Sequence[dict]) -> dict[str, float | None]:
    """By sampling method."""
    swept = [_find(cases, case)["ms_per_image"] for case in _sweeps(settings)["num_classes"]]
    return {
        name: crossover(settings.classes, [times["spectrum"]["median"] for times in swept],
                        [times[name]["median"] for times in swept])
        for name in ("eq21", "frobenius")}
