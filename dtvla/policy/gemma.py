"""A Gemma layer over a static cache.

The arithmetic is that of transformers' ``modeling_gemma``. Projections are called as modules, so adapters and quantised
layers work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

COMPILED_SHAPES = 256  # torch stops with an error when it compiles one function for more shapes


def decoder_layer(
    layer: Any,
    x_ND: Tensor,
    rotation: tuple[Tensor, Tensor],
    cache: tuple[Tensor, Tensor],
    place_N: Tensor,
    bias: Tensor | None,
    rows: int,
    columns: int,
) -> Tensor:
    """One Gemma layer for new tokens over cached ones.

    Args:
        layer: transformers' ``GemmaDecoderLayer``.
        x_ND: hidden states of the N = B * Q new tokens.
        rotation: cosines and (signed) sines (B, Q, 1, head width) of their positions.
        cache: keys and values (R, C, key heads, head width) of this layer; written in place.
        place_N: where in the flattened (R * C) cache each token belongs.
        bias: added to attention scores (B, 1, Q * group, T); None when all queries see all T columns.
        rows: B.
        columns: T.
    """
    attention, tokens, new = layer.self_attn, len(place_N), len(place_N) // rows
    normed = rms_norm(layer.input_layernorm, x_ND)
    heads, width = cache[0].shape[-2:]
    parts = (attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed))
    joint = torch.cat(parts, dim=-1).view(rows, new, -1, width)
    rotated, value = _rotate(joint[:, :, :-heads], rotation), joint[:, :, -heads:]
    query, key = rotated[:, :, :-heads], rotated[:, :, -heads:]
    for stored, fresh in zip(cache, (key, value), strict=True):
        stored.view(-1, heads, width).index_copy_(0, place_N, fresh.reshape(-1, heads, width))
    # Queries that share a key head become queries of that head, so keys and values are read once and never repeated.
    query = query.reshape(rows, new, heads, -1, width).transpose(1, 2).reshape(rows, heads, -1, width)
    keys, values = (stored[:rows, :columns].transpose(1, 2) for stored in cache)
    mixed = functional.scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=attention.scaling)
    mixed = mixed.reshape(rows, heads, new, -1, width).transpose(1, 2).reshape(tokens, -1)
    x_ND = x_ND + attention.o_proj(mixed)
    return x_ND + layer.mlp(rms_norm(layer.post_attention_layernorm, x_ND))


def rms_norm(norm: Any, x: Tensor) -> Tensor:
    """Gemma's norm: in float32 with weight 1 + w, as transformers computes it; float64 stays float64."""
    wide = x if x.dtype == torch.float64 else x.float()
    mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    scale = 1.0 + norm.weight.to(wide.dtype)
    return (wide * mean_square.add_(norm.eps).rsqrt_()).mul_(scale).to(x.dtype)


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding; the sine of the first half carries the minus sign of transformers' ``rotate_half``."""
    cos, sin = rotation
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def compiled(device: torch.device) -> Callable[..., Tensor]:
    """One layer, compiled per shape: all layers share the code, so compiling takes seconds."""
    import torch._dynamo

    options: dict[str, Any] | None = {"coordinate_descent_tuning": True} if device.type == "cuda" else None
    layer = torch.compile(decoder_layer, fullgraph=True, dynamic=False, options=options)
    return torch._dynamo.config.patch(recompile_limit=COMPILED_SHAPES)(layer)
