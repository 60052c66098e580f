"""A scripted pick-and-place expert on LIBERO's privileged state.

It is a feedback law, not a recorded path: in every phase the action depends on where gripper and objects are now, so
a policy can imitate it from pictures, and whatever disturbs the motion is corrected from where it led.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from dtvla.cot.narrate import narrate
from dtvla.errors import UserError
from dtvla.sim.env import LiberoEnv
from dtvla.sim.grasps import Grasp, plan_grasps, turn
from dtvla.sim.motion import CLOSE, OPEN, Disturbance, servo
from dtvla.sim.placing import Placement, plan_placement
from dtvla.sim.scene import Scene, goals

Phase = Literal["reach", "lower", "grasp", "lift", "carry", "place", "release", "retreat"]

_TASKS: dict[str, list[int]] = {
    "libero_object": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
    "libero_spatial": [0, 1, 2, 3, 5, 6, 7, 8, 9],
    "libero_goal": [1, 2, 4, 6, 8, 9],
}

_HOME_YAW = -np.pi / 2
_NOISE = 0.2
_SLIP_SHARE = 0.12
_HOVER_M = 0.07  # height above the grasp at which the hand arrives
_FUNNEL_EDGE_M = 0.035  # distance from the vertical axis from which on the hand stays all the way up
_TOLERANCE_M = (0.007, 0.012)  # least and greatest distance from the axis at which a grasp is begun
_PLACE_TOLERANCE_M = 0.008
_LIFTED_M = 0.04
_DROPPED_M = 0.03
_EXTENSION_M = 0.685  # of the arm, see Scene.reachable
_STUCK_STEPS = 30  # a descent or a closing that takes longer has met an obstacle
_STILL_M = 0.0006  # fingers that move less per step have stopped


@dataclass(frozen=True)
class Act:
    """One decision: the clean ``action`` (7,) float32 (the label), what to execute instead, and why."""

    action: np.ndarray
    executed: np.ndarray
    thought: str
    phase: Phase


def expert_tasks() -> dict[str, list[int]]:
    """Task ids per suite that the expert solves (rates: docs/expert.md)."""
    return {suite: list(ids) for suite, ids in _TASKS.items()}


def require_expert_task(suite: str, task_id: int, instruction: str = "") -> None:
    """Refuse a task that the expert can't do.

    Raises:
        UserError: names the task and what can be done instead.
    """
    if task_id not in _TASKS.get(suite, []):
        known = "; ".join(f"{name} {', '.join(map(str, ids))}" for name, ids in _TASKS.items())
        what = f" ({instruction})" if instruction else ""
        raise UserError(f"task_ids: the scripted expert can't do {suite} task {task_id}{what}; it can do {known}")


class Expert:
    """Drives one environment. Call :meth:`reset` after every ``env.reset``, then :meth:`act` before every step.

    Args:
        env: the environment, of any render quality.
        seed: of the disturbances; :meth:`reset` begins again with the same ones.
        noise: standard deviation of the disturbance in action units; 0 gives the undisturbed path.

    Raises:
        UserError: a task that the expert can't do.
    """

    def __init__(self, env: LiberoEnv, *, seed: int, noise: float = _NOISE):
        task = env.task
        require_expert_task(task.suite, task.task_id, task.instruction)
        self.env = env
        self.seed = seed
        self.noise = noise
        self.goal = goals(env.domain)[0]
        self.reset()

    def reset(self) -> None:
        """Begin an episode at the environment's current state."""
        self.scene = Scene(self.env)
        self.phase: Phase = "reach"
        self._disturb = Disturbance(self.seed, self.noise, _SLIP_SHARE)
        self.attempts = 0  # grasps that failed or slipped in this episode
        self._phase_steps = 0
        self._last_gap = self.scene.gap
        self._plan_grasp()

    def act(self) -> Act:
        """Decide for the current state."""
        phase = self._next_phase()
        self._phase_steps = self._phase_steps + 1 if phase == self.phase else 0
        self.phase = phase
        target, yaw, gripper = self._aim()
        scene = self.scene
        target = scene.reachable(target, _EXTENSION_M)
        action = servo(scene.grip_position, scene.grip_rotation, target, turn(yaw, scene.grip_yaw), gripper)
        roomy = self._tolerance >= _TOLERANCE_M[1]  # a push on the way down would topple what fills the fingers
        free = self.phase in ("reach", "carry") or (self.phase == "lower" and roomy)
        executed = self._disturb(action, free=free, carrying=self.phase in ("lift", "carry"))
        self._last_gap = scene.gap
        thought = narrate(self.phase, scene, self.goal, recovering=self.attempts > 0)
        return Act(action, executed, thought, self.phase)

    # -- phases ------------------------------------------------------------------------------------------------------

    def _next_phase(self) -> Phase:
        scene, item = self.scene, self.goal.item
        if self._phase_steps > _STUCK_STEPS and self.phase in ("lower", "grasp"):
            return self._retry()
        moving = abs(scene.gap - self._last_gap) > _STILL_M
        if self.phase in ("reach", "lower"):
            if np.linalg.norm(scene.position(item) - self._seen) > 0.01:
                self._plan_grasp()
            return self._approach_phase()
        if self.phase == "grasp":
            if moving or scene.gap > self._grasp.width + 0.012:
                return "grasp"
            self._held_at = scene.position(item) - scene.grip_position
            return "lift" if scene.holds(item) else self._retry()
        if self.phase in ("lift", "carry", "place"):
            return self._retry() if self._dropped() else self._transport_phase()
        if self.phase == "release":
            return "retreat" if scene.gap > min(self._held_gap + 0.02, 0.07) else "release"
        if scene.grip_position[2] - self._placement.position[2] > 0.08:  # let go, and still no success
            return self._retry()
        return "retreat"

    def _approach_phase(self) -> Phase:
        offset = self._grasp.position - self.scene.grip_position
        aligned = abs(turn(self._grasp.yaw, self.scene.grip_yaw)) < 0.1
        distance = float(np.linalg.norm(offset[:2]))
        if aligned and distance < self._tolerance and abs(offset[2]) < 0.008:
            return "grasp"
        return "lower" if aligned and distance < _FUNNEL_EDGE_M else "reach"

    def _transport_phase(self) -> Phase:
        scene = self.scene
        if self.phase == "lift":
            self._held_gap = scene.gap
            self._placement = plan_placement(scene, self.goal)
            lifted = scene.points(self.goal.item)[:, 2].min() - self._floor
            return "carry" if lifted > _LIFTED_M else "lift"
        offset = self._placement.position - scene.grip_position
        distance = float(np.linalg.norm(offset[:2]))
        if self.phase == "carry":
            return "place" if distance < 0.02 else "carry"
        return "release" if distance < 0.02 and abs(offset[2]) < 0.012 else "place"

    def _dropped(self) -> bool:
        """Whether the item has left the place between the fingers where it was gripped."""
        moved = self.scene.position(self.goal.item) - self.scene.grip_position - self._held_at
        return float(np.linalg.norm(moved)) > _DROPPED_M

    def _retry(self) -> Phase:
        self.attempts += 1
        self._plan_grasp()
        return "reach"

    def _plan_grasp(self) -> None:
        """Choose a grasp for where the item is now; every further attempt takes a clearly different one."""
        scene, item = self.scene, self.goal.item
        self._seen = scene.position(item)
        self._floor = float(scene.points(item)[:, 2].min())
        choices: list[Grasp] = []
        for grasp in plan_grasps(scene, item, _HOME_YAW):
            if all(
                abs(turn(grasp.yaw, other.yaw)) > 0.35 or np.linalg.norm(grasp.position - other.position) > 0.03
                for other in choices
            ):
                choices.append(grasp)
        self._grasp = choices[self.attempts % min(len(choices), 4)]
        # Something narrow may be gripped off centre; asking for no more makes an easier example to imitate.
        self._tolerance = float(np.clip(0.65 * self._grasp.play, *_TOLERANCE_M))

    # -- where to go -------------------------------------------------------------------------------------------------

    def _aim(self) -> tuple[np.ndarray, float, float]:
        """Target position (3,), yaw and gripper command of the phase."""
        here, grasp = self.scene.grip_position, self._grasp
        if self.phase in ("reach", "lower"):
            misaligned = 0.05 * abs(turn(grasp.yaw, self.scene.grip_yaw))
            return self._funnel(grasp.position, _HOVER_M, misaligned, self._tolerance), grasp.yaw, OPEN
        if self.phase == "grasp":
            return grasp.position, grasp.yaw, CLOSE
        if self.phase == "lift":
            return np.array([*here[:2], here[2] + 0.1]), grasp.yaw, CLOSE
        place: Placement = self._placement
        if self.phase in ("carry", "place"):
            return self._over_obstacles(place), grasp.yaw, CLOSE
        if self.phase == "release":
            return place.position, grasp.yaw, OPEN
        return np.array([*here[:2], here[2] + 0.1]), grasp.yaw, OPEN

    def _funnel(self, goal: np.ndarray, hover: float, misaligned: float, inner: float) -> np.ndarray:
        """Go down only as far as the hand is near the vertical axis through the goal and turned the right way.

        Within ``inner`` of the axis the hand is all the way down, from the funnel's edge on it stays all the way up.
        """
        distance = float(np.linalg.norm(goal[:2] - self.scene.grip_position[:2])) + misaligned
        outer = _FUNNEL_EDGE_M
        return goal + np.array([0.0, 0.0, hover * np.clip((distance - inner) / (outer - inner), 0.0, 1.0)])

    def _over_obstacles(self, place: Placement) -> np.ndarray:
        """Travel at the placement's clearance height: rise before moving sideways, come down over the target."""
        here = self.scene.grip_position
        target = self._funnel(place.position, place.clearance - place.position[2], 0.0, _PLACE_TOLERANCE_M)
        missing = place.clearance - here[2]
        near = float(np.linalg.norm(target[:2] - here[:2])) < _FUNNEL_EDGE_M
        share = 1.0 if near else float(np.clip(1.0 - (missing - 0.03) / 0.05, 0.0, 1.0))
        target[:2] = here[:2] + share * (target[:2] - here[:2])
        return target
