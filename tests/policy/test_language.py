"""Nothing depends on what is skipped: loss and every gradient are those of transformers' layers on whole rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dtvla.policy import adapters
from dtvla.policy.attention import Segment
from dtvla.policy.language import runs
from dtvla.policy.layout import IGNORE, Batch, pack
from dtvla.policy.loss import sft_loss
from dtvla.policy.model import HybridVLA, configure, first_supervised, supervised_places
from dtvla.policy.policy import Policy

from .conftest import SETTINGS, make_batch, random_example

pytestmark = pytest.mark.usefixtures("exact_norms")

MODELS = [{}, {"slot_embedding": False, "decoder": "autoregressive"}]


class WholeRows(nn.Module):
    """The model, on transformers' layers: all rows through all of them, under the dense mask."""

    def __init__(self, model: HybridVLA) -> None:
        super().__init__()
        self.model, self.lm_head, self.logits = model, model.lm_head, model.logits

    def forward(self, batch: Batch, head: Callable[[Tensor], Any]) -> Any:
        hidden_BTD = self.model.encode(batch)
        return head(hidden_BTD.flatten(0, 1).index_select(0, supervised_places(batch)))


def random_batch(policy: Policy, rng: np.random.Generator, count: int, packed: bool) -> Batch:
    samples = [random_example(policy, rng) for _ in range(count)]
    batch = make_batch(policy, samples)
    if not packed:
        return batch
    examples = [example for example, _, _ in samples]
    length = sum(len(example.input_ids_T) for example in examples) + 5
    tokens = pack(examples, policy.processor.layout.vocabulary.pad_id, length)
    return Batch(pixels_BNCHW=batch.pixels_BNCHW, actions_BSD=batch.actions_BSD, **tokens)


def compare(policy: Policy, batch: Batch) -> None:
    """Loss and gradients of both ways, to the last digits of float64."""
    found = []
    for model in (policy.model, WholeRows(policy.model)):
        policy.model.train().zero_grad()
        sums = sft_loss(model, batch, policy.processor.layout.bins)  # type: ignore[arg-type]
        sums.mean.backward()
        learnt = {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}
        found.append(learnt | {"loss": sums.mean.detach(), "error": sums.action_l1_D})
    ours, whole = found
    assert set(ours) == set(whole) >= {n for n, p in policy.model.named_parameters() if p.requires_grad}
    for name, expected in whole.items():
        scale = max(1.0, float(expected.abs().max()))
        assert (ours[name] - expected).abs().max() <= 1e-9 * scale, name


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("changes", [*MODELS, {"gradient_checkpointing": True}, {"slot_embedding": False}])
def test_loss_and_gradients_are_those_of_whole_rows(
    make_policy: Callable[..., Policy], changes: dict[str, Any], packed: bool
) -> None:
    policy, rng = make_policy(**changes), np.random.default_rng(0)
    for count in (1, 2, 5):
        compare(policy, random_batch(policy, rng, count, packed))


@pytest.mark.parametrize("changes", MODELS)
def test_visible_padding_stays_visible(make_policy: Callable[..., Policy], changes: dict[str, Any]) -> None:
    policy = make_policy(**changes)
    policy.model.pads_visible = True
    compare(policy, random_batch(policy, np.random.default_rng(1), 4, packed=False))


def test_any_position_may_be_supervised(policy: Policy) -> None:
    """Not only those that a layout supervises: every prediction of a row, the first one of a picture's token too."""
    rng = np.random.default_rng(2)
    batch = random_batch(policy, rng, 3, packed=False)
    for share in (0.03, 0.5, 1.0):
        chosen_BT = torch.from_numpy(rng.random(batch.input_ids_BT.shape) < share)
        labels_BT = torch.where(chosen_BT, policy.processor.layout.vocabulary.eos_id, IGNORE)
        compare(policy, replace(batch, labels_BT=labels_BT, tokens=-1))


@pytest.mark.parametrize("frozen", ["language_model", "vision_tower"])
def test_frozen_parts_change_nothing(make_policy: Callable[..., Policy], frozen: str) -> None:
    policy = make_policy(freeze=[frozen])
    assert not all(p.requires_grad for p in policy.model.parameters())
    compare(policy, random_batch(policy, np.random.default_rng(3), 3, packed=False))


@pytest.mark.parametrize("packed", [False, True])
def test_adapters_learn_the_same(make_policy: Callable[..., Policy], packed: bool) -> None:
    policy = make_policy(slot_embedding=False)
    adapters.attach(policy.model, {"r": 3, "alpha": 6, "dropout": 0.0, "parts": list(adapters.PARTS)})
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            if adapters.is_adapter(name):
                weight.add_(0.06 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    compare(policy, random_batch(policy, np.random.default_rng(4), 3, packed))


@pytest.mark.parametrize("packed", [False, True])
def test_flex_attention_gives_the_same_logits(make_policy: Callable[..., Policy], packed: bool) -> None:
    policy = make_policy()
    batch, found = random_batch(policy, np.random.default_rng(5), 3, packed), []
    for attention in ("sdpa", "flex"):
        configure(policy.model, SETTINGS | {"attention": attention})
        with torch.no_grad():
            found.append(policy.model(batch))
    assert (found[0] - found[1]).abs().max() < 1e-9


@pytest.mark.parametrize("packed", [False, True])
def test_the_last_layer_computes_supervised_positions_alone(policy: Policy, packed: bool) -> None:
    """And keys and values, which they see of all positions."""
    batch = random_batch(policy, np.random.default_rng(6), 3, packed)
    rows: dict[str, int] = {}
    hooks = []
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "mlp"):
        for index, layer in enumerate(policy.model.model.language_model.layers):
            module = layer.mlp if name == "mlp" else getattr(layer.self_attn, name)
            key = f"{index}.{name}"
            hooks.append(
                module.register_forward_pre_hook(
                    lambda _, inputs, key=key: rows.update({key: inputs[0].flatten(0, -2).shape[0]})
                )
            )
    with torch.no_grad():
        policy.model(batch)
    for hook in hooks:
        hook.remove()
    everything = batch.input_ids_BT.numel()
    assert {rows[f"0.{name}"] for name in ("q_proj", "k_proj", "v_proj", "o_proj", "mlp")} == {everything}
    assert {rows[f"1.{name}"] for name in ("k_proj", "v_proj")} == {everything}
    assert {rows[f"1.{name}"] for name in ("q_proj", "o_proj", "mlp")} == {batch.tokens}
    assert batch.tokens < 0.9 * everything


@pytest.mark.parametrize("packed", [False, True])
def test_runs_leave_out_what_no_row_of_theirs_sees(policy: Policy, packed: bool) -> None:
    rng = np.random.default_rng(7)
    for count in (1, 4):
        batch = random_batch(policy, rng, count, packed)
        mask_BTT = policy.model.mask(batch.segment_BT, batch.sample_BT)
        assert isinstance(mask_BTT, Tensor)
        prefix, rest = runs(mask_BTT, first_supervised(batch))
        (rows, columns), length = prefix.shape[-2:], mask_BTT.shape[-1]
        whole = torch.zeros_like(mask_BTT)
        whole[:, :rows, :columns], whole[:, rows:] = prefix[:, 0], rest[:, 0]
        assert torch.equal(whole, mask_BTT)
        first = (batch.segment_BT[:, :-1] == Segment.PREFIX).long().argmin(1).min()
        assert rows == int(first) - 1  # the end of the shortest prefix predicts the first token behind it
        assert columns < length
        assert prefix[..., -1].any()
