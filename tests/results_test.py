"""The numbers of the README and the docs are those of the files under results/."""

import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = ("README.md", *sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")), "results/README.md")


def tables(text):
    """The Markdown tables of a text, each a list of rows of cells."""
    found = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    return [[[cell.strip() for cell in line.strip("|").split("|")]
             for line in table.splitlines() if not re.fullmatch(r"[|\-: ]+", line)]
            for table in found]


def accuracy_tables():
    """Tables of pages that follow a link to a study's report, or name its folder."""
    for page in PAGES:
        if page.startswith("docs/findings/"):  # Held to the targets' files.
            continue
        text = (ROOT / page).read_text()
        for table in tables(text):
            head = table[0]
            if any(re.fullmatch(r"\d+/255", cell) for cell in head[1:]):
                before = text[: text.index("|" + "|".join(f" {cell} " for cell in head[1:]))]
                named = re.findall(r"results/(\w+)/report\.md|reproduce (\w+)", before)
                study = next(a or b for a, b in reversed(named)
                             if (ROOT / "results" / (a or b) / "report.json").is_file())
                yield page, study, table


TABLES = list(accuracy_tables())


def test_the_accuracy_tables_are_found():
    assert {study for _, study, _ in TABLES} >= {"digits", "cifar10_small", "road_small"}


@pytest.mark.parametrize("page, study, table", TABLES,
                         ids=[f"{page}-{study}" for page, study, _ in TABLES])
def test_accuracies_are_those_of_the_report(page, study, table):
    rows = json.loads((ROOT / "results" / study / "report.json").read_text())["rows"]
    by_label = {name(row): row for row in rows}
    columns = [column(cell) for cell in table[0][1:]]
    best = {}
    for label, *cells in table[1:]:
        row = by_label[label]
        accuracy = {one["noise_std_255"]: one for one in row["accuracy"]}
        accuracy |= {one["perturbation"].split("(")[0]: one for one in row.get("perturbed", ())
                     if "+" not in one["perturbation"]}
        for key, cell in zip(columns, cells, strict=True):
            one, text = accuracy[key], cell.strip("*")
            mean, _, spread = text.partition(" ± ")
            assert mean == f"{one['mean']:.2f}", (label, key)
            std = one["std_over_seeds"] if len(row["seeds"]) > 1 else one["std_over_draws"]
            if spread:
                assert spread == f"{std:.2f}", (label, key)
            best.setdefault(key, []).append((round(one["mean"], 2), cell.startswith("**")))
    for key, found in best.items():
        top = max(mean for mean, _ in found)
        assert [bold for _, bold in found] == [mean == top for mean, _ in found], key


def name(row):
    """What a row of a report is called in the pages."""
    short = {"robust": "robust, short-schedule settings",
             "robust_paper": "robust, the paper's settings"}
    return short.get(row["row"], row["row"])


def column(cell):
    """The noise level or the perturbation of a column."""
    words = {"clean": 0, "down-up": "down_up"}
    level = re.fullmatch(r"(\d+)/255", cell)
    return float(level[1]) if level else words.get(cell, cell)


def findings():
    """Each page of findings with the tables of the targets whose commands it names, and of the
    reports that it links to."""
    for page in PAGES:
        if page.startswith("docs/findings/") and not page.endswith("README.md"):
            text = (ROOT / page).read_text()
            made = [table for target, scale in re.findall(r"reproduce (\w+) --scale (\w+)", text)
                    for table in json.loads((ROOT / "results" / scale / target / f"{target}.json")
                                            .read_text())["tables"]]
            for study in set(re.findall(r"results/(\w+)/report\.md", text)):
                report = re.sub(r"\\(.)", r"\1", (
                    ROOT / "results" / study / "report.md").read_text())
                made += [{"columns": columns, "rows": rows} for columns, *rows in tables(report)]
            yield page, made


FINDINGS = list(findings())


@pytest.mark.parametrize("page, made", FINDINGS, ids=[page for page, _ in FINDINGS])
def test_the_tables_of_a_finding_are_those_of_its_targets_and_reports(page, made):
    cells = {}
    for table in made:
        for head, *values in table["rows"]:
            for column, value in zip(table["columns"][1:], values, strict=True):
                cells.setdefault((head, column.lower()), set()).add(value.strip("*"))
    found = tables((ROOT / page).read_text())
    assert made and found
    for (_, *columns), *rows in found:
        for head, *values in rows:
            for column, value in zip(columns, values, strict=True):
                assert value.strip("*") in cells.get((head, column.lower()), ()), (head, column)


def report_tables():
    """Tables of the README and the docs, of anything, that follow a link to a study's report within
    the same section."""
    for page in PAGES:
        if not page.startswith("docs/findings/"):
            text = (ROOT / page).read_text()
            for link in re.finditer(
                    r"results/(\w+)/report\.md\)[^|#]*\n\n?((?:\|.*\|\n)+)", text):
                yield page, link[1], tables(link[2])[0]


REPORTED = list(report_tables())


@pytest.mark.parametrize("page, study, table", REPORTED,
                         ids=[f"{page}-{study}" for page, study, _ in REPORTED])
def test_every_number_of_a_table_is_one_of_its_report(page, study, table):
    report = (ROOT / "results" / study / "report.md").read_text()
    known = {number for made in tables(report) for row in made for cell in row
             for number in numbers(cell)}
    found = [number for _, *cells in table[1:] for cell in cells for number in numbers(cell)]
    assert found and set(found) <= known, (page, set(found) - known)


def numbers(cell):
    """Those of a cell, as they are written but for the commas of thousands."""
    return [text.replace(",", "")
            for text in re.findall(r"[−+]?\d[\d,]*\.?\d*(?:e[+-]\d+)?", cell)]


def test_the_tables_of_curvature_are_found():
    assert any("exact" in table[0][1] for _, _, table in REPORTED)


def benchmark_tables():
    """Tables of the README and the docs that follow a link to a benchmark's page."""
    for page in PAGES[:-1]:
        text = (ROOT / page).read_text()
        for link in re.finditer(
                r"results/(bench\w*)/\w+\.md\)\)[^|]*\n\n?((?:\|.*\|\n)+)", text):
            yield page, link[1], tables(link[2])[0]


BENCHMARKS = list(benchmark_tables())


def test_the_benchmark_tables_are_found():
    assert {folder for _, folder, _ in BENCHMARKS} >= {
        "bench_curvature", "bench_folder"}


@pytest.mark.parametrize("page, folder, table", BENCHMARKS,
                         ids=[f"{page}-{folder}" for page, folder, _ in BENCHMARKS])
def test_every_number_of_a_benchmark_is_one_of_its_file(page, folder, table):
    file, = (path for path in (ROOT / "results" / folder).glob("*.json")
             if path.name in ("bench.json", "folder.json"))
    known = list(central(json.loads(file.read_text())))
    for _, *cells in table[1:]:
        for cell in cells:
            for text in re.findall(r"\d[\d,]*\.?\d*", cell):
                digits = len(text.partition(".")[2])
                value = float(text.replace(",", ""))
                # As it is, or rounded to the digits shown.
                assert any(abs(one - value) <= 0.5000001 * 10**-digits for one in known), (
                    page, cell, text)


def central(value):
    """The ratios and medians of a benchmark, of which its tables are made."""
    if isinstance(value, dict):
        yield from (value[name] for name in ("ratio", "median") if name in value)
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from central(one)


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_links_to_is_there(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]*)?\)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target


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
        assert path.is_dir() or path.stat().st_size < 1e6, path
