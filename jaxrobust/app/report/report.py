"""The report of a comparison: reads a study's runs, writes tables, figures and one page.

    study folder ─ load_study ─▶ Study ─ tables, summary, figures ─▶ report.html, .md, .csv, .json

Accuracies are fractions in the files of the runs and per cent from here on. Nothing is random
or dated: the same study gives the same bytes.
"""

import base64
import csv
import dataclasses
import io
import json
import math
import pathlib
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jinja2
import numpy as np

from jaxrobust.app.config import InputError
from jaxrobust.app.files import make_folder, write_text
from jaxrobust.app.measurements import (
    networks,
    noise_counts,
    sharpness,
    steps,
)
from jaxrobust.app.measurements.networks import CURVATURES
from jaxrobust.app.measurements.theory import section as theory_section
from jaxrobust.app.recipe import METHOD_LABELS
from jaxrobust.app.report import figures
from jaxrobust.app.report.comparison import (
    FEWEST_SEEDS,
    Accuracy,
    Difference,
    accuracies,
    classes_of,
    difference,
    perturbed_accuracies,
    warnings_of_classes,
)
from jaxrobust.app.report.page import (
    Cell,
    Picture,
    Section,
    Table,
    TableRow,
    count,
    duration,
    level_name,
    listed,
    paragraphs,
    signed,
    significant,
    with_spread,
)
from jaxrobust.app.run_folder import named_results
from jaxrobust.app.study import Run, Study, check_same_data, load_study, study_of_runs

PEERS = ("both", "stability")
"""The methods that the method "robust" is compared with in words."""

PAPER_DRAWS = 10
"""Noise draws behind a number of the paper."""


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
    sections = _sections(study)
    pictures = [picture for section in sections for picture in section.pictures]
    make_folder(folder / "figures")
    for picture in pictures:
        figures.save(picture.figure, folder / "figures" / picture.name)
    images = {picture.name: _data_uri(folder / "figures" / f"{picture.name}.svg")
              for picture in pictures}
    write_text(folder / "report.md", markdown(study, sections))
    write_text(folder / "report.csv", accuracy_csv(study))
    write_text(folder / "report.json", json.dumps(
        summary_json(study), indent=2, allow_nan=False, ensure_ascii=False) + "\n")
    page = folder / "report.html"
    write_text(page, html(study, sections, images))
    return page


def write_figures(
    folders: Sequence[pathlib.Path], out: pathlib.Path | None, name: str | None = None
) -> list[pathlib.Path]:
    """Shows what the command ``figures`` measured of the runs in these folders.

    The report of each study that runs belong to is written anew. Runs of no study are shown
    together: PNG and SVG files, and ``figures.md`` with the tables and how to read them.

    Args:
      folders: of runs.
      out: where the figures of runs of no study go; ``figures`` beside the first if None, or
        ``figures-NAME``.
      name: of the measurements to be shown, which no study's report shows; None for those without.

    Returns:
      Paths of the reports and of ``figures.md``.
    """
    studies, alone = group_by_study(folders) if name is None else ([], folders)
    written = [write_report(folder) for folder in studies]
    if alone:
        out = out or alone[0].parent / ("figures" if name is None else f"figures-{name}")
        sections = noise_counts.sections(study_of_runs(alone, name=name))
        make_folder(out)
        for section in sections:
            for picture in section.pictures:
                figures.save(picture.figure, out / picture.name)
        write_text(out / "figures.md", "\n\n".join(
            part for section in sections for part in section_markdown(section, "")) + "\n")
        written.append(out / "figures.md")
    return written


def group_by_study(folders: Sequence[pathlib.Path]
                   ) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """The folders of the studies that these runs belong to, and the runs that belong to none.

    Raises:
      InputError: (a ValueError) if a study has no finished run, or the runs that belong to none
        are of different data sets.
    """
    studies: dict[pathlib.Path, set[str]] = {}
    alone = []
    folders = [folder.resolve() for folder in folders]
    for folder in folders:
        parent = folder.parent
        if parent not in studies and (parent / "study.json").is_file():
            studies[parent] = {run.folder.name for runs in load_study(parent).runs.values()
                               for run in runs}
        if folder.name not in studies.get(parent, ()):
            alone.append(folder)
    check_same_data(alone)
    members = {folder.parent for folder in folders if folder not in alone}
    return [parent for parent in studies if parent in members], alone


# --- Numbers ---------------------------------------------------------------------------------


def levels_of(study: Study) -> list[float]:
    """All noise levels of the finished runs, in units of 1/255, increasing."""
    return sorted({level for row in study.labels for level in accuracies(study.finished(row))})


def several_seeds(study: Study) -> bool:
    """Whether the ± of the tables is the spread over trainings, not over noise draws."""
    return any(len(study.finished(row)) > 1 for row in study.labels)


def best_rows(study: Study) -> list[str]:
    """A sentence each on the best row for clean images and at the strongest noise."""
    levels = levels_of(study)
    sentences = []
    if levels[0] == 0:
        sentences.append(f"Best on clean images: {_best(study, 0)}.")
    if levels[-1] > 0:
        sentences.append(f"Best at the strongest noise ({level_name(levels[-1])}): "
                         f"{_best(study, levels[-1])}.")
    return sentences


