"""The CPU's packed copy of a model computes what the model computes, and follows it."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from dtvla.policy import packed
from dtvla.policy.decoding import Engine
from dtvla.policy.policy import Policy

from .conftest import random_observation, sentence


def decide(policy: Policy, engine: Engine, seed: int = 0) -> torch.Tensor:
    """Action logits after a given thought."""
    rng = np.random.default_rng(seed)
    layout = policy.processor.layout
    pixels = torch.stack([policy.processor.pixels(random_observation(policy, rng)) for _ in range(2)])
    context = engine.read(pixels, [layout.prompt(sentence(rng, 1, 9)) for _ in range(2)])
    engine.feed(context, [layout.thought(sentence(rng)), layout.thought(None)])
    return engine.action_logits(context).double()


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_product_is_the_product(dtype: torch.dtype, close: float, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for rows in (1, 2, 7, 8, 9, 33):
        inner, outer = (int(n) for n in torch.randint(1, 90, (2,), generator=generator))
        layer = nn.Linear(inner, outer, bias=bias).to(dtype).requires_grad_(False)
        x = torch.randn(1, rows, inner, generator=generator).to(dtype)
        assert packed.can_pack(layer.weight)
        expected, found = layer(x), packed.twin(layer)(x)
        assert found.dtype == dtype
        assert found.shape == expected.shape
        assert (expected - found).abs().max() <= close * expected.abs().max()


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_decisions_in_short_types_are_those_of_float64(
    make_policy: Callable[..., Policy], dtype: torch.dtype, close: float
) -> None:
    exact, short = make_policy(initializer_range=0.1), make_policy(initializer_range=0.1)
    short.model.to(dtype)
    exact.model.load_state_dict({k: v.double() for k, v in short.model.state_dict().items()})
    expected = decide(exact, exact.engine)
    assert (decide(short, short.engine) - expected).abs().max() < close * expected.abs().max()


@pytest.mark.parametrize("fused", [False, True])
def test_the_engine_follows_weights_types_and_storage(make_policy: Callable[..., Policy], fused: bool) -> None:
    """An optimiser's step (a fused one leaves no trace on weights), a change of type and back: the present weights."""
    policy = make_policy()
    policy.model.float()
    engine = policy.engine
    before = decide(policy, engine)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-2, fused=fused)
    for parameter in policy.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    stepped = decide(policy, engine)
    assert (stepped - before).abs().max() > 1e-3
    assert torch.equal(stepped, decide(policy, Engine(policy.model, policy.processor.layout)))
    policy.model.double()
    assert (decide(policy, engine) - stepped).abs().max() < 1e-3
    policy.model.float()
    assert torch.equal(decide(policy, engine), stepped)


def test_the_engine_follows_adapters(make_policy: Callable[..., Policy]) -> None:
    from dtvla.policy import adapters

    policy = make_policy(initializer_range=0.1)
    policy.model.float()
    plain = decide(policy, policy.engine)
    adapters.attach(policy.model, {"r": 2})
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05)
    policy.model.eval()
    adapted = decide(policy, policy.engine)
    assert (adapted - plain).abs().max() > 1e-3
    adapters.merge(policy.model)
    merged = decide(policy, policy.engine)
    assert (merged - adapted).abs().max() < 1e-3 * adapted.abs().max()
