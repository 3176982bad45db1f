"""Plans and runs a fit, in a folder with ``fit.json``, the study ``study`` and ``choice.json``."""

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxrobust import noise_level
from jaxrobust.app import files, provenance, run_folder
from jaxrobust.app.config import Evaluation, InputError, RunConfig, from_dict
from jaxrobust.app.datasets import open_dataset
from jaxrobust.app.fit import choice, settings
from jaxrobust.app.fit.costs import measure_costs, relative_work, work_of
from jaxrobust.app.fit.schedule import plan_schedule
from jaxrobust.app.fit.settings import Decision, Facts
from jaxrobust.app.measurements import accuracy
from jaxrobust.app.measurements.held_out import HELD_OUT, HeldOutSettings
from jaxrobust.app.measurements.runner import measure
from jaxrobust.app.progress import progress
from jaxrobust.app.recipe import Recipe
from jaxrobust.app.report import card, report
from jaxrobust.app.report.page import duration, listed
from jaxrobust.app.study.plan import StudyPlan
from jaxrobust.app.study.read import study_of_runs
from jaxrobust.app.study.run import run_study
from jaxrobust.app.trainer import load_run
from jaxrobust.data import FOLDER_PREFIX, Dataset
from jaxrobust.data.camera import CameraNoise, find_photographs, measure_noise
from jaxrobust.data.decoded import stored_size
from jaxrobust.data.listing import list_images
from jaxrobust.parallel import Layout

TEST_DRAWS = 10
SIZES_READ = 100
"""Files of a folder whose sizes are read."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the options of a fit ask for; a fit is resumed only with the same."""

    dataset: str
    budget: float  # seconds
    noise: float | None  # in pixel values of [0, 1]
    like: str | None  # folder of photographs with the noise to be robust against
    clean_share: float
    num_draws: int
    methods: tuple[str, ...] | None
    seeds: tuple[int, ...] | None
    run: Mapping[str, Any]  # settings of the runs by dotted name


@dataclasses.dataclass(frozen=True)
class FitPlan:
    """What a fit trains, and how it chooses."""

    rows: dict[str, RunConfig]
    seeds: tuple[int, ...]
    noise_std: float
    seconds: float  # expected
    text: str

    def study(self, folder: pathlib.Path) -> StudyPlan:
        """The study that trains and tests the runs."""
        first, *_ = self.rows.values()
        level = round(255 * self.noise_std, 6)
        recipe = Recipe(
            name="fit", title=f"Fit of {first.dataset} under noise of {level:g}/255",
            rows=self.rows, labels={row: settings.LABELS[row] for row in self.rows},
            evaluation=Evaluation(noise_levels=(0, level), num_draws=TEST_DRAWS), curvature=None,
            seeds=self.seeds, note="The method and its run were chosen on held-out images, not on "
            "the test images that are shown here.")
        return StudyPlan(recipe, folder, tuple(self.rows), self.seeds)


# --- planning --------------------------------------------------------------------------------


def facts_of(dataset: str, *, outside_links: bool = False) -> Facts:
    """Gathers what the settings depend on, without decoding the images."""
    accelerator = jax.default_backend() != "cpu"
    if not dataset.startswith(FOLDER_PREFIX):
        return Facts(dataset, 0, accelerator)
    listing = list_images(pathlib.Path(dataset.removeprefix(FOLDER_PREFIX)).expanduser(),
                          outside_links=outside_links)
    entries = [entry for entry in listing.entries if entry.side in (None, "train")]
    sizes = []
    for place in np.linspace(0, len(entries) - 1, min(SIZES_READ, len(entries))).astype(int):
        with contextlib.suppress(InputError):  # Opening the data set will name it.
            sizes.append(stored_size(listing.root / entries[place].path))
    if not sizes:
        raise InputError(f"Expected images in {dataset.removeprefix(FOLDER_PREFIX)}, found none.")
    height, width = np.median(sizes, axis=0).round().astype(int).tolist()
    given = any(entry.side == "test" for entry in listing.entries)
    return Facts(dataset, round((1.0 if given else 0.8) * len(entries)), accelerator,
                 (height, width))


def camera_noise(like: pathlib.Path, dataset: Dataset) -> tuple[float, str]:
    """The noise to train with for images as in a folder, and how it was found.

    It is the noise of the photographs, from pairs of shots; or, from single images, the noise that
    they have in addition to the training images, sqrt(s^2 - t^2), in which the share of what both
    show that looks like noise cancels.

    Raises:
      InputError: (a ValueError) if there are no usable photographs, or they are no noisier than the
        training images.
    """
    *size, channels = dataset.image_shape
    paths = find_photographs(like)
    camera = _measured(paths, tuple(size), channels, "noise of the camera")
    if camera.pairs:
        settings.check_noise("the noise of like", camera.std)
        return _rounded(camera.std), (
            f"of {camera.number} pairs of shots in {like}, {_range(camera)}")
    if dataset.files is not None:
        root = list_images(pathlib.Path(dataset.name.removeprefix(FOLDER_PREFIX))).root
        own = _measured([root / file.path for file in dataset.files if file.split == "train"],
                        tuple(size), channels, "noise of the training images", use_pairs=False).std
    else:
        own = float(np.nanmedian(noise_level.noise_std(dataset.train.images[:200])))
    if camera.std <= own:
        raise InputError(
            f"Expected like={like} to hold noisier images than the training images, got estimates "
            f"of {255 * camera.std:.1f}/255 and {255 * own:.1f}/255. Give the level with --noise.")
    std = _rounded(float(np.sqrt(camera.std**2 - own**2)))
    settings.check_noise("the noise of like", std)
    return std, (f"{255 * camera.std:.1f}/255 in {camera.number} images of {like}, "
                 f"{_range(camera)}, less {255 * own:.1f}/255 in the training images, in squares")


