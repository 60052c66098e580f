"""What stands between the prompt and the actions: the ways to think, to pretend, and not to think.

``think``    the model's own thought.
``mask``     an empty thought behind the prompt that asks for one.
``random``   ids drawn uniformly from the text vocabulary, below a limit.
``shuffle``  the model's own thought with its tokens permuted.
``given``    the text under ``thought`` in the observation.
``none``     no thought, and a prompt that does not ask for one, as in training samples without a thought.

Source of ``mask``, ``random`` and ``shuffle``: DeepThinkVLA's ablations (``experiments/deepthinkvla_utils.py``), where
both ``random`` (128 ids below 220000) and ``shuffle`` go by the name of random CoT.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from dtvla.errors import UserError, check_keys
from dtvla.policy.layout import Layout


class Strategy:
    """How one mode makes the thought. The defaults are those of ``think``."""

    asks_for_thought = True
    """Whether the prompt asks for a thought."""
    decodes = True
    """Whether the model writes a thought of its own."""
    draws = False
    """Whether the mode itself needs a seed."""

    def replace(
        self, decoded: list[int], observation: Mapping[str, Any], layout: Layout, cot: CotMode, rng: torch.Generator
    ) -> list[int] | None:
        """The thought to act on, ``<think>`` to ``</think>``; None to keep the model's own.

        Args:
            decoded: the model's own thought up to ``<action>``; empty unless ``decodes``.
            observation: of this row.
            layout: of the sequences.
            cot: settings of random thoughts.
            rng: this decision's generator.
        """
        return None


class Mask(Strategy):
    """An empty thought."""

    decodes = False

    def replace(
        self, decoded: list[int], observation: Mapping[str, Any], layout: Layout, cot: CotMode, rng: torch.Generator
    ) -> list[int]:
        """The two tags."""
        return layout.thought(None)


class NoThought(Mask):
    """An empty thought that the prompt does not ask for."""

    asks_for_thought = False


class Random(Mask):
    """Uniform ids of the text vocabulary."""

    draws = True

    def replace(
        self, decoded: list[int], observation: Mapping[str, Any], layout: Layout, cot: CotMode, rng: torch.Generator
    ) -> list[int]:
        """``cot.length`` ids between the tags; control ids and the action band are left out."""
        words = layout.vocabulary
        text = torch.ones(min(words.action_first_id, cot.id_limit), dtype=torch.bool)
        text[[i for i in words.control_ids if i < len(text)]] = False
        ids = text.nonzero()[:, 0]
        if not len(ids):
            raise UserError(f"cot.id_limit: {cot.id_limit} leaves no text to draw; give a larger number")
        drawn: list[int] = ids[torch.randint(len(ids), (cot.length,), generator=rng)].tolist()
        return [words.think_start_id, *drawn, words.think_end_id]


class Shuffle(Strategy):
    """The model's own thought, permuted."""

    draws = True

    def replace(
        self, decoded: list[int], observation: Mapping[str, Any], layout: Layout, cot: CotMode, rng: torch.Generator
    ) -> list[int]:
        """The same tokens between the tags in random order."""
        control = set(layout.vocabulary.control_ids)
        inner = [i for i in decoded if i not in control]
        order = torch.randperm(len(inner), generator=rng).tolist()
        words = layout.vocabulary
        return [words.think_start_id, *[inner[i] for i in order], words.think_end_id]


class Given(Mask):
    """A thought from outside."""

    def replace(
        self, decoded: list[int], observation: Mapping[str, Any], layout: Layout, cot: CotMode, rng: torch.Generator
    ) -> list[int]:
        """The tokens of ``observation["thought"]``."""
        if "thought" not in observation:
            raise UserError("cot.mode=given: the observation has no 'thought'; add the text or choose another mode")
        return layout.thought(str(observation["thought"]))


STRATEGIES: dict[str, Strategy] = {
    "think": Strategy(),
    "mask": Mask(),
    "random": Random(),
    "shuffle": Shuffle(),
    "given": Given(),
    "none": NoThought(),
}


@dataclass(frozen=True)
class CotMode:
    """How the policy thinks before it acts; the ``cot`` group of the configuration.

    Attributes:
        mode: a key of :data:`STRATEGIES`.
        temperature: of the thought's tokens; 0 takes the most likely one.
        action_temperature: of the action's tokens; 0 takes the most likely ones.
        max_tokens: cap on a decoded thought, tags counted; None is the model's own ``max_thought_tokens`` and tags.
        length: tokens of a random thought (128 published).
        id_limit: a random thought's ids lie below (220000 published), and below the action band.
        speculate: check the thought of the previous decision token by token in blocks, instead of writing it anew.
            What is written stays the same; it is faster the less the thought has changed.
        speculate_block: most tokens of a block; None is what suits the device.
    """

    mode: str = "think"
    temperature: float = 0.0
    action_temperature: float = 0.0
    max_tokens: int | None = None
    length: int = 128
    id_limit: int = 220000
    speculate: bool = False
    speculate_block: int | None = None

    def __post_init__(self) -> None:
        """Refuse unknown modes and impossible numbers."""
        if self.mode not in STRATEGIES:
            close = difflib.get_close_matches(str(self.mode), STRATEGIES, n=1)
            hint = f"did you mean {close[0]}?" if close else f"use one of {', '.join(STRATEGIES)}"
            raise UserError(f"cot.mode: {self.mode!r} is unknown; {hint}")
        least_values = {"temperature": 0, "action_temperature": 0, "max_tokens": 1, "length": 0}
        for name, least in (least_values | {"id_limit": 1, "speculate_block": 1}).items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"cot.{name}: {value} is too small; give at least {least}")

    @property
    def strategy(self) -> Strategy:
        """How the thought is made."""
        return STRATEGIES[self.mode]

    @property
    def needs_seed(self) -> bool:
        """Whether a decision draws random numbers."""
        samples = self.action_temperature > 0 or (self.strategy.decodes and self.temperature > 0)
        return self.strategy.draws or samples

    @classmethod
    def from_config(cls, settings: Mapping[str, Any]) -> CotMode:
        """From the ``cot`` group; :class:`UserError` for a key it does not have."""
        check_keys("cot", settings, [field.name for field in fields(cls)])
        return cls(**dict(settings))
