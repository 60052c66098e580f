"""The scripted expert as a source of episodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dtvla.data.collection import CollectionRequest, EpisodePlan
from dtvla.data.takes import Clock, Take
from dtvla.errors import UserError

if TYPE_CHECKING:
    from dtvla.sim.env import LiberoEnv


@dataclass(frozen=True, kw_only=True)
class ExpertRequest(CollectionRequest):
    """Episodes of the scripted expert, thinking aloud.

    Attributes:
        episodes: successful episodes wanted of each task.
        init_states: init states that are used in turn.
        seed: of the expert's noise and detours.
        max_steps: of a try.
        max_attempts: tries for one episode before the collection gives up.
    """

    episodes: int
    init_states: tuple[int, ...]
    seed: int
    max_steps: int
    max_attempts: int

    def __post_init__(self) -> None:
        """Refuse empty or negative settings."""
        super().__post_init__()
        for name in ("episodes", "max_steps", "max_attempts"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: found {getattr(self, name)}; use 1 or more")
        if not self.init_states or self.seed < 0:
            raise UserError(f"init_states, seed: found {list(self.init_states)}, {self.seed}; use some, and 0 or more")

    def plans(self) -> list[EpisodePlan]:
        """All episodes, task by task, in the order of the dataset."""
        return [
            EpisodePlan(t * self.episodes + k, task_id, k, init_state=self.init_states[k % len(self.init_states)])
            for t, task_id in enumerate(self.task_ids)
            for k in range(self.episodes)
        ]

    def environment(self) -> dict[str, Any]:
        """Settings of the environment in which the expert acts."""
        return {**super().environment(), "max_steps": self.max_steps}

    def expert_seed(self, plan: EpisodePlan, attempt: int) -> int:
        """Seed of one try: a pure function of the request's seed, the task, the episode's number and the attempt."""
        entropy = [self.seed, plan.task_id, plan.number, attempt]
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

    def perform(self, env: LiberoEnv, plan: EpisodePlan, clock: Clock) -> Take:
        """Try until the expert succeeds.

        Raises:
            UserError: every try failed, or a thought breaks the schema.
        """
        failures: list[dict[str, Any]] = []
        for attempt in range(self.max_attempts):
            seed = self.expert_seed(plan, attempt)
            take, succeeded = self._try(env, plan, seed, clock)
            if succeeded:
                check_thoughts(take.thoughts, task_objects(env), plan.episode_index)
                take.facts = {"init_state": plan.init_state, "seed": seed, "attempt": attempt, "failures": failures}
                return take
            reason = f"no success within {self.max_steps} steps"
            failures.append({"seed": seed, "steps": len(take.actions), "reason": reason})
        raise UserError(
            f"max_attempts: the expert failed {len(failures)} times at episode {plan.episode_index} "
            f"({self.suite} task {plan.task_id}, init state {plan.init_state}); "
            "leave the task out, or raise max_attempts or max_steps"
        )

    def _try(self, env: LiberoEnv, plan: EpisodePlan, seed: int, clock: Clock) -> tuple[Take, bool]:
        """One try and whether it succeeded."""
        from dtvla.sim.expert import Expert

        take = Take()
        with clock("reset"):
            observation, _ = env.reset(seed=0, options={"init_state": plan.init_state})
            expert = Expert(env, seed=seed)  # begins an episode at the environment's state
        while True:
            with clock("expert"):
                act = expert.act()
            take.add(observation, act.action, act.thought)
            with clock("simulate_and_render"):
                observation, _, success, truncated, _ = env.step(act.executed)
            if success or truncated:
                return take, success


def task_objects(env: LiberoEnv) -> list[str]:
    """Spoken names of the objects that the task is about."""
    from dtvla.cot.objects import spoken

    return [spoken(str(name)) for name in env.domain.obj_of_interest]


def check_thoughts(thoughts: list[str], objects: list[str], episode_index: int) -> None:
    """Refuse an episode with a thought that breaks the schema.

    Raises:
        UserError: names the episode, the frame and what is wrong.
    """
    from dtvla.cot.schema import Schema, SchemaSettings

    schema = Schema(SchemaSettings(min_words=20, max_words=60))
    for thought in dict.fromkeys(thoughts):
        if violations := schema.violations(thought, objects):
            raise UserError(
                f"thoughts: episode {episode_index}, frame {thoughts.index(thought)}: "
                f"{'; '.join(v.message for v in violations)} in {thought!r}; mend dtvla/cot/narrate.py"
            )
