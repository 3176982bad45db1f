"""One step of training: against PyTorch, of one method against another, against the peak.

The contenders start from the same weights and see the same images.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import problem, timing
from experiments.bench.problem import Case
from experiments.bench.timing import Pair
from jaxrobust import parallel, training
from jaxrobust.centroids import init_centroids
from jaxrobust.methods import Batch, make_method
from jaxrobust.models.common import head_parameters

LEARNING_RATE = 0.01
"""Small, so that the weights stay finite; no time depends on it."""

EAGER, CHANNELS_LAST, COMPILED = "PyTorch", "PyTorch, channels last", "PyTorch, compiled"
"""PyTorch's forms: eager in its own layout, eager in channels-last, and that one compiled."""

Contender = tuple[Callable[[], object], Mapping[str, float]]
"""A step, each call of which waits for its end, and columns of its row."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured; the defaults are the full benchmark."""

    width: int = 64
    image_size: int = 32
    num_classes: int = 10
    rounds: tuple[tuple[int, int], ...] = ((64, 5), (512, 2))  # by batch size; the first alone in
    # all but the comparison with PyTorch
    peers: tuple[str, ...] = (EAGER, CHANNELS_LAST, COMPILED)
    product_sizes: tuple[int, ...] = (1024, 2048, 4096)


def settings_for(quick: bool) -> Settings:
    """The full benchmark, or what shows that everything works, without a minute of compiling."""
    return Settings() if not quick else Settings(
        width=4, image_size=8, num_classes=3, rounds=((4, 2), (8, 2)),
        peers=(EAGER, CHANNELS_LAST), product_sizes=(64, 128))


def measure_peers(settings: Settings, done: timing.Done) -> dict:
    """A step of ``normal`` here and in PyTorch; in float32, and on GPUs in bfloat16 too."""
    missing = problem.why_no_torch()
    found, ratios = [], []
    for dtype in _dtypes():
        for case, rounds in _cases(settings):
            steps, reasons = {"JAX": make_step(case, dtype, "normal")}, {}
            for peer in settings.peers:
                reasons[peer] = missing
                if missing is not None:
                    continue
                try:
                    steps[peer] = make_torch_step(case, dtype, peer)
                except RuntimeError as error:  # As where there is no C++ compiler.
                    if peer != COMPILED:
                        raise
                    reasons[peer] = f"torch.compile: {str(error).strip().splitlines()[0]}"
            rows = _rows(case, dtype, steps, rounds, done)
            ratios += timing.ratios(
                rows, [Pair("JAX", peer, target=1.0) for peer in settings.peers], reasons)
            found += rows
    return {"rows": found, "ratios": ratios}


def measure_methods(settings: Settings, done: timing.Done) -> dict:
    """A step of ``robust``, in two passes and in one, against one of ``both``."""
    (case, rounds), *_ = _cases(settings)
    found, ratios = [], []
    for dtype in _dtypes():
        rows = _rows(case, dtype, {
            "`both`": make_step(case, dtype, "both"), "`robust`": make_step(case, dtype, "robust"),
            "`robust`, one pass": make_step(case, dtype, "robust", one_pass=True)}, rounds, done)
        ratios += timing.ratios(rows, [
            Pair(row["contender"], "`both`", target=1.03) for row in rows[1:]])
        found += rows
    return {"rows": found, "ratios": ratios}


def measure_peak(settings: Settings, done: timing.Done) -> dict:
    """The share of the device's arithmetic that a step of ``normal`` achieves.

    The peak is the fastest product of two square matrices of one of the sizes, of the type and at
    the precision of the step (float32 is JAX's default, TF32 on GPUs that have it). The step's
    operations are those of :func:`step_flops`.
    """
    (case, rounds), *_ = _cases(settings)
    made = problem.make_problem(case)
    found, ratios = [], []
    for dtype in _dtypes():
        operations = {"a step": step_flops(made.model, made.variables, made.images)}
        contenders = {"a step": make_step(case, dtype, "normal")}
        for size in settings.product_sizes:
            name = f"product of {size} x {size} matrices"
            operations[name], contenders[name] = 2 * size**3, (_make_product(size, dtype), {})
        rows = _rows(case, dtype, contenders, rounds, done)
        for row in rows:
            row["tera_per_second"] = (
                operations[row["contender"]] / row["ms"]["median"] * 1e3 / 1e12)
        step, *products = (row["tera_per_second"] for row in rows)
        ratios.append(timing.judged(
            Pair("operations per second of a step", "of the fastest matrix product"),
            rows[0]["case"], ratio=step / max(products)))
        found += rows
    return {"rows": found, "ratios": ratios}


