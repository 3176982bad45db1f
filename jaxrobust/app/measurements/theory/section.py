"""Makes the report's section on the checked theorems from the files of the command ``theory``."""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jaxrobust.app.report.figures import (
    GRID,
    add_legend,
    boxes,
    new_figure,
    row_styles,
    style_handles,
    wrap,
)
from jaxrobust.app.report.frame import Number, number_rows
from jaxrobust.app.report.page import (
    Picture,
    Section,
    Table,
    count,
    listed,
    mean_text,
    significant,
)
from jaxrobust.app.study.read import Run, Study

CURVATURES = {
    "hessian": "‖H‖², pointwise, exact",
    "smoothed_hessian": "‖H_σ‖², of the noise-averaged loss",
    "squared_change": "2/σ⁴ E(l(x+ε) − l(x))²: bounds ‖H_σ‖²; ‖H‖² only with Eq. 14",
    "upper_bound_median": "Eq. 15 at the median displacement",
}
"""Columns of ``theory.npz`` that the first figure shows, and their names there."""

MAPPING = {
    "error": "measured on test images",
    "theorem": "Theorem 6.2, on the training images",
    "held_out": "for fixed features, norms from 0",
    "held_out_around": "for fixed features, norms from the training centroid",
    "fixed_centre": "Clopper-Pearson, fixed centre",
}
"""Curves of ``theory.json`` that the second figure shows, and their names there."""


SEPARATION = {
    "pair_bound": "Eq. 20", "pair_sharp_bound": "Sharp", "pair_decision_bound": "Hyperplanes"}
"""Bounds of ``theory.json`` on the divergence of each pair of classes, and their names."""

DIVERGENCE = "divergence, median over the pairs"


def section_of(study: Study) -> Section | None:
    """Makes the section; returns None if no run of the study was checked."""
    found = study.results("theory")
    if not found:
        return None
    return Section(
        "theory", "The paper’s theorems, checked",
        "Each proposition and theorem of the paper was tried on these networks: whether what it "
        "assumes is met, whether what it claims is true, and how far its bound is from the value. "
        "The derivations are in docs/theory.md.",
        (curvature_table(study, found), claims_table(study, found),
         separation_table(study, found)),
        (bounds_picture(study, found), mapping_picture(study, found),
         separation_picture(study, found)))


def numbers(run: Run) -> Iterator[Number]:
    """Yields each claim, and the measurements behind the claims that the tables show."""
    facts, whole = run.facts("theory"), run.result("theory")
    if whole:
        yield Number("residual of Eq. 14, median", "",
                     float(np.nanmedian(whole["quadratic_residual"])), "")
    if not facts:
        return
    for claim in facts["claims"]:
        for field, unit, scale in (("holds", "%", 100), ("looseness", "", 1)):
            if claim[field] is not None:
                yield Number(field, claim["key"], scale * claim[field], unit)
    geometry, separation = facts["geometry"], facts["separation"]
    yield Number("L_compact", "training images", geometry["compactness_loss"], "")
    yield Number("L_margin", "training images", geometry["margin_loss"], "")
    yield Number("within δ_v", "training images", 100 * geometry["train_share_within_delta_v"], "%")
    yield Number("same predictions", "T_ν", 100 * float(np.mean(
        facts["rescaling"]["same_predictions"])), "%")
    for name in ("theorem", "held_out"):
        yield Number("largest error bounded below 1", MAPPING[name],
                     _informative_error(facts["mapping"], name), "")
    yield Number("smallest τ", "δ_v", min(separation["tau_at_delta_v"]), "")
    yield Number("smallest τ", "widest balls", min(separation["tau_at_widest"]), "")
    yield Number("bound on the divergence", "widest balls", separation["bound_at_widest"], "nats")
    yield Number("smallest divergence", "features", min(separation["divergence"]["features"]),
                 "nats")
    for layer in separation["layers"]:
        yield Number(DIVERGENCE, layer, float(np.median(separation["divergence"][layer])), "nats")
    for key, name in SEPARATION.items():
        yield Number(DIVERGENCE, name, float(np.median(separation[key])), "nats")


def _mean_percent(values: Sequence[float]) -> str:
    mean = statistics.fmean(values or [math.nan])
    return f"{mean:.1f}" if math.isfinite(mean) else "–"


def _largest(values: Sequence[float]) -> str:
    return significant(max(values, default=math.nan))