def comparisons(study: Study) -> list[str]:
    """A sentence or two on each row of the method "robust" against each of its peers."""
    by_row = {row: accuracies(study.finished(row)) for row in study.labels}
    return [_comparison(study.labels[row], study.labels[peer], by_row[row], by_row[peer])
            for row in study.labels if study.methods[row] == "robust" and by_row[row]
            for peer in study.labels if study.methods[peer] in PEERS and by_row[peer]]


def _best(study: Study, level: float) -> str:
    by_row = {row: accuracies(study.finished(row)) for row in study.labels}
    means = {row: round(values[level].mean, 2) for row, values in by_row.items() if level in values}
    best = max(means.values())
    names = " and ".join(f"“{study.labels[row]}”" for row in means if means[row] == best)
    return f"{names}, with {best:.2f} %"


def _comparison(label: str, peer_label: str, own: dict[float, Accuracy],
                peer: dict[float, Accuracy]) -> str:
    """In words, at which levels a row is above another, level with it, or below."""
    differences = {level: difference(own[level], peer[level]) for level in own if level in peer}
    known = all(found.seeds is not None for found in differences.values())
    words = (("clearly better", "no clear difference", "clearly worse") if known else
             ("higher", "equal", "lower"))
    where = {word: [] for word in words}
    for level, found in differences.items():
        told = found.clear if known else found.points != 0
        index = 1 if not told else 0 if found.points > 0 else 2
        where[words[index]].append(
            f"{level_name(level).lower()} ({signed(found.points)} ± {found.half:.2f})")
    parts = [f"{word} at {len(levels)} of {len(differences)} levels: {', '.join(levels)}"
             for word, levels in where.items() if levels]
    end = "." if known else (f"; ± of the test images alone, for with fewer than {FEWEST_SEEDS} "
                             "seeds of a row the spread over trainings is unknown.")
    return f"“{label}” against “{peer_label}”, in percentage points: {'; '.join(parts)}{end}"


def missing_runs(study: Study) -> list[str]:
    """The runs without an evaluation, and how far each has come."""
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
    """Labels of the rows whose epoch was chosen on the test images, which leaks them."""
    return [study.labels[row] for row in study.labels
            if any(run.evaluation["selected_on"] == "test" for run in study.finished(row))]


# --- Words -----------------------------------------------------------------------------------


def lead(study: Study) -> str:
    """The summary's opening paragraph: what is best, and what the comparisons rest on."""
    if several_seeds(study):
        basis = ("Below, a difference between the means over the training seeds is called clear "
                 "if its 95 % interval (±), over trainings and test images, does not hold 0; of "
                 "many such differences one in twenty does so by chance.")
    else:
        basis = ("Each method was trained once, so the spread over trainings is unknown: a small "
                 "difference between rows may be chance.")
    return " ".join([*best_rows(study), *warnings_of_classes(study), basis])


# --- Tables ----------------------------------------------------------------------------------


def accuracy_table(study: Study) -> Table:
    """Rows are methods, columns noise levels; the paper's row below ours where there is one."""
    levels = levels_of(study)
    by_row = {row: accuracies(study.finished(row)) for row in study.labels}
    best = {level: max(round(values[level].mean, 2) for values in by_row.values()
                       if level in values) for level in levels}
    rows = []
    for row, values in by_row.items():
        absent = "diverged" if any(run.diverged for run in study.runs[row]) else "–"
        cells = [_accuracy_cell(values.get(level), best[level], several_seeds(study), absent)
                 for level in levels]
        time = Cell(_mean_duration(study.finished(row)))
        rows.append(TableRow(study.labels[row], (*cells, time)))
        numbers = paper_numbers(study, row)
        if any(level in numbers for level in levels):
            # None for the training time.
            rows += _paper_rows(
                METHOD_LABELS.get(study.paper_rows[row], study.labels[row]),
                [*map(values.get, levels), None], [*map(numbers.get, levels), None])
    rows += _commonest_row(study, len(levels), 1)
    return Table("Accuracy in %, clean and under Gaussian noise.",
                 ("Method", *map(level_name, levels), "Training time"), tuple(rows),
                 _accuracy_details(study), _accuracy_note(study))


def _commonest_row(study: Study, num_cells: int, num_others: int = 0) -> list[TableRow]:
    """The accuracy of always saying the commonest class, below the rows of a table; none if the
    classes of the test images are not known."""
    classes = classes_of(study.all_finished())
    if classes is None:
        return []
    name, share = classes.commonest
    cells = [Cell(f"{share:.2f}")] * num_cells + [Cell("–")] * num_others
    return [TableRow(f"always “{name}”, the commonest class", tuple(cells), muted=True)]


def balanced_table(study: Study) -> Table | None:
    """As :func:`accuracy_table`, every class counting the same; None where they are not known."""
    levels = levels_of(study)
    by_row = {row: accuracies(study.finished(row)) for row in study.labels}
    classes = classes_of(study.all_finished())
    if classes is None:
        return None
    rows = [TableRow(study.labels[row], tuple(
        Cell(f"{values[level].balanced:.2f}" if level in values else "–") for level in levels))
        for row, values in by_row.items() if values]
    shown = sum(number > 0 for number in classes.counts)
    return Table(
        "Balanced accuracy in %: the mean of the accuracies on the images of each class.",
        ("Method", *map(level_name, levels)), tuple(rows),
        note=f"How to read: always saying one class gives {100 / shown:.2f} % here, however common "
        "it is. Means over the noise draws and training seeds.", folded=not classes.uneven)


