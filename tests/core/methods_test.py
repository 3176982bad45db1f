"""The training methods against sums computed by hand, and the loss in other training loops."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import nnx

from jaxrobust.centroids import CentroidState, init_centroids
from jaxrobust.losses import RobustLossConfig, robust_loss, softmax_loss
from jaxrobust.methods import METHODS, PAPER_METHODS, Batch, make_method
from jaxrobust.methods.common import in_turn
from jaxrobust.models import Outputs
from jaxrobust.perturbations import gaussian

NUM_CLASSES, DIM, BATCH = 3, 4, 16
CONFIG = RobustLossConfig(alpha=0.7, beta=1.3, gamma_reg=0.2, lam=0.4, delta_d=2.0)
LABELS = np.array([0, 2, 1, 1, 0, 0, 2, 2, 0, 1, 2, 0, 0, 1, 1, 1], np.int32)
# AugMix takes the longest to compile.
EVERY = [pytest.param(name, marks=[pytest.mark.slow] if name == "augmix" else [])
         for name in METHODS]


def test_the_softmax_loss_is_the_mean_over_the_examples_that_count():
    logits = np.random.default_rng(0).normal(size=(6, NUM_CLASSES)).astype(np.float32)
    labels, kept = np.array([0, -1, 2, NUM_CLASSES, 1, 2**31 - 1]), np.array([0, 2, 4])
    logits[[1, 3, 5]] = [[np.nan] * 3, [np.inf] * 3, [0, np.nan, 0]]
    value, gradient = jax.jit(jax.value_and_grad(softmax_loss))(logits, labels)
    np.testing.assert_allclose(
        value, reference.softmax_loss(logits[kept], labels[kept]), rtol=1e-6)
    expected = (np.asarray(jax.nn.softmax(logits[kept])) - np.eye(3)[labels[kept]]) / 3
    np.testing.assert_allclose(gradient[kept], expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(gradient[np.array([1, 3, 5])], np.zeros((3, 3)))
    # On devices of which the last has no example that counts.
    per_device = jax.pmap(lambda logits, labels: softmax_loss(logits, labels, axis_name="devices"),
                          "devices")(logits.reshape(3, 2, 3), labels.reshape(3, 2))
    np.testing.assert_allclose(per_device, np.full(3, value), rtol=1e-6)


def test_the_softmax_loss_of_bfloat16_is_a_mean_in_float32():
    loss = softmax_loss(jnp.zeros((1024, 2), jnp.bfloat16), jnp.zeros(1024, jnp.int32))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, np.log(2), rtol=5e-3)  # bfloat16 has two digits, the sum more.


def test_labels_of_few_bits_are_those_of_many_classes():
    logits = jnp.zeros((2, 300)).at[0, 200].set(50.0).at[1, 44].set(50.0)
    for labels in (np.array([200, 44], np.uint8), [200, 44]):
        np.testing.assert_allclose(softmax_loss(logits, labels), 0, atol=1e-6)


# --- objectives with a linear model -----------------------------------------------------------


def linear_problem(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = {"weights": normal(5, DIM), "kernel": normal(DIM, NUM_CLASSES),
              "bias": normal(NUM_CLASSES)}
    batch = Batch(normal(BATCH, 5, 1, 1), normal(BATCH, 5, 1, 1), jnp.array(LABELS))
    state = CentroidState(normal(NUM_CLASSES, DIM), jnp.array([True, False, True]))
    return params, batch, state


def make_any(name, **changes):
    """Any of the methods, with what some of them need."""
    return make_method(name, robust=CONFIG, perturb=gaussian(0.1, clip=False), **changes)


def evaluate(method, params, batch, state, weight=1.0, axis_name=None):
    """The method's objective for a linear model that counts its passes in its statistics."""
    def forward(batch_stats, images):
        features = images.reshape(len(images), -1) @ params["weights"]
        logits = features @ params["kernel"] + params["bias"][None]
        # Not commutative, so that it tells the order of two passes.
        total = jnp.mean(images) if axis_name is None else jax.lax.pmean(
            jnp.mean(images), axis_name)
        seen = {"passes": batch_stats["passes"] + 1, "trace": batch_stats["trace"] / 2 + total}
        return Outputs(logits, features, {}), seen

    stats = {"passes": jnp.zeros((), jnp.int32), "trace": jnp.zeros(())}
    return method.objective(in_turn(forward), (params["kernel"], params["bias"]), stats, state,
                            batch, weight=weight, key=jax.random.key(3), axis_name=axis_name)


