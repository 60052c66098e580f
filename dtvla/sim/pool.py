"""Worker processes that each keep one LIBERO environment, driven asynchronously and replaced when they fail.

OpenGL, MuJoCo and numpy's global generator are process-wide, so one environment lives in one process. Workers are
fresh interpreters that run :mod:`dtvla.sim.worker`: a forked OpenGL context is unusable, and multiprocessing's spawn
would import the parent's main module, and torch with it.

A state is a pure function of (specification, actions). So when a worker is lost, another one starts the episode again
and runs the actions that the caller has sent so far; the caller sees the same reply, only later.
"""

import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np

from dtvla.errors import UserError
from dtvla.sim.film import partial_path
from dtvla.sim.settings import check_settings
from dtvla.sim.shared_pictures import SharedPictures

_GOODBYE_S = 5.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EpisodeSpec:
    """What an episode is made of.

    ``record`` asks whoever runs it for a film. ``sample`` tells episodes apart that begin alike: the policy draws other
    random numbers in each.
    """

    suite: str
    task_id: int
    init_state: int
    seed: int
    max_steps: int | None = None
    record: bool = False
    sample: int = 0

    def __str__(self) -> str:
        sample = f", sample {self.sample}" if self.sample else ""
        return f"{self.suite} task {self.task_id}, init state {self.init_state}, seed {self.seed}{sample}"


@dataclass(frozen=True)
class Chunk:
    """Actions (S, 7) and the thought behind them, which a film shows."""

    actions_SD: np.ndarray
    thought: str = ""


@dataclass(frozen=True)
class Start:
    """Begin an episode, film it if ``film`` names a file, and run the chunks that are known already."""

    spec: EpisodeSpec
    film: Path | None = None
    chunks: tuple[Chunk, ...] = ()


@dataclass
class Reply:
    """What a worker answers to :meth:`EnvPool.start` or :meth:`EnvPool.act`.

    ``observation`` and ``info`` are those of :class:`dtvla.sim.env.LiberoEnv`; ``film`` is the finished film of an
    episode that is over.
    """

    observation: dict[str, Any]
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    info: dict[str, Any] = field(default_factory=dict)
    film: Path | None = None

    @property
    def over(self) -> bool:
        """Whether the episode has ended."""
        return self.terminated or self.truncated


@dataclass(frozen=True)
class Failure:
    """What a worker answers instead of a :class:`Reply`: a user's mistake, a diverged simulation, or an error."""

    message: str
    kind: Literal["user", "diverged", "error"]


@dataclass
class _Worker:
    """One place in the pool: its process, and the episode that has to survive the process."""

    process: subprocess.Popen[bytes]
    pipe: Connection
    pictures: SharedPictures
    spec: EpisodeSpec | None = None
    film: Path | None = None
    chunks: list[Chunk] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)
    overdue: float | None = None  # when an answer is overdue, by the monotonic clock; None: nothing is asked


