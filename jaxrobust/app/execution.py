"""How a command runs: on which devices and processes. It changes the time, not the result."""

import contextlib
import ctypes
import dataclasses
import functools
import math
import os
import pathlib
import platform
import re
import stat
import sys
import tempfile
import warnings
from collections.abc import Callable

import absl.logging
import jax
from jax.experimental import multihost_utils

from jaxrobust import _validate
from jaxrobust.app.config import InputError
from jaxrobust.data import Split
from jaxrobust.parallel import FORMS, Layout, make_layout


@dataclasses.dataclass(frozen=True)
class Execution:
    """Devices and processes of a command."""

    parallel: str = "auto"
    """"jit": one device; "mesh": all devices, of all processes; "pmap": the devices of one
    process; "auto": "mesh" with several accelerators or processes, else "jit"."""
    coordinator: str | None = None
    """HOST:PORT of the first process of a job of several, or "auto" to ask the cluster, as on TPU
    pods; steps of Slurm and Open MPI, and TPU hosts on Kubernetes, are recognised without."""
    num_processes: int | None = None
    """Of the job; with a coordinator that is not "auto"."""
    process_id: int | None = None
    """Of this process, from 0; with a coordinator that is not "auto"."""

    def __post_init__(self):
        _validate.one_of("parallel", self.parallel, ("auto", *FORMS))
        explicit = self.coordinator not in (None, "auto")
        for name in ("num_processes", "process_id"):
            if (getattr(self, name) is not None) != explicit:
                raise InputError(
                    f"Expected {name} {'with' if explicit else 'only with'} a coordinator that is "
                    f"HOST:PORT, got {name}={getattr(self, name)} and "
                    f"coordinator={self.coordinator!r}.")
        if explicit:
            _, _, port = self.coordinator.rpartition(":")
            if not port.isdecimal() or port == self.coordinator:
                raise InputError(f"Expected coordinator={self.coordinator!r} as HOST:PORT.")
            _validate.in_range("the port of the coordinator", int(port), 1, 2**16)
            _validate.in_range("num_processes", self.num_processes, 1)
            _validate.in_range("process_id", self.process_id, 0, self.num_processes)

    def start(self) -> Layout:
        """Joins the job, if there is one, and lays out the devices.

        To be called before anything else touches JAX.

        Raises:
          InputError: (a ValueError) if the job cannot be joined, or the form is not possible.
        """
        asked = self.coordinator is not None or _is_one_of_several()
        if asked and not jax.distributed.is_initialized():
            explicit = None if self.coordinator == "auto" else self.coordinator
            try:
                jax.distributed.initialize(explicit, self.num_processes, self.process_id)
            except (ValueError, RuntimeError) as error:
                raise InputError(
                    f"Cannot join the job with coordinator={self.coordinator!r}: "
                    f"{str(error).splitlines()[0]}") from error
            # Their collectives wait but 30 seconds for a process that is late: met now, while all
            # have just come, they are connected before the loading of data sets sets them apart.
            multihost_utils.sync_global_devices("start")
        return make_layout(None if self.parallel == "auto" else self.parallel)


STEPS_PER_CALL = 100
"""On accelerators: few enough to see the progress, enough for the host not to matter."""


@dataclasses.dataclass(frozen=True)
class Feed:
    """How the images reach the devices in training, and how often it is interrupted."""

    input: str = "auto"
    """"resident": all of them are on every device; "stream": each batch is read, every process
    its share, while the one before is trained on; "auto": resident if a single process trains
    and they fit in a quarter of a device's memory."""
    steps_per_call: int | None = None
    """Updates that the host starts at once, if the images are resident; none for 100 on
    accelerators and 1 on CPUs."""
    checkpoint_steps: int | None = None
    """Updates after which a run is saved within an epoch too; none for at its end alone."""

    def __post_init__(self):
        _validate.one_of("input", self.input, ("auto", "resident", "stream"))
        for name in ("steps_per_call", "checkpoint_steps"):
            if getattr(self, name) is not None:
                _validate.in_range(name, getattr(self, name), 1)

    def in_memory(self) -> bool:
        """Whether a prepared data set is to be read into memory before training."""
        return self.input == "resident" or self.input == "auto" and jax.process_count() == 1

    def resolve(self, layout: Layout, split: Split, num_runs: int) -> "Feed":
        """The feed with what was left open decided.

        Raises:
          InputError: (a ValueError) for a stream of several runs, each of which would need its own.
        """
        device = layout.mesh.local_devices[0]
        chosen = self.input
        if chosen == "auto":
            limit = (device.memory_stats() or {}).get("bytes_limit") or _host_memory()
            small = math.prod(split.images.shape) <= limit / 4
            chosen = "resident" if small and jax.process_count() == 1 else "stream"
        if chosen == "stream":
            if num_runs > 1:
                raise InputError(
                    f"Expected input='resident' for {num_runs} runs together, got {chosen!r}.")
            if self.steps_per_call not in (None, 1):
                raise InputError(
                    f"Expected steps_per_call=1 with input='stream', got {self.steps_per_call}.")
            return dataclasses.replace(self, input=chosen, steps_per_call=1)
        default = 1 if device.platform == "cpu" else STEPS_PER_CALL
        return dataclasses.replace(
            self, input=chosen, steps_per_call=self.steps_per_call or default)


