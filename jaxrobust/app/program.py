"""Compiles what runs execute, once for all runs that differ only in their seed."""

import contextlib
import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrobust import batch_statistics, data, parallel, training
from jaxrobust.app import files
from jaxrobust.app.config import (
    SWEPT,
    InputError,
    OptimizerConfig,
    RunConfig,
    training_perturbation,
)
from jaxrobust.app.network import Network
from jaxrobust.app.progress import compiling
from jaxrobust.data import Dataset, Split
from jaxrobust.methods import Batch, Method, make_method
from jaxrobust.models import MobileNetV3, Outputs, create_model, pytorch
from jaxrobust.parallel import Layout, make_layout
from jaxrobust.training import TrainState


def model_of(config: RunConfig, dataset: Dataset | Network) -> nn.Module:
    """Creates the model of a run."""
    return create_model(
        config.model, num_classes=len(dataset.class_names), num_features=config.num_features,
        width=config.width, feature_layer=config.feature_layer, mean=dataset.mean, std=dataset.std,
        dtype=jnp.dtype(config.dtype))


def _learning_rate(
    config: OptimizerConfig, epochs: int, steps_per_epoch: int
) -> optax.Schedule:
    """The learning rate by step."""
    if config.schedule == "piecewise":
        return training.piecewise_schedule(
            config.learning_rate, decay_factor=config.decay_factor,
            decay_steps=tuple(epoch * steps_per_epoch for epoch in config.decay_epochs))
    return optax.schedules.warmup_cosine_decay_schedule(
        init_value=0.0 if config.warmup_epochs else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=round(config.warmup_epochs * steps_per_epoch),
        decay_steps=epochs * steps_per_epoch)


def _constraint_weight(config: RunConfig, steps_per_epoch: int) -> optax.Schedule:
    """The weight of the terms beside the softmax loss, by step."""
    steps = round(config.constraint_warmup_epochs * steps_per_epoch)
    if steps == 0:
        return optax.schedules.constant_schedule(1.0)
    return optax.schedules.linear_schedule(0.0, 1.0, steps)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """The compiled functions of a run, or of several that are trained together.

    The argument ``run`` is the result of :func:`stack_configs`. For several runs, the state, the
    orders, the metrics and ``run`` have a leading axis of runs [R] in every leaf; the images are
    shared.
    """

    layout: Layout
    model: nn.Module
    learning_rate: optax.Schedule
    resident: Callable[[int], parallel.Step]
    """For a number T of updates in a call: ``(state, (images [N, ...] uint8, labels [N], order
    [N], run), positions [B]) -> (state, metrics [T])``, with all images on the devices."""
    streamed: parallel.Step
    """``(state, run, (images [B, ...], labels [B], positions [B])) -> (state, metrics [1])``:
    one update with a batch of images that has just been read."""
    order: Callable[[jax.Array, int], jax.Array]
    """``(key, epoch) -> order [N]`` of the images in an epoch."""
    passes: parallel.Step
    """``(statistics, (params, key, index, run), (images [B, ...], labels [B], positions [B])) ->
    (statistics, ())``, for one run: adds batch number ``index`` to batch norm's statistics."""
    examine: Callable[..., tuple[Batch, dict[str, Outputs], Any]]
    """``(state, run, (images [B, ...], labels [B], positions [B])) -> (batch, outputs by view,
    gradients)`` of the update that comes next, for one run on one device."""


SUBSET_SEED = 0
"""Seed that chooses training and validation images, the same for all runs."""


def rows_of(config: RunConfig, dataset: Dataset) -> tuple[np.ndarray, np.ndarray | None]:
    """Divides the training split into rows to train on and rows to hold out for validation.

    The latter are None if there are none, or the data set has its own validation images. Copies of
    one image are held out together.
    """
    labels, held_out = dataset.train.labels, None
    rows = np.arange(len(labels))
    if config.validation_size and dataset.validation is None:
        rows, held_out = _divide(labels, num_held_out(config, len(labels)), "validation_size",
                                 dataset.groups)
    if config.train_size is not None and config.train_size != len(rows):
        rows = rows[_divide(labels[rows], config.train_size, "train_size")[1]]
    return rows, held_out


def num_held_out(config: RunConfig, num_images: int) -> int:
    """The number of images to hold out, which the configuration may give as a share."""
    size = config.validation_size
    return int(size) if size >= 1 else round(size * num_images)


