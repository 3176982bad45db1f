"""The robust loss with its gradients against PyTorch, and how its cost grows.

Alone, without a network: features, noisy features and the softmax layer are random, and no time
depends on their values. Every contender computes the same loss and gradients from the same numbers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import problem, timing
from experiments.bench.timing import Pair
from jaxrobust.centroids import CentroidState
from jaxrobust.losses import RobustLossConfig, robust_loss

FORMS = ("looping", "vectorised")
"""Those of :mod:`experiments.bench.torch_losses`."""

CONFIG = RobustLossConfig()
"""The paper's, whose options are those of the two forms."""


class Size(NamedTuple):
    """How large a problem is."""

    batch_size: int
    dim: int
    num_classes: int

    def __str__(self):
        return f"B = {self.batch_size}, d = {self.dim}, C = {self.num_classes}"


class Problem(NamedTuple):
    """What the loss is computed from."""

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
    usual: Size = Size(256, 128, 100)  # of which one number varies at a time
    classes: tuple[int, ...] = (10, 100, 1000, 5000, 20_000)
    dims: tuple[int, ...] = (32, 128, 512, 2048)
    batch_sizes: tuple[int, ...] = (16, 64, 256, 1024)


def settings_for(quick: bool) -> Settings:
    """The full benchmark, or what shows that everything works."""
    return Settings() if not quick else Settings(
        rounds=2, compared=((Size(8, 4, 3), 50),), usual=Size(8, 4, 3), classes=(3, 20),
        dims=(4, 8), batch_sizes=(4, 8))


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


def make_call(size: Size) -> tuple[Callable[[], object], dict[str, float]]:
    """Ours, compiled, and its working memory."""
    made = jax.tree.map(jnp.asarray, make_problem(size))
    compiled = value_and_gradients.lower(made).compile()
    return (lambda: jax.block_until_ready(compiled(made)),
            {"memory_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20})


def make_torch_call(problem: Problem, form: str) -> Callable[[], tuple]:
    """One of :data:`FORMS` on the same device; it returns the total, gradients and state."""
    import torch

    from experiments.bench import torch_losses

    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    # A copy: PyTorch warns about memory that it may not write to.
    tensors = [torch.tensor(values, device=device) for values in (
        problem.features, problem.noisy_features, problem.labels.astype(np.int64),
        np.ascontiguousarray(problem.kernel.T), problem.bias, problem.mean, problem.seen)]
    return lambda: torch_losses.value_and_gradients(
        getattr(torch_losses, form), *tensors, CONFIG)


def measure_losses(settings: Settings, done: timing.Done) -> dict:
    """Ours and PyTorch's two forms."""
    missing = problem.why_no_torch()
    found, ratios = [], []
    for size, target in settings.compared:
        made = {"JAX": make_call(size)}
        if missing is None:
            made |= {f"PyTorch, {form}": problem.torch_contender(
                make_torch_call(make_problem(size), form)) for form in FORMS}
        rows = timing.rows(str(size), {name: call for name, (call, _) in made.items()},
                           settings.rounds, done, facts={
                               name: facts for name, (_, facts) in made.items()})
        pairs = [Pair(f"PyTorch, {form}", "JAX", "at least", aim)
                 for form, aim in zip(FORMS, (target, 2), strict=True)]
        ratios += timing.ratios(rows, pairs, {pair.numerator: missing for pair in pairs})
        found += rows
    return {"rows": found, "ratios": ratios}


def measure_scaling(settings: Settings, done: timing.Done) -> dict:
    """Our time and memory against the number of classes, of dimensions, and the batch size."""
    rows = []
    for field, against, values in (
            ("num_classes", "Number of classes C", settings.classes),
            ("dim", "Dimension of the features d", settings.dims),
            ("batch_size", "Batch size B", settings.batch_sizes)):
        sizes = [settings.usual._replace(**{field: value}) for value in values]
        made = {str(size): make_call(size) for size in sizes}
        seconds = timing.in_turn({case: call for case, (call, _) in made.items()},
                                 settings.rounds, done)
        rows += [timing.row(case, "JAX", seconds[case], against=against, at=value, **facts)
                 for value, (case, (_, facts)) in zip(values, made.items(), strict=True)]
    return {"rows": rows, "ratios": []}
