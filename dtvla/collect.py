"""Entry point: demonstrations as a LeRobot dataset, by the scripted expert with thoughts or from LIBERO's own files."""

from __future__ import annotations

import time
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
    from dtvla.data.expert_source import ExpertRequest
    from dtvla.data.hdf5_source import ReplayRequest


def request_from(cfg: DictConfig) -> CollectionRequest:
    """The validated request of a configuration.

    Raises:
        UserError: unknown source, suite or task, a task that the expert can't do, an init state that does not exist,
            recordings that can't be replayed.
    """
    common = {
        "render": str(cfg.render),
        "image_size": int(cfg.env.image_size),
        "settle_steps": int(cfg.env.settle_steps),
    }
    if cfg.source == "hdf5":
        return _replay_request(cfg, common)
    if cfg.source != "expert":
        raise UserError(f"source: {cfg.source!r} is unknown; use expert or hdf5")
    if cfg.demos is not None:
        raise UserError(f"demos: {cfg.demos} is not read by source=expert; add source=hdf5, or leave demos out")
    return _expert_request(cfg, common)


def _replay_request(cfg: DictConfig, common: dict[str, Any]) -> ReplayRequest:
    from dtvla.data.hdf5_source import replay_request

    if cfg.demos is None:
        raise UserError("demos: source=hdf5 needs a file or folder of LIBERO's demonstrations; set demos=...")
    return replay_request(
        Path(cfg.demos).expanduser(),
        str(cfg.env.suite),
        None if cfg.env.task_ids is None else list(cfg.env.task_ids),
        cfg.max_demos,
        noop_threshold=cfg.noop_threshold,
        failed_replays=str(cfg.failed_replays),
        **common,
    )


def _expert_request(cfg: DictConfig, common: dict[str, Any]) -> ExpertRequest:
    from dtvla.data.expert_source import ExpertRequest
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
    return ExpertRequest(
        suite=suite,
        task_ids=tuple(task.task_id for task in tasks),
        episodes=int(cfg.episodes),
        init_states=tuple(int(i) for i in cfg.init_states),
        seed=int(cfg.seed),
        max_steps=int(cfg.max_steps),
        max_attempts=int(cfg.max_attempts),
        **common,
    )


def collect(request: CollectionRequest, root: Path, workers: str | int = "auto") -> dict[str, Any]:
    """Record what is missing of ``request`` and write the dataset to ``root``.

    Returns:
        The record that is stored as ``meta/collection.json``.

    Raises:
        UserError: ``root`` is taken, the disk is full, the expert keeps failing, no replay succeeds, a worker died.
    """
    from dtvla.data.collection import Workspace
    from dtvla.data.collection_record import summary
    from dtvla.data.collection_worker import DISK_FULL, disk_full

    workspace = Workspace(root, request)
    if (record := workspace.finished()) is not None:
        print(f"{root}: already collected, {summary(record)}")
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
    solved = sum(source.success for source in staged.values())
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
            for future in as_completed([pool.submit(record_episode, plan) for plan in missing]):
                tries, solved = tries + 1 + future.result().attempt, solved + future.result().success
                rate = f"success {100 * solved / tries:.0f} %"
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
    from dtvla.data.collection_record import collection_record
    from dtvla.data.recording import write_dataset
    from dtvla.data.staging import StagedEpisode, episode_path

    sources = list(workspace.staged().values())
    kept = [source for source in sources if source.dropped is None]
    if not kept:
        raise UserError(
            f"demos: none of {len(sources)} replays belongs into a dataset (the first: {sources[0].dropped}); "
            f"were they recorded with this suite and MuJoCo? To try others, delete {workspace.folder}"
        )
    record = collection_record(workspace.request, sources, command_line("collect"), seconds)
    paths = (episode_path(workspace.folder, source.episode_index) for source in kept)
    write_dataset(workspace.assembly, (StagedEpisode.load(path) for path in paths), record)
    return record


def default_root(data_dir: Path, request: CollectionRequest) -> Path:
    """Where a dataset goes unless ``root`` says otherwise: ``<suite>_<task ids>``, ``<suite>_replayed_<task ids>``."""
    from dtvla.data.hdf5_source import ReplayRequest

    kind = ["replayed"] if isinstance(request, ReplayRequest) else []
    return data_dir / "_".join([request.suite, *kind, *map(str, request.task_ids)])


@entry("collect")
def main(cfg: DictConfig) -> None:
    """``python -m dtvla.collect env=libero_object env.task_ids=[0] episodes=50``, or ``source=hdf5 demos=...``."""
    request = request_from(cfg)
    root = Path(cfg.root) if cfg.root else default_root(Path(cfg.paths.data), request)
    collect(request, root, cfg.workers)


if __name__ == "__main__":
    main()
