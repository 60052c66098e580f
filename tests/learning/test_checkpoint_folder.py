"""Protects checkpoints of several ranks from kills and full disks: a name leads to a complete one, whatever happens."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import distributed

from dtvla.callbacks.checkpoint import AtomicCheckpointIO, read_step
from dtvla.errors import UserError
from dtvla.learning.checkpoint_folder import MOMENTS, SHARDS, WEIGHTS, FolderWriter, read_shards

SIZE = 400_000


def test_a_name_leads_to_a_complete_checkpoint_at_whatever_moment_the_training_is_killed(tmp_path: Path) -> None:
    last = tmp_path / "last.ckpt"
    for attempt in range(4):  # each finds what the kill before has left
        before = read_step(last) if last.exists() else 0
        with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
            on_ranks(1, _save_until_killed, last, before, 0.05 + 0.13 * attempt)
        step = read_step(last)
        assert step > before
        assert bool((read_shards(last, WEIGHTS)["weight"] == step).all())
        assert len(list((tmp_path / SHARDS).iterdir())) <= 3  # the last, the one before, the one that was begun


def _save_until_killed(rank: int, path: Path, step: int, seconds: float) -> None:
    distributed.init_process_group("gloo")
    writer = FolderWriter()
    for first in (step + 1, step + 2):
        writer.start(path, _tensors(first), {"global_step": first})
    writer.finish()
    killer = os.fork()
    if killer == 0:
        time.sleep(seconds)
        os.kill(os.getppid(), signal.SIGKILL)
        os._exit(0)
    for later in range(step + 3, step + 10_000):
        writer.start(path, _tensors(later), {"global_step": later})


def test_writing_goes_on_behind_and_a_full_disk_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    on_ranks(1, _write_and_fail, tmp_path)
    assert (tmp_path / "done").exists()


def _write_and_fail(rank: int, folder: Path) -> None:
    distributed.init_process_group("gloo")
    writer, last = FolderWriter(), folder / "last.ckpt"
    tensors = _tensors(1)
    writer.start(last, tensors, {"global_step": 1})
    tensors[WEIGHTS]["weight"].zero_()  # the training's next step: what is written is a copy
    writer.name(folder / "best.ckpt", {"value": 0.5})
    writer.finish()
    assert bool((read_shards(last, WEIGHTS)["weight"] == 1).all())
    assert read_shards(last, MOMENTS) == {"weight": {"step": torch.tensor(1.0)}}
    writer.start(last, _tensors(2), {"global_step": 2})
    writer.finish()
    assert (folder / "best.json").read_text() == '{\n  "value": 0.5\n}\n'
    assert [read_step(folder / name) for name in ("best.ckpt", "last.ckpt")] == [1, 2]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    writer.start(last, _tensors(3), {"global_step": 3})
    with pytest.raises(UserError, match=r"last\.ckpt: not saved .*resume=true"):
        writer.finish()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_step(last) == 2
    AtomicCheckpointIO().save_checkpoint({"global_step": 4}, last)  # one process continues
    assert read_step(last) == 4
    assert list((folder / SHARDS).iterdir()) == [(folder / "best.ckpt").resolve()]
    (folder / "done").touch()


def test_missing_shards_are_named(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").mkdir()
    with pytest.raises(UserError, match=r"last\.ckpt: not a readable checkpoint"):
        read_step(tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=r"last\.ckpt: not a readable checkpoint"):
        read_shards(tmp_path / "last.ckpt", WEIGHTS)


def _tensors(step: int) -> dict[str, dict[str, Any]]:
    weight, moment = torch.full((SIZE,), float(step)), torch.tensor(float(step))
    return {WEIGHTS: {"weight": weight}, MOMENTS: {"weight": {"step": moment}}}
