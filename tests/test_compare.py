"""``dtvla compare A B`` as a user types it, on files that the evaluation's own writer wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from dtvla.analysis.ablation import compare_arms
from dtvla.analysis.comparison import compare
from dtvla.analysis.frames import load_results
from dtvla.compare import name_words
from dtvla.errors import UserError
from dtvla.rollout.results import EpisodeResult, Results, Thought, read_results, write_results

THOUGHTS = [Thought(step, "the gripper is open and above the black bowl") for step in (0, 10, 20)]


def evaluation(
    ended: dict[tuple[int, int], bool], mode: str = "think", decoder: str | None = "hybrid", **settings: Any
) -> Results:
    """An evaluation whose episodes, (task, init state), were solved or not as given."""
    episodes = [
        EpisodeResult("libero_10", task, f"task number {task}", state, 0, success, 300, THOUGHTS)
        for (task, state), success in ended.items()
    ]
    values = {"suite": "libero_10", "seed": 0, "checkpoint_sha256": "a" * 64, "cot": {"mode": mode, "temperature": 0}}
    return Results({**values, "protocol": "published", **settings}, {"decoder": decoder}, episodes)


def write(folder: Path, mode: str, failures: set[int], **settings: object) -> Path:
    """A benchmark-sized evaluation, 10 tasks x 50 init states, in which the numbered episodes fail."""
    write_results(evaluation({divmod(i, 50): i not in failures for i in range(500)}, mode, **settings), folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two evaluations in folders as a multirun names them: A fails 40 of 500, B 10 of these and 5 others."""
    root = tmp_path_factory.mktemp("evaluations")
    a = write(root / "cot=mask", "mask", set(range(40)))
    return a, write(root / "cot=think", "think", set(range(10)) | set(range(100, 105)), protocol="common")


