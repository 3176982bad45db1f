"""The robust loss with its gradients against PyTorch, and how its cost grows.

Alone, without a network: features, noisy features and the softmax layer are random, and no time
depends on their values. Times are compared as ratios within one run: every contender computes
the same loss and gradients from the same numbers, in turn.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import timing
from experiments.bench.curvature import why_no_torch
from jaxrobust.centroids import CentroidState
from jaxrobust.losses import RobustLossConfig, robust_loss

FORMS = ("looping", "vectorised")
"""Those of :mod:`experiments.bench.torch_losses`."""

CONFIG = RobustLossConfig()
"""The paper's, whose options are those of the two forms."""


class Size(NamedTuple):
    """Of a problem."""

    batch_size: int
    dim: int
    num_classes: int


class Problem(NamedTuple):
    """What the loss is computed from."""

    features: np.ndarray  # shape=[B, d]
    noisy_features: np.ndarray  # shape=[B, d]
    labels: np.ndarray  # shape=[B], dtype=int32; drawn at random, as in training
    kernel: np.ndarray  # shape=[d, C]
    bias: np.ndarray  # shape=[C]
    mean: np.ndarray  # shape=[C, d]
    seen: np.ndarray  # shape=[C], dtype=bool


class Target(NamedTuple):
    """What a form's time should at least be, as a multiple of ours."""

    form: str
    ratio: float


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured; the defaults are the full benchmark."""

    rounds: int = 7
    compared: tuple[tuple[Size, tuple[Target, ...]], ...] = (
        (Size(64, 128, 10), (Target("looping", 50), Target("vectorised", 2))),
        (Size(1024, 512, 1000), (Target("looping", 100), Target("vectorised", 2))),
    )
    scaling_rounds: int = 5
    classes: tuple[int, ...] = (10, 100, 1000, 5000, 20_000)  # at B = 256, d = 128
    dims: tuple[int, ...] = (32, 128, 512, 2048)  # at B = 256, C = 100
    batch_sizes: tuple[int, ...] = (16, 64, 256, 1024)  # at d = 128, C = 100
    batch_size: int = 256
    dim: int = 128
    num_classes: int = 100


QUICK = Settings(
    rounds=2, compared=((Size(8, 4, 3), (Target("looping", 50), Target("vectorised", 2))),),
    scaling_rounds=2, classes=(3, 20), dims=(4, 8), batch_sizes=(4, 8), batch_size=8, dim=4,
    num_classes=3)
"""Shows that everything works, and nothing else."""


def make_problem(size: Size, dtype: Any = np.float32) -> Problem:
    """A random problem; of ten classes, nine have been seen before."""
    draw = np.random.default_rng(0)

    def normal(*shape, scale=1.0):
        return (scale * draw.normal(size=shape)).astype(dtype)

    batch_size, dim, num_classes = size
    features = normal(batch_size, dim)
    return Problem(
        features=features, noisy_features=features + normal(batch_size, dim, scale=0.3),
        labels=draw.integers(num_classes, size=batch_size, dtype=np.int32),
        kernel=normal(dim, num_classes, scale=dim**-0.5), bias=normal(num_classes, scale=0.1),
        mean=normal(num_classes, dim), seen=draw.random(num_classes) < 0.9)


@jax.jit
def value_and_gradients(problem: Problem) -> tuple[jax.Array, tuple, CentroidState]:
    """The loss, its gradients, and the next state.

    The gradients are with respect to features, noisy features, kernel and bias, in this order.
    """
    def loss(features, noisy_features, kernel, bias):
        total, _, state = robust_loss(
            features, noisy_features, problem.labels, kernel, bias,
            CentroidState(problem.mean, problem.seen), CONFIG)
        return total, state

    (total, state), gradients = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(
        problem.features, problem.noisy_features, problem.kernel, problem.bias)
    return total, gradients, state


def make_call(problem: Problem) -> tuple[Callable[[], object], int]:
    """Ours, compiled, and the bytes of temporary memory that it needs."""
    problem = jax.tree.map(jnp.asarray, problem)
    compiled = value_and_gradients.lower(problem).compile()
    return (lambda: jax.block_until_ready(compiled(problem)),
            compiled.memory_analysis().temp_size_in_bytes)


def make_torch_call(problem: Problem, form: str, num_threads: int) -> Callable[[], tuple]:
    """One of :data:`FORMS` on the same device; it returns the total, gradients and state."""
    import torch

    from experiments.bench import torch_losses

    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    # A copy: PyTorch warns about memory that it may not write to.
    tensors = [torch.tensor(values, device=device) for values in (
        problem.features, problem.noisy_features, problem.labels.astype(np.int64),
        np.ascontiguousarray(problem.kernel.T), problem.bias, problem.mean, problem.seen)]
    loss = getattr(torch_losses, form)

    def compute():
        torch.set_num_threads(num_threads)
        result = torch_losses.value_and_gradients(loss, *tensors, CONFIG)
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    return compute


def measure_losses(settings: Settings, done: Callable[[str, float], None] = lambda *_: None
                   ) -> dict:
    """Times of the compared sizes, ours and PyTorch's, and their ratios against the targets.

    PyTorch's vectorised form is timed on one thread and on as many as there are cores, and the
    faster one counts: its threads wait for each other by spinning, which makes it many times
    slower where cores are shared with others. The looping form is on one thread: no operation
    in it is large enough for two.

    Args:
      settings: what is measured.
      done: is told the name and the seconds of every turn.

    Returns:
      ``{"torch": "measured" or why not, "sizes": [...]}``, one row for each size: ``batch_size,
      dim, num_classes, temp_bytes, ms`` by contender (``ours``, ``looping``, ``vectorised``)
      with ``median, lower_quartile, upper_quartile, rounds``, ``torch_threads`` by form, and
      ``ratios``, one for each target: ``numerator, denominator, bound, target`` with ``ratio,
      smallest, largest, met``, or ``not_measured``, the reason.
    """
    missing = why_no_torch()
    return {"torch": missing or "measured",
            "sizes": [_measure_size(size, targets, settings.rounds, missing, done)
                      for size, targets in settings.compared]}


def _measure_size(size: Size, targets: Sequence[Target], rounds: int, missing: str | None,
                  done: Callable[[str, float], None]) -> dict:
    problem = make_problem(size)
    ours, temp_bytes = make_call(problem)
    calls, threads = {"ours": ours}, {}
    if missing is None:
        for form in FORMS:
            threads[form] = _best_threads(problem) if form == "vectorised" else 1
            calls[form] = make_torch_call(problem, form, threads[form])
    times = {name: [1e3 * value for value in values]
             for name, values in timing.in_turn(calls, rounds, done).items()}
    ratios = []
    for form, target in targets:
        row = {"numerator": form, "denominator": "ours", "bound": "at least", "target": target}
        if form not in times:
            ratios.append(row | {"not_measured": missing})
            continue
        ratio = timing.ratio(times[form], times["ours"])
        ratios.append(row | ratio._asdict() | {"met": ratio.ratio >= target})
    return {**size._asdict(), "temp_bytes": temp_bytes, "ms": _summaries(times),
            "torch_threads": threads, "ratios": ratios}


def _best_threads(problem: Problem) -> int:
    """Of one and as many as cores, the number on which the vectorised form is faster."""
    trials = {str(number): make_torch_call(problem, "vectorised", number)
              for number in sorted({1, timing.cores()})}
    seconds = timing.in_turn(trials, 1)
    return int(min(trials, key=lambda number: seconds[number][0]))


def measure_scaling(settings: Settings, done: Callable[[str, float], None] = lambda *_: None
                    ) -> list[dict]:
    """Our time and memory against the number of classes, of dimensions, and the batch size.

    Args:
      settings: what is measured.
      done: is told a name and the seconds of every turn.

    Returns:
      One row for each size of each sweep: ``sweep`` (the field of :class:`Size` that differs),
      ``batch_size, dim, num_classes, temp_bytes`` and ``ms`` with ``median, lower_quartile,
      upper_quartile, rounds``.
    """
    usual = Size(settings.batch_size, settings.dim, settings.num_classes)
    sweeps = {"num_classes": settings.classes, "dim": settings.dims,
              "batch_size": settings.batch_sizes}
    rows = []
    for sweep, values in sweeps.items():
        sizes = [usual._replace(**{sweep: value}) for value in values]
        made = {f"{sweep}={getattr(size, sweep)}": make_call(make_problem(size))
                for size in sizes}
        times = timing.in_turn({name: call for name, (call, _) in made.items()},
                               settings.scaling_rounds, done)
        summaries = _summaries({name: [1e3 * value for value in seconds]
                                for name, seconds in times.items()})
        rows += [{"sweep": sweep, **size._asdict(), "temp_bytes": made[name][1],
                  "ms": summaries[name]} for name, size in zip(made, sizes, strict=True)]
    return rows


def _summaries(times: dict[str, list[float]]) -> dict[str, dict]:
    return {name: {**timing.summarise(values)._asdict(), "rounds": values}
            for name, values in times.items()}
