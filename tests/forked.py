"""Processes that are forked where the libraries are imported already, and dtvla's commands in such processes.

Importing torch, Lightning and transformers takes ten seconds. A server does it once for all tests of a pytest process.
Each command is started by ``python -m`` itself somewhere in the tests, too.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from contextlib import suppress
from multiprocessing.context import ForkServerContext
from pathlib import Path

import torch

PRELOADED = (
    *("hydra", "pytest", "lightning.pytorch", "peft", "transformers.models.paligemma.modeling_paligemma"),
    *("matplotlib.pyplot", "tensorboard", "torch.utils.tensorboard", "torch.distributed.fsdp", "dtvla.data.datamodule"),
    *("dtvla.learning.sft", "dtvla.learning.experiment", "dtvla.policy.policy", "dtvla.callbacks.checkpoint"),
)


def server() -> ForkServerContext:
    """What starts such processes; the server itself starts with the first of them."""
    multiprocessing.set_forkserver_preload(list(PRELOADED))
    return multiprocessing.get_context("forkserver")


def prepare(threads: int = 1) -> None:
    """Make the forked process one like any other, in which torch calculates on so many threads."""
    torch.set_num_threads(threads)
    multiprocessing.set_start_method("fork", force=True)  # of loader processes, as everywhere else


class Command:
    """``dtvla <name> <options>`` in this environment and more, running in a session of its own."""

    def __init__(self, name: str, *options: str, **environment: str):
        self._folder = tempfile.TemporaryDirectory(prefix=f"dtvla-{name}-")
        self._written = [Path(self._folder.name) / kind for kind in ("output", "errors")]
        settings = ({**os.environ, **environment}, torch.get_num_threads())
        self._process = server().Process(target=_run, args=(name, options, self._written, *settings))
        self._process.start()

    @property
    def pid(self) -> int:
        """Of the process, and of its group and session."""
        assert self._process.pid
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; minus the number of the signal that ended it."""
        return self._process.exitcode

    def written(self) -> tuple[str, str]:
        """Its output and its errors so far."""
        output, errors = (path.read_text() if path.exists() else "" for path in self._written)
        return output, errors

    def wait(self, timeout: float) -> tuple[str, str]:
        """Its output and its errors when it has ended."""
        self._process.join(timeout)
        assert self.returncode is not None, f"it runs after {timeout:g} s: {self.written()}"
        return self.written()

    def end(self) -> None:
        """Kill -9 its process group, whatever is left of it."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.join()


def _run(name: str, options: tuple[str, ...], written: list[Path], environment: dict[str, str], threads: int) -> None:
    os.setsid()
    for descriptor, path in enumerate(written, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    prepare(threads)
    sys.argv = [name, *options]
    try:
        runpy.run_module(f"dtvla.{name}", run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends a forked process without them
