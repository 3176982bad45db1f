"""Trains runs and loads trained ones."""

import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust import _validate, checkpoints, data, evaluation, parallel, training
from jaxrobust.app import files, interruption, provenance, replay, run_folder
from jaxrobust.app.config import InputError, RunConfig
from jaxrobust.app.datasets import check_files, fingerprint, save_files
from jaxrobust.app.events import Events
from jaxrobust.app.execution import Feed
from jaxrobust.app.network import (
    Network,
    check_network,
    network_of,
    read_network,
    save_network,
)
from jaxrobust.app.program import (
    Program,
    initial_state,
    model_of,
    program_of,
    recompute_statistics,
    rows_of,
    sha256_of,
    stack_configs,
    stack_runs,
    start_from,
    unstack_runs,
)
from jaxrobust.app.progress import compiling, progress
from jaxrobust.data import Dataset, Split
from jaxrobust.images import FeaturesFn, LogitsFn
from jaxrobust.parallel import Layout, make_layout
from jaxrobust.training import TrainState, with_averaged_parameters


class Splits(NamedTuple):
    """The images that a run is trained on, and those that choose its epoch (None: the last)."""

    train: Split
    selection: Split | None


def make_splits(dataset: Dataset, config: RunConfig) -> Splits:
    """Divides a data set as the configuration says."""
    rows, held_out = rows_of(config, dataset)
    train = dataset.train
    if len(rows) < len(train.labels):
        train = data.take_rows(train, rows)
    if config.batch_size > len(rows):
        raise InputError(f"Expected batch_size={config.batch_size} <= {len(rows)}, "
                         "the number of training images.")
    validation = dataset.validation
    if held_out is not None:
        validation = data.take_rows(dataset.train, held_out)
    selection = {"validation": validation, "test": dataset.test, "last": None}[config.select]
    return Splits(train, selection)


def train(config: RunConfig, dataset: Dataset, folder: pathlib.Path, **options: Any) -> None:
    """Trains one run as :func:`train_together` does, with its options."""
    failures = train_together([config], dataset, [folder], **options)
    if failures:
        raise InputError(failures[0])


def train_together(
    configs: Sequence[RunConfig], dataset: Dataset, folders: Sequence[pathlib.Path], *,
    resume: bool = False, tensorboard: bool = True, label: str = "train",
    layout: Layout | None = None, feed: Feed = Feed(),
) -> list[str]:
    """Trains runs, each in its folder, several of them as one vmapped program.

    They may differ only in the seed and :data:`config.SWEPT`. Each has the same result, up to
    rounding, and the same files as if it were trained alone; see :mod:`jaxrobust.app.run_folder`.
    Leaves finished and diverged runs as they are. Resumes other runs from their latest checkpoint,
    with the same result as if they had never stopped.

    The step of a checkpoint is the number of updates done. It holds all that a run needs to resume:
    the state, the state of the best epoch so far, the log of the epochs done, and the metrics of
    the updates of the unfinished epoch. ``metrics.jsonl`` follows from it.

    Locks the folders meanwhile. If a signal asks this process, or another of the job, to stop,
    saves a checkpoint after the update in progress, and raises
    :class:`~jaxrobust.app.interruption.Interrupted`.

    Returns a line for each run with an update that is not finite; its checkpoints remain, and the
    update is kept for :mod:`jaxrobust.app.replay`.
    """
    layout = make_layout("jit") if layout is None else layout
    for folder in folders:
        _refuse_begun(folder, resume)
        if not run_folder.is_trained(folder):
            run_folder.check_checkpoints(folder)
        check_network(dataset, folder)
        check_files(dataset, folder)
    splits = make_splits(dataset, configs[0])
    program_of(configs, dataset, layout)  # Raises before anything is written.
    feed = feed.resolve(layout, splits.train, len(configs))
    by_folder = dict(zip(folders, configs, strict=True))
    left = [folder for folder in folders if not run_folder.is_trained(folder)]
    with contextlib.ExitStack() as stack:
        there = [folder for folder in left if run_folder.is_run(folder)]
        for folder in there:
            stack.enter_context(run_folder.locked(folder))
        with compiling(f"the initial state of {configs[0].model}"):
            first = {folder: _first_state(by_folder[folder], folder, dataset, layout)
                     for folder in left}
        data_facts = {"data_sha256": fingerprint(dataset)} if left else {}
        first = {folder: (state, facts | data_facts) for folder, (state, facts) in first.items()}
        for folder, config in by_folder.items():
            run_folder.claim_run(folder, config)
        for folder in left:
            if folder not in there:
                stack.enter_context(run_folder.locked(folder))
                _refuse_begun(folder, resume)  # Another command may have come and gone.
        failures = run_folder.divergences(folders)
        for folder in folders:
            save_network(dataset, folder)
            save_files(dataset, folder)
        batches = data.batch_sizes(len(splits.train.labels), configs[0].batch_size)
        if left:
            _say_what_to_expect(configs[0], model_of(configs[0], dataset),
                                len(splits.train.labels), batches)
        for members in _begun_together(folders):
            group = [
                stack.enter_context(contextlib.closing(_Running(
                    by_folder[folder], folder, *first.pop(folder), len(batches))))
                if folder in first else _Absent(by_folder[folder])
                for folder in members]
            running = [one for one in group if isinstance(one, _Running)]
            _align(running, feed)
            for one in running:
                one.begin([folder.name for folder in members], tensorboard)
            # Runs that could not be aligned are trained one update's after another's, in the same
            # program: in a smaller one the last bits would differ.
            steps = [one.step if isinstance(one, _Running) else None for one in group]
            for step in sorted(set(steps) - {None}):
                failures += _train_group(
                    [one if at == step else _Absent(one.config)
                     for one, at in zip(group, steps, strict=True)],
                    dataset, splits, layout, feed, label)
    return failures


