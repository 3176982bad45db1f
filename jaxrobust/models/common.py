"""What the models share: their outputs, PyTorch's default initialisation, normalisation."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp


class Outputs(NamedTuple):
    """What a model returns for a batch of images."""

    logits: jax.Array  # shape=[B, C], dtype=float32 or wider; z of Eq. 1
    features: jax.Array  # shape=[B, d]; q, the input of the softmax layer
    blocks: dict[str, jax.Array]  # each [B, H, W, channels]; outputs of the named blocks


def head_parameters(params: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
    """The softmax layer's ``(kernel [d, C], bias [C])`` among a model's parameters."""
    return params["head"]["kernel"], params["head"]["bias"]


torch_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""U(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's default for convolutions and linear layers."""


def torch_bias_init(fan_in: int) -> nn.initializers.Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's default for the biases of such a layer."""
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def dense(num_outputs: int, inputs: jax.Array, *, name: str, dtype) -> jax.Array:
    """A fully connected layer with PyTorch's default initialisation."""
    return nn.Dense(num_outputs, dtype=dtype, kernel_init=torch_kernel_init,
                    bias_init=torch_bias_init(inputs.shape[-1]), name=name)(inputs)


def conv(channels: int, inputs: jax.Array, *, size: int, stride: int = 1, dtype,
         name: str | None = None) -> jax.Array:
    """A convolution without bias, padded by size // 2 on every side as PyTorch's are."""
    return nn.Conv(channels, (size, size), strides=stride, padding=size // 2, use_bias=False,
                   dtype=dtype, kernel_init=torch_kernel_init, name=name)(inputs)


def batch_norm(inputs: jax.Array, *, train: bool, axis_name: str | None, dtype,
               name: str | None = None) -> jax.Array:
    """Batch normalisation with PyTorch's momentum and epsilon.

    The variance is E[(x - E x)^2], not the cheaper E[x^2] - (E x)^2, whose second derivative
    loses its digits. The running variance is the biased one; PyTorch stores the unbiased.
    """
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype,
                        axis_name=axis_name, use_fast_variance=False, name=name)(inputs)


def normalise(images: jax.Array, mean: Sequence[float], std: Sequence[float], dtype) -> jax.Array:
    """(images - mean) / std per channel."""
    mean, std = (jnp.asarray(value, images.dtype)[None, None, None] for value in (mean, std))
    return ((images - mean) / std).astype(dtype)
