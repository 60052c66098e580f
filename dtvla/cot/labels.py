"""Which thought every frame of an episode gets: a pure function of what the annotator and the reviewers said."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dtvla.cot.annotator import Job
from dtvla.cot.schema import Violation
from dtvla.errors import UserError

FRAMES = ("all", "key")
ON_FAILURE = ("copy_forward", "drop_thought", "stop")
ANNOTATED, REVIEWED, COPIED, CARRIED, NONE = ORIGINS = ("annotated", "reviewed", "copied", "carried", "none")


@dataclass(frozen=True)
class LabelSettings:
    """What is asked for, and what happens to thoughts that fail the checks.

    Attributes:
        frames: "all" frames, or the "key" frames alone.
        relabels: how often a frame is asked again when the checks refuse its thought.
        on_failure: what becomes of a frame whose last answer is refused, too: "copy_forward" gives it the last thought
            since the gripper was told to move, if there is one; "drop_thought" leaves it without; "stop" ends the run.
        carry_forward: whether frames that nobody labelled get the last thought since the gripper was told to move.
    """

    frames: str = "all"
    relabels: int = 2
    on_failure: str = "copy_forward"
    carry_forward: bool = False

    def __post_init__(self) -> None:
        """Refuse values that do not exist."""
        for name, known in (("frames", FRAMES), ("on_failure", ON_FAILURE)):
            if getattr(self, name) not in known:
                raise UserError(f"{name}: {getattr(self, name)!r} is unknown; use {' or '.join(known)}")
        if isinstance(self.relabels, bool) or not isinstance(self.relabels, int) or self.relabels < 0:
            raise UserError(f"relabels: found {self.relabels!r}; use 0 or a positive whole number")
        if not isinstance(self.carry_forward, bool):
            raise UserError(f"carry_forward: found {self.carry_forward!r}; use true or false")


@dataclass(frozen=True)
class Label:
    """What became of a frame.

    Attributes:
        thought: text without tags, "" for none.
        origin: one of ``ORIGINS``.
        written_for: frame that the thought was written for; None without a thought.
        attempts: how many answers the annotator gave.
        refused: what the checks found in each answer that they refused, in the order of the attempts.
    """

    thought: str = ""
    origin: str = NONE
    written_for: int | None = None
    attempts: int = 0
    refused: tuple[tuple[Violation, ...], ...] = ()

    @property
    def failed(self) -> bool:
        """Whether every answer was refused."""
        return self.attempts > 0 and len(self.refused) == self.attempts


@dataclass(frozen=True)
class Checks:
    """The checks of one episode.

    Attributes:
        read: the thought in an answer for a frame, and what is wrong with it.
        compare: what is wrong with thoughts beside each other, by the frame to be labelled again.
    """

    read: Callable[[int, str], tuple[str, Sequence[Violation]]]
    compare: Callable[[Mapping[int, str]], Mapping[int, Sequence[Violation]]]


@dataclass(frozen=True)
class Verdict:
    """Jobs that have to be answered first; when there are none, the labels of all wanted and given frames."""

    jobs: list[Job]
    labels: dict[int, Label]


class _Case:
    """A frame on its way through the attempts."""

    def __init__(self, frame: int, relabels: int) -> None:
        self.job, self.refused = Job(frame), list[tuple[Violation, ...]]()
        self._relabels = relabels

    @property
    def open(self) -> bool:
        """Whether the job's answer has not been refused yet."""
        return len(self.refused) <= self.job.attempt

    def refuse(self, violations: Sequence[Violation]) -> None:
        """Go on to the next attempt, unless this was the last one."""
        self.refused.append(tuple(violations))
        if self.job.attempt < self._relabels:
            complaints = tuple(violation.message for violation in violations)
            self.job = replace(self.job, attempt=self.job.attempt + 1, complaints=complaints)

    def label(self, thought: str | None) -> Label:
        origin, written_for = (NONE, None) if thought is None else (ANNOTATED, self.job.frame)
        return Label(thought or "", origin, written_for, self.job.attempt + 1, tuple(self.refused))


def decide(
    wanted: Sequence[int], given: Mapping[int, str], answers: Mapping[Job, str], checks: Checks, relabels: int
) -> Verdict:
    """Follow an episode through its checks as far as the answers reach.

    A thought is compared with the others when every frame has one that passes by itself, or has no attempt left. What
    is blamed is asked again; what has no attempt left is taken away, and the rest compared anew, so that the thoughts
    that stay pass all checks. Given thoughts stay in any case.

    Args:
        wanted: frames that need an answer, without the given ones.
        given: thoughts that people decided on.
        answers: what came back so far, by job.
        checks: of this episode.
        relabels: attempts after the first.
    """
    cases = {frame: _Case(frame, relabels) for frame in sorted(wanted)}
    thoughts, unread = dict(given), list(cases)
    while True:
        missing = []
        for case in (cases[frame] for frame in unread):
            while case.open:
                if case.job not in answers:
                    missing.append(case.job)
                    break
                thought, violations = checks.read(case.job.frame, answers[case.job])
                if not violations:
                    thoughts[case.job.frame] = thought
                    break
                case.refuse(violations)
        if missing:
            return Verdict(missing, {})
        blamed = {frame: found for frame, found in checks.compare(_ascending(thoughts)).items() if frame in cases}
        if not blamed:
            break
        unread = sorted(blamed)
        for frame in unread:
            del thoughts[frame]
            cases[frame].refuse(blamed[frame])
    labels = {frame: case.label(thoughts.get(frame)) for frame, case in cases.items()}
    labels |= {frame: Label(thought, REVIEWED, frame) for frame, thought in given.items()}
    return Verdict([], _ascending(labels))


def fill(
    labels: Mapping[int, Label],
    count: int,
    events: Sequence[int],
    settings: LabelSettings,
    rejected: Mapping[int, str],
) -> list[Label]:
    """Labels of all frames of an episode: failures copied and gaps filled, as the settings say.

    A thought never goes on over a gripper event, which it would contradict, nor to a frame where it was rejected.

    Args:
        labels: of the frames that were decided on.
        count: frames of the episode.
        events: first frames of every new gripper command, ascending.
        settings: of the run.
        rejected: texts that reviewers rejected, by frame.
    """
    stretch_F = np.searchsorted(events, np.arange(count), side="right")
    filled, last = [], Label()
    for frame in range(count):
        label = labels.get(frame, Label())
        if frame and stretch_F[frame] != stretch_F[frame - 1]:
            last = Label()
        copies = settings.on_failure == "copy_forward" if label.failed else settings.carry_forward
        if label.thought:
            last = label
        elif copies and last.thought and last.thought != rejected.get(frame):
            origin = COPIED if label.failed else CARRIED
            label = replace(label, thought=last.thought, origin=origin, written_for=last.written_for)
        filled.append(label)
    return filled


def _ascending[T](values: Mapping[int, T]) -> dict[int, T]:
    return {frame: values[frame] for frame in sorted(values)}