def _refuse_begun(folder: pathlib.Path, resume: bool) -> None:
    if run_folder.is_begun(folder) and not resume:
        raise InputError(f"{folder} already holds a run. Add --resume to resume it.")


def _begun_together(folders: Sequence[pathlib.Path]) -> list[list[pathlib.Path]]:
    """Groups the runs into programs, and leaves out those of which no run is left to train.

    Runs begun as one program stay in one, and so do those of them that have ended: in another
    program the last bits would differ. Runs not yet begun make another one.
    """
    begun = {folder: tuple(facts.get("together", (folder.name,))) for folder in folders
             if (facts := run_folder.read_facts(folder, "provenance"))}

    def program_with(folder):
        named = (names for names in begun.values() if folder.name in names)
        return begun.get(folder) or next(named, None)

    groups: dict[tuple[str, ...] | None, list[pathlib.Path]] = {}
    for folder in folders:
        groups.setdefault(program_with(folder), []).append(folder)
    return [group for group in groups.values()
            if not all(run_folder.is_trained(folder) for folder in group)]


def _align(group: Sequence["_Running"], feed: Feed) -> None:
    """Takes runs of one program, which a kill may leave at different updates, back to the latest
    that all of them have saved; leaves them where they are if there is none."""
    while len({running.step for running in group}) > 1:
        common = set.intersection(*(running.saved_steps(feed) for running in group))
        if not common:
            return
        for running in group:
            running.rewind(max(common))


LAG = 0.01
"""Share of the initial values in batch norm's running statistics above which a note warns."""


def _say_what_to_expect(config: RunConfig, model: nn.Module, num_train: int,
                        batches: Sequence[int]) -> None:
    """Notes an image that is left out, and running statistics that will lag behind."""
    if sum(batches) < num_train:
        files.say(f"Note: each epoch leaves out one of the {num_train} training images, a "
                  "different one each time: it would be a last batch of one image.")
    updates = config.epochs * len(batches)
    left = model.batch_norm_momentum**updates
    if config.batch_norm_statistics == "running" and left > LAG:
        files.say(f"Note: after {updates} updates batch norm's running statistics still contain "
                  f"{left:.0%} of their initial values, and tests may be far worse than training. "
                  "Use --batch-norm-statistics recomputed to avoid this.")


