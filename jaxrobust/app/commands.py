"""The commands of the application and their options."""

import dataclasses
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated

import jax
import tyro
from tyro.conf import Positional

from jaxrobust import _validate
from jaxrobust.app import (
    arguments,
    classifiers,
    doubt,
    files,
    perturb_figure,
    predict,
    prepare,
    replay,
    rerun,
    run_folder,
    trainer,
)
from jaxrobust.app.config import (
    FOLDER_OPTIONS,
    Evaluation,
    InputError,
    RunConfig,
    check_image_size,
    check_seeds,
    distinct,
    with_settings,
)
from jaxrobust.app.datasets import check_perturbations, open_dataset
from jaxrobust.app.execution import Execution, Feed
from jaxrobust.app.fit import run as fit
from jaxrobust.app.fit import settings as fit_settings
from jaxrobust.app.measurements import MEASUREMENTS, accuracy, robustness, runner
from jaxrobust.app.measurements.robustness import FigureSettings
from jaxrobust.app.measurements.runner import Measurement
from jaxrobust.app.recipe import RECIPES, get_recipe
from jaxrobust.app.report import card, comparison, page, report
from jaxrobust.app.study import sweep
from jaxrobust.app.study.plan import StudyPlan, fit_recipe, plan_study, with_sources
from jaxrobust.app.study.run import load_recipe_dataset, run_study, run_study_in_parallel
from jaxrobust.data import FOLDER_PREFIX, default_data_dir

Seeds = Annotated[tuple[int, ...], tyro.constructors.PrimitiveConstructorSpec(
    nargs="*", metavar="INT[,INT...]",
    instance_from_str=lambda words: tuple(
        int(seed) for word in words for seed in word.split(",") if seed),
    is_instance=lambda value: isinstance(value, tuple), str_from_instance=lambda seeds: [
        str(seed) for seed in seeds])]
