"""LIBERO's own demonstrations on disk: one hdf5 file per task, checked and read.

A file is named ``<task name>_demo.hdf5`` and holds ``data/demo_<i>`` with ``actions`` (T, 7) and ``states``
(T, 1 + nq + nv), the simulation before each action. Its pictures are small and its other arrays follow from these two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dtvla.errors import UserError
from dtvla.sim.settings import ACTION_DIM

if TYPE_CHECKING:
    from dtvla.sim.suites import Task

ENDING = "_demo.hdf5"


@dataclass(frozen=True)
class DemoFile:
    """The recordings of one task that shall be replayed.

    Attributes:
        task_id: the task.
        path: the file.
        demos: names of the recordings, in the order of their numbers.
        lengths: how many actions each holds.
    """

    task_id: int
    path: Path
    demos: tuple[str, ...]
    lengths: tuple[int, ...]


def find_files(demos: Path, suite: str, task_ids: Sequence[int] | None) -> dict[int, Path]:
    """The file of each wanted task.

    Args:
        demos: a file, a folder of files, or a folder with a folder of files for each suite.
        suite: name of the suite.
        task_ids: wanted tasks; None takes the file's task, or all tasks of the suite for a folder.

    Raises:
        UserError: nothing there, a file that is not of this suite, or a wanted task without a file.
    """
    from dtvla.sim.suites import get_tasks

    if not demos.exists():
        raise UserError(f"demos: {demos} does not exist; name a file or folder of LIBERO's demonstrations")
    folder = demos / suite if (demos / suite).is_dir() else demos
    files = [demos] if demos.is_file() else sorted(folder.glob(f"*{ENDING}"))
    if not files:
        raise UserError(f"demos: {folder} holds no file *{ENDING}; name the folder of LIBERO's demonstrations")
    tasks = get_tasks(suite, task_ids)
    by_name = {path.name.removesuffix(ENDING): path for path in files}
    if task_ids is None:
        unknown = [by_name[name].name for name in by_name if name not in {task.name for task in tasks}]
        if unknown:
            raise UserError(
                f"demos: {suite} has no task of the name of {unknown[0]} ({len(unknown)} such files); "
                "choose the suite with env=..., or name tasks with env.task_ids=[...]"
            )
        if demos.is_file():
            tasks = [task for task in tasks if task.name in by_name]
    missing = [task.task_id for task in tasks if task.name not in by_name]
    if missing:
        raise UserError(
            f"demos: {folder if demos.is_dir() else demos} has nothing for {suite} tasks {missing}; "
            "complete the download, or choose env.task_ids"
        )
    return {task.task_id: by_name[task.name] for task in tasks}


def read_index(path: Path, task: Task, limit: int | None) -> DemoFile:
    """Names and lengths of the recordings in a file, after a check of everything that a replay needs.

    Args:
        path: the file.
        task: its task.
        limit: the first so many recordings; None: all.

    Raises:
        UserError: a damaged file, missing keys, other shapes, numbers that are not finite; names the recording.
    """
    from dtvla.sim.suites import load_init_states

    size = load_init_states(task).shape[1]
    with _opened(path) as file:
        groups = file["data"] if isinstance(file.get("data"), Mapping) else {}
        names = [name for name in groups if name.removeprefix("demo_").isdecimal()]
        names = sorted(names, key=lambda name: int(name.removeprefix("demo_")))[:limit]
        if not names:
            raise UserError(f"demos: {path} holds no data/demo_0; it is not a file of LIBERO's demonstrations")
        lengths = [_check(groups[name], f"{path.name} {name}", size) for name in names]
    return DemoFile(task.task_id, path, tuple(names), tuple(lengths))


def read_demo(path: Path, demo: str) -> tuple[np.ndarray, np.ndarray]:
    """The first state, float64 (1 + nq + nv,), and the actions, float64 (T, 7), of a recording."""
    with _opened(path) as file:
        group = file[f"data/{demo}"]
        return np.asarray(group["states"][0], dtype=np.float64), np.asarray(group["actions"], dtype=np.float64)


def kept_actions(actions_T7: np.ndarray, threshold: float | None) -> np.ndarray:
    """The actions that do something, (K, 7).

    One is left out when its motion is shorter than ``threshold`` (the norm of its first six numbers, in action units)
    and the gripper is told what the action kept last told it; the first one by its motion alone. None keeps all.
    """
    if threshold is None:
        return actions_T7
    kept: list[np.ndarray] = []
    for action in actions_T7:
        resting = np.linalg.norm(action[:-1]) < threshold
        if not (resting and (not kept or action[-1] == kept[-1][-1])):
            kept.append(action)
    return np.array(kept).reshape(-1, ACTION_DIM)


def _check(group: Any, where: str, size: int) -> int:
    """Number of actions of a recording that can be replayed."""
    missing = [key for key in ("actions", "states") if not isinstance(group, Mapping) or key not in group]
    if missing:
        raise UserError(f"demos: {where} has no {' and no '.join(missing)}; download the file again")
    actions, states = group["actions"], group["states"]
    if actions.ndim != 2 or actions.shape[1] != ACTION_DIM or len(actions) == 0:
        raise UserError(f"demos: {where} has actions of shape {actions.shape}; a replay needs (T, {ACTION_DIM})")
    if states.ndim != 2 or states.shape[1] != size or len(states) == 0:
        raise UserError(
            f"demos: {where} has states of shape {states.shape}, the simulation of its task has {size} numbers; "
            "it was recorded with another LIBERO or belongs to another suite (env=...)"
        )
    for key, values in (("actions", actions[:]), ("states", states[:1])):
        if not np.isfinite(values).all():
            frame = int(np.argwhere(~np.isfinite(values))[0, 0])
            raise UserError(f"demos: {where} has {key} that are not finite (frame {frame}); remove or mend it")
    return len(actions)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    import h5py

    try:
        with h5py.File(path, "r", locking="best-effort") as file:
            yield file
    except OSError as error:
        raise UserError(f"demos: {path} can't be read ({error}); download it again") from None
