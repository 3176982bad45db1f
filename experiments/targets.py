"""The paper's tables and figures, and the open questions, each by name.

    target ─ studies at a scale ─▶ runs ─▶ Study, the rows needed ─▶ tables and figures
"""

import dataclasses
import functools
import pathlib
import types
from collections.abc import Callable, Iterable, Mapping, Sequence

import pandas as pd

from experiments import carry_over, strongest, survival
from experiments.recipes import STUDIES, ablations
from experiments.recipes.scales import SCALES
from experiments.recipes.suites import settings_of
from jaxrobust import _validate
from jaxrobust.app import files
from jaxrobust.app.config import InputError
from jaxrobust.app.measurements import blocks, curvature, networks, noise_counts, sharpness
from jaxrobust.app.measurements.attacks import ATTACKS
from jaxrobust.app.measurements.certificates import CERTIFICATES
from jaxrobust.app.measurements.robustness import FIGURES
from jaxrobust.app.measurements.runner import sections
from jaxrobust.app.recipe import Recipe
from jaxrobust.app.report import figures, frame, pictures, report, tables
from jaxrobust.app.report.page import Picture, Section, Table
from jaxrobust.app.study.plan import StudyPlan, folder_of, require_data, with_sources
from jaxrobust.app.study.read import Run, Study, load_study, with_rows


@dataclasses.dataclass(frozen=True)
class Target:
    """A table, a figure or a question, and what it is made from."""

    title: str
    studies: tuple[str, ...]
    """Keys of :data:`experiments.recipes.STUDIES`."""
    build: Callable[[Study], Section]
    """Makes the section that shows a study."""
    rows: tuple[str, ...] | None = None
    """Rows of the studies; None for all."""
    measured: bool = False
    """Whether it needs the measurements of the command ``figures``."""
    perturbed: bool = False
    """Whether it shows the other perturbations of the evaluation alone."""
    suites: tuple[str, ...] = ()
    """Kinds of measurements of the command ``evaluate`` that it needs beside the evaluation."""
    numbers: tuple[Callable[[Run], Iterable[frame.Number]], ...] = (
        frame.training_numbers, frame.accuracy_numbers)
    """Numbers of the runs that it shows; none for a picture alone."""
    over_runs: Callable[[Study], pd.DataFrame] | None = None
    """Makes a table of further numbers, from several runs together."""


Tables = Sequence[Callable[[Study], Table | None]]


def _shown(anchor: str, tables_of: Tables, *pictures_of: Callable[[Study], Picture | None],
           best: bool = False) -> Callable[[Study], Section]:
    """Makes a builder of a section: tables, pictures and, with ``best``, a sentence on the best
    rows."""
    def build(study: Study) -> Section:
        return Section(
            anchor, study.title, " ".join(report.best_rows(study)) if best else "",
            tuple(filter(None, (table(study) for table in tables_of))),
            tuple(filter(None, (picture(study) for picture in pictures_of))))

    return build


def _accuracies(reference: str) -> Tables:
    """The accuracies, and their differences from those of a row."""
    return tables.accuracy_table, functools.partial(tables.difference_table, reference=reference)


def _perturbed(reference: str) -> Tables:
    """The accuracies under other perturbations, and their differences from those of a row."""
    return tables.perturbation_table, functools.partial(
        tables.perturbation_difference_table, reference=reference)


_accuracy = _shown("accuracy", _accuracies("both"), pictures.accuracy_picture, best=True)


def _question(reference: str) -> Callable[[Study], Section]:
    """Makes a builder that compares the rows of a question with one of them."""
    shown = _shown("question", (*_accuracies(reference), *_perturbed(reference),
                                curvature.curvature_table),
                   pictures.accuracy_picture, pictures.perturbation_picture, best=True)

    def build(study: Study) -> Section:
        section, sharp = shown(study), sharpness.SHARPNESS.section(study)
        return section._replace(tables=section.tables + (sharp.tables if sharp else ()))

    return build


def _networks(study: Study) -> Section:
    section = networks.section(study)
    if section is None:
        raise InputError(
            f"Expected {networks.FEWEST} finished networks in {study.name} with curvature, "
            "clean accuracy and accuracy under noise, found fewer.")
    return section._replace(heading=study.title)


def _robustness(name: str) -> Callable[[Study], Section]:
    """Makes a builder that shows one picture of the command ``figures``, with its tables."""
    def build(study: Study) -> Section:
        found = [section for section in sections(study, FIGURES)
                 if any(picture.name == name for picture in section.pictures)]
        return Section(
            "robustness", study.title, " ".join(section.lead for section in found).strip(),
            tuple(table for section in found for table in section.tables),
            tuple(picture for section in found for picture in section.pictures
                  if picture.name == name))

    return build


_TWO = ("normal", "robust")
_CURVED = (curvature.numbers, sharpness.numbers)

