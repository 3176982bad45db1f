"""Writes the report of a study: tables, figures and one page.

    study folder ─ load_study ─▶ Study ─ tables, summary, figures ─▶ report.html, .md, .csv, .json

Accuracies are fractions in the files of the runs and per cent from here on. Nothing is random
or dated: the same study gives the same bytes.
"""

import base64
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jinja2
import pandas as pd

from jaxrobust.app import run_folder
from jaxrobust.app.config import InputError
from jaxrobust.app.files import make_folder, write_text
from jaxrobust.app.measurements import MEASUREMENTS, curvature, networks
from jaxrobust.app.measurements.robustness import FIGURES
from jaxrobust.app.measurements.runner import sections as sections_of
from jaxrobust.app.report import figures, made
from jaxrobust.app.report.comparison import FEWEST_SEEDS, Difference, warnings_of_classes
from jaxrobust.app.report.frame import (
    Accuracies,
    Number,
    accuracies,
    accuracy_numbers,
    frame,
    published_numbers,
    summary,
    to_csv,
)
from jaxrobust.app.report.page import Section, Table, paragraphs, signed
from jaxrobust.app.report.tables import differences, levels_of, several_seeds
from jaxrobust.app.study.read import Run, Study, check_same_data, load_study, study_of_runs

PEERS = ("both", "stability")
"""The methods that the method "robust" is compared with in words."""


def write_report(folder: pathlib.Path) -> pathlib.Path:
    """Writes the report of a study into its folder; returns the path of ``report.html``.

    Raises:
      InputError: (a ValueError) if the folder holds no study, or no finished run.
    """
    return _write_report(load_study(folder), folder)


def write_report_of_runs(folders: Sequence[pathlib.Path], out: pathlib.Path) -> pathlib.Path:
    """Writes one report of any finished runs; returns the path of ``report.html``.

    Those that differ in nothing but the seed are one row.

    Raises:
      InputError: (a ValueError) if a folder holds no run, none is finished, or two are the same or
        of different data sets.
    """
    study = study_of_runs(folders, together=True)
    if not study.all_finished():
        raise InputError(f"Expected a finished run in {', '.join(map(str, folders))}, found none.")
    make_folder(out)
    return _write_report(study, out)


def _write_report(study: Study, folder: pathlib.Path) -> pathlib.Path:
    sections = [*sections_of(study, MEASUREMENTS), Section(
        "provenance", "How these numbers were made", "", made.tables(study))]
    save_pictures(sections, folder / "figures")
    words, numbers = _words(study), numbers_of(study)
    write_text(folder / "report.md", markdown_of(study, words, sections))
    write_text(folder / "report.csv", to_csv(numbers))
    write_text(folder / "report.json", json.dumps(
        _json(study, words, numbers), indent=2, allow_nan=False, ensure_ascii=False) + "\n")
    write_text(folder / "report.html", html_of(study, words, sections, folder / "figures"))
    return folder / "report.html"


def save_pictures(sections: Iterable[Section], folder: pathlib.Path) -> None:
    """Writes the figures of sections into a folder."""
    make_folder(folder)
    for section in sections:
        for picture in section.pictures:
            figures.save(picture.figure, folder / picture.name)


def write_figures(
    folders: Sequence[pathlib.Path], out: pathlib.Path | None, name: str | None = None
) -> list[pathlib.Path]:
    """Shows what the command ``figures`` measured of the runs in these folders.

    Rewrites the report of each study that runs belong to. Runs of no study are shown together in
    ``out``, by default ``figures`` or ``figures-NAME`` beside the first: PNG and SVG files, and
    ``figures.md`` with the tables and how to read them. With a ``name``, shows all runs so, with
    the measurements of that name.

    Returns:
      Paths of the reports and of ``figures.md``.
    """
    studies, alone = group_by_study(folders) if name is None else ([], folders)
    written = [write_report(folder) for folder in studies]
    if alone:
        out = out or alone[0].parent / ("figures" if name is None else f"figures-{name}")
        sections = sections_of(study_of_runs(alone, name=name), FIGURES)
        save_pictures(sections, out)
        write_text(out / "figures.md", "\n\n".join(
            part for section in sections for part in section_markdown(section, "")) + "\n")
        written.append(out / "figures.md")
    return written


