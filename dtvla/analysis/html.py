"""The report as one HTML file that needs nothing else: tables, figures, films, and what was thought when.

The page is made by ``page/report.html.j2``. Everything that comes from results is escaped there, and the page's own
policy forbids it to load or send anything.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtvla.analysis import sections
from dtvla.analysis.exhibits import make_exhibits
from dtvla.analysis.frames import check_poolable, decision_frame, say
from dtvla.analysis.sources import Sources, find_sources
from dtvla.analysis.thinking import check_hardware
from dtvla.errors import UserError
from dtvla.rollout.results import now, write_text
from dtvla.sim.film import FRAMES_PER_SECOND

if TYPE_CHECKING:
    from omegaconf import DictConfig


@dataclass(frozen=True)
class Limits:
    """How much of single episodes lies in the page: about how many, and megabytes of their films together."""

    episodes: int
    films_mb: float


def write_html(cfg: "DictConfig") -> Path:
    """Write the page that `cfg` (``conf/report.yaml``) describes and print where it is.

    Raises:
        UserError: a setting is wrong, a folder is missing or holds nothing, a file is damaged.
    """
    folders = [Path(str(folder)).expanduser() for folder in cfg.folders]
    limits = Limits(_at_least_0("episodes", cfg.episodes), _at_least_0("films_mb", cfg.films_mb))
    sources = find_sources(folders, Path(str(cfg.paths.root)) / "evaluations")
    output = _output(cfg.output, folders)
    title = str(cfg.title or _title(sources))
    write_text(output, render(sources, title, limits, None if cfg.dataset is None else str(cfg.dataset)))
    print(f"report: {output} ({output.stat().st_size / 1e6:.1f} MB)")
    return output


def render(sources: Sources, title: str, limits: Limits, dataset: str | None = None) -> str:
    """The page as text.

    Args:
        sources: what it is about.
        title: of the page.
        limits: of single episodes.
        dataset: folder of the demonstrations; None: the one that a training run's configuration names.

    Raises:
        UserError: a file of a training run is damaged, or the dataset is none.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    warnings, results, measured = _evaluated(sources)
    page: dict[str, Any] = {
        "title": title,
        "made": now().replace("T", " ").replace("+00:00", " UTC"),
        "arms": sections.arm_rows(sources.arms),
        "warnings": warnings,
        "results": results,
        "exhibits": make_exhibits(sources.arms, limits.episodes, round(limits.films_mb * 1e6)),
        "measured": measured + [sections.training_section(run, dataset, sources.arms) for run in sources.trainings],
        "behind": sections.facts_sections(sources.arms),
        "frames_per_second": FRAMES_PER_SECOND,
    }
    environment = Environment(
        loader=PackageLoader("dtvla.analysis", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("report.html.j2").render(page) + "\n"
    return text.encode("utf-8", "replace").decode("utf-8")  # half of a pair, as broken names hold, has no code


def _evaluated(sources: Sources) -> tuple[list[str], list[sections.Section], list[sections.Section]]:
    """What stands against comparing the arms, the sections of their success, and those of thoughts and latency."""
    if sources.frame is None:
        return [], [], []
    decisions = decision_frame([run for arm in sources.arms for run in arm.runs])
    warnings = check_poolable(sources.frame)
    for sentence in warnings if len(sources.arms) == 1 else []:  # else the comparison says them
        say(sentence)
    success, *parts = sections.success_sections(sources.frame)
    results = [success, sections.differences_section(sources.frame), *parts]
    measured = [sections.thoughts_section(decisions), sections.latency_section(decisions)]
    warnings += check_hardware(decisions[decisions["latency_ms"].notna()])
    return warnings, [s for s in results if s], [s for s in measured if s]


def _title(sources: Sources) -> str:
    if sources.trainings:
        return "Report of " + ", ".join(run.name for run in sources.trainings)
    names = [arm.name for arm in sources.arms]
    if len(names) > 1:
        return f"Comparison: {', '.join(names)}"
    return "Report of " + ", ".join(run.name for arm in sources.arms for run in arm.runs)


def _output(setting: Any, folders: Sequence[Path]) -> Path:
    """Where the page goes: as set, else into the folder that holds all others.

    Raises:
        UserError: there is no such folder.
    """
    if setting is not None:
        return Path(str(setting)).expanduser()
    homes = [str((folder if folder.is_dir() else folder.parent).resolve()) for folder in folders]
    common = Path(os.path.commonpath(homes))
    if common == Path(common.anchor):
        raise UserError("output: the folders have no folder in common; choose output=FILE.html")
    return common / "report.html"


def _at_least_0(name: str, setting: Any) -> Any:
    if isinstance(setting, bool) or not isinstance(setting, int | float) or not 0 <= setting < sys.maxsize:
        raise UserError(f"{name}: found {setting!r}; give a number of at least 0")
    return setting
