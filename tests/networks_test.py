"""Curvature and robustness network by network: the coefficients, their intervals, the section."""

import json
import pathlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from scipy import stats

from jaxrobust.app.measurements import networks
from jaxrobust.app.measurements.networks import RankCorrelations
from jaxrobust.app.report import figures
from jaxrobust.app.study.read import Run, Study

SAMPLES = st.integers(0, 2**16).map(np.random.default_rng)


def rank_correlation(x, y, groups, given=None):
    """Of x and y alone, or with a third held fixed."""
    variables = {"x": x, "y": y} | ({} if given is None else {"given": given})
    return RankCorrelations(variables, groups).between("x", "y", None if given is None else "given")


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


@hypothesis.given(random=SAMPLES, number=st.integers(3, 30))
@hypothesis.settings(max_examples=10)
def test_the_coefficient_is_spearmans_and_ranks_alone_count(random, number):
    x, y = random.normal(size=(2, number))
    groups = random.integers(0, 4, size=number)
    found = rank_correlation(x, y, groups)
    assert found.value == pytest.approx(stats.spearmanr(x, y).statistic)
    np.testing.assert_allclose(rank_correlation(np.exp(x), y**3, groups), found)
    np.testing.assert_allclose(rank_correlation(-x, y, groups).value, -found.value)
    assert -1 <= found.low <= found.high <= 1 or np.isnan(found.low)


@hypothesis.given(random=SAMPLES, number=st.integers(6, 30))
@hypothesis.settings(max_examples=10)
def test_what_is_held_fixed_is_regressed_out_of_both_ranks(random, number):
    x, y, given = random.normal(size=(3, number))
    y += given
    found = rank_correlation(x, y, np.arange(number), given)
    design = np.stack([np.ones(number), stats.rankdata(given)], axis=1)
    rest = [ranks - design @ np.linalg.lstsq(design, ranks)[0]
            for ranks in (stats.rankdata(x), stats.rankdata(y))]
    assert found.value == pytest.approx(np.corrcoef(*rest)[0, 1])


def test_a_common_cause_alone_leaves_nothing_once_it_is_held_fixed():
    random = np.random.default_rng(3)
    cause = random.normal(size=400)
    x, y = cause + 0.5 * random.normal(size=(2, 400))
    groups = np.arange(400)
    assert rank_correlation(x, y, groups).low > 0.6
    held = rank_correlation(x, y, groups, cause)
    assert held.low < 0.05 and held.high > -0.05 and abs(held.value) < 0.15
    # Nothing is left of a variable that is ranked as the one held fixed is.
    assert np.isnan(rank_correlation(cause**3, y, groups, cause).value)


def test_more_seeds_of_the_same_rows_make_no_interval_smaller():
    x, y = np.random.default_rng(1).normal(size=(2, 9))
    once = rank_correlation(x, y, np.arange(9))
    repeated = rank_correlation(*(np.repeat(values, 5) for values in (x, y, np.arange(9))))
    np.testing.assert_allclose(repeated, once)
    alone = rank_correlation(*(np.repeat(values, 5) for values in (x, y)), np.arange(45))
    assert alone.high - alone.low < 0.7 * (once.high - once.low)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    random, covered = np.random.default_rng(2), 0
    truth = 6 / np.pi * np.arcsin(0.6 / 2)  # Spearman's of a normal pair with correlation 0.6.
    for _ in range(25):
        x = random.normal(size=40)
        y = 0.6 * x + 0.8 * random.normal(size=40)
        found = rank_correlation(x, y, np.arange(40))
        covered += found.low <= truth <= found.high
    assert covered >= 21


def test_a_constant_has_no_coefficient():
    assert np.isnan(rank_correlation(np.ones(5), np.arange(5.0), np.arange(5))).all()


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
