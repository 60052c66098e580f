"""Records episodes inside a worker process: simulator, a source of episodes, encoding. Imports no torch."""

from __future__ import annotations

import atexit
import errno
import multiprocessing
import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dtvla.data.collection import CollectionRequest, EpisodePlan
from dtvla.data.staging import EpisodeSource, StagedEpisode, dropped_path, episode_path, save_dropped
from dtvla.data.takes import Clock, Take
from dtvla.errors import UserError

if TYPE_CHECKING:
    from dtvla.sim.env import LiberoEnv

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Recorder:
    """Records one planned episode after another; the simulator lives as long as the task stays the same."""

    def __init__(self, request: CollectionRequest, folder: Path) -> None:
        """Stage episodes of ``request`` below ``folder``."""
        self._request, self._folder = request, folder
        self._env: LiberoEnv | None = None

    def record(self, plan: EpisodePlan) -> EpisodeSource:
        """Perform the episode, then stage it, or note that it is dropped.

        Raises:
            UserError: it can't be performed, or the disk is full.
        """
        clock = Clock()
        env = self._environment(plan.task_id, clock)
        take = self._request.perform(env, plan, clock)
        source = EpisodeSource(
            episode_index=plan.episode_index,
            suite=self._request.suite,
            task_id=plan.task_id,
            instruction=env.task.instruction,
            steps=len(take.actions),
            seconds=clock.seconds,
            dropped=take.dropped,
            **take.facts,
        )
        try:
            if take.dropped is None:
                with clock("encode"):
                    episode = _encode(source, take)
                episode.save(episode_path(self._folder, plan.episode_index))
            else:
                save_dropped(source, dropped_path(self._folder, plan.episode_index))
        except OSError as error:
            if error.errno in DISK_FULL:
                raise disk_full(self._folder) from None
            raise
        return source

    def close(self) -> None:
        """Free the simulator."""
        if self._env is not None:
            self._env.close()
            self._env = None

    def _environment(self, task_id: int, clock: Clock) -> LiberoEnv:
        if self._env is None or self._env.task.task_id != task_id:
            from dtvla.sim.env import LiberoEnv

            with clock("start"):
                self.close()
                self._env = LiberoEnv(self._request.suite, task_id, **self._request.environment())
        return self._env


def _encode(source: EpisodeSource, take: Take) -> StagedEpisode:
    pictures = {camera: np.stack(parts) for camera, parts in take.pictures.items()}
    return StagedEpisode.encode(source, np.stack(take.states), np.stack(take.actions), take.thoughts, pictures)


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
