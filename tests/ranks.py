"""Trainings on several real processes that talk by gloo; libraries are imported once for all of them."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing
from forked import prepare, server
from hydra import compose, initialize_config_dir

from dtvla.cli import config_dir
from dtvla.learning.experiment import train

ON_CPU = ("trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true")


def on_ranks(count: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call ``function(rank, *arguments)`` on so many processes; raises what they raise."""
    server()
    arguments = (count, free_port(), function, arguments)
    torch.multiprocessing.start_processes(_call, arguments, count, start_method="forkserver")


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_of(rank: int, count: int, port: int) -> dict[str, str]:
    """The environment that makes a process one of so many ranks, which meet at a port."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    return {**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)}


def train_on(count: int, *trainings: list[str]) -> None:
    """Run trainings one after the other, each on all of so many processes."""
    on_ranks(count, _train, trainings)


def run(*overrides: str) -> float | None:
    """Train in this process."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return train(compose("train", overrides=list(overrides)))


def interrupted(folder: Path, step: int, name: str) -> Path:
    """A copy of a finished run's folder as it was behind an earlier step, of which there is a checkpoint."""
    copy = folder.with_name(name)
    shutil.copytree(folder, copy, symlinks=True, ignore=shutil.ignore_patterns("policy", "result.json", "best.*"))
    os.replace(copy / "checkpoints" / f"step-{step:07d}.ckpt", copy / "checkpoints" / "last.ckpt")
    return copy


def _call(rank: int, count: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    prepare()
    os.environ.update(rank_of(rank, count, port))
    function(rank, *arguments)


def _train(rank: int, trainings: tuple[list[str], ...]) -> None:
    for overrides in trainings:
        run(*overrides)
