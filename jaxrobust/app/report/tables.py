"""Tabulates accuracies from the numbers of a study; rows in grey are the paper's."""

import math
from collections.abc import Callable, Iterable, Sequence

from jaxrobust.app.recipe import METHOD_LABELS
from jaxrobust.app.report.comparison import Difference, classes_of, difference, error_of_images
from jaxrobust.app.report.frame import (
    Accuracies,
    accuracies,
    accuracy_numbers,
    frame,
    noise_level,
    over_seeds,
    published_accuracies,
    training_numbers,
)
from jaxrobust.app.report.page import (
    Cell,
    Table,
    TableRow,
    count,
    duration,
    listed,
    signed,
    text_row,
    with_spread,
)
from jaxrobust.app.study.read import Study

PAPER_DRAWS = 10
"""Noise draws behind a number of the paper."""


def levels_of(by_row: Accuracies) -> list[str]:
    """Lists the noise levels of all rows, increasing."""
    found = {test for values in by_row.values() for test in values}
    return sorted((test for test in found if noise_level(test) is not None), key=noise_level)


def perturbations_of(by_row: Accuracies) -> list[str]:
    """Lists the other perturbations of all rows, each where it first occurs."""
    return list(dict.fromkeys(test for values in by_row.values() for test in values
                              if noise_level(test) is None))


def several_seeds(study: Study) -> bool:
    """Tells whether the ± of the tables is the spread over trainings, not over noise draws."""
    return any(len(study.finished(row)) > 1 for row in study.labels)


def spread_of(study: Study) -> str:
    """Returns the column of :func:`~jaxrobust.app.report.frame.over_seeds` that the ± shows."""
    return "std_over_seeds" if several_seeds(study) else "std_over_draws"


def accuracy_cells(by_row: Accuracies, tests: Sequence[str], absent: Callable[[str], str],
                   spread: str | None) -> dict[str, tuple[Cell, ...]]:
    """Returns by row a cell for each test with the mean and its ``spread``, a column of
    :func:`~jaxrobust.app.report.frame.over_seeds`; bold in the best row of each test."""
    best = {test: max((round(values[test].mean, 2) for values in by_row.values()
                       if test in values), default=None) for test in tests}

    def cell(row, test):
        one = by_row[row].get(test)
        if one is None:
            return Cell(absent(row))
        text = with_spread(one.mean, getattr(one, spread) if spread else math.nan)
        return Cell(text, bold=round(one.mean, 2) == best[test])

    return {row: tuple(cell(row, test) for test in tests) for row in by_row}


def accuracy_table(study: Study) -> Table:
    """Tabulates methods by noise level, with the paper's row below ours where there is one."""
    by_row = accuracies(study)
    levels = levels_of(by_row)
    times = over_seeds(frame(study, training_numbers)).query(
        "measurement == 'training time'").set_index("row")["mean"]

    def absent(row):
        return "diverged" if any(run.diverged for run in study.runs[row]) else "–"

    rows = []
    for row, cells in accuracy_cells(by_row, levels, absent, spread_of(study)).items():
        time = Cell(duration(times[row]) if row in times else "–")
        rows.append(TableRow(study.labels[row], (*cells, time)))
        theirs = list(map(published_by_test(study, row).get, levels))
        if any(theirs):
            # None for the training time.
            rows += _paper_rows(METHOD_LABELS.get(study.paper_rows[row], study.labels[row]),
                                [*map(by_row[row].get, levels), None], [*theirs, None])
    rows += _commonest_row(study, len(levels), 1)
    return Table("Accuracy in %, clean and under Gaussian noise.",
                 ("Method", *map(str.capitalize, levels), "Training time"), tuple(rows),
                 _accuracy_details(study, by_row), _accuracy_note(study))


