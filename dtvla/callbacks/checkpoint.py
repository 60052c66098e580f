"""Checkpoints from which an interrupted training continues as if nothing had happened."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from dtvla.callbacks import stopping
from dtvla.errors import UserError

LAST = "last.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, syncs it to disk and renames it: a kill never leaves half a file."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save ``checkpoint`` under ``path``.

        Raises:
            UserError: the file can't be written, for example on a full disk; the previous one stays.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{target.name}.tmp")
        try:
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except (OSError, RuntimeError) as error:  # torch's writer wraps the system's error
            reason = str(error).splitlines()[0]
            raise UserError(f"{target}: not saved ({reason}); make room and continue with resume=true") from error
        finally:
            temporary.unlink(missing_ok=True)


def read_step(path: Path) -> int:
    """Return the optimiser steps that a checkpoint has behind it, without reading its tensors into memory.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"])
    except (RuntimeError, OSError, KeyError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a readable checkpoint ({reason}); train under another name=...") from None


class ResumeCheckpoint(Checkpoint):
    """Saves ``last.ckpt`` every k steps, before each validation, at the end, and when the process is asked to stop.

    It always saves between two training steps, so a checkpoint is a complete state: weights, optimiser, schedule,
    progress. Random numbers need no saving: data and dropout are functions of (seed, step). SIGTERM (a preemption)
    saves at the end of the running step, on all ranks of which one got it, and stops the training.
    """

    def __init__(self, folder: str, every_n_steps: int = 500, keep_every_n_steps: int | None = None) -> None:
        """Set where and how often.

        Args:
            folder: where ``last.ckpt`` lives.
            every_n_steps: steps between two savings of ``last.ckpt``.
            keep_every_n_steps: steps between checkpoints that are kept as ``step-<n>.ckpt``; None keeps none.
        """
        super().__init__()
        self.folder = Path(folder)
        self.every_n_steps = every_n_steps
        self.keep_every_n_steps = keep_every_n_steps
        self._stop = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Expect SIGTERM."""
        stopping.listen(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop all ranks behind the step that was saved, now that its metrics are logged."""
        if self._stop:
            raise SIGTERMException

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when it is time, or when the process was asked to stop."""
        step = trainer.global_step
        due = step % self.every_n_steps == 0 or step == trainer.max_steps or _validation_follows(trainer)
        self._stop = stopping.agreed(trainer)
        if due or self._stop:
            trainer.save_checkpoint(self.folder / LAST)
        if self.keep_every_n_steps and step % self.keep_every_n_steps == 0:
            trainer.save_checkpoint(self.folder / f"step-{step:07d}.ckpt")


def _validation_follows(trainer: Trainer) -> bool:
    every = trainer.val_check_batch
    return trainer.enable_validation and isinstance(every, int) and trainer.global_step % every == 0
