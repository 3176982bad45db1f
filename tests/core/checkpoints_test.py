"""Checkpoints: what is saved comes back, and a broken one is passed over."""

import contextlib
import functools
import os
import pathlib
import shutil

import chex
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from jaxrobust import checkpoints, models, training
from jaxrobust._validate import InputError


@functools.cache
def make_state(step, impl=None):
    model = models.SmallCNN(num_classes=3, mean=(0.5,), std=(0.5,), num_features=4, width=2)
    state = jax.jit(lambda key: training.create_train_state(
        model, training.sgd(0.1), key, jnp.zeros((1, 8, 8, 1))))(jax.random.key(step, impl=impl))
    return state.replace(step=jnp.asarray(step, jnp.int32))


@pytest.fixture(name="manager")
def _manager(tmp_path):
    with contextlib.closing(checkpoints.open_checkpoints(tmp_path / "c", keep=2)) as manager:
        yield manager


def assert_same(one, other):
    chex.assert_trees_all_equal(
        one.replace(key=jax.random.key_data(one.key)),
        other.replace(key=jax.random.key_data(other.key)))


def test_the_newest_state_comes_back_to_the_bit(manager):
    for epoch in (1, 2, 3):
        checkpoints.save_checkpoint(manager, epoch, make_state(epoch))
    epoch, state, _ = checkpoints.restore_checkpoint(manager, make_state(9))
    assert epoch == 3
    assert_same(state, make_state(3))


def test_no_checkpoint_gives_none(manager):
    assert checkpoints.restore_checkpoint(manager, make_state(0)) is None


def break_checkpoint(manager, epoch):
    shutil.rmtree(manager.directory / str(epoch) / "default")


def damage(manager, step):
    """Flips a bit of the largest file, which holds the arrays."""
    folder = pathlib.Path(manager.directory) / str(step) / "default"
    path = max((path for path in folder.rglob("*") if path.is_file()),
               key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("broken", [break_checkpoint, damage])
def test_a_broken_newest_checkpoint_is_passed_over_and_named(broken, manager):
    for epoch in (1, 2):
        checkpoints.save_checkpoint(manager, epoch, make_state(epoch))
    broken(manager, 2)
    skipped = []
    epoch, state, _ = checkpoints.restore_checkpoint(manager, make_state(9), skipped=skipped)
    assert epoch == 1
    assert_same(state, make_state(1))
    assert len(skipped) == 1 and skipped[0].startswith("checkpoint 2 cannot be read")


def test_a_disk_without_room_is_an_error_before_anything_is_written(manager, monkeypatch):
    checkpoints.save_checkpoint(manager, 1, make_state(1))
    size = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(
        make_state(2).replace(key=jax.random.key_data(make_state(2).key)))) + 2**20
    for free, reason in ((size - 1, pytest.raises(OSError, match="No space left on device")),
                         (size, contextlib.nullcontext())):
        there = files_of(pathlib.Path(manager.directory))
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: shutil._ntuple_diskusage(
            2 * free, free, free))
        with reason:
            checkpoints.save_checkpoint(manager, 2, make_state(2))
        assert (files_of(pathlib.Path(manager.directory)) == there) == (free < size)


