"""One control step of LIBERO without the work that robosuite does three times.

A control step has 25 substeps of 2 ms. In each, robosuite runs MuJoCo's whole forward pass three times: before the
controller, inside the controller, and in ``mj_step``. Between the three only the torques change, never positions or
velocities, so collisions, mass matrix and bias forces come out the same each time and are computed once here.

What does change from pass to pass are the contact forces: the solver begins where it ended before, and every run
brings it a little closer to the solution. ``exact`` therefore keeps all three runs, and with them every bit of plain
LIBERO's states; ``fast`` keeps the last, which is the only one that moves anything. docs/rollouts.md has measurements.
"""

import logging
from typing import Any

import mujoco
import numpy as np

from dtvla.sim.settings import Stepping

_FATAL = {
    "position": mujoco.mjtWarning.mjWARN_BADQPOS,
    "velocity": mujoco.mjtWarning.mjWARN_BADQVEL,
    "acceleration": mujoco.mjtWarning.mjWARN_BADQACC,
    "control": mujoco.mjtWarning.mjWARN_BADCTRL,
}


class Stepper:
    """Steps a LIBERO domain (one Panda arm under operational-space control) in place of ``domain.step``.

    LIBERO's own predicates decide about success; ``domain.check_contact``, which they call, is replaced by an equal one
    that is much faster. What robosuite stores and nothing in LIBERO reads is not updated: its histories of recent
    actions, torques and forces. MuJoCo's warnings are logged, not written to a file in the working directory.

    Args:
        domain: LIBERO's robosuite environment, made with ``hard_reset=False`` (its model is never compiled again).
        mode: "exact" or "fast".
    """

    def __init__(self, domain: Any, mode: Stepping):
        self.domain = domain
        self.mode = mode
        self._model, self._data = domain.sim.model._model, domain.sim.data._data
        self._substeps = int(domain.control_timestep / domain.model_timestep)
        robot = domain.robots[0]
        self._robot = robot
        self._dofs = np.array(robot._ref_joint_vel_indexes)
        self._joints = np.array(robot._ref_joint_pos_indexes)
        self._arm = np.array(robot._ref_joint_actuator_indexes)
        self._torque_range = self._model.actuator_ctrlrange[self._arm].T.copy()
        self._fingers = np.array(robot._ref_joint_gripper_actuator_indexes)
        low, high = self._model.actuator_ctrlrange[self._fingers].T
        self._grip_middle, self._grip_half = 0.5 * (high + low), 0.5 * (high - low)
        mujoco.set_mju_user_warning(logging.getLogger("mujoco").warning)
        domain.check_contact = ContactCheck(self._model, self._data)

    def step(self, action: np.ndarray) -> bool:
        """Run one action (7,) float64 for 1/20 s; whether the task is solved."""
        model, data, domain = self._model, self._data, self.domain
        for substep in range(self._substeps):
            mujoco.mj_step1(model, data)
            if self.mode == "exact":
                self._solve_again()
            self._control(action, new_goal=substep == 0)
            mujoco.mj_step2(model, data)
            domain._update_observables()
        domain.timestep += 1
        domain.cur_time += domain.control_timestep
        domain._post_process()
        return bool(domain._check_success())

    def _solve_again(self) -> None:
        """Solve as robosuite's and the controller's own forward passes do, under the torques of the substep before."""
        for _ in range(2 if self._robot.controller.new_update else 1):
            mujoco.mj_forwardSkip(self._model, self._data, mujoco.mjtStage.mjSTAGE_VEL, 1)

    def _control(self, action: np.ndarray, *, new_goal: bool) -> None:
        """Write the torques of the arm and the positions of the fingers into MuJoCo's controls."""
        controller, controls = self._robot.controller, self._data.ctrl
        # A controller is made at reset, before the init state is set, and acts on that older state for one substep.
        if controller.new_update:
            self._measure(controller)
        if new_goal:
            controller.set_goal(action[:-1])
        low, high = self._torque_range
        controls[self._arm] = np.minimum(np.maximum(controller.run_controller(), low), high)
        grip = self._robot.gripper.format_action(action[-1:])
        controls[self._fingers] = self._grip_middle + self._grip_half * grip

    def _measure(self, controller: Any) -> None:
        """What ``controller.update`` reads from the simulation, without its forward pass."""
        model, data, dofs, site = self._model, self._data, self._dofs, self._robot.eef_site_id
        jacobian_p3V, jacobian_r3V = np.empty((3, model.nv)), np.empty((3, model.nv))
        mujoco.mj_jacSite(model, data, jacobian_p3V, jacobian_r3V, site)
        velocity_V = data.qvel
        controller.ee_pos = data.site_xpos[site].copy()
        controller.ee_ori_mat = data.site_xmat[site].reshape(3, 3).copy()
        controller.ee_pos_vel = jacobian_p3V.dot(velocity_V)
        controller.ee_ori_vel = jacobian_r3V.dot(velocity_V)
        controller.joint_pos = data.qpos[self._joints]
        controller.joint_vel = velocity_V[dofs]
        controller.J_pos = jacobian_p3V[:, dofs]
        controller.J_ori = jacobian_r3V[:, dofs]
        controller.J_full = np.concatenate([controller.J_pos, controller.J_ori])
        mass_VV = np.empty((model.nv, model.nv))
        mujoco.mj_fullM(model, mass_VV, data.qM)
        controller.mass_matrix = mass_VV[dofs, :][:, dofs]
        controller.new_update = False


class ContactCheck:
    """robosuite's ``check_contact`` on arrays: one look-up for all contacts in place of several names per contact."""

    def __init__(self, model: mujoco.MjModel, data: mujoco.MjData):
        self._model, self._data = model, data
        self._masks: dict[tuple[str, ...], np.ndarray] = {}

    def __call__(self, first: Any, second: Any = None) -> bool:
        """Whether a geom of ``first`` touches a geom of ``second`` (any geom, when None).

        Both are a robosuite model, the name of a geom, or a list of names.
        """
        geoms_N2 = self._data.contact.geom
        in_first_N2 = self._mask(first)[geoms_N2]
        if second is None:
            return bool(in_first_N2.any())
        return bool((in_first_N2 & self._mask(second)[geoms_N2][:, ::-1]).any())

    def _mask(self, group: Any) -> np.ndarray:
        names = (group,) if isinstance(group, str) else tuple(getattr(group, "contact_geoms", group))
        if names not in self._masks:
            ids = [mujoco.mj_name2id(self._model, mujoco.mjtObj.mjOBJ_GEOM, name) for name in names]
            self._masks[names] = np.isin(np.arange(self._model.ngeom), ids)
        return self._masks[names]


def divergence(data: mujoco.MjData) -> str | None:
    """What was not finite (or beyond MuJoCo's limit of 1e10) since ``data`` was reset; None when all is well.

    MuJoCo counts a warning and goes on from the model's initial state, so that a look at the state finds nothing.
    """
    counts, places = data.warning.number, data.warning.lastinfo
    for quantity, warning in _FATAL.items():
        if counts[warning]:
            return f"{quantity} {places[warning]} is not finite"
    finite = np.isfinite(data.qpos).all() and np.isfinite(data.qvel).all()
    return None if finite else "a position or velocity is not finite"
