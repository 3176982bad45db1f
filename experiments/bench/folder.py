"""Times what happens to photographs before they reach the network, beside an update.

JPEG files are decoded and resized, read from the decoded cache, augmented as in the paper's
Appendix H.2 and made noisy, each beside an update of MobileNetV3-Small on as many images.
"""

import dataclasses
import pathlib
import tempfile
import time

import jax
import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from experiments.bench import programs, timing
from experiments.bench.timing import Contender
from jaxrobust import data, perturbations
from jaxrobust.app.config import RunConfig
from jaxrobust.app.recipe import get_recipe
from jaxrobust.data import Dataset, Split
from jaxrobust.images import to_float

CLASSES = ("china", "flower")
"""scikit-learn's two sample photographs, from which all files are made."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured; the defaults are the sizes of the recipe `road`."""

    file_size: tuple[int, int] = (900, 1200)
    image_size: tuple[int, int] = (400, 500)
    num_files: int = 96
    batch_size: int = 16
    rounds: int = 15
    model: str = "mobilenet_v3_small"
    methods: tuple[str, ...] = ("normal", "robust")


def settings_for(quick: bool) -> Settings:
    """The full benchmark, or a quick one to see that everything works."""
    return Settings() if not quick else Settings(
        file_size=(60, 80), image_size=(32, 40), num_files=10, batch_size=2, rounds=2,
        model="small_cnn", methods=("normal",))


def measure(settings: Settings) -> timing.Parts:
    """Times what is done with a photograph, as a share of an update of the first method."""
    file_rows, kilobytes = _of_files(settings)
    shape, to_shape = (f"{high} x {wide}" for high, wide in (
        settings.file_size, settings.image_size))
    rows = [timing.row(f"JPEG of {shape}, {kilobytes:.0f} kB, to {to_shape}", name, seconds)
            for name, seconds in file_rows.items()]
    rows += timing.rows(
        f"{settings.model}, batches of {settings.batch_size} of {to_shape}",
        _contenders(settings), settings.rounds, per=settings.batch_size)
    update = _update(settings.methods[0])
    medians = {row["contender"]: row["ms"]["median"] for row in rows}
    yield rows, [timing.judged(timing.Pair(row["contender"], update), row["case"],
                               ratio=medians[row["contender"]] / medians[update])
                 for row in rows if row["contender"] != update]


def write_photographs(folder: pathlib.Path, num_files: int, size: tuple[int, int]) -> float:
    """Writes JPEG files of random parts of the sample photographs; returns their mean size in kB.

    Each is scaled to height and width ``size`` and gets noise of 6/255, like that of a camera's
    sensor: without it, an enlarged image is smoother, and decoded faster, than a photograph.
    """
    draw = np.random.default_rng(0)
    photographs = load_sample_images().images
    for number in range(num_files):
        which = number % len(CLASSES)
        photograph = photographs[which]
        high, wide = (int(side * draw.uniform(0.6, 1)) for side in photograph.shape[:2])
        top, left = (int(draw.integers(whole - part + 1)) for whole, part in zip(
            photograph.shape[:2], (high, wide), strict=True))
        part = Image.fromarray(photograph[top : top + high, left : left + wide]).resize(
            size[::-1], Image.Resampling.BICUBIC)
        noisy = np.asarray(part) + draw.normal(0, 6, (*size, 3))
        path = folder / CLASSES[which] / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return float(np.mean([path.stat().st_size for path in folder.rglob("*.jpg")])) / 1e3


def _of_files(settings: Settings) -> tuple[dict[str, list[float]], float]:
    """Measures seconds for an image, by round, and the mean size of a file in kB."""
    spent: dict[str, list[float]] = {}

    def add(name, start, count):
        spent.setdefault(name, []).append((time.perf_counter() - start) / count)

    with tempfile.TemporaryDirectory() as temporary:
        root = pathlib.Path(temporary)
        kilobytes = write_photographs(root / "images", settings.num_files, settings.file_size)
        for number in range(settings.rounds):
            for threads, what in [
                    *((threads, f"decode and resize, {threads} thread(s), once")
                      for threads in sorted({1, timing.cores()})),
                    (timing.cores(), "open the decoded files again")]:
                start = time.perf_counter()
                dataset = data.load_folder(
                    root / "images", cache_dir=root / f"cache-{number}-{threads}",
                    image_size=settings.image_size, num_threads=threads, in_memory=False)
                add(what, start, settings.num_files)
            rows = np.random.default_rng(number).permutation(len(dataset.train.labels))
            start = time.perf_counter()
            for row in rows:
                dataset.train.images[row : row + 1]
            add("read a decoded image, streamed", start, len(rows))
    return spent, kilobytes


def _contenders(settings: Settings) -> dict[str, Contender]:
    """What is done with a batch on the device."""
    shape = (settings.batch_size, *settings.image_size, 3)
    images = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    labels = np.arange(settings.batch_size, dtype=np.int32) % len(CLASSES)
    keys = jax.random.split(jax.random.key(0), settings.batch_size)
    augment = jax.jit(jax.vmap(data.photo_augmentation(flip=True)))
    noise = jax.jit(perturbations.gaussian(40 / 255))
    floats = jax.block_until_ready(to_float(jax.device_put(images)))
    split = Split(images, labels)
    dataset = Dataset("folder", split, split, CLASSES, (0.5,) * 3, (0.25,) * 3, flip=True)
    return {
        "augment on the device": Contender(lambda: jax.block_until_ready(augment(keys, floats))),
        "add Gaussian noise": Contender(lambda: jax.block_until_ready(noise(keys[0], floats))),
        **{_update(method): Contender(
            programs.Runner([run_config(method, settings)], dataset, 1).call)
           for method in settings.methods}}


def _update(method: str) -> str:
    return f"an update of `{method}`"


def run_config(method: str, settings: Settings) -> RunConfig:
    """The configuration, from the recipe `road`, whose update is timed."""
    return dataclasses.replace(
        get_recipe("road").run(method, 0), dataset="folder:photographs", validation_size=0,
        model=settings.model, image_size=settings.image_size, batch_size=settings.batch_size,
        select="last")
