"""Eager calls compile once, and never answer with numbers of a call before."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust import _eager, curvature, theory

KEY = jax.random.key(0)
X = jnp.array([[1.0, 2.0], [0.5, -1.0], [3.0, 0.0]])


def programs():
    return _eager._run._cache_size()


def cubic(scale):
    """Of Hessian diag(6 scale x)."""
    return lambda x: jnp.sum(scale * x**3, axis=1)


EXACT = {
    "hvp": (lambda loss: curvature.hvp(loss, X, jnp.ones_like(X))[:, 0],
            lambda scale: 6 * scale * X[:, 0]),
    "trace": (lambda loss: curvature.hessian_trace(loss, X, KEY).value,
              lambda scale: 6 * scale * jnp.sum(X, axis=1)),
    "top": (lambda loss: curvature.top_eigenvalues(loss, X, KEY, k=1)[:, 0],
            lambda scale: 6 * scale * jnp.array([2.0, -1.0, 3.0])),
    "quadratic model": (lambda loss: theory.quadratic_model(loss, X, 0 * X),
                        lambda scale: scale * jnp.sum(X**3, axis=1)),
}


@pytest.mark.parametrize("name", list(EXACT))
def test_a_second_call_compiles_nothing_and_sees_what_has_changed(name):
    measure, exact = EXACT[name]
    held = {"scale": jnp.float32(1)}

    def loss(x):
        return cubic(held["scale"])(x)

    np.testing.assert_allclose(measure(loss), exact(1), rtol=1e-5)
    before = programs()
    held["scale"] = jnp.float32(2)  # Neither the function nor its type has changed.
    np.testing.assert_allclose(measure(loss), exact(2), rtol=1e-5)
    # A lambda that is made anew is the same program.
    np.testing.assert_allclose(measure(cubic(jnp.float32(3))), exact(3), rtol=1e-5)
    np.testing.assert_allclose(measure(cubic(np.full(2, 4, np.float32)[None])), exact(4), rtol=1e-5)
    assert programs() - before <= 1  # For the array of another shape.
    # A Python number is a part of the program.
    np.testing.assert_allclose(measure(cubic(5.0)), exact(5), rtol=1e-5)
    np.testing.assert_allclose(measure(cubic(6.0)), exact(6), rtol=1e-5)


def test_every_estimator_of_curvature_is_one_program():
    # One that calls another would compile nothing anew without, but run its own part eagerly.
    estimators = [value for name, value in vars(curvature).items()
                  if inspect.isfunction(value) and not name.startswith("_")
                  and value.__module__ == curvature.__name__
                  and {"loss", "logits_fn"} & set(inspect.signature(value).parameters)]
    assert len(estimators) >= 12
    assert [value.__name__ for value in estimators if not hasattr(value, "__wrapped__")] == []


def test_constants_of_functions_that_are_compiled_themselves_count():
    def loss(scale):
        return jax.jit(cubic(jnp.array([[scale, scale]])))

    for scale in (1.0, 2.0, 1.0):
        np.testing.assert_allclose(
            curvature.hvp(loss(scale), X, jnp.ones_like(X)), 6 * scale * X, rtol=1e-6)


def test_derivative_rules_of_ones_own_count():
    def loss(slope):
        @jax.custom_jvp
        def square(x):
            return x**2

        square.defjvp(lambda primals, tangents: (
            primals[0] ** 2, slope * primals[0] * tangents[0]))
        return lambda x: jnp.sum(square(x), axis=1)

    for slope in (2.0, 3.0):
        np.testing.assert_allclose(
            curvature.hvp(loss(slope), X, jnp.ones_like(X)), slope, rtol=1e-6)


def test_within_a_program_the_loss_may_close_over_what_is_traced():
    held = {}

    def loss(x):
        return cubic(held["scale"])(x)

    @jax.jit
    def inside(scale, x):
        held["scale"] = scale
        return curvature.hvp(loss, x, jnp.ones_like(x))

    @jax.jit
    def of_constant_images(scale):
        held["scale"] = scale
        return curvature.hvp(loss, X, jnp.ones_like(X))

    # The same function object closes over tracers of different programs.
    np.testing.assert_allclose(inside(jnp.float32(2), X), 12 * X, rtol=1e-6)
    np.testing.assert_allclose(of_constant_images(jnp.float32(3)), 18 * X, rtol=1e-6)
    many = jax.vmap(of_constant_images)(jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(many, jnp.stack([6 * X, 12 * X]), rtol=1e-6)
    held["scale"] = jnp.float32(4)
    np.testing.assert_allclose(curvature.hvp(loss, X, jnp.ones_like(X)), 24 * X, rtol=1e-6)
    slope = jax.grad(lambda scale: jnp.sum(of_constant_images(scale)))(jnp.float32(1))
    np.testing.assert_allclose(slope, 6 * jnp.sum(X), rtol=1e-6)


def test_within_a_mapped_program_each_device_has_its_own():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:3]), ("data",))
    rows = jax.sharding.PartitionSpec("data")
    scale = jnp.float32(2)
    measure = jax.shard_map(
        lambda x, key, indices: curvature.hessian_trace(
            cubic(scale), x, key, indices=indices).value,
        mesh=mesh, in_specs=(rows, jax.sharding.PartitionSpec(), rows), out_specs=rows,
        check_vma=False)
    found = jax.jit(measure)(X, KEY, jnp.arange(3))
    np.testing.assert_allclose(found, 12 * jnp.sum(X, axis=1), rtol=1e-5)


def test_scalars_of_numpy_and_jax_are_those_of_python():
    loss = cubic(jnp.float32(1))
    plain = curvature.smoothed_curvature(loss, X, KEY, sigma=0.5, num_draws=4, chunk_size=2)
    for sigma, count in ((np.float64(0.5), np.int64(4)), (np.float32(0.5), np.int32(4)),
                         (jnp.float32(0.5), jnp.int32(4))):
        before = programs()
        found = curvature.smoothed_curvature(
            loss, np.asarray(X), KEY, sigma=sigma, num_draws=count, chunk_size=np.int64(2))
        np.testing.assert_array_equal(found.trace.value, plain.trace.value)
        assert programs() == before
    images = X.astype(jnp.bfloat16)
    measure = functools.partial(curvature.smoothed_curvature, cubic(1.0), sigma=np.float64(0.5),
                                num_draws=np.int64(4))
    assert jax.jit(measure)(images, KEY).trace.value.dtype == jnp.bfloat16
