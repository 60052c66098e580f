"""What the GRPO study is told: plain values, checked before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dtvla.benchmarks.processes import usable_cores
from dtvla.errors import UserError

SHORTEST_THOUGHT = 5  # both tags, one free token, and the pair that closes it


@dataclass(frozen=True)
class Settings:
    """See ``conf/benchmark.yaml``, which has the same names.

    Attributes:
        model: the ``model`` group: shape of a model with fresh weights; its ``compile`` is our side's.
        checkpoint: of a saved policy, in place of ``model``.
        env: the config group ``env``; its ``render`` and ``stepping`` are our side's, plain LIBERO has neither.
        device: ``auto`` is the GPU when there is one. Weights and arithmetic are float32.
        threads: of the CPU; None is torch's choice.
        seed: of weights and of everything that is drawn.
        init_state: that episodes begin from.
        groups: of an iteration, each of a task of its own as far as there are tasks.
        group_size: episodes of a group.
        horizon: steps for which the published schedule decides, whatever has ended by then.
        episode_steps: an episode ends after so many steps at the latest, on both sides; None is the horizon.
        thought_length: a thought is closed at so many ids, closing pair included; None is the model's own cap.
            The published side pads to the model's own cap in any case.
        environments: that the published schedule runs in lock-step; each takes 1.6 GB.
        pool_workers: simulators of our side; None is one for each usable core.
        ppo_epochs: how often an iteration's decisions are learned from.
        mini_batches: optimiser steps of each time.
        micro_batch: decisions of a forward pass of ours; None is 8, which the published way has.
        iterations: of each side that count.
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    env: Mapping[str, Any] = field(default_factory=dict)
    device: str = "auto"
    threads: int | None = None
    seed: int = 0
    init_state: int = 0
    groups: int = 2
    group_size: int = 4
    horizon: int = 480
    episode_steps: int | None = 310
    thought_length: int | None = 40
    environments: int = 32
    pool_workers: int | None = None
    ppo_epochs: int = 2
    mini_batches: int = 4
    micro_batch: int | None = None
    iterations: int = 1

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        least = {"threads": 1, "groups": 1, "group_size": 2, "horizon": 1, "episode_steps": 1, "environments": 1}
        least |= {"init_state": 0, "pool_workers": 1, "ppo_epochs": 1, "mini_batches": 1, "micro_batch": 1}
        optional = ("threads", "episode_steps", "thought_length", "pool_workers", "micro_batch")
        for name, smallest in (least | {"iterations": 1, "thought_length": SHORTEST_THOUGHT}).items():
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
                raise UserError(f"{name}: {value!r} is not a whole number from {smallest} on; give one")
        if self.mini_batches > self.groups * self.group_size:
            raise UserError(
                f"mini_batches: {self.mini_batches} of {self.groups * self.group_size} episodes; give at most as many"
            )
        if self.episode_steps is not None and self.episode_steps > self.horizon:
            raise UserError(
                f"episode_steps: {self.episode_steps} is beyond horizon {self.horizon}; lower it, or give null"
            )
        if self.env.get("render") == "none":
            raise UserError("env.render: none, but a policy has to see; use full or draft")

    @property
    def steps(self) -> int:
        """The step limit of an episode."""
        return self.horizon if self.episode_steps is None else self.episode_steps

    @property
    def workers(self) -> int:
        """Simulators of our side."""
        return len(usable_cores()) if self.pool_workers is None else self.pool_workers
