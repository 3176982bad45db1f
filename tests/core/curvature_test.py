"""Curvature against jax.hessian, in float64, on small networks."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust import curvature, losses, models, probes, theory
from jaxrobust._validate import InputError

BATCH, SIDE = 3, 4
KEY = jax.random.key(0)


def make_convolutional_logits(activation, dtype):
    """Logits of a small network with batch norm in evaluation mode; and images."""
    model = models.SmallCNN(num_classes=3, mean=(0.5,), std=(0.25,), num_features=4, width=2,
                            activation=activation, dtype=dtype)
    images = jax.random.uniform(jax.random.key(0), (BATCH, SIDE, SIDE, 1), dtype)
    # Flax makes the parameters in float32 whatever the model computes in.
    with jax.numpy_dtype_promotion("standard"):
        variables = jax.jit(functools.partial(model.init, train=False))(jax.random.key(1), images)
    variables = jax.tree.map(lambda leaf: leaf.astype(dtype), variables)
    return lambda images: 3 * model.apply(variables, images, train=False).logits, images


def make_logits(activation, dtype=jnp.float64):
    """Logits of two hidden layers, which compile much sooner than convolutions; and images."""
    random = np.random.default_rng(1)
    images = jnp.asarray(random.uniform(size=(BATCH, SIDE, SIDE, 1)), dtype)
    first, second, top = (jnp.asarray(random.normal(size=shape) * (2 / shape[0]) ** 0.5, dtype)
                          for shape in ((SIDE**2, 8), (8, 8), (8, 3)))

    def logits_fn(images):
        x = 2 * images.reshape(len(images), -1) - 1
        return 3 * activation(activation(x @ first) @ second) @ top

    return logits_fn, images


def make_loss(activation, dtype=jnp.float64, make_logits=make_logits):
    """Softmax loss of such a network; and images."""
    logits_fn, images = make_logits(activation, dtype)

    def loss(images):
        return losses.softmax_cross_entropy(logits_fn(images), jnp.arange(BATCH))

    return loss, images


@functools.cache
def problem(name):
    """The logits and the loss of such a network in float64, its images, and their Hessians."""
    logits_fn, images = make_logits(getattr(jax.nn, name))
    loss, _ = make_loss(getattr(jax.nn, name))
    return logits_fn, loss, images, dense_hessians(loss, images)


def dense_hessians(loss, images):
    """[B, k, k], by jax.hessian of the whole batch, whose blocks off the diagonal are zero."""
    def total(pixels):
        return jnp.sum(loss(pixels.reshape(images.shape)))

    hessian = np.asarray(jax.jit(jax.hessian(total))(images.ravel()))
    blocks = hessian.reshape(BATCH, SIDE**2, BATCH, SIDE**2)
    diagonal = np.stack([blocks[index, :, index] for index in range(BATCH)])
    np.testing.assert_allclose(np.sum(blocks**2), np.sum(diagonal**2))
    return diagonal


def probe(function, key, number, images):
    """Probe number ``number`` of the images, as the docstrings say that it is drawn."""
    key = jax.random.fold_in(probes.salted(key, function), number)
    return jax.vmap(lambda i: jax.random.normal(
        jax.random.fold_in(key, i), images.shape[1:], images.dtype))(jnp.arange(len(images)))


def test_hvp_is_the_hessian_times_the_vector():
    with jax.enable_x64(True):
        loss, images = make_loss(jax.nn.gelu, make_logits=make_convolutional_logits)
        v = jax.random.normal(jax.random.key(2), images.shape, images.dtype)
        expected = np.einsum("bij,bj->bi", dense_hessians(loss, images), v.reshape(BATCH, -1))
        product = jax.jit(functools.partial(curvature.hvp, loss))(images, v)
        np.testing.assert_allclose(product.reshape(BATCH, -1), expected, rtol=1e-9, atol=1e-12)


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


# In float64, where less is rounded, those that are more than a mean of squares.
@pytest.mark.parametrize("precision, name", [
    *(("float32", name) for name in ESTIMATORS),
    *(("float64", name) for name in ("smoothed", "leave one out"))])
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


def test_every_measure_of_a_network_is_that_of_its_hessian():
    with jax.enable_x64(True):
        _, loss, images, hessians = problem("gelu")
        eigenvalues = np.linalg.eigvalsh(hessians)
        # As many products as dimensions: all are exact.
        trace = jax.jit(functools.partial(curvature.hessian_trace, loss, num_probes=8))(
            images, jax.random.key(0))
        np.testing.assert_allclose(trace.value, eigenvalues.sum(axis=1), rtol=1e-9)
        norm = jax.jit(functools.partial(
            curvature.leave_one_out_squared_frobenius, loss, num_probes=8))(
            images, jax.random.key(0))
        np.testing.assert_allclose(norm.value, np.sum(eigenvalues**2, axis=1), rtol=1e-9)
        sampled = jax.jit(functools.partial(
            curvature.squared_frobenius, loss, num_probes=400, chunk_size=400))(images, KEY)
        assert np.all(np.abs(sampled.value - norm.value) < 4 * sampled.standard_error)
        assert np.all(sampled.standard_error < 0.15 * norm.value)
        ritz = jax.jit(functools.partial(curvature.ritz_values, loss, num_products=SIDE**2))(
            images, jax.random.key(0))
        size = np.abs(eigenvalues).max()
        np.testing.assert_allclose(ritz.value, eigenvalues, atol=1e-9 * size)
        top = jax.jit(functools.partial(curvature.top_eigenvalues, loss, k=3))(
            images, jax.random.key(0))
        order = np.argsort(-np.abs(eigenvalues), axis=1)[:, :3]
        expected = np.take_along_axis(eigenvalues, order, axis=1)
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
        found = curvature.spectral_density(loss, x, KEY, num_products=8, num_probes=2)
        step = found.grid[:, 1] - found.grid[:, 0]
        np.testing.assert_allclose(np.sum(found.density, axis=1) * step, 1, atol=1e-3)
        spectrum = SPECTRA["indefinite"]
        # The errors at neighbouring points go together: several keys.
        found = jax.jit(lambda keys: jax.lax.map(functools.partial(
            curvature.spectral_density, lambda x: x**2 @ jnp.asarray(spectrum / 2), x[:1],
            num_products=SIZE, num_probes=60, relative_width=0.1), keys))(
            jax.random.split(jax.random.key(0), 10))
        width = 0.1 * (spectrum.max() - spectrum.min())
        grid = np.asarray(found.grid[0, 0])
        exact = np.mean(np.exp(-((grid[:, None] - spectrum) / width) ** 2 / 2), axis=1) / (
            width * (2 * np.pi) ** 0.5)
        off, error = np.asarray(found.density[:, 0]) - exact, np.asarray(found.standard_error[:, 0])
        assert np.mean(np.abs(off) < 2 * error) > 0.85
        assert np.max(error) < 0.1 * exact.max()


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
        # Finite differences see every jump, also those that take each other back.
        stepped = curvature.finite_difference_curvature(loss, x, KEY, step=sigma)
        assert np.all(stepped.value > 2 * np.sum(exact**2))


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


def test_half_precision_counts_its_probes_beyond_256():
    estimate = curvature.squared_frobenius(
        lambda x: jnp.sum(x**2, axis=1), jnp.ones((2, 64), jnp.bfloat16), KEY, num_probes=500,
        rtol=1e-4, chunk_size=50)
    assert estimate.value.dtype == jnp.bfloat16
    np.testing.assert_allclose(estimate.value.astype(jnp.float32), 4 * 64, rtol=0.03)
    # 500 samples of relative variance 2 / 64, with the factor 1 + 8 / 500.
    np.testing.assert_allclose(
        estimate.standard_error.astype(jnp.float32), 256 * (2 / 64 / 500) ** 0.5, rtol=0.2)


def wave_loss(x):
    """Of a Hessian that changes with the image; it compiles soon."""
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), x.dtype)
    return jnp.sum(jnp.sin(x @ matrix), axis=1)


@pytest.mark.parametrize("rtol, sizes", [(None, (3, 100)), (0.1, (3,))])
def test_the_chunk_size_changes_nothing(rtol, sizes):
    with jax.enable_x64(True):
        expected = frobenius_of_waves(1, rtol)
        for size in sizes:
            chex.assert_trees_all_close(frobenius_of_waves(size, rtol), expected, rtol=1e-12)


def test_a_loop_that_is_written_out_changes_nothing(request):
    with jax.enable_x64(True):
        expected = frobenius_of_waves(3)
        request.getfixturevalue("written_out_loops")
        chex.assert_trees_all_close(frobenius_of_waves(3), expected, rtol=1e-12)


def frobenius_of_waves(chunk_size, rtol=None):
    return jax.jit(functools.partial(
        curvature.squared_frobenius, wave_loss, num_probes=11, rtol=rtol, chunk_size=chunk_size))(
        jnp.linspace(0.0, 1.0, 15).reshape(3, 5), KEY)


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


def compiled_measure(name):
    """A measure of images [B, 5], with labels and indices [B], compiled."""
    @jax.jit
    def measure(images, labels, indices):
        def loss(images):
            return wave_loss(images) * (1 + labels)
        return MEASURES[name](loss, images, KEY, indices=indices)

    images = jax.random.uniform(jax.random.key(1), (6, 5), jnp.float64)
    return measure, (images, jnp.arange(6.0), jnp.array([7, 3, 11, 5, 2, 4]))


@pytest.mark.parametrize("name", list(MEASURES))
def test_the_batch_changes_nothing(name):
    with jax.enable_x64(True):
        measure, arguments = compiled_measure(name)
        first, second = (measure(*(rows[np.array(order)] for rows in arguments))
                         for order in ((0, 1, 2, 3), (4, 2, 5, 0)))
        for one, other in ((0, 3), (2, 1)):
            chex.assert_trees_all_close(*(jax.tree.map(lambda leaf: leaf[row], found)  # noqa: B023
                                          for found, row in ((first, one), (second, other))),
                                        rtol=1e-9, atol=1e-15)  # A spread of 0 is rounded.
        if name in ("squared_frobenius", "trace"):  # Of another size.
            chex.assert_trees_all_close(
                measure(*(rows[:1] for rows in arguments)),
                jax.tree.map(lambda leaf: leaf[:1], first), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("name", ["until", "top_eigenvalues"])
def test_the_devices_change_nothing(name):
    with jax.enable_x64(True):
        measure, arguments = compiled_measure(name)
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
        spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        chex.assert_trees_all_close(
            measure(*arguments), measure(*jax.device_put(arguments, spread)), rtol=1e-9)


@pytest.mark.usefixtures("written_out_loops")
def test_memory_does_not_grow_with_the_probes():
    kernel = jnp.ones((64, 256)) / 64

    def loss(images):
        return jnp.sum(jnp.tanh(images @ kernel), axis=1)

    def temporary(measure, num_probes):
        compiled = jax.jit(functools.partial(measure, loss, num_probes=num_probes)).lower(
            jnp.zeros((128, 64)), KEY).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    for measure in (curvature.squared_frobenius, curvature.finite_difference_curvature):
        assert temporary(measure, 8) < 1.3 * temporary(measure, 2)


def test_channels_of_different_std_scale_the_hessian_on_both_sides():
    with jax.enable_x64(True):
        matrix = jnp.asarray(np.random.default_rng(0).normal(size=(6, 6)))
        std = np.array([0.1, 0.2, 0.3])

        def loss(x):
            flat = x.reshape(len(x), -1)
            return jnp.einsum("bi,ij,bj->b", flat, matrix, flat) / 2

        mean = np.array([0.5, 0.4, 0.3])
        scaled = curvature.normalised_inputs(loss, mean, std)
        images = np.random.default_rng(2).uniform(size=(4, 2, 3))
        np.testing.assert_allclose(
            scaled(jnp.asarray((images - mean) / std)), loss(jnp.asarray(images)), rtol=1e-12)
        hessian = (np.asarray(matrix) + np.asarray(matrix).T) / 2
        factors = np.tile(std, 2)
        v = np.random.default_rng(1).normal(size=(1, 2, 3))
        np.testing.assert_allclose(
            curvature.hvp(scaled, jnp.zeros((1, 2, 3)), jnp.asarray(v)).ravel(),
            factors * (hessian @ (factors * v.ravel())), rtol=1e-12)


def test_the_surface_is_the_loss_along_its_gradient_and_across():
    with jax.enable_x64(True):
        _, loss, images, _ = problem("gelu")
        loss = jax.jit(loss)
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
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(loss(x))))(images).reshape(BATCH, -1)
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
        logits_fn, loss, images, hessians = problem(name)
        gap = jax.jit(functools.partial(curvature.gauss_newton_gap, loss, logits_fn))(
            images, jax.random.key(0))
        jacobian = np.asarray(
            jax.jit(jax.jacobian(lambda x: logits_fn(x).sum(axis=0)))(images)).reshape(3, BATCH, -1)
        p = np.asarray(jax.jit(lambda x: jax.nn.softmax(logits_fn(x)))(images))
        v = np.asarray(probe("gauss_newton_gap", jax.random.key(0), 0, images))
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


def test_finite_differences_converge_to_the_exact_value_on_a_smooth_loss():
    with jax.enable_x64(True):
        images, key = jnp.linspace(0.0, 1.0, 15).reshape(BATCH, 5), jax.random.key(3)
        hessians = jax.vmap(jax.hessian(lambda image: wave_loss(image[None])[0]))(images)
        # With the same probes: what is left is the truncation error.
        drawn = [probe("finite_difference_curvature", key, k, images) for k in range(5)]
        exact = np.mean([np.sum(np.einsum("bij,bj->bi", hessians, v) ** 2, axis=1)
                         for v in drawn], axis=0)
        errors = []
        for step in (1e-2, 1e-3, 1e-4):
            approximate = curvature.finite_difference_curvature(
                wave_loss, images, key, step=step, num_probes=5, chunk_size=5).value
            errors.append(np.max(np.abs(approximate / exact - 1)))
        assert errors[0] > 5 * errors[1] > 25 * errors[2]
        assert errors[2] < 1e-3


def test_the_spectrum_of_a_relu_network_is_that_of_its_hessian():
    with jax.enable_x64(True):
        logits_fn, _, images, hessians = problem("relu")
        expected = np.linalg.eigvalsh(hessians)
        spectrum = jax.jit(functools.partial(
            curvature.piecewise_linear_spectrum, logits_fn))(images)
        # The Hessian has 16 eigenvalues, all but two of them 0.
        np.testing.assert_allclose(spectrum, expected[:, -3:], rtol=1e-9, atol=1e-12)
        assert np.all(expected[:, -2:] > 1e-6)


def test_for_a_smooth_network_the_spectrum_is_not_that_of_the_hessian():
    with jax.enable_x64(True):
        logits_fn, _, images, hessians = problem("gelu")
        exact = np.sum(hessians**2, axis=(1, 2))
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


CONFIDENT_KERNEL = np.random.default_rng(3).normal(size=(6, 3))


def softmax_hessian(z):
    """diag(p) - p p^T in float64, 1 - p_i as the sum of the others."""
    p = np.exp(z - z.max())
    p = p / p.sum()
    others = np.array([np.delete(p, i).sum() for i in range(len(p))])
    return np.diag(p * others) - (np.outer(p, p) - np.diag(p**2))


@pytest.mark.parametrize("gap", [20.0, 45.0])
@pytest.mark.parametrize("label", [0, 2])
def test_a_confident_image_has_its_curvature_by_every_measure(gap, label):
    """A linear softmax with logits (gap, 0, -1), by far right or wrong, in float32."""
    kernel = jnp.asarray(CONFIDENT_KERNEL, jnp.float32)
    hessian = CONFIDENT_KERNEL @ softmax_hessian(
        np.array([gap, 0.0, -1.0])) @ CONFIDENT_KERNEL.T
    eigenvalues = np.linalg.eigvalsh(hessian / hessian.max())[::-1][:2] * hessian.max()
    offset, labels = jnp.array([[gap, 0.0, -1.0]]), jnp.array([label])
    x = jnp.zeros((1, 6))

    def logits(x):
        return x @ kernel + offset

    def loss(x):
        return losses.softmax_cross_entropy(logits(x), labels)

    def rounded(x):
        z = logits(x)
        return jax.nn.logsumexp(z, axis=1) - z[:, label]

    np.testing.assert_allclose(
        curvature.hessian_trace(loss, x, KEY).value, np.trace(hessian), rtol=1e-5)
    np.testing.assert_allclose(
        curvature.top_eigenvalues(loss, x, KEY, k=2)[0], eigenvalues, rtol=1e-4)
    np.testing.assert_allclose(
        curvature.piecewise_linear_spectrum(logits, x)[0, :0:-1], eigenvalues, rtol=1e-4)
    v = jnp.ones_like(x)
    np.testing.assert_allclose(
        curvature.hvp(loss, x, v)[0], hessian.sum(axis=1), rtol=1e-4, atol=1e-6 * hessian.max())
    assert curvature.gauss_newton_gap(loss, logits, x, KEY)[0] < 1e-5
    # It notices a loss that rounds the curvature away.
    assert curvature.gauss_newton_gap(rounded, logits, x, KEY)[0] > 0.3
    if gap == 20:
        squared = curvature.leave_one_out_squared_frobenius(loss, x, KEY)
        np.testing.assert_allclose(squared.value, np.sum(eigenvalues**2), rtol=1e-4)


SCALES = (1e-25, 1e-18, 1.0, 1e18)


@pytest.mark.parametrize("scale", SCALES)
def test_every_measure_is_right_at_every_scale_that_its_dtype_holds(scale):
    size = 20
    factor = jnp.float32(scale)  # A constant of the program: one compilation for all scales.
    def loss(x):
        return factor * jnp.sum(x**2, axis=1)

    x = jnp.ones((1, size))
    exact = 2 * scale  # Every eigenvalue.
    squared = size * exact**2 if size * exact**2 > 1e-37 else 0.0
    trace = curvature.hessian_trace(loss, x, KEY)
    np.testing.assert_allclose(trace.value, size * exact, rtol=1e-5)
    # All samples agree, up to the rounding of sums of the size of H.
    rounding = 16 * np.finfo(np.float32).eps * size**0.5 * exact
    assert 0.99 * rounding < trace.standard_error[0] < 3 * rounding
    ritz = curvature.ritz_values(loss, x, KEY, num_products=3)
    chex.assert_tree_all_finite(ritz)
    np.testing.assert_allclose(ritz.value[0, -1], exact, rtol=1e-5)
    np.testing.assert_allclose(
        curvature.leave_one_out_squared_frobenius(loss, x, KEY).value, squared, rtol=1e-5)
    for estimate, value in (
            (curvature.squared_frobenius(loss, x, KEY, chunk_size=20), squared),
            (curvature.squared_frobenius(loss, x, KEY, rtol=0.1, num_probes=99), squared),
            (curvature.finite_difference_curvature(loss, x, KEY, step=1.0, chunk_size=20), squared),
            *zip(curvature.smoothed_curvature(loss, x, KEY, sigma=1.0, chunk_size=32),
                 (squared, size * exact), strict=True)):
        chex.assert_tree_all_finite(estimate)
        assert abs(estimate.value[0] - value) <= 4 * estimate.standard_error[0], (estimate, value)
        assert estimate.standard_error[0] <= 0.3 * value
    surface = curvature.loss_surface(loss, x, KEY, extent=1.0, resolution=3)
    np.testing.assert_allclose(surface.gradient_direction, size**-0.5, rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(surface.orthogonal_direction), 1, rtol=1e-5)
    np.testing.assert_allclose(curvature.gauss_newton_gap(
        loss, lambda x: x @ jnp.ones((size, 3)), x, KEY), 1, rtol=1e-5)
    np.testing.assert_allclose(curvature.piecewise_linear_spectrum(
        lambda x: factor**0.5 * x[:, :2], jnp.zeros((1, 2)))[0], [0, scale / 2], rtol=1e-5,
        atol=1e-6 * scale)


def test_what_is_beyond_the_range_is_infinite():
    factor = jnp.float32(1e25)
    def loss(x):
        return factor * jnp.sum(x**2, axis=1)

    x = jnp.ones((1, 20))
    assert np.isinf(curvature.leave_one_out_squared_frobenius(loss, x, KEY).value[0])
    assert np.isinf(curvature.squared_frobenius(loss, x, KEY, chunk_size=20).value[0])


def test_estimators_given_the_same_key_are_independent():
    # One eigenvalue dominates, so that every estimate hangs on its probes alone.
    matrix = jnp.diag(jnp.array([1.0, 0.3, 0.1, 0.03]))
    x = jnp.ones((1, 4))

    def loss(x):
        return jnp.sum((x @ matrix) * x, axis=1) + 0.1 * jnp.sum(x**3, axis=1)

    measures = {
        "squared_frobenius": lambda key: curvature.squared_frobenius(
            loss, x, key, num_probes=3, chunk_size=3).value,
        "finite_difference": lambda key: curvature.finite_difference_curvature(
            loss, x, key, num_probes=3, chunk_size=3).value,
        "smoothed": lambda key: curvature.smoothed_curvature(
            loss, x, key, sigma=0.1, num_draws=3, chunk_size=3).squared_frobenius.value,
        "gap": lambda key: curvature.gauss_newton_gap(loss, lambda x: x, x, key),
        "top": lambda key: curvature.top_eigenvalues(loss, x, key, k=1, num_products=1)[:, 0],
        "density": lambda key: curvature.spectral_density(
            loss, x, key, num_products=1, num_probes=2, num_points=2).grid[:, 1],
        "trace": lambda key: curvature.hessian_trace(loss, x, key, num_probes=2).standard_error,
        "leave one out": lambda key: curvature.leave_one_out_squared_frobenius(
            loss, x, key, num_probes=2).standard_error,
        "surface": lambda key: curvature.loss_surface(
            loss, x, key, extent=1.0, resolution=2).orthogonal_direction[:, 0]**2,
        "noise": lambda key: theory.feature_stability(
            lambda x: x, loss, x, key, sigma=0.1, delta=1.0, num_draws=3,
            chunk_size=3).squared_change.value,
        "smoothed gradient": lambda key: theory.smoothed_gradient_norm_squared(
            loss, x, key, sigma=0.1, num_draws=3, chunk_size=3).value,
    }
    values = jax.jit(lambda keys: jax.lax.map(
        lambda key: jnp.concatenate([measure(key) for measure in measures.values()]), keys))(
        jax.random.split(jax.random.key(0), 400))
    ranks = np.argsort(np.argsort(np.asarray(values), axis=0), axis=0)
    correlations = np.corrcoef(ranks.T) - np.eye(len(measures))
    assert np.all(np.std(ranks, axis=0) > 0)
    # Chance alone is 0.05 in size.
    assert np.max(np.abs(correlations)) < 0.2, correlations.round(2)


def test_the_coverage_where_one_eigenvalue_dominates_is_the_one_stated():
    # One pixel, so that the only eigenvalue, 2, does; 4,000 images of it are as many estimates.
    def loss(x):
        return jnp.sum(x**2, axis=1)

    x = jnp.ones((4000, 1))

    def coverage(estimate):
        return np.mean(np.abs(estimate.value - 4) <= 2 * estimate.standard_error)

    for num_probes, stated in ((20, 0.88), (64, 0.93)):
        found = coverage(curvature.squared_frobenius(
            loss, x, KEY, num_probes=num_probes, chunk_size=num_probes))
        np.testing.assert_allclose(found, stated, atol=0.02)
    for num_draws, stated in ((20, 0.82), (64, 0.89)):
        found = coverage(curvature.smoothed_curvature(
            loss, x, KEY, sigma=1.0, num_draws=num_draws, chunk_size=num_draws).squared_frobenius)
        np.testing.assert_allclose(found, stated, atol=0.02)
    for rtol in (0.3, 0.2, 0.1):
        assert coverage(curvature.squared_frobenius(
            loss, x, KEY, num_probes=4000, rtol=rtol, chunk_size=50)) > 0.925


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
    (r"Expected indices of shape \[B\] with B=3, integers, got int32\[2\]",
     curvature.smoothed_curvature, {"sigma": 1.0, "indices": jnp.arange(2)}),
    ("Expected indices .* got int", curvature.hessian_trace, {"indices": jnp.int32(1)}),
    (r"Expected indices .* got float32\[3\]", curvature.ritz_values,
     {"num_products": 2, "indices": jnp.zeros(3)}),
    ("Expected indices .* got list", curvature.squared_frobenius, {"indices": [0, 1, 2]}),
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


OF_A_LOSS = {
    "hvp": lambda loss, x: curvature.hvp(loss, x, x),
    "squared_frobenius": lambda loss, x: curvature.squared_frobenius(loss, x, KEY),
    "finite_difference_curvature":
        lambda loss, x: curvature.finite_difference_curvature(loss, x, KEY),
    "smoothed_curvature": lambda loss, x: curvature.smoothed_curvature(loss, x, KEY, sigma=1.0),
    "gauss_newton_gap": lambda loss, x: curvature.gauss_newton_gap(loss, lambda x: x, x, KEY),
    "ritz_values": lambda loss, x: curvature.ritz_values(loss, x, KEY, num_products=2),
    "top_eigenvalues": lambda loss, x: curvature.top_eigenvalues(loss, x, KEY, k=1),
    "spectral_density": lambda loss, x: curvature.spectral_density(loss, x, KEY),
    "hessian_trace": lambda loss, x: curvature.hessian_trace(loss, x, KEY),
    "leave_one_out_squared_frobenius":
        lambda loss, x: curvature.leave_one_out_squared_frobenius(loss, x, KEY),
    "loss_surface": lambda loss, x: curvature.loss_surface(loss, x, KEY, extent=1.0),
    "noise_draws": lambda loss, x: theory.noise_draws(
        lambda x: x, loss, x, KEY, sigma=1.0, num_draws=2),
    "quadratic_model": lambda loss, x: theory.quadratic_model(loss, x, x),
    "feature_stability": lambda loss, x: theory.feature_stability(
        lambda x: x, loss, x, KEY, sigma=1.0, delta=1.0, num_draws=2),
    "smoothed_gradient_norm_squared": lambda loss, x: theory.smoothed_gradient_norm_squared(
        loss, x, KEY, sigma=1.0, num_draws=3),
}


@pytest.mark.parametrize("name", list(OF_A_LOSS))
def test_a_loss_that_is_not_per_image_is_refused(name):
    x = jnp.ones((3, 4))
    for loss, got in ((lambda x: jnp.mean(x**2), r"\(\)"),
                      (lambda x: jnp.sum(x**2, axis=1, keepdims=True), r"\(3, 1\)"),
                      (lambda x: jnp.sum(x**2, axis=0), r"\(4,\)"),
                      (lambda x: (jnp.sum(x**2, axis=1),), "tuple")):
        for call in (OF_A_LOSS[name], lambda loss, x: jax.eval_shape(
                functools.partial(OF_A_LOSS[name], loss), x)):
            with pytest.raises(InputError, match=(
                    rf"Expected loss to return \[B\] with B=3, a row for each image, got {got}.")):
                call(loss, x)
    for x, got in ((jnp.zeros((3, 4), jnp.uint8), "array of floats, got uint8"),
                   (np.zeros((3, 4), np.int32), "array of floats, got int32"),
                   ([[1.0]], "array of floats, got list"),
                   (jnp.zeros((0, 4)), r"at least one image and pixel, got \(0, 4\)"),
                   (jnp.zeros((3, 0)), r"at least one image and pixel, got \(3, 0\)"),
                   (jnp.zeros(()), "Expected x")):
        with pytest.raises(InputError, match=got):
            OF_A_LOSS[name](lambda x: jnp.sum(x**2, axis=1), x)


def test_logits_and_features_that_are_not_a_row_for_each_image_are_refused():
    x = jnp.ones((3, 4))
    def loss(x):
        return jnp.sum(x**2, axis=1)

    for function in (lambda x: x[0], loss, lambda x: x[:2]):
        with pytest.raises(InputError, match=r"Expected logits_fn to return \[B, C\] with B=3"):
            curvature.piecewise_linear_spectrum(function, x)
        with pytest.raises(InputError, match=r"Expected logits_fn to return \[B, C\] with B=3"):
            curvature.gauss_newton_gap(loss, function, x, KEY)
        with pytest.raises(InputError, match=r"Expected features_fn to return \[B, d\] with B=3"):
            theory.noise_draws(function, loss, x, KEY, sigma=1.0, num_draws=1)


def test_means_and_stds_are_one_for_each_channel():
    def loss(x):
        return jnp.sum(x**2, axis=(1, 2, 3))

    three = (0.5, 0.4, 0.3)
    for x in (jnp.ones((2, 4, 4, 1)), jnp.ones((2, 4, 4, 2)), jnp.ones(3)):
        with pytest.raises(InputError, match="with channels=3, as mean and std, got"):
            curvature.normalised_inputs(loss, three, three)(x)
    with pytest.raises(InputError, match="Expected a std for every mean, got 1 for 3"):
        curvature.normalised_inputs(loss, three, (0.2,))
    for std in (0.0, -0.1, float("nan")):
        with pytest.raises(InputError, match=f"Expected std={std}"):
            curvature.normalised_inputs(loss, three, (0.2, std, 0.2))


def test_one_class_has_no_curvature_and_one_pixel_no_surface():
    x = jnp.ones((2, 3))
    np.testing.assert_array_equal(
        curvature.piecewise_linear_spectrum(lambda x: x[:, :1], x), np.zeros((2, 1)))
    with pytest.raises(InputError, match=r"two numbers or more in each image, got \(2, 1, 1\)"):
        curvature.loss_surface(
            lambda x: jnp.sum(x**2, axis=(1, 2)), x[:, :1, None], KEY, extent=1.0)


@pytest.mark.parametrize("size", [1, 5])
def test_the_defaults_suit_small_images(size):
    diagonal = jnp.arange(1.0, size + 1)
    def loss(x):
        return x**2 @ diagonal

    x = jnp.ones((2, size))
    trace, norm = (measure(loss, x, KEY) for measure in (
        curvature.hessian_trace, curvature.leave_one_out_squared_frobenius))
    for estimate, exact in ((trace, 2 * diagonal.sum()), (norm, 4 * (diagonal**2).sum())):
        np.testing.assert_allclose(estimate.value, exact, rtol=1e-5)
        assert np.all(estimate.standard_error < 1e-4 * exact)
    largest = curvature.top_eigenvalues(loss, x, KEY, k=1)
    np.testing.assert_allclose(largest[:, 0], 2 * size, rtol=1e-5)


def test_the_default_of_the_density_suits_small_images():
    found = curvature.spectral_density(lambda x: jnp.sum(x**2, axis=1), jnp.ones((1, 3)), KEY)
    np.testing.assert_allclose(
        np.sum(found.density) * (found.grid[0, 1] - found.grid[0, 0]), 1, atol=1e-3)


DEFAULTS = {
    "squared_frobenius": {"num_probes": 20, "rtol": None, "chunk_size": 1},
    "finite_difference_curvature": {"step": 1e-2, "num_probes": 20, "chunk_size": 1},
    "smoothed_curvature": {"num_draws": 32, "chunk_size": 1},
    "spectral_density": {"num_probes": 8, "relative_width": 0.02, "num_points": 200},
    "loss_surface": {"resolution": 21},
}
"""What results were made with, and the paper's."""


@pytest.mark.parametrize("name", DEFAULTS)
def test_settings_that_are_not_given_stay_what_they_were(name):
    parameters = inspect.signature(getattr(curvature, name)).parameters
    assert {key: parameters[key].default for key in DEFAULTS[name]} == DEFAULTS[name]


def test_the_defaults_are_the_numbers_that_are_stated():
    loss, x = make_quadratics("float32")
    for measure, stated in ((functools.partial(curvature.top_eigenvalues, k=2),
                             {"num_products": 24}),
                            (functools.partial(curvature.spectral_density, num_probes=2),
                             {"num_products": 30}),
                            (curvature.hessian_trace, {"num_probes": 16})):
        by_default, as_stated = (jax.jit(functools.partial(measure, loss, **options))(x, KEY)
                                 for options in ({}, stated))
        chex.assert_trees_all_equal(by_default, as_stated)


def test_more_than_32_images_are_refused_on_a_processor():
    def trace(number):
        return curvature.hessian_trace(
            lambda x: jnp.sum(x**2, axis=1), jnp.zeros((number, 4)), KEY, num_probes=2).value

    np.testing.assert_allclose(trace(32), 8, rtol=1e-5)
    with pytest.raises(InputError, match="number of images=33"):
        trace(33)
