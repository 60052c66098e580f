"""Protects the command: what it writes, what it refuses, and that a kill at any point changes nothing in the end."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from annotating import truth, write
from digests import digests
from hydra import compose, initialize_config_dir
from openai_server import KEY, Reply, serving

from dtvla.annotate import annotate
from dtvla.cli import config_dir
from dtvla.cot.review.decisions import Decision, DecisionLog
from dtvla.data.demonstrations import Demonstrations
from dtvla.errors import UserError

NARRATOR = "# @package annotator\n_target_: annotating.Narrator\n"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("annotating") / "set")


def composed(*overrides: str) -> Any:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("annotate", overrides=list(overrides))


def run(root: Path, output: Path, *overrides: str, **narrator: Any) -> dict[str, Any]:
    cfg = composed(f"dataset={root}", f"output={output}", "annotator=none", "pictures=1", *overrides)
    if narrator:
        cfg.annotator = {"_target_": "annotating.Narrator", **narrator}
    return annotate(cfg)


def decide(path: Path, *decisions: tuple[int, int, str, str, str]) -> Path:
    with DecisionLog(path) as log:
        log.append([Decision(*values, "ann", "2026-01-02T03:04:05.000+00:00") for values in decisions])
    return path


def rows(output: Path) -> list[dict[str, Any]]:
    return pq.read_table(output / "meta/annotations.parquet").to_pylist()


def test_the_output_has_thoughts_provenance_and_a_report(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = run(root, tmp_path / "new", wrong=0.2, stubborn=0.05, jobs_per_call=None)
    data, found = Demonstrations(tmp_path / "new"), rows(tmp_path / "new")
    assert [(row["episode"], row["frame"]) for row in found] == [
        (episode, frame) for episode in range(4) for frame in truth(root, episode)
    ]
    for frame, row in enumerate(found):
        assert bool(data.thought(frame)) == (row["origin"] != "none") == (row["annotator"] == "narrator")
        assert (row["model"], row["prompt"], row["reviewer"]) == ("m1" if data.thought(frame) else None, None, None)
        assert 1 <= row["attempts"] <= 3
        assert bool(row["failed_checks"]) == (row["attempts"] > 1 or row["origin"] != "annotated")
    counts = record["origins"]
    assert counts["annotated"] + counts["copied"] + counts["none"] == record["frames"] == len(data) == record["asked"]
    assert counts["copied"] + counts["none"] == record["failed"] > 0
    assert record["passed_later"] > 0.1 * len(data)
    assert record["checks"]["one_block"]["last"] == record["failed"]
    assert record["totals"]["cost"] == pytest.approx(0.1 * sum(row["attempts"] for row in found))
    assert json.loads((tmp_path / "new/meta/annotation.json").read_text()) == record
    report = (tmp_path / "new/annotation/report.md").read_text()
    assert f"{record['failed']} ({100 * record['failed'] / len(data):.2f} %) failed" in report
    assert report.count("| one_block: ") == record["failed"]
    assert (tmp_path / "new/annotation/episode_000000.png").stat().st_size > 10_000
    assert not (tmp_path / "new.partial").exists()
    assert f"{len(data)} frames: {counts['annotated']} annotated" in capsys.readouterr().out


def test_a_finished_output_is_reported_and_never_overwritten(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = run(root, tmp_path / "new", "frames=key", jobs_per_call=9)
    before = digests(tmp_path / "new")
    assert run(root, tmp_path / "new", "frames=key", jobs_per_call=3) == record
    assert "already annotated" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"was made with schema\.max_words=80 \(asked: 70\); ask for the same"):
        run(root, tmp_path / "new", "frames=key", "schema.max_words=70", jobs_per_call=9)
    with pytest.raises(UserError, match=r"annotator\.seed=0 \(asked: 4\)"):
        run(root, tmp_path / "new", "frames=key", seed=4)
    assert digests(tmp_path / "new") == before
    with pytest.raises(UserError, match="exists and was not made by annotate"):
        run(root, write(tmp_path / "other", episodes=1), jobs_per_call=9)
    with pytest.raises(UserError, match="lies in the dataset"):
        run(root, root / "new", jobs_per_call=9)


def test_a_review_is_taken_over_with_who_wrote_and_who_reviewed(root: Path, tmp_path: Path) -> None:
    run(root, tmp_path / "keys", "frames=key", jobs_per_call=None)
    keys = [row["frame"] for row in rows(tmp_path / "keys") if row["episode"] == 1 and row["origin"] == "annotated"]
    texts, edited = truth(root, 1), "the alphabet soup stands near. next, move above the alphabet soup."
    path = decide(
        tmp_path / "decisions.jsonl",
        (1, keys[0], "accept", texts[keys[0]], texts[keys[0]]),
        (1, keys[1], "edit", edited, texts[keys[1]]),
        (1, keys[2], "reject", "", texts[keys[2]]),
    )
    record = run(tmp_path / "keys", tmp_path / "good", f"decisions={path}")
    assert record["before"]["settings"]["annotator"]["annotator"] == "narrator"
    found = {row["frame"]: row for row in rows(tmp_path / "good") if row["origin"] != "none"}
    assert list(found) == [keys[0], keys[1]]
    for row in found.values():
        who = (row["origin"], row["annotator"], row["model"], row["reviewer"])
        assert who == ("reviewed", "narrator", "m1", "ann")
    data = Demonstrations(tmp_path / "good")
    assert data.thought(int(data.starts_E[1]) + keys[1]) == edited
    carried = run(tmp_path / "keys", tmp_path / "carried", f"decisions={path}", "carry_forward=true")
    assert carried["origins"]["reviewed"] == 2
    assert carried["origins"]["carried"] > 10
    assert {row["reviewer"] for row in rows(tmp_path / "carried") if row["origin"] == "carried"} == {"ann"}


def test_decisions_about_another_dataset_are_refused(root: Path, tmp_path: Path) -> None:
    run(root, tmp_path / "keys", "frames=key", jobs_per_call=None)
    strange = decide(tmp_path / "a.jsonl", (1, 0, "accept", "something else entirely.", "something else entirely."))
    with pytest.raises(
        UserError, match="decisions: the thought at episode 1, frame 0 .* is not the one that was reviewed"
    ):
        run(tmp_path / "keys", tmp_path / "new", f"decisions={strange}")
    for episode, frame in ((9, 0), (0, 999)):
        beyond = decide(tmp_path / f"{episode}.jsonl", (episode, frame, "reject", "", "so"))
        with pytest.raises(UserError, match=f"decisions: there is no frame {frame} of episode {episode}"):
            run(root, tmp_path / "new", f"decisions={beyond}")
    with pytest.raises(UserError, match="annotator: none, and no decisions=FILE"):
        run(root, tmp_path / "new")


def test_a_dataset_that_got_no_thought_is_not_written(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="no frame got a thought"):
        run(root, tmp_path / "new", stubborn=1.0, jobs_per_call=None)
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "new.partial/answers.jsonl").stat().st_size
    assert f"answers are kept in {tmp_path / 'new.partial'}" in capsys.readouterr().err


def test_a_dataset_without_a_gripper_and_pictures_that_do_not_decode_are_named(tmp_path: Path) -> None:
    import pyarrow as pa

    source = write(tmp_path / "blind", episodes=2)
    video = source / "videos/observation.images.image/chunk-000/file-000.mp4"
    video.write_bytes(video.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"file-000\.mp4: episode 0: the file can't be decoded"):
        run(source, tmp_path / "new", jobs_per_call=None)
    assert (tmp_path / "new.partial/answers.jsonl").stat().st_size
    assert not (tmp_path / "new").exists()
    source = write(tmp_path / "armless", episodes=2)
    (path,) = (source / "data").rglob("*.parquet")
    table = pq.read_table(path)
    actions = pa.array([row[:6] for row in table["action"].to_pylist()], pa.list_(pa.float32(), 6))
    pq.write_table(table.set_column(table.column_names.index("action"), "action", actions), path)
    with pytest.raises(UserError, match="actions of 6 numbers and no gripper"):
        run(source, tmp_path / "other", jobs_per_call=None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("episodes_source.jsonl", "{}\n", "episodes_source.jsonl: it has 1 of 2 episodes"),
        ("episodes_source.jsonl", "{", "episodes_source.jsonl: damaged"),
        ("stats.json", "{", "stats.json: damaged"),
        ("annotation.json", "[1]", "annotation.json: damaged"),
    ],
)
def test_damaged_metadata_of_the_source_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    root = write(tmp_path / "set", episodes=2)
    (root / "meta" / name).write_text(content)
    with pytest.raises(UserError, match=message):
        run(root, tmp_path / "new", jobs_per_call=None)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("keyframes.debounce=0", "keyframes.debounce"),
        ("schema.min_words=few", "schema.min_words: found 'few', expected a valid integer"),
        ("+schema.min_word=3", "schema.min_word: there is no such setting; there are ascii"),
        ("temporal.min_similarity=2", "temporal.min_similarity"),
        ("frames=some", "frames: 'some' is unknown; use all or key"),
        ("pictures=-1", "pictures"),
        ("output=null", "output: found None, expected a valid string"),
        ("keyframes=null", "keyframes: found None"),
    ],
)
def test_settings_out_of_range_are_named(root: Path, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(root, tmp_path / "new", override, jobs_per_call=None)
    assert not list(tmp_path.iterdir())


def test_what_is_not_given_is_named() -> None:
    with pytest.raises(UserError, match="dataset, output: not given"):
        annotate(composed())


def test_folders_beside_the_output_are_named_after_it_with_or_without_a_slash(root: Path, tmp_path: Path) -> None:
    run(root, Path(f"{tmp_path}/new"), f"output={tmp_path}/new/", jobs_per_call=None, log="${output}.log")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "new.log"]


@pytest.mark.parametrize("name", sorted(path.stem for path in (config_dir() / "annotator").glob("*.yaml")))
def test_every_annotator_composes(name: str, tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    cfg = composed("dataset=a", f"output={tmp_path}", f"annotator={name}")
    if "model" in cfg.annotator:
        cfg.annotator.model = "m"
    if "checkpoint" in cfg.annotator:
        cfg.annotator.checkpoint = "c"
    assert OmegaConf.to_container(cfg, resolve=True)


# -- a process of its own, killed ------------------------------------------------------------------------------------


def begin(root: Path, output: Path, *options: str) -> subprocess.Popen[str]:
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests.parent), str(tests), str(tests / "cot")])
    return subprocess.Popen(
        [sys.executable, "-m", "dtvla.annotate", f"dataset={root}", f"output={output}", "pictures=1", *options],
        env={**os.environ, "PYTHONPATH": path, "OPENAI_API_KEY": KEY},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def start(root: Path, output: Path, folder: Path) -> subprocess.Popen[str]:
    (folder / "conf/annotator").mkdir(parents=True, exist_ok=True)
    settings = "wrong: 0.2\nstubborn: 0.05\ncalls: 4\njobs_per_call: 3\ndelay_s: 0.05\n"
    (folder / "conf/annotator/narrator.yaml").write_text(NARRATOR + settings + f"log: {folder / 'asked.jsonl'}\n")
    return begin(root, output, f"--config-dir={folder / 'conf'}", "annotator=narrator")


def finish(process: subprocess.Popen[str]) -> str:
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return out


def comparable(output: Path) -> dict[str, str]:
    """Everything but the command line, which names the folder."""
    found = digests(output, "annotation.json", "report.md")
    record = json.loads((output / "meta/annotation.json").read_text())
    record["command"] = record["command"].replace(str(output), "OUTPUT").replace(str(output.parent), "")
    report = (output / "annotation/report.md").read_text().split("## Thoughts")[1]
    return {**found, "record": json.dumps(record), "report": report}


@pytest.mark.slow
def test_killed_again_and_again_it_ends_in_the_same_dataset_and_asks_for_nothing_twice(
    root: Path, tmp_path: Path
) -> None:
    (tmp_path / "whole").mkdir()
    finish(start(root, tmp_path / "whole/new", tmp_path / "whole"))
    expected = comparable(tmp_path / "whole/new")
    asked = (tmp_path / "whole/asked.jsonl").read_text().splitlines()
    assert len(set(asked)) == len(asked)
    folder, output = tmp_path / "killed", tmp_path / "killed/new"
    folder.mkdir()
    chance, journal, killed = random.Random(1), tmp_path / "killed/new.partial/answers.jsonl", 0
    for _ in range(12):
        process = start(root, output, folder)
        size = journal.stat().st_size if journal.exists() else 0
        while process.poll() is None and not (journal.exists() and journal.stat().st_size > size):
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.5))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += 1
        if output.exists():
            break
        with journal.open("ab") as file:
            file.write(b'{"episode": 0, "frame"')  # what a kill inside a write leaves
    assert killed >= 3
    finish(start(root, output, folder))
    assert comparable(output) == expected
    assert not (folder / "new.partial").exists()
    again = (folder / "asked.jsonl").read_text().splitlines()
    assert set(again) == set(asked)
    in_flight = 4 * 3  # jobs whose answers a kill may catch on their way to the journal
    assert len(again) - len(asked) <= killed * in_flight


@pytest.mark.slow
def test_an_endpoint_with_faults_and_a_kill_gives_the_same_dataset_and_what_arrived_is_never_paid_again(
    tmp_path: Path,
) -> None:
    root = write(tmp_path / "set", episodes=2)
    right = {len(truth(root, number)): truth(root, number) for number in range(2)}
    assert len(right) == 2

    def respond(number: int, body: dict[str, Any]) -> Reply:
        text = json.dumps(body["messages"])
        frame, frames = map(int, re.search(r"\(frame (\d+) of (\d+)\)", text).groups())
        if number % 11 == 3:
            return Reply(500, "{}")
        if number % 17 == 5:
            return Reply(cut=40)
        refused = frame % 6 == 0 and "refused by the checks" not in text
        return Reply(content="i see nothing" if refused else f"<think>{right[frames][frame - 1]}</think>")

    with serving() as server:
        server.respond = respond
        prices = ["annotator.price_in=1", "annotator.price_out=2"]
        options = ["annotator=openai", "annotator.model=m", f"annotator.base_url={server.url}", *prices]
        finish(begin(root, tmp_path / "a/new", *options))
        once = len(server.paid)
        assert once == len(server.requests) - sum(n % 11 == 3 or n % 17 == 5 for n in range(len(server.requests)))
        server.requests.clear()
        server.paid.clear()
        process = begin(root, tmp_path / "b/new", *options)
        while process.poll() is None and len(server.paid) < once // 2:
            time.sleep(0.002)
        process.kill()
        process.communicate()
        finish(begin(root, tmp_path / "b/new", *options))
        assert once <= len(server.paid) <= once + 4  # that were on their way when it was killed
        shutil.rmtree(tmp_path / "b/new")
        count = len(server.requests)
        finish(begin(root, tmp_path / "b/new", *options))
        assert len(server.requests) == count
    assert comparable(tmp_path / "b/new") == comparable(tmp_path / "a/new")
    record = json.loads((tmp_path / "b/new/meta/annotation.json").read_text())
    assert record["origins"]["annotated"] == record["frames"]
    assert record["passed_later"] == sum(len(thoughts) // 6 for thoughts in right.values())
    assert record["totals"]["tokens_in"] == 1000 * once


def test_killed_while_it_writes_the_dataset_it_writes_it_again(root: Path, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    run(root, tmp_path / "a", jobs_per_call=None)
    partial = tmp_path / "b/new.partial/dataset/data"
    partial.mkdir(parents=True)
    (partial / "half.parquet").write_bytes(b"PAR1")
    run(root, tmp_path / "b/new", jobs_per_call=None)
    assert not (tmp_path / "b/new/data/half.parquet").exists()
    assert set(digests(tmp_path / "b/new")) == set(digests(tmp_path / "a"))
