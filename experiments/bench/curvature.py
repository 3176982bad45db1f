"""The exact spectrum, exact products and Eq. 21, in time and memory.

Every contender computes the same quantity for the same images with the same weights.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax

from experiments.bench import problem, timing
from experiments.bench.problem import Case
from experiments.bench.timing import Pair
from jaxrobust import curvature, losses

STEP = 1e-2
"""t of Eq. 21; no time depends on it."""

SPECTRUM, EQ21, PRODUCTS = "exact spectrum", "Eq. 21", "exact products"
TORCH = {"Eq. 21 in PyTorch": False, "Eq. 21 in PyTorch, channels last": True}
"""The forms in PyTorch, and whether the channels are last."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured; the defaults are the full benchmark."""

    num_probes: int = 20
    rounds: int = 7
    compared: tuple[tuple[int, int], ...] = ((16, 32), (64, 16))  # widths and batch sizes
    num_classes: int = 10
    image_size: int = 32
    classes: tuple[int, ...] = (2, 10, 25, 50, 100)
    probes: tuple[int, ...] = (1, 5, 20, 40)


def settings_for(quick: bool) -> Settings:
    """The full benchmark, or what shows that everything works."""
    return Settings() if not quick else Settings(
        num_probes=2, rounds=2, compared=((8, 2),), num_classes=3, classes=(2, 3), probes=(1, 2))


class Program(NamedTuple):
    """A compiled contender."""

    call: Callable[[], object]
    facts: dict[str, float]  # columns of its row


@functools.cache
def make_program(case: Case, contender: str, num_probes: int) -> Program:
    """Compiles a contender of this library."""
    made = problem.make_problem(case)

    def compute(variables, images, labels, key):
        def logits(images):
            return made.model.apply(variables, images, train=False).logits

        def loss(images):
            return losses.softmax_cross_entropy(logits(images), labels)

        if contender == SPECTRUM:
            return curvature.piecewise_linear_spectrum(logits, images)
        if contender == EQ21:
            return curvature.finite_difference_curvature(
                loss, images, key, step=STEP, num_probes=num_probes)
        return curvature.squared_frobenius(loss, images, key, num_probes=num_probes)

    arguments = (made.variables, made.images, made.labels, jax.random.key(2))
    start = time.perf_counter()
    compiled = jax.jit(compute).lower(*arguments).compile()
    return Program(lambda: jax.block_until_ready(compiled(*arguments)), {
        "compile_s": time.perf_counter() - start,
        "memory_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20})


def make_torch_call(case: Case, num_probes: int, *, channels_last: bool) -> Callable[[], object]:
    """Eq. 21 in PyTorch for the same weights and images."""
    import torch

    from experiments.bench import torch_peer

    module, images, labels = torch_peer.load(problem.make_problem(case), channels_last)
    return lambda: torch_peer.finite_difference_curvature(
        module, images, labels, lambda _: torch.randn_like(images), step=STEP,
        num_probes=num_probes)


def measure_compared(settings: Settings, done: timing.Done) -> dict:
    """All contenders, PyTorch's too, and single probes."""
    missing = problem.why_no_torch()
    found, ratios = [], []
    for width, batch_size in settings.compared:
        case = Case(settings.num_classes, settings.image_size, width, batch_size)
        programs = {f"{kind}, one probe": make_program(case, kind, 1) for kind in (EQ21, PRODUCTS)}
        if missing is None:
            programs |= {name: Program(*problem.torch_contender(make_torch_call(
                case, settings.num_probes, channels_last=last))) for name, last in TORCH.items()}
        found += _rows(case, programs, settings, done)
        ratios += timing.ratios(found[-len(programs) - 3:], [
            Pair(EQ21, SPECTRUM, "at least", 4.0),
            *(Pair(name, SPECTRUM, "at least", 2.5) for name in TORCH),
            Pair(f"{PRODUCTS}, one probe", f"{EQ21}, one probe", target=1.5),
            Pair(PRODUCTS, EQ21, target=1.5),
        ], dict.fromkeys(TORCH, missing))
    return {"rows": found, "ratios": ratios}


def measure_classes(settings: Settings, done: timing.Done) -> dict:
    """This library's contenders against the number of classes."""
    found, ratios = [], []
    width, batch_size = settings.compared[0]
    for classes in settings.classes:
        rows = _rows(Case(classes, settings.image_size, width, batch_size), {}, settings, done)
        ratios += timing.ratios(rows, [Pair(EQ21, SPECTRUM)])
        found += [row | {"against": "Number of classes C", "at": classes} for row in rows]
    return {"rows": found, "ratios": ratios}


def measure_memory(settings: Settings, done: timing.Done) -> dict:
    """Working memory against the number of probes."""
    case = Case(settings.num_classes, settings.image_size, *settings.compared[0])
    rows = []
    for number in settings.probes:
        for kind in (EQ21, PRODUCTS):
            facts = make_program(case, kind, number).facts
            rows.append({"case": f"{_name(case)}, K = {number}", "contender": kind, **facts})
            done(f"compiling {kind}", facts["compile_s"])
    return {"rows": rows, "ratios": []}


def _rows(case: Case, more: Mapping[str, Program], settings: Settings, done: timing.Done
          ) -> list[dict]:
    programs = {kind: make_program(case, kind, settings.num_probes)
                for kind in (SPECTRUM, EQ21, PRODUCTS)} | dict(more)
    return timing.rows(
        f"{_name(case)}, K = {settings.num_probes}",
        {name: program.call for name, program in programs.items()}, settings.rounds, done,
        per=case.batch_size, facts={name: program.facts for name, program in programs.items()})


def _name(case: Case) -> str:
    return (f"width {case.width}, {case.batch_size} images of {case.image_size} x "
            f"{case.image_size}, C = {case.num_classes}")
