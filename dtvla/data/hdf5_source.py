"""LIBERO's own demonstrations as a source of episodes: replayed in the simulator and rendered anew."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtvla.data.collection import CollectionRequest, EpisodePlan
from dtvla.data.hdf5_files import DemoFile, find_files, kept_actions, read_demo, read_index
from dtvla.data.takes import Clock, Take
from dtvla.errors import UserError

if TYPE_CHECKING:
    from dtvla.sim.env import LiberoEnv


@dataclass(frozen=True, kw_only=True)
class ReplayRequest(CollectionRequest):
    """Recorded actions, replayed from the recording's first state.

    A replay begins with the settle steps, so that the scene is at rest as in an evaluation, and runs to its last
    action; what counts is whether the task is solved then. Recordings hold no thoughts.

    Attributes:
        files: the recordings.
        noop_threshold: motion below which an action is left out, see :func:`kept_actions`; None keeps all.
        failed_replays: "drop" or "keep" episodes whose replay does not solve the task.
    """

    files: tuple[DemoFile, ...]
    noop_threshold: float | None
    failed_replays: str

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        super().__post_init__()
        threshold = self.noop_threshold
        if threshold is not None and not (isinstance(threshold, int | float) and 0 <= threshold < 1):
            raise UserError(f"noop_threshold: found {threshold!r}; use 1e-4, as published, or null to keep all")
        if self.failed_replays not in ("drop", "keep"):
            raise UserError(f"failed_replays: {self.failed_replays!r} is unknown; use drop or keep")

    def plans(self) -> list[EpisodePlan]:
        """All recordings, task by task, in the order of their numbers."""
        recordings = [(file.task_id, number, demo) for file in self.files for number, demo in enumerate(file.demos)]
        return [EpisodePlan(i, task_id, number, demo=demo) for i, (task_id, number, demo) in enumerate(recordings)]

    def environment(self) -> dict[str, Any]:
        """Settings of an environment that runs every recording to its end."""
        longest = max(length for file in self.files for length in file.lengths)
        return {**super().environment(), "max_steps": longest, "ends_at_success": False}

    def perform(self, env: LiberoEnv, plan: EpisodePlan, clock: Clock) -> Take:
        """Replay a recording without its no-ops."""
        from dtvla.sim.env import SimulationDiverged

        assert plan.demo is not None
        path = next(file.path for file in self.files if file.task_id == plan.task_id)
        first_state, recorded_T7 = read_demo(path, plan.demo)
        actions_K7 = kept_actions(recorded_T7, self.noop_threshold)
        noops = len(recorded_T7) - len(actions_K7)
        take = Take(facts={"file": path.name, "demo": plan.demo, "noops": noops, "success": False})
        if len(actions_K7) == 0:
            take.dropped = "every action is a no-op"
            return take
        try:
            with clock("reset"):
                observation, info = env.reset(seed=0, options={"state": first_state})
            for action in actions_K7:
                take.add(observation, action, "")
                with clock("simulate_and_render"):
                    observation, _, _, _, info = env.step(action)
        except SimulationDiverged as error:
            take.dropped = str(error)
            return take
        take.facts["success"] = bool(info["success"])
        if not info["success"] and self.failed_replays == "drop":
            take.dropped = "the task was not solved at the end of the replay"
        return take

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; where the files lie does not matter."""
        sizes = {f.path.name: {"demos": len(f.demos), "actions": sum(f.lengths)} for f in self.files}
        return {**super().to_dict(), "files": sizes}


def replay_request(
    demos: Path, suite: str, task_ids: list[int] | None, max_demos: int | None, **settings: Any
) -> ReplayRequest:
    """The request for what ``demos`` holds of a suite, after a check of every file.

    Args:
        demos: a file or folder, see :func:`find_files`.
        suite: name of the suite.
        task_ids: wanted tasks; None: all that ``demos`` is for.
        max_demos: the first so many recordings of each task; None: all.
        settings: the other fields of the request.

    Raises:
        UserError: see :func:`find_files` and :func:`read_index`.
    """
    from dtvla.sim.suites import get_task

    if max_demos is not None and (not isinstance(max_demos, int) or max_demos < 1):
        raise UserError(f"max_demos: found {max_demos!r}; use 1 or more, or null for all")
    paths = find_files(demos, suite, task_ids)
    files = tuple(read_index(path, get_task(suite, task_id), max_demos) for task_id, path in paths.items())
    return ReplayRequest(suite=suite, task_ids=tuple(paths), files=files, **settings)
