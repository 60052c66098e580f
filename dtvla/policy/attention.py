"""The hybrid attention rule, written once and used as a dense mask and as a FlexAttention ``mask_mod``.

One row of a batch (P prefix: images, bos and prompt; T thought; A action block; . padding)::

              keys    P P P  T T T  A A A  .
    query  P          x x x
           P          x x x                        the prefix sees all of itself
           P          x x x
           T          x x x  x
           T          x x x  x x                   the thought sees the prefix and its own past
           T          x x x  x x x
           A          x x x  x x x  x x x
           A          x x x  x x x  x x x          the action block sees everything, both ways
           A          x x x  x x x  x x x

Padding is seen by nobody. So padding and batch-mates never change a result, a thought depends on no action, and the
keys and values of prefix and thought can be cached and reused by the action block exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

import torch
from torch import Tensor

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Segment(IntEnum):
    """What a position belongs to. The action block starts at ``<action>``."""

    PREFIX = 0
    THINK = 1
    ACT = 2
    PAD = 3


def _may_see(query: Tensor, key: Tensor, query_segment: Tensor, key_segment: Tensor) -> Tensor:
    """The rule for positions and segments of any broadcastable shapes, within one sample."""
    ahead_or_self = (key <= query) | (key_segment == Segment.PREFIX) | (query_segment == Segment.ACT)
    return (key_segment != Segment.PAD) & ahead_or_self


def visible(segment_BT: Tensor, sample_BT: Tensor | None = None, first_query: int = 0) -> Tensor:
    """The dense mask: True where the query (rows) may see the key (columns).

    Args:
        segment_BT: :class:`Segment` values.
        sample_BT: for packed rows, which sample a position belongs to; None when each row is one sample.
        first_query: return only the rows from this position on (the keys before it are cached).

    Returns:
        bool (B, T - first_query, T).
    """
    position_T = torch.arange(segment_BT.shape[1], device=segment_BT.device)
    rows_BQ1, columns_B1T = segment_BT[:, first_query:, None], segment_BT[:, None, :]
    mask_BQT = _may_see(position_T[first_query:, None], position_T, rows_BQ1, columns_B1T)
    if sample_BT is not None:
        mask_BQT = mask_BQT & (sample_BT[:, first_query:, None] == sample_BT[:, None, :])
    return mask_BQT


def mask_mod(segment_BT: Tensor, sample_BT: Tensor | None = None) -> MaskMod:
    """The same rule as a function of (batch, head, query, key) indices, for ``flex_attention.create_block_mask``."""

    def see(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = _may_see(query, key, segment_BT[batch, query], segment_BT[batch, key])
        if sample_BT is not None:
            allowed = allowed & (sample_BT[batch, query] == sample_BT[batch, key])
        return allowed

    return see


def positions(segment_BT: Tensor) -> Tensor:
    """1-based positions (B, T) that skip padding, as PaliGemma counts them; padding repeats its left neighbour's."""
    return (segment_BT != Segment.PAD).cumsum(dim=1).clamp(min=1)
