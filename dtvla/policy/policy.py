"""The policy: a model with everything that turns observations into actions."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtvla.data.normalization import Statistics
from dtvla.errors import UserError
from dtvla.policy import decoding
from dtvla.policy.cot import CotMode
from dtvla.policy.decoding import Thought
from dtvla.policy.model import HybridVLA
from dtvla.policy.processor import Processor

__all__ = ["Decision", "Policy", "Processor", "build_policy"]


@dataclass
class Decision:
    """What the policy decided on one observation.

    Attributes:
        thought: the words that the actions were conditioned on, without tags.
        actions_SD: float32 actions in robot units.
        thought_ids: all ids between prompt and actions, up to and including ``<action>``.
        truncated: whether the length cap closed the thought.
        latency_s: wall time of the whole batch's decision, which is what each of its robots waited for.
    """

    thought: str
    actions_SD: np.ndarray
    thought_ids: list[int]
    truncated: bool
    latency_s: float


class Policy:
    """A model and its processor."""

    def __init__(self, model: HybridVLA, processor: Processor) -> None:
        """Join a model with the processor it was trained with."""
        self.model = model
        self.processor = processor

    def save(self, folder: Path | str, *, overwrite: bool = False) -> None:
        """Write one folder, complete or not at all; see :func:`dtvla.policy.checkpoint.save`."""
        from dtvla.policy import checkpoint

        checkpoint.save(self, folder, overwrite=overwrite)

    @staticmethod
    def load(
        folder: Path | str,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        expect_statistics: Statistics | None = None,
    ) -> Policy:
        """Read such a folder; see :func:`dtvla.policy.checkpoint.load`."""
        from dtvla.policy import checkpoint

        return checkpoint.load(folder, device=device, dtype=dtype, expect_statistics=expect_statistics)

    @torch.inference_mode()
    def act(
        self, observations: Sequence[Mapping[str, Any]], cot: CotMode, *, seeds: Sequence[int] | None = None
    ) -> list[Decision]:
        """Think about and act on each observation.

        Greedy decisions do not depend on the rest of the batch (up to the rounding of batched arithmetic), sampled
        ones depend on the row's own seed only.

        Args:
            observations: per row the cameras' pictures, ``instruction`` and, with ``cot.mode=given``, ``thought``.
            cot: how to think.
            seeds: one per row; needed when the mode draws random numbers.

        Raises:
            UserError: a malformed observation, or seeds missing.
        """
        started = time.perf_counter()
        if not observations:
            return []
        if seeds is None and cot.needs_seed:
            raise UserError(f"cot.mode={cot.mode}, temperature {cot.temperature}: draws random numbers; give seeds")
        generators = [torch.Generator().manual_seed(int(s)) for s in (seeds if cot.needs_seed and seeds else [])]
        if generators and len(generators) != len(observations):
            raise ValueError(f"{len(generators)} seeds for {len(observations)} observations")
        was_training = self.model.training
        self.model.eval()
        try:
            thoughts, actions_BSD = self._decide(observations, cot, generators)
        finally:
            self.model.train(was_training)
        robot_BSD = self.processor.normalizer.unnormalize(actions_BSD.float().cpu().numpy())
        latency = time.perf_counter() - started
        text = self.processor.layout.text
        return [
            Decision(text(thought.ids), np.asarray(robot_SD, np.float32), thought.ids, thought.truncated, latency)
            for thought, robot_SD in zip(thoughts, robot_BSD, strict=True)
        ]

    def _decide(
        self, observations: Sequence[Mapping[str, Any]], cot: CotMode, generators: list[torch.Generator]
    ) -> tuple[list[Thought], Tensor]:
        """Thoughts and normalised actions (B, S, D)."""
        layout, strategy, pad_id = self.processor.layout, cot.strategy, self.processor.layout.vocabulary.pad_id
        pixels_BNCHW = torch.stack([self.processor.pixels(o) for o in observations]).to(self.model.device)
        prompts = [layout.prompt(_instruction(o), strategy.asks_for_thought) for o in observations]
        context = decoding.read(self.model, pixels_BNCHW, prompts, pad_id)
        columns, hidden_BD = context.segment_BT.shape[1], context.hidden_BD
        thoughts = [Thought() for _ in observations]
        if strategy.decodes:
            thoughts = decoding.think(
                self.model,
                context,
                layout.vocabulary,
                max_tokens=layout.max_thought_tokens + 2 if cot.max_tokens is None else cot.max_tokens,
                temperature=cot.temperature,
                generators=generators or None,
            )
        rngs = generators or [torch.Generator()] * len(observations)
        rows = zip(thoughts, observations, rngs, strict=True)
        replaced = [strategy.replace(t.ids, o, layout, cot.length, rng) for t, o, rng in rows]
        fixed = [ids for ids in replaced if ids is not None]
        if fixed:
            context.rewind(columns, hidden_BD)
            decoding.feed_thoughts(self.model, context, fixed, pad_id)
            start = layout.vocabulary.action_start_id
            pairs = zip(thoughts, fixed, strict=True)
            thoughts = [Thought([*ids, start], thought.truncated) for thought, ids in pairs]
        return thoughts, decoding.act(self.model, context, layout)


def build_policy(settings: Mapping[str, Any], texts: Iterable[str], statistics: Statistics) -> Policy:
    """Make the policy that training starts from.

    Args:
        settings: the ``model`` group of the configuration. ``checkpoint: null`` gives fresh weights and a tokenizer
            trained on ``texts``; the folder of a saved policy continues from it; a folder or cached hub id in the
            format of transformers' PaliGemma gives its weights, vocabulary and tokenizer.
        texts: instructions and thoughts of the training data.
        statistics: of the training data.

    Raises:
        UserError: an absent or unfit checkpoint, other statistics than a saved policy's, or contradictory settings.
    """
    from dtvla.policy import build, checkpoint

    if not settings["checkpoint"]:
        return build.fresh(settings, texts, statistics)
    folder = build.find_checkpoint(str(settings["checkpoint"]))
    if (folder / checkpoint.POLICY_FILE).is_file():
        return checkpoint.load(folder, expect_statistics=statistics)
    return build.from_transformers(folder, settings, statistics)


def _instruction(observation: Mapping[str, Any]) -> str:
    instruction = observation.get("instruction")
    if not isinstance(instruction, str) or not instruction.strip():
        raise UserError(f"observation: instruction is {instruction!r}; send the task in words")
    return instruction
