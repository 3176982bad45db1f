"""Makes the page and the figures of a benchmark from the content of its ``bench.json``."""

from collections.abc import Iterable, Mapping, Sequence

from matplotlib import ticker
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from jaxrobust.app.report.figures import add_legend, new_figure, row_style
from jaxrobust.app.report.page import significant

COLUMNS = {
    "ms": "Time [ms]", "host_ms": "Host busy [ms]", "compile_s": "Compiling [s]",
    "work": "Work of its passes",
    "memory_mib": "Working memory [MiB]", "threads": "PyTorch's threads",
    "tera_per_second": "Operations [10¹²/s]", "projected_min": "200 such epochs, projected [min]"}
"""Headings of the numbers that a row may have."""


def page_text(result: Mapping) -> str:
    """Writes the page: all ratios, the times of each section, and their provenance."""
    sections = result["sections"]
    parts = [
        f"# {result['title']}",
        "Every ratio is one of medians of times taken in turn, in one run on one machine; its "
        "range is that of single rounds. Times are medians [quartiles]. A ratio without a target "
        "is for information.",
        _disturbed(sections),
        "**A quick run: it shows that everything works, and its numbers say nothing.**"
        if result["quick"] else "",
        "## Ratios", ratio_table(result["ratios"]), _reasons(result["ratios"])]
    for name, section in sections.items():
        measured = section["result"]
        parts += [f"## ({name}) {section['title']}", section["note"]]
        if "not_measured" in measured:
            parts.append(f"Not measured: {measured['not_measured']}.")
            continue
        parts.append(_row_table(measured["rows"]))
        if _panels(measured["rows"]):
            parts.append("![Milliseconds of each contender against what is varied, on logarithmic "
                         f"axes. The table holds the numbers.]({name}.png)")
    parts += ["## Provenance", _provenance(sections)]
    return "\n\n".join(part for part in parts if part) + "\n"


def ratio_table(ratios: Sequence[Mapping]) -> str:
    """Writes the table of all ratios, their targets, and whether these are met."""
    def cells(row):
        target = f"{row['bound']} {row['target']:g}" if "target" in row else "–"
        if "not_measured" in row:
            return "–", "–", target, "not measured"
        extremes = [significant(row[name]) for name in ("smallest", "largest") if name in row]
        return (significant(row["ratio"]), " to ".join(extremes) or "–", target,
                {True: "met", False: "not met", None: ""}[row.get("met")])

    return _table(("", "Times of", "Case", "Ratio", "Range", "Target", ""), [
        (row["section"], f"{row['numerator']} / {row['denominator']}", row["case"], *cells(row))
        for row in ratios], left=3)


def figure(rows: Sequence[Mapping]) -> Figure | None:
    """Plots the time against each size that the rows vary; None if they vary none."""
    panels = _panels(rows)
    if not panels:
        return None
    names = list(dict.fromkeys(row["contender"] for row in rows))
    drawn = new_figure(max(6, 3.7 * len(panels)), 4.2)
    for ax, (against, found) in zip(
            drawn.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items(),
            strict=True):
        for index, name in enumerate(names):
            style, mine = row_style(index), [row for row in found if row["contender"] == name]
            median, low, high = ([row["ms"][part] for row in mine] for part in (
                "median", "lower_quartile", "upper_quartile"))
            ax.errorbar([row["at"] for row in mine], median, yerr=[
                [m - q for m, q in zip(median, low, strict=True)],
                [q - m for m, q in zip(median, high, strict=True)]],
                color=style.color, marker=style.marker, linestyle=style.dashes, capsize=3)
        sizes = sorted({row["at"] for row in found})
        ax.set_xscale("log")
        ax.set_xticks(sizes, [str(size) for size in sizes])
        ax.xaxis.set_minor_locator(ticker.NullLocator())
        ax.set_xlabel(against)
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        ax.yaxis.set_minor_formatter(ticker.NullFormatter())
    drawn.axes[0].set_ylabel("Time [ms]")
    add_legend(drawn, [
        Line2D([], [], color=style.color, marker=style.marker, linestyle=style.dashes, label=name)
        for name, style in zip(names, map(row_style, range(len(names))), strict=True)])
    return drawn


def _panels(rows: Sequence[Mapping]) -> dict[str, list[Mapping]]:
    panels: dict[str, list[Mapping]] = {}
    for row in rows:
        if "against" in row:
            panels.setdefault(row["against"], []).append(row)
    return panels


def _row_table(rows: Sequence[Mapping]) -> str:
    columns = [name for name in COLUMNS if any(name in row for row in rows)]

    def cell(value):
        if not isinstance(value, Mapping):
            return ("–" if value is None else str(value) if isinstance(value, int) else
                    significant(value))
        median, low, high = (significant(value[name])
                             for name in ("median", "lower_quartile", "upper_quartile"))
        return f"{median} [{low}–{high}]"

    return _table(("Case", "Contender", *(COLUMNS[name] for name in columns)), [
        (row["case"], row["contender"], *(cell(row.get(name)) for name in columns))
        for row in rows], left=2)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Writes a table whose columns after the first ``left`` are aligned to the right."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *rows))


def _reasons(ratios: Iterable[Mapping]) -> str:
    reasons = dict.fromkeys((row["section"], row["not_measured"])
                            for row in ratios if "not_measured" in row)
    return "\n".join(f"- Not measured ({section}): {reason}." for section, reason in reasons)


def _disturbed(sections: Mapping[str, Mapping]) -> str:
    # Before the other sections, the load is that of the benchmark itself.
    facts = next(iter(sections.values()))["provenance"]
    load, cores = facts["load_average"][0], facts["cores"]
    if load is None or load <= cores / 2:
        return ""
    return (f"**The machine was busy before it began (load {load:g} on {cores} cores): these times "
            "are disturbed.**")


def _provenance(sections: Mapping[str, Mapping]) -> str:
    where = {name: section["provenance"] for name, section in sections.items()}

    def known(of):
        """The value of all sections or, if they differ, each value with its sections."""
        said: dict[str, list[str]] = {}
        for name, facts in where.items():
            said.setdefault(str(of(facts)), []).append(name)
        return "; ".join(value if len(said) == 1 else f"{value} ({', '.join(which)})"
                         for value, which in said.items())

    return "\n\n".join([
        _table(("Section", "Started", "Seconds", "Load before", "Load after"), [
            (name, facts["started"], f"{facts['seconds']:.0f}", *map(str, facts["load_average"]))
            for name, facts in where.items()]),
        "Load: processes that ran or waited, over the last minute.",
        _table(("", ""), [
            ("Command", known(lambda facts: f"`{facts['command']}`")),
            ("Commit", known(lambda facts: facts["commit"])),
            ("Hardware", known(lambda facts: facts["hardware"])),
            ("Cores used", known(lambda facts: facts["cores"])),
            ("Versions", known(lambda facts: ", ".join(
                f"{name} {version}" for name, version in facts["versions"].items()))),
        ], left=2)])