def _divide(labels, size, name, groups=None):
    if size >= len(labels):
        raise InputError(f"Expected {name}={size} < {len(labels)}, the number of images.")
    return data.split_rows(labels, size, seed=SUBSET_SEED, groups=groups, name=name)


def num_train_of(config: RunConfig, dataset: Dataset) -> int:
    """The number of images that a run is trained on."""
    return len(rows_of(config, dataset)[0])


def class_weights_of(config: RunConfig, dataset: Dataset) -> tuple[float, ...] | None:
    """Returns the weight of each class in the softmax losses of a run; None for equal weights.

    Balanced weights are :math:`N / (C n_c)`, with :math:`n_c` of the N training images in class c,
    as in scikit-learn's ``class_weight="balanced"``: all classes weigh the same over an epoch.
    """
    if config.class_weights == "none":
        return None
    labels = dataset.train.labels[rows_of(config, dataset)[0]]
    counts = np.bincount(labels, minlength=len(dataset.class_names))
    # A class without images has no term.
    return tuple((len(labels) / (len(counts) * np.maximum(counts, 1))).tolist())


def method_of(config: RunConfig, class_weights: tuple[float, ...] | None) -> Method:
    """Makes the method of a run."""
    return make_method(
        config.method, robust=config.robust, stability_weight=config.stability_weight,
        one_pass=config.one_pass, class_weights=class_weights,
        label_smoothing=config.label_smoothing, perturb=training_perturbation(config),
        options=config.options)


def work_of(config: RunConfig) -> float:
    """The work of an update of a run, in units of one of ``normal``; sharpness-aware ones take
    two."""
    passes = method_of(config, None).passes
    return passes.relative * (2 if config.optimizer.sam_radius else 1)


def _optimizer(
    config: OptimizerConfig, learning_rate: optax.Schedule
) -> optax.GradientTransformation:
    shared = {"weight_decay": config.weight_decay, "clip_norm": config.clip_norm}
    if config.name == "adam":
        optimizer = training.adam(learning_rate, **shared)
    else:
        optimizer = training.sgd(learning_rate, momentum=config.momentum, **shared)
    return training.averaged(optimizer, decay=config.ema_decay) if config.ema_decay else optimizer


def program_of(configs: Sequence[RunConfig], dataset: Dataset, layout: Layout) -> Program:
    """Returns the program of runs that differ only in their seed and in swept settings."""
    config = configs[0]
    if not layout.divides(config.batch_size):
        raise InputError(f"Expected batch_size={config.batch_size} to be a multiple of the "
                         f"{layout.num_devices} devices it is split over.")
    if config.batch_norm == "per_device" and layout.form != "pmap":
        raise InputError(
            f"Expected parallel='pmap' with batch_norm='per_device', got {layout.form!r}.")
    num_train = num_train_of(config, dataset)
    if config.batch_norm == "per_device" and layout.num_devices in data.batch_sizes(
            num_train, config.batch_size):
        raise InputError(
            f"Expected batch_size={config.batch_size} with {num_train} training images to give "
            f"each of {layout.num_devices} devices two images or more with "
            "batch_norm='per_device': one has no variance.")
    stack_configs(configs)  # Raises if the runs differ in other settings.
    return _program(
        without_swept(config), model_of(config, dataset), num_train,
        class_weights_of(config, dataset), dataset.flip, layout, len(configs) > 1)


def program_to_replay(config: RunConfig, network: Network, facts: Mapping[str, Any]) -> Program:
    """Returns the program of a run on one device, without its data set, of which ``facts`` tell
    ``num_train``, ``class_weights`` and ``flip``."""
    weights = facts["class_weights"]
    return _program(
        without_swept(config), model_of(config, network), facts["num_train"],
        None if weights is None else tuple(weights), facts["flip"], make_layout("jit"), False)


def without_swept(config: RunConfig) -> RunConfig:
    """Sets the seed and all swept settings to 0: runs with the same result can be trained
    together."""
    return jax.tree.map(lambda _: 0.0, dataclasses.replace(config, seed=0))


def stack_configs(configs: Sequence[RunConfig]) -> RunConfig:
    """Stacks the configurations of runs into one with the seed 0.

    Its leaves, which :data:`jaxrobust.app.config.SWEPT` names, are [R] float32, or [] for one run.
    """
    if len({without_swept(config) for config in configs}) > 1:
        raise InputError("Expected runs that are trained together to differ in nothing but the "
                         f"seed, {', '.join(SWEPT)}.")
    return jax.tree.map(
        lambda *values: np.array(values if len(values) > 1 else values[0], np.float32),
        *(dataclasses.replace(config, seed=0) for config in configs))