def class_table(study: Study) -> Table | None:
    """Accuracy on the images of each class, clean and at the strongest noise; None where the
    classes are not known."""
    levels = levels_of(study)
    classes = classes_of(study.all_finished())
    if classes is None:
        return None
    shown = {row: accuracies(study.finished(row)) for row in study.labels if study.finished(row)}
    columns = [(row, level) for row in shown for level in dict.fromkeys((levels[0], levels[-1]))]
    rows = []
    for index, (name, number) in enumerate(zip(classes.names, classes.counts, strict=True)):
        values = [shown[row][level].by_class[index] if level in shown[row] else None
                  for row, level in columns]
        rows.append(TableRow(f"{name} ({count(number)} images)", tuple(
            Cell("–" if value is None else f"{value:.1f}") for value in values)))
    return Table(
        "Accuracy in % by class.",
        ("Class", *(f"{study.labels[row]}: {level_name(level).lower()}"
                    for row, level in columns)), tuple(rows),
        note="How to read: of the test images of each class, the share that is classified "
        "correctly. Means over the noise draws and training seeds. With few images of a class one "
        "image more or less moves its number far.", folded=not classes.uneven)


def difference_table(study: Study, reference: str) -> Table | None:
    """Each other row's accuracies less those of the row ``reference``; None without that row."""
    levels = levels_of(study)
    found = _differences({row: accuracies(study.finished(row)) for row in study.labels}, reference)
    if not found:
        return None
    return Table(f"Accuracy less that of “{study.labels[reference]}”, in percentage points.",
                 ("Method", *map(level_name, levels)),
                 tuple(TableRow(study.labels[row], tuple(
                     _difference_cell(ones[level]) if level in ones else Cell("–")
                     for level in levels)) for row, ones in found.items()),
                 note=_difference_note(study, _all(found)))


def perturbation_difference_table(study: Study, reference: str) -> Table | None:
    """The same of :func:`perturbation_table`; None without perturbations of that row."""
    by_row = {row: perturbed_accuracies(study.finished(row)) for row in study.labels}
    found = _differences(by_row, reference)
    if not found:
        return None
    return Table(f"Accuracy under other perturbations less that of “{study.labels[reference]}”, "
                 "in percentage points.",
                 ("Perturbation", *(study.labels[row] for row in found)),
                 tuple(TableRow(text, tuple(
                     _difference_cell(ones[text]) if text in ones else Cell("–")
                     for ones in found.values())) for text in by_row[reference]),
                 note=_difference_note(study, _all(found)))


def _differences(by_row: dict[str, dict[Any, Accuracy]], reference: str,
                 ) -> dict[str, dict[Any, Difference]]:
    """By row and test, of those that the row and the reference share; empty without reference."""
    peer = by_row[reference]
    return {row: {test: difference(own[test], peer[test]) for test in own if test in peer}
            for row, own in by_row.items() if row != reference and own and peer}


def _all(found: dict[str, dict[Any, Difference]]) -> list[Difference]:
    return [one for ones in found.values() for one in ones.values()]


def _difference_cell(found: Difference) -> Cell:
    return Cell(difference_text(found), bold=found.beyond_seeds)


def difference_text(found: Difference) -> str:
    """The difference with its sign, and half of its interval over trainings if it has one."""
    return signed(found.points) + ("" if found.seeds is None else f" ± {found.seeds:.2f}")


def _difference_note(study: Study, found: Iterable[Difference]) -> str:
    images = max(one.images for one in found)
    spread = ("; ± half of the 95 % interval over trainings, on these test images (Student’s t, "
              "from the seeds of the two rows). Bold: the interval does not hold 0. With many "
              "differences one in twenty does so by chance" if several_seeds(study) else
              "; each was trained once, so that the spread over trainings is unknown")
    return (f"How to read: above 0 is better{spread}. Other test images may move a difference by "
            f"up to ± {images:.2f} (95 %, as if the two rows were tested on different ones).")


def perturbation_table(study: Study) -> Table | None:
    """Rows are perturbations, columns methods, as in the paper's Table 4; None without any."""
    by_row = {row: perturbed_accuracies(study.finished(row)) for row in study.labels}
    shown = [row for row in study.labels if by_row[row]]
    if not shown:
        return None
    rows = []
    for text in dict.fromkeys(text for row in shown for text in by_row[row]):
        best = max(round(by_row[row][text].mean, 2) for row in shown if text in by_row[row])
        key = study.paper_perturbations.get(text)
        rows.append(TableRow(f"{key}: {text}" if key else text, tuple(
            _accuracy_cell(by_row[row].get(text), best, several_seeds(study)) for row in shown)))
        if key:
            theirs = study.paper_perturbed
            numbers = dict(zip(theirs.methods, theirs.rows[key], strict=True))
            rows += _paper_rows(key, [by_row[row].get(text) for row in shown],
                                [numbers.get(study.paper_rows.get(row)) for row in shown])
    rows += _commonest_row(study, len(shown))
    note = ("How to read: NAME(ARGUMENTS) as in the documentation of perturbations; those joined "
            "by + are applied from left to right. Higher is better; bold: the best of the line.")
    if study.paper_perturbations:
        note += (f" Rows in grey: the paper’s {study.paper_perturbed.title}, on its own images, "
                 "and ours less the paper’s.")
    return Table("Accuracy in % under other perturbations.",
                 ("Perturbation", *(study.labels[row] for row in shown)), tuple(rows),
                 _accuracy_details(study), note)


