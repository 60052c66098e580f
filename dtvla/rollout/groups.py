"""Groups of episodes to learn from: several of one task and init state, which tell good decisions from bad ones.

An iteration collects groups with one set of weights until enough of them have a mixed outcome. Prompts (task, init
state), seeds and decisions are functions of settings, iteration and outcomes alone: a collection that was killed and is
taken up again, or that other ranks share, gives the same groups as one without interruption on one rank.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from dtvla.errors import UserError
from dtvla.rollout.group_files import (
    Collected,
    GroupFiles,
    claim,
    folder_of,
    read_collected,
    remove_old,
    write_collected,
)
from dtvla.rollout.group_settings import GroupSettings
from dtvla.rollout.ranks import agree
from dtvla.rollout.results import EpisodeResult
from dtvla.rollout.rounds import GroupOutcome, Rounds
from dtvla.rollout.runner import ActingPolicy, episode_name, run_episodes
from dtvla.rollout.trajectories import SUFFIX, Trajectory, TrajectoryWriter, read_trajectory
from dtvla.sim.pool import EnvPool, EpisodeSpec, pool_settings
from dtvla.sim.suites import get_tasks

ENV_SEED = 0  # the benchmark's; another one moves cabinets and stoves by up to 2 cm, and a group begins alike


@dataclass(frozen=True)
class Prompt:
    """What the episodes of a group have in common."""

    suite: str
    task_id: int
    init_state: int


@dataclass(frozen=True)
class Group:
    """Episodes of one task and init state, and the iteration whose weights they are of."""

    task: Prompt
    iteration: int
    trajectories: list[Trajectory]


@dataclass(frozen=True)
class Collection:
    """The groups of an iteration, and counts over all its own episodes, those of groups that are not kept included.

    Attributes:
        groups: as many as the settings ask for.
        episodes: that were run.
        successes: among them.
        collected_groups: that were run.
        kept_groups: among them, surplus included.
        rounds: that it took.
        decisions: of all episodes.
        simulated_steps: of all episodes.
    """

    groups: list[Group]
    episodes: int
    successes: int
    collected_groups: int
    kept_groups: int
    rounds: int
    decisions: int
    simulated_steps: int


class GroupCollector:
    """Collects groups with simulators that start when they are first needed and live until :meth:`close`.

    All ranks call :meth:`collect` together; group g of an iteration is run by rank g % ranks.
    """

    def __init__(
        self,
        settings: GroupSettings,
        env: Mapping[str, Any],
        folder: Path,
        *,
        rank: int = 0,
        ranks: int = 1,
        exchange: Callable[[Any], list[Any]] = lambda own: [own],
        guard: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Check what can be checked; nothing starts yet.

        Args:
            settings: what to collect.
            env: the ``env`` group: suite, task_ids, max_steps and what :func:`dtvla.sim.pool.pool_settings` takes.
            folder: of the iterations' folders, the same one for all ranks.
            rank: number of this one.
            ranks: how many there are.
            exchange: gives every rank what each of them gave, in their order.
            guard: surrounds the simulations, never an exchange: what it raises there, all ranks hear of.

        Raises:
            UserError: unknown suite, task or init state, or no pictures.
        """
        self.settings, self.env, self.folder = settings, env, folder
        self.rank, self.ranks = rank, ranks
        self._exchange, self._guard = exchange, guard
        self._pool: EnvPool | None = None
        self._orders: dict[int, list[Prompt]] = {}
        pool_settings(env)
        if env["render"] == "none":
            raise UserError("env.render: none gives the policy no pictures; use full, or draft as in training")
        tasks = get_tasks(env["suite"], env["task_ids"])
        most = min((task.init_state_count for task in tasks), default=0)
        ids = [task.task_id for task in tasks]
        if not ids or len(set(ids)) < len(ids):
            raise UserError(f"env.task_ids: {ids} is empty or repeats a task; name each once, or null for all")
        if max(settings.init_states) >= most:
            raise UserError(
                f"data.init_states: {max(settings.init_states)} is not one; these tasks of {env['suite']} have "
                f"0 to {most - 1}"
            )
        self.prompts = [
            Prompt(task.suite, task.task_id, int(state)) for task in tasks for state in settings.init_states
        ]

    def collect(
        self,
        policy: ActingPolicy,
        iteration: int,
        weights: str,
        on_result: Callable[[EpisodeResult], None] | None = None,
    ) -> Collection:
        """The groups of an iteration, from disk as far as they lie there.

        Args:
            policy: decides; the weights are the same on all ranks.
            iteration: its number, from 0 on.
            weights: digest of the policy's weights.
            on_result: called for every episode that this rank runs, in the order in which they finish.

        Raises:
            UserError: too few groups were kept, the folder holds episodes of other weights or settings, a file is
                damaged, or the disk is full.
            RuntimeError: an episode broke.
            Abandoned: another rank could not go on.
        """
        try:
            return self._collect(policy, iteration, weights, on_result)
        except BaseException:
            self.close()  # its workers may be in the middle of something
            raise

    def close(self) -> None:
        """Close the simulators if they run."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def episodes(self, iteration: int, number: int) -> list[EpisodeSpec]:
        """The episodes of a group, by the number of its prompt in an iteration; numbers beyond the prompts repeat them.

        The order of the prompts is another one in each iteration.
        """
        seed, size, order = self.settings.seed, self.settings.group_size, self._order(iteration)
        prompt = order[number % len(order)]
        first = 1 + _digest(seed, iteration) + number * size  # no two of an iteration are equal
        alike = EpisodeSpec(prompt.suite, prompt.task_id, prompt.init_state, ENV_SEED, self.env["max_steps"])
        return [replace(alike, sample=first + member) for member in range(size)]

    def _collect(
        self,
        policy: ActingPolicy,
        iteration: int,
        weights: str,
        on_result: Callable[[EpisodeResult], None] | None,
    ) -> Collection:
        done, surplus = agree(self._exchange, partial(self._begin, iteration, weights))[0] or (None, [])
        if done is None:
            settings = self.settings
            needed, most = settings.groups, settings.groups
            rounds = Rounds(needed, most, settings.keep_success, settings.max_rounds, len(surplus))
            while numbers := rounds.next_prompts():
                own = [number for number in numbers if number % self.ranks == self.rank]
                shares = agree(self._exchange, partial(self._run, policy, iteration, own, on_result))
                rounds.add(outcome for share in shares for outcome in share)
            done = self._completed(iteration, rounds, surplus)
            agree(self._exchange, partial(self._end, iteration, done))
        return Collection([self._read(files) for files in done.groups], **done.statistics)

    def _begin(self, iteration: int, weights: str) -> tuple[Collected | None, list[GroupFiles]] | None:
        """What is on disk: this iteration if it is complete, and what the one before left. The first rank looks."""
        if self.rank:
            return None
        folder, before = (folder_of(self.folder, i) for i in (iteration, iteration - 1))
        done, previous = read_collected(folder), read_collected(before)
        surplus = previous.surplus if previous else []
        decisive = self._decisive()
        if surplus and done is None:
            claim(before, weights, decisive, complete=True)
        claim(folder, weights, decisive, complete=done is not None)
        if done is not None and len(done.groups) != self.settings.groups:
            raise UserError(
                f"data.groups: {self.settings.groups}, but {folder} holds an iteration of {len(done.groups)}; go on "
                "with as many, or remove the folder"
            )
        remove_old(self.folder, iteration, [*surplus, *(done.groups if done else [])])
        return done, surplus

    def _run(
        self,
        policy: ActingPolicy,
        iteration: int,
        numbers: Sequence[int],
        on_result: Callable[[EpisodeResult], None] | None,
    ) -> list[GroupOutcome]:
        """Run this rank's groups of a round, or what is missing of them."""
        folder = folder_of(self.folder, iteration)
        groups = {number: self.episodes(iteration, number) for number in numbers}
        missing = [spec for specs in groups.values() for spec in specs if not (folder / file_name(spec)).exists()]
        if missing:
            with self._guard():
                run_episodes(
                    policy,
                    missing,
                    self._open_pool(),
                    self._cot(),
                    batch_size=self.settings.batch_size,
                    on_result=on_result,
                    recorder=TrajectoryWriter(folder),
                )
        return [_outcome(number, [folder / file_name(spec) for spec in specs]) for number, specs in groups.items()]

    def _completed(self, iteration: int, rounds: Rounds, surplus: list[GroupFiles]) -> Collected:
        """Which groups to learn from: those left by the iteration before, then its own in the order of prompts."""
        kept = [self._files(iteration, outcome.number) for outcome in rounds.kept]
        groups, outcomes = [*surplus, *kept], rounds.outcomes
        statistics = {
            "episodes": sum(outcome.size for outcome in outcomes),
            "successes": sum(outcome.successes for outcome in outcomes),
            "collected_groups": len(outcomes),
            "kept_groups": len(kept),
            "rounds": rounds.count,
            "decisions": sum(outcome.decisions for outcome in outcomes),
            "simulated_steps": sum(outcome.steps for outcome in outcomes),
        }
        return Collected(groups[: self.settings.groups], groups[self.settings.groups :], statistics)

    def _end(self, iteration: int, done: Collected) -> None:
        """Mark the iteration as complete; nobody goes on before that."""
        if self.rank == 0:
            write_collected(folder_of(self.folder, iteration), done)

    def _order(self, iteration: int) -> list[Prompt]:
        """All prompts in the order of an iteration."""
        if iteration not in self._orders:
            seed = self.settings.seed
            key = [(_digest(seed, iteration, p.suite, p.task_id, p.init_state), p) for p in self.prompts]
            self._orders = {iteration: [prompt for _, prompt in sorted(key, key=lambda pair: pair[0])]}
        return self._orders[iteration]

    def _files(self, iteration: int, number: int) -> GroupFiles:
        specs = self.episodes(iteration, number)
        task = (specs[0].suite, specs[0].task_id, specs[0].init_state)
        return GroupFiles(iteration, *task, [file_name(spec) for spec in specs])

    def _read(self, files: GroupFiles) -> Group:
        folder = folder_of(self.folder, files.iteration)
        trajectories = [read_trajectory(folder / name) for name in files.episodes]
        return Group(Prompt(files.suite, files.task_id, files.init_state), files.iteration, trajectories)

    def _decisive(self) -> dict[str, Any]:
        """Everything but weights and iteration that decides what an episode is."""
        own = {
            name: getattr(self.settings, name) for name in ("group_size", "temperature", "action_temperature", "seed")
        }
        tasks = sorted({prompt.task_id for prompt in self.prompts})
        states = sorted({prompt.init_state for prompt in self.prompts})
        env = {**pool_settings(self.env), "max_steps": self.env["max_steps"]}
        return {**own, "suite": self.env["suite"], "task_ids": tasks, "init_states": states, **env}

    def _cot(self) -> Any:
        from dtvla.policy.cot import CotMode

        settings = self.settings
        return CotMode(
            mode="think",
            temperature=settings.temperature,
            action_temperature=settings.action_temperature,
            speculate=settings.speculate,
        )

    def _open_pool(self) -> EnvPool:
        if self._pool is None:
            busy = -(-self.settings.groups // self.ranks) * self.settings.group_size
            self._pool = EnvPool(min(self.settings.workers, busy), **pool_settings(self.env))
            self._pool.__enter__()  # left by close
        return self._pool


def file_name(spec: EpisodeSpec) -> str:
    """Name of an episode's file."""
    return f"{episode_name(spec)}{SUFFIX}"


def _outcome(number: int, paths: Sequence[Path]) -> GroupOutcome:
    episodes = [read_trajectory(path) for path in paths]
    return GroupOutcome(
        number=number,
        size=len(episodes),
        successes=sum(episode.success for episode in episodes),
        decisions=sum(len(episode.records) for episode in episodes),
        steps=sum(episode.steps for episode in episodes),
    )


def _digest(*parts: object) -> int:
    """A number in [0, 2**32) that depends on all parts."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
