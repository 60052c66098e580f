"""A trained policy as annotator: it writes the thoughts of many frames at a time, and does not act."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dtvla.cot.annotator import Annotator, Answer, Job
from dtvla.errors import UserError

if TYPE_CHECKING:
    from dtvla.cot.episodes import EpisodeView
    from dtvla.policy.writing import Thought


class PolicyAnnotator(Annotator):
    """Writes thoughts with a checkpoint, the most likely words first and others at further attempts.

    A thought depends on its own frame, attempt and ``seed`` alone, up to the rounding of arithmetic in batches. One
    that the length cap cut off lacks ``</think>`` in its answer.
    """

    def __init__(
        self,
        *,
        checkpoint: str,
        batch_size: int = 32,
        temperature: float = 0.7,
        max_tokens: int | None = None,
        seed: int = 0,
        device: str = "auto",
        dtype: str = "auto",
    ) -> None:
        """Load the weights.

        Args:
            checkpoint: folder of a policy, of a published checkpoint or of adapters, or a hub id.
            batch_size: thoughts that are written at a time.
            temperature: of attempts after the first.
            max_tokens: cap on a thought, tags counted; None is the policy's own ``max_thought_tokens`` and tags.
            seed: of attempts after the first.
            device, dtype: see :func:`dtvla.policy.placement.place`.

        Raises:
            UserError: a setting is out of range, or there is no such checkpoint.
        """
        from dtvla.policy.hub import locate
        from dtvla.policy.placement import place
        from dtvla.policy.policy import Policy

        if batch_size < 1 or temperature <= 0 or seed < 0 or (max_tokens is not None and max_tokens < 1):
            raise UserError(
                f"annotator: batch_size={batch_size}, temperature={temperature}, max_tokens={max_tokens}, seed={seed}; "
                "give a batch_size and max_tokens of at least 1, a temperature above 0, and no negative seed"
            )
        placed, type_ = place(device, dtype)
        source = locate(checkpoint)
        self._policy = Policy.load(checkpoint, device=placed, dtype=type_)
        layout = self._policy.processor.layout
        self._max_tokens = layout.max_thought_tokens + 2 if max_tokens is None else max_tokens
        self._temperature, self._seed = temperature, seed
        self.jobs_per_call = batch_size
        self.identity = {
            "annotator": "policy",
            "model": f"{checkpoint} ({source.digest()[:16]})",
            "prompt": hashlib.sha256(json.dumps(layout.prompt_template.to_dict()).encode()).hexdigest()[:16],
            "temperature": temperature,
            "max_tokens": self._max_tokens,
            "seed": seed,
            "dtype": str(type_).removeprefix("torch."),
        }

    def label(self, episode: EpisodeView, jobs: Sequence[Job]) -> list[Answer]:
        """One answer for each job, in order; complaints are not read, another attempt draws other words.

        Raises:
            UserError: the episode lacks a camera of the policy, or its pictures can't be decoded.
        """
        answers: dict[int, Answer] = {}
        for again in (False, True):
            places = [place for place, job in enumerate(jobs) if (job.attempt > 0) == again]
            if places:
                thoughts = self._write(episode, [jobs[place] for place in places], self._temperature if again else 0.0)
                answers |= {place: self._answer(thought) for place, thought in zip(places, thoughts, strict=True)}
        return [answers[place] for place in range(len(jobs))]

    def _write(self, episode: EpisodeView, jobs: Sequence[Job], temperature: float) -> list[Thought]:
        import torch

        processor, frames = self._policy.processor, sorted({job.frame for job in jobs})
        pictures: dict[int, dict[str, np.ndarray]] = {frame: {} for frame in frames}
        for camera in processor.images.cameras:
            for frame, picture in zip(frames, episode.pictures(camera, frames), strict=True):
                pictures[frame][camera] = picture
        pixels_BNCHW = torch.stack([processor.pixels(pictures[job.frame]) for job in jobs])
        seeds = [[self._seed, episode.number, job.frame, job.attempt] for job in jobs]
        states = [int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]) for seed in seeds]
        engine = self._policy.engine
        return engine.think(
            engine.read(pixels_BNCHW, [processor.layout.prompt(episode.instruction)] * len(jobs)),
            max_tokens=self._max_tokens,
            temperature=temperature,
            generators=[torch.Generator().manual_seed(state) for state in states],
        )

    def _answer(self, thought: Thought) -> Answer:
        """What the model itself wrote, tags included; ``<action>``, which ends a thought, is not part of it."""
        layout = self._policy.processor.layout
        own = thought.ids[: len(thought.ids) - thought.forced] if thought.truncated else thought.ids
        words = own[:-1] if own[-1:] == [layout.vocabulary.action_start_id] else own
        text = str(layout.tokenizer.decode(words, skip_special_tokens=False))
        return Answer(text, {"tokens": len(own), "truncated": thought.truncated})
