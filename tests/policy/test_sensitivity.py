"""How far actions move, against the decisions of the cached engine, which shares no code with it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dtvla.analysis.attention_map import sequence
from dtvla.analysis.sensitivity import CHANGES, action_log_probs, sensitivity
from dtvla.errors import UserError
from dtvla.policy.cot import CotMode
from dtvla.policy.policy import Decision, Policy

from .conftest import random_observation

GIVEN = CotMode("given")


@pytest.fixture(scope="module")
def observations(policy: Policy) -> list[dict[str, Any]]:
    rng = np.random.default_rng(5)
    return [random_observation(policy, rng) for _ in range(3)]


@pytest.fixture(scope="module")
def own(policy: Policy, observations: list[dict[str, Any]]) -> list[Decision]:
    return policy.act(observations, GIVEN)


def test_distributions_are_those_that_the_engine_chooses_from(
    policy: Policy, observations: list[dict[str, Any]], own: list[Decision]
) -> None:
    for observation, decision in zip(observations, own, strict=True):
        found_AK = action_log_probs(policy, sequence(policy, observation, decision.thought_ids))
        assert torch.allclose(found_AK.exp().sum(-1), torch.ones(len(found_AK), dtype=torch.float64))
        bins_A = torch.from_numpy(decision.action_bins_A)
        assert torch.equal(policy.processor.layout.bins.most_likely(found_AK), bins_A)
        chosen_A = found_AK.gather(-1, bins_A[:, None])[:, 0]
        assert np.allclose(chosen_A, decision.action_log_probs_A, atol=1e-5)


def moved(policy: Policy, before: Decision, after: Decision) -> tuple[float, float]:
    """Share of bins that changed, and how far the most likely actions moved, from decisions of the engine."""
    value = policy.processor.layout.bins.value
    bins = [torch.from_numpy(decision.action_bins_A) for decision in (before, after)]
    return (bins[0] != bins[1]).double().mean().item(), (value(bins[0]) - value(bins[1])).abs().mean().item()


def test_moves_are_those_of_the_engines_decisions(
    policy: Policy, observations: list[dict[str, Any]], own: list[Decision]
) -> None:
    thoughts = [decision.thought_ids[:-1] for decision in own]
    frame = sensitivity(policy, observations, thoughts)
    assert frame["change"].tolist() == list(CHANGES) * 3
    assert frame["distance"].between(0, 1).all()
    assert (frame["distance"] > 0).all()
    numbers = frame.set_index(["decision", "change"])
    for k, (observation, decision) in enumerate(zip(observations, own, strict=True)):
        others = [other for other in range(3) if other != k]
        empty = policy.act([observation], CotMode("mask"))
        swapped = policy.act([{**observation, "thought": observations[j]["thought"]} for j in others], GIVEN)
        elsewhere = policy.act([{**observations[j], "thought": observation["thought"]} for j in others], GIVEN)
        made = {"thought empty": empty, "thought of another moment": swapped, "other pictures": elsewhere}
        for change, decisions in made.items():
            expected = np.mean([moved(policy, decision, other) for other in decisions], axis=0)
            assert numbers.loc[(k, change), ["bins", "shift"]].tolist() == pytest.approx(expected)


def test_distance_is_one_minus_what_the_distributions_have_in_common(
    policy: Policy, observations: list[dict[str, Any]], own: list[Decision]
) -> None:
    thoughts = [decision.thought_ids for decision in own]
    frame = sensitivity(policy, observations, thoughts).set_index(["decision", "change"])["distance"]
    tags = policy.processor.layout.thought(None)
    before, after = (action_log_probs(policy, sequence(policy, observations[0], ids)) for ids in (thoughts[0], tags))
    common_A = torch.minimum(before.exp(), after.exp()).sum(-1)
    assert frame[0, "thought empty"] == pytest.approx(1 - common_A.mean().item())


def test_draws_follow_their_seed(policy: Policy, observations: list[dict[str, Any]], own: list[Decision]) -> None:
    thoughts = [decision.thought_ids for decision in own]
    one, same, other = (sensitivity(policy, observations, thoughts, draws=2, seed=seed) for seed in (1, 1, 2))
    assert one.equals(same)
    differs = one.set_index(["decision", "change"])["distance"] != other.set_index(["decision", "change"])["distance"]
    by_change = differs.groupby("change").any()
    assert by_change.to_dict() == {change: change in ("thought random", "thought shuffled") for change in CHANGES}


def test_what_cannot_be_answered_is_refused(
    make_policy: Callable[..., Policy], policy: Policy, observations: list[dict[str, Any]], own: list[Decision]
) -> None:
    with pytest.raises(UserError, match="thoughts: all are the same"):
        sensitivity(policy, observations, [own[0].thought_ids] * 3)
    writes = make_policy(decoder="autoregressive", slot_embedding=False)
    with pytest.raises(UserError, match="autoregressive"):
        sensitivity(writes, observations, [decision.thought_ids for decision in own])
