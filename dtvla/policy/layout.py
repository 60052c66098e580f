"""The order of tokens in a sequence: images, prompt, thought, actions.

::

    <image> x N   <bos> think-prefix task newline   <think> text </think>   <action> a_1 .. a_SD </action> <eos>
    |------------------ PREFIX ------------------|  |------ THINK ------|   |-------------- ACT --------------|
     label: none                                     label: the token itself

A model trained to predict the next token reads a_1 at ``<action>``, a_2 at the slot of a_1 and so on. The hybrid
decoder takes the action tokens as inputs without content: their embedding is zeroed or replaced, whatever their id is,
and only the labels tell it the actions. The autoregressive decoder reads them.
Source: DeepThinkVLA, ``dt_datasets/dataset.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from dtvla.errors import UserError
from dtvla.policy.action_bins import ActionBins
from dtvla.policy.attention import Segment
from dtvla.policy.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "IGNORE",
    "Batch",
    "Example",
    "Layout",
    "PromptTemplate",
    "Segment",
    "normalize_instruction",
    "pack",
    "stack",
]

IGNORE = -100  # label of a position without supervision, as in torch's cross entropy
PADDING = {"segment": int(Segment.PAD), "labels": IGNORE}  # by field of an example; others have the pad id, or zero


@dataclass
class Example:
    """One sequence of T tokens; subclasses may add fields (T,), which are zero at padding.

    Attributes:
        input_ids_T: int64; action slots hold the action's ids, or placeholders when there is none.
        segment_T: int64 :class:`Segment` values.
        labels_T: int64 ids, :data:`IGNORE` where nothing is predicted; not shifted.
        slot_T: bool, the action slots, whose content the hybrid decoder does not read.
    """

    input_ids_T: Tensor
    segment_T: Tensor
    labels_T: Tensor
    slot_T: Tensor


@dataclass
class Batch:
    """Samples in rows of tokens that are padded on the right, with their pictures and actions.

    Attributes:
        pixels_BNCHW: uint8 pictures of N cameras, one entry per sample.
        input_ids_BT, segment_BT, labels_BT, slot_BT: as in :class:`Example`, padded; one row per sample, or packed.
        actions_BSD: float32 chunks in normalised units, one entry per sample.
        sample_BT: for packed rows, which sample of its row a position belongs to, counted from 0 (padding: -1); samples
            lie in the order of their pictures. None: each row is one sample.
        tokens: supervised tokens. Counted where the batch is made, so that no GPU has to be asked for a number.
        action_tokens: those of them that are action slots.
    """

    pixels_BNCHW: Tensor
    input_ids_BT: Tensor
    segment_BT: Tensor
    labels_BT: Tensor
    slot_BT: Tensor
    actions_BSD: Tensor
    sample_BT: Tensor | None = None
    tokens: int = -1
    action_tokens: int = -1

    def __post_init__(self) -> None:
        """Count the supervised tokens."""
        if self.tokens < 0:
            self.tokens = int((self.labels_BT[:, 1:] != IGNORE).sum())
        if self.action_tokens < 0:
            self.action_tokens = int(((self.labels_BT != IGNORE) & self.slot_BT)[:, 1:].sum())

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Self:
        """A copy on another device."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """A copy in page-locked memory; torch's DataLoader calls this."""
        return self._mapped(lambda tensor: tensor.pin_memory())

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.pixels_BNCHW)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Self:
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {n: change(v) if isinstance(v, Tensor) else v for n, v in values.items()}
        return type(self)(**changed)


def stack(examples: Sequence[Example], pad_id: int) -> dict[str, Any]:
    """Pad examples on the right to the longest: the token fields of a :class:`Batch`, by name.

    Args:
        examples: all of one class, each field of which becomes one of the batch.
        pad_id: stands at padding, as a token; see also :data:`PADDING`.
    """
    return {
        f"{name}_BT": pad_sequence([getattr(e, f"{name}_T") for e in examples], batch_first=True, padding_value=value)
        for name, value in _filler(examples[0], pad_id).items()
    }


