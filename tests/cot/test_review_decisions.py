"""Protects decisions on disk: none that was acknowledged is lost, none half-written is read, the later one stands."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from dtvla.cot.review import decisions as module
from dtvla.cot.review.decisions import Decision, DecisionLog, read_decisions, standing
from dtvla.cot.review.merging import merge
from dtvla.errors import UserError

START = datetime(2026, 1, 1, tzinfo=UTC)


def some(episode: int = 0, frame: int = 0, decision: str = "accept", minute: int = 0, who: str = "ann") -> Decision:
    before = f"thought {episode}/{frame} — naïve\nin two lines"
    thought = {"accept": before, "edit": f"{before}, better"}.get(decision, "")
    return Decision(episode, frame, decision, thought, before, who, (START + timedelta(minutes=minute)).isoformat())


def written(path: Path, *decisions: Decision) -> Path:
    with DecisionLog(path) as log:
        for decision in decisions:
            log.append([decision])
    return path


def test_the_last_decision_on_a_frame_stands_unless_it_was_taken_back(tmp_path: Path) -> None:
    rng, expected, made = random.Random(3), {}, []
    for minute in range(300):
        decision = some(rng.randrange(3), rng.randrange(9), rng.choice(("accept", "edit", "reject", "undo")), minute)
        made.append(decision)
        expected[decision.key] = decision
    path = written(tmp_path / "deep" / "d.jsonl", *made)
    assert read_decisions(path) == {key: d for key, d in expected.items() if d.decision != "undo"}
    fields = ["episode", "frame", "decision", "thought", "before", "reviewer", "time"]
    assert all(list(json.loads(line)) == fields for line in path.read_text().splitlines())
    with DecisionLog(path) as log:
        assert standing(log.last) == read_decisions(path)


def test_a_line_that_was_cut_short_anywhere_is_dropped_and_written_over(tmp_path: Path) -> None:
    kept, torn, new = some(frame=1), some(frame=2, decision="edit"), some(frame=3)
    whole = written(tmp_path / "whole.jsonl", kept, torn).read_bytes()
    begin = whole.index(b"\n") + 1
    for stop in range(begin, len(whole)):
        path = tmp_path / "torn.jsonl"
        path.write_bytes(whole[:stop])
        assert read_decisions(path) == {kept.key: kept}
        if stop % 40 == 0 or stop == len(whole) - 1:
            written(path, new)
            assert read_decisions(path) == {kept.key: kept, new.key: new}


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "[1]",
        '{"episode": 0}',
        json.dumps({**some().__dict__, "decision": "maybe"}),
        json.dumps({**some().__dict__, "episode": "0"}),
        json.dumps({**some().__dict__, "frame": -1}),
        json.dumps({**some().__dict__, "thought": ""}),
        json.dumps({**some(decision="reject").__dict__, "thought": "x"}),
        json.dumps({**some().__dict__, "time": "2026-01-01T00:00:00"}),
        json.dumps({**some().__dict__, "time": "noon"}),
        json.dumps({**some().__dict__, "reviewer": None}),
    ],
)
def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path, line: str) -> None:
    path = written(tmp_path / "d.jsonl", some())
    path.write_text(f"{path.read_text()}{line}\n{path.read_text()}")
    content = path.read_bytes()
    for read in (read_decisions, DecisionLog):
        with pytest.raises(UserError, match=r"decisions: line 2 of .*d\.jsonl"):
            read(path)
    assert path.read_bytes() == content
    path.unlink()
    with pytest.raises(UserError, match="decisions: .*cannot be read"):
        read_decisions(path)


def test_two_reviews_never_write_one_file(tmp_path: Path) -> None:
    with DecisionLog(tmp_path / "d.jsonl"), pytest.raises(UserError, match="another review"):
        DecisionLog(tmp_path / "d.jsonl")
    written(tmp_path / "d.jsonl", some())


def test_a_full_disk_leaves_whole_lines_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = some(frame=1), some(frame=2)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with DecisionLog(tmp_path / "d.jsonl") as log:
        log.append([first])
        with monkeypatch.context() as patch:
            patch.setattr(module.os, "fsync", full)
            with pytest.raises(UserError, match="No space left"):
                log.append([second])
        assert log.last == read_decisions(log.path) == {first.key: first}
        log.append([second])
    assert read_decisions(tmp_path / "d.jsonl") == {d.key: d for d in (first, second)}


WRITER = """
import sys
from dtvla.cot.review.decisions import Decision, DecisionLog, now
from pathlib import Path
with DecisionLog(Path(sys.argv[1])) as log:
    for frame in range(10**6):
        log.append([Decision(0, frame, "accept", "x" * 3000, "y", "ann", now())])
        print(frame, flush=True)
