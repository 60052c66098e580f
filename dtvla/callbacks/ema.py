"""Averaged weights (an exponential moving average over steps) for validation and for the trained policy."""

from __future__ import annotations

import warnings
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging

from dtvla.errors import UserError
from dtvla.learning.strategies import ShardedStrategy
from dtvla.policy.adapters import has_adapter


class EMA(EMAWeightAveraging):
    """Lightning's average, also of a training that is resumed behind its last step.

    Checkpoints hold both: the averaged weights, which an export takes, and those that training goes on with. Rollouts
    during training act with the latter.
    """

    def __init__(self, decay: float = 0.999, every_n_steps: int = 1, start_step: int = 0) -> None:
        """Set the average.

        Args:
            decay: share of the average that an update keeps.
            every_n_steps: steps between two updates.
            start_step: steps before the first one; there the average begins.

        Raises:
            UserError: a value is out of range.
        """
        if not 0 < decay < 1 or every_n_steps < 1 or start_step < 0:
            found = f"{decay}, {every_n_steps}, {start_step}"
            raise UserError(
                f"callbacks.ema: decay, every_n_steps, start_step: found {found}; use a share, >= 1 and >= 0"
            )
        super().__init__(
            use_buffers=False, decay=decay, update_every_n_steps=every_n_steps, update_starting_at_step=start_step
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the average; :class:`UserError` for weights that it can't be taken of."""
        if isinstance(trainer.strategy, ShardedStrategy):
            raise UserError("callbacks.ema: not for weights that are shared out; use trainer=ddp, or leave it out")
        model: Any = pl_module.model
        if has_adapter(model):
            raise UserError("callbacks.ema: not for adapters; leave it out, or use model/lora=none")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*WeightAveraging doesn't support sharding.*")
            super().setup(trainer, pl_module, stage)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for :meth:`on_fit_end`: a training that has no step left to do does not come here."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the averaged weights in the model."""
        if trainer.global_step == trainer.max_steps:
            self._copy_average_to_current(pl_module)
