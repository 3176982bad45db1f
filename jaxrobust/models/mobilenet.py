"""MobileNetV3, the network of the paper's road images (Appendix H.2)."""

import functools
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust import _validate
from jaxrobust._activations import relu
from jaxrobust.images import Outputs
from jaxrobust.models import common
from jaxrobust.models.common import normalise


class Bottleneck(NamedTuple):
    """A row of the tables of Howard et al. (2019)."""

    inputs: int  # channels
    size: int  # of the depthwise kernel
    expanded: int  # channels
    outputs: int  # channels
    squeeze: bool  # whether there is a squeeze-and-excitation
    smooth: bool  # hard-swish, else ReLU
    stride: int

    @property
    def expands(self) -> bool:
        """Whether a 1x1 convolution widens the input first."""
        return self.expanded != self.inputs

    @property
    def keeps_shape(self) -> bool:
        """Whether the input is added to the output."""
        return self.stride == 1 and self.inputs == self.outputs


# Tables 1 and 2, from the second row on: size, expanded, outputs, squeeze, hard-swish, stride.
_TABLES = {
    "large": (
        (3, 16, 16, False, False, 1),
        (3, 64, 24, False, False, 2),
        (3, 72, 24, False, False, 1),
        (5, 72, 40, True, False, 2),
        (5, 120, 40, True, False, 1),
        (5, 120, 40, True, False, 1),
        (3, 240, 80, False, True, 2),
        (3, 200, 80, False, True, 1),
        (3, 184, 80, False, True, 1),
        (3, 184, 80, False, True, 1),
        (3, 480, 112, True, True, 1),
        (3, 672, 112, True, True, 1),
        (5, 672, 160, True, True, 2),
        (5, 960, 160, True, True, 1),
        (5, 960, 160, True, True, 1),
    ),
    "small": (
        (3, 16, 16, True, False, 2),
        (3, 72, 24, False, False, 2),
        (3, 88, 24, False, False, 1),
        (5, 96, 40, True, True, 2),
        (5, 240, 40, True, True, 1),
        (5, 240, 40, True, True, 1),
        (5, 120, 48, True, True, 1),
        (5, 144, 48, True, True, 1),
        (5, 288, 96, True, True, 2),
        (5, 576, 96, True, True, 1),
        (5, 576, 96, True, True, 1),
    ),
}
_STEM_CHANNELS = 16


def bottlenecks(variant: str, width: int) -> list[Bottleneck]:
    """Lists the bottlenecks of a variant, with all channels scaled by ``width / 16``."""
    _validate.one_of("variant", variant, _TABLES)

    def scaled(channels: float) -> int:
        return _multiple_of_8(channels * width / _STEM_CHANNELS)

    rows, inputs = [], scaled(_STEM_CHANNELS)
    for size, expanded, outputs, squeeze, smooth, stride in _TABLES[variant]:
        rows.append(Bottleneck(
            inputs, size, scaled(expanded), scaled(outputs), squeeze, smooth, stride))
        inputs = rows[-1].outputs
    return rows


