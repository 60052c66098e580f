"""How many corrupted thoughts the checks catch, and how many good ones they blame, on annotated datasets.

    python tools/measure_checks.py DATASET DATASET... [--share 0.2] [--repeats 5] [--seed 0] [--output FILE]

In each episode a share of the thoughts is corrupted in one of five ways (tests/cot/corruptions.py): objects of another
of the tasks, the thought of another stage, cut off, two blocks, nothing. The checks then judge all of them once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from dtvla.cot.episodes import AnnotatedFrames
from dtvla.cot.objects import task_objects
from dtvla.cot.schema import Schema, SchemaSettings
from dtvla.cot.temporal import Temporal, TemporalSettings
from dtvla.data.demonstrations import Demonstrations
from dtvla.rollout.results import versions, write_text

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/cot"))
from corruptions import NAMES, corrupt

UNTOUCHED = "untouched"


def measure(
    root: Path, others: list[tuple[str, ...]], share: float, repeats: int, seed: int
) -> Counter[tuple[str, bool]]:
    """Frames of a dataset by how they were corrupted and whether they were blamed."""
    frames, data = AnnotatedFrames(root), Demonstrations(root)
    schema, temporal = Schema(SchemaSettings()), Temporal(TemporalSettings())
    counts: Counter[tuple[str, bool]] = Counter()
    for number in np.repeat(np.arange(len(frames)), repeats).tolist():
        rng = np.random.default_rng([seed, number, sum(counts.values())])
        view, start = frames[number], int(data.starts_E[number])
        thoughts = {frame: data.thought(start + frame) or "" for frame in range(len(view))}
        objects = task_objects(view)
        foreign = [names for names in others if not set(names) & set(objects)]
        answers, how = corrupt(thoughts, objects, foreign[int(rng.integers(len(foreign)))], rng, share)
        read = {frame: schema.read(answer, objects) for frame, answer in answers.items()}
        blamed = {frame for frame, (_, found) in read.items() if found}
        blamed |= set(temporal.check({f: text for f, (text, found) in read.items() if not found}, view.closing_F))
        counts.update((how.get(frame, UNTOUCHED), frame in blamed) for frame in thoughts)
    return counts


def shares(counts: Counter[tuple[str, bool]]) -> dict[str, Any]:
    """Of every kind of frame how many there are, and which share of them was blamed."""
    kinds = {name: [name] for name in (*NAMES, UNTOUCHED)} | {"all corrupted": list(NAMES)}
    totals = {name: [sum(counts[n, blamed] for n in own) for blamed in (False, True)] for name, own in kinds.items()}
    return {name: {"frames": sum(pair), "blamed": round(pair[1] / sum(pair), 5)} for name, pair in totals.items()}


def main() -> None:
    """Measure as asked on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", type=Path, nargs="+")
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    objects = {root: task_objects(AnnotatedFrames(root)[0]) for root in given.datasets}
    found = {
        root.name: measure(root, list(objects.values()), given.share, given.repeats, given.seed) for root in objects
    }
    result = {name: shares(counts) for name, counts in found.items()} | {
        "together": shares(sum(found.values(), Counter()))
    }
    text = json.dumps({"share": given.share, "seed": given.seed, **result, "versions": versions()}, indent=1)
    print(text)
    if given.output:
        write_text(given.output, text + "\n")


if __name__ == "__main__":
    main()
