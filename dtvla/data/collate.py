"""Samples to one batch of token rows, pictures and actions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dtvla.policy.layout import Batch, Layout, pack, stack


def collate(
    layout: Layout,
    pixels_BNCHW: Tensor,
    instructions: Sequence[str],
    thoughts: Sequence[str | None],
    actions_BSD: Tensor,
    pack_tokens: int | None = None,
    acts: bool = True,
) -> Batch:
    """Encode B samples.

    Args:
        layout: the policy's sequence layout; thoughts beyond its limit are cut (see :mod:`dtvla.data.lengths`).
        pixels_BNCHW: uint8 model pixels.
        instructions: B task texts.
        thoughts: B thoughts without tags; None makes a sample without one.
        actions_BSD: float32 action chunks, normalised.
        pack_tokens: lay all samples in one row of so many tokens; None gives each a row, padded to the longest.
        acts: whether sequences go on behind the thought, see :meth:`~dtvla.policy.layout.Layout.encode`.
    """
    samples = zip(instructions, thoughts, actions_BSD, strict=True)
    examples = [layout.encode(*sample, truncate=True, acts=acts) for sample in samples]
    pad_id = layout.vocabulary.pad_id
    tokens = stack(examples, pad_id) if pack_tokens is None else pack(examples, pad_id, pack_tokens)
    return Batch(pixels_BNCHW=pixels_BNCHW, actions_BSD=actions_BSD, **tokens)