def _multiple_of_8(channels: float) -> int:
    """Rounds to the nearest multiple of 8, at least 8, and to no more than a tenth less."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


BATCH_NORM_MOMENTUM = 0.99
"""Howard et al. (2019) train with a decay of 0.99, and so does torchvision."""

# TensorFlow's epsilon, as torchvision's.
_batch_norm = functools.partial(
    common.batch_norm, momentum=BATCH_NORM_MOMENTUM, epsilon=1e-3)
_conv = functools.partial(
    common.conv, kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"))
_dense = functools.partial(
    common.dense, kernel_init=nn.initializers.normal(0.01), bias_init=nn.initializers.zeros)


class BottleneckBlock(nn.Module):
    """A depthwise convolution between two 1x1 convolutions, which widen and narrow."""

    config: Bottleneck
    dtype: Any
    axis_name: str | None
    batch_groups: int

    @nn.compact
    def __call__(self, inputs: jax.Array, *, train: bool) -> jax.Array:
        config, dtype = self.config, self.dtype
        activation = nn.hard_swish if config.smooth else relu

        def norm(x: jax.Array, name: str) -> jax.Array:
            return _batch_norm(x, train=train, axis_name=self.axis_name, dtype=dtype,
                               batch_groups=self.batch_groups, name=name)

        x = inputs
        if config.expands:
            x = _conv(config.expanded, x, size=1, dtype=dtype, name="expand_conv")
            x = activation(norm(x, "expand_bn"))
        x = _conv(config.expanded, x, size=config.size, stride=config.stride,
                  depthwise=True, dtype=dtype, name="depthwise_conv")
        x = activation(norm(x, "depthwise_bn"))
        if config.squeeze:
            scale = jnp.mean(x, axis=(1, 2), keepdims=True)
            for name, channels, function in (
                    ("squeeze", _multiple_of_8(config.expanded // 4), relu),
                    ("excite", config.expanded, nn.hard_sigmoid)):
                scale = function(_conv(channels, scale, size=1, dtype=dtype, name=name,
                                       bias_init=nn.initializers.zeros))
            x = x * scale
        x = _conv(config.outputs, x, size=1, dtype=dtype, name="project_conv")
        x = norm(x, "project_bn")
        return x + inputs if config.keeps_shape else x


class MobileNetV3(nn.Module):
    """The network of Howard et al. (2019), as in torchvision.

    The feature space is the input of the softmax layer, the hard-swish of the layer before it.
    torchvision's dropout between the two is omitted: the losses of the paper act on the features
    and the boundaries of the softmax layer together, so that the features must be exactly those
    that this layer sees, and the same in training and evaluation.

    Between the kinks of its hard-swishes and hard-sigmoids the logits are not affine in the
    image, unlike a ReLU network's: the Hessian of its loss is more than the Gauss-Newton part.

    It is initialised as in torchvision: convolutions N(0, 2 / fan_out), fully connected layers
    N(0, 0.01^2), biases 0.

    Attributes (the others are in :mod:`jaxrobust.models`):
      num_features: 1024 in the small network and 1280 in the large one, whatever the width.
      width: 16 in the paper; channels are multiplied by width / 16 and rounded to multiples of 8.
      variant: "small" or "large".
    """

    num_classes: int
    mean: Sequence[float]
    std: Sequence[float]
    num_features: int = 1024
    width: int = _STEM_CHANNELS
    variant: str = "small"
    dtype: Any = jnp.float32
    axis_name: str | None = None
    batch_groups: int = 1

    batch_norm_momentum: ClassVar[float] = BATCH_NORM_MOMENTUM

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> Outputs:
        """Classifies images [B, H, W, channels] in [0, 1].

        The blocks ``block1`` to ``block5`` are the last outputs at 1/2, 1/4, 1/8, 1/16 and 1/32 of
        the resolution (rounded up); the last of them is pooled.
        """
        rows = bottlenecks(self.variant, self.width)

        def activated(x: jax.Array, channels: int, name: str, **options: Any) -> jax.Array:
            x = _conv(channels, x, dtype=self.dtype, name=f"{name}_conv", **options)
            return nn.hard_swish(_batch_norm(
                x, train=train, axis_name=self.axis_name, dtype=self.dtype,
                batch_groups=self.batch_groups, name=f"{name}_bn"))

        x = normalise(images, self.mean, self.std, self.dtype)
        x = activated(x, rows[0].inputs, "stem", size=3, stride=2)
        blocks: dict[str, jax.Array] = {}
        for number, row in enumerate(rows, 1):
            if row.stride == 2:
                blocks[f"block{len(blocks) + 1}"] = x
            x = BottleneckBlock(row, dtype=self.dtype, axis_name=self.axis_name,
                                batch_groups=self.batch_groups,
                                name=f"bottleneck{number}")(x, train=train)
        x = activated(x, 6 * rows[-1].outputs, "last", size=1)
        blocks[f"block{len(blocks) + 1}"] = x
        x = jnp.mean(x, axis=(1, 2)).astype(np.promote_types(self.dtype, jnp.float32))
        features = nn.hard_swish(_dense(self.num_features, x, name="features", dtype=x.dtype))
        logits = _dense(self.num_classes, features, name="head", dtype=x.dtype)
        return Outputs(logits, features, blocks)
