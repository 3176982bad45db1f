"""``python -m experiments COMMAND --help``."""

import dataclasses
import pathlib
import sys
from typing import Annotated, Union

import absl.logging
import jax
import tyro

from experiments import (
    bench,
    comparison,
    curvature,
    doubt,
    evaluation,
    perturb_figure,
    predict,
    prepare,
    report,
    reproduce,
    robustness,
    runs,
    sharpness,
    steps,
    sweep,
    sweep_report,
    targets,
    theory,
    training,
)
from experiments.arguments import PROGRAM, one_line_of, parse_unchecked, unchecked_copy
from experiments.config import (
    CurvatureConfig,
    Evaluation,
    InputError,
    Recipe,
    RunConfig,
    check_image_size,
    check_seeds,
    distinct,
    read_config,
    with_settings,
)
from experiments.datasets import check_perturbations, open_dataset
from experiments.execution import Execution, Feed, keep_compilations, keep_freed_memory
from experiments.recipes import RECIPES, get_recipe
from experiments.robustness import FigureSettings
from jaxrobust import _validate
from jaxrobust.data import BadFiles, Dataset
from jaxrobust.data.sources import default_data_dir
from jaxrobust.parallel import Layout

Positional = tyro.conf.Positional
Seeds = Annotated[tuple[int, ...], tyro.constructors.PrimitiveConstructorSpec(
    nargs="*", metavar="INT[,INT...]",
    instance_from_str=lambda words: tuple(
        int(seed) for word in words for seed in word.split(",") if seed),
    is_instance=lambda value: isinstance(value, tuple), str_from_instance=lambda seeds: [
        str(seed) for seed in seeds])]
"""As ``0 1 2`` or ``0,1,2``."""


def say(text: str) -> None:
    """Prints a line, once for all processes of a job."""
    if runs.is_writer():
        print(text, flush=True)


