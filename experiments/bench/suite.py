"""Times what the suite measures against plain inference on as many images.

Plain inference is the compiled network alone, on floats that are on the device already, in batches
of the size that the measurement uses.
"""

import dataclasses
import functools
import math
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import problem, timing
from experiments.bench.problem import Case, Problem
from experiments.bench.timing import Pair
from jaxrobust.app.classifiers import ForeignModel
from jaxrobust.app.config import Evaluation
from jaxrobust.app.execution import batch_size_of
from jaxrobust.app.measurements import accuracy, certificates, runner
from jaxrobust.corruptions import BENCHMARK, SEVERITIES, corruption
from jaxrobust.data import Dataset, Split
from jaxrobust.evaluation import logits_fn_of
from jaxrobust.images import to_float
from jaxrobust.parallel import make_layout
from jaxrobust.perturbations import per_example

PLAIN, NOISE, CERTIFICATE = "plain inference", "accuracies under noise", "certificate"
TOGETHER = "all corruptions together"

Shares = Mapping[str, tuple[Callable[[], object], int]]
"""By contender: a call, and the number of images that it processes."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured; the defaults are the full benchmark."""

    widths: tuple[int, ...] = (64, 16)  # the paper's, and a narrow one
    image_size: int = 32
    rounds: int = 3
    num_images: int = 250
    noise_levels: tuple[float, ...] = (10, 20, 30, 40, 50, 60)
    num_draws: int = 10
    corruptions: tuple[str, ...] = BENCHMARK
    severities: tuple[int, ...] = SEVERITIES
    n0: int = 100
    n: int = 10_000


def settings_for(quick: bool) -> Settings:
    """The full benchmark, or a quick one to see that everything works."""
    return Settings() if not quick else Settings(
        widths=(4,), image_size=8, rounds=2, num_images=10, noise_levels=(10, 20), num_draws=2,
        corruptions=("gaussian_noise", "contrast"), severities=(1, 2), n0=40, n=40)


def measure_noise(settings: Settings) -> timing.Parts:
    """Times the accuracies under noise of the command ``evaluate``, all draws at all levels."""
    asked = Evaluation(settings.noise_levels, settings.num_draws)
    number = len(settings.noise_levels) * settings.num_draws * settings.num_images
    for made in _problems(settings):
        case = (f"{_network(made)}, {settings.num_images} images, {len(settings.noise_levels)} "
                f"levels, {settings.num_draws} draws")
        rows = _rows(case, settings.rounds, {
            NOISE: (functools.partial(_measure, accuracy.ACCURACY, _model(made), asked), number),
            PLAIN: _plain(made, batch_size_of(made.images), number)})
        yield rows, timing.ratios(rows, [Pair(PLAIN, NOISE, "at least", 0.9)])


def measure_corruptions(settings: Settings) -> timing.Parts:
    """Times corruptions without a network, and networks without corruptions.

    The target is for the first width: the paper's, at the full size.
    """
    number = settings.num_images * len(settings.severities)
    networks = {f"{PLAIN}, {_network(made)}": made for made in _problems(settings)}
    images = _bytes(next(iter(networks.values())))
    case = f"{len(images)} images of {_size(images)}, {len(settings.severities)} severities"
    for name in settings.corruptions:  # Compiles: the first call says how often to repeat it.
        _corrupt(name, settings.severities, images)
    rows = _rows(case, settings.rounds, {
        **{name: (functools.partial(_corrupt, name, settings.severities, images), number)
           for name in settings.corruptions},
        **{name: _plain(made, batch_size_of(images), number) for name, made in networks.items()}})
    every = [row["ms"]["rounds"] for row in rows if row["contender"] in settings.corruptions]
    rows.append(timing.row(case, TOGETHER, (np.sum(every, axis=0) / 1e3).tolist()))
    judged, *informative = networks
    yield rows, timing.ratios(rows, [Pair(TOGETHER, judged, target=1.0),
                                     *(Pair(TOGETHER, name) for name in informative)])


def measure_certificates(settings: Settings) -> timing.Parts:
    """Times the certificate of one image of the command ``evaluate``, by the draws that it takes.

    Random weights classify all draws alike, so that it never stops early.
    """
    asked = certificates.CertificateSettings(n0=settings.n0, n=settings.n, limit=None)
    number = settings.n0 + settings.n
    for made in _problems(settings):
        call = functools.partial(_measure, certificates.CERTIFICATES, _model(made, 1), asked)
        if call()["mean_draws"] != number:
            raise timing.NotMeasured("the certificate stopped early")
        rows = _rows(f"{_network(made)}, {settings.n0} + {settings.n} draws", settings.rounds, {
            CERTIFICATE: (call, number), PLAIN: _plain(made, batch_size_of(made.images), number)})
        yield rows, timing.ratios(rows, [Pair(PLAIN, CERTIFICATE, "at least", 0.9)])


def _problems(settings: Settings) -> list[Problem]:
    return [problem.make_problem(Case(10, settings.image_size, width, settings.num_images))
            for width in settings.widths]


def _size(images: Any) -> str:
    return f"{images.shape[1]} x {images.shape[2]}"


def _network(made: Problem) -> str:
    return f"ResNet18 of width {made.model.width} on {_size(made.images)}"


def _bytes(made: Problem) -> np.ndarray:
    return np.round(255 * np.asarray(made.images)).astype(np.uint8)


def _model(made: Problem, num_images: int | None = None) -> ForeignModel:
    """The network with its first images, or all, as the test set."""
    test = Split(_bytes(made)[:num_images], np.asarray(made.labels, np.int32)[:num_images])
    names = tuple(map(str, range(made.model.num_classes)))
    return ForeignModel(
        "model", Dataset("noise", test, test, names, made.model.mean, made.model.std, flip=False),
        make_layout("jit"), logits_fn_of(made.model, made.variables))


def _measure(measurement: runner.Measurement, model: ForeignModel, settings: Any) -> dict:
    """Measures as the commands do, files included; returns the facts."""
    with tempfile.TemporaryDirectory() as folder:
        return runner.measure(measurement, model, settings, pathlib.Path(folder), "bench")


def _plain(made: Problem, batch_size: int, number: int) -> tuple[Callable[[], object], int]:
    """A call that classifies at least ``number`` images, and how many it does."""
    images = jnp.resize(made.images, (min(batch_size, number), *made.images.shape[1:]))
    classify = jax.jit(lambda logits_fn, images: logits_fn(images))
    logits_fn = logits_fn_of(made.model, made.variables)
    batches = math.ceil(number / len(images))

    def call():
        for _ in range(batches):
            jax.block_until_ready(classify(logits_fn, images))

    return call, batches * len(images)


def _corrupt(name: str, severities: Sequence[int], images: np.ndarray) -> None:
    """Corrupts images, a batch at each severity, as ``evaluate`` of the library does."""
    for severity in severities:
        jax.block_until_ready(_corrupted(corruption(name, severity), images))


@jax.jit
def _corrupted(corrupt, images):
    return per_example(corrupt, jax.random.key(0), to_float(images), jnp.arange(len(images)))


def _rows(case: str, rounds: int, shares: Shares) -> list[dict]:
    """Times contenders in turn, each by the number of its images."""
    seconds = timing.in_turn({name: call for name, (call, _) in shares.items()}, rounds)
    return [timing.row(case, name, seconds[name], number)
            for name, (_, number) in shares.items()]
