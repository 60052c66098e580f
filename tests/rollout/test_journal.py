"""A run that is cut short anywhere continues without losing an episode or counting one twice."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dtvla.errors import UserError
from dtvla.rollout.journal import Journal, begin_run, episode_key, finish_run, kept_episodes, unfinished_run
from dtvla.rollout.results import EpisodeResult, Thought, read_results
from dtvla.sim.pool import EpisodeSpec

SETTINGS = {"suite": "libero_goal", "seed": 0, "cot": {"mode": "think"}}
SPECS = [EpisodeSpec("libero_goal", task, init, 0) for task in range(3) for init in (7, 2, 30)]


def result(spec: EpisodeSpec, second: float = 0.5) -> EpisodeResult:
    thought = Thought(0, f"in state {spec.init_state}\u2028 line\nline \u00fc", False, 12, 3)
    return EpisodeResult(
        spec.suite, spec.task_id, "put", spec.init_state, spec.seed, spec.task_id == 1, 40, [thought], [second]
    )


def write(folder: Path, specs: list[EpisodeSpec], rank: int = 0) -> Path:
    with Journal(folder, rank) as journal:
        for spec in specs:
            journal.append(result(spec))
    return journal.path


def test_a_line_cut_short_at_any_byte_is_dropped_and_the_run_goes_on(tmp_path: Path) -> None:
    path = write(tmp_path, SPECS[:3])
    whole = path.read_bytes()
    second = whole.index(b"\n", whole.index(b"\n") + 1) + 1
    for cut in range(second, len(whole)):
        path.write_bytes(whole[:cut])
        assert list(kept_episodes(tmp_path)) == [episode_key(spec) for spec in SPECS[:2]]
        if cut % 40 == 0:  # fsync takes its time
            write(tmp_path, SPECS[2:3])
            assert path.read_bytes() == whole


def test_processes_are_joined_in_the_order_of_the_specifications_and_the_folder_is_tidied(tmp_path: Path) -> None:
    begin_run(tmp_path, SETTINGS, {"command": "evaluate"})
    order = np.random.default_rng(0).permutation(len(SPECS))
    write(tmp_path, [SPECS[i] for i in order[:4]])
    write(tmp_path, [SPECS[i] for i in order[3:7]], rank=1)  # one of them is in both
    write(tmp_path, [SPECS[i] for i in order[7:]], rank=10)
    assert unfinished_run(tmp_path, SETTINGS) == {"command": "evaluate"}
    results = finish_run(tmp_path, SETTINGS, {"command": "evaluate", "seconds": 1.0}, SPECS)
    assert results.episodes == [result(spec) for spec in SPECS]
    assert read_results(tmp_path) == results
    assert sorted(path.name for path in tmp_path.iterdir()) == ["episodes.jsonl", "results.json"]


def test_results_are_not_written_while_an_episode_is_missing(tmp_path: Path) -> None:
    begin_run(tmp_path, SETTINGS, {})
    write(tmp_path, SPECS[:-1])
    with pytest.raises(RuntimeError, match="1 episodes are not on disk, among them libero_goal task 2, init state 30"):
        finish_run(tmp_path, SETTINGS, {}, SPECS)
    assert not (tmp_path / "results.json").exists()


def test_a_kill_between_joining_and_tidying_loses_nothing(tmp_path: Path) -> None:
    """All files of the run are there once more beside the joined one, as before they were removed."""
    begin_run(tmp_path, SETTINGS, {})
    write(tmp_path, SPECS[:5])
    other = write(tmp_path, SPECS[5:], rank=1)
    left = other.read_bytes()
    results = finish_run(tmp_path, SETTINGS, {}, SPECS)
    begin_run(tmp_path, SETTINGS, {})
    other.write_bytes(left)
    assert read_results(tmp_path) == results
    (tmp_path / "results.json").unlink()
    assert len(kept_episodes(tmp_path)) == len(SPECS)
    assert finish_run(tmp_path, SETTINGS, {}, SPECS) == results


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    with Journal(tmp_path), Journal(tmp_path, rank=1), pytest.raises(UserError, match="another evaluation is writing"):
        write(tmp_path, SPECS[:1])
    assert not kept_episodes(tmp_path)
    write(tmp_path, SPECS[:1])
    assert kept_episodes(tmp_path)


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    begin_run(tmp_path, SETTINGS, {})
    with pytest.raises(UserError, match="holds another run .other seed, cot. and is not overwritten"):
        unfinished_run(tmp_path, {**SETTINGS, "seed": 1, "cot": {"mode": "mask"}})
    (tmp_path / "run.json").write_text('{"settings": {}')
    with pytest.raises(UserError, match="run.json is damaged"):
        unfinished_run(tmp_path, SETTINGS)
    (tmp_path / "run.json").write_text(json.dumps({"format": "other", "settings": SETTINGS, "provenance": {}}))
    with pytest.raises(UserError, match="run.json was not written by dtvla"):
        unfinished_run(tmp_path, SETTINGS)
    (tmp_path / "run.json").unlink()
    assert unfinished_run(tmp_path, SETTINGS) is None
    strange = write(tmp_path, SPECS[:1])
    with pytest.raises(UserError, match="episodes.jsonl belongs to no known run"):
        unfinished_run(tmp_path, SETTINGS)
    with pytest.raises(UserError, match="is a file; choose another output"):
        unfinished_run(strange, SETTINGS)
    with pytest.raises(UserError, match="cannot be written .Not a directory"), Journal(strange / "below"):
        pass


def test_a_damaged_line_is_named_with_its_number(tmp_path: Path) -> None:
    path = write(tmp_path, SPECS[:3])
    lines = path.read_bytes().split(b"\n")
    for damage in (b"{", b"[]", b"{}", lines[1].replace(b'"steps": 40', b'"steps": NaN'), b"\0\0"):
        path.write_bytes(b"\n".join([lines[0], damage, *lines[2:]]))
        with pytest.raises(UserError, match="line 2 of .*episodes.jsonl is damaged"):
            kept_episodes(tmp_path)


def test_a_full_disk_is_one_message_and_keeps_what_was_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, SPECS[:1])
    line = (tmp_path / "episodes.jsonl").stat().st_size
    with file_size_limit(2 * line + line // 2), pytest.raises(UserError, match="cannot be written .File too large"):
        write(tmp_path, SPECS[1:3])
    assert "finished episodes are kept in" in capsys.readouterr().err
    assert list(kept_episodes(tmp_path)) == [episode_key(spec) for spec in SPECS[:2]]
    write(tmp_path, SPECS[2:3])
    assert list(kept_episodes(tmp_path)) == [episode_key(spec) for spec in SPECS[:3]]


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_number_that_json_does_not_have_is_not_written(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal, pytest.raises(ValueError, match="not JSON compliant"):
        journal.append(replace(result(SPECS[0]), latency=[float("nan")]))
    assert not kept_episodes(tmp_path)
