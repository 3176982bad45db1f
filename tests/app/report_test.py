"""The report of a study: its numbers, its words, and that it is one file and reproducible."""

import csv
import dataclasses
import html
import html.parser
import json
import re
import shutil
import statistics
import types

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from command_line import call, one_line

from jaxrobust.app.config import InputError, RunConfig, to_json
from jaxrobust.app.measurements import curvature
from jaxrobust.app.report import comparison, figures, frame, page, report, tables
from jaxrobust.app.study import read

LABELS = {"both": "Training on both", "robust": "Robust <&> |method|"}
LEVELS = (0, 2)
ONE_SEED = {
    ("both", 0): ([0.90], [0.80, 0.84]),
    ("robust", 0): ([0.89], [0.85, 0.87]),
}
THREE_SEEDS = {
    ("both", 0): ([0.90], [0.70, 0.72]), ("robust", 0): ([0.92], [0.70, 0.74]),
    ("both", 1): ([0.90], [0.72, 0.74]), ("robust", 1): ([0.94], [0.73, 0.75]),
    ("both", 2): ([0.90], [0.74, 0.76]), ("robust", 2): ([0.96], [0.70, 0.72]),
}


def write_study(folder, accuracies, *, seeds, selected_on="last", num_images=500, classes=None,
                by_class=None, **changes):
    """A study of two rows; ``accuracies`` by (row, seed): the draws at each of LEVELS."""
    folder.mkdir()
    study = {
        "name": "toy", "title": "Toy <study>", "note": "First & foremost.\n\nSecond paragraph.",
        "paper_table": "table1", "seeds": seeds, "rows": LABELS,
        "methods": {row: row for row in LABELS}, "paper_rows": {"robust": "robust"},
        "evaluation": {}, "command": "python -m experiments reproduce toy", "commit": "abc"}
    (folder / "study.json").write_text(json.dumps(study | changes))
    for (row, seed), draws in accuracies.items():
        write_run(folder / f"{row}-seed{seed}", row, seed, draws, selected_on, num_images, classes,
                  by_class)


def write_run(run, row, seed, draws, selected_on, num_images=500, classes=None, by_class=None):
    rng = np.random.default_rng([seed, len(row)])
    run.mkdir()
    (run / "config.json").write_text(to_json(
        RunConfig(method=row, seed=seed, epochs=2, select="last")))
    write_json(run / "provenance.json", {
        "command": "python -m experiments reproduce toy", "commit": "abc",
        "started": "2026-01-02T03:04:05", "seconds": 65.0, "hardware": f"machine {seed}",
        "versions": {"jax": "0.10.2"}, "platform": "cpu"})
    (run / "metrics.jsonl").write_text(
        '{"epoch": 1, "loss": 2.0, "softmax": 1.0, "selection_accuracy": 0.5}\n'
        '{"epoch": 2, "loss": 1.0, "softmax": 0.5, "selection_accuracy": 0.6}\n'
        '{"epoch": 3, "lo')
    write_json(run / "evaluation.json", {
        "epoch": 2, "selected_on": selected_on, "split": "test", "num_images": num_images,
        "num_draws": 2, **({} if classes is None else {"classes": classes}),
        "levels": [{"std_255": level, "accuracies": list(values),
                    **({} if by_class is None else {"by_class": by_class})}
                   for level, values in zip(LEVELS, draws, strict=True)]})
    np.savez(run / "curvature.npz", frobenius_squared=np.array([0.0, 1.0, 3.0, 100.0]),
             finite_difference=np.array([10.0, 20.0, 30.0, 40.0]))
    write_json(run / "curvature.json", {"num_images": 4, "num_probes": 20, "step": 1e-2,
                                        "with_respect_to": "pixels in [0, 1]", "median": {
                                            "frobenius_squared": 2.0, "finite_difference": 25.0}})
    np.savez(run / "features.npz", clean=rng.normal(size=(12, 5)), noisy=rng.normal(size=(12, 5)),
             labels=np.arange(12) % 3, noise="std 2/255")


def write_json(path, values):
    path.write_text(json.dumps(values))


