"""What the runner writes down of a decision, with simulators that only count steps."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dtvla.policy.cot import CotMode
from dtvla.policy.policy import Decision
from dtvla.rollout.results import Results, read_results, write_results
from dtvla.rollout.runner import run_episodes
from dtvla.sim.pool import EpisodeSpec, Reply

STEPS = 4


class CountingPool:
    """One worker whose episodes last three chunks."""

    workers = 1

    def __init__(self) -> None:
        self.replies: list[tuple[int, Reply]] = []
        self.step = 0

    def start(self, worker: int, spec: EpisodeSpec, film: Path | None) -> None:
        self.step = -STEPS
        self.act(worker, np.zeros((STEPS, 7)), "")

    def act(self, worker: int, actions_SD: np.ndarray, thought: str) -> None:
        self.step += len(actions_SD)
        over = self.step == 3 * STEPS
        info = {"step": self.step, "success": over}
        self.replies.append((worker, Reply({"instruction": "put"}, terminated=over, info=info)))

    def ready(self, timeout: float | None) -> Iterator[tuple[int, Reply]]:
        replies, self.replies = self.replies, []
        yield from replies


class RandomPolicy:
    """Draws its actions, and remembers them."""

    def __init__(self) -> None:
        self.rng, self.told = np.random.default_rng(0), []  # type: ignore[var-annotated]

    def act(self, observations: Any, cot: Any, *, seeds: Any, drafts: Any = None) -> list[Decision]:
        actions_SD = self.rng.uniform(-1, 1, (STEPS, 7)).astype(np.float32)
        self.told.append(actions_SD[:, 6].tolist())
        return [Decision("a thought", actions_SD)]


def test_the_grippers_commands_are_recorded_and_read_again(tmp_path: Path) -> None:
    policy, specs = RandomPolicy(), [EpisodeSpec("libero_goal", 0, state, 0) for state in range(3)]
    episodes = run_episodes(policy, specs, CountingPool(), CotMode())  # type: ignore[arg-type]
    write_results(Results({}, {}, episodes), tmp_path)
    found = [t.gripper for e in read_results(tmp_path).episodes for t in e.thoughts]
    letters = {True: "c", False: "o"}
    assert found == ["".join(letters[number > 0] for number in numbers) for numbers in policy.told]
    assert len(found) == 9
    assert len(set(found)) > 3
