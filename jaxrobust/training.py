"""The train state, the pure train step, and the paper's optimisers.

**What a model needs.** It is a Flax Linen module that is called as ``model(images, train=...)`` and
returns :class:`~jaxrobust.models.Outputs`: logits, and the features that its softmax layer, an
``nn.Dense`` with a bias, turns into them. The argument ``head`` is that layer's name, or its path,
such as ``"top/Dense_0"``. Batch statistics are kept in the collection ``batch_stats``. Dropout gets
a key of its own for every step and pass.

An ``axis_name`` is passed on to a module with a field of that name, as those of
:mod:`jaxrobust.models`, and by it to its batch norms, which then see the whole batch. In a module
without the field, batch norm sees the share of each device, unless its layers name the axis
themselves.

A method that passes clean and noisy images one after the other, such as ``robust``, makes two
passes of a module without a field ``batch_groups``, and one pass of all images, for the same result
in less time, with it: 1 by default, and in this pass the number of equal batches that the images
are, one after the other. The module must then treat each as if it were alone, and its batch norms,
:func:`~jaxrobust.models.common.batch_norm`, must be given the field. Dropout draws once for all of
these images, and otherwise for each pass.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from jaxrobust import _validate, parallel
from jaxrobust.centroids import CentroidState, counted, init_centroids
from jaxrobust.images import Outputs
from jaxrobust.methods import METHOD_KEY, Batch, Evaluated, Method
from jaxrobust.methods.common import at_once, in_turn
from jaxrobust.models.common import has_field, head_parameters, over_axis


@flax.struct.dataclass
class TrainState:
    """Everything that training changes, and the key for its randomness, as one pytree."""

    step: jax.Array  # shape=[], dtype=int32; updates done
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    centroids: CentroidState
    key: jax.Array  # constant; augmentation and noise of step t come from fold_in(key, t)


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


FINITE = "finite"
"""The metric that tells whether all the others of an update are finite, features and logits too."""

NOT_FINITE = ("not_finite_features", "not_finite_logits")
"""The metrics that count images whose features or logits are not finite, in all passes together."""

WHEN_NOT_FINITE = ("stop", "skip")
"""What an update that is not finite can do; see :func:`make_train_step`."""


class _Carried(NamedTuple):
    """What objectives hand from pass to pass as batch statistics."""

    batch_stats: Any
    wrong: tuple[jax.Array, jax.Array]  # [] float32 each; the counts of NOT_FINITE so far


_DROPOUT = 2**32 - 1
"""Folded into the state's key for dropout; no step has this number."""


def create_train_state(
    model: nn.Module, optimizer: optax.GradientTransformation, key: jax.Array, images: jax.Array,
    *, head: str = "head",
) -> TrainState:
    """Makes a model's state before the first step.

    Args:
      model: a Flax Linen module; see :mod:`jaxrobust.training`.
      optimizer: as given to :func:`make_train_step`.
      key: a PRNG key; determines the initial parameters and all randomness of training.
      images: [B, H, W, channels], any images of the right size.
      head: the softmax layer, whose kernel gives the numbers of classes and features.

    Raises:
      InputError: (a ValueError) if there is no such layer.
    """
    init_key, train_key = jax.random.split(key)
    variables = model.init(init_key, images, train=False)
    params = variables["params"]
    kernel, _ = head_parameters(params, head)
    return TrainState(
        step=jnp.zeros((), jnp.int32), params=params,
        batch_stats=variables.get("batch_stats", {}), opt_state=optimizer.init(params),
        centroids=init_centroids(kernel.shape[1], kernel.shape[0]), key=train_key)


