"""From outcomes to numbers for learning: rewards, advantages within groups, weights of tokens. All in float64."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from dtvla.errors import UserError

if TYPE_CHECKING:
    from dtvla.policy.vocabulary import Vocabulary
    from dtvla.rollout.trajectories import DecisionRecord

WEIGHTINGS = ("sequence", "token", "constant")


def well_formed(record: DecisionRecord, vocabulary: Vocabulary) -> bool:
    """Whether the model itself wrote ``<think> text </think><action>``, with no other control id in it."""
    ids = record.thought_ids
    tags = [vocabulary.think_start_id, vocabulary.think_end_id, vocabulary.action_start_id]
    return record.forced == 0 and [*ids[:1], *ids[-2:]] == tags and not set(ids[1:-2]) & set(vocabulary.control_ids)


def rewards(
    success_N: np.ndarray, well_formed_N: np.ndarray, success_weight: float = 1.0, format_weight: float = 0.0
) -> np.ndarray:
    """Rewards of finished episodes.

    Args:
        success_N: whether each reached its goal.
        well_formed_N: share of well-formed thoughts among the decisions that each really took.
        success_weight: reward of a success.
        format_weight: reward of well-formed thoughts only; that of a share of them is the share of it.

    Returns:
        (N,) float64.

    Raises:
        UserError: a weight is negative or not finite.
    """
    for name, weight in (("success", success_weight), ("format", format_weight)):
        if not 0 <= weight < math.inf:
            raise UserError(f"algorithm.reward.{name}: {weight} is not a number of at least 0")
    return success_weight * np.asarray(success_N, np.float64) + format_weight * np.asarray(well_formed_N, np.float64)


def group_advantages(rewards_GN: np.ndarray, normalize: bool = True, eps: float = 1e-6) -> np.ndarray:
    """Rewards relative to those of the group.

    Args:
        rewards_GN: G groups of N episodes each.
        normalize: divide by the (unbiased) standard deviation of the group; False is the variant of Dr. GRPO.
        eps: added to the standard deviation.

    Returns:
        float64 (G, N); exactly 0 in a group of equal rewards.
    """
    rewards_GN = np.asarray(rewards_GN, np.float64)
    if rewards_GN.ndim != 2 or rewards_GN.shape[1] < 2:
        raise ValueError(f"rewards have shape {rewards_GN.shape}; groups need two episodes at least")
    relative_GN = rewards_GN - rewards_GN.mean(axis=1, keepdims=True)
    if normalize:
        relative_GN = relative_GN / (rewards_GN.std(axis=1, ddof=1, keepdims=True) + eps)
    equal_G1 = rewards_GN.min(axis=1, keepdims=True) == rewards_GN.max(axis=1, keepdims=True)
    return np.where(equal_G1, 0.0, relative_GN)  # the mean of equal numbers may be off by a rounding


def token_weights(tokens_N: np.ndarray, weighting: str, constant: float = 1.0) -> np.ndarray:
    """Weight of each token of a trajectory in the sum over all tokens of a mini-batch.

    Args:
        tokens_N: learned tokens of each of the N trajectories of the whole mini-batch.
        weighting: ``sequence``: all trajectories weigh the same (GRPO); ``token``: all tokens do (DAPO);
            ``constant``: all tokens do, and the sum is divided by N times a constant (Dr. GRPO).
        constant: tokens that a trajectory is taken to have, for ``constant``.

    Returns:
        (N,) float64; 0 for a trajectory without a token.

    Raises:
        UserError: an unknown weighting, or a constant that is not positive.
    """
    if weighting not in WEIGHTINGS:
        raise UserError(f"algorithm.loss.weighting: {weighting!r} is unknown; use {', '.join(WEIGHTINGS)}")
    if not 0 < constant < math.inf:
        raise UserError(f"algorithm.loss.constant: {constant} is not positive; give the tokens of a long trajectory")
    tokens_N = np.asarray(tokens_N, np.float64)
    if weighting == "sequence":
        divisor_N = len(tokens_N) * tokens_N
    elif weighting == "token":
        divisor_N = np.full_like(tokens_N, tokens_N.sum())
    else:
        divisor_N = np.full_like(tokens_N, len(tokens_N) * constant)
    return np.divide(1.0, divisor_N, out=np.zeros_like(tokens_N), where=tokens_N > 0)
