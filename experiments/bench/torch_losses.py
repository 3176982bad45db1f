"""The robust loss in plain PyTorch, in two forms; needs PyTorch.

Both are Eq. 7 and 13 without softmax, as :func:`jaxrobust.losses.robust_loss` computes them, with
the weights, radii and momentum of a configuration and the paper's options.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional

from jaxrobust.losses import RobustLossConfig


class Problem(NamedTuple):
    """The arguments of the loss."""

    features: torch.Tensor  # shape=[B, d]
    noisy_features: torch.Tensor  # shape=[B, d]
    weight: torch.Tensor  # shape=[C, d], of the softmax layer
    bias: torch.Tensor  # shape=[C]
    labels: torch.Tensor  # shape=[B], dtype=int64
    mean: torch.Tensor  # shape=[C, d], the centroids so far
    seen: torch.Tensor  # shape=[C], dtype=bool, the classes that have a centroid


Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""The total, and ``mean`` and ``seen`` after the batch."""


def looping(problem: Problem, config: RobustLossConfig) -> Result:
    """Computes the loss class by class, equation by equation."""
    features, noisy_features, weight, bias, labels, mean, seen = problem
    compact = margin = norm = align = 0.0
    new_mean, new_seen = mean.clone(), seen.clone()
    classes = labels.unique().tolist()
    for c in classes:
        members = labels == c
        q, noisy = features[members], noisy_features[members]
        current = q.mean(0)
        running = current
        if seen[c]:
            running = config.momentum * mean[c] + (1 - config.momentum) * current

        # Eq. 8 and 12.
        compact = compact + ((q - running).norm(dim=1) - config.delta_v).relu().square().mean()
        align = align + ((noisy - running).norm(dim=1) - config.delta_v).relu().square().mean()
        # Eq. 9 and 10, over the boundaries with all other classes.
        z = weight @ current + bias
        others = torch.arange(len(bias), device=bias.device) != c
        distance = (z[c] - z[others]).abs() / (weight[c] - weight[others]).norm(dim=1)
        margin = margin + (config.delta_d + distance * (z[others] - z[c]).sign()).relu().max()
        # Eq. 11.
        norm = norm + running.norm()

        new_mean[c] = running.detach()
        new_seen[c] = True
    total = (config.alpha * compact + config.beta * margin + config.gamma_reg * norm
             + config.lam * align) / len(classes)
    return total, new_mean, new_seen


def vectorised(problem: Problem, config: RobustLossConfig) -> Result:
    """Computes the same as :func:`looping` for all classes at once."""
    features, noisy_features, weight, bias, labels, mean, seen = problem
    # Each row is one of the K classes in the batch.
    classes, own, counts = labels.unique(return_inverse=True, return_counts=True)
    counts = counts.to(features.dtype)
    current = features.new_zeros(len(classes), features.shape[1])
    current = current.index_add(0, own, features) / counts[:, None]
    moved = config.momentum * mean[classes] + (1 - config.momentum) * current
    running = torch.where(seen[classes, None], moved, current)

    # A mean over classes of means over their examples is a weighted sum over examples.
    shares = 1 / (counts[own] * len(classes))
    centroids = running[own]
    compact, align = (
        torch.dot(shares, ((q - centroids).norm(dim=1) - config.delta_v).relu().square())
        for q in (features, noisy_features))

    # Distances between rows from their products; subtracting their mean does not change them.
    rows = weight - weight.detach().mean(0)
    squares = rows.square().sum(1)
    z = functional.linear(current, rows, bias)
    squared = squares[classes, None] + squares - 2 * (rows[classes] @ rows.T)
    itself = functional.one_hot(classes, len(bias)).bool()
    distance = (z.gather(1, classes[:, None]) - z) / squared.masked_fill(itself, 1).sqrt()
    distance = distance.masked_fill(itself, torch.inf)
    margin = (config.delta_d - distance).relu().amax(1).mean()
    norm = running.norm(dim=1).mean()

    total = (config.alpha * compact + config.beta * margin + config.gamma_reg * norm
             + config.lam * align)
    new_mean = mean.index_copy(0, classes, running.detach())
    return total, new_mean, seen.index_fill(0, classes, True)


def value_and_gradients(
    loss: Callable[[Problem, RobustLossConfig], Result], problem: Problem, config: RobustLossConfig,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], tuple[torch.Tensor, torch.Tensor]]:
    """Computes the total, its gradients and the next state with one of the two forms.

    The gradients are with respect to features, noisy features, weight and bias, in this order.
    """
    inputs = [tensor.detach().requires_grad_() for tensor in problem[:4]]
    total, new_mean, new_seen = loss(Problem._make([*inputs, *problem[4:]]), config)
    return total.detach(), torch.autograd.grad(total, inputs), (new_mean, new_seen)
