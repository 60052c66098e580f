"""The privileged view of a LIBERO scene that the scripted expert and its narrator share.

All positions are in metres in the world frame: x away from the robot, y to the robot's left, z up.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mujoco
import numpy as np

from dtvla.sim.env import LiberoEnv

OPEN_GAP_M = 0.078
"""Distance of the finger pads when the gripper is open (nominally 0.08)."""


@dataclass(frozen=True)
class Goal:
    """``predicate`` (in, on) that shall hold between a movable ``item`` and a ``target`` (object or region)."""

    predicate: str
    item: str
    target: str


def goals(domain: Any) -> list[Goal]:
    """Goals of a task with an item and a target; others (open, turnon) have no target and are left out."""
    return [Goal(*goal) for goal in domain.parsed_problem["goal_state"] if len(goal) == 3]


class Scene:
    """Poses, shapes and contacts of the running episode of ``env``."""

    def __init__(self, env: LiberoEnv):
        self.env = env
        self.domain = env.domain
        self._robot = self.domain.robots[0]
        self._shapes: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    @cached_property
    def model(self) -> mujoco.MjModel:
        """MuJoCo's model."""
        return self.domain.sim.model._model

    @property
    def data(self) -> mujoco.MjData:
        """MuJoCo's state."""
        return self.domain.sim.data._data

    def reachable(self, position: np.ndarray, extension: float = 0.66) -> np.ndarray:
        """Pull a grip position (3,) towards the robot until the downward-pointing arm needs no more ``extension``.

        Extension is the distance in m from the shoulder to the wrist, 0.70 when the elbow is straight. There the elbow
        meets its joint limit and the operational-space controller gets stuck.
        """
        shoulder = self.base_position + [0.0, 0.0, 0.333]
        outward_2 = position[:2] - shoulder[:2]
        radius = float(np.linalg.norm(outward_2))
        rise = position[2] + 0.21 - shoulder[2]  # the wrist is 0.21 m above the grip point and 0.088 m further in
        allowed = 0.088 + float(np.sqrt(max(extension**2 - rise**2, 0.01)))
        if radius <= allowed:
            return position
        return np.array([*(shoulder[:2] + outward_2 * allowed / radius), position[2]])

    @cached_property
    def base_position(self) -> np.ndarray:
        """Position (3,) of the robot's base."""
        return self.data.xpos[mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_BODY, "robot0_base")].copy()

    # -- gripper -----------------------------------------------------------------------------------------------------

    @property
    def grip_position(self) -> np.ndarray:
        """Point between the finger pads (3,)."""
        return self.data.site_xpos[self._robot.eef_site_id].copy()

    @property
    def grip_rotation(self) -> np.ndarray:
        """Rotation matrix (3, 3) of the gripper; its third column points out of the hand."""
        return self.data.site_xmat[self._robot.eef_site_id].reshape(3, 3).copy()

    @property
    def gap(self) -> float:
        """Distance between the finger pads in m: 0.08 open, 0 closed."""
        left, right = self.data.qpos[self._robot._ref_gripper_joint_pos_indexes]
        return float(left - right)

    @property
    def grip_yaw(self) -> float:
        """Direction in rad, in the horizontal plane, along which the fingers close."""
        axis = self._finger_position("left") - self._finger_position("right")
        return float(np.arctan2(axis[1], axis[0]))

    def _finger_position(self, side: str) -> np.ndarray:
        geoms = self._robot.gripper.important_geoms[f"{side}_fingerpad"]
        return self.data.geom_xpos[self._geom_id(geoms[0])]

    def _geom_id(self, name: str) -> int:
        return mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_GEOM, name)

    @cached_property
    def _finger_geoms(self) -> list[set[int]]:
        geoms = self._robot.gripper.important_geoms
        return [{self._geom_id(g) for g in geoms[f"{side}_finger"]} for side in ("left", "right")]

    def holds(self, name: str) -> bool:
        """Whether both fingers touch the object."""
        geoms = self._geoms(name)
        touched = [False, False]
        for first, second in self.data.contact.geom[: self.data.ncon]:
            for side, fingers in enumerate(self._finger_geoms):
                touched[side] |= (first in fingers and second in geoms) or (second in fingers and first in geoms)
        return all(touched)

    # -- objects -----------------------------------------------------------------------------------------------------

    @cached_property
    def names(self) -> list[str]:
        """Names of all movable objects and fixtures with a body."""
        return [*self.domain.objects_dict, *(n for n in self.domain.fixtures_dict if n in self.domain.obj_body_id)]

    def position(self, name: str) -> np.ndarray:
        """Position (3,) of an object's body, or of a region's site."""
        if name in self.domain.obj_body_id:
            return self.data.xpos[self.domain.obj_body_id[name]].copy()
        site = mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_SITE, name)
        return self.data.site_xpos[site].copy()

    def rotation(self, name: str) -> np.ndarray:
        """Rotation matrix (3, 3) of an object's body."""
        return self.data.xmat[self.domain.obj_body_id[name]].reshape(3, 3).copy()

    def owner(self, target: str) -> str:
        """The object or fixture that a region belongs to; an object owns itself."""
        if target in self.domain.obj_body_id:
            return target
        return str(self.domain.object_sites_dict[target].parent_name)

    def points(self, name: str) -> np.ndarray:
        """Vertices (n, 3) of what is visible of an object, where it is now."""
        if name not in self._shapes:
            self._shapes[name] = self._shape(name)
        local_N3, geom_N = self._shapes[name]
        rotation_N33 = self.data.geom_xmat[geom_N].reshape(-1, 3, 3)
        return np.einsum("nij,nj->ni", rotation_N33, local_N3) + self.data.geom_xpos[geom_N]

    def _shape(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        local, geoms = [], []
        for geom in sorted(self._geoms(name)):
            mesh = self.model.geom_dataid[geom]
            if self.model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_MESH and self.model.geom_contype[geom] == 0:
                start, count = self.model.mesh_vertadr[mesh], self.model.mesh_vertnum[mesh]
                stride = max(1, count // 1500)
                local.append(self.model.mesh_vert[start : start + count : stride].astype(np.float64))
                geoms.append(np.full(len(local[-1]), geom))
        return np.concatenate(local), np.concatenate(geoms)

    def _geoms(self, name: str) -> set[int]:
        root = self.domain.obj_body_id[name]
        bodies = {root}
        for body in range(root + 1, self.model.nbody):
            if self.model.body_parentid[body] in bodies:
                bodies.add(body)
        return {geom for geom in range(self.model.ngeom) if self.model.geom_bodyid[geom] in bodies}
