"""Which stage of its task every frame of an episode belongs to, told with the whole episode in view.

Who acts can't know whether a grasp will hold, and turns back when it does not. Looking back, every approach, grasp and
transport has its end, so that stages only go forward from one gripper command to the next. Arrays in, stages out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dtvla.cot.keyframes import Segment, segments

_FUNNEL_M = 0.035  # the hand is over the item when it is this close to the vertical axis in which it will close
_OVER_TARGET_M = 0.03  # and over the target this close to the place where it will let go
_LIFTED_M = 0.04
_CLEAR_M = 0.01  # an item this far up hangs in the fingers, whether they still move or not
_STILL_M = 0.0006  # fingers that move less per frame have stopped
_LEFT_M = 0.08  # the hand has left an item when it is this far from where it let it go
_APART_M, _OPEN_M = 0.02, 0.07  # fingers are apart when opened by this much, or this wide open


@dataclass(frozen=True)
class Track:
    """What a simulator knows about an episode of F frames and G goals, at each frame before its action.

    Attributes:
        gap_F: distance of the finger pads in m.
        grip_F3: point between the finger pads in m, z up.
        item_FG3, target_FG3: where the item and the target of each goal are, in m.
        held_FG: bool, whether both fingers touch the item.
        solved_FG: bool, whether the goal holds after the action of the frame.
    """

    gap_F: np.ndarray
    grip_F3: np.ndarray
    item_FG3: np.ndarray
    target_FG3: np.ndarray
    held_FG: np.ndarray
    solved_FG: np.ndarray

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.gap_F)


@dataclass(frozen=True)
class Stage:
    """What a frame is about.

    Attributes:
        phase: of :data:`dtvla.cot.narrate.PHASES`.
        goal: number of the goal.
        recovering: whether a grasp of this goal's item has just failed, or the item was lost.
    """

    phase: str
    goal: int
    recovering: bool = False


def stages(closing_F: np.ndarray, track: Track, debounce: int = 3) -> list[Stage]:
    """The stage of every frame; between two gripper commands the stages of a goal never go back.

    An approach is *reach* until the hand comes over the item for the last time, then *lower*; after a closing command
    *grasp* until the item is held, *lift* until it is 4 cm up, *carry* until the hand comes over the place where it
    lets go, then *place*; after an opening command *release* until the fingers are apart, then *retreat*. An opening
    command after which the same item is grasped again, or is not at its target in the end, begins an approach that is
    ``recovering``. Where another item is next, its approach begins when the hand has moved away from the one put down.

    Args:
        closing_F: bool, whether the gripper is told to close.
        track: of the same frames.
        debounce: frames for which a command must hold to count, as for key frames.
    """
    stretches = segments(closing_F, debounce)
    goals = [_grasped(track, segment) if segment.closing else None for segment in stretches]
    if goals[0] is not None and not track.held_FG[: stretches[0].stop].any():
        goals[0] = None  # fingers that were closed from the beginning grasp nothing
    found: list[Stage] = []
    for number, segment in enumerate(stretches):
        before, goal, after, then = [None, *goals, None, None][number : number + 4]
        if goal is not None:
            rest = stretches[min(number + 1, len(stretches) - 1)].stop - 1
            found += _transport(track, segment, goal, put_down=bool(track.solved_FG[rest, goal]) and then != goal)
        elif after is not None:
            leave = segment.start
            if before not in (None, after) and track.solved_FG[segment.stop - 1, before]:
                leave = _away(track, segment)
                found += _parting(track, replace(segment, stop=leave), before)
            found += _approach(track, replace(segment, start=leave), after, recovering=before == after)
        elif before is not None and track.solved_FG[-1, before]:
            found += _parting(track, segment, before)
        else:
            idle = _nearest(track, segment.stop - 1) if before is None else before
            failed = before is not None or segment.closing
            found += [Stage("reach", idle, recovering=failed)] * (segment.stop - segment.start)
    return found


def _grasped(track: Track, segment: Segment) -> int:
    """The goal whose item is held longest, else the one whose item is nearest to where the fingers close."""
    held_G = track.held_FG[segment.start : segment.stop].sum(axis=0)
    return int(held_G.argmax()) if held_G.any() else _nearest(track, segment.start)


def _nearest(track: Track, frame: int) -> int:
    """The goal whose item is nearest to the hand, of those that are still open where there is one."""
    away_G = np.linalg.norm(track.item_FG3[frame] - track.grip_F3[frame], axis=-1)
    solved_G = track.solved_FG[frame]
    return int(np.where(solved_G & ~solved_G.all(), np.inf, away_G).argmin())


def _approach(track: Track, segment: Segment, goal: int, recovering: bool) -> list[Stage]:
    """Frames up to a closing command; the hand is measured against the item, which may move, by where it will close."""
    start, stop = segment.start, segment.stop
    offset_F2 = (track.grip_F3[start : stop + 1] - track.item_FG3[start : stop + 1, goal])[:, :2]
    lower = start + _last_entry(np.linalg.norm(offset_F2[:-1] - offset_F2[-1], axis=1) < _FUNNEL_M)
    if recovering:
        lower = max(lower, start + 1, _apart(track, segment))
    return _filled(segment, [("reach", start), ("lower", lower)], goal, recovering)


def _transport(track: Track, segment: Segment, goal: int, put_down: bool) -> list[Stage]:
    """Frames up to an opening command or the end; ``put_down``: the item is at its target then, and stays."""
    start, stop = segment.start, segment.stop
    rise_F = track.item_FG3[start:stop, goal, 2] - track.item_FG3[start, goal, 2]
    still_F = np.abs(np.diff(track.gap_F[start:stop], prepend=np.inf)) < _STILL_M
    held_F = track.held_FG[start:stop, goal]
    held = start + _first(held_F & (still_F | (rise_F > _CLEAR_M)))
    place = stop
    if put_down:
        away_F = np.linalg.norm(track.grip_F3[start:stop, :2] - track.grip_F3[min(stop, len(track) - 1), :2], axis=1)
        place = max(held, start + _last_entry(away_F < _OVER_TARGET_M))
    lifted = start + _first((rise_F > _LIFTED_M) & (np.arange(start, stop) >= held))
    carry = place if lifted == stop else lifted  # what is never lifted is pushed there
    return _filled(segment, [("grasp", start), ("lift", held), ("carry", carry), ("place", max(place, carry))], goal)


def _parting(track: Track, segment: Segment, goal: int) -> list[Stage]:
    return _filled(segment, [("release", segment.start), ("retreat", _apart(track, segment))], goal)


def _away(track: Track, segment: Segment) -> int:
    """First frame at which the hand has left the item that it let go; where it never does, when it has let go."""
    apart = _apart(track, segment)
    gone_F = np.linalg.norm(track.grip_F3[apart : segment.stop] - track.grip_F3[segment.start], axis=1) > _LEFT_M
    return apart + _first(gone_F) if gone_F.any() else apart


def _apart(track: Track, segment: Segment) -> int:
    """First frame of an opening command at which the fingers have let go."""
    wide = min(float(track.gap_F[segment.start]) + _APART_M, _OPEN_M)
    return segment.start + _first(track.gap_F[segment.start : segment.stop] > wide)


def _filled(segment: Segment, begins: Sequence[tuple[str, int]], goal: int, recovering: bool = False) -> list[Stage]:
    """One stage for each frame, given where each begins, in ascending order."""
    numbers_F = (
        np.searchsorted([frame for _, frame in begins], np.arange(segment.start, segment.stop), side="right") - 1
    )
    return [Stage(begins[number][0], goal, recovering) for number in numbers_F]


def _first(true_F: np.ndarray) -> int:
    """Index of the first True; the length where there is none."""
    return int(true_F.argmax()) if true_F.any() else len(true_F)


def _last_entry(inside_F: np.ndarray) -> int:
    """Index from which on all are True; the length where the last one is not."""
    return len(inside_F) - _first(~inside_F[::-1])
