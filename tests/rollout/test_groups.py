"""Groups of real LIBERO episodes: the same after a kill and on several ranks, kept by outcome, never counted twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digests import digests
from omegaconf import OmegaConf
from ranks import on_ranks
from torch import distributed

from dtvla.cli import config_dir
from dtvla.data.normalization import Statistics
from dtvla.errors import UserError
from dtvla.policy.cot import CotMode
from dtvla.policy.policy import Decision, Policy, build_policy
from dtvla.rollout.group_files import GroupFiles, claim, folder_of, remove_old
from dtvla.rollout.groups import Collection, Group, GroupCollector, GroupSettings
from dtvla.rollout.results import EpisodeResult
from dtvla.rollout.runner import decision_seed
from dtvla.sim.env import LiberoEnv
from dtvla.sim.expert import Expert
from dtvla.sim.pool import EnvPool, EpisodeSpec, pool_settings

pytestmark = pytest.mark.usefixtures("one_thread")
ENV: dict[str, Any] = {
    **{"suite": "libero_goal", "task_ids": [1], "protocol": "published", "max_steps": 24},
    **{"render": "draft", "stepping": "exact", "image_size": 64, "settle_steps": 10},
}
SETTINGS = GroupSettings(
    groups=2,
    group_size=2,
    init_states=[0, 7],
    keep_success=None,
    max_rounds=3,
    temperature=1.0,
    action_temperature=1.6,
    workers=2,
    batch_size=1,
    seed=3,
    speculate=False,
)


@pytest.fixture(scope="module")
def pool() -> Iterator[EnvPool]:
    """One for all tests: every environment costs seconds to make."""
    with EnvPool(2, **pool_settings(ENV)) as pool:
        yield pool


@contextmanager
def collecting(folder: Path, pool: EnvPool, env: dict[str, Any] = ENV, **changes: Any) -> Iterator[GroupCollector]:
    """A collector that borrows the pool, and does not close it when it fails before it simulates or behind that."""
    collector = GroupCollector(replace(SETTINGS, **changes), env, folder)
    collector._open_pool = lambda: pool  # type: ignore[method-assign]
    yield collector


def nano(seed: int = 1) -> Policy:
    settings = OmegaConf.to_container(OmegaConf.load(config_dir() / "model" / "nano.yaml"))
    assert isinstance(settings, dict)
    rng = np.random.default_rng(0)
    statistics = Statistics.from_frames(rng.normal(size=(50, 8)), rng.uniform(-1, 1, size=(50, 7)))
    changes = {"seed": seed, "lora": None, "max_thought_tokens": 20}
    return build_policy({**settings, **changes}, ["move the hand above the soup"], statistics)


class Refusing:
    """A policy that nobody may ask."""

    def act(self, *arguments: Any, **more: Any) -> list[Decision]:
        raise AssertionError("an episode was run")


# -- what is asked for ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 1}, "data.group_size: the advantage of a group of 1 is 0"),
        ({"groups": 0}, "data.groups: 0 is too small; give at least 1"),
        ({"max_rounds": 0}, "data.max_rounds"),
        ({"workers": 0}, "data.workers"),
        ({"batch_size": 0}, "data.batch_size"),
        ({"temperature": 0.0}, "data.temperature: .* differ by sampling"),
        ({"action_temperature": float("nan")}, "data.action_temperature"),
        ({"init_states": []}, "data.init_states"),
        ({"init_states": [1, 1]}, "data.init_states"),
        ({"init_states": [0, 50]}, "data.init_states: 50 is not one; these tasks of libero_goal have 0 to 49"),
        ({"keep_success": (0.9, 0.1)}, "data.keep_success"),
        ({"keep_success": [0.1]}, "data.keep_success"),
        ({"keep_success": (0.1, 0.4)}, "no group of 2 episodes has a share of successes within"),
    ],
)
def test_settings_that_teach_nothing_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GroupCollector(replace(SETTINGS, **changes), ENV, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"suite": "libero_objekt"}, "libero_object"),
        ({"task_ids": []}, "env.task_ids"),
        ({"task_ids": [3, 3]}, "env.task_ids"),
        ({"task_ids": [99]}, "99"),
        ({"render": "none"}, "env.render"),
        ({"stepping": "slow"}, "stepping"),
    ],
)
def test_environments_that_do_not_exist_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GroupCollector(SETTINGS, {**ENV, **changes}, tmp_path)


def test_prompts_are_permuted_and_no_two_episodes_draw_the_same_numbers(tmp_path: Path) -> None:
    env = {**ENV, "task_ids": [0, 3, 4]}
    settings = replace(SETTINGS, init_states=[0, 7, 8, 31], group_size=5)
    collector, again = (GroupCollector(settings, env, tmp_path) for _ in range(2))
    other = GroupCollector(replace(settings, seed=4), env, tmp_path)
    orders = []
    for iteration in (0, 1, 2):
        groups = [collector.episodes(iteration, number) for number in range(30)]
        assert groups == [again.episodes(iteration, number) for number in range(30)]
        assert all(
            len({(s.suite, s.task_id, s.init_state, s.seed, s.max_steps) for s in group}) == 1 for group in groups
        )
        prompts = [(group[0].task_id, group[0].init_state) for group in groups]
        assert len(set(prompts[:12])) == 12
        assert prompts[12:24] == prompts[:12], "more groups than prompts: they are cycled"
        drawn = [decision_seed(spec, k) for group in groups for spec in group for k in range(3)]
        assert len(set(drawn)) == len(drawn)
        orders.append(prompts[:12])
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert [other.episodes(0, n)[0].init_state for n in range(12)] != [s for _, s in orders[0]]


def test_folders_are_removed_when_nobody_needs_their_groups(tmp_path: Path) -> None:
    for iteration in range(7):
        claim(folder_of(tmp_path, iteration), "w", {}, complete=False)
    (tmp_path / "iteration-old").mkdir()
    remove_old(tmp_path, 5, [GroupFiles(2, "libero_goal", 0, 0, ["a", "b"])])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"iteration-000{iteration}" for iteration in (2, 4, 5, 6)),
        "iteration-old",
    ]


# -- what is recorded ----------------------------------------------------------------------------------------------


class Watched:
    """The nano policy; keeps what it was asked and what it answered."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.seen: dict[int, tuple[dict[str, Any], Decision]] = {}

    def act(self, observations: Any, cot: CotMode, *, seeds: Any, drafts: Any = None) -> list[Decision]:
        assert (cot.mode, cot.temperature, cot.action_temperature) == ("think", 1.0, 1.6)
        decisions = self.policy.act(observations, cot, seeds=seeds, drafts=drafts)
        for seed, observation, decision in zip(seeds, observations, decisions, strict=True):
            copy = {
                key: np.copy(value) if isinstance(value, np.ndarray) else value for key, value in observation.items()
            }
            self.seen[seed] = (copy, decision)
        return decisions


