"""Signals: a command stops in good order, says how to go on, and has the status of shells."""

import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import pytest
from command_line import call, one_line

from jaxrobust.app import commands, interruption


def stop_by(*numbers):
    def called(self):
        for number in numbers:
            signal.raise_signal(number)
        raise AssertionError("not stopped")
    return called


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_command_says_how_to_go_on(number, status, capsys, monkeypatch):
    handlers = [signal.getsignal(one) for one in interruption.SIGNALS]
    monkeypatch.setattr(commands.Train, "__call__", stop_by(number))
    monkeypatch.setattr(commands._Evaluate, "__call__", stop_by(number))
    name = signal.Signals(number).name
    for words, more in ((("train", "digits", "--out", "a b"), " --resume"),
                        (("train", "digits", "--out", "a b", "--resume"), ""),
                        (("evaluate", "a b"), "")):
        assert call(*words) == status
        shown = " ".join(words).replace("a b", "'a b'")
        assert one_line(capsys) == (
            f"{name}: stopped. To go on: python -m experiments {shown}{more}")
    assert [signal.getsignal(one) for one in interruption.SIGNALS] == handlers


@pytest.mark.parametrize("words", [
    ("--help",), pytest.param(("train", "--help-all"), marks=pytest.mark.slow)])
def test_a_pipe_that_its_reader_has_closed_ends_a_command_quietly(words):
    for unbuffered in ("", "1"):
        read, write = os.pipe()
        os.close(read)
        with open(write, "wb") as output:
            ended = subprocess.run(
                [sys.executable, "-m", "jaxrobust", *words], stdout=output, stderr=subprocess.PIPE,
                env=os.environ | {"PYTHONUNBUFFERED": unbuffered}, check=False)
        assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, b"")


def test_another_pipe_that_is_closed_is_an_error(monkeypatch):
    def called(self):
        raise BrokenPipeError("to a worker")

    monkeypatch.setattr(commands.Train, "__call__", called)
    with pytest.raises(BrokenPipeError, match="to a worker"):
        call("train", "digits")


def test_a_held_signal_waits_and_a_second_ctrl_c_does_not():
    with interruption.handled(), interruption.held():
        for number in (signal.SIGTERM, signal.SIGTERM):
            signal.raise_signal(number)
            assert interruption.asked() == signal.SIGTERM
        with pytest.raises(interruption.Interrupted), interruption.released():
            raise AssertionError("released before")
        with pytest.raises(interruption.Interrupted) as stopped:
            signal.raise_signal(signal.SIGINT)
        assert stopped.value.status == 143  # That of the first.
    interruption.check()  # What was asked of the last command is forgotten.


TWICE = """
import atexit, signal, sys
from jaxrobust.app import cli, commands
atexit.register(signal.raise_signal, signal.SIGINT)
commands.Train.__call__ = lambda self: signal.raise_signal(signal.SIGINT)
sys.argv = ["jaxrobust", "train", "digits"]
cli.main()
"""
"""Ctrl-C in a command, and once more at the end of the process."""


@pytest.mark.slow
def test_a_second_ctrl_c_ends_the_process_at_once_and_quietly():
    ended = subprocess.run([sys.executable, "-c", TWICE], stderr=subprocess.PIPE, check=False)
    assert ended.returncode == -signal.SIGINT
    assert ended.stderr == b"SIGINT: stopped. To go on: jaxrobust train digits --resume\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_a_callback_whose_exceptions_python_drops_is_not_lost(number, capsys):
    def collected(phase, facts):
        gc.callbacks.remove(collected)
        signal.raise_signal(number)

    # The youngest objects alone: all that a long suite has left would take seconds.
    with interruption.handled():
        gc.callbacks.append(collected)
        start = time.monotonic()
        with pytest.raises(interruption.Interrupted) as stopped:
            gc.collect(0)
            time.sleep(9)
        assert stopped.value.signal == number and time.monotonic() - start < 5
    with interruption.handled():
        gc.callbacks.append(collected)
        gc.collect(0)
        with interruption.held():  # Where it is not taken for a second one.
            time.sleep(0.1)
            assert interruption.asked() == number
    assert capsys.readouterr().err == ""


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruption.handled():
            signal.raise_signal(signal.SIGINT)
            assert interruption.asked() is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interruption_reaches_another_process_as_it_is():
    sent = pickle.loads(pickle.dumps(interruption.Interrupted(signal.SIGTERM)))
    assert (sent.signal, sent.status) == (signal.SIGTERM, 143)


def test_a_command_in_another_thread_handles_nothing():
    def run():
        with interruption.handled():
            handlers.append(signal.getsignal(signal.SIGTERM))

    handlers = [signal.getsignal(signal.SIGTERM)]
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert handlers[0] == handlers[1]
