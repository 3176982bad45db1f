"""Curvature and robustness network by network: the coefficients, their intervals, the section."""

import json
import pathlib

import numpy as np
import pytest

from jaxrobust.app.measurements import networks
from jaxrobust.app.report import figures
from jaxrobust.app.study.read import Run, Study


def network(folder, row, seed, medians, clean, noisy):
    """A run with two draws at 8/255 around ``noisy`` per cent."""
    place = folder / f"{row}-seed{seed}"
    place.mkdir()
    if medians is not None:
        (place / "curvature.json").write_text(json.dumps({"median": medians}))
    levels = [{"std_255": 0, "accuracies": [clean / 100]},
              {"std_255": 8, "accuracies": [(noisy - 1) / 100, (noisy + 1) / 100]}]
    return Run(folder=place, seed=seed, config=None, provenance={}, epochs=(),
               evaluation={"levels": levels})


def study_of(runs):
    return Study(name="toy", title="Toy", note="", command="", commit="",
                 labels={row: row for row in runs}, methods={row: row for row in runs}, seeds=(),
                 paper=None, paper_rows={}, paper_perturbed=None, paper_perturbations={},
                 class_names={}, runs=runs)


@pytest.fixture(name="study")
def _study(tmp_path):
    """Five rows of two seeds; by one measure the flatter network keeps more, by the other less."""
    curved = [1.0, 2.0, 4.0, 3.0, 8.0, 9.0, 20.0, 16.0, 50.0, 40.0]
    return study_of({f"row{row}": tuple(
        network(tmp_path, f"row{row}", seed, {"frobenius_squared": value,
                                              "finite_difference": 1 / value}, 90.0, 80 - value)
        for seed, value in enumerate(curved[2 * row : 2 * row + 2])) for row in range(5)})


def test_the_section_holds_every_level_and_measure(study):
    section = networks.section(study)
    table, = section.tables
    assert table.columns == ("Outcome", "Exact Hessian", "Finite differences")
    heads = [row.head for row in table.rows]
    assert heads == ["accuracy, clean", "accuracy, 8/255", "loss of accuracy at 8/255",
                     "accuracy, 8/255, clean accuracy held fixed"]
    cells = [[cell.text for cell in row.cells] for row in table.rows]
    assert cells[0] == ["–", "–"]  # All have the same.
    assert cells[1] == ["−1.00 [−1.00, −1.00]", "+1.00 [+1.00, +1.00]"]
    assert cells[2] == ["+1.00 [+1.00, +1.00]", "−1.00 [−1.00, −1.00]"]
    assert cells[3] == ["–", "–"]  # A constant cannot be held fixed.
    assert table.details.startswith("10 different networks of 5 rows")


def test_the_figure_has_a_point_for_each_network(study, tmp_path):
    picture, = networks.section(study).pictures
    axes = picture.figure.axes
    assert len(axes) == 4
    for ax in axes:
        assert len(ax.lines) == 10
    points = np.array([line.get_xydata()[0] for line in axes[0].lines])
    np.testing.assert_allclose(points[:, 1], 80 - points[:, 0])
    lost = np.array([line.get_xydata()[0] for line in axes[2].lines])
    np.testing.assert_allclose(lost[:, 1], 10 + lost[:, 0])
    figures.save(picture.figure, tmp_path / "networks")
    assert (tmp_path / "networks.png").stat().st_size > 1000


def test_few_networks_or_no_noise_give_no_section(study, tmp_path):
    runs = dict(study.runs)
    few = study_of({row: runs[row] for row in list(runs)[:3]})
    assert networks.section(few) is None
    for of_row in runs.values():
        for run in of_row:
            run.evaluation["levels"] = run.evaluation["levels"][:1]
    assert networks.section(study) is None


def test_networks_without_finite_curvature_are_left_out(study, tmp_path):
    folder = pathlib.Path(tmp_path) / "more"
    folder.mkdir()
    broken = tuple(network(folder, "broken", seed, medians, 90.0, 10.0) for seed, medians in
                   enumerate((None, {"frobenius_squared": float("nan"),
                                     "finite_difference": 1.0})))
    section = networks.section(study_of({**study.runs, "broken": broken}))
    assert section.tables == networks.section(study).tables


def test_rows_that_came_out_the_same_are_one_network(study):
    again = {"again": study.runs["row1"]}
    section = networks.section(study_of({**study.runs, **again}))
    assert section.tables == networks.section(study).tables
