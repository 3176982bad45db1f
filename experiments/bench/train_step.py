"""Times a training step: against PyTorch, between methods, and against the arithmetic peak.

All contenders start from the same weights and use the same images.
"""

import dataclasses
import functools
import time
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import problem, timing
from experiments.bench.problem import Case
from experiments.bench.timing import Contender, Pair
from jaxrobust import parallel, perturbations, training
from jaxrobust.centroids import init_centroids
from jaxrobust.methods import METHODS, Batch, make_method
from jaxrobust.models.common import head_parameters

LEARNING_RATE = 0.01
"""Small enough to keep the weights finite; no time depends on it."""

PENALTIES = ("gradient_penalty", "jacobian_penalty", "cure")
"""Methods with products of second derivatives."""

EAGER, CHANNELS_LAST, COMPILED = "PyTorch", "PyTorch, channels last", "PyTorch, compiled"
"""PyTorch's forms: eager in its own layout, eager in channels-last, and that one compiled."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured; the defaults are the full benchmark."""

    width: int = 64
    image_size: int = 32
    num_classes: int = 10
    # By batch size; only the comparison with PyTorch has more than the first.
    rounds: tuple[tuple[int, int], ...] = ((64, 5), (512, 2))
    dtypes: tuple[str, ...] = ("float32",)
    peers: tuple[str, ...] = (EAGER, CHANNELS_LAST, COMPILED)
    product_sizes: tuple[int, ...] = (1024, 2048, 4096)


@dataclasses.dataclass(frozen=True)
class MethodSettings(Settings):
    """Of the times of all methods."""

    methods: tuple[str, ...] = METHODS


def settings_for(quick: bool) -> Settings:
    """The full benchmark, or a quick one to see that everything works."""
    dtypes = ("float32",) if jax.default_backend() == "cpu" else ("bfloat16", "float32")
    if quick:
        return Settings(width=4, image_size=8, num_classes=3, rounds=((4, 2), (8, 2)),
                        dtypes=dtypes, peers=(EAGER, CHANNELS_LAST), product_sizes=(64, 128))
    if jax.default_backend() == "cpu":
        return Settings()
    return Settings(rounds=((512, 10), (64, 10)), dtypes=dtypes, product_sizes=(4096, 8192))


def measure_peers(settings: Settings) -> timing.Parts:
    """Times a step of ``normal`` here and in PyTorch, on GPUs also in bfloat16."""
    for dtype in settings.dtypes:
        for case, rounds in _cases(settings):
            missing = problem.why_no_torch()
            steps = {"JAX": make_step(case, dtype, "normal")}
            for peer in settings.peers if missing is None else ():
                try:
                    steps[peer] = make_torch_step(case, dtype, peer)
                except RuntimeError as error:  # Such as without a C++ compiler.
                    if peer != COMPILED:
                        raise
                    missing = f"torch.compile: {str(error).strip().splitlines()[0]}"
            rows = _rows(case, dtype, steps, rounds)
            yield rows, timing.ratios(
                rows, [Pair("JAX", peer, target=1.0) for peer in settings.peers], missing)


def measure_methods(settings: Settings) -> timing.Parts:
    """Times a step of ``robust``, in two passes and in one, against one of ``both``.

    Two passes are computed at once, and one after the other, as for modules that only know one
    batch.
    """
    (case, rounds), *_ = _cases(settings)
    for dtype in settings.dtypes:
        rows = _rows(case, dtype, {
            "`both`": make_step(case, dtype, "both"), "`robust`": make_step(case, dtype, "robust"),
            "`robust`, one after the other": make_step(case, dtype, "robust", in_turn=True),
            "`robust`, one pass": make_step(case, dtype, "robust", one_pass=True)}, rounds)
        yield rows, timing.ratios(rows, [
            Pair("`robust`", "`both`", target=1.03),
            Pair("`robust`, one after the other", "`both`"),
            Pair("`robust`, one pass", "`both`", target=1.03)])


def settings_for_methods(quick: bool) -> MethodSettings:
    """As :func:`settings_for`."""
    settings = MethodSettings(**vars(settings_for(quick)))
    return dataclasses.replace(
        settings, methods=("normal", *PENALTIES[:1])) if quick else settings


def measure_costs(settings: MethodSettings) -> timing.Parts:
    """Times a step of each method against one of ``normal``, beside the work of its passes."""
    (case, rounds), *_ = _cases(settings)
    for dtype in settings.dtypes:
        rows = _rows(case, dtype, {
            f"`{method}`": make_step(case, dtype, method) for method in settings.methods}, rounds)
        yield rows, timing.ratios(rows, [
            Pair(f"`{method}`", "`normal`", target=2.5 if method in PENALTIES else None)
            for method in settings.methods if method != "normal"])