def _rounded(std: float) -> float:
    """Rounds to a tenth of 1/255, far less than the error."""
    return round(255 * std, 1) / 255


def _measured(paths, size, channels, what, **options) -> CameraNoise:
    shown = None
    with contextlib.ExitStack() as stack:

        def done(_, total):
            nonlocal shown
            shown = shown or stack.enter_context(progress(what, total))
            shown.advance()

        return measure_noise(paths, size, channels, progress=done, **options)


def _range(camera: CameraNoise) -> str:
    return f"10 to 90 % of them {255 * camera.low:.1f} to {255 * camera.high:.1f}"


def make_plan(asked: Asked, data_dir: pathlib.Path, layout: Layout, started: float
              ) -> tuple[FitPlan, Dataset]:
    """Decides everything, with the time of some updates on this machine.

    ``started`` is the time.monotonic() from which the budget counts.
    """
    facts = facts_of(asked.dataset, outside_links=asked.run.get("outside_links", False))
    config, reasons = settings.choose_settings(facts, asked.run)
    dataset = open_dataset(config, data_dir)
    if asked.like is not None:
        noise, why = camera_noise(pathlib.Path(asked.like), dataset)
        option = "--noise instead of --like"
    elif asked.noise is not None:
        noise, why, option = asked.noise, "as asked", "--noise"
    else:
        noise, option = config.noise_std, "--noise, --like"
        why = "none was named; that of the recipe"
    config = dataclasses.replace(config, noise_std=noise)
    config, reasons, changes = settings.fitted_to(config, reasons, dataset, layout)
    rows = settings.rows_of_methods(config)
    asked_rows = asked.methods and [row for row in settings.ORDER if row in asked.methods]
    files.say(f"Timing updates of {config.model} on this machine.")
    costs = measure_costs(config, dataset, layout)
    work = work_of(config, dataset, asked.num_draws, TEST_DRAWS)
    schedule = plan_schedule(
        settings.ORDER, {row: relative_work(one, dataset) for row, one in rows.items()}, costs,
        work, asked.budget, spent=time.monotonic() - started, wanted_epochs=config.epochs,
        rows=asked_rows, epochs=asked.run.get("epochs"), seeds=asked.seeds)
    update = 6 * config.batch_size * costs.pass_per_image
    num_held_out = len(dataset.train.labels) - work.trained if dataset.validation is None else len(
        dataset.validation.labels)
    decisions = [
        Decision("noise", f"{255 * noise:.3g}/255", why, option),
        *settings.decisions_of(config, reasons, facts, num_held_out),
        Decision("methods", ", ".join(schedule.rows),
                 "as asked" if asked.methods and set(asked.methods) == set(schedule.rows) else
                 "by what is known: docs/findings", "--methods"),
        Decision("epochs", str(schedule.epochs), "as asked" if "epochs" in asked.run else
                 "the usual number" if schedule.epochs == config.epochs else
                 f"{config.epochs} would take longer", "--epochs"),
        Decision("seeds", listed(schedule.seeds), "as asked" if asked.seeds else
                 "as many as the budget allows, up to three", "--seeds"),
        Decision("choice", f"{asked.clean_share:g} clean + {1 - asked.clean_share:g} noisy",
                 f"accuracy on {num_held_out:,} held-out images, {asked.num_draws} draws of the "
                 "noise", "--clean-share, --num-draws"),
        Decision("time", duration(schedule.seconds),
                 f"expected: an update of both takes {update:.3g} s, its programs "
                 f"{costs.compile:.0f} s to compile", "--budget")]
    lines = [f"{asked.dataset}: {work.trained:,} images to train on, {num_held_out:,} held out to "
             f"choose, {len(dataset.test.labels):,} to test; {len(dataset.class_names)} classes",
             *changes, settings.text_of(decisions),
             *schedule.notes]
    trained = {row: settings.trained_for(rows[row], schedule.epochs) for row in schedule.rows}
    return FitPlan(trained, schedule.seeds, noise, schedule.seconds, "\n".join(lines)), dataset


def name_of(dataset: str) -> str:
    """A name for the folder of results: that of the data set, or of its folder or file."""
    if not dataset.startswith(FOLDER_PREFIX):
        return dataset
    return pathlib.Path(dataset.removeprefix(FOLDER_PREFIX)).expanduser().resolve().stem


