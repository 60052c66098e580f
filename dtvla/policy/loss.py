"""The supervised loss as exact sums over tokens, so that micro-batching never changes a gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dtvla.policy.action_bins import ActionBins
from dtvla.policy.layout import Batch
from dtvla.policy.model import HybridVLA, supervised_places

CHUNK_LOGITS = 2**27  # of a chunk: 0.5 GB in float32, beside about three more of the kind


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

    Logits exist for a part of the supervised positions at a time, see :class:`ChunkedLoss`.

    Args:
        model: is called as a module, so that wrappers see their forward hooks.
        batch: with labels.
        bins: of the action tokens.
        action_smoothing_bins: 0 trains on the exact bin (published); otherwise the target of an action token is a
            Gaussian over the bins with this standard deviation, in bins, around the true one.
    """
    places_M = supervised_places(batch) + 1
    targets_M, action_M = batch.labels_BT.flatten()[places_M], batch.slot_BT.flatten()[places_M]
    scores, sizes = _Score(bins, action_smoothing_bins), chunk_sizes(batch.tokens, model.lm_head.out_features) or [0]

    def score(chunk_MD: Tensor, rows: slice) -> dict[str, Tensor]:
        return scores(model.logits(chunk_MD), targets_M[rows], action_M[rows])

    scored = model(batch, lambda hidden_MD: chunked_loss(model, hidden_MD, score, sizes))
    entropy_M, correct_M, predicted_M = scored["entropy"], scored["correct"], scored["predicted"]
    dimensions = batch.actions_BSD.shape[-1]
    error_M = (bins.value(predicted_M) - bins.value(bins.last_id - targets_M)).abs() * action_M
    dimension_M = (action_M.cumsum(0) - 1).clamp(min=0) % dimensions
    actions = action_M.sum()
    return LossSums(
        cross_entropy=scored["objective"],
        tokens=action_M.new_tensor(batch.tokens, dtype=torch.int64),
        action_cross_entropy=(entropy_M * action_M).sum(),
        action_correct=(correct_M & action_M).sum(),
        action_tokens=actions,
        thought_cross_entropy=(entropy_M * ~action_M).sum(),
        thought_correct=(correct_M & ~action_M).sum(),
        thought_tokens=(~action_M).sum(),
        action_l1_D=error_M.new_zeros(dimensions).index_add(0, dimension_M, error_M),
        action_count=actions // dimensions,
    )


@dataclass(frozen=True)
class _Score:
    """What is made of the logits of a chunk."""

    bins: ActionBins
    smoothing: float

    def __call__(self, logits_MV: Tensor, targets_M: Tensor, action_M: Tensor) -> dict[str, Tensor]:
        """Objective (scalar, with gradient), and per position cross entropy, whether it is right, and the best bin."""
        entropy_M = functional.cross_entropy(logits_MV, targets_M, reduction="none")
        objective_M = entropy_M
        if self.smoothing > 0:
            smoothed_M = self._smoothed(logits_MV, self.bins.last_id - targets_M)
            objective_M = torch.where(action_M, smoothed_M, entropy_M)
        logits_MV = logits_MV.detach()
        return {
            "objective": objective_M.sum(),
            "entropy": entropy_M.detach(),
            "correct": logits_MV.argmax(-1) == targets_M,
            "predicted": self.bins.most_likely(self.bins.band(logits_MV)),
        }

    def _smoothed(self, logits_MV: Tensor, true_bin_M: Tensor) -> Tensor:
        """Cross entropy (M,) against a Gaussian over the bins; columns outside the band have target zero."""
        bin_K = torch.arange(self.bins.count, device=true_bin_M.device, dtype=logits_MV.dtype)
        target_MK = torch.softmax(-0.5 * ((bin_K - true_bin_M[:, None]) / self.smoothing) ** 2, dim=-1)
        return logits_MV.logsumexp(-1) - (target_MK * self.bins.band(logits_MV)).sum(-1)


def chunk_sizes(rows: int, columns: int) -> list[int]:
    """Rows of each chunk of a matrix that is computed :data:`CHUNK_LOGITS` elements at a time; empty for no rows."""
    most = max(1, CHUNK_LOGITS // columns)
    return [min(most, rows - first) for first in range(0, rows, most)]


def chunked_loss(
    model: HybridVLA, hidden_MD: Tensor, score: Callable[[Tensor, slice], dict[str, Tensor]], sizes: Sequence[int]
) -> dict[str, Tensor]:
    """Score hidden states in chunks.

    Args:
        model: whose output layer ``score`` computes with, inside of its forward.
        hidden_MD: hidden states.
        score: takes the hidden states of a chunk and which of the M rows they are. It returns ``objective``, a scalar
            that the gradient is of, and per row any tensors without gradient.
        sizes: rows of each chunk, M together; see :func:`chunk_sizes`.

    Returns:
        The sum of the objectives, and the others for all rows.
    """
    starts, parts = [0, *accumulate(sizes)], list[dict[str, Tensor]]()

    def score_chunk(chunk_MD: Tensor, index: int) -> Tensor:
        parts.append(score(chunk_MD, slice(starts[index], starts[index + 1])))
        return parts[-1].pop("objective")

    weights = [weight for weight in model.lm_head.parameters() if weight.requires_grad and torch.is_grad_enabled()]
    objective = ChunkedLoss.apply(hidden_MD, score_chunk, list(sizes), *weights)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} | {"objective": objective}


class ChunkedLoss(torch.autograd.Function):
    """A sum over rows that is never computed for all rows at once: neither are the intermediate values of its gradient.

    The gradient of each chunk is computed together with its value, so nothing is computed twice, and all that is kept
    is a gradient as large as the rows and one as large as the weights. (The vocabulary of the published model is
    257157 tokens wide: one sample's logits, their softmax and its gradient are 2 GB.)
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_MD: Tensor, function: Callable[[Tensor, int], Tensor], sizes: list[int], *weights: Tensor
    ) -> Tensor:
        """Return the sum of ``function(chunk, number)`` over chunks of the rows.

        Args:
            ctx: of autograd.
            hidden_MD: the rows.
            function: computes with ``weights``, which autograd has to know of; returns a scalar.
            sizes: rows of each chunk; one at least, which may be empty.
            weights: that get a gradient.
        """
        learns = hidden_MD.requires_grad or bool(weights)
        values, gradients = list[Tensor](), list[Tensor]()
        sums: list[Tensor | None] = [None] * len(weights)
        for index, chunk_MD in enumerate(hidden_MD.split(sizes)):
            leaf_MD = chunk_MD.detach().requires_grad_(learns)
            with torch.set_grad_enabled(learns):
                value = function(leaf_MD, index)
            values.append(value.detach())
            if learns:
                found = torch.autograd.grad(value, [leaf_MD, *weights])
                gradients.append(found[0])
                sums = [new if old is None else old.add_(new) for old, new in zip(sums, found[1:], strict=True)]
        ctx.gradients = [torch.cat(gradients), *sums] if learns else []
        return torch.stack(values).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Scale what the forward found, in place: it may be asked for once."""
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradient of a chunked loss was asked for twice; compute the loss again")
        scaled = [None if gradient is None else gradient.mul_(grad) for gradient in gradients]
        return scaled[0], None, None, *scaled[1:]
