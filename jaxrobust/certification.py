r"""Certified predictions by randomised smoothing.

The smoothed classifier answers with the class that a base classifier gives most often when
Gaussian noise is added to the image,

.. math:: g(x) = \arg\max_c P(f(x + \varepsilon) = c), \qquad \varepsilon \sim N(0, \sigma^2 I).

If that class has a probability of at least p > 1/2, no change of the image of L2 norm below
:math:`\sigma \Phi^{-1}(p)` changes the answer. p is bounded from below by counting draws.

Draw number i of an image is made with a key of its own, from the key, the image's index and i
alone: labels and radii depend neither on the batch size nor on the number of devices, and counts of
consecutive draws add up. This holds as far as the base classifier's label of an image does not
depend on the others in its batch. Noise is not clipped to [0, 1], which the theorem does not allow.

A base classifier may answer -1, as for logits that are not finite. Such a draw counts as one of a
class of its own that is never certified or predicted.

Source: Cohen, Rosenfeld and Kolter, *Certified Adversarial Robustness via Randomized Smoothing*,
2019, https://arxiv.org/abs/1902.02918. The theorem is about exact arithmetic; for what rounding may
do to it, see Voráček and Hein, *Sound Randomized Smoothing in Floating-Point Arithmetics*, 2022,
https://arxiv.org/abs/2207.07209.
"""

import bisect
import collections
import functools
import statistics as stdlib_statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust import _validate
from jaxrobust._random import draw_flat
from jaxrobust.images import to_float
from jaxrobust.parallel import Layout, make_layout, map_examples, place_batch, replicate
from jaxrobust.probes import salted

Classify = Callable[[jax.Array], jax.Array]
"""``images [B, H, W, channels] -> labels [B]``, integers; label i depends on image i alone."""

Draw = Callable[[np.ndarray, int, int, int], Iterator[np.ndarray]]
"""``(image, index, start, num) -> batches of labels`` of the draws with these numbers."""

ABSTAINED = -1
"""The label of an image that is not certified or predicted."""


class Certificate(NamedTuple):
    """What is certified of images."""

    label: np.ndarray  # shape=[B], dtype=int32; ABSTAINED where no class is certified
    radius: np.ndarray  # shape=[B], dtype=float64; in L2 and pixels of [0, 1]; 0 where it abstains
    num_draws: np.ndarray  # shape=[B], dtype=int64; noisy images that were classified


class Prediction(NamedTuple):
    """Answers of a smoothed classifier."""

    label: np.ndarray  # shape=[B], dtype=int32; ABSTAINED where no class is significantly ahead
    num_draws: np.ndarray  # shape=[B], dtype=int64; noisy images that were classified


def certify(
    classify: Classify,
    image_batch: np.ndarray,
    key: jax.Array,
    *,
    sigma: float,
    n0: int,
    n: int,
    alpha: float,
    indices: Sequence[int] | None = None,
    batch_size: int = 500,
    layout: Layout | None = None,
) -> Certificate:
    r"""Certifies an L2 radius within which the smoothed classifier's answer does not change.

    The class that is most frequent among n0 draws (of equals that of lowest number) is certified by
    n further draws, k of which are of this class, with the one-sided Clopper-Pearson bound

    .. math:: R = \sigma \Phi^{-1}(\underline{p}), \qquad
        \underline{p} = \inf \{p : P(Bin(n, p) \ge k) > \alpha\},

    unless the bound is below 1/2, where it abstains. The certificate of an image is wrong, its
    class not the smoothed classifier's everywhere within the radius, with a probability of at most
    alpha.

    Drawing stops, at the end of a batch, where the image abstains for certain. The bound grows with
    k, so it is 1/2 or more from some k* on. After m of the n draws, j of them of the class, k is at
    most j + n - m. If that is below k*, the remaining draws cannot change the answer, which is
    therefore exactly that of all n.

    Args:
      classify: the base classifier f, a function that JAX can trace. It is compiled once for each
        object; parameters that it closes over become constants of the program, those in a
        ``jax.tree_util.Partial`` do not.
      image_batch: [B, H, W, channels], uint8, or floats in [0, 1].
      key: a PRNG key. :func:`predict` and :func:`count_labels` draw the same noise from it.
      sigma: standard deviation of the noise, in pixel values of [0, 1], > 0.
      n0: draws that select the class, >= 1.
      n: draws that bound its probability, >= :math:`\log_2(1 / \alpha)`: with fewer every image
        would abstain.
      alpha: the largest probability of a wrong certificate, in (0, 1).
      indices: [B] integers that name the images, such as their positions in the data set;
        0 .. B - 1 if none are given.
      batch_size: draws at a time.
      layout: the devices, which share the draws of a batch; one if none is given.

    Returns:
      The certificates. ``num_draws`` is at most n0 + n, and alone depends on ``batch_size`` and on
      the number of devices.

    Raises:
      InputError: (a ValueError) if a number is out of range, images or indices do not fit, or the
        classifier does not return integers [B], -1 or more.

    >>> brightness = lambda images: (images.mean(axis=(1, 2, 3)) > 0.5).astype(int)
    >>> certificate = certify(brightness, np.ones((1, 4, 4, 1), np.float32), jax.random.key(0),
    ...                       sigma=1.0, n0=10, n=1000, alpha=0.001)
    >>> int(certificate.label[0]), bool(1 < certificate.radius[0] < 2)  # The distance is 2.
    (1, True)

    Source: Cohen et al., CERTIFY in Section 3.2 and Proposition 2.
    """
    n0 = _validate.integer("n0", n0, 1)
    n = _enough_draws(n, alpha, all_agree=lambda n: 2.0**-n)
    draw, indices = _draws(classify, image_batch, key, sigma, indices, batch_size, layout)
    least = _least_hits(n, alpha)

    def one(image: np.ndarray, index: int) -> tuple[int, float | None, int]:
        label, hits, drawn = _certified_hits(
            draw(image, index, 0, n0), draw(image, index, n0, n), n, least)
        radius = 0.0 if label == ABSTAINED else certified_radius(hits, n, sigma=sigma, alpha=alpha)
        return label, radius, drawn

    labels, radii, num_draws = zip(*map(one, image_batch, indices), strict=True)
    return Certificate(np.array(labels, np.int32), np.array(radii), np.array(num_draws, np.int64))


