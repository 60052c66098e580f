"""What lies on disk of an iteration's episodes, so that a killed training loses no episode and none counts twice.

``<folder>/iteration-0007/`` holds ``meta.json`` (whose episodes these are), a file per finished episode, and, when the
iteration has all its groups, ``groups.json``. A group may lie in the folder of an earlier iteration, which left it.
"""

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dtvla.errors import UserError
from dtvla.rollout.trajectories import write_whole

META_FILE, GROUPS_FILE = "meta.json", "groups.json"
FORMAT = "dtvla.groups"
_NAME = re.compile(r"iteration-(\d+)")


@dataclass(frozen=True)
class GroupFiles:
    """Where a group lies: the iteration that collected it, its task, and the names of its episodes' files."""

    iteration: int
    suite: str
    task_id: int
    init_state: int
    episodes: Sequence[str]


@dataclass(frozen=True)
class Collected:
    """An iteration that is complete.

    Attributes:
        groups: to learn from.
        surplus: left for the next iteration.
        statistics: counts over all its episodes.
    """

    groups: list[GroupFiles]
    surplus: list[GroupFiles]
    statistics: dict[str, int]


def folder_of(root: Path, iteration: int) -> Path:
    """Folder of an iteration."""
    return root / f"iteration-{iteration:04d}"


def claim(folder: Path, weights: str, settings: Mapping[str, Any], complete: bool) -> None:
    """Note whose episodes lie in a folder, or compare.

    Args:
        folder: of an iteration.
        weights: digest of the policy that collects.
        settings: everything else that decides what an episode is, of JSON's types.
        complete: whether no episode will be added, so that it does not matter what the weights are now.

    Raises:
        UserError: it holds episodes of other weights or settings, or ``meta.json`` is damaged.
    """
    path = folder / META_FILE
    if not path.exists():
        _write(path, {"format": FORMAT, "weights": weights, "settings": settings})
        return
    found = _read(path)
    advice = f"go on as before, or remove {folder} to collect anew"
    changed = [name for name in settings if found["settings"].get(name) != settings[name]]
    if changed:
        raise UserError(f"{folder}: its episodes were collected with other settings ({', '.join(changed)}); {advice}")
    if not complete and found["weights"] != weights:
        raise UserError(
            f"{folder}: its episodes were collected by other weights ({found['weights']}, now {weights}); {advice}"
        )


def read_collected(folder: Path) -> Collected | None:
    """The groups of an iteration; None while it is not complete.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / GROUPS_FILE
    if not path.exists():
        return None
    document = _read(path)
    try:
        groups, surplus = ([GroupFiles(**group) for group in document[name]] for name in ("groups", "surplus"))
        return Collected(groups, surplus, {name: int(count) for name, count in document["statistics"].items()})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, error) from error


def write_collected(folder: Path, collected: Collected) -> None:
    """Mark an iteration as complete, at once.

    Raises:
        UserError: the disk is full.
    """
    _write(folder / GROUPS_FILE, {"format": FORMAT, **asdict(collected)})


def remove_old(root: Path, iteration: int, still: Iterable[GroupFiles]) -> None:
    """Remove the folders of iterations before the previous one, but those in which groups lie that are still needed."""
    needed = {group.iteration for group in still}
    for folder in root.glob("iteration-*"):
        match = _NAME.fullmatch(folder.name)
        if match and int(match[1]) < iteration - 1 and int(match[1]) not in needed:
            shutil.rmtree(folder, ignore_errors=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise ValueError(f"format {document['format']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error
    return document


def _write(path: Path, document: Mapping[str, Any]) -> None:
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: damaged ({error!r}); remove {path.parent} to collect its groups again")
