"""A small dataset of made-up expert episodes, and an annotator that knows their thoughts and makes mistakes."""

import json
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from corruptions import corrupt, tagged
from data.format_v2 import write_v2
from expert_like import GOALS, episode

from dtvla.cot.annotator import Annotator, Answer, Job
from dtvla.cot.engine import Labeller
from dtvla.cot.episodes import EpisodeView
from dtvla.cot.keyframes import KeyFrameSettings
from dtvla.cot.labels import LabelSettings
from dtvla.cot.schema import Schema, SchemaSettings
from dtvla.cot.temporal import Temporal, TemporalSettings
from dtvla.data.demonstrations import Demonstrations
from dtvla.data.recording import write_dataset
from dtvla.data.staging import CAMERA_KEYS, EpisodeSource, StagedEpisode

SIDE = 32
OTHERS = ("wine bottle", "wooden cabinet")
INSTRUCTION = "pick up the alphabet soup and place it in the basket"


def staged(number: int) -> StagedEpisode:
    """An episode that puts the soup into the basket; every picture can be told from the others."""
    rng = np.random.default_rng([5, number])
    thoughts, closing_F = episode(rng, [GOALS[0]])
    count = len(thoughts)
    action_F7 = rng.uniform(-1, 1, (count, 7)).astype(np.float32)
    action_F7[:, 6] = np.where(closing_F, 1, -1)
    pictures = {
        camera: np.stack([np.full((SIDE, SIDE, 3), [60 * c + 90, 40 * number, 2 * t], np.uint8) for t in range(count)])
        for c, camera in enumerate(CAMERA_KEYS)
    }
    source = EpisodeSource(number, "libero_object", 0, INSTRUCTION, number, 100 + number, count)
    state_F8 = rng.normal(size=(count, 8)).astype(np.float32)
    return StagedEpisode.encode(source, state_F8, action_F7, [thoughts[f] for f in range(count)], pictures)


def write(root: Path, version: str = "v3.0", episodes: int = 4, **options: Any) -> Path:
    """The dataset in either format."""
    content = [staged(number) for number in range(episodes)]
    if version == "v3.0":
        write_dataset(root, content, {"made": "for a test"})
        return root
    return write_v2(root, content, **options)


def labeller(decisions: dict[Any, Any] | None = None, **settings: Any) -> Labeller:
    checks = Schema(SchemaSettings()), Temporal(TemporalSettings())
    return Labeller(LabelSettings(**settings), KeyFrameSettings(), *checks, decisions or {})


@cache
def truth(root: Path, number: int) -> dict[int, str]:
    """The thoughts that a dataset has already, by frame."""
    data = Demonstrations(root)
    frames = range(int(data.starts_E[number]), int(data.stops_E[number]))
    return {place: data.thought(frame) or "" for place, frame in enumerate(frames)}


class Narrator(Annotator):
    """Repeats a dataset's own thoughts, a share of them corrupted at the first attempt.

    Args:
        wrong: share of the first answers.
        stubborn: share of frames whose every answer is no thought at all.
        delay_s: longest time of a call; its length is drawn anew each time.
        log: file that gets a line for every job, before it is answered.
        seed: of the mistakes.
    """

    def __init__(
        self,
        wrong: float = 0.0,
        stubborn: float = 0.0,
        *,
        calls: int = 1,
        jobs_per_call: int | None = 1,
        delay_s: float = 0.0,
        log: str | None = None,
        seed: int = 0,
    ) -> None:
        self.calls, self.jobs_per_call = calls, jobs_per_call
        self.identity = {"annotator": "narrator", "model": "m1", "prompt": None, "seed": seed}
        self.asked: list[tuple[int, Job]] = []
        self._shares, self._delay_s, self._log, self._seed = (wrong, stubborn), delay_s, log, seed
        self._clock = np.random.default_rng()
        self._wrong = cache(self._mistakes)

    def label(self, view: EpisodeView, jobs: Sequence[Job]) -> list[Answer]:
        self.asked += [(view.number, job) for job in jobs]
        if self._log:
            with Path(self._log).open("a") as file:
                file.write("".join(json.dumps([view.number, job.frame, job.attempt]) + "\n" for job in jobs))
        time.sleep(self._clock.uniform(0, self._delay_s))
        return [self._answer(view, job) for job in jobs]

    def _answer(self, view: EpisodeView, job: Job) -> Answer:
        answers, stubborn = self._wrong(view.root, view.number)
        if job.frame in stubborn:
            return Answer(f"no thought, {job.attempt}", {"cost": 0.1})
        text = answers[job.frame] if job.attempt == 0 else tagged(truth(view.root, view.number)[job.frame])
        return Answer(text, {"cost": 0.1, "cached": False})

    def _mistakes(self, root: Path, number: int) -> tuple[dict[int, str], set[int]]:
        rng = np.random.default_rng([self._seed, number])
        thoughts = truth(root, number)
        answers, _ = corrupt(thoughts, ("alphabet soup", "basket"), OTHERS, rng, self._shares[0])
        stubborn = rng.choice(len(thoughts), round(self._shares[1] * len(thoughts)), replace=False)
        return answers, set(stubborn.tolist())