def _first_state(config, folder, dataset, layout):
    """The state before the first update, and facts about it for the provenance."""
    state = initial_state(config, dataset, layout)
    # A run with a checkpoint no longer needs its file of initial weights.
    if config.init_from is None or run_folder.has_checkpoint(folder):
        return state, {}
    check_weights(config, folder)
    state, facts = start_from(config.init_from, state, config, dataset, layout)
    layers = ", ".join(facts["init_from"]["initialised_anew"])
    if layers:
        files.say(f"{config.init_from} has no matching weights for {layers}, which start from "
                  "random values.")
    return state, facts


def check_weights(config: RunConfig, folder: pathlib.Path) -> None:
    """Checks that the file of a run's initial weights is that with which it began, if it has.

    Raises:
      InputError: (a ValueError) if it is another one, or cannot be read.
    """
    began = (run_folder.read_facts(folder, "provenance") or {}).get("init_from")
    if config.init_from is None or began is None:
        return
    found = sha256_of(config.init_from)
    if found != began["sha256"]:
        raise InputError(
            f"Expected the weights in {config.init_from} with which {folder} began, of SHA-256 "
            f"{began['sha256']}, found others, of {found}.")


class _Absent(NamedTuple):
    """A run that has ended, or is at another update, whose place in a program stays taken."""

    config: RunConfig


class _Running:
    """A run in training and its files."""

    def __init__(self, config, folder, state, facts, steps_per_epoch):
        self.config, self.folder = config, folder
        self._initial, self._facts, self._steps = state, facts, steps_per_epoch
        self._checkpoints = checkpoints.open_checkpoints(
            run_folder.checkpoints_path(folder), keep=2)
        self._events = None
        self._restore()

    @property
    def step(self) -> int:
        """The number of updates done."""
        return int(self.state.step)

    def _restore(self):
        """Restores the newest checkpoint that can be read; without one, the initial state."""
        # The initial state, until there is a best epoch.
        self.state, self._best = self._initial, checkpoints.to_host(self._initial)
        self._history: list[dict] = []
        self.before: dict[str, Any] = {}
        skipped: list[str] = []
        found = checkpoints.restore_checkpoint(
            self._checkpoints, {"state": self.state, "best": self._best}, skipped=skipped,
            need_facts=True)
        for line in skipped:
            files.say(f"{self.folder}: {line}")
        if found is not None:
            self.state, self._best = found.state["state"], found.state["best"]
            self._history = found.facts["epochs"]
            self.before = {name: np.array(values)
                           for name, values in found.facts["updates"].items()}
        done = len(self._history)
        if self.step != done * self._steps + _updates_in(self.before):
            raise InputError(
                f"Expected {done} epochs of {self._steps} updates, and "
                f"{_updates_in(self.before)} of the next, in {self.folder}, found {self.step} in "
                "all. It was trained on other images, or by another version.")

    def saved_steps(self, feed) -> set[int]:
        """The updates up to now that it can be taken back to: its checkpoints, and its beginning
        if the newest one is no later than the first that was due."""
        saved = {step for step in self._checkpoints.all_steps() if step <= self.step}
        due = self._steps * self.config.checkpoint_every
        if feed.checkpoint_steps and feed.checkpoint_steps < self._steps:
            # After the call in which it is due.
            due = feed.checkpoint_steps + feed.steps_per_call - 1
        # A run with a checkpoint was begun here without its file of initial weights.
        early = self.step <= due and (self.step == 0 or self.config.init_from is None)
        return saved | ({0} if early else set())

    def rewind(self, step):
        """Goes back to a checkpoint, or to the beginning, and removes those after it."""
        if self.step > step:
            checkpoints.remove_after(self._checkpoints, step)
            self._restore()

    def begin(self, together, tensorboard):
        """Makes the files agree with the state that training starts from."""
        del self._initial
        # Epochs logged after the checkpoint are trained again.
        files.barrier("history")
        run_folder.write_epochs(self.folder, self._history)
        if self.step == 0:
            run_folder.write_facts(self.folder, "provenance", {
                **provenance.describe(), **self._facts, "together": together})
        if tensorboard and files.is_writer():
            self._events = Events(
                run_folder.events_path(self.folder), first_step=len(self._history) + 1)

    def save(self, state, values):
        """Saves a state, with the metrics of the updates done in the current epoch."""
        run_folder.require_there(self.folder)
        with files.writing(run_folder.checkpoints_path(self.folder)):
            checkpoints.save_checkpoint(
                self._checkpoints, int(state.step), {"state": state, "best": self._best},
                {"epochs": self._history,
                 "updates": {name: value.tolist() for name, value in values.items()}})

    def record(self, row, state, ready, selection_accuracy):
        """Logs an epoch and, if a checkpoint is due, validates and saves the state.

        ``ready(state)`` is the state to evaluate; ``selection_accuracy(ready state)``, if not None,
        the accuracy that chooses the epoch. A signal interrupts the validation.
        """
        epoch = row["epoch"]
        checkpoint = epoch % self.config.checkpoint_every == 0 or epoch == self.config.epochs
        if checkpoint:
            # Several processes compute together, and agree to stop after the next update.
            with interruption.released() if jax.process_count() == 1 else contextlib.nullcontext():
                evaluated = ready(state)
                if selection_accuracy is not None:
                    row["selection_accuracy"] = selection_accuracy(evaluated)
            # The last update, which was finite, may have had a result that is not.
            _validate.finite("state", (state.params, state.batch_stats, state.opt_state,
                                       variables_of(evaluated)))
        run_folder.require_there(self.folder)
        run_folder.append_epoch(self.folder, row)
        if self._events is not None:
            self._events.add(epoch, row)
        self._history.append(row)
        if checkpoint:
            if is_best(self._history):
                self._best = checkpoints.to_host(evaluated)
            self.save(state, {})

    def finish(self, how):
        """Records that the run is finished, and how it was trained."""
        run_folder.write_facts(self.folder, "provenance", {
            **(run_folder.read_facts(self.folder, "provenance") or {}), **how,
            "seconds": sum(row["seconds"] for row in self._history)})
        run_folder.write_facts(self.folder, "done", {
            "epochs": self.config.epochs, "best_epoch": best_epoch(self._history)})

    def close(self):
        """Closes the files."""
        self._checkpoints.close()
        if self._events is not None:
            self._events.close()


