"""The experiments of the paper: recipes, published numbers, tables, figures and benchmarks."""

from experiments import paper, recipes  # noqa: F401  They register recipes and published numbers.