def _paper_rows(name: str, ours: Sequence[Accuracy | None],
                theirs: Sequence[tuple[float, float | None] | None]) -> list[TableRow]:
    """The paper's (mean, std) below a row of ours, and ours less the paper's."""
    papers = ["–" if number is None else with_spread(*number) for number in theirs]
    differences = ["–" if accuracy is None or number is None else signed(accuracy.mean - number[0])
                   for accuracy, number in zip(ours, theirs, strict=True)]
    return [TableRow(head, tuple(map(Cell, cells)), muted=True)
            for head, cells in ((f"paper: {name}", papers), ("difference", differences))]


def _accuracy_cell(accuracy: Accuracy | None, best: float, seeds: bool, absent: str = "–") -> Cell:
    if accuracy is None:
        return Cell(absent)
    std = accuracy.std_over_seeds if seeds else accuracy.std_over_draws
    return Cell(with_spread(accuracy.mean, std), bold=round(accuracy.mean, 2) == best)


def _mean_duration(runs: Iterable[Run]) -> str:
    # A run that is not done has no training time yet.
    seconds = [run.provenance["seconds"] for run in runs if "seconds" in run.provenance]
    return duration(statistics.fmean(seconds)) if seconds else "–"


def paper_numbers(study: Study, row: str) -> dict[float, tuple[float, float | None]]:
    """The paper's (mean, std) in per cent by noise level, for a row of ours; empty if none."""
    if study.paper is None or row not in study.paper_rows:
        return {}
    return dict(zip(study.paper.levels, study.paper.rows[study.paper_rows[row]], strict=True))


def _accuracy_details(study: Study) -> str:
    evaluations = [run.evaluation for run in study.all_finished()]
    text = (f"{listed(count(e['num_images']) for e in evaluations)} "
            f"{listed(e['split'] for e in evaluations)} images; "
            f"{listed(e['num_draws'] for e in evaluations)} draws of the noise at each level; "
            f"training seeds {listed(run.seed for run in study.all_finished())}. ")
    if several_seeds(study):
        text += ("Mean over the training seeds of the mean over the noise draws, ± standard "
                 "deviation over the training seeds. ")
    else:
        text += ("One training seed: mean ± standard deviation over the noise draws, as in the "
                 "paper; the spread over trainings is unknown. ")
    errors = [one.error_of_images for row in study.labels
              for by_test in (accuracies, perturbed_accuracies)
              for one in by_test(study.finished(row)).values()]
    text += ("The choice of test images adds a standard error of "
             f"{' to '.join(dict.fromkeys(f'{one:.2f}' for one in (min(errors), max(errors))))} "
             "points to each accuracy. ")
    return text + _selection_sentence(study)


def _selection_sentence(study: Study) -> str:
    words = {
        "validation": "the best on held-out validation images",
        "last": "the last",
        "test": "the best on the test images themselves (this leaks)",
    }
    used = sorted({run.evaluation["selected_on"] for run in study.all_finished()})
    return f"Epoch kept: {', or '.join(words[name] for name in used)}."


def _accuracy_note(study: Study) -> str:
    text = ("How to read: columns are the standard deviation of the noise added to the test "
            "images, in units of 1/255 of the pixel range; higher is better. Bold: the best of "
            "our rows in the column.")
    if several_seeds(study):
        counts = {study.labels[row]: len(study.finished(row)) for row in study.labels}
        fewer = [f"{label} ({count})" for label, count in counts.items()
                 if 0 < count < max(counts.values())]
        text += " Spread over the noise draws: in report.csv."
        if fewer:
            text += f" Fewer seeds finished in: {', '.join(fewer)}; no ± for one seed."
    if any(paper_numbers(study, row) for row in study.labels):
        text += (f" Rows in grey: the paper’s {study.paper.title}, ± standard deviation over "
                 f"{PAPER_DRAWS} noise draws, and ours less the paper’s.")
    return text + " Training time: mean over the seeds."


def curvature_table(study: Study) -> Table:
    """Medians and means of the curvatures over the images, by row."""
    rows, measures = [], _measures(study)
    for row, runs in _curvature_runs(study).items():
        cells = [Cell(_over_seeds([_finite_statistic(statistic, run.curvature[key])
                                   for run in runs]))
                 for key in measures for statistic in (np.median, np.mean)]
        hidden = [str(_not_positive(runs, key)) for key in measures]
        rows.append(TableRow(study.labels[row], (*cells, Cell(" / ".join(hidden)))))
    image_counts = listed(run.curvature["num_images"]
                          for runs in _curvature_runs(study).values() for run in runs)
    return Table(
        "Curvature of the softmax loss in input space.",
        ("Method", *(head for name in measures.values() for head in (f"{name}: median", "mean")),
         "Zero or less"), tuple(rows),
        f"All of the {image_counts} test images of each run, not only the lowest 90 %.",
        "How to read: lower is flatter. Unit: 1/pixel⁴ (the loss is in nats), with pixel values "
        "in [0, 1]. Median or mean over the images; with several seeds the mean over the seeds "
        "[lowest–highest seed]. Last column: number of values that a logarithmic axis cannot "
        f"show (zero, negative or not finite), {' / '.join(measures.values()).lower()}.")


