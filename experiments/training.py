"""Trains one run, from its configuration to its best checkpoint."""

import contextlib
import dataclasses
import functools
import json
import pathlib
import time
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import runs
from experiments.config import InputError, OptimizerConfig, RunConfig
from experiments.progress import progress
from jaxrobust import checkpoints, data, evaluation, perturbations, training
from jaxrobust.data import Dataset, Split
from jaxrobust.methods import make_method
from jaxrobust.models import create_model
from jaxrobust.training import TrainState

SUBSET_SEED = 0
"""Of the choice of training and validation images: the same for all runs."""


class Diverged(InputError):
    """A training whose loss is no longer finite."""


class Splits(NamedTuple):
    """The images a run is trained on, and those that choose its epoch (None: the last)."""

    train: Split
    selection: Split | None


def make_splits(dataset: Dataset, config: RunConfig) -> Splits:
    """Divides the training split as the configuration says.

    Raises:
      InputError: (a ValueError) if there are fewer images than it asks for.
    """
    rest, validation = dataset.train, None
    if config.validation_size:
        rest, validation = _take(rest, config.validation_size, "validation_size")
    if config.train_size is not None and config.train_size != len(rest.labels):
        rest = _take(rest, config.train_size, "train_size")[1]
    if config.batch_size > len(rest.labels):
        raise InputError(f"Expected batch_size={config.batch_size} <= {len(rest.labels)}, "
                         "the number of training images.")
    selection = {"validation": validation, "test": dataset.test, "last": None}[config.select]
    return Splits(rest, selection)


def _take(split: Split, count: int, name: str) -> tuple[Split, Split]:
    if count >= len(split.labels):
        raise InputError(f"Expected {name}={count} < {len(split.labels)}, the images there are.")
    return data.split_off(split, count, seed=SUBSET_SEED)


def model_of(config: RunConfig, dataset: Dataset) -> nn.Module:
    """The model of a run."""
    return create_model(
        config.model, num_classes=len(dataset.class_names), num_features=config.num_features,
        width=config.width, mean=dataset.mean, std=dataset.std)


def learning_rate_schedule(
    config: OptimizerConfig, *, epochs: int, steps_per_epoch: int
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


def constraint_schedule(config: RunConfig, steps_per_epoch: int) -> optax.Schedule:
    """The weight, by step, of the terms beside the softmax loss."""
    steps = round(config.constraint_warmup_epochs * steps_per_epoch)
    if steps == 0:
        return optax.schedules.constant_schedule(1.0)
    return optax.schedules.linear_schedule(0.0, 1.0, steps)


class Program(NamedTuple):
    """What a run executes, compiled once for all seeds."""

    model: nn.Module
    optimizer: optax.GradientTransformation
    update: Any  # (state, images, labels, indices) -> (state, metrics), jitted, state donated
    learning_rate: optax.Schedule


@functools.lru_cache(maxsize=8)
def _program(config: RunConfig, model: nn.Module, steps_per_epoch: int, flip: bool) -> Program:
    optimizer_config = config.optimizer
    learning_rate = learning_rate_schedule(
        optimizer_config, epochs=config.epochs, steps_per_epoch=steps_per_epoch)
    optimizer = training.sgd(
        learning_rate, momentum=optimizer_config.momentum,
        weight_decay=optimizer_config.weight_decay, clip_norm=optimizer_config.clip_norm)
    method = make_method(
        config.method, robust=config.robust, stability_weight=config.stability_weight,
        one_pass=config.one_pass)
    train_step = training.make_train_step(
        model, method, optimizer, constraint_weight=constraint_schedule(config, steps_per_epoch))
    augment = data.standard_augmentation(padding=config.crop_padding, flip=flip)
    noise = perturbations.gaussian(config.noise_std)

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state, images, labels, indices):
        batch = data.make_batch(
            jax.random.fold_in(state.key, state.step), images[indices], labels[indices],
            augment=augment, perturb=noise, independent_views=config.independent_views)
        return train_step(state, batch)

    return Program(model, optimizer, update, learning_rate)


