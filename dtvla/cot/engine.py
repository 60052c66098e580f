"""Runs an annotator over a dataset: asks, journals, checks and asks again, several calls at a time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cache
from itertools import batched
from typing import TYPE_CHECKING

from dtvla.cot.annotator import Annotator, Answer, Job
from dtvla.cot.keyframes import KeyFrameSettings, gripper_events, key_frames
from dtvla.cot.labels import Checks, Label, LabelSettings, Verdict, decide, fill
from dtvla.cot.objects import task_objects
from dtvla.cot.schema import Schema, Violation
from dtvla.cot.temporal import Temporal
from dtvla.errors import UserError

if TYPE_CHECKING:
    from dtvla.cot.answers import Answers
    from dtvla.cot.episodes import AnnotatedFrames, EpisodeView
    from dtvla.cot.review.decisions import Decision

REJECTED = Violation("rejected", "is the thought that a reviewer rejected here")


@dataclass(frozen=True)
class EpisodeLabels:
    """What an annotation made of an episode of F frames.

    Attributes:
        number: of the episode in the dataset that was annotated.
        labels: F of them.
        reasons: of the key frames, by frame.
        remaining: what the comparison still finds among all thoughts, copied, carried and reviewed ones too, by frame.
    """

    number: int
    labels: Sequence[Label]
    reasons: Mapping[int, str]
    remaining: Mapping[int, Sequence[Violation]]

    @property
    def failed(self) -> list[int]:
        """Frames whose every answer was refused."""
        return [frame for frame, label in enumerate(self.labels) if label.failed]


@dataclass(frozen=True)
class Labeller:
    """Everything but the annotator that decides on an episode's labels.

    Attributes:
        settings: what is asked for.
        keyframes: how key frames are found.
        schema, temporal: the checks.
        decisions: of reviewers, by episode and frame.
    """

    settings: LabelSettings
    keyframes: KeyFrameSettings
    schema: Schema
    temporal: Temporal
    decisions: Mapping[tuple[int, int], Decision] = field(default_factory=dict)

    def begin(self, view: EpisodeView, *, ask: bool) -> Course:
        """Prepare an episode; ``ask`` says whether there is an annotator.

        Raises:
            UserError: the thought of a decision fails the schema.
        """
        objects = task_objects(view)
        mine = {frame: d for frame in range(len(view)) if (d := self.decisions.get((view.number, frame)))}
        read = cache(lambda answer: self.schema.read(answer, objects))
        given = {frame: decision.thought for frame, decision in mine.items() if decision.thought}
        rejected = {frame: decision.before for frame, decision in mine.items() if not decision.thought}

        def read_for(frame: int, answer: str) -> tuple[str, list[Violation]]:
            thought, found = read(answer)
            return thought, [*found, REJECTED] if thought and thought == rejected.get(frame) else found

        checks = Checks(read_for, lambda thoughts: self.temporal.check(thoughts, view.closing_F))
        for frame, thought in given.items():
            if violations := self.schema.violations(thought, objects):
                raise UserError(
                    f"decisions: the thought at episode {view.number}, frame {frame} fails the checks: it "
                    f"{'; it '.join(violation.message for violation in violations)}; edit it in the review"
                )
        wanted = self.wanted(view) if ask else []
        return Course(view, wanted, given, rejected, checks, key_frames(view, self.keyframes))

    def wanted(self, view: EpisodeView) -> list[int]:
        """Frames of an episode that need an annotator: those asked for that no reviewer has a thought for."""
        frames = key_frames(view, self.keyframes) if self.settings.frames == "key" else range(len(view))
        decisions = ((frame, self.decisions.get((view.number, frame))) for frame in frames)
        return [frame for frame, decision in decisions if decision is None or not decision.thought]

    def finish(self, course: Course, decided: Mapping[int, Label]) -> EpisodeLabels:
        """Apply the policy for failures to the decided labels.

        Raises:
            UserError: a frame failed, and the policy is to stop.
        """
        view, failed = course.view, [(frame, label) for frame, label in decided.items() if label.failed]
        if failed and self.settings.on_failure == "stop":
            frame, label = failed[0]
            found = "; ".join(violation.message for violation in label.refused[-1])
            raise UserError(
                f"on_failure: episode {view.number}, frame {frame}: the thought was refused {label.attempts} times, at "
                f"last because it {found}; set on_failure=copy_forward or drop_thought, or raise relabels"
            )
        events = gripper_events(view.closing_F, self.keyframes.debounce)
        labels = fill(decided, len(view), events, self.settings, course.rejected)
        thoughts = {frame: label.thought for frame, label in enumerate(labels) if label.thought}
        return EpisodeLabels(view.number, labels, course.reasons, course.checks.compare(thoughts))


@dataclass(frozen=True)
class Course:
    """An episode on its way: its view, the frames to ask for, thoughts that reviewers gave or rejected, its checks and
    key frames.
    """

    view: EpisodeView
    wanted: Sequence[int]
    given: Mapping[int, str]
    rejected: Mapping[int, str]
    checks: Checks
    reasons: Mapping[int, str]


class Engine:
    """Drives the calls of one annotator.

    Each episode goes round by round: all jobs that its verdict asks for are answered before the next verdict. Calls of
    several episodes run at a time; what they answer does not depend on their order.
    """

    def __init__(
        self,
        labeller: Labeller,
        annotator: Annotator | None,
        answers: Answers,
        advance: Callable[[int, int], None] = lambda first, again: None,
    ) -> None:
        """Connect the parts.

        Args:
            labeller: decides.
            annotator: answers; None where decisions alone make the labels.
            answers: the journal.
            advance: told how many frames were answered for the first time, and how many again.
        """
        self._labeller, self._annotator, self._answers, self._advance = labeller, annotator, answers, advance
        self._running: dict[Future[list[Answer]], tuple[Course, list[Job]]] = {}
        self._done: dict[int, EpisodeLabels] = {}

    def run(self, dataset: AnnotatedFrames) -> list[EpisodeLabels]:
        """Label every episode; what is in the journal is not asked again.

        Raises:
            UserError: the annotator has no answer, a picture can't be read, a frame failed and the policy is to stop;
                answers that arrived are kept.
        """
        calls = self._annotator.calls if self._annotator else 1
        waiting = iter(range(len(dataset)))
        with ThreadPoolExecutor(calls) as pool:
            try:
                while True:
                    while len(self._running) < 2 * calls and (number := next(waiting, None)) is not None:
                        self._go_on(pool, self._begin(dataset[number]))
                    if not self._running:
                        return [self._done[number] for number in sorted(self._done)]
                    for future in wait(self._running, return_when=FIRST_COMPLETED).done:
                        course = self._collect(future)
                        if all(other is not course for other, _ in self._running.values()):
                            self._go_on(pool, course)
            except BaseException:
                self._salvage()
                raise

    def _begin(self, view: EpisodeView) -> Course:
        course, answered = self._labeller.begin(view, ask=self._annotator is not None), self._answers.of(view.number)
        self._advance(sum(Job(frame) in answered for frame in course.wanted), 0)
        return course

    def _go_on(self, pool: ThreadPoolExecutor, course: Course) -> None:
        """Start the calls of an episode's next round, or finish it."""
        verdict = self._verdict(course)
        if not verdict.jobs:
            self._done[course.view.number] = self._labeller.finish(course, verdict.labels)
            return
        assert self._annotator is not None
        for jobs in batched(verdict.jobs, self._annotator.jobs_per_call or len(verdict.jobs)):
            self._running[pool.submit(self._annotator.label, course.view, list(jobs))] = course, list(jobs)

    def _verdict(self, course: Course) -> Verdict:
        answers = self._answers.of(course.view.number)
        return decide(course.wanted, course.given, answers, course.checks, self._labeller.settings.relabels)

    def _collect(self, future: Future[list[Answer]]) -> Course:
        """Journal what a call answered."""
        course, jobs = self._running.pop(future)
        answers = future.result()
        if len(answers) != len(jobs):
            raise RuntimeError(f"{type(self._annotator).__name__}: {len(answers)} answers to {len(jobs)} jobs")
        self._answers.append(course.view.number, jobs, answers)
        first = sum(job.attempt == 0 for job in jobs)
        self._advance(first, len(jobs) - first)
        return course

    def _salvage(self) -> None:
        """Wait for the calls under way when the run ends early, and keep their answers: they are paid for."""
        waiting = [future for future in self._running if not (future.cancel() or future.done())]
        if self._annotator is not None:
            self._annotator.stop()
        if waiting:
            print(f"waiting for {len(waiting)} calls under way", file=sys.stderr)
        for future in list(self._running):
            if future.cancelled() or future.exception() is not None:
                del self._running[future]
            else:
                self._collect(future)
