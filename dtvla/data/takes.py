"""One performed episode, frame by frame, before it is encoded; and the clock that says what it took."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dtvla.data.staging import CAMERA_KEYS


@dataclass
class Take:
    """What was recorded of one episode.

    Attributes:
        states, actions, thoughts: one entry per frame: float32 (8,), float32 (7,), text without tags ("" for none).
        pictures: per camera one uint8 (H, W, 3) per frame.
        facts: where the episode comes from, as fields of :class:`dtvla.data.staging.EpisodeSource`.
        dropped: why the episode does not belong into the dataset; None when it does.
    """

    states: list[np.ndarray] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    pictures: dict[str, list[np.ndarray]] = field(default_factory=lambda: {camera: [] for camera in CAMERA_KEYS})
    facts: dict[str, Any] = field(default_factory=dict)
    dropped: str | None = None

    def add(self, observation: dict[str, Any], action: np.ndarray, thought: str) -> None:
        """Append the observation of a frame, the action to imitate and the thought."""
        self.states.append(np.asarray(observation["state"], dtype=np.float32))
        self.actions.append(np.asarray(action, dtype=np.float32))
        self.thoughts.append(thought)
        for camera, frames in self.pictures.items():
            frames.append(observation[camera])


class Clock:
    """Adds up wall time in seconds by phase."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the time inside the block to ``phase``."""
        started = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - started
