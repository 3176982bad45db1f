"""The train step: determinism, device counts, the optimiser as PyTorch defines it."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxrobust import methods, models, training
from jaxrobust._validate import InputError
from jaxrobust.losses import RobustLossConfig
from jaxrobust.methods import Batch
from jaxrobust.models import Outputs
from jaxrobust.perturbations import gaussian

CLASSES = 4


def make_model():
    return models.SmallCNN(num_classes=CLASSES, mean=(0.5,), std=(0.25,), num_features=6, width=3)


def make_batch(seed=0, size=16, labels=None):
    clean_key, noise_key, label_key = jax.random.split(jax.random.key(seed), 3)
    clean = jax.random.uniform(clean_key, (size, 8, 8, 1))
    noisy = jnp.clip(clean + 0.1 * jax.random.normal(noise_key, clean.shape), 0, 1)
    if labels is None:
        labels = jax.random.randint(label_key, (size,), 0, CLASSES)
    return Batch(clean, noisy, labels)


def make_step(name="robust", axis_name=None, optimizer=None, **changes):
    optimizer = training.sgd(0.01, clip_norm=1.0) if optimizer is None else optimizer
    method = methods.make_method(name, robust=RobustLossConfig(delta_d=1.0), perturb=gaussian(0.1))
    step = training.make_train_step(make_model(), method, optimizer, axis_name=axis_name, **changes)
    return step, first_state(optimizer)


def first_state(optimizer, seed=0):
    return jax.jit(lambda key: training.create_train_state(
        make_model(), optimizer, key, jnp.zeros((1, 8, 8, 1))))(jax.random.key(seed))


@pytest.mark.parametrize("name, compiled", [
    *(pytest.param(name, True, marks=[] if name in ("normal", "stability", "robust") else [
        pytest.mark.slow]) for name in methods.METHODS),
    pytest.param("robust", False, marks=pytest.mark.slow)])
def test_a_step_updates_everything_leaves_its_input_and_lowers_the_loss(name, compiled):
    step, state = make_step(name)
    step = jax.jit(step) if compiled else step
    before = jax.tree.map(np.array, state.params)
    new_state, metrics = step(state, make_batch())
    assert int(new_state.step) == 1
    chex.assert_trees_all_equal(state.params, before)
    for part in ("params", "batch_stats", "opt_state"):
        old, new = getattr(state, part), getattr(new_state, part)
        assert any(not np.array_equal(a, b) for a, b in zip(
            jax.tree.leaves(old), jax.tree.leaves(new), strict=True)), part
    assert new_state.centroids.seen.any()
    assert all(np.isfinite(value) and value.shape == () for value in metrics.values())
    if compiled:
        first = metrics["loss"]
        for _ in range(29):
            new_state, metrics = step(new_state, make_batch())
        assert metrics["loss"] < 0.8 * first


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    optimizer = training.sgd(0.01, clip_norm=1.0)
    step = jax.jit(make_step(optimizer=optimizer)[0])

    def final(seed):
        state = first_state(optimizer, seed)
        for batch_seed in range(3):
            state, _ = step(state, make_batch(batch_seed))
        return state.params

    chex.assert_trees_all_equal(final(1), final(1))
    assert not np.array_equal(*(models.head_parameters(final(seed))[0] for seed in (1, 2)))


def test_nothing_is_compiled_again_after_the_first_step():
    step, state = make_step()
    step = jax.jit(chex.assert_max_traces(step, n=1))
    for seed in range(3):
        state, _ = step(state, make_batch(seed))


def test_the_constraint_weight_scales_what_is_added_to_the_softmax_loss():
    for weight in (0.0, 0.25):
        step, state = make_step(constraint_weight=lambda step, weight=weight: weight)
        _, metrics = jax.jit(step)(state, make_batch())
        ours = (metrics["compact"] + metrics["margin"] + 1e-3 * metrics["norm"]
                + metrics["align"])
        np.testing.assert_allclose(
            metrics["loss"], metrics["softmax"] + weight * ours, rtol=1e-5)


# --- modules of users -------------------------------------------------------------------------


class Top(nn.Module):

    @nn.compact
    def __call__(self, features):
        return nn.Dense(CLASSES)(features)


class UsersModel(nn.Module):
    """No field ``axis_name``, its softmax layer inside another one, and dropout."""

    rate: float = 0.0

    @nn.compact
    def __call__(self, images, *, train):
        x = nn.Dense(6)(images.reshape(images.shape[0], -1))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)
        features = nn.Dropout(self.rate, deterministic=not train)(x)
        return Outputs(Top(name="top")(features), features, {})


def users_step(rate=0.0, name="robust", optimizer=None, **options):
    optimizer = training.sgd(0.1) if optimizer is None else optimizer
    model, method = UsersModel(rate), methods.make_method(name, robust=RobustLossConfig(delta_d=1))
    step = training.make_train_step(model, method, optimizer, head="top/Dense_0", **options)
    return step, jax.jit(lambda key: training.create_train_state(
        model, optimizer, key, jnp.zeros((1, 8, 8, 1)), head="top/Dense_0"))(jax.random.key(0))


def test_a_users_module_is_trained():
    step, state = users_step()
    assert state.centroids.mean.shape == (CLASSES, 6)
    step, losses = jax.jit(step), []
    for _ in range(20):
        state, metrics = step(state, make_batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]


def test_a_head_that_is_not_there_is_answered_with_the_layers_that_could_be_it():
    message = "Unknown head 'head'.* Expected one of: Dense_0, top/Dense_0."
    with pytest.raises(InputError, match=message):
        training.create_train_state(
            UsersModel(), training.sgd(0.1), jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    step = training.make_train_step(
        UsersModel(), methods.make_method("normal"), training.sgd(0.1))
    with pytest.raises(InputError, match=message):
        step(users_step()[1], make_batch())


def test_the_statistics_of_a_module_without_an_axis_name_are_the_mean_over_the_devices():
    step, state = users_step(name="normal", axis_name="devices")
    batch = make_batch()
    split = jax.tree.map(lambda rows: rows.reshape(2, 8, *rows.shape[1:]), batch)
    result, _ = jax.pmap(step, "devices", in_axes=(None, 0))(state, split)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    halves = [UsersModel().apply(variables, images, train=True, mutable=["batch_stats"])[1]
              for images in split.clean]
    expected = jax.tree.map(lambda a, b: (a + b) / 2, *halves)["batch_stats"]
    for device in (0, 1):
        chex.assert_trees_all_close(
            jax.tree.map(lambda leaf: leaf[device], result.batch_stats),  # noqa: B023
            expected, rtol=1e-5, atol=1e-6)


def test_dropout_draws_anew_for_every_step_and_pass_and_the_same_for_the_same_seed():
    # Dropout of 0.5 leaves of a feature of 1 either 0 or 2: the loss goes with how many.
    images = jnp.ones((4, 8, 8, 1))
    seen = []

    class Dropped(nn.Module):

        @nn.compact
        def __call__(self, images, *, train):
            features = nn.Dropout(0.5, deterministic=not train)(images.reshape(4, -1))
            if train:
                jax.debug.callback(lambda x: seen.append(np.asarray(x)), features, ordered=True)
            return Outputs(nn.Dense(CLASSES, name="head")(features), features, {})

    optimizer = training.sgd(0.1)
    step = training.make_train_step(Dropped(), methods.make_method("stability"), optimizer)
    state = jax.jit(lambda key: training.create_train_state(Dropped(), optimizer, key, images))(
        jax.random.key(0))
    batch = Batch(images, images, jnp.zeros(4, jnp.int32))
    step = jax.jit(step)
    for first in (state, state.replace(step=state.step + 1), state):
        step(first, batch)
        jax.effects_barrier()
    assert len(seen) == 6 and {0, 2} == set(np.unique(seen))
    clean, noisy, later, _, again, noisy_again = seen
    np.testing.assert_array_equal([clean, noisy], [again, noisy_again])
    for other in (noisy, later):
        assert 0.3 < np.mean(clean == other) < 0.7  # Of 256 independent draws, a half.


def test_a_step_is_the_same_on_a_mesh_of_explicit_axes():
    step, state = make_step()
    mesh = jax.make_mesh((8,), ("examples",), axis_types=(jax.sharding.AxisType.Explicit,))
    split, whole = (jax.NamedSharding(mesh, spec) for spec in (P("examples"), P()))
    expected, wanted = jax.jit(step)(state, make_batch())
    placed, batch = jax.device_put(state, whole), jax.device_put(make_batch(), split)
    jitted = jax.jit(chex.assert_max_traces(step, n=1))
    result, metrics = jitted(placed, batch)
    chex.assert_trees_all_close((result.params, result.centroids, metrics),
                                (expected.params, expected.centroids, wanted), rtol=1e-4, atol=1e-5)
    for new, old in zip(jax.tree.leaves(result), jax.tree.leaves(placed), strict=True):
        assert new.sharding.is_equivalent_to(old.sharding, new.ndim)
    jitted(result, batch)


def test_labels_of_any_kind_are_the_same_or_an_error():
    step, state = make_step("normal")
    step = jax.jit(step)
    expected = step(state, make_batch(labels=jnp.arange(16) % CLASSES))[1]["loss"]
    for dtype in (np.uint8, np.int64):
        labels = (np.arange(16) % CLASSES).astype(dtype)
        assert step(state, make_batch(labels=labels))[1]["loss"] == expected
    with pytest.raises(InputError, match="Expected labels of an integer dtype, got bool"):
        step(state, make_batch(labels=np.zeros(16, bool)))
    with pytest.raises(InputError, match="Expected batch.clean of shape .* no size 0"):
        step(state, jax.tree.map(lambda rows: rows[:0], make_batch()))


def updated(optimizer, parameters, gradients):
    """The parameters after an update with each of the gradients."""
    @jax.jit
    def update(gradient, state, parameters):
        updates, state = optimizer.update(gradient, state, parameters)
        return optax.apply_updates(parameters, updates), state

    state = optimizer.init(parameters)
    for gradient in gradients:
        parameters, state = update(jnp.asarray(gradient, jnp.float32), state, parameters)
    return parameters


def pytorch_sgd(parameters, gradients, *, learning_rates, momentum, weight_decay):
    """SGD with Nesterov momentum, in the words of PyTorch's documentation."""
    buffer = None
    for gradient, learning_rate in zip(gradients, learning_rates, strict=True):
        gradient = gradient + weight_decay * parameters
        buffer = gradient if buffer is None else momentum * buffer + gradient
        parameters = parameters - learning_rate * (gradient + momentum * buffer)
    return parameters


