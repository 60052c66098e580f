"""Protects the engine: its outcome is a function of the answers alone, nothing is asked twice, failures are treated."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from annotating import Narrator, labeller, truth, write
from corruptions import tagged

from dtvla.cot.annotator import Annotator, Answer, Job
from dtvla.cot.answers import FILE, Answers
from dtvla.cot.engine import Engine, EpisodeLabels
from dtvla.cot.episodes import AnnotatedFrames, EpisodeView
from dtvla.cot.keyframes import gripper_events
from dtvla.cot.labels import Checks, Label, LabelSettings, decide, fill
from dtvla.cot.review.decisions import Decision
from dtvla.cot.schema import Violation
from dtvla.errors import UserError

REQUEST = {"dataset": "d", "annotator": {"annotator": "narrator", "seed": 0}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("annotating") / "set")


def run(root: Path, folder: Path, annotator: Annotator | None, decisions: Any = None, **settings: Any) -> Any:
    with Answers.open(folder, REQUEST) as answers:
        return Engine(labeller(decisions, **settings), annotator, answers).run(AnnotatedFrames(root))


def every(episodes: Sequence[EpisodeLabels]) -> list[Label]:
    return [label for episode in episodes for label in episode.labels]


def decision(episode: int, frame: int, kind: str, thought: str = "", before: str = "before") -> Decision:
    return Decision(episode, frame, kind, thought, before, "ann", "2026-01-02T03:04:05.000+00:00")


def test_right_answers_are_taken_at_once(root: Path, tmp_path: Path) -> None:
    episodes = run(root, tmp_path / "a", Narrator(jobs_per_call=None))
    assert [episode.number for episode in episodes] == [0, 1, 2, 3]
    for episode in episodes:
        assert {f: label.thought for f, label in enumerate(episode.labels)} == truth(root, episode.number)
        assert {(label.origin, label.attempts, label.refused) for label in episode.labels} == {("annotated", 1, ())}
        assert not episode.remaining


def test_what_the_checks_refuse_is_asked_again_with_their_complaints(root: Path, tmp_path: Path) -> None:
    narrator = Narrator(0.2, jobs_per_call=7)
    labels = every(run(root, tmp_path / "a", narrator))
    again = [job for _, job in narrator.asked if job.attempt]
    assert len(again) > 0.15 * len(labels)
    assert all(job.complaints for job in again)
    assert not any(job.complaints for _, job in narrator.asked if not job.attempt)
    assert {label.origin for label in labels} == {"annotated"}
    right = [text for episode in range(4) for text in truth(root, episode).values()]
    assert np.mean([label.thought == text for label, text in zip(labels, right, strict=True)]) > 0.98
    assert sum(label.attempts - 1 for label in labels) == len(again)


def test_order_concurrency_and_batches_play_no_part(root: Path, tmp_path: Path) -> None:
    alone = run(root, tmp_path / "alone", Narrator(0.2, 0.05, jobs_per_call=None))
    for seed in range(4):
        rng = np.random.default_rng(seed)
        calls, batch = int(rng.integers(2, 9)), int(rng.integers(1, 20))
        narrator = Narrator(0.2, 0.05, calls=calls, jobs_per_call=batch, delay_s=0.002)
        assert run(root, tmp_path / str(seed), narrator) == alone


def test_a_journal_cut_anywhere_is_continued_to_the_same_end_without_asking_twice(root: Path, tmp_path: Path) -> None:
    whole = Narrator(0.2, 0.05, jobs_per_call=5)
    expected = run(root, tmp_path / "whole", whole)
    content = (tmp_path / "whole" / FILE).read_bytes()
    rng = np.random.default_rng(3)
    for cut in [0, 1, len(content) - 1, len(content), *rng.integers(0, len(content), 6).tolist()]:
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / FILE).write_bytes(content[:cut])
        rest = Narrator(0.2, 0.05, jobs_per_call=5)
        assert run(root, folder, rest) == expected
        kept = content[:cut].count(b"\n")
        assert len(set(rest.asked)) == len(rest.asked) == len(whole.asked) - kept
        idle = Narrator(0.2, 0.05)
        assert run(root, folder, idle) == expected
        assert not idle.asked


class Failing(Narrator):
    """Ends like an endpoint out of reach once it was asked so many times; calls under way are answered."""

    def __init__(self, after: int, **options: Any) -> None:
        super().__init__(**options)
        self._left = after

    def label(self, view: EpisodeView, jobs: Sequence[Job]) -> list[Answer]:
        self._left -= 1
        if self._left < 0:
            raise UserError("annotator: out of reach")
        return super().label(view, jobs)


def test_answers_that_arrived_are_kept_when_the_annotator_fails(root: Path, tmp_path: Path) -> None:
    expected = run(root, tmp_path / "whole", Narrator(0.2))
    failing = Failing(60, wrong=0.2, calls=4, delay_s=0.01)
    with pytest.raises(UserError, match="out of reach"):
        run(root, tmp_path / "a", failing)
    paid = {(row["episode"], row["frame"], row["attempt"]) for row in lines(tmp_path / "a" / FILE)}
    assert paid == {(episode, job.frame, job.attempt) for episode, job in failing.asked}
    assert len(paid) == 60
    rest = Narrator(0.2)
    assert run(root, tmp_path / "a", rest) == expected
    assert not paid & {(episode, job.frame, job.attempt) for episode, job in rest.asked}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_missing_answer_is_a_defect_of_the_annotator(root: Path, tmp_path: Path) -> None:
    class Short(Narrator):
        def label(self, view: EpisodeView, jobs: Sequence[Job]) -> list[Answer]:
            return super().label(view, jobs)[:-1]

    with pytest.raises(RuntimeError, match="Short: 2 answers to 3 jobs"):
        run(root, tmp_path / "a", Short(jobs_per_call=3))


def test_key_frames_alone_are_asked_and_carried_up_to_the_next_event(root: Path, tmp_path: Path) -> None:
    narrator = Narrator(jobs_per_call=None)
    for episode in run(root, tmp_path / "a", narrator, frames="key", carry_forward=True):
        keys = sorted(episode.reasons)
        assert sorted(job.frame for number, job in narrator.asked if number == episode.number) == keys
        for frame, label in enumerate(episode.labels):
            last = max(key for key in keys if key <= frame)
            assert (label.origin, label.written_for) == ("annotated" if frame in keys else "carried", last)
            assert label.thought == episode.labels[last].thought
    plain = every(run(root, tmp_path / "a", Narrator(), frames="key"))
    assert {label.origin for label in plain} == {"annotated", "none"}


def test_failures_are_copied_dropped_or_stop_the_run_and_answers_serve_every_policy(root: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"on_failure: episode \d, frame \d+: .* refused 3 times, at last because it has"
    ):
        run(root, tmp_path / "a", Narrator(0, 0.1, jobs_per_call=None), on_failure="stop")
    dropped = run(root, tmp_path / "a", Narrator(0, 0.1, jobs_per_call=None), on_failure="drop_thought")
    again = Narrator(0, 0.1)
    copied = run(root, tmp_path / "a", again, on_failure="copy_forward")
    assert not again.asked
    for without, episode in zip(dropped, copied, strict=True):
        events = gripper_events(AnnotatedFrames(root)[episode.number].closing_F, 3)
        assert episode.failed == without.failed
        for frame in episode.failed:
            assert not without.labels[frame].thought
            start = max([event for event in events if event <= frame], default=0)
            good = [f for f in range(start, frame) if not episode.labels[f].failed]
            label = episode.labels[frame]
            assert label.origin == ("copied" if good else "none")
            assert label.thought == (episode.labels[good[-1]].thought if good else "")
            assert [violation.check for violation in label.refused[-1]] == ["one_block"]
    assert sum(len(episode.failed) for episode in copied) > 10


def test_more_relabels_go_on_from_the_answers_that_are_there(root: Path, tmp_path: Path) -> None:
    run(root, tmp_path / "a", Narrator(0, 0.1), relabels=0)
    more = Narrator(0, 0.1)
    labels = every(run(root, tmp_path / "a", more, relabels=3))
    assert {job.attempt for _, job in more.asked} == {1, 2, 3}
    assert labels == every(run(root, tmp_path / "b", Narrator(0, 0.1), relabels=3))


def test_decisions_stand_and_need_no_annotator(root: Path, tmp_path: Path) -> None:
    edited = "the alphabet soup waits on the table. next, move above the alphabet soup."
    decisions = {
        (0, 0): decision(0, 0, "edit", edited),
        (0, 3): decision(0, 3, "reject", before="what an earlier annotator wrote"),
        (2, 1): decision(2, 1, "accept", truth(root, 2)[1]),
    }
    episodes = run(root, tmp_path / "a", None, decisions)
    found = {(e.number, f): label for e in episodes for f, label in enumerate(e.labels) if label.thought}
    assert {key: (label.thought, label.origin) for key, label in found.items()} == {
        (0, 0): (edited, "reviewed"),
        (2, 1): (truth(root, 2)[1], "reviewed"),
    }
    narrator = Narrator(jobs_per_call=None)
    labels = run(root, tmp_path / "a", narrator, decisions)[0].labels
    assert [label.origin for label in labels[:5]] == ["reviewed", *["annotated"] * 4]
    assert not {(0, 0), (2, 1)} & {(number, job.frame) for number, job in narrator.asked}


def test_a_rejected_thought_never_comes_back(root: Path, tmp_path: Path) -> None:
    decisions = {(0, 3): decision(0, 3, "reject", before=truth(root, 0)[3])}
    narrator = Narrator(jobs_per_call=None)
    label = run(root, tmp_path / "a", narrator, decisions, on_failure="drop_thought")[0].labels[3]
    assert (label.origin, label.attempts) == ("none", 3)
    assert {violation.check for refused in label.refused for violation in refused} == {"rejected"}
    asked = [job for number, job in narrator.asked if (number, job.frame) == (0, 3)]
    assert [job.complaints for job in asked] == [(), *[("is the thought that a reviewer rejected here",)] * 2]
    assert truth(root, 0)[2] == truth(root, 0)[3]  # so that a copy would bring it back
    assert run(root, tmp_path / "a", narrator, decisions)[0].labels[3] == label


def test_a_reviewed_thought_that_breaks_the_rules_is_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"decisions: the thought at episode 1, frame 2 fails .* it has 1 words"):
        run(root, tmp_path / "a", None, {(1, 2): decision(1, 2, "edit", "soup.")})


# -- the journal -----------------------------------------------------------------------------------------------------


def test_the_journal_refuses_others_a_second_process_and_damage(tmp_path: Path) -> None:
    with Answers.open(tmp_path / "a", REQUEST) as answers:
        answers.append(0, [Job(4, 1, ("why",))], [Answer("because", {"cost": 0.5, "cached": True})])
        with pytest.raises(UserError, match="another process"), Answers.open(tmp_path / "a", REQUEST):
            pass
    other = {"dataset": "d", "annotator": {"annotator": "narrator", "seed": 1}}
    with pytest.raises(UserError, match=r"annotator\.seed=0 \(asked: 1\)"), Answers.open(tmp_path / "a", other):
        pass
    with Answers.open(tmp_path / "a", REQUEST) as answers:
        assert answers.of(0) == {Job(4, 1, ("why",)): "because"}
        assert answers.totals() == {"answers": 1, "cost": 0.5}
    path = tmp_path / "a" / FILE
    path.write_bytes(b"{}\n" + path.read_bytes())
    with pytest.raises(UserError, match="damaged in line 1"), Answers.open(tmp_path / "a", REQUEST):
        pass


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Answers.open(tmp_path / "a", REQUEST) as answers:
        answers.append(0, [Job(0)], [Answer("one", {"tokens": 3})])

        class Full:
            fileno, truncate = answers._file.fileno, answers._file.truncate

            def __init__(self, file: Any) -> None:
                self.file, self.room = file, 10

            def write(self, content: bytes) -> int:
                if not self.room:
                    raise OSError(errno.ENOSPC, "No space left on device")
                written, self.room = self.file.write(content[: self.room]), 0
                return written

        monkeypatch.setattr(answers, "_file", Full(answers._file))
        with pytest.raises(OSError, match="No space"):
            answers.append(0, [Job(1)], [Answer("two")])
        monkeypatch.undo()
        answers.append(0, [Job(2)], [Answer("three", {"tokens": 4})])
    with Answers.open(tmp_path / "a", REQUEST) as answers:
        assert answers.of(0) == {Job(0): "one", Job(2): "three"}
        assert answers.totals() == {"answers": 2, "tokens": 7}


def test_sums_do_not_depend_on_the_order_of_the_answers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    costs = (10.0 ** rng.uniform(-9, 3, 200)).tolist()
    totals = []
    for number in range(3):
        with Answers.open(tmp_path / str(number), REQUEST) as answers:
            for frame in rng.permutation(200).tolist():
                answers.append(0, [Job(frame)], [Answer("so", {"cost": costs[frame]})])
            totals.append(answers.totals())
    assert totals[0] == totals[1] == totals[2]


# -- the pure part ---------------------------------------------------------------------------------------------------


def toy_checks() -> Checks:
    """A thought must be a small number; neighbours must not differ by more than two, the greater one is blamed."""

    def read(frame: int, answer: str) -> tuple[str, list[Violation]]:
        return answer, [] if int(answer) < 8 else [Violation("small", f"is {answer}")]

    def compare(thoughts: Mapping[int, str]) -> dict[int, list[Violation]]:
        found = {}
        frames = list(thoughts)
        assert frames == sorted(frames)
        for one, other in zip(frames, frames[1:], strict=False):
            if abs(int(thoughts[one]) - int(thoughts[other])) > 2:
                greater = one if int(thoughts[one]) > int(thoughts[other]) else other
                found[greater] = [Violation("near", "is far off")]
        return found

    return Checks(read, compare)


@pytest.mark.parametrize("seed", range(30))
def test_thoughts_that_stay_pass_every_check_whatever_was_answered(seed: int) -> None:
    rng = np.random.default_rng(seed)
    relabels, wanted, given = int(rng.integers(0, 4)), list(range(0, 24, 2)), {5: "1", 11: "2"}
    answers: dict[Job, str] = {}
    checks = toy_checks()
    while (verdict := decide(wanted, given, answers, checks, relabels)).jobs:
        assert not set(verdict.jobs) & set(answers)
        part = rng.choice(len(verdict.jobs), rng.integers(1, len(verdict.jobs) + 1), replace=False)
        answers |= {verdict.jobs[i]: str(rng.integers(0, 10)) for i in part}
    labels = verdict.labels
    assert sorted(labels) == sorted([*wanted, *given])
    thoughts = {frame: label.thought for frame, label in labels.items() if label.thought}
    assert not set(checks.compare(thoughts)) - set(given)
    assert all(labels[frame].thought == text for frame, text in given.items())
    for frame in wanted:
        label = labels[frame]
        assert 1 <= label.attempts <= relabels + 1
        assert label.failed == (not label.thought) == (len(label.refused) == relabels + 1)
        assert len([job for job in answers if job.frame == frame]) == label.attempts


def test_filling_never_goes_over_a_gripper_event() -> None:
    bad = Label("", "none", None, 1, ((Violation("small", "is 9"),),))
    good = {frame: Label(str(frame), "annotated", frame, 1) for frame in (0, 4)}
    labels = {**good, 2: bad, 3: bad, 6: bad}
    copied = fill(labels, 8, [3], LabelSettings(on_failure="copy_forward"), {})
    assert [label.thought for label in copied] == ["0", "", "0", "", "4", "", "4", ""]
    carried = fill(labels, 8, [3], LabelSettings(on_failure="drop_thought", carry_forward=True), {})
    assert [label.thought for label in carried] == ["0", "0", "", "", "4", "4", "", "4"]
    assert [label.written_for for label in carried] == [0, 0, None, None, 4, 4, None, 4]


@pytest.mark.parametrize(
    ("setting", "value"), [("frames", "some"), ("on_failure", "ignore"), ("relabels", -1), ("carry_forward", "maybe")]
)
def test_settings_that_do_not_exist_are_named(setting: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"{setting}: found|{setting}: '"):
        LabelSettings(**{setting: value})


def test_tags_are_no_part_of_a_label(root: Path, tmp_path: Path) -> None:
    labels = every(run(root, tmp_path / "a", Narrator(jobs_per_call=None)))
    assert tagged(labels[0].thought) not in {label.thought for label in labels}
    assert not any("<" in label.thought for label in labels)
