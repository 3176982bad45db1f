"""ResNet18, a training step and Eq. 21 in plain PyTorch; needs PyTorch.

Transcribed from :mod:`jaxrobust.models.resnet` and the paper. With the parameters of the Flax
model, both frameworks compute the same numbers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import torch
from torch import nn

from experiments.bench.problem import Problem
from jaxrobust.models.pytorch import to_torch_state_dict


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected by a 1x1 convolution if shapes differ."""

    def __init__(self, inputs: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential() if inputs == channels and stride == 1 else nn.Sequential(
            nn.Conv2d(inputs, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(inputs)))
        return torch.relu(self.bn2(self.conv2(x)) + self.shortcut(inputs))


class ResNet18(nn.Module):
    """Logits of images [B, channels, H, W] in [0, 1], with the names of the authors' module."""

    def __init__(self, *, num_classes: int, mean: Sequence[float], std: Sequence[float],
                 num_features: int, width: int):
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float64)
                                 .reshape(1, -1, 1, 1), persistent=False)
        self.conv1 = nn.Conv2d(len(mean), width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        inputs = width
        for stage in range(4):
            channels = width * 2**stage
            self.add_module(f"layer{stage + 1}", nn.Sequential(
                ResidualBlock(inputs, channels, 2 if stage > 0 else 1),
                ResidualBlock(channels, channels, 1)))
            inputs = channels
        self.fc_layer = nn.Sequential(
            nn.ReLU(), nn.Linear(inputs, num_features), nn.Linear(num_features, num_classes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1((images - self.mean) / self.std)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc_layer(x.mean((2, 3)))


def convert(model: Any, variables: Mapping[str, Any]) -> ResNet18:
    """Converts a Flax ResNet18 to a PyTorch module in evaluation mode, without gradients of its
    parameters."""
    module = ResNet18(num_classes=model.num_classes, mean=model.mean, std=model.std,
                      num_features=model.num_features, width=model.width)
    # Copies: PyTorch warns about memory that it may not write to.
    state = {name: torch.from_numpy(np.array(values))
             for name, values in to_torch_state_dict(model, variables).items()}
    module.to(state["conv1.weight"].dtype).load_state_dict(state)
    return module.eval().requires_grad_(False)


def to_torch(images: np.ndarray) -> torch.Tensor:
    """Converts images [B, H, W, channels] to [B, channels, H, W], contiguous in memory."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1)))


def load(problem: Problem, channels_last: bool) -> tuple[ResNet18, torch.Tensor, torch.Tensor]:
    """Converts the module, images and labels of a problem, on the device that JAX uses."""
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
    """Makes a training step on these images: the softmax loss, and SGD as in the paper (H.1).

    The step updates the module and returns the loss [] before the update. The computation is in the
    memory layout of the module; with ``half`` in bfloat16, as PyTorch's autocast does; and with
    ``compiled`` by ``torch.compile`` on the first call. Running variances are unbiased, unlike the
    Flax model's.
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
    """Computes Eq. 21 of the softmax loss for each image [B], with t = ``step`` and
    K = ``num_probes``. ``probe(k)`` is the probe number k, like the images."""
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
