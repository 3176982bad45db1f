"""The training methods, each one objective function: the paper's and others of the field.

An objective sees the model as a function ``forward(batch_stats, *batches)``, in training mode
(:data:`~jaxrobust.methods.common.Forward`), and knows nothing about optimisers or devices. It
returns the loss of the whole batch, also where the batch is split over an ``axis_name``.

**Labels that do not count.** An example whose label is outside [0, C), such as -1, does not count
(PyTorch's ``ignore_index``): every term of every objective, its gradients, the centroids and the
accuracies are as without it, whatever its logits and features are, NaN included. Means are over
the examples that count, of all devices; if there are none, the loss is 0. Its images still go
through the network: they enter the batch statistics of batch norm, through which a NaN in them can
spread to other examples. Labels are integers of any width; bool is an error.

**Random numbers** of an objective come from its ``key``, which is the same on all devices, and from
the position of an image in the whole batch: the draws are the same for any number of devices.

**Costs.** ``Method.passes`` counts passes of B images through the network, and
``Method.passes.relative`` is the work of an update in units of one of ``normal``.

**A new method** is a function of :class:`~jaxrobust.methods.common.Parts` in a file of this
package, a line in the table below, its name in :data:`CLEAN_METHODS` if it sees no noisy images,
and, if it has settings, a dataclass in :mod:`jaxrobust.methods.options`.
"""

import functools
from collections.abc import Sequence

import numpy as np

from jaxrobust import _validate
from jaxrobust.images import Batch
from jaxrobust.losses import RobustLossConfig, softmax_loss
from jaxrobust.methods import adversarial, augmix, center, consistency, paper, penalties
from jaxrobust.methods.common import (
    BatchStats,
    Evaluated,
    Forward,
    Maker,
    Method,
    Objective,
    Parts,
    Passes,
    SoftmaxLoss,
)
from jaxrobust.methods.options import MethodOptions
from jaxrobust.perturbations import Perturbation

__all__ = ["CLEAN_METHODS", "METHODS", "METHOD_KEY", "PAPER_METHODS", "ROBUST_METHODS",
           "Batch", "BatchStats", "Evaluated", "Forward", "Method", "MethodOptions", "Objective",
           "Passes", "make_method"]

_MAKERS: dict[str, Maker] = {
    "normal": paper.make_normal,
    "noisy": paper.make_noisy,
    "both": paper.make_both,
    "stability": paper.make_stability,
    "robust": paper.make_robust,
    "robust_clean": paper.make_robust_clean,
    "robust_both": paper.make_robust_both,
    "center": center.make_center,
    "consistency": consistency.make_consistency,
    "noisy_consistency": consistency.make_noisy_consistency,
    "gradient_penalty": penalties.make_gradient_penalty,
    "jacobian_penalty": penalties.make_jacobian_penalty,
    "cure": penalties.make_cure,
    "large_margin": penalties.make_large_margin,
    "pgd": adversarial.make_pgd,
    "trades": adversarial.make_trades,
    "augmix": augmix.make_augmix,
}

METHODS = tuple(_MAKERS)
"""All methods, those of the paper first."""

PAPER_METHODS = (
    "normal", "noisy", "both", "stability", "robust", "robust_clean", "robust_both")
"""The rows of the paper's tables in their order, the method of its ablation (Table 5), and its loss
on top of ``both``."""

ROBUST_METHODS = ("robust", "robust_both", "robust_clean")
"""Those with the paper's loss."""

CLEAN_METHODS = ("normal", "robust_clean", "center", "gradient_penalty", "jacobian_penalty", "cure",
                 "large_margin", "pgd", "trades", "augmix")
"""Those that see no noisy images."""

METHOD_KEY = 2**32 - 2
"""Folded into a key for the random numbers of a method; no step has this number."""


def make_method(
    name: str,
    *,
    robust: RobustLossConfig = RobustLossConfig(),
    stability_weight: float = 1.0,
    one_pass: bool = False,
    class_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    perturb: Perturbation | None = None,
    options: MethodOptions = MethodOptions(),
) -> Method:
    """Makes the method of that name.

    Those of the paper: ``normal``: softmax loss on clean images. ``noisy``: on noisy images.
    ``both``: on both, in one pass. ``stability``: on clean images, plus the distance between the
    features of both. ``robust``: on clean images, plus the paper's loss (Eq. 13). ``robust_clean``:
    the same without noisy images (Eq. 7). ``robust_both``, beyond the paper: the softmax loss of
    ``both`` plus the paper's loss.

    Others: ``center``: on clean images, plus :func:`~jaxrobust.methods.center.center_loss`.
    ``consistency``: on clean images, plus
    :func:`~jaxrobust.methods.consistency.consistency_loss`. ``noisy_consistency``: on several noisy
    versions, plus :func:`~jaxrobust.methods.consistency.noisy_consistency_losses`. On clean images,
    with a penalty on derivatives by them: ``gradient_penalty``, ``jacobian_penalty``, ``cure`` and
    ``large_margin``, see :mod:`jaxrobust.methods.penalties`. Adversarial training, ``pgd`` and
    ``trades``: see :mod:`jaxrobust.methods.adversarial`. ``augmix``: on clean images, plus
    :func:`~jaxrobust.methods.augmix.jensen_shannon_loss` of two augmented versions.

    Args:
      name: one of :data:`METHODS`.
      robust: for ``robust``, ``robust_clean`` and ``robust_both``.
      stability_weight: for ``stability``, >= 0.
      one_pass: for ``stability``, ``robust`` and ``consistency``: whether clean and noisy images go
        through the network together, as they always do for ``both``, or one after the other, as in
        the paper.
      class_weights: [C], > 0, for every softmax loss, see :func:`softmax_loss`; None for 1 each.
        The terms that methods add to the softmax loss are not weighted.
      label_smoothing: for every softmax loss, in [0, 1), see :func:`softmax_loss`.
      perturb: what makes noisy views, for ``noisy_consistency``, which draws more of them.
      options: of the methods beyond the paper.

    Raises:
      InputError: (a ValueError) for an unknown name, a number out of range, or a perturb that the
        method needs and is not given.

    Source: Section 7.1; Section 7.6; and those that the functions above name.
    """
    _validate.one_of("method", name, METHODS)
    _validate.instance("robust", robust, RobustLossConfig)
    _validate.in_range("stability_weight", stability_weight, 0)
    _validate.in_range("label_smoothing", label_smoothing, 0, 1)
    softmax: SoftmaxLoss = softmax_loss
    if label_smoothing:
        softmax = functools.partial(softmax, label_smoothing=label_smoothing)
    if class_weights is not None:
        for number, value in enumerate(class_weights):
            _validate.in_range(f"class_weights[{number}]", value, 0, open_low=True)
        softmax = functools.partial(softmax, class_weights=np.asarray(class_weights, np.float32))
    return Method(name, *_MAKERS[name](
        Parts(softmax, robust, stability_weight, one_pass, perturb, options)))
