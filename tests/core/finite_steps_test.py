"""An update that is not finite changes nothing, and says what in it is not."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust import methods, models, parallel, training
from jaxrobust._activations import relu
from jaxrobust._validate import InputError
from jaxrobust.losses import RobustLossConfig
from jaxrobust.methods import Batch

CLASSES = 4
WEIGHTS = {5: 1e30, 6: np.inf}
"""Of the constraints, by step; 1 otherwise."""


def weight_at(step):
    for number, weight in WEIGHTS.items():
        step = jnp.where(step == number, -weight, step)
    return jnp.where(step < 0, -step, 1.0)


def make_step(when, **options):
    model = models.SmallCNN(
        num_classes=CLASSES, mean=(0.5,), std=(0.25,), num_features=6, width=2)
    optimizer = training.sgd(0.01)
    step = training.make_train_step(
        model, methods.make_method("robust", robust=RobustLossConfig(delta_d=1.0)), optimizer,
        constraint_weight=weight_at, when_not_finite=when, **options)
    state = jax.jit(lambda key: training.create_train_state(
        model, optimizer, key, jnp.zeros((1, 8, 8, 1))))(jax.random.key(0))
    return step, state


def make_batch():
    rng = np.random.default_rng(0)
    clean = rng.uniform(size=(8, 8, 8, 1)).astype(np.float32)
    return Batch(clean, np.clip(clean + 0.1, 0, 1), rng.integers(0, CLASSES, 8).astype(np.int32))


def with_huge_features(state):
    """Finite ones, whose squares are not."""
    layer = state.params["features"]
    return state.replace(params=state.params | {
        "features": layer | {"kernel": layer["kernel"] * 1e22}})


def with_infinite_logit(state):
    head = state.params["head"]
    return state.replace(params=state.params | {
        "head": head | {"bias": head["bias"].at[1].set(jnp.inf)}})


def cases(state, batch):
    """By the name of what is not finite first: a state and a batch."""
    spoilt = batch.noisy.copy()
    spoilt[3, 0, 0, 0] = np.nan
    return {
        None: (state, batch),
        "not_finite_features": (state, batch._replace(noisy=spoilt)),
        # All labels are the class whose logit is infinite: the loss is finite.
        "not_finite_logits": (with_infinite_logit(state), batch._replace(
            labels=np.ones_like(batch.labels))),
        "align": (with_huge_features(state), batch),
        "loss": (state.replace(step=jnp.int32(6)), batch),
        "gradient_norm": (state.replace(step=jnp.int32(5)), batch)}


def plain(state):
    return state.replace(key=jax.random.key_data(state.key))


@pytest.fixture(name="steps", scope="module")
def _steps():
    steps = {when: make_step(when) for when in (None, "stop", "skip")}
    return {when: jax.jit(step) for when, (step, _) in steps.items()}, steps[None][1]


@pytest.mark.parametrize("first", cases(make_step(None)[1], make_batch()))
def test_a_step_names_what_is_not_finite_first_and_then_changes_nothing(first, steps):
    steps, state = steps
    state, batch = cases(state, make_batch())[first]
    after, metrics = {}, {}
    for when, step in steps.items():
        after[when], metrics[when] = step(state, batch)
        assert training.first_not_finite(jax.device_get(metrics[when])) == first
        assert bool(metrics[when][training.FINITE]) == (first is None)
    if first is None:
        for when in ("stop", "skip"):
            chex.assert_trees_all_close(
                plain(after[when]), plain(after[None]), rtol=1e-5, atol=1e-6)
        return
    chex.assert_trees_all_equal(plain(after["stop"]), plain(state))
    chex.assert_trees_all_equal(plain(after["skip"]), plain(state.replace(step=state.step + 1)))
    assert int(after[None].step) == int(state.step) + 1


def test_what_does_not_count_stops_nothing(steps):
    steps, state = steps
    batch = make_batch()
    batch = batch._replace(labels=np.full_like(batch.labels, -1))
    _, metrics = steps["stop"](with_infinite_logit(state), batch)
    assert metrics["not_finite_logits"] == 0 and metrics[training.FINITE]


def test_in_a_loop_and_on_devices_a_step_that_is_not_finite_is_the_last():
    step, state = make_step("stop", axis_name="devices", sync_batch_norm=False)

    def steps(state, batch):
        def one(state, _):
            # The second update has NaN on the second device alone.
            wrong = (state.step == 1) & (jax.lax.axis_index("devices") == 1)
            return step(state, batch._replace(noisy=jnp.where(wrong, jnp.nan, batch.noisy)))

        return jax.lax.scan(one, state, length=3)

    split = jax.tree.map(lambda rows: rows.reshape(2, 4, *rows.shape[1:]), make_batch())
    after, metrics = jax.pmap(steps, "devices", in_axes=(None, 0), devices=jax.devices()[:2])(
        state, split)
    np.testing.assert_array_equal(metrics[training.FINITE], [[True, False, False]] * 2)
    np.testing.assert_array_equal(after.step, [1, 1])
    for leaf in jax.tree.leaves(after.params):
        assert np.isfinite(leaf).all()
        np.testing.assert_array_equal(leaf[0], leaf[1])


def compiled(function):
    """As training steps are for users."""
    return parallel.compile(parallel.make_layout("jit"), function)


@pytest.mark.parametrize("name", [
    "small_cnn", pytest.param("resnet18", marks=pytest.mark.slow)])
def test_an_image_of_nan_shows_in_its_batch_and_in_no_other(name):
    model = models.create_model(name, num_classes=CLASSES, num_features=8, width=4, mean=(0.5,),
                                std=(0.25,)).clone(batch_groups=2)
    views = np.random.default_rng(0).uniform(size=(16, 8, 8, 1)).astype(np.float32)
    variables = jax.jit(lambda key: model.init(key, jnp.asarray(views), train=True))(
        jax.random.key(0))
    apply = compiled(lambda views: model.apply(
        variables, views, train=True, mutable=["batch_stats"])[0])
    spoilt = views.copy()
    spoilt[11, 0, 0, 0] = np.nan  # A noisy view.
    whole, outputs = apply(views), apply(spoilt)
    for rows, expected in zip(jax.tree.leaves(outputs), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(rows[:8], expected[:8])
        assert not np.isfinite(rows[8:]).reshape(8, -1).all(axis=1).any()


def test_the_rectifier_is_that_of_jax_but_for_nan():
    x = np.random.default_rng(0).normal(size=(64, 16, 16)).astype(np.float32)
    x[0, 0, :4] = 0, -0.0, np.inf, -np.inf
    for made in (lambda relu: relu, lambda relu: jax.grad(lambda x: (2 * relu(x)).sum())):
        np.testing.assert_array_equal(compiled(made(relu))(x), jax.jit(made(jax.nn.relu))(x))
    x[1] = np.nan
    assert np.isnan(compiled(lambda x: 2 * relu(x) + 1)(x)).sum() == 256


def test_another_word_for_what_to_do_is_refused():
    with pytest.raises(InputError, match="when_not_finite"):
        make_step("go on")
