"""Robustness against curvature: numbers against plain loops, words, and figures that bear it."""

import json
import math

import numpy as np
import pytest
import scipy.stats

from jaxrobust.app.measurements import noise_counts, robustness, robustness_figures
from jaxrobust.app.report import figures
from jaxrobust.app.study.read import Run

NUM_DRAWS = 10


def sample(seed=0, size=60):
    """Curvatures, and draws that are wrong more often where the curvature is high."""
    rng = np.random.default_rng(seed)
    curvature = rng.lognormal(sigma=2, size=size).astype(np.float32)
    chance = scipy.stats.norm.cdf(1 - np.log(curvature))
    return curvature, rng.random((NUM_DRAWS, size)) < chance


def slow_kept_accuracy(curvature, correct, share):
    """The paper's acc(D_test(p)), image by image and draw by draw."""
    threshold = np.quantile(curvature.astype(np.float64), share)
    right = total = 0
    for image, value in enumerate(curvature):
        if value < threshold or share == 1:
            for draw in range(len(correct)):
                right += bool(correct[draw, image])
                total += 1
    return right / total if total else math.nan


def slow_group_mean(curvature, correct, k):
    """The paper's mean curvature of G(k)."""
    group = []
    for image, value in enumerate(curvature):
        count = 0
        for draw in range(len(correct)):
            count += bool(correct[draw, image])
        if count == k:
            group.append(float(value))
    return (sum(group) / len(group) if group else math.nan), len(group)


@pytest.mark.parametrize("seed", range(3))
def test_kept_accuracy_is_that_of_the_slow_loop(seed):
    curvature, correct = sample(seed)
    shares = np.arange(0.05, 1.01, 0.05).round(2)
    found, sizes = noise_counts.kept_accuracy(curvature, correct, shares)
    expected = [slow_kept_accuracy(curvature, correct, share) for share in shares]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert sizes[-1] == 60 and sizes[shares == 0.5] == 30
    assert found[-1] == correct.mean() and found[0] > found[-1]


@pytest.mark.parametrize("seed", range(3))
def test_group_means_are_those_of_the_slow_loop(seed):
    curvature, correct = sample(seed)
    means, sizes = noise_counts.group_means(curvature, correct.sum(axis=0), NUM_DRAWS)
    for k in range(NUM_DRAWS + 1):
        mean, size = slow_group_mean(curvature, correct, k)
        assert sizes[k] == size
        np.testing.assert_allclose(means[k], mean, rtol=1e-12)
    assert sizes.sum() == 60


def test_correlations_are_scipys_over_groups_and_over_images():
    curvature, correct = sample()
    counts = correct.sum(axis=0)
    clean = np.arange(60) % 3 > 0
    found = noise_counts.correlation(curvature, counts, clean, NUM_DRAWS)
    groups = [(k, slow_group_mean(curvature, correct, k)[0]) for k in range(NUM_DRAWS + 1)]
    groups = np.array([pair for pair in groups if not math.isnan(pair[1])])
    assert found.pearson == pytest.approx(np.corrcoef(groups.T)[0, 1])
    ranks = scipy.stats.rankdata(counts), scipy.stats.rankdata(curvature)
    assert found.spearman == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert found.spearman_correct == pytest.approx(
        scipy.stats.spearmanr(counts[clean], curvature[clean]).statistic)
    assert found.spearman < -0.5 and found.num_images == 60


def test_empty_groups_are_nan_and_have_no_part_in_the_coefficient():
    curvature, counts = np.array([8.0, 4.0, 2.0, 1.0]), np.array([0, 0, 5, 10])
    means, sizes = noise_counts.group_means(curvature, counts, NUM_DRAWS)
    np.testing.assert_array_equal(means[[0, 1, 5, 10]], [6, np.nan, 2, 1])
    assert sizes.tolist() == [2, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1]
    found = noise_counts.correlation(curvature, counts, np.ones(4, bool), NUM_DRAWS)
    assert found.pearson == pytest.approx(np.corrcoef([0, 5, 10], [6, 2, 1])[0, 1])


def test_constant_curvature_has_no_coefficient_and_no_lowest_share():
    correct = sample()[1]
    flat = np.full(60, 3.0, np.float32)
    found = noise_counts.correlation(flat, correct.sum(axis=0), np.ones(60, bool), NUM_DRAWS)
    assert all(math.isnan(value) for value in found[:3])
    accuracy, sizes = noise_counts.kept_accuracy(flat, correct, (0.5, 1))
    assert math.isnan(accuracy[0]) and accuracy[1] == correct.mean()
    assert sizes.tolist() == [0, 60]


@pytest.mark.parametrize("counts", [np.full(60, 10), np.repeat([0, 10], 30)])
def test_fewer_than_three_groups_have_no_pearson_coefficient(counts):
    found = noise_counts.correlation(
        sample()[0], counts, np.ones(60, bool), NUM_DRAWS)
    assert math.isnan(found.pearson)