@pytest.mark.sim
def test_a_trajectory_is_what_the_model_saw_and_sampled(tmp_path: Path, pool: EnvPool) -> None:
    policy = Watched(nano())
    results: list[EpisodeResult] = []
    with collecting(tmp_path, pool) as collector:
        collection = collector.collect(policy, 0, "w", results.append)
    assert (collection.episodes, collection.collected_groups, collection.rounds) == (4, 2, 1)
    assert (collection.successes, collection.kept_groups) == (0, 2)
    assert (collection.simulated_steps, collection.decisions) == (4 * 24, 4 * 3)
    assert len(results) == 4
    starts = []
    for number, group in enumerate(collection.groups):
        assert [t.spec for t in group.trajectories] == collector.episodes(0, number)
        assert group.task.init_state == group.trajectories[0].spec.init_state
        starts.append([trajectory.pixels(0) for trajectory in group.trajectories])
        for trajectory in group.trajectories:
            assert [(r.step, r.executed) for r in trajectory.records] == [(0, 10), (10, 10), (20, 4)]
            assert (trajectory.steps, trajectory.success) == (24, False)
            for k, record in enumerate(trajectory.records):
                observation, decision = policy.seen.pop(decision_seed(trajectory.spec, k))
                assert (record.thought_ids, record.thought_log_probs) == (
                    decision.thought_ids,
                    decision.thought_log_probs,
                )
                assert record.forced == decision.thought_forced == (2 if decision.truncated else record.forced)
                assert all(p == 0 for p in record.thought_log_probs[len(record.thought_ids) - record.forced :])
                assert all(p < 0 for p in record.thought_log_probs[: len(record.thought_ids) - record.forced])
                np.testing.assert_array_equal(record.bins_A, decision.action_bins_A)
                np.testing.assert_array_equal(record.action_log_probs_A, decision.action_log_probs_A)
                pixels = policy.policy.processor.pixels(observation).numpy()
                np.testing.assert_array_equal(trajectory.pixels(k), pixels)
    assert not policy.seen
    for group_starts in starts:
        np.testing.assert_array_equal(*group_starts, err_msg="a group begins alike")
    first, second = (t.records[0].bins_A.tolist() for t in collection.groups[0].trajectories)
    assert first != second, "and is sampled anew"