def make_objective(
    model: nn.Module,
    method: Method,
    *,
    axis_name: str | None = None,
    constraint_weight: optax.Schedule = optax.schedules.constant_schedule(1.0),
    head: str = "head",
) -> Callable[[Any, TrainState, Batch], tuple[jax.Array, Evaluated]]:
    """Makes what a train step minimises, as a pure function ``(params, state, batch)``.

    Its arguments are those of :func:`make_train_step`. The function returns the loss [] and
    :class:`~jaxrobust.methods.Evaluated`, whose metrics include :data:`NOT_FINITE`; it does not use
    the parameters in the state. Batch norm and dropout are in training mode.
    """
    def objective(params: Any, state: TrainState, batch: Batch) -> tuple[jax.Array, Evaluated]:
        key = jax.random.fold_in(jax.random.fold_in(state.key, METHOD_KEY), state.step)
        dropout_key = jax.random.fold_in(jax.random.fold_in(state.key, _DROPOUT), state.step)
        if axis_name is not None:  # Each device has other images.
            dropout_key = jax.random.fold_in(dropout_key, jax.lax.axis_index(axis_name))
        passes = itertools.count()
        kernel, bias = head_parameters(params, head)
        counts = counted(_validate.class_numbers("labels", batch.labels), kernel.shape[1])

        def count_wrong(rows: jax.Array) -> jax.Array:
            # Several versions of the images follow one another.
            counting = jnp.tile(counts, rows.shape[0] // counts.shape[0])
            finite = jnp.isfinite(jax.lax.stop_gradient(rows)).all(axis=1)
            return jnp.sum((~finite & counting).astype(jnp.float32))

        def one_pass(
            model: nn.Module, carried: _Carried, images: jax.Array
        ) -> tuple[Outputs, _Carried]:
            outputs, updated = model.apply(
                {"params": params, "batch_stats": carried.batch_stats}, images, train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.fold_in(dropout_key, next(passes))})
            features, logits = carried.wrong
            return outputs, _Carried(updated.get("batch_stats", carried.batch_stats), (
                features + count_wrong(outputs.features), logits + count_wrong(outputs.logits)))

        def forward(carried: _Carried, *batches: jax.Array) -> tuple[Any, ...]:
            if len(batches) == 1 or not has_field(model, "batch_groups"):
                return in_turn(functools.partial(one_pass, model))(carried, *batches)
            grouped = model.clone(batch_groups=len(batches))
            return at_once(functools.partial(one_pass, grouped))(carried, *batches)

        none = jnp.zeros((), jnp.float32)
        loss, evaluated = method.objective(
            forward, (kernel, bias), _Carried(state.batch_stats, (none, none)), state.centroids,
            batch, weight=_of_float(constraint_weight)(state.step), key=key, axis_name=axis_name)
        carried = evaluated.batch_stats
        wrong = carried.wrong if axis_name is None else jax.lax.psum(carried.wrong, axis_name)
        return loss, evaluated._replace(
            batch_stats=carried.batch_stats,
            metrics=evaluated.metrics | dict(zip(NOT_FINITE, wrong, strict=True)))

    return objective


