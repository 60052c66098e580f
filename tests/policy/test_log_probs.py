"""Log-probabilities of whole sequences are those that the engine recorded when it sampled."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from sampled_decisions import SAMPLING, batch_of, encoded, talkative
from torch import Tensor

from dtvla.errors import UserError
from dtvla.learning.decisions import encode_decision
from dtvla.policy import adapters, loss
from dtvla.policy.layout import IGNORE
from dtvla.policy.log_probs import Sampling, score_tokens, token_log_probs
from dtvla.policy.model import supervised_places
from dtvla.policy.policy import Policy

pytestmark = pytest.mark.usefixtures("exact_norms")


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("decoder", ["hybrid", "autoregressive"])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_log_probs_are_those_recorded_at_sampling(
    make_policy: Callable[..., Policy], decoder: str, lora: bool, dtype: torch.dtype, close: float
) -> None:
    policy, rng = talkative(make_policy, decoder, lora), np.random.default_rng(5)
    policy.model.to(dtype)
    samples = encoded(policy, rng)
    batch, layout = batch_of(policy, samples), policy.processor.layout
    found_M = token_log_probs(policy.model, batch, layout, SAMPLING)
    assert found_M.dtype == dtype
    action_M = batch.slot_BT.flatten()[supervised_places(batch) + 1]
    thoughts, actions = list[float](), list[float]()
    for _, _, own in samples:
        thoughts += own.thought_log_probs[: len(own.thought_ids) - own.forced]
        actions += own.action_log_probs_A[: own.executed * layout.action_dim].tolist()
    assert len(set(thoughts)) > 100
    assert len(set(actions)) > 100
    np.testing.assert_allclose(found_M[~action_M].numpy(), thoughts, rtol=0, atol=close)
    np.testing.assert_allclose(found_M[action_M].numpy(), actions, rtol=3e-7, atol=max(close, 1e-7))  # kept in float32


def test_sampled_thoughts_are_of_all_kinds(make_policy: Callable[..., Policy]) -> None:
    """What the test above is worth: it sees ragged, forced and self-closed thoughts, and tags out of place."""
    policy = talkative(make_policy)
    words = policy.processor.layout.vocabulary
    records = [own for _, _, own in encoded(policy, np.random.default_rng(5))]
    assert len({len(own.thought_ids) for own in records}) >= 6
    assert {own.forced for own in records} == {0, 1, 2}
    assert {own.executed for own in records} == {0, 1, 2, 3}
    inner = [i for own in records for i in own.thought_ids[1:-2]]
    tags = {words.think_start_id, words.think_end_id, words.action_start_id, words.action_end_id, words.pad_id}
    assert len(tags & set(inner)) >= 4


@pytest.mark.parametrize("lora", [False, True])
def test_action_log_probs_agree_to_the_last_digits(make_policy: Callable[..., Policy], lora: bool) -> None:
    """The record rounds them to float32; the engine's own logits do not."""
    policy, rng = talkative(make_policy, lora=lora), np.random.default_rng(6)
    layout = policy.processor.layout
    for _, pixels, own in encoded(policy, rng)[::3]:
        instruction = "move down"
        context = policy.engine.read(pixels[None], [layout.prompt(instruction)])
        policy.engine.feed(context, [own.thought_ids[:-1]])
        log_probs_AK = (policy.engine.action_logits(context)[0] / SAMPLING.action_temperature).log_softmax(-1)
        expected_A = log_probs_AK.gather(1, torch.from_numpy(own.bins_A)[:, None])[:, 0]
        batch = batch_of(
            policy, [(encode_decision(layout, instruction, replace(own, executed=layout.chunk)), pixels, own)]
        )
        found_M = token_log_probs(policy.model, batch, layout, SAMPLING)
        assert torch.allclose(found_M[-layout.slots :], expected_A, rtol=0, atol=1e-9)


def test_padding_packing_and_chunks_change_nothing(
    make_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = talkative(make_policy, lora=True)
    samples, layout = encoded(policy, np.random.default_rng(7)), policy.processor.layout

    def log_probs(**more: int) -> Tensor:
        return token_log_probs(policy.model, batch_of(policy, samples, **more), layout, SAMPLING)

    padded = log_probs()
    packed = log_probs(pack_tokens=1 + sum(len(example.labels_T) for example, _, _ in samples))
    alone = [token_log_probs(policy.model, batch_of(policy, [one]), layout, SAMPLING) for one in samples]
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 3 * layout.vocabulary.size)
    for other in (packed, torch.cat(alone), log_probs()):
        assert torch.allclose(padded, other, rtol=0, atol=1e-10)


def test_the_whole_vocabulary_is_computed_for_thoughts_alone_and_in_chunks(
    make_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = talkative(make_policy)
    batch, layout = batch_of(policy, encoded(policy, np.random.default_rng(7))), policy.processor.layout
    rows, logits = list[int](), policy.model.logits
    monkeypatch.setattr(policy.model, "logits", lambda hidden: (rows.append(len(hidden)), logits(hidden))[1])
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 6 * layout.vocabulary.size)
    token_log_probs(policy.model, batch, layout, SAMPLING)
    assert sum(rows) == batch.tokens - batch.action_tokens > 30
    assert max(rows) == 6
    rows.clear()
    score_tokens(policy.model, batch, layout, SAMPLING, lambda p, _, __: {"objective": p.sum()}, entropy=True)
    assert max(rows) == 3  # an entropy takes the double


