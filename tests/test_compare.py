"""``dtvla compare A B`` as a user types it, on files that the evaluation's own writer wrote."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from dtvla.compare import name_words
from dtvla.rollout.results import EpisodeResult, Results, Thought, write_results

THOUGHTS = [
    Thought(step, "the gripper is open and above the black bowl, which is in the middle") for step in (0, 10, 20)
]


def write(folder: Path, mode: str, failures: set[int], **settings: object) -> Path:
    """A benchmark-sized evaluation, 10 tasks x 50 init states, in which the numbered episodes fail."""
    episodes = [
        EpisodeResult("libero_10", i // 50, f"task number {i // 50}", i % 50, 0, i not in failures, 300, THOUGHTS)
        for i in range(500)
    ]
    values = {"suite": "libero_10", "seed": 0, "cot": {"mode": mode}, "protocol": "published", **settings}
    write_results(Results(values, {"versions": {"mujoco": "3.3.2"}}, episodes), folder)
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


def test_table_file_and_warning_for_two_folders(folders: tuple[Path, Path], tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = dtvla_compare("cot=mask", "cot=think", f"output={tmp_path / 'both.json'}", cwd=folders[0].parent)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stderr) == (0, "")
    (last,) = (line.split() for line in done.stdout.splitlines() if line.startswith("all tasks"))
    assert last[2:6] == ["500", "92.0", "97.0", "5:30"]
    assert last[6] == "+5.0"
    assert "compared: cot.mode: mask in A, think in B" in done.stdout
    assert "warning: protocol differs: published in A, common in B" in done.stdout
    written = json.loads((tmp_path / "both.json").read_text())
    total = written["total"]
    assert (total["only_a"], total["only_b"], total["pairs"], len(written["tasks"])) == (5, 30, 500, 10)
    assert total["difference"]["low"] < 0.05 < total["difference"]["high"]
    assert total["p_value"] == pytest.approx(2.23e-5, rel=0.01)  # 2 x P(X <= 5), X binomial (35, 1/2)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0  # seconds of CPU for 500 pairs


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
