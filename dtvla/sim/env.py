"""A LIBERO task as a gymnasium environment.

A state is a pure function of (suite, task, init state, seed, actions): it is the same, bit for bit, on a fresh and on
a re-used environment and for every render quality. Pictures are rendered only for observations that are handed out.
"""

import string
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium
import numpy as np

from dtvla.errors import UserError
from dtvla.sim.backend import import_libero
from dtvla.sim.memory import forget_compilation
from dtvla.sim.rendering import CameraRenderer, Snapshot, take_snapshot
from dtvla.sim.settings import ACTION_DIM, CAMERAS, Quality, Stepping, check_settings, check_step_limit
from dtvla.sim.stepping import Stepper, divergence
from dtvla.sim.suites import Protocol, get_task, load_init_states, step_limit

STATE_DIM = 8
CONTROL_HZ = 20
Observation = dict[str, Any]

_REST = np.array([0.0] * 6 + [-1.0])


class SimulationDiverged(RuntimeError):
    """Positions, velocities or accelerations are not finite any more; the environment needs a reset."""


class LiberoEnv(gymnasium.Env[Observation, np.ndarray]):
    """One task of LIBERO under operational-space control at 20 Hz.

    Observation: ``agentview`` and ``wrist`` uint8 (H, W, 3) the right way up (absent with ``render="none"``), ``state``
    float32 (8,) = end effector position in m, its axis-angle rotation in rad, gripper joint positions in m, and
    ``instruction``. Action: float (7,) in [-1, 1] = position delta x 0.05 m, axis-angle delta x 0.5 rad, gripper
    (-1 opens, +1 closes). Reward 1 on success, which terminates; the step limit truncates.

    Args:
        suite: name of a LIBERO suite.
        task_id: number of the task in the suite.
        image_size: height and width of the pictures in pixels.
        render: "full" is pixel-equal to LIBERO, "draft" is several times faster on a CPU, "none" renders nothing.
        settle_steps: steps with an open, resting gripper before the first observation; not counted.
        max_steps: step limit; None takes the limit of the protocol.
        protocol: whose step limits, see :func:`dtvla.sim.suites.step_limit`.
        ends_at_success: whether success ends an episode; a recording is replayed to its last action.
        stepping: "exact" has every bit of plain LIBERO's states, "fast" solves contact forces once per substep instead
            of three times; see :mod:`dtvla.sim.stepping`.

    Raises:
        UserError: unknown suite, task, quality, size, protocol, stepping or init state; no renderer on this machine.
        SimulationDiverged: from ``reset`` and the step functions: a state is not finite.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": CONTROL_HZ}

    def __init__(
        self,
        suite: str,
        task_id: int,
        *,
        image_size: int = 256,
        render: Quality = "full",
        settle_steps: int = 10,
        max_steps: int | None = None,
        protocol: Protocol = "published",
        stepping: Stepping = "exact",
        ends_at_success: bool = True,
    ):
        check_settings(
            render=render, stepping=stepping, image_size=image_size, settle_steps=settle_steps, max_steps=max_steps
        )
        self.task = get_task(suite, task_id)
        self._protocol: Protocol = protocol
        self.limit_steps(max_steps)
        self.image_size = image_size
        self.quality = render
        self.settle_steps = settle_steps
        self.stepping = stepping
        self.ends_at_success = ends_at_success
        self.render_mode = None if render == "none" else "rgb_array"
        self.init_states_NS = load_init_states(self.task)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32)
        self.observation_space = self._make_observation_space()
        self._renderer: CameraRenderer | None = None
        self._moment: tuple[np.ndarray, Snapshot] | None = None  # proprioception and poses of the last observation
        self._libero = self._build()
        self._stepper: Stepper | None = Stepper(self.domain, stepping)
        self._fixture_poses = self._fixtures()
        self._step: int | None = None  # None: the episode is over, or not begun

    # -- gymnasium ---------------------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | None = 0, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode from ``options["init_state"]`` (default 0) and let the scene settle.

        ``options["state"]``, float64 (1 + nq + nv,) as :meth:`physics` gives it, stands in for an init state. ``seed``
        places what neither holds (the poses of fixtures); the benchmark uses 0.
        """
        first_state = self._first_state(options or {})
        super().reset(seed=seed)
        with _global_seed(0 if seed is None else seed):
            self._soft_reset()
            self._libero.set_init_state(first_state)
            for _ in range(self.settle_steps):
                self._simulate(_REST)
        self._step = 0
        return self.observe(), self._info(bool(self.domain._check_success()))

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Run one action (7,) for 1/20 s."""
        success = self._advance(action)
        return self.observe(), *self._outcome(success)

    def step_chunk(
        self, actions_SD: np.ndarray, *, record: bool = False
    ) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Run a chunk of actions (S, 7), stop at success or at the step limit, and render the last observation only.

        ``info["steps"]`` is the number of actions that ran. With ``record``, every step is rendered and
        ``info["frames"]`` lists uint8 (H, 2W, 3) pictures, both cameras side by side.
        """
        actions_SD = np.asarray(actions_SD)
        if actions_SD.ndim != 2 or len(actions_SD) == 0:
            raise ValueError(f"actions: shape {actions_SD.shape}, expected (S, {ACTION_DIM}) with S >= 1")
        frames = []
        begun = self.step_count
        for action in actions_SD:
            success = self._advance(action)
            over = (success and self.ends_at_success) or self.step_count >= self.max_steps
            if record:
                frames.append(self.render())
            if over:
                break
        reward, terminated, truncated, info = self._outcome(success)
        info["steps"] = info["step"] - begun
        if record:
            info["frames"] = frames
        return self.observe(), reward, terminated, truncated, info

    def limit_steps(self, max_steps: int | None) -> None:
        """Set the step limit of the episodes to come; None takes the protocol's. Nothing else depends on it."""
        check_step_limit(max_steps)
        self.max_steps = step_limit(self.task.suite, self._protocol) if max_steps is None else max_steps

    def render(self) -> np.ndarray:
        """Both cameras side by side, uint8 (H, 2W, 3)."""
        pictures = self._pictures()
        if not pictures:
            raise UserError('render: this environment was made with render="none"; use full or draft')
        return np.concatenate(list(pictures.values()), axis=1)

    def close(self) -> None:
        """Free the renderer and the simulation. Safe to call twice."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        if self._libero is not None:
            self._libero.close()
            self._libero = self._stepper = None

    # -- the simulation underneath -------------------------------------------------------------------------------------

    @property
    def domain(self) -> Any:
        """LIBERO's robosuite environment (privileged: the expert and tests read it)."""
        if self._libero is None:
            raise RuntimeError("the environment is closed")
        return self._libero.env

    @property
    def step_count(self) -> int:
        """Steps of this episode so far (settle steps not counted)."""
        if self._step is None:
            raise RuntimeError("the episode is over or was never begun; call reset")
        return self._step

    def physics(self) -> np.ndarray:
        """Time, positions and velocities of the whole simulation, float64 (1 + nq + nv,)."""
        return np.asarray(self._libero.get_sim_state())

    def observe(self) -> Observation:
        """Observation of the last moment that robosuite's clock sampled (at most one control step ago)."""
        return {**self._pictures(), "state": self._last_moment[0], "instruction": self.task.instruction}

    def _build(self) -> Any:
        import_libero()
        from libero.libero.envs.env_wrapper import ControlEnv

        with _global_seed(0):
            libero = ControlEnv(
                bddl_file_name=str(self.task.bddl_file),
                use_camera_obs=False,
                has_offscreen_renderer=False,
                ignore_done=True,
                hard_reset=False,
            )
        forget_compilation()
        domain = libero.env
        self._watch(domain)
        # A hard reset runs two forward passes more: after compiling, and for its new renderer. Each solve warms up the
        # next one's, so that without them states are 1e-14 off.
        reset, forward = domain.sim.reset, domain.sim.forward
        domain.sim.reset = lambda: (reset(), forward(), forward())
        # A hard reset loads the model a second time, which registers these samplers twice. Their draws precede those of
        # the fixture poses, so a soft reset needs both copies to place fixtures as plain LIBERO does.
        domain.object_property_initializers.extend(list(domain.object_property_initializers))
        return libero

    def _watch(self, domain: Any) -> None:
        """Replace robosuite's observables, polled at each of the 25 substeps, by one that keeps the moment.

        robosuite samples them at a substep that depends on its own clock, not at the end of a step; a real observable
        keeps that timing, so that observations equal plain LIBERO's.
        """
        from robosuite.utils.observables import Observable, sensor

        @sensor(modality="moment")
        def sample(_: object) -> float:
            sim = domain.sim
            snapshot = {} if self.quality == "none" else take_snapshot(sim.model._model, sim.data._data)
            self._moment = (self._proprioception(domain), snapshot)
            return 0.0

        domain._observables = {"moment": Observable("moment", sample, sampling_rate=CONTROL_HZ)}

    def _fixtures(self) -> tuple[np.ndarray, np.ndarray]:
        model = self.domain.sim.model._model
        return model.body_pos.copy(), model.body_quat.copy()

    def _first_state(self, options: dict[str, Any]) -> np.ndarray:
        if "state" in options:
            state, size = np.asarray(options["state"], dtype=np.float64), self.init_states_NS.shape[1]
            if state.shape != (size,) or not np.isfinite(state).all():
                raise ValueError(f"state: shape {state.shape}, expected {size} finite numbers")
            return state
        index = int(options.get("init_state", 0))
        if not 0 <= index < len(self.init_states_NS):
            raise UserError(
                f"init_states: {index} is not an init state of {self.task.suite} task {self.task.task_id}; "
                f"use 0 to {len(self.init_states_NS) - 1}"
            )
        return self.init_states_NS[index]

    def _soft_reset(self) -> None:
        """Reset without recompiling the model, clearing by hand what only a recompilation would clear."""
        model = self.domain.sim.model._model
        model.body_pos[:], model.body_quat[:] = self._fixture_poses
        for robot in self.domain.robots:
            robot.gripper.current_action = np.zeros(robot.gripper.dof)
        self._libero.reset()

    def _advance(self, action: np.ndarray) -> bool:
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (ACTION_DIM,) or not np.isfinite(action).all():
            raise ValueError(f"action: {action}, expected {ACTION_DIM} finite numbers")
        if self.step_count >= self.max_steps:
            raise RuntimeError("the episode is over; call reset")
        success = self._simulate(action)
        self._step = self.step_count + 1
        return success

    def _simulate(self, action: np.ndarray) -> bool:
        """One control step; MuJoCo itself would answer what is not finite by going on from its model's first state."""
        if self._stepper is None:
            raise RuntimeError("the environment is closed")
        success = self._stepper.step(action)
        if fault := divergence(self.domain.sim.data._data):
            self._step = None
            raise SimulationDiverged(f"{self.task.suite} task {self.task.task_id}: the simulation diverged ({fault})")
        return success

    def _outcome(self, success: bool) -> tuple[float, bool, bool, dict[str, Any]]:
        info = self._info(success)
        terminated = success and self.ends_at_success
        truncated = not terminated and self.step_count >= self.max_steps
        if terminated:
            self._step = None
        return float(success), terminated, truncated, info

    def _info(self, success: bool) -> dict[str, Any]:
        return {"success": success, "step": self.step_count}

    def _pictures(self) -> dict[str, np.ndarray]:
        if self.quality == "none":
            return {}
        if self._renderer is None:
            self._renderer = CameraRenderer(self.domain.sim.model._model, self.image_size, self.quality)
        snapshot = self._last_moment[1]
        return {key: self._renderer.render(snapshot, camera) for key, camera in CAMERAS.items()}

    @property
    def _last_moment(self) -> tuple[np.ndarray, Snapshot]:
        if self._moment is None:
            raise RuntimeError("nothing was observed yet; call reset")
        return self._moment

    @staticmethod
    def _proprioception(domain: Any) -> np.ndarray:
        robot, data = domain.robots[0], domain.sim.data
        position = data.site_xpos[robot.eef_site_id]
        rotation = axis_angle(data.get_body_xquat(robot.robot_model.eef_name))
        gripper = data.qpos[robot._ref_gripper_joint_pos_indexes]
        return np.concatenate([position, rotation, gripper]).astype(np.float32)

    def _make_observation_space(self) -> gymnasium.spaces.Dict:
        picture = gymnasium.spaces.Box(0, 255, (self.image_size, self.image_size, 3), np.uint8)
        spaces: dict[str, gymnasium.Space[Any]] = {} if self.quality == "none" else dict.fromkeys(CAMERAS, picture)
        spaces["state"] = gymnasium.spaces.Box(-np.inf, np.inf, (STATE_DIM,), np.float32)
        letters = frozenset(string.printable + self.task.instruction)  # some of LIBERO-PRO's are beyond ASCII
        spaces["instruction"] = gymnasium.spaces.Text(min_length=0, max_length=512, charset=letters)
        return gymnasium.spaces.Dict(spaces)


def axis_angle(quaternion_wxyz: np.ndarray) -> np.ndarray:
    """Axis-angle vector (3,) in rad of a unit quaternion, without folding antipodes, as LIBERO's users do."""
    w, vector = np.clip(quaternion_wxyz[0], -1.0, 1.0), np.asarray(quaternion_wxyz[1:])
    sine = np.sqrt(1.0 - w * w)
    return np.zeros(3) if np.isclose(sine, 0.0) else vector * (2.0 * np.arccos(w) / sine)


@contextmanager
def _global_seed(seed: int) -> Iterator[None]:
    """LIBERO draws from numpy's global generator: seed it here and give the caller's state back afterwards."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)