PAPER: dict[str, Target] = {
    "table1": Target("Table 1: CIFAR-10 under Gaussian noise", ("cifar10",), _accuracy),
    "table2": Target("Table 2: SVHN under Gaussian noise", ("svhn",), _accuracy),
    "table3": Target("Table 3: road images under Gaussian noise", ("road",), _accuracy),
    "table4": Target("Table 4: road images under other perturbations", ("road",), _shown(
        "perturbations", (tables.perturbation_table,), pictures.perturbation_picture),
        perturbed=True),
    "table5": Target("Table 5: the constraints one by one", ("table5_cifar10", "table5_svhn"),
                     _shown("accuracy", _accuracies("softmax"), pictures.levels_picture,
                            best=True)),
    "figure1": Target("Fig. 1: features of CIFAR-10, clean and noisy", ("cifar10",),
                      _shown("features", (), pictures.tsne_picture),
                      rows=("normal", "both", "robust"), numbers=()),
    "figure8": Target("Fig. 8: accuracy on the images of low curvature", ("cifar10", "svhn"),
                      _robustness("accuracy_by_curvature"), rows=_TWO, measured=True,
                      numbers=(noise_counts.numbers,)),
    "figure9": Target("Fig. 9: curvature and correct predictions", ("cifar10", "svhn"),
                      _robustness("curvature_by_correct"), rows=_TWO, measured=True,
                      numbers=(noise_counts.numbers,)),
    "figure10": Target("Fig. 10: curvature by method", ("cifar10", "svhn"), _shown(
        "curvature", (curvature.curvature_table,), curvature.curvature_picture),
        numbers=(curvature.numbers,)),
    "figure11": Target("Fig. 11: the loss around an image", ("svhn", "cifar10"),
                       _robustness("loss_surfaces"), rows=_TWO, measured=True, numbers=()),
    "figure12": Target("Fig. 12: features of the blocks, clean", ("cifar10",),
                       _robustness("blocks_clean"), rows=_TWO, measured=True,
                       numbers=(blocks.numbers,)),
    "figure13": Target("Fig. 13: features of the blocks, noisy", ("cifar10",),
                       _robustness("blocks_noisy"), rows=_TWO, measured=True,
                       numbers=(blocks.numbers,)),
}
"""The tables and figures of the paper, by name."""

QUESTIONS: dict[str, Target] = {
    name: Target(question.title, ("ablations",), _question(question.reference),
                 rows=question.rows, numbers=(*Target.numbers, *_CURVED))
    for name, question in ablations.QUESTIONS.items()} | {
    "transfer": Target("Perturbations that training has not seen", ("cifar10",), _shown(
        "perturbations", _perturbed("both"), pictures.perturbation_picture), perturbed=True),
    "flatness": Target("Is the flatter network the more robust one?", ("ablations",), _networks,
                       numbers=(*Target.numbers, curvature.numbers)),
    "methods": Target("What beats training on both views?", ("methods", "methods_digits"),
                      strongest.section, suites=("corruptions", "attacks"),
                      numbers=(*Target.numbers, strongest.numbers)),
    "corruptions": Target(
        "Does training on noise carry over to common corruptions?", ("cifar10", "digits"),
        carry_over.section, suites=("corruptions",), numbers=(carry_over.numbers,)),
    "survival": Target(
        "Does low curvature, or this training, buy adversarial or certified robustness?",
        ("cifar10", "digits"), survival.section, suites=("attacks", "certificates"),
        numbers=(curvature.numbers, *ATTACKS.numbers, *CERTIFICATES.numbers),
        over_runs=survival.numbers),
}
"""The questions that the paper leaves open, by name."""

TARGETS = PAPER | QUESTIONS
EVERY = {"all": tuple(TARGETS), "paper": tuple(PAPER), "questions": tuple(QUESTIONS)}
"""Names for several targets together."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Targets and the studies from which they are made."""

    targets: dict[str, Target]
    scale: str
    studies: dict[str, StudyPlan]  # by key of STUDIES
    out: pathlib.Path

    def text(self) -> str:
        """Describes what will be done, what is done already, and the cost."""
        lines = [f"{name}: {target.title}; in {self.out / name}"
                 for name, target in self.targets.items()]
        return "\n".join([*lines, *(study.text() for study in self.studies.values())])


