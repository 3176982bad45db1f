"""Times PGD with 20 steps against Foolbox's, with the same network, images and radius."""

import dataclasses
import importlib.util
from collections.abc import Callable

import jax

from experiments.bench import problem, timing
from experiments.bench.problem import Case
from experiments.bench.timing import Contender, Pair
from jaxrobust import attacks

OWN, FOOLBOX, FOOLBOX_COMPILED = "PGD", "PGD of Foolbox", "PGD of Foolbox, logits compiled"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured; the defaults are the full benchmark."""

    norm: str = "linf"
    epsilon: float = 8 / 255
    num_steps: int = 20
    rounds: int = 3
    width: int = 64
    batch_size: int = 64
    image_size: int = 32


def settings_for(quick: bool) -> Settings:
    """The full benchmark, or a quick one to see that everything works."""
    return Settings() if not quick else Settings(
        num_steps=2, rounds=2, width=8, batch_size=2, image_size=8)


def measure(settings: Settings) -> timing.Parts:
    """Times an attack on a batch; both evaluate the images once more at the end."""
    made = problem.make_problem(Case(10, settings.image_size, settings.width, settings.batch_size))

    def logits_fn(images):
        return made.model.apply(made.variables, images, train=False).logits

    def own():
        return jax.block_until_ready(attacks.pgd(
            logits_fn, made.images, made.labels, jax.random.key(0), norm=settings.norm,
            epsilon=settings.epsilon, num_steps=settings.num_steps))

    missing = (None if importlib.util.find_spec("foolbox") is not None
               else "Foolbox is not installed; `pip install -e .[bench]` does it")
    contenders = {OWN: Contender(own)}
    if missing is None:
        contenders |= {FOOLBOX: _of_foolbox(logits_fn, made, settings),
                       FOOLBOX_COMPILED: _of_foolbox(jax.jit(logits_fn), made, settings)}
    case = (f"{settings.num_steps} steps, {settings.norm}, ResNet18 of width {settings.width}, "
            f"{settings.batch_size} images of {settings.image_size} x {settings.image_size}")
    rows = timing.rows(case, contenders, settings.rounds, per=settings.batch_size)
    yield rows, timing.ratios(rows, [
        Pair(OWN, FOOLBOX, target=1.0), Pair(OWN, FOOLBOX_COMPILED, target=1.0)], missing)


def _of_foolbox(logits_fn: Callable, made: problem.Problem, settings: Settings) -> Contender:
    import foolbox

    model = foolbox.models.JAXModel(logits_fn, bounds=(0, 1))
    kind = foolbox.attacks.LinfPGD if settings.norm == "linf" else foolbox.attacks.L2PGD
    attack = kind(rel_stepsize=2.5 / settings.num_steps, steps=settings.num_steps)
    return Contender(lambda: jax.block_until_ready(
        attack(model, made.images, made.labels, epsilons=settings.epsilon)[1]))