def test_curvatures_that_are_not_finite_do_not_count():
    curvature, correct = sample()
    counts, clean = correct.sum(axis=0), np.ones(60, bool)
    wild = np.concatenate([curvature, [np.nan, np.inf, -np.inf]]).astype(np.float32)
    more = np.concatenate([correct, np.ones((NUM_DRAWS, 3), bool)], axis=1)
    for pair in zip(noise_counts.kept_accuracy(wild, more, (0.3, 1)),
                    noise_counts.kept_accuracy(curvature, correct, (0.3, 1)), strict=True):
        np.testing.assert_array_equal(*pair)
    assert noise_counts.correlation(
        wild, more.sum(axis=0), np.ones(63, bool), NUM_DRAWS
    ) == noise_counts.correlation(curvature, counts, clean, NUM_DRAWS)
    accuracy, sizes = noise_counts.kept_accuracy(wild[60:], more[:, 60:], (0.5, 1))
    assert np.isnan(accuracy).all() and sizes.tolist() == [0, 0]


@pytest.mark.parametrize(("coefficients", "words"), [
    ([("a", -0.4, 101), ("b", -0.6, 101)],
     "images of higher curvature are misclassified more often in every method "
     "(Spearman −0.60 to −0.40)"),
    ([("a", 0.4, 101)],
     "images of higher curvature are misclassified less often in “a” (Spearman +0.40)"),
    ([("a", -0.4, 101), ("b", -0.3, 101), ("c", -0.5, 101), ("d", 0.1, 101), ("e", 0.3, 101)],
     "images of higher curvature are misclassified more often in 3 of 5 methods (Spearman −0.50 "
     "to −0.30); misclassified less often in “e” (Spearman +0.30); neither more nor less often "
     "misclassified, beyond chance, in “d” (Spearman +0.10)"),
    ([("a", math.nan, 101)], "no method has a coefficient"),
])
def test_the_relation_in_words(coefficients, words):
    assert noise_counts.relation(coefficients) == words


def test_the_first_images_of_different_classes():
    labels = np.array([7, 7, 3, 7, 3, 0, 1])
    assert robustness.first_of_classes(labels, 3) == [0, 2, 5]
    assert robustness.first_of_classes(labels[:2], 3) == [0]


def test_neighbour_accuracy_leaves_the_point_itself_out():
    labels = np.repeat([0, 1], 6)
    apart = labels[:, None] * 100.0 + np.arange(12)[:, None]
    assert robustness.neighbour_accuracy(apart, labels) == 1
    # The five nearest others of a point among its like are of the other class.
    alternating = np.concatenate([np.arange(6), np.arange(6) + 0.1])[:, None] * 1e-3
    lone = np.array([0, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1])
    assert robustness.neighbour_accuracy(alternating, lone) == pytest.approx(10 / 12)
    assert math.isnan(robustness.neighbour_accuracy(np.full((12, 1), np.nan), labels))


# --- Figures ---------------------------------------------------------------------------------


def panels(values):
    """Two noises by two measures, with a line for each of the rows of ``values``."""
    lines = tuple(robustness_figures.Line(
        f"method {index}", figures.row_style(index), np.arange(len(row)), row,
        np.arange(len(row))) for index, row in enumerate(values))
    return [robustness_figures.Panel(noise, measure, lines)
            for noise in ("Gaussian", "uniform") for measure in ("exact", "Eq. 21")]


def saved(figure, stem):
    figures.save(figure, stem)
    return [stem.with_suffix(suffix).read_bytes() for suffix in (".png", ".svg")]


UNITS = {"exact": "one [1]", "Eq. 21": "other [1]"}


@pytest.mark.parametrize("values", [
    [np.zeros(11)], [np.full(11, np.nan)], [np.array([np.nan, -1, 0, 1e-9, 1e9, *[np.inf] * 6])],
])
def test_line_figures_bear_zeros_one_run_and_values_that_are_not_finite(values, tmp_path):
    assert saved(robustness_figures.kept_share_figure(panels(values)), tmp_path / "a")
    assert saved(robustness_figures.groups_figure(panels(values), 10, UNITS), tmp_path / "b")


def test_groups_of_few_images_have_open_markers():
    line = panels([np.arange(1.0, 31)])[0]
    figure = robustness_figures.groups_figure([line], 29, UNITS)
    many, few = figure.axes[0].collections
    assert len(few.get_offsets()) == robustness_figures.FEW
    assert few.get_facecolor()[0].tolist() == [1, 1, 1, 1] != many.get_facecolor()[0].tolist()


@pytest.mark.parametrize("values", [np.zeros((1, 5, 5)), np.full((1, 5, 5), np.nan),
                                    np.where(np.eye(5) > 0, np.inf, 1.0)[None]])