@dataclasses.dataclass(frozen=True)
class Reproduce:
    """Make a table or figure of the paper, or run a whole recipe: train, test, measure, report.

    What is done already is left as it is; what was broken off goes on.
    """

    what: Positional[str]
    """A table, figure or question, such as table1, figure9 or centroids; "paper", "questions" or
    "all" of them; or a recipe, such as digits, cifar10_small or road."""
    scale: str | None = None
    """Of tables, figures and questions: "full", the paper's, for GPUs; "small", for CPUs; "tiny",
    which shows that everything runs; "full" if none is given. A recipe has its own."""
    dry_run: bool = False
    """Only say what would be done, and what it takes."""
    out: pathlib.Path | None = None
    """Folder of a recipe's results, or above those of tables and figures; runs/RECIPE, and runs, if
    none is given."""
    rows: tuple[str, ...] | None = None
    """Rows of a recipe to run; all if none is given."""
    seeds: Seeds | None = None
    """Training seeds; the recipe's if none is given."""
    jobs: int = 1
    """Runs at a time, each a process on its share of the CPU cores."""
    report: bool = True
    """Whether to write the report at the end."""
    tensorboard: bool = True
    """Whether to write event files for TensorBoard."""
    data: str | None = None
    """Data set instead of the recipe's, such as folder:PATH; of tables and figures, that of the
    road images."""
    studies: tuple[str, ...] | None = None
    """Of tables and figures made from several data sets, such as "cifar10" and "svhn", those to be
    made; all if none is given."""
    init_from: str | None = None
    """File of PyTorch weights that all rows start from; of tables and figures, as data."""
    skip_bad: bool = False
    """Whether to go on without those images of a folder that cannot be used."""
    data_dir: pathlib.Path = dataclasses.field(default_factory=default_data_dir)
    """Folder of TensorFlow Datasets."""
    together: bool | None = None
    """Whether the seeds of a row are trained as one vmapped program; if not given, on
    accelerators. On CPUs that is slower than one after the other."""
    feed: Annotated[Feed, tyro.conf.arg(name="")] = Feed()
    execution: Annotated[Execution, tyro.conf.arg(name="")] = Execution()

    def __post_init__(self):
        _validate.in_range("jobs", self.jobs, 1)
        check_seeds(self.seeds)
        for name, one in (("rows", "row"), ("studies", "study")):
            if getattr(self, name) is not None:
                _validate.in_range(f"number of {name}", len(getattr(self, name)), 1)
                distinct(one, getattr(self, name))

    def __call__(self) -> None:
        if self.jobs > 1 and self.execution != Execution():
            raise InputError(f"Expected jobs=1 with several devices or processes, got {self.jobs}.")
        plan = self._plan()
        if self.dry_run:
            print(plan.text())
            return
        for folder in (plan.out, *(study.folder for study in plan.studies.values())):
            runs.require_writable(folder)
        layout = self.execution.start()
        if any(study.measured for study in plan.studies.values()) and jax.process_count() > 1:
            raise InputError(f"Expected one process to make {self.what!r}, got "
                             f"{jax.process_count()}. Its studies alone can be run by several.")
        if self.report:
            say(plan.text())
        # Of all studies, before the first of them is run.
        for study in plan.studies.values():
            for row in study.rows:
                check_perturbations(study.recipe.rows[row], study.recipe.evaluation.perturb)
        datasets = [reproduce.load_recipe_dataset(
            study.recipe, self.data_dir, in_memory=self.feed.in_memory())
            for study in plan.studies.values()]
        studies = []
        for study, dataset in zip(plan.studies.values(), datasets, strict=True):
            recipe, lines = reproduce.fit_recipe(study.recipe, dataset)
            studies.append(dataclasses.replace(study, recipe=recipe))
            if lines and self.report:  # Not by each process that runs a part of it.
                say("\n".join(lines))
        failures = []
        for study, dataset in zip(studies, datasets, strict=True):
            failures += self._run(study, dataset, layout)
            if self.report and not plan.targets and runs.is_writer():
                print(f"The report is in {report.write_report(study.folder)}")
            runs.barrier("report")
        if self.report and runs.is_writer():
            for path in targets.write_targets(plan):
                print(f"Written: {path}")
        runs.barrier("targets")
        if failures:
            raise InputError("; ".join(failures))

    def _plan(self) -> targets.Plan:
        _validate.one_of("table, figure, question or recipe", self.what,
                         (*targets.TARGETS, *targets.EVERY, *RECIPES))
        if self.what in RECIPES:
            if self.studies is not None:
                raise InputError("Expected studies only with a table or figure, got them with the "
                                 f"recipe {self.what}.")
            recipe = reproduce.with_sources(
                get_recipe(self.what), self.data, self.init_from, self.skip_bad)
            if self.scale is not None:
                raise InputError(f"Expected scale only with a table, figure or question, got "
                                 f"{self.scale!r} with the recipe {self.what}.")
            return targets.plan_of_recipe(
                recipe, self.out or pathlib.Path("runs") / recipe.name, self.rows, self.seeds)
        if self.rows is not None:
            raise InputError(f"Expected rows only with a recipe, got them with {self.what!r}.")
        return targets.make_plan(
            self.what, self.scale or "full", self.out or pathlib.Path("runs"), seeds=self.seeds,
            data=self.data, init_from=self.init_from, skip_bad=self.skip_bad, only=self.studies)

    def _run(self, study: targets.StudyPlan, dataset: Dataset, layout: Layout) -> list[str]:
        """Runs a study of a plan; a line for each run that failed."""
        recipe, folder = study.recipe, study.folder
        rows, seeds = list(study.rows), list(study.seeds)
        reproduce.claim_study(
            folder, reproduce.describe_study(recipe, seeds, list(dataset.class_names)))
        if self.jobs > 1:
            failures = reproduce.run_study_in_parallel(
                recipe, folder, rows=rows, seeds=seeds, jobs=self.jobs,
                arguments=self._arguments(recipe))
        else:
            failures = reproduce.run_study(
                recipe, dataset, folder, rows=rows, seeds=seeds, tensorboard=self.tensorboard,
                together=self.together, layout=layout, feed=self.feed)
            failures = [] if recipe.may_diverge else failures
        for place in study.places(study.measured):
            if (place / "done.json").is_file():
                config = read_config(place)
                robustness.measure_robustness(
                    training.load_run(place, config, dataset), FigureSettings(), place, place.name)
        return failures

    def _arguments(self, recipe: Recipe) -> list[str]:
        """Of the processes that run a recipe's rows."""
        arguments = ["--data-dir", str(self.data_dir)]
        arguments += [] if self.tensorboard else ["--no-tensorboard"]
        row, first = next(iter(recipe.rows.items()))
        usual = get_recipe(recipe.name).rows[row]
        arguments += [] if first.dataset == usual.dataset else ["--data", first.dataset]
        arguments += [] if first.init_from == usual.init_from else ["--init-from", first.init_from]
        arguments += ["--skip-bad"] if first.skip_bad else []
        return arguments + [
            word for name, value in dataclasses.asdict(self.feed).items() if value is not None
            for word in (f"--{name.replace('_', '-')}", str(value))]


