"""The words of a command line: what they are before anything is checked, and what is wrong."""

import contextlib
import dataclasses
import difflib
import functools
import io
import itertools
import re
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro

from experiments.config import InputError

PROGRAM = "python -m experiments"


def unchecked_copy(value: Any) -> Any:
    """A dataclass instance as one of a class without checks, those in it too; can be changed."""
    if not dataclasses.is_dataclass(value):
        return value
    return _unchecked(type(value))(**{
        field.name: unchecked_copy(getattr(value, field.name))
        for field in dataclasses.fields(value)})


def parse_unchecked(default: Any, words: Sequence[str]) -> Any:
    """What the words of a command say, and ``default`` of the rest, whatever the values are.

    Checks may refuse words only because of defaults that are not theirs: those of another recipe.

    Args:
      default: what :func:`unchecked_copy` made of a command.
      words: the command's name and all that follows it.

    Returns:
      An instance of the class of ``default``.
    """
    return tyro.cli(type(default), args=words[1:], default=default, prog=f"{PROGRAM} {words[0]}")


@functools.cache
def _unchecked(kind: type) -> type:
    """The fields of a dataclass, and of those in it, without ``__post_init__``."""
    fields = []
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        inner, *marks = typing.get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
        if dataclasses.is_dataclass(inner):
            inner = _unchecked(inner)
        fields.append((name, Annotated[inner, *marks] if marks else inner))
    return dataclasses.make_dataclass(kind.__name__, fields)


def one_line_of(parse: Callable[[Sequence[str]], Any], words: Sequence[str]) -> Any:
    """What ``parse`` makes of the words.

    Raises:
      InputError: (a ValueError) in one line, for what tyro draws a box of, or what a configuration
        within it refuses.
      SystemExit: with status 0, after the help.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse(words)
    except SystemExit as stop:
        cause: BaseException | None = stop
        while cause is not None:
            if isinstance(cause, InputError):
                raise cause from None
            cause = cause.__context__
        if not stop.code:
            raise
    help_of = [PROGRAM, *([] if not words or words[0].startswith("-") else [words[0]]), "--help"]
    raise InputError(f"{_unknown_option(parse, words) or _message(said.getvalue())} "
                     f"See {' '.join(help_of)}.")


def _unknown_option(parse: Callable[[Sequence[str]], Any], words: Sequence[str]) -> str | None:
    """A sentence on the first word that looks like an option and is none of the command."""
    helped = io.StringIO()
    with contextlib.redirect_stdout(helped), contextlib.suppress(SystemExit):
        parse([words[0], "--help"] if words else ["--help"])
    known = re.findall(r"(?<![\w-])--[a-z][\w.-]*", helped.getvalue())
    for word in words:
        option = word.partition("=")[0].replace("_", "-")
        if option.startswith("--") and option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            return f"Unknown option {option} of {words[0]}.{hint}"
    return None


def _message(box: str) -> str:
    """The first paragraph of a box, and how the option in it is written, as one line."""
    # The border is drawn in ASCII where the output bears no more; rules become empty.
    lines = [re.sub(r"^-+$", "", line.strip(" │╭╮╰╯─|+")) for line in box.splitlines()]
    title, *lines = itertools.dropwhile(lambda line: not line, lines)
    lines = list(itertools.dropwhile(lambda line: not line, lines))
    end = lines.index("") if "" in lines else len(lines)
    message = (" ".join(lines[:end]) or title).replace("Unrecognized options", "Unexpected words")
    for place, line in enumerate(lines):
        if line == "Argument helptext:":
            return f"{message.rstrip('.')}. Expected {lines[place + 1]}."
    return f"{message.rstrip('.')}."
