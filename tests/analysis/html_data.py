"""Evaluations and a training run, made up at random, in the files that the commands write; and a page, taken apart."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from dtvla.analysis.exhibits import make_exhibits
from dtvla.analysis.html import html_page
from dtvla.analysis.sections import make_contents
from dtvla.analysis.sources import Sources
from dtvla.rollout.results import EpisodeResult, Results, Thought, write_results
from dtvla.sim.film import Caption, Film

CHUNK = 5
STEPS = 20
CAMERAS_HW = (48, 96)


def write_evaluation(
    folder: Path,
    mode: str,
    rate: float,
    *,
    seed: int = 0,
    tasks: int = 2,
    states: Sequence[int] = range(10),
    filmed: Sequence[int] = (),
    words: str = "move",
    suite: str = "libero_goal",
    **settings: Any,
) -> Results:
    """Episodes of 20 steps with a decision every 5, each solved with probability `rate`; init states are filmed."""
    rng = np.random.default_rng(seed)
    episodes = []
    for task in range(tasks):
        for state in states:
            texts = [f"{words} {k // 2}" if mode == "think" else "" for k in range(STEPS // CHUNK)]
            thoughts = [
                Thought(CHUNK * k, text, tokens=int(rng.integers(1, 60)) if text else 0, forwards=1 if text else 0)
                for k, text in enumerate(texts)
            ]
            video = f"videos/{task}_{state}.mp4" if state in filmed else None
            solved = bool(rng.random() < rate)
            latency = rng.uniform(0.01, 0.2, len(thoughts)).tolist()
            instruction = f"task number {task}"
            episodes.append(
                EpisodeResult(suite, task, instruction, int(state), 0, solved, STEPS, thoughts, latency, video)
            )
            if video:
                write_film(folder / video, rng)
    known = {"checkpoint_sha256": "ab" * 32, "suite": suite, "init_states": [int(s) for s in states], "render": "draft"}
    provenance = {"command": f"python -m dtvla.evaluate cot={mode}", "versions": {"mujoco": "3.3.2"}, "device": "cpu"}
    results = Results({**known, "cot": {"mode": mode}, **settings}, provenance, episodes)
    write_results(results, folder)
    return results


def write_film(path: Path, rng: np.random.Generator) -> None:
    """A film of 21 frames that get brighter from step to step, as a policy's."""
    film = Film(path)
    noise_HWC = rng.integers(0, 40, (*CAMERAS_HW, 3), dtype=np.uint8)
    for step in range(STEPS + 1):
        film.add(noise_HWC + np.uint8(10 * step), Caption("task", "thought", step))
    film.finish()


def write_training(folder: Path) -> None:
    """A training run with curves that were trained on init states 5 to 7."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "train/loss", "val/loss", "train/action_accuracy"])
        for step in range(1, 900):
            writer.writerow([step, 3 / step + rng.random(), 4 / step if step % 100 == 0 else "", "nan"])
    data = folder.parent / "data" / "meta"
    data.mkdir(parents=True)
    request = {"suite": "libero_goal", "task_ids": [1], "init_states": [5, 6, 7, 40]}
    (data / "collection.json").write_text(json.dumps({"request": request, "episodes": 4}))
    (folder / "config.yaml").write_text(f"data:\n  root: {data.parent}\n")
    (folder / "result.json").write_text(json.dumps({"steps": 899, "seconds": 372.0, "command": "dtvla train"}))


def render(sources: Sources, title: str, episodes: int, films_mb: float) -> str:
    """The page with up to so many single episodes, and megabytes of their films."""
    exhibits = make_exhibits(sources.arms, episodes, round(films_mb * 1e6))
    return html_page(make_contents(sources, title), exhibits)


def config(root: Path, *folders: Path, **changes: object) -> DictConfig:
    """The settings of conf/report.yaml."""
    settings = {
        "folders": [str(folder) for folder in folders],
        "dataset": None,
        "output": None,
        "title": None,
        "episodes": 4,
        "films_mb": 8,
    }
    return OmegaConf.create({**settings, **changes, "paths": {"root": str(root)}})


@dataclass
class Page(HTMLParser):
    """What a page holds: tables by the id of their section, addresses, and the text that is read."""

    text_in: str
    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    addresses: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    sections: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._silent = self._cell = False
        self.feed(self.text_in)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        self.tags.append(tag)
        self.addresses += [str(known[name]) for name in ("src", "href", "poster", "action", "data") if name in known]
        if tag == "section":
            self.sections.append(str(known.get("id")))
        elif tag in ("style", "script"):
            self._silent = True
        elif tag == "tr":
            self.tables.setdefault(self.sections[-1], []).append([])
        elif tag in ("td", "th"):
            self.tables[self.sections[-1]][-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("style", "script"):
            self._silent = False
        elif tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        if self._silent:
            return
        self.words.append(data)
        if self._cell:
            self.tables[self.sections[-1]][-1][-1] += data

    @property
    def text(self) -> str:
        """All that is read, with single spaces."""
        return " ".join(" ".join(self.words).split())
