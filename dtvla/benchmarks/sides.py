"""What the rollout study times: plain LIBERO and our pool behind one face, any number of workers."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from dtvla.benchmarks.plain_stepping import PlainLibero
from dtvla.benchmarks.processes import cpu_seconds, held_to, memory
from dtvla.sim.pool import EnvPool, EpisodeSpec, pool_settings

PLAIN = "plain"
PLAIN_NONE = "plain, no pictures"


class Side(ABC):
    """Workers that all do the same, each on its own core.

    Args:
        name: in the results.
        env: the config group ``env``.
        task_id: in its suite.
        cores: one for each worker.
    """

    def __init__(self, name: str, env: Mapping[str, Any], task_id: int, cores: Sequence[int]) -> None:
        self.name, self.env, self.task_id, self.cores = name, env, task_id, list(cores)
        self.workers = len(self.cores)

    def open(self, stack: ExitStack, init_state: int) -> float:
        """Start the processes and reset them all; seconds until every one has given its first observation."""
        started = time.perf_counter()
        with held_to(self.cores):
            self._start(stack)
        self.reset(init_state)
        return time.perf_counter() - started

    @abstractmethod
    def _start(self, stack: ExitStack) -> None: ...

    @property
    @abstractmethod
    def pids(self) -> list[int]:
        """Its processes."""

    @abstractmethod
    def reset(self, init_state: int) -> None:
        """Begin an episode in every worker."""

    @abstractmethod
    def act(self, actions_SD: np.ndarray) -> tuple[int, bool]:
        """Run a chunk in every worker at the same time; steps that ran in each, and whether the task is done."""

    def timed_act(self, actions_SD: np.ndarray) -> dict[str, Any]:
        """:meth:`act` with ``seconds`` and ``cpu_s``, the processor seconds of its processes."""
        cpu, started = cpu_seconds(self.pids), time.perf_counter()
        steps, done = self.act(actions_SD)
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "cpu_s": cpu_seconds(self.pids) - cpu, "steps": steps, "success": done}

    def memory(self) -> dict[str, float]:
        """Mean over its processes, see :func:`dtvla.benchmarks.processes.memory`."""
        found = [memory(pid) for pid in self.pids]
        return {key: round(sum(one[key] for one in found) / len(found), 1) for key in found[0]}


class PlainSide(Side):
    """Plain LIBERO, with both cameras at every step or without any."""

    def _start(self, stack: ExitStack) -> None:
        env = self.env
        self._plain = [
            stack.enter_context(
                PlainLibero(
                    env["suite"],
                    self.task_id,
                    image_size=env["image_size"],
                    pictures=self.name == PLAIN,
                    settle_steps=env["settle_steps"],
                )
            )
            for _ in range(self.workers)
        ]

    @property
    def pids(self) -> list[int]:
        """Its processes."""
        return [one.pid for one in self._plain]

    def reset(self, init_state: int) -> None:
        """A hard reset, as the published evaluation makes."""
        self._all("reset", init_state)

    def act(self, actions_SD: np.ndarray) -> tuple[int, bool]:
        """One action at a time; pictures at every step."""
        replies = self._all("run", actions_SD)
        return len(replies[0]["successes"]), replies[0]["successes"][-1]

    def _all(self, command: str, argument: object) -> list[dict[str, Any]]:
        for one in self._plain:
            one.ask(command, argument)
        return [one.answer() for one in self._plain]


class PoolSide(Side):
    """Our pool; ``settings`` are those of :class:`EnvPool` that differ from the config group ``env``."""

    def __init__(self, env: Mapping[str, Any], task_id: int, cores: Sequence[int], settings: dict[str, str]) -> None:
        super().__init__(", ".join(settings.values()), env, task_id, cores)
        self.settings = settings

    def _start(self, stack: ExitStack) -> None:
        self.pool = stack.enter_context(EnvPool(self.workers, **pool_settings(self.env) | self.settings))

    @property
    def pids(self) -> list[int]:
        """Its processes."""
        return list(self.pool.process_ids)

    def reset(self, init_state: int) -> None:
        """A soft reset, equal to a hard one."""
        spec = EpisodeSpec(self.env["suite"], self.task_id, init_state, 0, self.env["max_steps"])
        for worker in range(self.workers):
            self.pool.start(worker, spec)
        self._replies()

    def act(self, actions_SD: np.ndarray) -> tuple[int, bool]:
        """A chunk in the worker; one pair of pictures at its end."""
        for worker in range(self.workers):
            self.pool.act(worker, actions_SD)
        reply = self._replies()[0]
        return int(reply.info["steps"]), bool(reply.info["success"])

    def _replies(self) -> list[Any]:
        found: dict[int, Any] = {}
        while len(found) < self.workers:
            found |= dict(self.pool.ready(None))
        return [found[worker] for worker in range(self.workers)]
