"""Log-probabilities of sampled tokens, under the distributions that the engine samples from.

A thought token is drawn from the vocabulary without the action band and eos, an action token from the band alone, each
at a temperature of its own (:mod:`dtvla.policy.runtime`). For action tokens, only the band's columns of the output
layer are computed. Logits exist for a part of the tokens at a time, as in :mod:`dtvla.policy.loss`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dtvla.errors import UserError
from dtvla.policy.adapters import linear_rows
from dtvla.policy.layout import Batch, Layout
from dtvla.policy.loss import chunk_sizes, chunked_loss
from dtvla.policy.model import HybridVLA, supervised_places

Score = Callable[[Tensor, Tensor | None, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Sampling:
    """Temperatures that tokens were sampled at; the defaults are the published ones.

    Attributes:
        thought_temperature: of thought tokens.
        action_temperature: of action tokens.
    """

    thought_temperature: float = 1.0
    action_temperature: float = 1.6

    def __post_init__(self) -> None:
        """Refuse temperatures without a distribution; :class:`UserError`."""
        for name, value in (("", self.thought_temperature), ("action_", self.action_temperature)):
            if not 0 < value < math.inf:
                raise UserError(f"data.{name}temperature: {value} is not positive; tokens have to be sampled")


def token_log_probs(model: HybridVLA, batch: Batch, layout: Layout, sampling: Sampling) -> Tensor:
    """Log-probabilities of the labelled tokens, without gradient.

    Args:
        model: is called as a module, so that wrappers see their forward hooks.
        batch: labels mark thought tokens up to ``<action>``, and action tokens.
        layout: of the sequences.
        sampling: temperatures.

    Returns:
        (M,) float32, float64 for a float64 model, in the order of :func:`~dtvla.policy.model.supervised_places`.
    """

    def score(log_prob_N: Tensor, entropy_N: Tensor | None, index_N: Tensor) -> dict[str, Tensor]:
        return {"objective": log_prob_N.sum(), "log_prob": log_prob_N}

    with torch.no_grad():
        return score_tokens(model, batch, layout, sampling, score)["log_prob"]


def score_tokens(
    model: HybridVLA, batch: Batch, layout: Layout, sampling: Sampling, score: Score, *, entropy: bool = False
) -> dict[str, Tensor]:
    """Sum up an objective of the labelled tokens' log-probabilities, chunk by chunk.

    Args:
        model, batch, layout, sampling: as in :func:`token_log_probs`.
        score: takes the log-probabilities (N,) of some tokens, the entropies (N,) in nats of the distributions that
            they were sampled from (None unless asked for), both with gradient, and which of the M tokens they are
            (N,). It returns ``objective``, a scalar that the gradient is of, and per token any tensors without
            gradient.
        entropy: whether entropies are computed.

    Returns:
        The sum of the objectives, and the others (M,) in the order of
        :func:`~dtvla.policy.model.supervised_places`.
    """
    places_M = supervised_places(batch) + 1
    targets_M, action_M = batch.labels_BT.flatten()[places_M], batch.slot_BT.flatten()[places_M]
    order_M = action_M.byte().sort(stable=True).indices  # thoughts first, so that a chunk has one kind of token
    thoughts, copies = batch.tokens - batch.action_tokens, 2 if entropy else 1
    heads = _Heads(model, layout, sampling)
    sizes = chunk_sizes(thoughts, layout.vocabulary.size * copies)
    sizes += chunk_sizes(batch.action_tokens, layout.bins.count * copies)

    def score_chunk(hidden_ND: Tensor, rows: slice) -> dict[str, Tensor]:
        index_N = order_M[rows]
        log_probs = heads.thought if rows.start < thoughts else heads.action
        return score(*log_probs(hidden_ND, targets_M[index_N], entropy), index_N)

    def head(hidden_MD: Tensor) -> dict[str, Tensor]:
        return chunked_loss(model, hidden_MD.index_select(0, order_M), score_chunk, sizes or [0])

    scored = model(batch, head)
    objective = scored.pop("objective")
    ordered = {name: torch.empty_like(found_M).index_copy(0, order_M, found_M) for name, found_M in scored.items()}
    return ordered | {"objective": objective}


class _Heads:
    """The two distributions as functions of hidden states: log-probabilities of given ids, and entropies if asked."""

    def __init__(self, model: HybridVLA, layout: Layout, sampling: Sampling) -> None:
        self._model, self._layout, self._sampling = model, layout, sampling

    def thought(self, hidden_ND: Tensor, ids_N: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
        """Over the vocabulary without what a thought never contains."""
        bins, logits_NV = self._layout.bins, self._model.logits(hidden_ND)
        banned_V = logits_NV.new_zeros(logits_NV.shape[-1])
        banned_V[bins.first_id : bins.last_id + 1] = banned_V[self._layout.vocabulary.eos_id] = _NEVER
        # In place, and added: such logits are a large part of the memory, and a sum's gradient needs no copy of them.
        return _log_probs(_scale(logits_NV, self._sampling.thought_temperature).add_(banned_V), ids_N, entropy)

    def action(self, hidden_ND: Tensor, ids_N: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
        """Over the action band, in the order of its ids."""
        bins = self._layout.bins
        logits_NK = linear_rows(self._model.lm_head, hidden_ND, bins.first_id, bins.last_id)
        logits_NK = logits_NK if logits_NK.dtype == torch.float64 else logits_NK.float()
        return _log_probs(_scale(logits_NK, self._sampling.action_temperature), ids_N - bins.first_id, entropy)


_NEVER = torch.finfo(torch.float32).min  # of a banned token: its probability is 0, and 0 times this is not nan


def _scale(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1 else logits.div_(temperature)


def _log_probs(logits_NV: Tensor, columns_N: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    log_prob_NV = logits_NV.log_softmax(-1)
    chosen_N = log_prob_NV.gather(-1, columns_N[:, None])[:, 0]
    return chosen_N, -(log_prob_NV.exp() * log_prob_NV).sum(-1) if entropy else None
