"""Tables in Markdown and LaTeX, and small pieces of Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from dtvla.analysis.intervals import Rate

BAR_CELLS = 20
_LATEX = {sign: f"\\{sign}" for sign in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "[": "{[}",  # behind the end of a row it would begin an option
    "*": "{*}",
    "\n": " ",
}


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


def latex_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str | None = None, label: str | None = None
) -> str:
    r"""A LaTeX table with booktabs' rules; every cell is text and escaped.

    Columns in which every cell is a number (or begins with one) stand to the right. The document needs
    ``\usepackage{booktabs}``, and ``\usepackage[T1]{fontenc}`` for quotation marks.

    Args:
        header: names of the columns.
        rows: cells, as many in each as the header has.
        caption: with it, the tabular stands in a floating table below its caption; it is text and escaped, too.
        label: name for ``\ref``; needs a caption.

    Raises:
        ValueError: a row has another number of cells than the header, or a label has no caption or needs escapes.
    """
    if any(len(row) != len(header) for row in rows):
        raise ValueError(f"table: a row does not have {len(header)} cells")
    if label is not None and (caption is None or escape_latex(label).replace(r"\_", "_") != label):
        raise ValueError(f"label: {label!r} needs a caption, and may hold letters, digits and : - _ only")
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(header)
    places = "".join("r" if column and all(map(_is_number, column)) else "l" for column in columns)
    lines = [" & ".join(map(escape_latex, row)) + r" \\" for row in (header, *rows)]
    body = [f"\\begin{{tabular}}{{{places}}}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    body.append(r"\end{tabular}")
    if caption is not None:
        named = [] if label is None else [f"\\label{{{label}}}"]
        head = [r"\begin{table}", r"\centering", f"\\caption{{{escape_latex(caption)}}}", *named]
        body = [*head, *body, r"\end{table}"]
    return "\n".join(body)


def escape_latex(text: str) -> str:
    """The text as LaTeX prints it; line breaks become spaces."""
    return "".join(_LATEX.get(sign, sign) for sign in text)


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


def _is_number(cell: str) -> bool:
    return cell in ("", "-") or cell.lstrip("+-<*").split(" ")[0].rstrip("%*").replace(".", "", 1).isdigit()


def _words(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(_words(item) for item in value)
    return str(value)
