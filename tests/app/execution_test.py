"""However a run is executed, its result is the same, and nothing is compiled twice."""

import dataclasses

import chex
import jax
import jax.monitoring
import numpy as np
import pytest
from command_line import metrics_of

from jaxrobust import data
from jaxrobust.app import config, program, progress, trainer
from jaxrobust.app.config import InputError
from jaxrobust.app.execution import Feed
from jaxrobust.app.recipe import RECIPES
from jaxrobust.app.study.sweep import USERS
from jaxrobust.parallel import make_layout

pytestmark = [pytest.mark.filterwarnings("default"),  # Orbax warns about itself.
              pytest.mark.usefixtures("steps_as_users_have_them")]

# 150 images in batches of 16: the last of an epoch has 6.
TINY = dataclasses.replace(
    RECIPES["digits"].rows["robust"], train_size=150, epochs=2, width=2, num_features=4,
    batch_size=16, checkpoint_every=1, batch_norm_statistics="recomputed",
    optimizer=config.OptimizerConfig(
        learning_rate=0.02, schedule="cosine", clip_norm=1.0))


@pytest.fixture(name="plain", scope="module")
def _plain(tmp_path_factory, digits):
    folder = tmp_path_factory.mktemp("plain") / "run"
    trainer.train(TINY, digits, folder, tensorboard=False)
    return metrics_of(folder)


WAYS = {
    "several steps a call": ("jit", 1, Feed(steps_per_call=3)),
    "streamed": ("jit", 1, Feed(input="stream")),
    "mesh": ("mesh", 2, Feed()),
    "pmap": ("pmap", 2, Feed()),
    "pmap, streamed": ("pmap", 2, Feed(input="stream")),
}


@pytest.mark.parametrize("way", [
    pytest.param(way, marks=[pytest.mark.slow] if way in ("mesh", "pmap", "pmap, streamed") else [])
    for way in WAYS])
def test_a_run_is_the_same_in_every_way_and_compiles_nothing_after_an_epoch(
        way, plain, digits, tmp_path, monkeypatch):
    form, devices, feed = WAYS[way]
    compiled, after_epoch = [], []

    def count(event, seconds, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(seconds)

    record = trainer._Running.record

    def record_and_count(self, *arguments):
        record(self, *arguments)
        after_epoch.append(len(compiled))

    monkeypatch.setattr(trainer._Running, "record", record_and_count)
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        trainer.train(TINY, digits, tmp_path / "run", tensorboard=False, feed=feed,
                       layout=make_layout(form, jax.devices()[:devices]))
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert 0 < after_epoch[0] == after_epoch[1]
    chex.assert_trees_all_close(metrics_of(tmp_path / "run"), plain, rtol=1e-5, atol=1e-6)
    if form == "jit":
        assert metrics_of(tmp_path / "run") == plain  # To the bit.


@pytest.mark.parametrize("source", ["resident", "stream"])
def test_no_update_leaves_an_array_on_the_device(source, digits, tmp_path, monkeypatch):
    alive = []

    def count(self, *_, **__):
        alive.append(len(jax.live_arrays()))

    monkeypatch.setattr(progress.Progress, "advance", count)
    trainer.train(TINY, digits, tmp_path / "run", tensorboard=False, feed=Feed(input=source))
    # The threads that read ahead have a few of their own; an update has a dozen metrics.
    assert len(alive) == 20 and max(alive) < alive[0] + 10, alive


@pytest.mark.slow
def test_a_last_batch_of_one_image_is_left_out_and_said(digits, tmp_path, capsys):
    odd = dataclasses.replace(TINY, train_size=33)
    for source in ("resident", "stream"):
        trainer.train(odd, digits, tmp_path / source, tensorboard=False, feed=Feed(input=source))
        assert "Note: each epoch leaves out one of the 33 training images" in (
            capsys.readouterr().out)
    rows = metrics_of(tmp_path / "resident")
    assert [row["step"] for row in rows] == [2, 4]
    assert metrics_of(tmp_path / "stream") == rows


@pytest.mark.parametrize("changes, expected", [
    ({"validation_size": 7}, "Expected validation_size=7 to leave every class of 1437 examples"),
    ({"validation_size": 0.005}, "Expected validation_size=7 to leave every class"),
    ({"train_size": 9}, "Expected train_size=9 to leave every class of 1200 examples")])
def test_too_few_images_for_every_class_name_the_setting(changes, expected, digits):
    with pytest.raises(InputError, match=expected):
        trainer.make_splits(digits, dataclasses.replace(TINY, **{"batch_size": 5} | changes))


def test_a_device_with_one_image_has_no_variance_of_its_own(digits):
    layout = make_layout("pmap", jax.devices()[:8])
    apart = dataclasses.replace(TINY, batch_norm="per_device")
    for changes in ({"batch_size": 8}, {"train_size": 40}):
        with pytest.raises(InputError, match="each of 8 devices two images or more"):
            program.program_of([dataclasses.replace(apart, **changes)], digits, layout)
    program.program_of([dataclasses.replace(apart, train_size=48)], digits, layout)
    program.program_of([dataclasses.replace(TINY, batch_size=8)], digits, layout)


@pytest.mark.slow
def test_runs_together_have_the_result_of_each_alone_though_one_diverges(plain, digits, tmp_path):
    configs = [TINY, config.with_settings(TINY, {"noise_std": 0.3, "robust.lam": 0.5}),
               config.with_settings(TINY, {"robust.lam": 3e38, "robust.alpha": 3e38})]
    folders = [tmp_path / name for name in ("plain", "other", "wild")]
    message, = trainer.train_together(configs, digits, folders, tensorboard=False)
    assert "has diverged" in message and "wild" in message
    assert not (folders[2] / "done.json").exists()
    trainer.train(configs[1], digits, tmp_path / "alone", tensorboard=False)
    alone = metrics_of(tmp_path / "alone")
    for folder, expected in zip(folders, (plain, alone), strict=False):
        chex.assert_trees_all_close(metrics_of(folder), expected, rtol=1e-4, atol=1e-5)
    assert plain != alone


@pytest.mark.slow
def test_runs_left_an_epoch_apart_by_a_kill_all_come_to_their_end(plain, digits, tmp_path,
                                                                  monkeypatch):
    class Killed(BaseException):
        """Stands for a kill: nothing handles it."""

    record = trainer._Running.record

    def record_until_killed(self, row, *rest):
        if self.folder.name == "1":
            raise Killed
        record(self, row, *rest)

    configs = [TINY, dataclasses.replace(TINY, seed=1)]
    folders = [tmp_path / "0", tmp_path / "1"]
    monkeypatch.setattr(trainer._Running, "record", record_until_killed)
    with pytest.raises(Killed):
        trainer.train_together(configs, digits, folders, tensorboard=False)
    monkeypatch.undo()
    assert [len(metrics_of(folder)) for folder in folders] == [1, 0]
    assert trainer.train_together(configs, digits, folders, tensorboard=False, resume=True) == []
    chex.assert_trees_all_close(metrics_of(folders[0]), plain, rtol=1e-4, atol=1e-5)
    assert len(metrics_of(folders[1])) == 2


def test_runs_that_differ_in_more_are_refused(digits, tmp_path):
    other = dataclasses.replace(TINY, width=3)
    with pytest.raises(InputError, match="to differ in nothing but the seed, noise_std"):
        trainer.train_together([TINY, other], digits, [tmp_path / "a", tmp_path / "b"])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_bfloat16_computes_and_float32_remembers(plain, digits, tmp_path):
    half = dataclasses.replace(TINY, dtype="bfloat16")
    with jax.numpy_dtype_promotion("standard"):  # Flax's layers add float32 and bfloat16.
        trainer.train(half, digits, tmp_path / "half", tensorboard=False)
        run = trainer.load_run(tmp_path / "half", half, digits)
        outputs, _ = run.model.apply(
            trainer.variables_of(run.state), np.zeros((2, 8, 8, 1), np.float32), train=True,
            mutable=["batch_stats"])
    kept = (run.state.params, run.state.batch_stats, run.state.opt_state, run.state.centroids)
    floating = {leaf.dtype for leaf in jax.tree.leaves(kept)
                if jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating)}
    assert floating == {np.dtype("float32")}
    assert outputs.blocks["block1"].dtype == jax.numpy.bfloat16
    assert outputs.features.dtype == outputs.logits.dtype == np.float32
    # It is another computation, and a close one.
    first, other = metrics_of(tmp_path / "half")[0], plain[0]
    assert first["loss"] != other["loss"]
    np.testing.assert_allclose(first["loss"], other["loss"], rtol=0.02)


