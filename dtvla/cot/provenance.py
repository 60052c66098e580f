"""Where every thought of an annotated dataset comes from, and what the annotation came to, as tables and numbers."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from dtvla.cot.labels import ORIGINS, REVIEWED, Label
from dtvla.cot.schema import Violation
from dtvla.cot.writing import RECORD, TABLE
from dtvla.data.lerobot import read_json, read_parquet

if TYPE_CHECKING:
    from dtvla.cot.engine import EpisodeLabels
    from dtvla.cot.review.decisions import Decision

FORMAT, FORMAT_VERSION = "dtvla.annotation", 1
WRITERS = ("annotator", "model", "prompt")
PACKAGES = ("dtvla", "numpy", "pyarrow")
SCHEMA = pa.schema(
    [("episode", pa.int64()), ("frame", pa.int64()), ("origin", pa.string()), ("written_for", pa.int64())]
    + [(name, pa.string()) for name in (*WRITERS, "reviewer")]
    + [("attempts", pa.int64()), ("failed_checks", pa.list_(pa.string()))]
)

Writer = Mapping[str, Any]


def write_provenance(
    path: Path,
    episodes: Sequence[EpisodeLabels],
    writer: Writer,
    decisions: Mapping[tuple[int, int], Decision],
    before: Mapping[tuple[int, int], Writer],
) -> None:
    """Write a row for every frame of the new dataset: origin, writer, reviewer, attempts, checks that refused answers.

    Args:
        path: parquet file; its folder must exist.
        episodes: those that stay, in order; their place is their new number.
        writer: identity of the annotator; its values that are no text are stored as JSON.
        decisions: of reviewers, by episode and frame of the source.
        before: who wrote the source's thoughts, by episode and frame.
    """
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for number, episode in enumerate(episodes):
        for frame, label in enumerate(episode.labels):
            key = (episode.number, -1 if label.written_for is None else label.written_for)
            reviewed = label.written_for is not None and episode.labels[label.written_for].origin == REVIEWED
            who = before.get(key, {}) if reviewed else writer if label.thought else {}
            row = {"episode": number, "frame": frame, "origin": label.origin, "written_for": label.written_for}
            row |= {name: _text(who.get(name)) for name in WRITERS}
            row |= {"reviewer": decisions[key].reviewer if reviewed else None, "attempts": label.attempts}
            row |= {"failed_checks": _names(found for refused in label.refused for found in refused)}
            for name, value in row.items():
                columns[name].append(value)
    pq.write_table(pa.table(columns, SCHEMA), path)


def writers(root: Path) -> dict[tuple[int, int], Writer]:
    """Who wrote the thoughts of an annotated dataset, by episode and frame; empty for any other dataset."""
    path = root / TABLE
    if not path.exists():
        return {}
    rows = read_parquet(path, ["episode", "frame", *WRITERS]).to_pylist()
    return {(row["episode"], row["frame"]): {name: row[name] for name in WRITERS} for row in rows}


def annotation_record(episodes: Sequence[EpisodeLabels], totals: Mapping[str, float], **facts: Any) -> dict[str, Any]:
    """What is stored as ``meta/annotation.json``: nothing in it depends on when or how often the command ran.

    Args:
        episodes: all of the dataset.
        totals: sums over the answers.
        facts: anything else: command, dataset, settings.
    """
    labels = [label for episode in episodes for label in episode.labels]
    asked = [label for label in labels if label.attempts]
    origins = Counter(label.origin for label in labels)
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **facts,
        "versions": {"python": sys.version.split()[0], **{package: version(package) for package in PACKAGES}},
        "episodes": len(episodes),
        "frames": len(labels),
        "origins": {origin: origins[origin] for origin in ORIGINS},
        "key_frames": dict(sorted(Counter(r for episode in episodes for r in episode.reasons.values()).items())),
        "asked": len(asked),
        "passed_at_once": sum(not label.refused for label in asked),
        "passed_later": sum(bool(label.refused) and not label.failed for label in asked),
        "failed": sum(label.failed for label in asked),
        "checks": _by_check(asked, episodes),
        "totals": dict(totals),
    }


def earlier_record(root: Path) -> dict[str, Any] | None:
    """What an annotated dataset says about its annotation; None for any other dataset."""
    path = root / RECORD
    return read_json(path) if path.exists() else None


def file_digest(path: Path) -> str:
    """sha256 of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _by_check(asked: Sequence[Label], episodes: Sequence[EpisodeLabels]) -> dict[str, Any]:
    """By check: frames whose first answer it refused, whose last one it refused, and what it finds in the result."""
    first = Counter(n for label in asked if label.refused for n in _names(label.refused[0]))
    last = Counter(n for label in asked if label.failed for n in _names(label.refused[-1]))
    remaining = Counter(n for episode in episodes for found in episode.remaining.values() for n in _names(found))
    share = {name: round(count / len(asked), 6) for name, count in first.items()}
    return {
        name: {"first": first[name], "first_rate": share.get(name, 0.0), "last": last[name], "result": remaining[name]}
        for name in sorted({*first, *last, *remaining})
    }


def _names(violations: Iterable[Violation]) -> list[str]:
    return list(dict.fromkeys(violation.check for violation in violations))


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, sort_keys=True)
