"""How many thoughts of a policy pass the checks, on the held-out episodes of its training.

    python tools/measure_annotator.py DATASET POLICY [--val-fraction 0.1] [--seed 0] [--relabels 2] [--output FILE]

DATASET has all frames; fraction and seed are those of the training, whose dataset has the same episodes. Prints, and
writes to FILE, the share of frames that passed at the first attempt and after all, failures by check, and the share of
frames whose thought speaks of the same stage, or is the same, as the dataset's own, if it has thoughts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np

from dtvla.cot.annotator import Annotator, Job
from dtvla.cot.episodes import AnnotatedFrames, EpisodeView
from dtvla.cot.labels import Checks, Label, decide
from dtvla.cot.objects import task_objects
from dtvla.cot.policy_annotator import PolicyAnnotator
from dtvla.cot.schema import Schema, SchemaSettings
from dtvla.cot.stages import DEFAULT_LEXICON, stage_of
from dtvla.cot.temporal import Temporal, TemporalSettings
from dtvla.data.demonstrations import Demonstrations
from dtvla.rollout.results import versions, write_text


def label(view: EpisodeView, annotator: Annotator, relabels: int) -> dict[int, Label]:
    """Labels of all frames of an episode, as `dtvla annotate` decides on them."""
    schema, temporal = Schema(SchemaSettings()), Temporal(TemporalSettings())
    objects, answers = task_objects(view), dict[Job, str]()
    checks = Checks(lambda answer: schema.read(answer, objects), lambda texts: temporal.check(texts, view.closing_F))
    while True:
        verdict = decide(range(len(view)), {}, answers, checks, relabels)
        if not verdict.jobs:
            return verdict.labels
        for jobs in batched(verdict.jobs, annotator.jobs_per_call or len(verdict.jobs)):
            answers |= {job: answer.text for job, answer in zip(jobs, annotator.label(view, jobs), strict=True)}


def measure(dataset: AnnotatedFrames, annotator: Annotator, episodes: list[int], relabels: int) -> dict[str, Any]:
    """Shares over all frames of some episodes."""
    has_thoughts = "reasoning" in dataset.demonstrations._folders[0].info["features"]
    truth = Demonstrations(dataset.root) if has_thoughts else None
    first, passed, same_stage, same, failures = [], [], [], [], Counter[str]()
    started = time.perf_counter()
    for number in episodes:
        labels = label(dataset[number], annotator, relabels)
        for frame, found in labels.items():
            first.append(not found.refused)
            passed.append(not found.failed)
            failures.update({violation.check for violation in (found.refused or [()])[0]})
            if truth:
                own = truth.thought(int(truth.starts_E[number]) + frame) or ""
                same.append(own == found.thought)
                same_stage.append(stage_of(own, DEFAULT_LEXICON) == stage_of(found.thought, DEFAULT_LEXICON))
        print(f"episode {number}: {np.mean(passed[-len(labels) :]):.1%} of {len(labels)} frames pass", flush=True)
    shares = {"passed_first": first, "passed": passed, "same_stage": same_stage, "same_thought": same}
    return {
        "episodes": episodes,
        "frames": len(first),
        **{name: round(float(np.mean(values)), 4) for name, values in shares.items() if values},
        "first_failures_by_check": dict(failures.most_common()),
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    """Measure as asked on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("policy")
    parser.add_argument("--val-fraction", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--relabels", type=int, default=2)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    dataset, annotator = AnnotatedFrames(given.dataset), PolicyAnnotator(checkpoint=given.policy)
    held_out_F = dataset.demonstrations.split(given.val_fraction, given.seed)[1]
    episodes = np.unique(np.searchsorted(dataset.demonstrations.stops_E, held_out_F, side="right")).tolist()
    result = measure(dataset, annotator, episodes, given.relabels)
    text = json.dumps({**result, "annotator": annotator.identity, "versions": versions()}, indent=1)
    print(text)
    if given.output:
        write_text(given.output, text + "\n")


if __name__ == "__main__":
    main()
