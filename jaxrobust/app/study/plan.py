"""Plans a study: which rows and seeds of a recipe, fitted to a data set, in which folder."""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxrobust.app import files, provenance, run_folder
from jaxrobust.app.config import InputError, RunConfig
from jaxrobust.app.program import num_held_out, rows_of
from jaxrobust.app.recipe import Recipe
from jaxrobust.app.report.page import duration, listed
from jaxrobust.app.run_folder import place_of
from jaxrobust.data import FOLDER_PREFIX, Dataset
from jaxrobust.data.listing import list_images


def folder_of(recipe: Recipe) -> str | None:
    """The folder of images, or CSV file, of a recipe; "" if none is named, None for other data."""
    dataset = next(iter(recipe.rows.values())).dataset
    return dataset.removeprefix(FOLDER_PREFIX) if dataset.startswith(FOLDER_PREFIX) else None


def require_data(recipe: Recipe, asked: str) -> None:
    """Raises InputError if a recipe needs a folder of images and names none."""
    if folder_of(recipe) == "":
        raise InputError(f"Expected data=folder:PATH, a folder of images, for {asked}: "
                         f"{recipe.name} has no data set of its own.")


@dataclasses.dataclass(frozen=True)
class StudyPlan:
    """The runs of a study."""

    recipe: Recipe
    folder: pathlib.Path
    rows: tuple[str, ...]
    seeds: tuple[int, ...]
    measured: tuple[str, ...] = ()  # rows that get the measurements of the command `figures`
    suites: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """By kind of a measurement of the command `evaluate` that all rows get, its settings; without
    a limit it is made on all images that the study tests."""

    def places(self, rows: Iterable[str] | None = None) -> list[pathlib.Path]:
        """The folders of the runs of some rows, or of all."""
        return [place_of(self.folder, row, seed)
                for seed in self.seeds for row in (self.rows if rows is None else rows)]

    def configs(self) -> dict[pathlib.Path, RunConfig]:
        """The configurations by folder, seed by seed."""
        return {place_of(self.folder, row, seed): self.recipe.run(row, seed)
                for seed in self.seeds for row in self.rows}

    def text(self) -> str:
        """Describes the runs, the settings and the cost in a few lines."""
        places = self.places()
        last = "evaluation" if self.recipe.curvature is None else "curvature"
        done = sum(run_folder.is_measured(place, last) for place in places)
        begun = sum(map(run_folder.is_run, places)) - done
        first = self.recipe.rows[self.rows[0]]
        size = "all" if first.train_size is None else f"{first.train_size:,}"
        folder, cost, larger, found = folder_of(self.recipe), self.recipe.cost, 1.0, ""
        if folder is not None:
            num_images = len(list_images(
                pathlib.Path(folder).expanduser(), outside_links=first.outside_links).entries)
            if not num_images:
                raise InputError(f"Expected images in {folder}, found none.")
            found = f" of {num_images:,} images"
            if cost is not None and cost.images is not None:
                larger = num_images / cost.images
        lines = [f"{self.recipe.name}: {len(places)} runs ({len(self.rows)} rows, seeds "
                 f"{listed(self.seeds)}), {done} done, {begun} begun; in {self.folder}",
                 f"  {first.dataset}{found}, {size} training images, {first.model} of width "
                 f"{first.width}, {first.epochs} epochs, batches of {first.batch_size}"]
        lines += [f"  {kind}: {sum(run_folder.is_measured(place, kind) for place in places)} of "
                  f"{len(places)} runs done" for kind in self.suites]
        if cost is not None:
            share = larger * (len(places) - done) / len(self.recipe.rows)
            cpu, gpu = (duration(3600 * share * hours) for hours in (
                cost.cpu_hours, cost.gpu_hours))
            without = " without these" if self.suites else ""
            lines.append(f"  remaining{without}, on two CPU cores with --jobs 2: {cpu}, "
                         f"{cost.cpu_gigabytes:g} GB; on one GPU: {gpu} ({cost.basis})")
        return "\n".join(lines)


