"""Weights of the classes in the softmax losses, against the weighted mean in NumPy's float64."""


import jax
import jax.numpy as jnp
import methods_test
import numpy as np
import pytest
import reference

from jaxrobust import InputError
from jaxrobust.losses import softmax_loss
from jaxrobust.methods import PAPER_METHODS, make_method

WEIGHTS = (0.25, 3.0, 1.5)
LABELS = methods_test.LABELS


def softmax_of_views(params, batch):
    """By view, the plain and the weighted softmax loss, in float64."""
    weights, kernel, bias = (np.asarray(params[key], np.float64)
                             for key in ("weights", "kernel", "bias"))
    losses = {}
    for view in ("clean", "noisy"):
        images = np.asarray(getattr(batch, view), np.float64).reshape(len(LABELS), -1)
        logits = images @ weights @ kernel + bias
        losses[view] = (reference.softmax_loss(logits, LABELS),
                        reference.weighted_softmax_loss(logits, LABELS, WEIGHTS))
    return losses


@pytest.mark.parametrize("name", PAPER_METHODS)
def test_every_method_has_the_weighted_mean_in_the_place_of_the_mean(name):
    params, batch, state = methods_test.linear_problem()
    method = make_method(name, robust=methods_test.CONFIG, class_weights=WEIGHTS)
    loss, evaluated = methods_test.evaluate(method, params, batch, state)
    views = {"noisy": ["noisy"], "both": ["clean", "noisy"], "robust_both": ["clean", "noisy"]}.get(
        name, ["clean"])
    plain, weighted = np.mean([softmax_of_views(params, batch)[view] for view in views], axis=0)
    assert abs(weighted - plain) > 0.1
    # The terms beside the softmax loss are as they were.
    rest = methods_test.by_hand(params, batch, state, name, 1.0) - plain
    np.testing.assert_allclose(loss, rest + weighted, rtol=1e-5)
    np.testing.assert_allclose(evaluated.metrics["softmax"], weighted, rtol=1e-5)


def test_equal_weights_are_none_and_a_common_factor_changes_nothing():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)), jnp.float32)
    for weights, others in (((0.01,) * 3, None), (WEIGHTS, 1000 * np.array(WEIGHTS))):
        np.testing.assert_allclose(
            softmax_loss(logits, LABELS, class_weights=weights),
            softmax_loss(logits, LABELS, class_weights=others), rtol=1e-6)


def test_examples_that_do_not_count_have_no_weight_either():
    logits = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    labels, kept = np.array([0, -1, 2, 3, 1, -7]), np.array([0, 2, 4])
    logits[1] = np.nan

    def loss(logits):
        return softmax_loss(logits, labels, class_weights=WEIGHTS)

    value, gradient = jax.jit(jax.value_and_grad(loss))(logits)
    np.testing.assert_allclose(value, reference.weighted_softmax_loss(
        logits[kept], labels[kept], WEIGHTS), rtol=1e-6)
    shares = np.array(WEIGHTS)[labels[kept]] / np.sum(np.array(WEIGHTS)[labels[kept]])
    expected = (np.asarray(jax.nn.softmax(logits[kept])) - np.eye(3)[labels[kept]])
    np.testing.assert_allclose(gradient[kept], shares[:, None] * expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(gradient[np.array([1, 3, 5])], 0)
    assert softmax_loss(logits, np.full(6, -1), class_weights=WEIGHTS) == 0


def test_a_batch_over_devices_has_the_loss_and_the_gradient_of_the_whole():
    order = np.argsort(LABELS)  # So that most devices hold one class alone.
    params, batch, state = methods_test.linear_problem()
    batch = jax.tree.map(lambda leaf: leaf[order], batch)
    method = make_method("both", class_weights=WEIGHTS)

    def value_and_gradient(batch, axis_name=None):
        def loss(params):
            return methods_test.evaluate(method, params, batch, state, axis_name=axis_name)[0]

        value, gradient = jax.value_and_grad(loss)(params)
        return value, gradient if axis_name is None else jax.lax.pmean(gradient, axis_name)

    whole = jax.jit(value_and_gradient)(batch)
    shares = jax.tree.map(lambda leaf: leaf.reshape(8, 2, *leaf.shape[1:]), batch)
    parts = jax.pmap(lambda share: value_and_gradient(share, "devices"), "devices")(shares)
    for device in range(8):
        jax.tree.map(lambda part, all_of_it, device=device: np.testing.assert_allclose(
            part[device], all_of_it, rtol=1e-5, atol=1e-6), parts, whole)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: make_method("normal", class_weights=(1.0, 0.0)),
     "Expected class_weights[1]=0.0 in (0, inf)."),
    (lambda: make_method("normal", class_weights=(1.0, np.inf)),
     "Expected class_weights[1]=inf in (0, inf)."),
    (lambda: softmax_loss(jnp.zeros((2, 3)), np.zeros(2, np.int32), class_weights=(1.0, 2.0)),
     "Expected class_weights of shape [C] with C=3, got (2,)."),
])
def test_weights_that_cannot_be_used_are_one_line(call, message):
    with pytest.raises(InputError) as error:
        call()
    assert str(error.value) == message
