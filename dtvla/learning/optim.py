"""Optimiser of the published recipe: AdamW with a learning rate per part of the model, warm-up then cosine.

Source: the DeepThinkVLA training recipe. Its values are the defaults of :class:`OptimizerSettings`. AdamW's two moments
take twice the memory of the weights; with 8 bits each (Dettmers et al., 2022), through bitsandbytes, half of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dtvla.errors import UserError
from dtvla.policy.adapters import PARTS, is_adapter, part_of

NAMES = ("adamw", "adamw_8bit")
PUBLISHED_LR = {"language_model": 2.5e-5, "vision_tower": 5e-6, "projector": 2.5e-6}


@dataclass(frozen=True)
class OptimizerSettings:
    """Settings of AdamW and its schedule.

    Attributes:
        name: one of :data:`NAMES`. ``adamw_8bit`` keeps the moments of weights with at least 4096 elements in 8 bits.
        lr: peak learning rate of each part in :data:`PARTS`; 0 freezes the part.
        betas: decay rates of AdamW's moments.
        eps: AdamW's epsilon.
        weight_decay: decoupled decay of matrices; vectors (biases, norm scales) never decay.
        clip: largest L2 norm of the whole gradient; ``None`` leaves it as it is.
        warmup_steps: W, steps of linear warm-up.
        min_ratio: m, learning rate at the last step as a share of the peak.
    """

    name: str = "adamw"
    lr: Mapping[str, float] = field(default_factory=lambda: dict(PUBLISHED_LR))
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 1e-10
    clip: float | None = 1.0
    warmup_steps: int = 1000
    min_ratio: float = 0.1

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UserError: a part is missing or unknown, or a value is out of range.
        """
        if self.name not in NAMES:
            raise UserError(f"algorithm.optimizer.name: {self.name!r} is unknown; use {' or '.join(NAMES)}")
        if set(self.lr) != set(PARTS):
            found = ", ".join(sorted(self.lr)) or "nothing"
            raise UserError(f"algorithm.optimizer.lr: found {found}; give one value for each of {', '.join(PARTS)}")
        if any(not 0 <= rate < math.inf for rate in self.lr.values()) or not any(self.lr.values()):
            raise UserError("algorithm.optimizer.lr: rates are 0 (frozen) or positive, and at least one is positive")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"algorithm.optimizer.betas: {list(self.betas)} are not two numbers within [0, 1)")
        for setting in ("eps", "weight_decay"):
            if not 0 <= getattr(self, setting) < math.inf:
                raise UserError(f"algorithm.optimizer.{setting}: {getattr(self, setting)} is negative or infinite")
        if self.clip is not None and self.clip <= 0:
            raise UserError(f"algorithm.optimizer.clip: {self.clip} is not positive; use null for no clipping")
        if self.warmup_steps < 0:
            raise UserError(f"algorithm.optimizer.warmup_steps: {self.warmup_steps} is negative")
        if not 0 <= self.min_ratio <= 1:
            raise UserError(f"algorithm.optimizer.min_ratio: {self.min_ratio} is not within [0, 1]")


def warmup_cosine(warmup_steps: int, total_steps: int, min_ratio: float) -> Callable[[int], float]:
    """Return the schedule λ(s), which multiplies the rate of every group at optimiser step s (counted from 0).

    λ(s) = r + (1 - r) s / W for s < W, with r = 1 / (W + 1); then m + (1 - m) (1 + cos(π (s - W) / (T - W))) / 2.
    So λ(0) = 1 / (W + 1), λ(W) = 1 and λ(T) = m; steps after T stay at m.

    Args:
        warmup_steps: W.
        total_steps: T.
        min_ratio: m.

    Raises:
        UserError: the warm-up is not shorter than the training.
    """
    if warmup_steps >= total_steps:
        raise UserError(
            f"algorithm.optimizer.warmup_steps: {warmup_steps} is not below trainer.max_steps={total_steps}; "
            "shorten the warm-up or train longer"
        )
    start = 1 / (warmup_steps + 1)

    def ratio(step: int) -> float:
        if step < warmup_steps:
            return start + (1 - start) * step / warmup_steps
        progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
        return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    return ratio


def freeze_parts(model: nn.Module, settings: OptimizerSettings) -> None:
    """Switch gradients off for the parts whose learning rate is 0, so that they cost no memory.

    Raises:
        UserError: a part that has an adapter would be frozen, or nothing is left to train.
    """
    for name, parameter in model.named_parameters():
        part = part_of(name)
        if settings.lr[part] == 0 and parameter.requires_grad:
            if is_adapter(name):
                raise UserError(f"algorithm.optimizer.lr.{part}: 0, but model.lora.parts names it; change one")
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            "training: no weight is left to train; model.freeze, rates of 0 in algorithm.optimizer.lr and "
            "model.quantize without model.lora hold weights still"
        )


def parameter_groups(model: nn.Module, settings: OptimizerSettings) -> list[dict[str, Any]]:
    """Split the trainable parameters into up to six groups, ``<part>/decay`` and ``<part>/no_decay``.

    Args:
        model: names of its parameters decide the part (:func:`part_of`).
        settings: rates and weight decay.

    Returns:
        Groups for ``torch.optim``: params, name, lr and weight_decay. Every trainable parameter is in exactly one.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, decays = part_of(name), parameter.ndim >= 2
        key = f"{part}/{'decay' if decays else 'no_decay'}"
        decay = settings.weight_decay if decays else 0.0
        group = groups.setdefault(key, {"params": [], "name": key, "lr": settings.lr[part], "weight_decay": decay})
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def build_optimizer(model: nn.Module, settings: OptimizerSettings, total_steps: int) -> tuple[Optimizer, LambdaLR]:
    """Return AdamW over the model's parameter groups and its schedule, stepped once per optimiser step.

    Args:
        model: see :func:`parameter_groups`.
        settings: of the optimiser and the schedule.
        total_steps: T, the optimiser steps of the whole training.

    Raises:
        UserError: the schedule does not fit the number of steps, or 8-bit moments do not suit sharded weights.
    """
    schedule = warmup_cosine(settings.warmup_steps, total_steps, settings.min_ratio)
    groups = parameter_groups(model, settings)
    if settings.name == "adamw":
        optimizer: Optimizer = AdamW(groups, betas=settings.betas, eps=settings.eps, fused=True)
    else:
        optimizer = _adamw_8bit(groups, settings)
    return optimizer, LambdaLR(optimizer, schedule)


def _adamw_8bit(groups: list[dict[str, Any]], settings: OptimizerSettings) -> Optimizer:
    # bitsandbytes' kernels take no sharded tensors, and its blocks of 256 moments, each with its own scale, can't be
    # shared out anew over another number of ranks.
    if any(isinstance(parameter, DTensor) for group in groups for parameter in group["params"]):
        raise UserError(
            "algorithm.optimizer.name: adamw_8bit can't update weights that trainer=fsdp (or another sharding trainer) "
            "shares out over ranks, whose moments are shared out already; use adamw, or trainer=single_gpu or ddp"
        )
    from bitsandbytes.optim import AdamW8bit

    optimizer: Optimizer = AdamW8bit(groups, betas=settings.betas, eps=settings.eps)
    return optimizer


def gradient_norm(model: nn.Module, clip: float | None) -> torch.Tensor:
    """Return the L2 norm of the whole gradient as it was found, and scale the gradient down to ``clip``."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.clip_grad_norm_(parameters, math.inf if clip is None else clip)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
