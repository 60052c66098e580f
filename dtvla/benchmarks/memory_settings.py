"""What the memory study is told: models, ways to train them, and sizes of batches."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from omegaconf import OmegaConf

from dtvla.cli import config_dir
from dtvla.errors import UserError
from dtvla.policy.adapters import LoraSettings
from dtvla.policy.placement import place

CHECKPOINTING = {"gradient_checkpointing": True}
LORA = {"lora": {"r": LoraSettings.r, "alpha": LoraSettings.alpha, "dropout": LoraSettings.dropout}}
QLORA = {**LORA, "quantize": "4bit"}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("adamw", {}),
    "full, 8-bit Adam": ("adamw_8bit", {}),
    "full, checkpointing": ("adamw", CHECKPOINTING),
    "full, 8-bit Adam, checkpointing": ("adamw_8bit", CHECKPOINTING),
    "LoRA": ("adamw", LORA),
    "LoRA, checkpointing": ("adamw", LORA | CHECKPOINTING),
    "QLoRA": ("adamw", QLORA),
    "QLoRA, checkpointing": ("adamw", QLORA | CHECKPOINTING),
}
"""Way to train -> ``algorithm.optimizer.name``, and what it sets in the ``model`` group."""
PRECISIONS = ("bf16-mixed", "32-true")


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        model: the ``model`` group, fresh weights.
        method: one of :data:`METHODS`.
        micro_batch: samples of a forward pass.
        precision: of :data:`PRECISIONS`.
        prompt_tokens: text tokens of the prompt.
        thought_tokens: of the thought, tags not counted.
    """

    model: Mapping[str, Any]
    method: str
    micro_batch: int
    precision: str = PRECISIONS[0]
    prompt_tokens: int = 45
    thought_tokens: int = 90

    @property
    def optimizer(self) -> str:
        """``algorithm.optimizer.name``."""
        return METHODS[self.method][0]

    @property
    def can_be_sharded(self) -> bool:
        """Whether FSDP takes it: bitsandbytes' numbers can't be shared out."""
        return self.optimizer == "adamw" and "quantize" not in METHODS[self.method][1]

    def model_settings(self) -> dict[str, Any]:
        """The ``model`` group with the method's changes."""
        return {**self.model, **METHODS[self.method][1], "checkpoint": None, "seed": 0}


@dataclass(frozen=True)
class Settings:
    """See ``conf/benchmark.yaml``, which has the same names.

    Attributes:
        models: options of the ``model`` group, with fresh weights.
        methods: of :data:`METHODS`.
        micro_batches: samples of a forward pass.
        precision: of :data:`PRECISIONS`.
        gpus: that share the weights out, for the column of FSDP.
        measure: whether to run the steps, too; None: where there is a GPU.
        device: where; ``auto`` is the GPU when there is one.
    """

    models: tuple[str, ...] = ("deepthinkvla", "small", "nano")
    methods: tuple[str, ...] = field(default_factory=lambda: tuple(METHODS))
    micro_batches: tuple[int, ...] = (1, 2, 4, 8)
    precision: str = PRECISIONS[0]
    gpus: int = 8
    measure: bool | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        known = {
            "models": sorted(path.stem for path in (config_dir() / "model").glob("*.yaml")),
            "methods": list(METHODS),
        }
        for name, choices in known.items():
            values = getattr(self, name)
            unknown = [value for value in values if value not in choices]
            if unknown or not values:
                found = repr(unknown[0]) + " is unknown" if unknown else "is empty"
                raise UserError(f"{name}: {found}; use {', '.join(map(repr, choices))}")
        if self.precision not in PRECISIONS:
            raise UserError(f"precision: {self.precision!r} is unknown; use {' or '.join(PRECISIONS)}")
        for name, values in (("micro_batches", self.micro_batches), ("gpus", (self.gpus,))):
            if not values or any(not isinstance(value, int) or value < 1 for value in values):
                raise UserError(f"{name}: {values} are not whole numbers from 1 on; give such")

    def cases(self) -> list[Case]:
        """All of them, by model, method and micro-batch."""
        return [
            Case(model, method, size, self.precision)
            for model in map(model_group, self.models)
            for method in self.methods
            for size in self.micro_batches
        ]

    def device_to_measure(self) -> torch.device | None:
        """Where to run, or None for the prediction alone.

        Raises:
            UserError: the device is not there.
        """
        device = place(self.device, "auto")[0]
        wanted = device.type == "cuda" if self.measure is None else self.measure
        return device if wanted else None


def model_group(name: str) -> dict[str, Any]:
    """An option of the ``model`` group as plain values."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    inside = GlobalHydra.instance().is_initialized()
    with nullcontext() if inside else initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("benchmark", overrides=[f"model={name}"])
    values: Any = OmegaConf.to_container(cfg.model, resolve=True)
    return dict(values)
