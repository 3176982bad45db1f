"""Compiled programs are kept between commands, within bounds, and only where they may be."""

import os
import pathlib
import re
import resource
import time
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxrobust.app import execution, progress


@pytest.fixture(name="enabled")
def _enabled(monkeypatch, tmp_path):
    """JAX's cache, which the tests do without, in a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    before = {name: getattr(jax.config, name) for name in (
        "jax_enable_compilation_cache", "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs")}
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_the_tests_leave_the_users_folder_alone():
    execution.keep_compilations()
    assert jax.config.jax_compilation_cache_dir == os.environ["JAX_COMPILATION_CACHE_DIR"]


def test_what_is_compiled_is_found_again(enabled):
    execution.keep_compilations()
    folder = enabled / "caches" / "jaxrobust" / "xla"
    assert jax.config.jax_compilation_cache_dir == str(folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    hits = []
    jax.monitoring.register_event_listener(
        lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)
    values = jnp.arange(3.0)
    for found in (0, 1):
        assert jax.jit(lambda x: x * 3 + 1)(values).tolist() == [1, 4, 7]
        assert len(hits) == found
        jax.clear_caches()
    assert any(folder.iterdir())


def test_a_program_that_cannot_be_read_is_made_anew(enabled, capsys, monkeypatch):
    folder = enabled / "caches" / "jaxrobust" / "xla"
    shown = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: shown.append(str(message)))
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        execution.keep_compilations()
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        values = jnp.arange(3.0)

        def treble(x):
            return 3 * x

        jax.jit(treble)(values)
        path, = folder.glob("jit_treble-*-cache")
        whole = path.read_bytes()
        path.write_bytes(whole[:100])
        jax.clear_caches()
        assert jax.jit(treble)(values).tolist() == [0, 3, 6]
        warnings.warn("another", stacklevel=1)
    said, = capsys.readouterr().err.splitlines()
    assert said == f"Cannot read a compiled jit_treble in {folder}; compiling it again."
    assert shown == ["another"]
    assert len(path.read_bytes()) > 100


def test_that_programs_cannot_be_written_is_said_once(enabled, capsys, monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # Restored at the end.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        execution.keep_compilations()
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (9, limits[1]))  # Like a full disk.
            for factor in (5, 6):
                assert jax.jit(lambda x, factor=factor: factor * x)(jnp.ones(2))[0] == factor
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said, = capsys.readouterr().err.splitlines()
    assert re.fullmatch("Compiled programs are not cached: cannot write "
                        rf"{enabled}/caches/jaxrobust/xla \(File too large.*\)\.", said)


def test_a_folder_named_by_the_environment_is_used_as_it_is(enabled, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(enabled / "own"))
    monkeypatch.setattr(execution, "_remove_oldest", None)
    execution.keep_compilations()
    assert jax.config.jax_compilation_cache_dir == str(enabled / "own")


def test_a_folder_that_cannot_be_written_is_one_line(enabled, capsys):
    (enabled / "caches").touch()
    before = jax.config.jax_compilation_cache_dir
    execution.keep_compilations()
    said, = capsys.readouterr().err.splitlines()
    assert said.startswith("Compiled programs are not cached: cannot write ")
    assert jax.config.jax_compilation_cache_dir == before


def test_what_was_not_used_for_longest_is_removed(tmp_path):
    (tmp_path / "within").mkdir()
    now = time.time()
    for age, name in enumerate(("new", "within/read", "old", "oldest")):
        path = tmp_path / name
        path.write_bytes(b"x" * 10)
        os.utime(path, (now - age, now - age))
    # Written long ago, but read just now.
    os.utime(tmp_path / "oldest", (now + 1, now - 100))
    execution._remove_oldest(tmp_path, 25)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {
        tmp_path / "oldest", tmp_path / "new"}
    execution._remove_oldest(tmp_path, 25)
    assert len(list(tmp_path.iterdir())) == 3


def test_the_folder_is_that_of_the_system(monkeypatch):
    for name in ("XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/somewhere")
    assert execution.compilations_folder() == pathlib.Path("/somewhere/.cache/jaxrobust/xla")


@pytest.mark.parametrize("folder, said", [
    (None, "not cached."), ("/caches", "cached in /caches.")])
def test_a_long_compilation_is_told_of_and_a_short_one_is_not(
        folder, said, enabled, monkeypatch, capsys):
    jax.config.update("jax_compilation_cache_dir", folder)
    monkeypatch.setattr(progress, "SECONDS_OF_SILENCE", 0.05)
    with progress.compiling("the step of a network"):
        time.sleep(0.5)
    assert capsys.readouterr().out == (
        "Compiling the step of a network. This takes minutes for large networks; the result is "
        f"{said}\n")
    monkeypatch.setattr(progress, "SECONDS_OF_SILENCE", 0.3)
    with progress.compiling("the step of a network"):
        pass
    time.sleep(0.5)
    assert not capsys.readouterr().out
