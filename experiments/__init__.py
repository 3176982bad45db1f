"""The paper: its recipes, its numbers, its tables and figures, on top of the application."""

from experiments import paper, recipes  # noqa: F401  They make themselves known to the commands.
