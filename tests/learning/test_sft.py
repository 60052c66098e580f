"""Protects the gradient of supervised training: the token mean of the whole batch, however it is cut."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.gemma import modeling_gemma

from dtvla.data.collate import collate
from dtvla.data.normalization import Statistics
from dtvla.errors import UserError
from dtvla.learning.optim import PUBLISHED_LR, OptimizerSettings
from dtvla.learning.sft import SFTModule, micro_batches
from dtvla.policy.layout import Batch, Segment
from dtvla.policy.policy import Policy, build_policy

TEXTS = ["pick up the soup", "open the drawer", "the gripper is above the soup and closes", "move left"]
THOUGHTS = [TEXTS[2], TEXTS[3], None, f"{TEXTS[2]} {TEXTS[2]} {TEXTS[3]}", TEXTS[3], TEXTS[2], None]


@pytest.fixture(autouse=True)
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma's norm computes in float32 whatever the model's type; here everything is float64."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1.0 + self.weight)

    monkeypatch.setattr(modeling_gemma.GemmaRMSNorm, "forward", forward)


@pytest.fixture(scope="module")
def policy() -> Policy:
    rng = np.random.default_rng(0)
    layer = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    settings = {
        "checkpoint": None,
        "cameras": ["agentview", "wrist"],
        "image_size": 32,
        "chunk": 3,
        "action_dim": 7,
        "action_bins": 16,
        "action_decode": "fixed",
        "skip_ids": 0,
        "slot_embedding": True,
        "initializer_range": 0.05,
        "max_prompt_tokens": 32,
        "max_thought_tokens": 64,
        "normalizer": "quantile",
        "normalizer_mask": [True] * 6 + [False],
        "seed": 0,
        "tokenizer_size": 512,
        "prompt": {"think_prefix": "think: ", "task": "{task}"},
        "text": {**layer, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 256},
        "vision": {**layer, "num_hidden_layers": 1, "patch_size": 16},
    }
    statistics = Statistics.from_frames(rng.normal(size=(40, 8)), rng.normal(size=(40, 7)))
    policy = build_policy(settings, TEXTS, statistics)
    policy.model.double()
    return policy


@pytest.fixture(scope="module")
def batch(policy: Policy) -> Batch:
    """Samples with thoughts of very different lengths, so that means of micro-batches differ from the whole mean."""
    rng = np.random.default_rng(1)
    count = len(THOUGHTS)
    pixels = torch.from_numpy(rng.integers(0, 256, (count, 2, 3, 32, 32), dtype=np.uint8))
    actions = torch.from_numpy(rng.uniform(-1, 1, (count, 3, 7)).astype(np.float32))
    return collate(policy.processor.layout, pixels, [TEXTS[0]] * count, THOUGHTS, actions)


def gradients(policy: Policy, batch: Batch, size: int | None) -> dict[str, Tensor]:
    module = SFTModule(policy, OptimizerSettings(), micro_batch_size=size)
    module.zero_grad()
    for _ in module.accumulate(batch):
        pass
    return {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 100])
def test_gradient_does_not_depend_on_the_micro_batches(policy: Policy, batch: Batch, size: int) -> None:
    whole, cut = gradients(policy, batch, None), gradients(policy, batch, size)
    assert whole.keys() == cut.keys()
    for name, gradient in whole.items():
        assert torch.allclose(gradient, cut[name], rtol=1e-9, atol=1e-12), name


def test_gradient_is_that_of_the_token_mean_over_the_batch(policy: Policy, batch: Batch) -> None:
    """Independent: one plain mean over the logits of the supervised positions."""
    found = gradients(policy, batch, 2)
    policy.model.zero_grad()
    logits_MV = policy.model(batch)
    labels_M = batch.labels_BT[:, 1:][batch.labels_BT[:, 1:] != -100]
    picked_M = logits_MV.log_softmax(-1).gather(1, labels_M[:, None])[:, 0]
    (-picked_M.mean()).backward()  # type: ignore[no-untyped-call]
    for name, parameter in policy.model.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, found[name], rtol=1e-8, atol=1e-12), name


def test_micro_batches_hold_every_sample_once_without_superfluous_padding(batch: Batch) -> None:
    parts = list(micro_batches(batch, 3))
    assert [len(part) for part in parts] == [3, 3, 1]
    for part in parts:
        assert bool((part.segment_BT[:, -1] != Segment.PAD).any())
    for field in fields(Batch):
        whole = getattr(batch, field.name)
        for index, part in enumerate(parts):
            rows = getattr(part, field.name)
            expected = whole[3 * index : 3 * index + len(part)]
            assert torch.equal(rows, expected[:, : rows.shape[1]] if field.name.endswith("_BT") else expected)


def test_frozen_parts_get_no_gradient(policy: Policy, batch: Batch) -> None:
    module = SFTModule(policy, OptimizerSettings(lr={**PUBLISHED_LR, "vision_tower": 0.0}))
    try:
        policy.model.zero_grad()
        for _ in module.accumulate(batch):
            pass
        for name, parameter in policy.model.named_parameters():
            assert parameter.requires_grad == ("vision_tower" not in name)
            assert parameter.requires_grad or parameter.grad is None
    finally:
        policy.model.requires_grad_(True)


@pytest.mark.parametrize("wrong", [{"micro_batch_size": 0}, {"action_smoothing_bins": -1.0}])
def test_impossible_settings_are_refused(policy: Policy, wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match="algorithm"):
        SFTModule(policy, OptimizerSettings(), **wrong)  # type: ignore[arg-type]
