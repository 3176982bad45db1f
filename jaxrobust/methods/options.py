"""Settings of the methods beyond the paper, a dataclass for each family.

They are pytrees, as :class:`~jaxrobust.losses.RobustLossConfig` is: a jitted function that takes
them is compiled once for all values of their numbers, and again for other options.
"""

import dataclasses

from jaxrobust import _validate
from jaxrobust._hyperparameters import hyperparameters


@hyperparameters("weight", "rate")
@dataclasses.dataclass(frozen=True)
class CenterOptions:
    """Settings of the method "center"."""

    weight: float = 0.003
    """Weight lambda of the centre loss, >= 0; 0.003 in its source."""
    rate: float = 0.5
    """Rate alpha at which centres move to their class's features, in [0, 1]; 0.5 in its source."""

    def __post_init__(self) -> None:
        _validate.in_range("center.weight", self.weight, 0)
        _validate.in_range("center.rate", self.rate, 0, 1, open_high=False)


@hyperparameters("weight")
@dataclasses.dataclass(frozen=True)
class ConsistencyOptions:
    """Settings of the method "consistency"."""

    weight: float = 1.0
    """Weight of the divergence between the predictions for clean and noisy images, >= 0."""

    def __post_init__(self) -> None:
        _validate.in_range("consistency.weight", self.weight, 0)


@hyperparameters("weight", "entropy_weight")
@dataclasses.dataclass(frozen=True)
class NoisyConsistencyOptions:
    """Settings of the method "noisy_consistency"."""

    weight: float = 10.0
    """Weight lambda of the divergence of predictions from their mean, >= 0; 10 or 20 in its
    source."""
    entropy_weight: float = 0.5
    """Weight eta of the entropy of the mean prediction, >= 0; 0.5 in its source."""
    num_versions: int = 2
    """Noisy versions m of each image, at least 2."""

    def __post_init__(self) -> None:
        _validate.in_range("noisy_consistency.weight", self.weight, 0)
        _validate.in_range("noisy_consistency.entropy_weight", self.entropy_weight, 0)
        _validate.integer("noisy_consistency.num_versions", self.num_versions, 2)


@hyperparameters("weight")
@dataclasses.dataclass(frozen=True)
class GradientPenaltyOptions:
    """Settings of the method "gradient_penalty"."""

    weight: float = 0.1
    """Weight of the squared norm of the loss's gradient by the image, >= 0."""

    def __post_init__(self) -> None:
        _validate.in_range("gradient_penalty.weight", self.weight, 0)


@hyperparameters("weight")
@dataclasses.dataclass(frozen=True)
class JacobianPenaltyOptions:
    """Settings of the method "jacobian_penalty"."""

    weight: float = 0.01
    """Weight of half the squared norm of the logits' Jacobian, >= 0; 0.01 in its source."""
    num_projections: int = 1
    """Random directions of each image and update, at least 1."""

    def __post_init__(self) -> None:
        _validate.in_range("jacobian_penalty.weight", self.weight, 0)
        _validate.integer("jacobian_penalty.num_projections", self.num_projections, 1)


@hyperparameters("weight")
@dataclasses.dataclass(frozen=True)
class CureOptions:
    """Settings of the method "cure"."""

    weight: float = 1.0
    """Weight of the squared norm of the Hessian times the gradient's sign, >= 0."""
    step: float | None = None
    """Step of the finite difference that takes the place of the Hessian, in pixel values of [0, 1],
    > 0; 1.5 in its source. None for the exact Hessian."""

    def __post_init__(self) -> None:
        _validate.in_range("cure.weight", self.weight, 0)
        if self.step is not None:
            _validate.in_range("cure.step", self.step, 0, open_low=True)


