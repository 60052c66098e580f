"""The autoregressive baseline: actions as tokens, one by one; and the hybrid decoder, which never reads them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dtvla.errors import UserError
from dtvla.policy.cot import CotMode
from dtvla.policy.layout import Segment
from dtvla.policy.loss import sft_loss
from dtvla.policy.policy import Policy, build_policy

from .conftest import SETTINGS, make_batch, random_example, random_observation

pytestmark = pytest.mark.usefixtures("exact_norms")
AUTOREGRESSIVE = {"decoder": "autoregressive", "slot_embedding": False}


def moved_by_slot(policy: Policy, rng: np.random.Generator) -> np.ndarray:
    """(A, T): which logits of a row, prompt and thought included, move when the action token at a slot changes."""
    sample = random_example(policy, rng)
    layout, bins = policy.processor.layout, policy.processor.layout.bins
    batch = make_batch(policy, [sample])
    slots = batch.slot_BT[0].nonzero()[:, 0].tolist()
    with torch.no_grad():
        before = policy.model.logits(policy.model.encode(batch))[0]
        moved = []
        for slot in slots:
            other = make_batch(policy, [sample])
            old = int(other.input_ids_BT[0, slot])
            other.input_ids_BT[0, slot] = bins.first_id + (old - bins.first_id + 1 + rng.integers(30)) % bins.count
            after = policy.model.logits(policy.model.encode(other))[0]
            moved.append(((after - before).abs().amax(-1) > 1e-12).numpy())
    assert len(slots) == layout.slots
    return np.array(moved)


def test_an_action_depends_on_earlier_actions_and_on_no_later_one(make_policy: Callable[..., Policy]) -> None:
    policy, rng = make_policy(**AUTOREGRESSIVE), np.random.default_rng(0)
    moved_AT = moved_by_slot(policy, rng)
    slots = policy.processor.layout.slots
    first = moved_AT.shape[1] - slots - 2  # of the first slot: </action> and eos follow the last
    for slot, moved_T in enumerate(moved_AT):
        assert moved_T.tolist() == [t >= first + slot for t in range(len(moved_T))]


def test_hybrid_logits_do_not_depend_on_any_action_token(policy: Policy) -> None:
    assert not moved_by_slot(policy, np.random.default_rng(1)).any()


def test_batch_mates_and_padding_change_nothing(make_policy: Callable[..., Policy]) -> None:
    policy, rng = make_policy(**AUTOREGRESSIVE), np.random.default_rng(2)
    samples = [random_example(policy, rng) for _ in range(4)]
    with torch.no_grad():
        together = policy.model.encode(make_batch(policy, samples))
        for row, sample in enumerate(samples):
            alone = policy.model.encode(make_batch(policy, [sample]))[0]
            assert (together[row, : len(alone)] - alone).abs().max() < 1e-9


def test_decoder_is_saved_and_a_run_must_name_it(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    policy, rng = make_policy(**AUTOREGRESSIVE), np.random.default_rng(3)
    policy.save(tmp_path / "policy")
    again = Policy.load(tmp_path / "policy", dtype=torch.float64)
    batch = make_batch(policy, [random_example(policy, rng)])
    with torch.no_grad():
        assert torch.equal(again.model(batch), policy.model(batch))
    assert again.model.decoder == "autoregressive"
    checkpoint = {"checkpoint": str(tmp_path / "policy")}
    statistics = policy.processor.normalizer.statistics
    continued = build_policy(SETTINGS | AUTOREGRESSIVE | checkpoint | {"gradient_checkpointing": True}, [], statistics)
    assert continued.model.autoregressive
    assert continued.model.training  # nothing is checkpointed in evaluation mode, in which policies are loaded
    with pytest.raises(UserError, match="model/decoder=autoregressive"):
        build_policy(SETTINGS | checkpoint, [], statistics)


@pytest.mark.parametrize("thinks", [True, False])
def test_trained_baseline_writes_the_actions_it_was_shown(make_policy: Callable[..., Policy], thinks: bool) -> None:
    """Overfit by the supervised loss, with thoughts and without; then the policy acts on the same observations."""
    policy, rng = make_policy(**AUTOREGRESSIVE, initializer_range=0.1, chunk=2), np.random.default_rng(4)
    layout, model = policy.processor.layout, policy.model.float().train()
    observations = [random_observation(policy, rng, side=16) for _ in range(2)]
    samples = []
    for observation in observations:
        actions_SD = torch.from_numpy(rng.uniform(-1, 1, (layout.chunk, layout.action_dim))).float()
        example = layout.encode(observation["instruction"], observation["thought"] if thinks else None, actions_SD)
        samples.append((example, policy.processor.pixels(observation), actions_SD))
    batch = make_batch(policy, samples)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss = sft_loss(model, batch, layout.bins)
        optimizer.zero_grad()
        loss.mean.backward()
        optimizer.step()
    assert loss.mean < 0.02
    assert int(loss.action_correct) == int(loss.action_tokens)
    decisions = policy.act(observations, CotMode("think" if thinks else "none"))
    for decision, observation, (example, _, actions_SD) in zip(decisions, observations, samples, strict=True):
        assert decision.thought == (observation["thought"] if thinks else "")
        expected = layout.bins.decode(layout.bins.encode(actions_SD)).numpy()
        np.testing.assert_allclose(decision.actions_SD, policy.processor.normalizer.unnormalize(expected), atol=1e-6)
        assert (example.segment_T == Segment.THINK).sum() == len(decision.thought_ids) - 1
