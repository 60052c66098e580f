"""How many processes to start on this machine."""

import os
from typing import Any

from dtvla.errors import UserError


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def positive(name: str, setting: Any) -> int:
    """The value of a setting that is a number from 1 on, or "auto", which the caller has dealt with.

    Raises:
        UserError: it is neither.
    """
    if not isinstance(setting, int) or setting < 1:
        raise UserError(f"{name}: {setting!r} is not a number from 1 on; use auto or 1, 2, ...")
    return setting


def worker_count(setting: int | str, episodes: int, processes: int = 1) -> int:
    """Number of simulator processes: `setting`, or the usable cores for "auto", at most one per episode.

    Args:
        setting: a number or "auto".
        episodes: how many will run.
        processes: dtvla's processes on this machine, which share its cores.

    Raises:
        UserError: neither a positive number nor "auto".
    """
    return min(episodes, max(1, usable_cores() // processes) if setting == "auto" else positive("workers", setting))
