"""AugMix: mixtures of chains of augmentations, and predictions for them that agree.

Operations and their strengths are those of the authors' release for CIFAR-10, which leaves out what
overlaps with the corruptions of CIFAR-10-C. It applies Pillow's operations to images of 8 bits;
here images stay floats, so that warps and stretched contrasts are not truncated in between.
"""

import jax
import jax.numpy as jnp

from jaxrobust import _validate
from jaxrobust.centroids import CentroidState, counted
from jaxrobust.corruptions.digital import sample
from jaxrobust.images import Batch
from jaxrobust.losses import mean_over_batch
from jaxrobust.methods.common import (
    BatchStats,
    Evaluated,
    Forward,
    Head,
    Objective,
    Parts,
    Passes,
    accuracy,
    positions,
    scaled,
    track,
)

_LEAST_LEVEL = 0.1


def affine(image: jax.Array, matrix: jax.Array) -> jax.Array:
    """Warps an image [H, W, channels] as ``PIL.Image.transform`` does with AFFINE and BILINEAR.

    A pixel with its centre at (x, y) is read at (a x + b y + c, d x + e y + f), for the matrix
    [2, 3] of these numbers; it is black where that is outside.
    """
    height, width, _ = image.shape
    (a, b, c), (d, e, f) = matrix
    x = jnp.arange(width, dtype=matrix.dtype)[None] + 0.5
    y = jnp.arange(height, dtype=matrix.dtype)[:, None] + 0.5
    x, y = a * x + b * y + c, d * x + e * y + f
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x, y = (jnp.where(inside, place - 0.5, 0).astype(image.dtype) for place in (x, y))
    pixels = sample(image, y, x, lambda index, size: jnp.clip(index, 0, size - 1))
    return jnp.where(inside[..., None], pixels, 0)


def _in_8_bits(image: jax.Array) -> jax.Array:
    return jnp.clip(jnp.round(255 * image), 0, 255).astype(jnp.int32)


def stretch(image: jax.Array) -> jax.Array:
    """Stretches each channel to [0, 1], as ``ImageOps.autocontrast``; a constant one stays."""
    low, high = (extreme(image, axis=(0, 1), keepdims=True) for extreme in (jnp.min, jnp.max))
    return jnp.where(high > low, (image - low) / jnp.where(high > low, high - low, 1), image)


def equalize(image: jax.Array) -> jax.Array:
    """Equalises the histogram of each channel, as ``ImageOps.equalize``."""
    def of_channel(values: jax.Array) -> jax.Array:
        counts = jnp.zeros(256, jnp.int32).at[values.ravel()].add(1)
        step = (values.size - counts[jnp.max(values)]) // 255
        below = jnp.cumsum(counts) - counts
        table = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255)
        return jnp.where(step > 0, table[values], values)

    equal = jax.vmap(of_channel, in_axes=2, out_axes=2)(_in_8_bits(image))
    return equal.astype(image.dtype) / 255