def make_train_step(
    model: nn.Module,
    method: Method,
    optimizer: optax.GradientTransformation,
    *,
    axis_name: str | None = None,
    sync_batch_norm: bool = True,
    constraint_weight: optax.Schedule = optax.schedules.constant_schedule(1.0),
    sam_radius: float = 0.0,
    when_not_finite: str | None = None,
    head: str = "head",
) -> TrainStep:
    r"""Makes one update, as a pure function ``(state, batch) -> (state, metrics)``.

    Jit it, or map it over devices with the batch split and the state replicated
    (:mod:`jaxrobust.parallel` does both). Under ``jit`` the batch may be sharded over any mesh.

    Args:
      model: a Flax Linen module; see :mod:`jaxrobust.training` for what it needs.
      method: what is minimised; see :mod:`jaxrobust.methods` for labels that do not count.
      optimizer: of the parameters.
      axis_name: the device axis over which the batch is split, under ``pmap`` or
        ``shard_map``; None if the batch is whole. Loss, centroids, gradients, metrics and
        batch norm are those of the whole batch; dropout draws independently on each device.
      sync_batch_norm: with an ``axis_name``, whether batch norm uses the statistics of the whole
        batch, for which the model needs a field ``axis_name``. If False, each device normalises
        with those of its own share, as PyTorch's DataParallel does, and the running statistics are
        the mean over the devices.
      constraint_weight: factor, by step, of the terms that methods such as ``stability`` and
        ``robust`` add to the softmax loss; 1 in the paper.
      sam_radius: rho >= 0 of sharpness-aware minimisation, 0 for none: the parameters are updated
        with the gradient at :math:`\theta + \rho\, g / \|g\|`, g being that at
        :math:`\theta`, of the whole batch, for twice the work. Metrics, centroids and batch
        statistics are those at :math:`\theta`, but for ``gradient_norm``, which is that of the
        gradient that updates. Foret et al., Sharpness-Aware Minimization for
        Efficiently Improving Generalization (2021), https://arxiv.org/abs/2010.01412.
      when_not_finite: what an update does whose loss, a term of it, or the norm of its gradient is
        NaN or infinite, or features or logits of an image that counts. ``"stop"``: nothing, not
        even count, so that the state stays what replays the update and, in a loop on the device,
        later updates do nothing either. ``"skip"``: count as a step, and change nothing else. None:
        as any other.
      head: the name of the softmax layer, or its path, such as ``"top/Dense_0"``.

    Returns:
      The step. Its metrics are [] arrays: ``loss``, ``softmax``, ``gradient_norm``, accuracies
      on the views, and the terms of the method; :data:`NOT_FINITE`, and :data:`FINITE`, whether the
      update is finite as above (:func:`first_not_finite` names what is not). When called, it raises
      InputError if the model has no such layer, the batch is empty or its labels are not integers.
    """
    model, synchronised = over_axis(model, axis_name, sync_batch_norm)
    objective = make_objective(model, method, axis_name=axis_name,
                               constraint_weight=constraint_weight, head=head)

    _validate.in_range("sam_radius", sam_radius, 0)
    if when_not_finite is not None:
        _validate.one_of("when_not_finite", when_not_finite, WHEN_NOT_FINITE)

    def with_gradients(
        params: Any, state: TrainState, batch: Batch
    ) -> tuple[tuple[jax.Array, Evaluated], Any]:
        result, gradients = jax.value_and_grad(objective, has_aux=True)(params, state, batch)
        if axis_name is not None:
            gradients = jax.lax.pmean(gradients, axis_name)
        return result, gradients

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        (loss, evaluated), gradients = with_gradients(state.params, state, batch)
        if axis_name is not None and not synchronised:
            evaluated = evaluated._replace(
                batch_stats=jax.lax.pmean(evaluated.batch_stats, axis_name))
        if sam_radius:
            _, gradients = with_gradients(
                _towards(state.params, gradients, sam_radius), state, batch)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        metrics = {"loss": loss, "gradient_norm": optax.tree.norm(gradients), **evaluated.metrics}
        finite = metrics[FINITE] = _all_finite(metrics)
        changed: dict[str, Any] = {
            "step": state.step + 1, "params": optax.apply_updates(state.params, updates),
            "batch_stats": evaluated.batch_stats, "opt_state": opt_state,
            "centroids": evaluated.centroids}
        if when_not_finite is not None:
            # optax.apply_if_finite looks at gradients alone, keeps batch statistics and centroids
            # that are not finite, and has a state of its own. jax.debug_nans waits for each result,
            # and finds NaN that masks remove; checkify adds a check to every operation.
            kept = {name: getattr(state, name) for name in changed}
            if when_not_finite == "skip":
                kept["step"] = changed["step"]
            changed = jax.tree.map(functools.partial(jnp.where, finite), changed, kept)
        return dataclasses.replace(state, **changed), metrics

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        _validate.shapes(**{"batch.clean": (batch.clean, "B ..."),
                            "batch.noisy": (batch.noisy, "B ..."),
                            "batch.labels": (batch.labels, "B")})
        # The state keeps its sharding; the metrics are on every device.
        return parallel.over_any_mesh(
            update, split_as=lambda state, batch: (state, PartitionSpec()))(state, batch)

    return train_step


