"""8-bit and 4-bit weights of the language model's layers, through bitsandbytes.

4 bits: NF4 with double quantisation (Dettmers et al., 2023). 8 bits: LLM.int8() (Dettmers et al., 2022), which computes
columns with outliers in 16 bits. Both hold the weights still: training needs an adapter. Vision tower, projector,
embedding, output layer and norms keep their type.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dtvla.errors import UserError

if TYPE_CHECKING:
    from dtvla.policy.model import HybridVLA

BITS = ("8bit", "4bit")
BLOCK = 64  # weights that share a 4-bit scale
OUTLIER = 6.0  # LLM.int8()'s threshold, as published

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # else it reports each cast, and kernels it can do without


@torch.no_grad()
def quantize(model: HybridVLA, bits: str, compute_dtype: torch.dtype | None = None) -> None:
    """Replace the linear layers of the language model, on the device where they are; nothing is trainable afterwards.

    Args:
        model: without adapter; changed in place.
        bits: one of :data:`BITS`.
        compute_dtype: of 4-bit products; None for the type of the weights.

    Raises:
        UserError: unknown ``bits``, the model is quantised already, or a layer's rows are no whole blocks.
    """
    check_bits(bits)
    if bits_of(model):
        raise UserError(f"quantize: the model is in {bits_of(model)} already; use null")
    model.requires_grad_(False)
    make: Callable[[nn.Linear], nn.Linear] = _int8 if bits == "8bit" else lambda layer: _nf4(layer, compute_dtype)
    for name, module in list(model.model.language_model.named_modules(prefix="model.language_model")):
        if isinstance(module, nn.Linear):
            model.set_submodule(name, make(module))
    setattr(model, f"is_loaded_in_{bits}", True)  # peft looks at it to choose its layers


def check_bits(bits: str | None, setting: str = "model.quantize") -> None:
    """Refuse an unknown number of bits; :class:`UserError` that names the setting."""
    if bits is not None and bits not in BITS:
        raise UserError(f"{setting}: {bits!r} is unknown; use null, {' or '.join(BITS)}")


def bits_of(model: nn.Module) -> str | None:
    """One of :data:`BITS` for a quantised model, else None."""
    return next((bits for bits in BITS if getattr(model, f"is_loaded_in_{bits}", False)), None)


def count(module: nn.Module, trainable: bool = False) -> int:
    """Number of weights, all or the trainable ones; 4-bit ones are stored two to a byte."""
    chosen = [weight for weight in module.parameters() if weight.requires_grad or not trainable]
    states = [getattr(weight, "quant_state", None) for weight in chosen]
    pairs = zip(chosen, states, strict=True)
    return sum(weight.numel() if state is None else math.prod(state.shape) for weight, state in pairs)


def _nf4(layer: nn.Linear, compute_dtype: torch.dtype | None) -> nn.Linear:
    from bitsandbytes.nn import Params4bit

    if layer.in_features % BLOCK:  # bitsandbytes 0.50 reads blocks that cross rows wrongly on CPUs
        raise UserError(f"quantize: 4bit needs layer widths that are multiples of {BLOCK}, not {layer.in_features}")
    made = _nf4_class()(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=compute_dtype or layer.weight.dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    made.support_avx512bf16_for_cpu = False  # would repack the weights in the first evaluation, or fail on their shape
    weight: Any = Params4bit(
        layer.weight.data, compress_statistics=True, blocksize=BLOCK, quant_type="nf4", module=made
    )
    made.weight = weight.to(layer.weight.device)
    made.bias = layer.bias
    return made


def _int8(layer: nn.Linear) -> nn.Linear:
    from bitsandbytes.nn import Int8Params

    made = _int8_class()(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        has_fp16_weights=False,
        threshold=OUTLIER,
        device="meta",
    )
    weight: Any = Int8Params(layer.weight.data, requires_grad=False)
    made.weight = weight.to(layer.weight.device)
    made.bias = layer.bias
    return made


@cache
def _nf4_class() -> Any:
    from bitsandbytes.nn import Linear4bit

    class AutocastNf4(Linear4bit):
        """A 4-bit layer that computes in autocast's type where that is on, as other layers do.

        bitsandbytes' widens its inputs to ``compute_dtype`` there, for slower products and larger activations.
        """

        def forward(self, x: Tensor) -> Tensor:
            kind = x.device.type
            if not torch.is_autocast_enabled(kind):
                return super().forward(x)
            usual, self.compute_dtype = self.compute_dtype, torch.get_autocast_dtype(kind)
            try:
                return super().forward(x.to(self.compute_dtype))
            finally:
                self.compute_dtype = usual

    return AutocastNf4


@cache
def _int8_class() -> Any:
    from bitsandbytes.nn import Linear8bitLt

    class MovableInt8(Linear8bitLt):
        """An 8-bit layer that can be moved with the model around it; bitsandbytes' leaves its scales behind then."""

        def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> nn.Module:
            super()._apply(fn, recurse)
            holders: tuple[Any, Any] = (self.weight, self.state)  # the latter from the first forward pass on
            for holder in holders:
                if holder.SCB is not None:
                    holder.CB, holder.SCB = self.weight.data, holder.SCB.to(self.weight.device)
            return self

    return MovableInt8