def perturbation_table(study: Study) -> Table | None:
    """Tabulates perturbations by method, as in the paper's Table 4; returns None without any."""
    by_row = accuracies(study)
    tests = perturbations_of(by_row)
    shown = [row for row in by_row if any(test in by_row[row] for test in tests)]
    if not shown:
        return None
    cells = accuracy_cells(by_row, tests, lambda row: "–", spread_of(study))
    rows = []
    for index, test in enumerate(tests):
        key = study.paper_perturbations.get(test)
        rows.append(TableRow(f"{key}: {test}" if key else test,
                             tuple(cells[row][index] for row in shown)))
        if key:
            theirs = study.paper_perturbed
            numbers = dict(zip(theirs.methods, theirs.rows[key], strict=True))
            rows += _paper_rows(key, [by_row[row].get(test) for row in shown],
                                [numbers.get(study.paper_rows.get(row)) for row in shown])
    rows += _commonest_row(study, len(shown))
    note = ("How to read: NAME(ARGUMENTS) as in the documentation of perturbations; those joined "
            "by + are applied from left to right. Higher is better; bold: the best of the line.")
    if study.paper_perturbations:
        note += (f" Rows in grey: the paper’s {study.paper_perturbed.title}, on its own images, "
                 "and ours less the paper’s.")
    return Table("Accuracy in % under other perturbations.",
                 ("Perturbation", *(study.labels[row] for row in shown)), tuple(rows),
                 _accuracy_details(study, by_row), note)


def published_by_test(study: Study, row: str) -> dict[str, tuple[float, float | None]]:
    """Returns the paper's (mean, std) for a row of ours, by noise level as the numbers name it."""
    return {test: number for key, test, number in published_accuracies(study) if key == row}


def _paper_rows(name: str, ours: Sequence, theirs: Sequence[tuple[float, float | None] | None],
                ) -> list[TableRow]:
    """Makes the rows below one of ours: the paper's (mean, std), and ours less the paper's."""
    papers = ["–" if number is None else with_spread(*number) for number in theirs]
    differences = ["–" if own is None or number is None else signed(own.mean - number[0])
                   for own, number in zip(ours, theirs, strict=True)]
    return [text_row(f"paper: {name}", papers)._replace(muted=True),
            text_row("difference", differences)._replace(muted=True)]


def _commonest_row(study: Study, num_cells: int, num_others: int = 0) -> list[TableRow]:
    """Makes the last row: the accuracy of always saying the commonest class; no row if the classes
    of the test images are not known."""
    classes = classes_of(study.all_finished())
    if classes is None:
        return []
    name, share = classes.commonest
    cells = [f"{share:.2f}"] * num_cells + ["–"] * num_others
    return [text_row(f"always “{name}”, the commonest class", cells)._replace(muted=True)]


def balanced_table(study: Study) -> Table | None:
    """Tabulates accuracies averaged over the classes; returns None where these are not known."""
    by_row, classes = accuracies(study), classes_of(study.all_finished())
    levels = levels_of(by_row)
    if classes is None:
        return None
    rows = [text_row(study.labels[row], (
        f"{values[level].balanced:.2f}" if level in values else "–" for level in levels))
        for row, values in by_row.items() if values]
    shown = sum(number > 0 for number in classes.counts)
    return Table(
        "Balanced accuracy in %: the mean of the accuracies on the images of each class.",
        ("Method", *map(str.capitalize, levels)), tuple(rows),
        note=f"How to read: always saying one class gives {100 / shown:.2f} % here, however common "
        "it is. Means over the noise draws and training seeds.", folded=not classes.uneven)


def class_table(study: Study) -> Table | None:
    """Tabulates accuracy by class, clean and at the strongest noise; returns None where the
    classes are not known."""
    by_row, classes = accuracies(study), classes_of(study.all_finished())
    levels = levels_of(by_row)
    if classes is None:
        return None
    found = over_seeds(frame(study, accuracy_numbers)).set_index(
        ["row", "measurement", "condition"])["mean"]
    columns = [(row, level) for row, values in by_row.items() if values
               for level in dict.fromkeys((levels[0], levels[-1]))]
    rows = []
    for name, number in zip(classes.names, classes.counts, strict=True):
        values = [found.get((row, f"accuracy on {name}", level)) for row, level in columns]
        rows.append(text_row(f"{name} ({count(number)} images)", (
            "–" if value is None else f"{value:.1f}" for value in values)))
    return Table(
        "Accuracy in % by class.",
        ("Class", *(f"{study.labels[row]}: {level}" for row, level in columns)), tuple(rows),
        note="How to read: the share of each class’s test images that is classified correctly. "
        "Means over the noise draws and training seeds. With few images in a class, one image more "
        "or less changes its number considerably.", folded=not classes.uneven)


