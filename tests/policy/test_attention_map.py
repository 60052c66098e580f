"""Attention weights against those computed from what the layers are given, and shares against counting."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from dtvla.analysis.attention_map import allowed, attention_maps, attention_mass, segments, sequence
from dtvla.errors import UserError
from dtvla.policy.layout import Batch
from dtvla.policy.policy import Policy

from .conftest import random_observation, sentence


def thought_ids(policy: Policy, rng: np.random.Generator) -> list[int]:
    return policy.processor.layout.thought(sentence(rng))


def turned(x_HTW: torch.Tensor, base: float) -> torch.Tensor:
    """Rotary embedding as multiplication of complex numbers, positions from 1."""
    half = x_HTW.shape[-1] // 2
    places_T = torch.arange(1, x_HTW.shape[1] + 1, dtype=torch.float64)
    speed_W = base ** (-torch.arange(half, dtype=torch.float64) / half)
    spun = torch.complex(x_HTW[..., :half], x_HTW[..., half:]) * torch.exp(1j * places_T[:, None] * speed_W)
    return torch.cat([spun.real, spun.imag], dim=-1)


def by_hand(policy: Policy, batch: Batch) -> list[torch.Tensor]:
    """softmax(q k / sqrt(width)) from what every attention is given while the model runs its usual kernel."""
    given: list[torch.Tensor] = []
    layers = policy.model.model.language_model.layers
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kw: given.append(kw["hidden_states"]), with_kwargs=True
        )
        for layer in layers
    ]
    policy.model.encode(batch)
    for hook in hooks:
        hook.remove()
    maps, blocked_TT = [], ~allowed(policy, batch)
    for layer, x_BTD in zip(layers, given, strict=True):
        attention, width = layer.self_attn, layer.self_attn.head_dim
        q_HTW = attention.q_proj(x_BTD[0]).unflatten(-1, (-1, width)).transpose(0, 1)
        k_TW = attention.k_proj(x_BTD[0])  # one key for all heads
        scores_HTT = turned(q_HTW, 10000.0) @ turned(k_TW[None], 10000.0)[0].T / width**0.5
        maps.append(scores_HTT.masked_fill(blocked_TT, -torch.inf).softmax(-1))
    return maps


def test_maps_are_those_of_the_layers_inputs(policy: Policy) -> None:
    rng = np.random.default_rng(0)
    for _ in range(3):
        batch = sequence(policy, random_observation(policy, rng), thought_ids(policy, rng))
        with torch.no_grad():
            expected = torch.stack(by_hand(policy, batch))
        found = attention_maps(policy, batch)
        assert found.shape == expected.shape
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)  # transformers takes softmax and angles in float32


def test_the_model_is_left_as_it_was(policy: Policy) -> None:
    rng = np.random.default_rng(1)
    batch = sequence(policy, random_observation(policy, rng), thought_ids(policy, rng))
    before, kernel = policy.model.encode(batch), policy.model.config.text_config._attn_implementation
    attention_maps(policy, batch)
    assert policy.model.config.text_config._attn_implementation == kernel
    assert torch.equal(policy.model.encode(batch), before)


def test_segments_are_where_the_ids_are(policy: Policy) -> None:
    rng, words = np.random.default_rng(2), policy.processor.layout.vocabulary
    ids = thought_ids(policy, rng)
    batch = sequence(policy, random_observation(policy, rng), [*ids, words.action_start_id])
    parts, row = segments(policy, batch), batch.input_ids_BT[0].tolist()
    assert list(parts) == ["agentview", "wrist", "prompt", "thought", "actions"]
    assert row[parts["agentview"]] == row[parts["wrist"]] == [words.image_id] * 4  # 16 pixels in patches of 8
    assert row[parts["prompt"]][0] == words.bos_id
    assert row[parts["thought"]] == ids
    assert row[parts["actions"]][0] == words.action_start_id
    assert row[parts["actions"]][-1] == words.eos_id
    assert len(row) == parts["actions"].stop
    assert batch.slot_BT[0].nonzero()[:, 0].tolist() == list(range(parts["actions"].start + 1, len(row) - 2))


def test_shares_add_up_and_even_ones_are_counted(policy: Policy) -> None:
    rng = np.random.default_rng(3)
    observations = [random_observation(policy, rng) for _ in range(2)]
    thoughts = [thought_ids(policy, rng) for _ in observations]
    mass = attention_mass(policy, observations, thoughts)
    assert len(mass) == 2 * 2 * 2 * 5
    sums = mass.groupby(["decision", "layer", "query"])[["share", "even"]].sum()
    assert np.allclose(sums, 1.0, atol=1e-6)
    hidden = mass[(mass["query"] == "thought") & (mass["source"] == "actions")]
    assert (hidden[["share", "even"]] == 0).all(axis=None)
    parts = segments(policy, sequence(policy, observations[0], thoughts[0]))
    first = mass[(mass["decision"] == 0) & (mass["layer"] == 0)].set_index(["query", "source"])["even"]
    prefix, length = parts["prompt"].stop, parts["actions"].stop
    seen = range(prefix + 1, parts["thought"].stop + 1)  # a thought token sees the prefix and its own past
    assert first["thought", "wrist"] == pytest.approx(np.mean([4 / count for count in seen]))
    assert first["actions", "thought"] == pytest.approx(len(thoughts[0]) / length)
    weights_TT = attention_maps(policy, sequence(policy, observations[1], thoughts[1]))[1].mean(0)
    where = segments(policy, sequence(policy, observations[1], thoughts[1]))
    last = mass[(mass["decision"] == 1) & (mass["layer"] == 1)].set_index(["query", "source"])["share"]
    by_loop = [
        sum(float(weights_TT[q, k]) for k in range(4, 8)) for q in range(where["actions"].start, len(weights_TT))
    ]
    assert last["actions", "wrist"] == pytest.approx(np.mean(by_loop))


def test_a_decoder_that_reads_its_actions_is_refused(make_policy: Callable[..., Policy]) -> None:
    rng, writes = np.random.default_rng(4), make_policy(decoder="autoregressive", slot_embedding=False)
    with pytest.raises(UserError, match="autoregressive; give one with a hybrid decoder"):
        attention_mass(writes, [random_observation(writes, rng)], [thought_ids(writes, rng)])
