"""The paper's SVHN experiment (Table 2) to the letter of Appendix H.1.

    python -m experiments reproduce svhn

As `cifar10`, with noise of 0.15. Expected by the paper: robust 96.13 % clean and 92.47 % at
36/255. 5,000 training images are held out to choose the epoch.
"""

from jaxrobust.app.config import Evaluation, RunConfig
from jaxrobust.app.recipe import METHOD_LABELS, METHOD_PAPER_ROWS, Cost, Recipe, method_rows

RECIPE = Recipe(
    name="svhn",
    title="SVHN, the paper's settings",
    rows=method_rows(RunConfig(dataset="svhn_cropped", validation_size=5000, noise_std=0.15,
                          batch_norm_statistics="running")),
    labels=METHOD_LABELS,
    evaluation=Evaluation(noise_levels=(0, 5, 10, 20, 36, 42)),
    paper_rows=METHOD_PAPER_ROWS,
    paper_table="table2",
    cost=Cost(cpu_hours=427, cpu_gigabytes=3, gpu_hours=0.55, basis="projected"),
)