CURVATURE_COLUMNS = {
    "Eq. 14: residual": ("residual of Eq. 14, median", "", mean_text),
    "Step 1, ‖H‖² [%]": ("holds", "eq22_pointwise", _mean_percent),
    "Step 1, ‖H_σ‖² [%]": ("holds", "eq22_smoothed", _mean_percent),
    "Eq. 15 holds [%]": ("holds", "thm61_upper_pointwise_median", _mean_percent),
    "Eq. 15 / ‖H‖²": ("looseness", "thm61_upper_pointwise_median", mean_text),
    "Eq. 15 / ‖H_σ‖²": ("looseness", "thm61_upper_smoothed_median", mean_text),
    "Eq. 16 holds, H [%]": ("holds", "thm61_lower_pointwise_median", _mean_percent),
    "Eq. 16 holds, H_σ [%]": ("holds", "thm61_lower_smoothed_median", _mean_percent),
}
"""Measurement, condition and how it is shown, by heading."""

CLAIM_COLUMNS = {
    "L_compact": ("L_compact", "training images", mean_text),
    "L_margin": ("L_margin", "training images", mean_text),
    "Within δ_v [%]": ("within δ_v", "training images", _mean_percent),
    "T_ν: same predictions [%]": ("same predictions", "T_ν", _mean_percent),
    "6.2: largest error bounded below 1": (
        "largest error bounded below 1", MAPPING["theorem"], _largest),
    "Fixed features: the same": (
        "largest error bounded below 1", MAPPING["held_out"], _largest),
    "6.3: τ at δ_v": ("smallest τ", "δ_v", mean_text),
    "τ, widest balls": ("smallest τ", "widest balls", mean_text),
    "Bound there [nats]": ("bound on the divergence", "widest balls", mean_text),
    "Divergence at least [nats]": ("smallest divergence", "features", mean_text),
}
"""As :data:`CURVATURE_COLUMNS`."""


def curvature_table(study: Study, found: dict[str, list[dict]]) -> Table:
    """Tabulates Theorem 6.1 and its assumption, by row."""
    first = [result for results in found.values() for result in results]
    settings = first[0]["settings"]
    sigmas = listed(f"{255 * result['sigma']:.3g}" for result in first)
    return Table(
        "Theorem 6.1: curvature between two bounds.",
        ("Method", *CURVATURE_COLUMNS),
        number_rows(study, found, numbers, CURVATURE_COLUMNS.values()),
        f"{settings['num_images']} test images of each run, noise of standard deviation "
        f"{sigmas}/255, {settings['num_draws']} draws; δ is the median displacement of the run’s "
        "features (half of all draws stay within it).",
        "How to read: Eq. 14 assumes a quadratic loss at the scale of the noise; its residual is "
        "the part of E(l(x+ε) − l(x))² that the quadratic model misses (0: quadratic, 1: no better "
        "than a constant), median over the images. Step 1: share of the images with a curvature "
        "below 2/σ⁴ E(l(x+ε) − l(x))², an assumption for the pointwise Hessian H, a theorem for "
        "H_σ, that of the noise-averaged loss. Eq. 15, 16: share of the images for which the bound "
        "holds (Eq. 16: of those for which it is above 0), and median of bound over value, 1 if "
        "tight. Means over the seeds.")


def claims_table(study: Study, found: dict[str, list[dict]]) -> Table:
    """Tabulates Sections 5, 6.2 and 6.3, by row."""
    results = [result for row in found.values() for result in row]
    deltas = {name: listed(f"{result[name]:g}" for result in results)
              for name in ("delta_v", "delta_d")}
    return Table(
        "Propositions 5.1 to 5.3, Theorems 6.2 and 6.3.",
        ("Method", *CLAIM_COLUMNS),
        number_rows(study, found, numbers, CLAIM_COLUMNS.values()),
        f"Losses and shares: {listed(count(r['num_train_images']) for r in results)} training "
        f"images, δ_v = {deltas['delta_v']}, δ_d = {deltas['delta_d']}; the rest: "
        f"{listed(count(r['num_test_images']) for r in results)} test images.",
        "How to read: Propositions 5.1 and 5.2 assume that L_compact and L_margin are exactly 0; "
        "rows that were trained without these terms are shown for comparison. T_ν must keep every "
        "prediction. A bound on the share of images outside a ball is informative only below 1: "
        "the largest error with such a bound is 0 for Theorem 6.2, which then concerns balls that "
        "contain every feature. Theorem 6.3 needs τ ≥ 1/2 in the worst class, at the run’s δ_v or "
        "with the widest disjoint balls. Its bound, in nats, stands beside a lower bound, from a "
        "classifier, on the divergence of the closest two classes in the penultimate layer.")