@dataclasses.dataclass(frozen=True)
class Train:
    """Train one run: `train RECIPE/ROW`, with any of its settings changed, or one for each of
    several seeds.

    The defaults shown are those of the recipe's row that the command line names; of digits/robust
    where it names none.
    """

    recipe: Positional[str]
    """RECIPE/ROW, such as cifar10/both, anywhere among the words; the row is "robust" if none is
    given."""
    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    out: pathlib.Path | None = None
    """Folder of the run, or with several seeds above the runs; runs/RECIPE-ROW-seedSEED if none
    is given."""
    seeds: Seeds | None = None
    """Seeds of several runs, trained as one vmapped program on one device; instead of --seed."""
    resume: bool = False
    """Go on with a run begun before."""
    tensorboard: bool = True
    """Whether to write event files for TensorBoard."""
    data_dir: pathlib.Path = dataclasses.field(default_factory=default_data_dir)
    """Folder of TensorFlow Datasets."""
    feed: Annotated[Feed, tyro.conf.arg(name="")] = Feed()
    execution: Annotated[Execution, tyro.conf.arg(name="")] = Execution()

    def __post_init__(self):
        check_seeds(self.seeds)

    def __call__(self) -> None:
        name = self.recipe.replace("/", "-")
        layout = self.execution.start()
        configs = [self.run] if self.seeds is None else [
            dataclasses.replace(self.run, seed=seed) for seed in self.seeds]
        folders = [(self.out or pathlib.Path("runs")) / f"{name}-seed{config.seed}"
                   for config in configs]
        if self.seeds is None and self.out is not None:
            folders = [self.out]
        for folder in folders:
            runs.require_writable(folder)
        check_perturbations(self.run, ())
        dataset = open_dataset(self.run, self.data_dir, in_memory=self.feed.in_memory())
        if self.run.select == "test":
            say("Note: the epoch is chosen on the test images, as in the paper. The accuracy "
                "on them is then too high.")
        failures = training.train_together(
            configs, dataset, folders, resume=self.resume, tensorboard=self.tensorboard, label=name,
            layout=layout, feed=self.feed)
        if failures:
            raise InputError("; ".join(failures))
        say(f"Trained: {', '.join(str(folder) for folder in folders)}")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Train and test `sweep RECIPE/ROW` with all combinations of some settings' values, and show
    them side by side.

    Any setting that all share can be changed as in `train`. What is done already is left as it
    is; what was broken off goes on; values and seeds are added to a sweep of the same settings,
    which then holds all their combinations. The best setting is that of the best validation
    accuracy.
    """

    recipe: Positional[str]
    """RECIPE/ROW, such as cifar10_small/robust, anywhere among the words; the row is "robust" if
    none is given."""
    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    over: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """SETTING=VALUE,VALUE,..., such as robust.lam=0.1,0.5,1; once for each setting."""
    seeds: Seeds | None = None
    """Training seeds of each combination, instead of --seed."""
    at_once: int | None = None
    """The most runs trained as one vmapped program; if not given, all on accelerators, where the
    memory may ask for fewer, and 1 on CPUs. There an epoch of three together took 2.5 to 4 times
    as long as one of each, but they are compiled once, not once for each setting: what is trained
    for seconds only is done sooner together."""
    out: pathlib.Path | None = None
    """Folder of the results; runs/sweep-RECIPE-ROW if none is given."""
    tensorboard: bool = True
    """Whether to write event files for TensorBoard."""
    data_dir: pathlib.Path = dataclasses.field(default_factory=default_data_dir)
    """Folder of TensorFlow Datasets."""
    feed: Annotated[Feed, tyro.conf.arg(name="")] = Feed()
    execution: Annotated[Execution, tyro.conf.arg(name="")] = Execution()

    def __post_init__(self):
        check_seeds(self.seeds)
        if self.at_once is not None:
            _validate.in_range("at_once", self.at_once, 1)

    def __call__(self) -> None:
        name, _, row = self.recipe.partition("/")
        row = row or "robust"
        plan = sweep.make_plan(get_recipe(name), row, self.run, self.over, self.seeds)
        layout = self.execution.start()
        folder = self.out or pathlib.Path("runs") / f"sweep-{name}-{row}"
        runs.require_writable(folder)
        check_perturbations(self.run, plan.evaluation.perturb)
        dataset = open_dataset(self.run, self.data_dir, in_memory=self.feed.in_memory())
        plan = dataclasses.replace(
            plan, evaluation=reproduce.fit_evaluation(plan.evaluation, dataset))
        # Says what cannot be before anything is written; the plan may grow by what is there.
        sweep.choose_at_once(self.at_once, plan, dataset, layout, self.feed)
        plan = sweep.claim_sweep(folder, plan)
        at_once = sweep.choose_at_once(self.at_once, plan, dataset, layout, self.feed)
        diverged = sweep.run_sweep(
            plan, dataset, folder, at_once=at_once, tensorboard=self.tensorboard, layout=layout,
            feed=self.feed)
        if runs.is_writer():
            print(f"The table is in {sweep_report.write_sweep(folder, plan)}")
        if diverged:
            raise InputError(f"{len(diverged)} of {len(plan.configs())} runs in {folder} diverged: "
                             f"{', '.join(diverged)}.")


@dataclasses.dataclass(frozen=True)
class _OnRuns:
    runs: Positional[tuple[pathlib.Path, ...]]
    """Folders of finished runs."""
    data_dir: pathlib.Path = dataclasses.field(default_factory=default_data_dir)
    """Folder of TensorFlow Datasets."""
    name: str | None = None
    """Of this measurement, kept in files of its own (evaluation-NAME.json) beside those with other
    settings; none for the one that reports show."""

    def _configs(self) -> list[tuple[pathlib.Path, RunConfig]]:
        """Of all runs before the first is measured, which takes long."""
        if not self.runs:
            raise InputError("Expected at least one folder of a run, got none.")
        configs = [(folder, read_config(folder)) for folder in self.runs]
        for folder, _ in configs:
            runs.require_writable(folder)
            runs.result_path(folder, "evaluation", self.name)  # Says what is wrong with the name.
        return configs

    def _load(self, layout=None):
        for folder, config in self._configs():
            yield folder, training.load_run(
                folder, config, open_dataset(config, self.data_dir), layout)


@dataclasses.dataclass(frozen=True)
class Evaluate(_OnRuns):
    """Test finished runs under Gaussian noise and other perturbations."""

    settings: Annotated[Evaluation, tyro.conf.arg(name="")] = Evaluation(
        noise_levels=(0, 2, 4, 8, 16, 20))
    execution: Annotated[Execution, tyro.conf.arg(name="")] = Execution()

    def __call__(self) -> None:
        layout = self.execution.start()
        for _, config in self._configs():
            check_perturbations(config, self.settings.perturb)
        for folder, run in self._load(layout):
            evaluation.evaluate_run(run, self.settings, folder, folder.name, self.name)
            path = runs.result_path(folder, "evaluation", self.name)
            runs.barrier("evaluated")
            found = runs.read_json(path)
            if "classes" in found:  # Older ones have none.
                say(comparison.evaluation_text(found))
            say(doubt.doubt_text(doubt.load_doubt(folder)))
            say(f"The accuracies are in {path}")


@dataclasses.dataclass(frozen=True)
class Curvature(_OnRuns):
    """Measure the curvature of finished runs' loss at test images.

    What is done already is left as it is; what was broken off goes on.
    """

    settings: Annotated[CurvatureConfig, tyro.conf.arg(name="")] = CurvatureConfig()
    test_size: int | None = None
    """Test images, drawn by class at random with seed 0, of which the first are taken; none for
    all, in their order."""
    execution: Annotated[Execution, tyro.conf.arg(name="")] = Execution()

    def __post_init__(self):
        if self.test_size is not None:
            _validate.in_range("test_size", self.test_size, 1)

    def __call__(self) -> None:
        for folder, run in self._load(self.execution.start()):
            curvature.measure_curvature(
                run, self.settings, folder, folder.name, test_size=self.test_size, name=self.name)
            path = runs.result_path(folder, "curvature", self.name)
            say(f"The curvatures are in {path.with_suffix('.npz')}")


@dataclasses.dataclass(frozen=True)
class Figures(_OnRuns):
    """Make the paper's Fig. 8 to 13 of finished runs: curvature and robustness, loss surfaces,
    features of the blocks.

    Measures what is missing, then writes the report of the study that the runs belong to anew.
    """

    settings: Annotated[FigureSettings, tyro.conf.arg(name="")] = FigureSettings()
    out: pathlib.Path | None = None
    """Folder of the figures of runs that belong to no study; "figures" beside the first of them
    if none is given."""

    def __call__(self) -> None:
        # Says what is wrong before hours of work.
        if self.out is not None:
            runs.require_writable(self.out)
        report.group_by_study(self.runs)
        for folder, run in self._load():
            robustness.measure_robustness(run, self.settings, folder, folder.name, self.name)
        for path in report.write_figures(self.runs, self.out, self.name):
            print(f"The figures are in {path}")


@dataclasses.dataclass(frozen=True)
class Steps(_OnRuns):
    """Study how Eq. 21 depends on its step, in float32 and float64."""

    settings: Annotated[steps.StepSettings, tyro.conf.arg(name="")] = steps.StepSettings()

    def __call__(self) -> None:
        for folder, run in self._load():
            steps.study_steps(run, self.settings, folder, folder.name, self.name)
            path = runs.result_path(folder, "steps", self.name)
            print(f"The study is in {path.with_suffix('.npz')}")


@dataclasses.dataclass(frozen=True)
class Sharpness(_OnRuns):
    """Measure how sharply the loss and its terms bend in the parameters, and the learning rate
    that bears it: before training, and of finished runs in the best epoch. Runs that diverged are
    welcome."""

    settings: Annotated[sharpness.SharpnessSettings, tyro.conf.arg(name="")] = (
        sharpness.SharpnessSettings())

    def __call__(self) -> None:
        for folder, config in self._configs():
            found = sharpness.measure_sharpness(
                config, open_dataset(config, self.data_dir), self.settings, folder, folder.name,
                self.name)
            print(f"{folder}\n{sharpness.table_text(found, config.optimizer.momentum)}")


@dataclasses.dataclass(frozen=True)
class Theory(_OnRuns):
    """Check the paper's propositions and theorems on finished runs, and print what was found."""

    settings: Annotated[theory.TheorySettings, tyro.conf.arg(name="")] = theory.TheorySettings()

    def __call__(self) -> None:
        for folder, run in self._load():
            claims = theory.measure_theory(run, self.settings, folder, folder.name, self.name)
            print(theory.table_text(claims))
            print(f"This and more is in {runs.result_path(folder, 'theory', self.name)}")


