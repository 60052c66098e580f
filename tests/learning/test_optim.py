"""Protects the optimiser: the published schedule's exact values, every parameter in one right group, 8-bit moments."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dtvla.errors import UserError
from dtvla.learning.optim import (
    OptimizerSettings,
    build_optimizer,
    freeze_parts,
    gradient_norm,
    parameter_groups,
    warmup_cosine,
)

RATES = {"language_model": 3e-3, "vision_tower": 2e-3, "projector": 1e-3}


class Parts(nn.Module):
    """A model with the three parts under the names of transformers' PaliGemma."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.vision_tower = nn.Sequential(nn.Conv2d(3, 4, 2), nn.LayerNorm(4))
        self.model.multi_modal_projector = nn.Linear(4, 6)
        self.model.language_model = nn.Sequential(nn.Embedding(7, 6), nn.RMSNorm(6))
        self.lm_head = nn.Linear(6, 7, bias=False)


def test_schedule_has_the_published_values() -> None:
    ratio = warmup_cosine(1000, 150_005, 0.1)
    assert ratio(0) == pytest.approx(1 / 1001, rel=1e-12)
    assert ratio(1000) == 1.0
    assert ratio(150_005) == pytest.approx(0.1, rel=1e-12)
    assert ratio(200_000) == pytest.approx(0.1, rel=1e-12)


def test_schedule_equals_interpolation_and_half_angle_formula() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        warmup, minimum = int(rng.integers(1, 300)), float(rng.uniform(0, 1))
        total = warmup + int(rng.integers(1, 2000))
        ratio = warmup_cosine(warmup, total, minimum)
        steps = np.arange(total + 1)
        rising = np.interp(steps, [0, warmup], [1 / (warmup + 1), 1])
        falling = 1 - (1 - minimum) * np.sin(0.5 * np.pi * (steps - warmup) / (total - warmup)) ** 2
        expected = np.where(steps < warmup, rising, falling)
        assert np.abs(np.array([ratio(int(step)) for step in steps]) - expected).max() < 1e-12


def test_without_warmup_the_schedule_starts_at_the_peak() -> None:
    assert warmup_cosine(0, 10, 0.1)(0) == 1.0


def test_warmup_as_long_as_the_training_is_refused() -> None:
    with pytest.raises(UserError, match="warmup_steps"):
        warmup_cosine(100, 100, 0.1)


def test_scheduler_gives_each_step_its_own_rate_in_every_group() -> None:
    model = Parts()
    optimizer, scheduler = build_optimizer(model, OptimizerSettings(lr=RATES, warmup_steps=3), total_steps=10)
    ratio = warmup_cosine(3, 10, 0.1)
    for step in range(10):
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(RATES[group["name"].split("/")[0]] * ratio(step))
        optimizer.step()
        scheduler.step()


def test_each_parameter_is_in_the_one_group_of_its_part_and_shape() -> None:
    model = Parts()
    groups = parameter_groups(model, OptimizerSettings(lr=RATES, weight_decay=0.5))
    placed = {id(parameter): group for group in groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(placed) == len(list(model.parameters()))
    expected = {
        "model.vision_tower.0.weight": ("vision_tower/decay", 2e-3, 0.5),
        "model.vision_tower.0.bias": ("vision_tower/no_decay", 2e-3, 0.0),
        "model.vision_tower.1.weight": ("vision_tower/no_decay", 2e-3, 0.0),
        "model.vision_tower.1.bias": ("vision_tower/no_decay", 2e-3, 0.0),
        "model.multi_modal_projector.weight": ("projector/decay", 1e-3, 0.5),
        "model.multi_modal_projector.bias": ("projector/no_decay", 1e-3, 0.0),
        "model.language_model.0.weight": ("language_model/decay", 3e-3, 0.5),
        "model.language_model.1.weight": ("language_model/no_decay", 3e-3, 0.0),
        "lm_head.weight": ("language_model/decay", 3e-3, 0.5),
    }
    for name, parameter in model.named_parameters():
        group = placed[id(parameter)]
        assert (group["name"], group["lr"], group["weight_decay"]) == expected[name]


def test_a_rate_of_zero_freezes_the_part() -> None:
    model = Parts()
    settings = OptimizerSettings(lr={**RATES, "vision_tower": 0.0})
    freeze_parts(model, settings)
    assert not any(p.requires_grad for p in model.model.vision_tower.parameters())
    assert {group["name"].split("/")[0] for group in parameter_groups(model, settings)} == {
        "language_model",
        "projector",
    }


def test_gradient_norm_reports_the_norm_before_clipping() -> None:
    layer = nn.Linear(3, 2)
    for parameter in layer.parameters():
        parameter.grad = torch.randn_like(parameter) * 10
    flat = torch.cat([p.grad.flatten() for p in layer.parameters() if p.grad is not None])
    assert torch.isclose(gradient_norm(layer, None), flat.norm())
    assert torch.isclose(gradient_norm(layer, 1.0), flat.norm())
    clipped = torch.cat([p.grad.flatten() for p in layer.parameters() if p.grad is not None])
    assert torch.allclose(clipped, flat / flat.norm(), atol=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "sgd"},
        {"betas": (0.9,)},
        {"betas": (0.9, 1.0)},
        {"eps": -1e-8},
        {"weight_decay": -0.1},
        {"lr": {"language_model": 1e-3}},
        {"lr": dict.fromkeys(RATES, 0.0)},
        {"lr": {**RATES, "projector": -1.0}},
        {"clip": 0.0},
        {"min_ratio": 1.5},
        {"warmup_steps": -1},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"algorithm\.optimizer\."):
        OptimizerSettings(**wrong)  # type: ignore[arg-type]