"""


def test_what_was_acknowledged_before_a_kill_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    seen = [int(writer.stdout.readline()) for _ in range(30)]
    writer.send_signal(signal.SIGKILL)
    seen += [int(line) for line in writer.stdout.read().splitlines()]
    writer.wait()
    assert set(seen) <= {frame for _, frame in read_decisions(path)}
    written(path, some(frame=10**6))  # the lock went with the process
    assert (0, 10**6) in read_decisions(path)


def test_merging_gives_the_same_in_either_order_and_says_its_conflicts(tmp_path: Path) -> None:
    rng = random.Random(8)
    frames = [(episode, frame) for episode in range(4) for frame in range(10)]
    thoughts = {key: some(*key).before for key in frames}
    minutes = iter(rng.sample(range(1000), 80))  # no two at a time
    ours = [some(*key, rng.choice(("accept", "reject")), next(minutes), "ann") for key in rng.sample(frames, 25)]
    theirs = [
        some(*key, rng.choice(("accept", "edit", "undo")), next(minutes), "bob") for key in rng.sample(frames, 25)
    ]
    results = []
    for number, (home, other) in enumerate(((ours, theirs), (theirs, ours))):
        path = written(tmp_path / f"other{number}.jsonl", *other)
        written(tmp_path / f"home{number}.jsonl", *home)
        with DecisionLog(tmp_path / f"home{number}.jsonl") as log:
            merged = merge(log, path, thoughts)
            results.append({key: (d.decision, d.thought) for key, d in standing(log.last).items()})
            again = merge(log, path, thoughts)
            assert again.taken == 0  # nothing twice
    assert results[0] == results[1]
    both = {d.key for d in ours} & {d.key for d in theirs}
    mine, yours = {d.key: d for d in ours}, {d.key: d for d in theirs}
    for key, found in results[0].items():
        latest = max((d for d in (mine.get(key), yours.get(key)) if d), key=lambda d: d.when)
        assert found == (latest.decision, latest.thought)
    differing = [key for key in both if mine[key].decision != yours[key].decision]
    assert differing
    assert len(merged.conflicts) == len(differing)
    assert all("ann" in sentence and "bob" in sentence for sentence in merged.conflicts)


def test_decisions_about_other_thoughts_are_left_out_or_refused(tmp_path: Path) -> None:
    other = written(
        tmp_path / "other.jsonl", some(0, 1), some(0, 2, "edit"), replace(some(0, 3), before="x", thought="x")
    )
    with DecisionLog(tmp_path / "home.jsonl") as log:
        changed = {(0, 1): some(0, 1).before, (0, 2): some(0, 2, "edit").thought, (0, 3): "written anew"}
        merged = merge(log, other, changed)
        assert (merged.taken, merged.foreign) == (2, 1)
        assert set(standing(log.last)) == {(0, 1), (0, 2)}
    with DecisionLog(tmp_path / "empty.jsonl") as log, pytest.raises(UserError, match="import: .*other thoughts"):
        merge(log, other, dict.fromkeys(changed, "quite another dataset"))