def difference_table(study: Study, reference: str) -> Table | None:
    """Subtracts the accuracies of the row ``reference`` from the others'; None without that row."""
    by_row = accuracies(study)
    levels = levels_of(by_row)
    found = differences(by_row, reference, levels)
    rows = [TableRow(study.labels[row], difference_cells(ones, levels))
            for row, ones in found.items()]
    return difference_table_of(study, reference, found, "Accuracy", (
        "Method", *map(str.capitalize, levels)), rows)


def perturbation_difference_table(study: Study, reference: str) -> Table | None:
    """Does the same as :func:`difference_table` under other perturbations, which are the rows."""
    by_row = accuracies(study)
    tests = [test for test in perturbations_of(by_row) if test in by_row[reference]]
    found = differences(by_row, reference, tests)
    cells = zip(*(difference_cells(ones, tests) for ones in found.values()), strict=True)
    return difference_table_of(
        study, reference, found, "Accuracy under other perturbations",
        ("Perturbation", *(study.labels[row] for row in found)), map(TableRow, tests, cells))


def difference_table_of(
    study: Study, reference: str, found: dict[str, dict[str, Difference]], what: str,
    columns: tuple[str, ...], rows: Iterable[TableRow],
) -> Table | None:
    """Makes a table of :func:`differences` in ``what``; returns None without any."""
    if not found:
        return None
    images = max(one.images for ones in found.values() for one in ones.values())
    spread = ("; ± half of the 95 % interval over trainings, on these test images (Student’s t, "
              "from the seeds of the two rows). Bold: the interval excludes 0. With many "
              "differences one in twenty does so by chance" if several_seeds(study) else
              "; each was trained once, so that the spread over trainings is unknown")
    return Table(
        f"{what} less that of “{study.labels[reference]}”, in percentage points.", columns,
        tuple(rows), note=f"How to read: above 0 is better{spread}. Other test images may change a "
        f"difference by up to ± {images:.2f} (95 %, as if the two rows were tested on different "
        "ones).")


def differences(by_row: Accuracies, reference: str, tests: Iterable[str],
                ) -> dict[str, dict[str, Difference]]:
    """Compares each row with the reference in the tests that both have; leaves out rows without
    any."""
    peer = by_row[reference]
    found = {row: {test: difference(own[test], peer[test]) for test in tests
                   if test in own and test in peer}
             for row, own in by_row.items() if row != reference}
    return {row: ones for row, ones in found.items() if ones}


def difference_cells(found: dict[str, Difference], tests: Iterable[str]) -> tuple[Cell, ...]:
    """Formats the difference of each test with its sign, and half of its interval over trainings if
    it has one; bold if that excludes 0."""
    return tuple(Cell("–") if test not in found else Cell(
        signed((one := found[test]).points) + ("" if one.seeds is None else f" ± {one.seeds:.2f}"),
        bold=one.beyond_seeds) for test in tests)


def _accuracy_details(study: Study, by_row: Accuracies) -> str:
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
    errors = [error_of_images(one) for values in by_row.values() for one in values.values()]
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
    used = sorted({chosen for run in study.all_finished()
                   if (chosen := run.evaluation["selected_on"]) is not None})
    return f"Epoch kept: {', or '.join(words[name] for name in used)}." if used else ""


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
    if published_accuracies(study):
        text += (f" Rows in grey: the paper’s {study.paper.title}, ± standard deviation over "
                 f"{PAPER_DRAWS} noise draws, and ours less the paper’s.")
    return text + " Training time: mean over the seeds."
