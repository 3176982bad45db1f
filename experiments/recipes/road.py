"""The paper's road experiment (Tables 3 and 4, Appendix H.2) on anybody's folder of photographs.

    python -m experiments reproduce road --data folder:PATH --init-from mobilenet_v3_small.pth

A sub-folder for each class, four fifths for training; MobileNetV3 from ImageNet weights (a file of
torchvision's), all layers trained; images of 400 x 500; Adam at 1e-4, a tenth of it after epoch 50
of 70; noise of 40/255; the epoch that is best on an eighth of the training images; tested by every
row of Tables 3 and 4. It needs a GPU.

Open in the paper, and chosen here: the small one of the two MobileNetV3, its own 1,024 features,
batches of 64, no weight decay. The paper says 80 % and 20 % and "the best models based on the
validation accuracy", so that its test images probably chose the epoch; here they do not.

    python -m experiments reproduce road_small --data folder:PATH

is the same at 64 x 80 from random weights, in three quarters of an hour on two CPU cores for a
thousand images, with the sizes of patches and stripes scaled by 64/400: it compares the methods
with each other, not with the paper. Weights of the loss and schedule are those of `cifar10_small`;
they were not searched for.
"""

import dataclasses

from experiments.config import (
    METHOD_LABELS,
    METHOD_PAPER_ROWS,
    SHORT_SCHEDULE_LABELS,
    Cost,
    CurvatureConfig,
    Evaluation,
    OptimizerConfig,
    Recipe,
    RunConfig,
    method_rows,
)
from jaxrobust.data import FOLDER_PREFIX
from jaxrobust.losses import RobustLossConfig

LEVELS = (0, 10, 30, 40, 60)


def perturbations_of(patch: int, thickness: int) -> dict[str, str]:
    """The rows of Table 4 by what they are; combinations in the order of the authors' release."""
    occlusion, down_up, stripes = f"occlusion(20,{patch})", "down_up(3)", f"stripes(10,{thickness})"
    return {
        occlusion: "Occlusion",
        f"gaussian(40/255)+{occlusion}": "Occlusion + Gaussian noise",
        down_up: "DU sampling",
        f"{down_up}+{occlusion}": "DU sampling + occlusion",
        stripes: "Stripe masking",
        f"{down_up}+{stripes}": "DU sampling + stripe masking",
    }


BASE = RunConfig(
    dataset=FOLDER_PREFIX, validation_size=0.125, model="mobilenet_v3_small", width=16,
    num_features=1024, robust=RobustLossConfig(delta_d=3.0), noise_std=40 / 255,
    augmentation="photo", epochs=70, batch_norm_statistics="running",
    optimizer=OptimizerConfig(name="adam", learning_rate=1e-4, decay_epochs=(50,),
                              decay_factor=0.1, weight_decay=0.0))

ROAD = Recipe(
    name="road",
    title="A folder of photographs, MobileNetV3, the paper's road settings",
    rows=method_rows(BASE),
    labels=METHOD_LABELS,
    evaluation=Evaluation(
        noise_levels=LEVELS, perturb=tuple(perturbations_of(70, 6)), tsne_images=400),
    curvature=CurvatureConfig(num_images=64, batch_size=4),
    paper_table="table3",
    paper_rows=METHOD_PAPER_ROWS,
    paper_perturbations=perturbations_of(70, 6),
    note="The paper's numbers are of its own road images, which are not public.",
    cost=Cost(cpu_hours=20, cpu_gigabytes=8, gpu_hours=0.3, images=1250,
              basis="projected from a thousand training images"),
)

ROAD_SMALL = dataclasses.replace(
    ROAD,
    name="road_small",
    title="A folder of photographs at 64 x 80, MobileNetV3 from random weights",
    rows=method_rows(dataclasses.replace(
        BASE, image_size=(64, 80), num_features=128, batch_size=32,
        batch_norm_statistics="recomputed",
        robust=RobustLossConfig(alpha=0.01, beta=0.05, lam=0.05, delta_d=3.0),
        optimizer=OptimizerConfig(
            name="adam", learning_rate=2e-3, schedule="cosine", warmup_epochs=2.0,
            weight_decay=0.0, clip_norm=5.0))),
    labels=SHORT_SCHEDULE_LABELS,
    evaluation=Evaluation(noise_levels=LEVELS, perturb=tuple(perturbations_of(11, 1))),
    curvature=CurvatureConfig(num_images=64, num_probes=8, smoothing_draws=8, batch_size=16),
    paper_perturbations=perturbations_of(11, 1),
    cost=Cost(cpu_hours=0.7, cpu_gigabytes=6, gpu_hours=0.1, images=1000,
              basis="projected, on CPUs from what a thousand images took"),
    note="Images of 64 x 80 instead of 400 x 500, patches of 11 and stripes of 1 pixel instead of "
         "70 and 6, a network that starts from random weights, and the short schedule of the small "
         "recipes with the paper's loss at small weights: compare the rows with each other. The "
         "paper's numbers are of its own road images, which are not public.",
)
