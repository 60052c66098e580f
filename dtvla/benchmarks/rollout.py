"""The rollout study: environment steps per second, memory and start of our pool beside plain LIBERO, in one run.

All sides replay the same recorded episode, every worker held to one core with its renderer's threads. They take turns
chunk by chunk, so that a machine that slows down does so for all, and they must agree on the outcome.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dtvla.benchmarks.footprint import growth, stages
from dtvla.benchmarks.processes import in_child, usable_cores
from dtvla.benchmarks.recording import Recording, record
from dtvla.benchmarks.sides import PLAIN, PLAIN_NONE, PlainSide, PoolSide, Side
from dtvla.benchmarks.target import Target
from dtvla.errors import UserError
from dtvla.sim.suites import get_task

START_TARGET_S = 15.0
GROWTH_TARGET_MIB = 32.0  # an environment is a thousand; allocators round by a few


@dataclass(frozen=True)
class Settings:
    """See ``conf/benchmark.yaml``, which has the same names.

    Attributes:
        env: the config group ``env``; its first task is replayed, its ``render`` and ``stepping`` are not used.
        init_state: to begin from.
        chunk: actions between two observations.
        episodes: rounds that are measured.
        renders: qualities of our sides.
        steppings: of our sides, for each quality.
        workers: numbers of workers. With the first one all sides run, with others plain LIBERO and the first stepping.
        growth_episodes: of one chunk each, over which memory is watched; 0 leaves that out.
    """

    env: Mapping[str, Any] = field(default_factory=dict)
    init_state: int = 0
    chunk: int = 10
    episodes: int = 2
    renders: tuple[str, ...] = ("full", "draft", "none")
    steppings: tuple[str, ...] = ("exact", "fast")
    workers: tuple[int, ...] = (1, 2)
    growth_episodes: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        counts = {"chunk": (self.chunk, 1), "episodes": (self.episodes, 1), "init_state": (self.init_state, 0)}
        counts |= {"growth_episodes": (self.growth_episodes, 0)}
        for name, (value, least) in counts.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(f"{name}: {value!r} is not a whole number from {least} on; give one")
        for name in ("renders", "steppings", "workers"):
            if not getattr(self, name):
                raise UserError(f"{name}: is empty; give at least one")
        for workers in self.workers:
            if not isinstance(workers, int) or not 1 <= workers <= len(usable_cores()):
                raise UserError(f"workers: {workers!r}; give 1 to {len(usable_cores())}, one for each usable core")

    @property
    def task_id(self) -> int:
        """The task that is replayed."""
        return (self.env["task_ids"] or [0])[0]


def rollout(settings: Settings) -> dict[str, Any]:
    """Measure all sides; returns the parts of the file that ``docs/benchmark.md`` describes.

    Raises:
        UserError: no such task, init state or quality, or no renderer.
    """
    task = get_task(settings.env["suite"], settings.task_id)
    _say(f"recording {task.instruction!r}")
    env = dict(settings.env)
    recording = in_child(record, env, settings.task_id, settings.init_state)
    groups = [_measure_group(settings, workers, recording) for workers in settings.workers]
    measurements = [measurement for group in groups for measurement in group]
    _say("where memory goes")
    document: dict[str, Any] = {
        "task": {"suite": task.suite, "task_id": task.task_id, "instruction": task.instruction},
        "replay": {"source": recording.source, "steps": len(recording.actions_SD), "success": recording.successes[-1]},
        "measurements": measurements,
        "agreement": _agreement(measurements),
        "memory_stages": in_child(stages, env | {"render": settings.renders[0]}, settings.task_id),
    }
    if settings.growth_episodes:
        _say(f"{settings.growth_episodes} short episodes")
        document["growth"] = growth(
            env | {"render": settings.renders[0]}, settings.growth_episodes, recording.actions_SD[: settings.chunk]
        )
    document["ratios"] = _ratios(measurements, document.get("growth"))
    document["targets"] = [
        t.verdict(document["ratios"][t.ratio]["value"]) for t in TARGETS if t.ratio in document["ratios"]
    ]
    return document


def _sides(settings: Settings, workers: int) -> list[Side]:
    cores = usable_cores()[-workers:]
    steppings = settings.steppings if workers == settings.workers[0] else settings.steppings[:1]
    plain = (PLAIN, PLAIN_NONE) if workers == settings.workers[0] else (PLAIN,)
    sides: list[Side] = [PlainSide(name, settings.env, settings.task_id, cores) for name in plain]
    for render in settings.renders:
        for stepping in steppings:
            choice = {"render": render, "stepping": stepping}
            sides.append(PoolSide(settings.env, settings.task_id, cores, choice))
    return sides


def _measure_group(settings: Settings, workers: int, recording: Recording) -> list[dict[str, Any]]:
    """Open all sides with so many workers, and let them replay the episode together; one record for each."""
    sides = _sides(settings, workers)
    with ExitStack() as stack:
        starts = {}
        for side in sides:
            _say(f"{workers} x {side.name}: starting")
            starts[side.name] = side.open(stack, settings.init_state)
        rounds = []
        for number in range(settings.episodes):
            _say(f"{workers} workers: episode {number + 1} of {settings.episodes}")
            rounds.append(_episode(sides, settings, recording.actions_SD, number))
        return [
            {
                "side": side.name,
                "workers": workers,
                "start_s": starts[side.name],
                "memory_mib": side.memory(),
                "episodes": [found[side.name] for found in rounds],
                **_summary([found[side.name] for found in rounds], workers),
            }
            for side in sides
        ]


def _episode(sides: Sequence[Side], settings: Settings, actions_SD: np.ndarray, number: int) -> dict[str, Any]:
    """One episode on every side, chunk by chunk in turns; each turn begins with another side."""
    found: dict[str, dict[str, Any]] = {}
    for side in sides:
        started = time.perf_counter()
        side.reset(settings.init_state)
        found[side.name] = {"reset_s": time.perf_counter() - started, "seconds": 0.0, "cpu_s": 0.0, "steps": 0}
        found[side.name]["success"] = False
    for turn, begin in enumerate(range(0, len(actions_SD), settings.chunk)):
        first = (turn + number) % len(sides)
        for side in [*sides[first:], *sides[:first]]:
            total = found[side.name]
            if total["success"]:
                continue
            part = side.timed_act(actions_SD[begin : begin + settings.chunk])
            for key in ("seconds", "cpu_s", "steps"):
                total[key] += part[key]
            total["success"] = part["success"]
    return found


def _summary(episodes: Sequence[Mapping[str, Any]], workers: int) -> dict[str, Any]:
    """Medians over the episodes."""
    rates = [workers * e["steps"] / e["seconds"] for e in episodes]
    return {
        "steps_per_s": statistics.median(rates),
        "steps_per_s_per_core": statistics.median(rates) / workers,
        "cpu_ms_per_step": statistics.median(1000 * e["cpu_s"] / (workers * e["steps"]) for e in episodes),
        "episodes_per_hour": statistics.median(3600 * workers / (e["reset_s"] + e["seconds"]) for e in episodes),
    }


def _agreement(measurements: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Whether every side came to plain LIBERO's outcome after as many steps."""
    outcomes = {
        (m["side"], m["workers"]): sorted({(e["success"], e["steps"]) for e in m["episodes"]}) for m in measurements
    }
    return {
        f"{side}, {workers} workers": {
            "outcomes": [{"success": success, "steps": steps} for success, steps in found],
            "as_plain": found == outcomes[PLAIN, workers],
        }
        for (side, workers), found in outcomes.items()
    }