def _updates_in(metrics) -> int:
    """The number T of updates in metrics [T]; 0 if there are none."""
    return len(next(iter(metrics.values()), ()))


def _train_group(group, dataset, splits, layout, feed, label):
    """Trains runs that are at the same update, with a place for those that are absent; returns a
    line for each that diverges."""
    configs = [one.config for one in group]
    program = program_of(configs, dataset, layout)
    run = parallel.replicate(layout, stack_configs(configs))
    running = {index: one for index, one in enumerate(group) if isinstance(one, _Running)}
    some, *_ = running.values()
    begun = some.step
    # Any state fills the place of a run that is absent.
    state = stack_runs([running.get(index, some).state for index in range(len(group))])
    before = [running.get(index, some).before for index in range(len(group))]
    failures: list[str] = []
    stop = _Stop(layout)
    select = None if splits.selection is None else functools.partial(
        accuracy, program.model, split=splits.selection, layout=layout)

    def save(state, values, indices=None):
        states = unstack_runs(state, len(group))
        for index in list(running) if indices is None else indices:
            if _stopped_at(running[index].config, values[index]) is None:
                running[index].save(states[index], values[index])

    def end_epoch(epoch, state, values, seconds):
        """Logs, validates and saves an epoch of the runs with values."""
        states = unstack_runs(state, len(group))
        left = [index for index in running if values[index]]
        for place, index in enumerate(left):
            one, update = running[index], _stopped_at(running[index].config, values[index])
            row = epochs.row(one.config, epoch, values[index], seconds)
            ready = functools.partial(_as_evaluated, program, one.config, split=splits.train)
            try:
                if update is None:
                    wrong = _record(one, row, states[index], ready, select)
                else:
                    wrong = replay.keep(
                        one.folder, dataset, splits.train, states[index],
                        {name: value[update] for name, value in values[index].items()},
                        replay.Place(epoch, update, epochs.steps), one.config, layout)
            except interruption.Interrupted:
                # The epoch's updates are done; resuming begins with its validation.
                save(state, values, left[place:])
                raise
            if wrong is not None:
                failures.append(f"{wrong}: the run has diverged. Lower the learning rate or set a "
                                "clip norm.")
                run_folder.write_facts(one.folder, "diverged", {
                    "epoch": epoch, "message": failures[-1]})
                del running[index]
            elif place == 0:
                shown.show(**_shown(row))

    with contextlib.closing(_Epochs(program, configs[0], splits.train, feed, run)) as epochs, \
            progress(label, configs[0].epochs * epochs.steps, done=begun) as shown, \
            interruption.held():
        first, within = divmod(begun, epochs.steps)
        if not within:
            if any(before):
                end_epoch(first, state, before, 0.0)
            before = [{} for _ in group]
        for epoch in range(first + 1, configs[0].epochs + 1):
            if not running:
                break
            state, values, seconds = epochs.train(state, epoch, before, save, shown, stop)
            before = [{} for _ in group]
            end_epoch(epoch, state, values, seconds)
    how = {"parallel": layout.form, "devices": layout.num_devices,
           "processes": jax.process_count(), "runs_together": len(group),
           "input": feed.input, "steps_per_call": feed.steps_per_call}
    for one in running.values():
        one.finish(how)
    stop.check()
    return failures


