"""From a wanted gripper pose to an action of LIBERO's controller, and the seeded disturbances of a demonstration."""

import numpy as np

POSITION_UNIT_M = 0.05
ROTATION_UNIT_RAD = 0.5
OPEN, CLOSE = -1.0, 1.0
_GAIN = 1.5
_ROTATION_GAIN = 1.2
_SLIP_STEPS = 9  # the fingers need eight steps to open


def servo(
    position: np.ndarray, rotation: np.ndarray, target: np.ndarray, turn_rad: float, gripper: float
) -> np.ndarray:
    """Proportional action (7,) in [-1, 1] towards a target position (3,) with the hand pointing straight down.

    ``turn_rad`` is the rotation about the vertical that is still to be made; ``rotation`` the hand's matrix (3, 3).
    """
    move = _GAIN * (target - position) / POSITION_UNIT_M
    upright = np.cross(rotation[:, 2], [0.0, 0.0, -1.0])  # small-angle rotation that points the hand down
    rotate = _ROTATION_GAIN * (upright + np.array([0.0, 0.0, turn_rad])) / ROTATION_UNIT_RAD
    return np.clip(np.concatenate([move, rotate, [gripper]]), -1.0, 1.0).astype(np.float32)


class Disturbance:
    """What is executed instead of the expert's action, so that demonstrations leave the ideal path (DART, 1703.09327).

    Three seeded parts: slowly varying noise on position and yaw at every step, a few pushes to one side while the hand
    is in free space, and, in ``slip_share`` of the episodes, fingers that open for a moment during the transport.
    The expert's own action stays the label. ``scale`` 0 disturbs nothing.

    Args:
        seed: of everything drawn here.
        scale: standard deviation of the noise in action units.
        slip_share: share of the episodes with a slip.
    """

    def __init__(self, seed: int, scale: float, slip_share: float):
        self._rng = np.random.default_rng(seed)
        self._scale = scale
        self._noise_4: np.ndarray = np.zeros(4)
        rng = self._rng
        self._pushes = list(rng.integers(3, 90, size=rng.integers(0, 3))) if scale > 0 else []
        slips = scale > 0 and rng.random() < slip_share
        self._slip_delay: int | None = int(rng.integers(4, 20)) if slips else None
        self._push_left, self._slip_left, self._step = 0, 0, 0
        self._push_3: np.ndarray = np.zeros(3)

    def __call__(self, action: np.ndarray, *, free: bool, carrying: bool) -> np.ndarray:
        """The action (7,) to execute. ``free``: the hand is away from everything; ``carrying``: it holds the item."""
        if self._scale == 0:
            return action
        fresh_4 = self._rng.normal(0.0, [1.0, 1.0, 0.7, 0.3])
        self._noise_4 = 0.8 * self._noise_4 + 0.6 * fresh_4  # stationary with unit variance
        executed = action.astype(np.float64)
        executed[[0, 1, 2, 5]] += self._scale * (1.0 if free else 0.5) * self._noise_4
        executed[:3] += self._push(free)
        if self._slip(carrying):
            executed[6] = OPEN
        return np.clip(executed, -1.0, 1.0).astype(np.float32)

    def _push(self, free: bool) -> np.ndarray:
        self._step += 1
        if self._pushes and free and self._step >= min(self._pushes):
            self._pushes.remove(min(self._pushes))
            direction = self._rng.normal(size=3) * [1.0, 1.0, 0.5]
            self._push_3 = direction / np.linalg.norm(direction) * self._rng.uniform(0.5, 0.9)
            self._push_left = int(self._rng.integers(4, 8))
        if self._push_left == 0 or not free:
            self._push_left = 0
            return np.zeros(3)
        self._push_left -= 1
        return self._push_3

    def _slip(self, carrying: bool) -> bool:
        if carrying and self._slip_delay is not None:
            self._slip_delay -= 1
            if self._slip_delay <= 0:
                self._slip_delay, self._slip_left = None, _SLIP_STEPS
        self._slip_left = max(0, self._slip_left - 1)
        return self._slip_left > 0