def test_surfaces_bear_a_flat_loss_and_one_that_is_not_finite(values, tmp_path):
    figure = robustness_figures.surfaces_figure(
        np.zeros((1, 4, 4, 1), np.uint8), ["cat"],
        [robustness_figures.LossPlanes("one", np.linspace(-1, 1, 5), values)])
    assert saved(figure, tmp_path / "figure")


def test_an_image_has_one_scale_for_all_methods():
    flat, steep = (height * np.linspace(0, 1, 25).reshape(1, 5, 5) for height in (1, 9))
    figure = robustness_figures.surfaces_figure(
        np.zeros((1, 4, 4, 3), np.uint8), ["cat"],
        [robustness_figures.LossPlanes(label, np.linspace(-1, 1, 5), values)
         for label, values in (("flat", flat), ("steep", steep))])
    scales = [ax.collections[0].get_clim() for ax in figure.axes[1:3]]
    assert scales[0] == scales[1] and scales[0][0] <= -9 and scales[0][1] >= 0


def test_blocks_that_cannot_be_embedded_are_named(tmp_path):
    points = np.random.default_rng(0).normal(size=(2, 12, 2))
    planes = [robustness_figures.BlockPlanes(
        "first", ("Block 1", "Block 2"), points, points + 1, np.arange(12) % 3),
        robustness_figures.BlockPlanes(
        "diverged", ("Block 1",), np.full((1, 12, 2), np.nan), points[:1], np.arange(12) % 3)]
    figure = robustness_figures.blocks_figure(planes, {0: "0 cat"})
    assert [text.get_text() for ax in figure.axes for text in ax.texts] == [
        "not finite, or all alike"]
    assert saved(figure, tmp_path / "figure")


def test_the_same_numbers_give_the_same_bytes(tmp_path):
    rng = np.random.default_rng(0)
    values, surface, points = rng.random((2, 11)), rng.random((1, 5, 5)), rng.random((1, 12, 2))
    for first, second in zip(*[[
        saved(robustness_figures.kept_share_figure(panels(values)), tmp_path / "share"),
        saved(robustness_figures.groups_figure(panels(values), 10, UNITS), tmp_path / "groups"),
        saved(robustness_figures.surfaces_figure(
            np.zeros((1, 4, 4, 3), np.uint8), ["cat"],
            [robustness_figures.LossPlanes("one", np.linspace(-1, 1, 5), surface)]),
            tmp_path / "surfaces"),
        saved(robustness_figures.blocks_figure([robustness_figures.BlockPlanes(
            "one", ("Block 1",), points, points, np.arange(12) % 3)], {}), tmp_path / "blocks"),
    ] for _ in range(2)], strict=True):
        assert first == second


def test_the_numbers_of_a_run_are_those_of_its_images(tmp_path):
    settings = {"num_images": 4, "test_size": None}
    first, second = [1, 1, 1, 0], [1, 1, 0, 0]  # Of two draws; higher curvature, fewer correct.
    for kind, facts, arrays in (
            ("noise_counts", {"num_draws": 2} | settings, {
                name: np.array([first, second], bool) for name in ("gaussian", "uniform")}),
            ("curvature", {"settings": settings, "median": {}}, {
                "frobenius_squared": np.array([1.0, 2.0, 3.0, 5.0]),
                "correct": np.array([True, True, True, False])}),
            ("blocks", {"blocks": ["block1"]}, {
                "clean_neighbours": np.array([0.5]), "noisy_neighbours": np.array([0.25])})):
        (tmp_path / f"{kind}.json").write_text(json.dumps(facts))
        np.savez(tmp_path / f"{kind}.npz", **arrays)
    run = Run(folder=tmp_path, seed=0, config=None, provenance={}, epochs=(), evaluation=None)
    found = {(number.measurement, number.condition): number.value
             for kind in (noise_counts.numbers, noise_counts.block_numbers) for number in kind(run)}
    where = "Gaussian noise, 2 draws, Exact Hessian"
    # Means 5, 3 and 1.5 of the images with 0, 1 and 2 correct predictions.
    assert [found["mean curvature by correct predictions", f"{where}, {k} of 2"]
            for k in range(3)] == [5, 3, 1.5]
    assert [found["images by correct predictions", f"Gaussian noise, {k} of 2"]
            for k in range(3)] == [1, 1, 2]
    # Below the median of 2.5 two images, right in all draws; of all, 5 of 8 predictions.
    kept = "accuracy of the images of lowest curvature"
    assert found[kept, f"{where}, 50 %"] == 100 and found[kept, f"{where}, 100 %"] == 62.5
    assert found["Pearson, groups", where] == pytest.approx(
        np.corrcoef([0, 1, 2], [5, 3, 1.5])[0, 1])
    # Ranks 1 to 4, and 3.5, 3.5, 2, 1.
    assert found["Spearman, images", where] == pytest.approx(-4.5 / (5 * 4.5) ** 0.5)
    assert found["accuracy of the 5 nearest neighbours", "block1, noisy"] == 25
