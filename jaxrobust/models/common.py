"""What the models share: layers as in PyTorch, and normalisation."""

import dataclasses
import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike

from jaxrobust import _validate


def over_axis(
    model: nn.Module, axis_name: str | None, synchronised: bool
) -> tuple[nn.Module, bool]:
    """Adapts a model to a device axis; returns also whether batch norm shares statistics over it.

    It does if that is requested and the module has a field ``axis_name``.
    """
    if not has_field(model, "axis_name"):
        return model, False
    return model.clone(axis_name=axis_name if synchronised else None), synchronised


def has_field(model: nn.Module, name: str) -> bool:
    """Whether a model has a field of that name, by which it says what it can do."""
    return name in {field.name for field in dataclasses.fields(model)}


def head_parameters(
    params: Mapping[str, Any], head: str = "head"
) -> tuple[jax.Array, jax.Array]:
    """Finds the softmax layer's ``(kernel [d, C], bias [C])`` among a model's parameters.

    Args:
      params: of the model.
      head: the layer's name, or the path of a nested layer, such as ``"top/Dense_0"``.

    Raises:
      InputError: (a ValueError) if there is no such layer; it lists the ones that would do.
    """
    leaves = traverse_util.flatten_dict(params, sep="/")
    layers = [path.removesuffix("/kernel") for path, leaf in leaves.items()
              if path.endswith("/kernel") and np.ndim(leaf) == 2
              and np.shape(leaves.get(f"{path.removesuffix('/kernel')}/bias")) == leaf.shape[1:]]
    _validate.one_of("head", head, layers)
    return leaves[f"{head}/kernel"], leaves[f"{head}/bias"]


