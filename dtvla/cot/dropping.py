"""Leaves episodes out of the metadata of a LeRobot v3.0 dataset and numbers the others anew."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dtvla.data.lerobot import Episode, read_lines, read_parquet
from dtvla.data.summaries import describe
from dtvla.errors import UserError


def check_dropping(info: Mapping[str, Any], drops: bool) -> None:
    """Refuse to leave episodes out of a format whose files are numbered by episode."""
    if drops and not str(info["codebase_version"]).startswith("v3."):
        raise UserError(
            f"on_failure: drop_episode needs LeRobot v3.0, the dataset is {info['codebase_version']}; "
            "use drop_thought, or convert it with lerobot's tools"
        )


def drop_from_metadata(
    root: Path, info: dict[str, Any], episodes: Sequence[Episode], left_out: set[int], frames: int
) -> dict[str, Any]:
    """Leave episodes out of everything but the tables of frames; pictures of theirs stay in the video files, unused.

    Args:
        root: the dataset, its tables of frames without these episodes already.
        info: its ``info.json``.
        episodes: all, as they were.
        left_out: numbers of those that go.
        frames: how many are left.

    Returns:
        The new ``info.json``.

    Raises:
        UserError: no episode would be left.
    """
    kept = [episode for episode in episodes if episode.number not in left_out]
    if not kept:
        raise UserError(
            "on_failure: every episode has a thought that fails, so drop_episode leaves none; use drop_thought"
        )
    places = {episode.number: place for place, episode in enumerate(kept)}
    starts = np.cumsum([0, *(episode.length for episode in kept)]).tolist()
    stats: list[dict[str, dict[str, Any]]] = []
    for path in episode_tables(root):
        table = read_parquet(path)
        rows = [_moved(row, places, starts) for row in table.to_pylist() if row["episode_index"] in places]
        stats += [_nested(row) for row in rows]
        if rows:
            pq.write_table(pa.Table.from_pylist(rows, table.schema), path)
        else:
            path.unlink()
    _summarise(root, stats)
    path = root / "meta/episodes_source.jsonl"
    if path.exists():
        lines = [line for place, line in enumerate(read_lines(path)) if episodes[place].number in places]
        path.write_text("".join(json.dumps({**line, "episode_index": i}) + "\n" for i, line in enumerate(lines)))
    return {**info, "total_episodes": len(kept), "total_frames": frames, "splits": {"train": f"0:{len(kept)}"}}


def episode_tables(root: Path) -> Iterator[Path]:
    """The files with the table of episodes."""
    yield from sorted((root / "meta/episodes").rglob("*.parquet"))


def write_json(path: Path, values: Any) -> None:
    """Write a readable JSON file."""
    path.write_text(json.dumps(values, indent=2) + "\n")


def _moved(row: dict[str, Any], places: Mapping[int, int], starts: Sequence[int]) -> dict[str, Any]:
    """A row of the episode table under its new number."""
    place = places[row["episode_index"]]
    shifts = {"episode_index": place - row["episode_index"], "index": starts[place] - row["dataset_from_index"]}
    new: dict[str, Any] = {
        "episode_index": place,
        "dataset_from_index": starts[place],
        "dataset_to_index": starts[place + 1],
    }
    for column, shift in shifts.items():
        for name in (name for name in row if name.startswith(f"stats/{column}/")):
            if name.rpartition("/")[2] not in ("std", "count"):
                new[name] = [value + shift for value in row[name]]
    return row | new


def _nested(row: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The statistics in a row of the episode table, by column and name."""
    nested: dict[str, dict[str, Any]] = {}
    for name, value in row.items():
        if name.startswith("stats/"):
            column, _, statistic = name.removeprefix("stats/").rpartition("/")
            nested.setdefault(column, {})[statistic] = np.array(value)
    return nested


def _summarise(root: Path, stats: list[dict[str, dict[str, Any]]]) -> None:
    """Statistics of the whole dataset from those of its episodes; exact ones where dtvla keeps its own."""
    if (path := root / "meta/stats.json").exists() and stats and stats[0]:
        from lerobot.datasets.compute_stats import aggregate_stats

        whole = aggregate_stats(stats)
        write_json(path, {name: {k: v.tolist() for k, v in whole[name].items()} for name in stats[0]})
    if (path := root / "meta/norm_stats.json").exists():
        tables = [read_parquet(p, ["observation.state", "action"]) for p in sorted((root / "data").rglob("*.parquet"))]
        table = pa.concat_tables(tables)
        columns = {"state": table["observation.state"], "action": table["action"]}
        write_json(path, {k: describe(np.array(v.to_pylist()), published=True) for k, v in columns.items()})