def _measures(study: Study) -> dict[str, str]:
    """Those of CURVATURES that every run has."""
    return {key: name for key, name in CURVATURES.items()
            if all(key in run.curvature
                   for runs in _curvature_runs(study).values() for run in runs)}


def _finite_statistic(statistic: Callable, values: np.ndarray) -> float:
    finite = values[np.isfinite(values)].astype(np.float64)
    return float(statistic(finite)) if len(finite) else math.nan


def _over_seeds(values: Sequence[float]) -> str:
    text = significant(statistics.fmean(values))
    return (text if len(values) == 1 else
            f"{text} [{significant(min(values))}–{significant(max(values))}]")


def _not_positive(runs: Sequence[Run], key: str) -> int:
    return sum(int((~(np.isfinite(run.curvature[key]) & (run.curvature[key] > 0))).sum())
               for run in runs)


def _curvature_runs(study: Study) -> dict[str, list[Run]]:
    found = {row: [run for run in runs if run.curvature] for row, runs in study.runs.items()}
    return {row: runs for row, runs in found.items() if runs}


def _feature_runs(study: Study) -> dict[str, Run]:
    """The first seed's run with features, by row."""
    found = {row: [run for run in runs if run.features] for row, runs in study.runs.items()}
    return {row: runs[0] for row, runs in found.items() if runs}


def run_table(study: Study) -> Table:
    """Every run: its seed, the epoch kept, and of its provenance what differs between runs."""
    described = {(row, run.seed): _provenance(run) for row in study.labels
                 for run in study.runs[row] if run.provenance}
    fields = _differing(described.values())
    rows = []
    for row in study.labels:
        for run in study.runs[row]:
            values = described.get((row, run.seed), {})
            kept = f"{run.evaluation['epoch']}" if run.evaluation else "–"
            cells = [str(run.seed), kept, run.provenance.get("started", "–"),
                     _mean_duration([run]),
                     *(values.get(field, "–") for field in fields)]
            rows.append(TableRow(study.labels[row], tuple(map(Cell, cells))))
    return Table("Runs: what made each number.",
                 ("Method", "Seed", "Epoch kept", "Started", "Training time", *fields),
                 tuple(rows), note="How to read: a line for each training. A dash: not there.",
                 numeric=False)


def other_measurements_table(study: Study) -> Table | None:
    """Measurements with a name, which the report does not show; None if there are none."""
    rows = [TableRow(study.labels[row], (Cell(str(run.seed)), Cell(", ".join(named))))
            for row in study.labels for run in study.runs[row]
            if (named := named_results(run.folder))]
    if not rows:
        return None
    return Table("Other measurements, with other settings.", ("Method", "Seed", "Files"),
                 tuple(rows), note="How to read: made with --name, in the folder of the run; this "
                 "report shows those without a name.", numeric=False)


def common_provenance_table(study: Study) -> Table:
    """What is the same for all runs, and the study's own command and commit."""
    described = [_provenance(run) for runs in study.runs.values() for run in runs
                 if run.provenance]
    differing = _differing(described)
    common = {field: value for values in described[:1] for field, value in values.items()
              if field not in differing}
    for field, value in (("Command", study.command), ("Commit", study.commit)):
        if common.get(field) != value:
            common[f"{field} of the {'report' if study.name == 'runs' else 'study'}"] = value
    return Table("Common to all runs.", ("What", "Value"),
                 tuple(TableRow(name, (Cell(value),)) for name, value in common.items()),
                 numeric=False)


def _provenance(run: Run) -> dict[str, str]:
    versions = ", ".join(f"{name} {v}" for name, v in run.provenance["versions"].items())
    return {"Command": run.provenance["command"], "Commit": run.provenance["commit"],
            "Hardware": run.provenance["hardware"], "Platform": run.provenance["platform"],
            "Versions": versions}


def _differing(described: Iterable[dict[str, str]]) -> list[str]:
    """The keys whose values are not the same everywhere, in the order of the first."""
    described = list(described)
    return [key for key in (described[0] if described else ())
            if len({values[key] for values in described}) > 1]


def configuration_tables(study: Study) -> tuple[Table, ...]:
    """The fields in which rows differ, and those that they share."""
    by_row = {row: _row_configuration(runs) for row, runs in study.runs.items()
              if any(run.config for run in runs)}
    differing = _differing(by_row.values())
    rows = tuple(TableRow(study.labels[row], tuple(Cell(values[field]) for field in differing))
                 for row, values in by_row.items())
    first = next(iter(by_row.values()), {})
    common = tuple(TableRow(field, (Cell(value),)) for field, value in first.items()
                   if field not in differing)
    return (
        Table("Configuration: the fields in which the rows differ.", ("Method", *differing), rows,
              note="How to read: names as in config.json of each run; the seed is left out.",
              numeric=False),
        Table("Configuration: the fields that all rows share.", ("Field", "Value"), common,
              numeric=False, folded=True))


def _row_configuration(runs: Sequence[Run]) -> dict[str, str]:
    """Of all seeds of a row; where seeds differ in more than the seed, every value is given."""
    flat = [_flatten(dataclasses.asdict(run.config)) for run in runs if run.config]
    return {field: " / ".join(dict.fromkeys(values[field] for values in flat))
            for field in flat[0] if field != "seed"}


