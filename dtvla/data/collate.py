"""Samples to a padded batch of token sequences, pictures and actions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dtvla.policy.layout import Batch, Layout, stack


def collate(
    layout: Layout,
    pixels_BNCHW: Tensor,
    instructions: Sequence[str],
    thoughts: Sequence[str | None],
    actions_BSD: Tensor,
) -> Batch:
    """Encode B samples and pad them on the right to the longest.

    Args:
        layout: the policy's sequence layout.
        pixels_BNCHW: uint8 model pixels.
        instructions: B task texts.
        thoughts: B thoughts without tags; None makes a sample without one.
        actions_BSD: float32 action chunks, normalised.
    """
    samples = zip(instructions, thoughts, actions_BSD, strict=True)
    examples = [layout.encode(instruction, thought, actions_SD) for instruction, thought, actions_SD in samples]
    tokens = stack(examples, pad_id=layout.vocabulary.pad_id)
    return Batch(pixels_BNCHW=pixels_BNCHW, actions_BSD=actions_BSD, **tokens)
