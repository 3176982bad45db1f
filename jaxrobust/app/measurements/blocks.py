"""Embeds the outputs of the blocks in the plane, clean and noisy: the paper's Fig. 12 and 13."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from matplotlib.figure import Figure

from jaxrobust import evaluation, perturbations
from jaxrobust.app.execution import batch_size_of
from jaxrobust.app.measurements.accuracy import NOISE_SEED, first_test_images, pooled_blocks
from jaxrobust.app.measurements.runner import Measured, Measurement, Work
from jaxrobust.app.progress import progress
from jaxrobust.app.report.figures import (
    add_legend,
    class_handles,
    joint_tsne,
    new_figure,
    scatter,
    wrap,
    write_across,
)
from jaxrobust.app.report.frame import Number, number_rows
from jaxrobust.app.report.page import Picture, Section, Table, count, listed
from jaxrobust.app.study.read import Run, Study, class_labels
from jaxrobust.app.trainer import TrainedRun, variables_of
from jaxrobust.images import to_float
from jaxrobust.statistics import neighbour_accuracy

NEIGHBOURS = 5
"""Number of neighbours whose vote tells how well features separate the classes."""
SEPARATED = "accuracy of the 5 nearest neighbours"
VIEWS = ("clean", "noisy")


@dataclasses.dataclass(frozen=True)
class BlockSettings:
    """Which features are shown."""

    num_images: int  # the first ones
    test_size: int | None  # test images, drawn at random by class with seed 0; None for all
    noise_std: float  # standard deviation of the Gaussian noise on the noisy images


def _measure(run: TrainedRun, settings: BlockSettings, work: Work) -> Measured:
    """Embeds each block's pooled outputs in the plane, clean and noisy together."""
    images, labels = first_test_images(run, settings)
    noise = perturbations.gaussian(settings.noise_std)
    variables = variables_of(run.state)
    views = evaluation.map_batches(
        lambda *rows: _pooled_blocks(run.model, variables, noise, *rows),
        images, np.arange(len(images)), batch_size=batch_size_of(images))
    names = list(views["clean"])
    planes: dict[str, list] = {view: [] for view in views}
    accuracies: dict[str, list[float]] = {view: [] for view in views}
    with progress(f"{work.label}, t-SNE of the blocks", len(names)) as shown:
        for name in names:
            joint = joint_tsne(views["clean"][name], views["noisy"][name])
            for number, (view, features) in enumerate(views.items()):
                planes[view].append(
                    np.full((len(labels), 2), np.nan) if joint is None else joint[number])
                accuracies[view].append(neighbour_accuracy(
                    features[name], labels, num_neighbours=NEIGHBOURS))
            shown.advance(**{"neighbours, noisy": accuracies["noisy"][-1]})
    return Measured(
        {**work.asked, "blocks": names, "class_names": list(run.dataset.class_names),
         "channels": [features.shape[1] for features in views["clean"].values()]},
        {"label": labels, **{view: np.stack(values) for view, values in planes.items()},
         **{f"{view}_neighbours": np.array(values) for view, values in accuracies.items()}})


@functools.partial(jax.jit, static_argnames="model")
def _pooled_blocks(model, variables, noise, images, indices):
    clean = to_float(images)
    # The noise of the figure of the penultimate features.
    noisy = perturbations.per_example(noise, jax.random.key(NOISE_SEED), clean, indices)
    return {view: pooled_blocks(model.apply(variables, inputs, train=False))
            for view, inputs in (("clean", clean), ("noisy", noisy))}