def measure_peak(settings: Settings) -> timing.Parts:
    """Measures the share of the device's arithmetic peak that a step of ``normal`` achieves.

    The peak is the fastest product of two square matrices, of the type and at the precision of the
    step (float32 is JAX's default, TF32 on GPUs that have it). The step's operations are those of
    :func:`step_flops`.
    """
    (case, rounds), *_ = _cases(settings)
    made = problem.make_problem(case)
    for dtype in settings.dtypes:
        operations = {"a step": step_flops(made.model, made.variables, made.images)}
        contenders = {"a step": make_step(case, dtype, "normal")}
        for size in settings.product_sizes:
            name = f"product of {size} x {size} matrices"
            operations[name], contenders[name] = 2 * size**3, _make_product(size, dtype)
        rows = _rows(case, dtype, contenders, rounds)
        for row in rows:
            row["tera_per_second"] = (
                operations[row["contender"]] / row["ms"]["median"] * 1e3 / 1e12)
        step, *products = (row["tera_per_second"] for row in rows)
        yield rows, [timing.judged(
            Pair("operations per second of a step", "of the fastest matrix product"),
            rows[0]["case"], ratio=step / max(products))]


def step_flops(model: nn.Module, variables: dict, images: jax.Array) -> int:
    """Counts the operations of convolutions and matrix products in a training step on a batch.

    These are two for each product of a weight and a number, and as many again for each of the
    gradients with respect to the weights and to the inputs of the layer. Padding counts as if it
    were images, and so does the gradient with respect to the images, which no step computes: 1 %.
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


class _InTurn(nn.Module):
    """A network without the field ``batch_groups``."""

    network: nn.Module

    @nn.compact
    def __call__(self, images, *, train):
        return self.network(images, train=train)


@functools.cache
def make_step(case: Case, dtype: str, method: str, *, one_pass: bool = False,
              in_turn: bool = False) -> Contender:
    """Compiles this library's step, each call of which continues from the one before.

    With ``in_turn``, two passes of a method are made one after the other.
    """
    made = problem.make_problem(case)
    model, head = made.model.clone(dtype=jnp.dtype(dtype)), "head"
    optimizer = training.sgd(LEARNING_RATE)
    # A copy: the state is donated, and other contenders start from the same weights.
    params, batch_stats = jax.tree.map(
        jnp.copy, (made.variables["params"], made.variables["batch_stats"]))
    if in_turn:
        model, head = _InTurn(model), f"network/{head}"
        params, batch_stats = {"network": params}, {"network": batch_stats}
    kernel, _ = head_parameters(params, head)
    state = training.TrainState(
        step=jnp.zeros((), jnp.int32), params=params, batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        centroids=init_centroids(kernel.shape[1], kernel.shape[0]), key=jax.random.key(1))
    batch = Batch(made.images, jnp.clip(made.images + 0.1, 0, 1), made.labels.astype(jnp.int32))
    objective = make_method(method, one_pass=one_pass, perturb=perturbations.gaussian(0.1))
    step = training.make_train_step(model, objective, optimizer, head=head)
    start = time.perf_counter()
    # Flax's batch norm mixes its float32 statistics with bfloat16 images.
    with jax.numpy_dtype_promotion("standard"):
        compiled = parallel.compile(
            parallel.make_layout("jit"), step, donate_argnums=0).lower(state, batch).compile()
    compile_s = time.perf_counter() - start
    latest = [state]

    def call():
        latest[0], metrics = compiled(latest[0], batch)
        jax.block_until_ready((latest[0], metrics))
        return metrics

    return Contender(call, {"compile_s": compile_s, "work": objective.passes.relative})


def make_torch_step(case: Case, dtype: str, peer: str) -> Contender:
    """Makes a step of PyTorch from the same weights, in one of its forms.

    Raises:
      RuntimeError: if ``torch.compile`` fails, for example without a C++ compiler.
    """
    import torch

    from experiments.bench import torch_peer

    if jax.default_backend() != "cpu":
        # The same as JAX: TF32 for float32, and the fastest convolutions.
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
    return problem.torch_contender(step, **facts)


def _rows(case: Case, dtype: str, steps: Mapping[str, Contender], rounds: int) -> list[dict]:
    return timing.rows(f"ResNet18, width {case.width}, batch {case.batch_size}, {dtype}", steps,
                       rounds)


def _make_product(size: int, dtype: str) -> Contender:
    draw = np.random.default_rng(0)
    left, right = (jnp.asarray(draw.normal(size=(size, size)), dtype) for _ in range(2))
    product = jax.jit(jnp.matmul)
    return Contender(lambda: jax.block_until_ready(product(left, right)))


def _cases(settings: Settings) -> list[tuple[Case, int]]:
    return [(Case(settings.num_classes, settings.image_size, settings.width, batch_size), rounds)
            for batch_size, rounds in settings.rounds]
