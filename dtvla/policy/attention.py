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
keys and values of prefix and thought can be cached and reused by the action block exactly. :class:`Rule` has the two
departures from this table.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Segment(IntEnum):
    """What a position belongs to. The action block starts at ``<action>``."""

    PREFIX = 0
    THINK = 1
    ACT = 2
    PAD = 3


@dataclass(frozen=True)
class Rule:
    """How a model departs from the table.

    Attributes:
        causal_actions: the action block sees its own past only, as the thought does; for autoregressive decoders.
        pads_visible: every position of a row sees the row's padding, and positions count on through it. That is what
            DeepThinkVLA does wherever a batch mixes lengths (``sft/modeling_deepthinkvla.py``: the columns of
            token type 0, which padding has too, are opened after padding was masked); a row without padding is the
            same either way.
    """

    causal_actions: bool = False
    pads_visible: bool = False


HYBRID = Rule()


def _may_see(query: Tensor, key: Tensor, query_segment: Tensor, key_segment: Tensor, rule: Rule) -> Tensor:
    """The rule for positions and segments of any broadcastable shapes, within one sample."""
    seen = (key <= query) | (key_segment == Segment.PREFIX)
    if not rule.causal_actions:
        seen = seen | (query_segment == Segment.ACT)
    pad = key_segment == Segment.PAD
    return seen | pad if rule.pads_visible else seen & ~pad


def _same_sample(query_segment: Tensor, query_sample: Tensor, key_sample: Tensor) -> Tensor:
    """Samples of a packed row do not see each other. Padding, which nobody sees, sees all: an average needs a value."""
    return (query_sample == key_sample) | (query_segment == Segment.PAD)


def visible(segment_BT: Tensor, sample_BT: Tensor | None = None, rule: Rule = HYBRID) -> Tensor:
    """The dense mask: True where the query (rows) may see the key (columns).

    Args:
        segment_BT: :class:`Segment` values; padding is on the right.
        sample_BT: for packed rows, which sample a position belongs to; None when each row is one sample.
        rule: departures from the table.

    Returns:
        bool (B, T, T).
    """
    position_T = torch.arange(segment_BT.shape[1], device=segment_BT.device)
    mask_BTT = _may_see(position_T[:, None], position_T, segment_BT[:, :, None], segment_BT[:, None, :], rule)
    if sample_BT is not None:
        mask_BTT = mask_BTT & _same_sample(segment_BT[:, :, None], sample_BT[:, :, None], sample_BT[:, None, :])
    return mask_BTT


def mask_mod(segment_BT: Tensor, sample_BT: Tensor | None = None, rule: Rule = HYBRID) -> MaskMod:
    """The same rule as a function of (batch, head, query, key) indices, for ``flex_attention.create_block_mask``."""

    def see(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = _may_see(query, key, segment_BT[batch, query], segment_BT[batch, key], rule)
        if sample_BT is not None:
            own, other = sample_BT[batch, query], sample_BT[batch, key]
            allowed = allowed & _same_sample(segment_BT[batch, query], own, other)
        return allowed

    return see


def block_mask(segment_BT: Tensor, sample_BT: Tensor | None = None, rule: Rule = HYBRID) -> BlockMask:
    """The same rule as FlexAttention's block-sparse mask (B, 1, T, T)."""
    from torch.nn.attention.flex_attention import create_block_mask

    (rows, length), device = segment_BT.shape, str(segment_BT.device)
    return create_block_mask(mask_mod(segment_BT, sample_BT, rule), rows, None, length, length, device=device)


@contextmanager
def unfused(active: bool) -> Iterator[None]:
    """Let FlexAttention run without compilation while ``active``: on the CPU.

    torch 2.11's CPU kernel has no gradients and no float64, and fails to compile for a second sequence length; unfused,
    the operator is exact in every type.
    """
    if not active:
        yield
        return
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        yield


def positions(segment_BT: Tensor, sample_BT: Tensor | None = None, rule: Rule = HYBRID) -> Tensor:
    """1-based positions (B, T) that skip padding, as PaliGemma counts them; padding repeats its left neighbour's.

    Each sample of a packed row counts from 1. With ``rule.pads_visible`` padding counts like any token.
    """
    counted = torch.ones_like(segment_BT) if rule.pads_visible else (segment_BT != Segment.PAD).long()
    place_BT = counted.cumsum(dim=1)
    if sample_BT is not None:
        first_BT = functional.pad(sample_BT[:, 1:] != sample_BT[:, :-1], (1, 0), value=True)
        before_BT = torch.where(first_BT, place_BT - counted, 0).cummax(dim=1).values
        place_BT = place_BT - before_BT
    return place_BT.clamp(min=1)
