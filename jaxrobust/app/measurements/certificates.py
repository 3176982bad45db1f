"""Certified accuracy by randomised smoothing, image by image."""

import dataclasses
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from jaxrobust import _validate
from jaxrobust.app.classifiers import ForeignModel
from jaxrobust.app.execution import batch_size_of
from jaxrobust.app.measurements.estimates import (
    Estimate,
    Limit,
    TestSize,
    bootstrapped,
    check_counts,
    estimate,
    found_of,
    images_of,
    numbers_of,
    share,
    subsets_text,
    table_of,
)
from jaxrobust.app.measurements.runner import Measured, Measurement, Work
from jaxrobust.app.progress import progress
from jaxrobust.app.report.figures import add_legend, new_figure, row_styles, style_handles
from jaxrobust.app.report.page import Picture, Section
from jaxrobust.app.study.read import Run, Study
from jaxrobust.app.trainer import TrainedRun
from jaxrobust.certification import (
    ABSTAINED,
    Certificate,
    certified_accuracy,
    certified_radius,
    certify,
)
from jaxrobust.images import LogitsFn, predicted_classes

SEED = 0
"""Seeds the noise: the same for all models."""


@dataclasses.dataclass(frozen=True)
class CertificateSettings:
    """How certificates are measured."""

    sigma: float = 0.25
    """Standard deviation of the noise, in pixel values of [0, 1]."""
    n0: int = 100
    """Draws that select the class of an image."""
    n: int = 10_000
    """Draws that bound its probability; published numbers use 100,000."""
    alpha: float = 0.001
    """Largest probability of a wrong certificate of an image."""
    limit: Limit = 500
    """Number of test images, drawn at random by class with seed 0; none for all."""
    test_size: TestSize = None
    """With a number, the first ``limit`` of as many test images, drawn so, as in a study."""

    def __post_init__(self):
        _validate.in_range("sigma", self.sigma, 0, open_low=True)
        _validate.in_range("alpha", self.alpha, 0, 1, open_low=True)
        check_counts(self, "n0", "n", "limit", "test_size")


def _classify(logits_fn: LogitsFn, images: jax.Array) -> jax.Array:
    """Labels [B]; -1, which is never certified, where logits are not finite."""
    return predicted_classes(logits_fn(images))


def _measure(run: TrainedRun | ForeignModel, settings: CertificateSettings, work: Work) -> Measured:
    """Certifies test images one by one."""
    split, images = images_of(run.dataset.test, settings.limit, settings.test_size)
    classify = jax.tree_util.Partial(_classify, run.logits_fn)
    size = images["num_images"]
    with progress(f"{work.label}, certify", size, done=work.rows) as shown:
        for row in range(work.rows, size):
            found = certify(
                classify, split.images[row:row + 1], jax.random.key(SEED), sigma=settings.sigma,
                n0=settings.n0, n=settings.n, alpha=settings.alpha, indices=[row],
                batch_size=batch_size_of(split.images), layout=run.layout)
            work.add({"index": np.array([row]), **found._asdict(),
                      "target": split.labels[row:row + 1]})
            shown.advance()
    table = work.table
    largest = certified_radius(settings.n, settings.n, sigma=settings.sigma, alpha=settings.alpha)
    radii = np.arange(0, largest, min(0.25, settings.sigma))
    found = Certificate(*(table[name] for name in Certificate._fields))
    shares = certified_accuracy(found, table["target"], radii)
    kept = certified_radii(table)
    return Measured({
        **images, "largest_radius": largest,
        "average_radius": bootstrapped(lambda rows: kept[rows].mean(), size),
        "abstained": int((found.label == ABSTAINED).sum()),
        "mean_draws": float(found.num_draws.mean()),
        "curve": [{"radius": float(radius), "right": round(float(part) * size)}
                  for radius, part in zip(radii, shares, strict=True)]}, table)


