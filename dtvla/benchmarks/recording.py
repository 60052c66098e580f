"""Actions to replay, recorded once: the scripted expert's where it knows the task, smooth random ones elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dtvla.sim.env import LiberoEnv
from dtvla.sim.expert import Expert, expert_tasks
from dtvla.sim.pool import pool_settings
from dtvla.sim.settings import ACTION_DIM

RANDOM_STEPS = 150
_MEMORY, _SPREAD = 0.9, 0.3  # of the random actions: an autoregressive process


@dataclass(frozen=True)
class Recording:
    """An episode of :class:`LiberoEnv` without pictures, one step at a time.

    Attributes:
        source: ``expert`` or ``random``.
        actions_SD: float64 (S, 7).
        states_SN: the physics after every step, float64 (S + 1, 1 + nq + nv); the first is that of the reset.
        successes: after every step, S of them.
    """

    source: str
    actions_SD: np.ndarray
    states_SN: np.ndarray
    successes: list[bool]


def make_env(env: Mapping[str, Any], task_id: int, **changes: Any) -> LiberoEnv:
    """The environment that the config group ``env`` describes, with changes."""
    return LiberoEnv(env["suite"], task_id, max_steps=env["max_steps"], **pool_settings(env) | changes)


def record(env: Mapping[str, Any], task_id: int, init_state: int) -> Recording:
    """Run one episode; the expert is disturbed, and both sources are seeded by the init state.

    Args:
        env: the config group ``env``.
        task_id: in its suite.
        init_state: to begin from.
    """
    simulation = make_env(env, task_id, render="none")
    simulation.reset(options={"init_state": init_state})
    expert = Expert(simulation, seed=init_state) if task_id in expert_tasks().get(env["suite"], []) else None
    planned_SD = _random_actions(init_state)
    actions: list[np.ndarray] = []
    successes: list[bool] = []
    states = [simulation.physics()]
    over = False
    while not over and (expert or len(actions) < len(planned_SD)):
        action = np.asarray(expert.act().executed if expert else planned_SD[len(actions)], dtype=np.float64)
        _, _, success, truncated, _ = simulation.step(action)
        actions.append(action)
        states.append(simulation.physics())
        successes.append(success)
        over = success or truncated
    simulation.close()
    return Recording("expert" if expert else "random", np.array(actions), np.array(states), successes)


def _random_actions(seed: int) -> np.ndarray:
    """(S, 7) in [-1, 1]: an autoregressive process of order one, started at rest."""
    from scipy.signal import lfilter

    noise_SD = np.random.default_rng(seed).normal(0.0, _SPREAD, (RANDOM_STEPS, ACTION_DIM))
    return np.clip(lfilter([1.0], [1.0, -_MEMORY], noise_SD, axis=0), -1.0, 1.0)
