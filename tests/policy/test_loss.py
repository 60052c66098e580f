from collections.abc import Callable
from dataclasses import fields

import numpy as np
import pytest
import torch
from torch.nn import functional

from dtvla.policy.layout import IGNORE
from dtvla.policy.loss import sft_loss
from dtvla.policy.policy import Policy

from .conftest import make_batch, random_example
from .test_model import transformers_logits

pytestmark = pytest.mark.usefixtures("exact_norms")


def test_loss_equals_the_published_formula_on_transformers_logits(make_policy: Callable[..., Policy]) -> None:
    """Shift by one, cross entropy over the full vocabulary, mean over all labels."""
    rng = np.random.default_rng(0)
    for slot_embedding in (True, False):
        policy = make_policy(slot_embedding=slot_embedding)
        for _ in range(3):
            batch = make_batch(policy, [random_example(policy, rng)])
            logits = transformers_logits(policy, batch)
            expected = functional.cross_entropy(
                logits[0, :-1], batch.labels_BT[0, 1:], ignore_index=IGNORE, reduction="mean"
            )
            loss = sft_loss(policy.model, batch, policy.processor.layout.bins)
            assert abs(loss.mean - expected) < 1e-9
            parts = loss.action_cross_entropy + loss.thought_cross_entropy
            assert torch.allclose(parts, loss.cross_entropy.detach(), atol=1e-9)


@pytest.mark.parametrize("smoothing", [0.0, 2.0])
def test_micro_batches_add_up_to_the_batch(policy: Policy, smoothing: float) -> None:
    rng = np.random.default_rng(1)
    samples = [random_example(policy, rng) for _ in range(5)]
    bins = policy.processor.layout.bins

    def gradients_of(groups: list[list]) -> tuple[list, list[torch.Tensor]]:
        policy.model.zero_grad()
        sums = [sft_loss(policy.model, make_batch(policy, g), bins, action_smoothing_bins=smoothing) for g in groups]
        total = sums[0]
        for part in sums[1:]:
            total = total + part
        total.mean.backward()
        return [getattr(total, f.name) for f in fields(total)], [p.grad for p in policy.model.parameters()]

    whole, parts = gradients_of([samples]), gradients_of([samples[:1], samples[1:3], samples[3:]])
    for one, other in zip(whole[0] + whole[1], parts[0] + parts[1], strict=True):
        assert torch.allclose(one.double(), other.double(), atol=1e-9)


def test_sums_count_what_they_say(policy: Policy) -> None:
    rng = np.random.default_rng(2)
    batch = make_batch(policy, [random_example(policy, rng) for _ in range(4)])
    layout = policy.processor.layout
    bins = layout.bins
    with torch.no_grad():
        loss = sft_loss(policy.model, batch, bins)
        hidden = policy.model.encode(batch)
    logits = policy.model.logits(hidden)
    correct = {True: 0, False: 0}
    error = np.zeros(layout.action_dim)
    for b in range(len(batch)):
        slot = 0
        for t in range(1, batch.labels_BT.shape[1]):
            target = int(batch.labels_BT[b, t])
            if target == IGNORE:
                continue
            row = logits[b, t - 1]
            is_action = bool(batch.slot_BT[b, t])
            correct[is_action] += int(row.argmax()) == target
            if is_action:
                best = int(row[bins.first_id : bins.last_id + 1].argmax()) + bins.first_id
                values = bins.decode(torch.tensor([best, target]))
                error[slot % layout.action_dim] += abs(float(values[0] - values[1]))
                slot += 1
    assert (int(loss.action_correct), int(loss.thought_correct)) == (correct[True], correct[False])
    assert int(loss.action_tokens) == 4 * layout.slots == int(loss.action_count) * layout.action_dim
    assert int(loss.tokens) == int(loss.action_tokens) + int(loss.thought_tokens)
    np.testing.assert_allclose(loss.action_l1_D.numpy(), error, atol=1e-4)


def test_smoothed_target_is_a_gaussian_over_the_bins(policy: Policy) -> None:
    rng = np.random.default_rng(3)
    batch = make_batch(policy, [random_example(policy, rng)])
    bins = policy.processor.layout.bins
    with torch.no_grad():
        plain = sft_loss(policy.model, batch, bins)
        smooth = sft_loss(policy.model, batch, bins, action_smoothing_bins=1.5)
        narrow = sft_loss(policy.model, batch, bins, action_smoothing_bins=0.01)
        logits = policy.model.logits(policy.model.encode(batch))[0]
    expected = float(plain.thought_cross_entropy)
    for t in batch.slot_BT[0].nonzero()[:, 0].tolist():
        true = bins.last_id - int(batch.labels_BT[0, t])
        weights = np.exp(-0.5 * ((np.arange(bins.count) - true) / 1.5) ** 2)
        surprise = -logits[t - 1].log_softmax(-1)[[bins.last_id - k for k in range(bins.count)]].numpy()
        expected += float((weights / weights.sum()) @ surprise)
    assert float(smooth.cross_entropy) == pytest.approx(expected, abs=1e-9)
    assert torch.allclose(narrow.cross_entropy, plain.cross_entropy, atol=1e-9)
    assert torch.equal(smooth.action_cross_entropy, plain.action_cross_entropy)
