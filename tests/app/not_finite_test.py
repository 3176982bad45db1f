"""Training stops at an update that is not finite, or skips it, and keeps what replays it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import call, metrics_of, one_line

from jaxrobust import data
from jaxrobust.app import config, files, program, trainer
from jaxrobust.app.config import InputError
from jaxrobust.app.execution import Feed
from jaxrobust.app.recipe import RECIPES
from jaxrobust.data import Split
from jaxrobust.parallel import make_layout

pytestmark = pytest.mark.filterwarnings("default")  # Orbax warns about itself.

# 40 images in batches of 8: epochs of 5 updates.
TINY = dataclasses.replace(
    RECIPES["digits"].rows["robust"], train_size=40, validation_size=0, select="last", epochs=3,
    width=2, num_features=4, batch_size=8, batch_norm_statistics="running",
    optimizer=config.OptimizerConfig(learning_rate=0.01, clip_norm=1.0))
POISON = 28
"""The number of the image whose noisy version is NaN."""


@pytest.fixture(name="spoilt")
def _spoilt(digits, monkeypatch):
    """The digits, one of which is white all over and has a noisy version of NaN."""
    rows, _ = program.rows_of(TINY, digits)
    images = digits.train.images.copy()
    images[rows[POISON]] = 255
    as_it_is = data.make_batch

    def make_batch(key, images, *arguments, **options):
        batch = as_it_is(key, images, *arguments, **options)
        white = (images == 255).all(axis=(1, 2, 3))
        return batch._replace(noisy=jnp.where(
            white[:, None, None, None], jnp.nan, batch.noisy))

    monkeypatch.setattr(data, "make_batch", make_batch)
    program._program.cache_clear()
    yield dataclasses.replace(digits, train=Split(images, digits.train.labels)), rows[POISON]
    program._program.cache_clear()


WAYS = {
    "step by step": ("jit", 1, Feed()),
    "several steps a call": ("jit", 1, Feed(steps_per_call=2)),
    "pmap": ("pmap", 2, Feed()),
    "streamed": ("jit", 1, Feed(input="stream", checkpoint_steps=1)),
    "mesh, several steps a call": ("mesh", 2, Feed(steps_per_call=5)),
}


@pytest.mark.parametrize("way", [
    pytest.param(way, marks=[] if way in ("several steps a call", "pmap") else [pytest.mark.slow])
    for way in WAYS])
def test_a_run_stops_at_the_update_with_the_image_that_spoils_it(way, spoilt, tmp_path):
    dataset, image = spoilt
    form, devices, feed = WAYS[way]
    folder = tmp_path / "run"
    with pytest.raises(InputError) as raised:
        trainer.train(TINY, dataset, folder, tensorboard=False, feed=feed,
                      layout=make_layout(form, jax.devices()[:devices]))
    facts = files.read_json(folder / "not_finite.json")
    update = facts["update"]
    order = data.host_epoch_order(
        program.initial_state(TINY, dataset, make_layout("jit")).key, 40)(1)
    assert update == 1 + np.flatnonzero(order == POISON)[0] // 8
    assert (facts["epoch"], facts["batch"], facts["steps"]) == (1, update - 1, 5)
    assert image in facts["images"] and len(facts["images"]) == 8
    assert facts["first"] == "not_finite_features"
    assert f"Update {update} of {folder} (epoch 1, batch {update} of 5)" in str(raised.value)
    assert "first the features of 16 views of images" in str(raised.value)
    arrays = np.load(folder / "not_finite.npz")
    np.testing.assert_array_equal(arrays["images"], dataset.train.images[facts["images"]])
    np.testing.assert_array_equal(arrays["labels"], dataset.train.labels[facts["images"]])
    assert arrays["state.step"] == update - 1
    assert all(np.isfinite(arrays[name]).all() for name in arrays if "params" in name)
    assert metrics_of(folder) == [] and not (folder / "done.json").exists()
    assert files.read_json(folder / "diverged.json")["epoch"] == 1


def test_a_replay_recomputes_the_update_and_names_the_image(spoilt, tmp_path, capsys):
    dataset, image = spoilt
    folder = tmp_path / "run"
    with pytest.raises(InputError):
        trainer.train(TINY, dataset, folder, tensorboard=False)
    assert call("replay", folder) == 0
    said = capsys.readouterr().out
    facts = files.read_json(folder / "not_finite.json")
    assert "First that is not finite: not_finite_features, and now not_finite_features." in said
    for name, value in facts["metrics"].items():
        if name != "finite":
            row, = (line.split() for line in said.splitlines() if line.split()[:1] == [name])
            assert row[1] == row[2] == f"{float(value):.6g}", name
    assert ", ".join(map(str, facts["images"])) in said
    # Batch norm spreads the NaN over the noisy images; the clean ones have none.
    assert "Features or logits of noisy images that are not finite" in said
    assert "Features or logits of clean images" not in said
    assert str(image) in said


def test_a_run_that_skips_goes_on_without_that_update_and_counts_it(spoilt, tmp_path, capsys):
    dataset, _ = spoilt
    skipping = dataclasses.replace(TINY, when_not_finite="skip")
    trainer.train(skipping, dataset, tmp_path / "run", tensorboard=False)
    rows = metrics_of(tmp_path / "run")
    assert [row["skipped"] for row in rows] == [1, 1, 1] and [row["step"] for row in rows] == [
        5, 10, 15]
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    assert "epoch 2 of" in (said := capsys.readouterr().out)
    assert "skipped 1 updates that were not finite" in said
    state = trainer.load_run(tmp_path / "run", skipping, dataset).state
    assert int(state.step) == 15


def test_a_run_that_skips_a_whole_epoch_stops(digits, tmp_path):
    wild = config.with_settings(TINY, {
        "robust.lam": 3e38, "robust.alpha": 3e38, "when_not_finite": "skip"})
    with pytest.raises(InputError, match=r"Update 1 of .* is not finite, first the norm of the "
                                         r"gradient, inf\."):
        trainer.train(wild, digits, tmp_path / "run", tensorboard=False)


@pytest.mark.slow
def test_a_run_that_stops_leaves_those_beside_it_alone(spoilt, digits, tmp_path):
    # Their seeds differ, and so the updates at which they meet the image: neither ends the other's.
    dataset, _ = spoilt
    both = [dataclasses.replace(TINY, seed=seed) for seed in (0, 1)]
    folders = [tmp_path / "0", tmp_path / "1"]
    messages = trainer.train_together(
        both, dataset, folders, tensorboard=False, feed=Feed(steps_per_call=5))
    assert len(messages) == 2
    for one, folder, message in zip(both, folders, messages, strict=True):
        order = data.host_epoch_order(
            program.initial_state(one, dataset, make_layout("jit")).key, 40)(1)
        update = 1 + np.flatnonzero(order == POISON)[0] // 8
        assert files.read_json(folder / "not_finite.json")["update"] == update
        assert f"Update {update} of {folder}" in message


def test_a_last_update_with_an_infinite_result_has_no_checkpoint(digits, tmp_path):
    # Its loss and gradient are finite: only the rate takes a parameter beyond float32.
    wild = dataclasses.replace(TINY, epochs=1, batch_size=40, optimizer=config.OptimizerConfig(
        learning_rate=3e38, weight_decay=100.0))
    with pytest.raises(InputError, match="Expected finite state"):
        trainer.train(wild, digits, tmp_path / "run", tensorboard=False)
    assert not (tmp_path / "run" / "done.json").exists()
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


def test_a_run_that_did_not_stop_has_nothing_to_replay(shared_study, tmp_path, capsys):
    assert call("replay", shared_study / "robust-seed0") == 2
    assert "Expected an update that stopped the training of" in one_line(capsys)
    assert call("replay", tmp_path) == 2
    assert "found no config.json there" in one_line(capsys)


def test_a_damaged_state_is_named(digits, tmp_path, capsys):
    wild = config.with_settings(TINY, {"robust.lam": 3e38, "robust.alpha": 3e38})
    with pytest.raises(InputError):
        trainer.train(wild, digits, tmp_path / "run", tensorboard=False)
    arrays = dict(np.load(tmp_path / "run" / "not_finite.npz"))
    del arrays["state.centroids.mean"]
    np.savez(tmp_path / "run" / "not_finite.npz", **arrays)
    assert call("replay", tmp_path / "run") == 2
    assert "Expected state.centroids.mean of shape (10, 4)" in one_line(capsys)
