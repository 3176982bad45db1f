"""One step of training: against PyTorch, of one method against another, against the peak.

Times are compared as ratios within one run: the contenders take turns, on one device, on the same
images with the same first weights. The network is a ResNet18 with random weights and the images
are noise; no time depends on them.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import curvature, timing
from jaxrobust import parallel, training
from jaxrobust.centroids import init_centroids
from jaxrobust.methods import Batch, make_method
from jaxrobust.models.common import head_parameters

LEARNING_RATE = 0.01
"""Small, so that the weights stay finite; no time depends on it."""

PEER_TARGET = 1.0
"""Of this library's time over PyTorch's, at most, for each of PyTorch's forms."""

METHOD_TARGET = 1.03
"""Of the time of ``robust`` over that of ``both``, at most."""

PEERS = ("torch", "torch_channels_last", "torch_compiled")
"""PyTorch's forms: eager in its own layout, eager in channels-last, and that one compiled."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured; the defaults are the full benchmark."""

    width: int = 64
    image_size: int = 32
    num_classes: int = 10
    batch_size: int = 64
    rounds: int = 5
    large_batch_size: int = 512
    large_rounds: int = 2
    large_seconds: float = 90.0  # the large batch is left out if its rounds would take longer
    compiled: bool = True  # whether to wait for torch.compile, a minute on two cores
    product_sizes: tuple[int, ...] = (1024, 2048, 4096)


QUICK = Settings(width=4, image_size=8, num_classes=3, batch_size=4, rounds=2,
                 large_batch_size=8, large_rounds=1, large_seconds=10.0, compiled=False,
                 product_sizes=(64, 128))
"""Shows that everything works, and nothing else."""


class Step(NamedTuple):
    """A step of training, ready to be called again and again; each call waits for its end."""

    call: Callable[[], object]
    compile_seconds: float


def measure_peers(settings: Settings) -> dict:
    """A step of ``normal`` (softmax loss, SGD) here and in PyTorch.

    In float32, and on GPUs in bfloat16 too. PyTorch runs on as many threads as JAX has cores, or
    on one if that is faster, and on the same device as JAX.

    Returns:
      ``torch``: its version, or why it is not compared with; ``torch_threads``; ``cases``, one
      for each type and batch size, with ``ms`` (median, quartiles and rounds in milliseconds a
      step, by contender: "jax" and :data:`PEERS`), ``compile_seconds``, and ``not_measured``, the
      reason by contender; ``ratios``, "jax" over each peer of each case.
    """
    missing = curvature.why_no_torch()
    num_threads = None if missing else _torch_threads(_case(settings, settings.batch_size))
    cases = []
    for dtype in _dtypes():
        small = _measure_peers(settings, _case(settings, settings.batch_size), dtype,
                               settings.rounds, missing, num_threads)
        growth = settings.large_batch_size / settings.batch_size
        # One untimed turn comes before the rounds.
        expected = growth * (1 + settings.large_rounds) * sum(
            times["median"] for times in small["ms"].values()) / 1e3
        large_case = _case(settings, settings.large_batch_size)
        if expected > settings.large_seconds:
            reason = (f"it would take {expected:.0f} s, more than the "
                      f"{settings.large_seconds:.0f} s set for it")
            large = _described(large_case, dtype) | {
                "ms": {}, "compile_seconds": {},
                "not_measured": dict.fromkeys(("jax", *PEERS), reason)}
        else:
            large = _measure_peers(settings, large_case, dtype, settings.large_rounds, missing,
                                   num_threads)
        cases += [small, large]
    return {
        "torch": missing or _torch().__version__, "torch_threads": num_threads, "cases": cases,
        "ratios": [_ratio_row(case, "jax", peer, PEER_TARGET)
                   for case in cases for peer in PEERS]}


def measure_methods(settings: Settings) -> dict:
    """A step of ``robust``, in two passes and in one, against one of ``both``.

    Returns:
      ``cases``, one for each type, as in :func:`measure_peers` with the contenders "both",
      "robust" and "robust_one_pass"; ``ratios``, of the latter two over the first.
    """
    case = _case(settings, settings.batch_size)
    cases = []
    for dtype in _dtypes():
        steps = {name: make_step(case, dtype, name.removesuffix("_one_pass"),
                                 one_pass=name.endswith("_one_pass"))
                 for name in ("both", "robust", "robust_one_pass")}
        cases.append(_described(case, dtype) | _timed(steps, settings.rounds)
                     | {"not_measured": {}})
    return {"cases": cases,
            "ratios": [_ratio_row(case, name, "both", METHOD_TARGET)
                       for case in cases for name in ("robust", "robust_one_pass")]}


