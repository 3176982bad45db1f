"""The softmax loss, the discriminative loss of the paper, and the term of stability training.

The latter two act on features q, [B, d], of the penultimate layer, whose units are those of every
distance here.

**Devices.** Under ``pmap`` or ``shard_map``, ``axis_name`` names the device axis over which the
batch is split: every term is then that of the whole batch, the same on every device, and gradients
are to be averaged over the devices once.

**Labels** are integers, [B]. Examples whose label is outside [0, C), such as -1, do not count:
value and gradients of every term are as without them, whatever their logits and features are, NaN
included. The loss is 0 where no example counts.

**Dtypes.** Everything is computed in float32, or in the dtype of the centroids if that is wider;
features are cast to it.

All raise InputError (a ValueError) if shapes do not match, a dtype is wrong, or a number is out of
its range.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrobust import _validate
from jaxrobust._activations import relu
from jaxrobust._hyperparameters import hyperparameters
from jaxrobust.centroids import (
    TABLE_SIZE,
    CentroidState,
    class_counts,
    class_rows,
    counted,
    counted_rows,
    update_centroids,
)
from jaxrobust.geometry import (
    ClassRows,
    class_rows_of,
    directions,
    distances_to_all,
    distances_to_one,
    safe_norm,
)


def mean_over_batch(
    values: jax.Array, axis_name: str | None = None, *, counts: jax.Array | None = None
) -> jax.Array:
    """Averages per-example values [B] over the examples that count, [B] bool; all if None."""
    values = _validate.floats("values", values)
    counts = jnp.ones(values.shape, bool) if counts is None else counts
    total = jnp.sum(jnp.where(counts, values, 0))
    number = jnp.sum(counts.astype(values.dtype))
    if axis_name is not None:
        # Apart: JAX 0.8 does not differentiate a sum of both under shard_map, since the number has
        # no gradient.
        total, number = jax.lax.psum(total, axis_name), jax.lax.psum(number, axis_name)
    return total / jnp.maximum(number, 1)


def _mean_over_present(values: jax.Array, present: jax.Array) -> jax.Array:
    """Averages per-class values [C] over the classes present; 0 if there are none."""
    present = present.astype(values.dtype)
    return jnp.sum(values * present) / jnp.maximum(jnp.sum(present), 1)


def softmax_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    r"""Computes the softmax loss of each example, with derivatives that keep their digits.

    .. math::
      l = -\log \sigma(z)_y = (z_k - z_y) + \log\Big(1 + \sum_{i \ne k} e^{z_i - z_k}\Big),
      \qquad k = \arg\max_i z_i

    The usual form, logsumexp(z) - z_y, subtracts two numbers that agree in all digits where the
    network is confident: in float32 the loss and its derivatives are lost from a logit gap of about
    17 on. Here only logits are subtracted, so that value, gradient and second derivative keep their
    relative accuracy at any gap, for right and for wrong predictions.

    Args:
      logits: [B, C], floats, C >= 2.
      labels: [B].

    Returns:
      [B], in nats, of the dtype of ``logits``; 0 for an example that does not count, NaN where a
      logit of one that counts is NaN.

    >>> logits = jnp.array([[20.0, 0.0, -1.0], [1.0, 1.0, 1.0]])
    >>> [f"{loss:.3e}" for loss in softmax_cross_entropy(logits, jnp.array([0, -1])).tolist()]
    ['2.819e-09', '0.000e+00']

    Source: Eq. 3 and 4.
    """
    labels = _validate.class_numbers("labels", labels)
    num_classes = _validate.shapes(logits=(logits, "B C"), labels=(labels, "B"))["C"]
    # One logit of two classes would have loss 0 for every label.
    _validate.in_range("number of classes", num_classes, 2)
    counts = counted(labels, num_classes)
    # Masked before anything is computed, since NaN times a cotangent of 0 is NaN.
    logits = jnp.where(counts[:, None], logits, 0)
    labels = jnp.where(counts, labels, 0)
    largest = jnp.argmax(jax.lax.stop_gradient(logits), axis=1).astype(labels.dtype)

    def of(classes: jax.Array) -> jax.Array:
        return jnp.take_along_axis(logits, classes[:, None], axis=1)[:, 0]

    top = of(largest)
    numbers = jnp.arange(num_classes, dtype=labels.dtype)
    # The 1 in the sum is the top's own term.
    gaps = jnp.where(numbers[None] == largest[:, None], -jnp.inf, logits - top[:, None])
    # Without this mask, 1 and -1 would drown what the sum adds to the gradient of the top.
    missed = jnp.where(labels == largest, 0, top - of(labels))
    return jnp.where(counts, missed + jnp.log1p(jnp.sum(jnp.exp(gaps), axis=1)), 0)


def softmax_loss(
    logits: jax.Array, labels: jax.Array, *, class_weights: jax.Array | None = None,
    label_smoothing: float = 0.0, axis_name: str | None = None,
) -> jax.Array:
    r"""Averages :func:`softmax_cross_entropy` over the examples that count.

    With class weights it is the weighted mean over the whole batch,

    .. math:: \frac{\sum_n w_{y_n} (-\log \sigma(z_n)_{y_n})}{\sum_n w_{y_n}},

    as PyTorch's ``CrossEntropyLoss(weight=w)``. Label smoothing takes a share s of each label and
    gives it to all classes alike: in the numerator, with :math:`w_c = 1` if there are no weights,

    .. math:: (1 - s)\, w_{y_n} (-\log \sigma(z_n)_{y_n})
      + \frac{s}{C} \sum_c w_c (-\log \sigma(z_n)_c).

    Args:
      axis_name: see :mod:`jaxrobust.losses`.
      logits: [B, C]; cast to float32 if narrower.
      labels: [B].
      class_weights: [C], >= 0; None for 1 each.
      label_smoothing: s in [0, 1).

    Returns:
      The loss, [], in nats.

    Source: Eq. 3 and 4; label smoothing: Szegedy et al., Rethinking the Inception Architecture for
    Computer Vision (2016), https://arxiv.org/abs/1512.00567, and with weights as in PyTorch.
    """
    _validate.in_range("label_smoothing", label_smoothing, 0, 1)
    logits = _validate.floats("logits", logits)
    labels = _validate.class_numbers("labels", labels)
    losses = softmax_cross_entropy(logits, labels)
    num_classes = logits.shape[1]
    counts = counted(labels, num_classes)
    weights = None
    if class_weights is not None:
        weights = jnp.asarray(_validate.floats("class_weights", class_weights), losses.dtype)
        _validate.shapes(logits=(logits, "B C"), class_weights=(weights, "C"))
        own = class_rows(weights, labels)
        losses = own * losses
    if label_smoothing:
        of_all = -jax.nn.log_softmax(jnp.where(counts[:, None], logits, 0))
        of_all = of_all if weights is None else weights[None] * of_all
        share = jnp.asarray(label_smoothing, losses.dtype)
        losses = (1 - share) * losses + share * jnp.mean(of_all, axis=1)
    total = mean_over_batch(losses, axis_name, counts=counts)
    if weights is None:
        return total
    # Both means are over the same number of examples, which cancels.
    mean = mean_over_batch(own, axis_name, counts=counts)
    return total / jnp.where(mean > 0, mean, 1)


def compactness_loss(
    features: jax.Array,
    labels: jax.Array,
    centroids: jax.Array,
    *,
    delta_v: float,
    squared: bool = True,
    linear_beyond: float | None = None,
    axis_name: str | None = None,
) -> jax.Array:
    r"""Pulls features into a ball of radius delta_v around their class centroid.

    .. math::
      L_{compact} = \frac{1}{|C_B|} \sum_{c \in C_B} \frac{1}{|C_c^B|}
        \sum_{x \in C_c^B} [\|m_c - q(x)\| - \delta_v]_+^2

    With features of noisy images, and the same centroids, this is the alignment loss
    L_noisy (Eq. 12).

    Args:
      axis_name: see :mod:`jaxrobust.losses`.
      features: [B, d].
      labels: [B].
      centroids: [C, d], with momentum in the paper. The gradient flows into them.
      delta_v: radius of the ball, >= 0.
      squared: whether the hinge is squared, as in the paper (Appendix A.1 discusses both).
      linear_beyond: the hinge k, > 0, above which its square continues as its tangent,
        2 k h - k^2, so that no example's gradient is longer than 2 k (Huber, 1964); None, as in
        the paper, for never. Only with ``squared``.

    Returns:
      The loss, [].

    >>> centroids = jnp.array([[0.0, 0.0]])
    >>> compactness_loss(jnp.array([[3.0, 4.0]]), jnp.array([0]), centroids, delta_v=2.0).item()
    9.0

    Source: Eq. 8, after De Brabandere et al. (2017).
    """
    _validate.in_range("delta_v", delta_v, 0)
    _check_linear_beyond("linear_beyond", linear_beyond, squared)
    features, centroids = (
        _validate.floats("features", features), _validate.floats("centroids", centroids))
    labels = _validate.class_numbers("labels", labels)
    num_classes = _validate.shapes(
        features=(features, "B d"), labels=(labels, "B"), centroids=(centroids, "C d"))["C"]
    own, shares = _own_centroids(centroids, labels, axis_name)
    return _pull(counted_rows(features, labels, num_classes), own, shares, delta_v, squared,
                 linear_beyond, axis_name)


def _check_linear_beyond(name: str, value: float | None, squared: bool) -> None:
    if value is None:
        return
    _validate.in_range(name, value, 0, open_low=True)
    if not squared:
        raise _validate.InputError(f"Expected {name} only with a squared hinge, got {value}.")


def _own_centroids(
    centroids: jax.Array, labels: jax.Array, axis_name: str | None
) -> tuple[jax.Array, jax.Array]:
    """The centroid of each example's class, [B, d], and the example's weight in the mean over the
    classes present of the means over their examples, [B]; both 0 for an example that does not
    count.
    """
    counts = class_counts(labels, centroids.shape[0], centroids.dtype, axis_name)
    present = (counts > 0).astype(counts.dtype)
    shares = present / jnp.maximum(counts * jnp.sum(present), 1)
    return class_rows(centroids, labels), class_rows(shares, labels)


def _pull(
    features: jax.Array, own: jax.Array, shares: jax.Array, delta_v: float | jax.Array,
    squared: bool, linear_beyond: float | None, axis_name: str | None
) -> jax.Array:
    """Eq. 8 or 12 from what :func:`_own_centroids` returns; features that do not count are 0."""
    delta_v = jnp.asarray(delta_v, own.dtype)
    hinge = relu(safe_norm(own - features.astype(own.dtype)) - delta_v)
    if linear_beyond is not None:
        linear_beyond = jnp.asarray(linear_beyond, own.dtype)
        near = jnp.minimum(hinge, linear_beyond)
        hinge = near * (2 * hinge - near)
    elif squared:
        hinge = jnp.square(hinge)
    total = jnp.sum(shares * hinge)
    return total if axis_name is None else jax.lax.psum(total, axis_name)


def margin_loss(
    centroids: jax.Array,
    present: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    *,
    delta_d: float,
    squared: bool = False,
    boundaries: str = "max",
    relative: bool = False,
) -> jax.Array:
    r"""Pushes class centroids at least delta_d inside their decision boundaries.

    .. math::
      L_{margin} = \frac{1}{|C_B|} \sum_{c \in C_B} \max_{i \ne c}
        [\delta_d + d(m_c, P_{ci})\, \mathrm{sign}(z(m_c)_i - z(m_c)_c)]_+

    Written with :func:`~jaxrobust.geometry.signed_boundary_distance` s the hinge is
    :math:`[\delta_d - s_{ci}]_+`. The two differ only for a centroid exactly on a boundary,
    where the paper's sign(0) = 0 has no gradient and this one points to the right side.
    Where several boundaries are equally bad, the gradient is that of one of them. Two classes
    whose rows of W are the same up to rounding have no boundary, and are left out of the maximum
    or the mean; a class that has none has hinge 0. Memory is O(C d): at most 2^22 distances, or
    those of one class, are in memory together.

    Args:
      centroids: [C, d]; those of the batch alone ("naive") in the paper.
      present: [C] bool, the classes the loss runs over.
      kernel: [d, C], the softmax layer's, :math:`W^T`; it receives gradient, as does bias.
      bias: [C], C >= 2.
      delta_d: the distance to reach, >= 0.
      squared: whether the hinge is squared; not in the paper (Appendix A.1).
      boundaries: ``"max"`` for the worst boundary, as in the paper, or ``"mean"`` over all.
      relative: whether delta_d is in units of r, the mean norm of the centroids of the classes
        present; not in the paper. The hinge is then :math:`[\delta_d r - s_{ci}]_+`, with
        :math:`r = \frac{1}{|C_B|} \sum_{c \in C_B} \|m_c\|` a constant without gradient, so that
        shrinking the features is no way to reach the margin. Features and bias scaled by nu
        (Proposition 5.3) scale the loss by nu, where otherwise a large enough nu makes it 0.

    Returns:
      The loss, []; 0 if no class is present.

    >>> kernel, bias = jnp.array([[1.0, -1.0]]), jnp.zeros(2)  # the boundary is q = 0
    >>> present = jnp.array([True, True])
    >>> margin_loss(jnp.array([[3.0], [-9.0]]), present, kernel, bias, delta_d=5.0).item()
    1.0

    Source: Eq. 9 and 10, after Elsayed et al. (2018).
    """
    return _margin_over_present(
        centroids, present, kernel, bias, delta_d=delta_d, squared=squared, boundaries=boundaries,
        relative=relative)


def _margin_over_present(
    centroids: jax.Array, present: jax.Array, kernel: jax.Array, bias: jax.Array, *,
    delta_d: float | jax.Array, squared: bool, boundaries: str, relative: bool = False,
    at_most: int | None = None, table_size: int = TABLE_SIZE
) -> jax.Array:
    """:func:`margin_loss` where at most ``at_most`` classes are present, if that is known."""
    _validate.in_range("delta_d", delta_d, 0)
    _validate.one_of("boundaries", boundaries, ("max", "mean"))
    centroids, kernel, bias = (_validate.floats(name, value) for name, value in (
        ("centroids", centroids), ("kernel", kernel), ("bias", bias)))
    num_classes = _validate.shapes(
        centroids=(centroids, "C d"), present=(present, "C"), kernel=(kernel, "d C"),
        bias=(bias, "C"))["C"]
    _validate.in_range("number of classes", num_classes, 2)
    delta_d = jnp.asarray(delta_d, centroids.dtype)
    if relative:
        delta_d = delta_d * jax.lax.stop_gradient(centroid_norm_loss(centroids, present))
    numbers = jnp.arange(num_classes, dtype=jnp.int32)
    every = class_rows_of(kernel.astype(centroids.dtype), bias.astype(centroids.dtype))
    labels, own = numbers, every
    if at_most is not None and at_most < num_classes:
        # These labels are all different, so that no gradients are added up in a random order.
        present, labels = jax.lax.top_k(present.astype(centroids.dtype), at_most)
        centroids, own = jax.tree.map(
            lambda table: table.at[labels].get(unique_indices=True), (centroids, every))

    def hinge(distances: jax.Array) -> jax.Array:
        hinge = relu(delta_d - distances)
        return jnp.square(hinge) if squared else hinge

    def distances(example: tuple[jax.Array, jax.Array, ClassRows], every: ClassRows) -> jax.Array:
        """Distances of one centroid to the boundaries with all classes, [C]."""
        label, centroid, own = jax.tree.map(lambda value: value[None], example)
        return jnp.where(numbers == label, jnp.inf, distances_to_all(centroid, own, every)[0])

    def mean_hinge(example: tuple[jax.Array, jax.Array, ClassRows]) -> jax.Array:
        to_all = distances(example, every)
        # Distances of +inf belong to no boundary, and have hinge 0.
        number = jnp.sum((to_all != jnp.inf).astype(to_all.dtype))
        return jnp.sum(hinge(to_all)) / jnp.maximum(number, 1)

    examples, batch_size = (labels, centroids, own), max(1, table_size // num_classes)
    if boundaries == "mean":
        # Recomputed in the backward pass, so that no distances are kept for it.
        means = jax.lax.map(jax.checkpoint(mean_hinge), examples, batch_size=batch_size)
        return _mean_over_present(means, present)

    # The choice of the worst boundary has no gradient; only its distance has.
    fixed_examples, fixed = jax.lax.stop_gradient((examples, every))
    others, separated = jax.lax.map(
        lambda example: _first_smallest(distances(example, fixed)), fixed_examples,
        batch_size=batch_size)
    other = jax.tree.map(lambda table: class_rows(table, others), every)
    return _mean_over_present(
        hinge(distances_to_one(centroids, own, other, separated)), present)


def _first_smallest(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first index of the smallest value, up to rounding, and whether that is not +inf.

    Much faster than argmin on CPUs. NaN counts as the smallest value.
    """
    smallest = jnp.min(values)
    limit = smallest + 4 * jnp.finfo(values.dtype).eps * jnp.abs(smallest)
    numbers = jnp.arange(len(values), dtype=jnp.int32)
    return (jnp.min(jnp.where(values <= limit, numbers, len(values) - 1)), smallest != jnp.inf)


