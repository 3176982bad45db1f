"""A run killed at any moment, and resumed, ends with the bits of one that was never stopped."""

import contextlib
import dataclasses
import re
import resource
import shutil
import signal
import subprocess
import sys

import chex
import command_line
import pytest
import small_disks
from command_line import metrics_of, one_line

from jaxrobust import checkpoints
from jaxrobust.app import config, files, interruption, program, run_folder, trainer
from jaxrobust.app.config import InputError
from jaxrobust.app.execution import Feed
from jaxrobust.app.recipe import RECIPES
from jaxrobust.models import pytorch
from jaxrobust.parallel import make_layout

pytestmark = [pytest.mark.filterwarnings("default"),  # Orbax warns about itself.
              pytest.mark.usefixtures("steps_as_users_have_them")]

# 56 images in batches of 16: epochs of 4 updates, the last of 8 images.
EPOCHS, STEPS = 3, 4
TINY = dataclasses.replace(
    RECIPES["digits"].rows["robust"], train_size=56, epochs=EPOCHS, width=2, num_features=4,
    batch_size=16, batch_norm_statistics="recomputed", optimizer=config.OptimizerConfig(
        learning_rate=0.02, schedule="cosine", clip_norm=1.0))


class Killed(BaseException):
    """Stands for a kill: nothing handles it."""


@pytest.fixture(name="moments")
def _moments(monkeypatch):
    """The moments at which a run was killed: after each update, and before and after each
    checkpoint. At each it is killed once."""
    seen = []

    def kill(*moment):
        if moment not in seen:
            seen.append(moment)
            raise Killed

    def patch_calls(name):
        calls = getattr(trainer._Epochs, name)

        def calls_until_killed(self, state, epoch, first):
            update = (epoch - 1) * self.steps + first
            for call in calls(self, state, epoch, first):
                yield call
                update += call[-1]
                kill("update", update)

        monkeypatch.setattr(trainer._Epochs, name, calls_until_killed)

    patch_calls("_resident")
    patch_calls("_streamed")
    save = trainer._Running.save

    def save_until_killed(self, state, values):
        kill("before the checkpoint", int(state.step))
        save(self, state, values)
        kill("after the checkpoint", int(state.step))

    monkeypatch.setattr(trainer._Running, "save", save_until_killed)
    return seen


def train(config, digits, folder, feed):
    trainer.train(config, digits, folder, resume=True, tensorboard=False, feed=feed)


def train_through_kills(config, digits, folder, feed, kills=1000):
    for _ in range(kills):
        with contextlib.suppress(Killed):
            return train(config, digits, folder, feed)
    raise AssertionError("The run comes to no end.")


def last_checkpoint(folder, digits):
    state = program.initial_state(run_folder.read_config(folder), digits, make_layout("jit"))
    like = {"state": checkpoints.to_host(state), "best": checkpoints.to_host(state)}
    with contextlib.closing(
            checkpoints.open_checkpoints(folder / "checkpoints", keep=2)) as manager:
        return checkpoints.restore_checkpoint(manager, like, need_facts=True)


def final(folder, digits):
    """All that the last checkpoint holds, but for the time."""
    found = last_checkpoint(folder, digits)
    rows = [{name: value for name, value in row.items() if name != "seconds"}
            for row in found.facts["epochs"]]
    assert rows == metrics_of(folder) and found.facts["updates"] == {}
    return found.step, found.state, rows, files.read_json(folder / "done.json")


@pytest.fixture(name="whole", scope="module")
def _whole(tmp_path_factory, digits):
    """What a run ends with that was never stopped, by its epochs between checkpoints."""
    ends = {}
    for every in (2, 3):
        folder = tmp_path_factory.mktemp("whole") / "run"
        trainer.train(dataclasses.replace(TINY, checkpoint_every=every), digits, folder,
                       tensorboard=False)
        ends[every] = final(folder, digits)
    return ends


@pytest.mark.parametrize("every, feed, saved", [
    (2, Feed(checkpoint_steps=3), [3, 7, 8, 11, 12]),
    *(pytest.param(*values, marks=pytest.mark.slow) for values in (
        (3, Feed(checkpoint_steps=2, input="stream"), [2, 6, 10, 12]),
        (3, Feed(checkpoint_steps=1), [1, 2, 3, 5, 6, 7, 9, 10, 11, 12]),
        (3, Feed(checkpoint_steps=2, steps_per_call=2), [2, 6, 10, 12]),
        (2, Feed(checkpoint_steps=7), [8, 12])))])
