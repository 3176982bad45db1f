"""The question which training is the best: tables by method, work, and the Pareto front."""

import numpy as np
import pytest
from scipy import stats

from experiments import carry_over, strongest
from experiments.recipes import STUDIES
from jaxrobust import corruptions
from jaxrobust.app import run_folder
from jaxrobust.app.config import InputError
from jaxrobust.app.report import frame, pictures
from jaxrobust.app.study.read import Run, Study

RECIPE = STUDIES["methods"]["small"]
SEEDS = 3
# Mean accuracy clean and at 16/255: `sam` has both below those of `both`.
MEANS = {"normal": (80.0, 40.0), "both": (76.0, 70.0), "half": (77.0, 72.0), "sam": (75.0, 60.0),
         "pgd_work": (60.0, 74.0)}
SURVIVE = {"normal": 10, "both": 40, "half": 50, "pgd_work": 120}
"""Of 200 images, under attack in L-inf; `sam` is not attacked."""


def accuracies_of(row, seed):
    """Clean, and two draws of the noise."""
    clean, noisy = MEANS[row]
    return [(clean + seed - 1) / 100], [(noisy + seed - 1 + shift) / 100 for shift in (-0.5, 0.5)]


@pytest.fixture(name="study")
def _study(tmp_path):
    random, runs = np.random.default_rng(0), {}
    for row in MEANS:
        runs[row] = ()
        for seed in range(SEEDS):
            place = tmp_path / f"{row}-seed{seed}"
            place.mkdir()
            means = {name: [float(random.random()), 0.0, 1.0] for name in corruptions.BENCHMARK}
            run_folder.write_facts(place, "corruptions", {
                "origin": "generated", "num_images": 200, "subset": "200 of 400 test images",
                "counts": [{"name": "clean", "severity": 0, "right": 150, "number": 200}],
                "mean_by_corruption": means,
                "mean": [float(np.mean([mean[0] for mean in means.values()])), 0.0, 1.0]})
            if row in SURVIVE:
                run_folder.write_facts(place, "attacks", {
                    "num_images": 200, "subset": "the first 200 of 400 test images",
                    "norms": [
                        {"norm": norm, "epsilon": epsilon, "warnings": {}, "robust": {
                            "clean": 150, "apgd-ce": left + 1, "square": left}}
                        for norm, epsilon, left in (
                            ("linf", 2 / 255, SURVIVE[row] + 2 * seed), ("l2", 0.5, 4))],
                    "nearest": [],
                    "settings": {"num_steps": 100, "num_targets": 9, "num_queries": 5000}})
            clean, noisy = accuracies_of(row, seed)
            levels = [{"std_255": 0, "accuracies": clean}, {"std_255": 16, "accuracies": noisy}]
            other = [{"perturb": "laplace(0.06)", "accuracies": noisy}]
            runs[row] += (Run(
                folder=place, seed=seed, config=RECIPE.run(row, seed), provenance={}, epochs=(),
                evaluation={"epoch": None, "num_images": 400, "num_draws": 2, "split": "test",
                            "selected_on": None, "levels": levels, "perturbations": other}),)
    return Study(name="toy", title="Toy", note="", command="", commit="",
                 labels={row: RECIPE.labels[row] for row in MEANS},
                 methods={row: RECIPE.rows[row].method for row in MEANS}, seeds=(0, 1, 2),
                 paper=None, paper_rows={}, paper_perturbed=None, paper_perturbations={},
                 class_names={}, runs=runs)


def test_methods_are_compared_under_noise_corruptions_and_by_work(study):
    section = strongest.section(study)
    cost, accuracy, difference, *others = section.tables
    cells = {row.head: [cell.text for cell in row.cells] for row in cost.rows}
    assert list(cells) == list(study.labels.values())
    assert cells[RECIPE.labels["normal"]] == ["12", "1", "12"]
    assert cells[RECIPE.labels["sam"]] == ["12", "4", "48"]
    # Three steps of PGD: nine passes, as three updates of normal training.
    assert cells[RECIPE.labels["pgd_work"]] == ["8", "3", "24"]
    assert accuracy.columns[1:3] == difference.columns[1:] == ("Clean", "16/255")
    assert [row.head for row in difference.rows] == [
        RECIPE.labels[row] for row in MEANS if row != "both"]
    assert difference.rows[0].cells[1].text.startswith("−30.00 ± ")
    noise, noise_difference, corrupted, corrupted_difference, *_ = others
    assert noise.columns == noise_difference.columns == ("Method", "laplace(0.06)")
    assert corrupted.columns == corrupted_difference.columns
    assert len(corrupted.columns) == 1 + 1 + 5 and all(
        "mean of" in name for name in corrupted.columns[1:])
    # Methods are in the rows; the difference is that of the trainings' means.
    column = corrupted.columns.index("blur, mean of 4, generated") - 1
    values = frame.values_of(frame.frame(study, carry_over.numbers))
    own, peer = (values[row, carry_over.ACCURACY, corrupted.columns[column + 1]]
                 for row in ("half", "both"))
    assert corrupted.rows[2].cells[column].text.startswith(f"{np.mean(own):.2f} ± ")
    ends = stats.ttest_ind(own, peer).confidence_interval(0.95)
    points = np.mean(own) - np.mean(peer)
    assert corrupted_difference.rows[1].cells[column].text == (
        f"{points:+.2f} ± {(ends.high - ends.low) / 2:.2f}".replace("-", "−"))


def test_methods_are_compared_under_attack(study):
    table, difference = strongest.section(study).tables[-2:]
    assert table.columns == difference.columns == ("Method", "L∞ 2/255", "L2 0.5")
    assert table.details == ("Images: the first 200 of 400 test images. "
                             "Budget: 100 steps, 9 targets, 5,000 queries.")
    assert [row.head for row in table.rows] == [RECIPE.labels[row] for row in SURVIVE]
    # What all attacks leave of 200 images: 120, 122 and 124.
    assert [(cell.text, cell.bold) for cell in table.rows[-1].cells] == [
        ("61.00 ± 1.00", True), ("2.00 ± 0.00", True)]
    assert difference.rows[0].head == RECIPE.labels["normal"]
    assert difference.rows[0].cells[0].text.startswith("−15.00 ± ")
    found = {(one.measurement, one.condition): one.value
             for one in strongest.numbers(study.runs["half"][1])}
    assert found[strongest.ATTACKED, ""] == 200
    assert found["robust accuracy", "L∞ 2/255"] == 26
    assert not any("after" in measurement for measurement, _ in found)


def test_the_picture_has_a_point_a_method_and_the_front_of_those_that_none_beats(study):
    picture = pictures.pareto_picture(study, "16/255")
    front = [RECIPE.labels[row] for row in ("normal", "half", "pgd_work")]
    assert f"beats in both: {', '.join(front)}." in picture.note
    axes, = picture.figure.axes
    points = {tuple(line.get_xydata()[0]) for line in axes.lines if len(line.get_xdata()) == 1}
    expected = np.array([MEANS[row] for row in MEANS])
    np.testing.assert_allclose(sorted(points), sorted(map(tuple, expected)), rtol=1e-9)
    line, = (line for line in axes.lines if len(line.get_xdata()) > 2)
    # Steps through the three, from the left.
    np.testing.assert_allclose(line.get_xydata(), [(60, 74), (77, 72), (80, 40)], rtol=1e-9)
    assert line.get_drawstyle() == "steps-pre"


def test_a_level_that_was_not_tested_has_no_picture(study):
    with pytest.raises(InputError, match="finished runs of toy tested clean and at 20/255"):
        pictures.pareto_picture(study, "20/255")