def files_of(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_rot_in_any_file_is_noticed_and_the_file_named(manager, tmp_path):
    for step in (1, 2):
        checkpoints.save_checkpoint(manager, step, make_state(step), {"epoch": step})
    rotten = {"flipped": flip, "missing": pathlib.Path.unlink,
              "truncated": lambda path: os.truncate(path, path.stat().st_size // 2)}
    paths = files_of(pathlib.Path(manager.directory) / "2")
    assert len(paths) > 5
    for place, path in enumerate(paths):
        copy = shutil.copytree(manager.directory, tmp_path / str(place))
        how = list(rotten)[place % 3]
        if path.name == "files.json" and how == "missing":
            how = "flipped"  # As where a kill came before it.
        rotten[how](copy / "2" / path)
        with contextlib.closing(checkpoints.open_checkpoints(copy, keep=2)) as opened:
            skipped = []
            found = checkpoints.restore_checkpoint(opened, make_state(9), skipped=skipped)
        assert found.step == 1, (path, how)
        # An empty file of zero bytes cannot be changed by half; a list of sums that is cut off is
        # no JSON, and says that.
        line, = skipped
        assert str(path) in line or path.name == "files.json", line


def test_another_kind_of_state_is_refused_with_the_difference(manager):
    checkpoints.save_checkpoint(manager, 1, make_state(1), {"epoch": 1})
    other = make_state(9)
    head = other.params["head"]
    wider = other.replace(params=other.params | {"head": {
        **head, "bias": jnp.zeros((5,)), "more": jnp.zeros((2, 3), jnp.int32)}})
    for refused in (lambda: checkpoints.restore_checkpoint(manager, wider),
                    lambda: checkpoints.save_checkpoint(manager, 1, wider)):
        with pytest.raises(InputError) as error:
            refused()
        said = str(error.value)
        assert "['bias'] float32[3], not float32[5]" in said
        assert "['more'] missing, not int32[2,3]" in said
    assert manager.all_steps() == [1]  # It is not set aside.


def test_a_later_format_is_refused(manager, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "FORMAT", 2)
        checkpoints.save_checkpoint(manager, 1, make_state(1))
    with pytest.raises(InputError, match="Expected a checkpoint of format 1 or lower in .*, found "
                                         "format 2 of jaxrobust "):
        checkpoints.restore_checkpoint(manager, make_state(9))


def test_if_all_are_broken_that_is_an_error_and_nothing_is_deleted(manager):
    for step in (1, 2):
        checkpoints.save_checkpoint(manager, step, make_state(step))
        break_checkpoint(manager, step)
    there = files_of(pathlib.Path(manager.directory))
    with pytest.raises(InputError, match=(
            "No checkpoint in .* can be read: checkpoint 2 cannot .*; checkpoint 1 cannot")):
        checkpoints.restore_checkpoint(manager, make_state(9))
    assert files_of(pathlib.Path(manager.directory)) == there


@pytest.mark.parametrize("broken", [break_checkpoint, damage])
def test_a_damaged_checkpoint_is_written_again_and_kept_aside(broken, manager):
    for step in (2, 4):
        checkpoints.save_checkpoint(manager, step, make_state(step))
    broken(manager, 4)
    # A lower step than the damaged one's, which Orbax would refuse, and then its own.
    for step in (3, 4):
        checkpoints.save_checkpoint(manager, step, make_state(step))
        found = checkpoints.restore_checkpoint(manager, make_state(9))
        assert found.step == step
        assert_same(found.state, make_state(step))
    assert sorted(manager.all_steps()) == [3, 4]
    assert [path.name for path in (manager.directory.parent / "c-damaged").iterdir()] == ["4"]


def test_a_good_checkpoint_is_neither_replaced_nor_passed_by(manager):
    for step in (2, 3):
        checkpoints.save_checkpoint(manager, step, make_state(step), {"epoch": step})
    checkpoints.save_checkpoint(manager, 3, make_state(7), {"epoch": 3})
    with pytest.raises(InputError, match="Expected step=1 above 2, that of a checkpoint"):
        checkpoints.save_checkpoint(manager, 1, make_state(1))
    found = checkpoints.restore_checkpoint(manager, make_state(9))
    assert_same(found.state, make_state(3))
    assert found.facts == {"epoch": 3}
    assert sorted(manager.all_steps()) == [2, 3]
    # The same updates, and more facts about them.
    checkpoints.save_checkpoint(manager, 3, make_state(7), {"epoch": 3, "validated": True})
    found = checkpoints.restore_checkpoint(manager, make_state(9))
    assert_same(found.state, make_state(7))
    assert sorted(manager.all_steps()) == [2, 3]
    checkpoints.remove_after(manager, 2)
    assert sorted(manager.all_steps()) == [2]


def test_what_a_kill_left_half_written_is_no_checkpoint(tmp_path):
    folder = tmp_path / "c"
    half = folder / "2.orbax-checkpoint-tmp" / "default"
    half.mkdir(parents=True)
    (half / "manifest.ocdbt").write_text("half")
    with contextlib.closing(checkpoints.open_checkpoints(folder, keep=2)) as manager:
        assert checkpoints.restore_checkpoint(manager, make_state(9)) is None
        checkpoints.save_checkpoint(manager, 2, make_state(2))
        assert_same(checkpoints.restore_checkpoint(manager, make_state(9)).state, make_state(2))


def test_facts_come_back_and_may_be_needed(manager):
    checkpoints.save_checkpoint(manager, 1, make_state(1), {"epoch": 1, "losses": [0.5, 1e-300]})
    checkpoints.save_checkpoint(manager, 2, make_state(2))
    assert checkpoints.restore_checkpoint(manager, make_state(9)).facts is None
    found = checkpoints.restore_checkpoint(manager, make_state(9), need_facts=True)
    assert (found.step, found.facts) == (1, {"epoch": 1, "losses": [0.5, 1e-300]})
    break_checkpoint(manager, 2)
    shutil.rmtree(manager.directory / "1" / "facts")
    (manager.directory / "1" / "files.json").unlink()  # As before there were facts.
    with pytest.raises(InputError, match="checkpoint 1 cannot be read: it was saved without"):
        checkpoints.restore_checkpoint(manager, make_state(9), need_facts=True)


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg", "threefry2x32"])
def test_keys_of_every_implementation_come_back(impl, manager):
    checkpoints.save_checkpoint(manager, 1, make_state(1, impl))
    state = checkpoints.restore_checkpoint(manager, make_state(9, impl)).state
    assert_same(state, make_state(1, impl))
    assert jax.random.key_impl(state.key) == jax.random.key_impl(make_state(1, impl).key)
    jax.random.normal(state.key)


def test_a_checkpoint_of_the_state_alone_is_read(tmp_path):
    """As earlier versions wrote them."""
    with contextlib.closing(ocp.CheckpointManager(tmp_path / "old")) as old:
        state = make_state(1)
        old.save(5, args=ocp.args.StandardSave(
            state.replace(key=jax.random.key_data(state.key))))
    with contextlib.closing(checkpoints.open_checkpoints(str(tmp_path / "old"), keep=1)) as again:
        found = checkpoints.restore_checkpoint(again, make_state(9))
    assert (found.step, found.facts) == (5, None)
    assert_same(found.state, state)