def test_a_run_killed_at_every_moment_ends_with_the_same_bits(
        every, feed, saved, whole, digits, tmp_path, moments):
    folder = tmp_path / "run"
    train_through_kills(dataclasses.replace(TINY, checkpoint_every=every), digits, folder, feed)
    assert [step for when, step in moments if when == "after the checkpoint"] == saved
    if feed.steps_per_call is None:
        assert {step for _, step in moments} == set(range(1, EPOCHS * STEPS + 1))
    ended, expected = final(folder, digits), whole[every]
    assert ended[0] == expected[0] == EPOCHS * STEPS
    assert ended[2:] == expected[2:]
    chex.assert_trees_all_equal(ended[1], expected[1])


def newest(folder):
    return max(int(path.name) for path in (folder / "checkpoints").iterdir()
               if path.name.isdigit())


@pytest.mark.parametrize("source", ["resident", "stream"])
def test_a_signal_stops_a_run_after_the_update_in_progress(
        source, whole, digits, tmp_path, monkeypatch):
    due = {}  # By moment, the signal that comes then.

    def moment(*now):
        if now in due:
            signal.raise_signal(due.pop(now))

    calls = {"resident": trainer._Epochs._resident, "stream": trainer._Epochs._streamed}[source]

    def calls_with_signals(self, state, epoch, first):
        update = (epoch - 1) * self.steps + first
        for call in calls(self, state, epoch, first):
            update += 1
            moment("update", update)
            yield call

    monkeypatch.setattr(trainer._Epochs, calls.__name__, calls_with_signals)
    accuracy, append = trainer.accuracy, run_folder.append_epoch
    monkeypatch.setattr(trainer, "accuracy", lambda model, state, **options: (
        moment("validation", int(state.step)), accuracy(model, state, **options))[1])
    monkeypatch.setattr(run_folder, "append_epoch", lambda folder, row: (
        moment("log", row["epoch"]), append(folder, row)))
    folder, feed = tmp_path / "run", Feed(input=source)
    changed = dataclasses.replace(TINY, checkpoint_every=2)
    for now, number, saved in (
            (("update", 2), signal.SIGTERM, 2), (("log", 1), signal.SIGINT, 5),
            (("update", 8), signal.SIGINT, 8), (("validation", 8), signal.SIGTERM, 8),
            (("log", 2), signal.SIGTERM, 9), (("validation", 12), signal.SIGTERM, 12)):
        due[now] = number
        with pytest.raises(interruption.Interrupted) as stopped, interruption.handled():
            train(changed, digits, folder, feed)
        assert (stopped.value.signal, newest(folder), due) == (number, saved, {})
    with interruption.handled():
        train(changed, digits, folder, feed)
    ended, expected = final(folder, digits), whole[2]
    assert ended[2:] == expected[2:]
    chex.assert_trees_all_equal(ended[1], expected[1])


@pytest.mark.slow
@pytest.mark.parametrize("feed, due", [
    (Feed(), [(4, "0"), (4, "1"), (8, "0"), (8, "1"), (12, "0")]),
    # Run 0 has saved updates 3 and 4, run 2 none, and that it has diverged is not yet written.
    (Feed(checkpoint_steps=3), [(4, "0")]),
    # The first checkpoint is due after update 1, and comes after the call, with update 2.
    (Feed(checkpoint_steps=1, steps_per_call=2), [(2, "0"), (4, "0"), (4, "1"), (12, "0")])])
def test_runs_of_one_program_killed_apart_end_with_the_same_bits(
        feed, due, digits, tmp_path, monkeypatch):
    runs = [TINY, dataclasses.replace(TINY, seed=1),
            config.with_settings(TINY, {"robust.lam": 3e38, "robust.alpha": 3e38})]
    runs = [dataclasses.replace(run, checkpoint_every=1) for run in runs]

    def places(name):
        return [tmp_path / name / str(number) for number in range(3)]

    message, = trainer.train_together(
        runs, digits, places("whole"), tensorboard=False,
        feed=dataclasses.replace(feed, checkpoint_steps=None))
    assert message.startswith(f"Update 1 of {tmp_path / 'whole' / '2'} (epoch 1, batch 1 of 4)")
    due = list(due)
    save = trainer._Running.save

    def save_until_killed(self, state, values):
        save(self, state, values)
        if (int(state.step), self.folder.name) in due:
            due.remove((int(state.step), self.folder.name))
            raise Killed

    monkeypatch.setattr(trainer._Running, "save", save_until_killed)
    for _ in range(len(due) + 1):
        with contextlib.suppress(Killed):
            trainer.train_together(
                runs, digits, places("killed"), tensorboard=False, resume=True, feed=feed)
    assert not due
    for whole, killed in list(zip(places("whole"), places("killed"), strict=True))[:2]:
        ended, expected = final(killed, digits), final(whole, digits)
        assert ended[2:] == expected[2:]
        chex.assert_trees_all_equal(ended[1], expected[1])
    assert files.read_json(places("killed")[2] / "diverged.json")["epoch"] == 1


