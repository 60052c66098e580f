"""Think, then act, over one key-value cache: nothing is encoded twice.

1. :func:`read` encodes pictures and prompt once.
2. :func:`think` decodes a thought token by token, or :func:`extend` feeds a given one.
3. :func:`act` runs the action block (S * D + 3 positions) over the cache and reads all actions from one forward.

Rows of a batch may differ in prompt and thought length. A shorter row carries padding in the cache that nothing sees,
and positions skip it, so each row's result is what it would be alone, up to the rounding of batched arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from dtvla.policy.attention import Segment, positions, visible
from dtvla.policy.layout import Layout
from dtvla.policy.model import HybridVLA
from dtvla.policy.vocabulary import Vocabulary


@dataclass
class Context:
    """What the model has read so far.

    Attributes:
        cache: keys and values of T columns.
        segment_BT: what each column holds, :class:`Segment` values.
        hidden_BD: hidden state of each row's last token, from which its next token is predicted.
    """

    cache: DynamicCache
    segment_BT: Tensor
    hidden_BD: Tensor

    def rewind(self, columns: int, hidden_BD: Tensor) -> None:
        """Forget all but the first ``columns`` columns; ``hidden_BD`` is the state at their end."""
        layers: list[Any] = self.cache.layers
        for layer in layers:
            layer.keys, layer.values = layer.keys[..., :columns, :], layer.values[..., :columns, :]
        self.segment_BT, self.hidden_BD = self.segment_BT[:, :columns], hidden_BD


@dataclass
class Thought:
    """A decoded thought.

    Attributes:
        ids: everything after the prompt, up to and including ``<action>``.
        truncated: whether the length cap closed it.
    """

    ids: list[int] = field(default_factory=list)
    truncated: bool = False


def read(model: HybridVLA, pixels_BNCHW: Tensor, prompts: Sequence[Sequence[int]], pad_id: int) -> Context:
    """Encode pictures and prompts.

    Args:
        model: in evaluation mode.
        pixels_BNCHW: uint8 pictures on the model's device.
        prompts: ids of each row's prefix, image tokens included.
        pad_id: filler of shorter rows.
    """
    ids_BT, segment_BT = _rows(prompts, Segment.PREFIX, pad_id, pixels_BNCHW.device)
    cache = DynamicCache()
    embeddings_BTD = model.embed(pixels_BNCHW, ids_BT)
    hidden_BTD = model.transform(embeddings_BTD, visible(segment_BT), positions(segment_BT), cache)
    last_B = torch.tensor([len(prompt) - 1 for prompt in prompts], device=ids_BT.device)
    return Context(cache, segment_BT, hidden_BTD[torch.arange(len(prompts), device=ids_BT.device), last_B])


def extend(
    model: HybridVLA, context: Context, ids_BT: Tensor, segment_BT: Tensor, slot_BT: Tensor | None = None
) -> Tensor:
    """Feed more tokens to the cache.

    Args:
        model: in evaluation mode.
        context: grows by T columns; its ``hidden_BD`` is left to the caller.
        ids_BT: the tokens.
        segment_BT: what they are; ``Segment.PAD`` where a row is shorter.
        slot_BT: which of them are action slots.

    Returns:
        Hidden states (B, T, D) of the new tokens.
    """
    known = context.segment_BT.shape[1]
    context.segment_BT = torch.cat([context.segment_BT, segment_BT], dim=1)
    return model.transform(
        model.embed_text(ids_BT, slot_BT),
        visible(context.segment_BT, first_query=known),
        positions(context.segment_BT)[:, known:],
        context.cache,
    )


def think(
    model: HybridVLA,
    context: Context,
    vocabulary: Vocabulary,
    *,
    max_tokens: int,
    temperature: float = 0.0,
    generators: Sequence[torch.Generator] | None = None,
) -> list[Thought]:
    """Decode one thought per row, until ``</think><action>``.

    The action band, eos, pad, bos and ``<image>`` cannot be chosen. At ``max_tokens`` the two closing tokens are forced
    and the thought is marked as truncated. ``<action>`` itself is not fed: the action block begins with it.

    Args:
        model: in evaluation mode.
        context: after :func:`read`; extended by the thoughts. Rows that are done receive padding.
        vocabulary: all ids.
        max_tokens: cap on the tokens of a thought, tags counted, before it is closed.
        temperature: 0 takes the most likely token.
        generators: per row (on the CPU), needed with a temperature; a row draws one number per token of its own.
    """
    if temperature > 0 and (generators is None or len(generators) != len(context.hidden_BD)):
        raise ValueError("sampling a thought needs one generator per row")
    device = context.hidden_BD.device
    ban_V = torch.zeros(vocabulary.size, device=device)
    ban_V[list(vocabulary.banned_in_thought)] = -torch.inf
    rows = [Thought() for _ in range(len(context.hidden_BD))]
    active = [True] * len(rows)
    hidden_BD = context.hidden_BD
    while True:
        scores_BV = model.logits(hidden_BD) + ban_V
        if temperature > 0 and generators is not None:
            uniform_B = _uniform(generators, active).to(device)
            chosen = _sample(scores_BV / temperature, uniform_B).tolist()
        else:
            chosen = scores_BV.argmax(-1).tolist()
        for index, row in enumerate(rows):
            if active[index]:
                active[index] = not _append(row, chosen[index], vocabulary, max_tokens)
        if not any(active):
            return rows
        feed = [row.ids[-1] if live else vocabulary.pad_id for row, live in zip(rows, active, strict=True)]
        segments = [Segment.THINK if live else Segment.PAD for live in active]
        ids_B1, segment_B1 = torch.tensor([feed, segments], device=device).unsqueeze(-1)
        hidden_BD = extend(model, context, ids_B1, segment_B1)[:, 0]


def feed_thoughts(model: HybridVLA, context: Context, thoughts: Sequence[Sequence[int]], pad_id: int) -> None:
    """Let the model read given thoughts, ``<think>`` to ``</think>``, in one forward."""
    ids_BT, segment_BT = _rows(thoughts, Segment.THINK, pad_id, context.segment_BT.device)
    extend(model, context, ids_BT, segment_BT)


def act(model: HybridVLA, context: Context, layout: Layout) -> Tensor:
    """Read the most likely actions from one forward of the action block.

    Args:
        model: in evaluation mode.
        context: after the thought; extended by the block.
        layout: of the sequences.

    Returns:
        Normalised actions float32 (B, S, D).
    """
    logits_BAK = act_logits(model, context, layout)
    return layout.bins.value(logits_BAK.argmax(-1)).unflatten(1, (layout.chunk, layout.action_dim))


def act_logits(model: HybridVLA, context: Context, layout: Layout) -> Tensor:
    """Logits (B, S * D, K) of the action bins, in the order of the bins; see :func:`act`."""
    rows = len(context.segment_BT)
    ids_BT = torch.tensor([layout.act_block()] * rows, device=context.segment_BT.device)
    slot_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    slot_BT[:, 1 : 1 + layout.slots] = True
    hidden_BTD = extend(model, context, ids_BT, torch.full_like(ids_BT, Segment.ACT), slot_BT)
    return model.action_logits(hidden_BTD[:, : layout.slots], layout.bins)


def _append(row: Thought, chosen: int, vocabulary: Vocabulary, max_tokens: int) -> bool:
    """Add a token, or the forced one at the cap; True when the thought is complete."""
    closed = bool(row.ids) and row.ids[-1] == vocabulary.think_end_id
    if len(row.ids) >= max_tokens:
        forced = vocabulary.action_start_id if closed else vocabulary.think_end_id
        row.truncated = row.truncated or forced != chosen
        chosen = forced
    row.ids.append(chosen)
    return closed and chosen == vocabulary.action_start_id


def _uniform(generators: Sequence[torch.Generator], active: Sequence[bool]) -> Tensor:
    """One number in [0, 1) per active row from its own generator, so that batch-mates do not disturb the draw."""
    draws = [
        torch.rand((), generator=generator, dtype=torch.float64) if live else torch.zeros((), dtype=torch.float64)
        for generator, live in zip(generators, active, strict=True)
    ]
    return torch.stack(draws)


def _sample(scores_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Invert the cumulative distribution of softmax(scores) at ``uniform_B``."""
    cumulative_BV = scores_BV.double().softmax(-1).cumsum(-1)
    threshold_B1 = (uniform_B * cumulative_BV[:, -1]).unsqueeze(-1)
    return torch.searchsorted(cumulative_BV, threshold_B1, right=True)[:, 0]


def _rows(
    sequences: Sequence[Sequence[int]], segment: Segment, pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Right-padded ids and segments (B, T)."""
    longest = max(len(sequence) for sequence in sequences)
    ids = [[*sequence, *[pad_id] * (longest - len(sequence))] for sequence in sequences]
    kinds = [[segment] * len(sequence) + [Segment.PAD] * (longest - len(sequence)) for sequence in sequences]
    return torch.tensor(ids, device=device), torch.tensor(kinds, device=device)
