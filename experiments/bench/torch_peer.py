"""ResNet18, a step of its training, and Eq. 21 in plain PyTorch, for comparison.

Imported only where PyTorch is there.

Transcribed from :mod:`jaxrobust.models.resnet` and from the paper, with the Flax model's own
parameters, so that both frameworks compute the same numbers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import torch
from torch import nn

from experiments.bench.problem import Problem


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut, which a 1x1 convolution projects if need be."""

    def __init__(self, inputs: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.projects = inputs != channels or stride != 1
        if self.projects:
            self.shortcut_conv = nn.Conv2d(inputs, channels, 1, stride, bias=False)
            self.shortcut_bn = nn.BatchNorm2d(channels)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(inputs)))
        x = self.bn2(self.conv2(x))
        shortcut = self.shortcut_bn(self.shortcut_conv(inputs)) if self.projects else inputs
        return torch.relu(x + shortcut)


class ResNet18(nn.Module):
    """Logits of images [B, channels, H, W] in [0, 1]; names as in the Flax model."""

    def __init__(self, *, num_classes: int, mean: Sequence[float], std: Sequence[float],
                 num_features: int, width: int):
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(
                name, torch.tensor(values, dtype=torch.float64).reshape(1, -1, 1, 1))
        self.stem_conv = nn.Conv2d(len(mean), width, 3, 1, 1, bias=False)
        self.stem_bn = nn.BatchNorm2d(width)
        self.blocks = []
        inputs = width
        for stage in range(4):
            for index in range(2):
                name = f"block{stage + 1}_{index + 1}"
                channels = width * 2**stage
                self.add_module(name, ResidualBlock(
                    inputs, channels, 2 if stage > 0 and index == 0 else 1))
                self.blocks.append(name)
                inputs = channels
        self.features = nn.Linear(inputs, num_features)
        self.head = nn.Linear(num_features, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = (images - self.mean) / self.std
        x = torch.relu(self.stem_bn(self.stem_conv(x)))
        for name in self.blocks:
            x = self.get_submodule(name)(x)
        x = torch.relu(x.mean((2, 3)))
        return self.head(self.features(x))


def convert(model: Any, variables: Mapping[str, Any]) -> ResNet18:
    """The PyTorch module of a Flax ResNet18 with its parameters, in evaluation mode.

    Its parameters ask for no gradient: only the images do.
    """
    module = ResNet18(num_classes=model.num_classes, mean=model.mean, std=model.std,
                      num_features=model.num_features, width=model.width)
    state = {}
    for collection in ("params", "batch_stats"):
        for path, leaf in _leaves(variables[collection]):
            *layers, name = path
            values = np.asarray(leaf)
            if name == "kernel":  # HWIO to OIHW, or in, out to out, in
                values = values.transpose((3, 2, 0, 1) if values.ndim == 4 else (1, 0))
            # A copy: PyTorch warns about memory that it may not write to.
            state[".".join([*layers, _NAMES.get(name, name)])] = torch.from_numpy(values.copy())
    for name, buffer in module.named_buffers():
        if name in ("mean", "std") or name.endswith("num_batches_tracked"):
            state[name] = buffer
    module.to(state["head.weight"].dtype).load_state_dict(state)
    return module.eval().requires_grad_(False)


_NAMES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def _leaves(tree: Mapping[str, Any], path: tuple[str, ...] = ()):
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value


def to_torch(images: np.ndarray) -> torch.Tensor:
    """Images [B, H, W, channels] as [B, channels, H, W], PyTorch's own order in memory."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1)))


def load(problem: Problem, channels_last: bool) -> tuple[ResNet18, torch.Tensor, torch.Tensor]:
    """The module of a problem, its images and its labels, in a layout, where JAX computes."""
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return (convert(problem.model, problem.variables).to(device, memory_format=layout),
            to_torch(np.asarray(problem.images)).to(device, memory_format=layout),
            torch.from_numpy(np.array(problem.labels, np.int64)).to(device))


def make_train_step(
    module: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    learning_rate: float,
    half: bool = False,
    compiled: bool = False,
) -> Callable[[], torch.Tensor]:
    """A step of training on these images: the softmax loss, and SGD as in the paper (H.1).

    Puts the module into training mode. Its running variances are the unbiased ones; the Flax
    model's are not.

    Args:
      module: as :func:`convert` makes it; its layout in memory is that of the computation.
      images: [B, channels, H, W].
      labels: [B], integers.
      learning_rate: of SGD with Nesterov momentum 0.9 and weight decay 5e-4.
      half: in bfloat16 where PyTorch's autocast deems it safe.
      compiled: the network's forward and backward pass by ``torch.compile``, on the first call.

    Returns:
      A function that updates the module and returns the loss before the update, a [].
    """
    module.train().requires_grad_(True)
    optimizer = torch.optim.SGD(module.parameters(), lr=learning_rate, momentum=0.9,
                                weight_decay=5e-4, nesterov=True, fused=True)
    network = torch.compile(module, dynamic=False) if compiled else module

    def step():
        optimizer.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
            loss = nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def finite_difference_curvature(
    logits_fn: Callable[[torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    labels: torch.Tensor,
    probe: Callable[[int], torch.Tensor],
    *,
    step: float,
    num_probes: int,
) -> torch.Tensor:
    """Eq. 21 of the softmax loss, for each image [B].

    Args:
      logits_fn: images [B, channels, H, W] -> logits [B, C], row i depending on image i alone.
      images: [B, channels, H, W].
      labels: [B], integers.
      probe: the number of a probe, below ``num_probes``, to that probe, like images.
      step: t.
      num_probes: K.
    """
    def gradient(x):
        x = x.detach().requires_grad_()
        loss = nn.functional.cross_entropy(logits_fn(x), labels, reduction="sum")
        return torch.autograd.grad(loss, x)[0]

    at_images = gradient(images)
    total = images.new_zeros(len(images))
    for number in range(num_probes):
        slope = (gradient(images + step * probe(number)) - at_images) / step
        total += slope.square().sum((1, 2, 3))
    return total / num_probes