def pack(examples: Sequence[Example], pad_id: int, length: int) -> dict[str, Any]:
    """Lay examples one behind the other in a single row of ``length`` tokens: fields of a :class:`Batch`, by name.

    Raises:
        ValueError: they do not fit.
    """
    counts = torch.tensor([len(e.input_ids_T) for e in examples])
    room = length - int(counts.sum())
    if room < 0:
        raise ValueError(f"{len(examples)} examples of {int(counts.sum())} tokens do not fit into {length}")
    rows = {
        f"{name}_BT": functional.pad(torch.cat([getattr(e, f"{name}_T") for e in examples]), (0, room), value=value)
        for name, value in _filler(examples[0], pad_id).items()
    }
    rows["sample_BT"] = functional.pad(torch.arange(len(examples)).repeat_interleave(counts), (0, room), value=-1)
    return {name: row_T[None] for name, row_T in rows.items()}


def _filler(example: Example, pad_id: int) -> dict[str, float]:
    """What stands at padding, by field of an example."""
    values = {**PADDING, "input_ids": pad_id}
    return {name: values.get(name, 0) for name in (field.name.removesuffix("_T") for field in fields(example))}


def normalize_instruction(instruction: str) -> str:
    """The instruction as every DeepThinkVLA prompt writes it."""
    return instruction.lower().strip().replace("_", " ")


@dataclass(frozen=True)
class PromptTemplate:
    """The words around the instruction.

    Attributes:
        think_prefix: asks for a thought; left out when the model acts without one.
        task: contains ``{task}``; follows the prefix without a separator.
    """

    think_prefix: str
    task: str

    def __post_init__(self) -> None:
        """Refuse a template without a place for the task."""
        if "{task}" not in self.task:
            raise UserError(f"model.prompt.task: {self.task!r} lacks the place {{task}}; add it")

    def __call__(self, instruction: str, thinking: bool) -> str:
        """The prompt text; a newline ends it, as PaliGemma's processor does."""
        task = self.task.replace("{task}", normalize_instruction(instruction))
        return f"{self.think_prefix if thinking else ''}{task}\n"

    def to_dict(self) -> dict[str, str]:
        """Plain values for a checkpoint."""
        return {"think_prefix": self.think_prefix, "task": self.task}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PromptTemplate:
        """Inverse of :meth:`to_dict`."""
        return cls(think_prefix=str(values["think_prefix"]), task=str(values["task"]))


