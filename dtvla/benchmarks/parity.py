"""The parity study: do the same actions through plain LIBERO and through ours give the same episode, bit for bit?"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dtvla.benchmarks.plain_stepping import PlainLibero
from dtvla.benchmarks.processes import in_child
from dtvla.benchmarks.recording import Recording, make_env, record
from dtvla.errors import UserError
from dtvla.sim.settings import CAMERAS
from dtvla.sim.suites import get_tasks

OBSERVED = (*CAMERAS, "state")
Moments = list[tuple[int, np.ndarray, dict[str, Any]]]
"""(Steps so far, physics, observation) after the reset and every chunk."""


@dataclass(frozen=True)
class Settings:
    """See ``conf/benchmark.yaml``, which has the same names.

    Attributes:
        env: the config group ``env``; ``task_ids`` null compares all tasks.
        init_state: to begin every episode from.
        chunk: actions between two observations.
    """

    env: Mapping[str, Any] = field(default_factory=dict)
    init_state: int = 0
    chunk: int = 10

    def __post_init__(self) -> None:
        """Refuse what cannot be compared."""
        if self.env["render"] != "full":
            raise UserError(f"env.render: {self.env['render']!r} has other pictures than plain LIBERO; use full")
        if not isinstance(self.chunk, int) or self.chunk < 1:
            raise UserError(f"chunk: {self.chunk!r} is not a whole number from 1 on; give one")


def parity(settings: Settings) -> dict[str, Any]:
    """Compare every task; each side lives in fresh processes.

    Returns:
        ``tasks``, one record for each, and ``equal``: how many are equal in everything.

    Raises:
        UserError: no such suite, task or init state, or no renderer.
    """
    found = []
    for task in get_tasks(settings.env["suite"], settings.env["task_ids"]):
        names = {"task_id": task.task_id, "instruction": task.instruction}
        compared = names | compare(*episodes(settings, task.task_id))
        print(f"{task.suite} task {task.task_id}: {'equal' if compared['equal'] else 'different'}", file=sys.stderr)
        found.append(compared)
    return {"tasks": found, "equal": sum(t["equal"] for t in found), "compared": len(found)}


def episodes(settings: Settings, task_id: int) -> tuple[Recording, Moments, dict[str, Any]]:
    """One episode three times: ours step by step, ours chunk by chunk with pictures, and plain LIBERO's.

    Returns:
        The recording; :func:`replay` of its actions; and of plain LIBERO, which renders at every step, ``states`` and
        ``successes`` of every step and what was ``observed`` after the reset and every chunk, by step.
    """
    env = settings.env
    recording = in_child(record, env, task_id, settings.init_state)
    ours = in_child(replay, env, task_id, settings.init_state, recording.actions_SD, settings.chunk)
    return recording, ours, _replay_plain(settings, task_id, recording)


def compare(recording: Recording, ours: Moments, plain: Mapping[str, Any]) -> dict[str, Any]:
    """What of an episode is equal to the last bit; the arguments are what :func:`episodes` returns.

    Returns:
        ``equal_states``: every state of plain LIBERO, after the reset and every step, and ours stepped one by one;
        ``equal_chunks``: states at the ends of our chunks; ``equal_observations``: pictures of both cameras and the
        proprioception there; ``equal_success``: success at every step; ``equal``: all of these; ``farthest_state``: the
        largest difference between numbers of two states; ``unequal_at``: steps of unequal observations.
    """
    steps = min(len(plain["states"]), len(recording.states_SN))
    difference_SN = np.abs(plain["states"][:steps] - recording.states_SN[:steps])
    same_length = len(plain["states"]) == len(recording.states_SN)
    unequal_at = {
        key: [end for end, _, seen in ours if not _equal(seen[key], plain["observed"].get(end, {}).get(key))]
        for key in OBSERVED
    }
    found = {
        "source": recording.source,
        "steps": len(recording.actions_SD),
        "success": recording.successes[-1],
        "plain_success": plain["successes"][-1],
        "equal_success": plain["successes"] == recording.successes,
        "equal_states": same_length and not bool(difference_SN.any()),
        "farthest_state": float(difference_SN.max()),
        "equal_chunks": same_length and all(np.array_equal(state, plain["states"][end]) for end, state, _ in ours),
        "observations": len(ours),
        "equal_observations": not any(unequal_at.values()),
        "unequal_at": unequal_at,
    }
    return found | {"equal": all(value for key, value in found.items() if key.startswith("equal_"))}


def _equal(ours: np.ndarray, plain: np.ndarray | None) -> bool:
    return plain is not None and np.array_equal(ours, plain)


def replay(env: Mapping[str, Any], task_id: int, init_state: int, actions_SD: np.ndarray, chunk: int) -> Moments:
    """Our episode as the runner steps it."""
    simulation = make_env(env, task_id)
    observation, _ = simulation.reset(options={"init_state": init_state})
    moments = [(0, simulation.physics(), observation)]
    for begin in range(0, len(actions_SD), chunk):
        observation, *_, info = simulation.step_chunk(actions_SD[begin : begin + chunk])
        moments.append((info["step"], simulation.physics(), observation))
    simulation.close()
    return moments


def _replay_plain(settings: Settings, task_id: int, recording: Recording) -> dict[str, Any]:
    env, actions_SD = settings.env, recording.actions_SD
    with PlainLibero(
        env["suite"], task_id, image_size=env["image_size"], settle_steps=env["settle_steps"]
    ) as simulation:
        first = simulation.reset(settings.init_state)
        states, successes, observed = [*first["states"]], [], {0: first}
        for begin in range(0, len(actions_SD), settings.chunk):
            part = simulation.run(actions_SD[begin : begin + settings.chunk])
            states += [*part["states"]]
            successes += part["successes"]
            observed[len(successes)] = part
            if successes[-1]:
                break
    return {"states": np.array(states), "successes": successes, "observed": observed}
