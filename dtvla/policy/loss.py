"""The supervised loss as exact sums over tokens, so that micro-batching never changes a gradient."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional

from dtvla.policy.action_bins import ActionBins
from dtvla.policy.layout import Batch
from dtvla.policy.model import HybridVLA, supervised_positions


@dataclass
class LossSums:
    """Sums over the supervised tokens of a batch; sums of two batches add up to those of the joint batch.

    Attributes:
        cross_entropy: scalar with gradient; thought and action tokens weigh the same (published).
        tokens: number of supervised tokens.
        action_cross_entropy, action_correct, action_tokens: of the action slots (without gradient).
        thought_cross_entropy, thought_correct, thought_tokens: of all other supervised tokens, tags included.
        action_l1_D: per action dimension, sum of |predicted - true| over samples and steps, normalised units;
            the prediction is the most likely bin.
        action_count: samples times steps that ``action_l1_D`` sums over.
    """

    cross_entropy: Tensor
    tokens: Tensor
    action_cross_entropy: Tensor
    action_correct: Tensor
    action_tokens: Tensor
    thought_cross_entropy: Tensor
    thought_correct: Tensor
    thought_tokens: Tensor
    action_l1_D: Tensor
    action_count: Tensor

    def __add__(self, other: LossSums) -> LossSums:
        """Sums of both batches together."""
        return LossSums(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    @property
    def mean(self) -> Tensor:
        """Cross entropy per supervised token: the published loss of one micro-batch."""
        return self.cross_entropy / self.tokens.clamp(min=1)


def sft_loss(model: HybridVLA, batch: Batch, bins: ActionBins, *, action_smoothing_bins: float = 0.0) -> LossSums:
    """Next-token cross entropy over the full vocabulary, for thought and action tokens alike.

    Args:
        model: is called as a module, so that wrappers see their forward hooks.
        batch: with labels.
        bins: of the action tokens.
        action_smoothing_bins: 0 trains on the exact bin (published); otherwise the target of an action token is a
            Gaussian over the bins with this standard deviation, in bins, around the true one.
    """
    where = supervised_positions(batch)
    targets_M, action_M = batch.labels_BT[:, 1:][where], batch.slot_BT[:, 1:][where]
    logits_MV = model(batch)
    entropy_M = functional.cross_entropy(logits_MV, targets_M, reduction="none")
    true_bin_N = bins.last_id - targets_M[action_M]
    objective = entropy_M.sum()
    if action_smoothing_bins > 0:
        smoothed_N = _smoothed_entropy(logits_MV[action_M], true_bin_N, bins, action_smoothing_bins)
        objective = entropy_M[~action_M].sum() + smoothed_N.sum()
    with torch.no_grad():
        entropy_M, logits_MV = entropy_M.detach(), logits_MV.detach()
        correct_M = logits_MV.argmax(-1) == targets_M
        predicted_N = bins.value(bins.most_likely(bins.band(logits_MV[action_M])))
        error_D = (predicted_N - bins.value(true_bin_N)).abs().unflatten(0, (-1, batch.actions_BSD.shape[-1])).sum(0)
    return LossSums(
        cross_entropy=objective,
        tokens=where.sum(),
        action_cross_entropy=entropy_M[action_M].sum(),
        action_correct=correct_M[action_M].sum(),
        action_tokens=action_M.sum(),
        thought_cross_entropy=entropy_M[~action_M].sum(),
        thought_correct=correct_M[~action_M].sum(),
        thought_tokens=(~action_M).sum(),
        action_l1_D=error_D,
        action_count=action_M.sum() // batch.actions_BSD.shape[-1],
    )


def _smoothed_entropy(logits_NV: Tensor, true_bin_N: Tensor, bins: ActionBins, deviation: float) -> Tensor:
    """Cross entropy (N,) against a Gaussian over the bins; columns outside the band have target zero."""
    bin_K = torch.arange(bins.count, device=true_bin_N.device, dtype=logits_NV.dtype)
    target_NK = torch.softmax(-0.5 * ((bin_K - true_bin_N[:, None]) / deviation) ** 2, dim=-1)
    return logits_NV.logsumexp(-1) - (target_NK * bins.band(logits_NV)).sum(-1)
