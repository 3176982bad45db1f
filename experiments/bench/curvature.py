"""Measures time and memory of the exact spectrum, exact products and Eq. 21.

All contenders have the same images and weights.
"""

import dataclasses
import functools
import time
from collections.abc import Callable

import jax

from experiments.bench import problem, timing
from experiments.bench.problem import Case
from experiments.bench.timing import Contender, Pair
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
    """The full benchmark, or a quick one to see that everything works."""
    return Settings() if not quick else Settings(
        num_probes=2, rounds=2, compared=((8, 2),), num_classes=3, classes=(2, 3), probes=(1, 2))


@functools.cache
def make_contender(case: Case, kind: str, num_probes: int) -> Contender:
    """Compiles one of this library's computations."""
    made = problem.make_problem(case)

    def compute(variables, images, labels, key):
        def logits(images):
            return made.model.apply(variables, images, train=False).logits

        def loss(images):
            return losses.softmax_cross_entropy(logits(images), labels)

        if kind == SPECTRUM:
            return curvature.piecewise_linear_spectrum(logits, images)
        if kind == EQ21:
            return curvature.finite_difference_curvature(
                loss, images, key, step=STEP, num_probes=num_probes)
        return curvature.squared_frobenius(loss, images, key, num_probes=num_probes)

    arguments = (made.variables, made.images, made.labels, jax.random.key(2))
    start = time.perf_counter()
    compiled = jax.jit(compute).lower(*arguments).compile()
    return Contender(lambda: jax.block_until_ready(compiled(*arguments)), {
        "compile_s": time.perf_counter() - start,
        "memory_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20})


def make_torch_call(case: Case, num_probes: int, *, channels_last: bool) -> Callable[[], object]:
    """Makes a call of Eq. 21 in PyTorch for the same weights and images."""
    import torch

    from experiments.bench import torch_peer

    module, images, labels = torch_peer.load(problem.make_problem(case), channels_last)
    return lambda: torch_peer.finite_difference_curvature(
        module, images, labels, lambda _: torch.randn_like(images), step=STEP,
        num_probes=num_probes)


def measure_compared(settings: Settings) -> timing.Parts:
    """Times all contenders, those in PyTorch too, and single probes."""
    missing = problem.why_no_torch()
    for width, batch_size in settings.compared:
        case = Case(settings.num_classes, settings.image_size, width, batch_size)
        more = {f"{kind}, one probe": make_contender(case, kind, 1) for kind in (EQ21, PRODUCTS)}
        if missing is None:
            more |= {name: problem.torch_contender(make_torch_call(
                case, settings.num_probes, channels_last=last)) for name, last in TORCH.items()}
        rows = _rows(case, more, settings)
        yield rows, timing.ratios(rows, [
            Pair(EQ21, SPECTRUM, "at least", 4.0),
            *(Pair(name, SPECTRUM, "at least", 2.5) for name in TORCH),
            Pair(f"{PRODUCTS}, one probe", f"{EQ21}, one probe", target=1.5),
            Pair(PRODUCTS, EQ21, target=1.5)], missing)


def measure_classes(settings: Settings) -> timing.Parts:
    """Times this library's contenders against the number of classes."""
    width, batch_size = settings.compared[0]
    for classes in settings.classes:
        rows = _rows(Case(classes, settings.image_size, width, batch_size), {}, settings)
        yield ([row | {"against": "Number of classes C", "at": classes} for row in rows],
               timing.ratios(rows, [Pair(EQ21, SPECTRUM)]))


def measure_memory(settings: Settings) -> timing.Parts:
    """Measures the working memory against the number of probes."""
    case = Case(settings.num_classes, settings.image_size, *settings.compared[0])
    for number in settings.probes:
        yield [{"case": f"{_name(case)}, K = {number}", "contender": kind,
                **make_contender(case, kind, number).facts} for kind in (EQ21, PRODUCTS)], []


def _rows(case: Case, more: dict[str, Contender], settings: Settings) -> list[dict]:
    contenders = {kind: make_contender(case, kind, settings.num_probes)
                  for kind in (SPECTRUM, EQ21, PRODUCTS)}
    return timing.rows(f"{_name(case)}, K = {settings.num_probes}", contenders | more,
                       settings.rounds, per=case.batch_size)


def _name(case: Case) -> str:
    return (f"width {case.width}, {case.batch_size} images of {case.image_size} x "
            f"{case.image_size}, C = {case.num_classes}")
