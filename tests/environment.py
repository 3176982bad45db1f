"""Settings that JAX and XLA read when they are imported, for tests and the processes they start.

The tests compile much and compute little: most of their time goes into XLA and LLVM, which are
therefore asked for less. With JAX_DISABLE_MOST_OPTIMIZATIONS=0 they compile as users do.
"""

import importlib.util
import mmap
import os
import pathlib
import tempfile


def _knows_option(name: str) -> bool:
    """Whether the XLA that is installed has an option: it ends the process at an unknown one."""
    folder, = importlib.util.find_spec("jaxlib").submodule_search_locations
    for path in pathlib.Path(folder).glob("*.so"):
        with path.open("rb") as file, mmap.mmap(
                file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            # Between the zeros of a C string: elsewhere it may be a field that is reserved.
            if content.find(b"\0" + name.encode() + b"\0") >= 0:
                return True
    return False


_options = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
# XLA leaves out its costly passes, here and in the processes that tests start.
QUICK = os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1"
if QUICK and _knows_option("xla_cpu_use_fusion_emitters"):
    # The emitters that it had before take a third of the time.
    _options.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(_options).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiled programs are kept for this session, unless a folder is named: for the tests that make
# the same ones anew, the workers, which inherit these settings, and the processes of tests.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="jaxrobust-tests-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
# To keep what takes less would take as long.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
