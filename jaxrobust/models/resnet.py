"""ResNet18 with the feature layer of the paper's Appendix H.1."""

from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust import _validate
from jaxrobust._activations import relu
from jaxrobust.images import Outputs
from jaxrobust.models.common import BATCH_NORM_MOMENTUM, batch_norm, conv, dense, normalise

FEATURE_LAYERS = ("dense", "dense_relu", "pooled")
"""What the penultimate layer of a ResNet18 can be."""


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which a 1x1 convolution projects if necessary."""

    channels: int
    stride: int
    dtype: Any
    axis_name: str | None
    batch_groups: int

    @nn.compact
    def __call__(self, inputs: jax.Array, *, train: bool) -> jax.Array:
        def norm(x: jax.Array, name: str) -> jax.Array:
            return batch_norm(x, train=train, axis_name=self.axis_name, dtype=self.dtype,
                              batch_groups=self.batch_groups, name=name)

        x = conv(self.channels, inputs, size=3, stride=self.stride, dtype=self.dtype, name="conv1")
        x = relu(norm(x, "bn1"))
        x = conv(self.channels, x, size=3, dtype=self.dtype, name="conv2")
        x = norm(x, "bn2")
        shortcut = inputs
        if inputs.shape[-1] != self.channels or self.stride != 1:
            shortcut = conv(self.channels, inputs, size=1, stride=self.stride, dtype=self.dtype,
                            name="shortcut_conv")
            shortcut = norm(shortcut, "shortcut_bn")
        return relu(x + shortcut)


class ResNet18(nn.Module):
    """The network of He et al. (2016) with a feature layer.

    The stem for small images is a 3x3 convolution of stride 1; that of the original, for large
    images, is a 7x7 convolution of stride 2 and a 3x3 max-pooling of stride 2. After the four
    stages come global average pooling, ReLU, a fully connected layer to ``num_features`` (the
    feature space), then the softmax layer. It is initialised by PyTorch's defaults.

    Attributes (the others are in :mod:`jaxrobust.models`):
      num_features: 128 in the paper.
      width: of the first of the four stages, doubled in each; 64 in the paper.
      stem: "cifar" for small images, as in the paper, or "imagenet" for large ones.
      feature_layer: "dense", the fully connected layer, as in the paper; "dense_relu", that layer
        followed by ReLU; or "pooled", the pooled output of the last stage, of 8 times the width, as
        in the original.
    """

    num_classes: int
    mean: Sequence[float]
    std: Sequence[float]
    num_features: int = 128
    width: int = 64
    stem: str = "cifar"
    feature_layer: str = "dense"
    dtype: Any = jnp.float32
    axis_name: str | None = None
    batch_groups: int = 1

    batch_norm_momentum: ClassVar[float] = BATCH_NORM_MOMENTUM

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> Outputs:
        """Classifies images [B, H, W, channels] in [0, 1].

        Raises:
          InputError: (a ValueError) for an unknown stem or feature layer, or ``num_features`` that
            the pooled output does not have.
        """
        _validate.one_of("stem", self.stem, ("cifar", "imagenet"))
        _validate.one_of("feature_layer", self.feature_layer, FEATURE_LAYERS)
        large = self.stem == "imagenet"
        x = normalise(images, self.mean, self.std, self.dtype)
        x = conv(self.width, x, size=7 if large else 3, stride=2 if large else 1,
                 dtype=self.dtype, name="stem_conv")
        x = relu(batch_norm(x, train=train, axis_name=self.axis_name, dtype=self.dtype,
                            batch_groups=self.batch_groups, name="stem_bn"))
        if large:
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        blocks: dict[str, jax.Array] = {}
        for stage in range(4):
            for index in range(2):
                x = ResidualBlock(
                    channels=self.width * 2**stage, stride=2 if stage > 0 and index == 0 else 1,
                    dtype=self.dtype, axis_name=self.axis_name, batch_groups=self.batch_groups,
                    name=f"block{stage + 1}_{index + 1}")(x, train=train)
            blocks[f"block{stage + 1}"] = x
        x = relu(jnp.mean(x, axis=(1, 2))).astype(np.promote_types(self.dtype, jnp.float32))
        if self.feature_layer == "pooled":
            if self.num_features != x.shape[-1]:
                raise _validate.InputError(
                    f"Expected num_features={self.num_features} to be {x.shape[-1]}, 8 times the "
                    "width, with feature_layer='pooled'.")
            features = x
        else:
            features = dense(self.num_features, x, name="features", dtype=x.dtype)
            features = relu(features) if self.feature_layer == "dense_relu" else features
        logits = dense(self.num_classes, features, name="head", dtype=x.dtype)
        return Outputs(logits, features, blocks)
