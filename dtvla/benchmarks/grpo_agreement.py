"""Whether both schedules learn the same from the same episodes."""

from __future__ import annotations

import numpy as np
import torch

from dtvla.benchmarks.grpo_ours import OurSchedule
from dtvla.benchmarks.grpo_published import SLICE, PublishedSchedule
from dtvla.benchmarks.grpo_published import Trajectory as PublishedTrajectory
from dtvla.learning.advantages import group_advantages, token_weights
from dtvla.learning.decisions import PolicyBatch, collate_decisions, encode_decision
from dtvla.policy.log_probs import token_log_probs
from dtvla.rollout.groups import Collection
from dtvla.rollout.trajectories import Trajectory

EPISODES = 2


def agreement(ours: OurSchedule, published: PublishedSchedule, collection: Collection) -> dict[str, float]:
    """Let both judge and learn from two of our episodes, one good and one bad, with the weights that made them.

    Returns:
        ``tokens`` compared; ``recorded_apart`` and ``computed_apart``, the farthest that a token's published
        log-probability is from ours, as noted when it was sampled and as computed anew; ``published_objective`` and
        ``our_objective``; ``gradients_apart``, as a share of the published gradient's length.
    """
    episodes = collection.groups[0].trajectories[:EPISODES]
    advantages_N = group_advantages(np.arange(EPISODES, dtype=np.float64)[None])[0]
    rows = [_as_published(published, episode) for episode in episodes]
    judged = [published.log_probs(row) for row in rows]
    judged_M = torch.cat([found_SL[row.counts_SL] for row, found_SL in zip(rows, judged, strict=True)])
    old = [found_SL.clone() for found_SL in judged]
    published_objective = published.gradient(list(zip(rows, old, advantages_N.tolist(), strict=True)))
    expected = _gradient(published)
    ours.model.train()
    batches = _batches(ours, episodes, advantages_N)
    recorded_M = torch.cat([part.old_BT[part.labels_BT >= 0] for part in batches]).to(judged_M)
    computed_M = torch.cat([token_log_probs(ours.model, part, ours.layout, ours.sampling) for part in batches])
    our_objective = ours.gradient(batches)
    apart = _gradient(ours) - expected
    ours.optimizer.zero_grad()
    published.optimizer.zero_grad()
    return {
        "tokens": len(judged_M),
        "recorded_apart": float((recorded_M - judged_M).abs().max()),
        "computed_apart": float((computed_M - judged_M).abs().max()),
        "published_objective": published_objective,
        "our_objective": our_objective,
        "gradients_apart": float(apart.norm() / expected.norm()),
    }


def _as_published(published: PublishedSchedule, episode: Trajectory) -> PublishedTrajectory:
    """An episode of ours as the published schedule keeps one; there are no decisions behind its end."""
    records = episode.records
    pixels = [torch.from_numpy(episode.pixels(d))[None].to(published.model.device) for d in range(len(records))]
    return published.trajectory(
        episode.spec,
        episode.steps,
        [published.model.pixel_values(own).view(own.shape)[0] for own in pixels],
        [published.layout.prompt(episode.instruction)] * len(records),
        [record.thought_ids for record in records],
        [record.forced for record in records],
        [torch.from_numpy(record.bins_A) for record in records],
    )


def _batches(ours: OurSchedule, episodes: list[Trajectory], advantages_N: np.ndarray) -> list[PolicyBatch]:
    """All decisions in order, some to a batch."""
    layout = ours.layout
    owner_B = np.repeat(np.arange(len(episodes)), [len(episode.records) for episode in episodes])
    examples = [encode_decision(layout, e.instruction, record) for e in episodes for record in e.records]
    pixels = [episode.pixels(d) for episode in episodes for d in range(len(episode.records))]
    tokens_N = np.bincount(owner_B, [example.tokens for example in examples])
    weights_N = token_weights(tokens_N, ours.recipe.weighting)
    batches = []
    for first in range(0, len(examples), SLICE):
        part = slice(first, first + SLICE)
        own = torch.from_numpy(np.stack(pixels[part]))
        n = owner_B[part]
        batch = collate_decisions(layout, examples[part], own, advantages_N[n], weights_N[n])
        batches.append(batch.to(ours.model.device))
    return batches


def _gradient(side: OurSchedule | PublishedSchedule) -> torch.Tensor:
    """The gradient in one piece, in float64."""
    parts = [w.grad.double().flatten() for w in side.model.parameters() if w.grad is not None]
    return torch.cat(parts)
