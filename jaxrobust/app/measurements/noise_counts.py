"""The report's sections on robustness and curvature: the paper's Fig. 8, 9 and 11 to 13.

Reads what the command ``figures`` measured; a study without it has none of these sections.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxrobust.app.measurements import robustness_figures
from jaxrobust.app.report import figures
from jaxrobust.app.report.frame import Number, frame, values_of
from jaxrobust.app.report.page import (
    Cell,
    Picture,
    Section,
    Table,
    TableRow,
    count,
    listed,
    over_runs,
    signed,
)
from jaxrobust.app.study.read import Run, Study, class_labels
from jaxrobust.statistics import (
    CountCorrelation,
    correlation_with_counts,
    lowest_means,
    means_by_count,
)

SHARES = np.arange(10, 101, 5)
"""Shares of the images kept in Fig. 8, per cent."""

NOISES = {"gaussian": "Gaussian noise", "uniform": "uniform noise"}
"""Arrays of ``noise_counts.npz``, as shown."""


class Measure(NamedTuple):
    """A column of ``curvature.npz``, as shown."""

    title: str
    axis: str


MEASURES = {
    "frobenius_squared": Measure(
        "Exact Hessian", "Mean $\\Vert H\\Vert_F^2$ [1/pixel$^4$]"),
    "finite_difference": Measure(
        "Eq. 21 (finite differences)", "Mean $\\Lambda$ of Eq. 21 [1/pixel$^4$]"),
    "smoothed_frobenius_squared": Measure(
        "Noise-averaged loss", "Mean $\\Vert H_\\sigma\\Vert_F^2$ [1/pixel$^4$]"),
}
"""Different quantities on a ReLU network."""


COEFFICIENTS = ("Pearson, groups", "Spearman, images", "Spearman, right when clean")
"""Of :class:`~jaxrobust.statistics.CountCorrelation`, as shown."""

SIZES, NEIGHBOURS = "images by correct predictions", "accuracy of the 5 nearest neighbours"
VIEWS = ("clean", "noisy")


class Counted(NamedTuple):
    """A run's noise counts beside the curvature of the same images."""

    run: Run
    counts: dict
    curvature: dict

    def correct(self, noise: str) -> np.ndarray:
        """[draws, images]."""
        return self.counts[noise]


# --- What is there ---------------------------------------------------------------------------


def _counted_runs(study: Study) -> tuple[dict[str, list[Counted]], list[str]]:
    """By row, the runs with counts; and the labels of those that do not fit the others."""
    found, left_out, num_draws = {}, [], None
    for row, runs in study.runs.items():
        for run in runs:
            counts, curvature = run.result("noise_counts"), run.curvature
            if not counts:
                continue
            num_draws = num_draws or counts["num_draws"]
            if _same_images(counts, curvature) and counts["num_draws"] == num_draws:
                found.setdefault(row, []).append(Counted(run, counts, curvature))
            else:
                left_out.append(f"{study.labels[row]}, seed {run.seed}")
    return found, left_out


def _same_images(counts: dict, curvature: dict | None) -> bool:
    """Whether arrays match by position: both hold the first images of one test split."""
    return curvature is not None and all(counts[name] == curvature["settings"][name]
                                         for name in ("num_images", "test_size"))


def _first_results(study: Study, name: str) -> dict[str, tuple[Run, dict]]:
    """The first seed's run with that result, by row."""
    found = {}
    for row, runs in study.runs.items():
        for run in runs:
            result = run.result(name) if row not in found else None
            if result:
                found[row] = run, result
    return found


def _style(study: Study, row: str) -> figures.Style:
    return figures.row_style(list(study.labels).index(row))


def _measures(found: dict[str, list[Counted]]) -> dict[str, Measure]:
    """Those that every run has."""
    return {key: measure for key, measure in MEASURES.items()
            if all(key in one.curvature for runs in found.values() for one in runs)}