def test_sgd_is_pytorchs_nesterov_with_l2_in_the_gradient():
    random = np.random.default_rng(0)
    start, gradients = random.normal(size=3), random.normal(size=(5, 3))
    schedule = training.piecewise_schedule(0.1, decay_steps=(2, 4), decay_factor=0.2)
    optimizer = training.sgd(schedule, momentum=0.9, weight_decay=5e-4)
    parameters = jnp.asarray(start, jnp.float32)
    parameters = updated(optimizer, parameters, gradients)
    expected = pytorch_sgd(start, gradients, learning_rates=(0.1, 0.1, 0.02, 0.02, 0.004),
                           momentum=0.9, weight_decay=5e-4)
    np.testing.assert_allclose(parameters, expected, rtol=1e-5)


def pytorch_adam(parameters, gradients, *, learning_rates, weight_decay):
    """Adam, in the words of PyTorch's documentation."""
    first = second = np.zeros_like(parameters)
    for step, (gradient, learning_rate) in enumerate(
            zip(gradients, learning_rates, strict=True), 1):
        gradient = gradient + weight_decay * parameters
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        unbiased, scale = first / (1 - 0.9**step), second / (1 - 0.999**step)
        parameters = parameters - learning_rate * unbiased / (np.sqrt(scale) + 1e-8)
    return parameters


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_is_pytorchs_with_l2_in_the_gradient(weight_decay):
    random = np.random.default_rng(0)
    start, gradients = random.normal(size=3), random.normal(size=(5, 3))
    schedule = training.piecewise_schedule(0.1, decay_steps=(3,), decay_factor=0.1)
    optimizer = training.adam(schedule, weight_decay=weight_decay)
    parameters = jnp.asarray(start, jnp.float32)
    parameters = updated(optimizer, parameters, gradients)
    expected = pytorch_adam(start, gradients, learning_rates=(0.1, 0.1, 0.1, 0.01, 0.01),
                            weight_decay=weight_decay)
    # In float32 the first bias corrections, 1 - 0.999, have four digits.
    np.testing.assert_allclose(parameters, expected, rtol=2e-4)


