"""How fast training is: samples and tokens per second."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from dtvla.policy.layout import Batch, Segment


class Throughput(Callback):
    """Logs samples/s and tokens/s over windows of ``trainer.log_every_n_steps`` steps.

    The clock runs from the end of one step to the end of the next, waiting for data included, and stands still during
    validation and rollouts. Padding is not counted. With several ranks the figures are those of all ranks together.
    """

    def __init__(self) -> None:
        """Start with an empty window."""
        self._since: float | None = None
        self._samples = 0
        self._tokens = torch.zeros((), dtype=torch.int64)
        self._seconds = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count the batch, and log when the window is full. The first step of all only starts the clock."""
        now = time.monotonic()
        if self._since is not None:
            self._seconds += now - self._since
            self._samples += len(batch)
            self._tokens = self._tokens + (batch.segment_BT != Segment.PAD).sum()
        self._since = now
        if trainer.global_step % trainer.log_every_n_steps == 0 and self._seconds > 0:  # type: ignore[attr-defined]
            per_second = trainer.world_size / self._seconds
            pl_module.log("throughput/samples_per_s", self._samples * per_second, prog_bar=True)
            pl_module.log("throughput/tokens_per_s", float(self._tokens) * per_second)
            self._samples, self._tokens, self._seconds = 0, torch.zeros_like(self._tokens), 0.0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self.stop()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock again."""
        self.start()

    def stop(self) -> None:
        """Add the time since the last step to the window and stop the clock."""
        if self._since is not None:
            self._seconds += time.monotonic() - self._since
        self._since = None

    def start(self) -> None:
        """Let the next step count from now."""
        self._since = time.monotonic()


@contextmanager
def clock_stopped(trainer: Trainer) -> Iterator[None]:
    """Keep whatever happens inside (rollouts) out of the training throughput."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    clocks = [callback for callback in callbacks if isinstance(callback, Throughput)]
    for clock in clocks:
        clock.stop()
    try:
        yield
    finally:
        for clock in clocks:
            clock.start()