def make_plan(
    name: str, scale: str, root: pathlib.Path, *, seeds: Sequence[int] | None = None,
    data: str | None = None, init_from: str | None = None,
    folder_options: Mapping[str, bool] = types.MappingProxyType({}),
    only: Sequence[str] | None = None,
) -> Plan:
    """Plans one of :data:`TARGETS`, or several, one of :data:`EVERY`, with all folders in ``root``.

    ``data``, ``init_from`` and ``folder_options`` apply to studies on folders of images; ``only``
    names the studies to use for targets that are made from several.
    """
    _validate.one_of("target", name, (*TARGETS, *EVERY))
    _validate.one_of("scale", scale, SCALES)
    chosen = {one: TARGETS[one] for one in EVERY.get(name, (name,))}
    if only is not None:
        known = sorted({study for target in chosen.values() for study in target.studies})
        for study in only:
            _validate.one_of("study", study, known)
        chosen = {one: dataclasses.replace(target, studies=tuple(
            study for study in target.studies if study in only))
            for one, target in chosen.items()}
        chosen = {one: target for one, target in chosen.items() if target.studies}
    studies: dict[str, StudyPlan] = {}
    chosen = _at_scale(name, chosen, scale)
    for target in chosen.values():
        for study in target.studies:
            recipe = STUDIES[study][scale]
            if folder_of(recipe) is not None:
                recipe = with_sources(recipe, data, init_from, folder_options)
                require_data(recipe, name)
            rows = target.rows or tuple(recipe.rows)
            known = studies.get(study)
            needed = {*rows, *(known.rows if known else ())}
            measured = {*(rows if target.measured else ()), *(known.measured if known else ())}
            kinds = {*target.suites, *(known.suites if known else ())}
            suites = {kind: settings for kind, settings in settings_of(recipe, scale).items()
                      if kind in kinds} if kinds else {}
            studies[study] = StudyPlan(
                recipe, root / recipe.name,
                tuple(row for row in recipe.rows if row in needed),
                tuple(seeds or recipe.seeds),
                tuple(row for row in recipe.rows if row in measured), suites)
    return Plan(chosen, scale, studies, root / scale)


def _at_scale(name: str, targets: dict[str, Target], scale: str) -> dict[str, Target]:
    """The targets that can be made at a scale, each from its studies that have a recipe there."""
    def at(scale: str) -> dict[str, Target]:
        made = {one: dataclasses.replace(target, studies=tuple(
            study for study in target.studies if _can_make(target, STUDIES[study].get(scale))))
            for one, target in targets.items()}
        return {one: target for one, target in made.items() if target.studies}

    if not at(scale):
        raise InputError(f"Expected scale={scale!r} as one of "
                         f"{', '.join(each for each in SCALES if at(each))} for {name}.")
    return at(scale)


def _can_make(target: Target, recipe: Recipe | None) -> bool:
    """Whether a recipe, if there is one, measures what a target shows."""
    return (recipe is not None
            and (recipe.curvature is not None or curvature.numbers not in target.numbers)
            and (bool(recipe.evaluation.perturb) or not target.perturbed))


def write_targets(plan: Plan) -> list[pathlib.Path]:
    """Writes a folder for each target: ``NAME.md``, figures, ``NAME.csv`` with all numbers, and
    ``NAME.json`` with their means over the seeds. Returns the Markdown files.
    """
    return [_write_target(name, plan) for name in plan.targets]


def _write_target(name: str, plan: Plan) -> pathlib.Path:
    target, folder = plan.targets[name], plan.out / name
    studies = [with_rows(load_study(plan.studies[key].folder), target.rows)
               for key in target.studies]
    sections = [target.build(study) for study in studies]
    files.make_folder(folder)
    parts = [f"# {target.title}", f"Scale: {plan.scale}. {_made_by(name, plan)}"]
    for study, section in zip(studies, sections, strict=True):
        # Pictures of two studies have the same name.
        section = section._replace(pictures=tuple(
            picture._replace(name=f"{study.name}-{picture.name}") for picture in section.pictures))
        for picture in section.pictures:
            figures.save(picture.figure, folder / picture.name)
        parts += report.section_markdown(section, "")
        if study.note:
            parts.append(report.paragraph_markdown(study.note))
    files.write_text(folder / f"{name}.md", "\n\n".join(parts) + "\n")
    content = {"target": name, "title": target.title, "scale": plan.scale,
               "studies": [_facts(study) for study in studies]}
    if target.numbers:
        numbers = pd.concat([
            *(report.numbers_of(study, target.numbers) for study in studies),
            *(target.over_runs(study) for study in studies if target.over_runs)])
        files.write_text(folder / f"{name}.csv", frame.to_csv(numbers))
        content["numbers"] = frame.summary(numbers)
    files.write_json(folder / f"{name}.json", content)
    return folder / f"{name}.md"


def _made_by(name: str, plan: Plan) -> str:
    words = f"python -m experiments reproduce {name} --scale {plan.scale}"
    if plan.targets[name].studies != TARGETS[name].studies:
        words += f" --studies {' '.join(plan.targets[name].studies)}"
    return f"Made by `{words}`; the runs' provenance is in `{name}.json`."


def _facts(study: Study) -> dict:
    """The provenance of the runs of a study."""
    finished = study.all_finished()
    return {
        "name": study.name, "command": study.command, "commit": study.commit,
        "rows": study.labels,
        "runs": {run.folder.name: {
            "commit": run.provenance.get("commit"), "seconds": run.provenance.get("seconds"),
            "seed": run.seed, "epoch": run.evaluation["epoch"]} for run in finished},
        "diverged": [run.folder.name for of_row in study.runs.values() for run in of_row
                     if run.diverged],
        "hardware": sorted({run.provenance["hardware"] for run in finished}),
        "versions": finished[0].provenance["versions"],
    }