def numbers(run: Run) -> Iterator[Number]:
    """The coefficients, and what Fig. 8 and 9 show of this run."""
    counts, curvature = run.result("noise_counts"), run.curvature
    if counts and _same_images(counts, curvature):
        num_draws = counts["num_draws"]
        for noise, name in NOISES.items():
            correct = counts[noise]
            total = correct.sum(axis=0)
            for k, size in enumerate(np.bincount(total, minlength=num_draws + 1)):
                yield Number(SIZES, f"{name}, {k} of {num_draws}", int(size), "images")
            for key, measure in MEASURES.items():
                if key not in curvature:
                    continue
                where = f"{name}, {num_draws} draws, {measure.title}"
                found = correlation_with_counts(
                    curvature[key], total, curvature["correct"], num_draws)
                for what, value in zip(COEFFICIENTS, found, strict=False):
                    yield Number(what, where, value, "")
                kept, _ = lowest_means(curvature[key], correct, SHARES / 100)
                for share, value in zip(SHARES, kept, strict=True):
                    yield Number("accuracy of the images of lowest curvature",
                                 f"{where}, {share} %", 100 * value, "%")
                means, _ = means_by_count(curvature[key], total, num_draws)
                for k, mean in enumerate(means):
                    yield Number("mean curvature by correct predictions",
                                 f"{where}, {k} of {num_draws}", mean, "1/pixel⁴")


def block_numbers(run: Run) -> Iterator[Number]:
    """How well the features of each block separate the classes."""
    blocks = run.result("blocks")
    for index, block in enumerate(blocks["blocks"] if blocks else ()):
        for view in VIEWS:
            yield Number(NEIGHBOURS, f"{block}, {view}",
                         100 * float(blocks[f"{view}_neighbours"][index]), "%")


# --- Words -----------------------------------------------------------------------------------


def relation(coefficients: Sequence[tuple[str, float, int]]) -> str:
    """In words, how curvature goes with misclassification, from (method, Spearman, images).

    A coefficient counts if it is beyond 1.96 / sqrt(images - 1), which chance alone exceeds once
    in 20 times.
    """
    found = {"misclassified more often": [], "misclassified less often": [],
             "neither more nor less often misclassified, beyond chance,": []}
    more, less, neither = found.values()
    for method, value, size in coefficients:
        if math.isfinite(value):
            clear = abs(value) > 1.96 / math.sqrt(size - 1)
            (neither if not clear else more if value < 0 else less).append((method, value))
    total = sum(map(len, found.values()))
    if not total:
        return "no method has a coefficient"
    parts = [f"{words} {_within(methods, total)}" for words, methods in sorted(
        found.items(), key=lambda item: -len(item[1])) if methods]
    return f"images of higher curvature are {'; '.join(parts)}"


def _within(methods: Sequence[tuple[str, float]], total: int) -> str:
    values = sorted(value for _, value in methods)
    span = " to ".join(dict.fromkeys((signed(values[0]), signed(values[-1]))))
    where = ("in every method" if len(methods) == total > 1 else
             f"in {len(methods)} of {total} methods" if len(methods) > 2 else
             f"in {' and '.join(f'“{method}”' for method, _ in methods)}")
    return f"{where} (Spearman {span})"


def _statements(study: Study, found: dict[str, list[Counted]], noise: str) -> str:
    """A sentence for each measure."""
    sentences = []
    for key, measure in _measures(found).items():
        by_row = {row: _over_runs(runs, key, noise) for row, runs in found.items()}
        words = relation([
            (study.labels[row], float(np.mean([one.spearman for one in ones])), ones[0].number)
            for row, ones in by_row.items()])
        sentences.append(f"{measure.title}: {words}.")
    return " ".join(sentences)


def _gain_of_half(found: dict[str, list[Counted]]) -> str:
    """A sentence on how much better the flatter half of the images does."""
    gains = [100 * float(np.mean([half - whole for half, whole in (
        lowest_means(one.curvature[key], one.correct(noise), (0.5, 1))[0] for one in runs)]))
        for key in _measures(found) for noise in NOISES for runs in found.values()]
    gains = [gain for gain in gains if math.isfinite(gain)]
    if not gains:
        return ""
    return (f" The half of lowest curvature is classified more accurately than all images in "
            f"{sum(gain > 0 for gain in gains)} of the {len(gains)} lines; the difference is "
            f"{' to '.join(dict.fromkeys(map(signed, (min(gains), max(gains)))))} points.")


def _over_runs(runs: Sequence[Counted], key: str, noise: str) -> list[CountCorrelation]:
    return [correlation_with_counts(one.curvature[key], one.correct(noise).sum(axis=0),
                        one.curvature["correct"], one.counts["num_draws"]) for one in runs]


