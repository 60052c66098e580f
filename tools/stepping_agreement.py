"""Do the two stepping modes agree? ``python tools/stepping_agreement.py OUT.jsonl --suite libero_goal --episodes 8``.

Every episode is run from the same init state with the same actions in ``exact`` mode, in ``fast`` mode, and (the first
``--plain`` init states of a task) by robosuite's own step. Actions are the scripted expert's, decided
while ``exact`` runs; where it can't do a task they are smooth random ones that press downwards. One JSON line per
episode is appended to OUT; episodes that it already has are skipped. ``--summary`` prints a summary of OUT as JSON.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mujoco
import numpy as np

from dtvla.rollout.results import machine, versions
from dtvla.sim.env import LiberoEnv
from dtvla.sim.expert import Expert, expert_tasks
from dtvla.sim.stepping import Stepper
from dtvla.sim.suites import get_tasks

RANDOM_STEPS = 120
EXTRA_STEPS = 20
TIMED = ("exact", "fast", "plain")
Decide = Callable[[int], np.ndarray | None]


class RobosuiteStepper:
    """robosuite's own step, with its own look for contacts, in place of dtvla's."""

    def __init__(self, domain: Any):
        self.domain = domain
        del domain.check_contact  # dtvla's; robosuite's own is a method of the class

    def step(self, action: np.ndarray) -> bool:
        """Run one action; whether the task is solved."""
        return bool(self.domain.step(action)[2])


def random_actions(seed: int) -> np.ndarray:
    """Smooth actions (RANDOM_STEPS, 7) that press downwards, so that the arm meets what stands on the table."""
    rng = np.random.default_rng(seed)
    actions = np.cumsum(rng.normal(0.0, 0.3, (RANDOM_STEPS, 7)), axis=0)
    actions[:, 2] -= 0.5
    return np.asarray(np.clip(actions, -1.0, 1.0))


def run(env: LiberoEnv, mode: str, init_state: int, decide: Decide) -> dict[str, Any]:
    """One episode: actions, states (S, 1 + nq + nv), success, CPU milliseconds per step spent in the environment."""
    env._stepper = RobosuiteStepper(env.domain) if mode == "plain" else Stepper(env.domain, mode)  # type: ignore
    env.reset(options={"init_state": init_state})
    actions: list[np.ndarray] = []
    states = []
    seconds, over, success = 0.0, False, False
    while not over and (action := decide(len(actions))) is not None:
        started = time.process_time()
        _, _, success, truncated, _ = env.step(action)
        seconds += time.process_time() - started
        over = success or truncated
        actions.append(action)
        states.append(env.physics())
    return {"actions": actions, "states": np.array(states), "success": success, "cpu_ms": 1e3 * seconds / len(actions)}


def replay(env: LiberoEnv, mode: str, init_state: int, recorded: dict[str, Any]) -> dict[str, Any]:
    """Run recorded actions; where they led to success, the last one is repeated up to EXTRA_STEPS times if need be."""
    actions = recorded["actions"] + recorded["actions"][-1:] * (EXTRA_STEPS if recorded["success"] else 0)
    return run(env, mode, init_state, lambda step: actions[step] if step < len(actions) else None)


def object_positions(env: LiberoEnv, state: np.ndarray) -> np.ndarray:
    """Positions (n, 3) in m of everything that moves freely."""
    model = env.domain.sim.model._model
    first = model.jnt_qposadr[model.jnt_type == mujoco.mjtJoint.mjJNT_FREE]
    return np.asarray(state[1:][first[:, None] + np.arange(3)])


def expert_decides(env: LiberoEnv, seed: int) -> Decide:
    """The scripted expert's actions, its disturbances included."""
    experts: list[Expert] = []

    def decide(step: int) -> np.ndarray:
        if step == 0:
            experts.append(Expert(env, seed=seed))  # looks at the scene, so it is made after the reset
        return experts[0].act().executed

    return decide


