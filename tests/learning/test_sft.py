"""Protects the gradient of supervised training: the token mean of the whole batch, however it is cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.gemma import modeling_gemma

from dtvla.data.collate import collate
from dtvla.data.grouping import Cut
from dtvla.data.normalization import Statistics
from dtvla.errors import UserError
from dtvla.learning.optim import PUBLISHED_LR, OptimizerSettings
from dtvla.learning.sft import SFTModule
from dtvla.policy import loss
from dtvla.policy.layout import Batch
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


Parts = Callable[..., list[Batch]]


@pytest.fixture(scope="module")
def parts(policy: Policy) -> Parts:
    """Samples with thoughts of very different lengths, so that means of micro-batches differ from the whole mean."""
    rng, layout = np.random.default_rng(1), policy.processor.layout
    pixels = torch.from_numpy(rng.integers(0, 256, (len(THOUGHTS), 2, 3, 32, 32), dtype=np.uint8))
    actions = torch.from_numpy(rng.uniform(-1, 1, (len(THOUGHTS), 3, 7)).astype(np.float32))
    lengths = np.array([len(layout.encode(TEXTS[0], text, None).input_ids_T) for text in THOUGHTS])

    def make(**cut: int) -> list[Batch]:
        return [
            collate(
                layout, pixels[i], [TEXTS[0]] * len(i), [THOUGHTS[k] for k in i], actions[i], cut.get("pack_tokens")
            )
            for i in Cut(**cut).passes(lengths)
        ]

    return make


def gradients(policy: Policy, parts: list[Batch]) -> dict[str, Tensor]:
    module = SFTModule(policy, OptimizerSettings())
    module.zero_grad()
    module.accumulate(parts, module.loss_of(parts))
    return {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("cut", [*({"micro_batch_size": n} for n in (1, 2, 3, 4, 6, 100)), {"pack_tokens": 200}])
def test_gradient_does_not_depend_on_the_cut(policy: Policy, parts: Parts, cut: dict[str, int]) -> None:
    whole, cut_up = gradients(policy, parts()), gradients(policy, parts(**cut))
    assert len(parts(**cut)) > 1 or cut["micro_batch_size"] == 100
    assert whole.keys() == cut_up.keys()
    for name, gradient in whole.items():
        assert torch.allclose(gradient, cut_up[name], rtol=1e-9, atol=1e-12), name


def test_gradient_does_not_depend_on_the_chunks_of_the_loss(
    policy: Policy, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = gradients(policy, parts())
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 7 * policy.model.lm_head.out_features)
    for name, gradient in gradients(policy, parts()).items():
        assert torch.allclose(gradient, whole[name], rtol=1e-9, atol=1e-12), name


def test_gradient_is_that_of_the_token_mean_over_the_batch(policy: Policy, parts: Parts) -> None:
    """Independent: one plain mean over the logits of the supervised positions."""
    found = gradients(policy, parts(micro_batch_size=2))
    policy.model.zero_grad()
    [batch] = parts()
    logits_MV = policy.model(batch)
    labels_M = batch.labels_BT[:, 1:][batch.labels_BT[:, 1:] != -100]
    picked_M = logits_MV.log_softmax(-1).gather(1, labels_M[:, None])[:, 0]
    (-picked_M.mean()).backward()  # type: ignore[no-untyped-call]
    for name, parameter in policy.model.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, found[name], rtol=1e-8, atol=1e-12), name


def test_a_chunked_loss_refuses_to_give_its_gradient_twice(policy: Policy, parts: Parts) -> None:
    sums = loss.sft_loss(policy.model, parts()[0], policy.processor.layout.bins)
    sums.cross_entropy.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        sums.cross_entropy.backward()


def test_frozen_parts_get_no_gradient(policy: Policy, parts: Parts) -> None:
    module = SFTModule(policy, OptimizerSettings(lr={**PUBLISHED_LR, "vision_tower": 0.0}))
    try:
        policy.model.zero_grad()
        module.accumulate(parts(), module.loss_of(parts()))
        for name, parameter in policy.model.named_parameters():
            assert parameter.requires_grad == ("vision_tower" not in name)
            assert parameter.requires_grad or parameter.grad is None
    finally:
        policy.model.requires_grad_(True)


@pytest.mark.parametrize("wrong", [{"action_smoothing_bins": -1.0}])
def test_impossible_settings_are_refused(policy: Policy, wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match="algorithm"):
        SFTModule(policy, OptimizerSettings(), **wrong)  # type: ignore[arg-type]