def predict(
    classify: Classify,
    image_batch: np.ndarray,
    key: jax.Array,
    *,
    sigma: float,
    n: int,
    alpha: float,
    indices: Sequence[int] | None = None,
    batch_size: int = 500,
    layout: Layout | None = None,
) -> Prediction:
    r"""Answers as the smoothed classifier, or abstains where that takes more draws.

    Of n draws, a are of the most frequent class and b of the one after it. It is the answer if the
    exact two-sided test of a against b at 1/2 rejects at the level alpha,

    .. math:: p(a, b) = \min(1, 2 P(Bin(a + b, 1/2) \ge a)) \le \alpha.

    An answer is wrong with a probability of at most alpha.

    Drawing stops, at the end of a batch, where r remaining draws cannot change the answer. p falls
    with a and grows with b, since :math:`\{Bin(m + 1) \ge a + 1\} \subseteq \{Bin(m) \ge a\}
    \subseteq \{Bin(m + 1) \ge a\}`. Hence

    - the class is the answer for certain if :math:`p(a, b + r) \le \alpha` and a > b + r: it stays
      ahead, its final count is at least a, and that of any other class at most b + r;
    - it abstains for certain if :math:`p(a + r, b) > \alpha`: in the end the most frequent class,
      whichever it is, has a count of at most a + r, and another one has at least b, because two
      classes have at least b now.

    Args:
      classify: as for :func:`certify`.
      image_batch: [B, H, W, channels], uint8, or floats in [0, 1].
      key: a PRNG key, as for :func:`certify`.
      sigma: standard deviation of the noise, in pixel values of [0, 1], > 0.
      n: draws, >= :math:`1 + \log_2(1 / \alpha)`: with fewer every image would abstain.
      alpha: the largest probability of a wrong answer, in (0, 1).
      indices: [B] integers that name the images; 0 .. B - 1 if none are given.
      batch_size: draws at a time.
      layout: the devices, which share the draws of a batch; one if none is given.

    Returns:
      The answers. ``num_draws`` is at most n, and alone depends on ``batch_size`` and on the number
      of devices.

    Raises:
      InputError: (a ValueError) as :func:`certify`.

    Source: Cohen et al., PREDICT in Section 3.2 and Proposition 1.
    """
    n = _enough_draws(n, alpha, all_agree=lambda n: 2.0**(1 - n))
    draw, indices = _draws(classify, image_batch, key, sigma, indices, batch_size, layout)

    def one(image: np.ndarray, index: int) -> tuple[int, int]:
        return _significant_label(draw(image, index, 0, n), n, alpha)

    labels, num_draws = zip(*map(one, image_batch, indices), strict=True)
    return Prediction(np.array(labels, np.int32), np.array(num_draws, np.int64))


