"""Short runs: what batch norm evaluates with, and that training does not depend on it."""

import contextlib
import dataclasses
import functools
import json

import chex
import jax
import numpy as np
import pytest
from command_line import metrics_of

from jaxrobust import checkpoints, data
from jaxrobust.app import config, program, run_folder, trainer
from jaxrobust.app.config import InputError
from jaxrobust.app.execution import Feed
from jaxrobust.app.recipe import RECIPES
from jaxrobust.models import common, small_cnn
from jaxrobust.parallel import make_layout

pytestmark = [pytest.mark.filterwarnings("default"),  # Orbax warns about itself.
              pytest.mark.usefixtures("steps_as_users_have_them")]

# 80 training images in two batches an epoch.
SHORT = dataclasses.replace(
    RECIPES["digits"].rows["robust"], validation_size=40, epochs=6, width=4, num_features=8,
    batch_size=40, checkpoint_every=1, noise_std=0.02, one_pass=False, crop_padding=0,
    batch_norm_statistics="recomputed",
    optimizer=config.OptimizerConfig(learning_rate=0.05, schedule="cosine", clip_norm=5.0))


@pytest.fixture(name="faint", scope="module")
def _faint():
    """Four classes that a network tells apart by a difference of 0.03 far from 0: where the bright
    quarter is."""
    rng = np.random.default_rng(0)

    def split(per_class):
        labels = np.tile(np.arange(4, dtype=np.int32), per_class)
        images = rng.integers(150, 159, (len(labels), 8, 8, 1))
        for image, label in zip(images, labels, strict=True):
            row, column = 4 * (label // 2), 4 * (label % 2)
            image[row : row + 4, column : column + 4] += 8
        return data.Split(images.astype(np.uint8), labels)

    return data.Dataset("faint", split(30), split(10), tuple("abcd"), (0.0,), (1.0,), flip=False)


@pytest.fixture(name="slow_statistics", scope="module")
def _slow_statistics():
    """The momentum of MobileNetV3's batch norm in the small network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_cnn, "batch_norm", functools.partial(common.batch_norm, momentum=0.99))
        yield
    program._program.cache_clear()


@pytest.fixture(name="short_runs", scope="module")
def _short_runs(faint, slow_statistics, tmp_path_factory):
    """The folder of a run of each kind of statistics."""
    folders = {}
    for statistics in ("running", "recomputed"):
        folders[statistics] = tmp_path_factory.mktemp("short") / statistics
        trainer.train(dataclasses.replace(SHORT, batch_norm_statistics=statistics), faint,
                       folders[statistics], tensorboard=False)
    return folders


@pytest.mark.slow
def test_running_statistics_end_at_chance_and_recomputed_ones_do_not(short_runs, faint):
    accuracies = {}
    for statistics, folder in short_runs.items():
        run = trainer.load_run(folder, run_folder.read_config(folder), faint)
        accuracies[statistics] = trainer.accuracy(run.model, run.state, faint.test, run.layout)
        rows = metrics_of(folder)
        assert rows[-1]["accuracy_clean"] > 0.9
        assert max(row["selection_accuracy"] for row in rows) == pytest.approx(
            accuracies[statistics], abs=0.1)
    assert accuracies["running"] == 0.25
    assert accuracies["recomputed"] > 0.9


@pytest.mark.slow
def test_training_itself_is_the_same_to_the_bit(short_runs, faint):
    losses = [[row["loss"] for row in metrics_of(folder)] for folder in short_runs.values()]
    assert losses[0] == losses[1]
    state = checkpoints.to_host(program.initial_state(SHORT, faint, make_layout("jit")))
    latest = []
    for folder in short_runs.values():
        with contextlib.closing(
                checkpoints.open_checkpoints(folder / "checkpoints", keep=2)) as manager:
            found = checkpoints.restore_checkpoint(manager, {"state": state, "best": state})
            latest.append(found.state["state"])
    chex.assert_trees_all_equal(*latest)


def recomputed(dataset, layout=None, split=None):
    layout = make_layout("jit") if layout is None else layout
    built = program.program_of([SHORT], dataset, layout)
    state = program.initial_state(SHORT, dataset, layout)
    state = program.recompute_statistics(
        built, SHORT, state, split or trainer.make_splits(dataset, SHORT).train)
    return jax.device_get(state.batch_stats)


@pytest.mark.parametrize("form", ["mesh", "pmap"])
def test_they_do_not_depend_on_the_devices(form, faint, slow_statistics):
    chex.assert_trees_all_close(
        recomputed(faint, make_layout(form, jax.devices()[:2])), recomputed(faint),
        rtol=1e-5, atol=1e-6)


def test_they_are_of_all_images_or_of_a_limited_number(faint, slow_statistics, monkeypatch):
    class Counted(list):
        """The rows that are read."""

    read = Counted()
    split = trainer.make_splits(faint, SHORT).train
    # A batch and a half: the second is filled up from the beginning.
    split = data.Split(split.images[:60], split.labels[:60])
    stored = data.StoredImages(
        lambda rows: read.extend(rows) or split.images[rows], 60, split.images.shape[1:], "rows")
    recomputed(faint, split=split._replace(images=stored))
    assert len(read) == 80 and set(read) == set(range(60))
    read.clear()
    monkeypatch.setattr(program, "STATISTICS_IMAGES", 30)
    recomputed(faint, split=split._replace(images=stored))
    assert len(read) == len(set(read)) == 40


def best_statistics(folder, dataset):
    return jax.device_get(
        trainer.load_run(folder, run_folder.read_config(folder), dataset).state.batch_stats)


@pytest.mark.slow
def test_they_are_the_same_streamed_resumed_and_together(
        short_runs, faint, tmp_path, monkeypatch):
    class Killed(BaseException):
        """Stands for a kill: nothing handles it."""

    record = trainer._Running.record

    def record_until_killed(self, row, *rest):
        record(self, row, *rest)
        if row["epoch"] == 3:
            raise Killed

    expected = best_statistics(short_runs["recomputed"], faint)
    monkeypatch.setattr(trainer._Running, "record", record_until_killed)
    with pytest.raises(Killed):
        trainer.train(SHORT, faint, tmp_path / "run", tensorboard=False)
    monkeypatch.undo()
    trainer.train(SHORT, faint, tmp_path / "run", tensorboard=False, resume=True,
                   feed=Feed(input="stream"))
    assert metrics_of(tmp_path / "run") == metrics_of(short_runs["recomputed"])
    chex.assert_trees_all_equal(best_statistics(tmp_path / "run", faint), expected)
    folders = [tmp_path / "0", tmp_path / "1"]
    assert trainer.train_together([SHORT, dataclasses.replace(SHORT, seed=1)], faint, folders,
                                   tensorboard=False) == []
    chex.assert_trees_all_close(
        best_statistics(folders[0], faint), expected, rtol=1e-3, atol=1e-4)


def test_a_run_from_before_the_choice_has_running_ones_and_is_the_same_run(tmp_path):
    running = dataclasses.replace(SHORT, batch_norm_statistics="running")
    written = json.loads(config.to_json(running))
    del written["batch_norm_statistics"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert run_folder.read_config(tmp_path) == running
    run_folder.claim_run(tmp_path, running)
    assert json.loads((tmp_path / "config.json").read_text()) == written
    with pytest.raises(InputError, match="holds another configuration"):
        run_folder.claim_run(tmp_path, SHORT)


def test_the_papers_recipes_keep_running_statistics():
    for name, recipe in RECIPES.items():
        # Running statistics are not those of averaged parameters.
        chosen = {run.batch_norm_statistics for run in recipe.rows.values()
                  if not run.optimizer.ema_decay}
        assert chosen == {"recomputed" if name in ("road_small", "photos") else "running"}, name
    assert config.RunConfig(select="last").batch_norm_statistics == "recomputed"
