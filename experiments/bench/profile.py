"""``bench profile``: where the time of one training step goes, by kind of operation.

    python -m experiments bench profile

One step of ``robust`` on a ResNet18, recorded with ``jax.profiler``; its operations are told
apart by the text of the compiled program.
"""

import collections
import dataclasses
import functools
import gzip
import json
import pathlib
import re
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.profiler import ProfileData

from experiments.bench import markdown, programs, timing
from jaxrobust.app import files, provenance
from jaxrobust.app.report.page import significant
from jaxrobust.parallel import make_layout

IDLE = "no operation running"

KINDS = (
    "convolution, forward", "convolution, input gradient", "convolution, kernel gradient",
    "matrix product", "reduction", "gather, scatter or sort", "random numbers",
    "copy or transpose, with what is fused into it", "elementwise", "communication", "other", IDLE)
"""Of operations, in the order of the table."""

_FORWARD, _INPUT, _KERNEL, _DOT, _REDUCE, _GATHER, _RANDOM, _COPY, _ELEMENTWISE, _SEND, _OTHER = (
    KINDS[:-1])

LARGEST_TRACE = 10**6
"""Bytes of the compressed trace; a larger one loses its shortest events."""

TOP = 12
"""Operations that are named one by one."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is recorded; the defaults are the paper's network and batch."""

    width: int = 64
    batch_size: int = 64
    num_images: int = 640  # of noise
    rounds: int = 3  # of the step without the profiler


QUICK = Settings(width=1, batch_size=4, num_images=8, rounds=1)
"""Shows that everything works, and nothing else."""


class Span(NamedTuple):
    """Of an operation, on one thread or stream."""

    name: str
    start: float  # nanoseconds
    end: float


def profile_step(folder: pathlib.Path, *, quick: bool = False) -> str:
    """Writes ``profile.json``, ``profile.md`` and ``trace.json.gz``, for https://ui.perfetto.dev.

    Returns:
      The table of the kinds.

    Raises:
      InputError: (a ValueError) if the folder holds something else, or other settings.
    """
    settings = QUICK if quick else Settings()
    result = {"benchmark": "profile", "settings": dataclasses.asdict(settings)}
    files.claim(folder, "settings.json", json.dumps(result, indent=2) + "\n")
    config = programs.run_config("resnet18", programs.Settings(
        width=settings.width, batch_size=settings.batch_size))
    runner = programs.Runner(
        [config], programs.noise_images(settings.num_images), make_layout("jit"), 1)
    compiled = runner.step.lower(runner.state, runner.shared, runner.positions).compile()
    runner.step = compiled
    load = [timing.load_average()]
    untraced = timing.in_turn({"step": runner.call}, settings.rounds)["step"]
    lines, trace, traced = _record(runner)
    kept = _trimmed(trace)
    nanoseconds = by_kind(lines, op_kinds(compiled.as_text()))
    total = sum(nanoseconds.values())
    result |= {
        "provenance": provenance.describe() | {
            "cores": timing.cores(), "load_average": [*load, timing.load_average()]},
        "case": programs.case_name(config),
        "step_ms": programs.summary([1e3 * value for value in untraced]),
        "traced_ms": 1e3 * traced,
        "recorded_ms": total / 1e6,
        "lines": len(lines),
        "kinds": {kind: {"ms": nanoseconds[kind] / 1e6, "share": nanoseconds[kind] / total}
                  for kind in KINDS},
        "largest": _largest(lines, compiled.as_text()),
        "trace_events": [len(trace), len(kept)],
    }
    with files.replacing(folder / "trace.json.gz") as partial:
        partial.write_bytes(_packed(kept))
    files.write_json(folder / "profile.json", result)
    files.write_text(folder / "profile.md", page_text(result))
    return kind_table(result)


