"""The report as one HTML file that needs nothing else: tables, figures, films, and what was thought when.

The page is made by ``page/report.html.j2``. Everything that comes from results is escaped there, and the page's own
policy forbids it to load or send anything.
"""

from collections.abc import Sequence

from dtvla.analysis.exhibits import Exhibit
from dtvla.analysis.sections import Contents
from dtvla.sim.film import FRAMES_PER_SECOND


def html_page(contents: Contents, exhibits: Sequence[Exhibit]) -> str:
    """The page as text.

    Args:
        contents: its sections.
        exhibits: single episodes, between the sections of success and those of what else was measured.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("dtvla.analysis", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html.j2")
    text = template.render(vars(contents), exhibits=exhibits, frames_per_second=FRAMES_PER_SECOND) + "\n"
    return text.encode("utf-8", "replace").decode("utf-8")  # half of a pair, as broken names hold, has no code
