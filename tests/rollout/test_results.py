"""results.json: nothing is lost on the way, nothing is overwritten, totals are right, bad files are named."""

import json
import math
from pathlib import Path

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


def test_totals_in_the_file_are_counted_from_its_episodes(tmp_path: Path) -> None:
    document = json.loads(write_results(random_results(5), tmp_path).read_text())
    for task in document["totals"]["tasks"]:
        own = [e for e in document["episodes"] if (e["suite"], e["task_id"]) == (task["suite"], task["task_id"])]
        assert task["episodes"] == len(own)
        assert task["successes"] == sum(e["success"] for e in own)
        assert task["low"] <= task["rate"] <= task["high"]
    thoughts = [thought for e in document["episodes"] for thought in e["thoughts"]]
    per_forward = sum(t["tokens"] for t in thoughts) / sum(t["forwards"] for t in thoughts)
    assert document["totals"]["thought_tokens_per_forward"] == pytest.approx(per_forward)
    every = document["totals"]["all"]
    assert every["episodes"] == len(document["episodes"]) == sum(t["episodes"] for t in document["totals"]["tasks"])


def test_given_thoughts_have_no_tokens_per_forward(tmp_path: Path) -> None:
    """Nor do results that were written before tokens were counted; they can still be read."""
    episode = EpisodeResult("suite", 0, "put", 0, 0, True, 10, [Thought(0, "red bowl")], [0.1])
    path = write_results(Results({}, {}, [episode]), tmp_path)
    text = path.read_text()
    assert json.loads(text)["totals"]["thought_tokens_per_forward"] is None
    document = json.loads(text)
    for key in ("tokens", "forwards"):
        del document["episodes"][0]["thoughts"][0][key]
    path.write_text(json.dumps(document))
    assert read_results(path).thought_tokens_per_forward() is None


def test_finished_results_are_never_overwritten(tmp_path: Path) -> None:
    before = write_results(random_results(1), tmp_path).read_bytes()
    with pytest.raises(UserError, match="not overwritten"):
        write_results(random_results(2), tmp_path)
    assert (tmp_path / "results.json").read_bytes() == before


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
        ('{"format": "dtvla.results", "format_version": 1, "settings": {}}', "damaged"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_results(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_missing_results_say_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dtvla evaluate"):
        read_results(tmp_path / "nowhere")


def test_table_has_a_row_for_every_task_suite_and_the_total() -> None:
    table = rows(random_results(3))
    assert [task for _, task, _ in table].count("all tasks") == 2
    assert len(table) == 3 + 1 + 3 + 1 + 1
    assert table[-1][2].episodes == sum(rate.episodes for _, task, rate in table if task[:1].isdigit())