class _Stop:
    """Whether a process of the job was asked to stop: the same in all of them at the same call."""

    def __init__(self, layout):
        self._layout, self._largest = layout, parallel.compile(layout, jnp.max)
        self._latest = None

    def asked(self) -> int | None:
        """The number of a signal, or None. In a job of several processes the answer is that of the
        call before, for which nothing has to wait."""
        mine = interruption.asked()
        if jax.process_count() == 1:
            return mine
        size = self._layout.num_devices
        rows = self._layout.rows_of(size)
        known, self._latest = self._latest, self._largest(parallel.place_batch(
            self._layout, np.full(rows.stop - rows.start, mine or 0, np.int32), size))
        return None if known is None else int(known) or None

    def check(self) -> None:
        """Raises Interrupted if a process was asked to stop, without waiting for another call."""
        self.asked()
        number = self.asked()
        if number is not None:
            raise interruption.Interrupted(number)


def _stopped_at(config, values) -> int | None:
    """The first update of an epoch's metrics [T] that stops the training; None if none does.

    Where such updates are skipped, it is the first one of an epoch that skips all.
    """
    wrong = values[training.FINITE] == 0
    stops = wrong.any() if config.when_not_finite == "stop" else wrong.all()
    return int(np.argmax(wrong)) if stops else None


def _record(running, row, state, ready, selection_accuracy) -> str | None:
    """Logs an epoch, or says what in it is not finite."""
    if row.get(SKIPPED):
        files.say(f"Note: epoch {row['epoch']} of {running.folder} skipped {row[SKIPPED]} updates "
                  "that were not finite.")
    try:
        running.record(row, state, ready, selection_accuracy)
    except _validate.NotFiniteError as error:  # The last update made the state infinite.
        reason = str(error).removesuffix(".")
        return f"The validation of {running.folder} fails in epoch {row['epoch']}: {reason}"
    return None


def _as_evaluated(
    program: Program, config: RunConfig, state: TrainState, split: Split
) -> TrainState:
    """The training state as validation and all later commands use it."""
    if config.optimizer.ema_decay:
        state = with_averaged_parameters(state)
    if config.batch_norm_statistics == "running":
        return state
    return recompute_statistics(program, config, state, split)


SKIPPED = "skipped"
"""The number of updates of an epoch that were skipped, in the log of runs that may skip some."""