def measure_peak(settings: Settings) -> dict:
    """The share of the device's arithmetic that a step of ``normal`` achieves.

    The peak is the fastest product of two square matrices of one of the sizes, of the type and at
    the precision of the step (float32 is JAX's default, TF32 on GPUs that have it). The step's
    operations are those of :func:`step_flops`.

    Returns:
      ``cases``, one for each type: ``peak_flops`` and ``step_flops_per_second`` [1/s], with
      ``peak_size`` and ``product_flops`` by size, ``step_flops``, ``step_ms``, and ``share``, the
      quotient of the two, from medians of the same rounds.
    """
    case = _case(settings, settings.batch_size)
    problem = curvature.make_problem(case)
    flops = step_flops(problem.model, problem.variables, problem.images)
    cases = []
    for dtype in _dtypes():
        contenders = {str(size): _make_product(size, dtype) for size in settings.product_sizes}
        contenders["step"] = make_step(case, dtype, "normal").call
        seconds = {name: timing.summarise(times)
                   for name, times in timing.in_turn(contenders, settings.rounds).items()}
        products = {str(size): 2 * size**3 / seconds[str(size)].median
                    for size in settings.product_sizes}
        fastest = max(products, key=products.get)
        achieved = flops / seconds["step"].median
        cases.append(_described(case, dtype) | {
            "product_flops": products, "peak_size": int(fastest), "peak_flops": products[fastest],
            "step_flops": flops, "step_ms": 1e3 * seconds["step"].median,
            "step_flops_per_second": achieved, "share": achieved / products[fastest]})
    return {"cases": cases}


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
def make_step(case: curvature.Case, dtype: str, method: str, *, one_pass: bool = False) -> Step:
    """Compiles this library's step, which starts from the case's weights and goes on."""
    problem = curvature.make_problem(case)
    model = problem.model.clone(dtype=jnp.dtype(dtype))
    optimizer = training.sgd(LEARNING_RATE)
    # A copy: the state is donated, and the problem's weights are others' first ones too.
    params, batch_stats = jax.tree.map(
        jnp.copy, (problem.variables["params"], problem.variables["batch_stats"]))
    kernel, _ = head_parameters(params)
    state = training.TrainState(
        step=jnp.zeros((), jnp.int32), params=params, batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        centroids=init_centroids(kernel.shape[1], kernel.shape[0]), key=jax.random.key(1))
    batch = Batch(problem.images, jnp.clip(problem.images + 0.1, 0, 1),
                  problem.labels.astype(jnp.int32))
    step = training.make_train_step(model, make_method(method, one_pass=one_pass), optimizer)
    start = time.perf_counter()
    # Flax's batch norm itself mixes its float32 statistics with bfloat16 images.
    with jax.numpy_dtype_promotion("standard"):
        compiled = parallel.compile(
            parallel.make_layout("jit"), step, donate_argnums=0).lower(state, batch).compile()
    compile_seconds = time.perf_counter() - start
    latest = [state]

    def call():
        latest[0], metrics = compiled(latest[0], batch)
        jax.block_until_ready((latest[0], metrics))
        return metrics

    return Step(call, compile_seconds)


def make_torch_step(case: curvature.Case, dtype: str, peer: str, num_threads: int) -> Step:
    """PyTorch's step from the same weights, in one of the forms of :data:`PEERS`.

    Raises:
      RuntimeError: if ``torch.compile`` cannot compile it, as where there is no C++ compiler.
    """
    from experiments.bench import torch_peer

    torch = _torch()
    problem = curvature.make_problem(case)
    on_cpu = jax.default_backend() == "cpu"
    if not on_cpu:
        # As JAX: TF32 for float32, and the fastest convolutions.
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    torch.set_num_threads(num_threads)
    layout = torch.contiguous_format if peer == "torch" else torch.channels_last
    device = "cpu" if on_cpu else "cuda"
    module = torch_peer.convert(problem.model, problem.variables).to(device, memory_format=layout)
    images = torch_peer.to_torch(np.asarray(problem.images)).to(device, memory_format=layout)
    labels = torch.from_numpy(np.array(problem.labels, np.int64)).to(device)
    step = torch_peer.make_train_step(
        module, images, labels, learning_rate=LEARNING_RATE, half=dtype == "bfloat16",
        compiled=peer == "torch_compiled")

    def call():
        loss = step()
        if not on_cpu:
            torch.cuda.synchronize()
        return loss

    start = time.perf_counter()
    if peer == "torch_compiled":
        call()
    return Step(call, time.perf_counter() - start)


