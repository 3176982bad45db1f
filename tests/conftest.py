"""Strict settings for every test: eight CPU devices, no silent promotion of rank or dtype."""

import gc
import os
import tempfile

# Before JAX is imported: it reads them at its start.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiled programs are kept for this session, unless a folder is named: for the tests that make
# the same ones anew, the workers, which inherit these settings, and the processes of tests.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="jaxrobust-tests-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import hypothesis
import jax
import pytest

from jaxrobust import data

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# The same examples every time, however long the first one takes to compile.
hypothesis.settings.register_profile(
    "deterministic", deadline=None, derandomize=True, database=None, print_blob=False,
    suppress_health_check=[hypothesis.HealthCheck.filter_too_much,
                           hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("deterministic")


@pytest.fixture(scope="module", autouse=True)
def _no_programs_of_other_modules():
    """Drops compiled programs after each module: those of all together need more memory mappings
    than the kernel grants a process, and XLA then dies."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def enable_x64():
    """Runs the test in double precision; ``jax.enable_x64(True)`` inside hypothesis tests."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def quick_compilation():
    """For tests that compile much and compute little: XLA leaves out its costly passes, here and
    in the processes that they start."""
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(params=["cpu", "accelerator"])
def either_platform(request, monkeypatch):
    """Runs the test with sums by class as on CPUs, and as on accelerators, here on CPUs too."""
    if request.param == "accelerator":
        monkeypatch.setattr(jax.lax, "platform_dependent",
                            lambda *arguments, cpu, default: default(*arguments))


@pytest.fixture(name="digits", scope="session")
def _digits():
    return data.load_dataset("digits")