def group_by_study(folders: Sequence[pathlib.Path]
                   ) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """Returns the folders of the studies that runs belong to, and the runs that belong to none.

    Raises:
      InputError: (a ValueError) if a study has no finished run, or the runs that belong to none
        are of different data sets.
    """
    studies: dict[pathlib.Path, set[str]] = {}
    alone = []
    folders = [folder.resolve() for folder in folders]
    for folder in folders:
        parent = folder.parent
        if parent not in studies and run_folder.read_facts(parent, "study"):
            studies[parent] = {run.folder.name for runs in load_study(parent).runs.values()
                               for run in runs}
        if folder.name not in studies.get(parent, ()):
            alone.append(folder)
    check_same_data(alone)
    members = {folder.parent for folder in folders if folder not in alone}
    return [parent for parent in studies if parent in members], alone


# --- Numbers ---------------------------------------------------------------------------------


def numbers_of(study: Study, kinds: Iterable[Callable[[Run], Iterable[Number]]] | None = None
               ) -> pd.DataFrame:
    """Collects the report's numbers of these kinds, or of all, with the paper's accuracies beside
    those of the runs, and the correlations with their curvature."""
    if kinds is None:
        kinds = [kind for measurement in MEASUREMENTS for kind in measurement.numbers]
    parts = [frame(study, *kinds)]
    if accuracy_numbers in kinds:
        parts.append(published_numbers(study))
        if curvature.numbers in kinds:
            parts.append(networks.numbers(study))
    return pd.concat(parts, ignore_index=True)


def best_rows(study: Study) -> list[str]:
    """Names the best row on clean images and at the strongest noise, a sentence each."""
    by_row = accuracies(study)
    levels = levels_of(by_row)
    sentences = []
    if levels[0] == "clean":
        sentences.append(f"Best on clean images: {_best(study, by_row, 'clean')}.")
    if levels[-1] != "clean":
        sentences.append(f"Best at the strongest noise ({levels[-1]}): "
                         f"{_best(study, by_row, levels[-1])}.")
    return sentences


def comparisons(study: Study) -> list[str]:
    """Compares each row of the method "robust" with each of its peers, in words."""
    by_row = accuracies(study)
    found = {peer: differences(by_row, peer, levels_of(by_row))
             for peer in study.labels if study.methods[peer] in PEERS}
    return [_comparison(study.labels[row], study.labels[peer], ones[row])
            for row in study.labels if study.methods[row] == "robust"
            for peer, ones in found.items() if row in ones]


def _best(study: Study, by_row: Accuracies, level: str) -> str:
    means = {row: round(values[level].mean, 2) for row, values in by_row.items() if level in values}
    best = max(means.values())
    names = " and ".join(f"“{study.labels[row]}”" for row in means if means[row] == best)
    return f"{names}, with {best:.2f} %"


def _comparison(label: str, peer_label: str, differences: dict[str, Difference]) -> str:
    """Says at which levels a row is above another, level with it, or below."""
    known = all(found.seeds is not None for found in differences.values())
    words = (("clearly better", "no clear difference", "clearly worse") if known else
             ("higher", "equal", "lower"))
    where: dict[str, list[str]] = {word: [] for word in words}
    for level, found in differences.items():
        told = found.clear if known else found.points != 0
        index = 1 if not told else 0 if found.points > 0 else 2
        where[words[index]].append(f"{level} ({signed(found.points)} ± {found.half:.2f})")
    parts = [f"{word} at {len(levels)} of {len(differences)} levels: {', '.join(levels)}"
             for word, levels in where.items() if levels]
    end = "." if known else (f"; ± of the test images alone, for with fewer than {FEWEST_SEEDS} "
                             "seeds of a row the spread over trainings is unknown.")
    return f"“{label}” against “{peer_label}”, in percentage points: {'; '.join(parts)}{end}"


def missing_runs(study: Study) -> list[str]:
    """Lists the runs without an evaluation, with the progress of each."""
    return [f"{study.labels[row]}, seed {run.seed}: {_progress(run)}"
            for row in study.labels for run in study.runs[row] if not run.evaluation]


def _progress(run: Run) -> str:
    if not run.config or not (run.epochs or run.diverged):
        return "not trained"
    if run.diverged:
        return f"diverged in epoch {run.diverged} of {run.config.epochs}"
    done = run.epochs[-1]["epoch"]
    if done < run.config.epochs:
        return f"{done} of {run.config.epochs} epochs trained"
    return "trained, not evaluated"


def chosen_on_test(study: Study) -> list[str]:
    """Lists the labels of the rows whose epoch was chosen on the test images."""
    return [study.labels[row] for row in study.labels
            if any(run.evaluation["selected_on"] == "test" for run in study.finished(row))]


# --- Words -----------------------------------------------------------------------------------


