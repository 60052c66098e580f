"""Trajectories on disk: what is read is what was decided, to the last bit; damage is named; memory is bounded."""

from __future__ import annotations

import resource
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dtvla.errors import UserError
from dtvla.policy.policy import Decision
from dtvla.rollout.results import EpisodeResult
from dtvla.rollout.trajectories import SUFFIX, Trajectory, TrajectoryWriter, read_trajectory
from dtvla.sim.pool import EpisodeSpec

SPEC = EpisodeSpec("libero_goal", 3, 17, 0, 100, sample=5)


def random_decision(rng: np.random.Generator, shape: tuple[int, ...] = (2, 3, 8, 8), slots: int = 14) -> Decision:
    length = int(rng.integers(0, 30))
    return Decision(
        thought="words",
        actions_SD=rng.normal(size=(slots // 7, 7)).astype(np.float32),
        thought_ids=rng.integers(0, 257157, length).tolist(),
        truncated=bool(rng.integers(2)),
        thought_log_probs=(-rng.exponential(size=length)).tolist(),
        thought_forced=int(rng.integers(0, 3)),
        action_bins_A=rng.integers(0, 2048, slots),
        action_log_probs_A=-rng.exponential(size=slots).astype(np.float32),
        pixels_NCHW=rng.integers(0, 256, shape, dtype=np.uint8),
    )


def end(spec: EpisodeSpec, steps: int, success: bool = False) -> EpisodeResult:
    task = "open the drawer"
    return EpisodeResult(spec.suite, spec.task_id, task, spec.init_state, spec.seed, success, steps)


def write(folder: Path, spec: EpisodeSpec, decisions: list[Decision], steps: int) -> Path:
    writer = TrajectoryWriter(folder)
    for k, decision in enumerate(decisions):
        writer.decided(spec, 10 * k, decision)
    writer.finished(spec, end(spec, steps))
    (path,) = folder.iterdir()
    return path


def assert_same(found: Trajectory, decisions: list[Decision]) -> None:
    for k, (record, decision) in enumerate(zip(found.records, decisions, strict=True)):
        assert (record.thought_ids, record.thought_log_probs) == (decision.thought_ids, decision.thought_log_probs)
        assert (record.forced, record.truncated) == (decision.thought_forced, decision.truncated)
        assert record.bins_A.dtype == np.int64
        assert record.action_log_probs_A.dtype == np.float32
        np.testing.assert_array_equal(record.bins_A, decision.action_bins_A)
        np.testing.assert_array_equal(record.action_log_probs_A, decision.action_log_probs_A)
        assert decision.pixels_NCHW is not None
        pixels = found.pixels(k)
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, decision.pixels_NCHW)


def test_episodes_that_run_at_the_same_time_are_read_as_they_were_lived(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    specs = [SPEC, replace(SPEC, sample=6), replace(SPEC, init_state=2, max_steps=None), replace(SPEC, task_id=0)]
    lived: dict[EpisodeSpec, list[tuple[int, Decision]]] = {spec: [] for spec in specs}
    writer = TrajectoryWriter(tmp_path / "deep" / "folder")
    for _ in range(60):
        spec = specs[rng.integers(len(specs))]
        step = lived[spec][-1][0] + int(rng.integers(1, 11)) if lived[spec] else 0
        lived[spec].append((step, random_decision(rng)))
        writer.decided(spec, *lived[spec][-1])
    last = {spec: lived[spec][-1][0] + int(rng.integers(1, 11)) for spec in specs}
    for spec in specs:
        writer.finished(spec, end(spec, last[spec], success=spec is SPEC))
    found = {one.spec: one for one in map(read_trajectory, (tmp_path / "deep" / "folder").iterdir())}
    assert set(found) == set(specs)
    for spec in specs:
        steps = [step for step, _ in lived[spec]]
        assert [record.step for record in found[spec].records] == steps
        assert [r.executed for r in found[spec].records] == np.diff([*steps, last[spec]]).tolist()
        assert (found[spec].steps, found[spec].success) == (last[spec], spec is SPEC)
        assert found[spec].instruction == "open the drawer"
        assert_same(found[spec], [decision for _, decision in lived[spec]])


def test_the_writer_keeps_no_view_of_a_batch_and_nothing_of_a_finished_episode(tmp_path: Path) -> None:
    batch = np.zeros((4, 2, 3, 224, 224), np.uint8)
    writer, rng = TrajectoryWriter(tmp_path), np.random.default_rng(1)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for number in range(3):
        spec = replace(SPEC, sample=number)
        for step in range(8):
            pixels = batch[number]
            pixels[:] = 10 * number + step
            writer.decided(spec, step, replace(random_decision(rng), pixels_NCHW=pixels))
        writer.finished(spec, end(spec, 8))
    kept, peak = (memory - before for memory in tracemalloc.get_traced_memory())
    tracemalloc.stop()
    episode = 8 * batch[0].nbytes
    assert kept < batch[0].nbytes
    assert peak < 4.5 * episode, "one episode, and its copies while it is written"
    for number in range(3):
        (path,) = tmp_path.glob(f"*sample{number}{SUFFIX}" if number else f"*seed0{SUFFIX}")
        found = read_trajectory(path)
        assert [int(found.pixels(k).mean()) for k in range(8)] == [10 * number + k for k in range(8)]


def test_pictures_stay_on_disk_until_one_decisions_are_asked_for(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    decisions = [random_decision(rng, (2, 3, 224, 224)) for _ in range(20)]
    one = 2 * 3 * 224 * 224
    path = write(tmp_path, SPEC, decisions, 200)
    assert path.stat().st_size < 20 * (one + 3000), "pictures are there once, the rest is small"
    read_trajectory(path)
    tracemalloc.start()
    found = read_trajectory(path)
    assert tracemalloc.get_traced_memory()[1] < one
    found.pixels(13)
    assert tracemalloc.get_traced_memory()[1] < 3 * one
    tracemalloc.stop()
    with pytest.raises(IndexError):
        found.pixels(20)
    with pytest.raises(IndexError):
        found.pixels(-1)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    path = write(tmp_path / "a", SPEC, [random_decision(rng) for _ in range(3)], 25)
    content, tensors = path.read_bytes(), load_file(path)
    whole = read_trajectory(path)
    other = content.replace(b"dtvla.trajectory", b"other.trajectory")
    for damage in (content[:100], content[:-1], b"", b"\xff" * 300, other):
        path.write_bytes(damage)
        with pytest.raises(UserError, match=rf"{path.name}: not a readable trajectory .*remove its folder"):
            read_trajectory(path)
    path.write_bytes(content[:-1])
    with pytest.raises(UserError, match="not a readable trajectory"):
        whole.pixels(0)
    path.write_bytes(content)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    for name in tensors:
        save_file({k: v for k, v in tensors.items() if k != name}, path, metadata)
        with pytest.raises(UserError, match="not a readable trajectory"):
            read_trajectory(path)
        save_file({**tensors, name: tensors[name][:-1]}, path, metadata)
        with pytest.raises(UserError, match="not a readable trajectory"):
            read_trajectory(path)
    save_file(tensors, path, metadata)
    assert read_trajectory(path).steps == 25
    with pytest.raises(UserError, match="missing"):
        read_trajectory(tmp_path / "missing.safetensors")


def test_what_no_model_decided_is_not_recorded(tmp_path: Path) -> None:
    writer, decision = TrajectoryWriter(tmp_path), random_decision(np.random.default_rng(4))
    lacking = (
        {"pixels_NCHW": None},
        {"thought_log_probs": [0.0] * 31},
        {"action_log_probs_A": np.zeros(0, np.float32)},
    )
    for fields in lacking:
        with pytest.raises(ValueError, match="libero_goal task 3, init state 17, seed 0, sample 5"):
            writer.decided(SPEC, 0, replace(decision, **fields))  # type: ignore[arg-type]


def test_a_full_disk_is_one_message_and_leaves_nothing_half(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(
            UserError, match=r"seed0_sample5.safetensors: can't be written .*File too large.*; make room"
        ):
            write(tmp_path, SPEC, [random_decision(rng)], 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="can't be written"):
        write(tmp_path / "file", SPEC, [random_decision(rng)], 10)


def test_trajectories_are_read_without_torch() -> None:
    code = "import sys, dtvla.rollout.trajectories, dtvla.rollout.groups\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