def _ratios(measurements: Sequence[Mapping[str, Any]], grown: Mapping[str, Any] | None) -> dict[str, Any]:
    """Ours over plain with as many workers; a side without pictures is compared with plain LIBERO without any."""
    by_key = {(m["side"], m["workers"]): m for m in measurements}
    first = measurements[0]["workers"]
    values: dict[str, float] = {}
    for (side, workers), ours in by_key.items():
        plain = by_key.get((PLAIN_NONE if side.startswith("none") else PLAIN, workers))
        if plain and side not in (PLAIN, PLAIN_NONE):
            name = f"{side}, {workers} workers: "
            values[name + "steps/s / plain"] = ours["steps_per_s"] / plain["steps_per_s"]
            values[name + "plain / ours, CPU seconds"] = plain["cpu_ms_per_step"] / ours["cpu_ms_per_step"]
            values[name + "episodes/h / plain"] = ours["episodes_per_hour"] / plain["episodes_per_hour"]
            values[name + "memory / plain"] = ours["memory_mib"]["pss"] / plain["memory_mib"]["pss"]
            values[name + "start, s"] = ours["start_s"]
        if workers != first and (side, first) in by_key:
            name = f"{side}: steps/s of {workers} workers / {first}"
            values[name] = ours["steps_per_s"] / by_key[side, first]["steps_per_s"]
    if grown:
        values[f"growth over {grown['episodes']} episodes, MiB"] = grown["grown_mib"]
    return {name: {"value": value} for name, value in values.items()}


TARGETS = [
    Target("full, exact, 1 workers: steps/s / plain", True, 6),
    Target("full, fast, 1 workers: steps/s / plain", True, 6),
    Target("none, fast, 1 workers: steps/s / plain", True, 1.8),
    Target("full, exact, 1 workers: memory / plain", False, 0.5),
    Target("full, exact, 1 workers: start, s", False, START_TARGET_S),
    Target("full, exact, 2 workers: start, s", False, START_TARGET_S),
    Target("growth over 500 episodes, MiB", False, GROWTH_TARGET_MIB),
]


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)