@contextlib.contextmanager
def at_most(size):
    """Within, no file can be written beyond a size: what is written to the limit stays."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_ends_a_run_in_one_line_and_keeps_what_is_saved(
        whole, digits, tmp_path, monkeypatch):
    folder, due = tmp_path / "run", []
    log = folder / "metrics.jsonl"

    def limit(owner, name, size_at, moment_of):
        call = getattr(owner, name)

        def limited(*arguments):
            if due and due[0] == moment_of(*arguments):
                due.pop()
                with at_most(size_at()):
                    return call(*arguments)
            return call(*arguments)

        monkeypatch.setattr(owner, name, limited)

    limit(trainer.Events, "add", lambda: 20, lambda self, epoch, _: ("tensorboard", epoch))
    limit(run_folder, "append_epoch", lambda: log.stat().st_size + 9,
          lambda _, row: ("metrics.jsonl", row["epoch"]))
    limit(trainer._Running, "save", lambda: 99,
          lambda self, state, _: ("checkpoints", int(state.step)))
    changed = dataclasses.replace(TINY, checkpoint_every=2)
    for moment, last in (
            (("tensorboard", 1), 0), (("metrics.jsonl", 1), 0), (("checkpoints", 8), 0),
            (("metrics.jsonl", 3), 8), (("checkpoints", 12), 8)):
        due.append(moment)
        with pytest.raises(InputError) as full:
            trainer.train(changed, digits, folder, resume=True)
        assert str(full.value) == f"Cannot write {folder / moment[0]}: File too large."
        assert run_folder.has_checkpoint(folder) == bool(last) and not due
        if last:
            assert newest(folder) == last
        # What is half written is not read.
        assert [row["epoch"] for row in run_folder.read_epochs(folder)] == list(
            range(1, len(metrics_of(folder)) + 1))
    trainer.train(changed, digits, folder, resume=True)
    assert final(folder, digits)[2:] == whole[2][2:]
    chex.assert_trees_all_equal(final(folder, digits)[1], whole[2][1])


SMALL_DISK = """
mount -t tmpfs -o size=$2 tmpfs "$1"
"${@:4}" 2> "$3/errors" && echo 0 > "$3/status" || echo $? > "$3/status"
cp -a "$1/run" "$3/full"
mount -o remount,size=99m "$1"
"${@:4}"
cp -a "$1/run" "$3/resumed"
"""
"""Trains on a disk of a size, which is then made larger; copies what the run's folder holds."""


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [8, 16, 1180, 1280])
def test_a_small_disk_that_fills_up_ends_a_run_in_one_line_and_loses_nothing(
        kilobytes, digits, tmp_path):
    disk, whole = tmp_path / "disk", tmp_path / "whole"
    train = [sys.executable, "-m", "experiments", "train", "digits/robust", "--train-size", "56",
             "--epochs", "4", "--width", "2", "--num-features", "4", "--batch-size", "16",
             "--checkpoint-every", "1", "--resume", "--out"]
    small_disks.run(SMALL_DISK, disk, f"{kilobytes}k", tmp_path, *train, disk / "run")
    assert re.fullmatch(rf"error: Cannot write {disk}/run\S*: No space left on device\.\n",
                        (tmp_path / "errors").read_text())
    assert (tmp_path / "status").read_text() == "2\n"
    assert not run_folder.is_trained(tmp_path / "full")
    if run_folder.has_checkpoint(tmp_path / "full"):
        assert last_checkpoint(tmp_path / "full", digits).step < 16
    subprocess.run([*train, whole], cwd=small_disks.ROOT, check=True)
    ended, expected = (final(folder, digits) for folder in (tmp_path / "resumed", whole))
    assert ended[0] == expected[0] == 16 and ended[2:] == expected[2:]
    chex.assert_trees_all_equal(ended[1], expected[1])