# --- Tables ----------------------------------------------------------------------------------


def correlation_table(study: Study, found: dict[str, list[Counted]], noise: str) -> Table:
    """The coefficients for one noise, by row."""
    measures, values = _measures(found), values_of(frame(study, numbers))
    where = f"{NOISES[noise]}, {_num_draws(found)} draws"
    rows = [TableRow(study.labels[row], tuple(
        Cell(over_runs(values[row, what, f"{where}, {measure.title}"], signed, " to "))
        for measure in measures.values() for what in COEFFICIENTS)) for row in found]
    columns = [name for measure in measures.values() for name in (
        f"{measure.title}: {COEFFICIENTS[0]}", *COEFFICIENTS[1:])]
    return Table(
        f"Curvature and the number of correct predictions under {NOISES[noise]}.",
        ("Method", *columns), tuple(rows),
        f"{_statements(study, found, noise)} {_counted_details(found)}",
        _CORRELATION_NOTE if noise == next(iter(NOISES)) else "How to read: as the table above.")


_CORRELATION_NOTE = (
    "How to read: −1 means that higher curvature always goes with fewer correct predictions, 0 "
    "that they are unrelated. Pearson, groups: between k and the mean curvature of the images "
    "with k correct predictions, as the paper does; some of these means rest on few images (see "
    "the figure). Spearman: rank correlation over the images, all or those that are correctly "
    "classified without noise; beyond chance: further from 0 than unrelated numbers come once in "
    "20 times. With several seeds the mean over the seeds [lowest to highest].")


def sizes_table(study: Study, found: dict[str, list[Counted]]) -> Table:
    """How many images each mean of Fig. 9 rests on."""
    num_draws = _num_draws(found)
    rows = []
    for row, runs in found.items():
        for noise, name in NOISES.items():
            counts = np.concatenate([one.correct(noise).sum(axis=0) for one in runs])
            sizes = np.bincount(counts, minlength=num_draws + 1)
            rows.append(TableRow(f"{study.labels[row]}, {name}",
                                 tuple(Cell(count(int(size))) for size in sizes)))
    return Table("Images by number of correct predictions.",
                 ("Method and noise", *map(str, range(num_draws + 1))), tuple(rows),
                 note="How to read: columns are the number of correct predictions in "
                 f"{num_draws} draws; of all seeds together.", folded=True)


def neighbours_table(study: Study, results: dict[str, tuple[Run, dict]]) -> Table:
    """How well the features of each block separate the classes, in numbers."""
    blocks = list(dict.fromkeys(name for _, result in results.values()
                                for name in result["blocks"]))
    values = values_of(frame(study, block_numbers))
    rows = [TableRow(study.labels[row], tuple(
        Cell(f"{of_first[0]:.1f}" if of_first and math.isfinite(of_first[0]) else "–")
        for block in blocks for view in VIEWS
        for of_first in (values.get((row, NEIGHBOURS, f"{block}, {view}")),))) for row in results]
    columns = [name for block in blocks for name in (f"{_block_name(block)}: clean", "noisy")]
    return Table(
        "How well each block’s features separate the classes: accuracy in % of the 5 nearest "
        "neighbours.", ("Method", *columns), tuple(rows),
        f"{listed(count(result['num_images']) for _, result in results.values())} test images; "
        f"first seed of each method.",
        "How to read: the share of images whose class is the commonest among the five other "
        "images with the nearest features (averaged over the positions of the block’s outputs), "
        "clean among clean, noisy among noisy. Unlike the t-SNE pictures below, a number of the "
        "features themselves.")


def _num_draws(found: dict[str, list[Counted]]) -> int:
    return next(one.counts["num_draws"] for runs in found.values() for one in runs)


def _counted_details(found: dict[str, list[Counted]]) -> str:
    runs = [one for runs in found.values() for one in runs]
    return (f"{listed(one.counts['num_images'] for one in runs)} test images of each run, "
            f"{_num_draws(found)} draws; standard deviation (Gaussian) or amplitude (uniform) "
            f"{listed(one.counts['noise_std'] for one in runs)} of the pixel range, clipped to "
            "[0, 1].")


