"""Whether the thoughts of an episode fit together, and to what the gripper is told."""

from __future__ import annotations

import difflib
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import inf

import numpy as np

from dtvla.cot.keyframes import segments
from dtvla.cot.narrate import PHASES
from dtvla.cot.schema import Violation
from dtvla.cot.stages import gripper_claim, stage_of
from dtvla.errors import UserError

_REMEMBERED = 4096
_CLOSED_STAGES = ("grasp", "lift", "carry", "place")
_ORDER = {  # of the stages while the gripper is told to close, or to open
    True: PHASES,
    False: ("release", "retreat", "reach", "lower", "grasp", "lift", "carry", "place"),
}


@dataclass(frozen=True)
class TemporalSettings:
    """How thoughts of neighbouring frames may differ.

    Attributes:
        min_similarity: of neighbours that speak of one stage, as a share of their words from 0 to 1.
        debounce: frames that a gripper command must hold to be an event.
        hysteresis: frames before and after an event in which a thought may still, or already, speak of the other side.
    """

    min_similarity: float = 0.3
    debounce: int = 3
    hysteresis: int = 6

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing."""
        if not 0 <= self.min_similarity <= 1:
            raise UserError(f"temporal.min_similarity: found {self.min_similarity}; use 0 to 1")
        if self.debounce < 1 or self.hysteresis < 0:
            raise UserError(
                f"temporal.debounce, temporal.hysteresis: found {self.debounce} and {self.hysteresis}; "
                "use 1 or more frames, and 0 or more"
            )


@dataclass(frozen=True)
class _Line:
    """A thought at a frame: what it speaks of, and the stretch of one gripper command that it belongs to."""

    frame: int
    text: str
    stage: int | None
    claim: bool | None
    segment: int


class Temporal:
    """Checks the thoughts of one episode at a time."""

    def __init__(self, settings: TemporalSettings) -> None:
        """Prepare for any number of episodes."""
        self.settings = settings
        remember = lru_cache(_REMEMBERED)  # thoughts repeat themselves
        self._stage = remember(stage_of)
        self._claim = remember(gripper_claim)
        self._similarity = remember(similarity)

    def check(self, thoughts: Mapping[int, str], closing_F: np.ndarray) -> dict[int, list[Violation]]:
        """What is wrong with the thoughts of an episode, by the frame that should get another one.

        Args:
            thoughts: by frame, of all frames or some; such that pass the schema.
            closing_F: bool (F,), whether the gripper is told to close.

        Returns:
            Violations of the checks gripper, order, change and similarity; frames without any are left out.
        """
        stretches = segments(closing_F, self.settings.debounce)
        events, commands = [stretch.start for stretch in stretches[1:]], [stretch.closing for stretch in stretches]
        lines = [self._line(frame, thoughts[frame], events, commands) for frame in sorted(thoughts)]
        found: dict[int, list[Violation]] = {}
        for frame, violation in (
            *self._against_gripper(lines, events, commands, closing_F),
            *_out_of_order(lines, commands),
            *self._unchanged(lines, events),
            *self._unlike(lines),
        ):
            found.setdefault(frame, []).append(violation)
        return dict(sorted(found.items()))

    def _line(self, frame: int, text: str, events: Sequence[int], commands: Sequence[bool]) -> _Line:
        """A thought near an event belongs to the side that it speaks of, as far as that is known."""
        stage, claim = self._stage(text), self._claim(text)
        segment = _segment(frame, events)
        if stage is not None and (PHASES[stage] in _CLOSED_STAGES) != commands[segment]:
            near = [(abs(frame - event), place) for place, event in self._near(frame, events)]
            if near:
                place = min(near)[1]
                segment = place if segment > place else place + 1
        return _Line(frame, text, stage, claim, segment)

    def _near(self, frame: int, events: Sequence[int]) -> list[tuple[int, int]]:
        """Numbers and frames of the events that a frame is so close to that either side may be spoken of."""
        reach = self.settings.hysteresis
        return [(place, event) for place, event in enumerate(events) if event - reach <= frame < event + reach]

    def _against_gripper(
        self, lines: Sequence[_Line], events: Sequence[int], commands: Sequence[bool], closing_F: np.ndarray
    ) -> list[tuple[int, Violation]]:
        """Thoughts that say that the gripper is open or closed where it is told otherwise, far from any event."""
        found = []
        for line in lines:
            command = commands[_segment(line.frame, events)]
            if line.claim in (None, command, bool(closing_F[line.frame])) or self._near(line.frame, events):
                continue
            stage = None if line.stage is None else PHASES[line.stage]
            if stage == ("grasp" if command else "release"):
                continue  # the fingers are still on their way
            said, told = ("closed or holding", "open") if line.claim else ("open", "closed")
            found.append((line.frame, Violation("gripper", f"says that the gripper is {said}, but it is told {told}")))
        return found

    def _unchanged(self, lines: Sequence[_Line], events: Sequence[int]) -> list[tuple[int, Violation]]:
        """Thoughts behind an event that still say what was said before it, the frames around it left aside."""
        found, some = [], self.settings.hysteresis
        for start, event, stop in zip([0, *events], events, [*events[1:], inf], strict=False):
            ahead = [line for line in lines if start <= line.frame < event]
            behind = [line for line in lines if event <= line.frame < stop]
            before = [line for line in ahead if line.frame >= event - some - 1][:1] or ahead[-1:]
            after = [line for line in behind if line.frame <= event + some][-1:] or behind[:1]
            if not before or not after or before[0].text != after[0].text:
                continue
            message = f"says the same as before the gripper's new command at frame {event}"
            changed = next((place for place, line in enumerate(behind) if line.text != after[0].text), len(behind))
            found += [(line.frame, Violation("change", message)) for line in behind[:changed] or after]
        return found

    def _unlike(self, lines: Sequence[_Line]) -> list[tuple[int, Violation]]:
        """Thoughts unlike both neighbours, which resemble each other; and beginnings of another thought."""
        found, least = [], self.settings.min_similarity
        for before, line, after in zip(lines, lines[1:], lines[2:], strict=False):
            stages = {before.stage, after.stage, after.stage if line.stage is None else line.stage}
            one_stage = len(stages) == 1 and before.stage is not None
            if not one_stage or len({before.segment, line.segment, after.segment}) > 1 or before.text == line.text:
                continue
            alike = self._similarity(before.text, after.text) >= least
            if alike and max(self._similarity(before.text, line.text), self._similarity(line.text, after.text)) < least:
                message = f"is unlike the thoughts of frames {before.frame} and {after.frame}, which are alike"
                found.append((line.frame, Violation("similarity", message)))
        cut = _beginnings({line.text for line in lines})
        return found + [
            (line.frame, Violation("similarity", "is only the beginning of the thought of another frame"))
            for line in lines
            if line.text in cut
        ]


def _segment(frame: int, events: Sequence[int]) -> int:
    """Number of the stretch of one gripper command in which a frame lies."""
    return bisect_right(events, frame)


def similarity(first: str, second: str) -> float:
    """Share of the words, in their order, that two texts have in common: 0 to 1."""
    if first == second:
        return 1.0
    return difflib.SequenceMatcher(None, first.split(), second.split(), autojunk=False).ratio()


def _out_of_order(lines: Sequence[_Line], commands: Sequence[bool]) -> list[tuple[int, Violation]]:
    """Thoughts that are not in every longest row of stages that never goes back within a segment.

    Where two rows are equally long there is no telling which is right, and the frames of both get another thought.
    """
    known = [(line, PHASES[line.stage]) for line in lines if line.stage is not None]
    ranks = []
    for line, stage in known:
        # at the start nothing has been held that could be let go
        order = _ORDER[commands[line.segment] or line.segment == 0]
        ranks.append(line.segment * len(PHASES) + order.index(stage))
    message = "speaks of the stage {}, which does not fit the stages before and behind it"
    return [
        (line.frame, Violation("order", message.format(stage)))
        for (line, stage), fits in zip(known, _in_order(ranks), strict=True)
        if not fits
    ]


def _in_order(ranks: Sequence[int]) -> list[bool]:
    """Whether each rank is in all longest non-descending rows."""
    ahead = _longest_rows(ranks)
    behind = _longest_rows([-rank for rank in reversed(ranks)])[::-1]
    longest = max(ahead, default=0)
    on_some = [a + b - 1 == longest for a, b in zip(ahead, behind, strict=True)]
    rivals = Counter(a for on, a in zip(on_some, ahead, strict=True) if on)
    return [on and rivals[a] == 1 for on, a in zip(on_some, ahead, strict=True)]


def _longest_rows(ranks: Sequence[int]) -> list[int]:
    """For every place the length of the longest non-descending row that ends there."""
    best: dict[int, int] = {}
    lengths = []
    for rank in ranks:
        lengths.append(1 + max((length for other, length in best.items() if other <= rank), default=0))
        best[rank] = lengths[-1]
    return lengths


def _beginnings(texts: set[str]) -> set[str]:
    """Texts that another text begins with, whole words only."""
    ordered = sorted(texts)
    return {first for first, second in pairwise(ordered) if first and second.startswith(first + " ")}