def centroid_norm_loss(centroids: jax.Array, present: jax.Array) -> jax.Array:
    r"""Keeps centroids from drifting away in cells that are not closed.

    .. math:: L_{reg} = \frac{1}{|C_B|} \sum_{c \in C_B} \|m_c\|

    Args:
      centroids: [C, d].
      present: [C] bool, the classes the loss runs over.

    Returns:
      The loss, []. Its gradient at a centroid of 0 is 0.

    Source: Eq. 11.
    """
    centroids = _validate.floats("centroids", centroids)
    _validate.shapes(centroids=(centroids, "C d"), present=(present, "C"))
    return _mean_over_present(safe_norm(centroids), present)


def stability_loss(
    features: jax.Array, noisy_features: jax.Array, *, counts: jax.Array | None = None,
    axis_name: str | None = None,
) -> jax.Array:
    r"""Averages the distance between the features of an image and of its noisy version.

    .. math:: L_{stability} = \frac{1}{B} \sum_x \|f(x) - f(x + \varepsilon)\|

    Args:
      axis_name: see :mod:`jaxrobust.losses`.
      features: [B, d].
      noisy_features: [B, d], of the same images in the same order.
      counts: [B] bool, the examples that count, such as ``(labels >= 0) & (labels < num_classes)``;
        all of them if None.

    Returns:
      The loss, [].

    Source: Zheng et al. (2016), as in Section 7.1: the distance is not squared.
    """
    features, noisy_features = (_validate.floats("features", features),
                                _validate.floats("noisy_features", noisy_features))
    _validate.shapes(features=(features, "B d"), noisy_features=(noisy_features, "B d"))
    differences = features - noisy_features
    if counts is not None:
        _validate.shapes(features=(features, "B d"), counts=(counts, "B"))
        differences = jnp.where(counts[:, None], differences, 0)
    return mean_over_batch(safe_norm(differences), axis_name, counts=counts)


