"""A run killed at any moment, and resumed, ends with the bits of one that was never stopped."""

import contextlib
import dataclasses

import chex
import pytest
from command_line import metrics_of

from jaxrobust import checkpoints
from jaxrobust.app import config, files, program, run_folder, trainer
from jaxrobust.app.config import InputError
from jaxrobust.app.execution import Feed
from jaxrobust.app.recipe import RECIPES
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


def final(folder, digits):
    """All that the last checkpoint holds, but for the time."""
    state = program.initial_state(run_folder.read_config(folder), digits, make_layout("jit"))
    like = {"state": checkpoints.to_host(state), "best": checkpoints.to_host(state)}
    with contextlib.closing(
            checkpoints.open_checkpoints(folder / "checkpoints", keep=2)) as manager:
        found = checkpoints.restore_checkpoint(manager, like, need_facts=True)
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
    (3, Feed(checkpoint_steps=2, input="stream"), [2, 6, 10, 12]),
    *(pytest.param(*values, marks=pytest.mark.slow) for values in (
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