@dataclasses.dataclass(frozen=True)
class Report:
    """Write the report of a folder that `reproduce` made, or of any finished runs."""

    folders: Positional[tuple[pathlib.Path, ...]]
    """Folder of the study; or folders of runs, of which those that differ in the seed alone are one
    row."""
    out: pathlib.Path | None = None
    """Folder of a report of runs; "report" beside the first if none is given."""

    def __call__(self) -> None:
        if not self.folders:
            raise InputError("Expected a folder of a study, or folders of runs, got none.")
        first = self.folders[0]
        if self.out is not None:
            runs.require_writable(self.out)
        if len(self.folders) == 1 and not (first / "config.json").is_file():
            if self.out is not None:
                raise InputError(f"Expected out only with runs: {first}, a study, holds its own "
                                 f"report. Got {self.out}.")
            path = report.write_report(first)
        else:
            path = report.write_report_of_runs(self.folders, self.out or first.parent / "report")
        print(f"The report is in {path}")


@dataclasses.dataclass(frozen=True)
class Predict:
    """Classify image files with a finished run, and say how doubtful each prediction is.

    A line for each image, and one on the score of doubt: which it is, how well it told wrong
    predictions from right ones on held-out images, and above which threshold an image is marked
    as doubtful. It is measured when a run is tested or, if it was not, at first use.
    """

    run: Positional[pathlib.Path]
    """Folder of the run."""
    images: Positional[tuple[pathlib.Path, ...]]
    """Image files."""
    data_dir: pathlib.Path = dataclasses.field(default_factory=default_data_dir)
    """Folder of TensorFlow Datasets."""

    def __call__(self) -> None:
        run, score = predict.load_classifier(self.run, self.data_dir)
        print(predict.table_text(predict.predict_files(run, score, self.images), score))


