"""The report of training runs and evaluations as a file: its settings, and its form by the ending of its name."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtvla.analysis.exhibits import make_exhibits
from dtvla.analysis.html import html_page
from dtvla.analysis.markdown import write_markdown
from dtvla.analysis.sections import make_contents
from dtvla.analysis.sources import find_sources
from dtvla.errors import UserError
from dtvla.rollout.results import write_text

if TYPE_CHECKING:
    from omegaconf import DictConfig

FORMS = (".html", ".md")


def write_report(cfg: "DictConfig") -> Path:
    """Write the report that `cfg` (``conf/report.yaml``) describes and print where it is.

    Raises:
        UserError: a setting is wrong, a folder is missing or holds nothing, a file is damaged.
    """
    folders = [Path(str(folder)).expanduser() for folder in cfg.folders]
    if not folders:
        raise UserError("folders: none was given; name runs or evaluations, dtvla report FOLDER...")
    episodes, films_mb = _at_least_0("episodes", cfg.episodes, int), _at_least_0("films_mb", cfg.films_mb, float)
    sources = find_sources(folders, Path(str(cfg.paths.root)) / "evaluations")
    output = _output(cfg.output, folders)
    names = [folder.resolve().name for folder in folders]
    title = str(cfg.title or ("Report of " if len(names) == 1 else "Comparison: ") + ", ".join(names))
    contents = make_contents(sources, title, None if cfg.dataset is None else str(cfg.dataset))
    if output.suffix == ".md":
        write_markdown(contents, sources.arms, output)
    else:
        write_text(output, html_page(contents, make_exhibits(sources.arms, episodes, round(films_mb * 1e6))))
    print(f"report: {output} ({output.stat().st_size / 1e6:.1f} MB)")
    return output


def _output(setting: Any, folders: Sequence[Path]) -> Path:
    """Where the page goes: as set, else into the folder that holds all others.

    Raises:
        UserError: there is no such folder, or the name has another ending.
    """
    if setting is not None:
        output = Path(str(setting)).expanduser()
        if output.suffix not in FORMS:
            raise UserError(f"output: found {output}; give a file that ends with {' or '.join(FORMS)}")
        return output
    homes = [str((folder if folder.is_dir() else folder.parent).resolve()) for folder in folders]
    common = Path(os.path.commonpath(homes))
    if common == Path(common.anchor):
        raise UserError("output: the folders have no folder in common; choose output=FILE.html")
    return common / "report.html"


def _at_least_0[T](name: str, setting: Any, kind: Callable[[Any], T]) -> T:
    """The setting as an int or a float.

    Raises:
        UserError: it is another kind of thing, or below 0.
    """
    known = isinstance(setting, int | float) and not isinstance(setting, bool) and 0 <= setting < sys.maxsize
    if not known or kind(setting) != setting:
        raise UserError(f"{name}: found {setting!r}; give a {'whole ' if kind is int else ''}number of at least 0")
    return kind(setting)
