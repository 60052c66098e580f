"""The GRPO study: one iteration of ours beside the published schedule, on the same machine, weights and episodes.

Both sides begin with the same weights, run the same episodes (task, init state, group, step limit) and learn from every
decision that was executed as often. What they sample differs, as their random numbers do.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dtvla.benchmarks.grpo_agreement import agreement
from dtvla.benchmarks.grpo_ours import OurSchedule, dealt_rewards
from dtvla.benchmarks.grpo_published import PublishedSchedule, real_and_dead
from dtvla.benchmarks.grpo_settings import Settings
from dtvla.benchmarks.models import fresh_policy, twin
from dtvla.benchmarks.target import Target
from dtvla.benchmarks.timing import TOTAL, Timing, synchronize
from dtvla.learning.advantages import group_advantages
from dtvla.policy.model import configure
from dtvla.policy.placement import place, type_name
from dtvla.policy.policy import Policy
from dtvla.rollout.groups import Collection
from dtvla.sim.suites import get_tasks

__all__ = ["Settings", "grpo"]

OURS, PUBLISHED = "ours", "published"
TARGETS = [Target("iteration: published / ours", True, 5.0)]


class Stopwatch:
    """Seconds by phase; a phase that comes again adds up."""

    def __init__(self, device: torch.device) -> None:
        """Start."""
        self.device, self.seconds = device, dict[str, float]()
        synchronize(device)
        self._last = time.perf_counter()

    def __call__(self, phase: str) -> None:
        """End a phase."""
        synchronize(self.device)
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


class Sides:
    """Both schedules on the same weights, which each of them begins with anew."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        """Build model and schedules; no simulator starts yet.

        Raises:
            UserError: a setting does not suit the model or the machine.
        """
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.settings = settings
        device, _ = place(settings.device, "float32")
        policy = _policy(settings, device)
        room = policy.processor.layout.max_thought_tokens + 4
        if settings.thought_length is not None:
            layout = policy.processor.layout
            layout = dataclasses.replace(layout, max_thought_tokens=settings.thought_length - 4)
            policy.processor = dataclasses.replace(policy.processor, layout=layout)
        self.policy, self.device = policy, device
        self.published = PublishedSchedule(Policy(twin(policy.model), policy.processor), settings, room)
        if not settings.checkpoint:
            configure(policy.model, settings.model)
        self.ours = OurSchedule(policy, settings, folder)
        self._weights = [weight.detach().clone() for weight in policy.model.parameters()]

    @torch.no_grad()
    def begin(self) -> Stopwatch:
        """The weights that both sides begin with, and a stopwatch."""
        for weight, before in zip(self.policy.model.parameters(), self._weights, strict=True):
            weight.copy_(before)
        return Stopwatch(self.device)


def grpo(settings: Settings) -> dict[str, Any]:
    """Measure both sides; returns the parts of the file that ``docs/benchmark.md`` describes.

    Raises:
        UserError: a setting does not suit the model or the machine, or there is no such task, or no renderer.
    """
    torch.manual_seed(settings.seed)
    with tempfile.TemporaryDirectory(prefix="dtvla-grpo-") as folder:
        sides = Sides(settings, Path(folder))
        try:
            return _measure(sides)
        finally:
            sides.ours.collector.close()


def _measure(sides: Sides) -> dict[str, Any]:
    settings = sides.settings
    _say("ours: starting")
    once = sides.begin()
    sides.ours.warm_up(once)
    sides.published.warm_up()
    timings: dict[str, dict[str, Timing]] = {PUBLISHED: {}, OURS: {}}
    counts: dict[str, list[dict[str, int]]] = {PUBLISHED: [], OURS: []}
    for number in range(1, settings.iterations + 1):
        watch = sides.begin()
        _say(f"ours: iteration {number} of {settings.iterations}")
        collection = sides.ours.collect(number, watch)
        sides.ours.learn(number, collection, watch)
        _keep(timings[OURS], watch)
        counts[OURS].append(_ours_counted(collection))
        watch = sides.begin()
        _say(f"published: iteration {number} of {settings.iterations}")
        counts[PUBLISHED].append(_published_iteration(sides, number, watch))
        _keep(timings[PUBLISHED], watch)
    _say("do both learn the same?")
    sides.begin()
    same = agreement(sides.ours, sides.published, collection)
    measurements = [
        {"side": side, "iterations": counts[side], "phases": {name: t.to_dict() for name, t in phases.items()}}
        for side, phases in timings.items()
    ]
    ratios = _ratios(timings, counts)
    return {
        "device": str(sides.device),
        "dtype": type_name(torch.float32),
        "threads": torch.get_num_threads(),
        "shapes": _shapes(sides),
        "start_once_s": once.seconds["start"],
        "measurements": measurements,
        "agreement": same,
        "ratios": ratios,
        "targets": [target.verdict(ratios[target.ratio]["value"]) for target in TARGETS],
    }


def _published_iteration(sides: Sides, number: int, watch: Stopwatch) -> dict[str, int]:
    trajectories = sides.published.collect(sides.ours.episodes(number), watch)
    sides.published.learn(trajectories, _advantages(sides.settings), watch)
    real, dead = real_and_dead(trajectories)
    steps = sum(trajectory.steps for trajectory in trajectories)
    return {"episodes": len(trajectories), "steps": steps, "real_decisions": real, "dead_decisions": dead}


def _ours_counted(collection: Collection) -> dict[str, int]:
    counts = {"episodes": collection.episodes, "steps": collection.simulated_steps}
    return {**counts, "real_decisions": collection.decisions, "dead_decisions": 0}


def _keep(timings: dict[str, Timing], watch: Stopwatch) -> None:
    for phase, seconds in {**watch.seconds, TOTAL: sum(watch.seconds.values())}.items():
        timings.setdefault(phase, Timing()).seconds.append(seconds)


def _advantages(settings: Settings) -> np.ndarray:
    return group_advantages(dealt_rewards(settings).reshape(settings.groups, -1)).reshape(-1)


def _ratios(
    timings: Mapping[str, Mapping[str, Timing]], counts: Mapping[str, list[dict[str, int]]]
) -> dict[str, dict[str, float]]:
    """Medians of the published schedule over ours; ``start`` belongs to its collection, ``log-probs`` to its update."""
    published, ours = ({name: timing.median for name, timing in timings[side].items()} for side in (PUBLISHED, OURS))
    real = {side: statistics.median(one["real_decisions"] for one in counts[side]) for side in counts}
    values = {"iteration: published / ours": published[TOTAL] / ours[TOTAL]}
    values["iteration: published / ours, by real decisions"] = (
        values["iteration: published / ours"] * real[OURS] / real[PUBLISHED]
    )
    values["collect: published / ours"] = (published["start"] + published["collect"]) / ours["collect"]
    values["update: published / ours"] = (published["log-probs"] + published["update"]) / ours["update"]
    return {name: {"value": value} for name, value in values.items()}


def _shapes(sides: Sides) -> dict[str, Any]:
    layout, published = sides.ours.layout, sides.published
    block, images = len(layout.act_block()), layout.image_tokens
    return {
        "parameters": sum(weight.numel() for weight in sides.policy.model.parameters()),
        "vocabulary": sides.policy.model.lm_head.out_features,
        "image_tokens": images,
        "longest_thought": published.cap,
        "padded_tokens": published.length,
        "action_block_tokens": block,
        "workers": sides.settings.workers,
    }


def _policy(settings: Settings, device: torch.device) -> Policy:
    """A saved policy, or the ``model`` group's on random statistics."""
    if settings.checkpoint:
        policy = Policy.load(settings.checkpoint, device=device)
        policy.model.train()
        return policy
    tasks = get_tasks(settings.env["suite"], settings.env["task_ids"])
    return fresh_policy({**settings.model, "seed": settings.seed}, device, texts=[task.instruction for task in tasks])


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)
