"""Robustness against curvature: numbers against plain loops, and figures of odd values."""

import itertools
import json

import numpy as np
import pytest

from jaxrobust.app.measurements import blocks, noise_counts, surfaces
from jaxrobust.app.report import figures
from jaxrobust.app.study.read import Run


def test_the_first_images_of_different_classes():
    labels = np.array([7, 7, 3, 7, 3, 0, 1])
    assert surfaces.first_of_classes(labels, 3) == [0, 2, 5]
    assert surfaces.first_of_classes(labels[:2], 3) == [0]


# --- Figures ---------------------------------------------------------------------------------


def panels(values):
    """Two noises by two measures, with a line for each of the rows of ``values``."""
    lines = [noise_counts.Line(
        f"method {index}", figures.row_style(index), np.arange(len(row)), row,
        np.arange(len(row))) for index, row in enumerate(values)]
    return dict.fromkeys(itertools.product(("Gaussian", "uniform"), ("exact", "Eq. 21")), lines)


def saved(figure, stem):
    figures.save(figure, stem)
    return [stem.with_suffix(suffix).read_bytes() for suffix in (".png", ".svg")]


UNITS = {"exact": "one [1]", "Eq. 21": "other [1]"}


@pytest.mark.parametrize("values", [
    [np.zeros(11)], [np.full(11, np.nan)], [np.array([np.nan, -1, 0, 1e-9, 1e9, *[np.inf] * 6])],
])
def test_line_figures_bear_zeros_one_run_and_values_that_are_not_finite(values, tmp_path):
    assert saved(noise_counts.kept_share_figure(panels(values)), tmp_path / "a")
    assert saved(noise_counts.groups_figure(panels(values), 10, UNITS), tmp_path / "b")


def test_groups_of_few_images_have_open_markers():
    figure = noise_counts.groups_figure(panels([np.arange(1.0, 31)]), 29, UNITS)
    many, few = figure.axes[0].collections
    assert len(few.get_offsets()) == noise_counts.FEW
    assert few.get_facecolor()[0].tolist() == [1, 1, 1, 1] != many.get_facecolor()[0].tolist()


@pytest.mark.parametrize("values", [np.zeros((1, 5, 5)), np.full((1, 5, 5), np.nan),
                                    np.where(np.eye(5) > 0, np.inf, 1.0)[None]])
def test_surfaces_bear_a_flat_loss_and_one_that_is_not_finite(values, tmp_path):
    figure = surfaces.surfaces_figure(
        np.zeros((1, 4, 4, 1), np.uint8), ["cat"], np.linspace(-1, 1, 5), {"one": values})
    assert saved(figure, tmp_path / "figure")


def test_an_image_has_one_scale_for_all_methods():
    flat, steep = (height * np.linspace(0, 1, 25).reshape(1, 5, 5) for height in (1, 9))
    figure = surfaces.surfaces_figure(
        np.zeros((1, 4, 4, 3), np.uint8), ["cat"], np.linspace(-1, 1, 5),
        {"flat": flat, "steep": steep})
    scales = [ax.collections[0].get_clim() for ax in figure.axes[1:3]]
    assert scales[0] == scales[1] and scales[0][0] <= -9 and scales[0][1] >= 0


def embedded(clean, noisy):
    """What is measured of blocks with these points in the plane [K, 12, 2]."""
    names = [f"block{number + 1}" for number in range(len(clean))]
    return {"blocks": names, "channels": [8] * len(names), "clean": clean, "noisy": noisy,
            "label": np.arange(12) % 3}


def test_blocks_that_cannot_be_embedded_are_named(tmp_path):
    points = np.random.default_rng(0).normal(size=(2, 12, 2))
    results = {
        "first": embedded(points, points + 1),
        "diverged": embedded(np.full((1, 12, 2), np.nan), points[:1])}
    figure = blocks.blocks_figure(results, "clean", {0: "0 cat"})
    assert [text.get_text() for ax in figure.axes for text in ax.texts] == [
        "not finite, or all alike"]
    assert saved(figure, tmp_path / "figure")


def test_the_same_numbers_give_the_same_bytes(tmp_path):
    rng = np.random.default_rng(0)
    values, surface, points = rng.random((2, 11)), rng.random((1, 5, 5)), rng.random((1, 12, 2))
    for first, second in zip(*[[
        saved(noise_counts.kept_share_figure(panels(values)), tmp_path / "share"),
        saved(noise_counts.groups_figure(panels(values), 10, UNITS), tmp_path / "groups"),
        saved(surfaces.surfaces_figure(
            np.zeros((1, 4, 4, 3), np.uint8), ["cat"], np.linspace(-1, 1, 5), {"one": surface}),
            tmp_path / "surfaces"),
        saved(blocks.blocks_figure({"one": embedded(points, points)}, "noisy", {}),
              tmp_path / "blocks"),
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
             for kind in (noise_counts.numbers, blocks.numbers) for number in kind(run)}
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
