"""The frames of an episode that matter most: where it begins and ends and where the gripper gets another command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from dtvla.errors import UserError

if TYPE_CHECKING:
    from dtvla.cot.episodes import EpisodeView

GRIPPER = 6  # number of an action: negative opens, positive closes
_SMOOTH_FRAMES = 5  # a speed is the mean of so many frames
_DIP = 0.2  # of the episode's greatest speed, that a minimum must lie below both sides


@dataclass(frozen=True)
class KeyFrameSettings:
    """Which frames are key frames, besides the first and the last.

    Attributes:
        debounce: frames that a gripper command must hold to count.
        midpoints_beyond: frames between key frames in equal steps no longer than this; None for none.
        velocity_minima: whether also frames where the hand slows down, about to change its direction.
    """

    debounce: int = 3
    midpoints_beyond: int | None = None
    velocity_minima: bool = False

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing."""
        if self.debounce < 1:
            raise UserError(f"keyframes.debounce: found {self.debounce}; use 1 or more frames")
        if self.midpoints_beyond is not None and self.midpoints_beyond < 2:
            raise UserError(f"keyframes.midpoints_beyond: found {self.midpoints_beyond}; use 2 or more frames, or null")


def held_commands(closing_F: np.ndarray, debounce: int) -> np.ndarray:
    """The gripper command without those that hold for less than ``debounce`` frames; bool (F,).

    A command that does not hold counts as the one before it, at the start as the first one that holds. The last one
    counts in any case: the episode's end cuts it short.
    """
    closing_F = np.asarray(closing_F, dtype=bool)
    bounds = [0, *(np.flatnonzero(closing_F[1:] != closing_F[:-1]) + 1).tolist(), len(closing_F)]
    held = [
        (start, bool(closing_F[start]))
        for start, stop in pairwise(bounds)
        if stop - start >= debounce or stop == len(closing_F)
    ]
    result_F = np.full(len(closing_F), held[0][1])
    for start, closing in held:
        result_F[start:] = closing
    return result_F


@dataclass(frozen=True)
class Segment:
    """Frames ``start`` to ``stop`` with one gripper command."""

    start: int
    stop: int
    closing: bool


def segments(closing_F: np.ndarray, debounce: int) -> list[Segment]:
    """The stretches of one gripper command, see :func:`held_commands`; together they are the episode."""
    held_F = held_commands(closing_F, debounce)
    bounds = [0, *(np.flatnonzero(held_F[1:] != held_F[:-1]) + 1).tolist(), len(held_F)]
    return [Segment(start, stop, bool(held_F[start])) for start, stop in pairwise(bounds)]


def gripper_events(closing_F: np.ndarray, debounce: int) -> list[int]:
    """First frames of every new gripper command that holds for at least ``debounce`` frames or to the end, ascending.

    Args:
        closing_F: bool (F,), whether the gripper is told to close.
        debounce: frames; shorter commands are no events.
    """
    return [segment.start for segment in segments(closing_F, debounce)[1:]]


def key_frames(episode: EpisodeView, settings: KeyFrameSettings) -> dict[int, str]:
    """Key frames and why they are: first, close, open, slow, midpoint or last; ascending.

    Raises:
        UserError: velocity minima are wanted and the states hold no position.
    """
    last = len(episode) - 1
    found = {0: "first"} | ({last: "last"} if last else {})
    for frame in gripper_events(episode.closing_F, settings.debounce):
        found.setdefault(frame, "close" if episode.closing_F[frame] else "open")
    if settings.velocity_minima:
        for frame in _slow_frames(speed_m_s(episode), sorted(found)):
            found.setdefault(frame, "slow")
    if settings.midpoints_beyond is not None:
        for frame in _midpoints(found, settings.midpoints_beyond):
            found.setdefault(frame, "midpoint")
    return dict(sorted(found.items()))


def speed_m_s(episode: EpisodeView) -> np.ndarray:
    """Speed of the hand in m/s, float64 (F,), smoothed over five frames.

    Raises:
        UserError: the states hold no position.
    """
    from scipy.ndimage import uniform_filter1d

    count, width = episode.state_FD.shape
    if width < 3:
        raise UserError(
            f"keyframes.velocity_minima: {episode.root} has states of {width} numbers and no position among them; "
            "set it to false"
        )
    if count < 2:
        return np.zeros(count)
    step_F = np.linalg.norm(np.gradient(episode.state_FD[:, :3].astype(np.float64), axis=0), axis=1)
    return uniform_filter1d(step_F * episode.fps, _SMOOTH_FRAMES, mode="nearest")


def _slow_frames(speed_F: np.ndarray, others: list[int]) -> list[int]:
    """Clear minima of the speed that are no neighbours of other key frames."""
    from scipy.signal import find_peaks

    minima, _ = find_peaks(-speed_F, prominence=_DIP * speed_F.max(initial=0.0) or None)
    return [int(f) for f in minima if min(abs(int(f) - other) for other in others) >= _SMOOTH_FRAMES]


def _midpoints(keys: Mapping[int, str], longest: int) -> list[int]:
    """Frames that cut every gap between key frames into equal steps of at most ``longest`` frames."""
    points = []
    for start, stop in pairwise(sorted(keys)):
        pieces = -(-(stop - start) // longest)
        points += [start + round((stop - start) * piece / pieces) for piece in range(1, pieces)]
    return points