"""Seeds, written as ``0 1 2`` or ``0,1,2``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithData:
    """The option shared by the commands that open a data set."""

    data_dir: pathlib.Path = dataclasses.field(default_factory=default_data_dir)
    """Folder of TensorFlow Datasets."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(WithData):
    """The options shared by the commands that train."""

    out: pathlib.Path | None = None
    """Folder of the results; under runs/ by default."""
    seeds: Seeds | None = None
    """Training seeds, such as 0,1,2; by default those of the recipe, or --seed."""
    tensorboard: bool = True
    """Write event files for TensorBoard."""
    feed: Annotated[Feed, tyro.conf.arg(name="")] = Feed()
    execution: Annotated[Execution, tyro.conf.arg(name="")] = Execution()

    def __post_init__(self):
        check_seeds(self.seeds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnStudies(Training):
    """The options shared by the commands that train and compare several runs."""

    dry_run: bool = False
    """Print the plan and its expected cost, and run nothing."""
    jobs: int = 1
    """Number of runs at a time, each in a process on its share of the CPU cores."""
    at_once: int | None = None
    """Largest number of runs trained as one vmapped program; they may differ only in the seed and
    in swept settings. By default all on accelerators, whose memory may require fewer, and 1 on
    CPUs, where more pays off only for runs that take seconds."""
    report: bool = True
    """Write the report at the end."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("jobs", "at_once"):
            if getattr(self, name) is not None:
                _validate.in_range(name, getattr(self, name), 1)
        if self.jobs > 1 and (self.at_once or 1) > 1:
            raise InputError(f"Expected at_once=1 with jobs={self.jobs}, got {self.at_once}.")
        if self.jobs > 1 and self.execution != Execution():
            raise InputError(
                f"Expected jobs=1 with several devices or processes, got {self.jobs}.")

    def run_and_report(self, plan: StudyPlan) -> None:
        """Runs a study and writes its report; raises as :meth:`run_plans` does."""
        def write():
            if any(run_folder.read_facts(place, "evaluation") for place in plan.places()):
                yield f"The report is in {report.write_report(plan.folder)}"

        self.run_plans([plan], plan.text(), write)

    def run_plans(self, plans: Sequence[StudyPlan], text: str,
                  write: Callable[[], Iterable[str]]) -> None:
        """Prints the text of some plans, and runs them unless it is a dry run.

        Opens all data sets before the first run. Calls ``write``, which writes the reports and
        returns lines to print, at the end.

        Raises:
          InputError: (a ValueError) before, if a study cannot be run; after, if runs failed.
        """
        if self.dry_run:
            print(text)
            return
        for plan in plans:
            files.require_writable(plan.folder)
        layout = self.execution.start()
        if any(plan.measured or plan.suites for plan in plans) and jax.process_count() > 1:
            raise InputError("Expected one process for the measurements of figures and suites, got "
                             f"{jax.process_count()}. Several can run the studies alone.")
        files.say(text)
        for plan in plans:
            for row in plan.rows:
                check_perturbations(plan.recipe.rows[row], plan.recipe.evaluation.perturb)
        datasets = [load_recipe_dataset(plan.recipe, self.data_dir, self.feed) for plan in plans]
        fitted = []
        for plan, dataset in zip(plans, datasets, strict=True):
            recipe, changes = fit_recipe(plan.recipe, dataset)
            fitted.append(dataclasses.replace(plan, recipe=recipe))
            for change in changes:
                files.say(change)
        failures = []
        for plan, dataset in zip(fitted, datasets, strict=True):
            if self.jobs > 1:
                failures += run_study_in_parallel(
                    plan, dataset, jobs=self.jobs, data_dir=self.data_dir,
                    tensorboard=self.tensorboard, feed=self.feed)
            else:
                failures += run_study(
                    plan, dataset, at_once=self.at_once, tensorboard=self.tensorboard,
                    layout=layout, feed=self.feed)
        if self.report and files.is_writer():
            for line in write():
                print(line)
        files.barrier("report")
        if failures:
            raise InputError("; ".join(failures))


def folder_options(command) -> dict[str, bool]:
    """The options of a command for folders of images."""
    return {name: getattr(command, name) for name in FOLDER_OPTIONS}


@dataclasses.dataclass(frozen=True)
class Compare(OnStudies):
    """Train and test several methods, the rows of a recipe, with several seeds, and write a report.

    Leaves finished runs as they are and resumes interrupted ones.
    """

    recipe: Positional[str]
    """Name of a recipe, such as photos or digits."""
    rows: tuple[str, ...] | None = None
    """Rows of the recipe to run; all by default."""
    data: str | None = None
    """Data set to use instead of the recipe's, such as folder:PATH."""
    init_from: str | None = None
    """File of PyTorch weights that initialises all rows."""
    skip_bad: bool = False
    """Skip images of a folder that cannot be used, instead of stopping."""
    join_near_copies: bool = False
    """Keep images of a folder that are nearly the same on one side of a drawn split."""
    outside_links: bool = False
    """Follow links, and paths in a CSV file, that lead out of the folder of images."""

    def __post_init__(self):
        super().__post_init__()
        if self.rows is not None:
            _validate.in_range("number of rows", len(self.rows), 1)
            distinct("row", self.rows)

    def __call__(self) -> None:
        recipe = with_sources(
            get_recipe(self.recipe), self.data, self.init_from, folder_options(self))
        self.run_and_report(plan_study(
            recipe, self.out or pathlib.Path("runs") / recipe.name, self.rows, self.seeds))


@dataclasses.dataclass(frozen=True)
class Demo:
    """Train five methods on scikit-learn's digits with three seeds each, test them under noise,
    and write a report. Takes some minutes on a CPU."""

    out: pathlib.Path = pathlib.Path("runs/digits")
    """Folder of the results."""
    seeds: Seeds | None = None
    """Training seeds; 0, 1 and 2 by default."""
    jobs: int = 1
    """Number of runs at a time, each in a process on its share of the CPU cores."""

    def __call__(self) -> None:
        Compare("digits", out=self.out, seeds=self.seeds, jobs=self.jobs)()


@dataclasses.dataclass(frozen=True)
class Fit(WithData):
    """Train the few best methods on your data and keep the best network under the noise you name.

    Prints every decision with the option that overrides it, times some updates on this machine,
    chooses epochs and seeds to fit the budget, and picks the method on held-out images. Resumes an
    interrupted fit, with the same options and --out.
    """

    dataset: Positional[str]
    """"folder:PATH", "cifar10", "svhn_cropped" or "digits"."""
    noise: str | None = None
    """Standard deviation of the noise to be robust against, in pixel values of [0, 1], such as
    40/255; by default that of the recipe for such data."""
    like: pathlib.Path | None = None
    """Folder of photographs with that noise, whose level is measured; of pairs of shots of one
    scene if their names end in _a and _b."""
    budget: str = "2h"
    """Time for everything, such as 30m or 2h."""
    out: pathlib.Path | None = None
    """Folder of the results; runs/fit-NAME by default."""
    dry_run: bool = False
    """Print the decisions, with the time of some updates, and train nothing."""
    methods: tuple[str, ...] | None = None
    """Methods to train: any of both, normal, half_noise and robust_both."""
    seeds: Seeds | None = None
    """Training seeds of each method, such as 0,1,2."""
    clean_share: float = 0.5
    """Share of the accuracy on clean images in the score that chooses; the rest is of noisy
    ones."""
    num_draws: int = 5
    """Draws of the noise on each held-out image."""
    epochs: int | None = None
    """Passes over the training images."""
    model: str | None = None
    """Network: "resnet18", "resnet18_imagenet", "mobilenet_v3_small", "mobilenet_v3_large" or
    "small_cnn"."""
    width: int | None = None
    """Channels of the network's first stage."""
    image_size: tuple[int, int] | None = None
    """Height and width to which the images of a folder are resized, in pixels."""
    batch_size: int | None = None
    """Images in each update."""
    learning_rate: float | None = None
    """Highest learning rate."""
    dtype: str | None = None
    """Precision of the network's layers: "float32" or "bfloat16"."""
    validation_size: float | None = None
    """Training images to hold out for the choice: their number, or their share if below 1."""
    init_from: str | None = None
    """File of PyTorch weights to start from."""
    skip_bad: bool = False
    """Skip images of a folder that cannot be used, instead of stopping."""
    join_near_copies: bool = False
    """Keep images of a folder that are nearly the same on one side of a drawn split."""
    outside_links: bool = False
    """Follow links, and paths in a CSV file, that lead out of the folder of images."""

    def __post_init__(self):
        if self.noise is not None and self.like is not None:
            raise InputError(f"Expected noise or like, got both: {self.noise} and {self.like}.")
        check_seeds(self.seeds)
        if self.methods is not None:
            _validate.in_range("number of methods", len(self.methods), 1)
            distinct("method", self.methods)
            for method in self.methods:
                _validate.one_of("method", method, fit_settings.ORDER)
        _validate.in_range("clean_share", self.clean_share, 0, 1, open_high=False)
        _validate.in_range("num_draws", self.num_draws, 1)
        if self.validation_size is not None:
            _validate.in_range("validation_size", self.validation_size, 0, open_low=True)
        if self.image_size is not None:
            check_image_size(self.image_size)
            if not self.dataset.startswith(FOLDER_PREFIX):
                raise InputError(f"Expected image_size only with folder:PATH, got "
                                 f"{self.image_size} with {self.dataset}.")

    def asked(self) -> fit.Asked:
        """What the options ask for."""
        given = {name: getattr(self, name) for name in (
            "epochs", "model", "width", "image_size", "batch_size", "dtype", "validation_size",
            "init_from")} | {"optimizer.learning_rate": self.learning_rate,
                             **{name: on or None for name, on in folder_options(self).items()}}
        return fit.Asked(
            self.dataset, fit_settings.parse_budget(self.budget),
            None if self.noise is None else fit_settings.parse_noise(self.noise),
            None if self.like is None else str(self.like), self.clean_share, self.num_draws,
            self.methods, self.seeds,
            {name: value for name, value in given.items() if value is not None})

    def __call__(self) -> None:
        started, asked = time.monotonic(), self.asked()
        out = self.out or pathlib.Path("runs") / f"fit-{fit.name_of(self.dataset)}"
        files.require_writable(out)
        layout = Execution().start()
        plan = fit.read_plan(out, asked)
        if plan is None:
            plan, dataset = fit.make_plan(asked, self.data_dir, layout, started)
            if not self.dry_run:
                fit.claim(out, asked, plan)
        else:
            files.say(f"Resuming the fit in {out}.")
            dataset = fit.open_data(plan, self.data_dir)
        files.say(plan.text)
        if self.dry_run:
            return
        files.say(fit.run_fit(out, asked, plan, dataset, layout))
        files.say(f"It took {page.duration(time.monotonic() - started)}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfRecipe:
    """The options shared by the commands that train with the settings of a recipe."""

    recipe: Positional[str]
    """RECIPE/ROW, such as cifar10/both, before or after the options; the row is "robust" by
    default."""
    run: Annotated[RunConfig, tyro.conf.arg(name="")]

    @classmethod
    def default_of(cls, options: Sequence[str], called: str):
        """Returns the command with the settings of the recipe that its options name.

        The recipe may stand anywhere among the options. If ``epochs`` is too small for the recipe's
        warm-up, the warm-up takes the same share of the epochs as in the recipe, and a line says
        so.
        """
        shown = cls(recipe="digits", run=get_recipe("digits").run("robust", seed=0))
        unset = with_settings(arguments.relaxed(shown), {
            "recipe": "", "run.epochs": -1, "run.optimizer.warmup_epochs": -1.0})
        helping = [word for word in options if word in ("-h", "--help")]
        asked = arguments.read(type(unset), [word for word in options if word not in helping],
                               called, unset)
        if not asked.recipe:
            if helping:
                return shown
            raise InputError(f"Expected a recipe, such as {called.split()[-1]} digits/both, got "
                             f"none. There are: {', '.join(RECIPES)}.")
        name, _, row = asked.recipe.partition("/")
        run = get_recipe(name).run(row or "robust", seed=0)
        warmup, epochs = run.optimizer.warmup_epochs, asked.run.epochs
        if asked.run.optimizer.warmup_epochs == -1 and 0 < epochs <= warmup:
            fitting = warmup * epochs / run.epochs
            run = with_settings(run, {"optimizer.warmup_epochs": fitting, "epochs": epochs})
            if not helping:
                print(f"Warm-up of {fitting:.2g} epochs instead of {warmup:g}: the same share of "
                      f"--epochs {epochs} as in the recipe. Change it with "
                      "--optimizer.warmup-epochs.", flush=True)
        return cls(recipe=asked.recipe, run=run)


@dataclasses.dataclass(frozen=True)
class Train(OfRecipe, Training):
    """Train one run, `train RECIPE/ROW`; options change settings.

    Writes runs/RECIPE-ROW-seedSEED, or the folder --out. With --seeds, trains a run for each seed,
    all as one vmapped program on one device; --out is then the folder that holds the runs. The help
    shows the defaults of the row that the command line names, or else of digits/robust.
    """

    resume: bool = False
    """Resume an interrupted run."""

    def __call__(self) -> None:
        name = self.recipe.replace("/", "-")
        layout = self.execution.start()
        configs = [dataclasses.replace(self.run, seed=seed)
                   for seed in self.seeds or (self.run.seed,)]
        folders = [(self.out or pathlib.Path("runs")) / f"{name}-seed{config.seed}"
                   for config in configs]
        if self.seeds is None and self.out is not None:
            folders = [self.out]
        for folder in folders:
            files.require_writable(folder)
        check_perturbations(self.run, ())
        dataset = open_dataset(self.run, self.data_dir, in_memory=self.feed.in_memory())
        if self.run.select == "test":
            files.say("Note: the epoch is chosen on the test images, as in the paper. This makes "
                      "the test accuracy too high.")
        failures = trainer.train_together(
            configs, dataset, folders, resume=self.resume, tensorboard=self.tensorboard, label=name,
            layout=layout, feed=self.feed)
        if failures:
            raise InputError("; ".join(failures))
        files.say(f"Trained: {', '.join(str(folder) for folder in folders)}")


@dataclasses.dataclass(frozen=True)
class Sweep(OfRecipe, OnStudies):
    """Train and test all combinations of some settings' values, `sweep RECIPE/ROW --over ...`.

    Other options change the settings that all runs share, as in `train`. Leaves finished runs as
    they are and resumes interrupted ones. New values and seeds extend an existing sweep over the
    same settings to all combinations. The best setting has the highest validation accuracy.
    """

    over: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """SETTING=VALUE,VALUE,..., such as robust.lam=0.1,0.5,1; repeat it for each setting."""

    def __call__(self) -> None:
        name, _, row = self.recipe.partition("/")
        row = row or "robust"
        self.run_and_report(sweep.plan_sweep(
            get_recipe(name), row, self.run, self.over, self.seeds,
            self.out or pathlib.Path("runs") / f"sweep-{name}-{row}"))


@dataclasses.dataclass(frozen=True)
class OnRuns(WithData):
    """The options shared by the commands on finished runs."""

    runs: Positional[tuple[pathlib.Path, ...]]
    """Folders of finished runs."""
    name: str | None = None
    """Name of this measurement, which gets files of its own, such as evaluation-NAME.json. Reports
    show the measurements without a name."""

    def configs(self) -> list[tuple[pathlib.Path, RunConfig]]:
        """Reads and checks all runs, before any is measured."""
        if not self.runs:
            raise InputError("Expected at least one folder of a run, got none.")
        configs = [(folder, run_folder.read_config(folder)) for folder in self.runs]
        for folder, _ in configs:
            files.require_writable(folder)
            run_folder.facts_path(folder, "evaluation", self.name)  # Raises for a bad name.
        return configs

    def load(self, layout=None, load=trainer.load_run):
        for folder, config in self.configs():
            yield folder, load(folder, config, open_dataset(config, self.data_dir), layout)


def command_of(measurement: Measurement) -> type[OnRuns]:
    """Makes the command of a measurement, whose settings are its options."""
    def call(self) -> None:
        layout = self.execution.start() if measurement.parallel else None
        load = trainer.load_run if measurement.trained else trainer.open_run
        for folder, run in self.load(layout, load):
            facts = runner.measure(measurement, run, self.settings, folder, folder.name, self.name)
            if measurement.text is not None:
                files.say(f"{folder}\n{measurement.text(facts)}")
            files.say(f"Measured: {run_folder.facts_path(folder, measurement.kind, self.name)}")

    groups = {"settings": measurement.settings}
    if measurement.parallel:
        groups["execution"] = Execution()
    return dataclasses.make_dataclass(
        measurement.kind, [(name, Annotated[type(default), tyro.conf.arg(name="")], default)
                           for name, default in groups.items()],
        bases=(OnRuns,), frozen=True,
        namespace={"__doc__": measurement.about, "__module__": __name__, "__call__": call})


SUITES = {measurement.suite: measurement for measurement in MEASUREMENTS if measurement.suite}
"""The measurements of the command ``evaluate``, by their names for --suite."""

NOISE, EVERY = "noise", "all"


@dataclasses.dataclass(frozen=True)
class _Evaluate(OnRuns):

    runs: Positional[tuple[pathlib.Path, ...]]
    """Folders of finished runs, exported FILE.stablehlo, or module:function from images in [0, 1],
    or a key and images, to logits; the latter two with --data."""
    suite: tuple[str, ...] = (NOISE,)
    """What to measure: any of noise, corruptions, flips, relative, attacks, certify, calibration,
    ood, curvature; or all."""
    limit: int | None = None
    """Number of test images, or of sequences for flips, for each measurement, drawn at random by
    class with seed 0; by default all of them, but 500 for attacks and certify."""
    data: str | None = None
    """Data set of models that are no runs, such as cifar10 or folder:PATH."""
    image_size: tuple[int, int] | None = None
    """Height and width to which a function gets the images of a folder."""
    out: pathlib.Path | None = None
    """Folder of the results of a model that is no run; runs/NAME by default."""
    settings: Annotated[Evaluation, tyro.conf.arg(name="")] = Evaluation(
        noise_levels=(0, 2, 4, 8, 16, 20))
    execution: Annotated[Execution, tyro.conf.arg(name="")] = Execution()

    def __post_init__(self):
        _validate.in_range("number of suites", len(self.suite), 1)
        distinct("suite", self.suite)
        for suite in self.suite:
            _validate.one_of("suite", suite, (*SUITES, EVERY))
        if self.limit is not None:
            _validate.in_range("limit", self.limit, 1)
        foreign = [model for model in self.runs if classifiers.is_foreign(model)]
        if foreign and self.data is None:
            raise InputError(f"Expected --data for {foreign[0]}, which is no run, got none.")
        for name in () if foreign else ("data", "image_size", "out"):
            if getattr(self, name) is not None:
                raise InputError(f"Expected {name} only with models that are no runs, got "
                                 f"{getattr(self, name)}.")
        if len(foreign) > 1 and self.out is not None:
            raise InputError(f"Expected out only with one model, got {self.out} for "
                             f"{len(foreign)}.")
        by_name: dict[str, pathlib.Path] = {}
        for model in foreign:
            other = by_name.setdefault(classifiers.name_of(model), model)
            if other is not model:
                raise InputError(f"Expected models of different names, which name the folders of "
                                 f"their results, got {other} and {model}. Use one command for "
                                 "each, with --out.")
        for suite in self.suite:
            if suite != EVERY and self._lacks(suite):
                raise InputError(f"Expected --{suite}.{SUITES[suite].needs} with the suite "
                                 f"{suite!r}, got none.")

    def _lacks(self, suite: str) -> bool:
        """Whether a setting that a suite needs is not given."""
        needed = SUITES[suite].needs
        return needed is not None and getattr(getattr(self, suite), needed) is None

    def __call__(self) -> None:
        layout = self.execution.start()
        if not self.runs:
            raise InputError("Expected at least one model, got none.")
        foreign = [model for model in self.runs if classifiers.is_foreign(model)]
        runs = dataclasses.replace(self, runs=tuple(
            model for model in self.runs if model not in foreign), data=None, image_size=None,
            out=None) if len(foreign) < len(self.runs) else None
        for _, config in runs.configs() if runs else ():
            check_perturbations(config, self.settings.perturb)
        for folder, run in runs.load(layout) if runs else ():
            self._measure(run, folder)
        for model in foreign:
            self._measure(*self._open(model, layout))

    def _open(self, model, layout):
        """Opens a foreign model, and claims the folder of its results."""
        folder = self.out or pathlib.Path("runs") / classifiers.name_of(model)
        files.require_writable(folder)
        dataset = classifiers.open_data(model, self.data, self.data_dir, self.image_size)
        opened = classifiers.open_foreign(model, dataset, layout)
        classifiers.claim(model, opened, folder)
        return opened, folder

    def _suites_of(self, run) -> list[str]:
        """The suites to measure, in the order of the report, in which one may use another's result.

        Raises:
          InputError: (a ValueError) if one that is asked for does not take a randomised classifier.
        """
        randomised = classifiers.is_randomised(run)
        if EVERY in self.suite:
            why = classifiers.why_no_gradient(run)
            if why is not None:
                files.say("Left out: " + ", ".join(
                    suite for suite, measurement in SUITES.items() if measurement.gradients)
                    + f", since {run.name} has no derivatives: {why}.")
            return [suite for suite, measurement in SUITES.items() if not self._lacks(suite)
                    and (measurement.randomised or not randomised)
                    and (why is None or not measurement.gradients)]
        for suite in self.suite:
            if randomised and not SUITES[suite].randomised:
                raise InputError(f"Expected a function of images alone for the suite {suite!r}, "
                                 f"got {run.name}, which takes a key.")
        return [suite for suite in SUITES if suite in self.suite]

    def _measure(self, run, folder):
        """Measures what is missing, and writes the card."""
        planned = []
        for suite in self._suites_of(run):
            settings = self._settings_of(suite, run)
            if self._is_kept(suite, settings, run, folder):
                path = run_folder.facts_path(folder, SUITES[suite].kind, self.name)
                files.say(f"There already: {path}")
            else:
                planned.append((suite, settings))
        for suite, settings in planned:  # Refuses before hours of work, not after.
            runner.check(SUITES[suite], run, settings, folder, self.name)
        try:
            for suite, settings in planned:
                self._measure_suite(suite, settings, run, folder)
        except InputError:
            self._write_card(run, folder)
            raise
        self._write_card(run, folder)

    def _settings_of(self, suite, run):
        """The settings of a suite, with the options that are common to all."""
        limited = SUITES[suite].limited
        settings = getattr(self, _options_of(suite))
        if self.limit is not None and hasattr(settings, limited):
            number = min(self.limit, len(run.dataset.test.labels))
            settings = dataclasses.replace(settings, **{limited: number})
        if hasattr(settings, "data_dir"):
            settings = dataclasses.replace(settings, data_dir=str(self.data_dir))
        return settings

    def _is_kept(self, suite, settings, run, folder):
        """Whether ``all`` has no need of a suite: the command gives it no settings of its own, and
        there is a result, such as a study makes with its settings, of no fewer images."""
        measurement, options = SUITES[suite], _options_of(suite)
        default, = (field.default for field in dataclasses.fields(self) if field.name == options)
        if EVERY not in self.suite or measurement.anew or getattr(self, options) != default:
            return False
        there = run_folder.read_facts(folder, measurement.kind, self.name)
        number = getattr(settings, measurement.limited, None) or math.inf
        return there is not None and there["num_images"] >= min(
            number, len(run.dataset.test.labels))

    def _measure_suite(self, suite, settings, run, folder):
        measurement = SUITES[suite]
        if suite == NOISE:
            facts = accuracy.evaluate_run(run, settings, folder, folder.name, self.name)
            files.barrier("evaluated")
            files.say(comparison.evaluation_text(facts))
            if run.config is not None:
                files.say(doubt.doubt_text(doubt.load_doubt(folder)))
        else:
            facts = runner.measure(measurement, run, settings, folder, folder.name, self.name)
            files.barrier("measured")
            if measurement.text is not None:
                files.say(measurement.text(facts))
        files.say(f"Measured: {run_folder.facts_path(folder, measurement.kind, self.name)}")

    def _write_card(self, run, folder):
        """Writes the card of what is there, but for a run's accuracy under noise alone."""
        there = any(run_folder.facts_path(folder, measurement.kind, self.name).is_file()
                    for measurement in SUITES.values())
        if there and files.is_writer() and (run.config is None or tuple(self.suite) != (NOISE,)):
            files.say(f"The card is in {card.write_card(folder, self.name)}")


def _options_of(suite: str) -> str:
    """The field of the command that holds a suite's settings."""
    return "settings" if suite == NOISE else suite


Evaluate = dataclasses.make_dataclass(
    "Evaluate", [(suite, type(measurement.settings), measurement.settings)
                 for suite, measurement in SUITES.items() if measurement.settings is not None],
    bases=(_Evaluate,), frozen=True, namespace={"__module__": __name__, "__doc__": """Test models:
    noise by default, or the whole suite of robustness.

    Measures what is missing and resumes what was interrupted. With more than noise, or models that
    are no runs, writes the robustness card, card.html and card.md, beside the results.
    """})


@dataclasses.dataclass(frozen=True)
class Figures(OnRuns):
    """Make the paper's Fig. 8 to 13 for finished runs: curvature and robustness, loss surfaces,
    features of the blocks.

    Measures what is missing, then rewrites the report of the study that the runs belong to.
    """

    settings: Annotated[FigureSettings, tyro.conf.arg(name="")] = FigureSettings()
    out: pathlib.Path | None = None
    """Folder of the figures of runs that belong to no study; by default "figures" beside the first
    run."""

    def __call__(self) -> None:
        if self.out is not None:
            files.require_writable(self.out)
        report.group_by_study(self.runs)  # Raises before hours of work, not after.
        for folder, run in self.load():
            robustness.measure_robustness(run, self.settings, folder, folder.name, self.name)
        for path in report.write_figures(self.runs, self.out, self.name):
            print(f"The figures are in {path}")


@dataclasses.dataclass(frozen=True)
class Report:
    """Write the report of a study's folder, or of any finished runs."""

    folders: Positional[tuple[pathlib.Path, ...]]
    """Folder of a study, or folders of runs; runs that differ only in the seed form one row."""
    out: pathlib.Path | None = None
    """Folder of the report of runs; by default "report" beside the first run."""

    def __call__(self) -> None:
        if not self.folders:
            raise InputError("Expected the folder of a study, or folders of runs, got none.")
        first = self.folders[0]
        if self.out is not None:
            files.require_writable(self.out)
        if len(self.folders) == 1 and not (
                run_folder.is_run(first) or run_folder.is_foreign(first)):
            if self.out is not None and run_folder.is_study(first):
                raise InputError(f"Expected out only with runs: {first}, a study, holds its own "
                                 f"report. Got {self.out}.")
            path = report.write_report(first)
        else:
            path = report.write_report_of_runs(self.folders, self.out or first.parent / "report")
        print(f"The report is in {path}")


@dataclasses.dataclass(frozen=True)
class Predict(WithData):
    """Classify image files with a finished run, and show how doubtful each prediction is.

    Prints a line for each image and one on the doubt score: which it is, how well it separates
    wrong from right predictions on held-out images, and the threshold above which an image is
    marked as doubtful. The score is measured when the run is tested, or else at first use.
    """

    run: Positional[pathlib.Path]
    """Folder of the run."""
    images: Positional[tuple[pathlib.Path, ...]]
    """Image files, or folders of them."""

    def __call__(self) -> None:
        run, score = predict.load_classifier(self.run, self.data_dir)
        paths = predict.files_in(self.images)
        for line in predict.table_lines(predict.predict_files(run, score, paths), paths,
                                        run.network.class_names, score):
            print(line)


@dataclasses.dataclass(frozen=True)
class Rerun(WithData):
    """Train a run once more from what its folder holds, and compare the results to the bit.

    Notes what is not as it was: versions, commit, hardware, devices, data. Exits with 1, after a
    line on where they first differ, if the results are not the same.
    """

    run: Positional[pathlib.Path]
    """Folder of the run, whose training has ended."""
    out: pathlib.Path | None = None
    """Folder of the repetition; RUN-rerun by default."""

    def __call__(self) -> None:
        out = self.out or self.run.with_name(f"{self.run.name}-rerun")
        files.require_writable(out)
        difference = rerun.rerun(self.run, out, self.data_dir).difference
        if difference is not None:
            print(f"{out} differs from {self.run}, first in {difference}.")
            sys.exit(1)
        print(f"{out} equals {self.run} to the bit.")


@dataclasses.dataclass(frozen=True)
class Replay:
    """Compute the update that stopped a training once more, and show its pieces.

    Training stops at an update whose loss, gradient, features or logits are NaN or infinite, and
    keeps its images, the state before it and the keys. This prints each term of the loss, as it was
    and as it is now on one device; how large parameters, features, logits and gradients are; and
    where they are not finite.
    """

    run: Positional[pathlib.Path]
    """Folder of the run."""

    def __call__(self) -> None:
        print(replay.replay(self.run))


@dataclasses.dataclass(frozen=True)
class Export(WithData):
    """Write the network of a finished run for use elsewhere."""

    run: Positional[pathlib.Path]
    """Folder of the run."""
    out: pathlib.Path | None = None
    """FILE.stablehlo for the whole classifier with its normalisation, for jax.export;
    FILE.safetensors or FILE.pth for the weights under PyTorch's names; FILE.npz for those under
    Flax's, which as network.npz in a copy of RUN stand in for its checkpoints.
    RUN/model.stablehlo by default."""

    def __call__(self) -> None:
        out = self.out or self.run / "model.stablehlo"
        predict.require_exportable(out)
        if out.suffix == classifiers.ARTEFACT:
            predict.export_run(*predict.load_classifier(self.run, self.data_dir), out)
        else:
            predict.export_weights(trainer.load_run(
                self.run, run_folder.read_config(self.run), None), out)
        print(f"The network is in {out}")


@dataclasses.dataclass(frozen=True)
class Perturb:
    """Show what perturbations do to an image."""

    image: Positional[pathlib.Path]
    """Image file."""
    perturb: tuple[str, ...] = perturb_figure.EVERY
    """Perturbations, such as "occlusion(20,70)" or "gaussian(40/255)+occlusion(20,70)"; all, in the
    paper's strengths, by default."""
    image_size: tuple[int, int] = (400, 500)
    """Height and width to which the image is resized, in pixels."""
    out: pathlib.Path = pathlib.Path("perturbations.png")
    """Picture to write: a .png, .jpg, .webp or .svg file."""

    def __post_init__(self):
        check_image_size(self.image_size)
        _validate.in_range("number of perturbations", len(self.perturb), 1)
        distinct("perturbation", self.perturb)

    def __call__(self) -> None:
        perturb_figure.show_perturbations(self.image, self.image_size, self.perturb, self.out)
        print(f"The picture is in {self.out}")


@dataclasses.dataclass(frozen=True)
class Prepare(WithData):
    """Download and prepare a data set."""

    dataset: Positional[str]
    """"cifar10" or "svhn_cropped"; "digits" needs no preparation."""

    def __call__(self) -> None:
        files.require_writable(self.data_dir.expanduser())
        print(prepare.prepare(self.dataset, self.data_dir.expanduser()))