@pytest.mark.parametrize("kept", ["thoughts", "actions", "none"])
def test_a_batch_may_lack_thoughts_actions_or_both(make_policy: Callable[..., Policy], kept: str) -> None:
    policy = talkative(make_policy)
    samples, layout = encoded(policy, np.random.default_rng(8)), policy.processor.layout
    whole = batch_of(policy, samples)
    action_M = whole.slot_BT.flatten()[supervised_places(whole) + 1]
    expected_M = token_log_probs(policy.model, whole, layout, SAMPLING)
    for example, _, _ in samples:
        gone_T = {"thoughts": example.slot_T, "actions": ~example.slot_T}.get(kept, example.slot_T | True)
        example.labels_T[gone_T] = IGNORE
    batch = batch_of(policy, samples)
    kept_M = {"thoughts": ~action_M, "actions": action_M}.get(kept, action_M & False)
    assert torch.equal(
        token_log_probs(policy.model, batch, layout, SAMPLING).round(decimals=10), expected_M[kept_M].round(decimals=10)
    )
    policy.model.zero_grad()
    scored = score_tokens(
        policy.model, batch, layout, SAMPLING, lambda p, _, __: {"objective": p.sum(), "p": p.detach()}
    )
    scored["objective"].backward()
    assert all(weight.grad is not None for weight in policy.model.parameters())


def test_probabilities_of_what_can_be_sampled_sum_up_to_one(make_policy: Callable[..., Policy]) -> None:
    """Dense and naive: every id in turn as the label of one thought token and of one action token; and entropies."""
    policy = talkative(make_policy)
    layout = policy.processor.layout
    words, bins = layout.vocabulary, layout.bins
    example, pixels, own = next(
        s for s in encoded(policy, np.random.default_rng(9)) if s[2].executed and not s[2].forced
    )
    banned = set(words.banned_in_thought)
    allowed = {False: [i for i in range(words.size) if i not in banned], True: range(bins.first_id, bins.last_id + 1)}
    for is_action, ids in allowed.items():
        place = int(((example.labels_T != IGNORE) & (example.slot_T == is_action)).nonzero()[3, 0])
        batch = batch_of(policy, [(example, pixels, own)] * len(ids))
        batch.labels_BT[:] = IGNORE
        batch.labels_BT[:, place] = torch.tensor(list(ids))
        batch.tokens = len(ids)
        batch.action_tokens = len(ids) * is_action
        scored = score_tokens(
            policy.model,
            batch,
            layout,
            SAMPLING,
            lambda p, h, _: {"objective": p.sum(), "p": p.detach(), "h": h.detach()},
            entropy=True,
        )
        assert float(scored["p"].exp().sum()) == pytest.approx(1, abs=1e-12)
        entropy = -float((scored["p"].exp() * scored["p"]).sum())
        np.testing.assert_allclose(scored["h"].numpy(), entropy, atol=1e-10)


def test_an_adapter_that_is_off_gives_the_base_models_log_probs(make_policy: Callable[..., Policy]) -> None:
    base, adapted = talkative(make_policy), talkative(make_policy, lora=True)
    batch, layout = batch_of(base, encoded(base, np.random.default_rng(10))), base.processor.layout
    expected_M = token_log_probs(base.model, batch, layout, SAMPLING)
    assert (token_log_probs(adapted.model, batch, layout, SAMPLING) - expected_M).abs().max() > 0.1
    with adapters.disabled(adapted.model):
        assert torch.allclose(token_log_probs(adapted.model, batch, layout, SAMPLING), expected_M, rtol=0, atol=1e-10)


def test_mixed_precision_gives_float32_near_the_exact_values(make_policy: Callable[..., Policy]) -> None:
    policy = talkative(make_policy, lora=True)
    policy.model.float()
    batch, layout = batch_of(policy, encoded(policy, np.random.default_rng(11))), policy.processor.layout
    exact_M = token_log_probs(policy.model, batch, layout, SAMPLING)
    with torch.autocast("cpu", torch.bfloat16):
        mixed_M = token_log_probs(policy.model, batch, layout, SAMPLING)
    assert mixed_M.dtype == torch.float32
    assert 0 < (mixed_M - exact_M).abs().mean() < 0.1
    assert (mixed_M * 256 != (mixed_M * 256).round()).float().mean() > 0.9  # not rounded to bfloat16


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_temperatures_without_a_distribution_are_refused(value: float) -> None:
    with pytest.raises(UserError, match=r"data\.temperature"):
        Sampling(thought_temperature=value)
    with pytest.raises(UserError, match=r"data\.action_temperature"):
        Sampling(action_temperature=value)
