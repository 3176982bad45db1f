"""Feature-space geometry of a softmax classifier: boundaries, margins, dispersion, T_nu."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrobust import _validate, parallel
from jaxrobust.centroids import class_rows, counted, counted_rows


def safe_norm(vectors: jax.Array) -> jax.Array:
    """Computes Euclidean norms over the last axis, with gradient 0, instead of NaN, at 0.

    The norm of a vector with NaN is NaN.
    """
    squared = jnp.sum(jnp.square(vectors), axis=-1)
    zero = squared == 0
    # Mask inside the root: masking its result would still differentiate sqrt(0).
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, squared)))


def directions(vectors: jax.Array) -> jax.Array:
    """Scales vectors [..., d] to length 1, whatever their length; 0 stays 0, with gradient 0."""
    # The function does not depend on this scale, nor does its gradient: it only keeps squares from
    # underflow and overflow.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(vectors), axis=-1, keepdims=True))
    vectors = vectors / jnp.where(largest > 0, largest, 1)
    length = safe_norm(vectors)[..., None]
    # Phrased so that a vector with NaN shows in the result.
    return jnp.where(length == 0, 0, vectors / jnp.where(length == 0, 1, length))


class ClassRows(NamedTuple):
    """What each class contributes to its hyperplanes."""

    rows: jax.Array  # shape=[..., d]; rows of W, less the mean of all
    squares: jax.Array  # shape=[...]; their squared norms
    bias: jax.Array  # shape=[...]


def class_rows_of(kernel: jax.Array, bias: jax.Array) -> ClassRows:
    """The rows of all classes, from ``kernel`` [d, C] and ``bias`` [C].

    A hyperplane depends only on differences of rows. Subtracting the mean leaves these as they are
    and reduces cancellation in them; it needs no gradient for the same reason.
    """
    rows = kernel.T
    rows = rows - jax.lax.stop_gradient(jnp.mean(rows, axis=0, keepdims=True))
    return ClassRows(rows, jnp.sum(jnp.square(rows), axis=1), bias)


_ROUNDING = 64
"""Rows count as equal if their squared distance is up to this many roundings of its terms."""


def _distance(gaps: jax.Array, squared: jax.Array, separated: jax.Array) -> jax.Array:
    """Gaps over norms, given as squares; +inf, without a gradient, for rows not separated."""
    # Mask inside: masking the result would still differentiate 0 / 0.
    return jnp.where(
        separated, gaps * jax.lax.rsqrt(jnp.where(separated, squared, 1)), jnp.inf)


def distances_to_all(points: jax.Array, own: ClassRows, others: ClassRows) -> jax.Array:
    """Signed distances [N, C] of points [N, d] of the classes ``own`` [N] to all, [C].

    This decides which rows are separated: those whose distance is not +inf.
    """
    def with_all(left: jax.Array) -> jax.Array:
        return jnp.dot(left, others.rows.T, precision=jax.lax.Precision.HIGHEST)

    gaps = (jnp.sum(points * own.rows, axis=1) + own.bias)[:, None] - (
        with_all(points) + others.bias[None])
    scale = own.squares[:, None] + others.squares[None]
    squared = scale - 2 * with_all(own.rows)
    # Phrased so that a row with NaN counts as separated, and shows in the result.
    close = squared <= _ROUNDING * jnp.finfo(squared.dtype).eps * scale
    return _distance(gaps, squared, ~close)


def distances_to_one(
    points: jax.Array, own: ClassRows, others: ClassRows, separated: jax.Array
) -> jax.Array:
    """Signed distances [N] of points [N, d] of the classes ``own`` [N] to ``others`` [N].

    ``separated`` [N] is what :func:`distances_to_all` decided; the distance is +inf if False.
    """
    normals = own.rows - others.rows
    squared = jnp.sum(jnp.square(normals), axis=1)
    return _distance(jnp.sum(points * normals, axis=1) + own.bias - others.bias, squared,
                     separated & (squared != 0))


def signed_boundary_distance(
    points: jax.Array, labels: jax.Array, kernel: jax.Array, bias: jax.Array
) -> jax.Array:
    r"""Computes the signed distance of each point to the decision hyperplanes of its class.

    With the logits :math:`z = W q + b` and the hyperplane :math:`P_{ci}` where the
    logits of c and i are equal (Eq. 6),

    .. math:: s_{ni} = \frac{z_{c}(q_n) - z_i(q_n)}{\|W_c - W_i\|}, \quad c = y_n,

    which is Eq. 10 with the sign that Eq. 9 gives it: positive on the right side.

    Args:
      points: [N, d] features; everything is computed in float32 if they are narrower.
      labels: [N] classes c of the points, in [0, C).
      kernel: [d, C], the softmax layer's kernel, :math:`W^T`.
      bias: [C].

    Returns:
      [N, C], in the units of the features. It is +inf, without a gradient, where there is no
      hyperplane: at the own class, for a label outside [0, C), and between two classes with the
      same row of W, which a smallest distance therefore leaves out. (The one of them with the
      smaller bias is never predicted.) Rows :math:`W_c, W_i`, less the mean row, count as the same
      if :math:`\|W_c - W_i\|^2 \le 64\, \mathrm{eps}\, (\|W_c\|^2 + \|W_i\|^2)`, with eps of the
      dtype; in float32 that is about 0.4 % of their length. Memory is O(N C + C d).

    Raises:
      InputError: (a ValueError) if the shapes do not match or a size is 0, there are fewer than two
        classes, or a dtype is wrong.
    """
    points, kernel, bias = (_validate.floats(name, value) for name, value in (
        ("points", points), ("kernel", kernel), ("bias", bias)))
    labels = _validate.class_numbers("labels", labels)
    num_classes = _validate.shapes(points=(points, "N d"), labels=(labels, "N"),
                                   kernel=(kernel, "d C"), bias=(bias, "C"))["C"]
    _validate.in_range("number of classes", num_classes, 2)
    everything = class_rows_of(kernel, bias)
    own = jax.tree.map(lambda table: class_rows(table, labels), everything)
    distances = distances_to_all(counted_rows(points, labels, num_classes), own, everything)
    with_hyperplane = ~jax.nn.one_hot(labels, num_classes, dtype=bool) & counted(
        labels, num_classes)[:, None]
    return jnp.where(with_hyperplane, distances, jnp.inf)


def class_dispersion(features: jax.Array, labels: jax.Array, num_classes: int) -> jax.Array:
    r"""Computes Definition 3.1: the largest distance between two examples of a class.

    .. math:: \mathrm{dispersion}(c) = \max_{x_1, x_2 \in C_c} \|q(x_1) - q(x_2)\|

    Args:
      features: [N, d]; cast to float32 if narrower.
      labels: [N], in [0, C); examples with others do not count.
      num_classes: C.

    Returns:
      [C], in the units of the features; 0 for a class with fewer than two examples. Memory
      is O(N d): one example is compared with all others at a time.

    Raises:
      InputError: (a ValueError) if the shapes do not match or a size is 0, or a dtype is wrong.
    """
    features, labels = (
        _validate.floats("features", features), _validate.class_numbers("labels", labels))
    _validate.shapes(features=(features, "N d"), labels=(labels, "N"))
    num_classes = _validate.integer("num_classes", num_classes, 1)
    return parallel.over_any_mesh(functools.partial(_dispersion, num_classes))(features, labels)


def _dispersion(num_classes: int, features: jax.Array, labels: jax.Array) -> jax.Array:
    features = counted_rows(features, labels, num_classes)

    def farthest(example: tuple[jax.Array, jax.Array]) -> jax.Array:
        feature, label = example
        return jnp.max(jnp.where(labels == label, safe_norm(features - feature[None]), 0))

    distances = jax.lax.map(farthest, (features, labels))
    return jnp.maximum(jax.ops.segment_max(distances, labels, num_classes), 0)


def class_margin(
    features: jax.Array, labels: jax.Array, kernel: jax.Array, bias: jax.Array
) -> jax.Array:
    r"""Computes Definition 5.1: the smallest distance of a class's examples to a decision boundary.

    .. math:: \mathrm{margin}(c) = \min_{x \in C_c} \min_{i \ne c} d(q(x), P_{ci})

    The distance is unsigned, as in the paper: a misclassified example counts with its distance on
    the wrong side. :func:`signed_boundary_distance`, whose arguments and errors these are, tells
    the sides apart.

    Returns:
      [C], in the units of the features; +inf for a class without examples, and for one without a
      hyperplane.
    """
    def smallest(
        features: jax.Array, labels: jax.Array, kernel: jax.Array, bias: jax.Array
    ) -> jax.Array:
        distances = jnp.abs(signed_boundary_distance(features, labels, kernel, bias))
        return jax.ops.segment_min(jnp.min(distances, axis=1), labels, bias.shape[0])

    features, kernel, bias = (_validate.floats(name, value) for name, value in (
        ("features", features), ("kernel", kernel), ("bias", bias)))
    labels = _validate.class_numbers("labels", labels)
    _validate.shapes(features=(features, "N d"), labels=(labels, "N"))
    return parallel.over_any_mesh(smallest)(features, labels, kernel, bias)


def rescale_head(
    params: Mapping[str, Any], nu: float, *, feature_layer: str = "features", head: str = "head"
) -> dict[str, Any]:
    r"""Applies the map T_nu of Proposition 5.3: same predictions, features scaled by nu.

    .. math:: T_\nu : (\Theta_I, W^-, b^-, b) \mapsto (\Theta_I, \nu W^-, \nu b^-, \nu b)

    The layer that produces the features (affine, with or without ReLU) and the softmax
    layer's bias are multiplied by nu; W is not. Features, logits, class margins and
    dispersions are then multiplied by nu, and :math:`T_\nu(\Theta) - \Theta = (\nu - 1) u`
    with u depending on Theta alone (Corollary 5.1: growing the margins and shrinking the
    dispersion are opposite directions).

    Args:
      params: the model's parameters, a dictionary of layers.
      nu: the factor, > 0.
      feature_layer: key of the layer that produces the features.
      head: key of the softmax layer, a dictionary with a ``bias``.

    Returns:
      The rescaled parameters; ``params`` is unchanged.

    Raises:
      InputError: (a ValueError) if nu <= 0, or a layer does not exist.

    Source: Proposition 5.3 and Appendix D.
    """
    _validate.in_range("nu", nu, 0, open_low=True)
    _validate.instance("params", params, Mapping)
    _validate.one_of("feature_layer", feature_layer, params)
    _validate.one_of("head", head, params)
    return {
        **params,
        feature_layer: jax.tree.map(lambda value: nu * value, params[feature_layer]),
        head: {**params[head], "bias": nu * params[head]["bias"]},
    }