def by_hand(params, batch, state, name, weight, stability_weight=1.0):
    """The loss of a method from the equations, in float64."""
    weights, kernel, bias = (np.asarray(params[key], np.float64)
                             for key in ("weights", "kernel", "bias"))
    clean, noisy = (np.asarray(view, np.float64).reshape(BATCH, -1) @ weights
                    for view in (batch.clean, batch.noisy))
    softmax = {view: reference.softmax_loss(rows @ kernel + bias, LABELS)
               for view, rows in (("clean", clean), ("noisy", noisy))}
    if name in ("normal", "noisy"):
        return softmax["clean" if name == "normal" else "noisy"]
    if name == "both":
        return (softmax["clean"] + softmax["noisy"]) / 2
    if name == "stability":
        return softmax["clean"] + weight * stability_weight * reference.stability(clean, noisy)
    previous = {c: np.asarray(state.mean, np.float64)[c]
                for c in range(NUM_CLASSES) if state.seen[c]}
    running = reference.momentum_centroids(clean, LABELS, NUM_CLASSES, previous, CONFIG.momentum)
    naive = reference.naive_centroids(clean, LABELS, NUM_CLASSES)
    lam = 0 if name == "robust_clean" else CONFIG.lam
    ours = reference.our_loss(
        reference.clean_loss(
            reference.compactness(clean, LABELS, running, CONFIG.delta_v),
            reference.margin(naive, kernel.T, bias, CONFIG.delta_d),
            reference.centroid_norm(running), CONFIG.alpha, CONFIG.beta, CONFIG.gamma_reg),
        reference.compactness(noisy, LABELS, running, CONFIG.delta_v), lam)
    on_views = (softmax["clean"] + softmax["noisy"]) / 2 if name == "robust_both" else (
        softmax["clean"])
    return on_views + weight * ours


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("weight", [1.0, 0.25])
@pytest.mark.parametrize("name", PAPER_METHODS)
def test_an_objective_is_the_sum_computed_by_hand(name, weight, one_pass):
    params, batch, state = linear_problem()
    method = make_method(name, robust=CONFIG, stability_weight=3.0, one_pass=one_pass)
    loss, _ = evaluate(method, params, batch, state, weight)
    np.testing.assert_allclose(loss, by_hand(params, batch, state, name, weight, 3.0), rtol=1e-5)
    assert method.name == name


@pytest.mark.parametrize(("name", "passes", "views"), [
    ("normal", 1, ["clean"]), ("robust_clean", 1, ["clean"]), ("noisy", 1, ["noisy"]),
    ("both", 1, ["clean", "noisy"]), ("robust_both", 1, ["clean", "noisy"]),
    ("stability", 2, ["clean", "noisy"]), ("robust", 2, ["clean", "noisy"])])
def test_batch_statistics_see_the_views_in_the_order_of_the_paper(name, passes, views):
    params, batch, state = linear_problem()
    _, evaluated = evaluate(make_method(name), params, batch, state)
    assert evaluated.batch_stats["passes"] == passes
    means = [float(jnp.mean(getattr(batch, view))) for view in views]
    trace = means[0] / 2 + means[1] if passes == 2 else np.mean(means)
    np.testing.assert_allclose(evaluated.batch_stats["trace"], trace, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["stability", "robust"])
def test_in_one_pass_batch_statistics_see_both_views_together(name):
    params, batch, state = linear_problem()
    _, evaluated = evaluate(make_method(name, one_pass=True), params, batch, state)
    assert evaluated.batch_stats["passes"] == 1
    np.testing.assert_allclose(
        evaluated.batch_stats["trace"], jnp.mean(jnp.stack([batch.clean, batch.noisy])),
        rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PAPER_METHODS)
def test_metrics_hold_the_terms_and_accuracies_of_the_method(name):
    params, batch, state = linear_problem()
    loss, evaluated = evaluate(make_method(name, robust=CONFIG), params, batch, state)
    metrics = evaluated.metrics
    constraints = ["compact", "margin", "norm"]
    added = {"stability": ["stability"], "robust": [*constraints, "align"],
             "robust_both": [*constraints, "align"], "robust_clean": constraints}
    views = {"normal": ["clean"], "noisy": ["noisy"], "robust_clean": ["clean"]}.get(
        name, ["clean", "noisy"])
    assert set(metrics) == {"softmax", *added.get(name, []),
                            *(f"accuracy_{view}" for view in views)}
    assert all(metric.shape == () for metric in metrics.values())
    for view in views:
        features = getattr(batch, view).reshape(BATCH, -1) @ params["weights"]
        predicted = np.argmax(features @ params["kernel"] + params["bias"][None], axis=1)
        np.testing.assert_allclose(metrics[f"accuracy_{view}"], np.mean(predicted == LABELS),
                                   rtol=1e-6)
    if name.startswith("robust"):
        weights = {"softmax": 1, "compact": CONFIG.alpha, "margin": CONFIG.beta,
                   "norm": CONFIG.gamma_reg, "align": CONFIG.lam}
        np.testing.assert_allclose(
            loss, sum(float(metrics[term]) * weight for term, weight in weights.items()
                      if term in metrics), rtol=1e-5)


