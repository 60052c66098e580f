"""Think, then act, over one key-value cache: nothing is encoded twice.

1. :meth:`Engine.read` encodes pictures and prompt once.
2. :meth:`Engine.think` decodes a thought, or :meth:`Engine.feed` reads a given one.
3. :meth:`Engine.act` reads all actions from one forward of the action block (S * D + 3 positions), or writes them one
   by one when the model's decoder is autoregressive.

Rows of a batch may differ in prompt and thought length; each row's result is what it would be alone, up to the rounding
of batched arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dtvla.errors import UserError
from dtvla.policy.layout import Layout
from dtvla.policy.model import HybridVLA, image_tokens
from dtvla.policy.runtime import COLUMN_STEP, Forward, Head, Mode, Runtime, Source, choose_bins, power_of_two
from dtvla.policy.writing import Draws, Thought, Writer

__all__ = ["Actions", "Context", "Engine", "Thought"]

PREFIX_STEP = 64  # compiled code takes prompts and given thoughts in multiples of this many tokens
BLOCK = {"cpu": 16, "cuda": 32}  # fed tokens of a speculating forward: about what costs no more than the weights


@dataclass
class Context:
    """What the model has read so far; valid until the engine reads anew, which reuses the cache.

    Attributes:
        lengths: cached tokens of each row.
        prompts: tokens of each row's prompt.
        hidden_BD: hidden state of each prompt's last token.
        slots: the cache row of each row.
        serial: which reading of the engine this is.
    """

    lengths: list[int]
    prompts: list[int]
    hidden_BD: Tensor
    slots: list[int]
    serial: int


@dataclass
class Actions:
    """Decoded actions.

    Attributes:
        bins_BA: int64 bins of the S * D action tokens.
        log_probs_BA: float32, over the bins, at temperature 1 or that of sampling.
        forwards: passes of the model.
    """

    bins_BA: Tensor
    log_probs_BA: Tensor
    forwards: int


class Engine:
    """Decodes with a model; see :mod:`dtvla.policy.decoding`."""

    def __init__(self, model: HybridVLA, layout: Layout, mode: Mode = "auto") -> None:
        """Decode with a model in evaluation mode, whose weights may change between readings.

        Args:
            model: the model.
            layout: of its sequences.
            mode: ``eager``; ``compile``: torch compiles the layers; ``graph``: CUDA graphs of the compiled layers;
                ``auto``: graph on a GPU (eager for quantised models), eager on a CPU.
        """
        self.model, self.layout, self.runtime = model, layout, Runtime(model, layout, mode)
        self._serial = 0

    @torch.inference_mode()
    def read(self, pixels_BNCHW: Tensor, prompts: Sequence[Sequence[int]]) -> Context:
        """Encode pictures and prompts.

        Args:
            pixels_BNCHW: uint8 pictures.
            prompts: ids of each row's prefix, image tokens included.

        Raises:
            UserError: pictures or ids that do not fit the model, or a prompt longer than the cache.
        """
        self._check_prompts(pixels_BNCHW, prompts)
        runtime, rows, lengths = self.runtime, len(prompts), [len(prompt) for prompt in prompts]
        runtime.refresh()
        longest, images = max(lengths), self.layout.image_tokens
        self._check_room(lengths, self._block, "prompt")
        runtime.reserve(rows, longest + self.layout.max_thought_tokens + 2 + self._block)
        plan = self._plan([0] * rows, lengths, self._round(longest), "prefix", "last")
        order = [row % rows for row in range(plan.rows)]  # compiled code has a power of two of rows
        ids, filled = [prompts[row][images:] for row in order], [lengths[row] for row in order]
        images_BID = runtime.images(pixels_BNCHW)[order]
        hidden_BD = runtime.forward(plan, ids, [0] * plan.rows, filled, images_BID=images_BID)
        self._serial += 1
        return Context(list(lengths), list(lengths), hidden_BD[:rows], list(range(rows)), self._serial)

    @torch.inference_mode()
    def think(
        self,
        context: Context,
        *,
        max_tokens: int,
        temperature: float = 0.0,
        generators: Sequence[torch.Generator] | None = None,
        drafts: Sequence[Sequence[int]] | None = None,
        block: int | None = None,
    ) -> list[Thought]:
        """Decode one thought per row, until ``</think><action>``.

        The action band and eos cannot be chosen. At ``max_tokens`` the two closing tokens are forced. ``<action>``
        itself is not fed: the action block begins with it. Rows that are done leave the batch.

        Args:
            context: after :meth:`read` or :meth:`rewind`; extended by the thoughts.
            max_tokens: cap on the tokens of a thought, tags counted, before it is closed.
            temperature: 0 takes the most likely token.
            generators: per row (on the CPU), needed with a temperature; a token takes one number of its row's own.
            drafts: per row the ids of a thought that this one may resemble, or none; they change how often the model
                runs, not what it writes (up to the rounding of arithmetic in blocks).
            block: most tokens per row of a forward with drafts; None for what suits the device.

        Raises:
            UserError: a draft with ids outside the vocabulary, or a cap that the cache has no room for.
        """
        self._check_context(context, at_prompt=True)
        if max_tokens < 1 or (block is not None and block < 1):
            raise ValueError(f"a thought of {max_tokens} tokens in blocks of {block}")
        rows = len(context.lengths)
        own = _own_generators(rows, temperature, generators)
        drafts = drafts if drafts is not None else [()] * rows
        for draft in drafts:
            self._check_ids(draft, "draft")
        words, runtime = self.layout.vocabulary, self.runtime
        block = block or BLOCK.get(runtime.device.type, BLOCK["cuda"])
        self._check_room(context.prompts, max_tokens + 2 + self._block, "thought")
        runtime.reserve(rows, max(context.prompts) + max_tokens + 2 + max(self._block, block))  # at once: graphs stay
        writers = [Writer(words, max_tokens, d, g) for d, g in zip(drafts, own, strict=True)]
        uniforms = [writer.uniforms(1) for writer in writers]
        uniform_B1 = torch.tensor(uniforms, dtype=torch.float64, device=runtime.device) if temperature > 0 else None
        first = runtime.thought_choices(context.hidden_BD.unsqueeze(1), temperature, uniform_B1)
        for writer, choices in zip(writers, _pairs(first), strict=True):
            writer.take([], choices)
        while active := [row for row, writer in enumerate(writers) if not writer.done]:
            self._write_on(context, writers, active, temperature, block)
        return [writer.thought for writer in writers]

    @torch.inference_mode()
    def feed(self, context: Context, thoughts: Sequence[Sequence[int]]) -> None:
        """Read given thoughts, ``<think>`` to ``</think>``, in one forward.

        Raises:
            UserError: ids outside the vocabulary, or a thought that the cache has no room for.
        """
        self._check_context(context, at_prompt=True)
        for thought in thoughts:
            self._check_ids(thought, "thought")
        counts = [len(thought) for thought in thoughts]
        longest = max(counts)
        if longest == 0:
            return
        self._check_room([n + c for n, c in zip(context.lengths, counts, strict=True)], self._block, "thought")
        self._forward(context, dict(enumerate(thoughts)), self._round(longest), "tokens", "none")
        for row, count in enumerate(counts):
            context.lengths[row] += count

    def rewind(self, context: Context) -> None:
        """Forget everything behind the prompt."""
        self._check_context(context)
        context.lengths = list(context.prompts)

    @torch.inference_mode()
    def act(
        self,
        context: Context,
        *,
        temperature: float = 0.0,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Actions:
        """Choose the actions after the thought.

        Args:
            context: after the thought; it stays as it is.
            temperature: 0 takes the most likely bins.
            generators: per row (on the CPU), needed with a temperature; a token takes one number of its row's own.
        """
        self._check_context(context)
        rows, count = len(context.lengths), self.layout.slots
        own = _own_generators(rows, temperature, generators)
        uniforms = [Draws(g).at(0, count) for g in own if g is not None] or None
        if not self.model.autoregressive:
            logits_BAK = self.action_logits(context)
            uniform_BA = None if uniforms is None else torch.tensor(uniforms, dtype=torch.float64).to(logits_BAK.device)
            choices_BA2 = choose_bins(logits_BAK, temperature, uniform_BA)
            return Actions(choices_BA2[..., 0].long(), choices_BA2[..., 1].float(), forwards=1)
        tokens = {row: [self.layout.vocabulary.action_start_id] for row in range(rows)}
        chosen: list[Tensor] = []
        for index in range(count):
            draws = None if uniforms is None else {row: uniforms[row][index : index + 1] for row in range(rows)}
            output = self._forward(context, tokens, 1, "tokens", "action", temperature, draws, offset=index)
            chosen.append(output[context.slots])
            tokens = {row: [self.layout.bins.last_id - own[0][0]] for row, own in enumerate(_pairs(chosen[-1]))}
        choices_BA2 = torch.cat(chosen, dim=1)
        return Actions(choices_BA2[..., 0].long(), choices_BA2[..., 1].float(), forwards=count)

    @torch.inference_mode()
    def action_logits(self, context: Context) -> Tensor:
        """Logits (B, S * D, K) of the action bins, in the order of the bins, from one forward of the action block."""
        self._check_context(context)
        if self.model.autoregressive:
            raise ValueError("an autoregressive decoder has no logits before its actions are chosen; see Engine.act")
        rows: dict[int, list[int]] = {row: [] for row in range(len(context.lengths))}
        return self._forward(context, rows, self._block, "slots", "logits")[context.slots]

    @property
    def _block(self) -> int:
        """Positions of the action block."""
        return self.layout.slots + 3

    def _write_on(
        self, context: Context, writers: Sequence[Writer], active: Sequence[int], temperature: float, block: int
    ) -> None:
        """One forward for the thoughts that are not done; the others stay out of it."""
        self._gather(context, active)
        proposals = {row: writers[row].propose(block - 1) for row in active}
        longest = max(len(proposal) for proposal in proposals.values())
        new = 1 + longest if self.runtime.mode == "eager" or not longest else block
        ids = {row: [writers[row].thought.ids[-1], *proposals[row]] for row in active}
        draws = {row: writers[row].uniforms(len(ids[row])) for row in active} if temperature > 0 else None
        choices = self._forward(context, ids, new, "tokens", "thought", temperature, draws)
        for row, own in zip(sorted(active, key=context.slots.__getitem__), _pairs(choices), strict=True):
            writers[row].take(proposals[row], own[: len(ids[row])])
            context.lengths[row] = context.prompts[row] + len(writers[row].thought.ids) - 1

    def _gather(self, context: Context, rows: Sequence[int]) -> None:
        """Move some rows to the front of the cache."""
        slots = context.slots
        free = [row for row in range(len(slots)) if slots[row] < len(rows) and row not in rows]
        outside = [row for row in rows if slots[row] >= len(rows)]
        for row, other in zip(outside, free, strict=True):
            self.runtime.swap(slots[row], slots[other])
            slots[row], slots[other] = slots[other], slots[row]

    def _forward(
        self,
        context: Context,
        ids: Mapping[int, Sequence[int]],
        new: int,
        source: Source,
        head: Head,
        temperature: float = 0.0,
        draws: Mapping[int, Sequence[float]] | None = None,
        offset: int = 0,
    ) -> Tensor:
        """Run the rows of the first cache rows; the result is in the order of the cache.

        Compiled code has a power of two of rows: what lies behind the asked ones runs along, writes behind its own end,
        and is cut off.
        """
        rows = sorted(ids, key=context.slots.__getitem__)
        starts = [context.lengths[row] + offset for row in rows]
        lengths = [new if source == "slots" else len(ids[row]) for row in rows]
        plan = self._plan(starts, lengths, new, source, head, temperature)
        behind = {slot: context.lengths[row] for row, slot in enumerate(context.slots)}
        fillers = range(len(rows), plan.rows)
        starts += [behind.get(slot, 0) for slot in fillers]
        uniforms = None if draws is None else [list(draws[row]) for row in rows] + [[0.0]] * len(fillers)
        blocks = [list(ids[row]) for row in rows] + [[]] * len(fillers)
        output = self.runtime.forward(plan, blocks, starts, lengths + [1] * len(fillers), uniforms=uniforms)
        return output[: len(rows)]

    def _plan(
        self,
        starts: Sequence[int],
        lengths: Sequence[int],
        new: int,
        source: Source,
        head: Head,
        temperature: float = 0.0,
    ) -> Forward:
        """The fixed part of a forward, with room for it in the cache."""
        runtime, rows, columns = self.runtime, len(starts), max(starts) + new
        runtime.reserve(rows, columns)
        if runtime.mode != "eager":
            step = COLUMN_STEP[runtime.mode]
            rows, columns = power_of_two(rows), -(-columns // step) * step
        ends = {start + length for start, length in zip(starts, lengths, strict=True)}
        causal = source == "tokens" and new > 1
        return Forward(rows, new, columns, source, head, temperature, masked=causal or ends != {columns})

    def _round(self, tokens: int) -> int:
        """Tokens of a long block: compiled code comes in steps."""
        return tokens if self.runtime.mode == "eager" else -(-tokens // PREFIX_STEP) * PREFIX_STEP

    def _check_context(self, context: Context, at_prompt: bool = False) -> None:
        if context.serial != self._serial:
            raise ValueError("this context is gone: the engine has read another one since")
        if at_prompt and context.lengths != context.prompts:
            raise ValueError("this context has a thought already; rewind it first")

    def _check_prompts(self, pixels_BNCHW: Tensor, prompts: Sequence[Sequence[int]]) -> None:
        vision: Any = self.model.config.vision_config
        image_id, images = self.layout.vocabulary.image_id, self.layout.image_tokens
        side, cameras = vision.image_size, images // image_tokens(self.model.config, 1)
        wanted, found = (len(prompts), cameras, 3, side, side), tuple(pixels_BNCHW.shape)
        if found != wanted or pixels_BNCHW.dtype != torch.uint8:
            raise UserError(
                f"pixels: {pixels_BNCHW.dtype} {found}, but {len(prompts)} prompts and this model need uint8 {wanted} "
                "(observations, cameras, 3, height, width); send the model's cameras at its image size"
            )
        for prompt in prompts:
            self._check_ids(prompt, "prompt")
            count = sum(token == image_id for token in prompt)
            if count != images or any(token != image_id for token in prompt[:images]) or len(prompt) == images:
                raise UserError(
                    f"prompt: {count} image tokens among {len(prompt)}, but this model's prompts begin with {images} "
                    "and go on with text; build them with Layout.prompt"
                )

    def _check_ids(self, ids: Sequence[int], name: str) -> None:
        size = self.layout.vocabulary.size
        if ids and not 0 <= min(ids) <= max(ids) < size:
            wrong = next(token for token in ids if not 0 <= token < size)
            raise UserError(f"{name}: token {wrong} is outside the vocabulary of {size}; use this model's tokenizer")

    def _check_room(self, lengths: Sequence[int], more: int, name: str) -> None:
        most, found = self.runtime.most_columns, max(lengths) + more
        if found > most:
            raise UserError(
                f"{name}: {max(lengths)} tokens, and {more} to follow, but the model's cache ends at {most} positions; "
                "shorten it, lower cot.max_tokens, or raise model.text.max_position_embeddings"
            )


def _own_generators(
    rows: int, temperature: float, generators: Sequence[torch.Generator] | None
) -> Sequence[torch.Generator | None]:
    """Each row's generator; none where nothing is drawn."""
    if temperature == 0:
        return [None] * rows
    if generators is None or len(generators) != rows:
        raise ValueError("sampling needs one generator per row")
    return generators


def _pairs(choices_BQ2: Tensor) -> list[list[tuple[int, float]]]:
    """Chosen tokens and their log-probabilities, on the host."""
    return [[(int(token), log_prob) for token, log_prob in row] for row in choices_BQ2.tolist()]
