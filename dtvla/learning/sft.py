"""Supervised fine-tuning of a thinking policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dtvla.errors import UserError
from dtvla.learning.metrics import TokenMetrics
from dtvla.learning.module import PolicyModule
from dtvla.policy.layout import Batch
from dtvla.policy.loss import LossSums, sft_loss

if TYPE_CHECKING:
    from dtvla.learning.optim import OptimizerSettings
    from dtvla.policy.policy import Policy


class SFTModule(PolicyModule):
    """Next-token cross entropy over thoughts and actions, averaged over all supervised tokens of the whole batch.

    Each part of a batch adds (sum of its token losses) / (tokens of the whole batch, over all ranks). The published
    trainer averages the means of its micro-batches instead.
    """

    def __init__(
        self,
        policy: Policy,
        optimizer: OptimizerSettings,
        *,
        data_fingerprint: str = "",
        seed: int = 0,
        action_smoothing_bins: float = 0.0,
        acts: bool = True,
    ) -> None:
        """See :class:`~dtvla.learning.module.PolicyModule`.

        Args:
            policy: model and processor.
            optimizer: settings of AdamW and its schedule.
            data_fingerprint: of the dataset.
            seed: of dropout.
            action_smoothing_bins: see :func:`dtvla.policy.loss.sft_loss`; training only.
            acts: whether batches have actions; without them there are metrics of thoughts alone.

        Raises:
            UserError: a setting is out of range, or nothing is left to train.
        """
        if action_smoothing_bins < 0:
            raise UserError(f"algorithm.loss.action_smoothing_bins: {action_smoothing_bins} is negative")
        super().__init__(policy, optimizer, data_fingerprint=data_fingerprint, seed=seed)
        self.action_smoothing_bins, self.acts = action_smoothing_bins, acts
        self.train_metrics = TokenMetrics(policy.processor.normalizer)
        self.val_metrics = TokenMetrics(policy.processor.normalizer)

    def training_step(self, batch: list[Batch], batch_idx: int) -> None:
        """One optimiser step."""
        norm, rates = self.update(batch, self.loss_of(batch))
        if self.global_step % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._log_window(norm, rates)

    def loss_of(self, batch: Sequence[Batch]) -> Callable[[Batch], Tensor]:
        """What each part of a batch, of which these are this rank's, adds to its loss."""
        tokens = torch.tensor(sum(part.tokens for part in batch), device=self.device)
        if self._trainer is not None:
            tokens = self.trainer.strategy.reduce(tokens, reduce_op="sum")

        def loss(part: Batch) -> Tensor:
            sums = self._sums(part, self.action_smoothing_bins)
            self.train_metrics.update(sums)
            return sums.cross_entropy / tokens

        return loss

    def validation_step(self, batch: list[Batch], batch_idx: int) -> None:
        """Add a batch of held-out frames to the validation metrics."""
        for part in batch:
            self.val_metrics.update(self._sums(part, 0.0))

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        values = self._take(self.val_metrics, "val")
        self.log_dict({**values, "step": float(self.global_step)})
        shown = "action_l1" if self.acts else "thought_accuracy"
        self.log(f"val_{shown}", values[f"val/{shown}"], prog_bar=True, logger=False)
        self.validated_step = self.global_step

    def _sums(self, batch: Batch, smoothing: float) -> LossSums:
        return sft_loss(self.model, batch, self.policy.processor.layout.bins, action_smoothing_bins=smoothing)

    def _take(self, metrics: TokenMetrics, prefix: str) -> dict[str, Any]:
        """Metrics since the last time, without those of actions where there are none."""
        found = metrics.compute()
        metrics.reset()
        return {f"{prefix}/{name}": found[name] for name in found if self.acts or not name.startswith("action_")}

    def _log_window(self, norm: Tensor, rates: dict[str, float]) -> None:
        values = self._take(self.train_metrics, "train")
        self.log_dict({**values, **rates, "train/grad_norm": norm, "step": float(self.global_step)})
        self.log("loss", values["train/loss"], prog_bar=True, logger=False)
