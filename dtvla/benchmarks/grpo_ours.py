"""One GRPO iteration of ours, by the parts that the trainer is made of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dtvla.benchmarks.grpo_published import ACTION_TEMPERATURE, LEARNING_RATE, SLICE, THOUGHT_TEMPERATURE
from dtvla.benchmarks.grpo_settings import Settings
from dtvla.benchmarks.timing import Mark
from dtvla.data.grouping import Cut
from dtvla.learning.decisions import PolicyBatch
from dtvla.learning.iteration import Iteration, Recipe
from dtvla.learning.objective import Objective, policy_loss
from dtvla.policy.log_probs import Sampling
from dtvla.policy.policy import Policy
from dtvla.rollout.group_settings import GroupSettings
from dtvla.rollout.groups import Collection, GroupCollector
from dtvla.sim.pool import EpisodeSpec


class OurSchedule:
    """Iterations as :class:`~dtvla.learning.grpo.GRPOModule` makes them on one device.

    Args:
        policy: decides and learns.
        settings: of the study.
        folder: for the episodes, empty.
    """

    def __init__(self, policy: Policy, settings: Settings, folder: Path) -> None:
        self.policy, self.model, self.settings = policy, policy.model, settings
        self.layout = policy.processor.layout
        self.sampling, self.objective = Sampling(THOUGHT_TEMPERATURE, ACTION_TEMPERATURE), Objective()
        self.cut = Cut(micro_batch_size=settings.micro_batch or SLICE)
        self.recipe = Recipe(
            ppo_epochs=settings.ppo_epochs,
            mini_batches=settings.mini_batches,
            weighting="sequence",
            seed=settings.seed,
        )
        groups = GroupSettings(
            groups=settings.groups,
            group_size=settings.group_size,
            init_states=[settings.init_state],
            keep_success=None,
            max_rounds=1,
            temperature=THOUGHT_TEMPERATURE,
            action_temperature=ACTION_TEMPERATURE,
            workers=settings.workers,
            batch_size=1 if self.model.device.type == "cpu" else None,
            seed=settings.seed,
            speculate=settings.checkpoint is not None,
        )
        self.env = {**settings.env, "max_steps": settings.steps}
        self.collector = GroupCollector(groups, self.env, folder)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)

    def episodes(self, number: int) -> list[EpisodeSpec]:
        """All episodes of an iteration, group after group."""
        groups = range(self.settings.groups)
        return [spec for group in groups for spec in self.collector.episodes(number, group)]

    def warm_up(self, mark: Mark) -> None:
        """Start the simulators and run an iteration of one decision each; phases ``start`` and ``update``."""
        self.collector.env = {**self.env, "max_steps": min(self.layout.chunk, self.settings.steps)}
        collection = self.collector.collect(self.policy, 0, "warm-up")
        mark("start")
        self.learn(0, collection, mark)
        self.collector.env = self.env

    def collect(self, number: int, mark: Mark) -> Collection:
        """Run the episodes of an iteration; phase ``collect``."""
        collection = self.collector.collect(self.policy, number, "measured")
        mark("collect")
        return collection

    def learn(self, number: int, collection: Collection, mark: Mark) -> None:
        """All updates; the log-probabilities were recorded when the tokens were sampled. Phase ``update``."""
        self.model.train()
        iteration = Iteration(number, collection, self.layout, self.recipe)
        iteration.rewards_N = dealt_rewards(self.settings)
        for place in range(self.recipe.steps):
            self.gradient(iteration.mini_batch(place, self.cut))
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
        mark("update")

    def gradient(self, parts: Sequence[PolicyBatch]) -> float:
        """The objective of a mini-batch, and its gradient."""
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.model.device)
        for part in parts:
            batch = part.to(self.model.device)
            loss = policy_loss(self.model, batch, self.layout, self.sampling, self.objective).objective
            loss.backward()
            total += loss.detach()
        return float(total)


def dealt_rewards(settings: Settings) -> np.ndarray:
    """Rewards (episodes,): every second episode of a group counts as a success, so that there is something to learn."""
    return np.tile(np.arange(settings.group_size) % 2, settings.groups).astype(np.float64)
