"""Protects checkpoints: whole or absent, and safe to load."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from dtvla.callbacks.checkpoint import AtomicCheckpointIO, read_step
from dtvla.errors import UserError


def test_a_saved_checkpoint_loads_without_unpickling_code(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "last.ckpt"
    weight = torch.randn(3, 4)
    AtomicCheckpointIO().save_checkpoint({"global_step": 7, "state_dict": {"weight": weight}}, path)
    assert read_step(path) == 7
    assert torch.equal(torch.load(path, weights_only=True)["state_dict"]["weight"], weight)
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"global_step": 1}, path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"last\.ckpt.*resume=true"):
            AtomicCheckpointIO().save_checkpoint({"global_step": 2, "weight": torch.randn(1_000_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert read_step(path) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_torn_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(UserError, match=r"last\.ckpt"):
        read_step(path)