class Wide(Parts):
    """With a weight of 4096 elements, the least that bitsandbytes keeps in 8 bits, and smaller ones."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(64, 64, bias=False)
        self.model.language_model = nn.Sequential(nn.Linear(64, 63))


def train(model: Wide, optimizer: torch.optim.Optimizer, scheduler: object, steps: range) -> None:
    """Minimise the distance of every weight to a fixed random target."""
    for _ in steps:
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(1)
        targets = [torch.randn(p.shape, generator=generator) for p in model.parameters()]
        loss = sum(((p - t) ** 2).sum() for p, t in zip(model.parameters(), targets, strict=True))
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        optimizer.step()
        scheduler.step()  # type: ignore[attr-defined]


def eight_bit(**changes: object) -> OptimizerSettings:
    return OptimizerSettings(name="adamw_8bit", lr=RATES, warmup_steps=3, **changes)  # type: ignore[arg-type]


def test_8_bit_moments_are_kept_for_large_weights_in_the_same_groups() -> None:
    torch.manual_seed(0)
    model = Wide()
    optimizer, scheduler = build_optimizer(model, eight_bit(), 100)
    usual, _ = build_optimizer(model, OptimizerSettings(lr=RATES, warmup_steps=3), 100)
    for group, same in zip(optimizer.param_groups, usual.param_groups, strict=True):
        assert all(group[key] == same[key] for key in ("name", "lr", "weight_decay", "betas", "eps"))
        assert [id(p) for p in group["params"]] == [id(p) for p in same["params"]]
    train(model, optimizer, scheduler, range(1))
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        expected = torch.uint8 if parameter.numel() >= 4096 else torch.float32
        assert (state["state1"].dtype, state["state2"].dtype) == (expected, expected)


def test_8_bit_training_stays_near_that_with_whole_moments() -> None:
    ends = []
    for name in ("adamw", "adamw_8bit"):
        torch.manual_seed(0)
        model = Wide()
        start = model.lm_head.weight.detach().clone()
        optimizer, scheduler = build_optimizer(model, OptimizerSettings(name=name, lr=RATES, warmup_steps=3), 100)
        train(model, optimizer, scheduler, range(60))
        ends.append(model.lm_head.weight.detach() - start)
    assert ends[0].abs().mean() > 0.05
    assert (ends[0] - ends[1]).norm() / ends[0].norm() < 0.06


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_a_saved_optimizer_continues_exactly(name: str, tmp_path: Path) -> None:
    settings = OptimizerSettings(name=name, lr=RATES, warmup_steps=3, weight_decay=0.1)

    def begin() -> tuple[Wide, torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        torch.manual_seed(0)
        model = Wide()
        return model, *build_optimizer(model, settings, 20)

    whole = begin()
    train(*whole, range(8))
    first = begin()
    train(*first, range(5))
    torch.save([part.state_dict() for part in first], tmp_path / "saved.pt")
    second = begin()
    parts: tuple[Any, ...] = second
    for part, state in zip(parts, torch.load(tmp_path / "saved.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    train(*second, range(5, 8))
    for ours, theirs in zip(second[0].parameters(), whole[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.fixture
def one_rank() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_8_bit_moments_of_sharded_weights_are_refused_by_name() -> None:
    model = Wide()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    build_optimizer(model, OptimizerSettings(lr=RATES, warmup_steps=3), 10)
    with pytest.raises(UserError, match=r"algorithm\.optimizer\.name.*trainer=fsdp"):
        build_optimizer(model, eight_bit(), 10)