def batch_size_of(images) -> int:
    """Images [N, H, W, channels] to test at once: 250 small ones, of large ones what four million
    pixels are, so that a network's working memory stays the same."""
    _, height, width, _ = images.shape
    return max(1, min(250, 2**22 // (height * width)))


def _host_memory() -> float:
    """Bytes that this machine has, if the system tells."""
    if not hasattr(os, "sysconf"):
        return math.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def start_process() -> None:
    """Makes this process one of a command's: to be called before it computes anything."""
    # TFDS warns of a data set that is not there, Orbax logs each error with a traceback before it
    # raises it: both are errors of one line here.
    absl.logging.set_verbosity(absl.logging.FATAL)
    keep_freed_memory()
    keep_compilations()


KEPT_BYTES = 2**31
"""Of compiled programs that are kept, at a command's start."""


def compilations_folder() -> pathlib.Path:
    """Where compiled programs are kept: in JAX_COMPILATION_CACHE_DIR, or in ``jaxrobust/xla`` in
    the user's folder of caches."""
    named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    caches = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return pathlib.Path(named) if named else caches / "jaxrobust" / "xla"


def keep_compilations() -> None:
    """Keeps what takes a second or more to compile for the commands to come.

    In :func:`compilations_folder`, from which the programs not used for longest are removed where
    there is more than :data:`KEPT_BYTES`; a folder named by the environment is left to its owner.
    With JAX_ENABLE_COMPILATION_CACHE=false nothing is kept or looked for. Where the folder cannot
    be written, a line says so.

    JAX names a program by what it computes, the versions of JAX and XLA, flags, devices, and on
    CPUs the processor's instructions, so that no other machine's is taken. Any number of processes
    may use the folder. A file that is not whole, as a full disk leaves it, is removed.
    """
    if not jax.config.jax_enable_compilation_cache:
        return
    folder = compilations_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass  # Permissions do not tell: a file system may be read-only.
    except OSError as error:
        print(f"Compiled programs are not kept: cannot write {folder} ({error.strerror}).",
              file=sys.stderr, flush=True)
        return
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        _remove_oldest(folder, KEPT_BYTES)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    warnings.showwarning = functools.partial(_remove_unreadable, folder, warnings.showwarning)


def _remove_unreadable(folder: pathlib.Path, show: Callable[..., None], message: Warning,
                       *arguments) -> None:
    """As ``warnings.showwarning``: JAX warns of a file that it cannot read, but leaves it, and
    writes none in its place, so that the program would be compiled anew for ever."""
    unreadable = re.match(
        r"Error reading persistent compilation cache entry for '(\w+)'", str(message))
    if unreadable is None:
        show(message, *arguments)
        return
    print(f"A compiled {unreadable[1]} in {folder} cannot be read, and is made anew.",
          file=sys.stderr, flush=True)
    for path in folder.glob(f"{unreadable[1]}-*"):  # The message does not say which of the name.
        path.unlink(missing_ok=True)


def _remove_oldest(folder: pathlib.Path, limit: int) -> None:
    """Removes the files in a folder that were not used for longest, until ``limit`` bytes stay."""
    found = []
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # Another process does the same.
            facts = path.stat()
            if stat.S_ISREG(facts.st_mode):
                found.append((max(facts.st_atime, facts.st_mtime), facts.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found, key=lambda one: one[0]):
        if total <= limit:
            return
        path.unlink(missing_ok=True)
        total -= size


def keep_freed_memory() -> None:
    """Lets this process keep what it frees, instead of giving it back to the system, on glibc.

    XLA allocates a training step's working memory anew for each step; on CPUs the system then
    clears hundreds of megabytes, page by page, a tenth to a fifth of the step's time.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    # In the words of malloc.h: one arena, whose memory is never mapped apart and never trimmed.
    for option, value in ((-8, 1), (-4, 0), (-1, 2**31 - 1), (-2, 2**28)):
        mallopt(option, value)


def _is_one_of_several() -> bool:
    """Whether the launcher says that this process is one of several."""
    counts = [int(os.environ.get(count, 1))
              for count in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")]
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return max(*counts, len(hosts)) > 1
