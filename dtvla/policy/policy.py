"""The policy: a model with everything that turns observations into actions."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtvla.data.normalization import Statistics
from dtvla.errors import UserError
from dtvla.policy.cot import CotMode
from dtvla.policy.decoding import Actions, Engine, Thought
from dtvla.policy.model import HybridVLA, configure
from dtvla.policy.processor import Processor
from dtvla.policy.runtime import Mode

__all__ = ["Decision", "Policy", "Processor", "build_policy"]


@dataclass
class Decision:
    """What a policy decided on one observation; one that is no model, a replay say, needs the first two fields alone.

    Attributes:
        thought: the words that the actions were conditioned on, without tags.
        actions_SD: float32 actions in robot units.
        thought_ids: all ids between prompt and actions, up to and including ``<action>``.
        truncated: whether the length cap closed the thought.
        thought_log_probs: of each id, 0 for those that the cap decided; empty for a thought that was not decoded.
        thought_forced: ids at the end of the thought that the length cap decided.
        thought_forwards: passes of the model that wrote the thought.
        action_bins_A: int64 bins of the action tokens, as chosen.
        action_log_probs_A: float32, of each bin. Log-probabilities are at temperature 1 for greedy choices, else at the
            temperature of sampling.
        pixels_NCHW: uint8 pictures as the model saw them; a view into those of the whole batch.
        latency_s: wall time of the whole batch's decision, which is what each of its robots waited for.
    """

    thought: str
    actions_SD: np.ndarray
    thought_ids: list[int] = field(default_factory=list)
    truncated: bool = False
    thought_log_probs: list[float] = field(default_factory=list)
    thought_forced: int = 0
    thought_forwards: int = 0
    action_bins_A: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    action_log_probs_A: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    pixels_NCHW: np.ndarray | None = None
    latency_s: float = 0.0


class Policy:
    """A model and its processor.

    Attributes:
        engine_mode: how the engine runs, see :class:`~dtvla.policy.decoding.Engine`; set it before the first decision.
    """

    def __init__(self, model: HybridVLA, processor: Processor) -> None:
        """Join a model with the processor it was trained with."""
        self.model = model
        self.processor = processor
        self.engine_mode: Mode = "auto"
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        """What decodes; made at the first decision."""
        layout = self.processor.layout
        if self._engine is None or self._engine.model is not self.model or self._engine.layout is not layout:
            self._engine = Engine(self.model, layout, self.engine_mode)
        return self._engine

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
    ) -> Policy:
        """Read such a folder; see :func:`dtvla.policy.checkpoint.load`."""
        from dtvla.policy import checkpoint

        return checkpoint.load(folder, device=device, dtype=dtype)

    def act(
        self,
        observations: Sequence[Mapping[str, Any]],
        cot: CotMode,
        *,
        seeds: Sequence[int] | None = None,
        drafts: Sequence[Sequence[int]] | None = None,
    ) -> list[Decision]:
        """Think about and act on each observation.

        Greedy decisions do not depend on the rest of the batch (up to the rounding of batched arithmetic), sampled
        ones depend on the row's own seed only.

        Args:
            observations: per row the cameras' pictures, ``instruction`` and, with ``cot.mode=given``, ``thought``.
            cot: how to think.
            seeds: one per row; needed when the mode draws random numbers.
            drafts: per row the ``thought_ids`` of a similar decision, or nothing; used with ``cot.speculate``.

        Raises:
            UserError: a malformed observation, seeds missing, or several rows for a model whose padding is visible.
        """
        started = time.perf_counter()
        if not observations:
            return []
        self._check_request(len(observations), cot, seeds, drafts)
        was_training = self.model.training
        self.model.eval()
        try:
            pixels_BNCHW = torch.stack([self.processor.pixels(o) for o in observations])
            thoughts, actions = self._decide(observations, pixels_BNCHW, cot, seeds, drafts if cot.speculate else None)
        finally:
            self.model.train(was_training)
        layout = self.processor.layout
        normalised_BA = layout.bins.value(actions.bins_BA).cpu().numpy()
        robot_BSD = self.processor.normalizer.unnormalize(normalised_BA.reshape(-1, layout.chunk, layout.action_dim))
        bins_BA, log_probs_BA = actions.bins_BA.cpu().numpy(), actions.log_probs_BA.cpu().numpy()
        latency = time.perf_counter() - started
        return [
            Decision(
                thought=layout.text(thought.ids),
                actions_SD=np.asarray(robot_BSD[row], np.float32),
                thought_ids=thought.ids,
                truncated=thought.truncated,
                thought_log_probs=thought.log_probs,
                thought_forced=thought.forced,
                thought_forwards=thought.forwards,
                action_bins_A=bins_BA[row],
                action_log_probs_A=log_probs_BA[row],
                pixels_NCHW=pixels_BNCHW[row].numpy(),
                latency_s=latency,
            )
            for row, thought in enumerate(thoughts)
        ]

    def _check_request(
        self, rows: int, cot: CotMode, seeds: Sequence[int] | None, drafts: Sequence[Sequence[int]] | None
    ) -> None:
        if seeds is None and cot.needs_seed:
            drawn = f"temperature {cot.temperature}, action_temperature {cot.action_temperature}"
            raise UserError(f"cot.mode={cot.mode}, {drawn}: draws random numbers; give seeds")
        for name, given in (("seeds", seeds), ("drafts", drafts)):
            if given is not None and len(given) != rows:
                raise ValueError(f"{len(given)} {name} for {rows} observations")
        if self.model.pads_visible and rows > 1:
            raise UserError(
                f"compat.pads_visible: {rows} observations at once, but decisions pad nothing; set batch_size=1"
            )

    def _decide(
        self,
        observations: Sequence[Mapping[str, Any]],
        pixels_BNCHW: Tensor,
        cot: CotMode,
        seeds: Sequence[int] | None,
        drafts: Sequence[Sequence[int]] | None,
    ) -> tuple[list[Thought], Actions]:
        layout, strategy, engine = self.processor.layout, cot.strategy, self.engine
        prompts = [layout.prompt(_instruction(o), strategy.asks_for_thought) for o in observations]
        of_thought, of_mode, of_action = (
            [_generator(seed, purpose) for seed in (seeds or [0] * len(observations))] for purpose in range(3)
        )
        context = engine.read(pixels_BNCHW, prompts)
        thoughts = [Thought() for _ in observations]
        if strategy.decodes:
            thoughts = engine.think(
                context,
                max_tokens=layout.max_thought_tokens + 2 if cot.max_tokens is None else cot.max_tokens,
                temperature=cot.temperature,
                generators=of_thought,
                drafts=drafts,
                block=cot.speculate_block,
            )
        rows = zip(thoughts, observations, of_mode, strict=True)
        replaced = [strategy.replace(t.ids, o, layout, cot, rng) for t, o, rng in rows]
        fixed = [ids for ids in replaced if ids is not None]
        if fixed:
            engine.rewind(context)
            engine.feed(context, fixed)
            start = layout.vocabulary.action_start_id
            pairs = zip(thoughts, fixed, strict=True)
            thoughts = [Thought([*ids, start], thought.truncated) for thought, ids in pairs]
        return thoughts, engine.act(context, temperature=cot.action_temperature, generators=of_action)


def build_policy(
    settings: Mapping[str, Any], texts: Iterable[str] = (), statistics: Statistics | None = None
) -> Policy:
    """Make the policy that training starts from.

    Args:
        settings: the ``model`` group of the configuration. ``checkpoint: null`` gives fresh weights and a tokenizer
            trained on ``texts``; a saved policy continues from there; a folder or hub id in the published format
            gives weights, vocabulary and tokenizer.
        texts: instructions and thoughts of the training data; needed for fresh weights.
        statistics: of the training data, likewise; a policy that was trained before keeps its own.

    Raises:
        UserError: an absent or unfit checkpoint, or contradictory settings.
    """
    from dtvla.policy import adapters, build, checkpoint

    if settings["checkpoint"]:
        policy = checkpoint.load(
            str(settings["checkpoint"]), statistics=statistics, settings=settings, as_trained=False
        )
    elif statistics is None:
        raise ValueError("fresh weights need the training data's texts and statistics")
    else:
        policy = build.fresh(settings, texts, statistics)
    adapters.prepare(policy.model, settings)
    configure(policy.model, settings)
    return policy


def _instruction(observation: Mapping[str, Any]) -> str:
    instruction = observation.get("instruction")
    if not isinstance(instruction, str) or not instruction.strip():
        raise UserError(f"observation: instruction is {instruction!r}; send the task in words")
    return instruction


def _generator(seed: int, purpose: int) -> torch.Generator:
    """One of a decision's independent streams of random numbers.

    A thought that is written with a draft takes numbers ahead of time; its own stream keeps that from the others.
    """
    state = np.random.SeedSequence([int(seed), purpose]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