@hyperparameters("alpha", "beta", "gamma_reg", "lam", "delta_v", "delta_d", "momentum")
@dataclasses.dataclass(frozen=True)
class RobustLossConfig:
    """Weights and options of :func:`robust_loss`; the defaults are the paper's.

    A pytree whose leaves are its first seven fields: a function that takes one under ``jax.jit`` is
    compiled once for all their values, and ``jax.vmap`` maps over several configurations.

    >>> grown = jax.tree.map(lambda weight: 2 * weight, RobustLossConfig(boundaries="mean"))
    >>> grown.delta_v, grown.boundaries
    (1.0, 'mean')
    """

    alpha: float = 1.0
    """Weight of the compactness loss (Eq. 7), >= 0."""
    beta: float = 1.0
    """Weight of the margin loss (Eq. 7), >= 0."""
    gamma_reg: float = 1e-3
    """Weight of the centroid norm (Eq. 7), >= 0."""
    lam: float = 1.0
    """Weight of the alignment of noisy features (Eq. 13), >= 0."""
    delta_v: float = 0.5
    """Radius of a class's ball, in the units of the features, >= 0."""
    delta_d: float = 5.0
    """Distance for a centroid to keep from its boundaries, in the same units, >= 0."""
    momentum: float = 0.9
    """gamma of Section 4.4: the share of the stored centroid, in [0, 1)."""
    compact_squared: bool = True
    """Square the hinge of compactness and alignment (Appendix A.1)."""
    compact_linear_beyond: float | None = None
    """Value of the hinge of compactness and alignment above which its square continues linearly, in
    the units of the features, > 0; none, as in the paper, for never."""
    margin_squared: bool = False
    """Square the hinge of the margin (Appendix A.1)."""
    boundaries: str = "max"
    """Reduction of the hinge over the boundaries of a class: "max" or "mean"."""
    compact_centroids: str = "momentum"
    """Centroids of Eq. 8 and 12: "momentum" or "naive"."""
    margin_centroids: str = "naive"
    """Centroids of Eq. 9: "naive" (with the above: partial momentum) or "momentum"."""
    norm_centroids: str = "momentum"
    """Centroids of Eq. 11: "momentum" (the authors' release; the paper is silent) or "naive"."""
    direction: bool = False
    """Beyond the paper: take features and centroids as directions of length 1. delta_v is then a
    chord, in [0, 2], delta_d the sine of an angle, in [0, 1], and Eq. 11 constant."""
    align_to: str = "clean"
    """Centroids that Eq. 12 aligns with: those of the "clean" view, to which it pulls noisy
    features, or those of the "other" view, to which it pulls the features of each; the latter
    beyond the paper."""
    margin_relative: bool = False
    """Beyond the paper: delta_d in units of the mean norm of the centroids of Eq. 9."""

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "gamma_reg", "lam", "delta_v", "delta_d"):
            _validate.in_range(name, getattr(self, name), 0)
        _validate.in_range("momentum", self.momentum, 0, 1)
        _check_linear_beyond(
            "compact_linear_beyond", self.compact_linear_beyond, self.compact_squared)
        _validate.one_of("boundaries", self.boundaries, ("max", "mean"))
        for name in ("compact_centroids", "margin_centroids", "norm_centroids"):
            _validate.one_of(name, getattr(self, name), ("momentum", "naive"))
        _validate.one_of("align_to", self.align_to, ("clean", "other"))
        if self.direction:
            for name, most in (("delta_v", 2), ("delta_d", 1)):
                _validate.in_range(f"direction=True and {name}", getattr(self, name), 0, most,
                                   open_high=False)
            if self.margin_relative:
                raise _validate.InputError(
                    "Expected margin_relative=False with direction=True, whose centroids have norm "
                    "1, got True.")


