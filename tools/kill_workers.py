"""Are results the same when simulation workers are killed at random? Replays the scripted expert and says so.

The expert's actions are recorded first, without a pool: an environment per process, nothing is killed. Then an
:class:`~dtvla.sim.pool.EnvPool` replays them chunk by chunk while a thread sends SIGKILL to random workers at random
moments. Episodes are equal when success, steps and the observed state at every decision are, to the last bit.

``python tools/kill_workers.py --episodes 200 --every 3 --out experiments/rollout/kills.json``
"""

import argparse
import hashlib
import json
import logging
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dtvla.policy.cot import CotMode
from dtvla.policy.policy import Decision
from dtvla.rollout.results import EpisodeResult, versions
from dtvla.rollout.runner import decision_seed, run_episodes
from dtvla.sim.pool import EnvPool, EpisodeSpec

CHUNK = 10
SETTINGS: dict[str, Any] = {
    "render": "none",
    "image_size": 64,
    "protocol": "published",
    "settle_steps": 10,
    "stepping": "exact",
}


@dataclass(frozen=True)
class Recording:
    """An undisturbed episode: the expert's actions (T, 7), the outcome, a digest of each state it decided on."""

    actions_TD: np.ndarray
    success: bool
    steps: int
    digests: list[str]


class Replay:
    """A policy that plays recordings and writes down what it sees."""

    def __init__(self, recordings: Mapping[EpisodeSpec, Recording]):
        self.chunks = {
            decision_seed(spec, k): recording.actions_TD[begin : begin + CHUNK]
            for spec, recording in recordings.items()
            for k, begin in enumerate(range(0, recording.steps, CHUNK))
        }

    def act(
        self, observations: Sequence[Mapping[str, Any]], cot: Any, *, seeds: Sequence[int], drafts: Any = None
    ) -> list[Decision]:
        """The recorded chunk that belongs to each seed; its thought is a hash of what was seen."""
        seen = [digest(observation) for observation in observations]
        return [Decision(text, self.chunks[seed]) for text, seed in zip(seen, seeds, strict=True)]


def digest(observation: Mapping[str, Any]) -> str:
    """Short hash of all bits of the observed arrays."""
    arrays = [np.ascontiguousarray(value) for value in observation.values() if isinstance(value, np.ndarray)]
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]


def record(specs: Sequence[EpisodeSpec]) -> list[Recording]:
    """Let the expert live episodes of one task in this process."""
    from dtvla.sim.env import LiberoEnv
    from dtvla.sim.expert import Expert

    env = LiberoEnv(specs[0].suite, specs[0].task_id, **SETTINGS)
    recordings = []
    for spec in specs:
        observation, _ = env.reset(seed=spec.seed, options={"init_state": spec.init_state})
        expert = Expert(env, seed=spec.init_state)
        actions: list[np.ndarray] = []
        digests = []
        over = success = False
        while not over:
            if len(actions) % CHUNK == 0:
                digests.append(digest(observation))
            actions.append(np.asarray(expert.act().executed, dtype=np.float64))
            observation, _, success, truncated, _ = env.step(actions[-1])
            over = success or truncated
        recordings.append(Recording(np.stack(actions), success, len(actions), digests))
    env.close()
    return recordings


def record_all(specs: Sequence[EpisodeSpec], workers: int) -> dict[EpisodeSpec, Recording]:
    """Recordings of all specifications, task by task, in ``workers`` processes."""
    tasks = [[spec for spec in specs if spec.task_id == task_id] for task_id in dict.fromkeys(s.task_id for s in specs)]
    context = multiprocessing.get_context("spawn")  # one environment per process
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as processes:
        done = list(processes.map(record, tasks))
    return {
        spec: recording
        for task, part in zip(tasks, done, strict=True)
        for spec, recording in zip(task, part, strict=True)
    }


def kill_at_random(
    pool: EnvPool, every: int, seed: int, finished: Sequence[EpisodeResult], over: threading.Event, kills: list[float]
) -> None:
    """SIGKILL a random worker at a random moment within 5 s, each time ``every`` more episodes have finished."""
    rng = random.Random(seed)
    began = time.monotonic()
    while not over.wait(rng.uniform(0.0, 5.0)):
        if len(finished) < every * len(kills):
            continue
        try:
            os.kill(rng.choice(pool.process_ids), signal.SIGKILL)
        except ProcessLookupError:
            continue  # it is being replaced
        kills.append(round(time.monotonic() - began, 1))


def compare(recordings: Mapping[EpisodeSpec, Recording], results: Sequence[EpisodeResult]) -> list[dict[str, Any]]:
    """One row for every episode, with what both runs say and whether they are equal."""
    rows = []
    for (spec, recording), result in zip(recordings.items(), results, strict=True):
        equal = (spec.suite, spec.task_id, spec.init_state, recording.success, recording.steps, recording.digests) == (
            *(result.suite, result.task_id, result.init_state, result.success, result.steps),
            [thought.text for thought in result.thoughts],
        )
        rows.append(
            {
                "task_id": spec.task_id,
                "init_state": spec.init_state,
                "success": result.success,
                "steps": result.steps,
                "last_observation": result.thoughts[-1].text,
                "equal": equal,
            }
        )
    return rows


def main() -> int:
    """Command line; 0 when all results are there and equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="libero_goal")
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--episodes", type=int, default=200, help="over all tasks; at most 50 for each")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--every", type=int, default=3, help="finished episodes between two kills")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    each = -(-args.episodes // len(args.tasks))
    specs = [EpisodeSpec(args.suite, task, state, 0) for task in args.tasks for state in range(each)][: args.episodes]
    clock = time.monotonic()
    recordings = record_all(specs, args.workers)
    recorded_s, clock = time.monotonic() - clock, time.monotonic()
    over, kills = threading.Event(), []
    finished: list[EpisodeResult] = []
    with EnvPool(args.workers, **SETTINGS, attempts=1000) as pool:
        order = (pool, args.every, args.seed, finished, over, kills)
        killer = threading.Thread(target=kill_at_random, args=order)
        killer.start()
        try:
            results = run_episodes(Replay(recordings), specs, pool, CotMode(), on_result=finished.append)
        finally:
            over.set()
            killer.join()
        losses = pool.losses
    rows = compare(recordings, results)
    equal = sum(row["equal"] for row in rows)
    summary = {
        "episodes": len(specs),
        "results": len(results),
        "reported_once": len(finished) == len({(r.task_id, r.init_state) for r in finished}) == len(specs),
        "equal": equal,
        "successes": sum(row["success"] for row in rows),
        "kills": len(kills),
        "workers_replaced": len(losses),
    }
    document = {
        "command": [
            "tools/kill_workers.py",
            *(args.out.name if word == str(args.out) else word for word in sys.argv[1:]),
        ],
        "summary": summary,
        "settings": {**SETTINGS, "suite": args.suite, "tasks": args.tasks, "workers": args.workers, "chunk": CHUNK},
        "versions": versions(),
        "seconds": {"undisturbed": round(recorded_s, 1), "with_kills": round(time.monotonic() - clock, 1)},
        "killed_at_s": kills,
        "losses": losses,
        "episodes": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(summary, indent=1))
    return 0 if equal == len(specs) == len(results) and summary["reported_once"] else 1


if __name__ == "__main__":
    sys.exit(main())