def _flatten(values: dict, prefix: str = "") -> dict[str, str]:
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, (tuple, list)):
            flat[prefix + name] = ", ".join(map(str, value))
        else:
            flat[prefix + name] = str(value)
    return flat


# --- Figures ---------------------------------------------------------------------------------


def accuracy_picture(study: Study) -> Picture:
    """Accuracy against the noise level."""
    lines, paper, shown = [], [], set()
    levels = levels_of(study)
    for index, row in enumerate(study.labels):
        style = figures.row_style(index)
        values = accuracies(study.finished(row))
        if values:
            spread = "std_over_seeds" if several_seeds(study) else "std_over_draws"
            lines.append(figures.AccuracyLine(
                study.labels[row], style, np.array(list(values)),
                np.array([value.mean for value in values.values()]),
                np.array([getattr(value, spread) or 0.0 for value in values.values()])))
        numbers = {level: mean for level, (mean, _) in paper_numbers(study, row).items()
                   if level in levels}
        if numbers and study.paper_rows[row] not in shown:
            shown.add(study.paper_rows[row])
            paper.append(figures.AccuracyLine(
                study.labels[row], style, np.array(list(numbers)),
                np.array(list(numbers.values())), np.zeros(len(numbers))))
    over = "training seeds" if several_seeds(study) else "noise draws"
    figure = figures.accuracy_figure(lines, paper)
    return Picture(
        "accuracy", figure, "Accuracy against the test noise.",
        f"Line chart of test accuracy in per cent against the noise level, a line for each of "
        f"{len(lines)} methods. The accuracy table holds the numbers.",
        f"How to read: mean accuracy; error bars: standard deviation over the {over} (often "
        "smaller than the marker). A flat, high line is a robust classifier. The markers of a "
        f"level are set side by side{' in the enlarged panel' if len(figure.axes) > 1 else ''}."
        + (f" Thin and dashed: the paper’s {study.paper.title}." if paper else ""))


def perturbation_picture(study: Study) -> Picture | None:
    """Accuracy under each perturbation; None without any."""
    by_row = {row: perturbed_accuracies(study.finished(row)) for row in study.labels}
    if not any(by_row.values()):
        return None
    return _dots(study, "perturbations", by_row, "Accuracy under other perturbations.")


def levels_picture(study: Study) -> Picture:
    """As :func:`accuracy_picture`, for so few noise levels that there is no line to draw."""
    by_row = {row: {level_name(level): value for level, value in accuracies(
        study.finished(row)).items()} for row in study.labels}
    return _dots(study, "accuracy", by_row, "Test accuracy.")


def _dots(study: Study, name: str, by_row: dict[str, dict[str, Accuracy]], caption: str
          ) -> Picture:
    names = list(dict.fromkeys(text for values in by_row.values() for text in values))
    spread = "std_over_seeds" if several_seeds(study) else "std_over_draws"
    lines = [figures.AccuracyLine(
        study.labels[row], figures.row_style(index),
        np.array([names.index(text) for text in values]),
        np.array([value.mean for value in values.values()]),
        np.array([getattr(value, spread) or 0.0 for value in values.values()]))
        for index, (row, values) in enumerate(by_row.items()) if values]
    over = "training seeds" if several_seeds(study) else "noise draws"
    return Picture(
        name, figures.dots_figure(names, lines), caption,
        f"Dot plot of test accuracy in per cent, a marker for each of {len(lines)} methods in "
        f"each of {len(names)} lines. The table holds the numbers.",
        f"How to read: further right is better; error bars: standard deviation over the {over}.")


def training_picture(study: Study) -> Picture | None:
    """Loss, and accuracy on the images for choosing the epoch; None without any metrics."""
    logged = [(index, row, run) for index, row in enumerate(study.labels)
              for run in study.runs[row] if run.epochs]
    if not logged:
        return None
    key = "softmax" if all("softmax" in run.epochs[0] for *_, run in logged) else "loss"
    name = {"softmax": "Softmax loss in training", "loss": "Loss in training"}[key]
    curves = []
    for index, row, run in logged:
        selection = [line for line in run.epochs if line.get("selection_accuracy") is not None]
        curves.append(figures.TrainingCurve(
            study.labels[row], figures.row_style(index),
            np.array([line["epoch"] for line in run.epochs]),
            np.array([line[key] for line in run.epochs]),
            np.array([line["epoch"] for line in selection]),
            np.array([100 * line["selection_accuracy"] for line in selection]),
            run.evaluation["epoch"] if run.evaluation else None))
    return Picture(
        "training", figures.training_figure(curves, name), "Training curves.",
        f"Line charts against the epoch: {name.lower()} and, where measured, the accuracy on the "
        f"images for choosing the epoch; {len(curves)} runs.",
        "How to read: a thin line for each training run. Left: the loss as each method sees its "
        "own training images (clean, noisy or both), on a logarithmic axis, so heights of "
        "different methods do not compare directly. Right, where measured: the selection "
        "accuracy, on the images by which the epoch is chosen; a large marker is the epoch kept.")


