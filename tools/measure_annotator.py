"""How well a policy annotates episodes that it has not seen: the held-out ones of its training.

    dtvla annotate dataset=DATASET output=ANNOTATED annotator=policy annotator.checkpoint=POLICY ...
    python tools/measure_annotator.py ANNOTATED DATASET [--val-fraction 0.1] [--seed 0] [--output FILE]

Fraction and seed are those of the training, whose dataset has the same episodes. Prints, and writes to FILE, of the
held-out frames that the annotator was asked for, the share whose thought passed the checks at once and in the end, and
the share whose thought speaks of the same stage, or is the same, as that of DATASET.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from dtvla.cot.stages import stage_of
from dtvla.cot.writing import RECORD, TABLE
from dtvla.data.demonstrations import Demonstrations
from dtvla.data.lerobot import read_parquet
from dtvla.rollout.results import write_text


def measure(annotated: Path, truth: Path, val_fraction: float, seed: int) -> dict[str, Any]:
    """Shares of the held-out frames."""
    own, true = Demonstrations(annotated), Demonstrations(truth)
    table = read_parquet(annotated / TABLE, ["attempts", "origin"])
    attempts_F, origin_F = table["attempts"].to_numpy(), np.array(table["origin"].to_pylist())
    held_out_F = own.split(val_fraction, seed)[1]
    frames_F = held_out_F[attempts_F[held_out_F] > 0]
    if len(own) != len(true) or not len(frames_F):
        raise SystemExit(f"error: {len(own)} and {len(true)} frames, {len(frames_F)} of them held out and asked for")
    pairs = [(own.thought(frame) or "", true.thought(frame) or "") for frame in frames_F.tolist()]
    passed_F = origin_F[frames_F] == "annotated"
    shares = {
        "passed_at_once": passed_F & (attempts_F[frames_F] == 1),
        "passed": passed_F,
        "same_stage": [stage_of(ours) == stage_of(theirs) for ours, theirs in pairs],
        "same_thought": [ours == theirs for ours, theirs in pairs],
    }
    record = json.loads((annotated / RECORD).read_text())
    return {
        "episodes": len(np.unique(np.searchsorted(own.stops_E, frames_F, side="right"))),
        "frames": len(frames_F),
        **{name: round(float(np.mean(values)), 4) for name, values in shares.items()},
        "annotator": record["settings"]["annotator"],
        "versions": record["versions"],
    }


def main() -> None:
    """Measure as asked on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("annotated", type=Path)
    parser.add_argument("truth", type=Path)
    parser.add_argument("--val-fraction", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    text = json.dumps(measure(given.annotated, given.truth, given.val_fraction, given.seed), indent=1)
    print(text)
    if given.output:
        write_text(given.output, text + "\n")


if __name__ == "__main__":
    main()
