"""Protects training on thoughts alone: the tokens up to ``<action>``, their exact loss, and nothing of the actions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dtvla.data.collate import collate
from dtvla.policy.layout import IGNORE, Batch, Segment
from dtvla.policy.loss import LossSums, sft_loss
from dtvla.policy.policy import Policy

from .conftest import sentence

pytestmark = pytest.mark.usefixtures("exact_norms")


def make_parts(policy: Policy, rng: np.random.Generator, count: int = 5) -> tuple[Any, ...]:
    """Pixels, instructions, thoughts and actions of ``count`` samples; one has no thought."""
    layout, images = policy.processor.layout, policy.processor.images
    shape = (count, len(images.cameras), 3, images.image_size, images.image_size)
    return (
        torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8)),
        [sentence(rng, 1, 8) for _ in range(count)],
        [None, *(sentence(rng) for _ in range(count - 1))],
        torch.from_numpy(rng.uniform(-1, 1, (count, layout.chunk, layout.action_dim)).astype(np.float32)),
    )


def sums_and_gradients(policy: Policy, batches: list[Batch]) -> tuple[LossSums, list[torch.Tensor]]:
    policy.model.zero_grad(set_to_none=False)
    sums = [sft_loss(policy.model, batch, policy.processor.layout.bins) for batch in batches]
    total = sum(sums[1:], sums[0])
    total.cross_entropy.backward()
    weights = policy.model.parameters()
    return total, [torch.zeros_like(w) if w.grad is None else w.grad.clone() for w in weights]


def test_a_sequence_without_actions_is_the_beginning_of_the_one_with_them(policy: Policy) -> None:
    layout, rng = policy.processor.layout, np.random.default_rng(0)
    for thought in (None, sentence(rng), sentence(rng)):
        task, actions_SD = sentence(rng, 1, 8), torch.from_numpy(rng.uniform(-1, 1, (3, 7))).float()
        whole, short = (layout.encode(task, thought, actions_SD, acts=acts) for acts in (True, False))
        length = len(short.input_ids_T)
        assert length == len(whole.input_ids_T) - layout.slots - 2
        for name, tokens_T in vars(short).items():
            assert torch.equal(tokens_T, getattr(whole, name)[:length]), name
        assert short.labels_T[-1] == layout.vocabulary.action_start_id
        assert not short.slot_T.any()


@pytest.mark.parametrize("changes", [{}, {"slot_embedding": False, "decoder": "autoregressive"}])
@pytest.mark.parametrize("pack_tokens", [None, 400])
def test_loss_and_gradient_are_those_of_whole_sequences_whose_actions_are_not_supervised(
    make_policy: Callable[..., Policy], changes: dict[str, Any], pack_tokens: int | None
) -> None:
    policy = make_policy(**changes)
    parts = make_parts(policy, np.random.default_rng(1))
    whole = collate(policy.processor.layout, *parts)
    behind_BT = (whole.segment_BT == Segment.ACT) & (
        whole.input_ids_BT != policy.processor.layout.vocabulary.action_start_id
    )
    masked = replace(whole, labels_BT=whole.labels_BT.masked_fill(behind_BT, IGNORE), tokens=-1, action_tokens=-1)
    expected, expected_gradients = sums_and_gradients(policy, [masked])
    short = collate(policy.processor.layout, *parts, pack_tokens, acts=False)
    found, gradients = sums_and_gradients(policy, [short])
    assert int(found.tokens) == int(found.thought_tokens) == int(expected.tokens) > 0
    assert int(found.action_tokens) == int(found.action_count) == short.action_tokens == 0
    assert found.cross_entropy.item() == pytest.approx(expected.cross_entropy.item(), rel=1e-9)
    assert int(found.thought_correct) == int(expected.thought_correct)
    for one, other in zip(gradients, expected_gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-9)


def test_thoughts_in_micro_batches_add_up_to_the_batch(policy: Policy) -> None:
    pixels, tasks, thoughts, actions = make_parts(policy, np.random.default_rng(2))
    layout = policy.processor.layout

    def batch(rows: slice) -> Batch:
        return collate(layout, pixels[rows], tasks[rows], thoughts[rows], actions[rows], acts=False)

    whole, gradients = sums_and_gradients(policy, [batch(slice(None))])
    cut, cut_gradients = sums_and_gradients(policy, [batch(slice(0, 1)), batch(slice(1, 3)), batch(slice(3, None))])
    assert int(cut.tokens) == int(whole.tokens)
    assert cut.cross_entropy.item() == pytest.approx(whole.cross_entropy.item(), rel=1e-9)
    for one, other in zip(gradients, cut_gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-9)