class _Epochs:
    """Passes over the training images."""

    def __init__(self, program, config, split, feed, run):
        self._program, self._config, self._split, self._feed = program, config, split, feed
        self._run, self._stream = run, None
        self._compiled = set()
        self._batches = data.batch_sizes(len(split.labels), config.batch_size)
        self.steps = len(self._batches)
        if feed.input == "resident":
            self._images, self._labels = parallel.replicate(
                program.layout, (split.images[:], split.labels))
            self._positions = {
                size: self._place(self._positions_of(size), size) for size in set(self._batches)}

    def _positions_of(self, size):
        """Positions of this process's rows in a batch of ``size`` images."""
        return np.arange(size, dtype=np.int32)[self._program.layout.rows_of(size)]

    def _place(self, rows, size):
        return parallel.place_batch(self._program.layout, rows, size)

    def train(self, state, epoch, before, save, shown, stop):
        """Trains one epoch, or the rest of it; returns the new state, each run's metrics [T] of all
        T updates of the epoch, and the seconds taken.

        ``before`` has for each run the metrics of the updates that are already done.
        ``save(state, metrics so far)`` is called for each checkpoint within the epoch, and where
        ``stop`` asks for an end, before Interrupted is raised. Ends the epoch where every run has
        stopped at an update that is not finite.
        """
        start = time.monotonic()
        done = _updates_in(before[0])
        calls = self._resident if self._feed.input == "resident" else self._streamed
        every = self._feed.checkpoint_steps or self.steps
        collected, last = _Collected(before, self.steps), {}
        for number, (after, metrics, num_steps) in enumerate(calls(state, epoch, done)):
            state, done = after, done + num_steps
            collected.add(metrics)
            # All updates after the one that stops a run are not finite either.
            if self._config.when_not_finite == "stop" and collected.latest and not np.any(
                    collected.latest[training.FINITE]):
                break
            if number and number % 20 == 0:
                last = _shown(_means({
                    name: values[0] for name, values in collected.latest.items()}))
            shown.advance(num_steps, **last)
            if done < self.steps:
                asked = stop.asked()
                if asked or done // every > (done - num_steps) // every:
                    save(state, collected.by_run())
                if asked:
                    raise interruption.Interrupted(asked)
        return state, collected.by_run(), time.monotonic() - start

    def row(self, config, epoch, values, seconds):
        """The line of the log for an epoch."""
        step = epoch * self.steps
        skipped = int(np.sum(values[training.FINITE] == 0))
        return {"epoch": epoch, "step": step,
                "learning_rate": float(self._program.learning_rate(jnp.float32(step - 1))),
                **_means(values),
                **({SKIPPED: skipped} if config.when_not_finite == "skip" else {}),
                "seconds": seconds}

    def _call(self, num_steps, size, step, *arguments):
        """Calls a step; the first call with these numbers compiles it."""
        if (num_steps, size) in self._compiled:
            return step(*arguments)
        self._compiled.add((num_steps, size))
        with compiling(f"the training step of {self._config.model} for batches of {size}"):
            return step(*arguments)

    def _resident(self, state, epoch, first):
        """Makes the calls of an epoch from update ``first`` on, with images on the devices."""
        order = self._program.order(state.key, epoch)
        shared = (self._images, self._labels, order, self._run)
        for num_steps, size in data.group_batches(
                self._batches[first:], self._feed.steps_per_call):
            state, metrics = self._call(
                num_steps, size, self._program.resident(num_steps), state, shared,
                self._positions[size])
            yield state, metrics, num_steps

    def _streamed(self, state, epoch, first):
        """Makes the calls of an epoch with images that are read ahead, also for the next epoch."""
        if self._stream is None:
            self._stream = data.stream_batches(
                self._split, state.key, batch_size=self._config.batch_size,
                start=(epoch - 1) * self.steps + first, stop=self._config.epochs * self.steps,
                rows_of=self._program.layout.rows_of)
        for size in self._batches[first:]:
            images, labels = next(self._stream)
            rows = (images, labels, self._positions_of(size))
            state, metrics = self._call(
                1, size, self._program.streamed, state, self._run, self._place(rows, size))
            yield state, metrics, 1

    def close(self):
        """Stops reading images."""
        if self._stream is not None:
            self._stream.close()


