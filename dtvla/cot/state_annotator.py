"""Thoughts from the simulator's own state: an episode is performed again, then told in hindsight."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dtvla.cores import positive, usable_cores
from dtvla.cot.annotator import Annotator, Answer, Job
from dtvla.errors import UserError

if TYPE_CHECKING:
    from dtvla.cot.episodes import EpisodeView
    from dtvla.sim.retrace import Recipe, Retraced

_OTHERS = "use annotator=openai or annotator=policy"


class StateAnnotator(Annotator):
    """Speaks for every frame of datasets of ``dtvla collect``; needs no model and no pictures.

    Each call occupies one of ``workers`` processes, which hold a simulator; it is safe to call from several threads.

    Args:
        demos: for datasets of recordings (``source=hdf5``) the file or folder that was replayed.
        workers: processes; "auto": one for each core.
        debounce: frames for which a gripper command must hold to begin another stage.
        tolerance: how far (m, rad) the proprioception of the replay may be from the dataset's.

    Raises:
        UserError: a setting is out of range.
    """

    identity: Mapping[str, Any]
    jobs_per_call = None

    def __init__(
        self,
        *,
        demos: Path | str | None = None,
        workers: int | str = "auto",
        debounce: int = 3,
        tolerance: float = 1e-4,
    ) -> None:
        """Check the settings; processes start with the first episode."""
        if not isinstance(tolerance, int | float) or not 0 <= tolerance < np.inf:
            raise UserError(f"annotator.tolerance: found {tolerance!r}; use 1e-4, or 0 for the same bits")
        self.calls = usable_cores() if workers == "auto" else positive("annotator.workers", workers)
        self._debounce = positive("annotator.debounce", debounce)
        self._tolerance = float(tolerance)
        self._demos = None if demos is None else Path(demos).expanduser()
        self.identity = {"annotator": "state", "model": None, "prompt": None, "debounce": debounce}
        self._lock = threading.Lock()
        self._pool: ProcessPoolExecutor | None = None
        self._told: dict[tuple[Path, int], list[str]] = {}

    def label(self, episode: EpisodeView, jobs: Sequence[Job]) -> list[Answer]:
        """Thoughts of the frames; another attempt says the same again.

        Raises:
            UserError: the dataset does not say where the episode comes from, the episode can't be performed again, or
                its task is not about putting things in or on others.
        """
        key = (episode.root, episode.number)
        if key not in self._told:
            retraced = self._retrace(recipe(episode, self._demos))
            require_same(episode, retraced.state_F8, self._tolerance)
            self._told[key] = tell(episode, retraced, self._debounce)
        return [Answer(f"<think>{self._told[key][job.frame]}</think>") for job in jobs]

    def close(self) -> None:
        """End the processes."""
        with self._lock:
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)
                self._pool = None

    def _retrace(self, wanted: Recipe) -> Retraced:
        from dtvla.sim.retrace import retrace_here

        try:
            return self._processes().submit(retrace_here, wanted).result()
        except BrokenProcessPool:
            raise UserError(
                "annotator.workers: a process with a simulator was killed, probably for want of memory; run the same "
                f"command again with annotator.workers={max(1, self.calls - 1)}, finished episodes are kept"
            ) from None

    def _processes(self) -> ProcessPoolExecutor:
        from multiprocessing import get_context

        from dtvla.sim.retrace import start_worker

        with self._lock:
            if self._pool is None:
                self._pool = ProcessPoolExecutor(self.calls, mp_context=get_context("spawn"), initializer=start_worker)
            return self._pool


def recipe(episode: EpisodeView, demos: Path | None) -> Recipe:
    """How an episode of ``dtvla collect`` came about.

    Raises:
        UserError: the dataset does not say, or the recording is not at ``demos`` or is another one.
    """
    from dtvla.sim.retrace import Recipe

    source, request = episode.source, _request(episode.root)
    try:
        common = {"suite": source["suite"], "task_id": source["task_id"], "settle_steps": request["settle_steps"]}
        if source.get("demo") is None:
            return Recipe(**common, frames=len(episode), init_state=source["init_state"], seed=source["seed"])
        threshold = request["noop_threshold"]
    except KeyError as error:
        raise _unknown(episode.root, f"{error} of episode {episode.number}") from None
    first_state, actions_F7 = _recording(episode, demos, threshold)
    return Recipe(**common, frames=len(episode), first_state=first_state, actions_F7=actions_F7)


def _request(root: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((root / "meta/collection.json").read_text())["request"])
    except (OSError, ValueError, KeyError, TypeError):
        raise _unknown(root, "meta/collection.json") from None


def _unknown(root: Path, what: str) -> UserError:
    return UserError(
        f"dataset: {root} lacks {what}; annotator=state performs episodes again that `dtvla collect` recorded, "
        f"for others {_OTHERS}"
    )


def _recording(episode: EpisodeView, demos: Path | None, threshold: float | None) -> tuple[np.ndarray, np.ndarray]:
    """First state and kept actions (F, 7) of the recording that an episode replays."""
    from dtvla.data.hdf5_files import find_files, kept_actions, read_demo

    source = episode.source
    task_id, demo, name = int(source["task_id"]), str(source["demo"]), str(source["file"])
    if demos is None:
        raise UserError(
            f"annotator.demos: episode {episode.number} of {episode.root} replays {demo} of {name}; "
            "set annotator.demos=... to that file or its folder"
        )
    path = find_files(demos, str(source["suite"]), [task_id])[task_id]
    try:
        first_state, recorded_T7 = read_demo(path, demo)
    except KeyError:
        raise UserError(f"annotator.demos: {path} holds no {demo}, which episode {episode.number} replays") from None
    actions_F7 = kept_actions(recorded_T7, threshold)
    if not np.array_equal(actions_F7.astype(np.float32), episode.action_FD):
        raise UserError(
            f"annotator.demos: {demo} of {path} holds other actions than episode {episode.number} of {episode.root}; "
            "name the files that the dataset was made of"
        )
    return first_state, actions_F7


def require_same(episode: EpisodeView, state_F8: np.ndarray, tolerance: float) -> None:
    """Refuse a replay that went another way.

    Raises:
        UserError: names the first frame that differs.
    """
    away_F = np.abs(episode.state_FD - state_F8).max(axis=1)
    differing = np.flatnonzero(~(away_F <= tolerance))
    if len(differing):
        frame = int(differing[0])
        raise UserError(
            f"dataset: the replay of episode {episode.number} of {episode.root} leaves it at frame {frame} (its state "
            f"is {away_F[frame]:.2g} off); annotate with the versions of dtvla, MuJoCo and robosuite that "
            f"collected it (meta/collection.json), or {_OTHERS}"
        )


def tell(episode: EpisodeView, retraced: Retraced, debounce: int) -> list[str]:
    """A thought for every frame, without tags.

    Raises:
        UserError: an item came to its target though it never was in the gripper.
    """
    from dtvla.cot.hindsight import stages
    from dtvla.cot.narrate import narrate

    track, goals = retraced.track, retraced.goals
    for number, goal in enumerate(goals):
        if track.solved_FG[-1, number] and not (track.held_FG[:, number].any() or track.solved_FG[0, number]):
            raise UserError(
                f"dataset: in episode {episode.number} of {episode.root} {goal.item} comes to {goal.target} without "
                f"being grasped; annotator=state can tell of picking and placing only, {_OTHERS}"
            )
    return [
        narrate(stage.phase, _Moment(retraced, frame), goals[stage.goal], recovering=stage.recovering)
        for frame, stage in enumerate(stages(episode.closing_F, track, debounce))
    ]


class _Moment:
    """Where items and targets are at a frame."""

    def __init__(self, retraced: Retraced, frame: int) -> None:
        track = retraced.track
        self._positions: dict[str, np.ndarray] = {}
        for number, goal in enumerate(retraced.goals):
            self._positions[goal.item] = track.item_FG3[frame, number]
            self._positions[goal.target] = track.target_FG3[frame, number]

    def position(self, name: str) -> np.ndarray:
        """Position (3,) in m."""
        return self._positions[name]
