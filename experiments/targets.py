"""The paper's tables and figures, and the open questions, each by name.

    target ─ studies at a scale ─▶ runs ─▶ Study, the rows needed ─▶ tables and figures
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Sequence

import pandas as pd

from experiments.recipes import STUDIES, ablations
from experiments.recipes.scales import SCALES
from jaxrobust import _validate
from jaxrobust.app import files
from jaxrobust.app.config import InputError
from jaxrobust.app.measurements import blocks, curvature, networks, noise_counts, sharpness
from jaxrobust.app.measurements.robustness import FIGURES
from jaxrobust.app.measurements.runner import sections
from jaxrobust.app.report import figures, frame, pictures, report, tables
from jaxrobust.app.report.page import Section, Table
from jaxrobust.app.study.plan import StudyPlan, folder_of, require_data, with_sources
from jaxrobust.app.study.read import Run, Study, load_study, with_rows


@dataclasses.dataclass(frozen=True)
class Target:
    """A table, a figure or a question, and what it is made from."""

    title: str
    studies: tuple[str, ...]
    """Keys of :data:`experiments.recipes.STUDIES`."""
    build: Callable[[Study], Section]
    """What is shown of each."""
    rows: tuple[str, ...] | None = None
    """Of the studies; none for all."""
    measured: bool = False
    """Whether it takes what the command ``figures`` measures."""
    numbers: tuple[Callable[[Run], Iterable[frame.Number]], ...] = (
        frame.training_numbers, frame.accuracy_numbers)
    """Those of the runs that it shows; none of a picture alone."""


def _accuracy(study: Study) -> Section:
    return Section("accuracy", study.title, _best(study), _accuracies(study, "both"),
                   (pictures.accuracy_picture(study),))


def _clean_accuracy(study: Study) -> Section:
    return Section("accuracy", study.title, _best(study), _accuracies(study, "softmax"),
                   (pictures.levels_picture(study),))


def _best(study: Study) -> str:
    return " ".join(report.best_rows(study))


def _accuracies(study: Study, reference: str) -> tuple[Table, ...]:
    """The accuracies, and how they differ from those of one row."""
    return tuple(filter(None, (tables.accuracy_table(study),
                               tables.difference_table(study, reference))))


def _perturbations(study: Study) -> Section:
    return Section("perturbations", study.title, "", (tables.perturbation_table(study),),
                   (pictures.perturbation_picture(study),))


def _transfer(study: Study) -> Section:
    return _perturbations(study)._replace(tables=_perturbed(study, "both"))


def _perturbed(study: Study, reference: str) -> tuple[Table, ...]:
    """The accuracies under other perturbations, and how they differ from those of one row."""
    return tuple(filter(None, (tables.perturbation_table(study),
                               tables.perturbation_difference_table(study, reference))))


def _networks(study: Study) -> Section:
    section = networks.section(study)
    if section is None:
        raise InputError(
            f"Expected {networks.FEWEST} finished networks in {study.name} with curvature, "
            "clean accuracy and accuracy under noise, found fewer.")
    return section._replace(heading=study.title)


def _curvature(study: Study) -> Section:
    return Section("curvature", study.title, "", (curvature.curvature_table(study),),
                   (curvature.curvature_picture(study),))


def _features(study: Study) -> Section:
    picture = pictures.tsne_picture(study)
    return Section("features", study.title, "", (), (picture,) if picture else ())


def _question(reference: str) -> Callable[[Study], Section]:
    """The rows that answer it, and how they compare with one of them."""
    def build(study: Study) -> Section:
        sharp = sharpness.SHARPNESS.section(study)
        return Section("question", study.title, _best(study),
                       (*_accuracies(study, reference), *_perturbed(study, reference),
                        curvature.curvature_table(study), *(sharp.tables if sharp else ())),
                       (pictures.accuracy_picture(study), pictures.perturbation_picture(study)))

    return build


def _robustness(names: Sequence[str]) -> Callable[[Study], Section]:
    """Of the sections on curvature and robustness, the pictures of these names with their tables.
    """
    def build(study: Study) -> Section:
        found = [section for section in sections(study, FIGURES)
                 if any(picture.name in names for picture in section.pictures)]
        return Section(
            "robustness", study.title, " ".join(section.lead for section in found).strip(),
            tuple(table for section in found for table in section.tables),
            tuple(picture for section in found for picture in section.pictures
                  if picture.name in names))

    return build


_TWO = ("normal", "robust")
_CURVED = (curvature.numbers, sharpness.numbers)

PAPER: dict[str, Target] = {
    "table1": Target("Table 1: CIFAR-10 under Gaussian noise", ("cifar10",), _accuracy),
    "table2": Target("Table 2: SVHN under Gaussian noise", ("svhn",), _accuracy),
    "table3": Target("Table 3: road images under Gaussian noise", ("road",), _accuracy),
    "table4": Target("Table 4: road images under other perturbations", ("road",), _perturbations),
    "table5": Target("Table 5: the constraints one by one", ("table5_cifar10", "table5_svhn"),
                     _clean_accuracy),
    "figure1": Target("Fig. 1: features of CIFAR-10, clean and noisy", ("cifar10",), _features,
                      rows=("normal", "both", "robust"), numbers=()),
    "figure8": Target("Fig. 8: accuracy on the images of low curvature", ("cifar10", "svhn"),
                      _robustness(("accuracy_by_curvature",)), rows=_TWO, measured=True,
                      numbers=(noise_counts.numbers,)),
    "figure9": Target("Fig. 9: curvature and correct predictions", ("cifar10", "svhn"),
                      _robustness(("curvature_by_correct",)), rows=_TWO, measured=True,
                      numbers=(noise_counts.numbers,)),
    "figure10": Target("Fig. 10: curvature by method", ("cifar10", "svhn"), _curvature,
                       numbers=(curvature.numbers,)),
    "figure11": Target("Fig. 11: the loss around an image", ("svhn", "cifar10"),
                       _robustness(("loss_surfaces",)), rows=_TWO, measured=True, numbers=()),
    "figure12": Target("Fig. 12: features of the blocks, clean", ("cifar10",),
                       _robustness(("blocks_clean",)), rows=_TWO, measured=True,
                       numbers=(blocks.numbers,)),
    "figure13": Target("Fig. 13: features of the blocks, noisy", ("cifar10",),
                       _robustness(("blocks_noisy",)), rows=_TWO, measured=True,
                       numbers=(blocks.numbers,)),
}
"""The paper's, by name."""