@pytest.mark.parametrize("name", PAPER_METHODS)
def test_every_method_tracks_the_centroids_of_the_view_it_trains_on(name):
    params, batch, state = linear_problem()
    _, evaluated = evaluate(make_method(name), params, batch, state)
    view = batch.noisy if name == "noisy" else batch.clean
    rows = np.asarray(view, np.float64).reshape(BATCH, -1) @ np.asarray(params["weights"])
    previous = {c: np.asarray(state.mean)[c] for c in (0, 2)}
    stored = reference.stored_centroids(rows, LABELS, NUM_CLASSES, previous, 0.9)
    np.testing.assert_allclose(evaluated.centroids.mean, [stored[c] for c in range(3)],
                               rtol=1e-4, atol=1e-5)
    assert evaluated.centroids.seen.all()


@pytest.mark.parametrize("name", EVERY)
def test_what_does_not_count_changes_nothing_in_any_objective(name):
    params, batch, state = linear_problem()
    # The last ones: random numbers are drawn by position.
    labels = np.where(np.arange(BATCH) < BATCH - 3, LABELS, (-1, NUM_CLASSES)[name == "both"])
    kept = np.flatnonzero(np.isin(labels, (0, 1, 2)))
    method = make_any(name, stability_weight=3.0)
    marked = batch._replace(labels=jnp.asarray(labels))
    without = jax.tree.map(lambda rows: rows[kept], marked)

    def objective(params, batch):
        loss, evaluated = evaluate(method, params, batch, state)
        return loss, (evaluated.centroids, evaluated.metrics)

    compute = jax.jit(jax.value_and_grad(objective, has_aux=True))
    chex.assert_trees_all_close(
        compute(params, marked), compute(params, without), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_a_batch_in_which_nothing_counts_has_loss_and_gradients_0(name):
    params, batch, state = linear_problem()
    batch = batch._replace(labels=jnp.full(BATCH, -1))
    (loss, evaluated), gradients = jax.jit(jax.value_and_grad(
        lambda params: evaluate(make_any(name), params, batch, state),
        has_aux=True))(params)
    assert loss == 0 and not any(evaluated.metrics.values())
    chex.assert_trees_all_equal(gradients, jax.tree.map(jnp.zeros_like, params))
    chex.assert_trees_all_equal(evaluated.centroids, state)


def test_logits_that_are_not_finite_are_not_right_for_class_0():
    params, batch, state = linear_problem()
    batch = batch._replace(clean=batch.clean.at[0].set(jnp.nan), labels=jnp.zeros(BATCH, int))
    _, evaluated = evaluate(make_method("normal"), params, batch, state)
    features = np.asarray(batch.clean)[1:].reshape(BATCH - 1, -1) @ params["weights"]
    predicted = np.argmax(features @ params["kernel"] + params["bias"][None], axis=1)
    np.testing.assert_allclose(
        evaluated.metrics["accuracy_clean"], np.sum(predicted == 0) / BATCH, rtol=1e-6)


@pytest.mark.parametrize("name", ["stability", "robust", "robust_both"])
def test_noisy_features_that_are_not_finite_make_the_loss_nan(name):
    params, batch, state = linear_problem()
    batch = batch._replace(noisy=batch.noisy.at[0].set(jnp.nan))
    loss, _ = evaluate(make_method(name, robust=CONFIG), params, batch, state)
    assert jnp.isnan(loss)


@pytest.mark.parametrize("name", ["stability", "robust"])
def test_weights_of_numpy_change_no_dtype(name):
    params, batch, state = linear_problem()
    losses = [evaluate(make_method(name, robust=CONFIG, stability_weight=kind(3.0)), params, batch,
                       state, weight=kind(0.5))[0] for kind in (float, np.float64, np.array)]
    assert {loss.dtype for loss in losses} == {np.dtype(np.float32)}
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)