@functools.lru_cache(maxsize=8)
def _program(config: RunConfig, model: nn.Module, num_train: int,
             class_weights: tuple[float, ...] | None, flip: bool, layout: Layout,
             together: bool) -> Program:
    steps_per_epoch = len(data.batch_sizes(num_train, config.batch_size))
    learning_rate = _learning_rate(config.optimizer, config.epochs, steps_per_epoch)
    optimizer = _optimizer(config.optimizer, learning_rate)
    makers: dict[str, Callable[..., data.Augmentation]] = {
        "crop": functools.partial(data.standard_augmentation, padding=config.crop_padding),
        "photo": data.photo_augmentation}
    augment = makers[config.augmentation](flip=flip)

    def batch_of(run, key, step, images, labels, positions):
        return data.make_batch(
            jax.random.fold_in(key, step), images, labels, positions=positions, augment=augment,
            perturb=training_perturbation(run), independent_views=run.independent_views)

    def update(axis_name, state, images, labels, positions, run):
        train_step = training.make_train_step(
            model, method_of(run, class_weights), optimizer, axis_name=axis_name,
            sync_batch_norm=run.batch_norm == "synchronised",
            constraint_weight=_constraint_weight(run, steps_per_epoch),
            sam_radius=run.optimizer.sam_radius, when_not_finite=run.when_not_finite)
        return train_step(state, batch_of(run, state.key, state.step, images, labels, positions))

    def passes(axis_name):
        def step(statistics, shared, rows):
            params, key, index, run = shared
            add = batch_statistics.make_pass_step(
                model, method_of(run, class_weights), axis_name=axis_name,
                sync_batch_norm=run.batch_norm == "synchronised")
            # Beyond the steps of any training, so that the random numbers differ.
            number = index + jnp.uint32(2**31)
            batch = batch_of(run, key, number, *rows)
            return add(statistics, params, batch, jax.random.fold_in(key, number)), ()

        return step

    def resident(num_steps, axis_name):
        def steps(state, shared, positions):
            images, labels, order, run = shared

            def one(state, _):
                first = state.step % steps_per_epoch * config.batch_size
                rows = order[first + positions]
                return update(axis_name, state, images[rows], labels[rows], positions, run)

            # On CPUs, convolutions are several times slower inside loops.
            if num_steps == 1:
                return _with_axis(one(state, None))
            return jax.lax.scan(one, state, length=num_steps,
                                unroll=jax.default_backend() == "cpu")

        return jax.vmap(steps, in_axes=(0, (None, None, 0, 0), None)) if together else steps

    def streamed(axis_name):
        def step(state, run, rows):
            images, labels, positions = rows
            return _with_axis(update(axis_name, state, images, labels, positions, run))

        return step

    def examine(state, run, rows):
        batch = batch_of(run, state.key, state.step, *rows)
        objective = training.make_objective(
            model, method_of(run, class_weights),
            constraint_weight=_constraint_weight(run, steps_per_epoch))
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        outputs = {view: model.apply(
            variables, getattr(batch, view), train=True, mutable=["batch_stats"],
            rngs={"dropout": jax.random.fold_in(state.key, state.step)})[0]
            for view in ("clean", "noisy")}
        gradients, _ = jax.grad(objective, has_aux=True)(state.params, state, batch)
        return batch, outputs, gradients

    compile_step = functools.partial(
        parallel.compile_step, layout, ynnpack=not isinstance(model, MobileNetV3))
    return Program(
        layout, model, learning_rate,
        resident=functools.cache(
            lambda num_steps: compile_step(functools.partial(resident, num_steps))),
        streamed=compile_step(streamed),
        order=_order_of(layout, num_train, together), passes=compile_step(passes),
        examine=jax.jit(examine))


@functools.lru_cache(maxsize=8)
def _order_of(layout: Layout, num_train: int, together: bool) -> Callable[..., jax.Array]:
    """Makes ``order`` of a :class:`Program`, once for all runs with as many images."""
    def order(key, epoch):
        return data.epoch_order(key, epoch, num_train)

    return parallel.compile(layout, jax.vmap(order, (0, None)) if together else order)


def _with_axis(state_and_metrics):
    """Adds the axis [T] of the updates in a call to the metrics."""
    state, metrics = state_and_metrics
    return state, jax.tree.map(lambda value: value[None], metrics)


