"""Recorded decisions become the sequences that they were sampled in, with labels on what is learned from."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from sampled_decisions import batch_of, encoded, talkative

from dtvla.learning.decisions import PolicyBatch, encode_decision
from dtvla.policy.layout import IGNORE, Segment
from dtvla.policy.policy import Policy

Samples = tuple[Policy, list]


@pytest.fixture(scope="module")
def samples(make_policy: Callable[..., Policy]) -> Samples:
    policy = talkative(make_policy)
    return policy, encoded(policy, np.random.default_rng(5))


def test_a_decision_reads_as_it_was_sampled(samples: Samples) -> None:
    policy, decisions = samples
    layout = policy.processor.layout
    words, dimensions = layout.vocabulary, layout.action_dim
    for _, _, own in decisions:
        example = encode_decision(layout, "Move_down", own)
        prompt = layout.prompt("Move_down")
        ids_A = (layout.bins.last_id - own.bins_A).tolist()
        assert example.input_ids_T.tolist() == prompt + own.thought_ids + ids_A + [words.action_end_id, words.eos_id]
        thought = len(own.thought_ids) - 1
        segments = [Segment.PREFIX] * len(prompt) + [Segment.THINK] * thought + [Segment.ACT] * (layout.slots + 3)
        assert example.segment_T.tolist() == segments
        expected, slots = [], []
        for place, token in enumerate(example.input_ids_T.tolist()):
            own_place, slot = place - len(prompt), place - len(prompt) - thought - 1
            slots.append(0 <= slot < layout.slots)
            chosen = 0 <= own_place < len(own.thought_ids) - own.forced
            expected.append(token if chosen or (slots[-1] and slot // dimensions < own.executed) else IGNORE)
        assert example.labels_T.tolist() == expected
        assert example.slot_T.tolist() == slots
        log_probs = own.thought_log_probs[: len(own.thought_ids) - own.forced]
        log_probs = [*log_probs, *own.action_log_probs_A[: own.executed * dimensions]]
        assert example.tokens == len(log_probs)
        np.testing.assert_array_equal(example.old_log_probs, np.float32(log_probs))
        assert not example.old_T[example.labels_T == IGNORE].any()


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_keeps_every_tokens_numbers_beside_it(samples: Samples, packed: bool) -> None:
    policy, decisions = samples
    rng, layout = np.random.default_rng(0), policy.processor.layout
    advantages_B, weights_B = rng.normal(size=(2, len(decisions)))
    references = [torch.from_numpy(rng.normal(size=example.tokens)) for example, _, _ in decisions]
    room = 5 + sum(len(example.labels_T) for example, _, _ in decisions)
    more = {"pack_tokens": room} if packed else {}
    batch = batch_of(policy, decisions, advantages_B, weights_B, references=references, **more)
    assert batch.labels_BT.shape[0] == (1 if packed else len(decisions))
    learned_BT = batch.labels_BT != IGNORE
    counts = [example.tokens for example, _, _ in decisions]
    assert batch.tokens == sum(counts)
    assert batch.action_tokens == int((learned_BT & batch.slot_BT).sum())
    each = {
        "old_BT": torch.cat([example.old_log_probs for example, _, _ in decisions]),
        "labels_BT": torch.cat([example.labels_T[example.labels_T != IGNORE] for example, _, _ in decisions]),
        "reference_BT": torch.cat(references).float(),
        "advantage_BT": torch.from_numpy(advantages_B).float().repeat_interleave(torch.tensor(counts)),
        "weight_BT": torch.from_numpy(weights_B).float().repeat_interleave(torch.tensor(counts)),
    }
    for name, expected_M in each.items():
        found_BT = getattr(batch, name)
        assert torch.equal(found_BT[learned_BT], expected_M), name
        assert name == "labels_BT" or not found_BT[~learned_BT].any(), name
    values = layout.bins.value(torch.from_numpy(np.stack([own.bins_A for _, _, own in decisions])))
    assert torch.equal(batch.actions_BSD.flatten(1), values)
    assert batch_of(policy, decisions, **more).reference_BT is None


def test_a_batch_moves_as_a_whole(samples: Samples) -> None:
    policy, decisions = samples
    moved = batch_of(policy, decisions).to("meta")
    assert type(moved) is PolicyBatch
    assert {moved.old_BT.device.type, moved.weight_BT.device.type, moved.pixels_BNCHW.device.type} == {"meta"}
    assert moved.reference_BT is None
    assert moved.action_tokens == batch_of(policy, decisions).action_tokens


def test_a_record_of_another_policy_is_refused(samples: Samples) -> None:
    policy, decisions = samples
    layout, own = policy.processor.layout, decisions[0][2]
    band = layout.bins.first_id
    for wrong in (
        {"thought_ids": own.thought_ids[:-1]},
        {"thought_ids": [band, *own.thought_ids[1:]]},
        {"thought_log_probs": []},
        {"bins_A": own.bins_A[:-1]},
        {"forced": len(own.thought_ids) + 1},
        {"executed": layout.chunk + 1},
    ):
        with pytest.raises(ValueError, match="decision at step 0"):
            encode_decision(layout, "move down", replace(own, **wrong))
