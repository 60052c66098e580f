"""Records episodes inside a worker process: simulator, expert, schema check, encoding. Imports no torch."""

from __future__ import annotations

import atexit
import errno
import multiprocessing
import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dtvla.data.collection import CollectionRequest, EpisodePlan
from dtvla.data.staging import CAMERA_KEYS, EpisodeSource, StagedEpisode, episode_path
from dtvla.errors import UserError

if TYPE_CHECKING:
    from dtvla.sim.env import LiberoEnv

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass
class _Frames:
    """What one try recorded, frame by frame."""

    states: list[np.ndarray] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    pictures: dict[str, list[np.ndarray]] = field(default_factory=lambda: {camera: [] for camera in CAMERA_KEYS})

    def add(self, observation: dict[str, Any], action: np.ndarray, thought: str) -> None:
        """Append the observation of a frame, the action to imitate and the thought."""
        self.states.append(np.asarray(observation["state"], dtype=np.float32))
        self.actions.append(np.asarray(action, dtype=np.float32))
        self.thoughts.append(thought)
        for camera, frames in self.pictures.items():
            frames.append(observation[camera])


class Recorder:
    """Records one planned episode after another; the simulator lives as long as the task stays the same."""

    def __init__(self, request: CollectionRequest, folder: Path) -> None:
        """Stage episodes of ``request`` below ``folder``."""
        self._request, self._folder = request, folder
        self._env: LiberoEnv | None = None
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def record(self, plan: EpisodePlan) -> EpisodeSource:
        """Try until the expert succeeds, then stage the episode.

        Raises:
            UserError: every try failed, a thought breaks the schema, or the disk is full.
        """
        self._seconds.clear()
        failures: list[dict[str, Any]] = []
        for attempt in range(self._request.max_attempts):
            seed = self._request.expert_seed(plan, attempt)
            frames, reason = self._try(plan, seed)
            if reason is None:
                return self._stage(plan, seed, attempt, failures, frames)
            failures.append({"seed": seed, "steps": len(frames.actions), "reason": reason})
        raise UserError(
            f"max_attempts: the expert failed {len(failures)} times at episode {plan.episode_index} "
            f"({self._request.suite} task {plan.task_id}, init state {plan.init_state}); "
            "leave the task out, or raise max_attempts or max_steps"
        )

    def close(self) -> None:
        """Free the simulator."""
        if self._env is not None:
            self._env.close()
            self._env = None

    def _try(self, plan: EpisodePlan, seed: int) -> tuple[_Frames, str | None]:
        """One try; returns its frames and None, or the reason why it failed."""
        from dtvla.sim.expert import Expert

        frames = _Frames()
        env = self._environment(plan.task_id)
        with self._timed("reset"):
            observation, _ = env.reset(seed=0, options={"init_state": plan.init_state})
            expert = Expert(env, seed=seed)  # begins an episode at the environment's state
        while True:
            with self._timed("expert"):
                act = expert.act()
            frames.add(observation, act.action, act.thought)
            with self._timed("simulate_and_render"):
                observation, _, success, truncated, _ = env.step(act.executed)
            if success:
                return frames, None
            if truncated:
                return frames, f"no success within {self._request.max_steps} steps"

    def _stage(
        self, plan: EpisodePlan, seed: int, attempt: int, failures: list[dict[str, Any]], frames: _Frames
    ) -> EpisodeSource:
        env = self._environment(plan.task_id)
        self._check_thoughts(plan, frames.thoughts)
        started = time.perf_counter()
        pictures = {camera: np.stack(parts) for camera, parts in frames.pictures.items()}
        source = EpisodeSource(
            episode_index=plan.episode_index,
            suite=self._request.suite,
            task_id=plan.task_id,
            instruction=env.task.instruction,
            init_state=plan.init_state,
            seed=seed,
            steps=len(frames.actions),
            attempt=attempt,
            failures=failures,
            seconds=self._seconds,
        )
        states, actions = np.stack(frames.states), np.stack(frames.actions)
        episode = StagedEpisode.encode(source, states, actions, frames.thoughts, pictures)
        self._seconds["encode"] = time.perf_counter() - started
        try:
            episode.save(episode_path(self._folder, plan.episode_index))
        except OSError as error:
            if error.errno in DISK_FULL:
                raise disk_full(self._folder) from None
            raise
        return source

    def _check_thoughts(self, plan: EpisodePlan, thoughts: list[str]) -> None:
        """Refuse an episode with a thought that breaks the schema."""
        from dtvla.cot.schema import check_thought

        objects = task_objects(self._environment(plan.task_id))
        for thought in dict.fromkeys(thoughts):
            violations = check_thought(thought, objects)
            if violations:
                raise UserError(
                    f"thoughts: episode {plan.episode_index}, frame {thoughts.index(thought)}: "
                    f"{'; '.join(violations)} in {thought!r}; mend dtvla/cot/narrate.py"
                )

    def _environment(self, task_id: int) -> LiberoEnv:
        if self._env is None or self._env.task.task_id != task_id:
            from dtvla.sim.env import LiberoEnv

            with self._timed("start"):
                self.close()
                request = self._request
                self._env = LiberoEnv(
                    request.suite,
                    task_id,
                    image_size=request.image_size,
                    render=request.render,  # type: ignore[arg-type]
                    settle_steps=request.settle_steps,
                    max_steps=request.max_steps,
                )
        return self._env

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[phase] += time.perf_counter() - started


def task_objects(env: LiberoEnv) -> list[str]:
    """Spoken names of the objects that the task is about."""
    from dtvla.sim.scene import spoken

    return [spoken(str(name)) for name in env.domain.obj_of_interest]


def disk_full(folder: Path) -> UserError:
    """The message for a disk without space."""
    return UserError(
        f"root: no space left while writing {folder}; free some space and run the same command again, "
        "finished episodes are kept"
    )


_recorder: Recorder | None = None


def start_worker(request: CollectionRequest, folder: Path) -> None:
    """Initialise a worker process: it ends with its parent, however that ends, and at once on Ctrl-C."""
    global _recorder
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _recorder = Recorder(request, folder)


def record_episode(plan: EpisodePlan) -> EpisodeSource:
    """Record one episode in a worker process that :func:`start_worker` prepared."""
    assert _recorder is not None
    source = _recorder.record(plan)
    # Registered after the libraries' own exit handlers, so it runs before they take the renderer's display away.
    atexit.unregister(_recorder.close)
    atexit.register(_recorder.close)
    return source


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