AUTHORS_RELEASE = RobustLossConfig(alpha=0.5, lam=0.5, momentum=0.99)
"""What the authors' released code minimises: one mean over the clean and the noisy features
of a class together, which is half of Eq. 8 plus Eq. 12, and a momentum of 0.99."""


class RobustLossTerms(NamedTuple):
    """The unweighted terms of :func:`robust_loss`, each []."""

    compact: jax.Array  # Eq. 8
    margin: jax.Array  # Eq. 9
    norm: jax.Array  # Eq. 11
    align: jax.Array  # Eq. 12


def robust_loss(
    features: jax.Array,
    noisy_features: jax.Array,
    labels: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    state: CentroidState,
    config: RobustLossConfig,
    *,
    axis_name: str | None = None,
) -> tuple[jax.Array, RobustLossTerms, CentroidState]:
    r"""Computes the paper's loss on the features, without the softmax term that it is added to.

    .. math::
      L = \alpha L_{compact} + \beta L_{margin} + \gamma_{reg} L_{reg} + \lambda L_{noisy}

    Centroids come from the clean features alone. By default compactness, alignment and the
    norm use the momentum centroid and the margin the batch's own (partial momentum).

    Beyond the paper are three options of ``config``:

    ``direction``: every term depends on the directions of features alone,
    :math:`\hat q = q / \|q\|`. Centroids are means of these, naive and with momentum, scaled to
    length 1; the state keeps the means. A direction has no side of a hyperplane that does not pass
    through 0, so the margin's are those without the bias, and its distances the sines of angles:

    .. math::
      L_{compact} = \operatorname{mean} [\|\hat m_c - \hat q\| - \delta_v]_+^2, \qquad
      s_{ci} = \frac{(W_c - W_i) \hat m_c}{\|W_c - W_i\|} \in [-1, 1]

    Scaling any of the features changes nothing. L_reg is 1, without gradient.

    ``align_to="other"``: the features of each view are pulled to the centroid of the other, not
    only noisy ones to that of the clean view:

    .. math::
      L_{noisy} = \tfrac12 \operatorname{mean} [\|m_c - q(x')\| - \delta_v]_+^2
        + \tfrac12 \operatorname{mean} [\|m'_c - q(x)\| - \delta_v]_+^2, \qquad
      m'_c = m_c + \frac{1}{|C_c^B|} \sum_{x \in C_c^B} (q(x') - q(x))

    for clean images x, their noisy versions x' and means as in Eq. 8. The centroid of the noisy
    view is that of the clean one, moved by how far the noise moves this batch, so that it needs no
    state; for naive centroids it is the mean of the noisy features.

    ``margin_relative``: see ``relative`` in :func:`margin_loss`.

    Args:
      axis_name: see :mod:`jaxrobust.losses`.
      features: [B, d], of clean images.
      noisy_features: [B, d], of noisy images of the same classes.
      labels: [B].
      kernel: [d, C], of the softmax layer.
      bias: [C], of the softmax layer.
      state: the centroids so far.
      config: weights and options.

    Returns:
      ``(total, terms, new_state)``: the weighted sum, [], its terms, the next centroids.

    Source: Eq. 7 and 13, Section 4.4.
    """
    features, noisy_features = (_validate.floats("features", features),
                                _validate.floats("noisy_features", noisy_features))
    labels = _validate.class_numbers("labels", labels)
    _validate.shapes(features=(features, "B d"), noisy_features=(noisy_features, "B d"),
                     labels=(labels, "B"))
    _validate.instance("state", state, CentroidState)
    _validate.instance("config", config, RobustLossConfig)
    num_classes = state.mean.shape[0]
    features, noisy_features = (
        counted_rows(rows, labels, num_classes) for rows in (features, noisy_features))
    if config.direction:
        features, noisy_features = directions(features), directions(noisy_features)
        bias = jnp.zeros_like(bias)
    centroids, new_state = update_centroids(
        state, features, labels, momentum=config.momentum, axis_name=axis_name)
    chosen = {"momentum": centroids.running, "naive": centroids.current}
    if config.align_to == "other":
        of_noisy, _ = update_centroids(state, noisy_features, labels, axis_name=axis_name)
        chosen["moved"] = chosen[config.compact_centroids] + (
            of_noisy.current - centroids.current)
    if config.direction:
        chosen = jax.tree.map(directions, chosen)

    def pull_to(centroids: jax.Array) -> Callable[..., jax.Array]:
        own, shares = _own_centroids(centroids, labels, axis_name)
        return functools.partial(
            _pull, own=own, shares=shares, delta_v=config.delta_v, squared=config.compact_squared,
            linear_beyond=config.compact_linear_beyond, axis_name=axis_name)

    def align() -> jax.Array:
        to_clean = pull(noisy_features)
        if config.align_to == "clean":
            return to_clean
        return (to_clean + pull_to(chosen["moved"])(features)) / 2

    pull = pull_to(chosen[config.compact_centroids])
    num_devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    terms = RobustLossTerms(
        compact=pull(features),
        margin=_margin_over_present(
            chosen[config.margin_centroids], centroids.present, kernel, bias,
            at_most=num_devices * labels.shape[0], delta_d=config.delta_d,
            squared=config.margin_squared, boundaries=config.boundaries,
            relative=config.margin_relative),
        norm=centroid_norm_loss(chosen[config.norm_centroids], centroids.present),
        align=align(),
    )
    alpha, beta, gamma_reg, lam = (
        jnp.asarray(weight, terms.compact.dtype)
        for weight in (config.alpha, config.beta, config.gamma_reg, config.lam))
    total = (alpha * terms.compact + beta * terms.margin + gamma_reg * terms.norm
             + lam * terms.align)
    return total, terms, new_state
