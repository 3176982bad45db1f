"""The tables of the README and the docs are made from the numbers under results/, and each
guarantee names its tests."""

import ast
import json
import re

import pytest
from command_line import call, one_line

from experiments import readme
from jaxrobust.app.config import InputError
from jaxrobust.app.report import frame

PAGES = {str(path.relative_to(readme.ROOT)): path for path in readme.pages()}


@pytest.mark.parametrize("page", PAGES)
def test_no_table_is_stale(page):
    text = PAGES[page].read_text()
    assert readme.generated(text) == text, "python -m experiments readme writes it anew"


@pytest.mark.parametrize("page", PAGES)
def test_no_accuracy_is_typed_by_hand(page):
    text = readme.MARKED.sub("", PAGES[page].read_text())
    assert "<!-- table" not in text and "<!-- end" not in text
    for line in text.splitlines():
        if line.startswith("|"):
            assert not re.search(r"\d\.\d\d ± \d|\| \d+/255 \|", line), line


GUARANTEES = readme.ROOT / "docs" / "guarantees.md"
_NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def promises(text):
    """Each item of the lists on a page, its lines joined."""
    return [" ".join(item.split()) for item in
            re.findall(r"^- (.*(?:\n +\S.*)*)", text, re.MULTILINE)]


@pytest.mark.parametrize("heading", re.findall(r"^## (.+)$", GUARANTEES.read_text(), re.MULTILINE))
def test_every_guarantee_names_a_test_that_exists(heading):
    section = GUARANTEES.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = promises(section)
    assert found and section.count("::") == len(_NAMED.findall(section))
    for promise in found:
        named = _NAMED.findall(promise)
        assert named, f"names no test: {promise}"
        for path, name in named:
            functions = {node.name for node in ast.parse((readme.ROOT / path).read_text()).body
                         if isinstance(node, ast.FunctionDef)}
            assert name in functions, f"{path} has no test {name}: {promise}"


def test_promises_are_the_items_of_lists():
    assert promises("# A\n\nNo - list.\n\n- One\n  `x`\n- Two\n\n## B\n\n- Three\n") == [
        "One `x`", "Two", "Three"]


@pytest.fixture(name="root")
def _root(tmp_path, monkeypatch):
    """Results of two rows, and a page without its table."""
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    folder = tmp_path / "results" / "toy"
    folder.mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    (folder / "study.json").write_text(json.dumps(
        {"rows": {"both": "Training on both", "robust": "Robust, small"}}))
    lines = [("toy", row, seed, "accuracy", test, value, "%", draw)
             for row, by_test in (
                 ("both", {"clean": ((90.0,), (92.0,)), "8/255": ((80.0, 82.0), (84.0, 86.0))}),
                 ("robust", {"clean": ((91.0,), (91.0,)), "8/255": ((70.0, 71.0), (72.0, 73.0)),
                             "stripes(3,2)": ((50.0,), (52.0,))}))
             for test, by_seed in by_test.items() for seed, draws in enumerate(by_seed)
             for draw, value in enumerate(draws)]
    lines += [("toy", row, seed, "test images", "", 100, "images", None)
              for row in ("both", "robust") for seed in (0, 1)]
    (folder / "report.csv").write_text(frame.to_csv(frame.table(lines)))
    return tmp_path


def page(mark):
    return f"Before.\n\n<!-- table: {mark} -->\n| old |\n<!-- end -->\n\nAfter.\n"


def test_a_table_is_made_from_the_numbers(root):
    # Seeds 90, 92 and 81, 85: spread sqrt(2) and sqrt(8); 91, 91 and 70.5, 72.5: 0 and sqrt(2).
    assert readme.generated(page("toy accuracy names=short")) == """Before.

<!-- table: toy accuracy names=short -->
| | clean | 8/255 |
|---|---:|---:|
| both | **91.00 ± 1.41** | **83.00 ± 2.83** |
| robust, small | **91.00 ± 0.00** | 71.50 ± 1.41 |
<!-- end -->

After.
"""
    assert "| stripes | – | **51.00 ± 1.41** |" in readme.generated(
        page("toy perturbations tests=stripes"))
    # With two seeds a difference has no interval.
    assert "| Robust, small | +0.00 | −11.50 |" in readme.generated(
        page("toy differences reference=both"))


def test_what_is_stale_is_named_and_written_anew(root, capsys):
    (root / "README.md").write_text(page("toy accuracy"))
    (root / "docs" / "fine.md").write_text("| a | table |\n")
    assert call("readme", "--check") == 2
    assert "README.md" in (said := one_line(capsys)) and "fine.md" not in said
    assert "| old |" in (root / "README.md").read_text()
    assert call("readme") == 0 and "| old |" not in (root / "README.md").read_text()
    assert call("readme", "--check") == 0


def test_a_mark_of_nothing_is_an_input_error(root):
    with pytest.raises(InputError, match="kind of table"):
        readme.generated(page("toy accuracies"))
    with pytest.raises(InputError, match="numbers or runs in results/other"):
        readme.generated(page("other accuracy"))
    with pytest.raises(InputError, match="page with a table below 'Times' in results/toy/bench.md"):
        readme.generated(page("toy/bench.md copied heading=Times"))


def test_a_table_of_a_benchmark_is_copied_from_its_page(root):
    (root / "results" / "toy" / "bench.md").write_text(
        "# Times\n\n| no | table |\n\n## Ratios\n\nWords.\n\n"
        "|  | of | ratio |\n| --- | --- | ---: |\n"
        "| a | x / y | 2.0 |\n| b | y / z | 3.0 |\n\n| other | table |\n")
    text = readme.generated(page('toy/bench.md copied heading=Ratios rows=b columns=";ratio"'))
    assert "-->\n| | ratio |\n|---|---:|\n| b | 3.0 |\n<!-- end" in text


def test_a_table_of_a_page_is_found_by_its_caption(root):
    (root / "results" / "toy" / "bench.md").write_text(
        "# Times\n\n**First.** Details.\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\n"
        "**Second, of others.** Details.\n\n| c | d |\n| --- | --- |\n| 3 | 4 |\n\nNote.\n")
    assert "\n| c | d |\n|---|---:|\n| 3 | 4 |\n<!-- end" in readme.generated(
        page("toy/bench.md copied caption=Second"))
    with pytest.raises(InputError, match="below 'Third' in results/toy/bench.md"):
        readme.generated(page("toy/bench.md copied caption=Third"))
