"""What the runner writes down of a decision, with simulators that only count steps."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dtvla.policy.cot import CotMode
from dtvla.policy.policy import Decision
from dtvla.rollout.results import Results, read_results, write_results
from dtvla.rollout.runner import run_episodes
from dtvla.sim.motion import CLOSE, OPEN
from dtvla.sim.pool import EpisodeSpec, Reply

CHUNKS = {"oooo": [OPEN] * 4, "oocc": [OPEN, OPEN / 9, CLOSE / 9, CLOSE], "cccc": [CLOSE] * 4}
STEPS = 4


class CountingPool:
    """One worker whose episodes last as many chunks as there are."""

    workers = 1

    def __init__(self) -> None:
        self.replies: list[tuple[int, Reply]] = []
        self.step = 0

    def start(self, worker: int, spec: EpisodeSpec, film: Path | None) -> None:
        self.step = -STEPS
        self.act(worker, np.zeros((STEPS, 7)), "")

    def act(self, worker: int, actions_SD: np.ndarray, thought: str) -> None:
        self.step += len(actions_SD)
        over = self.step == STEPS * len(CHUNKS)
        info = {"step": self.step, "success": over}
        self.replies.append((worker, Reply({"instruction": "put"}, terminated=over, info=info)))

    def ready(self, timeout: float | None) -> Iterator[tuple[int, Reply]]:
        replies, self.replies = self.replies, []
        yield from replies


class GraspingPolicy:
    """Plays the chunks in turn."""

    decisions = 0

    def act(self, observations: Any, cot: Any, *, seeds: Any, drafts: Any = None) -> list[Decision]:
        actions_SD = np.full((STEPS, 7), CLOSE, dtype=np.float32)
        actions_SD[:, 6] = list(CHUNKS.values())[self.decisions % len(CHUNKS)]
        self.decisions += 1
        return [Decision("a thought", actions_SD)]


def test_the_grippers_commands_are_recorded_and_read_again(tmp_path: Path) -> None:
    specs = [EpisodeSpec("libero_goal", 0, state, 0) for state in range(2)]
    episodes = run_episodes(GraspingPolicy(), specs, CountingPool(), CotMode())  # type: ignore[arg-type]
    write_results(Results({}, {}, episodes), tmp_path)
    assert [[t.gripper for t in e.thoughts] for e in read_results(tmp_path).episodes] == [list(CHUNKS)] * 2
