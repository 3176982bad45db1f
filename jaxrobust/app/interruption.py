"""Stops a command in good order on SIGINT (Ctrl-C) and on SIGTERM, which schedulers send first.

    signal ─ handler ─▶ Interrupted, at once ─▶ the command line: one line, status 128 + number
                   └▶ within `held()`: noted; training saves a checkpoint and raises it then
"""

import contextlib
import functools
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal has asked this process, or one of its job, to stop."""

    def __init__(self, number: int):
        super().__init__(number)  # All there is, so that processes can send it to each other.
        self.signal = signal.Signals(number)

    @property
    def status(self) -> int:
        """The exit status, as shells report a process that a signal ends."""
        return 128 + self.signal


_asked: int | None = None
_holders = 0
_dropped = False


def _note(number, _frame) -> None:
    global _asked, _dropped
    # A job and its launcher may both send SIGTERM; a second Ctrl-C means "at once".
    again = _asked is not None and number == signal.SIGINT and not _dropped
    _asked, _dropped = _asked or number, False
    if not _holders or again:
        raise Interrupted(_asked)


def _come_again(show: Callable[[Any], object], unraisable: Any) -> None:
    """Replaces ``sys.unraisablehook``: where Python would drop an Interrupted, its signal comes
    again a moment later. That is so in callbacks of the garbage collector, of which JAX has one."""
    global _dropped
    if not isinstance(unraisable.exc_value, Interrupted):
        show(unraisable)
        return
    _dropped = True
    timer = threading.Timer(0.01, _send_again, [unraisable.exc_value.signal])
    timer.daemon = True
    timer.start()


def _send_again(number: signal.Signals) -> None:
    if signal.getsignal(number) is _note:
        # To the thread that handles signals, to wake it from what it may wait for.
        signal.pthread_kill(threading.main_thread().ident or 0, number)


def install(*, hold: bool = False) -> None:
    """Handles the signals of :data:`SIGNALS`, except those that this process was told to ignore.

    JAX installs a handler of its own when a process joins a job; call it again after that. With
    ``hold``, the whole process is as within :func:`held`, but for what is within :func:`released`.
    """
    global _holders
    _holders += hold
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _note)
        if getattr(sys.unraisablehook, "func", None) is not _come_again:
            sys.unraisablehook = functools.partial(_come_again, sys.unraisablehook)


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Handles the signals within, and forgets before and after what was asked."""
    global _asked
    before = {number: signal.getsignal(number) for number in SIGNALS}
    show = sys.unraisablehook
    _asked = None
    install()
    try:
        yield
    finally:
        _asked = None
        sys.unraisablehook = show
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Within, the first signal raises nothing; see :func:`asked`."""
    global _holders
    _holders += 1
    try:
        yield
    finally:
        _holders -= 1


@contextlib.contextmanager
def released() -> Iterator[None]:
    """Undoes :func:`held` within; raises Interrupted at once if a signal has come."""
    global _holders
    before, _holders = _holders, 0
    try:
        check()
        yield
    finally:
        _holders = before


def asked() -> int | None:
    """The number of the signal that asked this process to stop, or None."""
    return _asked


def check() -> None:
    """Raises Interrupted if a signal has asked this process to stop."""
    if _asked is not None:
        raise Interrupted(_asked)
