"""How notebooks show what the analysis returns."""

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dtvla.analysis.tabulate import Table

DOTS_PER_INCH, COLOURS = 110, 256  # sharp on a page, and a notebook with its figures stays small


def show(*results: "Figure | Table | str") -> None:
    """Show figures as PNG, and tables (header, rows) and text as Markdown, one below the other."""
    from IPython import display
    from matplotlib.figure import Figure
    from PIL import Image

    from dtvla.analysis.tables import markdown_table

    for result in results:
        shown: Any
        if isinstance(result, Figure):
            drawn, small = io.BytesIO(), io.BytesIO()
            result.savefig(drawn, format="png", dpi=DOTS_PER_INCH)
            Image.open(drawn).convert("RGB").quantize(COLOURS).save(small, "PNG", optimize=True)
            shown = display.Image(small.getvalue())
        else:
            shown = display.Markdown(result if isinstance(result, str) else markdown_table(*result))
        display.display(shown)