def _torch():
    """PyTorch, whose import takes seconds and which few have."""
    import torch

    return torch


def _torch_threads(case: curvature.Case) -> int:
    """As many as JAX has cores, or one if that is faster.

    PyTorch's threads wait for each other by spinning, which makes them slower than one where cores
    are shared with others.
    """
    numbers = sorted({1, timing.cores()})
    if len(numbers) == 1 or jax.default_backend() != "cpu":
        return numbers[-1]
    step = make_torch_step(case, "float32", "torch_channels_last", 1).call

    def on(number):
        _torch().set_num_threads(number)
        return step()

    seconds = timing.in_turn({number: functools.partial(on, number) for number in numbers}, 2)
    return min(numbers, key=lambda number: timing.summarise(seconds[number]).median)


def _measure_peers(settings: Settings, case: curvature.Case, dtype: str, rounds: int,
                   missing: str | None, num_threads: int | None) -> dict:
    steps = {"jax": make_step(case, dtype, "normal")}
    reasons = {}
    for peer in PEERS:
        if missing is not None:
            reasons[peer] = missing
        elif peer == "torch_compiled" and not settings.compiled:
            reasons[peer] = "not asked for"
        elif (peer == "torch_compiled" and case.batch_size != settings.batch_size
              and jax.default_backend() == "cpu"):
            reasons[peer] = "compiled for the smaller batch alone, as it takes so long on CPUs"
        else:
            try:
                steps[peer] = make_torch_step(case, dtype, peer, num_threads)
            except RuntimeError as error:
                if peer != "torch_compiled":
                    raise
                reasons[peer] = f"torch.compile: {str(error).strip().splitlines()[0]}"
    return _described(case, dtype) | _timed(steps, rounds) | {"not_measured": reasons}


def _timed(steps: dict[str, Step], rounds: int) -> dict:
    """``ms`` and ``compile_seconds`` of steps that take turns."""
    seconds = timing.in_turn({name: step.call for name, step in steps.items()}, rounds)
    milliseconds = {name: [1e3 * value for value in values] for name, values in seconds.items()}
    return {"ms": {name: {**timing.summarise(values)._asdict(), "rounds": values}
                   for name, values in milliseconds.items()},
            "compile_seconds": {name: step.compile_seconds for name, step in steps.items()}}


def _ratio_row(case: dict, numerator: str, denominator: str, target: float) -> dict:
    row = {"numerator": numerator, "denominator": denominator,
           **{name: case[name] for name in ("dtype", "width", "batch_size")},
           "bound": "at most", "target": target}
    if denominator in case["not_measured"]:
        return row | {"not_measured": case["not_measured"][denominator]}
    above, below = case["ms"][numerator], case["ms"][denominator]
    ratio = timing.ratio(above["rounds"], below["rounds"])
    return row | {"numerator_ms": above["median"], "denominator_ms": below["median"],
                  **ratio._asdict(), "met": ratio.ratio <= target}


def _make_product(size: int, dtype: str) -> Callable[[], object]:
    draw = np.random.default_rng(0)
    left, right = (jnp.asarray(draw.normal(size=(size, size)), dtype) for _ in range(2))
    product = jax.jit(jnp.matmul)
    return lambda: jax.block_until_ready(product(left, right))


def _dtypes() -> Sequence[str]:
    return ("float32",) if jax.default_backend() == "cpu" else ("float32", "bfloat16")


def _case(settings: Settings, batch_size: int) -> curvature.Case:
    return curvature.Case(num_classes=settings.num_classes, image_size=settings.image_size,
                          width=settings.width, batch_size=batch_size)


def _described(case: curvature.Case, dtype: str) -> dict:
    return {"dtype": dtype, **case._asdict()}
