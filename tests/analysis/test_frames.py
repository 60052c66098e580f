"""Evaluations as frames: every number of the files, names that tell runs apart, and what must not be pooled unsaid."""

import json
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from evaluations import FREE, SETTINGS, episode, evaluation

from dtvla.analysis.ablation import compare_arms
from dtvla.analysis.frames import (
    Run,
    check_poolable,
    decision_frame,
    episode_frame,
    load_results,
    number_trainings,
    read_runs,
)
from dtvla.errors import UserError
from dtvla.rollout.journal import begin_run
from dtvla.rollout.results import Results, Thought, write_results

RECORDED = Path(__file__).resolve().parents[2] / "experiments"


def frame_of(**runs: Results) -> pd.DataFrame:
    return episode_frame([Run(name, Path(name), results) for name, results in runs.items()])


def test_every_recorded_episode_and_decision_is_in_the_frames() -> None:
    """Counted from the files' lines by the json module alone."""
    lines = [json.loads(line) for file in RECORDED.rglob("episodes.jsonl") for line in file.open(encoding="utf-8")
             if (file.parent / "results.json").is_file()]  # fmt: skip
    frame, decisions = load_results(RECORDED), decision_frame(read_runs(RECORDED))
    assert len(frame) == len(lines) > 1000
    assert frame["success"].sum() == sum(line["success"] for line in lines)
    assert frame["steps"].sum() == sum(line["steps"] for line in lines)
    assert frame["decisions"].sum() == len(decisions) == sum(len(line["thoughts"]) for line in lines)
    assert decisions["tokens"].sum() == sum(t.get("tokens", 0) for line in lines for t in line["thoughts"])
    taken = [1000 * s for line in lines for s in line["latency"][: len(line["thoughts"])]]
    assert decisions["latency_ms"].sum() == pytest.approx(sum(taken))
    medians = [1000 * np.median(line["latency"]) for line in lines if line["latency"]]
    assert sorted(frame["latency_ms"].dropna()) == pytest.approx(sorted(medians))


def test_recorded_arms_are_named_by_what_differs() -> None:
    assert set(load_results(RECORDED / "quickstart")["arm"]) == {"think", "mask", "random"}
    names = set(load_results(RECORDED / "grpo_gain")["arm"])
    assert names == {
        f"{policy}, temperature {t}, action temperature {t}" for policy in ("start420", "grpo_gain") for t in (0, 1)
    }


def test_trainings_are_paired_each_with_itself(tmp_path: Path) -> None:
    """Two trainings of two arms; in the second, only one arm solves the one episode."""
    for training, digest, solved in (("first", "ab", (True, True)), ("second", "cd", (True, False))):
        for mode, success in zip(("think", "mask"), solved, strict=True):
            results = evaluation([episode(0, 7, success, seed=5)], mode, checkpoint_sha256=32 * digest)
            write_results(results, tmp_path / training / mode)
    folders = [tmp_path / "second", tmp_path / "first"]
    runs = read_runs(tmp_path)
    frame, decisions = (number_trainings(make(runs), runs, folders) for make in (episode_frame, decision_frame))
    assert set(zip(frame["training"], frame["run"], frame["seed"], strict=True)) == {
        *(("first", f"first/{mode}", 11) for mode in ("think", "mask")),
        *(("second", f"second/{mode}", 5) for mode in ("think", "mask")),
    }
    assert set(zip(decisions["training"], decisions["seed"], strict=True)) == {("first", 11), ("second", 5)}
    assert number_trainings(decisions[:0], runs, folders).empty
    frame["arm"] = frame["cot"]
    assert check_poolable(frame) == []
    assert len(check_poolable(frame.drop(columns="training"))) == 2, "else trainings are pooled unawares"
    (row,) = compare_arms(frame, "think").to_dict("records")
    assert (row["pairs"], row["both"], row["only_baseline"], row["p_value"]) == (2, 1, 1, 1.0)


