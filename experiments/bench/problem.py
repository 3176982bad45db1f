"""The network, the weights and the images of the benchmarks, and how to call PyTorch."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import timing
from experiments.bench.timing import Contender
from jaxrobust.models import create_model


class Case(NamedTuple):
    """A ResNet18 and its images."""

    num_classes: int
    image_size: int
    width: int
    batch_size: int


class Problem(NamedTuple):
    """A network, its weights, and images."""

    model: Any
    variables: Any
    images: jax.Array  # shape=[B, S, S, 3]
    labels: jax.Array  # shape=[B]


@functools.cache
def make_problem(case: Case) -> Problem:
    """Makes a ResNet18 with random weights, and images of noise; no time depends on either."""
    model = create_model("resnet18", num_classes=case.num_classes, num_features=128,
                         width=case.width, mean=(0.5,) * 3, std=(0.25,) * 3)
    shape = (case.batch_size, case.image_size, case.image_size, 3)
    draw = np.random.default_rng(0)

    def weights(path, leaf):
        if path[-1].key == "kernel":
            bound = np.prod(leaf.shape[:-1])**-0.5
            return jnp.asarray(draw.uniform(-bound, bound, leaf.shape), leaf.dtype)
        return jnp.full(leaf.shape, path[-1].key in ("scale", "var"), leaf.dtype)

    # Compiling the model's own initialisation would take longer than most cases.
    shapes = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0),
                            jax.ShapeDtypeStruct(shape, jnp.float32))
    return Problem(model, jax.tree_util.tree_map_with_path(weights, shapes),
                   jnp.asarray(draw.uniform(size=shape), jnp.float32),
                   jnp.arange(case.batch_size) % case.num_classes)


def why_no_torch() -> str | None:
    """The reason why there is no PyTorch to compare with; None if there is."""
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed; `pip install -e .[bench]` does it"
    import torch  # Its import takes seconds, and few have it.

    if jax.default_backend() != "cpu" and not torch.cuda.is_available():
        return f"PyTorch here has no {jax.default_backend()} to compute on"
    return None


def torch_contender(call: Callable[[], object], **facts: float) -> Contender:
    """Makes a contender of a call of PyTorch, on the number of threads that it records.

    On CPUs these are as many as JAX has cores, or one if that is faster: PyTorch's threads wait by
    spinning, which makes them many times slower on cores shared with other work.
    """
    import torch

    def on(number):
        torch.set_num_threads(number)
        result = call()
        if jax.default_backend() != "cpu":
            torch.cuda.synchronize()
        return result

    trials = {str(number): functools.partial(on, number) for number in sorted({
        1 if jax.default_backend() == "cpu" else timing.cores(), timing.cores()})}
    if len(trials) > 1:
        seconds = timing.in_turn(trials, 1)
        trials = {number: trials[number] for number in [min(trials, key=seconds.get)]}
    (number, chosen), = trials.items()
    return Contender(chosen, {**facts, "threads": int(number)})
