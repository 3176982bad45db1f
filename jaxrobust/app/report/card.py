"""Writes the robustness card of a model: one page to publish beside it.

    results of one folder ─ study_of_runs ─▶ Study ─ sections ─▶ card.html, .md, .csv
"""

import dataclasses
import pathlib
from collections.abc import Iterator

import pandas as pd

from jaxrobust.app import run_folder
from jaxrobust.app.files import write_text
from jaxrobust.app.measurements import MEASUREMENTS
from jaxrobust.app.measurements.estimates import Estimate, with_interval
from jaxrobust.app.measurements.runner import Measurement
from jaxrobust.app.report import report
from jaxrobust.app.report.frame import to_csv
from jaxrobust.app.report.page import Section, Table, text_row
from jaxrobust.app.study.read import Run, study_of_runs

HEADLINES = 4
"""Numbers of a measurement in the card's first table; the sections have them all."""


def write_card(folder: pathlib.Path, name: str | None = None) -> pathlib.Path:
    """Writes the card of the model whose results are in a folder; returns the path of the page.

    With a ``name``, of the measurements of that name.
    """
    study = study_of_runs([folder], name=name)
    (row, (run,)), = study.runs.items()
    suite = [measurement for measurement in MEASUREMENTS if measurement.suite]
    measured = [one for one in suite if run.facts(one.kind)]
    sections = [
        Section("model", "The model", "", (_model_table(run),)),
        Section("numbers", "Numbers", "", (_summary(run, measured), _how(run, measured))),
        *(section for one in measured if one.card and (section := one.section(study)))]
    stem = "card" if name is None else f"card-{name}"
    pictures = folder / f"{stem}-figures"
    report.save_pictures(sections, pictures)
    missing = [one.suite for one in suite if one not in measured]
    words = report.Words(
        "How this model fares under noise, corruptions, attacks and strange images, as far as it "
        "was measured. Every number holds for the images, budgets and seeds stated beside it.",
        [f"Not measured: {', '.join(missing)}."] if missing else [], [], "")
    titled = dataclasses.replace(study, title=f"Robustness card: {study.labels[row]}")
    write_text(folder / f"{stem}.csv", to_csv(_table(run, measured)))
    write_text(folder / f"{stem}.md",
               report.markdown_of(titled, words, sections, f"{pictures.name}/"))
    write_text(folder / f"{stem}.html", report.html_of(titled, words, sections, pictures))
    return folder / f"{stem}.html"


def _model_table(run: Run) -> Table:
    facts = run_folder.read_facts(run.folder, "model")
    if facts is None:
        config = run.config
        facts = {
            "Trained by": f"jaxrobust, method {config.method}", "Network": config.model,
            "Data": config.dataset, "Training seed": run.seed, "Epochs": config.epochs,
            "Training noise, standard deviation in pixels of [0, 1]": f"{config.noise_std:g}",
            "Epoch chosen on": {
                "validation": "held-out validation images", "last": "none: the last one",
                "test": "the test images, which leaks"}[config.select],
            "Command": run.provenance.get("command", "–"),
            "Commit": run.provenance.get("commit", "–")}
    else:
        facts = {"Model": facts["model"], "SHA-256 of its file": facts["sha256"],
                 "Data": facts["dataset"], "Classes": ", ".join(facts["class_names"]),
                 "Trained by": "others: training data and seed are not known here"}
    return Table("What was measured.", ("What", "Value"),
                 tuple(text_row(name, [str(value)]) for name, value in facts.items()),
                 numeric=False)


def _estimates(run: Run, measured: list[Measurement]
               ) -> Iterator[tuple[Measurement, list[Estimate]]]:
    for measurement in measured:
        if measurement.estimates is not None:
            yield measurement, list(measurement.estimates(run))


def _summary(run: Run, measured: list[Measurement]) -> Table:
    rows = [text_row(one.measurement, (one.condition, _value(one),
                                       one.interval or "–"))
            for _, ones in _estimates(run, measured) for one in ones[:HEADLINES]]
    return Table(
        "Main numbers.", ("Measured", "Condition", "Value", "Interval"), tuple(rows),
        note="How to read: the first numbers of each measurement, with their intervals in "
        "brackets. All are in the sections below and, as one table, in the CSV file beside this "
        "page.", numeric=False)


def _value(one: Estimate) -> str:
    if one.unit in ("%", ""):
        return f"{with_interval(one, 2)} %" if one.unit else with_interval(one, 4)
    return f"{one.value:.3g} [{one.low:.3g}–{one.high:.3g}] {one.unit}"


def _how(run: Run, measured: list[Measurement]) -> Table:
    rows = []
    for measurement in measured:
        facts = run.facts(measurement.kind)
        made = facts.get("provenance", {})
        rows.append(text_row(measurement.suite, (
            _subset(facts), ", ".join(f"{key} {_shown(value)}" for key, value
                                      in facts.get("settings", {}).items()),
            *(made.get(key, "–") for key in ("command", "commit", "hardware", "started")))))
    return Table("How each was measured.", ("Suite", "Images", "Settings", "Command", "Commit",
                                            "Hardware", "Started"), tuple(rows),
                 note="How to read: random draws and subsets are from seed 0.", numeric=False)


def _shown(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _subset(facts: dict) -> str:
    return facts.get("subset") or f"{facts.get('num_images', '?'):,} test images"


def _table(run: Run, measured: list[Measurement]) -> pd.DataFrame:
    """One line a number, with its interval, the subset of images, and the training seed."""
    seed = None if run.config is None else run.seed
    return pd.DataFrame(
        [(measurement.suite, *one, _subset(run.facts(measurement.kind)), seed)
         for measurement, ones in _estimates(run, measured) for one in ones],
        columns=["suite", *Estimate._fields, "subset", "seed"]).astype({"seed": "Int64"})
