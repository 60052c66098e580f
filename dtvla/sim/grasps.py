"""Where to grip an object from above, from its shape and pose alone."""

from dataclasses import dataclass, replace

import numpy as np

from dtvla.sim.scene import OPEN_GAP_M, Scene

_YAW_STEP = np.deg2rad(7.5)
_FINGER_DEPTH_M = 0.030  # how far an object may reach up between the fingers
_TIP_M = 0.012  # the finger tips end this far below the grip point
_MARGIN_M = 0.004
_RIM_DEPTH_M = 0.02
_LONG_M = 0.1


@dataclass(frozen=True)
class Grasp:
    """Grip point (3,) in m and the yaw in rad along which the fingers close; ``width`` is what lies between them."""

    position: np.ndarray
    yaw: float
    width: float
    cost: float

    @property
    def play(self) -> float:
        """Free space in m on either side of the object between the open fingers."""
        return (OPEN_GAP_M - self.width) / 2


def turn(yaw: float, reference: float) -> float:
    """The rotation in [-pi/2, pi/2) that takes the fingers from ``reference`` to ``yaw`` (fingers are symmetric)."""
    return float((yaw - reference + np.pi / 2) % np.pi - np.pi / 2)


def plan_grasps(scene: Scene, name: str, home_yaw: float) -> list[Grasp]:
    """Grasps of an object, best first: few turns from ``home_yaw``, narrow, and clear of the neighbours.

    Objects that fit between the fingers are gripped across their narrowest width, wider ones (bowls) at the rim.
    """
    points_N3 = scene.points(name)
    others = [scene.points(other) for other in scene.names if other != name]
    near_M3 = np.concatenate(others) if others else np.zeros((0, 3))
    centre = points_N3.mean(axis=0)
    near_M3 = near_M3[np.linalg.norm(near_M3[:, :2] - centre[:2], axis=1) < 0.25]
    low, high = points_N3[:, 2].min(), points_N3[:, 2].max()
    height = max(high - _FINGER_DEPTH_M, low + _TIP_M)
    yaws = home_yaw + np.arange(-np.pi / 2, np.pi / 2, _YAW_STEP)
    grasps = [grasp for yaw in yaws for grasp in _across(points_N3, yaw, height)]
    if min(grasp.width for grasp in grasps) > OPEN_GAP_M - _MARGIN_M:
        grasps = [_at_rim(points_N3, angle) for angle in np.concatenate([yaws, yaws + np.pi])]
    else:
        grasps = [grasp for grasp in grasps if grasp.width <= OPEN_GAP_M - _MARGIN_M]

    def cost(grasp: Grasp) -> float:
        too_far = float(np.linalg.norm(scene.reachable(grasp.position) - grasp.position))
        turning = 0.02 * abs(turn(grasp.yaw, home_yaw))
        return grasp.cost + grasp.width + turning + 2.0 * too_far + _obstruction(grasp, near_M3)

    return sorted((replace(grasp, cost=cost(grasp)) for grasp in grasps), key=lambda grasp: grasp.cost)


def _across(points_N3: np.ndarray, yaw: float, height: float) -> list[Grasp]:
    """Grasps with this yaw: in the middle of the object, and to both sides of it when it is long."""
    slice_N2 = points_N3[np.abs(points_N3[:, 2] - height) < 0.02][:, :2]
    along, side = _axes(yaw)
    reach_N, cross_N = slice_N2 @ along, slice_N2 @ side
    middle = (cross_N.min() + cross_N.max()) / 2
    grasps = []
    for shift in (0.0, 0.035, -0.035) if np.ptp(cross_N) > _LONG_M else (0.0,):
        here_N = reach_N[np.abs(cross_N - middle - shift) < (0.02 if np.ptp(cross_N) > _LONG_M else np.inf)]
        if len(here_N):
            centre = along * (here_N.min() + here_N.max()) / 2 + side * (middle + shift)
            grasps.append(Grasp(np.array([*centre, height]), float(yaw), float(np.ptp(here_N)), abs(shift) * 0.2))
    return grasps


def _at_rim(points_N3: np.ndarray, angle: float) -> Grasp:
    top = points_N3[:, 2].max()
    rim_N2 = points_N3[points_N3[:, 2] > top - 0.01][:, :2]
    centre = (rim_N2.min(axis=0) + rim_N2.max(axis=0)) / 2
    along, _ = _axes(angle)
    radius = float(((rim_N2 - centre) @ along).max())
    return Grasp(np.array([*(centre + along * (radius - 0.005)), top - _RIM_DEPTH_M]), float(angle), 0.01, 0.0)


def _obstruction(grasp: Grasp, near_M3: np.ndarray) -> float:
    """Cost of neighbours in the boxes through which the open fingers come down (each about 2 x 2 cm, with margins)."""
    along, side = _axes(grasp.yaw)
    offset_M2 = near_M3[:, :2] - grasp.position[:2]
    reach_M, cross_M = np.abs(offset_M2 @ along), np.abs(offset_M2 @ side)
    finger_M = (reach_M > 0.02) & (reach_M < 0.075) & (cross_M < 0.025) & (near_M3[:, 2] > grasp.position[2] - _TIP_M)
    hand_M = (reach_M < 0.12) & (cross_M < 0.045) & (near_M3[:, 2] > grasp.position[2] + 0.045)
    return 0.1 * float(finger_M.any()) + 0.2 * float(hand_M.any())


def _axes(yaw: float) -> tuple[np.ndarray, np.ndarray]:
    return np.array([np.cos(yaw), np.sin(yaw)]), np.array([-np.sin(yaw), np.cos(yaw)])
