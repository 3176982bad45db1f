"""A small convolutional network for small images, such as the 8 x 8 digits."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust._activations import relu
from jaxrobust.images import Outputs
from jaxrobust.models.common import BATCH_NORM_MOMENTUM, batch_norm, conv, dense, normalise


class SmallCNN(nn.Module):
    """Two convolutions with batch norm, the second of stride 2, then the feature layer.

    Attributes (the others are in :mod:`jaxrobust.models`):
      width: channels of the first convolution, doubled in the second.
      activation: ReLU, or a smooth one where second derivatives matter.
    """

    num_classes: int
    mean: Sequence[float]
    std: Sequence[float]
    num_features: int = 32
    width: int = 16
    activation: Callable[[jax.Array], jax.Array] = relu
    dtype: Any = jnp.float32
    axis_name: str | None = None
    batch_groups: int = 1

    batch_norm_momentum: ClassVar[float] = BATCH_NORM_MOMENTUM

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> Outputs:
        """Classifies images [B, H, W, channels] in [0, 1]."""
        x = normalise(images, self.mean, self.std, self.dtype)
        blocks = {}
        for stage in range(2):
            x = conv(self.width * 2**stage, x, size=3, stride=1 + stage, dtype=self.dtype,
                     name=f"conv{stage + 1}")
            x = self.activation(batch_norm(x, train=train, axis_name=self.axis_name,
                                           dtype=self.dtype, batch_groups=self.batch_groups,
                                           name=f"bn{stage + 1}"))
            blocks[f"block{stage + 1}"] = x
        x = x.reshape(x.shape[0], -1).astype(np.promote_types(self.dtype, jnp.float32))
        features = dense(self.num_features, x, name="features", dtype=x.dtype)
        logits = dense(self.num_classes, features, name="head", dtype=x.dtype)
        return Outputs(logits, features, blocks)
