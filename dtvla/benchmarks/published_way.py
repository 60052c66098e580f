"""How the published evaluation decides, on transformers' own class and the same weights: generate, then encode again.

1. ``generate`` writes the thought, one eager forward per token, with a growing cache.
2. A second, independent forward reads the actions: the vision tower again, the whole sequence again without a cache
   under the dense hybrid mask, and logits of the whole vocabulary at every position, of which the band of S * D
   positions is used.

Source: DeepThinkVLA, ``modeling_deepthinkvla.py``. Two things differ, so that both sides give the same decision:
a thought that reaches its cap is closed, and padding is invisible. Neither costs measurable time.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PaliGemmaForConditionalGeneration,
    StoppingCriteria,
    StoppingCriteriaList,
)

from dtvla.benchmarks.timing import Mark
from dtvla.policy.attention import positions, visible
from dtvla.policy.layout import Example, Layout, Segment, stack
from dtvla.policy.model import HybridVLA
from dtvla.policy.vocabulary import Vocabulary


class PublishedWay:
    """The published decision on the weights of a :class:`HybridVLA`; nothing is copied.

    Args:
        model: in evaluation mode.
        layout: of its sequences.
    """

    def __init__(self, model: HybridVLA, layout: Layout) -> None:
        """Hang the model's modules into an empty shell of transformers' class."""
        self.model, self.layout = model, layout
        with torch.device("meta"):
            self.shell: Any = PaliGemmaForConditionalGeneration(copy.deepcopy(model.config))
        self.shell.model, self.shell.lm_head = model.model, model.lm_head
        self.shell.eval()
        self.shell.generation_config = GenerationConfig()  # no eos: the stop pair alone ends a thought

    def think(
        self,
        pixels_BNCHW: Tensor,
        prompts: Sequence[Sequence[int]],
        tokens: int,
        mark: Mark,
        temperature: float = 0.0,
    ) -> list[list[int]]:
        """Write a thought of at most ``tokens`` ids per row, ``</think><action>`` included.

        Args:
            pixels_BNCHW: uint8 pictures.
            prompts: ids of each row's prefix; shorter ones are padded on the left.
            tokens: the last two are forced to close the thought.
            mark: told ``read`` when the prompts are encoded and ``thought`` at the end.
            temperature: 0 takes the most likely tokens, else torch's generator draws.
        """
        words = self.layout.vocabulary
        processor = _Thought(words, max(map(len, prompts)), tokens, mark, pixels_BNCHW.device)
        stop = StoppingCriteriaList([_StopPair(words)])
        new_BT = self._generate(pixels_BNCHW, prompts, 0, tokens, processor, stop, temperature)
        mark("thought")
        return [_until_pair(row, words) for row in new_BT.tolist()]

    def act(
        self,
        pixels_BNCHW: Tensor,
        prompts: Sequence[Sequence[int]],
        thoughts: Sequence[Sequence[int]],
        mark: Mark,
        temperature: float = 0.0,
    ) -> Tensor:
        """Bins (B, S * D) from one forward over everything; told ``act`` at the end.

        Args:
            pixels_BNCHW: uint8 pictures.
            prompts: ids of each row's prefix.
            thoughts: ids behind it, up to and including ``<action>``.
            mark: told ``act`` at the end.
            temperature: 0 takes the most likely bins, else torch's generator draws.
        """
        layout, device = self.layout, pixels_BNCHW.device
        pairs = list(zip(prompts, thoughts, strict=True))
        examples = [sequence(layout, prompt, thought) for prompt, thought in pairs]
        batch = {name: t.to(device) for name, t in stack(examples, layout.vocabulary.pad_id).items()}
        images_BID = self.model.embed_images(pixels_BNCHW)
        logits_BTV = self.logits(images_BID, batch["input_ids_BT"], batch["segment_BT"], batch["slot_BT"])
        first_B1 = torch.tensor([[len(prompt) + len(thought) - 1] for prompt, thought in pairs], device=device)
        index_BA = first_B1 + torch.arange(layout.slots, device=device)
        rows_B1 = torch.arange(len(pairs), device=device)[:, None]
        logits_BAK = layout.bins.band(logits_BTV)[rows_B1, index_BA]
        if temperature > 0:
            probabilities_BAK = (logits_BAK / temperature).softmax(-1)
            bins_BA = torch.multinomial(probabilities_BAK.flatten(0, 1), 1).view(index_BA.shape).cpu()
        else:
            bins_BA = layout.bins.most_likely(logits_BAK).cpu()
        mark("act")
        return bins_BA

    def logits(self, images_BID: Tensor, input_ids_BT: Tensor, segment_BT: Tensor, slot_BT: Tensor) -> Tensor:
        """Logits (B, T, V) of the whole vocabulary at every position, from one forward under the dense mask.

        Args:
            images_BID: what the vision tower makes of the pictures; it stands first in each row.
            input_ids_BT, segment_BT, slot_BT: of whole sequences, padded on the right.
        """
        text_BTD = self.model.embed_text(input_ids_BT[:, images_BID.shape[1] :], slot_BT[:, images_BID.shape[1] :])
        output = self.shell.model.language_model(
            inputs_embeds=torch.cat([images_BID.to(text_BTD.dtype), text_BTD], dim=1),
            attention_mask=visible(segment_BT)[:, None],
            position_ids=positions(segment_BT),
            use_cache=False,
        )
        logits_BTV: Tensor = self.shell.lm_head(output.last_hidden_state)
        return logits_BTV

    def autoregressive(self, pixels_BNCHW: Tensor, prompts: Sequence[Sequence[int]], tokens: int, mark: Mark) -> Tensor:
        """``tokens`` action tokens one by one behind an empty thought, as pi0-FAST decodes: bins (B, tokens).

        Args:
            pixels_BNCHW: uint8 pictures.
            prompts: ids of each row's prefix, all of one length.
            tokens: how many.
            mark: told ``read`` when everything given is encoded and ``act`` at the end.
        """
        layout = self.layout
        given = [*layout.thought(None), layout.vocabulary.action_start_id]
        processor = _Band(layout, mark)
        sequences = [[*prompt, *given] for prompt in prompts]
        new_BT = self._generate(pixels_BNCHW, sequences, len(given), tokens, processor, StoppingCriteriaList())
        bins_BT = (layout.bins.last_id - new_BT).cpu()
        mark("act")
        return bins_BT

    def _generate(
        self,
        pixels_BNCHW: Tensor,
        sequences: Sequence[Sequence[int]],
        causal: int,
        tokens: int,
        processor: LogitsProcessor,
        stop: StoppingCriteriaList,
        temperature: float = 0.0,
    ) -> Tensor:
        """New ids (B, T) of ``generate``; the last ``causal`` tokens of each sequence are no prefix."""
        longest, pad_id = max(map(len, sequences)), self.layout.vocabulary.pad_id
        rows = [[*[pad_id] * (longest - len(own)), *own] for own in sequences]
        ids_BT = torch.tensor(rows, device=pixels_BNCHW.device)
        length_B1 = torch.tensor([[len(own)] for own in sequences], device=ids_BT.device)
        type_BT = torch.zeros_like(ids_BT)  # 0 is the prefix, which sees all of itself
        type_BT[:, ids_BT.shape[1] - causal :] = 1
        output = self.shell.generate(
            input_ids=ids_BT,
            attention_mask=(torch.arange(longest, device=ids_BT.device) >= longest - length_B1).long(),
            token_type_ids=type_BT,
            pixel_values=self.model.pixel_values(pixels_BNCHW),
            generation_config=GenerationConfig(
                max_new_tokens=tokens,
                use_cache=True,
                pad_token_id=pad_id,
                bos_token_id=self.layout.vocabulary.bos_id,
                **({"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {}),
            ),
            logits_processor=LogitsProcessorList([processor]),
            stopping_criteria=stop,
        )
        new_BT: Tensor = output[:, ids_BT.shape[1] :]
        return new_BT


class _Thought(LogitsProcessor):
    """Bans the ids that a thought never has, and closes it at the cap."""

    def __init__(self, words: Vocabulary, prompt: int, tokens: int, mark: Mark, device: torch.device) -> None:
        self.words, self.prompt, self.tokens, self.mark = words, prompt, tokens, mark
        self.banned = torch.tensor(words.banned_in_thought, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        done = input_ids.shape[1] - self.prompt
        if done == 0:
            self.mark("read")
        if done < self.tokens - 2:
            return scores.index_fill_(1, self.banned, -torch.inf)
        closed_B = (input_ids[:, -1] == self.words.think_end_id) & (done > 0)
        forced_B = torch.where(closed_B, self.words.action_start_id, self.words.think_end_id)
        return torch.full_like(scores, -torch.inf).scatter(1, forced_B[:, None], 0.0)


class _Band(LogitsProcessor):
    """Leaves the action band alone."""

    def __init__(self, layout: Layout, mark: Mark) -> None:
        self.bins, self.mark, self.started = layout.bins, mark, False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.started:
            self.mark("read")
            self.started = True
        scores[:, : self.bins.first_id] = -torch.inf
        scores[:, self.bins.last_id + 1 :] = -torch.inf
        return scores


class _StopPair(StoppingCriteria):
    """Ends a row whose last two ids are ``</think><action>``."""

    def __init__(self, words: Vocabulary) -> None:
        self.pair = (words.think_end_id, words.action_start_id)
        self.eos_token_id = words.action_start_id  # its presence makes ``generate`` fill finished rows with padding

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        return (input_ids[:, -2] == self.pair[0]) & (input_ids[:, -1] == self.pair[1])


def _until_pair(ids: list[int], words: Vocabulary) -> list[int]:
    """The ids up to the first ``</think><action>``, which is included; the rest is padding."""
    pair = [words.think_end_id, words.action_start_id]
    end = next(i for i in range(2, len(ids) + 1) if ids[i - 2 : i] == pair)
    return ids[:end]


def sequence(layout: Layout, prompt: Sequence[int], thought: Sequence[int]) -> Example:
    """Prompt, thought (up to and including ``<action>``) and action block as one sequence of placeholders."""
    block = layout.act_block()[1:]  # the thought ends with <action>
    ids_T = torch.tensor([*prompt, *thought, *block])
    counts = torch.tensor([len(prompt), len(thought) - 1, len(block) + 1])
    segment_T = torch.tensor([Segment.PREFIX, Segment.THINK, Segment.ACT]).repeat_interleave(counts)
    slot_T = torch.zeros(len(ids_T), dtype=torch.bool)
    slot_T[len(prompt) + len(thought) :][: layout.slots] = True
    return Example(input_ids_T=ids_T, segment_T=segment_T, labels_T=ids_T, slot_T=slot_T)