def test_clipping_comes_before_the_weight_decay():
    optimizer = training.sgd(1.0, momentum=0.0, weight_decay=0.5, clip_norm=1.0)
    parameters = jnp.array([2.0, 0.0])
    updates, _ = optimizer.update(jnp.array([30.0, 40.0]), optimizer.init(parameters), parameters)
    # The gradient (30, 40) is scaled to norm 1, then half of the parameters is added.
    np.testing.assert_allclose(-updates, np.array([0.6 + 1.0, 0.8]), rtol=1e-6)


# --- around any method ------------------------------------------------------------------------


def test_the_average_of_the_parameters_is_optaxs_of_their_history():
    optimizer = training.averaged(training.sgd(0.1), decay=0.9)
    params, reference = {"a": jnp.array([2.0, 0.0])}, optax.ema(0.9)
    state, history = optimizer.init(params), reference.init(params)
    update, add = jax.jit(optimizer.update), jax.jit(reference.update)
    random = np.random.default_rng(0)
    for _ in range(4):
        updates, state = update(
            {"a": jnp.asarray(random.normal(size=2), jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        with jax.numpy_dtype_promotion("standard"):
            expected, history = add(params, history)
        chex.assert_trees_all_close(state.average, expected, rtol=1e-5)


def test_averaging_changes_no_update_and_puts_the_average_in_their_place():
    optimizer = training.sgd(0.01)
    kept = training.averaged(optimizer, decay=0.5)
    steps = [jax.jit(make_step("both", optimizer=one)[0]) for one in (optimizer, kept)]
    states, seen = [first_state(one) for one in (optimizer, kept)], []
    for seed in range(2):
        states = [step(state, make_batch(seed))[0]
                  for step, state in zip(steps, states, strict=True)]
        seen.append(states[0].params)
    chex.assert_trees_all_close(states[1].params, states[0].params, rtol=1e-6)
    first = first_state(kept)  # Before the first update there is no average.
    chex.assert_trees_all_equal(training.with_averaged_parameters(first).params, first.params)
    averaged = training.with_averaged_parameters(states[1])
    # The weights are 1/3 and 2/3.
    chex.assert_trees_all_close(averaged.params, jax.tree.map(
        lambda first, second: (first + 2 * second) / 3, *seen), rtol=1e-4, atol=1e-6)
    with pytest.raises(InputError, match=r"Expected the state of an optimizer made by averaged"):
        training.with_averaged_parameters(states[0])
    with pytest.raises(InputError, match=r"Expected decay=1 in \[0, 1\)"):
        training.averaged(optimizer, decay=1)


@pytest.mark.slow
@pytest.mark.parametrize("radius", [0.0, 0.5])
def test_sharpness_aware_steps_are_optaxs(radius):
    optimizer, batch = training.sgd(0.05, weight_decay=0.1), make_batch()
    step, state = make_step("robust", optimizer=optimizer, sam_radius=radius)
    found, metrics = jax.jit(step)(state, batch)
    objective = training.make_objective(
        make_model(), methods.make_method("robust", robust=RobustLossConfig(delta_d=1.0)))

    def gradient_of(params, _=None):
        return jax.grad(lambda params: objective(params, state, batch)[0])(params)

    def expected(params):
        gradient = gradient_of(params)
        if not radius:
            return optimizer.update(gradient, optimizer.init(params), params)[0]
        theirs = optax.contrib.sam(
            optimizer, optax.chain(optax.contrib.normalize(), optax.sgd(radius)), opaque_mode=True)
        return theirs.update(gradient, theirs.init(params), params, grad_fn=gradient_of)[0]

    with jax.numpy_dtype_promotion("standard"):
        updates = jax.jit(expected)(state.params)
    chex.assert_trees_all_close(
        found.params, optax.apply_updates(state.params, updates), rtol=1e-4, atol=1e-6)
    plain, plainly = jax.jit(make_step("robust", optimizer=optimizer)[0])(state, batch)
    chex.assert_trees_all_close((found.batch_stats, found.centroids, metrics["loss"]),
                                (plain.batch_stats, plain.centroids, plainly["loss"]), rtol=1e-5)
    difference = optax.tree.norm(optax.tree.sub(found.params, plain.params))
    assert (difference > 1e-4) == (radius > 0)


def test_a_sharpness_aware_step_without_a_gradient_stays_finite():
    step, state = make_step("normal", optimizer=training.sgd(0.1, weight_decay=0.0), sam_radius=0.5)
    found, _ = jax.jit(step)(state, make_batch(labels=jnp.full(16, -1)))
    chex.assert_trees_all_equal(found.params, state.params)
    with pytest.raises(InputError, match="sam_radius=-1"):
        make_step(sam_radius=-1)
