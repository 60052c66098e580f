"""Protects checkpoints: whole or absent, and safe to load."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from dtvla.callbacks.checkpoint import AtomicCheckpointIO, ResumeCheckpoint, read_step
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


class Counting(LightningModule):
    """Validates every second step; the measured values are given."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.values = values

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.optimizers().zero_grad()  # type: ignore[union-attr]
        self.manual_backward(self.weight)
        self.optimizers().step()  # type: ignore[union-attr]

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val/loss", self.values[self.global_step // 2 - 1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def train(callback: ResumeCheckpoint, values: list[float], steps: int, resume: Path | None = None) -> None:
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
        plugins=[AtomicCheckpointIO()],
    )
    loader = torch.utils.data.DataLoader(torch.zeros(100, 1))
    trainer.fit(Counting(values), loader, loader, ckpt_path=resume, weights_only=True)


def test_best_last_and_every_kth_are_kept_and_a_resume_compares_with_the_best(tmp_path: Path) -> None:
    def callback() -> ResumeCheckpoint:
        return ResumeCheckpoint(str(tmp_path), 1000, keep_every_n_steps=3, keep_most=2, monitor="val/loss")

    def steps() -> dict[str, int]:
        return {path.stem: read_step(path) for path in tmp_path.glob("*.ckpt")}

    train(callback(), [0.5, 0.3, 0.4], 6)
    kept = {"step-0000003": 3, "step-0000006": 6}
    assert steps() == {"best": 4, "last": 6, **kept}
    train(callback(), [0.0, 0.0, 0.0, 0.35, 0.2, 0.3], 8, tmp_path / "last.ckpt")
    assert steps() == {"best": 4, "last": 8, **kept}
    train(callback(), [0.0, 0.0, 0.0, 0.0, 0.2, 0.3], 12, tmp_path / "last.ckpt")
    assert steps() == {"best": 10, "last": 12, "step-0000009": 9, "step-0000012": 12}
    assert json.loads((tmp_path / "best.json").read_text()) == {
        "step": 10,
        "monitor": "val/loss",
        "value": pytest.approx(0.2),
    }
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["state_dict"]["weight"] == -10


def test_an_unknown_monitor_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"monitor: 'val/los' was not measured; use null or one of val/loss"):
        train(ResumeCheckpoint(str(tmp_path), monitor="val/los"), [0.5], 2)
    with pytest.raises(UserError, match=r"callbacks\.checkpoint\.keep_most: 0"):
        ResumeCheckpoint(str(tmp_path), keep_most=0)
