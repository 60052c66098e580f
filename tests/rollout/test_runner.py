"""Episodes on the real LIBERO: independent of workers and batching, complete, in order, never silently lost."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from omegaconf import OmegaConf

from dtvla.data.normalization import Statistics
from dtvla.errors import UserError
from dtvla.policy.cot import CotMode
from dtvla.policy.policy import Decision, build_policy
from dtvla.rollout.results import EpisodeResult
from dtvla.rollout.runner import _Queue, decision_seed, episode_specs, run_episodes
from dtvla.sim.film import HOLD_FRAMES
from dtvla.sim.pool import EnvPool, EpisodeSpec
from dtvla.sim.suites import get_task

CHUNK, LIMIT = 4, 10
STATES = [3, 30, 11, 0]
THINK = CotMode()


class SeenPolicy:
    """Acts and speaks by what it sees and by its seed, so that any mix-up of environments changes the episode."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def act(
        self, observations: list[dict[str, Any]], cot: Any, *, seeds: list[int], drafts: Any = None
    ) -> list[Decision]:
        assert drafts is None
        self.batches.append(len(observations))
        return [self.decide(observation, seed) for observation, seed in zip(observations, seeds, strict=True)]

    @staticmethod
    def decide(observation: dict[str, Any], seed: int) -> Decision:
        seen = int(observation["agentview"].sum()) + int(observation["wrist"].sum())
        rng = np.random.default_rng([seen, seed])
        actions_SD = rng.uniform(-0.6, 0.6, (CHUNK, 7)).astype(np.float32)
        return Decision(f"pixels {seen}, state {observation['state'].tolist()}", actions_SD, latency_s=0.01)


@pytest.fixture(scope="module")
def three() -> Iterator[EnvPool]:
    """The one pool of all tests: every environment costs seconds to make."""
    with EnvPool(3, image_size=48, render="draft", protocol="published") as pool:
        yield pool


@pytest.fixture
def one(three: EnvPool) -> Iterator[EnvPool]:
    with only(three, 1):
        yield three


@contextmanager
def only(pool: EnvPool, workers: int) -> Iterator[EnvPool]:
    """The pool as one of fewer workers."""
    pool.workers, all_of_them = workers, pool.workers
    yield pool
    pool.workers = all_of_them


def specs(record: int = 0) -> list[EpisodeSpec]:
    return episode_specs([get_task("libero_object", 0)], STATES, max_steps=LIMIT, record=record)


def outcome(result: EpisodeResult) -> EpisodeResult:
    return replace(result, latency=[], video=None)


@pytest.mark.slow
@pytest.mark.sim
def test_episodes_do_not_depend_on_workers_batches_or_filming(three: EnvPool, tmp_path: Path) -> None:
    finished: list[EpisodeResult] = []
    with only(three, 1) as one:
        alone = run_episodes(SeenPolicy(), specs(), one, THINK, on_result=finished.append)
    assert finished == alone, "every episode is reported once"
    with only(three, 2) as two:
        together = run_episodes(SeenPolicy(), specs(record=1), two, THINK, video_dir=tmp_path / "videos")
    single = SeenPolicy()
    unbatched = run_episodes(single, list(reversed(specs())), three, THINK, batch_size=1)
    assert [outcome(r) for r in together] == [outcome(r) for r in alone]
    assert [outcome(r) for r in reversed(unbatched)] == [outcome(r) for r in alone]
    assert set(single.batches) == {1}
    assert [r.init_state for r in alone] == STATES
    for result in alone:
        assert [thought.step for thought in result.thoughts] == [0, 4, 8], "chunks run open loop"
        assert result.steps == LIMIT
        assert not result.success
        assert len(result.latency) == 3
        assert result.instruction == "pick up the alphabet soup and place it in the basket"
    assert len({r.thoughts[0].text for r in alone}) == len(STATES), "init states differ"
    check_film(tmp_path, together)


