"""Decisions of elsewhere brought home: of two on one frame the later one stands, and that is said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dtvla.cot.review.decisions import UNDO, Decision, DecisionLog, Key, read_last
from dtvla.errors import UserError


@dataclass(frozen=True)
class Merged:
    """What became of the decisions of one file.

    Attributes:
        taken: new here, or later than what was decided here.
        known: the same as here.
        conflicts: one sentence for each frame on which both decided, differently.
        foreign: about a frame or a thought that is not here; left out.
    """

    taken: int
    known: int
    conflicts: list[str]
    foreign: int


def merge(log: DecisionLog, path: Path, thoughts: Mapping[Key, str]) -> Merged:
    """Append to ``log`` what the file decides, taken-back decisions included; the same file again adds nothing.

    Args:
        log: of the decisions here.
        path: the file of elsewhere.
        thoughts: of the frames that are reviewed here.

    Raises:
        UserError: the file is missing or damaged, or nothing in it is about these thoughts.
    """
    theirs = read_last(path)
    ours = [d for d in theirs.values() if d.key in thoughts and d.concerns(thoughts[d.key])]
    if theirs and not ours:
        raise UserError(
            f"import: {path} decides about other thoughts than these; name the dataset that it was made for"
        )
    taken, known, conflicts = [], 0, []
    for new in sorted(ours, key=lambda decision: decision.key):
        old = log.last.get(new.key)
        if _same(old, new):
            known += 1
            continue
        later = old is None or new.when > old.when
        if later:
            taken.append(new)
        if old is not None:
            conflicts.append(_conflict(old, new, later))
    log.append(taken)
    return Merged(len(taken), known, conflicts, len(theirs) - len(ours))


def _same(old: Decision | None, new: Decision) -> bool:
    if old is None:
        return new.decision == UNDO
    return (old.decision, old.thought) == (new.decision, new.thought)


def _conflict(old: Decision, new: Decision, later: bool) -> str:
    stays, goes = (new, old) if later else (old, new)
    return (
        f"episode {new.episode} frame {new.frame}: {stays.decision} of {stays.reviewer} ({stays.time}) stands, "
        f"not {goes.decision} of {goes.reviewer} ({goes.time})"
    )
