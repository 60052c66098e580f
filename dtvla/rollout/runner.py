"""Episodes of a policy in a pool of simulators, batched over whichever environments wait for a decision.

A worker simulates one episode at a time and takes the next specification when it is done, one of the same task if it
can. The policy decides as soon as half of the running environments wait, so that two groups are in flight: one is
thought about while the other one is simulated. Results come back in the order of the specifications. What an episode
does depends on its specification only: sampling seeds are a function of (specification, decision index), and with
``batch_size=1`` the arithmetic of a decision does not even see who else was waiting.
"""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dtvla.rollout.results import EpisodeResult, Thought
from dtvla.sim.pool import EnvPool, EpisodeSpec, Reply
from dtvla.sim.suites import Task

if TYPE_CHECKING:
    from dtvla.policy.cot import CotMode
    from dtvla.policy.policy import Decision


class ActingPolicy(Protocol):
    """What the runner needs of a policy."""

    def act(
        self,
        observations: Sequence[Mapping[str, Any]],
        cot: "CotMode",
        *,
        seeds: Sequence[int],
        drafts: Sequence[Sequence[int]] | None = None,
    ) -> "list[Decision]":
        """Decide for a batch of observations; `seeds` has one seed for each, `drafts` the thought before, if any."""
        ...


class Recorder(Protocol):
    """Who keeps what a policy saw and decided, see :class:`dtvla.rollout.trajectories.TrajectoryWriter`."""

    def decided(self, spec: EpisodeSpec, step: int, decision: "Decision") -> None:
        """Take note of a decision of an episode, behind so many steps."""
        ...

    def finished(self, spec: EpisodeSpec, result: EpisodeResult) -> None:
        """Take note of an episode's end, before anybody else hears of it."""
        ...


@dataclass
class _Running:
    """An episode under way in one worker."""

    index: int
    spec: EpisodeSpec
    observation: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    thoughts: list[Thought] = field(default_factory=list)
    draft: list[int] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)


def episode_name(spec: EpisodeSpec) -> str:
    """Short unique name of an episode within an evaluation, usable as a file name."""
    sample = f"_sample{spec.sample}" if spec.sample else ""
    return f"{spec.suite}_task{spec.task_id:02d}_init{spec.init_state:02d}_seed{spec.seed}{sample}"


def episode_specs(
    tasks: Sequence[Task],
    init_states: Sequence[int],
    *,
    seed: int | Sequence[int] = 0,
    max_steps: int | None = None,
    record: int | Sequence[int] = 0,
) -> list[EpisodeSpec]:
    """One episode for every task, init state and seed, tasks outermost.

    Args:
        tasks: the tasks.
        init_states: indices of the benchmark's init states.
        seed: of every episode, or several.
        max_steps: step limit; None for the protocol's.
        record: how many episodes of each task to film, or the init states to film; with the first seed.
    """
    filmed = set(init_states[:record] if isinstance(record, int) else record)
    seeds = [seed] if isinstance(seed, int) else list(seed)
    return [
        EpisodeSpec(task.suite, task.task_id, state, number, max_steps, record=state in filmed and number == seeds[0])
        for task in tasks
        for number in seeds
        for state in init_states
    ]


