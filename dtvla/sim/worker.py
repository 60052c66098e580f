"""The process behind one worker of :class:`dtvla.sim.pool.EnvPool`: one environment, commands in, replies out.

It imports no torch, ignores Ctrl-C (the parent decides) and ends with its parent, whatever ends that.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from dtvla.errors import UserError
from dtvla.sim.env import LiberoEnv
from dtvla.sim.pool import EpisodeSpec, Failure, Reply


class EnvKeeper:
    """Keeps the environment of the last episode and makes another only when task or step limit change."""

    def __init__(self, settings: Mapping[str, Any]):
        self._settings = settings
        self._key: tuple[str, int, int | None] | None = None
        self._env: LiberoEnv | None = None
        self._record = False

    def start(self, spec: EpisodeSpec) -> Reply:
        """Begin an episode."""
        key = (spec.suite, spec.task_id, spec.max_steps)
        if key != self._key or self._env is None:
            self.close()
            self._env = LiberoEnv(spec.suite, spec.task_id, max_steps=spec.max_steps, **self._settings)
            self._key = key
        observation, info = self._env.reset(seed=spec.seed, options={"init_state": spec.init_state})
        self._record = spec.record
        return Reply(observation, info=info, frames=[self._env.render()] if spec.record else [])

    def act(self, actions_SD: np.ndarray) -> Reply:
        """Run a chunk of actions (S, 7)."""
        assert self._env is not None
        observation, reward, terminated, truncated, info = self._env.step_chunk(actions_SD, record=self._record)
        return Reply(observation, reward, terminated, truncated, info, info.pop("frames", []))

    def close(self) -> None:
        """Free the environment."""
        if self._env is not None:
            self._env.close()
        self._env = self._key = None


def serve(pipe: Connection, settings: Mapping[str, Any]) -> None:
    """Answer commands until the parent says goodbye or is gone."""
    keeper = EnvKeeper(settings)
    while True:
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            break
        if message is None:
            break
        command, argument = message
        answer: Reply | Failure
        try:
            answer = keeper.start(argument) if command == "start" else keeper.act(argument)
        except UserError as error:
            answer = Failure(str(error), is_user_error=True)
        except Exception:  # the parent raises it with the name of the episode
            answer = Failure(traceback.format_exc().strip(), is_user_error=False)
        try:
            pipe.send(answer)
        except OSError:
            break
    keeper.close()


def _die_with(parent: int) -> None:
    """End this process when the parent is gone, even in the middle of a simulation."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with, args=(int(sys.argv[2]),), daemon=True).start()
    serve(Connection(int(sys.argv[1])), json.loads(sys.argv[3]))
