"""The numbers of the README and the docs are those of the files under results/."""

import json
import pathlib
import re

import markdown
import pytest

import experiments.paper  # noqa: F401  Its tables, which studies are compared with.
from experiments import carry_over
from jaxrobust.app.measurements.corruptions import ACCURACY
from jaxrobust.app.report import frame, report, tables
from jaxrobust.app.study.read import load_study, with_rows

ROOT = pathlib.Path(__file__).parents[2]
FOLDERS = sorted(path.parent for pattern in ("*/report.csv", "small/*/*.csv")
                 for path in (ROOT / "results").glob(pattern))
OF_NETWORKS = ("corruptions", "survival")
"""Targets that are made from the runs in results/networks."""


@pytest.fixture(name="parts", params=FOLDERS, ids=[path.name for path in FOLDERS])
def _parts(request):
    """Of a report or of a target, for each of its studies: text, numbers and the study."""
    folder = request.param
    page, = (path for path in folder.glob("*.md") if path.stem in ("report", folder.name))
    numbers, text = frame.read_csv(page.with_suffix(".csv")), page.read_text()
    place = ROOT / "results" / ("networks" if folder.name in OF_NETWORKS else "")
    found = [load_study(place / name) for name in numbers.study.unique()]
    texts = [text] if len(found) == 1 else [
        re.search(rf"^## {re.escape(study.title)}$.*?(?=^## |\Z)", text, re.M | re.S)[0]
        for study in found]
    return [(part, numbers[numbers.study == study.name], study)
            for part, study in zip(texts, found, strict=True)]


def test_there_is_a_table_of_numbers_for_each_report_and_target():
    # A picture alone has none.
    made = {path.name for path in (ROOT / "results" / "small").iterdir()} - {"figure1", "figure11"}
    reports = {path.parent.name for path in (ROOT / "results").glob("*/report.md")}
    assert {path.name for path in FOLDERS} == made | reports and len(made) > 15


def test_the_numbers_are_those_of_the_runs(parts):
    for _, numbers, study in parts:
        key = ["row", "seed", "measurement", "condition", "draw"]
        there = numbers.set_index(key).value.to_dict()
        part = with_rows(study, [row for row in numbers.row.unique() if row])
        found = report.numbers_of(part)
        for line in found[found.measurement.isin(numbers.measurement)].itertuples():
            assert there[line.row, line.seed, line.measurement, line.condition, line.draw] == (
                pytest.approx(line.value, rel=1e-8, nan_ok=True)), line


def test_a_page_shows_its_numbers(parts):
    for text, numbers, study in parts:
        tables_show(text, numbers, study)


def tables_show(text, numbers, study):
    rows = {label: row for row, label in study.labels.items()}
    noisy = frame.accuracies_of(numbers, study.labels)
    corrupted = frame.accuracies_of(numbers, study.labels, ACCURACY, carry_over.IMAGES)
    spread = "std_over_seeds" if tables.several_seeds(study) else "std_over_draws"
    for caption, (head, *lines) in markdown.tables(text):
        if not re.match("Accuracy (in %[, ]|less|under)(?!.*class)", caption):
            continue
        # Perturbations are the rows of their tables, noise levels the columns.
        if head[0] == "Perturbation":
            head, *lines = zip(head, *(line for line in lines if not line[0].startswith("*")),
                               strict=True)
        by_row = corrupted if "common corruptions" in caption else noisy
        chosen = [index for index, name in enumerate(head) if index and name != "Training time"]
        tests = [head[index].rpartition(": ")[2].lower() for index in chosen]
        if "less that of" in caption:
            found = tables.differences(by_row, rows[re.search("“(.*)”", caption)[1]], tests)
            cells = {row: tables.difference_cells(ones, tests) for row, ones in found.items()}
        else:
            cells = tables.accuracy_cells(by_row, tests, lambda row: "diverged", spread)
        checked = 0
        for line in lines:
            if line[0] in rows:
                assert [line[index] for index in chosen] == [
                    f"**{cell.text}**" if cell.bold else cell.text
                    for cell in cells[rows[line[0]]]], (study.name, line[0])
                checked += 1
        assert checked


def test_every_result_names_what_made_it():
    found = 0
    for path in (ROOT / "results").rglob("provenance.json"):
        facts = json.loads(path.read_text())
        assert {"command", "commit", "started", "hardware", "versions"} <= set(facts)
        assert "seconds" in facts or (path.parent / "diverged.json").is_file()
        assert re.fullmatch(r"[0-9a-f]{40}( \(with changes\))?", facts["commit"]), path
        found += 1
    assert found >= 20
    for path in (ROOT / "results").rglob("*"):
        if path.suffix in (".json", ".md", ".csv", ".jsonl"):
            assert not re.search(r"/(tmp|root|home)/", path.read_text()), path
        # 42 methods, three seeds, every class and corruption.
        most = 3e6 if path.parent.name == "methods" else 1e6
        assert path.is_dir() or path.stat().st_size < most, path