def test_a_row_has_what_the_files_say() -> None:
    results = evaluation([episode(3, 7, True, seed=2, decisions=2, latency=[0.1, 0.4])], "mask", quantize="8bit")
    (row,) = frame_of(one=results).to_dict("records")
    expected = {
        **{"run": "one", "arm": "mask", "suite": "libero_10", "task_id": 3, "task": "task number 3", "init_state": 7},
        **{"seed": 2, "success": True, "steps": 20, "decisions": 2, "thought_tokens": 20.0, "latency_ms": 250.0},
        **{"policy": "base", "checkpoint": "ab" * 6, "cot": "mask", "cot.temperature": 0, "decoder": "hybrid"},
        **{"quantize": "8bit", "rule.max_steps": 620, "rule.render": "full", "rule.chunk": 10, "rule.device": "cpu"},
        **{"version.mujoco": "3.3.2", "machine": "A processor"},
    }
    assert {name: row[name] for name in expected} == expected


def test_decisions_have_their_thoughts_and_commands() -> None:
    thoughts = [Thought(0, "red", False, 3, 3, "oc"), Thought(2, "blue bowl", True, 5, 2)]
    runs = [Run("r", Path("r"), evaluation([episode(0, 1, False, thoughts=thoughts, latency=[0.5])]))]
    names = ["decision", "step", "thought", "tokens", "forwards", "truncated", "gripper", "latency_ms"]
    first, second = decision_frame(runs)[names].to_dict("records")
    assert list(first.values()) == [0, 0, "red", 3, 3, False, "oc", 500.0]
    assert list(second.values())[:-1] == [1, 2, "blue bowl", 5, 2, True, None]
    assert np.isnan(second["latency_ms"])


def test_folders_are_found_anywhere_once_and_named_apart(tmp_path: Path) -> None:
    for place in ("a/goal", "b/goal", "b/deep/object"):
        write_results(evaluation([episode(0, 0, True)]), tmp_path / place)
    runs = read_runs([tmp_path, tmp_path / "a" / "goal", tmp_path / "b" / "goal" / "results.json"])
    assert sorted(run.name for run in runs) == ["a/goal", "b/goal", "object"]
    assert load_results(str(tmp_path / "a"))["run"].tolist() == ["goal"]


def test_unfinished_folders_are_said_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_results(evaluation([episode(0, 0, True)]), tmp_path / "done")
    begin_run(tmp_path / "killed", SETTINGS, {})
    assert load_results(tmp_path)["run"].tolist() == ["done"]
    assert capsys.readouterr().err == (
        "warning: killed is not finished and left out; the same dtvla evaluate continues it\n"
    )
    with pytest.raises(UserError, match=r"^results: no results.json in .*killed; run dtvla evaluate first"):
        load_results(tmp_path / "killed")
    with pytest.raises(UserError, match=r"^results: .*nowhere does not exist"):
        load_results(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"^results: no folder was given"):
        read_runs([])


def test_arms_join_runs_that_differ_in_nothing_under_study() -> None:
    both = {"suite": "libero_goal", "max_steps": 300}
    frame = frame_of(
        a=evaluation([episode(0, 0, True)]),
        b=evaluation([episode(0, 0, True, suite="libero_goal")], **both),
        c=evaluation([episode(0, 0, True)], "mask"),
        d=evaluation([episode(0, 0, True, suite="libero_goal")], "mask", **both),
    )
    assert frame["arm"].tolist() == ["think", "think", "mask", "mask"]
    assert check_poolable(frame) == []  # suites have limits of their own


def test_arms_name_decoder_checkpoint_and_options() -> None:
    auto = {"decoder": "autoregressive", "checkpoint": "runs/base/policy"}
    frame = frame_of(
        a=evaluation([episode(0, 0, True)]),
        b=evaluation([episode(0, 0, True)], provenance=auto, checkpoint_sha256="cd" * 32),
        c=evaluation([episode(0, 0, True)], cot={"mode": "think", "temperature": 0.0, "max_tokens": 64}),
        d=evaluation([episode(0, 0, True)], provenance={"decoder": None}),
    )
    assert frame["arm"].tolist() == [
        "base abababababab, hybrid, max tokens none",
        "base cdcdcdcdcdcd, autoregressive, max tokens none",
        "base abababababab, hybrid, max tokens 64",
        "base abababababab, decoder not recorded, max tokens none",
    ]


