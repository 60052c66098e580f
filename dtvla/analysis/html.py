"""The report as one HTML file that needs nothing else: tables, charts, films, and what was thought when.

The page is made by ``page/report.html.j2``. Everything that comes from results is escaped there, and the page's own
policy forbids it to load or send anything.
"""

import glob
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtvla.analysis.charts import DASHES, MARKERS
from dtvla.analysis.exhibits import make_exhibits
from dtvla.analysis.frames import check_poolable, say
from dtvla.analysis.sections import (
    arm_rows,
    decisions_section,
    differences_section,
    facts_section,
    p_words,
    success_section,
    thoughts_section,
    training_section,
)
from dtvla.analysis.sources import Sources, find_sources
from dtvla.errors import UserError
from dtvla.rollout.results import now, write_text
from dtvla.sim.film import FRAMES_PER_SECOND

if TYPE_CHECKING:
    from omegaconf import DictConfig

COLOURS = 6
MARK = '<meta name="generator" content="dtvla report">'
HEAD = 1000  # bytes of a page in which the mark stands


@dataclass(frozen=True)
class Limits:
    """How much of single episodes lies in the page: about how many, and megabytes of their films together."""

    episodes: int
    films_mb: float


def write_html(cfg: "DictConfig") -> Path:
    """Write the page that `cfg` (``conf/report.yaml``) describes and print where it is.

    Raises:
        UserError: a setting is wrong, a folder is missing or holds nothing, a file is damaged or is not overwritten.
    """
    from omegaconf import OmegaConf

    folders = [Path(str(folder)).expanduser() for folder in cfg.folders]
    if not OmegaConf.is_missing(cfg, "run"):
        folders = [Path(str(cfg.run)).expanduser(), *_matches(cfg.evaluations)]
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

    arms = sources.arms
    exhibits = make_exhibits(arms, limits.episodes, round(limits.films_mb * 1e6))
    warnings = [] if sources.frame is None else check_poolable(sources.frame)
    difference = differences_section(sources)
    if difference is None:  # else the comparison has said them
        for sentence in warnings:
            say(sentence)
    environment = Environment(
        loader=PackageLoader("dtvla.analysis", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["p"] = p_words
    page: dict[str, Any] = {
        "title": title,
        "made": now().replace("T", " ").replace("+00:00", " UTC"),
        "arms": arm_rows(arms),
        "warnings": warnings,
        "success": success_section(arms),
        "difference": difference,
        "exhibits": exhibits,
        "thoughts": thoughts_section(arms),
        "decisions": decisions_section(arms),
        "trainings": [training_section(run, dataset, arms) for run in sources.trainings],
        "facts": facts_section(sources),
        "markers": MARKERS,
        "dashes": DASHES,
        "colours": COLOURS,
        "frames_per_second": FRAMES_PER_SECOND,
    }
    text = environment.get_template("report.html.j2").render(page) + "\n"
    return text.encode("utf-8", "replace").decode("utf-8")  # half of a pair, as broken names hold, has no code


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
        UserError: there is no such folder, or another file lies there.
    """
    if setting is not None:
        path = Path(str(setting)).expanduser()
    else:
        homes = [str((folder if folder.is_dir() else folder.parent).resolve()) for folder in folders]
        common = Path(os.path.commonpath(homes))
        if common == Path(common.anchor):
            raise UserError("output: the folders have no folder in common; choose output=FILE.html")
        path = common / "report.html"
    if path.exists() and (path.is_dir() or MARK.encode() not in path.read_bytes()[:HEAD]):
        raise UserError(f"output: {path} is no report of dtvla and is not overwritten; choose another output=FILE.html")
    return path


def _matches(patterns: Any) -> list[Path]:
    """Folders that the wildcards of ``evaluations`` stand for.

    Raises:
        UserError: nothing matches.
    """
    if patterns is None:
        return []
    words = [patterns] if isinstance(patterns, str) else [str(pattern) for pattern in patterns]
    found = [Path(match) for word in words for match in sorted(glob.glob(str(Path(word).expanduser())))]
    if not found:
        raise UserError(f"evaluations: nothing matches {', '.join(words)}; run dtvla evaluate first")
    return found


def _at_least_0(name: str, setting: Any) -> Any:
    if isinstance(setting, bool) or not isinstance(setting, int | float) or not 0 <= setting < sys.maxsize:
        raise UserError(f"{name}: found {setting!r}; give a number of at least 0")
    return setting