def _block_name(block: str) -> str:
    return block.replace("block", "Block ")


# --- Figures ---------------------------------------------------------------------------------


def kept_share_picture(study: Study, found: dict[str, list[Counted]]) -> Picture:
    """Fig. 8: accuracy under noise against the share of images of lowest curvature."""
    fewest = []

    def line(row, key, noise):
        curves, sizes = zip(*(lowest_means(one.curvature[key], one.correct(noise), SHARES / 100)
                              for one in found[row]), strict=True)
        fewest.extend(size[0] for size in sizes)
        # A share that one seed cannot give has no mean over the seeds.
        return SHARES, 100 * np.mean(curves, axis=0), np.sum(sizes, axis=0)

    panels = _panels(study, found, line)
    return Picture(
        "accuracy_by_curvature", robustness_figures.kept_share_figure(panels),
        "Accuracy under noise of the images with the lowest curvature (the paper’s Fig. 8).",
        f"Line charts of accuracy under noise in per cent against the share of images kept, a "
        f"line for each of {len(found)} methods; {len(panels)} panels.",
        "How to read: images are kept in the order of their curvature at the clean image; the "
        "right end is all images. A line that falls says that noise spares the images of low "
        "curvature. Each method ranks the images by its own curvature. The leftmost points rest "
        f"on {listed(fewest)} images of each run: small wiggles there are chance."
        + _gain_of_half(found)
        + _shown_measures(found) + _not_finite(found))


def groups_picture(study: Study, found: dict[str, list[Counted]]) -> Picture:
    """Fig. 9: mean clean curvature by number of correct predictions."""
    num_draws = _num_draws(found)
    few = hidden = 0

    def line(row, key, noise):
        nonlocal few, hidden
        means, sizes = means_by_count(
            np.concatenate([one.curvature[key] for one in found[row]]),
            np.concatenate([one.correct(noise).sum(axis=0) for one in found[row]]), num_draws)
        few += int(((sizes > 0) & (sizes < robustness_figures.FEW)).sum())
        hidden += int((means <= 0).sum())
        return np.arange(num_draws + 1), means, sizes

    panels = _panels(study, found, line)
    figure = robustness_figures.groups_figure(
        panels, num_draws, {measure.title: measure.axis for measure in MEASURES.values()})
    groups = sum(int((line.sizes > 0).sum()) for panel in panels for line in panel.lines)
    zeros = f" {hidden} means of zero or less are not shown." if hidden else ""
    return Picture(
        "curvature_by_correct", figure,
        "Mean curvature at the clean image, by the number of correct predictions under noise "
        "(the paper’s Fig. 9).",
        f"Line charts on a logarithmic axis of mean curvature against the number of correct "
        f"predictions, a line for each of {len(found)} methods; {len(panels)} panels. The tables "
        "hold the coefficients.",
        f"How to read: images on the right keep their right class in all {num_draws} draws. A "
        "line that falls says that images of higher curvature are misclassified more often. "
        f"Larger marker: more images; open marker: fewer than {robustness_figures.FEW} images "
        f"({few} of the {groups} means), of which one image may move the mean far.{zeros} Heights "
        "of the two columns do not compare." + _shown_measures(found) + _not_finite(found))


def surfaces_picture(study: Study, results: dict[str, tuple[Run, dict]]) -> Picture:
    """Fig. 11: the negative loss around a few images, the same for all methods."""
    first = next(iter(results.values()))[1]
    same = {row: result for row, (_, result) in results.items()
            if np.array_equal(result["image"], first["image"])
            and np.array_equal(result["offsets"], first["offsets"])}
    planes = [robustness_figures.LossPlanes(study.labels[row], result["offsets"],
                                            result["values"]) for row, result in same.items()]
    names = [first["class_names"][label] for label in first["label"]]
    left_out = [study.labels[row] for row in results if row not in same]
    return Picture(
        "loss_surfaces", robustness_figures.surfaces_figure(first["image"], names, planes),
        "The negative of the softmax loss over a plane through a test image (the paper’s "
        "Fig. 11).",
        f"Filled contours of the negative loss, a panel for each of {len(names)} images and "
        f"{len(planes)} methods.",
        "How to read: the dot is the image on the left, bright means a small loss. Up is the "
        "direction in which this network’s loss grows fastest at the image, right a random one "
        "at a right angle to it (the same random vector for all methods, before it is set at a "
        f"right angle). Offsets are Euclidean distances in pixel units, up to "
        f"{first['extent']:.2f}: the length of a typical noise vector, the training noise’s "
        f"standard deviation {first['noise_std']:g} times the square root of the number of "
        "values in an image. Colours compare within a line of panels, not between lines. Closely "
        "spaced contours that bend are a curved loss. Points outside [0, 1] are not clipped."
        + (f" Not shown, of other images: {', '.join(left_out)}." if left_out else ""))


