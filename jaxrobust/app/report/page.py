"""The parts of a page of results, and the formats of its numbers."""

import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from jaxrobust.app.report.figures import Figure


class Cell(NamedTuple):

    text: str
    bold: bool = False


class TableRow(NamedTuple):
    """A row of a table; the paper's rows are muted."""

    head: str
    cells: tuple[Cell, ...]
    muted: bool = False


def text_row(head: str, texts: Iterable[str]) -> TableRow:
    """Makes a row of plain cells."""
    return TableRow(head, tuple(map(Cell, texts)))


class Table(NamedTuple):
    """A table, which HTML and Markdown show alike."""

    caption: str
    columns: tuple[str, ...]  # the first heads the rows
    rows: tuple[TableRow, ...]
    details: str = ""  # continues the caption
    note: str = ""
    numeric: bool = True
    folded: bool = False


class Picture(NamedTuple):
    """A figure as shown; its files are ``figures/<name>.svg`` and ``.png``."""

    name: str
    figure: Figure
    caption: str
    alt: str
    note: str


class Section(NamedTuple):

    anchor: str
    heading: str
    lead: str
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()


def level_name(level: float) -> str:
    """Names a noise level (std in units of 1/255) as the paper does."""
    return f"{level:g}/255" if level else "Clean"


def signed(points: float) -> str:
    """Formats a difference with its sign and two decimals."""
    return f"{points:+.2f}".replace("-", "−")


def duration(seconds: float) -> str:
    """Formats a time in its two largest units, such as ``1 h 05 min``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours} h {minutes:02d} min" if hours else
            f"{minutes} min {rest:02d} s" if minutes else f"{rest} s")


def significant(value: float) -> str:
    """Formats three significant digits, written out between 0.001 and 100,000; a dash for NaN."""
    if not math.isfinite(value):
        return "–"
    if value == 0 or not 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def with_spread(mean: float, std: float | None) -> str:
    """Formats ``mean ± std`` with two decimals; the mean alone where the spread is unknown."""
    unknown = std is None or math.isnan(std)
    return f"{mean:.2f}" if unknown else f"{mean:.2f} ± {std:.2f}"


def over_runs(values: Sequence[float], show: Callable[[float], str] = significant,
              to: str = "–") -> str:
    """Formats the mean, with the lowest and the highest in brackets if there are several; a dash if
    there are none, or one is not finite."""
    if not values or not all(map(math.isfinite, values)):
        return "–"
    mean = show(statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} [{show(min(values))}{to}{show(max(values))}]"


def mean_text(values: Sequence[float]) -> str:
    """Formats the mean; a dash if there are no values, or one is not finite."""
    return significant(statistics.fmean(values)) if values else "–"


def listed(values: Iterable) -> str:
    """Lists the different values, sorted, with commas between them."""
    return ", ".join(str(value) for value in sorted(set(values)))


def count(number: int) -> str:
    """Formats a number with commas between its thousands."""
    return f"{number:,}"


def paragraphs(note: str) -> list[str]:
    """Splits a plain text at blank lines."""
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", note) if part.strip()]
