"""Where the gripper must go for the held item to be put down at the goal."""

from dataclasses import dataclass

import numpy as np

from dtvla.sim.scene import Goal, Scene

_ABOVE_M = 0.01  # the item is let go this far above its support
_CLEAR_M = 0.025
_CORRIDOR_M = 0.09


@dataclass(frozen=True)
class Placement:
    """Grip point (3,) for letting go, and the grip height in m that clears everything on the way."""

    position: np.ndarray
    clearance: float


def plan_placement(scene: Scene, goal: Goal) -> Placement:
    """Plan for the item as it hangs in the gripper now."""
    grip, owner = scene.grip_position, scene.owner(goal.target)
    item_N3, owner_N3 = scene.points(goal.item), scene.points(owner)
    below = float(grip[2] - item_N3[:, 2].min())  # the item reaches this far below the grip point
    target = scene.position(goal.target)
    rim = float(owner_N3[:, 2].max())
    is_region = owner != goal.target
    hollow = goal.predicate == "in" or _is_bowl(goal.target)
    if hollow:  # let it fall in, with the finger tips above the rim
        height = max(rim + 0.02, float(owner_N3[:, 2].min()) + 0.02 + below)
    else:
        height = (float(target[2]) if is_region else float(owner_N3[:, 2].min()) + 0.004) + _ABOVE_M + below
    offset = grip[:2] - scene.position(goal.item)[:2]
    position = np.array([*(target[:2] + offset), height])
    blocking = _highest_on_the_way(scene, goal, grip[:2], position[:2], owner if is_region and not hollow else None)
    return Placement(position, max(height + 0.03, blocking + below + _CLEAR_M))


def _is_bowl(name: str) -> bool:
    return "bowl" in name


def _highest_on_the_way(scene: Scene, goal: Goal, start_2: np.ndarray, end_2: np.ndarray, support: str | None) -> float:
    """Highest point of other objects within a corridor around the straight way."""
    way = end_2 - start_2
    length = max(float(np.linalg.norm(way)), 1e-6)
    highest = -np.inf
    for name in scene.names:
        if name == goal.item:
            continue
        points_N3 = scene.points(name)
        relative_N2 = points_N3[:, :2] - start_2
        along_N = np.clip(relative_N2 @ way / length, 0.0, length)
        aside_N = np.linalg.norm(relative_N2 - along_N[:, None] * way / length, axis=1)
        inside_N3 = points_N3[aside_N < _CORRIDOR_M]
        if len(inside_N3):
            highest = max(highest, float(inside_N3[:, 2].max()))
    return highest