def _all_finite(metrics: Mapping[str, jax.Array]) -> jax.Array:
    """Whether an update is finite: a gradient that is not has a norm that is not."""
    counts = [metrics[name] == 0 for name in NOT_FINITE]
    return jnp.stack([*counts, *(jnp.isfinite(value) for value in metrics.values())]).all()


def first_not_finite(metrics: Mapping[str, Any]) -> str | None:
    """Names the first metric of an update that is NaN or infinite.

    First come features and logits, by the names of :data:`NOT_FINITE`, then the softmax loss, other
    terms by name, the loss, and the norm of the gradient.

    Args:
      metrics: of one update, from a step of :func:`make_train_step`; numbers.

    Returns:
      The name; None if all are finite.
    """
    last = ("loss", "gradient_norm")
    terms = sorted(metrics.keys() - {FINITE, "softmax", *NOT_FINITE, *last})
    names = [name for name in ("softmax", *terms, *last) if name in metrics]
    wrong = [name for name in NOT_FINITE if metrics[name] != 0]
    wrong += [name for name in names if not np.isfinite(metrics[name])]
    return wrong[0] if wrong else None


def _towards(params: Any, gradients: Any, radius: float) -> Any:
    """The parameters, moved by ``radius`` along the gradients; where they are if these are 0."""
    norm = optax.tree.norm(gradients)
    scale = radius / jnp.where(norm > 0, norm, 1)
    return jax.tree.map(lambda p, g: p + (scale * g).astype(p.dtype), params, gradients)


class AveragedState(NamedTuple):
    """The state of an optimiser that :func:`averaged` made."""

    inner: optax.OptState
    count: jax.Array  # type: ignore[assignment]  # tuple has a method of this name.
    # shape=[], dtype=int32; updates done
    average: Any  # like the parameters


def averaged(
    optimizer: optax.GradientTransformation, *, decay: float
) -> optax.GradientTransformation:
    r"""Makes an optimiser that also keeps an exponential moving average of the parameters.

    .. math:: \bar\theta_t = \frac{1 - \gamma}{1 - \gamma^t} \sum_{i=1}^t \gamma^{t-i} \theta_i

    so that early averages do not hold the initial parameters. Updates are as without it;
    :func:`with_averaged_parameters` puts the average in their place.

    Args:
      optimizer: of the parameters.
      decay: gamma in [0, 1); 0 for the parameters themselves.

    Raises:
      InputError: (a ValueError) for a value out of range.

    Source: Polyak and Juditsky, Acceleration of Stochastic Approximation by Averaging (1992); the
    correction is Adam's, Kingma and Ba (2015), https://arxiv.org/abs/1412.6980.
    """
    _validate.in_range("decay", decay, 0, 1)

    def init(params: optax.Params) -> AveragedState:
        return AveragedState(optimizer.init(params), jnp.zeros((), jnp.int32),
                             jax.tree.map(jnp.zeros_like, params))

    def update(
        updates: optax.Updates, state: AveragedState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, AveragedState]:
        updates, inner = optimizer.update(updates, state.inner, params)
        count = state.count + 1
        # 1 - gamma^t without the cancellation that float32 would have at first.
        left = -jnp.expm1(count.astype(jnp.float32) * np.float32(np.log(decay))) if decay else 1.0
        share = (1 - decay) / left
        average = jax.tree.map(
            lambda old, new: old + (share * (new - old)).astype(old.dtype), state.average,
            optax.apply_updates(params, updates))
        return updates, AveragedState(inner, count, average)

    return optax.GradientTransformation(init, update)


