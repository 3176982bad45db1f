"""The command line: lists the commands, and runs the one that is named.

A command is a dataclass whose fields are its options. Its module is imported only when it is named.
"""

import atexit
import errno
import importlib
import io
import os
import select
import shlex
import signal
import sys
from collections.abc import Mapping
from typing import IO, NamedTuple

from jaxrobust import InputError, __version__, _errors
from jaxrobust.app import interruption


class Command(NamedTuple):
    """Where a command is defined, and a line that describes it."""

    module: str
    name: str  # of its class in the module, or of the measurement that it makes
    summary: str


_COMMANDS = "jaxrobust.app.commands"
MEASUREMENTS = "jaxrobust.app.measurements"

COMMANDS: dict[str, Command] = {
    "demo": Command(_COMMANDS, "Demo", "Compare five training methods on digits, with a report."),
    "fit": Command(_COMMANDS, "Fit", "Train and choose the best network for your data and noise."),
    "train": Command(_COMMANDS, "Train", "Train one network."),
    "compare": Command(_COMMANDS, "Compare", "Train and test several methods, with a report."),
    "sweep": Command(_COMMANDS, "Sweep", "Compare the values of some settings."),
    "evaluate": Command(_COMMANDS, "Evaluate", "Test trained networks under noise."),
    "curvature": Command(
        f"{MEASUREMENTS}.curvature", "CURVATURE", "Measure the curvature of the loss."),
    "figures": Command(_COMMANDS, "Figures", "Relate curvature and robustness, in figures."),
    "report": Command(_COMMANDS, "Report", "Write the report of trained networks."),
    "predict": Command(_COMMANDS, "Predict", "Classify image files, each with its doubt."),
    "export": Command(_COMMANDS, "Export", "Write a network for use elsewhere."),
    "rerun": Command(_COMMANDS, "Rerun", "Train a run again and compare the results."),
    "replay": Command(_COMMANDS, "Replay", "Compute again the update that stopped a training."),
    "perturb": Command(_COMMANDS, "Perturb", "Show what perturbations do to an image."),
    "prepare": Command(_COMMANDS, "Prepare", "Download and prepare a data set."),
}
"""The commands by name, in the order of the help."""


def main(commands: Mapping[str, Command] = COMMANDS, program: str = "jaxrobust") -> None:
    """Runs the command of the command line.

    Prints bad input, and what the system refuses, such as memory or a file without permission, as
    one line and exits with 2. If SIGINT or SIGTERM ends it, prints the command that goes on and
    exits with 130 or 143. Exits with 141 and no word if whoever reads its output, such as ``head``,
    has closed the pipe, as shells report a process that SIGPIPE ends.
    """
    _prepare_streams()
    if os.path.expanduser("~") == "~":  # A user without a home, as in containers.
        os.environ["HOME"] = "/"
    ended = None
    try:
        try:
            _main(commands, program)
        except SystemExit as stop:
            ended = stop
        sys.stdout.flush()  # Here, where an error can still be handled.
    except BrokenPipeError:
        gone = [stream for stream in (sys.stdout, sys.stderr) if _reader_is_gone(stream)]
        if not gone:  # Another pipe, such as one to a process of a study.
            raise
        for stream in gone:
            _drop(stream)
        sys.exit(ended.code if ended and ended.code else 128 + signal.SIGPIPE)
    except OSError as error:
        refused = _refused(error)
        if refused is None:
            raise
        try:
            sys.stdout.flush()
        except OSError:
            _drop(sys.stdout)
        _print_error(refused)
        sys.exit(2)
    if ended is not None:
        raise ended


def _prepare_streams() -> None:
    """Opens the standard streams that this process was started without, of which the next file that
    is opened would take the place; and has them write what their encoding lacks, such as a file's
    name that is not UTF-8, as escapes."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # Takes the lowest number that is free, this one.
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, "w" if number else "r"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def _refused(error: OSError) -> str | None:
    """What the system refused, in a line; None for an error that is a defect of the program."""
    if error.filename is not None:
        return f"Cannot use {error.filename}: {error.strerror}."
    # Writing files raises InputError: it is the output.
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
    return f"Cannot write the output: {error.strerror}." if full else None


def _drop(stream: IO[str]) -> None:
    """Drops what a stream has not written, which Python would write once more at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _print_error(text: str) -> None:
    line = text.replace("\n", "\\n")  # Names of files may contain one.
    print(f"error: {line}", file=sys.stderr)


def _reader_is_gone(stream: IO[str]) -> bool:
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _main(commands: Mapping[str, Command], program: str) -> None:
    words = sys.argv[1:]
    if words[:1] in (["--help"], ["-h"]):
        print(help_text(commands, program))
        return
    if words[:1] == ["--version"]:
        print(f"jaxrobust {__version__}")
        return
    command = None
    try:
        with interruption.handled():
            command = _command(words, commands, program)
            command()
    except KeyboardInterrupt as error:
        # Python's own where SIGINT is not handled here, as in a thread.
        stop = (error if isinstance(error, interruption.Interrupted)
                else interruption.Interrupted(signal.SIGINT))
        print(f"{stop.signal.name}: stopped. To go on: {_going_on(command, words, program)}",
              file=sys.stderr)
        # A second Ctrl-C ends the process at once, without a traceback of what cleans up.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)
        sys.exit(stop.status)
    except InputError as error:
        lines = getattr(error, "lines", ())  # One for each image that cannot be used.
        for line in lines:
            print(line, file=sys.stderr)
        # The option may belong to the command itself, or to the run that it trains.
        skips = lines and any(hasattr(options, "skip_bad") for options in (
            command, getattr(command, "run", None)))
        hint = " Add --skip-bad to skip them." if skips else ""
        _print_error(f"{error}{hint}")
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        # JAX's own, whose class is not known before JAX is imported.
        if isinstance(error, RuntimeError) and not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        _print_error(f"Not enough memory: {_errors.reason_of(error)}.")
        sys.exit(2)


def _command(words, commands, program):
    """Reads the command of a command line, and prepares this process for it."""
    if not words:
        raise InputError(f"Expected a command, got none. See {program} --help.")
    _errors.one_of("command", words[0], commands)
    for word in words:
        if not _is_utf8(word):  # Not all that reads and writes files takes such names.
            raise InputError(f"Expected UTF-8, got {ascii(word)}.")
    # Not at the top: it imports JAX, which the help does not need.
    from jaxrobust.app import arguments, execution

    execution.start_process()
    return arguments.parse(find(commands[words[0]]), words, program)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _going_on(command, words, program) -> str:
    """The command line that resumes a command, or runs it again."""
    more = ["--resume"] if getattr(command, "resume", None) is False else []
    return f"{program} {shlex.join([*words, *more])}"


def find(command: Command) -> type:
    """Imports the class of a command."""
    found = getattr(importlib.import_module(command.module), command.name)
    if isinstance(found, type):
        return found
    return importlib.import_module(_COMMANDS).command_of(found)


def help_text(commands: Mapping[str, Command], program: str) -> str:
    """The text of ``--help``."""
    width = max(map(len, commands))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in commands.items()]
    return "\n".join([
        f"usage: {program} COMMAND [OPTIONS]", "",
        "Train and test image classifiers that keep their accuracy when inputs are noisy.", "",
        *lines, "", f"{program} COMMAND --help lists the options of a command."])