def count_labels(
    classify: Classify,
    image: np.ndarray,
    key: jax.Array,
    start: int,
    num: int,
    batch_size: int = 500,
    *,
    sigma: float,
    index: int = 0,
    layout: Layout | None = None,
) -> collections.Counter[int]:
    """Counts the labels of draws ``start`` to ``start + num - 1`` of an image.

    Counts of consecutive ranges add up to those of the whole range. :func:`certify` selects a class
    with draws 0 to n0 - 1 and bounds its probability with draws n0 to n0 + n - 1.

    Args:
      classify: as for :func:`certify`.
      image: [H, W, channels], uint8, or floats in [0, 1].
      key: a PRNG key.
      start: number of the first draw, >= 0.
      num: draws, >= 1.
      batch_size: draws at a time.
      sigma: standard deviation of the noise, in pixel values of [0, 1], > 0.
      index: integer >= 0 that names the image.
      layout: the devices, which share the draws of a batch; one if none is given.

    Returns:
      How often each label was given, exact integers; labels never given are left out.

    Raises:
      InputError: (a ValueError) as :func:`certify`.
    """
    start = _validate.integer("start", start, 0)
    num = _validate.integer("num", num, 1)
    draw, _ = _draws(classify, np.asarray(image)[None], key, sigma, [index], batch_size, layout)
    counts: collections.Counter[int] = collections.Counter()
    for labels in draw(image, index, start, num):
        counts.update(labels.tolist())
    return counts


def certified_radius(hits: int, n: int, *, sigma: float, alpha: float) -> float | None:
    r"""Computes the radius :math:`\sigma \Phi^{-1}(\underline{p})` that so many hits certify.

    Args:
      hits: draws of the class, in [0, n].
      n: independent draws, >= 1, none of them used to select the class.
      sigma: standard deviation of the noise, > 0.
      alpha: the largest probability of a wrong certificate, in (0, 1).

    Returns:
      The radius, in the units of sigma; None if the bound of the probability is below 1/2.

    Raises:
      InputError: (a ValueError) if a number is out of range.
    """
    n = _validate.integer("n", n, 1)
    _validate.in_range("hits", _validate.integer("hits", hits, 0), 0, n, open_high=False)
    _validate.in_range("sigma", sigma, 0, open_low=True)
    _validate.in_range("alpha", alpha, 0, 1, open_low=True)
    lower = 1 - _miss_bound(hits, n, alpha)
    return sigma * stdlib_statistics.NormalDist().inv_cdf(lower) if lower >= 0.5 else None


def certified_accuracy(
    certificate: Certificate, labels: np.ndarray, radii: np.ndarray
) -> np.ndarray:
    r"""Computes the share of images certified as their label at each radius.

    .. math:: A(r) = mean_n 1\{c_n = y_n, R_n \ge r\}

    An abstention is never right, not even at radius 0.

    Args:
      certificate: of N images.
      labels: y [N] integers >= 0.
      radii: r [R] >= 0, in L2 and pixels of [0, 1].

    Returns:
      [R], float64, non-increasing in r.

    Raises:
      InputError: (a ValueError) if shapes do not match, a label is negative, or a radius is
        negative or NaN.
    """
    labels, radii = np.asarray(labels), _validate.reals("radii", radii)
    _validate.instance("certificate", certificate, Certificate)
    _validate.shapes(label=(certificate.label, "N"), radius=(certificate.radius, "N"),
                     labels=(labels, "N"), radii=(radii, "R"))
    _validate.labels("labels", labels, 2**31)
    for radius in radii:
        _validate.in_range("radius", radius, 0)
    right = certificate.label == labels
    return np.mean(right[:, None] & (certificate.radius[:, None] >= radii[None]), axis=0)


# --- Draws -------------------------------------------------------------------------------------


