"""Flax Linen classifiers that return logits, penultimate features and block outputs.

Every model takes float images in [0, 1], [B, H, W, channels], and keeps its feature layer under
``params["features"]`` and its softmax layer under ``params["head"]``. With ``train``, batch norm
uses and updates the statistics of this batch (``mutable=["batch_stats"]``), without it the running
ones. They share these fields:

- ``num_classes``: C.
- ``mean``, ``std``: per channel, of pixels in [0, 1], by which the model normalises its images;
  other numbers of channels are an InputError.
- ``num_features``: d, the dimension of the penultimate layer.
- ``width``: channels of the first stage, to which all others are proportional.
- ``dtype``: of the computation, such as bfloat16; parameters, batch statistics, features and logits
  stay float32.
- ``axis_name``: device axis over which training batch statistics are shared, if any.
- ``batch_groups``: 1, or the number of equal batches that the images are in training, one after the
  other: batch norm then sees, and is updated by, each of them in turn, as if each were alone.
"""

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxrobust import _validate
from jaxrobust.images import Outputs
from jaxrobust.models.common import head_parameters
from jaxrobust.models.mobilenet import MobileNetV3
from jaxrobust.models.resnet import FEATURE_LAYERS, ResNet18
from jaxrobust.models.small_cnn import SmallCNN

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": ResNet18,
    "resnet18_imagenet": functools.partial(ResNet18, stem="imagenet"),
    "mobilenet_v3_small": functools.partial(MobileNetV3, variant="small"),
    "mobilenet_v3_large": functools.partial(MobileNetV3, variant="large", num_features=1280),
    "small_cnn": SmallCNN,
}
"""The models by name."""

__all__ = ["MODELS", "MobileNetV3", "Outputs", "ResNet18", "SmallCNN", "create_model",
           "head_parameters"]


def create_model(
    name: str, *, num_classes: int, num_features: int, width: int, mean: Sequence[float],
    std: Sequence[float], feature_layer: str = "dense", dtype: DTypeLike = jnp.float32
) -> nn.Module:
    """Makes the model of that name; see :mod:`jaxrobust.models` for its fields.

    Args:
      name: a key of :data:`MODELS`.
      num_classes: >= 2.
      num_features: >= 1.
      width: 64 in the usual ResNet18, 16 in MobileNetV3.
      mean, std: of the same length, std > 0.
      feature_layer: for a ResNet18, one of :data:`~jaxrobust.models.resnet.FEATURE_LAYERS`; other
        models only have "dense".
      dtype: of the computation.

    Raises:
      InputError: (a ValueError) for an unknown name, or an argument that does not fit.
    """
    _validate.one_of("model", name, MODELS)
    num_classes = _validate.integer("num_classes", num_classes, 2)
    num_features = _validate.integer("num_features", num_features, 1)
    width = _validate.integer("width", width, 1)
    _validate.shapes(mean=(np.asarray(mean), "channels"), std=(np.asarray(std), "channels"))
    for deviation in std:
        _validate.in_range("std", deviation, 0, open_low=True)
    has_others = name.startswith("resnet18")
    _validate.one_of(f"feature_layer of {name}", feature_layer,
                     FEATURE_LAYERS if has_others else ("dense",))
    options = {"feature_layer": feature_layer} if has_others else {}
    return MODELS[name](num_classes=num_classes, num_features=num_features, width=width,
                        mean=tuple(mean), std=tuple(std), dtype=dtype, **options)