def curvature_picture(study: Study) -> Picture:
    """Box plots of the curvatures."""
    found, measures = _curvature_runs(study), _measures(study)
    # The lowest 90 % of each run, so that one seed's outliers do not displace another's images.
    samples = [figures.CurvatureSample(
        study.labels[row], figures.row_style(list(study.labels).index(row)),
        {key: np.concatenate([figures.lowest_share(run.curvature[key]) for run in runs])
         for key in measures}) for row, runs in found.items()]
    shown = [values for sample in samples for values in sample.values.values()]
    hidden = sum(int((~(values > 0)).sum()) for values in shown)
    facts = [run.curvature for runs in found.values() for run in runs]
    step = listed(f"{one['step']:g}" for one in facts)
    titles = {"frobenius_squared": "$\\Vert H\\Vert_F^2$ of the exact Hessian",
              "finite_difference": f"$\\Lambda$ of Eq. 21 at $t$ = {step}"}
    explained = ("the squared Frobenius norm of the Hessian at the image itself; the paper’s "
                 "Eq. 21, which also counts the kinks of the ReLUs that its steps cross and may "
                 "differ by orders of magnitude")
    if "smoothed_frobenius_squared" in measures:
        sigma = listed(f"{one['smoothing']:g}" for one in facts)
        titles["smoothed_frobenius_squared"] = (
            f"$\\Vert H_\\sigma\\Vert_F^2$ of the loss\naveraged over noise, $\\sigma$ = {sigma}")
        explained += ("; and the squared Frobenius norm of the Hessian of the loss averaged over "
                      "noise, in which jumps of the gradient to and fro cancel")
    return Picture(
        "curvature", figures.curvature_figure(samples, titles),
        "Curvature of the softmax loss at clean test images: the lowest 90 % of each run, as in "
        "the paper’s Fig. 10.",
        f"{len(measures)} panels of box plots on a logarithmic axis, one box for each of "
        f"{len(samples)} methods. The curvature table holds medians and means.",
        f"How to read: further left is flatter. Box: quartiles and median; whiskers: 5th to 95th "
        f"percentile. {hidden} of the {sum(map(len, shown))} values are zero or negative and are "
        "not shown (they lie beyond the left edge, but count for the boxes). The panels show "
        f"different quantities, from left to right: {explained}. Do not compare the panels. "
        f"Derivatives with respect to {listed(one['with_respect_to'] for one in facts)}.")


def tsne_picture(study: Study) -> Picture | None:
    """Clean and noisy features of the first seed, by row; None if none can be embedded."""
    embeddings, left_out = [], []
    for row, run in _feature_runs(study).items():
        planes = figures.joint_tsne(run.features["clean"], run.features["noisy"])
        if planes is None:
            left_out.append(study.labels[row])
            continue
        embeddings.append(figures.Embedding(
            f"{study.labels[row]}, seed {run.seed}", *planes, run.features["labels"],
            str(run.features["noise"])))
    if not embeddings:
        return None
    note = ("How to read: a point for each test image, colour and marker by its true class, the "
            "number at the median of its class; the same image is in both panels of a method, "
            "which share one embedding. Well separated clusters that stay in place under noise "
            "are what robust training aims at. Directions, distances between clusters and sizes "
            "have no meaning in t-SNE.")
    if left_out:
        note += f" Not shown, features not finite or all alike: {', '.join(left_out)}."
    return Picture(
        "tsne", figures.tsne_figure(embeddings, study.class_names),
        "Features of the penultimate layer, by t-SNE, as in the paper’s Fig. 1.",
        f"Scatter plots of clean and noisy features in the plane, two panels for each of "
        f"{len(embeddings)} methods, coloured by class.", note)


# --- Files -----------------------------------------------------------------------------------


def _sections(study: Study) -> list[Section]:
    tables = filter(None, (accuracy_table(study), balanced_table(study),
                           perturbation_table(study), class_table(study)))
    pictures = filter(None, (accuracy_picture(study), perturbation_picture(study)))
    sections = [Section("accuracy", "Accuracy", "", tuple(tables), tuple(pictures))]
    training = training_picture(study)
    if training:
        sections.append(Section("training", "Training", "", (), (training,)))
    if _curvature_runs(study):
        sections.append(Section(
            "curvature", "Curvature of the loss in input space",
            "How fast the gradient of the loss turns when the image changes a little. The paper "
            "argues that robustness to noise and low curvature go together.",
            (curvature_table(study),), (curvature_picture(study),)))
    sections += filter(None, [networks.section(study), steps.section(study)])
    sections += noise_counts.sections(study)
    tsne = tsne_picture(study)
    if tsne:
        sections.append(Section("features", "Features", "", (), (tsne,)))
    sections += filter(None, [theory_section.section(study), sharpness.section(study)])
    tables = (common_provenance_table(study), run_table(study), other_measurements_table(study),
              *configuration_tables(study))
    sections.append(Section(
        "provenance", "How these numbers were made", "", tuple(filter(None, tables))))
    return sections


def _warning(study: Study) -> str:
    rows = chosen_on_test(study)
    if not rows:
        return ""
    names = ", ".join(rows) if len(rows) < len(study.labels) else "all rows"
    return ("Warning: the epoch was chosen on the test set, so the test set has leaked into the "
            f"choice and these accuracies are too high: {names}.")


