"""Defines recipes, which are comparisons of methods, and those for anyone's own data."""

import dataclasses

from jaxrobust import _validate
from jaxrobust.app.config import CurvatureConfig, Evaluation, OptimizerConfig, RunConfig
from jaxrobust.data import FOLDER_PREFIX
from jaxrobust.losses import RobustLossConfig


@dataclasses.dataclass(frozen=True)
class Cost:
    """Expected cost of training and testing all rows of a recipe with one seed."""

    cpu_hours: float
    """Hours on two CPU cores, with --jobs 2."""
    cpu_gigabytes: float
    """Memory of all processes together, in gigabytes."""
    gpu_hours: float
    """Hours on one GPU."""
    basis: str
    """Where the numbers come from."""
    images: int | None = None
    """Number of images for which the hours hold; they grow in proportion. None if the recipe has
    its own data set."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A comparison of methods: a row of the tables for each configuration, over all seeds."""

    name: str
    title: str
    rows: dict[str, RunConfig]
    """Configurations by row, in the order of the tables; the names of folders contain the row."""
    labels: dict[str, str]
    """Label of each row in tables."""
    evaluation: Evaluation
    curvature: CurvatureConfig | None = CurvatureConfig()
    """None to skip this measurement."""
    seeds: tuple[int, ...] = (0,)
    paper_table: str | None = None
    """Key in :data:`jaxrobust.app.published.TABLES` that the report compares with."""
    paper_rows: dict[str, str] = dataclasses.field(default_factory=dict)
    """For each row, the row of that table to show beside it."""
    paper_perturbations: dict[str, str] = dataclasses.field(default_factory=dict)
    """For each perturbation of the evaluation, the row of the paper's Table 4 to show beside it."""
    note: str = ""
    """Note to readers of the report, such as differences from the paper."""
    cost: Cost | None = None
    """Expected cost; None if unknown."""
    swept: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    """For each setting, the values whose combinations make the rows of a sweep."""
    may_diverge: bool = False
    """Whether divergence is a result instead of a failure, as in a study of learning rates."""

    def run(self, row: str, seed: int) -> RunConfig:
        """The configuration of one run."""
        _validate.one_of("row", row, self.rows)
        return dataclasses.replace(self.rows[row], seed=seed)


METHOD_LABELS = {
    "normal": "Normal training",
    "noisy": "Training only on noisy images",
    "both": "Training on both clean and noisy images",
    "stability": "Stability training",
    "robust": "Robust (the paper's method)",
}
"""The rows of the paper's tables."""


FURTHER_LABELS = {
    "half_noise": "Noise on half of the images",
    "robust_both": "Both, with the paper's loss added",
}
"""Rows beyond the paper's that several comparisons have."""


def method_rows(base: RunConfig) -> dict[str, RunConfig]:
    """A row for each of the five methods, which differ in nothing else."""
    return {method: dataclasses.replace(base, method=method) for method in METHOD_LABELS}


SHORT_SCHEDULE_LABELS = {**METHOD_LABELS, "robust": "Robust, short-schedule settings"}
"""Labels for recipes whose settings of the paper's method are not the paper's."""

METHOD_PAPER_ROWS = {method: method for method in METHOD_LABELS}
"""Maps each method to its own row of the paper's table."""


RECIPES: dict[str, Recipe] = {}
"""All recipes by name; see :func:`register`."""


def register(*recipes: Recipe) -> None:
    """Adds recipes to those that commands know by name."""
    RECIPES.update({recipe.name: recipe for recipe in recipes})


def get_recipe(name: str) -> Recipe:
    """The recipe of that name."""
    _validate.one_of("recipe", name, RECIPES)
    return RECIPES[name]


