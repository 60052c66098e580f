"""Processes from outside: processor time, memory, and the cores that they may use. Linux."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process

import psutil

from dtvla.errors import UserError

MIB = 2**20


def memory(pid: int) -> dict[str, float]:
    """Memory of a process in MiB.

    Returns:
        ``pss``: proportional set size, in which a page that k processes share counts 1/k; ``rss``; and the parts of
        ``pss``: ``heap``, ``anonymous`` (large blocks, OpenGL's too), ``files`` (libraries), ``shared`` memory.
    """
    parts = dict.fromkeys(("heap", "anonymous", "files", "shared"), 0.0)
    resident = 0
    for region in psutil.Process(pid).memory_maps(grouped=False):
        parts[_kind(region.path)] += region.pss / MIB
        resident += region.rss
    found = {"pss": sum(parts.values()), "rss": resident / MIB, **parts}
    return {name: round(value, 1) for name, value in found.items()}


def _kind(path: str) -> str:
    if path == "[heap]":
        return "heap"
    if path.startswith(("/dev/shm/", "/memfd:", "/SYSV")):
        return "shared"
    return "files" if path.startswith("/") else "anonymous"


def cpu_seconds(pids: Sequence[int]) -> float:
    """Processor seconds that these processes have used so far, all threads, user and system; ticks of 10 ms."""
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return float(sum(t.user + t.system for t in times))


def usable_cores() -> list[int]:
    """Cores that this process may use.

    Raises:
        UserError: the system cannot hold processes to cores.
    """
    if sys.platform != "linux":
        raise UserError(f"benchmark: rollout needs Linux, which can hold processes to cores; this is {sys.platform}")
    return sorted(os.sched_getaffinity(0))


@contextmanager
def held_to(cores: Sequence[int]) -> Iterator[None]:
    """Processes started inside may use these cores only, threads of their renderers included."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def in_child[**P, T](function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function of a module in a fresh process: simulators leave memory and OpenGL behind."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_end_with_parent) as executor:
        return executor.submit(function, *args, **kwargs).result()


def _end_with_parent() -> None:
    def wait() -> None:
        if parent := parent_process():
            parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
