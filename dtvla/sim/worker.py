"""The process behind one worker of :class:`dtvla.sim.pool.EnvPool`: one environment, commands in, replies out.

It imports no torch and ends with its parent, whatever ends that.
"""

import gc
import json
import sys
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from dtvla.errors import UserError
from dtvla.lifetime import end_with
from dtvla.sim.env import LiberoEnv, SimulationDiverged
from dtvla.sim.film import Caption, Film
from dtvla.sim.pool import Chunk, EpisodeSpec, Failure, Reply, Start
from dtvla.sim.shared_pictures import SharedPictures


class EpisodeFilm:
    """Films an episode. The picture of the reset waits for the first thought, which it shows already."""

    def __init__(self, path: Path, instruction: str, first_HWC: np.ndarray):
        self._film = Film(path)
        self._instruction = instruction
        self._first_HWC = first_HWC
        self._step = 0

    def add(self, frames: Sequence[np.ndarray], thought: str, outcome: bool | None) -> None:
        """Add the pictures of a chunk's steps; with an outcome, the last one shows it."""
        if self._step == 0:
            self._film.add(self._first_HWC, Caption(self._instruction, thought, 0))
        for number, frame_HWC in enumerate(frames, start=1):
            self._step += 1
            last = outcome if number == len(frames) else None
            self._film.add(frame_HWC, Caption(self._instruction, thought, self._step, last))

    def finish(self) -> Path:
        """Complete the file."""
        return self._film.finish()

    def abandon(self) -> None:
        """Remove an unfinished file."""
        self._film.abandon()


class EnvKeeper:
    """Keeps the environment of the last episode and makes another only for another task."""

    def __init__(self, settings: Mapping[str, Any]):
        self._settings = settings
        self._key: tuple[str, int] | None = None
        self._env: LiberoEnv | None = None
        self._film: EpisodeFilm | None = None

    def start(self, request: Start) -> Reply:
        """Begin an episode and run what is known of it."""
        self._drop_film()
        env = self._environment(request.spec)
        observation, info = env.reset(seed=request.spec.seed, options={"init_state": request.spec.init_state})
        if request.film is not None:
            self._film = EpisodeFilm(request.film, env.task.instruction, env.render())
        reply = Reply(observation, info=info)
        for chunk in request.chunks if self._film else _joined(request.chunks):
            reply = self.act(chunk)
        return reply

    def act(self, chunk: Chunk) -> Reply:
        """Run a chunk of actions."""
        assert self._env is not None
        reply = Reply(*self._env.step_chunk(chunk.actions_SD, record=self._film is not None))
        if self._film is not None:
            self._film.add(reply.info.pop("frames"), chunk.thought, reply.info["success"] if reply.over else None)
            if reply.over:
                reply.film = self._film.finish()
                self._film = None
        return reply

    def close(self) -> None:
        """Free the environment."""
        self._drop_film()
        if self._env is not None:
            self._env.close()
            self._env = self._key = None
            gc.collect()  # robosuite's objects refer to each other, and hold the model

    def _environment(self, spec: EpisodeSpec) -> LiberoEnv:
        key = (spec.suite, spec.task_id)
        if key != self._key or self._env is None:
            self.close()
            self._env = LiberoEnv(*key, **self._settings)
            self._key = key
        self._env.limit_steps(spec.max_steps)
        return self._env

    def _drop_film(self) -> None:
        if self._film is not None:
            self._film.abandon()
            self._film = None


def _joined(chunks: Sequence[Chunk]) -> list[Chunk]:
    """All chunks but the last in one: the simulation is the same, and nobody looks at the pictures in between."""
    before, last = chunks[:-1], chunks[-1:]
    return [*([Chunk(np.concatenate([c.actions_SD for c in before]))] if before else []), *last]


def serve(pipe: Connection, pictures: SharedPictures, settings: Mapping[str, Any]) -> None:
    """Answer commands until the parent says goodbye or is gone."""
    keeper = EnvKeeper(settings)
    while True:
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            break
        if message is None:
            break
        answer: Reply | Failure
        try:
            answer = keeper.start(message) if isinstance(message, Start) else keeper.act(message)
            answer.observation = pictures.put(answer.observation)
        except UserError as error:
            answer = Failure(str(error), "user")
        except SimulationDiverged as error:
            answer = Failure(str(error), "diverged")
        except Exception:  # the parent raises it with the name of the episode
            answer = Failure(traceback.format_exc().strip(), "error")
        try:
            pipe.send(answer)
        except OSError:
            break
    keeper.close()


if __name__ == "__main__":
    end_with(int(sys.argv[3]))
    serve(Connection(int(sys.argv[1])), SharedPictures(int(sys.argv[2])), json.loads(sys.argv[4]))