@pytest.mark.parametrize("name", ["normal", "noisy", "both"])
def test_the_baselines_have_the_gradient_of_the_softmax_loss_alone(name):
    params, batch, state = linear_problem()

    def softmax(params):
        views = {"normal": [batch.clean], "noisy": [batch.noisy]}.get(name, batch[:2])
        images = jnp.concatenate(views).reshape(-1, 5)
        logits = images @ params["weights"] @ params["kernel"] + params["bias"][None]
        return softmax_loss(logits, jnp.tile(batch.labels, len(views)))

    gradients = jax.jit(jax.grad(
        lambda params: evaluate(make_method(name), params, batch, state)[0]))(params)
    chex.assert_trees_all_close(gradients, jax.jit(jax.grad(softmax))(params), atol=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_an_objective_over_devices_is_that_of_the_whole_batch(name):
    params, batch, state = linear_problem()
    method = make_any(name)

    def value_and_gradients(params, batch, axis_name=None):
        result, gradients = jax.value_and_grad(
            lambda params: evaluate(method, params, batch, state, axis_name=axis_name),
            has_aux=True)(params)
        return result, gradients if axis_name is None else jax.lax.pmean(gradients, axis_name)

    whole = jax.jit(value_and_gradients)(params, batch)
    parts = jax.pmap(lambda params, batch: value_and_gradients(params, batch, "devices"),
                     "devices", in_axes=(None, 0))(
        params, jax.tree.map(lambda value: value.reshape(8, 2, *value.shape[1:]), batch))
    for device in (0, 7):
        chex.assert_trees_all_close(
            jax.tree.map(lambda leaf: leaf[device], parts),  # noqa: B023
            whole, rtol=1e-5, atol=2e-6)


# --- the loss in training loops of others -----------------------------------------------------


def clouds(seed=0):
    """Two views of points around one place per class."""
    rng = np.random.default_rng(seed)
    points = 2 * np.eye(5)[LABELS] + 0.3 * rng.normal(size=(BATCH, 5))
    views = points, points + 0.3 * rng.normal(size=points.shape)
    return [jnp.asarray(view, jnp.float32) for view in views]


def direct_loss(views, weights, state):
    """The softmax loss plus ours, from the equations, of a two-layer linear model."""
    (first, offset), (kernel, bias) = weights
    clean, noisy = (np.asarray(view, np.float64) @ first + offset for view in views)
    previous = {c: np.asarray(state.mean, np.float64)[c]
                for c in range(NUM_CLASSES) if state.seen[c]}
    running = reference.momentum_centroids(clean, LABELS, NUM_CLASSES, previous, CONFIG.momentum)
    naive = reference.naive_centroids(clean, LABELS, NUM_CLASSES)
    terms = [reference.compactness(clean, LABELS, running, CONFIG.delta_v),
             reference.margin(naive, np.asarray(kernel, np.float64).T, np.asarray(bias),
                              CONFIG.delta_d),
             reference.centroid_norm(running)]
    return (reference.softmax_loss(clean @ kernel + bias, LABELS)
            + reference.clean_loss(*terms, CONFIG.alpha, CONFIG.beta, CONFIG.gamma_reg)
            + CONFIG.lam * reference.compactness(noisy, LABELS, running, CONFIG.delta_v))


def assert_goes_down(history):
    """Every recorded loss is the direct one, and training lowers it."""
    found, expected = zip(*history, strict=True)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert found[-1] < 0.8 * found[0]


def test_robust_loss_trains_an_nnx_model():
    class Classifier(nnx.Module):

        def __init__(self, rngs):
            self.features = nnx.Linear(5, DIM, rngs=rngs)
            self.head = nnx.Linear(DIM, NUM_CLASSES, rngs=rngs)

    model = Classifier(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.02), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, state, clean, noisy):
        def objective(model):
            features = model.features(clean)
            ours, _, new_state = robust_loss(
                features, model.features(noisy), jnp.array(LABELS), model.head.kernel[...],
                model.head.bias[...], state, CONFIG)
            return softmax_loss(model.head(features), jnp.array(LABELS)) + ours, new_state

        (loss, new_state), gradients = nnx.value_and_grad(objective, has_aux=True)(model)
        optimizer.update(model, gradients)
        return loss, new_state

    state, views, history = init_centroids(NUM_CLASSES, DIM), clouds(), []
    for _ in range(10):
        weights = [(np.asarray(layer.kernel[...]), np.asarray(layer.bias[...]))
                   for layer in (model.features, model.head)]
        expected = direct_loss(views, weights, state)
        loss, state = train_step(model, optimizer, state, *views)
        history.append((float(loss), expected))
    assert_goes_down(history)