def _record(runner: programs.Runner) -> tuple[list[list[Span]], list[dict], float]:
    """One step's operations by line, its trace for a viewer, and the seconds it took."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Thousands of events that say nothing of the step.
    with tempfile.TemporaryDirectory() as recorded:
        with jax.profiler.trace(recorded, profiler_options=options):
            start = time.perf_counter()
            runner.call()
            seconds = time.perf_counter() - start
        data, = pathlib.Path(recorded).rglob("*.xplane.pb")
        shown, = pathlib.Path(recorded).rglob("*.trace.json.gz")
        with gzip.open(shown, "rt") as file:
            trace = json.load(file)["traceEvents"]
        return op_lines(ProfileData.from_file(str(data))), trace, seconds


def op_lines(profile: ProfileData) -> list[list[Span]]:
    """The operations of each thread (CPUs) or stream (GPUs) that ran any.

    A kernel that does not say to which operation it belongs goes by its own name.
    """
    on_device = [plane for plane in profile.planes if plane.name.startswith("/device:")]
    lines = []
    for plane in on_device or profile.planes:
        for line in plane.lines:
            if on_device and not line.name.startswith("Stream"):
                continue  # The same again, put together in other ways.
            spans = []
            for event in line.events:
                name = dict(pair for pair in event.stats if pair[0]).get("hlo_op")
                if name is not None or on_device:
                    spans.append(Span(str(name or event.name), event.start_ns,
                                      event.start_ns + event.duration_ns))
            lines += [spans] if spans else []
    return lines


def by_kind(lines: Iterable[Sequence[Span]], kinds: Mapping[str, str]) -> dict[str, float]:
    """Nanoseconds of each of :data:`KINDS`, from the first operation's start to the last's end.

    An operation that contains others, such as a loop, has the time that they leave. Where several
    run at once each has an equal part of the time, so that the sum is the time that passed.

    Args:
      lines: of operations; those of one line are one after the other, or within each other.
      kinds: by the name of an operation; that of others is told by their own name.
    """
    marks = []
    for spans in lines:
        for span in innermost(spans):
            kind = kinds.get(span.name) or kernel_kind(span.name)
            marks += [(span.start, 1, kind), (span.end, -1, kind)]
    marks.sort(key=lambda mark: mark[0])
    total = dict.fromkeys(KINDS, 0.0)
    running: collections.Counter[str] = collections.Counter()
    before = marks[0][0]
    for now, change, kind in marks:
        number = sum(running.values())
        for name, count in running.items():
            total[name] += (now - before) * count / number if number else 0.0
        total[IDLE] += 0.0 if number else now - before
        running[kind] += change
        before = now
    return total


def innermost(spans: Iterable[Span]) -> list[Span]:
    """The same line, cut up so that at any time only the innermost operation is there."""
    cut: list[Span] = []
    open_spans: list[Span] = []
    now = 0.0

    def until(time):
        nonlocal now
        if open_spans and time > now:
            cut.append(Span(open_spans[-1].name, now, time))
        now = max(now, time)

    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        while open_spans and open_spans[-1].end <= span.start:
            until(open_spans[-1].end)
            open_spans.pop()
        until(span.start)
        open_spans.append(span)
    while open_spans:
        until(open_spans[-1].end)
        open_spans.pop()
    return cut


_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([^\s(]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(\S+) = (.+?) ([a-z][\w\-]*)\((.*)$")
_MOVES = {"copy", "transpose", "bitcast", "bitcast-convert", "reshape", "broadcast", "slice",
          "concatenate", "pad", "reverse", "tuple", "get-tuple-element", "parameter", "constant",
          "iota", "convert", "dynamic-slice", "dynamic-update-slice", "copy-start", "copy-done"}
_COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")


def op_kinds(hlo: str) -> dict[str, str]:
    """The kind of every instruction of a compiled program, by its name.

    A fusion is what weighs most in it. The gradient of a convolution by its kernel is the one
    with an output as small as a kernel, at most 3 x 3, which no image here is; the one by its
    input is another that the compiler says to stem from a transposed one, or that has its input
    dilated.

    Args:
      hlo: its text, as ``compiled.as_text()`` gives it.
    """
    bodies: dict[str, list[tuple[str, str, str, str]]] = {}
    body: list = []
    for line in hlo.splitlines():
        if found := _COMPUTATION.match(line):
            body = bodies.setdefault(found[1], [])
        elif found := _INSTRUCTION.match(line):
            body.append(found.groups())

    @functools.cache
    def inside(computation):
        """The kinds in a computation, and the operations."""
        found, codes = set(), set()
        for instruction in bodies.get(computation, ()):
            found.add(kind_of(*instruction[1:]))
            codes.add(instruction[2])
        return found, codes

    def kind_of(shape, code, rest):
        if code == "convolution":
            return _convolution(shape, rest)
        if code == "custom-call":
            return kernel_kind(_quoted("custom_call_target", rest))
        if code in ("fusion", "call", "async-start"):
            called = re.search(r"(?:calls|to_apply)=%?([^\s,]+)", rest)
            found, codes = inside(called[1]) if called else (set(), set())
            for kind in (_FORWARD, _INPUT, _KERNEL, _DOT, _SEND, _GATHER, _REDUCE):
                if kind in found:
                    return kind
            # Threefry is made of these, and nothing else here is.
            if {"xor", "shift-right-logical"} <= codes or _RANDOM in found:
                return _RANDOM
            if {"transpose", "copy"} & codes or codes <= _MOVES:
                return _COPY
            return _ELEMENTWISE
        if code == "while":
            named = _quoted("op_name", rest)
            return _RANDOM if re.search("threefry|random|shuffle", named) else _OTHER
        if code.startswith(_COLLECTIVES):
            return _SEND
        return {"dot": _DOT, "reduce": _REDUCE, "reduce-window": _REDUCE, "gather": _GATHER,
                "scatter": _GATHER, "sort": _GATHER, "rng-bit-generator": _RANDOM}.get(
                    code, _COPY if code in _MOVES else _ELEMENTWISE)

    return {name: kind_of(*rest) for body in bodies.values() for name, *rest in body}


def _convolution(shape: str, rest: str) -> str:
    sizes = [int(size) for size in re.search(r"\[([\d,]*)\]", shape)[1].split(",")]
    labels = re.search(r"dim_labels=\S+?->(\w+)", rest)[1]
    if all(size <= 3 for size, label in zip(sizes, labels, strict=True) if label.isdigit()):
        return _KERNEL
    backward = "transpose(" in _quoted("op_name", rest) or "lhs_dilate" in rest
    return _INPUT if backward else _FORWARD


def _quoted(name: str, rest: str) -> str:
    found = re.search(rf'{name}="([^"]*)"', rest)
    return found[1] if found else ""


def kernel_kind(name: str) -> str:
    """The kind of a kernel or a library's function, as far as its name tells."""
    for pattern, kind in (
            (r"convBackwardFilter|wgrad", _KERNEL), (r"convBackwardInput|dgrad", _INPUT),
            (r"\$conv|fprop|implicit_gemm|convolve|conv2d", _FORWARD),
            (r"gemm|cublas|matmul|^dot", _DOT), (r"nccl|all.?reduce", _SEND),
            (r"[Mm]em(cpy|set)|transpose|copy", _COPY), (r"reduce", _REDUCE),
            (r"[Ss]ort|scatter|gather", _GATHER), (r"rng|threefry", _RANDOM),
            (r"fusion", _ELEMENTWISE)):
        if re.search(pattern, name):
            return kind
    return _OTHER