def certified_radii(table: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the radius [N] within which each image is certified to be right, 0 where it is not,
    from the columns of the measurement."""
    return np.where(table["label"] == table["target"], table["radius"], 0.0)


CERTIFIED, ABSTENTIONS = "certified accuracy", "abstentions of the smoothed classifier"
AVERAGE = "average certified radius"


def how(facts: dict) -> str:
    """Describes the settings in words."""
    asked = facts["settings"]
    return (f"sigma {asked['sigma']:g}, n0 {asked['n0']}, n {asked['n']}, alpha "
            f"{asked['alpha']:g}")


def estimates(run: Run) -> Iterator[Estimate]:
    """Yields the certified accuracy by radius, and the share of images on which it abstains."""
    facts = run.facts("certificates")
    if facts is None:
        return
    for one in facts["curve"]:
        yield share(CERTIFIED, f"radius {one['radius']:.3g}, {how(facts)}", one["right"],
                    facts["num_images"])
    yield share(ABSTENTIONS, how(facts), facts["abstained"], facts["num_images"])
    yield from _radius(run)


def _radius(run: Run) -> Iterator[Estimate]:
    facts = run.facts("certificates")
    if facts is not None:
        yield estimate(AVERAGE, how(facts), facts["average_radius"], "pixels")


def _shares(run: Run) -> Iterator[Estimate]:
    return (one for one in estimates(run) if one.measurement != AVERAGE)


def _curve_picture(study: Study) -> Picture:
    results, styles = study.results("certificates"), row_styles(study.labels)
    figure = new_figure(7, 4.6)
    ax = figure.subplots()
    for row, ones in results.items():
        radii = np.linspace(0, max(one["largest_radius"] for one in ones), 400)
        curves = [certified_accuracy(
            Certificate(one["label"], one["radius"], one["num_draws"]), one["target"], radii)
            for one in ones]
        ax.plot(radii, 100 * np.mean(curves, axis=0), color=styles[row].color,
                linestyle=styles[row].dashes, linewidth=1.6)
    ax.set_ylim(0, 100)
    ax.set_xlabel("Radius in L2, pixels in [0, 1]")
    ax.set_ylabel("Certified accuracy [%]")
    add_legend(figure, style_handles([(study.labels[row], styles[row]) for row in results],
                                     linewidth=1.6, marker=""))
    return Picture(
        "certified_accuracy", figure, "Certified accuracy against the radius.",
        f"A falling curve for each of {len(results)} models.",
        "How to read: the share of test images whose class is right and provably stays within the "
        "radius; an abstention counts as wrong. Mean over the runs of a row. No curve goes beyond "
        "the largest radius that so many draws can certify.")


def _section(study: Study) -> Section | None:
    found = found_of(study, estimates)
    if not found:
        return None
    return Section(
        "certificates", "Certificates by randomised smoothing", "", (
            table_of(
                study, _shares, "Certified accuracy by radius, and abstentions.",
                f"Images: {subsets_text(study, 'certificates')} Radii in L2, pixels in [0, 1]. "
                "Intervals: Wilson's, over images.",
                "Noise is not clipped. Each certificate is wrong with a probability of at most "
                "alpha."),
            table_of(
                study, _radius, "Average certified radius.", "Intervals: bootstrap over images, "
                "centred.", "An image that is not certified to be right has the radius 0. The "
                "average rewards larger radii of images that are certified anyway: see the curve.",
                digits=4)),
        (_curve_picture(study),))


def table_text(facts: dict) -> str:
    """Formats the result as plain text."""
    size = facts["num_images"]
    return "\n".join([
        f"{facts['subset']}; {how(facts)}",
        *(f"certified at radius {one['radius']:.3g}: {100 * one['right'] / size:.2f} %"
          for one in facts["curve"]),
        f"abstained: {100 * facts['abstained'] / size:.2f} %"])


CERTIFICATES = Measurement(
    "certificates", CertificateSettings(), _measure, section=_section,
    numbers=(numbers_of(estimates),), estimates=estimates, suite="certify",
    command="evaluate", text=table_text, parallel=True)
