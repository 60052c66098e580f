"""Decisions that a random policy sampled, as learning takes them: thoughts of many lengths, with odd ids in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from policy.conftest import random_observation

from dtvla.learning.decisions import DecisionExample, PolicyBatch, collate_decisions, encode_decision
from dtvla.policy import adapters
from dtvla.policy.cot import CotMode
from dtvla.policy.log_probs import Sampling
from dtvla.policy.policy import Decision, Policy
from dtvla.rollout.trajectories import DecisionRecord

SAMPLING = Sampling(thought_temperature=0.9, action_temperature=1.6)


def talkative(make_policy: Callable[..., Policy], decoder: str = "hybrid", lora: bool = False) -> Policy:
    """A random float64 policy that closes thoughts by itself at times, and writes tags where none belong."""
    policy = make_policy(decoder=decoder, slot_embedding=decoder == "hybrid")
    words = policy.processor.layout.vocabulary
    tags = [words.think_start_id, words.think_end_id, words.action_start_id, words.action_end_id, words.image_id]
    with torch.no_grad():
        weight_VD = policy.model.model.language_model.embed_tokens.weight
        weight_VD[:, 0] += 0.4
        weight_VD[tags[:3], 0] += 4.0
        weight_VD[tags[3:], 0] += 3.6
        if lora:
            adapters.attach(policy.model, {"r": 3, "dropout": 0.1})
            generator = torch.Generator().manual_seed(3)
            for name, parameter in policy.model.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    policy.model.eval()
    return policy


def sample(
    policy: Policy, rng: np.random.Generator, rows: int, max_tokens: int
) -> tuple[list[dict[str, Any]], list[Decision]]:
    """Observations and what the policy decides on them."""
    observations = [random_observation(policy, rng) for _ in range(rows)]
    cot = CotMode(
        temperature=SAMPLING.thought_temperature,
        action_temperature=SAMPLING.action_temperature,
        max_tokens=max_tokens,
        speculate=True,
    )
    return observations, policy.act(observations, cot, seeds=rng.integers(2**31, size=rows).tolist())


def record(decision: Decision, executed: int) -> DecisionRecord:
    """What a recorder keeps of a decision."""
    return DecisionRecord(
        step=0,
        executed=executed,
        thought_ids=decision.thought_ids,
        thought_log_probs=decision.thought_log_probs,
        forced=decision.thought_forced,
        truncated=decision.truncated,
        bins_A=decision.action_bins_A,
        action_log_probs_A=decision.action_log_probs_A,
    )


def encoded(policy: Policy, rng: np.random.Generator) -> list[tuple[DecisionExample, torch.Tensor, DecisionRecord]]:
    """Examples with pictures: short, long, closed by the cap or by the policy, some executed in part or not at all."""
    layout, samples = policy.processor.layout, []
    for max_tokens in (1, 3, 8, 20, 40):
        observations, decisions = sample(policy, rng, 4, max_tokens)
        for observation, decision in zip(observations, decisions, strict=True):
            own = record(decision, executed=len(samples) % (layout.chunk + 1))
            example = encode_decision(layout, observation["instruction"], own)
            samples.append((example, torch.from_numpy(decision.pixels_NCHW), own))
    return samples


def batch_of(
    policy: Policy,
    samples: list[tuple[DecisionExample, torch.Tensor, DecisionRecord]],
    advantages_B: np.ndarray | None = None,
    weights_B: np.ndarray | None = None,
    **more: Any,
) -> PolicyBatch:
    """Samples in one batch; advantages and weights are 1 unless they are given."""
    examples, pixels, _ = zip(*samples, strict=True)
    ones_B = np.ones(len(samples))
    advantages_B, weights_B = (ones_B if given is None else given for given in (advantages_B, weights_B))
    return collate_decisions(policy.processor.layout, examples, torch.stack(pixels), advantages_B, weights_B, **more)