def _largest(lines: Iterable[Sequence[Span]], hlo: str) -> list[dict]:
    """The operations that take the most, in milliseconds on their lines."""
    kinds = op_kinds(hlo)
    sources = {found[1]: _quoted("op_name", found[4]) for found in map(
        _INSTRUCTION.match, hlo.splitlines()) if found}
    spent: collections.Counter[str] = collections.Counter()
    for spans in lines:
        for span in innermost(spans):
            spent[span.name] += (span.end - span.start) / 1e6
    return [{"op": name, "kind": kinds.get(name) or kernel_kind(name), "ms": value,
             "source": sources.get(name, "")} for name, value in spent.most_common(TOP)]


def _packed(events: Sequence[dict]) -> bytes:
    # Without the time: the same bytes for the same events.
    return gzip.compress(json.dumps({"traceEvents": list(events)}).encode(), mtime=0)


def _trimmed(events: Sequence[dict]) -> list[dict]:
    """The events, or as many of the longest as fit in the file."""
    kept = list(events)
    while len(_packed(kept)) > LARGEST_TRACE:
        middle = float(np.median([event["dur"] for event in kept if "dur" in event]))
        kept = [event for event in kept if event.get("dur", np.inf) > middle]
    return kept


def kind_table(result: Mapping) -> str:
    """The share of each kind in the time of the step."""
    rows = [(kind, f"{100 * row['share']:.1f} %", significant(row["ms"]))
            for kind, row in result["kinds"].items()]
    return markdown.table(("Kind of operation", "Share", "Time [ms]"), rows)


def page_text(result: Mapping) -> str:
    """The page, from the content of ``profile.json``."""
    provenance, step = result["provenance"], result["step_ms"]
    kept = result["trace_events"]
    parts = [
        "# One training step: where its time goes",
        f"{result['case']}; after warming up, one call of the compiled step under "
        f"`jax.profiler`: {significant(result['traced_ms'])} ms, of which the table divides the "
        f"{significant(result['recorded_ms'])} ms from the start of the first operation to the "
        f"end of the last. Without the profiler a step takes {significant(step['median'])} ms "
        f"(median of {len(step['rounds'])}).",
        kind_table(result),
        f"Recorded on {result['lines']} thread(s) or stream(s). Where several operations run at "
        "once, each has an equal part of that time. A fusion counts as what weighs most in it.",
        "## Largest operations",
        markdown.table(("Operation", "Kind", "Time [ms]", "From"), [
            (f"`{row['op']}`", row["kind"], significant(row["ms"]),
             f"`{row['source']}`" if row["source"] else "–") for row in result["largest"]]),
        "Time on the operation's own thread or stream, which others may share.",
        "`trace.json.gz` opens in https://ui.perfetto.dev" + (
            "." if kept[0] == kept[1] else
            f"; it holds the {kept[1]} longest of {kept[0]} events."),
        "## Provenance",
        markdown.provenance(provenance),
    ]
    return "\n\n".join(parts) + "\n"
