"""What a report holds, for a page of any form: sections of words, figures and tables."""

import base64
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dtvla.analysis.plots import figure_bytes
from dtvla.analysis.tables import number_columns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PIXELS_PER_INCH = 96  # CSS's definition
LEAST_SCALE = 0.8  # figures become no smaller than this on a phone, where they can be scrolled instead


@dataclass(frozen=True)
class Table:
    """Cells of text; `numbers` are the columns that stand to the right."""

    header: list[str]
    rows: list[list[str]]

    @property
    def numbers(self) -> list[bool]:
        """For each column whether it holds numbers."""
        return number_columns(self.header, self.rows)


@dataclass(frozen=True)
class Picture:
    """A figure, and the words for those who do not see it."""

    figure: "Figure"
    words: str

    @property
    def address(self) -> str:
        """The ``data:`` address of an SVG."""
        return f"data:image/svg+xml;base64,{base64.b64encode(figure_bytes(self.figure, 'svg')).decode()}"

    @property
    def least_width(self) -> int:
        """Pixels on a screen below which its letters are too small."""
        return round(LEAST_SCALE * PIXELS_PER_INCH * self.figure.get_figwidth())


@dataclass(frozen=True)
class Section:
    """A section of the page: sentences, pictures and tables below a heading, and a note on how to read them.

    Attributes:
        name: its address in the page.
        title: its heading.
        sentences: what is found.
        pictures: figures.
        tables: shown below them.
        note: how to read them.
        command: what repeats it, or None.
        facts: names and values.
    """

    name: str
    title: str
    sentences: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    note: str = ""
    command: str | None = None
    facts: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Contents:
    """A whole report.

    Attributes:
        title: of the page.
        made: date and time.
        arms: name, number of episodes and meaning of each.
        warnings: what stands against comparing them, a sentence each.
        results: sections of their success.
        measured: sections of thoughts, latency, training and demonstrations.
        behind: a section for each evaluation: command, policy, settings, machine and versions.
    """

    title: str
    made: str
    arms: list[tuple[str, int, str]]
    warnings: list[str]
    results: list[Section]
    measured: list[Section]
    behind: list[Section]