def decision_seed(spec: EpisodeSpec, decision: int) -> int:
    """Sampling seed of one decision: a pure function of the episode and the decision's index, in [0, 2**63)."""
    text = f"{spec.suite}/{spec.task_id}/{spec.init_state}/{spec.seed}/{decision}"
    if spec.sample:
        text += f"/{spec.sample}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def run_episodes(
    policy: ActingPolicy,
    specs: Sequence[EpisodeSpec],
    pool: EnvPool,
    cot: "CotMode",
    *,
    batch_size: int | None = None,
    on_result: Callable[[EpisodeResult], None] | None = None,
    video_dir: Path | None = None,
    recorder: Recorder | None = None,
) -> list[EpisodeResult]:
    """Run one episode for every specification; every action of a chunk is executed open loop.

    Args:
        policy: decides.
        specs: the episodes.
        pool: simulators, idle; they are idle again afterwards.
        cot: what happens to the thought.
        batch_size: largest number of observations in one forward pass; None for as many as there are workers. With 1,
            greedy results are the same for any number of workers, to the last bit.
        on_result: called for every finished episode, in the order in which they finish.
        video_dir: folder for the films of specifications with ``record``, which the workers write while they simulate;
            None films nothing.
        recorder: is told of every decision and every end.

    Returns:
        Results in the order of `specs`.

    Raises:
        RuntimeError: an episode broke, or cost too many workers; the message names it. It is not counted as a failure
            of the policy. The pool has unfinished work then and has to be closed.
        UserError: a specification asks for what LIBERO does not have.
    """
    run = _Run(specs, pool, on_result, video_dir, recorder)
    limit = batch_size or pool.workers
    for worker in range(pool.workers):
        run.start_next(worker)
    decision_s = 0.0
    while run.running:
        run.gather(at_least=min(limit, -(-len(run.running) // 2)), patience_s=decision_s)
        workers = [run.waiting.popleft() for _ in range(min(limit, len(run.waiting)))]
        if workers:
            began = time.monotonic()
            run.decide(workers, policy, cot)
            decision_s = time.monotonic() - began
    return [run.results[index] for index in range(len(specs))]


class _Queue:
    """Specifications that nobody runs yet, handed out so that workers seldom change their task.

    A change of task costs 5 to 10 seconds: LIBERO compiles another scene.
    """

    def __init__(self, specs: Sequence[EpisodeSpec]) -> None:
        self.left: dict[tuple[Any, ...], deque[tuple[int, EpisodeSpec]]] = {}
        self.task_of: dict[int, tuple[Any, ...]] = {}
        for index, spec in enumerate(specs):
            self.left.setdefault((spec.suite, spec.task_id, spec.max_steps), deque()).append((index, spec))

    def next_for(self, worker: int) -> tuple[int, EpisodeSpec] | None:
        """The next of the worker's own task, else of the task with the most episodes left for each of its workers."""
        if not self.left:
            return None
        task = self.task_of.get(worker)
        if task not in self.left:
            on_task = list(self.task_of.values())
            task = max(self.left, key=lambda t: len(self.left[t]) / (1 + on_task.count(t)))
            self.task_of[worker] = task
        item = self.left[task].popleft()
        if not self.left[task]:
            del self.left[task]
        return item


class _Run:
    """The state of one call of :func:`run_episodes`."""

    def __init__(
        self,
        specs: Sequence[EpisodeSpec],
        pool: EnvPool,
        on_result: Callable[[EpisodeResult], None] | None,
        video_dir: Path | None,
        recorder: Recorder | None,
    ) -> None:
        self.pool = pool
        self.on_result = on_result
        self.video_dir = video_dir
        self.recorder = recorder
        self.queue = _Queue(specs)
        self.running: dict[int, _Running] = {}
        self.waiting: deque[int] = deque()
        self.results: dict[int, EpisodeResult] = {}

    def start_next(self, worker: int) -> None:
        """Give an idle worker the next episode, if there is one."""
        item = self.queue.next_for(worker)
        if item is not None:
            index, spec = item
            self.running[worker] = _Running(index, spec)
            film = self.video_dir / f"{episode_name(spec)}.mp4" if self.video_dir and spec.record else None
            self.pool.start(worker, spec, film)

    def gather(self, at_least: int, patience_s: float) -> None:
        """Wait until so many environments wait for a decision.

        Once there is one, wait for others no longer than a decision takes: then waiting never costs more than deciding
        for fewer would have (the break-even rule of the ski rental problem).
        """
        until: float | None = None
        while self.running:
            if until is None and self.waiting:
                until = time.monotonic() + patience_s
            enough = len(self.waiting) >= min(at_least, len(self.running))
            self.collect(timeout=None if until is None else 0.0 if enough else max(0.0, until - time.monotonic()))
            if enough or (until is not None and time.monotonic() >= until):
                return

    def collect(self, timeout: float | None) -> None:
        """Take the replies that are there: finished episodes leave, the others wait for a decision."""
        for worker, reply in self.pool.ready(timeout):
            episode = self.running[worker]
            episode.observation = reply.observation
            episode.step = int(reply.info["step"])
            if reply.over:
                del self.running[worker]
                self.start_next(worker)
                self._finish(episode, reply)
            else:
                self.waiting.append(worker)

    def decide(self, workers: Sequence[int], policy: ActingPolicy, cot: "CotMode") -> None:
        """Let the policy decide for these workers and send them their chunks."""
        episodes = [self.running[worker] for worker in workers]
        seeds = [decision_seed(e.spec, len(e.thoughts)) for e in episodes]
        drafts = [e.draft for e in episodes] if cot.speculate else None
        decisions = policy.act([e.observation for e in episodes], cot, seeds=seeds, drafts=drafts)
        for worker, episode, decision in zip(workers, episodes, decisions, strict=True):
            self.pool.act(worker, decision.actions_SD, decision.thought)
            if self.recorder is not None:
                self.recorder.decided(episode.spec, episode.step, decision)
            ids, forwards = decision.thought_ids, decision.thought_forwards
            written = len(ids) if forwards else 0
            gripper = "".join("c" if told > 0 else "o" for told in decision.actions_SD[:, -1])
            thought = Thought(episode.step, decision.thought, decision.truncated, written, forwards, gripper)
            episode.thoughts.append(thought)
            episode.draft = ids
            episode.latency.append(float(decision.latency_s))

    def _finish(self, episode: _Running, reply: Reply) -> None:
        spec = episode.spec
        result = EpisodeResult(
            suite=spec.suite,
            task_id=spec.task_id,
            instruction=str(episode.observation["instruction"]),
            init_state=spec.init_state,
            seed=spec.seed,
            success=bool(reply.info["success"]),
            steps=episode.step,
            thoughts=episode.thoughts,
            latency=episode.latency,
            video=f"{reply.film.parent.name}/{reply.film.name}" if reply.film else None,
        )
        self.results[episode.index] = result
        if self.recorder is not None:
            self.recorder.finished(spec, result)
        if self.on_result is not None:
            self.on_result(result)
