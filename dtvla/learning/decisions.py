"""Recorded decisions to batches for learning: the sampled ids as they were, each beside its log-probability.

Labels mark the tokens that are learned from: those of the thought that the model chose itself, ``<action>`` included,
and the action tokens of steps that were executed. ``</action>`` and eos were never sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dtvla.policy.layout import IGNORE, Batch, Example, Layout, Segment, pack, stack

if TYPE_CHECKING:
    from dtvla.rollout.trajectories import DecisionRecord


@dataclass
class DecisionExample(Example):
    """The sequence of one decision.

    Attributes:
        old_T: float32 log-probability of each labelled token when it was sampled; 0 elsewhere.
    """

    old_T: Tensor

    @property
    def tokens(self) -> int:
        """Number of labelled tokens."""
        return int((self.labels_T != IGNORE).sum())

    @property
    def old_log_probs(self) -> Tensor:
        """float32, of the labelled tokens in order, when they were sampled."""
        return self.old_T[self.labels_T != IGNORE]


@dataclass(kw_only=True)
class PolicyBatch(Batch):
    """Decisions to learn from. What belongs to a labelled token stands at its own position, not at the one before.

    Attributes:
        old_BT: float32 log-probabilities when the tokens were sampled.
        advantage_BT: float32 advantages.
        weight_BT: float32 weights in the sum over tokens.
        reference_BT: float32 log-probabilities under the reference model, if there is one.
    """

    old_BT: Tensor
    advantage_BT: Tensor
    weight_BT: Tensor
    reference_BT: Tensor | None = None


def encode_decision(layout: Layout, instruction: str, record: DecisionRecord) -> DecisionExample:
    """The sequence that a decision was sampled in.

    Args:
        layout: of the policy that decided.
        instruction: the task in words.
        record: ids are taken as they are; ids of action tokens stand in the slots, for decoders that read them.

    Raises:
        UserError: the prompt is too long.
        ValueError: the record is of another layout.
    """
    _check(layout, record)
    prompt, thought, act = layout.prompt(instruction), record.thought_ids[:-1], layout.act_block()
    ids_T = torch.tensor(prompt + thought + act)
    counts = torch.tensor([len(prompt), len(thought), len(act)])
    segment_T = torch.tensor([Segment.PREFIX, Segment.THINK, Segment.ACT]).repeat_interleave(counts)
    first = len(prompt) + len(record.thought_ids)
    slots = slice(first, first + layout.slots)
    ids_T[slots] = layout.bins.last_id - torch.from_numpy(record.bins_A)
    slot_T, learned_T = torch.zeros(2, len(ids_T), dtype=torch.bool)
    slot_T[slots] = True
    chosen, executed = len(record.thought_ids) - record.forced, record.executed * layout.action_dim
    learned_T[len(prompt) : len(prompt) + chosen] = True
    learned_T[first : first + executed] = True
    old_T = torch.zeros(len(ids_T))
    old_T[len(prompt) : len(prompt) + chosen] = torch.tensor(record.thought_log_probs[:chosen])
    old_T[first : first + executed] = torch.from_numpy(record.action_log_probs_A[:executed])
    labels_T = torch.where(learned_T, ids_T, IGNORE)
    return DecisionExample(input_ids_T=ids_T, segment_T=segment_T, labels_T=labels_T, slot_T=slot_T, old_T=old_T)


def collate_decisions(
    layout: Layout,
    examples: Sequence[DecisionExample],
    pixels_BNCHW: Tensor,
    advantages_B: np.ndarray,
    weights_B: np.ndarray,
    *,
    references: Sequence[Tensor] | None = None,
    pack_tokens: int | None = None,
) -> PolicyBatch:
    """Join B decisions.

    Args:
        layout: of the policy.
        examples: from :func:`encode_decision`.
        pixels_BNCHW: uint8 pictures, as the model saw them.
        advantages_B: of the decisions' trajectories.
        weights_B: of their tokens, see :func:`~dtvla.learning.advantages.token_weights`.
        references: per decision the log-probabilities of its labelled tokens, in order, under the reference model.
        pack_tokens: lay all decisions in one row of so many tokens; None gives each a row, padded to the longest.
    """
    pad_id = layout.vocabulary.pad_id
    tokens = stack(examples, pad_id) if pack_tokens is None else pack(examples, pad_id, pack_tokens)
    learned_BT = tokens["labels_BT"] != IGNORE
    sample_BT = tokens.get("sample_BT", torch.arange(len(examples))[:, None]).expand_as(learned_BT)
    advantage_BT, weight_BT = (
        torch.from_numpy(np.asarray(values_B, np.float32))[sample_BT] * learned_BT
        for values_B in (advantages_B, weights_B)
    )
    reference_BT = None
    if references is not None:
        reference_BT = torch.zeros(learned_BT.shape)
        reference_BT[learned_BT] = torch.cat([torch.as_tensor(own, dtype=torch.float32) for own in references])
    ids_BA = torch.stack([example.input_ids_T[example.slot_T] for example in examples])
    return PolicyBatch(
        pixels_BNCHW=pixels_BNCHW,
        actions_BSD=layout.bins.decode(ids_BA).view(-1, layout.chunk, layout.action_dim),
        advantage_BT=advantage_BT,
        weight_BT=weight_BT,
        reference_BT=reference_BT,
        **tokens,
    )


def _check(layout: Layout, record: DecisionRecord) -> None:
    """Refuse a record that another layout made."""
    ids, words = record.thought_ids, layout.vocabulary
    thought = len(ids) == len(record.thought_log_probs) and ids[-1:] == [words.action_start_id]
    actions = record.bins_A.shape == record.action_log_probs_A.shape == (layout.slots,)
    if not thought or not actions or set(ids) & set(words.banned_in_thought):
        raise ValueError(f"decision at step {record.step}: not one of this policy: {record}")
    if not (0 <= record.forced <= len(ids) and 0 <= record.executed <= layout.chunk):
        raise ValueError(f"decision at step {record.step}: {record.forced} forced ids, {record.executed} steps")