class Page(html.parser.HTMLParser):
    """Collects the rows of the tables, the tags and attributes, and the text in bold."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.attributes, self.tags, self.bold, self.text = [], [], [], [], ""
        self._in_cell = self._in_bold = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True
        self._in_bold = tag == "strong"

    def handle_endtag(self, tag):
        self._in_cell = self._in_cell and tag not in ("td", "th")
        self._in_bold = False

    def handle_data(self, data):
        self.text += data
        if self._in_cell:
            self.rows[-1][-1] += data.strip()
        if self._in_bold:
            self.bold.append(data)


@pytest.fixture(scope="module")
def one_seed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "study"
    write_study(folder, ONE_SEED, seeds=[0])
    return folder, report.write_report(folder).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def three_seeds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three") / "study"
    write_study(folder, THREE_SEEDS, seeds=[0, 1, 2])
    return folder, report.write_report(folder).read_text(encoding="utf-8")


def table_rows(page, head):
    return [row for row in Page(page).rows if row[0] == head]


def test_one_seed_gives_mean_and_spread_over_draws(one_seed):
    _, page = one_seed
    # std of (80, 84) with ddof=1: sqrt(8); a single clean evaluation has none.
    assert table_rows(page, LABELS["both"])[0] == [
        LABELS["both"], "90.00", "82.00 ± 2.83", "1 min 05 s"]
    assert table_rows(page, LABELS["robust"])[0][1:3] == ["89.00", "86.00 ± 1.41"]
    assert "standard deviation over the noise draws" in page
    assert "spread over trainings is unknown" in page


def test_three_seeds_give_mean_and_spread_over_trainings(three_seeds):
    folder, page = three_seeds
    # robust, clean: 92, 94, 96; at 2/255 the means over draws 72, 74, 71 (std sqrt(7/3)).
    assert table_rows(page, LABELS["robust"])[0][1:3] == ["94.00 ± 2.00", "72.33 ± 1.53"]
    assert table_rows(page, LABELS["both"])[0][1:3] == ["90.00 ± 0.00", "73.00 ± 2.00"]
    found, = (line for line in json.loads((folder / "report.json").read_text())["numbers"] if (
        line["row"], line["measurement"], line["condition"]) == ("robust", "accuracy", "2/255"))
    assert found["mean"] == pytest.approx(72 + 1 / 3) and found["unit"] == "%"
    assert found["by_seed"] == pytest.approx([72, 74, 71])
    # stds over draws: 2 sqrt(2), sqrt(2), sqrt(2).
    assert found["std_over_draws"] == pytest.approx(4 * 2**0.5 / 3)
    assert found["std_over_seeds"] == pytest.approx((7 / 3) ** 0.5)


def test_every_number_is_a_line_of_the_csv_file(three_seeds):
    folder, _ = three_seeds
    with (folder / "report.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == ["study", "row", "seed", "measurement", "condition", "draw", "value",
                              "unit"]

    def values(*key):
        names = ("row", "seed", "measurement", "condition", "unit")
        return [(line["draw"], float(line["value"])) for line in lines
                if tuple(line[name] for name in names) == key]

    assert values("robust", "1", "accuracy", "2/255", "%") == [("0", 73), ("1", 75)]
    assert values("robust", "1", "accuracy", "clean", "%") == [("0", 94)]
    assert values("robust", "", "published accuracy", "2/255", "%") == [("", 92.70)]
    assert values("robust", "", "published standard deviation over draws", "clean", "%") == []
    assert values("both", "2", "training time", "", "s") == [("", 65)]
    assert values("both", "2", "epoch kept", "", "epoch") == [("", 2)]
    assert values("both", "2", "test images", "", "images") == [("", 500)]
    # Of 0, 1, 3, 100.
    for measurement, value, unit in (("median curvature", 2, "1/pixel⁴"),
                                     ("mean curvature", 26, "1/pixel⁴"),
                                     ("curvatures of zero or less", 1, "images")):
        assert values("both", "2", measurement, "Exact Hessian", unit) == [("", value)]
    # What is read is what was written.
    assert frame.to_csv(frame.read_csv(folder / "report.csv")) == (
        folder / "report.csv").read_text()


def test_what_is_not_known_is_read_as_it_was_and_in_no_summary(tmp_path):
    lines = [("toy", "both", seed, what, "", value, "", None) for what, values in (
        ("gone", (float("nan"),)), ("one gone", (1.0, float("nan"), 3.0)))
        for seed, value in enumerate(values)]
    table = frame.table(lines)
    (tmp_path / "report.csv").write_text(frame.to_csv(table))
    pd.testing.assert_frame_equal(frame.read_csv(tmp_path / "report.csv"), table)
    found, = frame.summary(table)
    assert found["measurement"] == "one gone" and found["by_seed"] == (1, 3)
    assert json.loads(json.dumps(found, allow_nan=False))["mean"] == 2


def test_the_numbers_of_several_studies_name_their_study():
    lines = [(study, "both", 0, "accuracy", "clean", value, "%", None)
             for study, value in (("toy", 1.0), ("other", 2.0))]
    assert [(one["study"], one["mean"]) for one in frame.summary(frame.table(lines))] == [
        ("toy", 1), ("other", 2)]
    assert all("study" not in one for one in frame.summary(frame.table(lines[:1])))


def test_summary_says_where_the_difference_is_beyond_its_interval(three_seeds):
    folder, _ = three_seeds
    best_and_basis, comparison = json.loads((folder / "report.json").read_text())["summary"]
    assert "Best on clean images: “Robust <&> |method|”, with 94.00 %." in best_and_basis
    assert "Best at the strongest noise (2/255): “Training on both”, with 73.00 %" in best_and_basis
    # Trainings: pooled sqrt((0 + 4) / 2) = 1.41 and sqrt((4 + 7/3) / 2) = 1.78; times
    # 2.776 sqrt(2/3). 500 test images: 1.96 sqrt(p q / 502 + ...) of the shares 471 / 502 and
    # 451 / 502, and 362.67 / 502 and 366 / 502. Together: sqrt(3.206^2 + 3.379^2) = 4.66 and
    # sqrt(4.034^2 + 5.519^2) = 6.84.
    assert ("no clear difference at 2 of 2 levels: clean (+4.00 ± 4.66), 2/255 (−0.67 ± 6.84)."
            in comparison)


@pytest.mark.usefixtures("pictures_left_out")
def test_with_many_test_images_a_difference_beyond_the_trainings_is_called_clear(tmp_path):
    write_study(tmp_path / "study", THREE_SEEDS, seeds=[0, 1, 2], num_images=50_000)
    report.write_report(tmp_path / "study")
    _, comparison = json.loads((tmp_path / "study" / "report.json").read_text())["summary"]
    # sqrt(3.2059^2 + 0.3356^2), and sqrt(4.0341^2 + 0.5523^2).
    assert "clearly better at 1 of 2 levels: clean (+4.00 ± 3.22)" in comparison
    assert "no clear difference at 1 of 2 levels: 2/255 (−0.67 ± 4.07)" in comparison


def test_summary_of_one_seed_does_not_claim_a_clear_difference(one_seed):
    folder, _ = one_seed
    _, comparison = json.loads((folder / "report.json").read_text())["summary"]
    # 500 test images, shares 431 / 502 and 411 / 502: 1.96 sqrt(2.419e-4 + 2.956e-4) = 4.54 points;
    # 446 / 502 and 451 / 502: 1.96 sqrt(1.972e-4 + 1.818e-4) = 3.82.
    assert "higher at 1 of 2 levels: 2/255 (+4.00 ± 4.54)" in comparison
    assert "lower at 1 of 2 levels: clean (−1.00 ± 3.82)" in comparison
    assert "± of the test images alone" in comparison and "unknown" in comparison
    assert "clear" not in comparison


@pytest.mark.usefixtures("pictures_left_out")
def test_two_seeds_against_one_are_not_told_in_words(tmp_path):
    # Two that tied, which alone would give an interval of 0, and two that are far apart, which
    # with one degree of freedom would give one of 100 points.
    for name, robust in (("tied", [0.90, 0.90]), ("apart", [0.80, 0.92])):
        write_study(tmp_path / name, {
            ("both", 0): ([0.94], [0.7]),
            **{("robust", seed): ([clean], [0.7]) for seed, clean in enumerate(robust)}},
            seeds=[0, 1])
        report.write_report(tmp_path / name)
        _, comparison = json.loads((tmp_path / name / "report.json").read_text())["summary"]
        assert "clear" not in comparison and "lower at 1 of 2 levels: clean" in comparison
        half = float(comparison.split("clean (")[1].split("± ")[1].split(")")[0])
        assert 3 < half < 5


def accuracy(*means, num_images):
    """A line of accuracies, by hand."""
    return types.SimpleNamespace(mean=statistics.fmean(means), by_seed=means,
                                 num_images=num_images)


def test_a_difference_holds_trainings_and_test_images():
    own, peer = accuracy(90, 92, 94, num_images=998), accuracy(80, 82, 84, num_images=398)
    found = comparison.difference(own, peer)
    # Student's t of 4 degrees of freedom, s = 2; 919.16 of 1,000 and 327.36 of 400 images are
    # right, with one more on either side.
    assert found.points == 10
    assert found.seeds == pytest.approx(2.776445 * 2 * (2 / 3) ** 0.5, rel=1e-6)
    errors = 0.91916 * 0.08084 / 1000 + 0.8184 * 0.1816 / 400
    assert found.images == pytest.approx(100 * 1.959964 * errors**0.5, rel=1e-6)
    assert found.half == pytest.approx((found.seeds**2 + found.images**2) ** 0.5)
    assert found.clear and found.beyond_seeds
    wide = comparison.difference(own, accuracy(80, 82, 84, num_images=8))
    assert not wide.clear and wide.beyond_seeds
    two = comparison.difference(own, accuracy(80, 80, num_images=398))
    assert two.seeds is None and two.half == two.images and not two.clear


@pytest.mark.usefixtures("pictures_left_out")
def test_uneven_classes_are_told_of(tmp_path):
    classes = {"names": ["cat", "dog", "emu"], "counts": [400, 100, 0]}
    write_study(tmp_path / "study", ONE_SEED, seeds=[0], classes=classes,
                by_class=[1.0, 0.5, None])
    page = report.write_report(tmp_path / "study").read_text()
    # 400 of 500; (1 + 0.5) / 2, the class without test images apart.
    assert "80.0 % of the test images are of the class “cat”" in page
    assert table_rows(page, "always “cat”, the commonest class")[0][1:] == ["80.00", "80.00", "–"]
    assert table_rows(page, LABELS["both"])[1] == [LABELS["both"], "75.00", "75.00"]
    assert table_rows(page, "dog (100 images)")[0][1:] == ["50.0"] * 4
    assert table_rows(page, "emu (0 images)")[0][1:] == ["–"] * 4
    # Accuracies 90 and 89 when clean, 82 and 86 at 2/255.
    assert "Balanced accuracy is far below accuracy" in page
    assert f"“{LABELS['both']}” (75.00 % against 90.00 %)" in html.unescape(page)
    found = frame.read_csv(tmp_path / "study" / "report.csv").set_index("measurement")
    assert set(found.loc["balanced accuracy"].value) == {75}
    assert set(found.loc["accuracy on dog"].value) == {50}
    assert "accuracy on emu" not in found.index


def test_an_evaluation_in_a_line():
    assert comparison.evaluation_text({
        "num_images": 2020, "classes": {"names": ["rare", "often"], "counts": [10, 2010]},
        "levels": [{"std_255": 0, "accuracies": [2010 / 2020], "by_class": [0.0, 1.0]}],
        "perturbations": [{"perturb": "stripes(1,1)", "accuracies": [0.5, 0.7],
                           "by_class": [0.2, 0.6]}]}) == (
        # 2,010 of 2,020; the class that is never found counts as much as the other.
        "Accuracy on 2,020 test images: clean 99.50 % (balanced 50.00 %), stripes(1,1) 60.00 % "
        "(balanced 40.00 %), always “often” 99.50 %.")


@pytest.mark.usefixtures("pictures_left_out")
def test_even_classes_are_shown_without_a_warning(tmp_path, one_seed):
    write_study(tmp_path / "study", ONE_SEED, seeds=[0], by_class=[0.9, 0.8],
                classes={"names": ["cat", "dog"], "counts": [255, 245]})
    page = report.write_report(tmp_path / "study").read_text()
    assert "of the class" not in page and "far below" not in page
    assert "Balanced accuracy in %" in page and "commonest class" in page
    # Evaluations that know no classes.
    assert "alanced accuracy" not in one_seed[1] and "commonest class" not in one_seed[1]


def test_runs_of_different_data_are_not_shown_side_by_side(tmp_path, capsys):
    write_study(tmp_path / "study", ONE_SEED, seeds=[0])
    run, other = (tmp_path / "study" / f"{row}-seed0" for row in LABELS)
    for change in ({"dataset": "cifar10"}, {"dataset": "folder:x"}):
        (other / "config.json").write_text(to_json(dataclasses.replace(
            RunConfig(method="robust", epochs=2, select="last"), **change)))
        for command in ("report", "figures"):
            assert call(command, run, other) == 2
            assert ("Expected runs with one test set, got" in (said := one_line(capsys))
                    and f"with dataset={change['dataset']}" in said) or command == "figures"


def test_a_report_of_runs_names_its_classes_command_and_commit(tmp_path):
    write_study(tmp_path / "study", ONE_SEED, seeds=[0], class_names=["0", "1", "cat"])
    runs = [tmp_path / "study" / f"{row}-seed0" for row in LABELS]
    assert read.study_of_runs(runs).class_names == {0: "0", 1: "1", 2: "2 cat"}
    assert call("report", *runs) == 0
    page = (tmp_path / "study" / "report" / "report.html").read_text()
    (_, command), = table_rows(page, "Command of the report")
    assert command.startswith("python -m experiments report ")
    (_, commit), = table_rows(page, "Commit of the report")
    assert commit
    # What an evaluation says is nearer than the study.
    write_json(runs[0] / "evaluation.json", json.loads(
        (runs[0] / "evaluation.json").read_text()) | {
            "classes": {"names": ["ant", "bee"], "counts": [1, 1]}})
    assert read.study_of_runs(runs).class_names == {0: "0 ant", 1: "1 bee"}


def test_paper_row_follows_ours_at_the_same_levels(one_seed):
    rows = Page(one_seed[1]).rows
    below = rows[rows.index(table_rows(one_seed[1], LABELS["robust"])[0]) + 1]
    assert below == ["paper: Robust (the paper's method)", "92.67", "92.70 ± 0.05", "–"]
    ours = table_rows(one_seed[1], LABELS["robust"])[0]
    difference = rows[rows.index(below) + 1]
    assert difference == ["difference", *(
        f"{float(ours[1 + place].split()[0]) - mean:+.2f}".replace("-", "−")
        for place, mean in enumerate((92.67, 92.70))), "–"]
    assert not table_rows(one_seed[1], "paper: Training on both clean and noisy images")


@pytest.mark.usefixtures("pictures_left_out")
def test_a_row_that_diverged_says_so_and_the_others_are_compared(tmp_path):
    write_study(tmp_path / "study", {("both", 0): ([0.9], [0.7])}, seeds=[0])
    gone = tmp_path / "study" / "robust-seed0"
    gone.mkdir()
    (gone / "config.json").write_text(to_json(
        RunConfig(method="robust", epochs=9, select="last")))
    write_json(gone / "diverged.json", {"epoch": 3, "message": "The loss is nan."})
    page = report.write_report(tmp_path / "study").read_text()
    assert table_rows(page, LABELS["robust"])[0][1:] == ["diverged", "diverged", "–"]
    assert "seed 0: diverged in epoch 3 of 9" in page


@pytest.mark.usefixtures("pictures_left_out")
def test_any_runs_make_a_report_in_which_seeds_are_together(tmp_path, capsys):
    write_study(tmp_path / "study", THREE_SEEDS, seeds=[0, 1, 2])
    folders = [tmp_path / "study" / f"{row}-seed{seed}" for row in ("robust", "both")
               for seed in (2, 0, 1)]
    assert call("report", *folders) == 0
    out = tmp_path / "study" / "report"
    assert f"The report is in {out / 'report.html'}" in capsys.readouterr().out
    content = json.loads((out / "report.json").read_text())
    rows = content["rows"]
    assert [(row["label"], row["seeds"]) for row in rows] == [
        ("robust", [0, 1, 2]), ("both", [0, 1, 2])]
    means = [statistics.fmean(draws[1]) for (row, _), draws in THREE_SEEDS.items()
             if row == "robust"]
    found, = (line for line in content["numbers"] if line["row"] == rows[0]["row"]
              and (line["measurement"], line["condition"]) == ("accuracy", "2/255"))
    assert found["mean"] == pytest.approx(100 * statistics.fmean(means))
    assert found["std_over_seeds"] == pytest.approx(100 * statistics.stdev(means))
    assert call("report", *folders[:2], "--out", tmp_path / "some") == 0
    assert len(json.loads((tmp_path / "some" / "report.json").read_text())["rows"]) == 1


def test_a_report_of_what_are_no_runs_or_the_same_is_one_line(tmp_path, capsys):
    write_study(tmp_path / "study", ONE_SEED, seeds=[0])
    run = tmp_path / "study" / "both-seed0"
    shutil.copytree(run, tmp_path / "copy")
    for arguments, expected in (
            ((), "Expected the folder of a study, or folders of runs, got none."),
            ((run, tmp_path / "copy"), "Expected different runs, got "),
            ((run, tmp_path), f"Expected a run in {tmp_path}, found no config.json"),
            ((tmp_path / "study", "--out", tmp_path / "out"), "Expected out only with runs")):
        assert call("report", *arguments) == 2
        assert expected in one_line(capsys)


@pytest.mark.filterwarnings("ignore:Precision loss")  # SciPy, of three equal numbers.
def test_differences_have_the_interval_of_the_t_test(three_seeds):
    study = report.load_study(three_seeds[0])
    table = tables.difference_table(study, "both")
    row, = table.rows
    assert row.head == LABELS["robust"] and "“Training on both”" in table.caption
    for level, cell in enumerate(row.cells):
        own, peer = ([100 * np.mean(draws[level]) for (name, _), draws in THREE_SEEDS.items()
                      if name == wanted] for wanted in ("robust", "both"))
        test = scipy.stats.ttest_ind(own, peer)
        low, high = test.confidence_interval(0.95)
        difference, half = cell.text.replace("−", "-").split(" ± ")
        assert float(difference) == pytest.approx((low + high) / 2, abs=0.006)
        assert float(half) == pytest.approx((high - low) / 2, abs=0.006)
        assert cell.bold == (test.pvalue < 0.05)
    assert [cell.bold for cell in row.cells] == [True, False]


def test_differences_under_perturbations_are_computed_as_those_under_noise(tmp_path):
    folder = tmp_path / "study"
    write_study(folder, THREE_SEEDS, seeds=[0, 1, 2])
    for run in folder.glob("*-seed*"):
        path = run / "evaluation.json"
        evaluation = json.loads(path.read_text())
        evaluation["perturbations"] = [
            {"perturb": f"at {level['std_255']}", "accuracies": level["accuracies"]}
            for level in evaluation["levels"]]
        path.write_text(json.dumps(evaluation))
    study = report.load_study(folder)
    table = tables.perturbation_difference_table(study, "both")
    assert table.columns == ("Perturbation", LABELS["robust"])
    assert [row.head for row in table.rows] == [f"at {level}" for level in LEVELS]
    row, = tables.difference_table(study, "both").rows
    assert [cell for line in table.rows for cell in line.cells] == list(row.cells)


def test_differences_under_perturbations_need_the_reference_to_be_tested(three_seeds):
    study = report.load_study(three_seeds[0])
    assert tables.perturbation_difference_table(study, "both") is None


def test_differences_of_single_trainings_have_no_interval(one_seed, tmp_path):
    table = tables.difference_table(report.load_study(one_seed[0]), "robust")
    assert [cell.text for cell in table.rows[0].cells] == ["+1.00", "−4.00"]
    assert "the spread over trainings is unknown" in table.note
    folder = tmp_path / "study"
    write_study(folder, {("both", 0): ONE_SEED["both", 0]}, seeds=[0])
    assert tables.difference_table(report.load_study(folder), "robust") is None


def test_rows_are_told_apart_by_more_than_their_colour():
    styles = [figures.row_style(index) for index in range(56)]
    assert len({(style.color, style.marker) for style in styles}) == 56
    for first in range(0, 56, 8):
        assert len({style.color for style in styles[first : first + 8]}) == 8
        assert len({style.marker for style in styles[first : first + 7]}) == 7


@pytest.mark.usefixtures("pictures_left_out")
def test_no_paper_row_without_a_paper_table(tmp_path):
    write_study(tmp_path / "study", ONE_SEED, seeds=[0], paper_table=None)
    assert "paper: " not in report.write_report(tmp_path / "study").read_text()


def test_bold_marks_the_best_of_each_column(one_seed):
    folder, page = one_seed
    bold = Page(page).bold
    assert "90.00" in bold and "86.00 ± 1.41" in bold
    assert "89.00" not in bold and "82.00 ± 2.83" not in bold
    assert "**86.00 ± 1.41**" in (folder / "report.md").read_text()


@pytest.mark.usefixtures("pictures_left_out")
def test_missing_runs_are_named(tmp_path):
    folder = tmp_path / "study"
    write_study(folder, {key: THREE_SEEDS[key] for key in THREE_SEEDS if key[1] < 2},
                seeds=[0, 1, 2])
    (folder / "robust-seed1" / "evaluation.json").unlink()
    provenance = json.loads((folder / "robust-seed1" / "provenance.json").read_text())
    del provenance["seconds"]  # as in a run that is not done
    write_json(folder / "robust-seed1" / "provenance.json", provenance)
    page = Page(report.write_report(folder).read_text())
    assert "Robust <&> |method|, seed 2: not trained" in page.text
    assert "Robust <&> |method|, seed 1: trained, not evaluated" in page.text
    assert "Training on both, seed 2: not trained" in page.text
    assert "Training on both, seed 1" not in page.text
    # The only finished seed has no spread over trainings.
    assert ["92.00", "72.00"] in [row[1:3] for row in page.rows]


def test_complete_study_names_no_missing_run(one_seed):
    assert "Missing" not in one_seed[1]


@pytest.mark.usefixtures("pictures_left_out")
def test_an_epoch_chosen_on_the_test_set_is_warned_of(tmp_path, one_seed):
    write_study(tmp_path / "study", ONE_SEED, seeds=[0], selected_on="test")
    warned = report.write_report(tmp_path / "study").read_text()
    assert "Warning: the epoch was chosen on the test set" in warned
    assert "Warning" not in one_seed[1]


def test_two_reports_of_a_study_are_the_same_bytes(one_seed, tmp_path):
    folder, _ = one_seed
    write_study(tmp_path / "other", ONE_SEED, seeds=[0])
    report.write_report(tmp_path / "other")
    names = [f"report.{ending}" for ending in ("html", "md", "csv", "json")]
    names += [f"figures/{name}.{ending}" for name in ("accuracy", "training", "curvature", "tsne")
              for ending in ("png", "svg")]
    for name in names:
        assert (tmp_path / "other" / name).read_bytes() == (folder / name).read_bytes(), name


def test_page_is_self_contained_and_escaped(one_seed):
    page = Page(one_seed[1])
    references = [value for name, value in page.attributes if name in ("src", "href")]
    assert references and all(value.startswith(("data:", "#")) for value in references)
    assert "script" not in page.tags and "link" not in page.tags and "study" not in page.tags
    assert not re.search(r"url\(|@import", one_seed[1])
    assert "Toy &lt;study&gt;" in one_seed[1] and "Robust &lt;&amp;&gt;" in one_seed[1]
    assert page.tags.count("img") == 4 == sum(name == "alt" and bool(value)
                                              for name, value in page.attributes)
    assert page.tags.count("caption") == page.tags.count("table")


def test_markdown_is_escaped(one_seed):
    text = (one_seed[0] / "report.md").read_text()
    assert "Robust \\<\\&\\> \\|method\\|" in text and "<study>" not in text
    assert "](figures/accuracy.png)" in text


def test_provenance_lists_what_differs_between_runs_only(three_seeds):
    page = three_seeds[1]
    rows = table_rows(page, LABELS["both"])
    run = [LABELS["both"], "0", "2", "2026-01-02T03:04:05", "1 min 05 s", "machine 0"]
    assert run in rows
    assert table_rows(page, "Versions") == [["Versions", "jax 0.10.2"]]
    assert table_rows(page, "Commit") == [["Commit", "abc"]]
    assert table_rows(page, "method") == [] and table_rows(page, "epochs") == [["epochs", "2"]]
    assert [LABELS["both"], "both"] in rows


def test_curvature_with_zeros_counts_what_the_axis_cannot_show(one_seed):
    rows = table_rows(one_seed[1], LABELS["both"])
    # Of 0, 1, 3, 100 and 10, 20, 30, 40.
    assert [LABELS["both"], "2.00", "26.0", "25.0", "25.0", "1 / 0"] in rows
    assert "2 of the 16 values are zero or negative" in one_seed[1]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (2333.4, "2333"), (12.34, "12.3"), (0.012344, "0.0123"), (1.234e-5, "1.23e-05"),
     (float("nan"), "–")])
def test_significant_keeps_three_digits(value, text):
    assert page.significant(value) == text


def test_curvature_figure_bears_zeros_alone_and_values_that_are_not_finite(tmp_path):
    style = figures.row_style(0)
    samples = [(name, style, {"exact": values, "other": np.zeros(5)})
               for name, values in (("zeros", np.zeros(5)), ("nan", np.full(5, np.nan)))]
    titles = {"exact": "Exact", "other": "Other"}
    figures.save(curvature.curvature_figure(samples, titles), tmp_path / "figure")
    assert (tmp_path / "figure.png").stat().st_size


def test_lowest_share_keeps_nine_in_ten():
    values = np.array([10.0, np.nan, *range(9), np.inf])
    np.testing.assert_array_equal(curvature.lowest_share(values), np.arange(9))


def test_features_of_a_diverged_run_are_left_out_and_named(tmp_path):
    folder = tmp_path / "study"
    write_study(folder, ONE_SEED, seeds=[0])
    np.savez(folder / "both-seed0" / "features.npz", clean=np.full((12, 5), np.nan),
             noisy=np.zeros((12, 5)), labels=np.arange(12) % 3, noise="std 2/255")
    page = report.write_report(folder).read_text()
    assert "Not shown, features not finite or all alike: Training on both." in page


@pytest.mark.usefixtures("pictures_left_out")
def test_without_curvature_and_features_their_sections_are_absent(tmp_path):
    folder = tmp_path / "study"
    write_study(folder, ONE_SEED, seeds=[0])
    for row in LABELS:
        (folder / f"{row}-seed0" / "curvature.npz").unlink()
        (folder / f"{row}-seed0" / "features.npz").unlink()
    page = report.write_report(folder).read_text()
    assert 'id="accuracy"' in page and 'id="curvature"' not in page and 'id="features"' not in page


def test_class_names_are_shown_in_the_legend(tmp_path):
    write_study(tmp_path / "study", {}, seeds=[0], class_names=["cat", "dog"])
    with pytest.raises(InputError):
        report.load_study(tmp_path / "study")
    write_run(tmp_path / "study" / "both-seed0", "both", 0, ONE_SEED["both", 0], "last")
    assert report.load_study(tmp_path / "study").class_names == {0: "0 cat", 1: "1 dog"}


def test_no_study_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="no study.json"):
        report.write_report(tmp_path)


def test_no_finished_run_is_an_input_error_of_one_line(tmp_path):
    write_study(tmp_path / "study", {}, seeds=[0])
    with pytest.raises(InputError, match="no evaluation.json") as error:
        report.write_report(tmp_path / "study")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("weakest", "panels"), [(40.0, 2), (87.0, 1)])
def test_a_weak_row_gets_the_others_a_panel_of_their_own(weakest, panels):
    levels, std = np.array([0.0, 8.0]), np.array([1.0, 1.0])
    lines = [figures.AccuracyLine(f"method {index}", figures.row_style(index), levels,
                                  np.array([mean, mean - 2.0]), std)
             for index, mean in enumerate((90.0, 88.0, weakest))]
    axes = figures.accuracy_figure(lines, []).axes
    assert len(axes) == panels
    if panels == 2:
        low, high = axes[1].get_ylim()
        assert weakest < low < 85 and high > 91
        assert [len(ax.containers) for ax in axes] == [3, 2]


@pytest.mark.parametrize("length, columns", [(5, 3), (20, 2), (30, 1)])
def test_a_legend_is_within_its_figure(length, columns):
    levels = np.array([0.0, 2.0])
    lines = [figures.AccuracyLine("M" * length, figures.row_style(index), levels,
                                  np.array([90.0, 88.0]), np.ones(2)) for index in range(4)]
    figure = figures.accuracy_figure(lines, [])
    legend, = figure.legends
    figure.draw_without_rendering()
    extent = legend.get_window_extent()
    assert figure.bbox.x0 <= extent.x0 and extent.x1 <= figure.bbox.x1
    assert len({text.get_window_extent().x0 for text in legend.get_texts()}) == columns


def test_a_table_in_memory_is_the_one_that_its_file_gives(tmp_path):
    # 100 * 0.9283 is 92.83000000000001, which moves the mean with 92.26 across a tie.
    table = frame.table(("toy", "both", seed, "accuracy", "clean", 100 * share, "%", None)
                        for seed, share in enumerate((0.9226, 0.9283)))
    (tmp_path / "report.csv").write_text(frame.to_csv(table))
    pd.testing.assert_frame_equal(
        frame.read_csv(tmp_path / "report.csv"), table, check_exact=True)