def separation_table(study: Study, found: dict[str, list[dict]]) -> Table:
    """Tabulates Theorem 6.3 layer by layer, by row."""
    layers = next(iter(found.values()))[0]["separation"]["layers"]
    columns = (*layers, *SEPARATION.values())
    return Table(
        "Theorem 6.3: how far apart two classes are in each layer, in nats.",
        ("Method", *columns),
        number_rows(study, found, numbers, [(DIVERGENCE, name, mean_text) for name in columns]),
        "Median over the pairs of classes; with several seeds, the mean of that.",
        "How to read: higher is better separated; log 2 = 0.693 is complete separation. Layers: "
        "lower bounds from a logistic regression. Right of them, bounds that hold for every layer "
        "at once: Eq. 20 and the sharpest under its hypotheses, for balls around the two centroids "
        "that touch, and that from the sides of the network’s own decision hyperplane "
        "(docs/theory.md). No layer’s divergence is below that of a later one: where its number is "
        "lower, a linear classifier sees little of it.")


def bounds_picture(study: Study, found: dict[str, list[dict]]) -> Picture:
    """Shows Theorem 6.1: box plots of the curvatures and their bounds, a group for each row."""
    styles, thickness = row_styles(CURVATURES.values()), 1 / (len(CURVATURES) + 1)
    figure = new_figure(10, 2.2 + 0.28 * len(found) / thickness)
    ax = figure.subplots()
    groups = []
    for place, results in enumerate(found.values()):
        for index, (key, label) in enumerate(CURVATURES.items()):
            scale = [2 / result["sigma"] ** 4 if key == "squared_change" else 1
                     for result in results]
            values = np.concatenate([factor * result[key] for factor, result in zip(
                scale, results, strict=True)])
            shift = index - (len(CURVATURES) - 1) / 2
            groups.append((place + shift * thickness, values, styles[label]))
    boxes(ax, groups, width=0.8 * thickness)
    ax.set_xlabel("Squared Frobenius norm, or its bound [nats$^2$/pixel$^4$]")
    ax.set_yticks(range(len(found)), [wrap(study.labels[row]) for row in found])
    ax.set_ylim(len(found) - 0.5, -0.5)
    for place in range(1, len(found)):
        ax.axhline(place - 0.5, color="#BFBFBF", linewidth=0.6)
    add_legend(figure, style_handles(styles.items(), 44, linestyle="none"), columns=2)
    ax.grid(visible=False, axis="y")
    hidden = sum(int((~(values > 0)).sum()) for _, values, _ in groups)
    number = sum(values.size for _, values, _ in groups)
    return Picture(
        "theory_curvature", figure,
        "Theorem 6.1: the curvature at test images, and what bounds it.",
        f"Box plots on a logarithmic axis, {len(CURVATURES)} boxes for each of {len(found)} "
        "methods: two curvatures and two bounds on them.",
        "How to read: further left is flatter. Box: quartiles and median over the images; "
        "whiskers: 5th to 95th percentile. A bound’s box should lie right of a curvature’s; their "
        "distance, in powers of ten, shows how loose it is. A loose bound need not order the "
        f"methods as the curvature does. {hidden} of the {number} values are zero or negative "
        "(estimates of ‖H_σ‖² scatter) and lie beyond the left edge.")


