"""Shows the progress of long work: a bar on a terminal, plain lines elsewhere."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import tqdm

SECONDS_BETWEEN_LINES = 15.0
SECONDS_OF_SILENCE = 5.0
"""Delay after which a line says that a program is being compiled."""


@contextmanager
def compiling(what: str) -> Iterator[None]:
    """Prints that ``what`` is being compiled, if it takes long."""
    options = jax.config.values
    folder = options["jax_enable_compilation_cache"] and options["jax_compilation_cache_dir"]
    later = f"cached in {folder}" if folder else "not cached"
    timer = threading.Timer(SECONDS_OF_SILENCE, tqdm.tqdm.write, [
        f"Compiling {what}. This takes minutes for large networks; the result is {later}."])
    timer.daemon = True
    if jax.process_index() == 0:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Progress:
    """Counts units of work done, and shows named values beside them."""

    def __init__(self, label: str, total: int, done: int):
        self._label, self._total, self._done, self._first = label, total, done, done
        self._start = self._last_line = time.monotonic()
        self._values: dict[str, float] = {}
        self._bar = None
        self._silent = jax.process_index() > 0
        if sys.stderr.isatty() and not self._silent:
            self._bar = tqdm.tqdm(total=total, initial=done, desc=label, dynamic_ncols=True)

    def advance(self, count: int = 1, /, **values: float) -> None:
        """Adds to the work done; replaces the values shown, if any are given."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        if values:
            self.show(**values)

    def show(self, **values: float) -> None:
        """Replaces the values shown."""
        self._values = values
        if self._bar is not None:
            self._bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()})
        elif time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._line()

    def close(self) -> None:
        """Ends the bar, or prints a last line."""
        if self._bar is not None:
            self._bar.close()
        else:
            self._line()

    def _line(self):
        if self._silent:
            return
        self._last_line = time.monotonic()
        spent = self._last_line - self._start
        done = max(self._done - self._first, 1)
        left = spent / done * (self._total - self._done)
        shown = "".join(f", {name} {value:.4g}" for name, value in self._values.items())
        spent, left = map(tqdm.tqdm.format_interval, (spent, left))
        print(f"{self._label}: {self._done}/{self._total}{shown}, {spent} spent, {left} left",
              flush=True)


@contextmanager
def progress(label: str, total: int, *, done: int = 0) -> Iterator[Progress]:
    """Shows a :class:`Progress` over ``total`` units, of which ``done`` are already done."""
    shown = Progress(label, total, done)
    try:
        yield shown
    finally:
        shown.close()