@pytest.mark.parametrize("method", ["center", *(
    pytest.param(method, marks=pytest.mark.slow) for method in ("robust", "stability", "trades"))])
def test_every_swept_setting_reaches_the_update(method, digits):
    # Noise that is seen, and a second update, which is the first to use the momentum.
    base = dataclasses.replace(TINY, method=method, noise_std=0.2)
    assert set(USERS) == set(config.SWEPT)
    names = [name for name in config.SWEPT if method in USERS[name]]
    configs = [base, *(config.with_settings(base, {name: 0.5 * config.get_setting(base, name)})
                       for name in names)]
    built = program.program_of(configs, digits, make_layout("jit"))
    state = program.stack_runs([program.initial_state(base, digits, built.layout)] * len(configs))
    images, labels = digits.train.images[:150], digits.train.labels[:150]
    shared = (images, labels, built.order(state.key, 1), program.stack_configs(configs))
    for _ in range(2):
        state, metrics = built.resident(1)(state, shared, np.arange(16, dtype=np.int32))
    losses = np.asarray(metrics["loss"])[:, 0]
    assert losses.shape == (len(configs),) and np.isfinite(losses).all()
    for name, loss in zip(names, losses[1:], strict=True):
        assert abs(loss - losses[0]) > 1e-6, name


def test_a_set_too_large_for_the_device_is_streamed(digits, monkeypatch):
    layout = make_layout("jit")
    assert Feed().resolve(layout, digits.train, 1).input == "resident"
    # CPUs have the memory of the machine.
    terabyte = data.StoredImages(lambda rows: [], 10**6, (1000, 1000, 1), "photographs")
    photographs = data.Split(terabyte, np.zeros(10**6, np.int32))
    assert Feed().resolve(layout, photographs, 1).input == "stream"
    monkeypatch.setattr(type(layout.mesh.devices.flat[0]), "memory_stats",
                        lambda self: {"bytes_limit": digits.train.images.size}, raising=False)
    assert Feed().resolve(layout, digits.train, 1).input == "stream"