def mapping_picture(study: Study, found: dict[str, list[dict]]) -> Picture:
    """Shows Theorem 6.2: the share of test images outside the ball, and its bounds, by radius."""
    columns = min(3, len(found))
    figure = new_figure(3.9 * columns, 1.3 + 2.7 * math.ceil(len(found) / columns))
    axes = figure.subplots(math.ceil(len(found) / columns), columns, squeeze=False, sharey=True)
    styles = row_styles(MAPPING.values())
    for ax in axes.flat[len(found):]:
        ax.remove()
    for index, (ax, (row, results)) in enumerate(zip(axes.flat, found.items(), strict=False)):
        ax.axhspan(1, 1.15, color="#EFEFEF", zorder=0)
        for key, name in MAPPING.items():
            curves = [np.mean(result["mapping"][key], axis=0) for result in results]
            ax.plot(results[0]["mapping"]["radii_over_median_distance"], np.mean(curves, axis=0),
                    color=styles[name].color, linestyle=styles[name].dashes,
                    marker=styles[name].marker, markersize=4, linewidth=1.3)
        ax.set_title(wrap(study.labels[row], 38), fontsize=10)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set_ylim(-0.03, 1.15)
        if index % columns == 0:
            ax.set_ylabel("Share outside the ball")
        if index + columns >= len(found):
            ax.set_xlabel("Radius / median distance")
    add_legend(figure, style_handles(styles.items(), 44, markersize=5), columns=2)
    failure = next(iter(found.values()))[0]["settings"]["failure_probability"]
    return Picture(
        "theory_mapping", figure,
        "Theorem 6.2: the share of test images outside a ball around their class’s centroid.",
        f"Line charts against the radius, one for each of {len(found)} methods: the measured "
        "share, and four bounds on it.",
        "How to read: means over the classes. Radius in units of the median distance of the "
        "class’s training images to their centroid. Grey: above 1 a bound says nothing; lines that "
        "are not visible lie above. The bounds for fixed features and Clopper and Pearson’s use "
        "one half of the test images, the measured share the other. Each holds with probability "
        f"{1 - failure:g} for a class and radius.")


def separation_picture(study: Study, found: dict[str, list[dict]]) -> Picture:
    """Shows Theorem 6.3: divergences layer by layer, and the theorem's bounds beside them."""
    layers = next(iter(found.values()))[0]["separation"]["layers"]
    styles = row_styles(study.labels)
    figure = new_figure(11, 5.4)
    axes = figure.subplots(1, 2, sharey=True)
    statistics: dict[str, Callable[..., float]] = {"smallest": np.min, "median": np.median}
    for ax, (name, statistic) in zip(axes, statistics.items(), strict=True):
        for index, (row, results) in enumerate(found.items()):
            parts = [result["separation"] for result in results]
            look = {"color": styles[row].color, "marker": styles[row].marker, "markersize": 6,
                    "markeredgecolor": "white", "markeredgewidth": 0.6}
            ax.plot([statistic([part["divergence"][layer] for part in parts]) for layer in layers],
                    linestyle=styles[row].dashes, linewidth=1.3, **look)
            shift = 0.07 * (index - (len(found) - 1) / 2)
            ax.plot(len(layers) + np.arange(len(SEPARATION)) + shift,
                    [statistic([part[key] for part in parts]) for key in SEPARATION],
                    linestyle="none", **look)
        ticks = [*layers, *SEPARATION.values()]
        ax.set_xticks(range(len(ticks)), ticks, rotation=30, ha="right", rotation_mode="anchor")
        ax.axvline(len(layers) - 0.5, color="#7F7F7F", linewidth=0.8)
        ax.axhline(math.log(2), color="#7F7F7F", linewidth=0.8, linestyle=(0, (4, 3)))
        ax.set_title(f"{name.capitalize()} over the pairs of classes")
    axes[0].set_ylabel("Jensen-Shannon divergence [nats]")
    axes[0].text(0, math.log(2), "log 2, the largest value", fontsize=8, va="bottom")
    add_legend(figure, style_handles([(study.labels[row], styles[row]) for row in found],
                                     markersize=5))
    for ax in axes:
        ax.grid(**GRID)
    return Picture(
        "theory_separation", figure,
        "Theorem 6.3: how far apart two classes are in each layer, and what the theorem promises.",
        f"Two line charts of the Jensen-Shannon divergence against the layer, a line for each of "
        f"{len(found)} methods, and the theorem’s bounds beside them.",
        "How to read: higher is better separated; 0.693 nats (log 2) is complete separation. "
        "Lines: lower bounds from a logistic regression that is fitted on one half of the test "
        "images and judged on the other (features of a block: averages over its pixels). Right of "
        "the vertical line: the bounds of the table, which hold for every layer.")


def _informative_error(mapping: dict, name: str) -> float:
    """Returns the largest measured error among the classes and radii with a bound below 1."""
    errors, bounds = np.array(mapping["error"]), np.array(mapping[name])
    return float(errors[bounds < 1].max(initial=0))
