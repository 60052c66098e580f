"""Worker processes that each keep one LIBERO environment, driven asynchronously.

OpenGL, MuJoCo and numpy's global generator are process-wide, so one environment lives in one process. Workers are
fresh interpreters that run :mod:`dtvla.sim.worker`: a forked OpenGL context is unusable, and multiprocessing's spawn
would import the parent's main module, and torch with it.
"""

import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from dtvla.errors import UserError

_GOODBYE_S = 5.0


@dataclass(frozen=True)
class EpisodeSpec:
    """What an episode is made of. With ``record``, a picture of every step comes back."""

    suite: str
    task_id: int
    init_state: int
    seed: int
    max_steps: int | None = None
    record: bool = False

    def __str__(self) -> str:
        return f"{self.suite} task {self.task_id}, init state {self.init_state}, seed {self.seed}"


@dataclass
class Reply:
    """What a worker answers to :meth:`EnvPool.start` or :meth:`EnvPool.act`.

    ``observation`` and ``info`` are those of :class:`dtvla.sim.env.LiberoEnv`; ``frames`` lists uint8 (H, 2W, 3).
    """

    observation: dict[str, Any]
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    info: dict[str, Any] = field(default_factory=dict)
    frames: list[np.ndarray] = field(default_factory=list)

    @property
    def over(self) -> bool:
        """Whether the episode has ended."""
        return self.terminated or self.truncated


@dataclass(frozen=True)
class Failure:
    """What a worker answers instead of a :class:`Reply` when an episode went wrong."""

    message: str
    is_user_error: bool


class EnvPool:
    """A context manager over ``workers`` processes; worker numbers are 0 .. workers - 1.

    Each worker has at most one request under way. Its environment is re-used as long as suite, task and step limit
    stay the same.

    Args:
        workers: number of processes, at least 1.
        image_size: height and width of the pictures in pixels.
        render: render quality of :class:`dtvla.sim.env.LiberoEnv`.
        protocol: whose step limits.
        settle_steps: steps before the first observation.

    Raises:
        UserError: no worker asked for.
    """

    def __init__(
        self,
        workers: int,
        *,
        image_size: int = 256,
        render: str = "full",
        protocol: str = "published",
        settle_steps: int = 10,
    ):
        if workers < 1:
            raise UserError(f"workers: {workers} processes can't run episodes; use 1 or more")
        self.workers = workers
        self._settings = {
            "image_size": image_size,
            "render": render,
            "protocol": protocol,
            "settle_steps": settle_steps,
        }
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection] = []
        self._specs: list[EpisodeSpec | None] = [None] * workers
        self._waiting: set[int] = set()

    def __enter__(self) -> Self:
        environment = os.environ | {"PYTHONPATH": _python_path()}
        for _ in range(self.workers):
            ours, theirs = multiprocessing.Pipe()
            arguments = [str(theirs.fileno()), str(os.getpid()), json.dumps(self._settings)]
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "dtvla.sim.worker", *arguments],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env=environment,
                )
            )
            theirs.close()
            self._pipes.append(ours)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self, worker: int, spec: EpisodeSpec) -> None:
        """Begin an episode; the reply carries its first observation."""
        self._specs[worker] = spec
        self._send(worker, ("start", spec))

    def act(self, worker: int, actions_SD: np.ndarray) -> None:
        """Run a chunk of actions (S, 7); the reply carries the observation after it."""
        if self._specs[worker] is None:
            raise RuntimeError(f"worker {worker} has no episode; call start first")
        self._send(worker, ("act", np.asarray(actions_SD, dtype=np.float64)))

    def ready(self, timeout: float | None = None) -> list[tuple[int, Reply]]:
        """Wait until at least one worker has answered; ``(worker, reply)`` of all that have, by number.

        An empty list after ``timeout`` seconds, or when no request is under way.

        Raises:
            UserError: what the episode asked for can't be had (the message names the episode).
            RuntimeError: the episode failed in the simulator, or its worker died; names the episode.
        """
        pipes = {self._pipes[worker]: worker for worker in sorted(self._waiting)}
        if not pipes:
            return []
        done = multiprocessing.connection.wait(list(pipes), timeout)
        return [(worker, self._receive(worker)) for pipe, worker in pipes.items() if pipe in done]

    def close(self) -> None:
        """End all workers: ask, then terminate. Safe to call twice."""
        for pipe in self._pipes:
            try:
                pipe.send(None)
            except OSError:
                continue  # that worker is gone
        for worker in self._waiting:  # it is busy, and nobody wants the answer
            self._processes[worker].terminate()
        deadline = time.monotonic() + _GOODBYE_S
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes, self._waiting = [], [], set()

    def _send(self, worker: int, message: tuple[str, Any]) -> None:
        if not self._pipes:
            raise RuntimeError("the pool is not open; use it in a with statement")
        if worker in self._waiting:
            raise RuntimeError(f"worker {worker} has a request under way; wait for it with ready")
        try:
            self._pipes[worker].send(message)
        except OSError as error:
            raise self._death(worker) from error
        self._waiting.add(worker)

    def _receive(self, worker: int) -> Reply:
        try:
            answer = self._pipes[worker].recv()
        except (EOFError, OSError) as error:
            raise self._death(worker) from error
        self._waiting.discard(worker)
        if isinstance(answer, Failure):
            kind = UserError if answer.is_user_error else RuntimeError
            raise kind(f"{answer.message} (episode: {self._specs[worker]})")
        return answer

    def _death(self, worker: int) -> RuntimeError:
        self._waiting.discard(worker)
        try:
            code = self._processes[worker].wait(_GOODBYE_S)
            how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        except subprocess.TimeoutExpired:
            how = "its connection"
        return RuntimeError(
            f"simulation worker {worker} ended {how} during {self._specs[worker]}; "
            "if memory is short, use fewer workers"
        )


def _python_path() -> str:
    """PYTHONPATH with which a worker finds this very dtvla, wherever the parent has moved to."""
    here = str(Path(__file__).parents[2])
    return os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
