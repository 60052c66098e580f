"""LeRobot v3.0: many episodes a file, metadata as parquet tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtvla.data.lerobot import Contents, Episode, read_parquet, video_keys
from dtvla.errors import UserError

EPISODES, TASKS = "meta/episodes", "meta/tasks.parquet"


def read(root: Path, info: Mapping[str, Any]) -> Contents:
    """Read the metadata; :class:`UserError` when a table is absent or damaged."""
    files = sorted((root / EPISODES).rglob("*.parquet"))
    if not files:
        raise UserError(f"{root / EPISODES}: no episode table; copy or collect the dataset again")
    rows: list[dict[str, Any]] = []
    for path in files:
        table = read_parquet(path)
        rows += table.select([name for name in table.column_names if not name.startswith("stats/")]).to_pylist()
    try:
        episodes = [_episode(root, info, row) for row in rows]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{root / EPISODES}: a row or a path template is damaged ({error!r}); copy or collect the dataset again"
        ) from None
    return Contents(sorted(episodes, key=lambda episode: episode.number), _tasks(root / TASKS), files)


def _episode(root: Path, info: Mapping[str, Any], row: Mapping[str, Any]) -> Episode:
    videos = {}
    for key in video_keys(info):
        place = {name: row[f"videos/{key}/{name}"] for name in ("chunk_index", "file_index")}
        path = root / info["video_path"].format(video_key=key, **place)
        videos[key] = (path, round(row[f"videos/{key}/from_timestamp"] * float(info["fps"])))
    data = info["data_path"].format(chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
    return Episode(int(row["episode_index"]), int(row["length"]), root / data, videos)


def _tasks(path: Path) -> dict[int, str]:
    rows = read_parquet(path).to_pylist()
    name = "task" if rows and "task" in rows[0] else "__index_level_0__"
    return {int(row["task_index"]): str(row[name]) for row in rows}
