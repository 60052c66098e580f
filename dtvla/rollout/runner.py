"""Episodes of a policy in a pool of simulators, batched over whichever environments wait for a decision.

A worker simulates one episode at a time and takes the next specification when it is done, so the batch never waits for
the slowest episode. Results come back in the order of the specifications. What an episode does depends on its
specification only: sampling seeds are a function of (specification, decision index), and with ``batch_size=1`` the
arithmetic of a decision does not even see who else was waiting.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dtvla.rollout.results import EpisodeResult, Thought
from dtvla.rollout.video import Caption, write_video
from dtvla.sim.pool import EnvPool, EpisodeSpec, Reply
from dtvla.sim.suites import Task

if TYPE_CHECKING:
    from dtvla.policy.cot import CotMode
    from dtvla.policy.policy import Decision

STRAGGLER_SECONDS = 0.004  # wait this long for more environments once one is ready


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
    frames: list[np.ndarray] = field(default_factory=list)
    captions: list[Caption] = field(default_factory=list)


def episode_name(spec: EpisodeSpec) -> str:
    """Short unique name of an episode within an evaluation, usable as a file name."""
    return f"{spec.suite}_task{spec.task_id:02d}_init{spec.init_state:02d}_seed{spec.seed}"


def episode_specs(
    tasks: Sequence[Task],
    init_states: Sequence[int],
    *,
    seed: int = 0,
    max_steps: int | None = None,
    record: int | Sequence[int] = 0,
) -> list[EpisodeSpec]:
    """One episode for every task and init state, tasks outermost.

    Args:
        tasks: the tasks.
        init_states: indices of the benchmark's init states.
        seed: seed of every episode.
        max_steps: step limit; None for the protocol's.
        record: how many episodes of each task to film, or the init states to film.
    """
    filmed = set(init_states[:record] if isinstance(record, int) else record)
    return [
        EpisodeSpec(task.suite, task.task_id, init_state, seed, max_steps, record=init_state in filmed)
        for task in tasks
        for init_state in init_states
    ]


def decision_seed(spec: EpisodeSpec, decision: int) -> int:
    """Sampling seed of one decision: a pure function of the episode and the decision's index, in [0, 2**63)."""
    text = f"{spec.suite}/{spec.task_id}/{spec.init_state}/{spec.seed}/{decision}"
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
        video_dir: folder for the films of specifications with ``record``; None films nothing.

    Returns:
        Results in the order of `specs`.

    Raises:
        RuntimeError: an episode broke; the message names it. It is not counted as a failure of the policy. The pool
            has unfinished work then and has to be closed.
        UserError: a specification asks for what LIBERO does not have.
    """
    run = _Run(specs, pool, on_result, video_dir)
    limit = batch_size or pool.workers
    with run.films:
        for worker in range(pool.workers):
            run.start_next(worker)
        while run.running:
            run.collect(timeout=None if not run.waiting else 0.0)
            if len(run.waiting) < min(limit, len(run.running)):
                run.collect(timeout=STRAGGLER_SECONDS)
            workers = [run.waiting.popleft() for _ in range(min(limit, len(run.waiting)))]
            if workers:
                run.decide(workers, policy, cot)
        for film in run.encoding:
            film.result()
    return [run.results[index] for index in range(len(specs))]


class _Run:
    """The state of one call of :func:`run_episodes`."""

    def __init__(
        self,
        specs: Sequence[EpisodeSpec],
        pool: EnvPool,
        on_result: Callable[[EpisodeResult], None] | None,
        video_dir: Path | None,
    ) -> None:
        self.pool = pool
        self.on_result = on_result
        self.video_dir = video_dir
        self.queue = deque(enumerate(specs))
        self.running: dict[int, _Running] = {}
        self.waiting: deque[int] = deque()
        self.results: dict[int, EpisodeResult] = {}
        self.films = ThreadPoolExecutor(max_workers=1)  # encoding releases the GIL: simulators do not wait for films
        self.encoding: list[Future[Path]] = []

    def start_next(self, worker: int) -> None:
        """Give an idle worker the next episode, if there is one."""
        if self.queue:
            index, spec = self.queue.popleft()
            self.running[worker] = _Running(index, spec)
            self.pool.start(worker, spec)

    def collect(self, timeout: float | None) -> None:
        """Take the replies that are there: finished episodes leave, the others wait for a decision."""
        for worker, reply in self.pool.ready(timeout):
            episode = self.running[worker]
            self._take(episode, reply)
            if reply.over:
                del self.running[worker]
                self.start_next(worker)
                self._finish(episode, success=bool(reply.info["success"]))
            else:
                self.waiting.append(worker)

    def decide(self, workers: Sequence[int], policy: ActingPolicy, cot: "CotMode") -> None:
        """Let the policy decide for these workers and send them their chunks."""
        episodes = [self.running[worker] for worker in workers]
        seeds = [decision_seed(e.spec, len(e.thoughts)) for e in episodes]
        drafts = [e.draft for e in episodes] if cot.speculate else None
        decisions = policy.act([e.observation for e in episodes], cot, seeds=seeds, drafts=drafts)
        for worker, episode, decision in zip(workers, episodes, decisions, strict=True):
            self.pool.act(worker, decision.actions_SD)
            ids, forwards = decision.thought_ids, decision.thought_forwards
            written = len(ids) if forwards else 0
            episode.thoughts.append(Thought(episode.step, decision.thought, decision.truncated, written, forwards))
            episode.draft = ids
            episode.latency.append(float(decision.latency_s))

    def _take(self, episode: _Running, reply: Reply) -> None:
        episode.observation = reply.observation
        thought = episode.thoughts[-1].text if episode.thoughts else ""
        instruction = str(reply.observation["instruction"])
        for offset, frame_HWC in enumerate(reply.frames):
            step = episode.step + offset + 1 if episode.thoughts else 0
            episode.frames.append(frame_HWC)
            episode.captions.append(Caption(instruction, thought, step))
        episode.step = int(reply.info["step"])

    def _finish(self, episode: _Running, success: bool) -> None:
        spec = episode.spec
        video: str | None = None
        if spec.record and episode.frames and self.video_dir is not None:
            path = self.video_dir / f"{episode_name(spec)}.mp4"
            video = f"{self.video_dir.name}/{path.name}"
            captions = self._captions(episode, success)
            self.encoding.append(self.films.submit(write_video, path, episode.frames, captions))
        result = EpisodeResult(
            suite=spec.suite,
            task_id=spec.task_id,
            instruction=str(episode.observation["instruction"]),
            init_state=spec.init_state,
            seed=spec.seed,
            success=success,
            steps=episode.step,
            thoughts=episode.thoughts,
            latency=episode.latency,
            video=video,
        )
        self.results[episode.index] = result
        if self.on_result is not None:
            self.on_result(result)

    @staticmethod
    def _captions(episode: _Running, success: bool) -> list[Caption]:
        """The reset frame already shows the first thought; the last frame shows the outcome."""
        first = episode.thoughts[0].text if episode.thoughts else ""
        captions = [c if c.step else Caption(c.instruction, first, 0) for c in episode.captions]
        last = captions[-1]
        return [*captions[:-1], Caption(last.instruction, last.thought, last.step, success)]