def posterize(image: jax.Array, bits: jax.Array) -> jax.Array:
    """Keeps the first ``bits`` of 8, as ``ImageOps.posterize``."""
    dropped = jnp.left_shift(jnp.int32(1), 8 - bits)
    return (_in_8_bits(image) // dropped * dropped).astype(image.dtype) / 255


def solarize(image: jax.Array, threshold: jax.Array) -> jax.Array:
    """Inverts values of at least ``threshold`` of 255, as ``ImageOps.solarize``."""
    return jnp.where(_in_8_bits(image) >= threshold, 1 - image, image)


def _warps(level: jax.Array, sign: jax.Array, height: int, width: int) -> jax.Array:
    """Matrices [5, 2, 3]: rotation, shears along x and y, shifts along x and y."""
    angle = -jnp.deg2rad(sign * jnp.floor(3 * level))  # Counter-clockwise, with y downwards.
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x, y = width / 2, height / 2
    zero, one, shear = jnp.zeros_like(level), jnp.ones_like(level), sign * 0.03 * level
    return jnp.array([
        [[cos, sin, x - cos * x - sin * y], [-sin, cos, y + sin * x - cos * y]],
        [[one, shear, zero], [zero, one, zero]],
        [[one, zero, zero], [shear, one, zero]],
        [[one, zero, sign * jnp.floor(level * width / 30)], [zero, one, zero]],
        [[one, zero, zero], [zero, one, sign * jnp.floor(level * height / 30)]]])


_OTHERS = 4  # Operations that are no warps.
NUM_OPERATIONS = _OTHERS + 5


def operate(image: jax.Array, operation: jax.Array, level: jax.Array, sign: jax.Array) -> jax.Array:
    """Applies an operation, one of :data:`NUM_OPERATIONS`, with a level in [0, 10] and a sign.

    In their order: stretched contrast, equalised histogram, fewer bits, inverted highlights,
    rotation, shear along x and y, shift along x and y.
    """
    warp = _warps(level, sign, *image.shape[:2])[jnp.maximum(operation - _OTHERS, 0)]
    # Under a map over images, a switch computes all of its branches: one warp serves five.
    return jax.lax.select_n(
        jnp.minimum(operation, _OTHERS), stretch(image), equalize(image),
        posterize(image, 4 - jnp.floor(0.4 * level).astype(jnp.int32)),
        solarize(image, 256 - jnp.floor(25.6 * level).astype(jnp.int32)), affine(image, warp))


def augment_and_mix(
    key: jax.Array, image: jax.Array, *, severity: float = 3.0, num_chains: int = 3, depth: int = 3
) -> jax.Array:
    r"""Mixes an image with mixtures of chains of random operations.

    .. math:: (1 - m) x + m \sum_{i=1}^k w_i\, (a_{i n_i} \circ \dots \circ a_{i 1})(x), \qquad
      m \sim U(0, 1), \quad w \sim \mathrm{Dirichlet}(1, \dots, 1), \quad n_i \sim U\{1, \dots, n\}

    with operations a and their levels, uniform in [0.1, severity] of 10, drawn for each place of
    each chain.

    Args:
      key: a PRNG key.
      image: x, [H, W, channels], floats in [0, 1]; so is the result.
      severity: in [0.1, 10].
      num_chains: k >= 1.
      depth: n >= 1.

    Raises:
      InputError: (a ValueError) if a number is out of its range or the image has another shape.

    Source: Hendrycks et al., AugMix: A Simple Data Processing Method to Improve Robustness and
    Uncertainty (2020), Algorithm 1, https://arxiv.org/abs/1912.02781.
    """
    _validate.in_range("severity", severity, _LEAST_LEVEL, 10, open_high=False)
    num_chains = _validate.integer("num_chains", num_chains, 1)
    depth = _validate.integer("depth", depth, 1)
    _validate.shapes(image=(image, "H W channels"))
    share_key, weight_key, chains_key = jax.random.split(key, 3)

    def chain(key: jax.Array) -> jax.Array:
        length_key, *keys = jax.random.split(key, 1 + depth)
        length = jax.random.randint(length_key, (), 1, depth + 1)
        mixed = image
        for place, own in enumerate(keys):
            operation_key, level_key, sign_key = jax.random.split(own, 3)
            operation = jax.random.randint(operation_key, (), 0, NUM_OPERATIONS)
            level = jax.random.uniform(
                level_key, (), jnp.float32, minval=_LEAST_LEVEL,
                maxval=jnp.asarray(severity, jnp.float32))
            sign = jnp.where(jax.random.bernoulli(sign_key), 1.0, -1.0)
            level, sign = level.astype(image.dtype), sign.astype(image.dtype)
            mixed = jnp.where(place < length, operate(mixed, operation, level, sign), mixed)
        return mixed

    chains = jax.vmap(chain)(jax.random.split(chains_key, num_chains))
    weights = jax.random.dirichlet(weight_key, jnp.ones(num_chains, image.dtype))
    share = jax.random.uniform(share_key, (), image.dtype)
    mixture = jnp.sum(weights[:, None, None, None] * chains, axis=0)
    return (1 - share) * image + share * mixture


def jensen_shannon_loss(
    logits: jax.Array, labels: jax.Array, *, axis_name: str | None = None
) -> jax.Array:
    r"""Averages the Jensen-Shannon divergence of predictions for versions of each image.

    .. math:: \frac1B \sum_x \frac1m \sum_{i=1}^m KL(p_i(x) \| \bar p(x)), \qquad
      \bar p = \frac1m \sum_i p_i

    Args:
      logits: [m, B, C], of m versions of each image.
      labels: [B], which say only what examples count.
      axis_name: see :mod:`jaxrobust.losses`.

    Returns:
      The loss, [], in nats, at most log m.

    Raises:
      InputError: (a ValueError) if shapes do not match or a dtype is wrong.

    Source: Hendrycks et al. (2020), Eq. 1 and 2.
    """
    logits = _validate.floats("logits", logits)
    labels = _validate.class_numbers("labels", labels)
    num_classes = _validate.shapes(logits=(logits, "m B C"), labels=(labels, "B"))["C"]
    counts = counted(labels, num_classes)
    logs = jax.nn.log_softmax(jnp.where(counts[None, :, None], logits, 0))
    number = jnp.asarray(logs.shape[0], logs.dtype)
    mean_log = jax.nn.logsumexp(logs, axis=0) - jnp.log(number)
    apart = jnp.sum(jnp.exp(logs) * (logs - mean_log[None]), axis=2)
    return mean_over_batch(jnp.mean(apart, axis=0), axis_name, counts=counts)


def make_augmix(parts: Parts) -> tuple[Objective, Passes]:
    """The softmax loss on clean images, plus the Jensen-Shannon divergence of predictions for them
    and for two mixtures of augmentations of each; all three in one pass."""
    options = parts.options.augmix
    versions = 3

    def mixed(key: jax.Array, where: jax.Array, images: jax.Array) -> jax.Array:
        return jax.vmap(lambda position, image: augment_and_mix(
            jax.random.fold_in(key, position), image, severity=options.severity,
            num_chains=options.num_chains, depth=options.depth))(where, images)

    def objective(
        forward: Forward, head: Head, batch_stats: BatchStats, centroids: CentroidState,
        batch: Batch, *, weight: jax.Array | float, key: jax.Array, axis_name: str | None
    ) -> tuple[jax.Array, Evaluated]:
        del head
        size = len(batch.labels)
        where = positions(size, axis_name)
        images = jax.lax.stop_gradient(batch.clean)
        outputs, batch_stats = forward(batch_stats, jnp.concatenate([
            images, *(mixed(jax.random.fold_in(key, i), where, images)
                      for i in range(1, versions))]))
        logits = outputs.logits.reshape(versions, size, -1)
        loss = parts.softmax(logits[0], batch.labels, axis_name=axis_name)
        added = jensen_shannon_loss(logits, batch.labels, axis_name=axis_name)
        metrics = {"softmax": loss,
                   "accuracy_clean": accuracy(logits[0], batch.labels, axis_name),
                   "jensen_shannon": added}
        centroids = track(centroids, outputs.features[:size], batch.labels, axis_name)
        return (loss + scaled(weight, scaled(options.weight, added)),
                Evaluated(batch_stats, centroids, metrics))

    return objective, Passes(versions, 0, versions)