@pytest.mark.sim
def test_speculation_changes_no_token_and_no_log_probability(tmp_path: Path, pool: EnvPool) -> None:
    policy, tokens = nano(), []
    found: dict[bool, Collection] = {}
    for speculate in (False, True):
        forwards: list[int] = []
        with collecting(tmp_path / str(speculate), pool, speculate=speculate, temperature=0.2) as collector:
            found[speculate] = collector.collect(
                policy, 0, "w", lambda episode, own=forwards: own.append(sum(t.forwards for t in episode.thoughts))
            )
        tokens.append(sum(forwards))
    assert tokens[1] < tokens[0], "drafts are used"
    for plain, quick in zip(found[False].groups, found[True].groups, strict=True):
        for slow, fast in zip(plain.trajectories, quick.trajectories, strict=True):
            assert slow.spec == fast.spec
            for old, new in zip(slow.records, fast.records, strict=True):
                assert old.thought_ids == new.thought_ids
                np.testing.assert_array_equal(old.bins_A, new.bins_A)
                np.testing.assert_allclose(old.thought_log_probs, new.thought_log_probs, atol=2e-4)
                np.testing.assert_allclose(old.action_log_probs_A, new.action_log_probs_A, atol=2e-4)


# -- interruptions -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, pool: EnvPool) -> Path:
    """What one rank collects without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    with collecting(folder, pool) as collector:
        collector.collect(nano(), 4, "weights")
    return folder_of(folder, 4)


def _collect_until_killed(rank: int, folder: Path) -> None:
    def kill(result: EpisodeResult) -> None:
        if len(list(folder_of(folder, 4).glob("*.safetensors"))) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    GroupCollector(replace(SETTINGS, workers=1), ENV, folder).collect(nano(), 4, "weights", kill)


@pytest.mark.sim
@pytest.mark.slow
def test_a_killed_collection_goes_on_to_the_same_groups(tmp_path: Path, pool: EnvPool, whole: Path) -> None:
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        on_ranks(1, _collect_until_killed, tmp_path)
    folder = folder_of(tmp_path, 4)
    before = digests(folder)
    assert len(before) == 4, "meta.json and three of four episodes"
    assert before.items() <= digests(whole).items()
    (missing,) = digests(whole).keys() - before.keys() - {"groups.json"}
    (folder / f"{missing}.tmp").write_bytes((whole / missing).read_bytes()[:1000])  # killed while it wrote
    for weights, changes, message in (
        ("others", {}, "collected by other weights .weights, now others.; go on as before, or remove"),
        ("weights", {"temperature": 0.9}, "collected with other settings .temperature."),
    ):
        with collecting(tmp_path, pool, **changes) as other, pytest.raises(UserError, match=message):
            other.collect(Refusing(), 4, weights)
    finished: list[EpisodeResult] = []
    with collecting(tmp_path, pool) as collector:
        collector.collect(nano(), 4, "weights", finished.append)
    assert len(finished) == 1, "only what is missing is run"
    assert digests(folder) == digests(whole)


def _exchange(own: Any) -> list[Any]:
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, own)
    return gathered


def _collect_on_ranks(rank: int, folder: Path) -> None:
    distributed.init_process_group("gloo")
    ranks = {"rank": rank, "ranks": 2, "exchange": _exchange}
    collector = GroupCollector(replace(SETTINGS, workers=1), ENV, folder, **ranks)
    finished: list[EpisodeResult] = []
    collection = collector.collect(nano(), 4, "weights", finished.append)
    summary = [[(str(t.path), t.steps) for t in group.trajectories] for group in collection.groups]
    (folder / f"rank{rank}.json").write_text(json.dumps({"groups": summary, "own": [e.init_state for e in finished]}))
    collector.close()


@pytest.mark.sim
@pytest.mark.slow
def test_two_ranks_collect_the_groups_of_one(tmp_path: Path, whole: Path) -> None:
    on_ranks(2, _collect_on_ranks, tmp_path)
    assert digests(folder_of(tmp_path, 4)) == digests(whole)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["groups"] == second["groups"], "both learn from all groups"
    collector = GroupCollector(SETTINGS, ENV, tmp_path)
    for rank, one in enumerate((first, second)):
        assert one["own"] == [collector.episodes(4, rank)[0].init_state] * 2, "each runs its own groups"


@pytest.mark.sim
def test_a_complete_iteration_is_read_whatever_the_weights_are_now(tmp_path: Path, whole: Path) -> None:
    shutil.copytree(whole, folder_of(tmp_path, 4))
    collection = GroupCollector(SETTINGS, ENV, tmp_path).collect(Refusing(), 4, "later weights")
    assert (collection.episodes, collection.decisions, len(collection.groups)) == (4, 12, 2)
    assert [t.records[0].executed for group in collection.groups for t in group.trajectories] == [10] * 4
    more = GroupCollector(replace(SETTINGS, groups=3), ENV, tmp_path)
    with pytest.raises(UserError, match="data.groups: 3, but .*iteration-0004 holds an iteration of 2"):
        more.collect(Refusing(), 4, "later weights")
    (folder_of(tmp_path, 4) / "groups.json").write_text('{"format": "dtvla.groups"}')
    with pytest.raises(UserError, match="groups.json: damaged .*remove .*iteration-0004"):
        more.collect(Refusing(), 4, "weights")


@pytest.mark.sim
@pytest.mark.slow
def test_an_error_closes_the_simulators_and_leaves_finished_episodes(tmp_path: Path) -> None:
    class Failing:
        def __init__(self) -> None:
            self.policy, self.calls = nano(), 0

        def act(self, observations: Any, cot: CotMode, **more: Any) -> list[Decision]:
            self.calls += 1
            if self.calls == 6:
                raise RuntimeError("out of memory")
            return self.policy.act(observations, cot, **more)

    collector = GroupCollector(replace(SETTINGS, workers=1), ENV, tmp_path)
    with pytest.raises(RuntimeError, match="out of memory"):
        collector.collect(Failing(), 0, "w")
    assert collector._pool is None
    assert len(list(folder_of(tmp_path, 0).glob("*.safetensors"))) == 1


# -- outcomes ------------------------------------------------------------------------------------------------------

CHUNK, LIMIT = 30, 60  # the task is solved in 52 steps
LONG = {**ENV, "max_steps": LIMIT}


@pytest.fixture(scope="module")
def solutions() -> dict[int, np.ndarray]:
    """Actions that solve the task from each init state."""
    env = LiberoEnv(ENV["suite"], ENV["task_ids"][0], render="none", max_steps=LIMIT)
    found = {}
    for state in SETTINGS.init_states:
        env.reset(seed=0, options={"init_state": state})
        expert, actions, success = Expert(env, seed=0, noise=0.0), [], False
        while not success:
            actions.append(expert.act().executed)
            success = env.step(actions[-1])[2]
        found[state] = np.array(actions)
    env.close()
    return found


class Scripted:
    """Solves as many episodes of a group as it is told to, and stands still in the others."""

    def __init__(self, collector: GroupCollector, solutions: dict[int, np.ndarray], plan: dict[int, list[int]]) -> None:
        self.solutions = solutions
        self.known: dict[int, tuple[EpisodeSpec, int, bool]] = {}
        for iteration, groups in plan.items():
            for number, successes in enumerate(groups):
                for member, spec in enumerate(collector.episodes(iteration, number)):
                    for k in range(LIMIT // CHUNK):
                        self.known[decision_seed(spec, k)] = (spec, k, member < successes)

    def act(self, observations: Any, cot: CotMode, *, seeds: Any, drafts: Any = None) -> list[Decision]:
        return [self.decide(*self.known[seed]) for seed in seeds]

    def decide(self, spec: EpisodeSpec, k: int, solve: bool) -> Decision:
        actions_SD = np.zeros((CHUNK, 7), np.float32)
        own_SD = self.solutions[spec.init_state][k * CHUNK : (k + 1) * CHUNK] if solve else actions_SD
        actions_SD[: len(own_SD)] = own_SD
        return Decision(
            thought="",
            actions_SD=actions_SD,
            thought_ids=[k],
            thought_log_probs=[-1.0],
            action_bins_A=np.zeros(7, np.int64),
            action_log_probs_A=np.zeros(7, np.float32),
            pixels_NCHW=np.full((2, 3, 4, 4), k, np.uint8),
        )


def names(groups: list[Group]) -> list[list[EpisodeSpec]]:
    return [[trajectory.spec for trajectory in group.trajectories] for group in groups]


@pytest.mark.sim
@pytest.mark.slow
def test_groups_are_kept_by_outcome_and_what_is_left_over_opens_the_next_iteration(
    tmp_path: Path, pool: EnvPool, solutions: dict[int, np.ndarray]
) -> None:
    plan = {0: [1, 0, 1, 1], 1: [1], 2: [2, 1, 0, 1], 3: [0, 2]}
    with collecting(tmp_path, pool, LONG, keep_success=(0.1, 0.9)) as collector:
        policy, own = Scripted(collector, solutions, plan), collector.episodes
        zero = collector.collect(policy, 0, "weights 0")
        assert names(zero.groups) == [own(0, 0), own(0, 2)], "the group that failed throughout is left out"
        for group in zero.groups:
            assert [t.success for t in group.trajectories] == [True, False]
            solved, failed = group.trajectories
            assert solved.steps == len(solutions[group.task.init_state])
            assert solved.records[-1].executed == solved.steps - CHUNK * (len(solved.records) - 1)
            assert (failed.steps, len(failed.records)) == (LIMIT, LIMIT // CHUNK)
        assert (zero.rounds, zero.collected_groups, zero.kept_groups) == (2, 4, 3)
        assert (zero.episodes, zero.successes) == (8, 3)

        one = collector.collect(policy, 1, "weights 1")
        assert names(one.groups) == [own(0, 3), own(1, 0)], "the surplus is not lost"
        assert [group.iteration for group in one.groups] == [0, 1]
        assert (one.rounds, one.collected_groups, one.kept_groups, one.episodes) == (1, 1, 1, 2), "nor counted twice"

        two = collector.collect(policy, 2, "weights 2")
        assert names(two.groups) == [own(2, 1), own(2, 3)]
        assert not folder_of(tmp_path, 0).exists(), "folders before the previous iteration are removed"
        assert folder_of(tmp_path, 1).exists()
        assert names(collector.collect(Refusing(), 2, "weights 2 and an update").groups) == names(two.groups)
    with collecting(tmp_path, pool, LONG, keep_success=(0.1, 0.9), max_rounds=1) as collector:
        message = (
            "after 1 rounds 0 of 2 groups .* of 2 groups 1 failed in all episodes, 1 succeeded in all, 0 are mixed"
        )
        with pytest.raises(UserError, match=message):
            collector.collect(policy, 3, "weights 3")