class _Collected:
    """The metrics of each run in the updates of an epoch so far.

    They are on the host: arrays on the device for every update would take two hundred times the
    memory, gigabytes in an epoch of 100,000 updates.
    """

    def __init__(self, before, steps):
        self._done, self._shape = _updates_in(before[0]), (len(before), steps)
        self._values = {name: self._empty() for name in before[0]}
        for name, values in self._values.items():
            values[:, :self._done] = [old[name] for old in before]
        self._pending = None
        self.latest: dict[str, np.ndarray] = {}
        """The metrics [R, T] of the last call that has ended."""

    def _empty(self):
        return np.full(self._shape, np.nan)

    def add(self, metrics):
        """Adds the metrics of a call that the devices work on; waits for the one before."""
        self._fetch()
        self._pending = metrics

    def by_run(self) -> list[dict[str, np.ndarray]]:
        """The metrics [T] of each run in all T updates so far."""
        self._fetch()
        return [{name: values[run, :self._done] for name, values in self._values.items()}
                for run in range(self._shape[0])]

    def _fetch(self):
        if self._pending is None:
            return
        fetched, self._pending = jax.device_get(self._pending), None
        self.latest = {name: value.reshape(self._shape[0], -1) for name, value in fetched.items()}
        first = self._done
        self._done += self.latest[training.FINITE].shape[1]
        for name, value in self.latest.items():
            self._values.setdefault(name, self._empty())[:, first:self._done] = value


def _means(metrics) -> dict[str, float]:
    """The means over the updates that are finite."""
    finite = metrics[training.FINITE] != 0
    return {name: float(values[finite].mean()) if finite.any() else np.nan
            for name, values in metrics.items()
            if name not in (training.FINITE, *training.NOT_FINITE)}


def _shown(metrics) -> dict[str, float]:
    """The metrics that the progress bar shows."""
    names = {"loss": "loss", "accuracy_clean": "accuracy", "accuracy_noisy": "noisy accuracy",
             "accuracy_attacked": "attacked accuracy",
             "selection_accuracy": "held-out accuracy"}
    return {shown: float(metrics[name]) for name, shown in names.items() if name in metrics}


def variables_of(state: TrainState) -> dict[str, Any]:
    """The variables of a state for ``model.apply``."""
    return {"params": state.params, "batch_stats": state.batch_stats}


def accuracy(model: nn.Module, state: TrainState, split: Split, layout: Layout) -> float:
    """Computes the accuracy, as a fraction, on a split's unperturbed images."""
    correct, = evaluation.evaluate(
        model, variables_of(state), split.images, split.labels, key=state.key, layout=layout)
    return float(correct.mean())


def best_epoch(history: list[dict]) -> int:
    """The epoch with the best selection accuracy, the later of equal ones; else the last."""
    validated = [row for row in history if "selection_accuracy" in row]
    if not validated:
        return history[-1]["epoch"]
    return max(validated, key=lambda row: (row["selection_accuracy"], row["epoch"]))["epoch"]


def is_best(history: list[dict]) -> bool:
    """Whether the last epoch so far is the best."""
    return best_epoch(history) == history[-1]["epoch"]


class TrainedRun(NamedTuple):
    """A run as the other commands use it."""

    config: RunConfig
    network: Network
    dataset: Dataset | None  # None where only the network is used
    model: nn.Module
    state: TrainState | None  # the best; None where it is not loaded
    epoch: int | None
    layout: Layout

    @property
    def logits_fn(self) -> LogitsFn:
        """Returns logits [B, C] of images [B, H, W, channels] in [0, 1]."""
        return evaluation.logits_fn_of(self.model, variables_of(self.state))

    @property
    def features_fn(self) -> FeaturesFn:
        """Returns features [B, d] of images [B, H, W, channels] in [0, 1]."""
        return evaluation.features_fn_of(self.model, variables_of(self.state))

    @property
    def splits(self) -> Splits:
        """The images that it was trained on, and those that chose its epoch."""
        return make_splits(self.dataset, self.config)