def _draws(
    classify: Classify, images: np.ndarray, key: jax.Array, sigma: float,
    indices: Sequence[int] | np.ndarray | None, batch_size: int, layout: Layout | None
) -> tuple[Draw, np.ndarray]:
    """``(image, index, start, num) -> batches of labels``, and the indices; all checked."""
    _validate.function("classify", classify)
    _validate.key("key", key)
    _validate.in_range("sigma", sigma, 0, open_low=True)
    batch_size = _validate.integer("batch_size", batch_size, 1)
    _validate.images("image_batch", images)
    indices = np.arange(len(images)) if indices is None else np.asarray(indices)
    _validate.shapes(image_batch=(images, "B ..."), indices=(indices, "B"))
    _validate.labels("indices", indices, 2**31)
    layout = make_layout("jit") if layout is None else layout.for_examples()
    if not isinstance(classify, jax.tree_util.Partial):
        classify = jax.tree_util.Partial(classify)
    shared = replicate(layout, (classify, salted(key, "certification"), np.float32(sigma)))

    def draw(image: np.ndarray, index: int, start: int, num: int) -> Iterator[np.ndarray]:
        own = replicate(layout, (np.asarray(image), np.int32(index)))
        # Batches of one size, so that few draws of the last one are dropped.
        shares = -(-num // batch_size) * layout.num_devices
        size = -(-num // shares) * layout.num_devices
        for first in range(start, start + num, size):
            numbers = np.arange(first, first + size, dtype=np.int32)
            rows = place_batch(layout, numbers[layout.rows_of(size)], size)
            labels = np.asarray(_classify(layout, shared, own, rows))[:start + num - first]
            if labels.min() < ABSTAINED:
                raise _validate.InputError(
                    f"Expected labels of the classifier to be -1 or more, got {labels.min()}.")
            yield labels

    return draw, indices


@functools.partial(jax.jit, static_argnames="layout")
def _classify(layout: Layout, shared: Any, own: Any, numbers: jax.Array) -> jax.Array:
    """Labels [B] of the draws of an image with these numbers [B]."""
    def share(everywhere: Any, numbers: jax.Array) -> jax.Array:
        (classify, key, sigma), (image, index) = everywhere
        key = jax.random.fold_in(key, index)
        image = to_float(image).astype(jnp.float32)
        noise = jax.vmap(lambda number: draw_flat(
            jax.random.normal, jax.random.fold_in(key, number), image.shape))(numbers)
        labels = _validate.class_numbers(
            "labels of the classifier", classify(image[None] + sigma * noise))
        _validate.shapes(draws=(numbers, "B"), **{"labels of the classifier": (labels, "B")})
        return labels

    return map_examples(layout, share)((shared, own), numbers)


# --- Counts ------------------------------------------------------------------------------------


def _ranked(counts: collections.Counter[int]) -> list[tuple[int, int]]:
    """The two most frequent labels and their counts, of equals the lower one first."""
    ranked = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return [*ranked, (ABSTAINED, 0)][:2]


def _certified_hits(
    selection: Iterable[np.ndarray], bounding: Iterable[np.ndarray], n: int, least: int
) -> tuple[int, int, int]:
    """The class that is certified, its hits of n, and the labels read; see :func:`certify`.

    Args:
      selection: batches of labels that select the class.
      bounding: batches of n labels, read until the class is certain to have fewer than ``least``.
      n: labels of ``bounding``.
      least: hits without which it abstains, >= 1.
    """
    selected: collections.Counter[int] = collections.Counter()
    for labels in selection:
        selected.update(labels.tolist())
    (label, _), _ = _ranked(selected)
    hits = seen = 0
    if label != ABSTAINED:
        for labels in bounding:
            hits += int(np.count_nonzero(labels == label))
            seen += len(labels)
            if hits + n - seen < least:
                break
    return label if hits >= least else ABSTAINED, hits, selected.total() + seen


def _significant_label(
    batches: Iterable[np.ndarray], n: int, alpha: float
) -> tuple[int, int]:
    """The class that is ahead of all others in n labels, and the labels read; :func:`predict`."""
    from jaxrobust import statistics  # SciPy, which a mere import does not need.

    def is_ahead(first: int, second: int) -> bool:
        return first > second and statistics.sign_test(first, second) <= alpha

    counts: collections.Counter[int] = collections.Counter()
    for labels in batches:
        counts.update(labels.tolist())
        left = n - counts.total()
        (label, first), (_, second) = _ranked(counts)
        if is_ahead(first, second + left):
            return label, counts.total()
        if not is_ahead(first + left, second):
            break
    return ABSTAINED, counts.total()


def _enough_draws(n: int, alpha: float, all_agree: Callable[[int], float]) -> int:
    """n, checked; ``all_agree`` is the level at which n draws of one class are significant."""
    n = _validate.integer("n", n, 1)
    _validate.in_range("alpha", alpha, 0, 1, open_low=True)
    if all_agree(n) > alpha:
        raise _validate.InputError(f"Expected n={n} to be larger: with so few draws every image "
                                   f"abstains at alpha={alpha}.")
    return n


def _miss_bound(hits: int, n: int, alpha: float) -> float:
    """The largest probability of a miss that is plausible: 1 less the lower bound for hits."""
    from jaxrobust import statistics  # SciPy, which a mere import does not need.

    return statistics.share_upper_bound(n - hits, n, alpha)


def _least_hits(n: int, alpha: float) -> int:
    """The fewest of n draws whose lower bound is 1/2 or more; n + 1 if all are too few."""
    return bisect.bisect_left(
        range(n + 1), True, key=lambda hits: _miss_bound(hits, n, alpha) <= 0.5)
