"""What a task is about, in spoken names, and which other things a thought could mistake for it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtvla.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dtvla.cot.episodes import EpisodeView

THINGS = re.split(
    ", ",
    "alphabet soup, basket, bbq sauce, black book, black bowl, book, bowl, butter, cabinet, chocolate pudding, "
    "cookie box, cream cheese, desk caddy, drawer, frying pan, ketchup, microwave, milk, moka pot, mug, orange juice, "
    "plate, ramekin, red coffee mug, red mug, salad dressing, shelf, stove, tomato sauce, tray, white bowl, "
    "white cabinet, white mug, white yellow mug, wine bottle, wine rack, yellow book",
)
"""Things of LIBERO's scenes as people call them."""

_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
_SILENT = {"akita", "glazed", "rim", "porcelain", "new", "flat", "wooden"}  # words of names that nobody says
_FURNITURE = {"cabinet", "drawer", "shelf"}  # parts of one another
_PLAIN = re.findall(  # words of instructions that name no object
    r"\w+",
    "a an the this that its it them and or then both all one two with without by from of to in into inside on onto off "
    "up down at under over above below behind between next near beside around out away back front left right top "
    "middle bottom center centre side end compartment put pick place push pull open close turn move take lift set "
    "stack grasp grab hold drop pour press slide rotate wipe fold bring carry insert remove upright please",
)
_ASIDE = re.compile(r"\b(?:past|between|beside|behind|next to|near|clear of|avoid(?:ing)?)(?: the| a| any)?$")


def spoken(name: str) -> str:
    """An object's name as people say it: ``akita_black_bowl_1`` -> ``black bowl``."""
    words = re.sub(r"_\d+(_\w+)?$", "", name).split("_")
    return " ".join(word for word in words if word not in _SILENT)


def task_objects(episode: EpisodeView) -> tuple[str, ...]:
    """Spoken names of what the episode's task is about.

    Of a LIBERO task, known by the dataset's provenance or by its instruction, the objects of interest of its BDDL
    file, and things that only the instruction names; of any other, the instruction's words for things. Empty where the
    instruction names nothing.
    """
    named = _of_bddl(episode.source, episode.instruction)
    if not named:
        return _of_instruction(episode.instruction)
    told = [thing for thing in _mentioned(episode.instruction.lower(), THINGS) if not _is_one_of(thing, named)]
    return tuple(dict.fromkeys([*named, *told]))


def mentions_any(text: str, objects: Sequence[str]) -> bool:
    """Whether a text names one of the objects: in full, or by an article and its last word ("the bowl")."""
    return any(re.search(_naming(name.lower()), text.lower()) for name in objects)


@cache
def _naming(name: str) -> str:
    *others, last = map(re.escape, name.split())
    some = f"(?:(?:{'|'.join([*others, 'and'])}) )*"
    return rf"\b{re.escape(name)}(?:s|es)?\b|\b(?:the|a|an|this|that|its) {some}{last}\b"


def strangers(clause: str, objects: Sequence[str]) -> list[str]:
    """Things of LIBERO's scenes that a clause names and that are none of the objects.

    A name that shares all its words with an object's ("bowl", "black bowl") is one of them, and what only tells
    where to pass by ("next to the ramekin") does not count. A cabinet, its drawers and its shelf are one thing.
    """
    own = [name.lower() for name in objects]
    if _FURNITURE & {name.split()[-1] for name in own}:
        own += sorted(_FURNITURE)
    return [thing for thing in _mentioned(clause.lower(), [*own, *THINGS], _ASIDE) if not _is_one_of(thing, own)]


def _mentioned(text: str, names: Sequence[str], skip: re.Pattern[str] | None = None) -> list[str]:
    """Names in the order in which the text has them; where several begin at one place, the longest."""
    ordered = sorted(dict.fromkeys(names), key=lambda name: -len(name))
    found = re.finditer(rf"\b({'|'.join(map(re.escape, ordered))})(?:s|es)?\b", text)
    return [match[1] for match in found if not (skip and skip.search(text[: match.start()].rstrip()))]


def _is_one_of(thing: str, objects: Sequence[str]) -> bool:
    words = set(thing.split())
    return any(words <= set(name.split()) or set(name.split()) <= words for name in objects)


def _of_bddl(source: Mapping[str, Any], instruction: str) -> tuple[str, ...]:
    """Objects of interest of a LIBERO task; empty for other tasks, and where LIBERO is not installed."""
    from dtvla.sim.suites import get_task

    try:
        known = "suite" in source and "task_id" in source
        path = (
            get_task(source["suite"], source["task_id"]).bddl_file
            if known
            else _bddl_files().get(instruction.lower().strip(" ."))
        )
    except UserError:
        return ()
    return _objects_of_interest(path) if path else ()


@cache
def _bddl_files() -> dict[str, Path]:
    """Task definitions of LIBERO's five suites by instruction, the first suite's where several share one."""
    from dtvla.sim.suites import get_tasks

    files: dict[str, Path] = {}
    for suite in _SUITES:
        for task in get_tasks(suite, None):
            files.setdefault(task.instruction, task.bddl_file)
    return files


@cache
def _objects_of_interest(path: Path) -> tuple[str, ...]:
    found = re.search(r"\(:obj_of_interest\b([^()]*)\)", path.read_text(encoding="utf-8"))
    return tuple(dict.fromkeys(spoken(name) for name in found[1].split())) if found else ()


def _of_instruction(instruction: str) -> tuple[str, ...]:
    """Runs of words between those that name no object: ``put the red cup on the tray`` -> red cup, tray."""
    runs: list[list[str]] = [[]]
    for word in re.findall(r"[a-z0-9'-]+|[,.;]", instruction.lower()):
        if word in _PLAIN or not word[0].isalnum():
            runs.append([])
        else:
            runs[-1].append(word)
    return tuple(dict.fromkeys(" ".join(run) for run in runs if run))