def blocks_figure(results: dict[str, dict], view: str, class_names: dict[int, str]) -> Figure:
    """Draws Fig. 12 and 13: the outputs of each block in one view, a line of panels for each label.

    A result is that of :data:`BLOCKS`: titles ``blocks`` and ``channels`` [K], the views in the
    plane [K, n, 2], NaN for a block that could not be embedded, and ``label`` [n]. Both views of a
    block set the limits of its panel.
    """
    columns = max(len(result["blocks"]) for result in results.values())
    figure = new_figure(max(7.5, 0.6 + 2.5 * columns), 1.2 + 2.0 * len(results))
    grid = figure.subplots(len(results), columns, squeeze=False)
    for line, (label, result) in zip(grid, results.items(), strict=True):
        for ax in line[len(result["blocks"]):]:
            ax.set_axis_off()
        for index, (ax, block, channels) in enumerate(
                zip(line, result["blocks"], result["channels"], strict=False)):
            scatter(ax, result[view][index], result["label"], size=5, numbers=False)
            ax.set_xlabel("")
            ax.set_title(f"{_block_name(block)} ({channels} channels)", fontsize=9)
            both = np.concatenate([result[name][index] for name in VIEWS])
            if np.isfinite(both).all():
                margin = 0.04 * np.ptp(both, axis=0)
                (left, bottom), (right, top) = both.min(axis=0) - margin, both.max(axis=0) + margin
                ax.set(xlim=(left, right), ylim=(bottom, top))
            else:
                write_across(ax, "not finite, or all alike")
        line[0].set_ylabel(wrap(label, 22), fontsize=9)
    classes = np.concatenate([result["label"] for result in results.values()]).tolist()
    add_legend(figure, class_handles(classes, class_names), columns=5)
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(True)
    return figure


def _section(study: Study) -> Section | None:
    results = study.first_results("blocks")
    if not results:
        return None
    return Section("blocks", "Features of the blocks", "", (neighbours_table(study, results),),
                   tuple(blocks_picture(study, results, view) for view in VIEWS))


def numbers(run: Run) -> Iterator[Number]:
    """Yields how well the features of each block separate the classes."""
    blocks = run.result("blocks")
    for index, block in enumerate(blocks["blocks"] if blocks else ()):
        for view in VIEWS:
            yield Number(SEPARATED, f"{block}, {view}",
                         100 * float(blocks[f"{view}_neighbours"][index]), "%")


def neighbours_table(study: Study, results: dict[str, dict]) -> Table:
    """Tabulates how well the features of each block separate the classes."""
    blocks = list(dict.fromkeys(name for result in results.values() for name in result["blocks"]))
    columns = [(SEPARATED, f"{block}, {view}", _first) for block in blocks for view in VIEWS]
    return Table(
        "How well each block’s features separate the classes: accuracy in % of the 5 nearest "
        "neighbours.",
        ("Method", *(name for block in blocks for name in (
            f"{_block_name(block)}: clean", "noisy"))),
        number_rows(study, results, numbers, columns),
        f"{listed(count(result['num_images']) for result in results.values())} test images; "
        f"first seed of each method.",
        "How to read: the share of images whose class is the commonest among the five other "
        "images with the nearest features (averaged over the positions of the block’s outputs), "
        "clean among clean, noisy among noisy. Unlike t-SNE pictures, it measures the features "
        "themselves.")


def blocks_picture(study: Study, results: dict[str, dict], view: str) -> Picture:
    """Shows Fig. 12 (clean) or 13 (noisy): the outputs of each block in the plane."""
    names = class_labels(next(iter(results.values()))["class_names"])
    noise = listed(result["noise_std"] for result in results.values())
    which, number = (("clean test images", 12) if view == "clean" else
                     (f"test images with Gaussian noise of std {noise} of the pixel range", 13))
    return Picture(
        f"blocks_{view}",
        blocks_figure({study.labels[row]: result for row, result in results.items()}, view, names),
        f"Outputs of the network’s blocks, by t-SNE: {which} (the paper’s Fig. {number}).",
        f"Scatter plots coloured by class, a panel for each block of {len(results)} methods.",
        "How to read: a point for each test image, its block’s outputs averaged over their "
        "positions, colour and marker by its true class. Clean and noisy images share one "
        "embedding of each panel, so the same place in the clean and in the noisy figure is the "
        "same feature. Directions, distances between clusters and sizes have no meaning in "
        "t-SNE; the table above holds a number for each panel.")


def _first(by_seed: Sequence[float]) -> str:
    return f"{by_seed[0]:.1f}" if by_seed and math.isfinite(by_seed[0]) else "–"


def _block_name(block: str) -> str:
    return block.replace("block", "Block ")


BLOCKS = Measurement("blocks", measure=_measure, section=_section, numbers=(numbers,),
                     command="figures")
