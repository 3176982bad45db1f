"""``bench folder``: what photographs cost on their way to the network, beside its update.

    python -m experiments bench folder

JPEG files are decoded and resized, read from the decoded cache, augmented as in the paper's
Appendix H.2 and made noisy, each beside an update of MobileNetV3-Small on as many images.
"""

import dataclasses
import json
import pathlib
import tempfile
import time
from collections.abc import Mapping

import jax
import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from experiments.bench import markdown, programs, timing
from jaxrobust import data, perturbations
from jaxrobust.app import files, provenance
from jaxrobust.app.config import RunConfig
from jaxrobust.app.recipe import get_recipe
from jaxrobust.app.report.page import significant
from jaxrobust.data import Dataset, Split
from jaxrobust.images import to_float
from jaxrobust.parallel import make_layout

CLASSES = ("china", "flower")
"""scikit-learn's two sample photographs, of which all files are made."""


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


QUICK = Settings(file_size=(60, 80), image_size=(32, 40), num_files=10, batch_size=2, rounds=2,
                 model="small_cnn", methods=("normal",))
"""Shows that everything works, and nothing else."""


def measure(folder: pathlib.Path, *, quick: bool = False) -> str:
    """Writes ``folder.json`` and ``folder.md``.

    Returns:
      The table.

    Raises:
      InputError: (a ValueError) if the folder holds something else, or other settings.
    """
    settings = QUICK if quick else Settings()
    result = {"benchmark": "folder", "settings": dataclasses.asdict(settings)}
    files.claim(folder, "settings.json", json.dumps(result, indent=2) + "\n")
    load = [timing.load_average()]
    milliseconds, kilobytes = _of_files(settings)
    milliseconds |= _of_batches(settings)
    result |= {
        "provenance": provenance.describe() | {
            "cores": timing.cores(), "load_average": [*load, timing.load_average()]},
        "file_kilobytes": kilobytes,
        "ms_per_image": {name: programs.summary(values) for name, values in milliseconds.items()},
    }
    files.write_json(folder / "folder.json", result)
    files.write_text(folder / "folder.md", page_text(result))
    return table(result)


def write_photographs(folder: pathlib.Path, num_files: int, size: tuple[int, int]) -> float:
    """Writes JPEG files of random parts of the sample photographs, and returns their mean kB.

    Each is scaled to height and width ``size`` and given noise of 6/255, as of a camera's sensor,
    since what is scaled up is smoother, and quicker to decode, than what a camera writes.
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
    """Milliseconds an image by round, and the mean size of a file in kB."""
    spent: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = pathlib.Path(temporary)
        kilobytes = write_photographs(root / "images", settings.num_files, settings.file_size)

        def load(cache, threads):
            start = time.perf_counter()
            dataset = data.load_folder(
                root / "images", cache_dir=root / cache, image_size=settings.image_size,
                num_threads=threads, in_memory=False)
            return dataset, 1e3 * (time.perf_counter() - start) / settings.num_files

        for number in range(settings.rounds):
            for threads in sorted({1, timing.cores()}):
                dataset, cost = load(f"cache-{number}-{threads}", threads)
                spent.setdefault(f"decode and resize, {threads} thread(s), once", []).append(cost)
            _, cost = load(f"cache-{number}-{threads}", threads)
            spent.setdefault("open the decoded files again", []).append(cost)
            rows = np.random.default_rng(number).permutation(len(dataset.train.labels))
            start = time.perf_counter()
            for row in rows:
                dataset.train.images[row : row + 1]
            spent.setdefault("read a decoded image, streamed", []).append(
                1e3 * (time.perf_counter() - start) / len(rows))
    return spent, kilobytes


def _of_batches(settings: Settings) -> dict[str, list[float]]:
    """Milliseconds an image by round, of what is done on the device."""
    shape = (settings.batch_size, *settings.image_size, 3)
    images = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    labels = np.arange(settings.batch_size, dtype=np.int32) % len(CLASSES)
    keys = jax.random.split(jax.random.key(0), settings.batch_size)
    augment = jax.jit(jax.vmap(data.photo_augmentation(flip=True)))
    noise = jax.jit(perturbations.gaussian(40 / 255))
    floats = jax.block_until_ready(to_float(jax.device_put(images)))
    contenders = {
        "augment on the device": lambda: jax.block_until_ready(augment(keys, floats)),
        "add Gaussian noise": lambda: jax.block_until_ready(noise(keys[0], floats)),
    }
    split = Split(images, labels)
    dataset = Dataset("folder", split, split, CLASSES, (0.5,) * 3, (0.25,) * 3, flip=True)
    for method in settings.methods:
        config = run_config(method, settings)
        contenders[f"an update of {method}, with its augmentation and noise"] = programs.Runner(
            [config], dataset, make_layout("jit"), 1).call
    return {name: [1e3 * seconds / settings.batch_size for seconds in values]
            for name, values in timing.in_turn(contenders, settings.rounds).items()}


def run_config(method: str, settings: Settings) -> RunConfig:
    """The run of the recipe `road` whose update is timed."""
    return dataclasses.replace(
        get_recipe("road").run(method, 0), dataset="folder:photographs", validation_size=0,
        model=settings.model,
        image_size=settings.image_size, batch_size=settings.batch_size, select="last")


def table(result: Mapping) -> str:
    """Time an image, and its share of the cheapest update's."""
    update = min(row["median"] for name, row in result["ms_per_image"].items()
                 if name.startswith("an update"))
    return markdown.table(("", "ms an image", "quartiles", "of an update of normal"), [
        (name, significant(row["median"]),
         f"{significant(row['lower_quartile'])} to {significant(row['upper_quartile'])}",
         f"{100 * row['median'] / update:.1f} %")
        for name, row in result["ms_per_image"].items()])


def page_text(result: Mapping) -> str:
    """The page, from the content of ``folder.json``."""
    settings = result["settings"]
    high, wide = settings["file_size"]
    to_high, to_wide = settings["image_size"]
    return "\n\n".join([
        "# From a folder of photographs to the network",
        f"{settings['num_files']} JPEG files of {high} x {wide} pixels, parts of scikit-learn's "
        f"sample photographs, {significant(result['file_kilobytes'])} kB on average, decoded to "
        f"{to_high} x {to_wide}; batches of {settings['batch_size']}, MobileNetV3-Small. Medians "
        f"of {settings['rounds']} rounds.",
        table(result),
        "Decoding happens once for a folder, by threads, into a file that later runs share. "
        "Augmentation and noise are part of the update, whose time has them in it.",
        "## Provenance",
        markdown.provenance(result["provenance"]),
    ]) + "\n"