DIGITS = Recipe(
    name="digits",
    title="Digits (8 x 8), a small network",
    rows=method_rows(RunConfig(
        dataset="digits", validation_size=237, model="small_cnn", width=16, num_features=32,
        noise_std=0.15, crop_padding=1, epochs=60, checkpoint_every=6, one_pass=True,
        batch_norm_statistics="running",
        robust=RobustLossConfig(alpha=0.01, beta=0.05, lam=0.05),
        optimizer=OptimizerConfig(
            learning_rate=0.01, schedule="cosine", warmup_epochs=2.0, clip_norm=5.0))),
    labels=SHORT_SCHEDULE_LABELS,
    evaluation=Evaluation(noise_levels=(0, 16, 32, 48, 64), tsne_images=360),
    curvature=CurvatureConfig(num_images=360),
    seeds=(0, 1, 2),
    cost=Cost(cpu_hours=0.02, cpu_gigabytes=1, gpu_hours=0.02,
              basis="measured on CPUs, estimated on GPUs"),
    note="In so short a schedule the robust method keeps the paper's loss and distances, with "
         "smaller weights (alpha 0.01, beta 0.05, lambda 0.05), gradients clipped to norm 5, and "
         "one forward pass for both views. Noise of 0.15 (38/255) in training: 48/255 and 64/255 "
         "are beyond it.",
)
"""Real 8 x 8 digits on a small network: the demonstration, which takes minutes on a CPU.

1,200 training images of scikit-learn's digits and 237 held out to choose the epoch, 360 test
images, a network of two convolutions, 60 epochs, three training seeds. Noise of 0.15 in pixel
values: digits tolerate more than photographs. Crops by one pixel, no flips. `both` and `stability`
run the paper's objectives, `robust` the paper's loss with its weights scaled down; the settings
were found on the held-out images.
"""

NOISE_LEVELS = (0, 10, 30, 40, 60)
"""Noise levels for photographs, in units of 1/255: those of the paper's Table 3."""


def photo_perturbations(patch: int, thickness: int) -> dict[str, str]:
    """Labels of the perturbations in the paper's Table 4, in the order of the authors' release, for
    patches and stripes of the given size in pixels."""
    occlusion, down_up, stripes = f"occlusion(20,{patch})", "down_up(3)", f"stripes(10,{thickness})"
    return {
        occlusion: "Occlusion",
        f"gaussian(40/255)+{occlusion}": "Occlusion + Gaussian noise",
        down_up: "DU sampling",
        f"{down_up}+{occlusion}": "DU sampling + occlusion",
        stripes: "Stripe masking",
        f"{down_up}+{stripes}": "DU sampling + stripe masking",
    }


PHOTOS = Recipe(
    name="photos",
    title="A folder of photographs at 64 x 80, MobileNetV3 from random weights",
    rows=method_rows(RunConfig(
        dataset=FOLDER_PREFIX, image_size=(64, 80), validation_size=0.125,
        model="mobilenet_v3_small", width=16, num_features=128, batch_size=32, noise_std=40 / 255,
        augmentation="photo", epochs=70,
        robust=RobustLossConfig(alpha=0.01, beta=0.05, lam=0.05, delta_d=3.0),
        optimizer=OptimizerConfig(
            name="adam", learning_rate=2e-3, schedule="cosine", warmup_epochs=2.0,
            weight_decay=0.0, clip_norm=5.0))),
    labels=SHORT_SCHEDULE_LABELS,
    evaluation=Evaluation(
        noise_levels=NOISE_LEVELS, perturb=tuple(photo_perturbations(11, 1))),
    curvature=CurvatureConfig(num_images=64, num_probes=8, smoothing_draws=8, batch_size=16),
    note="Images of 64 x 80, a network that starts from random weights, and a short schedule with "
         "the paper's loss at small weights: compare the rows with each other.",
    cost=Cost(cpu_hours=0.7, cpu_gigabytes=6, gpu_hours=0.1, images=1000,
              basis="projected, on CPUs from what a thousand images took"),
)
"""A folder with a sub-folder of photographs for each class: the paper's road experiment at 64 x 80
from random weights. A thousand photographs take three quarters of an hour on two CPU cores."""

register(DIGITS, PHOTOS)
