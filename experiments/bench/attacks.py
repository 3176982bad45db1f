"""Times PGD with 20 steps against Foolbox's, with the same network, images and radius."""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp

from experiments.bench import problem, timing
from experiments.bench.problem import Case
from experiments.bench.timing import Contender, Pair
from jaxrobust import attacks, losses
from jaxrobust.evaluation import logits_fn_of

OWN, OWN_COMPILED, GRADIENTS = "PGD", "PGD, logits compiled", "its gradients alone"
FOOLBOX, FOOLBOX_COMPILED = "PGD of Foolbox", "PGD of Foolbox, logits compiled"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured; the defaults are the full benchmark."""

    norm: str = "linf"
    epsilon: float = 8 / 255
    num_steps: int = 20
    rounds: int = 3
    widths: tuple[int, ...] = (64, 16)  # the paper's, and that of `cifar10_small`
    batch_size: int = 64
    image_size: int = 32


def settings_for(quick: bool) -> Settings:
    """The full benchmark, or a quick one to see that everything works."""
    return Settings() if not quick else Settings(
        num_steps=2, rounds=2, widths=(8,), batch_size=2, image_size=8)


def measure(settings: Settings) -> timing.Parts:
    """Times an attack on a batch; both evaluate the images once more at the end."""
    missing = (None if importlib.util.find_spec("foolbox") is not None
               else "Foolbox is not installed; `pip install -e .[bench]` does it")
    for width in settings.widths:
        made = problem.make_problem(Case(10, settings.image_size, width, settings.batch_size))
        logits_fn = logits_fn_of(made.model, made.variables)
        compiled = jax.jit(logits_fn)
        contenders = {
            name: Contender(functools.partial(call, function, made, settings))
            for name, call, function in ((OWN, _own, logits_fn), (OWN_COMPILED, _own, compiled),
                                         (GRADIENTS, _gradients, logits_fn))}
        if missing is None:
            contenders |= {FOOLBOX: _of_foolbox(logits_fn, made, settings),
                           FOOLBOX_COMPILED: _of_foolbox(compiled, made, settings)}
        case = (f"{settings.num_steps} steps, {settings.norm}, ResNet18 of width {width}, "
                f"{settings.batch_size} images of {settings.image_size} x {settings.image_size}")
        rows = timing.rows(case, contenders, settings.rounds, per=settings.batch_size)
        yield rows, timing.ratios(rows, [
            Pair(OWN, FOOLBOX, target=1.0), Pair(OWN, FOOLBOX_COMPILED, target=1.0),
            Pair(OWN_COMPILED, FOOLBOX_COMPILED, target=1.0), Pair(OWN, GRADIENTS)], missing)


def _own(logits_fn: Callable, made: problem.Problem, settings: Settings) -> jax.Array:
    return jax.block_until_ready(attacks.pgd(
        logits_fn, made.images, made.labels, jax.random.key(0), norm=settings.norm,
        epsilon=settings.epsilon, num_steps=settings.num_steps))


def _gradients(logits_fn: Callable, made: problem.Problem, settings: Settings) -> None:
    """What no attack with so many steps can do without: as many gradients, one by one."""
    images = made.images
    for _ in range(settings.num_steps):
        images = jax.block_until_ready(_gradient(logits_fn, images, made.labels))


@jax.jit
def _gradient(logits_fn, images, labels):
    return jax.grad(lambda images: jnp.sum(
        losses.softmax_cross_entropy(logits_fn(images), labels)))(images)


def _of_foolbox(logits_fn: Callable, made: problem.Problem, settings: Settings) -> Contender:
    import foolbox

    model = foolbox.models.JAXModel(logits_fn, bounds=(0, 1))
    kind = foolbox.attacks.LinfPGD if settings.norm == "linf" else foolbox.attacks.L2PGD
    attack = kind(rel_stepsize=2.5 / settings.num_steps, steps=settings.num_steps)
    return Contender(lambda: jax.block_until_ready(
        attack(model, made.images, made.labels, epsilons=settings.epsilon)[1]))
