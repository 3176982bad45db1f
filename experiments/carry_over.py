"""Does training on Gaussian noise carry over to each of the common corruptions?

    corruptions.json of each run ─ numbers ─▶ accuracy by corruption and group, and differences
"""

from collections.abc import Iterator

import numpy as np

from jaxrobust import corruptions as common
from jaxrobust.app.measurements.corruptions import (
    ACCURACY,
    BY_SEVERITY,
    CLEAN,
    CORRUPTIONS,
    estimates,
)
from jaxrobust.app.measurements.estimates import Estimate, numbers_of, subsets_text
from jaxrobust.app.measurements.runner import sections
from jaxrobust.app.report import tables
from jaxrobust.app.report.frame import Accuracies, Number, accuracies_of, frame
from jaxrobust.app.report.page import Section, Table, TableRow
from jaxrobust.app.study.read import Run, Study

REFERENCE = "normal"
"""The row that the others are compared with."""

IMAGES = "images under corruptions"


def numbers(run: Run) -> Iterator[Number]:
    """Yields the numbers of the suite, and the accuracy by group of corruptions."""
    facts = run.facts("corruptions")
    if facts is None:
        return
    yield Number(IMAGES, "", facts["num_images"], "images")
    yield from numbers_of(_estimates)(run)
    by_name = facts["mean_by_corruption"]
    for group, names in groups_of(by_name).items():
        mean = float(np.mean([by_name[name][0] for name in names]))
        yield Number(ACCURACY, f"{group}, mean of {len(names)}, {facts['origin']}", 100 * mean, "%")


def _estimates(run: Run) -> Iterator[Estimate]:
    """The suite's, of single severities without intervals, which would be half of the table: of
    several runs it is the variation over these that counts."""
    return (one._replace(low=None, high=None) if one.measurement == BY_SEVERITY else one
            for one in estimates(run))


def groups_of(names: Iterator[str]) -> dict[str, list[str]]:
    """The corruptions by group, and all that are no noise, where these are at least two."""
    groups: dict[str, list[str]] = {}
    for name in names:
        group = common.CORRUPTIONS[name]
        groups.setdefault(group, []).append(name)
        if group != "noise":
            groups.setdefault("all but noise", []).append(name)
    return {group: members for group, members in groups.items() if len(members) > 1}


def section(study: Study) -> Section:
    """Makes the section: accuracies by corruption, and their differences from one row."""
    by_row = accuracies(study)
    tests = tests_of(by_row)
    shown = [row for row, found in by_row.items() if found]
    origins = sorted({facts["origin"] for runs in study.runs.values() for run in runs
                      if (facts := run.facts("corruptions"))})
    heads = [test.removesuffix(f", {origins[0]}") if len(origins) == 1 else test for test in tests]
    columns = ("Corruption", *(study.labels[row] for row in shown))
    spread = ("Mean over the training seeds ± standard deviation over them."
              if tables.several_seeds(study) else "One training seed.")
    cells = tables.accuracy_cells(by_row, tests, lambda row: "–", tables.spread_of(study))
    table = Table(
        "Mean accuracy over the severities, in %.", columns,
        tuple(TableRow(head, tuple(cells[row][index] for row in shown))
              for index, head in enumerate(heads)),
        f"Corruptions: {' and '.join(origins)}. Images: {subsets_text(study, 'corruptions')} "
        f"{spread}",
        "How to read: higher is better; bold: the best of the line. Generated: drawn anew by this "
        "package, which gives other numbers than the benchmark’s own files.")
    found = tables.differences(by_row, REFERENCE, tests)
    differences = tables.difference_table_of(
        study, REFERENCE, found, "Mean accuracy", ("Corruption", *(
            study.labels[row] for row in found)),
        map(TableRow, heads, zip(*(tables.difference_cells(ones, tests)
                                   for ones in found.values()), strict=True)))
    pictures = sections(study, (CORRUPTIONS,))[0].pictures
    return Section("corruptions", study.title, "", tuple(filter(None, (table, differences))),
                   pictures)


def accuracies(study: Study) -> Accuracies:
    """Returns the accuracies of a study under corruptions, by row and condition."""
    return accuracies_of(frame(study, numbers), study.labels, ACCURACY, IMAGES)


def tests_of(by_row: Accuracies) -> list[str]:
    """Lists the conditions: clean, each corruption, then the means."""
    found = dict.fromkeys(test for values in by_row.values() for test in values)
    return sorted(found, key=lambda test: (test != CLEAN, "mean of" in test))