QUESTIONS: dict[str, Target] = {
    name: Target(question.title, ("ablations",), _question(question.reference),
                 rows=question.rows, numbers=(*Target.numbers, *_CURVED))
    for name, question in ablations.QUESTIONS.items()} | {
    "transfer": Target("Perturbations that training has not seen", ("cifar10",), _transfer),
    "flatness": Target("Is the flatter network the more robust one?", ("ablations",), _networks,
                       numbers=(*Target.numbers, curvature.numbers)),
}
"""What the paper leaves open, by name."""

TARGETS = PAPER | QUESTIONS
EVERY = {"all": tuple(TARGETS), "paper": tuple(PAPER), "questions": tuple(QUESTIONS)}
"""Names for several targets together."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Targets and the studies that they are made from."""

    targets: dict[str, Target]
    scale: str
    studies: dict[str, StudyPlan]  # by key of STUDIES
    out: pathlib.Path

    def text(self) -> str:
        """What is to be done, what is there already, and what it takes."""
        lines = [f"{name}: {target.title}; in {self.out / name}"
                 for name, target in self.targets.items()]
        return "\n".join([*lines, *(study.text() for study in self.studies.values())])


def make_plan(
    name: str, scale: str, root: pathlib.Path, *, seeds: Sequence[int] | None = None,
    data: str | None = None, init_from: str | None = None, skip_bad: bool = False,
    only: Sequence[str] | None = None,
) -> Plan:
    """The plan of a target, or of several.

    Args:
      name: one of :data:`TARGETS` or :data:`EVERY`.
      scale: one of :data:`experiments.recipes.scales.SCALES`.
      root: folder of the studies, and of the folder of the tables and figures.
      seeds: of all runs; those of each recipe if none are given.
      data: the data set of the studies on folders of images.
      init_from: file of PyTorch weights that these start from.
      skip_bad: whether they go on without images that cannot be used.
      only: the studies to be used, of targets that are made from several; all if none are given.

    Raises:
      InputError: (a ValueError) for an unknown target, scale or study, a target of which no study
        is left, or a study of a folder without one.
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
    for target in chosen.values():
        for study in target.studies:
            recipe = STUDIES[study][scale]
            if folder_of(recipe) is not None:
                recipe = with_sources(recipe, data, init_from, skip_bad)
                require_data(recipe, name)
            rows = target.rows or tuple(recipe.rows)
            known = studies.get(study)
            needed = {*rows, *(known.rows if known else ())}
            measured = {*(rows if target.measured else ()), *(known.measured if known else ())}
            studies[study] = StudyPlan(
                recipe, root / recipe.name,
                tuple(row for row in recipe.rows if row in needed),
                tuple(seeds or recipe.seeds),
                tuple(row for row in recipe.rows if row in measured))
    return Plan(chosen, scale, studies, root / scale)


def write_targets(plan: Plan) -> list[pathlib.Path]:
    """Writes each target's folder: ``NAME.md``, its figures, and its numbers in ``NAME.csv`` and,
    over the seeds, in ``NAME.json``.

    Returns:
      The Markdown files.

    Raises:
      InputError: (a ValueError) if a study has no finished run in the rows of a target.
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
        # Pictures of two studies would have the same name.
        section = section._replace(pictures=tuple(
            picture._replace(name=f"{study.name}-{picture.name}") for picture in section.pictures))
        for picture in section.pictures:
            figures.save(picture.figure, folder / picture.name)
        parts += report.section_markdown(section, "")
        parts += [] if not study.note else [report.paragraph_markdown(study.note)]
    files.write_text(folder / f"{name}.md", "\n\n".join(parts) + "\n")
    content = {"target": name, "title": target.title, "scale": plan.scale,
               "studies": [_facts(study) for study in studies]}
    if target.numbers:
        numbers = pd.concat(report.numbers_of(study, target.numbers) for study in studies)
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
    """Where the runs of a study come from."""
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