def dtvla_compare(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command with pipes as its output, 80 columns."""
    command = [sys.executable, "-m", "dtvla.compare", *words]
    environment = {**os.environ, "COLUMNS": "80"}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)


def test_table_file_and_warning_for_two_folders(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")  # every import is a line on stderr
    done = dtvla_compare("cot=mask", "cot=think", f"output={tmp_path / 'both.json'}", cwd=folders[0].parent)
    assert done.returncode == 0
    assert all(line.startswith("import time:") for line in done.stderr.splitlines())
    loaded = {line.rpartition("|")[2].split(".")[0].strip() for line in done.stderr.splitlines()}
    assert "pandas" in loaded
    assert not loaded & {"scipy", "matplotlib", "torch"}, "they take seconds"
    lines = done.stdout.splitlines()
    (last,) = (line.split() for line in lines if line.startswith("all tasks"))
    assert last[2:7] == ["500", "92.0", "97.0", "5:30", "+5.0"]
    assert "compared: cot.mode: mask in A, think in B" in lines
    assert lines[-2] == "warning: protocol differs: published in A; common in B"
    written = json.loads((tmp_path / "both.json").read_text())
    assert written["format_version"] == 2
    assert [written["a"], written["b"]] == ["cot=mask", "cot=think"]
    assert written["subject"] == {"cot.mode": {"a": "mask", "b": "think"}}
    assert [f"warning: {sentence}" for sentence in written["warnings"]] == lines[-2:-1]
    first, _, third, *_ = written["tasks"]  # of 50 pairs 30 only B's; of 50 pairs 5 only A's
    assert (first["only_baseline"], first["only_arm"]) == (0, 30)
    assert first["p_holm"] == pytest.approx(10 * 2 / 2**30)
    assert (third["only_baseline"], third["only_arm"], third["instruction"]) == (5, 0, "task number 2")
    assert third["p_holm"] == pytest.approx(9 * 2 / 2**5)
    low, high = (100 * written["total"][end] for end in ("low", "high"))
    assert last[7:9] == [f"({low:+.1f},", f"{high:+.1f})"]
    rates = [binomtest(wins, 500).proportion_ci(method="wilson") for wins in (460, 485)]
    assert [written["total"][f"{side}rate_{end}"] for side in ("baseline_", "") for end in ("low", "high")] == (
        pytest.approx(np.ravel(rates))
    )
    assert written["total"]["p_value"] == pytest.approx(binomtest(5, 35).pvalue)


def test_numbers_are_those_of_reports_and_notebooks(folders: tuple[Path, Path]) -> None:
    result, frame = compare(*map(read_results, folders)), load_results(folders)
    names = ["difference", "low", "high", "p_value", "p_holm"]
    for rows, by in (([result["total"]], []), (result["tasks"], ["suite", "task_id"])):
        expected = compare_arms(frame, "mask", by=by)
        assert [[row[name] for name in names] for row in rows] == expected[names].to_numpy().tolist()


def test_episodes_are_paired_by_task_and_init_state_in_any_order() -> None:
    a = evaluation({(3, 0): True, (0, 0): True, (0, 1): False, (3, 9): True})
    b = evaluation({(4, 0): True, (0, 1): True, (0, 0): True, (3, 0): False}, "mask")
    result = compare(a, b)
    counts = ["task_id", "both", "only_baseline", "only_arm", "neither"]
    assert [[row[name] for name in counts] for row in result["tasks"]] == [[3, 0, 1, 0, 0], [0, 1, 0, 1, 0]]
    assert [result["total"][name] for name in counts[1:]] == [1, 1, 1, 0]
    assert [result["total"][name] for name in ("baseline_left_out", "left_out")] == [1, 1]
    assert result["subject"] == {"cot.mode": {"a": "think", "b": "mask"}}
    assert result["warnings"] == []


SAME = "A and B have the same settings: differences are chance or defects, not a change of the policy"
ALIKE = "A and B differ in nothing under study: differences are chance, defects or what the other warnings name"


@pytest.mark.parametrize(
    ("changes", "subject", "warnings"),
    [
        ({}, {}, [SAME]),
        ({"seed": 3, "compat": {"action_decode": None}}, {}, [SAME]),  # what was selected changes no policy
        ({"protocol": "common"}, {}, ["protocol differs: published in A; common in B", ALIKE]),
        ({"decoder": None}, {}, ["decoder of B is not recorded", ALIKE]),
        ({"decoder": "autoregressive"}, {"decoder": ("hybrid", "autoregressive")}, []),
        ({"checkpoint_sha256": "b" * 64}, {"checkpoint": ("a" * 12, "b" * 12)}, []),
        ({"cot": {"mode": "think", "length": 9}}, {"cot.temperature": (0, None), "cot.length": (None, 9)}, []),
    ],
)
def test_what_differs_is_compared_or_warned_about(changes: dict[str, Any], subject: Any, warnings: list[str]) -> None:
    result = compare(evaluation({(0, 0): True}), evaluation({(0, 0): True}, **changes))
    assert result["subject"] == {name: {"a": a, "b": b} for name, (a, b) in subject.items()}
    assert result["warnings"] == warnings


def test_what_cannot_be_paired_is_refused() -> None:
    a = evaluation({(0, 0): True})
    with pytest.raises(UserError, match=r"^a, b: no episode in common .*libero_10, seed .*1 episodes"):
        compare(a, evaluation({(0, 1): True}))
    with pytest.raises(UserError, match=r"^b: libero_10 task 0, init state 0, seed 0 stands twice"):
        compare(a, Results(a.settings, a.provenance, a.episodes * 2))


def test_a_written_comparison_is_never_overwritten(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text("mine")
    done = dtvla_compare(*map(str, folders), f"output={tmp_path}/mine.json")
    assert done.returncode == 2
    assert "mine.json exists already" in done.stderr
    assert (tmp_path / "mine.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "error: a, b: not given; name two evaluations"),
        (("nowhere",), "error: b: not given"),
        (("nowhere", "there"), "error: results: nowhere does not exist; run dtvla evaluate first"),
        (("nowhere", "there", "otput=x.json"), "otput"),
    ],
)
def test_what_is_missing_is_named_in_one_line(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = dtvla_compare(*words, cwd=tmp_path)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_words_become_settings_and_settings_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cot=mask").mkdir()
    monkeypatch.chdir(tmp_path)
    assert name_words(["cot=mask", "it's", "output=c.json"]) == ["a='cot=mask'", r"b='it\'s'", "output=c.json"]
    assert name_words(["b=1", "a=2"]) == ["b=1", "a=2"]
    assert name_words(["one", "output=c.json", "two"]) == ["a='one'", "output=c.json", "two"]
    assert name_words(["--help"]) == ["--help"]
