"""One GRPO iteration after the published schedule, on our model's weights.

* Every episode has a process of its own, which builds LIBERO's ``OffScreenRenderEnv`` anew and renders both cameras at
  every step.
* All episodes of a part go in lock-step: one ``generate`` for all, one forward over everything for the actions, and the
  next decision when the slowest environment is done. Ended episodes are decided for until the horizon.
* Log-probabilities are computed again for all decisions, a whole trajectory at a time; then the updates, eight
  decisions at a time. Rows are padded to the longest that there could be, logits are those of the whole vocabulary at
  every position, and decisions behind an episode's end are computed and masked.

Source: DeepThinkVLA's RL recipe (``rob_rollout.py``, ``rob_actor.py``). Left out, in its favour: Ray, JPEG and
TensorFlow in the picture path, the gathering of sharded weights. As in ours, padding is invisible, sums are weighted
token by token, and neither what lies behind an episode's end nor an id that the length cap decided is learned from.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dtvla.benchmarks.grpo_settings import Settings
from dtvla.benchmarks.plain_stepping import PlainLibero
from dtvla.benchmarks.published_way import PublishedWay, sequence
from dtvla.benchmarks.timing import Mark
from dtvla.policy.layout import Segment
from dtvla.policy.policy import Policy
from dtvla.sim.pool import EpisodeSpec
from dtvla.sim.suites import get_task

SLICE = 8  # decisions of an update's forward pass
THOUGHT_TEMPERATURE, ACTION_TEMPERATURE = 1.0, 1.6
CLIP_LOW, CLIP_HIGH, DUAL_CLIP = 0.2, 0.28, 3.0
LEARNING_RATE = 2e-6


@dataclass
class Trajectory:
    """All decisions of an episode, those behind its end included: S of them in rows of T tokens with L sampled ones.

    Attributes:
        spec: of the episode.
        steps: that it took.
        pixels_SNCHW: float32 in [-1, 1].
        ids_ST, segment_ST, slot_ST: as in :class:`~dtvla.policy.layout.Batch`, padded.
        index_SL: positions whose logits predict the sampled tokens: the thought's room, then the actions.
        target_SL: the sampled ids.
        counts_SL: whether a token is learned from.
        prompts, thoughts, bins_SA: what the rows are made of.
    """

    spec: EpisodeSpec
    steps: int
    pixels_SNCHW: Tensor
    ids_ST: Tensor
    segment_ST: Tensor
    slot_ST: Tensor
    index_SL: Tensor
    target_SL: Tensor
    counts_SL: Tensor
    prompts: list[list[int]]
    thoughts: list[list[int]]
    bins_SA: Tensor

    @property
    def decisions(self) -> int:
        """Decisions that were executed, in part at least."""
        return int(self.counts_SL.any(1).sum())


class PublishedSchedule:
    """Iterations after the published schedule.

    Args:
        policy: its model has layers as transformers makes them, in evaluation mode.
        settings: of the study.
        room: ids that a thought is padded to.
    """

    def __init__(self, policy: Policy, settings: Settings, room: int) -> None:
        self.model, self.settings, self.processor = policy.model, settings, policy.processor
        self.layout, self.room = policy.processor.layout, room
        self.way = PublishedWay(policy.model, self.layout)
        self.calls = -(-settings.horizon // self.layout.chunk)
        prompt = self.layout.image_tokens + 1 + self.layout.max_prompt_tokens
        self.length = prompt + room + len(self.layout.act_block()) - 1  # <action> ends the thought
        self.cap = self.layout.max_thought_tokens + 4  # both tags, and the pair that closes a thought
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)

    def warm_up(self) -> None:
        """Decide on a black picture, and compute a gradient: what is loaded or made on first use is there then."""
        images = self.processor.images
        shape = (1, len(images.cameras), 3, images.image_size, images.image_size)
        pixels_BNCHW = torch.zeros(shape, dtype=torch.uint8, device=self.model.device)
        prompts = [self.layout.prompt("warm up")]
        thoughts, bins_BA = self.decide(pixels_BNCHW, prompts)
        values = [self.model.pixel_values(pixels_BNCHW).view(shape)[0]]
        one = self.trajectory(EpisodeSpec("", 0, 0, 0), 1, values, prompts, thoughts, [2], [bins_BA[0]])
        self.gradient([(one, self.log_probs(one), 1.0)])
        self.optimizer.zero_grad()

    def collect(self, episodes: Sequence[EpisodeSpec], mark: Mark) -> list[Trajectory]:
        """Run all episodes, so many at a time as there are to be environments; phases ``start`` and ``collect``."""
        found: list[Trajectory] = []
        for first in range(0, len(episodes), self.settings.environments):
            part = episodes[first : first + self.settings.environments]
            with ExitStack() as stack:
                environments = [stack.enter_context(self._plain(spec)) for spec in part]
                for environment, spec in zip(environments, part, strict=True):
                    environment.ask("reset", spec.init_state)
                observations = [environment.answer() for environment in environments]
                mark("start")
                found += self._run(part, environments, observations)
            mark("collect")
        return found

    def learn(self, trajectories: Sequence[Trajectory], advantages_N: np.ndarray, mark: Mark) -> None:
        """Old log-probabilities, then all updates; phases ``log-probs`` and ``update``."""
        old = [self.log_probs(trajectory) for trajectory in trajectories]
        mark("log-probs")
        generator = np.random.default_rng(self.settings.seed)
        for _ in range(self.settings.ppo_epochs):
            order_N = generator.permutation(len(trajectories))
            for part in np.array_split(order_N, self.settings.mini_batches):
                self.gradient([(trajectories[i], old[i], float(advantages_N[i])) for i in part])
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
        mark("update")

    @torch.no_grad()
    def log_probs(self, trajectory: Trajectory) -> Tensor:
        """Log-probabilities (S, L) of all sampled tokens in one forward, and entropies, a metric of theirs."""
        self.model.eval()
        distributions = self._distributions(trajectory, slice(None))
        for distribution in distributions:
            torch.special.entr(distribution.exp()).sum(-1)
        return self._chosen(trajectory, slice(None), distributions)

    def gradient(self, parts: Sequence[tuple[Trajectory, Tensor, float]]) -> float:
        """The objective of a mini-batch of (trajectory, old log-probabilities, advantage), and its gradient."""
        self.optimizer.zero_grad()
        total = 0.0
        for trajectory, old_SL, advantage in parts:
            weight = 1.0 / (len(parts) * max(1, int(trajectory.counts_SL.sum())))
            for first in range(0, len(old_SL), SLICE):
                where = slice(first, first + SLICE)
                new_XL = self._chosen(trajectory, where, self._distributions(trajectory, where))
                loss_XL = _token_loss(new_XL - old_SL[where], advantage)
                objective = weight * (loss_XL * trajectory.counts_SL[where]).sum()
                objective.backward()
                total += float(objective.detach())
        return total

    def decide(self, pixels_BNCHW: Tensor, prompts: Sequence[Sequence[int]]) -> tuple[list[list[int]], Tensor]:
        """Sampled thoughts, and bins (B, S * D) on the host."""
        think, act = self.way.think, self.way.act
        with torch.no_grad():
            thoughts = think(pixels_BNCHW, prompts, self.cap, _no_mark, THOUGHT_TEMPERATURE)
            return thoughts, act(pixels_BNCHW, prompts, thoughts, _no_mark, ACTION_TEMPERATURE)

    def trajectory(
        self,
        spec: EpisodeSpec,
        steps: int,
        pixels: Sequence[Tensor],
        prompts: list[list[int]],
        thoughts: list[list[int]],
        forced: Sequence[int],
        bins: Sequence[Tensor],
    ) -> Trajectory:
        """Rows of one length from the decisions of an episode, and its pictures in one piece.

        Args:
            spec: of the episode.
            steps: that it took.
            pixels: float32 pictures (N, 3, H, W) of each decision.
            prompts, thoughts: ids of each.
            forced: ids at the end of each thought that the length cap decided.
            bins: (S * D,) of each.
        """
        layout, device, slots = self.layout, self.model.device, self.layout.slots
        rows = len(thoughts)
        filler = {"ids": layout.vocabulary.pad_id, "segment": int(Segment.PAD), "slot": 0}
        tokens = {name: torch.full((rows, self.length), value) for name, value in filler.items()}
        index_SL = torch.zeros(rows, self.room + slots, dtype=torch.long)
        target_SL, counts_SL = torch.zeros_like(index_SL), torch.zeros_like(index_SL, dtype=torch.bool)
        decisions = zip(prompts, thoughts, forced, bins, strict=True)
        for row, (prompt, thought, ends, bins_A) in enumerate(decisions):
            example = sequence(layout, prompt, thought)
            for name, own_T in (("ids", example.input_ids_T), ("segment", example.segment_T), ("slot", example.slot_T)):
                tokens[name][row, : len(own_T)] = own_T
            index_SL[row, : self.room] = len(prompt) - 1 + torch.arange(self.room)
            index_SL[row, self.room :] = len(prompt) + len(thought) - 1 + torch.arange(slots)
            target_SL[row, : len(thought)] = torch.tensor(thought)
            target_SL[row, self.room :] = layout.bins.last_id - bins_A
            executed = min(layout.chunk, steps - row * layout.chunk)
            if executed > 0:
                counts_SL[row, : len(thought) - ends] = True
                counts_SL[row, self.room : self.room + executed * layout.action_dim] = True
        return Trajectory(
            spec=spec,
            steps=steps,
            pixels_SNCHW=torch.stack(list(pixels)),
            ids_ST=tokens["ids"].to(device),
            segment_ST=tokens["segment"].to(device),
            slot_ST=tokens["slot"].bool().to(device),
            index_SL=index_SL.clamp(max=self.length - 1).to(device),
            target_SL=target_SL.to(device),
            counts_SL=counts_SL.to(device),
            prompts=prompts,
            thoughts=thoughts,
            bins_SA=torch.stack(list(bins)),
        )

    def _plain(self, spec: EpisodeSpec) -> PlainLibero:
        env = self.settings.env
        size, settle = env["image_size"], env["settle_steps"]
        return PlainLibero(spec.suite, spec.task_id, image_size=size, settle_steps=settle)

    def _run(
        self, specs: Sequence[EpisodeSpec], environments: Sequence[PlainLibero], observations: list[dict[str, Any]]
    ) -> list[Trajectory]:
        layout, model, limit = self.layout, self.model.eval(), self.settings.steps
        prompts = [layout.prompt(get_task(spec.suite, spec.task_id).instruction) for spec in specs]
        steps, running = [0] * len(specs), [True] * len(specs)
        pixels, thoughts, bins = ([list[Any]() for _ in specs] for _ in range(3))
        for _ in range(self.calls):
            pixels_BNCHW = torch.stack([self.processor.pixels(o) for o in observations]).to(model.device)
            written, chosen_BA = self.decide(pixels_BNCHW, prompts)
            values_BNCHW = model.pixel_values(pixels_BNCHW).view(pixels_BNCHW.shape)
            for row in range(len(specs)):
                pixels[row].append(values_BNCHW[row].clone())
                thoughts[row].append(written[row])
                bins[row].append(chosen_BA[row])
            asked = [row for row in range(len(specs)) if running[row]]
            for row in asked:
                environments[row].ask("run", self._actions(chosen_BA[row])[: limit - steps[row]])
            for row in asked:
                observations[row] = environments[row].answer()
                steps[row] += len(observations[row]["successes"])
                running[row] = not observations[row]["successes"][-1] and steps[row] < limit
        found = []
        for row, spec in enumerate(specs):
            own = thoughts[row]
            forced = [2 if len(thought) == self.cap else 0 for thought in own]
            given = [prompts[row]] * self.calls
            found.append(self.trajectory(spec, steps[row], pixels[row], given, own, forced, bins[row]))
        return found

    def _actions(self, bins_A: Tensor) -> np.ndarray:
        values_SD = self.layout.bins.value(bins_A).view(self.layout.chunk, self.layout.action_dim)
        return np.asarray(self.processor.normalizer.unnormalize(values_SD.numpy()), np.float64)

    def _distributions(self, trajectory: Trajectory, where: slice) -> tuple[Tensor, Tensor]:
        """Log-probabilities of thought tokens (X, room, V) and of action bins (X, S * D, K), all at once."""
        ids_XT, slot_XT = trajectory.ids_ST[where], trajectory.slot_ST[where]
        pixels = trajectory.pixels_SNCHW[where].flatten(0, 1)
        features = self.model.model.get_image_features(pixels).pooler_output
        images_XID = features.reshape(len(ids_XT), -1, features.shape[-1])
        logits_XTV = self.way.logits(images_XID, ids_XT, trajectory.segment_ST[where], slot_XT)
        rows_X1 = torch.arange(len(ids_XT), device=ids_XT.device)[:, None]
        logits_XLV = logits_XTV[rows_X1, trajectory.index_SL[where]].float()
        banned = torch.tensor(self.layout.vocabulary.banned_in_thought, device=ids_XT.device)
        least = torch.finfo(logits_XLV.dtype).min
        thought_XCV = logits_XLV[:, : self.room].index_fill(2, banned, least) / THOUGHT_TEMPERATURE
        action_XAK = self.layout.bins.band(logits_XLV[:, self.room :]) / ACTION_TEMPERATURE
        return functional.log_softmax(thought_XCV, -1), functional.log_softmax(action_XAK, -1)

    def _chosen(self, trajectory: Trajectory, where: slice, distributions: tuple[Tensor, Tensor]) -> Tensor:
        thought_XCV, action_XAK = distributions
        target_XL = trajectory.target_SL[where]
        bins_XA = self.layout.bins.last_id - target_XL[:, self.room :]
        chosen = (thought_XCV.gather(2, target_XL[:, : self.room, None]), action_XAK.gather(2, bins_XA[..., None]))
        return torch.cat(chosen, dim=1)[..., 0]


def _token_loss(log_ratio: Tensor, advantage: float) -> Tensor:
    """Clipped on both sides of 1, and for a bad outcome at most ``DUAL_CLIP`` times as bad."""
    ratio = log_ratio.exp()
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH))
    return loss.clamp(max=-advantage * DUAL_CLIP) if advantage < 0 else loss


def _no_mark(phase: str) -> None:
    """Parts of a decision are not timed."""


def real_and_dead(trajectories: Sequence[Trajectory]) -> tuple[int, int]:
    """Decisions that were executed, and those behind the end of their episodes."""
    real = sum(trajectory.decisions for trajectory in trajectories)
    return real, sum(len(trajectory.thoughts) for trajectory in trajectories) - real
