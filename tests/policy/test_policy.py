"""Decisions: modes of thinking, independence of the batch, and what bad input says."""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from dtvla.errors import UserError
from dtvla.policy.cot import STRATEGIES, CotMode
from dtvla.policy.policy import Policy

from .conftest import SETTINGS, random_observation

pytestmark = pytest.mark.usefixtures("exact_norms")


def observations(policy: Policy, count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [random_observation(policy, rng) for _ in range(count)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("mode", STRATEGIES)
def test_a_decision_does_not_depend_on_its_batch(policy: Policy, mode: str, temperature: float) -> None:
    cot = CotMode(mode, temperature=temperature, action_temperature=1.6 * temperature, max_tokens=8, length=5)
    rows = observations(policy, 4)
    together = policy.act(rows, cot, seeds=[11, 12, 13, 14])
    for index, row in enumerate(rows):
        alone = policy.act([row], cot, seeds=[11 + index])[0]
        assert together[index].thought_ids == alone.thought_ids
        assert together[index].truncated == alone.truncated
        np.testing.assert_array_equal(together[index].actions_SD, alone.actions_SD)
        np.testing.assert_allclose(together[index].thought_log_probs, alone.thought_log_probs, atol=1e-9)
        np.testing.assert_allclose(together[index].action_log_probs_A, alone.action_log_probs_A, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_speculation_changes_forwards_and_nothing_else(policy: Policy, temperature: float) -> None:
    """Drafts of the decision before, one of them for another thought; later random numbers are the same, too."""
    plain = CotMode(temperature=temperature, action_temperature=temperature, max_tokens=12)
    quick = replace(plain, speculate=True)
    rows, seeds = observations(policy, 3), [1, 2, 3]
    first = policy.act(rows, plain, seeds=seeds)
    drafts = [first[0].thought_ids, first[0].thought_ids, []]
    second = policy.act(rows, quick, seeds=seeds, drafts=drafts)
    ignored = policy.act(rows, plain, seeds=seeds, drafts=drafts)
    for before, after, same in zip(first, second, ignored, strict=True):
        assert before.thought_ids == after.thought_ids
        np.testing.assert_array_equal(before.actions_SD, after.actions_SD)
        assert before.thought_forwards == same.thought_forwards == len(before.thought_ids)
    assert second[0].thought_forwards < first[0].thought_forwards / 3
    assert second[2].thought_forwards == first[2].thought_forwards


def test_a_decision_holds_what_the_model_saw_and_how_many_ids_the_cap_decided(policy: Policy) -> None:
    rng = np.random.default_rng(8)
    rows = [random_observation(policy, rng) for _ in range(12)]
    cot, seeds = CotMode(max_tokens=6, temperature=1.0, action_temperature=1.0), list(range(12))
    decisions = policy.act(rows, cot, seeds=seeds)
    words, forced = policy.processor.layout.vocabulary, []
    for row, decision in zip(rows, decisions, strict=True):
        assert decision.pixels_NCHW is not None
        assert decision.pixels_NCHW.dtype == np.uint8
        np.testing.assert_array_equal(decision.pixels_NCHW, policy.processor.pixels(row).numpy())
        own = len(decision.thought_ids) - decision.thought_forced
        assert all(p < 0 for p in decision.thought_log_probs[:own])
        assert decision.thought_log_probs[own:] == [0.0] * decision.thought_forced
        assert decision.thought_ids[own:] == [words.think_end_id, words.action_start_id][2 - decision.thought_forced :]
        forced.append(decision.thought_forced)
    assert max(forced) == 2
    (given,) = policy.act(rows[:1], CotMode("mask"))
    assert (given.thought_forced, given.thought_log_probs) == (0, [])


def test_actions_are_sampled_at_their_own_temperature(policy: Policy) -> None:
    """Bins, log-probabilities and robot units of one decision agree; a cold sample is the greedy choice."""
    row, layout = observations(policy, 1), policy.processor.layout
    greedy = policy.act(row, CotMode("mask"))[0]
    cold = policy.act(row, CotMode("mask", action_temperature=1e-6), seeds=[5])[0]
    warm = [policy.act(row, CotMode("mask", action_temperature=1.6), seeds=[s])[0] for s in range(3)]
    np.testing.assert_array_equal(cold.actions_SD, greedy.actions_SD)  # bins 0 and 1 have one value and may tie
    assert len({tuple(d.action_bins_A) for d in warm}) == 3
    assert warm[0].thought_ids == greedy.thought_ids
    context = policy.engine.read(policy.processor.pixels(row[0])[None], [layout.prompt(row[0]["instruction"])])
    policy.engine.feed(context, [layout.thought(None)])
    logits_AK = policy.engine.action_logits(context)[0]
    for decision, temperature in ((greedy, 1.0), (warm[0], 1.6)):
        bins_A = torch.from_numpy(decision.action_bins_A)
        expected_A = (logits_AK / temperature).log_softmax(-1).gather(1, bins_A[:, None])[:, 0]
        np.testing.assert_allclose(decision.action_log_probs_A, expected_A, atol=1e-5)
        robot_SD = policy.processor.normalizer.unnormalize(layout.bins.value(bins_A).view(1, 3, 7).numpy())[0]
        np.testing.assert_array_equal(decision.actions_SD, robot_SD.astype(np.float32))
    assert policy.act(row, CotMode("mask"))[0].thought_log_probs == []


@pytest.mark.parametrize("mode", ["think", "none"])
def test_an_autoregressive_decoder_decides_in_every_way(make_policy: Callable[..., Policy], mode: str) -> None:
    policy = make_policy(decoder="autoregressive", slot_embedding=False)
    rows = observations(policy, 2)
    decisions = policy.act(rows, CotMode(mode, max_tokens=5, action_temperature=1.0), seeds=[1, 2])
    assert decisions[0].actions_SD.shape == (3, 7)
    alone = policy.act(rows[1:], CotMode(mode, max_tokens=5, action_temperature=1.0), seeds=[2])[0]
    np.testing.assert_array_equal(decisions[1].actions_SD, alone.actions_SD)


def test_random_thoughts_stay_below_their_limit(policy: Policy) -> None:
    """The published limit, and the text ids where they are fewer."""
    words, row = policy.processor.layout.vocabulary, observations(policy, 1)
    low = policy.act(row, CotMode("random", length=30, id_limit=20), seeds=[1])[0].thought_ids
    assert max(low[1:-2]) < 20
    every = policy.act(row, CotMode("random", length=30), seeds=[1])[0].thought_ids
    assert 20 < max(every[1:-2]) < words.action_first_id
    with pytest.raises(UserError, match="id_limit"):
        policy.act(row, CotMode("random", id_limit=1), seeds=[1])


def test_visible_padding_is_decided_one_by_one(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy()
    policy.model.pads_visible = True
    policy.act(observations(policy, 1), CotMode("mask"))
    with pytest.raises(UserError, match="batch_size=1"):
        policy.act(observations(policy, 2), CotMode("mask"))


def test_modes_condition_the_actions_on_the_right_thought(policy: Policy) -> None:
    layout, words = policy.processor.layout, policy.processor.layout.vocabulary
    row = observations(policy, 1)[0]
    act = {m: policy.act([row], CotMode(m, max_tokens=9, length=6), seeds=[3])[0] for m in STRATEGIES}
    start, end, go = words.think_start_id, words.think_end_id, words.action_start_id
    assert act["mask"].thought_ids == act["none"].thought_ids == [start, end, go]
    assert act["mask"].thought == ""
    assert act["given"].thought_ids == [*layout.thought(row["thought"]), go]
    assert act["given"].thought == row["thought"]
    drawn = act["random"].thought_ids
    assert (drawn[0], drawn[-2:], len(drawn)) == (start, [end, go], 9)
    assert not set(drawn[1:-2]) & (set(words.control_ids) | set(words.banned_in_thought))
    inner = sorted(i for i in act["think"].thought_ids if i not in words.control_ids)
    assert sorted(act["shuffle"].thought_ids[1:-2]) == inner
    again = policy.act([row | {"thought": layout.text(drawn)}], CotMode("given"))[0]
    if again.thought_ids == drawn:  # the drawn ids need not be how the tokenizer would spell their text
        np.testing.assert_array_equal(again.actions_SD, act["random"].actions_SD)


def test_prompt_asks_for_a_thought_except_in_mode_none(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, bool] = {}
    layout = policy.processor.layout
    prompt = type(layout).prompt
    for mode in STRATEGIES:

        def spy(self: Any, text: str, thinking: bool = True, mode: str = mode) -> list[int]:
            asked[mode] = thinking
            return prompt(self, text, thinking)

        monkeypatch.setattr(type(layout), "prompt", spy)
        policy.act(observations(policy, 1), CotMode(mode, max_tokens=3, length=2), seeds=[0])
    assert asked == {mode: mode != "none" for mode in STRATEGIES}


def test_shuffling_restores_the_cache_of_the_prompt(policy: Policy) -> None:
    """The permuted thought acts like the same thought given from outside."""
    layout = policy.processor.layout
    row = observations(policy, 1, seed=4)[0]
    shuffled = policy.act([row], CotMode("shuffle", max_tokens=12), seeds=[5])[0]
    given = policy.act([row], CotMode("think", max_tokens=12))[0]
    assert shuffled.truncated == given.truncated
    pixels = policy.processor.pixels(row)[None]
    context = policy.engine.read(pixels, [layout.prompt(row["instruction"])])
    policy.engine.feed(context, [shuffled.thought_ids[:-1]])
    actions = layout.bins.value(policy.engine.act(context).bins_BA).view(1, 3, 7).numpy()
    np.testing.assert_array_equal(policy.processor.normalizer.unnormalize(actions)[0], shuffled.actions_SD)


def test_actions_come_in_robot_units_and_the_model_keeps_its_mode(policy: Policy) -> None:
    policy.model.train()
    decision = policy.act(observations(policy, 1), CotMode("mask"))[0]
    assert policy.model.training
    policy.model.eval()
    statistics = policy.processor.normalizer.statistics.action
    low, high = np.array(statistics["q01"])[:6], np.array(statistics["q99"])[:6]
    assert decision.actions_SD.shape == (3, 7)
    assert decision.actions_SD.dtype == np.float32
    assert (decision.actions_SD[:, :6] >= low - 1e-5).all()
    assert (decision.actions_SD[:, :6] <= high + 1e-5).all()
    assert decision.latency_s > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wrist": None}, "no picture 'wrist'"),
        ({"agentview": np.zeros((20, 20, 3), np.float32)}, "float32"),
        ({"agentview": np.zeros((3, 20, 20), np.uint8)}, r"\(3, 20, 20\)"),
        ({"instruction": ""}, "instruction"),
        ({"instruction": "move " * 90}, "max_prompt_tokens"),
    ],
)
def test_malformed_observations_are_refused(policy: Policy, change: dict[str, Any], message: str) -> None:
    row = {k: v for k, v in (observations(policy, 1)[0] | change).items() if v is not None}
    with pytest.raises(UserError, match=message):
        policy.act([row], CotMode("mask"))


def test_unfit_cot_settings_are_refused(policy: Policy) -> None:
    with pytest.raises(UserError, match="did you mean think"):
        CotMode.from_config({"mode": "thnk"})
    with pytest.raises(UserError, match="speed"):
        CotMode.from_config({"mode": "think", "speed": 3})
    with pytest.raises(UserError, match="temperature"):
        CotMode("think", temperature=-1)
    with pytest.raises(UserError, match="seeds"):
        policy.act(observations(policy, 1), CotMode("random"))
    row = observations(policy, 1)[0]
    del row["thought"]
    with pytest.raises(UserError, match="given"):
        policy.act([row], CotMode("given"))


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_every_cot_configuration_file_is_a_mode(name: str, repository: Path) -> None:
    """The files say what the code's defaults are, and differ in the mode alone."""
    with initialize_config_dir(str(repository / "conf" / "cot"), version_base="1.3"):
        settings = OmegaConf.to_container(compose(name))
    assert CotMode.from_config(settings) == CotMode(name)
    assert set(settings) == {field.name for field in fields(CotMode)}


def test_settings_of_the_test_model_are_among_the_shipped_ones(repository: Path) -> None:
    for name in ("nano", "small", "deepthinkvla"):
        shipped = OmegaConf.load(repository / "conf" / "model" / f"{name}.yaml")
        assert set(SETTINGS) <= set(shipped)