def open_run(
    folder: pathlib.Path, config: RunConfig, dataset: Dataset | None, layout: Layout | None = None
) -> TrainedRun:
    """Opens a run, finished or not, without its state, with the arguments of :func:`load_run`."""
    if dataset is not None:
        check_network(dataset, folder)
        check_files(dataset, folder)
    network = read_network(folder) if dataset is None else network_of(dataset)
    if network is None:
        raise InputError(f"Expected a run in {folder}, found no network.json there.")
    layout = make_layout("jit") if layout is None else layout
    return TrainedRun(config, network, dataset, model_of(config, network), None, None, layout)


def load_run(
    folder: pathlib.Path, config: RunConfig, dataset: Dataset | None, layout: Layout | None = None
) -> TrainedRun:
    """Loads the best state of a finished run onto the devices of a layout, one by default.

    Without a data set, the network can be used, but not tested.
    """
    if not run_folder.is_done(folder):
        raise InputError(f"Expected a finished run in {folder}. Finish its training with --resume.")
    run = open_run(folder, config, dataset, layout)
    epoch = run_folder.read_facts(folder, "done")["best_epoch"]
    like = initial_state(config, run.network, run.layout)
    state = _best_state(folder, epoch, like, run.layout)
    _validate.finite(f"weights of {folder}, epoch {epoch}", variables_of(state))
    return run._replace(state=state, epoch=epoch)


_WEIGHTS = ("params", "batch_stats", "centroids")
"""The parts of a state that a network is used by; the others are for training."""


def write_weights(run: TrainedRun, path: pathlib.Path) -> None:
    """Writes the weights, batch norm's statistics and the centroids of a run as NumPy arrays.

    As ``network.npz`` in a copy of the run's folder, they stand in for its checkpoints.
    """
    files.write_arrays(path, _named_weights(run.state))


def _named_weights(state: TrainState) -> dict[str, Any]:
    """The leaves by their paths, such as "params/head/kernel"."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(_weights_of(state))}


def _weights_of(state: TrainState) -> dict[str, Any]:
    return {name: getattr(state, name) for name in _WEIGHTS}


def _read_weights(path: pathlib.Path, like: TrainState, layout: Layout) -> TrainState:
    """Reads what :func:`write_weights` wrote into a state; the rest of it stays as it is."""
    arrays, expected = files.read_arrays(path), _named_weights(like)
    differ = [name for name in dict.fromkeys([*expected, *arrays])
              if name not in arrays or name not in expected
              or (arrays[name].shape, arrays[name].dtype)
              != (expected[name].shape, expected[name].dtype)]
    if differ:
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise InputError(f"Expected the weights of the network in config.json in {path}, found "
                         f"others: {', '.join(differ[:3])}{more}.")
    weights = jax.tree.unflatten(
        jax.tree.structure(_weights_of(like)), [arrays[name] for name in expected])
    return dataclasses.replace(like, **parallel.replicate(layout, weights))


def _best_state(folder: pathlib.Path, epoch: int, like: TrainState, layout: Layout) -> TrainState:
    """Restores the state of a finished run's best epoch."""
    place = run_folder.checkpoints_path(folder)
    if not place.is_dir():
        weights = run_folder.weights_path(folder)
        if weights.is_file():
            return _read_weights(weights, like, layout)
        raise InputError(f"Expected checkpoints in {place}, found no such folder.")
    skipped: list[str] = []
    with contextlib.closing(checkpoints.open_checkpoints(place, keep=2)) as manager:
        found = checkpoints.restore_checkpoint(
            manager, {"state": like, "best": like}, skipped=skipped, need_facts=True)
    if found is None:
        raise InputError(f"Expected a checkpoint in {place}, found none.")
    best = best_epoch(found.facts["epochs"])
    if best != epoch:
        reasons = "".join(f" {line}." for line in skipped)
        raise InputError(f"Expected a checkpoint of epoch {epoch}, the best one, in {place}, found "
                         f"one of epoch {best}.{reasons}")
    for line in skipped:
        files.say(f"{folder}: {line}")
    return found.state["best"]
