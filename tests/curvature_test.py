"""Curvature against jax.hessian, in float64, on small networks."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

from jaxrobust import curvature, models
from jaxrobust._validate import InputError

BATCH, SIDE = 3, 4


def make_logits(activation, dtype=jnp.float64):
    """Logits of a small network with batch norm in evaluation mode; and images."""
    model = models.SmallCNN(num_classes=3, mean=(0.5,), std=(0.25,), num_features=4, width=2,
                            activation=activation, dtype=dtype)
    images = jax.random.uniform(jax.random.key(0), (BATCH, SIDE, SIDE, 1), dtype)
    # Flax makes the parameters in float32 whatever the model computes in.
    with jax.numpy_dtype_promotion("standard"):
        variables = model.init(jax.random.key(1), images, train=False)
    variables = jax.tree.map(lambda leaf: leaf.astype(dtype), variables)
    return lambda images: 3 * model.apply(variables, images, train=False).logits, images


def make_loss(activation, dtype=jnp.float64):
    """Softmax loss of that network; and images."""
    logits_fn, images = make_logits(activation, dtype)

    def loss(images):
        return optax.losses.softmax_cross_entropy_with_integer_labels(
            logits_fn(images), jnp.arange(BATCH))

    return loss, images


def dense_hessians(loss, images):
    """[B, k, k], by jax.hessian of the whole batch, whose blocks off the diagonal are zero."""
    def total(pixels):
        return jnp.sum(loss(pixels.reshape(images.shape)))

    hessian = np.asarray(jax.jit(jax.hessian(total))(images.ravel()))
    blocks = hessian.reshape(BATCH, SIDE**2, BATCH, SIDE**2)
    diagonal = np.stack([blocks[index, :, index] for index in range(BATCH)])
    np.testing.assert_allclose(np.sum(blocks**2), np.sum(diagonal**2))
    return diagonal


@pytest.mark.parametrize("activation", [jax.nn.gelu, jax.nn.relu])
def test_hvp_is_the_hessian_times_the_vector(activation):
    with jax.enable_x64(True):
        loss, images = make_loss(activation)
        v = jax.random.normal(jax.random.key(2), images.shape, images.dtype)
        expected = np.einsum("bij,bj->bi", dense_hessians(loss, images), v.reshape(BATCH, -1))
        product = jax.jit(functools.partial(curvature.hvp, loss))(images, v)
        np.testing.assert_allclose(product.reshape(BATCH, -1), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("activation", [jax.nn.gelu, jax.nn.relu])
def test_squared_frobenius_is_that_of_the_hessian_within_its_standard_error(activation):
    with jax.enable_x64(True):
        loss, images = make_loss(activation)
        exact = np.sum(dense_hessians(loss, images) ** 2, axis=(1, 2))
        estimate = jax.jit(functools.partial(
            curvature.squared_frobenius, loss, num_probes=4000))(images, jax.random.key(3))
        error = np.abs(estimate.value - exact)
        assert np.all(error < 4 * estimate.standard_error)
        assert np.all(estimate.standard_error < 0.05 * exact)


def test_the_standard_error_is_the_spread_of_repeated_estimates():
    loss, images = make_loss(jax.nn.gelu, jnp.float32)
    measure = jax.jit(functools.partial(curvature.squared_frobenius, loss, num_probes=20))
    estimates = [measure(images, jax.random.key(seed)) for seed in range(100)]
    spread = np.std([estimate.value for estimate in estimates], axis=0, ddof=1)
    claimed = np.mean([estimate.standard_error for estimate in estimates], axis=0)
    np.testing.assert_allclose(claimed, spread, rtol=0.4)


def test_finite_differences_converge_to_the_exact_value_on_a_smooth_network():
    with jax.enable_x64(True):
        loss, images = make_loss(jax.nn.gelu)
        # The same key draws the same probes: what is left is the truncation error.
        exact = curvature.squared_frobenius(loss, images, jax.random.key(3), num_probes=5).value
        errors = []
        for step in (1e-2, 1e-3, 1e-4):
            approximate = jax.jit(functools.partial(
                curvature.finite_difference_curvature, loss, step=step, num_probes=5))(
                images, jax.random.key(3)).value
            errors.append(np.max(np.abs(approximate / exact - 1)))
        assert errors[0] > 5 * errors[1] > 25 * errors[2]
        assert errors[2] < 1e-3


def test_finite_differences_are_another_thing_on_a_network_with_kinks():
    with jax.enable_x64(True):
        loss, images = make_loss(jax.nn.relu)
        key = jax.random.key(3)
        exact = curvature.squared_frobenius(loss, images, key, num_probes=20).value
        stepped = curvature.finite_difference_curvature(
            loss, images, key, step=1e-1, num_probes=20).value
        assert np.all(stepped > 2 * exact)


class CurvatureVariants(chex.TestCase):

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters("squared_frobenius", "finite_difference_curvature")
    def test_an_image_does_not_see_its_batch(self, name):
        loss, images = make_loss(jax.nn.gelu, jnp.float32)
        measure = self.variant(functools.partial(getattr(curvature, name), loss, num_probes=3))
        whole = measure(images, jax.random.key(0))
        other = measure(images.at[1:].set(0.3), jax.random.key(0))
        chex.assert_shape(whole.value, (BATCH,))
        np.testing.assert_allclose(whole.value[0], other.value[0], rtol=1e-4)
        np.testing.assert_allclose(
            whole.standard_error[0], other.standard_error[0], rtol=1e-3)

    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_hvp(self):
        def loss(x):
            return jnp.sum(x**3, axis=-1)  # its Hessian is diag(6 x)

        x, v = jnp.array([[1.0, -2.0], [3.0, 0.5]]), jnp.array([[1.0, 1.0], [2.0, -4.0]])
        product = self.variant(functools.partial(curvature.hvp, loss))(x, v)
        np.testing.assert_allclose(product, 6 * x * v, rtol=1e-6)


def test_the_spectrum_of_a_relu_network_is_that_of_its_hessian():
    with jax.enable_x64(True):
        logits_fn, images = make_logits(jax.nn.relu)
        loss, _ = make_loss(jax.nn.relu)
        expected = np.linalg.eigvalsh(dense_hessians(loss, images))
        spectrum = jax.jit(functools.partial(
            curvature.piecewise_linear_spectrum, logits_fn))(images)
        # The Hessian has 16 eigenvalues, all but two of them 0.
        np.testing.assert_allclose(spectrum, expected[:, -3:], rtol=1e-9, atol=1e-12)
        assert np.all(expected[:, -2:] > 1e-6)


def test_for_a_smooth_network_the_spectrum_is_not_that_of_the_hessian():
    with jax.enable_x64(True):
        logits_fn, images = make_logits(jax.nn.gelu)
        loss, _ = make_loss(jax.nn.gelu)
        exact = np.sum(dense_hessians(loss, images) ** 2, axis=(1, 2))
        gauss_newton = np.sum(
            curvature.piecewise_linear_spectrum(logits_fn, images) ** 2, axis=1)
        assert np.all(np.abs(gauss_newton / exact - 1) > 1e-3)


@pytest.mark.parametrize("confidence", [1.0, 10.0, 30.0])
def test_the_spectrum_keeps_its_digits_for_confident_images(confidence):
    kernel = np.random.default_rng(0).normal(size=(5, 4))
    x = np.random.default_rng(1).normal(size=(6, 5))
    offset = confidence * np.eye(4)[np.arange(6) % 4]

    def spectrum(dtype):
        return curvature.piecewise_linear_spectrum(
            lambda x: x @ jnp.asarray(kernel, dtype) + jnp.asarray(offset, dtype),
            jnp.asarray(x, dtype))

    single = spectrum(jnp.float32)
    with jax.enable_x64(True):
        double = spectrum(jnp.float64)
    np.testing.assert_allclose(single[:, -1], double[:, -1], rtol=2e-5)


class SpectrumVariants(chex.TestCase):

    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_a_linear_classifier(self):
        kernel = jnp.array([[1.0, -1.0]])
        spectrum = self.variant(functools.partial(
            curvature.piecewise_linear_spectrum, lambda x: x @ kernel))(jnp.zeros((3, 1)))
        np.testing.assert_allclose(spectrum, np.tile([0.0, 1.0], (3, 1)), atol=1e-6)


def test_one_probe_has_no_standard_error():
    loss, images = make_loss(jax.nn.gelu, jnp.float32)
    estimate = curvature.squared_frobenius(loss, images, jax.random.key(0), num_probes=1)
    assert np.all(np.isfinite(estimate.value)) and np.all(np.isnan(estimate.standard_error))


def test_bad_arguments_are_named():
    loss, images = make_loss(jax.nn.gelu, jnp.float32)
    with pytest.raises(InputError, match="Expected v of the shape of x"):
        curvature.hvp(loss, images, images[:1])
    with pytest.raises(InputError, match="Expected num_probes=0"):
        curvature.squared_frobenius(loss, images, jax.random.key(0), num_probes=0)
    with pytest.raises(InputError, match="Expected step=0.0"):
        curvature.finite_difference_curvature(loss, images, jax.random.key(0), step=0.0)