@pytest.mark.sim
def test_the_policy_decides_for_one_group_while_another_one_is_simulated(three: EnvPool) -> None:
    class Watching(SeenPolicy):
        def act(self, observations: list[dict[str, Any]], cot: Any, **more: Any) -> list[Decision]:
            slow, *others = three._workers
            if len(self.batches) == 0:
                os.kill(slow.process.pid, signal.SIGSTOP)
            if len(self.batches) == 2:
                assert slow.overdue is not None, "two decisions while it is simulated"
                os.kill(slow.process.pid, signal.SIGCONT)
                for worker in (slow, *others):  # all that are simulated wait for the third decision to be made
                    assert worker.overdue is None or worker.pipe.poll(60)
            return super().act(observations, cot, **more)

    watching = Watching()
    assert [r.init_state for r in run_episodes(watching, specs(), three, THINK)] == STATES
    assert max(watching.batches) >= 2, "and it decides for several at once"


@pytest.mark.sim
def test_a_killed_worker_changes_no_episode(three: EnvPool) -> None:
    class Killing(SeenPolicy):
        def act(self, observations: list[dict[str, Any]], cot: Any, **more: Any) -> list[Decision]:
            if len(self.batches) == 3:
                os.kill(two.process_ids[0], signal.SIGKILL)
            return super().act(observations, cot, **more)

    finished: list[EpisodeResult] = []
    with only(three, 2) as two:
        undisturbed = run_episodes(SeenPolicy(), specs(), two, THINK)
        two.losses.clear()
        disturbed = run_episodes(Killing(), specs(), two, THINK, on_result=finished.append)
        assert len(two.losses) == 1
    assert [outcome(r) for r in disturbed] == [outcome(r) for r in undisturbed]
    assert sorted(r.init_state for r in finished) == sorted(STATES), "each is counted once"


def test_workers_keep_their_task_as_long_as_it_has_episodes() -> None:
    todo = [EpisodeSpec("libero_goal", task, state, 0) for task in range(6) for state in range(5)]
    queue = _Queue(todo)
    taken: dict[int, list[tuple[int, EpisodeSpec]]] = {0: [], 1: [], 2: []}
    turn = 0
    while (item := queue.next_for(turn % 3)) is not None:
        taken[turn % 3].append(item)
        turn += 1
    assert sorted(index for items in taken.values() for index, _ in items) == list(range(len(todo)))
    assert all(todo[index] == spec for items in taken.values() for index, spec in items)
    for items in taken.values():
        assert [spec.task_id for _, spec in items] == [items[0][1].task_id] * 5 + [items[5][1].task_id] * 5
    queue = _Queue(todo[:5])
    assert [queue.next_for(worker) for worker in (0, 1, 0, 1, 0, 1)] == [*enumerate(todo[:5]), None], "all help at last"


def check_film(folder: Path, results: list[EpisodeResult]) -> None:
    """The reset and every step are filmed, of the first episode only."""
    assert [r.video is None for r in results] == [False, True, True, True]
    with av.open(str(folder / str(results[0].video))) as container:
        frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
    assert len(frames) == 1 + LIMIT + HOLD_FRAMES
    assert np.abs(frames[0][:, :480] - frames[LIMIT][:, :480]).mean() > 0.5, "the picture moves"
    assert np.abs(frames[0][100:-70, -500:] - frames[1][100:-70, -500:]).mean() < 1.0, (
        "the first thought is there at once"
    )


@pytest.mark.sim
def test_each_episode_drafts_with_its_own_last_thought(three: EnvPool) -> None:
    """Also after a worker took over another episode; what the model wrote is counted."""

    class Drafting(SeenPolicy):
        def act(
            self, observations: list[dict[str, Any]], cot: Any, *, seeds: list[int], drafts: Any = None
        ) -> list[Decision]:
            assert len(drafts) == len(seeds)
            for seed, draft in zip(seeds, drafts, strict=True):
                assert draft == before.get(seed, [])
            choices = super().act(observations, cot, seeds=seeds)
            return [
                replace(c, thought_ids=[seed % 997, 8, 9], thought_forwards=2)
                for c, seed in zip(choices, seeds, strict=True)
            ]

    before = {
        decision_seed(spec, k + 1): [decision_seed(spec, k) % 997, 8, 9] for spec in specs() for k in range(LIMIT)
    }
    results = run_episodes(Drafting(), specs(), three, CotMode(speculate=True))
    thoughts = [thought for result in results for thought in result.thoughts]
    assert len(thoughts) == 12
    assert {(t.tokens, t.forwards) for t in thoughts} == {(3, 2)}