def with_averaged_parameters(state: TrainState) -> TrainState:
    """Replaces the parameters by their average, once there was an update.

    The batch statistics are those of the parameters that were averaged: recompute them
    (:mod:`jaxrobust.batch_statistics`).

    Args:
      state: of an optimiser that :func:`averaged` made.

    Raises:
      InputError: (a ValueError) if it is that of another.
    """
    if not isinstance(state.opt_state, AveragedState):
        raise _validate.InputError("Expected the state of an optimizer made by averaged(...), got "
                                   f"{type(state.opt_state).__name__}.")
    there = state.opt_state.count > 0
    return dataclasses.replace(state, params=jax.tree.map(
        lambda average, own: jnp.where(there, average, own), state.opt_state.average,
        state.params))


def _of_float(schedule: optax.Schedule) -> optax.Schedule:
    """Gives a schedule its step as float32, which counts exactly to 16 million.

    Optax's schedules mix an integer with floats, an error under strict dtype promotion.
    """
    return lambda step: schedule(jnp.asarray(step, jnp.float32))


def piecewise_schedule(
    learning_rate: float, *, decay_steps: tuple[int, ...], decay_factor: float
) -> optax.Schedule:
    """Multiplies a learning rate by ``decay_factor`` after each of ``decay_steps`` updates.

    Raises:
      InputError: (a ValueError) for a rate or a factor that is not above 0, or a step that is no
        integer >= 0.
    """
    _validate.in_range("learning_rate", learning_rate, 0, open_low=True)
    _validate.instance("decay_steps", decay_steps, Sequence)
    decay_steps = [_validate.integer("decay_steps", step, 0) for step in decay_steps]
    _validate.in_range("decay_factor", decay_factor, 0, open_low=True)
    return optax.schedules.piecewise_constant_schedule(
        learning_rate, {step: decay_factor for step in decay_steps})


def sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """Makes SGD with Nesterov momentum as in PyTorch; the defaults are the paper's (H.1).

    Args:
      learning_rate: a number or a schedule.
      momentum: in [0, 1).
      weight_decay: L2 penalty, added to the gradient of every parameter before the momentum.
      clip_norm: > 0; if given, gradients are first scaled down to this global norm.

    Raises:
      InputError: (a ValueError) for a value out of range.
    """
    _validate.in_range("momentum", momentum, 0, 1)
    return _with_decay(functools.partial(optax.sgd, momentum=momentum, nesterov=True),
                       learning_rate, weight_decay, clip_norm)


def adam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """Makes Adam as in PyTorch: decay rates 0.9 and 0.999, epsilon 1e-8, as in Appendix H.2.

    The arguments and errors are those of :func:`sgd`; the penalty is added before the moments.
    """
    return _with_decay(_adam, learning_rate, weight_decay, clip_norm)


def _adam(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    optimizer = optax.adam(learning_rate)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        # Its bias correction raises a float to the power of an integer array.
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(updates, state, params)

    return optax.GradientTransformation(optimizer.init, update)


def _with_decay(
    make: Callable[[optax.ScalarOrSchedule], optax.GradientTransformation],
    learning_rate: optax.ScalarOrSchedule, weight_decay: float, clip_norm: float | None
) -> optax.GradientTransformation:
    """Makes an optimiser that first clips gradients, then adds the L2 penalty's."""
    _validate.in_range("weight_decay", weight_decay, 0)
    if callable(learning_rate):
        learning_rate = _of_float(learning_rate)
    else:
        _validate.in_range("learning_rate", learning_rate, 0, open_low=True)
    clip = optax.identity()
    if clip_norm is not None:
        _validate.in_range("clip_norm", clip_norm, 0, open_low=True)
        clip = optax.clip_by_global_norm(clip_norm)
    return optax.chain(clip, optax.add_decayed_weights(weight_decay), make(learning_rate))
