"""The methods of the paper's tables (Section 7.1) and ablation (Section 7.6), and of its loss."""

import dataclasses

import jax

from jaxrobust import _validate
from jaxrobust.centroids import CentroidState, counted
from jaxrobust.images import Outputs
from jaxrobust.losses import RobustLossConfig, robust_loss, stability_loss
from jaxrobust.methods.common import (
    PASSES_OF_ONE_VIEW,
    PASSES_OF_TWO_VIEWS,
    Add,
    Added,
    Head,
    Objective,
    Parts,
    Passes,
    nothing,
    one_view,
    scaled,
    track,
    two_views,
)


def make_normal(parts: Parts) -> tuple[Objective, Passes]:
    """The softmax loss on clean images."""
    return one_view("clean", parts.softmax, nothing), PASSES_OF_ONE_VIEW


def make_noisy(parts: Parts) -> tuple[Objective, Passes]:
    """The softmax loss on noisy images."""
    return one_view("noisy", parts.softmax, nothing), PASSES_OF_ONE_VIEW


def make_both(parts: Parts) -> tuple[Objective, Passes]:
    """The softmax loss on both views, in one pass."""
    return (two_views(parts.softmax, nothing, one_pass=True, softmax_on_noisy=True),
            PASSES_OF_TWO_VIEWS)


def make_stability(parts: Parts) -> tuple[Objective, Passes]:
    """The softmax loss on clean images, plus the distance between the features of both views."""
    return (two_views(parts.softmax, _stability(parts.stability_weight), one_pass=parts.one_pass),
            PASSES_OF_TWO_VIEWS)


def make_robust(parts: Parts) -> tuple[Objective, Passes]:
    """The softmax loss on clean images, plus the paper's loss (Eq. 13)."""
    return (two_views(parts.softmax, _robust(parts.robust), one_pass=parts.one_pass),
            PASSES_OF_TWO_VIEWS)


def make_robust_both(parts: Parts) -> tuple[Objective, Passes]:
    """The softmax losses of ``both``, plus the paper's loss: beyond the paper."""
    return (two_views(parts.softmax, _robust(parts.robust), one_pass=True, softmax_on_noisy=True),
            PASSES_OF_TWO_VIEWS)


def make_robust_clean(parts: Parts) -> tuple[Objective, Passes]:
    """The softmax loss on clean images, plus the paper's constraints on them alone (Eq. 7)."""
    return one_view("clean", parts.softmax, _robust(parts.robust, align=False)), PASSES_OF_ONE_VIEW


def _stability(stability_weight: float) -> Add:
    def add(
        clean: Outputs, noisy: Outputs, labels: jax.Array, head: Head, centroids: CentroidState,
        axis_name: str | None
    ) -> Added:
        kernel, _ = head
        counts = counted(_validate.class_numbers("labels", labels), kernel.shape[1])
        distance = stability_loss(
            clean.features, noisy.features, counts=counts, axis_name=axis_name)
        return (scaled(stability_weight, distance),
                track(centroids, clean.features, labels, axis_name), {"stability": distance})

    return add


def _robust(config: RobustLossConfig, *, align: bool = True) -> Add:
    """The paper's loss (Eq. 13), or only its constraints on the clean view (Eq. 7)."""
    config = config if align else dataclasses.replace(config, lam=0.0)

    def add(
        clean: Outputs, noisy: Outputs, labels: jax.Array, head: Head, centroids: CentroidState,
        axis_name: str | None
    ) -> Added:
        ours, terms, centroids = robust_loss(
            clean.features, noisy.features, labels, *head, centroids, config, axis_name=axis_name)
        shown = {name: term for name, term in terms._asdict().items() if align or name != "align"}
        return ours, centroids, shown

    return add
