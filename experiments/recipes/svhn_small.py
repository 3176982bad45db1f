"""Real SVHN with a narrow ResNet18: `cifar10_small` on the other data set, with noise of 0.15.

    python -m experiments reproduce svhn_small --jobs 2

The settings were found on CIFAR-10 and are untried on SVHN, which was unavailable.
"""

import dataclasses

from experiments.recipes import cifar10_small, svhn
from jaxrobust.app.recipe import method_rows

BASE = dataclasses.replace(cifar10_small.BASE, dataset="svhn_cropped", noise_std=0.15)

RECIPE = dataclasses.replace(
    cifar10_small.RECIPE,
    name="svhn_small",
    title="SVHN, 10,240 images, a narrow ResNet18",
    rows={
        **method_rows(BASE),
        "robust_paper": dataclasses.replace(
            cifar10_small.RECIPE.rows["robust_paper"], dataset=BASE.dataset,
            noise_std=BASE.noise_std),
    },
    evaluation=dataclasses.replace(
        cifar10_small.RECIPE.evaluation, noise_levels=svhn.RECIPE.evaluation.noise_levels),
    paper_table="table2",
)
