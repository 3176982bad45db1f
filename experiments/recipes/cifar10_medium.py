"""All of CIFAR-10 and the paper's ResNet18 in a one-cycle schedule: minutes a run on one GPU.

    python -m experiments reproduce cifar10_medium

Width 64, 128 features and all 50,000 training images as in the paper, but 24 epochs in batches of
500 in bfloat16 instead of 200 in batches of 64: 2,400 updates instead of 156,400. With batches of
500 an epoch has no smaller last one, which would need a program of its own. No image is held out;
the last epoch is kept. The paper's loss has the small weights that work in short schedules
(see `cifar10_small`). Two rows are beyond the paper: noise on a half of the images (Rusak et al.
2020), and the paper's loss on top of the softmax losses of `both`.
"""

import dataclasses

from experiments.recipes import cifar10, cifar10_small
from jaxrobust.app.config import Evaluation, OptimizerConfig, RunConfig
from jaxrobust.app.recipe import (
    FURTHER_LABELS,
    METHOD_PAPER_ROWS,
    SHORT_SCHEDULE_LABELS,
    Cost,
    Recipe,
    method_rows,
)

BASE = RunConfig(
    dataset="cifar10", epochs=24, batch_size=500, dtype="bfloat16", select="last",
    checkpoint_every=6, batch_norm_statistics="running", robust=cifar10_small.BASE.robust,
    optimizer=OptimizerConfig(
        learning_rate=0.2, schedule="cosine", warmup_epochs=5.0, clip_norm=5.0))

RECIPE = Recipe(
    name="cifar10_medium",
    title="CIFAR-10, all images, ResNet18 of full width, 24 epochs",
    rows={
        **method_rows(BASE),
        "half_noise": dataclasses.replace(
            BASE, method="noisy", perturb=f"sometimes_gaussian({BASE.noise_std:g}, 1/2)"),
        "robust_both": dataclasses.replace(BASE, method="robust_both"),
    },
    labels=SHORT_SCHEDULE_LABELS | FURTHER_LABELS,
    evaluation=Evaluation(noise_levels=cifar10.RECIPE.evaluation.noise_levels),
    curvature=None,
    cost=Cost(cpu_hours=150, cpu_gigabytes=6, gpu_hours=0.2,
              basis="projected on CPUs, measured on a GPU with three runs at a time"),
    paper_rows=METHOD_PAPER_ROWS,
    paper_table="table1",
    note="The paper's network and images in 2,400 updates instead of 156,400, in bfloat16. "
         "“Robust, short-schedule settings” changes the weights of the paper's loss (alpha 0.01, "
         "beta 0.05, lambda 0.05; each 1 in the paper) and delta_v (0; 0.5 in the paper); "
         "gradients are clipped to norm 5 in every row.",
)