def program_of(config: RunConfig, dataset: Dataset, num_train: int) -> Program:
    """The compiled parts of a run; runs that differ in their seed alone share them."""
    steps_per_epoch = -(-num_train // config.batch_size)
    return _program(dataclasses.replace(config, seed=0), model_of(config, dataset),
                    steps_per_epoch, dataset.flip)


def initial_state(program: Program, config: RunConfig, dataset: Dataset) -> TrainState:
    """The state before the first step."""
    sample = jnp.zeros((1, *dataset.train.images.shape[1:]), jnp.float32)
    return training.create_train_state(
        program.model, program.optimizer, jax.random.key(config.seed), sample)


def train(
    config: RunConfig, dataset: Dataset, folder: pathlib.Path, *, resume: bool = False,
    tensorboard: bool = True, label: str = "train",
) -> None:
    """Trains a run in its folder, to the end.

    Writes ``config.json``, ``provenance.json``, ``metrics.jsonl`` (a line an epoch),
    ``checkpoints/latest`` (two), ``checkpoints/best`` (one) and, last, ``done.json``. A run
    that is done is left as it is; one that is not goes on from its latest checkpoint, to the
    same result as if it had never stopped.

    Args:
      config: of the run.
      dataset: named by the configuration.
      folder: of the run.
      resume: whether a run begun before may go on.
      tensorboard: whether to write event files for TensorBoard too.
      label: of the progress bar.

    Raises:
      InputError: (a ValueError) if the folder holds another run, or a begun one without
        ``resume``.
      Diverged: (an InputError) if the loss is no longer finite. The checkpoints stay.
    """
    if (folder / "metrics.jsonl").is_file() and not resume:
        raise InputError(f"{folder} holds a run already. Add --resume to go on with it.")
    splits = make_splits(dataset, config)
    runs.claim_run(folder, config)
    if (folder / "done.json").is_file():
        return
    program = program_of(config, dataset, len(splits.train.labels))
    latest = checkpoints.open_checkpoints(folder / "checkpoints" / "latest", keep=2)
    best = checkpoints.open_checkpoints(folder / "checkpoints" / "best", keep=1)
    with contextlib.closing(latest), contextlib.closing(best):
        done, begun = _begin_or_resume(folder, latest, initial_state(program, config, dataset))
        history = runs.read_lines(folder / "metrics.jsonl")
        with _metrics_writer(folder, tensorboard=tensorboard, done=done) as write:
            for state, row in _epochs(program, config, splits.train, begun, done, label):
                epoch = row["epoch"]
                if not np.isfinite(row["loss"]):
                    raise Diverged(
                        f"The loss of {folder} is {row['loss']} in epoch {epoch}: the run has "
                        "diverged. Lower the learning rate or set a clip norm.")
                checkpoint = epoch % config.checkpoint_every == 0 or epoch == config.epochs
                if checkpoint and splits.selection is not None:
                    row["selection_accuracy"] = accuracy(program.model, state, splits.selection)
                write(row)
                history.append(row)
                if checkpoint:
                    if is_best(history):
                        checkpoints.save_checkpoint(best, epoch, state)
                    checkpoints.save_checkpoint(latest, epoch, state)
    runs.write_json(folder / "provenance.json", {
        **runs.read_json(folder / "provenance.json"),
        "seconds": sum(row["seconds"] for row in history)})
    runs.write_json(folder / "done.json", {
        "epochs": config.epochs, "best_epoch": best_epoch(history)})


def _begin_or_resume(folder, latest, state):
    """The epochs done and the state after them; what was logged of later ones is dropped."""
    skipped: list[str] = []
    restored = checkpoints.restore_checkpoint(latest, state, skipped=skipped)
    for line in skipped:
        print(f"{folder}: {line}", flush=True)
    done, state = (0, state) if restored is None else restored
    kept = [row for row in runs.read_lines(folder / "metrics.jsonl") if row["epoch"] <= done]
    runs.write_text(
        folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
    if done == 0:
        runs.write_json(folder / "provenance.json", runs.provenance())
    return done, state


@contextlib.contextmanager
def _metrics_writer(folder, *, tensorboard, done):
    """A function that adds an epoch's row to ``metrics.jsonl`` and to TensorBoard's events."""
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open(folder / "metrics.jsonl", "a"))
        events = None
        if tensorboard:
            events = stack.enter_context(_event_writer(folder, purge_step=done + 1))

        def write(row):
            log.write(json.dumps(row) + "\n")
            log.flush()
            if events is not None:
                for name, value in row.items():
                    events.add_scalar(name, value, row["epoch"])

        yield write


def _epochs(program, config, split, state, done, label):
    """Trains the epochs after ``done``, yielding the state and the metrics after each."""
    images, labels = jnp.asarray(split.images), jnp.asarray(split.labels)
    steps_per_epoch = -(-len(split.labels) // config.batch_size)
    with progress(label, config.epochs * steps_per_epoch, done=done * steps_per_epoch) as shown:
        for epoch in range(done + 1, config.epochs + 1):
            state, row = _train_epoch(state, program, config, epoch, images, labels, shown)
            yield state, row
            shown.show(**_shown(row))


def _train_epoch(state, program, config, epoch, images, labels, shown):
    """One pass over the training images: the new state and the epoch's mean metrics."""
    start = time.monotonic()
    order = data.epoch_order(state.key, epoch, labels.shape[0])
    collected = []
    for indices in data.epoch_indices(order, config.batch_size):
        state, metrics = program.update(state, images, labels, indices)
        collected.append(metrics)
        # Reading a metric waits for its step: not at every step.
        values = _shown(jax.device_get(metrics)) if len(collected) % 20 == 0 else {}
        shown.advance(**values)
    collected = jax.device_get(collected)
    step = int(state.step)
    row = {"epoch": epoch, "step": step,
           "learning_rate": float(program.learning_rate(jnp.float32(step - 1))),
           **{name: float(np.mean([metrics[name] for metrics in collected]))
              for name in collected[0]},
           "seconds": time.monotonic() - start}
    return state, row


def _shown(metrics) -> dict[str, float]:
    """What the progress bar shows of a step's or an epoch's metrics."""
    names = {"loss": "loss", "accuracy_clean": "accuracy", "accuracy_noisy": "noisy accuracy",
             "selection_accuracy": "held-out accuracy"}
    return {shown: float(metrics[name]) for name, shown in names.items() if name in metrics}


def _event_writer(folder: pathlib.Path, *, purge_step: int):
    try:
        import tensorboardX
    except ImportError as error:
        raise InputError(
            f"TensorBoard event files need tensorboardX ({error}). Install it with: "
            "pip install 'jaxrobust[experiments]', or add --no-tensorboard.") from error
    return tensorboardX.SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)


def variables_of(state: TrainState) -> dict[str, Any]:
    """A state's parameters and batch statistics, as Flax takes them."""
    return {"params": state.params, "batch_stats": state.batch_stats}


def accuracy(model: nn.Module, state: TrainState, split: Split) -> float:
    """The share of a split's images, as they are, that are classified correctly."""
    correct, = evaluation.evaluate(
        model, variables_of(state), split.images, split.labels, key=state.key)
    return float(correct.mean())


def best_epoch(history: list[dict]) -> int:
    """The epoch with the best selection accuracy, the later of equals; else the last."""
    validated = [row for row in history if "selection_accuracy" in row]
    if not validated:
        return history[-1]["epoch"]
    return max(validated, key=lambda row: (row["selection_accuracy"], row["epoch"]))["epoch"]


def is_best(history: list[dict]) -> bool:
    """Whether the last epoch so far is the one to keep."""
    return best_epoch(history) == history[-1]["epoch"]


class TrainedRun(NamedTuple):
    """A finished run, as the other commands need it."""

    config: RunConfig
    dataset: Dataset
    model: nn.Module
    state: TrainState
    epoch: int


def load_run(folder: pathlib.Path, config: RunConfig, dataset: Dataset) -> TrainedRun:
    """The best state of a finished run.

    Raises:
      InputError: (a ValueError) if the run is not finished.
    """
    if not (folder / "done.json").is_file():
        raise InputError(f"Expected a finished run in {folder}. Train it, with --resume.")
    program = program_of(config, dataset, len(make_splits(dataset, config).train.labels))
    state = initial_state(program, config, dataset)
    with contextlib.closing(
        checkpoints.open_checkpoints(folder / "checkpoints" / "best", keep=1)) as best:
        restored = checkpoints.restore_checkpoint(best, state)
    if restored is None:
        raise InputError(f"Expected a checkpoint in {folder / 'checkpoints' / 'best'}.")
    return TrainedRun(config, dataset, program.model, restored[1], restored[0])
