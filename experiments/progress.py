"""Progress of a long step: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import tqdm

SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """Counts units of work done and shows named values beside them."""

    def __init__(self, label: str, total: int, done: int):
        self._label, self._total, self._done, self._first = label, total, done, done
        self._start = self._last_line = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm.tqdm(total=total, initial=done, desc=label, dynamic_ncols=True)

    def advance(self, count: int = 1, **values: float) -> None:
        """Adds to the work done; ``values`` replace those shown."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
            if values:
                self._bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()})
        elif values and time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._line(values)

    def close(self, **values: float) -> None:
        """Shows the last values and ends the bar."""
        if self._bar is not None:
            if values:
                self._bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()})
            self._bar.close()
        else:
            self._line(values)

    def _line(self, values):
        self._last_line = time.monotonic()
        spent = self._last_line - self._start
        done = max(self._done - self._first, 1)
        left = spent / done * (self._total - self._done)
        shown = "".join(f", {name} {value:.4g}" for name, value in values.items())
        print(f"{self._label}: {self._done}/{self._total}{shown}, "
              f"{_clock(spent)} spent, {_clock(left)} left", flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"


@contextmanager
def progress(label: str, total: int, *, done: int = 0) -> Iterator[Progress]:
    """A :class:`Progress` over ``total`` units of which ``done`` are done already."""
    shown = Progress(label, total, done)
    try:
        yield shown
    except BaseException:
        if shown._bar is not None:
            shown._bar.close()
        raise
