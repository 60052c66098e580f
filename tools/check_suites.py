"""Create every task of the perturbed suites, place its first init state, and look whether the scene is as it should be.

    python tools/check_suites.py experiments/suites/checked.json [SUITE ...]

Tasks that the file holds already are not run again. Each suite runs in a process of its own.
"""

import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import numpy as np

from dtvla.rollout.results import versions, write_text
from dtvla.sim.suites import Task, base_suite, get_tasks, suite_names

STEPS = 20  # of an upward motion, 1 s
ROBOT_POSITIONS = 9  # arm and fingers come first in the positions


def check(task: Task) -> dict[str, Any]:
    """What one task does after the settle steps and in the second after them."""
    from dtvla.sim.env import LiberoEnv

    env = LiberoEnv(task.suite, task.task_id, render="none")
    try:
        _, info = env.reset(seed=0)
        positions = slice(1 + ROBOT_POSITIONS, 1 + env.domain.sim.model.nq)
        settled = env.physics()
        for _ in range(STEPS):
            _, _, over, _, _ = env.step(np.array([0.0, 0.0, 0.2, 0.0, 0.0, 0.0, -1.0]))
            if over:
                break
        moved = env.physics()
        return {
            "suite": task.suite,
            "task_id": task.task_id,
            "words_are_liberos": task.instruction == env._libero.language_instruction,
            "init_state_fits": settled.shape == env.init_states_NS[0].shape,
            "finite": bool(np.isfinite(moved).all()),
            "solved_before_the_first_action": info["success"],
            "solved_by_waiting": bool(over),
            "moved_by_itself": round(float(np.abs(moved[positions] - settled[positions]).max()), 3),
        }
    finally:
        env.close()


def check_all(path: Path, suites: list[str]) -> None:
    """Check the tasks that `path` lacks and write it after each suite."""
    rows = json.loads(path.read_text())["tasks"] if path.exists() else []
    for suite in suites:
        known = {row["task_id"] for row in rows if row["suite"] == suite}
        tasks = [task for task in get_tasks(suite, None) if task.task_id not in known]
        with multiprocessing.get_context("spawn").Pool(1) as process:
            rows += process.map(check, tasks)
        write_text(path, json.dumps({"versions": versions(), "tasks": rows}, indent=1) + "\n")
        print(f"{suite}: {len(tasks)} tasks checked", flush=True)


if __name__ == "__main__":
    check_all(Path(sys.argv[1]), sys.argv[2:] or [name for name in suite_names() if name != base_suite(name)])
