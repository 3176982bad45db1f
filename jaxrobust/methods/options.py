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

    def __post_init__(self):
        _validate.in_range("center.weight", self.weight, 0)
        _validate.in_range("center.rate", self.rate, 0, 1, open_high=False)


@hyperparameters("weight")
@dataclasses.dataclass(frozen=True)
class ConsistencyOptions:
    """Settings of the method "consistency"."""

    weight: float = 1.0
    """Weight of the divergence between the predictions for clean and noisy images, >= 0."""

    def __post_init__(self):
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
    num_draws: int = 2
    """Noisy versions m of each image, at least 2."""

    def __post_init__(self):
        _validate.in_range("noisy_consistency.weight", self.weight, 0)
        _validate.in_range("noisy_consistency.entropy_weight", self.entropy_weight, 0)
        _validate.integer("noisy_consistency.num_draws", self.num_draws, 2)


@hyperparameters("weight")
@dataclasses.dataclass(frozen=True)
class GradientPenaltyOptions:
    """Settings of the method "gradient_penalty"."""

    weight: float = 0.1
    """Weight of the squared norm of the loss's gradient by the image, >= 0."""

    def __post_init__(self):
        _validate.in_range("gradient_penalty.weight", self.weight, 0)


@hyperparameters("weight")
@dataclasses.dataclass(frozen=True)
class JacobianPenaltyOptions:
    """Settings of the method "jacobian_penalty"."""

    weight: float = 0.01
    """Weight of half the squared norm of the logits' Jacobian, >= 0; 0.01 in its source."""
    num_projections: int = 1
    """Random directions of each image and update, at least 1."""

    def __post_init__(self):
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

    def __post_init__(self):
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

    def __post_init__(self):
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

    def __post_init__(self):
        super().__post_init__()
        _validate.in_range("trades.weight", self.weight, 0)


@hyperparameters("center", "consistency", "noisy_consistency", "gradient_penalty",
                 "jacobian_penalty", "cure", "pgd", "trades")
@dataclasses.dataclass(frozen=True)
class MethodOptions:
    """Settings of the methods beyond the paper, by method."""

    center: CenterOptions = CenterOptions()
    consistency: ConsistencyOptions = ConsistencyOptions()
    noisy_consistency: NoisyConsistencyOptions = NoisyConsistencyOptions()
    gradient_penalty: GradientPenaltyOptions = GradientPenaltyOptions()
    jacobian_penalty: JacobianPenaltyOptions = JacobianPenaltyOptions()
    cure: CureOptions = CureOptions()
    pgd: PGDOptions = PGDOptions()
    trades: TradesOptions = TradesOptions()