def pool_settings(env: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of :class:`EnvPool` from the config group ``env``.

    Raises:
        UserError: a worker could not be made with them.
    """
    checked = ("render", "stepping", "image_size", "settle_steps")
    check_settings(**{key: env[key] for key in checked}, max_steps=env.get("max_steps"))
    return {key: env[key] for key in ("image_size", "render", "protocol", "settle_steps", "stepping")}


class EnvPool:
    """A context manager over ``workers`` processes; worker numbers are 0 .. workers - 1.

    Each worker has at most one request under way. Its environment is re-used as long as suite and task stay the same.
    A worker that dies, hangs or reports a diverged simulation is replaced and its episode is run again up to where it
    was; ``losses`` says what happened.

    Args:
        workers: number of processes, at least 1.
        image_size, render, protocol, settle_steps, stepping: of :class:`dtvla.sim.env.LiberoEnv`.
        patience_s: a worker hangs that has not answered for so long. Creating an environment takes 10 s, on a machine
            with far more workers than cores a minute.
        attempts: the loss of so many workers in one episode is an error.

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
        stepping: str = "exact",
        patience_s: float = 300.0,
        attempts: int = 3,
    ):
        if workers < 1:
            raise UserError(f"workers: {workers} processes can't run episodes; use 1 or more")
        self.workers = workers
        self.patience_s, self.attempts = patience_s, attempts
        self.losses: list[str] = []
        self._settings = {
            "image_size": image_size,
            "render": render,
            "protocol": protocol,
            "settle_steps": settle_steps,
            "stepping": stepping,
        }
        self._workers: list[_Worker] = []

    def __enter__(self) -> Self:
        for _ in range(self.workers):
            pictures = SharedPictures.create()
            self._workers.append(_Worker(*self._spawn(pictures), pictures))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def process_ids(self) -> list[int]:
        """Process id of every worker."""
        return [worker.process.pid for worker in self._workers]

    def start(self, worker: int, spec: EpisodeSpec, film: Path | None = None) -> None:
        """Begin an episode and film every step of it into ``film``; the reply carries its first observation."""
        one = self._idle(worker)
        one.spec, one.film, one.chunks, one.losses = spec, film, [], []
        self._send(one, Start(spec, film))

    def act(self, worker: int, actions_SD: np.ndarray, thought: str = "") -> None:
        """Run a chunk of actions (S, 7); the reply carries the observation after it. A film shows ``thought``."""
        one = self._idle(worker)
        if one.spec is None:
            raise RuntimeError(f"worker {worker} has no episode; call start first")
        one.chunks.append(Chunk(np.asarray(actions_SD, dtype=np.float64), thought))
        self._send(one, one.chunks[-1])

    def ready(self, timeout: float | None = None) -> list[tuple[int, Reply]]:
        """Wait until at least one worker has answered; ``(worker, reply)`` of all that have, by number.

        An empty list after ``timeout`` seconds, or when no request is under way.

        Raises:
            UserError: what the episode asked for can't be had (the message names the episode).
            RuntimeError: the episode failed in the simulator, or ``attempts`` workers were lost in it; names both.
        """
        until = float("inf") if timeout is None else time.monotonic() + timeout
        while waiting := {one.pipe: k for k, one in enumerate(self._workers) if one.overdue is not None}:
            first_overdue = min(self._workers[k].overdue or until for k in waiting.values())
            left = max(0.0, min(until, first_overdue) - time.monotonic())
            done = multiprocessing.connection.wait(list(waiting), left)
            replies = [(k, reply) for pipe, k in waiting.items() if pipe in done and (reply := self._receive(k))]
            for pipe, k in waiting.items():
                one = self._workers[k]
                if pipe not in done and one.overdue is not None and time.monotonic() >= one.overdue:
                    self._replace(one, f"gave no answer for {self.patience_s:g} s")
            if replies or time.monotonic() >= until:
                return replies
        return []

    def close(self) -> None:
        """End all workers: ask the idle ones, kill the busy ones. Safe to call twice."""
        workers, self._workers = self._workers, []
        for one in workers:
            try:
                if one.overdue is None:
                    one.pipe.send(None)
                else:  # nobody wants the answer
                    one.process.kill()
            except OSError:
                continue  # that worker is gone
        deadline = time.monotonic() + _GOODBYE_S
        for one in workers:
            try:
                one.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                one.process.kill()
                one.process.wait()
            one.pipe.close()
            one.pictures.close()
            if one.film is not None:
                partial_path(one.film).unlink(missing_ok=True)

    def _spawn(self, pictures: SharedPictures) -> tuple[subprocess.Popen[bytes], Connection]:
        ours, theirs = multiprocessing.Pipe()
        descriptors = [theirs.fileno(), pictures.descriptor]
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "dtvla.sim.worker"),
                *(str(number) for number in (*descriptors, os.getpid())),
                json.dumps(self._settings),
            ],
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C in a terminal is for the parent alone, which ends its workers
            env=os.environ | {"PYTHONPATH": _python_path()},
        )
        theirs.close()
        return process, ours

    def _idle(self, worker: int) -> _Worker:
        if not self._workers:
            raise RuntimeError("the pool is not open; use it in a with statement")
        if self._workers[worker].overdue is not None:
            raise RuntimeError(f"worker {worker} has a request under way; wait for it with ready")
        return self._workers[worker]

    def _send(self, one: _Worker, message: Start | Chunk) -> None:
        one.overdue = time.monotonic() + self.patience_s
        try:
            one.pipe.send(message)
        except OSError:
            self._replace(one, _how_ended(one.process))

    def _receive(self, worker: int) -> Reply | None:
        """The worker's reply, or None when the worker is lost and another one works on it."""
        one = self._workers[worker]
        try:
            answer: Reply | Failure = one.pipe.recv()
        except (EOFError, OSError):
            self._replace(one, _how_ended(one.process))
            return None
        if isinstance(answer, Reply):
            one.overdue = None
            answer.observation = one.pictures.take(answer.observation)
            return answer
        if answer.kind == "diverged":
            self._replace(one, answer.message)
            return None
        one.overdue = None
        error = UserError if answer.kind == "user" else RuntimeError
        raise error(f"{answer.message} (episode: {one.spec})")

    def _replace(self, one: _Worker, reason: str) -> None:
        """Put a fresh process in the place of a lost one, and let it catch up with the episode.

        Raises:
            RuntimeError: the episode has cost ``attempts`` workers. The place has a fresh process and no episode.
        """
        one.process.kill()
        one.process.wait()
        one.pipe.close()
        one.losses.append(reason)
        self.losses.append(f"{one.spec}: the simulation worker {reason}")
        one.process, one.pipe = self._spawn(one.pictures)
        spec, one.overdue = one.spec, None
        if spec is None or len(one.losses) >= self.attempts:
            one.spec = None
            raise RuntimeError(
                f"{len(one.losses)} simulation workers were lost in one episode, {spec}: {'; '.join(one.losses)}; "
                "if memory is short, use fewer workers"
            )
        _log.warning("%s; the episode is run again", self.losses[-1])
        self._send(one, Start(spec, one.film, tuple(one.chunks)))


def _how_ended(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(_GOODBYE_S)
    except subprocess.TimeoutExpired:
        return "closed its connection"
    return f"ended by signal {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _python_path() -> str:
    """PYTHONPATH with which a worker finds this very dtvla, wherever the parent has moved to."""
    here = str(Path(__file__).parents[2])
    return os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
