"""Command lines of all commands with one word spoilt, for fuzzing.

Each would end with a line of its own even if its spoilt word were accepted, since there is no
run, data set or file of that name. It starts no work.
"""

import contextlib
import functools
import io
import os
import re
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import numpy as np
from command_line import call

NOWHERE = "nowhere/at/all"
LINES = {
    "reproduce": ("cifar10", "--data-dir", NOWHERE), "demo": ("--jobs", "0"),
    "fit": ("cifar10", "--data-dir", NOWHERE), "train": ("cifar10/both", "--data-dir", NOWHERE),
    "compare": ("cifar10", "--data-dir", NOWHERE),
    "sweep": ("cifar10/both", "--over", "robust.lam=1,2", "--data-dir", NOWHERE),
    "evaluate": (NOWHERE,), "curvature": (NOWHERE,), "figures": (NOWHERE,), "report": (NOWHERE,),
    "predict": (NOWHERE, "x.png"), "export": (NOWHERE,), "perturb": ("nowhere.png",),
    "prepare": ("cifar11",), "steps": (NOWHERE,), "theory": (NOWHERE,), "sharpness": (NOWHERE,),
    "readme": ("more",), "bench": ("nothing",), "replay": (NOWHERE,), "rerun": (NOWHERE,),
}
"""A line of each command, without its name."""

START_ALONE = {"demo", "readme", "bench"}
"""Commands that start their work with no word at all, so that no word of theirs may be cut."""

NO_NUMBERS = ("abc", "", "1.5.2", "0x", "1;2", "é", "--", "None1", "[1]", "1e", "x" * 5000)
NUMBERS = ("nan", "inf", "-inf", "-1", "0", "1e400", "-1e-9", str(10**30), str(-(10**30)), "2.5")
TEXTS = ("", " ", "../../etc", "\n", "a\0b", "%s", "{}", "=", "x" * 5000, "digits/", "/", "é\ud800",
         "folder:", "folder:/dev/null", "gaussian(", "gaussian(1e999)", "gaussian(0.1)+" * 200)


class Line(NamedTuple):
    """A command line, and what its error has to name; None where anything may be wrong first."""

    words: tuple[str, ...]
    named: str | None


@functools.cache
def options_of(command: str) -> dict[str, str]:
    """The options of a command, each with the words that its help shows for its value."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        call(command, "--help-all")
    plain = re.sub(r"\x1b\[[\d;]*m", "", text.getvalue())  # Without colours.
    # The border is a line, in ASCII, or spaces.
    found = re.findall(r"^[ │|]*(--[a-z][\w.-]*)((?: \S+)*)", plain, re.MULTILINE)
    return {name: words.strip() for name, words in found if name != "--help"}


def lines(seed: int, number: int) -> Iterator[Line]:
    """Draws command lines, the commands in turn."""
    random = np.random.default_rng(seed)
    for index in range(number):
        command = list(LINES)[index % len(LINES)]
        yield _spoilt(command, random)


def _spoilt(command, random) -> Line:
    base, options = LINES[command], options_of(command)
    kind = random.choice(["number", "number", "number", "text", "unknown", "cut", "twice", "order"])
    numeric = [name for name, words in options.items() if re.search(r"\b(INT|FLOAT)\b", words)]
    if kind == "number" and numeric:
        option = str(random.choice(numeric))
        wrong = str(random.choice((*NO_NUMBERS, *NUMBERS)))
        strict = wrong in NO_NUMBERS and "STR" not in options[option]
        return Line((command, *base, f"{option}={wrong}"), option if strict else None)
    if kind == "text" and options:
        option = str(random.choice(list(options)))
        return Line((command, *base, f"{option}={random.choice(TEXTS)}"), None)
    if kind == "unknown":
        option = str(random.choice([*options, "--data"])) + "x"
        return Line((command, *base, option, "1"), option)
    words = (command, *base)
    if kind == "cut" and command not in START_ALONE:
        return Line(words[: int(random.integers(1, len(words) + 1))], None)
    if kind == "twice":
        return Line((*words, *words), None)
    return Line((command, *map(str, random.permutation(base)), str(random.choice(TEXTS))), None)


def fault_of(line: Line) -> str | None:
    """What is wrong with how the program takes a line; None if nothing is."""
    said, shown = io.StringIO(), " ".join(word[:40] for word in line.words)
    try:
        with mock.patch.dict(os.environ, TFDS_DATA_DIR=NOWHERE), \
                contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            status = call(*line.words)
    except Exception as error:  # What the fuzzing looks for.
        return f"{shown!r} raises {type(error).__name__}: {str(error)[:150]}"
    errors = said.getvalue().strip().splitlines()
    if status != 2:
        return f"{shown!r} ends with status {status}: {errors}"
    if len(errors) != 1 or not errors[0].startswith("error: "):
        return f"{shown!r} says {errors}"
    if line.named is not None:
        name = line.named.removeprefix("--").rpartition(".")[2]
        if not any(one in errors[0] for one in (name, name.replace("-", "_"))):
            return f"{shown!r} does not name {line.named}: {errors[0][:200]}"
    return None
