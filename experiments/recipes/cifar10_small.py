"""Placeholder."""

from experiments.config import (
    METHOD_LABELS,
    METHOD_PAPER_ROWS,
    Evaluation,
    Recipe,
    RunConfig,
    method_rows,
)

RECIPE = Recipe(
    name="cifar10_small",
    title="CIFAR-10, a narrow ResNet18",
    rows=method_rows(RunConfig(dataset="cifar10", validation_size=2000, train_size=10240, width=8, num_features=32)),
    labels=METHOD_LABELS,
    evaluation=Evaluation(noise_levels=(0, 2, 4, 8, 16, 20)),
    paper_rows=METHOD_PAPER_ROWS,
    paper_table="table1",
)