def html(study: Study, sections: Sequence[Section], images: dict[str, str]) -> str:
    """The page as one self-contained text; ``images`` holds a data URI for each picture."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True)
    return environment.get_template("report.html.jinja").render(
        study=study, note=paragraphs(study.note), lead=lead(study),
        comparisons=comparisons(study), missing=missing_runs(study), warning=_warning(study),
        sections=sections, images=images)


def markdown(study: Study, sections: Sequence[Section]) -> str:
    """The same content in Markdown, figures by reference."""
    parts = [f"# {_md(study.title)}", *map(_md, paragraphs(study.note)), "## Summary"]
    if _warning(study):
        parts.append(f"> **{_md(_warning(study))}**")
    if missing_runs(study):
        parts += ["**Missing runs:**",
                  "\n".join(f"- {_md(text)}" for text in missing_runs(study))]
    parts.append(_md(lead(study)))
    if comparisons(study):
        parts.append("\n".join(f"- {_md(text)}" for text in comparisons(study)))
    for section in sections:
        parts += section_markdown(section, "figures/")
    return "\n\n".join(parts) + "\n"


def section_markdown(section: Section, folder: str) -> list[str]:
    """The paragraphs of a section whose figures are in ``folder``."""
    return [f"## {_md(section.heading)}", *([_md(section.lead)] if section.lead else []),
            *map(_md_table, section.tables),
            *(f"![{_md(picture.alt)}]({folder}{picture.name}.png)\n\n"
              f"**{_md(picture.caption)}** {_md(picture.note)}" for picture in section.pictures)]


def paragraph_markdown(text: str) -> str:
    """Plain text as paragraphs of Markdown."""
    return "\n\n".join(map(_md, paragraphs(text)))


def _md_table(table: Table) -> str:
    align = "---:" if table.numeric else "---"
    lines = [table.columns, ("---", *[align] * (len(table.columns) - 1))]
    escaped = ["| " + " | ".join(map(_md, lines[0])) + " |", "| " + " | ".join(lines[1]) + " |"]
    for row in table.rows:
        head = f"*{_md(row.head)}*" if row.muted else _md(row.head)
        cells = [f"**{_md(cell.text)}**" if cell.bold else _md(cell.text) for cell in row.cells]
        escaped.append("| " + " | ".join([head, *cells]) + " |")
    note = f"\n\n{_md(table.note)}" if table.note else ""
    details = f" {_md(table.details)}" if table.details else ""
    return f"**{_md(table.caption)}**{details}\n\n" + "\n".join(escaped) + note


def _md(text: str) -> str:
    """Plain text with everything escaped that Markdown or HTML in it would take as markup."""
    return re.sub(r"([\\`*_\[\]|<>&#~])", r"\\\1", " ".join(text.split()))


def accuracy_csv(study: Study) -> str:
    """A line for each row and noise level or other perturbation, ours and the paper's; accuracies
    in per cent."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["source", "row", "label", "noise_std_255", "perturbation", "mean_percent",
                     "std_over_seeds_percent", "std_over_draws_percent", "num_seeds",
                     "num_draws", "num_images", "balanced_percent"])
    for row, label in study.labels.items():
        runs = study.finished(row)
        by_level = {(f"{level:g}", ""): value for level, value in accuracies(runs).items()}
        by_text = {("", text): value for text, value in perturbed_accuracies(runs).items()}
        for test, value in (by_level | by_text).items():
            writer.writerow([
                "ours", row, label, *test, f"{value.mean:.4f}",
                _number(value.std_over_seeds), _number(value.std_over_draws),
                len(value.seed_means), listed(run.evaluation["num_draws"] for run in runs),
                listed(run.evaluation["num_images"] for run in runs), _number(value.balanced)])
        for level, (mean, std) in paper_numbers(study, row).items():
            writer.writerow(["paper", row, label, f"{level:g}", "", mean, "",
                             "" if std is None else std, "", PAPER_DRAWS, "", ""])
    return out.getvalue()


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def summary_json(study: Study) -> dict:
    """All numbers of the report, for machines; accuracies in per cent."""
    return {
        "name": study.name,
        "title": study.title,
        "summary": [lead(study), *comparisons(study)],
        "spread": "over training seeds" if several_seeds(study) else "over noise draws",
        "missing": missing_runs(study),
        "epoch_chosen_on_test": chosen_on_test(study),
        "classes": (classes := classes_of(study.all_finished())) and classes._asdict(),
        "rows": [_row_json(study, row) for row in study.labels],
    }


def _row_json(study: Study, row: str) -> dict:
    runs = study.finished(row)
    return {
        "row": row,
        "label": study.labels[row],
        "method": study.methods[row],
        "seeds": [run.seed for run in runs],
        "training_seconds": [run.provenance.get("seconds") for run in runs],
        "epochs": [run.evaluation["epoch"] for run in runs],
        "accuracy": [{"noise_std_255": level, **value._asdict()}
                     for level, value in accuracies(runs).items()],
        "perturbed": [{"perturbation": text, **value._asdict()}
                      for text, value in perturbed_accuracies(runs).items()],
        "paper": [{"noise_std_255": level, "mean": mean, "std_over_draws": std}
                  for level, (mean, std) in paper_numbers(study, row).items()],
        "curvature": [{"seed": run.seed, **_curvature_json(run.curvature)}
                      for run in _curvature_runs(study).get(row, [])],
    }


def _curvature_json(curvature: dict) -> dict:
    values = {f"{key}_{name}": _finite_statistic(statistic, curvature[key])
              for key in CURVATURES if key in curvature
              for name, statistic in (("median", np.median), ("mean", np.mean))}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _data_uri(path: pathlib.Path) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
