"""Small pieces of Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from dtvla.analysis.intervals import Rate

BAR_CELLS = 20


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in GitHub's Markdown, padded so that it also reads well as plain text.

    Raises:
        ValueError: a row has another number of cells than the header.
    """
    if any(len(row) != len(header) for row in rows):
        raise ValueError(f"table: a row does not have {len(header)} cells")
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(header))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def facts_table(facts: Mapping[str, Any]) -> str:
    """A two-column table of names and values; values that are None or empty are left out."""
    rows = [[name.replace("_", " "), _words(value)] for name, value in facts.items() if value not in (None, [], "")]
    return markdown_table(["what", "value"], rows)


def percent_interval(rate: Rate) -> str:
    """The interval in percent: ``91.8 - 95.9``."""
    return f"{100 * rate.low:.1f} - {100 * rate.high:.1f}"


def success_bars(rate: Rate) -> str:
    """The rate as a bar of twenty block characters."""
    full = round(BAR_CELLS * rate.share)
    return "█" * full + "░" * (BAR_CELLS - full)


def duration(seconds: float) -> str:
    """Seconds in words: ``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _words(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(_words(item) for item in value)
    return str(value)
