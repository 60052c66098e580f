"""Measure the scripted expert: ``python -m dtvla.sim.expert_rates --suite libero_object --episodes 10``.

Prints one Markdown row per task with successes over the first init states, disturbances included, and the mean number
of steps and of failed grasps. Nothing is rendered. The table in docs/expert.md comes from here.
"""

import argparse
import sys
import time
from dataclasses import dataclass

import numpy as np

from dtvla.errors import UserError
from dtvla.sim.env import LiberoEnv
from dtvla.sim.expert import Expert, expert_tasks


@dataclass(frozen=True)
class Rate:
    """Outcome of the expert on one task; ``steps`` and ``retries`` are means over the successes."""

    successes: int
    episodes: int
    steps: float
    retries: float
    seconds: float


def measure(env: LiberoEnv, episodes: int, *, seed: int = 0, noise: float | None = None) -> Rate:
    """Run the expert from init states 0, 1, ...; episode i uses the disturbances of ``seed + i``."""
    started = time.monotonic()
    steps: list[int] = []
    retries: list[int] = []
    for episode in range(episodes):
        env.reset(options={"init_state": episode % len(env.init_states_NS)})
        expert = Expert(env, seed=seed + episode) if noise is None else Expert(env, seed=seed + episode, noise=noise)
        over = False
        while not over:
            _, _, success, truncated, info = env.step(expert.act().executed)
            over = success or truncated
        if success:
            steps.append(info["step"])
            retries.append(expert.attempts)
    seconds = (time.monotonic() - started) / episodes
    return Rate(len(steps), episodes, _mean(steps), _mean(retries), seconds)


def _mean(values: list[int]) -> float:
    return float(np.mean(values)) if values else float("nan")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m dtvla.sim.expert_rates", description=__doc__)
    parser.add_argument("--suite", choices=sorted(expert_tasks()), help="one suite; all by default")
    parser.add_argument("--tasks", type=int, nargs="*", help="task ids; all that the expert knows by default")
    parser.add_argument("--episodes", type=int, default=10, help="init states per task")
    parser.add_argument("--seed", type=int, default=0, help="of the disturbances")
    parser.add_argument("--noise", type=float, help="standard deviation of the disturbance; 0: none")
    arguments = parser.parse_args()
    print("| suite | task | instruction | successes | steps | failed grasps | s per episode |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for suite in [arguments.suite] if arguments.suite else expert_tasks():
        for task_id in expert_tasks()[suite] if arguments.tasks is None else arguments.tasks:
            env = LiberoEnv(suite, task_id, render="none")
            rate = measure(env, arguments.episodes, seed=arguments.seed, noise=arguments.noise)
            env.close()
            print(
                f"| {suite} | {task_id} | {env.task.instruction} | {rate.successes}/{rate.episodes} "
                f"| {rate.steps:.0f} | {rate.retries:.1f} | {rate.seconds:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