def plan_study(
    recipe: Recipe, folder: pathlib.Path, rows: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> StudyPlan:
    """Plans all rows and seeds of a recipe, or some of them."""
    require_data(recipe, recipe.name)
    rows, seeds = tuple(rows or recipe.rows), tuple(seeds or recipe.seeds)
    for row in rows:
        recipe.run(row, seeds[0])
    return StudyPlan(recipe, folder, rows, seeds)


def claim_study(plan: StudyPlan, class_names: Sequence[str]) -> None:
    """Writes ``study.json``, or adds seeds and rows to the one in the folder of a plan.

    It holds everything that the report needs apart from the runs.
    """
    recipe, path = plan.recipe, run_folder.facts_path(plan.folder, "study")
    asked: dict[str, Any] = {
        "name": recipe.name, "title": recipe.title, "note": recipe.note,
        "paper_table": recipe.paper_table, "seeds": list(plan.seeds),
        "class_names": list(class_names),
        "rows": {row: recipe.labels[row] for row in recipe.rows},
        "methods": {row: config.method for row, config in recipe.rows.items()},
        "paper_rows": recipe.paper_rows, "paper_perturbations": recipe.paper_perturbations,
        **({"swept": recipe.swept} if recipe.swept else {}),
        "command": provenance.command_line(), "commit": provenance.own_commit(),
    }
    for place, config in plan.configs().items():
        if run_folder.is_run(place):
            run_folder.claim_run(place, config)
    if not path.is_file():
        files.claim(path, json.dumps(asked, indent=2) + "\n")
        return
    with run_folder.locked_study(plan.folder):  # Another command may add seeds at this moment.
        there = files.read_json(path)
        same = all(there[name] == asked[name] for name in ("name", "paper_table", "class_names"))
        kept = all(there[name].items() <= asked[name].items()
                   for name in ("rows", "methods", "paper_rows"))
        if not (same and kept):
            raise files.holds_another("study", path)
        # Texts may be improved; the command and commit remain those that began the study.
        wanted = {**asked, "command": there["command"], "commit": there["commit"],
                  "seeds": sorted({*there["seeds"], *plan.seeds})}
        if wanted != there:
            files.write_json(path, wanted)


def with_sources(recipe: Recipe, dataset: str | None, init_from: str | None,
                 folder_options: Mapping[str, bool]) -> Recipe:
    """Replaces the data set and the initial weights of a recipe, if given, and switches on those of
    :data:`jaxrobust.app.config.FOLDER_OPTIONS` that are true."""
    given = {"dataset": dataset, "init_from": init_from,
             **{name: on or None for name, on in folder_options.items()}}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(recipe, rows={
        row: dataclasses.replace(config, **changes) for row, config in recipe.rows.items()})


def fit_recipe(recipe: Recipe, dataset: Dataset) -> tuple[Recipe, list[str]]:
    """Reduces the settings for which a data set is too small, and returns a line for each change.

    These are the numbers of validation, training and test images, the batch size, and the number
    of images whose curvature is measured.
    """
    fitted = {row: _fit_run(config, dataset) for row, config in recipe.rows.items()}
    evaluation, num_test = recipe.evaluation, len(dataset.test.labels)
    if evaluation.test_size is not None and evaluation.test_size >= num_test:
        evaluation = dataclasses.replace(evaluation, test_size=None)
    curvature = recipe.curvature and dataclasses.replace(recipe.curvature, num_images=min(
        recipe.curvature.num_images, evaluation.test_size or num_test))
    found = (f"{dataset.name} has {len(dataset.train.labels)} training and {num_test} test images "
             f"of {len(dataset.class_names)} classes")
    pairs: list[tuple[Any, Any]] = [*((recipe.rows[row], config) for row, config in fitted.items()),
             (recipe.evaluation, evaluation), (recipe.curvature, curvature)]
    lines = [f"{found}: {field.name} is {'all' if new is None else new} instead of {old}."
             for before, after in pairs if before is not None
             for field in dataclasses.fields(before)
             if (old := getattr(before, field.name)) != (new := getattr(after, field.name))]
    return (dataclasses.replace(recipe, rows=fitted, evaluation=evaluation, curvature=curvature),
            list(dict.fromkeys(lines)))


def _fit_run(config: RunConfig, dataset: Dataset) -> RunConfig:
    """Reduces the settings of a run for which a data set is too small."""
    num_train, num_classes = len(dataset.train.labels), len(dataset.class_names)
    if config.validation_size and dataset.validation is None:
        size = num_held_out(config, num_train)
        # A size that leaves less than half was meant for a larger set.
        size = size if size <= num_train // 2 else num_train // 5
        wide_enough = next((count for count in range(max(size, num_classes), num_train)
                            if _can_hold_out(config, count, dataset)), None)
        if wide_enough is None:
            raise InputError(
                f"Expected more images in {dataset.name}: of {num_train} training images of "
                f"{num_classes} classes, one of each class cannot be held out to choose the epoch.")
        share = config.validation_size < 1 and wide_enough == size
        config = dataclasses.replace(
            config, validation_size=config.validation_size if share else wide_enough)
    left = len(rows_of(dataclasses.replace(config, train_size=None), dataset)[0])
    if config.train_size is not None and config.train_size >= left:
        config = dataclasses.replace(config, train_size=None)
    return dataclasses.replace(
        config, batch_size=min(config.batch_size, config.train_size or left))


def _can_hold_out(config: RunConfig, count: int, dataset: Dataset) -> bool:
    try:
        rows_of(dataclasses.replace(config, validation_size=count, train_size=None), dataset)
    except InputError:  # A class would be left without an image on one side.
        return False
    return True
