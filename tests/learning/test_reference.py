"""Protects the frozen reference: it never moves, is not trained, and speaks the trained policy's tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dtvla.errors import UserError
from dtvla.learning.reference import Reference, ReferenceSettings
from dtvla.policy import adapters
from dtvla.policy.layout import Batch, stack
from dtvla.policy.policy import Policy

LORA = {"r": 4, "alpha": 8, "dropout": 0.0}


def batch_of(policy: Policy) -> Batch:
    layout = policy.processor.layout
    generator = torch.Generator().manual_seed(0)
    actions_BSD = torch.rand(2, layout.chunk, layout.action_dim, generator=generator) * 2 - 1
    examples = [
        layout.encode("move down", thought, a)
        for thought, a in zip(("move", "move down then close"), actions_BSD, strict=True)
    ]
    side, cameras = policy.processor.images.image_size, len(policy.processor.images.cameras)
    pixels = torch.randint(0, 256, (2, cameras, 3, side, side), dtype=torch.uint8, generator=generator)
    return Batch(pixels_BNCHW=pixels, actions_BSD=actions_BSD, **stack(examples, layout.vocabulary.pad_id))


def judged(reference: Reference, batch: Batch) -> Tensor:
    with torch.no_grad(), reference.lent() as model:
        found: Tensor = model(batch).clone()
    return found


def disturb(policy: Policy) -> None:
    with torch.no_grad():
        for weight in policy.model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.1)


@pytest.mark.parametrize("adapted", [False, True])
def test_the_reference_stays_where_training_began(make_policy: Callable[..., Policy], adapted: bool) -> None:
    policy = make_policy()
    batch = batch_of(policy)
    with torch.no_grad():
        start = policy.model(batch).clone()
    if adapted:
        adapters.attach(policy.model, LORA)
    reference = Reference(policy, ReferenceSettings())
    disturb(policy)
    assert torch.equal(judged(reference, batch), start)
    with torch.no_grad():
        assert not torch.allclose(policy.model(batch), start)  # the trained one is back where it was


def test_an_adapted_model_needs_no_second_one(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy()
    adapters.attach(policy.model, LORA)
    with Reference(policy, ReferenceSettings()).lent() as model:
        assert model is policy.model
    with pytest.raises(UserError, match="algorithm.reference: with an adapter"):
        Reference(policy, ReferenceSettings(offload=True))


def test_a_copy_is_frozen_and_shares_no_weight(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy()
    with Reference(policy, ReferenceSettings()).lent() as model:
        own = {weight.data_ptr() for weight in policy.model.parameters()}
        assert all(not w.requires_grad and w.data_ptr() not in own for w in model.parameters())


def test_another_policy_may_be_the_reference_if_it_has_the_same_tokens(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    policy, other = make_policy(), make_policy()
    policy.model.float()
    other.model.float()
    disturb(other)
    other.save(tmp_path / "other")
    reference = Reference(policy, ReferenceSettings(checkpoint=str(tmp_path / "other")))
    batch = batch_of(policy)
    with torch.no_grad():
        assert torch.equal(judged(reference, batch), other.model(batch))
    other.processor.layout.chunk += 1
    other.save(tmp_path / "longer")
    with pytest.raises(UserError, match=r"algorithm.reference.checkpoint.*other chunk \("):
        Reference(policy, ReferenceSettings(checkpoint=str(tmp_path / "longer")))
