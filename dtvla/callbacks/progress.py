"""A progress bar that shows the phase, the speed and the time left of the whole training."""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

TERMINAL_INTERVAL_S = 0.2
FILE_INTERVAL_S = 15.0
BAR_FORMAT = "{desc:9}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"


class PhaseProgressBar(ProgressBar):
    """One bar over all optimiser steps, and a second, passing one for validation and rollouts.

    A resumed training continues the bar where it stopped. The time left counts validations in. Into a file or a pipe
    the bar writes a line every 15 s.
    """

    def __init__(self) -> None:
        """Start without bars; they open with their phase."""
        super().__init__()
        self._enabled = True
        self._train: tqdm[Any] | None = None
        self._phase: tqdm[Any] | None = None

    def disable(self) -> None:
        """Show nothing (Lightning calls this on ranks above 0)."""
        self._enabled = False

    def enable(self) -> None:
        """Show bars again."""
        self._enabled = True

    def open_phase(self, name: str, total: int | None) -> tqdm[Any]:
        """Open the passing bar, for example of a rollout; the caller updates it and closes it."""
        return self._bar(name, total, leave=False, position=0 if self._train is None else 1)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print a line above the bars."""
        if self._enabled:
            tqdm.write(" ".join(str(arg) for arg in args), file=sys.stdout)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar at the step that the training starts from."""
        self._train = self._bar("train", trainer.max_steps, initial=trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance by one step."""
        if self._train is not None:
            self._train.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
            self._train.update(1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar at its last value."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bars so that the message starts on a line of its own."""
        self._close()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the passing bar over the validation batches."""
        batches = sum(trainer.num_val_batches)
        self._phase = self.open_phase("validate", int(batches) if batches != float("inf") else None)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Advance by one validation batch."""
        if self._phase is not None:
            self._phase.update(1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the passing bar."""
        if self._phase is not None:
            self._phase.close()
            self._phase = None

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The progress-bar metrics under their short names, in three digits, without the logger's version number."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {name.split("/", 1)[-1]: _three_digits(value) for name, value in metrics.items()}

    def _close(self) -> None:
        for bar in (self._phase, self._train):
            if bar is not None:
                bar.close()
        self._phase = self._train = None

    def _bar(self, name: str, total: int | None, **options: Any) -> tqdm[Any]:
        interval = TERMINAL_INTERVAL_S if sys.stdout.isatty() else FILE_INTERVAL_S
        return tqdm(
            desc=name,
            total=total,
            mininterval=interval,
            maxinterval=interval,
            smoothing=0,
            dynamic_ncols=True,
            file=sys.stdout,
            disable=not self._enabled,
            bar_format=BAR_FORMAT,
            **options,
        )


def _three_digits(value: Any) -> str:
    return f"{value:.0f}" if isinstance(value, float | int) and abs(value) >= 1000 else f"{value:.3g}"