def test_a_folder_removed_in_mid_run_ends_it_in_one_line(digits, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    changed = dataclasses.replace(TINY, checkpoint_every=1)
    save = trainer._Running.save

    def save_and_remove(self, state, values):
        save(self, state, values)
        if int(state.step) == 4:
            shutil.rmtree(folder)

    monkeypatch.setattr(trainer._Running, "save", save_and_remove)
    for feed in (Feed(), Feed(checkpoint_steps=2)):
        with pytest.raises(InputError, match=f"^Cannot write {folder}: it was removed"):
            trainer.train(changed, digits, folder, tensorboard=False, feed=feed)
        assert not folder.exists()


def test_a_run_whose_provenance_is_removed_in_mid_run_comes_to_its_end(
        digits, tmp_path, monkeypatch):
    save = trainer._Running.save

    def save_and_remove(self, state, values):
        save(self, state, values)
        (tmp_path / "run" / "provenance.json").unlink()

    monkeypatch.setattr(trainer._Running, "save", save_and_remove)
    trainer.train(dataclasses.replace(TINY, epochs=1, checkpoint_every=1), digits,
                  tmp_path / "run", tensorboard=False)
    assert run_folder.is_done(tmp_path / "run")
    assert run_folder.read_facts(tmp_path / "run", "provenance")["input"] == "resident"


def test_a_run_begins_again_from_the_weights_with_which_it_began_or_not_at_all(
        digits, tmp_path, monkeypatch, capsys):
    folder, weights, layout = tmp_path / "run", tmp_path / "it.safetensors", make_layout("jit")
    changed = dataclasses.replace(TINY, model="resnet18", init_from=str(weights))

    def write(seed):
        state = program.initial_state(dataclasses.replace(changed, seed=seed), digits, layout)
        pytorch.write_state_dict(weights, pytorch.to_torch_state_dict(
            program.model_of(changed, digits), trainer.variables_of(state)))
        return trainer.variables_of(state)

    def killed(group, *_):
        begun.append(trainer.variables_of(group[0].state))
        raise Killed

    begun, first = [], write(seed=1)
    monkeypatch.setattr(trainer, "_train_group", killed)
    for _ in range(2):
        with pytest.raises(Killed):
            trainer.train(changed, digits, folder, resume=True, tensorboard=False)
        chex.assert_trees_all_equal(begun.pop(), first)
    write(seed=2)
    expected = f"Expected the weights in {weights} with which {folder} began, of SHA-256 "
    with pytest.raises(InputError, match=expected):
        trainer.train(changed, digits, folder, resume=True, tensorboard=False)
    run_folder.write_facts(folder, "diverged", {"epoch": 1})
    capsys.readouterr()
    for command in ("rerun", "sharpness"):
        assert command_line.call(command, folder) == 2
        assert expected in one_line(capsys)
    weights.unlink()
    assert command_line.call("rerun", folder) == 2
    assert one_line(capsys) == f"error: Cannot read {weights}: No such file or directory."
    assert [folder] == list(tmp_path.iterdir()) and not begun


def killed_at(moment, config, digits, folder, feed, moments):
    """A run killed at one moment, in its folder."""
    with pytest.raises(Killed):
        for _ in range(1000):
            try:
                train(config, digits, folder, feed)
            except Killed:
                if moments[-1] == moment:
                    raise


def damage(folder, step):
    path = max((path for path in (folder / str(step)).rglob("*") if path.is_file()),
               key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_named_kept_aside_and_made_anew(
        whole, digits, tmp_path, moments, capsys):
    folder, feed = tmp_path / "run", Feed(checkpoint_steps=3)
    changed = dataclasses.replace(TINY, checkpoint_every=2)
    killed_at(("after the checkpoint", 11), changed, digits, folder, feed, moments)
    damage(folder / "checkpoints", 11)
    capsys.readouterr()
    killed_at(("update", 12), changed, digits, folder, feed, moments)
    assert f"{folder}: checkpoint 11 cannot be read: " in capsys.readouterr().out
    assert [path.name for path in (folder / "checkpoints-damaged").iterdir()] == ["11"]
    train_through_kills(changed, digits, folder, feed)
    chex.assert_trees_all_equal(final(folder, digits), whole[2])


def test_a_run_with_checkpoints_of_another_kind_is_not_trained_again(digits, tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints" / "latest").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"epoch": 1}\n')
    with pytest.raises(InputError, match="named by a number of updates, found 'latest'"):
        trainer.train(TINY, digits, folder, resume=True)
    assert metrics_of(folder) == [{"epoch": 1}]


@pytest.mark.parametrize("best", [2, EPOCHS])
def test_a_finished_run_with_a_damaged_checkpoint_is_not_another_one(
        best, digits, tmp_path, capsys, monkeypatch):
    run = dataclasses.replace(TINY, checkpoint_every=1)
    folder = tmp_path / "run"
    accuracies = iter([0.9 if epoch == best else 0.1 for epoch in range(1, EPOCHS + 1)])
    monkeypatch.setattr(trainer, "accuracy", lambda *_, **__: next(accuracies))
    trainer.train(run, digits, folder, tensorboard=False)
    expected = trainer.load_run(folder, run, digits)
    damage(folder / "checkpoints", EPOCHS * STEPS)
    if best == EPOCHS:  # The one before knows of another best epoch.
        with pytest.raises(InputError, match=f"Expected a checkpoint of epoch {EPOCHS}, the best"):
            trainer.load_run(folder, run, digits)
    else:
        found = trainer.load_run(folder, run, digits)
        assert found.epoch == expected.epoch == best
        chex.assert_trees_all_equal(found.state.params, expected.state.params)
        assert f"checkpoint {EPOCHS * STEPS} cannot be read" in capsys.readouterr().out
