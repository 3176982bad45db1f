"""Strict settings for every test: eight CPU devices, no silent promotion of rank or dtype."""

import gc
import os
import pathlib
import signal

import environment  # Before JAX, which reads what it sets.
import hypothesis
import jax
import pytest

from jaxrobust import data, parallel, probes

# Shells have what they start in the background ignore SIGINT, which tests send.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_LONGEST_WRITTEN_OUT = probes.LONGEST_WRITTEN_OUT
if environment.QUICK:  # Each iteration of a loop that is written out is compiled by itself.
    probes.LONGEST_WRITTEN_OUT = 1

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# The same examples every time, however long the first one takes to compile.
hypothesis.settings.register_profile(
    "deterministic", deadline=None, derandomize=True, database=None, print_blob=False,
    suppress_health_check=[hypothesis.HealthCheck.filter_too_much,
                           hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("deterministic")


def _drop_programs():
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="module", autouse=True)
def _not_too_many_programs():
    """Drops compiled programs once they are many: those of all modules together need more memory
    mappings than the kernel grants a process, 65,530, and XLA then dies."""
    yield
    mappings = pathlib.Path("/proc/self/maps")
    if not mappings.exists() or mappings.read_text().count("\n") > 25_000:
        _drop_programs()


@pytest.fixture
def enable_x64():
    """Runs the test in double precision; ``jax.enable_x64(True)`` inside hypothesis tests."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def full_compilation():
    """For tests of last digits: programs are optimised as they are for users."""
    jax.config.update("jax_disable_most_optimizations", False)
    _drop_programs()
    yield
    jax.config.update("jax_disable_most_optimizations", environment.QUICK)
    _drop_programs()


@pytest.fixture
def written_out_loops(monkeypatch):
    """Loops over probes are written out, as they are for users on CPUs."""
    monkeypatch.setattr(probes, "LONGEST_WRITTEN_OUT", _LONGEST_WRITTEN_OUT)


@pytest.fixture(scope="module")
def steps_as_users_have_them():
    """Training steps are compiled by the emitters that other tests do without. By them, what is
    compared to the bit has the same bits in programs that differ."""
    from jaxrobust.app import program  # The tests of the core have no need of it.

    as_it_is = parallel.compiler_options
    with pytest.MonkeyPatch.context() as patch:
        if "--xla_cpu_use_fusion_emitters=false" in os.environ["XLA_FLAGS"]:
            patch.setattr(parallel, "compiler_options", lambda *arguments: as_it_is(*arguments) | {
                "xla_cpu_use_fusion_emitters": True})
        program._program.cache_clear()
        yield
    program._program.cache_clear()


@pytest.fixture
def pictures_left_out(monkeypatch):
    """For tests of what reports say: their pictures are empty files."""
    from jaxrobust.app.report import figures

    def save(figure, stem):
        for suffix in (".svg", ".png"):
            stem.with_suffix(suffix).touch()

    monkeypatch.setattr(figures, "save", save)


@pytest.fixture(params=["cpu", "accelerator"])
def either_platform(request, monkeypatch):
    """Runs the test with sums by class as on CPUs, and as on accelerators, here on CPUs too."""
    if request.param == "accelerator":
        monkeypatch.setattr(jax.lax, "platform_dependent",
                            lambda *arguments, cpu, default: default(*arguments))


@pytest.fixture(name="digits", scope="session")
def _digits():
    return data.load_dataset("digits")


@pytest.fixture(scope="session")
def shared_study(tmp_path_factory, digits):
    """The folder of the study in :mod:`studies`, of which nothing may be changed."""
    import studies  # The application, of which the tests of the core have no need.

    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "shared"
    studies.make(folder, digits)
    return folder
