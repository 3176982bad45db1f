"""The report's section on the curvature of the loss in input space, the paper's Fig. 10."""

import math
from collections.abc import Iterator

import numpy as np

from jaxrobust.app.measurements.networks import CURVATURES
from jaxrobust.app.report import figures
from jaxrobust.app.report.frame import Number, frame, values_of
from jaxrobust.app.report.page import (
    Cell,
    Picture,
    Section,
    Table,
    TableRow,
    listed,
    over_runs,
)
from jaxrobust.app.study.read import Run, Study

MEDIAN, MEAN, HIDDEN = "median curvature", "mean curvature", "curvatures of zero or less"


def numbers(run: Run) -> Iterator[Number]:
    """Over the images; the medians alone where the arrays are not kept."""
    for key, name in CURVATURES.items():
        if run.curvature and key in run.curvature:
            values = run.curvature[key]
            finite = values[np.isfinite(values)].astype(np.float64)
            median, mean = ((np.median(finite), np.mean(finite)) if len(finite) else
                            (math.nan, math.nan))
            yield Number(MEDIAN, name, float(median), "1/pixel⁴")
            yield Number(MEAN, name, float(mean), "1/pixel⁴")
            yield Number(HIDDEN, name, values.size - int((finite > 0).sum()), "images")
        elif run.medians and key in run.medians:
            yield Number(MEDIAN, name, run.medians[key], "1/pixel⁴")


def section(study: Study) -> Section | None:
    """The section; None if no run of the study was measured."""
    if not _curvature_runs(study):
        return None
    return Section(
        "curvature", "Curvature of the loss in input space",
        "How fast the gradient of the loss turns when the image changes a little. The paper "
        "argues that robustness to noise and low curvature go together.",
        (curvature_table(study),), (curvature_picture(study),))


def curvature_table(study: Study) -> Table:
    """Medians and means of the curvatures over the images, by row."""
    found, measures = _curvature_runs(study), _measures(study)
    over = values_of(frame(study, numbers))
    rows = []
    for row in found:
        cells = [Cell(over_runs(over[row, what, name]))
                 for name in measures.values() for what in (MEDIAN, MEAN)]
        hidden = [f"{sum(over[row, HIDDEN, name]):g}" for name in measures.values()]
        rows.append(TableRow(study.labels[row], (*cells, Cell(" / ".join(hidden)))))
    image_counts = listed(run.curvature["num_images"]
                          for runs in _curvature_runs(study).values() for run in runs)
    return Table(
        "Curvature of the softmax loss in input space.",
        ("Method", *(head for name in measures.values() for head in (f"{name}: median", "mean")),
         "Zero or less"), tuple(rows),
        f"All of the {image_counts} test images of each run, not only the lowest 90 %.",
        "How to read: lower is flatter. Unit: 1/pixel⁴ (the loss is in nats), with pixel values "
        "in [0, 1]. Median or mean over the images; with several seeds the mean over the seeds "
        "[lowest–highest seed]. Last column: number of values that a logarithmic axis cannot "
        f"show (zero, negative or not finite), {' / '.join(measures.values()).lower()}.")


def _measures(study: Study) -> dict[str, str]:
    """Those of CURVATURES that every run has."""
    return {key: name for key, name in CURVATURES.items()
            if all(key in run.curvature
                   for runs in _curvature_runs(study).values() for run in runs)}


def _curvature_runs(study: Study) -> dict[str, list[Run]]:
    found = {row: [run for run in runs if run.curvature] for row, runs in study.runs.items()}
    return {row: runs for row, runs in found.items() if runs}


def curvature_picture(study: Study) -> Picture:
    """Box plots of the curvatures."""
    found, measures = _curvature_runs(study), _measures(study)
    # The lowest 90 % of each run, so that one seed's outliers do not displace another's images.
    samples = [figures.CurvatureSample(
        study.labels[row], figures.row_style(list(study.labels).index(row)),
        {key: np.concatenate([figures.lowest_share(run.curvature[key]) for run in runs])
         for key in measures}) for row, runs in found.items()]
    shown = [values for sample in samples for values in sample.values.values()]
    hidden = sum(int((~(values > 0)).sum()) for values in shown)
    facts = [run.curvature for runs in found.values() for run in runs]
    step = listed(f"{one['step']:g}" for one in facts)
    titles = {"frobenius_squared": "$\\Vert H\\Vert_F^2$ of the exact Hessian",
              "finite_difference": f"$\\Lambda$ of Eq. 21 at $t$ = {step}"}
    explained = ("the squared Frobenius norm of the Hessian at the image itself; the paper’s "
                 "Eq. 21, which also counts the kinks of the ReLUs that its steps cross and may "
                 "differ by orders of magnitude")
    if "smoothed_frobenius_squared" in measures:
        sigma = listed(f"{one['smoothing']:g}" for one in facts)
        titles["smoothed_frobenius_squared"] = (
            f"$\\Vert H_\\sigma\\Vert_F^2$ of the loss\naveraged over noise, $\\sigma$ = {sigma}")
        explained += ("; and the squared Frobenius norm of the Hessian of the loss averaged over "
                      "noise, in which jumps of the gradient to and fro cancel")
    return Picture(
        "curvature", figures.curvature_figure(samples, titles),
        "Curvature of the softmax loss at clean test images: the lowest 90 % of each run, as in "
        "the paper’s Fig. 10.",
        f"{len(measures)} panels of box plots on a logarithmic axis, one box for each of "
        f"{len(samples)} methods. The curvature table holds medians and means.",
        f"How to read: further left is flatter. Box: quartiles and median; whiskers: 5th to 95th "
        f"percentile. {hidden} of the {sum(map(len, shown))} values are zero or negative and are "
        "not shown (they lie beyond the left edge, but count for the boxes). The panels show "
        f"different quantities, from left to right: {explained}. Do not compare the panels. "
        f"Derivatives with respect to {listed(one['with_respect_to'] for one in facts)}.")