def blocks_picture(study: Study, results: dict[str, tuple[Run, dict]], view: str) -> Picture:
    """Fig. 12 (clean) or 13 (noisy): the outputs of each block in the plane."""
    other = {"clean": "noisy", "noisy": "clean"}[view]
    planes = [robustness_figures.BlockPlanes(
        study.labels[row],
        tuple(f"{_block_name(block)} ({channels} channels)" for block, channels in zip(
            result["blocks"], result["channels"], strict=True)),
        result[view], result[other], result["label"]) for row, (_, result) in results.items()]
    names = class_labels(next(iter(results.values()))[1]["class_names"])
    noise = listed(result["noise_std"] for _, result in results.values())
    which, number = (("clean test images", 12) if view == "clean" else
                     (f"test images with Gaussian noise of std {noise} of the pixel range", 13))
    return Picture(
        f"blocks_{view}", robustness_figures.blocks_figure(planes, names),
        f"Outputs of the network’s blocks, by t-SNE: {which} (the paper’s Fig. {number}).",
        f"Scatter plots coloured by class, a panel for each block of {len(planes)} methods.",
        "How to read: a point for each test image, its block’s outputs averaged over their "
        "positions, colour and marker by its true class. Clean and noisy images share one "
        "embedding of each panel, so the same place in the clean and in the noisy figure is the "
        "same feature. Directions, distances between clusters and sizes have no meaning in "
        "t-SNE; the table above holds a number for each panel.")


def _panels(study: Study, found: dict[str, list[Counted]], line: Callable
            ) -> list[robustness_figures.Panel]:
    return [robustness_figures.Panel(NOISES[noise], measure.title, tuple(
        robustness_figures.Line(study.labels[row], _style(study, row), *line(row, key, noise))
        for row in found)) for noise in NOISES for key, measure in _measures(found).items()]


def _shown_measures(found: dict[str, list[Counted]]) -> str:
    runs = [one for runs in found.values() for one in runs]
    return (" Exact Hessian: the squared Frobenius norm at the image itself, from exact products; "
            "Eq. 21: the paper’s finite differences, here at t = "
            f"{listed(one.curvature['step'] for one in runs)} of the pixel range.")


def _not_finite(found: dict[str, list[Counted]]) -> str:
    number = sum(int((~np.isfinite(one.curvature[key])).sum())
                 for runs in found.values() for one in runs for key in _measures(found))
    return f" {number} curvatures that are not finite are left out." if number else ""


# --- Sections --------------------------------------------------------------------------------


def sections(study: Study) -> list[Section]:
    """Those whose results are there."""
    made = []
    found, left_out = _counted_runs(study)
    if found:
        tables = [correlation_table(study, found, noise) for noise in NOISES]
        lead = ("Are images at which the loss curves more the ones that noise turns wrong? By "
                "each measure of curvature, which are different quantities.")
        if left_out:
            lead += (" Not shown, measured with other images or draws: "
                     f"{'; '.join(left_out)}.")
        made.append(Section(
            "robustness", "Curvature and correct predictions under noise", lead,
            (*tables, sizes_table(study, found)),
            (kept_share_picture(study, found), groups_picture(study, found))))
    surfaces = _first_results(study, "surfaces")
    if surfaces:
        made.append(Section("surfaces", "Loss around an image", "", (),
                            (surfaces_picture(study, surfaces),)))
    blocks = _first_results(study, "blocks")
    if blocks:
        made.append(Section(
            "blocks", "Features of the blocks", "",
            (neighbours_table(study, blocks),),
            tuple(blocks_picture(study, blocks, view) for view in ("clean", "noisy"))))
    return made