def open_data(plan: FitPlan, data_dir: pathlib.Path) -> Dataset:
    """Opens the data set of a plan."""
    first, *_ = plan.rows.values()
    return open_dataset(first, data_dir)


# --- the folder of a fit ---------------------------------------------------------------------


def read_plan(folder: pathlib.Path, asked: Asked) -> FitPlan | None:
    """Reads the plan that a folder was begun with; None if there is none.

    Raises:
      InputError: (a ValueError) if it was asked for with other options.
    """
    there = run_folder.read_facts(folder, "fit")
    if there is None:
        return None
    if there["asked"] != json.loads(json.dumps(dataclasses.asdict(asked))):
        raise files.holds_another("fit", run_folder.facts_path(folder, "fit"))
    return FitPlan({row: from_dict(RunConfig, values) for row, values in there["rows"].items()},
                   tuple(there["seeds"]), there["noise_std"], there["seconds"], there["text"])


def claim(folder: pathlib.Path, asked: Asked, plan: FitPlan) -> None:
    """Makes a folder that of a fit."""
    files.claim(run_folder.facts_path(folder, "fit"), json.dumps({
        "asked": dataclasses.asdict(asked), **dataclasses.asdict(plan),
        "provenance": provenance.describe()}, indent=2) + "\n")


def run_fit(folder: pathlib.Path, asked: Asked, plan: FitPlan, dataset: Dataset, layout: Layout
            ) -> str:
    """Trains what is missing, chooses, and returns what to tell the user.

    Raises:
      InputError: (a ValueError) if every run diverged.
    """
    study = plan.study(folder / "study")
    run_study(study, dataset, layout=layout)
    scored = score_runs(study, HeldOutSettings(plan.noise_std, asked.num_draws), dataset, layout)
    chosen = choice.choose(scored, asked.clean_share)
    card_path = card.write_card(chosen.run.folder)
    report_path = report.write_report(study.folder)
    text = "\n".join([
        *choice_lines(chosen, asked.clean_share, plan.noise_std),
        *expected_lines(chosen.run.folder),
        f"Card: {card_path}", f"Report on all runs: {report_path}",
        f"Predict: jaxrobust predict {chosen.run.folder} IMAGE...",
        f"Export: jaxrobust export {chosen.run.folder}"])
    run_folder.write_facts(folder, "choice", {
        "row": chosen.run.row, "seed": chosen.run.seed, "run": str(chosen.run.folder),
        "scores": chosen.scores, "others": [one._asdict() for one in chosen.others],
        "clean_share": asked.clean_share, "text": text, "provenance": provenance.describe()})
    return text


def score_runs(study: StudyPlan, how: HeldOutSettings, dataset: Dataset, layout: Layout
               ) -> list[choice.Scored]:
    """Scores the runs of a study that did not diverge on the held-out images."""
    scored = []
    for row in study.rows:
        for seed in study.seeds:
            place = run_folder.place_of(study.folder, row, seed)
            if not run_folder.is_done(place):
                continue
            run = load_run(place, run_folder.read_config(place), dataset, layout)
            measure(HELD_OUT, run, how, place, place.name)
            arrays = run_folder.read_arrays(place, HELD_OUT.kind)
            scored.append(choice.Scored(row, seed, place, arrays["clean"], arrays["noisy"]))
    if not scored:
        raise InputError(f"All runs in {study.folder} have diverged. Lower --learning-rate, and "
                         "choose another --out.")
    return scored


def choice_lines(chosen: choice.Choice, clean_share: float, noise_std: float) -> list[str]:
    """Says what was chosen and how sure that is."""
    run = chosen.run
    lines = [
        f"Chosen: {run.row}, seed {run.seed}: {run.folder}",
        f"On {len(run.clean):,} held-out images: {100 * run.clean.mean():.1f} % clean, "
        f"{100 * run.noisy.mean():.1f} % under noise of {255 * noise_std:.3g}/255; score of the "
        f"method ({clean_share:g} clean + {1 - clean_share:g} noisy) "
        f"{100 * chosen.scores[run.row]:.1f}"]
    for one in chosen.others:
        over = "images and trainings" if one.seeds is not None else "images, one training each"
        # Of one training each, who knows what another would do.
        sure = ("beyond chance" if one.clear else "may be chance" if one.seeds is not None else
                "another training may differ")
        lines.append(f"  ahead of {one.row} by {100 * one.difference:.1f} ± {100 * one.half:.1f} "
                     f"points (95 % over {over}): {sure}")
    return lines


def expected_lines(folder: pathlib.Path) -> list[str]:
    """Says what a run gets right of the test images, which had no part in the choice."""
    (run,), = study_of_runs([folder]).runs.values()
    number = run.evaluation["num_images"]
    return [f"Expected on new images, from {number:,} test images: " + ", ".join(
        f"{one.value:.1f} % [{one.low:.1f}–{one.high:.1f}] "
        f"{'clean' if one.condition.lower() == 'clean' else f'under {one.condition}'}"
        for one in accuracy.estimates(run)) + " (95 % intervals)"]