@dataclass
class Layout:
    """Builds token sequences.

    Attributes:
        vocabulary: all ids.
        tokenizer: of text; its vocabulary has the ids of ``vocabulary``.
        image_tokens: number of ``<image>`` tokens of all cameras together.
        chunk: action steps S per decision.
        action_dim: action dimensions D.
        prompt_template: the words around the instruction.
        bins: values of the action tokens.
        max_prompt_tokens: the most text tokens of a prompt, images not counted.
        max_thought_tokens: the most tokens of a thought, tags not counted.
    """

    vocabulary: Vocabulary
    tokenizer: PreTrainedTokenizerFast
    image_tokens: int
    chunk: int
    action_dim: int
    prompt_template: PromptTemplate
    bins: ActionBins
    max_prompt_tokens: int
    max_thought_tokens: int

    @property
    def slots(self) -> int:
        """Action tokens of a decision, S * D; token j is step j // D, dimension j % D."""
        return self.chunk * self.action_dim

    def prompt(self, instruction: str, thinking: bool = True) -> list[int]:
        """Ids of the whole prefix: images, bos, prompt text.

        Args:
            instruction: what to do, in words.
            thinking: whether the prompt asks for a thought.

        Raises:
            UserError: the text is longer than ``max_prompt_tokens``.
        """
        text = self._tokens(self.prompt_template(instruction, thinking))
        if len(text) > self.max_prompt_tokens:
            raise UserError(
                f"instruction: its prompt has {len(text)} tokens, the limit is {self.max_prompt_tokens}; "
                "shorten the instruction or raise model.max_prompt_tokens"
            )
        return [self.vocabulary.image_id] * self.image_tokens + [self.vocabulary.bos_id, *text]

    def thought(self, text: str | None, truncate: bool = False) -> list[int]:
        """Ids of ``<think> text </think>``; None gives the two tags alone.

        Args:
            text: the words.
            truncate: cut a text that is too long, instead of refusing it.

        Raises:
            UserError: the thought contains a control tag or is longer than ``max_thought_tokens``.
        """
        ids = self._tokens(text.strip()) if text else []
        if set(ids) & set(self.vocabulary.control_ids):
            raise UserError(f"thought: {text!r} contains a control tag; give the plain text")
        if truncate:
            ids = ids[: self.max_thought_tokens]
        if len(ids) > self.max_thought_tokens:
            raise UserError(
                f"thought: {len(ids)} tokens, the limit is {self.max_thought_tokens}; "
                "shorten the thoughts or raise model.max_thought_tokens"
            )
        return [self.vocabulary.think_start_id, *ids, self.vocabulary.think_end_id]

    def act_block(self) -> list[int]:
        """Ids of the action block: ``<action>``, S * D placeholders, ``</action>``, eos."""
        words = self.vocabulary
        return [words.action_start_id, *[words.bos_id] * self.slots, words.action_end_id, words.eos_id]

    def ending(self, acts: bool) -> list[int]:
        """What follows a thought in training: the action block, or its first token alone."""
        return self.act_block()[: None if acts else 1]

    def text(self, ids: Sequence[int]) -> str:
        """The words of a thought's ids, without control tokens."""
        control = set(self.vocabulary.control_ids)
        return str(self.tokenizer.decode([i for i in ids if i not in control])).strip()

    def encode(
        self,
        instruction: str,
        thought: str | None,
        actions_SD: Tensor | None,
        *,
        truncate: bool = False,
        acts: bool = True,
    ) -> Example:
        """The full training sequence of one sample.

        Args:
            instruction: what to do, in words.
            thought: plain text without tags; None or "" makes a sample without a thought (and without the prompt's
                request for one).
            actions_SD: normalised actions; None leaves the action slots without labels.
            truncate: cut a thought that is too long, instead of refusing it.
            acts: whether the action block is there; otherwise the sequence ends with ``<action>``, which is how a
                thought is told to be complete, and ``actions_SD`` is of no account.

        Raises:
            UserError: prompt or thought too long, or a thought with control tags.
            ValueError: actions of another shape.
        """
        prefix, act = self.prompt(instruction, thinking=bool(thought)), self.ending(acts)
        think = self.thought(thought, truncate)
        ids_T = torch.tensor(prefix + think + act)
        counts = torch.tensor([len(prefix), len(think), len(act)])
        segment_T = torch.tensor([Segment.PREFIX, Segment.THINK, Segment.ACT]).repeat_interleave(counts)
        actions_SD = actions_SD if acts else None
        first = len(prefix) + len(think) + 1
        slot_T = torch.zeros(len(ids_T), dtype=torch.bool)
        slot_T[first : first + self.slots] = True
        if actions_SD is not None and tuple(actions_SD.shape) != (self.chunk, self.action_dim):
            raise ValueError(f"actions have shape {tuple(actions_SD.shape)}, not {(self.chunk, self.action_dim)}")
        if actions_SD is not None:
            ids_T[slot_T] = self.bins.encode(actions_SD).flatten()
        labels_T = torch.where(segment_T == Segment.PREFIX, IGNORE, ids_T)
        if actions_SD is None:
            labels_T[slot_T] = IGNORE
        return Example(input_ids_T=ids_T, segment_T=segment_T, labels_T=labels_T, slot_T=slot_T)

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts, without anything around them."""
        return list(self.tokenizer(list(texts), add_special_tokens=False)["input_ids"])

    def _tokens(self, text: str) -> list[int]:
        return self.tokens([text])[0]
