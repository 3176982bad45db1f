"""The commands of the paper."""

import dataclasses
import pathlib

import jax
from tyro.conf import Positional

from experiments import bench, readme, targets
from jaxrobust import InputError, _validate
from jaxrobust.app import files
from jaxrobust.app.commands import Compare, folder_options
from jaxrobust.app.config import distinct
from jaxrobust.app.recipe import RECIPES


@dataclasses.dataclass(frozen=True)
class Reproduce(Compare):
    """Make a table or figure of the paper, or run a whole recipe: train, test, measure, report.

    Leaves finished runs as they are and resumes interrupted ones.
    """

    recipe: Positional[str]
    """A table, figure or question, such as table1, figure9 or centroids; "paper", "questions" or
    "all" for several; or a recipe, such as digits, cifar10_small or road."""
    scale: str | None = None
    """Scale of tables, figures and questions: "full", the paper's, for GPUs; "medium",
    minutes on a GPU, of CIFAR-10 alone; "small", for CPUs; "tiny", to see that everything runs.
    "full" by default; a recipe has its own."""
    studies: tuple[str, ...] | None = None
    """Studies to use for tables and figures made from several, such as "cifar10" and "svhn"; all by
    default."""

    def __post_init__(self):
        super().__post_init__()
        if self.studies is not None:
            _validate.in_range("number of studies", len(self.studies), 1)
            distinct("study", self.studies)

    def __call__(self) -> None:
        _validate.one_of("table, figure, question or recipe", self.recipe,
                         (*targets.TARGETS, *targets.EVERY, *RECIPES))
        if self.recipe not in (*targets.TARGETS, *targets.EVERY):
            for name in ("scale", "studies"):
                if getattr(self, name) is not None:
                    raise InputError(f"Expected {name} only with a table, figure or question, got "
                                     f"{getattr(self, name)!r} with the recipe {self.recipe}.")
            super().__call__()
            return
        if self.rows is not None:
            raise InputError(f"Expected rows only with a recipe, got them with {self.recipe!r}.")
        plan = targets.make_plan(
            self.recipe, self.scale or "full", self.out or pathlib.Path("runs"), seeds=self.seeds,
            data=self.data, init_from=self.init_from, folder_options=folder_options(self),
            only=self.studies)
        if not self.dry_run:
            files.require_writable(plan.out)
        self.run_plans(list(plan.studies.values()), plan.text(), lambda: [
            f"Written: {path}" for path in targets.write_targets(plan)])


@dataclasses.dataclass(frozen=True)
class Readme:
    """Rewrite the tables of the README and the docs from the numbers under results/."""

    check: bool = False
    """Write nothing, and fail if a table is stale."""

    def __call__(self) -> None:
        for path in readme.update(self.check):
            print(f"Written: {path}")


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure the library's speed and memory as ratios, all in one run on this machine."""

    benchmark: Positional[str] = "train"
    """"train": the losses, a training step and the programs of runs; "curvature";
    "evaluate": attacks and the suite; "folder": decoding and augmenting photographs."""
    only: tuple[str, ...] | None = None
    """Letters of the sections to measure again; by default all that are not measured yet."""
    out: pathlib.Path | None = None
    """Folder of the results; runs/bench-BENCHMARK by default."""
    quick: bool = False
    """Check that everything works, with tiny networks and two rounds; ignore the numbers."""

    def __call__(self) -> None:
        jax.config.update("jax_enable_compilation_cache", False)  # Compiling is measured too.
        folder = self.out or pathlib.Path("runs") / f"bench-{self.benchmark}"
        print(bench.run(self.benchmark, folder, quick=self.quick, only=self.only))
        print(f"The results are in {folder}")
