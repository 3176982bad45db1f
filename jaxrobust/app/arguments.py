"""Parses command lines, and describes errors in them in one line."""

import contextlib
import dataclasses
import difflib
import functools
import io
import itertools
import re
import typing
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from jaxrobust.app.config import InputError

COMMON = frozenset({
    "benchmark", "budget", "data", "dataset", "dry_run", "epochs", "folders", "image", "images",
    "init_from", "jobs", "join_near_copies", "like", "limit", "method", "methods", "model",
    "noise", "noise_levels", "noise_std", "num_draws", "num_images", "out", "over", "perturb",
    "recipe", "resume", "rows", "run", "runs", "scale", "seed", "seeds", "skip_bad", "suite"})
"""The options that ``--help`` shows; ``--help-all`` shows all."""


def parse(kind: type, words: Sequence[str], program: str) -> Any:
    """Makes a command, an instance of ``kind``, from its name and the options that follow.

    If ``kind`` has a classmethod ``default_of(options, called)``, this provides the defaults.

    Raises:
      InputError: (a ValueError) in one line, for an option that does not fit the command, or a
        value that a configuration refuses.
      SystemExit: with status 0, after the help.
    """
    name, *options = words
    called = f"{program} {name}"
    brief = bool({"-h", "--help"} & set(options))
    options = ["--help" if word == "--help-all" else word for word in options]
    default = kind.default_of(options, called) if hasattr(kind, "default_of") else None
    if brief:
        kind, default = _relaxed(kind, True), default and relaxed(default, True)
        print(f"The common options of {called}; --help-all shows the others too.")
    return read(kind, options, called, default)


def relaxed(value: Any, brief: bool = False) -> Any:
    """Copies a dataclass instance, also those nested in it, into classes without checks.

    Checks could refuse valid options because of defaults that belong to another recipe. With
    ``brief``, the help of these classes shows only the options in :data:`COMMON`.
    """
    if not dataclasses.is_dataclass(value):
        return value
    kind: Any = type(value)
    return _relaxed(kind, brief)(**{
        field.name: relaxed(getattr(value, field.name), brief)
        for field in dataclasses.fields(value)})


@functools.cache
def _relaxed(kind: type, brief: bool) -> type:
    body: dict[str, Any] = {"__annotations__": {}, "__doc__": kind.__doc__,
                            "__post_init__": lambda self: None}
    hints = typing.get_type_hints(kind, include_extras=True)
    inner: Any
    for field in dataclasses.fields(kind):
        inner, *marks = _without_marks(hints[field.name])
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            inner = _relaxed(inner, brief)
        elif brief and field.name not in COMMON:
            marks.append(tyro.conf.Suppress)
        body["__annotations__"][field.name] = Annotated[inner, *marks] if marks else inner
        body[field.name] = dataclasses.field(
            default=relaxed(field.default, brief), default_factory=field.default_factory,
            kw_only=field.kw_only)
    return dataclasses.dataclass(frozen=True)(type(kind.__name__, (kind,), body))


def _without_marks(hint: Any) -> tuple[Any, ...]:
    """The type of a hint, followed by its marks for tyro."""
    return typing.get_args(hint) if hasattr(hint, "__metadata__") else (hint,)


def read(kind: type, options: Sequence[str], called: str, default: Any = None) -> Any:
    """Makes an instance of ``kind`` from options; ``called`` is the command in messages.

    Raises:
      InputError: (a ValueError) in one line, instead of tyro's box, or from a configuration.
      SystemExit: with status 0, after the help.
    """
    defaults = {} if default is None else {"default": default}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=options, prog=called, **defaults)
    except SystemExit as stop:
        cause: BaseException | None = stop
        while cause is not None:
            if isinstance(cause, InputError):
                raise cause from None
            cause = cause.__context__
        if not stop.code:
            raise
    message = _unknown_option(kind, options, called, defaults) or _message(said.getvalue())
    raise InputError(f"{message} See {called} --help.")


def _unknown_option(
    kind: type, options: Sequence[str], called: str, defaults: dict[str, Any]
) -> str | None:
    """Describes the first option that the command does not have; None if it has all of them."""
    helped = io.StringIO()
    with contextlib.redirect_stdout(helped), contextlib.suppress(SystemExit):
        tyro.cli(kind, args=["--help"], prog=called, **defaults)
    known = re.findall(r"(?<![\w-])--[a-z][\w.-]*", helped.getvalue())
    for word in options:
        option = word.partition("=")[0].replace("_", "-")
        if option.startswith("--") and option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            return f"Unknown option {option} of {called.split()[-1]}.{hint}"
    return None


def _message(box: str) -> str:
    """The first paragraph of tyro's box, and the syntax of the option in it, as one line."""
    # The border is in ASCII if the output allows nothing else; rules become empty lines.
    lines = [re.sub(r"^-+$", "", line.strip(" │╭╮╰╯─|+")) for line in box.splitlines()]
    title, *lines = itertools.dropwhile(lambda line: not line, lines)
    lines = list(itertools.dropwhile(lambda line: not line, lines))
    end = lines.index("") if "" in lines else len(lines)
    message = (" ".join(lines[:end]) or title).replace("Unrecognized options", "Unexpected words")
    for place, line in enumerate(lines):
        if line == "Argument helptext:":
            return f"{message.rstrip('.')}. Expected {lines[place + 1]}."
    return f"{message.rstrip('.')}."