@dataclasses.dataclass(frozen=True)
class AttackOptions:
    """The attack of adversarial training."""

    norm: str = "linf"
    """Norm of the ball: "linf" or "l2"."""
    epsilon: float = 8 / 255
    """Radius of the ball, in pixel values of [0, 1], >= 0."""
    num_steps: int = 7
    """Steps along the gradient, at least 1."""
    step_size: float | None = None
    """Size of a step, in pixel values of [0, 1], > 0; none for 2.5 epsilon / num_steps."""

    def __post_init__(self) -> None:
        _validate.one_of("norm", self.norm, ("linf", "l2"))
        _validate.in_range("epsilon", self.epsilon, 0)
        _validate.integer("num_steps", self.num_steps, 1)
        if self.step_size is not None:
            _validate.in_range("step_size", self.step_size, 0, open_low=True)


@hyperparameters("epsilon")
@dataclasses.dataclass(frozen=True)
class PGDOptions(AttackOptions):
    """Settings of the method "pgd"."""


@hyperparameters("epsilon", "weight")
@dataclasses.dataclass(frozen=True)
class TradesOptions(AttackOptions):
    """Settings of the method "trades"."""

    num_steps: int = 10
    """Steps along the gradient, at least 1; 10 in its source."""
    weight: float = 6.0
    """Weight beta of the divergence from predictions for attacked images, >= 0; 1 or 6 in its
    source."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _validate.in_range("trades.weight", self.weight, 0)


@hyperparameters("weight", "margin", "clip")
@dataclasses.dataclass(frozen=True)
class LargeMarginOptions:
    """Settings of the method "large_margin"."""

    weight: float = 1.0
    """Weight of what images lack to the margin, >= 0."""
    margin: float = 1.0
    """Distance gamma to keep from the decision boundary, as Euclidean norm over the pixels in
    [0, 1], > 0."""
    clip: float = 2.0
    """Share alpha of the margin beyond which a loss has no gradient, > 0; 2 in its source's
    release."""
    num_classes: int = 1
    """Other classes, those with the largest logits, whose boundaries are considered, at least 1.
    More than there are cost nothing, though the work of an update counts them."""

    def __post_init__(self) -> None:
        _validate.in_range("large_margin.weight", self.weight, 0)
        _validate.in_range("large_margin.margin", self.margin, 0, open_low=True)
        _validate.in_range("large_margin.clip", self.clip, 0, open_low=True)
        _validate.integer("large_margin.num_classes", self.num_classes, 1)


@hyperparameters("weight", "severity")
@dataclasses.dataclass(frozen=True)
class AugMixOptions:
    """Settings of the method "augmix"."""

    weight: float = 12.0
    """Weight of the Jensen-Shannon divergence, >= 0; 12 in its source."""
    severity: float = 3.0
    """Largest level of the operations, in [0.1, 10]; 3 in its source."""
    num_chains: int = 3
    """Chains of operations in a mixture, at least 1; 3 in its source."""
    depth: int = 3
    """Most operations in a chain, at least 1; 3 in its source."""

    def __post_init__(self) -> None:
        _validate.in_range("augmix.weight", self.weight, 0)
        _validate.in_range("augmix.severity", self.severity, 0.1, 10, open_high=False)
        _validate.integer("augmix.num_chains", self.num_chains, 1)
        _validate.integer("augmix.depth", self.depth, 1)


@hyperparameters("center", "consistency", "noisy_consistency", "gradient_penalty",
                 "jacobian_penalty", "cure", "large_margin", "pgd", "trades", "augmix")
@dataclasses.dataclass(frozen=True)
class MethodOptions:
    """Settings of the methods beyond the paper, by method."""

    center: CenterOptions = CenterOptions()
    consistency: ConsistencyOptions = ConsistencyOptions()
    noisy_consistency: NoisyConsistencyOptions = NoisyConsistencyOptions()
    gradient_penalty: GradientPenaltyOptions = GradientPenaltyOptions()
    jacobian_penalty: JacobianPenaltyOptions = JacobianPenaltyOptions()
    cure: CureOptions = CureOptions()
    large_margin: LargeMarginOptions = LargeMarginOptions()
    pgd: PGDOptions = PGDOptions()
    trades: TradesOptions = TradesOptions()
    augmix: AugMixOptions = AugMixOptions()
