"""Writes the tables of the README and the docs from the numbers under results/.

A page marks the place of each table::

    <!-- table: small/noise differences reference=robust -->
    <!-- end -->

The mark names a folder of results and a kind of :data:`KINDS`, or a page and "copied", followed by
options. Semicolons separate several values of an option; quotes enclose a value with blanks.
"""

import functools
import pathlib
import re
import shlex
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from jaxrobust import InputError, _validate
from jaxrobust.app import run_folder
from jaxrobust.app.files import write_text
from jaxrobust.app.measurements import networks, noise_counts, sharpness
from jaxrobust.app.measurements.blocks import SEPARATED
from jaxrobust.app.measurements.curvature import CURVATURES, MEDIAN
from jaxrobust.app.measurements.theory import section as theory_section
from jaxrobust.app.report import frame, tables
from jaxrobust.app.report.page import over_runs, signed, significant
from jaxrobust.app.study.read import study_of_runs

ROOT = pathlib.Path(__file__).parent.parent
MARKED = re.compile(r"(<!-- table: ([^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)


class Numbers:
    """The numbers of a folder of results."""

    def __init__(self, name: str):
        folder = ROOT / "results" / name
        paths = [path for path in (folder / "report.csv", folder / f"{folder.name}.csv")
                 if path.is_file()]
        runs = sorted(filter(run_folder.is_run, folder.glob("*")))
        if paths:
            self.table = frame.read_csv(paths[0])
            study = ROOT / "results" / self.table.study[0]
            self.labels: dict[str, str] = run_folder.read_facts(study, "study")["rows"]
        elif runs:
            study = study_of_runs(runs, together=True)
            self.table = frame.frame(study, frame.training_numbers, frame.accuracy_numbers)
            self.labels = study.labels
        else:
            raise InputError(f"Expected numbers or runs in results/{name}, found none.")
        self.values = frame.values_of(self.table)
        self.rows: list[str] = [row for row in self.table.row.unique() if row]

    def accuracies(self, tests: Sequence[str] | None, perturbations: bool
                   ) -> tuple[dict[str, str], frame.Accuracies]:
        """The tests by heading, those named or all of a kind, and the accuracies by row."""
        by_row = frame.accuracies_of(self.table, self.rows)
        if tests is None:
            found = (tables.perturbations_of if perturbations else tables.levels_of)(by_row)
            return {test: test for test in found}, by_row
        every = {test for values in by_row.values() for test in values}
        short = {test.partition("(")[0]: test for test in every if "+" not in test}
        return {test: short[test] for test in tests}, by_row


def _label(numbers: Numbers, row: str, names: str) -> str:
    """The name of a row: its label in the report or, if ``names`` is "short", its key."""
    label = numbers.labels[row]
    if names == "label":
        return label
    return label[0].lower() + label[1:] if label.startswith("Robust, ") else row


Lines = list[list[str]]


def accuracy(numbers: Numbers, *, tests: Sequence[str] | None = None, names: str = "label",
             perturbations: bool = False) -> Lines:
    """Accuracy: methods in rows and noise levels, or the tests named, in columns; perturbations in
    rows."""
    shown, by_row = numbers.accuracies(tests, perturbations)
    several = any(len(one.by_seed) > 1 for values in by_row.values() for one in values.values())
    cells = tables.accuracy_cells(
        by_row, list(shown.values()),
        lambda row: "diverged" if (row, frame.DIVERGED, "") in numbers.values else "–",
        "std_over_seeds" if several else None)
    lines = [["", *shown], *([_label(numbers, row, names), *(
        f"**{cell.text}**" if cell.bold else cell.text for cell in of_row)]
        for row, of_row in cells.items())]
    return _transposed(lines) if perturbations else lines


def _transposed(lines: Lines) -> Lines:
    return list(map(list, zip(*lines, strict=True)))


def seeds(numbers: Numbers) -> Lines:
    """Accuracy on validation and test images, for each seed and their mean."""
    shown, by_row = numbers.accuracies(None, False)
    found = {row: [numbers.values[row, frame.VALIDATION, ""], *(
        by_row[row][test].by_seed for test in shown.values())] for row in numbers.rows}
    return [["", "held out", *shown],
            *([f"{numbers.labels[row]}, seed {seed}", *(f"{one[index]:.2f}" for one in by_test)]
              for row, by_test in found.items()
              for index, seed in enumerate(numbers.table.seed[numbers.table.row == row].unique())),
            *([f"{numbers.labels[row]}, mean", *(f"{statistics.fmean(one):.2f}" for one in by_test)]
              for row, by_test in found.items())]


def differences(numbers: Numbers, *, reference: str, perturbations: bool = False) -> Lines:
    """Differences in accuracy from the row ``reference``, with half the width of the interval."""
    shown, by_row = numbers.accuracies(None, perturbations)
    found = tables.differences(by_row, reference, shown)
    lines = [["", *shown], *([numbers.labels[row], *(
        cell.text for cell in tables.difference_cells(ones, shown))]
        for row, ones in found.items())]
    return _transposed(lines) if perturbations else lines


def curvature(numbers: Numbers, *, noise: str) -> Lines:
    """Medians by measure, and the correlation of each with correct predictions under a noise."""
    heads = {name: measure.title for (key, name), measure in zip(
        CURVATURES.items(), noise_counts.MEASURES.values(), strict=True)}
    lines = [["", "exact, at the image", "Eq. 21", "loss averaged over the noise",
              "Spearman with correct predictions under noise: exact / Eq. 21 / averaged"]]
    for row in numbers.rows:
        medians = [significant(statistics.fmean(
            numbers.values[row, MEDIAN, name])) for name in heads]
        coefficients = [signed(statistics.fmean(numbers.values[
            row, "Spearman, images", f"{noise}, {title}"])) for title in heads.values()]
        lines.append([_label(numbers, row, "short"), *map(_thousands, medians),
                      " / ".join(coefficients)])
    return lines


def medians(numbers: Numbers, *, rows: Sequence[str]) -> Lines:
    """Median curvature by measure: mean over the seeds [lowest–highest]."""
    return _by_row(numbers, rows, [(MEDIAN, name)
                                   for name in networks.CURVATURES.values()])


def neighbours(numbers: Numbers, *, tests: Sequence[str]) -> Lines:
    """Accuracy of the nearest neighbours in the features of blocks, such as "block4, clean"."""
    return _by_row(numbers, numbers.rows, [(SEPARATED, test) for test in tests])


def _by_row(numbers: Numbers, rows: Sequence[str], columns: Sequence[tuple[str, str]]) -> Lines:
    return [["", *(condition for _, condition in columns)],
            *([numbers.labels[row], *(over_runs(numbers.values[row, *column])
                                      for column in columns)] for row in rows)]


def correlations(numbers: Numbers, *, tests: Sequence[str]) -> Lines:
    """Rank correlations over networks of the curvature with the accuracy under these tests."""
    outcomes = [outcome for test in tests for outcome in (
        f"accuracy, {test}", f"loss of accuracy at {test}",
        f"accuracy, {test}, clean accuracy held fixed")]
    lines = [["", *CURVATURES.values()]]
    for outcome in outcomes:
        found = [[numbers.values.get(("", f"{networks.COEFFICIENT}{end}", f"{outcome}, {name}"))
                  for end in networks.ENDS] for name in CURVATURES.values()]
        if all(map(all, found)):
            lines.append([outcome, *(networks.text(networks.Coefficient(*(
                value for value, in ends))) for ends in found)])
    return lines


def separation(numbers: Numbers) -> Lines:
    """The separation of two classes in each layer, and its bounds."""
    heads = list(dict.fromkeys(where for _, what, where in numbers.values
                               if what == theory_section.DIVERGENCE))
    return [["", *heads], *([numbers.labels[row], *(significant(statistics.fmean(
        numbers.values[row, theory_section.DIVERGENCE, head])) for head in heads)]
        for row in numbers.rows)]


def eigenvalues(numbers: Numbers, *, terms: Sequence[str], rows: Sequence[str]) -> Lines:
    """Largest eigenvalues of the Hessian in the parameters, by term of the loss."""
    heads = {f"largest eigenvalue, {term}": term for term in terms} | {
        sharpness.LIMIT: "largest stable rate", sharpness.RATE: "rate"}
    lines = [["", *heads.values()]]
    for row in rows:
        for state in sharpness.STATES.values():
            cells = [over_runs(numbers.values.get((row, what, state), ())) for what in heads]
            cells[-1] = f"{numbers.values[row, sharpness.RATE, state][0]:g}"
            lines.append([f"{numbers.labels[row]}, {state}", *cells])
    return lines


def copied(name: str, *, rows: Sequence[str] | None = None, columns: Sequence[str] | None = None,
           heading: str = "", caption: str = "") -> Lines:
    """The first table of a page below a heading and a caption that begin so: the rows and columns
    with these heads, or all."""
    page = ROOT / "results" / name
    text = page.read_text() if page.is_file() else ""
    below = rf".*?^\*\*{re.escape(caption)}" if caption else ""
    found = re.search(rf"^#+ {re.escape(heading)}{below}.*?((?:^\|.*?\|\n)+)", text,
                      re.MULTILINE | re.DOTALL)
    if not found:
        words = " and ".join(map(repr, filter(None, (heading, caption)))) or "a heading"
        raise InputError(f"Expected a page with a table below {words} in results/{name}.")
    head, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]]
                       for line in found[1].splitlines())
    chosen = [head.index(column) for column in columns or head]
    return [[line[index] for index in chosen] for line in (head, *(
        line for line in lines if rows is None or line[0] in rows))]


