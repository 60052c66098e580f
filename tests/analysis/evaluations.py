"""Evaluations as dtvla evaluate writes them, made up for tests of what reads them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dtvla.rollout.results import EpisodeResult, Results, Thought, write_results

SETTINGS = {
    "checkpoint_sha256": "ab" * 32,
    "suite": "libero_10",
    "task_ids": [0],
    "init_states": [0],
    "seed": 0,
    "max_steps": 620,
    "render": "full",
    "protocol": "published",
    "cot": {"mode": "think", "temperature": 0, "max_tokens": None},
    "compat": {"action_decode": None},
    "quantize": None,
}
PROVENANCE = {
    "checkpoint": "outputs/runs/base/policy",
    "decoder": "hybrid",
    "versions": {"dtvla": "0.1.0", "mujoco": "3.3.2"},
    "device": "cpu",
    "dtype": "float32",
    "machine": {"processor": "A processor", "gpus": []},
}
HOLDS = "the gripper is closed and holds the bowl. next, lift the bowl straight up."
FREE = "the gripper is open and above the bowl. next, go straight down around the bowl."


def episode(
    task: int, state: int, success: bool, *, seed: int = 0, suite: str = "libero_10", decisions: int = 3, **more: Any
) -> EpisodeResult:
    """An episode of decisions every ten steps, each of 0.1 s and a free thought of 20 tokens."""
    thoughts = more.pop("thoughts", [Thought(10 * k, FREE, False, 20, 5) for k in range(decisions)])
    latency = more.pop("latency", [0.1] * len(thoughts))
    words = f"task number {task}"
    return EpisodeResult(suite, task, words, state, seed, success, 10 * len(thoughts), thoughts, latency, **more)


def evaluation(
    episodes: Sequence[EpisodeResult], mode: str = "think", provenance: dict[str, Any] | None = None, **settings: Any
) -> Results:
    """Results of a mode with these episodes; other settings and facts as named."""
    cot = {**SETTINGS["cot"], "mode": mode}  # type: ignore[dict-item]
    return Results({**SETTINGS, "cot": cot, **settings}, {**PROVENANCE, **(provenance or {})}, list(episodes))


def benchmark(folder: Path, mode: str, succeeds: Callable[[int, int], bool], decisions: int = 30) -> Path:
    """Write an evaluation of ten tasks and fifty init states, of which those succeed that the function says."""
    states = [(task, state) for task in range(10) for state in range(50)]
    episodes = [episode(task, state, succeeds(task, state), decisions=decisions) for task, state in states]
    write_results(evaluation(episodes, mode), folder)
    return folder
