"""A review under way: what the page shows and what it may decide."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from threading import Lock
from typing import Any

from dtvla.cot.labels import REVIEWED
from dtvla.cot.review.decisions import ACCEPT, EDIT, REJECT, UNDO, Decision, DecisionLog, Key, now
from dtvla.cot.review.material import EpisodeFacts, LabelledFrame, Material, strip_frames

Check = Callable[[str, Sequence[str]], list[str]]
"""What is wrong with a thought, given the names of which it mentions one, as readable sentences."""

# What keyboards of phones and word processors make of plain marks.
_PLAIN = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "..."})


class Refused(Exception):
    """A decision that is not taken; ``reasons`` are readable sentences."""

    def __init__(self, *reasons: str) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = list(reasons)


class Outdated(Refused):
    """The page shows something else than what is under review."""


class Review:
    """Answers the page's questions and takes its decisions; safe to use from several threads.

    Attributes:
        material: what is reviewed.
    """

    def __init__(
        self, material: Material, log: DecisionLog, check: Check, *, reviewer: str, strip: Sequence[int], show: str
    ) -> None:
        """Begin or continue a review.

        Args:
            material: what is reviewed.
            log: of the decisions, from before and from now on.
            check: of thoughts that the reviewer accepts or writes.
            reviewer: whose decisions they are.
            strip: offsets of the neighbours that are shown.
            show: ``unreviewed`` or ``all``, what the page begins with.
        """
        self.material = material
        self._log, self._check, self._reviewer = log, check, reviewer
        self._strip, self._show = list(strip), show
        self._frames = {frame.key: frame for frame in material.frames}
        self._episodes = {frame.episode for frame in material.frames}
        self._undoable: defaultdict[str, list[tuple[Decision, Decision | None]]] = defaultdict(list)  # by page
        self._lock = Lock()

    def overview(self) -> dict[str, Any]:
        """The dataset, its cameras, and each frame's state: what was decided, "" for nothing yet."""
        return {
            "name": self.material.name,
            "digest": self.material.digest,
            "cameras": self.material.cameras,
            "show": self._show,
            "frames": [(*key, self.state(key)) for key in self._frames],
        }

    def shown(self, key: Key) -> dict[str, Any]:
        """All of one frame but the pictures and what belongs to its episode; :class:`KeyError` for an unknown one."""
        frame, decision = self._frames[key], self._decision(key)
        edited = decision is not None and decision.decision == EDIT
        facts = self.material.episode(frame.episode)
        return {
            **asdict(frame),
            "shown": decision.thought if edited and decision else frame.thought,
            "state": self.state(key),
            "decided": decision.time if decision else "",
            "strip": strip_frames(frame.frame, facts.length, self._strip),
        }

    def facts(self, episode: int) -> EpisodeFacts:
        """What is shown of an episode beside pictures; :class:`KeyError` for one that is not reviewed."""
        if episode not in self._episodes:
            raise KeyError(episode)
        return self.material.episode(episode)

    def state(self, key: Key) -> str:
        """What was decided about a frame; "" for nothing yet."""
        decision = self._decision(key)
        if decision is not None:
            return decision.decision
        return ACCEPT if self._frames[key].origin == REVIEWED else ""

    def chosen(self) -> list[LabelledFrame]:
        """Frames that are shown at first: those without a decision, or all."""
        return [frame for key, frame in self._frames.items() if self._show == "all" or not self.state(key)]

    def progress(self) -> dict[str, int]:
        """Number of frames, and of those that were accepted, edited and rejected."""
        states = Counter(self.state(key) for key in self._frames)
        return {"frames": len(self._frames), **{kind: states[kind] for kind in (ACCEPT, EDIT, REJECT)}}

    def decide(self, key: Key, decision: str, thought: str, before: str, decided: str, page: str) -> None:
        """Put a decision on disk.

        Args:
            key: the frame.
            decision: ``accept``, ``edit`` or ``reject``.
            thought: the text that was accepted or written.
            before: the dataset's text that the page shows.
            decided: time of the decision that the page shows, "" for none.
            page: that decides; it can take back its own decisions.

        Raises:
            KeyError: no such frame.
            Outdated: the page shows another text than is under review, or not the decision that stands.
            Refused: the text does not pass the checks.
            UserError: the disk is full.
        """
        frame = self._frames[key]
        if before != frame.thought:
            raise Outdated("this page is older than the review that answers it; reload it")
        text = "" if decision == REJECT else " ".join(thought.translate(_PLAIN).split())
        if decision != REJECT:
            decision = ACCEPT if text == frame.thought else EDIT
        if decision != REJECT and (reasons := self._check(text, self.material.episode(frame.episode).objects)):
            raise Refused(*reasons)
        with self._lock:
            previous = self._decision(key)
            if decided != (previous.time if previous else ""):
                raise Outdated("somebody has decided about this frame meanwhile; look at it again")
            new = Decision(*key, decision, text, before, self._reviewer, now())
            self._log.append([new])
            self._undoable[page].append((new, previous))

    def undo(self, page: str) -> Key:
        """Take back the latest decision of a page, so that what was decided before it stands again.

        Returns:
            The frame that it was about.

        Raises:
            Refused: there is none since this review was started, or somebody else has decided since.
            UserError: the disk is full.
        """
        with self._lock:
            if not self._undoable[page]:
                raise Refused("nothing was decided here since this review was started")
            own, previous = self._undoable[page][-1]
            if self._log.last.get(own.key) != own:
                self._undoable[page].pop()
                raise Refused("somebody else has decided about that frame since")
            kind, thought = (previous.decision, previous.thought) if previous else (UNDO, "")
            again = Decision(*own.key, kind, thought, own.before, self._reviewer, now())
            self._log.append([again])
            rest = self._undoable[page][:-1]
            self._undoable[page] = [(again if new == previous else new, old) for new, old in rest]
            return own.key

    def _decision(self, key: Key) -> Decision | None:
        """The decision that stands on a frame and is about its thought as it is now."""
        decision = self._log.last.get(key)
        if decision is None or decision.decision == UNDO or not decision.concerns(self._frames[key].thought):
            return None
        return decision
