"""Checkpoints from which an interrupted training continues as if nothing had happened."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from dtvla.callbacks import stopping
from dtvla.errors import UserError
from dtvla.learning import checkpoint_folder as folders
from dtvla.learning.strategies import ShardedStrategy

LAST, BEST = "last.ckpt", "best.ckpt"


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
            folders.write_file(temporary, checkpoint)
            os.replace(temporary, target)
        except (OSError, RuntimeError) as error:  # torch's writer wraps the system's error
            reason = str(error).splitlines()[0]
            raise UserError(f"{target}: not saved ({reason}); make room and continue with resume=true") from error
        finally:
            temporary.unlink(missing_ok=True)
        folders.remove_nameless(target.parent)

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        """Load a file, or what several ranks wrote, put together; :class:`UserError` when it is damaged."""
        path = Path(path)
        if not path.is_dir():
            return super().load_checkpoint(path, weights_only=weights_only)
        rest = folders.read_meta(path)
        moments = folders.read_shards(path, folders.MOMENTS)
        state = folders.numbered(moments, rest.pop(folders.GROUPS))
        return {**rest, "state_dict": folders.read_weights(path), "optimizer_states": [state]}


def read_step(path: Path) -> int:
    """Return the optimiser steps that a checkpoint has behind it, without reading its tensors into memory.

    Raises:
        UserError: the file is damaged.
    """
    return int(folders.read_meta(path, **({} if path.is_dir() else {"mmap": True}))["global_step"])


class ResumeCheckpoint(Checkpoint):
    """Saves ``last.ckpt`` every k steps, before each validation, at the end, and when the process is asked to stop.

    It always saves between two training steps, so a checkpoint is a complete state: weights, optimiser, schedule,
    progress. Random numbers need no saving: data and dropout are functions of (seed, step). SIGTERM (a preemption)
    saves at the end of the running step, on all ranks of which one got it, and stops the training. Other checkpoints
    are further names of what was once the last one.
    """

    def __init__(
        self,
        folder: str,
        every_n_steps: int = 500,
        keep_every_n_steps: int | None = None,
        keep_most: int | None = None,
        monitor: str | None = None,
    ) -> None:
        """Set where and how often.

        Args:
            folder: where ``last.ckpt`` lives.
            every_n_steps: steps between two savings of ``last.ckpt``.
            keep_every_n_steps: steps between checkpoints that are kept as ``step-<n>.ckpt``; None keeps none.
            keep_most: how many of these, the latest; None for all.
            monitor: metric of validations whose smallest value so far makes ``best.ckpt``, which ``best.json``
                describes; None for no such checkpoint.

        Raises:
            UserError: a number is below 1.
        """
        super().__init__()
        numbers = {"every_n_steps": every_n_steps, "keep_every_n_steps": keep_every_n_steps, "keep_most": keep_most}
        for name, number in numbers.items():
            if number is not None and number < 1:
                raise UserError(f"callbacks.checkpoint.{name}: {number} is below 1")
        self.folder = Path(folder)
        self.every_n_steps, self.keep_every_n_steps, self.keep_most = every_n_steps, keep_every_n_steps, keep_most
        self.monitor = monitor
        self._stop = False
        self._saved_step = -1
        self._best: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Expect SIGTERM."""
        stopping.listen(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop all ranks behind the step that was saved, now that its metrics are logged."""
        if self._stop:
            if isinstance(trainer.strategy, ShardedStrategy):
                trainer.strategy.writer.finish()
            raise SIGTERMException

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when it is time, or when the process was asked to stop."""
        step = trainer.global_step
        keep = self.keep_every_n_steps is not None and step % self.keep_every_n_steps == 0
        due = step % self.every_n_steps == 0 or step == trainer.max_steps or _validation_follows(trainer)
        self._stop = stopping.agreed(trainer)
        if isinstance(trainer.strategy, ShardedStrategy):
            trainer.strategy.writer.poll()
        if due or keep or self._stop:
            trainer.save_checkpoint(self.folder / LAST)
            self._saved_step = step
        if keep:
            self._name(trainer, f"step-{step:07d}.ckpt")
            if self.keep_most is not None and trainer.is_global_zero:
                for old in sorted(self.folder.glob("step-*.ckpt"))[: -self.keep_most]:
                    old.unlink()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the checkpoint from before the validation if it is the best so far.

        Raises:
            UserError: the metric was not measured.
        """
        if self.monitor is None or trainer.sanity_checking or self._saved_step != trainer.global_step:
            return
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(name for name in sorted(trainer.callback_metrics) if name.startswith("val/")) or "none"
            raise UserError(
                f"callbacks.checkpoint.monitor: {self.monitor!r} was not measured; use null or one of {known}"
            )
        value = float(trainer.callback_metrics[self.monitor])
        if value < self._best_so_far():
            self._best = value
            self._name(trainer, BEST, {"step": trainer.global_step, "monitor": self.monitor, "value": value})

    def _best_so_far(self) -> float:
        """Of this training or the one that it continues; infinite when there was none, or it had another monitor."""
        if self._best is None:
            file = (self.folder / BEST).with_suffix(".json")
            facts = json.loads(file.read_text()) if file.is_file() else {}
            self._best = float(facts["value"]) if facts.get("monitor") == self.monitor else math.inf
        return self._best

    def _name(self, trainer: Trainer, name: str, facts: dict[str, Any] | None = None) -> None:
        """Give the last checkpoint another name, which later ones do not take away."""
        if isinstance(trainer.strategy, ShardedStrategy):
            trainer.strategy.writer.name(self.folder / name, facts)
        elif trainer.is_global_zero:
            folders.set_name(self.folder / name, self.folder / LAST, facts)


def _validation_follows(trainer: Trainer) -> bool:
    every = trainer.val_check_batch
    return trainer.enable_validation and isinstance(every, int) and trainer.global_step % every == 0
