"""One iteration of GRPO as data: episodes, what they earned, and the mini-batches of decisions made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dtvla.callbacks.together import exchange
from dtvla.errors import UserError
from dtvla.learning.advantages import group_advantages, rewards, token_weights, well_formed
from dtvla.learning.decisions import PolicyBatch, collate_decisions, encode_decision

if TYPE_CHECKING:
    from dtvla.data.grouping import Cut
    from dtvla.policy.layout import Layout
    from dtvla.rollout.groups import Collection


@dataclass(frozen=True)
class Recipe:
    """How episodes become a gradient.

    Attributes:
        ppo_epochs: passes over the episodes of an iteration.
        mini_batches: optimiser steps of a pass.
        success_reward: of an episode that reaches its goal.
        format_reward: times the share of well-formed thoughts among an episode's decisions.
        normalize: divide advantages by the group's standard deviation; False is Dr.GRPO (Liu et al., 2025).
        epsilon: added to it.
        weighting: of tokens, see :func:`~dtvla.learning.advantages.token_weights`.
        constant: of that.
        kl_in_reward: weight of an episode's summed distance from the reference in its reward.
        kl_target: divergence from the reference per token that the weight in the loss is adapted to; None keeps the
            weight.
        seed: of the order of episodes.
    """

    ppo_epochs: int = 2
    mini_batches: int = 4
    success_reward: float = 1.0
    format_reward: float = 0.4
    normalize: bool = True
    epsilon: float = 1e-6
    weighting: str = "constant"
    constant: float = 1.0
    kl_in_reward: float = 0.0
    kl_target: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values; :class:`UserError`."""
        for name in ("ppo_epochs", "mini_batches"):
            if getattr(self, name) < 1:
                raise UserError(f"algorithm.{name}: {getattr(self, name)} is below 1")
        if self.epsilon < 0:
            raise UserError(f"algorithm.advantage.epsilon: {self.epsilon} is negative")
        if self.kl_in_reward < 0:
            raise UserError(f"algorithm.kl.weight: {self.kl_in_reward} is negative")
        if self.kl_target is not None and self.kl_target <= 0:
            raise UserError(f"algorithm.kl.target: {self.kl_target} is not positive; use null for a constant weight")

    @property
    def steps(self) -> int:
        """Optimiser steps of an iteration."""
        return self.ppo_epochs * self.mini_batches


class Iteration:
    """The decisions of an iteration's episodes, ready to learn from.

    Attributes:
        number: of the iteration.
        collection: its groups.
        fresh: whether all groups were collected in this iteration.
    """

    def __init__(self, number: int, collection: Collection, layout: Layout, recipe: Recipe) -> None:
        """Encode all decisions; pictures stay on disk."""
        self.number, self.collection, self.layout, self.recipe = number, collection, layout, recipe
        self.fresh = all(group.iteration == number for group in collection.groups)
        self.trajectories = [trajectory for group in collection.groups for trajectory in group.trajectories]
        self._places = [(n, d) for n, one in enumerate(self.trajectories) for d in range(len(one.records))]
        self._examples = [
            encode_decision(layout, self.trajectories[n].instruction, self.trajectories[n].records[d])
            for n, d in self._places
        ]
        self._lengths_B = np.array([len(example.input_ids_T) for example in self._examples])
        self._owner_B = np.array([n for n, _ in self._places])
        tokens_B = np.array([example.tokens for example in self._examples])
        self.tokens_N = np.bincount(self._owner_B, tokens_B, minlength=len(self.trajectories))
        self.well_formed_N = np.array(
            [np.mean([well_formed(r, layout.vocabulary) for r in t.records]) for t in self.trajectories]
        )
        self._reference: list[Tensor] | None = None
        self.rewards_N = self._rewards()

    @property
    def advantages_N(self) -> np.ndarray:
        """Of every episode, over its group."""
        size = len(self.collection.groups[0].trajectories)
        groups_GN = self.rewards_N.reshape(-1, size)
        return group_advantages(groups_GN, self.recipe.normalize, self.recipe.epsilon).reshape(-1)

    def ask_reference(self, log_probs: Callable[[PolicyBatch], Tensor], cut: Cut, device: torch.device) -> None:
        """Let the reference judge all tokens; ranks share the work.

        Args:
            log_probs: of a batch's tokens (M,) under the reference.
            cut: into forward passes, over ranks.
            device: of the model.
        """
        own: dict[int, Tensor] = {}
        for part in cut.passes(self._lengths_B):
            found_M = log_probs(self._collate(part, cut).to(device)).cpu()
            own |= dict(zip(part.tolist(), found_M.split([self._examples[b].tokens for b in part]), strict=True))
        found = {b: values for share in exchange(own) for b, values in share.items()}
        self._reference = [found[b] for b in range(len(self._examples))]
        self.rewards_N = self._rewards()

    def mini_batch(self, place: int, cut: Cut) -> list[PolicyBatch]:
        """This rank's parts of one optimiser step's batch, on the host.

        Args:
            place: of the step within the iteration.
            cut: into forward passes, over ranks.
        """
        chosen_N = self._episodes(place)
        of_batch_B = np.flatnonzero(np.isin(self._owner_B, chosen_N))
        weight_N = np.zeros(len(self.trajectories))
        weight_N[chosen_N] = token_weights(self.tokens_N[chosen_N], self.recipe.weighting, self.recipe.constant)
        return [self._collate(of_batch_B[part], cut, weight_N) for part in cut.passes(self._lengths_B[of_batch_B])]

    def _episodes(self, place: int) -> np.ndarray:
        epoch, part = divmod(place, self.recipe.mini_batches)
        order_N = np.random.default_rng([self.recipe.seed, self.number, epoch]).permutation(len(self.trajectories))
        return np.array_split(order_N, self.recipe.mini_batches)[part]

    def _collate(self, chosen: Sequence[int] | np.ndarray, cut: Cut, weight_N: np.ndarray | None = None) -> PolicyBatch:
        owner_B, advantages_N = self._owner_B[chosen], self.advantages_N
        pixels = [self.trajectories[n].pixels(d) for n, d in (self._places[b] for b in chosen)]
        return collate_decisions(
            self.layout,
            [self._examples[b] for b in chosen],
            torch.from_numpy(np.stack(pixels)),
            advantages_B=advantages_N[owner_B],
            weights_B=np.ones(len(owner_B)) if weight_N is None else weight_N[owner_B],
            references=None if self._reference is None else [self._reference[b] for b in chosen],
            pack_tokens=cut.pack_tokens,
        )

    def _rewards(self) -> np.ndarray:
        success_N = np.array([t.success for t in self.trajectories], float)
        earned_N = rewards(success_N, self.well_formed_N, self.recipe.success_reward, self.recipe.format_reward)
        if self.recipe.kl_in_reward and self._reference is not None:
            pairs = zip(self._examples, self._reference, strict=True)
            apart_B = [float((example.old_log_probs - found).sum()) for example, found in pairs]
            earned_N = earned_N - self.recipe.kl_in_reward * np.bincount(self._owner_B, apart_B)
        return earned_N
