"""The forms that convolutions take on CPUs are XLA's convolutions, and so are their derivatives."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust.models import common

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def depthwise(size):
    return common._depthwise_conv, (size, size, 1, 6), {"feature_group_count": 6}


def strided(size):
    return common._strided_conv, (size, size, 6, 4), {}


CASES = [pytest.param(depthwise(size), stride, id=f"depthwise {size} stride {stride}")
         for size in (3, 5) for stride in (1, 2)]
CASES += [pytest.param(strided(size), stride, id=f"strided {size} stride {stride}")
          for size, stride in ((1, 2), (3, 2), (3, 3), (7, 2))]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "stride"), CASES)
def test_a_convolution_and_its_derivatives_are_xlas(case, stride, enable_x64):
    form, shape, options = case
    size = shape[0]
    generator = np.random.default_rng(0)
    x, along = generator.normal(size=(2, 2, 7, 8, 6))
    kernel, turned = generator.normal(size=(2, *shape))
    options |= {"padding": ((size // 2, size // 2),) * 2, "dimension_numbers": DIMENSIONS}

    def values(convolve):
        def scalar(x, kernel):
            return jnp.sum(jnp.sin(convolve(x, kernel, (stride, stride), **options)))

        gradient = jax.grad(scalar, argnums=(0, 1))

        def penalty(x, kernel):
            return jnp.sum(gradient(x, kernel)[0] ** 2)

        # Value, gradients, a product with the whole Hessian, one with each of two vectors, and the
        # gradients of a penalty.
        return (convolve(x, kernel, (stride, stride), **options), gradient(x, kernel),
                jax.jvp(gradient, (x, kernel), (along, turned))[1],
                jax.vmap(lambda v: jax.vjp(lambda x: gradient(x, kernel)[0], x)[1](v))(
                    jnp.stack([along, x])),
                jax.grad(penalty, argnums=(0, 1))(x, kernel))

    ours, xlas = jax.jit(lambda: (values(form), values(jax.lax.conv_general_dilated)))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), ours, xlas)


@pytest.mark.parametrize("argument", [0, 1])
def test_a_strided_convolution_has_each_derivative_alone(argument):
    generator = np.random.default_rng(0)
    values = [generator.normal(size=shape).astype(np.float32)
              for shape in ((2, 8, 8, 6), (3, 3, 6, 4))]
    options = {"padding": ((1, 1),) * 2, "dimension_numbers": DIMENSIONS}

    def derivative(convolve):
        def of_one(value):
            changed = [*values]
            changed[argument] = value
            return convolve(*changed, (2, 2), **options)

        return jax.jvp(of_one, (values[argument],), (values[argument],))

    ours, xlas = derivative(common._strided_conv), derivative(jax.lax.conv_general_dilated)
    np.testing.assert_array_equal(ours[0], xlas[0])
    np.testing.assert_allclose(ours[1], xlas[1], rtol=1e-5, atol=1e-5)


def convolutions(function, *arguments, platform):
    """How many convolutions a program has, before XLA's optimisation."""
    exported = jax.export.export(jax.jit(function), platforms=[platform])(*arguments)
    return exported.mlir_module().count("stablehlo.convolution")


@pytest.mark.parametrize(("platform", "expected"), [
    ("cpu", {"depthwise": 0, "strided": 1, "gradient": 0, "penalty": 0}),
    ("cuda", {"depthwise": 1, "strided": 1, "gradient": 1, "penalty": 2}),
    ("tpu", {"depthwise": 1, "strided": 1, "gradient": 1, "penalty": 2}),
])
def test_the_forms_are_for_cpus(platform, expected):
    class Layer(nn.Module):
        depthwise: bool

        @nn.compact
        def __call__(self, x):
            return common.conv(6, x, size=3, stride=1 if self.depthwise else 2,
                               depthwise=self.depthwise, dtype=x.dtype, name="layer")

    def apply(x, kernel, depthwise=False):
        return Layer(depthwise).apply({"params": {"layer": {"kernel": kernel}}}, x)

    gradient = jax.grad(lambda x, kernel: jnp.sum(apply(x, kernel)))

    def penalty(x, kernel):
        return jnp.sum(gradient(x, kernel) ** 2)

    x, kernel = jnp.zeros((2, 8, 8, 6)), jnp.zeros((3, 3, 6, 6))
    found = {
        "depthwise": convolutions(functools.partial(apply, depthwise=True), x, kernel[:, :, :1],
                                  platform=platform),
        "strided": convolutions(apply, x, kernel, platform=platform),
        "gradient": convolutions(gradient, x, kernel, platform=platform),
        "penalty": convolutions(jax.grad(penalty, argnums=1), x, kernel, platform=platform)}
    assert found == expected
