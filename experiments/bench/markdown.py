"""What the pages of the benchmarks share."""

from collections.abc import Iterable, Mapping, Sequence


def table(head: Sequence, rows: Iterable[Sequence], left: int = 1) -> str:
    """A table whose columns, but for the first ``left``, are aligned to the right."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (head, rule, *rows))


def provenance(facts: Mapping) -> str:
    """Where and with what a benchmark ran; its ``load_average`` is that before and after."""
    return table(("", ""), [
        ("Command", f"`{facts['command']}`"), ("Commit", facts["commit"]),
        ("Started", facts["started"]), ("Hardware", facts["hardware"]),
        ("Cores used", facts["cores"]),
        ("Processes running (1-minute load), before and after",
         " and ".join(map(str, facts["load_average"]))),
        ("Versions", ", ".join(f"{k} {v}" for k, v in facts["versions"].items()))])