def compare(env: LiberoEnv, init_state: int, *, plain: bool) -> dict[str, Any]:
    """One line of the study. A used environment gives the states of a fresh one, so one serves all modes."""
    suite, task_id = env.task.suite, env.task.task_id
    can = task_id in expert_tasks().get(suite, [])
    smooth = random_actions(1000 * task_id + init_state)
    decide = expert_decides(env, init_state) if can else lambda step: smooth[step] if step < len(smooth) else None
    exact = run(env, "exact", init_state, decide)
    fast = replay(env, "fast", init_state, exact)
    robosuite = replay(env, "plain", init_state, exact) if plain else None
    common = min(len(exact["states"]), len(fast["states"])) - 1
    moved = object_positions(env, exact["states"][common]) - object_positions(env, fast["states"][common])
    line = {
        "suite": suite,
        "task_id": task_id,
        "init_state": init_state,
        "actions": "expert" if can else "random",
        "steps": [len(exact["states"]), len(fast["states"])],
        "success": [exact["success"], fast["success"]],
        "greatest_object_distance_m": float(np.linalg.norm(moved, axis=1).max()),
        "cpu_ms_per_step": {"exact": exact["cpu_ms"], "fast": fast["cpu_ms"]},
    }
    if robosuite is None:
        return line
    same = np.array_equal(robosuite["states"], exact["states"]) and robosuite["success"] == exact["success"]
    times = {"exact": exact["cpu_ms"], "fast": fast["cpu_ms"], "plain": robosuite["cpu_ms"]}
    return line | {"plain_equals_exact": same, "cpu_ms_per_step": times}


def summarise(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Agreement by source of the actions and suite, and speeds over the episodes that ran in all three ways."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        for name in (line["actions"], f"{line['actions']}, {line['suite']}"):
            groups.setdefault(name, []).append(line)
    return {name: _summary(group) for name, group in sorted(groups.items())}


def _summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    distances_mm = 1e3 * np.array([line["greatest_object_distance_m"] for line in lines])
    compared = [line for line in lines if "plain_equals_exact" in line]
    summary = {
        "episodes": len(lines),
        "tasks": len({(line["suite"], line["task_id"]) for line in lines}),
        "successes_exact": sum(line["success"][0] for line in lines),
        "successes_fast": sum(line["success"][1] for line in lines),
        "success_equal": sum(line["success"][0] == line["success"][1] for line in lines),
        "same_number_of_steps": sum(line["steps"][0] == line["steps"][1] for line in lines),
        "object_distance_mm": {
            "median": float(np.median(distances_mm)),
            "p95": float(np.quantile(distances_mm, 0.95)),
            "greatest": float(distances_mm.max()),
        },
        "compared_with_plain": len(compared),
        "plain_equals_exact_bit_for_bit": sum(line["plain_equals_exact"] for line in compared),
    }
    if compared:
        mean = {mode: float(np.mean([line["cpu_ms_per_step"][mode] for line in compared])) for mode in TIMED}
        summary["cpu_ms_per_step"] = mean
        summary["times_plain"] = {mode: mean["plain"] / mean[mode] for mode in ("exact", "fast")}
    return summary


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--suite", default="libero_spatial")
    parser.add_argument("--tasks", type=int, nargs="*", help="all of the suite by default")
    parser.add_argument("--episodes", type=int, default=8, help="init states per task")
    parser.add_argument("--plain", type=int, default=1, help="init states per task that robosuite's own step runs, too")
    parser.add_argument("--summary", action="store_true", help="print a summary of OUT and run nothing")
    arguments = parser.parse_args()
    lines = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    if arguments.summary:
        print(json.dumps({"machine": machine(), "versions": versions(), "groups": summarise(lines)}, indent=2))
        return
    have = {(line["suite"], line["task_id"], line["init_state"]) for line in lines}
    for task_id in [task.task_id for task in get_tasks(arguments.suite, arguments.tasks)]:
        wanted = [i for i in range(arguments.episodes) if (arguments.suite, task_id, i) not in have]
        if not wanted:
            continue
        env = LiberoEnv(arguments.suite, task_id, render="none")
        for init_state in wanted:
            line = compare(env, init_state, plain=init_state < arguments.plain)
            with arguments.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
        env.close()


if __name__ == "__main__":
    main()
