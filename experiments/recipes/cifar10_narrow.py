"""The paper's whole schedule for CIFAR-10, with a ResNet18 narrow enough for CPUs.

    python -m experiments reproduce cifar10_narrow --rows both robust --jobs 2

Every setting of Appendix H.1 but for the width, 8 instead of 64: 200 epochs of all 50,000 training
images, 156,400 updates, the rate of 1e-3 with its decays, the paper's loss at its weights of 1. No
image is held out: the last epoch is kept. It asks whether the paper's ranking of the methods, which
the short schedules of ``cifar10_small`` do not show, comes with the paper's schedule.
"""

import dataclasses

from experiments.recipes import cifar10
from jaxrobust.app.config import CurvatureConfig, RunConfig
from jaxrobust.app.recipe import Cost, method_rows

RECIPE = dataclasses.replace(
    cifar10.RECIPE,
    name="cifar10_narrow",
    title="CIFAR-10, the paper's schedule, a narrow ResNet18",
    rows=method_rows(RunConfig(
        dataset="cifar10", width=8, select="last", batch_norm_statistics="running")),
    curvature=CurvatureConfig(num_images=1000),
    cost=Cost(cpu_hours=15, cpu_gigabytes=3, gpu_hours=0.4, basis="projected"),
    note="A network of an eighth of the paper's width, all other settings the paper's: compare the "
         "rows with each other, not with the paper's.",
)