KINDS: dict[str, Callable[..., Lines]] = {
    "accuracy": accuracy, "perturbations": functools.partial(accuracy, perturbations=True),
    "differences": differences,
    "perturbation-differences": functools.partial(differences, perturbations=True), "seeds": seeds,
    "curvature": curvature, "medians": medians, "neighbours": neighbours,
    "correlations": correlations, "separation": separation, "eigenvalues": eigenvalues}
"""By name, the functions that make a table, the head first, from the numbers of a folder."""

LISTS = ("tests", "rows", "terms", "columns")
"""Options with several values."""


def _thousands(text: str) -> str:
    return f"{int(text):,}" if text.isdigit() else text


def pages() -> list[pathlib.Path]:
    """The pages that may hold tables of results."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")),
            *sorted((ROOT / "results").glob("**/README.md"))]


def generated(text: str) -> str:
    """Writes the tables in the text of a page."""
    def table(match: re.Match) -> str:
        folder, kind, *options = shlex.split(match[2])
        _validate.one_of("kind of table", kind, (*KINDS, "copied"))
        given: dict[str, Any] = {
            name: value.split(";") if name in LISTS else value
            for name, value in (option.split("=", 1) for option in options)}
        head, *lines = (copied(folder, **given) if kind == "copied" else
                        KINDS[kind](Numbers(folder), **given))
        rule = ["---", *["---:"] * (len(head) - 1)]
        rows = [f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in line)}|"
                for line in (head, *lines)]
        return "\n".join((match[1] + rows[0], "|" + "|".join(rule) + "|", *rows[1:], match[3]))

    return MARKED.sub(table, text)


def update(check: bool) -> list[pathlib.Path]:
    """Updates the tables of all pages and returns the stale ones; ``check`` refuses them."""
    stale = {path: new for path in pages() if (new := generated(old := path.read_text())) != old}
    if check and stale:
        names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
        raise InputError(f"Expected the tables of the results, found others in {names}. "
                         "`python -m experiments readme` rewrites them.")
    for path, new in stale.items():
        write_text(path, new)
    return list(stale)
