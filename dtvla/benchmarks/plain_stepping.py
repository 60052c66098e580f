"""LIBERO stepped the published way, in a process of its own: every step renders both cameras at full quality.

``OffScreenRenderEnv`` is used as it comes, one for each task; an episode is a hard reset, an init state and ten resting
steps. Sources: DeepThinkVLA ``run_libero_eval.py``, LIBERO ``env_wrapper.py``. Of dtvla there are the choice of an
OpenGL backend and quiet imports.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Self

import numpy as np

from dtvla.benchmarks.processes import memory
from dtvla.errors import UserError

_REST = [0.0] * 6 + [-1.0]
_ALIVE_CHECK_S = 1.0


class PlainLibero:
    """One such process; a context manager. :meth:`ask` and :meth:`answer` let several of them work at a time.

    Args:
        suite: of the five of LIBERO.
        task_id: in the suite.
        image_size: of both cameras, in pixels.
        pictures: False leaves cameras and renderer out; all else stays as it is.
        settle_steps: resting steps of a reset.
    """

    def __init__(self, suite: str, task_id: int, *, image_size: int, pictures: bool = True, settle_steps: int = 10):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, suite, task_id, image_size, pictures, settle_steps)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """Number of the process."""
        return int(self._process.pid or 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        with suppress(OSError):
            self._pipe.send(None)
        self._process.join(5.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._pipe.close()

    def reset(self, init_state: int) -> dict[str, Any]:
        """Begin an episode; what :meth:`run` returns, of the first moment alone."""
        self.ask("reset", init_state)
        return self.answer()

    def run(self, actions_SD: np.ndarray) -> dict[str, Any]:
        """Step until the actions are used up or the task is done.

        Returns:
            ``successes`` of every step, ``states`` of every step as LIBERO flattens them, and the last observation:
            ``agentview`` and ``wrist`` turned by 180 degrees, as the field does (without ``pictures`` they are left
            out), and ``state``, float32 (8,).
        """
        self.ask("run", actions_SD)
        return self.answer()

    def ask(self, command: str, argument: object) -> None:
        """Send ``reset``, ``run`` or ``memory``; fetch the reply with :meth:`answer`."""
        self._pipe.send((command, argument))

    def answer(self) -> dict[str, Any]:
        """Wait for the reply.

        Raises:
            UserError: there is no such task, init state or renderer.
            RuntimeError: the process ended or failed.
        """
        while not self._pipe.poll(_ALIVE_CHECK_S):
            if not self._process.is_alive():
                raise RuntimeError(f"the process of plain LIBERO ended with exit code {self._process.exitcode}")
        try:
            reply = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError("the process of plain LIBERO ended") from error
        if isinstance(reply, UserError):
            raise reply
        if isinstance(reply, Exception):
            raise RuntimeError(f"plain LIBERO failed: {type(reply).__name__}: {reply}")
        return dict(reply)


def _serve(pipe: Connection, suite: str, task_id: int, image_size: int, pictures: bool, settle_steps: int) -> None:
    """Answer until the parent says goodbye or is gone."""
    plain = _Plain(suite, task_id, image_size, pictures, settle_steps)
    commands: dict[str, Callable[[Any], dict[str, Any]]] = {
        "reset": plain.reset,
        "run": plain.run,
        "memory": lambda _: plain.stages | {"now": memory(os.getpid())},
    }
    with suppress(EOFError, OSError, KeyboardInterrupt):
        while (message := pipe.recv()) is not None:
            try:
                reply: object = commands[message[0]](message[1])
            except Exception as error:  # the parent raises it
                reply = error if isinstance(error, UserError) else RuntimeError(f"{type(error).__name__}: {error}")
            pipe.send(reply)
    os._exit(0)  # the destructors of robosuite's OpenGL context print errors


class _Plain:
    """The environment and its episode."""

    def __init__(self, suite: str, task_id: int, image_size: int, pictures: bool, settle_steps: int) -> None:
        self.suite, self.task_id, self.settle_steps = suite, task_id, settle_steps
        self.size, self.pictures = image_size, pictures
        self.env: Any = None
        self.stages: dict[str, Any] = {}

    def reset(self, init_state: int) -> dict[str, Any]:
        if self.env is None:
            self._make()
        self.env.reset()
        observation = self.env.set_init_state(self.init_states_NS[init_state])
        for _ in range(self.settle_steps):
            observation, *_ = self.env.step(_REST)
        return self._reply([], [self.env.get_sim_state()], observation)

    def run(self, actions_SD: np.ndarray) -> dict[str, Any]:
        successes, states = [], []
        for action in actions_SD.tolist():
            observation, _, done, _ = self.env.step(action)
            successes.append(bool(done))
            states.append(self.env.get_sim_state())
            if done:
                break
        return self._reply(successes, states, observation)

    def _make(self) -> None:
        """Import and build on the first request, so that errors reach the parent."""
        from dtvla.sim.backend import import_libero
        from dtvla.sim.suites import get_task, load_init_states

        task = get_task(self.suite, self.task_id)
        self.init_states_NS = load_init_states(task)
        import_libero()
        from libero.libero.envs import OffScreenRenderEnv
        from libero.libero.envs.env_wrapper import ControlEnv

        self.stages["imports"] = memory(os.getpid())
        if self.pictures:
            self.env = OffScreenRenderEnv(
                bddl_file_name=str(task.bddl_file), camera_heights=self.size, camera_widths=self.size
            )
        else:
            self.env = ControlEnv(str(task.bddl_file), use_camera_obs=False, has_offscreen_renderer=False)
        self.stages["environment"] = memory(os.getpid())
        self.env.seed(0)

    def _reply(
        self, successes: list[bool], states: list[np.ndarray], observation: dict[str, np.ndarray]
    ) -> dict[str, Any]:
        from robosuite.utils.transform_utils import quat2axisangle

        pose = [observation["robot0_eef_pos"], quat2axisangle(observation["robot0_eef_quat"])]
        reply: dict[str, Any] = {
            "successes": successes,
            "states": np.array(states),
            "state": np.concatenate([*pose, observation["robot0_gripper_qpos"]]).astype(np.float32),
        }
        if self.pictures:
            for name, key in (("agentview", "agentview_image"), ("wrist", "robot0_eye_in_hand_image")):
                reply[name] = np.ascontiguousarray(observation[key][::-1, ::-1])
        return reply
