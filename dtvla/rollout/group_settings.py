"""The settings of collecting groups, checked before anything starts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dtvla.errors import UserError
from dtvla.rollout.rounds import is_kept


@dataclass(frozen=True)
class GroupSettings:
    """What is collected for an iteration, and how.

    Attributes:
        groups: to learn from.
        group_size: episodes of a group.
        init_states: of every task.
        keep_success: lowest and highest share of successes of a group to learn from, inclusive; None keeps all.
        max_rounds: with so many rounds there have to be enough groups.
        temperature: of thoughts.
        action_temperature: of actions.
        workers: simulator processes of each rank.
        batch_size: most observations of a forward; None for as many as there are workers.
        seed: of the order of prompts and of sampling.
        speculate: check the thought of the previous decision instead of writing it anew; same result, faster.
    """

    groups: int
    group_size: int
    init_states: Sequence[int]
    keep_success: Sequence[float] | None
    max_rounds: int
    temperature: float
    action_temperature: float
    workers: int
    batch_size: int | None
    seed: int
    speculate: bool

    def __post_init__(self) -> None:
        """Refuse what cannot be collected or would teach nothing."""
        if self.group_size < 2:
            raise UserError(
                f"data.group_size: the advantage of a group of {self.group_size} is 0, as an episode is compared with "
                "its group; give at least 2"
            )
        for name, least in {"groups": 1, "max_rounds": 1, "workers": 1, "batch_size": 1, "seed": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"data.{name}: {value} is too small; give at least {least}")
        for name in ("temperature", "action_temperature"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise UserError(f"data.{name}: episodes of a group differ by sampling, not at {value}; give 1.0, say")
        states = list(self.init_states)
        if not states or len(set(states)) < len(states) or min(states) < 0:
            raise UserError(
                f"data.init_states: {states} is empty, repeats one, or has a negative one; give [0,1,2], say"
            )
        if self.keep_success is not None:
            self._check_bounds(list(self.keep_success))

    def _check_bounds(self, bounds: list[float]) -> None:
        size = self.group_size
        if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1] <= 1:
            raise UserError(f"data.keep_success: {bounds} is not two shares from 0 to 1 in order; give [0.1,0.9]")
        if not any(is_kept(successes, size, bounds) for successes in range(size + 1)):
            raise UserError(
                f"data.keep_success: no group of {size} episodes has a share of successes within {bounds}; "
                "widen it, or raise data.group_size"
            )
