"""What is measured: a model, our engines on it, the published way on it, and inputs to decide on."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dtvla.benchmarks.models import INSTRUCTION, fresh_policy, random_statistics
from dtvla.benchmarks.published_way import PublishedWay
from dtvla.benchmarks.settings import Settings
from dtvla.benchmarks.timing import Mark
from dtvla.errors import UserError
from dtvla.policy.decoding import Engine, Thought
from dtvla.policy.layout import Layout
from dtvla.policy.model import DECODER_KEY, HybridVLA, configure
from dtvla.policy.policy import Policy, build_policy
from dtvla.policy.vocabulary import Vocabulary

SHORT_THOUGHT = 3  # <think></think><action>
TEXT_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
)
VISION_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "patch_size",
    "image_size",
)


@dataclass
class Inputs:
    """One batch to decide on: random pictures under one instruction, so that no row is padded."""

    pixels_BNCHW: Tensor
    prompts: list[list[int]]


class Subject:
    """A model and every way to decide with it. Weights are shared by all of them."""

    def __init__(self, settings: Settings) -> None:
        """Build the model; engines of autoregressive baselines are made when they are asked for.

        Raises:
            UserError: a setting does not suit the model.
        """
        self.settings = settings
        self.device, self.dtype = settings.place()
        policy = _policy(settings, self.device, self.dtype)
        self.model: HybridVLA = policy.model.eval()
        self.layout: Layout = policy.processor.layout
        self.image_shape = (len(policy.processor.images.cameras), 3, *[policy.processor.images.image_size] * 2)
        self.prompt = self.layout.prompt(INSTRUCTION)
        self._check()
        self.engine = Engine(self.model, self.layout, settings.engine)
        self.published = PublishedWay(self.model, self.layout)
        self._autoregressive: dict[int, Engine] = {}

    def inputs(self, rows: int) -> Inputs:
        """Pictures drawn from the seed, on the device; row b is the same in every batch size."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        pixels = [torch.randint(0, 256, self.image_shape, dtype=torch.uint8, generator=generator) for _ in range(rows)]
        return Inputs(torch.stack(pixels).to(self.device), [self.prompt] * rows)

    def think(
        self, inputs: Inputs, mark: Mark, drafts: Sequence[Sequence[int]] | None = None
    ) -> tuple[list[Thought], Tensor]:
        """Our whole decision: thoughts, and bins (B, S * D) on the host. Phases ``read``, ``thought``, ``act``."""
        context = self.engine.read(inputs.pixels_BNCHW, inputs.prompts)
        mark("read")
        thoughts = self.engine.think(context, max_tokens=self.settings.thought_tokens - 2, drafts=drafts)
        mark("thought")
        bins_BA = self.engine.act(context).bins_BA.cpu()
        mark("act")
        return thoughts, bins_BA

    def mask(self, inputs: Inputs, mark: Mark) -> Tensor:
        """Our decision behind an empty thought: bins (B, S * D). Phases ``read``, ``act``."""
        return self._without_thought(self.engine, inputs, mark)

    def autoregressive(self, inputs: Inputs, tokens: int, mark: Mark) -> Tensor:
        """Bins (B, tokens), one forward each, behind an empty thought. Phases ``read``, ``act``."""
        if tokens not in self._autoregressive:
            twin = copy.copy(self.model)  # the same modules under another decoder
            twin.config = copy.deepcopy(self.model.config)
            setattr(twin.config, DECODER_KEY, "autoregressive")
            layout = replace(self.layout, chunk=tokens, action_dim=1)
            self._autoregressive[tokens] = Engine(twin, layout, self.settings.engine)
        return self._without_thought(self._autoregressive[tokens], inputs, mark)

    def published_think(self, inputs: Inputs, mark: Mark) -> tuple[list[list[int]], Tensor]:
        """The published whole decision: ids of the thoughts, bins (B, S * D)."""
        thoughts = self.published.think(inputs.pixels_BNCHW, inputs.prompts, self.settings.thought_tokens, mark)
        return thoughts, self.published.act(inputs.pixels_BNCHW, inputs.prompts, thoughts, mark)

    def published_mask(self, inputs: Inputs, mark: Mark) -> Tensor:
        """The published decision behind an empty thought: one forward over everything."""
        thought = [*self.layout.thought(None), self.layout.vocabulary.action_start_id]
        return self.published.act(inputs.pixels_BNCHW, inputs.prompts, [thought] * len(inputs.prompts), mark)

    def drafts(self, thoughts: Sequence[Sequence[int]]) -> list[list[int]]:
        """The thoughts with errors at random places, of which there are as many as ``draft_accuracy`` says."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        return [spoil(t, self.settings.draft_accuracy, self.layout.vocabulary, generator) for t in thoughts]

    def shapes(self) -> dict[str, Any]:
        """The sizes that decide the times."""
        config: Any = self.model.config
        text, vision = config.text_config, config.vision_config
        return {
            "parameters": sum(p.numel() for p in self.model.model.parameters()),  # the output layer is the embedding
            "vocabulary": text.vocab_size,
            "text": {name: getattr(text, name) for name in TEXT_SIZES},
            "vision": {name: getattr(vision, name) for name in VISION_SIZES},
            "cameras": self.image_shape[0],
            "image_tokens": self.layout.image_tokens,
            "prompt_tokens": len(self.prompt),
            "thought_tokens": self.settings.thought_tokens,
            "action_block_tokens": len(self.layout.act_block()),
            "action_tokens": self.layout.slots,
        }

    @staticmethod
    def _without_thought(engine: Engine, inputs: Inputs, mark: Mark) -> Tensor:
        context = engine.read(inputs.pixels_BNCHW, inputs.prompts)
        mark("read")
        engine.feed(context, [engine.layout.thought(None)] * len(inputs.prompts))
        bins_BA = engine.act(context).bins_BA.cpu()
        mark("act")
        return bins_BA

    def _check(self) -> None:
        if self.model.autoregressive:
            raise UserError("model.decoder: autoregressive; the hybrid one is measured, beside such baselines: set it")
        text: Any = self.model.config.text_config
        room = text.max_position_embeddings - len(self.prompt)
        block, longest = len(self.layout.act_block()), max(self.settings.action_tokens)
        if self.settings.thought_tokens + block > room:
            raise UserError(
                f"thought_tokens: {self.settings.thought_tokens} behind a prompt of {len(self.prompt)} tokens and "
                f"before {block} of actions are more than the model's {text.max_position_embeddings} positions; "
                f"give at most {room - block}"
            )
        if longest + SHORT_THOUGHT > room:
            raise UserError(
                f"action_tokens: {longest} behind a prompt of {len(self.prompt)} tokens are more than the model's "
                f"{text.max_position_embeddings} positions; give at most {room - SHORT_THOUGHT}"
            )


def spoil(ids: Sequence[int], accuracy: float, words: Vocabulary, generator: torch.Generator) -> list[int]:
    """A thought with wrong tokens at random places, its closing pair untouched.

    Args:
        ids: up to and including ``<action>``.
        accuracy: share of all ids that stay right, rounded to whole tokens.
        words: what wrong tokens are drawn from: its text.
        generator: of places and tokens.
    """
    spoilt, inner = list(ids), len(ids) - 2
    wrong = min(inner, round((1 - accuracy) * len(ids)))
    text = [i for i in range(words.action_first_id) if i not in words.control_ids]
    for place in torch.randperm(inner, generator=generator)[:wrong].tolist():
        drawn = int(torch.randint(len(text) - 1, (), generator=generator))
        spoilt[place] = text[drawn] if text[drawn] != ids[place] else text[-1]
    return spoilt


def _policy(settings: Settings, device: torch.device, dtype: torch.dtype) -> Policy:
    """A saved policy, or the ``model`` group's on random statistics; fresh weights are drawn on the device."""
    if settings.checkpoint:
        return Policy.load(settings.checkpoint, device=device, dtype=dtype)
    model = dict(settings.model) | {"seed": settings.seed}
    if model["checkpoint"]:
        policy = build_policy(model, [INSTRUCTION], random_statistics(int(model["action_dim"]), settings.seed))
        torch.nn.Module.to(policy.model, device=device, dtype=dtype)
        return policy
    policy = fresh_policy(model, device, dtype)
    configure(policy.model, model)
    give_text(policy.model, policy.processor.layout.vocabulary, torch.Generator().manual_seed(settings.seed))
    return policy


@torch.no_grad()
def give_text(model: HybridVLA, words: Vocabulary, generator: torch.Generator) -> None:
    """Make a model with fresh weights write text of many words, and write it decidedly.

    The most likely token of fresh weights is the last one again: the output layer is the embedding, and small layers
    hardly change what runs past them. A thought of one repeated word is no text to speculate on, and larger weights
    make chaos, in which the rounding of bfloat16 changes all that follows. So the output layer gets a copy of the
    embedding in which the rows of the text tokens have moved on by one, in an order drawn at random: each word is
    followed by the next. Its shape, and the time it takes, stay what they are.
    """
    weight_VD = model.lm_head.weight.clone()
    text = torch.tensor([i for i in range(words.action_first_id) if i not in words.control_ids])
    order = text[torch.randperm(len(text), generator=generator)].to(weight_VD.device)
    weight_VD[order.roll(-1)] = model.lm_head.weight[order]
    model.lm_head = torch.nn.Linear(weight_VD.shape[1], weight_VD.shape[0], bias=False, device="meta")
    model.lm_head.weight = torch.nn.Parameter(weight_VD)