@pytest.mark.sim
def test_a_policy_that_speculates_lives_the_same_episode_in_fewer_forwards(one: EnvPool, repository: Path) -> None:
    """A nano policy with fresh weights, from pictures of the simulator to actions."""
    settings = OmegaConf.to_container(OmegaConf.load(repository / "conf" / "model" / "nano.yaml"))
    rng = np.random.default_rng(0)
    statistics = Statistics.from_frames(rng.normal(size=(50, 8)), rng.uniform(-1, 1, size=(50, 7)))
    policy = build_policy(settings | {"seed": 1, "lora": None}, ["move the hand above the soup"], statistics)
    spec = replace(specs()[0], max_steps=30)
    episodes = [
        run_episodes(policy, [spec], one, CotMode(max_tokens=24, temperature=0.2, speculate=speculate))[0]
        for speculate in (False, True)
    ]
    assert [[t.text for t in e.thoughts] for e in episodes[:1]] == [[t.text for t in e.thoughts] for e in episodes[1:]]
    assert [t.step for t in episodes[1].thoughts] == [0, 10, 20]
    plain, quick = ([thought.forwards for thought in episode.thoughts] for episode in episodes)
    assert plain == [thought.tokens for thought in episodes[0].thoughts]
    assert quick[0] == plain[0]
    assert sum(quick[1:]) < sum(plain[1:])


@pytest.mark.sim
def test_a_broken_episode_is_named_and_not_counted_as_failure(one: EnvPool) -> None:
    class Shapeless(SeenPolicy):
        def act(self, observations: list[dict[str, Any]], cot: Any, **more: Any) -> list[Decision]:
            return [replace(c, actions_SD=np.zeros((4, 3))) for c in super().act(observations, cot, **more)]

    finished: list[EpisodeResult] = []
    with pytest.raises(RuntimeError, match="libero_object task 0, init state 3"):
        run_episodes(Shapeless(), specs(), one, THINK, on_result=finished.append)
    assert not finished
    with pytest.raises(UserError, match="init state"):
        run_episodes(SeenPolicy(), [replace(specs()[0], init_state=99)], one, THINK)


def test_decision_seeds_are_pure_distinct_and_fit_a_generator() -> None:
    base = EpisodeSpec("libero_object", 1, 2, 3, None)
    others = [
        replace(base, suite="libero_goal"),
        replace(base, task_id=2),
        replace(base, init_state=1),
        replace(base, seed=4),
    ]
    seeds = [decision_seed(spec, k) for spec in (base, *others) for k in range(50)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert decision_seed(base, 7) == decision_seed(replace(base, record=True, max_steps=9), 7)


def test_specs_cover_every_task_and_state_and_film_as_asked() -> None:
    tasks = [get_task("libero_object", k) for k in (0, 4)]
    by_count = episode_specs(tasks, [7, 8, 9], seed=5, record=2)
    assert [(s.task_id, s.init_state, s.record) for s in by_count] == [
        (0, 7, True), (0, 8, True), (0, 9, False), (4, 7, True), (4, 8, True), (4, 9, False),
    ]  # fmt: skip
    assert {s.seed for s in by_count} == {5}
    assert [s.init_state for s in episode_specs(tasks[:1], [7, 8, 9], record=[9]) if s.record] == [9]
    several = episode_specs(tasks, [7, 8], seed=[5, 0], record=1)
    assert [(s.task_id, s.seed, s.init_state) for s in several if s.record] == [(0, 5, 7), (4, 5, 7)]
    assert len(set(several)) == 8
    assert {s.seed for s in several} == {5, 0}