@pytest.mark.parametrize(
    ("settings", "provenance", "sentence"),
    [
        ({"render": "draft"}, {}, "render differs: full in a; draft in b"),
        ({"protocol": "common"}, {}, "protocol differs: published in a; common in b"),
        ({"max_steps": 520}, {}, "max_steps differs: 620 in a; 520 in b"),
        ({"stepping": "fast"}, {}, "stepping differs: not recorded in a; fast in b"),
        ({}, {"dtype": "bfloat16"}, "dtype differs: float32 in a; bfloat16 in b"),
        ({}, {"device": nan}, "device differs: cpu in a; not recorded in b"),
        ({}, {"versions": {"dtvla": "0.1.0", "mujoco": "3.4.0"}}, "version of mujoco differs: 3.3.2 in a; 3.4.0 in b"),
        ({}, {"versions": {"dtvla": "0.1.0"}}, "version of mujoco differs: 3.3.2 in a; not recorded in b"),
        ({"cot": {"mode": "mask", "temperature": 1}, "seed": 3, "init_states": [4]}, {}, None),
    ],
)
def test_other_rules_and_versions_are_named(
    settings: dict[str, Any], provenance: dict[str, Any], sentence: str | None
) -> None:
    a, b = evaluation([episode(0, 0, True)]), evaluation([episode(0, 0, True)], provenance=provenance)
    frame = frame_of(a=a, b=Results({**b.settings, **settings}, b.provenance, b.episodes))
    frame["arm"] = frame["run"]
    assert check_poolable(frame) == ([] if sentence is None else [sentence])


def test_another_chunk_is_named_but_not_where_no_episode_tells_it() -> None:
    fives = [Thought(5 * k, FREE) for k in range(3)]
    frame = frame_of(
        a=evaluation([episode(0, 0, True)]),
        b=evaluation([episode(0, 0, True, thoughts=fives)], "mask"),
        c=evaluation([episode(0, 0, True, decisions=1)], "random"),
    )
    assert check_poolable(frame) == ["chunk differs: 10 in a; 5 in b"]
    assert check_poolable(frame[frame["run"] != "b"]) == []


def test_what_differs_within_an_arm_is_named() -> None:
    """Frames that are joined, each with arms of its own, can call different policies alike."""
    a = frame_of(a=evaluation([episode(0, 0, True)]))
    other = evaluation([episode(1, 0, True)], provenance={"decoder": "autoregressive"}, checkpoint_sha256="cd" * 32)
    joined = pd.concat([a, frame_of(b=other)])
    assert joined["arm"].unique().tolist() == ["think"]
    assert check_poolable(joined) == [
        "checkpoint differs within arm think: abababababab in a; cdcdcdcdcdcd in b",
        "decoder differs within arm think: hybrid in a; autoregressive in b",
    ]
    older = evaluation([episode(1, 0, True)])
    older = Results({**older.settings, "compat": {}}, older.provenance, older.episodes)
    assert check_poolable(pd.concat([a, frame_of(b=older)])) == []


def test_arms_that_share_nothing_are_said_once() -> None:
    frame = frame_of(a=evaluation([episode(0, 0, True)]), b=evaluation([episode(1, 0, True)], "mask"))
    assert check_poolable(frame) == ["none of the 2 episodes is in all arms"]


def test_other_words_doubled_and_unpaired_episodes_are_counted() -> None:
    shorter = [episode(0, 0, True), episode(0, 1, False)]
    frame = frame_of(
        a=evaluation(shorter), again=evaluation(shorter), b=evaluation([*shorter, episode(0, 2, False)], "mask")
    )
    frame.loc[frame["run"] == "b", "task"] = "another"
    assert check_poolable(frame) == [
        "instruction of libero_10 task 0 differs: task number 0 / another",
        "2 episodes stand twice or more in arm think (runs a, again)",
        "1 of the 3 episodes of arm mask are not in all arms",
    ]
