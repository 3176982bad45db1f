"""The paper's road experiment (Tables 3 and 4, Appendix H.2) on any folder of photographs.

    python -m experiments reproduce road --data folder:PATH --init-from mobilenet_v3_small.pth

A sub-folder for each class, four fifths for training; MobileNetV3 from ImageNet weights (a file of
torchvision's), all layers trained; images of 400 x 500; Adam at 1e-4, a tenth of it after epoch 50
of 70; noise of 40/255; the epoch that is best on an eighth of the training images; tested by every
row of Tables 3 and 4. It needs a GPU.

The paper leaves open, and this recipe chooses, the small one of the two MobileNetV3, its own 1,024
features, batches of 64, and no weight decay. The paper says 80 % and 20 % and "the best models
based on the validation accuracy", so that its test images probably chose the epoch; here they do
not.

    python -m experiments reproduce road_small --data folder:PATH

is the same at 64 x 80 from random weights, in three quarters of an hour on two CPU cores for a
thousand images, with the sizes of patches and stripes scaled by 64/400: it compares the methods
with each other, not with the paper. Weights of the loss and schedule are those of `cifar10_small`;
they were not searched for.
"""

import dataclasses

from jaxrobust.app.config import CurvatureConfig, Evaluation, OptimizerConfig, RunConfig
from jaxrobust.app.recipe import (
    METHOD_LABELS,
    METHOD_PAPER_ROWS,
    NOISE_LEVELS,
    PHOTOS,
    Cost,
    Recipe,
    method_rows,
    photo_perturbations,
)
from jaxrobust.data import FOLDER_PREFIX
from jaxrobust.losses import RobustLossConfig

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
        noise_levels=NOISE_LEVELS, perturb=tuple(photo_perturbations(70, 6)), tsne_images=400),
    curvature=CurvatureConfig(num_images=64, batch_size=4),
    paper_table="table3",
    paper_rows=METHOD_PAPER_ROWS,
    paper_perturbations=photo_perturbations(70, 6),
    note="The paper's numbers are of its own road images, which are not public.",
    cost=Cost(cpu_hours=20, cpu_gigabytes=8, gpu_hours=0.3, images=1250,
              basis="projected from a thousand training images"),
)

ROAD_SMALL = dataclasses.replace(
    PHOTOS,
    name="road_small",
    paper_table="table3",
    paper_rows=METHOD_PAPER_ROWS,
    paper_perturbations=photo_perturbations(11, 1),
    note="Images of 64 x 80 instead of 400 x 500, patches of 11 and stripes of 1 pixel instead of "
         "70 and 6, a network that starts from random weights, and the short schedule of the small "
         "recipes with the paper's loss at small weights: compare the rows with each other. The "
         "paper's numbers are of its own road images, which are not public.",
)