@dataclasses.dataclass(frozen=True)
class Export:
    """Write the network of a finished run for use elsewhere."""

    run: Positional[pathlib.Path]
    """Folder of the run."""
    out: pathlib.Path | None = None
    """FILE.stablehlo: the whole classifier, normalisation inside, for jax.export; FILE.safetensors
    or FILE.pth: the weights, in PyTorch's names; RUN/model.stablehlo if none is given."""
    data_dir: pathlib.Path = dataclasses.field(default_factory=default_data_dir)
    """Folder of TensorFlow Datasets."""

    def __call__(self) -> None:
        out = self.out or self.run / "model.stablehlo"
        predict.require_exportable(out)
        predict.export_run(*predict.load_classifier(self.run, self.data_dir), out)
        print(f"The network is in {out}")


@dataclasses.dataclass(frozen=True)
class Perturb:
    """Show what perturbations do to an image."""

    image: Positional[pathlib.Path]
    """Image file."""
    perturb: tuple[str, ...] = perturb_figure.EVERY
    """Perturbations, such as "occlusion(20,70)" or "gaussian(40/255)+occlusion(20,70)"; if not
    given, all there are, in the paper's strengths."""
    image_size: tuple[int, int] = (400, 500)
    """Height and width to which the image is resized."""
    out: pathlib.Path = pathlib.Path("perturbations.png")
    """Where the picture goes: a .png, .jpg, .webp or .svg file."""

    def __post_init__(self):
        check_image_size(self.image_size)
        _validate.in_range("number of perturbations", len(self.perturb), 1)
        distinct("perturbation", self.perturb)

    def __call__(self) -> None:
        perturb_figure.show_perturbations(self.image, self.image_size, self.perturb, self.out)
        print(f"The picture is in {self.out}")


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Download and prepare a data set."""

    dataset: Positional[str]
    """"cifar10" or "svhn_cropped"; "digits" needs none."""
    data_dir: pathlib.Path = dataclasses.field(default_factory=default_data_dir)
    """Folder of TensorFlow Datasets."""

    def __call__(self) -> None:
        runs.require_writable(self.data_dir.expanduser())
        print(prepare.prepare(self.dataset, self.data_dir.expanduser()))


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure the library's speed and memory as ratios, all in one run on this machine."""

    benchmark: Positional[str] = "train"
    """"train": the losses, a training step and the programs of runs; "curvature"; "profile": where
    the time of a step goes; "folder": decoding and augmenting photographs."""
    only: tuple[str, ...] | None = None
    """Sections of "train", a to i, to be measured anew; if not given, those that are not there
    yet."""
    out: pathlib.Path | None = None
    """Folder of the results; runs/bench-BENCHMARK if none is given."""
    quick: bool = False
    """Only show that it works: tiny networks and two rounds, whose numbers say nothing."""

    def __call__(self) -> None:
        bench.check(self.benchmark, self.only)
        folder = self.out or pathlib.Path("runs") / f"bench-{self.benchmark}"
        runs.require_writable(folder)
        print(bench.run(self.benchmark, folder, quick=self.quick, only=self.only))
        print(f"The results are in {folder}")