torch_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""U(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's default for convolutions and linear layers."""


def torch_bias_init(fan_in: int) -> nn.initializers.Initializer:
    """Makes U(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's default for their biases."""
    bound = fan_in**-0.5

    def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def dense(num_outputs: int, inputs: jax.Array, *, name: str, dtype: DTypeLike,
          kernel_init: nn.initializers.Initializer = torch_kernel_init,
          bias_init: nn.initializers.Initializer | None = None) -> jax.Array:
    """Applies a fully connected layer, by default with PyTorch's default initialisation."""
    return nn.Dense(num_outputs, dtype=dtype, kernel_init=kernel_init,
                    bias_init=bias_init or torch_bias_init(inputs.shape[-1]), name=name)(inputs)


def conv(channels: int, inputs: jax.Array, *, size: int, stride: int = 1, depthwise: bool = False,
         dtype: DTypeLike, kernel_init: nn.initializers.Initializer = torch_kernel_init,
         bias_init: nn.initializers.Initializer | None = None,
         name: str | None = None) -> jax.Array:
    """Applies a convolution of odd size, padded by size // 2 on every side as in PyTorch.

    It has a bias if there is a ``bias_init``. A depthwise one has a kernel [size, size] for each
    channel, and as many channels as its inputs.
    """
    form = _depthwise_conv if depthwise else _strided_conv if stride > 1 else None
    return nn.Conv(channels, (size, size), strides=stride, padding=size // 2,
                   feature_group_count=channels if depthwise else 1,
                   use_bias=bias_init is not None, dtype=dtype, kernel_init=kernel_init,
                   bias_init=bias_init or nn.initializers.zeros, name=name,
                   conv_general_dilated=form)(inputs)


def _shift(x: jax.Array, axis: int, by: int, *, size: int, stride: int) -> jax.Array:
    """The padded inputs that a kernel's tap ``by``, of ``size`` along an axis, is applied to."""
    last = (x.shape[axis] - size) // stride * stride
    return jax.lax.slice_in_dim(x, by, by + last + 1, stride, axis)


def _added(terms: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(operator.add, terms)


def _depthwise_conv(
    inputs: jax.Array, kernel: jax.Array, strides: Sequence[int],
    padding: Sequence[tuple[int, int]], **options: Any
) -> jax.Array:
    """``lax.conv_general_dilated`` of inputs [B, H, W, C] and a kernel [k, k, 1, C].

    On CPUs, where XLA runs grouped convolutions channel by channel, it is a sum of shifted
    products: a gradient of MobileNetV3 takes a quarter of the time. Columns are shifted before
    rows, 2 k shifts in all rather than k * k, which makes the gradient faster to run and compile.
    """
    def shifted(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
        wide = np.promote_types(inputs.dtype, jnp.float32)  # As convolutions accumulate.
        kernel = kernel.astype(wide)
        x = jnp.pad(inputs.astype(wide), ((0, 0), *padding, (0, 0)))
        height, width = kernel.shape[:2]
        columns = [_shift(x, 2, j, size=width, stride=strides[1]) for j in range(width)]
        rows = (_added(column * kernel[i : i + 1, j : j + 1] for j, column in enumerate(columns))
                for i in range(height))
        return _added(_shift(row, 1, i, size=height, stride=strides[0])
                      for i, row in enumerate(rows)).astype(inputs.dtype)

    return jax.lax.platform_dependent(
        inputs, kernel, cpu=shifted, default=functools.partial(
            jax.lax.conv_general_dilated, window_strides=strides, padding=padding, **options))


def _strided_conv(
    inputs: jax.Array, kernel: jax.Array, strides: Sequence[int],
    padding: Sequence[tuple[int, int]], **options: Any
) -> jax.Array:
    """``lax.conv_general_dilated`` of inputs [B, H, W, C] and a kernel [k, k, C, D].

    On CPUs, its derivative over the inputs is that of a product of patches and kernel. The sums are
    the same, but a penalty on a network's input gradient differentiates them again, over the
    kernel, for which XLA has no fast form of a convolution with strides: it takes 10 to 40 times as
    long as the product.
    """
    def conv(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(inputs, kernel, strides, padding, **options)

    def product(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
        height, width, _, channels = kernel.shape
        x = jnp.pad(inputs, ((0, 0), *padding, (0, 0)))
        rows = [_shift(x, 1, i, size=height, stride=strides[0]) for i in range(height)]
        patches = jnp.concatenate([_shift(row, 2, j, size=width, stride=strides[1])
                                   for row in rows for j in range(width)], axis=-1)
        return jnp.matmul(patches, kernel.reshape(-1, channels),
                          precision=options.get("precision"))

    @jax.custom_jvp
    def with_derivative(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
        return conv(inputs, kernel)

    def derivative(
        primals: tuple[jax.Array, jax.Array], tangents: tuple[Any, Any]
    ) -> tuple[jax.Array, Any]:
        (inputs, kernel), (of_inputs, of_kernel) = primals, tangents
        terms = []
        if not isinstance(of_inputs, SymbolicZero):
            terms.append(jax.lax.platform_dependent(of_inputs, kernel, cpu=product, default=conv))
        if not isinstance(of_kernel, SymbolicZero):
            terms.append(conv(inputs, of_kernel))
        return with_derivative(inputs, kernel), _added(terms)

    with_derivative.defjvp(derivative, symbolic_zeros=True)
    return with_derivative(inputs, kernel)


BATCH_NORM_MOMENTUM = 0.9
"""Weight of the old running statistics by PyTorch's default, a momentum of 0.1 there."""


def batch_norm(inputs: jax.Array, *, train: bool, axis_name: str | None, dtype: DTypeLike,
               batch_groups: int = 1, momentum: float = BATCH_NORM_MOMENTUM,
               epsilon: float = 1e-5, name: str | None = None) -> jax.Array:
    """Applies batch normalisation, by default with PyTorch's momentum and epsilon.

    ``momentum`` is the weight of the old running statistics, one minus PyTorch's. The variance is
    E[(x - E x)^2], not the cheaper E[x^2] - (E x)^2, whose second derivative loses its digits. The
    running variance is the biased one; PyTorch stores the unbiased one.

    In training, the inputs are ``batch_groups`` equal batches, one after the other: each is
    normalised by its own statistics, and updates the running ones in turn, as if it were alone.

    Raises:
      InputError: (a ValueError) if the inputs cannot be divided into so many batches.
    """
    if train and batch_groups != 1:
        return _GroupedBatchNorm(batch_groups, momentum=momentum, epsilon=epsilon, dtype=dtype,
                                 axis_name=axis_name, name=name)(inputs)
    return nn.BatchNorm(use_running_average=not train, momentum=momentum, epsilon=epsilon,
                        dtype=dtype, axis_name=axis_name, use_fast_variance=False,
                        name=name)(inputs)


class _GroupedBatchNorm(nn.Module):
    """What :class:`flax.linen.BatchNorm` does in training to one batch after the other, at once.

    It has the same variables. Arrays are those of all batches, never slices, which would have to be
    moved between the devices of a mesh.
    """

    batch_groups: int
    momentum: float
    epsilon: float
    dtype: Any
    axis_name: str | None

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        groups = _validate.integer("batch_groups", self.batch_groups, 1)
        size, channels = inputs.shape[0], inputs.shape[-1]
        if size % groups:
            raise _validate.InputError(
                f"Expected batch_groups={groups} to divide the {size} images.")
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)

        x = inputs.astype(np.promote_types(inputs.dtype, jnp.float32))
        positions = tuple(range(1, x.ndim - 1))

        def average(values: jax.Array) -> jax.Array:  # [B, ..., channels] -> [groups, channels]
            # Of each image first: a reduction of the array as it is takes less time on CPUs than
            # one of it reshaped.
            of_images = jnp.mean(values, axis=positions)
            own = jnp.mean(of_images.reshape(groups, size // groups, channels), axis=1)
            return own if self.axis_name is None else jax.lax.pmean(own, self.axis_name)

        def for_images(
            statistics: jax.Array
        ) -> jax.Array:  # [groups, channels] -> [B, 1, ..., channels]
            return jnp.expand_dims(jnp.repeat(statistics, size // groups, axis=0), positions)

        mean = average(x)
        x -= for_images(mean)
        variance = average(jnp.square(x))
        for running, own in ((running_mean, mean), (running_var, variance)):
            for statistic in own:
                running.value = self.momentum * running.value + (1 - self.momentum) * statistic
        factor = jax.lax.rsqrt(variance + self.epsilon) * scale[None]
        x = x * for_images(factor) + jnp.expand_dims(bias, (0, *positions))
        return x.astype(self.dtype)


def normalise(
    images: jax.Array, mean: Sequence[float], std: Sequence[float], dtype: DTypeLike
) -> jax.Array:
    """Checks the images of every model, and normalises them: (images - mean) / std per channel.

    Raises:
      InputError: (a ValueError) if images are not floats [B, H, W, channels], ``mean`` or ``std``
        not a number for each channel, or a std not above 0.
    """
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise _validate.InputError("Expected images of a floating dtype, in [0, 1], got "
                                   f"{images.dtype}: divide the bytes by 255.")
    mean, std = np.asarray(mean), np.asarray(std)
    _validate.shapes(images=(images, "B H W channels"), mean=(mean, "channels"),
                     std=(std, "channels"))
    for deviation in std:
        _validate.in_range("std", deviation, 0, open_low=True)
    mean, std = (jnp.asarray(value, images.dtype)[None, None, None] for value in (mean, std))
    return ((images - mean) / std).astype(dtype)
