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

pytestmark = pytest.mark.usefixtures("quick_compilation")

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


SIZE = 64
SPECTRA = {
    "flat": np.ones(SIZE),
    "tiny": 1e-9 / (1 + np.arange(SIZE)),
    "large and decaying": 1e4 * 0.7 ** np.arange(SIZE),
    "low rank": np.r_[3.0, -2.0, 0.1, np.zeros(SIZE - 3)],
    "indefinite": np.random.default_rng(5).normal(size=SIZE),
    "zero": np.zeros(SIZE),
}


def make_quadratics(dtype):
    """Losses x^T A x / 2, a matrix of each of SPECTRA for each image; and points."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0]
    matrices = jnp.asarray(
        np.stack([(basis * spectrum) @ basis.T for spectrum in SPECTRA.values()]), dtype)

    def loss(x):
        return jnp.einsum("bi,bij,bj->b", x, matrices, x) / 2

    return loss, jnp.asarray(rng.normal(size=(len(SPECTRA), SIZE)), dtype)


TRACES = np.array([spectrum.sum() for spectrum in SPECTRA.values()])
SQUARED_NORMS = np.array([np.sum(spectrum**2) for spectrum in SPECTRA.values()])
PROBES = {"num_probes": 60, "chunk_size": 60}
DRAWS = {"num_draws": 60, "chunk_size": 60, "sigma": 1.0}
ESTIMATORS = {
    "normal probes": (curvature.squared_frobenius, PROBES, SQUARED_NORMS),
    "rademacher probes": (
        curvature.squared_frobenius, {**PROBES, "distribution": "rademacher"}, SQUARED_NORMS),
    "finite differences": (
        curvature.finite_difference_curvature, {**PROBES, "step": 1.0}, SQUARED_NORMS),
    "smoothed": (lambda *args, **kwargs: curvature.smoothed_curvature(
        *args, **kwargs).squared_frobenius, DRAWS, SQUARED_NORMS),
    "smoothed trace": (lambda *args, **kwargs: curvature.smoothed_curvature(
        *args, **kwargs).trace, DRAWS, TRACES),
    "leave one out": (curvature.leave_one_out_squared_frobenius, {"num_probes": 16},
                      SQUARED_NORMS),
    "trace": (curvature.hessian_trace, {"num_probes": 16}, TRACES),
}


@pytest.mark.parametrize("name", list(ESTIMATORS))
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_estimates_are_unbiased_and_their_standard_errors_honest(name, precision):
    measure, options, exact = ESTIMATORS[name]
    with jax.enable_x64(precision == "float64"):
        loss, x = make_quadratics(precision)
        estimates = jax.jit(lambda keys: jax.lax.map(
            functools.partial(measure, loss, x, **options), keys))(
            jax.random.split(jax.random.key(0), 200))
    values, errors = (np.asarray(part, np.float64) for part in estimates)
    # Rounding, which 200 estimates share, is not a bias. float32 smooths by differences of
    # gradients at points of size 1.
    rounding = (1e-4 if precision == "float32" else 1e-10) * np.abs(exact)
    spread = np.std(values, axis=0, ddof=1)
    assert np.all(np.abs(values.mean(axis=0) - exact) <= 4 * spread / 200**0.5 + rounding)
    # Two standard errors should cover in 95 of 100; of 200, 88 % is five deviations below.
    covered = np.mean(np.abs(values - exact) <= 2.1 * errors + rounding, axis=0)
    assert np.all(covered > 0.88), dict(zip(SPECTRA, covered, strict=True))
    # And they are not just large: where there is chance, they are of its size.
    chance = spread > 10 * rounding + 1e-300
    assert np.all(np.mean(errors, axis=0)[chance] < 2 * spread[chance])


def test_leave_one_out_is_closer_by_orders_where_the_spectrum_decays():
    loss, x = make_quadratics("float32")
    at = list(SPECTRA).index("large and decaying")

    def typical_error(measure, num_probes):
        measure = jax.jit(functools.partial(measure, loss, num_probes=num_probes))
        values = [measure(x, jax.random.key(seed)).value[at] for seed in range(20)]
        return np.sqrt(np.mean(np.square(np.asarray(values) / SQUARED_NORMS[at] - 1)))

    # 12 probes of the first take 24 products.
    assert (typical_error(curvature.leave_one_out_squared_frobenius, 12)
            < 0.05 * typical_error(curvature.squared_frobenius, 24))


@pytest.mark.parametrize("name", ["gelu", "relu"])
def test_every_measure_of_a_network_is_that_of_its_hessian(name):
    activation = getattr(jax.nn, name)
    with jax.enable_x64(True):
        loss, images = make_loss(activation)
        hessians = dense_hessians(loss, images)
        eigenvalues = np.linalg.eigvalsh(hessians)
        # As many products as dimensions: all are exact.
        trace = jax.jit(functools.partial(curvature.hessian_trace, loss, num_probes=8))(
            images, jax.random.key(0))
        np.testing.assert_allclose(trace.value, eigenvalues.sum(axis=1), rtol=1e-9)
        norm = jax.jit(functools.partial(
            curvature.leave_one_out_squared_frobenius, loss, num_probes=8))(
            images, jax.random.key(0))
        np.testing.assert_allclose(norm.value, np.sum(eigenvalues**2, axis=1), rtol=1e-9)
        ritz = jax.jit(functools.partial(curvature.ritz_values, loss, num_products=SIDE**2))(
            images, jax.random.key(0))
        size = np.abs(eigenvalues).max()
        np.testing.assert_allclose(ritz.value, eigenvalues, atol=1e-9 * size)
        top = jax.jit(functools.partial(curvature.top_eigenvalues, loss, k=3))(
            images, jax.random.key(0))
        order = np.argsort(-np.abs(eigenvalues), axis=1)[:, :3]
        expected = np.take_along_axis(eigenvalues, order, axis=1)
        if name == "relu":  # Two eigenvalues only; the third is rounding.
            top, expected = top[:, :2], expected[:, :2]
        np.testing.assert_allclose(top, expected, rtol=1e-8)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_an_eigenvalue_lies_within_the_residual_of_every_ritz_value(precision):
    with jax.enable_x64(precision == "float64"):
        loss, x = make_quadratics(precision)
        ritz = jax.jit(functools.partial(curvature.ritz_values, loss, num_products=10))(
            x, jax.random.key(1))
        eps = np.finfo(precision).eps
        chex.assert_tree_all_finite(ritz)
        np.testing.assert_allclose(np.sum(ritz.weight, axis=1), 1, rtol=30 * eps)
        for index, spectrum in enumerate(SPECTRA.values()):
            distance = np.abs(np.asarray(ritz.value)[index][:, None] - spectrum[None]).min(axis=1)
            slack = 50 * eps * np.abs(spectrum).max()
            assert np.all(distance <= np.asarray(ritz.residual)[index] + slack)
        # The ends come first: the largest of a decaying spectrum are there.
        at = list(SPECTRA).index("large and decaying")
        np.testing.assert_allclose(ritz.value[at, -3:], [4900, 7000, 10000], rtol=1e-3)


def test_the_spectral_density_is_that_of_all_eigenvalues():
    with jax.enable_x64(True):
        loss, x = make_quadratics("float64")
        found = jax.jit(functools.partial(
            curvature.spectral_density, loss, num_products=SIZE, num_probes=60,
            relative_width=0.1))(x, jax.random.key(0))
        step = found.grid[:, 1] - found.grid[:, 0]
        np.testing.assert_allclose(np.sum(found.density, axis=1) * step, 1, atol=1e-3)
        at = list(SPECTRA).index("indefinite")
        spectrum = SPECTRA["indefinite"]
        width = 0.1 * (spectrum.max() - spectrum.min())
        grid = np.asarray(found.grid[at])
        exact = np.mean(np.exp(-((grid[:, None] - spectrum) / width) ** 2 / 2), axis=1) / (
            width * (2 * np.pi) ** 0.5)
        off = np.abs(found.density[at] - exact) / np.asarray(found.standard_error[at])
        assert np.mean(off < 2) > 0.8 and np.max(found.standard_error[at]) < 0.1 * exact.max()


def test_smoothing_sees_kinks_and_the_pointwise_hessian_does_not():
    with jax.enable_x64(True):
        normals = jnp.asarray(np.random.default_rng(2).normal(size=(5, 7)))
        offsets = jnp.asarray(np.random.default_rng(3).normal(size=5))
        x, sigma = jnp.zeros((2, 7)), 0.4

        def loss(x):
            return jnp.sum(jax.nn.relu(x @ normals.T + offsets[None]), axis=1)

        # A kink at a.x + c = 0 has, averaged, the Hessian a a^T times the density of a.x + c at 0.
        lengths = sigma * np.linalg.norm(normals, axis=1)
        density = np.exp(-(np.asarray(offsets) / lengths) ** 2 / 2) / (
            lengths * (2 * np.pi) ** 0.5)
        exact = np.einsum("k,ki,kj->ij", density, normals, normals)
        found = jax.jit(functools.partial(
            curvature.smoothed_curvature, loss, sigma=sigma, num_draws=1500, chunk_size=500))(
            x, jax.random.key(0))
        for estimate, value in ((found.squared_frobenius, np.sum(exact**2)),
                                (found.trace, np.trace(exact))):
            assert np.all(np.abs(estimate.value - value) < 4 * estimate.standard_error)
            assert np.all(estimate.standard_error < 0.1 * value)
        np.testing.assert_array_equal(
            curvature.squared_frobenius(loss, x, jax.random.key(0)).value, 0)


def test_probes_are_drawn_until_the_error_asked_for():
    loss, x = make_quadratics("float32")
    measure = functools.partial(curvature.squared_frobenius, loss, num_probes=2000)
    loose, tight = (jax.jit(functools.partial(measure, rtol=rtol))(x, jax.random.key(0))
                    for rtol in (0.2, 0.05))
    rest = np.array([name != "zero" for name in SPECTRA])
    for estimate, rtol in ((loose, 0.2), (tight, 0.05)):
        assert np.all(estimate.standard_error <= rtol * estimate.value)
        off = np.abs(estimate.value - SQUARED_NORMS)[rest] / SQUARED_NORMS[rest]
        assert np.all(off < 4 * rtol)
    # Nor many more than needed.
    assert np.all(tight.standard_error[rest] > 0.5 * 0.05 * tight.value[rest])
    # An image that was done early is left as it was, whatever the others need.
    alone = jax.jit(functools.partial(
        curvature.squared_frobenius, lambda one: loss(jnp.concatenate([one, x[1:]]))[:1],
        num_probes=2000, rtol=0.05))(x[:1], jax.random.key(0))
    np.testing.assert_allclose(tight.value[0], alone.value[0], rtol=1e-5)
    limited = jax.jit(functools.partial(
        curvature.squared_frobenius, loss, num_probes=10, rtol=1e-6))(x, jax.random.key(0))
    assert np.all(np.isfinite(limited.value))


@pytest.mark.parametrize("rtol", [None, 0.1])
@pytest.mark.parametrize("chunk_size", [2, 3, 100])
def test_the_chunk_size_changes_nothing(chunk_size, rtol):
    with jax.enable_x64(True):
        loss, images = make_loss(jax.nn.gelu)
        measure = functools.partial(curvature.squared_frobenius, loss, num_probes=11, rtol=rtol)
        one, many = (jax.jit(functools.partial(measure, chunk_size=size))(
            images, jax.random.key(0)) for size in (1, chunk_size))
        chex.assert_trees_all_close(one, many, rtol=1e-12)


MEASURES = {
    "squared_frobenius": functools.partial(curvature.squared_frobenius, num_probes=3),
    "until": functools.partial(
        curvature.squared_frobenius, num_probes=40, rtol=0.2, chunk_size=4),
    "rademacher": functools.partial(
        curvature.squared_frobenius, num_probes=3, distribution="rademacher"),
    "finite_difference": functools.partial(curvature.finite_difference_curvature, num_probes=3),
    "smoothed": functools.partial(curvature.smoothed_curvature, sigma=0.1, num_draws=4),
    "trace": functools.partial(curvature.hessian_trace, num_probes=3),
    "leave_one_out": functools.partial(curvature.leave_one_out_squared_frobenius, num_probes=3),
    "top_eigenvalues": functools.partial(curvature.top_eigenvalues, k=2, num_products=5),
    "surface": lambda *args, **kwargs: curvature.loss_surface(
        *args, extent=0.5, resolution=3, **kwargs).values,
}


@pytest.mark.parametrize("name", list(MEASURES))
def test_the_batch_and_the_devices_change_nothing(name):
    """Image by image, in a batch, and a batch spread over four devices."""
    with jax.enable_x64(True):
        logits_fn, images = make_logits(jax.nn.gelu)
        images = jnp.concatenate([images, 1 - images[:1]])
        labels, indices = jnp.array([0, 1, 2, 0]), jnp.array([7, 3, 11, 5])

        @jax.jit
        def measure(images, labels, indices):
            def loss(images):
                return optax.losses.softmax_cross_entropy_with_integer_labels(
                    logits_fn(images), labels)
            return MEASURES[name](loss, images, jax.random.key(0), indices=indices)

        whole = measure(images, labels, indices)
        single = [measure(images[i : i + 1], labels[i : i + 1], indices[i : i + 1])
                  for i in range(4)]
        chex.assert_trees_all_close(
            whole, jax.tree.map(lambda *parts: jnp.concatenate(parts), *single), rtol=1e-9)
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
        spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        chex.assert_trees_all_close(
            whole, measure(*jax.device_put((images, labels, indices), spread)), rtol=1e-9)


def test_memory_does_not_grow_with_the_probes():
    model = models.create_model("resnet18", num_classes=10, num_features=8, width=2,
                                mean=(0.5,) * 3, std=(0.25,) * 3)
    images = jnp.zeros((4, 16, 16, 3))
    variables = model.init(jax.random.key(0), images, train=False)

    def loss(images):
        return jnp.sum(jax.nn.log_softmax(
            model.apply(variables, images, train=False).logits)[:, :1], axis=1)

    def temporary(measure, num_probes):
        compiled = jax.jit(functools.partial(measure, loss, num_probes=num_probes)).lower(
            images, jax.random.key(0)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    for measure in (curvature.squared_frobenius, curvature.finite_difference_curvature):
        assert temporary(measure, 8) < 1.3 * temporary(measure, 2)


def test_curvature_of_normalised_inputs_is_scaled_by_their_std():
    with jax.enable_x64(True):
        loss, images = make_loss(jax.nn.relu)
        mean, std = (0.4,), (0.2,)
        scaled = curvature.normalised_inputs(loss, mean, std)
        normalised = (images - 0.4) / 0.2
        np.testing.assert_allclose(scaled(normalised), loss(images), rtol=1e-12)
        key = jax.random.key(0)
        exact = functools.partial(curvature.squared_frobenius, num_probes=2, chunk_size=2)
        np.testing.assert_allclose(
            jax.jit(functools.partial(exact, scaled))(normalised, key).value,
            0.2**4 * jax.jit(functools.partial(exact, loss))(images, key).value, rtol=1e-9)
        # A step of a normalised image is 0.2 of that of a pixel.
        stepped = functools.partial(
            curvature.finite_difference_curvature, num_probes=2, chunk_size=2)
        np.testing.assert_allclose(
            jax.jit(functools.partial(stepped, scaled, step=0.1))(normalised, key).value,
            0.2**4 * jax.jit(functools.partial(stepped, loss, step=0.02))(images, key).value,
            rtol=1e-9)


def test_channels_of_different_std_scale_the_hessian_on_both_sides():
    with jax.enable_x64(True):
        matrix = jnp.asarray(np.random.default_rng(0).normal(size=(6, 6)))
        std = np.array([0.1, 0.2, 0.3])

        def loss(x):
            flat = x.reshape(len(x), -1)
            return jnp.einsum("bi,ij,bj->b", flat, matrix, flat) / 2

        scaled = curvature.normalised_inputs(loss, (0.5, 0.4, 0.3), std)
        hessian = (np.asarray(matrix) + np.asarray(matrix).T) / 2
        factors = np.tile(std, 2)
        v = np.random.default_rng(1).normal(size=(1, 2, 3))
        np.testing.assert_allclose(
            curvature.hvp(scaled, jnp.zeros((1, 2, 3)), jnp.asarray(v)).ravel(),
            factors * (hessian @ (factors * v.ravel())), rtol=1e-12)


def test_the_surface_is_the_loss_along_its_gradient_and_across():
    with jax.enable_x64(True):
        loss, images = make_loss(jax.nn.gelu)
        surface = curvature.loss_surface(
            loss, images, jax.random.key(0), extent=0.3, resolution=5)
        chex.assert_shape(surface.values, (BATCH, 5, 5))
        np.testing.assert_allclose(surface.offsets, [-0.3, -0.15, 0, 0.15, 0.3], atol=1e-15)
        np.testing.assert_allclose(surface.values[:, 2, 2], loss(images), rtol=1e-12)
        u, w = (direction.reshape(BATCH, -1) for direction in (
            surface.gradient_direction, surface.orthogonal_direction))
        np.testing.assert_allclose(np.sum(u * w, axis=1), 0, atol=1e-14)
        for direction in (u, w):
            np.testing.assert_allclose(np.linalg.norm(direction, axis=1), 1, rtol=1e-12)
        moved = images + 0.3 * surface.gradient_direction - 0.15 * surface.orthogonal_direction
        np.testing.assert_allclose(surface.values[:, 4, 1], loss(moved), rtol=1e-12)
        gradient = jax.grad(lambda x: jnp.sum(loss(x)))(images).reshape(BATCH, -1)
        np.testing.assert_allclose(
            u, gradient / np.linalg.norm(gradient, axis=1, keepdims=True), rtol=1e-9)


def test_the_surface_of_a_flat_loss_is_flat():
    surface = curvature.loss_surface(lambda x: jnp.zeros(len(x)), jnp.ones((2, 3)),
                                     jax.random.key(0), extent=1.0, resolution=3)
    chex.assert_tree_all_finite(surface)
    np.testing.assert_array_equal(surface.gradient_direction, 0)


@pytest.mark.parametrize("name", ["gelu", "relu"])
def test_the_gap_tells_the_hessian_from_its_gauss_newton_part(name):
    with jax.enable_x64(True):
        logits_fn, images = make_logits(getattr(jax.nn, name))
        loss, _ = make_loss(getattr(jax.nn, name))
        gap = jax.jit(functools.partial(curvature.gauss_newton_gap, loss, logits_fn))(
            images, jax.random.key(0))
        hessians = dense_hessians(loss, images)
        jacobian = np.asarray(jax.jacobian(lambda x: logits_fn(x).sum(axis=0))(images))
        jacobian = jacobian.reshape(3, BATCH, -1)
        p = np.asarray(jax.nn.softmax(logits_fn(images)))
        v = np.asarray(curvature._draw(jax.random.key(0), 0, images, None, "normal"))
        for b in range(BATCH):
            part = jacobian[:, b].T @ (np.diag(p[b]) - np.outer(p[b], p[b])) @ jacobian[:, b]
            exact = hessians[b] @ v[b].ravel()
            expected = np.linalg.norm(exact - part @ v[b].ravel()) / np.linalg.norm(exact)
            np.testing.assert_allclose(gap[b], expected, rtol=1e-6, atol=1e-9)
            assert gap[b] > 1e-2 if name == "gelu" else gap[b] < 1e-9
        flat = curvature.gauss_newton_gap(
            lambda x: jnp.zeros(len(x)), lambda x: jnp.zeros((len(x), 3)), images,
            jax.random.key(0))
        np.testing.assert_array_equal(flat, 0)


def test_finite_differences_converge_to_the_exact_value_on_a_smooth_network():
    with jax.enable_x64(True):
        loss, images = make_loss(jax.nn.gelu)
        # The same key draws the same probes: what is left is the truncation error.
        exact = jax.jit(functools.partial(
            curvature.squared_frobenius, loss, num_probes=5, chunk_size=5))(
            images, jax.random.key(3)).value
        errors = []
        for step in (1e-2, 1e-3, 1e-4):
            approximate = jax.jit(functools.partial(
                curvature.finite_difference_curvature, loss, step=step, num_probes=5,
                chunk_size=5))(images, jax.random.key(3)).value
            errors.append(np.max(np.abs(approximate / exact - 1)))
        assert errors[0] > 5 * errors[1] > 25 * errors[2]
        assert errors[2] < 1e-3


def test_finite_differences_are_another_thing_on_a_network_with_kinks():
    with jax.enable_x64(True):
        loss, images = make_loss(jax.nn.relu)
        key = jax.random.key(3)
        exact = jax.jit(functools.partial(
            curvature.squared_frobenius, loss, chunk_size=20))(images, key).value
        stepped = jax.jit(functools.partial(
            curvature.finite_difference_curvature, loss, step=1e-1, chunk_size=20))(
            images, key).value
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


@pytest.mark.parametrize(("message", "measure", "options"), [
    ("Expected num_probes=0", curvature.squared_frobenius, {"num_probes": 0}),
    ("Expected chunk_size=0", curvature.squared_frobenius, {"chunk_size": 0}),
    ("Expected rtol=0", curvature.squared_frobenius, {"rtol": 0}),
    ("Unknown distribution 'gauss'", curvature.squared_frobenius, {"distribution": "gauss"}),
    ("Expected step=0.0", curvature.finite_difference_curvature, {"step": 0.0}),
    ("Expected sigma=0", curvature.smoothed_curvature, {"sigma": 0}),
    ("Expected num_draws=2", curvature.smoothed_curvature, {"sigma": 1.0, "num_draws": 2}),
    ("Expected num_probes=1", curvature.hessian_trace, {"num_probes": 1}),
    ("Expected num_probes=17", curvature.leave_one_out_squared_frobenius, {"num_probes": 17}),
    ("Expected num_products=17", curvature.ritz_values, {"num_products": 17}),
    ("Expected k=9", curvature.top_eigenvalues, {"k": 9, "num_products": 8}),
    ("Expected relative_width=0", curvature.spectral_density, {"relative_width": 0}),
    ("Expected extent=0", curvature.loss_surface, {"extent": 0}),
    ("Expected resolution=1", curvature.loss_surface, {"extent": 1.0, "resolution": 1}),
], ids=lambda value: value if isinstance(value, str) else "")
def test_bad_arguments_are_named(message, measure, options):
    loss, images = make_loss(jax.nn.gelu, jnp.float32)
    with pytest.raises(InputError, match=message):
        measure(loss, images, jax.random.key(0), **options)


def test_shapes_that_do_not_match_are_named():
    loss, images = make_loss(jax.nn.gelu, jnp.float32)
    with pytest.raises(InputError, match="Expected v of the shape of x"):
        curvature.hvp(loss, images, images[:1])


def test_too_many_images_for_a_processor_are_refused():
    with pytest.raises(InputError, match="number of images=33"):
        curvature.hessian_trace(
            lambda x: jnp.sum(x**2, axis=1), jnp.zeros((33, 4)), jax.random.key(0), num_probes=2)
