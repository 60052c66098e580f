"""Tables in Markdown and LaTeX, and small pieces of Markdown."""

import re
from collections.abc import Mapping, Sequence
from typing import Any


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in GitHub's Markdown, padded so that it also reads well as plain text.

    Raises:
        ValueError: a row has another number of cells than the header.
    """
    _need_cells(header, rows)
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(header))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def latex_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str | None = None, label: str | None = None
) -> str:
    r"""A LaTeX table with booktabs' rules; every cell is text and escaped, and columns of numbers stand to the right.

    The document needs ``\usepackage{booktabs}``, and ``\usepackage[T1]{fontenc}`` for quotation marks and ``< > |``.

    Args:
        header: names of the columns.
        rows: cells, as many in each as the header has.
        caption: in LaTeX; with it, the tabular stands in a floating table below its caption.
        label: name for ``\ref``, with a caption.

    Raises:
        ValueError: a row has another number of cells than the header.
    """
    import pandas as pd

    _need_cells(header, rows)
    frame = pd.DataFrame(list(map(list, rows)), columns=list(header))
    places = "".join("r" if number else "l" for number in number_columns(header, rows))
    text = frame.to_latex(index=False, escape=True, column_format=places, caption=caption, label=label)
    return re.sub(r"^[\[*]", r"{\g<0>}", text, flags=re.MULTILINE)  # behind the end of a row they would be options


def number_columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[bool]:
    """For each column whether all its cells are numbers, or begin with one."""
    return [bool(rows) and all(_is_number(row[place]) for row in rows) for place in range(len(header))]


def printable(text: str) -> str:
    """The text in one line, without signs that have no shape."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())


def facts_table(facts: Mapping[str, Any]) -> str:
    """A two-column table of names and values; values that are None or empty are left out."""
    return markdown_table(["what", "value"], [list(fact) for fact in known_facts(facts)])


def known_facts(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values in words, those of groups as ``group.name``; without values that are None or empty."""
    found: list[tuple[str, str]] = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            found += known_facts({f"{name}.{key}": part for key, part in value.items()})
        elif value not in (None, [], ""):
            found.append((name.replace("_", " "), _words(value)))
    return found


def duration(seconds: float) -> str:
    """Seconds in words: ``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def ranges(numbers: Sequence[int]) -> str:
    """Integers in words, runs joined: 0-9, 12."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in parts)


def _need_cells(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if any(len(row) != len(header) for row in rows):
        raise ValueError(f"table: a row does not have {len(header)} cells")


def _is_number(cell: str) -> bool:
    return cell in ("", "-") or re.match(r"[-+<*]*\d+([.,/:]\d+)*[%*]*( |$)", cell) is not None


def _words(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        if all(type(item) is int for item in value):
            return ranges(value)
        return ", ".join(_words(item) for item in value)
    return str(value)
