"""Configures devices, processes and the input pipeline, which change the time, not the result."""

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
from jaxrobust.app import interruption, provenance
from jaxrobust.app.config import InputError
from jaxrobust.data import Split
from jaxrobust.parallel import FORMS, Layout, make_layout


@dataclasses.dataclass(frozen=True)
class Execution:
    """The devices and processes of a command."""

    parallel: str = "auto"
    """"jit": one device; "mesh": all devices of all processes; "pmap": the devices of a single
    process; "auto": "mesh" with several accelerators or processes, else "jit"."""
    coordinator: str | None = None
    """HOST:PORT of the first of several processes, or "auto" to ask the cluster, as on TPU pods.
    Slurm steps, Open MPI, and TPU hosts on Kubernetes are detected without this option."""
    num_processes: int | None = None
    """Number of processes of the job; required with HOST:PORT as the coordinator."""
    process_id: int | None = None
    """Number of this process, from 0; required with HOST:PORT as the coordinator."""

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
        """Joins the job, if there is one, and returns the layout of the devices; must precede
        every other use of JAX."""
        asked = self.coordinator is not None or _is_one_of_several()
        if asked and not jax.distributed.is_initialized():
            explicit = None if self.coordinator == "auto" else self.coordinator
            try:
                jax.distributed.initialize(explicit, self.num_processes, self.process_id)
            except (ValueError, RuntimeError) as error:
                raise InputError(
                    f"Cannot join the job with coordinator={self.coordinator!r}: "
                    f"{str(error).splitlines()[0]}") from error
            # Collectives wait only 30 seconds for a late process: connect all processes now,
            # before loading a data set takes some of them longer.
            multihost_utils.sync_global_devices("start")
            interruption.install()  # JAX's handler would keep SIGTERM to itself.
        return make_layout(None if self.parallel == "auto" else self.parallel)


STEPS_PER_CALL = 100
"""Default on accelerators: few enough to show progress, enough to hide the host's time."""


@dataclasses.dataclass(frozen=True)
class Feed:
    """How training feeds images to the devices, and how often it stops to save."""

    input: str = "auto"
    """"resident": keep all training images on every device; "stream": read batches ahead while
    training, each process its share; "auto": resident if one process trains and the images take
    at most a quarter of a device's memory."""
    steps_per_call: int | None = None
    """Updates in one call of the compiled program, with resident images; by default 100 on
    accelerators and 1 on CPUs."""
    checkpoint_steps: int | None = None
    """Updates between checkpoints within an epoch; by default runs are saved only after epochs."""

    def __post_init__(self):
        _validate.one_of("input", self.input, ("auto", "resident", "stream"))
        for name in ("steps_per_call", "checkpoint_steps"):
            if getattr(self, name) is not None:
                _validate.in_range(name, getattr(self, name), 1)

    def in_memory(self) -> bool:
        """Whether to read a prepared data set into memory before training."""
        return self.input == "resident" or self.input == "auto" and jax.process_count() == 1

    def resolve(self, layout: Layout, split: Split, num_runs: int) -> "Feed":
        """Replaces every "auto" and None by a choice.
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
    """Number of images [N, H, W, channels] to test at once.

    At most 250, with at most four million pixels in all, which bounds the working memory of a
    network. On a CPU a few per core: the arrays of larger batches leave its caches. ResNet18 of
    width 64 takes 1.8 times as long with 250 images of 32 x 32 as with 24 on two cores.
    """
    _, height, width, _ = images.shape
    on_cpu = jax.default_backend() == "cpu"
    most, pixels = (max(24, 12 * os.cpu_count()), 2**18) if on_cpu else (250, 2**22)
    return max(1, min(250, most, pixels // (height * width)))


def _host_memory() -> float:
    """Bytes of memory of this machine; infinite if unknown."""
    if not hasattr(os, "sysconf"):
        return math.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def start_process() -> None:
    """Prepares this process for a command; must precede all computation."""
    # The commands report in one line what TFDS and Orbax log with a traceback.
    absl.logging.set_verbosity(absl.logging.FATAL)
    # Pillow's, without the file's name. Where the orientation is lost, reading says so and stops.
    warnings.filterwarnings("ignore", ".*EXIF|Truncated File Read|Metadata Warning", module="PIL")
    keep_freed_memory()
    keep_compilations()
    provenance.own_commit()


KEPT_BYTES = 2**31
"""Size limit of the cache of compiled programs, enforced when a command starts."""


def compilations_folder() -> pathlib.Path:
    """The folder of compiled programs: JAX_COMPILATION_CACHE_DIR, or ``jaxrobust/xla`` in the
    user's cache folder."""
    named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    caches = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return pathlib.Path(named) if named else caches / "jaxrobust" / "xla"