def step_flops(model: nn.Module, variables: dict, images: jax.Array) -> int:
    """Operations of the convolutions and matrix products in a training step on a batch.

    Two for each product of a weight with a number, and as many again for the gradient by the
    weights and for that by the layer's inputs. Padding counts as if it were images, and the
    gradient by the images themselves, which no step computes, is counted: a hundredth.
    """
    _, state = jax.eval_shape(
        functools.partial(model.apply, train=False, capture_intermediates=True,
                          mutable=["intermediates"]), variables, images)
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
        if path[-1].key != "kernel":
            continue
        layer = state["intermediates"]
        for key in path[:-1]:
            layer = layer[key.key]
        positions = int(np.prod(layer["__call__"][0].shape[:-1]))
        total += 3 * 2 * positions * leaf.size
    return total


@functools.cache
def make_step(case: Case, dtype: str, method: str, *, one_pass: bool = False) -> Contender:
    """Compiles this library's step, which starts from the case's weights and goes on."""
    made = problem.make_problem(case)
    model = made.model.clone(dtype=jnp.dtype(dtype))
    optimizer = training.sgd(LEARNING_RATE)
    # A copy: the state is donated, and the problem's weights are others' first ones too.
    params, batch_stats = jax.tree.map(
        jnp.copy, (made.variables["params"], made.variables["batch_stats"]))
    kernel, _ = head_parameters(params)
    state = training.TrainState(
        step=jnp.zeros((), jnp.int32), params=params, batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        centroids=init_centroids(kernel.shape[1], kernel.shape[0]), key=jax.random.key(1))
    batch = Batch(made.images, jnp.clip(made.images + 0.1, 0, 1), made.labels.astype(jnp.int32))
    step = training.make_train_step(model, make_method(method, one_pass=one_pass), optimizer)
    start = time.perf_counter()
    # Flax's batch norm itself mixes its float32 statistics with bfloat16 images.
    with jax.numpy_dtype_promotion("standard"):
        compiled = parallel.compile(
            parallel.make_layout("jit"), step, donate_argnums=0).lower(state, batch).compile()
    compile_s = time.perf_counter() - start
    latest = [state]

    def call():
        latest[0], metrics = compiled(latest[0], batch)
        jax.block_until_ready((latest[0], metrics))
        return metrics

    return call, {"compile_s": compile_s}


def make_torch_step(case: Case, dtype: str, peer: str) -> Contender:
    """PyTorch's step from the same weights, in one of its forms.

    Raises:
      RuntimeError: if ``torch.compile`` cannot compile it, as where there is no C++ compiler.
    """
    import torch

    from experiments.bench import torch_peer

    if jax.default_backend() != "cpu":
        # As JAX: TF32 for float32, and the fastest convolutions.
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    module, images, labels = torch_peer.load(problem.make_problem(case), peer != EAGER)
    step = torch_peer.make_train_step(
        module, images, labels, learning_rate=LEARNING_RATE, half=dtype == "bfloat16",
        compiled=peer == COMPILED)
    facts = {}
    if peer == COMPILED:
        start = time.perf_counter()
        step()
        facts["compile_s"] = time.perf_counter() - start
    call, threads = problem.torch_contender(step)
    return call, facts | threads


def _rows(case: Case, dtype: str, steps: Mapping[str, Contender], rounds: int,
          done: timing.Done) -> list[dict]:
    return timing.rows(
        f"ResNet18, width {case.width}, batch {case.batch_size}, {dtype}",
        {name: call for name, (call, _) in steps.items()}, rounds, done,
        facts={name: facts for name, (_, facts) in steps.items()})


def _make_product(size: int, dtype: str) -> Callable[[], object]:
    draw = np.random.default_rng(0)
    left, right = (jnp.asarray(draw.normal(size=(size, size)), dtype) for _ in range(2))
    product = jax.jit(jnp.matmul)
    return lambda: jax.block_until_ready(product(left, right))


def _dtypes() -> tuple[str, ...]:
    return ("float32",) if jax.default_backend() == "cpu" else ("float32", "bfloat16")


def _cases(settings: Settings) -> list[tuple[Case, int]]:
    return [(Case(settings.num_classes, settings.image_size, settings.width, batch_size), rounds)
            for batch_size, rounds in settings.rounds]
