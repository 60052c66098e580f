"""The clipped policy objective as exact sums over tokens, so that micro-batching never changes a gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional

from dtvla.errors import UserError
from dtvla.learning.decisions import PolicyBatch
from dtvla.policy.layout import Layout
from dtvla.policy.log_probs import Sampling, score_tokens
from dtvla.policy.model import HybridVLA, supervised_places

KL_ESTIMATORS = ("k1", "k2", "k3")
ADAPTATION = 0.2  # largest relative change of the KL weight in an optimiser step
FARTHEST = 10.0  # of log-ratios to the reference
FARTHEST_STEP = 20.0  # of log-ratios to the sampling policy: their exponential stays finite, and so does its gradient


@dataclass(frozen=True)
class Objective:
    """Of one token with probability ratio r to the policy that sampled it, advantage A and reference log-probability::

        max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)),   for A < 0 at most -A dual_clip
        + kl_weight * k(reference - log-probability) - entropy_weight * entropy

    Attributes:
        clip_low: how far below 1 a ratio is followed.
        clip_high: how far above.
        dual_clip: the largest ratio that a negative advantage counts with; None for no limit.
        kl_weight: of the divergence from the reference model.
        kl_estimator: ``k1`` is -d, ``k2`` d^2 / 2, ``k3`` exp(d) - d - 1 for d within ± :data:`FARTHEST` (Schulman).
        entropy_weight: of the entropy of the distribution that the token was sampled from, in nats.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = 3.0
    kl_weight: float = 0.0
    kl_estimator: str = "k3"
    entropy_weight: float = 0.0

    def __post_init__(self) -> None:
        """Refuse numbers without meaning; :class:`UserError`."""
        if not 0 <= self.clip_low <= 1:
            raise UserError(f"algorithm.loss.clip_low: {self.clip_low} is not within [0, 1]")
        if self.dual_clip is not None and not 1 < self.dual_clip < math.inf:
            raise UserError(f"algorithm.loss.dual_clip: {self.dual_clip} is not above 1; use null for no limit")
        if self.kl_estimator not in KL_ESTIMATORS:
            raise UserError(f"algorithm.kl.estimator: {self.kl_estimator!r} is unknown; use {', '.join(KL_ESTIMATORS)}")
        for name, value in (
            ("loss.clip_high", self.clip_high),
            ("kl.weight", self.kl_weight),
            ("loss.entropy", self.entropy_weight),
        ):
            if not 0 <= value < math.inf:
                raise UserError(f"algorithm.{name}: {value} is not a number of at least 0")

    def towards(self, target: float, kl: float) -> Objective:
        """With a KL weight that moves the divergence towards a target (Ziegler et al., 2019, section 2.2).

        Args:
            target: divergence per token.
            kl: that of the last optimiser step.
        """
        error = min(max(kl / target - 1, -1), 1)
        return replace(self, kl_weight=self.kl_weight * (1 + ADAPTATION * error))

    def score(
        self,
        log_prob_N: Tensor,
        old_N: Tensor,
        advantage_N: Tensor,
        weight_N: Tensor,
        reference_N: Tensor | None,
        entropy_N: Tensor | None,
    ) -> dict[str, Tensor]:
        """Weighted sum over tokens with gradient (``objective``), and what is to be known of each token, without.

        Args:
            log_prob_N: log-probabilities with gradient.
            old_N: when the tokens were sampled.
            advantage_N: advantages.
            weight_N: in the sum.
            reference_N: log-probabilities under the reference model; needed with ``kl_weight``.
            entropy_N: entropies with gradient; needed with ``entropy_weight``.
        """
        change_N = log_prob_N - old_N
        near_N = change_N.clamp(-FARTHEST_STEP, FARTHEST_STEP)
        ratio_N, low, high = near_N.exp(), 1 - self.clip_low, 1 + self.clip_high
        pull_N = -advantage_N.to(ratio_N.dtype)
        loss_N = torch.maximum(pull_N * ratio_N, pull_N * ratio_N.clamp(low, high))
        gains_N, loses_N = advantage_N > 0, advantage_N < 0
        facts = {"clipped_above": gains_N & (ratio_N > high), "clipped_below": loses_N & (ratio_N < low)}
        if self.dual_clip is not None:
            loss_N = torch.where(loses_N, torch.minimum(loss_N, pull_N * self.dual_clip), loss_N)
            facts["dual_clipped"] = loses_N & (ratio_N > self.dual_clip)
        if self.kl_weight > 0:
            if reference_N is None:
                raise ValueError("a KL weight, but no log-probabilities of a reference model")
            facts["kl"] = self._divergence(reference_N - log_prob_N)
            loss_N = loss_N + self.kl_weight * facts["kl"]
        if self.entropy_weight > 0:
            if entropy_N is None:
                raise ValueError("an entropy weight, but no entropies")
            facts["entropy"] = entropy_N
            loss_N = loss_N - self.entropy_weight * entropy_N
        facts |= {"update_kl": near_N.expm1() - near_N, "log_ratio": change_N.abs()}
        return {name: fact_N.detach() for name, fact_N in facts.items()} | {"objective": (weight_N * loss_N).sum()}

    def _divergence(self, distance_N: Tensor) -> Tensor:
        distance_N = distance_N.clamp(-FARTHEST, FARTHEST)
        if self.kl_estimator == "k1":
            return -distance_N
        return distance_N.square() / 2 if self.kl_estimator == "k2" else distance_N.expm1() - distance_N