COMMANDS = {
    "reproduce": Reproduce, "train": Train, "sweep": Sweep, "evaluate": Evaluate,
    "curvature": Curvature, "steps": Steps, "figures": Figures, "theory": Theory,
    "sharpness": Sharpness, "report": Report,
    "predict": Predict, "export": Export, "perturb": Perturb, "prepare": Prepare, "bench": Bench,
}


def parse(arguments: list[str]):
    """The command, from its words.

    Raises:
      InputError: (a ValueError) in one line, for words that do not fit the command, no or an
        unknown recipe or row of ``train`` or ``sweep``, or a value that a configuration refuses.
      SystemExit: with status 0, after the help.
    """
    if arguments and not arguments[0].startswith("-"):
        _validate.one_of("command", arguments[0], COMMANDS)
    defaults = {}
    if arguments[:1] in (["train"], ["sweep"]):
        defaults[arguments[0]] = {"default": _default_of(COMMANDS[arguments[0]], arguments)}
    commands = tuple(
        Annotated[kind, tyro.conf.subcommand(name, **defaults.get(name, {}))]
        for name, kind in COMMANDS.items())
    return one_line_of(
        lambda words: tyro.cli(Union[commands], prog=PROGRAM, args=words),  # noqa: UP007
        arguments)


def _default_of(kind: type[Train] | type[Sweep], arguments: list[str]):
    """The command with the settings of the recipe that its words name, wherever among them.

    Where so few epochs are asked for that the recipe's warm-up would not end within them, it is the
    same share of them as in the recipe, and a line says so.
    """
    shown = kind(recipe="digits", run=get_recipe("digits").run("robust", seed=0))
    nothing = unchecked_copy(shown)
    nothing.recipe, nothing.run.epochs, nothing.run.optimizer.warmup_epochs = "", -1, -1.0
    helping = [word for word in arguments if word in ("-h", "--help")]
    asked = one_line_of(lambda words: parse_unchecked(nothing, words),
                        [word for word in arguments if word not in helping])
    if not asked.recipe:
        if helping:
            return shown
        raise InputError(f"Expected a recipe, such as {arguments[0]} digits/both, got none. There "
                         f"are: {', '.join(RECIPES)}.")
    name, _, row = asked.recipe.partition("/")
    run = get_recipe(name).run(row or "robust", seed=0)
    warmup, epochs = run.optimizer.warmup_epochs, asked.run.epochs
    if asked.run.optimizer.warmup_epochs == -1 and 0 < epochs <= warmup:
        fitting = warmup * epochs / run.epochs
        run = with_settings(dataclasses.replace(run, optimizer=dataclasses.replace(
            run.optimizer, warmup_epochs=fitting)), {"epochs": epochs})
        if not helping:
            print(f"Warm-up of {fitting:.2g} epochs, not {warmup:g}: the same share of --epochs "
                  f"{epochs} as in the recipe. --optimizer.warmup-epochs sets another.", flush=True)
    return kind(recipe=asked.recipe, run=run)


def main() -> None:
    """Runs the command of the command line; bad input is one line and status 2."""
    # Its warnings, such as that of a data set which is not there, have errors of their own here.
    # So have its errors: Orbax logs each with a traceback before it raises it.
    absl.logging.set_verbosity(absl.logging.FATAL)
    keep_freed_memory()
    command = None
    try:
        command = parse(sys.argv[1:])
        if not isinstance(command, Bench):  # Which measures how long compiling takes.
            keep_compilations()
        command()
    except InputError as error:
        hint = ""
        if isinstance(error, BadFiles):
            print("\n".join(error.lines), file=sys.stderr)
            if isinstance(command, Reproduce | Train | Sweep):
                hint = " Add --skip-bad to go on without them."
        print(f"error: {error}{hint}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
