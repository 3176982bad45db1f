"""What beats training on both views: accuracies, their differences from it, and what they cost.

    evaluation.json, corruptions.json, attacks.json of each run
    ─ numbers ─▶ tables by method, the Pareto front
"""

from collections.abc import Iterator

from experiments import carry_over
from experiments.recipes.methods import REFERENCE
from jaxrobust.app.measurements import attacks
from jaxrobust.app.measurements.estimates import Estimate, numbers_of, subsets_text
from jaxrobust.app.program import work_of
from jaxrobust.app.report import pictures, report, tables
from jaxrobust.app.report.frame import (
    Accuracies,
    Number,
    accuracies,
    accuracies_of,
    frame,
    noise_level,
    over_seeds,
)
from jaxrobust.app.report.page import Section, Table, TableRow, text_row
from jaxrobust.app.study.read import Run, Study

UPDATE, TRAINING = "work of an update", "work of the training"
ATTACKED = "images under attacks"


def numbers(run: Run) -> Iterator[Number]:
    """Yields what a run costs, in work of ``normal``, and the numbers of the suite."""
    if run.config is not None:
        yield Number("epochs", "", run.config.epochs, "epochs")
        yield Number(UPDATE, "", work_of(run.config), "updates of normal")
        yield Number(TRAINING, "", work_of(run.config) * run.config.epochs, "epochs of normal")
    yield from carry_over.numbers(run)
    yield from attacked_numbers(run)


def attacked_numbers(run: Run) -> Iterator[Number]:
    """Yields what all attacks together leave, and of how many images."""
    if (facts := run.facts("attacks")) is None:
        return
    yield Number(ATTACKED, "", facts["num_images"], "images")
    yield from numbers_of(_survived)(run)


def _survived(run: Run) -> Iterator[Estimate]:
    return (one for one in attacks.estimates(run) if one.measurement == attacks.ROBUST)


def section(study: Study) -> Section:
    """Makes the section."""
    by_row, corrupted = accuracies(study), carry_over.accuracies(study)
    groups = [test for test in carry_over.tests_of(corrupted) if "mean of" in test]
    attacked = accuracies_of(
        frame(study, attacked_numbers), study.labels, attacks.ROBUST, ATTACKED)
    found = [
        _cost_table(study), tables.accuracy_table(study),
        tables.difference_table(study, REFERENCE),
        *_by_method(study, by_row, tables.perturbations_of(by_row), "Accuracy under other noise"),
        *_by_method(study, corrupted, groups, "Accuracy under common corruptions",
                    f"Images: {subsets_text(study, 'corruptions')}"),
        *_by_method(study, attacked, tables.perturbations_of(attacked),
                    "Robust accuracy under AutoAttack’s ensemble", attacks.setting_text(study)),
        attacks.warnings_table(study)]
    return Section(
        "methods", study.title, " ".join(report.best_rows(study)), tuple(filter(None, found)),
        (pictures.pareto_picture(study, level_of(study, by_row)),))


def level_of(study: Study, by_row: Accuracies) -> str:
    """The noise of the picture: the lowest level tested at or above that of the training, or the
    highest of all."""
    std = next(run.config.noise_std for run in study.all_finished())
    levels = tables.levels_of(by_row)
    return next((level for level in levels if noise_level(level) >= 255 * std), levels[-1])


def _cost_table(study: Study) -> Table:
    """Tabulates epochs and work by method."""
    kinds = ("epochs", UPDATE, TRAINING)
    means = over_seeds(frame(study, numbers)).set_index(["row", "measurement"])["mean"]
    return Table(
        "What a training costs.", ("Method", *map(str.capitalize, kinds)),
        tuple(text_row(label, (f"{means[row, kind]:.3g}" for kind in kinds))
              for row, label in study.labels.items() if (row, UPDATE) in means),
        note="How to read: the work of an update in units of one of normal training, by its passes "
        "through the network; the work of the training in epochs of normal training.")


def _by_method(study: Study, by_row: Accuracies, tests: list[str], what: str, details: str = "",
               ) -> tuple[Table | None, ...]:
    """Tabulates accuracies with methods in rows and tests in columns, and their differences."""
    if not tests:
        return ()
    columns = ("Method", *tests)
    cells = tables.accuracy_cells(by_row, tests, lambda row: "–", tables.spread_of(study))
    found = tables.differences(by_row, REFERENCE, tests)
    return (
        Table(f"{what}, in %.", columns, tuple(
            TableRow(study.labels[row], cells[row]) for row, values in by_row.items() if values),
            details,
            "How to read: higher is better; bold: the best of the column."),
        tables.difference_table_of(study, REFERENCE, found, what, columns, [
            TableRow(study.labels[row], tables.difference_cells(ones, tests))
            for row, ones in found.items()]))