def keep_compilations() -> None:
    """Caches programs that take a second or more to compile, for later commands.

    They are in :func:`compilations_folder`. If it exceeds :data:`KEPT_BYTES`, the least recently
    used are removed, unless the environment names the folder. JAX_ENABLE_COMPILATION_CACHE=false
    turns the cache off. If the folder cannot be written to, or the disk is full, a line says so.
    Damaged files, as a full disk leaves them, are removed.

    JAX keys a program by its computation, the versions of JAX and XLA, flags, devices, and on CPUs
    the processor's instructions: no machine uses the program of another. Any number of processes
    may share the folder.
    """
    if not jax.config.values["jax_enable_compilation_cache"]:
        return
    folder = compilations_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass  # Permissions are not enough: the file system may be read-only.
    except OSError as error:
        print(f"Compiled programs are not cached: cannot write {folder} ({error.strerror}).",
              file=sys.stderr, flush=True)
        return
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        _remove_oldest(folder, KEPT_BYTES)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    warnings.showwarning = functools.partial(_show_warning, folder, warnings.showwarning)


def _show_warning(folder: pathlib.Path, show: Callable[..., None], message: Warning,
                  *arguments) -> None:
    """Replaces ``warnings.showwarning``: says once that programs are not cached, if JAX warns of
    each one that it cannot write; and removes each file of the cache that JAX warns it cannot read.
    JAX itself never replaces it, and would compile the program every time."""
    unwritten = re.match(
        r"Error writing persistent compilation cache entry .*\[Errno \d+\] (.*)", str(message))
    if unwritten is not None:
        _say_once(f"Compiled programs are not cached: cannot write {folder} ({unwritten[1]}).")
        return
    unreadable = re.match(
        r"Error reading persistent compilation cache entry for '(\w+)'", str(message))
    if unreadable is None:
        show(message, *arguments)
        return
    print(f"Cannot read a compiled {unreadable[1]} in {folder}; compiling it again.",
          file=sys.stderr, flush=True)
    for path in folder.glob(f"{unreadable[1]}-*"):  # The warning does not say which of them.
        path.unlink(missing_ok=True)


@functools.cache
def _say_once(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _remove_oldest(folder: pathlib.Path, limit: int) -> None:
    """Removes the least recently used files of a folder until at most ``limit`` bytes remain."""
    found = []
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # Another process may remove it.
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
    """Lets this process keep freed memory instead of returning it to the system, on glibc.

    XLA allocates its working memory again for each training step. On CPUs the system then clears
    hundreds of megabytes, page by page, which takes 10 to 20 % of the step's time.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    # The options of malloc.h: use one arena, never mmap, never trim, and extend by 256 MiB.
    for option, value in ((-8, 1), (-4, 0), (-1, -1), (-2, 2**28)):
        mallopt(option, value)


def _is_one_of_several() -> bool:
    """Whether the launcher reports several processes."""
    counts = [int(os.environ.get(count, 1))
              for count in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")]
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return max(*counts, len(hosts)) > 1