def initial_state(
    config: RunConfig, dataset: Dataset | Network, layout: Layout
) -> TrainState:
    """Creates the state of one run before its first update, on the devices."""
    sample = jnp.zeros((1, *dataset.image_shape), jnp.float32)
    create = _state_of(model_of(config, dataset), config.optimizer)
    return parallel.replicate(layout, create(jax.random.key(config.seed), sample))


@functools.lru_cache(maxsize=8)
def _state_of(model: nn.Module, optimizer: OptimizerConfig) -> Callable[..., TrainState]:
    """Makes ``(key, images) -> state``, compiled once for all runs of a kind."""
    # The initial state of an optimiser does not depend on its schedule.
    transformation = _optimizer(optimizer, optax.schedules.constant_schedule(0.0))
    # Layer by layer, it would take longer than compiling the update.
    return jax.jit(functools.partial(training.create_train_state, model, transformation))


def start_from(
    path: str, state: TrainState, config: RunConfig, dataset: Dataset, layout: Layout
) -> tuple[TrainState, dict[str, Any]]:
    """Puts the weights of a PyTorch file into a first state; returns facts about them too.

    These are the file's SHA-256, and the layers that keep their random weights because the file has
    none of their shape.
    """
    loaded = pytorch.load_torch_weights(
        model_of(config, dataset), {"params": state.params, "batch_stats": state.batch_stats},
        pytorch.read_state_dict(path))
    digest = sha256_of(path)
    state = dataclasses.replace(state, **parallel.replicate(layout, loaded.variables))
    return state, {"init_from": {
        "path": str(path), "sha256": digest, "initialised_anew": list(loaded.replaced)}}


def sha256_of(path: str) -> str:
    """The SHA-256 of a file of weights.

    Raises:
      InputError: (a ValueError) if it cannot be read.
    """
    place = pathlib.Path(path).expanduser()
    with files.reading(place), place.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


STATISTICS_IMAGES = 2048
"""Maximum number of training images from which batch norm's statistics are recomputed, filled up
to whole batches. Wu & Johnson (2021) find a thousand sufficient."""


def recompute_statistics(
    program: Program, config: RunConfig, state: TrainState, split: Split
) -> TrainState:
    """Recomputes batch norm's statistics in the state of one run from its training images.

    Uses all of them, or :data:`STATISTICS_IMAGES` drawn at random, in batches of the training's
    size, augmented and perturbed as in training. The run's key alone determines the images and the
    random numbers: they are the same in all epochs, after a resumption, and on all devices. Without
    batch norm, returns the state unchanged.
    """
    if not jax.tree.leaves(state.batch_stats):
        return state
    size, layout = config.batch_size, program.layout
    # Epoch 0 is none of the training.
    order = data.host_epoch_order(state.key, len(split.labels))(0)
    count = -(-min(len(order), STATISTICS_IMAGES) // size)
    mine = layout.rows_of(size)
    positions = np.arange(size, dtype=np.int32)[mine]
    run = parallel.replicate(layout, stack_configs([config]))
    statistics = parallel.replicate(
        layout, batch_statistics.init_pass_statistics(jax.device_get(state.batch_stats)))
    # If the images do not fill whole batches, the first ones are used again.
    for index, rows in enumerate(np.resize(order, (count, size))):
        rows = rows[mine]
        shared = (state.params, state.key, parallel.replicate(layout, np.uint32(index)), run)
        batch = parallel.place_batch(
            layout, (split.images[rows], split.labels[rows], positions), size)
        # Only the first call waits: for the compilation, not for the computation.
        with contextlib.nullcontext() if index else compiling(
                f"the passes that batch norm's statistics of {config.model} come from"):
            statistics, _ = program.passes(statistics, shared, batch)
    return dataclasses.replace(state, batch_stats=_combine(layout)(statistics))


@functools.cache
def _combine(layout: Layout) -> Callable[..., Any]:
    return parallel.compile(layout, batch_statistics.combine_passes)


def stack_runs(states: Sequence[TrainState]) -> TrainState:
    """Stacks the states of several runs along a leading axis; leaves that of one run as it is."""
    if len(states) == 1:
        return states[0]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def unstack_runs(tree: Any, num_runs: int) -> list[Any]:
    """Undoes :func:`stack_runs`."""
    if num_runs == 1:
        return [tree]
    return [jax.tree.map(lambda leaf, run=run: leaf[run], tree) for run in range(num_runs)]
