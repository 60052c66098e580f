"""What a benchmark is told: plain values, checked before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import torch

from dtvla.errors import UserError
from dtvla.policy.placement import DTYPES, place
from dtvla.policy.runtime import Mode

SHORTEST_THOUGHT = 3  # one free token, </think>, <action>


@dataclass(frozen=True)
class Settings:
    """See ``conf/benchmark.yaml``, which has the same names.

    Attributes:
        model: the ``model`` group: shape of a model with fresh weights, or its ``checkpoint``.
        checkpoint: of a saved policy, in place of ``model``.
        device: ``auto`` is the GPU when there is one.
        dtype: ``auto`` is float32 on the CPU, bfloat16 on a GPU.
        engine: how our side runs.
        threads: of the CPU; None is torch's choice.
        seed: of weights, pictures and the errors in drafts.
        thought_tokens: decoded per thought, ``</think><action>`` included.
        action_tokens: numbers N of the autoregressive baselines.
        draft_accuracy: share of a draft's tokens that are right.
        batch_size: rows of the latency study.
        batch_sizes: of the throughput study.
        published_limit: the largest batch that the throughput study runs the published way on.
        repeats: rounds that count.
        warmup: rounds that do not.
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    engine: Mode = "auto"
    threads: int | None = None
    seed: int = 0
    thought_tokens: int = 100
    action_tokens: tuple[int, ...] = (30, 45, 60, 70)
    draft_accuracy: float = 0.97
    batch_size: int = 1
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    published_limit: int = 64
    repeats: int = 7
    warmup: int = 2

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        least = {"thought_tokens": SHORTEST_THOUGHT, "batch_size": 1, "published_limit": 0, "repeats": 1, "warmup": 0}
        least |= {"threads": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None:
                _whole(name, value, smallest)
        for name in ("action_tokens", "batch_sizes"):
            if not getattr(self, name):
                raise UserError(f"{name}: is empty; give at least one number")
            for value in getattr(self, name):
                _whole(name, value, 1)
        if not 0 <= self.draft_accuracy <= 1:
            raise UserError(f"draft_accuracy: {self.draft_accuracy} is no share; give a number from 0 to 1")
        for name, choices in (("dtype", ("auto", *DTYPES)), ("engine", get_args(Mode))):
            if getattr(self, name) not in choices:
                raise UserError(f"{name}: {getattr(self, name)!r} is unknown; use {', '.join(choices)}")

    def place(self) -> tuple[torch.device, torch.dtype]:
        """Device and type of the weights.

        Raises:
            UserError: the device is none, or is not there.
        """
        device, dtype = place(self.device, self.dtype)
        if device.type not in ("cpu", "cuda"):
            raise UserError(f"device: {device} is not measured here; use auto, cpu, cuda or cuda:1")
        return device, dtype


def _whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{name}: {value!r} is not a whole number from {least} on; give one")
