"""The report's section on the checked theorems, from what the command ``theory`` wrote."""

import math
import statistics
from collections.abc import Iterable, Iterator

import numpy as np

from jaxrobust.app.measurements.theory import figures
from jaxrobust.app.report.figures import row_style
from jaxrobust.app.report.frame import Number, frame, values_of
from jaxrobust.app.report.page import (
    Cell,
    Picture,
    Section,
    Table,
    TableRow,
    count,
    listed,
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
    """The section; None if no run of the study was checked."""
    found = {row: [result for run in runs if (result := run.result("theory"))]
             for row, runs in study.runs.items()}
    found = {row: results for row, results in found.items() if results}
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
    """Each claim, and what the tables show of the measurements behind the claims."""
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


def _percent(share: float) -> str:
    return f"{share:.1f}" if math.isfinite(share) else "–"


CURVATURE_COLUMNS = {
    "Eq. 14: residual": ("residual of Eq. 14, median", "", significant),
    "Step 1, ‖H‖² [%]": ("holds", "eq22_pointwise", _percent),
    "Step 1, ‖H_σ‖² [%]": ("holds", "eq22_smoothed", _percent),
    "Eq. 15 holds [%]": ("holds", "thm61_upper_pointwise_median", _percent),
    "Eq. 15 / ‖H‖²": ("looseness", "thm61_upper_pointwise_median", significant),
    "Eq. 15 / ‖H_σ‖²": ("looseness", "thm61_upper_smoothed_median", significant),
    "Eq. 16 holds, H [%]": ("holds", "thm61_lower_pointwise_median", _percent),
    "Eq. 16 holds, H_σ [%]": ("holds", "thm61_lower_smoothed_median", _percent),
}
"""Measurement, condition and how it is shown, by heading."""

CLAIM_COLUMNS = {
    "L_compact": ("L_compact", "training images", significant),
    "L_margin": ("L_margin", "training images", significant),
    "Within δ_v [%]": ("within δ_v", "training images", _percent),
    "T_ν: same predictions [%]": ("same predictions", "T_ν", _percent),
    "6.2: largest error bounded below 1": (
        "largest error bounded below 1", MAPPING["theorem"], significant),
    "Fixed features: the same": (
        "largest error bounded below 1", MAPPING["held_out"], significant),
    "6.3: τ at δ_v": ("smallest τ", "δ_v", significant),
    "τ, widest balls": ("smallest τ", "widest balls", significant),
    "Bound there [nats]": ("bound on the divergence", "widest balls", significant),
    "Divergence at least [nats]": ("smallest divergence", "features", significant),
}
"""As :data:`CURVATURE_COLUMNS`."""


def _rows(study: Study, rows: Iterable[str], columns: Iterable[tuple]) -> tuple[TableRow, ...]:
    """Means over the seeds; of the largest error, the largest."""
    values = values_of(frame(study, numbers))

    def cell(row, what, where, show):
        found = values.get((row, what, where), (math.nan,))
        return Cell(show(max(found) if what.startswith("largest") else statistics.fmean(found)))

    return tuple(TableRow(study.labels[row], tuple(cell(row, *column) for column in columns))
                 for row in rows)


def curvature_table(study: Study, found: dict[str, list[dict]]) -> Table:
    """Theorem 6.1 and its assumption, by row."""
    first = [result for results in found.values() for result in results]
    settings = first[0]["settings"]
    sigmas = listed(f"{255 * result['sigma']:.3g}" for result in first)
    return Table(
        "Theorem 6.1: curvature between two bounds.",
        ("Method", *CURVATURE_COLUMNS), _rows(study, found, CURVATURE_COLUMNS.values()),
        f"{settings['num_images']} test images of each run, noise of standard deviation "
        f"{sigmas}/255, "
        f"{settings['num_draws']} draws; δ is the median displacement of the run’s features "
        "(half of all draws stay within it).",
        "How to read: Eq. 14 takes the loss as quadratic at the scale of the noise; its residual "
        "is the part of E(l(x+ε) − l(x))² that the quadratic model misses: 0 is a quadratic loss, "
        "1 no better than a constant, more than 1 is worse; median over the images. Step 1: share "
        "of the images with a curvature below 2/σ⁴ E(l(x+ε) − l(x))², assumed for the pointwise "
        "Hessian H, a theorem for H_σ, that of the noise-averaged loss. Eq. 15, 16: share of the "
        "images for which the bound holds (Eq. 16: of those for which it is above 0), and the "
        "median of bound over value: 1 would be tight. With several seeds, means over them.")


def claims_table(study: Study, found: dict[str, list[dict]]) -> Table:
    """Sections 5, 6.2 and 6.3, by row."""
    results = [result for row in found.values() for result in row]
    deltas = {name: listed(f"{result[name]:g}" for result in results)
              for name in ("delta_v", "delta_d")}
    return Table(
        "Propositions 5.1 to 5.3, Theorems 6.2 and 6.3.",
        ("Method", *CLAIM_COLUMNS), _rows(study, found, CLAIM_COLUMNS.values()),
        f"Losses and shares: {listed(count(r['num_train_images']) for r in results)} training "
        f"images, δ_v = {deltas['delta_v']}, δ_d = {deltas['delta_d']}; the rest: "
        f"{listed(count(r['num_test_images']) for r in results)} test images.",
        "How to read: Propositions 5.1 and 5.2 assume that L_compact and L_margin are exactly 0; "
        "rows that were trained without these terms are shown for comparison. T_ν must leave every "
        "prediction as it is. A bound on the share of images outside a ball says something only "
        "below 1: the largest error that is bounded below 1 is 0 for Theorem 6.2, which is then "
        "about balls that hold every feature. Theorem 6.3 needs τ ≥ 1/2 in the worst class; at "
        "the run’s δ_v and with the widest balls that are still disjoint; its bound, in nats, "
        "beside what a classifier shows the divergence of the closest pair of classes to be at "
        "least, in the penultimate layer.")


def separation_table(study: Study, found: dict[str, list[dict]]) -> Table:
    """Theorem 6.3 layer by layer, by row."""
    layers = next(iter(found.values()))[0]["separation"]["layers"]
    columns = (*layers, *SEPARATION.values())
    return Table(
        "Theorem 6.3: how far apart two classes are in each layer, in nats.",
        ("Method", *columns),
        _rows(study, found, [(DIVERGENCE, name, significant) for name in columns]),
        "Median over the pairs of classes; with several seeds, the mean of that.",
        "How to read: higher is better separated; log 2 = 0.693 is complete separation. Layers: "
        "what a logistic regression shows the divergence to be at least. Right of them bounds that "
        "hold for every layer at once: that of Eq. 20 and the sharpest under its hypotheses, for "
        "balls around the two centroids that touch, and that from the sides of the network’s "
        "own decision hyperplane (docs/theory.md). No layer’s divergence is below that of a later "
        "one, so that a number of an earlier layer below one on its right says how little a linear "
        "classifier sees there.")


def bounds_picture(study: Study, found: dict[str, list[dict]]) -> Picture:
    """Theorem 6.1."""
    samples = []
    for row, results in found.items():
        values = {label: np.concatenate([result[key] for result in results])
                  for key, label in CURVATURES.items()}
        change = CURVATURES["squared_change"]
        values[change] = np.concatenate(
            [2 / result["sigma"] ** 4 * result["squared_change"] for result in results])
        samples.append(figures.BoundSample(study.labels[row], values))
    hidden = sum(int((~(values > 0)).sum()) for sample in samples
                 for values in sample.values.values())
    total = sum(values.size for sample in samples for values in sample.values.values())
    return Picture(
        "theory_curvature", figures.bounds_figure(samples),
        "Theorem 6.1: the curvature at test images, and what bounds it.",
        f"Box plots on a logarithmic axis, {len(CURVATURES)} boxes for each of {len(samples)} "
        "methods: two curvatures and two bounds on them.",
        "How to read: further left is flatter. Box: quartiles and median over the images; "
        "whiskers: 5th to 95th percentile. A bound’s box should lie right of a curvature’s; the "
        "distance between the two, in powers of ten, is how loose it is. The order of the methods "
        "by a loose bound need not be that by the curvature. "
        f"{hidden} of the {total} values are zero or negative (estimates of ‖H_σ‖² scatter around "
        "theirs) and lie beyond the left edge.")


def mapping_picture(study: Study, found: dict[str, list[dict]]) -> Picture:
    """Theorem 6.2."""
    curves = []
    for row, results in found.items():
        values = {label: np.mean([np.mean(result["mapping"][key], axis=0) for result in results],
                                 axis=0) for key, label in MAPPING.items()}
        curves.append(figures.MappingCurves(
            study.labels[row], np.array(results[0]["mapping"]["radii_over_median_distance"]),
            values))
    settings = next(iter(found.values()))[0]["settings"]
    return Picture(
        "theory_mapping", figures.mapping_figure(curves),
        "Theorem 6.2: the share of test images outside a ball around their class’s centroid.",
        f"Line charts against the radius, one for each of {len(curves)} methods: the measured "
        "share, and four bounds on it.",
        "How to read: means over the classes. Radius in units of the median distance of the "
        "class’s training images to their centroid. Grey: above 1 a bound says nothing; a line "
        "that is not seen lies above. The bounds for fixed features and Clopper and Pearson’s "
        "are made on one half of the test images; the measured share is of the other half. Each "
        f"holds with probability {1 - settings['failure_probability']:g} for a class and radius.")


def separation_picture(study: Study, found: dict[str, list[dict]]) -> Picture:
    """Theorem 6.3."""
    lines = []
    for row, results in found.items():
        parts = [result["separation"] for result in results]
        layers = tuple(parts[0]["layers"])
        by_layer = [np.concatenate([part["divergence"][name] for part in parts])
                    for name in layers]
        bounds = {label: np.concatenate([part[key] for part in parts])
                  for key, label in SEPARATION.items()}
        lines.append(figures.SeparationLine(
            study.labels[row], row_style(list(study.labels).index(row)), layers,
            np.array([values.min() for values in by_layer]),
            np.array([np.median(values) for values in by_layer]),
            {label: (float(values.min()), float(np.median(values)))
             for label, values in bounds.items()}))
    return Picture(
        "theory_separation", figures.separation_figure(lines),
        "Theorem 6.3: how far apart two classes are in each layer, and what the theorem promises.",
        f"Two line charts of the Jensen-Shannon divergence against the layer, a line for each of "
        f"{len(lines)} methods, and the theorem’s bounds beside them.",
        "How to read: higher is better separated; 0.693 nats (log 2) is complete separation. "
        "Lines: what a logistic regression, fitted on one half of the test images and judged on "
        "the other, shows the divergence to be at least (features of a block: averages over its "
        "pixels). Right of the vertical line, bounds that hold for every layer: that of Eq. 20 and "
        "the sharpest that its hypotheses allow, for balls around the two classes’ centroids that "
        "touch each other, and that from the sides of the network’s decision hyperplanes.")


def _informative_error(mapping: dict, name: str) -> float:
    """The largest measured error among the classes and radii with a bound below 1."""
    errors, bounds = np.array(mapping["error"]), np.array(mapping[name])
    return float(errors[bounds < 1].max(initial=0))
