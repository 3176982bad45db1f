"""The commands of the paper, and the table of all."""

import dataclasses
import pathlib

import jax

from experiments import bench, readme, targets
from jaxrobust import InputError, _validate
from jaxrobust.app import files
from jaxrobust.app.commands import Compare, Positional
from jaxrobust.app.config import distinct
from jaxrobust.app.recipe import RECIPES


@dataclasses.dataclass(frozen=True)
class Reproduce(Compare):
    """Make a table or figure of the paper, or run a whole recipe: train, test, measure, report.

    Leaves finished runs as they are, and resumes interrupted ones.
    """

    recipe: Positional[str]
    """A table, figure or question, such as table1, figure9 or centroids; "paper", "questions" or
    "all" of them; or a recipe, such as digits, cifar10_small or road."""
    scale: str | None = None
    """Of tables, figures and questions: "full", the paper's, for GPUs; "small", for CPUs; "tiny",
    which shows that everything runs; "full" if none is given. A recipe has its own."""
    studies: tuple[str, ...] | None = None
    """Of tables and figures made from several data sets, such as "cifar10" and "svhn", those to be
    made; all if none is given."""

    def __post_init__(self):
        super().__post_init__()
        if self.studies is not None:
            _validate.in_range("number of studies", len(self.studies), 1)
            distinct("study", self.studies)

    def __call__(self) -> None:
        _validate.one_of("table, figure, question or recipe", self.recipe,
                         (*targets.TARGETS, *targets.EVERY, *RECIPES))
        if self.recipe in RECIPES:
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
            data=self.data, init_from=self.init_from, skip_bad=self.skip_bad, only=self.studies)
        if self.dry_run:
            print(plan.text())
            return
        files.require_writable(plan.out)
        failures = self.run_plans(list(plan.studies.values()), plan.text())
        if self.report and files.is_writer():
            for path in targets.write_targets(plan):
                print(f"Written: {path}")
        files.barrier("targets")
        if failures:
            raise InputError("; ".join(failures))


@dataclasses.dataclass(frozen=True)
class Readme:
    """Write the tables of the README and the docs anew, from the numbers under results/."""

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
    "folder": decoding and augmenting photographs."""
    only: tuple[str, ...] | None = None
    """Sections by letter, to be measured anew; if not given, those not measured yet."""
    out: pathlib.Path | None = None
    """Folder of the results; runs/bench-BENCHMARK if none is given."""
    quick: bool = False
    """Only show that it works: tiny networks and two rounds, whose numbers say nothing."""

    def __call__(self) -> None:
        jax.config.update("jax_enable_compilation_cache", False)  # Compiling is measured too.
        bench.check(self.benchmark, self.only)
        folder = self.out or pathlib.Path("runs") / f"bench-{self.benchmark}"
        files.require_writable(folder)
        print(bench.run(self.benchmark, folder, quick=self.quick, only=self.only))
        print(f"The results are in {folder}")
