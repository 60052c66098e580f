"""The files of results: nothing is lost on the way, nothing is overwritten, totals are right, bad files are named."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtvla.errors import UserError
from dtvla.rollout.results import EpisodeResult, Results, Thought, read_results, rows, versions, write_results


def random_results(seed: int, suites: int = 2) -> Results:
    rng = np.random.default_rng(seed)
    episodes = [
        EpisodeResult(
            suite=f"suite{s}",
            task_id=t,
            instruction=f"put {t} into {s}",
            init_state=i,
            seed=int(rng.integers(1 << 40)),
            success=bool(rng.random() < 0.6),
            steps=int(rng.integers(1, 300)),
            thoughts=[
                Thought(10 * k, f"thought {k} \u2014 \u00fc", bool(rng.random() < 0.2), 20, 4 + i) for k in range(3)
            ],
            latency=[float(x) for x in rng.random(3)],
            video="videos/a.mp4" if i == 0 else None,
        )
        for s in range(suites)
        for t in range(3)
        for i in range(int(rng.integers(1, 6)))
    ]
    return Results({"seed": seed}, {"versions": versions()}, episodes)


@pytest.mark.parametrize("seed", range(3))
def test_round_trip_keeps_every_field(tmp_path: Path, seed: int) -> None:
    results = random_results(seed)
    write_results(results, tmp_path / "new" / "folder")
    assert read_results(tmp_path / "new" / "folder") == results
    assert not list((tmp_path / "new" / "folder").glob(".*")), "temporary files stay behind"


def test_totals_are_counted_from_the_episodes_with_wilson_intervals(tmp_path: Path) -> None:
    totals = json.loads(write_results(random_results(5), tmp_path).read_text())["totals"]
    episodes = lines(tmp_path)
    groups = [(task, {"suite": task["suite"], "task_id": task["task_id"]}) for task in totals["tasks"]]
    groups += [(suite, {"suite": name}) for name, suite in totals["suites"].items()]
    groups += [(totals["all"], {})]
    assert len(groups) == 2 * 3 + 2 + 1
    for rate, key in groups:
        own = [e for e in episodes if key.items() <= e.items()]
        assert rate["episodes"] == len(own)
        assert rate["successes"] == sum(e["success"] for e in own)
        for end in (rate["low"], rate["high"]):  # Wilson's ends solve (p - end)^2 = z^2 end (1 - end) / n
            distance = (rate["rate"] - end) ** 2
            assert distance == pytest.approx(1.959964**2 * end * (1 - end) / len(own), abs=1e-6)
    thoughts = [thought for e in episodes for thought in e["thoughts"]]
    per_forward = sum(t["tokens"] for t in thoughts) / sum(t["forwards"] for t in thoughts)
    assert totals["thought_tokens_per_forward"] == pytest.approx(per_forward)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]


def test_given_thoughts_have_no_tokens_per_forward(tmp_path: Path) -> None:
    """Nor do thoughts that were recorded before tokens were counted."""
    episode = EpisodeResult("suite", 0, "put", 0, 0, True, 10, [Thought(0, "red bowl")], [0.1])
    path = write_results(Results({}, {}, [episode]), tmp_path)
    assert json.loads(path.read_text())["totals"]["thought_tokens_per_forward"] is None
    (fields,) = lines(tmp_path)
    for key in ("tokens", "forwards"):
        del fields["thoughts"][0][key]
    (tmp_path / "episodes.jsonl").write_text(json.dumps(fields) + "\n")
    assert read_results(path).thought_tokens_per_forward() is None


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    results = random_results(4)
    write_results(results, tmp_path)
    file = tmp_path / "episodes.jsonl"
    whole = file.read_text()
    changed = whole.replace('"success": true', '"success": false', 1)
    assert changed != whole
    for content in (changed, whole[: whole.rindex("\n", 0, -1) + 1], ""):
        file.write_text(content)
        with pytest.raises(UserError, match="do not belong together"):
            read_results(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match="episodes.jsonl is missing; copy it beside results.json"):
        read_results(tmp_path)


def test_finished_results_are_never_overwritten(tmp_path: Path) -> None:
    write_results(random_results(1), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="not overwritten"):
        write_results(random_results(2), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_number_that_json_does_not_have_is_refused(tmp_path: Path) -> None:
    results = random_results(1)
    results.episodes[0].latency[0] = math.nan
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_results(results, tmp_path)
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "damaged"),
        ('{"format": "dtvla.results", "format_version": NaN}', "damaged"),
        ("[]", "not written by dtvla"),
        ('{"format": "dtvla.results", "format_version": 99}', "format version 99"),
        ('{"format": "dtvla.results", "format_version": 1, "settings": {}}', "version 1, this dtvla reads 2"),
        ('{"format": "dtvla.results", "format_version": 2, "settings": {}}', "damaged"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path: Path, content: str, message: str) -> None:
    write_results(random_results(1), tmp_path)
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_results(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("results.json", '"provenance": {', '"provenance": null, "x": {'),
        ("episodes.jsonl", '"success": true', '"success": null'),
    ],
)
def test_a_null_where_something_should_be_is_damage(tmp_path: Path, name: str, old: str, new: str) -> None:
    write_results(random_results(1), tmp_path)
    content = (tmp_path / name).read_text()
    assert old in content
    (tmp_path / name).write_text(content.replace(old, new, 1))
    with pytest.raises(UserError, match="damaged"):
        read_results(tmp_path)


def test_missing_results_say_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dtvla evaluate"):
        read_results(tmp_path / "nowhere")


def test_table_has_a_row_for_every_task_suite_and_the_total() -> None:
    table = rows(random_results(3))
    assert [task for _, task, _ in table].count("all tasks") == 2
    assert len(table) == 3 + 1 + 3 + 1 + 1
    assert table[-1][2].episodes == sum(rate.episodes for _, task, rate in table if task[:1].isdigit())


def test_results_kept_with_the_project_are_readable(repository: Path) -> None:
    found = [
        path for path in (repository / "experiments").rglob("results.json") if '"dtvla.results"' in path.read_text()
    ]
    assert len(found) >= 3
    for path in found:
        assert read_results(path).episodes
