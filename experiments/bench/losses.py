"""Times the robust loss with its gradients, also against PyTorch and against its sizes.

There is no network: features, noisy features and the softmax layer are random, and no time depends
on their values. All contenders compute the same loss and gradients from the same numbers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import problem, timing
from experiments.bench.timing import Contender, Pair
from jaxrobust.centroids import CentroidState
from jaxrobust.losses import RobustLossConfig, robust_loss

FORMS = ("looping", "vectorised")
"""Those of :mod:`experiments.bench.torch_losses`."""

CONFIG = RobustLossConfig()
"""The paper's, whose options both forms have."""


class Size(NamedTuple):
    """The sizes of a problem."""

    batch_size: int
    dim: int
    num_classes: int

    def __str__(self):
        return f"B = {self.batch_size}, d = {self.dim}, C = {self.num_classes}"


class Problem(NamedTuple):
    """The arguments of the loss."""

    features: np.ndarray  # shape=[B, d]
    noisy_features: np.ndarray  # shape=[B, d]
    labels: np.ndarray  # shape=[B], dtype=int32; drawn at random, as in training
    kernel: np.ndarray  # shape=[d, C]
    bias: np.ndarray  # shape=[C]
    mean: np.ndarray  # shape=[C, d]
    seen: np.ndarray  # shape=[C], dtype=bool


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured; the defaults are the full benchmark."""

    rounds: int = 7
    compared: tuple[tuple[Size, float], ...] = (
        (Size(64, 128, 10), 50), (Size(1024, 512, 1000), 100))  # with the looping form's target
    usual: Size = Size(256, 128, 100)  # one number of it varies at a time
    classes: tuple[int, ...] = (10, 100, 1000, 5000, 20_000)
    dims: tuple[int, ...] = (32, 128, 512, 2048)
    batch_sizes: tuple[int, ...] = (16, 64, 256, 1024)


def settings_for(quick: bool) -> Settings:
    """The full benchmark, or a quick one to see that everything works."""
    return Settings() if not quick else Settings(
        rounds=2, compared=((Size(8, 4, 3), 50),), usual=Size(8, 4, 3), classes=(3, 20),
        dims=(4, 8), batch_sizes=(4, 8))


def make_problem(size: Size, dtype: Any = np.float32) -> Problem:
    """Draws a problem; nine out of ten classes have been seen before."""
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
    """Computes the loss, its gradients and the next state.

    The gradients are with respect to features, noisy features, kernel and bias, in this order.
    """
    labels, mean, seen = map(jnp.asarray, (problem.labels, problem.mean, problem.seen))

    def loss(features, noisy_features, kernel, bias):
        total, _, state = robust_loss(
            features, noisy_features, labels, kernel, bias, CentroidState(mean, seen), CONFIG)
        return total, state

    (total, state), gradients = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(
        problem.features, problem.noisy_features, problem.kernel, problem.bias)
    return total, gradients, state


def make_contender(size: Size) -> Contender:
    """Compiles this library's loss for a problem of this size."""
    made = jax.tree.map(jnp.asarray, make_problem(size))
    compiled = value_and_gradients.lower(made).compile()
    return Contender(lambda: jax.block_until_ready(compiled(made)),
                     {"memory_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20})


def make_torch_call(problem: Problem, form: str) -> Callable[[], tuple]:
    """Makes a call of one of :data:`FORMS`, which returns the total, gradients and state."""
    import torch

    from experiments.bench import torch_losses

    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    # Copies: PyTorch warns about memory that it may not write to.
    tensors = torch_losses.Problem(*(torch.tensor(values, device=device) for values in (
        problem.features, problem.noisy_features, np.ascontiguousarray(problem.kernel.T),
        problem.bias, problem.labels.astype(np.int64), problem.mean, problem.seen)))
    return lambda: torch_losses.value_and_gradients(getattr(torch_losses, form), tensors, CONFIG)


def measure_losses(settings: Settings) -> timing.Parts:
    """Times this library's loss and the two forms in PyTorch."""
    missing = problem.why_no_torch()
    for size, target in settings.compared:
        contenders = {"JAX": make_contender(size)}
        if missing is None:
            contenders |= {f"PyTorch, {form}": problem.torch_contender(
                make_torch_call(make_problem(size), form)) for form in FORMS}
        rows = timing.rows(str(size), contenders, settings.rounds)
        yield rows, timing.ratios(rows, [
            Pair(f"PyTorch, {form}", "JAX", "at least", aim)
            for form, aim in zip(FORMS, (target, 2), strict=True)], missing)


def measure_scaling(settings: Settings) -> timing.Parts:
    """Measures time and memory against the number of classes, the dimension and the batch size."""
    for field, against, values in (
            ("num_classes", "Number of classes C", settings.classes),
            ("dim", "Dimension of the features d", settings.dims),
            ("batch_size", "Batch size B", settings.batch_sizes)):
        sizes = [settings.usual._replace(**{field: value}) for value in values]
        made = {str(size): make_contender(size) for size in sizes}
        seconds = timing.in_turn({case: one.call for case, one in made.items()}, settings.rounds)
        yield [timing.row(case, "JAX", seconds[case], against=against, at=value, **one.facts)
               for value, (case, one) in zip(values, made.items(), strict=True)], []
