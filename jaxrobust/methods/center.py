"""Centre loss: features near the centre of their class, which moves at a rate of its own."""

import jax
import jax.numpy as jnp

from jaxrobust import _validate
from jaxrobust.centroids import (
    CentroidState,
    class_counts,
    class_rows,
    class_sums,
    counted,
    counted_rows,
)
from jaxrobust.images import Outputs
from jaxrobust.losses import mean_over_batch
from jaxrobust.methods.common import (
    PASSES_OF_ONE_VIEW,
    Added,
    Head,
    Objective,
    Parts,
    Passes,
    one_view,
    scaled,
)


def center_loss(
    features: jax.Array, labels: jax.Array, centers: jax.Array, *, axis_name: str | None = None
) -> jax.Array:
    r"""Pulls features to the centre of their class.

    .. math:: L_C = \frac{1}{2 B} \sum_n \|q_n - c_{y_n}\|^2

    Args:
      features: [B, d].
      labels: [B].
      centers: [C, d], constants: they receive no gradient.
      axis_name: see :mod:`jaxrobust.losses`.

    Returns:
      The loss, []. Its source sums over the batch where this is a mean, as in its authors' release.

    Raises:
      InputError: (a ValueError) if shapes do not match or a dtype is wrong.

    Source: Wen et al., A Discriminative Feature Learning Approach for Deep Face Recognition (2016),
    Eq. 2, https://ydwen.github.io/papers/WenECCV16.pdf.
    """
    features, centers = (_validate.floats("features", features),
                         jax.lax.stop_gradient(_validate.floats("centers", centers)))
    labels = _validate.class_numbers("labels", labels)
    num_classes = _validate.shapes(
        features=(features, "B d"), labels=(labels, "B"), centers=(centers, "C d"))["C"]
    away = counted_rows(features - class_rows(centers, labels), labels, num_classes)
    return mean_over_batch(jnp.sum(jnp.square(away), axis=1) / 2, axis_name,
                           counts=counted(labels, num_classes))


def move_centers(
    state: CentroidState, features: jax.Array, labels: jax.Array, *, rate: float,
    axis_name: str | None = None,
) -> CentroidState:
    r"""Moves the centres of the classes in a batch towards its features.

    .. math:: c_j \leftarrow c_j - \alpha \frac{\sum_n [y_n = j] (c_j - q_n)}{1 + n_j}

    with :math:`n_j` examples of class j. Centres start at 0.

    Args:
      state: the centres so far.
      features: [B, d].
      labels: [B].
      rate: alpha in [0, 1].
      axis_name: see :mod:`jaxrobust.losses`.

    Raises:
      InputError: (a ValueError) if shapes do not match, a dtype is wrong or the rate is out of its
        range.

    Source: Wen et al. (2016), Eq. 4 and Algorithm 1.
    """
    _validate.in_range("rate", rate, 0, 1, open_high=False)
    labels = _validate.class_numbers("labels", labels)
    mean = _validate.floats("state.mean", state.mean)
    features = jax.lax.stop_gradient(_validate.floats("features", features)).astype(mean.dtype)
    num_classes = _validate.shapes(**{"features": (features, "B d"), "labels": (labels, "B"),
                                      "state.mean": (mean, "C d")})["C"]
    sums = class_sums(features, labels, num_classes, axis_name)
    counts = class_counts(labels, num_classes, mean.dtype, axis_name)
    step = (counts[:, None] * mean - sums) / (1 + counts)[:, None]
    moved = mean - jnp.asarray(rate, mean.dtype) * step
    return CentroidState(moved.astype(state.mean.dtype), state.seen | (counts > 0))


def make_center(parts: Parts) -> tuple[Objective, Passes]:
    """The softmax loss on clean images, plus the centre loss of their features."""
    options = parts.options.center

    def add(
        clean: Outputs, noisy: Outputs, labels: jax.Array, head: Head, centroids: CentroidState,
        axis_name: str | None
    ) -> Added:
        del noisy, head
        loss = center_loss(clean.features, labels, centroids.mean, axis_name=axis_name)
        centroids = move_centers(
            centroids, clean.features, labels, rate=options.rate, axis_name=axis_name)
        return scaled(options.weight, loss), centroids, {"center": loss}

    return one_view("clean", parts.softmax, add), PASSES_OF_ONE_VIEW
