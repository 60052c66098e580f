"""Decisions: modes of thinking, independence of the batch, and what bad input says."""

from typing import Any

import numpy as np
import pytest
import torch
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
    cot = CotMode(mode, temperature=temperature, max_tokens=8, length=5)
    rows = observations(policy, 4)
    together = policy.act(rows, cot, seeds=[11, 12, 13, 14])
    for index, row in enumerate(rows):
        alone = policy.act([row], cot, seeds=[11 + index])[0]
        assert together[index].thought_ids == alone.thought_ids
        assert together[index].truncated == alone.truncated
        np.testing.assert_array_equal(together[index].actions_SD, alone.actions_SD)


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
    from dtvla.policy import decoding

    pixels = policy.processor.pixels(row)[None]
    with torch.no_grad():
        context = decoding.read(policy.model, pixels, [layout.prompt(row["instruction"])], 0)
        decoding.feed_thoughts(policy.model, context, [shuffled.thought_ids[:-1]], 0)
        actions = decoding.act(policy.model, context, layout).float().numpy()
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
def test_every_cot_configuration_file_is_a_mode(name: str, repository: Any) -> None:
    settings = OmegaConf.to_container(OmegaConf.load(repository / "conf" / "cot" / f"{name}.yaml"))
    assert CotMode.from_config(settings).mode == name


def test_settings_of_the_test_model_are_those_of_the_shipped_ones(repository: Any) -> None:
    for name in ("nano", "small"):
        shipped = OmegaConf.load(repository / "conf" / "model" / f"{name}.yaml")
        assert set(shipped) - {"name"} == set(SETTINGS)
    published = OmegaConf.load(repository / "conf" / "model" / "deepthinkvla.yaml")
    assert set(published) < set(shipped)
