"""The softmax loss keeps its digits, and those of its derivatives, at every confidence."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import special

from jaxrobust import softmax_cross_entropy, softmax_loss
from jaxrobust._validate import InputError

pytestmark = pytest.mark.usefixtures("full_compilation")

GAPS = (0.0, 17.0, 20.0, 45.0, 80.0)

BATCH, CLASSES = 16, 3
LABELS = np.array([0, 2, 1, 1, 0, 0, 2, 2, 0, 1, 2, 0, 0, 1, 1, 1], np.int32)


def reference(z, label):
    """Value, gradient and Hessian of one example in float64, without cancellation.

    The gradient is p - e_y and the Hessian diag(p) - p p^T; where p_i is nearly 1, 1 - p_i is the
    sum of the others.
    """
    z = np.asarray(z, np.float64)
    top = np.argmax(z)
    odds = np.exp(z - z[top])
    p = odds / odds.sum()
    others = np.array([np.delete(p, i).sum() for i in range(len(p))])
    gradient = np.where(np.arange(len(p)) == label, -others, p)
    hessian = np.diag(p * others) - (np.outer(p, p) - np.diag(p**2))
    return z[top] - z[label] + np.log1p(np.delete(odds, top).sum()), gradient, hessian


@jax.jit
def derivatives(logits, labels):
    """Value [B], gradient [B, C] and Hessian [B, C, C]."""
    def of_one(z, label):
        return softmax_cross_entropy(z[None], label[None])[0]

    return tuple(jax.vmap(f)(logits, labels)
                 for f in (of_one, jax.grad(of_one), jax.hessian(of_one)))


CASES = [([gap, 0.0, -1.0], label) for gap in GAPS for label in range(3)] + [
    ([2.0, 2.0, -30.0], label) for label in range(3)]  # a tie
"""Logits and label: right, wrong, and wrong by far."""


def test_value_gradient_and_hessian_are_right_in_float32_at_every_gap():
    logits = jnp.array([z for z, _ in CASES], jnp.float32)
    found = derivatives(logits, jnp.array([label for _, label in CASES]))
    for index, (z, label) in enumerate(CASES):
        for name, values, expected in zip(
                ("value", "gradient", "hessian"), found, reference(z, label), strict=True):
            np.testing.assert_allclose(
                values[index], expected, rtol=2e-6, atol=1e-37, err_msg=f"{name} {z} {label}")


def test_a_confident_right_prediction_has_the_value_of_a_high_precision_computation():
    # log(1 + exp(-20) + exp(-21)) and log(1 + exp(-45) + exp(-46)), with 60 decimal digits.
    found = softmax_cross_entropy(jnp.array([[20.0, 0, -1], [45.0, 0, -1]]), jnp.array([0, 0]))
    np.testing.assert_allclose(found, [2.8194096612552e-09, 3.9155803163048e-20], rtol=1e-6)


def test_all_classes_equal_are_log_c():
    np.testing.assert_allclose(
        softmax_cross_entropy(jnp.full((2, 8), 3.0), jnp.array([0, 5])), np.log(8), rtol=1e-6)


def test_a_class_that_is_ruled_out_takes_no_part():
    logits = jnp.array([[-jnp.inf, 0.0, 1.0], [-jnp.inf, 0.0, 1.0]])
    value, gradient, hessian = derivatives(logits, jnp.array([1, 2]))
    for index, label in enumerate((0, 1)):
        expected = reference([0.0, 1.0], label)
        np.testing.assert_allclose(value[index], expected[0], rtol=1e-6)
        np.testing.assert_allclose(gradient[index], [0, *expected[1]], rtol=1e-6)
        np.testing.assert_allclose(hessian[index, 1:, 1:], expected[2], rtol=1e-6)
    # It is certain not to be what it is.
    assert softmax_cross_entropy(logits[:1], jnp.array([0])).tolist() == [np.inf]


def test_what_does_not_count_has_no_loss_and_no_gradient_whatever_its_logits_are():
    logits = jnp.array([[jnp.nan, 1.0, jnp.inf], [1.0, 2.0, 3.0], [jnp.nan, 1.0, 0.0],
                        [1.0, 2.0, 3.0]])
    labels = jnp.array([-1, 3, 100, 2])
    value, gradient, hessian = derivatives(logits, labels)
    for part in (value, gradient, hessian):
        np.testing.assert_array_equal(part[:3], 0)
    np.testing.assert_allclose(value[3], reference([1, 2, 3], 2)[0], rtol=1e-6)
    assert np.isnan(softmax_cross_entropy(logits[:1], jnp.array([1]))[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_keeps_its_dtype_and_its_own_digits(dtype):
    # float16 ends at 6e-8.
    logits = jnp.array([[8.0, 0, -1], [8.0, 0, -1], [1.0, 1, 1]], dtype)
    labels = jnp.array([0, 2, 1])
    value, gradient, _ = derivatives(logits, labels)
    assert value.dtype == gradient.dtype == jnp.dtype(dtype)
    for index, label in enumerate(labels.tolist()):
        expected = reference(np.asarray(logits[index], np.float64), label)
        np.testing.assert_allclose(np.float64(value[index]), expected[0], rtol=0.02)
        np.testing.assert_allclose(np.asarray(gradient[index], np.float64), expected[1], rtol=0.03)


@hypothesis.given(
    logits=st.lists(st.floats(-60, 60, width=32), min_size=5, max_size=5), label=st.integers(0, 4))
@hypothesis.settings(max_examples=100)
def test_it_is_the_softmax_loss_of_float64(logits, label):
    value, gradient, _ = derivatives(jnp.array([logits], jnp.float32), jnp.array([label]))
    expected = reference(np.float32(logits), label)
    assert value[0] >= 0
    np.testing.assert_allclose(value[0], expected[0], rtol=1e-5, atol=1e-37)
    np.testing.assert_allclose(gradient[0], expected[1], rtol=2e-5, atol=1e-37)
    # The parts of the gradient cancel, to the rounding of the largest.
    largest = np.abs(expected[1]).max()
    np.testing.assert_allclose(np.sum(gradient[0]), 0, atol=1e-6 * largest + 1e-37)


def test_shapes_and_dtypes_that_do_not_fit_are_named():
    with pytest.raises(InputError, match=r"Expected labels of shape \[B\] with B=2"):
        softmax_cross_entropy(jnp.zeros((2, 3)), jnp.zeros(3, jnp.int32))
    with pytest.raises(InputError, match="Expected labels of an integer dtype, got float32"):
        softmax_cross_entropy(jnp.zeros((2, 3)), jnp.zeros(2))
    with pytest.raises(InputError, match="Expected logits of shape"):
        softmax_cross_entropy(jnp.zeros(3), jnp.zeros(3, jnp.int32))


def test_label_smoothing_is_the_cross_entropy_with_smoothed_labels():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(BATCH, CLASSES)).astype(np.float32)
    logits[3] = np.nan
    labels = np.where(np.arange(BATCH) == 3, -1, LABELS)
    kept = np.delete(np.arange(BATCH), 3)
    log_p = special.log_softmax(logits[kept].astype(np.float64), axis=1)
    targets = 0.8 * np.eye(CLASSES)[LABELS[kept]] + 0.2 / CLASSES
    value, gradient = jax.jit(jax.value_and_grad(
        lambda logits: softmax_loss(logits, labels, label_smoothing=0.2)))(logits)
    np.testing.assert_allclose(value, -np.mean(np.sum(targets * log_p, axis=1)), rtol=1e-6)
    np.testing.assert_allclose(
        gradient[kept], (np.exp(log_p) - targets) / len(kept), rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(gradient[3], np.zeros(CLASSES))
    # With weights the smooth part of each label is weighted by class, as PyTorch does.
    weights = np.array([0.25, 3.0, 1.5])
    expected = (-np.sum(targets * weights * log_p)
                + np.sum(0.8 * (weights[LABELS[kept]][:, None] - weights)
                         * np.eye(CLASSES)[LABELS[kept]] * log_p))
    np.testing.assert_allclose(
        softmax_loss(logits, labels, label_smoothing=0.2, class_weights=weights),
        expected / np.sum(weights[LABELS[kept]]), rtol=1e-5)


@pytest.mark.parametrize("weights", [None, (0.25, 3.0, 1.5)])
def test_label_smoothing_is_pytorchs(weights):
    torch = pytest.importorskip("torch")
    logits = np.random.default_rng(0).normal(size=(BATCH, CLASSES)).astype(np.float32)
    theirs = torch.nn.CrossEntropyLoss(
        weight=None if weights is None else torch.tensor(weights), label_smoothing=0.2)(
            torch.tensor(logits), torch.tensor(LABELS, dtype=torch.long))
    ours = softmax_loss(logits, LABELS, label_smoothing=0.2, class_weights=weights)
    np.testing.assert_allclose(ours, theirs.item(), rtol=1e-6)


@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_a_label_smoothing_that_is_no_share_is_refused(value):
    with pytest.raises(InputError, match=rf"^Expected label_smoothing={value} in \[0, 1\)\.$"):
        softmax_loss(jnp.zeros((BATCH, CLASSES)), LABELS, label_smoothing=value)