@dataclass
class ObjectiveSums:
    """Sums over the labelled tokens of a batch; those of two batches add up to those of the joint batch.

    Attributes:
        objective: weighted sum with gradient, to be minimised.
        tokens, thought_tokens, action_tokens: numbers of tokens.
        clipped_above: tokens of positive advantage whose ratio is above the clip range: they have no gradient.
        clipped_below: tokens of negative advantage whose ratio is below it: likewise.
        dual_clipped: tokens of negative advantage whose ratio is above ``dual_clip``: likewise.
        kl: divergence from the reference model by the chosen estimator; 0 without a weight.
        entropy: in nats; 0 without a weight.
        update_kl: divergence of the model from the policy that sampled (k3), of ratios within
            exp(± :data:`FARTHEST_STEP`).
        log_ratio: absolute log-ratios to that policy.
        log_ratio_max: the largest of them: of two batches, the larger.
    """

    objective: Tensor
    tokens: Tensor
    thought_tokens: Tensor
    action_tokens: Tensor
    clipped_above: Tensor
    clipped_below: Tensor
    dual_clipped: Tensor
    kl: Tensor
    entropy: Tensor
    update_kl: Tensor
    log_ratio: Tensor
    log_ratio_max: Tensor

    def __add__(self, other: ObjectiveSums) -> ObjectiveSums:
        """Sums of both batches together."""
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return ObjectiveSums(**sums | {"log_ratio_max": torch.maximum(self.log_ratio_max, other.log_ratio_max)})


def policy_loss(
    model: HybridVLA, batch: PolicyBatch, layout: Layout, sampling: Sampling, objective: Objective
) -> ObjectiveSums:
    """The objective of a batch; each token has its own ratio, at the temperature that it was sampled at.

    Args:
        model: is called as a module, so that wrappers see their forward hooks. Its dropout is part of the ratios.
        batch: decisions; with ``reference_BT`` if the objective has a KL weight.
        layout: of the sequences.
        sampling: temperatures.
        objective: what a token counts.
    """
    places_M = supervised_places(batch) + 1
    per_token = (batch.old_BT, batch.advantage_BT, batch.weight_BT)
    old_M, advantage_M, weight_M = (values_BT.flatten()[places_M] for values_BT in per_token)
    reference_M = None
    if objective.kl_weight > 0 and batch.reference_BT is not None:
        reference_M = batch.reference_BT.flatten()[places_M]

    def score(log_prob_N: Tensor, entropy_N: Tensor | None, index_N: Tensor) -> dict[str, Tensor]:
        own = (old_M[index_N], advantage_M[index_N], weight_M[index_N])
        return objective.score(log_prob_N, *own, None if reference_M is None else reference_M[index_N], entropy_N)

    scored = score_tokens(model, batch, layout, sampling, score, entropy=objective.entropy_weight > 0)
    total, log_ratio_M = scored.pop("objective"), scored["log_ratio"]
    counts = {"tokens": batch.tokens, "action_tokens": batch.action_tokens}
    counts["thought_tokens"] = batch.tokens - batch.action_tokens
    absent = {name: log_ratio_M.new_zeros(()) for name in ("dual_clipped", "kl", "entropy")}
    return ObjectiveSums(
        objective=total,
        log_ratio_max=functional.pad(log_ratio_M, (0, 1)).max(),  # of no tokens: 0
        **{name: torch.full((), count, device=total.device) for name, count in counts.items()},
        **absent | {name: fact_M.sum() for name, fact_M in scored.items()},
    )
