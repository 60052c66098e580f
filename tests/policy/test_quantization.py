"""Protects quantised models: which layers, that they compute with the rounded weights, and that only adapters learn."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import bitsandbytes
import numpy as np
import pytest
import torch
from torch import nn

from dtvla.errors import UserError
from dtvla.policy import adapters, quantization
from dtvla.policy.cot import CotMode
from dtvla.policy.loss import sft_loss
from dtvla.policy.model import HybridVLA
from dtvla.policy.policy import Policy

from .conftest import SETTINGS, make_batch, random_example, random_observation

TEXT = {**SETTINGS["text"], "hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
LAYERS = "model.language_model.layers."


def rounded(layer: Any) -> torch.Tensor:
    """What the layer's stored numbers stand for."""
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        weight: torch.Tensor = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        return weight
    scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    return layer.weight.data.float() * scales[:, None] / 127


@pytest.fixture(params=quantization.BITS)
def pair(request: pytest.FixtureRequest, make_policy: Callable[..., Policy]) -> tuple[Policy, HybridVLA, str]:
    """A quantised policy, the model it was made of, and the setting."""
    policy = make_policy(text=TEXT)
    plain = copy.deepcopy(policy.model.float())
    quantization.quantize(policy.model, request.param)
    return policy, plain, request.param


def test_only_linear_layers_of_the_language_model_are_rounded(pair: tuple[Policy, HybridVLA, str]) -> None:
    policy, plain, bits = pair
    assert quantization.bits_of(policy.model) == bits
    assert quantization.bits_of(plain) is None
    for name, before in plain.named_modules():
        if not isinstance(before, (nn.Linear, nn.Embedding)):
            continue
        after = policy.model.get_submodule(name)
        if name.startswith(LAYERS):
            difference = (rounded(after) - before.weight).abs().max() / before.weight.abs().max()
            assert 0 < difference < (0.02 if bits == "8bit" else 0.2), name
        else:
            assert type(after) is type(before)
            assert torch.equal(after.weight, before.weight), name
    assert policy.model.lm_head.weight is policy.model.get_input_embeddings().weight
    assert quantization.count(policy.model) == quantization.count(plain)
    stored: Any = policy.model.model.language_model.layers[0].mlp.up_proj.weight
    assert stored.nbytes == 64 * 128 // (1 if bits == "8bit" else 2)


def test_it_computes_with_the_rounded_weights(pair: tuple[Policy, HybridVLA, str]) -> None:
    policy, plain, bits = pair
    batch = make_batch(policy, [random_example(policy, np.random.default_rng(0)) for _ in range(3)])
    exact = plain(batch)
    for name, module in plain.named_modules():
        if name.startswith(LAYERS) and isinstance(module, nn.Linear):
            module.weight.data = rounded(policy.model.get_submodule(name))
    expected = plain(batch)
    policy.model.train()  # in evaluation, LLM.int8() rounds the activations too
    assert torch.allclose(policy.model(batch), expected, rtol=1e-4, atol=1e-4)
    policy.model.eval()
    error = (policy.model(batch) - expected).abs().mean() / expected.abs().mean()
    assert error < (1e-4 if bits == "4bit" else 0.1)
    assert (exact - expected).abs().max() > 1e-2


def test_an_adapter_learns_on_quantised_weights_which_stay(pair: tuple[Policy, HybridVLA, str]) -> None:
    policy, _, bits = pair
    model: HybridVLA = policy.model
    rng = np.random.default_rng(1)
    batch = make_batch(policy, [random_example(policy, rng) for _ in range(4)])
    adapters.attach(model, {"r": 4, "parts": list(adapters.PARTS)})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.02)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        sums = sft_loss(model.train(), batch, policy.processor.layout.bins)
        (sums.cross_entropy / sums.tokens).backward()
        optimizer.step()
        losses.append(float(sums.cross_entropy.detach() / sums.tokens))
        decision = policy.act([random_observation(policy, rng)], CotMode("think", max_tokens=6))[0]
        assert np.isfinite(decision.actions_SD).all()
    assert losses[-1] < losses[0]
    after = model.state_dict()
    assert f"{LAYERS}0.mlp.up_proj.lora_B.default.weight" in after
    for name, value in before.items():
        if not adapters.is_adapter(name):
            assert torch.equal(value, after[name]), name
    with pytest.raises(UserError, match=f"can't be merged into {bits}"):
        adapters.merge(model)


def test_moving_a_model_takes_its_scales_along(pair: tuple[Policy, HybridVLA, str]) -> None:
    """As `model.to(device)` does; the copies stand for the other device."""
    policy, _, _ = pair
    model = policy.model
    batch = make_batch(policy, [random_example(policy, np.random.default_rng(2))])
    with torch.no_grad():
        expected = model(batch)
        model._apply(lambda tensor: tensor.clone())
        states = [(m.weight, m.state) for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear8bitLt)]
        assert all(state.CB.data_ptr() == weight.data_ptr() for weight, state in states)
        assert torch.equal(model(batch), expected)
        model.to(torch.bfloat16)
        assert model(batch).isfinite().all()
    assert model.model.language_model.layers[0].mlp.up_proj.weight.dtype in (torch.int8, torch.uint8)


def test_what_cannot_be_is_refused(pair: tuple[Policy, HybridVLA, str], make_policy: Callable[..., Policy]) -> None:
    policy, plain, bits = pair
    with pytest.raises(UserError, match=f"{bits} already"):
        quantization.quantize(policy.model, "4bit")
    with pytest.raises(UserError, match="2bit"):
        quantization.quantize(plain, "2bit")
    with pytest.raises(UserError, match="multiples of 64, not 24"):
        quantization.quantize(make_policy().model, "4bit")


def test_4bit_layers_compute_in_the_type_of_autocast(make_policy: Callable[..., Policy]) -> None:
    model = make_policy(text=TEXT).model.float()
    quantization.quantize(model, "4bit")
    layer: Any = model.model.language_model.layers[0].mlp.up_proj
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    before = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        inside = layer(x)
    expected = x.detach().bfloat16() @ rounded(layer).bfloat16().T
    assert (before.dtype, inside.dtype) == (torch.float32, torch.bfloat16)
    assert torch.allclose(inside, expected, rtol=0.02, atol=0.01)
    inside.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert torch.equal(layer(x), before)
