"""Gemma layers that compute what is read of them.

Two things of a whole row are never read when a model learns to write: what the last layer makes of positions behind
which nothing is supervised (pictures and prompt, most of a row), and scores of keys that no query of a run of rows
sees. Keys and values of every position are needed, in every layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer, rotate_half

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    Masks = tuple[Tensor | BlockMask, ...]


class LanguageLayer(GemmaDecoderLayer):
    """transformers' layer, weights and results; its projections are called as modules, so they may be adapted."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        masks: Masks | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
        read_M: Tensor | None = None,
        **arguments: Any,
    ) -> Tensor:
        """Hidden states of the next layer.

        Args:
            hidden_states: (B, T, D).
            masks: (B, 1, Q, K) each, of runs of rows that end with the last one: the run's Q rows see among the first
                K positions. None: ``arguments`` are transformers' own, and so is what happens.
            rotation: cosines and sines (B, T, width of a head) of all positions.
            read_M: int64, which of the masks' rows are read, flattened; None reads all, of masks for all.

        Returns:
            (B, T, D), or (M, D) where they are read.
        """
        if masks is None or rotation is None:
            plain: Tensor = super().forward(hidden_states, **arguments)
            return plain
        attention, normed_BTD = self.self_attn, self.input_layernorm(hidden_states)
        cos, sin = (part.unsqueeze(-2) for part in rotation)
        key_BTHW = _rotated(_heads(attention, attention.k_proj(normed_BTD)), cos, sin)
        value_BTHW = _heads(attention, attention.v_proj(normed_BTD))
        if read_M is None:
            query_BTHW = _rotated(_heads(attention, attention.q_proj(normed_BTD)), cos, sin)
            mixed_BTD = _attend(attention, query_BTHW, key_BTHW, value_BTHW, masks)
            return self._behind(hidden_states, mixed_BTD)
        rows = sum(mask.shape[-2] for mask in masks)
        read = [_read(x, rows, read_M) for x in (hidden_states, normed_BTD, cos, sin)]
        query_MHW = _rotated(_heads(attention, attention.q_proj(read[1])), *read[2:])
        batch = len(hidden_states)
        grid = query_MHW.new_zeros(batch * rows, *query_MHW.shape[1:]).index_copy(0, read_M, query_MHW)
        mixed_BTD = _attend(attention, grid.unflatten(0, (batch, rows)), key_BTHW, value_BTHW, masks)
        return self._behind(read[0], _read(mixed_BTD, rows, read_M))

    def _behind(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        """The layer behind its attention."""
        hidden = hidden + self.self_attn.o_proj(mixed)
        result: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return result


def use_language_layers(layers: nn.ModuleList) -> None:
    """Make transformers' layers :class:`LanguageLayer`, in place; names and weights stay."""
    for layer in layers:
        layer.__class__ = LanguageLayer


def runs(mask: Tensor | BlockMask, first: int) -> Masks:
    """A mask cut into runs of rows, each over the columns up to the last that one of them sees.

    Args:
        mask: of all rows, bool (B, T, T), on a CPU if it is to be cut; one that is sparse itself stays whole.
        first: rows before it are a run, and the others another one; 0 leaves the mask whole.

    Returns:
        (B, 1, Q, K) each.
    """
    if not isinstance(mask, Tensor):
        return (mask,)
    mask_B1TT = mask.unsqueeze(1)
    if first == 0:
        return (mask_B1TT,)
    columns = int(mask[:, :first].any(0).any(0).nonzero()[-1]) + 1
    return (mask_B1TT[:, :, :first, :columns], mask_B1TT[:, :, first:])


def _heads(attention: Any, joint: Tensor) -> Tensor:
    return joint.unflatten(-1, (-1, attention.head_dim))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned: Tensor = x * cos + rotate_half(x) * sin
    return turned


def _read(x: Tensor, rows: int, read_M: Tensor) -> Tensor:
    """(M, ...) of the last ``rows`` positions of (B, T, ...)."""
    return x[:, x.shape[1] - rows :].flatten(0, 1).index_select(0, read_M)


def _attend(attention: Any, query_BTHW: Tensor, key_BTHW: Tensor, value_BTHW: Tensor, masks: Masks) -> Tensor:
    """Transformers' attention for one run of rows after the other: (B, T, heads * width)."""
    kernel: Any = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
    query, key, value = (x.transpose(1, 2) for x in (query_BTHW, key_BTHW, value_BTHW))
    settings = {"scaling": attention.scaling, "is_causal": False}
    settings["dropout"] = attention.attention_dropout if attention.training else 0.0
    parts, done = [], 0
    for mask in masks:
        rows, columns = mask.shape[-2:]
        run = query[:, :, done : done + rows], key[:, :, :columns], value[:, :, :columns]
        parts.append(kernel(attention, *run, mask, **settings)[0])
        done += rows
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).flatten(-2)
