"""Checkpoints: what is saved comes back, and a broken one is passed over."""

import contextlib
import shutil

import chex
import jax
import jax.numpy as jnp
import pytest

from jaxrobust import checkpoints, models, training
from jaxrobust._validate import InputError


def make_state(step):
    model = models.SmallCNN(num_classes=3, mean=(0.5,), std=(0.5,), num_features=4, width=2)
    optimizer = training.sgd(0.1)
    state = training.create_train_state(
        model, optimizer, jax.random.key(step), jnp.zeros((1, 8, 8, 1)))
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
    epoch, state = checkpoints.restore_checkpoint(manager, make_state(9))
    assert epoch == 3
    assert_same(state, make_state(3))


def test_the_latest_few_are_kept(manager):
    for epoch in (1, 2, 3):
        checkpoints.save_checkpoint(manager, epoch, make_state(epoch))
    assert sorted(manager.all_steps()) == [2, 3]


def test_no_checkpoint_gives_none(manager):
    assert checkpoints.restore_checkpoint(manager, make_state(0)) is None


def break_checkpoint(manager, epoch):
    shutil.rmtree(manager.directory / str(epoch) / "default")


def test_a_broken_newest_checkpoint_is_passed_over_and_named(manager):
    for epoch in (1, 2):
        checkpoints.save_checkpoint(manager, epoch, make_state(epoch))
    break_checkpoint(manager, 2)
    skipped = []
    epoch, state = checkpoints.restore_checkpoint(manager, make_state(9), skipped=skipped)
    assert epoch == 1
    assert_same(state, make_state(1))
    assert len(skipped) == 1 and skipped[0].startswith("checkpoint 2 cannot be read")


def test_if_all_are_broken_that_is_an_error(manager):
    checkpoints.save_checkpoint(manager, 1, make_state(1))
    break_checkpoint(manager, 1)
    with pytest.raises(InputError, match="No checkpoint in .* can be read"):
        checkpoints.restore_checkpoint(manager, make_state(9))
