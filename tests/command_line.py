"""The command line, as the tests of the commands use it."""

import sys

from experiments import __main__ as experiments
from jaxrobust.app import arguments, cli, files


def call(*arguments):
    """What a user's command line does: exit status 0 or that of SystemExit."""
    previous, sys.argv = sys.argv, ["experiments/__main__.py", *map(str, arguments)]
    try:
        experiments.main()
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = previous
    return 0


def parse(words):
    """The command that the words of a command line make."""
    return arguments.parse(
        cli.find(experiments.COMMANDS[words[0]]), words, "python -m experiments")


def one_line(capsys):
    """The only line on the standard error."""
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    return said[0]


def metrics_of(folder):
    """What a run logged of each epoch, but for the time."""
    rows = files.read_lines(folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