def lead(study: Study) -> str:
    """Writes the opening paragraph: which rows are best, and how they are compared."""
    if several_seeds(study):
        basis = ("Below, a difference between the means over the training seeds is called clear "
                 "if its 95 % interval (±), over trainings and test images, excludes 0; of "
                 "many such differences one in twenty does so by chance.")
    else:
        basis = ("Each method was trained once, so the spread over trainings is unknown: a small "
                 "difference between rows may be chance.")
    return " ".join([*best_rows(study), *warnings_of_classes(study), basis])


# --- Files -----------------------------------------------------------------------------------


class Words(NamedTuple):
    """The words of a report that belong to no section."""

    lead: str
    comparisons: list[str]
    missing: list[str]  # runs
    warning: str


def _words(study: Study) -> Words:
    rows = chosen_on_test(study)
    names = ", ".join(rows) if len(rows) < len(study.labels) else "all rows"
    warning = ("Warning: the epoch was chosen on the test set, so the test set has leaked into the "
               f"choice and these accuracies are too high: {names}.")
    return Words(lead(study), comparisons(study), missing_runs(study), warning if rows else "")


def html_of(study: Study, words: Words, sections: Sequence[Section], folder: pathlib.Path) -> str:
    """Renders the page as one self-contained text, with the pictures in ``folder``."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True)
    images = {picture.name: "data:image/svg+xml;base64," + base64.b64encode(
        (folder / f"{picture.name}.svg").read_bytes()).decode("ascii")
        for section in sections for picture in section.pictures}
    return environment.get_template("report.html.jinja").render(
        study=study, note=paragraphs(study.note), sections=sections, images=images,
        **words._asdict())


def markdown_of(study: Study, words: Words, sections: Sequence[Section],
                folder: str = "figures/") -> str:
    """Renders the same content in Markdown, with links to the figures in ``folder``."""
    parts = [f"# {_md(study.title)}", *map(_md, paragraphs(study.note)), "## Summary"]
    if words.warning:
        parts.append(f"> **{_md(words.warning)}**")
    if words.missing:
        parts += ["**Missing runs:**", _items(words.missing)]
    parts.append(_md(words.lead))
    if words.comparisons:
        parts.append(_items(words.comparisons))
    for section in sections:
        parts += section_markdown(section, folder)
    return "\n\n".join(parts) + "\n"


def _items(texts: Iterable[str]) -> str:
    return "\n".join(f"- {_md(text)}" for text in texts)


def section_markdown(section: Section, folder: str) -> list[str]:
    """Renders a section whose figures are in ``folder`` as paragraphs of Markdown."""
    return [f"## {_md(section.heading)}", *([_md(section.lead)] if section.lead else []),
            *map(_md_table, section.tables),
            *(f"![{_md(picture.alt)}]({folder}{picture.name}.png)\n\n"
              f"**{_md(picture.caption)}** {_md(picture.note)}" for picture in section.pictures)]


def paragraph_markdown(text: str) -> str:
    """Renders plain text as paragraphs of Markdown."""
    return "\n\n".join(map(_md, paragraphs(text)))


def _md_table(table: Table) -> str:
    align = "---:" if table.numeric else "---"
    lines = [list(map(_md, table.columns)), ["---", *[align] * (len(table.columns) - 1)]]
    for row in table.rows:
        lines.append([f"*{_md(row.head)}*" if row.muted else _md(row.head), *(
            f"**{_md(cell.text)}**" if cell.bold else _md(cell.text) for cell in row.cells)])
    note = f"\n\n{_md(table.note)}" if table.note else ""
    details = f" {_md(table.details)}" if table.details else ""
    return f"**{_md(table.caption)}**{details}\n\n" + "\n".join(
        f"| {' | '.join(line)} |" for line in lines) + note


def _md(text: str) -> str:
    """Escapes everything in a plain text that Markdown or HTML would take as markup."""
    return re.sub(r"([\\`*_\[\]|<>&#~])", r"\\\1", " ".join(text.split()))


def _json(study: Study, words: Words, numbers: pd.DataFrame) -> dict:
    """Returns the report's words and, by row, its numbers."""
    return {
        "name": study.name,
        "title": study.title,
        "summary": [words.lead, *words.comparisons],
        "missing": words.missing,
        "epoch_chosen_on_test": chosen_on_test(study),
        "rows": [{"row": row, "label": label, "method": study.methods[row],
                  "seeds": [run.seed for run in study.finished(row)]}
                 for row, label in study.labels.items()],
        "numbers": summary(numbers),
    }
